"""Options of the commands, as data."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

Option = tuple[str, dict[str, Any]]  # arguments of add_argument


def option(name: str, help: str | None = None, **settings: Any) -> Option:
    return name, {"help": help, **settings}


def add(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    for name, settings in options:
        parser.add_argument(name, **settings)
