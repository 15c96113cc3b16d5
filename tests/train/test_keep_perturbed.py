"""`keep_perturbed`: the W + eps of a step made once, and used by all of its micro-batches."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import GRADIENT_FACTOR
from small_models import all_equal, calls_of, gradients, layers, small_layer, small_model, trainable
from targets import randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flatlora_kernels as fk
from flatlora_kernels import FlatLoraLinear, NoiseController, QuantizedWeight, apply_flat_lora
from flatlora_kernels.train.layer import NoisyLayer, instead_of_noise


def kept_of(layer: Any) -> Tensor | None:
    return None if layer._kept is None else layer._kept[0]


def perturbed(layer: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """What the reference materialises."""
    weight = layer.weight.detach()
    return fk.perturb_weight(
        weight if dtype is None else weight.to(dtype),
        layer.noise_scale,
        seed=layer.noise_controller.value,
        stream=layer.stream,
        noise=layer.noise,
        antithetic=layer.antithetic,
        backend="reference",
        **options,
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one where a W + eps is made."""
    return calls_of("perturb_weight", monkeypatch)


def closeness(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("noise", ["gaussian", "rademacher", "hadamard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_fused_op(noise: str, dtype: torch.dtype) -> None:
    """Output and gradients, on whatever backend this machine would choose; exactly `perturb`'s weight."""
    layer = small_layer(dtype=dtype, noise=noise, backend=None, antithetic=True)
    x = randn(6, 40, dtype=dtype).requires_grad_()
    inputs = [x, layer.lora_A, layer.lora_B]

    def outcome() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), inputs)]

    drawn = outcome()
    layer.noise_controller.keep_perturbed = True
    kept = outcome()
    draw = {"seed": layer._seed, "stream": layer.stream, "noise": noise, "antithetic": True}
    assert torch.equal(kept_of(layer), fk.perturb_weight(layer.weight, layer.noise_scale, **draw))
    for a, b in zip(kept, drawn, strict=True):
        assert a.dtype == b.dtype
        assert closeness(a.float(), b.float()) < GRADIENT_FACTOR * torch.finfo(dtype).eps
    layer.noise_controller.target_sigma = 0.0
    assert closeness(layer(x).float(), drawn[0].float()) > 0.01, "there was noise"


def test_one_copy_a_step_with_the_bits_of_the_oracle(made: list[int]) -> None:
    model, controller = small_model(noise_controller=NoiseController(sigma=0.3, keep_perturbed=True))
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    controller.attach(optimizer)
    before: list[Tensor] = []
    for step in range(3):
        for _ in range(4):
            model(randn(5, 16)).square().sum().backward()
        assert len(made) == 3 * (step + 1)
        now = [kept_of(layer) for layer in layers(model)]
        for layer, kept in zip(layers(model), now, strict=True):
            assert torch.equal(kept, perturbed(layer))
            assert not kept.requires_grad and layer.weight.grad is None
        assert not before or not any(map(torch.equal, now, before))
        before = [t.clone() for t in now]
        references = [weakref.ref(t) for t in now]
        del now, kept
        optimizer.step()  # moves the noise on
        optimizer.zero_grad()
        gc.collect()
        assert [r() for r in references] == [None] * 3, "freed"
        assert all(layer._kept is None for layer in layers(model))


