"""Flat-LoRA for PEFT: the LoRA layers of an existing PEFT model, trained under weight noise.

    model = get_peft_model(model, LoraConfig(...))
    controller = apply_flat_lora(model, sigma=0.05)
    controller.attach(optimizer)  # or controller.advance() after each optimizer.step()

Parameters, their names, merging, saving and loading stay PEFT's own: a converted layer is the same module with
the class `FlatLinear`, whose forward draws noise in training mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..op.functional import fused_flat_lora_linear, row_sq_norms
from ..train.controller import NoiseController
from ..train.layer import NoisyLayer, controller_of
from ..train.linear import HOOKS, matches, obstacle_to


class FlatLinear(NoisyLayer, Linear):
    """PEFT's LoRA layer of an `nn.Linear` or a `Conv1D`, on the fused op; made by `apply_flat_lora`.

    In training mode ``x (W + eps)^T + sum_i scaling_i (dropout_i(x) A_i^T) B_i^T + bias`` over the active adapters
    i; with DoRA ``m / c * (...)``, ``c`` the row norms of ``W + scaling B A``, so that eps is to m as it is to
    these norms without DoRA. No noise in eval mode, at sigma = 0, with the adapters disabled or none of them active:
    then the result is PEFT's up to rounding. Adapters in float32 beside 16 bits are multiplied in 16 bits.

    Raises:
        RuntimeError: in the forward, where noise is wanted and the layer is merged, its batch mixes adapters
            (`adapter_names`), DoRA is active beside another adapter, or an active adapter is of a kind unknown here.
    """

    flat_lora_name: str  # in the model, for messages
    # PEFT's
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_magnitude_vector: Any
    lora_variant: dict[str, Any]
    scaling: dict[str, float]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self._active()
        if self.disable_adapters or not names:
            return Linear.forward(self, x, *args, **kwargs)
        noise = self.noise_arguments(x)
        obstacle = self._obstacle(names, args, kwargs)
        if obstacle:
            if "noise_scale" in noise:
                raise RuntimeError(f"{self.flat_lora_name}: expected no noise, because {obstacle}")
            return Linear.forward(self, x, *args, **kwargs)
        return self._fused(x, names, noise)

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _obstacle(self, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the fused op cannot compute this forward; PEFT's own can."""
        if self.merged:
            return "its adapters are merged, so that nothing of it trains; unmerge_adapter() or eval()"
        given = [name for name, value in kwargs.items() if value is not None]
        if args or given:
            return f"it is called with {', '.join(given) or 'more than one argument'}"
        if any(getattr(self.base_layer, hooks) for hooks in HOOKS):
            return "its base_layer has hooks, which the fused op would not call"
        if len(names) > 1 and any(name in self.lora_variant for name in names):
            return "DoRA or the like is active beside another adapter"
        return _unknown_variants(self, names)

    def _fused(self, x: Tensor, names: list[str], noise: dict[str, Any]) -> Tensor:
        base = self.base_layer
        weight, bias = self._weight(), base.bias
        drops = self.training and any(not isinstance(self.lora_dropout[name], nn.Identity) for name in names)
        if drops and len(names) > 1:  # each has an input of its own
            y = fused_flat_lora_linear(x, weight, None, None, bias, **noise)
            dtype = y.dtype
            for name in names:
                y = y + self.lora_B[name](self.lora_A[name](self._dropped(x, name))) * self.scaling[name]
            return y.to(dtype)

        A, B, scaling = self._adapter(names, weight.dtype)
        for name in names:
            if self.lora_B[name].bias is not None:
                own = self.lora_B[name].bias * self.scaling[name]
                bias = own if bias is None else bias + own
        lora_x = self._dropped(x, names[0]).to(x.dtype) if drops else None
        A_all, B_all = self._with_auxiliary(A, B)
        if names[0] not in self.lora_variant:
            return fused_flat_lora_linear(
                x, weight, A_all, B_all, bias, scaling=scaling, lora_x=lora_x, **noise
            )
        # y = m / c * (x (W + eps)^T + ...) + bias; PEFT drops the input of all but one copy of W.
        magnitude = self.lora_magnitude_vector[names[0]].weight
        gain = magnitude / row_sq_norms(weight, A, B, scaling=scaling, backend=self.backend).sqrt()
        dropped = x if lora_x is None else lora_x
        y = fused_flat_lora_linear(dropped, weight, A_all, B_all, scaling=scaling, **noise)
        dtype = y.dtype
        y = y * gain
        if lora_x is not None:
            y = y + fused_flat_lora_linear(x - lora_x, weight, **noise)
        return (y if bias is None else y + bias).to(dtype)

    def _dropped(self, x: Tensor, name: str) -> Tensor:
        # In the adapter's type, as in PEFT: the same numbers are drawn.
        return self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype))

    def _weight(self) -> Tensor:
        weight = self.base_layer.weight
        return weight.t() if isinstance(self.base_layer, Conv1D) else weight

    def _adapter(self, names: list[str], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """A (r, K), B (N, r) and scaling of these adapters as one, in types the op takes beside `dtype`."""
        pairs = []
        for name in names:
            A, B = self.lora_A[name].weight, self.lora_B[name].weight
            if A.dtype != dtype:
                common = torch.promote_types(dtype, torch.float32)
                A, B = A.to(common), B.to(common)
            pairs.append((A, B))
        if len(pairs) == 1:
            return *pairs[0], self.scaling[names[0]]
        scaled = [B * self.scaling[name] for (_, B), name in zip(pairs, names, strict=True)]
        return torch.cat([A for A, _ in pairs]), torch.cat(scaled, 1), 1.0

    def _weight_in_use(self) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
        # With DoRA without its m / c: the forward multiplies eps by that, too.
        weight = self._weight()
        names = [] if self.merged else [n for n in self._active() if not self.lora_A[n].weight.is_meta]
        return (weight, *self._adapter(names, weight.dtype)) if names else (weight, None, None, 1.0)

    def _norm_sources(self) -> tuple[Any, ...]:
        names = () if self.merged else self._active()
        parts = [(self.lora_A[n].weight, self.lora_B[n].weight, self.scaling[n]) for n in names]
        return (self.base_layer.weight, *(item for part in parts for item in part))


class _ConvertLater:
    """Forward hook of the model: converts the layers that an adapter added since has brought."""

    def __init__(self, model: nn.Module, *options: Any) -> None:
        self.options = options
        self.known = self._adapters(model)

    @staticmethod
    def _adapters(model: nn.Module) -> list[Any]:
        return list(getattr(model, "peft_config", {}).values())

    def __call__(self, model: nn.Module, _inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        adapters = self._adapters(model)
        if list(map(id, adapters)) != list(map(id, self.known)):
            _convert(model, *self.options)
            self.known = adapters


def apply_flat_lora(
    peft_model: nn.Module,
    *,
    sigma: float | None = None,
    schedule: str | Callable[[int], float] | None = None,
    total_steps: int | None = None,
    seed: int | None = None,
    noise_controller: NoiseController | None = None,
    exclude_modules: str | Iterable[str] = (),
    **options: Any,
) -> NoiseController:
    """Train the LoRA layers of a PEFT model under weight noise, in place.

    Every LoRA layer of an `nn.Linear` or a `Conv1D` becomes a `FlatLinear`; streams are numbered in order of
    `named_modules()`. Adapters added later are seen at the next forward of `peft_model`. A second call converts what
    has come since. Conv1D, DoRA, several adapters, initialisations and dropout work as in PEFT.

    Args:
        peft_model: what `get_peft_model` or `PeftModel.from_pretrained` returned, or a model with LoRA layers injected.
        sigma, schedule, total_steps, seed: of a new `NoiseController`; default 0.05, "constant", None, None.
        noise_controller: instead of these four; default that of layers already converted.
        exclude_modules: LoRA layers that stay PEFT's, without noise: a regular expression for the whole name, or names
            or their dotted ends, as in PEFT.
        options: `noise`, `samples`, `antithetic`, `strategy`, `noise_accum`, `backend` of every layer.

    Returns:
        The controller that all layers share, to be attached to the optimiser or advanced after each of its steps.

    Raises:
        ValueError: LoRA layers that cannot be converted, which are named with the reason, and none is; or there is
            none to convert; or settings of a controller beside one that exists.
    """
    existing = [module for module in peft_model.modules() if isinstance(module, FlatLinear)]
    noise_controller = controller_of(
        existing, noise_controller, sigma=sigma, schedule=schedule, total_steps=total_steps, seed=seed
    )
    rest = (noise_controller, _pattern(exclude_modules), options)
    if not _convert(peft_model, *rest):
        got = "none but those converted already" if existing else "none"
        raise ValueError(f"peft_model: expected LoRA layers to convert, got {got}")
    _remove_hook(peft_model)
    peft_model.register_forward_pre_hook(_ConvertLater(peft_model, *rest))
    return noise_controller


def remove_flat_lora(peft_model: nn.Module) -> None:
    """Turn the layers of `peft_model` back into PEFT's own; parameters and adapters stay as they are.

    Raises:
        ValueError: there are none.
    """
    layers = [module for module in peft_model.modules() if isinstance(module, FlatLinear)]
    if not layers:
        raise ValueError("peft_model: expected layers made by apply_flat_lora, got none")
    for layer in layers:
        layer._remove_noise()
        del layer.flat_lora_name
        layer.__class__ = Linear
    _remove_hook(peft_model)


def custom_modules(
    noise_controller: NoiseController, *, exclude_modules: str | Iterable[str] = (), **options: Any
) -> dict[type[nn.Module], Callable[..., nn.Module | None]]:
    """What ``LoraConfig._register_custom_module`` takes to have `get_peft_model` build `FlatLinear`s itself.

    A configuration holds for its own adapter: register every later one too, or call `apply_flat_lora` on the model
    after adding it. Needs PEFT 0.19.

    Args:
        noise_controller, exclude_modules, options: see `apply_flat_lora`.

    Raises:
        ValueError: in `get_peft_model`, a target that cannot be such a layer, which is named.
    """

    exclude = _pattern(exclude_modules)

    def build(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module | None:
        if "target_name" not in kwargs:
            raise RuntimeError("custom_modules: needs PEFT 0.19 or later; apply_flat_lora does not")
        name = kwargs["target_name"]
        if _excluded(name, exclude):
            return None  # PEFT goes on to its own layers
        obstacle = _base_obstacle(target)
        if kwargs.get("parameter_name"):
            obstacle = "a bare parameter is adapted"
        if obstacle:
            raise ValueError(_message({name: obstacle}))
        transposed = isinstance(target, Conv1D)
        kwargs["config"].fan_in_fan_out = transposed  # as PEFT corrects it
        layer = Linear(target, adapter_name, is_target_conv_1d_layer=transposed, **kwargs)
        obstacle = _unknown_variants(layer, layer.lora_variant)
        if obstacle:
            raise ValueError(_message({name: obstacle}))
        _make_flat(layer, name, noise_controller, options)
        return layer

    return {nn.Module: build}


def _convert(
    model: nn.Module,
    noise_controller: NoiseController,
    exclude: str | tuple[str, ...],
    options: dict[str, Any],
) -> int:
    """Convert what is not yet converted, or nothing where something cannot be; returns how many were."""
    layers, obstacles = {}, {}
    modules = dict(model.named_modules())
    for full_name, module in modules.items():
        name = full_name.removeprefix("base_model.model.")
        if not isinstance(module, LoraLayer) or isinstance(module, FlatLinear) or _excluded(name, exclude):
            continue
        layers[name] = module
        if type(module) is not Linear:
            obstacles[name] = f"a {type(module).__name__} is not PEFT's plain LoRA layer"
        else:
            obstacle = (
                _base_obstacle(module.base_layer)
                or _unknown_variants(module, module.lora_variant)
                or _parent_obstacle(modules.get(full_name.rpartition(".")[0]))
            )
            if obstacle:
                obstacles[name] = obstacle
    if obstacles:
        raise ValueError(_message(obstacles))
    for name, layer in layers.items():
        _make_flat(layer, name, noise_controller, options)
    return len(layers)


def _make_flat(layer: Any, name: str, noise_controller: NoiseController, options: dict[str, Any]) -> None:
    layer.__class__ = FlatLinear
    try:
        layer._set_up_noise(noise_controller, **options)
    except Exception:
        layer.__class__ = Linear
        raise
    layer.flat_lora_name = name


def _remove_hook(model: nn.Module) -> None:
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _ConvertLater):
            del model._forward_pre_hooks[key]


def _pattern(names: str | Iterable[str]) -> str | tuple[str, ...]:
    return names if isinstance(names, str) else tuple(names)


def _excluded(name: str, exclude: str | tuple[str, ...]) -> bool:
    """Whether `name` or a module around it is excluded."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), exclude) for end in range(1, len(parts) + 1))


def _base_obstacle(base: nn.Module) -> str | None:
    return obstacle_to(base, nn.Linear.forward, Conv1D.forward)


def _parent_obstacle(parent: nn.Module | None) -> str | None:
    """Why adapters of PEFT inside `parent` have no effect in eval mode, whoever trains them."""
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "nn.TransformerEncoderLayer reads its weight in eval mode without calling it;"
            " torch.backends.mha.set_fastpath_enabled(False) ends that"
        )
    return None


def _unknown_variants(layer: LoraLayer, names: Iterable[str]) -> str | None:
    variants = [type(layer.lora_variant[name]).__name__ for name in names if name in layer.lora_variant]
    if any(variant != DoraLinearVariant.__name__ for variant in variants):
        return f"its adapter is of another kind than LoRA and DoRA, {', '.join(variants)}"
    return "DoRA is offloaded" if layer.ephemeral_gpu_offload and variants else None


def _message(obstacles: dict[str, str]) -> str:
    reasons = "; ".join(f"{name!r}: {reason}" for name, reason in obstacles.items())
    return f"LoRA layers that cannot train under weight noise (exclude_modules leaves them PEFT's): {reasons}"
