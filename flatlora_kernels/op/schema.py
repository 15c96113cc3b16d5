"""The one op: its torch.library schemas and fake kernels.

`functional.py` is the public face, and compute.py does the work; what arrives here has been checked. The raw ops take
every option as a positional argument, `backend` by name, so that the forward's choice travels with the call into the
backward.

    flatlora::linear             y = x (W + eps)^T + scaling (lora_x A^T) B^T + bias;  also u = lora_x A^T
    flatlora::linear_input_grad  dX = dY (W + eps) + v A
    flatlora::adapter_grads      v = scaling dY B;  dB = scaling dY^T u
    flatlora::row_sq_norms       || W[n] + scaling (B A)[n] ||^2
    flatlora::perturb            out = W + eps, or eps

mixture.py adds those of mixtures of experts.
"""

from __future__ import annotations

import math
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .. import backends
from ..core.records import Choice, Draw, Operands, Weight
from . import autograd, compute
from .flat import MORE, shape_of, weight_of

_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool", str: "str", Weight: "Tensor",
}  # fmt: skip


def _arguments(record: type) -> str:
    """The fields of a record as a schema has them."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(record).items())


DRAW, CHOICE = _arguments(Draw).replace("Tensor ", "Tensor? "), _arguments(Choice)
_SCHEMAS = (
    f"linear({_arguments(Operands)}, {DRAW}, {CHOICE}, {MORE}) -> (Tensor, Tensor)",
    f"linear_input_grad(Tensor grad_y, Tensor weight, Tensor? lora_A, Tensor? v, {DRAW}, {CHOICE}, {MORE}) -> Tensor",
    "adapter_grads(Tensor grad_y, Tensor? u, Tensor? lora_B, float scaling, str backend) -> (Tensor, Tensor)",
    f"row_sq_norms(Tensor weight, Tensor? lora_A, Tensor? lora_B, float scaling, str backend, {MORE}) -> Tensor",
    f"perturb(Tensor? weight, {DRAW}, str backend, Tensor(a!) out, {MORE}) -> ()",
)
lib = torch.library.Library("flatlora", "DEF")
for _schema in _SCHEMAS:
    lib.define(_schema)


def _linear(x: Tensor, codes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    operands, draw, choice, more = autograd.records(rest, len(Operands._fields) - 2)
    y, u = compute.linear(x, weight_of(codes, more), *operands, draw, choice)  # type: ignore[call-arg]
    return y, y.new_empty(0) if u is None else u


def _linear_input_grad(grad_y: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    (lora_A, v), draw, choice, more = autograd.records(rest, 2)
    return compute.linear_input_grad(grad_y, weight_of(codes, more), lora_A, v, draw, choice)


def _row_sq_norms(
    codes: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, backend: str, *more: Any
) -> Tensor:
    return backends.get(backend).row_sq_norms(weight_of(codes, more), lora_A, lora_B, scaling)


def _perturb(codes: Tensor | None, *rest: Any) -> None:
    end = len(Draw._fields)
    draw, (backend, out, *more) = rest[:end], rest[end:]
    weight = None if codes is None else weight_of(codes, tuple(more))
    backends.get(backend).perturb(weight, None if draw[0] is None else Draw(*draw), out)


for _name, _kernel in (
    ("linear", _linear),
    ("linear_input_grad", _linear_input_grad),
    ("adapter_grads", compute.adapter_grads),
    ("row_sq_norms", _row_sq_norms),
    ("perturb", _perturb),
):
    lib.impl(_name, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("flatlora::linear", lib=lib)
def _linear_fake(x, weight, lora_A, *rest):  # type: ignore[no-untyped-def]
    more = autograd.records(rest, len(Operands._fields) - 3)[3]
    y = x.new_empty((*x.shape[:-1], shape_of(weight, more)[0]))
    # prod, because Size.numel() would fix a symbolic size.
    u = x.new_empty(0 if lora_A is None else (math.prod(x.shape[:-1]), lora_A.shape[0]))
    return y, u


@torch.library.register_fake("flatlora::linear_input_grad", lib=lib)
def _linear_input_grad_fake(grad_y, weight, *rest):  # type: ignore[no-untyped-def]
    return grad_y.new_empty((*grad_y.shape[:-1], shape_of(weight, autograd.records(rest, 2)[3])[1]))


@torch.library.register_fake("flatlora::adapter_grads", lib=lib)
def _adapter_grads_fake(grad_y, u, lora_B, *rest):  # type: ignore[no-untyped-def]
    M, N = math.prod(grad_y.shape[:-1]), grad_y.shape[-1]
    v = grad_y.new_empty(0 if lora_B is None else (M, lora_B.shape[1]))
    dB = grad_y.new_empty(0 if u is None else (N, u.shape[1]))
    return v, dB


@torch.library.register_fake("flatlora::row_sq_norms", lib=lib)
def _row_sq_norms_fake(weight, lora_A, lora_B, scaling, backend, *more):  # type: ignore[no-untyped-def]
    return weight.new_empty(shape_of(weight, more)[:-1], dtype=torch.float32)


@torch.library.register_fake("flatlora::perturb", lib=lib)
def _perturb_fake(*args):  # type: ignore[no-untyped-def]
    return None


lib.impl("linear", autograd.of_the_op, "Autograd")
for _name in ("linear_input_grad", "adapter_grads", "row_sq_norms"):
    lib.impl(_name, autograd.first_order_only(_name), "Autograd")
