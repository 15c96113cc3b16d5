"""The measures of flatness against a quadratic loss, of which everything is known, their plots and the command."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, NoiseController, flat_noise_scale, flatness, materialize_noise

N, K = 24, 40
SENTENCES = ([[1, 2]], [[1, 2, 3]], [[1, 2, 3, 4]])  # of `saved` that predict something, as tokens


def quadratic(**options: object) -> tuple[FlatLoraLinear, flatness.Loss, Tensor]:
    """0.5 ||(W' + eps) X^T||^2 + a slope, and the Hessian of one row of W: C = X^T X."""
    generator = torch.Generator().manual_seed(0)
    weight, x, slope = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((N, K), (60, K), (60, N))
    )
    layer = FlatLoraLinear(weight, r=3, dtype=torch.float64, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(N, 3, generator=generator, dtype=torch.float64))

    def loss() -> Tensor:
        y = layer(x)
        return 0.5 * y.square().sum() + (slope * y).sum()

    return layer, loss, x.t() @ x


def merged(layer: FlatLoraLinear) -> Tensor:
    return (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).detach()


def test_expected_increase_is_that_of_the_quadratic() -> None:
    layer, loss, C = quadratic(sigma=0.3)
    scale = merged(layer).norm(dim=1) / math.sqrt(K)
    found = flatness.expected_increase(layer, loss, (0.1, 0.4), draws=40)
    for increase in found:
        expected = 0.5 * (increase.sigma * scale).square().sum().item() * C.trace().item()
        assert abs(increase.mean - expected) < 4 * increase.standard_error
        assert increase.standard_error < 0.05 * expected
    # The same draws for every sigma, and antithetic pairs: a quadratic scales exactly, its slope cancels.
    assert found[1].mean == pytest.approx(16 * found[0].mean, rel=1e-5)


def test_one_pair_is_the_noise_that_is_materialised() -> None:
    layer, loss, C = quadratic()
    scale = flat_noise_scale(layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling, sigma=0.2)
    values = []
    for sample in range(2):
        eps = materialize_noise(scale, K, seed=5, stream=layer.stream, sample=sample, dtype=torch.float64)
        values.append(0.5 * ((eps @ C) * eps).sum().item())
    (found,) = flatness.expected_increase(layer, loss, (0.2,), draws=2, seed=5)
    assert found.mean == pytest.approx(sum(values) / 2, rel=1e-5)
    assert found.standard_error == pytest.approx(abs(values[0] - values[1]) / 2, rel=1e-4)


def test_line_and_plane() -> None:
    layer, loss, _ = quadratic()
    weight = layer.weight
    steps = (-0.2, 0.0, 0.3)
    one = flatness.line(layer, loss, steps, seed=7)
    two = flatness.plane(layer, loss, steps, seed=7)
    assert layer.weight is weight
    unit = flat_noise_scale(layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling, sigma=1.0)
    c, d = (
        materialize_noise(unit, K, seed=seed, stream=layer.stream, dtype=torch.float64) for seed in (8, 7)
    )
    assert torch.allclose(d.norm(dim=1), merged(layer).norm(dim=1), rtol=0.5)
    before = layer.weight.detach().clone()
    for i, s in enumerate(steps):
        for j, t in enumerate(steps):
            with torch.no_grad():
                layer.weight.copy_(before + s * c + t * d)
                layer.eval()
                expected = loss().item()
            assert two[i][j] == pytest.approx(expected, rel=1e-6)
            if s == 0:
                assert one[j] == pytest.approx(expected, rel=1e-6)
    layer.weight.copy_(before)


def test_top_eigenvalue_of_the_full_weight() -> None:
    layer, loss, C = quadratic(train_weight=True)
    found = flatness.top_eigenvalue(layer, loss, parameters=[layer.weight], iterations=200, tolerance=1e-7)
    assert found.value == pytest.approx(torch.linalg.eigvalsh(C)[-1].item(), rel=1e-3)
    assert found.iterations > 2 and found.change < 1e-6


def test_top_eigenvalue_of_the_adapter() -> None:
    layer, loss, _ = quadratic()
    layer.eval()

    def of(A: Tensor, B: Tensor) -> Tensor:
        weight = layer.weight.detach() + layer.scaling * B @ A
        generator = torch.Generator().manual_seed(0)
        _, x, slope = (
            torch.randn(*size, generator=generator, dtype=torch.float64)
            for size in ((N, K), (60, K), (60, N))
        )
        y = x @ weight.t()
        return 0.5 * y.square().sum() + (slope * y).sum()

    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    size = a.numel() + b.numel()
    hessian = torch.autograd.functional.hessian(
        lambda p: of(p[: a.numel()].view_as(a), p[a.numel() :].view_as(b)),
        torch.cat((a.flatten(), b.flatten())),
    ).view(size, size)
    values = torch.linalg.eigvalsh(hessian)
    largest = values[values.abs().argmax()].item()
    found = flatness.top_eigenvalue(layer, loss, iterations=300, tolerance=1e-7, step=1e-4)
    assert found.value == pytest.approx(largest, rel=1e-2)


