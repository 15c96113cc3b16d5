"""`FlatLoraLinear`, and the helper that puts it into a model.

In a training loop:

    controller = apply_flat_lora(model, target_modules=["query", "value"], r=8, sigma=0.05)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    controller.attach(optimizer)  # each optimiser step draws anew
    for batch in batches:
        loss(model, batch).backward()  # any number of micro-batches: all see the same noise
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

import contextlib
import math
import os
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..op import checks
from ..op.functional import fused_flat_lora_linear
from .controller import NoiseController, signed
from .layer import NoisyLayer, check_noise_options, controller_of
from .names import matches
from .state import layer_state, layer_states

_MASK64 = (1 << 64) - 1
# These call no child's forward on some path of theirs: they read its weight, and would miss the adapter.
_READ_WEIGHTS_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
EXTRA_STATE = "_extra_state"  # torch's name for it
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class FlatLoraLinear(NoisyLayer):
    """A frozen linear layer with a low-rank adapter, trained under weight noise drawn inside the kernel.

    Computes ``x @ (W + eps)^T + scaling * (dropout(x) @ A^T) @ B^T + bias`` in training mode and the same
    without eps and dropout in eval mode, see `fused_flat_lora_linear`. Source: Li et al., Flat-LoRA, ICML
    2025, arXiv 2409.14396; the adapter is that of Hu et al., LoRA, ICLR 2022, initialised as in PEFT.

    `noise_scale`, the std of eps per row, depends on W, A and B. `NoiseController.advance` computes it, once per
    optimiser step and not per micro-batch, at the cost of one read of W; so does a forward that finds the
    parameters changed, see `NoisyLayer`.

    Args:
        weight: (N, K) float16, bfloat16, float32 or float64. Shared, not copied, and frozen
            (`requires_grad = False`), as is `bias`, unless `train_weight`.
        bias: (N,) or None.
        r: rank, >= 0; 0 = no adapter, `lora_A` and `lora_B` are None.
        lora_alpha: `scaling` is ``lora_alpha / r``.
        sigma: strength of the noise, >= 0, for a controller of its own (default 0.05); 0 = plain fused LoRA.
        lora_dropout: probability of dropout on the adapter's input. Draws from torch's global generator, as
            `nn.Dropout` does.
        noise: "gaussian" or "rademacher".
        noise_controller: the `NoiseController` shared with the other layers, instead of `sigma`.
        stream: uint32, which layer this is; layers that share a controller need different ones. Default: that of
            a layer of the controller with the same weight, else the next one free.
        samples, antithetic: the rows of x fall into `samples` groups with noise of their own, in training
            mode; "batch" = as many as ``x.shape[0]``, one per sequence.
        strategy, noise_accum, backend: as in `fused_flat_lora_linear`.
        dtype: of `lora_A` and `lora_B`; default float32 beside a 16-bit weight, else that of the weight.
        train_weight: `weight` and `bias` train, too (full fine-tuning under weight noise, with r = 0 without an
            adapter).

    Parameters: `weight` (N, K) and `bias` (N,); `lora_A` (r, K), at first Kaiming-uniform, and
    `lora_B` (N, r), at first zeros.

    State dict: these parameters under these names, plus one int64 tensor (base, step, stream) of the noise.
    Loading one moves the controller to that step.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        sigma: float | None = None,
        lora_dropout: float = 0.0,
        noise: str = "gaussian",
        noise_controller: NoiseController | None = None,
        stream: int | None = None,
        samples: int | str = 1,
        antithetic: bool = False,
        strategy: str | None = None,
        noise_accum: str | None = None,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        train_weight: bool = False,
    ) -> None:
        super().__init__()
        checks.weight(weight)
        checks.uint32("r", r)
        check_noise_options(stream, noise, samples)
        if noise_controller is None:
            noise_controller = NoiseController(sigma=0.05 if sigma is None else sigma)
        elif sigma is not None:
            raise ValueError(f"sigma: expected None, because noise_controller has one, got {sigma}")
        self.out_features, self.in_features = weight.shape
        self.r = r
        self.lora_alpha = lora_alpha
        self.scaling = lora_alpha / r if r else 1.0

        self.weight = _parameter(weight, train_weight)
        self.bias = None if bias is None else _parameter(bias, train_weight)
        if dtype is None:
            dtype = torch.float32 if weight.dtype.itemsize == 2 else weight.dtype
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        if r:
            self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=dtype, device=weight.device))
            self.lora_B = nn.Parameter(torch.empty(self.out_features, r, dtype=dtype, device=weight.device))
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.reset_lora_parameters()

        self._base_weight: Any = ()  # (the original,) while merged; the tuple hides it from nn.Module
        self._set_up_noise(
            noise_controller,
            stream=stream,
            noise=noise,
            samples=samples,
            antithetic=antithetic,
            strategy=strategy,
            noise_accum=noise_accum,
            backend=backend,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> FlatLoraLinear:
        """The same layer with an adapter: shares and freezes the weight and bias of `linear`.

        Args:
            options: keyword arguments of `FlatLoraLinear`.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        layer = cls(linear.weight, linear.bias, **options)
        return layer.train(linear.training)

    def reset_lora_parameters(self) -> None:
        """`lora_A` Kaiming-uniform with a = sqrt(5), `lora_B` zeros: the adapter starts at no change."""
        if self.lora_A is not None and self.lora_B is not None:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    @property
    def sigma(self) -> float:
        """The controller's, of this step."""
        return self.noise_controller.sigma

    @property
    def merged(self) -> bool:
        return bool(self._base_weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in the type of `x`, which is that of `weight` outside autocast.

        Raises:
            RuntimeError: in training mode while merged.
        """
        if self.merged:
            if self.training:
                raise RuntimeError(
                    "FlatLoraLinear: merged, so that nothing of it trains; call unmerge() or eval()"
                )
            return F.linear(x, self.weight, self.bias)
        lora_A, lora_B = self._with_auxiliary(self.lora_A, self.lora_B)
        dropout = self.training and self.lora_dropout.p and lora_A is not None
        return fused_flat_lora_linear(
            x,
            self.weight,
            lora_A,
            lora_B,
            self.bias,
            scaling=self.scaling,
            lora_x=self.lora_dropout(x) if dropout else None,
            **self.noise_arguments(x),
        )

    def _weight_in_use(self) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
        weight = self._base_weight[0] if self._base_weight else self.weight
        return weight, self.lora_A, self.lora_B, self.scaling

    @torch.no_grad()
    def merge(self) -> None:
        """Put ``W + scaling B A`` in the place of `weight`: inference at the cost of a plain linear layer.

        The sum is formed in float32 (float64 for float64) and rounded once to the type of `weight`. That
        loses what of the update lies below half a unit in the last place of each weight: up to 2**-8 of its
        size for bfloat16, 2**-11 for float16. The original weight is kept, so that merging takes the memory
        of one more weight (and float32 copies while it runs) and `unmerge` restores every bit. A state dict
        taken while merged holds the original weight. Merging twice changes nothing.
        """
        if self.merged:
            return
        compute = torch.promote_types(self.weight.dtype, torch.float32)
        merged = self.weight.to(compute, copy=True)
        if self.lora_A is not None and self.lora_B is not None:
            merged.add_(self.lora_B.to(compute) @ self.lora_A.to(compute), alpha=self.scaling)
        self._base_weight = (self.weight,)
        self.weight = nn.Parameter(merged.to(self.weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Put the original `weight` back: the same parameter, bit for bit."""
        if self.merged:
            (self.weight,) = self._base_weight
            self._base_weight = ()

    def _apply(self, fn: Any, recurse: bool = True) -> FlatLoraLinear:
        merged = self.merged
        self.unmerge()
        super()._apply(fn, recurse)
        if merged:
            self.merge()
        return self

    def get_extra_state(self) -> Tensor:
        controller = self.noise_controller
        state = [signed(controller.base), controller.step, self.stream]
        return torch.tensor(state, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        base, step, stream = layer_state(state, "state_dict: '_extra_state'")
        self.noise_controller.move_to(base, step)
        self.stream = stream

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            weight = self._base_weight[0]
            destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise RuntimeError("FlatLoraLinear: merged; call unmerge() before load_state_dict()")
        self._wait_until_ready()
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh_noise_scale()

    def extra_repr(self) -> str:
        names = ("in_features", "out_features", "r", "lora_alpha")
        text = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        merged = ", merged" if self.merged else ""
        return f"{text}, bias={self.bias is not None}, {self.describe_noise()}{merged}"


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
        ValueError: no `nn.Linear` below `model` matches; or one that is not plain (a forward of its own, as quantised
            layers have, a parametrization, hooks, a sharded weight), or whose parent reads its weight past its
            forward (`nn.MultiheadAttention`, `nn.TransformerEncoderLayer`, a parent with a forward of its own), so
            that an adapter would have no effect; or settings or options other than those of the layers replaced
            already; or `model` has LoRA layers of PEFT, for which `flatlora_kernels.integrations.peft` is made.
    """
    _refuse_peft(model)
    pattern = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    modules = dict(model.named_modules(remove_duplicate=False))
    targets = {n: m for n, m in modules.items() if n and isinstance(m, nn.Linear) and matches(n, pattern)}
    existing = [m for m in model.modules() if isinstance(m, FlatLoraLinear)]
    settings = {"sigma": sigma, "schedule": schedule, "total_steps": total_steps, "seed": seed}
    again = [m for n, m in modules.items() if n and isinstance(m, FlatLoraLinear) and matches(n, pattern)]
    if not targets and not again:
        linears = [n for n, m in modules.items() if n and isinstance(m, nn.Linear)]
        raise ValueError(
            f"target_modules: expected to match the name of an nn.Linear, got {pattern!r}, which matches"
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
        if obstacle:
            raise ValueError(f"target_modules: expected plain linear layers, got {name!r}: {obstacle}")

    controller = controller_of(existing, noise_controller, **settings)
    if not targets:
        check_options(again, controller, options)
    tied = {id(layer._base_parameter()): layer.stream for layer in existing}
    stream = 1 + max((layer.stream for layer in existing), default=-1)
    if not existing:
        model.requires_grad_(False)
    replacements: dict[int, FlatLoraLinear] = {}
    for name, linear in targets.items():
        if id(linear) not in replacements:
            same = tied.setdefault(id(linear.weight), stream)
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
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
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
    streams = sorted({layer.stream for layer in layers})
    shown = f"streams {streams[0]} to {streams[-1]}" if len(streams) > 1 else f"stream {streams[0]}"
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


def listed(names: Iterable[str]) -> str:
    """The first eight, for messages."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _first_process() -> bool:
    """Of torch.distributed's group, or of those that torchrun has started."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def _refuse_peft(model: nn.Module) -> None:
    """By names, because PEFT need not be installed."""
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__module__.partition(".")[0] == "peft" and kind.__name__ in ("PeftModel", "LoraLayer"):
                raise ValueError(
                    f"model: expected one without LoRA layers of PEFT, got {type(module).__name__}; for these,"
                    " from flatlora_kernels.integrations.peft import apply_flat_lora"
                )


def bypass_of(modules: dict[str, nn.Module], name: str) -> str | None:
    """What around the layer computes it without calling it, so that neither noise nor adapter would be seen.

    Looked at are functions in instance attributes `forward` and `apply_*`, which is where Unsloth's and axolotl's LoRA
    kernels are. Of these, it bypasses the layer if it has "lora" in its name or its code's; so does a forward of the
    direct parent that neither leads to that of the parent's class, as accelerate's hooks do, nor names the layer.

    Args:
        modules: the model's, by name.
    """
    path = name.split(".")
    for depth in range(len(path)):
        parent = modules[".".join(path[:depth])]
        for attribute, found in vars(parent).items():
            if not callable(found) or not (attribute == "forward" or attribute.startswith("apply_")):
                continue
            functions = list(_functions(found))
            if attribute == "forward" and type(parent).forward in functions:
                continue
            names = {
                n for f in functions for n in (f.__name__, *f.__code__.co_names, *f.__code__.co_freevars)
            }
            reads = any("lora" in n.lower() for n in names)
            direct = attribute == "forward" and depth == len(path) - 1
            if reads or (direct and path[-1] not in names):
                kind = functions[0] if functions else type(found)
                where = repr(path[depth - 1]) if depth else "the model"
                return (
                    f"{where} around it ({type(parent).__name__}) has an attribute {attribute} of its own,"
                    f" {kind.__module__}.{kind.__name__}, which does not call it; {_SWITCHES}"
                )
    return None


_SWITCHES = (
    "kernels of LoRA are switched off in axolotl by lora_mlp_kernel: false, lora_qkv_kernel: false and"
    " lora_o_kernel: false, in Unsloth by UNSLOTH_FUSED_LORA_DROPOUT=0 and a lora_dropout above 0"
)


def _functions(found: Any) -> Iterator[types.FunctionType]:
    """The Python functions that a callable consists of: those it binds, wraps or closes over."""
    seen, rest = set(), [found]
    while rest:
        item = rest.pop(0)
        if id(item) in seen or isinstance(item, (type, nn.Module)) or not callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, types.FunctionType):
            yield item
            for cell in item.__closure__ or ():
                with contextlib.suppress(ValueError):  # empty
                    rest.append(cell.cell_contents)
        inner = ("__func__", "func", "__wrapped__", "_torchdynamo_orig_callable")
        rest += [getattr(item, attribute, None) for attribute in inner]


def obstacle_to(base: nn.Module, *forwards: Callable[..., Any]) -> str | None:
    """Why the fused op cannot stand for ``base(x)``, where it can for modules with one of these forwards."""
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if hasattr(base, "_hf_hook"):
        return "accelerate's hook moves its weight (a device_map over several devices, or offload)"
    if type(base).forward not in forwards or "forward" in vars(base):
        return f"{type(base).__name__} has a forward of its own"
    if any(getattr(base, hooks) for hooks in HOOKS):
        return "it has hooks, which the fused op would not call"
    weight: Any = base.weight
    if type(weight) is not nn.Parameter or weight.dtype not in checks.FLOAT_DTYPES or weight.dim() != 2:
        return f"its weight is a {type(weight).__name__} of {weight.dtype} and shape {tuple(weight.shape)}"
    return None


def _parameter(tensor: Tensor, train: bool) -> nn.Parameter:
    if not isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=train)
    return tensor.requires_grad_(train)  # type: ignore[return-value]
