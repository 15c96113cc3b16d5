"""The backends for GPUs on a GPU: what the shared tests cannot see, or see at small sizes only.

With TRITON_INTERPRET=1 or FLATLORA_EMULATE=1 the same bodies run on the CPU at smaller sizes, on the backend that then
takes tensors there, in place of what a CPU does not have: a graph's replay is then a call, another stream is none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import compare
import pytest
import targets
import torch
from compare import problem
from targets import Target, randn
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels import backends
from flatlora_kernels.choice import resolve
from flatlora_kernels.core import noise as oracle
from flatlora_kernels.core.records import Draw, Product

MIB = 1 << 20

BACKENDS = [pytest.param((name, "cuda"), marks=pytest.mark.gpu, id=name) for name in ("triton", "cuda")]
if targets.INTERPRETED:
    BACKENDS = [pytest.param(("triton", "cpu"), marks=pytest.mark.interpreter, id="interpreter")]
elif targets.EMULATED:
    BACKENDS = [pytest.param(("cuda", "cpu"), marks=pytest.mark.emulator, id="emulator")]


@pytest.fixture(params=BACKENDS)
def gpu(request: pytest.FixtureRequest) -> Target:
    return targets.ready(Target(*request.param))


@pytest.fixture(autouse=True)
def strategy(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels of the backend, not what would be chosen; PANELS asks for both."""
    asked = getattr(request, "param", "fused")
    callspec = getattr(request.node, "callspec", None)
    hadamard = callspec is not None and callspec.params.get("noise") == "hadamard"
    if asked == "fused" and hadamard:
        asked = "transform"  # GPUs have no fused product with it
    elif asked == "transform" and not hadamard:
        pytest.skip("a transform is of hadamard noise alone")
    if asked == "panel" and (targets.INTERPRETED or targets.EMULATED):
        pytest.skip("test_panel.py: without a GPU nothing more is to be seen here")
    with fk.use_strategy(asked):
        yield


PANELS = pytest.mark.parametrize("strategy", resolve.STRATEGIES, indirect=True)


@pytest.fixture
def precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def size(device: str, on_gpu: int, on_cpu: int) -> int:
    return on_gpu if device == "cuda" else on_cpu


def rows_for(device: str, rows: int) -> int:
    """`rows`, which on a CPU are the few of one tile or one more, each number once."""
    if device == "cuda":
        return rows
    if rows not in (1, 16, 17, 300):
        pytest.skip("one number of rows for all tiles that are too large for a CPU")
    return min(rows, 20)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DRAWS = [
    {"seed": 0},
    {"seed": 2**63 + 5, "stream": 2**32 - 1, "sample": 2**32 - 1, "row_offset": 5, "col_offset": 24},
    {"seed": -1, "stream": 2**31, "sample": 3, "row_offset": 2**32 - 400, "col_offset": 2**32 - 1024},
    {"seed": 2**32, "row_offset": 16, "col_offset": 2**31, "antithetic": True, "sample": 7},
]


@pytest.mark.parametrize("draw", DRAWS, ids=str)
def test_noise_is_that_of_the_cpu(gpu: Target, noise: str, draw: dict[str, Any]) -> None:
    other = "reference" if backends.unavailable("cpu") else "cpu"
    rows, cols = size(gpu.device, 333, 67), size(gpu.device, 1000, 132)
    scale = torch.ones(rows)
    if noise == "hadamard":
        draw = draw | {"layer_shape": (2**32, 2**32)}
    expected = fk.materialize_noise(scale, cols, noise=noise, backend=other, **draw)
    got = fk.materialize_noise(scale.to(gpu.device), cols, noise=noise, backend=gpu.backend, **draw).cpu()
    if noise != "gaussian":
        assert torch.equal(got, expected)
    else:
        assert (got - expected).abs().max() <= 1e-4
        assert not torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 48, 128, 300, 2048])
