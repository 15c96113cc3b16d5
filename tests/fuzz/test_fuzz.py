"""200 random cases, and whether the fuzzer finds what it is for. FLATLORA_FUZZ_SEED repeats a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flatlora_kernels import backends

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
from tests.fuzz import cases, memory  # noqa: E402

WRONG = {
    # A mistake, planted into the process that runs cases, what the fuzzer must say, and of seed 4 the first case and
    # the number of some that show it more than once.
    "an output too few": (
        "import flatlora_kernels.backends.cpu as cpu\n"
        "product = cpu.product\n"
        "def wrong(p, draw, how):\n"
        "    y = product(p, draw, how)\n"
        "    return y.index_fill_(1, __import__('torch').tensor([y.shape[1] - 1]), 0) if y.numel() else y\n"
        "cpu.product = wrong\n",
        ("max error", "other bits"),
        (2, 8),
    ),
    "an input that is written to": (
        "import flatlora_kernels.backends.cpu as cpu\n"
        "product = cpu.product\n"
        "def wrong(p, draw, how):\n"
        "    y = product(p, draw, how)\n"
        "    p.a[-1:, -1:] += 1\n"
        "    return y\n"
        "cpu.product = wrong\n",
        ("an input was written to", "max error", "other bits"),
        (16, 8),
    ),
    "NaN for infinity": (
        "import flatlora_kernels.backends.cpu as cpu\n"
        "product = cpu.product\n"
        "def wrong(p, draw, how):\n"
        "    y = product(p, draw, how)\n"
        "    return y.masked_fill(y.isinf(), float('nan'))\n"
        "cpu.product = wrong\n",
        ("nan, where the formula gives inf", "nan, where the formula gives -inf"),
        (25, 13),
    ),
    "a byte beyond the weight": (
        "import ctypes\n"
        "import flatlora_kernels.backends.cpu as cpu\n"
        "norms = cpu.row_sq_norms\n"
        "def wrong(weight, *rest):\n"
        "    if hasattr(weight, 'data_ptr'):\n"
        "        last = sum((n - 1) * s for n, s in zip(weight.shape, weight.stride()))\n"
        "        ctypes.string_at(weight.data_ptr() + (last + 1) * weight.element_size(), 1)\n"
        "    return norms(weight, *rest)\n"
        "cpu.row_sq_norms = wrong\n",
        ("the process ended: SIGSEGV",),
        (3, 2),
    ),
    "another scale of the last block": (
        "import flatlora_kernels.backends.cpu as cpu\n"
        "from flatlora_kernels import QuantizedWeight\n"
        "perturb = cpu.perturb\n"
        "def wrong(weight, draw, out):\n"
        "    if isinstance(weight, QuantizedWeight):\n"
        "        scale = weight.parts.scale.clone()\n"
        "        scale[-1:] = 1\n"
        "        weight = QuantizedWeight(weight.packing, weight.parts._replace(scale=scale))\n"
        "    perturb(weight, draw, out)\n"
        "cpu.perturb = wrong\n",
        ("the decoded weight: ",),
        (0, 8),
    ),
    "a byte beyond the codes": (
        "import ctypes\n"
        "import flatlora_kernels.backends.cpu as cpu\n"
        "norms = cpu.row_sq_norms\n"
        "def wrong(weight, *rest):\n"
        "    if not hasattr(weight, 'data_ptr'):\n"
        "        codes = weight.parts.codes\n"
        "        ctypes.string_at(codes.data_ptr() + codes.numel(), 1)\n"
        "    return norms(weight, *rest)\n"
        "cpu.row_sq_norms = wrong\n",
        ("the process ended: SIGSEGV",),
        (0, 2),
    ),
}


# One seed, so that a run says something of the code alone; `make fuzz` takes a fresh one.
SEED = os.environ.get("FLATLORA_FUZZ_SEED", "15")


def fuzz(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def check(run: subprocess.CompletedProcess[str]) -> None:
    print(run.stdout, run.stderr)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"


@pytest.mark.slow
def test_cpu() -> None:
    if reason := backends.unavailable("cpu"):
        pytest.skip(f"backend 'cpu': {reason}")
    check(fuzz("--cases", "200", "--seed", SEED))


def test_reference() -> None:
    check(fuzz("--cases", "20", "--seed", SEED, "--backend", "reference"))


@pytest.mark.interpreter
def test_triton() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1: make test-interpreter")
    check(fuzz("--cases", "20", "--seed", SEED, "--backend", "triton"))


@pytest.mark.emulator
def test_cuda() -> None:
    if not os.environ.get("FLATLORA_EMULATE"):
        pytest.skip("the emulator's: make test-emulator")
    check(fuzz("--cases", "20", "--seed", SEED, "--backend", "cuda"))


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_found(name: str, tmp_path: Path) -> None:
    """And the line that repeats the case is printed; after a crash, the next case is tried."""
    if reason := backends.unavailable("cpu"):
        pytest.skip(f"backend 'cpu': {reason}")
    mistake, messages, (first, count) = WRONG[name]
    lines = [f"    {line}" for line in mistake.splitlines()]
    begin = ["import sys", "if '--child' in sys.orig_argv:", f"    sys.path.insert(0, {str(ROOT)!r})"]
    (tmp_path / "sitecustomize.py").write_text("\n".join([*begin, *lines]))
    level = backends.get("cpu").level()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    few = ("--first", str(first), "--cases", str(count))  # each crash starts a process anew
    run = fuzz(*few, "--seed", "4", "--level", level, PYTHONPATH=path)
    print(run.stdout, run.stderr)
    assert run.returncode == 1
    assert "FAILED: python -m tests.fuzz --seed 4 --case " in run.stdout
    assert run.stdout.count("FAILED: ") > 1
    assert any(message in run.stdout for message in messages)


def test_cases_are_the_same_again() -> None:
    for number in range(20):
        one, other = (cases.build(cases.make(3, number, "cpu")) for _ in range(2))
        assert str(cases.make(3, number, "cpu")) == str(cases.make(3, number, "cpu"))
        for name, t in one.memory.items():
            assert memory.same_bits(t, other.memory[name]), name


@pytest.mark.parametrize("where", memory.PLACES)
@pytest.mark.parametrize("layout", memory.LAYOUTS)
def test_layouts(layout: str, where: str) -> None:
    values = torch.randn(3, 7, 5)
    if layout == "expanded":
        values = values[:, :1].expand(3, 7, 5)
    placed, around = memory.place(values.contiguous(), layout, 1, 3 if where == "heap" else 0, where)
    assert torch.equal(placed, values)
    page, begin = 4096, placed.data_ptr()
    end = begin + 4 * (1 + sum((n - 1) * s for n, s in zip(placed.shape, placed.stride(), strict=True)))
    assert {
        "heap": begin - around.data_ptr() == 12,
        memory.PLACES[1]: end % page == 0,
        memory.PLACES[2]: begin % page == 0,
    }[where]
