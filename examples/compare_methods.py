"""All methods of the family on digits.py's task: each tuned alike, then at equal steps and at equal time.

    python examples/compare_methods.py tune --seed 7000 --seeds 4 --folder compared
    python examples/compare_methods.py clock --folder compared
    python examples/compare_methods.py run --seed 7100 --seeds 16 --folder compared
    python examples/compare_methods.py report --folder compared --figure methods.svg

`tune` runs each candidate of each method on seeds of its own; the one with the best mean accuracy on clean images goes
on. `clock` measures its step beside LoRA's: processor time of one thread, medians of rounds in turn. `run` has two runs
a method and seed: as many steps as LoRA, and as many as LoRA's time pays for. Methods share pre-training, images, head
and order of the batches, those with adapters also the adapters at the start.

A folder holds `methods-tune.csv`, `methods-clock.csv` and `methods.csv`. A run that a file holds is not repeated, a
clock is. LPF-SGD draws five times a step, HaLoRA has no regulariser, and what trains weights has noise on the head.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import digits
import torch
import torch.nn.functional as F
from common import append_csv, by_rows, check_counts, closures_for, complete, mean_and_error, read_csv
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, NoiseController, apply_flat_lora, flatness
from flatlora_kernels.methods import make

BASELINE = "lora"
STEPS = 300
SIGMA_AFTER = 0.2  # the strength at which the increase of the loss is measured
FORWARD_ONLY = ("mezo", "es", "eggroll")
STEPS_A_ROUND = 10  # of `clock`
STAGES = ("tune", "clock", "run", "report")
BUDGETS = ("steps", "time")
Settings = dict[str, Any]


class Candidate(NamedTuple):
    """A method with its settings."""

    method: str
    setting: str  # what is tuned, in words
    lr: float
    controller: Settings = {}
    options: Settings = {}
    on_weights: bool = False  # trains the layers' and the head's weights, instead of adapters and head


def by_lr(
    method: str, rates: Iterable[float], on_weights: bool = False, sigma: float = 0.0, **options: Any
) -> list[Candidate]:
    return [Candidate(method, f"lr {lr:g}", lr, {"sigma": sigma}, options, on_weights) for lr in rates]


def by_option(method: str, name: str, values: Iterable[float]) -> list[Candidate]:
    return [
        Candidate(method, f"{name} {v:g}, lr {lr:g}", lr, {}, {name: v}) for lr in TWO_RATES for v in values
    ]


def by_sigma(method: str, values: Iterable[float], of_rows: bool = False, **options: Any) -> list[Candidate]:
    """Of Flat-LoRA's noise, or of that by rows which is as strong."""
    width = digits.parse_arguments([]).width
    return [
        Candidate(
            method, f"sigma {v:g}, lr {lr:g}", lr, by_rows(v, width) if of_rows else {"sigma": v}, options
        )
        for lr in TWO_RATES
        for v in values
    ]


