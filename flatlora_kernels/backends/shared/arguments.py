"""Arguments of the compiled libraries: structs of 8-byte fields, in the order of csrc/common/args.h and, for `GPU`, of
csrc/cuda/kernels.h.

They hold addresses: the tensors must outlive the call. `draw` None: nothing is drawn.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from ...core.quantized import NUMBERS, QuantizedWeight
from ...core.records import Draw, Product, Weight
from .workspace import workspace_limit

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}
_NOISE = {"gaussian": 1, "rademacher": 2, "near_gaussian": 3, "hadamard": 4}

_NOISE_FIELDS = "qPqPqqqqqqq"
_WEIGHT_FIELDS = "PqqP"
LINEAR = struct.Struct(f"=2q4qPqq{_WEIGHT_FIELDS}PPqPqqqPqqPdqq{_NOISE_FIELDS}".replace("P", "Q"))
ROW_NORMS = struct.Struct(f"=4q{_WEIGHT_FIELDS}PqqqPqqqdP".replace("P", "Q"))
PERTURB = struct.Struct(f"=3q{_WEIGHT_FIELDS}Pqq{_NOISE_FIELDS}".replace("P", "Q"))
PACKED = struct.Struct("=P6qqPPqPPqP4qPqqq6Pqqd".replace("P", "Q"))
TRANSFORM = struct.Struct(f"=5qPqqPq{_NOISE_FIELDS}".replace("P", "Q"))
GPU = struct.Struct("=qQQ7q")
_NO_LORA, _NO_BIAS = (0,) * 7, (0,) * 3
_NO_NOISE = (0,) * 5 + (1,) + (0,) * 5


def _noise(draw: Draw | None) -> tuple[int, ...]:
    if draw is None:
        return _NO_NOISE
    scale, seed, stream, noise, *rest = draw
    return _NOISE[noise], scale.data_ptr(), scale.stride(0), seed.data_ptr(), stream, *rest


def _weight(weight: Weight | None) -> tuple[int, ...]:
    """WeightArgs."""
    if weight is None:
        return 0, 0, 0, 0
    if isinstance(weight, QuantizedWeight):
        return 0, 0, 0, ctypes.addressof(_packed(weight))
    return weight.data_ptr(), *weight.stride(), 0


def _packed(weight: QuantizedWeight) -> Any:
    """PackedArgs in memory that lives as long as `weight`."""
    if weight._packed is None:
        p, t = weight.packing, weight.parts
        address = [0 if tensor is None else tensor.data_ptr() for tensor in t]
        codes, table, scale, scale_table, nested, offset, zero, *places = address
        fields = PACKED.pack(
            codes, t.codes.numel(), p.bits, NUMBERS.index(p.number), p.row, p.col, p.width, p.high_first, table,
            scale, _DTYPE[t.scale.dtype], scale_table, nested, p.nested_block, offset,
            p.block, p.block_rows, p.block_cols, p.scale_stride,
            zero, 0 if t.zero is None else _DTYPE[t.zero.dtype], p.zero_bits, p.zero_plus,
            *places, _DTYPE[p.difference], _DTYPE[p.dtype], p.post,
        )  # fmt: skip
        weight.remember(ctypes.create_string_buffer(fields, PACKED.size))
    return weight._packed


def linear(p: Product, draw: Draw | None, noise_accum: str, y: Tensor, lora_A: Tensor | None = None) -> bytes:
    """LinearArgs; with `lora_A`, whose columns are contiguous, p.u is made."""
    a, weight, input_grad, u, lora, bias, scaling, _ = p
    rank, lora_fields, bias_fields = 0, _NO_LORA, _NO_BIAS
    if u is not None:
        rank = u.shape[1]
        factor = (0, 0) if lora_A is None else (lora_A.data_ptr(), lora_A.stride(0))
        lora_fields = (u.data_ptr(), *factor, lora.data_ptr(), _DTYPE[lora.dtype], *lora.stride())
    if bias is not None:
        bias_fields = (bias.data_ptr(), _DTYPE[bias.dtype], bias.stride(0))
    return LINEAR.pack(
        input_grad, _DTYPE[a.dtype], a.shape[0], *weight.shape, rank, a.data_ptr(),
        *a.stride(), *_weight(weight), *lora_fields, *bias_fields, y.data_ptr(), scaling,
        noise_accum == "split", workspace_limit(weight), *_noise(draw),
    )  # fmt: skip


def row_norms(
    weight: Weight, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, out: Tensor
) -> bytes:
    """RowNormsArgs."""
    A_fields: tuple[int, ...] = (0, 0, 0, 0)
    B_fields = A_fields
    rank = 0
    if lora_A is not None:
        rank = lora_A.shape[0]
        A_fields = (lora_A.data_ptr(), _DTYPE[lora_A.dtype], *lora_A.stride())
        B_fields = (lora_B.data_ptr(), _DTYPE[lora_B.dtype], *lora_B.stride())
    return ROW_NORMS.pack(
        _DTYPE[weight.dtype], *weight.shape, rank, *_weight(weight), *A_fields, *B_fields,
        scaling, out.data_ptr(),
    )  # fmt: skip


def perturb(weight: Weight | None, draw: Draw | None, out: Tensor) -> bytes:
    """PerturbArgs."""
    return PERTURB.pack(
        _DTYPE[out.dtype], *out.shape, *_weight(weight), out.data_ptr(), *out.stride(), *_noise(draw)
    )


def transform(a: Tensor, draw: Draw, input_grad: bool, out: Tensor, add: bool) -> bytes:
    """TransformArgs."""
    N = draw.noise_scale.shape[0]
    K = out.shape[1] if input_grad else a.shape[1]
    return TRANSFORM.pack(
        input_grad,
        _DTYPE[a.dtype],
        a.shape[0],
        N,
        K,
        a.data_ptr(),
        *a.stride(),
        out.data_ptr(),
        add,
        *_noise(draw),
    )
