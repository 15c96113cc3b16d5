"""The methods against eager implementations of their papers' formulas, which form every N x K matrix; and what all do.

The models are in float64, so that only an error of the formula shows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flatlora_kernels import FlatLoraLinear, apply_flat_lora, materialize_noise
from flatlora_kernels.methods import METHODS, EFlatLoRA, make
from flatlora_kernels.methods.neftune import generator
from flatlora_kernels.train.controller import NoiseController

LR, RANK, ALPHA = 0.2, 3, 6.0
SCALING = ALPHA / RANK
CLOSE = {"rtol": 1e-6, "atol": 1e-9}  # eps and its std are float32


def build(*, r: int = RANK, train_weight: bool = False, **controller: Any) -> nn.Module:
    """Two layers with a tanh between; B is not zero, so that every gradient is there from the first step."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 7)).double()
    apply_flat_lora(
        model,
        ["0", "2"],
        noise_controller=NoiseController(**{"seed": 5, "sigma": 0.0, **controller}),
        r=r,
        lora_alpha=ALPHA,
        train_weight=train_weight,
        verbose=False,
    )
    for layer in layers(model):
        if r:
            nn.init.normal_(layer.lora_B, std=0.3)
    torch.set_rng_state(state)
    return model


def layers(model: nn.Module) -> list[FlatLoraLinear]:
    return [m for m in model.modules() if isinstance(m, FlatLoraLinear)]


def data(rows: int = 8) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return (torch.randn(rows, n, generator=rng, dtype=torch.float64) for n in (12, 7))  # type: ignore[return-value]


def closures(model: nn.Module, parts: int = 2) -> list[Callable[[], Tensor]]:
    x, y = data()
    pairs = zip(x.chunk(parts), y.chunk(parts), strict=True)
    return [lambda a=a, b=b: F.mse_loss(model(a), b) for a, b in pairs]


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **{"lr": LR, **options})


