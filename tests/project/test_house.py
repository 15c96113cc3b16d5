"""The order of the rooms of flatlora_kernels: which may import which, and no circle between files.

All imports count, those within functions and under TYPE_CHECKING as well. docs/internals/map.md draws the order.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "flatlora_kernels"
# Each room and what it may use. The package's own files (its room is "") may use all, and no room uses them.
MAY_USE = {
    "core": (),
    "triton_kernels": ("core",),
    "backends": ("core", "triton_kernels"),
    "choice": ("core", "triton_kernels", "backends"),
    "op": ("core", "backends", "choice"),
    "train": ("core", "triton_kernels", "backends", "choice", "op"),
    "methods": ("core", "backends", "choice", "op", "train"),
    "integrations": ("core", "backends", "choice", "op", "train"),
    # Its command puts noise into saved adapters of PEFT, and tests them on noisy chips.
    "flatness": ("core", "backends", "choice", "op", "train", "methods", "integrations"),
}


def modules(root: Path) -> dict[str, Path]:
    """Files by module name. The folder triton_kernels/ is installed inside the package."""
    found = {}
    for base, prefix in ((root / PACKAGE, PACKAGE), (root / "triton_kernels", f"{PACKAGE}.triton_kernels")):
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            name = ".".join([prefix, *parts]).removesuffix(".__init__")
            found.setdefault(name, path)
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_USE else ""


def imported(module: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and name of each module of the package that a file imports."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            where = ".".join([*base, *filter(None, [node.module])])
            names = [f"{where}.{a.name}" if f"{where}.{a.name}" in known else where for a in node.names]
        else:
            continue
        for name in sorted(set(names)):
            if name.split(".")[0] == PACKAGE:
                yield node.lineno, name


def upward(root: Path) -> list[str]:
    """Imports that the order forbids, each in a sentence."""
    known = modules(root)
    return [
        f"{path.relative_to(root)}:{line}: {room_of(module)} may not import {name}"
        for module, path in known.items()
        if (room := room_of(module))
        for line, name in imported(module, path, known)
        if room_of(name) not in (room, *MAY_USE[room])
    ]


def circle(root: Path) -> list[str]:
    """The modules of a circle of imports, [] where there is none."""
    known = modules(root)
    uses = {m: {n for _, n in imported(m, path, known) if n in known} for m, path in known.items()}
    done: set[str] = set()

    def search(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for name in sorted(uses[module]):
            if found := search(name, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in uses if (found := search(module, []))), [])


def test_every_room_has_its_place() -> None:
    rooms = {p.parent.name for p in (ROOT / PACKAGE).glob("*/__init__.py")} | {"triton_kernels"}
    assert rooms == set(MAY_USE)


def test_rooms_import_downwards() -> None:
    assert upward(ROOT) == []


def test_no_circle() -> None:
    assert circle(ROOT) == []


def test_the_order_itself_has_no_circle() -> None:
    above = list(MAY_USE)
    assert all(
        above.index(used) < above.index(room) for room, all_used in MAY_USE.items() for used in all_used
    )


def write(root: Path, files: dict[str, str]) -> Path:
    for name in ("", *MAY_USE):
        files = {f"{PACKAGE}/{name}/__init__.py": "", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    "line",
    [
        "from ..train import layer",
        "from ..train.layer import NoisyLayer",
        "import flatlora_kernels.train.layer",
        "from flatlora_kernels.train.layer import NoisyLayer",
        "def late():\n    from ..train import layer",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..train import layer",
        "from .. import __version__",
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, line: str) -> None:
    """What the checks above would say if the order did not hold."""
    allowed = {
        f"{PACKAGE}/train/layer.py": "from ..op import schema",
        f"{PACKAGE}/op/schema.py": "import torch\nfrom . import autograd\nfrom .. import backends",
        f"{PACKAGE}/op/autograd.py": "from ..core import noise",
        f"{PACKAGE}/core/noise.py": "",
        "triton_kernels/tile.py": "from ..core.noise import Draw",
    }
    assert upward(write(tmp_path, allowed)) == []
    found = upward(write(tmp_path, {**allowed, f"{PACKAGE}/op/schema.py": line}))
    assert len(found) == 1 and f"{PACKAGE}/op/schema.py:" in found[0] and "op may not import" in found[0]


def test_triton_kernels_are_a_room(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"triton_kernels/tile.py": "from ..backends import triton", f"{PACKAGE}/backends/triton.py": ""},
    )
    assert upward(tmp_path) == [
        "triton_kernels/tile.py:1: triton_kernels may not import flatlora_kernels.backends.triton"
    ]
    write(
        tmp_path,
        {"triton_kernels/tile.py": "", f"{PACKAGE}/op/schema.py": "from ..triton_kernels import tile"},
    )
    assert len(upward(tmp_path)) == 1


def test_a_circle_is_found(tmp_path: Path) -> None:
    files = {
        f"{PACKAGE}/op/a.py": "from .b import x",
        f"{PACKAGE}/op/b.py": "def late():\n    from . import c",
        f"{PACKAGE}/op/c.py": "",
    }
    assert circle(write(tmp_path, files)) == []
    files[f"{PACKAGE}/op/c.py"] = "from ..op.a import y"
    assert circle(write(tmp_path, files)) == [f"{PACKAGE}.op.{name}" for name in "abc"]
