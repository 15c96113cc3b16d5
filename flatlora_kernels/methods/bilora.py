"""Bi-LoRA: a second low-rank pair climbs while the first descends, in one pass."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..train.attach import unwrapped
from ..train.state import tensors
from ..train.undo import undone
from .base import Adapter, Closure, Method, generator, mean_over_ranks


class BiLoRA(Method):
    """Bi-LoRA: an auxiliary pair models SAM's perturbation of the weight.

    ::

        y = x (W + s B1 A1 + s B2 A2)^T                      one op of rank r1 + r2
        A1, B1 <- step on dL/dA1, dL/dB1                     descent, by the optimiser
        A2, B2 <- step on -dL/dA2, -dL/dB2                   ascent, of the same backward
        c = sqrt(sum over all layers of ||B2 A2||_F^2)
        where c > rho:  A2, B2 <- sqrt(rho / c) A2, sqrt(rho / c) B2

    so that afterwards the norm of all B2 A2 together is at most rho. ``||B2 A2||_F^2`` is the sum of
    ``(B2^T B2) * (A2 A2^T)``, two r2 x r2 matrices; B2 A2 is never formed, and nothing is read back to the host.

    The ascent follows the optimiser's own rule at its learning rate: with plain steps beside AdamW, B2 would stay near
    zero. The auxiliary pair exists inside `step` only: it is no parameter of the model (no saved adapter holds it,
    weight decay and gradient clipping do not see it), and evaluation, also between steps, is without it. A2 starts
    Kaiming-uniform, drawn from a generator of its own, and B2 at zero. Ranks of a process group average its gradients.
    `lora_dropout` acts on it too.

    Args:
        rho: radius, > 0; the paper uses 0.05, and 0.1 for SuperGLUE and Qwen.
        auxiliary_rank: r2; default that of each layer's adapter. The paper's is 8, beside r1 = 8.
        ascent_lr: lr2; default, as in the paper, the learning rate of the optimiser's first group, at each step.
        ascent: makes the ascent's optimiser from a list of tensors, for instance
            ``lambda p: torch.optim.AdamW(p, 1e-4, weight_decay=0, maximize=True)``; default one like the optimiser,
            without weight decay.

    Source: Liu et al., ICLR 2026, arXiv 2508.19564, eq. (7) to (10) and algorithm 1; eq. (9) writes both steps as plain
    ones. The paper omits `s`; c is taken without it. It does not say how A2 and B2 start.
    """

    def __init__(
        self,
        *args: Any,
        rho: float = 0.05,
        auxiliary_rank: int | None = None,
        ascent_lr: float | None = None,
        ascent: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if not rho > 0:
            raise ValueError(f"rho: expected a number > 0, got {rho}")
        if auxiliary_rank is not None and auxiliary_rank < 1:
            raise ValueError(f"auxiliary_rank: expected an int >= 1, got {auxiliary_rank}")
        if ascent is not None and ascent_lr is not None:
            raise ValueError("ascent_lr: expected None where ascent is given, which has a rate of its own")
        self.rho, self.ascent_lr = rho, ascent_lr
        found = self._adapters(one_each=True)
        if len({id(a.layer) for a in found}) < len(found):
            raise ValueError("model: expected one active adapter in each layer for Bi-LoRA, got several")
        self._pairs = [
            (a.layer, *_auxiliary(a, auxiliary_rank, self.controller.value, index))
            for index, a in enumerate(found)
        ]
        self._ascent = _like(self.optimizer, self.auxiliary) if ascent is None else ascent(self.auxiliary)
        self._own_lr = ascent is not None
        for group in self._ascent.param_groups:
            if not group.get("maximize"):
                raise ValueError(
                    "ascent: expected an optimiser made with maximize=True, got one that descends"
                )

    @property
    def auxiliary(self) -> list[Tensor]:
        """A2 (r2, K) and B2 (N, r2) of each layer in turn."""
        return [t for _, A2, B2 in self._pairs for t in (A2, B2)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "auxiliary": [t.detach().clone() for t in self.auxiliary],
            "ascent": self._ascent.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        saved = tensors("state['auxiliary']", state["auxiliary"], self.auxiliary)
        self._ascent.load_state_dict(state["ascent"])  # refuses before it changes anything
        for tensor, value in zip(self.auxiliary, saved, strict=True):
            tensor.copy_(value)

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        with self._in_use():
            return super()._gradients(closures)

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        for tensor in self.auxiliary:
            tensor.grad = None

        def undo() -> None:
            for layer, _, _ in self._pairs:
                layer.__dict__.pop("auxiliary", None)

        with undone(undo):
            for layer, A2, B2 in self._pairs:
                layer.auxiliary = (A2, B2)
            yield

    def _update(self) -> None:
        if all(t.grad is None for t in self.auxiliary):
            raise RuntimeError("model: expected forward passes that use the auxiliary pairs, got none")
        super()._update()
        mean_over_ranks([t.grad for t in self.auxiliary if t.grad is not None])
        if not self._own_lr:
            lr = self.optimizer.param_groups[0]["lr"] if self.ascent_lr is None else self.ascent_lr
            self._ascent.param_groups[0]["lr"] = lr
        self._ascent.step()
        self._ascent.zero_grad()
        self._clip()

    @torch.no_grad()
    def _clip(self) -> None:
        squares = [((B2.t() @ B2) * (A2 @ A2.t())).sum() for _, A2, B2 in self._pairs]
        norm = torch.stack([s.to(squares[0].device) for s in squares]).sum().clamp(min=0).sqrt()
        factor = (self.rho / norm.clamp(min=self.rho)).sqrt()  # 1 where the norm is small enough
        for tensor in self.auxiliary:
            tensor.mul_(factor.to(tensor.device))


def _like(optimizer: Any, tensors: list[Tensor]) -> torch.optim.Optimizer:
    """An optimiser of the same kind and settings that ascends, without weight decay."""
    optimizer = unwrapped(optimizer)
    accepted = inspect.signature(type(optimizer).__init__).parameters
    if "maximize" not in accepted:
        raise ValueError(
            f"ascent: expected to be given, because {type(optimizer).__name__} has no maximize=True, got None"
        )
    settings = {name: value for name, value in optimizer.defaults.items() if name in accepted}
    if "weight_decay" in accepted:
        settings["weight_decay"] = 0.0
    make: Any = type(optimizer)
    return make(tensors, **{**settings, "maximize": True})


def _auxiliary(adapter: Adapter, rank: int | None, seed: int, index: int) -> tuple[Tensor, Tensor]:
    A, B = adapter.lora_A, adapter.lora_B
    rank = A.shape[0] if rank is None else rank
    rng = generator(A.device, seed, "bi-lora", index)
    A2 = torch.empty(rank, A.shape[1], dtype=A.dtype, device=A.device).uniform_(-1, 1, generator=rng)
    A2.mul_(math.sqrt(1 / A.shape[1]))  # as kaiming_uniform_ with a = sqrt(5)
    # Not new_zeros, which of a shard makes one.
    B2 = torch.zeros(B.shape[0], rank, dtype=B.dtype, device=B.device, requires_grad=True)
    return A2.requires_grad_(), B2
