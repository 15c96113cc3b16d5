"""What the kernels share: the perturbed tile, products that the interpreter gets right, and the order of tiles."""

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .philox import (
    ADD_PTX,
    PERTURBED_PTX,
    RADIUS_FACTOR,
    ROOT_RECIPROCAL,
    floats,
    gaussian,
    hadamard,
    near_gaussian,
    near_gaussian_anywhere,
    near_gaussian_words,
    rademacher,
)


@dataclass(frozen=True)
class Drawn:
    """All of a draw that machine code depends on; kernels take it as one constant, `DRAW`."""

    noise: str  # "none": the weight as it is
    antithetic: bool
    aligned: bool  # tiles begin where a word or unit of the noise does, see `launch.draw_facts`
    tile_bits: int  # of hadamard
    arithmetic: str  # see philox.py
    paired: bool = False  # W is held in registers as pairs of bfloat16, see `held`
    apart: bool = False  # noise_accum = "split"


@dataclass(frozen=True)
class Cut:
    """How a product is cut into tiles, as far as machine code depends on it: the constant `CUT`."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int  # 0 = no adapter
    group_m: int
    carry: bool  # the perturbed tile goes from one step to the next
    split: bool  # of the contraction: y is float32 partial sums (splits, M, outputs)
    even: bool  # tiles cover the weight without rest where it matters
    multiple: int  # 8 where that divides N, K and the strides of rows, else 1
    by_engine: bool  # the first operand is a descriptor for the copy engine
    precision: str  # `input_precision` of products
    experts: int = 0  # of a mixture, rounded up to a power of two; 0 = one weight for all rows


class Mixture(NamedTuple):
    """Of rows that belong to experts, as kernels take it: the parameter `mixture`; None = one weight for all rows."""

    offsets: Any  # (E,), where each expert's rows end
    experts: int  # E
    # From one expert to the next:
    stride_weight: int
    stride_A: int
    stride_B: int
    stride_bias: int
    stride_scale: int


# The interpreter multiplies bfloat16 as if it were integers, and cuts where it should round.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Two bfloat16 of one register; the compiler's own conversion takes three instructions. The first result is written
# before the operand is read for the last time.
_UNPACK_PTX = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


@triton.jit
def to_float(x, ARITHMETIC: tl.constexpr):
    if ARITHMETIC == "ptx" and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_UNPACK_PTX, "=&r,=r,r", [x], tl.float32, is_pure=True, pack=2)
    else:
        return x.to(tl.float32)


@triton.jit
def held(w, DRAW: tl.constexpr):
    """A tile of the weight as it goes from its load to `perturb_tile`.

    Where `DRAW.paired`, (R, C / 2) uint32 of w (R, C), two columns each: 16 bits by themselves, carried by a loop, the
    compiler takes apart and puts together again.
    """
    if DRAW.paired:
        low, high = tl.split(tl.reshape(w, [w.shape[0], w.shape[1] // 2, 2]))
        low, high = low.to(tl.uint16, bitcast=True), high.to(tl.uint16, bitcast=True)
        return low.to(tl.uint32) | (high.to(tl.uint32) << 16)
    else:
        return w


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """float32 to `DTYPE`, to the nearest."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True).to(tl.uint64)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.uint32)
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32 and PRECISION == "ieee":
        # Summed from zero in each step: one chain of multiply-adds through the whole contraction lost five times as
        # much on an H100 as the vendor's product does. Hidden, or the compiler would put acc in the zero's place.
        zero = (tl.program_id(0) < 0).to(tl.float32)
        return acc + tl.dot(a, b, tl.zeros_like(acc) + zero, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """The place of a program in the grid: GROUP_M tiles of rows share what they read of the other operand in L2."""
    width = GROUP_M * num_n
    first = pid // width * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    return first + pid % width % size, pid % width // size


@triton.jit
def place(M, rows_per_sample, outputs, BLOCK_OUT: tl.constexpr, CUT: tl.constexpr):
    """Where a program is: its group of rows, which sees one sample, its first row, the end of its group, and its first
    output."""
    tiles_per_sample = tl.cdiv(rows_per_sample, CUT.block_m)
    num_m = M // rows_per_sample * tiles_per_sample
    pid_m, pid_out = tile_of(tl.program_id(0), num_m, tl.cdiv(outputs, BLOCK_OUT), CUT.group_m)
    group = pid_m // tiles_per_sample
    first_m = group * rows_per_sample + pid_m % tiles_per_sample * CUT.block_m
    return group, first_m, (group + 1) * rows_per_sample, pid_out * BLOCK_OUT


@triton.jit
def rows_of_experts(offsets, experts, M, EXPERTS: tl.constexpr):
    """Where the rows of each expert begin and end, and 0.

    Nobody else has seen the numbers in `offsets`, so where they do not part M rows the first expert gets all, and NaN
    comes in the place of 0, to be added to the result.
    """
    e = tl.arange(0, EXPERTS)
    ends = tl.load(offsets + e, mask=e < experts, other=M).to(tl.int64)
    begins = tl.load(offsets + e - 1, mask=(e > 0) & (e < experts), other=0).to(tl.int64)
    begins = tl.where(e < experts, begins, M)
    wrong = tl.sum(((ends < begins) | ((e == experts - 1) & (ends != M))).to(tl.int32), 0) > 0
    ends = tl.where(wrong, M, ends).to(tl.int32)
    begins = tl.where(wrong & (e > 0), M, begins).to(tl.int32)
    return begins, ends, tl.where(wrong, float("nan"), 0.0)


@triton.jit
def place_among(mixture, M, outputs, BLOCK_OUT: tl.constexpr, CUT: tl.constexpr):
    """Where a program is in a mixture: its expert, its first row, or M where nothing is left to do, the end of the
    expert's rows, its first output, and what `rows_of_experts` wants added."""
    e = tl.arange(0, CUT.experts)
    begins, ends, wrong = rows_of_experts(mixture.offsets, mixture.experts, M, CUT.experts)
    tiles = tl.cdiv(ends - begins, CUT.block_m)
    until = tl.cumsum(tiles, 0)
    num_m, num_out = tl.sum(tiles, 0), tl.cdiv(outputs, BLOCK_OUT)
    is_left = tl.program_id(0) < num_m * num_out
    pid_m, pid_out = tile_of(tl.where(is_left, tl.program_id(0), 0), num_m, num_out, CUT.group_m)
    expert = tl.sum((until <= pid_m).to(tl.int32), 0)
    own = e == expert
    tile = pid_m - tl.sum(tl.where(own, until - tiles, 0), 0)
    first_m = tl.sum(tl.where(own, begins, 0), 0) + tile * CUT.block_m
    first_m = tl.where(is_left, first_m, M)
    return expert, first_m, tl.sum(tl.where(own, ends, 0), 0), pid_out * BLOCK_OUT, wrong


@triton.jit
def load_step(a, tile, k, first_m, cols, length, stride, CUT: tl.constexpr):
    """Columns k + `cols` of the first operand, by the copy engine or else from the addresses `tile`."""
    if CUT.by_engine:
        return a.load([first_m, k])
    elif CUT.even:
        return tl.load(tile + tl.cast(k, tl.int64) * stride)
    else:
        return tl.load(tile + tl.cast(k, tl.int64) * stride, mask=cols < length - k, other=0)


@triton.constexpr_function
def loads_ahead():
    """Whether loops that carry a tile load the weight one step earlier still: on Hopper, whose tensor cores would wait
    for it. That takes registers, which sm_80 and sm_120 do not have, and instructions, which nothing shows to pay on
    sm_100 and AMD."""
    return INTERPRETED.value or (cuda_capability_geq(9) and not cuda_capability_geq(10))


@triton.jit
def step_at(i, end, BLOCK: tl.constexpr):
    """Where the step of a contraction that holds i begins; beyond the end, the last step."""
    return tl.minimum(i, end - 1) // BLOCK * BLOCK


@triton.jit
def sample_of(group, sample_offset, DRAW: tl.constexpr):
    """The sample index that a row group sees, and 1 where its noise is negated, else 0."""
    sample = tl.cast(sample_offset, tl.uint32) + tl.cast(group, tl.uint32)
    if DRAW.antithetic:
        return sample >> 1, sample & 1
    else:
        return sample, sample * 0


@triton.jit
def weight_rows(BLOCK_N: tl.constexpr, DRAW: tl.constexpr):
    """The rows of a tile of the weight in the order in which they are loaded, a column of them.

    What one word or unit of noise covers goes into one thread, and `in_order` puts it back. A word of Rademacher signs
    covers four rows, loaded BLOCK_N / 4 places apart. A unit of near_gaussian covers rows n and n + 8, loaded
    BLOCK_N / 2 places apart, and 16 columns: the right eight stand in rows of their own, BLOCK_N further down, see
    `weight_cols`.
    """
    if DRAW.noise == "rademacher":
        row = 4 * tl.arange(0, BLOCK_N // 4)[None, :] + tl.arange(0, 4)[:, None]
        return tl.reshape(row, [BLOCK_N])[:, None]
    elif DRAW.noise == "near_gaussian" and DRAW.aligned:
        place = tl.arange(0, 2 * BLOCK_N)[:, None]
        pair = place % (BLOCK_N // 2)
        return pair // 8 * 16 + pair % 8 + place // (BLOCK_N // 2) % 2 * 8
    else:
        return tl.arange(0, BLOCK_N)[:, None]


@triton.jit
def weight_cols(BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DRAW: tl.constexpr):
    """The columns likewise, a row of them; of units (2 BLOCK_N, BLOCK_K / 2)."""
    if DRAW.noise == "near_gaussian" and DRAW.aligned:
        place = tl.arange(0, BLOCK_K // 2)[None, :]
        return place // 8 * 16 + place % 8 + tl.arange(0, 2 * BLOCK_N)[:, None] // BLOCK_N * 8
    else:
        return tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def weight_blocks(BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DRAW: tl.constexpr):
    """An eighth of the first of each eight columns of `weight_cols`, which are eight in a row."""
    if DRAW.noise == "near_gaussian" and DRAW.aligned:
        return 2 * tl.arange(0, BLOCK_K // 16)[None, :] + tl.arange(0, 2 * BLOCK_N)[:, None] // BLOCK_N
    else:
        return tl.arange(0, BLOCK_K // 8)[None, :]


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, DRAW: tl.constexpr):
    """x rounded, and where noise stays apart what that leaves, rounded as well."""
    high = round_to(x, DTYPE)
    if DRAW.apart:
        return high, round_to(x - high.to(tl.float32), DTYPE)
    else:
        return high, high


@triton.jit
def _quarters(x):
    """The rows of units: n and n + 8 on the left, the same on the right."""
    x = tl.permute(tl.reshape(x, [2, 2, x.shape[0] // 4, x.shape[1]]), (2, 3, 1, 0))
    left, right = tl.split(x)
    l0, l1 = tl.split(left)
    r0, r1 = tl.split(right)
    return l0, l1, r0, r1


@triton.jit
def _of_quarters(l0, l1, r0, r1):
    x = tl.permute(tl.join(tl.join(l0, l1), tl.join(r0, r1)), (3, 2, 0, 1))
    return tl.reshape(x, [4 * l0.shape[0], l0.shape[1]])


@triton.jit
def _from_pairs(x):
    """bfloat16 (R, 2 C) of x (R, C), see `held`."""
    low = x.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (x >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(low, high), [x.shape[0], 2 * x.shape[1]])


@triton.jit
def let_go(w, DRAW: tl.constexpr):
    """A tile that was `held`, as it is."""
    return _from_pairs(w) if DRAW.paired else w


@triton.jit
def _twice(x):
    """A pair of the same bfloat16, which the float32 x is."""
    bits = x.to(tl.uint32, bitcast=True)
    return bits | (bits >> 16)


@triton.jit
def factor(scale, negate, DTYPE: tl.constexpr, DRAW: tl.constexpr):
    """What multiplies the numbers drawn for a weight of type `DTYPE`, float32. Not of gaussian."""
    if DRAW.noise == "near_gaussian":
        scale = (scale.to(tl.float64) * ROOT_RECIPROCAL).to(tl.float32)
    if DTYPE == tl.bfloat16:
        scale = round_to(scale, DTYPE).to(tl.float32)
    if DRAW.antithetic:
        scale = scale * (1 - 2 * negate.to(tl.float32))
    return scale


@triton.jit
def _to_float(w, DRAW: tl.constexpr):
    ARITHMETIC: tl.constexpr = DRAW.arithmetic
    return floats(w) if DRAW.paired else to_float(w, ARITHMETIC)


@triton.jit
def _add_units(w, f, first_row, first_col, stream, sample, seed, DTYPE: tl.constexpr, DRAW: tl.constexpr):
    """`perturb_tile` of whole units of near_gaussian, w in their order."""
    ARITHMETIC: tl.constexpr = DRAW.arithmetic
    PAIRS: tl.constexpr = w.shape[0] // 4
    UNITS: tl.constexpr = w.shape[1] // (4 if DRAW.paired else 8)
    # Rows of a whole multiple of 16, so that half of it counts the pairs before.
    pairs = (tl.cast(first_row, tl.uint32) >> 1) + tl.arange(0, PAIRS).to(tl.uint32)
    units = (tl.cast(first_col, tl.uint32) >> 3) + 2 * tl.arange(0, UNITS).to(tl.uint32)
    left, right = near_gaussian_words(pairs[:, None], units[None, :], stream, sample, seed, ARITHMETIC)
    f0, f1, _, _ = _quarters(2 * f)
    w0, w1, w2, w3 = _quarters(w)
    if DRAW.paired and not DRAW.apart:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            PERTURBED_PTX,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
            [left, right, w0, w1, w2, w3, _twice(f0), _twice(f1)],
            (tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        w = _from_pairs(_of_quarters(w0, w1, w2, w3))
        return w, w
    else:
        m0, m1, m2, m3 = near_gaussian(left, right, ARITHMETIC)
        w0 = tl.fma(f0, m0, _to_float(w0, DRAW))
        w1 = tl.fma(f1, m1, _to_float(w1, DRAW))
        w2 = tl.fma(f0, m2, _to_float(w2, DRAW))
        w3 = tl.fma(f1, m3, _to_float(w3, DRAW))
        return _rounded(_of_quarters(w0, w1, w2, w3), DTYPE, DRAW)


@triton.jit
def _add_signs(w, f, signs, DTYPE: tl.constexpr, DRAW: tl.constexpr):
    """w +- f, by `signs` as `rademacher` has them."""
    if DRAW.paired and not DRAW.apart:
        # The bits of columns 2 q and 2 q + 1 go to the sign bits of a pair.
        shift = 15 - 2 * tl.arange(0, 4).to(tl.uint32)
        sign = (((signs & 0xFF) * 0x8001)[:, :, None] << shift[None, None, :]) & 0x80008000
        eps = tl.reshape(sign, w.shape) ^ _twice(f)
        w = _from_pairs(
            tl.inline_asm_elementwise(ADD_PTX, "=r,r,r", [w, eps], tl.uint32, is_pure=True, pack=1)
        )
        return w, w
    else:
        shift = 31 - tl.arange(0, 8).to(tl.uint32)
        sign = (signs[:, :, None] << shift[None, None, :]) & 0x80000000
        sign = tl.reshape(sign, [signs.shape[0], 8 * signs.shape[1]])
        eps = (f.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        return _rounded(_to_float(w, DRAW) + eps, DTYPE, DRAW)


@triton.jit
def perturb_tile(
    w,  # (BLOCK_N, BLOCK_K), in the order of `weight_rows` and `weight_cols`, and `held`
    scale,  # (BLOCK_N, 1) float32, of its rows
    rows,  # (BLOCK_N, 1), of all the weight
    first_row,  # of the tile in all the weight; scalar
    first_col,  # likewise, a multiple of 8
    stream,
    sample,
    negate,
    seed,
    DTYPE: tl.constexpr,  # of W
    DRAW: tl.constexpr,
):
    """W + eps, rounded once to the type of W; in the order in which it came, not `held`.

    And beside it, where noise stays apart, a tile of what the rounding took away: the noise, where W is large.
    """
    ALIGNED: tl.constexpr = DRAW.aligned
    BITS: tl.constexpr = DRAW.tile_bits
    ARITHMETIC: tl.constexpr = DRAW.arithmetic
    BLOCK_N: tl.constexpr = w.shape[0]
    BLOCK_K: tl.constexpr = w.shape[1] * (2 if DRAW.paired else 1)
    blocks = (tl.cast(first_col, tl.uint32) >> 3) + tl.arange(0, BLOCK_K // 8).to(tl.uint32)
    stream = tl.cast(stream, tl.uint32)
    rows = rows.to(tl.uint32)
    if DRAW.noise == "none":
        w = let_go(w, DRAW)
        return w, w
    elif DRAW.noise == "gaussian":
        c = scale * scale * RADIUS_FACTOR
        radius, direction = gaussian(rows, blocks[None, :], stream, sample, seed, c, ARITHMETIC)
        if DRAW.antithetic:
            radius = radius * (1 - 2 * negate.to(tl.float32))
        return _rounded(tl.fma(radius, direction, _to_float(w, DRAW)), DTYPE, DRAW)
    else:
        f = factor(scale, negate, DTYPE, DRAW)
        if DRAW.noise == "near_gaussian":
            if ALIGNED:
                return _add_units(w, f, first_row, first_col, stream, sample, seed, DTYPE, DRAW)
            else:
                halves = near_gaussian_anywhere(rows, blocks[None, :], stream, sample, seed, ARITHMETIC)
                return _rounded(tl.fma(2 * f, halves, _to_float(w, DRAW)), DTYPE, DRAW)
        elif DRAW.noise == "rademacher":
            if ALIGNED:
                first = 4 * tl.arange(0, BLOCK_N // 4).to(tl.uint32)
                rows = tl.cast(first_row, tl.uint32) + first[None, :, None]
            else:
                rows = tl.reshape(rows, [4, BLOCK_N // 4, 1])
            signs = rademacher(rows, blocks[None, None, :], stream, sample, seed, ALIGNED, ARITHMETIC)
            return _add_signs(w, f, signs, DTYPE, DRAW)
        else:
            ONE_TILE: tl.constexpr = ALIGNED and BLOCK_N <= 64 and BLOCK_K <= 64
            signs = hadamard(rows, blocks[None, :], stream, sample, seed, BITS, ONE_TILE, ARITHMETIC)
            return _add_signs(w, f, signs, DTYPE, DRAW)


@triton.jit
def in_order(w, DRAW: tl.constexpr):
    """A tile that was loaded in the order of `weight_rows` and `weight_cols`."""
    if DRAW.noise == "rademacher":
        quads = tl.reshape(w, [4, w.shape[0] // 4, w.shape[1]])
        return tl.reshape(tl.permute(quads, (1, 0, 2)), [w.shape[0], w.shape[1]])
    elif DRAW.noise == "near_gaussian" and DRAW.aligned:
        units = tl.reshape(
            w, [2, 2, w.shape[0] // 32, 8, w.shape[1] // 8, 8]
        )  # side, row / 8, of 16, row, unit, column
        return tl.reshape(tl.permute(units, (2, 1, 3, 4, 0, 5)), [w.shape[0] // 2, 2 * w.shape[1]])
    else:
        return w
