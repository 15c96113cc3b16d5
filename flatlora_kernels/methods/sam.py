"""SAM, the gradient at the worst point of a ball, in two passes; and methods that do so for part of what is trained."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..op.sharded import is_sharded
from ..train.undo import undone
from .base import Closure, Method, bernoulli, kept, mean


class SAM(Method):
    """Sharpness-aware minimisation of everything that is trained.

    ::

        e_p = rho g_p / ||g||    ||g||^2 = sum over all parameters p of ||g_p||^2
        p <- step on the gradients at p + e_p

    Two passes over every micro-batch, the costly reference. The parameters are put back bit for bit before the step,
    and where a closure raises. Weight noise is off. Each pass draws dropout anew, and moves the running statistics of
    batch norms.

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
            loss = self._first_pass(closures)
            moved = list({id(p): p for p in self._perturbed() if p.grad is not None}.values())
            with kept(moved):
                self._ascend(moved)
                self._zero_grad()
                self._second_pass(closures)
        return loss

    def _first_pass(self, closures: Sequence[Closure]) -> Tensor:
        return self._backward(closures)

    def _second_pass(self, closures: Sequence[Closure]) -> None:
        self._backward(closures)

    @torch.no_grad()
    def _ascend(self, parameters: list[Tensor]) -> list[Tensor]:
        """Returns the norm of each one's gradient."""
        if not parameters:
            return []
        types = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
        pairs = list(zip(parameters, types, strict=True))
        norms = [torch.linalg.vector_norm(p.grad.to(t)).to(parameters[0].device) for p, t in pairs]
        scale = self._radius() / torch.linalg.vector_norm(torch.stack(norms)).clamp(min=1e-12)
        for p, t in pairs:
            p.add_(p.grad.to(t) * scale.to(p.device))
        return norms

    def _radius(self) -> float:
        return self.rho


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


class ESAM(SAM):
    """Efficient SAM: a random part of the parameters is moved, and the samples that mind most give the gradient.

    ::

        m_p ~ Bernoulli(beta) for each parameter p        e_p = rho / beta g_p / ||g over the chosen||, where m_p = 1
        d_i = l_i(p + e) - l_i(p) for each sample i of a micro-batch
        p <- step on the gradients at p + e of the mean loss of the gamma n samples with the largest d

    The first pass computes all gradients, chosen or not; with adapters those of the others cost little. A forward pass
    without gradients finds the samples, and the second pass has these alone: 1 + 1/3 + gamma passes instead of SAM's 2.
    So with gamma below 1 a closure takes an argument, ``rows``, and returns a loss for each sample, (n,): all of its
    micro-batch for None, otherwise those of that index, an int64 tensor.

    Args:
        rho: radius, > 0.
        beta: 0 < beta <= 1; the authors' commands have 0.5 or 0.6.
        gamma: 0 < gamma <= 1; theirs have 0.5. With 1 closures are as everywhere.

    Returns of `step`: the mean loss of the first pass.

    Source: Du et al., ICLR 2022, arXiv 2110.03141 (abstract), and the authors' code (dydjw9/Efficient_SAM), which
    chooses tensors and divides by beta and by the norm over the chosen. It keeps one sample fewer than gamma n, and
    chooses all tensors in the first step.
    """

    def __init__(
        self, *args: Any, rho: float = 0.05, beta: float = 0.5, gamma: float = 0.5, **options: Any
    ) -> None:
        super().__init__(*args, rho=rho, **options)
        for name, share in (("beta", beta), ("gamma", gamma)):
            if not 0 < share <= 1:
                raise ValueError(f"{name}: expected 0 < {name} <= 1, got {share}")
        self.beta, self.gamma = beta, gamma

    def _radius(self) -> float:
        return self.rho / self.beta

    def _perturbed(self) -> list[Tensor]:
        every = [p for p in super()._perturbed() if p.grad is not None]
        return [every[i] for i in bernoulli([self.beta] * len(every), self.controller, "esam")]

    def _first_pass(self, closures: Sequence[Callable[..., Tensor]]) -> Tensor:
        if self.gamma == 1:
            return super()._first_pass(closures)
        self._before = []
        for index, closure in enumerate(closures):
            losses = _of_samples(closure(None), index)
            self._backward_of(losses, index, len(closures))
            self._before.append(losses.detach())
        return mean([losses.mean() for losses in self._before])

    @staticmethod
    def _backward_of(losses: Tensor, index: int, count: int) -> None:
        if not losses.requires_grad:
            raise ValueError(f"closures[{index}]: expected losses with a gradient, got some without")
        (losses.mean() / count).backward()

    def _second_pass(self, closures: Sequence[Callable[..., Tensor]]) -> None:
        if self.gamma == 1:
            return super()._second_pass(closures)
        for index, (closure, before) in enumerate(zip(closures, self._before, strict=True)):
            with torch.no_grad():
                rise = _of_samples(closure(None), index) - before
            rows = rise.topk(max(1, int(self.gamma * len(rise)))).indices
            self._backward_of(_of_samples(closure(rows), index), index, len(closures))
        del self._before


