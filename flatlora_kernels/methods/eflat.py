"""EFlat-LoRA: SAM's step in the full weight, carried over to B, from a moving average: one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..train.state import tensors
from .base import Adapter, Closure, Method, kept


class EFlatLoRA(Method):
    """EFlat-LoRA (EFMLoRA in its later versions): an ascent in the full weight, transferred to B.

    ::

        A, B <- step on the gradients gA, gB at (A, B + E)
        G = 1/2 (gB (A^T)^+ + ((B + E)^T)^+ gA) / s          estimate of dL/dW from gB = s G A^T, gA = s (B + E)^T G
        eps_W = rho G / ||G||_F                              per layer
        E <- (1 - beta) E + beta eps_W A^+ / s               since s (eps_W A^+ / s) A is eps_W in the rows of A

    The perturbation of this step is the average of the earlier ones, so that one pass is enough. The first step is at E
    = 0, and leaves ``E = eps_W A^+ / s``. G has rank 2r and is never formed: with ``U = gB (A A^T)^+ / s`` and ``V
    = ((B + E)^T (B + E))^+ gA / s`` it is ``1/2 (U A + (B + E) V)``, and its norm and its product with A^+ need r x
    r matrices only. B is put back bit for bit before the step, and where a closure raises.

    Args:
        rho: radius in the full weight of each layer, > 0. The paper uses 0.05 to 0.2, and lets it fall in the course of
            training: it may be assigned.
        beta: weight of the newest perturbation, 0 < beta <= 1.

    Returns of `step`: the loss at (A, B + E).

    Source: Deng et al., arXiv 2508.00522 (version 3), eq. (12), (15) and (18) and algorithm 2. "sign(g) g / ||g||" in
    its eq. (13) is read as g / ||g||, as in SAM and in the paper's proofs; the default beta is from public code,
    the text at hand lacks the tables. Pseudo-inverses drop singular values below max(rows, columns) machine
    epsilons of the largest, as `torch.linalg.pinv`.
    """

    def __init__(self, *args: Any, rho: float = 0.05, beta: float = 0.9, **options: Any) -> None:
        super().__init__(*args, **options)
        if not rho > 0:
            raise ValueError(f"rho: expected a number > 0, got {rho}")
        if not 0 < beta <= 1:
            raise ValueError(f"beta: expected 0 < beta <= 1, got {beta}")
        self.rho, self.beta = rho, beta
        every = self._adapters(one_each=True)
        self._pairs = [a for a in every if a.lora_A.requires_grad and a.lora_B.requires_grad]
        if not self._pairs:
            raise ValueError("model: expected adapters of which A and B are trained, got none")
        self.perturbation = [
            torch.zeros_like(a.lora_B, requires_grad=False) for a in self._pairs
        ]  # E, (N, r)
        self._begun = False

    def state_dict(self) -> dict[str, Any]:
        return {"perturbation": [E.clone() for E in self.perturbation], "begun": self._begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        saved = tensors("state['perturbation']", state["perturbation"], self.perturbation)
        if not isinstance(state["begun"], bool):
            raise TypeError(f"state['begun']: expected a bool, got {type(state['begun']).__name__}")
        for E, value in zip(self.perturbation, saved, strict=True):
            E.copy_(value)
        self._begun = state["begun"]

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        with self._noise(self.noise), kept(a.lora_B for a in self._pairs):
            with torch.no_grad():
                for a, E in zip(self._pairs, self.perturbation, strict=True):
                    a.lora_B.add_(E)
            loss = self._backward(closures)
            self._next = [self._estimate(a) for a in self._pairs]
        return loss

    def _update(self) -> None:
        super()._update()
        for E, estimate in zip(self.perturbation, self._next, strict=True):
            if estimate is not None:
                E.lerp_(estimate, self.beta if self._begun else 1.0)
        self._begun = True
        del self._next

    @torch.no_grad()
    def _estimate(self, adapter: Adapter) -> Tensor | None:
        """``eps_W A^+ / s``, (N, r)."""
        if adapter.lora_A.grad is None or adapter.lora_B.grad is None:
            return None
        A, B, gA, gB = (
            t.detach().double()
            for t in (adapter.lora_A, adapter.lora_B, adapter.lora_A.grad, adapter.lora_B.grad)
        )
        s = adapter.scaling
        eps = torch.finfo(adapter.lora_A.dtype).eps
        A_gram = A @ A.t()
        A_inverse, B_inverse = _pinv(A_gram, max(A.shape) * eps), _pinv(B.t() @ B, max(B.shape) * eps)
        U, V = gB @ A_inverse / s, B_inverse @ gA / s  # G = (U A + B V) / 2
        left, right = torch.cat((U, B), 1), torch.cat((A, V))
        norm = ((left.t() @ left) * (right @ right.t())).sum().clamp(min=0).sqrt() / 2
        transferred = (U @ A_gram + B @ (V @ A.t())) @ A_inverse / 2  # G A^+
        return (transferred * (self.rho / (s * norm.clamp(min=1e-30)))).to(adapter.lora_B.dtype)


def _pinv(gram: Tensor, cut: float) -> Tensor:
    """``(X X^T)^+`` without the singular values of X below `cut` of its largest, of which those of the Gram matrix are
    the squares."""
    return torch.linalg.pinv(gram, rtol=max(cut**2, 1e-14), hermitian=True)
