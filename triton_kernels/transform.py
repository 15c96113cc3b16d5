"""y = a eps^T, or a eps, of hadamard noise: a fast Walsh transform on the tensor cores, without the weight's work.

A tile's matrix P[i, j] = (-1)^popcount(rev(i) & j) is a Kronecker product. With j = (j1, j0), its low bits j0, and
i = (i1, i0), its high bits i1, it is one of i1 and j0, as many bits, times one of i0 and j1: two products by small
matrices of signs, after which the sums lie in the order of i.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import CHANGING, Kernel, draw_facts, drawn, facts, machine_of, prepared
from .philox import WALSH_COLUMNS, WALSH_ROWS, mirrored, odd, walsh_words
from .tile import dot, factor, round_to, sample_of


@triton.jit
def _matrix(BITS: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """P of BITS bits, which is symmetric; zeros beyond it, where SIZE is larger."""
    i = tl.arange(0, SIZE).to(tl.uint32)[:, None]
    j = tl.arange(0, SIZE).to(tl.uint32)[None, :]
    one = tl.where(odd(mirrored(i, BITS) & j) == 0, 1.0, -1.0)
    if SIZE > 1 << BITS:
        one = tl.where((i < 1 << BITS) & (j < 1 << BITS), one, 0.0)
    return one.to(DTYPE)


@triton.jit
def _signs(
    first, other, BASE: tl.constexpr, stream, sample, seed, SHAPE: tl.constexpr, ARITHMETIC: tl.constexpr
):
    """The signs of as many rows or columns from `first` on in one tile of the `other`: uint32 of SHAPE, 2^31 where z is
    negated."""
    first = tl.cast(first, tl.uint32)
    other = tl.cast(other, tl.uint32)
    if SHAPE[0] == 1 or SHAPE[1] == 1:
        index = tl.reshape(first + tl.arange(0, SHAPE[0] * SHAPE[1]).to(tl.uint32), SHAPE)
        word = walsh_words(index, other, BASE, stream, sample, seed, ARITHMETIC)
        return (word << (31 - (index & 31))) & 0x80000000
    else:  # a word has those of 32
        index = first + 32 * tl.arange(0, SHAPE[0] * SHAPE[1] // 32).to(tl.uint32)
        word = walsh_words(index, other, BASE, stream, sample, seed, ARITHMETIC)
        bits = word[:, None] << (31 - tl.arange(0, 32).to(tl.uint32))[None, :]
        return tl.reshape(bits & 0x80000000, SHAPE)


@triton.jit
def _flipped(x, sign):
    """x, (BLOCK_M, A, B), negated by the bits 2^31 of `sign`, (1, A, B)."""
    if x.dtype == tl.float32:
        return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    else:
        return (x.to(tl.uint16, bitcast=True) ^ (sign >> 16).to(tl.uint16)).to(x.dtype, bitcast=True)


# Two at a time; the compiler's own conversion takes three instructions more for each.
_PART_PTX = tl.constexpr(
    """{
    .reg .b32 low, high;
    cvt.rn.bf16x2.f32 $0, $4, $3;
    shl.b32 low, $0, 16;
    and.b32 high, $0, 0xffff0000;
    sub.rn.f32 $1, $3, low;
    sub.rn.f32 $2, $4, high;
    }"""
)


@triton.jit
def _part(x, ARITHMETIC: tl.constexpr):
    """The nearest bfloat16, and what that leaves of a finite x."""
    if ARITHMETIC == "ptx":
        # Not pure, or it goes to where a product takes it, with all before it, once for each warp that needs it.
        high, rest = tl.inline_asm_elementwise(
            _PART_PTX, "=&r,=&r,=&r,r,r", [x], (tl.bfloat16, tl.float32), is_pure=False, pack=2
        )
    else:
        high = round_to(x, tl.bfloat16)
        rest = x - high.to(tl.float32)
    return high, tl.where(rest == rest, rest, 0.0)


@triton.jit
def _product(a, b, PARTS: tl.constexpr, LEFT: tl.constexpr, ARITHMETIC: tl.constexpr):
    """a b of the signs b, or b a; float32. a: of 16 bits where PARTS is 1, else float32, in so many bfloat16."""
    acc = tl.zeros([b.shape[0], a.shape[1]] if LEFT else [a.shape[0], b.shape[1]], tl.float32)
    for _ in tl.static_range(PARTS):
        if PARTS == 1:
            now = a
        else:
            now, a = _part(a, ARITHMETIC)
        acc = dot(b, now, acc, "ieee") if LEFT else dot(now, b, acc, "ieee")
    return acc


@triton.jit
def _side(
    noise_scale,
    tile,  # of this side
    other,  # tile of the other side
    offset,  # of the shard on this side
    size,  # of the shard
    stride_scale,
    negate,
    stream,
    sample,
    seed,
    ROWS: tl.constexpr,  # this side is the weight's rows, else its columns
    SHAPE: tl.constexpr,  # in which the tile's indices stand
    WHOLE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    DTYPE: tl.constexpr,
    DRAW: tl.constexpr,
):
    """Where a tile lies in the shard, what of it does, and by what it is multiplied: rows by +-f, float32, columns by
    +-1, of which only the sign's bit is returned. All of shape (1, *SHAPE)."""
    ARITHMETIC: tl.constexpr = DRAW.arithmetic
    first = tl.cast(tile, tl.int64) << DRAW.tile_bits
    index = tl.arange(0, SHAPE[0])[:, None] * SHAPE[1] + tl.arange(0, SHAPE[1])[None, :]
    at = (first - offset) // MULTIPLE * MULTIPLE + index
    inside = index < 1 << DRAW.tile_bits
    if not WHOLE:
        inside = inside & (at >= 0) & (at < size)
    sign = _signs(
        first, other, WALSH_ROWS if ROWS else WALSH_COLUMNS, stream, sample, seed, SHAPE, ARITHMETIC
    )
    if ROWS:
        scale = factor(tl.load(noise_scale + at * stride_scale, mask=inside, other=0), negate, DTYPE, DRAW)
        return at[None, :, :], inside[None, :, :], _flipped(scale, sign)[None, :, :]
    else:
        return at[None, :, :], inside[None, :, :], sign[None, :, :]


