"""gptqmodel: GPTQ and AWQ layers whose kernels keep the words of the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantized import Packing, Parts, QuantizedWeight, number_table, readers
from .shared import SCALE_TYPES, class_of, described, expect, flat, flat_bytes, places

_GPTQ = ("TorchLinear", "TritonV2Linear")
_AWQ = ("AwqTorchLinear", "AwqGEMMLinear", "AwqGEMMTritonLinear")
_WORDS = (torch.int32, torch.int16, torch.int8, torch.int64)
# Place in its word of each of eight neighbours, 4 bits.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def read(source: Any) -> QuantizedWeight | None:
    name = class_of(source, "gptqmodel")
    if not name or not hasattr(source, "qweight"):
        return None
    expect(
        "source", name in _GPTQ + _AWQ,
        f"a gptqmodel layer that keeps the words of the checkpoint ({', '.join(_GPTQ + _AWQ)}): load the model with "
        "such a backend", name,
    )  # fmt: skip
    rotated = source.online_full_had or source.online_partial_had
    expect("source.had_K", not rotated, "no rotation of the input", "one")
    bits = source.bits
    expect("bits", bits in (2, 4, 8), "2, 4 or 8 (codes of others cross words)", bits)
    return _gptq(source, bits) if name in _GPTQ else _awq(source, bits)


readers[read] = ("gptqmodel GPTQ (2, 4, 8 bits)", "gptqmodel AWQ (2, 4, 8 bits)")


def _common(source: Any, bits: int, groups: int) -> tuple[int, int, Tensor, int]:
    """Sizes, scales (groups, N), bits of a word."""
    N, K = source.out_features, source.in_features
    scales = flat("scales", source.scales, SCALE_TYPES, groups * N)
    expect("qweight", source.qweight.dtype in _WORDS, "integers", described(source.qweight))
    return N, K, scales, 8 * source.qweight.element_size()


def _checked(name: str, value: Tensor, shape: tuple[int, int]) -> Tensor:
    expect(name, tuple(value.shape) == shape, f"shape {shape}", tuple(value.shape))
    return flat_bytes(name, value, _WORDS)


def _gptq(source: Any, bits: int) -> QuantizedWeight:
    """Words of columns, zeros in words of rows. Zeros are as its own `dequantize_weight` takes them: these kernels want
    format v2, whatever the checkpoint's was.
    """
    groups = source.qzeros.shape[0]
    N, K, scales, word = _common(source, bits, groups)
    per_word = word // bits
    codes = _checked("qweight", source.qweight, (-(-K // per_word), N))
    zero_words = -(-N // per_word)
    zeros = _checked("qzeros", source.qzeros, (groups, zero_words))
    group = flat("g_idx", source.g_idx, (torch.int32, torch.int64), K).long()
    if K:
        expect("g_idx", 0 <= int(group.min()) and int(group.max()) < groups, f"groups of {groups}",
               f"{int(group.min())} to {int(group.max())}")  # fmt: skip
    n, k = places(N, K, codes.device)
    packing = Packing(
        "gptq", N, K, source.scales.dtype, source.scales.dtype, bits, "uint", zero_bits=bits
    )  # fmt: skip
    parts = Parts(
        codes, number_table("uint", bits, codes.device), scales, zero=zeros,
        row_bits=word * n, col_bits=k // per_word * (word * N) + k % per_word * bits,
        row_scales=n, col_scales=group * N,
        row_zeros=n // per_word * word + n % per_word * bits, col_zeros=group * (word * zero_words),
    )  # fmt: skip
    return QuantizedWeight(packing, parts)


def _awq(source: Any, bits: int) -> QuantizedWeight:
    """Words of rows, of codes and of zeros."""
    K = source.in_features
    group = source.group_size
    groups = -(-K // group)
    N, _, scales, word = _common(source, bits, groups)
    words = -(-N * bits // word)
    codes = _checked("qweight", source.qweight, (K, words))
    zeros = _checked("qzeros", source.qzeros, (groups, words))
    n, k = places(N, K, codes.device)
    order = n
    if bits == 4:
        order = n // 8 * 8 + torch.tensor(_AWQ_ORDER, device=n.device)[n % 8]
    packing = Packing("awq", N, K, source.scales.dtype, source.scales.dtype, bits, "uint", zero_bits=bits)
    parts = Parts(
        codes, number_table("uint", bits, codes.device), scales, zero=zeros,
        row_bits=order * bits, col_bits=k * (word * words), row_scales=n, col_scales=k // group * N,
        row_zeros=order * bits, col_zeros=k // group * (word * words),
    )  # fmt: skip
    return QuantizedWeight(packing, parts)
