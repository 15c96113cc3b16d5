"""Methods and measures of flatness on a model that FSDP2 has cut: two ranks against one process that has it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flatlora_kernels import NoiseController, apply_flat_lora, methods
from flatlora_kernels.flatness import expected_increase, line, plane, top_eigenvalue

STEPS, BATCH, RANKS = 4, 12, 2
# With what the controller or the layers need.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flat-lora": ({}, {}),
    "bi-lora": ({}, {}),
    "sam": ({}, {}),
    "esam": ({}, {}),
    "lora-sam": ({}, {}),
    "lora-pro": ({}, {}),
    "eflat-lora": ({}, {}),
    "rwp": ({"norm": "row"}, {}),
    "lpf-sgd": ({"norm": "row"}, {}),
    "full-noise": ({}, {"train_weight": True}),
}


class Block(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 13), nn.Linear(13, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


def build(world: int, settings: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(10, 3)).double()
    controller = NoiseController(**{"sigma": 0.3, "schedule": "constant", "seed": 3, **settings})
    apply_flat_lora(
        model, ["up", "down"], r=2, noise_controller=controller, backend="reference", verbose=False, **options
    )
    for layer in controller.layers:
        nn.init.normal_(layer.lora_B, std=0.3)
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in list(model)[:2]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def batch(step: int) -> Tensor:
    return torch.randn(BATCH, 13, generator=torch.Generator().manual_seed(step)).double()


def loss_of(model: nn.Module, data: Tensor) -> Tensor:
    loss: Tensor = (model(data[:, :10]) - data[:, 10:]).square().mean()
    return loss


def refusal(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no ValueError"


def train(rank: int, world: int) -> dict[str, Any]:
    """Losses of each method, measures of flatness, and what is refused."""
    found: dict[str, Any] = {}
    for name, (settings, options) in METHODS.items():
        model = build(world, settings, options)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        more = {"gamma": 1} if name == "esam" else {}
        method, losses = methods.make(name, model, optimizer, **more), []
        for step in range(STEPS):
            data = batch(step)[rank * BATCH // world : (rank + 1) * BATCH // world]
            loss = method.step(lambda model=model, data=data: loss_of(model, data)).detach().clone()
            if world > 1:
                torch.distributed.all_reduce(loss)
            losses.append(loss.item() / world)
        found[name] = losses
    model = build(world, {}, {})
    loss = lambda: loss_of(model, batch(0))  # noqa: E731
    found["increase"] = [i.mean for i in expected_increase(model, loss, [0.1, 0.3], draws=2)]
    found["line"] = line(model, loss, [-0.2, 0.2])
    if world > 1:
        found["refused"] = [
            refusal(lambda: plane(model, loss)),
            refusal(lambda: top_eigenvalue(model, loss)),
            *(
                refusal(
                    lambda name=name: methods.make(name, model, torch.optim.SGD(model.parameters(), lr=0.1))
                )
                for name in ("mezo", "es", "eggroll", "sl-sam")
            ),
        ]
        quiet = build(world, {"sigma": 0.0}, {})
        found["refused"].append(refusal(lambda: methods.make("halora", quiet, optimizer)))
    return found


def test_ranks_and_one_process(tmp_path: Path) -> None:
    alone, ranks = train(0, 1), on_ranks(RANKS, train, tmp_path)
    assert len({tuple(losses) for losses in alone.values()}) >= 7  # not one method by many names
    for name, want in alone.items():
        for found in ranks:
            assert found[name] == pytest.approx(want, rel=1e-6), name
    for found in ranks:
        assert all("expected" in text and "DTensor" in text for text in found["refused"]), found["refused"]
