"""Which layers of a PEFT model are converted, also later, which are refused by name, and the way back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model, inject_adapter_in_model  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from peft_models import (  # noqa: E402
    Net,
    TiedHead,
    Transposed,
    agree,
    flat_layers,
    lora,
    names_modules,
    pair,
    run,
    scramble,
    tiny_llama,
    with_noise,
)

from flatlora_kernels import NoiseController  # noqa: E402
from flatlora_kernels import apply_flat_lora as flat_lora  # noqa: E402
from flatlora_kernels.integrations.peft import (  # noqa: E402
    FlatLinear,
    apply_flat_lora,
    custom_modules,
    remove_flat_lora,
)

# PEFT warns of what these tests are about: tied weights, fan_in_fan_out, merged DoRA.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@names_modules
def test_custom_modules() -> None:
    """get_peft_model builds the same layers, with the same noise, as converting afterwards."""
    for make in (Net, Transposed):
        _, flat = pair(lora(lora_dropout=0.2), make=make, sigma=0.3)
        config = lora(lora_dropout=0.2)
        controller = NoiseController(sigma=0.3, seed=5)
        config._register_custom_module(custom_modules(controller))
        built = get_peft_model(make(), config).train()
        built.load_state_dict(flat.state_dict())
        agree(run(built), run(flat))
        assert {type(m) for m in built.modules() if isinstance(m, PeftLinear)} == {FlatLinear}
        built, flat = built.merge_and_unload().state_dict(), flat.merge_and_unload().state_dict()
        assert all(torch.equal(built[name], value) for name, value in flat.items())


@pytest.mark.parametrize("how", ["add_adapter", "load_adapter"])
def test_adapters_added_later(how: str, tmp_path: Path) -> None:
    """Layers that a later adapter brings are trained under noise too, by the same controller."""
    peft, flat = pair(lora(), sigma=0.3)
    second = lora(target_modules=["down", "head"], r=2)
    if how == "load_adapter":
        other = get_peft_model(Net(), second)
        scramble(other)
        other.save_pretrained(tmp_path)
    for model in (peft, flat):
        torch.manual_seed(7)
        getattr(model, how)(*(("second", second) if how == "add_adapter" else (tmp_path, "second")))
        model.set_adapter("second")
        torch.manual_seed(8)
        scramble(model)
        model.train()
    agree(run(flat), run(with_noise(peft, flat)))
    layers = flat_layers(flat)
    assert set(layers) == {"up", "down", "head"}
    assert len({layer.stream for layer in layers.values()}) == 3
    assert len({id(layer.noise_controller) for layer in layers.values()}) == 1


def test_an_adapter_added_later_that_does_not_fit() -> None:
    _, flat = pair(lora(target_modules=["down"]), make=TiedHead, sigma=0.3)
    flat.add_adapter("second", lora(target_modules=["embed"]))
    with pytest.raises(ValueError, match="'embed'"):
        run(flat)


def test_injected_adapters() -> None:
    """Without a PeftModel around them, as transformers' own model.add_adapter injects them; also later."""
    torch.manual_seed(0)
    model = tiny_llama()
    inject_adapter_in_model(lora(target_modules=["q_proj"]), model, "first")
    controller = apply_flat_lora(model, sigma=0.3)
    assert len(flat_layers(model)) == 2
    inject_adapter_in_model(lora(target_modules=["v_proj"]), model, "second")
    model(input_ids=torch.arange(4)[None])
    assert len(flat_layers(model)) == 4 == len(controller.layers)


