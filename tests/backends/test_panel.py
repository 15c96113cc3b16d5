"""Strategy "panel": slices of W + eps through a bounded workspace, and the vendor's product."""

from __future__ import annotations

from collections.abc import Iterator

import compare
import pytest
import torch
from compare import problem
from targets import Target, randn

import flatlora_kernels as fk
from flatlora_kernels.backends.shared import panel
from flatlora_kernels.backends.shared.workspace import workspace_limit

DRAWS = [
    {},
    {"noise": "rademacher"},
    {"row_offset": 5, "col_offset": 24, "sample_offset": 3},
    {"noise": "rademacher", "row_offset": 2, "samples": 2, "antithetic": True, "sample_offset": 1},
]
MIB = 1 << 20


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight outputs of 272 steps in 32 bits: many slices, the last one ragged."""
    monkeypatch.setattr(panel, "workspace_limit", lambda weight: 8 * 272 * 4)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("outputs", [1, 7, 8, 9, 63, 64, 65, 300, 4096, 14336])
@pytest.mark.parametrize("length", [1, 100, 4096])
@pytest.mark.parametrize("limit", [0, 1000, 300_000, 16 * MIB])
def test_slices_cover_all_within_the_limit(outputs: int, length: int, limit: int) -> None:
    found = panel.slices(outputs, length, 2, limit)
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == outputs
    width = found[0][1]
    assert all(begin % 8 == 0 for begin, _ in found)  # a call of the generator covers eight columns
    if width > 8:
        assert width * length * 2 <= limit
    if len(found) > 1:
        fewest = -(-outputs // max(limit // (length * 2) // 64 * 64, 8))
        assert len(found) <= max(fewest, -(-outputs // max(limit // (length * 2) // 8 * 8, 8)))


def test_the_caller_may_allow_more_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    size = 2 * weight.numel()
    assert workspace_limit(weight) == size // 4
    assert workspace_limit(torch.empty(14336, 4096, dtype=torch.bfloat16, device="meta")) == 16 * MIB
    for allowed, limit, count in ((16 * MIB, 16 * MIB, 2), (1 << 40, size, 1), (MIB, MIB, 32)):
        monkeypatch.setenv("FLATLORA_WORKSPACE", str(allowed))
        assert workspace_limit(weight) == limit
        found, taken = panel.workspace(weight, "cuda", False)
        assert len(found) == count and taken <= limit
    monkeypatch.setenv("FLATLORA_WORKSPACE", "16M")
    with pytest.raises(ValueError, match="FLATLORA_WORKSPACE: expected a number of bytes, got '16M'"):
        workspace_limit(weight)
    monkeypatch.setenv("FLATLORA_WORKSPACE", "")
    assert workspace_limit(weight) == size // 4


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize("column_major", [False, True])
def test_noise_is_that_of_perturb_weight(
    target: Target,
    dtype: torch.dtype,
    draw: dict[str, object],
    column_major: bool,
    small_workspace: None,
    nan_in_new_memory: None,
) -> None:
    """Rows of the identity select columns of W + eps, bit for bit; in the input gradient rows."""
    N, K, samples = 66, 272, int(draw.get("samples", 1))  # type: ignore[call-overload]
    weight = randn(N, K, dtype=dtype, device=target.device)
    if column_major:
        weight = weight.t().contiguous().t()
    scale = torch.rand(N, device=target.device)
    x = torch.eye(K, dtype=dtype, device=target.device).repeat(samples, 1).requires_grad_()
    assert len(panel.workspace(weight, target.device, False)[0]) > 4
    y = target.linear(x, weight, noise_scale=scale, seed=7, strategy="panel", **draw)
    rest = {k: v for k, v in draw.items() if k not in ("samples", "sample_offset")}
    expected = [
        fk.perturb_weight(
            weight,
            scale,
            seed=7,
            sample=int(draw.get("sample_offset", 0)) + g,
            backend=target.backend,
            **rest,
        )  # type: ignore[call-overload, arg-type]
        for g in range(samples)
    ]
    assert torch.equal(y, torch.cat([e.t() for e in expected]))
    some = min(N, K)  # each group has K rows
    grad_y = torch.zeros(samples * K, N, dtype=dtype, device=target.device)
    for g in range(samples):
        grad_y[g * K : g * K + some] = torch.eye(some, N, dtype=dtype, device=target.device)
    (dx,) = torch.autograd.grad(y, x, grad_y)
    for g in range(samples):
        assert torch.equal(dx[g * K : g * K + some], expected[g])
        assert not dx[g * K + some : (g + 1) * K].any()


@pytest.mark.parametrize("parts", ["none", "bias", "adapter", "all"])
def test_values(
    target: Target, dtype: torch.dtype, parts: str, small_workspace: None, nan_in_new_memory: None
) -> None:
    p = problem(
        20, 66, 272, dtype, target.device, rank=3 if parts in ("adapter", "all") else 0,
        bias=parts in ("bias", "all"), lora_x=parts == "all", samples=2, adapter_dtype=None
        if dtype == torch.float64 else torch.float32,
    )  # fmt: skip
    compare.check_problem(target, p, strategy="panel")


@pytest.mark.parametrize("parts", ["none", "bias", "adapter"])
def test_a_last_slice_of_one_output(
    parts: str, monkeypatch: pytest.MonkeyPatch, nan_in_new_memory: None
) -> None:
    """torch 2.10 multiplies into a single column as if nothing lay between its values. All backends' code is this."""
    target = Target("reference", "cpu")
    monkeypatch.setattr(panel, "workspace_limit", lambda weight: 0)
    p = problem(
        64, 129, 137, torch.bfloat16, target.device, rank=3 * (parts == "adapter"), bias=parts == "bias"
    )
    for input_grad in (False, True):
        begin, end = panel.workspace(p.weight, target.device, input_grad)[0][-1]
        assert end - begin == 1
    compare.check_problem(target, p, strategy="panel")


def test_weight_is_not_written_to(target: Target) -> None:
    p = problem(20, 66, 272, device=target.device, rank=3)
    before = p.weight.clone()
    version = p.weight._version
    compare.run(target, p, strategy="panel")
    assert torch.equal(p.weight, before)
    assert p.weight._version == version


def test_five_runs(target: Target, dtype: torch.dtype, small_workspace: None) -> None:
    p = problem(20, 66, 272, dtype, target.device, rank=3, bias=True)
    first = compare.run(target, p, strategy="panel")
    for _ in range(4):
        for name, value in compare.run(target, p, strategy="panel").items():
            assert torch.equal(first[name], value), name
