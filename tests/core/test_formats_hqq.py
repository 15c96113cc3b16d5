"""`QuantizedWeight.of` of hqq's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from owned_weights import randn, read
from torch import nn

from flatlora_kernels import QuantizedWeight

pytest.importorskip("hqq")
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer  # noqa: E402

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer_of(w: torch.Tensor, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = BaseQuantizeConfig(**options)
    config["weight_quant_params"]["optimize"] = False  # the search for scales, which takes time
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = w.clone()
    return HQQLinear(layer, config, compute_dtype=dtype, device="cpu")


def check(layer: Any) -> QuantizedWeight:
    q = read(layer, layer.dequantize(), layer.W_q, layer.meta["scale"], layer.meta["zero"])
    assert q.parts.codes.data_ptr() == layer.W_q.data_ptr()
    return q


@pytest.mark.parametrize("bits", [8, 6, 4, 2, 1.58, 1])
def test_layers(bits: float) -> None:
    for dtype in TYPES:
        for axis in (0, 1):
            for group in (8, 32):
                w = randn(64, 96)
                for as_float in (False, True) if group == 32 else (False,):
                    layer = layer_of(
                        w, dtype, nbits=bits, group_size=group, axis=axis, view_as_float=as_float
                    )
                    assert layer.W_q.dtype == (dtype if as_float else torch.uint8)
                    check(layer)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_groups_of_rows(bits: int) -> None:
    """Axis 0: groups of rows, which are at a distance."""
    for shape, group in [((64, 35), 16), ((40, 7), 40), ((24, 96), 8)]:
        check(layer_of(randn(*shape), nbits=bits, group_size=group, axis=0))


def test_three_bits() -> None:
    """Ten codes in a word of 32 bits, of which some lie in two bytes."""
    for axis, shape in [(0, (64, 96)), (1, (40, 96)), (1, (20, 64))]:
        for dtype in TYPES:
            q = check(layer_of(randn(*shape), dtype, nbits=3, group_size=32, axis=axis))
            assert q.packing.bits == 3


def test_rows_in_one_word() -> None:
    """Axis 1, and fewer groups in a word's distance than in a row."""
    check(layer_of(randn(1, 256), nbits=2, group_size=8, axis=1))
    check(layer_of(randn(2, 128), nbits=2, group_size=8, axis=1))


@pytest.mark.parametrize("axis", [0, 1])
def test_without_groups(axis: int) -> None:
    for shape in [(32, 48), (16, 40)]:
        check(layer_of(randn(*shape), torch.bfloat16, nbits=4, group_size=None, axis=axis))


def test_one_scale() -> None:
    layer = layer_of(randn(16, 64), nbits=4, group_size=32, axis=1)
    options = {"channel_wise": False, "group_size": None, "axis": 1, "device": "cpu"}
    codes, meta = Quantizer.quantize(randn(16, 64), nbits=4, **options)
    layer.W_q = nn.Parameter(codes, requires_grad=False)
    layer.meta = {**layer.meta, **meta}
    check(layer)


def test_places_that_are_no_sums() -> None:
    for shape, options in [
        ((6, 64), {"nbits": 2, "axis": 1}),  # a word has codes of rows 1.5 apart
        ((64, 96), {"nbits": 3, "axis": 1}),
        ((4, 48), {"nbits": 4, "axis": 1}),  # groups cross rows
        ((48, 64), {"nbits": 4, "axis": 0}),
    ]:
        with pytest.raises(
            ValueError, match="W_q: expected places of .* a number of the row plus one of the column"
        ):
            QuantizedWeight.of(layer_of(randn(*shape), group_size=32, **options))


def test_errors() -> None:
    def changed(**fields: Any) -> Any:
        layer = layer_of(randn(16, 64), nbits=4, group_size=32, axis=1)
        layer.meta.update(fields)
        return layer

    missing = changed()
    del missing.meta["scale"]
    short = changed()
    short.W_q = nn.Parameter(short.W_q[1:], requires_grad=False)
    empty = HQQLinear(None, BaseQuantizeConfig(), device="cpu")
    for layer, message in [
        (missing, r"meta\['scale'\]: expected 32 numbers of float32, got None"),
        (changed(zero=torch.zeros(31)), r"meta\['zero'\]: expected 32 numbers of float32, got .*\(31,\)"),
        (
            changed(zero=torch.zeros(1)),
            r"meta\['zero'\]: expected 32 numbers of float32, got float32 of shape \(1,\)",
        ),
        (
            changed(scale=torch.zeros(32).half()),
            r"meta\['scale'\]: expected 32 numbers of float32, got float16",
        ),
        (changed(packing=None), r"meta\['packing'\]: expected one of 8bit_u8.*, got None"),
        (changed(view_as_float=True), r"W_q: expected float32, got uint8 of shape \(16, 32\)"),
        (
            changed(compute_dtype=torch.float64),
            r"meta\['compute_dtype'\]: expected float32.*got torch.float64",
        ),
        (short, r"W_q: expected codes of 16 x 64 values, got uint8 of shape \(15, 32\)"),
        (empty, "meta: expected a quantised layer, got None"),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantizedWeight.of(layer)
