"""Under autocast the op casts what F.linear casts, and gradients come back in each parameter's own type."""

from __future__ import annotations

import compare
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, problem
from targets import Target

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("low", LOW, ids=str)
def test_type_value_and_gradients(target: Target, low: torch.dtype) -> None:
    p = problem(6, 33, 40, device=target.device, rank=4, bias=True, lora_x=True)
    inputs = compare.leaves(p)
    with torch.autocast(target.device, low):
        y = target.linear(**inputs, **p.options)
        like = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    assert y.dtype == like.dtype == low
    given = list(inputs.values())
    grads = torch.autograd.grad(y, given, p.grad_y.to(low))
    assert [g.dtype for g in grads] == [torch.float32] * 6

    by_hand = {k: t.detach().to(low).requires_grad_() for k, t in p.inputs.items()}
    expected = target.linear(**by_hand, **p.options)
    assert torch.equal(y, expected)
    for name, got, like in zip(
        by_hand, grads, torch.autograd.grad(expected, list(by_hand.values()), p.grad_y.to(low)), strict=True
    ):
        assert torch.equal(got, like.float()), name


@pytest.mark.parametrize("low", LOW, ids=str)
def test_value_is_that_of_functional_linear(target: Target, low: torch.dtype) -> None:
    p = problem(6, 33, 40, device=target.device, bias=True, noisy=False)
    with torch.autocast(target.device, low):
        assert_close(
            target.linear(p.x, p.weight, bias=p.bias),
            F.linear(p.x, p.weight, p.bias),
            ulp=torch.finfo(low).eps,
        )


def test_mixed_types_are_cast_together(target: Target) -> None:
    """A 16-bit x on a float32 layer, as the layer before hands it over."""
    p = problem(6, 33, 40, device=target.device, rank=4, bias=True)
    with torch.autocast(target.device, torch.bfloat16):
        y = target.linear(p.x.bfloat16(), p.weight, p.lora_A, p.lora_B, p.bias, **p.options)
        assert torch.equal(y, target.linear(**p.inputs, **p.options))


def test_float64_is_left_alone(target: Target) -> None:
    if torch.float64 not in target.dtypes:
        pytest.skip(f"backend {target.backend!r} does not take float64")
    p = problem(6, 33, 40, torch.float64, target.device)
    with torch.autocast(target.device, torch.bfloat16):
        assert target.linear(p.x, p.weight, **p.options).dtype == torch.float64


def test_sigma_under_autocast(target: Target) -> None:
    """The norm is that of the weight as cast, which is the weight that gets perturbed."""
    p = problem(6, 33, 40, device=target.device, rank=4)
    p.options.pop("noise_scale")
    with torch.autocast(target.device, torch.bfloat16):
        y = target.linear(**p.inputs, **p.options, sigma=0.2)
    cast = {k: None if t is None else t.bfloat16() for k, t in p.inputs.items()}
    assert torch.equal(y, target.linear(**cast, **p.options, sigma=0.2))


def test_backward_inside_autocast(target: Target) -> None:
    p = problem(6, 33, 40, device=target.device, rank=4)
    inputs = {k: t for k, t in compare.leaves(p).items() if t is not None}
    with torch.autocast(target.device, torch.bfloat16):
        y = target.linear(**inputs, **p.options)
        inside = torch.autograd.grad(y, list(inputs.values()), p.grad_y.bfloat16(), retain_graph=True)
    outside = torch.autograd.grad(y, list(inputs.values()), p.grad_y.bfloat16())
    for name, a, b in zip(inputs, inside, outside, strict=True):
        assert torch.equal(a, b), name


def test_disabled_region(target: Target) -> None:
    p = problem(6, 33, 40, device=target.device)
    with torch.autocast(target.device, torch.bfloat16), torch.autocast(target.device, enabled=False):
        assert target.linear(p.x, p.weight, **p.options).dtype == torch.float32
