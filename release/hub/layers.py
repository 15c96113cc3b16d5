"""Layers for `kernels.kernelize`: a forward alone, which works with the members of the layer that adopts it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .op.functional import fused_flat_lora_linear


class FlatLoraLinear(nn.Module):
    """A linear layer with a LoRA adapter, and in training mode noise on its weight.

    The adopting layer has the members below, and moves the noise on itself: once per optimiser step a new `seed`, and
    ``noise_scale = flat_noise_scale(weight, lora_A, lora_B, scaling=scaling, sigma=...)``.
    """

    can_torch_compile = True

    weight: Tensor  # (N, K), frozen
    bias: Tensor | None  # (N,)
    lora_A: Tensor  # (r, K)
    lora_B: Tensor  # (N, r)
    scaling: float
    noise_scale: Tensor | None  # (N,) float32; None = no noise
    seed: int | torch.Tensor  # a 0-d int64 tensor on the layer's device changes without compiling anew
    stream: int  # another one in each layer

    def forward(self, x: Tensor) -> Tensor:
        return fused_flat_lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.bias,
            scaling=self.scaling,
            noise_scale=self.noise_scale if self.training else None,
            seed=self.seed,
            stream=self.stream,
        )
