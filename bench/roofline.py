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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels.choice import cost
from flatlora_kernels.choice.cost import Call, Chip, Cost, Work

from . import environment, targets, timing
from .table import markdown

DOC = Path(__file__).parent.parent / "docs" / "internals" / "performance.md"
RESULTS = Path(__file__).parent / "results"
SIZE, RANK = 4096, 16
ROWS = (16, 256, 2048, 8192)
CHIPS = tuple(c for c in cost.CHIPS if c.name in ("A100 SXM 80 GB", "H100 SXM", "B200 SXM"))
KINDS = ("gaussian", "rademacher")
UNITS = ("tensor", "issue", "draw", "shared", "l2", "memory", "step", "launch")
# Name -> backend, way of cost.py, providers of the benchmark that are the same.
WAYS = {
    "plain": ("cuda", "plain", ("plain",)),
    "triton": ("triton", "fused", ("fused:triton",)),
    "cuda": ("cuda", "fused", ("fused:cuda",)),
    "panel": ("cuda", "panel", ("panel:cuda", "panel:triton")),
    "perturb": ("cuda", "perturb", ("perturb:cuda", "perturb:triton")),
}
_PREDICTED = "**PREDICTED, not measured**"
# What `bench.truth time` calls them -> mode and provider.
_TRUTH = {
    "plain": ("forward", "plain"),
    "plain dX": ("input_grad", "plain"),
    "lora": ("forward", "lora"),
    **{
        f"{name} {suffix}": (mode, provider)
        for backend in ("triton", "cuda")
        for name, provider in (
            (backend, f"fused:{backend}"),
            (f"panel {backend}", f"panel:{backend}"),
            (f"perturb {backend}", f"perturb:{backend}"),
        )
        for suffix, mode in (("y", "forward"), ("dX", "input_grad"))
    },
}
_OURS = {"triton fused": "fused:triton", "cuda fused": "fused:cuda", "panel": "panel:cuda"}


def call(noise: str, M: int, direction: str = "forward", rank: int = RANK) -> Call:
    return Call(direction, noise, "folded", "bfloat16", M, SIZE, SIZE, rank)


# Instructions of a thread per element of the weight on sm_90, without an adapter and with one of rank 16: of `triton`
# from docs/internals/kernels.md; of `cuda` counted in the loops of row_norms_kernel (78 for 32 elements) and
# row_norms_tile_kernel (at most 597 for 8: some lie behind branches).
ROW_NORMS = {"triton": (3.12, 4.41), "cuda": (2.44, 74.6)}


def row_norms(backend: str, rank: int) -> Work:
    """The refresh of noise_scale, on any of the GPUs."""
    values = SIZE * SIZE
    slots = values * ROW_NORMS[backend][rank > 0] / 32
    read = float(2 * (values + 2 * rank * SIZE))
    # Triton multiplies the adapter by tensor cores; `cuda` does in the instructions that were counted.
    products = 2.0 * values * rank if backend == "triton" else 0.0
    return Work(flops=products, rate=1024, slots=slots, l2=read, memory=read)


# --- Measured ---


class Measurement(NamedTuple):
    seconds: float
    to_plain: float | None


