"""What committed rows say to the first questions of docs/internals/comparisons.md: intervals, p values, a figure.

    python examples/evidence.py bench/results/*-2-cores --figure docs/figures/dinov2.svg

Reads the CSV files that the examples wrote; a file may lie in several folders, each with seeds of its own: all runs of
a seed are of one machine. A question whose rows are not there is left out, with the reason. Differences are paired by
seed. p is of a two-sided t test; where an entry names several tests, it is Holm's over these. All seeds of
vit.py and language_model.py see the same test data, whose choice no interval has.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import compare_methods
import finetune_sentiment
import language_model
import regimes
import vit
from common import COMPRESSIONS, complete, read_csv
from scipy import stats

Row = dict[str, Any]
Value = Callable[[Row], float]


class Test(NamedTuple):
    name: str
    value: Value
    better: int  # +1 where more is better, -1 where less is
    arm: str = ""  # where these are not the question's
    to: str = ""


class Question(NamedTuple):
    title: str
    file: str
    label: Callable[[Row], str]
    arm: str
    seeds: range
    tests: tuple[Test, ...]
    unit: str
    to: str = "lora"
    worth: float = 0.0  # where the interval ends below, there is no gain worth having; 0: not asked
    margin: float = 0.0  # where the interval begins above minus this, it is not worse; 0: not asked
    more_files: tuple[str, ...] = ()  # of the same seeds


class Found(NamedTuple):
    mean: float
    low: float  # of the 95 % interval
    high: float
    error: float
    p: float
    seeds: int


def percent(column: str) -> Value:
    return lambda row: 100 * float(row[column])


def rise(after: str, before: str, scale: float = 1.0) -> Value:
    return lambda row: scale * (float(row[after]) - float(row[before]))


def mean_of(*columns: str, scale: float = 1.0) -> Value:
    return lambda row: scale * statistics.fmean(float(row[c]) for c in columns)


def method_of(row: Row) -> str:
    return row["method"]


def with_steps(row: Row) -> str:
    return f"{row['method']}, {row['steps']} steps"


def with_budget(row: Row) -> str:
    return f"{row['method']}, equal {row['budget']}"


FILMS, *OTHERS = language_model.KINDS_OF_TEXT
ADAPTERS = "rslora", "dora", "pissa"
# The type of which all seeds are there first answers; the other is exploration.
DINO = {"vit.csv": "bfloat16", "vit-float32.csv": "float32"}
LANGUAGE_MODEL = {"language_model.csv": "bfloat16", "language_model-float32.csv": "float32"}
FILM_REVIEWS = {"sentiment-length.csv": "bfloat16", "sentiment-length-float32.csv": "float32"}


def of_language_model(file: str, dtype: str) -> tuple[Question, ...]:
    asked = Question(
        f"SmolLM2 ({dtype}) on film reviews: in-domain loss",
        file,
        language_model.label,
        "flat-lora 0.05",
        range(8),
        (Test("in-domain", mean_of(FILMS), -1),),
        "nats a token",
    )
    return (
        asked,
        asked._replace(
            title=f"SmolLM2 ({dtype}) on film reviews: loss elsewhere",
            tests=(Test("elsewhere", mean_of(*OTHERS), -1),),
        ),
        asked._replace(
            title=f"SmolLM2 ({dtype}) on film reviews: what rounding and pruning add to the loss",
            tests=tuple(Test(h, rise(f"{FILMS}, {h}", FILMS), -1) for h in ("nf4", "prune 50 %")),
        ),
    )


def of_film_reviews(file: str, dtype: str) -> tuple[Question, ...]:
    asked = Question(
        f"MiniLM ({dtype}) on film reviews, 1,150 steps: mean of four kinds of text",
        file,
        finetune_sentiment.label,
        "flat-lora 0.05",
        range(300, 308),
        (Test("mean", mean_of(*finetune_sentiment.FILES, scale=100), 1),),
        "points",
    )
    return (
        asked,
        asked._replace(
            title=f"MiniLM ({dtype}) on film reviews, 1,150 steps: what rounding and pruning do to the accuracy",
            tests=tuple(Test(h, rise(f"{FILMS}, {h}", FILMS, 100), 1) for h in ("nf4", "prune 50 %")),
        ),
    )


def of_dino_kinds(file: str) -> tuple[Question, ...]:
    kinds = Question(
        "DINOv2 (float32) on digits: kinds of noise",
        file,
        vit.label,
        "flat-lora 0.3 of a kind",
        range(100, 108),
        tuple(
            Test(kind, percent("clean"), 1, f"flat-lora 0.3 {kind}")
            for kind in ("near_gaussian", "rademacher", "hadamard")
        ),
        "points on clean images",
        to="flat-lora 0.3",
        margin=0.5,
    )
    adapters = (
        kinds._replace(
            title=f"DINOv2 (float32) on digits: noise on other adapters, {column} images",
            arm="flat-lora 0.3",
            to="lora",
            tests=tuple(
                Test(name, percent(column), 1, f"flat-lora 0.3 {name}", f"lora {name}") for name in ADAPTERS
            ),
            unit="points",
            margin=0.0,
        )
        for column in ("clean", "corrupted")
    )
    return kinds, kinds._replace(to="lora", margin=0.0), *adapters


QUESTIONS = (
    Question(
        "DINOv2 (bfloat16) on digits: accuracy",
        "vit.csv",
        vit.label,
        "flat-lora 0.15",
        range(16),
        tuple(Test(name, percent(name), 1) for name in vit.ACCURACIES),
        "points",
        worth=1.0,
    ),
    Question(
        "DINOv2 (bfloat16) on digits: what rounding and pruning add to the loss",
        "vit.csv",
        vit.label,
        "flat-lora 0.15",
        range(16),
        tuple(Test(h, rise(f"half loss, {h}", "half loss"), -1) for h in ("nf4", "prune 50 %")),
        "nats",
    ),
    Question(
        "small vision transformer on digits: what rounding and pruning do to the accuracy",
        "digits-compress.csv",
        method_of,
        "flat-lora 0.15",
        range(3000, 3040),
        tuple(Test(h, rise(f"clean, {h}", "clean", 100), 1) for h in ("nf4", "prune 50 %")),
        "points",
    ),
    Question(
        "small vision transformer on digits: more noise",
        "digits-strong.csv",
        method_of,
        "flat-lora 0.3",
        range(4000, 4040),
        (
            Test("clean", percent("clean"), 1),
            Test("prune 50 %", rise("clean, prune 50 %", "clean", 100), 1),
        ),
        "points",
        to="flat-lora 0.15",
    ),
    Question(
        "DINOv2 (float32) on digits: accuracy",
        "vit-float32.csv",
        vit.label,
        "flat-lora at either strength",
        range(300, 316),
        tuple(
            Test(f"{name} {sigma}", percent(name), 1, f"flat-lora {sigma}")
            for sigma in ("0.15", "0.3")
            for name in vit.ACCURACIES
        ),
        "points",
        worth=1.0,
    ),
    Question(
        "MiniLM (float32) on 128 film reviews, 300 steps",
        "sentiment-few.csv",
        finetune_sentiment.label,
        "flat-lora at either strength",
        range(400, 416),
        tuple(
            Test(f"{name} {strength}", value, 1, f"flat-lora {strength}")
            for strength in ("0.15", "0.3")
            for name, value in (
                ("film reviews", percent(FILMS)),
                ("other kinds", mean_of(*list(finetune_sentiment.FILES)[1:], scale=100)),
            )
        ),
        "points",
    ),
    *of_dino_kinds("vit-kinds-float32.csv"),
    *(q for named in LANGUAGE_MODEL.items() for q in of_language_model(*named)),
    *(q for named in FILM_REVIEWS.items() for q in of_film_reviews(*named)),
    Question(
        "small vision transformer on digits: noise on other adapters",
        "digits-family.csv",
        method_of,
        "flat-lora 0.3",
        range(5000, 5040),
        tuple(Test(name, percent("clean"), 1, f"flat-lora 0.3 {name}", f"lora {name}") for name in ADAPTERS),
        "points on clean images",
    ),
    Question(
        "small vision transformer on digits: several draws a step, against one draw in as much time",
        "digits-family.csv",
        with_steps,
        "flat-lora 0.3 samples",
        range(5000, 5040),
        tuple(
            Test(
                name,
                percent("clean"),
                1,
                f"flat-lora 0.3 samples {name}, 300 steps",
                f"flat-lora 0.3, {steps} steps",
            )
            for name, steps in (("batch", 396), ("pairs", 363))
        ),
        "points on clean images",
        to="flat-lora 0.3",
        more_files=("digits-draws-396.csv", "digits-draws-363.csv"),
    ),
    *(
        Question(
            f"small vision transformer on digits: the methods of the family at equal {budget}",
            "methods.csv",
            with_budget,
            "each method",
            range(7100, 7116),
            tuple(
                Test(name, percent("clean"), 1, f"{name}, equal {budget}")
                for name in compare_methods.CANDIDATES
                if name != compare_methods.BASELINE
            ),
            "points on clean images",
            to="lora, equal steps",
        )
        for budget in compare_methods.BUDGETS
    ),
    Question(
        "small vision transformer on digits: intruder dimensions, of 80",
        "methods.csv",
        with_budget,
        "flat-lora, equal steps",
        range(7100, 7116),
        (Test("intruders", mean_of("intruders"), -1),),
        "intruders",
        to="lora, equal steps",
    ),
    Question(
        "small vision transformer on digits: on noisy chips",
        "digits-chips.csv",
        method_of,
        "trained under noise",
        range(7200, 7216),
        tuple(Test(arm, percent("clean, chips 0.05"), 1, arm) for arm in ("halora 0.05", "flat-lora 0.3")),
        "points on clean images, chips of 0.05",
    ),
)


def rows_of(folders: list[Path], file: str, arm: Callable[[Row], Any]) -> list[Row]:
    """Of each folder's file those of the seeds with which every arm has run there: no seed is mixed of two machines."""
    return [row for folder in folders for row in complete(read_csv(folder / file), arm)]


