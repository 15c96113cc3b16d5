"""Which layers of a PEFT model are converted, also later, which are refused by name, and the way back."""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import AdaLoraConfig, LoraConfig, get_peft_model, inject_adapter_in_model  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from peft_models import (  # noqa: E402
    Net,
    Shared,
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


@contextlib.contextmanager
def no_warning_of_ours() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "LoRA layers of a later adapter")
        yield


def test_a_later_adapter_that_does_not_fit() -> None:
    """What cannot be converted is left to PEFT, with one warning; the rest of the adapter is under noise."""
    peft, flat = pair(lora(target_modules=["down"]), make=TiedHead, sigma=0.3)
    for model in (peft, flat):
        torch.manual_seed(7)
        model.add_adapter("second", lora(target_modules=["embed", "lm_head"]))
        model.base_model.set_adapter(["default", "second"])
        scramble(model)
    with pytest.warns(UserWarning, match="left to PEFT, .* without weight noise: 'embed': .* is Embedding"):
        got = run(flat)
    with no_warning_of_ours():
        agree(got, run(with_noise(peft, flat)))
        run(flat)
        flat.add_adapter("third", lora(target_modules=["embed"]))
        run(flat)
    assert set(flat_layers(flat)) == {"down", "lm_head"}


def test_a_later_adapter_of_another_method() -> None:
    """PEFT puts AdaLoRA's layers around those that have noise; one of its own gets noise, too."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), lora(), mixed=True).train()
    controller = apply_flat_lora(model, sigma=0.3)
    model.add_adapter(
        "second", AdaLoraConfig(target_modules=["up", "head"], init_r=4, target_r=2, total_step=10)
    )
    with pytest.warns(UserWarning, match="'up': it is neither an nn.Linear .* its class is FlatLinear$"):
        first = run(model)["y"]
    assert {type(layer).__name__ for layer in controller.layers} == {"FlatLinear", "FlatSVDLinear"}
    controller.advance()
    with no_warning_of_ours():
        assert not torch.equal(run(model)["y"], first)


@names_modules
def test_a_later_adapter_of_an_unknown_kind() -> None:
    """On layers that have noise: PEFT computes it, and the other adapters keep their noise."""
    peft, flat = pair(lora(), sigma=0.3)
    second = lora(alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match=r"'up \(second\)': its adapter is of another kind"):
        flat.add_adapter("second", second)
    peft.add_adapter("second", second)
    scramble(flat)
    peft.load_state_dict(flat.state_dict())
    with no_warning_of_ours():
        agree(run(flat), run(with_noise(peft, flat)))
        for names in ("second", ["default", "second"]):
            for model in (peft, flat):
                model.base_model.set_adapter(names)
            agree(run(flat), run(peft))


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
    assert apply_flat_lora(flat) is flat.controller
    with pytest.raises(ValueError, match="^sigma: .*NoiseController already"):
        apply_flat_lora(flat, sigma=0.1)
    with pytest.raises(ValueError, match="got none but those in exclude_modules"):
        apply_flat_lora(peft, exclude_modules=["up", "down"])
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

    with pytest.raises(
        ValueError, match=rf"'(attention\.)?{kind}': .*custom_modules\(\.\.\., exclude_modules="
    ):
        get_peft_model(Zoo(), config())
    assert set(flat_layers(get_peft_model(Zoo(), config(exclude_modules=[kind])))) == {"up"}


@names_modules
@pytest.mark.parametrize(
    "options, name",
    [
        ({"target_parameters": ["up.weight"], "target_modules": ["down"]}, "up.weight"),
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


@pytest.mark.parametrize(
    "exclude, got",
    [(["up", "dwon"], "'dwon'"), (r"do\w", r"'do\\w'"), ("", "''"), (["head"], "'head'")],
)
def test_exclude_modules_that_match_nothing(exclude: Any, got: str) -> None:
    model = get_peft_model(Net(), lora())
    with pytest.raises(ValueError) as caught:
        apply_flat_lora(model, exclude_modules=exclude)
    assert str(caught.value).startswith("exclude_modules: expected to match LoRA layers")
    assert f"got {got}, which matches none of 2 (up, down)" in str(caught.value)
    assert not flat_layers(model)


def test_exclude_modules_names_what_has_noise() -> None:
    _, flat = pair(lora(), sigma=0.3)
    with pytest.raises(ValueError, match="^exclude_modules: .* got 'up', .*; remove_flat_lora"):
        apply_flat_lora(flat, exclude_modules=["up"])


def test_a_cell_that_runs_again() -> None:
    """Equal settings: the controller as it is; others are named with the present ones."""

    def cell(model: nn.Module, **changes: Any) -> NoiseController:
        settings: dict[str, Any] = {
            "sigma": 0.1, "schedule": lambda step: 1.0, "total_steps": 9, "seed": -1, "noise": "rademacher",
            "exclude_modules": ["up"],
        }  # fmt: skip
        return apply_flat_lora(model, **(settings | changes))

    model = get_peft_model(Net(), lora())
    controller = cell(model)
    controller.advance()
    assert cell(model) is controller and controller.step == 1
    assert cell(model, seed=None, sigma=None, noise_controller=controller) is controller
    assert len(model._forward_pre_hooks) == 1
    anew = r"make the layers anew \(with PEFT after remove_flat_lora\)"
    for changes, message in [
        ({"sigma": 0.2}, r"^sigma: .* with 0\.1, got 0\.2; .*assign controller\.target_sigma"),
        ({"total_steps": 8}, r"^total_steps: .* with 9, got 8; .*assign controller\.total_steps"),
        ({"schedule": "cosine"}, rf"^schedule: .* with <function .*, got 'cosine'; .*{anew}"),
        ({"schedule": lambda step: 2.0}, rf"^schedule: .*{anew}"),
        ({"seed": 4}, rf"^seed: .* with {2**64 - 1}, got 4; .*{anew}"),
        ({"noise": "gaussian"}, rf"^noise: expected 'rademacher', .* got 'gaussian'; .*{anew}"),
        ({"samples": "batch"}, r"^samples: expected 1, .* got 'batch'"),
        (
            {
                "noise_controller": NoiseController(),
                **dict.fromkeys(("sigma", "schedule", "total_steps", "seed")),
            },
            rf"^noise_controller: expected the NoiseController\(.*\) of the layers .*, got .*{anew}",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            cell(model, **changes)
    with pytest.raises(TypeError, match="^options: expected noise, .*, got 'noize'"):
        cell(model, noize="gaussian")
    controller.target_sigma = 0.2
    assert cell(model, sigma=0.2) is controller


def test_a_cell_that_makes_the_model_again() -> None:
    """get_peft_model twice on one base: PEFT puts the new adapter into the layers that are there."""
    base = Net()
    controller = apply_flat_lora(get_peft_model(base, lora()), sigma=0.3)
    model = get_peft_model(base, lora())
    assert apply_flat_lora(model, sigma=0.3) is controller
    assert len(flat_layers(model)) == 2 == len(controller.layers)


def test_what_print_shows() -> None:
    """sigma, noise and stream beside PEFT's children; nothing of it elsewhere."""
    model = get_peft_model(Net(), lora())
    before = repr(model)
    controller = apply_flat_lora(model, sigma=0.05, schedule="cosine")
    plain = "up): lora.Linear(\n"
    noisy = plain.replace("Linear(", "FlatLinear(") + " " * 8 + "sigma=0 of 0.05, noise=gaussian, stream=0\n"
    assert noisy in repr(model)
    rest = [line for line in repr(model).splitlines() if "sigma=" not in line]
    assert "\n".join(rest).replace("FlatLinear", "Linear") == before
    controller.move_to(controller.base, 1)  # total_steps is still unknown: so is sigma
    assert "sigma=? of 0.05, noise=gaussian, stream=1" in repr(model)
    controller.total_steps = 1
    assert "sigma=0.05, noise" in repr(model)
    assert "no noise" in repr(FlatLinear(nn.Linear(4, 4), "default", r=2, lora_alpha=2, config=lora()))
    remove_flat_lora(model)
    assert repr(model) == before