@pytest.mark.parametrize("fails_at", [None, 3])
@pytest.mark.parametrize("what", ["flatness", "plane", "line"])
def test_nothing_is_left_behind(what: str, fails_at: int | None) -> None:
    controller = NoiseController(sigma=0.1, seed=3)
    layer, loss, _ = quadratic(noise_controller=controller, sigma=None, lora_dropout=0.5)
    model = nn.Sequential(layer, nn.Dropout())
    model[1].eval()
    calls = 0

    def counted() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise KeyError("stop")
        assert not model.training
        return loss()

    state = {name: value.clone() for name, value in layer.named_parameters()}
    before = layer.weight.data_ptr(), controller.step, controller.value, torch.get_rng_state()
    attributes = set(layer.__dict__)
    torch.manual_seed(11)
    seen = layer(torch.ones(2, K, dtype=torch.float64))
    torch.set_rng_state(before[3])
    with pytest.raises(KeyError, match="stop") if fails_at else torch.enable_grad():
        getattr(flatness, what)(model, counted)
    assert (layer.weight.data_ptr(), controller.step, controller.value) == before[:3]
    assert torch.equal(torch.get_rng_state(), before[3])
    assert all(torch.equal(value, state[name]) for name, value in layer.named_parameters())
    assert all(p.grad is None for p in layer.parameters())
    assert [m.training for m in (model, layer, model[1])] == [True, True, False]
    assert set(layer.__dict__) == attributes
    torch.manual_seed(11)
    assert torch.equal(layer(torch.ones(2, K, dtype=torch.float64)), seen)


