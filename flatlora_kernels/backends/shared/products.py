"""Products of torch's own: all of a call without noise, and the adapter's small ones."""

from __future__ import annotations

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.records import Product


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, through float32 where torch's own product is slow."""
    if slow(a):
        return (a.float() @ b.float()).to(a.dtype)
    return own_rows(a) @ b


def slow(a: Tensor) -> bool:
    """Whether torch multiplies the type of `a` more slowly than float32, copies included.

    On a CPU float16, by up to 100 times, and without AVX-512 the adapter's products in bfloat16, by up to 20.
    """
    if a.dtype.itemsize != 2 or a.device.type != "cpu":
        return False
    return a.dtype == torch.float16 or _slow_bfloat16()


@functools.cache
def _slow_bfloat16() -> bool:
    return (
        platform.machine() in ("x86_64", "AMD64") and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    )


def own_rows(a: Tensor) -> Tensor:
    """`a`, (M, K), copied where torch's product would read beyond the ends of its rows.

    That is so on AMX with rows that are apart (https://github.com/uxlfoundation/oneDNN/pull/5603): what is no number
    between them is multiplied by nought. Of whole rows it reads the next, so that NaN spreads (issue 5717 there).
    """
    apart = a.dtype == torch.bfloat16 and a.stride(0) > a.shape[1] and a.shape[1] % 32
    return a.contiguous() if apart and a.device.type == "cpu" and has_amx() else a


@functools.cache
def has_amx() -> bool:
    """Whether torch multiplies bfloat16 by the tiles of x86 CPUs."""
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_tile", False))
    return torch.cpu._is_amx_tile_supported()  # of older versions of torch


def linear(a: Tensor, weight: Tensor) -> Tensor:
    """``a @ weight^T`` in the type of `a`."""
    if slow(a):
        return matmul(a, weight.t())
    return F.linear(own_rows(a), cast(weight, a.dtype))


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, which takes a microsecond where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def plain(p: Product) -> Tensor:
    """The product without noise, where there is nothing that a vendor's does not do better."""
    a, weight, input_grad, u, lora, bias, scaling, _ = p
    if not isinstance(weight, Tensor):
        assert p.empty or not weight.numel(), "a packed weight is multiplied by slices"
        y = a.new_zeros(len(a), p.outputs)
        return y if bias is None else y + cast(bias, a.dtype)
    if a.dtype == torch.float16 and a.device.type == "cpu":
        y = matmul(a, weight if input_grad else weight.t())
        y = y if bias is None else bias.to(a.dtype) + y
        return y if u is None else y + (scaling * matmul(u, lora.to(a.dtype).t())).to(a.dtype)
    if input_grad:
        y = own_rows(a) @ weight
    else:
        y = F.linear(own_rows(a), weight, None if bias is None else cast(bias, a.dtype))
    if u is None:
        return y
    if slow(a):  # added in float32, rounded once
        return y.add_(u.float() @ cast(lora, a.dtype).float().t(), alpha=scaling)  # type: ignore[arg-type]
    return y.addmm_(u, cast(lora, a.dtype).t(), alpha=scaling)  # type: ignore[arg-type]


def adapter_grads(
    dy: Tensor, u: Tensor | None, lora_B: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """``v = scaling dY B``, (M, r), and ``dB = scaling dY^T u``, (N, r).

    Args:
        dy: (M, N). u: (M, r) or None, lora_B: (N, r) or None: without them dB or v is not made, and returned empty.
    """
    B = None if lora_B is None else cast(lora_B, dy.dtype)
    v = dy.new_empty(0) if B is None else _scaled_matmul(dy, B, scaling, u)
    dB = dy.new_empty(0) if u is None else _scaled_matmul(dy.t(), u, scaling, B)
    return v, dB


def _scaled_matmul(a: Tensor, b: Tensor, alpha: float, like: Tensor | None) -> Tensor:
    """``alpha a b``; like: of its shape, whose values do not count."""
    if slow(a):
        return (alpha * (a.float() @ b.float())).to(a.dtype)
    if like is None:
        like = a.new_empty(())
    return torch.addmm(like, own_rows(a), b, beta=0, alpha=alpha)


def allows_tf32() -> bool:
    """Whether float32 products may be tf32, as torch's own on a GPU."""
    # Not get_float32_matmul_precision, which raises where this, the newer way, was used to set it.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
