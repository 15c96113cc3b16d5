"""Directions that fine-tuning has put into the weights, and that were not there before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..core.quantized import QuantizedWeight
from ..op.sharded import is_sharded
from ..train.layer import NoisyLayer
from .measures import layers_of

# PEFT's `init_lora_weights` that do not touch the base weight.
LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")


@torch.no_grad()
def intruders(before: Tensor, after: Tensor, *, top_k: int = 10, threshold: float = 0.5) -> Tensor:
    """Which of the largest singular vectors of a weight resemble none of those before.

    ::

        before = U S V^T        after = U' S' V'^T        found: j < top_k where max over i of |u'_j . u_i| < threshold

    u_i and u'_j are columns of U and U', directions of the layer's output.

    Args:
        before, after: a weight (N, K) before and after fine-tuning.
        top_k: so many vectors of `after` are looked at, those with the largest singular values; >= 1.
        threshold: of the cosine's size, 0 < threshold <= 1.

    Returns:
        Their numbers, ascending, int64, (found,): 0 is the vector with the largest singular value.

    Source: Shuttleworth et al., arXiv 2410.21228; defaults are those of PEFT's `reduce_intruder_dimension`.
    """
    if before.dim() != 2:
        raise ValueError(f"before: expected a matrix, got {tuple(before.shape)}")
    if before.shape != after.shape:
        raise ValueError(
            f"after: expected the shape of before, {tuple(before.shape)}, got {tuple(after.shape)}"
        )
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k: expected an int >= 1, got {top_k}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected 0 < threshold <= 1, got {threshold}")
    old, new = (
        torch.linalg.svd(w if w.dtype == torch.float64 else w.float(), full_matrices=False)[0]
        for w in (before, after)
    )
    cosine = (new[:, :top_k].t() @ old.to(new)).abs().amax(1)
    return (cosine < threshold).nonzero().flatten()


def intruder_dimensions(
    model: nn.Module, *, top_k: int = 10, threshold: float = 0.5, before: Mapping[str, Tensor] | None = None
) -> dict[str, int]:
    """How many intruders (see `intruders`) the adapters have put into each layer's weight.

    Two singular value decompositions of every weight, which take a while and four times its memory.

    Args:
        model: with layers that draw weight noise (`FlatLoraLinear`, PEFT's after `apply_flat_lora`) and have adapters
            in use; PEFT's may not be merged. DoRA counts without its magnitudes.
        top_k, threshold: of `intruders`.
        before: the weight before fine-tuning, (N, K), for each layer by its name in the model; default the base
            weight. Needed where the adapter's initialisation changed that, as PiSSA, OLoRA and LoftQ do.

    Returns:
        A count for each layer with an adapter, by its name in the model; for a mixture of experts the sum over them.

    Raises:
        ValueError: the model has no such layer, a weight is a shard, or `before` is needed or lacks a layer.
    """
    found = {}
    layers_of(model)
    starts = [getattr(c, "init_lora_weights", True) for c in getattr(model, "peft_config", {}).values()]
    if before is None and (changed := [start for start in starts if start not in LEAVE_THE_BASE]):
        raise ValueError(
            f"before: expected the weights before fine-tuning, as the initialisation {changed[0]!r} changes the base"
            " weights; got None"
        )
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
        if before is not None:
            if name not in before:
                raise ValueError(f"before: expected a weight for {name!r}, got none")
            whole = before[name].detach().to(whole)
        experts = [(whole, merged)] if whole.dim() == 2 else zip(whole, merged, strict=True)
        found[name] = sum(len(intruders(*pair, top_k=top_k, threshold=threshold)) for pair in experts)
    if not found:
        raise ValueError("model: expected layers with adapters in use, got none")
    return found
