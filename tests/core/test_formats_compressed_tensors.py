"""`QuantizedWeight.of` of the linear layers that compressed-tensors compresses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from owned_weights import randn, read
from torch import nn

from flatlora_kernels import QuantizedWeight

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor, compress_module  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def parameter(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def layer_of(w: torch.Tensor, activations: dict[str, Any] | None = None, **options: Any) -> nn.Linear:
    """Compressed with scales of the largest values."""
    args = QuantizationArgs(**options)
    (N, K), strategy = w.shape, args.strategy
    rows, cols = {
        "tensor": (N, K), "channel": (1, K), "block": args.block_structure or (0, 0),
    }.get(str(getattr(strategy, "value", strategy)), (1, args.group_size))  # fmt: skip
    padded = nn.functional.pad(w, (0, -K % cols, 0, -N % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, -1, cols)
    layer = nn.Linear(K, N, bias=False)
    layer.weight = parameter(w.clone())
    whole = None
    if strategy == "tensor_group":
        whole = (448 * 6 / w.abs().max().float()).reshape(1)
        layer.weight_global_scale = parameter(whole)
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args, whole)
    if strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    layer.weight_scale, layer.weight_zero_point = parameter(scale), parameter(zero)
    layer.quantization_scheme = QuantizationScheme(
        targets=["Linear"],
        weights=args,
        input_activations=QuantizationArgs(**activations) if activations else None,
    )
    compress_module(layer)
    return layer


def check(layer: nn.Linear) -> QuantizedWeight:
    state = {name: t.detach() for name, t in layer.state_dict().items()}
    compressor = BaseCompressor.get_value_from_registry(layer.quantization_scheme.format.value)
    own = compressor.decompress(state, layer.quantization_scheme)["weight"]
    q = read(layer, own, *layer.parameters())
    codes = getattr(layer, "weight_packed", None)
    assert q.parts.codes.data_ptr() == (layer.weight if codes is None else codes).data_ptr()
    return q


BY = [
    {"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "group", "group_size": 32},
    {"strategy": "block", "block_structure": [32, 48]},
]  # fmt: skip


@pytest.mark.parametrize("by", BY, ids=lambda by: by["strategy"])
def test_fp8(by: dict[str, Any]) -> None:
    for dtype in TYPES:
        for shape in [(64, 96), (33, 160)]:
            layer = layer_of(randn(*shape, dtype), num_bits=8, type="float", **by)
            assert layer.weight.dtype == torch.float8_e4m3fn and check(layer).format == "fp8"


@pytest.mark.parametrize("by", BY[:3], ids=lambda by: by["strategy"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8(by: dict[str, Any], symmetric: bool) -> None:
    for dtype in TYPES:
        w = randn(33, 96, dtype) + 0.1
        layer = layer_of(w, {"num_bits": 8, "dynamic": True}, num_bits=8, symmetric=symmetric, **by)
        assert layer.weight.dtype == torch.int8 and check(layer).format == "int8"


@pytest.mark.parametrize("by", BY, ids=lambda by: by["strategy"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packed(bits: int, symmetric: bool, by: dict[str, Any]) -> None:
    """Words of 32 bits, whose last is part of a word."""
    if by["strategy"] in ("tensor", "block") and not symmetric:
        pytest.skip("compressed-tensors packs no zeros of tensors and blocks")
    for dtype in TYPES:
        for shape in [(64, 96), (33, 160), *([(7, 35)] if by["strategy"] != "group" else [])]:
            layer = layer_of(randn(*shape, dtype) + 0.1, num_bits=bits, symmetric=symmetric, **by)
            q = check(layer)
            assert (q.parts.zero is None) == symmetric and q.packing.bits == bits


def test_mxfp8() -> None:
    w = randn(33, 96, torch.bfloat16) * torch.logspace(-30, 30, 33, 2.0)[:, None].bfloat16()
    layer = layer_of(
        w, num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8,
    )  # fmt: skip
    assert layer.quantization_scheme.format == "mxfp8-quantized" and check(layer).format == "mxfp8"


@pytest.mark.parametrize("dtype", TYPES[:2])
def test_mxfp4(dtype: torch.dtype) -> None:
    w = randn(33, 96, dtype) * torch.logspace(-30, 30, 33, 2.0)[:, None].to(dtype)
    layer = layer_of(
        w, num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8,
    )  # fmt: skip
    assert layer.quantization_scheme.format == "mxfp4-pack-quantized"
    layer.weight_scale.data[2, 1] = 255  # infinite, and no NaN, to this library
    state = {name: t.detach() for name, t in layer.state_dict().items()}
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    own = compressor.decompress(state, layer.quantization_scheme)["weight"]
    torch.testing.assert_close(QuantizedWeight.of(layer).dequantize(), own, rtol=0, atol=0, equal_nan=True)
    layer.weight_scale.data[2, 1] = 127
    assert check(layer).format == "mxfp4"


@pytest.mark.parametrize("dtype", TYPES)
def test_nvfp4(dtype: torch.dtype) -> None:
    for shape in [(33, 80), (64, 256)]:
        layer = layer_of(
            randn(*shape, dtype), num_bits=4, type="float", strategy="tensor_group", group_size=16,
            scale_dtype=torch.float8_e4m3fn,
        )  # fmt: skip
        assert layer.quantization_scheme.format == "nvfp4-pack-quantized" and check(layer).format == "nvfp4"


def test_errors() -> None:
    def changed(field: str, value: Any, **options: Any) -> nn.Linear:
        layer = layer_of(randn(32, 64), **{"num_bits": 4, "strategy": "group", "group_size": 32, **options})
        setattr(layer, field, value)
        return layer

    float4 = {
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn,
    }
    for layer, message in [
        (changed("weight_scale", parameter(torch.ones(32))), r"weight_scale: expected 64 numbers .*\(32,\)"),
        (
            changed("weight_packed", parameter(torch.zeros(32, 7).int())),
            "weight_packed: expected 256 numbers of int32",
        ),
        (
            changed("weight_zero_point", None, symmetric=False),
            "weight_zero_point: expected 8 numbers of int32, got None",
        ),
        (changed("weight_g_idx", torch.zeros(64)), "weight_g_idx: expected groups of neighbours"),
        (changed("in_features", 72), "weight_packed: expected 288 numbers of int32"),
        (changed("bias", None, num_bits=3), "num_bits: expected 1, 2, 4 or 8 .*got 3"),
        (
            changed("weight_scale", parameter(torch.ones(32, 4)), **float4),
            "weight_scale: expected 128 numbers of float8",
        ),
        (
            changed("weight_global_scale", parameter(torch.ones(2)), **float4),
            "weight_global_scale: expected 1 numbers",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantizedWeight.of(layer)
    layer = layer_of(randn(32, 64), num_bits=4, strategy="channel")
    del layer.weight_packed
    layer.weight = parameter(randn(32, 64))  # as its model's first forward pass leaves it: a dense layer
    with pytest.raises(
        TypeError, match="compressed-tensors.*got Linear with a weight of Parameter, torch.float32"
    ):
        QuantizedWeight.of(layer)
    layer.weight = parameter(torch.zeros(64, 32).to(torch.float8_e4m3fn).t())
    with pytest.raises(
        ValueError, match=r"weight: expected shape \(32, 64\) in rows, got .*strides \(1, 32\)"
    ):
        QuantizedWeight.of(layer)
