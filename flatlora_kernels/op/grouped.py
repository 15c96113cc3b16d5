"""Mixtures of experts: a weight (E, N, K), and rows that each belong to one expert. mixture.py computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..choice import dispatch
from ..choice.resolve import STRATEGIES, resolve
from ..core.autocast import autocasts, without_autocast
from ..core.records import NO_DRAW, Choice, Draw
from . import checks, mixture, sharded
from .functional import (
    cast_as_autocast,
    drawn_tile_bits,
    may_be_direct,
    scaled_norms,
    seed_tensor,
    sq_norms_of,
    watched,
)


def fused_flat_lora_grouped_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    offsets: Tensor | Sequence[int],
    scaling: float = 1.0,
    sigma: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    noise: str = "gaussian",
    noise_scale: Tensor | None = None,
    sample_offset: int = 0,
    antithetic: bool = False,
    row_offset: int = 0,
    col_offset: int = 0,
    layer_shape: tuple[int, int] | None = None,
    strategy: str | None = None,
    noise_accum: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """`fused_flat_lora_linear` with the weight, adapter, bias and noise of each row's expert; rows sorted by expert.

    Rows ``offsets[e - 1]`` to ``offsets[e]`` (from 0 for e = 0) are expert e's. It draws from stream ``stream + e``,
    so that a rank that holds the experts from e0 on passes ``stream + e0`` and draws what the whole would. An expert
    without rows is neither read nor drawn, and gets zeros as gradient. `torch.compile` sees one op.

    Args:
        x: (M, K) float16, bfloat16, float32 or float64.
        weight: (E, N, K) in the type of `x`, with any strides: also ``w.transpose(1, 2)`` of a w (E, K, N).
        lora_A, lora_B: (E, r, K) and (E, N, r), in the type of `x` or float32; both or none.
        bias: (E, N).
        offsets: where each expert's rows end, E numbers that never fall, the last of them M: an int32 or int64 tensor
            as of `torch.nn.functional.grouped_mm`, or ints. Unlike there, no rows may follow the last end. A tensor on
            the device of `x` lets backend `triton` compute all experts in one launch, without a wait; then nobody can
            refuse wrong numbers, of which a GPU makes NaN. Elsewhere a tensor is read on the host: on a GPU that waits
            for the device, and fails while a graph is captured. Ints do neither, but take a launch for each expert, and
            `torch.compile` compiles anew for others.
        noise_scale: (E, N) float32 >= 0. Not given, it is that of `grouped_noise_scale`, and where the offsets are read
            on the host and `torch.compile` does not trace, of the experts with rows alone.
        sample_offset: all rows see the noise of this sample. There is no `samples`: rows are sorted by expert.
        layer_shape: (out_features, in_features) of one whole expert where `weight` has a shard of each.
        scaling, sigma, seed, stream, noise, antithetic, row_offset, col_offset, strategy, noise_accum, backend: see
            `fused_flat_lora_linear`.

    Returns:
        (M, N) in the type of `x`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it expects.
        RuntimeError, NotImplementedError: as `fused_flat_lora_linear`.

    Gradients flow to `x`, `weight`, `lora_A`, `lora_B` and `bias`, each only where needed.
    """
    cast = None
    if isinstance(x, Tensor) and autocasts(x.device.type):
        cast = torch.get_autocast_dtype(x.device.type)
        x, lora_A, lora_B, bias = cast_as_autocast(cast, x, lora_A, lora_B, bias)
    checks.grouped_linear(x, weight, lora_A, lora_B, bias)
    experts, N, K = weight.shape
    device = x.device
    one = weight[0] if cast is None else _as_if_cast(weight[0], cast)
    checks.linear(x, one, _first(lora_A), _first(lora_B), _first(bias), None, scaling)
    checks.sigma(sigma, weight)
    checks.draw(noise, stream, row_offset, col_offset, layer_shape, N, K)
    checks.streams(stream, experts)
    checks.sample_range(1, sample_offset, x.shape[0])
    checks.choice("strategy", strategy, STRATEGIES)
    checks.choice("noise_accum", noise_accum, ("folded", "split"))
    checks.offsets(offsets, experts)
    drawn = noise_scale is not None or isinstance(sigma, Tensor) or sigma != 0
    choice = resolve(backend, strategy, noise_accum, device.type, x.dtype, N * K, noise if drawn else None)
    if noise_scale is not None:
        checks.grouped_noise_scale(noise_scale, (experts, N), device)
    if drawn or seed is not None:
        checks.seed(seed, device)
    # Traced, it is the op that reads and checks them, as where all is one launch.
    traced = torch.compiler.is_compiling()
    ends: Sequence[int] | None = None
    if not traced and mixture.together(x, weight, offsets, K, noise if drawn else None, choice) is None:
        ends = offsets.tolist() if isinstance(offsets, Tensor) else offsets
        checks.ends(ends, x.shape[0])

    draw = None
    with without_autocast(device.type):
        if drawn:
            if noise_scale is None:
                used = None if ends is None else [b > a for a, b in zip((0, *ends), ends, strict=False)]
                noise_scale = _noise_scale(weight, x.dtype, lora_A, lora_B, scaling, sigma, K, choice, used)
            draw = Draw(
                noise_scale, seed_tensor(seed, device), stream, noise, 1, sample_offset, antithetic, row_offset,  # type: ignore[arg-type]
                col_offset, drawn_tile_bits(noise, layer_shape, N, K),
            )  # fmt: skip
        if (
            not traced
            and may_be_direct((x, weight, lora_A, lora_B, bias, noise_scale, seed), antithetic)
            and not watched()
        ):
            where = offsets if ends is None else ends
            return mixture.direct_linear(x, weight, lora_A, lora_B, bias, where, scaling, draw, choice)
        where = offsets if isinstance(offsets, Tensor) else torch.tensor(offsets, device="cpu")
        chosen = (choice.strategy, choice.noise_accum, choice.backend)
        operands = (x, weight, lora_A, lora_B, bias, where, scaling)
        y: Tensor = torch.ops.flatlora.grouped_linear(
            *operands, *(NO_DRAW if draw is None else draw), *chosen
        )[0]
        return y


def reads_offsets(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    noise: str = "gaussian",
    noise_scale: Tensor | None = None,
    strategy: str | None = None,
    noise_accum: str | None = None,
    backend: str | None = None,
    **others: Any,
) -> bool:
    """Whether `fused_flat_lora_grouped_linear` with these arguments reads the tensor `offsets` on the host.

    Who calls it several times with the same offsets can then read them once. Noise is drawn where a `noise_scale` is
    given, and `x` is still to be cast to the type of `weight`, or to that of autocast.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type) else weight.dtype
    drawn, (N, K) = noise_scale is not None, weight.shape[1:]
    kind = noise if drawn else None
    choice = resolve(backend, strategy, noise_accum, x.device.type, dtype, N * K, kind)
    return mixture.together(_as_if_cast(x, dtype), weight, offsets, K, kind, choice) is None


