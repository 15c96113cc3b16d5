"""From a call of backend `triton` to the driver, which does nothing here (nodriver.py); test_triton_compile.py launches
every shipped configuration."""

from __future__ import annotations

import importlib
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import nodriver
import pytest
import torch
from packed_weights import packed
from targets import INTERPRETED, REQUIRED, randn
from torch import Tensor

from flatlora_kernels import backends
from flatlora_kernels.core.records import Draw, Product

if "triton" in REQUIRED:
    import triton  # noqa: F401
else:
    pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

from flatlora_kernels.triton_kernels import launch  # noqa: E402

TRITON = backends.get("triton")
# Each has one kernel.
MODULES = (
    "forward",
    "input_grad",
    "perturb",
    "row_norms",
    "transform",
    "split",
    "adapter_grads",
    "expert_grads",
)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[nodriver.NoDriver]:
    with nodriver.active("sm90", monkeypatch) as found:
        yield found


def operands(M: int, N: int, K: int, device: str = "cpu") -> tuple[Tensor, Tensor, Draw]:
    def made(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    draw = Draw(made(N, dtype=torch.float32), made(1, dtype=torch.int64)[0], stream=5, sample_offset=2)
    return made(M, K), made(N, K), draw


def forward(x: Tensor, weight: Tensor, draw: Draw) -> Tensor:
    return TRITON.product(Product(x, weight), draw, "folded")


def test_a_call_passes_its_own_tensors_and_numbers(driver: nodriver.NoDriver) -> None:
    launched = []
    for number in range(3):
        x, weight, draw = operands(16, 64, 64)
        draw = draw._replace(stream=number + (number == 2) * 2**31, sample_offset=7 * number)
        y = forward(x, weight, draw)
        given = [t.data_ptr() for t in (x, weight, draw.noise_scale, draw.seed, y)]
        found = driver.values(8)
        assert found[:5] == given and found[6:] == [draw.stream, draw.sample_offset]
        assert driver.grid == (1, 1, 1) and driver.stream == nodriver.STREAM
        launched.append(driver.launches)
    assert launched[2] == launched[0] + 2


def test_a_packed_weight_passes_its_parts(driver: nodriver.NoDriver) -> None:
    """Views of one weight share their kernel where nothing of it differs, and each call passes its own."""
    for _ in range(2):
        x, _, draw = operands(16, 64, 64)
        weight = packed("nf4_nested", 64, 64, torch.bfloat16)
        for start in (16, 32):
            y = TRITON.product(
                Product(x, weight.narrow(0, start, 16)),
                draw._replace(noise_scale=draw.noise_scale[:16]),
                "folded",
            )
            t = weight.parts
            given = [p.data_ptr() for p in (x, t.codes, t.table, t.scale, t.scale_table, t.nested, t.offset)]
            assert driver.values(8)[:7] == given
            assert driver.values(8)[7] & 0xFFFFFFFF == start
            assert y.shape == (16, 16)


def test_a_mixture_passes_its_offsets(driver: nodriver.NoDriver) -> None:
    """In the second call, too, which goes straight to the machine code."""
    E, launched = 3, []
    for _ in range(3):
        x, weight, draw = operands(16, 64, 64)
        weight = weight.expand(E, 64, 64).contiguous()
        draw = draw._replace(noise_scale=torch.empty(E, 64))
        ends = torch.full((E,), 16)
        y = TRITON.product(Product(x, weight, offsets=ends), draw, "folded")
        found = driver.values(9)
        assert found[:3] == [x.data_ptr(), weight.data_ptr(), ends.data_ptr()]
        assert [value & 0xFFFFFFFF for value in found[3:5]] == [E, 64 * 64]
        assert driver.grid == (E, 1, 1) and y.shape == (16, 64)
        out = torch.empty(E, 64, 64)
        TRITON.expert_grads(y, x, ends, 1.0, out)
        given = [t.data_ptr() for t in (y, x, ends, out)]
        assert driver.values(4) == given and driver.grid[1] == E
        launched.append(driver.launches)
    assert launched[2] == launched[1] + 2


def test_what_selects_machine_code_is_never_reused(driver: nodriver.NoDriver) -> None:
    """Each of these differs from all others in what the code depends on."""
    x, weight, draw = operands(16, 64, 72)
    seen: dict[str, Any] = {}

    def run(name: str, x: Tensor, weight: Tensor, draw: Draw) -> None:
        with launch.instead(lambda kernel, arguments, compile: seen.__setitem__(name, arguments)):
            forward(x, weight, draw)

    run("first", x, weight, draw)
    run("antithetic", x, weight, draw._replace(antithetic=True))
    run("rademacher", x, weight, draw._replace(noise="rademacher"))
    run("within a word", x, weight, draw._replace(noise="rademacher", row_offset=2))
    run("near_gaussian", x, weight, draw._replace(noise="near_gaussian"))
    run("within a unit", x, weight, draw._replace(noise="near_gaussian", col_offset=8))
    run("columns", x, randn(72, 64, dtype=torch.bfloat16).t(), draw)
    run("shifted", torch.empty(16 * 72 + 1, dtype=torch.bfloat16)[1:].view(16, 72), weight, draw)
    run("again", x.clone(), weight, draw)
    constants = ("PACKED", "DRAW", "CUT", "stride_wn")
    for layout in ("nf4", "int8", "fp8", "nf4_nested", "mxfp4"):
        run(layout, x, packed(layout, 64, 72, torch.bfloat16), draw)
    run("a shard of columns", x[:, :40], packed("nf4", 64, 128, torch.bfloat16).narrow(1, 8, 40), draw)
    kinds = {name: tuple(a[c] for c in constants) for name, a in seen.items()}
    assert kinds.pop("again") == kinds["first"]
    run("in rows of a unit", x, weight, draw._replace(noise="near_gaussian", row_offset=8))
    assert seen["in rows of a unit"]["DRAW"] == seen["within a unit"]["DRAW"]
    assert len(set(kinds.values())) == len(kinds)


def test_a_backward_stays_in_the_thread_that_launches_nothing() -> None:
    """On a GPU autograd has a thread for each device, which would launch."""
    assert torch._C._is_multithreading_enabled()
    with launch.instead(lambda kernel, arguments, compile: None):
        assert not torch._C._is_multithreading_enabled()
    assert torch._C._is_multithreading_enabled()


def test_keys_do_not_depend_on_which_kernel_comes_first() -> None:
    """A process finds in Triton's cache on disk what another one compiled."""
    modules = [importlib.import_module(f"{launch.__package__}.{name}") for name in MODULES]
    functions = {
        id(f): f for module in modules for f in vars(module).values() if hasattr(type(f), "cache_key")
    }
    kernels = [f for f in functions.values() if re.fullmatch(r"_\w+_kernel", f.__name__)]
    assert len(kernels) == len(MODULES)
    found = set()
    for seed in range(8):
        for function in functions.values():
            function.hash, function.used_global_vals = None, {}  # as in a new process
        launch._hashed.clear()
        for kernel in random.Random(seed).sample(kernels, len(kernels)):
            launch.Kernel(kernel, (1,), torch.empty(1), {}, {})
            kernel.cache_key  # noqa: B018
        found.add(tuple(kernel.cache_key for kernel in kernels))
    assert len(found) == 1


def variant(kernel: Any, arguments: dict[str, Any]) -> str:
    """By what Triton finds machine code: the same text, the same code."""
    binder = kernel.device_caches[nodriver.index("sm90")][4]
    _, specialization, options = binder(**arguments)
    return f"{kernel.__name__} {specialization} {options}"


def test_lengths_of_sequences_share_their_kernels(driver: nodriver.NoDriver) -> None:
    found: set[str] = set()

    def note(kernel: Any, arguments: dict[str, Any], compile: Callable[[], Any]) -> None:
        found.add(variant(kernel, arguments))

    lengths = random.Random(0)
    with launch.instead(note):
        for _ in range(200):
            x, weight, draw = operands(lengths.randint(1, 4096), 1024, 4096, "meta")
            # Numbers that Triton by itself would take for constants, or for multiples of 16.
            forward(x, weight, draw._replace(stream=lengths.choice((0, 1, 7, 16)), row_offset=4 * len(found)))
    sums = [text for text in found if text.startswith("_add_splits")]
    assert len(sums) == 1
    assert len(found) - len(sums) <= 8  # five tiles, three of them with a split contraction too


def median_us(run: Callable[[], object], rounds: int = 9, calls: int = 100) -> float:
    for _ in range(10):
        run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def test_host_time(driver: nodriver.NoDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints microseconds of a call: `python -m pytest -s -k host_time tests/triton_kernels/test_launch_path.py`."""
    x, weight, draw = operands(16, 64, 64)
    by_search, direct = [], []
    for _ in range(3):
        direct.append(median_us(lambda: forward(x, weight, draw)))
        with monkeypatch.context() as patch:
            # What it would be if Triton looked for the kernel again.
            patch.setattr(
                launch.Kernel, "run", property(lambda self: None, lambda self, run: None), raising=False
            )
            launch.forget()
            by_search.append(median_us(lambda: forward(x, weight, draw)))
        launch.forget()
    x32, w32 = x.float(), weight.float()
    plain = median_us(lambda: torch.nn.functional.linear(x32, w32))
    rest = (0, "gaussian", 1, 0, False, 0, 0, 0, "fused", "folded", "triton")
    op = median_us(
        lambda: torch.ops.flatlora.linear(
            x, weight, None, None, None, None, 1.0, draw.noise_scale, draw.seed, *rest
        )
    )
    print(
        f"\nforward {min(direct):.1f} us, by Triton's search {min(by_search):.1f}; with torch's dispatch {op:.1f}"
    )
    print(f"F.linear {plain:.1f} us")
    assert min(direct) < 0.6 * min(by_search)
