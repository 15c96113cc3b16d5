"""The public functions: check the arguments, handle autocast, choose a backend, call the op."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..choice import dispatch
from ..choice.resolve import STRATEGIES, resolve
from ..core.autocast import autocasts, without_autocast
from ..core.noise import KINDS, tile_bits
from ..core.quantized import QuantizedWeight
from ..core.records import NO_DRAW, Draw, Operands, Weight
from . import autograd, checks, sharded
from . import schema as _ops  # noqa: F401  (registers torch.ops.flatlora)
from .flat import flat


def fused_flat_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    sigma: float | Tensor = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
    noise: str = "gaussian",
    noise_scale: Tensor | None = None,
    samples: int = 1,
    sample_offset: int = 0,
    antithetic: bool = False,
    lora_x: Tensor | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
    layer_shape: tuple[int, int] | None = None,
    strategy: str | None = None,
    noise_accum: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x @ (W + eps)^T + scaling * (lora_x @ A^T) @ B^T + bias`` without ever materialising `eps`.

    ``eps[n, k] = noise_scale[n] * z[n, k]`` with `z` drawn from Philox inside the kernel; the backward draws the
    same values again. `weight` is never written to, and nothing of its size is allocated.

    Args:
        x: (..., K) float16, bfloat16, float32 or float64. M is the product of the leading dimensions.
        weight: (N, K) frozen base weight in the type of `x`, row- or column-major; or a `QuantizedWeight` that decodes
            to that type.
        lora_A, lora_B: (r, K) and (N, r), PEFT's names and shapes, in the type of `x` or float32; both or none.
        bias: (N,).
        scaling: alpha / r, alpha / sqrt(r), ...
        sigma: strength of the noise relative to the row norms; a float, or a 0-d tensor. The float 0 draws nothing.
        seed: an int (modulo 2**64) or a 0-d int64 tensor on the device of `x`, which only the kernel reads.
        stream: which layer this is; different streams draw different noise.
        noise: "gaussian", "near_gaussian", "rademacher" or "hadamard", see docs/internals/noise.md.
        noise_scale: (N,) float32 >= 0, std of eps per row. Given, `sigma` is ignored; not given, it is
            `flat_noise_scale` of these arguments, which reads the weight once more.
        samples, sample_offset: the M rows fall into `samples` equal contiguous groups; group g sees the noise of
            sample ``sample_offset + g``.
        antithetic: sample s sees the noise of ``s >> 1``, negated where s is odd.
        lora_x: input of the adapter branch where it differs from `x` (dropout), in the shape of `x`.
        row_offset, col_offset: where this shard sits in the full weight; `col_offset` is a multiple of 8.
        layer_shape: (out_features, in_features) of the whole layer where `weight` is a shard of it, which "hadamard"
            depends on; default (N, K).
        strategy: None = automatic, "fused", "panel", or for "hadamard" alone "transform". Bits of "fused" are the same
            for any number of threads; the others leave products to torch, which promises no such thing. Where nothing
            is drawn, "fused" asks for the backend's own product, and the others leave the choice to be made.
        noise_accum: None = automatic, "folded" (round W + eps) or "split" (x z^T on its own). "transform" adds
            x eps^T to x W^T, whichever it is.
        backend: None = automatic, or one of `backend_info()`; a name that cannot run here is an error.

    Returns:
        (..., N) in the type of `x`.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what it got and what it expects.
        RuntimeError: the backend asked for cannot run here, or a result is differentiated twice.
        NotImplementedError: the backend lacks the strategy or noise_accum asked for.

    Tensor parallel: where `x`, `weight` and the adapter are DTensors, so is the result, and offsets and `layer_shape`
    follow from the placement of `weight`; `noise_scale` is that of the whole layer.

    Gradients flow to `x`, `weight`, `lora_A`, `lora_B`, `bias` and `lora_x`, each only where needed; `noise_scale`,
    `sigma` and eps are constants. Source: Li et al., Flat-LoRA, ICML 2025, arXiv 2409.14396, eq. (7) to (9).
    """
    if isinstance(x, Tensor) and autocasts(x.device.type):
        device_type = x.device.type
        x, weight, lora_A, lora_B, bias, lora_x = cast_as_autocast(
            torch.get_autocast_dtype(device_type), x, weight, lora_A, lora_B, bias, lora_x
        )
        disabled = torch.autocast(device_type, enabled=False)
    else:
        disabled = None
    # What was checked once need not be checked again: `facts` are all that the checks look at, but for numbers that are
    # compared here.
    facts = passed = None
    if (
        type(stream) is type(samples) is type(sample_offset) is type(row_offset) is type(col_offset) is int
        and 0 <= stream < _UINT32
        and 0 <= sample_offset <= _UINT32 - samples
        and type(sigma) is float
        and 0.0 <= sigma < math.inf
        and not torch.compiler.is_compiling()
    ):
        try:
            facts = (
                type(x), x.shape, x.dtype, x.device, x.is_neg(), x._is_zerotensor(),
                type(weight), weight.packing if type(weight) is QuantizedWeight else weight.shape,
                weight.dtype, weight.device, weight.is_neg(),
                lora_A if lora_A is None else (
                    type(lora_A), lora_A.shape, lora_A.dtype, lora_A.device, lora_A.is_neg(),
                    type(lora_B), lora_B.shape, lora_B.dtype, lora_B.device, lora_B.is_neg(),
                ),
                bias if bias is None else (type(bias), bias.shape, bias.dtype, bias.device, bias.is_neg()),
                lora_x if lora_x is None else (
                    type(lora_x), lora_x.shape, lora_x.dtype, lora_x.device, lora_x.is_neg(),
                ),
                noise_scale if noise_scale is None else (
                    type(noise_scale), noise_scale.shape, noise_scale.dtype, noise_scale.device, noise_scale.is_neg(),
                    noise_scale.requires_grad,
                ),
                (type(seed), seed.shape, seed.dtype, seed.device) if isinstance(seed, Tensor) else type(seed),
                lora_B is None, sigma == 0.0, type(scaling), noise, samples, type(antithetic), row_offset, col_offset,
                layer_shape if layer_shape is None else repr(layer_shape), strategy, noise_accum,
            )  # fmt: skip
            passed = _passed.get(facts)
        except Exception:  # an argument that is none of those expected: the checks say so
            facts = None
    if passed is None:
        if sharded.is_sharded(weight) or sharded.is_sharded(x):
            if noise_scale is None and not (type(sigma) is float and sigma == 0):
                noise_scale = flat_noise_scale(
                    weight, lora_A, lora_B, scaling=scaling, sigma=sigma, backend=backend
                )
            with _NOTHING if disabled is None else disabled:
                return sharded.linear(
                    fused_flat_lora_linear, x, weight, lora_A, lora_B, bias, lora_x, noise_scale, samples,
                    sample_offset, scaling=scaling, seed=seed, stream=stream, noise=noise, antithetic=antithetic,
                    row_offset=row_offset, col_offset=col_offset, layer_shape=layer_shape, strategy=strategy,
                    noise_accum=noise_accum, backend=backend,
                )  # fmt: skip
        checks.linear(x, weight, lora_A, lora_B, bias, lora_x, scaling)
    N, K = weight.shape
    if passed is None:
        checks.sigma(sigma, weight)
        checks.draw(noise, stream, row_offset, col_offset, layer_shape, N, K)
        checks.choice("strategy", strategy, STRATEGIES)
        checks.choice("noise_accum", noise_accum, ("folded", "split"))
    device = x.device
    drawn = noise_scale is not None or isinstance(sigma, Tensor) or sigma != 0
    choice = resolve(backend, strategy, noise_accum, device.type, x.dtype, N * K, noise if drawn else None)
    if passed is None:
        checks.sample_range(samples, sample_offset, math.prod(x.shape[:-1]))
        if noise_scale is not None:
            checks.noise_scale(noise_scale, N, device)
        if drawn or seed is not None:
            checks.seed(seed, device)
        bits, direct = drawn_tile_bits(noise, layer_shape, N, K), False
        if facts is not None:
            direct = may_be_direct((x, weight, lora_A, lora_B, bias, lora_x, noise_scale, seed), antithetic)
            _remember(facts, (bits, direct))
    else:
        bits, direct = passed
    draw = None
    if drawn:
        if noise_scale is None:
            noise_scale = noise_scale_of(weight, lora_A, lora_B, scaling, sigma, K, choice.backend)
        draw = Draw(
            noise_scale, seed_tensor(seed, device), stream, noise, samples, sample_offset, antithetic,  # type: ignore[arg-type]
            row_offset, col_offset, bits,
        )  # fmt: skip
    vector = x.dim() == 1
    if vector:
        x, lora_x = x[None], None if lora_x is None else lora_x[None]
    with _NOTHING if disabled is None else disabled:
        if direct and not watched():
            y = autograd.linear(x, weight, lora_A, lora_B, bias, lora_x, scaling, draw, choice)
        else:
            codes, more = flat(weight)
            operands = Operands(x, codes, lora_A, lora_B, bias, lora_x, scaling)  # type: ignore[arg-type]
            # By name: torch.compile of 2.11 cannot unpack a record that it holds constant.
            chosen = (choice.strategy, choice.noise_accum, choice.backend)
            y = torch.ops.flatlora.linear(*operands, *(NO_DRAW if draw is None else draw), *chosen, *more)[0]
    return y[0] if vector else y