def test_one_line_at_conversion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def printed(model: nn.Module, **options: Any) -> str:
        capsys.readouterr()
        apply_flat_lora(model, **options)
        return capsys.readouterr().out

    model = get_peft_model(Net(), lora(target_modules=["up", "down", "head"]))
    line = printed(model, exclude_modules=["up"], schedule="cosine")
    expected = "weight noise on 2 layers (streams 0 to 1), 1 LoRA layer left without (exclude_modules)"
    assert line == expected + "; sigma 0.05, cosine\n"
    assert printed(model, exclude_modules=["up"], verbose=False) == ""
    model = get_peft_model(Shared(), lora(target_modules=["square", "other"]))
    options: dict[str, Any] = {"sigma": 0.0, "schedule": lambda step: 1.0}
    line = "weight noise on 2 layers (stream 0, tied weights share one); sigma 0, a schedule of your own"
    assert printed(model, **options) == line + "\n"
    flat_layers(model)["square"].noise_controller.advance()
    assert printed(model) == line + ", at step 1\n"
    monkeypatch.setenv("RANK", "1")
    assert printed(model) == ""


def test_layers_know_their_names() -> None:
    model = get_peft_model(tiny_llama(), lora(target_modules=["q_proj"]))
    apply_flat_lora(model)
    assert {layer.flat_lora_name for layer in flat_layers(model).values()} == set(flat_layers(model))
    assert "model.layers.0.self_attn.q_proj" in flat_layers(model)


