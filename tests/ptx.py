"""Inline PTX of the kernels, run in NumPy: exact where an instruction is, and as far off as NVIDIA allows where it
approximates.

Bounds: PTX ISA, "Floating Point Instructions", paragraphs lg2, sqrt, sin and cos, those of `.approx.ftz.f32`. Where
editions differ, the widest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.uint32]]

TURN = float(np.float32(2 * math.pi))
NO_ERROR: Mapping[str, int] = {}


def _lg2(x: Any) -> tuple[Any, Any]:
    assert (x > 0).all(), f"lg2 of {x.min()}"
    exact = np.log2(x)
    # Absolute 2^-22 within (0.5, 2), else relative.
    return exact, np.where((x > 0.5) & (x < 2), 2.0**-22, 2.0**-22 * np.abs(exact))


def _sqrt(x: Any) -> tuple[Any, Any]:
    assert (x >= 0).all(), f"sqrt of {x.min()}"
    return np.sqrt(x), 2.0**-23 * np.sqrt(x)


def _turn(function: Any) -> Any:
    def call(x: Any) -> tuple[Any, Any]:
        assert (np.abs(x) <= TURN).all(), f"the bound is for [-2 pi, 2 pi], got {np.abs(x).max()}"
        return function(x), np.full(x.shape, 2.0**-20.5)

    return call


APPROXIMATE = {"lg2": _lg2, "sqrt": _sqrt, "cos": _turn(np.cos), "sin": _turn(np.sin)}


def _float(bits: Array) -> Any:
    """As float64, subnormal numbers flushed."""
    value = np.ascontiguousarray(bits).view(np.float32).astype(np.float64)
    return np.where(np.abs(value) < 2.0**-126, 0 * value, value)


def _bits(value: Any) -> Array:
    rounded = np.asarray(value).astype(np.float32)
    return np.where(np.abs(rounded) < 2.0**-126, 0 * rounded, rounded).astype(np.float32).view(np.uint32)


def _halves(pairs: Array) -> Any:
    """Pairs of bfloat16 as float64, subnormal numbers too."""
    bits = np.stack([pairs << np.uint32(16), pairs & np.uint32(0xFFFF0000)], -1)
    return bits.view(np.float32).astype(np.float64)


def _pairs(values: Any) -> Array:
    """float64 (..., 2) to the nearest bfloat16, ties to even."""
    with np.errstate(invalid="ignore"):
        step = np.exp2(np.maximum(np.frexp(values)[1] - 8, -133))
        rounded = np.where(np.isfinite(values), np.rint(values / step) * step, values)
    with np.errstate(over="ignore"):
        bits = rounded.astype(np.float32).view(np.uint32) >> np.uint32(16)
    return bits[..., 0] | bits[..., 1] << np.uint32(16)


def _permute_bytes(low: Array, high: Array, selector: int) -> Array:
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    out = np.zeros(both.shape, np.uint64)
    for byte in range(4):
        chosen = selector >> 4 * byte & 0xF
        assert chosen < 8, "the mode that copies a sign"
        out |= (both >> np.uint64(8 * chosen) & np.uint64(0xFF)) << np.uint64(8 * byte)
    return out.astype(np.uint32)


def run(text: str, outputs: int, *inputs: Array, error: Mapping[str, int] = NO_ERROR) -> list[Array]:
    """The registers $0 .. $(outputs - 1) as bits, given those after them.

    error: by the name of an approximate instruction, -1 or 1 to add the largest error it may have, with that sign.
    """
    registers: dict[str, Array] = {
        f"${outputs + i}": np.asarray(bits, np.uint32) for i, bits in enumerate(inputs)
    }
    shape = np.broadcast_shapes(*(r.shape for r in registers.values()))

    def read(name: str) -> Array:
        if name in registers:
            return np.broadcast_to(registers[name], shape)
        number = int(name[2:], 16) if name.startswith("0f") else int(name, 0)
        return np.full(shape, number, np.uint32)

    for line in text.strip().strip("{}").split(";"):
        opcode, _, rest = line.strip().partition(" ")
        if not opcode or opcode == ".reg":
            continue
        target, *names = (name.strip() for name in rest.split(","))
        values = [read(name) for name in names]
        name = opcode.split(".")[0]
        if opcode == "prmt.b32":
            result = _permute_bytes(values[0], values[1], int(names[2], 0))
        elif opcode == "shfl.sync.idx.b32":  # whose lanes lie along the last axis, in segments of 16
            assert names[2:] == ["0x100f", "0xffffffff"] and shape[-1] == 32
            lane = np.arange(32) & 16 | values[1] & 15
            result = np.take_along_axis(np.broadcast_to(values[0], shape), lane, -1)
        elif opcode == "shr.u32":
            result = values[0] >> values[1]
        elif opcode == "shl.b32":
            result = values[0] << values[1]
        elif opcode == "and.b32":
            result = values[0] & values[1]
        elif opcode == "mov.b32":
            result = values[0]
        elif opcode == "lop3.b32" and names[3] == "0x96":
            result = values[0] ^ values[1] ^ values[2]
        elif opcode == "shf.r.wrap.b32":
            both = values[0].astype(np.uint64) | values[1].astype(np.uint64) << np.uint64(32)
            result = (both >> (values[2] & np.uint32(31)).astype(np.uint64)).astype(np.uint32)
        elif opcode == "fma.rn.bf16x2":
            a, b, c = map(_halves, values)
            with np.errstate(invalid="ignore", over="ignore"):
                result = _pairs(
                    a * b + c
                )  # exact in float64 but for a c that is some 2^40 times larger or smaller
        elif opcode == "cvt.rn.bf16x2.f32":
            result = _pairs(np.stack([v.view(np.float32).astype(np.float64) for v in reversed(values)], -1))
        elif opcode == "sub.rn.f32":
            a, b = (np.ascontiguousarray(v).view(np.float32) for v in values)
            with np.errstate(invalid="ignore"):
                result = (a - b).view(np.uint32)
        elif opcode == "fma.rn.ftz.f32":
            a, b, c = map(_float, values)
            result = _bits(a * b + c)  # of 24 by 24 bits, so that float64 loses nothing
        elif opcode == "mul.ftz.f32":
            result = _bits(_float(values[0]) * _float(values[1]))
        elif opcode == f"{name}.approx.ftz.f32":
            exact, bound = APPROXIMATE[name](_float(values[0]))
            side = error.get(name, 0)
            result = _bits(exact + side * bound)
            if side:
                result = np.nextafter(result.view(np.float32), np.float32(side * np.inf)).view(np.uint32)
        else:
            raise NotImplementedError(opcode)
        registers[target] = result
    return [read(f"${i}") for i in range(outputs)]
