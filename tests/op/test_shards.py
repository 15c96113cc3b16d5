"""A layer cut into rows or columns gives what the whole gives (docs/api.md, "Shards")."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close, problem
from targets import Target

import flatlora_kernels as fk

N, K, SIGMA = 83, 200, 0.3
ROW_CUTS = [(0, 1), (1, 35), (35, 83)]
COLUMN_CUTS = [(0, 8), (8, 136), (136, 200)]
LARGE_CUTS = [(0, 96), (96, 200)]


def whole(target: Target, dtype: torch.dtype, noise: str):  # type: ignore[no-untyped-def]
    p = problem(11, N, K, dtype, target.device, rank=4, bias=True, noise=noise)
    p.options.pop("noise_scale")
    if noise == "hadamard":
        p.options["layer_shape"] = (N, K)
    x = p.x.clone().requires_grad_()
    y = target.linear(x, p.weight, p.lora_A, p.lora_B, p.bias, sigma=SIGMA, **p.options)
    (dx,) = torch.autograd.grad(y, x, p.grad_y)
    return p, y.detach(), dx


def test_row_shards(target: Target, dtype: torch.dtype, noise: str) -> None:
    """out_features over ranks: outputs are concatenated, input gradients add up, sigma needs no help."""
    p, y, dx = whole(target, dtype, noise)
    outputs, grads = [], []
    for a, b in ROW_CUTS:
        x = p.x.clone().requires_grad_()
        arguments = (x, p.weight[a:b], p.lora_A, p.lora_B[a:b], p.bias[a:b])
        part = target.linear(*arguments, sigma=SIGMA, row_offset=a, **p.options)
        outputs.append(part.detach())
        grads.append(torch.autograd.grad(part, x, p.grad_y[:, a:b])[0])
    assert_close(torch.cat(outputs, dim=1), y)
    assert_close(sum(grads), dx)


@pytest.mark.parametrize("cuts", [COLUMN_CUTS, LARGE_CUTS], ids=["uneven", "halves"])
def test_column_shards(target: Target, dtype: torch.dtype, noise: str, cuts) -> None:  # type: ignore[no-untyped-def]
    """in_features over ranks: squared norms are summed first, outputs add up, bias goes to one rank."""
    p, y, dx = whole(target, dtype, noise)
    shards = [(p.weight[:, a:b], p.lora_A[:, a:b], p.lora_B) for a, b in cuts]
    squares = sum(
        fk.row_sq_norms(*shard, scaling=p.options["scaling"], backend=target.backend) for shard in shards
    )
    noise_scale = SIGMA / K**0.5 * squares.sqrt()
    outputs, grads = [], []
    for (a, b), shard in zip(cuts, shards, strict=True):
        x = p.x[:, a:b].clone().requires_grad_()
        bias = p.bias if a == 0 else None
        part = target.linear(x, *shard, bias, noise_scale=noise_scale, col_offset=a, **p.options)
        outputs.append(part.detach())
        grads.append(torch.autograd.grad(part, x, p.grad_y)[0])
    # The norms of a 16-bit weight agree in float32, so noise_scale costs a float32 ulp.
    assert_close(sum(outputs), y, ulp=2**-23)
    assert_close(torch.cat(grads, dim=1), dx, ulp=2**-23)


def test_in_features_of_the_whole_layer(target: Target) -> None:
    """flat_noise_scale of one shard with the layer's in_features is that shard's share."""
    p, _, _ = whole(target, torch.float32, "gaussian")
    squares = torch.zeros(N, device=target.device)
    for a, b in COLUMN_CUTS:
        part = fk.flat_noise_scale(p.weight[:, a:b], sigma=SIGMA, in_features=K, backend=target.backend)
        squares += part**2
    expected = fk.flat_noise_scale(p.weight, sigma=SIGMA, backend=target.backend)
    torch.testing.assert_close(squares.sqrt(), expected, rtol=1e-5, atol=0)
