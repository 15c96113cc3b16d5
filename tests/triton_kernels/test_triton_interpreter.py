"""What only GPUs choose, run in Triton's interpreter: every tile of every architecture's table, loads through tensor
descriptors, sums split over programs, and the arithmetic of NVIDIA (its PTX emulated) and AMD.

The rest of the suite runs there too, on backend `triton` with tensors on the CPU: `make test-interpreter`.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import interpreter
import numpy as np
import packed_weights
import ptx
import pytest
import torch
from compare import check_problem, problem, run
from targets import INTERPRETED, Target, randn

import flatlora_kernels as fk
from flatlora_kernels.backends.shared import products
from flatlora_kernels.core import noise as oracle
from flatlora_kernels.core.quantized import number_table
from flatlora_kernels.core.records import Draw, Product

pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from flatlora_kernels.triton_kernels import (  # noqa: E402
    adapter_grads,
    configs,
    launch,
    packed,
    perturb,
    philox,
    product,
    row_norms,
    tile,
    transform,
)
from triton.runtime.interpreter import TensorHandle  # noqa: E402

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter: make test-interpreter"),
]
TRITON = Target("triton", "cpu")


def inline_asm(
    asm: Any, constraints: Any, args: list[Any], dtype: Any, is_pure: Any, pack: Any, **_: Any
) -> Any:
    """`tl.inline_asm_elementwise` by ptx.py, errors of the instructions left out."""
    outputs, pack = str(constraints).count("="), int(pack)
    shape = np.broadcast_shapes(*(arg.handle.data.shape for arg in args))
    inputs: list[Any] = []
    for arg in args:  # 32 bits make a register, of one value or two
        data = np.ascontiguousarray(np.broadcast_to(arg.handle.data, shape)).reshape(-1, pack)
        inputs += list(np.ascontiguousarray(data.view(np.uint32).T))
    registers = ptx.run(asm.value, outputs, *inputs)
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    scalar = not any(arg.type.is_block() for arg in args)
    results = []
    for t in dtypes:
        count = pack * t.primitive_bitwidth // 32
        words, registers = np.stack(registers[:count], -1), registers[count:]
        values = words.view({"fp32": np.float32, "uint32": np.uint32, "bf16": np.uint16}[str(t)]).reshape(
            shape
        )
        results.append(tl.tensor(TensorHandle(values, t), t if scalar else tl.block_type(t, list(shape))))
    assert not registers
    return tuple(results) if isinstance(dtype, tuple) else results[0]


@pytest.fixture(autouse=True)
def prepared_anew() -> Iterator[None]:
    launch.forget()
    yield
    launch.forget()


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the kernels believe that they run on another machine."""

    def use(architecture: str, processors: int = 4) -> None:
        machine = launch.Machine(architecture, processors)
        for module in (launch, product, perturb, row_norms, adapter_grads, transform):
            if hasattr(module, "machine_of"):
                monkeypatch.setattr(module, "machine_of", lambda tensor: machine)
        launch.forget()

    monkeypatch.setattr(tl, "inline_asm_elementwise", inline_asm)
    turn = 2 * np.pi
    for name, function in {
        "_amdgcn_log2": lambda x: tl.log2(x),
        "_amdgcn_sqrt": lambda x: tl.sqrt(x),
        "_amdgcn_cos": lambda x: tl.cos(x * turn),
        "_amdgcn_sin": lambda x: tl.sin(x * turn),
    }.items():
        monkeypatch.setattr(philox, name, function)
    return use


def every_config(direction: str) -> list[Any]:
    """(config, dtype) of all tables, each once."""
    found = {
        config._replace(fill=False): torch.bfloat16 if kind in ("half", "ragged") else torch.float32
        for (family, kind), table in configs.LINEAR.items()
        if family != "interpreter"
        for _, config in table[direction]
    }
    return [pytest.param(c, d, id="x".join(map(str, c))) for c, d in found.items()]


