"""What all methods do: micro-batches, exceptions, resumed runs, layers of PEFT, 16 bits, memory, ranks, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_models import (
    ALPHA,
    LR,
    RANK,
    SETUPS,
    Eager,
    Embedded,
    build,
    closures,
    data,
    ready,
    sgd,
    snapshot,
)
from small_models import layers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flatlora_kernels import apply_flat_lora
from flatlora_kernels.methods import METHODS, make
from flatlora_kernels.train.controller import NoiseController


def test_every_method_is_tested() -> None:
    assert set(SETUPS) == set(METHODS)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"lpf-sgd"}))
def test_micro_batches_add_up(name: str) -> None:
    """Halves of a batch equal the batch, at the same noise (of which LPF-SGD gives each half its own)."""
    results = []
    for parts in (1, 2):
        model, method = ready(name)
        losses = [method.step(*closures(model, parts)) for _ in range(3)]
        results.append((torch.stack(losses), *snapshot(model)))
    for whole, halves in zip(*results, strict=True):
        torch.testing.assert_close(whole, halves)
    assert method.controller.step == 3


@pytest.mark.parametrize("name", sorted(METHODS))
def test_global_generators_are_not_touched(name: str) -> None:
    before = torch.get_rng_state()
    model, method = ready(name)
    method.step(*closures(model))
    assert torch.equal(torch.get_rng_state(), before)


class Broken(Exception):
    pass


@pytest.mark.parametrize("passes", range(4))
@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_exception_leaves_nothing_behind(name: str, passes: int) -> None:
    """In each of a step's forward passes in turn; the next steps are as if nothing had happened."""
    model, method = ready(name)
    twin, calm = ready(name)
    layer = layers(model)[0]
    attributes = set(vars(layer))
    method.step(*closures(model))
    calm.step(*closures(twin))
    before, state = snapshot(model), copy.deepcopy(method.state_dict())
    count = 0

    def counted(closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            nonlocal count
            count += 1
            if count > passes:
                raise Broken
            return closure()

        return call

    try:
        method.step(*map(counted, closures(model)))
    except Broken:
        assert all(map(torch.equal, snapshot(model), before))
        assert all(p.grad is None for p in model.parameters())
        assert method.controller.step == 1
        assert set(vars(layer)) == attributes
        assert layer.auxiliary is None
        assert model.training
        assert str(state) == str(method.state_dict())
        for _ in range(2):
            assert torch.equal(method.step(*closures(model)), calm.step(*closures(twin)))
        assert all(map(torch.equal, snapshot(model), snapshot(twin)))
    else:
        assert passes >= 2  # the method has one pass only


def test_clipping_sees_the_mean_gradient() -> None:
    model = build()
    method, eager = make("lora", model, sgd(model), max_grad_norm=0.01), Eager(model)
    gA, gB = eager.adapter_grads(eager.loss_and_grads(eager.merged())[1])
    norm = torch.cat([g.flatten() for g in gA + gB]).norm()
    assert norm > 0.01
    method.step(*closures(model))
    eager.descend([0.01 / norm * g for g in gA], [0.01 / norm * g for g in gB])
    for layer, A in zip(layers(model), eager.A, strict=True):
        torch.testing.assert_close(layer.lora_A.detach(), A, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["bi-lora", "eflat-lora", "sl-sam"])
def test_resumes(name: str) -> None:
    options = {"rate": 3.0} if name == "sl-sam" else {}
    model, method = ready(name, **options)
    for _ in range(2):
        method.step(*closures(model))
    again, resumed = ready(name, **options)
    again.load_state_dict(model.state_dict())
    assert str(resumed.state_dict()) != str(method.state_dict())
    resumed.controller.load_state_dict(method.controller.state_dict())
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    for _ in range(2):
        assert torch.equal(method.step(*closures(model)), resumed.step(*closures(again)))
    assert all(map(torch.equal, snapshot(model), snapshot(again)))
    assert str(resumed.state_dict()) == str(method.state_dict())
    with pytest.raises(ValueError, match="expected the keys"):
        resumed.load_state_dict({})


@pytest.mark.parametrize("name", ["flat-lora", "bi-lora", "lora-sam", "eflat-lora", "mezo"])
def test_layers_of_peft(name: str) -> None:
    """PEFT's layers train as ours."""
    peft = pytest.importorskip("peft")
    convert = pytest.importorskip("flatlora_kernels.integrations.peft").apply_flat_lora
    ours, sigma = (
        build(**({"sigma": 0.2} if name == "flat-lora" else {})),
        0.2 if name == "flat-lora" else 0.0,
    )
    plain_layers = [nn.Linear(12, 10), nn.Linear(10, 7)]
    for linear, layer in zip(plain_layers, layers(ours), strict=True):
        linear.weight, linear.bias = layer.weight, layer.bias
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0", "2"])
    theirs = peft.get_peft_model(nn.Sequential(plain_layers[0], nn.Tanh(), plain_layers[1]), config)
    convert(theirs, noise_controller=NoiseController(seed=5, sigma=sigma))
    converted = [m for m in theirs.modules() if hasattr(m, "lora_A")]
    with torch.no_grad():
        for layer, other in zip(layers(ours), converted, strict=True):
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)
    for model in (ours, theirs):
        method = make(name, model, sgd(model))
        for _ in range(3):
            method.step(*closures(model))
    for layer, other in zip(layers(ours), converted, strict=True):
        torch.testing.assert_close(other.lora_A["default"].weight, layer.lora_A)
        torch.testing.assert_close(other.lora_B["default"].weight, layer.lora_B)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_bfloat16(name: str) -> None:
    model = build(**SETUPS[name]).bfloat16()
    for layer in layers(model):
        if layer.r:
            layer.lora_A, layer.lora_B = (nn.Parameter(t.float()) for t in (layer.lora_A, layer.lora_B))
    before = snapshot(model)
    options = {"neftune": {"embedding": Embedded(model)}, "esam": {"gamma": 1}}.get(name, {})
    method = make(name, model, sgd(model), **options)
    x, y = (t.bfloat16() for t in data())
    for _ in range(2):
        assert torch.isfinite(method.step(lambda: F.mse_loss(model(x).float(), y.float())))
    assert not all(map(torch.equal, before, snapshot(model)))


