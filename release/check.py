"""Tries a wheel as a user would: python release/check.py WHEEL [--python python3.10 ...] [--torch "torch==2.10.*"]

In an empty environment for each Python: installs torch and the wheel, runs the README's example of the op with the CPU
library, asks the doctor, removes the package again, and looks that no file is left. --borrow-torch takes the torch of
the environment that runs this, instead of fetching one.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = """
import flatlora_kernels as fk
assert fk.backend_info()["cpu"]["unavailable"] is None, fk.backend_info()["cpu"]
reference = fused_flat_lora_linear(x, W, A, B, scaling=2.0, noise_scale=scale, seed=0, stream=0, backend="reference")
torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4)
print("as the reference computes it:", *y.shape, "with torch", torch.__version__)
"""


def example() -> str:
    """The README's example of the op, and what must be true after it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (found,) = [block for block in blocks if "y = fused_flat_lora_linear(" in block]
    return found + EXPECTED


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=folder, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(
            f"release/check.py: {' '.join(map(str, command[:4]))} ended with {done.returncode}\n{done.stdout}"
        )
    return done.stdout


def files(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}


def check(wheel: Path, program: str, torch: str | None) -> None:
    """Ends the script where something is not as promised. `torch`: what pip is asked for, None: borrowed."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(program, "-m", "venv", folder / "env", folder=folder)
        python = folder / "env/bin/python"
        (site,) = (folder / "env/lib").glob("python3*/site-packages")
        if torch is None:
            import torch as borrowed

            (site / "borrowed.pth").write_text(str(Path(borrowed.__file__).parents[1]) + "\n")
        else:
            run(python, "-m", "pip", "install", "--quiet", "numpy", *shlex.split(torch), folder=folder)
        before = files(site)
        options = ["--no-deps", "--ignore-installed"] if torch is None else []
        run(python, "-m", "pip", "install", "--quiet", *options, wheel, folder=folder)
        where = run(python, "-c", "import flatlora_kernels as fk; print(fk.__file__)", folder=folder)
        if not Path(where.strip()).is_relative_to(site):
            sys.exit(f"release/check.py: expected the package of the wheel in {site}, got {where}")
        (folder / "example.py").write_text(example())
        said = run(python, folder / "example.py", folder=folder)
        run(python, "-m", "flatlora_kernels", folder=folder)
        seconds = time.monotonic() - start
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "flatlora_kernels", folder=folder)
        if left := sorted(files(site) - before):
            sys.exit(f"release/check.py: pip uninstall left {', '.join(map(str, left))}")
    print(f"{program}: {said.strip().splitlines()[-1]}; {seconds:.0f} s; nothing left", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="programs (default: this one)")
    parser.add_argument(
        "--torch", default="torch", help="what pip is asked for, options too (default: torch)"
    )
    parser.add_argument("--borrow-torch", action="store_true", help="use the torch of this environment")
    args = parser.parse_args()
    if not zipfile.is_zipfile(args.wheel):
        parser.error(f"WHEEL: expected a wheel, got {args.wheel}")
    for program in args.python:
        check(args.wheel.resolve(), program, None if args.borrow_torch else args.torch)


if __name__ == "__main__":
    main()
