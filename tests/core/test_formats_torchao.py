"""`QuantizedWeight.of` of torchao's tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from owned_weights import randn, read
from torch import nn

from flatlora_kernels import QuantizedWeight

pytest.importorskip("torchao")
from torchao.prototype.mx_formats.mx_tensor import MXTensor  # noqa: E402
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor  # noqa: E402
from torchao.quantization import PerBlock, PerRow, PerTensor  # noqa: E402
from torchao.quantization.quant_primitives import MappingType  # noqa: E402
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor  # noqa: E402
from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor  # noqa: E402

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_of(weight: Any) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def test_float8() -> None:
    for dtype in TYPES:
        for shape in [(64, 128), (7, 35)]:
            for number in (torch.float8_e4m3fn, torch.float8_e5m2):
                for by in (PerRow(), PerTensor()):
                    weight = Float8Tensor.from_hp(randn(*shape, dtype), number, by)
                    q = read(layer_of(weight), weight.dequantize(), weight.qdata, weight.scale)
                    assert q.parts.codes.data_ptr() == weight.qdata.data_ptr()
        weight = Float8Tensor.from_hp(randn(64, 96, dtype), granularity=PerBlock((16, 32)))
        read(weight, weight.dequantize(), weight.qdata, weight.scale)


def test_int8() -> None:
    for dtype in TYPES:
        for shape in [(64, 128), (7, 35)]:
            for mapping in (MappingType.SYMMETRIC, MappingType.ASYMMETRIC):
                for by in (PerRow(), PerTensor()):
                    weight = Int8Tensor.from_hp(randn(*shape, dtype) + 0.1, by, mapping)
                    q = read(layer_of(weight), weight.dequantize(), weight.qdata, weight.scale)
                    assert q.parts.codes.data_ptr() == weight.qdata.data_ptr()
                    assert (q.parts.zero is None) == (mapping == MappingType.SYMMETRIC)


@pytest.mark.parametrize("swizzled", [False, True])
def test_mx(swizzled: bool) -> None:
    for kind in (torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e5m2):
        for dtype in TYPES[:2]:
            for shape in [(64, 128), (7, 96), (130, 160)]:
                w = randn(*shape, dtype) * torch.logspace(-30, 30, shape[0], 2.0)[:, None].to(dtype)
                w[1, :32] = 0
                weight = MXTensor.to_mx(w, kind, is_swizzled_scales=swizzled)
                read(layer_of(weight), weight.dequantize(), weight.qdata, weight.scale)
        half = MXTensor(
            weight.qdata, weight.scale, kind, 32, torch.float16, weight.kernel_preference, None, swizzled
        )
        q = QuantizedWeight.of(half)  # powers of two that float16 does not have
        torch.testing.assert_close(q.dequantize(), half.dequantize(), rtol=0, atol=0, equal_nan=True)


def test_mx_without_a_number() -> None:
    """NaN as a scale."""
    weight = MXTensor.to_mx(randn(8, 64), torch.float4_e2m1fn_x2)
    weight.scale.view(torch.uint8)[3, 1] = 255
    values = QuantizedWeight.of(weight).dequantize()
    assert values.isnan().sum() == 32
    torch.testing.assert_close(values, weight.dequantize(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("swizzled", [False, True])
def test_nvfp4(swizzled: bool) -> None:
    for dtype in TYPES:
        for shape in [(64, 128), (7, 80), (130, 208)]:
            w = randn(*shape)
            for whole in (None, w.abs().max() / (448 * 6)):
                weight = NVFP4Tensor.to_nvfp4(w, per_tensor_scale=whole, is_swizzled_scales=swizzled).to(
                    dtype
                )
                owned = [weight.qdata, weight.scale, *([] if whole is None else [weight.per_tensor_scale])]
                q = read(layer_of(weight), weight.dequantize(), *owned)
                assert q.parts.codes.data_ptr() == weight.qdata.data_ptr()


def test_errors() -> None:
    w = randn(32, 64)
    int8 = Int8Tensor.from_hp(w, PerRow())
    scaled = Int8Tensor.from_hp(w, PerRow(), act_pre_scale=torch.ones(64))
    mx = MXTensor.to_mx(w, torch.float4_e2m1fn_x2)
    short = NVFP4Tensor.to_nvfp4(w)
    short.scale = short.scale[1:]
    other = NVFP4Tensor.to_nvfp4(w)
    other.scale = other.scale.float()
    fp8 = Float8Tensor.from_hp(w)
    fp8.scale = fp8.scale[:5]
    int8.scale = int8.scale.double()
    for weight, message in [
        (NVFP4Tensor.to_nvfp4(w).t(), "qdata: expected a contiguous tensor, got strides"),
        (mx.t(), "qdata: expected a contiguous tensor, got strides"),
        (short, r"scale: expected 128 numbers of float8_e4m3fn, got .*\(31, 4\)"),
        (other, "scale.dtype: expected float8_e4m3fn, got torch.float32"),
        (fp8, r"scale.shape: expected divisors of 32 and 64, got \(5, 1\)"),
        (int8, "scale: expected 32 numbers of float32 or bfloat16 or float16, got float64"),
        (scaled, "act_pre_scale: expected None: it scales the input"),
        (MXTensor.to_mx(w, "fp6_e3m2"), "elem_dtype: expected float4_e2m1fn_x2.*got fp6_e3m2"),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantizedWeight.of(weight)


def test_another_tensor() -> None:
    from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor

    weight = Int4Tensor(
        torch.zeros(8, 32, dtype=torch.int8), torch.ones(2, 8), torch.zeros(2, 8), [1, 32], (8, 64)
    )
    with pytest.raises(TypeError, match="torchao NVFP4Tensor.*got Linear with a weight of Int4Tensor, torch"):
        QuantizedWeight.of(layer_of(weight))
