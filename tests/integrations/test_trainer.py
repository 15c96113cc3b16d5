"""transformers.Trainer with FlatLoraCallback."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, NoiseController, apply_flat_lora

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments  # noqa: E402

from flatlora_kernels.integrations.transformers import FlatLoraCallback  # noqa: E402


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.second(torch.tanh(self.first(x)))[:, 0]
        return {"loss": (y - labels).square().mean(), "logits": y}


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator)
    return [{"x": row, "labels": row.sum()} for row in x]


def trainer(
    folder: Path, seed: int = 3, *, callback: Any = FlatLoraCallback, options: Any = None, **arguments: Any
) -> tuple[Trainer, NoiseController]:
    torch.manual_seed(0)
    model = Model()
    controller = apply_flat_lora(
        model, ["first", "second"], r=2, lora_dropout=0.1, backend="reference", verbose=False,
        **{"sigma": 0.5, "schedule": "cosine", "seed": seed, **(options or {})},
    )  # fmt: skip
    for layer in controller.layers:
        nn.init.normal_(layer.lora_B)
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3,
        "learning_rate": 0.05, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 100,
        "output_dir": str(folder), **arguments,
    }  # fmt: skip
    found = Trainer(
        model, TrainingArguments(**arguments), train_dataset=data(), eval_dataset=data()[:4],
        callbacks=[callback(controller)] if callback else [],
    )  # fmt: skip
    return found, controller


def weights(found: Trainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in found.model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[n], right[n]) for n in left)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Other noise seed, other initial adapters: all that counts is in the checkpoint."""
    whole, controller = trainer(tmp_path)
    whole.train()
    assert controller.step == 6
    assert controller.sigma == controller.target_sigma == 0.5
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["FlatLoraCallback"]["attributes"]["saved"] == {"base": 3, "step": 3}

    for restore in (False, True):
        resumed, other = trainer(tmp_path, seed=99, restore_callback_states_from_checkpoint=restore)
        with torch.no_grad():
            resumed.model.first.lora_A.add_(1)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert (other.base, other.step, other.sigma) == (3, 6, 0.5)
        assert same(weights(resumed), weights(whole)), f"restore={restore}"

    other_noise, _ = trainer(tmp_path / "other", seed=4)
    other_noise.train()
    assert not same(weights(other_noise), weights(whole)), "the noise matters"


def test_steps_are_the_optimisers(tmp_path: Path) -> None:
    """Four micro-batches a step, evaluation in the midst; the controller is found in the model."""
    seen: list[tuple[int, float, int]] = []

    class Recorder(FlatLoraCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((state.global_step, self.controller.sigma, self.controller.step))

    found, controller = trainer(
        tmp_path, callback=lambda _: Recorder(), options={"schedule": "linear"}, max_steps=4,
        gradient_accumulation_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="no",
    )  # fmt: skip
    found.train()
    assert seen == [(t, 0.5 * t / 4, t) for t in range(4)]
    assert controller.step == 4
    assert controller.sigma == 0.5
    found.train()
    assert seen[4:] == seen[:4], "a second training begins again"


def test_attached_is_not_advanced_twice(tmp_path: Path) -> None:
    found, controller = trainer(tmp_path, max_steps=2, save_strategy="no")
    found.create_optimizer()
    controller.attach(found.optimizer)
    found.train()
    assert controller.step == 2


def test_skipped_steps_advance_nothing() -> None:
    controller = NoiseController()
    callback = FlatLoraCallback(controller)

    class Optimizer:
        step_was_skipped = True

    callback.on_step_end(None, None, None, optimizer=Optimizer())
    assert controller.step == 0
    callback.on_step_end(None, None, None, optimizer=object())
    assert controller.step == 1


def test_resumes_from_its_own_state() -> None:
    """Seed and step, which skipped steps keep below the Trainer's, without what FlatLoraLinear saves of them."""
    controller = NoiseController(seed=9)
    exported = FlatLoraCallback(NoiseController(seed=3)).state()
    exported["attributes"]["saved"]["step"] = 2
    state = SimpleNamespace(stateful_callbacks={"FlatLoraCallback": exported}, global_step=3, max_steps=6)
    FlatLoraCallback(controller).on_train_begin(None, state, None)
    assert (controller.base, controller.step, controller.total_steps) == (3, 2, 6)


def test_resume_from_a_checkpoint_without_noise(tmp_path: Path) -> None:
    plain, _ = trainer(tmp_path, callback=None, options={"schedule": "constant"})
    plain.train()
    resumed, controller = trainer(tmp_path, seed=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert controller.step == 6
    assert (tmp_path / "checkpoint-6").exists()


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="controller: expected a NoiseController, got float"):
        FlatLoraCallback(0.1)
    found, _ = trainer(tmp_path, callback=lambda _: FlatLoraCallback())
    found.model.first = FlatLoraLinear.from_linear(nn.Linear(6, 8), backend="reference")
    with pytest.raises(ValueError, match="share one NoiseController, got 2 layers with 2"):
        found.train()
    found, controller = trainer(tmp_path)
    found.add_callback(FlatLoraCallback(controller))
    with pytest.raises(ValueError, match="expected one FlatLoraCallback, got 2"):
        found.train()
    monkeypatch.setitem(sys.modules, "transformers.trainer_callback", None)
    monkeypatch.delitem(sys.modules, "flatlora_kernels.integrations.transformers")
    with pytest.raises(ImportError, match="pip install transformers"):
        import flatlora_kernels.integrations.transformers  # noqa: F401
