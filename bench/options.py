"""Options of the commands, as data."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from flatlora_kernels.core.noise import KINDS


class Option(NamedTuple):
    name: str
    settings: dict[str, Any]  # of argparse


def option(name: str, help: str | None = None, **settings: Any) -> Option:
    return Option(name, {"help": help, **settings})


def add(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    for name, settings in options:
        parser.add_argument(name, **settings)


def number(kind: type, fits: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    """A type for argparse, which refuses other numbers in these words."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return parse


NOISE = option("--noise", nargs="+", choices=KINDS, default=list(KINDS))
DEVICE = option("--device", "default cuda where there is one", choices=("cpu", "cuda"))
OUT = option(
    "--out", "folder of the CSV and JSON", type=Path, default=Path(__file__).parent / "results" / "local"
)
PLACE = (
    DEVICE,
    option("--threads", "of torch, on a CPU", type=int),
    OUT,
    option("--name", "of the files; default set, device and time"),
)
MIN_ROUNDS = "also where that takes longer than the budget"
