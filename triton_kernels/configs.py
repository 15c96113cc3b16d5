"""Tile sizes by architecture, type and number of rows. No timing at run time: the choice decides the order of sums,
and results must not depend on how busy a machine was. `python -m bench tune` measures and prints a new table."""

from __future__ import annotations

import functools
from typing import NamedTuple


class Config(NamedTuple):
    """Of forward and input gradient: a tile's rows of x, outputs, and steps of the contraction."""

    block_m: int
    block_out: int
    block_in: int
    num_warps: int
    num_stages: int
    carry: bool = True  # the perturbed tile goes from one step to the next, see forward.py
    fill: bool = False  # only where there are tiles enough for three quarters of the processors
    per_processor: int = 1  # tiles that one works on at a time


class Pass(NamedTuple):
    """Of a kernel that reads the weight once: its tile."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    steps: int = 1  # tiles of columns that one program goes through
    together: int = 1  # of these in a round of its loop


DESCRIPTOR_ROWS = 64  # a tile of so many is loaded without a descriptor, which takes the host 8 us
GROUP_M = 8  # tiles of rows that take turns on one tile of the weight
ANY = 1 << 62

# Family of architectures, kind of product -> direction -> (most rows of x that see one sample, tile), see `linear`.
# Kinds: "half" (both 16-bit types), "ragged" (the same where x or the weight is not row-major or a size or stride is no
# multiple of 8), "tf32", "single" (float32 in full, without tensor cores; or ragged).
# "any" is for families that have no table of their own.
Tiles = tuple[tuple[int, Config], ...]


def _both(*tiles: tuple[int, Config]) -> dict[str, Tiles]:
    return {"forward": tiles, "input_grad": tiles}


def _either(forward: Tiles, input_grad: Tiles) -> dict[str, Tiles]:
    return {"forward": forward, "input_grad": input_grad}


# What several have in common. Of "half" that is all up to 64 rows, and tiles so small that two share a processor.
_FEW = (16, Config(16, 64, 64, 4, 4, carry=False, per_processor=4))
_SOME = (64, Config(64, 64, 64, 4, 3, per_processor=2))
_SMALL = (ANY, Config(128, 64, 64, 4, 3, per_processor=2))
_LARGE = (ANY, Config(256, 128, 64, 8, 3, fill=True))
_RAGGED = (
    (16, Config(16, 64, 32, 4, 3, carry=False, per_processor=2)),
    (ANY, Config(64, 64, 32, 4, 3, carry=False, per_processor=2)),
)
_TF32 = (
    (16, Config(16, 64, 32, 4, 3, carry=False, per_processor=4)),
    (64, Config(64, 64, 32, 4, 3, per_processor=2)),
    (ANY, Config(128, 128, 32, 8, 3, fill=True)),
    (ANY, Config(128, 64, 32, 4, 3, per_processor=2)),
)
_SINGLE = (16, Config(16, 64, 32, 4, 2, carry=False, per_processor=2))

LINEAR: dict[tuple[str, str], dict[str, Tiles]] = {
    ("sm80", "half"): _both(_FEW, _SOME, (ANY, Config(128, 128, 64, 8, 3, fill=True)), _SMALL),
    ("sm90", "half"): _both(_FEW, _SOME, (128, _SMALL[1]), _LARGE, (ANY, Config(256, 64, 128, 8, 2))),
    ("sm100", "half"): _either(
        (_FEW, _SOME, _LARGE, _SMALL),
        (_FEW, (64, Config(64, 64, 64, 4, 2, per_processor=2)), _LARGE, _SMALL),
    ),
    ("gfx", "half"): _both(
        (16, Config(16, 64, 64, 4, 2, carry=False, per_processor=2)),
        (64, Config(64, 64, 64, 4, 2, per_processor=2)),
        (ANY, Config(128, 128, 32, 8, 2)),
    ),
    ("any", "ragged"): _either(
        _RAGGED, (_RAGGED[0], (ANY, Config(32, 64, 32, 4, 3, carry=False, per_processor=2)))
    ),
    ("gfx", "ragged"): _either((_SINGLE, _RAGGED[1]), ((ANY, _SINGLE[1]),)),
    ("any", "tf32"): _both(*_TF32),
    ("sm100", "tf32"): _either(_TF32, (*_TF32[:2], _TF32[3])),
    ("any", "single"): _both(_SINGLE, (ANY, Config(64, 64, 16, 4, 2, carry=False, per_processor=2))),
    # Below 64 rows, where Triton 3.6 would take tensor cores and round to tf32.
    ("sm100", "single"): _both(_SINGLE, (ANY, Config(32, 64, 16, 4, 2, carry=False, per_processor=2))),
    # Small enough for small problems to have several tiles each way; calls are what takes time there, not elements.
    ("interpreter", "any"): _either(
        (
            (16, Config(16, 64, 256, 1, 1, carry=False)),
            (64, Config(64, 32, 64, 1, 1)),
            (ANY, Config(64, 128, 256, 1, 1)),
        ),
        (
            (16, Config(16, 256, 64, 1, 1, carry=False)),
            (64, Config(64, 64, 32, 1, 1)),
            (ANY, Config(64, 256, 128, 1, 1)),
        ),
    ),
}
PERTURB_PROGRAMS = 3  # for a processor at least: fewer steps where the weight, or a slice of it, is small
PERTURB = Pass(64, 64, 4, 1, steps=8)
PERTURB_UNITS = Pass(64, 64, 4, 1, steps=8, together=2)  # of near_gaussian, where the loop itself counts
PERTURB_RAGGED = Pass(32, 64, 4, 1, steps=8)
PERTURB_RAGGED_WALSH = Pass(16, 64, 4, 1, steps=8)  # of hadamard, which spills in more rows
PERTURB_INTERPRETER = Pass(64, 256, 1)
TRANSFORM = 4096  # elements of x in a block of whole tiles
TRANSFORM_ONE_PRODUCT = 7  # bits of a tile at most that is transformed by one product
TRANSFORM_PROGRAMS = 4  # for a processor, where there are rows enough
ROW_NORMS = Pass(16, 256, 4, 3)
ROW_NORMS_ADAPTER = Pass(32, 128, 4, 2)
ROW_NORMS_LONG_ADAPTER = Pass(16, 128, 4, 2)  # float32, or of a high rank
ADAPTER_GRADS = Pass(256, 64, 8, 2)  # columns and rows of dY
ADAPTER_GRADS_PARTS = 16  # of the rows, at most
ADAPTER_GRADS_BYTES = 48 << 20  # of dY at least, what an L2 holds: below, reading it twice costs little
ADAPTER_GRADS_WORKSPACE = 16 << 20
# Of the gradients of an expert's weight or adapter: up to so many rows of the result, its tile and the steps through
# the expert's rows (block_m), of 16 bits and of float32.
EXPERT_GRADS = (
    (16, Config(32, 16, 128, 4, 2)),
    (32, Config(32, 32, 128, 4, 2)),
    (ANY, Config(32, 128, 128, 8, 3)),
)
EXPERT_GRADS_SINGLE = ((16, Config(32, 16, 64, 4, 2)), (ANY, Config(32, 32, 64, 4, 2)))
ADD_SPLITS_BLOCK = 512
# The forward makes u = x A^T itself up to so many rows that see one sample, rank, and elements of a weight of 16 bits:
# its loop then has 3 to 6 % more instructions (docs/internals/kernels.md), and there is a launch less.
U_ROWS, U_RANK, U_WEIGHT = 16, 16, 1 << 26

_FAMILIES = {
    "sm86": "sm80",
    "sm87": "sm80",
    "sm89": "sm80",
    "sm103": "sm100",
    "sm120": "sm80",
    "sm121": "sm80",
}
_OWN = {family for family, _ in LINEAR}


def family_of(architecture: str) -> str:
    """Whose tiles it takes; an unknown GPU of NVIDIA those of sm80."""
    if architecture.startswith("gfx"):
        return "gfx"
    family = _FAMILIES.get(architecture, architecture)
    return family if family in _OWN else "sm80"


def linear(
    architecture: str,
    kind: str,
    direction: str,
    samples: int,
    rows: int,
    outputs: int,
    processors: int,
    apart: bool = False,
) -> tuple[Config, int]:
    """The tile for `samples` times `rows` rows of x, and how many of them cover all outputs.

    The automatic choice: of the family's table for this kind of product, else of the table for any, the first tile
     1. that is for at least so many rows,
     2. and, if it is marked `fill`, of which there are enough for three quarters of the processors.
    Where noise stays apart, large tiles are replaced by 128 x 64 first.

    Args:
        kind, direction: see LINEAR. rows: those that see one sample. apart: registers have to hold a second tile, for
            what rounding W + eps leaves.
    """
    family = family_of(architecture)
    table = LINEAR.get((family, kind)) or LINEAR.get((family, "any")) or LINEAR["any", kind]
    for most, config in table[direction]:
        if apart and config.block_m > 64:
            config = config._replace(
                block_m=128,
                block_out=64,
                block_in=min(config.block_in, 64),
                num_warps=8 if family == "sm80" else 4,
                fill=False,
            )
        elif apart and config.block_m == 64 and kind == "half" and family in ("sm80", "sm100"):
            config = config._replace(num_warps=8)  # with 4 some spill
        tiles = samples * -(-rows // config.block_m) * -(-outputs // config.block_out)
        if rows <= most and (not config.fill or 4 * tiles >= 3 * processors):
            return config, tiles
    raise AssertionError(f"configs.LINEAR has no tile for {rows} rows on {architecture}")


def transform(architecture: str, regular: bool, one_tile: bool, parts: int) -> tuple[int, int]:
    """Warps and stages of a transform: what compiles without spills (docs/internals/kernels.md).

    regular: eight elements can be loaded at once. one_tile: along the contraction. parts: bfloat16 that hold a sum.
    """
    family = family_of(architecture)
    if family == "gfx":
        return 4, 1
    if family == "sm80" and not one_tile:
        return 8, 1
    return (4 if regular and (family != "sm80" or parts < 3) else 8), 2


@functools.lru_cache(maxsize=1024)
def splits(
    config: Config, tiles: int, length: int, output_bytes: int, workspace: int, processors: int
) -> tuple[int, int]:
    """Into how many parts to cut a contraction, so that all processors have work, and the tiles in each.

    tiles: of the output. length: of the contraction. output_bytes: of one partial sum in float32. workspace: bytes
    that partial sums may take.
    """
    steps = -(-length // config.block_in)

    def busiest(parts: int) -> float:
        """Steps on the processor that has most to do; two more for the beginning and end of each part."""
        return max(-(-tiles * parts // processors), config.per_processor) * (steps / parts + 2)

    parts = min(range(1, max(1, min(steps // 4, workspace // output_bytes)) + 1), key=busiest)
    steps_per_part = -(-steps // parts)
    return -(-steps // steps_per_part), steps_per_part
