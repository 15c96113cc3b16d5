"""What the tests run on: every backend of the registry on every device it can use here."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels import backends

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # backend `triton` takes tensors on the CPU, slowly
EMULATED = bool(os.environ.get("FLATLORA_EMULATE"))  # so does backend `cuda`

# Backends named here may not be missing: their tests fail where others are skipped.
REQUIRED = tuple(filter(None, os.environ.get("FLATLORA_REQUIRE_BACKENDS", "").replace(" ", "").split(",")))

# What compiled tests read: torch 2.10 traces no property of a record.
FUSES = {name: backends.get(name).FUSES for name in backends.names()}


class Target(NamedTuple):
    """A backend on a device."""

    backend: str
    device: str

    @property
    def module(self) -> Any:
        return backends.get(self.backend)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(d for d in DTYPES if self.module.DTYPES is None or d in self.module.DTYPES)

    @property
    def interpreted(self) -> bool:
        """Runs in Triton's interpreter."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def emulated(self) -> bool:
        """Runs in the emulator of CUDA, csrc/emulator."""
        return self.backend == "cuda" and self.device == "cpu"

    def plans(self, noise: str) -> list[dict[str, str]]:
        """Keyword arguments of every strategy and noise_accum that the backend implements for this kind of noise."""
        accums = self.module.NOISE_ACCUMS if noise in self.module.FUSES else ()
        found = [{"strategy": "fused", "noise_accum": a} for a in accums]
        found += [{"strategy": "panel", "noise_accum": "folded"}]
        return found + [{"strategy": "transform", "noise_accum": "folded"}] * (noise == "hadamard")

    @property
    def gaussian_atol(self) -> float:
        """How far gaussian `z` may lie from its formula (docs/internals/noise.md, "How equal is equal")."""
        if self.interpreted or self.emulated:
            return 4e-6
        return 2e-6 if self.backend in ("reference", "cpu") else 1e-4

    def missing(self) -> str | None:
        if reason := backends.unavailable(self.backend):
            return reason
        return None if self.device in devices() else f"needs a {self.device} device"

    def linear(self, *args: Any, strategy: str | None = "fused", **kwargs: Any) -> Tensor:
        """The op on this backend: its own kernels for this kind of noise, unless another strategy is asked for."""
        if strategy == "fused" and kwargs.get("noise", "gaussian") not in FUSES[self.backend]:
            strategy = "transform"
        return fk.fused_flat_lora_linear(*args, backend=self.backend, strategy=strategy, **kwargs)

    def noise(self, noise_scale: Tensor | int, num_cols: int, **kwargs: Any) -> Tensor:
        """`materialize_noise` of this backend; an int asks for that many rows of standard noise."""
        if isinstance(noise_scale, int):
            noise_scale = torch.ones(noise_scale, device=self.device)
        return fk.materialize_noise(noise_scale, num_cols, backend=self.backend, **kwargs)


@functools.cache
def devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def all_targets() -> list[Target]:
    found = []
    for name in dict.fromkeys((*reversed(backends.names()), *REQUIRED)):
        if name not in backends.names():
            raise ValueError(f"FLATLORA_REQUIRE_BACKENDS: expected some of {backends.names()}, got {name!r}")
        wanted = backends.get(name).DEVICE_TYPES or devices()
        usable = [d for d in wanted if d in devices()] or list(wanted[:1])
        found += [Target(name, device) for device in usable]
    return found


def ready(target: Target) -> Target:
    """`target`, or a skip where it cannot run here: a failure, where it is required."""
    if reason := target.missing():
        if target.backend in REQUIRED:
            pytest.fail(f"backend {target.backend!r} is required and cannot run: {reason}")
        pytest.skip(f"backend {target.backend!r} on {target.device}: {reason}")
    return target


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Normal values that depend on the shape and `seed` alone."""
    return torch.randn(*shape, generator=generator(seed)).to(dtype).to(device)