class Eager:
    """The same network in plain torch: the weights in use are given as (N, K) matrices."""

    def __init__(self, model: nn.Module) -> None:
        self.W = [m.weight.detach().clone() for m in layers(model)]
        self.bias = [m.bias.detach().clone() for m in layers(model)]
        self.A = [m.lora_A.detach().clone() for m in layers(model) if m.r]
        self.B = [m.lora_B.detach().clone() for m in layers(model) if m.r]

    def merged(self) -> list[Tensor]:
        if not self.A:
            return list(self.W)
        return [W + SCALING * B @ A for W, A, B in zip(self.W, self.A, self.B, strict=True)]

    def loss_and_grads(
        self, weights: list[Tensor], part: int | None = None, bias: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Of the whole batch or of one half, with respect to the merged weights, and then the biases where given."""
        x, y = data()
        if part is not None:
            x, y = x.chunk(2)[part], y.chunk(2)[part]
        inputs = [t.detach().requires_grad_() for t in weights + (bias or [])]
        b = inputs[2:] or self.bias
        loss = F.mse_loss(F.linear(F.linear(x, inputs[0], b[0]).tanh(), inputs[1], b[1]), y)
        return loss.detach(), list(torch.autograd.grad(loss, inputs, materialize_grads=True))

    def adapter_grads(self, G: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        gA = [SCALING * B.t() @ g for B, g in zip(self.B, G, strict=True)]
        gB = [SCALING * g @ A.t() for A, g in zip(self.A, G, strict=True)]
        return gA, gB

    def descend(self, gA: list[Tensor], gB: list[Tensor]) -> None:
        self.A = [A - LR * g for A, g in zip(self.A, gA, strict=True)]
        self.B = [B - LR * g for B, g in zip(self.B, gB, strict=True)]

    def noise(self, controller: NoiseController, root_K: bool, sample: int = 0) -> list[Tensor]:
        found = []
        for stream, w in enumerate(self.merged()):
            scale = controller.sigma * w.norm(dim=1) / (math.sqrt(w.shape[1]) if root_K else 1)
            found.append(
                materialize_noise(
                    scale.float(),
                    w.shape[1],
                    seed=controller.value,
                    stream=stream,
                    sample=sample,
                    dtype=torch.float64,
                )
            )
        return found

    def agrees(self, model: nn.Module) -> None:
        for i, layer in enumerate(layers(model)):
            torch.testing.assert_close(layer.weight.detach(), self.W[i], **CLOSE)
            torch.testing.assert_close(layer.bias.detach(), self.bias[i], **CLOSE)
            if self.A:
                torch.testing.assert_close(layer.lora_A.detach(), self.A[i], **CLOSE)
                torch.testing.assert_close(layer.lora_B.detach(), self.B[i], **CLOSE)


def add(a: list[Tensor], b: list[Tensor], scale: Any = 1) -> list[Tensor]:
    return [x + scale * y for x, y in zip(a, b, strict=True)]


# The formulas.


def test_lora_has_no_noise() -> None:
    model = build(sigma=0.5)
    method, eager = make("lora", model, sgd(model)), Eager(model)
    for _ in range(3):
        loss, G = eager.loss_and_grads(eager.merged())
        torch.testing.assert_close(method.step(*closures(model)), loss)
        eager.descend(*eager.adapter_grads(G))
    eager.agrees(model)


def test_flat_lora() -> None:
    model = build(sigma=0.3, schedule="cosine", total_steps=4)
    method, eager = make("flat-lora", model, sgd(model)), Eager(model)
    for step in range(4):
        assert method.controller.sigma == pytest.approx(0.3 * (1 - math.cos(math.pi * step / 4)) / 2)
        eps = eager.noise(method.controller, root_K=True)
        loss, G = eager.loss_and_grads(add(eager.merged(), eps))
        torch.testing.assert_close(method.step(*closures(model)), loss)
        eager.descend(*eager.adapter_grads(G))
    eager.agrees(model)


def test_full_noise() -> None:
    model = build(r=0, train_weight=True, sigma=0.3)
    method, eager = make("full-noise", model, sgd(model)), Eager(model)
    for _ in range(3):
        eps = eager.noise(method.controller, root_K=True)
        _, G = eager.loss_and_grads(add(eager.W, eps), bias=eager.bias)
        method.step(*closures(model))
        eager.W, eager.bias = add(eager.W, G[:2], -LR), add(eager.bias, G[2:], -LR)
    eager.agrees(model)


@pytest.mark.parametrize("mix", [1.0, 0.3])
def test_rwp(mix: float) -> None:
    model = build(sigma=0.2, norm="row")
    method, eager = make("rwp", model, sgd(model), mix=mix), Eager(model)
    for _ in range(3):
        eps = eager.noise(method.controller, root_K=False)
        noisy, G = eager.loss_and_grads(add(eager.merged(), eps))
        clean, H = eager.loss_and_grads(eager.merged())
        torch.testing.assert_close(method.step(*closures(model)), mix * noisy + (1 - mix) * clean)
        eager.descend(*eager.adapter_grads(add([mix * g for g in G], H, 1 - mix)))
    eager.agrees(model)


def test_lpf_sgd() -> None:
    model = build(sigma=0.2, norm="row", sample_offset=4)
    method, eager = make("lpf-sgd", model, sgd(model)), Eager(model)
    for _ in range(3):
        total = [torch.zeros_like(w) for w in eager.W]
        for part in range(2):
            eps = eager.noise(method.controller, root_K=False, sample=4 + part)
            _, G = eager.loss_and_grads(add(eager.merged(), eps), part)
            total = add(total, G, 0.5)
        method.step(*closures(model))
        eager.descend(*eager.adapter_grads(total))
    eager.agrees(model)
    assert method.controller.sample_offset == 4


@pytest.mark.parametrize("rho", [0.05, 10.0])
def test_bi_lora(rho: float) -> None:
    model = build()
    method: Any = make("bi-lora", model, sgd(model), rho=rho, auxiliary_rank=2, ascent_lr=0.7)
    eager = Eager(model)
    A2, B2 = ([t.detach().clone() for t in method.auxiliary[i::2]] for i in (0, 1))
    assert all(t.shape[0] == 2 and 0 < t.abs().max() <= t.shape[1] ** -0.5 for t in A2)
    norms = []
    for _ in range(4):
        perturbed = add(eager.merged(), [b @ a for a, b in zip(A2, B2, strict=True)], SCALING)
        loss, G = eager.loss_and_grads(perturbed)
        torch.testing.assert_close(method.step(*closures(model)), loss)
        eager.descend(*eager.adapter_grads(G))
        up_A = [SCALING * b.t() @ g for b, g in zip(B2, G, strict=True)]
        up_B = [SCALING * g @ a.t() for a, g in zip(A2, G, strict=True)]
        A2, B2 = add(A2, up_A, 0.7), add(B2, up_B, 0.7)
        c = math.sqrt(sum(float((b @ a).norm()) ** 2 for a, b in zip(A2, B2, strict=True)))
        if c > rho:
            A2, B2 = ([t * math.sqrt(rho / c) for t in ts] for ts in (A2, B2))
        norms.append(c)
    eager.agrees(model)
    pairs = [t for pair in zip(A2, B2, strict=True) for t in pair]
    for found, expected in zip(method.auxiliary, pairs, strict=True):
        torch.testing.assert_close(found.detach(), expected, **CLOSE)
    assert (max(norms) > rho) == (rho < 1)  # one case clips, one does not


def test_lora_sam() -> None:
    model, rho = build(), 0.4
    method, eager = make("lora-sam", model, sgd(model), rho=rho), Eager(model)
    for _ in range(3):
        loss, G = eager.loss_and_grads(eager.merged())
        gA, gB = eager.adapter_grads(G)
        c = torch.cat([g.flatten() for g in gA + gB]).norm()
        A, B = eager.A, eager.B
        eager.A, eager.B = add(A, gA, rho / c), add(B, gB, rho / c)
        gA, gB = eager.adapter_grads(eager.loss_and_grads(eager.merged())[1])
        eager.A, eager.B = A, B
        torch.testing.assert_close(method.step(*closures(model)), loss)
        eager.descend(gA, gB)
    eager.agrees(model)


@pytest.mark.parametrize("zero_B", [False, True])
def test_eflat_lora(zero_B: bool) -> None:
    model, rho, beta = build(), 0.3, 0.6
    if zero_B:  # where training begins, and the pseudo-inverse of B is zero
        for layer in layers(model):
            nn.init.zeros_(layer.lora_B)
    method, eager = make("eflat-lora", model, sgd(model), rho=rho, beta=beta), Eager(model)
    E = [torch.zeros_like(b) for b in eager.B]
    for step in range(4):
        B = eager.B
        eager.B = add(B, E)
        loss, G = eager.loss_and_grads(eager.merged())
        gA, gB = eager.adapter_grads(G)
        for i, (a, b) in enumerate(zip(eager.A, eager.B, strict=True)):
            estimate = (gB[i] @ torch.linalg.pinv(a.t()) + torch.linalg.pinv(b.t()) @ gA[i]) / (2 * SCALING)
            eps_W = rho * estimate / estimate.norm()
            newest = eps_W @ torch.linalg.pinv(a) / SCALING
            E[i] = (1 - beta) * E[i] + beta * newest if step else newest
        eager.B = B
        torch.testing.assert_close(method.step(*closures(model)), loss)
        eager.descend(gA, gB)
    eager.agrees(model)
    assert isinstance(method, EFlatLoRA)
    for found, expected in zip(method.perturbation, E, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("in_op", [True, False])
def test_mezo(in_op: bool) -> None:
    """Weights that the op perturbs (streams 0 and 1) and biases that it cannot, or adapters alone (2 to 5)."""
    model, eps = build(r=0 if in_op else RANK, train_weight=in_op), 2**-7  # in float32, too
    method = make("mezo", model, sgd(model, weight_decay=0.1), eps=eps)
    eager = Eager(model)
    for _ in range(3):
        theta = (
            [*eager.W, *eager.bias]
            if in_op
            else [t for pair in zip(eager.A, eager.B, strict=True) for t in pair]
        )
        z = [
            materialize_noise(
                torch.ones(len(t) if t.dim() > 1 else 1),
                t.shape[-1],
                seed=method.controller.value,
                stream=i + (0 if in_op else 2),
                dtype=torch.float64,
            ).view_as(t)
            for i, t in enumerate(theta)
        ]
        losses = []
        for side in (1, -1):
            moved = add(theta, z, side * eps)
            if in_op:
                losses.append(eager.loss_and_grads(moved[:2], bias=moved[2:])[0])
            else:
                eager.A, eager.B = moved[::2], moved[1::2]
                losses.append(eager.loss_and_grads(eager.merged())[0])
        g = (losses[0] - losses[1]) / (2 * eps)
        torch.testing.assert_close(method.step(*closures(model)), (losses[0] + losses[1]) / 2)
        theta = [t - LR * (g * n + 0.1 * t) for t, n in zip(theta, z, strict=True)]
        if in_op:
            eager.W, eager.bias = theta[:2], theta[2:]
        else:
            eager.A, eager.B = theta[::2], theta[1::2]
    eager.agrees(model)


class Words(nn.Module):
    """Token embeddings, a mean over positions and a layer with an adapter; called as models of transformers are."""

    def __init__(self, vocabulary: int = 20, d: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.out = nn.Linear(d, 2)
        self.seen: Tensor | None = None

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.seen = self.embed(ids)
        return self.out(self.seen.mean(1))


def words() -> tuple[Words, Tensor, Tensor]:
    model = Words()
    apply_flat_lora(model, ["out"], noise_controller=NoiseController(seed=3, sigma=0.0), verbose=False)
    ids = torch.arange(12).view(2, 6)
    return model, ids, torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


@pytest.mark.parametrize("masked", [False, True])
def test_neftune(masked: bool) -> None:
    model, ids, mask = words()
    method = make("neftune", model, sgd(model), alpha=5.0)
    seen = []

    def closure() -> Tensor:
        loss = model(ids, attention_mask=mask if masked else None).square().mean()
        seen.append(model.seen)
        return loss

    value = method.controller.value
    method.step(closure, closure)
    for index, embedded in enumerate(seen):
        U = torch.empty(2, 6, 16).uniform_(
            -1, 1, generator=generator(torch.device("cpu"), value, "neftune", index)
        )
        for b in range(2):
            L = int(mask[b].sum()) if masked else 6
            expected = model.embed.weight[ids[b]] + 5.0 / math.sqrt(L * 16) * U[b]
            if masked:
                expected[L:] = model.embed.weight[ids[b, L:]]
            torch.testing.assert_close(embedded[b], expected)
    assert not torch.equal(seen[0], seen[1])  # each micro-batch has its own
    method.step(closure)
    assert not torch.equal(seen[0], seen[2])  # and each step
    model(ids)
    assert torch.equal(model.seen, F.embedding(ids, model.embed.weight))  # outside step there is none


def test_neftune_takes_no_mask_from_an_earlier_batch() -> None:
    model, ids, mask = words()
    seen = []

    def past_the_model() -> Tensor:
        seen.append(model.embed(ids))
        return model.out(seen[0].mean(1)).square().mean()

    make("neftune", model, sgd(model)).step(
        lambda: model(ids, attention_mask=mask).square().mean(), past_the_model
    )
    assert not (seen[0] == F.embedding(ids, model.embed.weight)).all(-1).any()


def test_neftune_noise_is_uniform() -> None:
    U = torch.empty(100_000).uniform_(-1, 1, generator=generator(torch.device("cpu"), 1, "neftune", 0))
    quantiles = U.quantile(torch.linspace(0.1, 0.9, 9))
    torch.testing.assert_close(quantiles, torch.linspace(-0.8, 0.8, 9), rtol=0, atol=0.02)


# What all methods do.

SETUPS: dict[str, dict[str, Any]] = {
    "lora": {"sigma": 0.2},
    "flat-lora": {"sigma": 0.2},
    "bi-lora": {},
    "lora-sam": {},
    "eflat-lora": {},
    "rwp": {"sigma": 0.2, "norm": "row"},
    "lpf-sgd": {"sigma": 0.2, "norm": "row"},
    "neftune": {},
    "full-noise": {"r": 0, "train_weight": True, "sigma": 0.2},
    "mezo": {"r": 0, "train_weight": True},
}


def ready(name: str, **options: Any) -> tuple[nn.Module, Any]:
    model = build(**SETUPS[name])
    if name == "neftune":
        options["embedding"] = Embedded(model)
    if name == "rwp":
        options["mix"] = 0.5
    return model, make(name, model, sgd(model), **options)


class Embedded(nn.Module):
    """Where NEFTune needs none of the model's modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


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


def plain(layer: FlatLoraLinear) -> tuple[Tensor, Tensor]:
    weight = layer.weight if not layer.r else layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    return weight, layer.bias


def test_auxiliary_is_no_parameter() -> None:
    model, method = ready("bi-lora", ascent_lr=0.7, rho=10.0)
    names, parameters = set(model.state_dict()), list(model.parameters())
    for _ in range(2):
        method.step(*closures(model))
    assert set(model.state_dict()) == names
    held = {id(p) for p in (*model.parameters(), *parameters)}
    auxiliary = method.auxiliary
    assert all(float(t.detach().norm()) > 0 for t in auxiliary)
    assert not held & {id(t) for t in auxiliary}
    x, _ = data()
    expected = F.linear(F.linear(x, *plain(layers(model)[0])).tanh(), *plain(layers(model)[1]))
    for mode in (False, True):
        torch.testing.assert_close(model.train(mode)(x), expected)


def test_auxiliary_has_no_decay_and_no_clipping() -> None:
    found = []
    for options, clip in (({}, None), ({"weight_decay": 3.0}, None), ({}, 1e-3)):
        model = build()
        method: Any = make("bi-lora", model, sgd(model, **options), ascent_lr=0.7, max_grad_norm=clip)
        method.step(*closures(model))
        found.append(([t.detach() for t in method.auxiliary], layers(model)[0].lora_A.detach()))
    for auxiliary, A in found[1:]:
        assert all(map(torch.equal, auxiliary, found[0][0]))
        assert not torch.allclose(A, found[0][1])


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


def test_ascent_follows_the_optimisers_rule() -> None:
    """Beside AdamW by Adam's: its first step has the size of the learning rate, whatever that of the gradient."""
    for options in ({}, {"ascent_lr": 0.25}):
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.125, weight_decay=0.5)
        method: Any = make("bi-lora", model, optimizer, rho=1e9, **options)
        _, G = Eager(model).loss_and_grads(Eager(model).merged())
        method.step(*closures(model))
        for A2, B2, g in zip(method.auxiliary[::2], method.auxiliary[1::2], G, strict=True):
            want = options.get("ascent_lr", 0.125) * (g @ A2.detach().t()).sign()
            torch.testing.assert_close(B2.detach(), want, rtol=1e-3, atol=1e-6)
    again = build()
    twin: Any = make("bi-lora", again, torch.optim.AdamW(again.parameters(), lr=0.125), rho=1e9)
    twin.load_state_dict(copy.deepcopy(method.state_dict()))
    again.load_state_dict(model.state_dict())
    method.ascent_lr = None
    for m, parts in ((method, closures(model)), (twin, closures(again))):
        m.step(*parts)
    assert all(map(torch.equal, twin.auxiliary, method.auxiliary)), "with its state"
    with pytest.raises(ValueError, match="ascent: expected to be given, because LBFGS"):
        make("bi-lora", model, torch.optim.LBFGS(model.parameters()))


