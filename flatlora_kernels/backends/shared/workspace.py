"""How much memory a call may use beside its tensors."""

from __future__ import annotations

import functools
import os

from torch import Tensor

DEFAULT = 16 << 20  # bytes


def workspace_limit(weight: Tensor) -> int:
    """Bytes that one call may use beside its tensors.

    16 MiB or a quarter of the weight, whichever is less; or what FLATLORA_WORKSPACE says, up to the weight's size.

    Raises:
        ValueError: FLATLORA_WORKSPACE is not a number of bytes.
    """
    size = weight.numel() * weight.element_size()
    allowed = _allowed(os.environ.get("FLATLORA_WORKSPACE") or None)
    return min(DEFAULT, size // 4) if allowed is None else min(allowed, size)


@functools.cache
def _allowed(text: str | None) -> int | None:
    if text is not None and not text.strip().isdecimal():
        raise ValueError(f"FLATLORA_WORKSPACE: expected a number of bytes, got {text!r}")
    return None if text is None else int(text)
