"""Compiles kernels of the Triton backend without a launch: before anything is timed, or where there is no GPU.

What is compiled lies in Triton's cache on disk afterwards, where the process that measures finds it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from ..shapes import Case

DEVICE = "cuda"  # gpu/pack.py has none


class Chip(NamedTuple):
    processors: int
    shared: int  # bytes for one block
    lanes: int  # of a warp
    registers: int  # of a thread


CHIPS = {
    "sm80": Chip(108, 99 << 10, 32, 255),  # of sm_86 and sm_89, which take its tiles; its own are 163 KiB
    "sm90": Chip(132, 227 << 10, 32, 255),
    "sm100": Chip(148, 227 << 10, 32, 255),
    "sm120": Chip(188, 99 << 10, 32, 255),
    "gfx942": Chip(304, 64 << 10, 64, 512),
}


def compile_for(architecture: str, pretended: Any = None) -> None:
    """Triton and the launchers take this GPU for the current one. pretended: their driver; None = as much of one as
    compiling needs."""
    from flatlora_kernels.triton_kernels import launch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    chip, index = CHIPS[architecture], list(CHIPS).index(architecture)
    kind, name = ("cuda", int(architecture[2:])) if architecture.startswith("sm") else ("hip", architecture)
    target, machine = GPUTarget(kind, name, chip.lanes), launch.Machine(architecture, chip.processors)
    pretended = pretended or SimpleNamespace()
    pretended.get_current_device = lambda: index
    pretended.get_current_stream = lambda device=None: 0
    pretended.get_current_target = lambda: target
    driver.set_active(pretended)
    launch._machine = lambda index: machine
    launch.forget()


class Job(NamedTuple):
    """The kernels of one case."""

    case: Any  # of shapes, of quantized or of mixture
    noise: str
    what: str = "fused"  # provider, or "panel"; "noise_scale": its refresh; a way of quantized or mixture
    tile: Any = None  # triton_kernels.configs.Config; None = what the table says
    precision: str = "highest"  # of torch.set_float32_matmul_precision


class Outcome(NamedTuple):
    """The worst of a job's kernels; numbers are None where nothing was compiled."""

    error: str | None = None
    registers: int | None = None  # of a thread
    spilled: int | None = None  # 4-byte words of a thread in local memory
    shared: int | None = None  # bytes of a block


@contextlib.contextmanager
def using(tile: Any) -> Iterator[None]:
    """Products of the Triton backend inside are cut by this tile, whatever the table says; None = by the table."""
    if tile is None:
        yield
        return
    from flatlora_kernels.triton_kernels import configs, launch

    def linear(
        architecture: str, kind: str, direction: str, samples: int, rows: int, outputs: int, *rest: Any
    ) -> tuple[Any, int]:
        return tile, samples * -(-rows // tile.block_m) * -(-outputs // tile.block_out)

    launch.forget()
    try:
        with mock.patch.object(configs, "linear", linear):
            yield
    finally:
        launch.forget()


@contextlib.contextmanager
def compiling() -> Iterator[list[Any]]:
    """Launches of Triton kernels inside are compiled, not run; yields the compiled kernels."""
    from flatlora_kernels.triton_kernels import launch

    seen: list[Any] = []
    with launch.instead(lambda kernel, arguments, compile: seen.append(compile())):
        yield seen


@functools.lru_cache(1)
def _problem(case: Case) -> Any:
    from ..problem import Problem

    return Problem(case, DEVICE, copies=1)


def step(job: Job) -> None:
    """What the benchmark calls."""
    import flatlora_kernels as fk

    from .. import mixture, quantized
    from ..problem import SCALING, SIGMA
    from ..providers import Fused, Perturb

    if isinstance(job.case, quantized.Case):
        quantized.way(quantized.Layer(job.case, 0), job.what, job.case)()
        return
    if isinstance(job.case, mixture.Case):
        mixture.way(mixture.Layer(job.case, 0), job.what)()
        return
    problem = _problem(job.case)
    if job.what == "noise_scale":
        i = problem.inputs[0]
        fk.flat_noise_scale(i.weight, i.lora_A, i.lora_B, scaling=SCALING, sigma=SIGMA, backend="triton")
        return
    perturbs = job.what == "perturb"
    run = Perturb(problem, job.noise, "triton") if perturbs else Fused(problem, job.noise, "triton", job.what)
    run.step(0)
    if job.tile is None:
        run.eps(0)  # for the gate


def work(job: Job) -> Outcome:
    """In a process of the pool. Nothing is launched: a wrong kernel does no harm here."""
    torch.set_float32_matmul_precision(job.precision)
    try:
        with using(job.tile), compiling() as kernels:
            step(job)
            for kernel in kernels:
                kernel._init_handles()  # says what the driver would say on launching
        numbers = [(k.n_regs, k.n_spills, k.metadata.shared) for k in kernels]
        return Outcome(None, *map(max, *numbers, (0, 0, 0))) if numbers else Outcome("nothing was compiled")
    except Exception as error:  # whatever the compiler comes up with
        return Outcome(f"{type(error).__name__}: {error}".splitlines()[0][:200])


def pool(processes: int | None = None) -> concurrent.futures.ProcessPoolExecutor:
    """Processes that take `work`, each with a CUDA context of its own; one core is left to whoever measures."""
    count = processes or max(1, min(len(os.sched_getaffinity(0)) - 2, 14))
    return concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def outcome_of(future: concurrent.futures.Future[Outcome]) -> Outcome:
    """Of a future that is done; a process that died is an outcome as well."""
    try:
        return future.result()
    except Exception as error:
        return Outcome(f"{type(error).__name__}: {error}")


def table_jobs(cases: list[Case], noises: tuple[str, ...]) -> list[Job]:
    """What a run of the benchmark launches: the cases, their rivals, the generator alone, noise_scale, the overhead."""
    jobs = [Job(case, noise) for case in cases for noise in noises]
    for case in cases:
        one = case._replace(M=1, mode="forward", rank=0)
        jobs += [Job(size, noise, "perturb") for size in (one, one._replace(N=1, K=8)) for noise in noises]
        jobs.append(Job(case._replace(M=1, mode="forward"), "gaussian", "noise_scale"))
    jobs.append(Job(Case("overhead", "", 1, 8, 8, "float32", "forward+backward", 0), "gaussian"))
    precision = torch.get_float32_matmul_precision()
    return [job._replace(precision=precision) for job in dict.fromkeys(jobs)]


def run(jobs: list[Job], processes: int | None = None, time_limit: float = 120.0) -> list[str]:
    """Lines on what went wrong; at the limit what is not begun is left to whoever needs it."""
    found = []
    with pool(processes) as workers:
        futures = {workers.submit(work, job): job for job in jobs}
        done, pending = concurrent.futures.wait(futures, timeout=time_limit)
        for future in done:
            job, outcome = futures[future], outcome_of(future)
            if wrong := outcome.error or (outcome.spilled and f"{outcome.spilled} words spilled"):
                found.append(f"{job.case}, {job.noise}: {wrong}")
        if pending:
            found.append(f"{len(pending)} of {len(jobs)} not compiled in {time_limit:.0f} s")
            workers.shutdown(wait=False, cancel_futures=True)
    return found
