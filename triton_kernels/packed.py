"""Values of a packed weight (flatlora_kernels/core/quantized.py) inside a kernel: the one place that knows formats.

`values_at` takes every `Packing`, at any rows and columns, an element at a time. Where `PACKED.by_blocks`, the codes of
eight columns are one word: `load_blocks` brings it with its scale, `decoded` makes a tile of the words.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .philox import in_turn
from .tile import INTERPRETED, round_to

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Packed:
    """All of a packing that machine code depends on: the constant `PACKED`; None = the weight is not packed."""

    bits: int
    number: str
    high_first: bool
    block: int  # flat scales whose blocks may cross rows; else 0, and they are a matrix
    block_rows: int
    block_cols: int  # 0 = one block has all columns
    begins_block: bool  # the view's first column does
    nested_block: int  # 0 = `nested` is one number
    post: float
    zero_bits: int
    zero_plus: int
    difference: tl.dtype
    own: tl.dtype  # of its owner's dequantisation
    target: tl.dtype
    by_blocks: bool  # eight columns are a word, with one scale


class Operand(NamedTuple):
    """A packed weight as kernels take it: the parameter `packed`. See `launch.facts` for what selects machine code."""

    codes: Any
    table: Any
    scale: Any
    scale_table: Any
    nested: Any
    offset: Any
    zero: Any
    row_bits: Any
    col_bits: Any
    row_scales: Any
    col_scales: Any
    row_zeros: Any
    col_zeros: Any
    row: int  # the view's first, and first column
    col: int
    width: int
    # Words of a row, by blocks, twice and one more: an odd number, or the compiler would load several to a thread.
    words: int
    scale_stride: int
    last: int  # byte of codes, and of zeros
    last_zero: int


@functools.lru_cache(1024)
def _facts(p: Any, flat: bool, plain: bool, aligned: bool) -> tuple[Packed, int]:
    """`Packed`, and the stride of scales. plain: without zeros. aligned: the codes are, to eight bytes."""
    block, rows, cols, stride = p.block, p.block_rows, p.block_cols, p.scale_stride
    if block and p.width % block == 0:
        block, rows, cols, stride = 0, 1, p.block, p.width // p.block
    if block or p.col + p.K <= cols:
        cols = 0
    known = p.bits == 4 or p.number != "table"
    by_blocks = flat and plain and aligned and known and p.bits in (4, 8)
    by_blocks = by_blocks and p.width % 8 == p.col % 8 == block % 8 == cols % 8 == 0
    found = Packed(
        p.bits, p.number, p.high_first, block, rows, cols, cols > 0 and p.col % cols == 0,
        p.nested_block if p.nested_block < 1 << 31 else 0, p.post, p.zero_bits, p.zero_plus,
        _TYPES[p.difference], _TYPES.get(p.dtype, tl.float32), _TYPES.get(p.target), by_blocks,
    )  # fmt: skip
    return found, stride


def _facts_of(weight: Any) -> tuple[Packed, int]:
    t = weight.parts
    return _facts(weight.packing, t.row_bits is None, t.zero is None, t.codes.data_ptr() % 8 == 0)


def packed_facts(weight: Any) -> Packed:
    """Where `by_blocks`, fused products take it, too."""
    return _facts_of(weight)[0]


def operand(weight: Any) -> Operand:
    p, t, stride = weight.packing, weight.parts, _facts_of(weight)[1]
    last_zero = 0 if t.zero is None else t.zero.numel() - 1
    return Operand(*t, p.row, p.col, p.width, p.width // 8 * 2 + 1, stride, t.codes.numel() - 1, last_zero)


# --- An element at a time ---


@triton.jit
def _codes_at(codes, bits, last, WIDTH: tl.constexpr):
    """Codes of WIDTH bits at these bit addresses; bytes are little-endian."""
    byte = bits >> 3
    word = tl.load(codes + byte).to(tl.int32)
    if WIDTH == 3:  # may lie in two bytes
        word = word | (tl.load(codes + tl.minimum(byte + 1, last)).to(tl.int32) << 8)
    return (word >> (bits & 7).to(tl.int32)) & ((1 << WIDTH) - 1)


@triton.jit
def _scale_row(packed, rows, n, PACKED: tl.constexpr):
    """Where the scales of rows n + `rows` begin, int64. n is a scalar; what does not depend on it is by itself, so that
    a loop computes it once."""
    if PACKED.block_rows > 1:
        return ((rows + n).to(tl.uint32) // PACKED.block_rows).to(tl.int64) * packed.scale_stride
    else:
        return rows.to(tl.int64) * packed.scale_stride + n.to(tl.int64) * packed.scale_stride


@triton.jit
def _scale_index(packed, rows, n, cols, k, PACKED: tl.constexpr):
    """Of rows n + `rows` and columns k + `cols` of what was packed, int64."""
    if PACKED.block > 0:
        index = (rows.to(tl.int64) * packed.width + cols) + (n.to(tl.int64) * packed.width + k)
        return (index.to(tl.uint64) // PACKED.block).to(tl.int64)
    else:
        index = _scale_row(packed, rows, n, PACKED)
        if PACKED.block_cols > 0:
            index = index + ((cols + k).to(tl.uint32) // PACKED.block_cols).to(tl.int64)
        return index


@triton.jit
def _load_scales(packed, index, inside, MASKED: tl.constexpr, PACKED: tl.constexpr):
    """What lies at a scale's index, and its nested scale, or the same again; zeros outside `inside`."""
    if MASKED:
        scale = tl.load(packed.scale + index, mask=inside, other=0)
    else:
        scale = tl.load(packed.scale + index)
    if packed.nested is None:
        return scale, scale
    elif PACKED.nested_block == 0:
        return scale, tl.load(packed.nested)
    elif MASKED:
        index = (index.to(tl.uint64) // PACKED.nested_block).to(tl.int64)
        return scale, tl.load(packed.nested + index, mask=inside, other=0)
    else:
        return scale, tl.load(packed.nested + (index.to(tl.uint64) // PACKED.nested_block).to(tl.int64))


@triton.jit
def _scale_of(scale, nested, packed):
    """float32 of what `_load_scales` gives."""
    if packed.scale_table is None:
        scale = scale.to(tl.float32)
    else:
        scale = tl.load(packed.scale_table + scale.to(tl.int32))
        if packed.nested is not None:
            scale = scale * nested
        if packed.offset is not None:
            scale = scale + tl.load(packed.offset)
    return scale


@triton.jit
def values_at(packed, rows, cols, PACKED: tl.constexpr):
    """float32 of rows `rows` and columns `cols` of the view, which lie inside it and broadcast."""
    BITS: tl.constexpr = PACKED.bits
    ZERO_BITS: tl.constexpr = PACKED.zero_bits
    DIFFERENCE: tl.constexpr = PACKED.difference
    OWN: tl.constexpr = PACKED.own
    n = rows + packed.row
    k = cols + packed.col
    if packed.row_bits is None:
        i = n.to(tl.int64) * packed.width + k
        bits = i * PACKED.bits
        if PACKED.high_first:
            bits = (i ^ 1) * PACKED.bits
        nought = tl.cast(0, tl.int32)
        index = _scale_index(packed, n, nought, k, nought, PACKED)
    else:
        bits = tl.load(packed.row_bits + n) + tl.load(packed.col_bits + k)
        index = tl.load(packed.row_scales + n) + tl.load(packed.col_scales + k)
    v = tl.load(packed.table + _codes_at(packed.codes, bits, packed.last, BITS))
    if PACKED.zero_bits > 0:
        places = tl.load(packed.row_zeros + n) + tl.load(packed.col_zeros + k)
        zero = _codes_at(packed.zero, places, packed.last_zero, ZERO_BITS) + PACKED.zero_plus
        v = v - zero.to(tl.float32)
    elif packed.zero is not None:
        v = v - tl.load(packed.zero + index).to(tl.float32)
    v = round_to(v, DIFFERENCE).to(tl.float32)
    scale, nested = _load_scales(packed, index, True, False, PACKED)
    v = v * _scale_of(scale, nested, packed)
    if PACKED.post != 1.0:
        v = v * PACKED.post
    return round_to(v, OWN).to(tl.float32)


# --- Eight columns at a time ---

# The value of a 16-entry table that this lane holds, and of a word the values that its eight codes have. The index of a
# shuffle is the low four bits, so that codes need no mask.
_OF_LANE_PTX = tl.constexpr(
    """{
    .reg .b32 lane;
    .reg .b64 at;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 15;
    mad.wide.u32 at, lane, 4, $1;
    ld.global.nc.b32 $0, [at];
    }"""
)
LOOKUP_PTX = tl.constexpr(
    "{ .reg .b32 code; shfl.sync.idx.b32 $0, $9, $8, 0x100f, 0xffffffff;"
    + "".join(
        f" shr.u32 code, $8, {4 * i}; shfl.sync.idx.b32 ${i}, $9, code, 0x100f, 0xffffffff;"
        for i in range(1, 8)
    )
    + " }"
)
# The four e4m3 of a word, by way of float16, which holds them exactly.
_E4M3_PTX = tl.constexpr(
    """{
    .reg .b16 low, high, a, b;
    .reg .b32 pair;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 pair, low;
    mov.b32 {a, b}, pair;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.rn.f16x2.e4m3x2 pair, high;
    mov.b32 {a, b}, pair;
    cvt.f32.f16 $2, a;
    cvt.f32.f16 $3, b;
    }"""
)
_PAIR_PTX = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")


@triton.jit
def lookup(packed, PACKED: tl.constexpr, ARITHMETIC: tl.constexpr):
    """What `decoded` looks codes up in: on NVIDIA the lanes of a warp, which hold a value each."""
    if PACKED.bits == 4 and ARITHMETIC == "ptx" and not INTERPRETED:
        address = packed.table.to(tl.int64)
        return tl.inline_asm_elementwise(_OF_LANE_PTX, "=f,l", [address], tl.float32, is_pure=True, pack=1)
    else:
        return packed.table


@triton.constexpr_function
def _scales_across(packed, words, units):
    """How many blocks of scales a row of so many words has, where they begin as the words do; else 0."""
    across = words * (16 if units else 8)
    size = packed.block_cols
    if packed.block or not size or not packed.begins_block or (units and size % 16):
        return 0
    if size % across == 0:
        return 1
    return across // size if across % size == 0 else 0


@triton.jit
def load_blocks(packed, n, rows, k, blocks, N, K, MASKED: tl.constexpr, PACKED: tl.constexpr):
    """Codes, scales and their nested scales of eight columns each: rows n + `rows` (R, 1) of the view, and columns
    from k + 8 * `blocks` (1 or R, C) on; n and k are scalars, and k a multiple of what `blocks` cover.

    MASKED: some may lie beyond N and K; there the values are finite.
    """
    R: tl.constexpr = rows.shape[0]
    C: tl.constexpr = blocks.shape[1]
    WORD: tl.constexpr = tl.uint32 if PACKED.bits == 4 else tl.uint64
    UNITS: tl.constexpr = blocks.shape[0] > 1
    ACROSS: tl.constexpr = _scales_across(PACKED, C, UNITS)
    rows_inside = rows < N - n
    inside = rows_inside & (8 * blocks < K - k)
    rows += packed.row
    k += packed.col
    words = packed.words >> 1
    n, k = tl.cast(n, tl.int32), tl.cast(k, tl.int32)
    codes = packed.codes.to(tl.pointer_type(WORD)) + (blocks + rows.to(tl.int64) * words)
    codes += n.to(tl.int64) * words + k // 8
    if MASKED:
        word = tl.load(codes, mask=inside, other=0)
    else:
        word = tl.load(codes)
    if ACROSS > 0:  # each is loaded once, in a layout that follows that of the words
        SIZE: tl.constexpr = PACKED.block_cols
        first, across = k // SIZE, tl.arange(0, ACROSS)[None, :]
        index = _scale_row(packed, rows, n, PACKED) + across + first.to(tl.int64)
        known = rows_inside & (across < packed.scale_stride - first)
        scale, nested = _load_scales(packed, index, known, MASKED, PACKED)
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], [R, ACROSS, C // ACROSS]), [R, C])
        if packed.nested is None:
            nested = scale
        elif PACKED.nested_block > 0:
            nested = tl.reshape(tl.broadcast_to(nested[:, :, None], [R, ACROSS, C // ACROSS]), [R, C])
    else:
        index = _scale_index(packed, rows, n, 8 * blocks, k, PACKED)
        if PACKED.block_cols > 0 or PACKED.block > 0:
            rows_inside = inside
        scale, nested = _load_scales(packed, index, rows_inside, MASKED, PACKED)
    return word, scale, nested


@triton.jit
def _number(word, PLACE: tl.constexpr, PACKED: tl.constexpr):
    """float32 of byte PLACE of a word of 32 bits."""
    top = word << (24 - 8 * PLACE)
    if PACKED.number == "int8":
        return (top.to(tl.int32, bitcast=True) >> 24).to(tl.float32)
    elif PACKED.number == "uint":
        return (top >> 24).to(tl.float32)
    elif PACKED.number == "e4m3":
        small = ((top & 0x80000000) | ((top >> 4) & 0x07F00000)).to(tl.float32, bitcast=True)
        value = small * 1.329227995784916e36  # 2^120, because the exponent of this is too small by so much
        return tl.where((top & 0x7F000000) == 0x7F000000, float("nan"), value)
    else:
        tl.static_assert(PACKED.number == "e5m2")
        return ((top >> 16) & 0xFF00).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.constexpr_function
def _converts_e4m3(arithmetic):
    return arithmetic == "ptx" and not INTERPRETED.value and cuda_capability_geq(8, 9)


@triton.jit
def _four(word, PACKED: tl.constexpr, ARITHMETIC: tl.constexpr):
    """float32 of the bytes of words of 32 bits."""
    if PACKED.number == "e4m3" and _converts_e4m3(ARITHMETIC):
        return tl.inline_asm_elementwise(
            _E4M3_PTX, "=&f,=&f,=&f,=&f,r", [word], (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        return (
            _number(word, 0, PACKED),
            _number(word, 1, PACKED),
            _number(word, 2, PACKED),
            _number(word, 3, PACKED),
        )


@triton.jit
def _eight(word, table, PACKED: tl.constexpr, ARITHMETIC: tl.constexpr):
    """float32 of the eight codes of words."""
    if PACKED.bits == 8:
        v0, v1, v2, v3 = _four(word.to(tl.uint32), PACKED, ARITHMETIC)
        v4, v5, v6, v7 = _four((word >> 32).to(tl.uint32), PACKED, ARITHMETIC)
    elif ARITHMETIC == "ptx" and not INTERPRETED:
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            LOOKUP_PTX, "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,f", [word, table],
            (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        v0, v1 = tl.load(table + (word & 15)), tl.load(table + ((word >> 4) & 15))
        v2, v3 = tl.load(table + ((word >> 8) & 15)), tl.load(table + ((word >> 12) & 15))
        v4, v5 = tl.load(table + ((word >> 16) & 15)), tl.load(table + ((word >> 20) & 15))
        v6, v7 = tl.load(table + ((word >> 24) & 15)), tl.load(table + (word >> 28))
    if PACKED.bits == 4 and PACKED.high_first:
        return v1, v0, v3, v2, v5, v4, v7, v6
    else:
        return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _scaled(v, scale, PACKED: tl.constexpr):
    OWN: tl.constexpr = PACKED.own
    v = v * scale
    if PACKED.post != 1.0:
        v = v * PACKED.post
    if PACKED.own != PACKED.target:
        v = round_to(v, OWN).to(tl.float32)
    return v


@triton.jit
def _pair(left, right):
    return tl.inline_asm_elementwise(_PAIR_PTX, "=r,f,f", [left, right], tl.uint32, is_pure=True, pack=1)


@triton.jit
def decoded(word, scale, table, PACKED: tl.constexpr, ARITHMETIC: tl.constexpr, PAIRED: tl.constexpr):
    """The tile of words and their scales in float32, (R, 8 C) in the weight's type; PAIRED: as `tile.held` has it."""
    TARGET: tl.constexpr = PACKED.target
    v0, v1, v2, v3, v4, v5, v6, v7 = _eight(word, table, PACKED, ARITHMETIC)
    v0, v1, v2, v3 = (
        _scaled(v0, scale, PACKED),
        _scaled(v1, scale, PACKED),
        _scaled(v2, scale, PACKED),
        _scaled(v3, scale, PACKED),
    )
    v4, v5, v6, v7 = (
        _scaled(v4, scale, PACKED),
        _scaled(v5, scale, PACKED),
        _scaled(v6, scale, PACKED),
        _scaled(v7, scale, PACKED),
    )
    if PAIRED:
        return in_turn(_pair(v0, v1), _pair(v2, v3), _pair(v4, v5), _pair(v6, v7))
    else:
        v = tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))
        return round_to(tl.reshape(v, [word.shape[0], 8 * word.shape[1]]), TARGET)


@triton.jit
def scales_of(loaded, packed, PACKED: tl.constexpr):
    """What a product's loop has loaded, with its scales looked up: that is a load again, to be begun early."""
    if PACKED is None:
        return loaded
    else:
        return loaded[0], _scale_of(loaded[1], loaded[2], packed)


@triton.jit
def weight_of(loaded, table, PACKED: tl.constexpr, DRAW: tl.constexpr):
    """The tile of the weight, `held`, of what `scales_of` gives."""
    if PACKED is None:
        return loaded
    else:
        ARITHMETIC: tl.constexpr = DRAW.arithmetic
        PAIRED: tl.constexpr = DRAW.paired
        return decoded(loaded[0], loaded[1], table, PACKED, ARITHMETIC, PAIRED)
