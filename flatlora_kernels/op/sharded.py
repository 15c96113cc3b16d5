"""The op on DTensors: each rank computes its part of the product with its part of the whole weight's noise.

Of the weight's placement in a dimension of the mesh follow those of everything else, and what is left of each sum:

    weight       x              lora_A       lora_B       y           what only a sum over ranks makes whole
    Shard(0)     Replicate      Replicate    Shard(0)     Shard(-1)   dX, dA
    Shard(1)     Shard(-1)      Shard(1)     Replicate    Partial     y, dB; bias is added by the first rank
    Replicate    any of rows    Replicate    Replicate    as x        dW, dA, dB, dbias where rows are sharded

DTensor does all that is communicated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def is_sharded(value: Any) -> bool:
    """Whether `value` is a DTensor, which need not be imported for that."""
    return hasattr(value, "device_mesh")


class _Layout(NamedTuple):
    """Placements in one dimension of the mesh; `d`... are those of the gradients."""

    x: Any
    lora_A: Any
    lora_B: Any
    bias: Any
    y: Any
    dx: Any
    dW: Any
    dA: Any
    dB: Any
    dbias: Any


def linear(
    local: Callable[..., Tensor],
    x: Any,
    weight: Any,
    lora_A: Any,
    lora_B: Any,
    bias: Any,
    lora_x: Any,
    noise_scale: Tensor | None,
    samples: int,
    sample_offset: int,
    **options: Any,
) -> Tensor:
    """`fused_flat_lora_linear` of DTensors, (..., N).

    Args:
        local: `fused_flat_lora_linear` itself, for what a rank holds.
        noise_scale: (N,) of the whole layer, a tensor on each rank.

    Raises:
        TypeError, ValueError: tensors beside DTensors, or placements and meshes that do not fit.
    """
    from torch.distributed.tensor import DTensor

    for name, value in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        _check(name, value, weight if is_sharded(weight) else x)
    if lora_x is not None:
        _check("lora_x", lora_x, weight)
    if options["row_offset"] or options["col_offset"] or options["layer_shape"] is not None:
        raise ValueError(
            "row_offset, col_offset, layer_shape: expected 0, 0 and None beside a DTensor, which tells where its shard"
            f" lies, got {options['row_offset']}, {options['col_offset']} and {options['layer_shape']}"
        )
    mesh, (N, K) = weight.device_mesh, weight.shape
    layouts = [_layout(w, own, x.dim() - 1) for w, own in zip(weight.placements, x.placements, strict=True)]
    (first_row, rows), (first_column, _) = part_of(weight)
    place = _Layout(*zip(*layouts, strict=True))

    def here(value: Any, placements: Sequence[Any], grads: Sequence[Any]) -> Any:
        # Through redistribute, also where nothing moves: its backward adds up what the ranks have.
        return None if value is None else value.redistribute(mesh, placements).to_local(grad_placements=grads)

    x = x.redistribute(mesh, place.x)
    samples, sample_offset = _samples(x, samples, sample_offset)
    own_bias = here(bias, place.bias, place.dbias)
    if own_bias is not None and any(
        w.is_shard(1) and mesh.get_local_rank(dim) for dim, w in enumerate(weight.placements)
    ):
        # Where it trains, every rank takes part in its gradient's sum.
        own_bias = own_bias * 0 if bias.requires_grad else None
    if noise_scale is not None:
        if isinstance(noise_scale, DTensor):
            noise_scale = noise_scale.full_tensor()
        if noise_scale.shape != (N,):
            raise ValueError(
                f"noise_scale: expected the whole layer's, of shape {(N,)}, got shape {tuple(noise_scale.shape)}"
            )
        noise_scale = noise_scale[first_row : first_row + rows]
    options.update(row_offset=first_row, col_offset=first_column, layer_shape=(N, K))
    y = local(
        x.to_local(grad_placements=place.dx),
        here(weight, weight.placements, place.dW),
        here(lora_A, place.lora_A, place.dA),
        here(lora_B, place.lora_B, place.dB),
        own_bias,
        lora_x=here(lora_x, place.x, place.dx),
        noise_scale=noise_scale,
        samples=samples,
        sample_offset=sample_offset,
        **options,
    )
    shape = torch.Size((*x.shape[:-1], N))
    whole: Tensor = DTensor.from_local(y, mesh, place.y, run_check=False, shape=shape, stride=_strides(shape))
    return whole


def row_sq_norms(local: Callable[..., Tensor], weight: Any, lora_A: Any, lora_B: Any) -> Tensor:
    """Squared row norms of the whole ``W + scaling B A``, (N,), the same on every rank.

    Each rank measures its shard. Of the adapter travels what others hold, of the weight nothing but N sums.

    Args:
        local: from weight, lora_A and lora_B of a rank to their squared row norms.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = weight.device_mesh
    for name, value in (("lora_A", lora_A), ("lora_B", lora_B)):
        _check(name, value, weight)
    if lora_A is not None:
        columns = [w if w.is_shard(1) else Replicate() for w in weight.placements]
        # FSDP cuts its rows once more than tensor parallelism has, and each cuts lora_B as it cuts weight.
        own = [w if _cuts_rows(w) else Replicate() for w in weight.placements]
        lora_A = lora_A.redistribute(mesh, columns).to_local()
        lora_B = lora_B.redistribute(mesh, own).to_local()
    norms = local(weight.to_local(), lora_A, lora_B)
    placements = [
        Partial() if w.is_shard(1) else w if _cuts_rows(w) else Replicate() for w in weight.placements
    ]
    shape = torch.Size((weight.shape[0],))
    whole: Tensor = DTensor.from_local(
        norms, mesh, placements, run_check=False, shape=shape, stride=(1,)
    ).full_tensor()
    return whole


