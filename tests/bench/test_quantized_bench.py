"""`python -m bench quantized`: its ways are right, and its table has a line to each case."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from bench import cli, quantized

CASE = quantized.Case("cpu", "nf4", "float32", 4, 64, 128, "forward+backward", "rademacher")


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


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert quantized.missing("nf4") == "bitsandbytes is not installed (pip install bitsandbytes)"
