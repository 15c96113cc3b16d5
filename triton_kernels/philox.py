"""The noise of docs/internals/noise.md inside a Triton kernel: Philox4x32-10 and what becomes of its words.

`ARITHMETIC` names the approximations of ln, sqrt, sin and cos: "ptx" (special-function unit of NVIDIA), "amdgcn"
(that of AMD) or "plain" (any target, and the interpreter; tests compare the others with it).
"""

import triton
import triton.language as tl

# -2 ln 2: R = sqrt(-2 ln U) = sqrt(-2 ln 2 * lg2 U), and with the row scale inside the root it costs no multiply.
RADIUS_FACTOR = tl.constexpr(-1.3862943611198906)

# First words of the counters of the signs of a Walsh tile.
WALSH_ROWS, WALSH_COLUMNS = tl.constexpr(0x80000000), tl.constexpr(0xC0000000)

# 1 / sqrt(665) in float64, of the root in float32. A product with it rounds to the float32 that a division by the root
# gives: no quotient is as near to the middle between two as the product is off.
ROOT_RECIPROCAL = tl.constexpr(1 / 25.787593841552734)

# Of two columns of a unit, whose words are $4 on the left and $5 on the right: row n and row n + 8 on the left, then on
# the right, pairs of bfloat16. What the masks leave of a word is a pair of subnormal numbers, 2^-128 times the value.
# Times 2^127, sums are m / 2, and 2 f is finite because f is noise_scale / sqrt(665). sm_80 adds by fma alone.
_UNIT_PTX = """{
    .reg .b32 a, b, c, d, p, q, r, s, big, nought, one, minus, two;
    mov.b32 big, 0x7f007f00;
    mov.b32 nought, 0x80008000;
    mov.b32 one, 0x3f803f80;
    mov.b32 minus, 0xbf80bf80;
    mov.b32 two, 0xc000c000;
    and.b32 a, $4, 0x81e081e0;
    shf.r.wrap.b32 b, $4, $4, 5;
    and.b32 b, b, 0x81e081e0;
    and.b32 c, $5, 0x81e081e0;
    shf.r.wrap.b32 d, $5, $5, 5;
    and.b32 d, d, 0x81e081e0;
    fma.rn.bf16x2 b, b, big, nought;
    fma.rn.bf16x2 p, a, big, b;
    fma.rn.bf16x2 q, b, two, p;
    fma.rn.bf16x2 d, d, big, nought;
    fma.rn.bf16x2 r, c, big, d;
    fma.rn.bf16x2 s, d, two, r;
    fma.rn.bf16x2 a, p, one, r;
    fma.rn.bf16x2 b, q, one, s;
    fma.rn.bf16x2 c, r, minus, p;
    fma.rn.bf16x2 d, s, minus, q;
"""
# m / 2, and W + eps of W in $6 to $9 and 2 f in $10 and $11.
_HALVES_PTX = tl.constexpr(_UNIT_PTX + "mov.b32 $0, a; mov.b32 $1, b; mov.b32 $2, c; mov.b32 $3, d; }")
PERTURBED_PTX = tl.constexpr(
    _UNIT_PTX
    + """
    fma.rn.bf16x2 $0, a, $10, $6;
    fma.rn.bf16x2 $1, b, $11, $7;
    fma.rn.bf16x2 $2, c, $10, $8;
    fma.rn.bf16x2 $3, d, $11, $9;
    }"""
)
_XOR_PTX = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0x96;")
ADD_PTX = tl.constexpr("{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2; }")

# Of one word: R = sqrt(c lg2((u + 0.5) / 2^16)), cos and sin of 2 pi v / 2^16. Bytes 4b00 above 16 bits are the float
# 2^23 + those bits, and the fused multiply-adds take the 2^23 off: the first exactly, the second with one rounding.
_GAUSSIAN_PTX = tl.constexpr(
    """{
    .reg .b32 u, v;
    .reg .f32 r, t;
    prmt.b32 u, $3, 0x4b00, 0x5410;
    prmt.b32 v, $3, 0x4b00, 0x5432;
    fma.rn.ftz.f32 r, u, 0f37800000, 0fC2FFFFFF;
    fma.rn.ftz.f32 t, v, 0f38C90FDB, 0fC4490FDB;
    lg2.approx.ftz.f32 r, r;
    mul.ftz.f32 r, r, $4;
    sqrt.approx.ftz.f32 $0, r;
    cos.approx.ftz.f32 $1, t;
    sin.approx.ftz.f32 $2, t;
    }"""
)


