"""The op on packed weights: that of the same call on `dequantize()`, on every backend and strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_weights import LAYOUTS, packed
from targets import Target, randn

import flatlora_kernels as fk
from flatlora_kernels.choice import dispatch
from flatlora_kernels.core.records import Choice, Draw
from flatlora_kernels.op.flat import flat

SHAPES = [(33, 40), (7, 35), (130, 192)]  # blocks that cross rows, odd columns, more than a tile
ids = [f"{n}x{k}" for n, k in SHAPES]


def scale_of(N: int, device: str) -> torch.Tensor:
    return (0.01 + 0.02 * torch.rand(N, generator=torch.Generator().manual_seed(1))).to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_perturb(target: Target, dtype: torch.dtype, layout: str, shape: tuple[int, int]) -> None:
    """Bit for bit that of the values."""
    q = packed(layout, *shape, dtype, target.device)
    scale = scale_of(shape[0], target.device)
    for noise in ("gaussian", "rademacher"):
        got = fk.perturb_weight(q, scale, seed=5, noise=noise, backend=target.backend)
        expected = fk.perturb_weight(q.dequantize(), scale, seed=5, noise=noise, backend=target.backend)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_perturb_shards(target: Target, dtype: torch.dtype, layout: str, noise: str) -> None:
    """Views by rows and by columns, into memory in either order."""
    q = packed(layout, 48, 80, dtype, target.device).narrow(0, 5, 37).narrow(1, 24, 45)
    scale = scale_of(37, target.device)
    where = {"row_offset": 5, "col_offset": 24, "layer_shape": (48, 80)}
    for order in (torch.contiguous_format, None):
        out = torch.empty(37, 45, dtype=dtype, device=target.device)
        out = out if order else torch.empty(45, 37, dtype=dtype, device=target.device).t()
        got = fk.perturb_weight(q, scale, seed=5, noise=noise, backend=target.backend, out=out, **where)
        dense = q.dequantize()
        expected = fk.perturb_weight(dense, scale, seed=5, noise=noise, backend=target.backend, **where)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_row_sq_norms(
    target: Target, dtype: torch.dtype, layout: str, shape: tuple[int, int], rank: int
) -> None:
    N, K = shape
    q = packed(layout, N, K, dtype, target.device)
    A = randn(rank, K, dtype=dtype, device=target.device) if rank else None
    B = randn(N, rank, dtype=dtype, device=target.device) if rank else None
    got = fk.row_sq_norms(q, A, B, scaling=0.5, backend=target.backend)
    exact = q.dequantize().double()
    if rank:
        exact = exact + 0.5 * B.double() @ A.double()
    torch.testing.assert_close(got.double(), exact.square().sum(1), rtol=2e-6, atol=0)


def call(q: Any, target: Target, M: int, dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
    N, K = q.shape
    leaves = {
        "x": randn(M, K, seed=1, dtype=dtype, device=target.device),
        "lora_A": randn(4, K, seed=2, dtype=dtype, device=target.device) / K**0.5,
        "lora_B": randn(N, 4, seed=3, dtype=dtype, device=target.device),
        "bias": randn(N, seed=4, dtype=dtype, device=target.device),
    }
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    x, A, B, bias = leaves.values()
    y = fk.fused_flat_lora_linear(x, q, A, B, bias, scaling=0.5, seed=7, backend=target.backend, **options)
    y.backward(randn(M, N, seed=5, dtype=dtype, device=target.device))
    return {"y": y.detach(), **{name: t.grad for name, t in leaves.items()}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", ["fused", "panel", "transform", None])
def test_linear(target: Target, dtype: torch.dtype, layout: str, strategy: str | None, noise: str) -> None:
    """Output and gradients, of the same call on the values. The same bits, where the product is the same."""
    if strategy == "transform" and noise != "hadamard":
        pytest.skip("hadamard's own")
    q = packed(layout, 72, 136, dtype, target.device)
    options = {"noise": noise, "strategy": strategy, "noise_scale": scale_of(72, target.device)}
    fuses = noise in target.module.FUSES and target.module.fuses_packed(q)
    if strategy == "fused" and not fuses:
        with pytest.raises(NotImplementedError, match="'fused'.* for (noise|this weight)"):
            call(q, target, 9, dtype, **options)
        return
    got, expected = call(q, target, 9, dtype, **options), call(q.dequantize(), target, 9, dtype, **options)
    exact = strategy in ("fused", "panel") and target.backend in ("reference", "cpu")
    for name, value in got.items():
        if exact:
            assert torch.equal(value, expected[name]), name
        else:
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                value, expected[name], rtol=tolerance, atol=tolerance * float(expected[name].abs().max())
            )


@pytest.mark.parametrize("layout", ["nf4", "gptq", "fp8_block"])
def test_linear_without_noise(target: Target, dtype: torch.dtype, layout: str) -> None:
    q = packed(layout, 72, 136, dtype, target.device)
    got, expected = call(q, target, 9, dtype), call(q.dequantize(), target, 9, dtype)
    for name, value in got.items():
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance * float(expected[name].abs().max())
        )


@pytest.mark.parametrize("layout", ["nf4_nested", "int8"])
def test_samples_and_antithetic(target: Target, layout: str, noise: str) -> None:
    q = packed(layout, 40, 72, torch.float32, target.device)
    options = {
        "noise": noise, "noise_scale": scale_of(40, target.device), "samples": 3, "antithetic": True,
        "row_offset": 3, "col_offset": 8, "layer_shape": (64, 96),
    }  # fmt: skip
    got = call(q, target, 12, torch.float32, **options)
    expected = call(q.dequantize(), target, 12, torch.float32, **options)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_autocast(target: Target) -> None:
    """Cast as the values would be."""
    q = packed("nf4", 40, 72, torch.float32, target.device)
    x = randn(6, 72, device=target.device)
    draw = {
        "noise_scale": scale_of(40, target.device),
        "seed": 3,
        "backend": target.backend,
        "strategy": "panel",
    }
    with torch.autocast(target.device, torch.bfloat16):
        got = fk.fused_flat_lora_linear(x, q, **draw)
        expected = fk.fused_flat_lora_linear(x, q.dequantize(), **draw)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


@pytest.mark.parametrize("strategy", ["fused", "panel"])
def test_backward_under_autocast(target: Target, strategy: str) -> None:
    """What torch multiplies there is not cast either."""
    q = packed("nf4", 40, 72, torch.float32, target.device)
    options = {"noise_scale": scale_of(40, target.device), "strategy": strategy}
    if strategy == "fused" and not target.module.fuses_packed(q):
        pytest.skip("goes by panels")
    x = randn(6, 72, seed=1, device=target.device).requires_grad_()
    y = fk.fused_flat_lora_linear(x, q, seed=7, backend=target.backend, **options)
    with torch.autocast(target.device, torch.bfloat16):
        y.backward(randn(6, 40, seed=5, device=target.device))
    y = fk.fused_flat_lora_linear(x, q, seed=7, backend=target.backend, **options)
    (plain,) = torch.autograd.grad(y, x, randn(6, 40, seed=5, device=target.device))
    assert torch.equal(x.grad, plain)


def test_nothing_to_multiply(target: Target) -> None:
    for N, K, M in ((24, 40, 0), (0, 40, 3), (24, 0, 3)):
        q = packed("nf4", N, K, torch.float32, target.device)
        for draw in ({"noise_scale": scale_of(N, target.device), "seed": 1}, {}):
            x = randn(M, K, device=target.device).requires_grad_()
            y = fk.fused_flat_lora_linear(x, q, backend=target.backend, **draw)
            assert y.shape == (M, N) and not y.any()
            y.sum().backward()
            assert x.grad.shape == (M, K) and (K == 0 or N > 0 or not x.grad.any())


def test_explain(target: Target) -> None:
    """What would run, also where the weight's format decides."""
    for layout in ("nf4", "gptq"):
        q = packed(layout, 40, 72, torch.bfloat16, target.device)
        x = randn(6, 72, dtype=torch.bfloat16, device=target.device)
        draw = {"noise_scale": scale_of(40, target.device), "backend": target.backend}
        found = fk.explain(x, q, **draw)
        fused = target.module.fuses_packed(q)
        assert found.strategy in (("fused", "panel") if fused else ("panel",))
        if not fused:
            with pytest.raises(
                NotImplementedError, match="does not implement strategy='fused' for this weight"
            ):
                fk.explain(x, q, **draw, strategy="fused")
        own = target.backend in dispatch.OWN_PRODUCT
        assert fk.explain(x, q, backend=target.backend).strategy == ("fused" if own else "plain")


