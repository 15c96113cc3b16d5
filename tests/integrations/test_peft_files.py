"""PEFT's own files, a run that is resumed from them, and copies."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import PeftModel  # noqa: E402
from peft_models import (  # noqa: E402
    agree,
    behaviour,
    lora,
    names_modules,
    pair,
    run,
)

from flatlora_kernels import NoiseController  # noqa: E402
from flatlora_kernels.integrations.peft import (  # noqa: E402
    apply_flat_lora,
    custom_modules,
)

# PEFT warns of what these tests are about: tied weights, fan_in_fan_out, merged DoRA.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def saved(model: Any, folder: Path) -> dict[str, Any]:
    """The files; of the configuration the values, because PEFT writes target_modules, a set, in any order."""
    model.save_pretrained(folder)
    files: dict[str, Any] = {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")
    }
    config = json.loads(files["adapter_config.json"])
    config["target_modules"].sort()
    return {**files, "adapter_config.json": json.dumps(config)}


@pytest.mark.parametrize("name", ["plain", "dora", "modules_to_save", "transposed"])
def test_saved_adapters_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """The same bytes, and each side loads what the other saved."""
    peft, flat = behaviour(name, sigma=0.3)
    theirs, ours = saved(peft, tmp_path / "peft"), saved(flat, tmp_path / "flat")
    assert theirs == ours and set(ours) == {"adapter_model.safetensors", "adapter_config.json"}
    base = peft.unload()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "flat", is_trainable=True).train()
    again = copy.deepcopy(loaded)
    again.controller = apply_flat_lora(again, sigma=0.3, seed=5)
    agree(run(again), run(flat))
    assert saved(again, tmp_path / "again") == ours


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    """From PEFT's file and the optimiser's state, in the middle of a schedule, whatever seed: bit for bit."""

    def optimiser(model: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        model.controller.attach(optimizer)
        return optimizer

    def train(model: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        outputs = []
        for _ in range(2):
            outputs.append(run(model)["y"])
            optimizer.step()
        return outputs

    schedule = {"schedule": "cosine", "total_steps": 4}
    peft, flat = pair(lora(lora_dropout=0.2), sigma=0.3, **schedule)
    optimizer = optimiser(flat)
    train(flat, optimizer)
    flat.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    expected = train(flat, optimizer)

    resumed = PeftModel.from_pretrained(peft.unload(), tmp_path, is_trainable=True).train()
    resumed.controller = apply_flat_lora(resumed, sigma=0.3, seed=99, **schedule)
    optimizer = optimiser(resumed)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert all(map(torch.equal, train(resumed, optimizer), expected))
    assert resumed.controller.sigma == 0.3
    for name, value in flat.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@names_modules
def test_loading_into_custom_modules(tmp_path: Path) -> None:
    """Adapters on the meta device until their values come."""
    _, flat = pair(lora(), sigma=0.3)
    flat.save_pretrained(tmp_path)
    config = lora()
    config._register_custom_module(custom_modules(NoiseController(sigma=0.3, seed=5)))
    base = copy.deepcopy(flat).unload()
    loaded = PeftModel.from_pretrained(
        base, tmp_path, config=config, is_trainable=True, low_cpu_mem_usage=True
    ).train()
    agree(run(loaded), run(flat))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied: Callable[[Any], Any]) -> None:
    """A copy draws the same noise, by a controller of its own."""
    _, flat = pair(lora(lora_dropout=0.1), sigma=0.3)
    flat.controller.advance()
    twin = copied(flat)
    agree(run(twin), run(flat))
    before = run(twin)["y"]
    flat.controller.advance()
    assert torch.equal(run(twin)["y"], before)
    twin.controller.advance()
    agree(run(twin), run(flat))
