"""What the compiler makes of every shipped Triton configuration, without a GPU: `python -m bench offline`.

The real launchers run on meta tensors, and Triton's own JIT specialises and compiles what they launch, for a target
that is only named. Each version of Triton does so in a process of its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "kernels.md"
OLDEST = "3.6.0"
OLDEST_FOLDER = ROOT / "build" / f"triton-{OLDEST}"
CACHE = ROOT / "build" / "offline"
REGENERATE = "python -m bench offline --write"
SLACK = 1.07

# Multiprocessors or compute units, bytes of shared memory for one block, lanes of a warp, registers of a thread.
_CHIPS = {
    "sm80": (108, 163 << 10, 32, 255),
    "sm90": (132, 227 << 10, 32, 255),
    "sm100": (148, 227 << 10, 32, 255),
    "sm120": (188, 99 << 10, 32, 255),
    "gfx942": (304, 64 << 10, 64, 512),
}
_SMALL_SHARED = 99 << 10  # of sm_86 and sm_89, which take the tiles of sm_80

# Instructions per element of W at most, of bfloat16: kernel, target, noise -> with more than 128 rows of x.
_BUDGETS = {
    ("forward", "sm90", "gaussian"): 17.5,
    ("input_grad", "sm90", "gaussian"): 18.6,
    ("forward", "sm80", "gaussian"): 19.2,
    ("input_grad", "sm80", "gaussian"): 20.6,
    ("forward", "sm80", "rademacher"): 12.5,
    ("forward", "sm90", "rademacher"): 12.5,
    ("forward", "sm100", "rademacher"): 12.5,
    ("input_grad", "sm80", "rademacher"): 12.5,
    ("input_grad", "sm90", "rademacher"): 12.5,
    ("input_grad", "sm100", "rademacher"): 12.5,
    **{("perturb", target, "gaussian"): 15.2 for target in ("sm80", "sm90", "sm100")},
    **{("row_sq_norms", target, "none"): 5.5 for target in ("sm80", "sm90", "sm100")},
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
    "": "",
    "odd": "odd sizes and offsets",
    "masks": "sizes multiples of 8 alone",
    "columns": "all operands column-major",
    "samples": "antithetic samples, bias",
    "noise": "noise alone",
    "apart": "split noise",
    "u": "makes u",
}


class Row(NamedTuple):
    """What was measured. The first six name it."""

    kernel: str
    target: str
    dtype: str
    noise: str
    tile: str
    case: str
    instructions: float  # per element of the weight, in the main loop; without a loop, in the kernel
    tensor: str  # instruction of the tensor cores in the loop, and how many
    special: int  # special functions in the loop
    hidden: int | None  # those between the first warp-group product and its wait
    exposed: int | None  # waits for a global load while no warp-group product runs
    registers: int
    shared: int  # bytes of a block
    rows: int
    problems: tuple[str, ...]

    @property
    def key(self) -> tuple[str, ...]:
        return self[:6]


def cases() -> list[Case]:
    """All that is compiled: every tile of `configs.LINEAR` that an architecture can get, and what is special."""
    found = []
    for architecture in ("sm80", "sm90", "sm100", "gfx942"):
        for kernel in ("forward", "input_grad"):
            half = Case(kernel, architecture, "bfloat16")
            odd = half._replace(N=4095, K=4097, variant="odd")
            for case in (half, odd, half._replace(dtype="float32"), half._replace(dtype="tf32")):
                if case.dtype != "tf32" or architecture != "gfx942":
                    found += [case._replace(rows=rows) for rows in _reached(case)]
            many = half._replace(rows=_MANY)
            found.append(many._replace(noise="rademacher"))
            apart = half._replace(variant="apart")
            found += [apart._replace(rows=rows) for rows in _reached(half)]
            found += [apart._replace(rows=_MANY, noise="rademacher")]
            if architecture != "gfx942":
                found.append(apart._replace(rows=_MANY, dtype="tf32"))
            if kernel == "forward" and architecture != "gfx942":
                few = half._replace(rows=16, variant="u")
                found += [few, few._replace(noise="rademacher")]
            if architecture in ("sm90", "gfx942"):
                found += [many._replace(dtype="float16"), many._replace(variant="samples", rank=0)]
            if architecture == "sm90":
                found += [many._replace(N=4104, K=4104, variant="masks"), many._replace(variant="columns")]
                found += [many._replace(rank=64), half._replace(rows=16, noise="rademacher")]
                found.append(half._replace(rows=16, N=1 << 15, K=1 << 15))  # so wide that it is not split
        if architecture in ("sm90", "sm100"):  # the others leave it to the vendor's products
            grads = Case("adapter_grads", architecture, "bfloat16", _MANY, noise="none")
            found += [grads, grads._replace(rank=32)]
        perturb = Case("perturb", architecture, "bfloat16")
        found += [
            perturb,
            perturb._replace(noise="rademacher"),
            perturb._replace(N=4095, K=4097, variant="odd"),
        ]
        norms = Case("row_sq_norms", architecture, "bfloat16", noise="none")
        found += [norms._replace(rank=rank) for rank in (0, 16, 64)]
        if architecture == "sm90":
            found.append(perturb._replace(dtype="float32", variant="noise"))
            found.append(norms._replace(dtype="float32", N=4095, K=4097, variant="odd"))
    # Takes the tiles of sm_80, with less shared memory.
    found += [Case(kernel, "sm120", "bfloat16", _MANY) for kernel in ("forward", "input_grad")]
    return list(dict.fromkeys(found))


def _reached(case: Case) -> list[int]:
    """Rows of x, a number for each tile that `case` can get by them: the most of those tried."""
    reached: dict[int, int] = {}
    with _launches(lambda *_: None), _tiles() as tiles:
        for rows in (_MANY, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16):
            _compile_for(case.architecture)
            call(case._replace(rows=rows))
            reached.setdefault(id(tiles[-1]), rows)
    return sorted(reached.values())


@contextlib.contextmanager
def _tiles() -> Iterator[list[Any]]:
    """The entries of `configs.LINEAR` that launchers inside choose."""
    from flatlora_kernels.triton_kernels import configs

    rule = configs.linear
    chosen: list[Any] = []  # by calls that were not prepared before, see launch.forget

    def linear(*args: Any, **kwargs: Any) -> Any:
        found = rule(*args, **kwargs)
        chosen.append(found[0])
        return found

    configs.linear = linear
    try:
        yield chosen
    finally:
        configs.linear = rule


def _unreached(chosen: list[Any], rows: Iterable[Row], architectures: str) -> list[str]:
    """Entries of `configs.LINEAR` that are not among those chosen, and tiles of other kernels without a row on some of
    `architectures`."""
    from flatlora_kernels.triton_kernels import configs

    used = set(map(id, chosen))
    found = [
        f"configs.LINEAR[{family!r}, {kind!r}][{kernel!r}]: {tile}"
        for (family, kind), table in configs.LINEAR.items()
        if family != "interpreter"
        for kernel, entries in table.items()
        for _, tile in entries
        if id(tile) not in used
    ]
    passes = {
        name: v for name, v in vars(configs).items() if isinstance(v, configs.Pass) and "INTERP" not in name
    }
    for name, tile in passes.items():
        text = f"{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages"
        have = {row.target for row in rows if row.tile == text}
        wanted = ("sm90", "sm100") if name == "ADAPTER_GRADS" else ("sm80", "sm90", "sm100", "gfx942")
        found += [f"configs.{name} for {a}: {tile}" for a in wanted if a in architectures and a not in have]
    return found


# --- In the process of one version of Triton ---


class _Target:
    """As much of a driver as compiling needs."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        nvidia = architecture.startswith("sm")
        self.target = GPUTarget("cuda" if nvidia else "hip", int(architecture[2:]) if nvidia else architecture,
                                _CHIPS[architecture][2])  # fmt: skip
        self.index = list(_CHIPS).index(architecture)

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


