"""Backend `cuda`: fused CUDA C++ kernels (csrc/cuda) through a plain C interface, for NVIDIA GPUs.

With FLATLORA_EMULATE=1 in the environment the same kernels run on the CPU, in the emulator (csrc/emulator) that
`make emulator` builds: slow, for tests. FLATLORA_EMULATE=90 emulates Hopper, FLATLORA_EMULATOR names another build.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.quantized import QuantizedWeight
from ..core.records import Draw, Product, Weight
from .shared import arguments, library, products

_ARCHITECTURE = {"1": 80, "80": 80, "90": 90}.get(os.environ.get("FLATLORA_EMULATE", ""))
_EMULATED = _ARCHITECTURE is not None

PRIORITY = 5 if _EMULATED else 25
DEVICE_TYPES = ("cpu",) if _EMULATED else ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NOISE_ACCUMS = ("folded", "split")
FUSES = ("gaussian", "near_gaussian", "rademacher")

# For tests and tuning: row of the kernel's configuration table (-1 = choose; from 1000 and from 2000 on those of the
# kernels for sm_90a), parts of the sum (0 = choose).
configuration = (-1, 0)
_MAKES_U = 2000  # from there on it is of the kernel that makes u, which is not chosen by itself


class _Loaded(NamedTuple):
    library: Any
    architectures: str  # "8.0 9.0+PTX"
    compiler: str


def _path() -> Path | None:
    if not _EMULATED:
        return library.find("flatlora_cuda")
    built = Path(__file__).resolve().parents[2] / "build/emulator/libflatlora_cuda_emulated.so"
    return Path(os.environ.get("FLATLORA_EMULATOR") or built)


@functools.cache
def _load() -> _Loaded | str:
    """The library, or one sentence on why there is none."""
    path = _path()
    if _EMULATED and not (path and path.exists()):
        return f"there is no emulator at {path}; `make emulator` in a checkout builds it"
    if path is None:
        return (
            "its library is not installed: pip install flatlora-kernels-cu13 (or -cu12) of the same version, or,"
            " where nvcc is on PATH, FLATLORA_BUILD=cuda pip install ."
        )
    name = "flatlora_cuda_emulated" if _EMULATED else "flatlora_cuda"
    loaded = library.load(path, name)
    if isinstance(loaded, str):
        return f"its library {loaded}"
    for function in ("linear", "linear_workspace", "makes_u", "row_sq_norms", "perturb", "transform"):
        getattr(loaded, f"flatlora_cuda_{function}").argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    loaded.flatlora_cuda_linear_workspace.restype = ctypes.c_int64
    loaded.flatlora_cuda_error.argtypes = [ctypes.c_int32]
    loaded.flatlora_cuda_error.restype = ctypes.c_char_p
    loaded.flatlora_cuda_device.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    if _EMULATED:
        loaded.flatlora_emulator_set.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        loaded.flatlora_emulator_set(b"architecture", _ARCHITECTURE)
    architectures, _, compiler = library.build_info(loaded, name).partition("; ")
    return _Loaded(loaded, architectures, compiler)


def _has_code_for(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a library with these has machine code, or PTX to compile, for a GPU of this compute capability."""
    for major_minor, kind, ptx in re.findall(r"(\d+\.\d+)([af]?)(\+PTX)?", architectures):
        major, minor = map(int, major_minor.split("."))
        same_family = capability[0] == major and capability[1] >= minor
        if capability == (major, minor) or (kind != "a" and same_family):
            return True
        if ptx and not kind and capability >= (major, minor):
            return True
    return False


def unavailable() -> str | None:
    """See `backends`."""
    if not _EMULATED:
        if torch.version.cuda is None:
            built_for = "ROCm" if torch.version.hip else "the CPU alone"
            return f"it needs a CUDA build of torch, and this torch was built for {built_for}"
        if not torch.cuda.is_available():
            return "torch finds no NVIDIA GPU or no driver (FLATLORA_EMULATE=1 runs the kernels on the CPU, for tests)"
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return f"compute capability 8.0 or later is needed, {torch.cuda.get_device_name()} has less"
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    if _EMULATED:
        return None
    wanted = "{}.{}".format(*capability)
    if not _has_code_for(loaded.architectures, capability):
        return (
            f"its library has code for {loaded.architectures} and none for {torch.cuda.get_device_name()}; "
            f"build it again with TORCH_CUDA_ARCH_LIST={wanted}"
        )
    found = (ctypes.c_int64 * 3)()
    if error := loaded.library.flatlora_cuda_device(torch.cuda.current_device(), found):
        return loaded.library.flatlora_cuda_error(error).decode()
    return None


