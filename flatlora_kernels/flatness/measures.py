"""Expected increase of the loss, its top eigenvalue, and slices through it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.quantized import QuantizedWeight
from ..op.functional import perturb_weight
from ..op.sharded import is_sharded
from ..train.layer import NoisyLayer, eval_mode, instead_of_noise

Loss = Callable[[], Tensor]
SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2)


class Increase(NamedTuple):
    """Of the loss under noise of strength `sigma`: mean over draws and its standard error."""

    sigma: float
    mean: float
    standard_error: float
    draws: int  # antithetic pairs


class Eigenvalue(NamedTuple):
    """Of the Hessian: the one of largest magnitude; change: relative, in the last iteration."""

    value: float
    iterations: int
    change: float


class OnChips(NamedTuple):
    """The loss on so many noisy chips, see `methods.on_chips`: its mean, standard deviation and largest value."""

    sigma: float  # relative to the largest weight of a tensor
    mean: float
    deviation: float
    worst: float
    chips: int


class Flatness(NamedTuple):
    """What `flatness` returns; `str` of it is a small table. The last two are the command's."""

    loss: float
    increases: tuple[Increase, ...]
    eigenvalue: Eigenvalue | None = None
    on_chips: tuple[OnChips, ...] = ()
    intruders: int | None = None  # over all layers, see `intruder_dimensions`

    def __str__(self) -> str:
        lines = [f"loss {self.loss:.6g}", "  sigma   increase  standard error  pairs"]
        lines += [
            f"  {i.sigma:<7g} {i.mean:<9.3g} {i.standard_error:<15.2g} {i.draws}" for i in self.increases
        ]
        if self.eigenvalue is not None:
            e = self.eigenvalue
            lines.append(
                f"largest eigenvalue of the Hessian: {e.value:.4g}"
                f" ({e.iterations} iterations, last change {e.change:.1e})"
            )
        lines += [
            f"on {c.chips} chips whose weights are off by {c.sigma:g} of the largest: loss {c.mean:.4g}"
            f" (standard deviation {c.deviation:.2g}, worst {c.worst:.4g})"
            for c in self.on_chips
        ]
        if self.intruders is not None:
            lines.append(f"intruder dimensions: {self.intruders}")
        return "\n".join(lines)


def flatness(
    model: nn.Module,
    loss: Loss,
    *,
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 8,
    seed: int = 0,
    iterations: int = 20,
) -> Flatness:
    """The loss, its expected increase under weight noise, and the top eigenvalue of its Hessian.

    Args:
        model: with layers that draw weight noise (`FlatLoraLinear`, PEFT's after `apply_flat_lora`).
        loss: evaluates the model on fixed data, and returns a scalar. Give all that is compared the same data.
        sigmas, draws, seed: of `expected_increase`. iterations: of `top_eigenvalue`; 0 leaves it out.
    """
    increases = expected_increase(model, loss, sigmas, draws=draws, seed=seed)
    with eval_mode(model), torch.no_grad():
        value = _number(loss())
    eigenvalue = top_eigenvalue(model, loss, iterations=iterations, seed=seed) if iterations else None
    return Flatness(value, tuple(increases), eigenvalue)


def expected_increase(
    model: nn.Module, loss: Loss, sigmas: Sequence[float] = SIGMAS, *, draws: int = 8, seed: int = 0
) -> list[Increase]:
    """``E L(W' + eps) - L(W')`` for each sigma, ``eps[n] ~ N(0, sigma^2 / in_features ||W'[n]||^2)`` as in Flat-LoRA.

    Each draw is an antithetic pair, ``(L(W' + eps) + L(W' - eps)) / 2``, which takes the slope out of the variance;
    all sigmas see the same draws.

    Args:
        draws: pairs, >= 2; two forward passes each and sigma. seed: of the noise.
    """
    if draws < 2:
        raise ValueError(f"draws: expected an int >= 2, got {draws}")
    layers = layers_of(model)
    found = []
    with eval_mode(model), torch.no_grad():
        before = _number(loss())
        unit = {layer: _row_scale(layer) for layer in layers}
        for sigma in sigmas:
            values = []
            for draw in range(draws):
                pair = [
                    _loss_at(layers, loss, unit, sigma, seed, 2 * draw + side, antithetic=True)
                    for side in (0, 1)
                ]
                values.append(sum(pair) / 2 - before)
            mean = math.fsum(values) / draws
            variance = math.fsum((v - mean) ** 2 for v in values) / (draws - 1)
            found.append(Increase(float(sigma), mean, math.sqrt(variance / draws), draws))
    return found


