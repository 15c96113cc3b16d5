"""Layers and models with adapters that do something, small, and what tests do with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatlora_kernels as fk
from flatlora_kernels import FlatLoraLinear, NoiseController, apply_flat_lora


def small_layer(
    in_features: int = 40,
    out_features: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options,
) -> FlatLoraLinear:
    """A layer with an adapter that does something, on the reference backend unless told otherwise."""
    torch.manual_seed(0)
    # A backend may take no other device, and noise scales are computed as soon as there is a layer.
    linear = nn.Linear(in_features, out_features, dtype=dtype).to(device)
    own = {} if "noise_controller" in options else {"sigma": 0.3}
    layer = FlatLoraLinear.from_linear(linear, **{"r": 4, "backend": "reference", **own, **options})
    nn.init.normal_(layer.lora_B)
    layer.refresh_noise_scale()
    return layer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.block = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.tanh(self.first(x))))


def small_model(sigma: float = 0.3, device: str = "cpu", **options) -> tuple[Net, NoiseController]:
    torch.manual_seed(0)
    model = Net().to(device)
    options = {"r": 4, "backend": "reference", "verbose": False, **options}
    if "noise_controller" not in options:
        options["sigma"] = sigma
    controller = apply_flat_lora(model, ["first", "block.0", "block.2"], **options)
    for layer in layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
        layer.refresh_noise_scale()
    return model, controller


def model_and_controller(**settings: Any) -> tuple[nn.Sequential, NoiseController]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    options = {
        "r": 2,
        "lora_alpha": 2,
        "backend": "reference",
        "verbose": False,
        "sigma": 0.4,
        "seed": 1,
        **settings,
    }
    controller = apply_flat_lora(model, ".*", **options)
    for layer in controller.layers:
        if layer.lora_B is not None:
            nn.init.normal_(layer.lora_B)
    return model, controller


def layers(model: nn.Module) -> list[FlatLoraLinear]:
    return [m for m in model.modules() if isinstance(m, FlatLoraLinear)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), trainable(model)))


def all_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def noise_scale_now(layer: FlatLoraLinear, sigma: float) -> Tensor:
    return fk.flat_noise_scale(
        layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling, sigma=sigma, backend="reference"
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    controller: NoiseController | None = None,
) -> list[float]:
    """The losses of a plain loop; `controller` is one that the optimiser does not advance."""
    losses = []
    for x in batches:
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller is not None:
            controller.advance()
        losses.append(loss.item())
    return losses


def calls_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one where a layer calls this function of the op: "flat_noise_scale" measures the weight in use."""
    found: list[int] = []
    original = getattr(fk.train.layer, name)
    monkeypatch.setattr(fk.train.layer, name, lambda *a, **k: found.append(1) or original(*a, **k))
    return found
