"""out = W + eps, eps, or a packed W, in one pass."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..core.quantized import QuantizedWeight
from . import configs
from .launch import CHANGING, Kernel, by_eight, draw_facts, drawn, facts, machine_of, prepared
from .packed import decoded, load_blocks, lookup, operand, packed_facts, scales_of, values_at
from .tile import held, perturb_tile, round_to, sample_of, weight_blocks, weight_cols, weight_rows


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=["seed"])
def _perturb_kernel(
    weight,  # (N, K), or None
    packed,  # packed.Operand, or None
    noise_scale,  # (N,)
    seed,
    out,  # (N, K)
    stream_id: tl.int64,
    sample_offset: tl.int64,
    row_offset: tl.int64,
    col_offset: tl.int64,
    N,
    K,
    stride_wn,
    stride_wk,
    stride_scale,
    stride_on,
    stride_ok,
    HAS_WEIGHT: tl.constexpr,
    PACKED: tl.constexpr,  # packed.Packed, or None
    DRAW: tl.constexpr,
    EVEN: tl.constexpr,  # TOGETHER * BLOCK_K divides K
    MULTIPLE: tl.constexpr,  # as in the forward kernel
    STEPS: tl.constexpr,  # tiles of columns that a program goes through
    TOGETHER: tl.constexpr,  # of which one round of its loop has so many
    STAGES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K = K // MULTIPLE * MULTIPLE
    stride_wn = stride_wn // MULTIPLE * MULTIPLE
    stride_on = stride_on // MULTIPLE * MULTIPLE
    num_k = tl.cdiv(K, STEPS * BLOCK_K)
    first_n = tl.program_id(0) // num_k * BLOCK_N
    begin = tl.program_id(0) % num_k * STEPS * BLOCK_K
    DTYPE: tl.constexpr = out.dtype.element_ty
    rows = first_n + weight_rows(BLOCK_N, DRAW)
    cols = weight_cols(BLOCK_N, BLOCK_K, DRAW)
    n32 = tl.minimum(rows, N - 1)
    n = n32.to(tl.int64)
    ARITHMETIC: tl.constexpr = DRAW.arithmetic
    PAIRED: tl.constexpr = DRAW.paired
    scale = None
    if DRAW.noise != "none":
        scale = tl.load(noise_scale + n * stride_scale)
        seed = tl.load(seed)
    if PACKED is not None and PACKED.by_blocks:
        blocks = weight_blocks(BLOCK_N, BLOCK_K, DRAW)
        table = lookup(packed, PACKED, ARITHMETIC)
    sample, negate = sample_of(sample_offset, 0, DRAW)
    row_offset = tl.cast(row_offset, tl.int64)
    first_col = tl.cast(col_offset, tl.int64)
    w_tile = weight
    if HAS_WEIGHT:
        w_tile = weight + cols.to(tl.int64) * stride_wk + n * stride_wn
    out_tile = out + cols.to(tl.int64) * stride_ok + rows.to(tl.int64) * stride_on
    inside = rows < N
    for first_k in tl.range(
        begin, tl.minimum(begin + STEPS * BLOCK_K, K), TOGETHER * BLOCK_K, num_stages=STAGES
    ):
        for part in tl.static_range(TOGETHER):
            k = first_k + part * BLOCK_K
            k_long = tl.cast(k, tl.int64)
            if PACKED is not None:
                if PACKED.by_blocks:
                    loaded = load_blocks(packed, 0, n32, k, blocks, N, K, not EVEN, PACKED)
                    word, block_scale = scales_of(loaded, packed, PACKED)
                    w = decoded(word, block_scale, table, PACKED, ARITHMETIC, PAIRED)
                else:
                    w = round_to(values_at(packed, n32, tl.minimum(k + cols, K - 1), PACKED), DTYPE)
            elif not HAS_WEIGHT:
                w = tl.zeros([rows.shape[0], cols.shape[1]], DTYPE)
            elif EVEN:
                w = tl.load(w_tile + k_long * stride_wk)
            else:
                w = tl.load(w_tile + k_long * stride_wk, mask=cols < K - k, other=0)
            if PACKED is None or not PACKED.by_blocks:
                w = held(w, DRAW)
            w, _ = perturb_tile(
                w, scale, row_offset + rows, row_offset + first_n, first_col + k, stream_id, sample, negate, seed,
                DTYPE, DRAW,
            )  # fmt: skip
            tl.store(out_tile + k_long * stride_ok, w, mask=inside if EVEN else inside & (cols < K - k))


def _prepare(weight: Any, draw: Any, out: Tensor) -> Kernel:
    N, K = out.shape
    machine = machine_of(out)
    regular = by_eight(out) and (weight is None or by_eight(weight))
    config = configs.PERTURB if regular else configs.PERTURB_RAGGED
    noise = "none" if draw is None else draw.noise
    dense = None if isinstance(weight, QuantizedWeight) else weight
    if regular and noise == "near_gaussian":
        config = configs.PERTURB_UNITS
    if not regular and noise == "hadamard":
        config = configs.PERTURB_RAGGED_WALSH
    if machine.architecture == "interpreter":
        config = configs.PERTURB_INTERPRETER

    def programs(steps: int) -> int:
        return triton.cdiv(N, config.block_n) * triton.cdiv(K, steps * config.block_k)

    steps = config.steps
    while steps > config.together and programs(steps) < configs.PERTURB_PROGRAMS * machine.processors:
        steps //= 2
    grid = (programs(steps),)
    rest = {
        "N": N,
        "K": K,
        "stride_wn": 0 if dense is None else dense.stride(0),
        "stride_wk": 0 if dense is None else dense.stride(1),
        "stride_scale": 0 if draw is None else draw.noise_scale.stride(0),
        "stride_on": out.stride(0),
        "stride_ok": out.stride(1),
        "HAS_WEIGHT": dense is not None,
        "PACKED": None if dense is weight else packed_facts(weight),
        "DRAW": drawn(draw, machine, out if weight is None else weight),
        "EVEN": K % (config.together * config.block_k) == 0,
        "MULTIPLE": 8 if regular else 1,
        "STEPS": steps,
        "TOGETHER": config.together,
        "STAGES": config.num_stages,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    return Kernel(_perturb_kernel, grid, out, rest, {"num_warps": config.num_warps})


def perturb(weight: Any, draw: Any, out: Tensor) -> None:
    """out = weight + eps, or eps where `weight` is None, or a packed weight where `draw` is; both (N, K), N, K > 0, of
    one type."""
    packed = None
    if draw is None:
        key, noise = facts(out, weight), (None, None, 0, 0, 0, 0)
    else:
        key = (*facts(out, weight, draw.noise_scale), *draw_facts(draw))
        noise = (
            draw.noise_scale, draw.seed, draw.stream, draw.sample_offset, draw.row_offset, draw.col_offset
        )  # fmt: skip
    kernel = prepared(_prepare, key, weight, draw, out)
    if isinstance(weight, QuantizedWeight):
        weight, packed = None, operand(weight)
    kernel(weight, packed, *noise[:2], out, *noise[2:])
