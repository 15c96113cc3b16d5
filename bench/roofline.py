"""`python -m bench roofline`: what each kernel asks of each unit, the time that implies, and the measurement beside it.

Figures for GPUs are those of choice/cost.py, bfloat16, N = K = 4096, an adapter of rank 16, noise_scale
given. A measurement is taken from bench/results/ where there is one of that GPU: what `bench.truth time` wrote, else a
run of the benchmark. On a CPU the rates of this machine are measured, and the model with these rates is held against
measured calls.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import flatlora_kernels as fk
from flatlora_kernels.choice import cost, resolve
from flatlora_kernels.choice.cost import Call, Chip, Cost, Work
from flatlora_kernels.core.noise import KINDS

from . import environment, run, targets, timing
from .shapes import Case
from .table import markdown

PAGE = "docs/internals/performance.md"
DOC = Path(__file__).parent.parent / PAGE
RESULTS = Path(__file__).parent / "results"
SIZE, RANK = 4096, 16
NF4 = 0.5 + 1 / 64  # bytes of a value; the second part is the scale of its block, a byte
ROWS = (16, 256, 2048, 8192)
CHIPS = tuple(c for c in cost.CHIPS if c.name in ("A100 SXM 80 GB", "H100 SXM", "H200 SXM", "B200 SXM"))
UNITS = ("tensor", "issue", "draw", "shared", "l2", "memory", "step", "launch")
# Name -> backend, way of cost.py, providers of the benchmark that are the same.
WAYS = {
    "plain": ("cuda", "plain", ("plain",)),
    "triton": ("triton", "fused", ("fused:triton",)),
    "cuda": ("cuda", "fused", ("fused:cuda",)),
    "panel": ("cuda", "panel", ("panel:cuda", "panel:triton")),
    "perturb": ("cuda", "perturb", ("perturb:cuda", "perturb:triton")),
}
NOISES = ("gaussian", "rademacher")  # of the tables that say nothing else
_PREDICTED = "**PREDICTED, not measured**"
# What `bench.truth time` calls them -> mode and provider.
_TRUTH = {"plain": ("forward", "plain"), "plain dX": ("input_grad", "plain"), "lora": ("forward", "lora")} | {
    f"{name}{backend} {suffix}": (mode, f"{way}:{backend}")
    for backend in ("triton", "cuda")
    for name, way in (("", "fused"), *((f"{way} ", way) for way in ("panel", "transform", "perturb")))
    for suffix, mode in (("y", "forward"), ("dX", "input_grad"))
}
_OURS = {"triton fused": "fused:triton", "cuda fused": "fused:cuda", "panel": "panel:cuda"}


def call(noise: str, M: int, direction: str = "forward", rank: int = RANK) -> Call:
    return Call(direction, noise, "folded", "bfloat16", M, SIZE, SIZE, rank)


# Instructions of a thread per element of the weight on sm_90, without an adapter and with one of rank 16: of `triton`
# from docs/internals/kernels.md; of `cuda` counted in the loops of row_norms_kernel (78 for 32 elements) and
# row_norms_tile_kernel (at most 690 for 8: some lie behind branches).
ROW_NORMS = {"triton": (3.12, 4.41), "cuda": (2.44, 86.3)}


def row_norms(backend: str, rank: int) -> Work:
    """The refresh of noise_scale, on any of the GPUs."""
    values = SIZE * SIZE
    slots = values * ROW_NORMS[backend][rank > 0] / 32
    read = float(2 * (values + 2 * rank * SIZE))
    # Triton multiplies the adapter by tensor cores; `cuda` does in the instructions that were counted.
    products = 2.0 * values * rank if backend == "triton" else 0.0
    return Work(flops=products, rate=1024, slots=slots, l2=read, memory=read)


class Measurement(NamedTuple):
    seconds: float
    to_plain: float | None


Measurements = dict[tuple[str, str, int, str], Measurement]  # by mode, provider, M, noise


def _measurements(rows: Iterable[dict[str, Any]]) -> Measurements:
    """The first of each; values are numbers, or as a CSV has them."""
    found: Measurements = {}
    for row in rows:
        to_plain = float(row["to_plain"]) if row["to_plain"] else None
        key = (row["mode"], row["provider"], int(row["M"]), row["noise"])
        found.setdefault(key, Measurement(float(row["median_us"]) / 1e6, to_plain))
    return found


def measurements(chip: Chip, folder: Path = RESULTS) -> Measurements:
    """Of the latest run on this GPU, sizes as here; graphs where there are some.

    What `truth` has goes before the benchmark's runs.
    """
    rows = []
    about = {"kind": "linear", "device": "cuda", "dtype": "bfloat16", "N": str(SIZE), "K": str(SIZE)}
    for path in sorted(folder.glob("**/*.csv")):
        with path.open(newline="") as file:
            rows += [
                row for row in csv.DictReader(file)
                if all(row.get(k) == v for k, v in about.items()) and _named(chip, row["hardware"])
                and (row["provider"] == "plain" or row["rank"] == str(RANK))  # plain leaves the adapter out
            ]  # fmt: skip
    rows.sort(key=lambda row: (row["date"], row.get("launch") == "graph"), reverse=True)
    return _measurements(rows) | truth(chip, RANK, folder)


def truth(chip: Chip, rank: int, folder: Path = RESULTS) -> Measurements:
    """The same from truth-time.jsonl of the folder that bears the GPU's name: graphs, a cold L2."""
    rows = []
    for path in sorted(folder.glob("*/truth-time.jsonl")):
        for row in map(json.loads, path.read_text().splitlines() if _named(chip, path.parent.name) else ()):
            mode, provider = _TRUTH.get(row["name"], ("", ""))
            if provider and row["rank"] == rank:
                noise = "none" if provider in ("plain", "lora") else row["noise"]
                rows.append({**row, "mode": mode, "provider": provider, "noise": noise})
    return _measurements(rows)


