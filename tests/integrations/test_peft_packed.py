"""PEFT's LoRA layers of packed weights under noise: those of dense ones with the decoded values, and eps added."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantised_layers import KINDS, quantised
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model  # noqa: E402
from peft_models import agree, flat_layers, scramble, with_noise  # noqa: E402

from flatlora_kernels import QuantizedWeight, flatness  # noqa: E402
from flatlora_kernels.integrations import peft as integration  # noqa: E402
from flatlora_kernels.integrations.peft import FlatLinear, apply_flat_lora, remove_flat_lora  # noqa: E402

# PEFT warns of the rounding of merged weights, and of torchao's layers without a recipe.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BITSANDBYTES = ["nf4", "fp4", "int8"]


class Net(nn.Module):
    """x (..., 64) -> (..., 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x)).to(x.dtype)).to(self.head.weight.dtype))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], **options})


def packed_net(kind: str, dtype: torch.dtype | None = torch.float32) -> Net:
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    for name in ("up", "down"):
        setattr(net, name, quantised(kind, getattr(net, name), dtype))
    # By these PEFT tells bitsandbytes' layers.
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind in ("nf4", "fp4"), kind == "int8"
    return net


def dense_net(net: Net) -> Net:
    dense = Net().requires_grad_(False)
    dense.head.load_state_dict(net.head.state_dict())
    for name in ("up", "down"):
        base, linear = getattr(net, name), getattr(dense, name)
        linear.weight.data = QuantizedWeight.of(base).dequantize().float()
        if linear.bias is not None:  # PEFT's merge of hqq's layers loses it
            linear.bias.data = linear.bias.data * 0 if base.bias is None else base.bias.detach().float()
    return dense


def two_adapters(model: Any) -> None:
    model.add_adapter("second", lora(r=3, lora_alpha=9))
    model.base_model.set_adapter(["default", "second"])


def pair(
    kind: str,
    sigma: float = 0.3,
    dtype: torch.dtype | None = torch.float32,
    prepare: Callable[[Any], object] = lambda model: None,
    **options: Any,
) -> tuple[Any, Any]:
    """PEFT's model of dense layers with the decoded weights, and that of packed ones, converted."""
    net = packed_net(kind, dtype)
    dense = dense_net(net)
    models = []
    for base in (dense, net):
        torch.manual_seed(1)
        model: Any = get_peft_model(base, lora(**options))
        prepare(model)
        scramble(model)
        models.append(model.train())
    peft, flat = models
    state = {name: p for name, p in flat.state_dict().items() if "lora_" in name}
    assert not peft.load_state_dict(state, strict=False).unexpected_keys
    flat.controller = apply_flat_lora(flat, sigma=sigma, seed=5, verbose=False)
    return peft, flat


def dense_twin(flat: Any) -> Any:
    """PEFT's model of dense layers with the values that those of `flat` have now. A state dict would repack these."""
    net = Net()
    net.head.load_state_dict(flat.base_model.model.head.state_dict())
    net.up, net.down = (flat_layers(flat)[name].base_layer for name in ("up", "down"))
    twin: Any = get_peft_model(dense_net(net), lora()).train()
    twin.load_state_dict({n: p for n, p in flat.named_parameters() if "lora_" in n}, strict=False)
    return twin


