"""Context managers: `undone` for what must not stay behind, `constants` for tensors that stay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Calls `undo` at the end; once more where an interrupt hits it, so that twice has to be as good as once."""
    try:
        yield
    finally:
        try:
            undo()
        except BaseException:
            undo()
            raise


@contextlib.contextmanager
def constants() -> Iterator[None]:
    """No gradients; and no inference mode, whose tensors could neither be written to nor trained with later."""
    with torch.inference_mode(False), torch.no_grad():
        yield
