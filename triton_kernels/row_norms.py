"""|| W[n] + scaling (lora_B lora_A)[n] ||^2 per row, W read once; of all experts of a mixture in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.quantized import QuantizedWeight
from . import configs
from .launch import Kernel, by_eight, facts, machine_of, prepared, rank_block, strides
from .packed import decoded, load_blocks, lookup, operand, packed_facts, scales_of, values_at
from .tile import dot, round_to, to_float


@triton.jit
def _load_B(lora_B, n, r, rank, stride_bn, stride_br, BLOCK_R: tl.constexpr):
    offs_r = r + tl.arange(0, BLOCK_R)[None, :]
    offsets = n[:, None] * stride_bn + offs_r.to(tl.int64) * stride_br
    return tl.load(lora_B + offsets, mask=offs_r < rank, other=0)  # (BLOCK_N, BLOCK_R)


@triton.jit
def _load_A(lora_A, r, cols, rank, K, stride_ar, stride_ak, EVEN: tl.constexpr, BLOCK_R: tl.constexpr):
    offs_r = r + tl.arange(0, BLOCK_R)[:, None]
    offsets = offs_r.to(tl.int64) * stride_ar + cols[None, :].to(tl.int64) * stride_ak
    inside = offs_r < rank
    if not EVEN:
        inside = inside & (cols[None, :] < K)
    return tl.load(lora_A + offsets, mask=inside, other=0)  # (BLOCK_R, BLOCK_K)


@triton.jit(do_not_specialize=["scaling"])
def _row_sq_norms_kernel(
    weight,  # (N, K), or None
    packed,  # packed.Operand, or None
    lora_A,  # (r, K)
    lora_B,  # (N, r)
    out,  # (experts, N) float32, contiguous
    scaling: tl.float32,
    N,
    K,
    rank,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_weight,  # from one expert to the next
    stride_A,
    stride_B,
    PACKED: tl.constexpr,  # packed.Packed, or None
    ARITHMETIC: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides K
    BLOCK_R: tl.constexpr,  # 0 = no adapter
    LONG_R: tl.constexpr,  # rank > BLOCK_R
    MULTIPLE: tl.constexpr,  # as in the forward kernel
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K = K // MULTIPLE * MULTIPLE
    stride_wn = stride_wn // MULTIPLE * MULTIPLE
    expert = tl.program_id(1).to(tl.int64)
    if PACKED is None:
        weight += expert * (stride_weight // MULTIPLE * MULTIPLE)
    if BLOCK_R > 0:
        lora_A += expert * stride_A
        lora_B += expert * stride_B
    out += expert * N
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n32 = tl.minimum(offs_n, N - 1)
    n = n32.to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    if PACKED is None:
        w_tile = weight + offs_k[None, :].to(tl.int64) * stride_wk + n[:, None] * stride_wn
    elif PACKED.by_blocks:
        blocks = tl.arange(0, BLOCK_K // 8)[None, :]
        table = lookup(packed, PACKED, ARITHMETIC)
    squares = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if BLOCK_R > 0 and not LONG_R:
        B = _load_B(lora_B, n, 0, rank, stride_bn, stride_br, BLOCK_R)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if PACKED is not None:
            TARGET: tl.constexpr = PACKED.target
            if PACKED.by_blocks:
                loaded = load_blocks(packed, 0, n32[:, None], k, blocks, N, K, not EVEN, PACKED)
                word, block_scale = scales_of(loaded, packed, PACKED)
                w = decoded(word, block_scale, table, PACKED, ARITHMETIC, False)
            else:
                cols = tl.minimum(k + offs_k[None, :], K - 1)
                w = round_to(values_at(packed, n32[:, None], cols, PACKED), TARGET)
            if not EVEN:
                w = tl.where(offs_k[None, :] < K - k, w, 0)
        elif EVEN:
            w = tl.load(w_tile + tl.cast(k, tl.int64) * stride_wk)
        else:
            w = tl.load(w_tile + tl.cast(k, tl.int64) * stride_wk, mask=offs_k[None, :] < K - k, other=0)
        if BLOCK_R > 0:
            product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            if LONG_R:
                for r in tl.range(0, rank, BLOCK_R, num_stages=1):
                    B = _load_B(lora_B, n, r, rank, stride_bn, stride_br, BLOCK_R)
                    A = _load_A(lora_A, r, k + offs_k, rank, K, stride_ar, stride_ak, EVEN, BLOCK_R)
                    product = dot(B, A, product, "ieee")
            else:
                A = _load_A(lora_A, 0, k + offs_k, rank, K, stride_ar, stride_ak, EVEN, BLOCK_R)
                product = dot(B, A, product, "ieee")
            w = tl.fma(product, scaling, to_float(w, ARITHMETIC))
            if not EVEN:  # an infinite B times the zeros beyond the last column is NaN
                w = tl.where(offs_k[None, :] < K - k, w, 0)
        else:
            w = to_float(w, ARITHMETIC)
        squares = tl.fma(w, w, squares)
    tl.store(out + offs_n, tl.sum(squares, axis=1), mask=offs_n < N)


def _prepare(weight: Any, lora_A: Tensor | None, lora_B: Tensor | None) -> Kernel:
    N, K = weight.shape[-2:]
    rank = 0 if lora_A is None else lora_A.shape[-2]
    packs = isinstance(weight, QuantizedWeight)
    experts = 1 if len(weight.shape) == 2 else weight.shape[0]

    def apart(tensor: Tensor | None) -> int:
        return 0 if tensor is None or tensor.dim() == 2 else tensor.stride(0)

    like = weight.parts.codes if packs else weight
    config = configs.ROW_NORMS
    if rank:
        long = rank > rank_block(rank) or lora_A.dtype == torch.float32
        config = configs.ROW_NORMS_LONG_ADAPTER if long else configs.ROW_NORMS_ADAPTER
    rest = {
        "N": N,
        "K": K,
        "rank": rank,
        **strides(None if packs else weight, "stride_wn", "stride_wk"),
        **strides(lora_A, "stride_ar", "stride_ak"),
        **strides(lora_B, "stride_bn", "stride_br"),
        "stride_weight": apart(None if packs else weight),
        "stride_A": apart(lora_A),
        "stride_B": apart(lora_B),
        "PACKED": packed_facts(weight) if packs else None,
        "ARITHMETIC": machine_of(like).arithmetic,
        "EVEN": K % config.block_k == 0,
        "BLOCK_R": rank_block(rank),
        "LONG_R": rank > rank_block(rank),
        "MULTIPLE": 8 if by_eight(weight) else 1,
        "STAGES": config.num_stages,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    grid = (triton.cdiv(N, config.block_n), experts)
    return Kernel(_row_sq_norms_kernel, grid, like, rest, {"num_warps": config.num_warps})


def row_sq_norms(weight: Any, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> Tensor:
    """(N,) float32 of weight (N, K), packed or not, lora_A (r, K) and lora_B (N, r), both of one type or None.

    Or (E, N) of a weight (E, N, K) with lora_A (E, r, K) and lora_B (E, N, r).
    """
    out = weight.new_empty(weight.shape[:-1], dtype=torch.float32)
    kernel = prepared(_prepare, facts(weight, lora_A, lora_B), weight, lora_A, lora_B)
    packed = None
    if isinstance(weight, QuantizedWeight):
        weight, packed = None, operand(weight)
    kernel(weight, packed, lora_A, lora_B, out, scaling)
    return out
