"""The methods against eager implementations of their papers' formulas, and what is particular to one of them."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_models import (
    CLOSE,
    LR,
    RANK,
    SCALING,
    Eager,
    add,
    build,
    closures,
    data,
    ready,
    sgd,
    snapshot,
)
from small_models import layers
from torch import Tensor, nn

from flatlora_kernels import (
    FlatLoraLinear,
    QuantizedWeight,
    apply_flat_lora,
    materialize_noise,
    perturb_weight,
)
from flatlora_kernels.methods import ALIASES, METHODS, EFlatLoRA, make, on_chips, zeroth_order
from flatlora_kernels.methods.base import generator
from flatlora_kernels.train.controller import NoiseController


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


@pytest.mark.parametrize("name", ["flat-lora", "full-noise"])
def test_noise_on_some_layers(name: str) -> None:
    """As Flat-LoRA where one of two layers has its noise, or both; never none, and other layers each step."""
    full = name == "full-noise"
    model = build(sigma=0.3, **({"r": 0, "train_weight": True} if full else {}))
    method, eager = make(name, model, sgd(model), share=0.4), Eager(model)
    seen = set()
    for _ in range(8):
        eps = eager.noise(method.controller, root_K=True)
        options = {
            on: eager.loss_and_grads(
                [W + (e if i in on else 0) for i, (W, e) in enumerate(zip(eager.merged(), eps, strict=True))],
                bias=eager.bias if full else None,
            )
            for on in ((0,), (1,), (0, 1))
        }
        loss = method.step(*closures(model))
        (on,) = [on for on, (expected, _) in options.items() if abs(expected - loss) < 1e-6]
        seen.add(on)
        G = options[on][1]
        if full:
            eager.W, eager.bias = add(eager.W, G[:2], -LR), add(eager.bias, G[2:], -LR)
        else:
            eager.descend(*eager.adapter_grads(G))
    eager.agrees(model)
    assert len(seen) > 1


def test_falling_noise_on_packed_weights() -> None:
    """QeRL's schedule: none in the first stage, then less from stage to stage; the packed base stays as it is."""
    stages, total, end = 4, 12, 0.1

    def falling(step: int) -> float:
        stage = step * stages // total
        return 0.0 if stage == 0 else end ** ((stage - 1) / (stages - 2))

    torch.manual_seed(0)
    weight = QuantizedWeight.quantize(torch.randn(32, 64, dtype=torch.float64) / 8, "nf4")
    parts = [part.clone() for part in weight.parts if part is not None]
    controller = NoiseController(sigma=0.4, schedule=falling, seed=3)
    model = nn.Sequential(FlatLoraLinear(weight, r=2, noise_controller=controller))
    (layer,) = layers(model)
    nn.init.normal_(layer.lora_B, std=0.3)
    method, W = make("flat-lora", model, sgd(model)), weight.dequantize().double()
    A, B = (p.detach().clone().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) / 8
    sigmas = []
    for _ in range(total):
        sigmas.append(method.controller.sigma)
        merged = (W + layer.scaling * B @ A).detach()
        scale = (sigmas[-1] * merged.norm(dim=1) / 8).float()
        eps = materialize_noise(
            scale, 64, seed=method.controller.value, stream=layer.stream, dtype=torch.float64
        )
        expected = F.linear(x.double(), W + eps + layer.scaling * B @ A).square().mean()
        grads = torch.autograd.grad(expected, (A, B))
        loss = method.step(lambda: model(x).square().mean())
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=0)
        A, B = ((p - LR * g).detach().requires_grad_() for p, g in zip((A, B), grads, strict=True))
    torch.testing.assert_close(layer.lora_B.detach().double(), B.detach(), rtol=1e-4, atol=1e-6)
    assert sigmas == pytest.approx([0.0] * 3 + [0.4] * 3 + [0.4 * end**0.5] * 3 + [0.4 * end] * 3)
    assert all(
        torch.equal(*pair) for pair in zip(parts, [p for p in weight.parts if p is not None], strict=True)
    )


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

    class Descent(torch.optim.SGD):  # torch's LBFGS has maximize since 2.14
        def __init__(self, params: Any) -> None:
            super().__init__(params)

    with pytest.raises(ValueError, match="ascent: expected to be given, because Descent"):
        make("bi-lora", model, Descent(model.parameters()))