def of_own_experts(local: Callable[..., Tensor], weight: Any, lora_A: Any, lora_B: Any) -> Tensor:
    """(E, N) of a mixture (E, N, K) whose experts are shared out, a tensor of all of them on each rank.

    Args:
        local: from weight, lora_A and lora_B of some experts to their (e, N).
        lora_A, lora_B: (E, r, K) and (E, N, r) of all experts, tensors.
    """
    from torch.distributed.tensor import DTensor

    if not all(w.is_replicate() or type(w).__name__ == "Shard" and w.dim == 0 for w in weight.placements):
        raise ValueError(
            f"weight: expected whole experts, Replicate or Shard(0), got {', '.join(map(str, weight.placements))}"
        )
    mesh, (E, N) = weight.device_mesh, weight.shape[:2]
    first, count = 0, E
    for dim, placement in enumerate(weight.placements):
        if placement.is_shard():
            first, count = _cut(first, count, mesh.size(dim), mesh.get_local_rank(dim))
    own = slice(first, first + count)
    if count:
        found = local(weight.to_local(), *(None if t is None else t[own] for t in (lora_A, lora_B)))
    else:
        found = torch.empty(0, N, dtype=torch.float32, device=weight.device)
    whole: Tensor = DTensor.from_local(
        found, mesh, weight.placements, run_check=False, shape=torch.Size((E, N)), stride=(N, 1)
    ).full_tensor()
    return whole


