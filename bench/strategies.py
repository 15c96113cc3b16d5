"""Measures the ways to run the op that work here and writes the table that dispatch.py chooses by.

    python -m bench tune --strategies [--quick]
    python -m bench tune --strategies --isa avx2    the table of processors with AVX2, made on a newer one
    python -m bench tune --strategies --backends cuda; the same with triton; ... --rows FILE.json FILE.json

One row to a way, direction, noise, type and problem: its time over that of a plain product in the same round. The raw
rows go beside the other results. What fails the gate is not written, so that it is never chosen. On a CPU there are
rows without noise as well: "fused" is the backend's own product, "plain" torch's, both with an adapter.

A CPU's table is of an instruction set. Torch's libraries must be held to it as our kernels are, from their start:
--isa runs the command again in an environment (HELD) that does so. Hadamard noise comes last, when the table has the
rest: the plain product in its transform is then the one that the table chooses.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from flatlora_kernels.backends import cpu
from flatlora_kernels.choice import dispatch
from flatlora_kernels.core.noise import KINDS

from . import environment, providers, results, run
from .shapes import Case

TABLES = Path(dispatch.__file__).parent / "tables"
COLUMNS = "device,dtype,noise,direction,M,N,K,rank,backend,strategy,ratio,p20,p80,date,commit".split(",")
RATIOS = {"ratio": "to_plain", "p20": "to_plain_p20", "p80": "to_plain_p80"}  # columns of the table, of a row
MODES = ("forward", "input_grad")  # of a case, and directions of the table
RANK = 16
SHAPES = ((384, 384), (2048, 2048), (1024, 4096), (4096, 4096))
ROWS = {
    "cpu": (1, 4, 16, 64, 256, 1024, 2048, 4096, 8192),
    "cuda": (16, 64, 256, 1024, 2048, 4096, 8192),
}
QUICK = {
    "cpu": (SHAPES[1:2], (1, 16, 64, 256, 1024)),
    "cuda": (((4096, 4096), (14336, 4096), (2048, 2048)), (16, 64, 256, 1024, 2048, 8192)),
}
_MOST = {"cpu": 1 << 36, "cuda": 1 << 42}  # multiply-adds of one product
_LONGEST = 0.2  # seconds, see Bench
STRATEGIES = {
    "fused": "fused",
    "panel": "panel",
    "transform": "transform",
    "vendor": "plain",
}  # of providers.WAYS
# What holds torch's libraries to an instruction set below the processor's best, if it is set before torch starts.
HELD = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


def cases(device: str, quick: bool) -> list[Case]:
    """Those of `quick` first, so that a time limit takes the rest; on a CPU the small ones before the large."""
    dtypes = ("float32", "bfloat16") if device == "cpu" else ("bfloat16", "float16", "float32")
    found = []
    for shapes, rows in (QUICK[device], *([] if quick else [(SHAPES, ROWS[device])])):
        part = [
            Case("tune", f"{N}x{K}", M, N, K, dtype, mode, RANK)
            for dtype, (N, K), M, mode in itertools.product(dtypes, shapes, rows, MODES)
            if M * N * K <= _MOST[device]
        ]
        found += sorted(part, key=lambda c: c.M * c.N * c.K) if device == "cpu" else part
    return list(dict.fromkeys(found))


def environment_of(isa: str) -> dict[str, str]:
    """The variables that hold all of torch and the package to instruction set `isa` of the cpu backend."""
    loaded = cpu._load()
    levels = () if isinstance(loaded, str) else loaded.levels
    known = [level for level in levels if level in HELD or level == levels[0]]
    if isa not in known:
        raise ValueError(
            f"--isa: expected one of {', '.join(known) or 'none, without the library'}, got {isa!r}"
        )
    return {"FLATLORA_CPU_ISA": isa, **(HELD[isa] if isa != levels[0] else {})}


def again(isa: str, arguments: list[str]) -> int | None:
    """The exit status of the same command in the environment of `isa`; None where this process has it."""
    wanted = environment_of(isa)
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return None
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, env={**os.environ, **wanted}).returncode


def check_held() -> None:
    """That torch's libraries do not run what our kernels were told to leave."""
    loaded = cpu._load()
    if isinstance(loaded, str) or loaded.level == loaded.levels[0]:
        return
    wanted = environment_of(loaded.level)
    started = torch.backends.cpu.get_cpu_capability().lower()
    if any(os.environ.get(name) != value for name, value in wanted.items()) or started != loaded.level:
        raise ValueError(
            f"--isa: expected {loaded.level}, which holds torch's libraries as FLATLORA_CPU_ISA holds our kernels, got"
            f" torch with {started}"
        )


