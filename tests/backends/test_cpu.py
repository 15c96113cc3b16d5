"""Backend `cpu` at every instruction set that runs here: what the small problems of the shared tests do not reach."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packed_weights import LAYOUTS, packed
from targets import DTYPES, generator, randn
from torch import Tensor

from flatlora_kernels.backends import cpu
from flatlora_kernels.core.noise import KINDS, epsilon, tile_bits
from flatlora_kernels.core.quantized import Packing, Parts, QuantizedWeight, number_table
from flatlora_kernels.core.records import Draw, Product

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
LEVELS = () if cpu.unavailable() else cpu._load().levels
INTEGERS = [kind for kind in KINDS if kind != "gaussian"]  # eps is bit-equal to the oracle's


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("FLATLORA_CPU_ISA", request.param)
    cpu._load.cache_clear()
    assert cpu.level() == request.param
    yield request.param
    monkeypatch.undo()
    cpu._load.cache_clear()
    cpu._load()


@functools.cache
def oracle(d: Draw, K: int, dtype: torch.dtype, group: int = 0) -> Tensor:
    return epsilon(d, K, dtype, group)


@functools.cache
def draw(N: int, layer: tuple[int, int], strided: bool = True, **which: Any) -> Draw:
    scale = (0.5 + torch.rand(2 * N, generator=generator(4)))[::2]
    scale = scale if strided else scale.clone()
    return Draw(scale, torch.tensor(-5), stream=3, tile_bits=tile_bits(*layer), **which)


# N, K, the whole layer, offset of rows, of columns. Regions of the CPU kernels have 256 x 64 values.
REGIONS = [
    (70, 300, (70, 300), 0, 0),
    (37, 33, (4096, 9000), 4070, 8168),
    (300, 70, (2**32 - 1, 2**32 - 1), 2**32 - 301, 2**32 - 72),
    (90, 150, (200, 40), 23, 8),
    (19, 21, (19, 3), 0, 0),
]


@pytest.mark.parametrize("case", REGIONS, ids=str)
@pytest.mark.parametrize("noise", INTEGERS)
def test_perturb_and_product_see_the_bits_of_the_oracle(level: str, noise: str, case: Any) -> None:
    N, K, layer, row, col = case
    d = draw(N, layer, noise=noise, row_offset=row, col_offset=col, sample_offset=3, antithetic=True)
    for dtype in DTYPES:
        eps = oracle(d, K, dtype).to(dtype)
        for out in (
            torch.empty(N, K, dtype=dtype),
            torch.empty(K, N, dtype=dtype).t(),
            torch.empty(2 * N, 2 * K, dtype=dtype)[::2, ::2],
        ):
            cpu.perturb(None, d, out)
            assert torch.equal(out, eps), (dtype, out.stride())
        for weight in (
            torch.zeros(N, K, dtype=dtype),
            torch.zeros(K, N, dtype=dtype).t(),
            torch.zeros((), dtype=dtype).expand(N, K),
        ):
            for split in ("folded", "split"):
                y = cpu.product(Product(torch.eye(K, dtype=dtype), weight), d, split)
                assert torch.equal(y.t(), eps), (dtype, weight.stride(), split)
                y = cpu.product(Product(torch.eye(N, dtype=dtype), weight, input_grad=True), d, split)
                assert torch.equal(y, eps), (dtype, weight.stride(), split, "input gradient")


@pytest.mark.parametrize("noise", INTEGERS)
def test_perturb_adds_to_the_weight(level: str, noise: str) -> None:
    N, K = 70, 301
    d = draw(N, (N, K), noise=noise)
    for dtype in DTYPES:
        weight = randn(N, K, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        expected = (weight.to(wide) + epsilon(d, K, dtype)).to(dtype)
        for w in (weight, weight.t().contiguous().t(), torch.stack([weight, weight], dim=2)[..., 0]):
            out = torch.empty_like(weight)
            cpu.perturb(w, d, out)
            assert torch.equal(out, expected), (dtype, w.stride())


@pytest.mark.parametrize("noise", [None, *KINDS])
def test_few_rows_have_the_bits_of_many(level: str, noise: str | None) -> None:
    # Their strips of a panel are wider. N and K: less than a vector, than a strip, than a block, and more than each.
    for N, K in ((5, 70), (37, 20), (70, 37), (200, 150)):
        d = None if noise is None else draw(N, (N, K), noise=noise)
        for dtype in DTYPES:
            weight = randn(N, K, dtype=dtype)
            for input_grad in (False, True):
                a = randn(7, N if input_grad else K, dtype=dtype)
                u, lora = randn(7, 3, dtype=dtype), randn(K if input_grad else N, 3, dtype=dtype)
                y = cpu.product(Product(a, weight, input_grad, u, lora), d, "folded")
                for M in range(1, 7):
                    few = cpu.product(Product(a[:M], weight, input_grad, u[:M], lora), d, "folded")
                    assert torch.equal(few, y[:M]), (N, K, dtype, input_grad, M)


# M, N, K, the whole layer, offset of rows, of columns.
TRANSFORMS = [
    (3, 256, 256, (256, 256), 0, 0),
    (5, 140, 300, (140, 300), 0, 0),
    (40, 70, 65, (70, 65), 0, 0),
    (2, 4096, 16, (4096, 5000), 0, 24),
    (2, 50, 130, (9000, 5000), 4070, 4032),
    (1, 300, 520, (300, 520), 0, 0),
    (4, 33, 40, (1, 4000), 2**32 - 33, 2**32 - 40),
    (6, 20, 17, (5, 4000), 3, 16),
]


def bound(a: Tensor, eps: Tensor, y: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """A stage of the transform rounds once, and so do factors, sums over tiles, `add` and the output."""
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    magnitude = a.double().abs() @ eps.double().abs()
    return (bits + 8) * unit * (magnitude + y.abs()) + torch.finfo(dtype).eps / 2 * 1.01 * y.abs()


@pytest.mark.parametrize("case", TRANSFORMS, ids=str)
@pytest.mark.parametrize("input_grad", [False, True], ids=["forward", "input_grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transform(level: str, dtype: torch.dtype, input_grad: bool, case: Any) -> None:
    M, N, K, layer, row, col = case
    contraction, outputs = (N, K) if input_grad else (K, N)
    for samples, strided, add in ((1, False, False), (2, False, True), (1, True, True)):
        where = {"row_offset": row, "col_offset": col, "samples": samples, "strided": strided}
        d = draw(N, layer, noise="hadamard", antithetic=True, **where)
        a = randn(M * samples, contraction, dtype=dtype)
        if strided:
            a = torch.stack([a, a], dim=2)[..., 1]
        before = randn(M * samples, outputs, seed=1, dtype=dtype)
        got = before.clone() if add else torch.full_like(before, torch.nan)
        cpu.transform(a, d, input_grad, got, add)
        for group in range(samples):
            rows = slice(group * M, (group + 1) * M)
            eps = oracle(d, K, dtype, group).double()
            eps = eps if input_grad else eps.t()
            exact = a[rows].double() @ eps + (before[rows].double() if add else 0)
            error = (got[rows].double() - exact).abs()
            limit = bound(a[rows], eps, exact.abs() + before[rows].double().abs(), d.tile_bits, dtype)
            assert (error <= limit).all(), f"{samples}, {strided}, {add}: {(error / limit).max():.3g}"


def test_transform_does_not_depend_on_threads_or_rows(level: str, threads: Any) -> None:
    N, K = 600, 1100
    d = draw(N, (N, K), noise="hadamard")
    a = randn(37, K)
    results = []
    for count, rows in ((1, 37), (4, 37), (2, 1)):
        threads(count)
        y = torch.empty(37, N)
        for begin in range(0, 37, rows):
            cpu.transform(a[begin : begin + rows], d, False, y[begin : begin + rows], False)
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_transform_of_infinity_and_nan(level: str) -> None:
    """One infinity makes infinities of the signs of eps, as in a product; a NaN makes its row NaN alone."""
    N, K = 256, 300
    d = draw(N, (N, K), noise="hadamard")
    a = randn(3, K)
    a[0, 7], a[2, 290] = torch.inf, torch.nan
    y = torch.empty(3, N)
    cpu.transform(a, d, False, y, False)
    assert torch.equal(y[0], torch.inf * epsilon(d, K, torch.float32)[:, 7].sign())
    assert y[1].isfinite().all()
    assert y[2].isnan().all()


def flat(bits: int, N: int, K: int, dtype: torch.dtype, number: str = "table", **how: Any) -> QuantizedWeight:
    """Random codes in rows, every one of them among those of 8 bits; zeros of the type that `difference` names."""
    g = generator(N + K)
    how = {"width": K, **how}
    packing = Packing("flat", N, K, how.pop("own", dtype), dtype, bits, number, **how)
    codes = torch.arange((N * K * bits + 7) // 8).mul(37).to(torch.uint8)
    if number == "table":
        table = torch.randn(2**bits, generator=g)
    else:
        table = number_table(number, bits, torch.device("cpu"))
    blocks = -(-N * K // packing.block) if packing.block else N * (K // packing.block_cols + 1)
    scale = torch.rand(blocks, generator=g)
    zero = torch.randn(blocks, generator=g).to(packing.difference) if "difference" in how else None
    return QuantizedWeight(packing, Parts(codes, table, scale, zero=zero))


HALF = {"difference": torch.float16, "own": torch.float16, "post": 0.7}
# Of more rows than a vector has lanes and more columns than a region; blocks in step with the rows and not.
PACKED = {
    "4 bits, zeros": lambda dtype: flat(4, 37, 320, dtype, block=16, **HALF),
    "4 bits, high first": lambda dtype: flat(4, 37, 320, dtype, block=64, high_first=True),
    "4 bits, of columns": lambda dtype: flat(4, 37, 320, dtype, block_rows=3, block_cols=40, scale_stride=8, **HALF),
    "4 bits, odd": lambda dtype: flat(4, 19, 331, dtype, block=20, high_first=True),
    "8 bits, zeros": lambda dtype: flat(8, 19, 331, dtype, "uint", block_cols=25, scale_stride=14, **HALF),
    "8 bits, table": lambda dtype: flat(8, 19, 331, dtype, block=32),
    "2 bits": lambda dtype: flat(2, 19, 331, dtype, block=24),
    "3 bits": lambda dtype: flat(3, 19, 331, dtype, block_rows=2, block_cols=30, scale_stride=12),
    "e4m3": lambda dtype: flat(8, 19, 331, dtype, "e4m3", block=128),
    "e5m2": lambda dtype: flat(8, 19, 331, dtype, "e5m2", block=128),
    **{name: lambda dtype, name=name: packed(name, 37, 320, dtype) for name in LAYOUTS},
}  # fmt: skip


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """A NaN is that of any bits."""
    nan = expected.isnan()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    equal = got.contiguous().view(integers) == expected.contiguous().view(integers)
    return bool(torch.where(nan, got.isnan(), equal).all())


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weight_has_the_bits_of_the_oracle(level: str, dtype: torch.dtype, layout: str) -> None:
    whole = PACKED[layout](dtype)
    for q in (whole, whole.narrow(0, 2, 17).narrow(1, 16, 296), whole.narrow(1, 5, 23)):
        expected, (N, K) = q.decoded(), q.shape
        for out in (torch.empty(N, K, dtype=dtype), torch.empty(K, N, dtype=dtype).t()):
            cpu.perturb(q, None, out)
            assert same_bits(out, expected), (q.shape, out.stride())


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("noise", [None, *KINDS])
def test_packed_weight_as_its_values(level: str, noise: str | None, layout: str) -> None:
    for dtype in DTYPES:
        q = PACKED[layout](dtype)
        q = QuantizedWeight(q.packing, q.parts._replace(table=q.parts.table.nan_to_num(1.0, 1.0, -1.0)))
        if q.packing.number in ("e4m3", "e5m2"):  # NaN and infinity of the rule are of no use here
            q = QuantizedWeight(q.packing, q.parts._replace(codes=q.parts.codes & 0x3F))
        w, (N, K) = q.decoded(), q.shape
        d = None if noise is None else draw(N, (N, K), noise=noise, row_offset=3, col_offset=16)
        if d is not None:
            for out in (torch.empty(N, K, dtype=dtype), torch.empty(K, N, dtype=dtype).t()):
                cpu.perturb(q, d, out)
                expected = torch.empty_like(out)
                cpu.perturb(w, d, expected)
                assert torch.equal(out, expected), (dtype, out.stride())
        for input_grad in (False, True):
            for M in (3, 40):
                a = randn(M, N if input_grad else K, dtype=dtype)
                for split in ("folded", "split"):
                    y = cpu.product(Product(a, q, input_grad), d, split)
                    assert torch.equal(y, cpu.product(Product(a, w, input_grad), d, split)), (dtype, M)
        assert torch.equal(cpu.row_sq_norms(q, None, None, 1.0), cpu.row_sq_norms(w, None, None, 1.0))
        A, B = randn(3, K), randn(N, 3)
        assert torch.equal(cpu.row_sq_norms(q, A, B, 0.5), cpu.row_sq_norms(w, A, B, 0.5))
