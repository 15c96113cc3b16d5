"""HaLoRA: adapters for weights that a noisy chip holds, and what a model is worth on many such chips."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.quantized import QuantizedWeight
from ..train.layer import NoisyLayer, eval_mode, instead_of_noise
from .base import Closure, Method


class HaLoRA(Method):
    """Hardware-aware LoRA: the base weights lie on a chip that adds noise to them, the adapter does not.

    ::

        y = x (W + eps + s B A)^T      eps[n, k] ~ N(0, (sigma max |W|)^2)
        A, B <- step on dL + mu sum over layers of d(||A A^T|| + ||B^T B||)

    The noise of a chip is a function of its number. Each step is another chip, or one of so many; their numbers begin
    at the controller's seed. The controller has no noise of its own: its sigma is 0. What a trained model is worth on
    chips says `on_chips`.

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
        self.sigma, self.mu, self.chips = sigma, mu, chips
        self._scales = _scales(self.layers, sigma)

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        chip = self.controller.step if self.chips is None else self.controller.step % self.chips
        with _on_chip(self._scales, (self.controller.base + chip) % 2**64):
            loss = self._backward(closures)
        if self.mu:
            norms = (torch.linalg.vector_norm(g) for a in self._pairs for g in _grams(a.lora_A, a.lora_B))
            (self.mu * sum(norms)).backward()
        return loss


def on_chips(
    model: nn.Module, evaluate: Callable[[], float], *, sigma: float, chips: Iterable[int] = range(20)
) -> list[float]:
    """What `evaluate` returns on each of the chips: the model in eval mode, its base weights under that chip's noise.

    Args:
        model: its layers are `FlatLoraLinear`s or those of `integrations.peft`.
        evaluate: runs the model, and returns a number.
        sigma: std relative to the largest weight of a tensor, > 0.
        chips: their numbers, seeds of the noise. Those from the controller's seed on are the ones of the training.

    Returns:
        The values, one a chip.
    """
    if not sigma > 0:
        raise ValueError(f"sigma: expected a number > 0, got {sigma}")
    layers = [m for m in model.modules() if isinstance(m, NoisyLayer)]
    if not layers:
        raise ValueError("model: expected layers with noise, got none")
    scales, found = _scales(layers, sigma), []
    with torch.no_grad(), eval_mode(model):
        for chip in chips:
            with _on_chip(scales, chip):
                found.append(float(evaluate()))
    return found


@contextlib.contextmanager
def _on_chip(scales: dict[NoisyLayer, Tensor], seed: int) -> Iterator[None]:
    def arguments(layer: NoisyLayer) -> dict[str, Any]:
        return {
            "seed": seed,
            "stream": layer.stream,
            "noise": layer.noise,
            "noise_scale": scales[layer],
            "strategy": layer.strategy,
            "noise_accum": layer.noise_accum,
            "backend": layer.backend,
        }

    with instead_of_noise(scales, arguments):
        yield


@torch.no_grad()
def _scales(layers: Iterable[NoisyLayer], sigma: float) -> dict[NoisyLayer, Tensor]:
    found = {}
    for layer in layers:
        weight: Any = layer._weight_in_use()[0]
        if len(weight.shape) != 2:
            raise ValueError(
                f"model: expected layers of one weight, got a mixture of experts, {layer.flat_lora_name!r}"
            )
        low, high = (weight.dequantize() if isinstance(weight, QuantizedWeight) else weight).aminmax()
        found[layer] = (sigma * torch.maximum(-low, high).float()).repeat(weight.shape[0])
    return found


def _grams(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A @ A.t(), B.t() @ B
