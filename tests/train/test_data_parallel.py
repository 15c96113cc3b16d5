"""Two processes with DistributedDataParallel against one that sees both batches."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from flatlora_kernels import apply_flat_lora

B, STEPS, ACCUMULATION = 3, 3, 2
CASES: dict[str, dict[str, Any]] = {
    "same noise": {},
    "noise per rank": {"by_rank": True},
    "a draw per sequence": {"samples": "batch"},
    "a draw per sequence, ranks apart": {"samples": "batch", "apart": True},
    "a draw per sequence, uneven": {"samples": "batch", "apart": True, "cut": 2},
    "added up on each rank": {"no_sync": True},
}
# Those of one process with the same draws, and those that no process alone would have.
EQUAL = dict(zip(CASES, (True, False, False, True, True, True), strict=True))


def micro_batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    """2 B sequences of 4 tokens and what they should give."""
    generator = torch.Generator().manual_seed(100 * step + part)
    draw = torch.randn(2 * B, 4, 9, generator=generator, dtype=torch.float64)
    return draw[..., :6], draw[..., 6:]


def train(
    rank: int,
    world: int,
    samples: Any = 1,
    by_rank: bool = False,
    apart: bool = False,
    cut: int = B,
    no_sync: bool = False,
) -> dict[str, Any]:
    """`cut`: where the batch of 2 B ends for rank 0, and begins for rank 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    controller = apply_flat_lora(
        model, ".*", r=2, sigma=0.5, schedule="linear", total_steps=STEPS, samples=samples, backend="reference",
        verbose=False,
    )  # fmt: skip
    for layer in controller.layers:
        nn.init.normal_(layer.lora_B)
    controller.rank = rank if by_rank else 0
    controller.sample_offset = rank * cut if apart else 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    controller.attach(optimizer)
    wrapped: nn.Module = DistributedDataParallel(model) if world > 1 else model
    seeds, sigmas = [], []
    for step in range(STEPS):
        seeds.append(controller.tensor("cpu").item())
        sigmas.append(controller.sigma)
        for part in range(ACCUMULATION):
            x, goal = micro_batch(step, part)
            if world > 1:
                x, goal = (t[cut:] if rank else t[:cut] for t in (x, goal))
            share = (
                len(x) * world / (2 * B)
            )  # of the mean over all ranks, which DistributedDataParallel takes
            alone: Any = wrapped.no_sync() if no_sync and world > 1 and part < ACCUMULATION - 1 else None
            with alone or contextlib.nullcontext():
                ((wrapped(x) - goal).square().mean() * share / ACCUMULATION).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"weights": weights, "seeds": seeds, "sigmas": [*sigmas, controller.sigma]}


def train_with_join(rank: int, world: int) -> dict[str, Any]:
    """Rank 0 has a batch more than rank 1; afterwards all go to the furthest step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    controller = apply_flat_lora(model, ".*", r=2, sigma=0.5, seed=1, backend="reference", verbose=False)
    for layer in controller.layers:
        nn.init.normal_(layer.lora_B)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    controller.attach(optimizer)
    wrapped: Any = DistributedDataParallel(model) if world > 1 else model
    with Join([wrapped]) if world > 1 else contextlib.nullcontext():
        for step in range(STEPS - rank):
            x, goal = micro_batch(step, 0)
            share = 1.0
            if world > 1:
                x, goal = x.chunk(2)[rank], goal.chunk(2)[rank]
            elif step == STEPS - 1:
                x, goal, share = x.chunk(2)[0], goal.chunk(2)[0], 0.5
            ((wrapped(x) - goal).square().mean() * share).backward()
            optimizer.step()
            optimizer.zero_grad()
    if world > 1:
        furthest = torch.tensor(controller.step)
        torch.distributed.all_reduce(furthest, torch.distributed.ReduceOp.MAX)
        controller.move_to(controller.base, int(furthest))
    with torch.no_grad():
        seen = model(micro_batch(9, 0)[0])
    return {"weights": dict(model.named_parameters()), "state": controller.state_dict(), "seen": seen}


def all_cases(rank: int, world: int) -> dict[str, Any]:
    found = {name: train(rank, world, **case) for name, case in CASES.items()}
    return {**found, "join": train_with_join(rank, world)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return on_ranks(2, all_cases, tmp_path_factory.mktemp("ranks"))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Within the rounding of float64 sums; noise_scale is float32, of weights that differ in their last bits."""
    return all(torch.allclose(left[n], right[n], rtol=1e-5, atol=1e-6) for n in left)


@pytest.mark.parametrize("case", CASES)
def test_ranks_stay_alike(ranks: list[dict[str, dict[str, Any]]], case: str) -> None:
    one, two = (rank[case] for rank in ranks)
    assert all(torch.equal(one["weights"][n], two["weights"][n]) for n in one["weights"])
    assert one["sigmas"] == two["sigmas"]
    assert one["sigmas"][-1] == 0.5, "the target, whatever the ranks and micro-batches"
    assert (one["seeds"] == two["seeds"]) == (case != "noise per rank")
    assert len(set(one["seeds"])) == STEPS


@pytest.mark.parametrize("case, equal", EQUAL.items())
def test_two_ranks_are_one_with_both_batches(
    ranks: list[dict[str, dict[str, Any]]], case: str, equal: bool
) -> None:
    """With the same noise, or with one draw per sequence and ranks kept apart; and with no other choice."""
    alone = train(0, 1, samples=CASES[case].get("samples", 1))
    assert same(ranks[0][case]["weights"], alone["weights"]) == equal


def test_noise_matters(ranks: list[dict[str, dict[str, Any]]]) -> None:
    found = [ranks[0][case]["weights"] for case in list(CASES)[:4]]
    for i, weights in enumerate(found):
        assert not any(same(weights, other) for other in found[:i])


def test_a_rank_that_ends_sooner(ranks: list[dict[str, dict[str, Any]]]) -> None:
    alone = train_with_join(0, 1)
    for rank in ranks:
        found = rank["join"]
        assert found["state"] == alone["state"]
        assert same(found["weights"], alone["weights"])
        torch.testing.assert_close(found["seen"], alone["seen"], rtol=1e-5, atol=1e-6)
