"""What the grouped op computes, its derivative and its schema.

    flatlora::grouped_linear         y and u, as flatlora::linear, with each row's expert in its formula
    flatlora::grouped_linear_grads   dX, dW, dA, dB and dbias; empty where not needed

Each expert that has rows goes through compute.py on its own 2-D weight, so that every backend has mixtures. Or a
backend computes all of them in one launch (`together`), which reads the offsets on the device. What arrives here has
been checked; only the values of a tensor of offsets have not, because reading them waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd as below_autograd

from .. import backends
from ..backends.shared.products import cast, matmul
from ..choice import dispatch
from ..core.autocast import autocasts, without_autocast
from ..core.records import NO_DRAW, Choice, Draw, Product
from . import checks, compute
from .autograd import differentiates, once
from .schema import CHOICE, DRAW, lib

Offsets = Tensor | Sequence[int]


def together(
    a: Tensor, weight: Tensor | None, offsets: Offsets, K: int, noise: str | None, choice: Choice
) -> str | None:
    """The backend that computes a mixture in one launch; None: its experts are computed one after the other.

    One launch wants the offsets where the rows are, and a weight of their type.

    Args:
        a: x or dY, (M, any). weight: None where the product does not take it. K: in_features. noise: None = nothing is
            drawn.
    """
    if not isinstance(offsets, Tensor) or offsets.device != a.device:
        return None
    M, N = len(a), a.shape[1] if weight is None else weight.shape[1]
    if not (0 < M < 1 << 31 and N and K) or (weight is not None and weight.dtype != a.dtype):
        return None
    rows = -(-M // min(len(offsets), M))
    return dispatch.together(choice, noise, rows, a.device, a.dtype, N, K)


def _in_kernels(offsets: Tensor, num_rows: int) -> Tensor:
    """As kernels read them. Checked where that waits for nobody: a kernel makes NaN of wrong ones."""
    if offsets.device.type == "cpu":
        checks.ends(offsets.tolist(), num_rows)
    return offsets.contiguous()


def _with_rows(offsets: Offsets, num_rows: int) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which."""
    ends = offsets.tolist() if isinstance(offsets, Tensor) else offsets
    checks.ends(ends, num_rows)
    begin = 0
    for expert, end in enumerate(ends):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


def _draw_of(draw: Draw | None, expert: int) -> Draw | None:
    if draw is None:
        return None
    return draw._replace(noise_scale=draw.noise_scale[expert], stream=draw.stream + expert)


def _weight_of(weight: Tensor, expert: int, dtype: torch.dtype) -> Tensor:
    """(N, K); under autocast a weight may be of another type than the rows."""
    own = weight[expert]
    return own if own.dtype == dtype else own.to(dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    offsets: Offsets,
    scaling: float,
    draw: Draw | None,
    choice: Choice,
) -> tuple[Tensor, Tensor | None]:
    """y (M, N), and u (M, r), where there is an adapter."""
    name = together(x, weight, offsets, x.shape[1], None if draw is None else draw.noise, choice)
    if name is not None:
        ends = _in_kernels(offsets, len(x))  # type: ignore[arg-type]
        p = Product(x, weight, False, None, lora_B, bias, scaling, ends)
        return _linear_together(backends.get(name), p, lora_A, draw, choice.noise_accum)
    parts, us = [], []
    for e, rows in _with_rows(offsets, x.shape[0]):
        A, B, b = (None if t is None else t[e] for t in (lora_A, lora_B, bias))
        W = _weight_of(weight, e, x.dtype)
        y, u = compute.linear(x[rows], W, A, B, b, None, scaling, _draw_of(draw, e), choice)
        parts.append(y)
        us.append(u)
    if not parts:
        return x.new_empty(0, weight.shape[1]), None if lora_A is None else x.new_empty(0, lora_A.shape[1])
    return _joined(parts), None if lora_A is None else _joined(us)  # type: ignore[arg-type]


