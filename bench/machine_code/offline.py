"""What the compiler makes of every shipped Triton configuration, without a GPU: `python -m bench offline`.

The real launchers run on meta tensors, and Triton's own JIT specialises and compiles what they launch, for a target
that is only named. Each version of Triton does so in a process of its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import precompile, reader, tables
from .precompile import CHIPS
from .tables import ROOT

OLDEST = "3.6.0"
OLDEST_FOLDER = ROOT / "build" / f"triton-{OLDEST}"
CACHE = ROOT / "build" / "offline"

PAGE = tables.Page(
    path=ROOT / "docs" / "internals" / "kernels.md",
    regenerate="python -m bench offline --write",
    columns=dict.fromkeys("kernel target dtype noise tile case".split(), "")
    | {"instr": ".2f", "tensor": ""}
    | dict.fromkeys("special hidden exposed registers".split(), "d")
    | {"KiB": ".1f"},
    names=6,
    compared=("instr", "special", "KiB"),
    slack=1.07,
)

_MAIN = ("sm80", "sm90", "sm100", "gfx942")
_PRODUCTS = ("forward", "input_grad")

# Instructions per element of W at most, of bfloat16, with more than 128 rows of x.
_BUDGETS = {
    ("forward", "sm90", "gaussian"): 17.5,
    ("input_grad", "sm90", "gaussian"): 18.6,
    ("forward", "sm80", "gaussian"): 19.2,
    ("input_grad", "sm80", "gaussian"): 20.6,
    **{(kernel, target, "rademacher"): 9.0 for kernel in _PRODUCTS for target in _MAIN[:3]},
    ("forward", "sm90", "near_gaussian"): 9.5,
    ("input_grad", "sm90", "near_gaussian"): 9.5,
    **{("perturb", target, "near_gaussian"): 6.0 for target in _MAIN[:3]},
    **{("perturb", target, "rademacher"): 5.5 for target in _MAIN[:3]},
    **{("perturb", target, "hadamard"): 12.0 for target in _MAIN[:3]},  # Triton 3.6; 3.9 has 8.1
    **{("perturb", target, "gaussian"): 15.2 for target in _MAIN[:3]},
    **{("row_sq_norms", target, "none"): 5.5 for target in _MAIN[:3]},
}
# The same of NF4, which is decoded in registers. 27 instructions of eight elements look them up, scale and round them.
_NF4_BUDGETS = {
    ("forward", "sm90", "gaussian"): 19.2,
    ("input_grad", "sm90", "gaussian"): 20.9,
    ("forward", "sm90", "rademacher"): 9.9,
    ("input_grad", "sm90", "rademacher"): 11.0,
}
_MANY = 8192  # rows of x


class Case(NamedTuple):
    """A call of a launcher."""

    kernel: str
    architecture: str
    dtype: str  # "tf32": float32 with torch.set_float32_matmul_precision("high")
    rows: int = 0
    N: int = 4096
    K: int = 4096
    rank: int = 16
    noise: str = "gaussian"
    variant: str = ""  # a key of _VARIANTS


# How a call differs from contiguous, aligned operands with an adapter.
_VARIANTS = {
    "odd": "odd sizes and offsets",
    "masks": "sizes multiples of 8 alone",
    "columns": "all operands column-major",
    "samples": "antithetic samples, bias",
    "noise": "noise alone",
    "apart": "split noise",
    "u": "makes u",
    "dX": "input gradient",
    "nf4": "NF4",
    "nested": "NF4 with nested scales",
    "mixture": "8 experts",
}
_EXPERTS = 8
_PACKED = ("nf4", "nested")


class Row(NamedTuple):
    """What was measured. The first six name it."""

    kernel: str
    target: str
    dtype: str
    noise: str
    tile: str
    case: str
    instr: float = 0.0  # per element of the weight, or of x, in the main loop; without a loop, in the kernel
    tensor: str = "-"  # instruction of the tensor cores in the loop, and how many
    special: int = 0  # special functions in the loop
    hidden: int | None = None  # those between the first warp-group product and its wait
    exposed: int | None = None  # waits for a global load while no warp-group product runs
    registers: int = 0
    shared: int = 0  # bytes of a block
    rows: int = 0
    problems: Sequence[str] = ()

    @property
    def KiB(self) -> float:
        return self.shared / 1024


def cases() -> list[Case]:
    """All that is compiled: every tile of `configs.LINEAR` that an architecture can get, and what is special."""
    from flatlora_kernels.core.noise import KINDS

    found = []
    for architecture in _MAIN:
        nvidia, hopper = architecture != "gfx942", architecture == "sm90"
        for kernel in _PRODUCTS:
            half = Case(kernel, architecture, "bfloat16")
            many, tf32 = half._replace(rows=_MANY), half._replace(dtype="tf32")
            apart = many._replace(variant="apart")
            odd = half._replace(N=4095, K=4097, variant="odd")
            for case in (half, odd, half._replace(dtype="float32"), *([tf32] if nvidia else [])):
                found += [case._replace(rows=rows) for rows in _reached(case)]
            for noise in ("rademacher", "near_gaussian"):
                found += [many._replace(noise=noise), apart._replace(noise=noise)]
            found += [apart._replace(rows=rows) for rows in _reached(half)]
            if nvidia:
                found.append(apart._replace(dtype="tf32"))
            if kernel == "forward" and nvidia:
                few = half._replace(rows=16, variant="u")
                found += [few, few._replace(noise="rademacher")]
            if hopper or not nvidia:
                found += [many._replace(dtype="float16"), many._replace(variant="samples", rank=0)]
            if hopper:
                found += [many._replace(N=4104, K=4104, variant="masks"), many._replace(variant="columns")]
                found += [many._replace(rank=64), half._replace(rows=16, noise="rademacher")]
                found.append(half._replace(rows=16, noise="near_gaussian"))
                found.append(half._replace(rows=16, N=1 << 15, K=1 << 15))  # so wide that it is not split
        found += _packed_cases(architecture)
        if architecture in ("sm90", "sm100"):  # the others leave it to the vendor's products
            grads = Case("adapter_grads", architecture, "bfloat16", _MANY, noise="none")
            found += [grads, grads._replace(rank=32)]
        perturb = Case("perturb", architecture, "bfloat16")
        odd = perturb._replace(N=4095, K=4097, variant="odd")
        norms = Case("row_sq_norms", architecture, "bfloat16", noise="none")
        found += [odd, *(perturb._replace(noise=noise) for noise in KINDS)]
        found += [odd._replace(noise=noise) for noise in KINDS if hopper or noise == "hadamard"]
        found += _transforms(architecture)
        found += _mixtures(architecture)
        found += [norms._replace(rank=rank) for rank in (0, 16, 64)]
        if hopper:
            found.append(perturb._replace(dtype="float32", variant="noise"))
            found.append(norms._replace(dtype="float32", N=4095, K=4097, variant="odd"))
    # Takes the tiles of sm_80, with less shared memory.
    found += [Case(kernel, "sm120", "bfloat16", _MANY) for kernel in _PRODUCTS]
    return list(dict.fromkeys(found))


def _packed_cases(architecture: str) -> list[Case]:
    """On sm_90 products of NF4 with each noise, with nested scales too, and passes over the weight."""
    if architecture != "sm90":
        return []
    found = []
    for kernel in _PRODUCTS:
        many = Case(kernel, architecture, "bfloat16", _MANY, variant="nf4")
        found += [many._replace(noise=noise) for noise in ("gaussian", "rademacher", "near_gaussian")]
        found.append(many._replace(variant="nested"))
    perturb = Case("perturb", architecture, "bfloat16", variant="nf4")
    return [
        *found,
        perturb,
        Case("row_sq_norms", architecture, "bfloat16", rank=0, noise="none", variant="nf4"),
    ]


def _mixtures(architecture: str) -> list[Case]:
    """Products with noise, and without it what u = x lora_A^T and v = dY lora_B are; sums over the rows of experts."""
    found = []
    for kernel in _PRODUCTS:
        many = Case(kernel, architecture, "bfloat16", _MANY, variant="mixture")
        found.append(many)
        low = {"N": 16} if kernel == "forward" else {"K": 16}
        found.append(many._replace(rank=0, noise="none", **low))  # type: ignore[arg-type]
        if architecture == "sm90":
            found += [many._replace(noise=noise) for noise in ("rademacher", "near_gaussian")]
            found.append(many._replace(rows=16 * _EXPERTS))
            found.append(many._replace(rows=16 * _EXPERTS, rank=0, noise="none"))
    sums = Case("expert_grads", architecture, "bfloat16", _MANY, noise="none", variant="mixture")
    found += [sums._replace(rank=rank) for rank in (16, 32, 64)]
    found += [sums._replace(rank=rank, dtype="float32") for rank in (16, 64)]
    return found


def _transforms(architecture: str) -> list[Case]:
    """Of the largest tile all types and both directions; of each way to cut a tile, one; tiles in part, and several."""
    large = Case("transform", architecture, "bfloat16", _MANY, noise="hadamard")
    found = [
        large._replace(dtype=dtype, variant=variant)
        for dtype in ("bfloat16", "float16", "float32")
        for variant in ("", "dX")
    ]
    found += [large._replace(N=size, K=size) for size in (2048, 1024, 256, 64)]
    if architecture == "gfx942":  # spills scalar registers into vector ones where there are several tiles
        return found
    return [*found, large._replace(K=14336), large._replace(N=4095, K=4097, variant="odd")]


def _reached(case: Case) -> list[int]:
    """Rows of x, a number for each tile that `case` can get by them: the most of those tried."""
    reached: dict[str, int] = {}
    for rows in (_MANY, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16):
        reached.setdefault(_launches(case._replace(rows=rows))[0].row.tile, rows)
    return sorted(reached.values())


def _unreached(rows: Iterable[Row]) -> list[str]:
    """Tiles of `configs` that no row has: of `LINEAR` by family and kernel, of passes by architecture."""
    from flatlora_kernels.triton_kernels import configs

    have = set[tuple[str, ...]]()
    for row in rows:
        family = configs.family_of(row.target)
        have |= {(family, row.kernel, row.tile), ("any", row.kernel, row.tile), (row.target, row.tile)}
    missing = []
    for (family, kind), table in configs.LINEAR.items():
        for kernel, (_, c) in ((kernel, entry) for kernel, entries in table.items() for entry in entries):
            tile = _tile(c[:3], c.num_warps, c.num_stages, c.carry)
            if family != "interpreter" and (family, kernel, tile) not in have:
                missing.append(f"LINEAR[{family!r}, {kind!r}][{kernel!r}]: {c}")
    for name, c in vars(configs).items():
        if isinstance(c, configs.Pass) and "INTERP" not in name:
            tile = _tile(c[:2], c.num_warps, c.num_stages)
            targets = ("sm90", "sm100") if name == "ADAPTER_GRADS" else _MAIN
            missing += [f"{name} for {target}: {c}" for target in targets if (target, tile) not in have]
    for c in (c for table in (configs.EXPERT_GRADS, configs.EXPERT_GRADS_SINGLE) for _, c in table):
        tile = _tile(c[:3], c.num_warps, c.num_stages)
        missing += [f"EXPERT_GRADS for {target}: {c}" for target in _MAIN if (target, tile) not in have]
    return [f"no case of bench/machine_code/offline.py compiles configs.{entry}" for entry in missing]


# --- In the process of one version of Triton ---


class _Launch(NamedTuple):
    row: Row  # its names
    kernel: str
    arguments: dict[str, Any]
    compile: Callable[[], Any]


def _launches(case: Case) -> list[_Launch]:
    """What `case` would launch."""
    from flatlora_kernels.triton_kernels import launch

    found = []

    def note(kernel: Any, arguments: dict[str, Any], compile: Callable[[], Any]) -> None:
        # What the constants DRAW and CUT hold goes by names of its own: NOISE, BLOCK_M.
        for name in {"DRAW", "CUT"} & arguments.keys():
            arguments = arguments | {key.upper(): value for key, value in vars(arguments[name]).items()}
        found.append(_Launch(_named(case, kernel.__name__, arguments), kernel.__name__, arguments, compile))

    precompile.compile_for(case.architecture)
    with launch.instead(note):
        call(case)
    return found


def _tile(blocks: Iterable[int], warps: int, stages: int | None = None, carry: bool = True) -> str:
    text = f"{'x'.join(map(str, blocks))}, {warps} warps"
    return text + (f", {stages} stages" if stages else "") + ("" if carry else ", no carry")


def _named(case: Case, kernel: str, arguments: dict[str, Any]) -> Row:
    name = kernel.strip("_").removesuffix("_kernel").removeprefix("linear_")
    if name == "add_splits":
        blocks = [arguments["BLOCK"]]
        about = {"and a second sum": arguments["HAS_SECOND"]}
    elif name == "transform":
        high, low = 1 << arguments["HIGH"], 1 << arguments["LOW"]
        blocks = [arguments["BLOCK_M"], low, high]
        size = f"{case.N} x {case.K}"
        about = {f"{case.rows} rows": True, size: True, _VARIANTS.get(case.variant, ""): case.variant}
    elif name == "expert_grads":
        blocks = [arguments[block] for block in ("BLOCK_M", "BLOCK_P", "BLOCK_Q")]
        about = {f"{case.rows} rows": True, f"rank {case.rank}": True, _VARIANTS[case.variant]: True}
    else:
        n = arguments["BLOCK_N"]
        k = arguments.get("BLOCK_K") or arguments["BLOCK_M"]  # adapter_grads has no K
        m = [arguments["BLOCK_M"]] if name in _PRODUCTS else []
        blocks = [*m, k, n] if name == "input_grad" else [*m, n, k]
        about = {
            f"{case.rows} rows": case.rows,
            "split": arguments.get("SPLIT"),
            f"rank {case.rank}" if case.rank else "no adapter": name != "perturb" and case.rank != 16,
            _VARIANTS.get(case.variant, ""): case.variant,
        }
    stages = arguments.get("num_stages", arguments.get("STAGES"))
    tile = _tile(blocks, arguments["num_warps"], stages, arguments.get("CARRY", True))
    what = ", ".join(said for said, holds in about.items() if holds) or "-"
    noise = arguments.get("NOISE", "none")
    return Row(name, case.architecture, case.dtype, noise, tile, what, rows=case.rows)


def call(case: Case) -> None:
    """One call of the launcher that `case` names, on tensors without memory."""
    import torch
    from flatlora_kernels.triton_kernels import (
        adapter_grads,
        expert_grads,
        perturb,
        product,
        row_norms,
        transform,
    )

    from flatlora_kernels.backends.shared.workspace import workspace_limit
    from flatlora_kernels.core.noise import tile_bits
    from flatlora_kernels.core.records import Draw, Product

    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    dtype = getattr(torch, "float32" if case.dtype == "tf32" else case.dtype)
    odd, samples = case.variant == "odd", case.variant == "samples"

    def matrix(rows: int, cols: int) -> Any:
        if case.variant == "columns":
            return torch.empty(cols, rows, dtype=dtype, device="meta").t()
        # An element further, which is no multiple of 16 bytes.
        elements = torch.empty(rows * cols + odd, dtype=dtype, device="meta")
        return elements[int(odd) :].view(rows, cols)

    M, N, K, r = case.rows, case.N, case.K, case.rank
    weight = _packed(case.variant == "nested", N, K, dtype) if case.variant in _PACKED else matrix(N, K)
    draw = Draw(
        torch.empty(N, dtype=torch.float32, device="meta"),
        torch.empty((), dtype=torch.int64, device="meta"),
        noise=case.noise,
        samples=4 if samples else 1,
        sample_offset=int(samples),
        antithetic=samples,
        row_offset=int(odd),
        col_offset=8 * odd,
        tile_bits=tile_bits(N, K) if case.noise == "hadamard" else 0,
    )
    A, B = (matrix(r, K), matrix(N, r)) if r else (None, None)
    offsets = None
    if case.variant == "mixture":
        weight, A, B = (
            None if t is None else t.expand(_EXPERTS, *t.shape).contiguous() for t in (weight, A, B)
        )
        draw = draw._replace(noise_scale=torch.empty(_EXPERTS, N, dtype=torch.float32, device="meta"))
        draw = None if case.noise == "none" else draw
        offsets = torch.empty(_EXPERTS, dtype=torch.int64, device="meta")
    if case.kernel in _PRODUCTS:
        own = A if case.variant == "u" else None
        low = matrix(M, r).contiguous() if r and own is None else None
        bias = torch.empty(N, dtype=dtype, device="meta") if samples else None
        if case.kernel == "forward":
            p = Product(matrix(M, K), weight, False, low, B, bias, 2.0, offsets)
        else:
            p = Product(matrix(M, N), weight, True, low, None if A is None else A.mT, None, 2.0, offsets)
        accum = "split" if case.variant == "apart" else "folded"
        product.product(p, draw, accum, workspace_limit(weight), own)
    elif case.kernel == "expert_grads":
        out = torch.empty(_EXPERTS, r, K, dtype=dtype, device="meta")
        expert_grads.expert_grads(matrix(M, r), matrix(M, K), offsets, 2.0, out)
    elif case.kernel == "adapter_grads":
        adapter_grads.adapter_grads(matrix(M, N), matrix(M, r), B, 2.0)
    elif case.kernel == "transform":
        input_grad = case.variant == "dX"
        a, out = (
            matrix(M, N if input_grad else K),
            torch.empty(M, K if input_grad else N, dtype=dtype, device="meta"),
        )
        transform.transform(a, draw, input_grad, out, True)
    elif case.kernel == "perturb":
        perturb.perturb(None if case.variant == "noise" else weight, draw, matrix(N, K))
    else:
        row_norms.row_sq_norms(weight, A, B, 2.0)


def _packed(nested: bool, N: int, K: int, dtype: Any) -> Any:
    """NF4 without memory."""
    import torch

    from flatlora_kernels.core.quantized import Packing, Parts, QuantizedWeight

    def made(count: int, dtype: Any = torch.float32) -> Any:
        return torch.empty(count, dtype=dtype, device="meta")

    packing = Packing("nf4", N, K, dtype, dtype, 4, width=K, high_first=True, block=64)
    parts = Parts(made(N * K // 2, torch.uint8), made(16), made(N * K // 64))
    if nested:
        packing = packing._replace(nested_block=256)
        parts = parts._replace(
            scale=made(N * K // 64, torch.uint8), scale_table=made(256), nested=made(N * K >> 14),
            offset=made(1)[0],
        )  # fmt: skip
    return QuantizedWeight(packing, parts)


def _work(only: str, listings: str, architectures: str) -> tuple[str, list[Row], list[str]]:
    """The rows whose names contain all words of `only`, and the listings into a folder."""
    import triton

    named, rows = [], {}
    for launch in (launch for case in cases() for launch in _launches(case)):
        row = launch.row
        named.append(row)
        names = row[: PAGE.names]
        if row.kernel == "add_splits":  # one of each kind is enough
            names = (row.kernel, row.target, row.case)
        wanted = row.target in architectures.split() and all(
            word in " ".join(row[:6]) for word in only.split()
        )
        if wanted and names not in rows:
            text, rows[names] = _measure(launch)
            if listings:
                Path(listings).mkdir(parents=True, exist_ok=True)
                name = re.sub(r"[^\w]+", "-", " ".join(row[: PAGE.names]))
                Path(listings, f"{triton.__version__}-{len(rows) - 1:03}-{name}.s").write_text(text)
    return triton.__version__, list(rows.values()), _unreached(named)


def _elements(arguments: dict[str, Any]) -> int:
    """Of the weight, in one round of the main loop."""
    if "BLOCK_P" in arguments:  # of b
        return int(arguments["BLOCK_M"] * arguments["BLOCK_Q"])
    others = (arguments.get(block) for block in ("BLOCK", "BLOCK_K", "BLOCK_M"))
    return arguments.get("BLOCK_N", 1) * next(filter(None, others)) * arguments.get("TOGETHER", 1)


_PHILOX = ("-0x2daee0ad", "-0x326172a9", "0xd2511f53", "0xcd9e8d57")
_LOADS = ("LDG", "global_load", "buffer_load")
_MULTIPLY_ADDS = ("FFMA", "v_fma_f32", "v_fmac_f32", "v_pk_fma_f32")


def _wide_multiply(instruction: reader.Instruction) -> bool:
    """Of Philox. AMD keeps the multipliers in registers; there any multiply that gives 64 bits is taken for one."""
    if instruction.opcode.startswith(("v_mad_u64_u32", "v_mul_hi_u32")):
        return True
    return instruction.opcode.startswith("IMAD") and any(c in instruction.text for c in _PHILOX)


def _measure(launch: _Launch) -> tuple[str, Row]:
    """The listing, and what there is to say of it."""
    row, arguments = launch.row, launch.arguments
    try:
        compiled = launch.compile()
    except Exception as error:  # whatever the compiler comes up with is a finding
        return "", row._replace(problems=[f"does not compile: {type(error).__name__}: {error}"[:500]])
    read = _of_nvidia if "cubin" in compiled.asm else _of_amd
    text, code, registers, problems = read(compiled.asm, launch.kernel, row)
    row = row._replace(registers=registers, shared=compiled.metadata.shared)
    try:
        body = _body(row, code)
    except ValueError as error:
        return text, row._replace(problems=[*problems, *reader.faults(code, [], ""), str(error)])
    if row.kernel == "transform":  # of x
        elements = arguments["BLOCK_M"] << arguments["TILE_BITS"]
    else:
        elements = _elements(arguments)
    per_thread = elements / (CHIPS[row.target].lanes * arguments["num_warps"])
    multiplies = (*_PRODUCTS, "adapter_grads", "expert_grads", "transform")
    tensor = reader.tensor_cores(body) if row.kernel in multiplies else "-"
    row = row._replace(
        instr=round(len(body) / per_thread, 2),
        tensor=tensor,
        special=sum(map(reader.is_special, body)),
        hidden=reader.hidden(body),
        exposed=len(reader.exposed_waits(body)) if "HGMMA" in tensor else None,
    )
    problems += [*reader.faults(code, body, "what is counted"), *_problems(row, arguments)]
    return text, row._replace(problems=problems)


def _of_nvidia(asm: Any, kernel: str, row: Row) -> tuple[str, reader.Body, int, list[str]]:
    """Listing, instructions, registers of a thread, and what is wrong."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(asm["cubin"])
        said = reader.run(knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name)
        text = reader.run(knobs.nvidia.nvdisasm.path, "-c", "-hex", cubin.name)
    usage = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    problems = [f"{usage[k]} bytes of {k}" for k in ("STACK", "LOCAL") if usage[k]]
    return text, reader.sass(text, kernel), usage["REG"], problems


