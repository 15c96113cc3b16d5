"""row_sq_norms and flat_noise_scale: within 1e-5 of ||W|| + ||scaling B A||, never negative, addable."""

from __future__ import annotations

import math

import pytest
import torch
from targets import Target, randn

import flatlora_kernels as fk

SHAPES = [(1, 1, 1), (5, 7, 3), (33, 8, 4), (1, 333, 16), (200, 333, 8), (130, 1031, 64), (700, 24, 100)]


def layer(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, adapter_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    N, K, r = shape
    adapter = {"dtype": adapter_dtype or dtype, "device": device}
    A, B = randn(r, K, seed=2, **adapter), randn(N, r, seed=3, **adapter)
    return randn(N, K, seed=1, dtype=dtype, device=device), A, B


def exact_norms(W, A, B, scaling):  # type: ignore[no-untyped-def]
    """||W + scaling B A|| and the sum of norms that its error is measured by, float64."""
    update = scaling * (B.double() @ A.double())
    return (W.double() + update).norm(dim=1), W.double().norm(dim=1) + update.norm(dim=1)


def check(target: Target, W, A, B, scaling=0.75) -> torch.Tensor:  # type: ignore[no-untyped-def]
    squares = fk.row_sq_norms(W, A, B, scaling=scaling, backend=target.backend)
    assert squares.dtype == torch.float32
    assert squares.shape == (W.shape[0],)
    assert (squares >= 0).all()
    norm, bound = exact_norms(W, A, B, scaling)
    assert ((squares.double().sqrt() - norm).abs() <= 1e-5 * bound).all()
    return squares


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(target: Target, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check(target, *layer(shape, dtype, target.device))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_adapter(target: Target, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    W, _, _ = layer(shape, dtype, target.device)
    squares = fk.row_sq_norms(W, backend=target.backend)
    exact = W.double().norm(dim=1)
    assert ((squares.double().sqrt() - exact).abs() <= 1e-5 * exact).all()


@pytest.mark.parametrize("dtype16", [torch.float16, torch.bfloat16])
def test_float32_adapter_beside_16_bit_weight(target: Target, dtype16: torch.dtype) -> None:
    check(target, *layer((33, 72, 8), dtype16, target.device, torch.float32))


@pytest.mark.parametrize("rest", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("shape", [(33, 72, 4), (64, 1031, 32)], ids=str)
def test_cancelling_adapter(
    target: Target, dtype: torch.dtype, shape: tuple[int, int, int], rest: float
) -> None:
    """W = -scaling B A + rest: expanding the square subtracts numbers that agree in nearly all digits."""
    noise, A, B = layer(shape, dtype, target.device)
    W = (-0.75 * (B.double() @ A.double()) + rest * noise.double()).to(dtype)
    check(target, W, A, B)
    scale = fk.flat_noise_scale(W, A, B, scaling=0.75, sigma=0.1, backend=target.backend)
    assert scale.isfinite().all()


def test_large_and_small_values(target: Target) -> None:
    W, A, B = layer((33, 72, 4), torch.float32, target.device)
    check(target, W * 1e15, A * 1e8, B * 1e7)
    check(target, W * 1e-15, A * 1e-8, B * 1e-7)


def test_non_finite_rows_stay_their_own(target: Target) -> None:
    W, A, B = layer((9, 40, 4), torch.float32, target.device)
    W[2, 39] = float("nan")
    W[5, 0] = float("inf")
    squares = fk.row_sq_norms(W, A, B, scaling=0.75, backend=target.backend)
    assert squares[2].isnan()
    assert not squares[5].isfinite()
    assert squares[[0, 1, 3, 4, 6, 7, 8]].isfinite().all()


def test_norms_that_float32_squares_do_not_hold(target: Target) -> None:
    """As the documentation says: an infinite norm, never another finite one, and zero."""
    W, _, _ = layer((3, 40, 4), torch.float32, target.device)
    for size, expected in ((1e20, float("inf")), (1e-25, 0.0)):
        scale = fk.flat_noise_scale(W * size, sigma=0.1, backend=target.backend)
        assert (scale == expected).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("K", [1, 40, 128, 131, 333])
def test_infinite_adapter(target: Target, dtype: torch.dtype, K: int) -> None:
    """A row of the update that is infinite makes that norm infinite, whatever the kernel's tiles are filled up with."""
    W, A, B = layer((9, K, 4), dtype, target.device)
    B[3, 1] = float("inf")
    squares = fk.row_sq_norms(W, A, B, scaling=0.75, backend=target.backend)
    assert squares[3] == float("inf")
    assert squares[[0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("scaling", [0.0, -0.5, 2])
def test_scaling(target: Target, scaling: float) -> None:
    check(target, *layer((33, 72, 8), torch.float32, target.device), scaling=scaling)


def test_layouts(target: Target, dtype: torch.dtype) -> None:
    W, A, B = layer((33, 72, 8), dtype, target.device)
    check(target, W.t().contiguous().t(), A, B)
    check(target, W, A.t().contiguous().t(), B.t().contiguous().t())
    check(target, W.repeat_interleave(2, 0)[::2], A, B)
    check(target, W.repeat_interleave(2, 1)[:, ::2], A.repeat_interleave(2, 1)[:, ::2], B)


def test_large_column_major_weight(target: Target, dtype: torch.dtype) -> None:
    W, A, B = layer((517, 1031, 8), dtype, target.device)
    check(target, W.t().contiguous().t(), A, B)


def test_zero_sizes(target: Target) -> None:
    assert fk.row_sq_norms(torch.ones(0, 8, device=target.device), backend=target.backend).shape == (0,)
    assert fk.row_sq_norms(torch.ones(3, 0, device=target.device), backend=target.backend).tolist() == [
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_perturbed_weight_of_zero_size(target: Target, shape: tuple[int, int]) -> None:
    """Two empty tensors have one address, and share no memory."""
    out = torch.empty(shape, device=target.device)
    scale = torch.ones(shape[0], device=target.device)
    weight = torch.ones(shape, device=target.device)
    assert fk.perturb_weight(weight, scale, seed=1, out=out, backend=target.backend) is out


def test_weight_and_adapter_are_constants(target: Target) -> None:
    W, A, B = (t.requires_grad_() for t in layer((5, 8, 2), torch.float32, target.device))
    assert not fk.row_sq_norms(W, A, B, backend=target.backend).requires_grad
    sigma = torch.tensor(0.1, device=target.device, requires_grad=True)
    assert not fk.flat_noise_scale(W, A, B, sigma=sigma, backend=target.backend).requires_grad


@pytest.mark.parametrize("form", ["float", "float32", "float64", "bfloat16"])
def test_flat_noise_scale(target: Target, dtype: torch.dtype, form: str) -> None:
    W, A, B = layer((33, 72, 8), dtype, target.device)
    sigma = (
        0.125 if form == "float" else torch.tensor(0.125, dtype=getattr(torch, form), device=target.device)
    )
    norm, bound = exact_norms(W, A, B, 0.75)
    for in_features in (None, 72, 1000):
        scale = fk.flat_noise_scale(
            W, A, B, scaling=0.75, sigma=sigma, in_features=in_features, backend=target.backend
        )
        assert scale.dtype == torch.float32
        factor = 0.125 / math.sqrt(in_features or 72)
        assert ((scale.double() - factor * norm).abs() <= 1e-5 * factor * bound).all()


def test_sigma_zero_is_silent(target: Target) -> None:
    W, A, B = layer((5, 8, 2), torch.float32, target.device)
    assert not fk.flat_noise_scale(W, A, B, sigma=0.0, backend=target.backend).any()


def test_column_shards_add_up(target: Target, dtype: torch.dtype) -> None:
    W, A, B = layer((33, 200, 8), dtype, target.device)
    whole = check(target, W, A, B)
    parts = [
        fk.row_sq_norms(W[:, a:b], A[:, a:b], B, scaling=0.75, backend=target.backend)
        for a, b in ((0, 64), (64, 72), (72, 200))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=2e-5, atol=0)


def test_row_shards_are_rows(target: Target, dtype: torch.dtype) -> None:
    W, A, B = layer((33, 200, 8), dtype, target.device)
    whole = check(target, W, A, B)
    parts = [
        fk.row_sq_norms(W[a:b], A, B[a:b], scaling=0.75, backend=target.backend)
        for a, b in ((0, 1), (1, 17), (17, 33))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=2e-5, atol=0)
