"""A model for the methods, each method on it, and the same network in plain torch, which forms every N x K matrix.

The models are in float64, so that only an error of the formula shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from small_models import layers
from torch import Tensor, nn

from flatlora_kernels import apply_flat_lora, materialize_noise
from flatlora_kernels.methods import make
from flatlora_kernels.train.controller import NoiseController

LR, RANK, ALPHA = 0.2, 3, 6.0
SCALING = ALPHA / RANK
CLOSE = {"rtol": 1e-6, "atol": 1e-9}  # eps and its std are float32


def build(*, r: int = RANK, train_weight: bool = False, **controller: Any) -> nn.Module:
    """Two layers with a tanh between; B is not zero, so that every gradient is there from the first step."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7)).double()
    apply_flat_lora(
        model,
        ["0", "2"],
        noise_controller=NoiseController(**{"seed": 5, "sigma": 0.0, **controller}),
        r=r,
        lora_alpha=ALPHA,
        train_weight=train_weight,
        verbose=False,
    )
    for layer in layers(model):
        if r:
            nn.init.normal_(layer.lora_B, std=0.3)
    torch.set_rng_state(state)
    return model


def data(rows: int = 8) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return (torch.randn(rows, n, generator=rng, dtype=torch.float64) for n in (12, 7))  # type: ignore[return-value]


def closures(model: nn.Module, parts: int = 2) -> list[Callable[[], Tensor]]:
    x, y = data()
    pairs = zip(x.chunk(parts), y.chunk(parts), strict=True)
    return [lambda a=a, b=b: F.mse_loss(model(a), b) for a, b in pairs]


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **{"lr": LR, **options})


SETUPS: dict[str, dict[str, Any]] = {
    "lora": {"sigma": 0.2},
    "flat-lora": {"sigma": 0.2},
    "bi-lora": {},
    "sam": {"r": 0, "train_weight": True},
    "esam": {},
    "sl-sam": {},
    "lora-sam": {},
    "eflat-lora": {},
    "lora-pro": {"sigma": 0.2},
    "halora": {},
    "rwp": {"sigma": 0.2, "norm": "row"},
    "lpf-sgd": {"sigma": 0.2, "norm": "row"},
    "neftune": {},
    "full-noise": {"r": 0, "train_weight": True, "sigma": 0.2},
    "mezo": {"r": 0, "train_weight": True},
    "es": {"r": 0, "train_weight": True},
    "eggroll": {"r": 0, "train_weight": True},
}


def ready(name: str, **options: Any) -> tuple[nn.Module, Any]:
    model = build(**SETUPS[name])
    if name == "neftune":
        options["embedding"] = Embedded(model)
    if name == "rwp":
        options["mix"] = 0.5
    if name == "esam":
        options.setdefault("gamma", 1)  # closures without an argument
    if name in ("es", "eggroll"):
        options.setdefault("population", 4)
    return model, make(name, model, sgd(model), **options)


class Embedded(nn.Module):
    """Where NEFTune needs none of the model's modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Eager:
    """The same network in plain torch: the weights in use are given as (N, K) matrices."""

    def __init__(self, model: nn.Module) -> None:
        self.W = [m.weight.detach().clone() for m in layers(model)]
        self.bias = [m.bias.detach().clone() for m in layers(model)]
        self.A = [m.lora_A.detach().clone() for m in layers(model) if m.r]
        self.B = [m.lora_B.detach().clone() for m in layers(model) if m.r]

    def merged(self) -> list[Tensor]:
        if not self.A:
            return list(self.W)
        return [W + SCALING * B @ A for W, A, B in zip(self.W, self.A, self.B, strict=True)]

    def loss_and_grads(
        self, weights: list[Tensor], part: int | None = None, bias: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Of the whole batch or of one half, with respect to the merged weights, and then the biases where given."""
        x, y = data()
        if part is not None:
            x, y = x.chunk(2)[part], y.chunk(2)[part]
        inputs = [t.detach().requires_grad_() for t in weights + (bias or [])]
        b = inputs[2:] or self.bias
        loss = F.mse_loss(F.linear(F.linear(x, inputs[0], b[0]).tanh(), inputs[1], b[1]), y)
        return loss.detach(), list(torch.autograd.grad(loss, inputs, materialize_grads=True))

    def adapter_grads(self, G: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        gA = [SCALING * B.t() @ g for B, g in zip(self.B, G, strict=True)]
        gB = [SCALING * g @ A.t() for A, g in zip(self.A, G, strict=True)]
        return gA, gB

    def descend(self, gA: list[Tensor], gB: list[Tensor]) -> None:
        self.A = [A - LR * g for A, g in zip(self.A, gA, strict=True)]
        self.B = [B - LR * g for B, g in zip(self.B, gB, strict=True)]

    def noise(self, controller: NoiseController, root_K: bool, sample: int = 0) -> list[Tensor]:
        found = []
        for stream, w in enumerate(self.merged()):
            scale = controller.sigma * w.norm(dim=1) / (math.sqrt(w.shape[1]) if root_K else 1)
            found.append(
                materialize_noise(
                    scale.float(),
                    w.shape[1],
                    seed=controller.value,
                    stream=stream,
                    sample=sample,
                    dtype=torch.float64,
                )
            )
        return found

    def agrees(self, model: nn.Module, atol: float = CLOSE["atol"]) -> None:
        for i, layer in enumerate(layers(model)):
            torch.testing.assert_close(layer.weight.detach(), self.W[i], rtol=CLOSE["rtol"], atol=atol)
            torch.testing.assert_close(layer.bias.detach(), self.bias[i], rtol=CLOSE["rtol"], atol=atol)
            if self.A:
                torch.testing.assert_close(layer.lora_A.detach(), self.A[i], rtol=CLOSE["rtol"], atol=atol)
                torch.testing.assert_close(layer.lora_B.detach(), self.B[i], rtol=CLOSE["rtol"], atol=atol)


def add(a: list[Tensor], b: list[Tensor], scale: Any = 1) -> list[Tensor]:
    return [x + scale * y for x, y in zip(a, b, strict=True)]
