"""Flat-LoRA for PEFT: the LoRA layers of an existing PEFT model, trained under weight noise.

    model = get_peft_model(model, LoraConfig(...))
    controller = apply_flat_lora(model, sigma=0.05)
    controller.attach(optimizer)  # or controller.advance() after each optimizer.step()

Parameters, their names, merging, saving and loading stay PEFT's own: a converted layer is the same module with
the class `FlatLinear`, whose forward draws noise in training mode. PEFT's layers of packed weights (bitsandbytes and
others) get classes of their own, of which `isinstance(layer, FlatLinear)` is true as well.
"""

from __future__ import annotations

import abc
import functools
import importlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.autocast import without_autocast
from ..core.quantized import QuantizedWeight, find
from ..core.records import Weight
from ..op import sharded
from ..op.functional import fused_flat_lora_linear, row_sq_norms
from ..train import packed
from ..train.controller import NoiseController
from ..train.convert import check_options, print_noise
from ..train.layer import controller_of
from ..train.names import Pattern, listed, pattern, within
from ..train.obstacles import bypass_of, foreign_hooks, obstacle_to

_INSTALL = 'pip install "flatlora_kernels[peft]"'
try:
    import peft
except ImportError as error:
    raise ImportError(
        f"flatlora_kernels.integrations.peft needs the packages peft and transformers: {error}; {_INSTALL}"
    ) from error
if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 17):
    raise ImportError(
        f"flatlora_kernels.integrations.peft needs peft 0.17 or later, found {peft.__version__}; {_INSTALL}"
    )

from peft.tuners.adalora.layer import SVDLinear  # noqa: E402
from peft.tuners.lora.layer import Linear, LoraLayer, ParamWrapper  # noqa: E402
from peft.tuners.lora.variants import DoraLinearVariant  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from . import experts  # noqa: E402
from .adapters import FlatAdapter  # noqa: E402
from .experts import FlatParamWrapper  # noqa: E402

OPTIONS = ("noise", "samples", "antithetic", "strategy", "noise_accum", "backend")
# How far sums of squares in another order may move a norm.
_NORM_ERROR = 2.0**-18