def _linear_together(
    module: ModuleType, p: Product, lora_A: Tensor | None, draw: Draw | None, noise_accum: str
) -> tuple[Tensor, Tensor | None]:
    u = None
    if lora_A is not None:
        made = None if draw is None else module.product_and_u(p, lora_A, draw, noise_accum)
        if made is not None:
            return made
        u = module.product(Product(p.a, cast(lora_A, p.a.dtype), offsets=p.offsets), None, noise_accum)
    return module.product(p._replace(u=u), draw, noise_accum), u


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def linear_grads(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    u: Tensor | None,
    offsets: Offsets,
    need_x: bool,
    like: Sequence[Tensor | None],
    scaling: float,
    draw: Draw | None,
    choice: Choice,
) -> tuple[Tensor | None, ...]:
    """dX, dW, dA, dB and dbias.

    Args:
        like: what the last four are allocated like, None for what is not needed.
    """
    K = next(t.shape[-1] for t in (weight, x, grad_y) if t is not None)
    name = together(grad_y, weight, offsets, K, None if draw is None else draw.noise, choice)
    if name is not None:
        ends = _in_kernels(offsets, len(grad_y))  # type: ignore[arg-type]
        module, saved = backends.get(name), (x, weight, lora_A, lora_B, u, ends)
        return _grads_together(module, grad_y, saved, need_x, like, scaling, draw, choice.noise_accum)
    dx = grad_y.new_empty(len(grad_y), weight.shape[2]) if need_x else None
    dW, dA, dB, dbias = (
        None if t is None else torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in like
    )
    need_v = lora_B is not None and (dx is not None or dA is not None)
    for e, rows in _with_rows(offsets, grad_y.shape[0]):
        dy, v = grad_y[rows], None
        if need_v or dB is not None:
            given = u[rows] if dB is not None else None, lora_B[e] if need_v else None  # type: ignore[index]
            v, own = compute.adapter_grads(dy, *given, scaling, choice.backend)
            if dB is not None:
                dB[e] = cast(own, dB.dtype)
        if dx is not None:
            W = _weight_of(weight, e, dy.dtype)  # type: ignore[arg-type]
            A = None if v is None else lora_A[e]  # type: ignore[index]
            dx[rows] = compute.linear_input_grad(dy, W, A, v, _draw_of(draw, e), choice)
        if dA is not None:
            dA[e] = cast(matmul(v.t(), x[rows]), dA.dtype)  # type: ignore[index]
        if dbias is not None:
            dbias[e] = cast(dy.sum(0), dbias.dtype)
        if dW is not None:
            dW[e] = cast(matmul(dy.t(), x[rows]), dW.dtype)  # type: ignore[index]
    return dx, dW, dA, dB, dbias


