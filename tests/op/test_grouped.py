"""Mixtures of experts: the grouped op is one call of the op for each expert that has rows. Where it is one launch, see
test_grouped_launch.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from allocations import Allocations
from compare import assert_close
from targets import Target, randn, ready
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flatlora_kernels as fk
from flatlora_kernels.core.records import Choice, Draw
from flatlora_kernels.op import compute, mixture

E, M, N, K, R = 5, 23, 17, 40, 3
SEED, STREAM = 0x9E3779B97F4A7C15, 7
ROUTINGS = {
    "uneven": [4, 4, 11, 12, 23],  # expert 1 has no rows
    "ends empty": [0, 9, 9, 23, 23],
    "first alone": [23, 23, 23, 23, 23],
    "last alone": [0, 0, 0, 0, 23],
}
Inputs = dict[str, Any]


def inputs(target: Target, dtype: torch.dtype = torch.float32, rows: int = M) -> Inputs:
    place = {"dtype": dtype, "device": target.device}
    return {
        "x": randn(rows, K, seed=1, **place),
        "weight": (randn(E, N, K, seed=2) / K**0.5).to(**place),
        "lora_A": (randn(E, R, K, seed=3) / K**0.5).to(**place),
        "lora_B": randn(E, N, R, seed=4, **place),
        "bias": randn(E, N, seed=5, **place),
    }


def noise_scale(target: Target) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return (0.2 / K**0.5 * (0.5 + torch.rand(E, N, generator=generator))).to(target.device)


def drawn(target: Target, **more: Any) -> dict[str, Any]:
    return {"scaling": 0.75, "noise_scale": noise_scale(target), "seed": SEED, "stream": STREAM, **more}


def strategy_for(target: Target, noise: str) -> str:
    return "fused" if noise in target.module.FUSES else "transform"


def separately(target: Target, given: Inputs, ends: list[int], options: dict[str, Any]) -> Tensor:
    """One call of the op for each expert."""
    parts, start = [], 0
    scales = options["noise_scale"]
    for e, end in enumerate(ends):
        if end > start:
            own = {name: None if t is None else t[e] for name, t in given.items() if name != "x"}
            more = {**options, "stream": options["stream"] + e, "noise_scale": scales[e]}
            parts.append(target.linear(given["x"][start:end], **own, **more))
        start = end
    return torch.cat(parts)


def grouped(target: Target, given: Inputs, ends: Any, options: dict[str, Any]) -> Tensor:
    strategy = strategy_for(target, options.get("noise", "gaussian"))
    return fk.fused_flat_lora_grouped_linear(
        **given, offsets=ends, backend=target.backend, **{"strategy": strategy, **options}
    )


def with_gradients(given: Inputs) -> Inputs:
    return {name: None if t is None else t.detach().clone().requires_grad_() for name, t in given.items()}


def gradients(y: Tensor, given: Inputs) -> dict[str, Tensor]:
    grad_y = randn(*y.shape, seed=7, dtype=y.dtype, device=str(y.device))
    leaves = {name: t for name, t in given.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_equal_to_separate_calls(target: Target, dtype: torch.dtype, noise: str, routing: str) -> None:
    """Bit for bit, output and every gradient."""
    ends, options = ROUTINGS[routing], drawn(target, noise=noise)
    ours, theirs = (with_gradients(inputs(target, dtype)) for _ in range(2))
    y, want = grouped(target, ours, ends, options), separately(target, theirs, ends, options)
    assert y.shape == (M, N) and y.dtype == dtype
    assert torch.equal(y, want)
    expected = gradients(want, theirs)
    for name, grad in gradients(y, ours).items():
        assert torch.equal(grad, expected[name]), name


def test_eps_is_that_of_stream_plus_e(target: Target, noise: str) -> None:
    """With rows of the unit matrix and no weight the output is eps itself."""
    scale = noise_scale(target)
    x = torch.eye(K, device=target.device).repeat(E, 1)
    y = fk.fused_flat_lora_grouped_linear(
        x,
        torch.zeros((), device=target.device).expand(E, N, K),
        offsets=[K * (e + 1) for e in range(E)],
        noise_scale=scale,
        seed=SEED,
        stream=STREAM,
        noise=noise,
        strategy="panel",
        backend=target.backend,
    )
    for e in range(E):
        eps = target.noise(scale[e], K, seed=SEED, stream=STREAM + e, noise=noise)
        assert torch.equal(y[K * e : K * (e + 1)].t(), eps)
        assert eps.abs().max() > 0


@pytest.mark.parametrize("form", [torch.int32, torch.int64, list, tuple])
def test_forms_of_offsets(target: Target, form: Any) -> None:
    given, ends, options = inputs(target), ROUTINGS["uneven"], drawn(target)
    offsets = (
        torch.tensor(ends, dtype=form, device=target.device) if isinstance(form, torch.dtype) else form(ends)
    )
    assert torch.equal(grouped(target, given, offsets, options), separately(target, given, ends, options))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_layouts_of_the_weight(target: Target, dtype: torch.dtype, layout: str) -> None:
    given, ends, options = inputs(target, dtype), ROUTINGS["uneven"], drawn(target)
    weight = given["weight"]
    if layout == "transposed":
        given["weight"] = weight.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        given["weight"] = weight.repeat_interleave(2, 0)[::2]
    else:
        weight = given["weight"] = weight[:1].expand(E, N, K)
    assert torch.equal(given["weight"], weight)
    y = grouped(target, given, ends, options)
    assert_close(y, separately(target, {**given, "weight": weight.contiguous()}, ends, options))


@pytest.mark.parametrize("left_out", ["bias", "adapter", "noise"])
def test_what_may_be_left_out(target: Target, left_out: str) -> None:
    given, ends, options = inputs(target), ROUTINGS["uneven"], drawn(target)
    for name in {"bias": ["bias"], "adapter": ["lora_A", "lora_B"]}.get(left_out, []):
        given[name] = None
    if left_out == "noise":
        zero = {**options, "noise_scale": torch.zeros(E, N, device=target.device)}
        assert_close(
            fk.fused_flat_lora_grouped_linear(**given, offsets=ends, scaling=0.75, backend=target.backend),
            separately(target, given, ends, zero),
        )
    else:
        assert torch.equal(grouped(target, given, ends, options), separately(target, given, ends, options))


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_halves_of_an_expert_parallel_group(target: Target, noise: str, cut: int) -> None:
    """A rank with the experts from `cut` on passes stream + cut, and draws what the whole would."""
    given, ends, options = inputs(target), ROUTINGS["uneven"], drawn(target, noise=noise)
    whole = grouped(target, given, ends, options)
    parts = []
    for first, last in ((0, cut), (cut, E)):
        begin = ends[first - 1] if first else 0
        own = {name: t[first:last] for name, t in given.items() if name != "x"}
        own["x"] = given["x"][begin : ends[last - 1]]
        scale = options["noise_scale"][first:last]
        more = {**options, "stream": STREAM + first, "noise_scale": scale}
        parts.append(grouped(target, own, [end - begin for end in ends[first:last]], more))
    assert torch.equal(torch.cat(parts), whole)


def test_shards_of_each_expert(target: Target, noise: str) -> None:
    """Rows of every expert's weight on two ranks."""
    given, ends = inputs(target), ROUTINGS["uneven"]
    options = drawn(target, noise=noise, layer_shape=(N, K), strategy="panel")
    whole = grouped(target, given, ends, options)
    parts = []
    for a, b in ((0, 6), (6, N)):
        own = {**given, **{name: given[name][:, a:b] for name in ("weight", "lora_B", "bias")}}
        more = {**options, "row_offset": a, "noise_scale": options["noise_scale"][:, a:b]}
        parts.append(grouped(target, own, ends, more))
    assert_close(torch.cat(parts, 1), whole)


