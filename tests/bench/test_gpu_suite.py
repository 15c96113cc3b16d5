"""bench/gpu_suite.sh, bench/gpu_pack.sh and what they run, without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu import tests as gpu_tests  # noqa: E402

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
pytestmark = pytest.mark.skipif(
    not shutil.which("bash") or not shutil.which("timeout"), reason="needs bash and timeout"
)

STAGES = {
    "truth": {"driver", "wrappers", "check", "time"},
    "correctness": {"cuda", "large", "triton"},
    "numbers": {
        "targets",
        "strategies-cuda",
        "strategies-triton",
        "quantized",
        "training-cuda",
        "training-triton",
    },
    "mixture": {"mixture"},
    "evidence": {"evidence"},
    "sanitizer": {"sanitizer"},
}
PARTS = set().union(*STAGES.values())
SANITIZERS = ("memcheck", "racecheck")  # dry


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
    return path


def suite(folder: Path, *arguments: str, python: Path | str = sys.executable, **variables: str) -> Any:
    """Exit status, first line of the summary, verdict of each part, files."""
    program(
        folder,
        "compute-sanitizer",
        'while [ $# -gt 1 ] && [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n',
    )
    out = folder / "out"
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(out), "OMP_NUM_THREADS": "1", **variables}
    environment["SUITE_PACK"] = str(folder / "none")
    environment.setdefault("SUITE_EVIDENCE", str(folder))
    environment["FLATLORA_EMULATED_WRAPPERS"] = str(folder)  # compiled once for the parts that have them
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", str(BENCH / "gpu_suite.sh"), *arguments],
        capture_output=True, text=True, timeout=150, env=environment,
    )  # fmt: skip
    assert (out / "summary.txt").exists(), done.stdout + done.stderr
    first, about, *lines = (out / "summary.txt").read_text().splitlines()
    parts = {line.split()[0]: line.split(" s: ", 1)[1] for line in lines}
    return done.returncode, first, parts, sorted(path.name for path in out.iterdir()), out


def needs_emulator() -> None:
    if not (ROOT / "build/emulator/libflatlora_cuda_emulated.so").exists():
        pytest.skip("needs the emulator: make emulator")


# --- every stage, dry ---


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_truth_and_sanitizer(tmp_path: Path) -> None:
    needs_emulator()
    status, first, parts, files, out = suite(tmp_path, "--dry-run", "truth", "sanitizer")
    log = (out / "suite.log").read_text()
    assert status == 0, log
    assert first == "nothing failed in what ran" and set(parts) == STAGES["truth"] | STAGES["sanitizer"]
    assert all(verdict.startswith("passed") for verdict in parts.values())
    assert files == "suite.log summary.txt truth-check.jsonl truth-time.jsonl wrappers.jsonl".split()
    assert "clusters of  2 with 200 KiB a block: 2 at once" in log
    for name in ("test_wgmma", "test_mma", "test_ldmatrix", "test_cp_async"):  # a line to each
        assert any(line.startswith("passed") and f"::{name}[" in line for line in log.splitlines()), name
    assert {row["family"] for row in rows(out / "truth-check.jsonl")} == {"cuda few", "cuda packed nf4"}
    assert {row["name"] for row in rows(out / "truth-time.jsonl")} == {"plain", "plain dX", "cuda y"}
    repeated = [int(line.split()[0]) for line in log.splitlines() if line.endswith("calls repeated, 0 wrong")]
    assert repeated == [repeated[0] - (tool == "racecheck") for tool in SANITIZERS] and repeated[0] > 40


@pytest.mark.slow
def test_correctness(tmp_path: Path) -> None:
    needs_emulator()
    status, first, parts, files, out = suite(tmp_path, "--dry-run", "correctness")
    assert status == 0, (out / "suite.log").read_text()
    assert set(parts) == STAGES["correctness"]
    assert files == "cuda.jsonl large.jsonl suite.log summary.txt triton.jsonl".split()
    for name, count in (("cuda", 16), ("large", 5), ("triton", 1)):
        assert [row["outcome"] for row in rows(out / f"{name}.jsonl")] == ["passed"] * count


@pytest.mark.slow
def test_numbers(tmp_path: Path) -> None:
    wanted = (
        "targets",
        "strategies-cuda",
        "quantized",
        "training-cuda",
        "mixture",
        "evidence",
    )  # the other two run what these do
    status, first, parts, files, out = suite(tmp_path, "--dry-run", *wanted)
    assert status == 0, (out / "suite.log").read_text()
    assert set(parts) == set(wanted)
    *timed, _ = wanted
    assert files == sorted([*(f"{name}.json" for name in timed), "suite.log", "summary.txt", "vit-rows.txt"])
    assert len((out / "vit-rows.txt").read_text().splitlines()) == 3  # names, head only, lora
    for name in timed:
        assert json.loads((out / f"{name}.json").read_text())["rows"], name
    packed = json.loads((out / "quantized.json").read_text())["rows"]
    assert {row["way"] for row in packed} >= {"dense", "op", "decode:cpu", "fused:cpu", "panel:cpu"}
    assert parts["quantized"].endswith(" cases, 0 failures")
    assert parts["mixture"].endswith(" 2 cases, 0 failures")


# --- how parts end: with a python that only says what it was asked for ---

FAKE = """
case "$*" in
  *get_device_name*) echo "NVIDIA Fake 1"; exit ;;
  *get_device_capability*) echo 9.0; exit ;;
