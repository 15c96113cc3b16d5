"""`warm_up` on a driver that does nothing: afterwards, a step compiles nothing and nothing else has changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import nodriver
import pytest
import torch
from targets import INTERPRETED, REQUIRED
from torch import nn

import flatlora_kernels as fk
from flatlora_kernels import backends
from flatlora_kernels.choice import resolve

TRITON = backends.get("triton")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[nodriver.NoDriver]:
    """Backend `triton` takes tensors on the CPU, and never touches them."""
    if "triton" not in REQUIRED:
        pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
    with nodriver.active("sm90", monkeypatch) as found:
        monkeypatch.setattr(TRITON, "DEVICE_TYPES", ("cuda", "cpu"))
        monkeypatch.setattr(TRITON, "unavailable", lambda: None)
        backends.unavailable.cache_clear()
        resolve._select.cache_clear()
        yield found
    backends.unavailable.cache_clear()
    resolve._select.cache_clear()


@pytest.fixture
def compiled(driver: nodriver.NoDriver, monkeypatch: pytest.MonkeyPatch) -> dict[Any, str]:
    """The kernels that Triton is asked to compile from here on; 3.6 is asked again until it has compiled."""
    from triton.runtime.jit import JITFunction

    names: dict[Any, str] = {}
    start = JITFunction._do_compile

    def noting(self: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        names[self, key] = self.__name__
        return start(self, key, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "_do_compile", noting)
    return names


def model(**options: Any) -> nn.Module:
    made = nn.Sequential(nn.Linear(64, 128, dtype=torch.bfloat16), nn.Linear(128, 64, dtype=torch.bfloat16))
    given = {"r": 8, "sigma": 0.1, "schedule": "linear", "total_steps": 4, "seed": 1, "backend": "triton"}
    fk.apply_flat_lora(made, ".*", verbose=False, **(given | options))
    return made


def step(of: nn.Module, *shape: int) -> None:
    of.train()
    of[0].noise_controller.advance()
    of(torch.zeros(*shape, 64, dtype=torch.bfloat16, requires_grad=True)).float().sum().backward()


@pytest.mark.parametrize(
    "options, shape",
    [
        ({}, (16,)),
        ({"lora_dropout": 0.1, "noise": "rademacher"}, (40,)),
        ({"samples": "batch", "antithetic": True, "strategy": "fused"}, (2, 8)),
        ({"noise": "near_gaussian"}, (16,)),
        ({"noise": "hadamard"}, (16,)),
        ({"noise": "hadamard", "strategy": "panel", "samples": 2, "antithetic": True}, (16,)),
    ],
    ids=["plain", "dropout", "batch", "near_gaussian", "transform", "panel"],
)
def test_a_step_compiles_nothing(
    options: dict[str, Any], shape: tuple[int, ...], compiled: dict[Any, str]
) -> None:
    warm = model(**options)
    assert fk.warm_up(warm, [shape if len(shape) > 1 else shape[0]], progress=False) >= len(compiled) > 1
    compiled.clear()
    step(warm, *shape)
    assert not compiled


def test_a_step_of_a_mixture_compiles_nothing(compiled: dict[Any, str]) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers.integrations.moe")
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    from flatlora_kernels.integrations.peft import apply_flat_lora

    sizes = {"num_local_experts": 2, "hidden_size": 64, "intermediate_size": 128}
    experts = MixtralExperts(MixtralConfig(**sizes, experts_implementation="eager"))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=8, target_modules=[], target_parameters=targets)
    model = peft.get_peft_model(nn.ModuleDict({"experts": experts.bfloat16()}), config).train()
    controller = apply_flat_lora(model, sigma=0.1, seed=1, backend="triton", verbose=False)
    assert fk.warm_up(model, [16], progress=False) > 2  # those that other tests compiled are counted
    compiled.clear()
    controller.advance()
    x = torch.zeros(32, 64, dtype=torch.bfloat16, requires_grad=True)
    index, weights = torch.arange(32).remainder(2)[:, None], torch.ones(32, 1, dtype=torch.bfloat16)
    model.base_model.model["experts"](x, index, weights).float().sum().backward()
    assert not compiled


def test_without_it_the_step_compiles(compiled: dict[Any, str]) -> None:
    step(model(noise_accum="split"), 200)
    assert {"_linear_forward_kernel", "_linear_input_grad_kernel"} <= set(compiled.values())


def test_nothing_else_changes(driver: nodriver.NoDriver) -> None:
    warm = model(lora_dropout=0.5).eval()
    warm[1].lora_dropout.train()
    before, state = copy.deepcopy(warm.state_dict()), torch.get_rng_state()
    launches, modes = driver.launches, [m.training for m in warm.modules()]
    assert fk.warm_up(warm, [16], workers=1, progress=False)
    assert driver.launches == launches
    assert torch.equal(torch.get_rng_state(), state) and modes == [m.training for m in warm.modules()]
    assert all(torch.equal(value, before[name]) for name, value in warm.state_dict().items())
    assert all(p.grad is None for p in warm.parameters())
    assert warm[0].noise_scale is None and warm[0].noise_controller.step == 0


def test_layers_of_one_kind_go_through_once(
    driver: nodriver.NoDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    start = fk.FlatLoraLinear.forward
    monkeypatch.setattr(fk.FlatLoraLinear, "forward", lambda self, x: calls.append(x.shape) or start(self, x))
    made = nn.Sequential(*(nn.Linear(64, 64, dtype=torch.bfloat16) for _ in range(3)))
    fk.apply_flat_lora(made, ".*", r=8, seed=1, backend="triton", verbose=False)
    fk.warm_up(made, [16, (2, 8), 16], progress=False)
    assert calls == [(16, 64), (2, 8, 64)]


def test_where_triton_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TRITON, "unavailable", lambda: "no GPU")
    assert fk.warm_up(model(backend="reference"), [16]) == 0


@pytest.mark.parametrize(
    "rows, workers, error, message",
    [
        ([], None, ValueError, "rows: expected at least one"),
        ([0], None, ValueError, r"rows: expected numbers >= 1, got 0"),
        ([(2, 0)], None, ValueError, r"rows: expected numbers >= 1, got \(2, 0\)"),
        ([2.0], None, TypeError, "rows: expected an int"),
        ([16], 0, ValueError, "workers: expected an int >= 1, got 0"),
    ],
)
def test_arguments(rows: Any, workers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fk.warm_up(model(backend="reference"), rows, workers=workers)


def test_a_model_without_noise() -> None:
    with pytest.raises(ValueError, match="model: expected one with layers that draw noise .*, got Linear"):
        fk.warm_up(nn.Linear(2, 2), [16])


def test_samples_need_their_shape(driver: nodriver.NoDriver) -> None:
    with pytest.raises(ValueError, match=r"rows: expected \(batch, tokens\) .* got 16"):
        fk.warm_up(model(samples="batch"), [16], progress=False)
    with pytest.raises(ValueError, match="rows: expected a multiple of the layers' samples=3, got 16"):
        fk.warm_up(model(samples=3), [16], progress=False)
