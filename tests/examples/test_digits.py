"""The example on digits, small."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    return importlib.import_module("digits")


SMALL = "--width 24 --depth 1 --r 2 --pretrain-steps 40 --seeds 1 --test-limit 200".split()


@pytest.fixture
def one_thread(threads: object) -> None:
    """The example sets the number of threads; `threads` puts it back."""


def test_every_method_runs(
    digits: ModuleType,
    tmp_path: Path,
    one_thread: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(digits, "FLATNESS_SIGMAS", (0.2,))
    table, figure = tmp_path / "found.csv", tmp_path / "line.svg"
    files = ["--csv", str(table)]
    if importlib.util.find_spec("matplotlib"):
        files += ["--figure", str(figure)]
    rows = digits.main(
        ["--method", *digits.METHODS, "--sigma", "0.2", "--steps", "16", "--lr", "5e-3"] + SMALL + files
    )
    noisy = ("flat-lora", "rwp", "lpf-sgd", "halora")
    quiet = [m for m in digits.METHODS if m not in noisy]
    names = {"head only", *quiet, *(f"{m} 0.2" for m in noisy)}
    assert {row["method"] for row in rows} == names
    assert len(rows) == len(names)
    assert all(0 <= row[test] <= 1 for row in rows for test in digits.ACCURACIES)
    assert len({row["loss"] for row in rows}) == len(names), "two methods do the same"
    measured = [name for name in rows[0] if name not in ("method", *digits.SETTINGS)]
    assert all(math.isfinite(row[name]) for row in rows for name in measured)
    with table.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(row["noise"]) for row in read] == [row["noise"] for row in rows]
    if "--figure" in files:
        assert "<svg" in figure.read_text()
    printed = capsys.readouterr().out
    assert "flat-lora 0.2 - lora" in printed and "increase 0.2" in printed


def test_runs_are_reproducible_and_methods_share_their_start(digits: ModuleType, one_thread: None) -> None:
    def found(*methods: str) -> dict[str, float]:
        short = ["--method", *methods, "--steps", "4", *SMALL]
        return {row["method"]: row["loss"] for row in digits.main(short)}

    both = found("lora", "flat-lora")
    assert found("flat-lora") == {name: both[name] for name in ("head only", "flat-lora 0.05")}


def test_few_images_are_never_tested_on(digits: ModuleType) -> None:
    images, labels = digits.of_digits(digits.NEW, *digits.load_digits())
    assert sorted(labels.unique().tolist()) == list(range(5))
    few, rest = digits.split(images, labels, 7, seed=1)
    assert labels[few].bincount().tolist() == [7] * 5
    assert sorted(torch.cat((few, rest)).tolist()) == list(range(len(images)))
    assert few.tolist() != digits.split(images, labels, 7, seed=2)[0].tolist()
    tests = digits.shifted(images)
    assert torch.equal(tests["moved"][0][:, 1:], images[:, :-1])
    assert (tests["noise"][0] - images).std() == pytest.approx(0.2, rel=0.02)
    assert torch.equal(tests["noise"][0], digits.shifted(images)["noise"][0])


def test_fine_tuning_learns_and_leaves_the_weights(digits: ModuleType, one_thread: None) -> None:
    args = digits.parse_arguments(SMALL)
    args.steps = 60
    torch.manual_seed(0)
    model = digits.ViT(16, 1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    images, labels = torch.rand(30, 8, 8), torch.arange(30) % 5
    start = torch.nn.functional.cross_entropy(model(images), labels).item()
    digits.finetune(model, digits.Arm("flat-lora", 0.2), images, labels, args, 0)
    assert digits.flatness_of(model, images, labels)["loss"] < 0.97 * start
    after = dict(model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert {name for name, p in after.items() if p.requires_grad} == changed | {
        name for name in after if "lora_" in name
    }


def test_adapters_and_draws_make_a_row_each(
    digits: ModuleType, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="needs PEFT")
    monkeypatch.setattr(digits, "FLATNESS_SIGMAS", (0.2,))
    arms = "--sigma 0.4 --adapter lora rslora dora pissa --samples 1 batch pairs".split()
    short = [*SMALL, "--steps", "3", "--lr", "5e-3"]
    loss = {
        row["method"]: row["loss"] for row in digits.main(["--method", "lora", "flat-lora", *arms, *short])
    }
    names = {
        f"flat-lora 0.4{adapter}{draws}"
        for adapter in ("", " rslora", " dora", " pissa")
        for draws in ("", " samples batch", " samples pairs")
    }
    assert loss.keys() == {"head only", "lora", "lora rslora", "lora dora", "lora pissa"} | names
    assert len(set(loss.values())) == len(loss), "two arms do the same"
    again = digits.main(["--method", "flat-lora", "--sigma", "0.4", "--adapter", "dora", *short])[-1]
    assert again["loss"] == loss["flat-lora 0.4 dora"]
    silent = digits.main(["--method", "flat-lora", "--sigma", "1e-30", "--adapter", "pissa", *short])[-1]
    assert silent["loss"] == pytest.approx(loss["lora pissa"], rel=1e-3)


def test_summary_is_paired(digits: ModuleType) -> None:
    rows = [
        {"seed": seed, "method": method, "clean": value + seed / 10}
        for seed in range(3)
        for method, value in (("head only", 0.1), ("lora", 0.5), ("flat-lora", 0.52))
    ]
    text = digits.summary([row | {"shots": 10} for row in rows], "lora")
    assert text.splitlines()[-1].split() == ["flat-lora", "-", "lora", "2.0", "+-", "0.0", "3"]
    assert "60.0 +- 5.8" in text and "shots" not in text


def test_runs_are_not_repeated(
    digits: ModuleType, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.csv"

    def runs(options: str) -> list[tuple[int, str]]:
        rows = digits.main(["--steps", "2", "--csv", str(found), *SMALL, *options.split()])
        return [(row["seed"], row["method"]) for row in rows]

    assert runs("--method lora") == [(0, "head only"), (0, "lora")]
    assert runs("--method lora flat-lora") == [(0, "flat-lora 0.05")]
    assert runs("--method lora flat-lora --seeds 2") == [
        (1, "head only"), (1, "lora"), (1, "flat-lora 0.05"),
    ]  # fmt: skip
    assert runs("--method flat-lora --seeds 2") == []
    assert "holds 6 runs already" in capsys.readouterr().out
    with found.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and list(rows[0])[:5] == ["seed", "method", "clean", "noise", "moved"]
    assert digits.summary(rows, "lora").splitlines()[-1].split()[-1] == "2"
    with pytest.raises(SystemExit, match="runs with shots 10, as .* has; got 9"):
        runs("--method lora --shots 9")


def test_compressed_columns(
    digits: ModuleType, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tested is the merged weight, rounded or pruned, under the head that was trained."""
    pytest.importorskip("bitsandbytes")
    real, seen = digits.accuracies, []

    def accuracies(
        model: torch.nn.Module, tests: dict[str, list[torch.Tensor]], labels: torch.Tensor
    ) -> object:
        layers = [m for m in model.modules() if isinstance(m, digits.FlatLoraLinear)]
        zeros = sum((m.weight == 0).sum().item() for m in layers) / sum(m.weight.numel() for m in layers)
        seen.append((zeros, {m.merged for m in layers}, list(tests), model.head.weight.sum().item()))
        return real(model, tests, labels)

    monkeypatch.setattr(digits, "accuracies", accuracies)
    found = tmp_path / "found.csv"
    rows = digits.main(["--method", "lora", "--steps", "8", "--compress", "--csv", str(found), *SMALL])
    count = len(digits.COMPRESSIONS)
    assert len(seen) == 2 * (1 + count)
    for start in (0, 1 + count):
        (none, merged, tests, head), *others = seen[start : start + 1 + count]
        assert (none, merged, tests) == (0, {False}, list(digits.ACCURACIES))
        assert all(other[1:] == ({True}, ["clean"], head) for other in others)
        for how, (zeros, *_) in zip(digits.COMPRESSIONS, others, strict=True):
            if how.startswith("prune"):
                assert zeros == pytest.approx(int(how.split()[1]) / 100, abs=0.002)
            else:
                assert 0 < zeros < 0.2
    columns = [f"clean, {how}" for how in digits.COMPRESSIONS]
    with found.open(newline="") as file:
        names = next(csv.reader(file))
    assert names[-len(digits.SETTINGS) - count : -len(digits.SETTINGS)] == columns
    assert all(0 <= row[c] <= 1 for row in rows for c in columns)
    assert digits.summary(rows, "lora").splitlines()[0].split("  ")[-2].strip() == columns[-1]