def test_report_and_plots(tmp_path: Path) -> None:
    layer, loss, _ = quadratic()
    report = flatness.flatness(layer, loss, sigmas=(0.1, 0.2), draws=2, iterations=3)
    text = str(report)
    assert text.startswith("loss ") and "0.2" in text and "3 iterations" in text
    assert flatness.flatness(layer, loss, sigmas=(0.1,), draws=2, iterations=0).eigenvalue is None
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib")
    flatness.plot({"before": [1.0, 2.0]}, [0, 1], tmp_path / "line.png")
    flatness.plot_plane([[1.0, 2.0], [3.0, 4.0]], [0, 1], tmp_path / "plane.svg")
    assert (tmp_path / "line.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "plane.svg").read_text()


def test_errors() -> None:
    layer, loss, _ = quadratic()
    with pytest.raises(ValueError, match="model: expected layers that draw weight noise, got none"):
        flatness.line(nn.Linear(3, 3), loss)
    with pytest.raises(ValueError, match="draws: expected an int >= 2, got 1"):
        flatness.expected_increase(layer, loss, draws=1)
    layer.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters: expected some that require gradients, got none"):
        flatness.top_eigenvalue(layer, loss)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny classifier, a language model, adapters for both, and data."""
    for needed in ("peft", "transformers"):
        pytest.importorskip(needed)
    import peft
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["<pad>", *"abcdefghij"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        vocab_size=11, num_key_value_heads=1, num_labels=2, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    for kind, make in {
        "classification": transformers.LlamaForSequenceClassification,
        "causal-lm": transformers.LlamaForCausalLM,
    }.items():
        base = make(config)
        base.save_pretrained(tmp_path / kind)
        fast.save_pretrained(tmp_path / kind)
        task = "SEQ_CLS" if kind == "classification" else "CAUSAL_LM"
        options = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type=task)
        model = peft.get_peft_model(base, options)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.5)
        model.save_pretrained(tmp_path / f"{kind}-adapter")
    lines = [{"text": "a b c d"[: 2 * n + 1], "label": n % 2} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def command(saved: Path, task: str, *more: str) -> dict[str, flatness.Flatness]:
    adapter = str(saved / f"{task}-adapter")
    options = (
        f"--task {task} --batch-size 3 --sigma 0.1 --draws 2 --iterations 3 --data {saved / 'data.jsonl'}"
    )
    return flatness.main(["--model", str(saved / task), "--adapter", adapter, *options.split(), *more])


def test_command_reports_before_and_after(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import peft
    import transformers

    plots = ["--plots", str(saved / "plots")] if importlib.util.find_spec("matplotlib") else []
    found = command(saved, "classification", *plots)
    name = str(saved / "classification-adapter")
    assert list(found) == ["before", name]
    auto = transformers.AutoModelForSequenceClassification
    rows = [json.loads(line) for line in (saved / "data.jsonl").read_text().splitlines()]
    encoded = transformers.AutoTokenizer.from_pretrained(saved / "classification")(
        [row["text"] for row in rows], padding=True, return_tensors="pt"
    )
    labels = torch.tensor([row["label"] for row in rows])
    model = peft.PeftModel.from_pretrained(auto.from_pretrained(saved / "classification"), name).eval()
    with torch.no_grad():
        after = model(**encoded, labels=labels).loss.item()
        for key, p in model.named_parameters():
            p.mul_("lora_B" not in key)
        before = model(**encoded, labels=labels).loss.item()
    assert found[name].loss == pytest.approx(after, rel=1e-5)
    assert found["before"].loss == pytest.approx(before, rel=1e-5) != pytest.approx(after, rel=1e-3)
    assert found["before"].eigenvalue.value != found[name].eigenvalue.value
    assert found[name].increases[0].standard_error > 0
    assert "before: loss" in capsys.readouterr().out
    if plots:
        expected = {"line.svg", "plane-0-before.svg", "plane-1-classification-adapter.svg"}
        assert {path.name for path in (saved / "plots").iterdir()} == expected


def test_command_on_chips_and_intruders(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss on each chip, from weights with that chip's noise written into them."""
    import peft
    import transformers

    from flatlora_kernels.integrations.peft import apply_flat_lora

    options = "--iterations 0 --chips 3 --chip-sigma 0.02 0.2 --seed 7 --intruders"
    found = command(saved, "causal-lm", *options.split())
    name = str(saved / "causal-lm-adapter")
    assert (found["before"].intruders, [c.sigma for c in found[name].on_chips]) == (0, [0.02, 0.2])
    auto = transformers.AutoModelForCausalLM
    model = peft.PeftModel.from_pretrained(auto.from_pretrained(saved / "causal-lm"), name)
    apply_flat_lora(model, sigma=0.0, verbose=False)
    assert found[name].intruders == sum(flatness.intruder_dimensions(model).values())
    layers = [m for m in model.modules() if hasattr(m, "flat_lora_name")]
    losses = []
    for chip in range(10**6 + 7, 10**6 + 10):
        moved = copy.deepcopy(model).eval()
        with torch.no_grad():
            for layer, other in zip(
                layers, (m for m in moved.modules() if hasattr(m, "flat_lora_name")), strict=True
            ):
                W = layer.get_base_layer().weight
                scale = (0.2 * W.abs().max()).repeat(len(W))
                other.get_base_layer().weight += materialize_noise(
                    scale, W.shape[1], seed=chip, stream=layer.stream
                )
            total = [
                moved(input_ids=ids, labels=ids).loss * (ids.numel() - 1)
                for ids in map(torch.tensor, SENTENCES)
            ]
        losses.append(float(sum(total) / sum(len(ids[0]) - 1 for ids in SENTENCES)))
    assert found[name].on_chips[1].mean == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert found[name].on_chips[1].worst == pytest.approx(max(losses), rel=1e-4)
    assert found[name].on_chips[1].deviation > found[name].on_chips[0].deviation > 0
    printed = capsys.readouterr().out
    assert "on 3 chips whose weights are off by 0.2 of the largest: loss" in printed
    assert "intruder dimensions: 0" in printed


def test_command_weighs_tokens(saved: Path) -> None:
    import peft
    import transformers

    found = command(saved, "causal-lm", "--iterations", "0")
    name = str(saved / "causal-lm-adapter")
    assert found[name].eigenvalue is None
    base = transformers.AutoModelForCausalLM.from_pretrained(saved / "causal-lm")
    model = peft.PeftModel.from_pretrained(base, name).eval()
    losses = []
    for ids in ([1, 2], [1, 2, 3], [1, 2, 3, 4]):  # "a" alone predicts nothing
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        losses += nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()
    assert found[name].loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "--data: expected at least one line, got none"),
        ('{"text": "a"}', '--data: .* and "label", an int, got .*: line 1 has not'),
        ('{"text": "a", "label": 0}\nno', "--data: .*: Expecting value"),
        (None, "--data: .*: .*No such file"),
    ],
)
def test_command_errors(saved: Path, text: str | None, message: str) -> None:
    (saved / "data.jsonl").unlink()
    if text is not None:
        (saved / "data.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message):
        command(saved, "classification")


def test_command_wants_chips_for_their_noise(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ("--chip-sigma 0.1", "--chip-sigma: expected --chips beside it, got none"),
        ("--chips 2 --chip-sigma 0", "--chip-sigma: expected numbers > 0, got 0"),
        ("--chips -1", "--chips: expected at least 0, got -1"),
    ):
        with pytest.raises(SystemExit):
            command(saved, "classification", *options.split())
        assert message in capsys.readouterr().err


def test_command_names_what_it_cannot_load(saved: Path) -> None:
    (saved / "causal-lm-adapter" / "adapter_config.json").unlink()
    with pytest.raises(SystemExit, match="--adapter: expected .* got .*causal-lm-adapter"):
        command(saved, "causal-lm")
    with pytest.raises(SystemExit, match="--model: expected .* got 'no/where/at/all'"):
        command(saved, "causal-lm", "--model", "no/where/at/all")
    (saved / "data.jsonl").write_text('{"text": "a"}')
    with pytest.raises(SystemExit, match="--data: expected texts of two tokens or more"):
        command(
            saved, "classification", "--task", "causal-lm", "--adapter", str(saved / "classification-adapter")
        )
