"""The command line of `python -m bench`."""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flatlora_kernels.core.noise import KINDS

from . import (
    environment,
    fidelity,
    methods,
    mixture,
    options,
    parts,
    providers,
    quantized,
    results,
    roofline,
    run,
    shapes,
    table,
    targets,
    timing,
    training,
    variance,
)
from .machine_code import compiled, offline
from .options import option
from .results import Results
from .shapes import MODES, SETS, Case

_SHORT = ("quick", "targets", "square4096")  # sets
Arguments = argparse.Namespace


def _list(args: Arguments) -> None:
    lines = ["Sets: " + ", ".join(SETS), "", "Layers, (out_features, in_features):"]
    for name, model in shapes.MODELS.items():
        layers = ", ".join(f"{layer.name} ({layer.N}, {layer.K})" for layer in model.layers)
        lines.append(f"  {name}: {layers}; M {', '.join(map(str, model.rows))}; {model.note}")
    lines += ["", f"Providers on {args.device}:"]
    lines += [f"  {p.name}: {p.what or p.make.__doc__}" for p in providers.every(args.device)]
    missing = {k: v for k, v in providers.available_backends(args.device).items() if v}
    lines += [f"  not here, fused:{name}: {reason}" for name, reason in missing.items()]
    print("\n".join(lines))


def _plot(args: Arguments) -> None:
    from . import plot  # matplotlib is wanted here alone

    for path in plot.plot(results.load(args.file), args.out or args.file.parent, args.file.stem):
        print(path)


def _memory_cases(which: str, cases: list[Case]) -> set[Case]:
    largest = {case._replace(M=0): case for case in sorted(cases, key=lambda c: c.M)}
    return set({"none": (), "first": cases[:1], "largest": largest.values(), "all": cases}[which])


def _describe(args: Arguments) -> dict[str, Any]:
    """Of the machine, before anything is timed; says at once where other programs take their part of it."""
    meta = environment.describe(args.device)
    if meta["busy"]:
        print(
            f"{meta['busy']}. Times will be long; --time-limit SECONDS ends a run",
            file=sys.stderr,
            flush=True,
        )
    return meta


def _run(args: Arguments) -> int:
    quick, short = args.set == "quick", args.set in _SHORT

    def default(value: Any, in_quick: Any, otherwise: Any) -> Any:
        return value if value is not None else in_quick if quick else otherwise

    settings = run.Settings(
        device=args.device,
        noises=tuple(args.noise),
        providers=tuple(args.providers) if args.providers else None,
        compiled=args.compile if args.compile is not None else not short,
        reference=not short,  # it takes seconds: of interest in these sets only where it is all there is
        ways=args.ways or args.set == "targets",
        budget=default(args.budget, 0.15, 0.5),
        min_rounds=args.min_rounds,
        time_limit=math.inf if args.time_limit is None else args.time_limit,
        goal=60.0 if quick and args.budget is None and args.time_limit is None else math.inf,
        graph=args.graph or ("small" if args.device == "cuda" else "none"),
    )
    cases = shapes.cases(args.set, args.device)
    for field, values in {"M": args.m, "dtype": args.dtypes, "mode": args.modes, "rank": args.rank}.items():
        if values:
            cases = [c._replace(**{field: value}) for c in cases for value in values]
    cases = list(dict.fromkeys(cases))
    meta = _describe(args)
    stem = results.file_stem(args, meta, args.set)
    started = time.perf_counter()
    run.compile_first(args.device, cases, settings.noises, args.processes)
    bench = run.Bench(settings, run.Progress(len(cases)), lambda b: results.save_json(b.results(meta), stem))
    if args.parts:
        parts.measure(bench, cases)
    bench.linear_cases(cases, _memory_cases(default(args.memory, "first", "largest"), cases), started)
    if isinstance(bench.timer, timing.CudaTimer):
        meta["launched_late"] = bench.timer.launched_late
    return _finish(args, bench.results(meta), args.set)


def _overhead(args: Arguments) -> int:
    rows = parts.overhead(providers.usable_backends(args.device), args.device)
    return _finish(args, Results(_describe(args), rows, [], []), "overhead")


def _training(args: Arguments) -> int:
    return _finish(args, Results(_describe(args), *training.main(args)), "training")


