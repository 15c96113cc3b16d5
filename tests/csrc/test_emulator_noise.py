"""The kinds of noise that are the same bits on every device, in the emulated CUDA kernels: eps against the oracle, and
the transform of `hadamard`."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
import torch
from emulator import Kernels
from test_emulator import BF16, F16, F32, kernels, settings
from torch import Tensor

from flatlora_kernels.backends.shared import arguments
from flatlora_kernels.core.noise import epsilon
from flatlora_kernels.core.records import Draw, Product

__all__ = ["kernels", "settings"]  # fixtures

pytestmark = pytest.mark.emulator

TOP = 2**32
GPU = arguments.GPU.pack(*(0,) * 10)


def draw_of(kind: str, scale: Tensor, **changed: object) -> Draw:
    return Draw(scale, torch.tensor(2**61 + 12345), 7, kind)._replace(**changed)


# --- eps ---


def perturbed(kernels: Kernels, out: Tensor, draw: Draw, weight: Tensor | None = None) -> Tensor:
    kernels._check(kernels.library.flatlora_cuda_perturb(arguments.perturb(weight, draw, out), GPU))
    return out


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


# Where the tensor begins, and t of hadamard: whole patches, cut ones, both ends of the indices, tiles below a chunk.
PLACES = [
    (0, 0, 5),
    (16, 32, 9),
    (8, 8, 4),
    (4, 16, 3),
    (3, 24, 4),
    (5, 40, 12),
    (48, 8, 2),
    (0, 8, 1),
    (2, 8, 0),
]
PLACES += [(TOP - 96, TOP - 320, 7)]


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("kind", ["near_gaussian", "rademacher", "hadamard"])
def test_eps_has_the_bits_of_the_oracle(kernels, kind, dtype):
    for row_offset, col_offset, tile_bits in PLACES:
        for N, K in ((37, 72), (21, 131), (64, 296)):
            for sample in (2, 3):
                scale = 0.1 + torch.rand(N, generator=torch.Generator().manual_seed(N))
                draw = draw_of(
                    kind, scale, sample_offset=sample, antithetic=sample == 3,
                    row_offset=row_offset, col_offset=col_offset, tile_bits=tile_bits,
                )  # fmt: skip
                expected = epsilon(draw, K, dtype).to(dtype)
                assert perturbed(kernels, torch.empty(N, K, dtype=dtype), draw).equal(expected)
                columns = torch.empty(K, N, dtype=dtype).t()
                assert perturbed(kernels, columns, draw).equal(expected)


@pytest.mark.parametrize("kind", ["near_gaussian", "rademacher", "hadamard"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_every_size_of_the_factor(kernels, kind, dtype):
    """Beyond the largest finite factor of near_gaussian m would not fit; below the least normal one bits are few."""
    deviation = 25.787593916455254
    ends = [
        0.0,
        float("inf"),
        3.4e38,
        1e38,
        1e38 / 112 * deviation,
        1e-38,
        1e-38 * deviation,
        9.2e-41 * deviation,
        1e-43,
    ]
    scale = torch.cat([torch.tensor(ends), 10 ** torch.linspace(-40, 38, 119)])
    draw = draw_of(kind, scale, tile_bits=7)
    expected = epsilon(draw, 128, dtype).to(dtype)
    assert expected.isnan().any() == (kind == "near_gaussian")  # 0 times infinity
    assert same(perturbed(kernels, torch.empty(128, 128, dtype=dtype), draw), expected)


def test_near_gaussian_divides_as_ieee_does(kernels):
    """By the square root of 665: all ties that a product with the reciprocal would get wrong are among so many."""
    scale = torch.randint(
        0x3F800000, 0x40000000, (40000,), dtype=torch.int32, generator=torch.Generator().manual_seed(3)
    )
    draw = draw_of("near_gaussian", scale.view(F32))
    assert perturbed(kernels, torch.empty(40000, 8), draw).equal(epsilon(draw, 8, F32))


@pytest.mark.parametrize("kind", ["near_gaussian", "rademacher", "hadamard"])
def test_sums_are_rounded_once(kernels, kind):
    """bfloat16 weights and factors: the sum is that of exact numbers. W: not far from eps, and far."""
    scale = 10 ** torch.linspace(-3, 3, 48)
    draw = draw_of(kind, scale, tile_bits=5)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    exact = weight.double() + epsilon(draw, 64, BF16).double()
    found = perturbed(kernels, torch.empty_like(weight), draw, weight).double()
    nearest = (exact - found).abs()
    for other in (exact.to(BF16), torch.nextafter(found.to(BF16), exact.to(BF16))):
        assert (nearest <= (exact - other.double()).abs()).all()


# --- The transform ---


class Case(NamedTuple):
    M: int
    N: int
    K: int
    tile_bits: int
    dtype: torch.dtype = BF16
    input_grad: bool = False
    row_offset: int = 0
    col_offset: int = 0
    samples: int = 1
    antithetic: bool = False
    add: bool = True
    layout: str = "rows"  # "columns": `a` is column-major; "odd": rows begin anywhere

    def __str__(self) -> str:
        return "-".join(map(str, self)).replace("torch.", "")


CASES = [
    Case(2, 640, 4112, 12, row_offset=4096 - 320),
    Case(1, 512, 4096, 12, F32, input_grad=True, add=False),
    Case(2, 528, 2064, 11, F16, row_offset=2048 - 256),
    Case(1, 1024, 1168, 10, input_grad=True),
    Case(3, 528, 1040, 9, F32),
    # tiles that are cut at both ends
    Case(2, 1040, 976, 9, row_offset=80, col_offset=400),
    Case(2, 976, 1040, 10, F32, True, row_offset=400, col_offset=80),
    Case(2, 301, 707, 9, F16, row_offset=77, col_offset=408),
    Case(2, 707, 301, 9, BF16, True, row_offset=505, col_offset=1000, add=False),
    Case(1, 100, 600, 12, row_offset=TOP - 4096 - 50, col_offset=TOP - 4096 - 56),
    # samples
    Case(6, 520, 528, 9, samples=3),
    Case(4, 528, 520, 9, F32, True, samples=4, antithetic=True),
    # `a` in any layout
    Case(3, 512, 512, 9, layout="columns"),
    Case(3, 512, 520, 9, F16, True, layout="odd"),
    # smaller tiles
    *(Case(2, 37, 61, bits, F32, bits % 2 == 1, row_offset=3 * bits, col_offset=8) for bits in range(6)),
    Case(4, 300, 140, 7, samples=2, antithetic=True),
    Case(2, 260, 700, 8, F16, True, row_offset=9, add=False),
]  # fmt: skip


def operands(case: Case) -> tuple[Tensor, Tensor, Draw]:
    generator = torch.Generator().manual_seed(case.N + case.K)
    inner, outputs = (case.N, case.K) if case.input_grad else (case.K, case.N)
    a = torch.randn(case.M, inner, generator=generator).to(case.dtype)
    if case.layout == "columns":
        a = a.t().contiguous().t()
    elif case.layout == "odd":
        a = torch.nn.functional.pad(a, (0, 3), value=torch.nan)[:, :inner]
    y = torch.randn(case.M, outputs, generator=generator) * 10
    y = (y if case.add else torch.full_like(y, torch.nan)).to(case.dtype)
    scale = 0.1 + torch.rand(case.N, generator=generator)
    return a, y, draw_of("hadamard", scale, samples=case.samples, sample_offset=1, antithetic=case.antithetic,
                         row_offset=case.row_offset, col_offset=case.col_offset, tile_bits=case.tile_bits)  # fmt: skip


def transform(kernels: Kernels, a: Tensor, draw: Draw, input_grad: bool, y: Tensor, add: bool) -> Tensor:
    out = y.clone()
    packed = arguments.transform(a, draw, input_grad, out, add)
    kernels._check(kernels.library.flatlora_cuda_transform(packed, GPU))
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transform(kernels, case):
    a, y, draw = operands(case)
    expected, size = [], []
    for group, (rows, before) in enumerate(zip(a.chunk(case.samples), y.chunk(case.samples), strict=True)):
        eps = epsilon(draw, case.K, case.dtype, group).double()
        eps = eps if case.input_grad else eps.t()
        add = before.double() if case.add else 0 * before.nan_to_num().double()
        expected.append(rows.double() @ eps + add)
        size.append(rows.double().abs() @ eps.abs() + add.abs())
    expected, size = torch.cat(expected), torch.cat(size)
    results = []
    for seed in (0, 1, 2):
        kernels.set(seed=seed)
        results.append(transform(kernels, a, draw, case.input_grad, y, case.add))
    assert all(r.equal(results[0]) for r in results)
    error = (results[0].double() - expected).abs() - torch.finfo(case.dtype).eps / 2 * expected.abs()
    assert (error <= 1e-6 * size).all()


def test_no_bank_conflicts_but_of_signs(kernels):
    for case in CASES[:5]:
        a, y, draw = operands(case)
        kernels.statistics()
        transform(kernels, a, draw, case.input_grad, y, case.add)
        sites = [site for site in kernels.statistics() if site.phases and site.file == "transform.h"]
        # The signs of outputs, two bytes to a thread, lie in the order of their reversed indices.
        assert len(sites) >= 6 and sum(bool(site.conflicts) for site in sites) <= 1


def test_every_synchronisation_of_the_transform(kernels):
    for case in (Case(2, 1024, 1040, 9), Case(2, 512, 2048, 10, F32), Case(2, 300, 140, 7)):
        a, y, draw = operands(case)
        kernels.statistics()
        good = transform(kernels, a, draw, case.input_grad, y, case.add)
        sites = [site for site in kernels.statistics() if site.synchronises]
        assert sites
        for site in sites:
            with kernels.without(site):
                try:
                    wrong = not transform(kernels, a, draw, case.input_grad, y, case.add).equal(good)
                except RuntimeError:
                    wrong = True
                assert wrong, str(site)


def test_no_fused_product_of_hadamard(kernels):
    a, weight = torch.ones(3, 16, dtype=BF16), torch.ones(8, 16, dtype=BF16)
    kernels.library.flatlora_cuda_error.restype = ctypes.c_char_p
    draw = draw_of("hadamard", torch.ones(8), tile_bits=3)
    y = torch.empty(3, 8, dtype=BF16)
    packed = arguments.linear(Product(a, weight, False, None, None, None, 1.0), draw, "folded", y)
    error = kernels.library.flatlora_cuda_linear(packed, GPU)
    assert error and b"hadamard" in kernels.library.flatlora_cuda_error(error)
    assert kernels.library.flatlora_cuda_linear_workspace(packed, GPU) == -error
