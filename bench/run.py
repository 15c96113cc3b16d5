"""The run itself: gate, time, make rows."""

from __future__ import annotations

import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from flatlora_kernels import backends

from . import gate, memory, providers, timing
from .machine_code import precompile
from .problem import COPIES, Problem
from .providers import NOISELESS, REFERENCE, Provider, Unfit
from .results import Results, Row
from .shapes import Case

NOISES = ("gaussian", "rademacher")  # where nobody asks for others
GRAPH_ROWS = 512  # "small": with so few rows of x, launching may take longer than computing


class Settings(NamedTuple):
    device: str
    noises: tuple[str, ...] = NOISES
    providers: tuple[str, ...] | None = None  # names, or what a name begins with; None = all
    compiled: bool = True
    ways: bool = False  # the op's other strategies, noise_accum="split" and its own choice as well
    reference: bool = True  # also where another backend runs; it can take seconds a call
    budget: float = 0.5  # seconds for each provider of a case
    min_rounds: int = 5
    max_rounds: int = 200
    time_limit: float = math.inf  # seconds; no case is begun after it
    goal: float = math.inf  # seconds for all cases without their memory; rounds become fewer to keep to it
    graph: str = "none"  # cases to be timed as CUDA graphs, too: "none", "small", "all"


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line per step."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, 0.0
        self.clear = "\r\033[K" if sys.stderr.isatty() else ""

    def step(self, what: str) -> None:
        self.start = self.start or time.perf_counter()
        elapsed = time.perf_counter() - self.start
        left = f", about {elapsed / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        self.done += 1
        self.note(f"[{self.done}/{self.total}] {elapsed:.0f} s{left}: {what}")

    def note(self, text: str) -> None:
        sys.stderr.write(f"{self.clear}{text[:150]}" if self.clear else f"{text}\n")
        sys.stderr.flush()

    def say(self, text: str) -> None:
        sys.stderr.write(f"{self.clear}{text}\n")

    def close(self) -> None:
        sys.stderr.write(self.clear)


class Entry(NamedTuple):
    """A provider that passed the gate; what runs is a `providers.Run` or a `training.Way`."""

    provider: Provider
    noise: str
    run: Any
    verdict: gate.Verdict


class Findings:
    """Collects the rows, what failed and what was left out."""

    def __init__(self, noises: Sequence[str], progress: Progress) -> None:
        self.noises, self.progress = (NOISELESS, *noises), progress
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.skipped: dict[str, None] = {}  # in order, each once

    def results(self, meta: dict[str, Any]) -> Results:
        return Results(meta, self.rows, self.failures, list(self.skipped))

    def skip(self, what: str) -> None:
        self.skipped[what] = None

    def fail(self, what: str) -> None:
        self.failures.append(what)
        self.progress.say(f"FAILED {what}")

    def admit(
        self, candidates: list[Provider], about: object, problem: Any, check: Callable[[Any], gate.Verdict]
    ) -> dict[str, Entry]:
        """Those that are right on this problem, by provider and noise."""
        entries = {}
        for p in candidates:
            for noise in (noise for noise in p.noises if noise in self.noises):
                label = f"{p.name} {noise}"
                try:
                    run = p.make(problem, noise)
                    verdict = check(run)
                except (Unfit, NotImplementedError) as reason:
                    self.skip(f"{p.name}: {reason}")
                except Exception as error:  # one broken provider must not cost the others their numbers
                    self.fail(f"{about}, {label}: {type(error).__name__}: {error}")
                    traceback.print_exc(limit=-3)
                else:
                    if verdict.passed:
                        entries[label] = Entry(p, noise, run, verdict)
                    else:
                        self.fail(f"{about}, {label}: gate: {verdict.detail}")
        return entries


def rows_of(
    entries: Mapping[str, Entry], rounds: list[timing.Round], about: Row, across_noises: bool = False
) -> list[Row]:
    """A row to each entry; the rival is the fastest other unfused one, whose noise may differ `across_noises`."""
    medians = {label: timing.Spread.of(timing.seconds(rounds, label)).median for label in entries}
    rows = []
    for label, (p, noise, _, verdict) in entries.items():
        rivals = []
        for other, (q, kind, _, _) in entries.items():
            comparable = NOISELESS not in (noise, kind) and (kind == noise or across_noises)
            if comparable and not q.fused and other != label:
                rivals.append(other)
        bases = {base: f"{base} {NOISELESS}" for base in ("plain", "lora", "peft")}
        if rivals:
            bases["rival"] = min(rivals, key=lambda name: medians[name])
        bases = {base: name for base, name in bases.items() if name in entries and name != label}
        row = {**about, "provider": p.name, "noise": noise, **timing.row(rounds, label, bases)}
        if rivals:
            row["rival"] = bases["rival"].split()[0]
        rows.append(row | {"error_over_limit": verdict.error_over_limit})
    return rows


