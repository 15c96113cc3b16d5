"""PEFT models on the fused op: PEFT's own results without noise, the eager formula with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from allocations import Allocations  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from peft_models import (  # noqa: E402
    BEHAVIOURS,
    Net,
    agree,
    behaviour,
    flat_layers,
    lora,
    pair,
    run,
    scramble,
    tiny_llama,
    two_adapters,
    with_noise,
)

from flatlora_kernels.integrations.peft import (  # noqa: E402
    FlatLinear,
    apply_flat_lora,
    remove_flat_lora,
)
from flatlora_kernels.methods import make, on_chips  # noqa: E402

# PEFT warns of what these tests are about: tied weights, fan_in_fan_out, merged DoRA.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def svd_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_E")]


def without_adapters(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in svd_layers(model):
        nn.init.zeros_(layer.lora_E["default"])
    return model


def test_adalora_masks_ranks(tmp_path: Path) -> None:
    """PEFT's own allocation works on, and norms are those of what it leaves."""
    _, flat = behaviour("adalora", sigma=0.3)
    optimizer = torch.optim.SGD([p for p in flat.parameters() if p.requires_grad], lr=0.01)
    flat.controller.attach(optimizer)
    for step in range(1, 11):
        run(flat)
        optimizer.step()
        flat.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    left = 0
    for layer in flat_layers(flat).values():
        E = layer.lora_E["default"].detach()
        left += int((E != 0).sum())
        run(flat)
        in_use = layer.base_layer.weight + layer.get_delta_weight("default").detach()
        expected = flat.controller.sigma / layer.in_features**0.5 * in_use.norm(dim=1)
        torch.testing.assert_close(layer.noise_scale, expected, rtol=1e-5, atol=0)
    assert left == 4, "two ranks of each of two layers"
    # A finished adapter has fewer ranks in its file, and the scale that it was trained with.
    flat.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True).train()
    for name, parameter in loaded.named_parameters():
        if "lora_" not in name:
            parameter.data = flat.get_parameter(name).detach().clone()
    theirs = run(loaded)
    assert {layer.lora_E["default"].shape[0] for layer in svd_layers(loaded)} != {4}
    apply_flat_lora(loaded, sigma=0.0, verbose=False)
    # A layer may have no rank left.
    agree(*({name: v for name, v in found.items() if v.numel()} for found in (run(loaded), theirs)))
    assert not torch.allclose(run(loaded)["y"], run(without_adapters(loaded))["y"], rtol=1e-3)
    with pytest.raises(ValueError, match="expected adapters of two matrices, got AdaLoRA's of three, .*up"):
        make("lora-sam", flat, optimizer)


def test_on_chips_wants_adapters_in_use() -> None:
    _, flat = behaviour("plain")
    x = torch.randn(3, 16)
    found = on_chips(flat, lambda: float(flat(x).sum()), sigma=0.1, chips=range(3))
    assert len(set(found)) == 3
    with (
        flat.disable_adapter(),
        pytest.raises(ValueError, match="expected adapters in use, .* has them disabled"),
    ):
        on_chips(flat, lambda: 0.0, sigma=0.1, chips=range(3))
    flat.merge_adapter()
    with pytest.raises(ValueError, match="expected adapters in use, .* has them merged"):
        on_chips(flat, lambda: 0.0, sigma=0.1, chips=range(3))


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_parity(name: str) -> None:
    """Outputs, every gradient and the random numbers consumed are PEFT's, in training and in eval mode."""
    peft, flat = behaviour(name)
    agree(run(flat), run(peft))
    agree(run(flat.eval()), run(peft.eval()))
    assert flat.state_dict().keys() == peft.state_dict().keys()


