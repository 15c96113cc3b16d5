"""Which modules a pattern names, as in PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable

Pattern = str | tuple[str, ...]


def pattern(names: str | Iterable[str]) -> Pattern:
    return names if isinstance(names, str) else tuple(names)


def matches(name: str, pattern: Pattern) -> bool:
    """A string is a regular expression for the whole name, others are names or their dotted ends."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in pattern)


def within(name: str, pattern: Pattern) -> bool:
    """Whether `name` or a module around it matches."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def listed(names: Iterable[str]) -> str:
    """The first eight, for messages."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
