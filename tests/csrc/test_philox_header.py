"""csrc/common/philox.h, the header that CPU, CUDA and HIP code share, on the host and as device code."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

import flatlora_kernels
from flatlora_kernels.backends import cpu
from flatlora_kernels.core.noise import NEAR_GAUSSIAN_VARIANCE, tile_bits

HERE = Path(__file__).parents[1]
SOURCE = HERE / "cpp" / "philox_tile.cpp"
TILES = json.loads((HERE / "data" / "noise_vectors.json").read_text())["tiles"]
CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if CXX is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("philox") / "philox_tile"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([CXX, *flags, str(SOURCE), "-o", str(path)], check=True)
    return path


def draw(program: Path, tile: dict) -> torch.Tensor:
    kind = {"gaussian": 1, "rademacher": 2, "near_gaussian": 3, "hadamard": 4}[tile["kind"]]
    arguments = (kind, tile["seed"] % 2**64, tile["stream"], tile["sample"], *tile["rows"], *tile["cols"],
                 tile_bits(*tile["layer"]) if "layer" in tile else 0)  # fmt: skip
    done = subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True)
    rows = [[struct.unpack("f", struct.pack("I", int(bits)))[0] for bits in line.split()] for line in
            done.stdout.splitlines()]  # fmt: skip
    return torch.tensor(rows)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile['kind']}-{tile['seed']}")
def test_scalar_code_matches_the_vectors(program, tile):
    drawn = "m" if tile["kind"] == "near_gaussian" else "z"
    error = (draw(program, tile).double() - torch.tensor(tile[drawn], dtype=torch.float64)).abs().max()
    assert error <= (2e-6 if tile["kind"] == "gaussian" else 0)


def test_scalar_and_vector_code_agree_to_the_bit(program, noise):
    if reason := cpu.unavailable():
        pytest.skip(reason)
    if "baseline" in cpu.describe().split("(")[0]:
        pytest.skip("the baseline level has no fused multiply-add, so its gaussian bits differ")
    tile = {
        "kind": noise,
        "seed": 99,
        "stream": 3,
        "sample": 2,
        "rows": [7, 60],
        "cols": [16, 150],
        "layer": [90, 200],
    }
    deviation = (
        NEAR_GAUSSIAN_VARIANCE**0.5 if noise == "near_gaussian" else 1.0
    )  # near_gaussian prints integers
    z = flatlora_kernels.materialize_noise(
        torch.full((53,), deviation),
        134,
        seed=99,
        stream=3,
        sample=2,
        noise=noise,
        row_offset=7,
        col_offset=16,
        layer_shape=(90, 200),
        backend="cpu",
    )
    assert torch.equal(z, draw(program, tile))


@pytest.mark.nvcc
def test_compiles_as_device_code(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    out = tmp_path / "philox.ptx"
    flags = ["-std=c++17", "-arch=sm_80", "-fmad=false", "-x", "cu", "-ptx"]
    subprocess.run([nvcc, *flags, str(SOURCE), "-o", str(out)], check=True)
    assert "tile_kernel" in out.read_text()
