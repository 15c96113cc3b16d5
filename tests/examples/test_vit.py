"""The example on DINOv2, with a small model of random weights; the real weights where an earlier run has them."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SMALL = (
    "--dtype float32 --r 2 --shots 3 --batch-size 16 --seeds 1 --test-limit 60 --size 28 --threads 1".split()
)


@pytest.fixture(scope="module")
def real() -> ModuleType:
    return importlib.import_module("vit")


def images(random: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A bar for each of ten classes, at another height."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (120,), generator=generator)
    pictures = 0.1 * torch.rand(120, 28, 28, generator=generator)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        picture[2 * label + 3 : 2 * label + 6, 6:22] = 1
    return pictures, labels


@pytest.fixture
def vit(real: ModuleType, monkeypatch: pytest.MonkeyPatch, threads: object) -> ModuleType:
    for name, value in {"WIDTH": 24, "HEADS": 2, "DEPTH": 2, "load_digits": images}.items():
        monkeypatch.setattr(real, name, value)
    return real


def found(vit: ModuleType, options: str) -> dict[str, dict[str, Any]]:
    return {vit.label(row): row for row in vit.main([*SMALL, "--random-weights", *options.split()])}


def test_every_method_runs(vit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.csv"
    command = f"--sigma 0.2 --steps 4 --lr 5e-3 --compress --flatness --csv {path} --method"
    command = " ".join([command, *vit.WITH_ONE_LOSS])
    rows = found(vit, command)
    names = {vit.PROBE, "lora", "lora-pro"}
    names |= {f"{name} 0.05" for name in ("bi-lora", "lora-sam", "sam", "sl-sam", "eflat-lora")}
    names |= {f"{name} 0.2" for name in ("flat-lora", "rwp", "lpf-sgd", "halora")}
    assert rows.keys() == names
    assert len({row["train loss"] for row in rows.values()}) == len(rows), "two methods do the same"
    for row in rows.values():
        assert {"increase 0.2", "half loss, nf4", "half, prune 50 %", "noise 5", "occlusion 1"} <= row.keys()
        assert all(0 <= row[name] <= 1 for name in (*vit.ACCURACIES, "half, int8", "blur 3"))
        assert row["half loss, prune 50 %"] != row["half loss"]
    printed = capsys.readouterr().out
    assert "flat-lora 0.2 - lora" in printed
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert found(vit, command) == {}, "runs that the file has were repeated"


def test_the_few_options_of_an_arm_make_a_row_each(vit: ModuleType) -> None:
    pytest.importorskip("peft", reason="needs PEFT")
    rows = found(
        vit,
        "--method flat-lora --sigma 0.3 --steps 2 --adapter lora rslora dora pissa --samples 1 pairs"
        " --noise gaussian rademacher --lr 5e-3",
    )
    assert len(rows) == 1 + 4 * 2 * 2
    assert len({row["train loss"] for row in rows.values()}) == len(rows)
    assert {"flat-lora 0.3 rademacher dora samples pairs", "flat-lora 0.3"} < rows.keys()


def test_runs_are_reproducible_and_share_their_start(vit: ModuleType) -> None:
    both = found(vit, "--method lora flat-lora --sigma 0.2 --steps 3")
    alone = found(vit, "--method flat-lora --sigma 0.2 --steps 3")
    assert alone["flat-lora 0.2"]["train loss"] == both["flat-lora 0.2"]["train loss"]
    silent = found(vit, "--method flat-lora --sigma 1e-30 --steps 3")["flat-lora 1e-30"]
    assert silent["train loss"] == pytest.approx(both["lora"]["train loss"], rel=1e-4)


def test_kept_layers_give_what_all_layers_give(vit: ModuleType) -> None:
    """The head alone sees the same features, wherever the adapters begin."""
    rows = [found(vit, f"--method lora --steps 1 --first-block {first}")[vit.PROBE] for first in (0, 1)]
    assert rows[0]["clean loss"] == pytest.approx(rows[1]["clean loss"], rel=1e-3)


def test_fine_tuning_learns_and_leaves_the_weights(vit: ModuleType) -> None:
    args = vit.parse_arguments([*SMALL, "--steps", "40", "--lr", "5e-3", "--first-block", "1"])
    _, blocks, norm = vit.load_model(True)
    model = vit.Classifier(blocks[1:], norm)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tokens, labels = torch.randn(30, 5, 24), torch.arange(30) % 10
    run = {
        "method": "flat-lora",
        "strength": 0.2,
        "noise": "gaussian",
        "adapter": "lora",
        "samples": "1",
        "seed": 0,
    }
    start = torch.nn.functional.cross_entropy(model(tokens), labels).item()
    trained, seconds = vit.finetune(model, run, tokens, labels, args)
    assert torch.nn.functional.cross_entropy(trained(tokens), labels).item() < 0.7 * start
    assert seconds > 0
    after = dict(trained.named_parameters())
    assert {n for n in before if not torch.equal(before[n], after[n])} == {"head.weight", "head.bias"}
    assert sum("lora_A" in name for name in after) == 6


def test_few_images_are_never_tested_on(real: ModuleType) -> None:
    labels = torch.arange(200) % 10
    few, test = real.split(labels, 7, 100, seed=1)
    assert labels[few].bincount().tolist() == [7] * 10
    assert test.tolist() == list(range(100)) and min(few.tolist()) >= 100
    assert few.tolist() != real.split(labels, 7, 100, seed=2)[0].tolist()


def test_corruptions(real: ModuleType) -> None:
    pictures = images()[0][:20]
    sets = real.test_sets(pictures)
    assert len(sets) == 2 + 5 * 5
    assert len(sets["clean"][0]) == 20 and len(sets["rotated"][1]) == 10 and len(sets["blur 2"][0]) == 4
    assert all(
        torch.equal(a, b)
        for a, b in zip(sets["occlusion 3"], real.test_sets(pictures)["occlusion 3"], strict=True)
    )
    for kind in ("noise", "blur", "contrast", "occlusion", "pixels"):
        distances = [(sets[f"{kind} {s}"][0] - pictures[:4]).norm().item() for s in real.STRENGTHS]
        assert distances == sorted(distances) and distances[0] > 0, kind
    assert (sets["noise 2"][0] - pictures[:4]).std() == pytest.approx(0.3, rel=0.1)
    point = torch.zeros(1, 28, 28)
    point[0, 14, 5] = 1  # half a pixel below the centre, 8.5 left of it
    turned = real.rotated(point, 90)
    assert turned.sum() == pytest.approx(1, rel=1e-4)
    assert turned[0].argmax().item() in (22 * 28 + 14, 5 * 28 + 13)
    assert real.blurred(point, 1.0).sum() == pytest.approx(1, rel=1e-4)


def test_the_weights_that_an_earlier_run_kept(real: ModuleType) -> None:
    """Of a model that equals onnxruntime's run of the whole graph on 224 pixels within 1e-6."""
    if not (real.cache_folder("dinov2") / "vit_s_14.pt").exists():
        pytest.skip("needs the weights, which a run of examples/vit.py downloads")
    embedding, blocks, norm = real.load_model(False)
    image = torch.linspace(0, 1, 784).view(1, 28, 28)
    with torch.no_grad():
        found = real.Classifier(blocks, norm).features(embedding(real.prepare(image, 56)))
    expected = torch.tensor([0.6600, 1.9419, 1.5074, -4.0980, 0.4513])
    torch.testing.assert_close(found[0, :5], expected, rtol=1e-3, atol=1e-3)


