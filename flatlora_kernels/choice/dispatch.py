"""The automatic choice: which backend and strategy a call uses, and `explain`, which tells.

Nothing is timed at run time, so that results never depend on load. Sizes are rounded to classes, then the first of
these decides:

1. Measurements, where `python -m bench tune --strategies` has made a table for this kind of device (tables/*.csv) that
   has all candidates.
2. On a GPU the model in cost.py, between all backends and strategies that it knows.
3. PRIORITY, and `fused`; but `transform` for the noise that has it, in tiles that are not small (_TRANSFORM_BITS), and
   on AMD `panel` from _AMD_PANEL_ROWS rows on.

Where nothing is drawn, "fused" is the backend's own product and "plain" the vendor's; only `cpu` has one of its own.
Each direction is then chosen by itself, as nothing has to be drawn twice. Without a table the vendor's is taken, but
not for float16, which torch multiplies up to 100 times slower, nor for several rows of bfloat16 where the processor has
no instructions for it (_SLOW_BFLOAT16). The number of threads counts in one case alone, see `_without_noise`.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .. import backends as registry
from ..backends import cpu
from ..backends.shared import panel
from ..backends.shared.products import has_amx
from ..backends.shared.workspace import workspace_limit
from ..core.noise import tile_bits
from ..core.quantized import QuantizedWeight
from ..core.records import Choice, Weight
from .resolve import BACKEND_AND_STRATEGY, FREE, STRATEGIES, competitors

OWN_PRODUCT = ("cpu",)  # backends with a product without noise that is not the vendor's
DIRECTIONS = ("forward", "input_grad")
BOTH = "both"  # forward and input gradient, taken together
NOISELESS = "none"  # in the tables
_TABLES = Path(__file__).parent / "tables"
# 255 ends the class below _AMD_PANEL_ROWS.
_CLASSES = (1, 4, 16, 64, 255, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
# Another choice than an earlier one must be that much faster: it takes memory, or is less proven.
_MARGIN = 0.97
# By the instructions in docs/internals/kernels.md, the noise of fused kernels takes 4 to 6 times rocBLAS's time there.
_AMD_PANEL_ROWS = 256
# A transform has t/T of the additions of a product: with tiles of 128 and more, work that the product hides.
_TRANSFORM_BITS = 7
# Levels of `cpu` on whose processors torch's bfloat16 product is slow, and the rows from which on, forward and in the
# input gradient: with 64 rows four and a hundred times slower than our own by AVX2, 2.6 times by AVX-512.
_SLOW_BFLOAT16 = {"cpu avx2": (4, 1), "cpu avx512": (4, 4)}
# A packed weight of 2048 x 2048 without noise, one thread: 1.5 ms by slices and 2.6 ms by our own product with 16 rows,
# 9.2 and 87 ms with 1024, and 1.7 and 1.6 ms with 4.
_AMX_ROWS = 16
# Rows up to which `cuda` multiplies codes on sm_90: its product there is that of sm_80, 4.2 of a plain one at 2048 rows
# of rademacher noise where panels take 2.0 (an H200).
_PACKED_ROWS = 64
# Mean rows of an expert up to which a mixture is one launch, whatever is fastest for one expert by itself. Of single
# weights the fused ways are within 16 % of each other up to 256 rows on an H200 (sm90.csv), so that launches and waits
# decide; at 2048 rows panels take 0.6 of triton's time with gaussian noise and 0.9 with rademacher. Not measured on
# mixtures.
_TOGETHER_ROWS = 512


class Problem(NamedTuple):
    """What the choice may depend on."""

    device: torch.device
    dtype: torch.dtype
    noise: str  # or NOISELESS
    noise_accum: str
    M: int  # rows of x that see one sample of the noise
    N: int
    K: int
    direction: str = BOTH
    alone: bool = False  # on one thread of a processor; not asked where noise is drawn


class Candidate(NamedTuple):
    """One way to do it, in the problem's direction."""

    backend: str
    strategy: str
    measured: float | None = None  # time over that of a plain product
    predicted: float | None = None  # seconds, by cost.py


class Decision(NamedTuple):
    backend: str
    strategy: str
    reason: str
    candidates: tuple[Candidate, ...]


