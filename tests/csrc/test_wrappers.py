"""Every function of csrc/cuda/ptx.h, each in a small kernel of its own (cpp/wrappers.cu), emulated and on a GPU: both
must give what the manual says. Layouts of matrices: test_emulator_layouts.py, with the same kernels.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import emulator
import numpy as np
import pytest
import torch
import wrappers

on_both = pytest.mark.parametrize("library", wrappers.LIBRARIES)
CUDA, EMULATOR = emulator.CSRC / "cuda", emulator.CSRC / "emulator"


def random_words(count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 2**32, count, dtype=np.uint32)


def declared(*files: Path) -> set[str]:
    text = "".join(file.read_text() for file in files)
    return set(
        re.findall(
            r"^(?:FLATLORA_DEVICE|inline|template <.*>|  FLATLORA_DEVICE) ?[\w:<>]* (\w+)\(", text, re.M
        )
    ) | set(re.findall(r"^(?:FLATLORA_DEVICE )?(?:void|V|Error) (\w+)\(", text, re.M))


def test_all_wrappers_are_here():
    functions = declared(CUDA / "ptx.h")
    assert len(functions) > 50 and {"wgmma", "load_shared", "load_global"} <= functions
    assert {"launch", "encode_tensor_map"} <= declared(CUDA / "launch.h")
    functions |= {"launch", "encode_tensor_map"}
    text = wrappers.SOURCE.read_text()
    assert not [f for f in functions if not re.search(rf"\b{f}(<[^;]*>)?\(", text)]
    assert not functions - declared(EMULATOR / "ptx.h", EMULATOR / "sm90.h", EMULATOR / "launch.h")


@pytest.mark.nvcc
@pytest.mark.parametrize("architecture", ["80", "90a"])
def test_compiles(architecture, tmp_path):
    if wrappers.NVCC is None:
        pytest.skip("no nvcc")
    done = wrappers.nvcc(architecture, "-cubin", "-o", str(tmp_path / "wrappers.cubin"))
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr


# --- Where a thread is, memory, barriers ---


@on_both
def test_position(library):
    out = wrappers.get(library).run("position", np.zeros(1), np.zeros((192, 6), dtype=np.int32))
    i = np.arange(192)
    expected = [i % 64, i % 64 // 32, i % 32, i // 64, 0 * i + 3, i % 64 // 32 + 100]
    assert np.array_equal(out, np.stack(expected, axis=1))


@on_both
@pytest.mark.parametrize(
    "kind, words", [("uint16", 0.5), ("uint32", 1), ("float", 1), ("words 2", 2), ("words 4", 4)]
)
def test_shared_memory(library, kind, words):
    data = np.arange(32 * words * 2, dtype=np.uint16).reshape(32, -1)
    out = wrappers.get(library).run(f"shared {kind}", data, np.zeros_like(data))
    assert np.array_equal(out, data[::-1])


@on_both
def test_load_global_once(library):
    data = random_words(128)
    assert np.array_equal(wrappers.get(library).run("global_once", data, np.zeros_like(data)), data)


@on_both
@pytest.mark.parametrize("threads", [32, 64, 128])
def test_threads_wait_for_each_other(library, threads):
    data = random_words(128).reshape(-1, threads)
    out = wrappers.get(library).run(f"exchange {threads}", data, np.zeros_like(data))
    assert np.array_equal(out, data[:, ::-1])


@on_both
def test_shuffle_xor(library):
    data = random_words(32) & 0x7F7FFFFF  # no NaN
    out = wrappers.get(library).run("shuffles", data, np.zeros((31, 32, 2), dtype=np.uint32))
    for mask in range(1, 32):
        for kind in range(2):
            assert np.array_equal(out[mask - 1, :, kind], data[np.arange(32) ^ mask])


@on_both
def test_votes(library):
    data = random_words(32) & 0x7F7FFFFF
    out = wrappers.get(library).run("votes", data, np.zeros((32, 2), dtype=np.uint32))
    assert np.array_equal(out[:, 0], data[np.arange(32) * 7 % 32])
    assert (out[:, 1] == sum(int(x & 1) << i for i, x in enumerate(data))).all()


# --- Arithmetic ---


@on_both
def test_integers(library):
    data = random_words(128).reshape(32, 4)
    data[:, 2] &= 0x7777  # the top bit of a selector would copy a sign
    data[0, 2] = 0x7531
    out = wrappers.get(library).run("integers", data, np.zeros((32, 5), dtype=np.uint32))
    eight = np.ascontiguousarray(data[:, :2]).view(np.uint8)
    four = [[eight[i, data[i, 2] >> (4 * j) & 7] for j in range(4)] for i in range(32)]
    assert np.array_equal(out[:, 0], np.array(four, dtype=np.uint8).view(np.uint32).reshape(-1))
    first = data[:, 0]
    assert np.array_equal(out[:, 1], first ^ data[:, 1] & data[:, 3])
    assert np.array_equal(out[:, 2], first >> 5 | first << 27)
    bits = first[:, None] >> np.arange(32, dtype=np.uint32) & 1
    assert np.array_equal(out[:, 3], (bits << np.arange(31, -1, -1, dtype=np.uint32)).sum(1, dtype=np.uint32))
    assert np.array_equal(out[:, 4], bits.sum(1))


def nearest_bf16(x: Fraction) -> float:
    """A finite x, rounded to nearest even with subnormal numbers."""
    if x == 0:
        return 0.0
    exponent = max(math.frexp(float(abs(x)))[1] - 8, -133)  # of the last place
    size = round(x / Fraction(2) ** exponent) * Fraction(2) ** exponent
    return math.copysign(math.inf, x) if abs(size) >= Fraction(2) ** 128 else float(size)


@on_both
def test_multiply_add_of_pairs(library):
    words = random_words(2048 * 4).reshape(2048, 4)
    # Random exponents rarely meet: half of the sums cancel nearly, and some have numbers below the least normal one.
    halves = words.view(np.uint16).reshape(2048, 4, 2)
    halves[1024:, :3] = halves[1024:, :3] & 0x80FF | 0x3F00
    halves[1536:1792, 0::2] &= 0x80FF
    halves[1792:, 0] = halves[1792:, 0] & 0x80FF | 0x2000
    halves[1792:, 1] = halves[1792:, 1] & 0x80FF | 0x1F00
    halves[1792:, 2] &= 0x807F
    out = wrappers.get(library).run("pairs", words, np.zeros(2048, dtype=np.uint32))
    found = (out.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(2048, 2)
    a, b, c = (halves.astype(np.uint32) << 16).view(np.float32).transpose(1, 0, 2)[:3]
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    assert finite.mean() > 0.9
    for i in zip(*np.nonzero(finite), strict=True):
        assert found[i] == nearest_bf16(Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i])))
    assert not np.isfinite(found[~finite]).any()


def convert(library, name: str, data: np.ndarray, result: type) -> np.ndarray:
    assert data.size == 256 and data.itemsize == 4
    return wrappers.get(library).run(name, data, np.zeros(256, dtype=result))


# The bounds of the PTX manual.
@on_both
@pytest.mark.parametrize(
    "name, exact, low, high, absolute, relative",
    [
        ("log2_approx", np.log2, 0.5, 2, 2**-22, 0),
        ("log2_approx", np.log2, 2**-20, 0.4, 0, 2**-22),
        ("sqrt_approx", np.sqrt, 0, 40, 0, 2**-23),
        ("sin_approx", np.sin, -2 * np.pi, 2 * np.pi, 2**-20.5, 0),
        ("cos_approx", np.cos, -2 * np.pi, 2 * np.pi, 2**-20.5, 0),
    ],
)
def test_approximations(library, name, exact, low, high, absolute, relative):
    x = np.linspace(low, high, 256).astype(np.float32)
    y = convert(library, name, x, np.float32)
    expected = exact(x.astype(np.float64))
    rounding = np.spacing(np.abs(expected).astype(np.float32)) / 2
    assert (np.abs(y - expected) <= absolute + relative * np.abs(expected) + rounding).all()


def difficult_floats(digits: int, smallest: float) -> np.ndarray:
    """Ties and their neighbours for a type of so many bits after the point, and its ends."""
    ties = np.float32(1) + (np.arange(40) + 0.5) * 2.0**-digits
    ties = np.concatenate([ties, np.nextafter(ties.astype(np.float32), np.float32(9))])
    ends = [
        0,
        65504,
        65519.9,
        65520,
        1e9,
        np.inf,
        smallest,
        smallest / 2,
        smallest * 0.75,
        smallest * 1.5,
        1e-30,
    ]
    x = np.concatenate([ties, ends, np.random.default_rng(6).standard_normal(256 - 80 - len(ends))])
    return x.astype(np.float32)


@on_both
@pytest.mark.parametrize("name, dtype", [("pack_bf16", torch.bfloat16), ("pack_f16", torch.float16)])
def test_conversion_to_16_bits(library, name, dtype):
    x = difficult_floats(7 if dtype == torch.bfloat16 else 10, 2**-24)
    out = convert(library, name, x, np.uint32).view(np.uint16).reshape(256, 2)
    for half, sign in enumerate((1, -1)):
        assert np.array_equal(out[:, half], wrappers.bits((torch.from_numpy(x) * sign).to(dtype)))


@on_both
def test_conversion_from_f16(library):
    halves = np.concatenate([np.arange(0, 0x7C01, 0x7C01 // 250), [1, 0x3FF, 0x8000, 0xFBFF]]).astype(
        np.uint32
    )
    halves = np.resize(halves, 256)
    out = convert(library, "f16_to_float", halves, np.float32)
    assert np.array_equal(out, halves.astype(np.uint16).view(np.float16).astype(np.float32))


@on_both
def test_conversion_to_tf32(library):
    x = difficult_floats(10, 2**-126) * np.where(np.arange(256) % 2, 1, -1).astype(np.float32)
    x = x[np.isfinite(x)]
    x = np.resize(x, 256)
    out = convert(library, "to_tf32", x, np.uint32)
    # Away from zero where the 13 bits that go are one half.
    scale = 2.0 ** (np.frexp(np.abs(x.astype(np.float64)))[1] - 11)
    expected = np.copysign(np.floor(np.abs(x.astype(np.float64)) / scale + 0.5) * scale, x)
    assert np.array_equal(out.view(np.float32), expected.astype(np.float32))
    assert not (out & 0x1FFF).any()


# --- sm_80: copies ---


@on_both
@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async(library, size):
    data = random_words(32 * size // 4).view(np.uint8).reshape(32, size)
    out = wrappers.get(library).run(f"copies {size}", data, np.zeros_like(data))
    for lane in range(32):
        valid = lane % (size + 1) & ~1
        assert np.array_equal(out[lane, :valid], data[lane, :valid]) and not out[lane, valid:].any()


@on_both
@pytest.mark.parametrize("pending", [0, 2])
def test_cp_async_wait(library, pending):
    data = random_words(512).reshape(4, 128)
    out = wrappers.get(library).run(f"copy_groups {pending}", data, np.zeros_like(data))
    assert np.array_equal(out[: 4 - pending], data[: 4 - pending])


# --- sm_90a ---


@on_both
def test_mbarrier(library):
    data = random_words(128)
    out = wrappers.get(library, sm90=True).run("turns", data, np.zeros_like(data))
    assert np.array_equal(out, ~data)


@on_both
@pytest.mark.parametrize("row, column", [(0, 0), (8, 64), (30, 128), (-4, -8), (39, 192), (40, 0)])
def test_tma_load(library, row, column):
    matrix = np.arange(1, 40 * 200 + 1, dtype=np.uint16).reshape(40, 200)
    out = np.zeros((16, 8, 8), dtype=np.uint16)
    wrappers.get(library, sm90=True).call("test_box", matrix, 40, 200, 400, row, column, out)
    rows, chunks = np.arange(16)[:, None], np.arange(8)[None, :]
    box = out[rows, chunks ^ rows % 8].reshape(16, 64)
    padded = np.pad(matrix, ((16, 16), (64, 64)))
    assert np.array_equal(box, padded[row + 16 : row + 32, column + 64 : column + 128])


@on_both
@pytest.mark.parametrize("row, column", [(0, 0), (8, 128), (30, 64)])
def test_tma_load_multicast(library, row, column):
    matrix = np.arange(1, 40 * 200 + 1, dtype=np.uint16).reshape(40, 200)
    out = np.zeros((2, 32, 8, 8), dtype=np.uint16)
    wrappers.get(library, sm90=True).call("test_shared_box", matrix, 40, 200, 400, row, column, out)
    rows, chunks = np.arange(32)[:, None], np.arange(8)[None, :]
    expected = np.pad(matrix, ((0, 32), (0, 64)))[row : row + 32, column : column + 64]
    for block in out:
        assert np.array_equal(block[rows, chunks ^ rows % 8].reshape(32, 64), expected)


@on_both
@pytest.mark.parametrize(
    "offset, rows, columns, row_bytes, box_rows, right",
    [
        (0, 40, 199, 400, 16, True),
        (16, 1, 8, 16, 256, True),
        (2, 40, 8, 400, 16, False),
        (0, 40, 200, 408, 16, False),
        (0, 40, 200, 400, 257, False),
        (0, 40, 200, 400, 0, False),
        (0, 0, 200, 400, 16, False),
    ],
)
def test_encode_tensor_map(library, offset, rows, columns, row_bytes, box_rows, right):
    found = wrappers.get(library, sm90=True)
    address = 1 << 21 | offset  # nothing is read
    error = found.library.test_encode(
        *map(wrappers.ctypes.c_int64, (address, rows, columns, row_bytes, box_rows))
    )
    assert (error == 0) == right


@on_both
@pytest.mark.parametrize("row, column", [(0, 0), (8, 64), (30, 128), (-4, -8), (39, 192), (40, 0)])
def test_tma_store(library, row, column):
    boxes = random_words(1024).view(np.uint16).reshape(2, 16, 8, 8)
    matrices = np.arange(3 * 40 * 200, dtype=np.uint16).reshape(3, 40, 200)
    expected = np.pad(matrices, ((0, 0), (16, 16), (64, 64)))
    wrappers.get(library, sm90=True).call("test_stored_boxes", boxes, row, column, matrices, 40, 200)
    rows, chunks = np.arange(16)[:, None], np.arange(8)[None, :]
    plain = boxes[:, rows, chunks ^ rows % 8].reshape(2, 16, 64)
    expected[:, row + 16 : row + 32, column + 64 : column + 128] = plain[0], plain[1], ~plain[0]
    assert np.array_equal(matrices, expected[:, 16:-16, 64:-64])


@on_both
def test_hand_over(library):
    blocks = 4
    data = random_words(blocks * 512).view(np.uint16).reshape(blocks, 16, 8, 8)
    out = np.zeros(2 * blocks * 1024 + 2 * blocks, dtype=np.uint16)
    wrappers.get(library, sm90=True).call("test_hand_over", data, out, blocks)
    boxes = out[: blocks * 1024].reshape(blocks, 16, 8, 8)
    rows, chunks = np.arange(16)[:, None], np.arange(8)[None, :]
    assert np.array_equal(boxes[:, rows, chunks ^ rows % 8], np.roll(data, -1, axis=0))


@on_both
def test_copy_to_block(library):
    data = random_words(256)
    out = np.zeros(640, dtype=np.uint32)
    wrappers.get(library, sm90=True).call("test_send", data, out)
    assert np.array_equal(out[:256], data) and np.array_equal(out[256:512], ~data)
    assert np.array_equal(out[512:], np.repeat([0, 1], 64))


@on_both
def test_registers(library):
    data = random_words(256)
    out = wrappers.get(library, sm90=True).run("registers", data, np.zeros_like(data))
    assert np.array_equal(out, data * np.repeat(np.array([3, 5], dtype=np.uint32), 128))
