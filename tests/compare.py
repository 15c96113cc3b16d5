"""The one tolerance rule, and the problems it is applied to.

A result is compared with the same formula in float64 (float64 itself in NumPy's long double), given the
backend's *own* eps (from `materialize_noise`), so that the error of drawing eps is judged by the noise
tests alone. Its error may be at most `factor` times (2 for outputs, 3 for gradients) that of the plain
implementation in the same dtype, which rounds W + eps once and calls `torch.matmul`, plus a floor for the
case that the plain one is lucky:

    max |error|  <=  factor * max |plain error|  +  ulp * max(scale)
    rms  error   <=  factor * rms  plain error   +  ulp * rms(scale) / sqrt(number of elements)

`ulp` is `torch.finfo(dtype).eps` and `scale` the root of the sum of the squared terms that a result is
summed from: the size of its partial sums, so that rounding one of them costs at most ulp / 2 * scale. The
floor is two such roundings at the worst element. The luck of a mean over many elements is smaller by the
root of their number, and so is the floor of the second rule: that one tells a wrong accumulation from a
right one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from targets import Target, randn
from torch import Tensor

from flatlora_kernels.core import noise as oracle
from flatlora_kernels.core.quantized import QuantizedWeight

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
INPUTS = ("x", "weight", "lora_A", "lora_B", "bias", "lora_x")


@dataclasses.dataclass
class Problem:
    """Arguments of one call, all on one device, and the gradient of its output."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    lora_x: Tensor | None
    grad_y: Tensor
    options: dict[str, Any]

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in INPUTS}


def problem(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    rank: int = 0,
    bias: bool = False,
    lora_x: bool = False,
    adapter_dtype: torch.dtype | None = None,
    seed: int = 0,
    noisy: bool = True,
    **options: Any,
) -> Problem:
    """A layer at the scale of a trained one: outputs of order 1, eps of order 0.2 |W|."""
    place = {"dtype": dtype, "device": device}
    adapter = {"dtype": adapter_dtype or dtype, "device": device}
    if noisy:
        scale = (
            0.2
            / math.sqrt(max(K, 1))
            * (0.5 + torch.rand(N, generator=torch.Generator().manual_seed(seed + 9)))
        )
        options = {"noise_scale": scale.to(device), "seed": 0x9E3779B97F4A7C15 + seed, "stream": 3, **options}
    return Problem(
        x=randn(M, K, seed=seed + 1, **place),
        weight=(randn(N, K, seed=seed + 2) / math.sqrt(max(K, 1))).to(dtype).to(device),
        lora_A=(randn(rank, K, seed=seed + 3) / math.sqrt(max(K, 1))).to(**adapter) if rank else None,
        lora_B=randn(N, rank, seed=seed + 4, **adapter) if rank else None,
        bias=randn(N, seed=seed + 5, **adapter) if bias else None,
        lora_x=randn(M, K, seed=seed + 6, **place) if lora_x else None,
        grad_y=randn(M, N, seed=seed + 7, **place),
        options={"scaling": 0.75, **options},
    )


def group_eps(target: Target, p: Problem) -> list[Tensor]:
    """The backend's own eps, float32 (N, K), of every row group; zeros where nothing is drawn."""
    N, K = p.weight.shape
    o = p.options
    if "noise_scale" not in o:
        return [torch.zeros(N, K, device=p.weight.device)]
    names = ("seed", "stream", "noise", "antithetic", "row_offset", "col_offset", "layer_shape")
    draw = {k: o[k] for k in names if k in o}
    scale, kind = o["noise_scale"], o.get("noise", "gaussian")
    samples = range(first := o.get("sample_offset", 0), first + o.get("samples", 1))
    if kind == "gaussian" or p.x.dtype != torch.bfloat16:
        return [target.noise(scale, K, sample=sample, **draw) for sample in samples]
    # The factor is rounded, what it multiplies is not: see "The type of the factor" in docs/internals/noise.md.
    one = oracle.factor(torch.ones(1, device=scale.device), kind, torch.float32)
    drawn = [
        (target.noise(torch.ones_like(scale), K, sample=sample, **draw) / one).round() for sample in samples
    ]
    return [oracle.factor(scale, kind, torch.bfloat16)[:, None] * d for d in drawn]


def leaves(p: Problem) -> dict[str, Tensor | None]:
    """The inputs with `requires_grad`, in the memory they have; a packed weight as it is."""
    return {
        k: t if t is None or isinstance(t, QuantizedWeight) else t.detach().requires_grad_()
        for k, t in p.inputs.items()
    }


