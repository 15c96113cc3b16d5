"""The comparison of all methods: its arithmetic by made-up numbers, every stage with a model that knows nothing."""

from __future__ import annotations

import csv
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flatlora_kernels.methods import METHODS


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    return importlib.import_module("compare_methods")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_method_is_compared(compare: ModuleType) -> None:
    assert {c.method for of in compare.CANDIDATES.values() for c in of} == set(METHODS)
    for of in compare.CANDIDATES.values():
        assert 3 <= len({c.setting for c in of}) == len(of) == len({repr(c._replace(setting="")) for c in of})


def test_every_stage_with_every_method(
    compare: ModuleType,
    tmp_path: Path,
    threads: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    digits = importlib.import_module("digits")
    monkeypatch.setattr(digits, "pretrain", lambda *args: digits.ViT(64, 2))
    images, labels = digits.load_digits()
    monkeypatch.setattr(digits, "load_digits", lambda: (images[:300], labels[:300]))
    monkeypatch.setattr(compare, "STEPS_A_ROUND", 2)
    monkeypatch.setattr(compare, "CANDIDATES", {name: of[-1:] for name, of in compare.CANDIDATES.items()})
    names = list(compare.CANDIDATES)
    files = ["--steps", "4", "--folder", str(tmp_path), "--seed", "3"]

    with pytest.raises(
        SystemExit, match=r"methods-tune.csv: expected runs of 4 steps of all methods, got none of lora,"
    ):
        compare.main(["clock", *files])
    compare.main(["tune", *files, "--seeds", "1"])
    tuned = rows_of(tmp_path / "methods-tune.csv")
    assert len(tuned) == len(names)
    with pytest.raises(SystemExit, match="methods-clock.csv: expected all methods, got none of lora,"):
        compare.main(["run", *files])
    compare.main(["clock", *files, "--rounds", "1"])
    clocked = {row["method"]: row for row in rows_of(tmp_path / "methods-clock.csv")}
    assert list(clocked) == names
    assert float(clocked["lora"]["ratio"]) == 1 and clocked["lora"]["steps"] == "4"
    assert float(clocked["es"]["ratio"]) > 2 and int(clocked["es"]["steps"]) < 4

    compare.main(["run", *files, "--seeds", "1"])
    found = rows_of(tmp_path / "methods.csv")
    assert len(found) == 2 * len(names)
    at_equal_steps = [row for row in found if row["budget"] == "steps"]
    assert len({row["loss"] for row in at_equal_steps}) == len(names), "two methods do the same"
    assert {row["steps"] for row in found if row["budget"] == "time" and row["method"] == "es"} == {
        clocked["es"]["steps"]
    }
    intruders = {row["method"]: int(row["intruders"]) for row in at_equal_steps}
    assert intruders["lora"] == 0 < intruders["mezo"] <= 80, "MeZO moves an untrained model far"
    compare.main(["run", *files, "--seeds", "1"])
    assert len(rows_of(tmp_path / "methods.csv")) == len(found), "what is there is not run again"

    compare.main(["clock", *files, "--rounds", "1", "--method", "lora", "sam"])
    assert {row["method"] for row in rows_of(tmp_path / "methods-clock.csv")} == set(names), "others stay"
    again = [row | {"steps": str(int(row["steps"]) + 1)} for row in rows_of(tmp_path / "methods-clock.csv")]
    (tmp_path / "methods-clock.csv").unlink()
    importlib.import_module("common").append_csv(tmp_path / "methods-clock.csv", again)
    with pytest.raises(
        SystemExit, match="expected runs of lora with lr .* and 5 steps, got some with .* and 4"
    ):
        compare.main(["run", *files, "--seeds", "2"])
    with pytest.raises(SystemExit, match="--method: expected lora"):
        compare.main(["report", *files, "--method", "sam"])

    figure = ["--figure", str(tmp_path / "f.svg")] if importlib.util.find_spec("matplotlib") else []
    text = compare.main(["report", *files, *figure])
    assert text.startswith("seeds: 1;") and [line[:32].rstrip() for line in text.splitlines()[2:-1]] == names
    assert not figure or "<svg" in (tmp_path / "f.svg").read_text()


def test_weights_or_adapters_train(compare: ModuleType) -> None:
    digits = importlib.import_module("digits")
    for name, trained in (("flat-lora", 16 + 2), ("full-noise", 8 + 1), ("es", 8 + 1)):
        model = digits.ViT(64, 2)
        compare.adapted(model, compare.CANDIDATES[name][0], 0, 10)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(names) == trained, (name, names)
        assert any(n.startswith("head") for n in names)


def tuned_rows(values: dict[tuple[str, str], list[float]], steps: int = 300) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "method": name, "setting": setting, "steps": steps, "clean": accuracy}
        for (name, setting), accuracies in values.items()
        for seed, accuracy in enumerate(accuracies)
    ]


def test_the_best_candidate_is_chosen_by_seeds_that_all_have(compare: ModuleType) -> None:
    settings = [c.setting for c in compare.CANDIDATES["mezo"]]
    accuracies = [[0.5, 0.6], [0.7, 0.6], [0.1, 0.9]]
    rows = tuned_rows({("mezo", s): a for s, a in zip(settings, accuracies, strict=True)})
    assert compare.chosen(rows, 300) == {"mezo": compare.CANDIDATES["mezo"][1]}
    assert compare.chosen(rows, 100) == {}
    assert compare.chosen(rows[:-2], 300) == {}, "a candidate has not run"
    unfinished = [*rows, *tuned_rows({("mezo", settings[2]): [0.1, 0.9, 1.0]})[2:]]
    assert compare.chosen(unfinished, 300) == compare.chosen(rows, 300)


def test_gains_are_paired_and_over_lora_at_equal_steps(compare: ModuleType) -> None:
    rows = [
        {"seed": str(seed), "method": method, "budget": budget, "clean": clean + seed / 10}
        for seed in (0, 1)
        for method, budget, clean in (("lora", "steps", 0.5), ("lora", "time", 0.9), ("sam", "time", 0.6))
    ]
    assert compare.gains(rows, "clean")["sam", "time"] == pytest.approx([10, 10])
    assert torch.tensor(compare.gains(rows, "clean")["lora", "steps"]).abs().max() == 0
