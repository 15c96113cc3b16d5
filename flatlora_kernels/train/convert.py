"""`apply_flat_lora`: the linear layers of a model replaced by `FlatLoraLinear`s."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.quantized import find
from .controller import NoiseController
from .layer import NoisyLayer, controller_of
from .linear import FlatLoraLinear
from .names import listed, matches, pattern
from .obstacles import bypass_of, obstacle_to, refuse_fsdp, refuse_peft, too_late
from .packed import codes_of
from .state import layer_state, layer_states
from .zero import whole_shape

# These call no child's forward on some path of theirs: they read its weight, and would miss the adapter.
_READ_WEIGHTS_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
EXTRA_STATE = "_extra_state"  # torch's name for it


def apply_flat_lora(
    model: nn.Module,
    target_modules: str | Iterable[str],
    *,
    sigma: float | None = None,
    schedule: str | Callable[[int], float] | None = None,
    total_steps: int | None = None,
    seed: int | None = None,
    noise_controller: NoiseController | None = None,
    verbose: bool = True,
    **options: Any,
) -> NoiseController:
    """Replace the matching `nn.Linear`s of `model` by `FlatLoraLinear`s, in place, and freeze all the rest.

    So are layers of other libraries with a packed weight, see `FlatLoraLinear.from_linear`.

    Streams are numbered in order of `model.named_modules()`; linears with one and the same weight (tied) get the
    same stream. A second call adds layers to the first one's: they share its controller and number on. Where all that
    match are replaced already, it returns the controller as it is. A linear that is used in several places stays one
    layer.

    Args:
        target_modules: as in PEFT, a string is a regular expression that has to match the whole module name;
            otherwise each string is a name or the dotted end of one ("query" matches "layer.0.query").
        sigma, schedule, total_steps, seed: of a new `NoiseController`; default 0.05, "constant", None, None. Those
            given in a second call have to be the controller's.
        noise_controller: instead of these four.
        verbose: print the number of trainable parameters and which layers are under noise, in the first process.
        options: keyword arguments of `FlatLoraLinear`, but `stream`.

    Returns:
        The controller that all layers share, to be attached to the optimiser or advanced after each of its steps.

    Raises:
        ValueError: no `nn.Linear` below `model` matches; or one that is not plain (a forward of its own, an unknown
            packed format, a parametrization, hooks, a sharded weight), or whose parent reads its weight past its
            forward (`nn.MultiheadAttention`, `nn.TransformerEncoderLayer`, a parent with a forward of its own), so
            that an adapter would have no effect; or settings or options other than those of the layers replaced
            already; or `model` has LoRA layers of PEFT, for which `flatlora_kernels.integrations.peft` is made.
    """
    refuse_peft(model)
    refuse_fsdp(model)
    targeted = pattern(target_modules)
    modules = dict(model.named_modules(remove_duplicate=False))
    targets = {n: m for n, m in modules.items() if n and matches(n, targeted) and _is_linear(modules, n)}
    existing = [m for m in model.modules() if isinstance(m, FlatLoraLinear)]
    settings = {"sigma": sigma, "schedule": schedule, "total_steps": total_steps, "seed": seed}
    again = [m for n, m in modules.items() if n and isinstance(m, FlatLoraLinear) and matches(n, targeted)]
    if not targets and not again:
        linears = [n for n, m in modules.items() if n and isinstance(m, nn.Linear)]
        raise ValueError(
            f"target_modules: expected to match the name of an nn.Linear, got {targeted!r}, which matches"
            f" none of {len(linears)} ({listed(linears)})"
        )
    for name in targets:
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, _READ_WEIGHTS_DIRECTLY):
            raise ValueError(
                f"target_modules: expected layers that are called, got {name!r}: {type(parent).__name__}"
                " reads its weight directly, and would miss the adapter"
            )
        obstacle = obstacle_to(targets[name], nn.Linear.forward) or bypass_of(modules, name)
        obstacle = obstacle or too_late(targets[name])
        if obstacle:
            raise ValueError(f"target_modules: expected plain linear layers, got {name!r}: {obstacle}")

    controller = controller_of(existing, noise_controller, **settings)
    if not targets:
        check_options(again, controller, options)
    tied = {id(layer._base_parameter()): layer.stream for layer in existing}
    stream = max((layer.stream + layer.stream_count for layer in existing), default=0)
    if not existing:
        model.requires_grad_(False)
    replacements: dict[int, FlatLoraLinear] = {}
    for name, linear in targets.items():
        if id(linear) not in replacements:
            same = tied.setdefault(id(codes_of(linear)), stream)
            layer = FlatLoraLinear.from_linear(linear, noise_controller=controller, stream=same, **options)
            layer.flat_lora_name = name
            replacements[id(linear)] = layer
            stream += same == stream
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, replacements[id(linear)])
    if not any(
        getattr(hook, "hook", None) is check_state for hook in model._load_state_dict_pre_hooks.values()
    ):
        model.register_load_state_dict_pre_hook(check_state)
    if verbose and _first_process():
        print_trainable_parameters(model)
    if verbose:
        print_noise([m for m in model.modules() if isinstance(m, FlatLoraLinear)], controller)
    return controller


def _is_linear(modules: dict[str, nn.Module], name: str) -> bool:
    """An nn.Linear, or another library's layer with a packed weight; not what belongs to a layer made of one."""
    module, parent = modules[name], modules[name.rpartition(".")[0]]
    if isinstance(parent, FlatLoraLinear):
        return False
    try:
        return isinstance(module, nn.Linear) or find(module) is not None
    except ValueError:  # which obstacle_to tells with the layer's name
        return True


