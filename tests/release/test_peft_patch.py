"""The patch for PEFT in release/peft/: applied to a copy of the installed PEFT, a layer is trained, with this library
and by plain torch, and compared with eager formulas and with this library's own integration."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PATCH = ROOT / "release" / "peft" / "flat_lora_variant.patch"
SIGMA, SEED = 0.4, 3


def patched(folder: Path) -> Path:
    """Where a PEFT with the patch can be imported from."""
    version = re.search(r"PEFT (\d+\.\d+\.\d+)", (PATCH.parent / "README.md").read_text(encoding="utf-8"))
    assert version, "the README says which version the patch is for"
    try:
        found = importlib.metadata.distribution("peft")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip('PEFT is not installed: pip install "flatlora_kernels[peft]"')
    if found.version != version[1]:
        pytest.skip(f"the patch is for PEFT {version[1]}, installed is {found.version}")
    if shutil.which("git") is None:
        pytest.skip("git, which applies the patch, is not installed")
    shutil.copytree(Path(str(found.locate_file("peft"))), folder / "src" / "peft")
    # By itself git would look for a repository around the folder, and leave out what lies beside that.
    subprocess.run(
        ["git", "apply", "--include=src/peft/*", str(PATCH)],
        cwd=folder, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}, check=True,
    )  # fmt: skip
    return folder / "src"


def test_trains_with_and_without_this_library(tmp_path: Path) -> None:
    source = patched(tmp_path)
    assert (source / "peft" / "tuners" / "lora" / "flat_lora.py").is_file()
    path = os.pathsep.join([str(source), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "PYTHONPATH": path}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(source), "flatlora_kernels", "torch"]


def train(kernels: bool) -> None:
    """Two steps of the patched PEFT beside eager formulas."""
    from peft import FlatLoraConfig, LoraConfig, get_peft_model
    from peft.tuners.lora import flat_lora
    from transformers.pytorch_utils import Conv1D

    from flatlora_kernels import materialize_noise
    from flatlora_kernels.integrations.peft import apply_flat_lora

    flat_lora.is_flatlora_kernels_available = lambda: kernels

    def model(**options: object) -> torch.nn.Module:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), Conv1D(16, 32))
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False, fan_in_fan_out=True, **options
        )  # fmt: skip
        return get_peft_model(net, config).train()

    noisy, own = model(flat_lora_config=FlatLoraConfig(sigma=SIGMA, seed=SEED)), model()
    controller = apply_flat_lora(own, sigma=SIGMA, seed=SEED, verbose=False)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (noisy, own)
    ]
    controller.attach(optimizers[1])
    torch.manual_seed(1)
    x, seen = torch.randn(8, 24), []
    for _ in range(2):
        y = noisy(x)
        layers = [noisy.base_model.model[0], noisy.base_model.model[2]]
        states = [layer.lora_flat_noise["default"] for layer in layers]
        h = x
        for layer, state, mine in zip(layers, states, controller.layers, strict=True):
            # The same weights: so the library's integration has the same norms.
            torch.testing.assert_close(state.scale, mine.noise_scale, rtol=1e-4, atol=0.0)
            W = layer.base_layer.weight.T if layer.fan_in_fan_out else layer.base_layer.weight
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if kernels:
                eps = materialize_noise(state.scale, layer.in_features, seed=state.seed_tensor)
            else:
                z = torch.randn(W.shape, generator=torch.Generator().manual_seed(state.seed))
                eps = state.scale[:, None] * z
            norms = (W + 1.5 * B @ A).norm(dim=1)
            assert 0.85 < (eps / (SIGMA / layer.in_features**0.5 * norms)[:, None]).std() < 1.15
            h = h @ (W + 1.5 * B @ A + eps).T + layer.base_layer.bias
            h = torch.tanh(h) if layer is layers[0] else h
            seen.append(eps.flatten()[:256])
        torch.testing.assert_close(y, h, rtol=1e-4, atol=1e-5)
        parameters = [p for p in noisy.parameters() if p.requires_grad]
        want = torch.autograd.grad(h.sin().sum(), parameters)
        y.sin().sum().backward()
        for parameter, gradient in zip(parameters, want, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
        # The other model follows; its noise is of another seed, and moves on by itself.
        for parameter, twin in zip(parameters, (p for p in own.parameters() if p.requires_grad), strict=True):
            twin.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert controller.step == 2
    for i, eps in enumerate(seen):  # of each layer and each step
        for other in seen[:i]:
            assert abs(torch.corrcoef(torch.stack((eps, other)))[0, 1]) < 0.3

    noisy.eval(), own.eval()
    torch.testing.assert_close(noisy(x), own(x), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    import peft

    print(Path(peft.__file__).parents[1])
    for name in ("flatlora_kernels", "torch"):
        train(name == "flatlora_kernels")
        print(name)