def differences(rows: list[Row], question: Question, test: Test) -> list[float]:
    """The test's arm minus the one it is compared to, a number for each of the question's seeds.

    Raises:
        ValueError: a run is there twice.
    """
    of: dict[str, dict[int, float]] = {}
    for row in rows:
        values, seed = of.setdefault(question.label(row), {}), int(row["seed"])
        if seed in values:
            raise ValueError(
                f"{question.file}: expected {question.label(row)!r} with seed {seed} once, got it twice"
            )
        values[seed] = test.value(row)
    arm, to = of[test.arm or question.arm], of[test.to or question.to]
    return [arm[s] - to[s] for s in question.seeds if s in arm and s in to]


def judged(samples: list[list[float]]) -> list[Found]:
    """Means with 95 % intervals, and p after Holm over the samples."""
    raw = [stats.ttest_1samp(sample, 0.0) for sample in samples]
    # Where all are equal, there is no deviation and no p.
    adjusted = holm([1.0 if math.isnan(r.pvalue) else float(r.pvalue) for r in raw])
    found = []
    for sample, result, p in zip(samples, raw, adjusted, strict=True):
        low, high = result.confidence_interval(0.95)
        error = statistics.stdev(sample) / math.sqrt(len(sample))
        found.append(Found(statistics.fmean(sample), float(low), float(high), error, p, len(sample)))
    return found


