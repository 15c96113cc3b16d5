"""What nvcc makes of the CUDA kernels, without a GPU: `python -m bench compiled`."""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from . import reader, tables
from .tables import ROOT

CACHE = ROOT / "build" / "compiled"
# The sources that the page was compared with, by file and target.
COMPARED = Path(__file__).with_name("compiled.json")
PAGE = tables.Page(
    path=ROOT / "docs" / "internals" / "cuda_kernels.md",
    regenerate="python -m bench compiled --write",
    columns={"kernel": "", "target": "", "instr": ".2f", "besides": ".2f", "values": "d", "tensor": ""}
    | {"special": "d", "registers": "d"},
    names=2,
    compared=("instr", "registers"),
    slack=1.03,
    between=", ",
)

Job = tuple[str, str]  # file, target
TARGETS = ("80", "86", "89", "90", "90a", "100")
# The options of CMakeLists.txt.
OPTIONS = ("-std=c++17", "-O3", "-fmad=false", "-DNDEBUG")

# Instructions per value of noise at most, whatever the table says: all, in `perturb` and in producer warps, and those
# besides the products and their operands where the same warps multiply. The first that names a kernel holds.
_BUDGETS = {
    # Of a packed W also what decodes it, on every way of the branches.
    ("perturb_packed_rows", "gaussian"): 25.0,
    ("perturb_packed_rows<bf16", "near_gaussian"): 17.0,
    ("perturb_packed_rows", "near_gaussian"): 20.0,
    ("perturb_packed_rows<bf16", "rademacher"): 14.5,
    ("perturb_packed_rows", "rademacher"): 17.0,
    ("linear_packed_sm80", "near_gaussian"): 16.5,
    ("linear_packed_sm80", "gaussian"): 24.5,
    ("linear_packed_sm80", "rademacher"): 14.0,
    ("perturb", "gaussian"): 17.0,
    ("perturb<bf16", "near_gaussian"): 6.0,
    ("perturb<f16", "near_gaussian"): 9.5,
    ("perturb<bf16", "rademacher"): 4.5,
    ("perturb", "rademacher"): 10.0,
    ("linear_sm80", "gaussian"): 17.0,
    # Where what rounding leaves is stored as well, and in float16, sums are float32's.
    ("linear_sm80", "near_gaussian, 3, apart"): 14.0,
    ("linear_sm80<bf16", "near_gaussian"): 9.5,
    ("linear_sm80<f16", "near_gaussian"): 12.5,
    ("linear_sm80", "rademacher, 3, apart"): 11.5,
    ("linear_sm80<bf16", "rademacher"): 8.0,
    ("linear_sm80", "rademacher"): 11.0,
    # What draws for other blocks: on every way of the branches, and with the loop for the adapter's tiles.
    ("linear_sm90_ahead", "gaussian"): 22.0,
    ("linear_sm90_ahead<bf16", "near_gaussian"): 11.0,
    ("linear_sm90_ahead<f16", "near_gaussian"): 14.0,
    ("linear_sm90_ahead<bf16", "rademacher"): 8.0,
    ("linear_sm90_ahead", "rademacher"): 10.5,
    ("linear_sm90", "gaussian"): 20.0,
    ("linear_sm90<bf16", "near_gaussian"): 9.5,
    ("linear_sm90<f16", "near_gaussian"): 12.5,
    # Four rows to a thread: all 16 of a call take 4.5, and more time (docs/internals/performance.md).
    ("linear_sm90<bf16", "rademacher"): 8.5,
    ("linear_sm90", "rademacher"): 12.5,
}


class Row(NamedTuple):
    """One kernel of one target. `instr` and `values`: of the main loop, in one thread."""

    kernel: str
    target: str
    instr: float | None  # instructions per value of noise drawn; None = draws none
    besides: float | None  # of these, those that are no products and load no operands of them
    values: int | None
    tensor: str
    special: int
    registers: int
    problems: tuple[str, ...] = ()


# --- From a source to a cubin ---


def sources() -> dict[str, list[str]]:
    """csrc/sources.txt: the CUDA files by kind."""
    lines = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines()]
    return {kind: [line[1] for line in lines if line[:1] == [kind]] for kind in ("cuda", "cuda-sm90a")}


def jobs() -> list[Job]:
    """(file, target): sm_90a's own kernels for it alone, the others for all."""
    files = sources()
    both = [(path, target) for path in files["cuda"] for target in TARGETS if target != "90a"]
    return both + [(path, "90a") for path in files["cuda-sm90a"]]


def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def nvdisasm() -> str | None:
    """On PATH, beside nvcc, or the one that Triton brings."""
    places = [os.environ.get("PATH", os.defpath)]
    if compiler := nvcc():
        places.append(str(Path(compiler).resolve().parent))
    if spec := importlib.util.find_spec("triton"):
        places += [f"{place}/backends/nvidia/bin" for place in spec.submodule_search_locations or ()]
    return shutil.which("nvdisasm", path=os.pathsep.join(places))