def test_forward_and_input_grad_see_the_noise_that_is_materialised(
    gpu: Target, dtype: torch.dtype, noise: str, rows: int, precision: Callable[[str], None]
) -> None:
    """Rows of the identity read W + eps out of either product, every bit of it."""
    precision("highest")
    device = gpu.device
    N, K = size(device, 520, 72), size(device, 776, 104)
    rows = min(rows, size(device, 2048, 80))
    weight = (randn(N, K, seed=1) / 10).to(dtype).to(device)
    scale = (0.01 + torch.rand(N, generator=targets.generator(2)) / 10).to(device)
    draw = {
        "seed": torch.tensor(77, device=device),
        "stream": 3,
        "noise": noise,
        "row_offset": 5,
        "col_offset": 8,
    }
    perturbed = fk.perturb_weight(weight, scale, backend=gpu.backend, **draw)
    eps = fk.materialize_noise(scale, K, backend=gpu.backend, **draw)
    if dtype == torch.bfloat16 and noise != "gaussian":  # the factor is rounded to the type of the weight
        ones = torch.ones_like(scale)
        drawn = fk.materialize_noise(ones, K, backend=gpu.backend, **draw)
        drawn = (drawn / oracle.factor(ones, noise, torch.float32)[:, None]).round()
        eps = oracle.factor(scale, noise, dtype)[:, None] * drawn
    # Multiplied and added in one rounding there, in two here.
    torch.testing.assert_close(
        perturbed.float(), weight.float() + eps, rtol=torch.finfo(dtype).eps, atol=1e-7
    )
    unit = torch.eye(K, dtype=dtype, device=device)[torch.arange(rows) * 7 % K].requires_grad_()
    y = gpu.linear(unit, weight, noise_scale=scale, **draw)
    assert torch.equal(y, perturbed.t()[torch.arange(rows) * 7 % K])
    grad_y = torch.eye(N, dtype=dtype, device=device)[torch.arange(rows) * 5 % N]
    dx = torch.autograd.grad(y, unit, grad_y)[0]
    assert torch.equal(dx, perturbed[torch.arange(rows) * 5 % N])


@pytest.mark.parametrize("rows", [16, 64, 128, 256, 2048])
def test_many_runs_give_the_same_bits(gpu: Target, noise: str, rows: int) -> None:
    rows, n = min(rows, size(gpu.device, 2048, 20)), size(gpu.device, 2048, 48)
    p = problem(rows, n, n, torch.bfloat16, gpu.device, rank=16, bias=True, noise=noise)
    first = compare.run(gpu, p)
    for _ in range(size(gpu.device, 20, 1)):
        again = compare.run(gpu, p)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


