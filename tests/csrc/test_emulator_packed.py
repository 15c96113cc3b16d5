"""Packed weights in the CUDA kernels, run by the emulator: the same bits as from the values.

A fused product decodes into the very tiles that a weight of values would be copied to, and sums them in the same order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
from emulator import Kernels
from packed_weights import LAYOUTS, packed
from test_emulator import LIBRARY
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels import QuantizedWeight, backends
from flatlora_kernels.backends.shared import arguments
from flatlora_kernels.core.records import Draw

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.emulator


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    if not LIBRARY.exists():
        pytest.skip("no emulator: make emulator")
    return Kernels(LIBRARY)


@pytest.fixture(autouse=True)
def sm80(kernels: Kernels) -> None:
    kernels.set(architecture=80, seed=0)


def draw_for(weight: QuantizedWeight, noise: str, **where: int) -> Draw:
    scale = 0.01 + 0.02 * torch.rand(weight.shape[0], generator=torch.Generator().manual_seed(1))
    return Draw(scale, torch.tensor(5), noise=noise)._replace(**where)


# --- All layouts ---


def perturbed(kernels: Kernels, q: QuantizedWeight, draw: Draw | None, out: Tensor) -> Tensor:
    call = arguments.perturb(q, draw, out)
    kernels._check(kernels.library.flatlora_cuda_perturb(call, arguments.GPU.pack(*(0,) * 10)))
    return out


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_alone(kernels: Kernels, layout: str, dtype: torch.dtype) -> None:
    """Without noise, into memory in either order; rounded to the owner's type first."""
    for N, K in ((24, 64), (7, 35), (60, 320)):
        made = packed(layout, N, K, BF16)
        for q in (
            packed(layout, N, K, dtype),
            made.to(dtype),
            made.narrow(0, 3, 4).narrow(1, 8, K - 8).to(dtype),
        ):
            expected = q.dequantize()
            assert perturbed(kernels, q, None, torch.empty(q.shape, dtype=dtype)).equal(expected)
            other = torch.empty(*q.shape[::-1], dtype=dtype).t()
            assert perturbed(kernels, q, None, other).equal(expected)


# --- Fused products ---


class Case(NamedTuple):
    layout: str
    M: int
    N: int
    K: int
    config: int  # row of the table in csrc/cuda/configs.h
    noise: str = "gaussian"
    input_grad: bool = False
    rank: int = 0
    samples: int = 1
    row_offset: int = 0
    view: tuple[int, int] = (0, 0)  # rows and columns that it leaves out at the beginning
    odd: bool = False  # rows of x that are not aligned
    apart: bool = False
    splits: int = 1

    def __str__(self) -> str:
        given = [f"{name}{getattr(self, name)}" for name in ("rank", "samples", "row_offset", "splits")]
        flags = [
            name
            for name in ("input_grad", "odd", "apart", "view")
            if getattr(self, name) not in (False, (0, 0))
        ]
        return "-".join(
            [self.layout, f"{self.M}x{self.N}x{self.K}", f"config{self.config}", self.noise, *given, *flags]
        )


CASES = [
    # each kind of scale, both ways, in every tile; more steps than stages, tails
    Case("nf4", 300, 200, 320, 0, rank=16),
    Case("nf4_nested", 300, 136, 320, 0, input_grad=True),
    Case("nf4", 150, 264, 192, 1, "near_gaussian", input_grad=True, rank=8),
    Case("nf4_nested", 150, 200, 320, 1, "rademacher"),
    Case("nf4_nested", 70, 136, 320, 2, "near_gaussian"),
    Case("mxfp4", 70, 136, 352, 2, "rademacher", input_grad=True),
    Case("mxfp4", 70, 72, 352, 1),
    Case("nvfp4", 70, 136, 336, 2),
    Case("nvfp4", 40, 328, 144, 0, "near_gaussian", input_grad=True),
    Case("int8", 300, 200, 328, 0, "near_gaussian"),
    Case("int8_rows", 70, 328, 136, 2, input_grad=True, rank=24),
    Case("fp8", 150, 200, 328, 1, "rademacher", input_grad=True),
    Case("fp8_block", 150, 200, 328, 1),
    Case("fp8_block", 70, 328, 200, 2, "rademacher", input_grad=True),
    # one row, less than a step, a number of scales that fills no word
    Case("nvfp4", 1, 5, 48, 2),
    Case("nf4_nested", 5, 33, 64, 1, "rademacher", input_grad=True),
    Case("int8", 3, 7, 8, 0),
    # views whose scales begin within a word, rows of x and of W that patches do not fit
    Case("nf4_nested", 33, 60, 248, 2, view=(3, 72)),
    Case("nvfp4", 33, 60, 248, 1, "near_gaussian", input_grad=True, view=(3, 8)),
    Case("fp8_block", 33, 140, 256, 2, "rademacher", input_grad=True, view=(65, 72)),
    Case("mxfp4", 33, 60, 320, 2, "near_gaussian", row_offset=3, odd=True),
    Case("int8", 33, 61, 136, 2, "rademacher", row_offset=9, input_grad=True, odd=True),
    # samples, parts of a sum, what rounding leaves
    Case("nf4", 60, 72, 320, 2, samples=3),
    Case("nf4_nested", 60, 72, 576, 1, "rademacher", splits=3),
    Case("nf4_nested", 70, 136, 320, 2, apart=True, rank=8),
    Case("int8", 20, 200, 136, 2, "near_gaussian", input_grad=True, apart=True),
    Case("mxfp4", 20, 40, 128, 2, "rademacher", apart=True),
]