class _Launch(NamedTuple):
    case: Case
    key: tuple[str, ...]
    kernel: str
    arguments: dict[str, Any]
    result: Any  # Triton's compiled kernel, or the exception


@contextlib.contextmanager
def _launches(instead: Callable[[Any, dict[str, Any], Callable[[], Any]], None]) -> Iterator[None]:
    """Launches inside call `instead` with the kernel, its arguments and a function that compiles it."""
    from flatlora_kernels.triton_kernels import launch

    with launch.instead(instead):
        yield


def _key(case: Case, kernel: str, arguments: dict[str, Any]) -> tuple[str, ...]:
    name = kernel.strip("_").removesuffix("_kernel").removeprefix("linear_")
    about = []
    if name == "add_splits":
        tile = [arguments["BLOCK"]]
        if arguments["HAS_BIAS"]:
            about.append("bias")
        if arguments["HAS_SECOND"]:
            about.append("and a second sum")
    else:
        n = arguments["BLOCK_N"]
        k = arguments.get("BLOCK_K") or arguments["BLOCK_M"]  # adapter_grads has no K
        tile = {
            "forward": [arguments.get("BLOCK_M"), n, k],
            "input_grad": [arguments.get("BLOCK_M"), k, n],
        }.get(name, [n, k])
        if case.rows:
            about.append(f"{case.rows} rows")
        if arguments.get("SPLIT"):
            about.append("split")
        if name != "perturb" and case.rank != 16:
            about.append(f"rank {case.rank}" if case.rank else "no adapter")
        if case.variant:
            about.append(_VARIANTS[case.variant])
    text = "x".join(map(str, tile)) + f", {arguments['num_warps']} warps"
    for stages in ("STAGES", "num_stages"):
        if stages in arguments:
            text += f", {arguments[stages]} stages"
    if arguments.get("CARRY") is False:
        text += ", no carry"
    noise = arguments.get("NOISE", "none")
    return name, case.architecture, case.dtype, noise, text, ", ".join(about) or "-"


