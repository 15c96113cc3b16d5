"""MeZO: zeroth-order steps from two forward passes, with +eps z and -eps z drawn inside the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.shared.panel import slices
from ..backends.shared.workspace import workspace_limit
from ..op.functional import materialize_noise
from ..op.sharded import is_sharded
from ..train.layer import NoisyLayer, eval_mode, instead_of_noise
from .base import Closure, Method, kept, mean, mean_over_ranks


class _Trained(NamedTuple):
    matrix: Tensor  # a view of the parameter
    group: dict[str, Any]  # of the optimiser
    stream: int
    noise: str
    backend: str | None


class MeZO(Method):
    """MeZO: SPSA on the weights, no backward pass and no copy of the weights.

    ::

        z ~ N(0, 1)        g = (L(W + eps z) - L(W - eps z)) / (2 eps)
        W <- W - lr (g z + weight_decay W)

    Both losses are forward passes of the op: the same z as an antithetic pair, samples 0 and 1. The update draws z once
    more, a slice at a time; beyond the weights nothing of their size is ever allocated. One g for the whole model, each
    parameter with a z of its own. Parameters that the op does not perturb (biases, norms, adapters, embeddings) are
    moved in place, of which a copy is kept meanwhile, and come back bit for bit. The layers' weights are trained where
    they were made with ``train_weight=True``; one that another kind of module shares is perturbed in the layer only.

    lr and weight_decay are those of the parameter's group in the optimiser (the authors' code decays neither biases nor
    layer norms: give them a group of their own), which is ``torch.optim.SGD`` without momentum and takes no step of
    its own (schedulers and hooks see one). The model is in eval mode meanwhile, without dropout, as in the authors'
    code. Ranks of a process group average g. In 16 bits ``W + eps z`` is rounded: where eps is far below a weight's
    last bit, give the layers ``noise_accum="split"``. A loss in 16 bits may be the same on both sides: compute it
    in float32.

    Args:
        eps: size of the two-sided step, > 0; the paper's is 1e-3.

    Returns of `step`: ``(L(W + eps z) + L(W - eps z)) / 2``.

    Source: Malladi et al., NeurIPS 2023, arXiv 2305.17333, definition 1 and algorithm 1, and the authors' code.
    """

    def __init__(self, *args: Any, eps: float = 1e-3, **options: Any) -> None:
        super().__init__(*args, **options)
        if not eps > 0:
            raise ValueError(f"eps: expected a number > 0, got {eps}")
        if self.max_grad_norm is not None:
            raise ValueError(f"max_grad_norm: expected None for MeZO, got {self.max_grad_norm}")
        groups = self.optimizer.param_groups
        if not isinstance(self.optimizer, torch.optim.SGD) or any(g["momentum"] for g in groups):
            raise ValueError("optimizer: expected torch.optim.SGD without momentum for MeZO, got another")
        self.eps = eps
        trained = {id(p): (p, group) for group in groups for p in group["params"] if p.requires_grad}
        if not trained:
            raise ValueError("optimizer: expected parameters that require gradients, got none")
        if any(is_sharded(p) for p, _ in trained.values()):
            raise ValueError(
                "optimizer: expected tensors, which MeZO moves, got DTensors: shards of parameters"
            )
        # A mixture's weight is moved, as other parameters are.
        self._noisy = [
            layer
            for layer in self.layers
            if id(layer._base_parameter()) in trained and layer.stream_count == 1
        ]
        self._in_op = {}  # by weight: a tied one is updated once
        for layer in self._noisy:
            group = trained[id(layer._base_parameter())][1]
            matrix: Any = layer._weight_in_use()[0].detach()  # trains, so that it is no packed one
            self._in_op[id(layer._base_parameter())] = _Trained(
                matrix, group, layer.stream, layer.noise, layer.backend
            )
        stream = max((layer.stream + layer.stream_count for layer in self.layers), default=0)
        others = [found for key, found in trained.items() if key not in self._in_op]
        self._others = []
        for i, (p, group) in enumerate(others):
            matrix = p.detach().view(-1, p.shape[-1] if p.dim() > 1 else p.numel())
            self._others.append(_Trained(matrix, group, stream + i, "gaussian", None))

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        with torch.no_grad(), eval_mode(self.model):
            plus, minus = (self._loss_at(side, closures) for side in (0, 1))
        self._slope = (plus - minus) / (2 * self.eps)
        mean_over_ranks([self._slope])
        return (plus + minus) / 2

    def _loss_at(self, side: int, closures: Sequence[Closure]) -> Tensor:
        with (
            instead_of_noise(self._noisy, lambda layer: self._arguments(layer, side)),
            kept(t.matrix for t in self._others),
        ):
            for trained in self._others:
                self._move(trained, -self.eps if side else self.eps)
            return mean([self._loss(closure, index) for index, closure in enumerate(closures)])

    def _arguments(self, layer: NoisyLayer, side: int) -> dict[str, Any]:
        weight = layer._base_parameter()
        return {
            "seed": self.controller.tensor(weight.device),
            "stream": layer.stream,
            "noise": layer.noise,
            "noise_scale": torch.full((layer._weight_in_use()[0].shape[0],), self.eps, device=weight.device),
            "samples": 1,
            "sample_offset": side,
            "antithetic": True,
            "strategy": layer.strategy,
            "noise_accum": layer.noise_accum,
            "backend": layer.backend,
        }

    @torch.no_grad()
    def _update(self) -> None:
        for trained in (*self._in_op.values(), *self._others):
            matrix, group = trained.matrix, trained.group
            if group["weight_decay"]:
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
            self._move(trained, -group["lr"] * self._slope)
        del self._slope
        super()._update()  # no parameter has a gradient: only hooks and the controller move

    @torch.no_grad()
    def _move(self, trained: _Trained, factor: float | Tensor) -> None:
        """Adds ``factor z``, in slices of bounded size."""
        matrix = trained.matrix
        N, K = matrix.shape
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        if isinstance(factor, Tensor):
            factor = factor.to(matrix.device, dtype)
        for begin, end in slices(N, K, dtype.itemsize, workspace_limit(matrix)):
            z = materialize_noise(
                torch.ones(end - begin, device=matrix.device),
                K,
                seed=self.controller.tensor(matrix.device),
                stream=trained.stream,
                noise=trained.noise,
                row_offset=begin,
                layer_shape=(N, K),
                dtype=dtype,
                backend=trained.backend,
            )
            matrix[begin:end].add_(z.mul_(factor))
