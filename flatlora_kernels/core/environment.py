"""Environment variables that every call reads."""

from __future__ import annotations

import os

# `os.environ.get` takes a microsecond, most of it for an exception where a variable is not set. CPython keeps the
# variables in a dictionary, which every way to change os.environ changes.
_variables = getattr(os.environ, "_data", None)
_keys = {
    name: os.environ.encodekey(name)
    for name in ("FLATLORA_BACKEND", "FLATLORA_STRATEGY", "FLATLORA_WORKSPACE")
}


def setting(name: str) -> str | None:
    """The value of one of these variables; None where it is not set or empty."""
    if _variables is not None and _keys[name] not in _variables:
        return None
    return os.environ.get(name) or None
