"""What nvcc makes of the CUDA kernels, without a GPU: `python -m bench compiled`."""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from . import reader as machine_code

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "cuda_kernels.md"
CACHE = ROOT / "build" / "compiled"
REGENERATE = "python -m bench compiled --write"
SLACK = 1.03

TARGETS = ("80", "86", "89", "90", "90a", "100")
# The options of CMakeLists.txt.
OPTIONS = ("-std=c++17", "-O3", "-fmad=false", "-DNDEBUG")

# Instructions per value of noise at most, whatever the table says: all, in `perturb` and in producer warps, and those
# besides the products and their operands where the same warps multiply.
_BUDGETS = {
    ("perturb", "gaussian"): 17.0,
    ("perturb", "rademacher"): 10.0,
    ("linear_sm80", "gaussian"): 17.0,
    ("linear_sm80", "rademacher"): 11.0,
    ("linear_sm90", "gaussian"): 20.0,
    (
        "linear_sm90",
        "rademacher",
    ): 12.5,  # on an H100 waiting for W costs more than to hold a second tile of it
}


class Row(NamedTuple):
    """One kernel of one target. `instr` and `values`: of the main loop, in one thread."""

    kernel: str
    target: str
    instr: float | None  # instructions per value of noise drawn; None = draws none
    besides: float | None  # of these, those that are no products and load no operands of them
    values: int
    tensor: str
    special: int
    registers: int
    shared: int  # static
    problems: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.kernel, self.target


def sources() -> dict[str, list[str]]:
    """csrc/sources.txt: the CUDA files by kind."""
    found: dict[str, list[str]] = {"cuda": [], "cuda-sm90a": []}
    for line in (ROOT / "csrc/sources.txt").read_text().splitlines():
        kind, _, path = line.partition(" ")
        if kind in found:
            found[kind].append(path.strip())
    return found


def jobs() -> list[tuple[str, str]]:
    """(file, target): sm_90a's own kernels for it alone, the others for all."""
    files = sources()
    both = [(path, target) for path in files["cuda"] for target in TARGETS if target != "90a"]
    return both + [(path, "90a") for path in files["cuda-sm90a"]]


def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def nvdisasm() -> str | None:
    """Beside nvcc, or the one that Triton brings."""
    if found := shutil.which("nvdisasm"):
        return found
    if compiler := nvcc():
        beside = Path(compiler).resolve().with_name("nvdisasm")
        if beside.exists():
            return str(beside)
    spec = importlib.util.find_spec("triton")
    if spec and spec.submodule_search_locations:
        inside = Path(spec.submodule_search_locations[0], "backends/nvidia/bin/nvdisasm")
        if inside.exists():
            return str(inside)
    return None


def missing() -> str | None:
    """Why nothing can be compiled or read here."""
    if nvcc() is None:
        return "nvcc is missing: put it on PATH or set CUDACXX"
    if nvdisasm() is None:
        return "nvdisasm is missing: it comes with the CUDA toolkit and with Triton (pip install triton)"
    return None


def _included(path: str) -> set[str]:
    """The file and all of this repository that it includes."""
    found: set[str] = set()
    waiting = [(ROOT / path).resolve()]
    while waiting:
        file = waiting.pop()
        if str(file) in found or not file.exists():
            continue
        found.add(str(file))
        waiting += [
            (file.parent / name).resolve() for name in re.findall(r'^#include "(.+)"', file.read_text(), re.M)
        ]
    return found


