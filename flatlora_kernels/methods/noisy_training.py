"""Training under random noise on the weights, and without: LoRA, Flat-LoRA, RWP, LPF-SGD, full fine-tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ..train.layer import NoisyLayer, instead_of_noise
from ..train.undo import undone
from .base import Closure, Method, bernoulli


class LoRA(Method):
    """Low-rank adaptation, no noise whatever the controller's sigma.

    ::

        y = x (W + s B A)^T        A, B <- step on dL/dA, dL/dB

    Source: Hu et al., ICLR 2022, arXiv 2106.09685, eq. (3).
    """


class FlatLoRA(Method):
    """Flat-LoRA: the gradient is taken at one draw of noise on the full weight, which then is dropped.

    ::

        W' = W + s B A        eps[n, k] ~ N(0, sigma(t)^2 / K * ||W'[n]||^2)
        A, B <- step on the gradients of L(W' + eps)

    One eps for all micro-batches of a step; sigma(t) is the controller's, whose "cosine" is the paper's schedule.

    Args:
        share: 0 < share <= 1. Below 1 each step draws noise in some layers alone: in each with this probability, in one
            at least. Tied layers go together. The paper has 1.

    Source: Li et al., ICML 2025, arXiv 2409.14396, eq. (7) to (9), and the authors' code for the schedule.
    """

    noise = True

    def __init__(self, *args: Any, share: float = 1.0, **options: Any) -> None:
        super().__init__(*args, **options)
        if not 0 < share <= 1:
            raise ValueError(f"share: expected 0 < share <= 1, got {share}")
        self.share = share

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        if self.share == 1:
            return super()._gradients(closures)
        weights = list({id(layer._base_parameter()): None for layer in self.layers})
        on = {weights[i] for i in bernoulli([self.share] * len(weights), self.controller, "flat-lora")}
        off = [layer for layer in self.layers if id(layer._base_parameter()) not in on]
        with instead_of_noise(off, _without_noise):
            return super()._gradients(closures)


def _without_noise(layer: NoisyLayer) -> dict[str, Any]:
    return {"strategy": layer.strategy, "noise_accum": layer.noise_accum, "backend": layer.backend}


class FullNoise(FlatLoRA):
    """Full fine-tuning under weight noise: Flat-LoRA's noise, and the weight (and bias) itself is trained.

    ::

        eps[n, k] ~ N(0, sigma(t)^2 / K * ||W[n]||^2)        W <- step on dL/dW (W + eps)

    The layers need ``train_weight=True``; with adapters these are trained too, as the optimiser says. Source: the
    objective E_eps L(W + eps) of Li et al., arXiv 2409.14396, without the low-rank restriction.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        frozen = [layer for layer in self.layers if not layer._base_parameter().requires_grad]
        if frozen:
            raise ValueError(
                f"model: expected layers made with train_weight=True, got {len(frozen)} whose weight is frozen"
            )


class RWP(Method):
    """Random weight perturbation by rows ("filters"), plain or mixed with the loss without noise.

    ::

        eps[n, k] ~ N(0, sigma(t)^2 ||W'[n]||^2)
        g = mix * grad L(W' + eps) + (1 - mix) * grad L(W')

    ``mix=1`` is RWP, one pass; below 1 it is m-RWP, two passes over each micro-batch (the paper gives the two terms
    batches of their own, to run in parallel). The controller needs ``norm="row"``. Only the layers' weights are
    perturbed; the authors' code also perturbs biases and all other parameters. ARWP's factor from past gradients is
    left out. The authors let sigma grow from std to ``(1 + inc) std`` with a cosine, std 0.001 and inc 10 in their
    script: ``NoiseController(sigma=0.001, schedule=lambda t: 1 + 10 * (1 - math.cos(math.pi * t / T)) / 2)``.

    Args:
        mix: 0 < mix <= 1, the paper's lambda, which is 0.5 in its experiments.

    Returns of `step`: ``mix`` times the loss under noise plus ``1 - mix`` times the loss without.

    Source: Li et al., arXiv 2211.11489 and TMLR 2024, arXiv 2404.00357; the weights of the two terms, the std and the
    schedule are those of the authors' code (nblt/mARWP).
    """

    noise = True

    def __init__(self, *args: Any, mix: float = 1.0, **options: Any) -> None:
        super().__init__(*args, **options)
        _needs_row_norm(self)
        if not 0 < mix <= 1:
            raise ValueError(f"mix: expected 0 < mix <= 1, got {mix}")
        self.mix = mix

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        loss = self._backward(closures, self.mix) * self.mix
        if self.mix < 1:
            with self._noise(False):
                loss = loss + self._backward(closures, 1 - self.mix) * (1 - self.mix)
        return loss


class LPFSGD(Method):
    """LPF-SGD: the mean gradient over M draws of noise, each on its own micro-batch.

    ::

        eps_j[n, k] ~ N(0, sigma(t)^2 ||W'[n]||^2)        g = 1/M sum_j grad L_j(W' + eps_j)

    M is the number of closures: closure j sees sample ``sample_offset + j * samples``. The controller needs
    ``norm="row"``, the layers a number of `samples`. Source: Bisla et al., AISTATS 2022, arXiv 2201.08025; splitting
    the batch among the draws is the authors' code's (devansh20la/LPF-SGD), which also perturbs biases and lets sigma
    grow by a cosine as RWP's does.
    """

    noise = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _needs_row_norm(self)
        counts = [layer.samples for layer in self.layers if isinstance(layer.samples, int)]
        if len(counts) < len(self.layers):
            raise ValueError("samples: expected an int in every layer for LPF-SGD, got 'batch'")
        self._stride = max(counts)

    @contextlib.contextmanager
    def _micro_batch(self, index: int) -> Iterator[None]:
        before = self.controller.sample_offset
        with undone(lambda: setattr(self.controller, "sample_offset", before)):
            self.controller.sample_offset = before + index * self._stride
            yield


def _needs_row_norm(method: Method) -> None:
    if method.controller.norm != "row":
        raise ValueError(
            f"noise_controller: expected norm='row' for {type(method).__name__}, got norm={method.controller.norm!r}"
        )
