"""`NoisyLayer`: what a layer with weight noise holds and does besides its product."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.autocast import autocasts
from ..core.noise import KINDS
from ..core.quantized import QuantizedWeight
from ..core.records import Weight
from ..op import checks
from ..op.functional import flat_noise_scale, perturb_weight
from ..op.sharded import is_sharded
from . import packed, watch, zero
from .controller import NoiseController
from .stamps import Stamps, stamps, unchanged
from .steps import wait_for
from .streams import beside
from .undo import constants, undone

Self = TypeVar("Self", bound="NoisyLayer")


class NoisyLayer(nn.Module):
    """A linear layer whose forward passes ``**self.noise_arguments(x)`` to `fused_flat_lora_linear`.

    A mixin: subclasses implement `_weight_in_use`, call `_set_up_noise` once their parameters exist, and may be
    made of existing modules by assigning `__class__`. Nothing of it is in the state dict.

    `noise_scale`, the std of eps per row, is computed from the weights by `NoiseController.advance`, and anew by
    the next forward in training mode that finds other parameters or other values in them (replaced, loaded,
    moved, written in place; not while `torch.compile` traces, and not what is written through `.data` or by a fused
    optimiser). It is that of the whole layer on every rank. Of weights that are DTensors, ranks measure their shards;
    those that are whole within a forward alone (FSDP1, DeepSpeed's ZeRO stage 3) are measured by the first forward of a
    step, and no forward finds other values in them by itself.

    Subclasses whose forward gives the op what `_seen` returns set `_can_keep`: the controller's `keep_perturbed` is
    for them.
    """

    noise_controller: NoiseController
    noise: str = "gaussian"
    stream: int = 0
    stream_count: int = 1  # of a mixture of experts, one for each: stream, stream + 1, ...
    samples: int | str = 1
    antithetic: bool = False
    strategy: str | None = None
    noise_accum: str | None = None
    backend: str | None = None
    noise_scale: Tensor | None = None  # (N,) float32, of a mixture (E, N); None at sigma = 0
    # A second adapter ((r2, K), (N, r2)) beside the first, in training mode; set only while a method steps.
    auxiliary: tuple[Tensor, Tensor] | None = None
    flat_lora_name: str = ""  # in the model, for messages
    _unit_scale: Tensor | None = None  # noise_scale at sigma = 1
    _ready: torch.cuda.Event | None = None  # both are, where another stream computes them
    _weight_dim: int = 2
    _scaled: Stamps | None = None  # what _unit_scale was computed from
    _gathered: bool = False  # whether only forwards have its parameters; the first of a step measures them
    _reading: packed.Reading | None = None  # of a packed weight that another layer owns
    _can_keep: bool = False
    _kept: tuple[Tensor, Stamps] | None = None  # W + eps of this step, and what it was made from
    _seed: Tensor
    _called: bool = False  # see roles.py
    _bypassed: bool = False
    _captured: bool = False

    def _weight_in_use(self) -> tuple[Weight, Tensor | None, Tensor | None, float]:
        """weight (N, K), lora_A (r, K), lora_B (N, r), scaling: what the norms are made from.

        Each with E before its dimensions where the layer is a mixture of experts.
        """
        raise NotImplementedError

    def _norm_sources(self) -> tuple[Any, ...]:
        """Parameters and numbers that decide the norms, the base weight first; cheap, asked by each forward."""
        return self._weight_in_use()

    def _base_parameter(self) -> Tensor:
        """Layers in which this is one and the same tensor are tied, and share a stream."""
        parameter: Tensor = self._norm_sources()[0]
        return parameter

    def _packed_weight(self, owner: nn.Module) -> QuantizedWeight:
        """That of `owner`, as it is now."""
        reading = packed.read(owner, self._reading)
        if reading is not self._reading:
            self.__dict__["_reading"] = reading
        return reading.weight

    def _set_up_noise(
        self,
        noise_controller: NoiseController,
        *,
        stream: int | None = None,
        noise: str = "gaussian",
        samples: int | str = 1,
        antithetic: bool = False,
        strategy: str | None = None,
        noise_accum: str | None = None,
        backend: str | None = None,
    ) -> None:
        """Begin to draw. `stream` None: that of a tied layer, else the next one free at the controller."""
        check_noise_options(stream, noise, samples)
        self.noise_controller = noise_controller
        self.noise, self.samples, self.antithetic = noise, samples, antithetic
        self.strategy, self.noise_accum, self.backend = strategy, noise_accum, backend
        self.stream = noise_controller._stream_for(self) if stream is None else stream
        self.__dict__.update(_called=False, _bypassed=False)
        self.refresh_noise_scale()

    def _remove_noise(self) -> None:
        """The controller forgets the layer, and the layer what `_set_up_noise` gave it."""
        self.noise_controller._layers.pop(self, None)
        for name in (*_SETTINGS, *_OWN):
            self.__dict__.pop(name, None)

    def noise_arguments(self, x: Tensor) -> dict[str, Any]:
        """Keyword arguments of `fused_flat_lora_linear` for an input `x` (..., K).

        "noise_scale" is among them exactly where noise is drawn: in training mode, at sigma > 0, outside
        `NoiseController.disabled`.
        """
        controller = self.noise_controller
        self._note_call(x)
        draws = self._draws() and not controller._off
        if draws:
            if not torch.compiler.is_compiling():
                self._refresh_if_stale()
            elif self._gathered:
                self._measure_gathered()
        if not draws or self.noise_scale is None:
            return {"strategy": self.strategy, "noise_accum": self.noise_accum, "backend": self.backend}
        samples: Any = self.samples
        if samples == "batch":
            samples = x.shape[0] if x.dim() > 1 else 1
            if not torch.compiler.is_compiling() and not controller._several:
                controller._several = samples > 1
                if samples == 1:
                    watch.one_sample(controller, x.shape)
        return {
            "strategy": self.strategy,
            "noise_accum": self.noise_accum,
            "backend": self.backend,
            "seed": self._seed,
            "stream": self.stream,
            "noise": self.noise,
            "noise_scale": self.noise_scale,
            "samples": samples,
            "sample_offset": controller.sample_offset,
            "antithetic": self.antithetic,
        }

    def _seen(self, weight: Weight, noise: dict[str, Any]) -> tuple[Weight, dict[str, Any]]:
        """What the op is given: these, or with `keep_perturbed` ``W + eps`` and no draw.

        In the place of `noise_arguments` others draw (`instead_of_noise`), and go on doing so.
        """
        keeps = self.noise_controller.keep_perturbed and "noise_scale" in noise
        if not keeps or "noise_arguments" in self.__dict__:
            return weight, noise
        kept = self._kept_in_a_break if torch.compiler.is_compiling() else self._kept_weight
        return kept(weight, noise), {name: noise[name] for name in ("strategy", "noise_accum", "backend")}

    def _kept_in_a_break(self, weight: Any, noise: dict[str, Any]) -> Tensor:
        """Of the graph of `torch.compile`."""
        kept: Tensor = torch.compiler.disable(self._kept_weight)(weight, noise)
        return kept

    # As torch.compiler.disable does, which imports triton.
    _kept_in_a_break._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _kept_weight(self, weight: Any, noise: dict[str, Any]) -> Tensor:
        """``W + eps`` in the type of the product, made by the first forward that finds other noise than the last."""
        device_type, dtype = weight.device.type, weight.dtype
        if autocasts(device_type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        sources = dtype, *noise.values()
        if self._kept is not None and unchanged(sources, self._kept[1]):
            return self._kept[0]
        self._keep(True)  # frees the last before there is the next
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "keep_perturbed: expected no capture of a CUDA graph, which would go on reading the W + eps of one"
                " step; assign controller.keep_perturbed = False before"
            )
        draw = {
            name: noise[name] for name in ("noise_scale", "seed", "stream", "noise", "antithetic", "backend")
        }
        with constants():
            kept = perturb_weight(weight.detach().to(dtype), sample=noise["sample_offset"], **draw)
        self.__dict__["_kept"] = kept, stamps(sources)
        return kept

    def _keep(self, keep: bool) -> None:
        """`keep_perturbed` may be assigned; what was kept is freed.

        Raises:
            ValueError: one ``W + eps`` cannot stand for the noise of a whole step.
        """
        self.__dict__["_kept"] = None
        if not keep:
            return
        weight: Any = self._base_parameter()
        obstacle = None
        if not self._can_keep:
            obstacle = f"a {type(self).__name__}, which draws in each call"
        elif self.samples != 1:
            obstacle = f"samples={self.samples!r}, each of which has a W + eps of its own"
        elif self.noise_accum == "split" or self.strategy == "transform":
            given = {"noise_accum": self.noise_accum, "strategy": self.strategy}
            obstacle = f"{given}, with which eps is not added to W"
        elif isinstance(self._weight_in_use()[0], QuantizedWeight):
            obstacle = "a packed weight, beside which a dense one would take several times its memory"
        elif is_sharded(weight) or self._gathered or zero.shared_out(weight):
            obstacle = "a weight that is shared out among processes"
        elif weight.requires_grad:
            obstacle = "a weight that trains, to which W + eps would pass on no gradient"
        if obstacle is not None:
            raise ValueError(
                "keep_perturbed: expected True for frozen, whole, dense weights that see one draw in a step alone, got"
                f" {obstacle}, in {self.flat_lora_name or type(self).__name__}"
            )

    def describe_noise(self) -> str:
        """``sigma=0.01 of 0.05, noise=gaussian, stream=3``, for `extra_repr`: the present strength and the target."""
        return f"sigma={self.noise_controller.strength()}, noise={self.noise}, stream={self.stream}"

    def _with_auxiliary(
        self, lora_A: Tensor | None, lora_B: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The adapter that the op is given: with `auxiliary` in training mode, both as one of rank r + r2."""
        if self.auxiliary is None or not self.training:
            return lora_A, lora_B
        A, B = self.auxiliary
        if lora_A is None or lora_B is None:
            return A, B
        return torch.cat((lora_A, A.to(lora_A.dtype))), torch.cat((lora_B, B.to(lora_B.dtype)), 1)

    def _draws(self) -> bool:
        """Whether this forward has noise where the controller wants any."""
        return self.training

    def _example(self, x: Tensor) -> Tensor:
        """The layer's product of an `x` (..., K), for `warm_up`."""
        y: Tensor = self.forward(x)
        return y

    def _note_call(self, x: Tensor) -> None:
        """That the forward runs; and it waits for the norms, also where it does not use them: what follows it may
        write to what they are computed from."""
        if torch.compiler.is_compiling():
            self._called = True
            return
        # Past nn.Module.__setattr__, which takes 4 us. A captured graph runs without this line.
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            self.__dict__["_captured"] = True
        self.__dict__["_called"] = True
        if self._ready is not None:
            self._wait_until_ready()

    def refresh_noise_scale(self, *, overlap: bool = False) -> None:
        """Compute `noise_scale` from the present weights: one read of W, none at ``sigma = 0``.

        Args:
            overlap: see `NoiseController.advance`.
        """
        with constants():
            self._renew(self.noise_controller._known_sigma(), overlap=overlap)

    def _renew(self, sigma: float | None, *, overlap: bool = False) -> None:
        """`noise_scale` from the present weights. Called within `constants`."""
        if self.noise_controller.keep_perturbed:
            self._keep(True)
        if zero.away(self._norm_sources()):
            self._postpone(sigma)
            return
        weight, lora_A, lora_B, scaling = self._weight_in_use()
        # FSDP1 leaves flat parts.
        if any(t is not None and len(t.shape) != self._weight_dim for t in (weight, lora_A, lora_B)):
            self._postpone(sigma)
            return
        if overlap and weight.device.type == "cuda":
            with beside(weight.device, "noise_scale") as side:
                try:
                    self._renew(sigma)
                finally:
                    self.__dict__["_ready"] = side.record_event()
            wait_for(self)
            return
        self._wait_until_ready()
        self._attach(weight.device)
        if not sigma:
            unit = None
        elif weight.is_meta:
            unit = torch.empty(weight.shape[:-1], device="meta")
        else:
            in_features = 1 if self.noise_controller.norm == "row" else None
            unit = self._unit_noise_scale(weight, lora_A, lora_B, scaling, in_features)
        seen = stamps(self._norm_sources())
        # Past nn.Module.__setattr__, which takes 4 us for each. An interrupt before the end leaves the layer stale.
        self.__dict__.update(_ready=None, _unit_scale=unit, _scaled=None)
        self._multiply(sigma)
        self.__dict__["_scaled"] = seen

    def _postpone(self, sigma: float | None) -> None:
        """Leave the norms to the next forward that draws: the parameters are with other processes."""
        self._attach(self._base_parameter().device)
        self.__dict__.update(_scaled=None, _gathered=True)
        self._multiply(sigma)

    def _unit_noise_scale(
        self,
        weight: Weight,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        in_features: int | None,
    ) -> Tensor:
        """`noise_scale` at sigma = 1, of what `_weight_in_use` gives."""
        return flat_noise_scale(
            weight,
            lora_A,
            lora_B,
            scaling=scaling,
            sigma=1.0,
            in_features=in_features,
            backend=self.backend,
        )

    def _rescale(self, sigma: float | None) -> None:
        """`noise_scale` from the norms known, for this strength. Called within `constants`."""
        if sigma and self._unit_scale is None:
            self._renew(sigma)
        else:
            self._wait_until_ready()
            self._multiply(sigma)
            if self._gathered or zero.shared_out(self._base_parameter()):
                # A checkpoint may have been loaded, which nothing else tells.
                self.__dict__.update(_scaled=None, _gathered=True)

    def _multiply(self, sigma: float | None) -> None:
        if self._kept is not None:
            self.__dict__["_kept"] = None
        scale, unit = self.noise_scale, self._unit_scale
        if not sigma or unit is None:
            self.noise_scale = None
        elif (
            scale is None or scale.device != unit.device or scale.shape != unit.shape or scale.is_inference()
        ):
            self.noise_scale = unit * sigma
        else:  # in place: compiled graphs keep their input, and a backward that comes too late is noticed
            torch.mul(unit, sigma, out=scale)

    def _refresh_if_stale(self) -> None:
        if not self.noise_controller.sigma:
            return
        if self._gathered:  # at another address each time
            if self._scaled is not None:
                return
        elif unchanged(self._norm_sources(), self._scaled):
            return
        self.__dict__["noise_scale"] = None  # what another forward has saved for its backward stays as it is
        self.refresh_noise_scale()
        if self._scaled is None:
            raise RuntimeError(
                f"{self.flat_lora_name or type(self).__name__}: expected parameters that FSDP or DeepSpeed has gathered"
                " for this forward, got some that are shared out; call the module that FSDP made, or the engine that"
                " deepspeed.initialize returned, not the model inside"
            )

    def _measure_gathered(self) -> None:
        """A break in the graph of `torch.compile`, for weights that nothing else sees whole."""
        self._refresh_if_stale()

    # As torch.compiler.disable does, which imports triton.
    _measure_gathered._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _trained_parameters(self) -> list[Tensor]:
        return [s for s in self._norm_sources() if isinstance(s, Tensor) and s.requires_grad]

    def _wait_until_ready(self) -> None:
        if self._ready is not None and self._unit_scale is not None:
            torch.cuda.current_stream(self._unit_scale.device).wait_event(self._ready)

    def _attach(self, device: torch.device) -> None:
        self.noise_controller._layers[self] = None
        self.__dict__["_seed"] = self.noise_controller.tensor(device)

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        self._wait_until_ready()
        super()._apply(fn, recurse)
        self.refresh_noise_scale()
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._wait_until_ready()
        return {**self.__dict__, "_ready": None, "_scaled": None, "_reading": None, "_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with constants():
            for name in ("noise_scale", "_unit_scale"):  # copied in inference mode
                tensor = self.__dict__.get(name)
                if tensor is not None and tensor.is_inference():
                    self.__dict__[name] = tensor.clone()
        self._attach(self._seed.device)


_SETTINGS = (
    "noise_controller", "noise", "stream", "samples", "antithetic", "strategy", "noise_accum", "backend",
)  # fmt: skip
_OWN = (
    "noise_scale", "_unit_scale", "_ready", "_scaled", "_gathered", "_reading", "_seed", "auxiliary", "_called",
    "_bypassed", "_captured", "_kept",
)  # fmt: skip


def check_noise_options(stream: Any, noise: Any, samples: Any) -> None:
    if stream is not None:
        checks.uint32("stream", stream)
    if noise not in KINDS:
        raise ValueError(f"noise: expected {' or '.join(map(repr, KINDS))}, got {noise!r}")
    if isinstance(samples, str):
        if samples != "batch":
            raise ValueError(f"samples: expected an int >= 1 or 'batch', got {samples!r}")
        return
    checks.uint32("samples", samples)
    if samples < 1:
        raise ValueError(f"samples: expected an int >= 1 or 'batch', got {samples}")


def controller_of(
    existing: Sequence[NoisyLayer], given: NoiseController | None, **settings: Any
) -> NoiseController:
    """The controller for further layers of a model: the one given, that of the existing layers, or a new one.

    Args:
        settings: of a new one; those that are None are left to its defaults. Beside a controller that exists, they
            have to be its own.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if given is None and existing:
        given = existing[0].noise_controller
    if given is None:
        return NoiseController(**settings)
    own = {
        "sigma": given.target_sigma, "schedule": given.schedule, "total_steps": given.total_steps, "seed": given.base,
    }  # fmt: skip
    for name, value in settings.items():
        if name == "seed" and isinstance(value, int):
            value = value & 0xFFFFFFFFFFFFFFFF
        if _identity(value) != _identity(own[name]):
            change = {
                "sigma": "assign controller.target_sigma",
                "total_steps": "assign controller.total_steps",
            }
            raise ValueError(
                f"{name}: expected None, because there is a NoiseController already, with {own[name]!r}, got {value!r};"
                f" to change it, {change.get(name, 'make the layers anew (with PEFT after remove_flat_lora)')}"
            )
    return given


def _identity(setting: Any) -> Any:
    """Equal for functions of one definition: a notebook's cell that runs again makes its lambdas anew."""
    code = getattr(setting, "__code__", None)
    return setting if code is None else (code, setting.__closure__, setting.__defaults__)


def shared_controller(layers: Iterable[NoisyLayer]) -> NoiseController:
    """The one that all of a model's layers draw with.

    Raises:
        ValueError: there are no layers, or several controllers.
    """
    found = [layer.noise_controller for layer in layers]
    controllers = {id(controller): controller for controller in found}
    if len(controllers) != 1:
        raise ValueError(
            f"model: expected noisy layers that share one NoiseController, got {len(found)} layers with"
            f" {len(controllers)} controllers; see apply_flat_lora"
        )
    return found[0]


@contextlib.contextmanager
def instead_of_noise(
    layers: Iterable[NoisyLayer], arguments: Callable[[NoisyLayer], dict[str, Any]]
) -> Iterator[None]:
    """Inside, `noise_arguments` of these layers is ``arguments(layer)``, in eval mode as well."""
    layers = list(layers)

    def undo() -> None:
        for layer in layers:
            layer.__dict__.pop("noise_arguments", None)

    with undone(undo):
        for layer in layers:
            layer.__dict__["noise_arguments"] = _Arguments(arguments(layer))
            layer.__dict__["_called"] = True
        yield


class _Arguments:
    """Stands for a layer's `noise_arguments`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments

    def __call__(self, x: Tensor) -> dict[str, Any]:
        return dict(self.arguments)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module as it was before, afterwards."""
    before = [(module, module.training) for module in model.modules()]

    def undo() -> None:
        for module, training in before:
            module.training = training

    with undone(undo):
        model.eval()
        yield