def test_errors(digits: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for option, message in (
        ("--seeds 0", "--seeds: expected at least 1"),
        ("--shots 101", "at most 100, got 101"),
        ("--compress --adapter lora dora", "--compress: expected --adapter lora alone, got lora dora"),
        ("--chips 3 --adapter dora", "--chips: expected --adapter lora alone, got dora"),
        ("--chips 0", "--chips: expected at least 1, got 0"),
        ("--chip-sigma 0.1", "--chip-sigma: expected --chips beside it, got none"),
        ("--chips 3 --chip-sigma 0.1 0", "--chip-sigma: expected numbers > 0, got 0"),
    ):
        with pytest.raises(SystemExit):
            digits.parse_arguments(option.split())
        assert message in capsys.readouterr().err


def test_on_chips(digits: ModuleType, tmp_path: Path, one_thread: None) -> None:
    table = tmp_path / "found.csv"
    arguments = "--method lora halora --sigma 0.05 --steps 4 --chips 3 --chip-sigma 1e-6 0.4".split()
    rows = digits.main([*arguments, *SMALL, "--csv", str(table)])
    assert [row["method"] for row in rows] == ["head only", "lora", "halora 0.05"]
    for row in rows:
        assert row["clean, chips 1e-06"] == pytest.approx(row["clean"], abs=1e-9), (
            "such noise changes no answer"
        )
        assert row["clean, worst chip 0.4"] < row["clean, chips 0.4"] < row["clean"]
    with pytest.raises(SystemExit, match="--csv: expected a new file or runs with chips 3, as .* has; got 4"):
        digits.main([*arguments, *SMALL, "--csv", str(table), "--chips", "4"])
    with pytest.raises(SystemExit, match="--chips: expected 3, as .* has, got none"):
        digits.main([*"--method lora --steps 4".split(), *SMALL, "--csv", str(table)])
