"""Builds the compiled libraries with CMake; the rest of the metadata is in pyproject.toml.

FLATLORA_BUILD        auto (default): what the tools found here can build; none, cpu, cuda: exactly that, or an error
MAX_JOBS              compiler processes at a time; default: one per core, fewer where memory is short for nvcc
TORCH_CUDA_ARCH_LIST  GPU architectures, as torch reads it; default: see CMakeLists.txt
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"flatlora_kernels: building needs setuptools 77 or later, found {setuptools.__version__};"
        " pip install -U setuptools, or leave out --no-build-isolation"
    )

from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

ROOT = Path(__file__).resolve().parent
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


def sources() -> dict[str, list[str]]:
    """csrc/sources.txt: files by what they are for."""
    kinds = ("cpu", "cpu-level", "cuda", "cuda-sm90a", "emulator", "header")
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    for line in (ROOT / "csrc/sources.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            kind, path = line.split()
            found[kind].append(path)
    return found


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes, of the machine or of the container, whichever has less left; None where nobody says."""
    found = []
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) << 10)
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(limit - used)
    except (OSError, ValueError):
        pass
    return min(found, default=None)


NVCC_MEMORY = 1 << 30  # bytes for one nvcc; the largest file took 0.2 GiB


def jobs(cuda: bool) -> int:
    """Compiler processes at a time."""
    memory = available_memory() if cuda else None
    return cores() if memory is None else max(1, min(cores(), memory // NVCC_MEMORY))


def missing_tool() -> str | None:
    if sys.platform == "win32":
        return "the kernels are not ported to Windows"
    if not shutil.which("cmake"):
        return "cmake is missing (pip install cmake ninja)"
    if not any(map(shutil.which, os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"])):
        return "a C++17 compiler is missing (install g++ or clang, or set CXX)"
    return None


def extensions() -> list[Extension]:
    mode = os.environ.get("FLATLORA_BUILD") or "auto"
    files = sources()
    if mode not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"FLATLORA_BUILD: expected auto, cpu, cuda or none, got {mode!r}")
    if mode == "none":
        return []
    if reason := missing_tool():
        if mode == "auto":
            print(f"flatlora_kernels: built without its compiled kernels, because {reason}", file=sys.stderr)
            return []
        sys.exit(f"FLATLORA_BUILD={mode}: {reason}")
    wanted = {"cpu": files["cpu"] + files["cpu-level"]}
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if mode == "cuda" and not nvcc:
        sys.exit("FLATLORA_BUILD=cuda: nvcc is missing; put it on PATH or set CUDACXX")
    if mode != "cpu":
        if nvcc:
            wanted["cuda"] = files["cuda"] + files["cuda-sm90a"]
        else:
            print(
                "flatlora_kernels: built without its CUDA kernels, because nvcc is missing", file=sys.stderr
            )
    depends = [*files["header"], "csrc/sources.txt", "CMakeLists.txt"]
    return [Extension(f"flatlora_kernels.lib.libflatlora_{n}", s, depends=depends) for n, s in wanted.items()]


class BuildLibraries(build_ext):
    """One CMake project; each extension is one of its targets and is loaded by ctypes, not imported."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + SUFFIX

    def run(self) -> None:
        # In a checkout this stays, so that building again after an edit compiles only what changed.
        self.cmake_folder = ROOT / "build/cmake"
        if self.inplace:  # setuptools clears it while it builds
            (ROOT / "flatlora_kernels/lib").mkdir(exist_ok=True)
        super().run()

    def build_extensions(self) -> None:
        output = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        targets = [extension.name.rpartition(".lib")[2] for extension in self.extensions]
        cuda = "flatlora_cuda" in targets
        configure = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DFLATLORA_BUILD={'cuda' if cuda else 'cpu'}",
        ]
        if ninja := shutil.which("ninja"):
            # Named, because under build isolation last time's ninja is gone.
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        parallel = os.environ.get("MAX_JOBS") or str(jobs(cuda))
        if not parallel.isdecimal() or int(parallel) < 1:
            sys.exit(f"MAX_JOBS: expected a whole number from 1, got {parallel!r}")
        configure = ["-S", str(ROOT), "-B", str(self.cmake_folder), *configure]
        if (self.cmake_folder / "CMakeCache.txt").exists():
            # A cache of another place, generator or compiler is of no use.
            if subprocess.run(["cmake", *configure], check=False).returncode:
                shutil.rmtree(self.cmake_folder)
        print(
            f"flatlora_kernels: compiling {' and '.join(targets)}, {parallel} processes at a time, about"
            f" {'ten minutes' if cuda else 'four minutes'} of a core; FLATLORA_BUILD=none leaves it out",
            file=sys.stderr,
            flush=True,
        )
        self.cmake(*configure)
        self.cmake("--build", str(self.cmake_folder), "--parallel", parallel, "--target", *targets)

    def cmake(self, *arguments: str) -> None:
        try:
            subprocess.run(["cmake", *arguments], check=True)
        except subprocess.CalledProcessError:
            without = " FLATLORA_BUILD=none installs without them"
            if len(self.extensions) > 1:
                without = " FLATLORA_BUILD=cpu leaves out those for GPUs," + without.replace("them", "any")
            sys.exit(
                "flatlora_kernels: the compiled kernels could not be built, see the output of cmake above;"
                + without
            )


class AnyPython(bdist_wheel):
    """Nothing in the libraries depends on the version of Python, nor on that of torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["flatlora_kernels", "flatlora_kernels.*"]),
        *(
            f"flatlora_kernels.{name}"
            for name in find_packages(include=["triton_kernels", "triton_kernels.*"])
        ),
    ],
    package_dir={"flatlora_kernels.triton_kernels": "triton_kernels"},
    package_data={"flatlora_kernels": ["py.typed", "choice/tables/*.csv"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython},
)