def test_other_ascents() -> None:
    model = build()
    method = make("bi-lora", model, sgd(model), ascent=lambda p: torch.optim.Adam(p, 0.01, maximize=True))
    losses = [method.step(*closures(model)) for _ in range(2)]
    assert all(map(torch.isfinite, losses))
    with pytest.raises(ValueError, match="maximize=True"):
        make("bi-lora", model, sgd(model), ascent=lambda p: torch.optim.Adam(p, 0.01))


def test_sam() -> None:
    """On weights and biases."""
    model, rho = build(r=0, train_weight=True), 0.4
    method, eager = make("sam", model, sgd(model), rho=rho), Eager(model)
    for _ in range(3):
        loss, G = eager.loss_and_grads(eager.W, bias=eager.bias)
        c = torch.cat([g.flatten() for g in G]).norm()
        worst = add(eager.W + eager.bias, G, rho / c)
        _, G = eager.loss_and_grads(worst[:2], bias=worst[2:])
        torch.testing.assert_close(method.step(*closures(model)), loss)
        eager.W, eager.bias = add(eager.W, G[:2], -LR), add(eager.bias, G[2:], -LR)
    eager.agrees(model)


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


def losses_of_samples(eager: Eager, trained: list[Tensor]) -> Tensor:
    """`trained`: A and B of each layer in turn."""
    x, y = data()
    pairs = zip(eager.W, trained[::2], trained[1::2], eager.bias, strict=True)
    first, second = ((W + SCALING * B @ A, b) for W, A, B, b in pairs)
    return (F.linear(F.linear(x, *first).tanh(), *second) - y).square().mean(1)


def grads_of(eager: Eager, trained: list[Tensor], rows: Tensor | None = None) -> list[Tensor]:
    trained = [t.detach().requires_grad_() for t in trained]
    losses = losses_of_samples(eager, trained)
    return list(torch.autograd.grad((losses if rows is None else losses[rows]).mean(), trained))


def ordered(model: nn.Module, method: Any) -> list[int]:
    """Of each of the optimiser's parameters its place among A and B of each layer in turn."""
    places = [id(p) for layer in layers(model) for p in (layer.lora_A, layer.lora_B)]
    return [places.index(id(p)) for group in method.optimizer.param_groups for p in group["params"]]


def drawn(method: Any, use: str, below: list[float]) -> list[int]:
    rng = generator(torch.device("cpu"), method.controller.base, use, method.controller.step)
    u = torch.rand(len(below), generator=rng, dtype=torch.float64).tolist()
    nearest_to = min(range(len(below)), key=lambda i: u[i] / below[i])
    return [i for i, p in enumerate(below) if u[i] < p] or [nearest_to]


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_esam(gamma: float) -> None:
    model, rho, beta = build(), 0.4, 0.6
    method, eager = make("esam", model, sgd(model), rho=rho, beta=beta, gamma=gamma), Eager(model)
    x, y = data()
    asked = []

    def closure(rows: Tensor | None = None) -> Tensor:
        asked.append(rows)
        pick = slice(None) if rows is None else rows
        losses = (model(x[pick]) - y[pick]).square().mean(1)
        return losses if gamma < 1 else losses.mean()

    parts = set()
    for _ in range(4):
        trained = [t for pair in zip(eager.A, eager.B, strict=True) for t in pair]
        chosen = [ordered(model, method)[i] for i in drawn(method, "esam", [beta] * 4)]
        parts.add(tuple(chosen))
        G = grads_of(eager, trained)
        norm = torch.cat([G[i].flatten() for i in chosen]).norm()
        worst = [t + (rho / beta / norm * G[i] if i in chosen else 0) for i, t in enumerate(trained)]
        before, after = losses_of_samples(eager, trained), losses_of_samples(eager, worst)
        rows = (after - before).argsort(descending=True)[: int(gamma * 8)]
        G = grads_of(eager, worst, rows)
        torch.testing.assert_close(method.step(closure), before.mean())
        if gamma < 1:
            assert sorted(asked[-1].tolist()) == sorted(rows.tolist())
        eager.descend(G[::2], G[1::2])
    eager.agrees(model)
    assert len(parts) > 1
    if gamma < 1:
        with pytest.raises(ValueError, match=r"closures\[0\]: expected to return a loss for each sample"):
            method.step(lambda rows: model(x).sum())