def _finish(args: Arguments, found: Results, what: str) -> int:
    meta = found.meta
    meta["clocks_after"] = environment.clocks(args.device)
    meta["config"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "given"}
    meta["environment"] = {k: v for k, v in os.environ.items() if k.startswith(("FLATLORA_", "OMP_", "MKL_"))}
    meta["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    print(table.summary(found))
    if what == "targets":
        print("\n" + targets.report(found.rows, args.device))
    paths = results.save(found, results.file_stem(args, meta, what))
    print("", *(f"Written: {path}" for path in paths), sep="\n")
    return 1 if found.failures else 0


def _tune(args: Arguments) -> int:
    from . import strategies, tune

    if not args.strategies:
        return tune.main(args)
    if args.rows:
        return strategies.combine(args.rows)
    if args.isa and (status := strategies.again(args.isa, args.given)) is not None:
        return status
    chosen = (args.device, args.quick, args.time_limit, args.out, args.name)
    return strategies.main(*chosen, backends=args.backends, noises=args.noise)


def _number(kind: type, fits: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """A type for argparse, which refuses other numbers in these words."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return parse


def _commands() -> dict[str, tuple[str, Callable[[Arguments], int | None], Any]]:
    """Help, what runs, and its options, or what adds them. Made anew at each call: tests add sets."""
    flag = functools.partial(option, action="store_true")
    both = functools.partial(option, action=argparse.BooleanOptionalAction)
    count = _number(int, lambda n: n >= 1, "at least 1")
    file = option("file", type=Path)
    device = option("--device", default := "default cuda where there is one", choices=("cpu", "cuda"))
    out = option("--out", "folder of the CSV and JSON", type=Path, default=roofline.RESULTS / "local")
    place = (
        device, option("--threads", "of torch, on a CPU", type=int), out,
        option("--name", "of the files; default set, device and time"),
    )  # fmt: skip
    said = f"kinds of noise; default {' '.join(run.NOISES)}"
    noise = option("--noise", said, nargs="+", choices=KINDS, default=list(run.NOISES))
    rounds = "also where that takes longer than the budget"
    strategies = "with --strategies: "
    return {
        "run": ("time a set of cases (this is what happens without a command)", _run, (
            option("--set", "which cases; a model: all its layers", default="quick", choices=SETS),
            option("--m", "take these rows of x in place of the set's", type=int, nargs="+"),
            option("--dtypes", nargs="+", choices=("float16", "bfloat16", "float32", "float64")),
            option("--modes", nargs="+", choices=MODES),
            option("--rank", "of the adapter, 0 = none; in place of the set's", type=int, nargs="+"),
            noise,
            option("--providers", "only these and plain; fused: all backends", nargs="+"),
            both("--compile", "default: not in quick and square4096"),
            option(
                "--memory", choices=("none", "first", "largest", "all"),
                help="where to measure peak memory; largest: M of each layer. Default: first in quick, else largest",
            ),
            option(
                "--budget", type=float,
                help="seconds for each provider of a case; 0.15 in quick, less where a minute is too short, else 0.5",
            ),
            option("--min-rounds", rounds, type=int, default=5),
            option("--time-limit", "seconds, no case is begun after, those left are named; default none", type=float),
            option(
                "--graph", choices=("none", "small", "all"),
                help=f"cases to time as CUDA graphs as well; small: at most {run.GRAPH_ROWS} rows; default on a GPU",
            ),
            option("--processes", "that compile Triton kernels before anything is timed; 0 = none", type=int),
            *place,
            both("--parts", "first the overhead, the generator and noise_scale by themselves", default=True),
            flag("--ways", "the op's panels, split noise and own choice, too"),
        )),
        "tune": ("search tiles for the Triton kernels on this GPU and print a table for configs.py", _tune, (
            flag(
                "--strategies",
                "instead measure fused kernels against panels and write the table of the automatic choice",
            ),
            flag("--quick", strategies + "a few cases"),
            option("--backends", strategies + "measure these alone, and write no table", nargs="+"),
            option("--rows", strategies + "the table of these measurements", type=Path, nargs="+", metavar="JSON"),
            option("--device", strategies + default, choices=("cpu", "cuda")),
            option("--isa", strategies + "hold this CPU to an instruction set: avx2, avx512, or its best"),
            option(
                "--noise", strategies + f"default all on a CPU, else {' '.join(run.NOISES)}", nargs="+", choices=KINDS
            ),
            option(
                "--dtypes", "16-bit types, float32 or tf32: the table has a part for each", nargs="+",
                default=["bfloat16", "float16"], choices=("float16", "bfloat16", "float32", "tf32"),
            ),
            option("--time-limit", "seconds; the most telling cases come first", type=float, default=270.0),
            option("--candidates", "tiles to try for each line of the table", type=int, default=16),
            option("--processes", "that compile; default one for every core but two", type=int),
            flag("--dry-run", "in Triton's interpreter, where no time means anything"),
            flag("--table", "print the table after a dry run, too"),
            out,
            option("--name", "of the files; default tune, device and time"),
        )),
        "quantized": (
            "a layer on a packed weight under noise, against bitsandbytes, torchao and QLoRA without",
            quantized.main,
            (
                option("--formats", nargs="+", choices=quantized.FORMATS, default=["nf4"]),
                option("--m", "rows of x", nargs="+", type=count, default=[16, 256, 1024]),
                option("--size", "in_features and out_features", type=count, default=2048),
                option("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("bfloat16", "float32")),
                option("--modes", nargs="+", default=list(quantized.MODES), choices=quantized.MODES),
                option("--noise", nargs="+", default=["gaussian"], choices=KINDS),
                option(
                    "--ways", "also fused, decode, and those with a backend, as fused:triton; default"
                    f" {' '.join(quantized.WAYS)}; without the owner's library {' '.join(quantized.WAYS_ALONE)}",
                    nargs="+", choices=quantized.CHOICES, metavar="WAY",
                ),
                flag("--own", "pack the weight here in any case, so that no library is timed"),
                option("--budget", "seconds for each way of a case", type=float, default=1.0),
                option("--time-limit", "seconds, no case is begun after, those left are named", type=float),
                both("--memory", "measure the peak of a step", default=True),
                *place,
            ),
        ),
        "mixture": (
            "experts with adapters under noise, against grouped products without, and with all noise in memory",
            mixture.main,
            (
                option("--m", "rows of all experts", nargs="+", type=count, default=[64, 1024]),
                option("--experts", type=count, default=8),
                option("--n", "out_features", type=count, default=1024),
                option("--k", "in_features", type=count, default=1024),
                option("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("bfloat16", "float32")),
                option("--routings", nargs="+", default=list(mixture.ROUTINGS), choices=mixture.ROUTINGS),
                option("--modes", nargs="+", default=list(mixture.MODES), choices=mixture.MODES),
                option("--noise", nargs="+", default=["gaussian"], choices=KINDS),
                option(
                    "--ways", f"also those with a backend, as op:triton; default {' '.join(mixture.WAYS)}",
                    nargs="+", default=list(mixture.WAYS), choices=mixture.CHOICES, metavar="WAY",
                ),
                option("--budget", "seconds for each way of a case", type=float, default=1.0),
                option("--time-limit", "seconds, no case is begun after, those left are named", type=float),
                both("--memory", "measure the peak of a step", default=True),
                *place,
            ),
        ),
        "roofline": (
            f"what kernels ask of each unit of a GPU, predicted, and of this CPU, measured; see {roofline.PAGE}",
            roofline.main,
            (
                option("--device", "gpu: predicted; cpu: measured here", choices=("gpu", "cpu", "all"), default="all"),
                flag("--write", f"into {roofline.PAGE}"),
            ),
        ),
        "fidelity": (
            "how much of small noise survives rounding, by type and sigma; see docs/internals/noise.md",
            lambda args: print(fidelity.report()), (),
        ),
        "variance": ("what several noise draws in one step do to the gradient; see docs/samples.md", variance.main, (
            option("--model", "minilm: what the sentiment example trains", choices=variance.MODELS, default="blocks"),
            option("--batch", "sequences, a multiple of 4", type=int, default=16),
            option("--tokens", "of a sequence of blocks", type=int, default=64),
            option("--sigma", type=float, default=0.05),
            option("--noise", choices=KINDS, default=KINDS[0]),
            option("--draws", "steps of each way, at least 4", type=int, default=40),
            option("--warm-up", "steps of training before", type=int, default=40),
            option("--seed", "of weights, data and noise", type=int, default=0),
        )),
        "methods": ("a step of every method of docs/methods.md beside LoRA's", methods.main, (
            option("--size", choices=methods.SIZES, default="cpu"),
            option("--dtype", choices=("float32", "bfloat16"), default="float32"),
            option("--noise", choices=KINDS, default=KINDS[0]),
            option("--rounds", "in which all take turns", type=int, default=15),
            option("--budget", "seconds for each, at most", type=float, default=20.0),
            option("--seed", "of weights, data and noise", type=int, default=0),
        )),
        "training": (
            "an optimiser step of Llama-shaped blocks or of MiniLM, against PEFT's LoRA and the authors' procedure",
            _training,
            (
                option(
                    "--model", "llama: several Llama-shaped blocks; minilm: what the sentiment example trains",
                    choices=training.SEQUENCES, default="block",
                ),
                option("--size", "of a block; default llama3-8b on a GPU, else cpu", choices=training.SIZES),
                option("--layers", "of llama; default 4", type=count),
                option("--tokens", "in a step; default goes by the size, and is 1024 with minilm", type=count),
                option("--sequence", "tokens of each sequence; default at most 2048, minilm 64", type=count),
                option(
                    "--dropout", "lora_dropout", nargs="+", default=[0.0],
                    type=_number(float, lambda p: 0 <= p < 1, "0 <= p < 1"),
                ),
                option("--accumulate", "micro-batches in a step, of --tokens each", nargs="+", type=count, default=[1]),
                option("--drift", "in-place steps after which to look at the base weights; default none", type=count),
                option("--dtypes", "default bfloat16, on a CPU both", nargs="+", choices=("bfloat16", "float32")),
                noise,
                option("--providers", "only these", nargs="+"),
                option("--budget", "seconds for each way to train", type=float, default=5.0),
                option("--min-rounds", rounds, type=int, default=7),
                both("--memory", "measure the peak of a step", default=True),
                *place,
            ),
        ),
        "overhead": ("time per call over F.linear on a layer of 8 x 8", _overhead, place),
        "list": (
            "sets, layers and providers, and why a provider cannot run here", _list,
            (option("--device", choices=("cpu", "cuda")),),
        ),
        "table": (
            "Markdown of a run", lambda args: print(table.summary(results.load(args.file), args.long)),
            (file, flag("--long", "a line to every provider, with percentiles")),
        ),
        "plot": (
            "PNGs of a run: ratio to plain against M", _plot,
            (file, option("--out", "folder; default that of the file", type=Path)),
        ),
        "offline": (
            "compile the Triton kernels without a GPU and print what came out; see docs/internals/kernels.md",
            offline.main, offline.add_arguments,
        ),
        "compiled": (
            "compile the CUDA kernels without a GPU and print what came out; see docs/internals/cuda_kernels.md",
            compiled.main, compiled.add_arguments,
        ),
        "compare": (
            "two runs side by side", lambda args: print(table.compare(results.load(args.a), results.load(args.b))),
            (option("a", type=Path), option("b", type=Path)),
        ),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    commands = _commands()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in (*commands, "-h", "--help"):
        given.insert(0, "run")
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times the fused noisy linear against its rivals; without arguments, the quick set.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (help, _, its_options) in commands.items():
        subparser = subparsers.add_parser(name, help=help, description=help)
        if callable(its_options):
            its_options(subparser)
        else:
            options.add(subparser, its_options)
    args = parser.parse_args(given)
    args.given = given
    device = getattr(args, "device", "")
    if device is None:
        device = args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available() and args.command != "tune":
        parser.error("--device cuda: torch sees no GPU here")
    if device == "cpu" and getattr(args, "graph", None) not in (None, "none"):
        parser.error(f"--graph {args.graph}: CUDA graphs need --device cuda, got cpu")
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    try:
        return commands[args.command][1](args) or 0
    except ValueError as error:
        if args.command != "tune":
            raise
        parser.error(str(error))
