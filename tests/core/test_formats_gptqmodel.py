"""`QuantizedWeight.of` of gptqmodel's GPTQ and AWQ layers, against its own dequantisation in torch. Words, scales and
orders of groups are random: what a checkpoint may hold.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from owned_weights import read

from flatlora_kernels import QuantizedWeight

pytest.importorskip("gptqmodel")
from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # noqa: E402
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear  # noqa: E402
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm  # noqa: E402

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_of(cls: Any, N: int, K: int, dtype: torch.dtype = torch.float16, **options: Any) -> Any:
    options = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False, **options}
    layer = cls(in_features=K, out_features=N, bias=False, register_buffers=True, **options)
    g = torch.Generator().manual_seed(N * K)
    for words in (layer.qweight, layer.qzeros):
        info = torch.iinfo(words.dtype)
        words.copy_(torch.randint(info.min, info.max + 1, words.shape, generator=g))
    layer.scales = (torch.rand(layer.scales.shape, generator=g) / 20).to(dtype)
    if options["desc_act"]:
        layer.g_idx = layer.g_idx[torch.randperm(K, generator=g)]
    return layer


def check(layer: Any, own: torch.Tensor) -> QuantizedWeight:
    q = read(layer, own.t(), layer.qweight, layer.qzeros, layer.scales)
    assert q.parts.codes.data_ptr() == layer.qweight.data_ptr()
    assert q.parts.zero.data_ptr() == layer.qzeros.data_ptr()
    return q


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits: int, desc_act: bool) -> None:
    for dtype in TYPES:
        for shape in [(64, 96), (33, 70)]:
            layer = layer_of(TorchLinear, *shape, dtype, bits=bits, desc_act=desc_act)
            check(layer, layer.dequantize_weight())


def test_gptq_words_and_versions() -> None:
    """Other words; zeros of format 1 and 2 as this kernel takes them, which converts them when they are loaded."""
    for words in (torch.int32, torch.int16, torch.int8):
        layer = layer_of(TorchLinear, 64, 96, pack_dtype=words)
        assert layer.qweight.dtype == words
        for version in (1, 2):
            layer.qzero_format(version)
            check(layer, layer.dequantize_weight())
    whole = layer_of(TorchLinear, 64, 96, group_size=-1)
    check(whole, whole.dequantize_weight())
    check(whole.eval(), whole.dequantize_weight())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_awq(bits: int) -> None:
    for dtype in TYPES:
        for group in (32, -1):
            layer = layer_of(AwqTorchLinear, 48, 96, dtype, bits=bits, group_size=group)
            own = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, bits, layer.group_size)
            check(layer, own)


def test_kernels_for_a_gpu() -> None:
    """The same words; the CUDA kernel of AWQ cannot be made here."""
    from gptqmodel.nn_modules.qlinear.gemm_awq_triton import AwqGEMMTritonLinear
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear

    layer = layer_of(TritonV2Linear, 64, 96)
    check(layer, layer.dequantize_weight())
    layer = layer_of(AwqGEMMTritonLinear, 64, 96)
    check(layer, dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size))


def test_errors() -> None:
    def changed(field: str, value: Any, cls: Any = TorchLinear, **options: Any) -> Any:
        layer = layer_of(cls, 64, 96, **options)
        setattr(layer, field, value)
        return layer

    class MarlinLinear(torch.nn.Module):
        qweight = torch.zeros(2, 2)

    MarlinLinear.__module__ = "gptqmodel.nn_modules.qlinear.marlin"
    for layer, message in [
        (
            MarlinLinear(),
            "source: expected a gptqmodel layer that keeps the words.*TorchLinear.*got MarlinLinear",
        ),
        (changed("bias", None, bits=3), "bits: expected 2, 4 or 8 .*got 3"),
        (changed("bias", None, AwqTorchLinear, bits=3), "bits: expected 2, 4 or 8 .*got 3"),
        (
            changed("qweight", torch.zeros(11, 64).int()),
            r"qweight: expected shape \(12, 64\), got \(11, 64\)",
        ),
        (changed("qweight", torch.zeros(12, 64)), "qweight: expected integers, got float32"),
        (changed("qzeros", torch.zeros(3, 7).int()), r"qzeros: expected shape \(3, 8\), got \(3, 7\)"),
        (
            changed("scales", torch.zeros(2, 64)),
            r"scales: expected 192 numbers .*got float32 of shape \(2, 64\)",
        ),
        (changed("g_idx", torch.zeros(95).int()), "g_idx: expected 96 numbers"),
        (changed("g_idx", torch.full((96,), 3).int()), "g_idx: expected groups of 3, got 3 to 3"),
        (changed("online_full_had", True), "source.had_K: expected no rotation of the input, got one"),
        (
            changed("qzeros", torch.zeros(2, 8).int(), AwqTorchLinear),
            r"qzeros: expected shape \(3, 8\), got \(2, 8\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantizedWeight.of(layer)
