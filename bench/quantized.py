"""A layer on a packed weight under noise, against the library that owns the weight, which has none.

Ways, of one layer whose weight bitsandbytes or torchao packed:

    dense      F.linear with the values, in memory before the clock starts
    owner      the library's own layer, no adapter
    op         fused_flat_lora_linear on the packed weight, noise_scale given, no adapter
    panel      the same, strategy="panel"
    fused      the same, strategy="fused", of hadamard "transform"
    decode     all values written to memory by the kernel that fills panels, no noise, then F.linear; the
               backward pass finds them there: the least that dequantise-then-multiply costs
    qlora      PEFT's LoRA layer over the owner's, no noise
    flat_lora  the same layer after apply_flat_lora

"op:cuda" is the op on that backend; panel, fused and decode likewise. `base` names the way that a ratio,
taken within a round, is to: `owner`, and `qlora` for `flat_lora`.

Where the library is not installed, or with --own, `QuantizedWeight.quantize` packs the weight (`packed_by`
says so; its NF4 has a float32 for each block, where bitsandbytes packs these as well). Then nothing of a
library is timed, and all ratios are to `dense`. On a GPU that is a harder rival than a library's layer, which
decodes first.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatlora_kernels as fk
from flatlora_kernels import backends
from flatlora_kernels.choice import resolve

from . import memory, results, run, timing, ways
from .machine_code.precompile import Job

SIGMA, RANK, COPIES = 0.1, 16, 3
FORMATS = ("nf4", "int8", "fp8")
MODES = ("forward", "forward+backward")
WAYS = ("dense", "owner", "op", "panel", "qlora", "flat_lora")  # where nobody asks for others
WAYS_ALONE = ("dense", "decode", "op", "panel")  # the same where no library packs
OF_BACKENDS = ("op", "panel", "fused", "decode")
CHOICES = (*WAYS, "fused", "decode", *(f"{way}:{name}" for way in OF_BACKENDS for name in backends.names()))
BASES = {"op": "owner", "panel": "owner", "fused": "owner", "decode": "owner", "flat_lora": "qlora"}
OWN = "flatlora_kernels"  # as who packs
_NEEDS = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
_ADAPTED = ("qlora", "flat_lora")
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest output


class Case(NamedTuple):
    device: str
    format: str
    dtype: str
    M: int
    N: int
    K: int
    mode: str
    noise: str
    packed_by: str  # a library, or OWN


def _not_installed(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"{name} is not installed (pip install {name})"


def missing(format: str) -> str | None:
    """What is not installed for this format, or None."""
    return _not_installed(_NEEDS[format])


def chosen(format: str, asked: list[str] | None, own: bool) -> tuple[str, list[str], str]:
    """Who packs, the ways that are there of those asked for, and a sentence on what is not, or "".

    asked: None = nobody asked. own: the weight is packed here in any case.
    """
    reason = "--own" if own else missing(format)
    if reason:
        names = [name for name in asked or WAYS_ALONE if name not in ("owner", *_ADAPTED)]
        return OWN, names, f"{reason}: packed here, without owner, qlora and flat_lora; ratios are to dense"
    names, reason = list(asked or WAYS), _not_installed("peft")
    if reason and not set(_ADAPTED).isdisjoint(names):
        return (
            _NEEDS[format],
            [w for w in names if w not in _ADAPTED],
            f"{reason}: without qlora and flat_lora",
        )
    return _NEEDS[format], names, ""


def base_of(name: str, case: Case) -> str | None:
    """The way that the ratio of this one is to."""
    if case.packed_by == OWN:
        return None if name == "dense" else "dense"
    return BASES.get(name.partition(":")[0])


def packed_layer(weight: Tensor, format: str) -> nn.Module:
    """A layer without bias whose weight its library has packed."""
    N, K = weight.shape
    if format == "nf4":
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        return layer.to(weight.device)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(K, N, bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(
        layer, Int8WeightOnlyConfig(version=2) if format == "int8" else Float8WeightOnlyConfig(version=2)
    )
    return layer


class Layer:
    """One copy of a case's inputs, and what computes on it."""

    def __init__(self, case: Case, number: int) -> None:
        dtype = getattr(torch, case.dtype)
        g = torch.Generator(case.device).manual_seed(number)

        def normal(rows: int, cols: int, std: float = 1.0) -> Tensor:
            return torch.empty(rows, cols, device=case.device).normal_(0, std, generator=g).to(dtype)

        weight = normal(case.N, case.K, case.K**-0.5)
        if case.packed_by == OWN:
            self.weight = fk.QuantizedWeight.quantize(weight, case.format)
        else:
            self.base = packed_layer(weight, case.format)
            self.weight = fk.QuantizedWeight.of(self.base)
        self.backward = case.mode == "forward+backward"
        self.x = normal(case.M, case.K).requires_grad_(self.backward)
        self.grad_y = normal(case.M, case.N)
        self.draw = {
            "noise_scale": fk.flat_noise_scale(self.weight, sigma=SIGMA),
            "seed": torch.tensor(number, device=case.device),
            "noise": case.noise,
        }

    @functools.cached_property
    def values(self) -> Tensor:
        return self.weight.dequantize()

    def with_adapter(self, noise: str | None) -> nn.Module:
        """PEFT's layer over the owner's, after apply_flat_lora where there is noise."""
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"])
        model = nn.Sequential(self.base)
        model.is_loaded_in_4bit = self.weight.packing.bits == 4  # type: ignore[assignment]  # PEFT goes by it
        model = peft.inject_adapter_in_model(config, model)
        nn.init.normal_(model[0].lora_B["default"].weight, 0, 0.02)
        if noise is not None:
            from flatlora_kernels.integrations.peft import apply_flat_lora

            apply_flat_lora(model, sigma=SIGMA, noise=noise, verbose=False).advance()
        return model.train()

    def step(self, call: Callable[[Tensor], Tensor], leaves: list[Tensor]) -> Tensor:
        if not self.backward:
            with torch.no_grad():
                return call(self.x)
        y = call(self.x)
        torch.autograd.grad(y, leaves, self.grad_y.to(y.dtype))
        return y.detach()