@pytest.mark.parametrize("name", ["lora", "flat-lora", "bi-lora", "eflat-lora", "lpf-sgd"])
def test_recomputed_forwards_see_the_same(name: str) -> None:
    x, y = data()

    def loss(model: Any, rows: slice, recompute: bool) -> Tensor:
        body = nn.Sequential(*model[:2])
        hidden = checkpoint(body, x[rows], use_reentrant=False) if recompute else body(x[rows])
        return F.mse_loss(model[2](hidden), y[rows])

    results = []
    for recompute in (False, True):
        model, method = ready(name)
        halves = [partial(loss, model, rows, recompute) for rows in (slice(0, 4), slice(4, 8))]
        for _ in range(2):
            method.step(*halves)
        results.append(snapshot(model))
    assert all(map(torch.equal, *results))


def test_attached_controllers_advance_once() -> None:
    model, method = ready("flat-lora")
    method.controller.attach(method.optimizer)
    for _ in range(2):
        method.step(*closures(model))
    assert method.controller.step == 2


def test_gradients_outside_the_optimizer_pile_up_nowhere() -> None:
    model = build()
    method = make("lora-sam", model, torch.optim.SGD([layer.lora_B for layer in layers(model)], lr=LR))
    other, alone = ready("lora-sam")
    assert torch.equal(method.step(*closures(model)), alone.step(*closures(other)))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(layers(model)[0].lora_A, build()[0].lora_A)
    torch.testing.assert_close(layers(model)[0].lora_B, layers(other)[0].lora_B)


def test_a_schedule_without_its_end_moves_nothing() -> None:
    model = build(sigma=0.2, schedule="cosine")
    method, before = make("flat-lora", model, sgd(model)), snapshot(model)
    with pytest.raises(ValueError, match="total_steps"):
        method.step(*closures(model))
    assert all(map(torch.equal, before, snapshot(model)))


