"""What the fuzzer asks for: case `number` of a `seed`, the same on every machine."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import torch
from compare import Problem
from torch import Tensor

from flatlora_kernels.core.noise import KINDS

from . import memory

DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
EDGES = sorted({max(0, e + d) for e in (1, 8, 16, 32, 64, 128, 256) for d in (-1, 0, 1)})
RANKS = (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 256, 300)
LARGEST = 2**17
UINT32 = 2**32
SPECIAL = (math.nan, math.inf, -math.inf)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much work a case may be, in elements and in multiplications."""

    elements: int = 2**19
    products: int = 2**23
    rank: int = 300


# A tile takes tens of milliseconds in Triton's interpreter and in the emulator of CUDA.
LIMITS = {"triton": Limits(2**13, 2**18, 65), "cuda": Limits(2**13, 2**18, 65)}


@dataclasses.dataclass
class Case:
    seed: int
    number: int
    dtype: str
    dims: tuple[int, int, int]  # M, N, K
    leading: tuple[int, ...]  # of x, M elements
    rank: int | None
    layouts: dict[str, tuple[str, int, int, str]]  # tensor: layout, axis, offset, place
    float32: tuple[str, ...]  # tensors in float32 beside a 16-bit x
    factors: dict[str, float]  # tensor: what its values are multiplied by
    special: tuple[tuple[str, float, int], ...]  # tensor, value, where
    noise: str
    strength: str  # "none", "noise_scale", "float" or the type of a tensor sigma
    sigma: float
    draw: dict[str, Any]
    seed_is_tensor: bool
    scaling: float
    strategy: str | None
    noise_accum: str | None
    workspace: str | None
    threads: tuple[int, int]

    def __str__(self) -> str:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return "\n".join(f"    {name} = {value!r}" for name, value in fields.items())


def _size(r: random.Random) -> int:
    kind = r.random()
    if kind < 0.03:
        return 0
    if kind < 0.4:
        return r.choice(EDGES)
    return min(LARGEST, int(2 ** r.uniform(0, math.log2(LARGEST) + 0.01)))


def _layout(r: random.Random, dims: int) -> tuple[str, int, int, str]:
    layout = r.choices(memory.LAYOUTS, (8, 4, 3, 3, 2, 1))[0]
    return layout, r.randrange(dims), r.choice((0, 0, 1, 3, 8)), r.choices(memory.PLACES, (2, 2, 1))[0]


def _uint32(r: random.Random, room: int, multiple: int = 1) -> int:
    """An offset with `room` after it."""
    most = min(UINT32 - room, UINT32 - 1) // multiple
    return multiple * r.choice((0, 0, 1, r.randint(0, most), r.randint(0, min(most, 4096)), most))