class Bench(Findings):
    """Cases of the linear."""

    def __init__(
        self,
        settings: Settings,
        progress: Progress,
        after_case: Callable[[Bench], object] = lambda bench: None,
    ) -> None:
        super().__init__(settings.noises, progress)
        self.settings, self.after_case = settings, after_case
        self.share = 1.0  # of budget and rounds that a case gets
        self.aside = 0.0  # seconds that no later case will take: memory was measured
        self.timer = timing.timer(settings.device)
        for name, reason in providers.available_backends(settings.device).items():
            if reason is not None:
                self.skip(f"fused:{name}: {reason}")
        self.providers = _wanted(providers.every(settings.device), settings)

    def linear(self, case: Case, measure_memory: bool) -> None:
        """One case: every provider through the gate, then all that passed against the clock."""
        device, graph = self.settings.device, self.settings.graph
        candidates = [p for p in self.providers if case.rank or not p.needs_rank]
        entries = self.admit(candidates, case, Problem(case, device), gate.check)
        if not entries:
            return
        rows = self._rows(case, entries, {label: entry.run.step for label, entry in entries.items()})
        start = time.perf_counter()
        for row in rows if measure_memory else ():
            which = (row["provider"], row["noise"])
            row["peak_extra_bytes"] = memory.peak_extra_bytes(case, device, *which)
        self.aside += time.perf_counter() - start
        self.rows += rows
        if graph == "all" or (graph == "small" and case.M <= GRAPH_ROWS):
            self._graphs(case, {label: entry for label, entry in entries.items() if entry.run.capturable})

    def linear_cases(
        self, cases: Sequence[Case], memory_cases: Collection[Case] = (), started: float | None = None
    ) -> None:
        """Each case in turn, as long as there is time; started: when the time began, default now."""
        s, begun = self.settings, time.perf_counter()
        started = begun if started is None else started
        self.progress.total = len(cases)
        hurried, shares = 0, 0.0
        for number, case in enumerate(cases):
            now = time.perf_counter()
            if now - started > s.time_limit:
                for left in cases[number:]:
                    self.skip(f"{left}: no time left (--time-limit {s.time_limit:g}: more seconds have it)")
                break
            if number and s.goal < math.inf:
                taken = now - begun - self.aside
                whole = taken / shares * (len(cases) - number)  # seconds, at the pace so far
                self.share = min(1.0, max(0.1, (s.goal - taken) / whole))
            shares += self.share
            hurried += self.share < 1
            self.progress.step(str(case))
            self.linear(case, case in memory_cases)
            self.after_case(self)
            gc.collect()
        if hurried:
            self.skip(
                f"rounds, in {hurried} of {len(cases)} cases, for time (--budget {s.budget:g} has them)"
            )
        self.progress.close()

    def _graphs(self, case: Case, entries: dict[str, Entry]) -> None:
        """The same by replaying CUDA graphs, through the gate as well."""
        replays = {}
        for label, (p, _, run, _) in entries.items():
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
            replayed = {label: entries[label] for label in replays}
            self.rows += [{**row, "launch": "graph"} for row in self._rows(case, replayed, replays)]

    def _rows(self, case: Case, entries: dict[str, Entry], calls: dict[str, timing.Call]) -> list[Row]:
        return rows_of(entries, self.timed(calls), {"kind": "linear", **case._asdict()})

    def timed(self, calls: dict[str, timing.Call]) -> list[timing.Round]:
        s = self.settings
        least = min(s.min_rounds, max(2, round(self.share * s.min_rounds)))
        return timing.interleaved(calls, self.timer, COPIES, self.share * s.budget, least, s.max_rounds)


def _wanted(every: list[Provider], settings: Settings) -> list[Provider]:
    if settings.providers is not None:
        names = {"plain", *settings.providers}
        return [p for p in every if p.name in names or p.name.partition(":")[0] in names]
    alone = sum(p.name.startswith("fused:") for p in every) == 1

    def wanted(p: Provider) -> bool:
        return (
            (settings.compiled or not p.compiled)
            and (settings.ways or not p.fused or p.name.startswith("fused:"))
            and (settings.reference or alone or p.name != f"fused:{REFERENCE}")
        )

    return [p for p in every if wanted(p)]


def jobs(cases: Sequence[Case], noises: Sequence[str]) -> list[precompile.Job]:
    """What is compiled for these cases."""
    fused = tuple(noise for noise in noises if backends.fuses("triton", noise))
    ways = [(noise, way) for noise in noises if noise not in fused for way in ("transform", "panel")]
    more = [precompile.Job(case, noise, way) for case in cases for noise, way in ways]
    return [*precompile.table_jobs(list(cases), fused), *more]


def compile_jobs(device: str, jobs: list[precompile.Job], processes: int | None = None) -> None:
    """Compiles what the triton backend will run, on all cores, before anything is timed.

    processes: 0 = not; None = as BENCH_PROCESSES says, else for all cores.
    """
    if processes is None and "BENCH_PROCESSES" in os.environ:
        processes = int(os.environ["BENCH_PROCESSES"])
    if device == "cuda" and processes != 0 and "triton" in providers.usable_backends(device):
        for line in precompile.run(jobs, processes):
            print(f"compiling: {line}", file=sys.stderr)


def compile_first(
    device: str, cases: Sequence[Case], noises: Sequence[str], processes: int | None = None
) -> None:
    """The same, of these cases."""
    compile_jobs(device, jobs(cases, noises), processes)
