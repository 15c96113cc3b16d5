"""How much memory a call may use beside its tensors."""

from __future__ import annotations

import functools

from ...core.environment import setting
from ...core.records import Weight

DEFAULT = 16 << 20  # bytes


def workspace_limit(weight: Weight) -> int:
    """Bytes that one call may use beside its tensors.

    16 MiB or a quarter of the weight, whichever is less; or what FLATLORA_WORKSPACE says, up to the weight's size.

    Raises:
        ValueError: FLATLORA_WORKSPACE is not a number of bytes.
    """
    size = weight.numel() * weight.element_size()
    allowed = setting("FLATLORA_WORKSPACE")
    return min(DEFAULT, size // 4) if allowed is None else min(_number(allowed), size)


@functools.cache
def _number(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"FLATLORA_WORKSPACE: expected a number of bytes, got {text!r}")
    return int(text)
