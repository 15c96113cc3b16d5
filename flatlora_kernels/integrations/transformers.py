"""`FlatLoraCallback`: the noise's lifecycle in a `transformers.Trainer`.

    controller = apply_flat_lora(model, ["q_proj", "v_proj"], sigma=0.05, schedule="cosine")
    Trainer(model, arguments, train_dataset=data, callbacks=[FlatLoraCallback(controller)]).train()

The controller needs no number of steps: the callback gives it the Trainer's. Where the PEFT model is made inside, the
callback converts it: ``SFTTrainer(..., peft_config=config, callbacks=[FlatLoraCallback(sigma=0.05)])``.

Importing this module adds one callback to those that every Trainer begins with. It does nothing but put the two numbers
of the noise into the logs of a Trainer that has a `FlatLoraCallback`.
"""

from __future__ import annotations

import inspect
import json
import weakref
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..train.controller import NoiseController
from ..train.layer import NoisyLayer, check_noise_options, shared_controller
from ..train.state import noise_state

try:
    from transformers.trainer import DEFAULT_CALLBACKS
    from transformers.trainer_callback import ExportableState, TrainerCallback
    from transformers.utils import logging
except ImportError as error:
    raise ImportError(
        "flatlora_kernels.integrations.transformers needs the package transformers (pip install transformers)"
    ) from error

logger = logging.get_logger(f"transformers.{__name__}")  # has the handlers and the verbosity of transformers


