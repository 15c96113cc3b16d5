"""dX = dY (W + eps) + v lora_A, with the eps of the forward pass drawn again in registers."""

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
def _load_tile(
    weight, packed, noise_scale, n, rows, first_k, cols, stride_wn, stride_scale, N, K,
    PACKED: tl.constexpr, DRAW: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Rows n + `rows` of the weight, `held`, or their packed blocks, and their noise_scale; zeros beyond its edges."""
    if PACKED is not None:
        w = load_blocks(packed, n, rows, first_k, cols, N, K, not CUT.even, PACKED)
    else:
        weight += tl.cast(n, tl.int64) * stride_wn
        if CUT.even:
            w = held(tl.load(weight), DRAW)
        else:
            w = held(tl.load(weight, mask=(rows < N - n) & (cols < K), other=0), DRAW)
    if DRAW.noise == "none":
        return w, tl.zeros([1, 1], tl.float32)  # Triton 3.6 returns no None
    elif CUT.even:
        return w, tl.load(noise_scale + tl.cast(n, tl.int64) * stride_scale)
    else:
        return w, tl.load(noise_scale + tl.cast(n, tl.int64) * stride_scale, mask=rows < N - n, other=0)


@triton.jit(
    do_not_specialize=[*CHANGING, "scaling", "M", "rows_per_sample", "steps_per_split"],
    do_not_specialize_on_alignment=["seed"],
)
def _linear_input_grad_kernel(
    grad_y,  # (M, N), or its descriptor
    weight,  # (N, K), or None
    packed,  # packed.Operand, or None
    mixture,  # tile.Mixture, or None, see the forward kernel
    v,  # (M, r), contiguous; scaling dY lora_B, of a mixture dY lora_B
    lora_A,  # (r, K)
    noise_scale,  # (N,), or None as seed where nothing is drawn
    seed,
    grad_x,  # (M, K), or with CUT.split float32 partial sums (splits, M, K); contiguous
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
    stride_ym,
    stride_yn,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_scale,
    PACKED: tl.constexpr,  # packed.Packed, or None
    DRAW: tl.constexpr,  # tile.Drawn
    CUT: tl.constexpr,  # tile.Cut
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
        expert, first_m, last_m, first_k, wrong = place_among(mixture, M, K, BLOCK_K, CUT)
        if first_m >= M:
            return
        group = 0
        stream_id += expert
        expert = expert.to(tl.int64)
        weight += expert * (mixture.stride_weight // MULTIPLE * MULTIPLE)
        if BLOCK_R > 0:
            lora_A += expert * mixture.stride_A
        if DRAW.noise != "none":
            noise_scale += expert * mixture.stride_scale
    else:
        group, first_m, last_m, first_k = place(M, rows_per_sample, K, BLOCK_K, CUT)
    split = tl.program_id(1)
    # So that the compiler knows, and loads and masks eight elements at a time.
    N = N // MULTIPLE * MULTIPLE
    K = K // MULTIPLE * MULTIPLE
    stride_ym = stride_ym // MULTIPLE * MULTIPLE
    stride_wn = stride_wn // MULTIPLE * MULTIPLE

    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_k = first_k + tl.arange(0, BLOCK_K)
    # Beyond the edge the last row or column is read again; it is not stored.
    m = tl.minimum(offs_m, last_m - 1).to(tl.int64)
    k = tl.minimum(offs_k, K - 1).to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if BLOCK_R > 0:
        if split == 0:
            for r in tl.range(0, rank, BLOCK_R, num_stages=1):
                offs_r = r + tl.arange(0, BLOCK_R)
                v_r = tl.load(v + m[:, None] * rank + offs_r[None, :], mask=offs_r[None, :] < rank, other=0)
                A_r = tl.load(
                    lora_A + offs_r[:, None].to(tl.int64) * stride_ar + k[None, :] * stride_ak,
                    mask=offs_r[:, None] < rank,
                    other=0,
                )
                acc = dot(v_r, round_to(A_r.to(tl.float32), DTYPE), acc, PRECISION)
            if CUT.experts:
                acc *= scaling

    begin = split * steps_per_split * BLOCK_N
    end = tl.minimum(begin + steps_per_split * BLOCK_N, N)
    y_cols = tl.arange(0, BLOCK_N)[None, :]
    y_tile = grad_y
    if not CUT.by_engine:
        y_tile = grad_y + m[:, None] * stride_ym + y_cols.to(tl.int64) * stride_yn

    w_rows = weight_rows(BLOCK_N, DRAW)
    first_col = tl.cast(first_k, tl.int64) + col_offset
    w_tile, table = None, None
    if PACKED is None:
        w_cols = first_k + weight_cols(BLOCK_N, BLOCK_K, DRAW)
        w_tile = weight + w_rows.to(tl.int64) * stride_wn + w_cols.to(tl.int64) * stride_wk
    else:
        w_cols = weight_blocks(BLOCK_N, BLOCK_K, DRAW)
        table = lookup(packed, PACKED, ARITHMETIC)
    scale_tile = None
    if DRAW.noise != "none":
        scale_tile = noise_scale + w_rows.to(tl.int64) * stride_scale
        seed = tl.load(seed)
    sample, negate = sample_of(group, sample_offset, DRAW)
    row_offset = tl.cast(row_offset, tl.int64)

    # As in the forward kernel; but behind the wait for dY the compiler would put off the loads until after the product.
    AHEAD: tl.constexpr = CUT.carry and loads_ahead()
    if CUT.carry:
        w, scale = _load_tile(
            w_tile, packed, scale_tile, begin, w_rows, first_k, w_cols, stride_wn, stride_scale, N, K,
            PACKED, DRAW, CUT,
        )  # fmt: skip
        w, rest = perturb_tile(
            weight_of(scales_of(w, packed, PACKED), table, PACKED, DRAW), scale, row_offset + begin + w_rows,
            row_offset + begin, first_col, stream_id, sample, negate, seed, DTYPE, DRAW,
        )  # fmt: skip
    if AHEAD:
        this_n = step_at(begin + BLOCK_N, end, BLOCK_N)
        this_w, scale = _load_tile(
            w_tile, packed, scale_tile, this_n, w_rows, first_k, w_cols, stride_wn, stride_scale, N, K,
            PACKED, DRAW, CUT,
        )  # fmt: skip
    for n in tl.range(begin, end, BLOCK_N):
        if AHEAD:
            next_n = step_at(n + 2 * BLOCK_N, end, BLOCK_N)
            next_w, next_scale = _load_tile(
                w_tile, packed, scale_tile, next_n, w_rows, first_k, w_cols, stride_wn, stride_scale, N, K,
                PACKED, DRAW, CUT,
            )  # fmt: skip
        else:
            this_n = step_at(n + BLOCK_N, end, BLOCK_N) if CUT.carry else n
            this_w, scale = _load_tile(
                w_tile, packed, scale_tile, this_n, w_rows, first_k, w_cols, stride_wn, stride_scale, N, K,
                PACKED, DRAW, CUT,
            )  # fmt: skip
        ready = scales_of(this_w, packed, PACKED)
        y_n = load_step(grad_y, y_tile, n, first_m, y_cols, N, stride_yn, CUT)
        if CUT.carry:
            acc = dot(y_n, in_order(w, DRAW), acc, PRECISION)
            if DRAW.apart:
                acc = dot(y_n, in_order(rest, DRAW), acc, PRECISION)
        w, rest = perturb_tile(
            weight_of(ready, table, PACKED, DRAW), scale, row_offset + this_n + w_rows, row_offset + this_n, first_col,
            stream_id, sample, negate, seed, DTYPE, DRAW,
        )  # fmt: skip
        if AHEAD:
            this_n, this_w, scale = next_n, next_w, next_scale
        if not CUT.carry:
            acc = dot(y_n, in_order(w, DRAW), acc, PRECISION)
            if DRAW.apart:
                acc = dot(y_n, in_order(rest, DRAW), acc, PRECISION)

    if CUT.experts:
        acc += wrong
    grad_x += (tl.cast(split, tl.int64) * M + offs_m[:, None]) * K + offs_k[None, :]
    inside = (offs_m[:, None] < last_m) & (offs_k[None, :] < K)
    if CUT.split:
        tl.store(grad_x, acc, mask=inside)
    else:
        tl.store(grad_x, round_to(acc, DTYPE), mask=inside)
