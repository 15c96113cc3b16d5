"""Markdown of one run, and of two side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .results import BASES, Results, Row, key

OP = ("fused", "auto", "panel", "split")  # what names of the op's own ways begin with
Cell = Callable[[Row], str]
Columns = Mapping[str, Cell | str]  # heading -> field of the row, or what makes the cell


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose columns line up, numbers to the right."""
    columns = []
    for name, *cells in zip(header, *lines, strict=True):
        width = max(map(len, (name, *cells)))
        if all(not c or c[0] in "+-0123456789" for c in cells):
            columns.append([name.rjust(width), "-" * (width - 1) + ":", *(c.rjust(width) for c in cells)])
        else:
            columns.append([name.ljust(width), "-" * width, *(c.ljust(width) for c in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True))


def microseconds(value: float) -> str:
    if value >= 1e5:
        return f"{value / 1e3:,.0f} ms"
    if value >= 1e4:
        return f"{value / 1e3:.1f} ms"
    return f"{value:.0f} us" if value >= 100 else f"{value:.1f} us"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def hardware(meta: dict[str, Any]) -> str:
    threads = f", {meta.get('threads')} threads" if meta.get("device") == "cpu" else ""
    return f"{meta.get('hardware')}{threads}"


def case_name(row: Row) -> str:
    name = row["model"] if row["layer"] == "square" else f"{row['model']} {row['layer']}"
    return f"{name} {row['N']}x{row['K']}" + (f" r{row['rank']}" if row["rank"] else "")


def provider_names(rows: list[Row]) -> list[str]:
    """In the order of the rows, the op's ways first also where the gate kept one out of some cases."""
    names = dict.fromkeys(r["provider"] for r in rows)
    return sorted(names, key=lambda name: name.partition(":")[0] not in OP)


def summary(results: Results, long: bool = False) -> str:
    """All parts of a run that it has rows for; `long` gives a line to every row, not to every case."""
    meta, linear = results.meta, [r for r in results.rows if r["kind"] == "linear"]
    versions = ", ".join(f"{k} {meta[k]}" for k in ("torch", "triton", "flatlora_kernels") if meta.get(k))
    commit = f"commit {meta.get('commit')}" + (" with changes" if str(meta.get("dirty")) == "True" else "")
    versions += f", Python {meta.get('python')}"
    parts = [f"{hardware(meta)}; {versions}; {commit}; {meta.get('date')}"]
    if busy := meta.get("busy"):
        parts.append(f"{busy}.")
    for mode, launch in dict.fromkeys((r["mode"], r.get("launch")) for r in linear):
        rows = [r for r in linear if (r["mode"], r.get("launch")) == (mode, launch)]
        how = ", replayed as a CUDA graph" if launch == "graph" else ""
        if long:
            parts.append(f"**{mode}**{how}, median and 20th to 80th percentile\n\n{_listed(rows, _LONG)}")
        else:
            plain = "dY @ W" if mode == "input_grad" else "x @ W.T"
            parts.append(f"**{mode}**{how}, time as a multiple of plain `{plain}`\n\n{_by_case(rows)}")
    for kind, title, text in _OTHERS:
        if rows := [r for r in results.rows if r["kind"] == kind]:
            parts.append(f"{title}\n\n{text(rows)}")
    if after := meta.get("clocks_after"):
        parts.append(f"Clocks, not touched, before: {meta.get('clocks_before')}; after: {after}")
    if late := meta.get("launched_late"):
        parts.append(f"Launched late, so that times hold some of the host's: {late}")
    if rows := [r for r in linear if _mib(r) and r["noise"] in ("none", "gaussian")]:
        text = _pivot(rows, {**_CASE, "mode": "mode"}, _mib)
        parts.append(f"**Peak memory beyond the inputs, MiB** (the output counts)\n\n{text}")
    parts += [f"Skipped: {s}" for s in results.skipped] + [f"FAILED: {f}" for f in results.failures]
    return "\n\n".join(parts)


def _cells(row: Row, columns: Columns) -> list[str]:
    return [str(row[cell]) if isinstance(cell, str) else cell(row) for cell in columns.values()]


def _listed(rows: list[Row], columns: Columns) -> str:
    """A line to each row."""
    return markdown(list(columns), [_cells(row, columns) for row in rows])


def _pivot(rows: list[Row], columns: Columns, cell: Cell) -> str:
    """A line to each combination of `columns`, a further column to each provider."""
    names = provider_names(rows)
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(_cells(row, columns)), {})[row["provider"]] = cell(row)
    body = [[*head, *(cells.get(n, "") for n in names)] for head, cells in lines.items()]
    return markdown([*columns, *names], body)


def _time(name: str) -> Cell:
    return lambda row: microseconds(row[name])


def _spread(name: str) -> Cell:
    def cell(row: Row) -> str:
        if row.get(name) is None:
            return ""
        return f"{ratio(row[name])} ({ratio(row[name + '_p20'])} to {ratio(row[name + '_p80'])})"

    return cell


def _mib(row: Row) -> str:
    return "" if row.get("peak_extra_bytes") is None else f"{row['peak_extra_bytes'] / 2**20:.1f}"


_CASE: Columns = {"layer": case_name, "M": "M", "dtype": "dtype"}
_LONG: Columns = {
    **_CASE, "noise": "noise", "provider": "provider", "median": _time("median_us"), "p20": _time("p20_us"),
    "p80": _time("p80_us"), "n": "rounds", **{f"to {base}": _spread(f"to_{base}") for base in BASES},
    "rival": lambda row: row.get("rival") or "",
}  # fmt: skip


