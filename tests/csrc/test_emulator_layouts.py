"""Where elements of matrices lie, in registers and in shared memory: the wrappers of csrc/cuda/ptx.h, emulated and on a
GPU, against tables made by CuTe (wrappers.py says how). The kernels run on numbers; no table of the emulator is read.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import wrappers

pytestmark = pytest.mark.parametrize("library", wrappers.LIBRARIES)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def integers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Small enough that all their products and sums are exact."""
    return torch.randint(-8, 9, shape, generator=generator).float()


def in_registers(matrix: np.ndarray, name: str) -> np.ndarray:
    """[lane, value] of a matrix [row, column] whose fragments the table `name` describes."""
    return matrix.T.reshape(-1)[wrappers.layout(name)]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma(library, kind):
    generator = torch.Generator().manual_seed(1)
    a, b, d = (integers(generator, *shape) for shape in ((16, 16), (8, 16), (16, 8)))
    words = [
        in_registers(wrappers.bits(a.to(DTYPES[kind])), "mma a").view(np.uint32),
        in_registers(wrappers.bits(b.to(DTYPES[kind])), "mma b").view(np.uint32),
        in_registers(d.numpy(), "mma d").view(np.uint32),
    ]
    out = wrappers.get(library).run(
        f"mma {kind}", np.concatenate(words, axis=1), np.zeros((32, 4), dtype=np.float32)
    )
    assert np.array_equal(out, in_registers((d + a @ b.T).numpy(), "mma d"))


def test_mma_tf32(library):
    generator = torch.Generator().manual_seed(2)
    a, b, d = (integers(generator, *shape) for shape in ((16, 8), (8, 8), (16, 8)))
    names = ("mma_tf32 a", "mma_tf32 b", "mma_tf32 d")
    words = [in_registers(x.numpy(), name) for x, name in zip((a, b, d), names, strict=True)]
    out = wrappers.get(library).run(
        "mma_tf32", np.concatenate(words, axis=1), np.zeros((32, 4), dtype=np.float32)
    )
    assert np.array_equal(out, in_registers((d + a @ b.T).numpy(), "mma_tf32 d"))


@pytest.mark.parametrize("name", ["ldmatrix", "ldmatrix_trans"])
def test_ldmatrix(library, name):
    rows = np.arange(256, dtype=np.uint16)  # 8 elements at each lane's address
    out = wrappers.get(library).run(name, rows, np.zeros((32, 8), dtype=np.uint16))
    assert np.array_equal(out, wrappers.layout(name))


def test_stmatrix(library):
    registers = np.arange(256, dtype=np.uint16).reshape(32, 8)
    out = wrappers.get(library, sm90=True).run("stmatrix", registers, np.zeros(256, dtype=np.uint16))
    assert np.array_equal(out[wrappers.layout("ldmatrix")], registers)


def test_box_of_the_copy_engine(library):
    matrix = np.arange(40 * 200, dtype=np.uint16).reshape(40, 200)
    out = np.zeros(16 * 64, dtype=np.uint16)
    wrappers.get(library, sm90=True).call("test_box", matrix, 40, 200, 400, 8, 64, out)
    place = wrappers.layout("k-major 64, mn first")[:16, :64]
    assert np.array_equal(out[place], matrix[8:24, 64:128])


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("order", ["mn first", "k first"])
@pytest.mark.parametrize("major", ["k-major", "mn-major"])
@pytest.mark.parametrize("columns", [64, 128])
def test_wgmma(library, columns, major, order, kind):
    a_name, b_name = f"k-major 64, {order}", f"{major} {columns}, {order}"
    a_table, b_table = wrappers.TABLES[a_name], wrappers.TABLES[b_name]
    depth = b_table["columns"]
    generator = torch.Generator().manual_seed(3)
    a, b = integers(generator, 64, depth), integers(generator, columns, depth)
    image = np.zeros(32 << 10, dtype=np.uint16)  # a's 32 KiB, then b's
    image[wrappers.layout(a_name)[:, :depth]] = wrappers.bits(a.to(DTYPES[kind]))
    image[(16 << 10) + wrappers.layout(b_name)] = wrappers.bits(b.to(DTYPES[kind]))
    steps = [
        (int(a_step, 16), int(b_step, 16) + (32 << 10 >> 4))
        for a_step, b_step in zip(a_table["descriptors"], b_table["descriptors"], strict=False)
    ]
    assert len(steps) * 16 == depth
    data = np.concatenate([np.array(steps, dtype=np.uint64).reshape(-1).view(np.uint8), image.view(np.uint8)])
    name = f"wgmma {columns} {kind}" + (" transposed" if major == "mn-major" else "")
    out = wrappers.get(library, sm90=True).run(name, data, np.zeros((128, 2, columns // 2), dtype=np.float32))
    half = depth // 2
    products = (a[:, :half] @ b[:, :half].T, a[:, half:] @ b[:, half:].T + 1)
    for i, product in enumerate(products):
        assert np.array_equal(out[:, i], in_registers(product.numpy(), f"wgmma d {columns}"))
