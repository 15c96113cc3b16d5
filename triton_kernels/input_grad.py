"""dX = dY (W + eps) + v lora_A, with the eps of the forward pass drawn again in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import (
    CHANGING,
    Kernel,
    Plan,
    descriptor,
    draw_constants,
    draw_facts,
    facts,
    plan,
    precision_of,
    prepared,
    rank_block,
)
from .split import add_splits
from .tile import dot, in_order, loads_ahead, perturb_tile, round_to, sample_of, step_at, tile_of, weight_rows


@triton.jit
def _load_tile(weight, noise_scale, n, rows, cols, stride_wn, stride_scale, N, K, EVEN: tl.constexpr):
    """Rows n + `rows` of the weight, and their noise_scale; zeros beyond its edges."""
    weight += tl.cast(n, tl.int64) * stride_wn
    noise_scale += tl.cast(n, tl.int64) * stride_scale
    if EVEN:
        return tl.load(weight), tl.load(noise_scale)
    else:
        inside = rows < N - n
        return tl.load(weight, mask=inside & (cols < K), other=0), tl.load(noise_scale, mask=inside, other=0)


@triton.jit(
    do_not_specialize=[*CHANGING, "M", "rows_per_sample", "steps_per_split"],
    do_not_specialize_on_alignment=["seed"],
)
def _linear_input_grad_kernel(
    grad_y,  # (M, N), or its descriptor
    weight,  # (N, K)
    v,  # (M, r), contiguous; scaling dY lora_B
    lora_A,  # (r, K)
    noise_scale,  # (N,)
    seed,
    grad_x,  # (M, K), or with SPLIT float32 partial sums (splits, M, K); contiguous
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
    NOISE: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_N divides N, BLOCK_K divides K
    MULTIPLE: tl.constexpr,  # 8 where that divides N, K and the strides of rows, else 1
    BLOCK_R: tl.constexpr,  # 0 = no adapter
    SPLIT: tl.constexpr,
    APART: tl.constexpr,  # noise_accum = "split"
    CARRY: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_per_sample = tl.cdiv(rows_per_sample, BLOCK_M)
    num_m = M // rows_per_sample * tiles_per_sample
    pid_m, pid_k = tile_of(tl.program_id(0), num_m, tl.cdiv(K, BLOCK_K), GROUP_M)
    split = tl.program_id(1)
    group = pid_m // tiles_per_sample
    first_m = group * rows_per_sample + pid_m % tiles_per_sample * BLOCK_M
    last_m = (group + 1) * rows_per_sample  # a tile sees the noise of one sample
    first_k = pid_k * BLOCK_K
    DTYPE: tl.constexpr = weight.dtype.element_ty
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

    begin = split * steps_per_split * BLOCK_N
    end = tl.minimum(begin + steps_per_split * BLOCK_N, N)
    if not USE_DESCRIPTOR:
        offs_yn = tl.arange(0, BLOCK_N)
        y_tile = grad_y + m[:, None] * stride_ym + offs_yn[None, :].to(tl.int64) * stride_yn

    w_rows = weight_rows(BLOCK_N, NOISE)
    w_cols = first_k + tl.arange(0, BLOCK_K)[None, :]
    first_col = tl.cast(first_k, tl.int64) + col_offset
    w_tile = weight + w_rows.to(tl.int64) * stride_wn + w_cols.to(tl.int64) * stride_wk
    scale_tile = noise_scale + w_rows.to(tl.int64) * stride_scale
    sample, negate = sample_of(group, sample_offset, ANTITHETIC)
    seed = tl.load(seed)
    row_offset = tl.cast(row_offset, tl.int64)

    # As in the forward kernel; but behind the wait for dY the compiler would put off the loads until after the product.
    AHEAD: tl.constexpr = CARRY and loads_ahead()
    if CARRY:
        w, scale = _load_tile(w_tile, scale_tile, begin, w_rows, w_cols, stride_wn, stride_scale, N, K, EVEN)
        w, rest = perturb_tile(
            w, scale, row_offset + begin + w_rows, row_offset + begin, first_col, stream_id, sample, negate, seed,
            NOISE, ANTITHETIC, ALIGNED, ARITHMETIC, APART,
        )  # fmt: skip
    if AHEAD:
        this_n = step_at(begin + BLOCK_N, end, BLOCK_N)
        this_w, scale = _load_tile(
            w_tile, scale_tile, this_n, w_rows, w_cols, stride_wn, stride_scale, N, K, EVEN
        )
    for n in tl.range(begin, end, BLOCK_N):
        if AHEAD:
            next_n = step_at(n + 2 * BLOCK_N, end, BLOCK_N)
            next_w, next_scale = _load_tile(
                w_tile, scale_tile, next_n, w_rows, w_cols, stride_wn, stride_scale, N, K, EVEN
            )
        else:
            this_n = step_at(n + BLOCK_N, end, BLOCK_N) if CARRY else n
            this_w, scale = _load_tile(
                w_tile, scale_tile, this_n, w_rows, w_cols, stride_wn, stride_scale, N, K, EVEN
            )
        if USE_DESCRIPTOR:
            y_n = grad_y.load([first_m, n])
        elif EVEN:
            y_n = tl.load(y_tile + tl.cast(n, tl.int64) * stride_yn)
        else:
            y_n = tl.load(y_tile + tl.cast(n, tl.int64) * stride_yn, mask=offs_yn[None, :] < N - n, other=0)
        if CARRY:
            acc = dot(y_n, in_order(w, NOISE), acc, PRECISION)
            if APART:
                acc = dot(y_n, in_order(rest, NOISE), acc, PRECISION)
        w, rest = perturb_tile(
            this_w, scale, row_offset + this_n + w_rows, row_offset + this_n, first_col, stream_id, sample, negate,
            seed, NOISE, ANTITHETIC, ALIGNED, ARITHMETIC, APART,
        )  # fmt: skip
        if AHEAD:
            this_n, this_w, scale = next_n, next_w, next_scale
        if not CARRY:
            acc = dot(y_n, in_order(w, NOISE), acc, PRECISION)
            if APART:
                acc = dot(y_n, in_order(rest, NOISE), acc, PRECISION)

    grad_x += (tl.cast(split, tl.int64) * M + offs_m[:, None]) * K + offs_k[None, :]
    inside = (offs_m[:, None] < last_m) & (offs_k[None, :] < K)
    if SPLIT:
        tl.store(grad_x, acc, mask=inside)
    else:
        tl.store(grad_x, round_to(acc, DTYPE), mask=inside)


def _prepare(
    grad_y: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    rank: int,
    draw: Any,
    noise_accum: str,
    workspace: int,
    precision: str,
) -> tuple[Plan, Kernel]:
    (M, N), K = grad_y.shape, weight.shape[1]
    p = plan("input_grad", grad_y, weight, K, draw.samples, noise_accum, workspace, precision)
    rest = {
        "M": M,
        "N": N,
        "K": K,
        "rank": rank,
        "rows_per_sample": p.rows_per_sample,
        "steps_per_split": p.steps_per_split,
        "stride_ym": grad_y.stride(0),
        "stride_yn": grad_y.stride(1),
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        "stride_ar": 0 if lora_A is None else lora_A.stride(0),
        "stride_ak": 0 if lora_A is None else lora_A.stride(1),
        "stride_scale": draw.noise_scale.stride(0),
        **draw_constants(draw, p.machine),
        "PRECISION": precision,
        "USE_DESCRIPTOR": p.box is not None,
        "EVEN": N % p.config.block_in == 0 and K % p.config.block_out == 0,
        "MULTIPLE": 8 if p.regular else 1,
        "BLOCK_R": rank_block(rank),
        "SPLIT": p.splits > 1,
        "APART": noise_accum == "split",
        "CARRY": p.config.carry,
        "GROUP_M": configs.GROUP_M,
        "BLOCK_M": p.config.block_m,
        "BLOCK_N": p.config.block_in,
        "BLOCK_K": p.config.block_out,
    }
    options = {"num_warps": p.config.num_warps, "num_stages": p.config.num_stages}
    return p, Kernel(_linear_input_grad_kernel, (p.tiles, p.splits), grad_y, rest, options)


def linear_input_grad(
    grad_y: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    v: Tensor | None,
    draw: Any,
    noise_accum: str,
    workspace: int,
) -> Tensor:
    """dX = dY (W + eps) + v lora_A, (M, K); M, N, K > 0.

    grad_y: (M, N); weight: (N, K); lora_A: (r, K) and v: (M, r) contiguous, or None.
    draw, noise_accum: the forward's. workspace: bytes of scratch memory allowed.
    """
    M, K = grad_y.shape[0], weight.shape[1]
    precision = precision_of(grad_y)
    key = (
        *facts(grad_y, weight, v, lora_A, draw.noise_scale), *draw_facts(draw), draw.samples, noise_accum, workspace,
        precision,
    )  # fmt: skip
    rank = 0 if v is None else v.shape[1]
    p, kernel = prepared(_prepare, key, grad_y, weight, lora_A, rank, draw, noise_accum, workspace, precision)
    grad_x = grad_y.new_empty((M, K))
    partial = grad_x if p.splits == 1 else grad_y.new_empty((p.splits, M, K), dtype=torch.float32)
    kernel(
        grad_y if p.box is None else descriptor(grad_y, p.box), weight, v, lora_A, draw.noise_scale, draw.seed, partial,
        draw.stream, draw.sample_offset, draw.row_offset, draw.col_offset,
    )  # fmt: skip
    if p.splits > 1:
        add_splits(partial, None, grad_x)
    return grad_x