def only(monkeypatch: pytest.MonkeyPatch, direction: str, config: Any) -> None:
    table = configs.LINEAR["interpreter", "any"]
    monkeypatch.setitem(table, direction, ((configs.ANY, config),))


# Two tiles each way, one more for the steps, and a rest everywhere.


@pytest.mark.parametrize(("config", "dtype"), every_config("forward"))
def test_forward_tiles(config: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "forward", config)
    p = problem(config.block_m + 3, config.block_out + 5, 2 * config.block_in + 9, dtype, rank=5, bias=True)
    p.x.requires_grad_(False)
    check_problem(TRITON, p)


@pytest.mark.parametrize(("config", "dtype"), every_config("input_grad"))
def test_input_grad_tiles(config: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "input_grad", config)
    shape = (config.block_m + 3, 2 * config.block_in + 9, config.block_out + 5)
    check_problem(TRITON, problem(*shape, dtype, rank=5, noise="rademacher"))


def count_splits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many partial sums each product is added up from, where it is more than one."""
    seen: list[int] = []
    original = product.add_splits
    monkeypatch.setattr(
        product,
        "add_splits",
        lambda partial, *rest: (seen.append(partial.shape[0]), original(partial, *rest)),
    )
    return seen


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize(
    ("samples", "processors", "noise"), [(1, 16, "gaussian"), (2, 200, "rademacher")], ids=str
)
def test_split_sums(
    carry: bool, samples: int, processors: int, noise: str, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over K for y, over N for dX; the last part is shorter than the others, and the last step a rest."""
    on("interpreter", processors)
    config = configs.Config(16, 128, 16, 1, 1, carry=carry)
    only(monkeypatch, "forward", config)
    only(monkeypatch, "input_grad", config)
    seen = count_splits(monkeypatch)
    options = {"samples": samples, "noise": noise, "row_offset": 6, "antithetic": samples > 1}
    check_problem(TRITON, problem(3 * samples, 139, 171, torch.bfloat16, rank=4, bias=True, **options))
    assert len(seen) == 2
    assert all(n > 1 for n in seen)


