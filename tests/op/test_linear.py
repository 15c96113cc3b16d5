"""Values and gradients of the op on every backend, dtype, shape and memory layout (rule: compare.py)."""

from __future__ import annotations

from typing import Any

import compare
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, check_problem, leaves, problem
from targets import Target, randn

import flatlora_kernels as fk
from flatlora_kernels.core.records import Product

SHAPES = [  # (M, N, K)
    (1, 1, 1),
    (1, 1, 8),
    (1, 6, 7),
    (3, 17, 5),
    (2, 1, 64),
    (7, 33, 40),
    (5, 16, 17),
    (16, 64, 64),
    (1, 200, 333),
    (4, 130, 1031),
    (33, 72, 260),
    (130, 200, 333),
]
ids = [f"{m}x{n}x{k}" for m, n, k in SHAPES]


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_plain_linear(target: Target, dtype: torch.dtype, shape: tuple[int, ...], noise: str) -> None:
    check_problem(target, problem(*shape, dtype, target.device, noise=noise))


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_without_noise(target: Target, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_problem(target, problem(*shape, dtype, target.device, noisy=False))


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_adapter_and_bias(target: Target, dtype: torch.dtype, shape: tuple[int, ...], noise: str) -> None:
    check_problem(target, problem(*shape, dtype, target.device, rank=4, bias=True, noise=noise))


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 33, 64, 100])
def test_ranks(target: Target, dtype: torch.dtype, rank: int) -> None:
    check_problem(target, problem(9, 40, 72, dtype, target.device, rank=rank))


def test_many_tiles(target: Target, dtype: torch.dtype) -> None:
    """Beyond any tile or panel in every direction, and uneven."""
    check_problem(target, problem(70, 1100, 1300, dtype, target.device, rank=16, bias=True))


@pytest.mark.parametrize("K", [4096, 16391])
def test_long_sums(target: Target, dtype: torch.dtype, K: int) -> None:
    """Many panels in one sum, over K for y and over N for dX: a 16-bit accumulator on the way would show."""
    check_problem(target, problem(3, 24, K, dtype, target.device))
    check_problem(target, problem(3, K, 24, dtype, target.device))


def test_separate_adapter_input(target: Target, dtype: torch.dtype) -> None:
    check_problem(target, problem(10, 24, 40, dtype, target.device, rank=4, bias=True, lora_x=True))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(("samples", "offset"), [(1, 5), (2, 0), (3, 1), (12, 7)])
def test_samples(
    target: Target, dtype: torch.dtype, samples: int, offset: int, noise: str, antithetic: bool
) -> None:
    options = {"samples": samples, "sample_offset": offset, "antithetic": antithetic, "noise": noise}
    check_problem(target, problem(12, 24, 37, dtype, target.device, rank=4, **options))


def test_antithetic_pairs_cancel(target: Target) -> None:
    p = problem(4, 24, 40, device=target.device)
    p.x[2:] = p.x[:2]
    y = target.linear(p.x, torch.zeros_like(p.weight), **p.options, samples=2, antithetic=True)
    assert y[:2].abs().min() > 0
    assert_close(y[:2], -y[2:])


@pytest.mark.parametrize("dtype16", [torch.float16, torch.bfloat16])
def test_float32_adapter_beside_16_bit_input(target: Target, dtype16: torch.dtype) -> None:
    check_problem(
        target,
        problem(
            10, 24, 40, dtype16, target.device, rank=4, bias=True, lora_x=True, adapter_dtype=torch.float32
        ),
    )


def test_strategies(target: Target, dtype: torch.dtype, noise: str) -> None:
    for plan in target.plans(noise):
        for shape in ((1, 33, 40), (130, 72, 100)):
            p = problem(*shape, dtype, target.device, rank=4, bias=True, noise=noise)
            check_problem(target, p, **plan)