def run(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output, gradients of x and of the adapters, and the generator's state after the pass."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    model.zero_grad()
    y = model(x)
    torch.sin(2 * y.float()).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return {"y": y.detach(), "x": x.grad.clone(), "generator": torch.get_rng_state(), **found}


def bits(model: nn.Module) -> list[Tensor]:
    """Of the packed weights, as they lie in memory."""
    weights = [QuantizedWeight.of(layer.base_layer) for layer in flat_layers(model).values()]
    return [
        part.reshape(-1).view(torch.uint8).clone() for q in weights for part in q.parts if part is not None
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_noise(kind: str) -> None:
    peft, flat = pair(kind)
    layers = flat_layers(flat)
    assert {type(layer).__name__ for layer in layers.values()} == {
        "FlatLinear" if KINDS[kind] == "Linear" else f"Flat{KINDS[kind]}"
    }
    before = bits(flat)
    agree(run(flat), run(with_noise(peft, flat)))
    difference = (run(flat)["y"] - run(peft)["y"]).abs().max()
    assert difference > 0.02  # else this test says nothing
    flat.controller.advance()
    agree(run(flat), run(with_noise(peft, flat)))
    assert all(map(torch.equal, bits(flat), before))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["dropout", "several", "several_dropout", "dora", "dora_dropout", "lora_bias"]
)
def test_variants(kind: str, name: str) -> None:
    if "dora" in name and kind in ("gptq", "awq", "fp8"):
        pytest.skip("PEFT has no DoRA for it")
    if name == "lora_bias" and kind in ("hqq", "torchao"):
        pytest.skip("PEFT has no lora_bias for it")
    options: dict[str, Any] = {"use_dora": "dora" in name, "lora_bias": name == "lora_bias"}
    if "dropout" in name:
        options["lora_dropout"] = 0.4
    if "several" in name:
        options["prepare"] = two_adapters
    peft, flat = pair(kind, **options)
    agree(run(flat), run(with_noise(peft, flat)), rtol=5e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp8"])
def test_without_noise_peft_computes(kind: str) -> None:
    """The very bits, at sigma = 0, in eval mode, with adapters disabled and with noise switched off."""
    torch.manual_seed(0)
    _, flat = pair(kind, sigma=0.3, lora_dropout=0.3)
    own = copy.deepcopy(flat)
    remove_flat_lora(own)
    assert {type(m).__name__ for m in own.modules() if hasattr(m, "lora_A")} == {KINDS[kind]}

    def same() -> None:
        got, want = run(flat), run(own)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)

    with flat.controller.disabled():
        same()
    with flat.disable_adapter(), own.disable_adapter():
        x = torch.randn(3, 64)
        assert torch.equal(flat(x), own(x))
    assert not torch.allclose(run(flat)["y"], run(own)["y"], atol=1e-3)
    flat.controller.target_sigma = 0.0
    same()
    flat.eval(), own.eval()
    same()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp8"])
def test_types_and_autocast(kind: str) -> None:
    """The product has the type that the owner computes in, the result that of x; autocast does not change it."""
    dtype = torch.float16 if kind in ("gptq", "awq") else torch.bfloat16
    peft, flat = pair(kind, dtype=dtype, lora_dropout=0.2)
    exact = run(with_noise(peft, flat).double(), torch.float64)

    def near(got: dict[str, Tensor], x_type: torch.dtype, tolerance: float) -> None:
        assert got["x"].dtype == x_type
        for name in exact.keys() - {"generator"}:
            error = (got[name].double() - exact[name]).norm() / exact[name].norm()
            assert error < tolerance, name

    near(run(flat, dtype), dtype, 8 * torch.finfo(dtype).eps)
    if kind in ("nf4", "fp4"):
        near(run(flat), torch.float32, 8 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near(run(flat), torch.float32, 16 * 2.0**-8)


def test_autocast_leaves_the_owners_type() -> None:
    _, flat = pair("nf4")
    layer, x = flat_layers(flat)["up"], _x()
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), want)


def test_flatness() -> None:
    """Along the noise of the op; what moves the weights themselves refuses packed ones."""
    peft, flat = pair("nf4")
    x = _x()
    steps = (-0.2, 0.0, 0.2)
    got = flatness.line(flat, lambda: flat(x).square().sum(), steps)
    apply_flat_lora(peft, sigma=0.3, verbose=False)
    want = flatness.line(peft, lambda: peft(x).square().sum(), steps)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=0)
    before = bits(flat)
    with pytest.raises(
        ValueError, match="expected dense weights, which plane moves, got one of format 'nf4' in 'up'"
    ):
        flatness.plane(flat, lambda: flat(x).square().sum(), (0.1,))
    assert all(map(torch.equal, bits(flat), before))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "hqq"])
