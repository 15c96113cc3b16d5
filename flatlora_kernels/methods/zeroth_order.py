"""Training by forward passes alone, with noise drawn in the kernel: MeZO and evolution strategies."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.shared.panel import slices
from ..backends.shared.workspace import workspace_limit
from ..core.environment import setting
from ..op.functional import materialize_noise, perturb_weight
from ..op.sharded import is_sharded
from ..train.layer import NoisyLayer, eval_mode, instead_of_noise
from ..train.undo import undone
from .base import Closure, Method, kept, mean, mean_over_ranks, several_ranks

# Sums of many draws go slice by slice through a processor's cache. Smaller slices cost more in calls than in draws.
_CACHED = 4 << 20


class _Trained(NamedTuple):
    view: Callable[[], Tensor]
    group: dict[str, Any]  # of the optimiser
    stream: int
    noise: str
    backend: str | None

    @property
    def matrix(self) -> Tensor:
        """The parameter of now, (N, K)."""
        return self.view()


def _as_matrix(parameter: Tensor) -> Tensor:
    return parameter.detach().view(-1, parameter.shape[-1] if parameter.dim() > 1 else parameter.numel())


def _weight_of(layer: NoisyLayer) -> Tensor:
    weight: Any = layer._weight_in_use()[0]  # trains, so that it is no packed one
    return weight.detach()


class ZerothOrder(Method):
    """What methods without a backward pass share: losses where the weights are moved, and steps along the same draws.

    Each parameter has a z of its own. Weights of the layers are moved inside the op, where they were made with
    ``train_weight=True``; one that another kind of module shares is moved in the layer only. Parameters that the op
    does not perturb (biases, norms, adapters, embeddings) are moved in place, of which a copy is kept meanwhile, and
    come back bit for bit. A step draws z again, a slice at a time: beyond weights of more than 4 MiB nothing of
    their size is allocated.

    lr and weight_decay are those of the parameter's group in the optimiser, which is ``torch.optim.SGD`` without
    momentum and takes no step of its own (schedulers and hooks see one). The model is in eval mode meanwhile, without
    dropout. In 16 bits the moved weight is rounded: where the move is far below a weight's last bit, give the layers
    ``noise_accum="split"``. A loss in 16 bits may be the same for all: compute it in float32. Ranks of a process group
    average losses, and so have to draw alike: with a controller of rank 0.
    """

    antithetic = False  # whether samples 2 i and 2 i + 1 are one z with either sign

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        name = type(self).__name__
        if self.max_grad_norm is not None:
            raise ValueError(f"max_grad_norm: expected None for {name}, got {self.max_grad_norm}")
        groups = self.optimizer.param_groups
        kind = type(self.optimizer).__name__
        if not isinstance(self.optimizer, torch.optim.SGD) or any(
            g["momentum"] or g["maximize"] for g in groups
        ):
            got = f"{kind} with momentum or maximize" if kind == "SGD" else kind
            raise ValueError(
                f"optimizer: expected torch.optim.SGD without momentum that minimises, for {name}, got {got}"
            )
        if self.controller.rank and several_ranks():
            raise ValueError(
                f"noise_controller: expected rank=0 for {name}, whose ranks draw alike, got {self.controller.rank}"
            )
        trained = {id(p): (p, group) for group in groups for p in group["params"] if p.requires_grad}
        if not trained:
            raise ValueError("optimizer: expected parameters that require gradients, got none")
        if any(is_sharded(p) for p, _ in trained.values()):
            raise ValueError(
                f"optimizer: expected tensors, which {name} moves, got DTensors: shards of parameters"
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
            view = functools.partial(_weight_of, layer)
            self._in_op[id(layer._base_parameter())] = _Trained(
                view, group, layer.stream, layer.noise, layer.backend
            )
        stream = max((layer.stream + layer.stream_count for layer in self.layers), default=0)
        others = [found for key, found in trained.items() if key not in self._in_op]
        self._others = [
            _Trained(functools.partial(_as_matrix, p), group, stream + i, "gaussian", None)
            for i, (p, group) in enumerate(others)
        ]

    def _size(self) -> float:
        """Of the moves."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _moved(self, sample: int, together: int = 1) -> Iterator[None]:
        """Weights of the layers are at ``W + size z`` of so many samples, one after another in the rows of a batch."""
        with self._moved_in_layers(sample, together), kept(t.matrix for t in self._others):
            for trained in self._others:
                self._move(trained, torch.tensor([self._size()], dtype=torch.float64), [sample])
            yield

    def _moved_in_layers(self, sample: int, together: int) -> contextlib.AbstractContextManager[None]:
        return instead_of_noise(self._noisy, lambda layer: self._arguments(layer, sample, together))

    def _arguments(self, layer: NoisyLayer, sample: int, together: int) -> dict[str, Any]:
        weight = layer._base_parameter()
        return {
            "seed": self.controller.tensor(weight.device),
            "stream": layer.stream,
            "noise": layer.noise,
            "noise_scale": torch.full(
                (layer._weight_in_use()[0].shape[0],), self._size(), device=weight.device
            ),
            "samples": together,
            "sample_offset": sample,
            "antithetic": self.antithetic,
            "strategy": layer.strategy,
            "noise_accum": layer.noise_accum,
            "backend": layer.backend,
        }

    @torch.no_grad()
    def _descend(self, slopes: Tensor, samples: Sequence[int]) -> None:
        """``W <- W - lr (sum of slope z + weight_decay W)`` for every parameter.

        The signs of several slopes go to the host: noise has no negative scale, so that draws to subtract come first.
        """
        below = 0
        if len(samples) > 1:
            down = (slopes > 0).tolist()
            order, below = sorted(range(len(samples)), key=lambda i: not down[i]), sum(down)
            slopes, samples = slopes[order], [samples[i] for i in order]
        for every, move in ((self._in_op.values(), self._move_weight), (self._others, self._move)):
            for trained in every:
                group = trained.group
                if group["weight_decay"]:
                    trained.matrix.mul_(1 - group["lr"] * group["weight_decay"])
                move(trained, -group["lr"] * slopes, samples, below)
        super()._update()  # no parameter has a gradient: only hooks and the controller move

    def _move_weight(self, trained: _Trained, factors: Tensor, samples: Sequence[int], below: int) -> None:
        self._move(trained, factors, samples, below)

    @torch.no_grad()
    def _move(self, trained: _Trained, factors: Tensor, samples: Sequence[int], below: int = 0) -> None:
        """Adds the sum of ``factor z`` slice by slice, rounded once; of several `below` are < 0, and first."""
        matrix = trained.matrix
        N, K = matrix.shape
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        factors = factors.to(matrix.device, dtype)
        several = len(samples) > 1
        limit = workspace_limit(matrix)
        if several:
            limit //= 2
            if setting("FLATLORA_WORKSPACE") is None:
                limit = _CACHED if matrix.device.type == "cpu" else max(limit, _CACHED)
            largest = factors.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            sizes = (factors.abs() / largest).float()
        for begin, end in slices(N, K, dtype.itemsize, limit):
            draw: dict[str, Any] = {
                "seed": self.controller.tensor(matrix.device),
                "stream": trained.stream,
                "noise": trained.noise,
                "antithetic": self.antithetic,
                "row_offset": begin,
                "layer_shape": (N, K),
                "backend": trained.backend,
            }
            if not several:
                rows = torch.ones(end - begin, device=matrix.device)
                z = materialize_noise(rows, K, sample=samples[0], dtype=dtype, **draw)
                matrix[begin:end].add_(z.mul_(factors[0]))
                continue
            total = matrix.new_zeros(end - begin, K, dtype=dtype)
            spare = torch.empty_like(total)
            scales = sizes[:, None].expand(-1, end - begin).contiguous()
            for i, sample in enumerate(samples):
                if i == below:
                    total.neg_()
                perturb_weight(total, scales[i], sample=sample, out=spare, **draw)
                total, spare = spare, total
            matrix[begin:end].add_(total.mul_(-largest if below == len(samples) else largest))


