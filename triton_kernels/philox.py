"""The noise of docs/internals/noise.md inside a Triton kernel: Philox4x32-10 and what becomes of its words.

`ARITHMETIC` names the approximations of ln, sqrt, sin and cos: "ptx" (special-function unit of NVIDIA), "amdgcn"
(that of AMD) or "plain" (any target, and the interpreter; tests compare the others with it).
"""

import triton
import triton.language as tl

# -2 ln 2: R = sqrt(-2 ln U) = sqrt(-2 ln 2 * lg2 U), and with the row scale inside the root it costs no multiply.
RADIUS_FACTOR = tl.constexpr(-1.3862943611198906)

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
def philox(c0, c1, c2, c3, seed):
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
        c0 = (product1 >> 32).to(tl.uint32) ^ (c1 ^ round_key0)
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ (c3 ^ round_key1)
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
    w0, w1, w2, w3 = philox(blocks, rows, stream, sample, seed)
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
def rademacher(rows, blocks, stream, sample, seed, ALIGNED: tl.constexpr):
    """The sign bits, those of -1 set, of Q quads of rows: (4 Q, 8 C) uint32, the rows in the order of `quads`.

    rows: (4, Q, 1) uint32, global; (1, Q, 1) where ALIGNED: these are multiples of 4 and stand for the quads, whose
    rows share a word. blocks: (1, 1, C) uint32, column / 8.
    """
    if ALIGNED:
        place = tl.arange(0, 4).to(tl.uint32)[:, None, None]
    else:
        place = rows & 3
    w0, w1, w2, w3 = philox(blocks, rows >> 4, stream, sample, seed)
    q = (rows >> 2) & 3
    word = tl.where(q < 2, tl.where(q == 0, w0, w1), tl.where(q == 2, w2, w3))
    # The bit 8 * (row % 4) + column % 8, moved to the sign's place.
    shift = 31 - 8 * place[:, :, :, None] - tl.arange(0, 8).to(tl.uint32)[None, None, None, :]
    sign = (word[:, :, :, None] << shift) & 0x80000000
    return tl.reshape(sign, [4 * sign.shape[1], 8 * sign.shape[2]])
