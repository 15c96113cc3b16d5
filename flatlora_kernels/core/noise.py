"""The noise specification in readable PyTorch: the oracle every backend is tested against.

A value ``z[n, k]`` is a function of ``(seed, stream, sample, n, k)`` and of nothing else. The bits are
those of docs/internals/noise.md: Philox4x32-10 (Salmon et al., SC 2011) on global indices, then Box-Muller with 16-bit
uniforms (``gaussian``), sums of four small integers (``near_gaussian``), one bit per value (``rademacher``) or Walsh
tiles between random signs (``hadamard``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .records import Draw

KINDS = ("gaussian", "near_gaussian", "rademacher", "hadamard")

NEAR_GAUSSIAN_VARIANCE = 665  # of its integers
_LEVELS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28)
MOST_TILE_BITS = 12

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mulhilo(multiplier: int, value: Tensor) -> tuple[Tensor, Tensor]:
    # The int64 product wraps modulo 2**64, so its bits are those of the unsigned product.
    product = value * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox4x32_10(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words per counter.

    Args:
        counter: four int64 tensors that broadcast, each holding values in [0, 2**32).
        key: two int64 tensors likewise.

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mulhilo(_MULTIPLIERS[0], c0)
        hi1, lo1 = _mulhilo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _gaussian_pair(word: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller in float64: the radius from the low 16 bits, the angle from the high 16 bits."""
    uniform = ((word & 0xFFFF).double() + 0.5) / 65536
    radius = torch.sqrt(-2 * torch.log(uniform))
    theta = (word >> 16).double() * (2 * math.pi / 65536)
    return radius * torch.cos(theta), radius * torch.sin(theta)


def tile_bits(out_features: int, in_features: int) -> int:
    """t of ``hadamard``: its tiles are 2^t square, the largest that fit a layer of this shape, 4096 at most."""
    smaller = min(out_features, in_features)
    # Comparisons, because sizes may be symbols.
    for bits in range(MOST_TILE_BITS, 0, -1):
        if smaller >= 1 << bits:
            return bits
    return 0


def _words(c0: Tensor, c1: Tensor, stream: int, sample: int, seed: Tensor) -> tuple[Tensor, ...]:
    rest = (torch.full_like(c0, stream), torch.full_like(c0, sample))
    return philox4x32_10((c0, c1, *rest), (seed & _MASK, (seed >> 32) & _MASK))


def _pick(words: tuple[Tensor, ...], index: Tensor) -> Tensor:
    """Of each four words that of its index."""
    stacked = torch.stack(words, dim=-1)
    return stacked.gather(-1, index.expand(stacked.shape[:-1])[..., None])[..., 0]


def _gaussian(n: Tensor, block: Tensor, *draw: Any) -> Tensor:
    pairs = [
        z for word in _words(block, n, *draw) for z in _gaussian_pair(word)
    ]  # columns 0..7 of each block
    return torch.stack(pairs, dim=-1).flatten(1)


def _rademacher(n: Tensor, block: Tensor, *draw: Any) -> Tensor:
    i = n & 15
    word = _pick(_words(block, n >> 4, *draw), i >> 2)
    bit = 8 * (i & 3)[..., None] + torch.arange(8, device=n.device)  # (rows, 1, 8)
    return (1 - 2 * ((word[..., None] >> bit) & 1)).flatten(1)


def _levels(words: tuple[Tensor, ...]) -> Tensor:
    """Values of the 8 columns of a block, (rows, blocks, 8)."""
    word = torch.stack(words, dim=-1)[..., None]
    shift = 16 * torch.arange(2, device=word.device)
    magnitude = torch.tensor(_LEVELS, device=word.device)[(word >> (5 + shift)) & 15]
    return (magnitude * (1 - 2 * ((word >> (15 + shift)) & 1))).flatten(-2)


def _near_gaussian(n: Tensor, block: Tensor, *draw: Any) -> Tensor:
    def values(block: Tensor) -> tuple[Tensor, Tensor]:
        words = _words(block, 8 * (n >> 4) + (n & 7), *draw)
        rotated = tuple((w >> 5) | (w << 27 & _MASK) for w in words)
        return _levels(words), _levels(rotated)

    (a, b), (c, d) = values(block & ~1), values(block | 1)
    row_sign = (1 - 2 * (n >> 3 & 1))[..., None]
    col_sign = (1 - 2 * (block & 1))[..., None]
    return (a + row_sign * b + col_sign * (c + row_sign * d)).flatten(1)


