"""The kernels of cpp/wrappers.cu, compiled for the emulator or for a GPU (where FLATLORA_WRAPPERS names a library, they
are that); and data/layouts.json, which says where CuTe puts the elements of matrices. To make that table anew:

    pip download --no-deps nvidia-cutlass==4.2.0.0 && unzip nvidia_cutlass-*.whl -d cutlass
    g++ -std=c++17 -Icutlass/cutlass_library/source/include -I$CUDA/include/cccl -I$CUDA/include \\
      tests/cpp/cute_layouts.cpp -o cute_layouts && ./cute_layouts tests/data/layouts.json
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import pickle
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator
import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
SOURCE = HERE / "cpp" / "wrappers.cu"
TABLES = json.loads((HERE / "data" / "layouts.json").read_text())
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def layout(name: str) -> np.ndarray:
    """The table as [first argument, second argument]."""
    result = np.zeros((1, 1), dtype=np.int64)
    for bit in TABLES[name]["bits0"]:
        result = np.concatenate([result, result ^ bit], axis=0)
    for bit in TABLES[name]["bits1"]:
        result = np.concatenate([result, result ^ bit], axis=1)
    return result


def nvcc(architecture: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    flags = [f"-arch=sm_{architecture}", "-std=c++17", "-O2", "-fmad=false", "-Xcompiler=-fPIC"]
    if architecture == "90a":
        flags.append("-DFLATLORA_TEST_SM90")
    return subprocess.run([str(NVCC), *flags, str(SOURCE), *arguments], capture_output=True, text=True)


class Library:
    def __init__(self, path: Path, has_sm90: bool) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.test_error.restype = ctypes.c_char_p
        self.has_sm90 = has_sm90
        self.record = None
        if folder := os.environ.get("FLATLORA_RECORD_WRAPPERS"):  # for replay.py
            shutil.copy(path, Path(folder) / "wrappers.so")
            self.record = Path(folder) / "calls"

    def check(self, error: int) -> None:
        assert error == 0, self.library.test_error(error).decode()

    def run(self, name: str, data: np.ndarray, out: np.ndarray) -> np.ndarray:
        data = np.ascontiguousarray(data)
        self.call("test_run", name.encode(), data, data.nbytes, out, out.nbytes)
        return out

    def call(self, name: str, *arguments: np.ndarray | int | bytes) -> None:
        """Any function of wrappers.cu."""
        before = [a.tobytes() if isinstance(a, np.ndarray) else a for a in arguments]
        kinds = {int: ctypes.c_int64, bytes: ctypes.c_char_p}
        converted = [
            kinds[type(a)](a) if type(a) in kinds else a.ctypes.data_as(ctypes.c_void_p) for a in arguments
        ]
        self.check(getattr(self.library, name)(*converted))
        if self.record:
            after = [a.tobytes() if isinstance(a, np.ndarray) else a for a in arguments]
            with self.record.open("ab") as file:
                pickle.dump((name, before, after), file)


FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def emulator_objects() -> list[Path]:
    """The emulator itself, compiled once for all tests."""
    sources = sorted((emulator.CSRC / "emulator").glob("*.cpp"))
    with ThreadPoolExecutor(2) as pool:
        return list(
            pool.map(lambda s: emulator.compile_object(s, Path(FOLDER.name) / f"{s.stem}.o"), sources)
        )


@functools.cache
def _emulated() -> Library:
    folder = Path(os.environ.get("FLATLORA_EMULATED_WRAPPERS", FOLDER.name))  # for several processes
    path = folder / "wrappers_emulated.so"
    if not path.exists():
        kernels = emulator.compile_object(SOURCE, folder / "wrappers.o", "-DFLATLORA_TEST_SM90")
        emulator.link([kernels, *emulator_objects()], path)
    library = Library(path, True)
    emulator.Emulator(library.library).set(architecture=90, seed=1)
    return library


@functools.cache
def _on_gpu() -> Library:
    major, minor = torch.cuda.get_device_capability()
    if built := os.environ.get("FLATLORA_WRAPPERS"):
        return Library(Path(built), (major, minor) == (9, 0))
    path = Path(FOLDER.name) / "wrappers_gpu.so"
    done = nvcc("90a" if (major, minor) == (9, 0) else f"{major}{minor}", "-shared", "-o", str(path))
    assert done.returncode == 0, done.stderr
    return Library(path, (major, minor) == (9, 0))


def get_emulated() -> Library:
    if emulator.CXX is None:
        pytest.skip("no C++ compiler")
    return _emulated()


def get_on_gpu() -> Library:
    if not torch.cuda.is_available() or torch.version.hip:
        pytest.skip("no GPU of NVIDIA's")
    if NVCC is None and not os.environ.get("FLATLORA_WRAPPERS"):
        pytest.skip("no nvcc")
    return _on_gpu()


LIBRARIES = [
    pytest.param(get_emulated, id="emulated"),
    pytest.param(get_on_gpu, id="gpu", marks=[pytest.mark.gpu, pytest.mark.nvcc]),
]


def get(library: Callable[[], Library], sm90: bool = False) -> Library:
    found = library()
    if sm90 and not found.has_sm90:
        pytest.skip("for sm_90a alone")
    return found


def bits(x: torch.Tensor) -> np.ndarray:
    """bfloat16 or float16 as integers."""
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)
