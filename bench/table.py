"""Markdown of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .results import Results, Row

OP = ("fused", "auto", "panel", "split")  # what names of the op's own ways begin with


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose columns line up, numbers to the right."""
    lines = [list(line) for line in lines]
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


def case_name(row: Row) -> str:
    name = row["model"] if row["layer"] == "square" else f"{row['model']} {row['layer']}"
    return f"{name} {row['N']}x{row['K']}" + (f" r{row['rank']}" if row["rank"] else "")


def provider_names(rows: list[Row]) -> list[str]:
    """In the order of the rows, the op's ways first also where the gate kept one out of some cases."""
    names = dict.fromkeys(r["provider"] for r in rows)
    return sorted(names, key=lambda name: name.partition(":")[0] not in OP)


def summary(results: Results, long: bool = False) -> str:
    """All parts of a run that it has rows for; `long` gives a line to every row, not to every case."""
    meta = results.meta
    versions = ", ".join(f"{k} {meta[k]}" for k in ("torch", "triton", "flatlora_kernels") if meta.get(k))
    commit = f"commit {meta.get('commit')}" + (" with changes" if str(meta.get("dirty")) == "True" else "")
    threads = f", {meta.get('threads')} threads" if meta.get("device") == "cpu" else ""
    versions += f", Python {meta.get('python')}"
    parts = [f"{meta.get('hardware')}{threads}; {versions}; {commit}; {meta.get('date')}"]
    linear = [r for r in results.rows if r["kind"] == "linear"]
    for mode, launch in dict.fromkeys((r["mode"], r.get("launch")) for r in linear):
        rows = [r for r in linear if (r["mode"], r.get("launch")) == (mode, launch)]
        how = ", replayed as a CUDA graph" if launch == "graph" else ""
        if long:
            parts.append(f"**{mode}**{how}, median and 20th to 80th percentile\n\n{_long(rows)}")
        else:
            plain = "dY @ W" if mode == "input_grad" else "x @ W.T"
            parts.append(f"**{mode}**{how}, time as a multiple of plain `{plain}`\n\n{_by_case(rows)}")
    for kind, title, make in (
        ("noise_scale", "Refresh of `noise_scale`, once per step and layer", _by_layer),
        ("noise", "One-pass `W + eps` (ns per value and core); torch: its generator alone", _noise),
        ("overhead", "Time per call of one row and 8 x 8, microseconds", _overhead),
    ):
        if rows := [r for r in results.rows if r["kind"] == kind]:
            parts.append(f"**{title}**\n\n{make(rows)}")
    if rows := [r for r in results.rows if r["kind"] == "training"]:
        parts.append(f"**An optimiser step of a whole model**, ratios of times\n\n{_training(rows)}")
    if meta.get("clocks_after"):
        parts.append(
            f"Clocks, not touched, before: {meta.get('clocks_before')}; after: {meta['clocks_after']}"
        )
    if meta.get("launched_late"):
        parts.append(f"Launched late, so that times hold some of the host's: {meta['launched_late']}")
    if rows := [r for r in linear if r.get("peak_extra_bytes") is not None]:
        parts.append(f"**Peak memory beyond the inputs, MiB** (the output counts)\n\n{_memory(rows)}")
    parts += [f"Skipped: {s}" for s in results.skipped] + [f"FAILED: {f}" for f in results.failures]
    return "\n\n".join(parts)


def _pivot(
    rows: list[Row], head: Callable[[Row], tuple[str, ...]], cell: Callable[[Row], str]
) -> tuple[list[str], list[list[str]]]:
    """Names of the providers, which are columns, and a line for each `head`."""
    names = provider_names(rows)
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(head(row), {})[row["provider"]] = cell(row)
    return names, [[*key, *(cells.get(n, "") for n in names)] for key, cells in lines.items()]