def _reverse(value: Tensor, bits: int) -> Tensor:
    """The low bits of a value, the last one first."""
    return sum(((value >> bit) & 1) << (bits - 1 - bit) for bit in range(bits)) + torch.zeros_like(value)


def _hadamard(rows: range, cols: range, bits: int, stream: int, sample: int, seed: Tensor) -> Tensor:
    n, k = (torch.arange(r.start, r.stop, device=seed.device) for r in (rows, cols))

    def signs(which: int, own: Tensor, other: range) -> Tensor:
        """Bits of the indices `own` in each tile of the `other` index, (len(other), len(own))."""
        tiles = torch.arange(other.start >> bits, (other.stop - 1 >> bits) + 1, device=own.device)
        c0, c1 = torch.broadcast_tensors(which + (own >> 7), tiles[:, None])
        words = _words(c0, c1, stream, sample, seed)
        found = _pick(words, own >> 5 & 3) >> (own & 31) & 1
        return found[(torch.arange(other.start, other.stop, device=own.device) >> bits) - tiles[:1]]

    odd = signs(0x80000000, n, cols).t() ^ signs(0xC0000000, k, rows)
    tile = (1 << bits) - 1
    both = _reverse(n & tile, bits)[:, None] & k & tile
    for shift in (8, 4, 2, 1):
        both = both ^ (both >> shift)
    return 1 - 2 * (odd ^ both & 1)


def drawn_noise(
    num_rows: int,
    num_cols: int,
    *,
    seed: Tensor,
    stream: int = 0,
    sample: int = 0,
    noise: str = "gaussian",
    row_offset: int = 0,
    col_offset: int = 0,
    tile_bits: int = 0,
) -> Tensor:
    """`standard_noise`, except that ``near_gaussian`` has its integers `m`; what `factor` multiplies."""
    device = seed.device
    if noise == "hadamard":
        rows, cols = (range(o, o + size) for o, size in ((row_offset, num_rows), (col_offset, num_cols)))
        return _hadamard(rows, cols, tile_bits, stream, sample, seed).double()
    n = torch.arange(row_offset, row_offset + num_rows, device=device)[:, None]  # (num_rows, 1)
    first_block = col_offset >> 3
    block = torch.arange(first_block, (col_offset + num_cols + 7) >> 3, device=device)[None, :]
    draw = {"gaussian": _gaussian, "near_gaussian": _near_gaussian, "rademacher": _rademacher}[noise]
    z = draw(*torch.broadcast_tensors(n, block), stream, sample, seed)
    skip = col_offset & 7
    return z[:, skip : skip + num_cols].double()


def standard_noise(num_rows: int, num_cols: int, *, noise: str = "gaussian", **which: Any) -> Tensor:
    """The tile ``z[row_offset : row_offset + num_rows, col_offset : col_offset + num_cols]``.

    Args:
        noise: one of KINDS.
        seed: 0-d int64 tensor; the tile is drawn on its device. Its value is never read back.
        stream, sample, row_offset, col_offset: uint32, any; default 0.
        tile_bits: of ``hadamard``, see the function of that name.

    Returns:
        (num_rows, num_cols) float64.
    """
    z = drawn_noise(num_rows, num_cols, noise=noise, **which)
    return z / math.sqrt(NEAR_GAUSSIAN_VARIANCE) if noise == "near_gaussian" else z


def factor(noise_scale: Tensor, noise: str, dtype: torch.dtype) -> Tensor:
    """What multiplies the numbers drawn for a weight of type `dtype`, (N,) float32."""
    if noise == "near_gaussian":
        # By a tensor: a division by a Python number may become a product with its reciprocal.
        noise_scale = noise_scale / torch.full_like(noise_scale, math.sqrt(NEAR_GAUSSIAN_VARIANCE))
    if noise != "gaussian" and dtype == torch.bfloat16:
        noise_scale = noise_scale.to(dtype).float()
    return noise_scale


def epsilon(draw: Draw, num_cols: int, dtype: torch.dtype, group: int = 0) -> Tensor:
    """``eps`` of one row group as a weight of type `dtype` sees it, (N, num_cols) float32."""
    sample, sign = draw.sample_and_sign(group)
    drawn = drawn_noise(
        draw.noise_scale.shape[0],
        num_cols,
        seed=draw.seed,
        stream=draw.stream,
        sample=sample,
        noise=draw.noise,
        row_offset=draw.row_offset,
        col_offset=draw.col_offset,
        tile_bits=draw.tile_bits,
    )
    return factor(draw.noise_scale, draw.noise, dtype)[:, None] * (sign * drawn).float()
