"""What the readers share: how they recognise a library's classes, and what they check of its tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .own import E2M1

SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def class_of(source: Any, package: str) -> str:
    """Name of the first class of `source` that `package` defines; "" where none is its."""
    for cls in type(source).__mro__:
        if cls.__module__.partition(".")[0] == package:
            return cls.__name__
    return ""


def own_weight(source: Any) -> Any:
    """The weight of a linear layer, or what is none itself."""
    return getattr(source, "weight", None) if isinstance(source, nn.Linear) else source


def expect(field: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{field}: expected {expected}, got {got}")


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return "None" if value is None else type(value).__name__


def matrix(field: str, value: Any) -> tuple[int, int]:
    """Its two sizes."""
    expect(field, len(value) == 2, "two sizes (out_features, in_features)", tuple(value))
    return int(value[0]), int(value[1])


def flat(
    field: str, value: Any, types: tuple[torch.dtype, ...], count: int | None = None, note: str = ""
) -> Tensor:
    """A view in one dimension of a contiguous tensor of one of these types."""
    names = " or ".join(str(t).removeprefix("torch.") for t in types)
    if count is not None:
        names = f"{count} numbers of {names}"
    holds = isinstance(value, Tensor) and value.dtype in types and count in (None, value.numel())
    expect(field, holds, names + note, described(value))
    expect(
        field, value.is_contiguous(), "a contiguous tensor", f"strides {value.stride() if holds else None}"
    )
    return value.detach().as_strided((value.numel(),), (1,))


def flat_bytes(field: str, value: Any, types: tuple[torch.dtype, ...], count: int | None = None) -> Tensor:
    """The same, as bytes."""
    return flat(field, value, types, count).view(torch.uint8)


def places(N: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of rows and of columns."""
    return torch.arange(N, device=device), torch.arange(K, device=device)


def swizzled(n: Tensor, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Scale indices of rows, and of these blocks of a row, of which there are `count`, in the tiles of 128 rows and 4
    blocks that cuBLAS takes: https://docs.nvidia.com/cuda/cublas/#d-block-scaling-factors-layout
    """
    tile = n % 128
    rows = n // 128 * (-(-count // 4) * 512) + tile % 32 * 16 + tile // 32 * 4
    return rows, blocks // 4 * 512 + blocks % 4


@functools.cache
def e2m1_table(device: torch.device) -> Tensor:
    return torch.tensor(E2M1, device=device)