def holm(values: list[float]) -> list[float]:
    """Each p times the number of those not smaller, never below a smaller one's, at most 1."""
    adjusted, floor = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        floor = max(floor, min(1.0, values[i] * (len(values) - rank)))
        adjusted[i] = floor
    return adjusted


def verdict(found: Found, better: int, worth: float, margin: float) -> str:
    said = "no difference shown"
    if found.p < 0.05:
        said = "better" if found.mean * better > 0 else "worse"
    if worth and found.high < worth:
        said += f"; no gain of {worth:g}"
    if margin:
        said += f"; {'' if found.low > -margin else 'not shown to be '}not worse by {margin:g}"
    return said


def samples_for(rows: list[Row], question: Question) -> list[list[float]]:
    """The differences of each test.

    Raises:
        ValueError: the question cannot be answered from these rows; the message says why.
    """
    there = {question.label(row) for row in rows}
    for test in question.tests:
        arm, to = test.arm or question.arm, test.to or question.to
        if not {arm, to} <= there:
            raise ValueError(f"{question.file} has no rows of {arm} and {to}")
    try:
        samples = [differences(rows, question, test) for test in question.tests]
    except KeyError as error:
        raise ValueError(f"{question.file} has no column {error}") from error
    if len(samples[0]) < 3:
        raise ValueError(f"{question.file} has {len(samples[0])} seeds with every arm")
    return samples


