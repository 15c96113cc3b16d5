"""The autograd formula of `flatlora::linear`: the backward draws the forward's eps again.

    dX  = dY (W + eps) + scaling (dY B) A
    dA  = scaling (dY B)^T x                   dB = scaling dY^T u,  u = x A^T
    dbias = sum dY                             dW = dY^T x

The second term of dX goes to lora_x where that is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd as below_autograd

from ..backends.shared.products import matmul
from ..core.records import Operands

_TWICE = (
    "flatlora::{}: cannot be differentiated twice; eps is drawn inside the kernel and only first derivatives exist."
    " Drop create_graph=True, or use gradients that do not need a graph"
)


class LinearFunction(torch.autograd.Function):
    """The autograd kernel of `flatlora::linear`; its arguments are the op's.

    `torch.library.register_autograd` would make the same from two functions, at 90 us a call more.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, weight, lora_A, lora_B, bias, lora_x, scaling = inputs[: len(Operands._fields)]
        noise_scale, seed, *rest = inputs[len(Operands._fields) :]
        with below_autograd():
            y, u = torch.ops.flatlora.linear(*inputs)
        ctx.mark_non_differentiable(u)
        ctx.set_materialize_grads(False)
        need_x, need_W, need_A, need_B, _, need_lora_x = ctx.needs_input_grad[:6]
        ctx.save_for_backward(
            x if need_W or (need_A and lora_x is None) else None,
            weight if need_x else None,
            lora_A if need_x or need_lora_x else None,
            lora_B if need_x or need_A or need_lora_x else None,
            lora_x if need_A else None,
            u if need_B else None,
            noise_scale if need_x else None,
            seed if need_x else None,
        )
        ctx.scaling = scaling
        ctx.rest = rest
        ctx.separate_branch = lora_x is not None
        # Parameters may be float32 beside a 16-bit x.
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, lora_A, lora_B, bias)]
        return y, u

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        rest_of_inputs = (None,) * (3 + len(ctx.rest))  # scaling, noise_scale, seed and on
        if grad_y is None:
            return (None,) * 6 + rest_of_inputs
        with torch.no_grad():
            grads = _gradients(ctx, grad_y)
        if torch.is_grad_enabled():  # create_graph=True: fine until somebody differentiates the result
            given = [g for g in grads if g is not None]
            marked = iter(_NoSecondDerivative.apply("linear", *(g.requires_grad_() for g in given)))
            grads = tuple(None if g is None else next(marked) for g in grads)
        return grads + rest_of_inputs


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, lora_x, u, noise_scale, seed = ctx.saved_tensors
    need_x, need_W, need_A, need_B, need_bias, need_lora_x = ctx.needs_input_grad[:6]
    dtype_W, dtype_A, dtype_B, dtype_bias = ctx.dtypes
    dy = grad_y.flatten(0, -2)  # (M, N)
    dx = dW = dA = dB = dbias = dlora_x = v = None

    x_uses_v = need_x and not ctx.separate_branch
    need_v = lora_B is not None and (need_A or need_lora_x or x_uses_v)
    if need_v or need_B:
        with below_autograd():
            v, dB = torch.ops.flatlora.adapter_grads(
                grad_y, u if need_B else None, lora_B if need_v else None, ctx.scaling, ctx.rest[-1]
            )
        v, dB = v if need_v else None, dB.to(dtype_B) if need_B else None
    if need_x:
        A, v_x = (None, None) if ctx.separate_branch or v is None else (lora_A, v)
        with below_autograd():
            dx = torch.ops.flatlora.linear_input_grad(grad_y, weight, A, v_x, noise_scale, seed, *ctx.rest)
    if need_lora_x:
        dlora_x = matmul(v, lora_A.to(v.dtype)).view(*grad_y.shape[:-1], lora_A.shape[1])  # type: ignore[arg-type]
    if need_A:
        dA = matmul(v.t(), (lora_x if ctx.separate_branch else x).flatten(0, -2)).to(dtype_A)
    if need_bias:
        dbias = dy.sum(0).to(dtype_bias)
    if need_W:
        dW = matmul(dy.t(), x.flatten(0, -2)).to(dtype_W)
    return dx, dW, dA, dB, dbias, dlora_x


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(r.view_as(r) for r in results)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(_TWICE.format(ctx.name))


def _differentiates(inputs: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)


def linear(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Autograd kernel of `flatlora::linear`."""
    if _differentiates(inputs[:6]):
        return LinearFunction.apply(*inputs)
    with below_autograd():
        return torch.ops.flatlora.linear(*inputs)


def first_order_only(name: str) -> Callable[..., Any]:
    """Autograd kernel of an op whose results say clearly that they have no derivative, once they are differentiated."""

    def kernel(*inputs: Any) -> Any:
        with below_autograd():
            result = getattr(torch.ops.flatlora, name)(*inputs)
        if not _differentiates(inputs):
            return result
        results = result if isinstance(result, tuple) else (result,)
        marked = _NoSecondDerivative.apply(name, *(r.requires_grad_() for r in results))
        return marked if isinstance(result, tuple) else marked[0]

    return kernel
