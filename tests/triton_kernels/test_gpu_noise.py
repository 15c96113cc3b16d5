"""The noise of GPUs without a GPU. Gaussian: the inline PTX of triton_kernels/philox.py, with every approximation as
wrong as NVIDIA's documentation allows, stays within docs/internals/noise.md's 1e-4 for all radii and all angles.

For AMD's v_log_f32, v_sin_f32 and v_cos_f32 no such bounds were found; test_triton_interpreter.py tests that arithmetic
with exact functions. near_gaussian's is exact, for all its integers and for factors of any size.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import ptx
import pytest

pytest.importorskip("triton")

from flatlora_kernels.triton_kernels import philox  # noqa: E402

TOLERANCE = 1e-4  # docs/internals/noise.md, "How equal is equal"
TEXT = philox._GAUSSIAN_PTX.value
ALL = np.arange(1 << 16, dtype=np.uint64)
ANGLES = ALL * np.uint64(40503) % np.uint64(1 << 16)
WORDS = (ALL | ANGLES << np.uint64(16)).astype(
    np.uint32
)  # every radius and every angle once, not in one order

RADIUS = np.sqrt(-2 * np.log((ALL.astype(np.float64) + 0.5) / 65536))
THETA = 2 * math.pi * ANGLES.astype(np.float64) / 65536


def factor(scale: float) -> Any:
    """`c` of `box_muller` as `perturb_tile` computes it."""
    s = np.float32(scale)
    return np.array(s * s * np.float32(philox.RADIUS_FACTOR.value), np.float32)


def outputs(text: str, scale: float, error: dict[str, int]) -> list[Any]:
    bits = ptx.run(text, 3, WORDS, factor(scale).view(np.uint32), error=error)
    return [b.view(np.float32).astype(np.float64) for b in bits]


def worst(text: str, scale: float = 1.0) -> float:
    """A bound of |eps - exact| / scale over all 2^32 words and all errors that the instructions may make."""
    radius_error = np.zeros(len(ALL))
    direction_error, direction = 0.0, 0.0
    for lg2, sqrt, turn in itertools.product((-1, 0, 1), repeat=3):
        error = {"lg2": lg2, "sqrt": sqrt, "cos": turn, "sin": turn}
        r, c, s = outputs(text, scale, error)
        radius_error = np.maximum(radius_error, np.abs(r / np.float64(np.float32(scale)) - RADIUS))
        direction_error = max(
            direction_error, np.abs(c - np.cos(THETA)).max(), np.abs(s - np.sin(THETA)).max()
        )
        direction = max(direction, np.abs(c).max(), np.abs(s).max())
    product = radius_error * direction + RADIUS * direction_error  # whatever the angle that meets a radius
    rounding = 2.0**-24 * (RADIUS + radius_error) * direction
    return float((product + rounding).max())


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.37, 50.0])
def test_ptx_at_both_ends_of_every_approximation(scale: float) -> None:
    assert worst(TEXT, scale) <= TOLERANCE


def test_ptx_without_errors_of_instructions() -> None:
    """What is left is the arithmetic between them: roundings of float32."""
    r, c, s = outputs(TEXT, 1.0, {})
    np.testing.assert_allclose(r, RADIUS, rtol=2e-7, atol=0)
    np.testing.assert_allclose(c, np.cos(THETA), rtol=0, atol=5e-7)
    np.testing.assert_allclose(s, np.sin(THETA), rtol=0, atol=5e-7)


def test_largest_uniform() -> None:
    """u = 65535: U is 2^-17 below 1, where the logarithm has lost most of its digits and must stay negative."""
    for side in (-1, 1):
        r, _, _ = outputs(TEXT, 1.0, {"lg2": side, "sqrt": side})
        assert r[-1] > 0
        assert abs(r[-1] - RADIUS[-1]) <= TOLERANCE


def test_scale_zero_is_silent() -> None:
    assert not outputs(TEXT, 0.0, {"lg2": 1, "cos": 1, "sin": 1})[0].any()


WRONG = [
    ("0f37800000", "0f37800001"),  # 2^-16, one bit in the last place more
    ("0fC2FFFFFF", "0fC2FFFFFE"),  # half a step of U more
    ("0fC2FFFFFF", "0fC3000000"),  # no half: U = 0
    ("0f38C90FDB", "0f38C90FDC"),  # 2 pi / 65536
    ("0fC4490FDB", "0fC4490FDC"),
    ("0x5410", "0x5432"),  # the other half of the word
    ("0x5432", "0x5410"),
    ("0x4b00", "0x4a00"),
    ("cos.approx.ftz.f32 $1", "sin.approx.ftz.f32 $1"),
    ("sin.approx.ftz.f32 $2, t", "sin.approx.ftz.f32 $2, r"),
    ("sqrt.approx.ftz.f32 $0, r", "lg2.approx.ftz.f32 $0, r"),
    ("mul.ftz.f32 r, r, $4", "mul.ftz.f32 r, r, r"),
]


@pytest.mark.parametrize(("right", "wrong"), WRONG)
def test_wrong_ptx_is_noticed(right: str, wrong: str) -> None:
    text = TEXT.replace(right, wrong)
    assert text != TEXT
    try:
        found = worst(text)
    except AssertionError:  # outside the range in which an instruction's error is bounded
        return
    assert not found <= TOLERANCE


def test_wrong_radius_factor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox.RADIUS_FACTOR, "value", -1.3864)
    assert not worst(TEXT) <= TOLERANCE


@pytest.mark.parametrize("name", sorted(ptx.APPROXIMATE))
def test_every_error_counts(name: str) -> None:
    """The control of the emulation: one instruction at its bound moves the result."""
    clean, off = outputs(TEXT, 1.0, {}), outputs(TEXT, 1.0, {name: 1})
    assert any((a != b).any() for a, b in zip(clean, off, strict=True))


# near_gaussian

LEVELS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28])
UNIT = philox.PERTURBED_PTX.value


def words(count: int) -> Any:
    """In which every sign and code meets every other, turned or not."""
    return np.random.default_rng(5).integers(0, 1 << 32, (2, count), dtype=np.uint64).astype(np.uint32)


def integers(word: Any) -> tuple[Any, Any]:
    """The values of two columns, and those of the word turned; (count, 2)."""
    turned = word >> np.uint32(5) | word << np.uint32(27)

    def values(w: Any) -> Any:
        halves = np.stack([w & np.uint32(0xFFFF), w >> np.uint32(16)], -1)
        return LEVELS[halves >> 5 & 15] * np.where(halves >> 15 & 1, -1, 1)

    return values(word), values(turned)


def bfloat16(values: Any) -> Any:
    """Pairs of the nearest."""
    return ptx._pairs(np.stack([values, values], -1))


def units(text: str, f: tuple[float, float], weights: list[Any]) -> list[Any]:
    left, right = words(1 << 14)
    factors = [bfloat16(np.full(left.shape, 2 * value)) for value in f]
    return ptx.run(text, 4, left, right, *weights, *factors)


def exact_units(f: tuple[float, float], weights: list[Any]) -> list[Any]:
    (a, b), (c, d) = map(integers, words(1 << 14))
    m = (a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d)
    return [w + integer * factor for w, integer, factor in zip(weights, m, (*f, *f), strict=True)]


@pytest.mark.parametrize("f", [(2.0**-133, 2.0**-126), (1e-3, 0.25), (1.0, 3.0), (2.0**66, 1.2e37)], ids=str)
@pytest.mark.parametrize("noise_alone", [True, False])
def test_units_are_exact(f: tuple[float, float], noise_alone: bool) -> None:
    """Whatever the factor: that of 1 and more is where 2^128 f would be infinite."""
    f = tuple(float(ptx._halves(bfloat16(np.array([value])))[0, 0]) for value in f)  # type: ignore[assignment]
    rng = np.random.default_rng(6)
    scales = (0, 0, 0, 0) if noise_alone else (f[0], f[1], 50 * f[0], f[1] / 9)
    held = [ptx._pairs(scale * rng.standard_normal((1 << 14, 2))) for scale in scales]
    expected = exact_units(f, [ptx._halves(w) for w in held])
    for got, value in zip(units(UNIT, f, held), expected, strict=True):
        np.testing.assert_array_equal(ptx._halves(got), ptx._halves(ptx._pairs(value)))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0x81e081e0", "0x81c081e0"),
        ("$4, $4, 5", "$4, $4, 6"),
        ("$5, $5, 5", "$5, $4, 5"),
        ("0x7f007f00", "0x7e807e80"),
        ("q, b, two, p", "q, b, minus, p"),
        ("c, r, minus, p", "c, r, one, p"),
        ("$1, b, $11, $7", "$1, b, $10, $7"),
        ("$2, c, $10, $8", "$2, c, $10, $6"),
    ],
)
def test_wrong_units_are_noticed(right: str, wrong: str) -> None:
    text = UNIT.replace(right, wrong, 1)
    assert text != UNIT
    f = (0.5, 0.75)
    rng = np.random.default_rng(6)
    held = [ptx._pairs(rng.standard_normal((1 << 14, 2))) for _ in range(4)]
    expected = exact_units(f, [ptx._halves(w) for w in held])
    pairs = zip(units(text, f, held), expected, strict=True)
    assert any((ptx._halves(got) != ptx._halves(ptx._pairs(value))).any() for got, value in pairs)


def test_quotient_by_the_root_is_correctly_rounded() -> None:
    """Of every float32 between two powers of two, and of subnormal results, as a division rounds it."""
    root = np.float32(math.sqrt(665))
    assert philox.ROOT_RECIPROCAL.value == 1 / float(root)
    scales = [np.arange(1 << 23, 1 << 24).astype(np.float32)]
    scales.append(np.arange(1, 1 << 30, 1023, dtype=np.uint32).view(np.float32))
    for scale in scales:
        got = (scale.astype(np.float64) * philox.ROOT_RECIPROCAL.value).astype(np.float32)
        np.testing.assert_array_equal(got, scale / root)