@triton.jit
def _times(x, by, ROWS: tl.constexpr):
    """What `_side` says."""
    return x * by if ROWS else _flipped(x, by)


@triton.jit
def _transformed(
    tile,  # addresses, (BLOCK_M, P, Q)
    inside,
    by,
    first,
    second,
    INPUT_GRAD: tl.constexpr,
    PARTS_IN: tl.constexpr,
    PARTS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
):
    """(BLOCK_M, Q, P) float32, one tile's product without what its outputs are multiplied by."""
    BLOCK_M: tl.constexpr = tile.shape[0]
    P: tl.constexpr = tile.shape[1]
    Q: tl.constexpr = tile.shape[2]
    x = tl.load(tile, mask=inside, other=0)
    if PARTS_IN > 1:
        x = x.to(tl.float32)
    x = _times(x, by, INPUT_GRAD)
    if Q > 1:
        x = tl.reshape(x, [BLOCK_M * P, Q])
        x = _product(tl.trans(x), first, PARTS_IN, True, ARITHMETIC)  # i1; m, j1
        x = tl.permute(tl.reshape(x, [Q, BLOCK_M, P]), (1, 0, 2))
        x = _product(tl.reshape(x, [BLOCK_M * Q, P]), second, PARTS, False, ARITHMETIC)  # m, i1; i0
    else:
        x = _product(tl.reshape(x, [BLOCK_M, P]), second, PARTS_IN, False, ARITHMETIC)
    return tl.reshape(x, [BLOCK_M, Q, P])


