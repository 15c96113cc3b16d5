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

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FLAGS = "-std=c++17 -O1 -g1 -ffp-contract=off -fno-strict-aliasing -DFLATLORA_EMULATED -Wall -Wextra -fPIC".split()
if os.environ.get("FLATLORA_SANITIZE"):  # `make test-emulator` does, with the sanitizers' libraries preloaded
    FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


class Site(NamedTuple):
    """Where instructions of one kind stand in the kernels, and what they did since the last call."""

    kind: str  # the wrapper's name
    file: str
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
            Site(kind, file, int(line), bool(int(synchronises)), *map(int, counts))
            for kind, file, line, synchronises, *counts in map(str.split, lines)
        ]

    @contextlib.contextmanager
    def without(self, site: Site) -> Iterator[None]:
        """Kernels run as if their source did not have this synchronisation (a wait waits for one group less)."""
        self._fault(site.kind.encode(), site.file.encode(), site.line)
        try:
            yield
        finally:
            self._fault(b"", b"", 0)


def compile_library(sources: list[Path], to: Path, *flags: str) -> Path:
    """Compiles kernels of `sources`, with their emulator, into the shared library `to`."""
    command = [str(CXX), *FLAGS, *flags, "-shared", "-x", "c++", *map(str, sources), "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return to
