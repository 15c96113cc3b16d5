"""What arrives of small noise: `folded` rounds W + eps to the type of W, `split` eps alone.

Weights as after training or initialisation, N(0, 1 / in_features); the figures do not depend on the backend, whose own
error of drawing is far smaller. On a processor without instructions for bfloat16, and for float16 on any, backend `cpu`
adds in float32 and loses nothing either way.
"""

from __future__ import annotations

import torch

import flatlora_kernels as fk

from .table import markdown

SIGMAS = (0.001, 0.002, 0.004, 0.01, 0.02, 0.05, 0.1, 0.2)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def errors(dtype: torch.dtype, sigma: float, noise: str, size: int = 1024) -> tuple[float, float, float]:
    """|arrived - eps| / |eps| of folded and of split, and |arrived| / |eps| of folded."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, size, generator=generator) / size**0.5).to(dtype)
    scale = fk.flat_noise_scale(weight, sigma=sigma)
    eps = fk.materialize_noise(scale, size, seed=1, noise=noise, dtype=torch.float32, backend="reference")
    folded = (weight.float() + eps).to(dtype).double() - weight.double()
    exact = eps.double()
    found = (folded - exact, eps.to(dtype).double() - exact, folded)
    return tuple((t.norm() / exact.norm()).item() for t in found)


def report() -> str:
    """The table, in Markdown."""
    lines = []
    for sigma in SIGMAS:
        line = {"sigma": f"{sigma:g}"}
        for dtype in DTYPES:
            folded, split, size = errors(dtype, sigma, "gaussian")
            name = str(dtype).removeprefix("torch.")
            line[f"{name} folded"] = f"{100 * folded:.2g} %"
            if dtype == torch.bfloat16:
                line["of its size"] = f"{size:.3f}"
            line[f"{name} split"] = f"{100 * split:.2g} %"
        lines.append(line)
    return markdown(list(lines[0]), [list(line.values()) for line in lines])