@functools.cache
def inputs(case: Case) -> tuple[Tensor, QuantizedWeight, Draw, dict]:
    g = torch.Generator().manual_seed(7)
    rows, cols = case.view
    whole = packed(case.layout, case.N + rows, case.K + cols, BF16)
    q = whole.narrow(0, rows, case.N).narrow(1, cols, case.K)
    inner, outputs = (case.N, case.K) if case.input_grad else (case.K, case.N)
    a = torch.randn(case.M, inner + case.odd, generator=g).to(BF16)[:, case.odd :]
    options: dict = {
        "config": case.config, "input_grad": case.input_grad, "splits": case.splits,
        "noise_accum": "split" if case.apart else "folded",
    }  # fmt: skip
    if case.rank:
        options["u"] = torch.randn(case.M, case.rank, generator=g).to(BF16)
        options["lora"] = torch.randn(outputs, case.rank, generator=g)
    draw = draw_for(q, case.noise, samples=case.samples, row_offset=case.row_offset)
    return a, q, draw, options


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(kernels: Kernels, case: Case) -> None:
    a, q, draw, options = inputs(case)
    expected, _ = kernels.linear(a, q.dequantize(), draw, **options)
    for seed in (0, 2):  # of the schedule
        kernels.set(seed=seed)
        assert kernels.linear(a, q, draw, **options)[0].equal(expected)


def test_few_rows_and_hopper(kernels: Kernels) -> None:
    """Where a weight of values has kernels that a packed one has not."""
    q = packed("nf4", 72, 128, BF16)
    draw = draw_for(q, "gaussian")
    for architecture, M in ((80, 4), (90, 200)):
        kernels.set(architecture=architecture)
        a = torch.randn(M, 128, generator=torch.Generator().manual_seed(3)).to(BF16)
        y, _ = kernels.linear(a, q, draw)
        expected, _ = kernels.linear(a, q.dequantize(), draw)
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=0.05)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_fused(kernels: Kernels, layout: str, dtype: torch.dtype) -> None:
    """The library takes what `fuses_packed` says, and refuses the rest."""
    fuses = backends.get("cuda").fuses_packed
    for N, K in ((24, 64), (33, 40), (7, 35), (16, 384)):
        for q in (packed(layout, N, K, dtype), packed(layout, N, K, F16).to(dtype)):
            for view in (q, q.narrow(1, 8, 16), q.narrow(1, 4, 16), q.narrow(1, 0, 12)):
                draw = draw_for(view, "gaussian")
                a = torch.ones(3, view.shape[1], dtype=dtype)
                if fuses(view):
                    y, _ = kernels.linear(a, view, draw)
                    assert y.isfinite().all()
                else:
                    with pytest.raises(RuntimeError, match="packed like this"):
                        kernels.linear(a, view, draw)


def test_by_panels_where_parts_are_unusual(kernels: Kernels) -> None:
    """What `Packing` does not tell: scales of another type."""
    q = packed("int8", 24, 64, BF16)
    assert backends.get("cuda").fuses_packed(q)
    other = QuantizedWeight(q.packing, q.parts._replace(scale=q.parts.scale.to(BF16)))
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    options = {"noise_scale": draw_for(q, "gaussian").noise_scale, "seed": 3, "backend": "cuda"}
    with pytest.raises(
        NotImplementedError, match="does not implement strategy='fused' for this weight of format 'int8'"
    ):
        fk.fused_flat_lora_linear(x, other, strategy="fused", **options)
    with pytest.raises(NotImplementedError, match="does not implement noise_accum='split' for this weight"):
        fk.fused_flat_lora_linear(x, other, noise_accum="split", **options)
    y = fk.fused_flat_lora_linear(x, other, **options)
    torch.testing.assert_close(
        y,
        fk.fused_flat_lora_linear(x, other.dequantize(), strategy="panel", **options),
        rtol=2**-7,
        atol=0.02,
    )