def test_trains_as_without() -> None:
    ends = []
    for keep in (False, True):
        model, controller = small_model(seed=1)
        controller.keep_perturbed = keep
        optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
        controller.attach(optimizer)
        for step in range(3):
            for part in range(2):
                model(randn(5, 16, seed=2 * step + part)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(trainable(model))
    assert all_equal(*ends), "on the reference backend, which materialises as well"


def moves() -> Iterator[Any]:
    def seed(model: nn.Module, controller: NoiseController) -> None:
        controller.load_state_dict({"base": 5, "step": 0})

    def sigma(model: nn.Module, controller: NoiseController) -> None:
        controller.target_sigma = 0.1

    def rank(model: nn.Module, controller: NoiseController) -> None:
        controller.rank = 3

    def sample(model: nn.Module, controller: NoiseController) -> None:
        controller.sample_offset = 2

    def weight(model: nn.Module, controller: NoiseController) -> None:
        with torch.no_grad():
            model.first.weight.mul_(2)

    def adapter(model: nn.Module, controller: NoiseController) -> None:
        with torch.no_grad():
            model.first.lora_B.mul_(2)

    def loaded(model: nn.Module, controller: NoiseController) -> None:
        other = small_model()[0]
        nn.init.normal_(other.first.weight)
        model.load_state_dict(other.state_dict())

    def to(model: nn.Module, controller: NoiseController) -> None:
        model.double()

    return (
        pytest.param(move, id=move.__name__)
        for move in (seed, sigma, rank, sample, weight, adapter, loaded, to)
    )


@pytest.mark.parametrize("move", moves())
def test_follows_whatever_moves_the_noise(move: Any) -> None:
    model, controller = small_model()
    controller.keep_perturbed = True
    model(randn(5, 16))
    before = kept_of(model.first)
    move(model, controller)
    x = randn(5, 16, dtype=model.first.weight.dtype)
    noisy = gradients(model, x)
    kept = kept_of(model.first)
    assert kept.dtype != before.dtype or not torch.equal(kept, before)
    assert torch.equal(kept, perturbed(model.first, sample=controller.sample_offset))
    controller.keep_perturbed = False
    assert model.first._kept is None
    assert all_equal(noisy, gradients(model, x))


def test_not_in_eval_nor_without_noise(made: list[int]) -> None:
    model, controller = small_model()
    x = randn(5, 16)
    quiet = model.eval()(x)
    controller.keep_perturbed = True
    assert torch.equal(model(x), quiet)
    model.train()
    with controller.disabled():
        assert torch.equal(model(x), quiet)
    controller.target_sigma = 0.0
    assert torch.equal(model(x), quiet)
    assert not made
    controller.target_sigma = 0.3
    noisy = model(x)
    assert len(made) == 3
    assert torch.equal(model.eval()(x), quiet) and not torch.allclose(noisy, quiet, atol=1e-3)


def test_is_in_no_state() -> None:
    model, controller = small_model()
    names = list(model.state_dict())
    plain = controller.state_dict()
    controller.keep_perturbed = True
    model(randn(5, 16))
    assert list(model.state_dict()) == names and controller.state_dict() == plain
    assert len(list(model.buffers())) == 0
    twin = copy.deepcopy(model)
    assert all(layer._kept is None for layer in layers(twin)), "copies make their own"
    assert twin.first.noise_controller.keep_perturbed
    x = randn(5, 16)
    assert torch.equal(twin(x), model(x))
    assert "keep_perturbed=True" in repr(controller)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool, made: list[int]) -> None:
    model, controller = small_model()
    x = randn(5, 16).requires_grad_()

    def recomputed() -> list[Tensor]:
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
        for p in (x, *trainable(model)):
            p.grad = None
        loss.backward()
        return [p.grad for p in (x, *trainable(model))]

    drawn = recomputed()
    controller.keep_perturbed = True
    assert all_equal(recomputed(), drawn)
    assert len(made) == 3, "once, not again where the forward is computed again"


def test_under_autocast() -> None:
    """In the type of the product, rounded once, as the op does it."""
    layer = small_layer()
    x = randn(6, 40)
    with torch.autocast("cpu", torch.bfloat16):
        drawn = layer(x)
        layer.noise_controller.keep_perturbed = True
        assert torch.equal(layer(x), drawn)
    assert torch.equal(kept_of(layer), perturbed(layer, torch.bfloat16))
    layer(x)
    assert torch.equal(kept_of(layer), perturbed(layer)), "without autocast another"


def test_a_late_backward_sees_the_noise_of_its_forward() -> None:
    layer = small_layer()
    layer.noise_controller.keep_perturbed = True
    x = randn(6, 40).requires_grad_()
    y = layer(x)
    seen = perturbed(layer) + layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    layer.noise_controller.advance()
    layer(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.ones_like(y) @ seen)


def test_others_draw_as_they_did() -> None:
    """Measures and methods that put noise of their own in the place of a layer's."""
    layer = small_layer()
    x = randn(6, 40)
    arguments = {**layer.noise_arguments(x), "samples": 2, "seed": 9, "sample_offset": 0}
    with instead_of_noise([layer], lambda layer: arguments):
        drawn = layer(x)
    layer.noise_controller.keep_perturbed = True
    layer(x)
    with instead_of_noise([layer], lambda layer: arguments):
        assert torch.equal(layer(x), drawn)


def test_compiled() -> None:
    layer = small_layer()
    controller, x = layer.noise_controller, randn(6, 40)
    controller.keep_perturbed = True
    compiled = torch.compile(layer, backend="eager")
    for _ in range(2):
        y = compiled(x)
        assert torch.equal(kept_of(layer), perturbed(layer))
        torch.testing.assert_close(y, layer(x))
        controller.advance()


