"""PEFT's adapters of mixtures of experts: PEFT's own results without noise, those with eps in the weights with it."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")

import peft as installed  # noqa: E402
from allocations import Allocations  # noqa: E402
from packaging.version import Version  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402
from peft_models import agree  # noqa: E402

from flatlora_kernels import NoiseController, materialize_noise, warm_up  # noqa: E402
from flatlora_kernels.flatness import expected_increase, intruder_dimensions, intruders, plane  # noqa: E402
from flatlora_kernels.integrations.experts import FlatParamWrapper  # noqa: E402
from flatlora_kernels.integrations.peft import (  # noqa: E402
    FlatLinear,
    apply_flat_lora,
    custom_modules,
    remove_flat_lora,
)
from flatlora_kernels.methods import make  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(not hasattr(moe, "use_experts_implementation"), reason="needs transformers 5"),
]

E, H, FF, TOP_K = 6, 16, 24, 2
takes_a_second = pytest.mark.skipif(
    Version(installed.__version__) < Version("0.20"),
    reason="this PEFT takes one adapter with target_parameters",
)
BOTH = ("experts.gate_up_proj", "experts.down_proj")


def experts_of(kind: str) -> Any:
    """One of transformers' classes, by "model.Class"."""
    name, _, kind = kind.partition(".")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    sizes = {
        **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), E),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), FF),
        **dict.fromkeys(("hidden_act", "mlp_hidden_act"), "silu"),
        **{"hidden_size": H, "moe_latent_size": None, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
        **{"moe_hidden_size": H, "post_norm_eps": 1e-5},
    }
    made = getattr(module, kind)(SimpleNamespace(**sizes, _experts_implementation="eager"))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


class Block(nn.Module):
    """A router, experts and a head: x (T, H) -> (T, 3)."""

    def __init__(self, kind: str = "mixtral.MixtralExperts") -> None:
        super().__init__()
        self.router = nn.Linear(H, E)
        self.experts = experts_of(kind)
        self.head = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(TOP_K)
        return self.head(torch.tanh(self.experts(x, index, weights)))


def lora(*parameters: str, **options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": list(parameters or BOTH)}
        | options
    )


def scramble(model: nn.Module) -> None:
    """Adapters as after some training; fresh ones do nothing."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)


def pair(
    model: Any = None,
    *parameters: str,
    sigma: float = 0.0,
    prepare: Any = None,
    lora_options: Any = None,
    **options: Any,
) -> tuple[Any, Any]:
    """A PEFT model in training mode and its copy under noise."""
    torch.manual_seed(0)
    model = Block() if model is None else Block(model) if isinstance(model, str) else model
    peft = get_peft_model(model, lora(*parameters, **(lora_options or {})))
    if prepare is not None:
        prepare(peft)
    scramble(peft)
    peft.train()
    flat = copy.deepcopy(peft)
    flat.controller = apply_flat_lora(flat, sigma=sigma, seed=5, verbose=False, **options)
    return peft, flat


def run(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and gradients of everything that has one."""
    torch.manual_seed(1)
    x = torch.randn(11, H).to(dtype).requires_grad_()
    model.zero_grad()
    y = model(x)
    torch.sin(2 * y.float()).sum().backward()
    results = {"y": y, "x": x.grad}
    results |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().clone() for name, value in results.items()}


def wrappers(model: nn.Module) -> dict[str, Any]:
    return {m.flat_lora_name: m for m in model.modules() if isinstance(m, FlatParamWrapper)}


def eps_of(layer: Any, controller: NoiseController) -> Tensor:
    """(E, N, K), and that its norms are those of each expert's weight."""
    experts, name = layer.get_base_layer(), layer.parameter_name
    turned = experts.is_transposed
    weight = getattr(experts, name).detach()
    in_use = weight.float() + sum(
        layer.get_delta_weight(a).detach() for a in layer.active_adapters if a in layer.lora_A
    )
    norms = in_use.norm(dim=1 if turned else 2)
    K = weight.shape[1 if turned else 2]
    expected = controller.sigma / K**0.5 * norms
    # PEFT rounds what it adds to the type of the weight.
    rtol = 1e-3 if weight.dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(layer.noise_scale, expected.float(), rtol=rtol, atol=0)
    return torch.stack(
        [
            materialize_noise(scale, K, seed=controller.value, stream=layer.stream + e, noise=layer.noise)
            for e, scale in enumerate(layer.noise_scale)
        ]
    )