class MeZO(ZerothOrder):
    """MeZO: SPSA on the weights, no backward pass and no copy of the weights.

    ::

        z ~ N(0, 1)        g = (L(W + eps z) - L(W - eps z)) / (2 eps)
        W <- W - lr (g z + weight_decay W)

    Both losses are forward passes of the op: the same z as an antithetic pair, samples 0 and 1. One g for the whole
    model; `ZerothOrder` says what is moved, and how. The authors' code decays neither biases nor layer norms: give them
    a group of their own. Ranks of a process group average g.

    Args:
        eps: size of the two-sided step, > 0; the paper's is 1e-3.

    Returns of `step`: ``(L(W + eps z) + L(W - eps z)) / 2``.

    Source: Malladi et al., NeurIPS 2023, arXiv 2305.17333, definition 1 and algorithm 1, and the authors' code.
    """

    antithetic = True

    def __init__(self, *args: Any, eps: float = 1e-3, **options: Any) -> None:
        super().__init__(*args, **options)
        if not eps > 0:
            raise ValueError(f"eps: expected a number > 0, got {eps}")
        self.eps = eps

    def _size(self) -> float:
        return self.eps

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        losses = []
        with torch.no_grad(), eval_mode(self.model):
            for side in (0, 1):
                with self._moved(side):
                    losses.append(
                        mean([self._loss(closure, index) for index, closure in enumerate(closures)])
                    )
        plus, minus = losses
        self._slope = (plus - minus) / (2 * self.eps)
        mean_over_ranks([self._slope])
        return (plus + minus) / 2

    def _update(self) -> None:
        slope = self._slope
        del self._slope
        self._descend(slope[None], [0])


