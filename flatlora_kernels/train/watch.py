"""What is said once where noise is wanted, and does not reach the training or cannot be what was meant."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from .names import within
from .roles import Drawing, Driven

_SHOWN = 5  # names in a message


def before_step(controller: Driven, optimizer: torch.optim.Optimizer) -> None:
    """Notes which layers this step trains although their forward has not run, and whether anyone moves on the noise.

    Neither versions nor values of parameters would tell: fused optimisers write as `.data` does.
    """
    if not controller.target_sigma:
        return
    layers = [layer for layer in controller._layers if layer.training]
    if controller._driven:
        layers = [layer for layer in layers if not layer._called]
    if not layers:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    trained = [layer for layer in layers if any(id(p) in held for p in layer._trained_parameters())]
    for layer in trained:
        layer._bypassed = not layer._called
    if trained and not controller._driven:
        before = controller._undriven.get(optimizer, 0)
        controller._undriven[optimizer] = before + 1
        if before:
            _undriven(controller, trained)


def idle(controller: Driven) -> None:
    """Layers that an optimiser has trained in this step, and whose forward has not run in it."""
    found = [
        layer
        for layer in controller._layers
        if layer._bypassed and not layer._called and not layer._captured and not _excused(controller, layer)
    ]
    if found:
        found.sort(key=lambda layer: layer.stream)
        _once(
            controller,
            "idle",
            f"{len(found)} of {len(controller._layers)} layers were trained without weight noise, because their forward"
            f" did not run: {_names(found)}. Something else reads their parameters, as the fused LoRA kernels of"
            " Unsloth and axolotl do; switch that off. NoiseController(expect_unused=...) names layers, such as"
            " experts, that a step may leave out",
        )


def _undriven(controller: Driven, layers: list[Drawing]) -> None:
    drawn = "every step sees the same noise" if controller._known_sigma() else "no noise is drawn"
    _once(
        controller,
        "undriven",
        f"{len(layers)} layers are being trained, and their NoiseController is still at step {controller.step}: with"
        f" schedule={controller.schedule!r} {drawn}. Call controller.attach(optimizer) once, or controller.advance()"
        " after each optimizer.step(); with transformers.Trainer pass callbacks=[FlatLoraCallback(controller)]",
        stacklevel=6,  # the caller of optimizer.step
    )


def one_sample(controller: Driven, shape: Sequence[int]) -> None:
    """samples="batch" for an input without a batch."""
    _once(
        controller,
        "one_sample",
        f'samples="batch" is one sample for an input of shape {tuple(shape)}: the sequences of a packed row (packing,'
        " padding-free batches) share their noise, as do micro-batches of one sequence. An int as `samples` gives that"
        " many equal parts of the rows noise of their own",
    )


def _excused(controller: Driven, layer: Drawing) -> bool:
    return bool(layer.flat_lora_name) and within(layer.flat_lora_name, controller.expect_unused)


def _names(layers: Sequence[Drawing]) -> str:
    names = [
        repr(layer.flat_lora_name)
        if layer.flat_lora_name
        else f"{type(layer).__name__} of stream {layer.stream}"
        for layer in layers[:_SHOWN]
    ]
    return ", ".join(names) + (f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else "")


def _once(controller: Driven, what: str, message: str, stacklevel: int = 4) -> None:
    if what not in controller._said:
        controller._said.add(what)
        warnings.warn(message, stacklevel=stacklevel)
