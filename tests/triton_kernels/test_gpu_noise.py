"""The Gaussian noise of GPUs without a GPU: the inline PTX of triton_kernels/philox.py, with every approximation as
wrong as NVIDIA's documentation allows, stays within docs/internals/noise.md's 1e-4 for all radii and all angles.

For AMD's v_log_f32, v_sin_f32 and v_cos_f32 no such bounds were found; test_triton_interpreter.py tests that arithmetic
with exact functions.
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