class Explanation(NamedTuple):
    """What a call would run, and why; `str` of it is a small table."""

    backend: str
    strategy: str
    noise_accum: str
    reason: str
    workspace: int  # bytes beside inputs and outputs, at most
    candidates: tuple[Candidate, ...] = ()
    problem: Problem | None = None

    def __str__(self) -> str:
        p = self.problem
        if p is None:
            return f"{self.backend}: {self.reason}"
        dtype = str(p.dtype).removeprefix("torch.")
        lines = [
            f"{self.backend}, {self.strategy}, noise_accum {self.noise_accum}: {self.reason}",
            f"  {dtype} on {device_key(p.device) or p.device.type}, {p.noise.replace(NOISELESS, 'no')} noise, sizes"
            f" taken as M = {p.M}, N = {p.N}, K = {p.K}",
            f"  workspace at most {self.workspace / 2**20:.2f} MiB",
        ]
        of = "forward and input gradient" if p.direction == BOTH else p.direction
        for c in self.candidates:
            measured = (
                "not measured" if c.measured is None else f"measured {c.measured:.2f} of a plain product"
            )
            predicted = "no model" if c.predicted is None else f"predicted {1e6 * c.predicted:.0f} us"
            lines.append(f"  {c.backend} {c.strategy}: {measured}, {predicted} ({of})")
        return "\n".join(lines)


def size_class(size: int) -> int:
    """The smallest of a few sizes that is not below `size`: a choice changes with the class only."""
    for largest in _CLASSES:
        if size <= largest:
            return largest
    return 2 * _CLASSES[-1]


def device_key(device: torch.device) -> str | None:
    """What the tables call this kind of device: "cpu avx512bf16", "cpu avx512bf16 amx", "sm90", "gfx942".

    amx: torch's products have instructions that our kernels have not, up to ten times as fast in bfloat16.
    """
    if device.type == "cpu":
        level = cpu.level()
        amx = " amx" if level == "avx512bf16" and has_amx() else ""
        return None if level is None else f"cpu {level}{amx}"
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip is not None:
            return str(properties.gcnArchName).split(":")[0]
        return f"sm{properties.major}{properties.minor}"
    return None


# dtype, noise, direction -> (M, N, K) -> (backend, strategy) -> ratio, of both directions their mean
_Table = dict[tuple[str, str, str], dict[tuple[int, int, int], dict[tuple[str, str], float]]]