def with_noise(peft: Any, flat: Any) -> Any:
    """PEFT's model with the noise of `flat` added to its weights."""
    noisy = copy.deepcopy(peft)
    modules = dict(noisy.named_modules())
    for name, layer in flat.named_modules():
        if isinstance(layer, FlatParamWrapper):
            eps = eps_of(layer, flat.controller)
            experts = modules[name].get_base_layer()
            with torch.no_grad():
                own = getattr(experts, layer.parameter_name)
                own.add_(eps.transpose(1, 2) if experts.is_transposed else eps)
        elif isinstance(layer, FlatLinear) and set(layer.active_adapters) & set(layer.lora_A):
            eps = materialize_noise(
                layer.noise_scale,
                layer.in_features,
                seed=flat.controller.value,
                stream=layer.stream,
                noise=layer.noise,
            )
            with torch.no_grad():
                modules[name].base_layer.weight.add_(eps)
    return noisy


KINDS = {
    "mixtral": ("mixtral.MixtralExperts", BOTH),
    "qwen3": ("qwen3_moe.Qwen3MoeExperts", BOTH),
    "transposed, with a bias and a gate of its own": ("gpt_oss.GptOssExperts", BOTH),
    "transposed": ("aria.AriaExperts", BOTH),
    "no gate": ("nemotron_h.NemotronHExperts", ("experts.up_proj", "experts.down_proj")),
    "a limit": ("deepseek_v4.DeepseekV4Experts", BOTH),
    "a norm afterwards": ("muse_spark.MuseSparkExperts", BOTH),
    "one parameter": ("mixtral.MixtralExperts", BOTH[:1]),
    "the other": ("gpt_oss.GptOssExperts", BOTH[1:]),
}


def of(kind: str) -> tuple[Any, ...]:
    name, parameters = KINDS[kind]
    try:
        made = experts_of(name)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this transformers has no {name}: {error}")
    if not hasattr(made, parameters[0].rpartition(".")[2]):
        pytest.skip(f"this transformers computes {name} otherwise, with no {parameters[0]}")
    return (name, *parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind: str) -> None:
    """Without noise outputs and gradients are PEFT's, in training and in eval mode."""
    peft, flat = pair(*of(kind))
    for mode in (True, False):
        agree(run(flat.train(mode)), run(peft.train(mode)))
    assert flat.state_dict().keys() == peft.state_dict().keys()


@pytest.mark.parametrize(
    "kind, drawn",
    [(kind, "gaussian") for kind in KINDS]
    + [("the other", kind_of_noise) for kind_of_noise in ("near_gaussian", "rademacher", "hadamard")],
)
def test_noise(kind: str, drawn: str) -> None:
    peft, flat = pair(*of(kind), sigma=0.3, noise=drawn)
    noisy = with_noise(peft, flat)
    agree(run(flat), run(noisy))
    assert (run(noisy)["y"] - run(peft)["y"]).abs().max() > 0.01  # else this test says nothing
    agree(run(flat.eval()), run(peft.eval()))
    flat.train(), peft.train()
    flat.controller.advance()
    agree(run(flat), run(with_noise(peft, flat)))
    assert not torch.equal(run(flat)["y"], run(noisy)["y"])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_is_matched(implementation: str) -> None:
    peft, flat = pair(sigma=0.3)
    noisy = with_noise(peft, flat)
    for model in (flat, noisy):
        model.base_model.model.experts.get_base_layer().config._experts_implementation = implementation
    agree(run(flat), run(noisy))