def _of_amd(asm: Any, kernel: str, row: Row) -> tuple[str, reader.Body, int, list[str]]:
    text = asm["amdgcn"]
    code = reader.amdgcn(text, kernel)
    figures = {k: int(v) for k, v in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    spilled = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    problems = [f"{k} is {figures[k]}" for k in spilled if figures[k]]
    ptx = ("prmt.b32", ".approx", "shl.b32")
    problems += [f"PTX in {k}: {p}" for k in ("llir", "amdgcn") for p in ptx if p in asm[k]]
    if row.noise == "gaussian":
        wanted = ("v_sin_f32", "v_cos_f32", "v_log_f32", "v_sqrt_f32")
        problems += [f"no {w}" for w in wanted if not any(i.opcode.startswith(w) for i in code)]
    return text, code, figures["vgpr_count"] + figures["agpr_count"], problems


def _body(row: Row, code: reader.Body) -> reader.Body:
    """The instructions that are counted."""
    if row.kernel == "add_splits" or (row.kernel == "perturb" and not reader.loops(code)):
        return [code[i] for i in reader.reachable(code)]
    if row.kernel in ("adapter_grads", "transform") or (
        row.kernel == "expert_grads" and row.dtype != "float32"
    ):
        return reader.main_loop(code, lambda body: any(map(reader.is_tensor, body)))
    if row.kernel == "row_sq_norms":  # the adapter has a loop inside
        return reader.main_loop(
            code, lambda body: any(i.opcode.startswith(_LOADS) for i in body), outermost=True
        )
    products = _MULTIPLY_ADDS if row.dtype == "float32" else ()

    def main(body: reader.Body) -> bool:
        multiplies = any(reader.is_tensor(i) or i.opcode.startswith(products) for i in body)
        draws = row.noise == "none" or sum(map(_wide_multiply, body)) >= 10
        return draws and (row.kernel == "perturb" or multiplies)

    return reader.main_loop(code, main)


def _problems(row: Row, arguments: dict[str, Any]) -> list[str]:
    """What must hold whatever the table says."""
    chip = CHIPS[row.target]
    found = []
    if row.shared > chip.shared:
        found.append(f"{row.shared} bytes of shared memory, {chip.shared} fit")
    threads = chip.lanes * arguments["num_warps"]
    if row.registers > chip.registers or (chip.lanes == 32 and row.registers * threads > 65536):
        found.append(f"{row.registers} registers in {threads} threads")
    if row.kernel in _PRODUCTS:
        if row.dtype == "float32" and row.target.startswith("sm") and row.tensor != "-":
            found.append(f"tensor cores in a product in full precision: {row.tensor}")
        large = {"sm90": "HGMMA", "sm100": "UTCHMMA"} if arguments["BLOCK_M"] >= 64 else {}
        wanted = "v_mfma" if row.target == "gfx942" else large.get(row.target, "HMMA")
        if wanted not in row.tensor and row.dtype != "float32":
            found.append(f"expected {wanted} in the main loop, got {row.tensor}")
        # Split near_gaussian has one in the input gradient of Triton 3.6.
        units_apart = row.noise == "near_gaussian" and _VARIANTS["apart"] in row.case
        # Packed scales, too, are waited for once.
        allowed = units_apart or _packs(row)
        if (row.exposed or 0) > allowed and arguments["CARRY"] and row.rows > 128 and _regular(row):
            found.append(f"{row.exposed} waits for a global load while no warp-group product runs")
    limit = budget(row)
    if limit is not None and row.instr > limit:
        found.append(f"{row.instr} instructions per element of W, the budget is {limit}")
    return found


def _regular(row: Row) -> bool:
    """Whole tiles of aligned, row-major operands."""
    return not any(_VARIANTS[variant] in row.case for variant in ("odd", "masks", "columns"))


def _packs(row: Row) -> bool:
    return any(row.case.endswith(_VARIANTS[variant]) for variant in _PACKED)


def budget(row: Row) -> float | None:
    """Instructions per element of W that no table may exceed."""
    few = row.kernel in _PRODUCTS and row.rows <= 128
    adapter = row.kernel == "row_sq_norms" and "no adapter" not in row.case
    if few or adapter or row.dtype != "bfloat16" or not _regular(row) or _VARIANTS["apart"] in row.case:
        return None
    if _packs(row):
        nf4 = row.case.endswith(_VARIANTS["nf4"])
        return _NF4_BUDGETS.get((row.kernel, row.target, row.noise)) if nf4 else None
    return _BUDGETS.get((row.kernel, row.target, row.noise))


# --- Here ---


class Outcome(NamedTuple):
    """Of one version of Triton."""

    version: str
    rows: list[Row]
    unreached: list[str]

    @property
    def heading(self) -> str:
        return f"Triton {self.version}"


def version(folder: Path | None = None) -> str | None:
    """Of the Triton in `folder`; None = that this process would import, if any."""
    if folder is None:
        spec = importlib.util.find_spec("triton")
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parents[1]
    return re.findall(r"__version__ = ['\"]([^'\"]+)", (folder / "triton" / "__init__.py").read_text())[0]


def measure(
    folder: Path | None, only: str = "", listings: str = "", architectures: Iterable[str] = CHIPS
) -> Outcome:
    """Compiles in a process of its own, with the Triton in `folder` or, None, that of the environment.

    A result is kept in build/ for as long as the kernels and this program stay as they are.
    """
    before = digest()
    kept = CACHE / f"{version(folder)}-{before}-{'-'.join(architectures)}.json"
    whole = not only and not listings
    if whole and kept.exists():
        text = kept.read_text()
    else:
        env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        env["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR", str(CACHE / "triton"))
        if folder is not None:
            env["PYTHONPATH"] = f"{folder.resolve()}{os.pathsep}{env.get('PYTHONPATH', '')}".strip(os.pathsep)
        command = [
            sys.executable,
            "-m",
            "bench.machine_code.offline",
            only,
            listings,
            " ".join(architectures),
        ]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            said = (done.stdout + done.stderr)[-4000:]
            raise RuntimeError(f"Triton {version(folder)} in {folder or 'the environment'}:\n{said}")
        text = done.stdout.splitlines()[-1]
        if whole and digest() != before:
            raise RuntimeError("the kernels changed while they were compiled: once more, please")
        if whole:
            CACHE.mkdir(parents=True, exist_ok=True)
            kept.write_text(text)
    name, rows, unreached = json.loads(text)
    return Outcome(name, [Row(*row) for row in rows], unreached)


def digest() -> str:
    """Of all that decides what is compiled and how it is read."""
    package, here = ROOT / "flatlora_kernels", Path(__file__).parent
    sources = [path for folder in (ROOT / "triton_kernels", package / "core") for path in folder.glob("*.py")]
    sources += [
        package / "backends" / name for name in ("triton.py", "shared/products.py", "shared/workspace.py")
    ]
    sources += [path for path in here.glob("*.py") if path.name != "compiled.py"] + [ROOT / "bench/shapes.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]


_DIGEST = re.compile(r"(?<=digest `)[0-9a-f]*(?=`)")


def unchanged() -> bool:
    """Whether the page was written from these very sources."""
    found = _DIGEST.search(PAGE.path.read_text())
    return found is not None and found.group() == digest()


# Words in the names of the rows that are compiled where nothing has changed.
SAMPLE = "sm90 near_gaussian"


# The one that takes longest first; all of CHIPS.
_BY_TIME = ("sm90", "sm100", "sm80", "gfx942", "sm120")


def measure_all(
    chosen: list[Path | None], only: str = "", listings: str = "", shared: bool = False
) -> list[Outcome]:
    """Two architectures at a time; shared: of two versions of Triton each takes some, and none both."""
    share = {folder: set(CHIPS) for folder in chosen}
    if shared and len(chosen) == 2:
        share = dict(zip(chosen, ({"sm80", "gfx942"}, {"sm90", "sm100", "sm120"}), strict=True))
    in_order = sorted(CHIPS, key=_BY_TIME.index)
    jobs = [(folder, a) for a in in_order for folder in chosen if a in share[folder]]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda job: measure(job[0], only, listings, job[1:]), jobs))
    found = []
    for folder in chosen:
        own = {a: outcome for (f, a), outcome in zip(jobs, done, strict=True) if f == folder}
        rows = [row for a in CHIPS if a in own for row in own[a].rows]
        found.append(next(iter(own.values()))._replace(rows=rows))
    return found


def main(args: argparse.Namespace) -> int:
    """`python -m bench offline`."""
    chosen = args.triton or ([None] if version() == OLDEST else [OLDEST_FOLDER, None])
    for folder in chosen:
        if folder is None and version() is None:
            raise SystemExit("triton is not installed here: pip install triton")
        if folder is not None and not (folder / "triton").is_dir():
            raise SystemExit(f"no Triton in {folder}: make {OLDEST_FOLDER.relative_to(ROOT)}")
    outcomes = measure_all(chosen, " ".join(args.only), str(args.listings or ""))
    unreached = [p for outcome in outcomes for p in outcome.unreached]
    wrong = tables.conclude(PAGE, {o.heading: o.rows for o in outcomes}, args, *unreached)
    if args.write and not wrong:
        PAGE.path.write_text(_DIGEST.sub(digest(), PAGE.path.read_text(), count=1))
    return wrong


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tables.add_arguments(parser, PAGE, "rows whose names")
    parser.add_argument("--listings", type=Path, help="folder for the machine code")
    parser.add_argument(
        "--triton", nargs="+", type=Path, default=[], metavar="FOLDER",
        help=f"installed with pip --target; default build/triton-{OLDEST} and the environment's",
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(_work(*sys.argv[1:])))