def test_antithetic(target: Target) -> None:
    given = inputs(target)
    given |= {"weight": torch.zeros_like(given["weight"]), "lora_A": None, "lora_B": None, "bias": None}
    one, other = (
        grouped(target, given, ROUTINGS["uneven"], drawn(target, antithetic=True, sample_offset=s))
        for s in (4, 5)
    )
    assert one.abs().min() > 0
    assert_close(one, -other)


def test_sigma(target: Target) -> None:
    """Each expert's own norms."""
    given, ends, options = inputs(target), ROUTINGS["uneven"], drawn(target)
    A, B = given["lora_A"], given["lora_B"]
    scale = fk.grouped_noise_scale(given["weight"], A, B, scaling=0.75, sigma=0.3, backend=target.backend)
    norms = (given["weight"].double() + 0.75 * (B.double() @ A.double())).norm(dim=2)
    torch.testing.assert_close(scale, (0.3 / K**0.5 * norms).float(), rtol=1e-5, atol=0)
    assert scale.shape == (E, N) and not scale.requires_grad
    shard = fk.grouped_noise_scale(
        given["weight"], A, B, scaling=0.75, sigma=0.3, in_features=4 * K, backend=target.backend
    )
    torch.testing.assert_close(2 * shard, scale, rtol=1e-6, atol=0)
    want = grouped(target, given, ends, {**options, "noise_scale": scale})
    del options["noise_scale"]
    assert torch.equal(grouped(target, given, ends, {**options, "sigma": 0.3}), want)


