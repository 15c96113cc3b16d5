"""Autocast, which a call asks about and then leaves: its types have been settled by then."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch

_NOTHING = contextlib.nullcontext()


def autocasts(device_type: str) -> bool:
    # torch knows no autocast for meta.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside, nothing is cast. Nothing is done where nothing would be."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else _NOTHING