def every_other_row(t: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(2, 0)[::2]


def wider(t: torch.Tensor) -> torch.Tensor:
    """Rows as they are, in the midst of a wider matrix filled with NaN."""
    return F.pad(t, (3, 2), value=float("nan"))[..., 3:-2]


def column_major(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT


def every_other_column(t: torch.Tensor) -> torch.Tensor:
    return t.repeat_interleave(2, -1)[..., ::2]


def test_one_number_as_the_weight(target: Target, dtype: torch.dtype, noise: str) -> None:
    """Expanded from a single element, which is not zero."""
    p = problem(40, 130, 136, dtype, target.device, noise=noise)
    p.weight = torch.full((), 0.25, dtype=dtype, device=target.device).expand(130, 136)
    for plan in target.plans(noise):
        check_problem(target, p, **plan)


LAYOUTS = [every_other_row, wider, column_major, every_other_column]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["x", "weight", "lora_A", "lora_B", "lora_x", "grad_y"])
@pytest.mark.parametrize("shape", [(1, 33, 41), (40, 33, 72)], ids=["1x33x41", "40x33x72"])
def test_layouts(target: Target, dtype: torch.dtype, argument: str, layout, shape) -> None:  # type: ignore[no-untyped-def]
    p = problem(*shape, dtype, target.device, rank=4, lora_x=argument == "lora_x")
    before = getattr(p, argument)
    after = layout(before)
    assert torch.equal(before, after)
    setattr(p, argument, after)
    check_problem(target, p)


def test_large_column_major_weight(target: Target, dtype: torch.dtype) -> None:
    p = problem(20, 300, 700, dtype, target.device, rank=4)
    p.weight = column_major(p.weight)
    check_problem(target, p)


def test_strided_vectors(target: Target, dtype: torch.dtype) -> None:
    p = problem(5, 33, 40, dtype, target.device, bias=True)
    p.bias = every_other_column(p.bias)
    p.options["noise_scale"] = every_other_column(p.options["noise_scale"])
    check_problem(target, p)


def test_broadcast_gradient(target: Target, dtype: torch.dtype) -> None:
    """`y.sum().backward()` sends a gradient whose strides are all zero."""
    p = problem(6, 33, 40, dtype, target.device, rank=4, bias=True)
    p.grad_y = torch.ones((), dtype=dtype, device=target.device).expand(6, 33)
    check_problem(target, p)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions(target: Target, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    p = problem(torch.Size(leading).numel(), 17, 24, dtype, target.device, rank=4, bias=True)
    flat = compare.run(target, p)
    p.x = p.x.view(*leading, 24)
    got = compare.run(target, p)
    assert got["y"].shape == (*leading, 17)
    assert got["grad of x"].shape == p.x.shape
    for name, value in got.items():
        assert torch.equal(value.flatten(), flat[name].flatten()), name


def test_permuted_leading_dimensions(target: Target, dtype: torch.dtype) -> None:
    p = problem(6, 17, 24, dtype, target.device, rank=4)
    flat = compare.run(target, p)
    p.x = p.x.view(2, 3, 24).transpose(0, 1).contiguous().transpose(0, 1)
    assert not p.x.is_contiguous()
    got = compare.run(target, p)
    for name, value in got.items():
        assert_close(value.flatten(), flat[name].flatten(), name)


@pytest.mark.parametrize("shape", [(0, 5, 8), (0, 33, 7), (4, 0, 8), (4, 5, 0)], ids=str)
@pytest.mark.parametrize("rank", [0, 4])
def test_zero_sizes(target: Target, dtype: torch.dtype, shape: tuple[int, ...], rank: int) -> None:
    got = check_problem(target, problem(*shape, dtype, target.device, rank=rank, bias=True))
    M, N, _ = shape
    assert got["y"].shape == (M, N)
    if M == 0:
        assert not any(g.any() for k, g in got.items() if k in ("grad of weight", "grad of bias"))


def test_zero_rows_with_samples(target: Target) -> None:
    p = problem(0, 5, 8, device=target.device, samples=3)
    assert target.linear(p.x.view(2, 0, 8), p.weight, **p.options).shape == (2, 0, 5)


def test_matches_functional_linear(target: Target, dtype: torch.dtype) -> None:
    """At sigma=0, its default, nothing is drawn: no seed needed, and F.linear's value within rounding."""
    p = problem(7, 33, 40, dtype, target.device, bias=True, noisy=False)
    y = target.linear(p.x, p.weight, bias=p.bias)
    assert_close(y, F.linear(p.x, p.weight, p.bias))
    assert torch.equal(y, target.linear(p.x, p.weight, bias=p.bias, sigma=0.0, seed=1, stream=5))


def test_sigma_is_noise_scale_of_the_whole_weight(target: Target, dtype: torch.dtype) -> None:
    p = problem(7, 33, 40, dtype, target.device, rank=4)
    p.options.pop("noise_scale")
    common = {**p.inputs, **p.options}
    full = p.weight.double() + 0.75 * p.lora_B.double() @ p.lora_A.double()
    scale = (0.3 * full.norm(dim=1) / 40**0.5).float()
    expected = target.linear(**common, noise_scale=scale)
    assert_close(target.linear(**common, sigma=0.3), expected, ulp=2**-23)
    for sigma in (
        torch.tensor(0.3),
        torch.tensor(0.3, dtype=torch.float64),
        torch.nn.Parameter(torch.tensor(0.3)),
    ):
        assert_close(target.linear(**common, sigma=sigma.to(target.device)), expected, ulp=2**-23)
    # noise_scale wins over sigma, and zeros of either draw nothing.
    assert torch.equal(target.linear(**common, noise_scale=scale, sigma=7.0), expected)
    quiet = target.linear(**p.inputs, scaling=0.75)
    assert_close(target.linear(**common, noise_scale=torch.zeros_like(scale)), quiet)
    assert_close(target.linear(**common, sigma=torch.tensor(0.0, device=target.device)), quiet)


def test_seed_forms(target: Target) -> None:
    """An int modulo 2**64 and an int64 tensor of the same bits are the same seed."""
    p = problem(3, 16, 24, device=target.device)
    p.options.pop("seed")

    def y(seed: object) -> torch.Tensor:
        return target.linear(p.x, p.weight, seed=seed, **p.options)

    tensor = torch.tensor(-5, device=target.device)
    assert torch.equal(y(-5), y(tensor))
    assert torch.equal(y(-5), y(2**64 - 5))
    assert torch.equal(y(-5), y(5 * 2**64 - 5))
    assert not torch.equal(y(-5), y(5))


@pytest.mark.parametrize("make", [torch.clone, column_major], ids=["row_major", "column_major"])
def test_weight_is_never_written(target: Target, dtype: torch.dtype, make) -> None:  # type: ignore[no-untyped-def]
    p = problem(7, 33, 40, dtype, target.device, rank=4, bias=True, lora_x=True, samples=7)
    p.weight = make(p.weight)
    tensors = {**p.inputs, "noise_scale": p.options["noise_scale"]}
    before = {k: (t.clone(), t._version) for k, t in tensors.items()}
    inputs = leaves(p)
    y = target.linear(**inputs, **p.options)
    torch.autograd.grad(y, list(inputs.values()), p.grad_y)
    fk.perturb_weight(p.weight, p.options["noise_scale"], seed=1, backend=target.backend)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name][0]), name
        assert tensor._version == before[name][1], name