def compile(path: str, target: str) -> tuple[Path, str]:
    """The cubin of a file, and what ptxas said; kept in build/ until a source changes."""
    compiler = nvcc()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((version, OPTIONS, path, target)).encode())
    for file in sorted(_included(path)):
        digest.update(Path(file).read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    stem = f"{Path(path).stem}.sm_{target}"
    cubin = CACHE / f"{stem}.{digest.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".log")
    if not log.exists():
        for old in CACHE.glob(f"{stem}.*"):
            old.unlink()
        code = f"-gencode=arch=compute_{target},code=sm_{target}"
        command = [compiler, *OPTIONS, code, "-Xptxas=-v", "-cubin", "-o", str(cubin), str(ROOT / path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}")
        log.write_text(done.stdout)
    return cubin, log.read_text()


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """`flatlora::perturb_kernel<flatlora::gpu::bf16, (flatlora::Noise)1>(...)` as `perturb<bf16, gaussian>`."""
    names = list(mangled)
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout
    short = {}
    for name, full in zip(names, text.splitlines(), strict=True):
        full = re.sub(
            r"\(flatlora::Noise\)(\d)", lambda m: ("none", "gaussian", "rademacher")[int(m[1])], full
        )
        full = re.sub(r"\((?:bool|int|anonymous namespace)\)(?:::)?", "", full)
        full = re.sub(r"(?:\(anonymous namespace\)|flatlora|gpu)::", "", full)
        full = full.removeprefix("void ").replace("_kernel", "")
        depth, end = 0, len(full)
        for i, c in enumerate(full):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        # The last argument of linear_sm80: split noise.
        if full.startswith("linear_sm80"):
            full = full[:end].removesuffix(", false>").removesuffix(", true>") + (
                ", apart>" if full[:end].endswith(", true>") else ">"
            )
            end = len(full)
        short[name] = full[:end]
    return short


_PHILOX_M1 = ("-0x326172a9", "0xcd9e8d57")


def _draws(body: list[machine_code.Instruction], regular: bool = True) -> int:
    """Values of noise that a thread draws in `body`. A call of the generator multiplies eight times by its second
    constant, and once more for each block of columns; it serves 8 gaussians, or a thread's 32 signs. Irregular kernels
    have a second call for rows that begin within a word."""
    multiplies = sum(i.opcode.startswith("IMAD") and any(c in i.text for c in _PHILOX_M1) for i in body)
    calls = multiplies // 8
    if logarithms := sum(i.opcode.startswith("MUFU.LG2") for i in body):
        return 2 * logarithms
    return 32 * (calls if regular else min(calls, 1))


def _tensor(opcode: str) -> bool:
    return opcode.split(".")[0].endswith("MMA")


def _main_loop(code: list[machine_code.Instruction]) -> list[machine_code.Instruction]:
    """Of the innermost loops that draw noise, or that draw and multiply where one does both, the shortest: others are
    for the edges."""
    bodies = {loop: [code[i] for i in loop.body] for loop in machine_code.loops(code)}
    bodies = {loop: body for loop, body in bodies.items() if _draws(body)}
    inner = [
        body for loop, body in bodies.items() if not any(set(other.body) < set(loop.body) for other in bodies)
    ]
    both = [body for body in inner if any(_tensor(i.opcode) for i in body)]
    if not inner:
        raise ValueError("no loop that draws noise")
    return min(both or inner, key=len)


def _fences_all(opcode: str) -> bool:
    """What barriers with a scope of more than the block become."""
    return opcode.startswith(("ERRBAR", "CGAERRBAR", "CCTL")) or (
        opcode.startswith("MEMBAR") and not opcode.endswith(".CTA")
    )


def read(listing: str, mangled: str, name: str, target: str, usage: dict[str, int]) -> Row:
    """What there is to say of one kernel."""
    code = machine_code.sass(listing, mangled)
    everything = [code[i] for i in machine_code.reachable(code)]
    problems = [f"{usage[k]} bytes of {k}" for k in ("stack", "spill stores", "spill loads") if usage.get(k)]
    if local := [i.text for i in everything if i.opcode.startswith(("LDL", "STL"))]:
        problems.append(f"{len(local)} accesses to local memory, the first {local[0]}")
    used = {i.opcode.split(".")[0] for i in everything}
    noisy = _draws(everything) > 0
    body: list[machine_code.Instruction] = []
    if noisy:
        try:
            body = _main_loop(code)
        except ValueError as error:
            problems.append(str(error))
    looping = {i for loop in machine_code.loops(code) for i in loop.body}
    if fences := [code[i].text for i in sorted(looping) if _fences_all(code[i].opcode)]:
        problems.append(f"{len(fences)} GPU-wide fences in loops, the first {fences[0]}")
    if calls := [i.text for i in body if i.opcode.startswith("CALL")]:
        problems.append(f"calls inside the main loop: {calls[0]}")
    values = _draws(body, regular(name))
    besides = [i for i in body if not _tensor(i.opcode) and not i.opcode.startswith("LDSM")]
    products = Counter(i.opcode.split(".")[0] for i in everything if _tensor(i.opcode))
    if name.startswith("linear"):
        wanted = {"HGMMA", "UTMALDG"} if target == "90a" else {"HMMA", "LDSM", "LDGSTS"}
        problems += [f"no {w}" for w in sorted(wanted - used)]
    return Row(
        name,
        f"sm_{target}",
        round(len(body) / values, 2) if values else None,
        round(len(besides) / values, 2) if values else None,
        values,
        ", ".join(f"{count} {opcode}" for opcode, count in sorted(products.items())) or "-",
        sum(i.opcode.startswith("MUFU") for i in body),
        usage["registers"],
        usage.get("shared", 0),
        tuple(problems),
    )


def usages(log: str) -> dict[str, dict[str, int]]:
    """What ptxas -v says, by mangled name."""
    found: dict[str, dict[str, int]] = {}
    name = ""
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = entry[1]
            found[name] = {}
        elif name and (frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)):
            found[name] |= dict(
                zip(("stack", "spill stores", "spill loads"), map(int, frame.groups()), strict=True)
            )
        elif name and (used := re.search(r"Used (\d+) registers", line)):
            found[name]["registers"] = int(used[1])
            if smem := re.search(r"(\d+) bytes smem", line):
                found[name]["shared"] = int(smem[1])
    return found


def warnings(log: str) -> list[str]:
    """C7510 and its like tell that wgmma is serialised; nothing else may be said either."""
    return [line.strip() for line in log.splitlines() if re.search(r"\(C7\d{3}\)|\bwarning\b", line, re.I)]


def measure(path: str, target: str) -> list[Row]:
    cubin, log = compile(path, target)
    found = usages(log)
    if not found:
        return []
    tool = nvdisasm()
    assert tool is not None
    listing = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    names = short_names(found)
    rows = [read(listing, mangled, names[mangled], target, usage) for mangled, usage in found.items()]
    return [row._replace(problems=(*row.problems, *warnings(log), *_over_budget(row))) for row in rows]


def _over_budget(row: Row) -> list[str]:
    for (prefix, noise), most in _BUDGETS.items():
        if not row.kernel.startswith(prefix) or noise not in row.kernel or row.besides is None:
            continue
        if "float" not in row.kernel and regular(row.kernel) and row.besides > most:
            return [f"{row.besides} instructions per value besides the products, the budget is {most}"]
    return []


def regular(name: str) -> bool:
    """Not one of the kernels for any layout and offset: `perturb` without vectors, the third tile of linear_sm80."""
    any_layout = name.startswith("linear_sm80") and name.endswith((" 2>", " 2, apart>"))
    return not name.endswith("false>") and not any_layout


def measure_all(chosen: list[tuple[str, str]], workers: int = 2) -> list[Row]:
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return [row for rows in pool.map(lambda job: measure(*job), chosen) for row in rows]


_HEADINGS = {
    "kernel": "---",
    "target": "---",
    "instr": "---:",
    "besides": "---:",
    "values": "---:",
    "tensor": "---",
    "special": "---:",
    "regs": "---:",
}


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(rows: list[Row]) -> str:
    lines = [_line(_HEADINGS), _line(_HEADINGS.values())]
    for row in sorted(rows):
        drawn = ("", "", "") if row.instr is None else (f"{row.instr:.2f}", f"{row.besides:.2f}", row.values)
        lines.append(_line((row.kernel, row.target, *drawn, row.tensor, row.special, row.registers)))
    return "\n".join(lines)


class Committed(NamedTuple):
    """What the table says of one row; all may only go down."""

    instr: float
    registers: int


def committed(text: str) -> dict[tuple[str, str], Committed]:
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(_HEADINGS) and cells[1].startswith("sm_"):
            found[cells[0], cells[1]] = Committed(float(cells[2] or 0), int(cells[-1]))
    return found


def compare(rows: list[Row], known: dict[tuple[str, str], Committed], slack: float = SLACK) -> list[str]:
    """Where what was measured exceeds the table by more than `slack`, or is not in it."""
    problems = []
    for row in rows:
        name = f"{row.kernel}, {row.target}"
        if row.key not in known:
            problems.append(f"{name}: not in docs/cuda_kernels.md; {REGENERATE}")
            continue
        before = known[row.key]
        for what, value, most in (
            ("instr", row.instr or 0, before.instr),
            ("registers", row.registers, before.registers),
        ):
            if value > most * slack:
                problems.append(
                    f"{name}: {what} {value}, docs/cuda_kernels.md has {most}, which may only go down"
                )
    return problems


def stale(rows: list[Row], known: dict[tuple[str, str], Committed]) -> list[str]:
    """Rows of the table that nothing compiles, given all that is compiled."""
    return [
        f"docs/cuda_kernels.md has a row that nothing compiles: {', '.join(key)}; {REGENERATE}"
        for key in sorted(set(known) - {row.key for row in rows})
    ]


_TEXT = f"""# What nvcc makes of the CUDA kernels

Written by `{REGENERATE}`, without a GPU; checked by `tests/csrc/test_cuda_compile.py`.
What the kernels take on a GPU is in [performance.md](performance.md).

Of each kernel these must hold: no spills, no stack, no local memory; no warning of ptxas (C7510 and the like tell that
`wgmma` is serialised); no fence of the whole GPU in a loop (`MEMBAR.*.GPU`, `ERRBAR`, `CCTL`); tensor cores and
asynchronous copies in the products (`HMMA`, `LDSM` and `LDGSTS`; on sm_90a `HGMMA` and `UTMALDG`).

The main loop is the innermost natural loop, found by dominators in the graph of branches, that multiplies by
Philox's constants; where a kernel has a second one for the edges, the shorter. Where producer warps draw the noise, it
is theirs. The figures may only go down: the test fails where `instr` or `regs` is more than {SLACK - 1:.0%} above the
table, and `{REGENERATE}` refuses to write a figure that went up, unless `--accept` says that it is
meant to.

| column | |
| --- | --- |
| kernel | the function, with the parameters of its template |
| instr | instructions of the main loop per value of noise that a thread draws in it; empty: draws none |
| besides | of these, those that neither multiply matrices nor load operands of that (`LDSM`) |
| values | values of noise that a thread draws in one round of the loop |
| tensor | instructions of the tensor cores in the whole kernel |
| special | special functions (MUFU) in the main loop |
| regs | registers of a thread |
"""


def document(rows: list[Row]) -> str:
    return f"{_TEXT}\n{table(rows)}\n"


def problems(rows: list[Row]) -> list[str]:
    return [f"{row.kernel}, {row.target}: {problem}" for row in rows for problem in row.problems]


def main(args: argparse.Namespace) -> int:
    """`python -m bench compiled`."""
    if reason := missing():
        raise SystemExit(reason)
    chosen = [job for job in jobs() if all(word in " ".join(job) for word in args.only)]
    rows = measure_all(chosen, args.jobs)
    known = committed(TABLE.read_text()) if TABLE.exists() else {}
    print(table(rows))
    wrong = problems(rows)
    if args.write:
        if args.only:
            raise SystemExit("--write takes no --only")
        higher = [p for p in compare(rows, known, slack=1.0) if "may only go down" in p]
        if higher and not args.accept:
            print("\nNot written:", *higher, sep="\n  ")
            return 1
        TABLE.write_text(document(rows))
        print(f"\nWritten: {TABLE}")
    else:
        wrong += compare(rows, known) + ([] if args.only else stale(rows, known))
    if wrong:
        print("\nWrong:", *wrong, sep="\n  ")
    return 1 if wrong else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help="docs/cuda_kernels.md")
    parser.add_argument("--accept", action="store_true", help="with --write: figures that went up, too")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="files and targets that contain these words"
    )
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
