"""What is said once where noise is wanted, and does not reach the training or cannot be what was meant."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from .names import within
from .roles import Drawing, Driven

_SHOWN = 5  # names in a message


def idle(controller: Driven) -> None:
    """Layers whose parameters changed in this step and in the last one, and whose forward ran in neither.

    Once may be a checkpoint that was loaded.
    """
    for layer in controller._layers:
        alone = not layer._called and layer.training and layer._trained()
        if alone or layer._steps_idle:
            layer._steps_idle = layer._steps_idle + 1 if alone else 0
    found = [
        layer for layer in controller._layers if layer._steps_idle > 1 and not _excused(controller, layer)
    ]
    if found:
        found.sort(key=lambda layer: layer.stream)
        _once(
            controller,
            "idle",
            f"{len(found)} of {len(controller._layers)} layers were trained for two steps without weight noise, because"
            f" their forward did not run: {_names(found)}. Something else reads their parameters, as"
            " the fused LoRA kernels of Unsloth and axolotl do; switch that off. NoiseController(expect_unused=...)"
            " names layers, such as experts, that a step may leave out",
        )


def undriven(layer: Drawing, changes: int) -> None:
    """A layer whose trained parameters have changed so often, and whose controller nobody has ever moved on."""
    controller = layer.noise_controller
    # One change may be a checkpoint that is loaded, or the ascent of a sharpness-aware optimiser.
    if changes > 1 and controller.target_sigma:
        _once(
            controller,
            "undriven",
            f"{_names([layer])} is being trained, and its NoiseController is still at step {controller.step}: "
            + (
                f"with schedule={controller.schedule!r} no noise is drawn"
                if not controller._known_sigma()
                else "every step sees the same noise"
            )
            + ". Call controller.attach(optimizer) once, or controller.advance() after each optimizer.step(); with"
            " transformers.Trainer pass callbacks=[FlatLoraCallback(controller)]",
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


def _once(controller: Driven, what: str, message: str) -> None:
    if what not in controller._said:
        controller._said.add(what)
        warnings.warn(message, stacklevel=4)
