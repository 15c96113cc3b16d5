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
from typing import Any, NamedTuple

import torch

from . import (
    environment,
    fidelity,
    options,
    parts,
    providers,
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
from .options import DEVICE, OUT, PLACE, Option, option
from .results import Results
from .shapes import MODES, SETS, Case

_SHORT = ("quick", "targets", "square4096")  # sets
_BOTH = argparse.BooleanOptionalAction
Arguments = argparse.Namespace


def _list(args: Arguments) -> int:
    lines = ["Sets: " + ", ".join(SETS), "", "Layers, (out_features, in_features):"]
    for name, model in shapes.MODELS.items():
        layers = ", ".join(f"{layer.name} ({layer.N}, {layer.K})" for layer in model.layers)
        lines.append(f"  {name}: {layers}; M {', '.join(map(str, model.rows))}; {model.note}")
    lines += ["", f"Providers on {args.device}:"]
    lines += [f"  {p.name}: {p.what or p.make.__doc__}" for p in providers.every(args.device)]
    missing = {k: v for k, v in providers.available_backends(args.device).items() if v}
    lines += [f"  not here, fused:{name}: {reason}" for name, reason in missing.items()]
    print("\n".join(lines))
    return 0


def _plot(args: Arguments) -> int:
    from . import plot  # matplotlib is wanted here alone

    for path in plot.plot(results.load(args.file), args.out or args.file.parent, args.file.stem):
        print(path)
    return 0


def _printed(text: Callable[[Arguments], str]) -> Callable[[Arguments], int]:
    def command(args: Arguments) -> int:
        print(text(args))
        return 0

    return command


def _memory_cases(which: str, cases: list[Case]) -> set[Case]:
    if which == "none":
        return set()
    if which == "largest":
        return set({case._replace(M=0): case for case in sorted(cases, key=lambda c: c.M)}.values())
    return set(cases if which == "all" else cases[:1])


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
        time_limit=default(args.time_limit, 40.0, math.inf),
        graph=args.graph or ("small" if args.device == "cuda" else "none"),
    )
    fields = {"M": args.m, "dtype": args.dtypes, "mode": args.modes, "rank": args.rank}
    cases = shapes.cases(args.set, args.device)
    for field, values in fields.items():
        if values:
            cases = [c._replace(**{field: value}) for c in cases for value in values]
    cases = list(dict.fromkeys(cases))
    meta = environment.describe(args.device)
    stem = results.file_stem(args, meta, args.set)
    started = time.perf_counter()
    run.compile_first(args.device, cases, settings.noises, args.processes)
    bench = run.Bench(
        settings, run.Progress(len(cases)), lambda bench: results.save_json(bench.results(meta), stem)
    )
    if args.parts:
        parts.measure(bench, cases)
    memory_cases = _memory_cases(default(args.memory, "first", "largest"), cases)
    bench.linear_cases(cases, memory_cases, started)
    if isinstance(bench.timer, timing.CudaTimer):
        meta["launched_late"] = bench.timer.launched_late
    return _finish(args, bench.results(meta), args.set)


def _overhead(args: Arguments) -> int:
    rows = parts.overhead(providers.usable_backends(args.device), args.device)
    return _finish(args, Results(environment.describe(args.device), rows, [], []), "overhead")


def _training(args: Arguments) -> int:
    return _finish(args, Results(environment.describe(args.device), *training.main(args)), "training")


