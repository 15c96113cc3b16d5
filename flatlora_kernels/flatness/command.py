"""`python -m flatlora_kernels.flatness`: for saved models of transformers and adapters of PEFT."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..train.layer import NoisyLayer
from .intruders import intruder_dimensions
from .measures import SIGMAS, Flatness, Loss, OnChips, flatness, layers_of, line, plane, top_eigenvalue
from .plots import plot, plot_plane

_TASKS = {"classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM"}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flatlora_kernels.flatness",
        description="How flat the loss is around a fine-tuned model, before its adapter (lora_B = 0, what else was "
        "trained in place) and after.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="base model: a folder, or a name of the hub")
    add(
        "--adapter",
        nargs="+",
        required=True,
        help="saved by PEFT, for this base: folders, or names of the hub",
    )
    add(
        "--data",
        type=Path,
        required=True,
        help='a JSON object a line: "text" and, to classify, "label", an int',
    )
    add("--task", choices=_TASKS, default="classification")
    add("--limit", type=int, default=64, help="take this many lines of the data")
    add("--batch-size", type=int, default=16)
    add("--max-length", type=int, default=256, help="tokens of a line")
    add("--sigma", type=float, nargs="+", default=list(SIGMAS))
    add("--draws", type=int, default=8, help="antithetic pairs of noise for each sigma")
    add("--iterations", type=int, default=20, help="of the power iteration; 0 leaves the eigenvalue out")
    add("--seed", type=int, default=0)
    add(
        "--chips",
        type=int,
        default=0,
        help="the loss on so many noisy chips (docs/methods.md); 0 leaves it out",
    )
    add(
        "--chip-sigma", type=float, nargs="+", help="their noise, relative to a weight's largest; None = 0.02"
    )
    add(
        "--intruders",
        action="store_true",
        help="count intruder dimensions: two decompositions of each weight",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add(
        "--plots",
        type=Path,
        help="folder for line.svg and a plane-*.svg for each of the reports; needs matplotlib",
    )
    args = parser.parse_args(argv)
    for name in ("limit", "batch_size", "max_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.chips < 0:
        parser.error(f"--chips: expected at least 0, got {args.chips}")
    if args.chip_sigma is not None and not args.chips:
        parser.error("--chip-sigma: expected --chips beside it, got none")
    args.chip_sigma = args.chip_sigma or [0.02]
    if min(args.chip_sigma) <= 0:
        parser.error(f"--chip-sigma: expected numbers > 0, got {min(args.chip_sigma):g}")
    return args


def _read(path: Path, limit: int, needs_label: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(itertools.islice(file, limit), 1):
                row = json.loads(text)
                good = isinstance(row, dict) and isinstance(row.get("text"), str)
                if not good or (needs_label and not isinstance(row.get("label"), int)):
                    raise ValueError(f"line {number} has not what is needed: {text.strip()[:80]!r}")
                rows.append(row)
    except (OSError, ValueError) as error:
        expected = '"text", a string' + (', and "label", an int' if needs_label else "")
        raise SystemExit(
            f"--data: expected a JSON object a line with {expected}, got {path}: {error}"
        ) from error
    if not rows:
        raise SystemExit(f"--data: expected at least one line, got none in {path}")
    return rows


@contextlib.contextmanager
def _naming(option: str, value: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{option}: expected something that can be loaded, got {value!r}: {error}"
        ) from error


def _loss_of(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]], args: argparse.Namespace) -> Loss:
    """The mean over all rows, for causal-lm over all tokens."""
    batches = []
    for start in range(0, len(rows), args.batch_size):
        part = rows[start : start + args.batch_size]
        encoded = tokenizer(
            [row["text"] for row in part],
            truncation=True,
            max_length=args.max_length,
            padding=True,
            return_tensors="pt",
        ).to(args.device)
        if args.task == "causal-lm":
            labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
            count = (labels[:, 1:] != -100).sum().item()
        else:
            labels, count = torch.tensor([row["label"] for row in part], device=args.device), len(part)
        batches.append((dict(encoded), labels, count))
    total = sum(count for *_, count in batches)
    if not total:
        raise SystemExit(f"--data: expected texts of two tokens or more, got none in {args.data}")

    def loss() -> Tensor:
        parts = [model(**x, labels=y).loss.float() * (count / total) for x, y, count in batches]
        return torch.stack(parts).sum()

    return loss


@contextlib.contextmanager
def _without_adapters(layers: list[NoisyLayer]) -> Iterator[None]:
    matrices = [p for layer in layers for name, p in layer.named_parameters() if "lora_B" in name]
    kept = [p.detach().clone() for p in matrices]
    with torch.no_grad():
        try:
            for p in matrices:
                p.zero_()
            with torch.enable_grad():
                yield
        finally:
            for p, value in zip(matrices, kept, strict=True):
                p.copy_(value)


def _on_chips(model: nn.Module, loss: Loss, args: argparse.Namespace) -> tuple[OnChips, ...]:
    from ..methods.halora import FIRST_TEST_CHIP, on_chips

    first = FIRST_TEST_CHIP + args.seed
    found = []
    for sigma in args.chip_sigma if args.chips else ():
        chips = range(first, first + args.chips)
        values = on_chips(model, lambda: float(loss()), sigma=sigma, chips=chips, noise="gaussian")
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found.append(OnChips(sigma, statistics.fmean(values), spread, max(values), len(values)))
    return tuple(found)


def main(argv: Sequence[str] | None = None) -> dict[str, Flatness]:
    """`python -m flatlora_kernels.flatness`: prints a report for each adapter and, first, for none; returns them."""
    args = _arguments(argv)
    try:
        import peft
        import transformers
    except ImportError as error:
        raise SystemExit(f"{error}; to install what this needs: pip install peft transformers") from error
    from ..integrations.peft import apply_flat_lora

    rows = _read(args.data, args.limit, args.task == "classification")
    with _naming("--model", args.model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    steps = [step / 50 for step in range(-10, 11)]
    reports: dict[str, Flatness] = {}
    curves: dict[str, Sequence[float]] = {}
    for adapter in args.adapter:
        auto = getattr(transformers, _TASKS[args.task])
        with _naming("--model", args.model):
            base = auto.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        base.config.pad_token_id = tokenizer.pad_token_id
        with _naming("--adapter", adapter):
            model = peft.PeftModel.from_pretrained(base, adapter).to(args.device)
        apply_flat_lora(model, sigma=0.0, verbose=False)
        layers = layers_of(model)
        weights = list({id(p): p for p in (layer._base_parameter() for layer in layers)}.values())
        model.requires_grad_(False)
        loss = _loss_of(model, tokenizer, rows, args)
        for name in ("before", adapter) if not reports else (adapter,):
            with _without_adapters(layers) if name == "before" else contextlib.nullcontext():
                found = flatness(
                    model, loss, sigmas=args.sigma, draws=args.draws, seed=args.seed, iterations=0
                )
                if args.iterations:
                    for p in weights:
                        p.requires_grad_(True)
                    top = top_eigenvalue(
                        model, loss, parameters=weights, iterations=args.iterations, seed=args.seed
                    )
                    found = found._replace(eigenvalue=top)
                    for p in weights:
                        p.requires_grad_(False)
                found = found._replace(on_chips=_on_chips(model, loss, args))
                if args.intruders:
                    found = found._replace(intruders=sum(intruder_dimensions(model).values()))
                reports[name] = found
                print(f"{name}: {found}\n", flush=True)
                if args.plots:
                    args.plots.mkdir(parents=True, exist_ok=True)
                    curves[name] = line(model, loss, steps, seed=args.seed)
                    file = f"plane-{len(reports) - 1}-{Path(name).name}.svg"
                    plot_plane(
                        plane(model, loss, steps[::2], seed=args.seed),
                        steps[::2],
                        args.plots / file,
                    )
    if args.plots:
        plot(curves, steps, args.plots / "line.svg")
    return reports
