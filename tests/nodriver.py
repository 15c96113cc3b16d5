"""Triton's own launcher on a libcuda that does nothing (driver/libcuda.c): launches go all the way to the driver, and
one sees with what. No GPU runs, no tensor is touched."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

STREAM = 77
# Multiprocessors and bytes of shared memory for one block.
_CHIPS = {
    "sm80": (108, 163 << 10),
    "sm90": (132, 227 << 10),
    "sm100": (148, 227 << 10),
    "sm120": (188, 99 << 10),
}


def index(architecture: str) -> int:
    """Of the device. Triton keeps what it compiled by it."""
    return list(_CHIPS).index(architecture)


@functools.cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    source, built = Path(__file__).parent / "driver" / "libcuda.c", folder / "libcuda.so.1"
    compiler = shutil.which("cc") or shutil.which("gcc") or "cc"
    # Under the name that Triton links to: once it is loaded, no other is looked for.
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", str(built), str(source)]
    subprocess.run(command, check=True)
    found = ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)
    found.folder = folder
    return found


class NoDriver:
    """What the driver was asked for, and how often."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __getattr__(self, name: str) -> int:
        return ctypes.c_int64.in_dll(self._library, name).value

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple((ctypes.c_int64 * 3).in_dll(self._library, "grid"))

    def values(self, count: int) -> list[int]:
        """Of the first parameters of the last launch, 8 bytes each. What is None is none."""
        return list((ctypes.c_int64 * 10).in_dll(self._library, "values"))[:count]

    @property
    def box(self) -> tuple[int, int]:
        """Of the last map, (rows, columns); the driver counts from the fastest."""
        columns, rows = tuple((ctypes.c_int64 * 5).in_dll(self._library, "box"))[:2]
        return rows, columns


@contextlib.contextmanager
def active(architecture: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[NoDriver]:
    """Launches inside are for this GPU, whatever device the tensors are on."""
    if torch.cuda.is_available():
        pytest.skip("a GPU's own driver is loaded")
    library = _library()
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(library.folder))
    from flatlora_kernels.triton_kernels import launch
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    number, (processors, shared_limit) = int(architecture[2:]), _CHIPS[architecture]
    for name, value in (("architecture", number), ("processors", processors), ("shared_limit", shared_limit)):
        ctypes.c_int64.in_dll(library, name).value = value
    machine = launch.Machine(architecture, processors)
    monkeypatch.setattr(launch, "_machine", lambda index: machine)
    monkeypatch.setattr(launch, "_stream_of", lambda index: STREAM)
    made: Any = CudaDriver()
    made.get_current_device = lambda: index(architecture)
    made.get_current_stream = lambda device: STREAM
    made.get_current_target = lambda: GPUTarget("cuda", number, 32)
    monkeypatch.setattr(driver, "_active", made)
    launch.forget()
    yield NoDriver(library)
    launch.forget()