def _named(chip: Chip, hardware: str) -> bool:
    """ "A100 SXM 80 GB" calls itself NVIDIA A100-SXM4-80GB."""
    name, *rest = chip.name.replace(" GB", "GB").split()
    memory = next((part for part in rest if part.endswith("GB")), "")
    return name in hardware and memory in hardware


def both(values: Iterable[float | str], form: str = "") -> str:
    """Of gaussian and rademacher noise; once where they are the same."""
    return " / ".join(dict.fromkeys(format(value, form) for value in values))


def plain(chip: Chip, M: int, *directions: str) -> float:
    """Seconds of the products without noise."""
    return sum(cost.plain(chip, call("none", M, direction)).seconds for direction in directions)


def _predicted(chip: Chip, name: str, M: int, direction: str) -> list[float]:
    """Seconds with each noise."""
    backend, way, _ = WAYS[name]
    return [cost.cost(chip, backend, way, call(noise, M, direction)).seconds for noise in NOISES]


def _measured(found: Measurements, mode: str, name: str, M: int, noise: str) -> Measurement | None:
    """The fastest of the providers that are the same."""
    kind = "none" if name == "plain" else noise
    values = [found[key] for p in WAYS[name][2] if (key := (mode, p, M, kind)) in found]
    return min(values, default=None)


def _kernels(chip: Chip) -> list[tuple[str, str, list[list[Work]]]]:
    """(name, M, [with gaussian noise, with rademacher]), of a forward and of the passes over the weight."""
    found = [
        (name, str(M), [cost.works(chip, backend, way, call(noise, M))[0] for noise in NOISES])
        for M in ROWS
        for name, (backend, way, _) in WAYS.items()
    ]
    for backend in ("triton", "cuda"):
        one = [[cost.perturb_pass(chip, backend, call(noise, 0), SIZE * SIZE)] for noise in NOISES]
        found.append((f"{backend}: perturb alone", "-", one))
        for rank in (0, RANK):
            name = f"{backend}: row_sq_norms" + (f", rank {rank}" if rank else "")
            found.append((name, "-", [[row_norms(backend, rank)]] * 2))
    return found