def _grads_together(
    module: ModuleType,
    grad_y: Tensor,
    saved: tuple[Any, ...],
    need_x: bool,
    like: Sequence[Tensor | None],
    scaling: float,
    draw: Draw | None,
    noise_accum: str,
) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, u, offsets = saved
    like_W, like_A, like_B, like_bias = like
    v, dx = None, None
    if lora_B is not None and (need_x or like_A is not None):
        p = Product(grad_y, cast(lora_B, grad_y.dtype), True, offsets=offsets)
        v = module.product(p, None, noise_accum)
    if need_x:
        A = None if v is None else lora_A.transpose(1, 2)
        p = Product(grad_y, weight, True, v, A, None, scaling, offsets)
        dx = module.product(p, draw, noise_accum)

    def sums(a: Tensor, b: Tensor, factor: float, like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        module.expert_grads(a, b, offsets, factor, out if out.dim() == 3 else out[:, None])
        return out

    of_bias = None if like_bias is None else sums(grad_y.new_ones(len(grad_y), 1), grad_y, 1.0, like_bias)
    dW, dA, dB = sums(grad_y, x, 1.0, like_W), sums(v, x, scaling, like_A), sums(grad_y, u, scaling, like_B)  # type: ignore[arg-type]
    return dx, dW, dA, dB, of_bias


class _Dispatched:
    """These functions as ops, so that whoever watches torch's dispatcher sees them."""

    @staticmethod
    def linear(*arguments: Any) -> tuple[Tensor, Tensor]:
        *operands, draw, choice = arguments
        with below_autograd():
            return torch.ops.flatlora.grouped_linear(*operands, *(draw or NO_DRAW), *choice)

    @staticmethod
    def linear_grads(grad_y: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
        *tensors, need_x, like, scaling, draw, choice = arguments
        with below_autograd():
            found = torch.ops.flatlora.grouped_linear_grads(
                grad_y, *tensors, need_x, *like, scaling, *(draw or NO_DRAW), *choice
            )
        needed = (need_x, *(t is not None for t in like))
        return tuple(g if need else None for need, g in zip(needed, found, strict=True))


class _Direct:
    linear = staticmethod(linear)
    linear_grads = staticmethod(linear_grads)


class GroupedFunction(torch.autograd.Function):
    """`linear`, differentiable; see `autograd.LinearFunction`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        bias: Tensor | None,
        more: tuple[Offsets, float, Draw | None, Choice, Any],
    ) -> tuple[Tensor, Tensor | None]:
        offsets, scaling, draw, choice, run = more
        y, u = run.linear(x, weight, lora_A, lora_B, bias, offsets, scaling, draw, choice)
        need_x, need_W, need_A, need_B, need_bias, _ = ctx.needs_input_grad
        ctx.set_materialize_grads(False)
        ends = offsets if isinstance(offsets, Tensor) else None
        # Parameters, which are there anyway.
        like = (
            weight if need_W else None,
            lora_A if need_A else None,
            lora_B if need_B else None,
            bias if need_bias else None,
        )
        noise_scale, seed = (None, None) if draw is None or not need_x else draw[:2]
        ctx.save_for_backward(
            x if need_W or need_A else None,
            weight if need_x else None,
            lora_A if need_x else None,
            lora_B if need_x or need_A else None,
            u if need_B else None,
            ends,
            *like,
            noise_scale,
            seed,
        )
        ctx.more = scaling, draw, choice, run, None if ends is not None else offsets
        if run is not _Dispatched:
            return y, None
        ctx.mark_non_differentiable(u)
        return y, u

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _grad_u: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 6
        if autocasts(grad_y.device.type):
            with without_autocast(grad_y.device.type):
                return GroupedFunction.backward(ctx, grad_y, None)
        return *once("grouped_linear", lambda: _gradients(ctx, grad_y)), None


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_A, lora_B, u, ends, *like, noise_scale, seed = ctx.saved_tensors
    scaling, draw, choice, run, on_host = ctx.more
    if grad_y.is_neg() or grad_y._is_zerotensor():  # what torch's dispatcher would do, too
        grad_y = grad_y.clone()
    if noise_scale is not None:
        draw = draw._replace(noise_scale=noise_scale, seed=seed)  # as somebody's hooks bring them back
    offsets = ends if on_host is None else on_host
    found: tuple[Tensor | None, ...] = run.linear_grads(
        grad_y,
        x,
        weight,
        lora_A,
        lora_B,
        u,
        offsets,
        ctx.needs_input_grad[0],
        tuple(like),
        scaling,
        draw,
        choice,
    )
    return found


def direct_linear(*arguments: Any) -> Tensor:
    """`linear` without its u, differentiable; outside the transforms of torch.func."""
    if differentiates(arguments[:5]):
        return GroupedFunction.apply(*arguments[:5], (*arguments[5:], _Direct))[0]
    return linear(*arguments)[0]


_OPERANDS = (
    "Tensor x, Tensor weight, Tensor? lora_A, Tensor? lora_B, Tensor? bias, Tensor offsets, float scaling"
)
_SAVED = "Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor? u, Tensor offsets"
_LIKE = ", ".join(f"Tensor? like_{name}" for name in ("weight", "lora_A", "lora_B", "bias"))
# They may read the offsets on the host, which a CUDA graph cannot record.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
lib.define(f"grouped_linear({_OPERANDS}, {DRAW}, {CHOICE}) -> (Tensor, Tensor)", tags=_TAGS)
lib.define(
    f"grouped_linear_grads(Tensor grad_y, {_SAVED}, bool need_x, {_LIKE}, float scaling, {DRAW}, {CHOICE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_OF_DRAW = len(Draw._fields)


def _records(rest: tuple[Any, ...]) -> tuple[Draw | None, Choice]:
    return None if rest[0] is None else Draw._make(rest[:_OF_DRAW]), Choice._make(rest[_OF_DRAW:])


def _linear_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    draw, choice = _records(arguments[7:])
    y, u = linear(*arguments[:7], draw, choice)  # type: ignore[call-arg]
    return y, y.new_empty(0) if u is None else u


def _linear_grads_op(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    saved, like, scaling = arguments[:7], arguments[7:11], arguments[11]
    draw, choice = _records(arguments[12:])
    found = linear_grads(grad_y, *saved, like, scaling, draw, choice)  # type: ignore[call-arg]
    return tuple(grad_y.new_empty(0) if t is None else t for t in found)


def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Autograd kernel of `flatlora::grouped_linear`."""
    if differentiates(arguments[:5]):
        draw, choice = _records(arguments[7:])
        more = (arguments[5], arguments[6], draw, choice, _Dispatched)
        return GroupedFunction.apply(*arguments[:5], more)
    with below_autograd():
        return torch.ops.flatlora.grouped_linear(*arguments)


lib.impl("grouped_linear", _linear_op, "CompositeExplicitAutograd")
lib.impl("grouped_linear_grads", _linear_grads_op, "CompositeExplicitAutograd")
lib.impl("grouped_linear", _differentiable, "Autograd")


@torch.library.register_fake("flatlora::grouped_linear", lib=lib)
def _linear_fake(x, weight, lora_A, *rest):  # type: ignore[no-untyped-def]
    u = x.new_empty(0 if lora_A is None else (x.shape[0], lora_A.shape[1]))
    return x.new_empty(x.shape[0], weight.shape[1]), u


@torch.library.register_fake("flatlora::grouped_linear_grads", lib=lib)
def _linear_grads_fake(grad_y, *rest):  # type: ignore[no-untyped-def]
    weight, need_x, like = rest[1], rest[6], rest[7:11]
    dx = grad_y.new_empty((grad_y.shape[0], weight.shape[2]) if need_x else 0)
    return dx, *(grad_y.new_empty(0) if t is None else t.new_empty(t.shape) for t in like)
