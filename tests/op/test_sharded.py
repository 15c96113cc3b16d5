"""The op on DTensors: what ranks compute together is what one process computes, with the bits of the same eps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import flatlora_kernels as fk
from flatlora_kernels.op import sharded

RANKS, B, T, K, N, R = 2, 4, 6, 16, 9, 3
PLACEMENTS = {
    "rows": (Shard(0), Replicate()),
    "rows, rows of x": (Shard(0), Shard(1)),
    "columns": (Shard(1), Shard(2)),
    "columns, whole x": (Shard(1), Replicate()),
    "whole, batches of x": (Replicate(), Shard(0)),
    "whole, rows of x": (Replicate(), Shard(1)),
    "whole": (Replicate(), Replicate()),
}
OPTIONS: list[dict[str, Any]] = [
    {"noise": noise, "samples": samples, "antithetic": antithetic}
    for noise, samples, antithetic in (
        ("gaussian", 1, False),
        ("near_gaussian", 4, True),
        ("rademacher", 2, False),
        ("hadamard", 4, False),
    )
]
NAMES = ("x", "weight", "lora_A", "lora_B", "bias", "lora_x")


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = ((B, T, K), (N, K), (R, K), (N, R), (N,), (B, T, K))
    return {n: torch.randn(s, dtype=torch.float64) for n, s in zip(NAMES, shapes, strict=True)}


def one_row() -> dict[str, Tensor]:
    return {n: t[:1] if n in ("weight", "lora_B", "bias") else t for n, t in tensors().items()}


def product(given: dict[str, Any], **options: Any) -> Any:
    return fk.fused_flat_lora_linear(**given, scaling=0.7, seed=11, stream=5, backend="reference", **options)


def results(given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """y and the gradients of everything."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    y = product(leaves, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    full = y.full_tensor() if sharded.is_sharded(y) else y
    (full * weights).sum().backward()
    found = {"y": full.detach()}
    for name, t in leaves.items():
        grad = t.grad
        assert grad is not None, name
        if sharded.is_sharded(grad):
            assert not any(p.is_partial() for p in grad.placements), "an optimiser gets whole sums"
            grad = grad.full_tensor()
        found[name] = grad
    return found


def placed(given: dict[str, Tensor], mesh: Any, of_weight: Any, of_x: Any) -> dict[str, Any]:
    where = {"x": of_x, "lora_x": of_x, "weight": of_weight, "bias": Replicate()}
    if of_weight == Shard(0):
        where["bias"] = Shard(0)
    out = {n: distribute_tensor(t, mesh, [where[n]]) for n, t in given.items() if n in where}
    out["lora_A"] = sharded.beside(out["weight"], given["lora_A"], 1)
    out["lora_B"] = sharded.beside(out["weight"], given["lora_B"], 0)
    return out


def scale_of(given: dict[str, Any]) -> Tensor:
    weight, A, B = (given[n] for n in ("weight", "lora_A", "lora_B"))
    return fk.flat_noise_scale(weight, A, B, scaling=0.7, sigma=0.4, backend="reference")