def _by_case(rows: list[Row]) -> str:
    ours = "auto" if any(r["provider"] == "auto" for r in rows) else "fused"  # whose ratios end the line
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        case = (case_name(row), str(row["M"]), row["dtype"])
        entry = lines.setdefault(case, {"plain": "", "shared": {}, "noises": {}})
        if row["provider"] == "plain":
            entry["plain"] = microseconds(row["median_us"])
        elif row["noise"] == "none":
            entry["shared"][row["provider"]] = ratio(row.get("to_plain"))
        else:
            noisy = entry["noises"].setdefault(row["noise"], {})
            noisy[row["provider"]] = ratio(row.get("to_plain"))
            for base in ("to_lora", "to_peft", "to_rival"):
                if row["provider"].partition(":")[0] == ours and row.get(base) is not None:
                    noisy[base] = min(noisy.get(base, float("inf")), row[base])
    names = [n for n in provider_names(rows) if n != "plain"]
    bases = {"to_lora": f"{ours} / lora", "to_peft": f"{ours} / peft", "to_rival": f"{ours} / best unfused"}
    bases = {b: name for b, name in bases.items() if any(r.get(b) is not None for r in rows)}
    body = []
    for case, entry in lines.items():
        for noise, cells in (entry["noises"] or {"none": {}}).items():
            values = {**entry["shared"], **cells}
            best = [ratio(values.get(base)) for base in bases]
            body.append([*case, noise, entry["plain"], *(values.get(n, "") for n in names), *best])
    header = ["layer", "M", "dtype", "noise", "plain", *names, *bases.values()]
    return markdown(header, body)


def _spread(row: Row, name: str) -> str:
    if row.get(name) is None:
        return ""
    return f"{ratio(row[name])} ({ratio(row[name + '_p20'])} to {ratio(row[name + '_p80'])})"


def _long(rows: list[Row]) -> str:
    header = ["layer", "M", "dtype", "noise", "provider", "median", "p20", "p80", "n", "to plain", "to lora"]
    header += ["to peft", "to rival", "rival"]
    body = [
        [
            case_name(r), str(r["M"]), r["dtype"], r["noise"], r["provider"],
            *(microseconds(r[k]) for k in ("median_us", "p20_us", "p80_us")), str(r["rounds"]),
            *(_spread(r, k) for k in ("to_plain", "to_lora", "to_peft", "to_rival")), r.get("rival") or "",
        ]
        for r in rows
    ]  # fmt: skip
    return markdown(header, body)


def _by_layer(rows: list[Row]) -> str:
    names, body = _pivot(rows, lambda r: (case_name(r), r["dtype"]), lambda r: microseconds(r["median_us"]))
    return markdown(["layer", "dtype", *names], body)


def _training(rows: list[Row]) -> str:
    header = [
        "model",
        "batch",
        "dtype",
        "provider",
        "noise",
        "step",
        "/ plain",
        "/ lora",
        "/ peft",
        "/ inplace",
        "peak, MiB",
    ]
    body = [
        [
            r["model"], r["layer"], r["dtype"], r["provider"], r["noise"], microseconds(r["median_us"]),
            *(_spread(r, f"to_{base}") for base in ("plain", "lora", "peft", "rival")),
            "" if r.get("peak_extra_bytes") is None else f"{r['peak_extra_bytes'] / 2**20:.1f}",
        ]
        for r in rows
    ]  # fmt: skip
    return markdown(header, body)


def _noise(rows: list[Row]) -> str:
    def cell(row: Row) -> str:
        core = row.get("ns_per_value_core")
        return microseconds(row["median_us"]) + ("" if core is None else f" ({core:.2f} ns)")

    names, body = _pivot(rows, lambda r: (f"{r['N']}x{r['K']}", r["dtype"], r["noise"]), cell)
    return markdown(["weight", "dtype", "noise", *names], body)


def _overhead(rows: list[Row]) -> str:
    body = [
        [r["provider"], r["mode"], r["noise"], f"{r['median_us']:.1f}", f"{r['over_linear_us']:+.1f}"]
        for r in rows
    ]
    return markdown(["provider", "mode", "noise", "time", "over F.linear"], body)


def _memory(rows: list[Row]) -> str:
    def head(row: Row) -> tuple[str, ...]:
        return case_name(row), str(row["M"]), row["dtype"], row["mode"]

    rows = [r for r in rows if r["noise"] in ("none", "gaussian")]
    names, body = _pivot(rows, head, lambda r: f"{r['peak_extra_bytes'] / 2**20:.1f}")
    return markdown(["layer", "M", "dtype", "mode", *names], body)
