"""Packed weights that layers of other libraries own: read once, and again where the owner has changed them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.autocast import autocasts
from ..core.quantized import QuantizedWeight
from .stamps import Stamps, stamps, unchanged

_CODES = ("W_q", "qweight", "weight_packed", "weight")


class Reading(NamedTuple):
    weight: QuantizedWeight
    seen: Stamps


def read(owner: nn.Module, before: Reading | None) -> Reading:
    """The packed weight of `owner`: `before` itself where nothing of it has changed since.

    bitsandbytes repacks in place, merging and moving replace tensors: what was read would go on showing the old ones.
    """
    if before is not None and torch.compiler.is_compiling():
        return before
    found = sources(owner)
    if before is not None and unchanged(found, before.seen):
        return before
    return Reading(QuantizedWeight.of(owner), stamps(found))


def codes_of(owner: nn.Module) -> Tensor:
    """The tensor that holds the codes. Layers in which it is one and the same are tied."""
    for name in _CODES:
        for own in (owner._parameters, owner._buffers, vars(owner)):
            found = own.get(name)
            if isinstance(found, Tensor):
                return found
    raise TypeError(f"owner: expected one of the tensors {', '.join(_CODES)} in {type(owner).__name__}")


def sources(owner: nn.Module) -> tuple[Any, ...]:
    """What decides the values of its packed weight, the codes first; cheap, asked by each forward."""
    codes: Any = codes_of(owner)
    found = [codes]
    for own in (owner._parameters, owner._buffers):
        found += [t for name, t in own.items() if t is not codes and name != "bias"]
    state = getattr(codes, "quant_state", None)  # bitsandbytes, 4 bits
    if state is not None:
        found += [state.absmax, getattr(state, "packing_format_for_cpu", False)]
    scale = getattr(codes, "SCB", None)  # bitsandbytes, 8 bits: moves into the state in the first forward
    if scale is None:
        scale = getattr(getattr(owner, "state", None), "SCB", None)
    if scale is not None:
        found.append(scale)
    for names in ("tensor_data_names", "optional_tensor_data_names"):  # torchao
        found += [getattr(codes, name) for name in getattr(codes, names, ())]
    meta = getattr(owner, "meta", None)  # HQQ
    if isinstance(meta, dict):
        found += [meta.get("scale"), meta.get("zero")]
    return tuple(found)


def compute_type(owner: nn.Module | None, x: Tensor) -> torch.dtype:
    """The type that the product with a packed weight has: its owner's choice, or that of a plain product."""
    own: Any = owner
    bitsandbytes = hasattr(own, "compute_type_is_set")
    if bitsandbytes and not own.compute_type_is_set:  # by the first input
        own.set_compute_type(x)
        own.compute_type_is_set = True
    if bitsandbytes or hasattr(own, "W_q"):  # gptqmodel's attribute of that name is not what it computes in
        dtype: torch.dtype | None = own.compute_dtype
        if dtype is not None:
            return dtype
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type) else x.dtype


def beside(dtype: torch.dtype, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Adapters in types that the op takes beside a weight of `dtype`."""
    if all(p.dtype == dtype for p in parameters):
        return parameters
    common = torch.promote_types(dtype, torch.float32)
    return tuple(p.to(common) for p in parameters)


def loses_gradients(owner: nn.Module) -> bool:
    """Whether the owner's own product has no gradient: bitsandbytes' on a weight that it has repacked for a CPU."""
    state = getattr(owner._parameters.get("weight"), "quant_state", None)
    return torch.is_grad_enabled() and bool(getattr(state, "packing_format_for_cpu", False))
