"""Peak memory of one step beyond its inputs: output, gradients, scratch and workspace."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch

from . import providers
from .problem import Problem
from .shapes import Case

# Large blocks go back to the system when freed; glibc would otherwise come to keep some.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_extra_bytes(case: Case, device: str, provider: str, noise: str) -> int | None:
    """On a CPU by the peak resident size of a fresh process; None where the system does not tell."""
    if device == "cuda":
        return _peak_on_gpu(case, device, provider, noise)
    if not sys.platform.startswith("linux"):
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    with _environment():
        arguments = (sender, case, provider, noise, torch.get_num_threads())
        process = context.Process(target=_child, args=arguments)
        process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # it died; what it had to say is on stderr
        return None
    finally:
        process.join()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _step(case: Case, device: str, provider: str, noise: str) -> tuple[Problem, providers.Provider]:
    problem = Problem(case, device, copies=1)
    chosen = next(p for p in providers.every(device) if p.name == provider)
    _ = problem.writable_weights  # stands for the weight itself, which is no extra
    if chosen.compiled:  # the compiler's own memory is not the step's
        chosen.make(problem, noise).step(0)
    return problem, chosen


def _peak_on_gpu(case: Case, device: str, provider: str, noise: str) -> int:
    problem, chosen = _step(case, device, provider, noise)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chosen.make(problem, noise).step(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _child(sender: Connection, case: Case, provider: str, noise: str, threads: int) -> None:
    torch.set_num_threads(threads)
    # Thread pools, autograd's engine and the code that libraries generate come up on a smaller problem.
    warm = case._replace(M=min(case.M, 64), N=min(case.N, 256), K=min(case.K, 256))
    problem, chosen = _step(warm, "cpu", provider, noise)
    chosen.make(problem, noise).step(0)
    problem, chosen = _step(case, "cpu", provider, noise)
    before = _status("VmRSS")
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again from here
    except OSError:
        sender.send(None)
        return
    step = chosen.make(problem, noise).step(0)
    sender.send(_status("VmHWM") - before)
    del step


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024