def _compile_for(architecture: str) -> None:
    from flatlora_kernels.triton_kernels import launch
    from triton.runtime.driver import driver

    driver.set_active(_Target(architecture))
    machine = launch.Machine(architecture, _CHIPS[architecture][0])
    launch._machine = lambda index: machine
    launch.forget()


def call(case: Case) -> None:
    """One call of the launcher that `case` names, on tensors without memory."""
    import torch
    from flatlora_kernels.triton_kernels import adapter_grads, forward, input_grad, perturb, row_norms

    from flatlora_kernels.backends.shared.arguments import workspace_limit
    from flatlora_kernels.spec.noise import Draw

    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    dtype = getattr(torch, "float32" if case.dtype == "tf32" else case.dtype)
    odd = case.variant == "odd"

    def matrix(rows: int, cols: int) -> Any:
        if case.variant == "columns":
            return torch.empty(cols, rows, dtype=dtype, device="meta").t()
        # An element further, which is no multiple of 16 bytes.
        return torch.empty(rows * cols + 1, dtype=dtype, device="meta")[int(odd) :][: rows * cols].view(
            rows, cols
        )

    M, N, K, r = case.rows, case.N, case.K, case.rank
    weight = matrix(N, K)
    draw = Draw(
        torch.empty(N, dtype=torch.float32, device="meta"),
        torch.empty((), dtype=torch.int64, device="meta"),
        noise=case.noise,
        samples=4 if case.variant == "samples" else 1,
        sample_offset=int(case.variant == "samples"),
        antithetic=case.variant == "samples",
        row_offset=int(odd),
        col_offset=8 * odd,
    )
    A, B = (matrix(r, K), matrix(N, r)) if r else (None, None)
    accum = "split" if case.variant == "apart" else "folded"
    if case.kernel == "forward":
        u = matrix(M, r).contiguous() if r else None
        bias = torch.empty(N, dtype=dtype, device="meta") if case.variant == "samples" else None
        u, own = (None, A) if case.variant == "u" else (u, None)
        x, limit = matrix(M, K), workspace_limit(weight)
        forward.linear_forward(x, weight, u, own, B, bias, 2.0, draw, accum, limit)
    elif case.kernel == "input_grad":
        v = matrix(M, r).contiguous() if r else None
        input_grad.linear_input_grad(matrix(M, N), weight, A, v, draw, accum, workspace_limit(weight))
    elif case.kernel == "adapter_grads":
        adapter_grads.adapter_grads(matrix(M, N), matrix(M, r), B, 2.0)
    elif case.kernel == "perturb":
        perturb.perturb(None if case.variant == "noise" else weight, draw, weight)
    else:
        row_norms.row_sq_norms(weight, A, B, 2.0)


def _work(only: str, listings: str, architectures: str) -> dict[str, Any]:
    """The rows whose names contain all words of `only`, and the listings into a folder."""
    import triton

    launches: dict[tuple[str, ...], _Launch] = {}
    everything = cases()
    with _tiles() as chosen:
        for case in everything:

            def compile(
                kernel: Any, arguments: dict[str, Any], build: Callable[[], Any], case: Case = case
            ) -> None:
                if case.architecture not in architectures.split():
                    return
                key = _key(case, kernel.__name__, arguments)
                two = "second" in key[-1]
                if key[0] == "add_splits" and any(
                    key[:2] == other[:2] and two == ("second" in other[-1]) for other in launches
                ):
                    return
                if key in launches or not all(word in " ".join(key) for word in only.split()):
                    return
                try:
                    result = build()
                except Exception as error:  # whatever the compiler comes up with is a finding
                    result = error
                launches[key] = _Launch(case, key, kernel.__name__, arguments, result)

            _compile_for(case.architecture)
            with _launches(compile):
                call(case)
    rows = []
    for number, launch in enumerate(launches.values()):
        text, row = _measure(launch)
        rows.append(row)
        if listings:
            Path(listings).mkdir(parents=True, exist_ok=True)
            name = re.sub(r"[^\w]+", "-", " ".join(launch.key))
            Path(listings, f"{triton.__version__}-{number:03}-{name}.s").write_text(text)
    return {
        "version": triton.__version__,
        "rows": rows,
        "unreached": _unreached(chosen, rows, architectures) if not only else [],
    }


