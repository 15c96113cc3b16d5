"""What has to happen before any optimiser takes a step, whoever calls it."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import watch
from .roles import Driven


class Reading(Protocol):
    """A layer whose parameters another stream reads."""

    def _wait_until_ready(self) -> None: ...


_reading: weakref.WeakSet[Reading] = weakref.WeakSet()
_watched: weakref.WeakSet[Driven] = weakref.WeakSet()


def wait_for(layer: Reading) -> None:
    """The next step waits for `layer`: one that no forward waited for may be written by it."""
    _install()
    _reading.add(layer)


def watch_over(controller: Driven) -> None:
    """Each step is asked whether it trains layers of `controller` past their noise."""
    _install()
    _watched.add(controller)


@functools.cache
def _install() -> Any:
    return register_optimizer_step_pre_hook(_before)


def _before(optimizer: torch.optim.Optimizer, *_: object) -> None:
    while _reading:
        _reading.pop()._wait_until_ready()
    for controller in _watched:
        watch.before_step(controller, optimizer)