_UINT32 = 1 << 32
_NOTHING = contextlib.nullcontext()
_MOST = 4096  # of `_passed`; beyond it, all is checked once more
# Facts -> the tile_bits of hadamard, and whether the call may go past torch's dispatcher.
_passed: dict[tuple[Any, ...], tuple[int, bool]] = {}


def _remember(facts: tuple[Any, ...], passed: tuple[int, bool]) -> None:
    if len(_passed) >= _MOST:
        _passed.clear()
    _passed[facts] = passed


def may_be_direct(given: tuple[Any, ...], antithetic: Any) -> bool:
    """The dispatcher resolves lazy negation and zeros, and knows what subclasses and other devices want."""
    return type(antithetic) is bool and not any(
        type(t) not in (Tensor, torch.nn.Parameter)
        or t.device.type not in ("cpu", "cuda")
        or t.is_neg()
        or t._is_zerotensor()
        for t in given
        if isinstance(t, Tensor)
    )


def _all_watchers() -> tuple[Callable[[], Any], ...]:
    try:
        return (
            torch._C._len_torch_dispatch_stack,
            torch._C._len_torch_function_stack,
            torch._C._are_functorch_transforms_active,
            torch._C._get_tracing_state,
            torch.autograd._profiler_enabled,
        )
    except AttributeError:  # they are torch's own: where one is gone, every call is seen
        return (lambda: True,)