def test_the_op_is_one_of_torchs() -> None:
    q = packed("gptq", 24, 40, torch.float32)
    x, A, B = randn(6, 40), randn(4, 40), randn(24, 4)
    draw, choice = Draw(scale_of(24, "cpu"), torch.tensor(3)), Choice("panel", "folded", "reference")
    codes, more = flat(q)
    operands = (x.requires_grad_(), codes, A.requires_grad_(), B.requires_grad_(), None, None, 0.5)
    torch.library.opcheck(torch.ops.flatlora.linear.default, (*operands, *draw, *choice, *more))


def test_state_that_does_not_fit() -> None:
    """Refused by name, before anything is read."""
    q = packed("nf4_nested", 16, 64, torch.float32)
    p, t = q.packing, q.parts
    for parts, message in (
        (t._replace(codes=t.codes[:-1]), "codes: expected at least 512 numbers.*got 511"),
        (t._replace(scale=t.scale[:-1]), "scale: expected 16 numbers, as format 'nf4' has it, got 15"),
        (t._replace(scale=torch.cat([t.scale, t.scale])), "scale: expected 16 numbers.*got 32"),
        (t._replace(scale=t.scale.float()), "scale: expected uint8.*got torch.float32"),
        (t._replace(nested=None), "nested: expected a tensor.*got None"),
        (t._replace(table=t.table[:8]), "table: expected 16 numbers.*got 8"),
        (t._replace(offset=t.offset.double()), "offset: expected float32.*got torch.float64"),  # type: ignore[union-attr]
        (t._replace(codes=t.codes.view(-1, 2).t()), "codes: expected numbers side by side"),
        (t._replace(table=t.table.to("meta")), "table: expected the device of codes, cpu.*got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            fk.QuantizedWeight(p, parts)
    with pytest.raises(ValueError, match="row_bits|col_bits: expected at least 64 numbers.*got 63"):
        g = packed("gptq", 16, 64, torch.float32)
        fk.QuantizedWeight(g.packing, g.parts._replace(col_bits=g.parts.col_bits[:-1]))  # type: ignore[index]
    with pytest.raises(ValueError, match="length: expected a part of the 16 of dimension 0, got 9 from 8 on"):
        q.narrow(0, 8, 9)


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8", "fp8_block", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(54, 1), (1, 54), (129, 1)], ids=str)
def test_a_single_column_or_row_is_packed(format: str, shape: tuple[int, int]) -> None:
    values = randn(*shape)
    got = fk.QuantizedWeight.quantize(values, format).dequantize()
    assert float((got - values).abs().max()) < 0.2 * float(values.abs().max())


def test_decodes_to_another_type() -> None:
    """`to` rounds twice, as a cast of what the owner decodes to."""
    q = packed("gptq", 16, 64, torch.float16)
    assert torch.equal(q.to(torch.bfloat16).dequantize(), q.dequantize().to(torch.bfloat16))
    q = packed("nf4", 16, 64, torch.float32)
    assert torch.equal(q.to(torch.float16).dequantize(), q.dequantize().to(torch.float16))


def test_immutable() -> None:
    q = packed("nf4", 16, 64, torch.float32)
    with pytest.raises(AttributeError, match="immutable"):
        q.packing = None  # type: ignore[assignment]
    with pytest.raises(TypeError, match="expected a weight in one of the formats .*got int"):
        fk.QuantizedWeight.of(3)
    with pytest.raises(ValueError, match="format: expected one of .*nf4.*got 'nf5'"):
        fk.QuantizedWeight.quantize(torch.zeros(2, 2), "nf5")
    with pytest.raises(TypeError, match="weight: expected a floating-point tensor"):
        fk.QuantizedWeight.quantize(torch.zeros(2, 2, dtype=torch.int64), "nf4")
