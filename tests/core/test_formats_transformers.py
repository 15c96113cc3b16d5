"""`QuantizedWeight.of` of the fp8 layers of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from owned_weights import randn, read
from torch import nn

from flatlora_kernels import QuantizedWeight

pytest.importorskip("transformers")
pytest.importorskip("transformers.integrations.finegrained_fp8")
from transformers.integrations import finegrained_fp8  # noqa: E402
from transformers.integrations.finegrained_fp8 import FP8Linear  # noqa: E402


def blocks_of(
    shape: tuple[int, int], block: tuple[int, int] | None, scale: torch.Tensor, **options: Any
) -> FP8Linear:
    layer = FP8Linear(shape[1], shape[0], block, **options)
    layer.weight = nn.Parameter((randn(*shape) * 100).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    return layer


def test_blocks() -> None:
    """The last block of a row and of a column may be part of one."""
    for shape in [(256, 384), (130, 200), (7, 35)]:
        grid = -(-shape[0] // 128), -(-shape[1] // 128)
        layer = blocks_of(shape, (128, 128), torch.rand(grid) / 100)
        own = finegrained_fp8._dequantize_fp8_weight(
            layer.weight, layer.weight_scale_inv, layer.block_size, torch.float32
        )
        q = read(layer, own, layer.weight, layer.weight_scale_inv)
        assert q.parts.codes.data_ptr() == layer.weight.data_ptr()
        if shape[0] % 128 == 0:  # as it is when a checkpoint is loaded
            load = finegrained_fp8.Fp8Dequantize(None)._dequantize_one
            for dtype in (torch.bfloat16, torch.float16):
                loaded = load(layer.weight, layer.weight_scale_inv, dtype)
                assert torch.equal(q.to(dtype).dequantize(), loaded)


def test_one_scale() -> None:
    layer = blocks_of((33, 40), None, torch.tensor(0.013))
    own = finegrained_fp8._dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, None, torch.float32)
    read(layer, own, layer.weight, layer.weight_scale_inv)


def test_scales_that_are_exponents() -> None:
    codes = torch.randint(100, 150, (2, 3), dtype=torch.uint8)
    for scale in (codes, codes.view(torch.float8_e8m0fnu)):
        layer = blocks_of((256, 384), (128, 128), scale)
        own = finegrained_fp8.Fp8Dequantize(None)._dequantize_one(layer.weight, scale, torch.float32)
        read(layer, own, layer.weight, layer.weight_scale_inv)


@pytest.mark.parametrize(
    "name", ["fbgemm_fp8.FbgemmFp8Linear", "compressed_tensors.CompressedTensorsFP8Linear"]
)
def test_rows(name: str) -> None:
    """Its product is that of codes, then scaled by row; there is no dequantisation of its own."""
    file, name = name.split(".")
    module = pytest.importorskip(f"transformers.integrations.{file}")
    if not hasattr(module, name):
        pytest.skip(f"this transformers has no {name}")
    layer = getattr(module, name)(35, 33, False)
    layer.weight = nn.Parameter((randn(33, 35) * 100).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale.data = torch.rand_like(layer.weight_scale)
    q = read(layer, layer.weight.float() * layer.weight_scale.view(33, 1), layer.weight, layer.weight_scale)
    assert q.parts.codes.data_ptr() == layer.weight.data_ptr()


def test_errors() -> None:
    good = torch.ones(1, 2)
    dense = blocks_of((33, 200), (128, 128), good)
    dense.weight = nn.Parameter(randn(33, 200))
    turned = blocks_of((33, 200), (128, 128), good)
    turned.weight = nn.Parameter(turned.weight.t(), requires_grad=False)
    for layer, message in [
        (dense, r"weight: expected float8_e4m3fn, got float32 of shape \(33, 200\)"),
        (blocks_of((33, 200), (128, 128), good.double()), "weight_scale_inv: expected 2 numbers of float32"),
        (blocks_of((33, 200), (64, 64), good), r"weight_scale_inv: expected 4 numbers .*\(1, 2\)"),
        (turned, "weight: expected a contiguous tensor, got strides"),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantizedWeight.of(layer)
