"""What a call takes, from counts, data sheets and an H100: the choice where nothing was measured, and `bench roofline`.

Every kernel is a `Work`: how much it asks of each unit of the chip, whose time is that amount over its rate. How units
combine, and what else is assumed and not counted:

* A multiprocessor takes whole tiles; beginning and end of a tile take as long as `START` steps of it.
* Every unit of a multiprocessor reaches `REACHED` of its rate and memory `MEMORY_REACHED`, ours and the vendor's alike.
* A call takes `CALL`, each of its kernels the chip's `launch`, and `RAMP` more if it multiplies or draws.
* In the vendor's products units work side by side: the busiest is all the time there is.
* In `cuda` on sm_90 the producers' latency binds, no unit: a step takes what was measured, `Tile.cycles`.
* In `triton`, and in `cuda` elsewhere, the same warps draw and multiply: in turn where a processor has one tile,
  halfway (`OVERLAP`) to side by side where it has several. Stalls make that `STALL` times as long.
* A pass that perturbs waits for memory in the warps that draw: half of the drawing is hidden, too.
* What the kernel before has read or written comes from L2, as much as half of it holds.
* float32 on a GPU: the vendor's product, and noise that is drawn anew for every 64 rows.
* The transform of hadamard noise is a kernel of its own: one block to each row of x and each row of tiles.

The constants of an H100 are in counts.py. They put its measured times within about 15 %
(docs/internals/performance.md has all of them and says which are not). On other GPUs nothing was measured: what is
about kernels is carried over to them, rates come from data sheets. A measurement overrules: see dispatch.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ..backends.shared import panel
from ..backends.shared.workspace import DEFAULT as WORKSPACE
from ..core.noise import tile_bits
from ..triton_kernels import configs
from .chips import CHIPS as CHIPS
from .chips import Chip as Chip
from .chips import chip_of as chip_of
from .counts import (
    BY,
    CALL,
    CONSUMERS,
    CPU_NOISE,
    CPU_SLICE,
    CPU_TRANSFORM,
    CPU_UNPACK,
    CUDA,
    CUDA_TILES,
    DECODE,
    DRAWN,
    HADAMARD_PERTURB,
    MAKES_U,
    MEMORY_REACHED,
    MMA,
    NEAR_GAUSSIAN_PERTURB,
    NEAR_GAUSSIAN_PRODUCT,
    OVERLAP,
    OWNER_DECODE,
    PERTURB,
    RAMP,
    REACHED,
    SM90_TILES,
    STALL,
    START,
    TRANSFORM_LATENCY,
    TRANSFORM_REST,
    TRANSFORM_SHARED,
    TRANSFORM_STAGE,
    TRITON,
    VENDOR,
    VENDOR_SINGLE,
    Counts,
    Tile,
)

BACKENDS = ("triton", "cuda", "cpu")
WAYS = ("fused", "panel", "transform", "perturb", "plain")


class Call(NamedTuple):
    """M counts the rows of all samples."""

    direction: str  # "forward" or "input_grad"
    noise: str  # a kind, or "none"
    noise_accum: str  # "folded" or "split"
    dtype: str
    M: int
    N: int
    K: int
    rank: int = 0
    samples: int = 1
    code: float = 0.0  # bytes of a value of a packed weight, its share of scales included; 0 = not packed

    @property
    def stored(self) -> float:
        """Bytes of a value of the weight in memory."""
        return self.code or float(self.size)

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
        """Bytes, as `workspace.workspace_limit`."""
        return min(WORKSPACE, self.N * self.K * self.size // 4)

    def choose(self, counts: Counts, backend: str = "cuda") -> float:
        decode = DECODE[backend] if self.code else 0.0
        if self.noise == "near_gaussian":
            return NEAR_GAUSSIAN_PRODUCT + decode
        return counts[2 * (self.direction == "input_grad") + (self.noise == "rademacher")] + decode


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
    drawing: float = 0.0  # cycles of a processor, were nothing else done
    shared: float = 0.0  # bytes
    l2: float = 0.0  # bytes
    memory: float = 0.0  # bytes
    steps: float = 0.0  # cycles of all steps, where their latency was measured
    filled: float = 1.0  # share of its time that the average processor is at it
    overlap: float = 1.0  # 0: product and noise in turn
    stall: float = 1.0  # and how much longer that takes
    latency: float = 0.0  # seconds, of what neither multiplies nor draws

    def units(self, chip: Chip) -> dict[str, float]:
        """Seconds."""
        cycles = {
            "tensor": self.flops / 2 / self.rate,
            "issue": self.slots / chip.issue,
            "draw": self.drawing,
            "shared": self.shared / chip.shared,
            "l2": self.l2 / chip.l2,
            "step": self.steps,
        }
        rate = chip.processors * chip.clock * self.filled * REACHED
        units = {unit: c / rate for unit, c in cycles.items()}
        return units | {"memory": self.memory / chip.bandwidth / MEMORY_REACHED}

    def launch(self, chip: Chip) -> float:
        """Seconds until it runs at its rate, and of its end."""
        return chip.launch + RAMP * (self.flops > 0 or self.drawing > 0) + self.latency

    def seconds(self, chip: Chip) -> float:
        """Without its launch."""
        u = self.units(chip)
        best = max(u.values())
        if self.overlap == 1:
            return best
        one = max(u["tensor"], u["shared"]) if self.flops else u["memory"]
        other = max(u["issue"], u["draw"])
        return max(best, self.stall * (max(one, other) + (1 - self.overlap) * min(one, other)))


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
    tiles = call.samples * _ceil(call.rows, tile.m * tile.high) * tile.high * _ceil(call.outputs, tile.n)
    vendor, grid = not instructions, tiles * parts
    adapter = 0 if vendor else tiles * _ceil(call.rank, tile.k)  # steps of it; the first part has them
    products = 2 if call.noise_accum == "split" else 1  # by eps, then by W
    of_noise, of_product = grid * steps + adapter, grid * steps * products + adapter
    macs = of_product * tile.m * tile.n * tile.k
    values = 0.0 if vendor else grid * steps * tile.n * tile.k / tile.high * drawn
    around = float(of_product * tile.consumers)
    if tile.by == "mma":  # of ours, `instructions` have those of one product
        around = macs / MMA * (1 if vendor else 1 - 1 / products)
    # Tensor cores of sm_100 read the half of the second operand that the other block has.
    n = tile.n // 2 if vendor and tile.by == "tcgen05" else tile.n
    filled = grid / (max(_ceil(grid, chip.processors), tile.at_a_time) * chip.processors)
    weight = call.samples * call.N * call.K * (2.0 if vendor else call.stored)
    moved = weight + 2.0 * call.M * (call.length + call.outputs + call.rank * (not vendor))
    # What the copy engine writes does not hold up the vendor's products.
    staged = 0.0 if vendor else tile.m + n * (tile.passes + products - 1)
    start = START * 64 / tile.k / tile.at_a_time
    sums = 4.0 * (parts > 1) * parts * call.M * call.outputs * (1 + vendor)  # ours are read by another kernel
    return Work(
        flops=2.0 * macs,
        rate=chip.mma if tile.by == "mma" else chip.tensor,
        slots=values * instructions / 32 + around,
        drawing=values and values / DRAWN[call.noise],
        shared=2.0 * tile.k * (of_product * _operands(tile, n) + of_noise * staged),
        l2=2.0 * tile.k * of_noise * (tile.m + tile.n / tile.high) + sums,
        memory=moved,
        steps=float(of_noise * _cycles(tile, call)),
        filled=filled * steps / (steps + start),
    )  # fmt: skip


def _cycles(tile: Tile, call: Call) -> float:
    """Of a step, where they were measured; near_gaussian by its instructions, on the line through the other two."""
    gaussian, rademacher = tile.cycles
    if call.noise != "near_gaussian" or not gaussian:
        return rademacher if call.noise == "rademacher" else gaussian
    counts = CUDA["sm90a"][SM90_TILES.index(tile)]
    many, few = (call._replace(noise=noise).choose(counts) for noise in ("gaussian", "rademacher"))
    return rademacher + (gaussian - rademacher) * (call.choose(counts) - few) / (many - few)


def _parts(call: Call, most: int) -> list[int]:
    """Into how many a contraction may be cut."""
    return [p for p in (1, 2, 3, 4, 6, 8, 12, 16) if p <= max(1, min(most, _ceil(call.length, 64) // 4))]


def _best(
    chip: Chip, tiles: Sequence[Tile], call: Call, most: int, instructions: Sequence[float]
) -> tuple[int, int]:
    """Which of the tiles, and in how many parts up to `most`, takes least time; `instructions`: of each tile."""
    found = [(t, p) for t in range(len(tiles)) for p in _parts(call, most)]
    return min(found, key=lambda f: _tiled(chip, tiles[f[0]], call, f[1], instructions[f[0]]).seconds(chip))


@functools.lru_cache(maxsize=4096)
def product(
    chip: Chip, M: int, outputs: int, length: int, size: int, held: int = 0, onto: bool = False
) -> Work:
    """The vendor's (M, length) x (length, outputs), by the tile that suits best.

    Args:
        size: bytes of an element. held: bytes of the operands that L2 holds. onto: is added to what the result holds.
    """
    by = BY[chip.architecture]
    call = Call("forward", "none", "folded", "bfloat16", M, outputs, length)
    scale = size / 2

    def work_of(tile: Tile, parts: int) -> Work:
        work = _tiled(chip, tile, call, parts)
        work = work._replace(shared=scale * work.shared, l2=scale * work.l2, memory=scale * work.memory)
        return work if size == 2 else work._replace(rate=chip.single, slots=work.flops / 64)

    tiles = []
    for m, n in VENDOR if size == 2 else VENDOR_SINGLE:
        tile = Tile(m, n, warps=8 if m * n > 8192 else 4, by=by, consumers=CONSUMERS)
        # From sm_90 on two blocks share the tile of the second operand.
        tiles.append(tile._replace(high=2 if by != "mma" and M > m else 1))
    works = [work_of(tile, parts) for tile in tiles for parts in _parts(call, 16)]
    work = min(works, key=lambda work: work.seconds(chip))
    return work._replace(memory=work.memory + size * onto * M * outputs - held)


def perturb_pass(chip: Chip, backend: str, call: Call, values: int, to_memory: bool = True) -> Work:
    """W + eps in one pass, to memory or to what L2 holds."""
    size, read = call.size * values, call.stored * values
    gaussian, rademacher = PERTURB[backend][chip.architecture]
    instructions = {
        "gaussian": gaussian, "rademacher": rademacher, "near_gaussian": NEAR_GAUSSIAN_PERTURB,
        "hadamard": HADAMARD_PERTURB,
    }  # fmt: skip
    return Work(
        slots=values * (instructions[call.noise] + DECODE[backend] * (call.code > 0)) / 32,
        drawing=values / DRAWN[call.noise],
        l2=read + size,
        memory=float(read + to_memory * (size - resident(chip, size))),
        overlap=OVERLAP,
    )


def transform_pass(chip: Chip, call: Call) -> Work:
    """``y += x eps^T`` of hadamard noise: x is read and transformed once for every row of tiles, y read and written."""
    T = 1 << tile_bits(call.N, call.K)
    stages, rows_of_tiles = T.bit_length() - 1, _ceil(call.outputs, T)
    values = call.M * rows_of_tiles * _ceil(call.length, T) * T
    adds = (
        TRANSFORM_STAGE * stages * 128 / chip.single
    )  # half of the warps wait where an add takes two cycles
    blocks = call.M * rows_of_tiles
    x, y = call.size * call.M * call.length, call.size * call.M * call.outputs
    y_held = resident(chip, y)
    return Work(
        slots=values * (adds + TRANSFORM_REST) / 32,
        shared=values * TRANSFORM_SHARED,
        l2=float(rows_of_tiles * x + 2 * y),
        memory=float(x + 2 * y - y_held),
        filled=blocks / (_ceil(blocks, chip.processors) * chip.processors),
        latency=TRANSFORM_LATENCY,
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
        slots = work.slots + noise.slots
        return work._replace(slots=slots, drawing=noise.drawing, overlap=OVERLAP, stall=STALL), 1
    if backend == "triton":
        config, tiles = configs.linear(
            arch, "half", call.direction, call.samples, call.rows, call.outputs, chip.processors,
            apart=call.noise_accum == "split",
        )  # fmt: skip
        parts, steps = configs.splits(config, tiles, call.length, part, call.workspace, chip.processors)
        m, by = config.block_m, "mma" if config.block_m < 64 else BY[arch]
        tile = Tile(m, config.block_out, config.block_in, config.num_warps, by, config.per_processor)
        count = call.choose(TRITON[arch][m <= 16], backend)
        work = _tiled(chip, tile, call, parts, count, drawn=(steps + config.carry) / steps)
        if makes_u(backend, call):  # in every block
            macs = work.flops / 2 / tile.n * call.rank
            more = {"flops": 2 * macs, "slots": work.flops / 2 / m * MAKES_U / 32, "l2": 2 * macs / m}
            more["shared"] = 2 * more["l2"]
            work = work._replace(**{unit: getattr(work, unit) + amount for unit, amount in more.items()})
        return work._replace(overlap=_overlap(tile), stall=STALL), parts
    small = call.noise_accum == "split"  # has the small tiles alone
    if (
        arch == "sm90" and call.rows > 64 and not small and not call.code
    ):  # linear_sm90.h takes no packed weight
        best, parts = _sm90_choice(chip, call)
        return _tiled(chip, SM90_TILES[best], call, parts, call.choose(CUDA["sm90a"][best])), parts
    rows = slice(3, 4) if call.rows <= 16 else slice(2, 3) if call.rows <= 64 or small else slice(2)
    table, tiles = CUDA["sm100" if arch == "sm100" else "sm80"][rows], CUDA_TILES[rows]
    # The choice does not depend on the noise.
    gaussian = call._replace(noise="gaussian")
    best, parts = _best(chip, tiles, gaussian, call.workspace // part, [gaussian.choose(c) for c in table])
    work = _tiled(chip, tiles[best], call, parts, call.choose(table[best]))
    return work._replace(overlap=_overlap(tiles[best]), stall=STALL), parts


def _overlap(tile: Tile) -> float:
    return OVERLAP if tile.at_a_time > 1 else 0.0


def _sm90_choice(chip: Chip, call: Call) -> tuple[int, int]:
    """The tile and the parts that csrc/cuda/linear_sm90.cu takes."""
    steps, values = _ceil(call.length, 64), call.M * call.outputs

    def cycles(choice: tuple[int, int]) -> float:
        at, parts = choice
        tile = SM90_TILES[at]
        tiles = call.samples * _ceil(call.rows, tile.m * tile.high) * _ceil(call.outputs, tile.n)
        turns = _ceil(tiles * parts, chip.processors // tile.high)
        sums = parts * values * 16 / 25 / chip.processors if parts > 1 else 0.0
        return turns * (_ceil(steps, parts) + 4) * tile.cycles[0] + sums

    most = max(1, min(call.workspace // (4 * values), steps // 8))
    return min(itertools.product(range(len(SM90_TILES)), range(1, most + 1)), key=cycles)


# --- Calls ---


def resident(chip: Chip, size: int) -> int:
    """Of `size` bytes that were just used, those that L2 still holds."""
    return min(size, chip.l2_bytes // 2)


def total(chip: Chip, works: list[Work], workspace: int = 0) -> Cost:
    """Of kernels that follow each other."""
    units = {"launch": CALL + sum(work.launch(chip) for work in works)}
    for work in works:
        for unit, seconds in work.units(chip).items():
            units[unit] = units.get(unit, 0.0) + seconds
    seconds = units["launch"] + sum(work.seconds(chip) for work in works)
    return Cost(seconds, workspace, max(units, key=lambda u: units[u]), units)


def works(chip: Chip, backend: str, how: str, call: Call) -> tuple[list[Work], int]:
    """The kernels of a call on a GPU in the order of their launches, and the bytes of workspace.

    Args:
        how: a strategy, "perturb" (W + eps to memory in one pass, the vendor's product, the adapter's two, the last out
            of place, as the benchmark has it) or "plain" (the vendor's product alone).
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
        # torch.addmm copies what it adds to.
        copy = Work(l2=2.0 * M * outputs * size, memory=float(2 * M * outputs * size - 2 * y_held))
        return [*call.samples * [draw, multiply], *down, *[copy] * bool(up), *onto], weight
    if how == "panel":
        found = panel.slices(outputs, length, size, call.workspace)
        count, width = len(found) * call.samples, found[0][1]
        held = width * length * size + (a_held + bool(up) * y_held * width // outputs) // call.samples
        multiply = product(chip, call.rows, width, length, size, held, call.rank > 0)
        draw = perturb_pass(chip, backend, call, width * length, to_memory=False)
        # "split": by eps, and by W.
        products = [multiply] * (2 if call.noise_accum == "split" else 1)
        return [*down, *up, *count * [draw, *products]], width * length * size
    if how == "transform":
        return [*down, product(chip, M, outputs, length, size), *onto, transform_pass(chip, call)], 0
    work, parts = _fused(chip, backend, call)
    down = [] if makes_u(backend, call) else down
    work = work._replace(memory=work.memory - (a_held if down else 0))
    values = M * outputs
    sums = Work(slots=values * (parts + 4) / 32, l2=4.0 * values * parts, memory=float(values * size))
    return [*down, work, *[sums] * (parts > 1)], 4 * parts * values * (parts > 1)


def cost(chip: Chip, backend: str, strategy: str, call: Call) -> Cost:
    """What `call` should take.

    Args:
        backend: "triton" or "cuda" on a GPU, "cpu" on a CPU. strategy: "fused", "panel" or "transform"; see also
            `works`.
    """
    if backend not in BACKENDS or (backend == "cpu") != (chip.architecture == "cpu"):
        raise ValueError(f"backend: there is no model of {backend!r} on {chip.name}")
    if strategy not in WAYS:
        raise ValueError(f"strategy: expected one of {', '.join(WAYS)}, got {strategy!r}")
    if (strategy == "transform" and call.noise not in ("hadamard", "none")) or (
        strategy == "fused" and call.noise == "hadamard" and backend != "cpu"
    ):
        raise ValueError(f"strategy: backend {backend!r} has no {strategy!r} for {call.noise} noise")
    call = call._replace(M=max(call.M, call.samples), N=max(call.N, 1), K=max(call.K, 1))
    if backend == "cpu":
        return _cpu(chip, strategy, call)
    kernels, workspace = works(chip, backend, strategy, call)
    return total(chip, kernels, workspace)


def dequantize_pass(chip: Chip, call: Call) -> Work:
    """What the owner of a packed weight does before its product: all values to memory."""
    values, size = call.N * call.K, call.size * call.N * call.K
    return Work(
        slots=values * OWNER_DECODE / 32,
        l2=call.stored * values + size,
        memory=call.stored * values + size - resident(chip, size),
    )


def plain(chip: Chip, call: Call) -> Cost:
    """The vendor's product alone, without noise and adapter."""
    return cost(chip, "cpu" if chip.architecture == "cpu" else "cuda", "plain", call)


def perturb(chip: Chip, backend: str, call: Call) -> Cost:
    """The strongest unfused rival, see `works`: what the targets call one-pass perturb."""
    return cost(chip, backend, "perturb", call)


# --- CPU: nothing overlaps, the same cores read, multiply and draw ---


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
    drawn = samples * values * per_value
    if how == "transform" and call.noise != "none":
        T = 1 << tile_bits(call.N, call.K)
        tiles = _ceil(call.N, T) * _ceil(call.K, T)
        drawn = CPU_TRANSFORM * call.M * tiles * T * (T.bit_length() - 1)
        launches += 1
    units = {
        "product": call.M * (values + call.rank * (call.N + call.K)) / rate,
        "memory": size * (moved + call.M * (call.N + call.K)) / chip.bandwidth,
        "noise": drawn / chip.processors * 1e-9,
        "launch": overhead + chip.launch * launches,
    }
    return Cost(sum(units.values()), workspace, max(units, key=lambda u: units[u]), units)
