"""`FlatLoraCallback`: the noise's lifecycle in a `transformers.Trainer`.

    controller = apply_flat_lora(model, ["q_proj", "v_proj"], sigma=0.05, schedule="cosine")
    Trainer(model, arguments, train_dataset=data, callbacks=[FlatLoraCallback(controller)]).train()

The controller needs no number of steps: the callback gives it the Trainer's.
"""

from __future__ import annotations

from typing import Any

from ..train.controller import NoiseController
from ..train.layer import NoisyLayer

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as error:
    raise ImportError(
        "flatlora_kernels.integrations.transformers needs the package transformers (pip install transformers)"
    ) from error


class FlatLoraCallback(TrainerCallback, ExportableState):  # type: ignore[misc, unused-ignore]
    """Advances the controller once per optimiser step, whatever the accumulation and the number of processes.

    At the begin of training it goes to the Trainer's step (0, or the checkpoint's), and gives the schedule the
    Trainer's number of steps where the controller has no `total_steps` of its own. Its state is in the checkpoint's
    trainer_state.json: a resumed run draws what the interrupted one would have drawn, whatever seed it was given.
    Steps that a GradScaler skips advance nothing.

    Args:
        controller: default the one that the noisy layers of the Trainer's model share. Where it is attached to the
            optimiser, the callback leaves advancing to that.
        overlap: see `NoiseController.advance`.

    Raises:
        ValueError: at the begin of training: the model's layers share no controller, or there are two of these
            callbacks.
    """

    def __init__(self, controller: NoiseController | None = None, *, overlap: bool = False) -> None:
        if controller is not None and not isinstance(controller, NoiseController):
            raise TypeError(f"controller: expected a NoiseController, got {type(controller).__name__}")
        self.controller = controller
        self.overlap = overlap
        self.saved: dict[str, int] | None = None
        self._assigned: int | None = None

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint."""
        saved = None if self.controller is None else self.controller.state_dict()
        return {"args": {"overlap": self.overlap}, "attributes": {"saved": saved}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.controller is None:
            self.controller = _shared_controller(model)
        controller, name = self.controller, type(self).__name__
        exported = state.stateful_callbacks.get(name)
        if isinstance(exported, list):
            raise ValueError(f"callbacks: expected one {name}, got {len(exported)}")
        if controller.total_steps in (None, self._assigned):
            controller.total_steps = self._assigned = state.max_steps
        saved = exported["attributes"]["saved"] if exported and state.global_step else None
        controller.load_state_dict(saved or {"base": controller.base, "step": state.global_step})
        # The Trainer fails to save the state of a callback that the checkpoint did not know.
        state.stateful_callbacks[name] = self.state()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.controller is None:
            raise RuntimeError(f"{type(self).__name__}: expected on_train_begin before on_step_end")
        if not self.controller.attached and not getattr(optimizer, "step_was_skipped", False):
            self.controller.advance(overlap=self.overlap)


def _shared_controller(model: Any) -> NoiseController:
    layers = [m for m in model.modules() if isinstance(m, NoisyLayer)]
    controllers = {id(layer.noise_controller): layer.noise_controller for layer in layers}
    if len(controllers) != 1:
        raise ValueError(
            f"model: expected noisy layers that share one NoiseController, got {len(layers)} layers with"
            f" {len(controllers)}; see apply_flat_lora"
        )
    (controller,) = controllers.values()
    return controller
