"""What a saved state must be, before any of it is taken over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .roles import Drawing

UINT64 = 1 << 64
LIMITS = {"base": UINT64, "step": 1 << 63, "stream": 1 << 32}


def noise_state(state: Any, name: str = "state") -> tuple[int, int]:
    """(base, step) of what `NoiseController.state_dict` gave.

    Raises:
        KeyError, TypeError, ValueError: it is something else; `name` says in the message what it was.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{name}: expected a dict with the keys 'base' and 'step', got {type(state).__name__}"
        )
    for key in ("base", "step"):
        if key not in state:
            raise KeyError(f"{name}: expected the keys 'base' and 'step', got {sorted(map(str, state))}")
    return _integer(name, "base", state["base"]), _integer(name, "step", state["step"])


def layer_state(state: Any, name: str) -> tuple[int, int, int]:
    """(base, step, stream) of the extra state of a `FlatLoraLinear`."""
    if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != (3,):
        got = (
            f"{state.dtype} of shape {tuple(state.shape)}" if isinstance(state, Tensor) else repr(state)[:80]
        )
        raise ValueError(f"{name}: expected an int64 tensor (base, step, stream), got {got}")
    base, step, stream = state.tolist()
    return base % UINT64, _integer(name, "step", step), _integer(name, "stream", stream)


def layer_states(layers: Mapping[str, Drawing], found: Mapping[str, tuple[int, int, int]]) -> None:
    """That states of several layers, both by name, can be of one moment, and that no two layers would draw alike.

    Raises:
        ValueError: layers that share a controller have different seeds or steps, or untied ones the same stream.
    """
    moments: dict[int, tuple[str, tuple[int, int]]] = {}
    for name, (base, step, _) in found.items():
        first, moment = moments.setdefault(id(layers[name].noise_controller), (name, (base, step)))
        if moment != (base, step):
            raise ValueError(
                "state_dict: expected one seed and step in all layers that share a NoiseController, got"
                f" {moment} in {first!r} and {(base, step)} in {name!r}"
            )
    drawn: dict[tuple[int, int], tuple[str, Any]] = {}
    for name, layer in layers.items():
        begin = found[name][2] if name in found else layer.stream
        weight = layer._base_parameter()
        for stream in range(begin, begin + layer.stream_count):
            other, its = drawn.setdefault((id(layer.noise_controller), stream), (name, weight))
            if its is not weight:
                raise ValueError(
                    "state_dict: expected a stream of its own for each layer, because equal ones draw equal noise, got"
                    f" {stream} for {other!r} and for {name!r}, whose weights are not tied"
                )


def tensors(name: str, saved: Any, like: Sequence[Tensor]) -> list[Tensor]:
    """`saved`, a list of tensors of the shapes of `like`."""
    if not isinstance(saved, (list, tuple)) or not all(isinstance(t, Tensor) for t in saved):
        raise TypeError(f"{name}: expected a list of {len(like)} tensors, got {type(saved).__name__}")
    if len(saved) != len(like):
        raise ValueError(
            f"{name}: expected {len(like)} tensors, one for each of this model's, got {len(saved)}"
        )
    for index, (value, own) in enumerate(zip(saved, like, strict=True)):
        if value.shape != own.shape:
            raise ValueError(
                f"{name}[{index}]: expected the shape {tuple(own.shape)} of this model's, got {tuple(value.shape)}"
            )
    return list(saved)


def keys(name: str, state: Any, expected: Iterable[str]) -> None:
    """That `state` is a dict with exactly these keys."""
    got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
    if got != sorted(expected):
        raise ValueError(f"{name}: expected the keys {sorted(expected)}, got {got}")


def _integer(name: str, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int as {key!r}, got {type(value).__name__}")
    if not 0 <= value < LIMITS[key]:
        raise ValueError(f"{name}: expected 0 <= {key} < 2**{LIMITS[key].bit_length() - 1}, got {value}")
    return value
