"""Loading a compiled library, after a look at whether it is whole and of this build.

A library of another version would read the structs of `arguments` as something else. So before any other call it is
asked for its ABI, and what it has to export is looked up.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct
from pathlib import Path

import torch

from . import arguments

_VERSION = 3  # kAbiVersion of csrc/common/abi.h
_STRUCTS = (arguments.LINEAR, arguments.ROW_NORMS, arguments.PERTURB, arguments.TRANSFORM, arguments.PACKED)
_GPU_STRUCTS = (*_STRUCTS, arguments.GPU)
_CPU = [f"flatlora_cpu_{f}" for f in "abi levels init linear row_sq_norms perturb transform".split()]
_CUDA = [
    f"flatlora_cuda_{f}"
    for f in "abi device error linear_workspace linear row_sq_norms perturb transform".split()
]
# By the library's name: what it exports, its ABI first; the structs that it takes; what builds it.
_LIBRARIES = {
    "flatlora_cpu": (_CPU, _STRUCTS, "FLATLORA_BUILD=cpu pip install ."),
    "flatlora_cuda": (
        _CUDA,
        _GPU_STRUCTS,
        "FLATLORA_BUILD=cuda pip install ., or the same version of flatlora-kernels-cu13",
    ),
    "flatlora_cuda_emulated": ([*_CUDA, "flatlora_emulator_set"], _GPU_STRUCTS, "make emulator"),
}


def folders() -> list[Path]:
    """Where libraries lie: the package's own, then those of the wheels that bring the CUDA library alone.

    Of these the one for torch's version of CUDA comes first. They are looked for and not imported.
    """
    found = [Path(__file__).parents[2] / "lib"]
    major = (torch.version.cuda or "").partition(".")[0]
    for version in sorted(("13", "12"), key=lambda v: v != major):
        if spec := importlib.util.find_spec(f"flatlora_kernels_cu{version}"):
            found += map(Path, spec.submodule_search_locations or ())
    return [folder for folder in found if folder.is_dir()]


def find(name: str) -> Path | None:
    """The file of library `name`, "flatlora_cpu" or "flatlora_cuda", or None where there is none."""
    paths = [folder / f"lib{name}{end}" for folder in folders() for end in (".so", ".dylib")]
    return next((path for path in paths if path.exists()), None)


def load(path: Path, name: str) -> ctypes.CDLL | str:
    """Library `name` from the file `path`, or what is wrong with it, which continues "its library ...".

    A library's own code runs as soon as it is loaded; nothing can be asked before.
    """
    functions, structs, build = _LIBRARIES[name]
    again = f"build it again: {build}"
    try:
        if _is_cut_short(path):
            return f"is cut short: {path} has fewer bytes than its header says; {again}"
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"cannot be loaded: {error}; {again}"
    if missing := [f for f in (*functions, f"{name}_build_info") if not hasattr(library, f)]:
        return f"is of another build: {path} has no {missing[0]}; {again}"
    abi = getattr(library, functions[0])
    abi.restype = ctypes.c_char_p
    found = abi().decode(errors="replace")
    expected = " ".join(map(str, (_VERSION, *(s.size for s in structs))))
    if found != expected:
        return f"is of another build: {path} has ABI {found!r}, expected {expected!r}; {again}"
    return library


def build_info(library: ctypes.CDLL, name: str) -> str:
    """What it was built for, and by which compiler: "8.0 9.0+PTX; NVIDIA 13.0"."""
    info = getattr(library, f"{name}_build_info")
    info.restype = ctypes.c_char_p
    return info().decode()


def report(path: Path) -> str:
    """The doctor's line on a file of these folders."""
    name = path.name.partition(".")[0].removeprefix("lib")
    if name not in _LIBRARIES:
        return f"{path.name}: not one of this package"
    library = load(path, name)
    return f"{path.name}: {library if isinstance(library, str) else build_info(library, name)}"


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file ends before the table that ends it. The loader would touch pages that are not there."""
    with path.open("rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if len(header) < 64 or header[:6] != b"\x7fELF\2\1":  # another format, or 32 bits: the loader says so
        return False
    start, width, count = struct.unpack_from("<40xQ10x2H", header)
    return start + width * count > size
