"""The noise as a sample: moments, distribution and correlations, at fixed seeds.

Every statistic is scaled to a standard normal under the hypothesis that the noise is as specified (over 2**20
values the central limit theorem is excellent), and alarms beyond the quantile that makes the chance of *any*
alarm in one run of `alarms` at most 1e-6: Bonferroni over its statistics, two-sided. Kolmogorov-Smirnov has a
share of that budget like the others, from its asymptotic tail 2 exp(-2 n D^2). The seeds are fixed, so that a
pass stays a pass. With 2**20 values a correlation of 0.006 is caught.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from targets import Target
from torch import Tensor

from flatlora_kernels.core import noise as oracle

N, K = 512, 2048
FALSE_ALARM = 1e-6  # of one run of `alarms`
Draw = Callable[..., Tensor]  # (seed, stream, sample) -> (N, K) float64

# Of the values that docs/internals/noise.md defines: E z^2, E z^4.
MOMENTS = {"gaussian": (0.999995, 2.9998 * 0.999995**2), "rademacher": (1.0, 1.0)}


def neighbours(draw: Draw) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs of arrays that must have nothing to do with each other."""
    seed = 2**35 + 99
    z = draw(seed=seed)
    for lag in (1, 2, 3, 4, 8, 12, 16, 32):
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
    n = z.numel()
    second, fourth = MOMENTS[kind]
    found = {
        "mean": float(z.sum()) / math.sqrt(n),
        "third moment": float((z**3).sum()) / math.sqrt(n * (15 if kind == "gaussian" else 1)),
        "row means": float((z.mean(1) ** 2).sum() * K - N) / math.sqrt(2 * N),
        "column means": float((z.mean(0) ** 2).sum() * N - K) / math.sqrt(2 * K),
    }
    if kind == "gaussian":
        # Var z^2 = 2 and Var z^4 = 96 for a normal z; the specified one is within 0.3 % of that.
        found["variance"] = float((z**2 - second).sum()) / math.sqrt(2 * n)
        found["fourth moment"] = float((z**4 - fourth).sum()) / math.sqrt(96 * n)
    else:
        # Nothing but +1 and -1: any other value is an alarm without bounds.
        found["values"] = 0.0 if bool((z.abs() == 1).all()) else math.inf
    for name, a, b in neighbours(draw):
        found[name] = correlation(a, b)
        if (
            kind == "gaussian"
        ):  # the two values of a Box-Muller pair share a radius and yet must be independent
            found[f"{name}, squares"] = correlation(a**2 - 1, b**2 - 1) / 2
    return found


def kolmogorov_smirnov(z: Tensor) -> float:
    """The largest distance between the empirical and the normal distribution function."""
    values = z.flatten().sort().values
    normal = torch.special.ndtr(values)
    steps = torch.arange(values.numel() + 1, dtype=torch.float64, device=z.device) / values.numel()
    return float(torch.maximum(steps[1:] - normal, normal - steps[:-1]).max())


def alarms(draw: Draw, kind: str) -> list[str]:
    found = statistics(draw, kind)
    share = FALSE_ALARM / (len(found) + (kind == "gaussian"))
    quantile = float(-torch.special.ndtri(torch.tensor(share / 2, dtype=torch.float64)))
    raised = [name for name, value in found.items() if not abs(value) <= quantile]
    if kind == "gaussian":
        z = draw(seed=54321)
        # z is discrete: its distribution function has steps of up to 2**-16, at zero.
        limit = math.sqrt(math.log(2 / share) / (2 * z.numel())) + 2**-16
        if not kolmogorov_smirnov(z) <= limit:
            raised.append("Kolmogorov-Smirnov")
    return raised


def test_noise_is_as_specified(target: Target, noise: str) -> None:
    def draw(**which: int) -> Tensor:
        return target.noise(N, K, noise=noise, **which).double()

    assert alarms(draw, noise) == []


# The same alarms must go off for noise that is broken in the ways a kernel breaks it.


def words(z_of: Callable[..., Tensor], kind: str, **which: Any) -> Tensor:
    seed = which.pop("seed") % 2**64
    return z_of(N, K, seed=torch.tensor(seed - 2**64 if seed >> 63 else seed), noise=kind, **which)


def sound(kind: str, **which: Any) -> Tensor:
    return words(oracle.standard_noise, kind, **which)


def test_the_oracle_raises_no_alarm_in_other_places() -> None:
    """Far offsets draw the same distribution."""

    def far(**which: int) -> Tensor:
        return sound("gaussian", row_offset=2**31, col_offset=2**32 - K, **which)

    assert alarms(far, "gaussian") == []


BROKEN: dict[str, tuple[Callable[..., Tensor], str]] = {
    "stream ignored": (lambda kind, stream=0, **w: sound(kind, **w), "stream + 1"),
    "sample ignored": (lambda kind, sample=0, **w: sound(kind, **w), "sample + 1"),
    "high word of the seed ignored": (
        lambda kind, seed, **w: sound(kind, seed=seed % 2**32, **w),
        f"seed + {2**32}",
    ),
    "low word of the seed ignored": (lambda kind, seed, **w: sound(kind, seed=seed >> 32, **w), "seed + 1"),
    "stream added to the sample": (
        lambda kind, stream=0, sample=0, **w: sound(kind, sample=stream + sample, **w),
        "stream and sample swapped",
    ),
    "stream added to the row": (
        lambda kind, stream=0, **w: sound(kind, row_offset=16 * stream, **w),
        "row lag 16, stream + 1",
    ),
    "every row drawn twice": (lambda kind, **w: sound(kind, **w)[::2].repeat_interleave(2, 0), "row lag 1"),
    "columns of a block in pairs": (
        lambda kind, **w: sound(kind, **w)[:, ::2].repeat_interleave(2, 1),
        "column lag 1",
    ),
    "tiles of 64 columns repeated": (
        lambda kind, **w: sound(kind, **w)[:, :64].repeat(1, K // 64),
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
}
# Signs alone cannot have these: any other value is an alarm by itself.
ONLY_GAUSSIAN = (
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
        if kind == "gaussian" or fault not in ONLY_GAUSSIAN
    ],
)
def test_broken_noise_is_noticed(fault: str, kind: str) -> None:
    broken, expected = BROKEN[fault]
    assert expected in alarms(lambda **which: broken(kind, **which), kind)