@functools.cache
def _table(device: str) -> _Table:
    found: dict[tuple[str, str, tuple[int, int, int], tuple[str, str]], dict[str, float]] = {}
    for path in sorted(_TABLES.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row["device"] == device:
                    size = (int(row["M"]), int(row["N"]), int(row["K"]))
                    key = (row["dtype"], row["noise"], size, (row["backend"], row["strategy"]))
                    found.setdefault(key, {})[row["direction"]] = float(row["ratio"])
    table: _Table = {}
    for (dtype, noise, size, way), ratios in found.items():
        if len(ratios) == len(DIRECTIONS):
            ratios[BOTH] = sum(ratios.values()) / len(ratios)
            for direction, ratio in ratios.items():
                table.setdefault((dtype, noise, direction), {}).setdefault(size, {})[way] = ratio
    return table


def _distance(size: tuple[int, int, int], p: Problem) -> float:
    (M, N, K) = size
    return abs(math.log(M / max(p.M, 1))) + abs(math.log(N * K / max(p.N * p.K, 1)))


def _measured(p: Problem, ways: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """Of the nearest problem on which all of `ways` were measured."""
    key = device_key(p.device)
    if key is None or p.noise_accum == "split":  # the tables are of folded noise
        return {}
    cases = _table(key).get((str(p.dtype).removeprefix("torch."), p.noise, p.direction), {})
    usable = [size for size, times in cases.items() if all(way in times for way in ways)]
    if not usable:
        return {}
    nearest = min(usable, key=lambda size: (_distance(size, p), size))
    return {way: cases[nearest][way] for way in ways}


def _predicted(p: Problem, backend: str, strategy: str) -> float | None:
    from . import cost

    if p.noise == NOISELESS:
        return None
    chip = cost.chip_of(p.device)
    if chip is None or (backend == "cpu") != (chip.architecture == "cpu") or backend not in cost.BACKENDS:
        return None
    dtype = str(p.dtype).removeprefix("torch.")
    calls = [
        cost.Call(direction, p.noise, p.noise_accum, dtype, max(p.M, 1), p.N, p.K) for direction in DIRECTIONS
    ]
    return sum(cost.cost(chip, backend, strategy, call).seconds for call in calls)


@functools.lru_cache(maxsize=4096)
def choose(backends: tuple[str, ...], strategies: tuple[str, ...], p: Problem) -> Decision:
    """The best of `backends`, which can all run here and come with the favourite first, and `strategies`."""
    possible = ways(backends, strategies, p)
    measured = _measured(p, possible) if len(possible) > 1 else {}
    candidates = tuple(Candidate(b, s, measured.get((b, s)), _predicted(p, b, s)) for b, s in possible)
    first = candidates[0]
    reason, times, field = "nothing to choose from", candidates[:1], "predicted"
    if measured:
        reason, times, field = "measured", candidates, "measured"
    elif len(candidates) > 1:
        # On a processor no model decides: the vendor's product is not known well enough.
        if p.device.type != "cpu" and first.predicted is not None:
            reason, times = "predicted", tuple(c for c in candidates if c.predicted is not None)
        elif (
            backends == ("triton",)
            and p.noise != "hadamard"
            and (device_key(p.device) or "").startswith("gfx")
        ):
            reason = f"not measured on this device; panels from {_AMD_PANEL_ROWS} rows on"
            wanted = "panel" if p.M >= _AMD_PANEL_ROWS else "fused"
            times = tuple(c for c in candidates if c.strategy == wanted)
        else:
            reason = f"not measured on this device; {first.backend} {first.strategy} goes first"
    limit = min(getattr(c, field) or 0.0 for c in times)
    best = next(c for c in times if limit >= _MARGIN * (getattr(c, field) or 0.0))
    return Decision(best.backend, best.strategy, reason, candidates)


def ways(backends: Sequence[str], strategies: Sequence[str], p: Problem) -> list[tuple[str, str]]:
    """The pairs of these that can do it; what goes first where nothing is known comes first."""
    if p.noise == NOISELESS:
        return [(b, s) for b in backends for s in _without_noise(b, p)]
    if p.noise == "hadamard":
        first = tile_bits(p.N, p.K) >= _TRANSFORM_BITS
        strategies = sorted(strategies, key=lambda s: (s == "transform") != first)
    else:
        strategies = [s for s in strategies if s != "transform"]
    if p.noise_accum == "split":
        strategies = [s for s in strategies if s != "panel"]
    return [(b, s) for b in backends for s in strategies if s != "fused" or registry.fuses(b, p.noise)]


def _without_noise(backend: str, p: Problem) -> tuple[str, ...]:
    if backend not in OWN_PRODUCT:  # theirs is the vendor's
        return ("fused",)
    # The tables have two threads, of which the vendor's product of one float32 row with the rows of a weight takes one.
    if p.alone and p.M == 1 and p.dtype != torch.float16 and p.direction == DIRECTIONS[0]:
        return ("plain",)
    rows = _SLOW_BFLOAT16.get(device_key(p.device) or "") if p.dtype == torch.bfloat16 else None
    slow = rows is not None and p.M >= rows[DIRECTIONS.index(p.direction)]
    return ("fused", "plain") if slow or p.dtype == torch.float16 else ("plain", "fused")


@functools.lru_cache(maxsize=4096)
def way(
    choice: Choice,
    noise: str | None,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    N: int,
    K: int,
    direction: str = BOTH,
    alone: bool = False,
) -> Decision:
    """What a call runs.

    Args:
        noise: None = nothing is drawn; then `direction` and `alone` count, and of what is asked for "fused" does.
        rows: those that see one sample, > 0 as N and K.
    """
    sizes = size_class(rows), size_class(N), size_class(K)
    p = Problem(device, dtype, noise or NOISELESS, choice.noise_accum, *sizes, direction, alone)
    if noise is None:
        if choice.strategy in ("fused", "plain"):  # the latter by the benchmark, which has no other way to it
            asked = choice.backend, choice.strategy
            return Decision(*asked, "asked for", (Candidate(*asked),))
        # What has no noise to split, see `_measured`.
        return choose((choice.backend,), STRATEGIES, p._replace(noise_accum="folded"))
    names = [choice.backend]
    if choice.strategy == BACKEND_AND_STRATEGY:
        names = competitors(choice.backend, choice.noise_accum, device.type, dtype)
    if choice.strategy in FREE:
        return choose(tuple(names), STRATEGIES, p)
    return choose(tuple(names), (choice.strategy,), p)._replace(reason="asked for")


def grouping(choice: Choice, noise: str | None, device_type: str, dtype: torch.dtype) -> str | None:
    """The backend that has mixtures of experts in one launch, among those that the choice leaves; None: there is none.

    Args:
        noise: None = nothing is drawn.
    """
    return _grouping(*choice, noise, device_type, dtype)


def _grouping(
    strategy: str, noise_accum: str, backend: str, noise: str | None, device_type: str, dtype: torch.dtype
) -> str | None:
    names = [backend]
    if strategy == BACKEND_AND_STRATEGY:
        names = competitors(backend, noise_accum, device_type, dtype)
    able = (n for n in names if registry.groups(n) and (noise is None or registry.fuses(n, noise)))
    return next(able, None)


_grouping._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see resolve.py


@functools.lru_cache(maxsize=4096)
def together(
    choice: Choice, noise: str | None, rows: int, device: torch.device, dtype: torch.dtype, N: int, K: int
) -> str | None:
    """The backend that computes a mixture in one launch; None: its experts are computed one after the other.

    Args:
        noise: None = nothing is drawn. rows: of an expert, in the mean, > 0 as N and K.
    """
    if choice.strategy not in (*FREE, "fused"):
        return None
    name = grouping(choice, noise, device.type, dtype)
    if name is None or choice.strategy == "fused" or rows <= _TOGETHER_ROWS:
        return name
    found = None if noise is None else way(choice, noise, rows, device, dtype, N, K)
    return name if found is not None and (found.backend, found.strategy) == (name, "fused") else None


def of_packed(choice: Choice, backend: str, strategy: str, weight: QuantizedWeight, rows: int) -> str:
    """`strategy`, or "panel" where `backend` has none of this name for a weight packed like this, or a slow one.

    Raises:
        NotImplementedError: that was asked for, or split noise, which panels cannot have.
    """
    free = choice.strategy in FREE and choice.noise_accum != "split"
    slow = free and backend == "cuda" and rows > _PACKED_ROWS and device_key(weight.device) == "sm90"
    if strategy != "fused" or (registry.fuses_packed(backend, weight) and not slow):
        return strategy
    if choice.strategy != "fused" and choice.noise_accum != "split":
        return "panel"
    asked = "strategy='fused'" if choice.strategy == "fused" else "noise_accum='split'"
    raise NotImplementedError(
        f"backend {backend!r} does not implement {asked} for this weight of format {weight.format!r};"
        " strategy='panel' takes any"
    )


def of_packed_without_noise(backend: str, device: torch.device, dtype: torch.dtype, rows: int) -> str:
    """Slices for the vendor's product are slower than a product of our own from 64 rows on, by 5 to 25 % on one thread
    with AVX-512; with fewer rows it is one or the other, within 30 %. Where the vendor has AMX they are up to ten times
    as fast (_AMX_ROWS)."""
    amx = dtype == torch.bfloat16 and rows >= _AMX_ROWS and (device_key(device) or "").endswith("amx")
    return "fused" if backend in OWN_PRODUCT and not amx else "plain"


def on_one_thread(device: torch.device) -> bool:
    return device.type == "cpu" and torch.get_num_threads() == 1


def explain(
    choice: Choice, noise: str | None, rows: int, device: torch.device, weight: Weight
) -> Explanation:
    """Of a call; noise: None = nothing is drawn. rows: those that see one sample, or all where nothing is drawn."""
    backend, noise_accum = choice.backend, choice.noise_accum
    N, K = weight.shape
    if 0 in (rows, N, K):
        return Explanation(backend, "fused", noise_accum, "nothing is drawn: products without noise", 0)
    sizes = size_class(rows), size_class(N), size_class(K)
    if noise is None:
        of = choice, None, rows, device, weight.dtype, N, K
        found, back = (way(*of, direction, on_one_thread(device)) for direction in DIRECTIONS)
        if isinstance(weight, QuantizedWeight):
            own = of_packed_without_noise(found.backend, device, weight.dtype, rows)
            found, back = found._replace(strategy=own), back._replace(strategy=own)
        reason = f"nothing is drawn: forward {found.strategy}, input gradient {back.strategy}; {found.reason}"
        problem = Problem(device, weight.dtype, NOISELESS, noise_accum, *sizes, DIRECTIONS[0])
        return Explanation(backend, found.strategy, noise_accum, reason, 0, found.candidates, problem)
    found = way(choice, noise, rows, device, weight.dtype, N, K)
    if isinstance(weight, QuantizedWeight):
        strategy = of_packed(choice, found.backend, found.strategy, weight, rows)
        if strategy != found.strategy:
            slow = registry.fuses_packed(found.backend, weight)
            reason = f"{found.backend} does not decode format {weight.format!r} inside its product"
            reason = f"slices are faster than codes in {found.backend}'s product" if slow else reason
            found = found._replace(strategy=strategy, reason=reason)
    problem = Problem(device, weight.dtype, noise, noise_accum, *sizes)
    workspace = workspace_limit(weight)
    if found.strategy == "panel":
        workspace = max(panel.workspace(weight, device.type, input_grad)[1] for input_grad in (False, True))
    elif found.backend == "reference":
        workspace = weight.numel() * max(weight.element_size(), 4)
    return Explanation(
        found.backend, found.strategy, noise_accum, found.reason, workspace, found.candidates, problem
    )


def forget() -> None:
    """What was decided and read from tables: for those who change them."""
    for cached in (_table, choose, way, together):
        cached.cache_clear()
