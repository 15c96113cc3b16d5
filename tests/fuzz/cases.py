"""What the fuzzer asks for: case `number` of a `seed`, the same on every machine."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import torch
from compare import Problem
from packed_weights import LAYOUTS, packed
from torch import Tensor

from flatlora_kernels.core.noise import KINDS
from flatlora_kernels.core.quantized import Parts, QuantizedWeight

from . import memory

DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
EDGES = sorted({max(0, e + d) for e in (1, 8, 16, 32, 64, 128, 256) for d in (-1, 0, 1)})
RANKS = (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 200, 256, 300)
LARGEST = 2**17
PACKED_SHARE = 0.25
UINT32 = 2**32
NEVER_EMPTY = ("gptq", "hqq2", "hqq3", "hqq4", "nvfp4_swizzled")  # what is not flat
SPECIAL = (math.nan, math.inf, -math.inf)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much work a case may be, in elements and in multiplications."""

    elements: int = 2**19
    products: int = 2**23
    rank: int = 300


# A tile takes tens of milliseconds in Triton's interpreter and in the emulator of CUDA.
LIMITS = {"triton": Limits(2**13, 2**18, 65), "cuda": Limits(2**13, 2**18, 65)}


@dataclasses.dataclass(frozen=True)
class PackedPlan:
    """How the weight of a case is packed."""

    layout: str  # of packed_weights.LAYOUTS
    own: str  # type of its owner's dequantisation
    scales: str | None  # type of scales and zeros that would be float32
    before: tuple[int, int]  # rows and columns of what was packed, before the view that is the weight
    after: tuple[int, int]
    places: dict[str, tuple[int, str]]  # tensor of `Parts`: offset, place


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
    packed: PackedPlan | None = None

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


def _packed_plan(r: random.Random, N: int, K: int) -> PackedPlan:
    layout = r.choice(list(LAYOUTS))
    before, after = [0, 0], [0, 0]
    if r.random() < 0.4:
        for around in (before, after):
            for dim in (0, 1):
                around[dim] = r.choice((0, 0, 1, 3, 5, 8, 16, 32, 64, 128, r.randrange(200)))
    if (N + before[0] + after[0]) * (K + before[1] + after[1]) > 2 * N * K + 2**16:
        before, after = [0, 0], [0, 0]
    if layout in NEVER_EMPTY:
        after = [a or int(size + b == 0) for size, b, a in zip((N, K), before, after, strict=True)]
    return PackedPlan(
        layout,
        own=r.choice(list(DTYPES)),
        scales=r.choice(("bfloat16", "float16")) if r.random() < 0.2 else None,
        before=(before[0], before[1]),
        after=(after[0], after[1]),
        places={
            name: (r.choice((0, 0, 1, 3, 8)), r.choices(memory.PLACES, (2, 3, 1))[0])
            for name in Parts._fields
        },
    )


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
    # Drawn apart, so that dense cases are what they would be without packed ones.
    apart = random.Random(f"packed {seed}/{number}")
    plan = _packed_plan(apart, N, K) if apart.random() < PACKED_SHARE else None
    if plan:
        del layouts["weight"]
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
        packed=plan,
    )  # fmt: skip


@dataclasses.dataclass
class Built:
    """The tensors of a case. `options` has a noise_scale wherever noise is drawn.

    Attributes:
        problem: what the result is judged by; its weight has the values of a packed one.
        called: what the op is called with: the same options, and tensors but for a packed weight.
    """

    problem: Problem
    called: Problem
    out: Tensor
    sigma: float | Tensor | None  # in place of noise_scale
    memory: dict[str, Tensor]  # everything around each tensor


def _build_packed(case: Case, plan: PackedPlan) -> tuple[QuantizedWeight, dict[str, Tensor]]:
    """The weight, and everything around each of its tensors."""
    (N, K), (top, left), (bottom, right) = case.dims[1:], plan.before, plan.after
    whole = packed(plan.layout, top + N + bottom, left + K + right, DTYPES[plan.own])
    parts = {name: t.clone() for name, t in whole.parts._asdict().items() if t is not None}
    if plan.scales:
        for name in {"scale", "zero"} & parts.keys():
            if parts[name].dtype == torch.float32:
                parts[name] = parts[name].to(DTYPES[plan.scales])
    factor = case.factors.get("weight", 1.0)
    if torch.float16 in (whole.packing.dtype, whole.packing.difference, parts["scale"].dtype):
        factor = min(factor, 100.0)  # or all values would be infinite
    if "nested" in parts:
        strengths = {"nested", "offset"} & parts.keys()
    else:
        strengths = {"scale_table" if "scale_table" in parts else "scale"}
    for name in strengths:
        limit = torch.finfo(parts[name].dtype).max
        parts[name] = (parts[name].double() * factor).clamp(-limit, limit).to(parts[name].dtype)
    names = [n for n in ("codes", "scale", "nested", "offset", "zero") if n in parts and parts[n].numel()]
    for which, value, where in case.special:
        if which == "weight" and names:
            part = parts[names[where % len(names)]]
            # Of e4m3 and e8m0, 255 is NaN.
            part.view(-1)[where // 8 % part.numel()] = value if part.is_floating_point() else 255
    around = {}
    for name, t in parts.items():
        parts[name], around[f"weight.{name}"] = memory.place(t, "contiguous", 0, *plan.places[name])
    weight = QuantizedWeight(whole.packing, whole.parts._replace(**parts))
    return weight.narrow(0, top, N).narrow(1, left, K).to(DTYPES[case.dtype]), around


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
    if case.packed is None:
        problem = called = Problem(**made, options=options)  # type: ignore[arg-type]
    else:
        weight, parts = _build_packed(case, case.packed)
        around |= parts
        problem = Problem(**made | {"weight": weight.decoded()}, options=options)  # type: ignore[arg-type]
        called = dataclasses.replace(problem, weight=weight)  # type: ignore[arg-type]
    return Built(problem, called, out, sigma, around)