def report(folders: list[Path]) -> str:
    lines: list[str] = []
    for question in QUESTIONS:
        files = question.file, *question.more_files
        rows = [row for file in files for row in rows_of(folders, file, question.label)]
        lines += ["", f"{question.title}; {question.arm} minus {question.to}, {question.unit}"]
        try:
            samples = samples_for(rows, question)
        except ValueError as error:
            lines.append(f"  not answered: {error}")
            continue
        wide = max(12, *(len(test.name) + 2 for test in question.tests))
        for test, found in zip(question.tests, judged(samples), strict=True):
            said = verdict(found, test.better, question.worth, question.margin)
            lines.append(
                f"  {test.name:<{wide}}{found.mean:+9.4f} +- {found.error:.4f}"
                f"  95 % {found.low:+.4f} to {found.high:+.4f}"
                f"  p {found.p:.2g}  {found.seeds} seeds: {said}"
            )
    return "\n".join(lines)


def compressions(folders: list[Path]) -> str:
    """Means after each compression minus before, by arm: what the questions look at in two columns."""
    lines: list[str] = []
    for file, label, before, unit in (
        ("vit.csv", vit.label, "half loss", "loss"),
        ("digits-compress.csv", method_of, "clean", "accuracy"),
        ("digits-strong.csv", method_of, "clean", "accuracy"),
        *((file, language_model.label, FILMS, "loss") for file in LANGUAGE_MODEL),
    ):
        rows = [r for r in rows_of(folders, file, label) if r.get(f"{before}, {COMPRESSIONS[0]}")]
        if rows:
            lines += [
                "",
                f"{file}: {unit} after minus before".ljust(40) + "".join(f"{h:>12}" for h in COMPRESSIONS),
            ]
        for name in dict.fromkeys(map(label, rows)):
            of = [row for row in rows if label(row) == name]
            means = [
                statistics.fmean(rise(f"{before}, {h}", before)(row) for row in of) for h in COMPRESSIONS
            ]
            lines.append(name.ljust(40) + "".join(f"{m:>12.4f}" for m in means))
    return "\n".join(lines)


def plot(folders: list[Path], path: Path) -> None:
    """Gain over LoRA by strength: a panel for each test set, bars of one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.8), layout="constrained")
    panels = dict(zip(vit.ACCURACIES, figure.subplots(1, len(vit.ACCURACIES)), strict=True))
    for file, dtype in DINO.items():
        rows = rows_of(folders, file, vit.label)
        question = next(q for q in QUESTIONS if q.file == file)
        arms = [name for name in dict.fromkeys(map(vit.label, rows)) if name.startswith("flat-lora")]
        strengths = [float(arm.split()[1]) for arm in arms]
        for name, axes in panels.items():
            test = Test(name, percent(name), 1)
            found = judged([differences(rows, question, test._replace(arm=arm)) for arm in arms])
            means, errors = [f.mean for f in found], [f.error for f in found]
            seeds = f"{dtype}, {found[0].seeds} seeds" if found else None
            axes.errorbar(strengths, means, errors, marker=".", capsize=2, label=seeds)
    for name, axes in panels.items():
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set_title(f"{name} images")
        axes.set_xlabel("sigma")
    figure.axes[0].set_ylabel("gain over LoRA, points")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="+", help="of CSV files")
    parser.add_argument("--figure", type=Path, help="file for a plot; needs matplotlib")
    args = parser.parse_args(argv)
    text = report(args.folder) + "\n" + compressions(args.folder)
    if rows := rows_of(args.folder, "regimes.csv", regimes.arm):
        text += "\n\n" + regimes.report(rows)
    print(text.strip())
    if args.figure:
        plot(args.folder, args.figure)
    return text


if __name__ == "__main__":
    main()