def missing() -> str | None:
    """Why nothing can be compiled or read here."""
    if nvcc() is None:
        return "nvcc is missing: put it on PATH or set CUDACXX"
    if nvdisasm() is None:
        return "nvdisasm is missing: it comes with the CUDA toolkit and with Triton (pip install triton)"
    return None


def _included(path: str) -> set[Path]:
    """The file and all of this repository that it includes."""
    found: set[Path] = set()
    waiting = {(ROOT / path).resolve()}
    while waiting:
        file = waiting.pop()
        found.add(file)
        names = re.findall(r'^#include "(.+)"', file.read_text(), re.M)
        waiting |= {f for name in names if (f := (file.parent / name).resolve()).exists()} - found
    return found


def digest(path: str, target: str) -> str:
    """Of the compiler and of all that it reads."""
    known = repr((reader.run(str(nvcc()), "--version"), OPTIONS, path, target)).encode()
    contents = [file.read_bytes() for file in sorted(_included(path))]
    return hashlib.sha256(b"".join([known, *contents])).hexdigest()[:16]


def _job_name(path: str, target: str) -> str:
    return f"{Path(path).name} sm_{target}"


def remembered(job: Job) -> set[tables.Key] | None:
    """The rows of the page that were compared with what this compiler makes of these very sources; None: none were."""
    found = json.loads(COMPARED.read_text()).get(_job_name(*job))
    if found is None or found["digest"] != digest(*job):
        return None
    return {(kernel, f"sm_{job[1]}") for kernel in found["kernels"]}


def remember(found: dict[Job, list[Row]]) -> None:
    """Those with whose rows nothing is wrong, whatever is with others."""
    known, page = json.loads(COMPARED.read_text()), tables.read(PAGE)
    for job, rows in found.items():
        if not tables.problems(PAGE, "", rows) + tables.compare(PAGE, "", rows, page, targets=()):
            known[_job_name(*job)] = {"digest": digest(*job), "kernels": sorted(row.kernel for row in rows)}
    kept = {name: known[name] for name in sorted(_job_name(*job) for job in jobs()) if name in known}
    COMPARED.write_text(json.dumps(kept, indent=1) + "\n")


def compile(path: str, target: str) -> tuple[Path, str]:
    """The cubin of a file, and what ptxas said; kept in build/ until a source changes."""
    compiler = str(nvcc())
    stem = f"{Path(path).stem}.sm_{target}"
    cubin = CACHE / f"{stem}.{digest(path, target)}.cubin"
    log = cubin.with_suffix(".log")
    if not log.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{stem}.*"):
            old.unlink()
        code = f"-gencode=arch=compute_{target},code=sm_{target}"
        command = [compiler, *OPTIONS, code, "-Xptxas=-v", "-cubin", "-o", str(cubin), str(ROOT / path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}")
        log.write_text(done.stdout)
    return cubin, log.read_text()


# --- What ptxas and the machine code say ---

_USED = ("stack", "spill stores", "spill loads", "registers")
_USAGE = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def usages(log: str) -> dict[str, dict[str, int]]:
    """What ptxas -v says, by mangled name."""
    return {name: dict(zip(_USED, map(int, used), strict=True)) for name, *used in _USAGE.findall(log)}


def warnings(log: str) -> list[str]:
    """C7510 and its like tell that wgmma is serialised; nothing else may be said either."""
    return [line.strip() for line in log.splitlines() if re.search(r"\(C7\d{3}\)|\bwarning\b", line, re.I)]


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """`flatlora::perturb_kernel<flatlora::gpu::bf16, (flatlora::Noise)1>` as `perturb<bf16, gaussian>`."""
    names = list(mangled)
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True).stdout
    short = {}
    for name, full in zip(names, text.splitlines(), strict=True):
        for number, noise in enumerate(("none", "gaussian", "rademacher", "near_gaussian", "hadamard")):
            full = full.replace(f"(flatlora::Noise){number}", noise)
        full = re.sub(r"\((?:bool|int|anonymous namespace)\)(?:::)?|(?:flatlora|gpu)::", "", full)
        full = full.replace("_kernel", "")
        if full.startswith("linear_sm80"):  # the last argument: split noise
            full = full.replace(", false>", ">").replace(", true>", ", apart>")
        elif full.startswith("linear_packed_sm80"):  # and behind it the bits of a code
            full = re.sub(
                r", (?:false|(true)), (\d)>", lambda m: f", {m[2]} bits{', apart' * bool(m[1])}>", full
            )
        short[name] = full
    return short


def regular(name: str) -> bool:
    """Not one of the kernels for any layout and offset: `perturb` without vectors, the third tile of linear_sm80."""
    any_layout = re.match(r"perturb_packed<|linear_(packed_)?sm80<\w+, \w+, \w+, 2[,>]", name)
    return not name.endswith("false>") and not any_layout


_PHILOX_M1 = ("-0x326172a9", "0xcd9e8d57")


