"""PEFT's LoRA in a Llama that ranks share, by tensor parallelism or FSDP2, against one process."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks, whole
from torch import nn
from torch.distributed.fsdp import fully_shard

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model  # noqa: E402

from flatlora_kernels.integrations.peft import apply_flat_lora  # noqa: E402
from flatlora_kernels.op import sharded  # noqa: E402

STEPS, RANKS, BATCH = 5, 2, 4
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "tensor parallel": {"layout": "tp"},
    "tensor parallel, trained biases": {"layout": "tp", "lora": {"lora_bias": True}},
    "tensor parallel, recomputed": {"layout": "tp", "recomputed": True},
    "tensor parallel, hadamard per sequence": {"layout": "tp", "noise": "hadamard", "samples": "batch"},
    "FSDP2": {"layout": "fsdp"},
    "FSDP2, recomputed": {"layout": "fsdp", "recomputed": True},
    "FSDP2, DoRA": {"layout": "fsdp", "lora": {"use_dora": True}},
    "FSDP2, converted late": {"layout": "fsdp", "late": True},
    "mixture, FSDP2": {"layout": "fsdp", "model": "mixtral"},
    "mixture, FSDP2, recomputed": {"layout": "fsdp", "model": "mixtral", "recomputed": True},
}


def load(folder: str, layout: str | None) -> Any:
    if layout != "tp":
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_plan="auto", tp_size=RANKS)
    return transformers.LlamaForCausalLM.from_pretrained(folder, distributed_config=config)


def train(
    rank: int,
    world: int,
    folder: str,
    layout: str,
    recomputed: bool = False,
    late: bool = False,
    model: str = "llama",
    lora: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    torch.manual_seed(0)
    base = load(f"{folder}/{model}", layout if world > 1 else None)
    lora = {"target_modules": TARGETS, **(lora or {})}
    if model == "mixtral":
        lora = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    peft_model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **lora))
    fill(peft_model)
    if recomputed:
        peft_model.gradient_checkpointing_enable()
        peft_model.enable_input_require_grads()
    if not late:
        controller = apply_flat_lora(peft_model, sigma=0.3, seed=5, verbose=False, **options)
    if layout == "fsdp" and world > 1:
        for block in base.model.layers:
            fully_shard(block)
        fully_shard(peft_model)
    if late:  # the classes of layers change, and no parameter
        controller = apply_flat_lora(peft_model, sigma=0.3, seed=5, verbose=False, **options)
    peft_model.train()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    controller.attach(optimizer)
    losses = []
    for step in range(STEPS):
        ids = torch.randint(0, 64, (BATCH, 8), generator=torch.Generator().manual_seed(step))
        if layout == "fsdp" and world > 1:
            ids = ids.chunk(world)[rank]
        loss = peft_model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            torch.distributed.all_reduce(total)
        losses.append(total.item() / world)
    trained = [(n, p) for n, p in peft_model.named_parameters() if p.requires_grad]
    peft_model.eval()
    with torch.no_grad():
        evaluated = peft_model(input_ids=torch.arange(16).view(2, 8)).logits
    assert all(layer.noise_scale is not None for layer in controller.layers)
    return {"weights": whole(trained), "losses": losses, "evaluated": evaluated}


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """The same values wherever they lie; PEFT's own are drawn by each rank for itself."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_A" not in name and "lora_B" not in name:
            continue
        drawn = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        if sharded.is_sharded(parameter):
            drawn = torch.distributed.tensor.distribute_tensor(
                drawn, parameter.device_mesh, parameter.placements
            )
        parameter.copy_(drawn)


def all_cases(rank: int, world: int, folder: str) -> dict[str, Any]:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    return {name: train(rank, world, folder, **case) for name, case in CASES.items() if runs(case)}


def runs(case: dict[str, Any]) -> bool:
    from peft.tuners.lora import model as of_peft

    return case["layout"] != "tp" or getattr(of_peft, "is_transformers_dtensor_tp", False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 64, "num_key_value_heads": 2}
    folder = str(tmp_path_factory.mktemp("models"))
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(f"{folder}/llama")
    mixtral = transformers.MixtralConfig(num_local_experts=5, **sizes)  # no number of ranks divides them
    transformers.MixtralForCausalLM(mixtral).save_pretrained(f"{folder}/mixtral")
    return folder


@pytest.fixture(scope="module")
def ranks(models: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("peft")
    return on_ranks(RANKS, functools.partial(all_cases, folder=models), folder)


@pytest.mark.parametrize("case", CASES)
def test_ranks_are_one_process(ranks: list[dict[str, Any]], models: str, case: str) -> None:
    if case not in ranks[0]:
        pytest.skip("needs a PEFT and a transformers whose tensor parallelism is that of DTensors")
    alone = train(0, 1, models, **CASES[case])
    for rank in ranks:
        torch.testing.assert_close(rank[case], alone, rtol=1e-4, atol=2e-5)


def test_noise_matters(ranks: list[dict[str, Any]], models: str) -> None:
    quiet = train(0, 1, models, layout="fsdp", noise="rademacher")
    assert abs(quiet["losses"][-1] - ranks[0]["FSDP2"]["losses"][-1]) > 1e-4