def test_streams_of_all_experts() -> None:
    """Each expert has its own, also beside other layers, and a later layer begins after the last."""
    _, flat = pair(sigma=0.3, lora_options={"target_modules": ["head"]})
    layers = flat.controller.layers
    taken = [layer.stream + e for layer in layers for e in range(layer.stream_count)]
    assert sorted(taken) == list(range(2 * E + 1))
    assert wrappers(flat).keys() == {"experts.gate_up_proj", "experts.down_proj"}
    other = NoiseController(sigma=0.3)
    other._layers.update({layers[0]: None, layers[1]: None})
    assert other._stream_for(layers[2]) == layers[1].stream + layers[1].stream_count


def test_norms_follow_the_weights() -> None:
    """They are measured again where a weight was written to, and nowhere else."""
    peft, flat = pair(sigma=0.3)
    seen = {layer: layer._scaled for layer in wrappers(flat).values()}
    run(flat), run(flat.eval()), run(flat.train())
    assert all(layer._scaled is stamps for layer, stamps in seen.items())
    for model in (peft, flat):
        with torch.no_grad():
            model.base_model.model.experts.get_base_layer().down_proj.mul_(2)
    agree(run(flat), run(with_noise(peft, flat)))
    changed = [layer.parameter_name for layer, stamps in seen.items() if layer._scaled is not stamps]
    assert changed == ["down_proj"]


def test_tied_experts_have_one_noise() -> None:
    class Two(Block):
        def __init__(self) -> None:
            super().__init__()
            self.others = experts_of("mixtral.MixtralExperts")
            self.others.down_proj = self.experts.down_proj

        def forward(self, x: Tensor) -> Tensor:
            weights, index = self.router(x).softmax(-1).topk(TOP_K)
            return super().forward(self.others(x, index, weights))

    _, flat = pair(Two(), *BOTH, "others.gate_up_proj", "others.down_proj", sigma=0.3)
    streams = {name: layer.stream for name, layer in wrappers(flat).items()}
    assert streams["experts.down_proj"] == streams["others.down_proj"]
    assert len(set(streams.values())) == 3 and max(streams.values()) == 2 * E
    assert run(flat)["y"].isfinite().all()


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    peft = get_peft_model(Block(), lora())
    apply_flat_lora(peft, sigma=0.1)
    assert f"2 layers (streams 0 to {2 * E - 1})" in capsys.readouterr().out
    assert "sigma=0.1, noise=gaussian, stream=0" in repr(peft)


def tiny_mixtral() -> Any:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def tiny_qwen() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=32, num_experts=8,
        num_experts_per_tok=3,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def of_batch(model: Any) -> dict[str, Tensor]:
    ids = torch.arange(14).view(2, 7) * 5 % 32
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": output.logits.detach(), **grads}


@pytest.mark.parametrize("build", [tiny_mixtral, tiny_qwen])
@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_whole_models(build: Any, sigma: float) -> None:
    """Also with gradient checkpointing: recomputed passes draw the same noise."""
    options = {"target_modules": ["q_proj"]}
    peft, flat = pair(build(), *(f"mlp.{name}" for name in BOTH), sigma=sigma, lora_options=options)
    plain = of_batch(with_noise(peft, flat) if sigma else peft)
    assert len(wrappers(flat)) == 4 and len(plain) == 13
    agree(of_batch(flat), plain)
    for reentrant in (True, False):
        flat.gradient_checkpointing_enable({"use_reentrant": reentrant})
        flat.enable_input_require_grads()
        agree(of_batch(flat), plain)


def test_no_noise_where_none_belongs() -> None:
    peft, flat = pair(sigma=0.3)
    with flat.controller.disabled():
        agree(run(flat), run(peft))
    with flat.disable_adapter(), peft.disable_adapter():
        agree(run(flat), run(peft))
    for model in (flat, peft):
        model.base_model.set_adapter([])
    agree(run(flat), run(peft))
    for model in (flat, peft):
        model.base_model.set_adapter("default")
    flat.controller.target_sigma = 0.0
    agree(run(flat), run(peft))
    flat.controller.target_sigma = 0.3
    agree(run(flat), run(with_noise(peft, flat)))


