"""compressed-tensors: linear layers that it has compressed, before the model's first forward pass decompresses them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..quantized import Packing, Parts, QuantizedWeight, number_table, readers
from .shared import SCALE_TYPES, class_of, described, e2m1_table, expect, flat, flat_bytes, places


def read(source: Any) -> QuantizedWeight | None:
    scheme = getattr(source, "quantization_scheme", None)
    if class_of(scheme, "compressed_tensors") != "QuantizationScheme" or scheme.weights is None:
        return None
    args, weight = scheme.weights, getattr(source, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() > 1:
        return None  # not compressed, or no longer
    expect(
        "weight_g_idx", not hasattr(source, "weight_g_idx"), "groups of neighbours", "an order of activations"
    )
    if hasattr(source, "weight_packed"):
        if args.type == "float":
            expect("num_bits", args.num_bits == 4, "4, where numbers are packed floats", args.num_bits)
            return _fp4(source, args)
        return _integers(source, args)
    packed = isinstance(weight, Tensor) and weight.dtype in (torch.float8_e4m3fn, torch.int8)
    expect("weight", packed, "float8_e4m3fn or int8, or weight_packed", described(weight))
    return _plain(source, args)


readers[read] = ("compressed-tensors float-quantized, int-quantized, pack-quantized, mxfp8, mxfp4, nvfp4",)


def _blocks(source: Any, args: Any) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    N, K = source.out_features, source.in_features
    expect("weight_scale", hasattr(source, "weight_scale"), "a tensor", None)
    if args.strategy == "tensor":
        return max(N, 1), max(K, 1)
    if args.strategy == "channel":
        return 1, max(K, 1)
    if args.strategy == "block":
        rows, cols = args.block_structure
        return rows, cols
    known = args.strategy in ("group", "tensor_group")
    expect(
        "quantization_scheme.weights.strategy",
        known,
        "tensor, channel, group, tensor_group or block",
        args.strategy,
    )
    expect("group_size", K % args.group_size == 0, f"a divisor of {K}", args.group_size)
    return 1, args.group_size


def _plain(source: Any, args: Any) -> QuantizedWeight:
    """fp8 or int8, a byte each."""
    N, K = source.out_features, source.in_features
    number = "int8" if source.weight.dtype == torch.int8 else "e4m3"
    codes, width = _rows(source.weight.detach(), N, K)
    rows, cols = _blocks(source, args)
    across = -(-K // cols)
    count = -(-N // rows) * across
    scale = source.weight_scale
    scale_table = None
    dtype = scale.dtype
    if scale.dtype == torch.uint8:  # mxfp8
        scale, scale_table, dtype = (
            flat("weight_scale", scale, (torch.uint8,), count),
            _powers(codes.device),
            torch.bfloat16,
        )
    else:
        scale = flat("weight_scale", scale, SCALE_TYPES, count)
    zero = getattr(source, "weight_zero_point", None)
    if zero is not None:
        zero = flat("weight_zero_point", zero, (source.weight.dtype, *SCALE_TYPES), count).float()
    packing = Packing(
        "mxfp8" if scale_table is not None else "int8" if number == "int8" else "fp8",
        N, K, dtype, dtype, 8, number, width=width, block_rows=rows, block_cols=cols, scale_stride=across,
        difference=dtype,
    )  # fmt: skip
    return QuantizedWeight(
        packing, Parts(codes, number_table(number, 8, codes.device), scale, scale_table, zero=zero)
    )


def _rows(weight: Tensor, N: int, K: int) -> tuple[Tensor, int]:
    """Bytes, and how many a row has: of blocks that were filled up, a weight is a part."""
    width = max(weight.stride(0), K) if weight.dim() == 2 else K
    there = weight.untyped_storage().nbytes() - weight.storage_offset()
    holds = tuple(weight.shape) == (N, K) and weight.stride() in ((width, 1), (K, 1)) and N * width <= there
    expect("weight", holds, f"shape {(N, K)} in rows", f"{described(weight)}, strides {weight.stride()}")
    return weight.as_strided((N * width,), (1,)).view(torch.uint8), width


def _integers(source: Any, args: Any) -> QuantizedWeight:
    """Codes of a row one after the other in words of 32 bits, each 2^(bits - 1) more than its value."""
    N, K, bits = source.out_features, source.in_features, args.num_bits
    expect("num_bits", bits in (1, 2, 4, 8), "1, 2, 4 or 8 (codes of others cross bytes)", bits)
    words = -(-K * bits // 32)
    codes = flat_bytes("weight_packed", source.weight_packed, (torch.int32,), N * words)
    rows, cols = _blocks(source, args)
    across = -(-K // cols)
    scale = flat("weight_scale", source.weight_scale, SCALE_TYPES, -(-N // rows) * across)
    dtype = scale.dtype
    packing = Packing(f"int{bits}", N, K, dtype, dtype, bits, difference=dtype)
    if args.symmetric:
        packing = packing._replace(
            width=words * 32 // bits, block_rows=rows, block_cols=cols, scale_stride=across
        )
        return QuantizedWeight(packing, Parts(codes, _signed(bits, codes.device), scale))
    expect("quantization_scheme.weights.strategy", rows == 1, "channel or group", args.strategy)
    # Words of columns; what is added to a code is added to its zero.
    zero_words = -(-N * bits // 32)
    zero = flat_bytes(
        "weight_zero_point", getattr(source, "weight_zero_point", None), (torch.int32,), zero_words * across
    )
    n, k = places(N, K, codes.device)
    per_word = 32 // bits
    parts = Parts(
        codes, number_table("uint", bits, codes.device), scale, zero=zero,
        row_bits=n * (32 * words), col_bits=k * bits, row_scales=n * across, col_scales=k // cols,
        row_zeros=n // per_word * (32 * across) + n % per_word * bits, col_zeros=k // cols * 32,
    )  # fmt: skip
    return QuantizedWeight(packing._replace(number="uint", zero_bits=bits), parts)


def _fp4(source: Any, args: Any) -> QuantizedWeight:
    """NVFP4 and MXFP4."""
    N, K = source.out_features, source.in_features
    expect("quantization_scheme.weights.symmetric", args.symmetric, "True", args.symmetric)
    rows, cols = _blocks(source, args)
    expect("quantization_scheme.weights.strategy", rows == 1, "group or tensor_group", args.strategy)
    codes = flat_bytes("weight_packed", source.weight_packed, (torch.uint8,), N * K // 2)
    # Its own dequantisation gives bfloat16, whatever the model's type.
    packing = Packing("nvfp4", N, K, torch.bfloat16, torch.bfloat16, 4, width=K, block=cols)
    scale, count = source.weight_scale, N * (K // cols)
    if scale.dtype == torch.uint8:
        scale, table = flat("weight_scale", scale, (torch.uint8,), count), _powers(codes.device)
        packing = packing._replace(format="mxfp4")
    else:
        scale = flat_bytes("weight_scale", scale, (torch.float8_e4m3fn,), count)
        table = number_table("e4m3", 8, codes.device)
    whole = getattr(source, "weight_global_scale", None)
    if whole is not None:
        # A divisor, and a quotient is no product: divided here, 256 numbers.
        table = table / flat("weight_global_scale", whole, (torch.float32,), 1)
    return QuantizedWeight(packing, Parts(codes, e2m1_table(codes.device), scale, table))


@functools.cache
def _signed(bits: int, device: torch.device) -> Tensor:
    return torch.arange(-(1 << bits - 1), 1 << bits - 1, device=device).float()


@functools.cache
def _powers(device: torch.device) -> Tensor:
    """2^(byte - 127); that of 255 is infinity, and not e8m0's NaN."""
    return torch.pow(2.0, (torch.arange(256, device=device) - 127).bfloat16()).float()