def test_other_ascents() -> None:
    model = build()
    method = make("bi-lora", model, sgd(model), ascent=lambda p: torch.optim.Adam(p, 0.01, maximize=True))
    losses = [method.step(*closures(model)) for _ in range(2)]
    assert all(map(torch.isfinite, losses))
    with pytest.raises(ValueError, match="maximize=True"):
        make("bi-lora", model, sgd(model), ascent=lambda p: torch.optim.Adam(p, 0.01))


@pytest.mark.parametrize("name", ["bi-lora", "eflat-lora"])
def test_resumes(name: str) -> None:
    model, method = ready(name)
    for _ in range(2):
        method.step(*closures(model))
    again, resumed = ready(name)
    again.load_state_dict(model.state_dict())
    resumed.controller.load_state_dict(method.controller.state_dict())
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    for _ in range(2):
        assert torch.equal(method.step(*closures(model)), resumed.step(*closures(again)))
    assert all(map(torch.equal, snapshot(model), snapshot(again)))
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
    options = {"embedding": Embedded(model)} if name == "neftune" else {}
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


def test_tied_weights_take_one_zeroth_order_step() -> None:
    once, twice = (build(r=0, train_weight=True) for _ in range(2))
    lone = layers(twice)[0]
    extra = FlatLoraLinear(
        lone.weight, lone.bias, r=0, train_weight=True, noise_controller=lone.noise_controller
    )
    twice.add_module("spare", extra)
    x, y = data()
    for model in (once, twice):
        method = make("mezo", model, sgd(model))
        method.step(lambda model=model: F.mse_loss(model[:3](x), y))
    assert torch.equal(layers(once)[0].weight, lone.weight)


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
    ("name", "bound"), [("bi-lora", 8 * 256), ("eflat-lora", 8 * 256), ("mezo", 256 * 256 // 4)]
)
def test_nothing_of_the_weights_size(name: str, bound: int) -> None:
    """The whole step, but what the op itself may use."""
    full = name == "mezo"
    model = nn.Sequential(nn.Linear(256, 256))
    options = {"r": 0, "train_weight": True} if full else {"r": 4, "lora_alpha": 8}
    apply_flat_lora(model, ["0"], noise_controller=NoiseController(sigma=0.0), verbose=False, **options)
    method = make(name, model, sgd(model))
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    with Largest([layers(model)[0].weight]) as largest:
        method.step(lambda: model(x).square().mean())
    assert 4 * 256 <= largest.elements <= bound


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


def other_controllers() -> nn.Module:
    model = build()
    layers(model)[0].noise_controller = NoiseController()
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
        ("bi-lora", frozen, {}, "trainable adapters"),
        ("bi-lora", build, {"rho": 0.0}, "rho: expected a number > 0"),
        ("bi-lora", build, {"auxiliary_rank": 0}, "auxiliary_rank: expected an int >= 1"),
        ("lora-sam", build, {"rho": -1.0}, "rho: expected a number > 0"),
        ("lora-sam", lambda: build(r=0), {}, "trainable adapters"),
        ("eflat-lora", build, {"beta": 0.0}, "beta: expected 0 < beta <= 1"),
        ("neftune", build, {}, "embedding: expected to be given"),
        ("mezo", frozen, {}, "expected parameters that require gradients"),
        ("mezo", lambda: build(r=0, train_weight=True), {"eps": 0.0}, "eps: expected a number > 0"),
        (
            "mezo",
            lambda: build(r=0, train_weight=True),
            {"max_grad_norm": 1.0},
            "max_grad_norm: expected None",
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
    with pytest.raises(ValueError, match="SGD without momentum"):
        make("mezo", weights, torch.optim.AdamW(weights.parameters()))
