"""Whose choice it is: what a call, its context or the environment asks for, else the automatic choice's favourite."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator

import torch

from .. import backends
from ..core.environment import setting
from ..core.records import Choice

STRATEGIES = ("fused", "panel", "transform")
# What stands for a strategy that nobody asked for, see `resolve`.
STRATEGY, BACKEND_AND_STRATEGY = FREE = ("auto", "auto backend")

_LARGE = 1 << 20  # weight elements from which falling to `reference` is worth a warning
_COMPETES = 10  # PRIORITY from which the automatic choice may prefer another backend by its speed
_context = threading.local()


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
    noise: str | None,
) -> Choice:
    if strategy == "transform" and noise not in (None, "hadamard"):
        raise ValueError(f"strategy: expected None, 'fused' or 'panel' with noise={noise!r}, got 'transform'")
    if strategy == "panel" and noise_accum == "split":
        raise NotImplementedError(
            "noise_accum: expected 'folded' or None with strategy='panel', whose slices of W + eps are rounded"
            " where they are stored, got 'split'; 'split' needs strategy='fused'"
        )
    free = STRATEGY
    if name is None:
        name = _automatic(noise_accum, device_type, dtype, large)
        free = BACKEND_AND_STRATEGY
    else:
        _check_name(source, name, backends.names())
        if reason := backends.unavailable(name):
            raise RuntimeError(f"{source}={name!r} cannot run here: {reason}")
        if reason := backends.unfit(name, device_type, dtype):
            raise TypeError(f"{source}={name!r} {reason}")
        if feature := backends.lacks(name, noise_accum):
            raise NotImplementedError(f"backend {name!r} does not implement {feature} yet")
    if strategy == "fused" and noise is not None and not backends.fuses(name, noise):
        raise NotImplementedError(
            f"strategy: expected None, 'transform' or 'panel', got 'fused', which backend {name!r} does not implement"
            f" for noise={noise!r}"
        )
    return Choice(strategy or free, noise_accum or backends.get(name).NOISE_ACCUMS[0], name)


def _select_once(*arguments: object) -> Choice:
    return _select(*arguments)


# torch.compile evaluates the choice while it traces. (torch.compiler.assume_constant_result sets this very mark,
# but imports all of torch._dynamo to do so, which would double the import time of this package.)
_select_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _automatic(noise_accum: str | None, device_type: str, dtype: torch.dtype, large: bool) -> str:
    passed_over, lacking = [], []
    for name in backends.names():
        if backends.unfit(name, device_type, dtype):
            continue
        if reason := backends.unavailable(name):
            passed_over.append(f"{name}: {reason}")
        elif feature := backends.lacks(name, noise_accum):
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
        for other in backends.names()
        if other != name
        and backends.get(other).PRIORITY >= _COMPETES
        and not (
            backends.unfit(other, device_type, dtype)
            or backends.unavailable(other)
            or backends.lacks(other, noise_accum)
        )
    ]


def resolve(
    backend: str | None,
    strategy: str | None,
    noise_accum: str | None,
    device_type: str,
    dtype: torch.dtype,
    weight_numel: int,
    noise: str | None = None,
) -> Choice:
    """How to compute a call with these arguments.

    Precedence: keyword, then `use_backend` / `use_strategy`, then FLATLORA_BACKEND / FLATLORA_STRATEGY, then
    automatic. What nobody asked for is left to `dispatch.choose`, which the op calls with the sizes of the moment:
    strategy is then STRATEGY, or BACKEND_AND_STRATEGY and `backend` the favourite.

    Args:
        noise: None = nothing is drawn.
    """
    source = "backend"
    if backend is None:
        backend = getattr(_context, "backend", None)
        if backend is None:
            backend = setting("FLATLORA_BACKEND")
            source = "FLATLORA_BACKEND"
    if strategy is None:
        strategy = getattr(_context, "strategy", None) or setting("FLATLORA_STRATEGY")
        if strategy is not None:
            _check_name("FLATLORA_STRATEGY", strategy, STRATEGIES)
    # A branch, because torch.compile turns it into a plain bool where sizes are symbols.
    large = True if weight_numel >= _LARGE else False
    return _select_once(backend, source, strategy, noise_accum, device_type, dtype, large, noise)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use backend `name` for calls in this thread that name none themselves.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: it cannot run on this machine.
    """
    _check_name("backend", name, backends.names())
    if reason := backends.unavailable(name):
        raise RuntimeError(f"backend={name!r} cannot run here: {reason}")
    with _setting("backend", name):
        yield


@contextlib.contextmanager
def use_strategy(name: str) -> Iterator[None]:
    """Use strategy `name` ("fused", "panel" or "transform") for calls in this thread that name none themselves."""
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
