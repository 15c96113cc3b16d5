"""Launches the kernels of a product with noise: forward.py's, or input_grad.py's for the transpose of the weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from ..core.quantized import QuantizedWeight
from . import configs
from .forward import _linear_forward_kernel
from .input_grad import _linear_input_grad_kernel
from .launch import (
    INTERPRETED,
    NOTHING,
    Kernel,
    Plan,
    by_eight,
    descriptor,
    draw_facts,
    drawn,
    facts,
    machine_of,
    plan,
    precision_of,
    prepared,
    rank_block,
    strides,
)
from .packed import operand, packed_facts
from .split import add_splits
from .tile import Cut, Mixture


def makes_u(x: Tensor, weight: Any, rank: int, samples: int) -> bool:
    """Whether the forward had better make u itself: so few rows that a launch saved is more than A read again.

    Args:
        weight: (N, K), or of a mixture (E, N, K). samples: parts of the rows that read the weight once each.
    """
    elements = weight.shape[-2] * weight.shape[-1]
    few = 0 < x.shape[0] <= configs.U_ROWS * samples and 0 < elements <= configs.U_WEIGHT
    if not (few and 0 < rank <= configs.U_RANK):
        return False
    regular = INTERPRETED or (x.element_size() == 2 and by_eight(x) and by_eight(weight))
    return regular and machine_of(x).arithmetic != "amdgcn"  # whose scalar registers it would spill


def _mixture(p: Any, lora_A: Tensor | None, draw: Any) -> Mixture | None:
    if p.offsets is None:
        return None

    def stride(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.stride(0)

    A, B = (p.lora, None) if p.input_grad else (lora_A, p.lora)
    scale = None if draw is None else draw.noise_scale
    return Mixture(p.offsets, len(p.offsets), *map(stride, (p.weight, A, B, p.bias, scale)))


def _prepare(
    p: Any, lora_A: Tensor | None, draw: Any, noise_accum: str, workspace: int, precision: str
) -> tuple[Plan, Kernel]:
    N, K = p.weight.shape[-2:]
    rank = 0 if p.lora is None else p.lora.shape[-1]
    packs = isinstance(p.weight, QuantizedWeight)
    cut = plan(p, 1 if draw is None else draw.samples, noise_accum, workspace, precision)
    config = cut.config
    noise = drawn(draw, cut.machine, p.weight, noise_accum)
    if draw is None:  # a tile goes from its load to the product as it is
        noise = dataclasses.replace(noise, paired=False, apart=False)
    block_n, block_k = config.block_out, config.block_in
    if p.input_grad:
        block_n, block_k = block_k, block_n
    rest = {
        "M": p.a.shape[0],
        "N": N,
        "K": K,
        "rank": rank,
        "rows_per_sample": cut.rows_per_sample,
        "steps_per_split": cut.steps_per_split,
        **strides(None if packs else p.weight, "stride_wn", "stride_wk"),
        **strides(None if draw is None else draw.noise_scale, "stride_scale"),
        "PACKED": packed_facts(p.weight) if packs else None,
        "DRAW": noise,
        "CUT": Cut(
            block_m=config.block_m,
            block_n=block_n,
            block_k=block_k,
            block_r=rank_block(rank),
            group_m=configs.GROUP_M,
            carry=config.carry and draw is not None,
            split=cut.splits > 1,
            even=K % block_k == 0 and (N % block_n == 0 or not p.input_grad),
            multiple=8 if cut.regular else 1,
            by_engine=cut.box is not None,
            precision=precision,
            experts=0 if p.offsets is None else triton.next_power_of_2(len(p.offsets)),
        ),
    }
    if p.input_grad:
        kernel = _linear_input_grad_kernel
        rest |= strides(p.a, "stride_ym", "stride_yn") | strides(p.lora, "stride_ak", "stride_ar")
    else:
        kernel = _linear_forward_kernel
        rest |= strides(p.a, "stride_xm", "stride_xk") | strides(lora_A, "stride_ar", "stride_ak")
        rest |= strides(p.lora, "stride_bn", "stride_br") | strides(p.bias, "stride_bias")
        rest |= {"HAS_BIAS": p.bias is not None, "MAKES_U": lora_A is not None}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return cut, Kernel(kernel, (cut.tiles, cut.splits), p.a, rest, options)


def product(
    p: Any, draw: Any, noise_accum: str, workspace: int, lora_A: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """y, (M, outputs), and u.

    Args:
        p: `flatlora_kernels.core.records.Product`, not empty. draw: `Draw` of the same module; None only of a mixture.
        noise_accum: "folded" or "split". workspace: bytes of scratch memory allowed.
        lora_A: of a forward, (r, K) or (E, r, K), r <= 32, in place of u, which the kernel then makes in its own pass
            over x; see `makes_u`.
    """
    a, weight, input_grad, u, lora, bias, scaling, offsets = p
    scale, seed, noise, noise_facts = None, None, NOTHING, ()
    if draw is not None:
        scale, seed = draw.noise_scale, draw.seed
        noise = (draw.stream, draw.sample_offset, draw.row_offset, draw.col_offset)
        noise_facts = (*draw_facts(draw), draw.samples)
    precision = precision_of(a)
    key = (
        *facts(a, weight, u, lora_A, lora, bias, scale, offsets), *noise_facts, noise_accum, input_grad, workspace,
        precision,
    )  # fmt: skip
    cut, kernel = prepared(_prepare, key, p, lora_A, draw, noise_accum, workspace, precision)
    M, splits = a.shape[0], cut.splits
    y = a.new_empty((M, p.outputs))
    partial = y if splits == 1 else a.new_empty((splits, *y.shape), dtype=torch.float32)
    u_partial = u
    if lora_A is not None:
        u = a.new_empty((M, lora_A.shape[-2]))
        u_partial = u if splits == 1 else a.new_empty((splits, *u.shape), dtype=torch.float32)
    packed = None
    if isinstance(weight, QuantizedWeight):
        weight, packed = None, operand(weight)
    first = a if cut.box is None else descriptor(a, cut.box)
    operands = (first, weight, packed, _mixture(p, lora_A, draw), u_partial)
    if input_grad:
        kernel(*operands, lora, scale, seed, partial, scaling, *noise)
    else:
        kernel(*operands, lora_A, lora, bias, scale, seed, partial, scaling, *noise)
    if splits > 1:
        add_splits(partial, bias, y, *(() if lora_A is None else (u_partial, u)))
    return y, u
