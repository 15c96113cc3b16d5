"""What `make` decides and says before it compiles, and how `make test` runs the tests and sums up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "Makefile").exists() or shutil.which("make") is None, reason="needs a checkout and make"
)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder for PATH."""
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def program(path: Path) -> None:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def plan(machine: Path, cuda: str | None, hip: str | None = None, build: str = "") -> tuple[str, str]:
    """What make would compile with this torch, and what it says."""
    torch = machine.parent / "torch"
    torch.mkdir(exist_ok=True)
    (torch / "__init__.py").write_text("raise AssertionError('imported torch')")
    (torch / "version.py").write_text(f"cuda = {cuda!r}\nhip = {hip!r}\n")
    code = (ROOT / "Makefile").read_text().partition("define PLAN\n")[2].partition("\nendef")[0]
    variables = {"PATH": str(machine), "PYTHONPATH": str(machine.parent), "FLATLORA_BUILD": build}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="needs a machine without a GPU")
def test_cuda_is_compiled_where_it_is_of_use(machine: Path) -> None:
    program(machine / "nvcc")
    build, said = plan(machine, cuda=None)
    assert build == "cpu"
    assert "No CUDA kernels: torch is built for the CPU alone, and there is no GPU" in said
    assert "FLATLORA_BUILD=cuda make" in said and "Compiling C++ kernels" in said
    for cuda, hip in (("13.0", None), (None, "7.0")):
        build, said = plan(machine, cuda=cuda, hip=hip)
        assert build == "auto"
        assert "Compiling C++ and CUDA kernels" in said and "minutes of a core" in said
    program(machine / "nvidia-smi")
    assert plan(machine, cuda=None)[0] == "auto"


@pytest.mark.parametrize("build", ["none", "cpu", "cuda", "auto"])
def test_what_is_asked_for_is_compiled(build: str, machine: Path) -> None:
    program(machine / "nvcc")
    found, said = plan(machine, cuda=None, build=build)
    assert found == build
    assert ("CUDA" in said) == (build in ("cuda", "auto"))
    assert ("Compiling nothing (FLATLORA_BUILD=none)" in said) == (build == "none")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def dry(checkout: Path, *arguments: str) -> str:
    """What make would run, in an environment that has this checkout installed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLATLORA_", "MAKE", "MFLAGS"))}
    command = ["make", "-n", f"PYTHON={sys.executable}", "HERE=True", "MARK=mark", *arguments]
    return subprocess.run(command, cwd=checkout, env=clean, capture_output=True, text=True, check=True).stdout


def test_another_wish_compiles_again(checkout: Path) -> None:
    assert "pip install" in dry(checkout, "install")
    (checkout / "mark").write_text("cpu\n")
    assert "pip install" not in dry(checkout, "install")
    assert "pip install" not in dry(checkout, "install", "FLATLORA_BUILD=cpu")
    assert "pip install" in dry(checkout, "install", "FLATLORA_BUILD=cuda")


def test_tests_run_in_several_processes_of_a_thread(checkout: Path) -> None:
    (checkout / "mark").write_text("cpu\n")
    said = " ".join(dry(checkout, "test", "PYTEST_ARGS=-n 3 tests/op").replace("\\\n", " ").split())
    assert "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}" in said
    assert "-n auto --dist loadfile" in said and said.endswith("-n 3 tests/op")
    assert "make test-cuda-compile" in said


def test_another_torch_has_an_environment_of_its_own(checkout: Path) -> None:
    (checkout / "mark").write_text("cpu\n")
    said = dry(checkout, "test-torch", "TORCH_VERSION=2.11")
    assert "'torch==2.11.*'" in said
    for line in said.splitlines():
        if "-m pip" in line or "-m pytest" in line:
            assert "build/torch-2.11/bin/python -m" in line


GIB = 1 << 30


@pytest.mark.parametrize(
    ("cores", "memory", "count"),
    [(1, 64 * GIB, 1), (2, 64 * GIB, 2), (2, None, 2), (64, 64 * GIB, 8), (8, 7 * GIB, 3), (8, GIB, 1)],
)
def test_processes_fit_into_cores_and_memory(cores: int, memory: int | None, count: int) -> None:
    assert conftest.workers(cores, memory) == count


def test_memory_is_that_of_the_container(tmp_path: Path) -> None:
    machine = tmp_path / "meminfo"
    assert conftest.free_memory(machine, tmp_path) is None
    machine.write_text("MemTotal: 9 kB\nMemAvailable: 4 kB\n")
    assert conftest.free_memory(machine, tmp_path) == 4096
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, free in (("max", 4096), ("3000", 2000), ("9000", 4096)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert conftest.free_memory(machine, tmp_path) == free


def test_what_emulated_runs_do_not_import_has_no_test_for_them() -> None:
    tests = ROOT / "tests"
    files = [
        file
        for name in conftest.ELSEWHERE
        for path in tests.glob(name)
        for file in [path, *path.rglob("*.py")]
    ]
    assert len(files) > 30
    marked = re.compile(r"def \w+\([^)]*\btarget\b|mark\.(interpreter|emulator)\b")
    assert not [str(file) for file in files if file.is_file() and marked.search(file.read_text())]


SUITE = """
import pytest

@pytest.mark.parametrize("n", range(3))
def test_left_out(n):
    pytest.skip("needs a thing")

@pytest.mark.skip(reason="another")
def test_marked():
    pass

def test_wrong():
    answer = 41
    assert answer == 42
"""


def test_skips_are_summed_up_by_reason(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "conftest"]
    command += ["-p", "no:cacheprovider", f"--rootdir={tmp_path}", "-n", "2", str(tmp_path)]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "4 skipped, by reason" in line)
    assert lines[start + 1 : start + 3] == ["     3 needs a thing", "     1 another"]
    assert "assert 41 == 42" in done.stdout and "FAILED test_suite.py::test_wrong" in done.stdout
    assert "SKIPPED [" not in done.stdout
