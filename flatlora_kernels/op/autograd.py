"""The autograd formula of the op: the backward draws the forward's eps again.

    dX  = dY (W + eps) + scaling (dY B) A
    dA  = scaling (dY B)^T x                   dB = scaling dY^T u,  u = x A^T
    dbias = sum dY                             dW = dY^T x

The second term of dX goes to lora_x where that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd as below_autograd

from ..backends.shared.products import cast, matmul
from ..core.autocast import autocasts, without_autocast
from ..core.quantized import Parts, QuantizedWeight
from ..core.records import NO_DRAW, Choice, Draw, Operands, Weight
from . import compute
from .flat import More, flat, weight_of

_OF_OPERANDS, _OF_DRAW, _OF_CHOICE = len(Operands._fields), len(Draw._fields), len(Choice._fields)

_TWICE = (
    "flatlora::{}: cannot be differentiated twice; eps is drawn inside the kernel and only first derivatives exist."
    " Drop create_graph=True, or use gradients that do not need a graph"
)


def records(rest: tuple[Any, ...], first: int) -> tuple[tuple[Any, ...], Draw | None, Choice, More]:
    """Arguments of an op: the `first` ones, those of a draw and a choice, and what is left."""
    draw_end, choice_end = first + _OF_DRAW, first + _OF_DRAW + _OF_CHOICE
    draw = None if rest[first] is None else Draw._make(rest[first:draw_end])
    return rest[:first], draw, Choice._make(rest[draw_end:choice_end]), rest[choice_end:]


class _Dispatched:
    """The functions of compute.py as ops, so that whoever watches torch's dispatcher sees them."""

    @staticmethod
    def linear(x: Tensor, weight: Weight, *arguments: Any) -> tuple[Tensor, Tensor]:
        *operands, draw, choice = arguments
        codes, more = flat(weight)
        drawn = NO_DRAW if draw is None else draw
        with below_autograd():
            return torch.ops.flatlora.linear(x, codes, *operands, *drawn, *choice, *more)

    @staticmethod
    def linear_input_grad(grad_y: Tensor, weight: Weight, *arguments: Any) -> Tensor:
        *tensors, draw, choice = arguments
        codes, more = flat(weight)
        drawn = NO_DRAW if draw is None else draw
        with below_autograd():
            return torch.ops.flatlora.linear_input_grad(grad_y, codes, *tensors, *drawn, *choice, *more)

    @staticmethod
    def adapter_grads(*arguments: Any) -> tuple[Tensor, Tensor]:
        with below_autograd():
            return torch.ops.flatlora.adapter_grads(*arguments)