def test_the_other_function_refuses_peft() -> None:
    for model in (get_peft_model(Net(), lora()), inject_adapter_in_model(lora(), Net())):
        with pytest.raises(
            ValueError, match="from flatlora_kernels.integrations.peft import apply_flat_lora"
        ):
            flat_lora(model, ["head"])


@pytest.mark.parametrize(
    "modules, message",
    [
        (
            {"peft": None},
            r"needs the packages peft and transformers: .*pip install \"flatlora_kernels\[peft\]\"",
        ),
        ({"transformers": None}, "needs the packages peft and transformers: .*transformers"),
        (
            {"peft": SimpleNamespace(__version__="0.16.3")},
            r"needs peft 0\.17 or later, found 0\.16\.3; pip install",
        ),
    ],
)
def test_what_to_install(modules: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "flatlora_kernels.integrations.peft"
    for gone in [
        name,
        *(n for n in sys.modules if n.partition(".")[0] == "peft" and "transformers" in modules),
    ]:
        monkeypatch.delitem(sys.modules, gone)
    for other, module in modules.items():
        monkeypatch.setitem(sys.modules, other, module)
    with pytest.raises(ImportError, match=f"^{name} {message}"):
        importlib.import_module(name)


def test_messages_of_custom_modules() -> None:
    with pytest.raises(TypeError, match="^options: expected noise, .*, got 'stream'"):
        custom_modules(NoiseController(), stream=3)
    (build,) = custom_modules(NoiseController()).values()
    with pytest.raises(
        ValueError, match="^target_modules: .* got 'a.b': it is neither .* class is Embedding; custom_"
    ):
        build(nn.Embedding(4, 4), "default", target_name="a.b")
    with pytest.raises(RuntimeError, match=r"expected PEFT 0\.19 or later, got \d.*apply_flat_lora"):
        build(nn.Linear(4, 4), "default")


def test_more_that_is_named() -> None:
    model = get_peft_model(Net(), lora(use_dora=True))
    model.base_model.model.up.ephemeral_gpu_offload = True
    with pytest.raises(ValueError, match="'up': DoRA is offloaded"):
        apply_flat_lora(model)
    flat_lora(net := Net(), ["up"], verbose=False)
    with pytest.raises(ValueError, match="FlatLoraLinear"):
        get_peft_model(net, lora())


def test_many_layers_with_one_reason() -> None:
    net = nn.Sequential(*(nn.Embedding(4, 4) for _ in range(12)))
    model = get_peft_model(net, lora(target_modules=[str(n) for n in range(12)]))
    with pytest.raises(
        ValueError, match=r"'0': its class .* \(as for '1', .*'8' and 3 more\); exclude_modules"
    ):
        apply_flat_lora(model)


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


def test_noise_with_named_adapters_alone() -> None:
    """A reference adapter beside the trained one: its passes are without noise, in training mode too."""
    model = get_peft_model(Net(), lora()).train()
    model.add_adapter("reference", lora())
    scramble(model)
    options = {"adapters": ["default"], "verbose": False}
    controller = apply_flat_lora(model, sigma=0.5, seed=1, backend="reference", **options)
    assert "with adapters default alone" in repr(model)
    x = torch.randn(4, 16)
    for name, noisy in (("default", True), ("reference", False)):
        model.set_adapter(name)
        with controller.disabled():
            quiet = model(x)
        assert torch.equal(model(x), quiet) is not noisy, name
    assert apply_flat_lora(model, **options) is controller
    with pytest.raises(
        ValueError, match="noisy_adapters: expected .'default',., as the layers converted already"
    ):
        apply_flat_lora(model, adapters=["reference"])
    remove_flat_lora(model)
    with pytest.raises(ValueError, match="adapters: expected names of default, reference, got 'defualt'"):
        apply_flat_lora(model, adapters=["defualt"])
    with pytest.raises(ValueError, match="adapters: expected at least one of default, reference, got none"):
        apply_flat_lora(model, adapters=[])
    apply_flat_lora(model, sigma=0.5, verbose=False)
    assert "alone" not in repr(model)
