"""A weight as arguments of the ops, which take tensors, lists of them and strings.

A tensor goes as itself, with no parts and "" for a packing. A packed weight goes as its codes, its other tensors, and
its `Packing` written out, so that the op's graph has all tensors and a compiled graph keeps the rest as a constant.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.quantized import Packing, Parts, QuantizedWeight
from ..core.records import Weight

Flat = tuple[Tensor | None, list[Tensor | None], str]


def flat(weight: Weight | None) -> Flat:
    if isinstance(weight, QuantizedWeight):
        codes, *parts = weight.parts
        written = _written.__wrapped__ if torch.compiler.is_compiling() else _written
        return codes, parts, written(weight.packing)
    return weight, [], ""


def weight_of(codes: Tensor, parts: Sequence[Tensor | None], packing: str) -> Weight:
    return QuantizedWeight.made(_read(packing), Parts(codes, *parts)) if packing else codes  # type: ignore[arg-type]


def shape_of(codes: Tensor, packing: str) -> tuple[int, int]:
    if not packing:
        return codes.shape  # type: ignore[return-value]
    p = _read(packing)
    return p.N, p.K


@functools.lru_cache(maxsize=4096)
def _written(packing: Packing) -> str:
    return repr(tuple(_name(v) if isinstance(v, torch.dtype) else v for v in packing))


def _name(dtype: torch.dtype) -> str:
    return str(dtype)  # "torch.bfloat16"


@functools.lru_cache(maxsize=4096)
def _read(packing: str) -> Packing:
    import ast

    fields = ast.literal_eval(packing)
    return Packing(
        *(getattr(torch, v[6:]) if isinstance(v, str) and v.startswith("torch.") else v for v in fields)
    )
