"""docs/internals/noise.md, bit by bit: known answers, closeness to the formula, and that nothing but the five integers
(seed, stream, sample, n, k) has a say."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from targets import Target, generator
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels.core import noise as oracle
from flatlora_kernels.core.records import Draw

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "noise_vectors.json").read_text())
TOP = 2**32


def signed(seed: int) -> int:
    """The same 64 bits as a signed number."""
    seed %= 1 << 64
    return seed - (1 << 64) if seed >> 63 else seed


def oracle_tile(
    rows: tuple[int, int],
    cols: tuple[int, int],
    *,
    seed: int = 0,
    layer_shape: tuple[int, int] | None = None,
    **draw: Any,
) -> Tensor:
    shape = rows[1] - rows[0], cols[1] - cols[0]
    return oracle.standard_noise(
        *shape,
        seed=torch.tensor(signed(seed)),
        row_offset=rows[0],
        col_offset=cols[0],
        tile_bits=oracle.tile_bits(*(layer_shape or shape)),
        **draw,
    )


def bits_of(z: Tensor, noise: str) -> Tensor:
    """float32 eps of an oracle tile, not gaussian, for a noise_scale of ones: every backend draws these very bits."""
    if noise != "near_gaussian":
        return z.float()
    m = (z * math.sqrt(oracle.NEAR_GAUSSIAN_VARIANCE)).round().float()
    return oracle.factor(torch.ones(len(z)), noise, torch.float32)[:, None] * m


def part_of_a_layer(noise: str) -> dict[str, Any]:
    """The layer that any shard is a part of: with the largest tiles there are."""
    return {"layer_shape": (TOP, TOP)} if noise == "hadamard" else {}


def backend_tile(target: Target, rows: tuple[int, int], cols: tuple[int, int], **draw: Any) -> Tensor:
    num_rows, num_cols = rows[1] - rows[0], cols[1] - cols[0]
    return target.noise(num_rows, num_cols, row_offset=rows[0], col_offset=cols[0], **draw).cpu()


@pytest.mark.parametrize("case", VECTORS["philox4x32_10"], ids=lambda c: f"{c['counter'][0]:08x}")
def test_philox_known_answers(case: dict[str, list[int]]) -> None:
    counter, key = ([torch.tensor(word) for word in case[name]] for name in ("counter", "key"))
    words = oracle.philox4x32_10(tuple(counter), tuple(key))
    assert [int(word) for word in words] == case["words"]


def test_philox_known_answers_of_the_specification() -> None:
    """The two written out in docs/internals/noise.md are among the vectors."""
    words = [" ".join(f"{w:08x}" for w in case["words"]) for case in VECTORS["philox4x32_10"]]
    assert "6627e8d5 e169c58d bc57ac4c 9b00dbd8" in words
    assert "d16cfe09 94fdcceb 5001e420 24126ea1" in words


def vector_id(tile: dict[str, Any]) -> str:
    return "-".join(map(str, (*vector_draw(tile).values(), tile["rows"][0], tile["cols"][0])))


def vector_draw(tile: dict[str, Any]) -> dict[str, Any]:
    draw = {name: tile[name] for name in ("seed", "stream", "sample")} | {"noise": tile["kind"]}
    return draw | ({"layer_shape": tuple(tile["layer"])} if "layer" in tile else {})


@pytest.mark.parametrize("tile", VECTORS["tiles"], ids=vector_id)
def test_oracle_matches_vectors(tile: dict[str, Any]) -> None:
    z = oracle_tile(tile["rows"], tile["cols"], **vector_draw(tile))
    expected = torch.tensor(tile["z"], dtype=torch.float64)
    # The vectors hold nine decimals.
    atol = 0 if tile["kind"] in ("rademacher", "hadamard") else 5.01e-10
    torch.testing.assert_close(z, expected, rtol=0, atol=atol)
    if "m" in tile:
        m = (z * math.sqrt(oracle.NEAR_GAUSSIAN_VARIANCE)).round()
        assert torch.equal(m, torch.tensor(tile["m"], dtype=torch.float64))


@pytest.mark.parametrize("tile", VECTORS["tiles"], ids=vector_id)
def test_backend_matches_vectors(target: Target, tile: dict[str, Any]) -> None:
    first, last = tile["cols"]
    block = first // 8 * 8  # a shard begins at a multiple of 8
    z = backend_tile(target, tile["rows"], (block, last), **vector_draw(tile))[:, first - block :]
    expected = torch.tensor(tile["z"], dtype=torch.float64)
    if tile["kind"] != "gaussian":
        assert torch.equal(z, bits_of(expected, tile["kind"]))
    else:
        torch.testing.assert_close(z.double(), expected, rtol=0, atol=target.gaussian_atol)


def test_gaussian_closeness_over_all_uniforms(target: Target) -> None:
    """|z - exact| over a tile in which nearly all 65536 radii and angles occur."""
    rows, cols, draw = (0, 512), (0, 1024), {"seed": 77}
    error = (backend_tile(target, rows, cols, **draw).double() - oracle_tile(rows, cols, **draw)).abs()
    assert error.max() <= target.gaussian_atol


SEEDS = [0, 1, 2**32, 2**63, 2**64 - 1, 0x0123456789ABCDEF, -1, 3 * 2**64 + 5]


@pytest.mark.parametrize("seed", SEEDS, ids=hex)
def test_backend_matches_oracle_at_the_ends_of_every_range(target: Target, seed: int, noise: str) -> None:
    worst = 0.0
    for i, j, k, m in itertools.product(range(3), repeat=4):
        if target.interpreted and ((i + j + k) % 3 or (i + 2 * j + m) % 3):
            continue  # nine of 81, in which any two of the four still meet at all their ends
        stream, sample = (0, 1, TOP - 1)[i], (0, 1, TOP - 1)[j]
        row, col = (0, 2**31 - 7, TOP - 19)[k], (0, 2**31 - 8, TOP - 24)[m]
        draw = {"seed": seed, "stream": stream, "sample": sample, "noise": noise, **part_of_a_layer(noise)}
        tile = (row, row + 19), (col, col + 21)
        expected = oracle_tile(*tile, **draw)
        if noise != "gaussian":
            expected = bits_of(expected, noise)
        error = (backend_tile(target, *tile, **draw).double() - expected).abs()
        worst = max(worst, error.max().item())
    assert worst <= (target.gaussian_atol if noise == "gaussian" else 0)


ORIGINS = [  # (row, column) of a whole; n, k and n * K pass 2**31 and reach the last index there is
    (0, 0),
    (2**31 - 40, 0),
    (0, 2**31 - 64),
    (2**31 - 40, 2**31 - 64),
    (65_000, 65_536),
    (TOP - 83, TOP - 144),
]


@pytest.mark.parametrize("origin", ORIGINS, ids=str)
def test_any_tile_has_the_bits_of_the_whole(target: Target, origin: tuple[int, int], noise: str) -> None:
    rows, cols = 83, 141
    draw = {"seed": 2**40 + 3, "stream": 7, "sample": 2, "noise": noise, **part_of_a_layer(noise)}
    n, k = origin
    whole = backend_tile(target, (n, n + rows), (k, k + cols), **draw)
    g = generator(origin[0] + len(noise))
    for _ in range(8 if target.interpreted else 40):
        a = int(torch.randint(0, rows, (), generator=g))
        b = int(torch.randint(a + 1, rows + 1, (), generator=g))
        c = 8 * int(torch.randint(0, cols // 8, (), generator=g))
        d = int(torch.randint(c + 1, cols + 1, (), generator=g))
        tile = backend_tile(target, (n + a, n + b), (k + c, k + d), **draw)
        assert torch.equal(tile, whole[a:b, c:d]), f"rows {a}:{b}, columns {c}:{d} of the whole at {origin}"


def test_tile_of_a_large_matrix(target: Target, noise: str) -> None:
    """The whole spans many panels; single rows and short columns of it are drawn on their own."""
    draw = {"seed": 11, "noise": noise, **({"layer_shape": (700, 3001)} if noise == "hadamard" else {})}
    whole = backend_tile(target, (0, 700), (0, 3001), **draw)
    for rows, cols in (((0, 1), (0, 3001)), ((699, 700), (2000, 3001)), ((255, 257), (1016, 1025))):
        tile = backend_tile(target, rows, cols, **draw)
        assert torch.equal(tile, whole[rows[0] : rows[1], cols[0] : cols[1]])


# Which eps the products see. With W = 0 and a unit matrix as the other factor a product returns eps itself.


def seen_by_forward(target: Target, eps_like: Tensor, weight: Tensor, rows: slice, **options: Any) -> Tensor:
    """(N, number of probes): the columns `rows` of W + eps."""
    unit = torch.eye(weight.shape[1], dtype=eps_like.dtype, device=target.device)[rows]
    return target.linear(unit, weight, **options).t()


def seen_by_backward(target: Target, eps_like: Tensor, weight: Tensor, rows: slice, **options: Any) -> Tensor:
    """(number of probes, K): the rows `rows` of W + eps."""
    unit = torch.eye(weight.shape[0], dtype=eps_like.dtype, device=target.device)[rows]
    x = torch.zeros(
        len(unit), weight.shape[1], dtype=eps_like.dtype, device=target.device, requires_grad=True
    )
    target.linear(x, weight, **options).backward(unit)
    return x.grad


def zeros(N: int, K: int, dtype: torch.dtype, device: str, column_major: bool) -> Tensor:
    place = {"dtype": dtype, "device": device}
    return torch.zeros(K, N, **place).t() if column_major else torch.zeros(N, K, **place)


@pytest.mark.parametrize("column_major", [False, True], ids=["row_major", "column_major"])
@pytest.mark.parametrize(
    "origin", [(0, 0), (5, 24), (2**31 - 40, 2**31 - 64), (TOP - 83, TOP - 144)], ids=str
)
def test_forward_and_backward_see_the_materialised_noise(
    target: Target, dtype: torch.dtype, origin: tuple[int, int], noise: str, column_major: bool
) -> None:
    N, K = 83, 141
    where = {"row_offset": origin[0], "col_offset": origin[1], "seed": 5, "stream": 2, "noise": noise}
    if any(origin):
        where |= part_of_a_layer(noise)
    weight = zeros(N, K, dtype, target.device, column_major)
    slow = target.interpreted or target.emulated
    plans = target.plans(noise)[: 1 if slow and any(origin) else None]
    for plan in plans:
        noise_scale = 0.5 + torch.rand(N, generator=generator(4)).to(target.device)
        options = {"noise_scale": noise_scale, **where}
        eps = target.noise(noise_scale, K, dtype=dtype, **where)
        if plan["noise_accum"] == "split" and target.backend in ("triton", "cuda"):
            # Two factors in the type of W: their sum is eps but for ties when y is rounded.
            whole = target.noise(noise_scale, K, **where)
            if dtype == torch.bfloat16 and noise != "gaussian":  # its factor is rounded, its product is not
                one = oracle.factor(torch.ones_like(noise_scale), noise, torch.float32)[:, None]
                drawn = (target.noise(torch.ones_like(noise_scale), K, **where) / one).round()
                whole = oracle.factor(noise_scale, noise, dtype)[:, None] * drawn
            rest = whole - eps.float()
            eps = (eps.float() + rest.to(dtype).float()).to(dtype)
        probes = (slice(None), slice(7, 10), slice(0, 1), slice(40, 83))
        for probe in probes[: 2 - (any(origin) or plan is not plans[0]) if slow else 4]:
            columns = seen_by_forward(target, eps, weight, probe, **options, **plan)
            assert torch.equal(columns, eps[:, probe]), f"forward, {plan}, columns {probe}"
            rows = seen_by_backward(target, eps, weight, probe, **options, **plan)
            assert torch.equal(rows, eps[probe]), f"backward, {plan}, rows {probe}"


def test_eps_is_noise_scale_times_z(target: Target) -> None:
    """In float32, to its precision (the scale may go into the radius first); other types round that once."""
    noise_scale = torch.rand(37, generator=generator()).to(target.device)
    z = target.noise(37, 45, seed=9)
    eps = target.noise(noise_scale, 45, seed=9)
    torch.testing.assert_close(eps, noise_scale[:, None] * z, rtol=2**-22, atol=0)
    for dtype in target.dtypes:
        rounded = target.noise(noise_scale, 45, seed=9, dtype=dtype)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, eps.to(dtype))


@pytest.mark.parametrize("noise", oracle.KINDS[1:])
def test_eps_has_the_bits_of_the_specification(target: Target, dtype: torch.dtype, noise: str) -> None:
    """The factor in its type times what is drawn, rounded once; whatever the scale."""
    most = 60000.0 if target.interpreted and dtype == torch.float16 else math.inf  # NumPy warns of overflow
    scales = torch.tensor([0, 1e-30, 1e-10, 0.02, 0.0213, 0.7, 1, 3, 25, 26, 1e10, 1e38, math.inf])
    scales = scales[scales <= most / 112]
    noise_scale = torch.cat((scales, torch.rand(20, generator=generator()))).to(target.device)
    bits = oracle.tile_bits(len(noise_scale), 45)
    draw = Draw(noise_scale, torch.tensor(9, device=target.device), 3, noise, 1, 5, True, tile_bits=bits)
    eps = target.noise(noise_scale, 45, seed=9, stream=3, noise=noise, sample=5, antithetic=True, dtype=dtype)
    expected = oracle.epsilon(draw, 45, dtype).to(dtype)
    torch.testing.assert_close(eps, expected, rtol=0, atol=0, equal_nan=True)


def test_zero_scale_draws_zeros(target: Target) -> None:
    assert not target.noise(torch.zeros(5, device=target.device), 24, seed=9).any()


@pytest.mark.parametrize("column_major", [False, True], ids=["row_major", "column_major"])
def test_perturb_weight_adds_the_same_eps(
    target: Target, dtype: torch.dtype, noise: str, column_major: bool
) -> None:
    noise_scale = torch.rand(37, generator=generator(1)).to(target.device)
    weight = torch.randn(37, 45, generator=generator(2)).to(dtype).to(target.device)
    if column_major:
        weight = weight.t().contiguous().t()
    before = weight.clone()
    draw = {"stream": 4, "sample": 3, "row_offset": 2, "col_offset": 24}
    if noise == "gaussian":
        eps = target.noise(
            noise_scale, 45, seed=9, dtype=dtype if dtype.itemsize == 8 else torch.float32, **draw
        )
    else:
        at = {n: draw[n] for n in ("row_offset", "col_offset")}
        which = Draw(noise_scale, torch.tensor(9, device=target.device), 4, noise, 1, 3, **at, tile_bits=12)
        eps = oracle.epsilon(which, 45, dtype).to(torch.promote_types(dtype, torch.float32))
    draw |= {"seed": 9, "noise": noise, **part_of_a_layer(noise)}
    # In one rounding: float32 (or float64) sum of weight and eps, then the type of the weight.
    expected = (weight.to(eps.dtype) + eps).to(dtype)
    got = fk.perturb_weight(weight, noise_scale, backend=target.backend, **draw)
    if dtype == torch.float32:  # here a fused multiply-add may save the rounding of eps
        torch.testing.assert_close(got, expected, rtol=2**-23, atol=2**-23)
    else:
        ulp = torch.finfo(dtype).eps
        assert (got != expected).double().mean() <= 0.01
        torch.testing.assert_close(got, expected, rtol=ulp, atol=ulp)
    assert torch.equal(weight, before)
    for out in (
        torch.empty_like(weight),
        torch.empty(45, 37, dtype=dtype, device=target.device).t(),
        torch.empty(74, 90, dtype=dtype, device=target.device)[::2, ::2],
    ):
        assert fk.perturb_weight(weight, noise_scale, backend=target.backend, out=out, **draw) is out
        assert torch.equal(out, got)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 6, TOP - 4])
def test_samples_are_those_of_materialize_noise(
    target: Target, offset: int, antithetic: bool, noise: str
) -> None:
    """Row group g of the op sees the noise of sample offset + g, forward and backward."""
    N, K, samples = 9, 24, 4
    ones = torch.ones(N, device=target.device)
    draw = {"seed": 5, "noise": noise, "antithetic": antithetic}
    eps = [target.noise(ones, K, sample=offset + g, **draw) for g in range(samples)]
    weight = torch.zeros(N, K, device=target.device)
    plans = target.plans(noise)
    for plan in (plans[0], plans[-1]):
        options = {"noise_scale": ones, "samples": samples, "sample_offset": offset, **draw, **plan}
        y = target.linear(torch.eye(K, device=target.device).repeat(samples, 1), weight, **options)
        x = torch.zeros(samples * N, K, device=target.device, requires_grad=True)
        target.linear(x, weight, **options).backward(torch.eye(N, device=target.device).repeat(samples, 1))
        for g in range(samples):
            assert torch.equal(y[g * K : (g + 1) * K].t(), eps[g]), plan
            assert torch.equal(x.grad[g * N : (g + 1) * N], eps[g]), plan


def test_antithetic_samples(target: Target, noise: str) -> None:
    for sample in (0, 1, 6, 7, TOP - 1):
        pair = target.noise(33, 45, seed=5, noise=noise, sample=sample >> 1)
        got = target.noise(33, 45, seed=5, noise=noise, sample=sample, antithetic=True)
        assert torch.equal(got, -pair if sample & 1 else pair)


def test_every_argument_changes_the_noise(target: Target) -> None:
    base = {"seed": 5, "stream": 1, "sample": 1, "row_offset": 0, "col_offset": 0}
    changes = [
        {"seed": 6},
        {"seed": 5 + 2**32},
        {"seed": 5 + 2**63},
        {"stream": 2},
        {"stream": 1 + 2**31},
        {"sample": 2},
        {"sample": 1 + 2**31},
        {"row_offset": 16},
        {"row_offset": 2**31},
        {"col_offset": 8},
        {"col_offset": 2**31},
    ]
    for noise in oracle.KINDS:
        layer = part_of_a_layer(noise)
        # gaussian z agree by chance alone in 2**-17 of cases, near_gaussian in 0.017, signs in a half: here +- 6 sigma,
        # of hadamard +- 22, because the product of two of its tiles has rank one.
        most = {"gaussian": 0.01, "near_gaussian": 0.05, "rademacher": 0.57, "hadamard": 0.75}[noise]
        tiles = [
            target.noise(32, 64, noise=noise, **layer, **{**base, **change}) for change in [{}, *changes]
        ]
        for i, first in enumerate(tiles):
            for j, second in enumerate(tiles[:i]):
                agreeing = (first == second).float().mean().item()
                assert agreeing < most, ([{}, *changes][i], [{}, *changes][j])


def test_stream_zero_and_default_arguments(target: Target) -> None:
    explicit = target.noise(
        5, 16, seed=1, stream=0, noise="gaussian", sample=0, antithetic=False, row_offset=0, col_offset=0
    )
    assert torch.equal(target.noise(5, 16, seed=1), explicit)
    assert explicit.dtype == torch.float32


def test_strided_and_empty_tiles(target: Target) -> None:
    wide = torch.rand(10, generator=generator(3)).to(target.device)
    assert torch.equal(target.noise(wide[::2], 9, seed=1), target.noise(wide[::2].clone(), 9, seed=1))
    assert target.noise(0, 16, seed=1).shape == (0, 16)
    assert target.noise(3, 0, seed=1).shape == (3, 0)
