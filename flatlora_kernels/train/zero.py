"""Parameters that DeepSpeed's ZeRO stage 3 shares out among processes; known by their attributes, without DeepSpeed.

Such a parameter is empty but while hooks of DeepSpeed have gathered it for a forward or a backward. It then is the same
object with other memory, and DeepSpeed writes it as `.data` does: neither its version nor its address tells whether its
values are new.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def shared_out(source: Any) -> bool:
    """Whether this is a parameter of ZeRO stage 3, gathered now or not."""
    return hasattr(source, "ds_status")


def away(sources: Iterable[Any]) -> bool:
    """Whether the values of some of these are not in this process now."""
    # By name: the enumeration is DeepSpeed's.
    return any(
        getattr(getattr(source, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE" for source in sources
    )


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """The shape that it has once gathered; of any other tensor its own."""
    return tuple(tensor.ds_shape if away((tensor,)) else tensor.shape)


def gathers(hook: Any) -> bool:
    """Whether it is one of the hooks that ZeRO stage 3 gives every module of its model."""
    # Those that DeepSpeed marks for its profiler are a function of deepspeed.utils.nvtx.
    return str(getattr(hook, "__module__", "")).startswith(
        ("deepspeed.runtime.zero.", "deepspeed.utils.nvtx")
    )
