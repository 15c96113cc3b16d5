"""torch.utils.checkpoint recomputes the forward pass and must see the very same noise."""

from __future__ import annotations

import compare
import pytest
import torch
from compare import problem
from targets import Target
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("preserve_rng_state", [False, True])
def test_bit_identical_gradients(
    target: Target, dtype: torch.dtype, use_reentrant: bool, preserve_rng_state: bool
) -> None:
    p = problem(6, 40, 40, dtype, target.device, rank=4, bias=True)
    p.options.pop("noise_scale")
    p.options["sigma"] = 0.1
    seed = torch.tensor(77, device=target.device)
    p.options["seed"] = seed

    def block(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> Tensor:
        adapter = (weight, lora_A, lora_B, bias)
        hidden = torch.tanh(target.linear(x, *adapter, **p.options))
        return target.linear(hidden, *adapter, **{**p.options, "stream": 4})

    def run(recomputed: bool) -> dict[str, Tensor]:
        inputs = {k: t for k, t in compare.leaves(p).items() if t is not None}
        if recomputed:
            modes = {"use_reentrant": use_reentrant, "preserve_rng_state": preserve_rng_state}
            y = checkpoint(block, *inputs.values(), **modes)
        else:
            y = block(*inputs.values())
        torch.rand(3)  # the global generator moves on between forward and backward
        y.backward(p.grad_y)
        return {"y": y.detach(), **{k: t.grad for k, t in inputs.items()}}

    expected, got = run(False), run(True)
    for name, value in expected.items():
        assert value.abs().sum() > 0
        assert torch.equal(got[name], value), name