def body(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {"errors": errors(mesh), "experts": experts(rank, world)}
    for (name, (w, x)), (index, options) in itertools.product(PLACEMENTS.items(), enumerate(OPTIONS)):
        given = placed(tensors(), mesh, w, x)
        scale = scale_of(given)
        found[name, index] = results(given, noise_scale=scale, **options), scale
    given = placed(one_row(), mesh, Shard(0), Replicate())  # the last rank has none
    found["one row"] = results(given, noise_scale=scale_of(given)), scale_of(given)
    for name in ("rows", "columns"):
        w, x = PLACEMENTS[name]
        given = placed(tensors(), mesh, w, x)
        found[name, "sigma"] = product(given, sigma=0.4).full_tensor()
        # Of nothing but eps: exact sums of one term each.
        only = {
            "x": distribute_tensor(torch.eye(K, dtype=torch.float64), mesh, [Replicate()]),
            "weight": distribute_tensor(torch.zeros(N, K, dtype=torch.float64), mesh, [w]),
        }
        for index, options in enumerate(OPTIONS):
            eps = product(only, noise_scale=torch.ones(N), noise=options["noise"])
            found[name, "eps", index] = eps.full_tensor()
    return found


E, ENDS, STREAM = 5, (3, 3, 8, 9, 14), 40


def experts(rank: int, world: int) -> dict[str, Any]:
    """Of a mixture, its own experts with their rows; the last rank has fewer."""
    torch.manual_seed(1)
    x, weight = torch.randn(ENDS[-1], K).double(), torch.randn(E, N, K).double()
    lora_A, lora_B = torch.randn(E, R, K).double(), torch.randn(E, N, R).double()
    each = -(-E // world)
    own = slice(rank * each, min(E, (rank + 1) * each))
    begin = ENDS[own.start - 1] if own.start else 0
    rows = slice(begin, ENDS[own.stop - 1])
    leaves = [t.clone().requires_grad_() for t in (x[rows], lora_A[own], lora_B[own])]
    y = fk.fused_flat_lora_grouped_linear(
        leaves[0], weight[own], *leaves[1:], offsets=[end - begin for end in ENDS[own]], scaling=0.7, sigma=0.4, seed=3,
        stream=STREAM + own.start, backend="reference",
    )  # fmt: skip
    y.square().sum().backward()
    return {"y": y.detach(), "grads": [t.grad for t in leaves]}


def errors(mesh: Any) -> list[str]:
    given = placed(tensors(), mesh, Shard(0), Replicate())
    plain = tensors()
    odd = distribute_tensor(torch.zeros(N, 20), mesh, [Shard(1)])
    split = distribute_tensor(torch.zeros(3, 20), mesh, [Shard(1)])
    calls = (
        lambda: product({**given, "x": plain["x"]}),
        lambda: product({**plain, "x": given["x"]}),
        lambda: product({**given, "lora_A": plain["lora_A"]}),
        lambda: product(given, noise_scale=torch.ones(4)),
        lambda: product(given, noise_scale=torch.ones(N), row_offset=3),
        lambda: product({"x": split, "weight": odd}),
        lambda: product(
            placed(plain, mesh, Shard(0), Shard(1)) | {"weight": given["weight"]}, noise_scale=torch.ones(N), samples=5
        ),
        lambda: results(placed(plain, mesh, Replicate(), Shard(1)), noise_scale=torch.ones(N), samples=8),
        lambda: fk.perturb_weight(given["weight"], torch.ones(N), seed=1),
    )  # fmt: skip
    return [_message(call) for call in calls]


def _message(call: Any) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return "none"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return on_ranks(RANKS, body, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("index", range(len(OPTIONS)), ids=[o["noise"] for o in OPTIONS])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_ranks_are_the_whole(ranks: list[dict[Any, Any]], name: str, index: int) -> None:
    scale = scale_of(tensors())
    alone = results(tensors(), noise_scale=scale, **OPTIONS[index])
    for rank in ranks:
        found, its_scale = rank[name, index]
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)
        assert torch.equal(its_scale, ranks[0][name, index][1])
        if not name.startswith("columns"):  # whose sums of squares are added up in another order
            assert torch.equal(its_scale, scale)


@pytest.mark.parametrize("name", ("rows", "columns"))
def test_bits_of_eps(ranks: list[dict[Any, Any]], name: str) -> None:
    for index, options in enumerate(OPTIONS):
        whole = fk.materialize_noise(
            torch.ones(N), K, seed=11, stream=5, noise=options["noise"], dtype=torch.float64, backend="reference"
        )  # fmt: skip
        for rank in ranks:
            assert torch.equal(rank[name, "eps", index], whole.t())


def test_sigma_in_the_place_of_a_scale(ranks: list[dict[Any, Any]]) -> None:
    alone = product(tensors(), sigma=0.4)
    for rank in ranks:
        for name in ("rows", "columns"):
            torch.testing.assert_close(rank[name, "sigma"], alone, rtol=1e-6, atol=1e-6)


def test_a_rank_without_rows(ranks: list[dict[Any, Any]]) -> None:
    scale = scale_of(one_row())
    alone = results(one_row(), noise_scale=scale)
    for rank in ranks:
        torch.testing.assert_close(rank["one row"], (alone, scale), rtol=1e-6, atol=1e-6)


def test_experts_shared_out(ranks: list[dict[Any, Any]]) -> None:
    """Bit for bit: no sum goes over experts."""
    alone = experts(0, 1)
    assert torch.equal(torch.cat([rank["experts"]["y"] for rank in ranks]), alone["y"])
    for parts, whole in zip(
        zip(*(rank["experts"]["grads"] for rank in ranks), strict=True), alone["grads"], strict=True
    ):
        assert torch.equal(torch.cat(parts), whole)


def test_errors(ranks: list[dict[Any, Any]]) -> None:
    expected = (
        "x: expected a DTensor, because weight or x is one, got Tensor of shape (4, 6, 16)",
        "weight: expected a DTensor, because weight or x is one, got Tensor of shape (9, 16)",
        "lora_A: expected a DTensor",
        "noise_scale: expected the whole layer's, of shape (9,), got shape (4,)",
        "row_offset, col_offset, layer_shape: expected 0, 0 and None beside a DTensor",
        "weight: expected columns cut at multiples of 8, because noise comes in groups of 8, got 20 columns for 2",
        "samples: expected an int >= 1 that divides",
        "samples: expected groups that each lie on one rank, got samples=8 for x of shape (4, 6, 16) with S(1)",
        "weight: expected a tensor; pass its to_local(), with row_offset, col_offset and layer_shape, got a DTensor",
    )
    for found, start in zip(ranks[0]["errors"], expected, strict=True):
        assert found.startswith(start), found