class Bench(run.Bench):
    """Leaves out what is larger than a case whose plain product took `_LONGEST`: half of the ways take as long, and the
    smaller case has told which is faster. torch's bfloat16 without AVX-512 would take hours."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.slow: dict[tuple[str, str], Case] = {}  # by type and mode

    def linear(self, case: Case, measure_memory: bool) -> None:
        smaller = self.slow.get((case.dtype, case.mode))
        if smaller is not None and case.M * case.N * case.K >= smaller.M * smaller.N * smaller.K:
            self.skip(f"{case}: {smaller} took more than {_LONGEST:g} s for a plain product")
            return
        first = len(self.rows)
        super().linear(case, measure_memory)
        plain = [row["median_us"] for row in self.rows[first:] if row["provider"] == "plain"]
        if plain and max(plain) > 1e6 * _LONGEST:
            self.slow[case.dtype, case.mode] = case


def table(rows: list[results.Row], device: str, meta: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the dispatch table: what was measured in both directions, which a choice takes."""
    found = []
    for row in rows:
        way, _, backend = row["provider"].partition(":")
        if row["kind"] == "linear" and way in STRATEGIES and backend and not row.get("launch"):
            ratios = {name: f"{row[column]:.4f}" for name, column in RATIOS.items()}
            line = {
                **row, **ratios, "device": device, "direction": row["mode"], "backend": backend,
                "strategy": STRATEGIES[way],
                "date": str(meta["date"]).split("T")[0], "commit": meta["commit"],
            }  # fmt: skip
            found.append({name: line[name] for name in COLUMNS})
    return latest(found)


def latest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of lines about the same the last one, where there is one for both directions."""
    last = {tuple(line[name] for name in COLUMNS[:10]): line for line in lines}

    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line[name] for name in COLUMNS[:10] if name != "direction")

    count = Counter(map(key, last.values()))
    return [line for line in last.values() if count[key(line)] == len(MODES)]


def combine(files: list[Path], tables: Path = TABLES) -> int:
    """The table of measurements that --backends left, of two about the same that of the later file; the exit status."""
    found = [results.load(file) for file in files]
    key, *others = sorted({one.meta["config"]["table"] for one in found})
    if others:
        raise ValueError(
            f"--rows: expected measurements of one kind of device, got {', '.join([key, *others])}"
        )
    lines = [line for one in found for line in table(one.rows, key, one.meta)]
    return write(latest(lines), tables / _file(key))


def _file(key: str) -> str:
    return f"{key.replace(' ', '-')}.csv"


def write(lines: list[dict[str, Any]], path: Path) -> int:
    if not lines:
        print("No table: nothing was measured both ways")
        return 1
    results.write_csv(lines, COLUMNS, path, lineterminator="\n")
    print(f"{len(lines)} rows: {path}")
    return 0


def passes(device: str, noises: list[str]) -> list[tuple[list[str], float]]:
    """Kinds to measure together, and the share of the time that is over after them; see above."""
    others = [noise for noise in noises if noise != "hadamard"]
    if device != "cpu" or len(others) == len(noises):
        return [(noises, 1.0)]
    return [(others, 0.7), (["hadamard"], 1.0)]


def main(
    device: str,
    quick: bool,
    limit: float,
    out: Path,
    name: str | None,
    tables: Path = TABLES,
    backends: list[str] | None = None,
    noises: list[str] | None = None,
) -> int:
    """What the command does; its exit status.

    noises: default all on a CPU, else those of `run.NOISES`.
    """
    key = dispatch.device_key(torch.device(device))
    if key is None:
        raise ValueError(f"--device: expected one that a backend with kernels runs on, got {device!r}")
    kernels = [b for b in providers.usable_backends(device) if b != providers.REFERENCE]
    wanted = [b for b in kernels if backends is None or b in backends]
    if not wanted:
        raise ValueError(f"--backends: none of {', '.join(backends or ['the backends'])} runs on {device}")
    if device == "cpu":
        check_held()
    noises = list((KINDS if device == "cpu" else run.NOISES) if noises is None else noises)
    settings = run.Settings(
        device, tuple(noises), providers=tuple(f"{way}:{b}" for way in STRATEGIES for b in wanted), time_limit=limit,
        budget=0.05 if quick else 0.15 if device == "cpu" else 0.3, min_rounds=5,
    )  # fmt: skip
    meta = environment.describe(device)
    meta["config"] = {"strategies": True, "quick": quick, "time_limit": limit, "table": key, "noises": noises}
    held = {"FLATLORA_CPU_ISA", *itertools.chain(*HELD.values())}
    meta["environment"] = {name: os.environ[name] for name in sorted(held) if name in os.environ}
    started, problems = time.perf_counter(), cases(device, quick)
    stem = out / (name or f"tune-strategies-{key.replace(' ', '-')}")
    path = tables / _file(key)
    if quick and path.exists():  # it may hold all cases
        path = stem.with_name(f"{stem.name}-table.csv")
    bench = Bench(settings, run.Progress(0), lambda b: results.save_json(b.results(meta), stem))
    run.compile_first(device, problems, settings.noises)
    for kinds, share in passes(device, noises):
        bench.noises = (providers.NOISELESS, *kinds)
        bench.settings = settings._replace(time_limit=share * limit)
        bench.progress, bench.slow = run.Progress(0), {}
        bench.linear_cases(problems, started=started)
        lines = table(bench.rows, key, meta)
        if share < 1 and backends is None and lines:
            write(lines, path)
            dispatch.forget()
    print("\n".join(f"Written: {p}" for p in results.save(bench.results(meta), stem)))
    print("\n".join([*(f"Skipped: {s}" for s in bench.skipped), *(f"FAILED: {f}" for f in bench.failures)]))
    if backends is None and write(lines, path):
        return 1
    return 1 if bench.failures or not bench.rows else 0