_watchers = _all_watchers()


def watched() -> bool:
    """Whether somebody has to see the ops: a mode, a transform, a trace, a profile."""
    for watcher in _watchers:
        if watcher():
            return True
    return False


_SIGNATURE = inspect.signature(fused_flat_lora_linear)


def explain(*args: Any, **kwargs: Any) -> dispatch.Explanation:
    """What `fused_flat_lora_linear` would run with these arguments, and why; nothing is computed.

    Takes the arguments of `fused_flat_lora_linear`, of which the tensors' shapes, types and devices count (meta tensors
    will do for a backend that runs there) and `seed` may be left out.

    Returns:
        `dispatch.Explanation`: backend, strategy, noise_accum, reason, workspace in bytes, and the candidates with what
        was measured (over a plain product) and what cost.py predicts (seconds); print it for a table.

    Raises:
        ValueError, TypeError, RuntimeError: what the call itself would raise for a backend, strategy or noise_accum
            that cannot run.
    """
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    x, weight, sigma = given["x"], given["weight"], given["sigma"]
    dtype = x.dtype
    if autocasts(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if isinstance(weight, QuantizedWeight) or weight.is_meta:
            weight = weight.to(dtype)
        else:
            weight = torch.empty_like(weight, dtype=dtype, device="meta")
    checks.choice("noise", given["noise"], KINDS)
    checks.choice("strategy", given["strategy"], STRATEGIES)
    checks.choice("noise_accum", given["noise_accum"], ("folded", "split"))
    rows = math.prod(x.shape[:-1])
    checks.sample_range(given["samples"], given["sample_offset"], rows)
    drawn = given["noise_scale"] is not None or isinstance(sigma, Tensor) or sigma != 0
    noise = given["noise"] if drawn else None
    choice = resolve(
        given["backend"], given["strategy"], given["noise_accum"], x.device.type, dtype, weight.numel(), noise
    )
    seen = rows if noise is None else rows // given["samples"]
    return dispatch.explain(choice, noise, seen, x.device, weight)


def row_sq_norms(
    weight: Weight,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Squared row norms ``||W[n] + scaling (B A)[n]||^2``, (N,) float32, as a constant.

    Ranks that hold column shards add these up before `flat_noise_scale`'s square root. Of DTensors the result is that
    of the whole layer, a tensor on each rank, and all ranks of the mesh have to call. Nothing N x K is allocated. A sum
    of squares in float32: infinite for a norm above 1.8e19, and values below 1e-19 count as zero.

    Args:
        weight: (N, K) of any supported type, row- or column-major.
        lora_A, lora_B: (r, K) and (N, r), both or none.
    """
    checks.weight(weight)
    checks.adapter(lora_A, lora_B, weight)
    checks.scaling(scaling)
    return sq_norms_of(weight, lora_A, lora_B, scaling, backend_for(weight, backend))


def flat_noise_scale(
    weight: Weight,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    scaling: float = 1.0,
    sigma: float | Tensor,
    in_features: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Std of eps per row, ``sigma / sqrt(in_features) * ||W[n] + scaling (B A)[n]||``, (N,) float32, a constant.

    The norm is the root of `row_sq_norms`: a row whose norm is above 1.8e19 gets infinity, and its products become NaN.

    Args:
        sigma: float >= 0 or a 0-d tensor on the device of `weight`.
        in_features: of the whole layer, where `weight` is a column shard; default K.
    """
    checks.weight(weight)
    checks.adapter(lora_A, lora_B, weight)
    checks.scaling(scaling)
    checks.sigma(sigma, weight)
    checks.in_features(in_features)
    if in_features is None:
        in_features = weight.shape[1]
    return noise_scale_of(weight, lora_A, lora_B, scaling, sigma, in_features, backend_for(weight, backend))


def materialize_noise(
    noise_scale: Tensor,
    num_cols: int,
    *,
    seed: int | Tensor,
    stream: int = 0,
    noise: str = "gaussian",
    sample: int = 0,
    antithetic: bool = False,
    row_offset: int = 0,
    col_offset: int = 0,
    layer_shape: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """`eps` itself, (N, num_cols), as the selected backend draws it: for tests, debugging and merging.

    Args:
        noise_scale: (N,) float32 >= 0; ones give the standard noise `z`.
        layer_shape: as in `fused_flat_lora_linear`; default (N, num_cols).
        dtype: of the result, and of the weight whose eps this is: see "the type of the factor" in
            docs/internals/noise.md. The values are made in float32 and rounded once.
    """
    checks.noise_scale(noise_scale, None, None)
    checks.uint32("num_cols", num_cols)
    if dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype}")
    out = noise_scale.new_empty((noise_scale.shape[0], num_cols), dtype=dtype)
    draw = _one_draw(
        out, noise_scale, seed, stream, noise, sample, antithetic, row_offset, col_offset, layer_shape
    )
    torch.ops.flatlora.perturb(None, *draw, backend_for(out, backend), out)
    return out


def perturb_weight(
    weight: Weight,
    noise_scale: Tensor,
    *,
    seed: int | Tensor,
    stream: int = 0,
    noise: str = "gaussian",
    sample: int = 0,
    antithetic: bool = False,
    row_offset: int = 0,
    col_offset: int = 0,
    layer_shape: tuple[int, int] | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``W + eps`` in one pass, (N, K): the strongest unfused baseline, and the way to merge a perturbation.

    Args:
        weight: (N, K); not written to.
        noise_scale: (N,) float32 >= 0.
        out: where to write, of the shape and type of `weight` and in memory of its own; default a new tensor.
    """
    checks.weight(weight)
    checks.whole("weight", weight)
    checks.noise_scale(noise_scale, weight.shape[0], weight.device)
    weight = weight.detach()
    if out is None:
        out = (
            weight.new_empty(weight.shape)
            if isinstance(weight, QuantizedWeight)
            else torch.empty_like(weight)
        )
    else:
        checks.out(out, weight)
    draw = _one_draw(
        out, noise_scale, seed, stream, noise, sample, antithetic, row_offset, col_offset, layer_shape
    )
    codes, more = flat(weight)
    torch.ops.flatlora.perturb(codes, *draw, backend_for(out, backend), out, *more)
    return out


def noise_product(
    x: Tensor,
    noise_scale: Tensor,
    *,
    seed: int | Tensor,
    stream: int = 0,
    noise: str = "gaussian",
    samples: int = 1,
    sample_offset: int = 0,
    antithetic: bool = False,
    row_offset: int = 0,
    col_offset: int = 0,
    layer_shape: tuple[int, int] | None = None,
    strategy: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x eps^T`` alone, (..., N): for layers whose own product is somebody else's. Differentiable in `x`.

    The noise is that of `fused_flat_lora_linear` with a weight (N, K) in the type of `x`, and so are the arguments and
    errors. Autocast does not cast `x`.

    Args:
        x: (..., K). noise_scale: (N,) float32.
    """
    checks.noise_product(x, noise_scale)
    with without_autocast(x.device.type):
        return fused_flat_lora_linear(
            x,
            x.new_zeros(()).expand(noise_scale.shape[0], x.shape[-1]),  # takes no memory
            seed=seed,
            stream=stream,
            noise=noise,
            noise_scale=noise_scale,
            samples=samples,
            sample_offset=sample_offset,
            antithetic=antithetic,
            row_offset=row_offset,
            col_offset=col_offset,
            layer_shape=layer_shape,
            strategy=strategy,
            backend=backend,
        )


def cast_as_autocast(dtype: torch.dtype, *tensors: Any) -> list[Any]:
    """Casts what `F.linear` would under autocast: floating point, but not float64."""
    return [
        t.to(dtype)
        if isinstance(t, (Tensor, QuantizedWeight)) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    ]


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    seed %= 1 << 64
    # The same 64 bits as a signed number; full() fills on the device, so that nothing waits for a copy.
    return torch.full((), seed - (1 << 64) if seed >> 63 else seed, dtype=torch.int64, device=device)


def sq_norms_of(
    weight: Weight, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float, backend: str
) -> Tensor:
    if lora_A is not None:
        lora_A, lora_B = lora_A.detach(), lora_B.detach()
    if sharded.is_sharded(weight):

        def local(weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None) -> Tensor:
            return sq_norms_of(weight, lora_A, lora_B, scaling, backend)

        return sharded.row_sq_norms(local, weight.detach(), lora_A, lora_B)
    codes, more = flat(weight.detach())
    arguments = (codes, lora_A, lora_B, scaling, backend, *more)
    with without_autocast(weight.device.type):  # a product in 16 bits would miss the precision promised
        return torch.ops.flatlora.row_sq_norms(*arguments)


def noise_scale_of(
    weight: Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    sigma: float | Tensor,
    in_features: int,
    backend: str,
) -> Tensor:
    return scaled_norms(sq_norms_of(weight, lora_A, lora_B, scaling, backend), sigma, in_features)


def scaled_norms(squares: Tensor, sigma: float | Tensor, in_features: int) -> Tensor:
    """`noise_scale` from squared norms, in their place."""
    norms = squares.sqrt_()
    if isinstance(sigma, Tensor):
        return norms.mul_(sigma.detach()).mul_(1 / math.sqrt(max(in_features, 1)))
    return norms.mul_(sigma / math.sqrt(max(in_features, 1)))


def backend_for(like: Weight, backend: str | None) -> str:
    """Asked for by name or not: the one that a linear with a weight like this would use."""
    return resolve(backend, None, None, like.device.type, like.dtype, like.numel()).backend


def _one_draw(
    out: Tensor,
    noise_scale: Tensor,
    seed: int | Tensor,
    stream: int,
    noise: str,
    sample: int,
    antithetic: bool,
    row_offset: int,
    col_offset: int,
    layer_shape: tuple[int, int] | None,
) -> Draw:
    """Of a single sample, checked; `out` (N, K) is what it fills."""
    checks.draw(noise, stream, row_offset, col_offset, layer_shape, *out.shape)
    checks.uint32("sample", sample)
    checks.seed(seed, noise_scale.device)
    seed = seed_tensor(seed, noise_scale.device)
    tile_bits = drawn_tile_bits(noise, layer_shape, *out.shape)
    return Draw(noise_scale, seed, stream, noise, 1, sample, antithetic, row_offset, col_offset, tile_bits)


def drawn_tile_bits(noise: str, layer_shape: tuple[int, int] | None, N: int, K: int) -> int:
    return tile_bits(*((N, K) if layer_shape is None else layer_shape)) if noise == "hadamard" else 0