def way(layer: Layer, name: str, case: Case) -> Callable[[], Tensor]:
    """A step of this way."""
    leaves = [layer.x]
    kind, _, backend = name.partition(":")
    if name == "dense":
        values = layer.values
        return lambda: layer.step(lambda x: F.linear(x, values), leaves)
    if name == "owner":
        layer.base.train()
        return lambda: layer.step(layer.base, leaves)
    if kind == "decode":
        q = layer.weight
        found = resolve.resolve(backend or None, "panel", None, case.device, q.dtype, q.numel(), case.noise)
        decode = backends.get(found.backend).perturb

        def decoded(x: Tensor) -> Tensor:
            values = q.new_empty(q.shape)
            decode(q, None, values)
            return F.linear(x, values)

        return lambda: layer.step(decoded, leaves)
    if kind in OF_BACKENDS:
        fused = "transform" if case.noise == "hadamard" else "fused"
        strategy = {"op": None, "panel": "panel", "fused": fused}[kind]

        def op(x: Tensor) -> Tensor:
            return fk.fused_flat_lora_linear(
                x, layer.weight, strategy=strategy, backend=backend or None, **layer.draw
            )

        return lambda: layer.step(op, leaves)
    model = layer.with_adapter(case.noise if name == "flat_lora" else None)
    leaves += [p for p in model.parameters() if p.requires_grad]
    return lambda: layer.step(model, leaves)


def expected(layer: Layer, name: str) -> Tensor:
    """What a way without an adapter computes, by float64 of the values, and of the op's own noise."""
    values = layer.values if name.startswith("decode") else fk.perturb_weight(layer.values, **layer.draw)
    return layer.x.detach().double() @ values.double().t()


def check(layer: Layer, y: Tensor, name: str = "op") -> None:
    """That of `name` against what is expected."""
    exact = expected(layer, name)
    error = float((y.double() - exact).abs().max() / exact.abs().max())
    limit = _TOLERANCE[y.dtype]
    if not error <= limit:
        raise ValueError(
            f"{name}: expected the product with the values within {limit} of its largest, got {error}"
        )


def _peak(case: Case, name: str) -> int | None:
    small = case._replace(M=min(case.M, 64), N=256, K=256)
    way(Layer(small, 0), name, small)()
    return memory.peak_of(way(Layer(case, 0), name, case), case.device)


def rows_of(
    case: Case, names: list[str], budget: float, measure_memory: bool, timer: timing.Timer
) -> tuple[list[results.Row], list[str]]:
    """A row to each way, all in turns, and a line to each that failed."""
    shared = [Layer(case, number) for number in range(COPIES)] if case.packed_by == OWN else None

    def made(name: str) -> timing.Call:
        layers = shared or [Layer(case, number) for number in range(COPIES)]
        steps = [way(layer, name, case) for layer in layers]
        y = steps[0]()
        if name.partition(":")[0] in OF_BACKENDS:
            check(layers[0], y, name)
        return lambda copy: steps[copy]()

    peak = _peak if measure_memory else None
    return ways.rows_of(case, names, made, lambda name: base_of(name, case), peak, budget, COPIES, timer)


def _cases(args: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """With the ways of each; says what is left out."""
    found = []
    for format in args.formats:
        packed_by, names, reason = chosen(format, args.ways, args.own)
        if reason:
            print(f"{format}: {reason}", flush=True)
        of = itertools.product(args.dtypes, args.m, args.modes, args.noise)
        for dtype, M, mode, noise in of if names else ():
            found.append(
                (Case(args.device, format, dtype, M, args.size, args.size, mode, noise, packed_by), names)
            )
    return found


def jobs(cases: list[tuple[Case, list[str]]]) -> list[Job]:
    """The Triton kernels of the ways that name their backend.

    A step with its backward pass has those of the forward; what writes slices does not depend on the rows of x.
    """
    known = {case for case, _ in cases}
    found = []
    for case, names in cases:
        if case.mode == "forward" and case._replace(mode="forward+backward") in known:
            continue
        for name in names:
            kind, _, backend = name.partition(":")
            if backend == "triton":
                found.append(Job(case if kind in ("op", "fused") else case._replace(M=16), case.noise, name))
    return list(dict.fromkeys(found))


def main(args: argparse.Namespace) -> int:
    start, cases = time.perf_counter(), _cases(args)
    of = dict(cases)
    run.compile_jobs(args.device, jobs(cases))

    def rows_of_case(case: Case, timer: timing.Timer) -> tuple[list[results.Row], list[str]]:
        return rows_of(case, of[case], args.budget, args.memory, timer)

    return ways.run(
        args, "quantized", list(of), rows_of_case, Case._fields, ("base", "packed_by"), start=start
    )
