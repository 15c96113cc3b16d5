"""The registry of backends.

Every module of this folder is a backend and has the same members:

    PRIORITY                 automatic choice prefers the highest, where no measurement or model says otherwise
    DEVICE_TYPES, DTYPES     what it takes (None = any)
    NOISE_ACCUMS             the `noise_accum` names it implements
    unavailable()            None, or one sentence: what is missing here and how to get it
    describe()               one line for the doctor
    product                  what core/records.py calls so, with noise or without
    row_sq_norms, perturb
    FUSES                    the kinds of noise that its `product` takes; of the others it has `perturb` and `transform`
    fuses_packed(weight)     whether its `product` with noise takes this packed weight; the two above take any
    transform                the product of "hadamard" noise alone
    product_and_u            optional: the forward's product, and u of the adapter in the same kernel
    adapter_grads            optional: its own way to the gradients of the adapter
    GROUPS                   optional, True: `product`, also without noise, and `product_and_u` take the `offsets` of a
                             mixture, `row_sq_norms` takes its weight (E, N, K), each in one launch; and it has
    expert_grads             sums over the rows of each expert

so that a new backend is a new file here and no edit elsewhere.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType

import torch

from ..core.quantized import QuantizedWeight


@functools.cache
def names() -> tuple[str, ...]:
    """Backend names, the automatic choice's favourite first."""
    found = [m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg]
    return tuple(sorted(found, key=lambda name: -get(name).PRIORITY))


@functools.cache
def get(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


@functools.cache
def unavailable(name: str) -> str | None:
    """Why `name` cannot run on this machine, or None."""
    return get(name).unavailable()


def unfit(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """What `name` does not take of these, or None."""
    module = get(name)
    if module.DEVICE_TYPES is not None and device_type not in module.DEVICE_TYPES:
        return f"takes tensors on {', '.join(module.DEVICE_TYPES)}, got {device_type}"
    if module.DTYPES is not None and dtype not in module.DTYPES:
        return f"takes {', '.join(str(d) for d in module.DTYPES)}, got {dtype}"
    return None


def lacks(name: str, noise_accum: str | None) -> str | None:
    """What `name` does not implement of this, or None."""
    if noise_accum is not None and noise_accum not in get(name).NOISE_ACCUMS:
        return f"noise_accum={noise_accum!r}"
    return None


def fuses(name: str, noise: str) -> bool:
    """Whether `name` has strategy "fused" for this kind of noise."""
    return noise in get(name).FUSES


def fuses_packed(name: str, weight: QuantizedWeight) -> bool:
    """Whether `name` has strategy "fused" for this weight, with noise that it fuses."""
    return bool(get(name).fuses_packed(weight))


def groups(name: str) -> bool:
    """Whether `name` computes a mixture of experts in one launch."""
    return getattr(get(name), "GROUPS", False)


def backend_info() -> dict[str, dict[str, str | None]]:
    """Per backend: `description` of what was built, and `unavailable`, why it cannot run here (None = it can)."""
    return {name: {"description": get(name).describe(), "unavailable": unavailable(name)} for name in names()}