class FlatLayer(FlatAdapter):
    """A LoRA layer of PEFT on the fused op: a mixin before PEFT's own class, see `FlatLinear`."""

    weight_is_packed: bool = False
    _can_keep = True
    # PEFT's
    base_layer: Any
    lora_dropout: Any
    lora_magnitude_vector: Any
    lora_variant: dict[str, Any]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self._active()
        if self.disable_adapters or not names:
            return super().forward(x, *args, **kwargs)
        noise = self.noise_arguments(x)
        obstacle = self._obstacle(names, args, kwargs)
        if obstacle:
            if "noise_scale" in noise and obstacle != _unknown_variants(self, names):
                raise RuntimeError(f"{self.flat_lora_name}: expected no noise, because {obstacle}")
            return super().forward(x, *args, **kwargs)
        if self.weight_is_packed and "noise_scale" not in noise and not self._needs_op():
            return super().forward(x, *args, **kwargs)
        return self._fused(x, names, noise)

    def _needs_op(self) -> bool:
        """Whether the owner of a packed weight cannot compute what is wanted without noise."""
        return (self.training and self.auxiliary is not None) or packed.loses_gradients(self.base_layer)

    def _obstacle(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the fused op cannot compute this forward; PEFT's own can."""
        if self.merged:
            return "its adapters are merged, so that nothing of it trains; unmerge_adapter() or eval()"
        unknown = _unknown_variants(self, names)
        if unknown:
            return unknown
        given = [name for name, value in kwargs.items() if value is not None]
        if args or given:
            return f"it is called with {', '.join(given) or 'more than one argument'}"
        if foreign_hooks(self.base_layer):
            return "its base_layer has hooks, which the fused op would not call"
        if len(names) > 1 and any(name in self.lora_variant for name in names):
            return "DoRA is active beside another adapter"
        if len(names) > 1 and sharded.is_sharded(self._weight()) and self._drops(names):
            return "several adapters with dropout are active, of a layer that tensor parallelism has cut"
        return None

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        obstacle = _unknown_variants(self, [adapter_name])
        if obstacle:
            _warn_of({f"{self.flat_lora_name} ({adapter_name})": obstacle})

    def _fused(self, x: Tensor, names: list[str], noise: dict[str, Any]) -> Tensor:
        dropped = [self._dropped(x, name) for name in names] if self._drops(names) else []
        weight, bias = self._weight(), getattr(self.base_layer, "bias", None)
        if sharded.is_sharded(weight):
            # In transformers' tensor parallel models, whose layers talk in tensors.
            x, *dropped = (sharded.input_for(weight, t) for t in (x, *dropped))
            return sharded.output_of(self._product(x, dropped, weight, bias, names, noise))
        if not isinstance(weight, QuantizedWeight):
            weight, noise = self._seen(weight, noise)
            return self._product(x, dropped, weight, bias, names, noise)
        # As its owner does: in the type that it computes in, whatever autocast says.
        dtype = packed.compute_type(self.base_layer, x)
        bias = None if bias is None else bias.to(dtype)
        with without_autocast(x.device.type):
            return self._product(x.to(dtype), dropped, weight.to(dtype), bias, names, noise).to(x.dtype)

    def _drops(self, names: list[str]) -> bool:
        return self.training and any(not isinstance(self.lora_dropout[name], nn.Identity) for name in names)

    def _product(
        self,
        x: Tensor,
        dropped: list[Tensor],
        weight: Weight,
        bias: Tensor | None,
        names: list[str],
        noise: dict[str, Any],
    ) -> Tensor:
        if dropped and len(names) > 1:  # each has an input of its own
            y = fused_flat_lora_linear(x, weight, None, None, bias, **noise)
            dtype = y.dtype
            for name, own in zip(names, dropped, strict=True):
                y = y + self.lora_B[name](self.lora_A[name](own)) * self.scaling[name]
            return y.to(dtype)

        A, B, scaling = self._adapter(names, weight.dtype)
        for name in names:
            own_bias = self._lora_bias(name)
            if own_bias is not None:
                own = sharded.replicated(own_bias, weight) * self._scaling(name)
                bias = own if bias is None else bias + own
        lora_x = dropped[0].to(x.dtype) if dropped else None
        A_all, B_all = self._with_auxiliary(A, B)
        y = fused_flat_lora_linear(x, weight, A_all, B_all, bias, scaling=scaling, lora_x=lora_x, **noise)
        if names[0] not in self.lora_variant:
            return y
        # PEFT drops the input of the copy of W that m / c - 1 multiplies, and leaves the bias alone.
        if lora_x is not None:
            part = fused_flat_lora_linear(lora_x, weight, A_all, B_all, scaling=scaling, **noise)
        else:
            part = y if bias is None else y - bias
        return (y + (self._gain(names[0], x, A, B) - 1) * part).to(y.dtype)

    def _gain(self, name: str, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """DoRA's m / c (N,). c has the precision that PEFT gives it: m is at first such a norm, and m / c is 1."""
        magnitude = self.lora_magnitude_vector[name].weight
        weight = self._weight()
        A, B = packed.beside(weight.dtype, A, B)
        norms = row_sq_norms(weight, A, B, scaling=self.scaling[name], backend=self.backend).sqrt()
        # PEFT casts x to the adapter's type, and everything else to that of x.
        dtype = self.lora_A[name].weight.dtype if self.cast_input_dtype_enabled else x.dtype
        if dtype.itemsize == 2:
            # A norm between two values may be rounded to either: what m began with is one of PEFT's choices.
            low, high = ((norms * (1 + error)).to(dtype) for error in (-_NORM_ERROR, _NORM_ERROR))
            rounded = torch.where(
                (low == magnitude) | (high == magnitude), magnitude.detach(), norms.to(dtype)
            )
            norms = rounded.to(norms.dtype)
        return magnitude / norms

    def _dropped(self, x: Tensor, name: str) -> Tensor:
        # In the adapter's type, as in PEFT: the same numbers are drawn.
        dtype = self._stored(name)[0].dtype
        if self.of_peft.__name__ in _KEEP_TYPES_UNDER_AUTOCAST and torch.is_autocast_enabled():
            return self.lora_dropout[name](x).to(dtype)
        return self.lora_dropout[name](x.to(dtype))

    def _weight(self) -> Weight:
        if self.weight_is_packed:
            return self._packed_weight(self.base_layer)
        weight = self.base_layer.weight
        return weight.t() if isinstance(self.base_layer, Conv1D) else weight

    def _weight_in_use(self) -> tuple[Weight, Tensor | None, Tensor | None, float]:
        # With DoRA without its m / c: the forward multiplies eps by that, too.
        weight = self._weight()
        names = [] if self.merged else [n for n in self._active() if not self._stored(n)[0].is_meta]
        return (weight, *self._adapter(names, weight.dtype)) if names else (weight, None, None, 1.0)

    def _norm_sources(self) -> tuple[Any, ...]:
        names = () if self.merged else self._active()
        parts = [(*self._stored(n), self._scaling(n)) for n in names]
        base = packed.sources(self.base_layer) if self.weight_is_packed else (self.base_layer.weight,)
        return (*base, *(item for part in parts for item in part))


class FlatLinear(FlatLayer, Linear, metaclass=abc.ABCMeta):
    """PEFT's LoRA layer of an `nn.Linear` or a `Conv1D`, on the fused op; made by `apply_flat_lora`.

    In training mode ``x (W + eps)^T + sum_i scaling_i (dropout_i(x) A_i^T) B_i^T + bias`` over the active adapters
    i; with DoRA ``m / c * (...)``, ``c`` the row norms of ``W + scaling B A``, so that eps is to m as it is to
    these norms without DoRA. No noise in eval mode, at sigma = 0, with the adapters disabled or none of them active:
    then the result is PEFT's up to rounding. Adapters in float32 beside 16 bits are multiplied in 16 bits.

    A layer whose base has a packed weight is of another class, that of PEFT's own layer with the same behaviour, and
    counts as an instance of this one. Its product is exact on the decoded weight, also where its owner would round
    `x` (`Linear8bitLt`, FP8), and in the type that its owner computes in. Without noise PEFT's own forward runs.

    An adapter of a kind unknown here that comes later is left to PEFT, without noise; a warning says so.

    Raises:
        RuntimeError: in the forward, where noise is wanted and the layer is merged, its batch mixes adapters
            (`adapter_names`), or DoRA is active beside another adapter.
    """

    of_peft = Linear


class FlatSVDLinear(FlatLayer, SVDLinear):
    """PEFT's AdaLoRA layer on the fused op, see `FlatLinear`: ``A * E / ranknum`` is its A.

    ``base_model.update_and_allocate(step)`` goes on working: what it masks is gone from the norms, too.
    """

    of_peft = SVDLinear
    # PEFT's
    lora_E: Any
    ranknum: Any

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[name] * (self.lora_E[name] / (self.ranknum[name] + 1e-5)), self.lora_B[name]

    def _stored(self, name: str) -> tuple[Tensor, ...]:
        return self.lora_A[name], self.lora_B[name], self.lora_E[name], self.ranknum[name]

    def _lora_bias(self, name: str) -> None:
        return None

    def _obstacle(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        obstacle = super()._obstacle(names, args, kwargs)
        if obstacle is None and len(names) > 1 and self._drops(names):
            return "several AdaLoRA adapters with dropout are active"
        return obstacle


FlatLinear.register(FlatSVDLinear)

# PEFT's LoRA layers of packed weights, with the module in peft.tuners.lora. Some need their owner's library.
_OF_PACKED = {
    "Linear4bit": "bnb",
    "Linear8bitLt": "bnb",
    "GPTQLoraLinear": "gptq",
    "AwqLoraLinear": "awq",
    "HqqLoraLinear": "hqq",
    "TorchaoLoraLinear": "torchao",
}
# Those that cast x to the adapter's type outside autocast alone.
_KEEP_TYPES_UNDER_AUTOCAST = ("Linear4bit", "Linear8bitLt", "AwqLoraLinear", "HqqLoraLinear")


def _may_be_flat(kind: type[LoraLayer]) -> bool:
    module = f"peft.tuners.lora.{_OF_PACKED.get(kind.__name__)}"
    return kind in (Linear, SVDLinear, ParamWrapper) or kind.__module__ == module


@functools.cache
def _flat_class(kind: type[LoraLayer]) -> type[FlatAdapter]:
    """The class of the layers that were of PEFT's class `kind`; an attribute of this module, so that they pickle."""
    if kind is Linear:
        return FlatLinear
    if kind is SVDLinear:
        return FlatSVDLinear
    if kind is ParamWrapper:
        return FlatParamWrapper
    doc = f"PEFT's `{kind.__name__}` on the fused op, see `FlatLinear`."
    attributes = {"__module__": __name__, "__doc__": doc, "of_peft": kind}
    made: type[FlatLayer] = type(f"Flat{kind.__name__}", (FlatLayer, kind), attributes)
    FlatLinear.register(made)
    return made


def __getattr__(name: str) -> Any:
    kind = name.removeprefix("Flat")
    if kind == name or kind not in _OF_PACKED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"peft.tuners.lora.{_OF_PACKED[kind]}")
    return _flat_class(getattr(module, kind))


class _ConvertLater:
    """Forward hook of the model: converts the layers that an adapter added since has brought.

    What cannot be converted is left to PEFT with a warning. An error would come in a forward, and would stop
    evaluation and generation too, long after the line that added the adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        noise_controller: NoiseController,
        exclude: Pattern,
        adapters: tuple[str, ...] | None,
        options: dict[str, Any],
    ) -> None:
        self.adapters = adapters
        self.noise_controller = noise_controller
        self.exclude = exclude
        self.options = options
        self.known = self._adapters(model)
        self.left: set[str] = set()  # told already

    @staticmethod
    def _adapters(model: nn.Module) -> list[Any]:
        return list(getattr(model, "peft_config", {}).values())

    def __call__(self, model: nn.Module, _inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        adapters = self._adapters(model)
        if list(map(id, adapters)) == list(map(id, self.known)):
            return
        self.known = adapters
        layers, obstacles = _to_convert(model, self.exclude, self.options)
        for name, layer in layers.items():
            _make_flat(layer, name, self.noise_controller, self.adapters, self.options)
        new = {name: obstacle for name, obstacle in obstacles.items() if name not in self.left}
        self.left |= new.keys()
        if new:
            _warn_of(new)


def apply_flat_lora(
    peft_model: nn.Module,
    *,
    sigma: float | None = None,
    schedule: str | Callable[[int], float] | None = None,
    total_steps: int | None = None,
    seed: int | None = None,
    noise_controller: NoiseController | None = None,
    exclude_modules: str | Iterable[str] = (),
    adapters: Iterable[str] | None = None,
    verbose: bool = True,
    **options: Any,
) -> NoiseController:
    """Train the LoRA layers of a PEFT model under weight noise, in place.

    Every LoRA layer of an `nn.Linear`, a `Conv1D` or a packed weight becomes a `FlatLinear`. One of a mixture of
    experts (`target_parameters`) becomes a `FlatParamWrapper`, is named as its parameter, and has a stream for each.
    Streams are numbered in order of `named_modules()`. Adapters added later are seen at the next forward of
    `peft_model`; layers of theirs that cannot be converted are left to PEFT with a warning. A second call converts what
    has come since, or returns the controller as it is. Conv1D, DoRA, several adapters, initialisations and dropout work
    as in PEFT.

    Args:
        peft_model: what `get_peft_model` or `PeftModel.from_pretrained` returned, or a model with LoRA layers injected.
        sigma, schedule, total_steps, seed: of a new `NoiseController`; default 0.05, "constant", None, None. Those
            given in a second call have to be the controller's.
        noise_controller: instead of these four; default that of layers already converted.
        exclude_modules: LoRA layers that stay PEFT's, without noise: a regular expression for the whole name, or names
            or their dotted ends, as in PEFT, of layers or of modules around them.
        adapters: names of those with which noise is drawn, where they are active; default all. Others, such as a frozen
            reference beside the one that trains, then run without.
        verbose: print which layers are under noise, in the first process.
        options: `noise`, `samples`, `antithetic`, `strategy`, `noise_accum`, `backend` of every layer.

    Returns:
        The controller that all layers share, to be attached to the optimiser or advanced after each of its steps.

    Raises:
        ValueError: LoRA layers that cannot be converted, which are named with the reason, and none is; or there is
            none to convert; or one of `adapters` does not exist; or `exclude_modules` or one of its names matches no
            LoRA layer, or one converted already; or settings or options other than those of the layers converted
            already.
        TypeError: an option that there is not.
    """
    _check_names(options)
    exclude = pattern(exclude_modules)
    _check_excluded(peft_model, exclude)
    existing = [module for module in peft_model.modules() if isinstance(module, FlatAdapter)]
    settings = {"sigma": sigma, "schedule": schedule, "total_steps": total_steps, "seed": seed}
    controller = controller_of(existing, noise_controller, **settings)
    noisy_adapters = _checked_adapters(peft_model, adapters)
    layers, obstacles = _to_convert(peft_model, exclude, options)
    if obstacles:
        raise ValueError(
            f"peft_model: expected LoRA layers that can train under weight noise, got {_reasons(obstacles)};"
            " exclude_modules leaves layers to PEFT, without noise"
        )
    if not layers and not existing:
        got = "none but those in exclude_modules" if _lora_layers(peft_model) else "none"
        raise ValueError(f"peft_model: expected LoRA layers to convert, got {got}")
    if not layers:
        given = {} if adapters is None else {"noisy_adapters": noisy_adapters}
        check_options(existing, controller, {**options, **given})
    for name, layer in layers.items():
        _make_flat(layer, name, controller, noisy_adapters, options)
    _remove_hook(peft_model)
    peft_model.register_forward_pre_hook(
        _ConvertLater(peft_model, controller, exclude, noisy_adapters, options)
    )
    if verbose:
        found = _lora_layers(peft_model).values()
        noisy = [layer for layer in found if isinstance(layer, FlatAdapter)]
        print_noise(noisy, controller, left=len(found) - len(noisy))
    return controller


def remove_flat_lora(peft_model: nn.Module) -> None:
    """Turn the layers of `peft_model` back into PEFT's own; parameters and adapters stay as they are.

    Raises:
        ValueError: there are none.
    """
    layers = [module for module in peft_model.modules() if isinstance(module, FlatAdapter)]
    if not layers:
        raise ValueError("peft_model: expected layers made by apply_flat_lora, got none")
    for layer in layers:
        layer._remove_noise()
        for name in ("flat_lora_name", "noisy_adapters", "weight_is_packed"):
            layer.__dict__.pop(name, None)
        layer.__class__ = layer.of_peft
    _remove_hook(peft_model)


def custom_modules(
    noise_controller: NoiseController, *, exclude_modules: str | Iterable[str] = (), **options: Any
) -> dict[type[nn.Module], Callable[..., nn.Module | None]]:
    """What ``LoraConfig._register_custom_module`` takes to have `get_peft_model` build `FlatLinear`s itself.

    A configuration holds for its own adapter: register every later one too, or call `apply_flat_lora` on the model
    after adding it. PEFT shows one target at a time and not the modules around it. So names in `exclude_modules` that
    match nothing stay unnoticed, and so do parents that compute a layer without calling it; `apply_flat_lora` refuses
    both. Needs PEFT 0.19.

    Args:
        noise_controller, exclude_modules, options: see `apply_flat_lora`.

    Raises:
        ValueError: in `get_peft_model`, a target that cannot be such a layer, which is named.
        RuntimeError: in `get_peft_model`, PEFT before 0.19.
        TypeError: an option that there is not.
    """

    _check_names(options)
    exclude = pattern(exclude_modules)

    def refuse(name: str, obstacle: str) -> None:
        raise ValueError(
            f"target_modules: expected modules that custom_modules can give weight noise, got {name!r}: {obstacle};"
            f" custom_modules(..., exclude_modules=[{name!r}]) leaves it to PEFT, without noise"
        )

    def build(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
        if "target_name" not in kwargs:
            raise RuntimeError(
                f"custom_modules: expected PEFT 0.19 or later, got {peft.__version__}; instead, call apply_flat_lora"
                " on what get_peft_model returns"
            )
        name = kwargs["target_name"]
        if within(name, exclude):
            return None  # PEFT goes on to its own layers
        obstacle = _base_obstacle(target)
        if obstacle is None and find(target) is not None:
            obstacle = (
                "its weight is packed, and PEFT has a class of its own for it; apply_flat_lora converts that"
            )
        if kwargs.get("parameter_name"):
            obstacle = (
                "a bare parameter is adapted (target_parameters); apply_flat_lora converts those of experts"
            )
        if obstacle:
            refuse(name, obstacle)
        transposed = isinstance(target, Conv1D)
        kwargs["config"].fan_in_fan_out = transposed  # as PEFT corrects it
        layer = Linear(target, adapter_name, is_target_conv_1d_layer=transposed, **kwargs)
        obstacle = _unknown_variants(layer, layer.lora_variant)
        if obstacle:
            refuse(name, obstacle)
        _make_flat(layer, name, noise_controller, None, options)
        return layer

    return {nn.Module: build}


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """By their names in the base model; wrappers of parameters by the names of these."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.")
            if isinstance(module, ParamWrapper):
                while name.endswith(_NESTED):
                    name = name.removesuffix(_NESTED)
                name = f"{name}.{module.parameter_name}"
            found[name] = module
    return found


_NESTED = ".base_layer"


def _to_convert(
    model: nn.Module, exclude: Pattern, options: dict[str, Any]
) -> tuple[dict[str, LoraLayer], dict[str, str]]:
    """The layers that are not yet converted, and why some of the others cannot be."""
    layers, obstacles = {}, {}
    modules = {n.removeprefix("base_model.model."): m for n, m in model.named_modules()}
    for name, module in _lora_layers(model).items():
        if isinstance(module, FlatAdapter) or within(name, exclude):
            continue
        where = name.rpartition(".")[0] if isinstance(module, ParamWrapper) else name
        obstacle = _layer_obstacle(module, options) or _parent_obstacle(modules, where)
        if obstacle:
            obstacles[name] = obstacle
        else:
            layers[name] = module
    return layers, obstacles


def _make_flat(
    layer: Any,
    name: str,
    noise_controller: NoiseController,
    adapters: tuple[str, ...] | None,
    options: dict[str, Any],
) -> None:
    kind: Any = type(layer)
    layer.__class__ = _flat_class(kind)
    if isinstance(layer, FlatLayer):
        layer.weight_is_packed = find(layer.base_layer) is not None
    try:
        layer._set_up_noise(noise_controller, **options)
    except Exception:
        layer.__class__ = kind
        layer.__dict__.pop("weight_is_packed", None)
        raise
    layer.flat_lora_name, layer.noisy_adapters = name, adapters


def _remove_hook(model: nn.Module) -> None:
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _ConvertLater):
            del model._forward_pre_hooks[key]


