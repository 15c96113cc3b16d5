"""Several ways to compute one case, in turns: what `quantized` and `mixture` have in common."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import environment, memory, results, timing
from .results import Row
from .table import markdown

TIMES = (
    "way",
    "rounds",
    "median_us",
    "p20_us",
    "p80_us",
    "to_base",
    "to_base_p20",
    "to_base_p80",
    "peak_extra_bytes",
)
_ABOUT = ("date", "hardware", "threads", "torch", "flatlora_kernels", "commit", "dirty")
Peak = Callable[..., int | None]  # of a case and a way, in a process of its own on a CPU


def rows_of(
    case: Any,
    names: Iterable[str],
    made: Callable[[str], timing.Call],
    base_of: Callable[[str], str | None],
    peak: Peak | None,
    budget: float,
    copies: int,
    timer: timing.Timer,
) -> tuple[list[Row], list[str]]:
    """A row to each way, all in turns, and a line to each that failed.

    Args:
        case: a NamedTuple. made: the call of a way, checked. base_of: the way that its ratio is to. peak: None = not
            measured.
    """
    calls: dict[str, timing.Call] = {}
    failures = []
    for name in names:
        try:
            calls[name] = made(name)
        except Exception as error:  # the others are worth having
            failures.append(f"{' '.join(map(str, case))} {name}: {timing.first_line(error)}")
    rounds = timing.interleaved(calls, timer, copies, budget, 5, 200) if calls else []
    rows = []
    for name in calls:
        base = base_of(name)
        row = {**case._asdict(), "way": name}
        if base in calls:
            row["base"] = base
        row |= timing.row(rounds, name, {"base": base} if base in calls else {})
        if peak is not None:
            measure = memory.in_fresh_process if case.device == "cpu" else lambda peak, *of: peak(*of)
            row["peak_extra_bytes"] = measure(peak, case, name)
        rows.append(row)
    return rows, failures


def table(rows: list[Row], fields: Sequence[str]) -> str:
    """A line to each case, a column to each way: its time, or its ratio to the base."""
    names = list(dict.fromkeys(row["way"] for row in rows))
    cases = dict.fromkeys(tuple(row[field] for field in fields) for row in rows)
    lines = []
    for case in cases:
        found = {r["way"]: r for r in rows if tuple(r[field] for field in fields) == case}
        cells = []
        for name in names:
            row = found.get(name)
            if row is None:
                cells.append("")
                continue
            cell = f"{row['to_base']:.2f}" if "to_base" in row else f"{row['median_us']:,.0f} us"
            peak = row.get("peak_extra_bytes")
            cells.append(cell + (f" ({peak / 2**20:.1f} MiB)" if peak is not None else ""))
        lines.append([*map(str, case), *cells])
    return markdown([*fields, *names], lines)


def run(
    args: argparse.Namespace,
    what: str,
    cases: list[Any],
    rows_of_case: Callable[[Any, timing.Timer], tuple[list[Row], list[str]]],
    fields: Sequence[str],
    more: Sequence[str] = (),
    *,
    start: float,
) -> int:
    """Times the cases, as long as `args.time_limit` lets it, and leaves their files; 1 where a way failed.

    Args:
        what: the command. fields: that name a case, columns of its table. more: columns of a file that come last.
        start: of the time that is limited, by `time.perf_counter`.
    """
    meta = environment.describe(args.device)
    meta["config"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "given"}
    found = results.Results(meta, [], [], [])
    stem = results.file_stem(args, meta, what)
    timer = timing.timer(args.device)
    for case in cases:
        if args.time_limit is not None and time.perf_counter() - start > args.time_limit:
            left = f"no time left (--time-limit {args.time_limit:g})"
            found.skipped.append(f"{' '.join(map(str, case))}: {left}")
            continue
        rows, failures = rows_of_case(case, timer)
        found.rows.extend(rows)
        found.failures.extend(failures)
        print("\n".join([table(rows, fields), *failures]), flush=True)
        if isinstance(timer, timing.CudaTimer):
            meta["launched_late"] = timer.launched_late
        results.save_json(found, stem)
    meta["clocks_after"] = environment.clocks(args.device)
    results.save_json(found, stem)
    about = {name: meta.get(name) for name in _ABOUT}
    named = [field for field in fields if field not in more]
    columns = [*named, *TIMES, *more, *_ABOUT]
    results.write_csv([{**row, **about} for row in found.rows], columns, stem.with_name(stem.name + ".csv"))
    print("\n".join([table(found.rows, fields), *found.skipped, *found.failures]))
    late, failed = len(found.skipped), len(found.failures)
    print(
        f"{len(cases) - late} of {len(cases)} cases, {failed} failures{': ' + found.failures[0] if failed else ''}"
    )
    return int(failed > 0)
