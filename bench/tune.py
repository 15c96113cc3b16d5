"""Searches tiles for the products of the Triton backend and prints a table for triton_kernels/configs.py.

The present table gives the structure: directions, classes of rows, where a tile must fill the processors. Each of its
lines is searched on its own, in two steps. First all candidates on one problem of 4096 x 4096 with gaussian noise.
Then the best of them, and the present tile, with the other noise, type, layers and numbers of rows as well; the
smallest geometric mean of the times over plain's wins. A candidate is timed once it has compiled without spilling and
its result has passed the gate. Times are those of CUDA graphs: launching is no part of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import environment, gate, results, timing
from .machine_code import precompile
from .machine_code.precompile import Job, Outcome, using
from .problem import COPIES, Problem
from .providers import Fused, Plain
from .shapes import Case

DIRECTIONS = ("forward", "input_grad")  # of the table; also the modes of the cases
LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))  # searched on the first, confirmed on all
LAYERS_DRY = ((40, 48),)
FINALISTS = 4
RANK = 16

# Bytes of shared memory for one block, and what the search allows a thread for sums and one tile of the weight.
_SHARED = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx": 64 << 10}
_REGISTERS = 200


def space(most: int, family: str) -> tuple[tuple[Any, ...], ...]:
    """For a line of the table that is for so many rows of x at most.

    block_m, block_out, block_in, num_warps, num_stages, carry, per_processor: all combinations that fit into registers
    and shared memory.
    """
    if family == "interpreter":
        return (16, 64), (32, 64), (64,), (1,), (1,), (True, False), (1,)
    if most <= 16:
        return (16,), (32, 64, 128), (32, 64, 128), (2, 4, 8), (2, 3, 4, 5), (False, True), (1, 2, 4, 8)
    if most <= 64:
        return (32, 64), (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (True, False), (1, 2, 4)
    if most <= 128:
        return (64, 128), (64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (True,), (1, 2)
    return (128, 256), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4), (True,), (1, 2)


class Line(NamedTuple):
    """A line of the table."""

    direction: str
    place: int  # among those of its direction
    most: int  # rows
    tile: Any  # configs.Config, the present one
    cases: tuple[tuple[Case, str], ...]  # and the noise; the first is for the search

    def __str__(self) -> str:
        return f"{self.direction}, {self.cases[0][0].M} rows"


class Tuner:
    """Collects raw rows, winners and what was dropped."""

    def __init__(self, device: str, dtypes: Sequence[str], candidates: int, limit: float) -> None:
        from flatlora_kernels.triton_kernels import configs, launch

        self.configs, self.device, self.dtypes, self.count = configs, device, tuple(dtypes), candidates
        self.end = time.perf_counter() + limit
        self.machine = launch.machine_of(torch.empty(1, device=device))
        architecture = self.machine.architecture
        self.family = configs.family_of(architecture)
        self.interpreted = self.family == "interpreter"
        self.kind = self._kind()
        parts = (self.family, self.kind), (self.family, "any"), ("any", self.kind)
        self.table = next(configs.LINEAR[part] for part in parts if part in configs.LINEAR)
        self.timer = timing.timer(device)
        # Seconds for each call in the search and in the confirmation, and rounds at least.
        self.budgets, self.min_rounds = ((0.0, 0.0), 1) if self.interpreted else ((0.03, 0.1), 15)
        self.rows: list[dict[str, Any]] = []
        self.dropped: dict[str, None] = {}
        # Direction, place -> tile and what is said of it.
        self.winners: dict[tuple[str, int], tuple[Any, str]] = {}

    def _kind(self) -> str:
        if self.interpreted:
            return "any"
        single = [d == "float32" for d in self.dtypes]
        if any(single) and not all(single):
            raise ValueError(
                f"--dtypes: expected float32 alone or 16-bit types, got {', '.join(self.dtypes)}: "
                "the table has a part for each"
            )
        if not single[0]:
            return "half"
        fast = self.machine.arithmetic == "ptx" and torch.get_float32_matmul_precision() != "highest"
        return "tf32" if fast else "single"

    def lines(self) -> list[Line]:
        """Of the table, those that matter most first."""
        found = []
        for direction in DIRECTIONS:
            entries = self.table[direction]
            for place, (most, tile) in enumerate(entries):
                if self.interpreted:
                    rows: tuple[int, ...] = (min(most, 70),)
                elif most < self.configs.ANY:
                    rows = (most,)
                elif tile.fill or not any(t.fill for _, t in entries):
                    rows = (2048, 8192)
                else:
                    rows = (256,)
                found.append(Line(direction, place, most, tile, self._cases(direction, rows)))
        order = {2048: 0, 16: 1, 256: 2}
        return sorted(found, key=lambda line: order.get(line.cases[0][0].M, 3))

    def _cases(self, direction: str, rows: tuple[int, ...]) -> tuple[tuple[Case, str], ...]:
        layers = LAYERS_DRY if self.interpreted else LAYERS
        (N, K), M, dtype = layers[0], rows[0], self.dtypes[0]
        first = Case("tune", "square", M, N, K, dtype, direction, RANK)
        cases = [(first, "gaussian"), (first, "rademacher")]
        cases += [(first._replace(M=more), "gaussian") for more in rows[1:]]
        cases += [(first._replace(dtype=more), "gaussian") for more in self.dtypes[1:]]
        cases += [(first._replace(layer=f"{n}x{k}", N=n, K=k), "gaussian") for n, k in layers[1:]]
        return tuple(cases)

    def candidates(self, line: Line) -> list[Any]:
        """The present tile, then those that differ least from it and from those of the table's other lines."""
        itemsize = getattr(torch, self.dtypes[0]).itemsize
        known = [tile._replace(fill=line.tile.fill) for _, tile in self.table[line.direction]]
        found: list[Any] = []
        for values in itertools.product(*space(line.most, self.family)):
            tile = self.configs.Config(*values[:6], line.tile.fill, values[6])
            m, out, into, warps, stages = values[:5]
            shared = (stages * (m + out) + out) * into * itemsize
            registers = (m * out + out * into) / (32 * warps)
            fits = self.interpreted or (shared <= _SHARED[self.family] and registers <= _REGISTERS)
            if fits and m <= max(line.most, 16) and 32 * warps <= m * out:
                found.append(tile)
        found.sort(key=lambda tile: (_distance(tile, line.tile), min(_distance(tile, t) for t in known)))
        M = line.cases[0][0].M
        own = [t for t in known if t.block_m <= max(line.most, 16) and 8 * t.block_m >= min(M, 256)]
        # Tiles that differ in `per_processor` alone may cut the contraction alike.
        different: dict[Any, Any] = {}
        for tile in [line.tile, *own, *found]:
            different.setdefault((tile._replace(per_processor=1), self._parts(tile, line)), tile)
        return list(different.values())[: self.count]

    def _parts(self, tile: Any, line: Line) -> int:
        """Of the contraction, in the case of the search."""
        case = line.cases[0][0]
        outputs, length = (case.N, case.K) if line.direction == "forward" else (case.K, case.N)
        tiles = -(-case.M // tile.block_m) * -(-outputs // tile.block_out)
        workspace = min(16 << 20, case.N * case.K * getattr(torch, case.dtype).itemsize // 4)
        processors = self.machine.processors
        return self.configs.splits(tile, tiles, length, 4 * case.M * outputs, workspace, processors)[0]

    def run(self, processes: int | None = None, say: Callable[[str], None] = lambda text: None) -> None:
        lines = self.lines()
        workers = None if self.interpreted else precompile.pool(processes)
        try:
            # All at once: compiling goes on while what is there is timed.
            jobs = {line: _submit(workers, *line.cases[0], self.candidates(line)) for line in lines}
            for line in lines:
                if self._left() <= 0 and workers:
                    self._drop(f"{line}: not reached in time, the present tile stays")
                else:
                    self._search(line, jobs[line], say, workers)
        finally:
            if workers:
                workers.shutdown(wait=False, cancel_futures=True)

    def _left(self) -> float:
        return self.end - time.perf_counter()

    def _drop(self, what: str) -> None:
        self.dropped[what] = None

    def _search(self, line: Line, futures: dict[Any, Any], say: Callable[[str], None], workers: Any) -> None:
        say(f"{line}: {len(futures)} candidates on {line.cases[0][0]}, {line.cases[0][1]}")
        ratios = self._time(line, 0, futures)
        best = sorted(ratios, key=lambda tile: ratios[tile])[:FINALISTS]
        finals = {tile: [ratios[tile]] for tile in dict.fromkeys([*best, line.tile]) if tile in ratios}
        confirmed = 1
        for number in range(1, len(line.cases)):
            if self._left() <= 0 or len(finals) < 2:
                break
            ratios = self._time(line, number, _submit(workers, *line.cases[number], finals))
            finals = {tile: [*finals[tile], ratios[tile]] for tile in finals if tile in ratios}
            confirmed += bool(finals)
        if not finals:
            self._drop(f"{line}: no candidate is left, the present tile stays")
            return
        means = {tile: statistics.geometric_mean(found) for tile, found in finals.items()}
        winner = min(means, key=lambda tile: means[tile])
        said = [f"{means[winner]:.2f} of plain over {confirmed} of {len(line.cases)} cases"]
        if winner != line.tile:
            present = f"{means[line.tile]:.2f}" if line.tile in means else "fails"
            said.append(f"before {present} with {text_of(line.tile)}")
        self.winners[line.direction, line.place] = (winner, ", ".join(said))
        say(f"{line}: {text_of(winner)}, {'; '.join(said)}")

    def _time(self, line: Line, number: int, futures: dict[Any, Any]) -> dict[Any, float]:
        """Time over plain's of every tile that is right, on one of the line's cases; adds the raw rows."""
        gc.collect()  # the graphs of the case before
        concurrent.futures.wait(futures.values(), timeout=max(0.0, self._left()))
        case, noise = line.cases[number]
        problem = Problem(case, self.device, COPIES)
        calls = {"plain": timing.ready(Plain(problem, "none").step, self.device, COPIES)}
        rows = {}
        for tile, future in futures.items():
            outcome = precompile.outcome_of(future) if future.done() else Outcome("not compiled in time")
            future.cancel()
            outcome, verdict, call = self._try(problem, noise, tile, outcome)
            if call:
                calls[text_of(tile)] = call
            else:
                self._drop(f"{line}: {text_of(tile)}: {outcome.error}")
            rows[tile] = {
                "architecture": self.machine.architecture, "direction": line.direction, "most_rows": line.most,
                "M": case.M, "N": case.N, "K": case.K, "rank": case.rank, "dtype": case.dtype, "noise": noise,
                **tile._asdict(), "present": tile == line.tile, **outcome._asdict(),
                "error_over_limit": verdict.error_over_limit if verdict else None,
            }  # fmt: skip
        rounds = timing.interleaved(calls, self.timer, COPIES, self.budgets[number > 0], self.min_rounds, 200)
        for tile, row in rows.items():
            if text_of(tile) in calls:
                row |= timing.row(rounds, text_of(tile), {"plain": "plain"})
        self.rows += rows.values()
        return {tile: row["to_plain"] for tile, row in rows.items() if "to_plain" in row}

    def _try(
        self, problem: Problem, noise: str, tile: Any, outcome: Outcome
    ) -> tuple[Outcome, gate.Verdict | None, timing.Call | None]:
        """Through the gate, and made ready to be timed."""
        if not outcome.error and outcome.spilled:
            outcome = outcome._replace(error=f"spills {outcome.spilled} words of a thread")
        if outcome.error:
            return outcome, None, None
        run = Fused(problem, noise, "triton")

        def step(copy: int) -> tuple[torch.Tensor, ...]:
            with using(tile):
                return run.step(copy)

        try:
            verdict = gate.check(run, step=step)
            if not verdict.passed:
                return outcome._replace(error=f"wrong: {verdict.detail}"), verdict, None
            return outcome, verdict, timing.ready(step, self.device, COPIES)
        except Exception as error:
            timing.synchronize(self.device)  # an error that no later call would survive ends the search
            return outcome._replace(error=timing.first_line(error)), None, None

    def text(self) -> str:
        """The table, as configs.py has it."""
        lines = [f'    ("{self.family}", "{self.kind}"): {{']
        for direction in DIRECTIONS:
            lines.append(f'        "{direction}": (')
            for place, (most, tile) in enumerate(self.table[direction]):
                tile, said = self.winners.get((direction, place), (tile, "not measured"))
                bound = "ANY" if most == self.configs.ANY else most
                lines += [f"            # {said}", f"            ({bound}, {text_of(tile)}),"]
            lines.append("        ),")
        return "\n".join([*lines, "    },"])


def _distance(a: Any, b: Any) -> int:
    """Doublings between two tiles, and other differences."""
    sizes = sum(abs(int(math.log2(x / y))) for x, y in zip(a[:4], b[:4], strict=True))
    rest = abs(a.num_stages - b.num_stages) + (a.carry != b.carry)
    return sizes + rest + abs(int(math.log2(a.per_processor / b.per_processor)))


def text_of(tile: Any) -> str:
    """As one writes it: defaults are left out."""
    required = tile[: len(tile) - len(tile._field_defaults)]
    given = [f"{f}={getattr(tile, f)}" for f, v in tile._field_defaults.items() if getattr(tile, f) != v]
    return f"Config({', '.join([*map(str, required), *given])})"


def _submit(workers: Any, case: Case, noise: str, tiles: Iterable[Any]) -> dict[Any, Any]:
    """The futures of these tiles; the interpreter compiles nothing."""
    precision = torch.get_float32_matmul_precision()
    if workers:
        return {t: workers.submit(precompile.work, Job(case, noise, "fused", t, precision)) for t in tiles}
    futures: dict[Any, Any] = {tile: concurrent.futures.Future() for tile in tiles}
    for future in futures.values():
        future.set_result(Outcome())
    return futures


def save(tuner: Tuner, meta: dict[str, Any], stem: Path) -> list[Path]:
    columns = list(dict.fromkeys(name for row in tuner.rows for name in row))
    found = {"meta": meta, "rows": tuner.rows, "dropped": list(tuner.dropped), "table": tuner.text()}
    return [
        results.write_csv(tuner.rows, columns, stem.with_name(stem.name + ".csv")),
        results.write_json(found, stem),
    ]


def main(args: argparse.Namespace) -> int:
    """What the command does; its exit status."""
    from flatlora_kernels import backends

    if reason := backends.unavailable("triton"):
        raise ValueError(f"tune needs backend triton, which cannot run here: {reason}")
    from flatlora_kernels.triton_kernels.launch import INTERPRETED

    dtypes, dry_run = args.dtypes, args.dry_run
    if dry_run and not INTERPRETED:
        raise ValueError("--dry-run is for Triton's interpreter: set TRITON_INTERPRET=1")
    if INTERPRETED and not dry_run:
        raise ValueError(
            "tune needs a GPU, and TRITON_INTERPRET=1 runs the kernels on the CPU, where no time means anything; "
            "--dry-run goes through the motions"
        )
    device = "cpu" if dry_run else "cuda"
    meta = environment.describe(device)
    if "tf32" in dtypes:
        if len(dtypes) > 1:
            raise ValueError(f"--dtypes: expected tf32 alone, got {', '.join(dtypes)}")
        torch.set_float32_matmul_precision("high")
        dtypes = ["float32"]
    tuner = Tuner(device, dtypes, args.candidates, args.time_limit)
    warning = "DRY RUN in Triton's interpreter: its times are no result of any kind"
    if dry_run:
        print(warning)
    failed = None
    try:
        tuner.run(args.processes, lambda text: print(text, flush=True))
    except Exception as error:  # it may have broken the device: what was found until then is worth keeping
        failed = f"FAILED: {type(error).__name__}: {error}"
    meta["config"] = {
        "dtypes": list(dtypes), "time_limit": args.time_limit, "candidates": args.candidates, "dry_run": dry_run,
    }  # fmt: skip
    where = (
        f"{meta['hardware']} ({tuner.machine.architecture}); torch {meta['torch']}, triton {meta['triton']}"
    )
    print("\n".join(f"dropped: {line}" for line in tuner.dropped))
    print(f"\n{where}; commit {meta['commit']}; {meta['date']}; {len(tuner.rows)} rows")
    if dry_run and not args.table:
        print("No table: --table prints one all the same")
    else:
        print(f"For LINEAR in triton_kernels/configs.py:\n\n{tuner.text()}\n")
    if dry_run:
        print(warning)
    if isinstance(tuner.timer, timing.CudaTimer):
        meta["launched_late"] = tuner.timer.launched_late
        print(f"Launched late: {meta['launched_late']}")
    print("\n".join(f"Written: {path}" for path in save(tuner, meta, results.file_stem(args, meta, "tune"))))
    if failed:
        print(failed)
    return 1 if failed or not tuner.winners else 0