_PHILOX = ("-0x2daee0ad", "-0x326172a9", "0xd2511f53", "0xcd9e8d57")


def _special(instruction: Any) -> bool:
    return instruction.opcode.startswith(
        ("MUFU", "v_sin_", "v_cos_", "v_log_", "v_sqrt_", "v_rcp_", "v_rsq_")
    )


def _tensor(instruction: Any) -> bool:
    # HMMA, HGMMA, UTCHMMA; HFMA2.MMA is none.
    return instruction.opcode.split(".")[0].endswith("MMA") or instruction.opcode.startswith("v_mfma")


def _wide_multiply(instruction: Any) -> bool:
    """Of Philox. AMD keeps the multipliers in registers; there any multiply that gives 64 bits is taken for one."""
    if instruction.opcode.startswith(("v_mad_u64_u32", "v_mul_hi_u32")):
        return True
    return instruction.opcode.startswith("IMAD") and any(c in instruction.text for c in _PHILOX)


def _copy(instruction: Any) -> bool:
    return instruction.opcode.startswith(("LDG", "global_load", "buffer_load"))


def _multiply_add(instruction: Any) -> bool:
    return instruction.opcode.startswith(("FFMA", "v_fma_f32", "v_fmac_f32", "v_pk_fma_f32"))


def _measure(launch: _Launch) -> tuple[str, Row]:
    name, target, dtype, noise, *_ = launch.key
    if isinstance(launch.result, Exception):
        problem = f"does not compile: {type(launch.result).__name__}: {launch.result}"[:500]
        return "", Row(*launch.key, 0.0, "-", 0, None, None, 0, 0, launch.case.rows, (problem,))
    from . import reader as machine_code

    asm = launch.result.asm
    shared = launch.result.metadata.shared
    problems = []
    if "cubin" in asm:
        text, usage = _disassemble(asm["cubin"])
        code = machine_code.sass(text, launch.kernel)
        registers = usage["REG"]
        problems += [f"{usage[k]} bytes of {k}" for k in ("STACK", "LOCAL") if usage[k]]
        spills = [i.text for i in code if i.opcode.startswith(("LDL", "STL"))]
    else:
        text = asm["amdgcn"]
        code = machine_code.amdgcn(text, launch.kernel)
        figures = {k: int(v) for k, v in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
        registers = figures["vgpr_count"] + figures["agpr_count"]
        for k in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
            if figures[k]:
                problems.append(f"{k} is {figures[k]}")
        spills = [i.text for i in code if i.opcode.startswith("scratch_")]
        problems += [f"PTX in {k}: {p}" for k in ("llir", "amdgcn") for p in ("prmt.b32", ".approx", "shl.b32")
                     if p in asm[k]]  # fmt: skip
        if noise == "gaussian":
            used = {i.opcode for i in code}
            wanted = ("v_sin_f32", "v_cos_f32", "v_log_f32", "v_sqrt_f32")
            problems += [f"no {w}" for w in wanted if not any(u.startswith(w) for u in used)]
    if spills:
        problems.append(f"{len(spills)} accesses to local memory, the first {spills[0]}")

    try:
        body = _body(name, dtype, code)
    except ValueError as error:
        return text, Row(
            *launch.key, 0.0, "-", 0, None, None, registers, shared, launch.case.rows, (*problems, str(error))
        )
    if calls := [i.text for i in body if i.opcode.startswith("CALL")]:
        problems.append(f"calls inside what is counted: {calls[0]}")
    arguments = launch.arguments
    elements = arguments.get("BLOCK") or arguments["BLOCK_N"] * (
        arguments.get("BLOCK_K") or arguments["BLOCK_M"]
    )
    per_thread = elements / (_CHIPS[target][2] * arguments["num_warps"])
    tensor = (
        Counter(i.opcode.split(".")[0] for i in body if _tensor(i))
        if name in ("forward", "input_grad", "adapter_grads")
        else {}
    )
    row = Row(
        *launch.key,
        round(len(body) / per_thread, 2),
        ", ".join(f"{count} {opcode}" for opcode, count in tensor.items()) or "-",
        sum(map(_special, body)),
        _hidden(body),
        len(machine_code.exposed_waits(body)) if any("HGMMA" in opcode for opcode in tensor) else None,
        registers,
        shared,
        launch.case.rows,
        (),
    )
    return text, row._replace(problems=(*problems, *_problems(row, arguments)))


def _body(name: str, dtype: str, code: list[Any]) -> list[Any]:
    """The instructions that are counted."""
    from . import reader as machine_code

    found = machine_code.loops(code)
    if name == "add_splits" or name == "perturb" and not found:
        return [code[i] for i in machine_code.reachable(code)]
    if name == "adapter_grads":
        return [
            code[i] for i in machine_code.innermost(code, found, lambda body: any(map(_tensor, body))).body
        ]
    if name == "row_sq_norms":
        # The adapter has a loop inside.
        found = [
            loop for loop in found if any(_copy(code[i]) and any(map(_multiply_add, code)) for i in loop.body)
        ]
        found = [a for a in found if not any(set(a.body) < set(b.body) for b in found)]
        if len(found) != 1:
            raise ValueError(f"expected one outermost loop that loads, got {len(found)}")
        return [code[i] for i in found[0].body]

    def main(body: list[Any]) -> bool:
        if sum(map(_wide_multiply, body)) < 10:
            return False
        return name == "perturb" or any(_tensor(i) or (dtype == "float32" and _multiply_add(i)) for i in body)

    loop = machine_code.innermost(code, found, main)
    return [code[i] for i in loop.body]


def _hidden(body: list[Any]) -> int | None:
    """Special functions from the first warp-group product to the wait for the last one. The wait may come in the next
    round of the loop."""
    products = [i for i, instruction in enumerate(body) if instruction.opcode.startswith("HGMMA")]
    if not products:
        return None
    around = body[products[0] :] + body[: products[0]]
    last = products[-1] - products[0]
    waits = [
        i
        for i, instruction in enumerate(around)
        if i > last and instruction.opcode.startswith("WARPGROUP.DEPBAR")
    ]
    return sum(map(_special, around[: waits[0]])) if waits else None


def _disassemble(cubin: bytes) -> tuple[str, dict[str, int]]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(path: str, *options: str) -> str:
            return subprocess.run(
                [path, *options, file.name], capture_output=True, text=True, check=True
            ).stdout

        usage = re.findall(
            r"\b(REG|STACK|SHARED|LOCAL):(\d+)", tool(knobs.nvidia.cuobjdump.path, "-res-usage")
        )
        return tool(knobs.nvidia.nvdisasm.path, "-c", "-hex"), {k: int(v) for k, v in usage}


def _problems(row: Row, arguments: dict[str, Any]) -> list[str]:
    """What must hold whatever the table says."""
    processors, most_shared, lanes, most_registers = _CHIPS[row.target]
    found = []
    if row.target == "sm80":
        most_shared = min(most_shared, _SMALL_SHARED)
    if row.shared > most_shared:
        found.append(f"{row.shared} bytes of shared memory, {most_shared} fit")
    threads = lanes * arguments["num_warps"]
    if row.registers > most_registers or (lanes == 32 and row.registers * threads > 65536):
        found.append(f"{row.registers} registers in {threads} threads")
    if row.kernel in ("forward", "input_grad"):
        if row.dtype == "float32" and row.target.startswith("sm") and row.tensor != "-":
            found.append(f"tensor cores in a product in full precision: {row.tensor}")
        wanted = _tensor_wanted(row.target, row.dtype, arguments["BLOCK_M"])
        if wanted and wanted not in row.tensor:
            found.append(f"expected {wanted} in the main loop, got {row.tensor}")
        if row.exposed and arguments["CARRY"] and row.rows > 128 and _regular(row):
            found.append(f"{row.exposed} waits for a global load while no warp-group product runs")
    limit = budget(row)
    if limit is not None and row.instructions > limit:
        found.append(f"{row.instructions} instructions per element of W, the budget is {limit}")
    return found


def _tensor_wanted(target: str, dtype: str, block_m: int) -> str:
    if dtype == "float32":
        return ""  # products in full precision are multiply-adds
    if target == "gfx942":
        return "v_mfma"
    if block_m >= 64 and target in ("sm90", "sm100"):
        return {"sm90": "HGMMA", "sm100": "UTCHMMA"}[target]
    return "HMMA"


def _regular(row: Row) -> bool:
    """Whole tiles of aligned, row-major operands."""
    return not any(_VARIANTS[variant] in row.case for variant in ("odd", "masks", "columns"))


def budget(row: Row) -> float | None:
    """Instructions per element of W that no table may exceed."""
    if row.dtype != "bfloat16" or not _regular(row) or _VARIANTS["apart"] in row.case:
        return None
    if row.kernel in ("forward", "input_grad") and row.rows <= 128:
        return None
    if row.kernel == "row_sq_norms" and "no adapter" not in row.case:
        return None
    return _BUDGETS.get((row.kernel, row.target, row.noise))


# --- Here ---


class Outcome(NamedTuple):
    """Of one version of Triton."""

    version: str
    rows: list[Row]
    unreached: list[str]

    def problems(self) -> list[str]:
        """What is wrong whatever the table says."""
        found = [
            f"Triton {self.version}: {' | '.join(row.key)}: {p}" for row in self.rows for p in row.problems
        ]
        return found + [
            f"no case of bench/machine_code/offline.py compiles {entry}" for entry in self.unreached
        ]


def environment_version() -> str | None:
    """Of the Triton that this process would import."""
    spec = importlib.util.find_spec("triton")
    return None if spec is None or spec.origin is None else _version(Path(spec.origin).parent.parent)


def _version(folder: Path) -> str:
    found = re.search(r"__version__ = ['\"]([^'\"]+)", (folder / "triton" / "__init__.py").read_text())
    if found is None:
        raise ValueError(f"{folder}/triton/__init__.py names no version")
    return found[1]


def folders() -> list[Path | None]:
    """Of the oldest version and of the environment's, which is None; the former where it is not the latter."""
    return [None] if environment_version() == OLDEST else [OLDEST_FOLDER, None]


def measure(
    folder: Path | None, only: str = "", listings: str = "", architectures: Iterable[str] = _CHIPS
) -> Outcome:
    """Compiles in a process of its own, with the Triton in `folder` or, None, that of the environment.

    A result is kept in build/ for as long as the kernels and this program stay as they are.
    """
    version = environment_version() if folder is None else _version(folder)
    digest, names = _digest(), " ".join(architectures)
    path = CACHE / f"{version}-{digest}-{names.replace(' ', '-')}.json"
    if only or listings or not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        env["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR", str(CACHE / "triton"))
        if folder is not None:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder.resolve()), env.get("PYTHONPATH"))))
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            written = Path(scratch, "rows.json")
            command = [
                sys.executable,
                "-m",
                "bench.machine_code.offline",
                str(written),
                only,
                listings,
                names,
            ]
            done = subprocess.run(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            if done.returncode:
                raise RuntimeError(
                    f"Triton {version} in {folder or 'the environment'}:\n{done.stdout[-4000:]}"
                )
            if only or listings:
                return _outcome(written)
            if _digest() != digest:
                raise RuntimeError("the kernels changed while they were compiled: once more, please")
            written.replace(path)
    return _outcome(path)


def _digest() -> str:
    """Of all that decides what is compiled and how it is read."""
    sources = [*(ROOT / "triton_kernels").glob("*.py"), ROOT / "flatlora_kernels" / "backends" / "triton.py"]
    sources += [
        ROOT / "flatlora_kernels" / "spec" / "noise.py",
        Path(__file__),
        Path(__file__).parent / "reader.py",
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]


def _outcome(path: Path) -> Outcome:
    found = json.loads(path.read_text())
    rows = [Row(*row)._replace(problems=tuple(row[-1])) for row in found["rows"]]
    return Outcome(found["version"], rows, found["unreached"])


def measure_all(
    chosen: list[Path | None], only: str = "", listings: str = "", shared: bool = False
) -> list[Outcome]:
    """Two at a time; shared: two versions of Triton take half of the architectures each."""
    halves = [list(_CHIPS)] * len(chosen)
    if shared and len(chosen) == 2:
        halves = [["sm80", "gfx942"], ["sm90", "sm100", "sm120"]]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda folder, half: measure(folder, only, listings, half), chosen, halves))


