"""The tolerance rule lets right results through and stops plausible wrong ones."""

from __future__ import annotations

import compare
import pytest
import torch
from compare import Problem, problem
from targets import Target
from torch import Tensor

REFERENCE = Target("reference", "cpu")


def judge(p: Problem, y: Tensor) -> None:
    eps = compare.group_eps(REFERENCE, p)
    exact, scale = compare.exact_and_scale(p, eps)
    compare.check("y", y, exact["y"], compare.plain(p, eps)["y"], scale["y"], torch.finfo(p.x.dtype).eps)


def perturbed(p: Problem, **changes: object) -> Tensor:
    changed = Problem(**{**vars(p), "options": {**p.options, **changes}})
    return p.weight.float() + compare.group_eps(REFERENCE, changed)[0]


def accumulated_in(dtype: torch.dtype, p: Problem, panel: int) -> Tensor:
    """Panels of columns whose partial sums are kept in `dtype`."""
    total = torch.zeros(len(p.x), len(p.weight), dtype=dtype)
    weight = perturbed(p).to(p.x.dtype).float()
    for x, w in zip(p.x.float().split(panel, 1), weight.split(panel, 1), strict=True):
        total = (total.float() + x @ w.t()).to(dtype)
    return total.to(p.x.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_right_accumulation_passes(dtype: torch.dtype) -> None:
    p = problem(30, 100, 2048, dtype)
    judge(p, accumulated_in(torch.float32, p, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_accumulation_is_stopped(dtype: torch.dtype) -> None:
    p = problem(30, 100, 2048, dtype)
    with pytest.raises(AssertionError, match="error"):
        judge(p, accumulated_in(dtype, p, 64))


def test_rounding_a_float32_operand_to_bfloat16_is_stopped() -> None:
    p = problem(30, 100, 260)
    with pytest.raises(AssertionError, match="max error"):
        judge(p, (p.x.bfloat16().double() @ perturbed(p).double().t()).float())


@pytest.mark.parametrize(
    "change",
    [{"stream": 4}, {"seed": 1}, {"noise": "rademacher"}, {"row_offset": 1}, {"col_offset": 8}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_noise_is_stopped(dtype: torch.dtype, change: dict[str, object]) -> None:
    p = problem(30, 100, 260, dtype)
    judge(p, (p.x.double() @ perturbed(p).double().t()).to(dtype))
    with pytest.raises(AssertionError, match="max error"):
        judge(p, (p.x.double() @ perturbed(p, **change).double().t()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_single_wrong_element_is_stopped(dtype: torch.dtype) -> None:
    p = problem(30, 100, 260, dtype)
    weight = perturbed(p)
    weight[7, 259] = p.weight[7, 259]  # no noise in the last column of one row
    with pytest.raises(AssertionError, match="max error"):
        judge(p, (p.x.double() @ weight.double().t()).to(dtype))


def test_not_a_number_is_stopped() -> None:
    p = problem(3, 4, 5)
    with pytest.raises(AssertionError, match="max error nan"):
        judge(p, torch.full((3, 4), float("nan")))


def test_the_exact_formula_agrees_with_autograd() -> None:
    """`compare.formula` holds the gradients written out; torch derives them by itself."""
    p = problem(12, 7, 10, torch.float64, rank=3, bias=True, lora_x=True, samples=3)
    eps = compare.group_eps(REFERENCE, p)
    exact, _ = compare.exact_and_scale(p, eps)
    for name, value in compare.plain(p, eps).items():
        assert abs(value.numpy() - exact[name]).max() < 1e-13, name
