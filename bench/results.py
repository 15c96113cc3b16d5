"""Rows of a run, and their files: a CSV that stands on its own and a JSON with the same rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]

# What a row is about. `kind`: "linear", "training" (a step of a model; N, K are its smallest and largest widths),
# "noise_scale" (its refresh), "noise" (the generator) or "overhead".
# `launch`: "graph" where a CUDA graph was replayed, else missing.
KEYS = ("kind", "model", "layer", "M", "N", "K", "dtype", "mode", "rank", "noise", "provider", "launch")
_TIMES = ("rounds", "median_us", "p20_us", "p80_us")
_RATIOS = tuple(
    f"to_{base}{suffix}" for base in ("plain", "lora", "peft", "rival") for suffix in ("", "_p20", "_p80")
)  # this / that, medians of the ratios within a round
COLUMNS = (
    *KEYS, *_TIMES, *_RATIOS,
    "rival",  # the strongest other unfused provider with the noise of this row, which `to_rival` refers to
    "ns_per_value_core",  # kind noise: less what a call for 8 values takes, times threads
    "over_linear_us",  # kind overhead: more than torch's F.linear
    "peak_extra_bytes", "error_over_limit",
)  # fmt: skip
_META = (
    "date", "device", "hardware", "threads",
    "python", "torch", "triton", "flatlora_kernels", "commit", "dirty",
)  # fmt: skip


class Results(NamedTuple):
    meta: dict[str, Any]  # see environment.describe; "config" holds the arguments of the run
    rows: list[Row]
    failures: list[str]
    skipped: list[str]


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEYS)


def save_json(results: Results, stem: Path) -> Path:
    """All or nothing: whoever is stopped here leaves the file of before."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(stem.name + ".json")
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results._asdict(), indent=1) + "\n")
    unfinished.replace(path)
    return path


def save(results: Results, stem: Path) -> list[Path]:
    paths = [stem.with_name(stem.name + ".csv"), save_json(results, stem)]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *_META))
        writer.writeheader()
        meta = {name: results.meta.get(name) for name in _META}
        writer.writerows({**row, **meta} for row in results.rows)
    return paths


def load(path: Path) -> Results:
    """From the JSON, or from the CSV (which knows nothing of failures and config)."""
    if path.suffix == ".json":
        return Results(**json.loads(path.read_text()))
    with path.open(newline="") as file:
        raw = list(csv.DictReader(file))
    rows = [{name: _parse(line[name]) for name in COLUMNS if line.get(name)} for line in raw]
    return Results({name: raw[0][name] for name in _META} if raw else {}, rows, [], [])


def _parse(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    return text
