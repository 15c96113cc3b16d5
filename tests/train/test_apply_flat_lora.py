"""`apply_flat_lora`: which layers it replaces, which it refuses, the streams it gives, and that the model trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import Net, calls_of, layers, noise_scale_now, small_model, trainable
from targets import Target, randn
from torch import Tensor, nn

import flatlora_kernels as fk
from flatlora_kernels import FlatLoraLinear, NoiseController, apply_flat_lora


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (["first", "2"], ["first", "block.2"]),
        (("block.0",), ["block.0"]),
        (r"block\.\d", ["block.0", "block.2"]),
        (r".*", ["first", "block.0", "block.2", "head"]),
    ],
)
def test_patterns_and_streams(pattern, expected: list[str]) -> None:  # type: ignore[no-untyped-def]
    model = Net()
    controller = apply_flat_lora(model, pattern, r=2, backend="reference", verbose=False)
    found = {n: m for n, m in model.named_modules() if isinstance(m, FlatLoraLinear)}
    assert list(found) == expected
    assert [m.stream for m in found.values()] == list(range(len(expected)))
    assert {m.noise_controller for m in found.values()} == {controller}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == [f"{n}.lora_{ab}" for n in expected for ab in "AB"]


@pytest.mark.parametrize("pattern", [["irst"], "block", [], r"first\.weight"])
def test_no_match_is_an_error(pattern) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"target_modules: .* none of 4 \(first, block.0, block.2, head\)"):
        apply_flat_lora(Net(), pattern)


def test_layers_that_would_miss_the_adapter_are_refused() -> None:
    encoder = nn.TransformerEncoderLayer(16, 2, 32)
    for pattern in (["out_proj"], ["linear1"]):
        with pytest.raises(ValueError, match="reads its weight directly"):
            apply_flat_lora(encoder, pattern, backend="reference")
    assert not layers(encoder), "refused before anything is replaced"


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(*sizes: int) -> nn.Linear:
    linear = nn.Linear(*sizes)
    linear.register_forward_hook(lambda *_: None)
    return linear


def flattened(*sizes: int) -> nn.Linear:
    linear = nn.Linear(*sizes)
    linear.weight = nn.Parameter(linear.weight.detach().flatten())
    return linear


@pytest.mark.parametrize(
    "make, why",
    [
        (flattened, "shape .64,."),
        (Doubled, "Doubled has a forward of its own"),
        (hooked, "hooks"),
        (lambda *n: nn.utils.parametrizations.weight_norm(nn.Linear(*n)), "its weight is a Tensor"),
        (lambda *n: nn.Linear(*n).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_linears_that_are_not_plain_are_refused(make: Any, why: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), make(8, 8))
    with pytest.raises(ValueError, match=f"target_modules: .* got '1': .*{why}"):
        apply_flat_lora(model, ["0", "1"])
    assert not layers(model), "refused before anything is replaced"


def test_weights_that_a_forward_alone_has_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP1 leaves them outside: the first forward of a step measures them, and later ones in it do not."""
    layer = FlatLoraLinear.from_linear(nn.Linear(8, 8), backend="reference", sigma=0.3)
    nn.init.normal_(layer.lora_B)
    whole, x = layer.weight.detach(), torch.randn(2, 8)

    def show(weight: Tensor) -> None:
        layer.weight = nn.Parameter(weight, requires_grad=False)

    show(whole.flatten()[:32])
    measured = calls_of("flat_noise_scale", monkeypatch)
    for factor in (1.0, 2.0):
        layer.noise_controller.advance()
        show(whole * factor)
        first = layer(x)
        torch.testing.assert_close(layer.noise_scale, noise_scale_now(layer, 0.3), rtol=1e-6, atol=0)
        show(whole * factor)
        assert torch.equal(layer(x), first)
        first.sum().backward()  # what it has saved is as it was
        show(whole.flatten()[:32])
    assert len(measured) == 2


def test_a_compiled_forward_measures_what_it_alone_has() -> None:
    layer = FlatLoraLinear.from_linear(nn.Linear(8, 8), backend="reference", sigma=0.3)
    whole, x = layer.weight.detach(), torch.randn(2, 8)
    compiled = torch.compile(layer, backend="eager")
    for factor in (1.0, 2.0):
        layer.weight = nn.Parameter(whole.flatten()[:32], requires_grad=False)
        layer.noise_controller.advance()
        layer.weight = nn.Parameter(whole * factor, requires_grad=False)
        y = compiled(x)
        torch.testing.assert_close(layer.noise_scale, noise_scale_now(layer, 0.3), rtol=1e-6, atol=0)
        assert torch.equal(y, layer(x))


def test_a_weight_that_moves_between_forwards() -> None:
    """As FSDP2's may in the first step: it is measured anew, and what an earlier forward has saved stays as it was."""
    layer = FlatLoraLinear.from_linear(nn.Linear(8, 8), backend="reference", sigma=0.3)
    x = torch.randn(2, 8, requires_grad=True)
    grads = []
    for _ in range(2):
        layer.weight.data = layer.weight.data.clone()
        grads.append(layer(x).sum())
    first, second = (torch.autograd.grad(y, x)[0] for y in grads)
    assert torch.equal(first, second)


def test_second_call_adds_to_the_first() -> None:
    model = Net()
    first = apply_flat_lora(model, ["first"], r=2, backend="reference", verbose=False)
    second = apply_flat_lora(model, [r"block.0"], r=3, backend="reference", verbose=False)
    assert first is second
    assert [(m.r, m.stream) for m in layers(model)] == [(2, 0), (3, 1)]
    assert model.first.lora_A.requires_grad


