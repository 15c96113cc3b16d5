"""FSDP2: ranks that hold shards of a model against one process that has it whole."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import on_ranks, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.checkpoint import checkpoint

import flatlora_kernels as fk
from flatlora_kernels import NoiseController, apply_flat_lora

STEPS, BATCH, RANKS = 5, 12, 2


class Block(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self, recomputed: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 13), nn.Linear(13, 10, bias=False)
        self.recomputed = recomputed

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputed:
            out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return x + out
        return x + self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole from forward to backward": {"fsdp": {"reshard_after_forward": False}},
    "hadamard": {"noise": "hadamard"},
    "recomputed": {"recomputed": True},
    "recomputed with noise from the first step on": {"recomputed": True, "schedule": "constant"},
    "compiled blocks": {"compile": True},
    "begun on meta": {"meta": True},
    "accumulated": {"parts": 2},
    "a draw per sequence": {"samples": "batch"},
    "the base trains": {"train_weight": True},
    "no adapter": {"train_weight": True, "r": 0},
    "replicated groups": {"hybrid": True},
    # AdamW's step does not shrink with the gradient: near nothing, rounding in 16 bits can turn it.
    "float32 beside bfloat16": {"dtype": torch.bfloat16, "optimizer": torch.optim.SGD},
    "FSDP1": {"first": True},
    "FSDP1, recomputed": {"first": True, "recomputed": True},
}


def build(
    dtype: torch.dtype = torch.float64, recomputed: bool = False, meta: bool = False, **options: Any
) -> tuple[nn.Module, NoiseController]:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = nn.Sequential(Block(recomputed), Block(recomputed), nn.Linear(10, 3)).to(dtype)
    options = {"r": 2, "sigma": 0.5, "schedule": "linear", "total_steps": STEPS, "seed": 3, **options}
    controller = apply_flat_lora(model, ["up", "down"], backend="reference", verbose=False, **options)
    for layer in controller.layers:
        if layer.lora_B is not None:
            nn.init.normal_(layer.lora_B, std=0.3)
    return model, controller


def shard(model: nn.Module, mesh: Any, **options: Any) -> None:
    for block in list(model)[:2]:  # type: ignore[call-overload]
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(BATCH, 4, 13, generator=torch.Generator().manual_seed(step))
    return drawn[..., :10].to(dtype), drawn[..., 10:].to(dtype)


def train(
    rank: int,
    world: int,
    *,
    parts: int = 1,
    compile: bool = False,
    hybrid: bool = False,
    solo: bool = False,
    first: bool = False,
    by_rank: bool = False,
    optimizer: Any = torch.optim.AdamW,
    fsdp: dict[str, Any] | None = None,
    meta: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """`solo`: FSDP of each rank for itself, with the whole batch; `first`: FSDP1."""
    model, controller = build(meta=meta and world > 1, **options)
    blocks = list(model)[:2]  # type: ignore[call-overload]
    if first and world > 1:
        model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    elif world > 1:
        mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("copies", "parts"))
        shard(model, mesh if hybrid else mesh["copies" if solo else "parts"], **(fsdp or {}))
        if meta:
            model.to_empty(device="cpu")
            state = build(**options)[0].state_dict()
            set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    if compile:
        for block in blocks:
            block.compile(backend="aot_eager")
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.03)
    controller.attach(optimizer)
    controller.rank = rank if by_rank else 0
    losses, scales = [], []
    with measured_shapes() as measured:
        for step in range(STEPS):
            data = (0, 1) if solo else (rank, world)
            losses.append(run(model, optimizer, controller, step, *data, parts))
            scales.append([layer.noise_scale.clone() for layer in controller.layers if not layer._gathered])
    return {
        "weights": {} if first else whole(model.named_parameters()),
        "losses": losses,
        "scales": scales,
        "measured": measured,
    }


@contextlib.contextmanager
def measured_shapes() -> Iterator[list[tuple[int, ...]]]:
    """Of the weights whose norms this process computes."""
    found: list[tuple[int, ...]] = []
    original = fk.op.functional.sq_norms_of

    def noted(weight: Tensor, *rest: Any) -> Tensor:
        if not hasattr(weight, "device_mesh"):
            found.append(tuple(weight.shape))
        return original(weight, *rest)

    fk.op.functional.sq_norms_of = noted
    try:
        yield found
    finally:
        fk.op.functional.sq_norms_of = original


def run(
    model: Any, optimizer: Any, controller: NoiseController, step: int, rank: int, world: int, parts: int
) -> float:
    """One step; its loss is the mean over all ranks."""
    total = torch.zeros(())
    x, goal = (t.chunk(world)[rank] for t in batch(step, next(model.parameters()).dtype))
    for part in range(parts):
        if world > 1 and parts > 1:
            model.set_requires_gradient_sync(part == parts - 1)
        if controller.layers[0].samples == "batch":
            controller.sample_offset = rank * len(x)
        loss = (model(x.chunk(parts)[part]) - goal.chunk(parts)[part]).float().square().mean() / parts
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    if world > 1:
        torch.distributed.all_reduce(total)
    return total.item() / world


SIXTEEN = {"fsdp": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}, "dtype": torch.float32}


def all_cases(rank: int, world: int, folder: str) -> dict[str, Any]:
    """`folder`: of a checkpoint that one process has written."""
    found = {name: train(rank, world, **case) for name, case in CASES.items()}
    found["noise by rank"] = train(rank, world, by_rank=True)
    found["resumed"] = some_steps(rank, world, folder, begin=2, seed=99)
    found["mixed precision"] = train(rank, world, **SIXTEEN)
    found["mixed precision, solo"] = train(rank, world, solo=True, **SIXTEEN)
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """By one process, and the folder of its checkpoint."""
    folder = str(tmp_path_factory.mktemp("alone"))
    return some_steps(0, 1, folder), folder


@pytest.fixture(scope="module")
def ranks(
    uninterrupted: tuple[dict[str, Any], str], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    body = functools.partial(all_cases, folder=uninterrupted[1])
    return on_ranks(RANKS, body, tmp_path_factory.mktemp("fsdp"))


def agree(found: dict[str, Any], alone: dict[str, Any], tolerance: dict[str, float]) -> None:
    torch.testing.assert_close(found["losses"], alone["losses"], **tolerance)
    torch.testing.assert_close(found["weights"], alone["weights"], **tolerance)


EXACT, ROUNDED = {"rtol": 1e-5, "atol": 1e-6}, {"rtol": 2e-2, "atol": 2e-2}


@pytest.mark.parametrize("case", CASES)
def test_ranks_are_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    alone = train(0, 1, **{**CASES[case], "compile": False})
    if "first" in CASES[case]:  # its parameters and, until a forward, its norms are in no one's hands
        for rank in ranks:
            torch.testing.assert_close(rank[case]["losses"], alone["losses"], **EXACT)
            assert rank[case]["measured"] == 2 * [(13, 10), (10, 13)] * (STEPS - 1), (
                "once a step, at sigma > 0"
            )
        return
    for rank in ranks:
        agree(rank[case], alone, ROUNDED if "dtype" in CASES[case] else EXACT)
        for own, others in zip(rank[case]["scales"], ranks[0][case]["scales"], strict=True):
            assert all(map(torch.equal, own, others)), "eps has the same bits on every rank"
    # And those of one process, as long as rounding has not moved the adapters apart.
    assert all(map(torch.equal, ranks[0][case]["scales"][0], alone["scales"][0])) or "dtype" in CASES[case]
    assert sum(scale.sum() for scale in alone["scales"][-1]) > 0


def test_mixed_precision(ranks: list[dict[str, Any]]) -> None:
    """Rounded to 16 bits alike, whoever holds what: beside the same on one rank."""
    for rank in ranks:
        agree(rank["mixed precision"], rank["mixed precision, solo"], ROUNDED)


def test_noise_by_rank(ranks: list[dict[str, Any]]) -> None:
    """No one process has these draws; but ranks agree on the weights that come of them."""
    first, *others = (rank["noise by rank"]["weights"] for rank in ranks)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    assert any((first[name] - w).abs().max() > 1e-3 for name, w in ranks[0]["plain"]["weights"].items())


def test_noise_matters(ranks: list[dict[str, Any]]) -> None:
    with pytest.raises(AssertionError):
        agree(ranks[0]["plain"], train(0, 1, sigma=1e-9), ROUNDED)


def test_each_rank_measures_its_shard(ranks: list[dict[str, Any]]) -> None:
    """After the first forward, which finds the parameters replaced by fully_shard."""
    layers, steps = 4, STEPS
    own = [rank["plain"]["measured"][-layers * (steps - 1) :] for rank in ranks]
    for shapes in zip(*own, strict=True):
        rows, columns = (sum(n for n, _ in shapes), {k for _, k in shapes})
        assert (rows, columns) in ((13, {10}), (10, {13}))
    assert len(ranks[0]["plain"]["measured"]) <= layers * (steps + 1)


def test_converted_before_it_is_sharded() -> None:
    class Sharded(nn.Linear):
        def _get_fsdp_state(self) -> None: ...

    with pytest.raises(ValueError, match="FSDP does not shard yet.*Sharded at '0'; call fully_shard after"):
        apply_flat_lora(nn.Sequential(Sharded(4, 4)), ["0"])


def some_steps(
    rank: int, world: int, folder: str, begin: int = 0, crash: bool = False, seed: int = 3
) -> dict[str, Any]:
    """From a checkpoint of step `begin` on; saves one before step 2; in step 3, rank 1 is killed."""
    model, controller = build(seed=seed)
    if world > 1:
        shard(model, init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    if begin:
        saved = state_of(model, optimizer, controller)
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        controller.load_state_dict(saved["noise"])
    controller.attach(optimizer)
    for step in range(begin, STEPS):
        if step == 2 and not begin:
            dcp.save(state_of(model, optimizer, controller), checkpoint_id=folder)
        if step == 3 and crash and rank == 1:
            os._exit(9)
        run(model, optimizer, controller, step, rank, world, 1)
    return {"weights": whole(model.named_parameters()), "noise": controller.state_dict()}


def state_of(model: nn.Module, optimizer: Any, controller: NoiseController) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "noise": controller.state_dict()}


def same_end(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["noise"] == expected["noise"]
    torch.testing.assert_close(found["weights"], expected["weights"], **EXACT)


def test_ranks_resume_what_one_process_began(ranks: list[dict[str, Any]], uninterrupted: Any) -> None:
    for rank in ranks:
        same_end(rank["resumed"], uninterrupted[0])


def test_one_process_resumes_what_killed_ranks_began(tmp_path: Path, uninterrupted: Any) -> None:
    folder = str(tmp_path / "checkpoint")
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        on_ranks(RANKS, functools.partial(some_steps, folder=folder, crash=True), tmp_path / "killed")
    same_end(some_steps(0, 1, folder, begin=2, seed=99), uninterrupted[0])
