"""Checks of `QuantizedWeight.of` against the library that owns the layer."""

from __future__ import annotations

from typing import Any

import torch

from flatlora_kernels import QuantizedWeight


def read(source: Any, own: torch.Tensor, *owned: torch.Tensor) -> QuantizedWeight:
    """`source` as a packed weight: it decodes to what `own` has, and what is of the weight's size lies in `owned`."""
    q = QuantizedWeight.of(source)
    values = q.dequantize()
    assert values.dtype == own.dtype and torch.equal(values, own), difference(values, own)
    memory = {t.untyped_storage().data_ptr() for t in owned}
    N, K = q.shape
    for name, part in zip(q.parts._fields, q.parts, strict=True):
        if part is not None and part.untyped_storage().data_ptr() not in memory:
            assert part.numel() <= max(N, K, 256) and name not in ("codes", "scale"), name
    rows, columns = N // 3, K // 3  # views, which decode a part
    part = q.narrow(0, rows, N - rows).narrow(1, columns, K - columns)
    assert torch.equal(part.dequantize(), own[rows:, columns:])
    return q


def difference(values: torch.Tensor, own: torch.Tensor) -> str:
    if values.shape != own.shape:
        return f"shape {tuple(values.shape)}, its own has {tuple(own.shape)}"
    apart = values.double() != own.double()
    return f"{values.dtype}, its own {own.dtype}: {int(apart.sum())} of {apart.numel()} values differ"


def randn(N: int, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(N, K, generator=torch.Generator().manual_seed(1000 * N + K))
    return (values / K**0.5).to(dtype)
