"""Peak memory: a fused backend allocates nothing of the weight's size, forward or backward, in any layout.

A process of its own lets the kernel count: the high-water mark of resident memory is reset after the tensors
exist and read after forward and backward. Each is a fork of one that has only imported torch, which takes longer
than most of what is measured.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_weights import packed
from targets import Target

from flatlora_kernels.backends.shared.products import has_amx
from flatlora_kernels.choice import resolve

MIB = 1 << 20
PACKED = ("nf4_nested", "gptq")
ROWS, RANK = 64, 16
# What is not the op's: pages of code touched for the first time, stacks of threads, the allocator's rounding.
SLACK = 4 * MIB
# What torch's product of bfloat16 takes for itself on AMX, of a weight of any size (4.5 MiB were seen).
VENDOR = 5 * MIB if has_amx() else 0
CLEAR = Path("/proc/self/clear_refs")
Measure = Callable[..., dict[str, int]]


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def noise_for(strategy: str) -> str:
    return "hadamard" if strategy == "transform" else "gaussian"


def measure(backend: str, dtype_name: str, N: int, K: int, layout: str, provider: str) -> dict[str, int]:
    """In the child: growth of the peak over one forward and backward pass, and what a pass must hold."""
    import flatlora_kernels as fk

    dtype = getattr(torch, dtype_name)

    def layer(N: int, K: int) -> tuple[torch.Tensor, ...]:
        weight = torch.full((K, N) if layout == "column_major" else (N, K), 0.01, dtype=dtype)
        x, A, B = (torch.randn(*s, dtype=dtype).requires_grad_() for s in ((ROWS, K), (RANK, K), (N, RANK)))
        weight = weight if layout != "column_major" else weight.t()
        if layout in PACKED:
            weight = packed(layout, N, K, dtype)
        return x, weight, A, B, torch.randn(ROWS, N, dtype=dtype)

    def step(x, weight, A, B, grad_y):  # type: ignore[no-untyped-def]
        if provider != "perturb":
            y = fk.fused_flat_lora_linear(
                x,
                weight,
                A,
                B,
                sigma=0.1,
                seed=3,
                noise=noise_for(provider),
                strategy=provider,
                backend=backend,
            )
        else:  # one pass, then a plain product
            scale = fk.flat_noise_scale(weight, A, B, sigma=0.1, backend=backend)
            perturbed = fk.perturb_weight(weight, scale, seed=3, backend=backend)
            y = torch.nn.functional.linear(x, perturbed) + (x @ A.t()) @ B.t()
        return y, *torch.autograd.grad(y, (x, A, B), grad_y)

    step(*layer(256, 384))
    arguments = layer(N, K)
    CLEAR.write_text("5")
    before = resident("VmHWM")
    results = step(*arguments)
    growth = resident("VmHWM") - before
    held = sum(t.numel() * t.element_size() for t in results)
    # u and v (M x r); in 16 bits also the float32 sums of y and dX, of which one is alive at a time
    held += 2 * ROWS * RANK * 4 + (max(N, K) * ROWS * 4 if dtype.itemsize == 2 else 0)
    return {"growth": growth, "held": held, "weight": N * K * dtype.itemsize}


def serve() -> None:
    """Answers each line of stdin, the arguments of `measure`, from a fork of its own; null where that ended badly."""
    import flatlora_kernels  # noqa: F401

    for line in sys.stdin:
        if (child := os.fork()) == 0:
            signal.alarm(300)
            print(json.dumps(measure(*json.loads(line))), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print("null", flush=True)


@pytest.fixture(scope="module")
def in_child() -> Iterator[Measure]:
    """`measure` in a new process."""
    root = Path(__file__).parents[2]
    server = subprocess.Popen(
        [sys.executable, __file__], cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"},
    )  # fmt: skip

    def ask(*arguments: Any) -> dict[str, int]:
        assert server.stdin and server.stdout
        server.stdin.write(json.dumps(arguments) + "\n")
        server.stdin.flush()
        found = json.loads(server.stdout.readline() or "null")
        assert found, f"measuring {arguments} failed"
        return found

    yield ask
    server.communicate(timeout=60)


def excess(found: dict[str, int]) -> int:
    """Bytes beyond what docs/api.md allows."""
    workspace = min(16 * MIB, found["weight"] // 4)
    return found["growth"] - found["held"] - workspace - SLACK - VENDOR


pytestmark = pytest.mark.skipif(not CLEAR.exists(), reason="needs Linux's /proc/self/clear_refs")


@pytest.mark.parametrize(
    ("name", "N", "K", "layout"),
    [
        ("float32", 8192, 4096, "row_major"),
        ("float32", 8192, 4096, "column_major"),
        ("float32", 1024, 16384, "row_major"),
        ("bfloat16", 8192, 4096, "column_major"),
        ("float16", 8192, 4096, "row_major"),
    ],
)
@pytest.mark.parametrize("strategy", resolve.STRATEGIES)
def test_workspace_is_bounded(
    in_child: Measure, target: Target, name: str, N: int, K: int, layout: str, strategy: str
) -> None:
    if target.backend == "reference" or target.device != "cpu":
        pytest.skip("the bound is for fused backends; GPU memory is counted in another test")
    found = in_child(target.backend, name, N, K, layout, strategy)
    assert found["weight"] >= 64 * MIB
    assert excess(found) <= 0, {k: f"{v / MIB:.1f} MiB" for k, v in found.items()}


@pytest.mark.parametrize("strategy", resolve.STRATEGIES)
def test_small_weight(in_child: Measure, target: Target, strategy: str) -> None:
    """A quarter of the weight where that is the smaller."""
    if target.backend == "reference" or target.device != "cpu":
        pytest.skip("the bound is for fused backends; GPU memory is counted in another test")
    found = in_child(target.backend, "float32", 2048, 2048, "row_major", strategy)
    assert excess(found) <= 0, {k: f"{v / MIB:.1f} MiB" for k, v in found.items()}


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("strategy", resolve.STRATEGIES)
def test_packed_weight(in_child: Measure, target: Target, layout: str, strategy: str) -> None:
    """No more than of a weight of these values, which are never in memory together."""
    if target.backend == "reference" or target.device != "cpu":
        pytest.skip("the bound is for fused backends; GPU memory is counted in another test")
    found = in_child(target.backend, "bfloat16", 8192, 4096, layout, strategy)
    assert excess(found) <= 0, {k: f"{v / MIB:.1f} MiB" for k, v in found.items()}


def test_reference_exceeds_the_bound(in_child: Measure) -> None:
    """Control: the measurement sees a backend that materialises."""
    assert excess(in_child("reference", "float32", 2048, 2048, "row_major", "fused")) > 0


@pytest.mark.parametrize("layout", ["row_major", "column_major"])
def test_perturbing_first_exceeds_the_bound(in_child: Measure, target: Target, layout: str) -> None:
    """Control: so is the mildest offence, one W + eps for the length of a pass."""
    if target.backend == "reference" or target.device != "cpu":
        pytest.skip("host memory of fused backends")
    found = in_child(target.backend, "float32", 8192, 4096, layout, "perturb")
    assert excess(found) > 90 * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", ["row_major", "column_major"])
@pytest.mark.parametrize("strategy", resolve.STRATEGIES)
def test_workspace_on_a_gpu(target: Target, layout: str, strategy: str) -> None:
    if target.device != "cuda" or target.backend == "reference":
        pytest.skip("GPU memory of fused backends")
    N, K = 8192, 8192
    place = {"dtype": torch.bfloat16, "device": "cuda"}
    weight = torch.full((N, K), 0.01, **place)
    weight = weight if layout == "row_major" else weight.t().contiguous().t()
    x, A, B = (torch.randn(*s, **place).requires_grad_() for s in ((ROWS, K), (RANK, K), (N, RANK)))
    grad_y = torch.randn(ROWS, N, **place)
    for _ in range(2):  # the first time also pays for libraries
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = target.linear(x, weight, A, B, sigma=0.1, seed=3, noise=noise_for(strategy), strategy=strategy)
        results = (y, *torch.autograd.grad(y, (x, A, B), grad_y))
        torch.cuda.synchronize()
        growth = torch.cuda.max_memory_allocated() - before
        held = sum(t.numel() * t.element_size() for t in results) + ROWS * K * 4
        del y, results
    assert growth <= held + 16 * MIB + MIB


if __name__ == "__main__":
    serve()