@pytest.mark.parametrize("name", [name for name in BEHAVIOURS if name != "several_dora"])
def test_noise(name: str) -> None:
    """At sigma > 0 outputs and gradients are those of PEFT's own layers with eps added to their weights."""
    peft, flat = behaviour(name, sigma=0.3)
    noisy = with_noise(peft, flat)
    agree(run(flat), run(noisy))
    difference = (run(noisy)["y"] - run(peft)["y"]).abs().max()
    assert difference > 0.02  # else this test says nothing
    flat.controller.advance()
    agree(run(flat), run(with_noise(peft, flat)))
    assert not torch.equal(run(flat)["y"], run(noisy)["y"])


def test_tied_weights_have_one_noise() -> None:
    _, flat = behaviour("shared", sigma=0.3)
    layers = flat_layers(flat)
    assert [layers[name].stream for name in ("up", "square", "other")] == [0, 1, 1]


def test_no_noise_where_none_belongs() -> None:
    peft, flat = pair(lora(), sigma=0.3)
    agree(run(flat.eval()), run(peft.eval()))
    flat.train(), peft.train()
    assert not torch.allclose(run(flat)["y"], run(peft)["y"], atol=1e-3)
    with flat.controller.disabled():
        agree(run(flat), run(peft))
    with flat.disable_adapter(), peft.disable_adapter():
        agree(run(flat), run(peft))
    for model in (flat, peft):
        model.base_model.set_adapter([])
    agree(run(flat), run(peft))
    for model in (flat, peft):
        model.base_model.set_adapter("default")
    agree(run(flat), run(with_noise(peft, flat)))


def test_base_weights_are_never_written() -> None:
    peft, flat = pair(lora(lora_dropout=0.1), sigma=0.3)
    optimizer = torch.optim.SGD([p for p in flat.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        run(flat)
        optimizer.step()
        flat.controller.advance()
    before, after = peft.state_dict(), flat.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) == ("lora_" not in name), name


def test_switching_adapters_and_scales() -> None:
    """The size of the noise follows the adapters in use, their scales and their values."""
    peft, flat = pair(lora(), prepare=two_adapters, sigma=0.3)

    def both(change: Callable[[Any], object]) -> None:
        change(peft), change(flat)
        agree(run(flat), run(with_noise(peft, flat)))

    def layers(model: Any) -> list[Any]:
        return [module for module in model.modules() if isinstance(module, PeftLinear)]

    both(lambda model: model.set_adapter("second"))
    both(lambda model: [layer.scale_layer(3.0) for layer in layers(model)])
    both(lambda model: [layer.unscale_layer() for layer in layers(model)])
    both(lambda model: [nn.init.constant_(layer.lora_B["second"].weight, 0.3) for layer in layers(model)])
    both(lambda model: model.delete_adapter("second"))


@pytest.mark.parametrize("name", ["plain", "dora", "transposed", "several", "lora_bias_merged"])
def test_merging(name: str) -> None:
    """merge, unmerge and merge_and_unload leave the very bits of PEFT."""
    if name == "lora_bias_merged":
        peft, flat = pair(lora(lora_bias=True, target_modules=["up"]), sigma=0.3)
    else:
        peft, flat = behaviour(name, sigma=0.3)

    def bits(model: nn.Module) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in model.state_dict().items()}

    def same() -> None:
        got, want = bits(flat), bits(peft)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)

    for model in (peft, flat):
        model.merge_adapter()
    same()
    with pytest.raises(RuntimeError, match=r"^up: .*merged"):
        run(flat)
    with flat.controller.disabled():
        agree(run(flat), run(peft))
    agree(run(flat.eval()), run(peft.eval()))
    flat.train(), peft.train()
    size = {key: layer.noise_scale.clone() for key, layer in flat_layers(flat).items()}
    flat.controller.advance()  # measures the merged weight
    for key, layer in flat_layers(flat).items():
        if name != "dora":  # merged with its magnitudes
            torch.testing.assert_close(layer.noise_scale, size[key], rtol=1e-5, atol=0)
    for model in (peft, flat):
        model.unmerge_adapter()
    same()
    agree(run(flat), run(with_noise(peft, flat)))
    peft, flat = peft.merge_and_unload(), flat.merge_and_unload()
    same()
    assert not any(isinstance(module, FlatLinear) for module in flat.modules())


