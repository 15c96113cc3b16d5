"""`python -m bench methods` has every method, and its two tables."""

from __future__ import annotations

import pytest
import torch

from bench import cli, methods
from flatlora_kernels.core.noise import KINDS
from flatlora_kernels.methods import METHODS


def test_every_method_has_a_setup() -> None:
    assert set(methods.SETUPS) == set(METHODS)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["methods", "--size", "tiny", "--rounds", "1", "--dtype", "bfloat16"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [row[1].strip(" `") for row in rows] == [*methods.SETUPS, "torch", *KINDS]
    assert all(float(row[2]) > 0 for row in rows)
    assert [row[3].strip() for row in rows if row[1].strip() in ("`lora`", "`torch`")] == ["1", "1"]


def test_an_update_adds_as_much_as_torchs() -> None:
    """Of draws of variance 1 each."""
    calls = methods.updates(methods.SIZES["tiny"], torch.float32, 0)
    weights = {name: call.__defaults__[0]._in_op for name, call in calls.items() if name != "torch"}  # type: ignore[attr-defined]
    expected = torch.linspace(-1e-6, 1e-6, methods.DRAWS).norm()
    for name, found in weights.items():
        (trained,) = found.values()
        before = trained.matrix.clone()
        calls[name](0)
        assert (trained.matrix - before).std() == pytest.approx(float(expected), rel=0.05), name
