"""Measures the ways to run the op that work here and writes the table that dispatch.py chooses by.

    python -m bench tune --strategies [--quick]
    python -m bench tune --strategies --backends cuda; the same with triton; ... --rows FILE.json FILE.json

One row to a way, direction, noise, type and problem: its time over that of a plain product in the same round. The raw
rows go beside the other results. What fails the gate is not written, so that it is never chosen.
"""

from __future__ import annotations

import csv
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from flatlora_kernels.choice import dispatch, resolve

from . import environment, providers, results, run
from .shapes import Case

TABLES = Path(dispatch.__file__).parent / "tables"
COLUMNS = "device,dtype,noise,direction,M,N,K,rank,backend,strategy,ratio,p20,p80,date,commit".split(",")
MODES = {"forward": "forward", "input_grad": "input_grad"}  # mode of a case -> direction of the table
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
    found = []
    for shapes, rows in (QUICK[device], (SHAPES, ROWS)):
        for dtype, (N, K), M, mode in itertools.product(dtypes, shapes, rows, MODES):
            if M * N * K <= _MOST[device]:
                found.append(Case("tune", f"{N}x{K}", M, N, K, dtype, mode, RANK))
        if quick:
            break
    return list(dict.fromkeys(found))


def table(rows: list[results.Row], device: str, meta: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the dispatch table."""
    found = []
    for row in rows:
        way, _, backend = row["provider"].partition(":")
        if row["kind"] != "linear" or way not in resolve.STRATEGIES or row.get("launch"):
            continue
        ratios = zip(("ratio", "p20", "p80"), ("", "_p20", "_p80"), strict=True)
        found.append(
            {
                "device": device, "dtype": row["dtype"], "noise": row["noise"], "direction": MODES[row["mode"]],
                **{name: row[name] for name in ("M", "N", "K", "rank")}, "backend": backend, "strategy": way,
                **{name: f"{row[f'to_plain{part}']:.4f}" for name, part in ratios},
                "date": str(meta["date"]).split("T")[0], "commit": meta["commit"],
            }
        )  # fmt: skip
    # A choice takes both directions.
    count: dict[tuple[Any, ...], int] = {}
    names = [name for name in COLUMNS[:10] if name != "direction"]
    for line in found:
        key = tuple(line[name] for name in names)
        count[key] = count.get(key, 0) + 1
    return [line for line in found if count[tuple(line[name] for name in names)] == len(MODES)]


def combine(files: list[Path], tables: Path = TABLES) -> int:
    """The table of measurements that --backends left; the exit status."""
    found = [results.load(file) for file in files]
    keys = {one.meta["config"]["table"] for one in found}
    if len(keys) != 1:
        raise ValueError(
            f"--rows: expected measurements of one kind of device, got {', '.join(sorted(keys))}"
        )
    return write([line for one in found for line in table(one.rows, *keys, one.meta)], tables / _file(*keys))


def _file(key: str) -> str:
    return f"{key.replace(' ', '-')}.csv"


def write(lines: list[dict[str, Any]], path: Path) -> int:
    if not lines:
        print("No table: nothing was measured both ways")
        return 1
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
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
    ways = [name.partition(":") for name in (p.name for p in providers.every(device))]
    candidates = tuple(
        f"{w}:{b}"
        for w, _, b in ways
        if w in resolve.STRATEGIES and b != providers.REFERENCE and (backends is None or b in backends)
    )
    if not candidates:
        raise ValueError(f"--backends: none of {', '.join(backends or ['the backends'])} runs on {device}")
    settings = run.Settings(
        device, providers=candidates, compiled=False, ways=True, reference=False, time_limit=limit,
        budget=0.05 if quick else 0.3, min_rounds=5,
    )  # fmt: skip
    meta = environment.describe(device)
    meta["config"] = {"strategies": True, "quick": quick, "time_limit": limit, "table": key}
    started, problems = time.perf_counter(), cases(device, quick)
    bench = run.Bench(settings, run.Progress(0))
    stem = out / (name or f"tune-strategies-{key.replace(' ', '-')}")

    def found() -> results.Results:
        return results.Results(meta, bench.rows, bench.failures, list(bench.skipped))

    bench.after_case = lambda _: results.save_json(found(), stem)
    run.compile_first(device, problems, settings.noises)
    bench.linear_cases(problems, started=started)
    lines = table(bench.rows, key, meta)
    path = tables / _file(key)
    if quick and path.exists():  # it may hold all cases
        path = stem.with_name(f"{stem.name}-table.csv")
    print("\n".join(f"Written: {p}" for p in results.save(found(), stem)))
    print("\n".join([*(f"Skipped: {s}" for s in bench.skipped), *(f"FAILED: {f}" for f in bench.failures)]))
    if backends is None and write(lines, path):
        return 1
    return 1 if bench.failures or not bench.rows else 0