def results(y: Tensor, inputs: dict[str, Tensor | None], grad_y: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every input that takes one."""
    given = {k: t for k, t in inputs.items() if t is not None and not isinstance(t, QuantizedWeight)}
    grads = torch.autograd.grad(y, list(given.values()), grad_y.reshape(y.shape))
    return {"y": y.detach(), **{f"grad of {k}": g for k, g in zip(given, grads, strict=True)}}


def run(target: Target, p: Problem, **more: Any) -> dict[str, Tensor]:
    inputs = leaves(p)
    return results(target.linear(**inputs, **p.options, **more), inputs, p.grad_y)


def plain(p: Problem, eps: list[Tensor]) -> dict[str, Tensor]:
    """The op written out in torch, all in the dtype of `x`, gradients by autograd.

    Without gaps between rows, which torch's products of some versions would read (see `products.own_rows`).
    """
    inputs = {
        k: None if t is None else _without_gaps(t.detach()).requires_grad_() for k, t in p.inputs.items()
    }
    dtype = p.x.dtype
    x, weight, lora_A, lora_B, bias, lora_x = (None if t is None else t.to(dtype) for t in inputs.values())
    rows = x.flatten(0, -2)
    products = []
    for group, eps_g in zip(rows.chunk(len(eps)) if rows.numel() else [rows], eps, strict=False):
        perturbed = weight.to(torch.promote_types(dtype, torch.float32)) + eps_g
        products.append(group @ perturbed.to(dtype).t())
    y = torch.cat(products)
    if bias is not None:
        y = y + bias
    if lora_A is not None:
        branch = x if lora_x is None else lora_x
        y = y + p.options["scaling"] * ((branch.flatten(0, -2) @ lora_A.t()) @ lora_B.t())
    return results(y.view(*p.x.shape[:-1], weight.shape[0]), inputs, _without_gaps(p.grad_y))


def _without_gaps(t: Tensor) -> Tensor:
    """Column-major stays so: torch adds up such products in another order."""
    return t if t.dim() == 2 and t.t().is_contiguous() else t.contiguous()


def exact_and_scale(p: Problem, eps: list[Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results in a wider type than the one judged, and the `scale` of each."""
    wide = np.longdouble if p.x.dtype == torch.float64 else np.float64
    if wide is np.longdouble and np.finfo(wide).eps > 1e-18:
        pytest.skip("float64 is judged in a wider type, which NumPy does not have on this platform")

    def widen(t: Tensor | None) -> Any:
        return None if t is None else t.detach().double().cpu().numpy().astype(wide)

    inputs = {k: widen(t) for k, t in p.inputs.items()}
    weights = [inputs["weight"] + widen(e) for e in eps]
    dy, scaling = widen(p.grad_y), p.options["scaling"]
    exact = formula(inputs, weights, dy, scaling)
    # Squares in place of every value: the sum of squared terms.
    squares = {k: None if t is None else t.astype(np.float64) ** 2 for k, t in inputs.items()}
    squared = formula(
        squares, [w.astype(np.float64) ** 2 for w in weights], dy.astype(np.float64) ** 2, scaling**2
    )
    return exact, {k: np.sqrt(v) for k, v in squared.items()}


def formula(inputs: dict[str, Any], weights: list[Any], dy: Any, scaling: float) -> dict[str, Any]:
    """The output and all gradients in NumPy; `weights` holds W + eps of every row group."""
    A, B, bias = inputs["lora_A"], inputs["lora_B"], inputs["bias"]
    x = inputs["x"].reshape(dy.shape[0], -1 if dy.shape[0] else inputs["weight"].shape[1])
    groups = list(zip(np.split(x, len(weights)), np.split(dy, len(weights)), weights, strict=True))
    out = {
        "y": np.concatenate([x_g @ w.T for x_g, _, w in groups]),
        "grad of x": np.concatenate([dy_g @ w for _, dy_g, w in groups]),
        "grad of weight": dy.T @ x,
    }
    if A is not None:
        separate = inputs["lora_x"] is not None
        branch = inputs["lora_x"].reshape(x.shape) if separate else x
        u, v = branch @ A.T, scaling * (dy @ B)
        out["y"] = out["y"] + scaling * (u @ B.T)
        out["grad of lora_A"] = v.T @ branch
        out["grad of lora_B"] = scaling * (dy.T @ u)
        if separate:
            out["grad of lora_x"] = v @ A
        else:
            out["grad of x"] = out["grad of x"] + v @ A
    if bias is not None:
        out["y"] = out["y"] + bias
        out["grad of bias"] = dy.sum(0)
    return out


def check(name: str, got: Tensor, exact: Any, ordinary: Tensor, scale: Any, ulp: float) -> None:
    """Applies the rule to one result."""
    factor = OUTPUT_FACTOR if name == "y" else GRADIENT_FACTOR
    got, ordinary = (t.double().cpu().numpy().reshape(exact.shape) for t in (got, ordinary))
    if not exact.size:
        return
    error, plain_error = np.abs(got - exact), np.abs(ordinary - exact)
    limit = factor * plain_error.max() + ulp * scale.max()
    assert error.max() <= limit, (
        f"{name}: max error {error.max():.3g} > {limit:.3g}, "
        f"plain {plain_error.max():.3g}, scale {scale.max():.3g}"
    )
    if exact.size < 16:  # a mean over so few is no less a matter of luck
        return
    rms, plain_rms, scale_rms = (np.sqrt(np.mean(t**2)) for t in (error, plain_error, scale))
    limit = factor * plain_rms + ulp * scale_rms / math.sqrt(exact.size)
    assert rms <= limit, (
        f"{name}: rms error {rms:.3g} > {limit:.3g}; plain {plain_rms:.3g}, scale {scale_rms:.3g}"
    )


def assert_close(got: Tensor, expected: Tensor, message: str = "", ulp: float = 0) -> None:
    """Two results of this package for the same thing, summed in another order: a few ulp of the largest.

    `ulp` is for an ingredient of a lower precision than the result.
    """
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if expected.numel():
        atol = 8 * max(ulp, torch.finfo(got.dtype).eps) * expected.detach().abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=lambda text: f"{message} {text}")


def check_problem(target: Target, p: Problem, **more: Any) -> dict[str, Tensor]:
    """Runs `p`, applies the rule to the output and every gradient, and returns them."""
    dtype = p.x.dtype
    got = run(target, p, **more)
    eps = group_eps(target, p)
    ordinary = plain(p, eps)
    exact, scale = exact_and_scale(p, eps)
    assert got.keys() == exact.keys() == ordinary.keys()
    for name, value in got.items():
        like = ordinary[name]
        assert value.dtype == like.dtype, f"{name}: expected {like.dtype}, got {value.dtype}"
        assert value.shape == like.shape, (
            f"{name}: expected shape {tuple(like.shape)}, got {tuple(value.shape)}"
        )
        check(name, value, exact[name], like, scale[name], torch.finfo(dtype).eps)
    return got
