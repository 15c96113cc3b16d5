"""HaLoRA: adapters for weights that a noisy chip holds, and what a model is worth on many such chips."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.quantized import QuantizedWeight
from ..op.sharded import is_sharded
from ..train.controller import signed
from ..train.layer import NoisyLayer, eval_mode, instead_of_noise
from .base import Closure, Method

FIRST_TEST_CHIP = 10**6  # for tests: far from the seeds of trainings, whose chips HaLoRA knows


class HaLoRA(Method):
    """Hardware-aware LoRA: the base weights lie on a chip that adds noise to them, the adapter does not.

    ::

        y = x (W + eps + s B A)^T      eps[n, k] ~ N(0, (sigma max |W|)^2)
        A, B <- step on dL + mu sum over layers of d(||A A^T|| + ||B^T B||)

    The noise of a chip is a function of its number. Each step is another chip, or one of so many; their numbers begin
    at the controller's seed. The controller has no noise of its own: its sigma is 0. Each step reads the weights once
    for their largest (packed ones when they change). What a trained model is worth on chips says `on_chips`.

    Args:
        sigma: std relative to the largest weight of a tensor, > 0; the paper reports 0.02 among others.
        mu: >= 0, weight of the regulariser.
        chips: so many chips are taken in turn; None: a new one each step. 1 is one device.

    Returns of `step`: the loss without the regulariser, on the step's chip.

    Source: Wu et al., arXiv 2502.19747, of which we could read the abstract; the regulariser is that of a published
    summary. Guessed: Frobenius norms, the type of the noise, a new chip each step, and mu.
    """

    def __init__(
        self, *args: Any, sigma: float = 0.02, mu: float = 0.0, chips: int | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        if not sigma > 0:
            raise ValueError(f"sigma: expected a number > 0, got {sigma}")
        if not mu >= 0:
            raise ValueError(f"mu: expected a number >= 0, got {mu}")
        if chips is not None and chips < 1:
            raise ValueError(f"chips: expected an int >= 1 or None, got {chips}")
        if self.controller.target_sigma > 0:
            raise ValueError(
                f"noise_controller: expected sigma=0 for HaLoRA, which has its own, got {self.controller.target_sigma}"
            )
        self._pairs = self._adapters(one_each=True)
        _check(self.layers)
        self.sigma, self.mu, self.chips = sigma, mu, chips
        self._of_packed: _Known = {}

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        step = self.controller.step
        chip = self.controller.base + (step if self.chips is None else step % self.chips)
        with _on_chip(_scales(self.layers, self.sigma, self._of_packed), chip):
            loss = self._backward(closures)
        if self.mu:
            grams = (g for a in self._pairs for g in (a.lora_A @ a.lora_A.t(), a.lora_B.t() @ a.lora_B))
            (self.mu * sum(torch.linalg.vector_norm(g) for g in grams)).backward()
        return loss


def on_chips(
    model: nn.Module,
    evaluate: Callable[[], float],
    *,
    sigma: float,
    chips: Iterable[int],
    noise: str | None = None,
) -> list[float]:
    """What `evaluate` returns on each of the chips: the model in eval mode, its base weights under that chip's noise.

    Args:
        model: its layers are `FlatLoraLinear`s or those of `integrations.peft`, with adapters that are in use and not
            merged.
        evaluate: runs the model, and returns a number.
        sigma: std relative to the largest weight of a tensor, > 0.
        chips: their numbers, seeds of the noise. `HaLoRA` trains on those from the controller's seed on.
        noise: kind of all of them; None: of each layer the one it trained with.

    Returns:
        The values, one a chip.

    Raises:
        ValueError: a layer would compute without the op, and so without noise.
    """
    if not sigma > 0:
        raise ValueError(f"sigma: expected a number > 0, got {sigma}")
    layers = [m for m in model.modules() if isinstance(m, NoisyLayer)]
    if not layers:
        raise ValueError("model: expected layers with noise, got none")
    _check(layers)
    for layer in layers:
        obstacle = _obstacle(layer)
        if obstacle:
            raise ValueError(f"model: expected adapters in use, {layer.flat_lora_name!r} has them {obstacle}")
    scales, found = _scales(layers, sigma, {}), []
    with torch.no_grad(), eval_mode(model):
        for chip in chips:
            with _on_chip(scales, chip, noise):
                found.append(float(evaluate()))
    return found


def _obstacle(layer: Any) -> str | None:
    if getattr(layer, "merged", False):
        return "merged"
    if getattr(layer, "disable_adapters", False):
        return "disabled"
    return "inactive" if hasattr(layer, "active_adapters") and not layer._active() else None


@contextlib.contextmanager
def _on_chip(scales: dict[NoisyLayer, Tensor], chip: int, noise: str | None = None) -> Iterator[None]:
    seeds: dict[torch.device, Tensor] = {}  # tensors, of which a compiled model makes no constants
    for scale in scales.values():
        if scale.device not in seeds:
            seeds[scale.device] = torch.full((), signed(chip % 2**64), dtype=torch.int64, device=scale.device)

    def arguments(layer: NoisyLayer) -> dict[str, Any]:
        return {
            "seed": seeds[scales[layer].device],
            "stream": layer.stream,
            "noise": noise or layer.noise,
            "noise_scale": scales[layer],
            "strategy": layer.strategy,
            "noise_accum": layer.noise_accum,
            "backend": layer.backend,
        }

    with instead_of_noise(scales, arguments):
        yield


def _check(layers: Iterable[NoisyLayer]) -> None:
    for layer in layers:
        weight: Any = layer._weight_in_use()[0]
        name = repr(layer.flat_lora_name)
        if layer.stream_count > 1:
            raise ValueError(f"model: expected layers of one weight, got a mixture of experts, {name}")
        if is_sharded(weight):
            raise ValueError(f"model: expected whole weights, got a DTensor, a shard of one, {name}")
        if weight.requires_grad:
            raise ValueError(f"model: expected frozen base weights, got one that trains, {name}")


# The largest value of each packed weight, which cannot be asked for without decoding it whole.
_Known = dict[NoisyLayer, tuple[QuantizedWeight, Tensor]]


@torch.no_grad()
def _scales(layers: Iterable[NoisyLayer], sigma: float, known: _Known) -> dict[NoisyLayer, Tensor]:
    found = {}
    for layer in layers:
        weight: Any = layer._weight_in_use()[0]
        if not isinstance(weight, QuantizedWeight):
            largest = _largest(weight)
        elif layer in known and known[layer][0] is weight:
            largest = known[layer][1]
        else:
            largest = _largest(weight.dequantize())
            known[layer] = weight, largest
        found[layer] = (sigma * largest).repeat(weight.shape[0])
    return found


def _largest(weight: Tensor) -> Tensor:
    low, high = weight.aminmax()
    return torch.maximum(-low, high).float()
