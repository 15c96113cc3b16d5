"""Peak memory of one step beyond its inputs: output, gradients, scratch and workspace."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch

from . import providers
from .problem import Problem
from .shapes import Case

# Large blocks go back to the system when freed; glibc would otherwise come to keep some.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_extra_bytes(case: Case, device: str, provider: str, noise: str) -> int | None:
    """On a CPU in a fresh process; None where the system does not tell."""
    if device == "cuda":
        return peak_of(_step(case, device, provider, noise), device)
    return in_fresh_process(_on_cpu, case, provider, noise)


def in_fresh_process(measure: Callable[..., int | None], *arguments: object) -> int | None:
    """What `measure` returns; None where it died, or where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    threads = {"initializer": torch.set_num_threads, "initargs": (torch.get_num_threads(),)}
    with mock.patch.dict(os.environ, _ENVIRONMENT), ProcessPoolExecutor(1, context, **threads) as process:
        try:
            return process.submit(measure, *arguments).result()
        except Exception:
            traceback.print_exc(limit=-1)
            return None


def peak_of(step: Callable[[], object], device: str) -> int | None:
    """Bytes at the peak of `step` beyond what is there before it; on a CPU of the resident size of this process."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - allocated
    before = _status("VmRSS")
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again from here
    except OSError:
        return None
    step()
    return _status("VmHWM") - before


def _step(case: Case, device: str, provider: str, noise: str) -> Callable[[], object]:
    problem = Problem(case, device, copies=1)
    chosen = next(p for p in providers.every(device) if p.name == provider)
    _ = problem.writable_weights  # stands for the weight itself, which is no extra
    if chosen.compiled:  # the compiler's own memory is not the step's
        chosen.make(problem, noise).step(0)
    return lambda: chosen.make(problem, noise).step(0)


def _on_cpu(case: Case, provider: str, noise: str) -> int | None:
    # Thread pools, autograd's engine and the code that libraries generate come up on a smaller problem.
    warm = case._replace(M=min(case.M, 64), N=min(case.N, 256), K=min(case.K, 256))
    _step(warm, "cpu", provider, noise)()
    return peak_of(_step(case, "cpu", provider, noise), "cpu")


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024
