"""What is loaded is checked as a whole, before any of it is taken over."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_models import ready
from small_models import all_equal, layers, model_and_controller, small_model, trainable
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, NoiseController
from flatlora_kernels.train.state import layer_states

GOOD = {"base": 5, "step": 3}


@pytest.mark.parametrize(
    "state, error, message",
    [
        (None, TypeError, "state: expected a dict with the keys 'base' and 'step', got NoneType"),
        ([1, 2], TypeError, "state: expected a dict"),
        ({}, KeyError, r"state: expected the keys 'base' and 'step', got \[\]"),
        ({**GOOD, "step": 2.5}, TypeError, "state: expected an int as 'step', got float"),
        ({**GOOD, "step": "3"}, TypeError, "state: expected an int as 'step', got str"),
        ({**GOOD, "base": True}, TypeError, "state: expected an int as 'base', got bool"),
        ({**GOOD, "step": -1}, ValueError, r"state: expected 0 <= step < 2\*\*63, got -1"),
        ({**GOOD, "step": 2**63}, ValueError, r"state: expected 0 <= step < 2\*\*63"),
        ({**GOOD, "base": 2**64}, ValueError, r"state: expected 0 <= base < 2\*\*64"),
        ({**GOOD, "base": -1}, ValueError, r"state: expected 0 <= base < 2\*\*64"),
    ],
)
def test_controller(state: Any, error: type[Exception], message: str) -> None:
    _, controller = model_and_controller()
    before = controller.state_dict(), controller.tensor("cpu").item()
    with pytest.raises(error, match=message):
        controller.load_state_dict(state)
    assert (controller.state_dict(), controller.tensor("cpu").item()) == before


def taken(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def change(state: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {**copy.deepcopy(state), key: value}


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("2._extra_state", torch.tensor([7, 0, 1]), r"in all layers .* got \(1, 0\) in '0' and \(7, 0\)"),
        ("2._extra_state", torch.tensor([1, 4, 1]), "one seed and step in all layers"),
        ("2._extra_state", torch.tensor([1, 0, 0]), "a stream of its own for each layer.* got 0 for '0' and for '2'"),
        ("0._extra_state", torch.tensor([1, 0, 1]), "a stream of its own for each layer"),
        ("2._extra_state", torch.tensor([1, -2, 1]), r"'2\._extra_state': expected 0 <= step"),
        ("2._extra_state", torch.tensor([1, 0, 2**32]), r"'2\._extra_state': expected 0 <= stream < 2\*\*32"),
        ("2._extra_state", torch.tensor([1.0, 0.0, 1.0]), "expected an int64 tensor .*, got torch.float32 of shape"),
        ("2._extra_state", torch.tensor([1, 0]), r"expected an int64 tensor .* of shape \(2,\)"),
        ("2._extra_state", "abc", "expected an int64 tensor .*, got 'abc'"),
        ("2.lora_A", torch.zeros(3, 8), r"expected '2\.lora_A' of shape \(2, 8\), got \(3, 8\)"),
        ("2.weight", torch.zeros(8, 3), r"expected '2\.weight' of shape"),
        ("2.lora_B", [1.0], r"expected '2\.lora_B' of shape \(3, 2\), got list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inside", [False, True])
def test_layers(key: str, value: Any, message: str, inside: bool) -> None:
    """Also where the converted model is a part of the one that loads."""
    model, controller = model_and_controller()
    saved = {k: v + 1 if "lora" in k else v for k, v in model.state_dict().items()}
    whole = nn.Sequential(nn.Linear(2, 2), model) if inside else model
    wrong = {f"1.{k}" if inside else k: v for k, v in change(saved, key, value).items()}
    before = taken(model), controller.state_dict()
    with pytest.raises(
        (ValueError, RuntimeError), match=message.replace("'2\\.", "'1\\.2\\.") if inside else message
    ):
        whole.load_state_dict(wrong, strict=False)
    assert all_equal(taken(model), before[0]) and controller.state_dict() == before[1]
    model.load_state_dict(saved)
    assert all_equal(taken(model), list(saved.values()))


def test_merged_layers_refuse_before_anything_is_loaded() -> None:
    model, _ = model_and_controller()
    saved = {k: v + 1 if "lora" in k else v for k, v in model.state_dict().items()}
    layers(model)[1].merge()
    before = taken(model)
    with pytest.raises(RuntimeError, match=r"'2': merged; call unmerge\(\) before load_state_dict\(\)"):
        model.load_state_dict(saved)
    assert all_equal(taken(model), before)


def test_tied_layers_may_have_one_stream_and_streams_may_swap() -> None:
    model, controller = model_and_controller()
    saved = model.state_dict()
    saved["0._extra_state"], saved["2._extra_state"] = saved["2._extra_state"], saved["0._extra_state"]
    model.load_state_dict(saved)
    assert [layer.stream for layer in layers(model)] == [1, 0]
    weight = nn.Parameter(torch.randn(4, 4))
    tied = [FlatLoraLinear(weight, noise_controller=controller, backend="reference") for _ in range(2)]
    assert tied[0].stream == tied[1].stream
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())


def test_the_controller_moves_after_the_optimiser_has_loaded() -> None:
    model, controller = small_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    controller.attach(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["flat_lora"] = {"base": 77, "step": 5}
    other = torch.optim.AdamW(trainable(model)[:2]).state_dict()
    before = controller.state_dict()
    with pytest.raises(ValueError, match="parameter group"):  # torch's own
        optimizer.load_state_dict({**other, "flat_lora": saved["flat_lora"]})
    assert controller.state_dict() == before
    with pytest.raises(ValueError, match=r"state_dict\['flat_lora'\]: expected 0 <= step"):
        optimizer.load_state_dict({**saved, "flat_lora": {"base": 1, "step": -5}})
    assert controller.state_dict() == before
    optimizer.load_state_dict(saved)
    assert controller.state_dict() == saved["flat_lora"]


@pytest.mark.parametrize("name", ["bi-lora", "eflat-lora"])
def test_methods(name: str) -> None:
    from method_models import closures

    model, method = ready(name)
    method.step(*closures(model))
    good = copy.deepcopy(method.state_dict())
    key = "auxiliary" if name == "bi-lora" else "perturbation"
    _, fresh = ready(name)
    before = str(fresh.state_dict())
    wrong = [
        (None, ValueError, r"expected the keys \['a.*|expected the keys \['b.*"),
        ({}, ValueError, "expected the keys"),
        (change(good, key, None), TypeError, f"state.'{key}'.: expected a list of . tensors, got NoneType"),
        (change(good, key, good[key][:1]), ValueError, "tensors, one for each of this model's, got 1"),
        (change(good, key, [t[:1] for t in good[key]]), ValueError, r"\[0\]: expected the shape"),
    ]
    if name == "bi-lora":
        wrong.append(
            (change(good, "ascent", {"param_groups": [], "state": {}}), ValueError, "parameter group")
        )
    else:
        wrong.append((change(good, "begun", 1), TypeError, "expected a bool, got int"))
    for state, error, message in wrong:
        with pytest.raises(error, match=message):
            fresh.load_state_dict(state)
        assert str(fresh.state_dict()) == before
    fresh.load_state_dict(good)
    assert str(fresh.state_dict()) == str(good)


# Tensors made in inference mode


def test_a_controller_and_layers_made_in_inference_mode_train() -> None:
    linear = nn.Linear(6, 4)
    with torch.inference_mode():
        controller = NoiseController(sigma=0.3, seed=1)
        controller.tensor("cpu")
    layer = FlatLoraLinear.from_linear(linear, noise_controller=controller, r=2, backend="reference")
    with torch.inference_mode():
        controller.advance()
        layer.refresh_noise_scale()
        layer(torch.ones(2, 6))
    for _ in range(2):
        layer(torch.ones(2, 6)).square().sum().backward()
        controller.advance()
    assert layer.lora_B.grad is not None and controller.step == 3


def test_norms_first_read_in_inference_mode() -> None:
    model, controller = model_and_controller(sigma=0.0)
    with torch.inference_mode():
        controller.target_sigma = 0.2
        model(torch.ones(2, 6))
        controller.load_state_dict(GOOD)
    controller.target_sigma = 0.3
    model(torch.ones(2, 6)).square().sum().backward()
    assert all(layer.lora_A.grad.isfinite().all() for layer in layers(model))
    controller.advance()
    assert controller.step == GOOD["step"] + 1


def test_a_copy_made_in_inference_mode_draws_noise() -> None:
    """Its parameters are inference tensors, torch's own rule; after replacing them it trains."""
    model, controller = model_and_controller()
    with torch.inference_mode():
        copied = copy.deepcopy(model)
    fresh = layers(copied)[0].noise_controller
    assert not any(layer.noise_scale.is_inference() for layer in layers(copied))
    for layer in layers(copied):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(parameter.clone(), requires_grad="lora" in name))
    copied(torch.ones(2, 6)).square().sum().backward()
    fresh.advance()
    copied(torch.ones(2, 6)).square().sum().backward()
    assert fresh.step == controller.step + 1


