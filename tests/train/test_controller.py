"""`NoiseController`: schedules, seeds, optimisers that drive it, what a resumed run and an exception leave."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from small_models import (
    all_equal,
    gradients,
    model_and_controller,
    noise_scale_now,
    small_layer,
    small_model,
    train,
    trainable,
)
from targets import randn
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatlora_kernels import FlatLoraLinear, NoiseController, apply_flat_lora
from flatlora_kernels.train.controller import _mix

# Strength


def test_schedules_against_their_formulas() -> None:
    for t in range(11):
        expected = {
            "constant": 0.3,
            "linear": 0.3 * t / 10,
            "cosine": 0.15 * (1 - math.cos(math.pi * t / 10)),
        }
        for schedule, sigma in expected.items():
            controller = NoiseController(sigma=0.3, schedule=schedule, total_steps=10)
            assert controller.sigma_at(t) == pytest.approx(sigma, abs=1e-15)
    for schedule in ("constant", "linear", "cosine"):
        controller = NoiseController(sigma=0.3, schedule=schedule, total_steps=7)
        assert controller.sigma_at(7) == controller.sigma_at(8) == 0.3, "exactly"
    own = NoiseController(sigma=0.3, schedule=lambda t: t * t)
    assert own.sigma_at(2) == 1.2


def test_layers_follow_the_schedule() -> None:
    model, controller = model_and_controller(schedule="linear", total_steps=4)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    controller.attach(optimizer)
    x = randn(4, 6)
    quiet = model.eval()(x)
    assert torch.equal(model.train()(x), quiet), "sigma = 0 at first"
    for t in range(1, 6):
        for _ in range(3):  # micro-batches are not counted
            model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert controller.step == t
        assert controller.sigma == pytest.approx(0.4 * min(t, 4) / 4)
        for layer in controller.layers:
            torch.testing.assert_close(layer.noise_scale, noise_scale_now(layer, controller.sigma))
    assert controller.sigma == 0.4, "exactly"


def test_total_steps_may_come_later() -> None:
    model, controller = model_and_controller(schedule="cosine")
    model(randn(2, 6))
    with pytest.raises(
        ValueError, match="total_steps: expected an int >= 1 with schedule='cosine' at step 1"
    ):
        controller.advance()
    assert controller.step == 0, "nothing has moved"
    controller.load_state_dict({"base": 1, "step": 5})  # a checkpoint is loaded before the number is known
    model.eval()(randn(2, 6))
    with pytest.raises(ValueError, match="total_steps: expected"):
        model.train()(randn(2, 6))
    controller.total_steps = 10
    layer = controller.layers[0]
    torch.testing.assert_close(layer.noise_scale, noise_scale_now(layer, 0.2))


def test_loading_a_step_loads_its_strength() -> None:
    """At once, in a forward of that step, also where no weight changes."""
    model, controller = model_and_controller(schedule="linear", total_steps=4)
    x = randn(4, 6)
    quiet = model(x)
    controller.load_state_dict({"base": 1, "step": 2})
    for layer in controller.layers:
        torch.testing.assert_close(layer.noise_scale, noise_scale_now(layer, 0.2))
    assert not torch.allclose(model(x), quiet, atol=1e-2)
    controller.load_state_dict({"base": 1, "step": 0})
    assert torch.equal(model(x), quiet)


def test_norm_row_has_no_root_of_in_features() -> None:
    flat, row = (
        FlatLoraLinear.from_linear(
            nn.Linear(16, 4), noise_controller=NoiseController(norm=norm), backend="reference"
        )
        for norm in ("flat", "row")
    )
    row.load_state_dict(flat.state_dict())
    torch.testing.assert_close(row.noise_scale, 4 * flat.noise_scale)


def test_target_sigma_leaves_zero_and_returns() -> None:
    model, controller = model_and_controller(sigma=0.0)
    x = randn(4, 6)
    quiet = model(x)
    controller.target_sigma = 0.4
    torch.testing.assert_close(controller.layers[0].noise_scale, noise_scale_now(controller.layers[0], 0.4))
    assert not torch.allclose(model(x), quiet, atol=1e-2)
    controller.target_sigma = 0
    assert torch.equal(model(x), quiet)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"sigma": -1.0}, ValueError, "sigma: expected a finite float"),
        ({"sigma": "0.1"}, TypeError, "sigma: expected a float, got str"),
        ({"schedule": "square"}, ValueError, "schedule: expected 'constant', 'linear', 'cosine'"),
        ({"total_steps": 0}, ValueError, "total_steps: expected an int >= 1, got 0"),
        ({"total_steps": 1.5}, TypeError, "total_steps: expected an int or None, got float"),
        ({"norm": "column"}, ValueError, "norm: expected 'flat' or 'row', got 'column'"),
        ({"norm": None}, ValueError, "norm: expected"),
        ({"sample_offset": -1}, ValueError, "sample_offset: expected"),
        ({"seed": True}, TypeError, "seed: expected an int"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NoiseController(**options)


def test_bad_uses() -> None:
    with pytest.raises(ValueError, match="schedule: expected a finite factor >= 0 at step 3, got -1"):
        NoiseController(schedule=lambda t: -1).sigma_at(3)
    with pytest.raises(ValueError, match="sigma: expected None, because noise_controller has one"):
        FlatLoraLinear.from_linear(nn.Linear(4, 4), sigma=0.1, noise_controller=NoiseController())
    model, controller = model_and_controller()
    with pytest.raises(ValueError, match="seed: expected None, because there is a NoiseController already"):
        apply_flat_lora(nn.Sequential(nn.Linear(4, 4)), ".*", seed=3, noise_controller=controller)
    with pytest.raises(KeyError, match="expected the keys 'base' and 'step'"):
        controller.load_state_dict({"step": 3})


# The seed


def test_equal_on_all_ranks_unless_asked() -> None:
    torch.manual_seed(11)
    here, there, elsewhere = NoiseController(), NoiseController(), NoiseController(rank=1)
    assert here.base == 11
    for _ in range(3):
        assert here.value == there.value != elsewhere.value
        for seed in (here, there, elsewhere):
            seed.advance()
    with pytest.raises(TypeError, match="seed: expected an int"):
        NoiseController(seed=1.5)
    with pytest.raises(ValueError, match="rank: expected"):
        NoiseController(rank=-1)


def test_seeds_differ_by_step_base_and_rank() -> None:
    values = set()
    for base in (0, 1, 2**63, 2**64 - 1):
        for rank in range(4):
            seed = NoiseController(seed=base, rank=rank)
            for _ in range(100):
                values.add(seed.value)
                seed.advance()
    assert len(values) == 4 * 4 * 100
    assert all(0 <= v < 2**64 for v in values)
    bits = [sum(v >> bit & 1 for v in values) for bit in range(64)]
    # 1,600 fair coins have a standard deviation of 20: five of them, at 64 bits, fail 4e-5 of all bases.
    assert max(abs(b - 800) for b in bits) < 100


def test_seed_tensor_has_all_64_bits_and_is_overwritten_in_place() -> None:
    seed = NoiseController(seed=7)
    tensor = seed.tensor("cpu")
    assert (tensor.dtype, tensor.shape) == (torch.int64, ())
    signs = set()
    for _ in range(8):
        assert seed.tensor(torch.device("cpu")) is tensor
        assert tensor.item() % 2**64 == seed.value
        signs.add(tensor.item() < 0)
        seed.advance()
    assert signs == {False, True}


def test_rank_may_be_assigned_and_the_rest_may_not() -> None:
    controller = NoiseController(seed=1)
    seed = controller.tensor("cpu")
    controller.rank = 3
    assert seed.item() == NoiseController(seed=1, rank=3).tensor("cpu").item()
    with pytest.raises(ValueError, match="rank"):
        controller.rank = -1
    for name, value in (("schedule", "linear"), ("norm", "row")):
        with pytest.raises(AttributeError):
            setattr(controller, name, value)


def test_seeds_never_change() -> None:
    """A run resumed by another version must draw what it drew."""
    # First outputs of the published SplitMix64 from states 0 and 1234567.
    assert _mix(0) == 0xE220A8397B1DCDAF
    assert _mix(1234567) == 6457827717110365317
    seed = NoiseController(seed=2**64 - 1, rank=3)
    assert NoiseController(seed=0).value == 2558736989570252433
    seed.advance()
    assert seed.value == 14826025096241840780


def test_seeds_are_those_of_earlier_versions() -> None:
    """A run that is resumed with a later version draws the noise that it would have drawn."""
    assert NoiseController(seed=1).value == NoiseController(seed=1, rank=0).value == 12793040940332582595


def test_global_generators_are_not_advanced() -> None:
    torch.manual_seed(5)
    linear = nn.Linear(16, 8)
    expected = torch.get_rng_state()
    controller = NoiseController()
    assert torch.equal(torch.get_rng_state(), expected)
    layer = FlatLoraLinear.from_linear(linear, noise_controller=controller, backend="reference")
    expected = torch.get_rng_state()  # the initialisation of lora_A does draw
    for _ in range(2):
        layer(randn(3, 16)).sum().backward()
        controller.advance()
    layer.merge()
    layer.unmerge()
    assert torch.equal(torch.get_rng_state(), expected)
    assert torch.initial_seed() == 5


def test_advance_changes_the_noise_and_nothing_else_does() -> None:
    model, controller = small_model()
    x = randn(6, 16)
    first = model(x)
    assert torch.equal(model(x), first)
    torch.manual_seed(99)
    assert torch.equal(model(x), first)
    controller.advance()
    assert not torch.allclose(model(x), first, atol=1e-3)


def test_layers_draw_different_noise() -> None:
    controller = NoiseController(seed=1)
    one, two = (small_layer(noise_controller=controller, stream=s) for s in (0, 1))
    x = randn(5, 40)
    assert torch.equal(one.eval()(x), two.eval()(x))
    assert not torch.allclose(one.train()(x), two.train()(x), atol=1e-2)


def test_gradient_accumulation_sees_one_noise() -> None:
    model, _ = small_model()
    x = randn(8, 16)
    whole = gradients(model, x)
    model.zero_grad()
    for part in x.chunk(4):
        model(part).square().sum().backward()
    for p, expected in zip(trainable(model), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_sees_the_same_noise(use_reentrant: bool) -> None:
    model, controller = small_model(lora_dropout=0.2)
    x = randn(6, 16).requires_grad_()
    for _ in range(2):
        results = []
        for run in (model, lambda t: checkpoint(model, t, use_reentrant=use_reentrant)):
            model.zero_grad()
            x.grad = None
            torch.manual_seed(4)  # dropout's
            run(x).square().sum().backward()
            results.append([x.grad, *(p.grad for p in trainable(model))])
        assert all_equal(*results)
        controller.advance()


def test_backward_after_advance_is_an_error() -> None:
    model, controller = small_model()
    loss = model(randn(2, 16).requires_grad_()).sum()
    controller.advance()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Attached to an optimiser


def test_attached_state_travels_with_the_optimiser() -> None:
    """A plain loop, interrupted and resumed: bit for bit."""
    first, rest = ([randn(5, 6, seed=t) for t in steps] for steps in (range(3), range(3, 6)))

    settings = {"schedule": "cosine", "total_steps": 6}
    model, controller = model_and_controller(seed=2**64 - 5, **settings)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    controller.attach(optimizer)
    train(model, optimizer, first)
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("_extra_state")}
    torch.save({"model": weights, "optimizer": optimizer.state_dict()}, file := io.BytesIO())
    expected = train(model, optimizer, rest)
    assert controller.sigma == 0.4

    resumed, other = model_and_controller(seed=7, **settings)
    with torch.no_grad():
        resumed[0].lora_A.add_(1)
    optimizer = torch.optim.AdamW(trainable(resumed), lr=0.05)
    other.attach(optimizer)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["optimizer"]["flat_lora"] == {"base": 2**64 - 5, "step": 3}
    optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"], strict=False)
    assert (other.base, other.step) == (2**64 - 5, 3)
    assert train(resumed, optimizer, rest) == expected
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_advances_nothing(fused: bool) -> None:
    model, controller = model_and_controller()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01, fused=fused)
    controller.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    steps = []
    for factor in (1.0, math.inf, 1.0):
        before = [p.detach().clone() for p in trainable(model)]
        scaler.scale(model(randn(4, 6)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = not all(map(torch.equal, before, trainable(model)))
        assert moved == math.isfinite(factor)
        steps.append(controller.step)
    assert steps == [1, 1, 2]


def test_several_groups_are_one_step() -> None:
    model, controller = model_and_controller()
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(trainable(model))]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    controller.attach(optimizer)
    model(randn(4, 6)).sum().backward()
    optimizer.step()
    assert controller.step == 1


def test_accelerate(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, controller = model_and_controller()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    optimizer = accelerator.prepare(torch.optim.SGD(trainable(model), lr=0.1))
    controller.attach(optimizer)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(randn(4, 6)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert controller.step == 2
    assert optimizer.state_dict()["flat_lora"]["step"] == 2


def test_one_optimiser_each() -> None:
    model, controller = model_and_controller()
    first, second = (torch.optim.SGD(trainable(model), lr=0.1) for _ in range(2))
    handle = controller.attach(first)
    assert controller.attached
    for optimizer in (first, second):
        with pytest.raises(RuntimeError, match="this controller is attached"):
            controller.attach(optimizer)
    with pytest.raises(RuntimeError, match="optimizer has another NoiseController"):
        NoiseController().attach(first)
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got list"):
        NoiseController().attach([])
    handle.remove()
    handle.remove()
    first.step()
    assert (controller.step, controller.attached) == (0, False)
    assert "flat_lora" not in first.state_dict()
    with controller.attach(second):
        second.step()
    second.step()
    assert controller.step == 1
    handle = controller.attach(first)
    del first, optimizer
    assert not controller.attached, "the optimiser is gone"
    controller.attach(second)


def test_loading_what_was_saved_without_noise_is_an_error() -> None:
    model, controller = model_and_controller()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    saved = optimizer.state_dict()
    controller.attach(optimizer)
    with pytest.raises(KeyError, match="expected the key 'flat_lora'.*attach after loading"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_not_attached(how: str) -> None:
    model, controller = model_and_controller()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    controller.attach(optimizer)
    copied = copy.deepcopy(controller) if how == "deepcopy" else pickle.loads(pickle.dumps(controller))
    optimizer.step()
    assert (controller.step, copied.step, copied.attached, copied.layers) == (1, 0, False, ())
    assert copied.value != controller.value


# What is left behind


class Interrupted(Exception):
    pass


def test_evaluation_and_exceptions_leave_nothing_behind() -> None:
    model, controller = model_and_controller()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    controller.attach(optimizer)
    torch.manual_seed(9)
    generator, x = torch.get_rng_state(), randn(4, 6)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    noisy = model(x)

    def fail(*_: Any) -> None:
        raise Interrupted

    model.eval()(x)
    with torch.inference_mode():
        model(x)
    model.train()
    with pytest.raises(Interrupted), controller.disabled():
        quiet = model(x)
        with controller.disabled():
            pass
        assert not controller.active
        assert torch.equal(model(x), quiet), "nested"
        raise Interrupted
    for handle in (model[0].register_forward_hook(fail), model[2].register_full_backward_pre_hook(fail)):
        with pytest.raises(Interrupted):
            model(x).sum().backward()
        handle.remove()
    assert controller.active
    assert torch.equal(model(x), noisy)
    assert not torch.allclose(quiet, noisy, atol=1e-2)
    assert torch.equal(quiet, model.eval()(x))
    assert controller.step == 0
    model.train()
    model(x).sum().backward()
    optimizer.step()
    assert controller.step == 1
    assert torch.equal(torch.get_rng_state(), generator), "torch's generator is nobody's but the user's"
    for name, value in frozen.items():
        assert torch.equal(model.get_parameter(name), value), "base weights: bit for bit"
