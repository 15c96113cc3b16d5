"""`python -m bench variance`: where every sequence is the same, several draws are worth what theory says."""

from __future__ import annotations

import argparse
import itertools

import pytest
import torch
from torch import nn

import flatlora_kernels as fk
from bench import cli, variance


@pytest.fixture(scope="module")
def rows() -> dict[str, variance.Row]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    controller = fk.apply_flat_lora(model, ".*", r=4, lora_alpha=8, sigma=0.02, seed=1, verbose=False)
    for layer in controller.layers:
        nn.init.normal_(layer.lora_A, generator=generator)
    x = torch.randn(1, 3, 16, generator=generator).expand(8, 3, 16)
    target = torch.randn(1, 3, 4, generator=generator)
    batches = itertools.repeat(lambda: (model(x) - target).square().mean())
    found = variance.measure(variance.Setting(model, controller, batches), draws=80, warm_up=5)
    return {row.way.name: row for row in found}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("2 draws, half of the batch each", 1 / 2),
        ("4 draws, a quarter each", 1 / 4),
        ("one per sequence", 1 / 8),
        ("2 passes, 2 draws", 1 / 2),
    ],
)
def test_of_equal_sequences_falls_as_one_over_draws(
    rows: dict[str, variance.Row], name: str, expected: float
) -> None:
    base, row = rows[variance.BASE.name], rows[name]
    assert base.error < 0.2 * base.variance
    assert row.variance / base.variance == pytest.approx(expected, rel=0.4)


@pytest.mark.parametrize(
    "name", ["one pair, half +eps, half -eps", "a pair per two sequences", "2 passes, +eps and -eps"]
)
def test_pairs_on_the_same_data_leave_the_second_order(rows: dict[str, variance.Row], name: str) -> None:
    assert 0 < rows[name].variance < 0.02 * rows[variance.BASE.name].variance


def test_without_noise_nothing_varies(rows: dict[str, variance.Row]) -> None:
    assert rows[variance.PLAIN.name].variance == 0
    assert rows["no noise, another batch each step"].variance == 0


def test_variance_is_that_of_known_gradients() -> None:
    found, error = variance._variance([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])], 2.0)
    assert found == pytest.approx((2 + 8) / 2)  # 2 and 8: unbiased variances of the two numbers
    assert error == pytest.approx(0, abs=1e-6)


def test_a_seed_gives_the_same_blocks_again() -> None:
    args = argparse.Namespace(seed=3, batch=4, tokens=2, sigma=0.1, noise="gaussian")
    first, second = ([p.detach() for p in variance.blocks(args).model.parameters()] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("variance --batch 4 --tokens 4 --draws 4 --warm-up 1".split()) == 0
    printed = capsys.readouterr().out
    assert all(way.name in printed for way in variance.WAYS)
    with pytest.raises(SystemExit, match="--batch: expected a multiple of 4, got 6"):
        cli.main("variance --batch 6".split())
    with pytest.raises(SystemExit, match="--draws: expected at least 4, got 3"):
        cli.main("variance --draws 3".split())
