"""What chips can do, by their makers' word: the rates that cost.py counts with."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """Rates are those of one multiprocessor ("processor") and cycle, where not said otherwise.

    Processors, bandwidth and the dense bfloat16 rate, which gives the clock: NVIDIA's data sheets and white papers of
    A100 (312 TFLOP/s = 108 x 2048 x 1.41 GHz), H100, H200 (989 = 132 x 4096 x 1.83 GHz) and B200 (2250 = 148 x 8192 x
    1.86 GHz). Issue slots, float32 and shared memory: CUDA C++ Programming Guide, arithmetic instructions and compute
    capabilities 8.0, 9.0 and 10.0. `l2`: the A100's white paper has 5120 bytes a cycle, the same is assumed of H100 and
    H200, and of B200 what a vendor's tile needs to run at full rate. Assumed, too: `mma` beyond the A100, where
    `mma.sync` does not reach the rate of `wgmma` and `tcgen05`. `launch` follows from the eight kernels of `panel` on
    an H100 (docs/internals/performance.md).

    A CPU has cores for processors and nanoseconds for cycles; its rates were measured (docs/internals/performance.md).
    """

    name: str
    architecture: str  # "sm80", "sm90", "sm100", "cpu"
    processors: int
    clock: float  # Hz
    bandwidth: float  # of memory, bytes per second of the whole chip
    l2_bytes: int
    tensor: int  # multiply-adds in 16-bit types
    mma: int  # the same by `mma.sync`
    single: int  # multiply-adds in float32
    l2: int  # bytes
    issue: int = 4  # instructions of a warp
    shared: int = 128  # bytes
    launch: float = 1e-6  # seconds


CHIPS = (
    Chip("A100 SXM 40 GB", "sm80", 108, 1.41e9, 1.555e12, 40 << 20, tensor=1024, mma=1024, single=64, l2=47),
    Chip("A100 SXM 80 GB", "sm80", 108, 1.41e9, 2.039e12, 40 << 20, tensor=1024, mma=1024, single=64, l2=47),
    Chip("H100 SXM", "sm90", 132, 1.83e9, 3.35e12, 50 << 20, tensor=2048, mma=1300, single=128, l2=38),
    Chip("H200 SXM", "sm90", 132, 1.83e9, 4.8e12, 50 << 20, tensor=2048, mma=1300, single=128, l2=38),
    Chip("B200 SXM", "sm100", 148, 1.86e9, 7.7e12, 126 << 20, tensor=4096, mma=1024, single=128, l2=64),
    Chip("EPYC, 2 cores", "cpu", 2, 1e9, 33e9, 1 << 20, tensor=105, mma=105, single=43, l2=1, launch=5e-6),
)


@functools.cache
def chip_of(device: torch.device) -> Chip | None:
    """The chip of a device, or one like it; None where there is no model.

    A CPU is always the one that was measured, so that no choice depends on the number of threads.
    """
    if device.type == "cpu":
        return CHIPS[-1]
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    p = torch.cuda.get_device_properties(device)
    return _like(p.name, f"sm{p.major}{p.minor}", p.multi_processor_count, p.total_memory)


def _like(name: str, architecture: str, processors: int, memory: int) -> Chip | None:
    same = [c for c in CHIPS if c.architecture == ("sm100" if architecture == "sm103" else architecture)]
    named = [c for c in same if c.name.split()[0] in name]
    if not same:
        return None
    if named:  # the two A100 differ in their memory
        chip = named[-1 if memory > 60 << 30 else 0]
    else:
        chip = min(same, key=lambda c: abs(c.processors - processors))
    return chip if processors == chip.processors else chip._replace(name=name, processors=processors)