# Norms that another stream reads


class Event:
    def __init__(self) -> None:
        self.waits = 0


def test_a_step_waits_for_norms_that_no_forward_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`overlap` reads A and B while other work goes on; no optimiser writes to them meanwhile."""
    from flatlora_kernels.train import steps

    model, controller = model_and_controller()
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    seen: list[Event] = []

    class Stream:
        def wait_event(self, event: Event) -> None:
            seen.append(event)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    reading, idle = layers(model)
    for layer in (reading, idle):
        layer.refresh_noise_scale()
        layer._ready = Event()  # as after advance(overlap=True) on a GPU
        steps.wait_for(layer)
    before = [p.detach().clone() for p in trainable(model)]

    def unwritten(*_: Any) -> None:
        assert {id(e) for e in seen} == {id(reading._ready), id(idle._ready)}
        assert all_equal([p.detach() for p in trainable(model)], before)

    optimizer.register_step_pre_hook(unwritten)
    idle.eval()
    for p in trainable(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not steps._reading
    seen.clear()
    idle(torch.ones(2, 8))  # an evaluation waits as well: what follows it may write
    assert seen == [idle._ready]
    for layer in (reading, idle):
        layer._ready = None


def test_streams_of_mixtures_may_not_overlap() -> None:
    """A mixture of experts draws from as many streams as it has experts."""
    controller = NoiseController()

    def layer(stream: int, count: int, weight: Tensor) -> Any:
        return SimpleNamespace(
            noise_controller=controller, stream=stream, stream_count=count, _base_parameter=lambda: weight
        )

    weights = [torch.zeros(1) for _ in range(2)]
    layers = {"experts": layer(2, 4, weights[0]), "tied": layer(2, 4, weights[0])}
    layer_states({**layers, "before": layer(1, 1, weights[1]), "after": layer(6, 1, weights[1])}, {})
    with pytest.raises(
        ValueError, match="a stream of its own for each layer.*got 5 for 'experts' and for 'q'"
    ):
        layer_states({**layers, "q": layer(5, 1, weights[1])}, {})
    with pytest.raises(ValueError, match="got 2 for 'experts' and for 'q'"):
        layer_states({**layers, "q": layer(9, 1, weights[1])}, {"q": (0, 0, 2)})
