"""The fuzzer's calls on a CPU library that is built with sanitizers: `make test-sanitized`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flatlora_kernels.backends import cpu

ROOT = Path(__file__).parent.parent.parent
BUILD = os.environ.get("FLATLORA_SANITIZED")  # a folder that has cpu-address and cpu-thread

SEED = os.environ.get("FLATLORA_FUZZ_SEED", "15")  # as in test_fuzz.py

pytestmark = pytest.mark.skipif(not BUILD, reason="needs libraries with sanitizers: make test-sanitized")


def _compiler_file(name: str) -> str:
    compiler = os.environ.get("CXX", "c++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def levels(sanitizer: str) -> list[str]:
    """The instruction sets that are compiled with it, the best one first.

    avx512bf16 is avx512 but for products of bfloat16. Which thread has which task is the same for all, so that for
    races the best one and the plain code will do.
    """
    if reason := cpu.unavailable():
        sys.exit(f"backend 'cpu': {reason}")
    here = cpu._load().levels  # type: ignore[union-attr]
    wanted = [level for level in here if level != "avx512" or "avx512bf16" not in here]
    return wanted if sanitizer == "address" else list(dict.fromkeys((wanted[0], wanted[-1])))


def fuzz(count: int, level: str, *arguments: str, **environment: str) -> None:
    """So many cases, others for each level."""
    first = count * levels("address").index(level)
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--first", str(first), "--cases", str(count), "--seed", SEED,
         "--level", level, *arguments],
        cwd=ROOT, capture_output=True, text=True, errors="replace", env={**os.environ, **environment},
    )  # fmt: skip
    print(run.stdout, run.stderr[:6000])
    assert run.returncode == 0, run.stdout


def each_level(run: Callable[[str], None]) -> None:
    """Two at a time: each is a process that mostly has one thread."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, levels("address")))


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The calls of some cases on the levels of each sanitizer."""
    folder = tmp_path_factory.mktemp("fuzz")
    each_level(lambda level: fuzz(40, level, "--trace", str(folder / level)))
    for name in ("address", "thread"):
        (folder / name).write_bytes(b"".join((folder / level).read_bytes() for level in levels(name)))
    return {name: folder / name for name in ("address", "thread")}


def replay(sanitizer: str, traces: dict[str, Path], *plant: str) -> subprocess.CompletedProcess[str]:
    program = ROOT / str(BUILD) / f"cpu-{sanitizer}" / "flatlora_cpu_replay"
    run = subprocess.run(
        [program, traces[sanitizer], *plant], capture_output=True, text=True, errors="replace",
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"},
    )  # fmt: skip
    print(run.stdout[-3000:], run.stderr[:6000])
    return run


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_no_report(sanitizer: str, traces: dict[str, Path]) -> None:
    assert replay(sanitizer, traces).returncode == 0


@pytest.mark.parametrize(
    "sanitizer, plant, report",
    [
        ("address", "read", "ERROR: AddressSanitizer"),
        ("address", "write", "ERROR: AddressSanitizer: heap-buffer-overflow"),
        ("thread", "race", "WARNING: ThreadSanitizer: data race"),
    ],
)
def test_what_is_planted_is_found(sanitizer: str, plant: str, report: str, traces: dict[str, Path]) -> None:
    run = replay(sanitizer, traces, plant)
    assert run.returncode != 0
    assert report in run.stderr


def test_whole_cases_with_address_sanitizer() -> None:
    """As torch calls the library, with torch's own memory for the outputs between red zones."""
    library = (ROOT / str(BUILD) / "cpu-address" / "libflatlora_cpu.so").resolve()
    preload = " ".join(_compiler_file(f"lib{name}.so") for name in ("asan", "ubsan"))
    options = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    each_level(lambda level: fuzz(20, level, "--library", str(library), **options))


if __name__ == "__main__":  # for the Makefile
    print(*levels(sys.argv[1]), sep=";")
