"""The run itself: gate, time, make rows."""

from __future__ import annotations

import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch

import flatlora_kernels as fk
from flatlora_kernels.spec.noise import KINDS

from . import gate, memory, overhead, providers, timing
from .machine_code import precompile
from .problem import SCALING, SIGMA, Problem
from .providers import NOISELESS, REFERENCE, Provider, Run, Unfit
from .results import Row
from .shapes import Case
from .timing import Spread

COPIES = 3  # of the inputs, used in turn
# In a core's cache, and from memory.
GENERATOR_SHAPES = {"cpu": ((128, 512), (2048, 2048)), "cuda": ((2048, 2048), (4096, 4096))}
GRAPH_ROWS = 512  # "small": with so few rows of x, launching may take longer than computing


class Settings(NamedTuple):
    device: str
    noises: tuple[str, ...] = KINDS
    providers: tuple[str, ...] | None = None  # names, or what a name begins with; None = all
    compiled: bool = True
    ways: bool = False  # the op's other strategies, noise_accum="split" and its own choice as well
    reference: bool = True  # also where another backend runs; it can take seconds a call
    budget: float = 0.5  # seconds for each provider of a case
    min_rounds: int = 5
    max_rounds: int = 200
    time_limit: float = math.inf  # seconds; no case is begun after it
    graph: str = "none"  # cases to be timed as CUDA graphs, too: "none", "small", "all"
    parts: bool = True  # also overhead, generator and noise_scale by themselves


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line per step."""

    def __init__(self, total: int, stream: Any = None) -> None:
        self.total, self.done, self.stream = total, 0, stream or sys.stderr
        self.live = self.stream.isatty()
        self.start = 0.0

    def step(self, what: str) -> None:
        self.start = self.start or time.perf_counter()
        elapsed = time.perf_counter() - self.start
        left = f", about {elapsed / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        self.done += 1
        self.note(f"[{self.done}/{self.total}] {elapsed:.0f} s{left}: {what}")

    def note(self, text: str) -> None:
        self.stream.write(f"\r\033[K{text[:150]}" if self.live else f"{text}\n")
        self.stream.flush()

    def say(self, text: str) -> None:
        self.stream.write(("\r\033[K" if self.live else "") + text + "\n")

    def close(self) -> None:
        if self.live:
            self.stream.write("\r\033[K")


class Bench:
    """Collects the rows, what failed and what was left out."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings = settings
        self.progress = progress
        self.timer = timing.timer(settings.device)
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.skipped: dict[str, None] = {}  # in order, each once
        self.after_case: Callable[[Bench], object] = lambda bench: None
        for name, reason in providers.available_backends(settings.device).items():
            if reason is not None:
                self.skip(f"fused:{name}: {reason}")
        self.providers = _wanted(providers.every(settings.device), settings)

    def skip(self, what: str) -> None:
        if what not in self.skipped:
            self.skipped[what] = None

    def fail(self, what: str) -> None:
        self.failures.append(what)
        self.progress.say(f"FAILED {what}")

    def linear(self, case: Case, measure_memory: bool) -> None:
        """One case: every provider through the gate, then all that passed against the clock."""
        problem = Problem(case, self.settings.device, COPIES)
        runs: dict[str, tuple[Provider, str, Run, gate.Verdict]] = {}
        for p in self.providers:
            if p.needs_rank and not case.rank:
                continue
            for noise in p.noises:
                if noise != NOISELESS and noise not in self.settings.noises:
                    continue
                label = f"{p.name} {noise}"
                try:
                    run = p.make(problem, noise)
                    verdict = gate.check(run)
                except (Unfit, NotImplementedError) as reason:
                    self.skip(f"{p.name}: {reason}")
                    continue
                except Exception as error:  # one broken provider must not cost the others their numbers
                    self.fail(f"{case}, {label}: {type(error).__name__}: {error}")
                    traceback.print_exc(limit=-3)
                    continue
                if verdict.passed:
                    runs[label] = (p, noise, run, verdict)
                else:
                    self.fail(f"{case}, {label}: gate: {verdict.detail}")
        if not runs:
            return
        for row in self._rows(case, runs, {label: run.step for label, (_, _, run, _) in runs.items()}):
            if measure_memory:
                name, noise = row["provider"], row["noise"]
                row["peak_extra_bytes"] = memory.peak_extra_bytes(case, self.settings.device, name, noise)
            self.rows.append(row)
        if self.settings.graph == "all" or (self.settings.graph == "small" and case.M <= GRAPH_ROWS):
            self._graphs(case, {label: entry for label, entry in runs.items() if entry[2].capturable})

    def linear_cases(
        self, cases: Sequence[Case], memory_cases: Collection[Case] = (), started: float | None = None
    ) -> None:
        """Each case in turn, as long as there is time; started: when the time began, default now."""
        started = time.perf_counter() if started is None else started
        self.progress.total = len(cases)
        for number, case in enumerate(cases):
            if time.perf_counter() - started > self.settings.time_limit:
                self.skip(f"the last {len(cases) - number} of {len(cases)} cases, for time (--time-limit)")
                break
            self.progress.step(str(case))
            self.linear(case, case in memory_cases)
            self.after_case(self)
            gc.collect()
        self.progress.close()

    def _graphs(self, case: Case, runs: dict[str, tuple[Provider, str, Run, gate.Verdict]]) -> None:
        """The same by replaying CUDA graphs, through the gate as well."""
        replays = {}
        for label, (p, _, run, _) in runs.items():
            try:
                replay = timing.graphed(run.step, COPIES)
                verdict = gate.check(run, step=replay)
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                if p.fused:
                    self.fail(f"{case}, {label}, graph: {what}")
                else:
                    self.skip(f"{p.name} as a CUDA graph: {what}")
                continue
            if verdict.passed:
                replays[label] = replay
            else:
                self.fail(f"{case}, {label}, graph: gate: {verdict.detail}")
        if replays:
            runs = {label: runs[label] for label in replays}
            self.rows += [{**row, "launch": "graph"} for row in self._rows(case, runs, replays)]

    def _rows(
        self,
        case: Case,
        runs: dict[str, tuple[Provider, str, Run, gate.Verdict]],
        calls: dict[str, timing.Call],
    ) -> list[Row]:
        rounds = self._time(calls)
        times = {label: Spread.of(timing.seconds(rounds, label)) for label in runs}
        rows = []
        for label, (p, noise, _, verdict) in runs.items():
            row: Row = {"kind": "linear", **case._asdict(), "provider": p.name, "noise": noise}
            row |= timing.row(rounds, label)
            row["error_over_limit"] = verdict.error_over_limit
            rivals = [
                n
                for n, (q, k, _, _) in runs.items()
                if k == noise != NOISELESS and not q.fused and n != label
            ]
            bases = {base: f"{base} {NOISELESS}" for base in ("plain", "lora", "peft")}
            if rivals:
                bases["rival"] = min(rivals, key=lambda name: times[name].median)
                row["rival"] = bases["rival"].split()[0]
            for base, name in bases.items():
                if name in runs and name != label:
                    row |= timing.ratio_row(base, timing.paired_ratio(rounds, label, name))
            rows.append(row)
        return rows

    def noise_scale(self, case: Case) -> None:
        """What a refresh of `noise_scale` costs: it is not part of the other times."""
        problem = Problem(case._replace(M=1, mode="forward"), self.settings.device, COPIES)

        def torch_only(copy: int) -> None:
            i = problem.inputs[copy]
            merged = i.weight
            if i.lora_A is not None:
                merged = torch.addmm(merged, i.lora_B, i.lora_A, alpha=SCALING)
            torch.linalg.vector_norm(merged, dim=1, dtype=torch.float32).mul_(SIGMA * case.K**-0.5)

        def backend(name: str) -> timing.Call:
            def refresh(copy: int) -> None:
                i = problem.inputs[copy]
                fk.flat_noise_scale(i.weight, i.lora_A, i.lora_B, scaling=SCALING, sigma=SIGMA, backend=name)

            return refresh

        about = {"model": case.model, "layer": case.layer, "N": case.N, "K": case.K, "dtype": case.dtype}
        calls = {"torch": torch_only, **self._backends(problem, backend)}
        about |= {"kind": "noise_scale", "rank": case.rank, "noise": NOISELESS}
        rounds = self._time(calls)
        self.rows += [{**about, "provider": name, **timing.row(rounds, name)} for name in calls]

    def generator(self, N: int, K: int, dtype: str) -> None:
        """The noise alone, as one-pass perturb_weight into memory that is there, and by torch's generator."""
        small, large = (
            Problem(Case("", "", 1, *size, dtype, "forward", 0), self.settings.device, copies=1)
            for size in ((1, 8), (N, K))
        )
        torch_generator = torch.Generator(self.settings.device)
        out = torch.empty_like(large.inputs[0].weight)

        def backend_call(problem: Problem, noise: str) -> Callable[[str], timing.Call]:
            i = problem.inputs[0]
            into = torch.empty_like(i.weight)
            return lambda name: (
                lambda _: fk.perturb_weight(
                    i.weight, i.noise_scale, seed=i.seed, noise=noise, out=into, backend=name
                )
            )

        for noise in self.settings.noises:
            calls = self._backends(large, backend_call(large, noise))
            empty = self._backends(small, backend_call(small, noise))
            if noise == "gaussian":
                calls["torch"] = lambda _: out.normal_(generator=torch_generator)
                empty["torch"] = lambda _: out[:1, :8].normal_(generator=torch_generator)
            else:
                calls["torch"] = lambda _: out.random_(0, 2, generator=torch_generator)
                empty["torch"] = lambda _: out[:1, :8].random_(0, 2, generator=torch_generator)
            rounds = self._time(calls | {f"empty {name}": call for name, call in empty.items()})
            about = {"kind": "noise", "N": N, "K": K, "dtype": dtype, "noise": noise}
            for name in calls:
                row = {**about, "provider": name, **timing.row(rounds, name)}
                if self.settings.device == "cpu":
                    both = [r for r in rounds if name in r and f"empty {name}" in r]
                    net = Spread.of([r[name] - r[f"empty {name}"] for r in both]).median
                    row["ns_per_value_core"] = net * 1e9 * torch.get_num_threads() / (N * K)
                self.rows.append(row)

    def _backends(self, problem: Problem, make: Callable[[str], timing.Call]) -> dict[str, timing.Call]:
        """Of the fused providers that fit, by backend name, after a first call."""
        calls = {}
        for p in self.providers:
            if p.name.startswith("fused:"):
                name = p.name.partition(":")[2]
                try:
                    p.make(problem, self.settings.noises[0])
                    calls[name] = make(name)
                    calls[name](0)
                except (Unfit, NotImplementedError) as reason:
                    calls.pop(name, None)
                    self.skip(f"{p.name}: {reason}")
        return calls

    def _time(self, calls: dict[str, timing.Call]) -> list[timing.Round]:
        s = self.settings
        return timing.interleaved(calls, self.timer, COPIES, s.budget, s.min_rounds, s.max_rounds)


