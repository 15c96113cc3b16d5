"""The example on a decoder: a tiny random one in place of SmolLM2, and a few invented sentences."""

from __future__ import annotations

import copy
import importlib
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

WORDS = "a b c d e f g h film plot actor scene good bad very not".split()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, threads: object) -> ModuleType:
    transformers = pytest.importorskip("transformers")
    module = importlib.import_module("language_model")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():  # large enough for noise to matter
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)

    def encode(text: str) -> list[int]:
        return [0, *(1 + WORDS.index(w) if w in WORDS else 20 + len(w) % 20 for w in text.split())]

    monkeypatch.setattr(module, "load_model", lambda: (copy.deepcopy(model), encode))
    return module


@pytest.fixture
def data(example: ModuleType, tmp_path: Path) -> Path:
    draw = random.Random(0)
    for name in example.sentiment.FILES.values():
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(60)]
        (tmp_path / name).write_text("".join(f"{i}\t{1.0}\t{t}\n" for i, t in enumerate(texts)))
    return tmp_path


SMALL = "--sentences 16 --batch-size 8 --steps 3 --lr 1e-2 --r 2 --eval-limit 6 --device cpu --sigma-schedule constant"


def found(example: ModuleType, data: Path, options: str) -> list[dict[str, Any]]:
    return example.main([*SMALL.split(), "--data", str(data), *options.split()])


def losses(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("seconds")}


def test_every_method_runs_and_a_file_is_carried_on(
    example: ModuleType, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")  # which --compress asks for
    monkeypatch.setattr(example.common, "COMPRESSIONS", ("int8", "prune 50 %"))
    monkeypatch.setattr(example, "FLATNESS_SIGMAS", (0.2,))
    file = data / "found.csv"
    methods = " ".join(example.common.WITH_ONE_LOSS)
    options = f"--compress --flatness --csv {file} --sigma 0.2 --noise gaussian hadamard --method {methods}"
    rows = found(example, data, options)
    names = [example.label(row) for row in rows]
    assert names[:4] == ["untrained", "lora", "flat-lora 0.2", "flat-lora 0.2 hadamard"]
    assert len(names) == 1 + 2 + 4 * 2 + 5  # without noise, with two kinds of it, with a radius
    training = {row["method"]: row["training"] for row in rows}
    assert training["sam"] == training["lora-sam"], "where adapters alone are trained, these are one method"
    assert len({row["training"] for row in rows}) == len(rows) - 1, "two other runs do the same"
    for row in rows:
        text = ("method", "noise", "sigma_schedule", "dtype")
        assert all(math.isfinite(value) for name, value in row.items() if name not in text)
        assert row["movie reviews"] != row["movie reviews, int8"] != row["movie reviews, prune 50 %"]
        assert (row["seconds"] > 0) == (row["method"] != "untrained")
    read = example.common.read_csv(file)
    assert [{k: str(v) for k, v in row.items()} for row in rows] == read
    printed = capsys.readouterr().out
    assert "loss on editorials, weights compressed" in printed and "flat-lora 0.2 hadamard - lora" in printed

    more = found(example, data, f"--compress --flatness --csv {file} --method lora --seeds 2")
    assert [(row["method"], row["seed"]) for row in more] == [("untrained", 1), ("lora", 1)]
    base = next(row for row in rows if row["method"] == "untrained")
    assert (
        more[0]["python, int8" if "python, int8" in base else "editorials, int8"] == base["editorials, int8"]
    )
    assert more[0]["training"] != base["training"], "other sentences"
    for change, message in (
        ("--lr 2e-2", "runs with lr 0.01, as .* has; got 0.02"),
        ("--method lora", "compress True, as .* has; got False"),
    ):
        flags = "" if change == "--method lora" else "--compress --flatness"
        with pytest.raises(SystemExit, match=message):
            found(example, data, f"{flags} --csv {file} {change}")


def test_runs_are_reproducible_and_share_their_start(example: ModuleType, data: Path) -> None:
    options = "--seed 3 --method "
    _, lora, flat = (losses(row) for row in found(example, data, options + "lora flat-lora"))
    assert losses(found(example, data, options + "flat-lora")[1]) == flat
    assert lora["training"] != flat["training"]
    # In the first step of the cosine there is no noise: the very same adapters on the very same sentences.
    options += "lora flat-lora --steps 1 --sigma-schedule cosine"
    _, lora, flat = (losses(row) for row in found(example, data, options))
    assert [lora[kind] for kind in example.KINDS_OF_TEXT] == [flat[kind] for kind in example.KINDS_OF_TEXT]


def adapted(
    example: ModuleType, method: str, options: str = "--dtype float32"
) -> tuple[Any, list[list[int]]]:
    model, _ = example.load_model()
    args = example.parse_arguments(f"{SMALL} {options}".split())
    model.to(getattr(torch, args.dtype))
    draw = random.Random(1)
    sentences = [[0, *draw.choices(range(1, 8), k=draw.randint(2, 9))] for _ in range(16)]
    what = {"method": method, "strength": 0.1, "noise": "gaussian", "seed": 5}
    example.train(model, sentences, what, args)
    return model, sentences


def test_training_learns_and_leaves_the_weights(example: ModuleType) -> None:
    before = example.load_model()[0].bfloat16()
    model, sentences = adapted(example, "flat-lora", "--steps 40 --dtype bfloat16")
    assert example.mean_loss(model, sentences) < 0.9 * example.mean_loss(before, sentences)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.state_dict().items())
    adapters = {name for name in after if "lora_" in name}
    assert {after[name].dtype for name in adapters} == {torch.float32}
    assert len(adapters) == 2 * 2 * 7 and not any("lm_head" in name for name in adapters)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters


