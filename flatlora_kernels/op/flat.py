"""A weight as arguments of the ops, which take tensors and strings.

A packed weight goes by its codes where a tensor goes as itself, and at the end of the arguments come its other tensors
and its `Packing` written out. So the op's graph has all tensors, and a compiled graph keeps the rest as a constant.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

import torch
from torch import Tensor

from ..core.quantized import Packing, Parts, QuantizedWeight
from ..core.records import Weight

# What the ops take at the end of their arguments, as their schemas have it.
MORE = ", ".join([*(f"Tensor? weight_{name}=None" for name in Parts._fields[1:]), 'str weight_packing=""'])
More = tuple[Any, ...]


def flat(weight: Weight | None) -> tuple[Tensor | None, More]:
    """What stands for `weight`, and what else at the end of the arguments."""
    if not isinstance(weight, QuantizedWeight):
        return weight, ()
    codes, *parts = weight.parts
    written = _written.__wrapped__ if torch.compiler.is_compiling() else _written
    return codes, (*parts, written(weight.packing))


def weight_of(codes: Tensor, more: More) -> Weight:
    """Of what an op was given; torch leaves out `more` where all of it is as by default."""
    if not more or not more[-1]:
        return codes
    *parts, packing = more
    return QuantizedWeight.made(_read(packing), Parts(codes, *parts))


def shape_of(codes: Tensor, more: More) -> tuple[int, int]:
    if not more or not more[-1]:
        return codes.shape  # type: ignore[return-value]
    p = _read(more[-1])
    return p.N, p.K


@functools.lru_cache(maxsize=4096)
def _written(packing: Packing) -> str:
    return repr(tuple(str(v) if isinstance(v, torch.dtype) else v for v in packing))


@functools.lru_cache(maxsize=4096)
def _read(packing: str) -> Packing:
    return Packing._make(map(_value, ast.literal_eval(packing)))


def _value(written: Any) -> Any:
    is_type = isinstance(written, str) and written.startswith("torch.")
    return getattr(torch, written.removeprefix("torch.")) if is_type else written
