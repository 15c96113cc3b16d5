"""Backend `reference`: the maths in plain PyTorch, on any device and dtype. Materialises ``W + eps``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.noise import KINDS, epsilon
from ..core.quantized import QuantizedWeight
from ..core.records import Draw, Product, Weight
from .shared.products import matmul

PRIORITY = 0
DEVICE_TYPES = None
DTYPES = None
NOISE_ACCUMS = ("folded", "split")
FUSES = KINDS


def unavailable() -> str | None:
    return None


def fuses_packed(weight: QuantizedWeight) -> bool:
    """See `backends`."""
    return True


def describe() -> str:
    return "plain PyTorch, any device and dtype, materialises W + eps"


def perturbed_weight(weight: Weight, draw: Draw | None, group: int, noise_accum: str = "folded") -> Tensor:
    """``W + eps``, (N, K): rounded once to the type of `weight`, with "split" not rounded to 16 bits."""
    if isinstance(weight, QuantizedWeight):
        weight = weight.decoded()
    if draw is None:
        return weight
    eps = epsilon(draw, weight.shape[1], weight.dtype, group)
    perturbed = weight.to(torch.promote_types(weight.dtype, torch.float32)) + eps
    return perturbed if noise_accum == "split" else perturbed.to(weight.dtype)


def product(p: Product, draw: Draw | None, noise_accum: str) -> Tensor:
    """See `Product`; (M, outputs) in the type of `a`."""
    groups = p.a.chunk(draw.samples if draw and p.a.numel() else 1)
    y = torch.cat([_group(p, draw, group, a, noise_accum) for group, a in enumerate(groups)])
    if p.u is not None:
        y = y + p.scaling * matmul(p.u, p.lora.to(y.dtype).t())
    return y if p.bias is None else y + p.bias.to(y.dtype)


def _group(p: Product, draw: Draw | None, group: int, a: Tensor, noise_accum: str) -> Tensor:
    """``a P^T`` for the rows that see one sample of the noise."""
    perturbed = perturbed_weight(p.weight, draw, group, noise_accum)
    P = perturbed if p.input_grad else perturbed.t()
    if a.dtype == P.dtype:
        return matmul(a, P)
    return (a.to(P.dtype) @ P).to(a.dtype)


def row_sq_norms(weight: Weight, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> Tensor:
    """``|| W[n] + scaling (B A)[n] ||^2`` per row, (N,) float32."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    full = (weight.decoded() if isinstance(weight, QuantizedWeight) else weight).to(compute)
    if lora_A is not None:
        full = full + scaling * (lora_B.to(compute) @ lora_A.to(compute))
    return full.square().sum(dim=1).float()


def perturb(weight: Weight | None, draw: Draw | None, out: Tensor) -> None:
    """``out = W + eps``, (N, K); ``out = eps`` where `weight` is None, ``out = W`` of a packed one where `draw` is."""
    if weight is None:
        assert draw is not None
        out.copy_(epsilon(draw, out.shape[1], out.dtype))
    else:
        out.copy_(perturbed_weight(weight, draw, 0))


def transform(a: Tensor, draw: Draw, input_grad: bool, out: Tensor, add: bool) -> None:
    """``out = a eps^T``, in the input gradient ``a eps``, of "hadamard" noise; with `add` that is added to `out`.

    Args:
        a: (M, contraction), M > 0. out: (M, outputs), contiguous, in the type of `a`.
    """
    compute = torch.promote_types(a.dtype, torch.float32)
    K = out.shape[1] if input_grad else a.shape[1]
    for group, (a_part, y) in enumerate(zip(a.chunk(draw.samples), out.chunk(draw.samples), strict=True)):
        eps = epsilon(draw, K, a.dtype, group).to(compute)
        noise = a_part.to(compute) @ (eps if input_grad else eps.t())
        y.copy_(y + noise if add else noise)