def test_merging(kind: str) -> None:
    """PEFT's merge and unmerge, which pack again; the record and the norms follow."""
    peft, flat = pair(kind)
    own = copy.deepcopy(flat)
    remove_flat_lora(own)
    layer = flat_layers(flat)["up"]
    before = layer.noise_scale.clone()
    for model in (flat, own):
        model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"^up: .*merged"):
        run(flat)
    x = torch.randn(3, 64)
    with flat.controller.disabled():
        assert torch.equal(flat(x), own(x))
    flat.controller.advance()
    q = QuantizedWeight.of(layer.base_layer)
    expected = 0.3 / layer.in_features**0.5 * q.dequantize().norm(dim=1)
    torch.testing.assert_close(layer.noise_scale, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.noise_scale, before, rtol=0.2, atol=0)
    for model in (flat, own):
        model.unmerge_adapter()
    agree(run(flat), run(with_noise(dense_twin(flat), flat)))
    merged = flat.merge_and_unload()
    assert not any(isinstance(m, FlatLinear) for m in merged.modules())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_repacks_in_place(kind: str) -> None:
    """In eval mode and without gradients, on CPUs with avx512bf16; its own product then has no gradient."""
    _, flat = pair(kind)
    layers = flat_layers(flat)
    weight = layers["up"].base_layer.weight
    state = weight.quant_state
    if not layers["up"].base_layer.support_avx512bf16_for_cpu:
        pytest.skip("needs a CPU with avx512bf16")
    with torch.no_grad():
        flat.eval()(torch.randn(3, 64))
    assert weight is layers["up"].base_layer.weight and state.packing_format_for_cpu
    twin = dense_twin(flat)
    flat.train()
    for sigma in (0.3, 0.0):
        flat.controller.target_sigma = sigma
        agree(run(flat), run(with_noise(twin, flat) if sigma else twin))
    assert state.packing_format_for_cpu
    if kind == "fp4":  # bitsandbytes cannot undo it without double quantisation
        return
    flat.state_dict()  # which packs it as it was, of rounded scales
    assert not getattr(weight.quant_state, "packing_format_for_cpu", False)
    flat.controller.target_sigma = 0.3
    agree(run(flat), run(with_noise(dense_twin(flat), flat)))


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao", "gptq", "fp8", "hqq"])
def test_compiles(kind: str) -> None:
    """One graph, for every step; advance shows it a weight that was replaced."""
    _, flat = pair(kind)
    torch._dynamo.reset()
    compiled = torch.compile(flat, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        agree(run(compiled), {f"_orig_mod.{n}" if "lora_" in n else n: v for n, v in run(flat).items()})
        flat.controller.advance()
    if kind == "nf4":
        layer = flat_layers(flat)["up"].base_layer
        layer.weight = quantised(kind, nn.Linear(64, 128)).weight
        flat.controller.advance()
        agree({"y": run(compiled)["y"]}, {"y": run(flat)["y"]})


def test_bitsandbytes_chooses_its_type_by_the_first_input() -> None:
    _, flat = pair("nf4", dtype=None)
    layer = flat_layers(flat)["up"].base_layer
    assert layer.compute_dtype is None
    flat(torch.randn(3, 64).bfloat16())
    assert layer.compute_dtype == torch.bfloat16 and layer.compute_type_is_set


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_and_copies(kind: str) -> None:
    _, flat = pair(kind)
    want = run(flat)
    copied = copy.deepcopy(flat)
    agree(run(copied), want)
    assert all(layer.noise_controller is not flat.controller for layer in flat_layers(copied).values())
    if kind in (*BITSANDBYTES, "hqq"):  # the others do not pickle
        agree(run(pickle.loads(pickle.dumps(flat))), want)


def test_classes_are_attributes_of_the_module() -> None:
    pytest.importorskip("bitsandbytes")
    kind = integration.FlatLinear4bit
    assert kind.__name__ == "FlatLinear4bit" and issubclass(kind, FlatLinear)
    assert kind is integration.FlatLinear4bit
    with pytest.raises(AttributeError, match="no attribute 'FlatConv'"):
        _ = integration.FlatConv


def test_moved_and_replaced() -> None:
    """What another owner has put in the place of the weight is read again by the next forward."""
    peft, flat = pair("nf4")
    layer = flat_layers(flat)["up"]
    first = layer._weight()
    assert layer._weight() is first
    flat.to(torch.float32)
    layer.base_layer.weight = copy.deepcopy(layer.base_layer.weight)
    assert layer._weight() is not first
    agree(run(flat), run(with_noise(peft, flat)))
    with torch.no_grad():
        layer.base_layer.weight.quant_state.absmax = layer.base_layer.weight.quant_state.absmax.flip(0)
    agree(run(flat), run(with_noise(dense_twin(flat), flat)))


def test_tied_layers_share_a_stream() -> None:
    net = packed_net("nf4")
    net.other = copy.copy(net.up)
    net.other._parameters = dict(net.up._parameters)
    flat = get_peft_model(net, lora(target_modules=["up", "other", "down"]))
    apply_flat_lora(flat, sigma=0.3, verbose=False)
    streams = {name: layer.stream for name, layer in flat_layers(flat).items()}
    assert streams["up"] == streams["other"] != streams["down"]


def test_later_adapters() -> None:
    _, flat = pair("nf4", target_modules=["up"])
    assert flat_layers(flat).keys() == {"up"}
    flat.add_adapter("second", lora(r=2, target_modules=["down"]))
    flat.base_model.set_adapter(["default", "second"])
    run(flat)
    assert {type(layer).__name__ for layer in flat_layers(flat).values()} == {"FlatLinear4bit"}
    assert flat_layers(flat).keys() == {"up", "down"}


def test_saved_adapters_are_pefts(tmp_path: Any) -> None:
    from peft import PeftModel

    _, flat = pair("nf4")
    flat.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(packed_net("nf4"), tmp_path).train()
    flat.controller.target_sigma = 0.0
    agree({"y": run(flat)["y"]}, {"y": plain(_x())})


def _x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, 64)


def test_unreadable_layers_are_refused_by_name() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    net = packed_net("nf4")
    flat = get_peft_model(net, lora())
    net.up.base_layer.weight.quant_state.absmax = net.up.base_layer.weight.quant_state.absmax[:1]
    with pytest.raises(ValueError, match="'up': its packed weight cannot be read: .*absmax"):
        apply_flat_lora(flat)
    net = packed_net("nf4")

    class Other(bnb.nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    net.up.__class__ = Other
    flat = get_peft_model(net, lora())
    with pytest.raises(ValueError, match="'up': Other has a forward of its own"):
        apply_flat_lora(flat)
    assert not flat_layers(flat)


def test_custom_modules_leave_packed_ones_to_apply_flat_lora() -> None:
    from flatlora_kernels import NoiseController
    from flatlora_kernels.integrations.peft import custom_modules

    config = lora()
    if not hasattr(config, "_register_custom_module"):
        pytest.skip("needs PEFT 0.19")
    config._register_custom_module(custom_modules(NoiseController()))
    with pytest.raises(ValueError, match="'up': its weight is packed.*apply_flat_lora"):
        get_peft_model(packed_net("nf4"), config)
