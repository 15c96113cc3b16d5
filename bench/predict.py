"""What the counts say about the speed of the fused products before any GPU has run them. Nothing here is measured.

Cycles of each unit are counted for the multiprocessor that gets most work: the grid is that of the configured tile, and
a multiprocessor takes whole tiles. Three figures follow. `best`: the units overlap perfectly, so that the busiest one
is all the time there is. `in turn`: noise is drawn, then multiplied by, and memory alone is hidden, as in a plain loop.
`worst`: no unit works while another does. All are over a plain product at the peak of its busiest unit with no tile
left over, which no library reaches: a measured ratio has a slower base.

Left out: launching, the adapter (r / K of the work), adding up split sums (they stay in L2), traffic from L2, the
lower clock that the tensor cores run at under load, and whatever is in the way of issuing one instruction per cycle.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

_DOCS = Path(__file__).parent.parent / "docs"
DOC = _DOCS / "performance.md"
COUNTS = _DOCS / "kernels.md"


class Chip(NamedTuple):
    """Sources: NVIDIA's H100, H200 and A100 data sheets and architecture white papers for processors, clock, memory
    and bf16 rate (dense; H100: 989 TFLOP/s = 132 x 4096 x 1.83 GHz, A100: 312 TFLOP/s = 108 x 2048 x 1.41 GHz); the
    CUDA C++ Programming Guide, throughput of native arithmetic instructions, for special functions."""

    name: str
    architecture: str
    processors: int
    clock: float  # Hz
    flops: int  # of dense bf16, per cycle and processor
    bandwidth: float  # of memory, bytes per second
    special: int = 16  # special functions per cycle and processor
    issue: int = 4 * 32  # instructions of a thread per cycle and processor: 4 schedulers, 32 lanes


CHIPS = (
    Chip("H100 SXM", "sm90", 132, 1.83e9, 4096, 3.35e12),
    Chip("H200 SXM", "sm90", 132, 1.83e9, 4096, 4.8e12),
    Chip("A100 SXM 40 GB", "sm80", 108, 1.41e9, 2048, 1.555e12),
    Chip("A100 SXM 80 GB", "sm80", 108, 1.41e9, 2048, 2.039e12),
)

TRITON = "3.6.0"  # whose machine code docs/kernels.md counts
SPECIAL = {"gaussian": 2, "rademacher": 0}  # per value: lg2, sqrt, cos and sin for two of them
ROWS = (16, 256, 2048, 8192)
WORKSPACE = 16 << 20  # see flatlora_kernels/backends/triton.py


class Prediction(NamedTuple):
    """Times in seconds."""

    tile: str
    tiles: int  # of the output, times the parts of the contraction
    per_processor: int  # of them, on the busiest one
    filled: float  # share of the time that the average processor has work
    tensor: float
    issue: float
    special: float
    memory: float
    plain: float

    @property
    def _units(self) -> tuple[float, ...]:
        return self.tensor, self.issue, self.special, self.memory

    @property
    def best(self) -> float:
        return max(self._units) / self.plain

    @property
    def in_turn(self) -> float:
        return max(self.memory, self.tensor + max(self.issue, self.special)) / self.plain

    @property
    def worst(self) -> float:
        return sum(self._units) / self.plain

    @property
    def bound(self) -> str:
        names = ("tensor cores", "issue", "special functions", "memory")
        return names[self._units.index(max(self._units))]


@functools.cache
def _counts() -> dict[tuple[str, ...], float]:
    """Instructions of the main loop per element of the weight, by kernel, target, noise and tile ("": of many rows)."""
    found = {}
    section = COUNTS.read_text().partition(f"## Triton {TRITON}")[2].partition("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) < 7 or cells[2] != "bfloat16":
            continue
        kernel, target, _, noise, tile, call, count = cells[:7]
        if rows := re.fullmatch(r"(\d+) rows(, split)?", call):
            found[kernel, target, noise, tile.split(",")[0]] = float(count)
            if rows[1] == "8192":
                found[kernel, target, noise, ""] = float(count)
    return found


def instructions(architecture: str, direction: str, noise: str, tile: str) -> float:
    """As docs/kernels.md has them; where this tile is not among them, those of the tile for many rows."""
    key = (direction, architecture, noise)
    counts = _counts()
    found = counts.get((*key, tile), counts.get((*key, "")))
    if found is None:
        raise ValueError(f"{COUNTS} has no bfloat16 row of 8192 rows for {', '.join(key)} on Triton {TRITON}")
    return found


def predict(chip: Chip, direction: str, noise: str, M: int, N: int, K: int) -> Prediction:
    """bf16, one sample."""
    from flatlora_kernels.triton_kernels import configs

    outputs, length = (N, K) if direction == "forward" else (K, N)
    workspace = min(WORKSPACE, 2 * N * K // 4)
    config, tiles = configs.linear(chip.architecture, "half", direction, 1, M, outputs, chip.processors)
    splits, steps = configs.splits(config, tiles, length, 4 * M * outputs, workspace, chip.processors)
    grid = tiles * splits
    each = -(-grid // chip.processors)
    # On the busiest processor: elements of the weight, and values of eps, of which `carry` draws one tile twice.
    elements = each * config.block_out * steps * config.block_in
    drawn = elements + each * config.block_out * config.block_in * config.carry
    cycle = 1 / chip.clock
    memory = 2 * (N * K + M * K + M * N) / chip.bandwidth
    tile = f"{config.block_m}x{config.block_out}x{config.block_in}"
    return Prediction(
        tile=tile + (f", {splits} parts" if splits > 1 else ""),
        tiles=grid,
        per_processor=each,
        filled=grid / (each * chip.processors),
        tensor=cycle * elements * 2 * config.block_m / chip.flops,
        issue=cycle * drawn * instructions(chip.architecture, direction, noise, tile) / chip.issue,
        special=cycle * drawn * SPECIAL[noise] / chip.special,
        memory=memory,
        plain=max(2 * M * N * K / (chip.processors * chip.flops * chip.clock), memory),
    )


def report(N: int = 4096, K: int = 4096) -> str:
    """The table, in Markdown."""
    from .table import markdown

    parts = []
    for chip in CHIPS:
        body = []
        for direction in ("forward", "input_grad"):
            for M in ROWS:
                for noise in ("gaussian", "rademacher"):
                    p = predict(chip, direction, noise, M, N, K)
                    times = [f"{1e6 * t:.1f}" for t in (p.plain, p.tensor, p.issue, p.special, p.memory)]
                    share = f"{100 * p.filled:.0f}"
                    ratios = [f"{ratio:.2f}" for ratio in (p.best, p.in_turn, p.worst)]
                    body.append([direction, str(M), noise, p.tile, share, *times, *ratios, p.bound])
        header = [
            "direction",
            "M",
            "noise",
            "tile",
            "filled %",
            "plain",
            "tensor",
            "issue",
            "special",
            "memory",
        ]
        header += ["best", "in turn", "worst", "bound by"]
        about = f"{chip.processors} processors, {chip.clock / 1e9:g} GHz, {chip.bandwidth / 1e12:g} TB/s"
        parts.append(f"**{chip.name}** ({about})\n\n{markdown(header, body)}")
    title = f"PREDICTED, not measured: bf16, N = {N}, K = {K}; microseconds, and ratios to plain"
    return "\n\n".join([title, *parts])


def write(text: str, doc: Path = DOC) -> None:
    """Puts `text` between the marks of the page."""
    begin, end = "<!-- predict -->\n", "<!-- /predict -->"
    page = doc.read_text()
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{doc}: expected one line {begin.strip()} and one {end}")
    doc.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n\n{end}", page, flags=re.DOTALL))
