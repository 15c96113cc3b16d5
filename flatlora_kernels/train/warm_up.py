"""`warm_up`: the kernels that a training will need, compiled before it begins."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import torch
from torch import nn

from .. import backends
from ..op import checks
from ..op.sharded import is_sharded
from .layer import NoisyLayer, instead_of_noise

Rows = int | tuple[int, ...]


def warm_up(
    model: nn.Module, rows: Iterable[Rows], *, workers: int | None = None, progress: bool = True
) -> int:
    """Compiles what backend `triton` will run in a training of `model`, several kernels at once.

    Without it, each kernel is compiled by the first call that needs it, one after the other, seconds each; a CUDA graph
    cannot be captured before. No noise is drawn, no weight, gradient or random generator changes. Each different layer
    goes once through forward and backward for each of `rows`, in training mode, with launches left out: activations of
    one layer are allocated. Layers that run on another backend do compute, and have nothing to compile.

    Args:
        model: has layers with noise (`NoisyLayer`), on the device and in the types that it will train in; call this
            inside the autocast that training will have.
        rows: what the layers' inputs will look like without their features, (batch, tokens), or batch times tokens as
            an int. Kernels depend on the range of their product alone (at most 16, 64, 128, or more, and in few rows
            on how a contraction is split): one of each range that training will see is enough.
        workers: threads that compile; default all cores, at most 16.
        progress: a bar, where tqdm is installed.

    Returns:
        How many kernels that training needs; those in Triton's cache on disk are not compiled again.

    Raises:
        TypeError, ValueError: `rows` or `workers` do not fit; `model` has no layer with noise, or one of DTensors.
    """
    layers = [module for module in model.modules() if isinstance(module, NoisyLayer)]
    if not layers:
        raise ValueError(
            f"model: expected one with layers that draw noise (apply_flat_lora makes them), got {type(model).__name__}"
        )
    shapes = [_shape(given) for given in rows]
    if not shapes:
        raise ValueError("rows: expected at least one number of rows, got none")
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected an int >= 1, got {workers}")
    triton = backends.get("triton")
    if triton.unavailable() is not None:
        return 0
    alike: dict[Any, NoisyLayer] = {}
    for layer in layers:
        if is_sharded(layer._base_parameter()):
            raise ValueError(
                f"model: expected whole weights, got a DTensor in {layer.flat_lora_name or type(layer).__name__!r};"
                " call warm_up before fully_shard, and leave it out with tensor parallelism"
            )
        if layer._base_parameter().device.type in triton.DEVICE_TYPES:
            alike.setdefault(_kind(layer), layer)
    found = dict.fromkeys((layer, shape) for layer in alike.values() for shape in shapes)
    workers = workers or min(len(os.sched_getaffinity(0)), 16)
    return _compile(list(found), workers, progress)


def _shape(given: Rows) -> tuple[int, ...]:
    shape = given if isinstance(given, tuple) else (given,)
    for size in shape:
        checks.uint32("rows", size)
        if size < 1:
            raise ValueError(f"rows: expected numbers >= 1, got {given}")
    return shape


def _kind(layer: NoisyLayer) -> Any:
    """Layers of one kind need the same kernels."""
    parameters = [
        (
            name,
            p.shape,
            p.stride(),
            p.dtype,
            p.device,
            p.data_ptr() % 16 if not p.is_meta else 0,
            p.requires_grad,
        )
        for name, p in layer.named_parameters()
    ]
    settings = (
        layer.noise,
        layer.samples,
        layer.antithetic,
        layer.strategy,
        layer.noise_accum,
        layer.backend,
    )
    return type(layer), tuple(map(repr, layer.children())), tuple(parameters), settings


def _compile(passes: Sequence[tuple[NoisyLayer, tuple[int, ...]]], workers: int, progress: bool) -> int:
    import triton

    from ..triton_kernels import launch

    if launch.INTERPRETED:
        return 0
    kernels: dict[int, tuple[Any, torch.device]] = {}
    futures: list[Future[Any]] = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
            futures.append(super().submit(*args, **kwargs))
            return futures[-1]

    with Pool(workers) as pool, triton.AsyncCompileMode(pool):
        for layer, shape in passes:
            device = layer._base_parameter().device

            def note(kernel: Any, arguments: Any, compile: Any, device: torch.device = device) -> None:
                made = compile()
                kernels[id(made)] = made, device

            with launch.instead(note):
                _pass(layer, shape)
        for _ in _bar(as_completed(futures), len(futures)) if progress else ():
            pass
    for made, device in kernels.values():
        made = made.result() if hasattr(made, "result") else made
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _ = made.run  # loads it
    return len(kernels)


def _bar(steps: Iterator[Any], total: int) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, total=total, desc="compiling kernels", unit="kernel", disable=not total)


def _pass(layer: NoisyLayer, shape: tuple[int, ...]) -> None:
    """Norms, forward and backward of one layer."""
    weight, lora_A, lora_B, scaling = layer._weight_in_use()
    samples: Any = layer.samples
    if samples == "batch":
        if len(shape) < 2:
            raise ValueError(
                f"rows: expected (batch, tokens) for a layer with samples='batch', got {shape[0]}"
            )
        samples = shape[0]
    if math.prod(shape) % samples:
        raise ValueError(
            f"rows: expected a multiple of the layers' samples={samples}, got {math.prod(shape)}"
        )
    device = weight.device
    arguments = {
        "seed": layer._seed,
        "stream": layer.stream,
        "noise": layer.noise,
        "noise_scale": torch.ones(weight.shape[:-1], device=device),
        "samples": samples,
        "antithetic": layer.antithetic,
        "strategy": layer.strategy,
        "noise_accum": layer.noise_accum,
        "backend": layer.backend,
    }
    before = [(module, module.training) for module in layer.modules()]
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),  # dropout
        instead_of_noise([layer], lambda layer: arguments),
        torch.enable_grad(),
    ):
        try:
            layer.train()
            layer._unit_noise_scale(weight, lora_A, lora_B, scaling, None)
            x = torch.empty(*shape, weight.shape[-1], dtype=weight.dtype, device=device, requires_grad=True)
            y = layer._example(x)
            trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
            torch.autograd.grad(y, trained, torch.empty_like(y), allow_unused=True)
        finally:
            for module, training in before:
                module.training = training
