"""What is timed by itself: a call before any arithmetic, the generator, the refresh of noise_scale."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import flatlora_kernels as fk

from . import providers, timing
from .problem import SCALING, SIGMA, Problem
from .providers import NOISELESS, Fused, Peft, Unfit
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
    """A layer of 8 x 8 and one row, where all of the time is a call's own.

    F.linear; each backend without an adapter, with a tensor seed, an int seed and no noise; and with an adapter of
    rank 4 the op, `FlatLoraLinear`, and PEFT's LoRA layer, whose time these two should not exceed. A backward makes
    the gradients of x and of the adapter.
    """
    case = Case("", "", 1, 8, 8, "float32", "forward+backward", 4)
    problem = Problem(case, device, copies=1)
    i = problem.inputs[0]
    weight, scale, seed, adapter = i.weight, torch.ones_like(i.noise_scale), i.seed, (i.lora_A, i.lora_B)
    # Provider, noise, rank -> what is called, and what is differentiated beside x.
    calls: dict[tuple[str, str, int], tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]] = {
        ("F.linear", NOISELESS, 0): (lambda x: F.linear(x, weight), ())
    }
    with contextlib.suppress(Unfit):
        peft = Peft(problem, NOISELESS)
        calls["peft", NOISELESS, case.rank] = peft.layers[0], tuple(peft.leaves(0)[1:])
    for name in backends:
        for more in ((), adapter):
            fused = functools.partial(fk.fused_flat_lora_linear, backend=name, scaling=SCALING)
            noisy = functools.partial(fused, noise_scale=scale)
            for what, noise, call in (
                ("", "gaussian", functools.partial(noisy, seed=seed)),
                (", int seed", "gaussian", functools.partial(noisy, seed=1)),
                ("", NOISELESS, fused),
            ):
                of_the_op = functools.partial(_of_the_op, call, weight, more)
                calls[f"fused:{name}{what}", noise, case.rank * bool(more)] = of_the_op, more
        for noise in ("gaussian", NOISELESS):
            layer = fk.FlatLoraLinear(weight, r=case.rank, backend=name).train(noise != NOISELESS)
            calls[f"layer:{name}", noise, case.rank] = layer, (layer.lora_A, layer.lora_B)

    # On a CPU the calling thread does it all, and what other programs take of the processor does not count.
    clock = time.thread_time if device == "cpu" else time.perf_counter

    def timer(call: timing.Call, copy: int) -> float:
        """Host time per call. On a GPU that is the time to launch; the device catches up between readings."""
        start = clock()
        for _ in range(_LOOP):
            call(copy)
        stop = clock()
        timing.synchronize(device)
        return (stop - start) / _LOOP

    x, leaf = i.x.detach(), i.x

    def step(call: Callable[[Tensor], Tensor], leaves: tuple[Tensor, ...], mode: str) -> timing.Call:
        if mode == "forward":
            return torch.no_grad()(lambda _: call(x))
        return lambda _: torch.autograd.grad(call(leaf), (leaf, *leaves), i.grad_y)

    rows, peft_layer = [], f"peft {NOISELESS} {case.rank}"
    about = {"kind": "overhead", "M": 1, "N": 8, "K": 8, "dtype": "float32"}
    for mode in TRAINING:
        steps = {" ".join(map(str, of)): step(*call, mode) for of, call in calls.items()}
        timed = timing.interleaved(steps, timer, 1, 1.0, _ROUNDS, _ROUNDS)
        for (provider, noise, rank), label in zip(calls, steps, strict=True):
            over = Spread.of([r[label] - r[f"F.linear {NOISELESS} 0"] for r in timed])
            row = {**about, "rank": rank, "mode": mode, "noise": noise, "provider": provider}
            row |= timing.row(timed, label, {"peft": peft_layer} if peft_layer in steps and rank else {})
            rows.append(row | {"over_linear_us": over.median * 1e6})
    return rows


def _of_the_op(call: Callable[..., Tensor], weight: Tensor, adapter: tuple[Tensor, ...], x: Tensor) -> Tensor:
    return call(x, weight, *adapter)


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
        if noise in providers.NORMAL:
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
