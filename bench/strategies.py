"""Measures the ways to run the op that work here and writes the table that dispatch.py chooses by.

    python -m bench tune --strategies [--quick]
    python -m bench tune --strategies --backends cuda; the same with triton; ... --rows FILE.json FILE.json

One row to a way, direction, noise, type and problem: its time over that of a plain product in the same round. The raw
rows go beside the other results. What fails the gate is not written, so that it is never chosen.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from flatlora_kernels.choice import dispatch, resolve

from . import environment, providers, results, run
from .shapes import Case

TABLES = Path(dispatch.__file__).parent / "tables"
COLUMNS = "device,dtype,noise,direction,M,N,K,rank,backend,strategy,ratio,p20,p80,date,commit".split(",")
RATIOS = {"ratio": "to_plain", "p20": "to_plain_p20", "p80": "to_plain_p80"}  # columns of the table, of a row
MODES = ("forward", "input_grad")  # of a case, and directions of the table
RANK = 16
SHAPES = ((384, 384), (2048, 2048), (1024, 4096), (4096, 4096))
ROWS = (16, 64, 256, 1024, 2048, 4096, 8192)
QUICK = {
    "cpu": (SHAPES[1:2], (64, 1024, 8192)),
    "cuda": (((4096, 4096), (14336, 4096), (2048, 2048)), (16, 64, 256, 1024, 2048, 8192)),
}
_MOST = {"cpu": 1 << 36, "cuda": 1 << 42}  # multiply-adds of one product


def cases(device: str, quick: bool) -> list[Case]:
    """Those of `quick` first, so that a time limit takes the rest."""
    dtypes = ("float32", "bfloat16") if device == "cpu" else ("bfloat16", "float16", "float32")
    found = [
        Case("tune", f"{N}x{K}", M, N, K, dtype, mode, RANK)
        for shapes, rows in (QUICK[device], *([] if quick else [(SHAPES, ROWS)]))
        for dtype, (N, K), M, mode in itertools.product(dtypes, shapes, rows, MODES)
        if M * N * K <= _MOST[device]
    ]
    return list(dict.fromkeys(found))


def table(rows: list[results.Row], device: str, meta: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the dispatch table: what was measured in both directions, which a choice takes."""
    found = []
    for row in rows:
        way, _, backend = row["provider"].partition(":")
        if row["kind"] == "linear" and way in resolve.STRATEGIES and not row.get("launch"):
            ratios = {name: f"{row[column]:.4f}" for name, column in RATIOS.items()}
            line = {
                **row, **ratios, "device": device, "direction": row["mode"], "backend": backend, "strategy": way,
                "date": str(meta["date"]).split("T")[0], "commit": meta["commit"],
            }  # fmt: skip
            found.append({name: line[name] for name in COLUMNS})

    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(line[name] for name in COLUMNS[:10] if name != "direction")

    count = Counter(map(key, found))
    return [line for line in found if count[key(line)] == len(MODES)]


def combine(files: list[Path], tables: Path = TABLES) -> int:
    """The table of measurements that --backends left; the exit status."""
    found = [results.load(file) for file in files]
    key, *others = sorted({one.meta["config"]["table"] for one in found})
    if others:
        raise ValueError(
            f"--rows: expected measurements of one kind of device, got {', '.join([key, *others])}"
        )
    return write([line for one in found for line in table(one.rows, key, one.meta)], tables / _file(key))


def _file(key: str) -> str:
    return f"{key.replace(' ', '-')}.csv"


def write(lines: list[dict[str, Any]], path: Path) -> int:
    if not lines:
        print("No table: nothing was measured both ways")
        return 1
    results.write_csv(lines, COLUMNS, path, lineterminator="\n")
    print(f"{len(lines)} rows: {path}")
    return 0


def main(
    device: str,
    quick: bool,
    limit: float,
    out: Path,
    name: str | None,
    tables: Path = TABLES,
    backends: list[str] | None = None,
) -> int:
    """What the command does; its exit status."""
    key = dispatch.device_key(torch.device(device))
    if key is None:
        raise ValueError(f"--device: expected one that a backend with kernels runs on, got {device!r}")
    kernels = [b for b in providers.usable_backends(device) if b != providers.REFERENCE]
    wanted = [b for b in kernels if backends is None or b in backends]
    if not wanted:
        raise ValueError(f"--backends: none of {', '.join(backends or ['the backends'])} runs on {device}")
    settings = run.Settings(
        device, providers=tuple(f"{way}:{b}" for way in resolve.STRATEGIES for b in wanted), time_limit=limit,
        budget=0.05 if quick else 0.3, min_rounds=5,
    )  # fmt: skip
    meta = environment.describe(device)
    meta["config"] = {"strategies": True, "quick": quick, "time_limit": limit, "table": key}
    started, problems = time.perf_counter(), cases(device, quick)
    stem = out / (name or f"tune-strategies-{key.replace(' ', '-')}")
    bench = run.Bench(settings, run.Progress(0), lambda b: results.save_json(b.results(meta), stem))
    run.compile_first(device, problems, settings.noises)
    bench.linear_cases(problems, started=started)
    lines = table(bench.rows, key, meta)
    path = tables / _file(key)
    if quick and path.exists():  # it may hold all cases
        path = stem.with_name(f"{stem.name}-table.csv")
    print("\n".join(f"Written: {p}" for p in results.save(bench.results(meta), stem)))
    print("\n".join([*(f"Skipped: {s}" for s in bench.skipped), *(f"FAILED: {f}" for f in bench.failures)]))
    if backends is None and write(lines, path):
        return 1
    return 1 if bench.failures or not bench.rows else 0
