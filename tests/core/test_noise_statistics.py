"""The noise as a sample: moments, distribution and correlations, at fixed seeds.

Every statistic is scaled to a standard normal under the hypothesis that the noise is as specified (over 2**20
values the central limit theorem is excellent), and alarms beyond the quantile that makes the chance of *any*
alarm in one run of `alarms` at most 1e-6: Bonferroni over its statistics, two-sided. Kolmogorov-Smirnov has a
share of that budget like the others, from its asymptotic tail 2 exp(-2 n D^2). The seeds are fixed, so that a
pass stays a pass. With 2**20 values a correlation of 0.006 is caught.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from targets import Target
from torch import Tensor

from flatlora_kernels.core import noise as oracle

FALSE_ALARM = 1e-6  # of one run of `alarms`
Draw = Callable[..., Tensor]  # (seed, stream, sample) -> SHAPE[kind] float64

# 2**20 values. Of "hadamard" many small tiles, because the product of two tiles has rank one: its sum has heavy tails,
# which the central limit theorem leaves none of over 4,000 tiles. There are whole tiles and cut ones.
SHAPE = dict.fromkeys(oracle.KINDS, (512, 2048)) | {"hadamard": (31, 33825)}


def near_gaussian_law() -> tuple[Tensor, Tensor]:
    """The values of z and their probabilities, float64: four times the law of one of the numbers that are added up."""
    levels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28])
    one = torch.zeros(57, dtype=torch.float64)  # from -28 to 28
    for sign in (1, -1):
        one.index_add_(0, 28 + sign * levels, torch.full((16,), 1 / 32, dtype=torch.float64))
    law = one
    for _ in range(3):
        law = torch.nn.functional.conv1d(law[None, None], one.flip(0)[None, None], padding=56)[0, 0]
    return torch.arange(-112, 113) / math.sqrt(665), law


def _moments(values: Tensor, law: Tensor) -> tuple[float, ...]:
    return tuple(float((values**power * law).sum()) for power in (2, 4, 6, 8))


# E z^2, E z^4, E z^6, E z^8 of what docs/internals/noise.md defines; the last two of a normal z, where the specified
# one is within 0.3 % of that.
MOMENTS = {
    "gaussian": (0.999995, 2.9998 * 0.999995**2, 15.0, 105.0),
    "near_gaussian": _moments(*near_gaussian_law()),
    "rademacher": (1.0, 1.0, 1.0, 1.0),
    "hadamard": (1.0, 1.0, 1.0, 1.0),
}
OF_SIGNS = ("rademacher", "hadamard")


def neighbours(draw: Draw) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs of arrays that must have nothing to do with each other."""
    seed = 2**35 + 99
    z = draw(seed=seed)
    for lag in (1, 2, 3, 4, 8, 12, 16, 32):
        if lag < len(z):
            yield f"row lag {lag}", z[lag:], z[:-lag]
    for lag in (1, 2, 3, 4, 5, 6, 7, 8, 16, 64):
        yield f"column lag {lag}", z[:, lag:], z[:, :-lag]
    yield "diagonal", z[1:, 1:], z[:-1, :-1]
    for step in (1, 2, 16, 2**31):
        yield f"stream + {step}", z, draw(seed=seed, stream=step)
        yield f"sample + {step}", z, draw(seed=seed, sample=step)
    for step in (1, 2, 2**16, 2**32, 2**33, 2**63):
        yield f"seed + {step}", z, draw(seed=seed + step)
    yield "seed with its words swapped", z, draw(seed=seed >> 32 | (seed & 0xFFFFFFFF) << 32)
    swapped = draw(seed=seed, stream=2, sample=1)
    yield "stream and sample swapped", draw(seed=seed, stream=1, sample=2), swapped
    for lag in (1, 16):
        yield f"row lag {lag}, stream + 1", z[lag:], draw(seed=seed, stream=1)[:-lag]


def correlation(a: Tensor, b: Tensor) -> float:
    """Sum of products over its standard deviation under independence (E z^2 = 1 within 5e-6)."""
    return float((a * b).sum()) / math.sqrt(a.numel())