def test_second_call_and_removal() -> None:
    peft, flat = pair(lora(), sigma=0.3)
    with pytest.raises(ValueError, match="none but those converted already"):
        apply_flat_lora(flat)
    with pytest.raises(ValueError, match="^sigma: .*NoiseController already"):
        apply_flat_lora(flat, sigma=0.1)
    with pytest.raises(ValueError, match="got none$"):
        apply_flat_lora(Net())
    with pytest.raises(ValueError, match="^noise: "):
        apply_flat_lora(peft, noise="pink")
    assert not flat_layers(peft)
    flat.add_adapter("second", lora(target_modules=["head"]))
    assert apply_flat_lora(flat) is flat.controller
    assert len(flat_layers(flat)) == 3
    flat.delete_adapter("second")
    remove_flat_lora(flat)
    plain = {name: vars(module).keys() for name, module in peft.named_modules()}
    for name, module in flat.named_modules():
        if name in plain and "head" not in name:
            assert type(module) is type(dict(peft.named_modules())[name])
            assert vars(module).keys() - {"controller"} == plain[name], name
    assert not flat._forward_pre_hooks
    with pytest.raises(ValueError, match="none"):
        remove_flat_lora(flat)


class Strange(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Zoo(nn.Module):
    """One of each that cannot be converted."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.embed = nn.Embedding(5, 16)
        self.conv = nn.Conv2d(1, 1, 3)
        self.attention = nn.MultiheadAttention(16, 2)
        self.strange = Strange(16, 16)
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda *_: None)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.eighth = nn.Linear(16, 16).to(torch.float8_e4m3fn)

    def forward(self, x: Tensor) -> Tensor:
        return self.hooked(self.up(x))


UNFIT = ["embed", "conv", "attention", "out_proj", "strange", "hooked", "parametrized", "eighth"]


@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_converted_is_named(kind: str) -> None:
    config = lora(target_modules=["up", kind])
    model = get_peft_model(Zoo(), config)
    with pytest.raises(ValueError, match=rf"'(attention\.)?{kind}'"):
        apply_flat_lora(model)
    assert not flat_layers(model)  # all or nothing
    apply_flat_lora(model, exclude_modules=[kind])
    assert set(flat_layers(model)) == {"up"}


@names_modules
@pytest.mark.parametrize("kind", UNFIT)
def test_custom_modules_name_what_cannot_be_built(kind: str) -> None:
    def config(**options: Any) -> LoraConfig:
        made = lora(target_modules=["up", kind])
        made._register_custom_module(custom_modules(NoiseController(sigma=0.1), **options))
        return made

    with pytest.raises(ValueError, match=rf"'(attention\.)?{kind}'"):
        get_peft_model(Zoo(), config())
    assert set(flat_layers(get_peft_model(Zoo(), config(exclude_modules=[kind])))) == {"up"}


@names_modules
@pytest.mark.parametrize(
    "options, name",
    [
        ({"target_parameters": ["up.weight"], "target_modules": ["down"]}, "up"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "up"),
    ],
)
def test_unknown_kinds_of_adapter_are_named(options: dict[str, Any], name: str) -> None:
    model = inject_adapter_in_model(lora(**options), Net())
    with pytest.raises(ValueError, match=f"'{name}': "):
        apply_flat_lora(model)
    config = lora(**options)
    config._register_custom_module(custom_modules(NoiseController()))
    with pytest.raises(ValueError, match="adapter is of another kind|a bare parameter"):
        inject_adapter_in_model(config, Net())


def test_more_that_is_named() -> None:
    model = get_peft_model(Net(), lora(use_dora=True))
    model.base_model.model.up.ephemeral_gpu_offload = True
    with pytest.raises(ValueError, match="'up': DoRA is offloaded"):
        apply_flat_lora(model)
    flat_lora(net := Net(), ["up"], verbose=False)
    with pytest.raises(ValueError, match="FlatLoraLinear"):
        get_peft_model(net, lora())


def test_transformer_encoder_layer() -> None:
    """Its fast path reads the weights in eval mode: adapters, PEFT's own too, would train and then have no effect."""
    encoder = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True))
    peft = get_peft_model(encoder, lora(target_modules=["linear1", "linear2"]))
    scramble(peft)
    with pytest.raises(ValueError, match=r"'0\.linear1': nn.TransformerEncoderLayer .*'0\.linear2'"):
        apply_flat_lora(peft)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        flat = copy.deepcopy(peft)
        flat.controller = apply_flat_lora(flat, sigma=0.3)
        agree(run(flat.eval()), run(peft.eval()))
        agree(run(flat.train()), run(with_noise(peft.train(), flat)))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
