"""KeyboardInterrupt, errors of hooks and of backward passes: the next step and evaluation know nothing of them."""

from __future__ import annotations

import copy
import linecache
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from method_models import closures, data, ready
from small_models import layers, small_model, trainable
from targets import randn
from torch import Tensor

import flatlora_kernels
from flatlora_kernels import NoiseController
from flatlora_kernels.backends import reference
from flatlora_kernels.methods import METHODS
from flatlora_kernels.train import steps

PACKAGE = str(Path(flatlora_kernels.__file__).parent)


RUNS = ("attached", *sorted(METHODS))


class Run:
    """A training whose whole state can be taken out, and put into another one."""

    def __init__(self, name: str) -> None:
        self.name, self.method = name, None
        if name == "attached":
            controller = NoiseController(sigma=0.3, schedule="linear", total_steps=4, seed=3)
            self.model, _ = small_model(noise_controller=controller)
            self.optimizer: Any = torch.optim.AdamW(trainable(self.model), lr=1e-2)
            controller.attach(self.optimizer)
        else:
            self.model, self.method = ready(name)
            self.optimizer = self.method.optimizer

    def step(self) -> list[float]:
        if self.method is not None:
            return [self.method.step(*closures(self.model)).item()]
        losses = []
        for micro in range(2):
            loss = self.model(randn(6, 16, seed=micro)).square().mean()
            loss.backward()
            losses.append(loss.item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def fresh(self) -> Run:
        """One that was never interrupted, at this one's weights and step."""
        other = Run(self.name)
        other.model.load_state_dict(copy.deepcopy(self.model.state_dict()))
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        if self.method is not None:
            other.method.load_state_dict(copy.deepcopy(self.method.state_dict()))
        return other


def outcome(run: Run) -> list[Any]:
    """Of an evaluation, which has no noise, and of two more steps."""
    run.optimizer.zero_grad()
    x = randn(6, 16, seed=99) if run.method is None else next(iter(data()))
    training = [module.training for module in run.model.modules()]
    quiet = run.model.eval()(x)
    run.model.train()
    losses = [run.step() for _ in range(2)]
    parameters = [p.detach().clone() for p in run.model.parameters()]
    return [training, quiet, losses, layers(run.model)[0].noise_controller.state_dict(), *parameters]


def events(call: Callable[[], Any], stop: int | None = None, *, within: str = PACKAGE) -> int:
    """How many lines of this folder `call` runs; before number `stop` of them comes a KeyboardInterrupt.

    Not before the end of a `with` or the begin of a `try` or `finally`, where Python delivers no signal either; and
    not inside `undone`, which stands one interrupt.
    """
    count = 0

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        file, line = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and not linecache.getline(file, line).strip().startswith(
            ("with ", "try:", "finally:")
        ):
            count += 1
            if count - 1 == stop:
                sys.settrace(None)
                raise KeyboardInterrupt(f"{file}:{line}")
        return local

    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        return local if file.startswith(within) and not file.endswith("undo.py") else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def same(left: list[Any], right: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(left, right, strict=True)
    )


def begun(name: str) -> Run:
    steps._watched.clear()  # a step asks every controller alive, and those of earlier runs live on as long as they like
    run = Run(name)
    run.step()
    return run


@pytest.mark.parametrize("name", sorted(RUNS))
def test_interrupted_at_many_lines(name: str) -> None:
    """Between any two lines of the package; the lines are spread over the step, others in each run of the tests."""
    events(begun(name).step)
    total = events(begun(name).step)
    points = int(os.environ.get("FLATLORA_INTERRUPTS", "30"))
    wrong = []
    for i in range(points):
        stop = int((i + random.random()) * total / points)
        run = begun(name)
        with pytest.raises(KeyboardInterrupt) as caught:
            events(run.step, stop)
        where = str(caught.value)
        del caught
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), where
        twin = run.fresh()
        if not same(outcome(run), outcome(twin)):
            wrong.append(where)
    assert not wrong