def grouped_noise_scale(
    weight: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float = 1.0,
    sigma: float | Tensor,
    in_features: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`flat_noise_scale` of each expert's own weight, (E, N) float32, as a constant. Nothing E x N x K is allocated.

    Args:
        weight: (E, N, K) with any strides. Or a DTensor of it, whose experts ranks share out (`Shard(0)`): each
            measures its own, and the result is that of all, a tensor on each rank. All ranks of the mesh have to call.
        lora_A, lora_B: (E, r, K) and (E, N, r) of all experts, tensors; both or none.
        scaling, sigma, in_features, backend: see `flat_noise_scale`.
    """
    if sharded.is_sharded(weight):

        def local(weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None) -> Tensor:
            own = {"scaling": scaling, "sigma": sigma, "in_features": in_features, "backend": backend}
            return grouped_noise_scale(weight, lora_A, lora_B, **own)  # type: ignore[arg-type]

        return sharded.of_own_experts(local, weight, lora_A, lora_B)
    checks.grouped(weight, lora_A, lora_B)
    checks.weight(weight[0])
    checks.adapter(_first(lora_A), _first(lora_B), weight[0])
    checks.scaling(scaling)
    checks.sigma(sigma, weight)
    checks.in_features(in_features)
    if in_features is None:
        in_features = weight.shape[2]
    one = weight[0]
    choice = resolve(backend, None, None, one.device.type, one.dtype, one.numel())
    return _noise_scale(weight, weight.dtype, lora_A, lora_B, scaling, sigma, in_features, choice)


def _noise_scale(
    weight: Tensor,
    dtype: torch.dtype,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    sigma: float | Tensor,
    in_features: int,
    choice: Choice,
    used: Sequence[bool] | None = None,
) -> Tensor:
    """(E, N), of weights in the type `dtype`.

    Args:
        used: experts whose weight is read; the others get zeros.
    """
    experts, N = weight.shape[:2]
    if weight.dtype == dtype and (used is None or all(used)):
        name = dispatch.grouping(choice, None, weight.device.type, dtype)
        if name is not None:
            squares = sq_norms_of(weight, lora_A, lora_B, scaling, name)
            return scaled_norms(squares, sigma, in_features)
    each = []
    for e in range(experts):
        if used is None or used[e]:
            A, B = (None if t is None else t[e] for t in (lora_A, lora_B))
            each.append(sq_norms_of(weight[e].to(dtype), A, B, scaling, choice.backend))
        else:
            each.append(torch.zeros(N, dtype=torch.float32, device=weight.device))
    return scaled_norms(torch.stack(each), sigma, in_features)


def _first(of_experts: Tensor | None) -> Tensor | None:
    """Expert 0's; what is no tensor is left for the checks to refuse."""
    return of_experts[0] if isinstance(of_experts, Tensor) else of_experts


def _as_if_cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor that is still to be cast, for who looks at its type and shape alone; takes no memory."""
    if not weight.is_floating_point() or weight.dtype == torch.float64:
        return weight
    return torch.empty((), dtype=dtype, device=weight.device).expand(weight.shape)
