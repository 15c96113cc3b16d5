"""Where and of what a result was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import flatlora_kernels as fk

_ROOT = Path(__file__).parent.parent
_SOURCES = ("flatlora_kernels", "csrc", "triton_kernels", ":(glob)bench/*.py")


_BUSY = 0.8  # with less of its cores, the machine has something else to do


def cpu_share(seconds: float = 0.2) -> float:
    """The part of their time in which torch's threads run when all have work: 1 where no other program does."""
    threads = torch.get_num_threads()
    x = torch.rand(threads << 16)
    x.exp()
    wall, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        x.exp()
    return (time.process_time() - used) / (threads * (time.perf_counter() - wall))


def busy() -> str | None:
    """A sentence where other programs take their part of the machine."""
    if (share := cpu_share()) >= _BUSY:
        return None
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"This machine is busy: {share:.0%} of {torch.get_num_threads()} threads' time is left to the benchmark"
        f" ({os.cpu_count()} cores{load})"
    )


def describe(device: str) -> dict[str, Any]:
    status = _said("git", "-C", str(_ROOT), "status", "--porcelain", "--", *_SOURCES)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "clocks_before": clocks(device),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "busy": busy(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "peft": _version("peft"),
        "flatlora_kernels": fk.__version__,
        "commit": _said("git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"),
        "dirty": None if status is None else bool(status),  # whether the sources differ from the commit
    }


def clocks(device: str) -> str | None:
    """Of the GPU, as they are: nothing here sets them. None on a CPU and where nvidia-smi does not tell."""
    if device != "cuda":
        return None
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw")
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    answer = _said("nvidia-smi", "-i", gpu, f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    if answer is None:
        return None
    return ", ".join(f"{name} {value}" for name, value in zip(fields, answer.split(", "), strict=False))


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
