"""hqq: `HQQLinear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantized import Packing, Parts, QuantizedWeight, number_table, readers
from .shared import SCALE_TYPES, class_of, described, expect, flat, flat_bytes, matrix, places

# Bits of a code, codes in a word, bytes of a word.
_PACKINGS = {
    "8bit_u8": (8, 1, 1),
    "4bit_u8": (4, 2, 1),
    "3bit_32": (3, 10, 4),
    "2bit_u8": (2, 4, 1),
    "1bit_u8": (1, 8, 1),
}


def read(source: Any) -> QuantizedWeight | None:
    if class_of(source, "hqq") != "HQQLinear":
        return None
    meta, words = source.meta, source.W_q
    expect("meta", meta is not None and words is not None, "a quantised layer", None)
    N, K = matrix("meta['shape']", meta["shape"])
    expect("meta['packing']", meta["packing"] in _PACKINGS, f"one of {', '.join(_PACKINGS)}", meta["packing"])
    bits, per_word, size = _PACKINGS[meta["packing"]]
    dtype = meta.get("compute_dtype", torch.float16)
    expect("meta['compute_dtype']", dtype in SCALE_TYPES, "float32, bfloat16 or float16", dtype)
    axis = meta["axis"]
    expect("meta['axis']", axis in (0, 1), "0 or 1", axis)
    own_type = dtype if meta["view_as_float"] else torch.int32 if size == 4 else torch.uint8
    codes = flat_bytes("W_q", words, (own_type,))
    # The weight in rows of C, of which those at a distance of `step` share a word.
    step, C = words.shape[0], words.shape[1] * words.element_size() // size
    holds = C > 0 and N * K % C == 0 and step == -(-N * K // (C * per_word))
    expect("W_q", holds, f"codes of {N} x {K} values", described(words))
    n, k = places(N, K, codes.device)
    row, col, section, word = _split(
        N, K, C, step, n, k, f"{meta['packing']}, {described(words)}, axis {axis}"
    )
    row_bits, col_bits = (
        8 * size * (w * C + c) - bits * s for w, c, s in zip(word, col, section, strict=True)
    )
    count = N * K // C if axis == 1 else C
    scale = meta.get("scale")
    if isinstance(scale, Tensor) and scale.numel() == 1:
        count = 1
    scale, zero = (flat(f"meta[{name!r}]", meta.get(name), (dtype,), count) for name in ("scale", "zero"))
    row_scales, col_scales = (0 * n, 0 * k) if count == 1 else row if axis == 1 else col
    packing = Packing(f"hqq{bits}", N, K, dtype, dtype, bits, "uint", difference=dtype)
    parts = Parts(
        codes, number_table("uint", bits, codes.device), scale, zero=zero,
        row_bits=row_bits + bits * (per_word - 1), col_bits=col_bits, row_scales=row_scales, col_scales=col_scales,
    )  # fmt: skip
    return QuantizedWeight(packing, parts)


readers[read] = ("hqq HQQLinear (8 to 1 bits)",)

_Sum = tuple[Tensor, Tensor]  # a number of the row and one of the column


def _split(
    N: int, K: int, C: int, step: int, n: Tensor, k: Tensor, got: str
) -> tuple[_Sum, _Sum, _Sum, _Sum]:
    """Of element (n, k): row and column among rows of C; which of the rows that share a word it is, and which word."""
    if C % K == 0:
        several = C // K
        row = n // several
        return (row, 0 * k), (n % several * K, k), (row // step, 0 * k), (row % step, 0 * k)
    groups = K // C
    row_and_col = (n * groups, k // C), (0 * n, k % C)
    if K % C == 0 and step % groups == 0:
        rows = step // groups
        return *row_and_col, (n // rows, 0 * k), (n % rows * groups, k // C)
    if K % C == 0 and groups % step == 0:
        return *row_and_col, (n * (groups // step), k // C // step), (0 * n, k // C % step)
    raise ValueError(
        f"W_q: expected places of {N} x {K} values that are a number of the row plus one of the column (axis 1: "
        f"group_size divides in_features, codes of a word divide out_features; axis 0: group_size divides "
        f"out_features), got {got}"
    )
