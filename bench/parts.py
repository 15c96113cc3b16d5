"""What a call costs before any arithmetic: a layer of 8 x 8 and one row, against torch's own F.linear."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flatlora_kernels as fk

from . import timing
from .results import Row
from .timing import Spread

_LOOP = 25  # calls per reading


class _LoopTimer:
    """Host time per call. On a GPU that is the time to launch; the device catches up between readings."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, call: timing.Call, copy: int) -> float:
        start = time.perf_counter()
        for _ in range(_LOOP):
            call(copy)
        stop = time.perf_counter()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (stop - start) / _LOOP


def measure(backends: list[str], device: str, rounds: int = 40) -> list[Row]:
    """Rows of kind "overhead": F.linear, and each backend with a tensor seed, an int seed and no noise."""
    x, grad_y = torch.randn(1, 8, device=device), torch.randn(1, 8, device=device)
    weight, noise_scale = torch.randn(8, 8, device=device), torch.ones(8, device=device)
    seed = torch.tensor(1, device=device)
    leaf = x.clone().requires_grad_()

    def linear(input: Tensor) -> Tensor:
        return F.linear(input, weight)

    def fused(backend: str, **options: Any) -> Callable[[Tensor], Tensor]:
        return lambda input: fk.fused_flat_lora_linear(input, weight, backend=backend, **options)

    calls = {("F.linear", "none"): linear}
    for name in backends:
        calls[f"fused:{name}", "gaussian"] = fused(name, noise_scale=noise_scale, seed=seed)
        calls[f"fused:{name}, int seed", "gaussian"] = fused(name, noise_scale=noise_scale, seed=1)
        calls[f"fused:{name}", "none"] = fused(name)

    def forward(f: Callable[[Tensor], Tensor]) -> timing.Call:
        def call(_: int) -> None:
            with torch.no_grad():
                f(x)

        return call

    def forward_backward(f: Callable[[Tensor], Tensor]) -> timing.Call:
        return lambda _: torch.autograd.grad(f(leaf), leaf, grad_y)

    rows = []
    for mode, step in (("forward", forward), ("forward+backward", forward_backward)):
        steps = {str(label): step(f) for label, f in calls.items()}
        timed = timing.interleaved(steps, _LoopTimer(device), 1, 1.0, rounds, rounds)
        for label in calls:
            spread = Spread.of(timing.seconds(timed, str(label)))
            over = Spread.of([r[str(label)] - r[str(("F.linear", "none"))] for r in timed])
            median, p20, p80 = (1e6 * t for t in spread)
            provider, noise = label
            about = {"kind": "overhead", "M": 1, "N": 8, "K": 8, "dtype": "float32", "mode": mode, "rank": 0}
            times = {"rounds": len(timed), "median_us": median, "p20_us": p20, "p80_us": p80}
            about |= {"noise": noise, "provider": provider}
            rows.append({**about, **times, "over_linear_us": over.median * 1e6})
    return rows