def statistics(draw: Draw, kind: str) -> dict[str, float]:
    """Standard normal deviates, by name."""
    z = draw(seed=12345)
    n, (N, K) = z.numel(), z.shape
    second, fourth, sixth, eighth = MOMENTS[kind]
    found = {
        "mean": float(z.sum()) / math.sqrt(n),
        "third moment": float((z**3).sum()) / math.sqrt(n * sixth),
        "column means": float((z.mean(0) ** 2).sum() * N - K) / math.sqrt(2 * K),
    }
    if N > 100:  # else a sum of squares is not normal
        found["row means"] = float((z.mean(1) ** 2).sum() * K - N) / math.sqrt(2 * N)
    if kind not in OF_SIGNS:
        found["variance"] = float((z**2 - second).sum()) / math.sqrt((fourth - second**2) * n)
        found["fourth moment"] = float((z**4 - fourth).sum()) / math.sqrt((eighth - fourth**2) * n)
    else:
        # Nothing but +1 and -1: any other value is an alarm without bounds.
        found["values"] = 0.0 if bool((z.abs() == 1).all()) else math.inf
    for name, a, b in neighbours(draw):
        found[name] = correlation(a, b)
        # The two values of a Box-Muller pair share a radius and yet must be independent. Of near_gaussian's units see
        # test_squares_within_a_unit.
        within_a_unit = kind == "near_gaussian" and name.split(",")[0] in ("row lag 8", "column lag 8")
        if kind not in OF_SIGNS and not within_a_unit:
            found[f"{name}, squares"] = correlation(a**2 - 1, b**2 - 1) / (fourth - second**2)
    return found


def kolmogorov_smirnov(z: Tensor, kind: str) -> float:
    """The largest distance between the empirical and the specified distribution function."""
    values = z.flatten().sort().values
    if kind == "near_gaussian":  # where it jumps
        jumps, law = (t.to(z.device) for t in near_gaussian_law())
        found = torch.searchsorted(values, jumps + 1e-6).double() / values.numel()
        return float((found - law.cumsum(0)).abs().max())
    normal = torch.special.ndtr(values)
    steps = torch.arange(values.numel() + 1, dtype=torch.float64, device=z.device) / values.numel()
    return float(torch.maximum(steps[1:] - normal, normal - steps[:-1]).max())


def alarms(draw: Draw, kind: str) -> list[str]:
    found = statistics(draw, kind)
    share = FALSE_ALARM / (len(found) + (kind not in OF_SIGNS))
    quantile = float(-torch.special.ndtri(torch.tensor(share / 2, dtype=torch.float64)))
    raised = [name for name, value in found.items() if not abs(value) <= quantile]
    if kind not in OF_SIGNS:
        z = draw(seed=54321)
        # gaussian z is discrete, too: its distribution function has steps of up to 2**-16, at zero.
        limit = math.sqrt(math.log(2 / share) / (2 * z.numel())) + 2**-16
        if not kolmogorov_smirnov(z, kind) <= limit:
            raised.append("Kolmogorov-Smirnov")
    return raised


def test_noise_is_as_specified(target: Target, noise: str) -> None:
    def draw(**which: int) -> Tensor:
        return target.noise(*SHAPE[noise], noise=noise, **which).double()

    assert alarms(draw, noise) == []


def test_squares_within_a_unit(target: Target) -> None:
    """Of near_gaussian, whose four values of a unit are sums of the same four numbers, see docs/internals/noise.md."""
    z = target.noise(512, 2048, noise="near_gaussian", seed=7).double()
    second, fourth, *_ = MOMENTS["near_gaussian"]
    units = (
        z.view(32, 2, 8, 128, 2, 8).movedim((1, 4), (0, 1)).flatten(0, 1).flatten(1) ** 2 - 1
    )  # (4, units)
    found = units @ units.t() / units.shape[1] / (fourth - second**2)
    # Four times the fourth cumulant of one of the numbers, which is a quarter of that of the sum.
    expected = (fourth - 3) / (fourth - 1)
    assert abs(expected + 0.022) < 5e-4
    apart = ~torch.eye(4, dtype=torch.bool, device=z.device)
    assert ((found[apart] - expected).abs() < 5 / math.sqrt(units.shape[1])).all()
    assert found[apart].mean() < expected / 2  # not 0, which is six of its standard errors away


def walsh(size: int) -> Tensor:
    """In Paley's order, by the rule that makes 2 T x 2 T of T x T."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    half = walsh(size // 2)
    # Row 2 i repeats row i, row 2 i + 1 alternates it: the last bit of the row is the first of the column.
    return torch.stack((torch.cat((half, half), 1), torch.cat((half, -half), 1)), 1).flatten(0, 1)


@pytest.mark.parametrize(("shape", "T"), [((5, 4), 4), ((130, 300), 128), ((512, 512), 512)], ids=str)
def test_hadamard_tiles(target: Target, shape: tuple[int, int], T: int) -> None:
    """Whole tiles have flat singular values; the products around rectangles are those of Walsh's matrix in any draw."""
    z = target.noise(*shape, noise="hadamard", seed=11, stream=3, sample=2).double().cpu()
    for n in range(0, shape[0], T):
        for k in range(0, shape[1], T):
            tile = z[n : n + T, k : k + T]
            around = tile * tile[:1] * tile[:, :1] * tile[0, 0]
            assert torch.equal(around, walsh(T)[: len(tile), : tile.shape[1]])
            if tile.shape == (T, T):
                assert torch.equal(tile @ tile.t(), T * torch.eye(T, dtype=torch.float64))


