"""Backend `cpu`: fused C++ kernels (csrc/cpu) through a plain C interface.

The library knows no torch headers, so one build serves every torch and every Python. What it needs of torch is its
thread pool, and it gets that at load time: the address of `torch_parallel_for` from torch's stable C interface
(torch >= 2.10). Arguments travel as one packed struct, see shared/arguments.py; shared/library.py asks the library
whether it takes these.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.noise import KINDS
from ..core.quantized import QuantizedWeight
from ..core.records import Draw, Product, Weight
from .shared import arguments, library

PRIORITY = 10
DEVICE_TYPES = ("cpu",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NOISE_ACCUMS = ("folded", "split")
FUSES = KINDS


class _Loaded(NamedTuple):
    linear: Any
    row_sq_norms: Any
    perturb: Any
    transform: Any
    levels: tuple[str, ...]  # instruction sets that run here, best first
    level: str  # the one in use


@functools.cache
def _load() -> _Loaded | str:
    """The library, or one sentence on why there is none."""
    path = library.find("flatlora_cpu")
    if path is None:
        return (
            "its library was not built; install with a C++17 compiler and cmake at hand:"
            " FLATLORA_BUILD=cpu pip install ."
        )
    loaded = library.load(path, "flatlora_cpu")
    if isinstance(loaded, str):
        return f"its library {loaded}"
    try:
        torch_cpu = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        pool = [
            ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p)
            for name in ("torch_parallel_for", "torch_get_num_threads")
        ]
    except (OSError, AttributeError, StopIteration) as error:
        return f"torch {torch.__version__} does not lend it its threads, 2.10 or later is needed: {error}"
    loaded.flatlora_cpu_levels.restype = ctypes.c_char_p
    levels = tuple(loaded.flatlora_cpu_levels().decode().split())
    level = os.environ.get("FLATLORA_CPU_ISA") or levels[0]
    loaded.flatlora_cpu_init.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
    if loaded.flatlora_cpu_init(level.encode(), *pool):
        return f"FLATLORA_CPU_ISA={level!r} does not run here, expected one of {', '.join(levels)}"
    calls = (
        loaded.flatlora_cpu_linear,
        loaded.flatlora_cpu_row_sq_norms,
        loaded.flatlora_cpu_perturb,
        loaded.flatlora_cpu_transform,
    )
    for call in calls:
        call.argtypes = [ctypes.c_char_p]
    return _Loaded(*calls, levels, level)


def level() -> str | None:
    """The instruction set in use, or None where the library cannot run."""
    loaded = _load()
    return None if isinstance(loaded, str) else loaded.level


def unavailable() -> str | None:
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def fuses_packed(weight: QuantizedWeight) -> bool:
    """See `backends`."""
    return True


def describe() -> str:
    loaded = _load()
    if isinstance(loaded, str):
        return "fused C++ kernels"
    return f"fused C++ kernels, {loaded.level} (runs here: {', '.join(loaded.levels)})"


def _call(function: str, packed: bytes) -> None:
    if error := getattr(_load(), function)(packed):
        raise RuntimeError(
            f"backend 'cpu': {function} failed with code {error}" + " (out of memory)" * (error == 2)
        )


def product(p: Product, draw: Draw | None, noise_accum: str) -> Tensor:
    """See `reference.product`."""
    y = p.a.new_empty((p.a.shape[0], p.outputs))
    if y.numel():
        _call("linear", arguments.linear(p, draw, noise_accum, y))
    return y


def row_sq_norms(weight: Weight, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> Tensor:
    """See `reference.row_sq_norms`."""
    out = weight.new_empty(weight.shape[0], dtype=torch.float32)
    _call("row_sq_norms", arguments.row_norms(weight, lora_A, lora_B, scaling, out))
    return out


def perturb(weight: Weight | None, draw: Draw | None, out: Tensor) -> None:
    """See `reference.perturb`."""
    if out.numel():
        _call("perturb", arguments.perturb(weight, draw, out))


def transform(a: Tensor, draw: Draw, input_grad: bool, out: Tensor, add: bool) -> None:
    """See `reference.transform`."""
    if out.numel():
        _call("transform", arguments.transform(a, draw, input_grad, out, add))
