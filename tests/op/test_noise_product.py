"""noise_product, and shards of a layer whose noise is a transform: each sees the bits of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from targets import Target, generator, randn

import flatlora_kernels as fk

M, N, K = 6, 75, 200  # tiles of 64: whole ones, and cut ones at both ends


def place(target: Target, dtype: torch.dtype) -> dict[str, Any]:
    return {"dtype": dtype, "device": target.device}


def scales(target: Target, size: int = N) -> torch.Tensor:
    return (0.5 + torch.rand(size, generator=generator(3))).to(target.device)


def close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, plain: float = 0.0) -> None:
    """Within the roundings of a sum of terms whose squares add up to scale^2, and twice the error of torch's own."""
    unit = torch.finfo(found.dtype).eps
    assert ((found.double() - expected).abs() <= 24 * unit * scale + 2 * plain).all()


@pytest.mark.parametrize("strategy", [None, "panel"])
def test_it_is_the_product_with_eps(
    target: Target, dtype: torch.dtype, noise: str, strategy: str | None
) -> None:
    x = randn(2, 3, K, **place(target, dtype)).requires_grad_()
    scale = scales(target)
    draw = {"seed": 5, "stream": 3, "noise": noise, "antithetic": True, "row_offset": 5, "col_offset": 24}
    if noise == "hadamard":
        draw["layer_shape"] = (90, 300)
    options = {"samples": 2, "sample_offset": 1, "strategy": strategy, "backend": target.backend}
    y = fk.noise_product(x, scale, **draw, **options)
    grad = randn(2, 3, N, seed=1, **place(target, dtype))
    (dx,) = torch.autograd.grad(y, x, grad)
    assert y.dtype == dx.dtype == dtype
    for g in range(2):
        eps = target.noise(scale, K, sample=1 + g, dtype=dtype, **draw).double()
        if noise == "near_gaussian" and dtype.itemsize == 2:  # what is drawn has more digits than its type
            eps = target.noise(scale, K, sample=1 + g, **draw).double()
        wide = 8 * (noise == "near_gaussian" and dtype.itemsize == 2) + 1  # its factor is rounded, too
        x_g, grad_g = x[g].detach().double(), grad[g].double()
        close(y[g], x_g @ eps.t(), wide * (x_g.square() @ eps.square().t()).sqrt())
        close(dx[g], grad_g @ eps, wide * (grad_g.square() @ eps.square()).sqrt())


def test_it_is_what_noise_adds_to_a_product(target: Target, dtype: torch.dtype, noise: str) -> None:
    x, weight = randn(M, K, **place(target, dtype)), randn(N, K, seed=1, **place(target, dtype)) / 16
    scale, which = scales(target), {"seed": 5, "noise": noise, "backend": target.backend}
    y = fk.fused_flat_lora_linear(x, weight, noise_scale=scale, noise_accum="split", **which)
    alone = fk.noise_product(x, scale, **which)
    expected = x.double() @ weight.double().t() + alone.double()
    torch.testing.assert_close(
        y.double(), expected, rtol=0, atol=(120 if dtype.itemsize == 2 else 1000) * torch.finfo(dtype).eps
    )


def test_autocast_leaves_it_alone(target: Target) -> None:
    x, scale = randn(M, K, device=target.device), scales(target)
    expected = fk.noise_product(x, scale, seed=1, backend=target.backend)
    with torch.autocast(target.device, torch.bfloat16):
        assert torch.equal(fk.noise_product(x, scale, seed=1, backend=target.backend), expected)


@pytest.mark.parametrize("strategy", ["transform", "panel"])
def test_shards_add_up_to_the_whole(target: Target, strategy: str) -> None:
    """Rows and columns of a layer on several ranks, forward and input gradient."""
    x, weight = randn(M, K, device=target.device), randn(N, K, seed=1, device=target.device)
    grad, scale = randn(M, N, seed=2, device=target.device), scales(target)
    options = {"seed": 5, "noise": "hadamard", "strategy": strategy, "layer_shape": (N, K)}

    def both(rows: slice, cols: slice) -> tuple[torch.Tensor, torch.Tensor]:
        part = x[:, cols].clone().requires_grad_()
        y = target.linear(
            part,
            weight[rows, cols],
            noise_scale=scale[rows],
            row_offset=rows.start,
            col_offset=cols.start,
            **options,
        )
        return y.detach(), torch.autograd.grad(y, part, grad[:, rows])[0]

    y, dx = both(slice(0, N), slice(0, K))
    found_y, found_dx = torch.zeros_like(y), torch.zeros_like(dx)
    for rows in (slice(0, 13), slice(13, 70), slice(70, N)):
        for cols in (slice(0, 8), slice(8, 136), slice(136, K)):
            y_part, dx_part = both(rows, cols)
            found_y[:, rows] += y_part
            found_dx[:, cols] += dx_part
    torch.testing.assert_close(found_y, y, rtol=0, atol=2e-4)
    torch.testing.assert_close(found_dx, dx, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("n", "k"), [(4100, 5000), (300, 70), (2048, 2048), (1, 9), (40, 1)], ids=str)
def test_transform_of_every_size(target: Target, n: int, k: int) -> None:
    """Up to the largest tiles, and those of one row or column."""
    if (target.interpreted or target.emulated) and n * k > 1 << 20:
        n, k = n // 4 + 7, k // 4 + 7
    x = randn(3, k, device=target.device).requires_grad_()
    scale, grad = scales(target, n), randn(3, n, seed=1, device=target.device)
    y = fk.noise_product(x, scale, seed=5, noise="hadamard", strategy="transform", backend=target.backend)
    (dx,) = torch.autograd.grad(y, x, grad)
    eps = target.noise(scale, k, seed=5, noise="hadamard").double()
    x_ = x.detach().double()
    expected_y, expected_dx = x_ @ eps.t(), grad.double() @ eps
    plain_y = (x.detach() @ eps.float().t() - expected_y).abs().max().item()
    plain_dx = (grad @ eps.float() - expected_dx).abs().max().item()
    close(y, expected_y, (x_.square() @ eps.square().t()).sqrt(), plain_y)
    close(dx, expected_dx, (grad.double().square() @ eps.square()).sqrt(), plain_dx)


def test_transform_propagates_nan_to_its_row_alone(target: Target) -> None:
    x, weight = randn(M, K, device=target.device), randn(N, K, seed=1, device=target.device)
    x[2, 7] = float("nan")
    y = target.linear(x, weight, noise_scale=scales(target), seed=1, noise="hadamard", strategy="transform")
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()


def test_compiled(target: Target) -> None:
    scale = scales(target)

    def function(x: torch.Tensor) -> torch.Tensor:
        return fk.noise_product(x, scale, seed=3, noise="hadamard", backend=target.backend) * 2

    x = randn(M, K, device=target.device)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))