def _by_case(rows: list[Row]) -> str:
    """Ratios to plain, a line to each case and noise; the ratios of `ours` to the rest end the line."""
    ours = "auto" if any(r["provider"] == "auto" for r in rows) else "fused"
    names = [n for n in provider_names(rows) if n != "plain"]
    bases = {"to_lora": f"{ours} / lora", "to_peft": f"{ours} / peft", "to_rival": f"{ours} / best unfused"}
    bases = {b: name for b, name in bases.items() if any(r.get(b) is not None for r in rows)}
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(_cells(row, _CASE)), []).append(row)
    body = []
    for case, of_case in cases.items():
        plain = next((microseconds(r["median_us"]) for r in of_case if r["provider"] == "plain"), "")
        for noise in dict.fromkeys(r["noise"] for r in of_case if r["noise"] != "none") or ["none"]:
            here = {r["provider"]: r for r in of_case if r["noise"] in ("none", noise)}
            line = [ratio(here[name].get("to_plain")) if name in here else "" for name in names]
            mine = [r for name, r in here.items() if name.partition(":")[0] == ours]
            for base in bases:
                line.append(ratio(min((r[base] for r in mine if r.get(base) is not None), default=None)))
            body.append([*case, noise, plain, *line])
    return markdown([*_CASE, "noise", "plain", *names, *bases.values()], body)


def _noise(row: Row) -> str:
    core = row.get("ns_per_value_core")
    return microseconds(row["median_us"]) + ("" if core is None else f" ({core:.2f} ns)")


_OVERHEAD: Columns = {
    "provider": "provider", "mode": "mode", "noise": "noise", "rank": lambda row: str(row["rank"]),
    "time": lambda row: f"{row['median_us']:.1f}", "over F.linear": lambda row: f"{row['over_linear_us']:+.1f}",
    "/ peft": _spread("to_peft"),
}  # fmt: skip
_TRAINING: Columns = {
    "model": "model", "batch": "layer", "dtype": "dtype", "provider": "provider", "noise": "noise",
    "step": _time("median_us"), **{f"/ {base}": _spread(f"to_{base}") for base in BASES[:3]},
    "/ inplace": _spread("to_rival"), "peak, MiB": _mib,
}  # fmt: skip
_WEIGHT: Columns = {"weight": lambda row: f"{row['N']}x{row['K']}", "dtype": "dtype", "noise": "noise"}
_LAYER: Columns = {"layer": case_name, "dtype": "dtype"}
# Kind of the rows, title, text.
_OTHERS: tuple[tuple[str, str, Callable[[list[Row]], str]], ...] = (
    ("noise_scale", "**Refresh of `noise_scale`, once per step and layer**",
     lambda rows: _pivot(rows, _LAYER, _time("median_us"))),
    ("noise", "**One-pass `W + eps` (ns per value and core); torch: its generator alone**",
     lambda rows: _pivot(rows, _WEIGHT, _noise)),
    ("overhead", "**Time per call of one row and 8 x 8, microseconds**", lambda rows: _listed(rows, _OVERHEAD)),
    ("training", "**An optimiser step of a whole model**, ratios of times", lambda rows: _listed(rows, _TRAINING)),
)  # fmt: skip


_ABOUT = ("M", "dtype", "mode", "noise", "provider")


def compare(a: Results, b: Results) -> str:
    """Rows that both runs have, with B as a multiple of A.

    Where a row has a ratio to plain, that compares the runs better: both its parts were timed side by side. A
    star says that the two ratios' ranges from the 20th to the 80th percentile do not touch.
    """
    notes = []
    for name in ("hardware", "threads", "torch", "triton", "python", "commit", "dirty"):
        had = [run.meta.get(name) for run in (a, b)]
        if len({"" if value is None else str(value) for value in had}) > 1:  # as a CSV has it
            notes.append(f"{name}: A has {had[0]}, B has {had[1]}")
    of_b = {key(r): r for r in b.rows}
    both = [(r, of_b.pop(key(r))) for r in a.rows if key(r) in of_b]
    only_a, only_b = len(a.rows) - len(both), len(of_b)
    if only_a or only_b:
        notes.append(f"rows that only one has: {only_a} in A, {only_b} in B")
    header = ["what", *_ABOUT, "A", "B", "B / A", "A to plain", "B to plain", "B / A"]
    return "\n\n".join([*notes, markdown(header, [_compared(ra, rb) for ra, rb in both])])


def _compared(a: Row, b: Row) -> list[str]:
    what = case_name(a) if a.get("model") else f"{a['N']}x{a['K']}"
    what = what if a["kind"] == "linear" else f"{a['kind']} {what}"
    about = [what, *(str(a.get(k) or "") for k in _ABOUT)]
    times = [*(microseconds(r["median_us"]) for r in (a, b)), ratio(b["median_us"] / a["median_us"])]
    if a.get("to_plain") is None or b.get("to_plain") is None:
        return [*about, *times, "", "", ""]
    apart = a["to_plain_p80"] < b["to_plain_p20"] or b["to_plain_p80"] < a["to_plain_p20"]
    change = ratio(b["to_plain"] / a["to_plain"]) + (" *" if apart else "")
    return [*about, *times, ratio(a["to_plain"]), ratio(b["to_plain"]), change]
