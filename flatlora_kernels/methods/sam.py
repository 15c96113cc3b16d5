"""LoRA-SAM: sharpness-aware minimisation of the adapter's parameters, in two passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Closure, Method, kept


class LoRASAM(Method):
    """SAM on A and B: the gradient at the worst point of a ball around them, to first order.

    ::

        eps_A = rho gA / c,  eps_B = rho gB / c,   c = sqrt(sum over all layers of ||gA||_F^2 + ||gB||_F^2)
        A, B <- step on the gradients at (A + eps_A, B + eps_B)

    Two passes over every micro-batch, the costly reference. A and B are put back bit for bit before the step, and where
    a closure raises. Parameters outside the adapters (a classifier) are not perturbed; they too take the gradient of
    the second pass.

    Args:
        rho: radius, > 0; the Bi-LoRA paper uses 0.01 and 0.05.

    Returns of `step`: the loss of the first pass, at (A, B).

    Source: Foret et al., SAM, ICLR 2021, arXiv 2010.01412, eq. (2) and (3), applied to the adapter as the Bi-LoRA paper
    (arXiv 2508.19564) writes it for one layer in its eq. (3) and (4).
    """

    def __init__(self, *args: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(*args, **options)
        if not rho > 0:
            raise ValueError(f"rho: expected a number > 0, got {rho}")
        self.rho = rho
        self._adapters()

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        with self._noise(self.noise):
            loss = self._backward(closures)
            moved = {id(p): p for a in self._adapters() for p in (a.lora_A, a.lora_B) if p.grad is not None}
            with kept(moved.values()):
                self._ascend(list(moved.values()))
                self._zero_grad()
                self._backward(closures)
        return loss

    @torch.no_grad()
    def _ascend(self, parameters: list[Tensor]) -> None:
        if not parameters:
            return
        grads = [p.grad.to(torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        norms = [torch.linalg.vector_norm(g).to(grads[0].device) for g in grads]
        scale = self.rho / torch.linalg.vector_norm(torch.stack(norms)).clamp(min=1e-12)
        for p, g in zip(parameters, grads, strict=True):
            p.add_(g * scale.to(p.device))
