"""`python -m bench mixture`: its ways are right, and its table has a line to each case."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench import cli, mixture

CASE = mixture.Case("cpu", "float32", 3, 10, 16, 32, "falling", "forward+backward", "rademacher")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "mixture --m 10 --experts 3 --n 16 --k 32 --budget 0.01 --no-memory --name m --out".split()
    assert cli.main([*arguments, str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "m.csv").open()))
    assert len(rows) == 2 * len(mixture.ROUTINGS) * len(mixture.MODES) * len(mixture.WAYS)
    assert all(row["to_base"] and row["base"] == "vendor" for row in rows if row["way"] != "vendor")
    assert capsys.readouterr().out.count("| cpu ") >= len(mixture.MODES)


def test_routings() -> None:
    assert mixture.ends_of(CASE._replace(routing="even")) == [3, 6, 10]
    assert mixture.ends_of(CASE) == [5, 9, 10]
    for M in (8, 64, 1000):
        ends = mixture.ends_of(CASE._replace(M=M, experts=8))
        sizes = [b - a for a, b in zip([0, *ends], ends, strict=False)]
        assert ends[-1] == M and sizes[-1] == 1 and min(sizes) >= 0


@pytest.mark.parametrize("name", ["materialised", "loop", "op", "op:reference", "loop:cpu"])
def test_ways(name: str) -> None:
    layer = mixture.Layer(CASE, 0)
    expected, found = mixture.exact(layer), mixture.way(layer, name)()
    mixture.check(expected, found, name)
    for wrong, what in enumerate(mixture.RESULTS):
        values = [t + 0.1 * t.abs().max() * (i == wrong) for i, t in enumerate(found)]
        with pytest.raises(ValueError, match=f"{name}: expected {what} within"):
            mixture.check(expected, tuple(values), name)
    with pytest.raises(ValueError, match="vendor: expected y within"):
        mixture.check(expected, mixture.way(layer, "vendor")(), "vendor")
