"""Two processes with DistributedDataParallel against one that sees both batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatlora_kernels import apply_flat_lora

B, STEPS, ACCUMULATION = 3, 3, 2
CASES: dict[str, dict[str, Any]] = {
    "same noise": {},
    "noise per rank": {"by_rank": True},
    "a draw per sequence": {"samples": "batch"},
    "a draw per sequence, ranks apart": {"samples": "batch", "apart": True},
}


def micro_batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    """2 B sequences of 4 tokens and what they should give."""
    generator = torch.Generator().manual_seed(100 * step + part)
    draw = torch.randn(2 * B, 4, 9, generator=generator, dtype=torch.float64)
    return draw[..., :6], draw[..., 6:]


def train(
    rank: int, world: int, samples: Any = 1, by_rank: bool = False, apart: bool = False
) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    controller = apply_flat_lora(
        model, ".*", r=2, sigma=0.5, schedule="linear", total_steps=STEPS, samples=samples, backend="reference",
        verbose=False,
    )  # fmt: skip
    for layer in controller.layers:
        nn.init.normal_(layer.lora_B)
    controller.rank = rank if by_rank else 0
    controller.sample_offset = rank * B if apart else 0
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
                x, goal = x[rank * B : (rank + 1) * B], goal[rank * B : (rank + 1) * B]
            ((wrapped(x) - goal).square().mean() / ACCUMULATION).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"weights": weights, "seeds": seeds, "sigmas": [*sigmas, controller.sigma]}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    try:
        torch.save({name: train(rank, 2, **case) for name, case in CASES.items()}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs a torch with gloo")
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


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


@pytest.mark.parametrize("case, equal", list(zip(CASES, (True, False, False, True), strict=True)))
def test_two_ranks_are_one_with_both_batches(
    ranks: list[dict[str, dict[str, Any]]], case: str, equal: bool
) -> None:
    """With the same noise, or with one draw per sequence and ranks kept apart; and with no other choice."""
    alone = train(0, 1, samples=CASES[case].get("samples", 1))
    assert same(ranks[0][case]["weights"], alone["weights"]) == equal


def test_noise_matters(ranks: list[dict[str, dict[str, Any]]]) -> None:
    found = [ranks[0][case]["weights"] for case in CASES]
    for i, weights in enumerate(found):
        assert not any(same(weights, other) for other in found[:i])
