"""SAM: the gradient at the worst point of a ball around the trained parameters, in two passes; on the adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Closure, Method, kept


class SAM(Method):
    """Sharpness-aware minimisation of everything that is trained.

    ::

        e_p = rho g_p / ||g||    ||g||^2 = sum over all parameters p of ||g_p||^2
        p <- step on the gradients at p + e_p

    Two passes over every micro-batch, the costly reference. The parameters are put back bit for bit before the step,
    and where a closure raises. Weight noise is off.

    Args:
        rho: radius, > 0; the paper's is 0.05 on CIFAR and ImageNet.

    Returns of `step`: the loss of the first pass, at the parameters themselves.

    Source: Foret et al., ICLR 2021, arXiv 2010.01412, eq. (2) and (3), with p = 2.
    """

    def __init__(self, *args: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(*args, **options)
        if not rho > 0:
            raise ValueError(f"rho: expected a number > 0, got {rho}")
        self.rho = rho

    def _perturbed(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        with self._noise(self.noise):
            loss = self._backward(closures)
            moved = list({id(p): p for p in self._perturbed() if p.grad is not None}.values())
            with kept(moved):
                self._ascend(moved)
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


class LoRASAM(SAM):
    """SAM on A and B alone: the gradient at the worst point of a ball around them, to first order.

    ::

        eps_A = rho gA / c,  eps_B = rho gB / c,   c = sqrt(sum over all layers of ||gA||_F^2 + ||gB||_F^2)
        A, B <- step on the gradients at (A + eps_A, B + eps_B)

    Parameters outside the adapters (a classifier) are not perturbed; they too take the gradient of the second pass.

    Args:
        rho: radius, > 0; the Bi-LoRA paper uses 0.01 and 0.05.

    Returns of `step`: the loss of the first pass, at (A, B).

    Source: `SAM`'s, applied to the adapter as the Bi-LoRA paper (arXiv 2508.19564) writes it for one layer in its
    eq. (3) and (4).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._adapters()

    def _perturbed(self) -> list[Tensor]:
        return [p for a in self._adapters() for p in (a.lora_A, a.lora_B)]
