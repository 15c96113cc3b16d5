"""`Attachment`: an optimiser that moves a controller on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .roles import Driven
from .state import noise_state

STATE_KEY = "flat_lora"

attached: weakref.WeakKeyDictionary[torch.optim.Optimizer, Any] = weakref.WeakKeyDictionary()


class Attachment:
    """What `NoiseController.attach` returns. Lives as long as the optimiser, or until `remove()`."""

    def __init__(self, controller: Driven, optimizer: torch.optim.Optimizer, overlap: bool = False) -> None:
        self._controller = controller
        self._overlap = overlap
        self._loading: tuple[int, int] | None = None
        self.optimizer = weakref.ref(optimizer)
        self._held = {id(parameter) for parameter in _parameters(optimizer)}
        self._hooks = [
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._check),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._taken_over(optimizer):
            raise RuntimeError(
                "attach: expected an optimizer that still has the parameters it was attached with, got one whose"
                f" parameters have all been replaced, as deepspeed.initialize does: {_WRITES_LATER}"
            )
        # Fused optimisers are called whatever the GradScaler found, and skip the step on the device.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():
            self._controller.advance(overlap=self._overlap)

    def _taken_over(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it has none of the parameters that it had, and none that the layers have now."""
        if not self._held or any(id(parameter) in self._held for parameter in _parameters(optimizer)):
            return False
        now = {id(parameter) for parameter in _parameters(optimizer)}
        layers = self._controller._layers
        return not any(id(parameter) in now for layer in layers for parameter in layer._trained_parameters())

    def _save(self, optimizer: Any, saved: dict[str, Any]) -> None:
        saved[STATE_KEY] = self._controller.state_dict()

    def _check(self, optimizer: Any, saved: Any) -> None:
        """Before the optimiser loads, which may fail: the controller moves after it has not."""
        if not isinstance(saved, Mapping) or STATE_KEY not in saved:
            got = sorted(map(str, saved)) if isinstance(saved, Mapping) else type(saved).__name__
            raise KeyError(
                f"state_dict: expected the key {STATE_KEY!r}, because a NoiseController is attached, got"
                f" {got}; to load what was saved without one, attach after loading"
            )
        self._loading = noise_state(saved[STATE_KEY], f"state_dict[{STATE_KEY!r}]")

    def _load(self, optimizer: Any) -> None:
        if self._loading is not None:
            self._controller.move_to(*self._loading)
            self._loading = None

    def remove(self) -> None:
        """The optimiser no longer advances, saves or restores the controller. Twice is as good as once."""
        for hook in self._hooks:
            hook.remove()
        optimizer = self.optimizer()
        if optimizer is not None and attached.get(optimizer) is self:
            del attached[optimizer]
        self._controller._attachment = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


_WRITES_LATER = (
    "it steps copies, a group at a time, and the model's parameters are written after the last of these steps. Call"
    " controller.advance() after engine.step(), at the end of each accumulation; with transformers.Trainer"
    " FlatLoraCallback(controller) does"
)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """accelerate's wrapper is an Optimizer by name only: hooks belong on the one inside."""
    inner = optimizer
    for found in (optimizer, getattr(optimizer, "optimizer", None)):
        if type(found).__module__.partition(".")[0] == "deepspeed":
            raise TypeError(
                f"optimizer: expected one that writes the model's parameters in its step, got DeepSpeed's"
                f" {type(found).__name__}: {_WRITES_LATER}"
            )
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return inner
