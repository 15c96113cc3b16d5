"""What is timed by itself: a call before any arithmetic, the generator, the refresh of noise_scale."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import flatlora_kernels as fk

from . import timing
from .problem import SCALING, SIGMA, Problem
from .providers import NOISELESS, Fused, Unfit
from .results import Row
from .run import Bench
from .shapes import TRAINING, Case
from .timing import Spread

# In a core's cache, and from memory.
GENERATOR_SHAPES = {"cpu": ((128, 512), (2048, 2048)), "cuda": ((2048, 2048), (4096, 4096))}
_LOOP = 25  # calls per reading of the overhead
_ROUNDS = 40


def measure(bench: Bench, cases: Sequence[Case]) -> None:
    """All of them, for the layers and types of `cases`."""
    note = bench.progress.note
    note("overhead per call")
    bench.rows += overhead(_backends(bench), bench.settings.device)
    for dtype in dict.fromkeys(c.dtype for c in cases):
        note(f"noise generator, {dtype}")
        for N, K in GENERATOR_SHAPES[bench.settings.device]:
            bench.rows += generator(bench, N, K, dtype)
    for layer in dict.fromkeys(c._replace(M=1, mode="forward") for c in cases):
        note(f"noise_scale, {layer.model} {layer.layer}, {layer.dtype}, rank {layer.rank}")
        bench.rows += noise_scale(bench, layer)


def overhead(backends: list[str], device: str) -> list[Row]:
    """A layer of 8 x 8 and one row: F.linear, and each backend with a tensor seed, an int seed and no noise."""
    x, grad_y = torch.randn(1, 8, device=device), torch.randn(1, 8, device=device)
    weight, scale = torch.randn(8, 8, device=device), torch.ones(8, device=device)
    seed = torch.tensor(1, device=device)
    leaf = x.clone().requires_grad_()

    calls: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
        ("F.linear", NOISELESS): lambda input: F.linear(input, weight)
    }
    for name in backends:
        fused = functools.partial(fk.fused_flat_lora_linear, weight=weight, backend=name)
        calls[f"fused:{name}", "gaussian"] = functools.partial(fused, noise_scale=scale, seed=seed)
        calls[f"fused:{name}, int seed", "gaussian"] = functools.partial(fused, noise_scale=scale, seed=1)
        calls[f"fused:{name}", NOISELESS] = fused

    def timer(call: timing.Call, copy: int) -> float:
        """Host time per call. On a GPU that is the time to launch; the device catches up between readings."""
        start = time.perf_counter()
        for _ in range(_LOOP):
            call(copy)
        stop = time.perf_counter()
        timing.synchronize(device)
        return (stop - start) / _LOOP

    def step(call: Callable[[Tensor], Tensor], mode: str) -> timing.Call:
        if mode == "forward":
            return torch.no_grad()(lambda _: call(x))
        return lambda _: torch.autograd.grad(call(leaf), leaf, grad_y)

    rows = []
    about = {"kind": "overhead", "M": 1, "N": 8, "K": 8, "dtype": "float32", "rank": 0}
    for mode in TRAINING:
        steps = {" ".join(label): step(call, mode) for label, call in calls.items()}
        timed = timing.interleaved(steps, timer, 1, 1.0, _ROUNDS, _ROUNDS)
        for (provider, noise), label in zip(calls, steps, strict=True):
            over = Spread.of([r[label] - r[f"F.linear {NOISELESS}"] for r in timed])
            row = {**about, "mode": mode, "noise": noise, "provider": provider, **timing.row(timed, label)}
            rows.append(row | {"over_linear_us": over.median * 1e6})
    return rows


def noise_scale(bench: Bench, case: Case) -> list[Row]:
    """What a refresh of `noise_scale` costs: it is not part of the other times."""
    problem = Problem(case._replace(M=1, mode="forward"), bench.settings.device)

    def by_torch(copy: int) -> None:
        i = problem.inputs[copy]
        merged = i.weight
        if i.lora_A is not None:
            merged = torch.addmm(merged, i.lora_B, i.lora_A, alpha=SCALING)
        torch.linalg.vector_norm(merged, dim=1, dtype=torch.float32).mul_(SIGMA * case.K**-0.5)

    def refresh(name: str, copy: int) -> None:
        i = problem.inputs[copy]
        fk.flat_noise_scale(i.weight, i.lora_A, i.lora_B, scaling=SCALING, sigma=SIGMA, backend=name)

    calls = {"torch": by_torch, **_of_backends(bench, problem, refresh)}
    about = {name: getattr(case, name) for name in ("model", "layer", "N", "K", "dtype", "rank")}
    about |= {"kind": "noise_scale", "noise": NOISELESS}
    rounds = bench.timed(calls)
    return [{**about, "provider": name, **timing.row(rounds, name)} for name in calls]


def generator(bench: Bench, N: int, K: int, dtype: str) -> list[Row]:
    """The noise alone, as one-pass perturb_weight into memory that is there, and by torch's generator."""
    rows = []
    for noise in bench.settings.noises:
        calls = _generate(bench, N, K, dtype, noise)
        empty = {f"empty {name}": call for name, call in _generate(bench, 1, 8, dtype, noise).items()}
        rounds = bench.timed(calls | empty)
        for name in calls:
            row = {"kind": "noise", "N": N, "K": K, "dtype": dtype, "noise": noise, "provider": name}
            row |= timing.row(rounds, name)
            if bench.settings.device == "cpu":
                both = [r for r in rounds if name in r and f"empty {name}" in r]
                net = Spread.of([r[name] - r[f"empty {name}"] for r in both]).median
                row["ns_per_value_core"] = net * 1e9 * torch.get_num_threads() / (N * K)
            rows.append(row)
    return rows


def _generate(bench: Bench, N: int, K: int, dtype: str, noise: str) -> dict[str, timing.Call]:
    problem = Problem(Case("", "", 1, N, K, dtype, "forward", 0), bench.settings.device, copies=1)
    i, torch_generator = problem.inputs[0], torch.Generator(bench.settings.device)
    out = torch.empty_like(i.weight)

    def perturb(name: str, copy: int) -> None:
        fk.perturb_weight(i.weight, i.noise_scale, seed=i.seed, noise=noise, out=out, backend=name)

    def by_torch(copy: int) -> None:
        if noise == "gaussian":
            out.normal_(generator=torch_generator)
        else:
            out.random_(0, 2, generator=torch_generator)

    return {**_of_backends(bench, problem, perturb), "torch": by_torch}


def _of_backends(bench: Bench, problem: Problem, call: Callable[[str, int], None]) -> dict[str, timing.Call]:
    """`call` of the fused providers that fit, by backend name, after a first call."""
    calls = {}
    for name in _backends(bench):
        try:
            Fused(problem, bench.settings.noises[0], name)
            call(name, 0)
            calls[name] = functools.partial(call, name)
        except (Unfit, NotImplementedError) as reason:
            bench.skip(f"fused:{name}: {reason}")
    return calls


def _backends(bench: Bench) -> list[str]:
    return [p.name.partition(":")[2] for p in bench.providers if p.name.startswith("fused:")]
