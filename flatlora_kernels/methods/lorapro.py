"""LoRA-Pro: gradients of A and B adjusted so that the step on the weight is as near as can be to the full gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Adapter, Method

_DAMPING = 1e-8  # the authors'


class LoRAPro(Method):
    """LoRA-Pro, with the layers' noise where the controller's sigma is above 0, as Flat-LoRA draws it.

    ::

        dW = s B gA + s gB A is the nearest to dL/dW, G, that a step on A and B can make:
        gA = 1/s^2 (B^T B)^-1 hA + X A
        gB = 1/s^2 (I - B (B^T B)^-1 B^T) hB (A A^T)^-1 - B X      hA = s B^T G, hB = s G A^T, LoRA's gradients
        (B^T B) X + X (A A^T) = -1/s^2 (B^T B)^-1 hA A^T           of all X that with gA, gB nearest to hA, hB
        A, B <- step on gA, gB

    G itself is never formed. Inverses are in float64, by eigenvectors of r x r matrices, and damped by 1e-8, so that B
    = 0, where training begins, is no special case. The optimiser sees gA and gB; with AdamW this is the authors'
    "efficient" variant, not the one whose moments have the weight's size. Gradients are clipped after the adjustment.

    Returns of `step`: the loss at which the gradient was taken.

    Source: Wang et al., ICLR 2025, arXiv 2407.18242 (abstract), and the authors' code (mrflogs/LoRA-Pro), which takes s
    for alpha / r = 2.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.noise = self.controller.target_sigma > 0
        for a in self._adapters(one_each=True):
            if not (a.lora_A.requires_grad and a.lora_B.requires_grad):
                raise ValueError(
                    "model: expected A and B trained together for LoRA-Pro, got one of them frozen"
                )

    def _update(self) -> None:
        for adapter in self._adapters(one_each=True):
            if adapter.lora_A.grad is not None and adapter.lora_B.grad is not None:
                adjust(adapter)
        super()._update()


@torch.no_grad()
def adjust(adapter: Adapter) -> None:
    """Replaces the gradients of a pair by LoRA-Pro's."""
    A, B, s = adapter.lora_A.double(), adapter.lora_B.double(), adapter.scaling
    hA, hB = adapter.lora_A.grad.double() / s**2, adapter.lora_B.grad.double() / s**2
    (b, Q), (a, P) = torch.linalg.eigh(B.t() @ B), torch.linalg.eigh(A @ A.t())
    of_b, of_a = _inverse(b), _inverse(a)
    hA = Q @ (of_b[:, None] * (Q.t() @ hA))
    hB = hB - B @ (Q @ (of_b[:, None] * (Q.t() @ (B.t() @ hB))))
    hB = (hB @ P * of_a) @ P.t()
    X = Q @ (-(Q.t() @ hA @ A.t() @ P) * _inverse(b[:, None] + a)) @ P.t()
    adapter.lora_A.grad.copy_(hA + X @ A)
    adapter.lora_B.grad.copy_(hB - B @ X)


def _inverse(eigenvalues: Tensor) -> Tensor:
    return 1 / (eigenvalues.clamp(min=0) + _DAMPING)