_HEADINGS = {
    "kernel": "---",
    "target": "---",
    "type": "---",
    "noise": "---",
    "tile": "---",
    "call": "---",
    "instr": "---:",
    "tensor": "---",
    "special": "---:",
    "hidden": "---:",
    "exposed": "---:",
    "regs": "---:",
    "KiB": "---:",
}


def table(outcome: Outcome) -> str:
    lines = [f"## Triton {outcome.version}", "", _line(_HEADINGS), _line(_HEADINGS.values())]
    for row in sorted(outcome.rows):
        figures = (
            f"{row.instructions:.2f}",
            row.tensor,
            row.special,
            *("" if figure is None else figure for figure in (row.hidden, row.exposed)),
        )
        lines.append(_line((*row.key, *figures, row.registers, f"{row.shared / 1024:.1f}")))
    return "\n".join(lines)


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


class Committed(NamedTuple):
    """What the table says of one row; all may only go down."""

    instr: float
    special: float
    KiB: float


def committed(text: str) -> dict[str, dict[tuple[str, ...], Committed]]:
    """By version and row, of the tables in docs/kernels.md."""
    found: dict[str, dict[tuple[str, ...], Committed]] = {}
    names = list(_HEADINGS)
    version = ""
    for line in text.splitlines():
        if heading := re.match(r"## Triton (\S+)$", line):
            version = heading[1]
            found[version] = {}
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if (
            version
            and line.startswith("|")
            and len(cells) == len(names)
            and cells[0] not in ("kernel", "---")
        ):
            named = dict(zip(names, cells, strict=True))
            found[version][tuple(cells[:6])] = Committed(
                *(float(named[field]) for field in Committed._fields)
            )
    return found


