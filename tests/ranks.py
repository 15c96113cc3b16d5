"""Bodies that run in several processes, which talk through gloo."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Body = Callable[[int, int], Any]


def on_ranks(world: int, body: Body, folder: Path) -> list[Any]:
    """What ``body(rank, world)`` gives in each of `world` processes; a rank that fails fails them all."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs a torch with gloo")
    folder.mkdir(parents=True, exist_ok=True)
    start(_run, (world, body, str(folder)), world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def start(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """``function(rank, *arguments)`` in `count` processes, forked from one that has imported torch and no more."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")


# Importing takes longer than what most ranks do.
_IMPORTED = [
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "flatlora_kernels",
]


def _run(rank: int, world: int, body: Body, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    try:
        torch.save(body(rank, world), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def whole(parameters: Any) -> dict[str, torch.Tensor]:
    """Parameters by name, gathered where they are DTensors; asked for by all ranks."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in parameters
    }