def check_state(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: what cannot be loaded into the layers is refused before anything is loaded.

    Raises:
        RuntimeError, ValueError: a merged layer; a parameter of another shape; seeds, steps and streams that cannot
            be of one model.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, FlatLoraLinear)}
    found = {}
    for name, layer in layers.items():
        start = f"{prefix}{name}." if name else prefix
        if layer.merged and any(key.startswith(start) for key in state_dict):
            raise RuntimeError(f"{name!r}: merged; call unmerge() before load_state_dict()")
        for key, parameter in layer.named_parameters():
            saved = state_dict.get(start + key)
            if saved is not None and getattr(saved, "shape", None) != parameter.shape:
                got = tuple(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
                raise RuntimeError(
                    f"state_dict: expected {start + key!r} of shape {tuple(parameter.shape)}, got {got}"
                )
        state = state_dict.get(start + EXTRA_STATE)
        if state is not None:
            found[name] = layer_state(state, f"state_dict: {start + EXTRA_STATE!r}")
    layer_states(layers, found)


def print_trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Print and return the number of trainable parameters of `model` and of all, each counted once."""
    parameters = list(model.parameters())
    total = sum(math.prod(whole_shape(p)) for p in parameters)
    trainable = sum(math.prod(whole_shape(p)) for p in parameters if p.requires_grad)
    percent = 100 * trainable / max(total, 1)
    print(f"trainable parameters: {trainable:,} of {total:,} ({percent:.2f} %)")
    return trainable, total


def print_noise(layers: Sequence[NoisyLayer], controller: NoiseController, *, left: int = 0) -> None:
    """Print one line, in the first process: how many layers are under noise, with which streams and how strong.

    Args:
        left: number of LoRA layers without noise.
    """
    if not _first_process():
        return
    streams = {layer.stream for layer in layers}
    first, last = min(streams), max(layer.stream + layer.stream_count - 1 for layer in layers)
    shown = f"streams {first} to {last}" if last > first else f"stream {first}"
    tied = ", tied weights share one" if len(streams) < len(layers) else ""
    without = f", {_count(left, 'LoRA layer')} left without (exclude_modules)" if left else ""
    schedule = controller.schedule if isinstance(controller.schedule, str) else "a schedule of your own"
    step = f", at step {controller.step}" if controller.step else ""
    print(
        f"weight noise on {_count(len(layers), 'layer')} ({shown}{tied}){without};"
        f" sigma {controller.target_sigma:g}, {schedule}{step}"
    )


def check_options(layers: Sequence[Any], controller: NoiseController, options: dict[str, Any]) -> None:
    """That a call which converts nothing asks for nothing else than these layers have.

    Raises:
        ValueError: another controller, or an option with another value.
        TypeError: an option that the layers do not have.
    """
    anew = "to change it, make the layers anew (with PEFT after remove_flat_lora)"
    for layer in layers:
        if layer.noise_controller is not controller:
            raise ValueError(
                f"noise_controller: expected the {layer.noise_controller!r} of the layers converted already, got"
                f" {controller!r}; {anew}"
            )
        for name, value in options.items():
            present = _option(layer, name)
            if value is not None and value != present:
                raise ValueError(
                    f"{name}: expected {present!r}, as the layers converted already have, got {value!r}; {anew}"
                )


def _option(layer: Any, name: str) -> Any:
    if name == "lora_dropout":
        return layer.lora_dropout.p
    if name == "dtype":
        return None if layer.lora_A is None else layer.lora_A.dtype
    if name == "train_weight":
        return layer._base_parameter().requires_grad
    if not hasattr(layer, name):
        raise TypeError(f"options: expected keyword arguments of {type(layer).__name__}, got {name!r}")
    return getattr(layer, name)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _first_process() -> bool:
    """Of torch.distributed's group, or of those that torchrun has started."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"