def compare(
    outcome: Outcome, tables: dict[str, dict[tuple[str, ...], Committed]], slack: float = SLACK
) -> list[str]:
    """Where what was measured does not match the tables, or exceeds them by more than `slack`.

    A version that has no table is held to the highest figure of those that have.
    """
    if not tables:
        return [f"no table in docs/kernels.md; {REGENERATE}"]
    versions = [outcome.version] if outcome.version in tables else list(tables)
    found = []
    measured = {row.key: row for row in outcome.rows}
    for key, row in measured.items():
        known = [tables[version][key] for version in versions if key in tables[version]]
        name = f"Triton {outcome.version}: {' | '.join(key)}"
        if not known:
            found.append(f"{name}: not in docs/kernels.md; {REGENERATE}")
            continue
        for field, value in zip(Committed._fields, _figures(row), strict=True):
            most = max(getattr(row, field) for row in known)
            if value > most * slack:
                found.append(f"{name}: {field} {value}, docs/kernels.md has {most}, which may only go down")
    targets = {row.target for row in outcome.rows}
    stale = {key for version in versions for key in tables[version] if key[1] in targets} - set(measured)
    found += [
        f"docs/kernels.md has a row that nothing compiles: {' | '.join(k)}; {REGENERATE}"
        for k in sorted(stale)
    ]
    return found


