"""What the kernels share: the perturbed tile, products that the interpreter gets right, and the order of tiles."""

import os
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .philox import RADIUS_FACTOR, gaussian, rademacher


@dataclass(frozen=True)
class Drawn:
    """All of a draw that machine code depends on; kernels take it as one constant, `DRAW`."""

    noise: str
    antithetic: bool
    aligned: bool  # the tile's first row is a multiple of 4 in all the weight
    arithmetic: str  # see philox.py
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


# The interpreter multiplies bfloat16 as if it were integers, and cuts where it should round.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

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
def round_to(x, DTYPE: tl.constexpr):
    """float32 to `DTYPE`, to the nearest."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True).to(tl.uint64)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.uint32)
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if _INTERPRETED:
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
    return _INTERPRETED.value or (cuda_capability_geq(9) and not cuda_capability_geq(10))


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
    """The order in which the rows of a tile of the weight are loaded, (BLOCK_N, 1).

    A word of Rademacher signs covers four rows. They are loaded BLOCK_N / 4 places apart, which puts them into one
    thread; `in_order` puts them back.
    """
    if DRAW.noise == "rademacher":
        row = 4 * tl.arange(0, BLOCK_N // 4)[None, :] + tl.arange(0, 4)[:, None]
        return tl.reshape(row, [BLOCK_N])[:, None]
    else:
        return tl.arange(0, BLOCK_N)[:, None]


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, DRAW: tl.constexpr):
    """x rounded, and where noise stays apart what that leaves, rounded as well."""
    high = round_to(x, DTYPE)
    if DRAW.apart:
        return high, round_to(x - high.to(tl.float32), DTYPE)
    else:
        return high, high


@triton.jit
def perturb_tile(
    w,  # (BLOCK_N, BLOCK_K), rows in the order of `weight_rows`
    scale,  # (BLOCK_N, 1) float32, of its rows
    rows,  # (BLOCK_N, 1), of all the weight
    first_row,  # of the tile in all the weight; scalar
    first_col,  # likewise, a multiple of 8
    stream,
    sample,
    negate,
    seed,
    DRAW: tl.constexpr,
):
    """W + eps, rounded once to the type of W; (BLOCK_N, BLOCK_K), rows still in the order of `weight_rows`.

    And beside it, where noise stays apart, a tile of what the rounding took away: the noise, where W is large.
    """
    ALIGNED: tl.constexpr = DRAW.aligned
    ARITHMETIC: tl.constexpr = DRAW.arithmetic
    BLOCK_N: tl.constexpr = w.shape[0]
    BLOCK_K: tl.constexpr = w.shape[1]
    blocks = (tl.cast(first_col, tl.uint32) >> 3) + tl.arange(0, BLOCK_K // 8).to(tl.uint32)
    stream = tl.cast(stream, tl.uint32)
    rows = rows.to(tl.uint32)
    w_float = to_float(w, ARITHMETIC)
    if DRAW.noise == "gaussian":
        c = scale * scale * RADIUS_FACTOR
        radius, direction = gaussian(rows, blocks[None, :], stream, sample, seed, c, ARITHMETIC)
        if DRAW.antithetic:
            radius = radius * (1 - 2 * negate.to(tl.float32))
        return _rounded(tl.fma(radius, direction, w_float), w.dtype, DRAW)
    else:
        if ALIGNED:
            rows = tl.cast(first_row, tl.uint32) + 4 * tl.arange(0, BLOCK_N // 4).to(tl.uint32)[None, :, None]
        else:
            rows = tl.reshape(rows, [4, BLOCK_N // 4, 1])
        if DRAW.antithetic:
            scale = scale * (1 - 2 * negate.to(tl.float32))
        sign = rademacher(rows, blocks[None, None, :], stream, sample, seed, ALIGNED)
        eps = (scale.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        return _rounded(w_float + eps, w.dtype, DRAW)


@triton.jit
def in_order(w, DRAW: tl.constexpr):
    """The rows of a tile that were loaded in the order of `weight_rows`."""
    if DRAW.noise == "rademacher":
        quads = tl.reshape(w, [4, w.shape[0] // 4, w.shape[1]])
        return tl.reshape(tl.permute(quads, (1, 0, 2)), [w.shape[0], w.shape[1]])
    else:
        return w