@takes_a_second
def test_several_adapters() -> None:
    def second(model: Any) -> None:
        model.add_adapter("second", lora(r=2, lora_alpha=7))
        model.base_model.set_adapter(["default", "second"])

    peft, flat = pair(sigma=0.3, prepare=second)
    agree(run(flat), run(with_noise(peft, flat)))
    for model in (peft, flat):
        model.set_adapter("second")
    agree(run(flat), run(with_noise(peft, flat)))


@takes_a_second
def test_noise_with_some_adapters_alone() -> None:
    def second(model: Any) -> None:
        model.add_adapter("second", lora(r=2, lora_alpha=7))

    peft, flat = pair(sigma=0.3, prepare=second, adapters=["default"])
    agree(run(flat), run(with_noise(peft, flat)))
    for model in (peft, flat):
        model.set_adapter("second")
    agree(run(flat), run(peft))


@pytest.mark.parametrize("left_out", BOTH)
def test_one_parameter_left_without_noise(left_out: str) -> None:
    """Whichever of the wrappers is the outer one, the other's noise and both adapters are there."""
    name = left_out.rpartition(".")[2]
    peft, flat = pair(sigma=0.3, exclude_modules=[name])
    assert len(wrappers(flat)) == 1 and left_out not in wrappers(flat)
    agree(run(flat), run(with_noise(peft, flat)))


def test_merging() -> None:
    peft, flat = pair(sigma=0.3)
    for model in (peft, flat):
        model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"^experts\.\w+: expected no noise, .*merged"):
        run(flat)
    with flat.controller.disabled():
        agree(run(flat), run(peft))
    agree(run(flat.eval()), run(peft.eval()))
    flat.train(), peft.train()
    flat.controller.advance()
    for model in (peft, flat):
        model.unmerge_adapter()
    agree(run(flat), run(with_noise(peft, flat)))
    want, got = (model.merge_and_unload().state_dict() for model in (peft, flat))
    assert want.keys() == got.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_training() -> None:
    """The base is never written; seed and step travel in the optimiser's state."""
    peft, flat = pair(sigma=0.3)
    optimizer = torch.optim.SGD([p for p in flat.parameters() if p.requires_grad], lr=0.1)
    flat.controller.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            run(flat)
            optimizer.step()
    before, after = peft.state_dict(), flat.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) == ("lora_" not in name), name
    agree(run(flat), run(with_noise_after(flat)))

    resumed, again = pair(sigma=0.3)[1], None
    resumed.load_state_dict(after)
    again = torch.optim.SGD([p for p in resumed.parameters() if p.requires_grad], lr=0.1)
    resumed.controller.attach(again)
    again.load_state_dict(optimizer.state_dict())
    assert resumed.controller.step == 3
    want, got = run(flat), run(resumed)
    assert all(torch.equal(got[name], want[name]) for name in want)


def with_noise_after(flat: Any) -> Any:
    """PEFT's model with the adapters that `flat` has now, in its noise."""
    plain = pair()[0]
    plain.load_state_dict(flat.state_dict())
    return with_noise(plain, flat)


def test_saved_and_loaded(tmp_path: Path) -> None:
    peft, flat = pair(tiny_mixtral(), *(f"mlp.{name}" for name in BOTH), sigma=0.3)
    flat.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = copy.deepcopy(peft).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.arange(14).view(2, 7)
    want, got = (model(input_ids=ids).logits for model in (loaded, flat.eval()))
    torch.testing.assert_close(got, want)
    assert not torch.allclose(flat.train()(input_ids=ids).logits, want, atol=1e-3)


def test_the_way_back() -> None:
    peft, flat = pair(sigma=0.3)
    remove_flat_lora(flat)
    kinds = {type(m) for m in flat.modules() if isinstance(m, ParamWrapper)}
    assert kinds == {ParamWrapper} and not flat.controller.layers
    want, got = run(peft), run(flat)
    assert all(torch.equal(got[name], want[name]) for name in want)
    for module in flat.modules():
        assert not {"noise_scale", "noise_controller", "flat_lora_name", "_seed"} & vars(module).keys()
    flat.controller = apply_flat_lora(flat, sigma=0.3, seed=5, verbose=False)
    agree(run(flat), run(with_noise(peft, flat)))


