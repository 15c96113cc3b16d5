"""The arithmetic behind docs/evidence.md, by numbers worked out by hand, and the committed rows."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "bench/results"


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    pytest.importorskip("scipy", reason="needs scipy")
    return importlib.import_module("evidence")


def test_holm(evidence: ModuleType) -> None:
    assert evidence.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert evidence.holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert evidence.holm([0.02]) == [0.02]
    assert [found.p < 0.01 for found in evidence.judged([[0.0] * 3, [1.0, 1.01, 1.02]])] == [False, True]


def test_a_mean_with_its_interval(evidence: ModuleType) -> None:
    """1, 2, 3: deviation 1, error 1 / sqrt(3), t = 3.464, 4.303 errors to either side for two degrees of freedom."""
    (found,) = evidence.judged([[1.0, 2.0, 3.0]])
    assert found.mean == 2 and found.seeds == 3
    assert found.error == pytest.approx(0.57735, rel=1e-4)
    assert (found.low, found.high) == pytest.approx((2 - 2.4842, 2 + 2.4842), rel=1e-3)
    assert found.p == pytest.approx(0.0742, rel=1e-2)


def test_verdicts(evidence: ModuleType) -> None:
    def found(mean: float, p: float) -> Any:
        return evidence.Found(mean, mean - 1, mean + 1, 0.5, p, 8)

    assert evidence.verdict(found(1, 0.04), +1, 0, 0) == "better"
    assert evidence.verdict(found(1, 0.04), -1, 0, 0) == "worse"
    assert evidence.verdict(found(-1, 0.04), -1, 0, 0) == "better"
    assert evidence.verdict(found(1, 0.05), +1, 0, 0) == "no difference shown"
    assert evidence.verdict(found(1, 0.05), +1, 2.0, 0) == "no difference shown"
    assert evidence.verdict(found(0.9, 0.05), +1, 2.0, 0) == "no difference shown; no gain of 2"
    assert evidence.verdict(found(0.6, 0.5), +1, 0, 0.5).endswith("; not worse by 0.5")
    assert evidence.verdict(found(0.5, 0.5), +1, 0, 0.5).endswith("; not shown to be not worse by 0.5")


def test_differences_are_paired(evidence: ModuleType) -> None:
    of = {
        ("lora", 0): 1.0,
        ("lora", 1): 5.0,
        ("lora", 2): 0.0,
        ("flat", 1): 6.5,
        ("flat", 0): 4.0,
        ("flat", 2): 9.0,
    }
    rows = [{"name": n, "seed": str(s), "x": v} for (n, s), v in of.items()]
    question = evidence.Question("", "x.csv", lambda row: row["name"], "flat", range(2), (), "")

    def found(**changed: Any) -> list[float]:
        return evidence.differences(rows, question, evidence.Test("", lambda row: row["x"], 1, **changed))

    assert found() == [3.0, 1.5], "seeds that the entry names, and no other"
    rows += [{"name": "more", "seed": seed, "x": 10.0} for seed in ("1", "0")]
    assert found(arm="more", to="flat") == [6.0, 3.5]
    rows.append(rows[0])
    with pytest.raises(ValueError, match="expected 'lora' with seed 0 once"):
        found()


def test_no_seed_is_mixed_of_two_folders(evidence: ModuleType, tmp_path: Path) -> None:
    """Seed 1 was begun in one folder and done in another, seed 2 never finished."""
    runs = {"a": [("lora", 0), ("flat", 0), ("lora", 1)], "b": [("lora", 1), ("flat", 1), ("flat", 2)]}
    for folder, found in runs.items():
        (tmp_path / folder).mkdir()
        text = "".join(f"{name},{seed},{folder}\n" for name, seed in found)
        (tmp_path / folder / "x.csv").write_text("name,seed,machine\n" + text)
    rows = evidence.rows_of([tmp_path / "a", tmp_path / "b", tmp_path], "x.csv", lambda row: row["name"])
    assert [tuple(row.values()) for row in rows] == [
        ("lora", "0", "a"),
        ("flat", "0", "a"),
        ("lora", "1", "b"),
        ("flat", "1", "b"),
    ]


def test_each_test_names_its_own_arms_and_files(evidence: ModuleType, tmp_path: Path) -> None:
    """Noise on an adapter against that adapter alone; several draws against one draw of another file's length."""
    adapters, draws = (q for q in evidence.QUESTIONS if q.file == "digits-family.csv")
    clean = {
        "flat-lora 0.3": 0.7, "lora rslora": 0.6, "lora dora": 0.5, "lora pissa": 0.4, "flat-lora 0.3 rslora": 0.61,
        "flat-lora 0.3 dora": 0.52, "flat-lora 0.3 pissa": 0.43, "flat-lora 0.3 samples batch": 0.75,
        "flat-lora 0.3 samples pairs": 0.76,
    }  # fmt: skip

    def write(name: str, steps: int, found: dict[str, float]) -> None:
        lines = [
            f"{5000 + i},{arm},{steps},{v + i * len(arm) % 3 / 1e4}"
            for i in range(4)
            for arm, v in found.items()
        ]
        (tmp_path / name).write_text("\n".join(["seed,method,steps,clean", *lines]) + "\n")

    write("digits-family.csv", 300, clean)
    write("digits-draws-396.csv", 396, {"flat-lora 0.3": 0.73})
    write("digits-draws-363.csv", 363, {"flat-lora 0.3": 0.72})

    def means(question: Any) -> list[float]:
        files = (question.file, *question.more_files)
        rows = [row for file in files for row in evidence.rows_of([tmp_path], file, question.label)]
        return [sample[0] for sample in evidence.samples_for(rows, question)]

    assert means(adapters) == pytest.approx([1, 2, 3])
    assert means(draws) == pytest.approx([2, 4])
    lines = evidence.report([tmp_path]).splitlines()
    (line,) = (line for line in lines if line.startswith("  pairs"))
    assert "+4.0" in line and line.endswith("4 seeds: better")
    (tmp_path / "digits-draws-363.csv").unlink()
    with pytest.raises(
        ValueError, match="no rows of flat-lora 0.3 samples pairs, 300 steps and flat-lora 0.3, 363"
    ):
        means(draws)


