"""y = x (W + eps)^T + scaling u lora_B^T + bias, with eps drawn in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import CHANGING
from .packed import load_blocks, lookup, scales_of, weight_of
from .tile import (
    dot,
    held,
    in_order,
    load_step,
    loads_ahead,
    perturb_tile,
    place,
    place_among,
    round_to,
    sample_of,
    step_at,
    weight_blocks,
    weight_cols,
    weight_rows,
)


@triton.jit
def _load_weight(
    tile, packed, k, rows, cols, stride_wk, N, K, PACKED: tl.constexpr, DRAW: tl.constexpr, CUT: tl.constexpr
):
    """Columns k + `cols` of the weight, `held`, or its packed blocks of them; zeros beyond its edge."""
    if PACKED is not None:
        return load_blocks(packed, 0, rows, k, cols, N, K, not CUT.even, PACKED)
    else:
        tile += tl.cast(k, tl.int64) * stride_wk
        if CUT.even:
            return held(tl.load(tile), DRAW)
        else:
            return held(tl.load(tile, mask=cols < K - k, other=0), DRAW)


@triton.jit
def _load_B(lora_B, n, r, rank, stride_bn, stride_br, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr):
    """Columns r and on of lora_B, transposed: (BLOCK_R, rows n)."""
    offs_r = r + tl.arange(0, BLOCK_R)[:, None]
    tile = lora_B + n[None, :] * stride_bn + offs_r.to(tl.int64) * stride_br
    return round_to(tl.load(tile, mask=offs_r < rank, other=0).to(tl.float32), DTYPE)


@triton.jit(
    do_not_specialize=[*CHANGING, "scaling", "M", "rows_per_sample", "steps_per_split"],
    do_not_specialize_on_alignment=["seed"],
)
def _linear_forward_kernel(
    x,  # (M, K), or its descriptor
    weight,  # (N, K), or None
    packed,  # packed.Operand, or None
    mixture,  # tile.Mixture, or None: weight, lora_A, lora_B, bias and noise_scale have experts as a first dimension
    u,  # (M, r), contiguous; with MAKES_U written, and with CUT.split float32 parts of it (splits, M, r)
    lora_A,  # (r, K), with MAKES_U
    lora_B,  # (N, r)
    bias,  # (N,)
    noise_scale,  # (N,), or None as seed where nothing is drawn
    seed,
    y,  # (M, N), or with CUT.split float32 partial sums (splits, M, N); contiguous
    scaling: tl.float32,
    stream_id: tl.int64,
    sample_offset: tl.int64,
    row_offset: tl.int64,
    col_offset: tl.int64,
    M,
    N,
    K,
    rank,
    rows_per_sample,
    steps_per_split,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_bias,
    stride_scale,
    PACKED: tl.constexpr,  # packed.Packed, or None
    DRAW: tl.constexpr,  # tile.Drawn
    CUT: tl.constexpr,  # tile.Cut
    HAS_BIAS: tl.constexpr,
    MAKES_U: tl.constexpr,  # u = x lora_A^T is a result; rank <= CUT.block_r
):
    BLOCK_M: tl.constexpr = CUT.block_m
    BLOCK_N: tl.constexpr = CUT.block_n
    BLOCK_K: tl.constexpr = CUT.block_k
    BLOCK_R: tl.constexpr = CUT.block_r
    MULTIPLE: tl.constexpr = CUT.multiple
    PRECISION: tl.constexpr = CUT.precision
    DTYPE: tl.constexpr = weight.dtype.element_ty if PACKED is None else PACKED.target
    ARITHMETIC: tl.constexpr = DRAW.arithmetic
    if CUT.experts:
        expert, first_m, last_m, first_n, wrong = place_among(mixture, M, N, BLOCK_N, CUT)
        if first_m >= M:
            return
        group = 0
        stream_id += expert
        expert = expert.to(tl.int64)
        weight += expert * (mixture.stride_weight // MULTIPLE * MULTIPLE)
        if BLOCK_R > 0:
            lora_B += expert * mixture.stride_B
        if MAKES_U:
            lora_A += expert * mixture.stride_A
        if HAS_BIAS:
            bias += expert * mixture.stride_bias
        if DRAW.noise != "none":
            noise_scale += expert * mixture.stride_scale
    else:
        group, first_m, last_m, first_n = place(M, rows_per_sample, N, BLOCK_N, CUT)
    split = tl.program_id(1)
    # So that the compiler knows, and loads and masks eight elements at a time.
    N = N // MULTIPLE * MULTIPLE
    K = K // MULTIPLE * MULTIPLE
    stride_xm = stride_xm // MULTIPLE * MULTIPLE
    stride_wn = stride_wn // MULTIPLE * MULTIPLE

    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    # Beyond the edge the last row is read again; it is not stored.
    m = tl.minimum(offs_m, last_m - 1).to(tl.int64)
    n = tl.minimum(offs_n, N - 1).to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BLOCK_R > 0 and not MAKES_U:
        if split == 0:
            for r in tl.range(0, rank, BLOCK_R, num_stages=1):
                offs_r = r + tl.arange(0, BLOCK_R)
                u_r = tl.load(u + m[:, None] * rank + offs_r[None, :], mask=offs_r[None, :] < rank, other=0)
                B_r = _load_B(lora_B, n, r, rank, stride_bn, stride_br, DTYPE, BLOCK_R)
                acc = dot(u_r, B_r, acc, PRECISION)
            acc *= scaling

    begin = split * steps_per_split * BLOCK_K
    end = tl.minimum(begin + steps_per_split * BLOCK_K, K)
    x_cols = tl.arange(0, BLOCK_K)[None, :]
    x_tile = x
    if not CUT.by_engine:
        x_tile = x + m[:, None] * stride_xm + x_cols.to(tl.int64) * stride_xk

    if MAKES_U:
        # The part of u for this part of the contraction; all tiles of columns make it, the first one writes it.
        offs_r = tl.arange(0, BLOCK_R)
        offs_ak = tl.arange(0, BLOCK_K)
        A_tile = lora_A + offs_r[:, None].to(tl.int64) * stride_ar + offs_ak[None, :].to(tl.int64) * stride_ak
        u_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)

    w_rows = tl.minimum(first_n + weight_rows(BLOCK_N, DRAW), N - 1)
    w_tile, table = None, None
    if PACKED is None:
        w_cols = weight_cols(BLOCK_N, BLOCK_K, DRAW)
        w_tile = weight + w_cols.to(tl.int64) * stride_wk + w_rows.to(tl.int64) * stride_wn
    else:
        w_cols = weight_blocks(BLOCK_N, BLOCK_K, DRAW)
        table = lookup(packed, PACKED, ARITHMETIC)
    scale = None
    if DRAW.noise != "none":
        scale = tl.load(noise_scale + w_rows.to(tl.int64) * stride_scale)
        seed = tl.load(seed)
    rows = w_rows.to(tl.uint32) + row_offset.to(tl.uint32)
    first_row = tl.cast(first_n, tl.int64) + row_offset
    col_offset = tl.cast(col_offset, tl.int64)
    sample, negate = sample_of(group, sample_offset, DRAW)

    # Few rows: loads of the weight are what takes time, and the compiler keeps several under way.
    # Many: the noise of one tile is drawn while the tensor cores multiply by the one before. With AHEAD its weight was
    # loaded a step before that, or they would wait for it.
    AHEAD: tl.constexpr = CUT.carry and loads_ahead()
    if CUT.carry:
        w = _load_weight(w_tile, packed, begin, w_rows, w_cols, stride_wk, N, K, PACKED, DRAW, CUT)
        w, rest = perturb_tile(
            weight_of(scales_of(w, packed, PACKED), table, PACKED, DRAW), scale, rows, first_row, begin + col_offset,
            stream_id, sample, negate, seed, DTYPE, DRAW,
        )  # fmt: skip
    if AHEAD:
        this_k = step_at(begin + BLOCK_K, end, BLOCK_K)
        this_w = _load_weight(w_tile, packed, this_k, w_rows, w_cols, stride_wk, N, K, PACKED, DRAW, CUT)
    for k in tl.range(begin, end, BLOCK_K):
        if not AHEAD:
            this_k = step_at(k + BLOCK_K, end, BLOCK_K) if CUT.carry else k
            this_w = _load_weight(w_tile, packed, this_k, w_rows, w_cols, stride_wk, N, K, PACKED, DRAW, CUT)
        x_k = load_step(x, x_tile, k, first_m, x_cols, K, stride_xk, CUT)
        if AHEAD:
            # Behind the wait for x: before it, the compiler begins to use this weight ahead of the product.
            next_k = step_at(k + 2 * BLOCK_K, end, BLOCK_K)
            next_w = _load_weight(w_tile, packed, next_k, w_rows, w_cols, stride_wk, N, K, PACKED, DRAW, CUT)
        ready = scales_of(this_w, packed, PACKED)
        if MAKES_U:
            inside_A = offs_r[:, None] < rank
            if not CUT.even:
                inside_A = inside_A & (offs_ak[None, :] < K - k)
            A_k = tl.load(A_tile + tl.cast(k, tl.int64) * stride_ak, mask=inside_A, other=0)
            u_acc = dot(x_k, round_to(A_k.to(tl.float32), DTYPE).T, u_acc, PRECISION)
        if CUT.carry:
            acc = dot(x_k, in_order(w, DRAW).T, acc, PRECISION)
            if DRAW.apart:
                acc = dot(x_k, in_order(rest, DRAW).T, acc, PRECISION)
        w, rest = perturb_tile(
            weight_of(ready, table, PACKED, DRAW), scale, rows, first_row, this_k + col_offset,
            stream_id, sample, negate, seed, DTYPE, DRAW,
        )  # fmt: skip
        if AHEAD:
            this_k, this_w = next_k, next_w
        if not CUT.carry:
            acc = dot(x_k, in_order(w, DRAW).T, acc, PRECISION)
            if DRAW.apart:
                acc = dot(x_k, in_order(rest, DRAW).T, acc, PRECISION)

    if MAKES_U:
        u_acc = tl.where(
            offs_r[None, :] < rank, u_acc, 0
        )  # infinite x times the zeros beyond the rank is NaN
        B = _load_B(lora_B, n, 0, rank, stride_bn, stride_br, DTYPE, BLOCK_R)
        acc = dot(u_acc * scaling, B.to(tl.float32), acc, "ieee")
        if first_n == 0:
            u_tile = u + (tl.cast(split, tl.int64) * M + offs_m[:, None]) * rank + offs_r[None, :]
            inside_u = (offs_m[:, None] < last_m) & (offs_r[None, :] < rank)
            if CUT.split:
                tl.store(u_tile, u_acc, mask=inside_u)
            else:
                tl.store(u_tile, round_to(u_acc, DTYPE), mask=inside_u)

    if CUT.experts:
        acc += wrong
    inside = (offs_m[:, None] < last_m) & (offs_n[None, :] < N)
    y += (tl.cast(split, tl.int64) * M + offs_m[:, None]) * N + offs_n[None, :]
    if CUT.split:
        tl.store(y, acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n * stride_bias).to(tl.float32)[None, :]
        tl.store(y, round_to(acc, DTYPE), mask=inside)
