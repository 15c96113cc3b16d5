"""Searches tiles for the products of the Triton backend and prints a table for triton_kernels/configs.py.

The present table gives the structure: directions, classes of rows, where a tile must fill the processors. Each of its
lines is searched on its own, in two steps. First all candidates on one problem of 4096 x 4096 with gaussian noise.
Then the best of them, and the present tile, with the other noise, type, layers and numbers of rows as well; the
smallest geometric mean of the times over plain's wins. A candidate is timed once it has compiled without spilling and
its result has passed the gate. Times are those of CUDA graphs: launching is no part of them.
"""

from __future__ import annotations

import concurrent.futures
import csv
import gc
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import environment, gate, timing
from .machine_code import precompile
from .machine_code.precompile import Job, Outcome, using
from .problem import Problem
from .providers import Fused, Plain
from .shapes import Case
from .timing import Spread

DIRECTIONS = ("forward", "input_grad")  # of the table; also the modes of the cases
LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))  # searched on the first, confirmed on all
LAYERS_DRY = ((40, 48),)
FINALISTS = 4
COPIES = 3
RANK = 16

# Bytes of shared memory for one block, and what the search allows a thread for sums and one tile of the weight.
_SHARED = {"sm80": 163 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "gfx": 64 << 10}
_REGISTERS = 200


class Space(NamedTuple):
    """All combinations, of which those that cannot fit into registers or shared memory are left out."""

    block_m: tuple[int, ...]
    block_out: tuple[int, ...]
    block_in: tuple[int, ...]
    num_warps: tuple[int, ...]
    num_stages: tuple[int, ...]
    carry: tuple[bool, ...]
    per_processor: tuple[int, ...]


