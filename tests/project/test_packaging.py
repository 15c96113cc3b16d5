"""Importing the package, the doctor, and what setup.py puts where."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from flatlora_kernels import __main__ as doctor
from flatlora_kernels import backends

ROOT = Path(__file__).resolve().parents[2]

if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
    needs_setuptools = pytest.mark.skip(reason="needs setuptools 77 or later: pip install -U setuptools")
else:
    needs_setuptools = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")


def python(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLATLORA_")}
    environment = clean | {"PYTHONPATH": str(folder)} | variables
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with the package as it is where nothing could be compiled."""
    shutil.copytree(
        Path(backends.__file__).parent.parent,
        tmp_path / "flatlora_kernels",
        ignore=shutil.ignore_patterns("lib"),
    )
    return tmp_path


def test_import_needs_neither_library_nor_triton_nor_gpu(bare: Path) -> None:
    code = """
import ctypes, sys
import torch
before = set(sys.modules)
def refuse(*args, **kwargs):
    raise AssertionError(f"loaded {args}")
ctypes.CDLL = refuse
class Refuse:
    def find_spec(self, name, *rest):
        assert name.split(".")[0] != "triton", "imported triton"
sys.meta_path.insert(0, Refuse())
import flatlora_kernels
new = set(sys.modules) - before
assert not torch.cuda.is_initialized()
assert not [n for n in new if n.split(".")[0] in ("triton", "triton_kernels")], new
print(flatlora_kernels.__file__)
"""
    done = python("-c", code, folder=bare)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(bare)


def test_without_the_library_the_op_runs_and_says_what_is_missing(bare: Path) -> None:
    code = """
import warnings
import torch
import flatlora_kernels as fk
W = torch.ones(1024, 1024)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = [fk.fused_flat_lora_linear(torch.ones(2, 1024), W, sigma=0.1, seed=3) for _ in range(2)]
assert torch.equal(*y) and not torch.equal(y[0], torch.full_like(y[0], 1024.0))
print(len(caught), caught[0].message)
try:
    fk.fused_flat_lora_linear(torch.ones(2, 1024), W, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    done = python("-c", code, folder=bare)
    assert done.returncode == 0, done.stderr
    warned, error = done.stdout.splitlines()
    assert warned.startswith("1 ")
    for text in (warned, error):
        assert "not built" in text
        assert "FLATLORA_BUILD=cpu pip install ." in text


def test_doctor_reports_every_backend() -> None:
    done = python("-m", "flatlora_kernels", folder=Path(backends.__file__).parent.parent.parent)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, info in backends.backend_info().items():
        index = next(i for i, line in enumerate(lines) if line.split()[:1] == [name])
        runs = info["unavailable"] is None
        assert ("does not run here" in lines[index]) != runs
        if not runs:
            assert str(info["unavailable"]) in lines[index + 1]
    for name in ("package", "python", "gpu", "nvcc", "compiler", "libraries"):
        assert any(line.startswith(f"{name} ") for line in lines), name


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One without compiler and Python.h: PATH is `bin`, Python's headers belong into `include`."""
    for folder in ("bin", "include"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path / name))
    return tmp_path


def program(path: Path) -> str:
    path.touch(0o755)
    return str(path)