def line(
    model: nn.Module, loss: Loss, steps: Sequence[float] = (-0.2, -0.1, 0.0, 0.1, 0.2), *, seed: int = 0
) -> list[float]:
    """The loss at ``W' + t d`` for each t, d random with rows of the norm of those of W' (filter-normalised).

    Source of the normalisation: Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018.
    """
    layers = layers_of(model)
    with eval_mode(model), torch.no_grad():
        unit = {layer: _row_scale(layer) for layer in layers}
        return [_loss_at(layers, loss, unit, abs(t), seed, int(t < 0), antithetic=True) for t in steps]


def plane(
    model: nn.Module, loss: Loss, steps: Sequence[float] = (-0.2, -0.1, 0.0, 0.1, 0.2), *, seed: int = 0
) -> list[list[float]]:
    """The loss at ``W' + s c + t d`` as ``[s][t]``, c and d two directions as in `line`.

    Unlike the rest of this module it makes, for each s, a copy of the layers' weights: the op adds one noise at a time.

    Raises:
        ValueError: a layer has a packed weight, which cannot be moved, or a shard of one.
    """
    layers = layers_of(model)
    for layer in layers:
        weight = layer._weight_in_use()[0]
        if is_sharded(weight):
            raise ValueError(
                f"model: expected whole weights, which plane moves, got a DTensor in {layer.flat_lora_name!r}; line and"
                " expected_increase take shards"
            )
        if isinstance(weight, QuantizedWeight):
            raise ValueError(
                f"model: expected dense weights, which plane moves, got one of format {weight.format!r} in"
                f" {layer.flat_lora_name!r}; line and flatness take packed ones"
            )
    rows = []
    with eval_mode(model), torch.no_grad():
        unit = {layer: _row_scale(layer) for layer in layers}
        for s in steps:
            with _moved(layers, unit, s, seed + 1):
                rows.append(
                    [_loss_at(layers, loss, unit, abs(t), seed, int(t < 0), antithetic=True) for t in steps]
                )
    return rows


def top_eigenvalue(
    model: nn.Module,
    loss: Loss,
    *,
    parameters: Sequence[Tensor] | None = None,
    iterations: int = 20,
    tolerance: float = 1e-3,
    step: float = 1e-3,
    seed: int = 0,
) -> Eigenvalue:
    """The eigenvalue of largest magnitude of the loss's Hessian, by power iteration.

    Products with the Hessian are central differences of gradients, because the op is differentiable once:
    ``H v = (g(p + h v) - g(p - h v)) / (2 h)``, two backward passes each.

    Args:
        parameters: to differentiate by; default those of `model` that require gradients: the adapters, or the full
            weights of layers made with ``train_weight=True``.
        iterations: at most. tolerance: stop where the value changes by less, relatively.
        step: h, relative to the norm of the parameters.

    Raises:
        ValueError: no parameter requires gradients, or one is a shard.
    """
    chosen = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    if not chosen:
        raise ValueError("parameters: expected some that require gradients, got none")
    if any(map(is_sharded, chosen)):
        raise ValueError(
            "parameters: expected tensors, which top_eigenvalue moves, got DTensors; flatness(..., iterations=0) and"
            " expected_increase take shards"
        )
    generators = {p.device: torch.Generator(p.device).manual_seed(seed) for p in chosen}
    wide = [torch.promote_types(p.dtype, torch.float32) for p in chosen]
    direction = [
        torch.randn(p.shape, generator=generators[p.device], device=p.device, dtype=dtype)
        for p, dtype in zip(chosen, wide, strict=True)
    ]
    start = [p.detach().clone() for p in chosen]
    h = step * max(_norm(start), 1.0)
    value, change, done = 0.0, math.inf, 0
    with eval_mode(model):
        try:
            for _ in range(iterations):
                length = _norm(direction)
                if not 0 < length < math.inf:
                    break
                direction = [v / length for v in direction]
                sides = []
                for sign in (h, -h):
                    with torch.no_grad():
                        for p, p0, v in zip(chosen, start, direction, strict=True):
                            p.copy_(p0 + sign * v)
                    gradients = torch.autograd.grad(loss(), chosen, allow_unused=True)
                    sides.append(
                        [
                            torch.zeros_like(v) if g is None else g.to(v.dtype)
                            for g, v in zip(gradients, direction, strict=True)
                        ]
                    )
                product = [(plus - minus) / (2 * h) for plus, minus in zip(*sides, strict=True)]
                before = value
                value = sum(
                    torch.dot(a.flatten().double(), b.flatten().double()).item()
                    for a, b in zip(product, direction, strict=True)
                )
                done += 1
                change = abs(value - before) / max(abs(value), 1e-30)
                direction = product
                if change < tolerance:
                    break
        finally:
            with torch.no_grad():
                for p, p0 in zip(chosen, start, strict=True):
                    p.copy_(p0)
    return Eigenvalue(value, done, change)