def space(most: int, family: str) -> Space:
    """For a line of the table that is for so many rows of x at most."""
    if family == "interpreter":
        return Space((16, 64), (32, 64), (64,), (1,), (1,), (True, False), (1,))
    if most <= 16:
        return Space(
            (16,), (32, 64, 128), (32, 64, 128), (2, 4, 8), (2, 3, 4, 5), (False, True), (1, 2, 4, 8)
        )
    if most <= 64:
        return Space((32, 64), (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (True, False), (1, 2, 4))
    if most <= 128:
        return Space((64, 128), (64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (True,), (1, 2))
    return Space((128, 256), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4), (True,), (1, 2))


class Line(NamedTuple):
    """A line of the table."""

    direction: str
    place: int  # among those of its direction
    most: int  # rows
    tile: Any  # configs.Config, the present one
    cases: tuple[tuple[Case, str], ...]  # and the noise; the first is for the search

    def __str__(self) -> str:
        return f"{self.direction}, {self.cases[0][0].M} rows"


class Candidate(NamedTuple):
    """What became of a tile on one case."""

    tile: Any
    outcome: Outcome
    verdict: gate.Verdict | None = None
    call: Callable[[int], Any] | None = None


class Tuner:
    """Collects raw rows, winners and what was dropped."""

    def __init__(self, device: str, dtypes: Sequence[str], candidates: int, limit: float) -> None:
        from flatlora_kernels.triton_kernels import configs, launch

        self.configs, self.device, self.dtypes, self.count = configs, device, tuple(dtypes), candidates
        self.end = time.perf_counter() + limit
        self.machine = launch.machine_of(torch.empty(1, device=device))
        architecture = self.machine.architecture
        self.family = "gfx" if architecture.startswith("gfx") else configs._FAMILIES.get(architecture, "sm80")
        self.kind = self._kind()
        tables = configs.LINEAR
        self.table = tables.get((self.family, self.kind)) or tables.get((self.family, "any"))
        self.table = self.table or tables["any", self.kind]
        self.timer = timing.timer(device)
        # Seconds for each call in the search and in the confirmation, and rounds at least.
        self.budgets, self.min_rounds = ((0.0, 0.0), 1) if self.interpreted else ((0.03, 0.1), 15)
        self.rows: list[dict[str, Any]] = []
        self.dropped: dict[str, None] = {}
        self.winners: dict[
            tuple[str, int], tuple[Any, str]
        ] = {}  # direction, place -> tile and what is said of it

    @property
    def interpreted(self) -> bool:
        return self.family == "interpreter"

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
        make, s = self.configs.Config, space(line.most, self.family)
        itemsize = getattr(torch, self.dtypes[0]).itemsize
        known = [tile._replace(fill=line.tile.fill) for _, tile in self.table[line.direction]]
        found = []
        for values in itertools.product(*s):
            m, out, into, warps, stages, carry, per_processor = values
            tile = make(m, out, into, warps, stages, carry, line.tile.fill, per_processor)
            threads = 32 * warps
            shared = (stages * (m + out) + out) * into * itemsize
            registers = (m * out + out * into) / threads
            fits = self.interpreted or (shared <= _SHARED[self.family] and registers <= _REGISTERS)
            if fits and m <= max(line.most, 16) and threads <= m * out:
                found.append(tile)
        found.sort(key=lambda tile: (_distance(tile, line.tile), min(_distance(tile, t) for t in known)))
        M = line.cases[0][0].M
        own = [t for t in known if t.block_m <= max(line.most, 16) and 8 * t.block_m >= min(M, 256)]
        different: dict[
            Any, Any
        ] = {}  # tiles that differ in `per_processor` alone may cut the contraction alike
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
        if self.interpreted:
            for line in lines:
                self._search(line, {tile: Outcome() for tile in self.candidates(line)}, say)
            return
        workers = precompile.pool(processes)
        try:
            jobs = {}
            for line in lines:  # all at once: compiling goes on while what is there is timed
                case, noise = line.cases[0]
                jobs[line] = {
                    t: workers.submit(precompile.work, self._job(case, noise, t))
                    for t in self.candidates(line)
                }
            for line in lines:
                if self._left() <= 0:
                    self._drop(f"{line}: not reached in time, the present tile stays")
                    continue
                self._search(line, self._results(line, jobs[line]), say, workers)
        finally:
            workers.shutdown(wait=False, cancel_futures=True)

    def _job(self, case: Case, noise: str, tile: Any) -> Job:
        return Job(case, noise, "fused", tile, torch.get_float32_matmul_precision())

    def _left(self) -> float:
        return self.end - time.perf_counter()

    def _drop(self, what: str) -> None:
        self.dropped[what] = None

    def _results(self, line: Line, futures: dict[Any, Any]) -> dict[Any, Outcome]:
        concurrent.futures.wait(futures.values(), timeout=max(0.0, self._left()))
        found = {}
        for tile, future in futures.items():
            if future.done():
                found[tile] = precompile.outcome_of(future)
            else:
                future.cancel()
                found[tile] = Outcome("not compiled in time")
        return found

    def _search(
        self, line: Line, outcomes: dict[Any, Outcome], say: Callable[[str], None], workers: Any = None
    ) -> None:
        case, noise = line.cases[0]
        say(f"{line}: {len(outcomes)} candidates on {case}, {noise}")
        scores = {
            tile: [ratio] for tile, ratio in self._time(line, case, noise, outcomes, self.budgets[0]).items()
        }
        best = sorted(scores, key=lambda tile: scores[tile][0])[:FINALISTS]
        if line.tile in scores:
            best = list(dict.fromkeys([*best, line.tile]))
        finals = {tile: list(scores[tile]) for tile in best}
        said = [f"{noise} {min(s[0] for s in finals.values()):.2f}"] if finals else []
        confirmed = 1
        for case, noise in line.cases[1:]:
            if self._left() <= 0 or len(finals) < 2:
                break
            outcomes = {tile: Outcome() for tile in finals}
            if workers is not None:
                futures = {
                    tile: workers.submit(precompile.work, self._job(case, noise, tile)) for tile in finals
                }
                outcomes = self._results(line, futures)
            ratios = self._time(line, case, noise, outcomes, self.budgets[1])
            finals = {tile: [*finals[tile], ratios[tile]] for tile in finals if tile in ratios}
            confirmed += bool(finals)
        if not finals:
            self._drop(f"{line}: no candidate is left, the present tile stays")
            return
        means = {tile: math.exp(sum(map(math.log, r)) / len(r)) for tile, r in finals.items()}
        winner = min(means, key=lambda tile: means[tile])
        said = [f"{means[winner]:.2f} of plain over {confirmed} of {len(line.cases)} cases"]
        if winner != line.tile:
            present = f"{means[line.tile]:.2f}" if line.tile in means else "fails"
            said.append(f"before {present} with {text_of(line.tile)}")
        self.winners[line.direction, line.place] = (winner, ", ".join(said))
        say(f"{line}: {text_of(winner)}, {'; '.join(said)}")

    def _time(
        self, line: Line, case: Case, noise: str, outcomes: dict[Any, Outcome], budget: float
    ) -> dict[Any, float]:
        """Time over plain's of every tile that is right; writes the raw rows."""
        problem = Problem(case, self.device, COPIES)
        tried = [self._try(problem, noise, tile, outcome) for tile, outcome in outcomes.items()]
        plain = Plain(problem, "none").step
        calls = {"plain": plain if self.device == "cpu" else timing.graphed(plain, COPIES)}
        calls |= {text_of(c.tile): c.call for c in tried if c.call is not None}
        rounds = timing.interleaved(calls, self.timer, COPIES, budget, self.min_rounds, 200)
        ratios = {}
        for c in tried:
            name = text_of(c.tile)
            row = {
                "architecture": self.machine.architecture, "direction": line.direction, "most_rows": line.most,
                "M": case.M, "N": case.N, "K": case.K, "rank": case.rank, "dtype": case.dtype, "noise": noise,
                **c.tile._asdict(), "present": c.tile == line.tile, **c.outcome._asdict(),
                "error_over_limit": c.verdict.error_over_limit if c.verdict else None,
            }  # fmt: skip
            if c.call is None:
                self._drop(f"{line}: {name}: {c.outcome.error}")
            else:
                ratio = timing.paired_ratio(rounds, name, "plain")
                times = timing.seconds(rounds, name)
                row |= dict(
                    zip(("median_us", "p20_us", "p80_us"), (1e6 * t for t in Spread.of(times)), strict=True)
                )
                row |= dict(zip(("to_plain", "to_plain_p20", "to_plain_p80"), ratio, strict=True))
                row["rounds"] = len(times)
                ratios[c.tile] = ratio.median
            self.rows.append(row)
        del calls, tried
        gc.collect()
        return ratios

    def _try(self, problem: Problem, noise: str, tile: Any, outcome: Outcome) -> Candidate:
        """Through the gate, and made ready to be timed."""
        if not outcome.error and outcome.spilled:
            outcome = outcome._replace(error=f"spills {outcome.spilled} words of a thread")
        if outcome.error:
            return Candidate(tile, outcome)
        run = Fused(problem, noise, "triton")

        def step(copy: int) -> tuple[torch.Tensor, ...]:
            with using(tile):
                return run.step(copy)

        try:
            verdict = gate.check(run, step=step)
            if not verdict.passed:
                return Candidate(tile, outcome._replace(error=f"wrong: {verdict.detail}"), verdict)
            return Candidate(
                tile, outcome, verdict, step if self.device == "cpu" else timing.graphed(step, COPIES)
            )
        except Exception as error:
            if self.device != "cpu":
                torch.cuda.synchronize()  # an error that no later call would survive shows here, and ends the search
            return Candidate(
                tile, outcome._replace(error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
            )

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
    defaults = type(tile)._field_defaults
    given = [
        str(v) if f not in defaults else f"{f}={v}" for f, v in tile._asdict().items() if defaults.get(f) != v
    ]
    return f"Config({', '.join(given)})"


def save(tuner: Tuner, meta: dict[str, Any], stem: Path) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + ".csv"), stem.with_name(stem.name + ".json")]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in tuner.rows for name in row)))
        writer.writeheader()
        writer.writerows(tuner.rows)
    found = {"meta": meta, "rows": tuner.rows, "dropped": list(tuner.dropped), "table": tuner.text()}
    paths[1].write_text(json.dumps(found, indent=1) + "\n")
    return paths