class Own(NoisyLayer):
    def __init__(self, controller: NoiseController) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(4, 8), requires_grad=False)
        self._set_up_noise(controller)

    def _weight_in_use(self) -> Any:
        return self.weight, None, None, 1.0


def packed() -> QuantizedWeight:
    return QuantizedWeight.quantize(randn(32, 64), "nf4")


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda c: small_layer(noise_controller=c, samples=2), "samples=2, each of which"),
        (lambda c: small_layer(noise_controller=c, samples="batch"), "samples='batch', each of which"),
        (lambda c: small_layer(noise_controller=c, noise_accum="split"), "'noise_accum': 'split'"),
        (
            lambda c: small_layer(noise_controller=c, noise="hadamard", strategy="transform"),
            "'strategy': 'transform'",
        ),
        (lambda c: small_layer(noise_controller=c, train_weight=True), "a weight that trains"),
        (lambda c: FlatLoraLinear(packed(), r=2, noise_controller=c), "a packed weight"),
        (Own, "a Own, which draws in each call"),
    ],
)
def test_refused(make: Any, got: str) -> None:
    """Whether it is asked for before or after; in both cases nothing has changed."""
    early, late = NoiseController(sigma=0.3, keep_perturbed=True), NoiseController(sigma=0.3)
    message = "keep_perturbed: expected True for frozen, whole, dense weights .*, got .*"
    with pytest.raises(ValueError, match=message + got):
        make(early)
    assert early.layers == ()
    layer = make(late)
    with pytest.raises(ValueError, match=message + got):
        late.keep_perturbed = True
    assert not late.keep_perturbed and late.layers == (layer,)


def test_refused_where_the_weight_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        layer = small_layer(noise_controller=NoiseController(sigma=0.3))
        layer.weight.__dict__.update(status)
        with pytest.raises(ValueError, match="got a weight that is shared out among processes"):
            layer.noise_controller.keep_perturbed = True

    status = {"ds_status": None}  # DeepSpeed's mark
    refused()
    status.clear()
    monkeypatch.setattr(fk.train.layer, "is_sharded", lambda weight: True)
    refused()


def test_refused_once_the_weight_trains() -> None:
    layer = small_layer(noise_controller=NoiseController(sigma=0.3, keep_perturbed=True))
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="got a weight that trains"):
        layer(randn(6, 40))


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_is_a_bool(value: Any) -> None:
    with pytest.raises(TypeError, match="keep_perturbed: expected a bool, got"):
        NoiseController(keep_perturbed=value)
    with pytest.raises(TypeError, match="keep_perturbed: expected a bool, got"):
        NoiseController().keep_perturbed = value


def test_layers_that_come_later() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    controller = apply_flat_lora(model, ["0"], r=2, sigma=0.3, verbose=False)
    controller.keep_perturbed = True
    apply_flat_lora(model, ["1"], r=2, verbose=False)
    model(randn(2, 6))
    assert [kept_of(layer).shape for layer in controller.layers] == [(8, 6), (3, 8)]


@pytest.mark.parametrize("kind", ["plain", "dora", "dropout", "two adapters with dropout", "conv1d"])
def test_layers_of_peft(kind: str, made: list[int]) -> None:
    peft = pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    from flatlora_kernels.integrations import peft as integration

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 6) if kind == "conv1d" else nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    dropout = 0.3 if "dropout" in kind else 0.0
    config = peft.LoraConfig(
        r=2, target_modules=["0", "2"], use_dora=kind == "dora", lora_dropout=dropout, init_lora_weights=False
    )
    model = peft.get_peft_model(model, config)
    if "two" in kind:
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    controller = integration.apply_flat_lora(model, sigma=0.3, backend="reference", verbose=False)
    x = randn(5, 6)

    def outcome() -> list[Tensor]:
        torch.manual_seed(1)
        return gradients(model, x)

    drawn, names = outcome(), list(peft.get_peft_model_state_dict(model))
    controller.keep_perturbed = True
    kept = outcome()
    for a, b in zip(outcome(), drawn, strict=True):
        torch.testing.assert_close(a, b)
    assert all_equal(outcome(), kept) and len(made) == 2
    assert list(peft.get_peft_model_state_dict(model)) == names
    controller.advance()
    assert not all_equal(outcome(), kept) and len(made) == 4
    controller.keep_perturbed = False
    integration.remove_flat_lora(model)
    assert not any("_kept" in vars(module) for module in model.modules())


def test_mixtures_of_experts_are_refused() -> None:
    pytest.importorskip("peft")
    from flatlora_kernels.integrations.experts import FlatParamWrapper

    assert not FlatParamWrapper._can_keep
