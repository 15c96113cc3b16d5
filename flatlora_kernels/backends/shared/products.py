"""What the GPU backends share: a call with noise goes to their fused product, one without to the vendor's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...spec.noise import Draw
from ..reference import matmul

# (a, weight, u, lora, bias, scaling, draw, noise_accum) -> (M, outputs), all matrices, none empty
Forward = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float, Draw, str], Tensor]
# (dy, weight, v, lora_A, draw, noise_accum) -> (M, K)
InputGrad = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Draw, str], Tensor]


def linear(
    fused: Forward,
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
    """`backends.reference.linear` by `fused`."""
    N = weight.shape[0]
    u = None
    if lora_A is not None:
        u = matmul((x if lora_x is None else lora_x).flatten(0, -2), lora_A.to(x.dtype).t())
    x2 = x if x.dim() == 2 else x.flatten(0, -2)
    if draw is None or 0 in (*x2.shape, N):
        # Without noise there is nothing that a vendor's product does not do better.
        y = matmul(x2, weight.t()) if bias is None else _addmm(bias.to(x.dtype), x2, weight.t())
        if u is not None:
            y = _addmm(y, u, lora_B.to(x.dtype).t(), scaling)
    else:
        y = fused(x2, weight, u, lora_B, bias, scaling, draw, noise_accum)
    return y.view(*x.shape[:-1], N), x.new_empty(0) if u is None else u


def linear_input_grad(
    fused: InputGrad,
    grad_y: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    v: Tensor | None,
    draw: Draw | None,
    noise_accum: str,
) -> Tensor:
    """`backends.reference.linear_input_grad` by `fused`."""
    K = weight.shape[1]
    dy = grad_y if grad_y.dim() == 2 else grad_y.flatten(0, -2)
    if draw is None or 0 in (*dy.shape, K):
        dx = matmul(dy, weight)
        if v is not None:
            dx = _addmm(dx, v, lora_A.to(dx.dtype))
    else:
        dx = fused(dy, weight, None if v is None else v.contiguous(), lora_A, draw, noise_accum)
    return dx.view(*grad_y.shape[:-1], K)


def adapter_grads(
    dy: Tensor, u: Tensor | None, lora_B: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """``v = scaling dY B``, (M, r), and ``dB = scaling dY^T u``, (N, r), by the vendor's products.

    Args:
        dy: (M, N). u: (M, r) or None, lora_B: (N, r) or None: without them dB or v is not made, and returned empty.
    """
    v = dy.new_empty(0) if lora_B is None else _scaled_matmul(dy, lora_B.to(dy.dtype), scaling)
    dB = dy.new_empty(0) if u is None else _scaled_matmul(dy.t(), u, scaling)
    return v, dB


def _scaled_matmul(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if a.device.type == "cpu" and a.dtype == torch.float16:
        return (alpha * (a.float() @ b.float())).to(a.dtype)
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)


def _addmm(c: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    if c.device.type == "cpu" and c.dtype == torch.float16:
        return c + (alpha * matmul(a, b)).to(c.dtype)
    return torch.addmm(c, a, b, alpha=alpha)


def allows_tf32() -> bool:
    """Whether float32 products may be tf32, as torch's own on a GPU."""
    # Not get_float32_matmul_precision, which raises where this, the newer way, was used to set it.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