def test_norms_after_some_adapters_were_merged() -> None:
    peft, flat = behaviour("several", sigma=0.3)
    for model in (peft, flat):
        model.merge_adapter(["second"])
    flat.controller.advance()
    for model in (peft, flat):
        model.unmerge_adapter()
    agree(run(flat), run(with_noise(peft, flat)))


def rounded_like(got: dict[str, Tensor], exact: dict[str, Tensor], *others: dict[str, Tensor]) -> None:
    """As near to the exact values as the least exact of `others`, but for a factor of 1.5: roundings differ."""
    for name, value in exact.items():
        assert got[name].dtype == others[0][name].dtype, name
        error, *allowed = ((v[name].double() - value.double()).norm() for v in (got, *others))
        assert error <= 1.5 * max(allowed), name


@pytest.mark.parametrize("name", ["plain", "dropout", "dora_dropout", "several", "several_dropout"])
def test_bfloat16_base_with_float32_adapters(name: str) -> None:
    """PEFT's default beside a 16-bit base: its products of the adapter are in float32. The op's are in the type of x,
    rounded as PEFT's are where the adapters themselves have 16 bits."""
    peft, flat = behaviour(name, dtype=torch.bfloat16)
    adapters = flat_layers(flat)["up"].lora_A
    assert adapters["default"].weight.dtype == torch.float32
    if any(adapter.weight.dtype != torch.float32 for adapter in adapters.values()):
        pytest.skip("this PEFT leaves a second adapter in 16 bits")
    exact = run(copy.deepcopy(peft).float())
    got, want = run(flat, torch.bfloat16), run(peft, torch.bfloat16)
    rounded_like(got, exact, want, run(copy.deepcopy(peft).bfloat16(), torch.bfloat16))
    assert torch.equal(got["generator"], want["generator"])
    assert len(got) > 4

    flat.controller.target_sigma = 0.3
    noisy = with_noise(peft, flat)
    under_noise, want = run(flat, torch.bfloat16), run(noisy, torch.bfloat16)
    rounded_like(under_noise, run(noisy.float()), want, run(noisy.bfloat16(), torch.bfloat16))
    assert (under_noise["y"] - got["y"]).abs().max() > 0.05


