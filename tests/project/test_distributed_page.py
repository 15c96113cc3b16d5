"""The scripts of docs/distributed.md, in two processes as torchrun would start them, and one by torchrun."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import torch
from ranks import start

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
SCRIPT = re.compile(r"^```python\n(# (\w+\.py): (torchrun [^\n]*)\n.*?)^```$", re.M | re.S)
RANKS = 2


def scripts() -> dict[str, tuple[str, str]]:
    """Code and command by file name."""
    found = {name: (code, command) for code, name, command in SCRIPT.findall(PAGE.read_text("utf-8"))}
    assert len(found) == PAGE.read_text("utf-8").count("```python"), "each block is a script"
    return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_all(rank: int, folder: str, ports: dict[str, int]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    # Whoever lets go of a group last waits for its thread, and DistributedDataParallel holds the GIL meanwhile, for
    # which that thread may wait to let go of its last all-reduce: seen once, in torch 2.13.
    kept, destroy = [], torch.distributed.destroy_process_group

    def keep_and_destroy() -> None:
        kept.append(torch.distributed.group.WORLD)
        destroy()

    torch.distributed.destroy_process_group = keep_and_destroy
    for name, port in ports.items():
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        runpy.run_path(name, run_name="__main__")
        assert not torch.distributed.is_initialized(), name


def can_run(code: str) -> bool:
    """DeepSpeed, which takes a minute to install, is in `make test-deepspeed` alone."""
    needed = [
        p for p in ("peft", "transformers", "deepspeed") if f"import {p}\n" in code or f"from {p} " in code
    ]
    return all(importlib.util.find_spec(package) for package in needed)


def test_scripts_run(tmp_path: Path) -> None:
    ports = {}
    for name, (code, command) in scripts().items():
        assert command == f"torchrun --nproc-per-node {RANKS} {name}"
        (tmp_path / name).write_text(code)
        if can_run(code):
            ports[name] = free_port()
    assert ports
    start(run_all, (str(tmp_path), ports), RANKS)


def test_command_runs(tmp_path: Path) -> None:
    name, (code, command) = next(iter(scripts().items()))
    (tmp_path / name).write_text(code)
    arguments = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PAGE.parents[1])}
    subprocess.run([*arguments, *command.split()[1:]], cwd=tmp_path, env=environment, check=True, timeout=300)
