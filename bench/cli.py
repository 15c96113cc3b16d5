"""The command line of `python -m bench`."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flatlora_kernels.spec.noise import KINDS

from . import (
    compare,
    environment,
    fidelity,
    overhead,
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
from .results import Results
from .shapes import MODES, SETS, Case

_LOCAL = Path(__file__).parent / "results" / "local"
_SHORT = ("quick", "targets", "square4096")  # sets
_COMMANDS = (
    "run",
    "overhead",
    "list",
    "table",
    "plot",
    "compare",
    "tune",
    "offline",
    "compiled",
    "roofline",
    "fidelity",
    "variance",
    "training",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times the fused noisy linear against its rivals; without arguments, the quick set.",
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help)

    p = add("run", "time a set of cases (this is what happens without a command)")
    p.add_argument("--set", default="quick", choices=SETS, help="which cases; a model: all its layers")
    p.add_argument("--m", type=int, nargs="+", help="take these rows of x in place of the set's")
    p.add_argument("--dtypes", nargs="+", choices=("float16", "bfloat16", "float32", "float64"))
    p.add_argument("--modes", nargs="+", choices=MODES)
    p.add_argument("--rank", type=int, nargs="+", help="of the adapter, 0 = none; in place of the set's")
    p.add_argument("--noise", nargs="+", choices=KINDS, default=list(KINDS))
    p.add_argument("--providers", nargs="+", help="only these and plain; fused: all backends")
    p.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="default: not in quick and square4096"
    )
    p.add_argument(
        "--memory",
        choices=("none", "first", "largest", "all"),
        help="where to measure peak memory; largest: M of each layer. Default: first in quick, else largest",
    )
    p.add_argument(
        "--budget", type=float, help="seconds for each provider of a case; 0.15 in quick, else 0.5"
    )
    p.add_argument("--min-rounds", type=int, default=5, help="also where that takes longer than the budget")
    p.add_argument("--time-limit", type=float, help="seconds, no case is begun after; default 40 in quick")
    p.add_argument(
        "--graph",
        choices=("none", "small", "all"),
        help=f"cases to time as CUDA graphs as well; small: at most {run.GRAPH_ROWS} rows; default on a GPU",
    )
    p.add_argument(
        "--processes", type=int, help="that compile Triton kernels before anything is timed; 0 = none"
    )
    _place(p)
    p.add_argument(
        "--parts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="first the overhead, the generator and noise_scale by themselves",
    )
    p.add_argument("--ways", action="store_true", help="the op's panels, split noise and own choice, too")
    p = add("tune", "search tiles for the Triton kernels on this GPU and print a table for configs.py")
    p.add_argument(
        "--strategies",
        action="store_true",
        help="instead measure fused kernels against panels and write the table of the automatic choice",
    )
    p.add_argument("--quick", action="store_true", help="with --strategies: a few cases")
    p.add_argument("--backends", nargs="+", help="with --strategies: measure these alone, and write no table")
    p.add_argument(
        "--rows",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="with --strategies: the table of these measurements",
    )
    p.add_argument(
        "--device", choices=("cpu", "cuda"), help="with --strategies: default cuda where there is one"
    )
    p.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float16"], choices=("float16", "bfloat16", "float32", "tf32"),
        help="16-bit types, float32 or tf32: the table has a part for each",
    )  # fmt: skip
    p.add_argument(
        "--time-limit", type=float, default=270.0, help="seconds; the most telling cases come first"
    )
    p.add_argument("--candidates", type=int, default=16, help="tiles to try for each line of the table")
    p.add_argument("--processes", type=int, help="that compile; default one for every core but two")
    p.add_argument(
        "--dry-run", action="store_true", help="in Triton's interpreter, where no time means anything"
    )
    p.add_argument("--table", action="store_true", help="print the table after a dry run, too")
    p.add_argument("--out", type=Path, default=_LOCAL, help="folder of the CSV and JSON")
    p.add_argument("--name", help="of the files; default tune, device and time")
    p = add(
        "roofline",
        "what kernels ask of each unit of a GPU, predicted, and of this CPU, measured; see docs/performance.md",
    )
    roofline.add_arguments(p)
    add("fidelity", "how much of small noise survives rounding, by type and sigma; see docs/noise.md")
    p = add("variance", "what several noise draws in one step do to the gradient; see docs/samples.md")
    variance.add_arguments(p)
    p = add(
        "training",
        "an optimiser step of Llama-shaped blocks or of MiniLM, against PEFT's LoRA and the authors' procedure",
    )
    training.add_arguments(p)
    _place(p)
    p = add("overhead", "time per call over F.linear on a layer of 8 x 8")
    _place(p)
    p = add("list", "sets, layers and providers, and why a provider cannot run here")
    p.add_argument("--device", choices=("cpu", "cuda"))
    p = add("table", "Markdown of a run")
    p.add_argument("file", type=Path)
    p.add_argument("--long", action="store_true", help="a line to every provider, with percentiles")
    p = add("plot", "PNGs of a run: ratio to plain against M")
    p.add_argument("file", type=Path)
    p.add_argument("--out", type=Path, help="folder; default that of the file")
    p = add(
        "offline", "compile the Triton kernels without a GPU and print what came out; see docs/kernels.md"
    )
    offline.add_arguments(p)
    p = add(
        "compiled", "compile the CUDA kernels without a GPU and print what came out; see docs/cuda_kernels.md"
    )
    compiled.add_arguments(p)
    p = add("compare", "two runs side by side")
    p.add_argument("a", type=Path)
    p.add_argument("b", type=Path)
    return parser


def _place(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    p.add_argument("--threads", type=int, help="of torch, on a CPU")
    p.add_argument("--out", type=Path, default=_LOCAL, help="folder of the CSV and JSON")
    p.add_argument("--name", help="of the files; default set, device and time")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0] not in _COMMANDS and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    parser = _parser()
    args = parser.parse_args(given)
    if args.command == "table":
        print(table.summary(results.load(args.file), args.long))
    elif args.command == "plot":
        from . import plot  # matplotlib is wanted here alone

        for path in plot.plot(results.load(args.file), args.out or args.file.parent, args.file.stem):
            print(path)
    elif args.command == "compare":
        print(compare.compare(results.load(args.a), results.load(args.b)))
    elif args.command == "offline":
        return offline.main(args)
    elif args.command == "compiled":
        return compiled.main(args)
    elif args.command == "fidelity":
        print(fidelity.report())
    elif args.command == "variance":
        return variance.main(args)
    elif args.command == "roofline":
        return roofline.main(args)
    elif args.command == "tune":
        from . import strategies, tune

        try:
            if args.strategies:
                device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
                if args.rows:
                    return strategies.combine(args.rows)
                return strategies.main(
                    device, args.quick, args.time_limit, args.out, args.name, backends=args.backends
                )
            return tune.main(
                args.dtypes, args.time_limit, args.candidates, args.processes, args.out, args.name, args.dry_run,
                args.table,
            )  # fmt: skip
        except ValueError as error:
            parser.error(str(error))
    else:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU here")
        if args.command == "list":
            print(_list(device))
            return 0
        if device == "cpu" and getattr(args, "graph", None) not in (None, "none"):
            parser.error(f"--graph {args.graph}: CUDA graphs need --device cuda, got cpu")
        if args.threads:
            torch.set_num_threads(args.threads)
        return {"overhead": _overhead, "training": _training, "run": _run}[args.command](args, device)
    return 0


def _cases(args: argparse.Namespace, device: str) -> list[Case]:
    fields = {"M": args.m, "dtype": args.dtypes, "mode": args.modes, "rank": args.rank}
    cases = shapes.cases(args.set, device)
    for field, values in fields.items():
        if values:
            cases = [c._replace(**{field: value}) for c in cases for value in values]
    return list(dict.fromkeys(cases))


def _memory_cases(which: str, cases: list[Case]) -> set[Case]:
    if which == "none":
        return set()
    if which == "largest":
        return set({case._replace(M=0): case for case in sorted(cases, key=lambda c: c.M)}.values())
    return set(cases if which == "all" else cases[:1])


def _run(args: argparse.Namespace, device: str) -> int:
    quick = args.set == "quick"

    def default(value: Any, in_quick: Any, otherwise: Any) -> Any:
        return value if value is not None else in_quick if quick else otherwise

    settings = run.Settings(
        device=device,
        noises=tuple(args.noise),
        providers=tuple(args.providers) if args.providers else None,
        compiled=args.compile if args.compile is not None else args.set not in _SHORT,
        # It takes seconds: of interest in these sets only where it is all there is.
        reference=args.set not in _SHORT,
        ways=args.ways or args.set == "targets",
        budget=default(args.budget, 0.15, 0.5),
        min_rounds=args.min_rounds,
        time_limit=default(args.time_limit, 40.0, math.inf),
        graph=args.graph or ("small" if device == "cuda" else "none"),
        parts=args.parts,
    )
    cases = _cases(args, device)
    meta = environment.describe(device)
    started = time.perf_counter()
    run.compile_first(device, cases, settings.noises, args.processes)
    settings = settings._replace(time_limit=settings.time_limit - (time.perf_counter() - started))
    memory_cases = _memory_cases(default(args.memory, "first", "largest"), cases)
    stem = _stem(args, meta, args.set)

    def after_case(bench: run.Bench) -> None:
        results.save_json(Results(meta, bench.rows, bench.failures, list(bench.skipped)), stem)

    bench = run.run(settings, cases, memory_cases, after_case)
    if isinstance(bench.timer, timing.CudaTimer):
        meta["launched_late"] = f"{bench.timer.late} of {bench.timer.calls} calls"
    return _finish(args, meta, Results(meta, bench.rows, bench.failures, list(bench.skipped)), args.set)


def _overhead(args: argparse.Namespace, device: str) -> int:
    meta = environment.describe(device)
    usable = [name for name, reason in providers.available_backends(device).items() if reason is None]
    return _finish(args, meta, Results(meta, overhead.measure(usable, device), [], []), "overhead")


def _training(args: argparse.Namespace, device: str) -> int:
    meta = environment.describe(device)
    return _finish(args, meta, Results(meta, *training.main(args, device)), "training")


def _stem(args: argparse.Namespace, meta: dict[str, Any], what: str) -> Path:
    name = args.name or f"{what}-{meta['device']}-{meta['date'].replace(':', '').split('+')[0]}"
    return args.out / name


def _finish(args: argparse.Namespace, meta: dict[str, Any], found: Results, what: str) -> int:
    meta["clocks_after"] = environment.clocks(meta["device"])
    meta["config"] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    meta["environment"] = {k: v for k, v in os.environ.items() if k.startswith(("FLATLORA_", "OMP_", "MKL_"))}
    meta["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    print(table.summary(found))
    if what == "targets":
        print("\n" + targets.report(found.rows, meta["device"]))
    print("\n" + "\n".join(f"Written: {path}" for path in results.save(found, _stem(args, meta, what))))
    return 1 if found.failures else 0


def _list(device: str) -> str:
    lines = ["Sets: " + ", ".join(SETS), "", "Layers, (out_features, in_features):"]
    for name, model in shapes.MODELS.items():
        layers = ", ".join(f"{layer.name} ({layer.N}, {layer.K})" for layer in model.layers)
        lines.append(f"  {name}: {layers}; M {', '.join(map(str, model.rows))}; {model.note}")
    lines += ["", f"Providers on {device}:"]
    lines += [f"  {p.name}: {p.what}" for p in providers.every(device)]
    missing = {k: v for k, v in providers.available_backends(device).items() if v}
    lines += [f"  not here, fused:{name}: {reason}" for name, reason in missing.items()]
    return "\n".join(lines)
