"""The methods of the family on one fused op, behind one surface: ``loss = method.step(*closures)``.

    method = make("bi-lora", model, optimizer, rho=0.05)
    for batch in batches:
        loss = method.step(lambda: model(**batch).loss)

docs/methods.md compares what they cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import Method
from .bilora import BiLoRA
from .eflat import EFlatLoRA
from .halora import HaLoRA, on_chips
from .lorapro import LoRAPro
from .neftune import NEFTune
from .noisy_training import LPFSGD, RWP, FlatLoRA, FullNoise, LoRA
from .sam import ESAM, SAM, SLSAM, LoRASAM
from .zeroth_order import EGGROLL, EvolutionStrategy, MeZO

METHODS: dict[str, type[Method]] = {
    "lora": LoRA,
    "flat-lora": FlatLoRA,
    "bi-lora": BiLoRA,
    "sam": SAM,
    "esam": ESAM,
    "sl-sam": SLSAM,
    "lora-sam": LoRASAM,
    "eflat-lora": EFlatLoRA,
    "lora-pro": LoRAPro,
    "halora": HaLoRA,
    "rwp": RWP,
    "lpf-sgd": LPFSGD,
    "neftune": NEFTune,
    "full-noise": FullNoise,
    "mezo": MeZO,
    "es": EvolutionStrategy,
    "eggroll": EGGROLL,
}

# What papers call one of them elsewhere.
ALIASES = {"efm-lora": "eflat-lora"}


def make(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Method:
    """The method of that name, see `METHODS` and `ALIASES`.

    Args:
        options: keyword arguments of `Method` and of the class, see its docstring.
    """
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise ValueError(f"name: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name](model, optimizer, **options)


__all__ = [
    "EGGROLL",
    "ESAM",
    "LPFSGD",
    "METHODS",
    "RWP",
    "SAM",
    "SLSAM",
    "BiLoRA",
    "EFlatLoRA",
    "EvolutionStrategy",
    "FlatLoRA",
    "FullNoise",
    "HaLoRA",
    "LoRA",
    "LoRAPro",
    "LoRASAM",
    "MeZO",
    "Method",
    "NEFTune",
    "make",
    "on_chips",
]