def make(seed: int, number: int, backend: str) -> Case:
    """Case `number` of `seed`, of a size that `backend` can do."""
    r = random.Random(f"{seed}/{number}")
    limits = LIMITS.get(backend, Limits())
    dtype = r.choice(
        [name for name in DTYPES if backend == "cpu" or backend == "reference" or name != "float64"]
    )
    most = (
        limits.products // 4 if dtype in ("float16", "float64") else limits.products
    )  # slow in torch, in NumPy
    while True:
        M, N, K = (_size(r) for _ in range(3))
        if M * N * K <= most and max(M * N, N * K, M * K) <= limits.elements:
            break
    rank = None if r.random() < 0.35 else min(r.choice(RANKS), limits.rank)
    if rank is not None and rank * max(M * N, N * K, M * K) > most:
        rank = max(1, most // max(M * N, N * K, M * K))
    leading: tuple[int, ...] = (M,)
    if r.random() < 0.3:
        first = r.choice([d for d in range(1, 9) if M % d == 0])
        leading = (first, M // first) if r.random() < 0.7 else (1, first, M // first)
    names = ["x", "weight", "grad_y", "noise_scale", "out"]
    names += ["lora_A", "lora_B"] if rank is not None else []
    names += ["lora_x"] if rank is not None and r.random() < 0.25 else []
    names += ["bias"] if r.random() < 0.5 else []
    deep = {
        "x": len(leading) + 1,
        "lora_x": len(leading) + 1,
        "grad_y": len(leading) + 1,
        "bias": 1,
        "noise_scale": 1,
    }
    layouts = {name: _layout(r, deep.get(name, 2)) for name in names}
    if layouts["out"][0] == "expanded":
        layouts["out"] = ("contiguous", *layouts["out"][1:])
    float32 = []
    if dtype in ("bfloat16", "float16"):
        float32 = [name for name in ("lora_A", "lora_B", "bias") if name in names and r.random() < 0.4]
    reach = 2 if dtype == "float16" else 6
    factors = {name: 10 ** r.uniform(-reach, reach) for name in names if r.random() < 0.15}
    if dtype != "float16":
        factors |= {name: 10.0 ** r.choice((-25, -18, 18, 25, 35)) for name in names if r.random() < 0.02}
    factors |= {name: 0.0 for name in names if r.random() < 0.02}
    special = []
    if r.random() < 0.3:
        for name in r.choices([n for n in names if n != "out"], k=r.randint(1, 3)):
            special += [(name, r.choice(SPECIAL), r.getrandbits(30)) for _ in range(r.randint(1, 2))]
    samples = r.choice([s for s in range(1, 9) if M % s == 0]) if r.random() < 0.3 else 1
    draw = {
        "stream": r.choice((0, 1, UINT32 - 1, r.randrange(UINT32))),
        "seed": r.choice((0, 1, -1, 2**63, 2**64 - 1, r.getrandbits(64), -r.getrandbits(70))),
        "samples": samples,
        "sample_offset": _uint32(r, samples),
        "antithetic": r.random() < 0.3,
        "row_offset": _uint32(r, N),
        "col_offset": _uint32(r, K, 8),
    }
    noise = r.choice(KINDS)
    strategies = (None, None, "fused", "fused", "panel", *["transform"] * 2 * (noise == "hadamard"))
    strategy, noise_accum = r.choice(strategies), r.choice((None, "folded", "split"))
    if noise == "hadamard" and r.random() < 0.7:
        ends = (draw["row_offset"] + N, draw["col_offset"] + K)
        draw["layer_shape"] = tuple(
            max(1, end, min(UINT32, end + r.choice((0, 1, 50, UINT32)))) for end in ends
        )
    if strategy == "panel" and noise_accum == "split":
        noise_accum = None
    return Case(
        seed, number, dtype, (M, N, K), leading, rank, layouts, tuple(float32), factors, tuple(special),
        noise=noise,
        strength=r.choices(
            ("none", "noise_scale", "float", "float32", "float64", "bfloat16"), (1, 6, 2, 0.5, 0.5, 0.5)
        )[0],
        sigma=r.choice((0.05, 0.05, 0.5, 1e-4, 1e-30, 1e4, 0.0)),
        draw=draw,
        seed_is_tensor=r.random() < 0.5,
        scaling=r.choice((1.0, 0.75, -0.5, 2, 0.0, 1e-3, 1e3)),
        strategy=strategy,
        noise_accum=noise_accum,
        workspace=r.choice((None, None, None, "0", "4096", str(10**7))),
        threads=tuple(r.sample((1, 2, 3, 4), 2)),  # type: ignore[arg-type]
    )  # fmt: skip


@dataclasses.dataclass
class Built:
    """The tensors of a case. `options` has a noise_scale wherever noise is drawn."""

    problem: Problem
    out: Tensor
    sigma: float | Tensor | None  # in place of noise_scale
    memory: dict[str, Tensor]  # everything around each tensor


def build(case: Case) -> Built:
    M, N, K = case.dims
    dtype = DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(
        random.Random(f"values {case.seed}/{case.number}").getrandbits(60)
    )
    root = 1 / math.sqrt(max(K, 1))
    rank = case.rank or 0
    shapes = {
        "x": ((*case.leading, K), 1.0), "weight": ((N, K), root), "lora_A": ((rank, K), root),
        "lora_B": ((N, rank), 1.0), "bias": ((N,), 1.0), "lora_x": ((*case.leading, K), 1.0),
        "grad_y": ((*case.leading, N), 1.0), "noise_scale": ((N,), 0.2 * root), "out": ((N, K), 1.0),
    }  # fmt: skip
    around: dict[str, Tensor] = {}
    made: dict[str, Tensor | None] = dict.fromkeys(shapes)
    for name, layout in case.layouts.items():
        shape, scale = shapes[name]
        if name == "noise_scale":
            values = 0.5 + torch.rand(shape, generator=generator)
        else:
            values = torch.randn(shape, generator=generator)
        values = values.double() * scale * case.factors.get(name, 1.0)
        for which, value, where in case.special:
            if which == name and values.numel():
                # noise_scale is >= 0
                values.view(-1)[where % values.numel()] = abs(value) if name == "noise_scale" else value
        kind = torch.float32 if name == "noise_scale" or name in case.float32 else dtype
        limit = torch.finfo(kind).max
        values = torch.where(values.isfinite(), values.clamp(-limit, limit), values)
        made[name], around[name] = memory.place(values.to(kind), *layout)
    out, noise_scale = made.pop("out"), made.pop("noise_scale")
    options: dict[str, Any] = {
        "scaling": case.scaling,
        "strategy": case.strategy,
        "noise_accum": case.noise_accum,
    }
    sigma: float | Tensor | None = None
    if case.strength != "none":
        options |= {**case.draw, "noise": case.noise, "noise_scale": noise_scale}
        if case.seed_is_tensor:
            seed = (case.draw["seed"] + 2**63) % 2**64 - 2**63
            options["seed"], around["seed"] = memory.place(
                torch.tensor([seed]), "contiguous", 0, 1, "ends at a guard page"
            )
            options["seed"] = options["seed"][0]
        if case.strength == "float":
            sigma = case.sigma
        elif case.strength != "noise_scale":
            sigma = torch.tensor(case.sigma, dtype=getattr(torch, case.strength))
    return Built(Problem(**made, options=options), out, sigma, around)  # type: ignore[arg-type]
