"""Parents that compute LoRA layers themselves are refused; those that call them, or their own forward, are not."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from accelerate import cpu_offload, dispatch_model  # noqa: E402
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module  # noqa: E402
from peft import get_peft_model  # noqa: E402
from peft_models import agree, flat_layers, lora, run, scramble, with_noise  # noqa: E402

from flatlora_kernels import FlatLoraLinear, NoiseController  # noqa: E402
from flatlora_kernels import apply_flat_lora as flat_lora  # noqa: E402
from flatlora_kernels.integrations.peft import apply_flat_lora  # noqa: E402


class Block(nn.Sequential):
    """Its class's forward names no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.act, self.down_proj = nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


TARGETS = ["gate_proj", "down_proj"]


# As axolotl and Unsloth have them: what the layers hold is passed on, the layers are not called.


def get_lora_parameters(layer: Any) -> tuple[Any, ...]:
    base = layer.base_layer
    return base.weight, base.bias, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def apply_lora_mlp(self: Any, x: Tensor) -> Tensor:
    for number, layer in enumerate((self.gate_proj, self.down_proj)):
        weight, bias, A, B = get_lora_parameters(layer)
        x = F.linear(x, weight, bias) + x @ A.T @ B.T
        x = x if number else torch.tanh(x)
    return x


def reads_weights(self: Any, x: Tensor) -> Tensor:
    products = [(layer.weight, layer.bias) for layer in self.children() if hasattr(layer, "weight")]
    return F.linear(torch.tanh(F.linear(x, *products[0])), *products[1])


def calls_layers(self: Any, x: Tensor) -> Tensor:
    """As Liger's forwards, or the `original_apply_qkv` that axolotl and Unsloth put where a kernel is off."""
    return self.down_proj(torch.tanh(self.gate_proj(x)))


def make_apply(name: str) -> Callable[..., Tensor]:
    def apply(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, *get_lora_parameters(getattr(self, name))[:2])

    return apply


def bind(attribute: str, function: Callable[..., Any]) -> Callable[[Any], None]:
    return lambda block: setattr(block, attribute, types.MethodType(function, block))


BYPASSES: dict[str, Callable[[Any], None]] = {
    "forward": bind("forward", apply_lora_mlp),
    "partial": bind("forward", functools.partial(apply_lora_mlp)),  # type: ignore[arg-type]
    "apply_qkv": bind("apply_qkv", apply_lora_mlp),
    "apply_o, not bound": lambda block: setattr(block, "apply_o", apply_lora_mlp),
    "apply_o, a partial": lambda block: setattr(block, "apply_o", functools.partial(apply_lora_mlp, block)),
    "apply_in_proj, a closure": bind("apply_in_proj", make_apply("gate_proj")),
    "reads weights": bind("forward", reads_weights),
    "compiled": bind("forward", torch.compile(apply_lora_mlp, backend="eager")),
    "in a hook of accelerate": lambda block: (
        bind("forward", apply_lora_mlp)(block),
        add_hook_to_module(block, ModelHook()),
    )[0],
}


@pytest.mark.parametrize("kind", BYPASSES)
def test_parents_that_compute_layers_themselves(kind: str) -> None:
    peft = get_peft_model(Model(), lora(target_modules=TARGETS))
    plain = Model()
    for layers in (peft.base_model.model.layers, plain.layers):
        BYPASSES[kind](layers[1])
    found = (
        r"'layers\.1\.gate_proj': '1' around it \(Block\) has an attribute (forward|apply_\w+) of its own, .*"
    )
    switches = r"lora_mlp_kernel: false, lora_qkv_kernel: false .*UNSLOTH_FUSED_LORA_DROPOUT=0"
    with pytest.raises(ValueError, match=rf"^peft_model: .*{found}{switches}.*as for 'layers.1.down_proj'"):
        apply_flat_lora(peft)
    assert not flat_layers(peft)
    apply_flat_lora(peft, exclude_modules=["layers.1"])
    assert len(flat_layers(peft)) == 2
    with pytest.raises(ValueError, match="^target_modules: .*'layers.1.gate_proj': '1' around it"):
        flat_lora(plain, TARGETS)
    assert not any(isinstance(module, FlatLoraLinear) for module in plain.modules())


