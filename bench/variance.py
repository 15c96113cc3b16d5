"""What several noise draws in one step buy: `python -m bench variance`.

The gradient of the adapters of a small model, in the middle of its training and on one batch, over many steps of the
noise alone: its variance, and the time of forward and backward. Beside it the variance that the choice of the batch
brings, without noise.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatlora_kernels as fk

from .table import markdown
from .timing import Spread
from .training import PROJECTIONS, Block, Size, example, fill
from .training import minilm as load_minilm

SIZE = Size(256, 688, 8, 4, 0)
BLOCKS, RANK = 2, 8

Loss = Callable[[], Tensor]


class Way(NamedTuple):
    name: str
    samples: int | str = 1
    antithetic: bool = False
    passes: int = 1
    noise: bool = True
    other_batch: bool = False


WAYS = (
    BASE := Way("one draw per step"),
    Way("2 draws, half of the batch each", 2),
    Way("4 draws, a quarter each", 4),
    Way("one per sequence", "batch"),
    Way("one pair, half +eps, half -eps", 2, antithetic=True),
    Way("a pair per two sequences", "batch", antithetic=True),
    Way("2 passes, 2 draws", passes=2),
    Way("2 passes, +eps and -eps", antithetic=True, passes=2),
    PLAIN := Way("no noise", noise=False),
    Way("no noise, another batch each step", noise=False, other_batch=True),
)


class Setting(NamedTuple):
    model: nn.Module
    controller: fk.NoiseController
    batches: Iterator[Loss]  # without end


class Row(NamedTuple):
    way: Way
    variance: float  # trace of the covariance over the squared norm of the gradient without noise
    error: float  # of that, standard
    seconds: Sequence[float]


def blocks(args: argparse.Namespace) -> Setting:
    """Llama-shaped blocks with random weights, learning from those of another adapter."""
    generator = torch.Generator().manual_seed(args.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    teacher, model = (
        nn.Sequential(*(Block(SIZE, torch.float32, "cpu") for _ in range(BLOCKS))).requires_grad_(False)
        for _ in range(2)
    )
    for theirs, ours in zip(teacher, model, strict=True):
        for name, (N, K) in zip(PROJECTIONS, SIZE.shapes(), strict=True):
            weight = randn(N, K) / K**0.5
            fill(ours, [name], [weight])
            fill(theirs, [name], [weight + 0.3 * randn(N, RANK) @ randn(RANK, K) / (RANK * K) ** 0.5])
    torch.manual_seed(args.seed)  # lora_A is drawn from it
    controller = _adapt(model, PROJECTIONS, args)

    def batches() -> Iterator[Loss]:
        while True:
            x = randn(args.batch, args.tokens, SIZE.hidden)
            with torch.no_grad():
                target = teacher(x)
            yield lambda x=x, target=target: F.mse_loss(model(x), target)

    return Setting(model, controller, batches())


def minilm(args: argparse.Namespace) -> Setting:
    """The model and the sentences of examples/finetune_sentiment.py."""
    sentiment, tokenizer = example(), load_minilm("AutoTokenizer")
    examples, _ = sentiment.load_data(sentiment.data_folder(None), tokenizer, 1)
    torch.manual_seed(args.seed)
    model = sentiment.SentenceClassifier(load_minilm("AutoModel", add_pooling_layer=False))
    controller = _adapt(model.encoder, r"encoder\.layer\..*", args)

    def batches() -> Iterator[Loss]:
        for chosen in sentiment.batches(examples, args.batch, args.seed):
            ids, mask, labels = sentiment.collate(chosen, "cpu")
            yield lambda ids=ids, mask=mask, labels=labels: F.binary_cross_entropy_with_logits(
                model(ids, mask), labels
            )

    return Setting(model, controller, batches())


MODELS = {"blocks": blocks, "minilm": minilm}


def _adapt(model: nn.Module, names: Any, args: argparse.Namespace) -> fk.NoiseController:
    return fk.apply_flat_lora(
        model, names, r=RANK, lora_alpha=2 * RANK, sigma=args.sigma, noise=args.noise, seed=args.seed, verbose=False
    )  # fmt: skip


def measure(setting: Setting, draws: int, warm_up: int) -> list[Row]:
    """All ways in turn, `draws` times, after `warm_up` steps of training without noise."""
    model, controller, batches = setting
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # would be variance of its own
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    with controller.disabled():
        for loss in itertools.islice(batches, warm_up):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    fixed = next(batches)

    def timed(way: Way, loss: Loss) -> tuple[Tensor, float]:
        """The gradient, and seconds."""
        start = time.perf_counter()
        for layer in controller.layers:
            layer.samples, layer.antithetic = way.samples, way.antithetic
        total = torch.zeros(())
        with contextlib.nullcontext() if way.noise else controller.disabled():
            for number in range(way.passes):
                # The other half of a pair is the next sample of the same step, else a step of its own.
                controller.sample_offset = number if way.antithetic else 0
                if number == 0 or not way.antithetic:
                    controller.advance()
                total = total + torch.cat([g.flatten() for g in torch.autograd.grad(loss(), trained)])
        controller.sample_offset = 0
        return total / way.passes, time.perf_counter() - start

    for way in WAYS:
        timed(way, fixed)  # warms up
    quiet, _ = timed(PLAIN, fixed)
    found: dict[Way, list[tuple[Tensor, float]]] = {way: [] for way in WAYS}
    for _ in range(draws):
        other = next(batches)
        for way in WAYS:
            found[way].append(timed(way, other if way.other_batch else fixed))
    scale = quiet.double().square().sum().item()
    rows = []
    for way, pairs in found.items():
        gradients, seconds = zip(*pairs, strict=True)
        rows.append(Row(way, *_variance(gradients, scale), seconds))
    return rows


def _variance(gradients: Sequence[Tensor], scale: float) -> tuple[float, float]:
    """Trace of the covariance over `scale`, and its standard error."""
    g = torch.stack(list(gradients)).double()
    n = len(gradients)
    each = ((g - g.mean(0)).square().sum(1) * n / (n - 1) / scale).tolist()
    return statistics.fmean(each), statistics.stdev(each) / math.sqrt(n)


def table(rows: list[Row]) -> str:
    base = next(row for row in rows if row.way == BASE)
    lines = []
    for row in rows:
        relative = row.variance / base.variance
        error = relative * math.hypot(row.error / (row.variance or 1.0), base.error / base.variance)
        ratio = Spread.of([t / t0 for t, t0 in zip(row.seconds, base.seconds, strict=True)])
        shown = f"{relative:.3g}" if row.way in (BASE, PLAIN) else f"{relative:.3g} +- {error:.2g}"
        taken = "1" if row.way == BASE else f"{ratio.median:.2f} ({ratio.p20:.2f}, {ratio.p80:.2f})"
        lines.append([row.way.name, f"{row.variance:.3g}", shown, taken])
    header = ["noise", "variance / square of the gradient", "/ one draw", "time / one draw (p20, p80)"]
    return markdown(header, lines)


def main(args: argparse.Namespace) -> None:
    if args.draws < 4:
        raise SystemExit(f"--draws: expected at least 4, got {args.draws}")
    if args.batch < 4 or args.batch % 4:
        raise SystemExit(f"--batch: expected a multiple of 4, got {args.batch}")
    setting = MODELS[args.model](args)
    rows = measure(setting, args.draws, args.warm_up)
    step = statistics.median(next(row for row in rows if row.way == BASE).seconds)
    print(
        f"{args.model}, {args.batch} sequences, sigma {args.sigma}, {args.noise}, {args.draws} steps each,"
        f" seed {args.seed}, {torch.get_num_threads()} threads; one draw per step takes {step * 1e3:.0f} ms\n"
    )
    print(table(rows))
