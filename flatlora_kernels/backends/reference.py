"""Backend `reference`: the maths in plain PyTorch, on any device and dtype. Materialises ``W + eps``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.noise import Draw, epsilon

PRIORITY = 0
DEVICE_TYPES = None
DTYPES = None
NOISE_ACCUMS = ("folded", "split")


def unavailable() -> str | None:
    return None


def describe() -> str:
    return "plain PyTorch, any device and dtype, materialises W + eps"


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``; float16 on a CPU goes through float32, where torch's own product is up to 100x slower."""
    if a.dtype == torch.float16 and a.device.type == "cpu":
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def perturbed_weight(weight: Tensor, draw: Draw | None, group: int, noise_accum: str = "folded") -> Tensor:
    """``W + eps``, (N, K): rounded once to the type of `weight`, with "split" not rounded to 16 bits."""
    if draw is None:
        return weight
    eps = epsilon(draw, weight.shape[1], group)
    perturbed = weight.to(torch.promote_types(weight.dtype, torch.float32)) + eps
    return perturbed if noise_accum == "split" else perturbed.to(weight.dtype)


def _product(a: Tensor, perturbed: Tensor) -> Tensor:
    """``a @ perturbed`` in the type of `a`."""
    if a.dtype == perturbed.dtype:
        return matmul(a, perturbed)
    return (a.to(perturbed.dtype) @ perturbed).to(a.dtype)


def _row_groups(x: Tensor, draw: Draw | None) -> tuple[Tensor, ...]:
    return x.flatten(0, -2).chunk(draw.samples if draw and x.numel() else 1)


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    lora_x: Tensor | None,
    scaling: float,
    draw: Draw | None,
    noise_accum: str,
) -> tuple[Tensor, Tensor]:
    """``y = x (W + eps)^T + scaling u B^T + bias`` and ``u = lora_x A^T``; (..., N) and (M, r)."""
    groups = [
        _product(x_g, perturbed_weight(weight, draw, g, noise_accum).t())
        for g, x_g in enumerate(_row_groups(x, draw))
    ]
    y = torch.cat(groups)
    u = x.new_empty(0)
    if lora_A is not None:
        u = matmul((x if lora_x is None else lora_x).flatten(0, -2), lora_A.to(x.dtype).t())
        y = y + scaling * matmul(u, lora_B.to(x.dtype).t())
    if bias is not None:
        y = y + bias.to(x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0]), u


def linear_input_grad(
    grad_y: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    v: Tensor | None,
    draw: Draw | None,
    noise_accum: str,
) -> Tensor:
    """``dX = dY (W + eps) + v A`` with the `eps` of the forward pass; (..., K)."""
    groups = [
        _product(dy_g, perturbed_weight(weight, draw, g, noise_accum))
        for g, dy_g in enumerate(_row_groups(grad_y, draw))
    ]
    grad_x = torch.cat(groups)
    if v is not None:
        grad_x = grad_x + matmul(v, lora_A.to(v.dtype))
    return grad_x.view(*grad_y.shape[:-1], weight.shape[1])


def row_sq_norms(weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> Tensor:
    """``|| W[n] + scaling (B A)[n] ||^2`` per row, (N,) float32."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    full = weight.to(compute)
    if lora_A is not None:
        full = full + scaling * (lora_B.to(compute) @ lora_A.to(compute))
    return full.square().sum(dim=1).float()


def perturb(weight: Tensor | None, draw: Draw, out: Tensor) -> None:
    """``out = W + eps``, or ``out = eps`` where `weight` is None; (N, K)."""
    if weight is None:
        out.copy_(epsilon(draw, out.shape[1]))
    else:
        out.copy_(perturbed_weight(weight, draw, 0))