def test_no_rows(target: Target) -> None:
    given = with_gradients(inputs(target, rows=0))
    y = grouped(target, given, [0] * E, drawn(target))
    assert y.shape == (0, N)
    assert all(not grad.any() for grad in gradients(y, given).values())


def test_experts_without_rows_cost_nothing(target: Target) -> None:
    """Neither read (they hold NaN) nor drawn, and their gradients are zero."""
    given, ends, options = inputs(target), ROUTINGS["uneven"], drawn(target)
    for name in ("weight", "lora_A", "lora_B", "bias"):
        given[name][1] = float("nan")
    options["noise_scale"][1] = float("nan")
    given = with_gradients(given)
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        linear = compute.linear
        patch.setattr(compute, "linear", lambda *a: calls.append(a) or linear(*a))
        y = grouped(target, given, ends, options)
    assert y.isfinite().all() and len(calls) == 4
    for name, grad in gradients(y, given).items():
        assert grad.isfinite().all()
        if name != "x":
            assert not grad[1].any() and all(grad[e].any() for e in (0, 2, 3, 4))
    del options["noise_scale"]
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        norms = target.module.row_sq_norms
        patch.setattr(target.module, "row_sq_norms", lambda *a, **k: calls.append(a) or norms(*a, **k))
        assert grouped(target, given, ends, {**options, "sigma": 0.3}).isfinite().all()
    assert len(calls) == 4


def test_a_frozen_weight_gets_no_gradient_and_nothing_of_its_size() -> None:
    ready(Target("cpu", "cpu"))
    given = {
        "x": randn(M, 96).requires_grad_(),
        "weight": randn(E, 96, 96),
        "lora_A": randn(E, R, 96).requires_grad_(),
        "lora_B": randn(E, 96, R).requires_grad_(),
    }
    with Allocations() as ours:
        fk.fused_flat_lora_grouped_linear(
            **given, offsets=ROUTINGS["uneven"], sigma=0.3, seed=1
        ).sum().backward()
    assert given["weight"].grad is None
    assert 0 < ours.largest < 96 * 96
    # What is below the op, too.
    draw = Draw(torch.ones(E, 96), torch.tensor(5), STREAM)
    with Allocations() as inside:
        arguments = (*given.values(), None, ROUTINGS["uneven"], 1.0, draw, Choice("fused", "folded", "cpu"))
        mixture.direct_linear(*arguments).sum().backward()
    assert 0 < inside.largest < 96 * 96


def test_autocast(target: Target) -> None:
    """As the op itself: what is computed has the type of autocast, gradients those of their parameters."""
    given, ends, options = with_gradients(inputs(target)), ROUTINGS["uneven"], drawn(target)
    cast = {name: t.detach().bfloat16() for name, t in given.items()}
    want = grouped(target, cast, ends, options)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        y = grouped(target, given, ends, options)
        assert torch.equal(y, want)
        inside = gradients(grouped(target, given, ends, options), given)
    outside = gradients(y, given)
    assert all(grad.dtype == torch.float32 and grad.any() for grad in outside.values())
    assert all(torch.equal(grad, outside[name]) for name, grad in inside.items())


def test_float32_adapter_beside_16_bits(target: Target) -> None:
    given, ends, options = inputs(target, torch.bfloat16), ROUTINGS["uneven"], drawn(target)
    given |= {name: given[name].float() for name in ("lora_A", "lora_B", "bias")}
    assert torch.equal(grouped(target, given, ends, options), separately(target, given, ends, options))


def test_compiled(target: Target) -> None:
    """One graph for every routing: the op reads the offsets when it runs, and refuses them then."""
    options = {**drawn(target), "strategy": "fused", "backend": target.backend}
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def layer(given: Inputs, offsets: Tensor) -> Tensor:
        return torch.tanh(fk.fused_flat_lora_grouped_linear(**given, offsets=offsets, **options)) * 2

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for ends in ROUTINGS.values():
        offsets = torch.tensor(ends, device=target.device)
        ours, theirs = (with_gradients(inputs(target)) for _ in range(2))
        y, want = compiled(ours, offsets), layer(theirs, offsets)
        assert torch.equal(y, want)
        expected = gradients(want, theirs)
        for name, grad in gradients(y, ours).items():
            assert torch.equal(grad, expected[name])
    assert len(graphs) == 1
    with pytest.raises(ValueError, match=r"^offsets: expected .*, got 22 as the last end"):
        compiled(with_gradients(inputs(target)), torch.tensor([4, 4, 4, 4, 22], device=target.device))
    torch._dynamo.reset()