@triton.jit
def philox(c0, c1, c2, c3, seed, ARITHMETIC: tl.constexpr):
    """Four uint32 words per counter. Counters of different shapes broadcast as late as the rounds allow, so that what
    rows or columns share is computed once."""
    # Written out, because calls are what takes time in the interpreter; sums of 64 bits, because it warns where 32
    # overflow.
    key0 = seed.to(tl.uint32).to(tl.uint64)
    key1 = (seed >> 32).to(tl.uint32).to(tl.uint64)
    for r in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        round_key0 = (key0 + (r * 0x9E3779B9) % 0x100000000).to(tl.uint32)
        round_key1 = (key1 + (r * 0xBB67AE85) % 0x100000000).to(tl.uint32)
        high0, high1 = (product0 >> 32).to(tl.uint32), (product1 >> 32).to(tl.uint32)
        if ARITHMETIC == "ptx":
            # By name, or the compiler keeps the upper word in 64 bits, and multiplies all of them.
            c0 = tl.inline_asm_elementwise(
                _XOR_PTX, "=r,r,r,r", [high1, c1, round_key0], tl.uint32, is_pure=True, pack=1
            )
            c2 = tl.inline_asm_elementwise(
                _XOR_PTX, "=r,r,r,r", [high0, c3, round_key1], tl.uint32, is_pure=True, pack=1
            )
        else:
            c0 = high1 ^ (c1 ^ round_key0)
            c2 = high0 ^ (c3 ^ round_key1)
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
    return c0, c1, c2, c3


def _amdgcn(name):
    """A special-function instruction of AMD by its LLVM intrinsic: of arguments that need no range reduction."""

    @tl.core.extern
    def call(x, _semantic=None):
        symbols = {(tl.float32,): (f"llvm.amdgcn.{name}.f32", tl.float32)}
        return tl.core.extern_elementwise("", "", [x], symbols, is_pure=True, _semantic=_semantic)

    return call


_amdgcn_log2 = _amdgcn("log")
_amdgcn_sqrt = _amdgcn("sqrt")
_amdgcn_cos = _amdgcn("cos")  # of turns
_amdgcn_sin = _amdgcn("sin")


