"""out = W + eps, or eps, in one pass."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import draw_arguments, launch, machine_of
from .tile import perturb_tile, sample_of, weight_rows


@triton.jit(do_not_specialize=["stream_id", "sample", "row_offset", "col_offset"])
def _perturb_kernel(
    weight,  # (N, K), or None
    noise_scale,  # (N,)
    seed,
    out,  # (N, K)
    N,
    K,
    stride_wn,
    stride_wk,
    stride_scale,
    stride_on,
    stride_ok,
    stream_id,
    sample,
    row_offset,
    col_offset,
    HAS_WEIGHT: tl.constexpr,
    NOISE: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_k = tl.cdiv(K, BLOCK_K)
    first_n = tl.program_id(0) // num_k * BLOCK_N
    first_k = tl.program_id(0) % num_k * BLOCK_K
    DTYPE: tl.constexpr = out.dtype.element_ty
    rows = first_n + weight_rows(BLOCK_N, NOISE)
    cols = first_k + tl.arange(0, BLOCK_K)[None, :]
    n = tl.minimum(rows, N - 1).to(tl.int64)
    if HAS_WEIGHT:
        w_tile = weight + n * stride_wn + cols.to(tl.int64) * stride_wk
        if EVEN:
            w = tl.load(w_tile)
        else:
            w = tl.load(w_tile, mask=cols < K, other=0)
    else:
        w = tl.zeros((BLOCK_N, BLOCK_K), DTYPE)
    scale = tl.load(noise_scale + n * stride_scale)
    sample, negate = sample_of(sample, 0, ANTITHETIC)
    row_offset = tl.cast(row_offset, tl.int64)
    w = perturb_tile(
        w, scale, row_offset + rows, row_offset + first_n, tl.cast(col_offset, tl.int64) + first_k, stream_id, sample,
        negate, tl.load(seed), NOISE, ANTITHETIC, ALIGNED, ARITHMETIC,
    )  # fmt: skip
    rows = first_n + tl.arange(0, BLOCK_N)[:, None]
    inside = rows < N
    if not EVEN:
        inside = inside & (cols < K)
    tl.store(out + rows.to(tl.int64) * stride_on + cols.to(tl.int64) * stride_ok, w, mask=inside)


def perturb(weight: Tensor | None, draw: Any, out: Tensor) -> None:
    """out = weight + eps, or eps where `weight` is None; both (N, K), N, K > 0, of one type."""
    N, K = out.shape
    machine = machine_of(out)
    config = configs.PERTURB_INTERPRETER if machine.architecture == "interpreter" else configs.PERTURB
    arguments = {
        "weight": weight,
        "out": out,
        "N": N,
        "K": K,
        "stride_wn": 0 if weight is None else weight.stride(0),
        "stride_wk": 0 if weight is None else weight.stride(1),
        "stride_on": out.stride(0),
        "stride_ok": out.stride(1),
        "sample": draw.sample_offset,
        **draw_arguments(draw, machine),
        "HAS_WEIGHT": weight is not None,
        "EVEN": K % config.block_k == 0,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (triton.cdiv(N, config.block_n) * triton.cdiv(K, config.block_k),)
    launch(_perturb_kernel, grid, out.device, arguments, options)
