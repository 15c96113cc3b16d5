"""Teach a small vision transformer five new digits from a few images, with LoRA, Flat-LoRA and others.

    pip install -e '.[examples]'
    python examples/digits.py --method lora flat-lora --seeds 20 --csv digits.csv

For each seed: pre-train on the images of 0 to 4, fit a new head to a few labelled images of 5 to 9, fine-tune head and
adapters on these, and test on all other images of 5 to 9: as they are, with noise, and moved by a pixel. Methods share
pre-training, images, head, adapters at the start and order of the batches, so that their differences are paired. The
table ends with how flat the loss on the few images is around the weights, see docs/flatness.md; then come, with
--compress, accuracies with the adapters merged and the weights rounded or pruned, with --chips those on noisy chips.

Data: 1797 images of 8 x 8 pixels, UCI's test set of handwritten digits, as scikit-learn carries them.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    ADAPTERS,
    COMPRESSIONS,
    METHODS,
    SAMPLES,
    SIGMA_HELP,
    Arm,
    adapted,
    append_csv,
    arms,
    check_counts,
    closures_for,
    compressed,
    require,
    rows_so_far,
    table,
)
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, flatness
from flatlora_kernels.core.noise import KINDS
from flatlora_kernels.methods import Method, make, on_chips
from flatlora_kernels.methods.halora import FIRST_TEST_CHIP

OLD, NEW = range(0, 5), range(5, 10)
ADAPTED = r"blocks\..*\.(qkv|out|up|down)"
FLATNESS_SIGMAS = (0.05, 0.1, 0.2)
ACCURACIES = ("clean", "noise", "moved")
PROBE = "head only"
# What all runs of a file share.
SETTINGS = tuple(
    "shots steps batch_size r lora_alpha lr rho sigma_schedule pretrain_steps width depth test_limit compress".split()
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--method", nargs="+", choices=METHODS, default=["lora", "flat-lora"])
    add("--seed", type=int, default=0, help="the first")
    add("--seeds", type=int, default=5, help="repeat the whole with this many seeds from --seed on")
    add("--shots", type=int, default=10, help="labelled images of each new digit")
    add("--sigma", type=float, nargs="+", default=[0.05], help=SIGMA_HELP)
    add("--noise", nargs="+", choices=KINDS, default=["gaussian"], help="kinds of noise, each a run")
    add("--sigma-schedule", choices=["cosine", "constant"], default="cosine", help="cosine grows from 0")
    add("--adapter", nargs="+", choices=ADAPTERS, default=["lora"], help="those but lora are PEFT's")
    add("--samples", nargs="+", choices=SAMPLES, default=["1"], help="draws of a step: one, one an image, or one with"
        " either sign for each pair of images")  # fmt: skip
    add("--rho", type=float, default=0.05, help="radius of the methods with ascent")
    add("--r", type=int, default=4)
    add("--lora-alpha", type=float, default=8.0)
    add("--lr", type=float, default=2e-3)
    add("--steps", type=int, default=300, help="of fine-tuning")
    add("--batch-size", type=int, default=25)
    add("--pretrain-steps", type=int, default=400, help="with batches of 64")
    add("--width", type=int, default=64)
    add("--depth", type=int, default=2)
    add("--test-limit", type=int, help="test on this many images; None = on all")
    add("--backend", help="of flatlora_kernels; None = the best one here")
    add("--threads", type=int, default=1, help="of the CPU")
    add("--compress", action="store_true", help="test with the merged weights rounded or pruned, too; not with PEFT's"
        " adapters")  # fmt: skip
    add("--chips", type=int, help="test with the base weights on so many noisy chips, too (docs/methods.md); not with"
        " PEFT's adapters")  # fmt: skip
    add(
        "--chip-sigma", type=float, nargs="+", help="their noise, relative to a weight's largest; None = 0.05"
    )
    add("--csv", type=Path, help="file for a line per run; runs that it holds already are not repeated")
    add(
        "--figure",
        type=Path,
        help="file for the loss along a random direction, of what this call runs with the first seed; needs matplotlib",
    )
    arguments = parser.parse_args(argv)
    counts = "seeds shots steps batch_size pretrain_steps depth test_limit threads chips"
    check_counts(parser, arguments, *counts.split())
    if arguments.shots > 100:
        parser.error(f"--shots: expected at most 100, got {arguments.shots}")
    if arguments.chip_sigma is not None and not arguments.chips:
        parser.error("--chip-sigma: expected --chips beside it, got none")
    arguments.chip_sigma = arguments.chip_sigma or [0.05]
    if min(arguments.chip_sigma) <= 0:
        parser.error(f"--chip-sigma: expected numbers > 0, got {min(arguments.chip_sigma):g}")
    for option in ("compress", "chips"):
        if getattr(arguments, option) and arguments.adapter != ["lora"]:
            parser.error(f"--{option}: expected --adapter lora alone, got {' '.join(arguments.adapter)}")
    return arguments


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class ViT(nn.Module):
    """16 patches of 2 x 2 pixels, mean over the patches, five classes."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def features(self, images: Tensor) -> Tensor:
        """(batch, width) of images (batch, 8, 8)."""
        patches = F.unfold(images[:, None], 2, stride=2).transpose(1, 2)
        return self.norm(self.blocks(self.embed(patches) + self.position)).mean(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def load_digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 8, 8) from 0 to 1, and what they show."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise SystemExit(f"{error}; to install it: pip install scikit-learn") from error
    data = datasets.load_digits()
    return torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)


