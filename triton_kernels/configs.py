"""Tile sizes by architecture, type and number of rows. No timing at run time: the choice decides the order of sums,
and results must not depend on how busy a machine was. `python -m bench tune` measures and prints a new table."""

from __future__ import annotations

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


class Pass(NamedTuple):
    """Of a kernel that reads the weight once: its tile."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 3


GROUP_M = 8  # tiles of rows that take turns on one tile of the weight
ANY = 1 << 62

# Architecture, bytes of the type -> direction -> (most rows of x, tile): the first that fits. Rows are those that see
# one sample of the noise. "any" is for architectures that have no row of their own for a type.
LINEAR: dict[tuple[str, int], dict[str, tuple[tuple[int, Config], ...]]] = {
    ("sm80", 2): {
        "forward": (
            (16, Config(16, 64, 128, 4, 4, carry=False)),
            (64, Config(64, 64, 64, 4, 3)),
            (ANY, Config(128, 128, 64, 8, 3, fill=True)),
            (ANY, Config(128, 64, 64, 4, 3)),
        ),
        "input_grad": (
            (16, Config(16, 128, 64, 4, 4, carry=False)),
            (64, Config(64, 64, 64, 4, 3)),
            (ANY, Config(128, 128, 64, 8, 3, fill=True)),
            (ANY, Config(128, 64, 64, 4, 3)),
        ),
    },
    ("sm90", 2): {
        "forward": (
            (16, Config(16, 64, 128, 4, 4, carry=False)),
            (64, Config(64, 64, 64, 4, 3)),
            (128, Config(128, 64, 64, 4, 3)),
            (ANY, Config(256, 128, 64, 8, 3, fill=True)),
            (ANY, Config(256, 64, 128, 8, 2)),
        ),
        "input_grad": (
            (16, Config(16, 128, 64, 4, 4, carry=False)),
            (64, Config(64, 64, 64, 4, 3)),
            (128, Config(128, 64, 64, 4, 3)),
            (ANY, Config(256, 128, 64, 8, 3, fill=True)),
            (ANY, Config(256, 64, 128, 8, 2)),
        ),
    },
    ("sm100", 2): {
        "forward": (
            (16, Config(16, 64, 128, 4, 4, carry=False)),
            (64, Config(64, 64, 64, 4, 3)),
            (ANY, Config(256, 128, 64, 8, 3, fill=True)),
            (ANY, Config(128, 64, 64, 4, 3)),
        ),
        "input_grad": (
            (16, Config(16, 128, 64, 4, 4, carry=False)),
            (64, Config(64, 64, 64, 4, 3)),
            (ANY, Config(256, 128, 64, 8, 3, fill=True)),
            (ANY, Config(128, 64, 64, 4, 3)),
        ),
    },
    ("gfx", 2): {
        "forward": (
            (16, Config(16, 64, 64, 4, 2, carry=False)),
            (64, Config(64, 64, 64, 4, 2)),
            (ANY, Config(128, 128, 32, 4, 2)),
        ),
        "input_grad": (
            (16, Config(16, 64, 64, 4, 2, carry=False)),
            (64, Config(64, 64, 64, 4, 2)),
            (ANY, Config(128, 128, 32, 4, 2)),
        ),
    },
    ("any", 4): {
        "forward": (
            (16, Config(16, 64, 32, 4, 2, carry=False)),
            (ANY, Config(64, 64, 32, 4, 2, carry=False)),
        ),
        "input_grad": (
            (16, Config(16, 64, 32, 4, 2, carry=False)),
            (ANY, Config(64, 64, 32, 4, 2, carry=False)),
        ),
    },
    # Small, so that small problems have several tiles.
    ("interpreter", 2): {
        "forward": ((16, Config(16, 32, 64, 1, 1, carry=False)), (ANY, Config(64, 64, 64, 1, 1))),
        "input_grad": ((16, Config(16, 64, 32, 1, 1, carry=False)), (ANY, Config(64, 64, 64, 1, 1))),
    },
}
PERTURB = Pass(32, 64, 4)
ROW_NORMS = Pass(16, 256, 4)
ROW_NORMS_ADAPTER = Pass(32, 128, 4)
ADD_SPLITS_BLOCK = 1024

_FAMILIES = {"sm80": "sm80", "sm86": "sm80", "sm87": "sm80", "sm89": "sm80", "sm90": "sm90", "sm100": "sm100"}
_FAMILIES |= {"sm103": "sm100", "sm120": "sm80", "sm121": "sm80", "interpreter": "interpreter"}


def linear(
    architecture: str, direction: str, itemsize: int, samples: int, rows: int, outputs: int, processors: int
) -> tuple[Config, int]:
    """The tile for `samples` times `rows` rows of x, and how many of them cover all outputs.

    direction: "forward" or "input_grad". rows: those that see one sample.
    """
    family = "gfx" if architecture.startswith("gfx") else _FAMILIES.get(architecture, "sm80")
    table = LINEAR.get((family, itemsize)) or LINEAR.get(
        (family, 2) if family == "interpreter" else ("any", itemsize)
    )
    for most, config in table[direction]:
        tiles = samples * -(-rows // config.block_m) * -(-outputs // config.block_out)
        if rows <= most and (not config.fill or 4 * tiles >= 3 * processors):
            return config, tiles
    raise AssertionError(f"configs.LINEAR has no tile for {rows} rows on {architecture}")


def splits(tiles: int, steps: int, output_bytes: int, workspace: int, processors: int) -> int:
    """Into how many parts to cut the contraction, so that all processors have work.

    tiles: of the output. steps: of the contraction. output_bytes: of one partial sum in float32. workspace: bytes
    that partial sums may take.
    """
    if tiles >= processors:
        return 1
    return max(1, min(processors // tiles, steps // 4, workspace // max(output_bytes, 1)))
