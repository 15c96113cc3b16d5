"""bitsandbytes: `Linear4bit` (NF4, FP4), `Linear8bitLt`, and their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantized import Packing, Parts, QuantizedWeight, number_table, readers
from .shared import (
    SCALE_TYPES,
    class_of,
    described,
    expect,
    flat,
    flat_bytes,
    matrix,
    own_weight,
    places,
)

_RECIPROCAL = 7.874015718698502e-3  # 1 / 127, as its int8_vectorwise_dequant writes it


def read(source: Any) -> QuantizedWeight | None:
    name = class_of(source, "bitsandbytes")
    if name in ("Linear4bit", "LinearNF4", "LinearFP4", "Params4bit"):
        return _four_bits(own_weight(source), source)
    if name in ("Linear8bitLt", "Int8Params"):
        return _eight_bits(own_weight(source), getattr(source, "state", None))
    return None


readers[read] = ("bitsandbytes Linear4bit (nf4, fp4)", "bitsandbytes Linear8bitLt")


def _four_bits(weight: Any, source: Any) -> QuantizedWeight:
    state = getattr(weight, "quant_state", None) or getattr(source, "quant_state", None)
    expect(
        "quant_state", state is not None, "a QuantState; moving the layer to its device quantises it", None
    )
    N, K = matrix("quant_state.shape", state.shape)
    kind, block, dtype = state.quant_type, state.blocksize, state.dtype
    expect("quant_state.quant_type", kind in ("nf4", "fp4"), "nf4 or fp4", kind)
    expect("quant_state.blocksize", isinstance(block, int) and block > 0, "a positive number", block)
    expect("quant_state.dtype", dtype in SCALE_TYPES, "float32, bfloat16 or float16", dtype)
    table = flat("quant_state.code", state.code, (torch.float32,), 16)
    codes = flat_bytes("weight", weight, (weight.dtype,))
    expect("weight", codes.numel() == (N * K + 1) // 2, f"{(N * K + 1) // 2} bytes", codes.numel())
    packing = Packing(kind, N, K, dtype, dtype, 4, width=K, high_first=True, block=block)
    if getattr(state, "packing_format_for_cpu", False):
        return _of_cpu(packing, codes, table, state.absmax)
    row = weight.dim() == 2 and weight.shape[0] == 1 and weight.shape[1] > 1
    expect("weight", not row, "a column of codes (a row of them is a transposed weight)", described(weight))
    blocks = -(-N * K // block)
    if not state.nested:
        return QuantizedWeight(
            packing, Parts(codes, table, flat("quant_state.absmax", state.absmax, (torch.float32,), blocks))
        )
    absmax = flat("quant_state.absmax", state.absmax, (torch.uint8,), blocks)
    nested = getattr(state, "state2", None)
    expect("quant_state.state2", nested is not None, "the scales of a nested absmax", None)
    expect(
        "quant_state.state2.dtype",
        nested.dtype == torch.float32,
        "float32 (others round absmax)",
        nested.dtype,
    )
    count = -(-blocks // nested.blocksize)
    parts = Parts(
        codes, table, absmax,
        flat("quant_state.state2.code", nested.code, (torch.float32,), 256),
        flat("quant_state.state2.absmax", nested.absmax, (torch.float32,), count),
        flat("quant_state.offset", state.offset, (torch.float32,), 1).view(()),
    )  # fmt: skip
    return QuantizedWeight(packing._replace(nested_block=nested.blocksize), parts)


def _of_cpu(packing: Packing, codes: Tensor, table: Tensor, absmax: Any) -> QuantizedWeight:
    """Repacked in place by `_convert_weight_packed_for_cpu`: groups of 32 rows, whose column pairs are 32 bytes with
    rows 0-15 in their low halves and 16-31 in the high ones; absmax (blocks, rows).
    """
    _, N, K, *_ = packing
    block = packing.block
    expect("quant_state.shape", N % 32 == 0 and K % block == 0, f"rows by 32, columns by {block}", (N, K))
    scale = flat("quant_state.absmax", absmax, (torch.bfloat16,), N * K // block)
    n, k = places(N, K, codes.device)
    parts = Parts(
        codes, table, scale,
        row_bits=n // 32 * (K * 128) + n % 16 * 16 + n % 32 // 16 * 4, col_bits=k // 2 * 256 + k % 2 * 8,
        row_scales=n, col_scales=k // block * N,
    )  # fmt: skip
    return QuantizedWeight(packing._replace(width=0, high_first=False, block=0), parts)


def _eight_bits(weight: Any, state: Any) -> QuantizedWeight:
    N, K = matrix("weight.shape", weight.shape)
    codes = flat_bytes("weight", weight, (torch.int8,))
    # The first forward pass moves SCB from the weight to the layer's state.
    scale = weight.SCB if weight.SCB is not None else getattr(state, "SCB", None)
    scale = flat(
        "SCB",
        scale,
        (torch.float32,),
        N,
        note=" (after a forward pass it is the layer's, no longer the weight's)",
    )
    packing = Packing(
        "int8", N, K, torch.float32, torch.float32, 8, "int8", width=K, block_cols=max(K, 1), post=_RECIPROCAL
    )  # fmt: skip
    return QuantizedWeight(packing, Parts(codes, number_table("int8", 8, codes.device), scale))