def test_doctor_finds_the_compiler_as_triton_does(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "PATH has neither gcc nor clang" in doctor._compiler()[0]
    assert "apt install build-essential" in doctor._compiler()[0]
    program(machine / "bin/cc")  # for which Triton does not look
    assert doctor._compiler()[0].startswith("none: ")
    clang = program(machine / "bin/clang")
    assert doctor._compiler()[0] == clang
    gcc = program(machine / "bin/gcc")
    assert doctor._compiler()[0] == gcc
    other = program(machine / "other-cc")
    for named, expected in ((other, other), ("clang", clang)):
        monkeypatch.setenv("CC", named)
        assert doctor._compiler()[0] == expected
    for named in ("", "gcc -m64", "/opt/none/gcc"):
        monkeypatch.setenv("CC", named)
        assert doctor._compiler()[0].startswith(f"none: CC is {named!r}")


def test_doctor_looks_for_the_headers(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = doctor._compiler()[1]
    assert said.startswith(f"no Python.h in {machine / 'include'}; ")
    assert f"python{sys.version_info.major}.{sys.version_info.minor}-dev" in said
    (machine / "elsewhere").mkdir()
    (machine / "elsewhere/Python.h").touch()
    monkeypatch.setenv("C_INCLUDE_PATH", f"{machine / 'bin'}{os.pathsep}{machine / 'elsewhere'}")
    assert doctor._compiler()[1] == f"Python.h found in {machine / 'elsewhere'}"
    (machine / "include/Python.h").touch()
    assert doctor._compiler()[1] == f"Python.h found in {machine / 'include'}"


def test_doctor_agrees_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """On what Triton calls, here and with CC."""
    build = pytest.importorskip("triton.runtime.build")
    if hasattr(build, "_find_compiler"):  # Triton 3.9 remembers what it found
        monkeypatch.setattr(build, "_find_compiler", build._find_compiler.__wrapped__)
    for name in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    compiled: list[list[str]] = []
    monkeypatch.setattr(build.subprocess, "check_call", lambda command, **more: compiled.append(command))
    for named in (None, sys.executable):
        if named is None:
            monkeypatch.delenv("CC", raising=False)
        else:
            monkeypatch.setenv("CC", named)
        compiler, headers = doctor._compiler()
        if compiler.startswith("none: "):
            with pytest.raises(RuntimeError, match="Failed to find C compiler"):
                build._build("name", "name.c", ".", [], [], [], [])
            continue
        build._build("name", "name.c", ".", [], [], [], [])
        assert compiled[-1][0] == compiler
        if headers.startswith("Python.h found"):
            assert f"-I{headers.removeprefix('Python.h found in ')}" in compiled[-1]


def test_doctor_says_why_a_backend_does_not_run(bare: Path) -> None:
    done = python("-m", "flatlora_kernels", folder=bare, FLATLORA_CPU_ISA="sse9")
    assert done.returncode == 0, done.stderr
    assert "cpu       does not run here" in done.stdout
    assert "because its library was not built" in done.stdout
    assert "cuda      does not run here" in done.stdout
    assert "reference runs here" in done.stdout
    assert "FLATLORA_CPU_ISA=sse9" in done.stdout

    (bare / "flatlora_kernels/lib").mkdir()
    (bare / "flatlora_kernels/lib/libflatlora_cpu.so").write_text("not a library")
    done = python("-m", "flatlora_kernels", folder=bare)
    assert done.returncode == 0, done.stderr
    assert "libflatlora_cpu.so: cannot be loaded" in done.stdout
    assert "because its library cannot be loaded" in done.stdout


def listed_sources() -> set[str]:
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    return {line.split()[1] for line in lines if line and not line.startswith("#")}


def test_source_list_is_complete() -> None:
    files = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()} - {
        "csrc/sources.txt"
    }
    assert listed_sources() == files


def setup(*arguments: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return python("setup.py", *arguments, folder=folder, **variables)


@needs_setuptools
@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"FLATLORA_BUILD": "gpu"}, "FLATLORA_BUILD: expected auto, cpu, cuda or none, got 'gpu'"),
        (
            {"FLATLORA_BUILD": "cpu", "PATH": ""},
            "FLATLORA_BUILD=cpu: cmake is missing (pip install cmake ninja)",
        ),
        (
            {"FLATLORA_BUILD": "cpu", "CXX": "no-such-compiler"},
            "FLATLORA_BUILD=cpu: a C++17 compiler is missing (install g++ or clang, or set CXX)",
        ),
        (
            {"FLATLORA_BUILD": "cuda"},
            "FLATLORA_BUILD=cuda: nvcc is missing; put it on PATH or set CUDACXX",
        ),
    ],
    ids=["unknown", "no-cmake", "no-compiler", "no-nvcc"],
)
def test_what_is_missing_is_said_in_one_sentence(
    variables: dict[str, str], sentence: str, fakes: Path
) -> None:
    done = setup("--name", **{"PATH": f"{fakes}", **variables})
    assert done.returncode != 0
    assert done.stderr.strip() == sentence


