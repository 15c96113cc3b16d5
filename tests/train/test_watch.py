"""Noise that is off by mistake is said, once, and nothing else is."""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
from small_models import model_and_controller, trainable
from targets import randn
from torch import Tensor, nn

from flatlora_kernels import NoiseController, apply_flat_lora

BYPASSED = "trained without weight noise, because their forward did not run"


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class Experts(nn.Module):
    """The input goes to one of two."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList((Expert(), Expert()))
        self.chosen = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[self.chosen](x)


def reads_adapters_itself(self: Expert, x: Tensor) -> Tensor:
    """As fused LoRA kernels do: the layers are not called."""
    for layer, last in ((self.up, False), (self.down, True)):
        y = nn.functional.linear(x, layer.weight, layer.bias)
        y = y + layer.scaling * (x @ layer.lora_A.t()) @ layer.lora_B.t()
        x = y if last else y.tanh()
    return x


def converted(**options: Any) -> tuple[Experts, NoiseController, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Experts()
    controller = NoiseController(**{"sigma": 0.1, "seed": 1, **options})
    apply_flat_lora(
        model, ["up", "down"], r=2, noise_controller=controller, backend="reference", verbose=False
    )
    return model, controller, torch.optim.AdamW(trainable(model), lr=1e-2)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, advance: Any = None) -> list[str]:
    """The warnings of a plain loop."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(count):
            model(randn(4, 6, seed=t)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if advance is not None:
                advance()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("fused", [False, True])
def test_layers_whose_forward_never_runs_are_named_once(schedule: str, fused: bool) -> None:
    """Fused optimisers write to parameters without a trace."""
    model, controller, _ = converted(schedule=schedule, total_steps=8)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
    model.experts[0].forward = types.MethodType(reads_adapters_itself, model.experts[0])
    controller.attach(optimizer)
    (said,) = steps(model, optimizer, 6)
    assert said.startswith(f"2 of 4 layers were {BYPASSED}")
    assert "'experts.0.up', 'experts.0.down'" in said and "experts.1" not in said
    assert "Unsloth" in said and "axolotl" in said


def test_no_word_where_every_forward_runs_or_nothing_trains() -> None:
    model, controller, optimizer = converted()
    controller.attach(optimizer)
    assert steps(model, optimizer, 4) == [], "the other expert has no gradients, and does not change"
    model.experts[1].eval()
    model.experts[1].forward = types.MethodType(reads_adapters_itself, model.experts[1])
    model.chosen = 1
    assert steps(model, optimizer, 4) == [], "eval mode has no noise anyway"
    model, controller, optimizer = converted(sigma=0.0)
    model.experts[0].forward = types.MethodType(reads_adapters_itself, model.experts[0])
    assert steps(model, optimizer, 4, controller.advance) == []
    model, controller, optimizer = converted()
    model.experts[0].forward = types.MethodType(reads_adapters_itself, model.experts[0])
    with controller.disabled():
        assert steps(model, optimizer, 4, controller.advance) == []
    model, controller, _ = converted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            controller.advance()


@pytest.mark.parametrize("expected", [["experts"], ["experts.1"], r"experts\.\d", r".*\.1\.(up|down)"])
def test_layers_that_a_step_may_leave_out(expected: Any) -> None:
    """Experts whose gradients are zero, as DistributedDataParallel gives them: AdamW moves them nevertheless."""
    for excused in (False, True):
        model, controller, optimizer = converted(**({"expect_unused": expected} if excused else {}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for t in range(3):
                model(randn(4, 6, seed=t)).square().mean().backward()
                for p in trainable(model):
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                optimizer.step()
                optimizer.zero_grad()
                controller.advance()
        said = [str(w.message) for w in caught]
        assert said == [] if excused else BYPASSED in said[0] and "'experts.1.up'" in said[0]


def test_a_loaded_adapter_is_no_training() -> None:
    model, controller, _ = converted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with torch.no_grad():
                model.experts[0].up.lora_B.fill_(1.0)
            controller.advance()
            controller.advance()
    assert controller.step == 6 and not controller._said


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "schedule, what", [("constant", "every step sees the same noise"), ("cosine", "no noise is drawn")]
)
def test_a_controller_that_nobody_moves_on(schedule: str, what: str, fused: bool) -> None:
    model, _, _ = converted(schedule=schedule, total_steps=8)
    (said,) = steps(model, torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused), 6)
    assert said.startswith(
        "2 layers are being trained, and their NoiseController is still at step 0: with schedule="
    )
    assert what in said and "controller.attach(optimizer)" in said and "FlatLoraCallback" in said


def test_a_compiled_model_whose_controller_nobody_moves_on() -> None:
    model, _, optimizer = converted()
    torch._dynamo.reset()
    (said,) = steps(torch.compile(model, backend="eager"), optimizer, 3)
    assert "still at step 0" in said


def test_no_word_where_somebody_moves_it_on_or_nothing_is_trained() -> None:
    for drive in (
        lambda controller, optimizer: controller.attach(optimizer) and None,
        lambda controller, optimizer: controller.advance,
    ):
        model, controller, optimizer = converted()
        assert steps(model, optimizer, 4, drive(controller, optimizer)) == []
        other = nn.Linear(6, 6)
        assert steps(other, torch.optim.SGD(other.parameters(), lr=0.1), 4) == []
    model, controller, optimizer = converted(sigma=0.0)
    assert steps(model, optimizer, 4) == []
    model, controller, _ = converted()
    halves = [torch.optim.SGD(part, lr=0.1) for part in (trainable(model)[:4], trainable(model)[4:])]

    class Both:
        def step(self) -> None:
            for optimizer in halves:
                optimizer.step()

        def zero_grad(self, set_to_none: bool) -> None:
            for optimizer in halves:
                optimizer.zero_grad()

    assert steps(model, Both(), 4, controller.advance) == [], "two optimisers take one step"


def test_advancing_before_the_step_is_no_bypass() -> None:
    model, controller, optimizer = converted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(3):
            model(randn(4, 6, seed=t)).square().mean().backward()
            controller.advance()
            optimizer.step()
            optimizer.zero_grad()
    assert controller.step == 3 and not controller._said


def test_a_batch_of_one() -> None:
    def said(*shapes: tuple[int, ...]) -> list[str]:
        model, _ = model_and_controller(samples="batch")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for shape in shapes:
                model(randn(*shape))
        return [str(w.message) for w in caught]

    (text,) = said((1, 8, 6), (1, 8, 6))
    assert text.startswith('samples="batch" is one sample for an input of shape (1, 8, 6)')
    assert said((3, 8, 6), (1, 8, 6)) == [], "the last batch of an epoch"
    assert len(said((1, 6))) == 1
    model, _ = model_and_controller(samples="batch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(randn(1, 8, 6))


def test_repr_shows_the_present_and_the_target() -> None:
    model, controller = model_and_controller(sigma=0.4, schedule="linear", total_steps=4)
    controller.advance()
    assert repr(controller) == (
        "NoiseController(sigma=0.1 of 0.4, schedule='linear', step=1 of 4, seed=1, layers=2)"
    )
    with controller.disabled():
        assert "disabled" in repr(controller)
    assert "disabled" not in repr(controller)
    unknown = NoiseController(sigma=0.4, schedule="cosine", seed=1, rank=3, norm="row")
    unknown.load_state_dict({"base": 1, "step": 2})
    assert repr(unknown) == (
        "NoiseController(sigma=? of 0.4, schedule='cosine', step=2, seed=1, rank=3, norm='row', layers=0)"
    )
    assert "sigma=0.1 of 0.4, noise=gaussian, stream=1" in repr(model)