class Largest(TorchDispatchMode):
    """The largest tensor in elements that any operator made, of memory that is not `known`."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize(
    ("name", "size", "bound"),
    [
        ("bi-lora", 256, 8 * 256),
        ("eflat-lora", 256, 8 * 256),
        ("mezo", 256, 256 * 256 // 4),
        ("es", 2048, 2048 * 2048 // 4),
        ("eggroll", 256, 30 * 256),
    ],
)
def test_nothing_of_the_weights_size(name: str, size: int, bound: int) -> None:
    """The whole step, but what the op itself may use."""
    full = name in ("mezo", "es", "eggroll")
    model = nn.Sequential(nn.Linear(size, size))
    options = {"r": 0, "train_weight": True} if full else {"r": 4, "lora_alpha": 8}
    apply_flat_lora(model, ["0"], noise_controller=NoiseController(sigma=0.0), verbose=False, **options)
    method = make(name, model, sgd(model))
    x = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    with Largest([layers(model)[0].weight]) as largest:
        method.step(lambda: model(x).square().mean())
    assert 4 * size <= largest.elements <= bound


@pytest.mark.parametrize("name", ["bi-lora", "mezo"])
def test_ranks_average(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another rank had found three times the gradient: the mean is twice as much."""
    dist = torch.distributed
    moved = []
    for world in (1, 2):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda world=world: world)
        monkeypatch.setattr(dist, "all_reduce", lambda t: t.mul_(4))
        model, method = ready(name, **({"rho": 100.0} if name == "bi-lora" else {}))
        target = layers(model)[0].weight if name == "mezo" else method.auxiliary[1]
        before = target.detach().clone()
        method.step(*closures(model))
        moved.append(target.detach() - before)
    torch.testing.assert_close(moved[1], 2 * moved[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["es", "mezo"])
def test_ranks_that_draw_apart_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(r=0, train_weight=True, rank=1)
    make(name, model, sgd(model))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="expected rank=0 for .*, whose ranks draw alike, got 1"):
        make(name, model, sgd(model))


def test_ranks_sample_alike() -> None:
    """Parameters and layers, whatever noise each rank draws."""
    for name in ("esam", "sl-sam"):
        found = []
        for rank in (0, 1):
            model, method = build(rank=rank), None
            method = make(name, model, sgd(model), **({"gamma": 1} if name == "esam" else {}))
            for _ in range(3):
                method.step(*closures(model))
            found.append(snapshot(model))
        assert all(map(torch.equal, *found)), name


def other_controllers() -> nn.Module:
    model = build()
    layers(model)[0].noise_controller = NoiseController()
    return model


def trained_weights() -> nn.Module:
    return build(r=0, train_weight=True)


def frozen_A() -> nn.Module:
    model = build()
    layers(model)[0].lora_A.requires_grad_(False)
    return model