class EvolutionStrategy(ZerothOrder):
    """Evolution strategies: a population of weights around W, and a step towards those of its members that do better.

    ::

        z_i ~ N(0, 1), i = 0 .. P - 1        L_i = L(W + sigma z_i)        Z_i = (L_i - mean L) / (std L + 1e-8)
        W <- W - lr (1/P sum_i Z_i z_i + weight_decay W)

    No backward pass and no copy of the weights. Member i is sample i of the step's seed, drawn inside the op. Each
    layer has draws of its own. The step adds all P to a slice of the weight in float32 and rounds once. (The authors'
    code seeds all layers alike, unless told otherwise: layers of one shape move alike.) The losses are all that ranks
    exchange: they average them. A member whose loss is not finite has no say. `ZerothOrder` says what is moved, and
    how.

    Args:
        sigma: size of the members' moves, > 0. The paper's is 1e-3, beside a learning rate of sigma / 2.
        population: P, >= 2; the paper's is 30.
        antithetic: members 2 i and 2 i + 1 are one draw with either sign, for an even population. The paper has none.
        together: so many members share a forward pass, one after another in the rows of the batch. Above 1 each closure
            is called with the number of members m, and returns their losses, (m,): of its batch, repeated m times
            (`torch.Tensor.repeat`). Only layers' weights can be trained then.

    Returns of `step`: the mean of the L_i.

    Source: Qiu et al., arXiv 2509.24372, algorithm 1 (1 / sigma is part of its learning rate), for a loss instead of a
    reward.
    """

    def __init__(
        self,
        *args: Any,
        sigma: float = 1e-3,
        population: int = 30,
        antithetic: bool = False,
        together: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if not sigma > 0:
            raise ValueError(f"sigma: expected a number > 0, got {sigma}")
        if not isinstance(population, int) or population < 2 or (antithetic and population % 2):
            expected = "an even int" if antithetic else "an int"
            raise ValueError(f"population: expected {expected} >= 2, got {population}")
        if not 1 <= together <= population:
            raise ValueError(f"together: expected 1 to the population, {population}, got {together}")
        if together > 1 and self._others:
            raise ValueError(
                f"together: expected 1 where more is trained than layers' weights, which are the same for all members;"
                f" got {together} and {len(self._others)} other parameters"
            )
        self.sigma, self.population = sigma, population
        self.antithetic, self.together = antithetic, together

    def _size(self) -> float:
        return self.sigma

    def _gradients(self, closures: Sequence[Callable[..., Tensor]]) -> Tensor:
        losses = []
        with torch.no_grad(), eval_mode(self.model):
            for first in range(0, self.population, self.together):
                together = min(self.together, self.population - first)
                with self._moved(first, together):
                    losses.append(self._of_members(closures, together))
        self._losses = torch.cat(losses)
        mean_over_ranks([self._losses])
        return self._losses.mean()

    def _of_members(self, closures: Sequence[Callable[..., Tensor]], together: int) -> Tensor:
        if self.together == 1:
            return mean([self._loss(closure, index) for index, closure in enumerate(closures)])[None]
        found = []
        for index, closure in enumerate(closures):
            losses = closure(together)
            if not isinstance(losses, Tensor) or losses.shape != (together,):
                got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
                raise ValueError(
                    f"closures[{index}]: expected to return the losses of {together} members, got {got}"
                )
            found.append(losses.to(torch.promote_types(losses.dtype, torch.float32)))
        return torch.stack(found).mean(0)

    def _update(self) -> None:
        losses = self._losses
        del self._losses
        finite = losses.isfinite()
        apart = (losses - losses[finite].mean()).masked_fill(~finite, 0)
        Z = apart / (apart.square().sum() / finite.sum()).sqrt().add(1e-8) / self.population
        Z = Z.masked_fill(~finite.any(), 0)
        if self.antithetic:
            self._descend(Z[::2] - Z[1::2], range(0, self.population, 2))
        else:
            self._descend(Z, range(self.population))


class EGGROLL(EvolutionStrategy):
    """Evolution strategies with moves of low rank: a population costs what adapters cost, and its step is one product.

    ::

        E_i = B_i A_i / sqrt(r),  A_i (r, K) and B_i (N, r) of N(0, 1)      L_i = L(W + sigma E_i)
        W <- W - lr (1/P sum_i Z_i E_i + weight_decay W)

    Z_i, `sigma`, `population`, `antithetic` and `together` are `EvolutionStrategy`'s. Only the layers' weights move by
    low rank, and their products are torch's, beside the op without noise; other parameters move as there. The sum of a
    step has rank P r: in 16 bits A and B are rounded, and the sum once more.

    Args:
        rank: r, >= 1; the paper's is 1.

    Returns of `step`: the mean of the L_i.

    Source: Sarkar et al., arXiv 2511.16652, algorithm 1 and eq. (6), which leaves 1 / sigma to the learning rate; the
    authors' code (ESHyperscale/HyperscaleES) multiplies by sigma and sqrt(P) on top, and has antithetic pairs always.
    """

    def __init__(self, *args: Any, rank: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank: expected an int >= 1, got {rank}")
        self.rank = rank
        of_layers = (layer.stream + layer.stream_count for layer in self.layers)
        self._first_stream = max((*of_layers, *(t.stream + 1 for t in self._others)))

    @contextlib.contextmanager
    def _moved_in_layers(self, sample: int, together: int) -> Iterator[None]:
        handles: list[Any] = []

        def undo() -> None:
            for handle in handles:
                handle.remove()

        with undone(undo):
            for layer in self._noisy:
                key = id(layer._base_parameter())
                hook = self._adding(self._in_op[key], range(sample, sample + together))
                handles.append(layer.register_forward_hook(hook))
            yield

    def _adding(self, trained: _Trained, samples: range) -> Callable[[Any, Any, Tensor], Tensor]:
        A, B = self._pairs(trained, samples)

        def hook(layer: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = inputs[0].to(y.dtype).reshape(len(samples), -1, A.shape[-1])
            u = x @ A.to(y.dtype).transpose(1, 2)
            scale = self._size() / math.sqrt(self.rank)
            return torch.baddbmm(
                y.reshape(len(samples), -1, B.shape[-1]), u, B.to(y.dtype), alpha=scale
            ).view_as(y)

        return hook

    def _pairs(self, trained: _Trained, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A (members, r, K) and B (members, r, N); of an antithetic pair A is the same, and B has either sign."""
        halves = [sample // 2 for sample in samples] if self.antithetic else samples
        N, K = trained.matrix.shape
        A = [self._drawn(trained, 0, K, sample, False) for sample in halves]
        B = [self._drawn(trained, 1, N, sample, self.antithetic) for sample in samples]
        return torch.stack(A), torch.stack(B)

    def _drawn(self, trained: _Trained, which: int, length: int, sample: int, antithetic: bool) -> Tensor:
        device = trained.matrix.device
        return materialize_noise(
            torch.ones(self.rank, device=device),
            length,
            seed=self.controller.tensor(device),
            stream=self._first_stream + 2 * trained.stream + which,
            sample=sample,
            antithetic=antithetic,
        )

    def _move_weight(self, trained: _Trained, factors: Tensor, samples: Sequence[int], below: int) -> None:
        matrix = trained.matrix
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        A, B = (t.to(dtype) for t in self._pairs(trained, samples))
        factors = factors.to(A)[:, None, None] / math.sqrt(self.rank)
        root = factors.abs().sqrt()  # to either of them: all of it would be too small for float16
        A, B = (t.flatten(0, 1).to(matrix.dtype) for t in (A * root, B * root * factors.sign()))
        matrix.addmm_(B.t(), A)