SIGMAS, RHOS = (0.2, 0.3, 0.4), (0.01, 0.05, 0.2)
TWO_RATES, RATES, RATES_OF_WEIGHTS = (
    (2e-3, 8e-3),
    (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    (2e-4, 5e-4, 1e-3, 2e-3, 4e-3),
)
# Three strengths of what a method adds to LoRA at two learning rates, or more learning rates where it adds nothing that
# has a strength, or trains other parameters.
CANDIDATES: dict[str, list[Candidate]] = {
    "lora": by_lr("lora", RATES),
    "flat-lora": by_sigma("flat-lora", SIGMAS),
    "flat-lora, half of the layers": by_sigma("flat-lora", (0.3, 0.4, 0.6), share=0.5),
    "bi-lora": by_option("bi-lora", "rho", RHOS),
    "sam": by_option("sam", "rho", RHOS),
    "esam": by_option("esam", "rho", RHOS),
    "sl-sam": by_option("sl-sam", "rho", RHOS),
    "lora-sam": by_option("lora-sam", "rho", RHOS),
    "eflat-lora": by_option("eflat-lora", "rho", RHOS),
    "lora-pro": by_lr("lora-pro", RATES),
    "lora-pro, noise": by_sigma("lora-pro", SIGMAS),
    "halora": by_option("halora", "sigma", (0.02, 0.05, 0.1)),
    "rwp": by_sigma("rwp", SIGMAS, of_rows=True, mix=0.5),
    "lpf-sgd": by_sigma("lpf-sgd", SIGMAS, of_rows=True),
    "neftune": by_option("neftune", "alpha", (1.0, 5.0, 15.0)),
    "full": by_lr("lora", RATES_OF_WEIGHTS, on_weights=True),
    "full-noise": by_lr("full-noise", RATES_OF_WEIGHTS, on_weights=True, sigma=0.3),
    "mezo": by_lr("mezo", (1e-4, 2e-4, 5e-4), on_weights=True),
    "es": by_lr("es", (1e-3, 3e-3, 1e-2), on_weights=True, together=30),
    "eggroll": by_lr("eggroll", (1e-3, 3e-3, 1e-2), on_weights=True, together=30),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("stage", choices=STAGES)
    add("--folder", type=Path, default=Path(), help="of the files")
    add("--method", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    add("--seed", type=int, default=0, help="the first")
    add("--seeds", type=int, default=4, help="this many, from --seed on")
    add("--steps", type=int, default=STEPS, help="LoRA's")
    add("--rounds", type=int, default=15, help="of `clock`")
    add("--figure", type=Path, help="file for `report` to draw to; needs matplotlib")
    arguments = parser.parse_args(argv)
    check_counts(parser, arguments, "seeds", "steps", "rounds")
    return arguments


def adapted(model: nn.Module, candidate: Candidate, seed: int, steps: int) -> None:
    """Makes the layers of the model those of the candidate, and what it trains require gradients."""
    settings = digits.parse_arguments([])
    controller: Settings = {"sigma": 0.0, "schedule": "cosine", "total_steps": steps} | candidate.controller
    torch.manual_seed(seed)
    targets = f"{digits.ADAPTED}|head" if candidate.on_weights else digits.ADAPTED
    apply_flat_lora(
        model,
        targets,
        r=0 if candidate.on_weights else settings.r,
        lora_alpha=settings.lora_alpha,
        train_weight=candidate.on_weights,
        noise_controller=NoiseController(seed=seed, **controller),
        verbose=False,
    )
    if candidate.on_weights:  # and no biases: several members of a population share a pass
        weights = {id(m.weight) for m in model.modules() if isinstance(m, FlatLoraLinear)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in weights)
    else:
        model.head.requires_grad_(True)


def prepared(
    model: nn.Module, candidate: Candidate, images: Tensor, labels: Tensor, seed: int, steps: int
) -> tuple[Any, Callable[[Tensor], list[Callable[..., Tensor]]]]:
    """The method, and what its step takes for the rows of a batch."""
    adapted(model, candidate, seed, steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.SGD(trained, lr=candidate.lr)
        if candidate.method in FORWARD_ONLY
        else torch.optim.AdamW(trained, lr=candidate.lr, weight_decay=0.01)
    )
    options = {"embedding": model.embed} if candidate.method == "neftune" else {}
    method = make(candidate.method, model, optimizer, **options, **candidate.options)

    def loss(rows: Tensor, **reduction: str) -> Tensor:
        return F.cross_entropy(model(images[rows]), labels[rows], **reduction)

    def of_members(rows: Tensor, members: int) -> Tensor:
        return loss(rows.repeat(members), reduction="none").view(members, -1).mean(1)

    if candidate.options.get("together"):
        return method, lambda rows: [lambda members: of_members(rows, members)]
    return method, lambda rows: closures_for(candidate.method, loss, rows)


def finetuned(
    base: nn.Module, candidate: Candidate, images: Tensor, labels: Tensor, seed: int, steps: int
) -> nn.Module:
    model = copy.deepcopy(base)
    method, closures = prepared(model, candidate, images, labels, seed, steps)
    digits.run(method, closures, len(images), argparse.Namespace(steps=steps, batch_size=25), seed)
    return model.eval()


class Task(NamedTuple):
    """That of one seed: a model before fine-tuning, a few images, tests."""

    base: digits.ViT
    train: tuple[Tensor, Tensor]
    tests: dict[str, list[Tensor]]
    labels: Tensor

    @classmethod
    def of(cls, seed: int) -> Task:
        settings = digits.parse_arguments([])
        images, labels = digits.load_digits()
        new_images, new_labels = digits.of_digits(digits.NEW, images, labels)
        few, rest = digits.split(new_images, new_labels, settings.shots, seed)
        train = new_images[few], new_labels[few]
        tests = {name: [x[rest] for x in of] for name, of in digits.shifted(new_images).items()}
        base = digits.pretrain(*digits.of_digits(digits.OLD, images, labels), settings, seed)
        digits.fit_head(base, *train)
        return cls(base, train, tests, new_labels[rest])

    def measured(self, model: nn.Module) -> dict[str, float]:
        """Accuracies, the loss on the few images, its increase under noise in the blocks, and intruders there."""

        def loss() -> Tensor:
            return F.cross_entropy(model(self.train[0]), self.train[1])

        found = digits.accuracies(model, self.tests, self.labels)
        with torch.no_grad():
            found["loss"] = loss().item()
        (increase,) = flatness.expected_increase(model.blocks, loss, (SIGMA_AFTER,), draws=8)
        before = dict(self.base.named_modules())
        layers = [
            (f"blocks.{n}", m) for n, m in model.blocks.named_modules() if isinstance(m, FlatLoraLinear)
        ]
        with torch.no_grad():
            intruders = sum(len(flatness.intruders(before[n].weight, in_use(m))) for n, m in layers)
        return found | {f"increase {SIGMA_AFTER:g}": increase.mean, "intruders": intruders}


def in_use(layer: FlatLoraLinear) -> Tensor:
    """The weight with its adapter."""
    return layer.weight + layer.scaling * layer.lora_B @ layer.lora_A if layer.r else layer.weight


def chosen(rows: list[dict[str, Any]], steps: int) -> dict[str, Candidate]:
    """Of each method the candidate with the best mean accuracy on clean images, over the seeds that all have.

    Methods of which a candidate has not run are left out.
    """
    rows = [row for row in rows if int(row["steps"]) == steps]
    found = {}
    for name, candidates in CANDIDATES.items():
        of: dict[str, list[float]] = {}
        for row in complete([r for r in rows if r["method"] == name], lambda row: row["setting"]):
            of.setdefault(row["setting"], []).append(float(row["clean"]))
        if of.keys() >= {c.setting for c in candidates}:
            found[name] = max(candidates, key=lambda c: statistics.fmean(of[c.setting]))
    return found


def tune(args: argparse.Namespace, path: Path) -> None:
    done = {(row["seed"], row["method"], row["setting"], int(row["steps"])) for row in read_csv(path)}
    for seed in range(args.seed, args.seed + args.seeds):
        left = [
            (n, c)
            for n in args.method
            for c in CANDIDATES[n]
            if (str(seed), n, c.setting, args.steps) not in done
        ]
        task = Task.of(seed) if left else None
        for name, candidate in left:
            model = finetuned(task.base, candidate, *task.train, seed, args.steps)
            row = {"seed": seed, "method": name, "setting": candidate.setting, "steps": args.steps}
            append_csv(path, [row | digits.accuracies(model, task.tests, task.labels)])
            print(seed, name, candidate.setting, flush=True)


def clock(args: argparse.Namespace, best: dict[str, Candidate], path: Path) -> None:
    """Milliseconds a step of processor time, and the steps that LoRA's time pays for."""
    task = Task.of(args.seed)
    ready = {}
    for name, candidate in best.items():
        model = copy.deepcopy(task.base).train()
        ready[name] = prepared(model, candidate, *task.train, args.seed, STEPS_A_ROUND * (args.rounds + 1))
    spent: dict[str, list[float]] = {name: [] for name in ready}
    order = torch.Generator().manual_seed(args.seed)
    for _ in range(args.rounds + 1):
        for name, (method, closures) in ready.items():
            start = time.process_time()
            for _ in range(STEPS_A_ROUND):
                method.step(*closures(torch.randperm(len(task.train[0]), generator=order)[:25]))
            spent[name].append((time.process_time() - start) / STEPS_A_ROUND)
    medians = {name: statistics.median(values[1:]) for name, values in spent.items()}
    others = [row for row in read_csv(path) if row["method"] not in medians]
    path.unlink(missing_ok=True)
    if others:
        append_csv(path, others)
    for name, seconds in medians.items():
        ratio = seconds / medians[BASELINE]
        low, high = (1e3 * f(spent[name][1:]) for f in (min, max))
        row = {
            "method": name,
            "setting": best[name].setting,
            "milliseconds": f"{1e3 * seconds:.3f}",
            "least": f"{low:.3f}",
        }
        row |= {"most": f"{high:.3f}", "ratio": f"{ratio:.3f}", "steps": max(1, round(args.steps / ratio))}
        append_csv(path, [row])
        print(row, flush=True)


def run(args: argparse.Namespace, best: dict[str, Candidate], clocked: dict[str, int], path: Path) -> None:
    earlier = read_csv(path)
    for row in (row for row in earlier if row["method"] in args.method):
        steps = args.steps if row["budget"] == "steps" else clocked[row["method"]]
        wanted = best[row["method"]].setting, str(steps)
        if (row["setting"], row["steps"]) != wanted:
            raise SystemExit(
                f"{path}: expected runs of {row['method']} with {wanted[0]} and {wanted[1]} steps, got some"
                f" with {row['setting']} and {row['steps']}: another tuning or clock; begin a new folder"
            )
    done = {(row["seed"], row["method"], row["budget"]) for row in earlier}
    for seed in range(args.seed, args.seed + args.seeds):
        left = [(n, b) for n in args.method for b in BUDGETS if (str(seed), n, b) not in done]
        task = Task.of(seed) if left else None
        for name, budget in left:
            steps = args.steps if budget == "steps" else clocked[name]
            model = finetuned(task.base, best[name], *task.train, seed, steps)
            row = {
                "seed": seed,
                "method": name,
                "setting": best[name].setting,
                "budget": budget,
                "steps": steps,
            }
            append_csv(path, [row | task.measured(model)])
            print(seed, name, budget, flush=True)


def gains(rows: list[dict[str, Any]], column: str) -> dict[tuple[str, str], list[float]]:
    """Of each method and budget: accuracy minus LoRA's at equal steps, in points, a value for each seed."""
    of: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        of.setdefault((row["method"], row["budget"]), {})[row["seed"]] = 100 * float(row[column])
    plain = of[BASELINE, "steps"]
    return {arm: [value - plain[seed] for seed, value in values.items()] for arm, values in of.items()}


def report(rows: list[dict[str, Any]], clocked: dict[str, dict[str, Any]]) -> str:
    """A table: gains over LoRA at equal steps and equal time; what else was measured, at equal steps."""
    rows = complete(rows, lambda row: (row["method"], row["budget"]))
    if not rows:
        raise SystemExit("methods.csv: expected a seed with all methods and budgets that it has, got none")
    seeds = len({row["seed"] for row in rows})
    gain = {test: gains(rows, test) for test in digits.ACCURACIES}
    columns = [
        "setting",
        "time",
        "clean",
        "equal time",
        *digits.ACCURACIES[1:],
        "median increase",
        "intruders",
    ]
    lines = [
        f"seeds: {seeds}; accuracies: points over {BASELINE}",
        " " * 32 + "".join(c.rjust(20 if c == "setting" else 16) for c in columns),
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name and row["budget"] == "steps"]
        cells = [own[0]["setting"], clocked[name]["ratio"], mean_and_error(gain["clean"][name, "steps"])]
        cells += [mean_and_error(gain["clean"][name, "time"])]
        cells += [mean_and_error(gain[test][name, "steps"]) for test in digits.ACCURACIES[1:]]
        cells += [f"{statistics.median(float(row[f'increase {SIGMA_AFTER:g}']) for row in own):.3g}"]
        cells += [mean_and_error([float(row["intruders"]) for row in own])]
        lines.append(name.ljust(32) + cells[0].rjust(20) + "".join(cell.rjust(16) for cell in cells[1:]))
    level = mean_and_error(
        [100 * float(r["clean"]) for r in rows if (r["method"], r["budget"]) == (BASELINE, "steps")]
    )
    return "\n".join([*lines, f"{BASELINE}: {level} % of clean images"])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Gain over LoRA on clean images, a line a method, bars of one standard error."""
    from matplotlib.figure import Figure

    gain = gains(complete(rows, lambda row: (row["method"], row["budget"])), "clean")
    names = sorted(
        {name for name, _ in gain if name != BASELINE}, key=lambda n: statistics.fmean(gain[n, "steps"])
    )
    figure = Figure(figsize=(7, 0.3 * len(names) + 1), layout="constrained")
    axes = figure.subplots()
    for budget, marker, shift in (("steps", "o", 0.12), ("time", "s", -0.12)):
        values = [gain[name, budget] for name in names]
        errors = [statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in values]
        places = [i + shift for i in range(len(names))]
        axes.errorbar(
            [statistics.fmean(v) for v in values], places, xerr=errors, fmt=marker, markersize=4, capsize=2,
            label=f"equal {budget}",
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("gain over LoRA on clean images, points")
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> str:
    """Runs a stage; returns what it printed at the end."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    tuned, clocked, runs = (args.folder / f"methods{name}.csv" for name in ("-tune", "-clock", ""))
    if args.stage == "tune":
        tune(args, tuned)
    if args.stage != "tune" and BASELINE not in args.method:
        raise SystemExit(f"--method: expected {BASELINE}, which the others are compared with, among them")
    best = {name: c for name, c in chosen(read_csv(tuned), args.steps).items() if name in args.method}
    if missing := [name for name in args.method if name not in best]:
        raise SystemExit(
            f"{tuned}: expected runs of {args.steps} steps of all methods, got none of {', '.join(missing)}"
        )
    if args.stage == "clock":
        clock(args, best, clocked)
    if args.stage in ("run", "report"):
        times = {row["method"]: row for row in read_csv(clocked)}
        if missing := [name for name in args.method if name not in times]:
            raise SystemExit(
                f"{clocked}: expected all methods, got none of {', '.join(missing)}: run `clock` first"
            )
        if args.stage == "run":
            run(args, best, {name: int(row["steps"]) for name, row in times.items()}, runs)
        else:
            text = report(read_csv(runs), times)
            print(text)
            if args.figure:
                plot(read_csv(runs), args.figure)
            return text
    return ""


if __name__ == "__main__":
    main()