esac
echo "ran: $*"
case "$*" in
  *${FAKE_BROKEN:-NONE}*) echo "it is broken"; exit 1 ;;
  *${FAKE_SLOW:-NONE}*) [ -z "${FAKE_FILE:-}" ] || echo '{"n": 1}' > "$OUT/$FAKE_FILE"; sleep 60 ;;
  *${FAKE_CUT:-NONE}*) exit 75 ;;
esac
"""


def fake(folder: Path, *arguments: str, **variables: str) -> Any:
    return suite(folder, *arguments, python=program(folder, "python", FAKE), **variables)


def test_all_stages_on_a_gpu(tmp_path: Path) -> None:
    status, first, parts, files, out = fake(tmp_path)
    assert status == 0 and first == "nothing failed in what ran"
    assert set(parts) == PARTS | {"setup"}
    assert all(verdict.startswith("passed") for verdict in parts.values())
    log = (out / "suite.log").read_text()
    assert "-m pip install --no-build-isolation --no-deps -e ." in log
    assert "--backend cuda,others -m gpu tests -k not two_to_the_31" in log
    assert (
        "--each 40 --limit 45 -m gpu tests/backends/test_gpu.py -k two_to_the_31" in log
    )  # one process, alone
    assert "training --budget 1 --providers plain lora peft inplace flatlora:triton --device cuda" in log
    assert "tune --strategies --quick --backends cuda --time-limit 25" in log
    assert "quantized --own --size 4096 --dtypes bfloat16 " in log
    assert "mixture --n 4096 --k 4096 " in log and "loop op:triton loop:triton --no-memory" in log
    assert "decode:cuda decode:triton fused:cuda fused:triton panel:cuda panel:triton --no-memory" in log
    assert "bench.truth check --each 60 --limit 80" in log


def test_a_failure_does_not_stop_the_rest(tmp_path: Path) -> None:
    status, first, parts, files, _ = fake(tmp_path, "truth", FAKE_BROKEN="bench.truth check")
    assert status == 1
    assert first.startswith("LOOK FIRST AT check ") and first.endswith("FAILED: it is broken")
    assert set(parts) == STAGES["truth"] | {"setup"}
    assert {name for name, verdict in parts.items() if not verdict.startswith("passed")} == {"check"}
    # A part that is repeated alone leaves the others' lines, and is no longer what to look at.
    status, first, parts, files, _ = fake(tmp_path, "check")
    assert status == 0 and first == "nothing failed in what ran"
    assert set(parts) == STAGES["truth"] | {"setup"}


def test_evidence_counts_as_far_as_it_ran(tmp_path: Path) -> None:
    status, first, parts, files, out = fake(
        tmp_path, "evidence", SUITE_SECONDS="8", FAKE_SLOW="examples/vit.py", FAKE_FILE="vit-rows.txt"
    )
    assert status == 0 and parts["evidence"].startswith("passed as far as its time went")
    assert "vit-rows.txt" in files
    log = (out / "suite.log").read_text()
    assert "--seeds 40 --backend cuda --device cuda --csv" in log
    missing = fake(tmp_path, "evidence", SUITE_EVIDENCE=str(tmp_path / "nowhere"))
    assert missing[0] == 0 and missing[2]["evidence"].startswith("skipped: no weights in ")


def test_without_a_build_nothing_else_runs(tmp_path: Path) -> None:
    status, first, parts, files, _ = fake(tmp_path, FAKE_BROKEN="pip install")
    assert status == 1 and first.startswith("LOOK FIRST AT setup ") and set(parts) == {"setup"}


def test_time_that_is_over(tmp_path: Path) -> None:
    """A part is ended at its limit and keeps its file; one for which no time is left is no failure."""
    start = time.monotonic()
    status, first, parts, files, out = fake(
        tmp_path, "numbers", "sanitizer",
        SUITE_SECONDS="8", FAKE_SLOW="bench run", FAKE_FILE="targets.json",
    )  # fmt: skip
    assert time.monotonic() - start < 20
    assert status == 1 and first.startswith("LOOK FIRST AT targets ")
    assert parts["targets"].startswith("ran out of its ")
    assert "targets.json" in files
    rest = {verdict for name, verdict in parts.items() if name not in ("setup", "targets")}
    assert rest == {"not run, no time left"}
    for variables in ({"SUITE_SECONDS": "2"}, {"FAKE_CUT": "gpu.tests"}):
        status, first, *_ = fake(tmp_path / next(iter(variables)), "correctness", **variables)
        assert status == 0 and first == "nothing failed in what ran"


def test_wrong_argument(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(BENCH / "gpu_suite.sh"), "trth"], capture_output=True, text=True)
    assert done.returncode == 2 and "got 'trth'" in done.stderr


# --- tests in processes that may die ---

BAD = """
import ctypes, os, pytest
@pytest.mark.parametrize("i", range(4))
def test_right(i): pass
def test_wrong(): assert 1 == 2
def test_cuda(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after(): pass
def test_hangs(): ctypes.CDLL(None).sleep(60)
def test_dies(): os.abort()
def test_skipped(): pytest.skip("why")
def test_last(): pass
"""


def run_tests(folder: Path, *arguments: str) -> tuple[int, str, list[dict[str, Any]]]:
    (folder / "test_bad.py").write_text(BAD)
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.tests", str(folder / "r.jsonl"), *arguments, str(folder / "test_bad.py")],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    return done.returncode, done.stdout, gpu_tests.read(folder / "r.jsonl")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_test_has_a_result(tmp_path: Path, workers: str) -> None:
    status, said, found = run_tests(tmp_path, "--workers", workers, "--each", "3")
    outcomes = {row["test"].partition("::")[2]: row["outcome"] for row in found}
    assert status == 1 and len(found) == len(outcomes) == 11
    assert {name for name, o in outcomes.items() if o == "failed"} == {
        "test_wrong", "test_cuda", "test_hangs", "test_dies",
    }  # fmt: skip
    assert outcomes["test_skipped"] == "skipped"
    texts = {row["test"].partition("::")[2]: row.get("text", "") for row in found}
    assert texts["test_hangs"] == "over its 3 s" and "ended with -6" in texts["test_dies"]
    assert "illegal memory access" in texts["test_cuda"]
    assert said.startswith("6 passed, 4 failed, 1 skipped; first: ")


def test_time_over_in_the_middle_of_tests(tmp_path: Path) -> None:
    status, said, found = run_tests(tmp_path, "--limit", "4", "-k", "right or hangs")
    assert status == gpu_tests.NO_TIME and [row["outcome"] for row in found] == ["passed"] * 4
    assert said.rstrip().endswith("no time left for the rest")


def test_no_test_is_a_failure(tmp_path: Path) -> None:
    status, said, found = run_tests(tmp_path, "-k", "nonesuch")
    assert status == 1 and said.startswith("no test was selected") and not found


# --- the pack, with compilers that compile nothing ---

NVCC = 'while [ "$1" != -o ]; do shift; done; echo wrappers > "$2"\n'
CMAKE = """for a in "$@"; do
  case $a in -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=*) mkdir -p "${a#*=}"; echo cuda > "${a#*=}/libflatlora_cuda.so" ;; esac
