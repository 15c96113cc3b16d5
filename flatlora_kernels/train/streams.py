"""Streams beside torch's current one, for work that another kernel can hide."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook


@functools.cache
def side_stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """One stream for each purpose. Of high priority: its few blocks start as soon as another kernel's blocks end."""
    return torch.cuda.Stream(device, priority=-1)


@contextlib.contextmanager
def beside(device: torch.device, purpose: str) -> Iterator[torch.cuda.Stream]:
    """What is queued inside runs beside the current stream, once all that is queued there so far is done."""
    side = side_stream(device, purpose)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield side


class Reading(Protocol):
    """A layer whose parameters another stream reads."""

    def _wait_until_ready(self) -> None: ...


_reading: weakref.WeakSet[Reading] = weakref.WeakSet()


def wait_before_steps(layer: Reading) -> None:
    """The next step of any optimiser waits for `layer`: one that no forward waited for may be written by it."""
    _watch_steps()
    _reading.add(layer)


@functools.cache
def _watch_steps() -> Any:
    return register_optimizer_step_pre_hook(_wait)


def _wait(*_: object) -> None:
    while _reading:
        _reading.pop()._wait_until_ready()