def of_digits(digits: range, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Their images, and labels from 0 on."""
    chosen = (labels >= digits.start) & (labels < digits.stop)
    return images[chosen], labels[chosen] - digits.start


def split(images: Tensor, labels: Tensor, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of `shots` random images of each class, and of all others."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    few = torch.cat([order[labels[order] == label][:shots] for label in labels.unique()])
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[few] = False
    return few, rest.nonzero().flatten()


def shifted(images: Tensor) -> dict[str, list[Tensor]]:
    """The test sets by name: the same in every run."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    padded = F.pad(images, (1, 1, 1, 1))
    corners = ((0, 1), (2, 1), (1, 0), (1, 2))
    return {
        "clean": [images],
        "noise": [images + 0.2 * noise],
        "moved": [padded[:, y : y + 8, x : x + 8] for y, x in corners],
    }


@torch.no_grad()
def accuracies(model: ViT, tests: dict[str, list[Tensor]], labels: Tensor) -> dict[str, float]:
    model.eval()
    return {
        name: statistics.fmean((model(x).argmax(1) == labels).float().mean().item() for x in variants)
        for name, variants in tests.items()
    }


def pretrain(images: Tensor, labels: Tensor, args: argparse.Namespace, seed: int) -> ViT:
    """On batches moved by up to a pixel."""
    torch.manual_seed(seed)
    model = ViT(args.width, args.depth)
    padded = F.pad(images, (1, 1, 1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.pretrain_steps + 1, pct_start=0.1)
    for _ in range(args.pretrain_steps):
        rows = torch.randint(len(images), (64,))
        y, x = torch.randint(3, (2,)).tolist()
        loss = F.cross_entropy(model(padded[rows, y : y + 8, x : x + 8]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def fit_head(model: ViT, images: Tensor, labels: Tensor) -> None:
    """A new head on the features as they are, so that fine-tuning does not begin by spoiling them."""
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    with torch.no_grad():
        features = model.features(images)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.02)
    for _ in range(200):
        loss = F.cross_entropy(model.head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def with_adapters(
    model: ViT, arm: Arm, args: argparse.Namespace, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The model as it trains, and the options of its method."""
    noise, options = METHODS[arm.method][1](arm.strength, args.width)
    trained = adapted(
        model, ADAPTED, arm, r=args.r, lora_alpha=args.lora_alpha, seed=seed, backend=args.backend,
        schedule=args.sigma_schedule, total_steps=args.steps, **noise,
    )  # fmt: skip
    trained.head.requires_grad_(True)
    return trained, options


def finetune(
    model: ViT, arm: Arm, images: Tensor, labels: Tensor, args: argparse.Namespace, seed: int
) -> nn.Module:
    model, options = with_adapters(model, arm, args, seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.01)
    method = make(arm.method, model, optimizer, **options)

    def loss(rows: Tensor, **reduction: str) -> Tensor:
        return F.cross_entropy(model(images[rows]), labels[rows], **reduction)

    run(method, lambda rows: closures_for(arm.method, loss, rows), len(images), args, seed)
    return model


def run(
    method: Method,
    closures: Callable[[Tensor], list[Callable[..., Tensor]]],
    images: int,
    args: argparse.Namespace,
    seed: int,
) -> None:
    """All steps, each on `closures` of its batch's rows; the learning rate falls to 0."""
    schedule = torch.optim.lr_scheduler.LambdaLR(method.optimizer, lambda step: 1 - step / args.steps)
    order = torch.Generator().manual_seed(seed)
    method.model.train()
    for _ in range(args.steps):
        method.step(*closures(torch.randperm(images, generator=order)[: args.batch_size]))
        schedule.step()


def flatness_of(model: ViT, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Of the loss on these images: expected increase under noise, top eigenvalue over the adapted weights."""

    def loss() -> Tensor:
        return F.cross_entropy(model(images), labels)

    found = flatness.flatness(model, loss, sigmas=FLATNESS_SIGMAS, iterations=0)
    values = {"loss": found.loss} | {f"increase {i.sigma:g}": i.mean for i in found.increases}
    weights = [m.weight for m in model.modules() if hasattr(m, "lora_A")]
    for weight in weights:
        weight.requires_grad_(True)
    values["eigenvalue"] = flatness.top_eigenvalue(model, loss, parameters=weights, iterations=30).value
    for weight in weights:
        weight.requires_grad_(False)
    return values


def accuracy_when_compressed(model: ViT, images: Tensor, labels: Tensor) -> dict[str, float]:
    """On clean images, with the adapters merged and the weights compressed; the head stays as it is."""
    layers = [m for m in model.modules() if isinstance(m, FlatLoraLinear)]
    found = {}
    for how in COMPRESSIONS:
        with compressed(layers, how):
            found[f"clean, {how}"] = accuracies(model, {"clean": [images]}, labels)["clean"]
    return found


def accuracy_on_chips(
    model: ViT, images: Tensor, labels: Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """On clean images: the mean over the chips, and the worst of them. HaLoRA trains on none of these chips."""

    def accuracy() -> float:
        return (model(images).argmax(1) == labels).float().mean().item()

    found = {}
    for sigma in args.chip_sigma:
        chips = range(FIRST_TEST_CHIP, FIRST_TEST_CHIP + args.chips)
        values = on_chips(model, accuracy, sigma=sigma, chips=chips, noise="gaussian")
        found |= {
            f"clean, chips {sigma:g}": statistics.fmean(values),
            f"clean, worst chip {sigma:g}": min(values),
        }
    return found


def summary(rows: list[dict[str, Any]], to: str) -> str:
    """Means over the seeds with standard errors; then differences to method `to`, paired by seed."""

    def cell(column: str, values: list[float]) -> str:
        percent = column.partition(",")[0] in ACCURACIES
        scale = 100 if percent else 1
        error = statistics.stdev(values) / math.sqrt(len(values)) * scale if len(values) > 1 else math.nan
        middle = statistics.fmean(values) * scale
        return f"{middle:.1f} +- {error:.1f}" if percent else f"{middle:.3g} +- {error:.1g}"

    columns = [c for c in rows[0] if c not in ("seed", "method", "chips", "chip_sigma", *SETTINGS)]
    return table(rows, lambda row: row["method"], columns, to, cell=cell)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs everything and prints a table; returns what `--csv` writes, accuracies from 0 to 1."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    if args.compress:
        require("bitsandbytes")
    if args.adapter != ["lora"]:
        require("peft")
    images, labels = load_digits()
    old, (new_images, new_labels) = of_digits(OLD, images, labels), of_digits(NEW, images, labels)
    tests = shifted(new_images)
    wanted = arms(args.method, args.sigma, [args.rho], args.noise, args.adapter, args.samples)
    runs = {PROBE: Arm("lora")}
    # A file has one rho: its names do not say it.
    runs |= {str(a._replace(strength=0.0) if METHODS[a.method][0] == "rho" else a): a for a in wanted}
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.chips:
        settings |= {"chips": args.chips, "chip_sigma": " ".join(f"{sigma:g}" for sigma in args.chip_sigma)}
    earlier = rows_so_far(args.csv, settings)
    if earlier and "chips" in earlier[0] and not args.chips:
        raise SystemExit(f"--chips: expected {earlier[0]['chips']}, as {args.csv} has, got none")
    done = {(row["seed"], row["method"]) for row in earlier}
    if done:
        print(f"{args.csv} holds {len(done)} runs already")
    rows: list[dict[str, Any]] = []
    lines = {}
    steps = [s / 20 for s in range(-10, 11)]
    for seed in range(args.seed, args.seed + args.seeds):
        left = {name: arm for name, arm in runs.items() if (str(seed), name) not in done}
        if not left:
            continue
        few, rest = split(new_images, new_labels, args.shots, seed)
        rest = rest[: args.test_limit]
        train = new_images[few], new_labels[few]
        test = {name: [x[rest] for x in variants] for name, variants in tests.items()}
        base = pretrain(*old, args, seed)
        fit_head(base, *train)
        for name, arm in left.items():
            model = copy.deepcopy(base)
            if name == PROBE:
                model, _ = with_adapters(model, arm, args, seed)
            else:
                model = finetune(model, arm, *train, args, seed)
            row = {"seed": seed, "method": name} | accuracies(model, test, new_labels[rest])
            row |= flatness_of(model, *train)
            if args.compress:
                row |= accuracy_when_compressed(model, new_images[rest], new_labels[rest])
            if args.chips:
                row |= accuracy_on_chips(model, new_images[rest], new_labels[rest], args)
            rows.append(row | settings)
            if args.csv:
                append_csv(args.csv, rows[-1:])
            print(seed, name, *(f"{c} {row[c]:.1%}" for c in ACCURACIES), flush=True)
            if args.figure and seed == args.seed:
                lines[name] = flatness.line(
                    model, lambda model=model, train=train: F.cross_entropy(model(train[0]), train[1]), steps
                )
    print(f"\nmean and standard error over the seeds, {args.shots} images of each new digit; accuracy in %")
    print(summary([*earlier, *rows], list(runs)[1]))
    if lines:
        flatness.plot(lines, steps, args.figure)
    return rows


if __name__ == "__main__":
    main()