def _check_names(options: dict[str, Any]) -> None:
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"options: expected {', '.join(OPTIONS)}, got {name!r}")


def _checked_adapters(model: nn.Module, adapters: Iterable[str] | None) -> tuple[str, ...] | None:
    if adapters is None:
        return None
    found = {name for layer in _lora_layers(model).values() for name in layer.lora_A}
    names = (adapters,) if isinstance(adapters, str) else tuple(adapters)
    for name in names:
        if name not in found:
            raise ValueError(f"adapters: expected names of {', '.join(sorted(found))}, got {name!r}")
    if not names:
        raise ValueError(f"adapters: expected at least one of {', '.join(sorted(found))}, got none")
    return names


def _check_excluded(model: nn.Module, exclude: Pattern) -> None:
    layers = _lora_layers(model)
    entries: list[Any] = [exclude] if isinstance(exclude, str) else [(name,) for name in exclude]
    for entry in entries:
        found = [name for name in layers if within(name, entry)]
        got = repr(entry) if isinstance(entry, str) else repr(entry[0])
        if not found:
            raise ValueError(
                f"exclude_modules: expected to match LoRA layers or modules around them, got {got}, which matches none"
                f" of {len(layers)} ({listed(layers)})"
            )
        converted = [name for name in found if isinstance(layers[name], FlatAdapter)]
        if converted:
            raise ValueError(
                f"exclude_modules: expected to match LoRA layers without noise, got {got}, which matches"
                f" {listed(converted)}; remove_flat_lora(peft_model) first"
            )