@triton.jit(
    do_not_specialize=[*CHANGING, "M", "rows_per_sample", "steps"],
    do_not_specialize_on_alignment=["seed"],
)
def _transform_kernel(
    a,  # (M, length)
    noise_scale,  # (N,)
    seed,
    out,  # (M, outputs), contiguous
    stream_id: tl.int64,
    sample_offset: tl.int64,
    row_offset: tl.int64,
    col_offset: tl.int64,
    M,
    length,
    outputs,
    rows_per_sample,
    steps,  # blocks of rows that a program goes through
    stride_am,
    stride_ak,
    stride_scale,
    DRAW: tl.constexpr,  # tile.Drawn
    INPUT_GRAD: tl.constexpr,
    ADD: tl.constexpr,  # to what `out` holds
    ONE: tl.constexpr,  # tile along the contraction
    WHOLE_IN: tl.constexpr,  # tiles along the contraction
    WHOLE_OUT: tl.constexpr,  # tiles of outputs
    MULTIPLE_IN: tl.constexpr,  # 8 where tiles begin at such columns of `a`, and it can be loaded so, else 1
    MULTIPLE_OUT: tl.constexpr,  # the same of `out`
    HIGH: tl.constexpr,  # bits of j1 and i0
    LOW: tl.constexpr,  # of j0 and i1; 0 where one product does it
    PARTS_IN: tl.constexpr,  # bfloat16 that hold what the first product takes, 1: it is in its own type
    PARTS: tl.constexpr,  # that hold its sums
    BLOCK_M: tl.constexpr,
):
    P: tl.constexpr = 1 << HIGH if HIGH > 4 else 16
    Q: tl.constexpr = 1 << LOW
    DTYPE: tl.constexpr = out.dtype.element_ty
    ARITHMETIC: tl.constexpr = DRAW.arithmetic
    FIRST: tl.constexpr = DTYPE if PARTS_IN == 1 else tl.bfloat16
    length = length // MULTIPLE_IN * MULTIPLE_IN
    stride_am = stride_am // MULTIPLE_IN * MULTIPLE_IN
    outputs = outputs // MULTIPLE_OUT * MULTIPLE_OUT
    # By way of uint32, which is what the interpreter has in 64 bits that it is told of.
    in_offset = tl.cast(tl.cast(col_offset, tl.uint32), tl.int64)
    out_offset = tl.cast(tl.cast(row_offset, tl.uint32), tl.int64)
    if INPUT_GRAD:
        in_offset, out_offset = out_offset, in_offset
    stream = tl.cast(stream_id, tl.uint32)
    seed = tl.load(seed)

    programs = tl.cdiv(rows_per_sample, steps * BLOCK_M)  # of one group of rows, which sees one sample
    group = tl.program_id(0) // programs
    begin_m = group * rows_per_sample + tl.program_id(0) % programs * steps * BLOCK_M
    last_m = (group + 1) * rows_per_sample
    end_m = tl.minimum(begin_m + steps * BLOCK_M, last_m)
    sample, negate = sample_of(group, sample_offset, DRAW)

    # Tiles are counted in all the weight.
    out_tile = (out_offset >> DRAW.tile_bits) + tl.program_id(1)
    first_tile = in_offset >> DRAW.tile_bits
    last_tile = (in_offset + length - 1) >> DRAW.tile_bits
    second = _matrix(HIGH, P, tl.bfloat16 if LOW > 0 else FIRST)
    first = _matrix(LOW, Q, FIRST)
    if ONE:
        in_at, in_inside, in_by = _side(
            noise_scale, first_tile, out_tile, in_offset, length, stride_scale, negate, stream, sample, seed,
            INPUT_GRAD, [P, Q], WHOLE_IN, MULTIPLE_IN, DTYPE, DRAW,
        )  # fmt: skip
    out_at, out_inside, out_by = _side(
        noise_scale, out_tile, first_tile, out_offset, outputs, stride_scale, negate, stream, sample, seed,
        not INPUT_GRAD, [Q, P], WHOLE_OUT, MULTIPLE_OUT, DTYPE, DRAW,
    )  # fmt: skip
    for block_m in tl.range(begin_m, end_m, BLOCK_M):
        rows = block_m + tl.arange(0, BLOCK_M)[:, None, None]
        a_rows = a + tl.minimum(rows, last_m - 1).to(tl.int64) * stride_am
        if ONE:
            x = _transformed(
                a_rows + in_at * stride_ak,
                in_inside,
                in_by,
                first,
                second,
                INPUT_GRAD,
                PARTS_IN,
                PARTS,
                ARITHMETIC,
            )
            acc = _times(x, out_by, not INPUT_GRAD)
        else:
            acc = tl.zeros([BLOCK_M, Q, P], tl.float32)
            for tile in tl.range(first_tile, last_tile + 1):
                at, in_inside, in_by = _side(
                    noise_scale, tile, out_tile, in_offset, length, stride_scale, negate, stream, sample, seed,
                    INPUT_GRAD, [P, Q], WHOLE_IN, MULTIPLE_IN, DTYPE, DRAW,
                )  # fmt: skip
                _, _, by = _side(
                    noise_scale, out_tile, tile, out_offset, outputs, stride_scale, negate, stream, sample, seed,
                    not INPUT_GRAD, [Q, P], WHOLE_OUT, MULTIPLE_OUT, DTYPE, DRAW,
                )  # fmt: skip
                x = _transformed(
                    a_rows + at * stride_ak,
                    in_inside,
                    in_by,
                    first,
                    second,
                    INPUT_GRAD,
                    PARTS_IN,
                    PARTS,
                    ARITHMETIC,
                )
                acc += _times(x, by, not INPUT_GRAD)
        place = out + rows.to(tl.int64) * outputs + out_at
        inside = out_inside & (rows < last_m)
        if ADD:
            acc += tl.load(place, mask=inside, other=0).to(tl.float32)
        tl.store(place, round_to(acc, DTYPE), mask=inside)