def test_a_cell_that_runs_again() -> None:
    """Equal settings: the controller as it is; others are named with the present ones."""
    model = Net()
    given: dict[str, Any] = {
        "sigma": 0.1, "schedule": "linear", "total_steps": 9, "seed": -1, "r": 2, "lora_alpha": 3, "lora_dropout": 0.2,
        "noise": "rademacher", "dtype": torch.float32, "backend": "reference", "verbose": False,
    }  # fmt: skip
    names = ["first", "block.0"]
    controller = apply_flat_lora(model, names, **given)
    before = list(model.modules())
    controller.advance()
    assert apply_flat_lora(model, names, **given) is controller and controller.step == 1
    assert apply_flat_lora(model, ["first"], backend=None, verbose=False) is controller
    assert list(map(id, model.modules())) == list(map(id, before))
    for changes, message in [
        ({"sigma": 0.2}, r"^sigma: .* with 0\.1, got 0\.2; .* assign controller\.target_sigma"),
        ({"total_steps": 8}, r"^total_steps: .* with 9, got 8; .* assign controller\.total_steps"),
        ({"schedule": "cosine"}, "^schedule: .* with 'linear', got 'cosine'; .* make the layers anew"),
        ({"seed": 4}, "^seed: .* got 4; .* make the layers anew"),
        ({"r": 3}, "^r: expected 2, .* got 3; .* make the layers anew"),
        ({"lora_alpha": 4}, "^lora_alpha: expected 3, .* got 4"),
        ({"lora_dropout": 0.1}, r"^lora_dropout: expected 0\.2, .* got 0\.1"),
        ({"dtype": torch.bfloat16}, r"^dtype: expected torch\.float32, .* got torch\.bfloat16"),
        ({"train_weight": True}, "^train_weight: expected False, .* got True"),
        ({"noise": "gaussian"}, "^noise: expected 'rademacher', .* got 'gaussian'"),
        (
            {"noise_controller": NoiseController()}
            | dict.fromkeys(("sigma", "schedule", "total_steps", "seed")),
            "^noise_controller: expected the NoiseController",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            apply_flat_lora(model, names, **(given | changes))
    with pytest.raises(TypeError, match="^options: expected keyword arguments of FlatLoraLinear, got 'rank'"):
        apply_flat_lora(model, names, rank=2)


def test_schedules_of_your_own_are_compared_by_their_code() -> None:
    def cell(slope: float) -> NoiseController:
        return apply_flat_lora(model, ["first"], schedule=lambda step: step * slope, verbose=False)

    model = Net()
    assert cell(0.5) is cell(0.5)
    with pytest.raises(ValueError, match="^schedule: "):
        cell(0.25)


def test_layers_know_their_names() -> None:
    model = Net()
    apply_flat_lora(model, ["0"], verbose=False)
    assert model.block[0].flat_lora_name == "block.0"


def test_shared_linear_stays_one_layer() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    apply_flat_lora(model, ".*", r=2, backend="reference", verbose=False)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], FlatLoraLinear)


def test_tied_weights_share_a_stream() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in "abc"})
    model["c"].weight = model["a"].weight
    controller = apply_flat_lora(model, ".*", r=2, backend="reference", verbose=False)
    assert [model[name].stream for name in "abc"] == [0, 1, 0]
    tied = FlatLoraLinear(model["b"].weight, noise_controller=controller, backend="reference")
    new = FlatLoraLinear(torch.zeros(4, 4), noise_controller=controller, backend="reference")
    assert (tied.stream, new.stream) == (1, 2)
    assert len(controller.layers) == 5


def test_prints_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = Net()
    apply_flat_lora(model, ["first"], r=2, backend="reference")
    total = sum(p.numel() for p in model.parameters())
    parameters, noise = capsys.readouterr().out.splitlines()
    assert f"{2 * (16 + 24)} of {total:,}" in parameters
    assert noise == "weight noise on 1 layer (stream 0); sigma 0.05, constant"
    assert fk.print_trainable_parameters(model) == (80, total)
    assert capsys.readouterr().out == parameters + "\n"


def test_prints_in_the_first_process_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")  # as torchrun sets it, before there is a group
    apply_flat_lora(Net(), ["first"])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        apply_flat_lora(Net(), ["first"])
        assert bool(capsys.readouterr().out) == (rank == 0)


def test_layers_of_peft_are_refused_where_it_is_not_installed() -> None:
    kind = type("LoraLayer", (nn.Module,), {"__module__": "peft.tuners.lora.layer"})
    model = nn.Sequential(nn.Linear(4, 4), type("Linear", (kind,), {})())
    with pytest.raises(ValueError, match="^model: .* from flatlora_kernels.integrations.peft import apply_"):
        apply_flat_lora(model, ["0"])
    assert not layers(model)


@pytest.mark.parametrize("attribute", ["forward", "apply_mlp"])
def test_parents_that_compute_layers_themselves_are_refused(attribute: str) -> None:
    """More of it in integrations/test_peft_bypass.py."""

    def fused(x: Tensor) -> Tensor:
        return kernels_of_lora.mlp(model.block, x)

    kernels_of_lora: Any = object()
    model = Net()
    setattr(model.block, attribute, fused)
    with pytest.raises(
        ValueError, match="^target_modules: .* got 'block.2': 'block' around it .*lora_mlp_kernel"
    ):
        apply_flat_lora(model, ["first", "block.2"])
    assert not layers(model)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_training_lowers_the_loss(target: Target, sigma: float) -> None:
    model, controller = small_model(sigma=sigma, device=target.device, backend=target.backend)
    x, goal = randn(64, 16, device=target.device), randn(64, 3, seed=1, device=target.device)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)

    def loss() -> Tensor:
        return F.mse_loss(model(x), goal)

    before = loss().item()
    for _ in range(100):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.advance()
    model.eval()
    assert loss().item() < 0.8 * before