def test_a_report(evidence: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four seeds of which noise is better by 10 points, and whose loss rises less when pruned."""
    columns = {c: 0.5 for c in ("clean", "rotated", "corrupted", "half loss")}
    columns |= {f"half loss, {how}": 0.6 for how in evidence.COMPRESSIONS}
    shared = {"noise": "gaussian", "adapter": "lora", "samples": "1"}
    rows = []
    for seed in range(4):
        rows.append({"seed": seed, "method": "lora", "strength": 0.0} | shared | columns)
        better = {"clean": 0.6 + 0.001 * seed, "half loss, prune 50 %": 0.55 + 0.001 * seed}
        rows.append({"seed": seed, "method": "flat-lora", "strength": 0.15} | shared | columns | better)
        rows[-1] |= {"rotated": 0.5 + 0.01 * (-1) ** seed, "corrupted": 0.5 + 0.01 * (-1) ** seed}
        rows[-1]["half loss, nf4"] = 0.6 + 0.01 * (-1) ** seed
    with (tmp_path / "vit.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure = tmp_path / "gain.svg"
    text = evidence.main([str(tmp_path), "--figure", str(figure)])
    lines = {
        line.split()[0]: line for line in text.splitlines() if line.startswith("  ") and "seeds:" in line
    }
    assert "+10.1500" in lines["clean"] and lines["clean"].endswith("4 seeds: better")
    assert lines["rotated"].endswith("no difference shown")  # the interval reaches beyond a point
    assert lines["prune"].endswith("better") and lines["nf4"].endswith("no difference shown")
    assert "not answered: language_model.csv has no rows of flat-lora 0.05 and lora" in text
    assert "<svg" in figure.read_text()
    assert "clean" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/vit*.csv")), ids=lambda path: path.name)
def test_committed_rows_can_be_read(evidence: ModuleType, path: Path) -> None:
    rows = evidence.read_csv(path)
    arms = {evidence.vit.label(row) for row in rows}
    assert {"head only", "lora"} <= arms
    assert all(0 <= float(row["clean"]) <= 1 for row in rows)