def test_compiled_with_norms(target: Target) -> None:
    """Norms are measured in the graph, of all experts: it does not know which have rows."""
    given, ends = inputs(target), torch.tensor(ROUTINGS["uneven"], device=target.device)
    weight, A, B = given["weight"], given["lora_A"], given["lora_B"]
    strategy = strategy_for(target, "gaussian")

    def layer(sigma: float) -> Tensor:
        return fk.fused_flat_lora_grouped_linear(
            **given, offsets=ends, sigma=sigma, seed=SEED, backend=target.backend, strategy=strategy
        )

    def norms(sigma: float) -> Tensor:
        return fk.grouped_noise_scale(weight, A, B, sigma=sigma, backend=target.backend)

    torch._dynamo.reset()
    for function in (layer, norms):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(0.3), function(0.3))
    torch._dynamo.reset()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_op(target: Target, frozen: bool) -> None:
    """Schema, fakes and derivative, as torch checks them."""
    given, options = inputs(target), drawn(target)
    for name, t in given.items():
        t.requires_grad_(not (frozen and name in ("weight", "bias")))
    scale, seed = options["noise_scale"], torch.tensor(5, device=target.device)
    draw = Draw(scale, seed, STREAM, "gaussian", 1, 0, False, 0, 0, 0)
    offsets = torch.tensor(ROUTINGS["uneven"], device=target.device)
    torch.library.opcheck(
        torch.ops.flatlora.grouped_linear.default,
        (*given.values(), offsets, 0.75, *draw, "fused", "folded", target.backend),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def test_watched(target: Target) -> None:
    """A mode sees the ops, and the results are the same."""
    offsets, options = torch.tensor(ROUTINGS["uneven"], device=target.device), drawn(target)
    ours, theirs = (with_gradients(inputs(target)) for _ in range(2))
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        y = grouped(target, ours, offsets, options)
        got = gradients(y, ours)
    want = grouped(target, theirs, offsets, options)
    assert torch.equal(y, want)
    expected = gradients(want, theirs)
    assert all(torch.equal(grad, expected[name]) for name, grad in got.items())
    assert {f"flatlora.{name}.default" for name in ("grouped_linear", "grouped_linear_grads")} <= set(seen)


@pytest.mark.parametrize(
    "trained", [("x",), ("lora_A",), ("lora_B",), ("lora_A", "lora_B"), ("bias",), ("weight",)]
)
def test_gradients_of_some_inputs(target: Target, trained: tuple[str, ...]) -> None:
    ends, options = ROUTINGS["uneven"], drawn(target)
    ours, theirs = (with_gradients(inputs(target)) for _ in range(2))
    for given in (ours, theirs):
        for name, t in given.items():
            t.requires_grad_(name in trained)
    expected = gradients(separately(target, theirs, ends, options), theirs)
    got = gradients(grouped(target, ours, ends, options), ours)
    assert got.keys() == set(trained)
    assert all(torch.equal(grad, expected[name]) for name, grad in got.items())


def test_what_is_saved_may_be_kept_elsewhere(target: Target) -> None:
    """Hooks bring back what the forward saw, whatever has become of it."""
    ends, options, given = ROUTINGS["uneven"], drawn(target), with_gradients(inputs(target))
    want = gradients(grouped(target, given, ends, options), given)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = grouped(target, given, ends, options)
    options["noise_scale"].zero_()
    got = gradients(y, given)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_a_backward_that_comes_too_late(target: Target) -> None:
    options, given = drawn(target), with_gradients(inputs(target))
    y = grouped(target, given, ROUTINGS["uneven"], options)
    options["noise_scale"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_lazily_negated_gradient(target: Target) -> None:
    ends, options, given = ROUTINGS["uneven"], drawn(target), with_gradients(inputs(target))
    grads = []
    for negate in (torch._neg_view, torch.neg):
        y = grouped(target, given, ends, options)
        grad_y = negate(randn(*y.shape, device=target.device))
        grads.append(torch.autograd.grad(y, list(given.values()), grad_y))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_second_derivative(target: Target) -> None:
    given = with_gradients(inputs(target))
    y = grouped(target, given, ROUTINGS["uneven"], drawn(target))
    (grad,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="flatlora::grouped_linear: cannot be differentiated twice"):
        grad.sum().backward()


REFUSED = {
    "x of three dimensions": ({"x": randn(2, 3, K)}, ValueError, "x: ", "(2, 3, 40)"),
    "x of another type": ({"x": randn(M, K).double()}, TypeError, "weight: ", "float32"),
    "x of another width": ({"x": randn(M, K + 1)}, ValueError, "x: ", f"({M}, {K + 1})"),
    "x missing": ({"x": None}, TypeError, "x: ", "NoneType"),
    "a weight of two": ({"weight": randn(N, K)}, ValueError, "weight: ", f"({N}, {K})"),
    "no experts": ({"weight": randn(0, N, K)}, ValueError, "weight: ", f"(0, {N}, {K})"),
    "an integer weight": ({"weight": torch.ones(E, N, K, dtype=torch.int8)}, TypeError, "weight: ", "int8"),
    "no weight": ({"weight": None}, TypeError, "weight: ", "NoneType"),
    "A alone": ({"lora_B": None}, ValueError, "lora_B: ", "None"),
    "A of two": ({"lora_A": randn(R, K)}, ValueError, "lora_A: ", f"({R}, {K})"),
    "A of fewer": ({"lora_A": randn(E - 1, R, K)}, ValueError, "lora_A: ", f"({E - 1}, {R}, {K})"),
    "B of another rank": ({"lora_B": randn(E, N, R + 1)}, ValueError, "lora_B: ", f"({N}, {R + 1})"),
    "one bias for all": ({"bias": randn(N)}, ValueError, "bias: ", f"({N},)"),
    "noise_scale of one": ({"noise_scale": torch.ones(N)}, ValueError, "noise_scale: ", f"({N},)"),
    "noise_scale of 16 bits": (
        {"noise_scale": torch.ones(E, N).half()}, TypeError, "noise_scale: ", "float16",
    ),
    "noise_scale that trains": (
        {"noise_scale": torch.ones(E, N).requires_grad_()}, ValueError, "noise_scale: ", "requires grad",
    ),
    "no seed": ({"seed": None}, ValueError, "seed: ", "None"),
    "offsets of floats": ({"offsets": torch.ones(E)}, TypeError, "offsets: ", "float32"),
    "offsets of two dimensions": (
        {"offsets": torch.ones(1, E, dtype=torch.int32)}, ValueError, "offsets: ", f"(1, {E})",
    ),
    "too few offsets": ({"offsets": [4, 23]}, ValueError, "offsets: ", "2 ints"),
    "offsets of something else": ({"offsets": [1.0] * E}, TypeError, "offsets: ", "[1.0"),
    "an offset that falls": ({"offsets": [4, 3, 9, 9, 23]}, ValueError, "offsets: ", "3 for expert 1 after 4"),
    "an offset below 0": ({"offsets": [-1, 3, 9, 9, 23]}, ValueError, "offsets: ", "-1 for expert 0 after 0"),
    "rows after the last": ({"offsets": [4, 4, 4, 4, 22]}, ValueError, "offsets: ", "22 as the last end"),
    "too few rows": (
        {"offsets": torch.tensor([4, 4, 4, 4, 24])}, ValueError, "offsets: ", "24 as the last end",
    ),
    "a stream too far": ({"stream": 2**32 - 4}, ValueError, "stream: ", f"{2**32 - 4} for 5 experts"),
    "an unknown noise": ({"noise": "pink"}, ValueError, "noise: ", "pink"),
    "an unknown strategy": ({"strategy": "magic"}, ValueError, "strategy: ", "magic"),
    "sigma below 0": ({"noise_scale": None, "sigma": -1.0}, ValueError, "sigma: ", "-1.0"),
    "a sample too far": ({"sample_offset": 2**32}, ValueError, "sample_offset: ", str(2**32)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_errors(case: str) -> None:
    changes, error, name, got = REFUSED[case]
    target = Target("reference", "cpu")
    arguments = {**inputs(target), **drawn(target), "offsets": ROUTINGS["uneven"], **changes}
    with pytest.raises(error) as caught:
        fk.fused_flat_lora_grouped_linear(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{name}expected ") and got in message.rsplit(", got ", 1)[1], message


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"weight": randn(N, K)}, "weight"),
        ({"lora_A": randn(R, K)}, "lora_A"),
        ({"sigma": -1.0}, "sigma"),
        ({"in_features": 0}, "in_features"),
    ],
)
def test_errors_of_grouped_noise_scale(changes: dict[str, Any], name: str) -> None:
    given = inputs(Target("reference", "cpu"))
    arguments = {
        "weight": given["weight"],
        "lora_A": given["lora_A"],
        "lora_B": given["lora_B"],
        "sigma": 0.1,
    }
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        fk.grouped_noise_scale(**{**arguments, **changes})
