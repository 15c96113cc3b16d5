"""How flat the loss is around a model's weights, in the full weight space of its layers with weight noise.

    report = flatness(model, loss)      # loss: a function without arguments, model and data in its closure
    print(report)

For saved models of transformers and adapters of PEFT also `python -m flatlora_kernels.flatness --help`.

The perturbed weights are never made: the op draws the noise, as in training. The model is in eval mode meanwhile, and
is left as it was: modes, weights, gradients, generators and the noise controller, also after an exception.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .op.functional import flat_noise_scale, perturb_weight
from .train.layer import NoisyLayer, eval_mode, instead_of_noise

Loss = Callable[[], Tensor]
SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2)


class Increase(NamedTuple):
    """Of the loss under noise of strength `sigma`: mean over draws and its standard error."""

    sigma: float
    mean: float
    standard_error: float
    draws: int  # antithetic pairs


class Eigenvalue(NamedTuple):
    """Of the Hessian: the one of largest magnitude; change: relative, in the last iteration."""

    value: float
    iterations: int
    change: float


class Flatness(NamedTuple):
    """What `flatness` returns; `str` of it is a small table."""

    loss: float
    increases: tuple[Increase, ...]
    eigenvalue: Eigenvalue | None = None

    def __str__(self) -> str:
        lines = [f"loss {self.loss:.6g}", "  sigma   increase  standard error  pairs"]
        lines += [
            f"  {i.sigma:<7g} {i.mean:<9.3g} {i.standard_error:<15.2g} {i.draws}" for i in self.increases
        ]
        if self.eigenvalue is not None:
            e = self.eigenvalue
            lines.append(
                f"largest eigenvalue of the Hessian: {e.value:.4g}"
                f" ({e.iterations} iterations, last change {e.change:.1e})"
            )
        return "\n".join(lines)


def flatness(
    model: nn.Module,
    loss: Loss,
    *,
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 8,
    seed: int = 0,
    iterations: int = 20,
) -> Flatness:
    """The loss, its expected increase under weight noise, and the top eigenvalue of its Hessian.

    Args:
        model: with layers that draw weight noise (`FlatLoraLinear`, PEFT's after `apply_flat_lora`).
        loss: evaluates the model on fixed data, and returns a scalar. Give all that is compared the same data.
        sigmas, draws, seed: of `expected_increase`. iterations: of `top_eigenvalue`; 0 leaves it out.
    """
    increases = expected_increase(model, loss, sigmas, draws=draws, seed=seed)
    with eval_mode(model), torch.no_grad():
        value = _number(loss())
    eigenvalue = top_eigenvalue(model, loss, iterations=iterations, seed=seed) if iterations else None
    return Flatness(value, tuple(increases), eigenvalue)


def expected_increase(
    model: nn.Module, loss: Loss, sigmas: Sequence[float] = SIGMAS, *, draws: int = 8, seed: int = 0
) -> list[Increase]:
    """``E L(W' + eps) - L(W')`` for each sigma, ``eps[n] ~ N(0, sigma^2 / in_features ||W'[n]||^2)`` as in Flat-LoRA.

    Each draw is an antithetic pair, ``(L(W' + eps) + L(W' - eps)) / 2``, which takes the slope out of the variance;
    all sigmas see the same draws.

    Args:
        draws: pairs, >= 2; two forward passes each and sigma. seed: of the noise.
    """
    if draws < 2:
        raise ValueError(f"draws: expected an int >= 2, got {draws}")
    layers = _layers(model)
    found = []
    with eval_mode(model), torch.no_grad():
        before = _number(loss())
        unit = {layer: _row_scale(layer) for layer in layers}
        for sigma in sigmas:
            values = []
            for draw in range(draws):
                pair = [
                    _loss_at(layers, loss, unit, sigma, seed, 2 * draw + side, antithetic=True)
                    for side in (0, 1)
                ]
                values.append(sum(pair) / 2 - before)
            mean = math.fsum(values) / draws
            variance = math.fsum((v - mean) ** 2 for v in values) / (draws - 1)
            found.append(Increase(float(sigma), mean, math.sqrt(variance / draws), draws))
    return found


def line(
    model: nn.Module, loss: Loss, steps: Sequence[float] = (-0.2, -0.1, 0.0, 0.1, 0.2), *, seed: int = 0
) -> list[float]:
    """The loss at ``W' + t d`` for each t, d random with rows of the norm of those of W' (filter-normalised).

    Source of the normalisation: Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018.
    """
    layers = _layers(model)
    with eval_mode(model), torch.no_grad():
        unit = {layer: _row_scale(layer) for layer in layers}
        return [_loss_at(layers, loss, unit, abs(t), seed, int(t < 0), antithetic=True) for t in steps]


def plane(
    model: nn.Module, loss: Loss, steps: Sequence[float] = (-0.2, -0.1, 0.0, 0.1, 0.2), *, seed: int = 0
) -> list[list[float]]:
    """The loss at ``W' + s c + t d`` as ``[s][t]``, c and d two directions as in `line`.

    Unlike the rest of this module it makes, for each s, a copy of the layers' weights: the op adds one noise at a time.
    """
    layers = _layers(model)
    rows = []
    with eval_mode(model), torch.no_grad():
        unit = {layer: _row_scale(layer) for layer in layers}
        for s in steps:
            with _moved(layers, unit, s, seed + 1):
                rows.append(
                    [_loss_at(layers, loss, unit, abs(t), seed, int(t < 0), antithetic=True) for t in steps]
                )
    return rows


def top_eigenvalue(
    model: nn.Module,
    loss: Loss,
    *,
    parameters: Sequence[Tensor] | None = None,
    iterations: int = 20,
    tolerance: float = 1e-3,
    step: float = 1e-3,
    seed: int = 0,
) -> Eigenvalue:
    """The eigenvalue of largest magnitude of the loss's Hessian, by power iteration.

    Products with the Hessian are central differences of gradients, because the op is differentiable once:
    ``H v = (g(p + h v) - g(p - h v)) / (2 h)``, two backward passes each.

    Args:
        parameters: to differentiate by; default those of `model` that require gradients: the adapters, or the full
            weights of layers made with ``train_weight=True``.
        iterations: at most. tolerance: stop where the value changes by less, relatively.
        step: h, relative to the norm of the parameters.
    """
    chosen = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    if not chosen:
        raise ValueError("parameters: expected some that require gradients, got none")
    generators = {p.device: torch.Generator(p.device).manual_seed(seed) for p in chosen}
    wide = [torch.promote_types(p.dtype, torch.float32) for p in chosen]
    direction = [
        torch.randn(p.shape, generator=generators[p.device], device=p.device, dtype=dtype)
        for p, dtype in zip(chosen, wide, strict=True)
    ]
    start = [p.detach().clone() for p in chosen]
    h = step * max(_norm(start), 1.0)
    value, change, done = 0.0, math.inf, 0
    with eval_mode(model):
        try:
            for _ in range(iterations):
                length = _norm(direction)
                if not 0 < length < math.inf:
                    break
                direction = [v / length for v in direction]
                sides = []
                for sign in (h, -h):
                    with torch.no_grad():
                        for p, p0, v in zip(chosen, start, direction, strict=True):
                            p.copy_(p0 + sign * v)
                    gradients = torch.autograd.grad(loss(), chosen, allow_unused=True)
                    sides.append(
                        [
                            torch.zeros_like(v) if g is None else g.to(v.dtype)
                            for g, v in zip(gradients, direction, strict=True)
                        ]
                    )
                product = [(plus - minus) / (2 * h) for plus, minus in zip(*sides, strict=True)]
                before = value
                value = sum(
                    torch.dot(a.flatten().double(), b.flatten().double()).item()
                    for a, b in zip(product, direction, strict=True)
                )
                done += 1
                change = abs(value - before) / max(abs(value), 1e-30)
                direction = product
                if change < tolerance:
                    break
        finally:
            with torch.no_grad():
                for p, p0 in zip(chosen, start, strict=True):
                    p.copy_(p0)
    return Eigenvalue(value, done, change)


def plot(curves: dict[str, Sequence[float]], steps: Sequence[float], path: Any) -> None:
    """Draws what `line` returned, a curve for each name, into a file. Needs matplotlib."""
    figure, axes = _figure()
    for name, values in curves.items():
        axes.plot(steps, values, marker=".", label=name)
    axes.set_xlabel("step along a filter-normalised direction")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(path)


def plot_plane(values: Sequence[Sequence[float]], steps: Sequence[float], path: Any) -> None:
    """Draws what `plane` returned as contours into a file. Needs matplotlib."""
    figure, axes = _figure()
    contours = axes.contour(steps, steps, values, levels=15)
    axes.clabel(contours)
    axes.set_xlabel("second direction")
    axes.set_ylabel("first direction")
    figure.savefig(path)


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}; to install it: pip install matplotlib") from error
    figure = Figure(layout="constrained")
    return figure, figure.subplots()


def _layers(model: nn.Module) -> list[NoisyLayer]:
    found = [module for module in model.modules() if isinstance(module, NoisyLayer)]
    if not found:
        raise ValueError(
            "model: expected layers that draw weight noise, got none; see apply_flat_lora and FlatLoraLinear"
        )
    return found


def _row_scale(layer: NoisyLayer) -> Tensor:
    """std of eps per row at sigma = 1, of the weights of now."""
    weight, lora_A, lora_B, scaling = layer._weight_in_use()
    return flat_noise_scale(weight, lora_A, lora_B, scaling=scaling, sigma=1.0, backend=layer.backend)


def _loss_at(
    layers: list[NoisyLayer],
    loss: Loss,
    unit: dict[NoisyLayer, Tensor],
    sigma: float,
    seed: int,
    sample: int,
    antithetic: bool,
) -> float:
    def arguments(layer: NoisyLayer) -> dict[str, Any]:
        return {
            "seed": seed,
            "stream": layer.stream,
            "noise": "gaussian",
            "noise_scale": unit[layer] * sigma,
            "sample_offset": sample,
            "antithetic": antithetic,
            "strategy": layer.strategy,
            "noise_accum": layer.noise_accum,
            "backend": layer.backend,
        }

    with instead_of_noise(layers, arguments):
        return _number(loss())


@contextlib.contextmanager
def _moved(
    layers: list[NoisyLayer], unit: dict[NoisyLayer, Tensor], step: float, seed: int
) -> Iterator[None]:
    """The base weights hold ``W + step d``; afterwards the very same tensors as before are in their place."""
    parameters = {id(p): (p, layer) for layer in layers for p in (layer._base_parameter(),)}
    kept = {key: p.data for key, (p, _) in parameters.items()}
    try:
        for p, layer in parameters.values():
            weight = layer._weight_in_use()[0].detach()
            moved = perturb_weight(
                weight,
                unit[layer] * abs(step),
                seed=seed,
                stream=layer.stream,
                sample=int(step < 0),
                antithetic=True,
                backend=layer.backend,
            )
            p.data = moved if weight.shape == p.shape and weight.stride() == p.stride() else moved.t()
        yield
    finally:
        for key, (p, _) in parameters.items():
            p.data = kept[key]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def _number(value: Tensor) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


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


def main(argv: Sequence[str] | None = None) -> dict[str, Flatness]:
    """`python -m flatlora_kernels.flatness`: prints a report for each adapter and, first, for none; returns them."""
    args = _arguments(argv)
    try:
        import peft
        import transformers
    except ImportError as error:
        raise SystemExit(f"{error}; to install what this needs: pip install peft transformers") from error
    from .integrations.peft import apply_flat_lora

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
        apply_flat_lora(model, sigma=0.0)
        layers = _layers(model)
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


if __name__ == "__main__":
    main()
