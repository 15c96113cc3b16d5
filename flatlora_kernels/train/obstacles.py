"""Why a layer or what is around it cannot have weight noise."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..core.quantized import QuantizedWeight, find
from ..op import checks
from ..op.sharded import is_sharded, part_of
from . import zero

_OWNERS = ("bitsandbytes", "compressed_tensors", "gptqmodel", "hqq", "torch", "torchao", "transformers")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLACING = ("_forward_hooks", "_forward_pre_hooks")  # those of tensor parallelism are here


def refuse_peft(model: nn.Module) -> None:
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
    """Why the fused op cannot stand for ``base(x)``, where it can for modules with one of these forwards.

    A packed weight that can be read is none, with the forward of a library that packs weights.
    """
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    placed = only_placed(base)
    if hasattr(base, "_hf_hook") and not placed:
        return "accelerate's hook moves its weight (it is offloaded), or is not known"
    try:
        packed = find(base) is not None
    except ValueError as error:
        return f"its packed weight cannot be read: {error}"
    own = type(base).forward
    known = own.__module__.partition(".")[0] in _OWNERS if packed else own in forwards
    if not known or ("forward" in vars(base) and not placed and not _cut_by_transformers(base)):
        told = packed or getattr(getattr(base, "weight", None), "dtype", None) in checks.FLOAT_DTYPES
        return f"{type(base).__name__} has a forward of its own" + ("" if told else f"; {_formats(base)}")
    if foreign_hooks(base) and not _only_cut(base):
        return "it has hooks, which the fused op would not call"
    if packed:
        return None
    weight: Any = base.weight
    if is_sharded(weight):
        return _cut(weight)
    shape = zero.whole_shape(weight)
    if type(weight) is not nn.Parameter or weight.dtype not in checks.FLOAT_DTYPES or len(shape) != 2:
        found = f"a {type(weight).__name__} of {weight.dtype} and shape {shape}"
        return f"its weight is {found}; {_formats(base)}"
    return None


def foreign_hooks(base: nn.Module) -> bool:
    """Whether it has hooks but those with which ZeRO stage 3 gathers its parameters; reading these does so, too."""
    if not any(getattr(base, hooks) for hooks in HOOKS):  # asked by each forward
        return False
    return any(not zero.gathers(hook) for hooks in HOOKS for hook in getattr(base, hooks).values())


def too_late(base: nn.Module) -> str | None:
    """Why a new layer in the place of this one would not be trained."""
    if any(zero.gathers(hook) for hooks in HOOKS for hook in getattr(base, hooks).values()):
        return "deepspeed.initialize has taken the model already, and would not train its adapter; convert it before"
    return None


def only_placed(base: nn.Module) -> bool:
    """Whether accelerate's hook does no more than to move what the layer is called with to where its weight is.

    A `device_map` over several devices gives such hooks to every layer, 8 bits of bitsandbytes also over one. What is
    around the layer has them, too.
    """
    hook = getattr(base, "_hf_hook", None)
    if hook is None or type(hook).__module__.partition(".")[0] != "accelerate":
        return False
    before = getattr(vars(base).get("_old_forward"), "__func__", None)
    aligned = type(hook).__name__ == "AlignDevicesHook" and not (hook.offload or hook.io_same_device)
    return aligned and before is type(base).forward


def _cut(weight: Any) -> str | None:
    """Why the op cannot take a DTensor."""
    try:
        part_of(weight)
    except ValueError as error:
        return str(error)
    return None


def _only_cut(base: nn.Module) -> bool:
    """Whether its hooks are those of `parallelize_module`, which go along to the layer in its place."""
    if not is_sharded(getattr(base, "weight", None)) or any(
        getattr(base, h) for h in HOOKS if h not in PLACING
    ):
        return False
    found = [hook for hooks in PLACING for hook in getattr(base, hooks).values()]
    return all(getattr(hook, "__module__", "").startswith("torch.distributed.tensor") for hook in found)


def _cut_by_transformers(base: nn.Module) -> bool:
    """Whether its own forward is that of transformers' tensor parallel styles, which PEFT's LoRA knows two of."""
    forward = vars(base)["forward"]
    by_style = getattr(forward, "__module__", "") == "transformers.distributed.tensor_parallel"
    known = getattr(base, "_hf_tp_plan", None) in ("colwise", "rowwise")  # noted by PEFT alone
    return by_style and known and is_sharded(getattr(base, "weight", None))


def refuse_fsdp(model: nn.Module) -> None:
    """FSDP2 knows the parameters and modules that there were when it came, and would not see the new ones."""
    for name, module in model.named_modules():
        if hasattr(module, "_get_fsdp_state"):
            raise ValueError(
                f"model: expected one that FSDP does not shard yet, got fully_shard's {type(module).__name__} at"
                f" {name!r}; call fully_shard after apply_flat_lora"
            )


def _formats(base: nn.Module) -> str:
    try:
        QuantizedWeight.of(base)
    except TypeError as error:
        return str(error).removeprefix("source: ")
    return ""
