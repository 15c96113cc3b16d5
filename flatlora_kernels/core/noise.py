"""The noise specification in readable PyTorch: the oracle every backend is tested against.

A value ``z[n, k]`` is a function of ``(seed, stream, sample, n, k)`` and of nothing else. The bits are
those of docs/internals/noise.md: Philox4x32-10 (Salmon et al., SC 2011) on global indices, then Box-Muller with 16-bit
uniforms (``gaussian``) or one bit per value (``rademacher``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .records import Draw

KINDS = ("gaussian", "rademacher")

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


def standard_noise(
    num_rows: int,
    num_cols: int,
    *,
    seed: Tensor,
    stream: int = 0,
    sample: int = 0,
    noise: str = "gaussian",
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """The tile ``z[row_offset : row_offset + num_rows, col_offset : col_offset + num_cols]``.

    Args:
        seed: 0-d int64 tensor; the tile is drawn on its device. Its value is never read back.
        stream, sample, row_offset, col_offset: uint32, any.

    Returns:
        (num_rows, num_cols) float64.
    """
    device = seed.device
    n = torch.arange(row_offset, row_offset + num_rows, device=device)[:, None]  # (num_rows, 1)
    first_block = col_offset >> 3
    num_blocks = ((col_offset + num_cols + 7) >> 3) - first_block
    block = torch.arange(first_block, first_block + num_blocks, device=device)  # (num_blocks,)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    row_counter = n if noise == "gaussian" else n >> 4
    counter = (block, row_counter, torch.full_like(n, stream), torch.full_like(n, sample))
    words = philox4x32_10(counter, key)  # 4 x (num_rows, num_blocks)
    if noise == "gaussian":
        pairs = [z for word in words for z in _gaussian_pair(word)]  # columns 0..7 of each block
        z = torch.stack(pairs, dim=-1)
    else:
        i = n & 15
        word = torch.stack(words, dim=-1).gather(-1, (i >> 2).expand(-1, num_blocks)[..., None])
        bit = 8 * (i & 3)[..., None] + torch.arange(8, device=device)  # (num_rows, 1, 8)
        z = 1.0 - 2.0 * ((word >> bit) & 1).double()
    skip = col_offset & 7
    return z.reshape(num_rows, num_blocks * 8)[:, skip : skip + num_cols]


def epsilon(draw: Draw, num_cols: int, group: int = 0) -> Tensor:
    """``eps = noise_scale[:, None] * z`` of one row group, (N, num_cols) float32."""
    sample, sign = draw.sample_and_sign(group)
    z = standard_noise(
        draw.noise_scale.shape[0],
        num_cols,
        seed=draw.seed,
        stream=draw.stream,
        sample=sample,
        noise=draw.noise,
        row_offset=draw.row_offset,
        col_offset=draw.col_offset,
    )
    return draw.noise_scale[:, None] * (sign * z).float()
