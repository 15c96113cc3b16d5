"""Directions that fine-tuning has put into the weights, and that were not there before."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.quantized import QuantizedWeight
from ..op.sharded import is_sharded
from ..train.layer import NoisyLayer
from .measures import layers_of


@torch.no_grad()
def intruders(before: Tensor, after: Tensor, *, top_k: int = 10, threshold: float = 0.5) -> Tensor:
    """Which of the largest singular vectors of a weight resemble none of those before.

    ::

        before = U S V^T        after = U' S' V'^T        found: j < top_k where max over i of |u'_j . u_i| < threshold

    Args:
        before, after: a weight (N, K) before and after fine-tuning.
        top_k: so many vectors of `after` are looked at, those with the largest singular values; >= 1.
        threshold: of the cosine's size, 0 < threshold <= 1.

    Returns:
        Their numbers, ascending, int64, (found,): 0 is the vector with the largest singular value.

    Source: Shuttleworth et al., arXiv 2410.21228; defaults are those of PEFT's `reduce_intruder_dimension`.
    """
    if before.dim() != 2 or before.shape != after.shape:
        raise ValueError(
            f"after: expected a matrix of the shape of before, {tuple(before.shape)}, got {tuple(after.shape)}"
        )
    if top_k < 1:
        raise ValueError(f"top_k: expected an int >= 1, got {top_k}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected 0 < threshold <= 1, got {threshold}")
    old, new = (
        torch.linalg.svd(w if w.dtype == torch.float64 else w.float(), full_matrices=False)[0]
        for w in (before, after)
    )
    cosine = (new[:, :top_k].t() @ old.to(new)).abs().amax(1)
    return (cosine < threshold).nonzero().flatten()


def intruder_dimensions(model: nn.Module, *, top_k: int = 10, threshold: float = 0.5) -> dict[str, int]:
    """How many intruders (see `intruders`) the adapters have put into each layer's weight.

    Two singular value decompositions of every weight, which take a while and four times its memory.

    Args:
        model: with layers that draw weight noise (`FlatLoraLinear`, PEFT's after `apply_flat_lora`) and have adapters
            that are in use and not merged. DoRA counts without its magnitudes.
        top_k, threshold: of `intruders`.

    Returns:
        A count for each layer with an adapter, by its name in the model; for a mixture of experts the sum over them.

    Raises:
        ValueError: the model has no such layer, or a weight is a shard.
    """
    found = {}
    layers_of(model)
    for name, layer in model.named_modules():
        if not isinstance(layer, NoisyLayer):
            continue
        weight, lora_A, lora_B, scaling = layer._weight_in_use()
        if lora_A is None or lora_B is None:
            continue
        if is_sharded(weight):
            raise ValueError(f"model: expected whole weights, got a DTensor, a shard of one, {name!r}")
        whole = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        whole = whole.detach().to(torch.promote_types(whole.dtype, torch.float32))
        merged = whole + scaling * (lora_B.to(whole) @ lora_A.to(whole))
        experts = [(whole, merged)] if whole.dim() == 2 else zip(whole, merged, strict=True)
        found[name] = sum(len(intruders(*pair, top_k=top_k, threshold=threshold)) for pair in experts)
    if not found:
        raise ValueError("model: expected layers with adapters in use, got none")
    return found