@pytest.mark.parametrize("norms", ["known", "changed", "unknown"])
def test_interrupted_at_each_line_of_advance(norms: str) -> None:
    """Seed, step and strength belong together afterwards, of before or of after."""

    def ready_to_advance() -> tuple[Run, NoiseController]:
        run = begun("attached") if norms != "unknown" else Run("attached")  # at sigma = 0 no norm is known
        controller = layers(run.model)[0].noise_controller
        if norms == "changed":
            with torch.no_grad():
                for parameter in trainable(run.model):
                    parameter.mul_(1.5)
        return run, controller

    train = str(Path(PACKAGE, "train"))
    total = events(ready_to_advance()[1].advance, within=train)
    for stop in range(total):
        run, controller = ready_to_advance()
        before = controller.step
        with pytest.raises(KeyboardInterrupt) as caught:
            events(controller.advance, stop, within=train)
        where = str(caught.value)
        assert controller.step in (before, before + 1), where
        assert controller.tensor("cpu").item() % 2**64 == controller.value, where
        assert (controller.sigma > 0) == any(layer.noise_scale is not None for layer in controller.layers), (
            where
        )
        twin = run.fresh()
        assert same(outcome(run), outcome(twin)), where


def test_interrupted_while_a_forward_reads_the_norms() -> None:
    def changed() -> Run:
        run = begun("attached")
        with torch.no_grad():
            for parameter in trainable(run.model):
                parameter.mul_(1.5)
        return run

    x, train = randn(6, 16), str(Path(PACKAGE, "train"))
    for stop in range(events(partial(changed().model, x), within=train)):
        run = changed()
        with pytest.raises(KeyboardInterrupt) as caught:
            events(partial(run.model, x), stop, within=train)
        where = str(caught.value)
        assert torch.equal(run.model(x), run.fresh().model(x)), where


class Broken(Exception):
    pass


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("where", ["forward hook", "backward hook", "step hook"])
def test_exception_in_a_hook(name: str, where: str) -> None:
    def fail(*_: Any) -> None:
        raise Broken

    run = begun(name)
    last = layers(run.model)[-1]
    handle = {
        "forward hook": last.register_forward_hook,
        "backward hook": last.register_full_backward_hook,
        "step hook": run.optimizer.register_step_post_hook,  # after the controller's own where it is attached
    }[where](fail)
    if where == "backward hook" and name in ("mezo", "es", "eggroll"):
        pytest.skip("has no backward pass")
    with pytest.raises(Broken):
        run.step()
    handle.remove()
    twin = run.fresh()
    assert same(outcome(run), outcome(twin))


@pytest.mark.parametrize("call", range(10))
def test_out_of_memory_in_any_product(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a forward or a backward pass."""
    run = begun("attached")
    with monkeypatch.context() as patch:
        count = 0

        def product(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal count
            count += 1
            if count > call:
                raise torch.OutOfMemoryError("no more")
            return original(*args, **kwargs)

        original = reference.product
        patch.setattr(reference, "product", product)
        with pytest.raises(torch.OutOfMemoryError):
            run.step()
    twin = run.fresh()
    assert same(outcome(run), outcome(twin))


def test_out_of_memory_while_the_norms_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """In `advance`, which has not moved then: not the seed, and not the strength of any layer."""
    run = begun("attached")
    controller = layers(run.model)[0].noise_controller
    before = [controller.value, *(layer.noise_scale.clone() for layer in controller.layers)]
    with monkeypatch.context() as patch:
        calls = iter((False, True))

        def fail(*args: Any, **kwargs: Any) -> Tensor:
            if next(calls):
                raise torch.OutOfMemoryError("no more")
            return original(*args, **kwargs)

        original = flatlora_kernels.train.layer.flat_noise_scale
        patch.setattr(flatlora_kernels.train.layer, "flat_noise_scale", fail)
        with pytest.raises(torch.OutOfMemoryError):
            controller.advance()
    after = [controller.value, *(layer.noise_scale for layer in controller.layers)]
    assert controller.step == 1 and same(before, after)
    assert controller.tensor("cpu").item() % 2**64 == controller.value
