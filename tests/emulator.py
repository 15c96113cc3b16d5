"""The emulator that runs the CUDA kernels on the CPU (csrc/emulator), as tests drive it.

A launch that breaks a rule of the hardware fails, and `report` says which. Settings hold until they are changed:
`seed` (of the schedule), `architecture`, `processors`, `checks` (0 = no clocks, no statistics).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flatlora_kernels.backends.shared import arguments
from flatlora_kernels.core.records import Draw, Product

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FLAGS = "-std=c++17 -O1 -g1 -ffp-contract=off -fno-strict-aliasing -DFLATLORA_EMULATED -Wall -Wextra -fPIC".split()
# With the sanitizers' libraries preloaded, as `make test-emulator-sanitized` does.
if os.environ.get("FLATLORA_SANITIZE"):
    FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


AHEAD = 2000  # where rows of the table in csrc/cuda/linear_sm90_ahead.h begin


class Site(NamedTuple):
    """Where instructions of one kind stand in the kernels, and what they did since the last call."""

    kind: str  # the wrapper's name
    file: str
    function: str
    line: int
    synchronises: bool
    visits: int
    phases: int  # of shared memory
    conflicts: int  # phases that bank conflicts added

    def __str__(self) -> str:
        return f"{self.kind} at {self.file}:{self.line}"


class Emulator:
    """The functions that an emulated library exports besides those of the real one."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._set = library.flatlora_emulator_set
        self._set.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        self._fault = library.flatlora_emulator_fault
        self._fault.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
        for function in ("report", "statistics"):
            getattr(library, f"flatlora_emulator_{function}").restype = ctypes.c_char_p

    def set(self, **settings: int) -> None:
        for name, value in settings.items():
            assert self._set(name.encode(), value) == 0, f"unknown setting {name}"

    @property
    def report(self) -> str:
        """What broke the rules in the last launch."""
        return self.library.flatlora_emulator_report().decode()

    def statistics(self) -> list[Site]:
        """Every site that launches since the last call went through."""
        lines = self.library.flatlora_emulator_statistics().decode().splitlines()
        return [
            Site(kind, file, function, int(line), bool(int(synchronises)), *map(int, counts))
            for kind, file, function, line, synchronises, *counts in (line.split("\t") for line in lines)
        ]

    @contextlib.contextmanager
    def without(self, site: Site) -> Iterator[None]:
        """Kernels run as if their source did not have this synchronisation (a wait waits for one group less)."""
        self._fault(site.kind.encode(), site.file.encode(), site.line)
        try:
            yield
        finally:
            self._fault(b"", b"", 0)


class Kernels(Emulator):
    """An emulated build of libflatlora_cuda, called past the op: with each choice that a launch has."""

    whole = True  # has all kernels

    def __init__(self, path: Path) -> None:
        super().__init__(ctypes.CDLL(str(path)))
        self.library.flatlora_cuda_linear_workspace.restype = ctypes.c_int64
        self.library.flatlora_cuda_error.restype = ctypes.c_char_p

    def _check(self, error: int) -> None:
        if error:
            raise RuntimeError(self.report)

    def linear(
        self,
        a: Tensor,
        weight: Tensor,
        draw: Draw,
        *,
        input_grad: bool = False,
        u: Tensor | None = None,
        lora_A: Tensor | None = None,
        lora: Tensor | None = None,
        bias: Tensor | None = None,
        scaling: float = 1.0,
        noise_accum: str = "folded",
        tf32: bool = False,
        config: int = -1,
        splits: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """The product, and the workspace: where the sum was cut the float32 (parts, M, outputs) that were added.

        With `lora_A` it writes u = a lora_A^T into `u`.
        """
        y = torch.full((a.shape[0], weight.shape[1 if input_grad else 0]), torch.nan, dtype=a.dtype)
        packed = arguments.linear(
            Product(a, weight, input_grad, u, lora, bias, scaling), draw, noise_accum, y, lora_A
        )
        if lora_A is not None:
            u.fill_(torch.nan)

        def gpu(workspace: Tensor | None) -> bytes:
            where = (0, 0) if workspace is None else (workspace.data_ptr(), workspace.nbytes)
            return arguments.GPU.pack(0, 0, *where, tf32, config, splits, 0, 0, 0)

        needed = self.library.flatlora_cuda_linear_workspace(packed, gpu(None))
        if needed < 0:
            raise RuntimeError(self.library.flatlora_cuda_error(-needed).decode())
        parts = torch.full((needed // 4,), torch.nan) if needed else None
        self._check(self.library.flatlora_cuda_linear(packed, gpu(parts)))
        return y, parts if parts is None or config >= AHEAD else parts.view(-1, *y.shape)

    def perturb(self, weight: Tensor, draw: Draw) -> Tensor:
        out = torch.full(weight.shape, torch.nan, dtype=weight.dtype)
        packed = arguments.perturb(weight, draw, out)
        self._check(self.library.flatlora_cuda_perturb(packed, arguments.GPU.pack(*(0,) * 10)))
        return out

    def row_sq_norms(
        self, weight: Tensor, lora_A: Tensor | None = None, lora_B: Tensor | None = None, scaling: float = 1.0
    ) -> Tensor:
        out = torch.full(weight.shape[:1], torch.nan)
        packed = arguments.row_norms(weight, lora_A, lora_B, scaling, out)
        self._check(self.library.flatlora_cuda_row_sq_norms(packed, arguments.GPU.pack(*(0,) * 10)))
        return out


def _compile(*arguments: object) -> None:
    done = subprocess.run([str(CXX), *FLAGS, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_object(source: Path, to: Path, *flags: str) -> Path:
    """Compiles a file of kernels, or of the emulator."""
    _compile(*flags, "-x", "c++", "-c", source, "-o", to)
    return to


def link(objects: list[Path], to: Path) -> Path:
    _compile("-shared", *objects, "-o", to)
    return to


def compile_library(sources: list[Path], to: Path, *flags: str) -> Path:
    """Compiles kernels of `sources`, with their emulator, into the shared library `to`."""
    return link([compile_object(s, to.with_suffix(f".{s.stem}.o"), *flags) for s in sources], to)