def amounts(chip: Chip) -> str:
    """What the kernels of a call ask for."""
    columns = {
        "GFLOP": ("flops", 1e9, ",.1f"), "memory MB": ("memory", 1e6, ",.0f"), "L2 MB": ("l2", 1e6, ",.0f"),
        "shared MB": ("shared", 1e6, ",.0f"), "M instructions": ("slots", 1e6, ",.0f"),
    }  # fmt: skip
    body = []
    for name, M, kernels in _kernels(chip):
        cells = [
            both((sum(getattr(w, field) for w in k) / scale for k in kernels), form)
            for field, scale, form in columns.values()
        ]
        drawn = sum(w.drawing for w in kernels[0]) * cost.DRAWN[NOISES[0]] / 1e6
        body.append([name, M, *cells, f"{drawn:,.0f}", str(len(kernels[0]))])
    return markdown(["kernels", "M", *columns, "M values drawn", "launches"], body)


def roofline(chip: Chip) -> str:
    """Microseconds of each unit, were it alone; the time of all; ratios."""
    found, body = measurements(chip), []
    for name, M, kernels in _kernels(chip):
        costs = [cost.total(chip, k) for k in kernels]
        times, to_plain, measured = [c.seconds for c in costs], "-", "-"
        if M != "-":
            times = _predicted(chip, name, int(M), "forward")
            to_plain = both((t / plain(chip, int(M), "forward") for t in times), ".2f")
            measured = both(_cell(_measured(found, "forward", name, int(M), noise)) for noise in NOISES)
        units = [both((1e6 * c.units[unit] for c in costs), ".1f") for unit in UNITS]
        all_of_it = both((1e6 * t for t in times), ".1f")
        body.append([name, M, *units, all_of_it, both(c.bound for c in costs), to_plain, measured])
    return markdown(["kernels", "M", *UNITS, "time", "bound", "to plain", "measured"], body)


def _cell(found: Measurement | None) -> str:
    if found is None:
        return "-"
    return f"{1e6 * found.seconds:.1f}" + ("" if found.to_plain is None else f" ({found.to_plain:.2f})")


def ratios(direction: str) -> str:
    """To a plain product, all GPUs."""

    def cell(chip: Chip, name: str, M: int) -> str:
        base = plain(chip, M, direction)
        return both((t / base for t in _predicted(chip, name, M, direction)), ".2f")

    lines = [(chip, name) for chip in CHIPS for name in WAYS if name != "plain"]
    body = [[chip.name, name, *(cell(chip, name, M) for M in ROWS)] for chip, name in lines]
    return markdown(["GPU", "kernels", *(f"M = {M}" for M in ROWS)], body)


def kinds() -> str:
    """The fastest of ours for each kind of noise, forward, over a plain product."""
    body = []
    for chip, rank in itertools.product(CHIPS, (0, RANK)):
        for noise in KINDS:
            cells = []
            for M in ROWS:
                times = {
                    (way, backend): cost.cost(chip, backend, way, call(noise, M, rank=rank)).seconds
                    for backend in ("cuda", "triton")
                    for way in resolve.STRATEGIES
                    if (way == "transform") <= (noise == "hadamard") and (way, noise) != ("fused", "hadamard")
                }
                best = min(times, key=lambda way: times[way])
                cells.append(f"{times[best] / plain(chip, M, 'forward'):.2f} {best[0]}")
            body.append([chip.name, str(rank), noise, *cells])
    return markdown(["GPU", "rank", "noise", *(f"M = {M}" for M in ROWS)], body)


def fastest(chip: Chip, of: Call) -> Cost:
    """Of ours."""
    ways = itertools.product(("triton", "cuda"), ("fused", "panel"))
    return min((cost.cost(chip, *way, of) for way in ways), key=lambda c: c.seconds)


