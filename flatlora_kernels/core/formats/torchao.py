"""torchao: tensors that lie in `nn.Linear.weight`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantized import Packing, Parts, QuantizedWeight, number_table, readers
from .shared import (
    SCALE_TYPES,
    class_of,
    e2m1_table,
    expect,
    flat,
    flat_bytes,
    matrix,
    own_weight,
    places,
    swizzled,
)

NUMBER = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


def read(source: Any) -> QuantizedWeight | None:
    weight = own_weight(source)
    reader = _READERS.get(class_of(weight, "torchao"))
    return None if reader is None else reader(weight)


def _float8(weight: Any) -> QuantizedWeight:
    N, K = matrix("weight.shape", weight.shape)
    codes = flat_bytes("qdata", weight.qdata, tuple(NUMBER))
    number = NUMBER[weight.qdata.dtype]
    scale = weight.scale
    rows, cols = (1, 1) if scale.numel() == 1 else matrix("scale.shape", scale.shape)
    expect(
        "scale.shape",
        N % max(rows, 1) == 0 and K % max(cols, 1) == 0,
        f"divisors of {N} and {K}",
        (rows, cols),
    )
    dtype = weight.dtype
    packing = Packing(
        "fp8", N, K, dtype, dtype, 8, number, width=K, block_rows=max(N // rows, 1), block_cols=max(K // cols, 1),
        scale_stride=cols,
    )  # fmt: skip
    return QuantizedWeight(
        packing, Parts(codes, number_table(number, 8, codes.device), flat("scale", scale, SCALE_TYPES))
    )


def _int8(weight: Any) -> QuantizedWeight:
    N, K = matrix("weight.shape", weight.shape)
    expect("act_pre_scale", weight.act_pre_scale is None, "None: it scales the input", "a tensor")
    codes = flat_bytes("qdata", weight.qdata, (torch.int8,))
    rows, cols = matrix("block_size", weight.block_size)
    expect(
        "block_size",
        rows > 0 and cols > 0 and N % rows == 0 and K % cols == 0,
        f"divisors of {N} and {K}",
        (rows, cols),
    )
    count = N // rows * (K // cols)
    zero = weight.zero_point
    if zero is not None:
        # Symmetric ones have them as well, all zero. Others are cast: a number to each scale.
        zero = flat("zero_point", zero, (torch.int8, *SCALE_TYPES), count)
        zero = zero.float() if bool(zero.any()) else None
    dtype = weight.dtype
    packing = Packing(
        "int8", N, K, dtype, dtype, 8, "int8", width=K, block_rows=rows, block_cols=cols, scale_stride=K // cols,
        difference=dtype if zero is not None else torch.float32,
    )  # fmt: skip
    scale = flat("scale", weight.scale, SCALE_TYPES, count)
    return QuantizedWeight(packing, Parts(codes, number_table("int8", 8, codes.device), scale, zero=zero))


def _blocks(
    packing: Packing, codes: Tensor, table: Tensor, weight: Any, scale_table: Tensor, nested: Tensor | None
) -> QuantizedWeight:
    """Blocks of a row, a scale of one byte each; the scales in rows, or swizzled."""
    _, N, K, *_ = packing
    block = packing.block
    expect("weight.shape", K % block == 0, f"columns by {block}", (N, K))
    count = K // block
    n, k = places(N, K, codes.device)
    tiled = -(-N // 128) * -(-count // 4) * 512
    is_swizzled = weight.is_swizzled_scales
    types = (weight.scale.dtype,)
    scale = flat_bytes("scale", weight.scale, types, tiled if is_swizzled else N * count)
    parts = Parts(codes, table, scale, scale_table, nested)
    if not is_swizzled:
        return QuantizedWeight(packing, parts)
    rows, cols = swizzled(n, k // block, count)
    parts = parts._replace(
        row_bits=n * (K * packing.bits), col_bits=k * packing.bits, row_scales=rows, col_scales=cols
    )
    return QuantizedWeight(packing._replace(width=0, block=0), parts)


def _mx(weight: Any) -> QuantizedWeight:
    N, K = matrix("weight.shape", weight.shape)
    kind, dtype = weight.elem_dtype, weight.orig_dtype
    four = kind == torch.float4_e2m1fn_x2
    expect("elem_dtype", four or kind in NUMBER, "float4_e2m1fn_x2, float8_e4m3fn or float8_e5m2", kind)
    codes = flat_bytes("qdata", weight.qdata, (torch.uint8,) if four else (kind,))
    expect("qdata", codes.numel() == N * K // (2 if four else 1), f"codes of {N} x {K} values", codes.numel())
    expect("scale.dtype", weight.scale.dtype == torch.float8_e8m0fnu, "float8_e8m0fnu", weight.scale.dtype)
    # Its product is one of numbers of `dtype`, in which some powers of two are 0 or infinite.
    scale_table = number_table("e8m0", 8, codes.device).to(dtype).float()
    number, table = ("table", e2m1_table(codes.device)) if four else (NUMBER[kind], None)
    if table is None:
        table = number_table(number, 8, codes.device)
    packing = Packing(
        "mxfp4" if four else "mxfp8", N, K, dtype, dtype, 4 if four else 8, number, width=K, block=weight.block_size
    )  # fmt: skip
    return _blocks(packing, codes, table, weight, scale_table, None)


def _nvfp4(weight: Any) -> QuantizedWeight:
    N, K = matrix("weight.shape", weight.shape)
    codes = flat_bytes("qdata", weight.qdata, (torch.uint8,))
    expect("qdata", codes.numel() == N * K // 2, f"codes of {N} x {K} values", codes.numel())
    expect("scale.dtype", weight.scale.dtype == torch.float8_e4m3fn, "float8_e4m3fn", weight.scale.dtype)
    dtype = weight.orig_dtype
    packing = Packing("nvfp4", N, K, dtype, dtype, 4, width=K, block=weight.block_size)
    nested = weight.per_tensor_scale
    if nested is not None:
        nested = flat("per_tensor_scale", nested, (torch.float32,), 1)
        packing = packing._replace(nested_block=1 << 62)
    table = number_table("e4m3", 8, codes.device)
    return _blocks(packing, codes, e2m1_table(codes.device), weight, table, nested)


_READERS = {"Float8Tensor": _float8, "Int8Tensor": _int8, "MXTensor": _mx, "NVFP4Tensor": _nvfp4}
readers[read] = (
    "torchao Float8Tensor", "torchao Int8Tensor", "torchao MXTensor (fp4, fp8)", "torchao NVFP4Tensor",
)  # fmt: skip
