"""The sweep over regimes: its arithmetic by numbers made up here, and a run with a small model."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def regimes() -> ModuleType:
    return importlib.import_module("regimes")


def rows_of(
    gains: dict[str, dict[float, float]], rises: dict[str, dict[float, float]]
) -> list[dict[str, Any]]:
    """Two seeds, the second better in all; the loss before the first step is 2."""
    rows = []
    for regime, seed, sigma in ((r, s, g) for r in gains for s in (0, 1) for g in (0.0, *gains[r])):
        start = {f"start increase {s:g}": rise for s, rise in rises[regime].items()} | {"start loss": 2.0}
        clean = 0.5 + 0.1 * seed + gains[regime].get(sigma, 0.0) / 100
        rows.append({"regime": regime, "seed": seed, "sigma": sigma, "clean": clean} | start)
    return rows


@pytest.fixture
def two(regimes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """In "base" noise of 0.2 is best, in "depth 4" noise of 0.1; the rises say so, relative to the loss."""
    monkeypatch.setattr(regimes, "SIGMAS", (0.1, 0.2))
    return rows_of(
        {"base": {0.1: 1.0, 0.2: 3.0}, "depth 4": {0.1: 2.0, 0.2: -1.0}},
        {"base": {0.1: 0.02, 0.2: 0.2}, "depth 4": {0.1: 0.2, 0.2: 2.0}},
    )


def test_gains_are_paired_by_seed(regimes: ModuleType, two: list[dict[str, Any]]) -> None:
    found = regimes.gains([row for row in two if not (row["seed"] == 1 and row["sigma"] == 0.2)])
    assert found["base"][0.1] == pytest.approx([1, 1])
    assert found["base"][0.2] == pytest.approx([3])
    assert found["depth 4"][0.2] == pytest.approx([-1])


def test_seeds_that_are_not_done_are_left_out(regimes: ModuleType, two: list[dict[str, Any]]) -> None:
    cut = [row for row in two if not (row["seed"] == 1 and row["regime"] == "base" and row["sigma"] == 0.2)]
    assert {row["seed"] for row in regimes.complete(cut, regimes.arm)} == {0}
    assert len(regimes.complete(two, regimes.arm)) == len(two)


def test_a_choice_goes_by_the_rise_relative_to_the_loss(
    regimes: ModuleType, two: list[dict[str, Any]]
) -> None:
    assert regimes.chosen(two, 0.11) == {"base": 0.2, "depth 4": 0.1}
    assert regimes.chosen(two, 1.0) == {"base": 0.2, "depth 4": 0.2}
    assert regimes.chosen(two, 0.001) == {"base": 0.1, "depth 4": 0.1}, "the smallest where none is allowed"


def test_points_lost(regimes: ModuleType, two: list[dict[str, Any]]) -> None:
    gain = regimes.gains(two)
    assert regimes.lost(gain, {"base": 0.2, "depth 4": 0.1}) == pytest.approx(0)
    assert regimes.lost(gain, {"base": 0.1, "depth 4": 0.2}) == pytest.approx((2 + 3) / 2)


def test_the_report_fits_on_some_regimes_and_judges_by_the_others(
    regimes: ModuleType, two: list[dict[str, Any]]
) -> None:
    text = regimes.report(two)
    assert (
        "one strength for all, 0.2: loses 0.00 points there against the best of each, 3.00 on the others"
        in text
    )
    assert "0.00 there, 0.00 on the others" in text
    assert "its choices: base 0.2, depth 4 0.1" in text
    assert "fitted" not in regimes.report([row for row in two if row["regime"] == "base"])


def test_a_run(
    regimes: ModuleType,
    tmp_path: Path,
    threads: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    small = {"width": 24, "depth": 1, "r": 2, "pretrain_steps": 20, "steps": 4}
    monkeypatch.setattr(regimes, "REGIMES", {"base": small, "5 labels": small | {"shots": 5}})
    path = tmp_path / "found.csv"
    command = f"--seeds 1 --regime base --sigma 0.1 0.4 --csv {path}".split()
    rows = regimes.main(command)
    assert [row["sigma"] for row in rows] == [0.0, 0.1, 0.4]
    assert len({row["train loss"] for row in rows}) == 3
    assert 0 < rows[0]["start increase 0.05"] < rows[0]["start increase 0.4"]
    assert rows[0]["start loss"] == rows[2]["start loss"]
    assert regimes.main(command) == [], "runs that the file has were repeated"
    more = regimes.main([*command[:3], "5 labels", *command[4:]])
    assert [row["regime"] for row in more] == ["5 labels"] * 3
    assert "base" in capsys.readouterr().out.splitlines()[-2]