class SLSAM(SAM):
    """Sparse-layer SAM: each step samples parameters; only these are moved, take gradients and are trained.

    ::

        S = {i: u_i < p_i}, u_i uniform        e_i = rho g_i / ||g over S||, i in S
        p_i <- p_i exp(-rate / p_i (max over j in S of (||g_j|| / p_j)^2 - (||g_i|| / p_i)^2)), i in S
        p scaled to the sum share * n, with no p_i above 1

    The ps are a bandit's, which favours large gradients. What is not in S has no gradient and is left alone by the
    optimiser: no weight decay, moments as they were. A step is spared the gradients of these, and the backward pass
    below the lowest layer of S. The norms of the gradients go to the host once a step; where one is not finite, the ps
    stay. All ranks sample alike, and need the same gradients: DistributedDataParallel with
    ``find_unused_parameters=True``. If a batch uses nothing of S (experts, heads of other tasks), its loss has no
    gradient: an error.

    Args:
        rho: radius, > 0; the authors' commands have 0.01.
        share: 0 < share <= 1, mean of the p_i; the authors' commands have 0.2.
        rate: of the bandit, > 0.

    Returns of `step`: the loss of the first pass.

    Source: Cheng et al., arXiv 2602.09395 (abstract), and the authors' code (chengyif/SL-SAM), where a "layer" is one
    tensor of the optimiser, and no gradient is divided by p.
    """

    def __init__(
        self, *args: Any, rho: float = 0.05, share: float = 0.5, rate: float = 0.001, **options: Any
    ) -> None:
        super().__init__(*args, rho=rho, **options)
        if not 0 < share <= 1:
            raise ValueError(f"share: expected 0 < share <= 1, got {share}")
        if not rate > 0:
            raise ValueError(f"rate: expected a number > 0, got {rate}")
        self.share, self.rate = share, rate
        self._trained = list({id(p): p for p in self._perturbed() if p.requires_grad}.values())
        if not self._trained:
            raise ValueError("optimizer: expected parameters that require gradients, got none")
        if any(is_sharded(p) for p in self._trained):
            raise ValueError("optimizer: expected tensors for SL-SAM, got DTensors: shards of parameters")
        self.probabilities = [share] * len(self._trained)

    def state_dict(self) -> dict[str, Any]:
        return {"probabilities": list(self.probabilities)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        saved, count = state["probabilities"], len(self._trained)
        if (
            not isinstance(saved, list)
            or len(saved) != count
            or not all(isinstance(p, float) and 0 < p <= 1 for p in saved)
        ):
            raise ValueError(f"state['probabilities']: expected {count} numbers, 0 < p <= 1, got {saved!r}")
        self.probabilities = list(saved)

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        live = [i for i, p in enumerate(self._trained) if p.requires_grad]
        drawn = bernoulli([self.probabilities[i] for i in live], self.controller, "sl-sam")
        self._sampled = [live[i] for i in drawn]
        self._norms: dict[int, Tensor] = {}
        with self._only(live, set(self._sampled)):
            return super()._gradients(closures)

    @contextlib.contextmanager
    def _only(self, live: list[int], sampled: set[int]) -> Iterator[None]:
        def undo() -> None:
            for i in live:
                self._trained[i].requires_grad_(True)

        with undone(undo):
            for i in live:
                self._trained[i].requires_grad_(i in sampled)
            yield

    def _ascend(self, parameters: list[Tensor]) -> list[Tensor]:
        norms = super()._ascend(parameters)
        self._norms = {id(p): norm for p, norm in zip(parameters, norms, strict=True)}
        return norms

    def _update(self) -> None:
        found = {i: self._norms.get(id(self._trained[i])) for i in self._sampled}
        found = {i: norm for i, norm in found.items() if norm is not None}
        del self._norms, self._sampled
        norms = torch.stack(list(found.values())).tolist() if found else []  # type: ignore[arg-type]
        super()._update()
        if norms and all(map(math.isfinite, norms)):
            self._learn(dict(zip(found, norms, strict=True)))

    def _learn(self, norms: dict[int, float]) -> None:
        p = self.probabilities
        ratios = {i: norm / p[i] for i, norm in norms.items()}
        largest = max(ratios.values())
        moved = list(p)
        for i, ratio in ratios.items():
            moved[i] = p[i] * math.exp(-self.rate / p[i] * (largest**2 - ratio**2))
        self.probabilities = _to_sum(moved, self.share * len(p))


def _of_samples(losses: Any, index: int) -> Tensor:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not len(losses):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"closures[{index}]: expected to return a loss for each sample, (n,), got {got}")
    return losses


def _to_sum(values: list[float], total: float) -> list[float]:
    """Scaled to that sum where none is above 1: such a one is 1, and the others share what is left; none below 1e-8."""
    scaled, rest = [1.0] * len(values), sum(values)
    for i in sorted(range(len(values)), key=values.__getitem__, reverse=True):
        if values[i] * total >= rest:
            total, rest = total - 1, rest - values[i]
            continue
        scaled[i] = max(values[i] * total / max(rest, 1e-5), 1e-8)
    return scaled