def _base_obstacle(base: nn.Module) -> str | None:
    obstacle = obstacle_to(base, nn.Linear.forward, Conv1D.forward)
    if obstacle is None or isinstance(base, (nn.Linear, Conv1D)):
        return obstacle
    return f"it is neither an nn.Linear nor a Conv1D ({obstacle}), its class is {type(base).__name__}"


def _layer_obstacle(layer: LoraLayer, options: dict[str, Any]) -> str | None:
    if not _may_be_flat(type(layer)):
        kinds = ", ".join(("Linear", "SVDLinear", *_OF_PACKED, "ParamWrapper"))
        return f"its class in PEFT is {type(layer).__name__}, none of {kinds}"
    if "forward" in vars(layer):
        return "it has a forward of its own, in the place of its class's"
    if isinstance(layer, ParamWrapper):
        return experts.obstacle_to(layer, options.get("samples", 1))
    return _base_obstacle(layer.base_layer) or _unknown_variants(layer, layer.lora_variant)


def _parent_obstacle(modules: dict[str, nn.Module], name: str) -> str | None:
    """Why what is around the layer would miss its noise, or even its adapter."""
    parent = modules.get(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "nn.TransformerEncoderLayer reads its weight in eval mode without calling it;"
            " torch.backends.mha.set_fastpath_enabled(False) ends that"
        )
    return bypass_of(modules, name)


def _unknown_variants(layer: LoraLayer, names: Iterable[str]) -> str | None:
    variants = [type(layer.lora_variant[name]).__name__ for name in names if name in layer.lora_variant]
    if any(variant != DoraLinearVariant.__name__ for variant in variants):
        return f"its adapter is of another kind than LoRA and DoRA, {', '.join(variants)}"
    return "DoRA is offloaded" if layer.ephemeral_gpu_offload and variants else None


def _warn_of(obstacles: dict[str, str]) -> None:
    warnings.warn(
        f"LoRA layers of a later adapter are left to PEFT, and train without weight noise: {_reasons(obstacles)}",
        stacklevel=2,
    )


def _reasons(obstacles: dict[str, str]) -> str:
    """Each reason once, with the layers it holds for."""
    names: dict[str, list[str]] = {}
    for name, obstacle in obstacles.items():
        names.setdefault(obstacle, []).append(name)
    return "; ".join(
        f"{first!r}: {obstacle}" + (f" (as for {listed(map(repr, others))})" if others else "")
        for obstacle, (first, *others) in names.items()
    )