def _figures(row: Row) -> Committed:
    return Committed(round(row.instructions, 2), row.special, round(row.shared / 1024, 1))


_TEXT = f"""# What the compiler makes of the Triton kernels

Written by `{REGENERATE}`; compiled without a GPU, and checked by
`tests/triton_kernels/test_triton_compile.py`. `make test-compile` installs Triton {OLDEST}, the oldest that is
supported, beside the environment's and runs that test. What the kernels take on a GPU is in
[performance.md](performance.md).

The real launchers run on tensors without memory, Triton's own JIT specialises and compiles what they launch, and the
machine code is read: nvdisasm's listing for NVIDIA, the compiler's assembly for AMD. The main loop is found by
dominators in the graph of its branches: the innermost natural loop that contains the products and the multiplies of
Philox, with all code that leads back into it, wherever that lies.

Compiled are, for sm_80, sm_90, sm_100 and gfx942, all tiles of `triton_kernels/configs.py` that the architecture can
get: bfloat16, tf32 and full float32 with gaussian noise, an adapter of rank 16 and sizes that are multiples of the
tile, and bfloat16 with odd sizes and offsets (nothing aligned, no descriptors, masks). With many rows, on all four:
Rademacher noise; on sm_90 and gfx942: float16, and antithetic samples with bias and without an adapter; on sm_90: sizes
that are multiples of 8 and not of the tile, column-major operands, rank 64; on sm_120 the tiles of many rows. With few
rows, on sm_90: Rademacher noise, and a call that is not split. `perturb`, `row_sq_norms` (no adapter, ranks 16 and 64)
and the sum of partial products (one call, and one with a second sum) are on all four. So is split noise. 16
rows that make u = x A^T on the way are on NVIDIA's three, `adapter_grads` on sm_90 and sm_100.

Of each, these must hold: no spills, no stack, no local memory; shared memory within a block's limit (163 KiB on sm_80
and 99 KiB for its tiles, which sm_86, sm_89 and sm_120 get too; 227 KiB on sm_90 and sm_100; 64 KiB on gfx942);
tensor-core instructions in the main loop, other than in full float32 (HGMMA and UTCHMMA from 64 rows a tile on); on
gfx942 its own special functions and no PTX. Instructions per element of W are at most 17.5 (forward) and 18.6 (input
gradient) on sm_90, 19.2 and 20.6 on sm_80, 12.5 with Rademacher noise, for bfloat16 and more than 128 rows; 15.2 in
`perturb`, 5.5 in `row_sq_norms` without an adapter.

On sm_90 the tensor cores must not idle because a load is late. The control bits of the instructions (`nvdisasm -hex`)
say on which scoreboard a result arrives and for which ones an instruction waits. From the wait for the last HGMMA of a
step to the first HGMMA of the next, nothing may wait for a global load that was not already under way at the step's
first HGMMA: `exposed` is 0. That holds for all types and both noises, with more than 128 rows of aligned operands. It
is not asked of loops that do not carry a tile from step to step, which multiply what they have just loaded; of up to
128 rows, where several blocks share a processor and one multiplies while another waits; nor of sizes that are no
multiples of the tile, whose masks the compiler orders as it likes. `hidden` is for information: special functions that
stand under the products may still wait there for a load, so it says nothing about time.

The figures below may only go down. The test fails where `instr`, `special` or `KiB` is more than 7 % above the table,
and where its rows are not those that are compiled. `{REGENERATE}` refuses to write a figure that went
up, unless `--accept` says that it is meant to. A release of Triton that has no table is held to the highest of the
others. `python -m bench offline --only sm90 forward --listings FOLDER` prints some rows and keeps their machine code.

| column | |
| --- | --- |
| tile | rows of x, outputs, steps of the contraction; `perturb` and `row_sq_norms`: rows and columns of W |
| call | rows of x and what is special; `split`: the contraction is, and partial sums are added afterwards |
| instr | instructions of the main loop per element of W that a thread holds; kernels without a loop: all there are |
| tensor | instructions of the tensor cores in the main loop |
| special | special functions (MUFU; v_sin, v_log and the like) in the main loop, of one thread |
| hidden | those from the first HGMMA to the wait for the last, which run beside the tensor cores; not compared |
| exposed | waits for a global load while no HGMMA runs, see above; not compared |
| regs | registers of a thread; not compared |
| KiB | shared memory of a block |
"""