def _wanted(every: list[Provider], settings: Settings) -> list[Provider]:
    if settings.providers is not None:
        names = {"plain", *settings.providers}
        return [p for p in every if p.name in names or p.name.partition(":")[0] in names]
    unwanted = set()
    if not settings.compiled:
        unwanted |= {p.name for p in every if p.compiled}
    if not settings.ways:
        unwanted |= {p.name for p in every if p.fused and not p.name.startswith("fused:")}
    if not settings.reference and sum(p.name.startswith("fused:") for p in every) > 1:
        unwanted.add(f"fused:{REFERENCE}")
    return [p for p in every if p.name not in unwanted]


def compile_first(
    device: str, cases: Sequence[Case], noises: Sequence[str], processes: int | None = None
) -> None:
    """Compiles what the triton backend will run, on all cores, before anything is timed.

    processes: 0 = not; None = as BENCH_PROCESSES says, else for all cores.
    """
    if processes is None and "BENCH_PROCESSES" in os.environ:
        processes = int(os.environ["BENCH_PROCESSES"])
    if device == "cuda" and processes != 0 and "fused:triton" in [p.name for p in providers.every(device)]:
        for line in precompile.run(precompile.table_jobs(cases, noises), processes):
            print(f"compiling: {line}", file=sys.stderr)


def run(
    settings: Settings,
    cases: Sequence[Case],
    memory_cases: set[Case],
    after_case: Callable[[Bench], object] = lambda bench: None,
) -> Bench:
    """Everything there is to measure in `cases`."""
    started = time.perf_counter()
    layers = list(dict.fromkeys(c._replace(M=1, mode="forward") for c in cases))
    dtypes = list(dict.fromkeys(c.dtype for c in cases))
    progress = Progress(len(cases))
    bench = Bench(settings, progress)
    bench.after_case = after_case
    if not settings.parts:
        bench.linear_cases(cases, memory_cases, started)
        return bench
    progress.note("overhead per call")
    backends = [p.name.partition(":")[2] for p in bench.providers if p.name.startswith("fused:")]
    bench.rows += overhead.measure(backends, settings.device)
    for dtype in dtypes:
        progress.note(f"noise generator, {dtype}")
        for N, K in GENERATOR_SHAPES[settings.device]:
            bench.generator(N, K, dtype)
    for layer in layers:
        progress.note(f"noise_scale, {layer.model} {layer.layer}, {layer.dtype}, rank {layer.rank}")
        bench.noise_scale(layer)
    bench.linear_cases(cases, memory_cases, started)
    return bench
