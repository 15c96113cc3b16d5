"""Sums over the rows of each expert: what the gradients of a mixture's adapters, weights and biases are."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import Kernel, by_eight, facts, precision_of, prepared, strides
from .tile import dot, round_to, rows_of_experts


@triton.jit(do_not_specialize=["scaling", "M", "experts"])
def _expert_grads_kernel(
    a,  # (M, P)
    b,  # (M, Q)
    offsets,  # (experts,), where each expert's rows end
    out,  # (experts, P, Q), contiguous
    scaling: tl.float32,
    M,
    P,
    Q,
    experts,
    stride_am,
    stride_ap,
    stride_bm,
    stride_bq,
    MULTIPLE_A: tl.constexpr,  # as in the forward kernel
    MULTIPLE_B: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A program has a tile of one expert's result, and goes through the expert's rows."""
    expert = tl.program_id(1)
    num_q = tl.cdiv(Q, BLOCK_Q)
    P = P // MULTIPLE_A * MULTIPLE_A
    Q = Q // MULTIPLE_B * MULTIPLE_B
    stride_am = stride_am // MULTIPLE_A * MULTIPLE_A
    stride_bm = stride_bm // MULTIPLE_B * MULTIPLE_B
    begins, ends, wrong = rows_of_experts(offsets, experts, M, EXPERTS)
    own = tl.arange(0, EXPERTS) == expert
    begin, end = tl.sum(tl.where(own, begins, 0), 0), tl.sum(tl.where(own, ends, 0), 0)
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_p = tl.program_id(0) // num_q * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    offs_q = tl.program_id(0) % num_q * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    a_tile = a + offs_m.to(tl.int64) * stride_am + offs_p.to(tl.int64) * stride_ap
    b_tile = b + offs_m.to(tl.int64) * stride_bm + offs_q.to(tl.int64) * stride_bq
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for m in tl.range(begin, end, BLOCK_M):
        first = tl.cast(m, tl.int64)
        inside = offs_m < end - m
        a_m = tl.load(a_tile + first * stride_am, mask=inside & (offs_p < P), other=0)
        b_m = tl.load(b_tile + first * stride_bm, mask=inside & (offs_q < Q), other=0)
        acc = dot(a_m.T, b_m, acc, PRECISION)
    acc = acc * scaling + wrong
    offs_p = tl.reshape(offs_p, [BLOCK_P])[:, None]
    out += (expert.to(tl.int64) * P + offs_p) * Q + offs_q
    tl.store(out, round_to(acc, out.dtype.element_ty), mask=(offs_p < P) & (offs_q < Q))


def _prepare(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, precision: str) -> Kernel:
    experts, P, Q = out.shape
    half = a.element_size() == 2
    tiles = configs.EXPERT_GRADS if half else configs.EXPERT_GRADS_SINGLE
    config = next(config for most, config in tiles if most >= P)
    rest = {
        "M": a.shape[0],
        "P": P,
        "Q": Q,
        "experts": experts,
        **strides(a, "stride_am", "stride_ap"),
        **strides(b, "stride_bm", "stride_bq"),
        "MULTIPLE_A": 8 if by_eight(a) else 1,
        "MULTIPLE_B": 8 if by_eight(b) else 1,
        "PRECISION": precision,
        "EXPERTS": triton.next_power_of_2(experts),
        "BLOCK_M": config.block_m,
        "BLOCK_P": config.block_out,
        "BLOCK_Q": config.block_in,
    }
    grid = (triton.cdiv(P, config.block_out) * triton.cdiv(Q, config.block_in), experts)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Kernel(_expert_grads_kernel, grid, a, rest, options)


def expert_grads(a: Tensor, b: Tensor, offsets: Tensor, scaling: float, out: Tensor) -> None:
    """out[e] = scaling a^T b over the rows of expert e; zeros of one that has none.

    a: (M, P) and b: (M, Q), of one type; offsets: (E,) int32 or int64, where each expert's rows end; out: (E, P, Q),
    contiguous, of any type. Where `offsets` do not part the rows, all is NaN.
    """
    # The sum of a bias is none of the products that may be tf32.
    precision = "ieee" if a.shape[1] == 1 else precision_of(a)
    kernel = prepared(_prepare, (*facts(a, b, offsets, out), precision), a, b, offsets, out, precision)
    kernel(a, b, offsets, out, scaling)