@pytest.mark.parametrize(
    ("shape", "samples", "described", "noise"),
    [
        ((5, 264, 136), 1, 2, "gaussian"),
        ((130, 136, 200), 1, 2, "rademacher"),
        ((60, 72, 136), 3, 2, "gaussian"),  # a tile that begins in one sample's rows ends in the next one's
        ((1, 72, 264), 1, 2, "rademacher"),
        ((7, 33, 136), 1, 1, "gaussian"),  # rows of dY are not aligned
        ((7, 33, 41), 1, 0, "gaussian"),
    ],
    ids=str,
)
def test_tensor_descriptors(
    shape: tuple[int, ...],
    samples: int,
    described: int,
    noise: str,
    on: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on("sm90")
    made = []
    monkeypatch.setattr(
        product, "descriptor", lambda *args: made.append(launch.descriptor(*args)) or made[-1]
    )
    monkeypatch.setattr(configs, "DESCRIPTOR_ROWS", 0)  # the tiles here are small
    p = problem(*shape, torch.bfloat16, rank=4, bias=True, samples=samples, sample_offset=1, noise=noise)
    check_problem(TRITON, p)
    assert len(made) == described


def test_descriptor_of_a_part_of_a_matrix(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a wider matrix: what lies beside them is neither read nor multiplied by zero."""
    on("sm90")
    monkeypatch.setattr(configs, "DESCRIPTOR_ROWS", 0)
    p = problem(21, 72, 136, torch.bfloat16)
    for name in ("x", "grad_y"):
        inside = getattr(p, name)
        wide = torch.full((inside.shape[0] + 16, inside.shape[1] + 24), float("nan"), dtype=inside.dtype)
        part = wide[8:-8, 8 : 8 + inside.shape[1]]
        setattr(p, name, part.copy_(inside))
        assert launch.addressable(part)
    check_problem(TRITON, p)


def test_no_two_programs_write_to_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they did, the later one would win, and the results depend on their order."""
    p = problem(21, 70, 40, torch.bfloat16, rank=4, samples=3)
    expected = run(TRITON, p)

    def backwards(pid: Any, num_m: Any, num_n: Any, group_m: Any) -> Any:
        return tile_of(num_m * num_n - 1 - pid, num_m, num_n, group_m)

    tile_of = tile.tile_of
    monkeypatch.setattr(tile, "tile_of", backwards)
    for name, value in run(TRITON, p).items():
        assert torch.equal(value, expected[name]), name


def exactly_rounded(got: torch.Tensor, exact: torch.Tensor) -> None:
    """But for what sums in float32 may be off: no part of it was rounded to fewer bits."""
    assert got.is_contiguous()
    torch.testing.assert_close(
        got.double(), exact, rtol=torch.finfo(got.dtype).eps / 2, atol=2e-6 * exact.abs().max()
    )


@pytest.mark.parametrize(
    ("samples", "processors", "rank", "dtype"),
    [(1, 200, 16, torch.bfloat16), (3, 1, 5, torch.float32), (2, 64, 1, torch.float16)],
    ids=str,
)
def test_u_is_made_in_the_same_pass(
    samples: int, processors: int, rank: int, dtype: torch.dtype, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or in parts, where sizes and strides are no multiples of anything."""
    on("interpreter", processors)
    only(monkeypatch, "forward", configs.Config(16, 64, 32, 1, 1, carry=samples > 1))
    monkeypatch.setattr(products, "matmul", None)  # of which u would be made
    seen = count_splits(monkeypatch)
    p = problem(5 * samples, 75, 271, dtype, rank=rank, bias=True, samples=samples)
    p.lora_A = p.lora_A.t().contiguous().t()
    check_problem(TRITON, p)
    assert bool(seen) == (processors > 1)
    draw = Draw(p.options["noise_scale"], torch.tensor(3), samples=samples)
    arguments = (Product(p.x, p.weight, lora=p.lora_B), p.lora_A, draw, "folded")
    u = TRITON.module.product_and_u(*arguments)[1]
    exactly_rounded(u, p.x.double() @ p.lora_A.double().t())
    assert torch.equal(u, TRITON.module.product_and_u(*arguments)[1])


def test_where_u_is_made() -> None:
    x, weight = torch.empty(16, 64), torch.empty(32, 64)
    assert product.makes_u(x, weight, 16, 1) and product.makes_u(
        x.expand(3, 16, 64).flatten(0, 1), weight, 16, 3
    )
    assert not product.makes_u(x, weight, 17, 1) and not product.makes_u(x, weight, 0, 1)
    assert not product.makes_u(torch.empty(17, 64), weight, 16, 1)
    assert not product.makes_u(x, torch.empty(1 << 20, 128, device="meta"), 16, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 8, 1), (130, 200, 16), (77, 136, 32), (200, 72, 5)], ids=str)
def test_adapter_grads(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of columns and parts of the rows, with a rest of each; beside dY lies NaN."""
    monkeypatch.setattr(configs, "ADAPTER_GRADS", configs.Pass(64, 32, 1))
    M, N, rank = shape
    dy = torch.full((M + 1, N + 16), float("nan"), dtype=dtype)[:M, 8 : N + 8].copy_(randn(M, N, dtype=dtype))
    u, B = randn(M, rank, seed=1, dtype=dtype), randn(rank, N, seed=2, dtype=torch.float32).t()
    monkeypatch.setattr(adapter_grads, "pays", lambda *_: True)
    monkeypatch.setattr(products, "adapter_grads", None)
    v, dB = TRITON.module.adapter_grads(dy, u, B, 0.375)
    exactly_rounded(v, 0.375 * dy.double() @ B.to(dtype).double())
    exactly_rounded(dB, 0.375 * dy.double().t() @ u.double())
    assert v.dtype == dB.dtype == dtype


def test_where_adapter_grads_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dY beyond an L2, a low rank, and parts that fit into the workspace; what is not wanted is not made."""
    assert adapter_grads.pays(8192, 4096, 16) and adapter_grads.pays(2048, 14336, 16)
    assert not adapter_grads.pays(2048, 4096, 16)
    assert not adapter_grads.pays(8192, 4096, 33)
    assert not adapter_grads.pays(1 << 20, 4096, 16)
    monkeypatch.setattr(adapter_grads, "pays", lambda *_: True)
    monkeypatch.setattr(adapter_grads, "adapter_grads", None)
    dy, u, B = randn(9, 33), randn(9, 4, seed=1), randn(33, 4, seed=2)
    for given in ((u, B), (None, B), (u, None)):  # of 32 bits, and 33 columns
        got = TRITON.module.adapter_grads(dy, *given, 0.5)
        for a, b in zip(got, products.adapter_grads(dy, *given, 0.5), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("offsets, programs", [((5, 16), 0), ((0, 8), 3), ((64, 128), 0)], ids=str)
@pytest.mark.parametrize("noise", oracle.KINDS)
def test_perturb_tiles(
    noise: str, offsets: tuple[int, int], programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tile of the table, of which a program draws several, or fewer of a small weight, against the interpreter's
    own."""
    config = configs.PERTURB_UNITS if noise == "near_gaussian" else configs.PERTURB
    columns = 2 * config.steps * config.block_k + 13
    draw = {"seed": 3, "noise": noise, "row_offset": offsets[0], "col_offset": offsets[1]}
    draw["layer_shape"] = (200, 1 << 12)
    scale = torch.rand(config.block_n + 3)
    weight = randn(len(scale), columns)
    expected = fk.perturb_weight(weight, scale, backend="triton", **draw)
    monkeypatch.setattr(configs, "PERTURB_INTERPRETER", config)
    monkeypatch.setattr(configs, "PERTURB_PROGRAMS", programs)
    launch.forget()
    assert torch.equal(fk.perturb_weight(weight, scale, backend="triton", **draw), expected)


def drawn_exactly(scale: torch.Tensor, K: int, dtype: torch.dtype, **draw: Any) -> torch.Tensor:
    """`oracle.epsilon` in the type of the weight."""
    return oracle.epsilon(Draw(scale, **draw), K, dtype).to(dtype)


@pytest.mark.parametrize("architecture", ["interpreter", "sm90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("noise", [kind for kind in oracle.KINDS if kind != "gaussian"])
def test_exact_noise_with_the_arithmetic_of(
    architecture: str, dtype: torch.dtype, noise: str, on: Any
) -> None:
    """Bit for bit, alone and added to a weight, at offsets that cut units and words and at some that do not; scales of
    every size."""
    on(architecture)
    N, K = 45, 72
    scale = torch.exp2(torch.linspace(-20, 9, N)) * (1 + torch.rand(N))
    weight = randn(N, K, dtype=dtype)
    for row, col, sample in ((0, 0, 2), (16, 48, 5), (21, 24, 5), (4, 8, 2), (128, 192, 4)):
        where = {
            "seed": 77,
            "stream": 5,
            "noise": noise,
            "antithetic": True,
            "row_offset": row,
            "col_offset": col,
        }
        shape = {"layer_shape": (300, 300)}
        draw = where | {"seed": torch.tensor(77), "sample_offset": sample}
        draw["tile_bits"] = oracle.tile_bits(300, 300) if noise == "hadamard" else 0
        expected = drawn_exactly(scale, K, dtype, **draw)
        got = fk.materialize_noise(scale, K, dtype=dtype, backend="triton", sample=sample, **where, **shape)
        assert torch.equal(got, expected)
        got = fk.perturb_weight(weight, scale, backend="triton", sample=sample, **where, **shape)
        exact = weight.double() + oracle.epsilon(Draw(scale, **draw), K, dtype).double()
        ulp = torch.finfo(dtype).eps  # float32 alone may save the rounding of eps, or not
        if dtype == torch.bfloat16:
            assert torch.equal(got, exact.to(dtype))
        else:
            torch.testing.assert_close(got.double(), exact, rtol=ulp, atol=ulp)


@pytest.mark.parametrize("noise", ["near_gaussian", "rademacher"])
@pytest.mark.parametrize("architecture", ["sm90", "gfx942"])
def test_products_of_each_noise_with_the_arithmetic_of(architecture: str, noise: str, on: Any) -> None:
    """Tiles carried from one step to the next or not, loaded in pairs or not, noise apart or not."""
    on(architecture)
    for (M, N, K), accum in (((20, 72, 104), "folded"), ((70, 72, 136), "split"), ((70, 41, 75), "folded")):
        options = {"noise": noise, "samples": 2, "antithetic": True, "noise_accum": accum}
        p = problem(M, N, K, torch.bfloat16, rank=4, **options)
        eps = [
            drawn_exactly(
                p.options["noise_scale"],
                K,
                torch.bfloat16,
                seed=torch.tensor(0x1E3779B97F4A7C15),
                stream=3,
                noise=noise,
                sample_offset=g,
                antithetic=True,
            )  # fmt: skip
            for g in range(2)
        ]
        p.options["seed"] = 0x1E3779B97F4A7C15
        y = run(TRITON, p)["y"].double()
        W = torch.stack([p.weight.double() + e.double() for e in eps])
        expected = torch.bmm(p.x.double().view(2, M // 2, K), W.transpose(1, 2)).view(M, N)
        expected += 0.75 * (p.x.double() @ p.lora_A.double().t()) @ p.lora_B.double().t()
        torch.testing.assert_close(y, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_a_warp_looks_up_its_codes() -> None:
    """The one instruction sequence of packed weights that the interpreter does not run."""
    table = torch.randn(16)
    words = torch.randint(0, 1 << 32, (5, 32), generator=torch.Generator().manual_seed(0))
    held = np.tile(table.numpy().view(np.uint32), 2)
    found = ptx.run(packed.LOOKUP_PTX.value, 8, words.numpy().astype(np.uint32), held)
    for i, values in enumerate(found):
        expected = table[words >> 4 * i & 15].numpy()
        assert np.array_equal(np.ascontiguousarray(values).view(np.float32), expected), i


@pytest.mark.parametrize("layout", ["nf4_nested", "int8", "fp8_block", "nvfp4"])
@pytest.mark.parametrize("architecture", ["sm90", "gfx942"])
def test_packed_products_with_the_arithmetic_of(architecture: str, layout: str, on: Any) -> None:
    """Values of pairs or not, in tiles that are carried and in whole units: those of the same call on the values."""
    on(architecture)
    scale = torch.rand(72)
    for noise, shape in (
        ("gaussian", (20, 72, 104)),
        ("near_gaussian", (70, 72, 136)),
        ("rademacher", (3, 72, 96)),
    ):
        M, N, K = shape
        q = packed_weights.packed(layout, N, K, torch.bfloat16)
        draw = Draw(scale, torch.tensor(9), noise=noise)
        for p in (
            Product(randn(M, K, dtype=torch.bfloat16), q),
            Product(randn(M, N, dtype=torch.bfloat16), q, True),
        ):
            expected = TRITON.module.product(p._replace(weight=q.dequantize()), draw, "folded")
            assert torch.equal(TRITON.module.product(p, draw, "folded"), expected), noise


@pytest.mark.parametrize(
    ("block_in", "layout"), [(64, "nf4"), (128, "nf4"), (64, "fp8_block"), (128, "mxfp4")]
)
def test_packed_tiles(block_in: int, layout: str, on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to several blocks of scales across a tile, and a part of one; a shard that begins within a block; sums that
    are split."""
    on("interpreter", 40)
    draw = Draw(torch.rand(72), torch.tensor(9))
    config = configs.Config(16, 64, block_in, 1, 1, carry=block_in == 64)
    only(monkeypatch, "forward", config)
    only(monkeypatch, "input_grad", config._replace(block_out=block_in, block_in=64))
    whole = packed_weights.packed(layout, 80, 256, torch.float32).narrow(0, 8, 72)
    for q in (whole, whole.narrow(1, 24, 197)):
        for p in (Product(randn(5, q.shape[1]), q), Product(randn(5, 72), q, True)):
            expected = TRITON.module.product(p._replace(weight=q.dequantize()), draw, "folded")
            assert torch.equal(TRITON.module.product(p, draw, "folded"), expected)


def test_codes_at_an_odd_address() -> None:
    """They are not fused, and are decoded an element at a time."""
    q = packed_weights.packed("nf4", 40, 64, torch.float32)
    codes = torch.empty(q.parts.codes.numel() + 1, dtype=torch.uint8)[1:].copy_(q.parts.codes)
    odd = fk.QuantizedWeight(q.packing, q.parts._replace(codes=codes))
    assert TRITON.module.fuses_packed(q) and not TRITON.module.fuses_packed(odd)
    draw = Draw(torch.rand(40), torch.tensor(9))
    p = Product(randn(3, 64), q, u=randn(3, 2), lora=randn(40, 2))
    expected = TRITON.module.product(p, draw, "folded")
    torch.testing.assert_close(TRITON.module.product(p._replace(weight=odd), draw, "folded"), expected)
    expected = torch.empty(40, 64)
    for weight in (q, odd):
        TRITON.module.perturb(weight, draw, expected if weight is q else (out := torch.empty(40, 64)))
    assert torch.equal(out, expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, which a GPU does not give
@pytest.mark.parametrize("number", ["int8", "uint", "e4m3", "e5m2"])
def test_every_byte(number: str) -> None:
    """In words of eight columns and by the element; what is infinite or no number, too."""
    for K in (256, 255):
        q = packed_weights.packed("int8", 1, K, torch.float32)
        q.parts.codes.copy_(torch.arange(K).to(torch.uint8))
        table = number_table(number, 8, torch.device("cpu"))
        q = fk.QuantizedWeight(q.packing._replace(number=number), q.parts._replace(table=table))
        out = torch.empty(1, K)
        TRITON.module.perturb(q, None, out)
        torch.testing.assert_close(out, q.dequantize(), rtol=0, atol=0, equal_nan=True)


TRANSFORMS = [  # bits, M, N, K, row and column offset, samples
    (0, 3, 1, 9, 0, 0, 1),
    (2, 4, 5, 12, 3, 8, 2),
    (5, 18, 40, 33, 40, 24, 1),
    (7, 4, 130, 200, 100, 56, 2),
    (8, 3, 256, 256, 0, 0, 1),
    (9, 2, 515, 520, 500, 504, 1),
]


@pytest.mark.parametrize("input_grad", [False, True], ids=["forward", "input_grad"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", TRANSFORMS, ids=str)
def test_transform(case: tuple[int, ...], dtype: torch.dtype, input_grad: bool) -> None:
    """Sums of float32, and the bits of eps where only one of them is asked for; tiles that the shard cuts at both ends,
    column-major and row-major, added to something or not. Beside `a` and `out` lies NaN."""
    bits, M, N, K, row, col, samples = case
    draw = Draw(torch.rand(N), torch.tensor(77), 3, "hadamard", samples, 1, samples > 1, row, col, bits)
    eps = [oracle.epsilon(draw, K, dtype, g) for g in range(samples)]
    eps = [e if input_grad else e.t() for e in eps]
    length, outputs = eps[0].shape
    add = dtype == torch.float16
    wide = torch.full((length + 2, M) if add else (M, length + 16), float("nan"), dtype=dtype)
    a = (wide[1:-1].t() if add else wide[:, 8:-8]).copy_(randn(M, length, dtype=dtype))
    before = (
        randn(M, outputs, seed=1, dtype=dtype) if add else torch.full((M, outputs), float("nan"), dtype=dtype)
    )
    out = before.clone()
    TRITON.module.transform(a, draw, input_grad, out, add)
    exact = torch.cat([part.double() @ e.double() for part, e in zip(a.chunk(samples), eps, strict=True)])
    exactly_rounded(out, exact + before.double() if add else exact)
    few = torch.eye(length, dtype=dtype)[: min(length, 3)].repeat(samples, 1)
    out = few.new_empty(len(few), outputs)
    TRITON.module.transform(few, draw, input_grad, out, False)
    assert torch.equal(out, torch.cat([e[: len(few) // samples] for e in eps]).to(dtype))


@pytest.mark.parametrize("architecture", ["sm90", "gfx942"])
def test_transform_with_the_arithmetic_of(architecture: str, on: Any) -> None:
    on(architecture)
    test_transform((8, 2, 256, 260, 0, 0, 1), torch.bfloat16, False)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, which a GPU does not give
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_infinite_input_is_transformed_to_infinity(dtype: torch.dtype) -> None:
    """What a part leaves of it is no number, and does not count; a NaN stays one."""
    draw = Draw(torch.rand(256), torch.tensor(7), noise="hadamard", tile_bits=8)
    eps = oracle.epsilon(draw, 256, dtype)
    a = randn(3, 256, dtype=dtype)
    a[0, 5], a[1, 6] = -float("inf"), float("nan")
    out = torch.empty_like(a)
    TRITON.module.transform(a, draw, False, out, False)
    assert torch.equal(out[0], (-torch.sign(eps[:, 5]) / 0.0).to(dtype))
    assert out[1].isnan().all() and out[2].isfinite().all()


def test_transform_of_several_blocks_in_a_program(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of rows in one, and a rest in each group, beside which the next group's rows lie: added to, so that
    what the wrong program writes there stays."""
    on("interpreter", 4)
    monkeypatch.setattr(configs, "TRANSFORM_PROGRAMS", 1)
    monkeypatch.setattr(configs, "TRANSFORM", 256)
    test_transform((5, 3 * 37, 32, 32, 0, 0, 3), torch.float16, False)


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last before a page that nobody may touch."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    kept.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return copy.view(tensor.shape).copy_(tensor)


kept: list[mmap.mmap] = []


def stay_inside() -> None:
    """In the child: one touch beyond the end of an argument ends it."""
    if "beyond" in sys.argv:
        guarded(randn(8, 9)).as_strided((8, 9), (9, 1), 1).clone()
    for noise in ("gaussian", "rademacher", "near_gaussian"):
        for shape in ((1, 33, 41), (5, 67, 130), (70, 9, 7)):
            p = problem(*shape, torch.bfloat16, rank=5, bias=True, lora_x=True, noise=noise)
            scale = p.options.pop("noise_scale")
            inputs = {k: guarded(t).requires_grad_() for k, t in p.inputs.items()}
            y = TRITON.linear(**inputs, **p.options, noise_scale=guarded(scale))
            torch.autograd.grad(y, list(inputs.values()), guarded(p.grad_y))
            inputs.pop("lora_x")
            TRITON.linear(**inputs, **p.options, noise_scale=guarded(scale))  # makes u itself
            W, A, B = (inputs[name].detach() for name in ("weight", "lora_A", "lora_B"))
            fk.row_sq_norms(W, A, B, backend="triton")
            fk.row_sq_norms(W, backend="triton")
            fk.perturb_weight(W, guarded(scale), seed=1, noise=noise, out=guarded(p.weight), backend="triton")
            for layout in packed_weights.LAYOUTS if noise == "gaussian" else ():
                q = packed_weights.packed(layout, *W.shape, torch.bfloat16)
                parts = (t if t is None else guarded(t) for t in q.parts)
                q = fk.QuantizedWeight(q.packing, type(q.parts)(*parts))
                fk.row_sq_norms(q, A, B, backend="triton")
                x = guarded(p.x).requires_grad_()
                y = fk.fused_flat_lora_linear(x, q, noise_scale=guarded(scale), seed=3, backend="triton")
                y.backward(guarded(p.grad_y))
    for input_grad in (False, True):
        a, scale = guarded(randn(5, 67, dtype=torch.bfloat16)), guarded(torch.rand(67))
        draw = Draw(scale, torch.tensor(3), noise="hadamard", tile_bits=6)
        TRITON.module.transform(a, draw, input_grad, guarded(torch.empty(5, 67, dtype=torch.bfloat16)), True)
    halves = [guarded(randn(*shape, dtype=torch.bfloat16)) for shape in ((70, 72), (70, 5), (72, 5))]
    adapter_grads.adapter_grads(*halves, 0.5)
    for rows, ends in itertools.product((5, 70), ([2, 2, 0], [5, 2**31 - 1, -7])):
        ends[-1] = rows if ends[-1] == 0 else ends[-1]  # the others part no rows
        mixture(rows, guarded(torch.tensor(ends, dtype=torch.int32)))
    print("inside")


def mixture(rows: int, ends: torch.Tensor) -> None:
    """Every kernel of experts, on operands that end where their memory does."""
    E, N, K, R, low = len(ends), 41, 67, 5, {"dtype": torch.bfloat16}
    x, dy = guarded(randn(rows, K, **low)), guarded(randn(rows, N, **low))
    W, A, B = (guarded(randn(E, *shape, **low)) for shape in ((N, K), (R, K), (N, R)))
    bias, module = guarded(randn(E, N, **low)), TRITON.module
    draw = Draw(guarded(torch.rand(E, N)), torch.tensor(3), noise="near_gaussian")
    p = Product(x, W, False, None, B, bias, 0.5, ends)
    module.product_and_u(p, A, draw, "folded")
    u = guarded(module.product(Product(x, A, offsets=ends), None, "folded"))
    module.product(p._replace(u=u), draw, "folded")
    v = guarded(module.product(Product(dy, B, True, offsets=ends), None, "folded"))
    module.product(Product(dy, W, True, v, A.transpose(1, 2), None, 0.5, ends), draw, "folded")
    for a, b in ((v, x), (dy, u), (dy, x)):
        module.expert_grads(a, b, ends, 0.5, guarded(torch.empty(E, a.shape[1], b.shape[1])))
    module.row_sq_norms(W, A, B, 0.5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects memory as Linux does")
@pytest.mark.parametrize("beyond", [False, True], ids=["the kernels", "control"])
def test_nothing_beyond_the_end_is_touched(beyond: bool) -> None:
    command = [sys.executable, __file__, *(["beyond"] if beyond else [])]
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert ("inside" in done.stdout) == (not beyond), done.stderr
    assert (done.returncode == 0) == (not beyond), done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ["sm80", "sm90", "gfx942"])
def test_products_with_the_arithmetic_of(architecture: str, dtype: torch.dtype, on: Any) -> None:
    on(architecture)
    check_problem(TRITON, problem(20, 72, 104, dtype, rank=4, bias=True, lora_x=True))


@pytest.mark.parametrize("architecture", ["sm90", "gfx942"])
def test_noise_with_the_arithmetic_of(architecture: str, on: Any) -> None:
    """Its constants and the use of its outputs; test_gpu_noise.py adds the errors of the instructions."""
    on(architecture)
    z = TRITON.noise(256, 512, seed=77, row_offset=3)
    expected = oracle.standard_noise(256, 512, seed=torch.tensor(77), row_offset=3)
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("architecture", ["sm90", "gfx942"])
def test_row_norms_with_the_arithmetic_of(architecture: str, on: Any) -> None:
    on(architecture)
    W = randn(33, 300, dtype=torch.bfloat16)
    A, B = randn(5, 300, seed=1, dtype=torch.bfloat16), randn(33, 5, seed=2, dtype=torch.bfloat16)
    for adapter, full in (((None, None), W.double()), ((A, B), W.double() + 0.5 * B.double() @ A.double())):
        got = TRITON.module.row_sq_norms(W, *adapter, 0.5)
        torch.testing.assert_close(got.double(), full.square().sum(1), rtol=1e-5, atol=0)


if __name__ == "__main__":
    interpreter.speed_up()
    stay_inside()
