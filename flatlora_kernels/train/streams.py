"""Streams beside torch's current one, for work that another kernel can hide."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch


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