def frozen() -> nn.Module:
    return build().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "model", "options", "message"),
    [
        ("unknown", build, {}, "name: expected one of lora, flat-lora"),
        ("flat-lora", build, {}, "sigma: expected a controller with sigma > 0"),
        ("lora", lambda: nn.Linear(2, 2), {}, "share one NoiseController, got 0 layers"),
        (
            "flat-lora",
            lambda: nn.Linear(2, 2),
            {"noise_controller": NoiseController()},
            "expected layers with noise",
        ),
        ("lora", build, {"noise_controller": NoiseController()}, "the one of the model's layers"),
        ("rwp", lambda: build(sigma=0.1), {}, "expected norm='row'"),
        ("rwp", lambda: build(sigma=0.1, norm="row"), {"mix": 0.0}, "mix: expected 0 < mix <= 1"),
        ("lpf-sgd", lambda: build(sigma=0.1), {}, "expected norm='row'"),
        ("full-noise", lambda: build(sigma=0.1), {}, "train_weight=True"),
        ("flat-lora", lambda: build(sigma=0.1), {"share": 0.0}, "share: expected 0 < share <= 1, got 0"),
        ("bi-lora", frozen, {}, "trainable adapters"),
        ("bi-lora", build, {"rho": 0.0}, "rho: expected a number > 0"),
        ("bi-lora", build, {"auxiliary_rank": 0}, "auxiliary_rank: expected an int >= 1"),
        ("esam", build, {"beta": 0.0}, "beta: expected 0 < beta <= 1, got 0"),
        ("esam", build, {"gamma": 1.5}, "gamma: expected 0 < gamma <= 1, got 1.5"),
        ("sl-sam", build, {"share": 0.0}, "share: expected 0 < share <= 1, got 0"),
        ("sl-sam", build, {"rate": 0.0}, "rate: expected a number > 0, got 0"),
        ("sl-sam", frozen, {}, "expected parameters that require gradients"),
        ("sam", build, {"rho": 0.0}, "rho: expected a number > 0"),
        ("lora-sam", build, {"rho": -1.0}, "rho: expected a number > 0"),
        ("lora-sam", lambda: build(r=0), {}, "trainable adapters"),
        ("lora-pro", lambda: build(r=0), {}, "trainable adapters"),
        ("lora-pro", frozen_A, {}, "A and B trained together"),
        ("halora", build, {"sigma": 0.0}, "sigma: expected a number > 0, got 0"),
        ("halora", build, {"mu": -1.0}, "mu: expected a number >= 0, got -1"),
        ("halora", build, {"chips": 0}, "chips: expected an int >= 1 or None, got 0"),
        ("halora", lambda: build(sigma=0.1), {}, "expected sigma=0 for HaLoRA"),
        ("halora", lambda: build(r=0), {}, "trainable adapters"),
        ("eflat-lora", build, {"beta": 0.0}, "beta: expected 0 < beta <= 1"),
        ("neftune", build, {}, "embedding: expected to be given"),
        ("mezo", frozen, {}, "expected parameters that require gradients"),
        ("mezo", trained_weights, {"eps": 0.0}, "eps: expected a number > 0"),
        (
            "mezo",
            trained_weights,
            {"max_grad_norm": 1.0},
            "max_grad_norm: expected None",
        ),
        ("eggroll", trained_weights, {"rank": 0}, "rank: expected an int >= 1, got 0"),
        ("es", trained_weights, {"sigma": 0.0}, "sigma: expected a number > 0"),
        ("es", trained_weights, {"population": 1}, "population: expected an int >= 2, got 1"),
        ("es", trained_weights, {"population": 4.5}, "population: expected an int >= 2, got 4.5"),
        ("es", trained_weights, {"population": 3, "antithetic": True}, "expected an even int >= 2, got 3"),
        ("es", trained_weights, {"together": 31}, "together: expected 1 to the population, 30, got 31"),
        (
            "es",
            trained_weights,
            {"together": 2},
            "together: expected 1 where more is trained .* got 2 and 2 other",
        ),
    ],
)
def test_errors(name: str, model: Callable[[], nn.Module], options: dict[str, Any], message: str) -> None:
    made = model()
    with pytest.raises(ValueError, match=message):
        make(name, made, torch.optim.SGD(made.parameters(), lr=LR), **options)


def test_errors_of_step() -> None:
    model, method = ready("lora")
    for arguments, message in (
        ((), "expected at least one"),
        (
            (lambda: model(torch.ones(1, 12).double()),),
            r"closures\[0\]: expected to return a loss of one value",
        ),
        ((lambda: 1.0,), r"closures\[0\]: .* got float"),
        ((lambda: torch.ones(()),), r"closures\[0\]: expected a loss with a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            method.step(*arguments)  # type: ignore[arg-type]
    model.eval()
    with pytest.raises(RuntimeError, match=r"call model.train\(\)"):
        method.step(*closures(model))
    weights = build(r=0, train_weight=True)
    with pytest.raises(ValueError, match="SGD without momentum that minimises, for MeZO, got AdamW"):
        make("mezo", weights, torch.optim.AdamW(weights.parameters()))
    with pytest.raises(ValueError, match="for EvolutionStrategy, got SGD with momentum or maximize"):
        make("es", weights, torch.optim.SGD(weights.parameters(), lr=LR, maximize=True))