def part_of(weight: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first, size) of the rows of a DTensor that this rank holds, and of its columns."""
    parts = [(0, size) for size in weight.shape]
    for dim, placement in enumerate(weight.placements):
        if placement.is_replicate():
            continue
        if not (placement.is_shard(0) or placement.is_shard(1)) or type(placement).__name__ != "Shard":
            raise ValueError(
                f"weight: expected the placements Replicate, Shard(0) and Shard(1), got {placement} in dimension {dim}"
                " of the mesh"
            )
        first, size = parts[placement.dim]
        chunk = -(-size // weight.device_mesh.size(dim))
        if placement.dim and chunk % 8 and chunk < size:
            raise ValueError(
                f"weight: expected columns cut at multiples of 8, because noise comes in groups of 8, got {size}"
                f" columns for {weight.device_mesh.size(dim)} ranks, cut at {chunk}"
            )
        parts[placement.dim] = _cut(
            first, size, weight.device_mesh.size(dim), weight.device_mesh.get_local_rank(dim)
        )
    return parts[0], parts[1]


def _cut(first: int, size: int, ranks: int, rank: int) -> tuple[int, int]:
    """(first, size) of what a rank gets of these, as `Shard` and torch.chunk cut."""
    chunk = -(-size // ranks)
    skipped = min(size, chunk * rank)
    return first + skipped, min(chunk, size - skipped)


def beside(weight: Any, value: Tensor, dim: int) -> Tensor:
    """`value` as a DTensor whose dimension `dim` is cut as that of `weight` is; rank 0 has the values.

    `value` itself beside a `weight` that is no DTensor.
    """
    if not is_sharded(weight):
        return value
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [w if w.is_shard(dim) else Replicate() for w in weight.placements]
    placed: Tensor = distribute_tensor(value, weight.device_mesh, placements)
    return placed


def replicated(value: Any, weight: Any) -> Any:
    """`value`, the same tensor on each rank, as a DTensor on the mesh of `weight`; a DTensor as it is."""
    if value is None or is_sharded(value) or not is_sharded(weight):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def input_for(weight: Any, x: Tensor) -> Any:
    """What a rank of a tensor parallel model calls a layer with, (..., K) or its own columns of that, as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(x.dim() - 1) if w.is_shard(1) else Replicate() for w in weight.placements]
    shape = torch.Size((*x.shape[:-1], weight.shape[1]))
    return DTensor.from_local(
        x, weight.device_mesh, placements, run_check=False, shape=shape, stride=_strides(shape)
    )


def output_of(y: Any) -> Tensor:
    """What such a layer gives: a rank's own columns where rows of the weight are cut, else the whole sum."""
    from torch.distributed.tensor import Replicate

    wanted = [Replicate() if p.is_partial() else p for p in y.placements]
    given: Tensor = y.redistribute(y.device_mesh, wanted).to_local()
    return given


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _cuts_rows(placement: Any) -> bool:
    """Also as FSDP cuts what tensor parallelism has cut: with a placement of a class of its own."""
    return getattr(placement, "dim", None) == 0


def _check(name: str, value: Any, like: Any) -> None:
    if value is None:
        return
    if not is_sharded(value):
        raise TypeError(
            f"{name}: expected a DTensor, because weight or x is one, got {type(value).__name__} of shape"
            f" {tuple(value.shape)}; torch.distributed.tensor.distribute_tensor makes one"
        )
    if value.device_mesh != like.device_mesh:
        raise ValueError(f"{name}: expected a DTensor on {like.device_mesh}, got one on {value.device_mesh}")


def _layout(weight: Any, x: Any, last: int) -> _Layout:
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, rows, columns, sums = Replicate(), Shard(0), Shard(1), Partial()
    if weight.is_shard(0):
        return _Layout(whole, whole, rows, rows, Shard(last), sums, rows, sums, rows, rows)
    if weight.is_shard(1):
        inner = Shard(last)
        return _Layout(inner, columns, whole, whole, sums, inner, columns, columns, sums, sums)
    if x.is_shard() and not x.is_shard(last):
        return _Layout(x, whole, whole, whole, x, x, sums, sums, sums, sums)
    return _Layout(*(whole,) * 10)


def _samples(x: Any, samples: int, sample_offset: int) -> tuple[int, int]:
    """Number and first of the samples that this rank's rows of `x` belong to."""
    M = math.prod(x.shape[:-1])
    if samples <= 1 or M % samples:  # which the local call refuses
        return samples, sample_offset
    rows, first, inner = M, 0, False
    outer = list(x.shape[:-1])
    for dim, placement in enumerate(x.placements):
        if not placement.is_shard() or placement.dim == x.dim() - 1:
            continue
        if placement.dim:
            inner = inner or math.prod(x.shape[: placement.dim]) % samples != 0
            continue
        skipped, outer[0] = _cut(0, outer[0], x.device_mesh.size(dim), x.device_mesh.get_local_rank(dim))
        first += skipped * math.prod(x.shape[1:-1])
        rows = outer[0] * math.prod(x.shape[1:-1])
    size = M // samples
    if inner or rows % size or first % size:
        raise ValueError(
            f"samples: expected groups that each lie on one rank, got samples={samples} for x of shape"
            f" {tuple(x.shape)} with {', '.join(map(str, x.placements))}"
        )
    return max(1, rows // size), sample_offset + first // size  # 1 = of no rows
