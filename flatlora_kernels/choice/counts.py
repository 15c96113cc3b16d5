"""What is known of the kernels, for cost.py to count with: their instructions and tiles, and what was measured."""

from __future__ import annotations

from typing import NamedTuple

# Measured on an H100 80GB HBM3 on 2026-11-27, in CUDA graphs with a cold L2: bench/results/NVIDIA-H100-80GB-HBM3. The
# cycles of SM90_TILES are an H200's.
REACHED = 0.92  # of 1.83 GHz: truth-time.jsonl, cuBLAS from 1024 rows on
MEMORY_REACHED = 0.9  # gpu.txt: 3.01 TB/s copied, 3.05 read
CALL = 3e-6  # parts.txt: a graph of one kernel that does next to nothing takes 4.1 us, `launch` included
RAMP = 3e-6  # cuBLAS with 16 rows: 18.5 us, 11 of them for the weight
# Values a cycle and processor: draw.txt, with 16 warps. The last two are not measured: taken to be as rademacher.
DRAWN = {"gaussian": 6.8, "rademacher": 15.4, "near_gaussian": 15.4, "hadamard": 15.4}
OVERLAP = 0.5  # truth-time.jsonl, up to 64 rows; parts.txt, `perturb`
STALL = 1.23  # NVIDIA-H200/truth-time.jsonl, `triton`, all sizes
# Cycles of a step of linear_sm90.h's tiles at REACHED of the clock, gaussian and rademacher, the mean of both
# directions: bench/results/NVIDIA-H200/truth-time.jsonl. The last is the H100's, whose rademacher is the gaussian one
# by the ratio of the tile before it.
_LARGE, _MIDDLE, _SMALL = (2040, 1480), (1650, 1120), (1200, 960)

START = 4  # steps of 64 of a tile alone on its multiprocessor; tiles that share one hide each other's

# Instructions of a thread per value of noise in the main loop, all else that the loop does included, in bfloat16:
# docs/internals/kernels.md (Triton 3.6) and docs/internals/cuda_kernels.md; tests/choice/test_cost.py compares. Each
# line: forward with gaussian and with rademacher noise, input gradient with both.
Counts = tuple[float, float, float, float]
# Of many rows, and of up to 16, where no page has rademacher for sm80 and sm100: as far below gaussian as of many.
TRITON: dict[str, tuple[Counts, Counts]] = {
    "sm80": ((16.91, 7.94, 17.81, 8.69), (15.75, 6.78, 17.09, 7.97)),
    "sm90": ((15.53, 6.06, 16.72, 7.25), (15.84, 6.97, 17.69, 8.69)),
    "sm100": ((15.88, 6.78, 16.66, 8.38), (15.31, 6.21, 17.12, 8.84)),
}
MAKES_U = 0.7  # more of them in a loop that makes u, too: 0.5 (sm_90) to 0.9 (sm_80)
CUDA: dict[str, tuple[Counts, ...]] = {  # the tiles of configs.h and, "sm90a", of linear_sm90.h
    "sm80": (
        (19.06, 10.22, 19.59, 10.69),
        (16.44, 7.56, 17.03, 7.97),
        (15.19, 6.34, 15.72, 6.69),
        (13.91, 5.03, 14.47, 5.41),
    ),
    "sm100": (
        (20.47, 10.81, 20.06, 12.41),
        (16.34, 7.56, 16.84, 7.94),
        (15.16, 6.38, 15.59, 6.69),
        (14.03, 5.19, 14.31, 5.44),
    ),
    "sm90a": ((16.25, 7.31, 16.81, 8.09), (16.22, 7.19, 16.41, 7.66), (16.06, 7.09, 16.62, 7.62)),
}
PERTURB: dict[str, dict[str, tuple[float, float]]] = {  # gaussian, rademacher
    "triton": {"sm80": (13.44, 4.53), "sm90": (13.78, 4.25), "sm100": (12.94, 4.25)},
    "cuda": {"sm80": (13.19, 3.55), "sm90": (13.22, 3.73), "sm100": (13.16, 3.45)},
}

