"""Why a backend cannot run: the sentence for each thing that may be missing, whatever this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flatlora_kernels import backends


class FakeLibrary:
    """What backend `cuda` asks of its library."""

    def __init__(self, error: int = 0) -> None:
        self.error = error

    def flatlora_cuda_device(self, index: int, found: Any) -> int:
        return self.error

    def flatlora_cuda_error(self, error: int) -> bytes:
        return b"the driver is older than the CUDA version that the library was built with"


GOOD = {"version": "13.0", "gpus": True, "capability": (9, 0), "library": ("8.0 9.0+PTX", 0)}
CUDA = {
    "torch for CPU": (
        {"version": None},
        "needs a CUDA build of torch, and this torch was built for the CPU alone",
    ),
    "no GPU": ({"gpus": False}, "torch finds no NVIDIA GPU or no driver"),
    "old GPU": ({"capability": (7, 5)}, "compute capability 8.0 or later is needed, Card X has less"),
    "not built": ({"library": "its library was not built; do this"}, "its library was not built; do this"),
    "no code": (
        {"library": ("9.0 10.0+PTX", 0), "capability": (8, 6)},
        "has code for 9.0 10.0+PTX and none for Card X; build it again with TORCH_CUDA_ARCH_LIST=8.6",
    ),
    "old driver": ({"library": ("9.0", 35)}, "the driver is older than the CUDA version"),
    "all there": ({}, None),
}


@pytest.mark.parametrize("case", CUDA)
def test_why_cuda_cannot_run(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = backends.get("cuda")
    changed, sentence = CUDA[case]
    here = {**GOOD, **changed}
    monkeypatch.setattr(module, "_EMULATED", False)
    monkeypatch.setattr(torch.version, "cuda", here["version"])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here["gpus"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: here["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card X")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    library: Any = here["library"]
    if not isinstance(library, str):
        library = module._Loaded(FakeLibrary(library[1]), library[0], "NVIDIA 13.0")
    monkeypatch.setattr(module, "_load", lambda: library)
    reason = module.unavailable()
    assert (reason is None) == (sentence is None)
    if reason is not None:
        assert sentence in reason
        assert "\n" not in reason and not reason.endswith(".")


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),  # machine code runs on later minor versions
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (12, 0), True),
        ("9.0+PTX", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("9.0a+PTX", (10, 0), False),  # nor does PTX of 9.0a serve anything else
        ("10.0f", (10, 3), True),
        ("8.0 9.0 10.0+PTX", (8, 6), True),
    ],
)
def test_what_a_library_has_code_for(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert backends.get("cuda")._has_code_for(architectures, capability) == runs


def test_cuda_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = backends.get("cuda")
    load = module._load.__wrapped__
    monkeypatch.setattr(module, "_EMULATED", False)
    monkeypatch.setattr(module, "_path", lambda: None)
    reason = load()
    assert reason.startswith("its library is not installed: pip install flatlora-kernels-cu13 (or -cu12)")
    assert reason.endswith("where nvcc is on PATH, FLATLORA_BUILD=cuda pip install .")
    monkeypatch.setattr(module, "_path", lambda: tmp_path / "libflatlora_cuda.so")
    (tmp_path / "libflatlora_cuda.so").write_text("not a library")
    assert load().startswith("its library cannot be loaded: ")
    monkeypatch.setattr(module, "_EMULATED", True)
    monkeypatch.setattr(module, "_path", lambda: tmp_path / "other.so")
    assert (
        load() == f"there is no emulator at {tmp_path / 'other.so'}; `make emulator` in a checkout builds it"
    )


def test_every_reason_is_a_sentence_that_helps() -> None:
    """What this machine lacks, in its own words."""
    for name in backends.names():
        reason = backends.unavailable(name)
        assert reason is None or len(reason.split()) >= 3, name
