"""`undone`: a context manager for what must not stay behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


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
