"""bitsandbytes: `Linear4bit` (NF4, FP4) and `Linear8bitLt`, and their weights."""

from __future__ import annotations

from typing import Any

import torch

from ..quantized import Packing, Parts, QuantizedWeight, readers


def read(source: Any) -> QuantizedWeight | None:
    name = type(source).__name__
    if name in ("Linear4bit", "Params4bit", "LinearNF4", "LinearFP4"):
        return _four_bits(getattr(source, "weight", source), source)
    return None


readers[read] = ("bitsandbytes Linear4bit (nf4, fp4)",)


def _four_bits(weight: Any, source: Any) -> QuantizedWeight:
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = getattr(source, "quant_state", None)
    if state is None:
        raise ValueError(
            "quant_state: expected a QuantState, got None; move the layer to its device, which quantises it"
        )
    N, K = state.shape
    packing = Packing(
        state.quant_type, N, K, state.dtype, state.dtype, 4, width=K, high_first=True, block=state.blocksize
    )  # fmt: skip
    codes = weight.data.view(torch.uint8).reshape(-1)
    absmax = state.absmax.reshape(-1)
    if not state.nested:
        return QuantizedWeight(packing, Parts(codes, state.code, absmax))
    nested = state.state2
    packing = packing._replace(nested_block=nested.blocksize)
    return QuantizedWeight(
        packing, Parts(codes, state.code, absmax, nested.code, nested.absmax, state.offset)
    )
