"""`NoiseController`: schedules, optimisers that drive it, what a resumed run and an exception leave."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from targets import randn
from torch import Tensor, nn

import flatlora_kernels as fk
from flatlora_kernels import FlatLoraLinear, NoiseController, apply_flat_lora


def model_and_controller(**settings: Any) -> tuple[nn.Sequential, NoiseController]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    options = {
        "r": 2,
        "lora_alpha": 2,
        "backend": "reference",
        "verbose": False,
        "sigma": 0.4,
        "seed": 1,
        **settings,
    }
    controller = apply_flat_lora(model, ".*", **options)
    for layer in controller.layers:
        if layer.lora_B is not None:
            nn.init.normal_(layer.lora_B)
    return model, controller


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def noise_scale_now(layer: FlatLoraLinear, sigma: float) -> Tensor:
    return fk.flat_noise_scale(
        layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling, sigma=sigma, backend="reference"
    )


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


def test_seeds_are_those_of_earlier_versions() -> None:
    """A run that is resumed with a later version draws the noise that it would have drawn."""
    assert NoiseController(seed=1).value == NoiseController(seed=1, rank=0).value == 12793040940332582595


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


# Attached to an optimiser


def test_attached_state_travels_with_the_optimiser() -> None:
    """A plain loop, interrupted and resumed: bit for bit."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for t in steps:
            loss = model(randn(5, 6, seed=t)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    settings = {"schedule": "cosine", "total_steps": 6}
    model, controller = model_and_controller(seed=2**64 - 5, **settings)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    controller.attach(optimizer)
    train(model, optimizer, range(3))
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith("_extra_state")}
    torch.save({"model": weights, "optimizer": optimizer.state_dict()}, file := io.BytesIO())
    expected = train(model, optimizer, range(3, 6))
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
    assert train(resumed, optimizer, range(3, 6)) == expected
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


# Layers


def test_changed_parameters_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in place, replaced, exchanged through .data, scaled: the next forward measures anew, once."""
    model, _ = model_and_controller()
    layer, x = model[0], randn(4, 6)

    def in_place() -> None:
        layer.lora_B.mul_(3)

    def replaced() -> None:
        layer.lora_B = nn.Parameter(torch.randn_like(layer.lora_B))

    def wrapped_again() -> None:  # the address and the version of the old one
        layer.lora_B.data.mul_(3)
        before = layer.lora_B
        layer.lora_B = nn.Parameter(before.data)
        assert (layer.lora_B._version, layer.lora_B.data_ptr()) == (before._version, before.data_ptr())

    def through_data() -> None:
        layer.weight.data = layer.weight.data * 2

    def scaled() -> None:
        layer.scaling *= 2

    layer(x)
    reads = []
    original = fk.train.layer.flat_noise_scale
    monkeypatch.setattr(
        fk.train.layer, "flat_noise_scale", lambda *a, **k: reads.append(1) or original(*a, **k)
    )
    for i, change in enumerate((in_place, replaced, wrapped_again, through_data, scaled), 1):
        with torch.no_grad():
            change()
        for _ in range(2):
            layer(x)
        assert len(reads) == i, change.__name__
        torch.testing.assert_close(layer.noise_scale, noise_scale_now(layer, 0.4))


def test_tied_weights_share_a_stream() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"})
    model["c"].weight = model["a"].weight
    controller = apply_flat_lora(model, ".*", r=2, backend="reference", verbose=False)
    assert [model[name].stream for name in "abc"] == [0, 1, 0]
    tied = FlatLoraLinear(model["b"].weight, noise_controller=controller, backend="reference")
    new = FlatLoraLinear(torch.zeros(4, 4), noise_controller=controller, backend="reference")
    assert (tied.stream, new.stream) == (1, 2)
    assert len(controller.layers) == 5


def test_samples_batch_is_a_draw_per_sequence() -> None:
    model, controller = model_and_controller(samples="batch")
    layer, x = model[0], randn(1, 5, 6)
    y = layer(x.expand(3, 5, 6))
    quiet = layer.eval()(x)[0]
    layer.train()
    assert not torch.allclose(y[0], y[1], atol=1e-2)
    torch.testing.assert_close(layer(x)[0], y[0])
    for i, offset in enumerate((0, 1, 2)):
        controller.sample_offset = offset
        torch.testing.assert_close(layer(x)[0], y[i])
    assert layer(x[0, 0]).shape == (8,)
    assert not torch.allclose(y[0], quiet, atol=1e-2)
    controller.sample_offset = 0
    layer.antithetic = True
    pair = layer(x.expand(2, 5, 6))
    torch.testing.assert_close(pair[0] + pair[1], 2 * quiet)


def test_samples_batch_compiles_in_one_graph() -> None:
    model, controller = model_and_controller(samples="batch")
    controller.advance()  # compiled code does not see by itself that lora_B was set
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(3):
            x = randn(3, 5, 6, seed=t)
            torch.testing.assert_close(compiled(x), model(x))
            controller.advance()


def test_full_fine_tuning_without_an_adapter() -> None:
    model, controller = model_and_controller(r=0, train_weight=True)
    layer, x = model[0], randn(4, 6)
    assert layer.lora_A is None
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == [
        "0.bias", "0.weight", "2.bias", "2.weight",
    ]  # fmt: skip
    eps = fk.materialize_noise(layer.noise_scale, 6, seed=controller.value, stream=0, backend="reference")
    torch.testing.assert_close(layer(x), x @ (layer.weight + eps).t() + layer.bias)
    controller.attach(optimizer := torch.optim.SGD(trainable(model), lr=0.1))
    before = layer.noise_scale.clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert layer.weight.grad is not None
    assert not torch.equal(layer.noise_scale, before), "norms of the weights of now"
    quiet = layer.eval()(x)
    layer.merge()
    torch.testing.assert_close(layer(x), quiet)
    layer.unmerge()
    assert layer.weight.requires_grad


def test_auxiliary_adapter_in_training_mode_only() -> None:
    model, _ = model_and_controller(sigma=0.0)
    layer, x = model[0], randn(4, 6)
    y = layer(x)
    A, B = randn(3, 6, seed=2), randn(8, 3, seed=3)
    layer.auxiliary = (A, B)
    torch.testing.assert_close(layer(x), y + layer.scaling * x @ A.t() @ B.t())
    torch.testing.assert_close(layer.eval()(x), y)


def test_noise_can_be_taken_off_and_put_on() -> None:
    model, controller = model_and_controller()
    layer = model[0]
    layer._remove_noise()
    assert controller.layers == (model[2],)
    assert layer.noise_scale is None
    layer._set_up_noise(controller, backend="reference")
    assert layer.stream == 2
    assert len(controller.layers) == 2


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