def fuses_packed(weight: QuantizedWeight) -> bool:
    """See `backends`. Of bfloat16 alone; rows of 4 and 8 bits, where 8 columns are whole bytes with one scale."""
    p, t = weight.packing, weight.parts
    scales = (torch.float32, torch.uint8) if p.bits == 4 else (torch.float32,)
    rows, cols, width = (1, p.block, p.width) if p.block else (p.block_rows, p.block_cols, p.width)
    return (
        p.target == torch.bfloat16
        and p.dtype in (torch.bfloat16, torch.float32)
        and p.bits in (4, 8)
        and width > 0
        and not (width % 8 or p.col % 8 or p.K % 8)
        and not (p.block and width % p.block)
        and rows & (rows - 1) == 0
        and (cols >= width or (cols >= 8 and cols & (cols - 1) == 0))
        and p.nested_block & (p.nested_block - 1) == 0
        and (p.post == 1.0 or p.bits == 8)
        and t.zero is None
        and t.row_bits is None
        and t.scale.dtype in scales
        and t.codes.data_ptr() % 8 == t.scale.data_ptr() % 4 == 0
    )


def describe() -> str:
    loaded = _load()
    if isinstance(loaded, str):
        return "fused CUDA C++ kernels"
    if _EMULATED:
        return f"fused CUDA C++ kernels, emulated on the CPU, {_path()}"
    return f"fused CUDA C++ kernels for {loaded.architectures}"


def _gpu(device: torch.device, workspace: Tensor | None = None) -> bytes:
    index = device.index or 0
    stream = 0 if _EMULATED else torch._C._cuda_getCurrentRawStream(index)
    where = (0, 0) if workspace is None else (workspace.data_ptr(), workspace.numel())
    return arguments.GPU.pack(index, stream, *where, products.allows_tf32(), *configuration, 0, 0, 0)


def _fail(function: str, error: int) -> None:
    text = _load().library.flatlora_cuda_error(error).decode()
    raise RuntimeError(f"backend 'cuda': {function} failed: {text} (error {error})")


def _run(device: torch.device, function: str, packed: bytes) -> None:
    library = _load().library
    workspace = None
    if function == "linear":
        needed = library.flatlora_cuda_linear_workspace(packed, _gpu(device))
        if needed < 0:
            _fail(function, -needed)
        if needed:
            workspace = torch.empty(needed, dtype=torch.uint8, device=device)
    if error := getattr(library, f"flatlora_cuda_{function}")(packed, _gpu(device, workspace)):
        _fail(function, error)


def _call(device: torch.device, function: str, packed: bytes) -> None:
    """Queues the kernels on the current stream of `device`."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(device, function, packed)
    else:
        _run(device, function, packed)


def product(p: Product, draw: Draw | None, noise_accum: str) -> Tensor:
    """See `reference.product`."""
    if draw is None or p.empty:
        return products.plain(p)
    y = p.a.new_empty((p.a.shape[0], p.outputs))
    _call(y.device, "linear", arguments.linear(p, draw, noise_accum, y))
    return y


def product_and_u(p: Product, lora_A: Tensor, draw: Draw, noise_accum: str) -> tuple[Tensor, Tensor] | None:
    """`product` of a forward without its u, and u = a lora_A^T, in one kernel; None where that kernel does not run."""
    if p.empty or configuration[0] < _MAKES_U:
        return None
    A = products.cast(lora_A, p.a.dtype)
    A = A if A.stride(1) == 1 else A.contiguous()
    u = p.a.new_empty((p.a.shape[0], A.shape[0]))
    y = p.a.new_empty((p.a.shape[0], p.outputs))
    packed = arguments.linear(p._replace(u=u), draw, noise_accum, y, A)
    if not _load().library.flatlora_cuda_makes_u(packed, _gpu(y.device)):
        return None
    _call(y.device, "linear", packed)
    return y, u


def row_sq_norms(weight: Weight, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> Tensor:
    """See `reference.row_sq_norms`."""
    if 0 in weight.shape:
        return weight.new_zeros(weight.shape[0], dtype=torch.float32)
    out = weight.new_empty(weight.shape[0], dtype=torch.float32)
    packed = arguments.row_norms(weight, lora_A, lora_B, scaling, out)
    _call(weight.device, "row_sq_norms", packed)
    return out


def perturb(weight: Weight | None, draw: Draw | None, out: Tensor) -> None:
    """See `reference.perturb`."""
    if out.numel():
        _call(out.device, "perturb", arguments.perturb(weight, draw, out))


def transform(a: Tensor, draw: Draw, input_grad: bool, out: Tensor, add: bool) -> None:
    """See `reference.transform`."""
    if out.numel() and a.shape[1]:
        _call(out.device, "transform", arguments.transform(a, draw, input_grad, out, add))
    elif not add:
        out.zero_()
