"""What a call should take, from counts and data sheets: the choice where nothing was measured, and `bench roofline`.

Every kernel is a `Work`: how much it asks of each unit of the chip, whose time is that amount over its rate. How units
combine, and what else is assumed and not counted:

* A multiprocessor takes whole tiles; beginning and end of a tile take as long as `_START` steps of it.
* Every unit of a multiprocessor reaches `REACHED` of its rate and memory `MEMORY_REACHED`, ours and the vendor's alike.
* Units work side by side (the busiest is all the time there is) in `perturb`, in the vendor's products and in `cuda` on
  sm_90, where warps of their own draw the noise.
* In `triton`, and in `cuda` elsewhere, the same warps draw and multiply. Taken is a time halfway (`OVERLAP`) between
  that and noise and product in turn: the machine code has the noise between the issue of the products and the wait for
  them (docs/kernels.md, "hidden"), yet with one or two warps to a scheduler nothing else fills the gaps.
* Kernels of one stream follow each other `launch` apart: 2 us, as in a CUDA graph or a queue that is never empty.
* Strategy "panel": noise is drawn beside a product only as far as that leaves multiprocessors idle, because a tile of
  the vendor's fills registers and shared memory of its own.
* A tensor that the kernel before has written or read comes from L2 where it takes less than half of it.
* float32 on a GPU: the vendor's product, and noise that is drawn anew for every 64 rows.

Nothing is timed here and no GPU has confirmed a figure. A measurement overrules: see dispatch.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from . import panel
from .arguments import _WORKSPACE
from .chips import CHIPS as CHIPS
from .chips import Chip as Chip
from .chips import chip_of as chip_of
from .triton_kernels import configs

BACKENDS = ("triton", "cuda", "cpu")
WAYS = ("fused", "panel", "perturb", "plain")
REACHED = 0.8  # cuBLAS on an H100: 600 to 750 of 989 TFLOP/s in bfloat16, mostly as the clock drops
MEMORY_REACHED = 0.9
OVERLAP = 0.5
_START = 4  # steps of a tile alone on its multiprocessor; tiles that share one hide each other's

# Instructions of a thread per value of noise in the main loop, all else that the loop does included, in bfloat16:
# docs/kernels.md (Triton 3.6) and docs/cuda_kernels.md; tests/test_cost.py compares. Each line: forward with gaussian
# and with rademacher noise, input gradient with both.
Counts = tuple[float, float, float, float]
# Of many rows, and of up to 16, where no page has rademacher for sm80 and sm100: as far below gaussian as of many.
TRITON: dict[str, tuple[Counts, Counts]] = {
    "sm80": ((17.16, 10.91, 17.94, 11.34), (16.03, 9.78, 17.22, 10.62)),
    "sm90": ((15.00, 8.78, 15.94, 9.22), (16.50, 9.28, 18.38, 10.69)),
    "sm100": ((16.44, 10.38, 16.66, 11.50), (16.56, 10.50, 18.06, 12.90)),
}
MAKES_U = 0.7  # more of them in a loop that makes u, too: 0.5 (sm_90) to 0.9 (sm_80)
CUDA: dict[str, tuple[Counts, ...]] = {  # the tiles of configs.h and, "sm90a", of linear_sm90.h
    "sm80": ((19.06, 12.72, 19.59, 13.16), (16.44, 10.09, 17.03, 10.50),
             (15.19, 8.88, 15.72, 9.25), (13.91, 7.53, 14.47, 7.91)),
    "sm100": ((21.47, 15.62, 20.06, 14.88), (16.34, 10.06, 16.84, 10.38),
              (15.16, 8.88, 15.59, 9.03), (13.97, 7.69, 14.31, 7.84)),
    "sm90a": ((15.34, 8.94, 16.19, 9.94), (18.38, 9.75, 18.69, 9.97), (15.94, 9.50, 16.38, 9.84)),
}  # fmt: skip
PERTURB: dict[str, dict[str, tuple[float, float]]] = {  # gaussian, rademacher
    "triton": {"sm80": (13.66, 8.06), "sm90": (13.69, 7.78), "sm100": (13.69, 7.59)},
    "cuda": {"sm80": (15.22, 8.84), "sm90": (15.12, 8.69), "sm100": (14.22, 7.81)},
}


class Tile(NamedTuple):
    """Of a product: what one block works on at a time."""

    m: int  # rows of x
    n: int  # outputs
    k: int = 64  # steps of the contraction
    warps: int = 8
    by: str = "mma"  # the instruction: "mma", "wgmma", "tcgen05"
    at_a_time: int = 1  # on a processor
    high: int = 1  # blocks of a cluster along the rows, which share W + eps
    wide: int = 1  # and along the outputs, which share x
    passes: float = 1.0  # of W and W + eps through shared memory, beside what the products read
    consumers: int = 0  # instructions of a step that are not counted per value of noise


# Of 8 consumer warps in a step of linear_sm90.h: 59 to 77 for each. Taken for the vendor's, too.
_CONSUMERS = 8 * 70
# Multiply-adds for each instruction of a loop around `mma.sync`, with the loads of operands.
_MMA = 1400
# Of csrc/cuda/configs.h, where W goes through shared memory three times, and of linear_sm90.h, where what another block
# of the cluster draws comes by a copy, which reads and writes.
CUDA_TILES: tuple[Tile, ...] = (
    Tile(256, 128, passes=3.0),
    Tile(128, 128, passes=3.0),
    Tile(64, 64, warps=4, at_a_time=2, passes=3.0),
    Tile(16, 64, warps=4, at_a_time=4, passes=3.0),
)
SM90_TILES: tuple[Tile, ...] = (
    Tile(256, 128, by="wgmma", high=2, wide=2, passes=1.5, consumers=_CONSUMERS),
    Tile(128, 64, by="wgmma", high=2, wide=2, passes=1.5, consumers=_CONSUMERS),
    Tile(128, 64, by="wgmma", consumers=_CONSUMERS),
)
# Rows and outputs of tiles that a vendor's library may have.
_VENDOR = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (64, 16))
_BY = {"sm80": "mma", "sm90": "wgmma", "sm100": "tcgen05"}
SPECIAL = {"gaussian": 2.0, "rademacher": 0.0, "none": 0.0}  # of a value: lg2, sqrt, cos and sin for two


class Call(NamedTuple):
    """M counts the rows of all samples."""

    direction: str  # "forward" or "input_grad"
    noise: str  # "gaussian", "rademacher" or "none"
    noise_accum: str  # "folded" or "split"
    dtype: str
    M: int
    N: int
    K: int
    rank: int = 0
    samples: int = 1

    @property
    def outputs(self) -> int:
        return self.N if self.direction == "forward" else self.K

    @property
    def length(self) -> int:
        return self.K if self.direction == "forward" else self.N

    @property
    def size(self) -> int:
        return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[self.dtype]

    @property
    def rows(self) -> int:
        """Those that see one sample."""
        return self.M // self.samples

    @property
    def workspace(self) -> int:
        """Bytes, as `arguments.workspace_limit`."""
        return min(_WORKSPACE, self.N * self.K * self.size // 4)

    def choose(self, counts: Counts) -> float:
        return counts[2 * (self.direction == "input_grad") + (self.noise == "rademacher")]


class Cost(NamedTuple):
    seconds: float
    workspace: int  # bytes
    bound: str  # the unit that takes longest
    units: dict[str, float]  # seconds of each unit, were it alone


class Work(NamedTuple):
    """What one kernel asks of a GPU."""

    flops: float = 0.0
    rate: float = 1.0  # multiply-adds of a processor and cycle that `flops` go at
    slots: float = 0.0  # instructions of a warp
    special: float = 0.0
    shared: float = 0.0  # bytes
    l2: float = 0.0  # bytes
    memory: float = 0.0  # bytes
    filled: float = 1.0  # share of its time that the average processor is at it
    overlap: float = 1.0  # 0: product and noise in turn

    def units(self, chip: Chip) -> dict[str, float]:
        """Seconds."""
        cycles = {
            "tensor": self.flops / 2 / self.rate,
            "issue": self.slots / chip.issue,
            "special": self.special / chip.special,
            "shared": self.shared / chip.shared,
            "l2": self.l2 / chip.l2,
        }
        rate = chip.processors * chip.clock * self.filled * REACHED
        units = {unit: c / rate for unit, c in cycles.items()}
        return units | {"memory": self.memory / chip.bandwidth / MEMORY_REACHED}

    def seconds(self, chip: Chip) -> float:
        """Without its launch."""
        u = self.units(chip)
        best = max(u.values())
        in_turn = max(best, u["tensor"] + max(u["issue"], u["special"]))
        return self.overlap * best + (1 - self.overlap) * in_turn


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _operands(tile: Tile, n: int) -> int:
    """Elements of shared memory that the products of a tile with `n` outputs read for one step of the contraction."""
    if tile.by == "mma":  # each warp reads its rows and its outputs
        shapes = [(h, tile.warps // h) for h in (1, 2, 4, 8) if h <= tile.warps and 16 * h <= tile.m]
        return min(tile.m * wide + n * high for high, wide in shapes)
    rows = min(tile.m, 64 if tile.by == "wgmma" else 128)  # each instruction reads so many, and all outputs
    return _ceil(tile.m, rows) * (rows + n)


def _tiled(
    chip: Chip, tile: Tile, call: Call, parts: int, instructions: float = 0.0, drawn: float = 1.0
) -> Work:
    """A product, by the vendor or with noise.

    Args:
        parts: of the contraction. instructions: per value drawn, all else of ours included; 0 = the vendor's product.
            drawn: values drawn for each one used.
    """
    steps = _ceil(_ceil(call.length, tile.k), parts)
    tiles = call.samples * _ceil(call.rows, tile.m * tile.high) * _ceil(call.outputs, tile.n * tile.wide)
    tiles *= tile.high * tile.wide
    vendor, grid = not instructions, tiles * parts
    adapter = 0 if vendor else tiles * _ceil(call.rank, tile.k)  # steps of it; the first part has them
    products = 2 if call.noise_accum == "split" else 1  # by eps, then by W
    of_noise, of_product = grid * steps + adapter, grid * steps * products + adapter
    macs = of_product * tile.m * tile.n * tile.k
    values = 0.0 if vendor else grid * steps * tile.n * tile.k / tile.high * drawn
    around = float(of_product * tile.consumers)
    if tile.by == "mma":  # of ours, `instructions` have those of one product
        around = macs / _MMA * (1 if vendor else 1 - 1 / products)
    # Tensor cores of sm_100 read the half of the second operand that the other block has.
    n = tile.n // 2 if vendor and tile.by == "tcgen05" else tile.n
    # Clusters of four use 16 processors of a group of 18.
    each = _ceil(grid, chip.processors // 16 * 16 if tile.high * tile.wide == 4 else chip.processors)
    filled = grid / (max(each, tile.at_a_time) * chip.processors)
    moved = call.samples * call.N * call.K + call.M * (call.length + call.outputs + call.rank * (not vendor))
    staged = tile.m + n * (tile.passes + products - 1)
    sums = 4.0 * (parts > 1) * parts * call.M * call.outputs * (1 + vendor)  # ours are read by another kernel
    return Work(
        flops=2.0 * macs,
        rate=chip.mma if tile.by == "mma" else chip.tensor,
        slots=values * instructions / 32 + around,
        special=values * SPECIAL[call.noise],
        shared=2.0 * tile.k * (of_product * _operands(tile, n) + of_noise * staged),
        l2=2.0 * tile.k * of_noise * (tile.m / tile.wide + tile.n / tile.high) + sums,
        memory=2.0 * moved,
        filled=filled * steps / (steps + _START / tile.at_a_time),
    )  # fmt: skip


def _best(
    chip: Chip, tiles: Sequence[Tile], call: Call, most: int, instructions: Sequence[float]
) -> tuple[int, int]:
    """Which of the tiles, and in how many parts up to `most`, takes least time; `instructions`: of each tile."""
    few = [p for p in (1, 2, 3, 4, 6, 8, 12, 16) if p <= max(1, min(most, _ceil(call.length, 64) // 4))]
    found = [(t, p) for t in range(len(tiles)) for p in few]
    return min(found, key=lambda f: _tiled(chip, tiles[f[0]], call, f[1], instructions[f[0]]).seconds(chip))


@functools.lru_cache(maxsize=4096)
def product(
    chip: Chip, M: int, outputs: int, length: int, size: int, held: int = 0, onto: bool = False
) -> Work:
    """The vendor's (M, length) x (length, outputs), by the tile that suits best.

    Args:
        size: bytes of an element. held: bytes of the operands that L2 holds. onto: is added to what the result holds.
    """
    by = _BY[chip.architecture]
    # From sm_90 on two blocks share the tile of the second operand.
    tiles = []
    for m, n in _VENDOR:
        tile = Tile(m, n, warps=8 if m * n > 8192 else 4, by=by, consumers=_CONSUMERS)
        tiles.append(tile._replace(high=2 if by != "mma" and M > m else 1))
    call = Call("forward", "none", "folded", "bfloat16", M, outputs, length)
    best, parts = _best(chip, tiles, call, 16, [0.0] * len(tiles))
    work = _tiled(chip, tiles[best], call, parts)
    scale = size / 2
    if size > 2:
        work = work._replace(rate=chip.single, slots=work.flops / 64)
    memory = scale * work.memory + size * onto * M * outputs - held
    return work._replace(shared=scale * work.shared, l2=scale * work.l2, memory=memory)


def perturb_pass(chip: Chip, backend: str, call: Call, values: int, to_memory: bool = True) -> Work:
    """W + eps in one pass, to memory or to what L2 holds."""
    return Work(
        slots=values * PERTURB[backend][chip.architecture][call.noise == "rademacher"] / 32,
        special=values * SPECIAL[call.noise],
        l2=float(2 * call.size * values),
        memory=float(call.size * values * (1 + to_memory)),
    )


def makes_u(backend: str, call: Call) -> bool:
    """Whether the fused kernel makes u = x A^T in its own pass over x; as triton_kernels/forward.py."""
    few = call.rows <= configs.U_ROWS and call.rank <= configs.U_RANK and call.N * call.K <= configs.U_WEIGHT
    return backend == "triton" and call.direction == "forward" and call.size == 2 and call.rank > 0 and few


def _fused(chip: Chip, backend: str, call: Call) -> tuple[Work, int]:
    """The kernel, and the parts that another one has to add up."""
    arch, half = chip.architecture, call.size == 2
    part = 4 * call.M * call.outputs
    if not half:
        work = product(chip, call.M, call.outputs, call.length, call.size)
        noise = perturb_pass(chip, backend, call, call.N * call.K * call.samples * _ceil(call.rows, 64))
        return work._replace(slots=work.slots + noise.slots, special=noise.special, overlap=OVERLAP), 1
    if backend == "triton":
        config, tiles = configs.linear(
            arch, "half", call.direction, call.samples, call.rows, call.outputs, chip.processors,
            apart=call.noise_accum == "split",
        )  # fmt: skip
        parts, steps = configs.splits(config, tiles, call.length, part, call.workspace, chip.processors)
        m, by = config.block_m, "mma" if config.block_m < 64 else _BY[arch]
        tile = Tile(m, config.block_out, config.block_in, config.num_warps, by, config.per_processor)
        count = call.choose(TRITON[arch][m <= 16])
        work = _tiled(chip, tile, call, parts, count, drawn=(steps + config.carry) / steps)
        if makes_u(backend, call):  # in every block
            macs = work.flops / 2 / tile.n * call.rank
            more = {"flops": 2 * macs, "slots": work.flops / 2 / m * MAKES_U / 32, "l2": 2 * macs / m}
            more["shared"] = 2 * more["l2"]
            work = work._replace(**{unit: getattr(work, unit) + amount for unit, amount in more.items()})
        return work._replace(overlap=OVERLAP), parts
    small = call.noise_accum == "split"  # has the small tiles alone
    if arch == "sm90" and call.rows > 64 and not small:
        cuda, rows, table = SM90_TILES, slice(3), "sm90a"
    else:
        rows = slice(3, 4) if call.rows <= 16 else slice(2, 3) if call.rows <= 64 or small else slice(2)
        cuda, table = CUDA_TILES, "sm100" if arch == "sm100" else "sm80"
    # The choice does not depend on the noise.
    gaussian = call._replace(noise="gaussian")
    counts = [gaussian.choose(c) for c in CUDA[table][rows]]
    best, parts = _best(chip, cuda[rows], gaussian, call.workspace // part, counts)
    work = _tiled(chip, cuda[rows][best], call, parts, call.choose(CUDA[table][rows][best]))
    return work._replace(overlap=1.0 if table == "sm90a" else OVERLAP), parts


# --- Calls ---


def resident(chip: Chip, size: int) -> int:
    """Of `size` bytes that were just used, those that L2 still holds: all or none."""
    return size if 2 * size <= chip.l2_bytes else 0


def total(chip: Chip, works: list[Work], workspace: int = 0) -> Cost:
    """Of kernels that follow each other."""
    units = {"launch": len(works) * chip.launch}
    for work in works:
        for unit, seconds in work.units(chip).items():
            units[unit] = units.get(unit, 0.0) + seconds
    seconds = units["launch"] + sum(work.seconds(chip) for work in works)
    return Cost(seconds, workspace, max(units, key=lambda u: units[u]), units)


def works(chip: Chip, backend: str, how: str, call: Call) -> tuple[list[Work], int]:
    """The kernels of a call on a GPU in the order of their launches, and the bytes of workspace.

    Args:
        how: a strategy, "perturb" (W + eps to memory in one pass, the vendor's product, the adapter's two: the best
            that is not fused) or "plain" (the vendor's product alone).
    """
    M, outputs, length, size = call.M, call.outputs, call.length, call.size
    if how == "plain":
        return [product(chip, M, outputs, length, size)], 0
    # u = x A^T, where the input gradient is given its v; then what comes of it, in place of a result or added to one.
    down, up, onto = [], [], []
    y_held, a_held = resident(chip, M * outputs * size), resident(chip, M * length * size)
    if call.rank:
        down = [product(chip, M, call.rank, length, size)] if call.direction == "forward" else []
        up = [product(chip, M, outputs, call.rank, size)]
        onto = [product(chip, M, outputs, call.rank, size, y_held, True)]
    if call.noise == "none":
        return [*down, product(chip, M, outputs, length, size), *onto], 0
    if how == "perturb":
        weight = outputs * length * size
        multiply = product(chip, call.rows, outputs, length, size, resident(chip, weight))
        draw = perturb_pass(chip, backend, call, outputs * length)
        return [*call.samples * [draw, multiply], *down, *onto], weight
    if how == "panel":
        found = panel.slices(outputs, length, size, call.workspace)
        count, width = len(found) * call.samples, found[0][1]
        held = width * length * size + (a_held + bool(up) * y_held * width // outputs) // call.samples
        multiply = product(chip, call.rows, width, length, size, held, call.rank > 0)
        draw = perturb_pass(chip, backend, call, width * length, to_memory=False)
        # "split": by eps, and by W.
        products = [multiply] * (2 if call.noise_accum == "split" else 1)
        return [*down, *up, *count * [draw, *products]], min(2, len(found)) * width * length * size
    work, parts = _fused(chip, backend, call)
    down = [] if makes_u(backend, call) else down
    work = work._replace(memory=work.memory - (a_held if down else 0))
    values = M * outputs
    sums = Work(slots=values * (parts + 4) / 32, l2=4.0 * values * parts, memory=float(values * size))
    return [*down, work, *[sums] * (parts > 1)], 4 * parts * values * (parts > 1)


def cost(chip: Chip, backend: str, strategy: str, call: Call) -> Cost:
    """What `call` should take.

    Args:
        backend: "triton" or "cuda" on a GPU, "cpu" on a CPU. strategy: "fused" or "panel"; see also `works`.
    """
    if backend not in BACKENDS or (backend == "cpu") != (chip.architecture == "cpu"):
        raise ValueError(f"backend: there is no model of {backend!r} on {chip.name}")
    if strategy not in WAYS:
        raise ValueError(f"strategy: expected one of {', '.join(WAYS)}, got {strategy!r}")
    call = call._replace(M=max(call.M, call.samples), N=max(call.N, 1), K=max(call.K, 1))
    if backend == "cpu":
        return _cpu(chip, strategy, call)
    kernels, workspace = works(chip, backend, strategy, call)
    all_of_it = total(chip, kernels, workspace)
    if strategy != "panel" or call.noise == "none":
        return all_of_it
    # All slices but the first are drawn on a stream of their own, where processors are idle.
    drawn = [at for at, work in enumerate(kernels) if work.slots and not work.flops]
    draw, multiply = kernels[drawn[0]], kernels[drawn[0] + 1]
    hidden = chip.launch + min(draw.seconds(chip), (1 - multiply.filled) * multiply.seconds(chip))
    return all_of_it._replace(seconds=all_of_it.seconds - (len(drawn) - 1) * hidden)


def plain(chip: Chip, call: Call) -> Cost:
    """The vendor's product alone, without noise and adapter."""
    return cost(chip, "cpu" if chip.architecture == "cpu" else "cuda", "plain", call)


def perturb(chip: Chip, backend: str, call: Call) -> Cost:
    """The strongest unfused rival, see `works`: what the targets call one-pass perturb."""
    return cost(chip, backend, "perturb", call)


# --- CPU: nothing overlaps, the same cores read, multiply and draw ---

# Measured on an AMD EPYC with AVX-512 (docs/performance.md): nanoseconds of a core for each value of the weight.
CPU_NOISE = {"gaussian": 0.5, "rademacher": 0.16, "none": 0.0}
CPU_UNPACK = 0.28  # to widen and pack a 16-bit weight
# Seconds of a slice: fresh memory, and a product that does not write whole rows.
CPU_SLICE = 250e-6


def _cpu(chip: Chip, how: str, call: Call) -> Cost:
    """The backend's own product is taken to be as fast as the vendor's."""
    size, values, samples = call.size, call.N * call.K, call.samples
    if how == "plain":
        call = call._replace(noise="none", rank=0)
    moved, launches, workspace, overhead = values, 1 + 2 * (call.rank > 0), 0, 0.0
    if how in ("panel", "perturb") and call.noise != "none":
        moved += 3 * samples * values  # W + eps: its lines are read, written, and read again
        launches += samples
        workspace = values * size
        if how == "panel":
            with_copies = size + 16 * (call.dtype == "float16")  # see panel.workspace
            found = panel.slices(call.outputs, call.length, with_copies, call.workspace)
            workspace = found[0][1] * call.length * with_copies
            overhead = CPU_SLICE * len(found) * samples
    rate = {2: chip.tensor, 4: chip.single, 8: chip.single / 2}[size] * chip.processors * chip.clock
    per_value = CPU_NOISE[call.noise] + CPU_UNPACK * (size == 2 and call.noise != "none")
    units = {
        "product": call.M * (values + call.rank * (call.N + call.K)) / rate,
        "memory": size * (moved + call.M * (call.N + call.K)) / chip.bandwidth,
        "noise": samples * values * per_value / chip.processors * 1e-9,
        "launch": overhead + chip.launch * launches,
    }
    return Cost(sum(units.values()), workspace, max(units, key=lambda u: units[u]), units)
