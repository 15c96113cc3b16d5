"""docs/internals/map.md against the tree: its paths exist, and no room is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAP = (ROOT / "docs" / "internals" / "map.md").read_text(encoding="utf-8")
PATHS = sorted(set(re.findall(r"`([\w.-]+/[\w./-]*)`", MAP)))
MADE = {"build", "dist"}


def rooms() -> list[str]:
    """The package's folders, and every other folder of the checkout that has code."""
    package = [p.parent for p in (ROOT / "flatlora_kernels").rglob("__init__.py")]
    code = {".py", ".h", ".cpp", ".cu"}
    beside = [
        p
        for p in ROOT.iterdir()
        if p.is_dir() and not p.name.startswith(".") and p.name not in MADE and p.suffix != ".egg-info"
        if any(f.suffix in code for f in (*p.glob("*.*"), *p.glob("*/*.*")))
    ]
    return sorted({p.name for p in [*package, *beside]})


def test_there_are_paths() -> None:
    assert len(PATHS) > 30


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path: str) -> None:
    there = ROOT / path
    assert there.is_dir() if path.endswith("/") else there.is_file()


@pytest.mark.parametrize("room", rooms())
def test_rooms_are_drawn(room: str) -> None:
    drawing = MAP.partition("```text\n")[2].partition("```")[0]
    assert re.search(rf"(?<![\w/]){room}/", drawing), f"{room}/ is not in the drawing"
