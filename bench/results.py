"""Rows of a run, and their files: a CSV that stands on its own and a JSON with the same rows."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]

# What a row is about. `kind`: "linear"; "training", a step of a model, where N, K are its smallest and largest widths;
# "noise_scale", its refresh; "noise", the generator; "overhead". `launch`: "graph" where a CUDA graph was replayed.
KEYS = ("kind", "model", "layer", "M", "N", "K", "dtype", "mode", "rank", "noise", "provider", "launch")
_TIMES = ("rounds", "median_us", "p20_us", "p80_us")
BASES = ("plain", "lora", "peft", "rival")
COLUMNS = (
    *KEYS, *_TIMES,
    # this / that, medians of the ratios within a round
    *(f"to_{base}{suffix}" for base in BASES for suffix in ("", "_p20", "_p80")),
    "rival",  # the strongest other unfused provider with the noise of this row, which `to_rival` refers to
    "ns_per_value_core",  # kind noise: less what a call for 8 values takes, times threads
    "over_linear_us",  # kind overhead: more than torch's F.linear
    "peak_extra_bytes", "error_over_limit",
    "drift",  # kind training, in place: how far base weights have moved after --drift steps, of their norm
)  # fmt: skip
_META = "date device hardware threads python torch triton flatlora_kernels commit dirty".split()


class Results(NamedTuple):
    meta: dict[str, Any]  # see environment.describe; "config" holds the arguments of the run
    rows: list[Row]
    failures: list[str]
    skipped: list[str]


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEYS)


def file_stem(args: argparse.Namespace, meta: dict[str, Any], what: str) -> Path:
    """Of the files that a command leaves: --out and --name."""
    return args.out / (args.name or f"{what}-{meta['device']}-{meta['date'].replace(':', '').split('+')[0]}")


def write_json(document: dict[str, Any], stem: Path) -> Path:
    """All or nothing: whoever is stopped here leaves the file of before."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(stem.name + ".json")
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    unfinished.replace(path)
    return path


def write_csv(rows: Iterable[Row], columns: Sequence[str], path: Path, lineterminator: str = "\r\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator=lineterminator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def save_json(results: Results, stem: Path) -> Path:
    return write_json(results._asdict(), stem)


def save(results: Results, stem: Path) -> list[Path]:
    meta = {name: results.meta.get(name) for name in _META}
    rows = ({**row, **meta} for row in results.rows)
    return [write_csv(rows, (*COLUMNS, *_META), stem.with_name(stem.name + ".csv")), save_json(results, stem)]


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
