"""A mixture's experts with adapters under noise, against the vendor's grouped product without.

Ways:

    vendor        torch.nn.functional.grouped_mm with the experts and their adapters, no noise
    materialised  W + eps of all experts in memory, then the same: what noise costs without fusing it
    loop          fused_flat_lora_grouped_linear with ints as offsets: the experts one after the other
    op            the same with a tensor of offsets: all in one launch, where a backend has that

"op:triton" is the op on that backend, loop likewise. Ratios, taken within a round, are to `vendor`. Rows are even, or
fall from the first expert to the last, which has one. `noise_scale` is given, as in training.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels import backends

from . import memory, results, run, timing, ways
from .machine_code.precompile import Job

SIGMA, SCALING, RANK, COPIES = 0.1, 2.0, 16, 2
RESULTS = ("y", "dX", "dA", "dB")
MODES = ("forward", "forward+backward")
ROUTINGS = ("even", "falling")
WAYS = ("vendor", "materialised", "loop", "op")
CHOICES = (*WAYS, *(f"{way}:{name}" for way in ("loop", "op") for name in backends.names()))
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest output


class Case(NamedTuple):
    device: str
    dtype: str
    experts: int
    M: int  # rows of all experts
    N: int
    K: int
    routing: str
    mode: str
    noise: str


def ends_of(case: Case) -> list[int]:
    """Where each expert's rows end."""
    E = case.experts
    shares = [1] * E if case.routing == "even" else [E - e for e in range(E)]
    ends = [case.M * done // sum(shares) for done in itertools.accumulate(shares)]
    if case.routing == "falling":
        ends[-2] = case.M - 1
    return ends


class Layer:
    """One copy of a case's inputs."""

    def __init__(self, case: Case, number: int) -> None:
        dtype = getattr(torch, case.dtype)
        g = torch.Generator(case.device).manual_seed(number)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            return torch.empty(*size, device=case.device).normal_(0, std, generator=g).to(dtype)

        E, N, K = case.experts, case.N, case.K
        backward = case.mode == "forward+backward"
        self.weight = normal(E, N, K, std=K**-0.5)
        self.lora_A = normal(E, RANK, K, std=K**-0.5).requires_grad_(backward)
        self.lora_B = normal(E, N, RANK, std=0.02).requires_grad_(backward)
        self.x = normal(case.M, K).requires_grad_(backward)
        self.grad_y = normal(case.M, N)
        self.host = ends_of(case)
        self.ends = torch.tensor(self.host, dtype=torch.int32, device=case.device)
        self.draw = {
            "noise_scale": fk.grouped_noise_scale(
                self.weight, self.lora_A, self.lora_B, scaling=SCALING, sigma=SIGMA
            ),
            "seed": torch.tensor(number, device=case.device),
            "noise": case.noise,
        }

    def perturbed(self, backend: str | None = None) -> Tensor:
        """W + eps of all experts, (E, N, K)."""
        of = {key: value for key, value in self.draw.items() if key != "noise_scale"}
        scales = self.draw["noise_scale"]
        each = [
            fk.perturb_weight(w, scales[e], stream=e, backend=backend, **of)
            for e, w in enumerate(self.weight)
        ]
        return torch.stack(each)

    def product(self, weight: Tensor) -> Tensor:
        """The vendor's grouped products."""
        u = F.grouped_mm(self.x, self.lora_A.transpose(1, 2), offs=self.ends)
        low = F.grouped_mm(u, self.lora_B.transpose(1, 2), offs=self.ends)
        return F.grouped_mm(self.x, weight.transpose(1, 2), offs=self.ends) + SCALING * low

    def results(self, call: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """y, and of a step with its backward pass dX, dA and dB."""
        if not self.x.requires_grad:
            with torch.no_grad():
                return (call(),)
        y = call()
        return y.detach(), *torch.autograd.grad(y, [self.x, self.lora_A, self.lora_B], self.grad_y)


def way(layer: Layer, name: str, strategy: str | None = None) -> Callable[[], tuple[Tensor, ...]]:
    """A step of this way: what `Layer.results` has."""
    if name == "vendor":
        return lambda: layer.results(lambda: layer.product(layer.weight))
    if name == "materialised":
        return lambda: layer.results(lambda: layer.product(layer.perturbed()))
    kind, _, backend = name.partition(":")
    op = functools.partial(
        fk.fused_flat_lora_grouped_linear,
        layer.x,
        layer.weight,
        layer.lora_A,
        layer.lora_B,
        offsets=layer.ends if kind == "op" else layer.host,
        scaling=SCALING,
        strategy=strategy,
        backend=backend or None,
        **layer.draw,
    )
    return lambda: layer.results(op)


def exact(layer: Layer) -> tuple[Tensor, ...]:
    """What the ways with noise compute, in float64, with the oracle's noise."""
    perturbed, grad_y = layer.perturbed("reference").double(), layer.grad_y.double()
    x, A, B = leaves = [t.detach().double().requires_grad_() for t in (layer.x, layer.lora_A, layer.lora_B)]
    begin, parts = 0, []
    for e, end in enumerate(layer.host):
        parts.append(x[begin:end] @ (perturbed[e] + SCALING * B[e] @ A[e]).t())
        begin = end
    y = torch.cat(parts)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y)


def check(expected: tuple[Tensor, ...], found: tuple[Tensor, ...], name: str) -> None:
    """Results of a way with noise against those of `exact`."""
    for what, value, right in zip(RESULTS, found, expected, strict=False):
        error = float((value.double() - right).abs().max() / right.abs().max())
        limit = _TOLERANCE[value.dtype]
        if not error <= limit:
            raise ValueError(f"{name}: expected {what} within {limit} of its largest value, got {error}")


def _peak(case: Case, name: str) -> int | None:
    way(Layer(case._replace(M=2 * case.experts, N=256, K=256), 0), name)()
    return memory.peak_of(way(Layer(case, 0), name), case.device)


def rows_of(
    case: Case, names: list[str], budget: float, measure_memory: bool, timer: timing.Timer
) -> tuple[list[results.Row], list[str]]:
    """A row to each way, all in turns, and a line to each that failed."""
    layers = [Layer(case, number) for number in range(COPIES)]
    expected = exact(layers[0])

    def made(name: str) -> timing.Call:
        steps = [way(layer, name) for layer in layers]
        found = steps[0]()
        if name != "vendor":
            check(expected, found, name)
        return lambda copy: steps[copy]()

    def base_of(name: str) -> str | None:
        return None if name == "vendor" else "vendor"

    return ways.rows_of(case, names, made, base_of, _peak if measure_memory else None, budget, COPIES, timer)


def cases(args: argparse.Namespace) -> list[Case]:
    of = itertools.product(args.dtypes, args.m, args.routings, args.modes, args.noise)
    return [
        Case(args.device, dtype, args.experts, M, args.n, args.k, routing, mode, noise)
        for dtype, M, routing, mode, noise in of
    ]


def jobs(cases: list[Case], names: list[str]) -> list[Job]:
    """The Triton kernels of the ways that name their backend; a step with its backward pass has the forward's."""
    named = [name for name in names if name.endswith(":triton")]
    both = [case._replace(mode="forward+backward") for case in cases]
    return list(dict.fromkeys(Job(case, case.noise, name) for case in both for name in named))


def main(args: argparse.Namespace) -> int:
    start, wanted = time.perf_counter(), cases(args)
    run.compile_jobs(args.device, jobs(wanted, args.ways))

    def rows_of_case(case: Case, timer: timing.Timer) -> tuple[list[results.Row], list[str]]:
        return rows_of(case, args.ways, args.budget, args.memory, timer)

    return ways.run(args, "mixture", wanted, rows_of_case, Case._fields, ("base",), start=start)