def test_copies_and_another_type() -> None:
    peft, flat = pair(sigma=0.3)
    want = run(flat)
    for copied in (copy.deepcopy(flat), pickle.loads(pickle.dumps(flat.base_model.model))):
        got = run(copied)
        assert torch.equal(got["y"], want["y"])
    peft, flat = peft.double(), flat.double()
    agree(run(flat, torch.float64), run(with_noise(peft, flat), torch.float64))


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_bfloat16(sigma: float) -> None:
    """As near to the exact values as PEFT's own layers, with their adapters in either type."""
    for autocast_adapter_dtype in (True, False):
        torch.manual_seed(0)
        peft = get_peft_model(Block().bfloat16(), lora(), autocast_adapter_dtype=autocast_adapter_dtype)
        scramble(peft)
        flat = copy.deepcopy(peft.train())
        flat.controller = apply_flat_lora(flat, sigma=sigma, seed=5, verbose=False)
        noisy = with_noise(peft, flat) if sigma else peft
        exact = run(copy.deepcopy(noisy).float())
        got, want = run(flat, torch.bfloat16), run(noisy, torch.bfloat16)
        assert got.keys() == want.keys()
        for name, value in exact.items():
            assert got[name].dtype == want[name].dtype, name
            errors = [(v[name].float() - value).norm() for v in (got, want)]
            assert errors[0] <= 2 * errors[1] + 0.02 * value.norm(), name


def test_autocast() -> None:
    _, flat = pair(sigma=0.3)
    exact = run(flat)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(flat)
    for name, value in exact.items():
        assert (got[name].float() - value).norm() <= 0.05 * value.norm(), name


def one_expert_alone(model: Any, expert: int = 2) -> None:
    """A router that sends every token to this expert and the next."""
    router = model.base_model.model.router
    with torch.no_grad():
        router.weight.zero_()
        router.bias.copy_(torch.arange(E).sub(expert).remainder(E).neg() * 10.0)


def test_intruders_are_counted_in_each_expert() -> None:
    _, flat = pair(lora_options={"lora_alpha": 60})
    counted = intruder_dimensions(flat, threshold=0.9)
    for layer in wrappers(flat).values():
        weight, lora_A, lora_B, scaling = layer._weight_in_use()
        one_each = [
            len(intruders(w, w + scaling * b @ a, threshold=0.9))
            for w, a, b in zip(weight.detach(), lora_A.detach(), lora_B.detach(), strict=True)
        ]
        assert sum(one_each) > max(one_each) > 0
        assert counted[_name_of(flat, layer)] == sum(one_each)


def _name_of(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)


def test_unused_experts_cost_nothing() -> None:
    """They are not read, their gradients are zero, and nobody warns of them."""
    _, flat = pair(sigma=0.3)
    one_expert_alone(flat)
    with torch.no_grad():
        for layer in wrappers(flat).values():
            layer.get_param()[0] = float("nan")
    optimizer = torch.optim.SGD([p for p in flat.parameters() if p.requires_grad], lr=0.01)
    flat.controller.attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            results = run(flat)
            assert results["y"].isfinite().all()
            optimizer.step()
    used = {2, 3}
    for layer in wrappers(flat).values():
        A, B = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        for e in range(E):
            of_A, of_B = A.view(E, 3, -1)[e], B.view(B.shape[0], 3, E)[..., e]
            assert bool(of_A.any()) == bool(of_B.any()) == (e in used)


def test_tokens_for_nobody() -> None:
    """An index of E or above is none of the experts, as in transformers' own formula."""
    peft, flat = pair(sigma=0.3)
    x, weights = torch.randn(5, H), torch.rand(5, TOP_K)
    index = torch.tensor([[0, E], [E, E], [3, 1], [5, E], [2, 2]])
    got = flat.base_model.model.experts(x, index, weights)
    assert not got[1].any() and got[0].any()
    try:
        want = with_noise(peft, flat).base_model.model.experts(x, index, weights)
    except RuntimeError as error:
        pytest.skip(f"this transformers' own formula takes no such index: {error}")
    torch.testing.assert_close(got, want)