# Instructions of a thread per value in the product loops and in `perturb`, about the mean of what the pages have for
# backends and targets. hadamard, drawn by its index, has no product loop.
NEAR_GAUSSIAN_PRODUCT = 9.0
NEAR_GAUSSIAN_PERTURB = 5.8
HADAMARD_PERTURB = 7.3
# Of a packed weight on sm_90: more of them for a value of 4 bits, in product loops and in `perturb`, as the pages have
# them for NF4; and all of them of the owner's pass that writes the values, an estimate.
DECODE = {"triton": 3.5, "cuda": 6.5}
OWNER_DECODE = 4.0
# Of the transform, counted in csrc/cuda/transform.h for sm_90 (25.1 with tiles of 4096): instructions of a thread for
# each value and stage of additions, and for each value beside them (signs, three passes through registers with shared
# memory between, the scale, the sum); bytes of shared memory for each value; seconds that a block takes from its first
# load to its last store, which nothing hides where there are few.
TRANSFORM_STAGE = 1.0
TRANSFORM_REST = 13.0
TRANSFORM_SHARED = 16.0
TRANSFORM_LATENCY = 2e-6


class Tile(NamedTuple):
    """Of a product: what one block works on at a time."""

    m: int  # rows of x
    n: int  # outputs
    k: int = 64  # steps of the contraction
    warps: int = 8
    by: str = "mma"  # the instruction: "mma", "wgmma", "tcgen05"
    at_a_time: int = 1  # on a processor
    high: int = 1  # blocks of a cluster along the rows, which share W + eps
    passes: float = 1.0  # of W and W + eps through shared memory, beside what the products read
    consumers: int = 0  # instructions of a step that are not counted per value of noise
    cycles: tuple[int, int] = (0, 0)  # of a step, gaussian and rademacher, where they were measured


# Of 8 consumer warps in a step of linear_sm90.h: 59 to 77 for each. Taken for the vendor's, too.
CONSUMERS = 8 * 70
# Multiply-adds for each instruction of a loop around `mma.sync`, with the loads of operands.
MMA = 1400
# Of csrc/cuda/configs.h, where W goes through shared memory three times, and of linear_sm90.h, where what another block
# of the cluster draws comes by a copy, which reads and writes.
CUDA_TILES: tuple[Tile, ...] = (
    Tile(256, 128, passes=3.0),
    Tile(128, 128, passes=3.0),
    Tile(64, 64, warps=4, at_a_time=2, passes=3.0),
    Tile(16, 64, warps=4, at_a_time=4, passes=3.0),
)
SM90_TILES: tuple[Tile, ...] = (
    Tile(256, 128, by="wgmma", high=2, passes=1.5, consumers=CONSUMERS, cycles=_LARGE),
    Tile(256, 64, by="wgmma", consumers=CONSUMERS, cycles=_MIDDLE),
    Tile(128, 64, by="wgmma", consumers=CONSUMERS, cycles=_SMALL),
)
# Rows and outputs of tiles that a vendor's library may have.
VENDOR = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (64, 16))
VENDOR_SINGLE = ((16, 64), (32, 64), *VENDOR)  # in float32 without tensor cores
BY = {"sm80": "mma", "sm90": "wgmma", "sm100": "tcgen05"}

# Measured on an AMD EPYC with AVX-512 (docs/internals/performance.md): nanoseconds of a core for each value of the
# weight.
CPU_NOISE = {"gaussian": 0.45, "rademacher": 0.13, "near_gaussian": 0.23, "hadamard": 0.18, "none": 0.0}
# For each value and stage of the transform, all else of it included.
CPU_TRANSFORM = 0.06
CPU_UNPACK = 0.28  # to widen and pack a 16-bit weight
# Seconds of a slice: fresh memory, and a product that does not write whole rows.
CPU_SLICE = 250e-6
