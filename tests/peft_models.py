"""Models of PEFT beside their copies on the fused op, what is compared of them, and the noise in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from packaging.version import Version  # noqa: E402
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from flatlora_kernels import materialize_noise  # noqa: E402
from flatlora_kernels.integrations.peft import FlatLinear, apply_flat_lora  # noqa: E402

names_modules = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.19"), reason="custom_modules needs PEFT 0.19"
)


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


def tiny_llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def lora(kind: type[LoraConfig] = LoraConfig, **options: Any) -> LoraConfig:
    rank = {"r": 4} if kind is LoraConfig else {}
    return kind(**{**rank, "lora_alpha": 6, "target_modules": ["up", "down"], **options})


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


ADALORA = {"init_r": 4, "target_r": 2, "total_step": 10}
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
    "adalora": {"kind": AdaLoraConfig, **ADALORA},
    "adalora_dropout": {"kind": AdaLoraConfig, "lora_dropout": 0.4, **ADALORA},
    "adalora_transposed": {"kind": AdaLoraConfig, "make": Transposed, **ADALORA},
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


def flat_layers(model: nn.Module) -> dict[str, FlatLinear]:
    return {
        name.removeprefix("base_model.model."): m
        for name, m in model.named_modules()
        if isinstance(m, FlatLinear)
    }