def _finish(args: Arguments, found: Results, what: str) -> int:
    meta = found.meta
    meta["clocks_after"] = environment.clocks(args.device)
    meta["config"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    meta["environment"] = {k: v for k, v in os.environ.items() if k.startswith(("FLATLORA_", "OMP_", "MKL_"))}
    meta["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    print(table.summary(found))
    if what == "targets":
        print("\n" + targets.report(found.rows, args.device))
    print(
        "\n"
        + "\n".join(f"Written: {path}" for path in results.save(found, results.file_stem(args, meta, what)))
    )
    return 1 if found.failures else 0


def _tune(args: Arguments) -> int:
    from . import strategies, tune

    if not args.strategies:
        return tune.main(args)
    if args.rows:
        return strategies.combine(args.rows)
    return strategies.main(
        args.device, args.quick, args.time_limit, args.out, args.name, backends=args.backends
    )


class Command(NamedTuple):
    help: str
    run: Callable[[Arguments], int]
    options: Sequence[Option] | Callable[[argparse.ArgumentParser], None] = ()


def _commands() -> dict[str, Command]:
    """Made anew at each call: tests add sets."""
    file, flag = option("file", type=Path), functools.partial(option, action="store_true")
    strategies = "with --strategies: "
    return {
        "run": Command("time a set of cases (this is what happens without a command)", _run, (
            option("--set", "which cases; a model: all its layers", default="quick", choices=SETS),
            option("--m", "take these rows of x in place of the set's", type=int, nargs="+"),
            option("--dtypes", nargs="+", choices=("float16", "bfloat16", "float32", "float64")),
            option("--modes", nargs="+", choices=MODES),
            option("--rank", "of the adapter, 0 = none; in place of the set's", type=int, nargs="+"),
            options.NOISE,
            option("--providers", "only these and plain; fused: all backends", nargs="+"),
            option("--compile", "default: not in quick and square4096", action=_BOTH),
            option(
                "--memory",
                "where to measure peak memory; largest: M of each layer. Default: first in quick, else largest",
                choices=("none", "first", "largest", "all"),
            ),
            option("--budget", "seconds for each provider of a case; 0.15 in quick, else 0.5", type=float),
            option("--min-rounds", options.MIN_ROUNDS, type=int, default=5),
            option("--time-limit", "seconds, no case is begun after; default 40 in quick", type=float),
            option(
                "--graph",
                f"cases to time as CUDA graphs as well; small: at most {run.GRAPH_ROWS} rows; default on a GPU",
                choices=("none", "small", "all"),
            ),
            option(
                "--processes", "that compile Triton kernels before anything is timed; 0 = none", type=int
            ),
            *PLACE,
            option(
                "--parts", "first the overhead, the generator and noise_scale by themselves", action=_BOTH, default=True
            ),
            flag("--ways", "the op's panels, split noise and own choice, too"),
        )),
        "tune": Command("search tiles for the Triton kernels on this GPU and print a table for configs.py", _tune, (
            flag(
                "--strategies",
                "instead measure fused kernels against panels and write the table of the automatic choice",
            ),
            flag("--quick", strategies + "a few cases"),
            option("--backends", strategies + "measure these alone, and write no table", nargs="+"),
            option("--rows", strategies + "the table of these measurements", type=Path, nargs="+", metavar="JSON"),
            option("--device", strategies + DEVICE.settings["help"], choices=("cpu", "cuda")),
            option(
                "--dtypes", "16-bit types, float32 or tf32: the table has a part for each", nargs="+",
                default=["bfloat16", "float16"], choices=("float16", "bfloat16", "float32", "tf32"),
            ),
            option("--time-limit", "seconds; the most telling cases come first", type=float, default=270.0),
            option("--candidates", "tiles to try for each line of the table", type=int, default=16),
            option("--processes", "that compile; default one for every core but two", type=int),
            flag("--dry-run", "in Triton's interpreter, where no time means anything"),
            flag("--table", "print the table after a dry run, too"),
            OUT,
            option("--name", "of the files; default tune, device and time"),
        )),
        "roofline": Command(
            f"what kernels ask of each unit of a GPU, predicted, and of this CPU, measured; see {roofline.PAGE}",
            roofline.main, roofline.OPTIONS,
        ),
        "fidelity": Command(
            "how much of small noise survives rounding, by type and sigma; see docs/internals/noise.md",
            _printed(lambda args: fidelity.report()),
        ),
        "variance": Command(
            "what several noise draws in one step do to the gradient; see docs/samples.md",
            variance.main, variance.OPTIONS,
        ),
        "training": Command(
            "an optimiser step of Llama-shaped blocks or of MiniLM, against PEFT's LoRA and the authors' procedure",
            _training, (*training.OPTIONS, *PLACE),
        ),
        "overhead": Command("time per call over F.linear on a layer of 8 x 8", _overhead, PLACE),
        "list": Command(
            "sets, layers and providers, and why a provider cannot run here", _list,
            [option("--device", choices=("cpu", "cuda"))],
        ),
        "table": Command(
            "Markdown of a run", _printed(lambda args: table.summary(results.load(args.file), args.long)),
            (file, flag("--long", "a line to every provider, with percentiles")),
        ),
        "plot": Command(
            "PNGs of a run: ratio to plain against M", _plot,
            (file, option("--out", "folder; default that of the file", type=Path)),
        ),
        "offline": Command(
            "compile the Triton kernels without a GPU and print what came out; see docs/internals/kernels.md",
            offline.main, offline.add_arguments,
        ),
        "compiled": Command(
            "compile the CUDA kernels without a GPU and print what came out; see docs/internals/cuda_kernels.md",
            compiled.main, compiled.add_arguments,
        ),
        "compare": Command(
            "two runs side by side",
            _printed(lambda args: table.compare(results.load(args.a), results.load(args.b))),
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
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=command.help, description=command.help)
        if callable(command.options):
            command.options(subparser)
        else:
            options.add(subparser, command.options)
    args = parser.parse_args(given)
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
        return commands[args.command].run(args)
    except ValueError as error:
        if args.command != "tune":
            raise
        parser.error(str(error))
