"""`python -m bench quantized`: its ways are right, and its table has a line to each case."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from bench import cli, quantized

CASE = quantized.Case("cpu", "nf4", "float32", 4, 64, 128, "forward+backward", "rademacher", "bitsandbytes")


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    arguments = "quantized --m 4 --size 64 --dtypes float32 --budget 0.01 --no-memory --name q --out".split()
    assert cli.main([*arguments, str(tmp_path)]) == 0
    lines = (tmp_path / "q.csv").read_text().splitlines()
    assert len(lines) == 1 + len(quantized.MODES) * len(quantized.WAYS)
    assert capsys.readouterr().out.count("| cpu ") >= len(quantized.MODES)


def test_a_wrong_result_is_not_timed() -> None:
    pytest.importorskip("bitsandbytes")
    layer = quantized.Layer(CASE, 0)
    y = quantized.way(layer, "op", CASE)()
    quantized.check(layer, y)
    with pytest.raises(ValueError, match="op: expected the product with the values within"):
        quantized.check(layer, 1.01 * y)


def test_without_the_libraries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed here, against the values; the reason is said once."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = (
        "quantized --formats nf4 int8 fp8 --m 4 --size 64 --dtypes float32 --budget 0 --no-memory --name q"
    )
    assert cli.main([*arguments.split(), "--noise", "gaussian", "hadamard", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (
        said.count(
            "nf4: bitsandbytes is not installed (pip install bitsandbytes): packed here, without owner"
        )
        == 1
    )
    rows = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert len(rows) == 3 * 2 * len(quantized.MODES) * len(quantized.WAYS_ALONE)
    assert {row["packed_by"] for row in rows} == {quantized.OWN}
    for row in rows:
        assert row.get("base") == (None if row["way"] == "dense" else "dense")
        assert ("to_base" in row) == ("base" in row)


def test_ways_of_a_backend(tmp_path: Path) -> None:
    """--own, where the library may be there; one way fails, the others are timed."""
    arguments = (
        "quantized --own --m 4 --size 40 --dtypes float32 --budget 0 --no-memory --name q --modes forward"
    )
    ways = ["dense", *(f"{way}:reference" for way in quantized.OF_BACKENDS), "op:cuda"]
    assert cli.main([*arguments.split(), "--ways", *ways, "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "q.json").read_text())
    assert [row["way"] for row in found["rows"]] == ways[:-1]
    assert len(found["failures"]) == 1 and "op:cuda: RuntimeError" in found["failures"][0]


def test_no_time_is_left(tmp_path: Path) -> None:
    arguments = "quantized --own --m 4 --size 40 --time-limit 0 --no-memory --name q --out"
    assert cli.main([*arguments.split(), str(tmp_path)]) == 0
    found = json.loads((tmp_path / "q.json").read_text())
    assert not found["rows"] and "no time left" in found["skipped"][0]


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert quantized.missing("nf4") == "bitsandbytes is not installed (pip install bitsandbytes)"
    assert quantized.chosen("nf4", None, own=False)[:2] == (quantized.OWN, list(quantized.WAYS_ALONE))
    assert quantized.chosen("nf4", ["owner", "op"], own=False)[1] == ["op"]


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else object())
    packed_by, ways, reason = quantized.chosen("int8", None, own=False)
    assert (packed_by, ways) == ("torchao", ["dense", "owner", "op", "panel"]) and reason.startswith(
        "peft is not"
    )
    assert quantized.chosen("int8", ["op"], own=False) == ("torchao", ["op"], "")
