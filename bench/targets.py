"""The project's targets, beside what a run of `--set targets` measured.

Ratios of times in one run, with a LoRA of rank 16 and `noise_scale` given. A target of 1 counts as met up to 1.03.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .results import Row
from .table import markdown

_EQUAL = 1.03
_PROBLEM = {"cpu": ("float32", 2048, 2048, 16), "cuda": ("bfloat16", 4096, 4096, 16)}  # dtype, N, K, rank
_GPU = {"gaussian": (1.35, 1.25, 1.10, 1.05), "rademacher": (1.15, 1.10, 1.06, 1.04)}


class Target(NamedTuple):
    mode: str
    noise: str
    M: int
    base: str  # of the ratio
    most: float


def targets(device: str) -> Iterator[Target]:
    """On a GPU in bfloat16 with N = K = 4096, on a CPU in float32 with 2048."""
    if device == "cpu":
        for M, most in ((256, 1.22), (2048, 1.05), (8192, 1.03)):
            yield Target("forward", "gaussian", M, "plain", most)
        return
    for noise, figures in _GPU.items():
        for M, most in zip((16, 256, 2048, 8192), figures, strict=True):
            yield Target("forward", noise, M, "plain", most)
            yield Target("forward", noise, M, "rival", _EQUAL)
            yield Target("forward+backward", noise, M, "peft", _EQUAL)


def report(rows: list[Row], device: str, provider: str = "auto") -> str:
    """A line to each target; `provider` is whose ratio counts, by CUDA graphs where they were timed."""
    problem = dict(zip(("dtype", "N", "K", "rank"), _PROBLEM[device], strict=True))
    lines = []
    for target in targets(device):
        about = {"kind": "linear", "provider": provider, **problem}
        about |= {"mode": target.mode, "noise": target.noise, "M": target.M}
        found = [r for r in rows if f"to_{target.base}" in r and about.items() <= r.items()]
        launch, measured, verdict = "", "-", "not measured"
        if found:
            best = max(found, key=lambda row: row.get("launch") == "graph")
            launch = best.get("launch") or "calls"
            ratio, p20, p80 = (best[f"to_{target.base}{part}"] for part in ("", "_p20", "_p80"))
            measured = f"{ratio:.3f} ({p20:.3f} to {p80:.3f})"
            verdict = "met" if ratio <= target.most else "missed"
        lines.append([*map(str, target[:4]), f"{target.most:g}", measured, launch, verdict])
    return markdown(["mode", "noise", "M", "over", "target", "measured (p20 to p80)", "by", ""], lines)
