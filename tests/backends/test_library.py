"""Compiled libraries that are not of this build: a sentence and another backend, never a call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulator
import pytest

from flatlora_kernels import backends
from flatlora_kernels.backends.shared import library

needs_compiler = pytest.mark.skipif(emulator.CXX is None, reason="needs a C++ compiler")
NAMES = tuple(library._LIBRARIES)


def expected_abi(name: str) -> str:
    return " ".join(map(str, (library._VERSION, *(s.size for s in library._LIBRARIES[name][1]))))


def source(name: str, abi: str | None, without: str = "") -> str:
    """A library with all names that `name` exports, of which all but its ABI end the process."""
    first, *others = [*library._LIBRARIES[name][0], f"{name}_build_info"]
    code = "".join(f"void {f}() {{ __builtin_trap(); }}\n" for f in others if f != without)
    if abi is not None:
        code += f'const char* {first}() {{ return "{abi}"; }}\n'
    return f'extern "C" {{\n{code}}}\n'


def compiled(code: str, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    command = [str(emulator.CXX), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(to)]
    subprocess.run(command, input=code, text=True, check=True)
    return to


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_another_build_is_refused_before_it_is_called(name: str, tmp_path: Path) -> None:
    good = expected_abi(name)
    version, *sizes = good.split()
    linear = f"{'_'.join(name.split('_')[:2])}_linear"
    wrong = {
        "version": (source(name, f"{int(version) + 1} {' '.join(sizes)}"), "has ABI '"),
        "size": (
            source(name, f"{version} {int(sizes[0]) + 8} {' '.join(sizes[1:])}"),
            f"expected '{good}'; ",
        ),
        "no ABI": (source(name, None), "_abi; build it again: "),
        "no function": (source(name, good, without=linear), f"has no {linear}; build it again: "),
        "foreign": ('extern "C" int answer() { return 42; }', "is of another build: "),
    }
    for number, (code, sentence) in enumerate(wrong.values()):
        path = compiled(code, tmp_path / f"{number}.so")
        found = library.load(path, name)
        assert isinstance(found, str)
        assert found.startswith("is of another build: ")
        assert sentence in found and str(path) in found and "\n" not in found
    right = library.load(compiled(source(name, good), tmp_path / "right.so"), name)
    assert not isinstance(right, str)


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF\2\1", b"\x7fELF\2\1" + bytes(200)])
def test_what_is_no_library_is_a_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "libflatlora_cpu.so"
    path.write_bytes(content)
    found = library.load(path, "flatlora_cpu")
    assert isinstance(found, str) and found.startswith("cannot be loaded: ") and "\n" not in found
    assert library.load(tmp_path, "flatlora_cpu").startswith("cannot be loaded: ")


@needs_compiler
def test_sizes_are_those_of_the_headers(tmp_path: Path) -> None:
    """Of this checkout, whatever was built of it."""
    code = """
#include <cstdio>
#include "cuda/kernels.h"
#include "common/abi.h"
using namespace flatlora;
int main() { std::puts(kAbi<LinearArgs, RowNormsArgs, PerturbArgs, TransformArgs, PackedArgs, Gpu>.text); }
"""
    command = [str(emulator.CXX), *emulator.FLAGS, f"-I{emulator.CSRC}", "-x", "c++", "-", "-o"]
    subprocess.run([*command, str(tmp_path / "abi")], input=code, text=True, check=True)
    said = subprocess.run([tmp_path / "abi"], capture_output=True, text=True, check=True).stdout.strip()
    assert said == expected_abi("flatlora_cuda")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package, without libraries."""
    here = Path(backends.__file__).parent.parent
    shutil.copytree(here, tmp_path / "copy" / here.name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return tmp_path / "copy"


WALK = """
import warnings
import torch
import flatlora_kernels as fk
from flatlora_kernels.__main__ import report
print(report())
x, W = torch.ones(2, 1024), torch.ones(1024, 1024)
given = {"sigma": 0.1, "seed": 3}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = fk.fused_flat_lora_linear(x, W, **given)
assert torch.equal(y, fk.fused_flat_lora_linear(x, W, backend="reference", **given))
print("warned:", *(w.message for w in caught))
try:
    fk.fused_flat_lora_linear(x, W, backend="cpu", **given)
except RuntimeError as error:
    print("refused:", error)
"""


@needs_compiler
@pytest.mark.parametrize("kind", ["stale", "cut short"])
def test_the_op_goes_on_without_it(kind: str, package: Path) -> None:
    path = compiled(source("flatlora_cpu", "0 8"), package / "flatlora_kernels/lib/libflatlora_cpu.so")
    sentence = f"is of another build: {path} has ABI '0 8', expected '{expected_abi('flatlora_cpu')}'; "
    if kind == "cut short":
        compiled(source("flatlora_cpu", expected_abi("flatlora_cpu")) + "char much[1 << 20] = {1};", path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 4])
        sentence = f"is cut short: {path} has fewer bytes than its header says; "
    sentence += "build it again: FLATLORA_BUILD=cpu pip install ."
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLATLORA_")}
    done = subprocess.run(
        [sys.executable, "-c", WALK],
        cwd=package, env=clean | {"PYTHONPATH": str(package)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"libflatlora_cpu.so: {sentence}" in done.stdout
    assert f"because its library {sentence}" in done.stdout
    warned, refused = (
        next(line for line in done.stdout.splitlines() if line.startswith(w)) for w in ("warned:", "refused:")
    )
    assert sentence in warned and sentence in refused


@needs_compiler
def test_cuda_asks_its_library_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = backends.get("cuda")
    load = module._load.__wrapped__
    for emulated, name in ((False, "flatlora_cuda"), (True, "flatlora_cuda_emulated")):
        path = compiled(source(name, "0 8"), tmp_path / f"lib{name}.so")
        monkeypatch.setattr(module, "_EMULATED", emulated)
        monkeypatch.setattr(module, "_path", lambda path=path: path)
        assert load().startswith(f"its library is of another build: {path} has ABI '0 8', expected '")
