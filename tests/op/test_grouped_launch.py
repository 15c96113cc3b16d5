"""Mixtures of experts in one launch, on the backends that have it: where offsets are a tensor beside the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import assert_close
from targets import Target, randn
from test_grouped import (
    ROUTINGS,
    SEED,
    STREAM,
    E,
    K,
    M,
    N,
    drawn,
    gradients,
    grouped,
    inputs,
    noise_scale,
    with_gradients,
)
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels.choice import dispatch
from flatlora_kernels.choice.resolve import resolve
from flatlora_kernels.core.records import Draw, Product
from flatlora_kernels.op import mixture

Inputs = dict[str, Any]


@pytest.fixture
def able(target: Target) -> Target:
    """A target whose backend computes a mixture in one launch."""
    if not getattr(target.module, "GROUPS", False):
        pytest.skip(f"backend {target.backend!r} goes through the experts one after the other")
    return target


@pytest.fixture
def fused(able: Target, noise: str) -> str:
    if noise not in able.module.FUSES:
        pytest.skip(f"backend {able.backend!r} does not fuse {noise}")
    return noise


def offsets_of(ends: list[int], target: Target, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(ends, dtype=dtype, device=target.device)


def both(target: Target, given: Inputs, ends: list[int], options: Inputs, ulp: float = 0) -> None:
    """Output and gradients are those of `reference`, up to rounding."""
    ours, theirs = with_gradients(given), with_gradients(given)
    y = grouped(target, ours, offsets_of(ends, target), options)
    want = grouped(Target("reference", target.device), theirs, ends, options)
    assert_close(y, want)
    expected = gradients(want, theirs)
    for name, grad in gradients(y, ours).items():
        assert grad.dtype == given[name].dtype and grad.shape == given[name].shape
        assert_close(grad, expected[name], ulp=ulp)


@pytest.fixture
def launches(able: Target, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched from now on."""
    from flatlora_kernels.triton_kernels import launch

    names: list[str] = []
    call = launch.Kernel.__call__

    def noted(self: Any, *arguments: Any) -> None:
        names.append(self.kernel.__name__.strip("_").removesuffix("_kernel"))
        call(self, *arguments)

    monkeypatch.setattr(launch.Kernel, "__call__", noted)
    return names


@pytest.mark.parametrize("routing", ROUTINGS)
def test_equal_to_the_reference(able: Target, dtype: torch.dtype, fused: str, routing: str) -> None:
    both(able, inputs(able, dtype), ROUTINGS[routing], drawn(able, noise=fused))


