"""The registry of backends and the choice among them.

Every module of this folder is a backend and has the same members:

    PRIORITY                 automatic choice prefers the highest, where no measurement or model says otherwise
    DEVICE_TYPES, DTYPES     what it takes (None = any)
    NOISE_ACCUMS             the `noise_accum` names it implements
    unavailable()            None, or one sentence: what is missing here and how to get it
    describe()               one line for the doctor
    linear, linear_input_grad, row_sq_norms, perturb
    adapter_grads            optional: its own way to the gradients of the adapter

so that a new backend is a new file here and no edit elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import pkgutil
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from ..choice import dispatch

_LARGE = 1 << 20  # weight elements from which falling to `reference` is worth a warning
_COMPETES = 10  # PRIORITY from which the automatic choice may prefer another backend by its speed
STRATEGIES = ("fused", "panel")
_context = threading.local()


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


def _unfit(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    module = get(name)
    if module.DEVICE_TYPES is not None and device_type not in module.DEVICE_TYPES:
        return f"takes tensors on {', '.join(module.DEVICE_TYPES)}, got {device_type}"
    if module.DTYPES is not None and dtype not in module.DTYPES:
        return f"takes {', '.join(str(d) for d in module.DTYPES)}, got {dtype}"
    return None


def _lacks(name: str, noise_accum: str | None) -> str | None:
    if noise_accum is not None and noise_accum not in get(name).NOISE_ACCUMS:
        return f"noise_accum={noise_accum!r}"
    return None


def _check_name(what: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{what}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


@functools.cache
def _select(
    name: str | None,
    source: str,
    strategy: str | None,
    noise_accum: str | None,
    device_type: str,
    dtype: torch.dtype,
    large: bool,
) -> tuple[str, str, str]:
    if strategy == "panel" and noise_accum == "split":
        raise NotImplementedError(
            "noise_accum: expected 'folded' or None with strategy='panel', whose slices of W + eps are rounded"
            " where they are stored, got 'split'; 'split' needs strategy='fused'"
        )
    free = dispatch.STRATEGY
    if name is None:
        name = _automatic(noise_accum, device_type, dtype, large)
        free = dispatch.BACKEND_AND_STRATEGY
    else:
        _check_name(source, name, names())
        if reason := unavailable(name):
            raise RuntimeError(f"{source}={name!r} cannot run here: {reason}")
        if reason := _unfit(name, device_type, dtype):
            raise TypeError(f"{source}={name!r} {reason}")
        if feature := _lacks(name, noise_accum):
            raise NotImplementedError(f"backend {name!r} does not implement {feature} yet")
    return name, strategy or free, noise_accum or get(name).NOISE_ACCUMS[0]


def _select_once(*arguments: object) -> tuple[str, str, str]:
    return _select(*arguments)


# torch.compile evaluates the choice while it traces. (torch.compiler.assume_constant_result sets this very mark,
# but imports all of torch._dynamo to do so, which would double the import time of this package.)
_select_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _automatic(noise_accum: str | None, device_type: str, dtype: torch.dtype, large: bool) -> str:
    passed_over, lacking = [], []
    for name in names():
        if _unfit(name, device_type, dtype):
            continue
        if reason := unavailable(name):
            passed_over.append(f"{name}: {reason}")
        elif feature := _lacks(name, noise_accum):
            lacking.append(f"backend {name!r} does not implement {feature} yet")
        else:
            if name == "reference" and large:
                warnings.warn(
                    f"no fused backend runs for {dtype} on {device_type}, so the slow, materialising 'reference' "
                    f"backend is used ({'; '.join(passed_over + lacking) or 'none takes them'}). "
                    "Pass backend='reference' to silence this.",
                    stacklevel=6,
                )
            return name
    raise NotImplementedError(
        "; ".join(lacking + passed_over) or f"no backend takes {dtype} on {device_type}"
    )


def competitors(name: str, noise_accum: str, device_type: str, dtype: torch.dtype) -> list[str]:
    """`name` and the other backends that would do in its place; those that emulate or interpret would not."""
    return [name] + [
        other
        for other in names()
        if other != name
        and get(other).PRIORITY >= _COMPETES
        and not (_unfit(other, device_type, dtype) or unavailable(other) or _lacks(other, noise_accum))
    ]


def resolve(
    backend: str | None,
    strategy: str | None,
    noise_accum: str | None,
    device_type: str,
    dtype: torch.dtype,
    weight_numel: int,
) -> tuple[str, str, str]:
    """(backend, strategy, noise_accum) for a call with these arguments.

    Precedence: keyword, then `use_backend` / `use_strategy`, then FLATLORA_BACKEND / FLATLORA_STRATEGY, then
    automatic. What nobody asked for is left to `dispatch.choose`, which the op calls with the sizes of the moment:
    strategy is then dispatch.STRATEGY, or dispatch.BACKEND_AND_STRATEGY and `backend` the favourite.
    """
    source = "backend"
    if backend is None:
        backend = getattr(_context, "backend", None)
        if backend is None:
            backend = os.environ.get("FLATLORA_BACKEND") or None
            source = "FLATLORA_BACKEND"
    if strategy is None:
        strategy = getattr(_context, "strategy", None) or os.environ.get("FLATLORA_STRATEGY") or None
        if strategy is not None:
            _check_name("FLATLORA_STRATEGY", strategy, STRATEGIES)
    # A branch, because torch.compile turns it into a plain bool where sizes are symbols.
    large = True if weight_numel >= _LARGE else False
    return _select_once(backend, source, strategy, noise_accum, device_type, dtype, large)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use backend `name` for calls in this thread that name none themselves.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: it cannot run on this machine.
    """
    _check_name("backend", name, names())
    if reason := unavailable(name):
        raise RuntimeError(f"backend={name!r} cannot run here: {reason}")
    with _setting("backend", name):
        yield


@contextlib.contextmanager
def use_strategy(name: str) -> Iterator[None]:
    """Use strategy `name` ("fused" or "panel") for calls in this thread that name none themselves."""
    with _setting("strategy", _check_name("strategy", name, STRATEGIES)):
        yield


@contextlib.contextmanager
def _setting(key: str, value: str) -> Iterator[None]:
    previous = getattr(_context, key, None)
    setattr(_context, key, value)
    try:
        yield
    finally:
        setattr(_context, key, previous)


def backend_info() -> dict[str, dict[str, str | None]]:
    """Per backend: `description` of what was built, and `unavailable`, why it cannot run here (None = it can)."""
    return {name: {"description": get(name).describe(), "unavailable": unavailable(name)} for name in names()}
