"""Interleaved timing.

All calls take turns in every round, in an order shuffled anew each time, so that a machine that slows down
for a while slows them all, and ratios are taken within a round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

_L2_FLUSH_BYTES = 256 << 20
_CLOCK = 2e9  # of the device, at least: cycles of a sleep in a second
_MAX_SLEEP = 1e-3

Round = dict[str, float]  # seconds per call; a slow call sits out some rounds
Call = Callable[[int], object]  # takes the number of the input copy to use
Timer = Callable[[Call, int], float]  # seconds of that call


class Spread(NamedTuple):
    """Median and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*np.quantile(values, (0.5, 0.2, 0.8)).tolist())


def cpu_timer(call: Call, copy: int) -> float:
    start = time.perf_counter()
    call(copy)
    return time.perf_counter() - start


class CudaTimer:
    """Device time between two events, from a cold L2.

    The device is kept busy, so that all launches of a call are queued before it comes to the first event; `late`
    counts the calls where it was there earlier, and whose times hold some of the host's. The cache is flushed by
    reading, which leaves no lines that would be written back during the call.
    """

    def __init__(self) -> None:
        self.flush = torch.zeros(_L2_FLUSH_BYTES // 4, device="cuda")
        self.sink = torch.zeros((), device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.host = 0.0  # seconds that recent calls took to launch
        self.calls = self.late = 0

    def __call__(self, call: Call, copy: int) -> float:
        torch.cuda._sleep(int(_CLOCK * min(1.5 * self.host, _MAX_SLEEP)))
        torch.sum(self.flush, dim=0, out=self.sink)
        self.start.record()
        begin = time.perf_counter()
        call(copy)
        self.end.record()
        late = self.start.query()
        self.host = max(time.perf_counter() - begin, 0.95 * min(self.host, _MAX_SLEEP))
        self.end.synchronize()
        self.calls += 1
        self.late += late
        return self.start.elapsed_time(self.end) / 1e3

    @property
    def launched_late(self) -> str:
        return f"{self.late} of {self.calls} calls"


def graphed(step: Callable[[int], Any], copies: int) -> Callable[[int], Any]:
    """`step` as CUDA graphs, one for each copy of the inputs: whatever it does, replaying it is one launch.

    Every replay returns the same tensors, filled anew.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set up outside of the capture what they need
        for copy in range(copies):
            step(copy)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = [torch.cuda.CUDAGraph() for _ in range(copies)]
    results = []
    for copy, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            results.append(step(copy))

    def replay(copy: int) -> Any:
        graphs[copy].replay()
        return results[copy]

    return replay


def ready(step: Callable[[int], Any], device: str, copies: int) -> Callable[[int], Any]:
    """As it is timed where launching is no part of the time."""
    return graphed(step, copies) if device == "cuda" else step


def timer(device: str) -> Timer:
    return CudaTimer() if device == "cuda" else cpu_timer


def synchronize(device: str) -> None:
    """Raises what the calls before did wrong."""
    if device == "cuda":
        torch.cuda.synchronize()


def first_line(error: Exception) -> str:
    """What a row has room for."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def every_nth(
    estimates: Mapping[str, float], budget: float, min_rounds: int, max_rounds: int
) -> tuple[int, dict[str, int]]:
    """How many rounds, and which call takes part in every how many of them.

    Each call gets about `budget` seconds. Steps are powers of two, so that the rounds of a slow call are
    among those of every faster one and a ratio of the two can be taken in each.
    """
    wanted = {name: min(max(budget / max(t, 1e-9), min_rounds), max_rounds) for name, t in estimates.items()}
    rounds = int(max(wanted.values()))
    steps = dict.fromkeys(wanted, 1)
    for name, count in wanted.items():
        while rounds // (2 * steps[name]) >= count:
            steps[name] *= 2
    return rounds, steps


def interleaved(
    calls: Mapping[str, Call], timer: Timer, copies: int, budget: float, min_rounds: int, max_rounds: int
) -> list[Round]:
    """Seconds per call and round, after a warm-up.

    Consecutive calls take different ones of the `copies` of the inputs. `budget` is in seconds for each of `calls`,
    more where `min_rounds` of them take longer.
    """
    estimates = {}
    for name, call in calls.items():
        first = timer(call, 0)
        estimates[name] = first if first > budget / min_rounds else timer(call, copies - 1)
    rounds, steps = every_nth(estimates, budget, min_rounds, max_rounds)
    order, shuffle, turn, result = list(calls), random.Random(0), 0, []
    for j in range(rounds):
        shuffle.shuffle(order)
        seconds: Round = {}
        for name in order:
            if j % steps[name] == 0:
                seconds[name] = timer(calls[name], turn % copies)
                turn += 1
        result.append(seconds)
    return result


def seconds(rounds: list[Round], name: str) -> list[float]:
    return [r[name] for r in rounds if name in r]


def paired_ratio(rounds: list[Round], name: str, base: str) -> Spread:
    """Of the ratios ``name / base`` within each round that has both."""
    return Spread.of([r[name] / r[base] for r in rounds if name in r and base in r])


def row(rounds: list[Round], name: str, bases: Mapping[str, str] = {}) -> dict[str, Any]:  # noqa: B006
    """The columns of a result that hold times, and ratios to `bases`: what they are called -> the call."""
    samples = seconds(rounds, name)
    median, p20, p80 = Spread.of([1e6 * t for t in samples])
    found = {"rounds": len(samples), "median_us": median, "p20_us": p20, "p80_us": p80}
    for base, other in bases.items():
        ratio, p20, p80 = paired_ratio(rounds, name, other)
        found |= {f"to_{base}": ratio, f"to_{base}_p20": p20, f"to_{base}_p80": p80}
    return found
