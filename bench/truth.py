"""What a GPU says first: is each kernel right, does it give the same bits again, and how long does it take?

    python -m bench.truth driver
    python -m bench.truth check [--limit SECONDS] [--each SECONDS]
    python -m bench.truth time [--limit SECONDS] [--rows 16,256,2048,8192]

`driver` prints versions and how many clusters run at once. `check` runs each family of kernels in a process of its
own, all at once: one that hangs or breaks its CUDA context costs the others nothing. `time` replays CUDA graphs in
turns from a cold L2 and prints ratios to the vendor's product in the same rounds; `lora` is what PEFT computes, by the
same operators without its modules. Both write a line of JSON to OUT/truth-{check,time}.jsonl as soon as a result is
there.
`--library NAME=FILE`, repeated, takes other builds of libflatlora_cuda in turns with the installed one, as cuda@NAME.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatlora_kernels import backends
from flatlora_kernels.backends.shared import panel
from flatlora_kernels.spec.noise import KINDS, Draw

# Of the relative error ||y - exact|| / ||exact||. In 16 bits rounding the output alone gives half of it.
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 2e-6}
HALF = ("bfloat16", "float16")
SM80 = {"large": 0, "middle": 1, "any": 2, "few": 3}
SM90 = {"sm90 large": 1000, "sm90 middle": 1001, "sm90 small": 1002}
# Yields (case, what computes its error, the most it may be).
Family = Callable[[], Iterator[tuple[str, Callable[[], float], float]]]
SIGMA = 0.2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the emulator or the interpreter runs
# M, N, K, rank, samples: tiles that are full, tiles that are not, several samples; for many and for few rows.
SIZES = {
    "cuda": (
        ((256, 256, 512, 0, 1), (300, 392, 520, 16, 1), (640, 1160, 1032, 24, 2)),
        ((16, 256, 512, 0, 1), (1, 392, 520, 16, 1), (12, 1160, 1032, 24, 2)),
    ),
    "cpu": (
        ((40, 72, 72, 0, 1), (36, 40, 72, 16, 1), (20, 40, 72, 24, 2)),
        ((16, 40, 72, 0, 1), (1, 40, 72, 16, 1), (12, 40, 72, 24, 2)),
    ),
}
SHAPES, FEW = SIZES[DEVICE]
TIMED = {"cuda": 4096, "cpu": 128}[DEVICE]  # N and K

_libraries: dict[str, Path] = {}


@contextlib.contextmanager
def _backend(name: str, configuration: tuple[int, int] = (-1, 0)) -> Iterator[Any]:
    """The module of backend `name`, "cuda@base" for another library of the CUDA backend."""
    name, _, library = name.partition("@")
    module = backends.get(name)
    if name != "cuda":
        yield module
        return
    before = module._load, module.configuration
    if library:
        loaded = _load(library)
        module._load = lambda: loaded
    module.configuration = configuration
    try:
        yield module
    finally:
        module._load, module.configuration = before


def _load(library: str, known: dict[str, Any] = {}) -> Any:  # noqa: B006
    if library not in known:
        module = backends.get("cuda")
        path = module._path
        module._path = lambda: _libraries[library]
        module._load.cache_clear()
        known[library] = module._load()
        module._path = path
        module._load.cache_clear()
    return known[library]


class Problem:
    """Random tensors of a layer and one draw of noise, on the GPU."""

    def __init__(
        self,
        M: int,
        N: int,
        K: int,
        rank: int,
        samples: int,
        dtype: str,
        noise: str,
        fresh: int = 0,
    ) -> None:
        self.dtype = getattr(torch, dtype)
        self.generator = torch.Generator(DEVICE).manual_seed(1 + fresh)
        self.x, self.dy = self._randn(M, K), self._randn(M, N)
        self.weight = self._randn(N, K, K**-0.5)
        self.A = self._randn(rank, K, K**-0.5) if rank else None
        self.B = self._randn(N, rank, 0.1) if rank else None
        self.v = self._randn(M, rank) if rank else None
        row_scale = SIGMA * K**-0.5 * (0.5 + torch.rand(N, device=DEVICE, generator=self.generator))
        seed = torch.tensor(0x9E3779B97F4A7C15 - 2**64 + fresh, device=DEVICE)
        self.draw = Draw(row_scale, seed, 3, noise, samples)

    def _randn(self, rows: int, columns: int, std: float = 1.0) -> Tensor:
        out = torch.empty(rows, columns, dtype=self.dtype, device=DEVICE)
        return out.normal_(0, std, generator=self.generator)

    def forward(self, module: Any) -> Tensor:
        return module.linear(
            self.x, self.weight, self.A, self.B, None, None, 0.75, self.draw, module.NOISE_ACCUMS[0]
        )[0]

    def input_grad(self, module: Any) -> Tensor:
        return module.linear_input_grad(
            self.dy, self.weight, self.A, self.v, self.draw, module.NOISE_ACCUMS[0]
        )

    def panel_forward(self, module: Any) -> Tensor:
        adapter = (self.A, self.B, None, None, 0.75)
        return panel.linear(module.perturb, self.x, self.weight, *adapter, self.draw)[0]

    def panel_input_grad(self, module: Any) -> Tensor:
        return panel.linear_input_grad(module.perturb, self.dy, self.weight, self.A, self.v, self.draw)

    def perturbed(self, group: int = 0) -> Tensor:
        """W + eps of a group of rows, by the oracle."""
        out = torch.empty_like(self.weight)
        draw = self.draw._replace(samples=1, sample_offset=group)
        backends.get("reference").perturb(self.weight, draw, out)
        return out.double()

    def exact(self, input_grad: bool) -> Tensor:
        parts = []
        given = self.dy if input_grad else self.x
        for group, rows in enumerate(given.chunk(self.draw.samples)):
            weight = self.perturbed(group)
            parts.append(rows.double() @ (weight if input_grad else weight.t()))
        result = torch.cat(parts)
        if self.A is not None:
            A, B = self.A.double(), self.B.double()
            if input_grad:
                result += self.v.double() @ A
            else:
                result += 0.75 * ((self.x.double() @ A.t()).to(self.dtype).double() @ B.t())
        return result


# --- driver ---


def driver() -> int:
    from . import environment

    about = environment.describe(DEVICE)
    kept = ("hardware", "clocks_before", "python", "torch", "cuda", "triton", "peft", "commit", "dirty")
    print(", ".join(f"{name} {about[name]}" for name in kept), flush=True)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import wrappers

    library = (wrappers.get_on_gpu if DEVICE == "cuda" else wrappers.get_emulated)()
    for size in (2, 4, 8, 16):
        for kib in (100, 200, 226):
            count = ctypes.c_int()
            error = library.library.test_clusters(size, kib << 10, ctypes.byref(count))
            said = library.library.test_error(error).decode() if error else f"{count.value} at once"
            print(f"clusters of {size:2} with {kib} KiB a block: {said}", flush=True)
    return 0


# --- check ---


def _families(libraries: list[str]) -> dict[str, Family]:
    found: dict[str, Any] = {}
    for backend in ["cuda", *(f"cuda@{name}" for name in libraries)]:
        found[f"{backend} passes"] = lambda b=backend: _passes(b)
        for name, config in SM80.items():
            if backend == "cuda":  # other builds are of the sm_90a kernel
                found[f"{backend} {name}"] = lambda b=backend, n=name, c=config: _products(
                    b,
                    c,
                    HALF if n in ("large", "middle") else (*HALF, "float32"),
                    FEW if n == "few" else SHAPES,
                )
        for name, config in SM90.items():
            found[f"{backend} {name}"] = lambda b=backend, c=config: _products(b, c, HALF, SHAPES)
    found["cuda panel"] = lambda: _products("cuda", -1, ("bfloat16",), SHAPES, by_panels=True)
    found["triton passes"] = lambda: _passes("triton")
    found["triton few"] = lambda: _products("triton", -1, ("bfloat16", "float32"), FEW)
    found["triton middle"] = lambda: _products(
        "triton", -1, ("bfloat16",), ((64, 392, 520, 16, 1), (128, 392, 520, 16, 1))
    )
    found["triton large"] = lambda: _products(
        "triton", -1, ("bfloat16",), (*SHAPES, (2048, 4096, 4096, 16, 1))
    )
    found["triton half"] = lambda: _products("triton", -1, ("float16",), SHAPES[:2])
    found["triton panel"] = lambda: _products("triton", -1, ("bfloat16",), SHAPES[:2], by_panels=True)
    return found


def _error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def _again(run: Callable[[], Tensor], exact: Tensor) -> float:
    """The relative error; raises where a repetition gives other bits."""
    first = run()
    error = _error(first, exact)
    for _ in range(4):
        if not torch.equal(run(), first):
            raise AssertionError(f"other bits in a repetition; error of the first {error:.2e}")
    return error


def _products(
    backend: str,
    config: int,
    dtypes: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    by_panels: bool = False,
) -> Iterator[tuple[str, Callable[[], float], float]]:
    for shape in shapes:
        for dtype in dtypes:
            for noise in KINDS:
                for direction in ("forward", "input_grad"):
                    for parts in (
                        (0, 2) if backend != "triton" and not by_panels and shape is shapes[0] else (0,)
                    ):

                        def run(shape=shape, dtype=dtype, noise=noise, direction=direction, parts=parts):  # type: ignore[no-untyped-def]
                            p = Problem(*shape, dtype, noise)
                            call = getattr(p, ("panel_" if by_panels else "") + direction)
                            exact = p.exact(direction == "input_grad")
                            with _backend(backend, (config, parts)) as module:
                                return _again(lambda: call(module), exact)

                        name = f"{direction} {noise} {dtype} {'x'.join(map(str, shape))} parts {parts}"
                        yield name, run, TOLERANCE[dtype]


def _passes(backend: str) -> Iterator[tuple[str, Callable[[], float], float]]:
    """The kernels that read the weight once."""
    for dtype in (*HALF, "float32"):
        for noise in KINDS:

            def perturb(dtype=dtype, noise=noise):  # type: ignore[no-untyped-def]
                p = Problem(1, 300, 1032, 0, 1, dtype, noise)
                out = torch.empty_like(p.weight)
                with _backend(backend) as module:
                    return _again(lambda: module.perturb(p.weight, p.draw, out) or out, p.perturbed())

            def generator(dtype=dtype, noise=noise):  # type: ignore[no-untyped-def]
                # Noise alone in float32: the largest difference of z.
                p = Problem(1, 300, 1032, 0, 1, "float32", noise)
                draw = p.draw._replace(noise_scale=torch.ones(300, device=DEVICE))
                got, exact = torch.empty(300, 1032, device=DEVICE), torch.empty(300, 1032, device=DEVICE)
                backends.get("reference").perturb(None, draw, exact)
                with _backend(backend) as module:
                    module.perturb(None, draw, got)
                return (got - exact).abs().max().item()

            yield f"perturb {noise} {dtype}", perturb, TOLERANCE[dtype]
            if dtype == "float32":
                yield f"z {noise}, largest difference", generator, 1e-4 if noise == "gaussian" else 0.0
        for rank in (0, 16):

            def norms(dtype=dtype, rank=rank):  # type: ignore[no-untyped-def]
                p = Problem(1, 300, 1032, rank, 1, dtype, "gaussian")
                weight = p.weight.double()
                if rank:
                    weight = weight + 0.75 * p.B.double() @ p.A.double()
                with _backend(backend) as module:
                    return _again(
                        lambda: module.row_sq_norms(p.weight, p.A, p.B, 0.75), weight.square().sum(1)
                    )

            yield f"row_sq_norms rank {rank} {dtype}", norms, 1e-5


def _check_family(name: str, family: Family, each: float = 60.0) -> int:
    case = "start"

    def over() -> None:
        _write("check", {"family": name, "case": case, "ok": False, "raised": f"not done in {each:g} s"})
        os._exit(1)

    # Fresh memory is NaN: what a kernel does not write shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    clock = threading.Timer(each, over)
    clock.daemon = True
    clock.start()
    wrong = 0
    for case, run, most in family():
        start = time.perf_counter()
        row: dict[str, Any] = {"family": name, "case": case, "most": most}
        try:
            row["error"] = run()
            row["ok"] = bool(row["error"] <= most)
        except Exception as error:
            row |= {"ok": False, "raised": f"{type(error).__name__}: {error}"[:300]}
        row["seconds"] = round(time.perf_counter() - start, 3)
        wrong += not row["ok"]
        _write("check", row)
        if "CUDA error" in row.get("raised", "") or "illegal" in row.get("raised", ""):
            break  # this process has lost its context
    clock.cancel()
    return wrong


def check(limit: float, libraries: list[str], arguments: list[str], only: str) -> int:
    families = {name: family for name, family in _families(libraries).items() if re.search(only, name)}
    start = time.perf_counter()
    running = {
        name: subprocess.Popen([sys.executable, "-m", "bench.truth", "family", name, *arguments])
        for name in families
    }
    failed, first = 0, ""
    for name, process in running.items():
        ended = ""
        try:
            status = process.wait(max(limit - (time.perf_counter() - start), 0.1))
            if status < 0:
                ended = f"ended by signal {-status}"
        except subprocess.TimeoutExpired:
            process.kill()
            status, ended = -1, f"not done in {limit:.0f} s"
        if ended:
            _write("check", {"family": name, "case": "all", "ok": False, "raised": ended})
        failed += status != 0
        if status and not first:
            first = f"; first wrong: {name}"
        print(f"{'right' if status == 0 else 'WRONG':6} {name}", flush=True)
    print(
        f"check: {len(families) - failed} of {len(families)} families right, "
        f"{time.perf_counter() - start:.0f} s{first}",
        flush=True,
    )
    return failed


# --- time ---


def _calls(
    rows: int, rank: int, noise: str, libraries: list[str], sweep: bool
) -> tuple[dict[str, Any], list[Problem]]:
    """Name -> function of the number of the copy."""
    dtype, copies = "bfloat16", 2
    problems = [Problem(rows, TIMED, TIMED, rank, 1, dtype, noise, fresh=i) for i in range(copies)]
    scratch = torch.empty_like(problems[0].weight)

    def plain(c: int) -> Tensor:
        return problems[c].x @ problems[c].weight.t()

    def plain_dx(c: int) -> Tensor:
        return problems[c].dy @ problems[c].weight

    def adapter(p: Problem, y: Tensor) -> Tensor:
        return y if p.A is None else torch.addmm(y, p.x @ p.A.t(), p.B.t(), alpha=0.75)

    def lora(c: int) -> Tensor:
        return adapter(problems[c], plain(c))

    calls: dict[str, Any] = {"plain": plain, "plain dX": plain_dx}
    if rank:
        calls["lora"] = lora
    ways: list[tuple[str, str, tuple[int, int]]] = [("triton", "triton", (-1, 0)), ("cuda", "cuda", (-1, 0))]
    ways += [(f"cuda@{name}", f"cuda@{name}", (-1, 0)) for name in libraries]
    if sweep:
        for backend in ["cuda", *(f"cuda@{name}" for name in libraries)]:
            if rows > 64:
                ways += [(f"{backend} {n}", backend, (c, 0)) for n, c in SM90.items()]
            if 64 < rows <= 512:
                ways += [
                    (f"{backend} {n} parts {k}", backend, (c, k)) for n, c in SM90.items() for k in (1, 2, 4)
                ]
        if rows > 64:
            ways += [(f"cuda {n}", "cuda", (c, 0)) for n, c in SM80.items() if n in ("large", "middle")]
        if rows <= 16:
            ways += [(f"cuda few parts {k}", "cuda", (SM80["few"], k)) for k in (1, 2, 4, 6, 8, 12, 16)]
    for name, backend, configuration in ways:

        def forward(c: int, b=backend, conf=configuration) -> Tensor:  # type: ignore[no-untyped-def]
            with _backend(b, conf) as module:
                return problems[c].forward(module)

        def input_grad(c: int, b=backend, conf=configuration) -> Tensor:  # type: ignore[no-untyped-def]
            with _backend(b, conf) as module:
                return problems[c].input_grad(module)

        calls[f"{name} y"], calls[f"{name} dX"] = forward, input_grad
    for backend in ("triton", "cuda"):
        module = backends.get(backend)
        calls[f"panel {backend} y"] = lambda c, m=module: problems[c].panel_forward(m)
        calls[f"panel {backend} dX"] = lambda c, m=module: problems[c].panel_input_grad(m)

        def perturb(c: int, m=module) -> Tensor:  # type: ignore[no-untyped-def]
            m.perturb(problems[c].weight, problems[c].draw, scratch)
            return scratch

        def unfused(c: int, perturb=perturb) -> Tensor:  # type: ignore[no-untyped-def]
            return adapter(problems[c], problems[c].x @ perturb(c).t())

        calls[f"perturb {backend} alone"], calls[f"perturb {backend} y"] = perturb, unfused
        if rank:
            calls[f"norms {backend}"] = lambda c, m=module: m.row_sq_norms(
                problems[c].weight, problems[c].A, problems[c].B, 0.75
            )
    return calls, problems


def measure(
    limit: float, rows: list[int], libraries: list[str], budget: float, only: str, ranks: list[int]
) -> int:
    from . import timing

    start, failed = time.perf_counter(), 0
    order = [(rank, noise) for noise in KINDS for rank in ranks]
    for rank, noise in order:
        for M in rows:
            if time.perf_counter() - start > limit:
                print(f"time: {limit:.0f} s are over before M = {M}, rank {rank}, {noise}", flush=True)
                return failed
            calls, problems = _calls(M, rank, noise, libraries, sweep=rank == 0)
            calls = {
                name: call
                for name, call in calls.items()
                if re.search(only, name) or name.startswith("plain")
            }
            graphs = {}
            for name, call in calls.items():
                try:
                    graphs[name] = timing.graphed(call, len(problems)) if DEVICE == "cuda" else call
                    graphs[name](0)
                    if DEVICE == "cuda":
                        torch.cuda.synchronize()
                except Exception as error:
                    failed += 1
                    graphs.pop(name, None)
                    text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    _write("time", {"M": M, "rank": rank, "noise": noise, "name": name, "raised": text})
                    print(f"{M:5} {name}: {text}", flush=True)
            rounds = timing.interleaved(graphs, timing.timer(DEVICE), len(problems), budget, 15, 60)
            print(f"--- M = {M}, rank {rank}, {noise}, bfloat16, N = K = {TIMED}", flush=True)
            for name in graphs:
                base = "plain dX" if name.endswith("dX") else "plain"
                ratio = timing.paired_ratio(rounds, name, base)
                row = {"M": M, "rank": rank, "noise": noise, "name": name}
                row |= timing.row(rounds, name) | timing.ratio_row("plain", ratio)
                _write("time", row)
                print(
                    f"{M:5} {name:32} {row['median_us']:8.1f} us {ratio.median:6.2f} "
                    f"({ratio.p20:.2f} to {ratio.p80:.2f})",
                    flush=True,
                )
            del calls, problems, graphs
            torch.cuda.empty_cache()
    return failed


def _write(part: str, row: dict[str, Any]) -> None:
    folder = Path(os.environ.get("OUT") or "bench/results/truth")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"truth-{part}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")  # a line at once: several processes append


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["driver", "check", "family", "time"])
    parser.add_argument("family", nargs="?")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds")
    parser.add_argument("--each", type=float, default=60.0, help="seconds for a family, with check")
    parser.add_argument("--rows", default="16,256,2048,8192")
    parser.add_argument(
        "--budget", type=float, default=0.02, help="seconds of the device for each call's times"
    )
    parser.add_argument("--ranks", default="16,0", help="of the adapter; where it is 0 every tile is timed")
    parser.add_argument("--only", default="", help="what has this regular expression in its name")
    parser.add_argument("--library", action="append", default=[], metavar="NAME=FILE")
    given = parser.parse_args()
    _libraries.update({name: Path(file).resolve() for name, file in (x.split("=", 1) for x in given.library)})
    if DEVICE == "cpu" and not os.environ.get("FLATLORA_EMULATE"):
        print("truth: torch sees no GPU", file=sys.stderr)
        return 2
    names = list(_libraries)
    if given.what == "family":
        return min(_check_family(given.family, _families(names)[given.family], given.each), 100)
    if given.what == "driver":
        return driver()
    if given.what == "check":
        more = [f"--library={x}" for x in given.library] + [f"--each={given.each}"]
        return min(check(given.limit, names, more, given.only), 100)
    return min(
        measure(
            given.limit,
            [int(r) for r in given.rows.split(",")],
            names,
            given.budget,
            given.only,
            [int(r) for r in given.ranks.split(",")],
        ),
        100,
    )


if __name__ == "__main__":
    sys.exit(main())
