"""Every check of arguments, and every message. Shapes, types and Python numbers only: no tensor is read back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.noise import KINDS
from ..core.quantized import QuantizedWeight
from ..core.records import Weight
from .sharded import is_sharded

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_UINT32 = 2**32


def _type_error(name: str, got: object, expected: str) -> TypeError:
    return TypeError(f"{name}: expected {expected}, got {got}")


def _value_error(name: str, got: object, expected: str) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got}")


def tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise _type_error(name, type(value).__name__, "a tensor")


def _shape(name: str, value: Tensor, expected: tuple[int, ...], letters: str) -> None:
    if value.shape != expected:
        raise _value_error(name, f"shape {tuple(value.shape)}", f"shape {letters} = {expected}")


def _device(name: str, value: Weight, like_name: str, like: Weight) -> None:
    if value.device != like.device:
        raise _value_error(name, value.device, f"the device of {like_name}, {like.device}")


def weight(value: Any) -> None:
    if isinstance(value, QuantizedWeight):
        return
    if not isinstance(value, Tensor):
        raise _type_error("weight", type(value).__name__, "a tensor or a QuantizedWeight")
    if value.dim() != 2:
        raise _value_error("weight", f"shape {tuple(value.shape)}", "shape (out_features, in_features)")
    if value.dtype not in FLOAT_DTYPES:
        raise _type_error("weight", value.dtype, "float16, bfloat16, float32 or float64")


def whole(name: str, value: Any) -> None:
    """That a tensor is no DTensor, for functions that take none."""
    if is_sharded(value):
        raise _type_error(
            name, "a DTensor", "a tensor; pass its to_local(), with row_offset, col_offset and layer_shape"
        )


def adapter(lora_A: Any, lora_B: Any, W: Weight) -> None:
    """`lora_A` (r, K) and `lora_B` (N, r), both or none, in the type of `W` or float32."""
    if lora_A is None and lora_B is None:
        return
    if lora_A is None or lora_B is None:
        missing, present = ("lora_A", "lora_B") if lora_A is None else ("lora_B", "lora_A")
        raise _value_error(missing, "None", f"a tensor, because {present} is given (pass both or none)")
    for name, value in (("lora_A", lora_A), ("lora_B", lora_B)):
        tensor(name, value)
        if value.dim() != 2:
            raise _value_error(name, f"shape {tuple(value.shape)}", "2 dimensions")
        parameter_dtype(name, value.dtype, W)
        _device(name, value, "weight", W)
    N, K = W.shape
    rank = lora_A.shape[0]
    _shape("lora_A", lora_A, (rank, K), "(r, in_features)")
    _shape("lora_B", lora_B, (N, rank), "(out_features, r)")


def parameter_dtype(name: str, dtype: torch.dtype, W: Weight) -> None:
    """That adapters and biases of this type may stand beside the weight."""
    if dtype != W.dtype and not (dtype == torch.float32 and W.dtype.itemsize == 2):
        raise _type_error(name, dtype, f"{W.dtype}, the type of weight, or float32 beside a 16-bit weight")


def scaling(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _type_error("scaling", type(value).__name__, "a float")


def linear(x: Any, W: Any, lora_A: Any, lora_B: Any, bias: Any, lora_x: Any, scale: Any) -> None:
    """The tensors of `fused_flat_lora_linear` that have nothing to do with noise."""
    tensor("x", x)
    if x.dtype not in FLOAT_DTYPES:
        raise _type_error("x", x.dtype, "float16, bfloat16, float32 or float64")
    weight(W)
    N, K = W.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise _value_error("x", f"shape {tuple(x.shape)}", f"shape (..., in_features) with in_features = {K}")
    if W.dtype != x.dtype:
        raise _type_error("weight", W.dtype, f"{x.dtype}, the type of x")
    _device("weight", W, "x", x)
    adapter(lora_A, lora_B, W)
    scaling(scale)
    if bias is not None:
        tensor("bias", bias)
        _shape("bias", bias, (N,), "(out_features,)")
        parameter_dtype("bias", bias.dtype, W)
        _device("bias", bias, "x", x)
    if lora_x is not None:
        tensor("lora_x", lora_x)
        if lora_A is None:
            raise _value_error("lora_x", "a tensor", "None, because lora_A and lora_B are not given")
        _shape("lora_x", lora_x, tuple(x.shape), "of x")
        if lora_x.dtype != x.dtype:
            raise _type_error("lora_x", lora_x.dtype, f"{x.dtype}, the type of x")
        _device("lora_x", lora_x, "x", x)


def grouped(W: Any, lora_A: Any, lora_B: Any) -> None:
    """That each expert has its own weight and adapter; what these are is checked of one expert."""
    if not isinstance(W, Tensor):
        raise _type_error("weight", type(W).__name__, "a tensor (num_experts, out_features, in_features)")
    if W.dim() != 3 or not W.shape[0]:
        expected = "shape (num_experts, out_features, in_features) with num_experts >= 1"
        raise _value_error("weight", f"shape {tuple(W.shape)}", expected)
    for name, given in (("lora_A", lora_A), ("lora_B", lora_B)):
        if isinstance(given, Tensor) and (given.dim() != 3 or given.shape[0] != W.shape[0]):
            expected = f"3 dimensions, of which the first is num_experts = {W.shape[0]}"
            raise _value_error(name, f"shape {tuple(given.shape)}", expected)


def grouped_linear(x: Any, W: Any, lora_A: Any, lora_B: Any, bias: Any) -> None:
    grouped(W, lora_A, lora_B)
    tensor("x", x)
    if x.dim() != 2:
        raise _value_error("x", f"shape {tuple(x.shape)}", "shape (M, in_features)")
    if bias is not None:
        tensor("bias", bias)
        _shape("bias", bias, tuple(W.shape[:2]), "(num_experts, out_features)")


def offsets(value: Any, num_experts: int) -> None:
    """What offsets are; what is in them is `ends` to check, where they have been read."""
    if isinstance(value, Tensor):
        if value.dtype not in (torch.int32, torch.int64):
            raise _type_error("offsets", value.dtype, "torch.int32 or torch.int64")
        _shape("offsets", value, (num_experts,), "(num_experts,)")
    elif not isinstance(value, (list, tuple)) or not all(type(end) is int for end in value):
        raise _type_error("offsets", repr(value)[:80], "an int32 or int64 tensor, or a list or tuple of ints")
    elif len(value) != num_experts:
        raise _value_error("offsets", f"{len(value)} ints", f"one for each of {num_experts} experts")


def ends(value: Sequence[int], num_rows: int) -> None:
    """That offsets on the host part all rows."""
    before = 0
    for expert, end in enumerate(value):
        if end < before:
            raise _value_error("offsets", f"{end} for expert {expert} after {before}", "ends that never fall")
        before = end
    if before != num_rows:
        raise _value_error("offsets", f"{before} as the last end", f"the number of rows of x, {num_rows}")


def grouped_noise_scale(value: Any, shape: tuple[int, int], device: torch.device) -> None:
    tensor("noise_scale", value)
    if value.dtype != torch.float32:
        raise _type_error("noise_scale", value.dtype, "torch.float32")
    _shape("noise_scale", value, shape, "(num_experts, out_features)")
    _constant_scale(value, device)


def streams(first: Any, count: int) -> None:
    uint32("stream", first)
    if first + count > _UINT32:
        raise _value_error("stream", f"{first} for {count} experts", "stream + num_experts <= 2**32")


def uint32(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise _type_error(name, type(value).__name__, "an int")
    if not 0 <= value < _UINT32:
        raise _value_error(name, value, "0 <= value < 2**32")


def sigma(value: Any, W: Weight) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
            raise _value_error("sigma", f"{value.dtype} of shape {tuple(value.shape)}", "a real 0-d tensor")
        _device("sigma", value, "weight", W)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _type_error("sigma", type(value).__name__, "a float or a 0-d tensor")
    elif not 0 <= value < math.inf:  # also where torch.compile traces it as a symbol
        raise _value_error("sigma", value, "a finite float >= 0")


def noise_scale(value: Any, num_rows: int | None, device: torch.device | None) -> None:
    tensor("noise_scale", value)
    if value.dtype != torch.float32:
        raise _type_error("noise_scale", value.dtype, "torch.float32")
    if value.dim() != 1 or (num_rows is not None and value.shape[0] != num_rows):
        letters = "(out_features,)" + ("" if num_rows is None else f" = ({num_rows},)")
        raise _value_error("noise_scale", f"shape {tuple(value.shape)}", f"shape {letters}")
    _constant_scale(value, device)


def _constant_scale(value: Tensor, device: torch.device | None) -> None:
    if value.requires_grad:
        raise _value_error(
            "noise_scale",
            "a tensor that requires grad",
            "a constant; eps is not differentiated: pass .detach()",
        )
    if device is not None and value.device != device:
        raise _value_error("noise_scale", value.device, f"the device of weight, {device}")


def in_features(value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise _type_error("in_features", type(value).__name__, "an int")
    if value < 1:
        raise _value_error("in_features", value, "an int >= 1")


def noise_product(x: Any, scale: Any) -> None:
    """What tells the shape of the weight that `noise_product` has not got."""
    tensor("x", x)
    if x.dim() == 0:
        raise _value_error("x", "shape ()", "shape (..., in_features)")
    noise_scale(scale, None, None)
    _device("noise_scale", scale, "x", x)


def seed(value: Any, device: torch.device) -> None:
    if value is None:
        raise _value_error("seed", "None", "an int or a 0-d int64 tensor wherever noise is drawn")
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise _type_error("seed", value.dtype, "torch.int64 where it is a tensor")
        if value.dim() != 0:
            raise _value_error("seed", f"shape {tuple(value.shape)}", "a 0-d tensor")
        if value.device != device:
            raise _value_error("seed", value.device, f"the device of the weight and its noise, {device}")
    elif isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise _type_error("seed", type(value).__name__, "an int or a 0-d int64 tensor")


def draw(noise: Any, stream: Any, row_offset: Any, col_offset: Any, layer_shape: Any, N: int, K: int) -> None:
    """Which noise: its kind, its stream and where the tile sits; all indices are uint32."""
    if noise not in KINDS:
        raise _value_error("noise", repr(noise), " or ".join(map(repr, KINDS)))
    uint32("stream", stream)
    uint32("row_offset", row_offset)
    uint32("col_offset", col_offset)
    if col_offset % 8:
        raise _value_error("col_offset", col_offset, "a multiple of 8")
    for name, offset, size in (("row_offset", row_offset, N), ("col_offset", col_offset, K)):
        if offset + size > _UINT32:
            raise _value_error(name, f"{offset} with {size} after it", f"{name} + size <= 2**32")
    if layer_shape is None:
        return
    if not isinstance(layer_shape, (tuple, list)) or len(layer_shape) != 2:
        raise _type_error("layer_shape", repr(layer_shape), "None or (out_features, in_features)")
    for size, offset, own in zip(layer_shape, (row_offset, col_offset), (N, K), strict=True):
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise _type_error("layer_shape", repr(layer_shape), "None or two ints")
        if not offset + own <= size <= _UINT32:
            expected = f"at least ({row_offset + N}, {col_offset + K}), where this shard ends, at most 2**32"
            raise _value_error("layer_shape", tuple(layer_shape), expected)


def sample_range(samples: Any, sample_offset: Any, num_rows: int) -> None:
    uint32("samples", samples)
    uint32("sample_offset", sample_offset)
    if samples < 1 or num_rows % samples:
        raise _value_error("samples", samples, f"an int >= 1 that divides the {num_rows} rows of x")
    if sample_offset + samples > _UINT32:
        raise _value_error(
            "sample_offset", f"{sample_offset} with samples={samples}", "a sum of at most 2**32"
        )


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise _value_error(name, repr(value), "None, " + " or ".join(map(repr, allowed)))


def out(value: Any, W: Weight) -> None:
    tensor("out", value)
    _shape("out", value, tuple(W.shape), "of weight")
    if value.dtype != W.dtype:
        raise _type_error("out", value.dtype, f"{W.dtype}, the type of weight")
    _device("out", value, "weight", W)
    own = W.parts.codes if isinstance(W, QuantizedWeight) else W
    if value.numel() and value.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
        raise _value_error(
            "out", "a tensor that shares memory with weight", "memory of its own: weight is not written"
        )