def test_compressions_are_taken_back(example: ModuleType) -> None:
    pytest.importorskip("bitsandbytes")
    model, sentences = adapted(example, "lora")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tests = dict.fromkeys(example.KINDS_OF_TEXT, sentences)
    values = example.tested(model, tests, compress=True)
    assert len(values) == 5 + 2 * len(example.common.COMPRESSIONS)
    assert values["editorials, int8"] == pytest.approx(values["editorials"], rel=0.01)
    far = {
        how: abs(values[f"editorials, {how}"] - values["editorials"]) for how in example.common.COMPRESSIONS
    }
    assert far["int8"] < far["nf4"] and far["int8"] < far["prune 50 %"]
    assert example.tested(model, tests, compress=False)["editorials"] == values["editorials"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_losses_are_those_of_transformers(example: ModuleType) -> None:
    """Also where sentences of other lengths lie beside them."""
    model, _ = example.load_model()
    sentences = [[0, *range(1, n)] for n in (3, 9, 5)]
    total = 0.0
    for tokens in sentences:
        ids = torch.tensor([tokens])
        total += model(ids, labels=ids).loss.item() * (len(tokens) - 1)
    count = sum(len(tokens) - 1 for tokens in sentences)
    assert example.mean_loss(model, sentences) == pytest.approx(total / count, rel=1e-5)


def test_what_is_tested_is_not_trained_on(example: ModuleType, data: Path) -> None:
    _, encode = example.load_model()
    train, tests = example.load_text(data, encode, 100)
    assert tuple(tests) == example.KINDS_OF_TEXT
    home = {tuple(tokens) for tokens in tests["movie reviews"]}
    assert not home & {tuple(tokens) for tokens in train} and len(home) == 12 and len(train) == 48
    assert all(2 <= len(tokens) <= example.CODE_TOKENS + 1 for tokens in tests["python"])
    batches = example.batches(train, 8, seed=1)
    epoch = [tuple(tokens) for _ in range(6) for tokens in next(batches)]
    assert sorted(epoch) == sorted(map(tuple, train))
    assert [tuple(tokens) for tokens in next(batches)] != epoch[:8]


def test_errors(example: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, message in (
        ("--steps 0", "--steps: expected at least 1"),
        ("--sentences 4", "--sentences: expected at least --batch-size, 8, got 4"),
    ):
        with pytest.raises(SystemExit):
            found(example, data, option)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--sentences: expected at most 48, got 49"):
        found(example, data, "--sentences 49")