def layers_of(model: nn.Module) -> list[NoisyLayer]:
    found = [module for module in model.modules() if isinstance(module, NoisyLayer)]
    if not found:
        raise ValueError(
            "model: expected layers that draw weight noise, got none; see apply_flat_lora and FlatLoraLinear"
        )
    return found


def _row_scale(layer: NoisyLayer) -> Tensor:
    """std of eps per row at sigma = 1, of the weights of now."""
    return layer._unit_noise_scale(*layer._weight_in_use(), None)


def _loss_at(
    layers: list[NoisyLayer],
    loss: Loss,
    unit: dict[NoisyLayer, Tensor],
    sigma: float,
    seed: int,
    sample: int,
    antithetic: bool,
) -> float:
    def arguments(layer: NoisyLayer) -> dict[str, Any]:
        return {
            "seed": seed,
            "stream": layer.stream,
            "noise": "gaussian",
            "noise_scale": unit[layer] * sigma,
            "sample_offset": sample,
            "antithetic": antithetic,
            "strategy": layer.strategy,
            "noise_accum": layer.noise_accum,
            "backend": layer.backend,
        }

    with instead_of_noise(layers, arguments):
        return _number(loss())


@contextlib.contextmanager
def _moved(
    layers: list[NoisyLayer], unit: dict[NoisyLayer, Tensor], step: float, seed: int
) -> Iterator[None]:
    """The base weights hold ``W + step d``; afterwards the very same tensors as before are in their place."""
    parameters = {id(p): (p, layer) for layer in layers for p in (layer._base_parameter(),)}
    kept = {key: p.data for key, (p, _) in parameters.items()}
    try:
        for p, layer in parameters.values():
            weight = layer._weight_in_use()[0].detach()
            moved = _perturbed(layer, weight, unit[layer] * abs(step), seed, int(step < 0))
            p.data = moved if weight.shape == p.shape and weight.stride() == p.stride() else moved.mT
        yield
    finally:
        for key, (p, _) in parameters.items():
            p.data = kept[key]


def _perturbed(layer: NoisyLayer, weight: Any, scale: Tensor, seed: int, sample: int) -> Tensor:
    def one(weight: Tensor, scale: Tensor, stream: int) -> Tensor:
        return perturb_weight(
            weight, scale, seed=seed, stream=stream, sample=sample, antithetic=True, backend=layer.backend
        )

    if layer.stream_count == 1:
        return one(weight, scale, layer.stream)
    return torch.stack([one(weight[e], scale[e], layer.stream + e) for e in range(layer.stream_count)])


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def _number(value: Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
