"""PEFT models on the fused op: PEFT's own results without noise, the eager formula with it, PEFT's own files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from packaging.version import Version  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model  # noqa: E402
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from flatlora_kernels import NoiseController, materialize_noise  # noqa: E402
from flatlora_kernels import apply_flat_lora as flat_lora  # noqa: E402
from flatlora_kernels.integrations.peft import (  # noqa: E402
    FlatLinear,
    apply_flat_lora,
    custom_modules,
    remove_flat_lora,
)

# PEFT warns of what these tests are about: tied weights, fan_in_fan_out, merged DoRA.
names_modules = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.19"), reason="custom_modules needs PEFT 0.19"
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Net(nn.Module):
    """x (..., 16) -> (..., 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


class Transposed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(24, 16), Conv1D(16, 24)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=0.2)
            nn.init.normal_(layer.bias, std=0.2)


class Shared(Net):
    """`up` in two places and called in both; `down` has the weight of `up`'s transpose nowhere: 24 -> 24 -> 16."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(24, 24)
        self.other = nn.Linear(24, 24)
        self.other.weight = self.square.weight  # tied: two layers, one parameter

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.square(torch.tanh(self.up(x))))
        return self.head(self.down(torch.tanh(self.other(torch.tanh(self.square(h))))))


class DeepHead(Net):
    """A head with a linear of a name that is a target, too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential()
        self.head.down, self.head.out = nn.Linear(16, 16), nn.Linear(16, 3)


class TiedHead(nn.Module):
    """A head tied to the embedding, adapted by LoRA: the embedding itself is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.down = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.detach().abs().sum(-1) * 7).long() % 11
        return self.lm_head(torch.tanh(self.down(self.embed(ids) + x)))


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], **options})


def scramble(model: nn.Module) -> None:
    """Adapters as after some training; fresh ones do nothing."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            offset = parameter.detach() if "magnitude" in name or "head" in name else 0
            with torch.no_grad():
                parameter.copy_(offset + 0.2 * torch.randn_like(parameter))


def two_adapters(model: PeftModel) -> None:
    model.add_adapter("second", lora(r=3, lora_alpha=9))
    model.base_model.set_adapter(["default", "second"])


