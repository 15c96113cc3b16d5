"""torch.compile: forward and backward in one graph each, no recompile for new seeds, eager's values."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import compare
import pytest
import torch
from compare import problem
from packed_weights import packed
from targets import Target
from torch import Tensor
from torch._dynamo.utils import counters

import flatlora_kernels as fk


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def gradients(function: Callable[..., Tensor], p: compare.Problem, *arguments: Any) -> dict[str, Tensor]:
    inputs = compare.leaves(p)
    given = {k: t for k, t in inputs.items() if t is not None}
    return compare.results(function(given, *arguments), inputs, p.grad_y)


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def assert_all_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        compare.assert_close(got[name], value, name)


INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        not shutil.which("g++") and not shutil.which("clang++"), reason="needs a compiler"
    ),
)


@pytest.mark.parametrize("compiler", ["aot_eager", INDUCTOR])
def test_one_graph_and_no_recompile_for_new_seed_and_sigma(target: Target, compiler: str) -> None:
    """Bits of eager, but for inductor's own root and product in sigma / sqrt(K) * ||W||."""
    p = problem(6, 33, 40, device=target.device, rank=4, bias=True, noisy=False)

    def layer(inputs: dict[str, Tensor], sigma: Tensor, seed: Tensor) -> Tensor:
        return target.linear(**inputs, scaling=0.75, sigma=sigma, seed=seed, stream=3)

    fast = compiled(layer, compiler)
    compare_with_eager = assert_same_bits if compiler == "aot_eager" else assert_all_close
    seen = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, strength in enumerate((0.1, 0.2, 0.0)):
            arguments = (
                torch.tensor(strength, device=target.device),
                torch.tensor(1234567 + step, device=target.device),
            )
            got = gradients(fast, p, *arguments)
            compare_with_eager(got, gradients(layer, p, *arguments))
            seen.append(got["y"])
    assert not torch.equal(seen[0], seen[1])
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def same_bits_as_eager(target: Target, dtype: torch.dtype, compiler: str, near: tuple[str, ...] = ()) -> None:
    """But for those of `near`, which are close."""
    p = problem(6, 33, 40, dtype, target.device, rank=4, bias=True, lora_x=True)
    options = {k: v for k, v in p.options.items() if k != "seed"}
    seed = torch.tensor(5, device=target.device)

    def layer(inputs: dict[str, Tensor]) -> Tensor:
        return target.linear(**inputs, seed=seed, **options)

    got, expected = gradients(compiled(layer, compiler), p), gradients(layer, p)
    assert_all_close(got, {name: expected.pop(name) for name in near})
    assert_same_bits(got, expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_all_types(target: Target, dtype: torch.dtype) -> None:
    same_bits_as_eager(target, dtype, "aot_eager")


@pytest.mark.parametrize("compiler", [INDUCTOR])
def test_inductor_with_noise_scale_given(target: Target, compiler: str) -> None:
    # Inductor sums it up itself, on a GPU in an order of its own.
    near = ("grad of bias",) if target.device == "cuda" else ()
    same_bits_as_eager(target, torch.float32, compiler, near)


def test_int_seed_and_float_sigma(target: Target) -> None:
    p = problem(6, 33, 40, device=target.device, rank=4, noisy=False)

    def layer(inputs: dict[str, Tensor]) -> Tensor:
        return target.linear(**inputs, sigma=0.1, seed=2**63 + 5)

    assert_same_bits(gradients(compiled(layer), p), gradients(layer, p))


def test_several_layers_are_one_graph(target: Target) -> None:
    p = problem(6, 40, 40, device=target.device, rank=4)

    def network(inputs: dict[str, Tensor], seed: Tensor) -> Tensor:
        inputs = dict(inputs)
        for stream in range(3):
            y = target.linear(**inputs, sigma=0.1, seed=seed, stream=stream)
            inputs["x"] = torch.nn.functional.gelu(y)
        return y

    seed = torch.tensor(5, device=target.device)
    assert_same_bits(gradients(compiled(network), p, seed), gradients(network, p, seed))
    assert counters["stats"]["unique_graphs"] == 1


def test_context_and_automatic_choice_are_traced(target: Target) -> None:
    p = problem(6, 33, 40, device=target.device)

    def layer(x: Tensor, seed: Tensor) -> Tensor:
        return fk.fused_flat_lora_linear(x, p.weight, noise_scale=p.options["noise_scale"], seed=seed)

    seed = torch.tensor(5, device=target.device)
    with fk.use_backend(target.backend):
        assert torch.equal(compiled(layer)(p.x, seed), layer(p.x, seed))


def test_the_other_functions(target: Target) -> None:
    p = problem(6, 33, 40, device=target.device, rank=4)

    def functions(seed: Tensor) -> tuple[Tensor, ...]:
        adapter = (p.weight, p.lora_A, p.lora_B)
        scale = fk.flat_noise_scale(*adapter, sigma=0.1, backend=target.backend)
        return (
            fk.row_sq_norms(*adapter, backend=target.backend),
            scale,
            target.noise(scale, 40, seed=seed),
            fk.perturb_weight(p.weight, scale, seed=seed, backend=target.backend),
        )

    seed = torch.tensor(5, device=target.device)
    for got, expected in zip(compiled(functions)(seed), functions(seed), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("strategy", ["fused", "panel", None])
def test_dynamic_batch(target: Target, strategy: str | None) -> None:
    """One graph for every number of rows, forward and backward, also where the choice depends on them."""
    if strategy is not None and (target.interpreted or target.emulated):
        pytest.skip("takes minutes; the automatic choice goes through the same code")
    p = problem(64, 33, 40, device=target.device, rank=4, bias=True)
    options = {k: v for k, v in p.options.items() if k != "seed"}

    def layer(inputs: dict[str, Tensor], seed: Tensor) -> Tensor:
        return target.linear(**inputs, seed=seed, strategy=strategy, **options)

    fast = compiled(layer, dynamic=True)
    seed = torch.tensor(5, device=target.device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 17, 64):
            part = compare.Problem(**{**vars(p), "x": p.x[:rows].clone(), "grad_y": p.grad_y[:rows]})
            assert_same_bits(gradients(fast, part, seed), gradients(layer, part, seed))


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("layout", ["nf4_nested", "gptq"])
def test_packed_weight(target: Target, layout: str, inference: bool) -> None:
    """Its tensors are the graph's, the rest is a constant of it; whoever holds it. Also of those of inference mode."""
    with torch.inference_mode(inference):
        q = packed(layout, 33, 40, torch.float32, target.device)
        codes = q.parts.codes.clone()
        q = fk.QuantizedWeight(q.packing, q.parts._replace(codes=codes))
    assert codes.is_inference() == inference and q.parts.codes.data_ptr() == codes.data_ptr()
    p = problem(6, 33, 40, device=target.device, rank=4, bias=True)

    class Layer(torch.nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return target.linear(**{**inputs, "weight": q}, strategy="panel", **p.options)

    inputs = {**compare.leaves(p), "weight": None}
    eager = compare.results(Layer()(inputs), inputs, p.grad_y)
    inputs = {**compare.leaves(p), "weight": None}
    assert_same_bits(compare.results(compiled(Layer())(inputs), inputs, p.grad_y), eager)


def test_under_autocast(target: Target) -> None:
    p = problem(6, 33, 40, device=target.device, rank=4, bias=True)

    def layer(inputs: dict[str, Tensor]) -> Tensor:
        with torch.autocast(target.device, torch.bfloat16):
            return target.linear(**inputs, **p.options).float()

    assert_same_bits(gradients(compiled(layer), p), gradients(layer, p))
