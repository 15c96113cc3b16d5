"""Figures of slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def plot(curves: dict[str, Sequence[float]], steps: Sequence[float], path: Any) -> None:
    """Draws what `line` returned, a curve for each name, into a file. Needs matplotlib."""
    figure, axes = _figure()
    for name, values in curves.items():
        axes.plot(steps, values, marker=".", label=name)
    axes.set_xlabel("step along a filter-normalised direction")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(path)


def plot_plane(values: Sequence[Sequence[float]], steps: Sequence[float], path: Any) -> None:
    """Draws what `plane` returned as contours into a file. Needs matplotlib."""
    figure, axes = _figure()
    contours = axes.contour(steps, steps, values, levels=15)
    axes.clabel(contours)
    axes.set_xlabel("second direction")
    axes.set_ylabel("first direction")
    figure.savefig(path)


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}; to install it: pip install matplotlib") from error
    figure = Figure(layout="constrained")
    return figure, figure.subplots()
