"""The one op: its torch.library schemas, fake kernels and the dispatch to a backend.

`functional.py` is the public face; what arrives here has been checked. The raw ops take every option as a
positional argument, `backend` by name, so that the forward's choice travels with the call into the backward.

    flatlora::linear             y = x (W + eps)^T + scaling (lora_x A^T) B^T + bias;  also u = lora_x A^T
    flatlora::linear_input_grad  dX = dY (W + eps) + v A
    flatlora::adapter_grads      v = scaling dY B;  dB = scaling dY^T u
    flatlora::row_sq_norms       || W[n] + scaling (B A)[n] ||^2
    flatlora::perturb            out = W + eps, or eps
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor

from .. import backends
from ..backends.shared import panel, products, transform
from ..choice import dispatch
from ..choice.resolve import FREE
from ..core.records import Choice, Draw, Operands, Product
from . import autograd

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", float: "float", bool: "bool", str: "str"}


def _arguments(record: type) -> str:
    """The fields of a record as a schema has them."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(record).items())


_DRAW, _CHOICE = _arguments(Draw).replace("Tensor ", "Tensor? "), _arguments(Choice)
_SCHEMAS = (
    f"linear({_arguments(Operands)}, {_DRAW}, {_CHOICE}) -> (Tensor, Tensor)",
    f"linear_input_grad(Tensor grad_y, Tensor weight, Tensor? lora_A, Tensor? v, {_DRAW}, {_CHOICE}) -> Tensor",
    "adapter_grads(Tensor grad_y, Tensor? u, Tensor? lora_B, float scaling, str backend) -> (Tensor, Tensor)",
    "row_sq_norms(Tensor weight, Tensor? lora_A, Tensor? lora_B, float scaling, str backend) -> Tensor",
    f"perturb(Tensor? weight, {_arguments(Draw)}, str backend, Tensor(a!) out) -> ()",
)
_OF_OPERANDS, _OF_DRAW = len(Operands._fields), len(Draw._fields)
_lib = torch.library.Library("flatlora", "DEF")
for _schema in _SCHEMAS:
    _lib.define(_schema)


def _records(flat: tuple[Any, ...]) -> tuple[Draw | None, Choice]:
    """The arguments of a draw and a choice, which come last."""
    draw = None if flat[0] is None else Draw._make(flat[:_OF_DRAW])
    return draw, Choice._make(flat[_OF_DRAW:])


def _way(a: Tensor, weight: Tensor, draw: Draw | None, choice: Choice) -> tuple[ModuleType, str]:
    """The backend that runs, and the strategy; `a` (M, contraction)."""
    if draw is None or 0 in (*a.shape, *weight.shape):
        return backends.get(choice.backend), "fused"
    if choice.strategy not in FREE:
        return backends.get(choice.backend), choice.strategy
    problem = dispatch.Problem.of(
        draw.noise, choice.noise_accum, a.shape[0] // draw.samples, a.device, a.dtype, *weight.shape
    )
    found = dispatch.way(choice, problem)
    return backends.get(found.backend), found.strategy


def _product(module: ModuleType, strategy: str, p: Product, draw: Draw | None, noise_accum: str) -> Tensor:
    if draw is not None and not p.empty:
        if strategy == "panel":
            return panel.product(module.perturb, p, draw)
        if strategy == "transform":
            return transform.product(
                module.transform, lambda q: module.product(q, None, noise_accum), p, draw
            )
    return module.product(p, draw, noise_accum)


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.flatten(0, -2)


def _like(x: Tensor, y: Tensor) -> Tensor:
    """y (M, outputs) with the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _linear(*flat: Any) -> tuple[Tensor, Tensor]:
    x, weight, lora_A, lora_B, bias, lora_x, scaling = flat[:_OF_OPERANDS]
    draw, choice = _records(flat[_OF_OPERANDS:])
    a = _matrix(x)
    module, strategy = _way(a, weight, draw, choice)
    u = None
    if lora_A is not None:
        if lora_x is None and draw is not None and strategy == "fused" and hasattr(module, "product_and_u"):
            p = Product(a, weight, False, None, lora_B, bias, scaling)
            made = module.product_and_u(p, lora_A, draw, choice.noise_accum)
            if made is not None:
                return _like(x, made[0]), made[1]
        u = products.matmul(a if lora_x is None else _matrix(lora_x), lora_A.to(x.dtype).t())
    p = Product(a, weight, False, u, lora_B, bias, scaling)
    y = _like(x, _product(module, strategy, p, draw, choice.noise_accum))
    return y, x.new_empty(0) if u is None else u


def _linear_input_grad(
    grad_y: Tensor, weight: Tensor, lora_A: Tensor | None, v: Tensor | None, *flat: Any
) -> Tensor:
    draw, choice = _records(flat)
    a = _matrix(grad_y)
    module, strategy = _way(a, weight, draw, choice)
    adapter = () if v is None else (v.contiguous(), lora_A.t())
    grad_x = _product(module, strategy, Product(a, weight, True, *adapter), draw, choice.noise_accum)
    return _like(grad_y, grad_x)


def _adapter_grads(
    grad_y: Tensor, u: Tensor | None, lora_B: Tensor | None, scaling: float, backend: str
) -> tuple[Tensor, Tensor]:
    kernel = getattr(backends.get(backend), "adapter_grads", products.adapter_grads)
    return kernel(grad_y.flatten(0, -2), u, lora_B, scaling)


def _row_sq_norms(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, backend: str
) -> Tensor:
    return backends.get(backend).row_sq_norms(weight, lora_A, lora_B, scaling)


def _perturb(weight: Tensor | None, *flat: Any) -> None:
    *draw, backend, out = flat
    backends.get(backend).perturb(weight, Draw(*draw), out)


for _name, _kernel in (
    ("linear", _linear),
    ("linear_input_grad", _linear_input_grad),
    ("adapter_grads", _adapter_grads),
    ("row_sq_norms", _row_sq_norms),
    ("perturb", _perturb),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")


@torch.library.register_fake("flatlora::linear", lib=_lib)
def _linear_fake(x, weight, lora_A, *rest):  # type: ignore[no-untyped-def]
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    # prod, because Size.numel() would fix a symbolic size.
    u = x.new_empty(0 if lora_A is None else (math.prod(x.shape[:-1]), lora_A.shape[0]))
    return y, u


@torch.library.register_fake("flatlora::linear_input_grad", lib=_lib)
def _linear_input_grad_fake(grad_y, weight, *rest):  # type: ignore[no-untyped-def]
    return grad_y.new_empty((*grad_y.shape[:-1], weight.shape[1]))


@torch.library.register_fake("flatlora::adapter_grads", lib=_lib)
def _adapter_grads_fake(grad_y, u, lora_B, *rest):  # type: ignore[no-untyped-def]
    M, N = math.prod(grad_y.shape[:-1]), grad_y.shape[-1]
    v = grad_y.new_empty(0 if lora_B is None else (M, lora_B.shape[1]))
    dB = grad_y.new_empty(0 if u is None else (N, u.shape[1]))
    return v, dB


@torch.library.register_fake("flatlora::row_sq_norms", lib=_lib)
def _row_sq_norms_fake(weight, *rest):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape[0], dtype=torch.float32)


@torch.library.register_fake("flatlora::perturb", lib=_lib)
def _perturb_fake(*args):  # type: ignore[no-untyped-def]
    return None


_lib.impl("linear", autograd.linear, "Autograd")
for _name in ("linear_input_grad", "adapter_grads", "row_sq_norms"):
    _lib.impl(_name, autograd.first_order_only(_name), "Autograd")