class LinearFunction(torch.autograd.Function):
    """`compute.linear`, differentiable.

    The last argument ends with what has the functions that compute: compute.py itself, or `_Dispatched`.

    `torch.library.register_autograd` would make the same from two functions, at 90 us a call more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        bias: Tensor | None,
        lora_x: Tensor | None,
        more: tuple[float, Draw | None, Choice, Any],
    ) -> tuple[Tensor, Tensor | None]:
        scaling, draw, choice, run = more
        y, u = run.linear(x, weight, lora_A, lora_B, bias, lora_x, scaling, draw, choice)
        need_x, need_W, need_A, need_B, _, need_lora_x, _ = ctx.needs_input_grad
        noise_scale, seed = (None, None) if draw is None or not need_x else draw[:2]
        ctx.set_materialize_grads(False)
        packing = codes = None
        parts: tuple[Tensor | None, ...] = ()
        if need_x:
            if isinstance(weight, Tensor):
                codes = weight
            else:
                packing, (codes, *parts) = weight.packing, weight.parts  # type: ignore[assignment]
        ctx.save_for_backward(
            x if need_W or (need_A and lora_x is None) else None,
            codes,
            lora_A if need_x or need_lora_x else None,
            lora_B if need_x or need_A or need_lora_x else None,
            lora_x if need_A else None,
            u if need_B else None,
            noise_scale,
            seed,
            *parts,
        )
        # Parameters may be float32 beside a 16-bit x.
        dtypes = (
            weight.dtype,
            lora_A if lora_A is None else lora_A.dtype,
            lora_B if lora_B is None else lora_B.dtype,
            bias if bias is None else bias.dtype,
        )
        ctx.more = scaling, draw, choice, run, lora_x is not None, dtypes, packing
        if run is not _Dispatched:
            return y, None
        ctx.mark_non_differentiable(u)
        return y, u

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 7
        if autocasts(grad_y.device.type):  # it would cast what torch multiplies, and what it multiplies into
            with without_autocast(grad_y.device.type):
                return LinearFunction.backward(ctx, grad_y, None)
        return *once("linear", lambda: _gradients(ctx, grad_y)), None


def once(name: str, gradients: Callable[[], tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """Gradients of the op `name`, which cannot be differentiated again."""
    if not torch.is_grad_enabled():
        return gradients()
    # create_graph=True: fine until somebody differentiates the result
    with torch.no_grad():
        grads = gradients()
    given = [g for g in grads if g is not None]
    marked = iter(_NoSecondDerivative.apply(name, *(g.requires_grad_() for g in given)))
    return tuple(None if g is None else next(marked) for g in grads)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, lora_x, u, noise_scale, seed, *parts = ctx.saved_tensors
    scaling, draw, choice, run, separate_branch, dtypes, packing = ctx.more
    if packing is not None:
        weight = QuantizedWeight.made(packing, Parts(weight, *parts))
    need_x, need_W, need_A, need_B, need_bias, need_lora_x, _ = ctx.needs_input_grad
    dtype_W, dtype_A, dtype_B, dtype_bias = dtypes
    dx = dW = dA = dB = dbias = dlora_x = v = None
    if grad_y.is_neg() or grad_y._is_zerotensor():  # what torch's dispatcher would do, too
        grad_y = grad_y.clone()

    need_v = lora_B is not None and (need_A or need_lora_x or (need_x and not separate_branch))
    if need_v or need_B:
        given = u if need_B else None, lora_B if need_v else None
        v, dB = run.adapter_grads(grad_y, *given, scaling, choice.backend)
        v, dB = v if need_v else None, cast(dB, dtype_B) if need_B else None
    if need_x:
        A, v_x = (None, None) if separate_branch or v is None else (lora_A, v)
        if draw is not None and (seed is not draw.seed or noise_scale is not draw.noise_scale):
            draw = Draw(noise_scale, seed, *draw[2:])  # as somebody's hooks bring them back
        dx = run.linear_input_grad(grad_y, weight, A, v_x, draw, choice)
    if need_lora_x:
        dlora_x = matmul(v, cast(lora_A, v.dtype)).view(*grad_y.shape[:-1], lora_A.shape[1])  # type: ignore[arg-type]
    if need_A:
        dA = cast(matmul(v.t(), _rows(lora_x if separate_branch else x)), dtype_A)
    if need_bias:
        dbias = cast(_rows(grad_y).sum(0), dtype_bias)
    if need_W:
        dW = cast(matmul(_rows(grad_y).t(), _rows(x)), dtype_W)
    return dx, dW, dA, dB, dbias, dlora_x


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.flatten(0, -2)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(r.view_as(r) for r in results)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(_TWICE.format(ctx.name))


def differentiates(inputs: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def linear(*arguments: Any) -> Tensor:
    """`compute.linear` without its u, differentiable; outside the transforms of torch.func."""
    if torch.is_grad_enabled():
        for t in arguments[:6]:
            if t is not None and t.requires_grad:
                return LinearFunction.apply(*arguments[:6], (*arguments[6:], compute))[0]
    return compute.linear(*arguments)[0]


def of_the_op(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Autograd kernel of `flatlora::linear`."""
    if differentiates(inputs[:6]):
        (x, codes, *tensors, scaling), draw, choice, more = records(inputs, _OF_OPERANDS)
        return LinearFunction.apply(x, weight_of(codes, more), *tensors, (scaling, draw, choice, _Dispatched))
    with below_autograd():
        return torch.ops.flatlora.linear(*inputs)


def first_order_only(name: str) -> Callable[..., Any]:
    """Autograd kernel of an op whose results say clearly that they have no derivative, once they are differentiated."""

    def kernel(*inputs: Any) -> Any:
        with below_autograd():
            result = getattr(torch.ops.flatlora, name)(*inputs)
        if not differentiates(inputs):
            return result
        results = result if isinstance(result, tuple) else (result,)
        marked = _NoSecondDerivative.apply(name, *(r.requires_grad_() for r in results))
        return marked if isinstance(result, tuple) else marked[0]

    return kernel
