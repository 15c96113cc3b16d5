"""Directions that fine-tuning puts into the weights: by construction, and as PEFT counts them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, QuantizedWeight, apply_flat_lora, flatness

N, K = 20, 6
VALUES = (10.0, 8.0, 6.0, 4.0, 2.0, 1.0)


def base() -> tuple[Tensor, Tensor, Tensor]:
    """U (N, N), V (K, K), and a weight with K of the N directions, so that others can be new to it."""
    rng = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))[0] for n in (N, K))
    return U, V, U[:, :K] * torch.tensor(VALUES, dtype=torch.float64) @ V.t()


def turned(weight: Tensor, U: Tensor, V: Tensor, index: int, by: float, to: int) -> Tensor:
    """The vector of that index, times its value, moved by so much of a new direction."""
    return weight + by * torch.outer(U[:, to], V[:, index])


def test_a_direction_that_was_not_there_is_found_at_its_place() -> None:
    U, V, before = base()
    one = turned(before, U, V, 3, 8.0, 10)  # of the value 4: 8.94 now, the second; cosine 0.45
    assert flatness.intruders(before, one).tolist() == [1]
    two = turned(one, U, V, 5, 5.0, 11)  # of the value 1: 5.1 now, the fifth; cosine 0.2
    assert flatness.intruders(before, two).tolist() == [1, 4]
    assert flatness.intruders(before, two, top_k=4).tolist() == [1], "the fifth is not looked at"
    assert flatness.intruders(before, two, threshold=0.4).tolist() == [4]
    assert flatness.intruders(before, turned(before, U, V, 3, 50.0, 3)).numel() == 0, "it has only grown"


def test_a_model_s_count_is_that_of_its_merged_weights() -> None:
    U, V, before = base()
    layer = FlatLoraLinear(before.clone(), r=2, lora_alpha=4.0, dtype=torch.float64)  # scaling 2
    with torch.no_grad():
        layer.lora_A.copy_(V[:, [3, 5]].t())
        layer.lora_B.copy_(U[:, 10:12] * torch.tensor([4.0, 2.5], dtype=torch.float64))
    model = nn.Sequential(layer, nn.Linear(N, 2))
    assert flatness.intruder_dimensions(model) == {"0": 2}
    assert flatness.intruder_dimensions(model, top_k=4) == {"0": 1}
    layer.merge()
    assert flatness.intruder_dimensions(model) == {"0": 2}
    with torch.no_grad():
        layer.lora_B.zero_()
    assert flatness.intruder_dimensions(model) == {"0": 0}


def test_a_packed_weight_is_decoded() -> None:
    torch.manual_seed(0)
    packed = QuantizedWeight.quantize(torch.randn(32, 64), "nf4")
    layer = FlatLoraLinear(packed, r=2)
    with torch.no_grad():
        layer.lora_B.normal_(std=2)
    after = packed.dequantize() + layer.scaling * (layer.lora_B @ layer.lora_A).detach()
    expected = len(flatness.intruders(packed.dequantize(), after))
    assert expected > 0
    assert flatness.intruder_dimensions(nn.Sequential(layer)) == {"0": expected}


@pytest.mark.parametrize("top_k, threshold", [(10, 0.5), (4, 0.3)])
def test_peft_counts_the_same(top_k: int, threshold: float) -> None:
    pytest.importorskip("peft", reason="needs peft")
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    from flatlora_kernels.integrations import peft as in_peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, 40))
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_()
    in_peft.apply_flat_lora(model, verbose=False)
    ours = flatness.intruder_dimensions(model, top_k=top_k, threshold=threshold)
    said: list[str] = []
    reduce_intruder_dimension(model, top_k=top_k, threshold_epsilon=threshold, logging_sink=said.append)
    theirs = {
        line.partition(":")[0]: int(line.rpartition(" ")[2]) if "Intruders" in line else 0
        for line in said
        if ": " in line
    }
    assert sum(theirs.values()) > 0, "the test shows nothing"
    assert ours == theirs


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_base_that_the_initialisation_changed(start: str) -> None:
    """Against the base of now, whose main directions are gone, what has not trained counts as an intruder."""
    pytest.importorskip("peft", reason="needs peft")
    from peft import LoraConfig, get_peft_model

    from flatlora_kernels.integrations import peft as in_peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    before = {f"base_model.model.{name}": base[int(name)].weight.detach().clone() for name in ("0", "2")}
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["0", "2"], init_lora_weights=start))
    in_peft.apply_flat_lora(model, verbose=False)
    with pytest.raises(
        ValueError, match=f"before: expected the weights .* as the initialisation '{start}' .* got None"
    ):
        flatness.intruder_dimensions(model)
    assert flatness.intruder_dimensions(model, before=before) == dict.fromkeys(before, 0)
    del before["base_model.model.2"]
    with pytest.raises(ValueError, match="before: expected a weight for 'base_model.model.2', got none"):
        flatness.intruder_dimensions(model, before=before)


def test_what_it_cannot_count_is_refused() -> None:
    weight = torch.eye(4)
    with pytest.raises(ValueError, match=r"after: expected the shape of before, \(4, 4\), got \(4, 3\)"):
        flatness.intruders(weight, weight[:, :3])
    with pytest.raises(ValueError, match=r"before: expected a matrix, got \(1, 4, 4\)"):
        flatness.intruders(weight[None], weight[None])
    with pytest.raises(ValueError, match="top_k: expected an int >= 1, got 2.5"):
        flatness.intruders(weight, weight, top_k=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k: expected an int >= 1, got 0"):
        flatness.intruders(weight, weight, top_k=0)
    with pytest.raises(ValueError, match="threshold: expected 0 < threshold <= 1, got 2"):
        flatness.intruders(weight, weight, threshold=2)
    with pytest.raises(ValueError, match="expected layers that draw weight noise"):
        flatness.intruder_dimensions(nn.Linear(3, 3))
    plain = nn.Sequential(nn.Linear(3, 3))
    apply_flat_lora(plain, ["0"], r=0, train_weight=True, sigma=0.0, verbose=False)
    with pytest.raises(ValueError, match="expected layers with adapters in use, got none"):
        flatness.intruder_dimensions(plain)
