"""`FlatLoraLinear` of packed weights: that of a dense weight with the decoded values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantised_layers import KINDS, quantised
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, QuantizedWeight, apply_flat_lora
from flatlora_kernels.methods import on_chips
from flatlora_kernels.train.layer import NoisyLayer

OPTIONS: dict[str, Any] = {"r": 4, "sigma": 0.3}


def packed(kind: str) -> Any:
    torch.manual_seed(0)
    return quantised(kind, nn.Linear(64, 128).requires_grad_(False))


def dense_of(layer: Any) -> FlatLoraLinear:
    """The layer of the same values, adapter and noise."""
    weight = layer.weight.dequantize().float()
    bias = None if layer.bias is None else layer.bias.detach().float()
    dense = FlatLoraLinear(weight, bias, stream=layer.stream, **OPTIONS)
    dense.noise_controller.move_to(layer.noise_controller.base, layer.noise_controller.step)
    dense.load_state_dict({n: p for n, p in layer.named_parameters() if "lora_" in n}, strict=False)
    return dense.train(layer.training)


def run(layer: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 64, generator=g).to(dtype).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    torch.sin(y.float()).sum().backward()
    assert y.dtype == dtype
    return [
        y.detach(),
        x.grad.clone(),
        *(p.grad.clone() for n, p in layer.named_parameters() if "lora_" in n),
    ]


def agree(got: list[Tensor], want: list[Tensor], tolerance: float = 2e-5) -> None:
    for value, other in zip(got, want, strict=True):
        assert (value.double() - other.double()).norm() <= tolerance * other.double().norm()


def trained(layer: FlatLoraLinear) -> FlatLoraLinear:
    nn.init.normal_(layer.lora_B, std=0.1)
    layer.noise_controller.advance()
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_from_linear(kind: str) -> None:
    owner = packed(kind)
    layer = trained(FlatLoraLinear.from_linear(owner.train(), **OPTIONS))
    assert layer.base_layer is owner and isinstance(layer.weight, QuantizedWeight)
    assert layer.bias is owner.bias is not None
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    dense = dense_of(layer)
    agree(run(layer), run(dense))
    agree(run(layer, torch.bfloat16), run(dense), 0.05)
    want = run(dense)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(run(layer), want, 0.05)
    agree(run(layer.eval()), run(dense.eval()))
    copied = copy.deepcopy(layer.train())
    agree(run(copied), run(dense.train()))


@pytest.mark.parametrize("format", ["nf4", "fp8", "nvfp4"])
def test_weight_without_a_layer(format: str) -> None:
    torch.manual_seed(0)
    q = QuantizedWeight.quantize(torch.randn(128, 64) / 8, format)
    layer = trained(FlatLoraLinear(q, torch.randn(128), **OPTIONS))
    agree(run(layer), run(dense_of(layer)))
    assert layer.weight is q and set(layer.state_dict()) == {"bias", "lora_A", "lora_B", "_extra_state"}
    other = FlatLoraLinear(q, torch.zeros(128), **OPTIONS)
    other.load_state_dict(layer.state_dict())
    agree(run(other), run(layer))
    layer.double()
    assert torch.equal(layer.weight.dequantize(), q.dequantize())
    dense = dense_of(other).double()
    agree(run(layer, torch.float64), run(dense, torch.float64))
    agree(run(layer.eval(), torch.float64), run(dense.eval(), torch.float64), 1e-9)
    layer.to("meta")
    assert layer.weight.device.type == layer.lora_A.device.type == "meta"


def test_state_dict_has_the_owners_entries() -> None:
    layer = FlatLoraLinear.from_linear(packed("nf4"), **OPTIONS)
    own = {f"base_layer.{name}" for name in layer.base_layer.state_dict()}
    assert set(layer.state_dict()) == own | {"lora_A", "lora_B", "_extra_state"}
    other = FlatLoraLinear.from_linear(packed("nf4"), **OPTIONS)
    adapter = {n: v for n, v in trained(layer).state_dict().items() if not n.startswith("base_layer.")}
    assert not other.load_state_dict(adapter, strict=False).unexpected_keys
    agree(run(other), run(layer))


def test_on_chips() -> None:
    layer = trained(FlatLoraLinear.from_linear(packed("nf4"), **OPTIONS))
    x = torch.randn(5, 64)
    found, dense = (
        on_chips(some, lambda some=some: float(some(x).square().mean()), sigma=0.1, chips=range(3))
        for some in (layer, dense_of(layer))
    )
    assert found == pytest.approx(dense, rel=1e-4) and len(set(found)) == 3


def test_owner_replaces_its_weight() -> None:
    layer = trained(FlatLoraLinear.from_linear(packed("nf4"), **OPTIONS))
    first, scale = layer.weight, layer.noise_scale.clone()
    run(layer)
    assert layer.weight is first
    torch.manual_seed(5)
    other = quantised("nf4", nn.Linear(64, 128))
    layer.base_layer.weight, layer.base_layer.bias = other.weight, other.bias
    run(layer)
    assert not torch.allclose(layer.noise_scale, scale)
    assert torch.equal(layer.weight.dequantize(), QuantizedWeight.of(other).dequantize())
    agree(run(layer), run(dense_of(layer)))


def test_what_packed_weights_refuse() -> None:
    q = QuantizedWeight.quantize(torch.randn(8, 16), "nf4")
    with pytest.raises(
        ValueError, match="train_weight: expected False for a packed weight, got True with nf4"
    ):
        FlatLoraLinear(q, train_weight=True)
    layer = FlatLoraLinear(q)
    with pytest.raises(RuntimeError, match="expected a dense weight to merge into, got one of format 'nf4'"):
        layer.merge()
    assert not layer.merged
    with pytest.raises(TypeError, match="linear: expected an nn.Linear, got int"):
        FlatLoraLinear.from_linear(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["nf4", "int8", "hqq", "gptq"])
def test_apply_flat_lora(kind: str) -> None:
    model = nn.Sequential(packed(kind), nn.Tanh(), nn.Linear(128, 64), packed(kind))
    controller = apply_flat_lora(model, ["0", "2"], r=4, sigma=0.3, verbose=False)
    assert [type(m).__name__ for m in (model[0], model[2])] == ["FlatLoraLinear"] * 2
    assert [model[0].stream, model[2].stream] == [0, 1]
    assert not isinstance(model[3], NoisyLayer)
    model(torch.randn(3, 64)).sum().backward()
    assert apply_flat_lora(model, ".*", r=4, sigma=0.3, verbose=False) is controller
    assert [m.flat_lora_name for m in model.modules() if isinstance(m, FlatLoraLinear)] == ["0", "2", "3"]
    assert apply_flat_lora(model, ".*", sigma=0.3, verbose=False) is controller


def test_tied_weights_share_a_stream() -> None:
    model = nn.Sequential(packed("nf4"), packed("nf4"))
    model[1].weight = model[0].weight
    apply_flat_lora(model, ["0", "1"], r=4, verbose=False)
    assert model[0].stream == model[1].stream


def test_inconsistent_state_is_named() -> None:
    model = nn.Sequential(packed("nf4"))
    model[0].weight.quant_state.absmax = model[0].weight.quant_state.absmax[:3]
    with pytest.raises(ValueError, match="got '0': its packed weight cannot be read: .*absmax"):
        apply_flat_lora(model, ["0"])
