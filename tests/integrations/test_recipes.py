"""The recipes of docs/recipes.md: TRL, a loop with accelerate, torchrun."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatlora_kernels
from flatlora_kernels import NoiseController

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from flatlora_kernels.integrations.peft import FlatLinear, apply_flat_lora  # noqa: E402
from flatlora_kernels.integrations.transformers import FlatLoraCallback  # noqa: E402

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
TEXTS = [" ".join(WORDS[3 + i * j % 26] for j in range(1, 9)) for i in range(1, 25)]
ARGUMENTS = {
    "max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "bf16": False, "seed": 0,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 32, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens))


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# TRL


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def sft(trl: Any, tokenizer: Any, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    from datasets import Dataset

    found = trl.SFTTrainer(
        llama(), trl.SFTConfig(str(folder), **ARGUMENTS, **options), train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer, peft_config=lora(), callbacks=callbacks,
    )  # fmt: skip
    found.train()
    return found


def test_trl_sft(trl: Any, tokenizer: Any, tmp_path: Path) -> None:
    """SFTTrainer makes the PEFT model, with gradient checkpointing; sigma = 0 is training without noise."""
    callback = FlatLoraCallback(sigma=0.3, schedule="linear", seed=1, backend="reference")
    found = sft(trl, tokenizer, tmp_path, [callback])
    assert found.args.gradient_checkpointing
    assert len(callback.controller.layers) == 4
    assert [line.get("flat_lora/sigma") for line in found.state.log_history[:4]] == [
        0.3 * t / 4 for t in range(4)
    ]
    quiet = sft(trl, tokenizer, tmp_path, [FlatLoraCallback(sigma=0.0, backend="reference")])
    plain = sft(trl, tokenizer, tmp_path, [])
    noisy, without, expected = (adapters(t.model) for t in (found, quiet, plain))
    assert all(torch.allclose(without[n], expected[n], rtol=1e-4, atol=1e-6) for n in expected)
    assert not any(torch.allclose(noisy[n], expected[n], rtol=1e-2) for n in expected if "lora_B" in n)


def test_trl_sft_with_packed_sequences(trl: Any, tokenizer: Any, tmp_path: Path) -> None:
    callback = FlatLoraCallback(sigma=0.3, seed=1, backend="reference", samples="batch")
    with pytest.warns(UserWarning, match=r'samples="batch" is one sample for an input of shape \(1, '):
        sft(trl, tokenizer, tmp_path, [callback], packing=True, max_length=32)
    assert callback.controller.step == 4


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[bool, bool]]]:
    """(with gradients, under noise) of what was asked of converted layers."""
    seen: set[tuple[bool, bool]] = set()
    forward = FlatLinear.forward

    def noted(layer: FlatLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        drawn = []
        arguments = type(layer).noise_arguments

        def asked(x: Tensor) -> dict[str, Any]:
            found = arguments(layer, x)
            drawn.append("noise_scale" in found)
            return found

        layer.__dict__["noise_arguments"] = asked
        try:
            return forward(layer, x, *args, **kwargs)
        finally:
            del layer.__dict__["noise_arguments"]
            seen.add((torch.is_grad_enabled(), any(drawn)))

    monkeypatch.setattr(FlatLinear, "forward", noted)
    yield seen


@pytest.mark.parametrize(
    "begins", ["with a new adapter", "with a trained one", "with a trained one, beside its copy"]
)
def test_trl_dpo(
    trl: Any, tokenizer: Any, tmp_path: Path, begins: str, passes: set[tuple[bool, bool]]
) -> None:
    """The policy is under noise, the reference is not: a model without adapters, or a copy of the trained ones."""
    from datasets import Dataset

    preferences = {
        "prompt": [t[:6] for t in TEXTS],
        "chosen": [t[6:] for t in TEXTS],
        "rejected": [t[::-1] for t in TEXTS],
    }
    only = {"adapters": ["default"]} if begins == "with a trained one, beside its copy" else {}
    callback = FlatLoraCallback(sigma=0.3, seed=1, backend="reference", **only)
    model, options, config = llama(), {}, lora()
    if begins != "with a new adapter":
        model, config = get_peft_model(model, config), None
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        options = {} if only else {"precompute_ref_log_probs": True}
    found = trl.DPOTrainer(
        model, None, args=trl.DPOConfig(str(tmp_path), gradient_checkpointing=False, **ARGUMENTS, **options),
        train_dataset=Dataset.from_dict(preferences), processing_class=tokenizer, peft_config=config,
        callbacks=[callback],
    )  # fmt: skip
    found.train()
    assert callback.controller.step == 4
    assert {noisy for gradients, noisy in passes if gradients} == {True}
    assert {noisy for gradients, noisy in passes if not gradients} == (set() if options else {False})


# accelerate


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(32, (2, 8), generator=generator) for _ in range(8)]


def loop(
    controller: NoiseController, model: Any, accelerator: Any, optimizer: Any, some: list[Tensor]
) -> list[float]:
    sigmas = []
    for ids in some:
        with accelerator.accumulate(model):
            sigmas.append(controller.sigma)
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            optimizer.zero_grad()
    return sigmas


@pytest.fixture
def accelerator() -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def forget() -> None:  # they are for the whole process, and not as another test made them
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    forget()
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    forget()


@pytest.mark.parametrize("attach", ["before prepare", "after prepare"])
def test_accelerate(accelerator: Any, tmp_path: Path, attach: str) -> None:
    """Two micro-batches a step, as in a plain loop; saved and loaded by accelerate, and resumed."""

    def start(seed: int) -> tuple[NoiseController, Any, Any]:
        model = get_peft_model(llama(), lora())
        controller = apply_flat_lora(
            model, sigma=0.3, schedule="linear", total_steps=4, seed=seed, backend="reference"
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return controller, model.train(), optimizer

    def prepared(seed: int) -> tuple[NoiseController, Any, Any]:
        controller, model, optimizer = start(seed)
        if attach == "before prepare":
            controller.attach(optimizer)
        model, optimizer = accelerator.prepare(model, optimizer)
        if attach == "after prepare":
            controller.attach(optimizer)
        return controller, model, optimizer

    plain_controller, plain, plain_optimizer = start(1)
    plain_controller.attach(plain_optimizer)
    for i, ids in enumerate(batches()):
        (plain(input_ids=ids, labels=ids).loss / 2).backward()
        if i % 2:
            plain_optimizer.step()
            plain_optimizer.zero_grad()

    controller, model, optimizer = prepared(1)
    assert loop(controller, model, accelerator, optimizer, batches()[:4]) == [0.0, 0.0, 0.075, 0.075]
    accelerator.save_state(str(tmp_path))
    loop(controller, model, accelerator, optimizer, batches()[4:])
    expected = adapters(plain)
    got = adapters(model)
    assert all(torch.allclose(got[n], expected[n], rtol=1e-5, atol=1e-7) for n in expected)

    accelerator.free_memory()
    other, again, optimizer = prepared(9)
    accelerator.load_state(str(tmp_path))
    assert other.state_dict() == {"base": 1, "step": 2}
    loop(other, again, accelerator, optimizer, batches()[4:])
    resumed = adapters(again)
    assert all(torch.equal(resumed[n], got[n]) for n in got)


# torchrun

SCRIPT = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from flatlora_kernels.integrations.transformers import FlatLoraCallback

folder, batch = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
data = [{"input_ids": row, "labels": row} for row in torch.randint(32, (32, 8))]
arguments = TrainingArguments(
    folder, max_steps=4, per_device_train_batch_size=batch, gradient_accumulation_steps=2, report_to="none",
    use_cpu=True, ddp_backend="gloo" if batch == 2 else None, disable_tqdm=True, save_strategy="no",
    logging_steps=1, learning_rate=1e-2,
)
callback = FlatLoraCallback(sigma=0.5, schedule="cosine", seed=1, backend="reference")
trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
trainer.train()
assert (batch == 2) == isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
noise = [(line["flat_lora/sigma"], line["flat_lora/seed_step"]) for line in trainer.state.log_history[:-1]]
assert len(callback.controller.layers) == 4
name = f"{arguments.process_index}-of-{arguments.world_size}.pt"
torch.save((state, noise, callback.controller.value), f"{folder}/{name}")
"""


@pytest.mark.slow
def test_torchrun(tmp_path: Path, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with two sequences each are one with four; the callback converts below DistributedDataParallel."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs a torch with gloo")
    threads(1)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = Path(flatlora_kernels.__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path), "2"], capture_output=True, text=True, timeout=200,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path), "4"])
    runpy.run_path(str(script))
    first, second, alone = (torch.load(tmp_path / f"{name}.pt") for name in ("0-of-2", "1-of-2", "0-of-1"))
    assert first[1:] == second[1:] == alone[1:]
    assert [step for _, step in alone[1]] == [0, 1, 2, 3]
    assert all(torch.equal(first[0][n], second[0][n]) for n in first[0])
    assert all(torch.allclose(first[0][n], alone[0][n], rtol=1e-4, atol=1e-6) for n in alone[0])
