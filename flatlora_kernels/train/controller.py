"""`NoiseController`: the seed and the strength of the noise, one of each per optimiser step."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import checks
from . import watch
from .attach import Attachment, attached, unwrapped
from .names import pattern
from .roles import Drawing
from .state import noise_state
from .steps import watch_over
from .undo import constants, undone

SCHEDULES = ("constant", "linear", "cosine")
NORMS = ("flat", "row")

_MASK64 = (1 << 64) - 1
Each = Callable[[Drawing, float | None], None]


def _mix(value: int) -> int:
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit integers."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return value - (1 << 64) if value >> 63 else value


class NoiseController:
    """Seed, step and strength of the noise of all layers of a model.

    The seed of a step is a function of (seed, step, rank) and of nothing else: torch's global generators are
    neither read nor advanced, and a resumed run draws what the interrupted one would have drawn. Kernels read
    it from a 0-d int64 tensor, one per device, that `advance` overwrites in place: nothing recompiles and
    nothing waits for the device.

    `step` counts optimiser steps: call `advance()` after each, or `attach(optimizer)` once. Until then every
    forward, recomputed or not, sees the same noise; autograd raises where a backward comes after the
    `advance()` that follows its forward.

    The tensors are no buffers of a module: DistributedDataParallel would overwrite those with rank 0's, and
    layers may sit on several devices.

    Warns, once each, where layers train without noise because their forward does not run, where adapters train and
    nobody moves the controller on, and where ``samples="batch"`` finds no batch.

    Where `advance`, an assignment or a loaded state ends in an exception (KeyboardInterrupt, out of memory), the
    controller is at the step where it was, with the noise of that step, or at the next one whole.

    Args:
        sigma: strength of the noise, a float >= 0; 0 = none. Also as `target_sigma`, which may be assigned.
        schedule: the strength at step t is sigma times 1 ("constant"), t / T ("linear"), (1 - cos(pi t / T)) / 2
            ("cosine": Li et al., Flat-LoRA, ICML 2025, arXiv 2409.14396) with T = `total_steps`, after which it
            stays at sigma; or times ``schedule(t)``.
        total_steps: optimiser steps of the whole training, whatever the number of ranks and micro-batches.
            "linear" and "cosine" need it from step 1 on; may be assigned (`FlatLoraCallback` does).
        seed: int, modulo 2**64; default `torch.initial_seed()`, the last argument of `torch.manual_seed`.
        rank: uint32. Processes with the same seed and rank draw equal noise, which is the default; pass
            `torch.distributed.get_rank()` for noise that differs. Not saved.
        sample_offset: uint32, number of the first noise sample that this process draws, for layers with
            ``samples``: 2 ranks with ``samples="batch"`` and B sequences each, at offsets 0 and B, see the
            draws that one rank with 2 B sequences sees. May be assigned. Not saved.
        keep_perturbed: layers keep the ``W + eps`` of a step, which its first forward makes, for all its micro-batches,
            and do not draw in each. That takes another copy of each weight, in the type that it is multiplied in, and
            pays with many micro-batches, see docs/guide.md. For frozen, whole, dense weights with ``samples=1`` alone;
            a break in the graph of `torch.compile`. May be assigned; False frees the copies. Not saved.
        norm: "flat", std of eps in row n ``sigma / sqrt(in_features) ||W'_n||`` (Flat-LoRA), or "row",
            ``sigma ||W'_n||`` (the filter-wise noise of LPF-SGD, arXiv 2201.08025, and RWP, arXiv 2404.00357).
        expect_unused: layers that a step may leave out, such as experts, without a warning: a regular expression for
            the whole name of one or of a module around it, or names or their dotted ends, as in PEFT.
    """

    def __init__(
        self,
        *,
        sigma: float = 0.05,
        schedule: str | Callable[[int], float] = "constant",
        total_steps: int | None = None,
        seed: int | None = None,
        rank: int = 0,
        sample_offset: int = 0,
        keep_perturbed: bool = False,
        norm: str = "flat",
        expect_unused: str | Iterable[str] = (),
    ) -> None:
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"seed: expected an int or None, got {type(seed).__name__}")
        checks.uint32("rank", rank)
        checks.uint32("sample_offset", sample_offset)
        if norm not in NORMS:
            raise ValueError(f"norm: expected {' or '.join(map(repr, NORMS))}, got {norm!r}")
        if not callable(schedule) and schedule not in SCHEDULES:
            names = ", ".join(map(repr, SCHEDULES))
            raise ValueError(f"schedule: expected {names} or a function of the step, got {schedule!r}")
        self.base = (torch.initial_seed() if seed is None else seed) & _MASK64
        self.step = 0
        self._rank = rank
        self.sample_offset = sample_offset
        self._keep_perturbed = _checked_keep(keep_perturbed)
        self._norm = norm
        self._schedule = schedule
        self._target_sigma = _checked_sigma(sigma)
        self._total_steps = _checked_total(total_steps)
        self.expect_unused = pattern(expect_unused)
        self._driven = False  # whether it was ever attached or advanced
        self._several = False  # whether samples="batch" ever was more than one
        self._said: set[str] = set()  # what was warned of
        self._undriven: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._off: set[object] = set()  # the disabled() that are open
        self._tensors: dict[torch.device, Tensor] = {}
        # In the order of their coming, in which ranks that hold shards talk to each other.
        self._layers: weakref.WeakKeyDictionary[Drawing, None] = weakref.WeakKeyDictionary()
        self._attachment: weakref.ref[Attachment] | None = None
        watch_over(self)

    @property
    def layers(self) -> tuple[Drawing, ...]:
        """The living layers that draw with this controller, by stream. Held weakly."""
        return tuple(sorted(self._layers, key=lambda layer: layer.stream))

    @property
    def value(self) -> int:
        """The seed of this step, 0 <= value < 2**64."""
        return _mix(_mix(_mix(self.base) + self.step) + self.rank)

    def tensor(self, device: torch.device | str) -> Tensor:
        """The seed of this step as a 0-d int64 tensor on `device`; the same tensor for every step."""
        device = torch.device(device)
        if device not in self._tensors:
            with constants():
                self._tensors[device] = torch.full((), signed(self.value), dtype=torch.int64, device=device)
        return self._tensors[device]

    @property
    def rank(self) -> int:
        """May be assigned: the present step's noise becomes that of the new rank."""
        return self._rank

    @rank.setter
    def rank(self, value: int) -> None:
        checks.uint32("rank", value)
        self._change(_rank=value)

    @property
    def keep_perturbed(self) -> bool:
        """Whether layers keep the W + eps of a step. May be assigned.

        Raises:
            ValueError: True for a layer that cannot; nothing has changed.
        """
        return self._keep_perturbed

    @keep_perturbed.setter
    def keep_perturbed(self, value: bool) -> None:
        _checked_keep(value)
        for layer in self._layers:
            layer._keep(value)
        self._keep_perturbed = value

    @property
    def norm(self) -> str:
        return self._norm

    @property
    def schedule(self) -> str | Callable[[int], float]:
        return self._schedule

    @property
    def target_sigma(self) -> float:
        """The strength that the schedule ends at. Assigning it reads no weight, unless it leaves 0."""
        return self._target_sigma

    @target_sigma.setter
    def target_sigma(self, value: float) -> None:
        self._change(_target_sigma=_checked_sigma(value))

    @property
    def total_steps(self) -> int | None:
        return self._total_steps

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        self._change(_total_steps=_checked_total(value))

    @property
    def sigma(self) -> float:
        """The strength of this step, ``sigma_at(step)``."""
        return self.sigma_at(self.step)

    def sigma_at(self, step: int) -> float:
        """The strength of the noise in optimiser step `step`, counted from 0.

        Raises:
            ValueError: the schedule needs `total_steps`, which is None, or a schedule of your own gives no
                finite factor >= 0.
        """
        if callable(self.schedule):
            factor = self.schedule(step)
            if not 0 <= factor < math.inf:
                raise ValueError(f"schedule: expected a finite factor >= 0 at step {step}, got {factor}")
            return float(self._target_sigma * factor)
        if self.schedule == "constant" or not self._target_sigma:
            return self._target_sigma
        if step <= 0:
            return 0.0
        if self._total_steps is None:
            raise ValueError(
                f"total_steps: expected an int >= 1 with schedule={self.schedule!r} at step {step}, got None; pass it"
                " to NoiseController, assign it, or use FlatLoraCallback with transformers.Trainer"
            )
        if step >= self._total_steps:
            return self._target_sigma
        progress = step / self._total_steps
        if self.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self._target_sigma * progress

    @property
    def active(self) -> bool:
        """Whether layers in training mode draw noise now."""
        return not self._off and self.sigma > 0

    def advance(self, *, overlap: bool = False) -> None:
        """Go to the next optimiser step: new seed, new sigma, and every layer's `noise_scale` from its weights of now.

        Reads each layer's weight once (not at ``sigma = 0``), and nothing back to the host.

        Args:
            overlap: on a GPU, read the weights on a stream of its own, beside the forward pass that follows; each
                layer waits for its own `noise_scale` only. Not for passes that are replayed as a CUDA graph, which
                would not wait, and a break in the graph of `torch.compile`.
        """
        self.sigma_at(self.step + 1)  # raises before anything has moved
        self._driven = True
        layers = tuple(self._layers)
        if self.active:
            watch.idle(self)
        self._change(lambda layer, sigma: layer._renew(sigma, overlap=overlap), step=self.step + 1)
        for layer in layers:  # past nn.Module.__setattr__, as in layer.py
            layer.__dict__.update(_called=False, _bypassed=False)

    def attach(self, optimizer: torch.optim.Optimizer, *, overlap: bool = False) -> Attachment:
        """Let `optimizer` drive this controller: `advance()` after each step that it takes.

        A step that a GradScaler skips advances nothing (with a fused optimiser under a GradScaler, finding that
        out reads one number back per step). (seed, step) travel in ``optimizer.state_dict()["flat_lora"]``.
        With several optimisers, attach to the one that steps last. A copy of the optimiser is not attached.

        Args:
            optimizer: torch's, or accelerate's wrapper around one.
            overlap: see `advance`.

        Returns:
            A handle with `remove()`; as a context manager, it is removed at the end of the block.

        Raises:
            RuntimeError: the controller is attached already, or the optimiser has a controller.
        """
        optimizer = unwrapped(optimizer)
        if self.attached:
            raise RuntimeError(
                "attach: this controller is attached to an optimizer already; remove() that handle"
            )
        if optimizer in attached:
            raise RuntimeError("attach: optimizer has another NoiseController already; remove() its handle")
        attachment = Attachment(self, optimizer, overlap)
        self._attachment = weakref.ref(attachment)
        attached[optimizer] = attachment
        self._driven = True
        return attachment

    @property
    def attached(self) -> bool:
        """Whether an optimiser that still exists advances this controller."""
        attachment = None if self._attachment is None else self._attachment()
        return attachment is not None and attachment.optimizer() is not None

    def state_dict(self) -> dict[str, int]:
        """`base` (the seed given, uint64) and `step`: all that the noise depends on but the settings."""
        return {"base": self.base, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved step; sigma, schedule, total_steps, rank and sample_offset stay those given here.

        Raises:
            KeyError, TypeError, ValueError: `state` is not of `state_dict()`; nothing has moved.
        """
        self.move_to(*noise_state(state))

    def move_to(self, base: int, step: int) -> None:
        """To this seed and step, in every layer; reads no weight unless sigma leaves 0."""
        if (base, step) != (self.base, self.step):
            self._change(base=base, step=step)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """No noise inside, even in training mode; what was before comes back, also after an exception.

        A backward that computes a forward again (gradient checkpointing) belongs inside as well.
        """
        token = object()
        with undone(lambda: self._off.discard(token)):
            self._off.add(token)
            yield

    def _change(self, each: Each | None = None, **settings: Any) -> None:
        """Take over settings, and have tensors and layers follow; all of it, or where something raises nothing."""
        before = {name: self.__dict__[name] for name in settings}
        try:
            self.__dict__.update(settings)
            self._follow(each)
        except BaseException:
            self.__dict__.update(before)
            self._follow()
            raise

    def _follow(self, each: Each | None = None) -> None:
        """Tensors and layers as the settings say; `each` is done with each layer and sigma, by default rescaling."""
        with constants():
            for tensor in self._tensors.values():
                tensor.fill_(signed(self.value))
            sigma = self._known_sigma()
            for layer in self._layers:
                if each is None:
                    layer._rescale(sigma)
                else:
                    each(layer, sigma)

    def strength(self) -> str:
        """The present sigma and the target, "0.01 of 0.05", for people; "?" before total_steps is known."""
        sigma = self._known_sigma()
        present = "?" if sigma is None else f"{sigma:.6g}"
        return present if sigma == self._target_sigma else f"{present} of {self._target_sigma:.6g}"

    def _known_sigma(self) -> float | None:
        """`sigma`, None where total_steps is still to come."""
        unknown = (
            self._total_steps is None
            and self.schedule in ("linear", "cosine")
            and self.step > 0
            and self._target_sigma
        )
        return None if unknown else self.sigma

    def _stream_for(self, layer: Drawing) -> int:
        """That of a layer with the very same base weight, else the next that is free."""
        weight = layer._base_parameter()
        others = [other for other in self._layers if other is not layer]
        for other in others:
            if other._base_parameter() is weight:
                return other.stream
        return max((other.stream + other.stream_count for other in others), default=0)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_off", "_tensors", "_layers", "_attachment", "_undriven")  # of this object and this process
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(
            state, _off=set(), _tensors={}, _layers=weakref.WeakKeyDictionary(), _attachment=None
        )
        self._undriven = weakref.WeakKeyDictionary()
        watch_over(self)

    def __repr__(self) -> str:
        total = "" if self._total_steps is None else f" of {self._total_steps}"
        settings = "".join(
            f", {name}={value!r}"
            for name, value, default in (
                ("rank", self._rank, 0),
                ("sample_offset", self.sample_offset, 0),
                ("keep_perturbed", self._keep_perturbed, False),
                ("norm", self._norm, "flat"),
            )
            if value != default
        )
        off = ", disabled" if self._off else ""
        return (
            f"NoiseController(sigma={self.strength()}, schedule={self._schedule!r},"
            f" step={self.step}{total}, seed={self.base}{settings}, layers={len(self._layers)}{off})"
        )


def _checked_sigma(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"sigma: expected a float, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"sigma: expected a finite float >= 0, got {value}")
    return float(value)


def _checked_keep(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"keep_perturbed: expected a bool, got {type(value).__name__}")
    return value


def _checked_total(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"total_steps: expected an int or None, got {type(value).__name__}")
    if value is not None and value < 1:
        raise ValueError(f"total_steps: expected an int >= 1, got {value}")
    return value