@needs_setuptools
def test_old_setuptools_is_named(tmp_path: Path) -> None:
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'")
    done = setup("--name", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.startswith("flatlora_kernels: building needs setuptools 77 or later, found 65.5.0;")
    assert len(done.stderr.splitlines()) == 1


@needs_setuptools
def test_auto_without_tools_goes_on_and_says_so() -> None:
    done = setup("--name", PATH="")
    assert done.returncode == 0
    assert done.stdout.strip() == "flatlora_kernels"
    assert "built without its compiled kernels, because cmake is missing" in done.stderr


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    """A folder for PATH: a `c++`, and a `cmake` that notes its arguments and writes the library it was asked for."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    cmake = f"""#!{sys.executable}
import pathlib, sys
here = pathlib.Path({str(folder)!r})
with open(here / "log", "a") as log:
    print(*sys.argv[1:], file=log)
if sys.argv[1] == "--build":
    output = (here / "output").read_text()
    for target in sys.argv[sys.argv.index("--target") + 1:]:
        pathlib.Path(output, f"lib{{target}}{".dylib" if sys.platform == "darwin" else ".so"}").write_text("")
else:
    output = next(a for a in sys.argv if "LIBRARY_OUTPUT" in a).partition("=")[2]
    pathlib.Path(output).mkdir(parents=True, exist_ok=True)
    (here / "output").write_text(output)
"""
    for name, text in (("cmake", cmake), ("c++", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    # From a copy, because setuptools writes beside what it reads.
    leave = shutil.ignore_patterns(
        ".*_cache", ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "local"
    )
    shutil.copytree(ROOT, folder / "checkout", ignore=leave)
    code = "import setuptools.build_meta as b; print('made', b.build_sdist('..'))"
    done = python("-c", code, folder=folder / "checkout")
    assert done.returncode == 0, done.stderr
    name = done.stdout.splitlines()[-1].split()[1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / name.removesuffix(".tar.gz")


def wheel(source: Path, out: Path, **variables: str) -> Path:
    shutil.copytree(source, out / "source")
    code = "import setuptools.build_meta as b; print('made', b.build_wheel('..'))"
    done = python("-c", code, folder=out / "source", **variables)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1].split()[1]


@needs_setuptools
def test_sdist_has_all_that_building_and_testing_take(sdist: Path) -> None:
    files = {str(p.relative_to(sdist)) for p in sdist.rglob("*") if p.is_file()}
    expected = listed_sources() | {
        "csrc/sources.txt",
        "CMakeLists.txt",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
    }
    expected |= {f"tests/project/{Path(__file__).name}", "bench/__main__.py", "Makefile"}
    assert expected <= files
    assert not [f for f in files if f.endswith((".so", ".dylib", ".pyc"))]


@needs_setuptools
def test_wheel_without_libraries(sdist: Path, tmp_path: Path) -> None:
    made = wheel(sdist, tmp_path, FLATLORA_BUILD="none")
    assert made.name.endswith("-py3-none-any.whl")
    files = zipfile.ZipFile(made).namelist()
    assert {f.split("/")[0] for f in files if ".dist-info" not in f} == {"flatlora_kernels"}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "flatlora_kernels").rglob("*.py")}
    modules |= {f"flatlora_kernels/{p.relative_to(ROOT)}" for p in (ROOT / "triton_kernels").rglob("*.py")}
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "flatlora_kernels/choice/tables").glob("*.csv")}
    assert data
    assert {f for f in files if ".dist-info" not in f} == modules | data | {"flatlora_kernels/py.typed"}


@needs_setuptools
def test_wheel_with_the_library_fits_every_python(sdist: Path, tmp_path: Path, fakes: Path) -> None:
    made = wheel(sdist, tmp_path, FLATLORA_BUILD="cpu", PATH=str(fakes), MAX_JOBS="3")
    tag = made.stem.split("-", 2)[2]
    assert tag.startswith("py3-none-") and not tag.endswith("any")
    libraries = [f for f in zipfile.ZipFile(made).namelist() if "/lib/" in f]
    assert [Path(f).stem for f in libraries] == ["libflatlora_cpu"]
    configure, build = (fakes / "log").read_text().splitlines()
    assert "-DFLATLORA_BUILD=cpu" in configure
    assert "--parallel 3 --target flatlora_cpu" in build


def with_nvcc(fakes: Path) -> None:
    (fakes / "nvcc").write_text("#!/bin/sh\n")
    (fakes / "nvcc").chmod(0o755)


@needs_setuptools
def test_wheel_with_both_libraries(sdist: Path, tmp_path: Path, fakes: Path) -> None:
    with_nvcc(fakes)
    made = wheel(sdist, tmp_path, PATH=str(fakes), MAX_JOBS="1")
    libraries = [f for f in zipfile.ZipFile(made).namelist() if "/lib/" in f]
    assert sorted(Path(f).stem for f in libraries) == ["libflatlora_cpu", "libflatlora_cuda"]
    configure, build = (fakes / "log").read_text().splitlines()
    assert "-DFLATLORA_BUILD=cuda" in configure
    assert "--target flatlora_cpu flatlora_cuda" in build


@needs_setuptools
@pytest.mark.parametrize(
    ("cores", "gigabytes", "jobs"), [(8, 64, 8), (8, 3, 3), (8, 0, 1), (2, 64, 2), (4, None, 4)]
)
def test_compilers_at_a_time_fit_into_memory(
    cores: int, gigabytes: int | None, jobs: int, sdist: Path, tmp_path: Path
) -> None:
    code = f"""
import setuptools
setuptools.setup = lambda **options: None
import setup
setup.cores, setup.available_memory = lambda: {cores}, lambda: {gigabytes if gigabytes is None else gigabytes << 30}
print(setup.jobs(cuda=True), setup.jobs(cuda=False))
"""
    done = python("-c", code, folder=sdist, PYTHONPATH=str(sdist))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(jobs), str(cores)]


@needs_setuptools
def test_compiling_is_announced(sdist: Path, tmp_path: Path, fakes: Path) -> None:
    shutil.copytree(sdist, tmp_path / "source")
    for build, said in (
        ("cpu", "compiling flatlora_cpu, 3 processes at a time, about four minutes of a core"),
        (
            "cuda",
            "compiling flatlora_cpu and flatlora_cuda, 3 processes at a time, about ten minutes of a core",
        ),
    ):
        with_nvcc(fakes)
        variables = {"PATH": str(fakes), "MAX_JOBS": "3", "FLATLORA_BUILD": build}
        done = setup("build_ext", folder=tmp_path / "source", **variables)
        assert done.returncode == 0, done.stderr
        assert f"flatlora_kernels: {said}; FLATLORA_BUILD=none leaves it out" in done.stderr


@needs_setuptools
def test_failed_compilation_says_what_to_do(sdist: Path, tmp_path: Path, fakes: Path) -> None:
    (fakes / "cmake").write_text("#!/bin/sh\nexit 1\n")
    shutil.copytree(sdist, tmp_path / "source")
    for variables, sentence in (
        ({}, "could not be built, see the output of cmake above; FLATLORA_BUILD=none installs without them"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS: expected a whole number from 1, got 'many'"),
    ):
        done = setup("build_ext", folder=tmp_path / "source", PATH=str(fakes), **variables)
        assert done.returncode != 0
        assert sentence in done.stderr.splitlines()[-1]
