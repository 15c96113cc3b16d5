"""v = scaling dY lora_B and dB = scaling dY^T u, dY read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import INTERPRETED, Kernel, by_eight, facts, machine_of, prepared, rank_block
from .split import add_splits
from .tile import dot, round_to


@triton.jit(do_not_specialize=["M", "steps_per_part", "scaling"])
def _adapter_grads_kernel(
    grad_y,  # (M, N)
    u,  # (M, r), contiguous
    lora_B,  # (N, r)
    v,  # float32 parts (tiles of columns, M, r)
    grad_B,  # float32 parts (parts of the rows, N, r)
    scaling: tl.float32,
    M,
    N,
    rank,
    steps_per_part,
    stride_ym,
    stride_bn,
    stride_br,
    MULTIPLE: tl.constexpr,  # as in the forward kernel
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program has a tile of columns and a part of the rows: of v all its rows, of dB all its columns."""
    pid_n = tl.program_id(0)
    part = tl.program_id(1)
    N = N // MULTIPLE * MULTIPLE
    stride_ym = stride_ym // MULTIPLE * MULTIPLE
    DTYPE: tl.constexpr = grad_y.dtype.element_ty
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    inside_n = offs_n < N
    B = lora_B + offs_n[:, None].to(tl.int64) * stride_bn + offs_r.to(tl.int64) * stride_br
    B = tl.load(B, mask=inside_n[:, None] & (offs_r < rank), other=0)
    B = round_to(B.to(tl.float32), DTYPE)
    y_tile = grad_y + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]
    u_tile = u + offs_m[:, None].to(tl.int64) * rank + offs_r
    v_tile = v + tl.cast(pid_n, tl.int64) * M * rank + offs_m[:, None].to(tl.int64) * rank + offs_r
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    begin = part * steps_per_part * BLOCK_M
    end = tl.minimum(begin + steps_per_part * BLOCK_M, M)
    for m in tl.range(begin, end, BLOCK_M):
        first = tl.cast(m, tl.int64)
        inside_m = offs_m[:, None] < M - m
        y = tl.load(y_tile + first * stride_ym, mask=inside_m & inside_n[None, :], other=0)
        inside_r = inside_m & (offs_r < rank)
        u_m = tl.load(u_tile + first * rank, mask=inside_r, other=0)
        acc = dot(y.T, u_m, acc, "ieee")
        v_m = dot(y, B, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), "ieee")
        tl.store(v_tile + first * rank, v_m * scaling, mask=inside_r)
    grad_B += (tl.cast(part, tl.int64) * N + offs_n[:, None]) * rank + offs_r
    tl.store(grad_B, acc * scaling, mask=inside_n[:, None] & (offs_r < rank))


def _parts(M: int, N: int, processors: int) -> tuple[int, int]:
    """Into how many parts the rows are cut, two programs for a processor, and the steps in each."""
    steps = triton.cdiv(M, configs.ADAPTER_GRADS.block_k)
    tiles = triton.cdiv(N, configs.ADAPTER_GRADS.block_n)
    steps_per_part = triton.cdiv(steps, max(1, min(2 * processors // tiles, configs.ADAPTER_GRADS_PARTS)))
    return triton.cdiv(steps, steps_per_part), steps_per_part


def pays(M: int, N: int, rank: int) -> bool:
    """Whether one pass over a dY of 16 bits is predicted to be faster than the vendor's two products.

    Those read dY twice, which costs little while the L2 of a GPU holds it; this writes and reads parts that are summed,
    r / 128 of dY's bytes, and they must fit into the workspace.
    """
    if not 0 < rank <= 32 or 2 * M * N < max(1, configs.ADAPTER_GRADS_BYTES):
        return False
    tiles = triton.cdiv(N, configs.ADAPTER_GRADS.block_n)
    parts = 4 * rank * (M * tiles + N * _parts(M, N, 160)[0])  # of no GPU more
    return parts <= configs.ADAPTER_GRADS_WORKSPACE


def takes(grad_y: Tensor, u: Tensor) -> bool:
    """Whether `adapter_grads` can read these, on a GPU whose tensor cores take dY for both products from the same
    shared memory: elsewhere Triton loads it into registers, and nothing runs beside the loads."""
    able = INTERPRETED or machine_of(grad_y).has_descriptors
    return able and grad_y.element_size() == 2 and by_eight(grad_y) and u.is_contiguous()


def _prepare(grad_y: Tensor, u: Tensor, lora_B: Tensor) -> tuple[int, int, Kernel]:
    """The tiles of columns, the parts of the rows, and what makes v and dB of them."""
    (M, N), rank = grad_y.shape, u.shape[1]
    config = configs.ADAPTER_GRADS
    tiles = triton.cdiv(N, config.block_n)
    parts, steps_per_part = _parts(M, N, machine_of(grad_y).processors)
    rest = {
        "M": M,
        "N": N,
        "rank": rank,
        "steps_per_part": steps_per_part,
        "stride_ym": grad_y.stride(0),
        "stride_bn": lora_B.stride(0),
        "stride_br": lora_B.stride(1),
        "MULTIPLE": 8,
        "BLOCK_R": rank_block(rank),
        "BLOCK_M": config.block_k,
        "BLOCK_N": config.block_n,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return tiles, parts, Kernel(_adapter_grads_kernel, (tiles, parts), grad_y, rest, options)


def adapter_grads(grad_y: Tensor, u: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """v = scaling dY lora_B, (M, r), and dB = scaling dY^T u, (N, r), of dY's type; see `takes`.

    grad_y: (M, N), of 16 bits; u: (M, r), contiguous, of dY's type; lora_B: (N, r); r <= 32.
    """
    (M, N), rank = grad_y.shape, u.shape[1]
    tiles, parts, kernel = prepared(_prepare, facts(grad_y, u, lora_B), grad_y, u, lora_B)
    v_parts = grad_y.new_empty((tiles, M, rank), dtype=torch.float32)
    B_parts = grad_y.new_empty((parts, N, rank), dtype=torch.float32)
    kernel(grad_y, u, lora_B, v_parts, B_parts, scaling)
    v, grad_B = grad_y.new_empty((M, rank)), grad_y.new_empty((N, rank))
    add_splits(v_parts, None, v, B_parts, grad_B)
    return v, grad_B