def layer(device: str, rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a layer, and the gradient of its output."""
    N, K = size(device, 1024, 40), size(device, 2048, 48)
    p = problem(rows, N, K, dtype, device, rank=16, bias=True)
    return {k: t for k, t in compare.leaves(p).items() if t is not None}, p.grad_y


def train(
    gpu: Target, inputs: dict[str, Tensor], grad_y: Tensor, seed: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """The output and all gradients; the weight is frozen, and noise_scale computed on the way."""
    inputs = {**inputs, "weight": inputs["weight"].detach()}
    y = fk.fused_flat_lora_linear(**inputs, sigma=0.2, seed=seed, backend=gpu.backend, **options)
    leaves = [t for name, t in inputs.items() if name != "weight"]
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y)


def captured(device: str, step: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """`step` as a CUDA graph; on a CPU itself."""
    if device != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> tuple[Tensor, ...]:
        for t in results:
            t.fill_(float("nan"))
        graph.replay()
        return results

    return replay


@PANELS
@pytest.mark.parametrize("rows", [16, 300])
def test_a_graph_replays_with_another_seed(gpu: Target, rows: int, noise: str) -> None:
    device = gpu.device
    inputs, grad_y = layer(device, rows_for(device, rows))
    seed = torch.tensor(1, device=device)
    replay = captured(device, lambda: train(gpu, inputs, grad_y, seed, noise=noise))
    seen = []
    for value in (1, 2, 2**62 + 3, 1):
        seed.fill_(value)
        got = [t.clone() for t in replay()]
        expected = train(gpu, inputs, grad_y, torch.tensor(value, device=device), noise=noise)
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
        seen.append(got[0])
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_a_graph_replays_with_another_routing(gpu: Target) -> None:
    """Of a mixture in one launch: nobody has read where the rows of its experts end."""
    if not getattr(gpu.module, "GROUPS", False):
        pytest.skip(f"backend {gpu.backend!r} goes through the experts one after the other")
    E, M, N, K = 4, 60, size(gpu.device, 512, 24), size(gpu.device, 1024, 48)
    place = {"dtype": torch.bfloat16, "device": gpu.device}
    x, weight = randn(M, K, seed=1, **place).requires_grad_(), randn(E, N, K, seed=2, **place) / K**0.5
    A = (randn(E, 16, K, seed=3, **place) / K**0.5).requires_grad_()
    B, grad_y = randn(E, N, 16, seed=4, **place).requires_grad_(), randn(M, N, seed=5, **place)
    scale = torch.full((E, N), 0.01, device=gpu.device)
    ends = torch.tensor([10, 10, 50, M], device=gpu.device)
    seed = torch.tensor(5, device=gpu.device)

    def step() -> tuple[Tensor, ...]:
        y = fk.fused_flat_lora_grouped_linear(
            x, weight, A, B, offsets=ends, noise_scale=scale, seed=seed, backend=gpu.backend
        )
        return y.detach(), *torch.autograd.grad(y, (x, A, B), grad_y)

    replay = captured(gpu.device, step)
    seen = []
    for routing in ([10, 10, 50, M], [0, 59, 59, M], [M, M, M, M]):
        ends.copy_(torch.tensor(routing))
        got = [t.clone() for t in replay()]
        assert all(torch.equal(g, e) for g, e in zip(got, step(), strict=True))
        seen.append(got[0])
    assert not torch.equal(seen[0], seen[1]) and all(y.isfinite().all() for y in seen)


@PANELS
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_layer_is_one_graph_with_eager_bits(gpu: Target, mode: str) -> None:
    device = gpu.device
    if device == "cpu" and mode != "default":
        pytest.skip("CUDA graphs need a GPU")
    inputs, grad_y = layer(device, size(device, 300, 20))
    scale = fk.flat_noise_scale(inputs["weight"], sigma=0.2, backend=gpu.backend)

    def forward(inputs: dict[str, Tensor], seed: Tensor) -> Tensor:
        return fk.fused_flat_lora_linear(**inputs, noise_scale=scale, seed=seed, backend=gpu.backend)

    def results(function: Callable[..., Tensor], seed: Tensor) -> list[Tensor]:
        y = function(inputs, seed)
        return [t.detach().clone() for t in (y, *torch.autograd.grad(y, inputs.values(), grad_y))]

    torch._dynamo.reset()
    try:
        options = {"backend": "aot_eager"} if device == "cpu" else {"mode": mode}
        fast = torch.compile(forward, fullgraph=True, **options)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for value in (1, 2, 3, 4):  # the graph is captured in the second or third
                seed = torch.tensor(value, device=device)
                got, expected = results(fast, seed), results(forward, seed)
                names = ("y", *inputs)
                for name, g, e in zip(names, got, expected, strict=True):
                    if name in ("y", "x"):
                        assert torch.equal(g, e), name
                    else:  # what the compiler sums, it sums in an order of its own
                        compare.assert_close(g, e, name)
    finally:
        torch._dynamo.reset()


@contextlib.contextmanager
def no_synchronisation(device: str) -> Iterator[None]:
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@PANELS
@pytest.mark.parametrize("seed", ["tensor", "int"])
def test_nothing_waits_for_the_device(gpu: Target, seed: str) -> None:
    device = gpu.device
    inputs, grad_y = layer(device, size(device, 300, 20))
    given = torch.tensor(5, device=device) if seed == "tensor" else 5
    expected = train(gpu, inputs, grad_y, given)
    with no_synchronisation(device):
        got = train(gpu, inputs, grad_y, given)
        eps = fk.materialize_noise(torch.ones(8, device=device), 16, seed=given, backend=gpu.backend)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert eps.isfinite().all()
    if device == "cuda":
        with pytest.raises(RuntimeError), no_synchronisation(device):
            eps.sum().item()  # control: the check sees one


@pytest.mark.parametrize("rows", [1, 16, 64, 256, 4096])
@pytest.mark.parametrize("layout", ["row_major", "column_major"])
def test_no_memory_of_the_size_of_the_weight(gpu: Target, rows: int, layout: str) -> None:
    device, dtype = gpu.device, torch.bfloat16
    n = size(device, 8192, 64)
    rows, rank = min(rows, size(device, 4096, 8)), 16
    weight = torch.full((n, n), 0.01, dtype=dtype, device=device)
    weight = weight if layout == "row_major" else weight.t().contiguous().t()
    x, A, B = (
        randn(*s, dtype=dtype, device=device).requires_grad_() for s in ((rows, n), (rank, n), (n, rank))
    )
    grad_y = randn(rows, n, dtype=dtype, device=device)
    seed = torch.tensor(3, device=device)

    def forward() -> Tensor:
        return gpu.linear(x, weight, A, B, sigma=0.1, seed=seed)

    def backward() -> tuple[Tensor, ...]:
        y = forward()
        return (y, *torch.autograd.grad(y, (x, A, B), grad_y))

    workspace = min(16 * MIB, weight.numel() * 2 // 4)
    for step in (forward, backward):
        step()  # the first time also pays for libraries
        before = peak = 0
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        results = step()
        if device == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        results = results if isinstance(results, tuple) else (results,)
        held = sum(t.numel() * t.element_size() for t in results)
        small = 3 * rows * rank * 4 + 2 * rank * n * 4  # u, v and a wider copy of the adapter's gradients
        assert peak - before <= held + small + workspace + MIB
        del results


@PANELS
def test_on_another_stream(gpu: Target) -> None:
    device = gpu.device
    inputs, grad_y = layer(device, size(device, 300, 20))
    seed = torch.tensor(5, device=device)
    expected = train(gpu, inputs, grad_y, seed)
    late = inputs["x"].detach().clone()
    if device == "cuda":
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            # On any other stream the kernels would be through before this one has written x.
            torch.cuda._sleep(200_000_000)
            late.mul_(2)
            got = train(gpu, {**inputs, "x": late.requires_grad_()}, grad_y, seed)
        stream.synchronize()
    else:
        got = train(gpu, {**inputs, "x": late.mul_(2).requires_grad_()}, grad_y, seed)
    doubled = train(gpu, {**inputs, "x": (2 * inputs["x"].detach()).requires_grad_()}, grad_y, seed)
    assert all(torch.equal(g, e) for g, e in zip(got, doubled, strict=True))
    assert not torch.equal(got[0], expected[0])


@PANELS
def test_two_streams_at_once(gpu: Target) -> None:
    device = gpu.device
    inputs, grad_y = layer(device, size(device, 300, 20))
    other, other_grad_y = layer(device, size(device, 16, 16))
    calls = [
        (inputs, grad_y, torch.tensor(5, device=device)),
        (other, other_grad_y, torch.tensor(6, device=device)),
    ]
    expected = [train(gpu, *call) for call in calls]
    if device == "cuda":
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in calls]
    else:
        streams = [contextlib.nullcontext() for _ in calls]
    got: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(size(device, 20, 1)):
        for stream, call, results in zip(streams, calls, got, strict=True):
            with torch.cuda.stream(stream) if device == "cuda" else stream:
                results.append(train(gpu, *call))
    if device == "cuda":
        torch.cuda.synchronize()
    for results, first in zip(got, expected, strict=True):
        for result in results:
            assert all(torch.equal(g, e) for g, e in zip(result, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_shapes_of_every_kernel(gpu: Target, dtype: torch.dtype, noise: str) -> None:
    """Few enough launches for compute-sanitizer."""
    for M, N, K, rank, samples in (
        (1, 33, 70, 0, 1),
        (20, 72, 96, 8, 2),
        (size(gpu.device, 300, 140), 136, 200, 16, 1),
    ):
        options = {"samples": samples, "antithetic": samples > 1}
        p = problem(M, N, K, dtype, gpu.device, rank=rank, bias=rank > 0, noise=noise, **options)
        compare.check_problem(gpu, p)
        scale = fk.flat_noise_scale(p.weight, p.lora_A, p.lora_B, scaling=1.0, sigma=0.1, backend=gpu.backend)
        assert fk.perturb_weight(p.weight, scale, seed=1, noise=noise, backend=gpu.backend).isfinite().all()


def is_hopper(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability() == (9, 0)
    return targets.EMULATED and os.environ["FLATLORA_EMULATE"] == "90"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("tile", ["large", "small"])
def test_what_is_drawn_once_for_all_rows(
    gpu: Target, tile: str, dtype: torch.dtype, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """csrc/cuda/linear_sm90_ahead.h, which raises where it does not take a call."""
    if gpu.backend != "cuda" or not is_hopper(gpu.device):
        pytest.skip("a kernel of the CUDA backend for sm_90a")
    if noise == "hadamard":
        pytest.skip("GPUs have no fused product with it")
    if gpu.device == "cpu" and (tile, dtype, noise) != ("large", torch.bfloat16, "gaussian"):
        pytest.skip(
            "too much for the emulator: tests/csrc/test_emulator_ahead.py has all kinds and both tiles"
        )
    cuda, made = backends.get("cuda"), []
    monkeypatch.setattr(cuda, "configuration", (2000 if tile == "large" else 2001, 0))
    original = cuda.product_and_u
    monkeypatch.setattr(cuda, "product_and_u", lambda *given: made.append(original(*given)) or made[-1])
    # Of smaller weights the workspace holds too few steps.
    samples = 2 if noise == "rademacher" else 1
    p = problem(size(gpu.device, 1000, 20), 2056, 2064, dtype, gpu.device, rank=16, bias=True, noise=noise,
                samples=samples)  # fmt: skip
    compare.check_problem(gpu, p)
    assert made and None not in made, "u is made by the same kernel"
    with monkeypatch.context() as others:
        others.setattr(cuda, "configuration", (1000, 0))
        assert original(Product(p.x, p.weight), p.lora_A, None, "folded") is None
    if gpu.device == "cpu":
        return
    seed, given = torch.tensor(1, device=gpu.device), {"sigma": 0.1, "noise": noise, "samples": samples}
    replay = captured(
        gpu.device, lambda: (gpu.linear(p.x, p.weight, p.lora_A, p.lora_B, seed=seed, **given),)
    )
    first = replay()[0].clone()
    assert all(torch.equal(replay()[0], first) for _ in range(20))


@pytest.mark.gpu
@PANELS
def test_on_another_device(gpu: Target) -> None:
    if gpu.device != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs, grad_y = layer("cuda", 300)
    expected = train(gpu, inputs, grad_y, torch.tensor(5, device="cuda"))
    moved = {k: t.detach().to("cuda:1").requires_grad_() for k, t in inputs.items()}
    got = train(gpu, moved, grad_y.to("cuda:1"), torch.tensor(5, device="cuda:1"))
    assert torch.cuda.current_device() == 0
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert all(torch.equal(g.to("cuda:0"), e) for g, e in zip(got, expected, strict=True))


BIG = {  # M, N, K: the tensor named has more than 2^31 elements
    "weight": (4, 70000, 32768),
    "weight, column-major": (4, 70000, 32768),
    "weight, many rows of x": (300, 70000, 32768),
    "x and dX": (70000, 48, 32768),
    "y and dY": (70000, 32768, 48),
}
SMALL = {"x and dX": (70, 24, 40), "y and dY": (70, 40, 24)}


@pytest.mark.parametrize("what", BIG)
def test_more_than_two_to_the_31_elements(gpu: Target, what: str, noise: str) -> None:
    """Outputs and gradients that depend on the far end of a tensor, against float64."""
    device, dtype = gpu.device, torch.bfloat16
    M, N, K = BIG[what] if device == "cuda" else SMALL.get(what, (4, 70, 40))
    if device == "cuda":
        needed = 2 * (2 * N * K + 2 * M * K + M * N) + 2 * 2**30
        if torch.cuda.mem_get_info()[0] < needed:
            pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
        torch.cuda.empty_cache()

    def far(count: int) -> Tensor:
        """Both ends, and where 2^31 elements end in a matrix with rows as long as one of the dimensions."""
        places = {0, 1, count // 2, count - 2, count - 1}
        places |= {min(2**31 // other + more, count - 1) for other in (M, N, K) for more in (-1, 0, 1)}
        return torch.tensor(sorted(places), device=device)

    weight = torch.empty(K, N, dtype=dtype, device=device).t() if "column" in what else None
    weight = torch.empty(N, K, dtype=dtype, device=device) if weight is None else weight
    weight.normal_(0, K**-0.5, generator=torch.Generator(device).manual_seed(1))
    x = torch.empty(M, K, dtype=dtype, device=device).normal_(
        generator=torch.Generator(device).manual_seed(2)
    )
    scale = (0.2 * K**-0.5 * (0.5 + torch.rand(N, generator=targets.generator(3)))).to(device)
    draw = {"seed": torch.tensor(9, device=device), "stream": 1, "noise": noise}
    rows, outs, ins = far(M), far(N), far(K)

    def perturbed(n: Tensor) -> Tensor:
        """These rows of W + eps, in float64, after the one rounding."""
        some = [
            fk.perturb_weight(
                weight[i : i + 1],
                scale[i : i + 1],
                row_offset=i,
                layer_shape=(N, K),
                backend=gpu.backend,
                **draw,
            )
            for i in n.tolist()
        ]
        return torch.cat(some).double()

    x.requires_grad_()
    y = gpu.linear(x, weight, noise_scale=scale, **draw)
    W = perturbed(outs)
    got, exact = y.detach()[rows][:, outs].double(), x.detach()[rows].double() @ W.t()
    assert (got - exact).abs().max() <= 2**-7 * exact.abs().max()
    del y
    # dY is zero but at `outs`, so that dX needs those rows of the weight alone.
    grad_y = torch.zeros(M, N, dtype=dtype, device=device)
    part = randn(M, len(outs), seed=5, dtype=dtype, device=device)
    grad_y[:, outs] = part
    if noise == "hadamard":
        dx = grad_y @ weight
        draw_of = _draw(scale, draw)._replace(tile_bits=oracle.tile_bits(N, K))
        gpu.module.transform(grad_y, draw_of, True, dx, True)
    else:
        dx = gpu.module.product(Product(grad_y, weight, True), _draw(scale, draw), "folded")
    got, exact = dx[rows][:, ins].double(), part[rows].double() @ W[:, ins]
    assert (got - exact).abs().max() <= 2**-7 * exact.abs().max()
    del dx, grad_y
    norms = fk.row_sq_norms(weight, backend=gpu.backend)[outs].double()
    torch.testing.assert_close(norms, weight[outs].double().square().sum(1), rtol=1e-4, atol=0)
    if "weight" in what and M == 4:
        out = fk.perturb_weight(weight, scale, backend=gpu.backend, **draw)
        assert torch.equal(out[outs].double(), W)
        del out
    if device == "cuda":  # other processes may run other tests on the same GPU
        del x, weight
        torch.cuda.empty_cache()


def _draw(scale: Tensor, draw: dict[str, Any]) -> Draw:
    return Draw(scale, draw["seed"], draw["stream"], draw["noise"])


def shifted(t: Tensor, by: int = 1) -> Tensor:
    """The same values, `by` elements into their storage."""
    memory = t.new_empty(t.numel() + by)
    return memory[by:].view(t.shape).copy_(t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [16, 300])
@pytest.mark.parametrize("which", ["x", "weight", "grad_y", "all", "odd strides"])
def test_unaligned_memory(gpu: Target, dtype: torch.dtype, rows: int, which: str) -> None:
    """Tensor descriptors need 16-byte alignment, wide loads the alignment they were compiled for."""
    device = gpu.device
    if device == "cpu" and rows == 16 and dtype == torch.float32:
        pytest.skip("the same tiles as with more rows")
    rows, N, K = rows_for(device, rows), size(device, 256, 40), size(device, 384, 48)
    p = problem(rows, N, K, dtype, device, rank=8, bias=True)
    compare.check_problem(gpu, p)  # compiles for aligned memory first: what a wrong cache key would run
    names = (
        ["x", "weight", "grad_y", "lora_A", "lora_B", "bias"] if which in ("all", "odd strides") else [which]
    )
    for name in names:
        t = getattr(p, name)
        if which == "odd strides":
            if t.dim() == 2:
                wider = t.new_empty(t.shape[0], t.shape[1] + 3)[:, : t.shape[1]]
                setattr(p, name, wider.copy_(t))
        else:
            setattr(p, name, shifted(t))
            assert getattr(p, name).data_ptr() % 16
    compare.check_problem(gpu, p)


def test_the_copy_engine_reads_aligned_matrices_alone(gpu: Target) -> None:
    if gpu.backend != "triton":
        pytest.skip("of Triton")
    from flatlora_kernels.triton_kernels.launch import addressable

    device = gpu.device
    good = randn(64, 72, dtype=torch.bfloat16, device=device)
    assert addressable(good)
    assert not addressable(shifted(good))
    assert addressable(shifted(good, 8))
    assert not addressable(good.t())
    assert not addressable(randn(64, 71, dtype=torch.bfloat16, device=device))
    assert addressable(good[::2])
    assert not addressable(good[:, 1:])
    assert not addressable(good[:1].expand(64, 72))


@pytest.mark.parametrize("rows", [16, 48, 300])
def test_tf32_goes_by_torchs_setting(gpu: Target, rows: int, precision: Callable[[str], None]) -> None:
    device = gpu.device
    rows, n = min(rows, size(device, rows, 20)), size(device, 512, 48)
    p = problem(rows, n, n, torch.float32, device, rank=16)
    errors = {}
    for setting in ("highest", "high", "medium"):
        precision(setting)
        got = compare.run(gpu, p)
        exact, _ = compare.exact_and_scale(p, compare.group_eps(gpu, p))
        errors[setting] = {
            name: float(abs(got[name].double().cpu().numpy() - exact[name]).max() / abs(exact[name]).max())
            for name in ("y", "grad of x")
        }
    for name in ("y", "grad of x"):
        assert errors["highest"][name] < 2e-6
        if gpu.emulated or (device == "cuda" and torch.version.hip is None):
            for setting in ("high", "medium"):
                assert 2e-5 < errors[setting][name] < 5e-3, "tf32 was not used, or something less precise"


@pytest.mark.parametrize("rank", [0, 16])
def test_norms_of_a_large_layer(gpu: Target, rank: int) -> None:
    N, K = size(gpu.device, 4096, 40), size(gpu.device, 4096, 72)
    p = problem(1, N, K, torch.bfloat16, gpu.device, rank=rank)
    got = fk.row_sq_norms(p.weight, p.lora_A, p.lora_B, scaling=2.0, backend=gpu.backend).double()
    merged = p.weight.double()
    if rank:
        merged = merged + 2.0 * p.lora_B.double() @ p.lora_A.double()
    torch.testing.assert_close(got, merged.square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 128, 129, 256, 2048, 8192])
def test_every_class_of_rows_at_full_size(gpu: Target, rows: int, noise: str) -> None:
    """All tiles of the table, split and whole, by the one tolerance rule; one row more than a tile takes as well."""
    device = gpu.device
    n = size(device, 4096, 72)
    rows = rows_for(device, rows)
    p = problem(rows, n, n, torch.bfloat16, device, rank=16, bias=True, noise=noise)
    got = compare.run(gpu, p)
    eps = compare.group_eps(gpu, p)[0]
    W64 = (p.weight.double() + eps.double()) if device == "cuda" else (p.weight + eps).double()
    some = torch.arange(rows, device=device)[:: max(1, rows // 64)]
    x, dy, A, B = (t.double() for t in (p.x[some], p.grad_y[some], p.lora_A, p.lora_B))
    s, rounded = p.options["scaling"], (p.weight.float() + eps).to(torch.bfloat16)
    exact = {
        "y": x @ W64.t() + s * (x @ A.t()) @ B.t() + p.bias.double(),
        "grad of x": dy @ W64 + s * (dy @ B) @ A,
    }
    ordinary = {
        "y": p.x[some] @ rounded.t() + s * ((p.x[some] @ p.lora_A.t()) @ p.lora_B.t()) + p.bias,
        "grad of x": p.grad_y[some] @ rounded + (s * (p.grad_y[some] @ p.lora_B)) @ p.lora_A,
    }
    scales = {
        "y": x.square() @ W64.square().t() + s**2 * (x.square() @ A.square().t()) @ B.square().t(),
        "grad of x": dy.square() @ W64.square() + s**2 * (dy.square() @ B.square()) @ A.square(),
    }
    for name, value in exact.items():
        wide = scales[name].sqrt().cpu().numpy()
        compare.check(
            name, got[name][some], value.cpu().numpy(), ordinary[name], wide, torch.finfo(torch.bfloat16).eps
        )
