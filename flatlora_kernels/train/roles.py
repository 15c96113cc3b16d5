"""What layers and their controller ask of each other, without knowing each other's class."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .names import Pattern


class Drawing(Protocol):
    """A layer as its controller sees it, see `layer.NoisyLayer`."""

    stream: int
    stream_count: int
    flat_lora_name: str
    training: bool
    _called: bool  # whether its forward ran since the last step
    _bypassed: bool  # whether an optimiser trains it in this one although it did not
    _captured: bool  # whether a CUDA graph runs its forward

    @property
    def noise_controller(self) -> Any: ...

    def _renew(self, sigma: float | None, *, overlap: bool = False) -> None: ...
    def _rescale(self, sigma: float | None) -> None: ...
    def _keep(self, keep: bool) -> None: ...
    def _base_parameter(self) -> Tensor: ...
    def _trained_parameters(self) -> list[Tensor]: ...


class Driven(Protocol):
    """A controller as its layers and its optimiser see it, see `controller.NoiseController`."""

    step: int
    _driven: bool
    _undriven: weakref.WeakKeyDictionary[torch.optim.Optimizer, int]
    expect_unused: Pattern
    _layers: weakref.WeakKeyDictionary[Drawing, None]
    _said: set[str]
    _attachment: Any

    @property
    def schedule(self) -> str | Callable[[int], float]: ...
    @property
    def target_sigma(self) -> float: ...
    def _known_sigma(self) -> float | None: ...
    def advance(self, *, overlap: bool = False) -> None: ...
    def state_dict(self) -> dict[str, int]: ...
    def move_to(self, base: int, step: int) -> None: ...
