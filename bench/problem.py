"""The tensors of one case."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import Case

SCALING = 2.0  # alpha = 2 r
SIGMA = 0.1  # eps is a tenth of the weight: far above the rounding of bfloat16, so that the gate sees it
COPIES = 3  # of the inputs, used in turn


class Inputs(NamedTuple):
    x: Tensor  # (M, K)
    weight: Tensor  # (N, K)
    lora_A: Tensor | None  # (r, K)
    lora_B: Tensor | None  # (N, r)
    grad_y: Tensor  # (M, N)
    noise_scale: Tensor  # (N,) float32
    seed: Tensor  # 0-d int64

    @property
    def leaves(self) -> list[Tensor]:
        """What a training step differentiates: the weight is frozen."""
        return [t for t in (self.x, self.lora_A, self.lora_B) if t is not None]


class Problem:
    """Random inputs at the scale of a trained layer, in several copies to take turns with."""

    stream, samples = 0, 1  # of the noise

    def __init__(self, case: Case, device: str, copies: int = COPIES) -> None:
        self.case = case
        self.device = device
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.backward = case.mode == "forward+backward"
        self._generator = torch.Generator(device).manual_seed(1)
        self.inputs = [self._inputs(number) for number in range(copies)]

    def _inputs(self, number: int) -> Inputs:
        M, N, K, rank = self.case.M, self.case.N, self.case.K, self.case.rank
        weight = self._randn(N, K, K**-0.5)
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
        return Inputs(
            x=self._randn(M, K).requires_grad_(self.backward),
            weight=weight,
            lora_A=self._randn(rank, K, K**-0.5).requires_grad_(self.backward) if rank else None,
            lora_B=self._randn(N, rank, 0.1).requires_grad_(self.backward) if rank else None,
            grad_y=self._randn(M, N),
            noise_scale=norms * (SIGMA / math.sqrt(K)),
            seed=torch.tensor(0x5EED_0F_F1A7 + number, device=self.device),
        )

    def _randn(self, rows: int, columns: int, std: float = 1.0) -> Tensor:
        # In place, so that no temporary blurs the measurement of memory.
        out = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        return out.normal_(0, std, generator=self._generator)

    @functools.cached_property
    def writable_weights(self) -> list[Tensor]:
        """Clones for those who write to the weight."""
        return [i.weight.clone() for i in self.inputs]
