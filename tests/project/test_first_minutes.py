"""A newcomer's first minutes: clone, install, change a script that exists, train, evaluate, save, load elsewhere."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

for package in ("peft", "transformers", "accelerate", "pip"):
    try:  # not imported: where pip is looked for, setuptools gives up its distutils, which Inductor needs
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs {package}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
base = LlamaForCausalLM(LlamaConfig(**sizes))
base.save_pretrained("base")
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (32, 8))]
arguments = TrainingArguments(
    "run", max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, save_strategy="no",
    report_to="none", disable_tqdm=True, use_cpu=True,
)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
trainer.train()
print(trainer.evaluate())
model.save_pretrained("adapter")
ids = torch.arange(16).reshape(2, 8)
torch.save((ids, model(input_ids=ids).logits.detach()), "logits.pt")
"""
CHANGE = {
    "\nimport torch\n": "\nimport torch\nfrom flatlora_kernels.integrations.transformers import FlatLoraCallback\n",
    "eval_dataset=data)": 'eval_dataset=data, callbacks=[FlatLoraCallback(sigma=0.05, schedule="linear")])',
}
ELSEWHERE = """
import sys
sys.modules["flatlora_kernels"] = None  # an import of it fails
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter").eval()
ids, expected = torch.load("logits.pt")
torch.testing.assert_close(model(input_ids=ids).logits, expected)
plain = model.base_model.disable_adapter_layers() or model(input_ids=ids).logits
assert (plain - expected).abs().max() > 1e-3, "the adapter was trained"
"""


def clone(folder: Path) -> None:
    """The files that a clone would have if all that is here were committed."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(git, capture_output=True, text=True, check=True).stdout.split("\0"):
        source, there = ROOT / name, folder / name
        if name and os.path.lexists(source):
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, there, follow_symlinks=False)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a git checkout")
def test_from_a_clone_to_an_adapter_that_loads_anywhere(tmp_path: Path) -> None:
    """In an environment of its own, which borrows torch, transformers and PEFT from this one."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("FLATLORA_", "PYTHON", "PIP_"))
    } | {"FLATLORA_BUILD": "none", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    clone(tmp_path / "clone")
    run(sys.executable, "-m", "venv", "--without-pip", "environment")  # whose setuptools may be too old
    python = tmp_path / "environment/bin/python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", "--no-build-isolation", tmp_path / "clone")
    assert (own / "flatlora_kernels/__init__.py").exists()

    script = SCRIPT
    for before, after in CHANGE.items():
        assert script.count(before) == 1
        script = script.replace(before, after)
    (tmp_path / "train.py").write_text(script)
    said = run(python, "train.py")
    sigmas = [line for line in said.splitlines() if "'flat_lora/sigma'" in line]
    assert ["'loss'" in line for line in sigmas] == 4 * [True]
    assert "'flat_lora/sigma': '0'" in sigmas[0] and "'flat_lora/sigma': '0.0375'" in sigmas[3]
    assert "call model.eval() before you generate" in said
    assert "'eval_loss'" in said

    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    run(python, "elsewhere.py")
