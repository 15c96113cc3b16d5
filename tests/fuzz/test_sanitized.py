"""The fuzzer's calls on a CPU library that is built with sanitizers: `make test-sanitized`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BUILD = os.environ.get("FLATLORA_SANITIZED")  # a folder that has cpu-address and cpu-thread

SEED = os.environ.get("FLATLORA_FUZZ_SEED", "15")  # as in test_fuzz.py

pytestmark = pytest.mark.skipif(not BUILD, reason="needs libraries with sanitizers: make test-sanitized")


def _compiler_file(name: str) -> str:
    compiler = os.environ.get("CXX", "c++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "calls"
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--cases", "120", "--seed", SEED, "--trace", str(path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    print(run.stdout, run.stderr)
    assert run.returncode == 0, run.stdout
    return path


def replay(sanitizer: str, trace: Path, *plant: str) -> subprocess.CompletedProcess[str]:
    program = ROOT / str(BUILD) / f"cpu-{sanitizer}" / "flatlora_cpu_replay"
    run = subprocess.run(
        [program, trace, *plant], capture_output=True, text=True, errors="replace",
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"},
    )  # fmt: skip
    print(run.stdout[-3000:], run.stderr[:6000])
    return run


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_no_report(sanitizer: str, trace: Path) -> None:
    assert replay(sanitizer, trace).returncode == 0


@pytest.mark.parametrize(
    "sanitizer, plant, report",
    [
        ("address", "read", "ERROR: AddressSanitizer"),
        ("address", "write", "ERROR: AddressSanitizer: heap-buffer-overflow"),
        ("thread", "race", "WARNING: ThreadSanitizer: data race"),
    ],
)
def test_what_is_planted_is_found(sanitizer: str, plant: str, report: str, trace: Path) -> None:
    run = replay(sanitizer, trace, plant)
    assert run.returncode != 0
    assert report in run.stderr


def test_whole_cases_with_address_sanitizer() -> None:
    """As torch calls the library, with torch's own memory for the outputs between red zones."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--cases", "60", "--seed", SEED, "--library",
         str((ROOT / str(BUILD) / "cpu-address" / "libflatlora_cpu.so").resolve())],
        cwd=ROOT, capture_output=True, text=True, errors="replace",
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(_compiler_file(f"lib{name}.so") for name in ("asan", "ubsan")),
            "ASAN_OPTIONS": "detect_leaks=0",
        },
    )  # fmt: skip
    print(run.stdout, run.stderr[:6000])
    assert run.returncode == 0, run.stdout