def _calls(body: reader.Body) -> int:
    """Calls of the generator in `body`: each multiplies eight times by its second constant, and once more for each
    block of columns."""
    multiplies = sum(i.opcode.startswith("IMAD") and any(c in i.text for c in _PHILOX_M1) for i in body)
    return multiplies // 8


def _draws(body: reader.Body, name: str) -> int:
    """Values of noise that a thread of the kernel `name` draws in `body`, but for what its irregular layouts add."""
    if logarithms := sum(i.opcode.startswith("MUFU.LG2") for i in body):
        return 2 * logarithms
    if not _calls(body):
        return 0
    if name.startswith("transform"):  # of a row that it takes in
        return 1 if "small" in name else 16
    if "hadamard" in name:  # signs by index: of a patch, or of a chunk at a time
        return 32 if regular(name) else 8
    if name.startswith("linear_sm90_ahead"):
        return _calls(body) * (128 if "rademacher" in name else 16)
    # A patch, of rademacher all 16 rows of a call where a thread has them.
    moved = sum(i.opcode.startswith("PRMT") for i in body)  # signs, to two values each
    whole = name.startswith("perturb") and regular(name) or name.startswith("linear_sm90") and moved >= 64
    return 128 if "rademacher" in name and whole else 32


def _fences_all(opcode: str) -> bool:
    """What barriers with a scope of more than the block become."""
    fence = opcode.startswith("MEMBAR") and not opcode.endswith(".CTA")
    return fence or opcode.startswith(("ERRBAR", "CGAERRBAR", "CCTL"))


def read(listing: str, mangled: str, name: str, target: str, usage: dict[str, int]) -> Row:
    """What there is to say of one kernel."""
    code = reader.sass(listing, mangled)
    everything = [code[i] for i in reader.reachable(code)]
    problems = [f"{usage[k]} bytes of {k}" for k in _USED[:3] if usage[k]]
    loops = reader.loops(code)
    inner = reader.innermost(code, loops, lambda body: _calls(body) > 0)
    # Where one both draws and multiplies, those that do; others than the shortest are for the edges.
    both = [body for body in inner if any(map(reader.is_tensor, body))]
    body = min(both or inner, key=len, default=[])
    if not body and _calls(everything):
        problems.append("no loop that draws noise")
    looping = sorted({i for loop in loops for i in loop})
    hands_over = name.startswith("linear_sm90_ahead")  # to other blocks
    if fences := [code[i].text for i in looping if not hands_over and _fences_all(code[i].opcode)]:
        problems.append(f"{len(fences)} GPU-wide fences in loops, the first {fences[0]}")
    problems += reader.faults(everything, body, "the main loop")
    if name.startswith("linear"):
        used = {i.opcode.split(".")[0] for i in everything}
        wanted = {"HGMMA", "UTMALDG"} if target == "90a" else {"HMMA", "LDSM", "LDGSTS"}
        wanted |= {"STSM", "UTMASTG", "NANOSLEEP"} if hands_over else set()
        problems += [f"no {w}" for w in sorted(wanted - used)]
    values = _draws(body, name)
    besides = [i for i in body if not reader.is_tensor(i) and not i.opcode.startswith("LDSM")]
    per_value = [round(len(part) / values, 2) if values else None for part in (body, besides)]
    tensor, special = reader.tensor_cores(everything), sum(map(reader.is_special, body))
    registers = usage["registers"]
    return Row(name, f"sm_{target}", *per_value, values or None, tensor, special, registers, tuple(problems))


def _over_budget(row: Row) -> list[str]:
    if "float" in row.kernel or not regular(row.kernel) or row.besides is None:
        return []
    for (prefix, noise), most in _BUDGETS.items():
        if row.kernel.startswith(prefix) and f" {noise}" in row.kernel:
            over = row.besides > most
            return [f"{row.besides} instructions per value besides the products, the budget is {most}"] * over
    return []


def measure(path: str, target: str) -> list[Row]:
    cubin, log = compile(path, target)
    found = usages(log)
    listing = reader.run(str(nvdisasm()), "-c", str(cubin)) if found else ""
    names = short_names(found)
    rows = [read(listing, mangled, names[mangled], target, usage) for mangled, usage in found.items()]
    return [row._replace(problems=(*row.problems, *warnings(log), *_over_budget(row))) for row in rows]


def measure_all(chosen: list[Job], workers: int = 2) -> dict[Job, list[Row]]:
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return dict(zip(chosen, pool.map(lambda job: measure(*job), chosen), strict=True))


def all_rows(found: dict[Job, list[Row]]) -> list[Row]:
    return [row for rows in found.values() for row in rows]


def main(args: argparse.Namespace) -> int:
    """`python -m bench compiled`."""
    if reason := missing():
        raise SystemExit(reason)
    chosen = [job for job in jobs() if all(word in " ".join(job) for word in args.only)]
    found = measure_all(chosen, args.jobs)
    wrong = tables.conclude(PAGE, {"": all_rows(found)}, args)
    remember(found)
    return wrong


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tables.add_arguments(parser, PAGE, "files and targets that")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
