"""Backend `cpu`: fused C++ kernels (csrc/cpu) through a plain C interface.

The library knows no torch headers, so one build serves every torch and every Python. What it needs of torch is its
thread pool, and it gets that at load time: the address of `torch_parallel_for` from torch's stable C interface
(torch >= 2.10). Arguments travel as one packed struct of 8-byte fields, csrc/cpu/args.h.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..noise import Draw
from .reference import matmul

PRIORITY = 10
DEVICE_TYPES = ("cpu",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STRATEGIES = ("fused",)
NOISE_ACCUMS = ("folded",)

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NOISE = {"gaussian": 1, "rademacher": 2}
_WORKSPACE = 16 << 20  # bytes for one call, all threads together; never more than a quarter of the weight

_NOISE_FIELDS = "qPqPqqqqqq"
_WEIGHT_FIELDS = "Pqq"
_LINEAR = struct.Struct(f"=2q4qPqq{_WEIGHT_FIELDS}PPqqqPqqPdq{_NOISE_FIELDS}".replace("P", "Q"))
_ROW_NORMS = struct.Struct(f"=4q{_WEIGHT_FIELDS}PqqqPqqqdP".replace("P", "Q"))
_PERTURB = struct.Struct(f"=3q{_WEIGHT_FIELDS}Pqq{_NOISE_FIELDS}".replace("P", "Q"))
_NO_NOISE = (0,) * 5 + (1,) + (0,) * 4


class _Loaded(NamedTuple):
    linear: Any
    row_sq_norms: Any
    perturb: Any
    levels: tuple[str, ...]  # instruction sets that run here, best first
    level: str  # the one in use


@functools.cache
def _load() -> _Loaded | str:
    """The library, or one sentence on why there is none."""
    folder = Path(__file__).parent.parent / "lib"
    paths = [p for p in (folder / "libflatlora_cpu.so", folder / "libflatlora_cpu.dylib") if p.exists()]
    if not paths:
        return (
            "its library was not built; install with a C++17 compiler and cmake at hand:"
            " FLATLORA_BUILD=cpu pip install ."
        )
    torch_lib = Path(torch.__file__).parent / "lib"
    try:
        library = ctypes.CDLL(str(paths[0]))
        torch_cpu = ctypes.CDLL(str(next(torch_lib.glob("libtorch_cpu.*"))))
        pool = [
            ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p)
            for name in ("torch_parallel_for", "torch_get_num_threads")
        ]
    except (OSError, AttributeError, StopIteration) as error:
        return (
            f"its library could not be loaded: {error} (torch {torch.__version__}, 2.10 or later is needed)"
        )
    library.flatlora_cpu_levels.restype = ctypes.c_char_p
    levels = tuple(library.flatlora_cpu_levels().decode().split())
    level = os.environ.get("FLATLORA_CPU_ISA") or levels[0]
    library.flatlora_cpu_init.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
    if library.flatlora_cpu_init(level.encode(), *pool):
        return f"FLATLORA_CPU_ISA={level!r} does not run here, expected one of {', '.join(levels)}"
    calls = (library.flatlora_cpu_linear, library.flatlora_cpu_row_sq_norms, library.flatlora_cpu_perturb)
    for call in calls:
        call.argtypes = [ctypes.c_char_p]
    return _Loaded(*calls, levels, level)


def unavailable() -> str | None:
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def describe() -> str:
    loaded = _load()
    if isinstance(loaded, str):
        return "fused C++ kernels"
    return f"fused C++ kernels, {loaded.level} (runs here: {', '.join(loaded.levels)})"


def _call(function: str, arguments: bytes) -> None:
    if error := getattr(_load(), function)(arguments):
        raise RuntimeError(
            f"backend 'cpu': {function} failed with code {error}" + " (out of memory)" * (error == 2)
        )


def _noise(draw: Draw | None) -> tuple[int, ...]:
    if draw is None:
        return _NO_NOISE
    scale = draw.noise_scale
    return (
        _NOISE[draw.noise], scale.data_ptr(), scale.stride(0), draw.seed.data_ptr(), draw.stream, draw.samples,
        draw.sample_offset, draw.antithetic, draw.row_offset, draw.col_offset,
    )  # fmt: skip


def _fused(
    a: Tensor,
    weight: Tensor,
    input_grad: bool,
    u: Tensor | None,
    lora: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    draw: Draw | None,
) -> Tensor:
    """``a P^T + scaling u lora^T + bias`` with P = W + eps, or its transpose; `lora` is (outputs, r)."""
    N, K = weight.shape
    outputs = K if input_grad else N
    y = a.new_empty((*a.shape[:-1], outputs))
    if y.numel() == 0:
        return y
    a2 = a if a.dim() == 2 else a.flatten(0, -2)
    M, rank = a2.shape[0], 0 if u is None else u.shape[1]
    limit = min(_WORKSPACE, N * K * weight.element_size() // 4)
    lora_fields = (
        (0, 0, 0, 0, 0) if u is None else (u.data_ptr(), lora.data_ptr(), _DTYPE[lora.dtype], *lora.stride())
    )
    bias_fields = (0, 0, 0) if bias is None else (bias.data_ptr(), _DTYPE[bias.dtype], bias.stride(0))
    arguments = _LINEAR.pack(
        input_grad, _DTYPE[a.dtype], M, N, K, rank, a2.data_ptr(), *a2.stride(), weight.data_ptr(), *weight.stride(),
        *lora_fields, *bias_fields, y.data_ptr(), scaling, limit, *_noise(draw),
    )  # fmt: skip
    _call("linear", arguments)
    return y


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    lora_x: Tensor | None,
    scaling: float,
    draw: Draw | None,
    strategy: str,
    noise_accum: str,
) -> tuple[Tensor, Tensor]:
    """See `reference.linear`."""
    if lora_A is None:
        return _fused(x, weight, False, None, None, bias, scaling, draw), x.new_empty(0)
    u = matmul((x if lora_x is None else lora_x).flatten(0, -2), lora_A.to(x.dtype).t())
    return _fused(x, weight, False, u, lora_B, bias, scaling, draw), u


def linear_input_grad(
    grad_y: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    v: Tensor | None,
    draw: Draw | None,
    strategy: str,
    noise_accum: str,
) -> Tensor:
    """See `reference.linear_input_grad`."""
    if v is None:
        return _fused(grad_y, weight, True, None, None, None, 1.0, draw)
    return _fused(grad_y, weight, True, v.contiguous(), lora_A.t(), None, 1.0, draw)


def row_sq_norms(weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> Tensor:
    """See `reference.row_sq_norms`."""
    N, K = weight.shape
    out = weight.new_empty(N, dtype=torch.float32)
    A_fields: tuple[int, ...] = (0, 0, 0, 0)
    B_fields = A_fields
    rank = 0
    if lora_A is not None:
        rank = lora_A.shape[0]
        A_fields = (lora_A.data_ptr(), _DTYPE[lora_A.dtype], *lora_A.stride())
        B_fields = (lora_B.data_ptr(), _DTYPE[lora_B.dtype], *lora_B.stride())
    arguments = _ROW_NORMS.pack(
        _DTYPE[weight.dtype], N, K, rank, weight.data_ptr(), *weight.stride(), *A_fields, *B_fields, scaling,
        out.data_ptr(),
    )  # fmt: skip
    _call("row_sq_norms", arguments)
    return out


def perturb(weight: Tensor | None, draw: Draw, out: Tensor) -> None:
    """See `reference.perturb`."""
    if out.numel() == 0:
        return
    weight_fields = (0, 0, 0) if weight is None else (weight.data_ptr(), *weight.stride())
    arguments = _PERTURB.pack(
        _DTYPE[out.dtype], *out.shape, *weight_fields, out.data_ptr(), *out.stride(), *_noise(draw)
    )
    _call("perturb", arguments)
