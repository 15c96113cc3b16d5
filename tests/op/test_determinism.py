"""The same call gives the same bits, five times and with any number of threads."""

from __future__ import annotations

import compare
import pytest
import torch
from compare import problem
from targets import Target

import flatlora_kernels as fk

SHAPES = [(1, 200, 333), (19, 333, 520), (130, 200, 333)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_five_runs(target: Target, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    p = problem(*shape, dtype, target.device, rank=8, bias=True)
    first = compare.run(target, p)
    for _ in range(1 if target.interpreted or target.emulated else 4):
        again = compare.run(target, p)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


def test_noise_with_other_thread_counts(target: Target, noise: str, threads) -> None:  # type: ignore[no-untyped-def]
    scale = torch.rand(301, device=target.device)
    weight = torch.randn(301, 517, device=target.device)
    draw = {"seed": 1, "noise": noise, "row_offset": 5, "col_offset": 24}
    drawn, perturbed = [], []
    for count in (1, 2, 3, 8):
        threads(count)
        drawn.append(target.noise(scale, 517, **draw))
        perturbed.append(fk.perturb_weight(weight, scale, backend=target.backend, **draw))
    assert all(torch.equal(t, drawn[0]) for t in drawn)
    assert all(torch.equal(t, perturbed[0]) for t in perturbed)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_products_with_other_thread_counts(
    target: Target, dtype: torch.dtype, shape: tuple[int, ...], threads
) -> None:  # type: ignore[no-untyped-def]
    """No sum is split among threads. (`reference` leaves its sums to torch, which promises no such thing.)"""
    if target.backend == "reference":
        pytest.skip("torch's own products may sum in another order with another number of threads")
    p = problem(*shape, dtype, target.device, bias=True)
    seen = []
    for count in (1, 2, 3):
        threads(count)
        x = p.x.detach().requires_grad_()
        y = target.linear(x, p.weight, bias=p.bias, **p.options)
        norms = fk.row_sq_norms(p.weight, backend=target.backend)
        seen.append((y.detach(), torch.autograd.grad(y, x, p.grad_y)[0], norms))
    for values in seen[1:]:
        for name, value, first in zip(("y", "grad of x", "row_sq_norms"), values, seen[0], strict=True):
            assert torch.equal(value, first), name


def test_global_generators_are_left_alone(target: Target) -> None:
    before = torch.get_rng_state()
    p = problem(3, 17, 24, device=target.device, rank=2)
    compare.run(target, p)
    p.options.pop("noise_scale")
    compare.run(target, p, sigma=0.1)
    target.noise(4, 8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