done
"""
# Compiles nothing and has a GPU; the parts of the suite do nothing, but for `check`, which lacks a kernel.
PACKING = """
case "$*" in
  *"bench.gpu.pack triton"*) mkdir -p "$TRITON_CACHE_DIR" && echo kernel > "$TRITON_CACHE_DIR/kernel${7%/*}" ;;
  *"bench.gpu.pack"*) shift 2
    exec REAL -c 'import sys, torch
from bench.gpu import pack
torch.cuda.get_device_capability = lambda: (9, 0)
sys.exit(pack.main())' "$@" ;;
  *get_device_name*) echo "NVIDIA Fake 1" ;;
  -c*) exec REAL "$@" ;;
  *"bench.truth check"*) echo kernel > "$TRITON_CACHE_DIR/missing" ;;&
  *) echo "ran: $*, $FLATLORA_WRAPPERS, BENCH_PROCESSES=${BENCH_PROCESSES:-}" ;;
esac
"""


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the tree, and the variables of the pack that is made in it."""
    triton = pytest.importorskip("triton")
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns("build", ".git", ".venv", "__pycache__", "results", "lib", "docs")
    shutil.copytree(ROOT, tree, ignore=left_out, symlinks=True)
    for name, text in (("nvcc", NVCC), ("cmake", CMAKE)):
        program(tmp_path, name, text)
    python = program(tmp_path, "python", PACKING.replace("REAL", sys.executable))
    variables = {
        **os.environ, "PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PACK_PYTHON": f"{sys.version_info[0]}.{sys.version_info[1]}", "PACK_TORCH": torch.__version__.split("+")[0],
        "PACK_TRITON": triton.__version__, "PACK_CACHE": str(tmp_path / "cache"), "OUT": str(tmp_path / "out"),
    }  # fmt: skip
    return tree, variables


