"""PNGs of one run: time as a multiple of plain against M, one file for each layer, mode and rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .results import Results, Row
from .table import OP, case_name, hardware, provider_names

# Okabe and Ito's palette, which holds for colour-blind readers. What a name begins with decides, so that a
# provider looks the same in every plot; the op's ways are drawn boldest.
_LOOKS = {
    "fused": ("o", "#56B4E9"), "auto": ("*", "#AA0044"), "panel": ("P", "#5E3C99"), "split": ("d", "#1B9E9E"),
    "perturb": ("s", "#E69F00"), "eager": ("^", "#CC79A7"), "inplace": ("v", "#7F7F7F"), "compile": ("D", "#8C6D31"),
    "lora": ("x", "#000000"), "peft": ("+", "#B0B000"),
}  # fmt: skip
_COLOURS = {"fused:cpu": "#0072B2", "fused:triton": "#D55E00", "fused:cuda": "#009E73"}


def _style(provider: str) -> dict[str, Any]:
    family = provider.partition(":")[0]
    marker, colour = _LOOKS.get(family, (".", "#A52A2A"))
    bold = {"linewidth": 2.4, "zorder": 3} if family in OP else {"linewidth": 1.2, "zorder": 2}
    return {"color": _COLOURS.get(provider, colour), "marker": marker, **bold}


def plot(results: Results, folder: Path, stem: str) -> list[Path]:
    """Writes the PNGs and returns their paths. Bands reach from the 20th to the 80th percentile."""
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("plot: matplotlib is not installed (pip install matplotlib)") from None
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        if row["kind"] == "linear" and row.get("to_plain") is not None:
            mode = row["mode"] + (" as a CUDA graph" if row.get("launch") == "graph" else "")
            groups.setdefault((case_name(row), mode), []).append(row)
    paths = []
    for (name, mode), rows in groups.items():
        safe = "".join(c if c.isalnum() or c in "-." else "_" for c in f"{stem}-{name}-{mode}")
        paths.append(folder / f"{safe}.png")
        _figure(rows, f"{name}, {mode}", results.meta, paths[-1])
    return paths


def _figure(rows: list[Row], title: str, meta: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    noises = [n for n in dict.fromkeys(r["noise"] for r in rows) if n != "none"] or ["none"]
    Ms, names = sorted({r["M"] for r in rows}), provider_names(rows)
    curves = len(Ms) > 1
    height = 3.1 if curves else 0.35 * len(names) + 0.8
    fig, axes = plt.subplots(
        len(dtypes), len(noises), figsize=(3.6 * len(noises) + 2.0, height * len(dtypes) + 0.9), squeeze=False,
        sharex=True, sharey="row" if curves else True, layout="constrained",
    )  # fmt: skip
    for dtype, line in zip(dtypes, axes, strict=True):
        for noise, ax in zip(noises, line, strict=True):
            here = [r for r in rows if r["dtype"] == dtype and r["noise"] in (noise, "none")]
            (_curves(ax, here, Ms) if curves else _points(ax, here, names))
            ax.grid(True, color="0.9", linewidth=0.6)
            ax.set_title(f"{dtype}, {noise} noise", fontsize=10)
            ax.tick_params(labelsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("M, rows of x" if curves else "time / plain x @ W.T")
    if curves:
        for line in axes:
            line[0].set_ylabel("time / plain x @ W.T")
        handles = {h.get_label(): h for ax in axes.flat for h in ax.get_legend_handles_labels()[0]}
        shown = [n for n in names if n in handles]
        fig.legend([handles[n] for n in shown], shown, loc="outside right upper", fontsize=9, frameon=False)
    else:
        title += f", M = {Ms[0]}"
    where = f"{hardware(meta)}, torch {meta.get('torch')}; bands: 20th to 80th percentile"
    fig.suptitle(f"{title}\n{where}", fontsize=10)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _log_ticks(axis: Any) -> None:
    """Labels that a reader of ratios wants, also where the axis spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    ticks = (1, 2, 5) if high / low > 6 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _curves(ax: Any, rows: list[Row], Ms: list[int]) -> None:
    from matplotlib.ticker import NullLocator

    for name in provider_names(rows):
        points = sorted((r for r in rows if r["provider"] == name), key=lambda r: r["M"])
        M, style = [r["M"] for r in points], _style(name)
        ax.plot(M, [r["to_plain"] for r in points], label=name, markersize=5, **style)
        low, high = ([r[f"to_plain_{p}"] for r in points] for p in ("p20", "p80"))
        ax.fill_between(M, low, high, color=style["color"], alpha=0.18, linewidth=0)
    ax.axhline(1, color="black", linewidth=0.8, linestyle=":", zorder=1)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(Ms, map(str, Ms))
    ax.xaxis.set_minor_locator(NullLocator())
    _log_ticks(ax.yaxis)


def _points(ax: Any, rows: list[Row], names: list[str]) -> None:
    """One M alone: a line to each provider."""
    for row in rows:
        style, y = _style(row["provider"]), names.index(row["provider"])
        ax.hlines(y, row["to_plain_p20"], row["to_plain_p80"], color=style["color"], alpha=0.35, linewidth=7)
        ax.plot(row["to_plain"], y, color=style["color"], marker=style["marker"], markersize=7)
    ax.axvline(1, color="black", linewidth=0.8, linestyle=":", zorder=1)
    ax.set_xscale("log")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    _log_ticks(ax.xaxis)
