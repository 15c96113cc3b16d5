"""`QuantizedWeight.of` of what no reader knows. What each reader knows is in the other files of this name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flatlora_kernels import QuantizedWeight
from flatlora_kernels.core.quantized import readers


def without_weight() -> nn.Module:
    layer = nn.Linear(4, 4)
    del layer.weight
    return layer


class Wrapper(nn.Module):
    """What adapters are: modules that show the weight of their base."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.base = weight

    @property
    def weight(self) -> Any:
        return self.base


class Params4bit(nn.Parameter):
    """A class of the same name, of no library."""


@pytest.mark.parametrize(
    ("source", "got"),
    [
        (nn.Linear(4, 4), "Linear with a weight of Parameter, torch.float32"),
        (nn.Conv1d(4, 4, 1), "Conv1d with a weight"),
        (without_weight(), "Linear"),
        (Wrapper(torch.zeros(4, 4)), "Wrapper with a weight of Tensor"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), "Tensor"),
        (Params4bit(torch.zeros(4, 4)), "Params4bit"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_unknown(source: Any, got: str) -> None:
    for read in readers:
        assert read(source) is None
    names = ["bitsandbytes", "transformers", "torchao", "compressed-tensors", "hqq", "gptqmodel"]
    with pytest.raises(TypeError, match="source: expected a weight in one of the formats") as error:
        QuantizedWeight.of(source)
    assert f"; got {got}" in str(error.value) and all(name in str(error.value) for name in names)


def test_of_itself() -> None:
    q = QuantizedWeight.quantize(torch.randn(4, 64), "nf4")
    assert QuantizedWeight.of(q) is q
