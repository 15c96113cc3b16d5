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

import torch
from torch import Tensor

from .. import backends
from ..backends.shared import panel, products
from ..choice import dispatch
from ..choice.resolve import FREE
from ..spec.noise import Draw
from . import autograd

# Mirrors noise.Draw; noise_scale is None where nothing is drawn.
_DRAW = (
    "Tensor? noise_scale, Tensor? seed, int stream, str noise, int samples, int sample_offset, bool antithetic, "
    "int row_offset, int col_offset"
)
_CHOICE = "str strategy, str noise_accum, str backend"

_lib = torch.library.Library("flatlora", "DEF")
_lib.define(
    "linear(Tensor x, Tensor weight, Tensor? lora_A, Tensor? lora_B, Tensor? bias, Tensor? lora_x, float scaling, "
    f"{_DRAW}, {_CHOICE}) -> (Tensor, Tensor)"
)
_lib.define(
    f"linear_input_grad(Tensor grad_y, Tensor weight, Tensor? lora_A, Tensor? v, {_DRAW}, {_CHOICE}) -> Tensor"
)
_lib.define(
    "adapter_grads(Tensor grad_y, Tensor? u, Tensor? lora_B, float scaling, str backend) -> (Tensor, Tensor)"
)
_lib.define(
    "row_sq_norms(Tensor weight, Tensor? lora_A, Tensor? lora_B, float scaling, str backend) -> Tensor"
)
_lib.define(
    "perturb(Tensor? weight, Tensor noise_scale, Tensor seed, int stream, str noise, int sample, bool antithetic, "
    "int row_offset, int col_offset, str backend, Tensor(a!) out) -> ()"
)


def _way(
    draw: Draw | None, strategy: str, noise_accum: str, backend: str, a: Tensor, weight: Tensor
) -> tuple[ModuleType, bool]:
    """The backend that runs, and whether it is asked for panels."""
    if draw is None or 0 in (*a.shape, *weight.shape):
        return backends.get(backend), False
    if strategy in FREE:
        rows = a.numel() // a.shape[-1] // draw.samples
        choice = dispatch.way(
            backend, strategy, noise_accum, draw.noise, rows, a.device, a.dtype, weight.shape
        )
        backend, strategy = choice.backend, choice.strategy
    return backends.get(backend), strategy == "panel"


def _linear(x, weight, lora_A, lora_B, bias, lora_x, scaling, noise_scale, seed, *rest):  # type: ignore[no-untyped-def]
    *draw_rest, strategy, noise_accum, backend = rest
    draw = None if noise_scale is None else Draw(noise_scale, seed, *draw_rest)
    module, by_panels = _way(draw, strategy, noise_accum, backend, x, weight)
    if draw is not None and by_panels:
        return panel.linear(module.perturb, x, weight, lora_A, lora_B, bias, lora_x, scaling, draw)
    return module.linear(x, weight, lora_A, lora_B, bias, lora_x, scaling, draw, noise_accum)


def _linear_input_grad(grad_y, weight, lora_A, v, noise_scale, seed, *rest):  # type: ignore[no-untyped-def]
    *draw_rest, strategy, noise_accum, backend = rest
    draw = None if noise_scale is None else Draw(noise_scale, seed, *draw_rest)
    module, by_panels = _way(draw, strategy, noise_accum, backend, grad_y, weight)
    if draw is not None and by_panels:
        return panel.linear_input_grad(module.perturb, grad_y, weight, lora_A, v, draw)
    return module.linear_input_grad(grad_y, weight, lora_A, v, draw, noise_accum)


def _adapter_grads(
    grad_y: Tensor, u: Tensor | None, lora_B: Tensor | None, scaling: float, backend: str
) -> tuple[Tensor, Tensor]:
    kernel = getattr(backends.get(backend), "adapter_grads", products.adapter_grads)
    return kernel(grad_y.flatten(0, -2), u, lora_B, scaling)


def _row_sq_norms(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, backend: str
) -> Tensor:
    return backends.get(backend).row_sq_norms(weight, lora_A, lora_B, scaling)


def _perturb(  # type: ignore[no-untyped-def]
    weight, noise_scale, seed, stream, noise, sample, antithetic, row_offset, col_offset, backend, out
):
    draw = Draw(noise_scale, seed, stream, noise, 1, sample, antithetic, row_offset, col_offset)
    backends.get(backend).perturb(weight, draw, out)


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