def pair(
    config: LoraConfig,
    make: Callable[[], nn.Module] = Net,
    prepare: Callable[[Any], None] = lambda model: None,
    dtype: torch.dtype = torch.float32,
    sigma: float = 0.0,
    keep_init: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """A PEFT model in training mode and its copy on the fused op."""
    torch.manual_seed(0)
    peft = get_peft_model(make().to(dtype), config)
    prepare(peft)
    if not keep_init:
        scramble(peft)
    peft.train()
    flat = copy.deepcopy(peft)
    flat.controller = apply_flat_lora(flat, sigma=sigma, seed=5, **options)
    assert any(isinstance(module, FlatLinear) for module in flat.modules())
    return peft, flat


def run(model: nn.Module, dtype: torch.dtype = torch.float32, calls: int = 1) -> dict[str, Tensor]:
    """Output, gradients of everything that has one, and the generator's state after the pass."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, 16).to(dtype).requires_grad_()
    model.zero_grad()
    y = model(x)
    torch.sin(2 * y.float()).sum().backward()
    results = {"y": y, "x": x.grad, "generator": torch.get_rng_state()}
    results |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().clone() for name, value in results.items() if value is not None}


def agree(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 2e-5) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        size = value.double().abs().max().item()
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=rtol * size, msg=lambda m, n=name: f"{n}: {m}"
        )


# What the model is made with, what is done to it, and which model: PEFT's own results are expected of each.
BEHAVIOURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.4},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"down": 2}, "alpha_pattern": {"up": 3}},
    "lora_bias": {"lora_bias": True},
    "trained_bias": {"bias": "lora_only"},
    "dora": {"use_dora": True},
    "dora_dropout": {"use_dora": True, "lora_dropout": 0.4},
    "dora_transposed": {"use_dora": True, "make": Transposed, "lora_dropout": 0.4},
    "several": {"prepare": two_adapters},
    "several_dropout": {"prepare": two_adapters, "lora_dropout": 0.4},
    "several_dora": {"prepare": two_adapters, "use_dora": True},
    "pissa": {"init_lora_weights": "pissa", "keep_init": True},
    "olora": {"init_lora_weights": "olora", "keep_init": True},
    "transposed": {"make": Transposed, "lora_dropout": 0.4},
    "shared": {"make": Shared, "target_modules": ["up", "square", "other"]},
    "tied": {"make": TiedHead, "target_modules": ["down", "lm_head"]},
    "modules_to_save": {"modules_to_save": ["head"]},
    "modules_to_save_targeted": {"modules_to_save": ["head"], "make": DeepHead},
}
OF_PAIR = ("make", "prepare", "keep_init")


def behaviour(name: str, **options: Any) -> tuple[Any, Any]:
    given = BEHAVIOURS[name]
    config = lora(**{key: value for key, value in given.items() if key not in OF_PAIR})
    return pair(config, **{key: value for key, value in given.items() if key in OF_PAIR}, **options)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_parity(name: str) -> None:
    """Outputs, every gradient and the random numbers consumed are PEFT's, in training and in eval mode."""
    peft, flat = behaviour(name)
    agree(run(flat), run(peft))
    agree(run(flat.eval()), run(peft.eval()))
    assert flat.state_dict().keys() == peft.state_dict().keys()


def with_noise(peft: Any, flat: Any) -> Any:
    """PEFT's model with the noise of `flat` added to its weights, and DoRA's norms taken before."""
    noisy = copy.deepcopy(peft)
    modules = dict(noisy.named_modules())
    for name, layer in flat.named_modules():
        if not isinstance(layer, FlatLinear) or not set(layer.active_adapters) & set(layer.lora_A):
            continue
        twin = modules[name]
        transpose = isinstance(twin.base_layer, Conv1D)
        W = twin.base_layer.weight.detach()
        in_use = W.to(torch.promote_types(W.dtype, torch.float32)) + sum(
            twin.get_delta_weight(a) for a in twin.active_adapters if a in twin.lora_A
        )
        norms = in_use.norm(dim=0 if transpose else 1)
        torch.testing.assert_close(
            layer.noise_scale,
            (flat.controller.sigma / layer.in_features**0.5 * norms).float(),
            rtol=1e-5,
            atol=0,
        )
        eps = materialize_noise(
            layer.noise_scale,
            layer.in_features,
            seed=flat.controller.value,
            stream=layer.stream,
            noise=layer.noise,
        )
        # A parameter of its own: another layer may use the weight without noise.
        in_noise = (W + (eps.t() if transpose else eps)).to(W.dtype)
        twin.base_layer.weight = nn.Parameter(in_noise, requires_grad=False)
        for dora in twin.lora_magnitude_vector.values():
            dora.get_weight_norm = lambda *_, norms=norms, **__: norms
            # eps becomes m / c * eps: it has the size that magnitudes have
            std = (dora.weight / norms) * layer.noise_scale
            torch.testing.assert_close(
                std, flat.controller.sigma / layer.in_features**0.5 * dora.weight, rtol=1e-5, atol=0
            )
    return noisy


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
    assert flat_layers(flat)["up"].lora_A["default"].weight.dtype == torch.float32
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


def test_autocast() -> None:
    peft, flat = pair(lora(lora_dropout=0.4), sigma=0.0)
    exact = run(peft)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = run(flat), run(peft)
    rounded_like(got, exact, want)


def tiny_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


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


def saved(model: Any, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")
    }


@pytest.mark.parametrize("name", ["plain", "dora", "modules_to_save", "transposed"])
def test_saved_adapters_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """The same bytes, and each side loads what the other saved."""
    peft, flat = behaviour(name, sigma=0.3)
    theirs, ours = saved(peft, tmp_path / "peft"), saved(flat, tmp_path / "flat")
    assert theirs == ours and set(ours) == {"adapter_model.safetensors", "adapter_config.json"}
    base = peft.unload()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "flat", is_trainable=True).train()
    again = copy.deepcopy(loaded)
    again.controller = apply_flat_lora(again, sigma=0.3, seed=5)
    agree(run(again), run(flat))
    assert saved(again, tmp_path / "again") == ours


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    """From PEFT's file and the optimiser's state, in the middle of a schedule, whatever seed: bit for bit."""

    def optimiser(model: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        model.controller.attach(optimizer)
        return optimizer

    def train(model: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        outputs = []
        for _ in range(2):
            outputs.append(run(model)["y"])
            optimizer.step()
        return outputs

    schedule = {"schedule": "cosine", "total_steps": 4}
    peft, flat = pair(lora(lora_dropout=0.2), sigma=0.3, **schedule)
    optimizer = optimiser(flat)
    train(flat, optimizer)
    flat.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    expected = train(flat, optimizer)

    resumed = PeftModel.from_pretrained(peft.unload(), tmp_path, is_trainable=True).train()
    resumed.controller = apply_flat_lora(resumed, sigma=0.3, seed=99, **schedule)
    optimizer = optimiser(resumed)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert all(map(torch.equal, train(resumed, optimizer), expected))
    assert resumed.controller.sigma == 0.3
    for name, value in flat.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


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


def flat_layers(model: nn.Module) -> dict[str, FlatLinear]:
    return {
        name.removeprefix("base_model.model."): m
        for name, m in model.named_modules()
        if isinstance(m, FlatLinear)
    }


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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[Any], Any]) -> None:
    """A copy draws the same noise, by a controller of its own."""
    _, flat = pair(lora(lora_dropout=0.1), sigma=0.3)
    flat.controller.advance()
    twin = copied(flat)
    agree(run(twin), run(flat))
    before = run(twin)["y"]
    flat.controller.advance()
    assert torch.equal(run(twin)["y"], before)
    twin.controller.advance()
    agree(run(twin), run(flat))


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


@names_modules
def test_loading_into_custom_modules(tmp_path: Path) -> None:
    """Adapters on the meta device until their values come."""
    _, flat = pair(lora(), sigma=0.3)
    flat.save_pretrained(tmp_path)
    config = lora()
    config._register_custom_module(custom_modules(NoiseController(sigma=0.3, seed=5)))
    base = copy.deepcopy(flat).unload()
    loaded = PeftModel.from_pretrained(
        base, tmp_path, config=config, is_trainable=True, low_cpu_mem_usage=True
    ).train()
    agree(run(loaded), run(flat))


class Allocations(TorchDispatchMode):
    """The largest result of an operator that is no view."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(r.alias_info for r in func._schema.returns):
            sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
            self.largest = max(self.largest, *sizes, 0)
        return result


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