@pytest.mark.parametrize("adapter", ["float32", "16 bits"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dora_begins_as_in_peft(base: torch.dtype, adapter: str, dropout: float) -> None:
    """PEFT rounds norms to the type of its adapters. Magnitudes begin as such norms: m / c is 1, and the outputs differ
    where sums in another order were rounded otherwise, and nowhere else."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512)).to(base)
    config = lora(target_modules=["0"], use_dora=True, lora_dropout=dropout)
    peft = get_peft_model(net, config, autocast_adapter_dtype=adapter == "float32").train()
    flat = copy.deepcopy(peft)
    apply_flat_lora(flat, sigma=0.0)
    x = torch.randn(64, 256).to(base)
    outputs = []
    for model in (peft, flat):
        torch.manual_seed(1)
        outputs.append(model(x))
    assert (outputs[0] == outputs[1]).float().mean() > 0.99
    layer = flat_layers(flat)["0"]
    dtype = layer.lora_A["default"].weight.dtype
    A, B, _ = layer._adapter(["default"], base)
    gain = layer._gain("default", x, A, B)
    dora = layer.lora_magnitude_vector["default"]
    theirs = dora.get_weight_norm(layer.base_layer.weight.to(dtype), torch.zeros((), dtype=dtype), 1.0)
    torch.testing.assert_close(gain, dora.weight.float() / theirs.float(), rtol=1e-6, atol=0)
    if adapter == "16 bits":
        assert (gain == 1).all()


def test_dora_after_training_in_16_bits() -> None:
    """Gradients too are as near to the exact ones as PEFT's, where everything has 16 bits."""
    for name in ("dora", "dora_dropout"):
        peft, flat = behaviour(name, dtype=torch.bfloat16)
        for model in (peft, flat):
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        exact = run(copy.deepcopy(peft).float())
        rounded_like(run(flat, torch.bfloat16), exact, run(peft, torch.bfloat16))


def test_norms_between_two_values_are_rounded_as_the_magnitudes_were() -> None:
    """A float32 sum in another order may fall on the other side of a value in the middle."""
    net = nn.Sequential(nn.Linear(2, 3, bias=False)).bfloat16()
    peft = get_peft_model(net, lora(target_modules=["0"], use_dora=True), autocast_adapter_dtype=False)
    apply_flat_lora(peft, sigma=0.0)
    layer = flat_layers(peft)["0"]
    middle = 1 + 2.0**-8  # of 1 and the next value of bfloat16
    norms = torch.tensor([middle * (1 - 2.0**-20), middle * (1 + 2.0**-20), middle * (1 + 2.0**-12)])
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data = torch.tensor([1 + 2.0**-7, 1.0, 1.0], dtype=torch.bfloat16)
    A, B, _ = layer._adapter(["default"], torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flatlora_kernels.integrations.peft.row_sq_norms", lambda *_, **__: norms.square())
        gain = layer._gain("default", torch.randn(1, 2).bfloat16(), A, B)
    torch.testing.assert_close(gain, torch.tensor([1.0, 1.0, 1 / (1 + 2.0**-7)]))


def test_autocast() -> None:
    peft, flat = pair(lora(lora_dropout=0.4), sigma=0.0)
    exact = run(peft)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = run(flat), run(peft)
    rounded_like(got, exact, want)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_gradient_checkpointing(sigma: float) -> None:
    """With inputs that require grad: recomputed passes draw the same noise and the same dropout."""
    torch.manual_seed(0)
    peft = get_peft_model(tiny_llama(), lora(target_modules=["q_proj", "v_proj"], lora_dropout=0.2))
    scramble(peft)
    peft.train()
    flat = copy.deepcopy(peft)
    flat.controller = apply_flat_lora(flat, sigma=sigma, seed=5)
    twin = with_noise(peft, flat) if sigma else peft

    def gradients(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(2)
        ids = torch.arange(12).view(2, 6)
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(twin)
    agree(gradients(flat), plain)
    for reentrant in (True, False):
        flat.gradient_checkpointing_enable({"use_reentrant": reentrant})
        flat.enable_input_require_grads()
        got = gradients(flat)
        agree(got, plain)
    assert len(plain) == 8


def test_another_type_afterwards() -> None:
    """model.to(dtype) after apply_flat_lora: the noise is that of the converted weights."""
    peft, flat = pair(lora(), sigma=0.3)
    peft, flat = peft.double(), flat.double()
    noise_scale = flat_layers(flat)["up"].noise_scale
    assert noise_scale is not None and noise_scale.dtype == torch.float32
    agree(run(flat, torch.float64), run(with_noise(peft, flat), torch.float64))


def test_generation_leaves_nothing_behind() -> None:
    """In eval mode what PEFT generates, cached or not; training goes on as if nothing had been."""
    torch.manual_seed(0)
    peft = get_peft_model(tiny_llama(), lora(target_modules=["q_proj", "v_proj"]))
    scramble(peft)
    flat = copy.deepcopy(peft)
    controller = apply_flat_lora(flat, sigma=0.5)
    ids = torch.arange(12).view(2, 6)
    noisy, state = flat.train()(input_ids=ids).logits, torch.get_rng_state()
    for cached in (True, False):
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": cached}
        found, expected = (m.eval().generate(input_ids=ids, **options) for m in (flat, peft))
        assert torch.equal(found, expected)
    assert controller.step == 0 and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(flat.train()(input_ids=ids).logits, noisy)
    assert not torch.allclose(peft.train()(input_ids=ids).logits, noisy, atol=1e-2)


def test_compiles_once_without_noise_and_once_with() -> None:
    """A schedule that starts at 0 compiles a second time when the noise begins, and then no more."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    one = {"config": lora(target_modules=["0"]), "make": lambda: nn.Sequential(nn.Linear(16, 8))}
    _, flat = pair(**one, schedule="linear", total_steps=3, sigma=0.3)
    torch._dynamo.reset()
    compiled, x = torch.compile(flat, backend=backend, fullgraph=True), torch.randn(2, 5, 16)
    seen = []
    for _ in range(4):
        seen.append(compiled(x))
        torch.testing.assert_close(seen[-1], flat(x))
        flat.controller.advance()
    assert len(graphs) == 2
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(seen, seen[1:], strict=False))


def test_lora_ga() -> None:
    """Gradient-aligned initialisation changes the base weight; noise follows the weight in use."""
    loraga = pytest.importorskip("peft.tuners.lora.loraga")
    from peft import LoraGAConfig

    torch.manual_seed(0)
    net = Net()
    config = lora(r=2, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    loraga.preprocess_loraga(net, config, lambda: net(torch.randn(8, 16)).square().sum().backward())
    before = net.up.weight.clone()
    peft = get_peft_model(net, config).train()
    assert not torch.equal(before, peft.base_model.model.up.base_layer.weight)
    flat = copy.deepcopy(peft)
    flat.controller = apply_flat_lora(flat, sigma=0.0, seed=5)
    agree(run(flat), run(peft))
    remove_flat_lora(flat)
    flat.controller = apply_flat_lora(flat, sigma=0.3, seed=5)
    agree(run(flat), run(with_noise(peft, flat)))


def test_what_only_peft_computes() -> None:
    """Mixed batches, hooks on the base layer, DoRA beside another adapter: PEFT's way without noise, else an error."""
    peft, flat = pair(lora(), prepare=two_adapters, sigma=0.3)
    x, names = torch.randn(2, 5, 16), ["default", "second"]
    with pytest.raises(RuntimeError, match="^up: .*adapter_names"):
        flat_layers(flat)["up"](x, adapter_names=names)
    assert torch.equal(flat.eval()(x, adapter_names=names), peft.eval()(x, adapter_names=names))
    flat.train()
    seen: list[Any] = []
    flat_layers(flat)["down"].base_layer.register_forward_hook(lambda *given: seen.append(given))
    with pytest.raises(RuntimeError, match="^down: .*hooks"):
        run(flat)
    with flat.controller.disabled():
        agree(run(flat), run(peft.train()))
    assert len(seen) == 1
    peft, flat = behaviour("several_dora", sigma=0.3)
    with pytest.raises(RuntimeError, match="^up: .*DoRA"):
        run(flat)


@pytest.mark.parametrize(
    "base, adapter",
    [(torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.bfloat16, torch.float16)],
)
def test_other_types_of_adapter(base: torch.dtype, adapter: torch.dtype) -> None:
    def convert(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter)

    peft, flat = pair(lora(), prepare=convert, dtype=base)
    rounded_like(run(flat, base), run(copy.deepcopy(peft).double(), torch.float64), run(peft, base))


def test_dora_makes_nothing_of_the_weights_size() -> None:
    peft = get_peft_model(nn.Sequential(nn.Linear(96, 96)), lora(target_modules=["0"], use_dora=True)).train()
    flat = copy.deepcopy(peft)
    apply_flat_lora(flat, sigma=0.3)
    x = torch.randn(5, 96)
    with Allocations() as theirs:
        peft(x).sum().backward()
    with Allocations() as ours:
        flat(x).sum().backward()
    assert theirs.largest >= 96 * 96 > ours.largest
