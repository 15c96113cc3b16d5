"""Layers that `parallelize_module` has cut, alone and below FSDP, against one process that has them whole."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import on_ranks, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import flatlora_kernels as fk
from flatlora_kernels import NoiseController, apply_flat_lora
from flatlora_kernels.op import sharded

STEPS, RANKS = 5, 4
CASES: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "hadamard": {"noise": "hadamard"},
    "a draw per sequence": {"samples": "batch"},
    "the base trains": {"train_weight": True},
    "no adapter": {"train_weight": True, "r": 0},
    "recomputed": {"recomputed": True},
    "sequences cut": {"sequence": True},
    "below FSDP": {"fsdp": True},
    "below FSDP, the base trains": {"fsdp": True, "train_weight": True},
    "sequences cut below FSDP": {"fsdp": True, "sequence": True, "samples": "batch"},
}


class Block(nn.Module):
    def __init__(self, recomputed: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.recomputed = recomputed

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputed:
            out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return x + out
        return x + self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return y


def build(mesh: Any, sequence: bool, recomputed: bool, **options: Any) -> tuple[nn.Module, NoiseController]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(recomputed), Block(recomputed)).double()
    if mesh is not None:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if sequence:
            plan = {
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1)),
            }
        for block in model:
            parallelize_module(block, mesh, plan)
            if not sequence:  # the same types of parameters everywhere, for whom clips their gradients
                distribute_module(block.norm, mesh, input_fn=None)
                block.norm = _Local(block.norm)
    options = {"r": 2, "sigma": 0.5, "seed": 3, **options}
    controller = apply_flat_lora(model, ["up", "down"], backend="reference", verbose=False, **options)
    torch.manual_seed(1)
    for layer in controller.layers:
        if layer.lora_B is not None:
            drawn = torch.randn(layer.lora_B.shape, dtype=torch.float64)
            with torch.no_grad():
                layer.lora_B.copy_(sharded.beside(layer.weight, drawn, 0))
    return model, controller


class _Local(nn.Module):
    """A module of replicated DTensors on tensors."""

    def __init__(self, inner: nn.LayerNorm) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.inner.weight, self.inner.bias
        return nn.functional.layer_norm(x, (16,), w.to_local(), b.to_local())


def train(
    rank: int,
    world: int,
    fsdp: bool = False,
    sequence: bool = False,
    recomputed: bool = False,
    folder: str = "",
    **options: Any,
) -> dict[str, Any]:
    """`folder`: of a checkpoint at the end."""
    mesh, copies, part = None, 1, 0
    if world > 1:
        copies = 2 if fsdp else 1
        mesh = init_device_mesh("cpu", (copies, world // copies), mesh_dim_names=("data", "tensor"))
        part = mesh.get_local_rank("data")
    model, controller = build(mesh and mesh["tensor"], sequence, recomputed, **options)
    if fsdp and mesh is not None:
        for block in model:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    controller.attach(optimizer)
    losses, scales = [], []
    drawn: list[int] = []
    original = fk.op.compute.linear

    def noted(x: Tensor, weight: Tensor, *rest: Any) -> Any:
        if x.dim() == 2:  # others come once more as rows
            drawn.append(weight.numel())
        return original(x, weight, *rest)

    monkey = pytest.MonkeyPatch()
    monkey.setattr(fk.op.compute, "linear", noted)
    for step in range(STEPS):
        x = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(step)).double().chunk(copies)[part]
        if controller.layers[0].samples == "batch":
            controller.sample_offset = part * len(x)
        if sequence and mesh is not None:
            x = x.chunk(world // copies, 1)[mesh.get_local_rank("tensor")]
        # Ranks of a tensor parallel group share the rows of a loss where they cut them.
        shares = world // copies if sequence else 1
        loss = model(x).square().mean()
        (loss / shares).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            torch.distributed.all_reduce(total)
        losses.append(total.item() / world)
        scales.append([layer.noise_scale.clone() for layer in controller.layers])
    monkey.undo()
    if folder:
        dcp.save(state_of(model, controller), checkpoint_id=folder)
    return {
        "weights": named(model),
        "losses": losses,
        "scales": scales,
        "drawn": sum(drawn),
        "merged": merged(controller),
    }


def state_of(model: nn.Module, controller: NoiseController) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "noise": controller.state_dict()}


@torch.no_grad()
def merged(controller: NoiseController) -> list[Tensor]:
    """The whole weights, merged and back again."""
    found = []
    for name in ("merge", "unmerge"):
        for layer in controller.layers:
            getattr(layer, name)()
            found.append(whole([("weight", layer.weight)])["weight"])
    return found


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace(".inner", ""): p for name, p in whole(model.named_parameters()).items()}


SAVED = ("gaussian", "below FSDP")


def all_cases(rank: int, world: int, folder: str) -> dict[str, Any]:
    found = {}
    for name, case in CASES.items():
        found[name] = train(rank, world, **case, folder=f"{folder}/{name}" if name in SAVED else "")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def ranks(folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(RANKS, functools.partial(all_cases, folder=folder), tmp_path_factory.mktemp("tensor"))


@pytest.mark.parametrize("case", CASES)
def test_ranks_are_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    alone = train(0, 1, **CASES[case])
    for rank in ranks:
        found = rank[case]
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-5, atol=1e-6)
        for own, others in zip(found["scales"], ranks[0][case]["scales"], strict=True):
            assert all(map(torch.equal, own, others))


@pytest.mark.parametrize(
    "case, tensor_ranks", [("gaussian", RANKS), ("sequences cut", RANKS), ("below FSDP", 2)]
)
def test_values_drawn(ranks: list[dict[str, Any]], case: str, tensor_ranks: int) -> None:
    """Each rank draws its part of eps and no more, once for all rows of its batch."""
    whole_noise = train(0, 1, **CASES[case])["drawn"]
    assert whole_noise == STEPS * 4 * 16 * 32
    assert {rank[case]["drawn"] for rank in ranks} == {whole_noise // tensor_ranks}


@pytest.mark.parametrize("case", ["gaussian", "no adapter", "below FSDP"])
def test_merge(ranks: list[dict[str, Any]], case: str) -> None:
    weights, merged = ranks[0][case]["weights"], ranks[0][case]["merged"]
    for index, name in enumerate(("0.up", "0.down", "1.up", "1.down")):
        W, scaling = weights[f"{name}.weight"], 16 / 2
        if case != "no adapter":
            W = W + scaling * weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]
        torch.testing.assert_close(merged[index], W, rtol=1e-12, atol=1e-12)
        assert torch.equal(merged[4 + index], weights[f"{name}.weight"])


@pytest.mark.parametrize("case", SAVED)
def test_checkpoint_for_one_process(ranks: list[dict[str, Any]], folder: str, case: str) -> None:
    model, controller = build(None, False, False, seed=99)
    for block in model:  # by the names that they have among DTensors
        block.norm = _Local(block.norm)
    saved = state_of(model, controller)
    dcp.load(saved, checkpoint_id=f"{folder}/{case}")
    set_model_state_dict(model, saved["model"])
    controller.load_state_dict(saved["noise"])
    assert controller.state_dict() == {"base": 3, "step": STEPS}
    assert all(torch.equal(p, ranks[0][case]["weights"][n]) for n, p in named(model).items())


def test_noise_matters(ranks: list[dict[str, Any]]) -> None:
    found = [ranks[0][case]["losses"][-1] for case in list(CASES)[:3]]
    assert len({round(loss, 4) for loss in found}) == 3