class FlatLoraCallback(TrainerCallback, ExportableState):  # type: ignore[misc, unused-ignore]
    """Advances the controller once per optimiser step, whatever the accumulation and the number of processes.

    At the begin of training it goes to the Trainer's step (0, or the checkpoint's), and gives the schedule the
    Trainer's number of steps where the controller has no `total_steps` of its own. Its state is in the checkpoint's
    trainer_state.json: a resumed run draws what the interrupted one would have drawn, whatever seed it was given.
    Steps that a GradScaler skips advance nothing.

    Every log with a "loss" also has "flat_lora/sigma" and "flat_lora/seed_step": the strength of the noise (0 while
    it is disabled) and the controller's step in the optimiser step that has just been taken, the last of those that
    the loss is the mean of. At the end of training it says so where the model is left in training mode with noise.

    Args:
        controller: default the one that the noisy layers of the Trainer's model share. Where it is attached to the
            optimiser, the callback leaves advancing to that.
        overlap: see `NoiseController.advance`.
        settings: instead of a controller, keyword arguments of `integrations.peft.apply_flat_lora`, which is called on
            the Trainer's model at the begin of training.

    Raises:
        TypeError, ValueError: settings that `apply_flat_lora` does not take, or beside a controller.
        ValueError: at the begin of training: the model's layers share no controller, none of them draws with
            `controller`, or some draw with another that nothing advances; there is nothing of PEFT's to convert; or
            there are two of these callbacks.
    """

    def __init__(
        self, controller: NoiseController | None = None, *, overlap: bool = False, **settings: Any
    ) -> None:
        if controller is not None and not isinstance(controller, NoiseController):
            raise TypeError(f"controller: expected a NoiseController, got {type(controller).__name__}")
        if controller is not None and settings:
            raise ValueError(
                f"controller: expected None beside {', '.join(settings)}, which are for a model that the callback"
                f" converts, got {controller!r}"
            )
        self.controller = controller
        self.overlap = overlap
        self.settings = _checked(settings)
        self.saved: dict[str, int] | None = None
        self.not_saved: list[str] = []
        self._given = controller is not None
        self._converted: weakref.ref[nn.Module] | None = None
        self._assigned: int | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint."""
        saved = None if self.controller is None else self.controller.state_dict()
        kept = {name: value for name, value in self.settings.items() if _fits_json(value)}
        return {
            "args": {"overlap": self.overlap, **kept},
            "attributes": {"saved": saved, "not_saved": sorted(self.settings.keys() - kept)},
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        name = type(self).__name__
        exported = state.stateful_callbacks.get(name)
        if isinstance(exported, list):
            raise ValueError(f"callbacks: expected one {name}, got {len(exported)}")
        self.controller = controller = self._controller_of(_unwrapped(model))
        if controller.total_steps in (None, self._assigned):
            controller.total_steps = self._assigned = state.max_steps
        moment = _saved(exported, name) if exported and state.global_step else None
        controller.move_to(*(moment or (controller.base, state.global_step)))
        # The Trainer fails to save the state of a callback that the checkpoint did not know.
        state.stateful_callbacks[name] = self.state()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        controller = self._running()
        if args.report_to and not hasattr(state, "flat_lora"):
            logger.warning(
                f"{type(self).__name__}: {', '.join(args.report_to)} will miss flat_lora/sigma, because this Trainer"
                f" was made before {__name__} was imported"
            )
        # No field of TrainerState, so that it is not saved.
        state.flat_lora = {
            "flat_lora/sigma": controller.sigma if controller.active else 0.0,
            "flat_lora/seed_step": controller.step,
        }

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        controller = self._running()
        if not controller.attached and not getattr(optimizer, "step_was_skipped", False):
            controller.advance(overlap=self.overlap)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        _log_noise(state, logs)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        controller = self._running()
        noisy = controller.active and any(layer.training for layer in _noisy_layers(model))
        if noisy and state.is_world_process_zero:
            logger.warning(
                f"{type(self).__name__}: the model is left in training mode and still draws noise (sigma ="
                f" {controller.sigma:.4g}); call model.eval() before you generate or evaluate"
            )

    def _running(self) -> NoiseController:
        if self.controller is None:
            raise RuntimeError(f"{type(self).__name__}: expected on_train_begin first, got no controller")
        return self.controller

    def _controller_of(self, model: nn.Module) -> NoiseController:
        if self.not_saved:
            raise ValueError(
                f"{', '.join(self.not_saved)}: expected values that fit into a checkpoint, because"
                " restore_callback_states_from_checkpoint makes the callback anew from there; leave that off, or"
                " convert the model before and pass its controller"
            )
        controller = self.controller if self._given else None
        if self.settings:
            if self._converted is None or self._converted() is not model:
                self.controller = _convert(model, self.settings)
                self._converted = weakref.ref(model)
            controller = self.controller
        return _checked_controller(model, controller)


class _LogFirst(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Trackers read the log each in its turn, most of them before `FlatLoraCallback` has its own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.flat_lora = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        _log_noise(state, logs)


DEFAULT_CALLBACKS.append(_LogFirst)  # a Trainer's order: these, the trackers, the user's own


def _saved(exported: Any, name: str) -> tuple[int, int] | None:
    """(base, step) of what `state` wrote into a checkpoint; None where training had not begun."""
    where = f"trainer_state.json: stateful_callbacks[{name!r}]"
    attributes = exported.get("attributes") if isinstance(exported, dict) else None
    if not isinstance(attributes, dict) or "saved" not in attributes:
        raise ValueError(f"{where}: expected attributes with 'saved', got {str(exported)[:80]}")
    return attributes["saved"] and noise_state(attributes["saved"], where)


def _log_noise(state: Any, logs: dict[str, Any] | None) -> None:
    """Into the log and its copy in the history."""
    noise = getattr(state, "flat_lora", None)
    if noise and logs and "loss" in logs:
        logs.update(noise)
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(noise)


def _unwrapped(model: Any) -> nn.Module:
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile's
            model = model._orig_mod
        else:
            return model


def _noisy_layers(model: nn.Module) -> list[NoisyLayer]:
    return [module for module in model.modules() if isinstance(module, NoisyLayer)]


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of `apply_flat_lora`, looked at before anything is loaded or tokenised."""
    if not settings:
        return {}
    from .peft import apply_flat_lora

    known = [*inspect.signature(apply_flat_lora).parameters.values()]
    known += inspect.signature(NoisyLayer._set_up_noise).parameters.values()
    names = {p.name for p in known if p.kind is p.KEYWORD_ONLY} - {"stream"}
    for name in settings:
        if name not in names:
            raise TypeError(f"{name}: expected one of {', '.join(sorted(names))}, got an unknown name")
    given = settings.get("noise_controller")
    if given is not None and not isinstance(given, NoiseController):
        raise TypeError(f"noise_controller: expected a NoiseController, got {type(given).__name__}")
    check_noise_options(None, settings.get("noise", "gaussian"), settings.get("samples", 1))
    of_controller = inspect.signature(NoiseController).parameters
    NoiseController(**{n: v for n, v in settings.items() if n in of_controller and v is not None})
    exclude = settings.get("exclude_modules", ())
    return {**settings, "exclude_modules": exclude if isinstance(exclude, str) else list(exclude)}


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _convert(model: nn.Module, settings: dict[str, Any]) -> NoiseController:
    from peft.tuners.lora import LoraLayer

    from .peft import apply_flat_lora

    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError(
            f"model: expected a model with PEFT's LoRA layers, because FlatLoraCallback({', '.join(settings)}) converts"
            f" these, got {type(model).__name__} without; any other model has to be converted by"
            " flatlora_kernels.apply_flat_lora before its Trainer is made: FlatLoraCallback(controller)"
        )
    return apply_flat_lora(model, **settings)


def _checked_controller(model: nn.Module, controller: NoiseController | None) -> NoiseController:
    """`controller`, or the one that the noisy layers of `model` share, if advancing it moves all noise of the model."""
    layers = _noisy_layers(model)
    if controller is None:
        return shared_controller(layers)
    found = {id(layer.noise_controller): layer.noise_controller for layer in layers}
    others = ", ".join(map(repr, (c for c in found.values() if c is not controller and not c.attached)))
    if id(controller) in found and not others:
        return controller
    of_it = sum(layer.noise_controller is controller for layer in layers)
    raise ValueError(
        f"controller: expected the one that the noisy layers of the Trainer's model draw with, got {controller!r}; of"
        f" {len(layers)} noisy layers of this {type(model).__name__}, {of_it} draw with it"
        + (f", the others with {others}" if others else "")
    )