def test_sl_sam() -> None:
    model, rho, share, rate = build(), 0.4, 0.7, 3.0
    method, eager = make("sl-sam", model, sgd(model), rho=rho, share=share, rate=rate), Eager(model)
    order, p = ordered(model, method), [share] * 4
    seen, capped, least = set(), False, 1.0
    for _ in range(12):
        trained = [t for pair in zip(eager.A, eager.B, strict=True) for t in pair]
        sampled = drawn(method, "sl-sam", p)
        seen.add(tuple(sampled))
        G = grads_of(eager, trained)
        norms = {i: float(G[order[i]].norm()) for i in sampled}
        total = math.sqrt(sum(n**2 for n in norms.values()))
        worst = list(trained)
        for i in sampled:
            worst[order[i]] = trained[order[i]] + rho / total * G[order[i]]
        H = grads_of(eager, worst)
        torch.testing.assert_close(method.step(*closures(model)), losses_of_samples(eager, trained).mean())
        moved = [h if order.index(place) in sampled else torch.zeros_like(h) for place, h in enumerate(H)]
        eager.descend(moved[::2], moved[1::2])
        top = max((n / p[i]) ** 2 for i, n in norms.items())
        v = [
            q * math.exp(-rate / q * (top - (norms[i] / q) ** 2)) if i in norms else q
            for i, q in enumerate(p)
        ]
        full: list[int] = []  # at 1
        while True:
            budget, rest = share * 4 - len(full), sum(q for i, q in enumerate(v) if i not in full)
            p = [1.0 if i in full else q * budget / rest for i, q in enumerate(v)]
            above = [i for i, q in enumerate(p) if q > 1]
            if not above:
                break
            full += above
        assert method.probabilities == pytest.approx(p, rel=1e-6)
        assert sum(p) == pytest.approx(share * 4)
        capped, least = capped or max(p) == 1, min(least, *p)
    eager.agrees(model)
    assert len(seen) > 2 and capped and least < 0.5
    assert all(q.requires_grad for q in method.optimizer.param_groups[0]["params"])
    before = method.probabilities
    for wrong in ([1.0], [0.0] * 4, [2.0] * 4, [math.nan] * 4, None, "abcd"):
        with pytest.raises(ValueError, match="expected 4 numbers, 0 < p <= 1, got"):
            method.load_state_dict({"probabilities": wrong})
    assert method.probabilities == before
    x, y = data()
    method.step(lambda: F.mse_loss(model(x), y) * math.inf)
    assert method.probabilities == before, "nothing is learnt of what is not finite"


def test_sl_sam_leaves_the_others_alone() -> None:
    """No weight decay and no moments: their gradients are none. What was frozen since stays frozen."""
    model = build()
    method = make(
        "sl-sam",
        model,
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.5),
    )
    trained = method.optimizer.param_groups[0]["params"]
    before = snapshot(model)
    method.step(*closures(model))
    still = [torch.equal(a, b) for a, b in zip(snapshot(model), before, strict=True)]
    frozen = sum(1 for p in model.parameters() if not p.requires_grad)
    stepped = [p for p in trained if method.optimizer.state[p]]
    assert 0 < len(stepped) < len(trained) and sum(still) == frozen + len(trained) - len(stepped)
    lone = stepped[0].requires_grad_(False)
    before = lone.clone()
    for _ in range(3):
        method.step(*closures(model))
    assert torch.equal(lone, before) and not lone.requires_grad


def nearest(columns: list[Tensor], wanted: Tensor) -> Tensor:
    """Least squares, the shortest of all that are nearest."""
    return torch.linalg.pinv(torch.stack([c.flatten() for c in columns], 1)) @ wanted.flatten()


