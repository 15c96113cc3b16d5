"""y = x (W + eps)^T + scaling u lora_B^T + bias, with eps drawn in registers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import (
    CHANGING,
    INTERPRETED,
    Kernel,
    Plan,
    by_eight,
    descriptor,
    draw_constants,
    draw_facts,
    facts,
    machine_of,
    plan,
    precision_of,
    prepared,
    rank_block,
)
from .split import add_splits
from .tile import dot, in_order, loads_ahead, perturb_tile, round_to, sample_of, step_at, tile_of, weight_rows


@triton.jit
def _load_weight(tile, k, cols, stride_wk, K, EVEN: tl.constexpr):
    """Columns k + `cols` of the weight; zeros beyond its edge."""
    tile += tl.cast(k, tl.int64) * stride_wk
    if EVEN:
        return tl.load(tile)
    else:
        return tl.load(tile, mask=cols < K - k, other=0)


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
    weight,  # (N, K)
    u,  # (M, r), contiguous; with MAKES_U written, and with SPLIT float32 parts of it (splits, M, r)
    lora_A,  # (r, K), with MAKES_U
    lora_B,  # (N, r)
    bias,  # (N,)
    noise_scale,  # (N,)
    seed,
    y,  # (M, N), or with SPLIT float32 partial sums (splits, M, N); contiguous
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
    NOISE: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PRECISION: tl.constexpr,
    USE_DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides K
    MULTIPLE: tl.constexpr,  # 8 where that divides N, K and the strides of rows, else 1
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,  # 0 = no adapter
    MAKES_U: tl.constexpr,  # u = x lora_A^T is a result; rank <= BLOCK_R
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
    pid_m, pid_n = tile_of(tl.program_id(0), num_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    split = tl.program_id(1)
    group = pid_m // tiles_per_sample
    first_m = group * rows_per_sample + pid_m % tiles_per_sample * BLOCK_M
    last_m = (group + 1) * rows_per_sample  # a tile sees the noise of one sample
    first_n = pid_n * BLOCK_N
    DTYPE: tl.constexpr = weight.dtype.element_ty
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
    if not USE_DESCRIPTOR:
        offs_xk = tl.arange(0, BLOCK_K)
        x_tile = x + m[:, None] * stride_xm + offs_xk[None, :].to(tl.int64) * stride_xk

    if MAKES_U:
        # The part of u for this part of the contraction; all tiles of columns make it, the first one writes it.
        offs_r = tl.arange(0, BLOCK_R)
        offs_ak = tl.arange(0, BLOCK_K)
        A_tile = lora_A + offs_r[:, None].to(tl.int64) * stride_ar + offs_ak[None, :].to(tl.int64) * stride_ak
        u_acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)

    w_rows = tl.minimum(first_n + weight_rows(BLOCK_N, NOISE), N - 1)
    w_cols = tl.arange(0, BLOCK_K)[None, :]
    w_tile = weight + w_cols.to(tl.int64) * stride_wk + w_rows.to(tl.int64) * stride_wn
    scale = tl.load(noise_scale + w_rows.to(tl.int64) * stride_scale)
    rows = w_rows.to(tl.uint32) + row_offset.to(tl.uint32)
    first_row = tl.cast(first_n, tl.int64) + row_offset
    col_offset = tl.cast(col_offset, tl.int64)
    sample, negate = sample_of(group, sample_offset, ANTITHETIC)
    seed = tl.load(seed)

    # Few rows: loads of the weight are what takes time, and the compiler keeps several under way.
    # Many: the noise of one tile is drawn while the tensor cores multiply by the one before. With AHEAD its weight was
    # loaded a step before that, or they would wait for it.
    AHEAD: tl.constexpr = CARRY and loads_ahead()
    if CARRY:
        w = _load_weight(w_tile, begin, w_cols, stride_wk, K, EVEN)
        w, rest = perturb_tile(
            w, scale, rows, first_row, begin + col_offset, stream_id, sample, negate, seed,
            NOISE, ANTITHETIC, ALIGNED, ARITHMETIC, APART,
        )  # fmt: skip
    if AHEAD:
        this_k = step_at(begin + BLOCK_K, end, BLOCK_K)
        this_w = _load_weight(w_tile, this_k, w_cols, stride_wk, K, EVEN)
    for k in tl.range(begin, end, BLOCK_K):
        if not AHEAD:
            this_k = step_at(k + BLOCK_K, end, BLOCK_K) if CARRY else k
            this_w = _load_weight(w_tile, this_k, w_cols, stride_wk, K, EVEN)
        if USE_DESCRIPTOR:
            x_k = x.load([first_m, k])
        elif EVEN:
            x_k = tl.load(x_tile + tl.cast(k, tl.int64) * stride_xk)
        else:
            x_k = tl.load(x_tile + tl.cast(k, tl.int64) * stride_xk, mask=offs_xk[None, :] < K - k, other=0)
        if AHEAD:
            # Behind the wait for x: before it, the compiler begins to use this weight ahead of the product.
            next_k = step_at(k + 2 * BLOCK_K, end, BLOCK_K)
            next_w = _load_weight(w_tile, next_k, w_cols, stride_wk, K, EVEN)
        if MAKES_U:
            inside_A = offs_r[:, None] < rank
            if not EVEN:
                inside_A = inside_A & (offs_ak[None, :] < K - k)
            A_k = tl.load(A_tile + tl.cast(k, tl.int64) * stride_ak, mask=inside_A, other=0)
            u_acc = dot(x_k, round_to(A_k.to(tl.float32), DTYPE).T, u_acc, PRECISION)
        if CARRY:
            acc = dot(x_k, in_order(w, NOISE).T, acc, PRECISION)
            if APART:
                acc = dot(x_k, in_order(rest, NOISE).T, acc, PRECISION)
        w, rest = perturb_tile(
            this_w, scale, rows, first_row, this_k + col_offset, stream_id, sample, negate, seed,
            NOISE, ANTITHETIC, ALIGNED, ARITHMETIC, APART,
        )  # fmt: skip
        if AHEAD:
            this_k, this_w = next_k, next_w
        if not CARRY:
            acc = dot(x_k, in_order(w, NOISE).T, acc, PRECISION)
            if APART:
                acc = dot(x_k, in_order(rest, NOISE).T, acc, PRECISION)

    if MAKES_U:
        u_acc = tl.where(
            offs_r[None, :] < rank, u_acc, 0
        )  # infinite x times the zeros beyond the rank is NaN
        B = _load_B(lora_B, n, 0, rank, stride_bn, stride_br, DTYPE, BLOCK_R)
        acc = dot(u_acc * scaling, B.to(tl.float32), acc, "ieee")
        if pid_n == 0:
            u_tile = u + (tl.cast(split, tl.int64) * M + offs_m[:, None]) * rank + offs_r[None, :]
            inside_u = (offs_m[:, None] < last_m) & (offs_r[None, :] < rank)
            if SPLIT:
                tl.store(u_tile, u_acc, mask=inside_u)
            else:
                tl.store(u_tile, round_to(u_acc, DTYPE), mask=inside_u)

    inside = (offs_m[:, None] < last_m) & (offs_n[None, :] < N)
    y += (tl.cast(split, tl.int64) * M + offs_m[:, None]) * N + offs_n[None, :]
    if SPLIT:
        tl.store(y, acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n * stride_bias).to(tl.float32)[None, :]
        tl.store(y, round_to(acc, DTYPE), mask=inside)


def makes_u(x: Tensor, weight: Tensor, rank: int, samples: int) -> bool:
    """Whether `linear_forward` had better make u itself: so few rows that a launch saved is more than A read again."""
    few = 0 < x.shape[0] <= configs.U_ROWS * samples and 0 < weight.numel() <= configs.U_WEIGHT
    if not (few and 0 < rank <= configs.U_RANK):
        return False
    regular = INTERPRETED or (x.element_size() == 2 and by_eight(x) and by_eight(weight))
    return regular and machine_of(x).arithmetic != "amdgcn"  # whose scalar registers it would spill


def _prepare(
    p: Any, lora_A: Tensor | None, draw: Any, noise_accum: str, workspace: int, precision: str
) -> tuple[Plan, Kernel]:
    x, weight, lora_B, bias = p.a, p.weight, p.lora, p.bias
    (M, K), N = x.shape, p.outputs
    rank = 0 if lora_B is None else lora_B.shape[1]
    cut = plan(p, draw.samples, noise_accum, workspace, precision)
    rest = {
        "M": M,
        "N": N,
        "K": K,
        "rank": rank,
        "rows_per_sample": cut.rows_per_sample,
        "steps_per_split": cut.steps_per_split,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        "stride_ar": 0 if lora_A is None else lora_A.stride(0),
        "stride_ak": 0 if lora_A is None else lora_A.stride(1),
        "stride_bn": 0 if lora_B is None else lora_B.stride(0),
        "stride_br": 0 if lora_B is None else lora_B.stride(1),
        "stride_bias": 0 if bias is None else bias.stride(0),
        "stride_scale": draw.noise_scale.stride(0),
        **draw_constants(draw, cut.machine),
        "PRECISION": precision,
        "USE_DESCRIPTOR": cut.box is not None,
        "EVEN": K % cut.config.block_in == 0,
        "MULTIPLE": 8 if cut.regular else 1,
        "HAS_BIAS": bias is not None,
        "BLOCK_R": rank_block(rank),
        "MAKES_U": lora_A is not None,
        "SPLIT": cut.splits > 1,
        "APART": noise_accum == "split",
        "CARRY": cut.config.carry,
        "GROUP_M": configs.GROUP_M,
        "BLOCK_M": cut.config.block_m,
        "BLOCK_N": cut.config.block_out,
        "BLOCK_K": cut.config.block_in,
    }
    options = {"num_warps": cut.config.num_warps, "num_stages": cut.config.num_stages}
    return cut, Kernel(_linear_forward_kernel, (cut.tiles, cut.splits), x, rest, options)


def linear_forward(
    p: Any, draw: Any, noise_accum: str, workspace: int, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """y, (M, N), of a product that is not empty, and u.

    Args:
        p: `flatlora_kernels.spec.records.Product`. lora_A: (r, K), r <= 32, in place of its u, which is then made in
            the kernel's own pass over x; see `makes_u`. draw: `flatlora_kernels.spec.records.Draw`.
        noise_accum: "folded" or "split". workspace: bytes of scratch memory allowed.
    """
    x, weight, _, u, lora_B, bias, scaling = p
    (M, _), N = x.shape, p.outputs
    precision = precision_of(x)
    key = (
        *facts(x, weight, u, lora_A, lora_B, bias, draw.noise_scale), *draw_facts(draw), draw.samples, noise_accum,
        workspace, precision,
    )  # fmt: skip
    cut, kernel = prepared(_prepare, key, p, lora_A, draw, noise_accum, workspace, precision)
    y = x.new_empty((M, N))
    partial = y if cut.splits == 1 else x.new_empty((cut.splits, M, N), dtype=torch.float32)
    u_partial = u
    if lora_A is not None:
        rank = lora_A.shape[0]
        u = x.new_empty((M, rank))
        u_partial = u if cut.splits == 1 else x.new_empty((cut.splits, M, rank), dtype=torch.float32)
    kernel(
        x if cut.box is None else descriptor(x, cut.box), weight, u_partial, lora_A, lora_B, bias, draw.noise_scale,
        draw.seed, partial, scaling, draw.stream, draw.sample_offset, draw.row_offset, draw.col_offset,
    )  # fmt: skip
    if cut.splits > 1:
        add_splits(partial, bias, y, *(() if lora_A is None else (u_partial, u)))
    return y, u