SHAPES = {
    # rows, N, K, rank, ends
    "tiles of many rows": (300, 72, 64, 16, [150, 150, 151, 300, 300]),
    "rank above 32": (40, 24, 48, 40, [1, 2, 3, 40, 40]),
    "a long contraction": (9, 24, 2048, 2, [4, 4, 9, 9, 9]),
    "a long contraction, bias": (9, 24, 2048, 2, [4, 4, 9, 9, 9]),
    "more outputs than rows": (6, 300, 16, 8, [1, 2, 3, 4, 6]),
    "more experts than rows": (3, 16, 16, 8, [0, 1, 1, 2, 3]),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(able: Target, case: str, launches: list[str]) -> None:
    rows, N, K, R, ends = SHAPES[case]
    place = {"dtype": torch.bfloat16, "device": able.device}
    given = {
        "x": randn(rows, K, seed=1, **place),
        "weight": (randn(E, N, K, seed=2) / K**0.5).to(**place),
        "lora_A": (randn(E, R, K, seed=3) / K**0.5).to(**place),
        "lora_B": randn(E, N, R, seed=4, **place),
        "bias": randn(E, N, seed=5, **place) if "bias" in case else None,
    }
    options = drawn(able, noise="near_gaussian")
    options["noise_scale"] = 0.2 / K**0.5 * (0.5 + torch.rand(E, N, device=able.device))
    both(able, given, ends, options)
    if able.interpreted:  # on four processors
        assert ("add_splits" in launches[:3]) == (case == "a long contraction")


def test_many_experts(able: Target) -> None:
    """Not a power of two of them."""
    experts = 130
    given = {
        "x": randn(50, K, seed=1, device=able.device),
        "weight": randn(experts, 8, K, seed=2, device=able.device) / K**0.5,
        "lora_A": randn(experts, 2, K, seed=3, device=able.device) / K**0.5,
        "lora_B": randn(experts, 8, 2, seed=4, device=able.device),
        "bias": None,
    }
    ends = sorted(torch.randint(51, (experts - 1,), generator=torch.Generator().manual_seed(1)).tolist()) + [
        50
    ]
    options = {**drawn(able), "noise_scale": torch.full((experts, 8), 0.1, device=able.device)}
    both(able, given, ends, options)


@pytest.mark.parametrize("split", [False, True])
def test_eps_is_that_of_stream_plus_e(able: Target, fused: str, split: bool) -> None:
    """With rows of the unit matrix and no weight the output is eps itself, bit for bit."""
    scale, x = noise_scale(able), torch.eye(K, device=able.device).repeat(E, 1)
    where = {"row_offset": 48, "col_offset": 16} if split else {}
    y = fk.fused_flat_lora_grouped_linear(
        x,
        torch.zeros(E, N, K, device=able.device),
        offsets=offsets_of([K * (e + 1) for e in range(E)], able),
        noise_scale=scale,
        seed=SEED,
        stream=STREAM,
        noise=fused,
        strategy="fused",
        noise_accum="split" if split else "folded",
        backend=able.backend,
        **where,
    )
    for e in range(E):
        eps = able.noise(scale[e], K, seed=SEED, stream=STREAM + e, noise=fused, **where)
        assert torch.equal(y[K * e : K * (e + 1)].t(), eps)
        assert eps.abs().max() > 0


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "grad of one number"])
def test_layouts(able: Target, layout: str) -> None:
    given, options = inputs(able), drawn(able)
    weight, offsets = given["weight"], offsets_of(ROUTINGS["uneven"], able)
    if layout == "transposed":
        given["weight"] = weight.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        given["x"] = given["x"].repeat_interleave(2, 0)[::2]
        given["weight"] = weight.repeat_interleave(2, 0)[::2]
        given["bias"] = given["bias"].t().contiguous().t()
        options["noise_scale"] = options["noise_scale"].repeat_interleave(2, 1)[:, ::2]
        offsets = offsets.repeat_interleave(2)[::2]
    elif layout == "expanded":
        given["weight"] = weight[:1].expand(E, N, K)
    ours, theirs = ({name: t.detach().requires_grad_() for name, t in given.items()} for _ in range(2))
    y = grouped(able, ours, offsets, options)
    want = grouped(Target("reference", able.device), theirs, ROUTINGS["uneven"], options)
    assert_close(y, want)
    if layout == "grad of one number":  # which is expanded
        y.sum().backward()
        want.sum().backward()
    else:
        y.square().sum().backward()
        want.square().sum().backward()
    for name, t in ours.items():
        assert_close(t.grad, theirs[name].grad)


@pytest.mark.parametrize("left_out", ["bias", "adapter", "noise"])
def test_what_may_be_left_out(able: Target, left_out: str) -> None:
    given, options = inputs(able), drawn(able)
    for name in {"bias": ["bias"], "adapter": ["lora_A", "lora_B"]}.get(left_out, []):
        given[name] = None
    if left_out == "noise":
        options = {"scaling": 0.75}
    both(able, given, ROUTINGS["uneven"], options)


def test_expanded_offsets(able: Target) -> None:
    """All rows are the first expert's."""
    given, options = inputs(able), drawn(able)
    ends = torch.tensor(M, device=able.device).expand(E)
    assert_close(grouped(able, given, ends, options), grouped(able, given, [M] * E, options))


def test_an_adapter_of_rank_0(able: Target) -> None:
    given = inputs(able)
    given |= {"lora_A": given["lora_A"][:, :0], "lora_B": given["lora_B"][..., :0]}
    both(able, given, ROUTINGS["uneven"], drawn(able))