def units(rows: int, columns: int) -> list[Tensor]:
    return list(torch.eye(rows * columns, dtype=torch.float64).view(-1, rows, columns))


@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("zero_B", [False, True])
def test_lora_pro(zero_B: bool, sigma: float) -> None:
    """By least squares over all entries of both gradients at once, and over those of X."""
    model = build(sigma=sigma)
    if zero_B:
        for layer in layers(model):
            nn.init.zeros_(layer.lora_B)
    method, eager = make("lora-pro", model, sgd(model)), Eager(model)
    for _ in range(2):
        eps = eager.noise(method.controller, root_K=True)
        loss, G = eager.loss_and_grads(add(eager.merged(), eps))
        hA, hB = eager.adapter_grads(G)
        gA, gB = [], []
        for A, B, g, a, b in zip(eager.A, eager.B, G, hA, hB, strict=True):
            columns = [SCALING * B @ E for E in units(*A.shape)] + [SCALING * E @ A for E in units(*B.shape)]
            flat = nearest(columns, g)
            first, second = flat[: A.numel()].view_as(A), flat[A.numel() :].view_as(B)
            step = SCALING * (B @ first + second @ A)
            if not zero_B:  # of all first + X A, second - B X
                moves = [torch.cat([(E @ A).flatten(), -(B @ E).flatten()]) for E in units(RANK, RANK)]
                wanted = torch.cat([(a - first).flatten(), (b - second).flatten()])
                X = nearest(moves, wanted).view(RANK, RANK)
                first, second = first + X @ A, second - B @ X
            torch.testing.assert_close(SCALING * (B @ first + second @ A), step)
            gA.append(first)
            gB.append(second)
        torch.testing.assert_close(method.step(*closures(model)), loss)
        eager.descend(gA, gB)
        if zero_B:
            break
    eager.agrees(model, atol=1e-6)  # the inverses are damped by 1e-8


def of_chip(weights: list[Tensor], sigma: float, seed: int, noise: str = "gaussian") -> list[Tensor]:
    return [
        materialize_noise(
            torch.full((len(w),), sigma * float(w.abs().max())),
            w.shape[1],
            seed=seed,
            stream=stream,
            noise=noise,
            dtype=torch.float64,
        )
        for stream, w in enumerate(weights)
    ]


def test_lora_pro_with_gradients_of_low_rank() -> None:
    """As with a batch smaller than the rank, in float32: B is of low rank then, and its inverse has no bound."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24))
    controller = NoiseController(sigma=0.0)
    apply_flat_lora(model, ["0"], r=8, lora_alpha=16, noise_controller=controller, verbose=False)
    method = make("lora-pro", model, sgd(model, lr=0.01))
    x, y = torch.randn(2, 32), torch.randn(2, 24)
    losses = [float(method.step(lambda: F.mse_loss(model(x), y))) for _ in range(20)]
    assert losses[-1] < losses[0] and float(layers(model)[0].lora_A.detach().abs().max()) < 10


@pytest.mark.parametrize("chips", [None, 2])
def test_halora(chips: int | None) -> None:
    """The adapter has no noise, nor has it a part in the noise's size."""
    model, sigma, mu = build(seed=5), 0.1, 0.03
    method, eager = make("halora", model, sgd(model), sigma=sigma, mu=mu, chips=chips), Eager(model)
    for step in range(3):
        eps = of_chip(eager.W, sigma, 5 + (step % chips if chips else step))
        loss, G = eager.loss_and_grads(add(eager.merged(), eps))
        gA, gB = eager.adapter_grads(G)
        for A, B, a, b in zip(eager.A, eager.B, gA, gB, strict=True):
            a += mu * 2 * A @ A.t() @ A / (A @ A.t()).norm()
            b += mu * 2 * B @ B.t() @ B / (B.t() @ B).norm()
        torch.testing.assert_close(method.step(*closures(model)), loss)
        eager.descend(gA, gB)
    eager.agrees(model)

    x, y = data()
    found = on_chips(model, lambda: float(F.mse_loss(model(x), y)), sigma=sigma, chips=(5, 70))
    for seed, value in zip((5, 70), found, strict=True):
        expected, _ = eager.loss_and_grads(add(eager.merged(), of_chip(eager.W, sigma, seed)))
        assert value == pytest.approx(float(expected), rel=1e-6)
    assert model.training and found[0] != found[1]
    (other,) = on_chips(
        model, lambda: float(F.mse_loss(model(x), y)), sigma=sigma, chips=(5,), noise="rademacher"
    )
    expected, _ = eager.loss_and_grads(add(eager.merged(), of_chip(eager.W, sigma, 5, "rademacher")))
    assert other == pytest.approx(float(expected), rel=1e-6)
    model.float()
    twice = [float(method.step(lambda: F.mse_loss(model(x.float()), y.float()))) for _ in range(2)]
    assert all(map(math.isfinite, twice))
    with pytest.raises(ValueError, match="frozen base weights, got one that trains, '0'"):
        on_chips(build(r=0, train_weight=True), lambda: 0.0, sigma=sigma, chips=(1,))
    layers(model)[0].merge()
    with pytest.raises(ValueError, match="expected adapters in use, '0' has them merged"):
        on_chips(model, lambda: 0.0, sigma=sigma, chips=(1,))
    with pytest.raises(ValueError, match="layers with noise, got none"):
        on_chips(nn.Linear(2, 2), lambda: 0.0, sigma=sigma, chips=(1,))
    with pytest.raises(ValueError, match="sigma: expected a number > 0"):
        on_chips(model, lambda: 0.0, sigma=0.0, chips=(1,))


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


