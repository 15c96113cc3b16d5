"""What tells whether something made from tensors is still what they would give."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import zero

Stamps = tuple[Any, ...]


def stamps(sources: Sequence[Any]) -> Stamps:
    """Of tensors whether they are the same with the same values; other sources stand for themselves.

    Of those that ZeRO stage 3 shares out whether they are the same: nothing cheap tells more.
    """
    return tuple(map(_stamp, sources))


def unchanged(sources: Sequence[Any], seen: Stamps | None) -> bool:
    return seen is not None and len(seen) == len(sources) and all(map(_unchanged, sources, seen))


def _stamp(source: Any) -> Any:
    if not isinstance(source, Tensor):
        return source
    if zero.shared_out(source):
        return weakref.ref(source), None, None
    # PEFT assigns to .data, which changes the address alone; a new tensor may have the address of an old one.
    return weakref.ref(source), _version(source), source.data_ptr()


def _unchanged(source: Any, seen: Any) -> bool:
    if not isinstance(source, Tensor):
        return bool(source == seen)
    if not isinstance(seen, tuple):
        return False
    reference, version, address = seen
    own = reference()
    if own is not source and _gathered(source, own):
        source = own
    if own is not source:
        return False
    return version is None or (version == _version(source) and address == source.data_ptr())


def _gathered(source: Tensor, own: Tensor | None) -> bool:
    """Whether `source` may stand for `own`: FSDP has the whole in the place of its shards while a forward runs."""
    mesh = getattr(own, "device_mesh", None)
    return (
        own is not None
        and mesh is not None
        and getattr(source, "device_mesh", None) != mesh
        and own.shape == source.shape
    )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