def against_targets(chip: Chip) -> str:
    """The fastest of ours as measured, and the targets of a forward; the model's ratio beside each."""
    limits = {(t.noise, t.M, t.base): t.most for t in targets.targets("cuda") if t.mode == "forward"}
    whole, alone = measurements(chip), truth(chip, 0)
    body = []
    for noise, M in itertools.product(NOISES, ROWS):
        times = {name: found for name, p in _OURS.items() if (found := whole.get(("forward", p, M, noise)))}
        at_rank_0 = [found for p in _OURS.values() if (found := alone.get(("forward", p, M, noise)))]
        unfused = _measured(whole, "forward", "perturb", M, noise)
        if not (times and at_rank_0 and unfused):
            continue
        name = min(times, key=lambda n: times[n])
        rival = min(cost.perturb(chip, b, call(noise, M)).seconds for b in ("triton", "cuda"))
        model = fastest(chip, call(noise, M)).seconds
        cells = [noise, str(M), name, f"{min(at_rank_0).to_plain:.2f}"]
        for what, ratio, predicted in (
            ("plain", times[name].to_plain, model / plain(chip, M, "forward")),
            ("rival", times[name].seconds / unfused.seconds, model / rival),
        ):
            most = limits[noise, M, what]
            verdict = "met" if ratio <= most else "missed"  # type: ignore[operator]
            cells += [f"{ratio:.2f}", f"{predicted:.2f}", f"{most:.2f}", verdict]
        body.append(cells)
    header = ["noise", "M", "fastest of ours", "rank 0", f"rank {RANK}", "model", "target", ""]
    return markdown([*header, "to perturb", "model", "target", ""], body)


def residuals(chip: Chip) -> str:
    """Measured microseconds, and the model's time over that."""
    sizes, columns, body = (16, 64, 256, 1024, 2048, 8192), {"forward": "y", "input_grad": "dX"}, []
    for rank, mode, name in itertools.product((0, RANK), columns, WAYS):
        backend, way, _ = WAYS[name]
        if way == "plain" and rank:
            continue
        measured = truth(chip, rank)
        for noise in ("none",) if way == "plain" else NOISES:
            cells = []
            for M in sizes:
                found = _measured(measured, mode, name, M, noise)
                model = cost.cost(chip, backend, way, call(noise, M, mode, rank)).seconds
                cells.append(f"{1e6 * found.seconds:.1f} ({model / found.seconds:.2f})" if found else "-")
            if set(cells) != {"-"}:
                body.append([name, noise, str(rank), columns[mode], *cells])
    return markdown(["kernels", "noise", "rank", "", *(f"M = {M}" for M in sizes)], body)


def step(chip: Chip, M: int, noise: str, code: float = 0.0) -> tuple[Cost, Cost]:
    """Forward and backward of a LoRA layer: ours, and PEFT's without noise (all in bfloat16, no dropout).

    code: bytes of a value where the weight is packed; PEFT's base layer then writes the values out before either
    product.

    PEFT, lora/layer.py, Linear.forward: x W^T, x A^T, u B^T, times scaling, added to the first. Backward: dY times
    scaling, then by B, and its transpose by u; dY W; v A and its sum with that; v^T x. Five and seven launches, as seen
    in torch's dispatcher with PEFT 0.21.2.
    """
    size, N, K, r = 2, SIZE, SIZE, RANK
    whole = M * SIZE * size  # x, y and their gradients
    held = cost.resident(chip, whole)

    def product(outputs: int, length: int, read: int = 0, rows: int = M) -> Work:
        return cost.product(chip, rows, outputs, length, size, read)

    def passes(read: int, hit: int) -> Work:
        """Elementwise: reads so many tensors of M rows, `hit` of them in L2, and writes one."""
        return Work(l2=float((read + 1) * whole), memory=float((read + 1) * whole - hit * held))

    forward = [product(N, K), product(r, K, held), product(N, r), passes(1, 1), passes(2, 1)]
    backward = [passes(1, 0), product(r, N, held), product(r, M, held, rows=N), product(K, N), product(K, r)]
    backward += [passes(2, 1), product(K, M, 0, rows=r)]
    weight = call(noise, M)._replace(code=code)
    unpacked = 2 * [cost.dequantize_pass(chip, weight)] if code else []
    peft = cost.total(chip, unpacked + forward + backward)

    ours = [fastest(chip, call(noise, M, d)._replace(code=code)) for d in ("forward", "input_grad")]
    # v and dB by products.adapter_grads, dA by autograd.py.
    gradients = [product(r, N), product(r, M, held, rows=N), product(K, M, 0, rows=r)]
    rest = cost.total(chip, gradients)
    units = {u: sum(c.units.get(u, 0.0) for c in (*ours, rest)) for u in UNITS}
    units["launch"] -= 2 * cost.CALL  # as PEFT's, all in one graph
    seconds = sum(c.seconds for c in (*ours, rest)) - 2 * cost.CALL
    return Cost(seconds, max(c.workspace for c in ours), "", units), peft