def test_random_images_need_no_download(real: ModuleType) -> None:
    pictures, labels = real.load_digits(True)
    assert pictures.shape == (5000, 28, 28) and labels.bincount().tolist() == [500] * 10


def test_errors(real: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for option, message in (
        ("--seeds 0", "--seeds: expected at least 1, got 0"),
        ("--size 50", "--size: expected a multiple of 14, got 50"),
        ("--first-block 12", "--first-block: expected 0 to 11, got 12"),
    ):
        with pytest.raises(SystemExit):
            real.parse_arguments(option.split())
        assert message in capsys.readouterr().err


def test_a_file_of_other_settings_is_refused(vit: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "found.csv"
    found(vit, f"--method lora --steps 1 --csv {path}")
    for options in ("--steps 2", "--steps 1 --compress", "--steps 1 --lora-alpha 8"):
        with pytest.raises(SystemExit, match="--csv: expected a new file or runs with"):
            found(vit, f"--method lora {options} --csv {path}")
    more = found(vit, f"--method lora flat-lora --sigma 0.2 --steps 1 --lora-alpha 16 --csv {path}")
    assert more.keys() == {"flat-lora 0.2"}


def test_flatness_is_measured_on_images_of_every_digit(
    vit: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = vit.F.cross_entropy
    monkeypatch.setattr(vit.F, "cross_entropy", lambda x, y: seen.append(y) or original(x, y))
    monkeypatch.setattr(vit, "load_digits", lambda random: (torch.rand(500, 28, 28), torch.arange(500) % 10))
    few = [*SMALL, "--random-weights", "--method", "lora", "--steps", "1", "--flatness", "--shots", "25"]
    vit.main(few)
    assert seen[-1].bincount().tolist() == [13, 12] * 5  # every second of 25


@pytest.mark.parametrize("samples", ["1", "batch"])
def test_too_few_images_are_refused(vit: ModuleType, samples: str) -> None:
    with pytest.raises(SystemExit, match="--shots: expected at most"):
        found(vit, f"--method lpf-sgd --sigma 0.2 --samples {samples} --steps 1 --shots 100")
    assert found(vit, f"--method lpf-sgd --sigma 0.2 --samples {samples} --steps 1").keys() == {
        vit.PROBE,
        "lpf-sgd 0.2",
    }