def document(outcomes: list[Outcome]) -> str:
    return "\n\n".join([_TEXT.rstrip(), *map(table, outcomes)]) + "\n"


def main(args: argparse.Namespace) -> int:
    """`python -m bench offline`."""
    chosen: list[Path | None] = list(args.triton) or folders()
    for folder in chosen:
        if folder is None and environment_version() is None:
            raise SystemExit("triton is not installed here: pip install triton")
        if folder is not None and not (folder / "triton").is_dir():
            raise SystemExit(f"no Triton in {folder}: make {OLDEST_FOLDER.relative_to(ROOT)}")
    outcomes = measure_all(chosen, " ".join(args.only), str(args.listings or ""))
    before = committed(TABLE.read_text()) if TABLE.exists() else {}
    problems = [p for outcome in outcomes for p in outcome.problems()]
    print("\n\n".join(map(table, outcomes)))
    if args.write:
        higher = [p for o in outcomes for p in compare(o, before, slack=1.0) if "may only go down" in p]
        if higher and not args.accept:
            print("\nNot written:", *higher, sep="\n  ")
            return 1
        TABLE.write_text(document(outcomes))
        print(f"\nWritten: {TABLE}")
    elif not args.only:
        problems += [p for outcome in outcomes for p in compare(outcome, before)]
    if problems:
        print("\nWrong:", *problems, sep="\n  ")
    return 1 if problems else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="docs/kernels.md")
    parser.add_argument("--accept", action="store_true", help="with --write: figures that went up, too")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="rows whose names contain these words"
    )
    parser.add_argument("--listings", type=Path, help="folder for the machine code")
    parser.add_argument(
        "--triton", nargs="+", type=Path, default=[], metavar="FOLDER",
        help=f"installed with pip --target; default build/triton-{OLDEST} and the environment's",
    )  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(_work(*sys.argv[2:5])))
