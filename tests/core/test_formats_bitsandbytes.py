"""`QuantizedWeight.of` of bitsandbytes' layers and weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from owned_weights import randn, read

from flatlora_kernels import QuantizedWeight

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional
# The second and third have blocks that cross rows, the last two an odd number of columns.
SHAPES = [(64, 128), (64, 96), (7, 34), (33, 40), (6, 35), (5, 31)]
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_of(w: torch.Tensor, **options: Any) -> Any:
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, compute_dtype=w.dtype)
    layer.weight = bnb.nn.Params4bit(w, requires_grad=False, **options)
    return layer.to("cpu")


def generic(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """Its dequantisation in plain torch. That of its library is wrong on CPUs with AVX-512 where rows have no whole
    number of blocks, bitsandbytes 0.50.2.
    """
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = weight.data.view(torch.uint8).reshape(-1)
    plain = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)
    return plain(codes, absmax, state.code, state.blocksize, state.shape, state.dtype)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bits(shape: tuple[int, int], kind: str, nested: bool) -> None:
    for dtype in TYPES:
        for block in (32, 64, 128):
            layer = layer_of(
                randn(*shape, dtype), blocksize=block, quant_type=kind, compress_statistics=nested
            )
            weight, state = layer.weight, layer.weight.quant_state
            scales = [state.absmax, state.code, *([state.state2.absmax, state.state2.code] if nested else [])]
            own = generic(weight, state)
            q = read(layer, own, weight.data, *scales, *([state.offset] if nested else []))
            assert q.parts.codes.data_ptr() == weight.data_ptr() and q.format == kind
            if shape[1] % block == 0 and shape[1] % 2 == 0:
                read(weight, F.dequantize_4bit(weight.data, state), weight.data, *scales)


def test_many_nested_blocks() -> None:
    """More than 256 scales, which have more than one scale themselves, the last of a part of a block."""
    layer = layer_of(randn(70, 255), quant_type="nf4", compress_statistics=True)
    state = layer.weight.quant_state
    assert state.state2.absmax.numel() == 2
    read(layer, generic(layer.weight, state), layer.weight.data, state.absmax)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_storage(storage: torch.dtype) -> None:
    layer = layer_of(randn(32, 128, torch.bfloat16), quant_type="nf4", quant_storage=storage)
    assert layer.weight.dtype == storage
    own = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    read(layer, own, layer.weight.data, layer.weight.quant_state.absmax)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_repacked_for_cpu(kind: str, nested: bool) -> None:
    """As a forward pass in eval mode without gradients leaves it, on CPUs with avx512bf16: in bfloat16."""
    layer = layer_of(randn(96, 128), quant_type=kind, compress_statistics=nested, blocksize=32)
    weight = layer.weight
    weight.data, weight.quant_state = F._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    state = weight.quant_state
    codes, absmax = weight.data, state.absmax
    again, back = F._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
    # What it leaves of absmax is rounded once more, or transposed.
    own = generic(
        again, F.QuantState(absmax.t().reshape(-1), back.shape, back.code, 32, kind, torch.bfloat16)
    )
    q = read(layer, own, codes, absmax)
    assert q.parts.codes.data_ptr() == codes.data_ptr() and q.dtype == torch.bfloat16


def test_after_its_forward_passes() -> None:
    """The weight that the layer used, whatever it did to it."""
    layer = layer_of(randn(64, 128, torch.bfloat16), quant_type="nf4")
    before = QuantizedWeight.of(layer).dequantize()
    layer(randn(3, 128, torch.bfloat16).requires_grad_())
    assert torch.equal(QuantizedWeight.of(layer).dequantize(), before)
    with torch.no_grad():
        layer.eval()(randn(3, 128, torch.bfloat16))
    torch.testing.assert_close(QuantizedWeight.of(layer).dequantize(), before, rtol=2**-6, atol=0)


def test_eight_bits() -> None:
    for shape in [(64, 128), (7, 35), (1, 3)]:
        layer = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(randn(*shape), requires_grad=False, has_fp16_weights=False)
        layer = layer.to("cpu")
        own = F.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
        read(layer.weight, own, layer.weight.data, layer.weight.SCB)
        read(layer, own, layer.weight.data, layer.weight.SCB)
        layer(randn(2, shape[1], torch.float16))
        assert layer.weight.SCB is None
        q = read(layer, own, layer.state.CB, layer.state.SCB)
        assert q.parts.codes.data_ptr() == layer.state.CB.data_ptr()


def test_errors_of_four_bits() -> None:
    def changed(field: str, value: Any, nested: bool = True) -> Any:
        layer = layer_of(randn(32, 128), quant_type="nf4", compress_statistics=nested)
        setattr(layer.weight.quant_state, field, value)
        return layer

    absmax = torch.zeros(3)
    for layer, message in [
        (bnb.nn.Linear4bit(32, 8), "quant_state: expected a QuantState.*got None"),
        (
            changed("absmax", absmax, False),
            r"quant_state.absmax: expected 64 numbers of float32, got .*\(3,\)",
        ),
        (
            changed("absmax", absmax),
            r"quant_state.absmax: expected 64 numbers of uint8, got float32 of shape \(3,\)",
        ),
        (changed("state2", None), "quant_state.state2: expected the scales of a nested absmax, got None"),
        (changed("offset", None), "quant_state.offset: expected 1 numbers of float32, got None"),
        (changed("shape", (32, 129)), "weight: expected 2064 bytes, got 2048"),
        (changed("quant_type", "af4"), "quant_state.quant_type: expected nf4 or fp4, got af4"),
        (changed("dtype", torch.float64), "quant_state.dtype: expected float32, bfloat16 or float16"),
        (
            changed("absmax", absmax.to("meta").repeat(22)[:64], False),
            "scale: expected the device of codes, cpu.*got meta",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantizedWeight.of(layer)
    layer = layer_of(randn(32, 128), quant_type="nf4")
    layer.weight.data = layer.weight.data.t()
    with pytest.raises(ValueError, match="a row of them is a transposed weight"):
        QuantizedWeight.of(layer)


def test_saved_after_repacking() -> None:
    """`state_dict` of a repacked layer undoes that in place, but leaves absmax transposed in bfloat16, so that its own
    forward pass is wrong; or, where absmax is packed, of the weight's type, so that its own rounds it twice.
    bitsandbytes 0.50.2.
    """

    def saved(dtype: torch.dtype, nested: bool) -> Any:
        layer = layer_of(randn(64, 128, dtype), quant_type="nf4", compress_statistics=nested)
        weight = layer.weight
        weight.data, weight.quant_state = F._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
        layer.state_dict()
        return layer

    with pytest.raises(ValueError, match="quant_state.absmax: expected 128 numbers of float32, got bfloat16"):
        QuantizedWeight.of(saved(torch.float32, False))
    with pytest.raises(ValueError, match="quant_state.state2.dtype: expected float32 .* got torch.bfloat16"):
        QuantizedWeight.of(saved(torch.bfloat16, True))
    layer = saved(torch.float32, True)
    read(
        layer,
        generic(layer.weight, layer.weight.quant_state),
        layer.weight.data,
        layer.weight.quant_state.absmax,
    )


def test_errors_of_eight_bits() -> None:
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    with pytest.raises(ValueError, match=r"weight: expected int8, got float32 of shape \(32, 64\)"):
        QuantizedWeight.of(layer)
    layer = layer.to("cpu")
    layer.weight.SCB = layer.weight.SCB[1:]
    with pytest.raises(
        ValueError, match=r"SCB: expected 32 numbers of float32.*got float32 of shape \(31,\)"
    ):
        QuantizedWeight.of(layer)
    layer.weight.SCB = None
    with pytest.raises(ValueError, match="SCB: expected 32 numbers of float32.*got None"):
        QuantizedWeight.of(layer.weight)
