"""Calls like one before: checked no more, and past torch's dispatcher where nobody watches, with nothing lost by it."""

from __future__ import annotations

from typing import Any

import pytest
import test_errors
import torch
from targets import randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flatlora_kernels as fk
from flatlora_kernels.op import checks, functional


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """What has passed the checks: nothing yet."""
    empty: dict[Any, Any] = {}
    monkeypatch.setattr(functional, "_passed", empty)
    return empty


def small(**more: Any) -> dict[str, Any]:
    """`backend` is left to choose, as most calls leave it."""
    return {**test_errors.linear_arguments(), "stream": 1, "samples": 1, **more}


def test_a_call_like_one_before_is_not_checked(passed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fk.fused_flat_lora_linear(**small())
    seen: list[str] = []
    for name in ("linear", "draw", "noise_scale", "seed", "sample_range"):
        monkeypatch.setattr(checks, name, lambda *_, name=name: seen.append(name))
    # Other values, streams and samples of the same shapes.
    fk.fused_flat_lora_linear(**small(stream=7, sample_offset=3))
    assert not seen
    fk.fused_flat_lora_linear(**small(x=randn(4, test_errors.K)))
    assert seen == ["linear", "draw", "sample_range", "noise_scale", "seed"]


@pytest.mark.parametrize("case", test_errors.LINEAR)
def test_every_error_comes_after_a_good_call(case: str, passed: Any) -> None:
    for more in ({}, {"noise_scale": None, "sigma": 0.1}, {"noise_scale": None, "seed": None}):
        for stream, samples in ((1, 1), (0, 2)):
            fk.fused_flat_lora_linear(**small(**more, stream=stream, samples=samples))
    assert passed
    changes, error, name, got, expected = test_errors.LINEAR[case]
    for _ in range(2):
        with pytest.raises(error) as caught:
            fk.fused_flat_lora_linear(**{**test_errors.linear_arguments(), **changes})
        assert (
            str(caught.value).startswith(name) and got in str(caught.value) and expected in str(caught.value)
        )


@pytest.mark.parametrize(
    ("name", "good", "wrong"),
    [
        ("stream", 1, True), ("stream", 0, False), ("samples", 1, True), ("samples", 1, 1.0), ("row_offset", 0, False),
        ("row_offset", 0, 0.0), ("col_offset", 8, 8.0), ("sample_offset", 0, 0.0), ("scaling", 1.0, True),
        ("sigma", 0.0, False), ("layer_shape", (8, 24), (8.0, 24)), ("layer_shape", (8, 24), (8, 24.0)),
        ("seed", 1, True), ("seed", 1, 1.0),
    ],
)  # fmt: skip
def test_what_is_equal_is_not_the_same(name: str, good: Any, wrong: Any, passed: Any) -> None:
    fk.fused_flat_lora_linear(
        **small(noise="hadamard", **{name: good} if name not in small() else {}) | {name: good}
    )
    with pytest.raises(TypeError, match=name):
        fk.fused_flat_lora_linear(**small(noise="hadamard") | {name: wrong})


def test_tensors_that_change_are_checked_again(passed: Any) -> None:
    given = small()
    fk.fused_flat_lora_linear(**given)
    given["weight"].data = randn(test_errors.N + 1, test_errors.K)
    with pytest.raises(ValueError, match="lora_B: expected shape"):
        fk.fused_flat_lora_linear(**given)
    given = small()
    given["lora_A"].data = given["lora_A"].double()
    with pytest.raises(TypeError, match="lora_A: expected"):
        fk.fused_flat_lora_linear(**given)
    given = small()
    given["noise_scale"].requires_grad_()
    with pytest.raises(ValueError, match="noise_scale: expected a constant"):
        fk.fused_flat_lora_linear(**given)


def test_what_passed_is_bounded(passed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_MOST", 3)
    for rows in range(1, 9):
        fk.fused_flat_lora_linear(**small(x=randn(rows, test_errors.K)))
        assert 0 < len(passed) <= 3


# Who watches sees the ops.


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


OPS = ["flatlora.linear.default", "flatlora.adapter_grads.default", "flatlora.linear_input_grad.default"]


def step(given: dict[str, Any]) -> dict[str, Tensor]:
    names = ("x", "weight", "lora_A", "lora_B", "bias")
    leaves = {k: given[k].detach().requires_grad_() for k in names}
    y = fk.fused_flat_lora_linear(**{**given, **leaves})
    grads = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


@pytest.mark.parametrize("noisy", [True, False])
def test_both_paths_give_the_same_bits(noisy: bool, passed: Any) -> None:
    given = small() if noisy else small(noise_scale=None, seed=None)
    direct = step(given)
    with Watch() as watch:
        dispatched = step(given)
    assert [op for op in watch.seen if op.startswith("flatlora")] == OPS
    for name, value in direct.items():
        assert torch.equal(value, dispatched[name]), name


def test_nobody_pays_for_the_dispatcher_who_does_not_watch(
    passed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = small()
    step(given)
    calls: list[int] = []
    monkeypatch.setattr(functional, "watched", lambda: bool(calls.append(1)))
    op = torch.ops.flatlora.linear
    monkeypatch.setattr(torch.ops.flatlora, "linear", None)
    step(given)
    monkeypatch.setattr(torch.ops.flatlora, "linear", op)
    assert calls


def test_a_profile_names_the_op(passed: Any) -> None:
    given = small()
    step(given)
    with torch.profiler.profile() as profile:
        step(given)
    assert "flatlora::linear" in {event.key for event in profile.key_averages()}


def test_subclasses_and_transforms_go_through_the_dispatcher(passed: Any) -> None:
    class Tagged(Tensor):
        pass

    given = small()
    expected = fk.fused_flat_lora_linear(**given)
    y = fk.fused_flat_lora_linear(**{**given, "x": given["x"].as_subclass(Tagged)})
    assert torch.equal(y.as_subclass(Tensor), expected)
    batch = torch.stack([given["x"], 2 * given["x"]])
    mapped = torch.vmap(lambda x: fk.fused_flat_lora_linear(**{**given, "x": x}))(batch)
    for one, x in zip(mapped, batch, strict=True):
        assert torch.equal(one, fk.fused_flat_lora_linear(**{**given, "x": x}))


def test_lazy_negation_and_zeros(passed: Any) -> None:
    given = small()
    step(given)
    x = given["x"]
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    expected = fk.fused_flat_lora_linear(**given)
    lazy = {name: torch._neg_view(-given[name]) for name in ("weight", "bias", "lora_B", "noise_scale")}
    for name, tensor in {"x": negative, **lazy}.items():
        fk.fused_flat_lora_linear(**given)
        assert torch.equal(fk.fused_flat_lora_linear(**{**given, name: tensor}), expected), name
    zeros = fk.fused_flat_lora_linear(**{**given, "x": torch._efficientzerotensor(x.shape)})
    assert torch.equal(zeros, fk.fused_flat_lora_linear(**{**given, "x": torch.zeros_like(x)}))
    leaf = x.clone().requires_grad_()
    y = fk.fused_flat_lora_linear(**{**given, "x": leaf})
    grad_y = randn(*y.shape)
    (expected,) = torch.autograd.grad(y, leaf, grad_y, retain_graph=True)
    (dx,) = torch.autograd.grad(y, leaf, torch._neg_view(-grad_y), retain_graph=True)
    assert torch.equal(dx, expected)
    (dx,) = torch.autograd.grad(y, leaf, torch._efficientzerotensor(y.shape))
    assert torch.equal(dx, torch.zeros_like(dx))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_the_output_may_be_written_to(watched: bool, grad: bool, passed: Any) -> None:
    """As that of `F.linear`: residual connections add in place. It is no view, whatever the dimensions of x."""
    given = small(x=randn(2, 3, test_errors.K))
    given["lora_A"].requires_grad_(grad)
    extra = torch.ones(test_errors.N, requires_grad=True)
    with Watch() if watched else torch.enable_grad():
        y = fk.fused_flat_lora_linear(**given)
        y += extra
    assert not y._is_view()
    y.sum().backward()
    assert torch.equal(extra.grad, torch.full_like(extra, 6.0))
    with torch.no_grad():
        y = fk.fused_flat_lora_linear(**given)
    y.add_(extra)


def test_a_backward_that_comes_too_late_is_noticed(passed: Any) -> None:
    given = small()
    for name in ("noise_scale", "weight"):
        x = given["x"].clone().requires_grad_()
        y = fk.fused_flat_lora_linear(**{**given, "x": x})
        given[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_saved_tensors_go_through_hooks(passed: Any) -> None:
    """Offloading brings back other tensors: the backward draws by those."""
    given = small(seed=torch.tensor(1))
    x = given["x"].clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = fk.fused_flat_lora_linear(**{**given, "x": x})
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    given["noise_scale"].zero_()
    given["seed"].add_(1)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