def test_forwards_further_out() -> None:
    """Of the modules around the parent, those alone that read adapters: others call what is between."""
    peft = get_peft_model(Model(), lora(target_modules=TARGETS))
    peft.base_model.model.forward = types.MethodType(Model.forward, peft.base_model.model)
    peft.forward = lambda x: peft.base_model(x)
    apply_flat_lora(peft)
    outer = nn.ModuleDict({"mlp": nn.ModuleDict({"shared": Block()})})
    bind("forward", apply_lora_mlp)(outer["mlp"])
    with pytest.raises(ValueError, match=r"'mlp\.shared\.gate_proj': 'mlp' around it \(ModuleDict\)"):
        flat_lora(outer, TARGETS)


def cast(peft: Any) -> None:
    """As Accelerator.prepare in mixed precision."""
    from accelerate.utils import convert_outputs_to_fp32

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)
    peft.forward = types.MethodType(autocast(peft.forward.__func__), peft)
    peft.forward = types.MethodType(convert_outputs_to_fp32(peft.forward.__func__), peft)


def hook_every_parent(peft: Any) -> None:
    for module in [m for m in peft.modules() if isinstance(m, (Block, Model))]:
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
        add_hook_to_module(module, ModelHook(), append=True)


def unhook(peft: Any) -> None:
    hook_every_parent(peft)
    remove_hook_from_module(peft.base_model.model, recurse=True)
    assert "forward" in vars(peft.base_model.model.layers[0])  # its class's


