"""transformers: the linear layers of fp8 checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from ..quantized import Packing, Parts, QuantizedWeight, number_table, readers
from .shared import SCALE_TYPES, class_of, flat, flat_bytes, matrix

_NAMES = {
    "FP8Linear": "weight_scale_inv",
    "FbgemmFp8Linear": "weight_scale",
    "CompressedTensorsFP8Linear": "weight_scale",
}
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


def read(source: Any) -> QuantizedWeight | None:
    field = _NAMES.get(class_of(source, "transformers"))
    if field is None:
        return None
    N, K = matrix("weight.shape", source.weight.shape)
    codes = flat_bytes("weight", source.weight, (torch.float8_e4m3fn,))
    scale = getattr(source, field)
    rows, cols = N, K
    if field == "weight_scale_inv":
        if source.block_size is not None:
            rows, cols = matrix("block_size", source.block_size)
    elif scale.numel() != 1:
        rows = 1
    across = -(-K // cols) if K else 0
    count = -(-N // rows) * across if N else 0
    exponents = scale.dtype in _EXPONENTS
    types = _EXPONENTS if exponents else SCALE_TYPES
    values = (flat_bytes if exponents else flat)(field, scale, types, count)
    # Rounded once, when it is cast: as when the checkpoint is loaded with dequantize=True, in float32.
    packing = Packing(
        "fp8", N, K, torch.float32, torch.float32, 8, "e4m3", width=K, block_rows=max(rows, 1), block_cols=max(cols, 1),
        scale_stride=across,
    )  # fmt: skip
    table = number_table("e4m3", 8, codes.device)
    scale_table = number_table("e8m0", 8, codes.device) if exponents else None
    return QuantizedWeight(packing, Parts(codes, table, values, scale_table))


readers[read] = ("transformers FP8Linear", "transformers FbgemmFp8Linear, CompressedTensorsFP8Linear")