def main(
    dtypes: Sequence[str], limit: float, candidates: int, processes: int | None, out: Path, name: str | None,
    dry_run: bool, table: bool,
) -> int:  # fmt: skip
    """What the command does; its exit status."""
    from flatlora_kernels import backends

    if reason := backends.unavailable("triton"):
        raise ValueError(f"tune needs backend triton, which cannot run here: {reason}")
    from flatlora_kernels.triton_kernels.launch import INTERPRETED

    if INTERPRETED and not dry_run:
        raise ValueError(
            "tune needs a GPU, and TRITON_INTERPRET=1 runs the kernels on the CPU, where no time means anything; "
            "--dry-run goes through the motions"
        )
    if dry_run and not INTERPRETED:
        raise ValueError("--dry-run is for Triton's interpreter: set TRITON_INTERPRET=1")
    device = "cpu" if dry_run else "cuda"
    meta = environment.describe(device)
    if "tf32" in dtypes:
        if len(dtypes) > 1:
            raise ValueError(f"--dtypes: expected tf32 alone, got {', '.join(dtypes)}")
        torch.set_float32_matmul_precision("high")
        dtypes = ["float32"]
    tuner = Tuner(device, dtypes, candidates, limit)
    warning = "DRY RUN in Triton's interpreter: its times are no result of any kind"
    if dry_run:
        print(warning)
    failed = None
    try:
        tuner.run(processes, lambda text: print(text, flush=True))
    except (
        Exception
    ) as error:  # a kernel may have broken the device: what was found until then is worth keeping
        failed = f"FAILED: {type(error).__name__}: {error}"
    meta["config"] = {
        "dtypes": list(dtypes),
        "time_limit": limit,
        "candidates": candidates,
        "dry_run": dry_run,
    }
    where = (
        f"{meta['hardware']} ({tuner.machine.architecture}); torch {meta['torch']}, triton {meta['triton']}"
    )
    print("\n".join(f"dropped: {line}" for line in tuner.dropped))
    print(f"\n{where}; commit {meta['commit']}; {meta['date']}; {len(tuner.rows)} rows")
    if dry_run and not table:
        print("No table: --table prints one all the same")
    else:
        print(f"For LINEAR in triton_kernels/configs.py:\n\n{tuner.text()}\n")
    if dry_run:
        print(warning)
    if isinstance(tuner.timer, timing.CudaTimer):
        meta["launched_late"] = f"{tuner.timer.late} of {tuner.timer.calls} calls"
        print(f"Launched late: {meta['launched_late']}")
    stem = out / (name or f"tune-{meta['device']}-{meta['date'].replace(':', '').split('+')[0]}")
    print("\n".join(f"Written: {path}" for path in save(tuner, meta, stem)))
    if failed:
        print(failed)
    return 1 if failed or not tuner.winners else 0