@pytest.mark.parametrize(
    "wanted", [(n,) for n in compare.INPUTS] + [("lora_A", "lora_B"), ("x", "bias")], ids="-".join
)
def test_only_needed_gradients(
    target: Target, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(7, 33, 40, device=target.device, rank=4, bias=True, lora_x=True)
    everything = compare.run(target, p)
    calls = []
    original = target.module.product

    def counted(p: Product, *args: Any) -> Any:
        calls.extend([p] * p.input_grad)
        return original(p, *args)

    monkeypatch.setattr(target.module, "product", counted)
    inputs = {k: t.detach().clone().requires_grad_(k in wanted) for k, t in p.inputs.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = target.linear(**inputs, **p.options)
    y.backward(p.grad_y)
    for name, tensor in inputs.items():
        if name in wanted:
            assert_close(tensor.grad, everything[f"grad of {name}"], name)
        else:
            assert tensor.grad is None, name
    assert len(calls) == ("x" in wanted), "dX is computed where x needs a gradient, and only there"
    # Saved for backward: inputs and u = lora_x A^T, nothing else.
    pointers = {t.data_ptr() for t in (*inputs.values(), p.options["noise_scale"])}
    extra = [tuple(t.shape) for t in kept if t.data_ptr() not in pointers and t.dim()]
    assert extra in ([], [(7, 4)])


def test_no_gradient_wanted(target: Target) -> None:
    p = problem(3, 5, 8, device=target.device, rank=4)
    assert not target.linear(**p.inputs, **p.options).requires_grad
    with torch.no_grad():
        assert not target.linear(**leaves(p), **p.options).requires_grad


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 6, 40])
@pytest.mark.parametrize("noisy", [False, True])
def test_non_finite_input(target: Target, dtype: torch.dtype, value: float, column: int, noisy: bool) -> None:
    p = problem(5, 33, 41, dtype, target.device, rank=4 if noisy else 0, bias=True, noisy=noisy)
    if not noisy:
        p.weight[3, column] = 0  # 0 * inf is NaN
    clean = target.linear(**p.inputs, **p.options)
    p.x[2, column] = value
    p.x[4, column] = -value
    eps = compare.group_eps(target, p)
    y = target.linear(**p.inputs, **p.options)
    expected = compare.plain(p, eps)["y"]
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert torch.equal(y[y.isinf()], expected[expected.isinf()])
    assert not y[[2, 4]].isfinite().any()
    assert_close(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 32])
