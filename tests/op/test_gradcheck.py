"""Numerical derivatives in float64, and what happens to second ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import INPUTS, problem
from targets import Target
from torch.autograd import gradcheck


@pytest.fixture(autouse=True)
def float64_only(target: Target) -> None:
    if torch.float64 not in target.dtypes:
        pytest.skip(f"backend {target.backend!r} does not take float64")


def check(target: Target, M: int = 6, N: int = 5, K: int = 17, **options: Any) -> None:
    p = problem(M, N, K, torch.float64, target.device, **options)
    given = {k: t.requires_grad_() for k, t in p.inputs.items() if t is not None}

    def function(*values: torch.Tensor) -> torch.Tensor:
        return target.linear(**dict(zip(given, values, strict=True)), **p.options)

    assert gradcheck(function, tuple(given.values()))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(target: Target, noise: str, rank: int, bias: bool) -> None:
    check(target, rank=rank, bias=bias, noise=noise)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_without_noise(target: Target, rank: int, bias: bool) -> None:
    check(target, rank=rank, bias=bias, noisy=False)


def test_explicit_sigma_zero(target: Target) -> None:
    check(target, rank=3, bias=True, noisy=False, sigma=0.0)


@pytest.mark.parametrize("antithetic", [False, True])
def test_gradients_with_every_feature(target: Target, antithetic: bool) -> None:
    features = {"samples": 3, "sample_offset": 1, "stream": 9, "row_offset": 3, "col_offset": 8}
    check(target, rank=3, bias=True, lora_x=True, antithetic=antithetic, **features)


def test_one_row(target: Target) -> None:
    check(target, M=1, N=9, K=8, rank=2, bias=True)


def test_leading_dimensions(target: Target) -> None:
    p = problem(6, 5, 17, torch.float64, target.device)
    x = p.x.view(2, 3, 17).requires_grad_()
    assert gradcheck(lambda x: target.linear(x, p.weight, **p.options), (x,))


@pytest.mark.parametrize("wanted", INPUTS)
def test_differentiating_twice_is_an_error(target: Target, wanted: str) -> None:
    """create_graph=True alone is fine; using the graph says what is wrong."""
    p = problem(6, 5, 17, torch.float64, target.device, rank=3, bias=True, lora_x=True)
    inputs = {k: t.requires_grad_() for k, t in p.inputs.items()}
    # Not linear in y, so that every gradient depends on every input.
    loss = target.linear(**inputs, **p.options).square().sum()
    (grad,) = torch.autograd.grad(loss, inputs[wanted], create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="flatlora::linear: cannot be differentiated twice.*create_graph"):
        grad.sum().backward()


def test_create_graph_leaves_the_gradients_alone(target: Target) -> None:
    p = problem(6, 5, 17, torch.float64, target.device, rank=3)
    given = [p.x.requires_grad_(), p.lora_A.requires_grad_(), p.lora_B.requires_grad_()]
    x, A, B = given
    y = target.linear(x, p.weight, A, B, **p.options)
    once = torch.autograd.grad(y, given, p.grad_y, retain_graph=True)
    graph = torch.autograd.grad(y, given, p.grad_y, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, graph, strict=True))
