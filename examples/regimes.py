"""How the best strength of the noise moves with rank, learning rate, labels, length and model, on digits.py's task.

    python examples/regimes.py --seeds 10 --csv regimes.csv

Each regime differs from the first in one setting. A line per run holds, beside accuracies, how much noise of several
strengths raised the loss on the few images before the first step: what a rule for choosing sigma could go by. The table
has the gain over LoRA for each regime and strength, and what two ways of choosing lose against the best strength.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from pathlib import Path
from typing import Any

import digits
import torch
import torch.nn.functional as F
from common import Arm, append_csv, complete, mean_and_error, read_csv

from flatlora_kernels import flatness

SIGMAS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
REGIMES: dict[str, dict[str, Any]] = {
    "base": {},
    "rank 1": {"r": 1, "lora_alpha": 2},
    "rank 16": {"r": 16, "lora_alpha": 32},
    "lr 5e-4": {"lr": 5e-4},
    "lr 4e-3": {"lr": 4e-3},
    "5 labels": {"shots": 5},
    "40 labels": {"shots": 40},
    "100 steps": {"steps": 100},
    "1000 steps": {"steps": 1000},
    "depth 4": {"depth": 4},
    "width 32": {"width": 32},
    "short pre-training": {"pretrain_steps": 100},
}
# Regimes that a rule may be fitted to; it is judged by the others. Of limits that fit as well the smallest is taken.
FITTED = ("base", "rank 1", "lr 5e-4", "40 labels", "100 steps", "width 32")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--regime", nargs="+", choices=REGIMES, default=list(REGIMES))
    add("--sigma", type=float, nargs="+", default=list(SIGMAS))
    add("--seed", type=int, default=0, help="the first")
    add("--seeds", type=int, default=5, help="repeat the whole with this many seeds from --seed on")
    add("--csv", type=Path, help="file for a line per run; runs that it holds already are not repeated")
    return parser.parse_args(argv)


def before(model: digits.ViT, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Loss on the few images, and its increase under noise."""
    increases = flatness.expected_increase(
        model, lambda: F.cross_entropy(model(images), labels), sigmas=SIGMAS, draws=8
    )
    loss = F.cross_entropy(model(images), labels).item()
    return {"start loss": loss} | {f"start increase {i.sigma:g}": i.mean for i in increases}


def gains(rows: list[dict[str, Any]]) -> dict[str, dict[float, list[float]]]:
    """Of each regime and strength: clean accuracy minus LoRA's, in points, a value for each seed that has both."""
    of: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        of.setdefault(arm(row), {})[str(row["seed"])] = 100 * float(row["clean"])
    found: dict[str, dict[float, list[float]]] = {}
    for (regime, sigma), values in of.items():
        plain = of.get((regime, 0.0), {})
        if sigma and (both := [s for s in values if s in plain]):
            found.setdefault(regime, {})[sigma] = [values[s] - plain[s] for s in both]
    return found


def chosen(rows: list[dict[str, Any]], limit: float) -> dict[str, float]:
    """Of each regime the largest strength whose mean increase before the first step is at most `limit` times the loss.

    The smallest where none is.
    """
    found = {}
    for regime in dict.fromkeys(row["regime"] for row in rows):
        of = [row for row in rows if row["regime"] == regime]
        loss = statistics.fmean(float(row["start loss"]) for row in of)
        rises = {s: statistics.fmean(float(row[f"start increase {s:g}"]) for row in of) for s in SIGMAS}
        found[regime] = max((s for s in SIGMAS if rises[s] <= limit * loss), default=min(SIGMAS))
    return found


def lost(gain: dict[str, dict[float, list[float]]], choice: dict[str, float]) -> float:
    """Points that a choice loses against the best strength of each regime, in the mean over the regimes."""
    means = {r: {s: statistics.fmean(v) for s, v in of.items()} for r, of in gain.items()}
    return statistics.fmean(max(of.values()) - of[choice[r]] for r, of in means.items())


def arm(row: dict[str, Any]) -> tuple[str, float]:
    """Of rows that differ in the seed alone."""
    return row["regime"], float(row["sigma"])


def report(rows: list[dict[str, Any]]) -> str:
    """The table, and what two ways of choosing lose, over the seeds with which every regime and strength has run."""
    rows = complete(rows, arm)
    gain = gains(rows)
    sigmas = sorted({s for of in gain.values() for s in of})
    lines = ["gain over LoRA on clean images, points", " " * 22 + "".join(f"{s:>16g}" for s in sigmas)]
    for regime, of in gain.items():
        lines.append(
            regime.ljust(22)
            + "".join(f"{mean_and_error(of[s]):>16}" if s in of else " " * 16 for s in sigmas)
        )
    fitted = {r: of for r, of in gain.items() if r in FITTED}
    held_out = {r: of for r, of in gain.items() if r not in FITTED}
    if not fitted or not held_out or any(set(of) != set(SIGMAS) for of in gain.values()):
        return "\n".join(lines)
    constant = min(SIGMAS, key=lambda s: lost(fitted, dict.fromkeys(fitted, s)))
    limit = min((10 ** (e / 8) for e in range(-24, 25)), key=lambda c: lost(fitted, chosen(rows, c)))
    rule = chosen(rows, limit)
    lines += [
        "",
        f"fitted on {', '.join(fitted)}",
        f"one strength for all, {constant:g}: loses {lost(fitted, dict.fromkeys(fitted, constant)):.2f} points there"
        f" against the best of each, {lost(held_out, dict.fromkeys(held_out, constant)):.2f} on the others",
        f"the largest that raises the loss before the first step to at most {1 + limit:.3g} times:"
        f" {lost(fitted, rule):.2f} there, {lost(held_out, rule):.2f} on the others",
        "its choices: " + ", ".join(f"{r} {rule[r]:g}" for r in gain),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    images, labels = digits.load_digits()
    old, new = digits.of_digits(digits.OLD, images, labels), digits.of_digits(digits.NEW, images, labels)
    tests = digits.shifted(new[0])
    earlier = read_csv(args.csv)
    done = {(row["seed"], *arm(row)) for row in earlier}
    rows: list[dict[str, Any]] = []
    for seed in range(args.seed, args.seed + args.seeds):
        for regime in args.regime:
            left = [s for s in (0.0, *args.sigma) if (str(seed), regime, s) not in done]
            if not left:
                continue
            settings = digits.parse_arguments([])
            vars(settings).update(REGIMES[regime])
            few, rest = digits.split(*new, settings.shots, seed)
            train = new[0][few], new[1][few]
            test = {name: [x[rest] for x in variants] for name, variants in tests.items()}
            base = digits.pretrain(*old, settings, seed)
            digits.fit_head(base, *train)
            probe, _ = digits.with_adapters(copy.deepcopy(base), Arm("lora"), settings, seed)
            start = before(probe, *train)
            for sigma in left:
                model = copy.deepcopy(base)
                run = Arm("flat-lora", sigma) if sigma else Arm("lora")
                model = digits.finetune(model, run, *train, settings, seed)
                row = {"regime": regime, "seed": seed, "sigma": sigma} | digits.accuracies(
                    model, test, new[1][rest]
                )
                row["train loss"] = F.cross_entropy(model(train[0]), train[1]).item()
                rows.append(row | start)
                if args.csv:
                    append_csv(args.csv, [rows[-1]])
            print(seed, regime, f"start loss {start['start loss']:.3g}", flush=True)
    print(report([*earlier, *rows]))
    if not all(math.isfinite(row["train loss"]) for row in rows):
        print("some runs diverged")
    return rows


if __name__ == "__main__":
    main()