@triton.jit
def box_muller(word, c, ARITHMETIC: tl.constexpr):
    """(R, cos, sin) of one word, R = sqrt(c lg2 U); `c` is RADIUS_FACTOR times the square of the scale."""
    word, c = tl.broadcast(word, c)
    if ARITHMETIC == "ptx":
        return tl.inline_asm_elementwise(
            _GAUSSIAN_PTX,
            "=f,=f,=f,r,f",
            [word, c],
            (tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    u = (word & 0xFFFF).to(tl.float32)
    v = (word >> 16).to(tl.float32)
    uniform = tl.fma(u, 1 / 65536, 0.5 / 65536)
    if ARITHMETIC == "amdgcn":
        turns = v * (1 / 65536)
        return _amdgcn_sqrt(_amdgcn_log2(uniform) * c), _amdgcn_cos(turns), _amdgcn_sin(turns)
    else:
        theta = v * 9.587379924285257e-05  # 2 pi / 65536
        return tl.sqrt(tl.log2(uniform) * c), tl.cos(theta), tl.sin(theta)


@triton.jit
def gaussian(rows, blocks, stream, sample, seed, c, ARITHMETIC: tl.constexpr):
    """`radius` and `direction`, both (R, 8 C), whose product is eps.

    rows: (R, 1) uint32, global; blocks: (1, C) uint32, column / 8; c: (R, 1), see `box_muller`.
    """
    w0, w1, w2, w3 = philox(blocks, rows, stream, sample, seed, ARITHMETIC)
    r0, cos0, sin0 = box_muller(w0, c, ARITHMETIC)
    r1, cos1, sin1 = box_muller(w1, c, ARITHMETIC)
    r2, cos2, sin2 = box_muller(w2, c, ARITHMETIC)
    r3, cos3, sin3 = box_muller(w3, c, ARITHMETIC)
    # Column 8 * block + 2 * q + parity: joined so that a thread keeps the eight columns of its block.
    shape: tl.constexpr = [w0.shape[0], 8 * w0.shape[1]]
    radius = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    even = tl.join(tl.join(cos0, cos2), tl.join(cos1, cos3))
    odd = tl.join(tl.join(sin0, sin2), tl.join(sin1, sin3))
    return tl.reshape(tl.join(radius, radius), shape), tl.reshape(tl.join(even, odd), shape)


@triton.jit
def rademacher(rows, blocks, stream, sample, seed, ALIGNED: tl.constexpr, ARITHMETIC: tl.constexpr):
    """The signs of Q quads of rows: (4 Q, C) uint32, the rows in the order of `weight_rows`; bit j is that of the
    block's column j, set where z is -1. What stands above eight bits is of no meaning.

    rows: (4, Q, 1) uint32, global; (1, Q, 1) where ALIGNED: these are multiples of 4 and stand for the quads, whose
    rows share a word. blocks: (1, 1, C) uint32, column / 8.
    """
    if ALIGNED:
        place = tl.arange(0, 4).to(tl.uint32)[:, None, None]
    else:
        place = rows & 3
    w0, w1, w2, w3 = philox(blocks, rows >> 4, stream, sample, seed, ARITHMETIC)
    signs = _pick(w0, w1, w2, w3, (rows >> 2) & 3) >> (8 * place)
    return tl.reshape(signs, [4 * signs.shape[1], signs.shape[2]])


@triton.jit
def _pick(w0, w1, w2, w3, which):
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def mirrored(n, BITS: tl.constexpr):
    """The low BITS bits of n in reverse."""
    n = ((n >> 1) & 0x55555555) | ((n & 0x55555555) << 1)
    n = ((n >> 2) & 0x33333333) | ((n & 0x33333333) << 2)
    n = ((n >> 4) & 0x0F0F0F0F) | ((n & 0x0F0F0F0F) << 4)
    n = ((n >> 8) & 0x00FF00FF) | ((n & 0x00FF00FF) << 8)
    return ((n >> 16) | (n << 16)) >> (32 - BITS) if BITS > 0 else n * 0


@triton.jit
def odd(x):
    """1 where an odd number of the low 16 bits is set."""
    x = x ^ (x >> 8)
    x = x ^ (x >> 4)
    x = x ^ (x >> 2)
    return (x ^ (x >> 1)) & 1


@triton.jit
def walsh_words(index, tile, BASE: tl.constexpr, stream, sample, seed, ARITHMETIC: tl.constexpr):
    """The words with the random signs of `index`, a row or column, in a tile of the other; the sign's bit is
    `index % 32`. BASE: ROWS or COLUMNS."""
    w0, w1, w2, w3 = philox((index >> 7) + BASE, tile, stream, sample, seed, ARITHMETIC)
    return _pick(w0, w1, w2, w3, (index >> 5) & 3)


@triton.jit
def hadamard(
    rows, blocks, stream, sample, seed, BITS: tl.constexpr, ONE_TILE: tl.constexpr, ARITHMETIC: tl.constexpr
):
    """The signs of (R, C) blocks of eight columns as `rademacher` has them.

    rows: (R, 1) uint32, global; blocks: (1, C) uint32, column / 8. ONE_TILE: they lie in one tile of rows and one of
    columns, so that a word serves 32 of them.
    """
    columns = blocks * 8
    rev = mirrored(rows, BITS)
    low = (rev & 1) * 0xAA ^ (rev >> 1 & 1) * 0xCC ^ (rev >> 2 & 1) * 0xF0
    if ONE_TILE:
        down = tl.min(columns, axis=1, keep_dims=True) >> BITS
        across = tl.min(rows, axis=0, keep_dims=True) >> BITS
    else:
        down = columns >> BITS
        across = rows >> BITS
    by_column = walsh_words(columns, across, WALSH_COLUMNS, stream, sample, seed, ARITHMETIC) >> (
        columns & 31
    )
    signs = low ^ by_column ^ odd(rev & columns) * 0xFF
    if BITS >= 3:
        by_row = walsh_words(rows, down, WALSH_ROWS, stream, sample, seed, ARITHMETIC) >> (rows & 31)
        return signs ^ (by_row & 1) * 0xFF
    else:
        WIDTH: tl.constexpr = 1 << BITS
        for part in tl.static_range(0, 8 // WIDTH):
            down = (columns >> BITS) + part
            by_row = walsh_words(rows, down, WALSH_ROWS, stream, sample, seed, ARITHMETIC) >> (rows & 31)
            signs = signs ^ (by_row & 1) * (((1 << WIDTH) - 1) << (part * WIDTH))
        return signs


@triton.jit
def in_turn(w0, w1, w2, w3):
    """(R, 4 C) of four tensors (R, C): their values in turn."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [w0.shape[0], 4 * w0.shape[1]])


@triton.jit
def near_gaussian_words(pairs, units, stream, sample, seed, ARITHMETIC: tl.constexpr):
    """The words of the left and of the right half of units, (R, 4 U), one for two columns.

    pairs: (R, 1) uint32, 8 * (row // 16) + row % 8. units: (1, U) uint32, 2 * (column // 16).
    """
    l0, l1, l2, l3 = philox(units, pairs, stream, sample, seed, ARITHMETIC)
    r0, r1, r2, r3 = philox(units + 1, pairs, stream, sample, seed, ARITHMETIC)
    return in_turn(l0, l1, l2, l3), in_turn(r0, r1, r2, r3)


@triton.jit
def _levels(word):
    """Half of the values of two columns, (R, 2 C) float32, of words (R, C)."""
    shift = 16 - 16 * tl.arange(0, 2).to(tl.uint32)
    bits = (word[:, :, None] << shift[None, None, :]) & 0x81E00000
    level = bits.to(tl.float32, bitcast=True) * 1.7014118346046923e38  # 2^127, because they are subnormal
    return tl.reshape(level, [word.shape[0], 2 * word.shape[1]])


@triton.jit
def _turned(word):
    return (word >> 5) | (word << 27)


@triton.jit
def floats(x):
    """float32 (R, 2 C) of pairs of bfloat16, (R, C) uint32."""
    low, high = (x << 16).to(tl.float32, bitcast=True), (x & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), [x.shape[0], 2 * x.shape[1]])


@triton.jit
def near_gaussian(left, right, ARITHMETIC: tl.constexpr):
    """m / 2 of units: rows n and n + 8 on the left, the same on the right, each (R, 8 U) float32.

    left, right: (R, 4 U), see `near_gaussian_words`.
    """
    if ARITHMETIC == "ptx":
        l0, l1, r0, r1 = tl.inline_asm_elementwise(
            _HALVES_PTX, "=r,=r,=r,=r,r,r", [left, right], (tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True, pack=1,
        )  # fmt: skip
        return floats(l0), floats(l1), floats(r0), floats(r1)
    else:
        a, b, c, d = _levels(left), _levels(_turned(left)), _levels(right), _levels(_turned(right))
        return (a + b) + (c + d), (a - b) + (c - d), (a + b) - (c + d), (a - b) - (c - d)


@triton.jit
def near_gaussian_anywhere(rows, blocks, stream, sample, seed, ARITHMETIC: tl.constexpr):
    """m / 2, (R, 8 C) float32, of rows (R, 1) and columns that do not make whole units; blocks: (1, C), column / 8."""
    units = blocks & 0xFFFFFFFE
    left, right = near_gaussian_words(8 * (rows >> 4) + (rows & 7), units, stream, sample, seed, ARITHMETIC)
    l0, l1, r0, r1 = near_gaussian(left, right, "plain")
    lower = (rows & 8) != 0
    side = tl.reshape(tl.broadcast_to((blocks & 1)[:, :, None], [1, blocks.shape[1], 8]), [1, l0.shape[1]])
    return tl.where(side == 0, tl.where(lower, l1, l0), tl.where(lower, r1, r0))