def each_block(change: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda peft: [change(block) for block in peft.base_model.model.layers][0]


def wrap_by_hand(block: Any) -> None:
    forward = block.forward
    block.forward = lambda x: forward(x)


HARMLESS: dict[str, Callable[[Any], None]] = {
    "wrapped by hand": each_block(wrap_by_hand),
    "hooks": hook_every_parent,
    "hooks that were removed": unhook,
    "Accelerator.prepare": cast,
    "torch.compile": each_block(
        lambda block: setattr(block, "forward", torch.compile(block.forward, backend="eager"))
    ),
    "compile in place": each_block(lambda block: block.compile(backend="eager")),
    "forward that calls the layers": each_block(bind("forward", calls_layers)),
    "apply_qkv that calls the layers": each_block(bind("apply_qkv", calls_layers)),
    "apply_ that is no function": each_block(lambda block: setattr(block, "apply_norm", True)),
    "apply_ of something else": each_block(lambda block: setattr(block, "apply_rotary", torch.sin)),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_parents_that_call_their_layers(kind: str) -> None:
    torch.manual_seed(0)
    peft = get_peft_model(Model(), lora(target_modules=TARGETS)).train()
    scramble(peft)
    twin = get_peft_model(Model(), lora(target_modules=TARGETS)).train()
    twin.load_state_dict(peft.state_dict())
    HARMLESS[kind](peft)
    peft.controller = apply_flat_lora(peft, sigma=0.3)
    assert len(flat_layers(peft)) == 4
    agree(run(peft), run(with_noise(twin, peft)))


def test_accelerates_hooks_on_the_layers_themselves() -> None:
    """These move weights in and out, which the op would not see."""
    whole = dispatch_model(get_peft_model(Model(), lora(target_modules=TARGETS)), {"": "cpu"})
    apply_flat_lora(whole)  # on one device: no hooks
    plain, outer, inner = Model(), get_peft_model(Model(), lora(target_modules=TARGETS)), Model()
    cpu_offload(inner, execution_device="cpu")
    inner = get_peft_model(inner, lora(target_modules=TARGETS))
    for model in (plain, outer):
        cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"got 'layers\.0\.gate_proj': accelerate's hook moves its weight"):
        flat_lora(plain, TARGETS)
    for model in (inner, outer):
        with pytest.raises(ValueError, match=r"'layers\.0\.gate_proj': accelerate's hook moves its weight"):
            apply_flat_lora(model)


def test_accelerates_hooks_that_move_inputs_alone() -> None:
    """A device_map over several devices sets them, 8 bits of bitsandbytes and HQQ also over one."""
    torch.manual_seed(0)
    model = Model()
    twin = get_peft_model(copy.deepcopy(model), lora(target_modules=TARGETS)).train()
    peft = get_peft_model(dispatch_model(model, {"": "cpu"}, force_hooks=True), lora(target_modules=TARGETS))
    scramble(peft.train())
    twin.load_state_dict(peft.state_dict())
    layer = peft.base_model.model.layers[0].down_proj.base_layer
    assert isinstance(layer._hf_hook, AlignDevicesHook) and "forward" in vars(layer)
    peft.controller = apply_flat_lora(peft, sigma=0.3)
    assert len(flat_layers(peft)) == 4
    agree(run(peft), run(with_noise(twin, peft)))
    plain = dispatch_model(Model(), {"": "cpu"}, force_hooks=True)
    flat_lora(plain, TARGETS)
    assert sum(isinstance(module, FlatLoraLinear) for module in plain.modules()) == 4


def patched(layer: nn.Module) -> None:
    layer.forward = types.MethodType(lambda self, x: x, layer)
    add_hook_to_module(layer, AlignDevicesHook("cpu"))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True)),
        lambda layer: add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True)),
        lambda layer: add_hook_to_module(layer, ModelHook()),
        lambda layer: add_hook_to_module(add_hook_to_module(layer, AlignDevicesHook("cpu")), ModelHook(), append=True),
        patched,
    ],
    ids=["offload", "outputs", "another", "two", "forward"],
)  # fmt: skip
def test_accelerates_hooks_that_do_more(change: Callable[[Any], None]) -> None:
    model = Model()
    change(model.layers[0].down_proj)
    with pytest.raises(ValueError, match=r"'layers\.0\.down_proj': accelerate's hook moves its weight"):
        flat_lora(model, TARGETS)


def test_a_layer_with_a_forward_of_its_own() -> None:
    peft = get_peft_model(Model(), lora(target_modules=TARGETS))
    layer = peft.base_model.model.layers[0].down_proj
    layer.forward = types.MethodType(type(layer).forward, layer)
    with pytest.raises(ValueError, match=r"'layers\.0\.down_proj': it has a forward of its own"):
        apply_flat_lora(peft)


def test_later_adapters() -> None:
    peft = get_peft_model(Model(), lora(target_modules=["layers.0.gate_proj"])).train()
    apply_flat_lora(peft, noise_controller=NoiseController(sigma=0.3))
    BYPASSES["apply_qkv"](peft.base_model.model.layers[1])
    peft.add_adapter("second", lora(target_modules=["gate_proj"]))
    with pytest.warns(UserWarning, match=r"without weight noise: 'layers\.1\.gate_proj': '1' around it"):
        peft(torch.randn(2, 16))
    assert list(flat_layers(peft)) == ["layers.0.gate_proj"]


def test_a_patch_after_the_conversion_is_said() -> None:
    """By the controller, after two steps: conversion could not see it."""
    model = get_peft_model(Model(), lora(target_modules=TARGETS)).train()
    controller = apply_flat_lora(model, sigma=0.1, seed=1, backend="reference", verbose=False)
    block = model.base_model.model.layers[0]
    block.forward = types.MethodType(apply_lora_mlp, block)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller.attach(optimizer)
    with pytest.warns(
        UserWarning, match="2 of 4 layers were trained .* 'layers.0.gate_proj', 'layers.0.down_proj'"
    ):
        for _ in range(3):
            model(torch.randn(4, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
