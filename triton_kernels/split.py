"""Adds up the partial sums of a contraction that was split, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import launch
from .tile import round_to


@triton.jit(do_not_specialize=["size"])
def _add_splits_kernel(
    partial,  # (SPLITS, M, N) float32
    bias,  # (N,)
    out,  # (M, N)
    size,  # M N
    N,
    stride_bias,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    total = tl.load(partial + offsets, mask=inside, other=0)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(partial + s * tl.cast(size, tl.int64) + offsets, mask=inside, other=0)
    if HAS_BIAS:
        total += tl.load(bias + offsets % N * stride_bias, mask=inside, other=0).to(tl.float32)
    tl.store(out + offsets, round_to(total, out.dtype.element_ty), mask=inside)


def add_splits(partial: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = sum of `partial` + bias. partial: (splits, M, N) float32; bias: (N,) or None; out: (M, N), contiguous."""
    arguments = {
        "partial": partial,
        "bias": bias,
        "out": out,
        "size": out.numel(),
        "N": out.shape[1],
        "stride_bias": 0 if bias is None else bias.stride(0),
        "SPLITS": partial.shape[0],
        "HAS_BIAS": bias is not None,
        "BLOCK": configs.ADD_SPLITS_BLOCK,
    }
    grid = (triton.cdiv(out.numel(), configs.ADD_SPLITS_BLOCK),)
    launch(_add_splits_kernel, grid, out.device, arguments, {"num_warps": 4})
