"""Layers of the libraries that pack weights, made of an nn.Linear; a missing library skips the test."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

# What a layer is made with, and its class among PEFT's LoRA layers.
KINDS = {
    "nf4": "Linear4bit",
    "fp4": "Linear4bit",
    "int8": "Linear8bitLt",
    "hqq": "HqqLoraLinear",
    "torchao": "TorchaoLoraLinear",
    "gptq": "GPTQLoraLinear",
    "awq": "AwqLoraLinear",
    "fp8": "Linear",
}


def quantised(kind: str, linear: nn.Linear, dtype: torch.dtype = torch.float32) -> Any:
    """`linear` packed, computing in `dtype`; GPTQ and AWQ get random words. Sizes are multiples of 32."""
    return _MAKERS[kind](linear, dtype)


def _bitsandbytes(linear: nn.Linear, dtype: torch.dtype, kind: str, nested: bool) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    with_bias = linear.bias is not None
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, with_bias, dtype, compress_statistics=nested, quant_type=kind
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # quantises it


def _int8(linear: nn.Linear, dtype: torch.dtype) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    with_bias = linear.bias is not None
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, with_bias, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _hqq(linear: nn.Linear, dtype: torch.dtype) -> Any:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    return hqq.HQQLinear(copy.deepcopy(linear), config, compute_dtype=dtype, device="cpu")


def _torchao(linear: nn.Linear, dtype: torch.dtype) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, dtype=dtype)
    layer.load_state_dict(linear.state_dict())
    quantization.quantize_(layer.requires_grad_(False), quantization.Int8WeightOnlyConfig())
    return layer


def _random_words(layer: Any, group: int) -> Any:
    g = torch.Generator().manual_seed(layer.in_features)
    for name in ("qweight", "qzeros"):
        own = getattr(layer, name)
        own.copy_(torch.randint(-(2**31), 2**31, own.shape, generator=g))
    layer.scales.copy_(0.02 * torch.rand(layer.scales.shape, generator=g))
    if getattr(layer, "g_idx", None) is not None:
        layer.g_idx.copy_(torch.arange(layer.in_features) // group)
    return layer


def _gptqmodel(linear: nn.Linear, dtype: torch.dtype, module: str, name: str) -> Any:
    kinds = pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{module}")
    layer = getattr(kinds, name)(
        bits=4, group_size=32, sym=False, desc_act=False, in_features=linear.in_features,
        out_features=linear.out_features, bias=linear.bias is not None, register_buffers=True,
    )  # fmt: skip
    if linear.bias is not None:
        layer.bias.copy_(linear.bias.detach())
    return _random_words(layer, 32)


def _fp8(linear: nn.Linear, dtype: torch.dtype) -> Any:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    with_bias = linear.bias is not None
    layer = fp8.FP8Linear(linear.in_features, linear.out_features, (32, 32), has_bias=with_bias)
    layer.requires_grad_(False)
    blocks = linear.weight.detach().reshape(linear.out_features // 32, 32, linear.in_features // 32, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    layer.weight.data = (blocks / scale[:, None, :, None]).reshape(linear.weight.shape).to(layer.weight.dtype)
    layer.weight_scale_inv.data = scale
    if with_bias:
        layer.bias.data = linear.bias.detach().clone()
    return layer


_MAKERS: dict[str, Any] = {
    "nf4": lambda linear, dtype: _bitsandbytes(linear, dtype, "nf4", True),
    "fp4": lambda linear, dtype: _bitsandbytes(linear, dtype, "fp4", False),
    "int8": _int8,
    "hqq": _hqq,
    "torchao": _torchao,
    "gptq": lambda linear, dtype: _gptqmodel(linear, dtype, "torch", "TorchLinear"),
    "awq": lambda linear, dtype: _gptqmodel(linear, dtype, "torch_awq", "AwqTorchLinear"),
    "fp8": _fp8,
}
