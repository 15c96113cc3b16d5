"""Adds up the partial sums of contractions that were split, always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Kernel, facts, prepared
from .tile import round_to


@triton.jit
def _sum_of(partial, offsets, inside, size, splits):
    total = tl.load(partial + offsets, mask=inside, other=0)
    for s in tl.range(1, splits, loop_unroll_factor=4):  # whose loads are under way together
        total += tl.load(partial + s * tl.cast(size, tl.int64) + offsets, mask=inside, other=0)
    return total


@triton.jit(do_not_specialize=["size", "size_2", "splits", "splits_2", "N", "stride_bias"])
def _add_splits_kernel(
    partial,  # (splits, M, N) float32
    bias,  # (N,)
    out,  # (M, N)
    partial_2,  # (splits_2, any) float32
    out_2,  # (any,)
    size,  # M N
    size_2,
    splits,
    splits_2,
    N,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    MULTIPLE: tl.constexpr,  # 8 where that divides both sizes, else 1
    BLOCK: tl.constexpr,
):
    # So that the compiler knows, and loads and masks eight elements at a time.
    size = size // MULTIPLE * MULTIPLE
    size_2 = size_2 // MULTIPLE * MULTIPLE
    block = tl.program_id(0)
    first = tl.cdiv(size, BLOCK)
    if block < first:
        offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < size
        total = _sum_of(partial, offsets, inside, size, splits)
        if HAS_BIAS:
            total += tl.load(bias + offsets % N * stride_bias, mask=inside, other=0).to(tl.float32)
        tl.store(out + offsets, round_to(total, out.dtype.element_ty), mask=inside)
    elif HAS_SECOND:
        offsets = (block - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < size_2
        total = _sum_of(partial_2, offsets, inside, size_2, splits_2)
        tl.store(out_2 + offsets, round_to(total, out_2.dtype.element_ty), mask=inside)


def _prepare(
    partial: Tensor, bias: Tensor | None, out: Tensor, partial_2: Tensor | None, out_2: Tensor | None
) -> Kernel:
    size_2 = 0 if out_2 is None else out_2.numel()
    rest = {
        "size": out.numel(),
        "size_2": size_2,
        "splits": partial.shape[0],
        "splits_2": 0 if partial_2 is None else partial_2.shape[0],
        "N": out.shape[1],
        "stride_bias": 0 if bias is None else bias.stride(0),
        "HAS_BIAS": bias is not None,
        "HAS_SECOND": out_2 is not None,
        "MULTIPLE": 8 if out.numel() % 8 == 0 == size_2 % 8 else 1,
        "BLOCK": configs.ADD_SPLITS_BLOCK,
    }
    blocks = triton.cdiv(out.numel(), rest["BLOCK"]) + triton.cdiv(size_2, rest["BLOCK"])
    return Kernel(_add_splits_kernel, (blocks,), out, rest, {"num_warps": 4})


def add_splits(
    partial: Tensor,
    bias: Tensor | None,
    out: Tensor,
    partial_2: Tensor | None = None,
    out_2: Tensor | None = None,
) -> None:
    """out = sum of `partial` + bias; out_2 = sum of `partial_2`, in the same launch.

    partial: (splits, M, N) float32; bias: (N,) or None; out: (M, N), contiguous. partial_2, out_2: likewise, or None.
    """
    key = facts(partial, bias, out, partial_2, out_2)
    kernel = prepared(_prepare, key, partial, bias, out, partial_2, out_2)
    kernel(partial, bias, out, partial_2, out_2)
