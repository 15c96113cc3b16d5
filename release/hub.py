"""Makes a kernel repository of the Hugging Face Hub out of the package: the op, in Triton and plain PyTorch.

    python release/hub.py --out build/hub [--repo-id OWNER/flat-lora]

The folder has both forms that https://github.com/huggingface/kernels knows: the sources of its kernel-builder
(`build.toml`, `torch-ext/`), and what that would build of them (`build/torch-<backend>/`), which `kernels` loads. A
module of the Hub has a name of its own in each build, so all its imports are relative, and its ops are registered in a
namespace that has this name.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).resolve().parent / "hub"
NAME = "flat-lora"
MODULE = NAME.replace("-", "_")
VERSION = 0  # a branch of the Hub's repository, v0; by the Hub's custom 0 says that the API may still change
BACKENDS = ("cpu", "cuda", "rocm")
LICENSE = "Apache-2.0"

ROOMS = {
    **{room: ROOT / "flatlora_kernels" / room for room in ("core", "backends", "choice", "op")},
    "triton_kernels": ROOT / "triton_kernels",
}
# The compiled backends, and what was measured of them.
LEFT_OUT = re.compile(r"backends/(cpu|cuda|shared/library|shared/arguments)\.py|choice/tables/cpu-.*")
# What must be otherwise there, each once in its file.
REWRITES = {
    "backends/triton.py": [
        ('f"flatlora_kernels.triton_kernels.{name}"', 'f"..triton_kernels.{name}", __package__')
    ],
    "choice/dispatch.py": [
        ("from ..backends import cpu\n", ""),
        ("level = cpu.level()", "level = None  # of the compiled backend"),
    ],
    "op/schema.py": [
        ('Library("flatlora", "DEF")', 'Library(add_op_namespace_prefix("").rstrip(":"), "DEF")')
    ],
}
_OP = re.compile(r'"flatlora::(\w+)"')
_FUTURE = "from __future__ import annotations\n"


def rewritten(name: str, text: str) -> str:
    """A file of the package as the kernel has it."""
    for old, new in REWRITES.get(name, []):
        if text.count(old) != 1:
            sys.exit(
                f"release/hub.py: REWRITES expects once in {name}, found {text.count(old)} times: {old.strip()}"
            )
        text = text.replace(old, new)
    text = _OP.sub(r'add_op_namespace_prefix("\1")', text)
    code = text.replace("torch.ops.flatlora.", "ops.").replace("torch.ops.flatlora,", "ops,")
    names = ["add_op_namespace_prefix"] * ("add_op_namespace_prefix(" in code) + ["ops"] * (code != text)
    if names:
        assert _FUTURE in code, name
        dots = "." * len(Path(name).parts)
        code = code.replace(_FUTURE, f"{_FUTURE}\nfrom {dots}_ops import {', '.join(names)}\n", 1)
    return code


def module() -> dict[str, str]:
    """The files of the kernel's module by their paths in it, without `_ops.py`, which is the builder's."""
    files = {name: (TEMPLATES / name).read_text("utf-8") for name in ("__init__.py", "layers.py")}
    for room, folder in ROOMS.items():
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".csv")):
            name = f"{room}/{path.relative_to(folder).as_posix()}"
            if not LEFT_OUT.fullmatch(name):
                text = path.read_text("utf-8")
                files[name] = rewritten(name, text) if path.suffix == ".py" else text
    return files


def filled(template: str, **values: str) -> str:
    """A template with its ``{{ names }}``; kernel-builder fills those of a card itself."""
    text = (TEMPLATES / template).read_text("utf-8")
    for key, value in values.items():
        text = re.sub(rf"{{{{ ?{key} ?}}}}", lambda _, value=value: value, text)
    return text


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8", newline="\n")


def build(out: Path, backend: str, files: dict[str, str]) -> str:
    """`build/torch-<backend>` as the builder makes it; the name of the module that it becomes."""
    content = "".join(f"{name}\0{text}\0" for name, text in sorted(files.items()))
    unique = hashlib.sha256(content.encode()).hexdigest()[:10]
    own = f"_{MODULE}_{backend}_{unique}"
    files = {**files, "_ops.py": filled("_ops.py", id=own)}
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for name, text in sorted(files.items())
    }
    metadata = {
        "name": NAME,
        "id": own,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    write(
        out / "build" / f"torch-{backend}", {**files, "metadata.json": json.dumps(metadata, indent=2) + "\n"}
    )
    return own


def make(out: Path, repo_id: str | None = None) -> list[str]:
    """Writes the repository; the names of its modules, one a backend.

    Raises:
        SystemExit: `out` holds something else; or the package no longer has what REWRITES expects.
    """
    if out.exists() and not (out.is_dir() and ((out / "build.toml").exists() or not any(out.iterdir()))):
        sys.exit(f"--out: expected a new folder, an empty one or one that this script made, got {out}")
    if repo_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        sys.exit(f"--repo-id: expected OWNER/NAME, got {repo_id!r}")
    files = module()
    for part in ("torch-ext", "build", "benchmarks"):  # what an older run wrote may be gone from the package
        shutil.rmtree(out / part, ignore_errors=True)
    hub = f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id else ""
    backends = json.dumps(BACKENDS)
    card = {"repo_id": repo_id or f"OWNER/{NAME}", "version": str(VERSION)}
    sources = {
        "build.toml": filled(
            "build.toml", name=NAME, version=str(VERSION), license=LICENSE, backends=backends, hub=hub
        ),
        "flake.nix": filled("flake.nix"),
        "CARD.md": filled("CARD.md"),
        "LICENSE": (ROOT / "LICENSE").read_text("utf-8"),
        "benchmarks/benchmark.py": filled("benchmark.py"),
        "build/CARD.md": filled("CARD.md", **card),  # kernel-builder uploads it as README.md
    }
    write(out, sources)
    write(out / "torch-ext" / MODULE, files)
    return [build(out, backend, files) for backend in BACKENDS]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where to write the repository"
    )
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="on the Hub, for build.toml and the card")
    given = parser.parse_args()
    made = make(given.out, given.repo_id)
    print(f"{given.out}: {', '.join(made)}")