def measurements(chip: Chip, folder: Path = RESULTS) -> dict[tuple[str, str, int, str], Measurement]:
    """(mode, provider, M, noise) -> of the latest run on this GPU, sizes as here; graphs where there are some.

    What `truth` has goes before the benchmark's runs.
    """
    found: dict[tuple[str, str, int, str], tuple[tuple[str, bool], Measurement]] = {}
    for path in sorted(folder.glob("**/*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if not _is_of(row, chip):
                    continue
                key = (row["mode"], row["provider"], int(row["M"]), row["noise"])
                value = Measurement(
                    float(row["median_us"]) / 1e6, float(row["to_plain"]) if row["to_plain"] else None
                )
                age = (row["date"], row.get("launch") == "graph")
                if key not in found or found[key][0] < age:
                    found[key] = age, value
    return {key: value for key, (_, value) in found.items()} | truth(chip, RANK, folder)


def truth(chip: Chip, rank: int, folder: Path = RESULTS) -> dict[tuple[str, str, int, str], Measurement]:
    """The same from truth-time.jsonl of the folder that bears the GPU's name: graphs, a cold L2."""
    found: dict[tuple[str, str, int, str], Measurement] = {}
    for path in sorted(folder.glob("*/truth-time.jsonl")):
        if not _named(chip, path.parent.name):
            continue
        for line in path.read_text().splitlines():
            row = json.loads(line)
            mode, provider = _TRUTH.get(row["name"], ("", ""))
            if provider and row["rank"] == rank:
                noise = "none" if provider in ("plain", "lora") else row["noise"]
                key = (mode, provider, int(row["M"]), noise)
                found.setdefault(key, Measurement(row["median_us"] / 1e6, row["to_plain"]))
    return found


def _is_of(row: dict[str, str], chip: Chip) -> bool:
    """Of this GPU and one of the cases of the tables."""
    if row.get("kind") != "linear":  # results of examples are of no kind
        return False
    about = {"device": "cuda", "dtype": "bfloat16", "N": str(SIZE), "K": str(SIZE)}
    if row["provider"] != "plain":  # which leaves the adapter out
        about["rank"] = str(RANK)
    return all(row.get(k) == v for k, v in about.items()) and _named(chip, row["hardware"])


def _named(chip: Chip, hardware: str) -> bool:
    """ "A100 SXM 80 GB" calls itself NVIDIA A100-SXM4-80GB."""
    name, *rest = chip.name.replace(" GB", "GB").split()
    memory = next((part for part in rest if part.endswith("GB")), "")
    return name in hardware and memory in hardware


# --- Tables ---


def both(values: list[str]) -> str:
    """Of gaussian and rademacher noise; once where they are the same."""
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _amount(work: list[Work], name: str, scale: float) -> str:
    return f"{sum(getattr(w, name) for w in work) / scale:,.{1 if scale > 1e8 else 0}f}"


def amounts(chip: Chip) -> str:
    """What the kernels of a call ask for."""
    body = []
    columns = (("flops", 1e9), ("memory", 1e6), ("l2", 1e6), ("shared", 1e6), ("slots", 1e6))
    for name, kernels in _calls(chip, "forward"):
        body.append(
            [
                *name,
                *(both([_amount(k, field, scale) for k in kernels]) for field, scale in columns),
                f"{sum(w.drawing for w in kernels[0]) * cost.DRAWN[KINDS[0]] / 1e6:,.0f}",
                str(len(kernels[0])),
            ]
        )
    header = [
        "kernels",
        "M",
        "GFLOP",
        "memory MB",
        "L2 MB",
        "shared MB",
        "M instructions",
        "M values drawn",
        "launches",
    ]
    return markdown(header, body)


def _calls(chip: Chip, direction: str) -> list[tuple[tuple[str, str], list[list[Work]]]]:
    """((kernels, M), [with gaussian noise, with rademacher])."""
    found: list[tuple[tuple[str, str], list[list[Work]]]] = []
    for M in ROWS:
        for name, (backend, way, _) in WAYS.items():
            kinds = [cost.works(chip, backend, way, call(noise, M, direction))[0] for noise in KINDS]
            found.append(((name, str(M)), kinds))
    if direction == "forward":
        for backend in ("triton", "cuda"):
            one = [[cost.perturb_pass(chip, backend, call(noise, 0), SIZE * SIZE)] for noise in KINDS]
            found.append(((f"{backend}: perturb alone", "-"), one))
            for rank in (0, RANK):
                name = f"{backend}: row_sq_norms" + (f", rank {rank}" if rank else "")
                found.append(((name, "-"), [[row_norms(backend, rank)]] * 2))
    return found


def roofline(chip: Chip, direction: str = "forward") -> str:
    """Microseconds of each unit, were it alone; the time of all; ratios."""
    measured = measurements(chip)
    mode = "forward" if direction == "forward" else "input_grad"
    body = []
    for (name, M), kernels in _calls(chip, direction):
        costs = [cost.total(chip, k) for k in kernels]
        times, ratios, found = [c.seconds for c in costs], ["-", "-"], ["-", "-"]
        if M != "-":
            backend, way, providers = WAYS[name]
            times = [cost.cost(chip, backend, way, call(noise, int(M), direction)).seconds for noise in KINDS]
            base = cost.plain(chip, call("none", int(M), direction)).seconds
            ratios = [f"{t / base:.2f}" for t in times]
            found = [_measured(measured, mode, providers, int(M), noise) for noise in KINDS]
        units = [both([f"{1e6 * c.units[unit]:.1f}" for c in costs]) for unit in UNITS]
        all_of_it = both([f"{1e6 * t:.1f}" for t in times])
        body.append([name, M, *units, all_of_it, both([c.bound for c in costs]), both(ratios), both(found)])
    header = ["kernels", "M", *UNITS, "time", "bound", "to plain", "measured"]
    return markdown(header, body)


def _measured(
    found: dict[tuple[str, str, int, str], Measurement],
    mode: str,
    providers: tuple[str, ...],
    M: int,
    noise: str,
) -> str:
    kind = "none" if providers == ("plain",) else noise
    values = [found[key] for p in providers if (key := (mode, p, M, kind)) in found]
    if not values:
        return "-"
    best = min(values)
    return f"{1e6 * best.seconds:.1f}" + ("" if best.to_plain is None else f" ({best.to_plain:.2f})")


def ratios(direction: str) -> str:
    """To a plain product, all GPUs."""
    body = []
    for chip in CHIPS:
        for name, (backend, way, _) in WAYS.items():
            if name == "plain":
                continue
            line = []
            for M in ROWS:
                base = cost.plain(chip, call("none", M, direction)).seconds
                times = [cost.cost(chip, backend, way, call(noise, M, direction)).seconds for noise in KINDS]
                line.append(both([f"{t / base:.2f}" for t in times]))
            body.append([chip.name, name, *line])
    return markdown(["GPU", "kernels", *(f"M = {M}" for M in ROWS)], body)


def fastest(chip: Chip, of: Call) -> tuple[str, Cost]:
    """Of ours."""
    ours = {
        f"{backend} {strategy}": cost.cost(chip, backend, strategy, of)
        for backend in ("triton", "cuda")
        for strategy in ("fused", "panel")
    }
    best = min(ours, key=lambda name: ours[name].seconds)
    return best.replace("triton panel", "panel").replace("cuda panel", "panel"), ours[best]


def against_targets(chip: Chip) -> str:
    """The fastest of ours as measured, and the targets of a forward; the model's ratio beside each."""
    limits = {(t.noise, t.M, t.base): t.most for t in targets.targets("cuda") if t.mode == "forward"}
    whole, alone = measurements(chip), truth(chip, 0)
    body = []
    for noise, M in itertools.product(KINDS, ROWS):
        times = {name: found for name, p in _OURS.items() if (found := whole.get(("forward", p, M, noise)))}
        at_rank_0 = [found for p in _OURS.values() if (found := alone.get(("forward", p, M, noise)))]
        unfused = [found for p in WAYS["perturb"][2] if (found := whole.get(("forward", p, M, noise)))]
        if not (times and at_rank_0 and unfused):
            continue
        name = min(times, key=lambda n: times[n])
        plain = cost.plain(chip, call("none", M)).seconds
        rival = min(cost.perturb(chip, b, call(noise, M)).seconds for b in ("triton", "cuda"))
        model = fastest(chip, call(noise, M))[1].seconds
        cells = [noise, str(M), name, f"{min(at_rank_0).to_plain:.2f}"]
        for what, ratio, predicted in (
            ("plain", times[name].to_plain, model / plain),
            ("rival", times[name].seconds / min(unfused).seconds, model / rival),
        ):
            most = limits[noise, M, what]
            verdict = "met" if ratio <= most else "missed"  # type: ignore[operator]
            cells += [f"{ratio:.2f}", f"{predicted:.2f}", f"{most:.2f}", verdict]
        body.append(cells)
    header = ["noise", "M", "fastest of ours", "rank 0", f"rank {RANK}", "model", "target", ""]
    return markdown([*header, "to perturb", "model", "target", ""], body)


def residuals(chip: Chip) -> str:
    """Measured microseconds, and the model's time over that."""
    sizes, body = (16, 64, 256, 1024, 2048, 8192), []
    for rank, (mode, column), (name, (backend, way, providers)) in itertools.product(
        (0, RANK), (("forward", "y"), ("input_grad", "dX")), WAYS.items()
    ):
        measured = truth(chip, rank)
        for noise in ("none",) if way == "plain" else KINDS:
            cells = []
            for M in sizes:
                found = [measured[k].seconds for p in providers if (k := (mode, p, M, noise)) in measured]
                model = cost.cost(chip, backend, way, call(noise, M, mode, rank)).seconds
                cells.append(f"{1e6 * min(found):.1f} ({model / min(found):.2f})" if found else "-")
            if (way != "plain" or not rank) and set(cells) != {"-"}:
                body.append([name, noise, str(rank), column, *cells])
    return markdown(["kernels", "noise", "rank", "", *(f"M = {M}" for M in sizes)], body)


# --- The layer step ---


def step(chip: Chip, M: int, noise: str) -> tuple[Cost, Cost]:
    """Forward and backward of a LoRA layer: ours, and PEFT's without noise (all in bfloat16, no dropout).

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
    peft = cost.total(chip, forward + backward)

    ours = [fastest(chip, call(noise, M, d))[1] for d in ("forward", "input_grad")]
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
        peft = step(chip, M, KINDS[0])[1]
        ours = [step(chip, M, noise)[0].seconds for noise in KINDS]
        base = sum(cost.plain(chip, call("none", M, d)).seconds for d in ("forward", "input_grad"))
        body.append([
            str(M), f"{1e6 * base:.0f}", f"{1e6 * peft.seconds:.0f}", both([f"{1e6 * s:.0f}" for s in ours]),
            both([f"{s / peft.seconds:.2f}" for s in ours]),
        ])  # fmt: skip
    return markdown(["M", "x W^T and dY W alone", "PEFT, no noise", "ours", "ours / PEFT"], body)


# --- CPU ---


def _linear(x: Tensor, weight: Tensor) -> timing.Call:
    return lambda _: F.linear(x, weight)


def measured_chip(budget: float) -> Chip:
    """The CPU of this machine: the bandwidth of a copy, and the rates of torch's products."""
    threads = torch.get_num_threads()
    source, target = torch.randn(1 << 24), torch.empty(1 << 24)
    x, weight = torch.randn(512, 2048), torch.randn(2048, 2048)
    calls: dict[str, timing.Call] = {
        "copy": lambda _: target.copy_(source),
        "float32": _linear(x, weight),
        "bfloat16": _linear(x.bfloat16(), weight.bfloat16()),
    }
    rounds = timing.interleaved(calls, timing.CpuTimer(), 1, budget, 5, 100)
    median = {name: timing.Spread.of(timing.seconds(rounds, name)).median for name in calls}
    macs = 512 * 2048 * 2048 / threads / 1e9
    return cost.CHIPS[-1]._replace(
        name=f"{environment.describe('cpu')['hardware']}, {threads} threads",
        processors=threads,
        bandwidth=8 * source.numel() / median["copy"],
        tensor=round(macs / median["bfloat16"]),
        single=round(macs / median["float32"]),
    )


def _cpu_calls(x: Tensor, weight: Tensor) -> dict[tuple[str, str], timing.Call]:
    """(way, noise) -> the call."""
    scale, seed, scratch = torch.full((len(weight),), 0.01), torch.tensor(0), torch.empty_like(weight)

    def ours(noise: str, strategy: str) -> timing.Call:
        return lambda _: fk.fused_flat_lora_linear(
            x, weight, noise_scale=scale, seed=seed, noise=noise, backend="cpu", strategy=strategy
        )

    def perturbed(noise: str) -> timing.Call:
        return lambda _: F.linear(
            x, fk.perturb_weight(weight, scale, seed=seed, noise=noise, out=scratch, backend="cpu")
        )

    calls = {("plain", "none"): _linear(x, weight)}
    for noise in KINDS:
        calls |= {(strategy, noise): ours(noise, strategy) for strategy in ("fused", "panel")}
        calls["perturb", noise] = perturbed(noise)
    return calls


def cpu(budget: float = 0.4, size: int = 2048, rows: tuple[int, ...] = (16, 256, 2048)) -> str:
    """The model with the rates of this machine against calls measured on it; `budget`: seconds for each."""
    if reason := fk.backend_info()["cpu"]["unavailable"]:
        return f"Backend 'cpu' is not here: {reason}"
    rates, timed = [measured_chip(budget)], []
    for dtype, M in itertools.product((torch.float32, torch.bfloat16), rows):
        calls = _cpu_calls(torch.randn(M, size).to(dtype), torch.randn(size, size).div_(45).to(dtype))
        by_name = {" ".join(key): run for key, run in calls.items()}
        rounds = timing.interleaved(by_name, timing.CpuTimer(), 1, budget, 5, 200)
        for way, noise in calls:
            of = Call("forward", noise, "folded", str(dtype).removeprefix("torch."), M, size, size)
            median = timing.Spread.of(timing.seconds(rounds, f"{way} {noise}")).median
            timed.append((of, way, median, timing.paired_ratio(rounds, f"{way} {noise}", "plain none")))
    # Rates are what the machine can do: the better of before and after.
    rates.append(measured_chip(budget))
    chip = rates[0]._replace(
        **{f: max(getattr(c, f) for c in rates) for f in ("bandwidth", "tensor", "single")}
    )
    body = []
    for of, way, median, ratio in timed:
        predicted, base = cost.cost(chip, "cpu", way, of), cost.plain(chip, of)
        body.append([
            of.dtype, str(of.M), way, of.noise, f"{1e6 * predicted.seconds:,.0f}", f"{1e6 * median:,.0f}",
            f"{predicted.seconds / base.seconds:.2f}", f"{ratio.median:.2f}", f"{ratio.p20:.2f} to {ratio.p80:.2f}",
            predicted.bound,
        ])  # fmt: skip
    single, half = (2 * rate * chip.processors for rate in (chip.single, chip.tensor))
    about = (
        f"**Measured** beside predicted: {chip.name}; {chip.bandwidth / 1e9:.1f} GB/s in a copy, both ways; torch's"
        f" product of 512 x 2048 x 2048 {single} GFLOP/s in float32 and {half} in bfloat16; N = K = {size}"
    )
    header = ["dtype", "M", "kernels", "noise", "predicted us", "measured us", "predicted", "measured"]
    return f"{about}\n\n{markdown([*header, 'p20 to p80', 'bound'], body)}"


# --- The page ---


def gpu_report() -> str:
    h100 = _chip("H100 SXM")
    parts = [
        f"**Measured** on an H100, beside its targets, which are for rank {RANK}; ratios to plain, and to `perturb`",
        against_targets(h100),
        "**Measured** on an H100, microseconds (and the model's time over that)",
        residuals(h100),
    ]
    unless = f"{_PREDICTED}, but for what an H100 calibrates"
    parts += [f"{unless}: forward over a plain product", ratios("forward")]
    parts += [f"{unless}: input gradient over a plain product", ratios("input_grad")]
    parts += [f"{_PREDICTED}: forward and backward of a layer on an H100, microseconds", steps(h100)]
    parts += [f"{_PREDICTED}: what the kernels of a forward ask for, in the tiles for an H100", amounts(h100)]
    for chip in CHIPS:
        about = f"{chip.processors} processors, {chip.clock / 1e9:g} GHz, {chip.bandwidth / 1e12:g} TB/s"
        last = ", but for the last column" if measurements(chip) else ""
        parts.append(f"{_PREDICTED}{last}: forward on {chip.name} ({about}), microseconds")
        parts.append(roofline(chip))
    return "\n\n".join(parts)


def _chip(name: str) -> Chip:
    return next(c for c in cost.CHIPS if c.name == name)


def write(mark: str, text: str, doc: Path = DOC) -> None:
    """Puts `text` between the marks of the page."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    page = doc.read_text()
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{doc}: expected one line {begin.strip()} and one {end}")
    doc.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n\n{end}", page, flags=re.DOTALL))


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--device", choices=("gpu", "cpu", "all"), default="all", help="gpu: predicted; cpu: measured here"
    )
    p.add_argument("--write", action="store_true", help="into docs/internals/performance.md")


def main(args: argparse.Namespace) -> int:
    reports: dict[str, Callable[[], str]] = {"gpu": gpu_report, "cpu": cpu}
    for mark, report in reports.items():
        if args.device in (mark, "all"):
            text = report()
            print(text + "\n")
            if args.write:
                write(f"roofline {mark}", text)
    return 0