def test_non_finite_gradient(target: Target, dtype: torch.dtype, value: float, column: int) -> None:
    p = problem(5, 33, 41, dtype, target.device, bias=True)
    p.grad_y[2, column] = value
    got = compare.run(target, p)
    expected = compare.plain(p, compare.group_eps(target, p))
    for name in ("grad of x", "grad of weight", "grad of bias"):
        assert torch.equal(got[name].isnan(), expected[name].isnan()), name
        assert torch.equal(got[name].isinf(), expected[name].isinf()), name
    assert not got["grad of x"][2].isfinite().any()


def test_float16_overflows_to_infinity(target: Target) -> None:
    x = torch.full((3, 64), 100.0, dtype=torch.float16, device=target.device)
    weight = torch.full((24, 64), 100.0, dtype=torch.float16, device=target.device)
    weight[1] = -100
    weight[2] = 1
    y = target.linear(x, weight)
    assert torch.equal(y, F.linear(x, weight))
    assert y[0, 0] == float("inf")
    assert y[0, 1] == -float("inf")
    assert y[0, 2] == 6400


def test_offsets_beyond_two_to_the_31(target: Target) -> None:
    """A weight whose last elements lie more than 2**31 elements behind its first."""
    if target.device != "cpu":
        pytest.skip("relies on untouched memory costing nothing")
    N, K, stride = 18, 40, 2**27 + 3
    try:
        memory = torch.empty((N - 1) * stride + K, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no {N * stride * 2 >> 30} GiB of address space: {error}")
    p = problem(5, N, K, torch.bfloat16)
    near = p.weight
    p.weight = memory.as_strided((N, K), (stride, 1)).copy_(near)
    far = check_problem(target, p)
    p.weight = near
    for name, value in compare.run(target, p).items():
        assert_close(far[name], value, name)


def test_values_do_not_depend_on_the_batch(target: Target) -> None:
    """The noise is that of the weight: the rows of x change nothing about each other beyond rounding."""
    p = problem(130, 40, 72, device=target.device)
    whole = target.linear(p.x, p.weight, **p.options)
    for rows in (slice(0, 1), slice(3, 10), slice(100, 130)):
        assert_close(target.linear(p.x[rows], p.weight, **p.options), whole[rows])


def test_scaling_zero_and_negative(target: Target) -> None:
    for scaling in (0, -1.5, 3):
        check_problem(target, problem(7, 33, 40, device=target.device, rank=4, scaling=scaling))


def test_same_tensor_twice(target: Target) -> None:
    """lora_x may be x itself: the gradients add up."""
    p = problem(7, 33, 40, device=target.device, rank=4)
    x = p.x.requires_grad_()
    y = target.linear(x, p.weight, p.lora_A, p.lora_B, lora_x=x, **p.options)
    (both,) = torch.autograd.grad(y, x, p.grad_y)
    (one,) = torch.autograd.grad(target.linear(x, p.weight, p.lora_A, p.lora_B, **p.options), x, p.grad_y)
    assert_close(both, one)


def test_default_backend_is_used_without_naming_one() -> None:
    """The call a newcomer types first."""
    x = randn(4, 3, 16).requires_grad_()
    y = fk.fused_flat_lora_linear(x, randn(8, 16), randn(2, 16), randn(8, 2), sigma=0.05, seed=0)
    y.sum().backward()
    assert y.shape == (4, 3, 8)
    assert x.grad.isfinite().all()