def tiles(offset: int, size: int, bits: int) -> int:
    """That a shard of `size` from `offset` on has a part of."""
    return ((offset + size - 1) >> bits) - (offset >> bits) + 1


def _prepare(
    a: Tensor,
    draw: Any,
    input_grad: bool,
    out: Tensor,
    add: bool,
    counts: tuple[int, int],
    whole: tuple[bool, bool],
) -> Kernel:
    (M, length), outputs, bits = a.shape, out.shape[1], draw.tile_bits
    machine = machine_of(a)
    most = configs.TRANSFORM
    low = bits // 2 if bits > configs.TRANSFORM_ONE_PRODUCT else 0
    high = bits - low
    if low < high and low:  # the first product takes 64 rows of a tile, which wgmma does
        low, high = high, low
    block_m = max(most >> bits, 1) if low else max(16, min(64, most >> high))
    rows_per_sample = M // draw.samples
    blocks = draw.samples * triton.cdiv(rows_per_sample, block_m) * counts[1]
    steps = max(1, blocks // (configs.TRANSFORM_PROGRAMS * machine.processors))
    parts_in, parts = {torch.bfloat16: (2, 2), torch.float16: (3, 3), torch.float32: (3, 3)}[a.dtype]
    if not input_grad and a.dtype != torch.float32:
        parts_in, parts = 1, 2
    in_offset, out_offset = (
        (draw.row_offset, draw.col_offset) if input_grad else (draw.col_offset, draw.row_offset)
    )
    by_eight_in = length % 8 == in_offset % 8 == a.stride(0) % 8 == 0 and a.stride(1) == 1 and bits >= 3
    by_eight_out = outputs % 8 == out_offset % 8 == 0 and bits >= 3
    rest = {
        "M": M,
        "length": length,
        "outputs": outputs,
        "rows_per_sample": rows_per_sample,
        "steps": steps,
        "stride_am": a.stride(0),
        "stride_ak": a.stride(1),
        "stride_scale": draw.noise_scale.stride(0),
        "DRAW": drawn(draw, machine, a),
        "INPUT_GRAD": input_grad,
        "ADD": add,
        "ONE": counts[0] == 1,
        "WHOLE_IN": whole[0],
        "WHOLE_OUT": whole[1],
        "MULTIPLE_IN": 8 if by_eight_in else 1,
        "MULTIPLE_OUT": 8 if by_eight_out else 1,
        "HIGH": high,
        "LOW": low,
        "PARTS_IN": parts_in,
        "PARTS": parts,
        "BLOCK_M": block_m,
    }
    grid = (draw.samples * triton.cdiv(rows_per_sample, steps * block_m), counts[1])
    regular = by_eight_in and by_eight_out
    warps, stages = configs.transform(machine.architecture, regular, counts[0] == 1, max(parts_in, parts))
    return Kernel(_transform_kernel, grid, a, rest, {"num_warps": warps, "num_stages": stages})


def transform(a: Tensor, draw: Any, input_grad: bool, out: Tensor, add: bool) -> None:
    """out = a eps^T, in the input gradient a eps; with `add` that is added to `out`.

    a: (M, contraction), M > 0; out: (M, outputs), contiguous, of a's type.
    """
    offsets = (draw.row_offset, draw.col_offset) if input_grad else (draw.col_offset, draw.row_offset)
    sizes, T = (a.shape[1], out.shape[1]), 1 << draw.tile_bits
    counts = tuple(tiles(offset, size, draw.tile_bits) for offset, size in zip(offsets, sizes, strict=True))
    whole = tuple(offset % T == size % T == 0 for offset, size in zip(offsets, sizes, strict=True))
    key = (
        *facts(a, draw.noise_scale, out), *draw_facts(draw), draw.samples, input_grad, add, counts, whole,
        draw.row_offset % 8 == 0,
    )  # fmt: skip
    kernel = prepared(_prepare, key, a, draw, input_grad, out, add, counts, whole)
    kernel(
        a, draw.noise_scale, draw.seed, out, draw.stream, draw.sample_offset, draw.row_offset, draw.col_offset
    )  # fmt: skip
