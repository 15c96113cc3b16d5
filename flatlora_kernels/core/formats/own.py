"""`QuantizedWeight.quantize`: weights packed here, for want of a library that does it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantized import Packing, Parts, QuantizedWeight, makers, number_table

# Quantiles of the normal distribution: Dettmers et al., QLoRA, NeurIPS 2023, arXiv 2305.14314, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of mantissa: OCP Microscaling Formats 1.0.
E2M1 = tuple(s * v for s in (1.0, -1.0) for v in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


def _blocks(w: Tensor, block: int) -> Tensor:
    """(blocks, block) of the values in rows, the last one filled up with zeros."""
    flat = w.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """Index of the value of `table` nearest to each of x."""
    order = table.argsort()
    middles = (table[order][1:] + table[order][:-1]) / 2
    return order[torch.bucketize(x, middles)].to(torch.uint8)


def _nibbles(codes: Tensor, count: int, high_first: bool) -> Tensor:
    codes = codes.reshape(-1)[:count]
    codes = torch.nn.functional.pad(codes, (0, count % 2)).view(-1, 2)
    first, second = codes[:, 0], codes[:, 1]
    return first << 4 | second if high_first else second << 4 | first


def _nf4(w: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    table = torch.tensor(NF4, device=w.device)
    blocks = _blocks(w, 64)
    absmax = blocks.abs().amax(1)
    codes = _nearest(blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None], table)
    N, K = w.shape
    packing = Packing("nf4", N, K, dtype, dtype, 4, width=K, high_first=True, block=64)
    return QuantizedWeight(packing, Parts(_nibbles(codes, N * K, True), table, absmax))


def _int8(w: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    N, K = w.shape
    scale = w.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127 if K else w.new_ones(N)
    codes = (w / scale[:, None]).round().to(torch.int8).view(torch.uint8).reshape(-1)
    packing = Packing("int8", N, K, dtype, dtype, 8, "int8", width=K, block_cols=max(K, 1))
    return QuantizedWeight(packing, Parts(codes, number_table("int8", 8, w.device), scale))


def _fp8(w: Tensor, dtype: torch.dtype, rows: int = 1, cols: int = 0) -> QuantizedWeight:
    N, K = w.shape
    cols = cols or max(K, 1)
    padded = torch.nn.functional.pad(w, (0, -K % cols, 0, -N % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols)
    scale = blocks.abs().amax((1, 3)).clamp_min(torch.finfo(torch.float32).tiny) / 448
    codes = (blocks / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes = codes.view(torch.uint8).reshape(padded.shape)[:N, :K].reshape(-1).contiguous()
    packing = Packing(
        "fp8", N, K, dtype, dtype, 8, "e4m3", width=K, block_rows=rows, block_cols=cols, scale_stride=scale.shape[1]
    )  # fmt: skip
    return QuantizedWeight(packing, Parts(codes, number_table("e4m3", 8, w.device), scale.reshape(-1)))


def _mxfp4(w: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    table = torch.tensor(E2M1, device=w.device)
    blocks = _blocks(w, 32)
    largest = blocks.abs().amax(1)
    exponent = (largest.clamp_min(2.0**-120).log2().floor() - 2).clamp(-127, 127)
    codes = _nearest((blocks / exponent.exp2()[:, None]).clamp(-6, 6), table)
    N, K = w.shape
    packing = Packing("mxfp4", N, K, dtype, dtype, 4, width=K, block=32)
    scale = (exponent + 127).to(torch.uint8)
    return QuantizedWeight(
        packing, Parts(_nibbles(codes, N * K, False), table, scale, number_table("e8m0", 8, w.device))
    )


def _nvfp4(w: Tensor, dtype: torch.dtype) -> QuantizedWeight:
    table = torch.tensor(E2M1, device=w.device)
    blocks = _blocks(w, 16)
    largest = blocks.abs().amax(1)
    whole = (w.abs().amax() if w.numel() else w.new_ones(())).clamp_min(1e-30) / (448 * 6)
    scale = (largest / 6 / whole).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
    codes = _nearest((blocks / (scale.float() * whole)[:, None]).clamp(-6, 6), table)
    N, K = w.shape
    packing = Packing("nvfp4", N, K, dtype, dtype, 4, width=K, block=16, nested_block=1 << 62)
    parts = Parts(
        _nibbles(codes, N * K, False), table, scale.view(torch.uint8), number_table("e4m3", 8, w.device),
        whole.reshape(1),
    )  # fmt: skip
    return QuantizedWeight(packing, parts)


makers["nf4"] = _nf4
makers["int8"] = _int8
makers["fp8"] = _fp8
makers["fp8_block"] = lambda w, dtype: _fp8(w, dtype, 128, 128)
makers["mxfp4"] = _mxfp4
makers["nvfp4"] = _nvfp4