def test_nothing_of_the_weights_size() -> None:
    """Of no expert's weight even; PEFT materialises W + B A of them all."""
    peft, flat = pair(sigma=0.3, lora_options={"r": 1})
    with Allocations() as theirs:
        run(peft)
    with Allocations() as ours:
        run(flat)
    assert theirs.largest >= E * 2 * FF * H
    assert ours.largest <= 11 * TOP_K * 2 * FF  # the rows of the middle
    flat.requires_grad_(True)
    gradients = run(flat)
    assert any("gate_up_proj" in name for name in gradients)


def test_the_layout_of_older_peft() -> None:
    """Before it knew is_transposed, PEFT took every parameter to be (E, in_features, out_features)."""
    block = Block()
    experts = block.experts
    experts.is_transposed = True
    peft = get_peft_model(block, lora()).train()
    experts.is_transposed = False
    scramble(peft)
    flat = copy.deepcopy(peft)
    flat.controller = apply_flat_lora(flat, sigma=0.3, seed=5, verbose=False)
    layer = wrappers(flat)["experts.gate_up_proj"]
    assert layer.lora_A["default"].weight.shape[1] == 2 * FF  # the other way round
    agree(run(flat), run(with_noise(peft, flat)))


def test_adapters_added_later() -> None:
    peft, flat = pair(
        "mixtral.MixtralExperts",
        sigma=0.3,
        lora_options={"target_modules": ["head"], "target_parameters": None},
    )
    assert not wrappers(flat)
    for model in (peft, flat):
        torch.manual_seed(7)
        model.add_adapter("second", lora())
        model.set_adapter("second")
        scramble(model)
    run(flat)
    assert len(wrappers(flat)) == 2
    agree(run(flat), run(with_noise(peft, flat)))


def test_compiled() -> None:
    """In one graph for every routing."""
    _, flat = pair(sigma=0.3)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(flat, backend=backend, fullgraph=True)
    for _ in range(3):
        x = torch.randn(11, H)
        torch.testing.assert_close(compiled(x), flat(x))
        flat.controller.advance()
    assert len(graphs) == 1
    torch._dynamo.reset()


def refused(model: Any, *parts: str, **options: Any) -> None:
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="^peft_model: expected LoRA layers that can train") as caught:
        apply_flat_lora(model, verbose=False, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert [type(module) for module in model.modules()] == before


class OwnExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * FF, H))
        self.down_proj = nn.Parameter(torch.randn(E, H, FF))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x


def test_what_is_refused() -> None:
    block = Block()
    block.experts = OwnExperts()
    refused(get_peft_model(block, lora()), "'experts.down_proj'", "OwnExperts", "use_experts_implementation")

    kind = type(Block().experts)
    derived = type("Derived", (kind,), {"forward": lambda self, x, index, weights: x})
    block = Block()
    block.experts.__class__ = derived
    refused(get_peft_model(block, lora()), "Derived", "use_experts_implementation")

    refused(get_peft_model(Block(), lora("head.weight")), "'head.weight'", "target_modules")

    for case in ("forward", "hook", "parallel", "type", "nested hook"):
        peft = get_peft_model(Block(), lora())
        experts = peft.base_model.model.experts.get_base_layer()
        if case == "forward":
            experts.forward = lambda *_: None
            refused(peft, "a forward of its own")
        elif case == "hook":
            experts.register_forward_hook(lambda *_: None)
            refused(peft, "hooks")
        elif case == "nested hook":
            peft.base_model.model.experts.base_layer.register_forward_hook(lambda *_: None)
            refused(peft, "hooks")
        elif case == "parallel":
            experts._is_expert_parallel = True
            refused(peft, "sharded")
        else:
            experts.down_proj.data = experts.down_proj.data.to(torch.float8_e4m3fn)
            refused(peft, "'experts.down_proj'", "float8_e4m3fn")
    for samples in ("batch", 2):
        refused(get_peft_model(Block(), lora()), "sorted by expert", repr(samples), samples=samples)

    if Version(installed.__version__) < Version("0.19"):
        return  # and no custom_modules
    config = lora()
    config._register_custom_module(custom_modules(NoiseController()))
    with pytest.raises(ValueError, match=r"target_parameters.*apply_flat_lora"):
        get_peft_model(Block(), config)


