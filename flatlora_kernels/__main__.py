"""``python -m flatlora_kernels``: what was built, what runs here and, for what does not, why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from . import __version__, backend_info
from .backends.shared import library

_HERE = Path(__file__).parent


def _triton() -> str:
    try:
        return f"triton {importlib.metadata.version('triton')}"
    except importlib.metadata.PackageNotFoundError:
        return "no triton"


def _gpus() -> list[str]:
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else None
    if torch.version.hip:
        built_for = f"ROCm {torch.version.hip}"
    if built_for is None:
        return ["none that torch can use: this torch was built for the CPU alone"]
    if not torch.cuda.is_available():
        return [f"none that torch can use: it was built for {built_for} and finds no device or driver"]
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        found.append(
            f"{device.name}, {device.major}.{device.minor}, {memory:.0f} GiB, torch built for {built_for}"
        )
    return found


def _nvcc() -> str:
    path = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if path is None:
        return "not found"
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run: {error}"
    version = re.search(r"release ([\d.]+)", text)
    return f"{version[1] if version else 'of unknown version'}, {path}"


def _compiler() -> list[str]:
    """What Triton needs to build its launchers, looked for as its runtime/build.py does."""
    named = os.environ.get("CC")
    path = (shutil.which("gcc") or shutil.which("clang")) if named is None else shutil.which(named)
    if path is not None:
        compiler = path
    elif named is None:
        compiler = (
            "none: CC is not set, and PATH has neither gcc nor clang; triton needs one at its first launch"
            " (apt install build-essential)"
        )
    else:
        compiler = (
            f"none: CC is {named!r}, and triton needs the path or name of a program there, without options"
        )
    # Debian's default scheme has a folder for what is installed locally.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    include = sysconfig.get_path("include", scheme)
    listed = os.pathsep.join(os.environ.get(k, "") for k in ("CPATH", "C_INCLUDE_PATH")).split(os.pathsep)
    folder = next((f for f in (include, *listed) if f and (Path(f) / "Python.h").is_file()), None)
    if folder is not None:
        return [compiler, f"Python.h found in {folder}"]
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
    return [
        compiler,
        f"no Python.h in {include}; triton needs it at its first launch (apt install python3-dev, or {package})",
    ]


def _libraries() -> list[str]:
    """What each compiled library was built for, and by which compiler, or what is wrong with it."""
    lines = [library.report(path) for f in library.folders() for path in sorted(f.glob("libflatlora_*"))]
    return lines or ["none; install with a C++17 compiler at hand and FLATLORA_BUILD=cpu to have one"]


def report() -> str:
    """The text that the command prints."""
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("FLATLORA_")]
    rows: list[tuple[str, list[str]]] = [
        ("package", [f"flatlora_kernels {__version__}, {_HERE}"]),
        ("python", [f"{platform.python_version()}, torch {torch.__version__}, {_triton()}"]),
        ("system", [platform.platform()]),
        (
            "processor",
            [f"{torch.backends.cpu.get_cpu_capability()}, torch uses {torch.get_num_threads()} threads"],
        ),
        ("gpu", _gpus()),
        ("nvcc", [_nvcc()]),
        ("compiler", _compiler()),
        ("libraries", _libraries()),
        ("settings", settings or ["none (no FLATLORA_... in the environment)"]),
    ]
    lines = [
        f"{name if i == 0 else '':<12}{value}" for name, values in rows for i, value in enumerate(values)
    ]
    lines += ["", "backends, the automatic choice's favourite first:"]
    for name, info in backend_info().items():
        reason = info["unavailable"]
        lines.append(
            f"  {name:<10}{'runs here' if reason is None else 'does not run here'}: {info['description']}"
        )
        if reason is not None:
            lines.append(f"  {'':<10}because {reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
    sys.exit(0)
