"""Workflows call what also runs here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
# What only a public host has to do: packages of a container, the second machine's sdist.
HOST_ONLY = r"dnf install .*|rm dist/\*\.tar\.gz"


def steps(workflow: Path) -> list[str]:
    return re.findall(r"^ +- run: (.+)$", workflow.read_text(), re.M)


def test_there_are_steps() -> None:
    assert {path.name for path in WORKFLOWS if steps(path)} == {
        "tests.yml",
        "wheels.yml",
        "docs.yml",
        "gpu.yml",
    }


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_each_step_is_a_make_target(workflow: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for step in steps(workflow):
        if step == "bash .ci/run" or re.fullmatch(HOST_ONLY, step):
            continue
        found = re.search(r"\bmake ([\w-]+)", step)
        assert found and found[1] in targets, step


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_to_a_commit(workflow: Path) -> None:
    for action in re.findall(r"uses: (\S+)", workflow.read_text()):
        assert action.startswith("./") or re.search(r"@[0-9a-f]{40}$", action), action
