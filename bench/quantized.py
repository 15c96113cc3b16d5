"""A layer on a packed weight under noise, against the library that owns the weight, which has none.

Ways, of one layer whose weight bitsandbytes or torchao packed:

    dense      F.linear with the values, in memory before the clock starts
    owner      the library's own layer, no adapter
    op         fused_flat_lora_linear on the packed weight, noise_scale given, no adapter
    panel      the same, strategy="panel"
    qlora      PEFT's LoRA layer over the owner's, no noise
    flat_lora  the same layer after apply_flat_lora

Ratios of `op` and `panel` are to `owner`, those of `flat_lora` to `qlora`, each within a round.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatlora_kernels as fk

from . import environment, memory, results, timing
from .table import markdown

SIGMA, RANK, COPIES = 0.1, 16, 3
FORMATS = ("nf4", "int8", "fp8")
MODES = ("forward", "forward+backward")
WAYS = ("dense", "owner", "op", "panel", "qlora", "flat_lora")
BASES = {"op": "owner", "panel": "owner", "flat_lora": "qlora"}
COLUMNS = (
    "device", "format", "dtype", "M", "N", "K", "mode", "noise", "way", "rounds", "median_us", "p20_us", "p80_us",
    "to_base", "to_base_p20", "to_base_p80", "peak_extra_bytes",
)  # fmt: skip
_NEEDS = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
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


def missing(format: str) -> str | None:
    """What is not installed for this format, or None."""
    name = _NEEDS[format]
    return None if importlib.util.find_spec(name) else f"{name} is not installed (pip install {name})"


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
        g = torch.Generator().manual_seed(number)
        weight = torch.empty(case.N, case.K).normal_(0, case.K**-0.5, generator=g).to(case.device, dtype)
        self.base = packed_layer(weight, case.format)
        self.weight = fk.QuantizedWeight.of(self.base)
        self.backward = case.mode == "forward+backward"
        self.x = torch.empty(case.M, case.K).normal_(generator=g).to(case.device, dtype)
        self.x.requires_grad_(self.backward)
        self.grad_y = torch.empty(case.M, case.N).normal_(generator=g).to(case.device, dtype)
        self.draw = {
            "noise_scale": fk.flat_noise_scale(self.weight, sigma=SIGMA),
            "seed": torch.tensor(number, device=case.device),
            "noise": case.noise,
        }

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
    if name == "dense":
        values = layer.weight.dequantize()
        return lambda: layer.step(lambda x: F.linear(x, values), leaves)
    if name == "owner":
        layer.base.train()
        return lambda: layer.step(layer.base, leaves)
    if name in ("op", "panel"):
        strategy = None if name == "op" else "panel"

        def op(x: Tensor) -> Tensor:
            return fk.fused_flat_lora_linear(x, layer.weight, strategy=strategy, **layer.draw)

        return lambda: layer.step(op, leaves)
    model = layer.with_adapter(case.noise if name == "flat_lora" else None)
    leaves += [p for p in model.parameters() if p.requires_grad]
    return lambda: layer.step(model, leaves)


def check(layer: Layer, y: Tensor) -> None:
    """That of the op against float64 of the values and the op's own noise."""
    values = layer.weight.dequantize()
    perturbed = fk.perturb_weight(values, **layer.draw).double()
    expected = layer.x.detach().double() @ perturbed.t()
    error = float((y.double() - expected).abs().max() / expected.abs().max())
    limit = _TOLERANCE[values.dtype]
    if not error <= limit:
        raise ValueError(
            f"op: expected the product with the values within {limit} of its largest, got {error}"
        )


def _peak(case: Case, name: str) -> int | None:
    small = case._replace(M=min(case.M, 64), N=256, K=256)
    way(Layer(small, 0), name, small)()
    return memory.peak_of(way(Layer(case, 0), name, case), case.device)


def rows_of(case: Case, ways: list[str], budget: float, measure_memory: bool) -> list[results.Row]:
    """A row to each way, all in turns."""
    copies = {name: [way(Layer(case, number), name, case) for number in range(COPIES)] for name in ways}
    for name in ("op", "panel"):
        if name in ways:
            check(Layer(case, 0), copies[name][0]())
    calls: dict[str, timing.Call] = {
        name: (lambda copy, steps=steps: steps[copy]())
        for name, steps in copies.items()  # type: ignore[misc]
    }
    rounds = timing.interleaved(calls, timing.timer(case.device), COPIES, budget, 5, 200)
    rows = []
    for name in ways:
        base = BASES.get(name)
        row = {**case._asdict(), "way": name}
        row |= timing.row(rounds, name, {"base": base} if base in ways else {})
        if measure_memory:
            measure = memory.in_fresh_process if case.device == "cpu" else lambda peak, *of: peak(*of)
            row["peak_extra_bytes"] = measure(_peak, case, name)
        rows.append(row)
    return rows


def table(rows: list[results.Row]) -> str:
    """A line to each case and noise, a column to each way: its time, or its ratio to the base."""
    names = list(dict.fromkeys(row["way"] for row in rows))
    cases = dict.fromkeys(tuple(row[field] for field in Case._fields) for row in rows)
    lines = []
    for case in cases:
        found = {r["way"]: r for r in rows if tuple(r[field] for field in Case._fields) == case}
        cells = []
        for name in names:
            row = found[name]
            cell = f"{row['to_base']:.2f}" if "to_base" in row else f"{row['median_us']:,.0f} us"
            peak = row.get("peak_extra_bytes")
            cells.append(cell + (f" ({peak / 2**20:.1f} MiB)" if peak is not None else ""))
        lines.append([*map(str, case), *cells])
    return markdown([*Case._fields, *names], lines)


def main(args: argparse.Namespace) -> int:
    meta = environment.describe(args.device)
    rows: list[results.Row] = []
    for format in args.formats:
        if reason := missing(format):
            print(f"left out: {format}: {reason}")
            continue
        for dtype in args.dtypes:
            for M in args.m:
                for mode in args.modes:
                    for noise in args.noise:
                        case = Case(args.device, format, dtype, M, args.size, args.size, mode, noise)
                        rows += rows_of(case, args.ways, args.budget, args.memory)
                        print(table(rows[-len(args.ways) :]), flush=True)
    stem = results.file_stem(args, meta, "quantized")
    columns = [*COLUMNS, "date", "hardware", "threads", "torch", "flatlora_kernels", "commit", "dirty"]
    about = {name: meta.get(name) for name in columns[len(COLUMNS) :]}
    results.write_csv([{**row, **about} for row in rows], columns, stem.with_name(stem.name + ".csv"))
    print(table(rows))
    return 0
