"""`FlatAdapter`: what PEFT's LoRA layers with noise have in common, whatever they adapt."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from ..op import sharded
from ..train import packed
from ..train.layer import NoisyLayer


class FlatAdapter(NoisyLayer, LoraLayer):
    """A LoRA layer of PEFT that draws noise: a mixin before PEFT's own class."""

    of_peft: type[LoraLayer]  # the class that it stands before
    noisy_adapters: tuple[str, ...] | None = None  # None = all
    # PEFT's
    base_layer: Any
    lora_A: Any
    lora_B: Any
    scaling: dict[str, float]

    def extra_repr(self) -> str:
        if "noise_controller" not in vars(self):
            return "no noise"
        only = (
            "" if self.noisy_adapters is None else f", with adapters {', '.join(self.noisy_adapters)} alone"
        )
        return self.describe_noise() + only

    def _draws(self) -> bool:
        only = self.noisy_adapters
        return self.training and (only is None or any(name in only for name in self._active()))

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _adapter(self, names: list[str], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """A (r, K), B (N, r) and scaling of these adapters as one, in types the op takes beside `dtype`."""
        pairs, base = [], self.base_layer._parameters.get("weight")
        for name in names:
            A, B = packed.beside(dtype, *self._pair(name))
            pairs.append((sharded.replicated(A, base), sharded.replicated(B, base)))
        return as_one(pairs, [self._scaling(name) for name in names])

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, K) and B (N, r) as they are multiplied."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def _stored(self, name: str) -> tuple[Tensor, ...]:
        """The parameters that the pair is made of."""
        return self._pair(name)

    def _scaling(self, name: str) -> float:
        return self.scaling[name]

    def _lora_bias(self, name: str) -> Tensor | None:
        return self.lora_B[name].bias


def as_one(pairs: list[tuple[Tensor, Tensor]], scalings: list[float]) -> tuple[Tensor, Tensor, float]:
    """A (..., r, K), B (..., N, r) and scaling of adapters that add up: one of all their ranks."""
    if len(pairs) == 1:
        return *pairs[0], scalings[0]
    scaled = [B * scaling for (_, B), scaling in zip(pairs, scalings, strict=True)]
    return torch.cat([A for A, _ in pairs], -2), torch.cat(scaled, -1), 1.0