def steps(chip: Chip) -> str:
    body = []
    for M in ROWS:
        peft = step(chip, M, NOISES[0])[1].seconds
        ours = [step(chip, M, noise)[0].seconds for noise in NOISES]
        cells = ([plain(chip, M, "forward", "input_grad")], [peft], ours)
        micro = [both((1e6 * s for s in seconds), ".0f") for seconds in cells]
        body.append([str(M), *micro, both((s / peft for s in ours), ".2f")])
    return markdown(["M", "x W^T and dY W alone", "PEFT, no noise", "ours", "ours / PEFT"], body)


def packed() -> str:
    """NF4 in blocks of 64: ours with noise over QLoRA without, forward and backward of a layer."""
    body = []
    for chip in CHIPS:
        for noise in ("gaussian", "near_gaussian", "rademacher"):
            ratios = []
            for M in ROWS:
                ours, qlora = step(chip, M, noise, NF4)
                ratios.append(f"{ours.seconds / qlora.seconds:.2f}")
            body.append([chip.name, noise, *ratios])
    return markdown(["GPU", "noise", *(f"M = {M}" for M in ROWS)], body)


def measured_chip(budget: float) -> Chip:
    """The CPU of this machine: the bandwidth of a copy, and the rates of torch's products."""
    threads = torch.get_num_threads()
    source, target = torch.randn(1 << 24), torch.empty(1 << 24)
    x, weight = torch.randn(512, 2048), torch.randn(2048, 2048)
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    calls: dict[str, timing.Call] = {
        "copy": lambda _: target.copy_(source),
        "float32": lambda _: F.linear(x, weight),
        "bfloat16": lambda _: F.linear(x16, weight16),
    }
    rounds = timing.interleaved(calls, timing.cpu_timer, 1, budget, 5, 100)
    median = {name: timing.Spread.of(timing.seconds(rounds, name)).median for name in calls}
    macs = 512 * 2048 * 2048 / threads / 1e9
    return cost.CHIPS[-1]._replace(
        name=f"{environment.describe('cpu')['hardware']}, {threads} threads",
        processors=threads,
        bandwidth=8 * source.numel() / median["copy"],
        tensor=round(macs / median["bfloat16"]),
        single=round(macs / median["float32"]),
    )