def call(tree: Path, variables: dict[str, str], script: str, *arguments: str) -> Any:
    command = ["bash", f"bench/{script}", *arguments]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=100, env=variables)


def test_pack_and_suite(
    packed: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.gpu import pack

    tree, variables = packed
    done = call(tree, variables, "gpu_pack.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench/gpu_suite.sh truth" in done.stdout and " MiB. On the GPU's machine" in done.stdout
    folder = tree / "build/gpu-pack"
    names = {path.name for path in folder.iterdir()}
    assert names == {"libflatlora_cuda.so", "wrappers.so", "triton.tar.xz", "pack.json"}

    cache = Path(variables["PACK_CACHE"])
    shutil.rmtree(cache)
    done = call(tree, variables, "gpu_suite.sh", "truth")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 entries in Triton's cache" in done.stdout
    assert {path.name for path in cache.iterdir()} == {"kernel0", "kernel1", "missing"}
    assert done.stdout.count("; new in Triton's cache: 1") == 2  # and in the summary
    assert (tree / "flatlora_kernels/lib/libflatlora_cuda.so").read_text() == "cuda\n"
    log = (Path(variables["OUT"]) / "suite.log").read_text()
    assert "bench.truth check --each 30 " in log and f"{folder}/wrappers.so, BENCH_PROCESSES=0" in log
    assert "pip install" not in log

    # Another Triton there: said in the first lines, and no obstacle.
    seal = json.loads((folder / "pack.json").read_text())
    (folder / "pack.json").write_text(json.dumps({**seal, "triton_key": "another"}))
    done = call(tree, variables, "gpu_suite.sh", "truth")
    assert done.returncode == 0 and "Triton compiles its kernels here" in done.stdout.splitlines()[0]

    shutil.rmtree(variables["OUT"])
    (folder / "pack.json").write_text(json.dumps({**seal, "arch": "8.0"}))
    done = call(tree, variables, "gpu_suite.sh", "truth")
    said = done.stdout.splitlines()[0]
    assert done.returncode == 1 and "is for compute capability 8.0" in said and "check" not in done.stdout

    (folder / "pack.json").write_text(json.dumps({**seal, "sources": "x"}))
    monkeypatch.setenv("TRITON_CACHE_DIR", variables["PACK_CACHE"])
    capsys.readouterr()
    assert pack.unpack(folder) == 1 and "was built from other sources" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_the_pack_compiles_what_the_suite_calls(tmp_path: Path) -> None:
    """A few of the calls; one that fails leaves its kernels to the GPU's machine."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.gpu.pack", "triton", "--arch", "9.0", "--part", "20/5760"]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0 and " 0 calls failed" in done.stdout, done.stdout + done.stderr


def test_pack_wants_the_versions_of_the_other_machine(packed: tuple[Path, dict[str, str]]) -> None:
    tree, variables = packed
    done = call(tree, {**variables, "PACK_TRITON": "3.0"}, "gpu_pack.sh")
    assert (
        done.returncode == 2 and "expected Python, torch, Triton" in done.stderr and " 3.0 (" in done.stderr
    )