def test_what_comes_after_the_conversion_is_an_error_with_noise() -> None:
    _, flat = pair(sigma=0.3)
    experts = flat.base_model.model.experts
    x, index, weights = torch.randn(5, H), torch.zeros(5, 1, dtype=torch.long), torch.rand(5, 1)
    wrong = r"^experts\.\w+: expected no noise, because "
    with pytest.raises(RuntimeError, match=wrong + "it is called with"):
        experts(x, index)
    with pytest.raises(RuntimeError, match=wrong + "its hidden_states"):
        experts(x[None], index, weights)
    named = experts(x, top_k_weights=weights, top_k_index=index)
    assert torch.equal(named, experts(x, index, weights))
    experts.get_base_layer().register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=wrong + ".*hooks"):
        experts(x, index, weights)
    with flat.controller.disabled():
        assert experts(x, index, weights).shape == (5, H)


def test_measures_and_methods() -> None:
    """Methods that ask a layer for one pair of matrices refuse mixtures, and the rest works on them."""
    _, flat = pair(sigma=0.3)
    x = torch.randn(11, H)
    found = expected_increase(flat, lambda: flat(x).square().mean(), (0.3,), draws=4)
    assert found[0].mean != 0
    parameters = [p for p in flat.parameters() if p.requires_grad]
    for name in ("bi-lora", "eflat-lora"):
        with pytest.raises(ValueError, match="mixture of experts, 'experts"):
            make(name, flat, torch.optim.SGD(parameters, 0.1))
    for name in ("flat-lora", "lora-sam", "mezo"):
        loss = make(name, flat, torch.optim.SGD(parameters, 0.1)).step(lambda: flat(x).square().mean())
        assert loss.isfinite()
    assert warm_up(flat, [16]) == 0  # there is nothing to compile on a CPU
    for layer in wrappers(flat).values():
        layer.get_base_layer().config.num_experts_per_tok = TOP_K
        width = layer._weight_in_use()[0].shape[2]
        assert len(layer._example(torch.randn(16, width))) == 16 * TOP_K  # whose tiles a training takes


@pytest.mark.parametrize("kind", ["mixtral", "transposed"])
def test_a_plane_of_losses(kind: str) -> None:
    """The weights of every expert move, and come back."""
    peft, flat = pair(*of(kind), sigma=0.0)
    x = torch.randn(11, H)
    before = copy.deepcopy(flat.state_dict())
    rows = plane(flat, lambda: flat(x).square().mean(), (0.0, 0.2), seed=4)
    assert all(torch.equal(value, before[name]) for name, value in flat.state_dict().items())
    flat.controller.target_sigma = 0.2
    noisy = copy.deepcopy(peft).eval()
    modules = dict(noisy.named_modules())
    for name, layer in flat.named_modules():
        if isinstance(layer, FlatParamWrapper):
            K = layer._weight_in_use()[0].shape[2]
            eps = torch.stack(
                [
                    materialize_noise(scale, K, seed=5, stream=layer.stream + e, antithetic=True)
                    for e, scale in enumerate(layer.noise_scale)
                ]
            )
            experts = modules[name].get_base_layer()
            with torch.no_grad():
                getattr(experts, layer.parameter_name).add_(eps.mT if experts.is_transposed else eps)
    want = [model(x).square().mean().item() for model in (peft.eval(), noisy)]
    assert [row[0] for row in rows] == pytest.approx(want, rel=1e-5) and rows[0][1] != rows[0][0]