def test_hadamard_covariance_is_exact() -> None:
    """Over all signs of a tile of 4 x 4: variance 1, no correlation of different entries; fourth moments of its own."""
    signs = 1.0 - 2.0 * ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).double()
    z = (signs[:, :4, None] * walsh(4) * signs[:, None, 4:]).flatten(1)  # (draws, 16)
    assert torch.equal(z.t() @ z / 256, torch.eye(16, dtype=torch.float64))
    products = z[:, 0] * z[:, 1] * z[:, 4] * z[:, 5]  # around a rectangle
    assert products.abs().eq(1).all() and products.mean().abs() == 1  # 0 for independent signs
    assert (z[:, 0] * z[:, 1] * z[:, 4] * z[:, 6]).mean() == 0


# The same alarms must go off for noise that is broken in the ways a kernel breaks it.


@functools.lru_cache(maxsize=32)  # the draws of `alarms` for one kind, which most faults share; 8 MiB each
def sound(kind: str, *, seed: int, **which: Any) -> Tensor:
    seed %= 2**64
    signed = torch.tensor(seed - 2**64 if seed >> 63 else seed)
    shape = SHAPE[kind]
    return oracle.standard_noise(*shape, seed=signed, noise=kind, tile_bits=oracle.tile_bits(*shape), **which)


def test_the_oracle_raises_no_alarm_in_other_places(noise: str) -> None:
    """Far offsets draw the same distribution."""
    col_offset = 2**32 - (SHAPE[noise][1] + 7) // 8 * 8

    def far(**which: int) -> Tensor:
        return sound(noise, row_offset=2**31, col_offset=col_offset, **which)

    assert alarms(far, noise) == []


BROKEN: dict[str, tuple[Callable[..., Tensor], str]] = {
    "stream ignored": (lambda kind, stream=0, **w: sound(kind, **w), "stream + 1"),
    "sample ignored": (lambda kind, sample=0, **w: sound(kind, **w), "sample + 1"),
    "stream added to the sample": (
        lambda kind, stream=0, sample=0, **w: sound(kind, sample=stream + sample, **w),
        "stream and sample swapped",
    ),
    "stream added to the row": (
        lambda kind, stream=0, **w: sound(kind, row_offset=16 * stream, **w),
        "row lag 16, stream + 1",
    ),
    "every row drawn twice": (
        lambda kind, **w: sound(kind, **w)[::2].repeat_interleave(2, 0)[: SHAPE[kind][0]],
        "row lag 1",
    ),
    "columns of a block in pairs": (
        lambda kind, **w: sound(kind, **w)[:, ::2].repeat_interleave(2, 1)[:, : SHAPE[kind][1]],
        "column lag 1",
    ),
    "tiles of 64 columns repeated": (
        lambda kind, **w: sound(kind, **w)[:, :64].repeat(1, SHAPE[kind][1] // 64),
        "column lag 64",
    ),
    "scaled by 1.01": (lambda kind, **w: 1.01 * sound(kind, **w), "variance"),
    "shifted by 0.01": (lambda kind, **w: sound(kind, **w) + 0.01, "mean"),
    "tails cut at 3": (lambda kind, **w: sound(kind, **w).clamp(-3, 3), "fourth moment"),
    "sum of uniforms": (
        lambda kind, **w: (torch.special.ndtr(sound(kind, **w)) - 0.5) * math.sqrt(12),
        "Kolmogorov-Smirnov",
    ),
    "absolute cosine": (lambda kind, **w: sound(kind, **w).abs() - math.sqrt(2 / math.pi), "third moment"),
    "one radius for a block": (
        lambda kind, **w: (z := sound(kind, **w)).sign() * z[:, ::8].abs().repeat_interleave(8, 1),
        "column lag 4, squares",
    ),
    # Last, because their draws are all others.
    "high word of the seed ignored": (
        lambda kind, seed, **w: sound(kind, seed=seed % 2**32, **w),
        f"seed + {2**32}",
    ),
    "low word of the seed ignored": (lambda kind, seed, **w: sound(kind, seed=seed >> 32, **w), "seed + 1"),
}
# Signs alone cannot have these: any other value is an alarm by itself.
NOT_OF_SIGNS = (
    "scaled by 1.01",
    "tails cut at 3",
    "sum of uniforms",
    "absolute cosine",
    "one radius for a block",
)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (fault, kind)
        for kind in MOMENTS
        for fault in BROKEN
        if kind not in OF_SIGNS or fault not in NOT_OF_SIGNS
    ],
)
def test_broken_noise_is_noticed(fault: str, kind: str) -> None:
    broken, expected = BROKEN[fault]
    assert expected in alarms(lambda **which: broken(kind, **which), kind)