def test_split_noise(able: Target) -> None:
    """Only what is drawn is split: u and v are products without noise."""
    given, options = inputs(able, torch.bfloat16), drawn(able, noise_accum="split", noise="near_gaussian")
    both(able, given, ROUTINGS["uneven"], options, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("trained", [("x",), ("lora_A",), ("lora_B",), ("bias",), ("weight",)])
def test_gradients_of_some_inputs(able: Target, trained: tuple[str, ...]) -> None:
    options, ends = drawn(able), offsets_of(ROUTINGS["uneven"], able)
    ours, every = with_gradients(inputs(able)), with_gradients(inputs(able))
    for name, t in ours.items():
        t.requires_grad_(name in trained)
    expected = gradients(grouped(able, every, ends, options), every)
    got = gradients(grouped(able, ours, ends, options), ours)
    assert got.keys() == set(trained)
    assert all(torch.equal(grad, expected[name]) for name, grad in got.items())


def test_float32_adapter_beside_16_bits(able: Target) -> None:
    given = inputs(able, torch.bfloat16)
    given |= {name: given[name].float() for name in ("lora_A", "lora_B", "bias")}
    both(able, given, ROUTINGS["uneven"], drawn(able), torch.finfo(torch.bfloat16).eps)


def test_experts_without_rows_cost_nothing(able: Target) -> None:
    """Neither read (they hold NaN) nor drawn, and their gradients are zero; rows of one expert touch no other."""
    given, options = inputs(able), drawn(able)
    for name in ("weight", "lora_A", "lora_B", "bias"):
        given[name][1] = float("nan")
    options["noise_scale"][1] = float("nan")
    given["x"][0] = float("nan")
    given = with_gradients(given)
    y = grouped(able, given, offsets_of(ROUTINGS["uneven"], able), options)
    assert y[0].isnan().all() and y[1:].isfinite().all()
    for name, grad in gradients(y, given).items():
        if name != "x":
            assert not grad[1].any() and all(grad[e].isfinite().all() and grad[e].any() for e in (2, 3, 4))


def test_launches(able: Target, launches: list[str]) -> None:
    """One for the product in each direction, one for each low-rank product and each gradient."""
    given, options = inputs(able), drawn(able)
    trained = [given[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    y = grouped(able, given, offsets_of(ROUTINGS["uneven"], able), options)
    makes_u = able.interpreted  # elsewhere of 16 bits and whole eights alone
    assert launches == ["linear_forward"] * (1 if makes_u else 2)
    launches.clear()
    torch.autograd.grad(y, trained, torch.ones_like(y))
    assert launches == ["linear_input_grad", "linear_input_grad", "expert_grads", "expert_grads"]
    launches.clear()
    given["x"] = given["x"].repeat(8, 1)
    y = grouped(able, given, offsets_of([8 * end for end in ROUTINGS["uneven"]], able), options)
    assert launches == ["linear_forward", "linear_forward"]
    launches.clear()
    A, B = given["lora_A"], given["lora_B"]
    fk.grouped_noise_scale(given["weight"], A, B, sigma=0.1, backend=able.backend)
    assert launches == ["row_sq_norms"]


def test_nothing_is_read_on_the_host(able: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    given, options = with_gradients(inputs(able)), drawn(able)
    ends = offsets_of(ROUTINGS["uneven"], able)
    options["seed"] = torch.tensor(5, device=able.device)
    # What is free on a CPU is not done on a GPU.
    monkeypatch.setattr(mixture, "_in_kernels", lambda offsets, rows: offsets)
    with pytest.MonkeyPatch.context() as patch:
        for reader in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(Tensor, reader, lambda *a, reader=reader: pytest.fail(f"{reader} is called"))
        y = grouped(able, given, ends, options)
        grads = torch.autograd.grad(y, list(given.values()), torch.ones_like(y))
    assert all(grad.isfinite().all() for grad in grads)


def test_compiled(able: Target) -> None:
    """The graph has one op, which goes the same way whatever the routing."""
    options = {**drawn(able), "strategy": "fused", "backend": able.backend}

    def layer(given: Inputs, offsets: Tensor) -> Tensor:
        return fk.fused_flat_lora_grouped_linear(**given, offsets=offsets, **options)

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for routing in ("uneven", "last alone"):
        offsets = offsets_of(ROUTINGS[routing], able)
        ours, theirs = (with_gradients(inputs(able)) for _ in range(2))
        y, want = compiled(ours, offsets), layer(theirs, offsets)
        assert torch.equal(y, want)
        expected = gradients(want, theirs)
        assert all(torch.equal(grad, expected[name]) for name, grad in gradients(y, ours).items())
    torch._dynamo.reset()


def test_the_same_bits_again(able: Target) -> None:
    options, ends = drawn(able), offsets_of(ROUTINGS["uneven"], able, torch.int64)
    one, two = (with_gradients(inputs(able, torch.bfloat16)) for _ in range(2))
    y, again = grouped(able, one, ends, options), grouped(able, two, ends.int(), options)
    assert torch.equal(y, again)
    expected = gradients(again, two)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(y, one).items())


@pytest.mark.parametrize("ends", [[7, 7, 40, 41, 200], ROUTINGS["uneven"]], ids=["many", "few"])
def test_programs_backwards(able: Target, ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """None writes another's rows: what comes later would hide it, and on a GPU nobody comes later."""
    if not able.interpreted:
        pytest.skip("the order of programs is the interpreter's to choose")
    from triton.runtime import interpreter

    options, offsets = drawn(able), offsets_of(ends, able)
    one, two = (with_gradients(inputs(able, rows=ends[-1])) for _ in range(2))
    y = grouped(able, one, offsets, options)
    expected = gradients(y, one)
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def backwards(*at: int) -> None:
        place(*(dim - 1 - i for dim, i in zip(builder.grid_dim, at, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    assert torch.equal(grouped(able, two, offsets, options), y)
    again = gradients(grouped(able, two, offsets, options), two)
    assert all(torch.equal(again[name], grad) for name, grad in expected.items())


WRONG = {
    "falls": [4, 3, 11, 12, 23],
    "below 0": [-5, 4, 11, 12, 23],
    "too far": [4, 4, 11, 12, 24],
    "far too far": [4, 4, 2**31 - 1, 12, 23],
    "too short": [4, 4, 11, 12, 22],
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_offsets(able: Target, case: str) -> None:
    """On the host they are refused, which costs nothing there; a kernel stays inside its tensors and makes NaN."""
    given, ends = inputs(able), offsets_of(WRONG[case], able)
    if able.device == "cpu":
        with pytest.raises(ValueError, match="^offsets: expected .*, got "):
            grouped(able, given, ends, drawn(able))
    draw = Draw(noise_scale(able), torch.tensor(SEED - 2**64, device=able.device), STREAM)
    p = Product(given["x"], given["weight"], bias=given["bias"], scaling=0.75, offsets=ends)
    assert able.module.product(p, draw, "folded").isnan().all()
    y = randn(M, N, device=able.device)
    assert able.module.product(Product(y, given["weight"], True, offsets=ends), draw, "folded").isnan().all()
    out = torch.zeros(E, 3, K, device=able.device)
    able.module.expert_grads(randn(M, 3, device=able.device), given["x"], ends, 1.0, out)
    assert out.isnan().all()


def test_norms_of_all_experts(able: Target, dtype: torch.dtype) -> None:
    given = inputs(able, dtype)
    for names in ((), ("lora_A", "lora_B")):
        adapter = [given[name] for name in names]
        found = fk.grouped_noise_scale(
            given["weight"], *adapter, scaling=0.75, sigma=0.3, backend=able.backend
        )
        for e in range(E):
            own = [t[e] for t in adapter]
            want = fk.flat_noise_scale(
                given["weight"][e], *own, scaling=0.75, sigma=0.3, backend=able.backend
            )
            assert torch.equal(found[e], want) and want.any()


def test_who_goes_through_the_experts(able: Target, launches: list[str]) -> None:
    """Ints, another strategy, noise that is not fused, a weight of another type: no launch of all experts."""
    given, ends, options = inputs(able), ROUTINGS["uneven"], drawn(able)
    offsets = offsets_of(ends, able)
    where = {"choice": resolve(able.backend, None, None, able.device, torch.float32, N * K, "gaussian")}
    asked = resolve(able.backend, "panel", None, able.device, torch.float32, N * K, "gaussian")
    together = mixture.together
    x, weight = given["x"], given["weight"]
    assert together(x, weight, offsets, K, "gaussian", **where) == able.backend
    assert together(x, weight, ends, K, "gaussian", **where) is None
    assert together(x, weight, offsets, K, "hadamard", **where) is None
    assert together(x, weight.half(), offsets, K, "gaussian", **where) is None
    assert together(x, weight, offsets, K, "gaussian", asked) is None
    assert together(x[:0], weight, offsets, K, "gaussian", **where) is None
    for more in ({"strategy": "panel"}, {"noise": "hadamard"}):
        y = grouped(able, given, offsets, {**options, **more})
        assert_close(y, grouped(able, given, ends, {**options, **more}))
    assert "linear_forward" not in launches and launches


def test_mean_rows_decide(able: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 512 of an expert it is one launch; above, where one expert by itself would be fused by this backend."""
    device = torch.device(able.device)
    choice = resolve(able.backend, None, None, able.device, torch.float32, N * K, "gaussian")
    problem = (device, torch.float32, 4096, 4096)

    def together(rows: int, noise: str | None = "gaussian") -> str | None:
        dispatch.together.cache_clear()
        return dispatch.together(choice, noise, rows, *problem)

    way = dispatch.way(choice, "gaussian", 2048, *problem)
    for strategy, want in (("fused", able.backend), ("panel", None)):
        decision = way._replace(backend=able.backend, strategy=strategy)
        monkeypatch.setattr(dispatch, "way", lambda *a, decision=decision: decision)
        assert together(512) == able.backend and together(513) == want
    assert together(512, None) == able.backend and together(513, None) is None
    dispatch.together.cache_clear()
