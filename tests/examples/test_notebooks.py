"""The notebooks run from top to bottom, and are kept without what a run leaves in them.

Cells are executed here and not by a kernel, so that their names can be looked at afterwards.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> Callable[[str], dict[str, Any]]:
    """Executes a notebook in an empty folder, and returns its names."""

    def run(name: str) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MPLBACKEND", "Agg")
        threads(1)
        names: dict[str, Any] = {"__name__": "notebook"}
        with torch.random.fork_rng():
            for number, cell in enumerate(cells(FOLDER / f"{name}.ipynb")):
                if cell["cell_type"] == "code":
                    exec(compile(source(cell), f"{name}, cell {number}", "exec"), names)
        return names

    return run


def test_ten_minutes_with_peft(
    run: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="needs PEFT")
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    from flatlora_kernels.integrations.peft import FlatLinear

    found = run("ten_minutes_with_peft")
    assert found["controller"].step == 200
    assert found["unchanged"] is True
    assert found["before"] < 0.3 and found["after"] > 0.6
    assert found["noisy"] != found["clean"]
    assert not any(isinstance(m, FlatLinear) for m in found["model"].modules())
    images = found["turned"]
    torch.testing.assert_close(found["merged"](images), found["model"].eval()(images), rtol=1e-4, atol=1e-4)
    assert [n for n, _ in found["merged"].named_modules()] == [n for n, _ in found["base"].named_modules()]
    assert "weight noise on 3 layers" in capsys.readouterr().out


def test_how_flat_is_my_model(run: Callable[[str], dict[str, Any]]) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    plt = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    plt.close("all")
    try:
        found = run("how_flat_is_my_model")
        plain, flat = found["models"]
        assert len(plt.get_fignums()) == 2
        for name, report in found["reports"].items():
            assert report.loss < 1, "it has learnt something: five classes by chance are 1.6"
            assert all(math.isfinite(i.mean) for i in report.increases)
            curve = found["curves"][name]
            middle = len(curve) // 2
            assert curve[middle] == pytest.approx(report.loss, rel=1e-3, abs=1e-5)
            assert min(curve[0], curve[-1]) > curve[middle]
            values = found["planes"][name]
            assert values[len(values) // 2][len(values) // 2] == pytest.approx(
                report.loss, rel=1e-3, abs=1e-5
            )
            assert all(
                not p.requires_grad for n, p in found["models"][name].named_parameters() if "lora" not in n
            )
        for measure in ("eigenvalues", "rises"):
            assert 0 < found[measure][flat] < found[measure][plain], measure
    finally:
        plt.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_stripped(notebook: Path) -> None:
    for cell in cells(notebook):
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, source(cell)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_read_as_pages(notebook: Path) -> None:
    """Title and readers first, links that lead to files, and a way on at the end."""
    first, *_, last = (source(cell) for cell in cells(notebook))
    assert re.match(r"# [^\n]+\n\nFor those who ", first)
    assert last.splitlines()[-1].startswith("Next: ")
    text = "\n".join(source(cell) for cell in cells(notebook) if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)\s#]+)", text)
    assert links and all((FOLDER / link).exists() for link in links), links


def test_there_are_notebooks() -> None:
    assert {p.stem for p in NOTEBOOKS} == {"how_flat_is_my_model", "ten_minutes_with_peft"}