def cpu(budget: float = 0.4, size: int = 2048, rows: tuple[int, ...] = (16, 256, 2048)) -> str:
    """The model with the rates of this machine against calls measured on it; `budget`: seconds for each."""
    if reason := fk.backend_info()["cpu"]["unavailable"]:
        return f"Backend 'cpu' is not here: {reason}"
    ours = ("fused:cpu", "panel:cpu", "transform:cpu", "perturb:cpu")
    bench = run.Bench(run.Settings("cpu", KINDS, providers=ours, budget=budget), run.Progress(0))
    before = measured_chip(budget)
    for dtype, M in itertools.product(("float32", "bfloat16"), rows):
        bench.linear(Case("", "", M, size, size, dtype, "forward", 0), measure_memory=False)
    after = measured_chip(budget)
    # Rates are what the machine can do: the better of before and after.
    best = {f: max(getattr(before, f), getattr(after, f)) for f in ("bandwidth", "tensor", "single")}
    chip, order = before._replace(**best), ("none", *KINDS)
    body = []
    for row in sorted(bench.rows, key=lambda r: (r["dtype"] != "float32", r["M"], order.index(r["noise"]))):
        way, dtype, M, noise = row["provider"].partition(":")[0], row["dtype"], row["M"], row["noise"]
        of = Call("forward", noise, "folded", dtype, M, size, size)
        predicted, base = cost.cost(chip, "cpu", way, of), cost.plain(chip, of)
        ratio, p20, p80 = (row.get(f"to_plain{part}", 1.0) for part in ("", "_p20", "_p80"))
        body.append([
            dtype, str(M), way, noise, f"{1e6 * predicted.seconds:,.0f}", f"{row['median_us']:,.0f}",
            f"{predicted.seconds / base.seconds:.2f}", f"{ratio:.2f}", f"{p20:.2f} to {p80:.2f}", predicted.bound,
        ])  # fmt: skip
    single, half = (2 * rate * chip.processors for rate in (chip.single, chip.tensor))
    about = (
        f"**Measured** beside predicted: {chip.name}; {chip.bandwidth / 1e9:.1f} GB/s in a copy, both ways; torch's"
        f" product of 512 x 2048 x 2048 {single} GFLOP/s in float32 and {half} in bfloat16; N = K = {size}"
    )
    header = ["dtype", "M", "kernels", "noise", "predicted us", "measured us", "predicted", "measured"]
    return f"{about}\n\n{markdown([*header, 'p20 to p80', 'bound'], body)}"


def gpu_report() -> str:
    h200 = next(c for c in CHIPS if c.name == "H200 SXM")
    unless = f"{_PREDICTED}, but for what an H100 and an H200 calibrate"
    parts = [
        f"**Measured** on an H200, beside its targets, which are for rank {RANK}; ratios to plain, and to `perturb`",
        against_targets(h200),
        "**Measured** on an H200, microseconds (and the model's time over that)",
        residuals(h200),
        f"{unless}: forward over a plain product",
        ratios("forward"),
        f"{unless}: input gradient over a plain product",
        ratios("input_grad"),
        f"{_PREDICTED}, near_gaussian and hadamard from estimated counts: fastest of ours forward over a plain product",
        kinds(),
        f"{_PREDICTED}: forward and backward of a layer on an H200, microseconds",
        steps(h200),
        f"{_PREDICTED}: forward and backward of a layer on NF4 with noise, over QLoRA's without",
        packed(),
        f"{_PREDICTED}: what the kernels of a forward ask for, in the tiles for an H200",
        amounts(h200),
    ]
    for chip in CHIPS:
        about = f"{chip.processors} processors, {chip.clock / 1e9:g} GHz, {chip.bandwidth / 1e12:g} TB/s"
        last = ", but for the last column" if measurements(chip) else ""
        parts += [f"{_PREDICTED}{last}: forward on {chip.name} ({about}), microseconds", roofline(chip)]
    return "\n\n".join(parts)


def write(mark: str, text: str, doc: Path = DOC) -> None:
    """Puts `text` between the marks of the page."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    page = doc.read_text()
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{doc}: expected one line {begin.strip()} and one {end}")
    doc.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n\n{end}", page, flags=re.DOTALL))


def main(args: argparse.Namespace) -> None:
    for mark, report in {"gpu": gpu_report, "cpu": cpu}.items():
        if args.device in (mark, "all"):
            text = report()
            print(text + "\n")
            if args.write:
                write(f"roofline {mark}", text)