def drawn_moves(method: Any, theta: list[Tensor], sample: int) -> list[Tensor]:
    """Standard noise for each parameter; for EGGROLL's weights a product of rank 2."""
    rank, found = getattr(method, "rank", None), []
    draw = partial(materialize_noise, seed=method.controller.value, dtype=torch.float64)
    for stream, t in enumerate(theta):
        if rank is None or t.dim() == 1:
            ones = torch.ones(len(t) if t.dim() > 1 else 1)
            z = draw(ones, t.shape[-1], stream=stream, sample=sample, antithetic=method.antithetic)
            found.append(z.view_as(t))
            continue
        A, B = (
            draw(
                torch.ones(rank),
                length,
                stream=len(theta) + 2 * stream + i,
                sample=sample // 2 if method.antithetic else sample,
            )
            for i, length in enumerate(reversed(t.shape))
        )
        sign = -1 if method.antithetic and sample % 2 else 1
        found.append(sign / math.sqrt(rank) * B.t() @ A)
    return found


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("name", ["es", "eggroll"])
def test_evolution_strategies(name: str, together: int, antithetic: bool) -> None:
    """With biases, which are moved in place, or a population of six in passes of four and two."""
    model, P, sigma = build(r=0, train_weight=True), 6, 2**-5
    if together > 1:
        for layer in layers(model):
            layer.bias.requires_grad_(False)
    options = {"population": P, "sigma": sigma, "antithetic": antithetic, "together": together}
    options |= {"rank": 2} if name == "eggroll" else {}
    method, eager = make(name, model, sgd(model, weight_decay=0.1), **options), Eager(model)
    x, y = data()

    def of_members(count: int) -> Tensor:
        errors = model(x.repeat(count, 1)) - y.repeat(count, 1)
        return errors.square().view(count, -1).mean(1)

    for _ in range(3):
        theta = eager.W if together > 1 else [*eager.W, *eager.bias]
        z = [drawn_moves(method, theta, sample) for sample in range(P)]
        assert torch.equal(z[0][0], -z[1][0]) == antithetic
        moved = [add(theta, member, sigma) for member in z]
        losses = torch.stack([eager.loss_and_grads(m[:2], bias=m[2:] or None)[0] for m in moved])
        Z = (losses - losses.mean()) / (((losses - losses.mean()) ** 2).mean().sqrt() + 1e-8)
        found = method.step(of_members) if together > 1 else method.step(*closures(model))
        torch.testing.assert_close(found, losses.mean())
        steps = [sum(w * member[i] for w, member in zip(Z, z, strict=True)) / P for i in range(len(theta))]
        theta = [t - LR * (s + 0.1 * t) for t, s in zip(theta, steps, strict=True)]
        eager.W, eager.bias = theta[:2], theta[2:] or eager.bias
    eager.agrees(model, atol=2e-8)  # the weights of the sum are float32
    if together > 1:
        with pytest.raises(
            ValueError, match=r"closures\[0\]: expected to return the losses of 4 members, got float"
        ):
            method.step(lambda count: 1.0)


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, -1), (-1, 1, -1), (1, -1, 0)])
def test_sums_of_draws(signs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """No draw has a negative scale, which not every backend knows."""
    model = build(r=0, train_weight=True)
    method = make("es", model, sgd(model), population=3)
    trained = next(iter(method._in_op.values()))
    before = trained.matrix.clone()
    expected = sum(
        sign
        * (i + 1)
        * materialize_noise(torch.ones(10), 12, seed=method.controller.value, sample=i, dtype=torch.float64)
        for i, sign in enumerate(signs)
    )
    scales = []

    def noted(weight: Tensor, noise_scale: Tensor, **options: Any) -> Tensor:
        scales.append(noise_scale)
        return perturb_weight(weight, noise_scale, **options)

    monkeypatch.setattr(zeroth_order, "perturb_weight", noted)
    slopes = torch.tensor([s * (i + 1.0) for i, s in enumerate(signs)], dtype=torch.float64)
    method._descend(-slopes / LR, range(3))
    torch.testing.assert_close(trained.matrix - before, expected, rtol=1e-5, atol=1e-6)
    assert len(scales) == 3 * 4 and all((scale >= 0).all() for scale in scales)


@pytest.mark.parametrize("name", ["es", "eggroll", "mezo"])
def test_zeroth_order_follows_a_cast(name: str) -> None:
    """The parameters' memory is another after it."""
    model, method = ready(name)
    model.float()
    x, y = (t.float() for t in data())
    before = snapshot(model)
    method.step(lambda: F.mse_loss(model(x), y))
    assert not any(map(torch.equal, snapshot(model), before))


def test_a_member_that_is_not_finite_has_no_say() -> None:
    model = build(r=0, train_weight=True)
    method, count = make("es", model, sgd(model), population=4), 0
    x, y = data()

    def closure() -> Tensor:
        nonlocal count
        count += 1
        return F.mse_loss(model(x), y) * (math.inf if count in (2, *range(5, 9)) else 1)

    before = snapshot(model)
    method.step(closure)
    after = snapshot(model)
    assert all(t.isfinite().all() for t in after) and not any(map(torch.equal, before, after))
    method.step(closure)
    assert all(map(torch.equal, snapshot(model), after)), "none was finite"


def test_eggroll_in_float16() -> None:
    """Coefficients that float16 does not have: half of the step would be lost."""
    weights = []
    for dtype in (torch.float16, torch.float64):
        model = nn.Sequential(nn.Linear(64, 48, bias=False)).to(dtype)
        nn.init.zeros_(model[0].weight)
        controller = NoiseController(sigma=0.0, seed=1)
        apply_flat_lora(model, ["0"], r=0, train_weight=True, noise_controller=controller, verbose=False)
        method = make("eggroll", model, sgd(model, lr=3e-5), population=64)
        method._losses = torch.linspace(-1, 1, 64)
        method._update()
        weights.append(layers(model)[0].weight.detach().double())
    apart = (weights[0] - weights[1]).norm() / weights[1].norm()
    assert apart < 0.02


@pytest.mark.parametrize("name", ["es", "eggroll"])
def test_evolution_strategies_find_their_way(name: str) -> None:
    model = build(r=0, train_weight=True, seed=1)
    method = make(name, model, sgd(model, lr=0.05), population=20, sigma=0.05)
    losses = [float(method.step(*closures(model, 1))) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


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


def test_aliases() -> None:
    model = build()
    assert type(make("efm-lora", model, sgd(model))) is EFlatLoRA
    assert set(ALIASES.values()) <= set(METHODS) and not set(ALIASES) & set(METHODS)


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
