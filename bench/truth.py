"""What a GPU says first: is each kernel right, does it give the same bits again, and how long does it take?

`python -m bench.truth driver` prints versions and how many clusters run at once. `check` runs each family of kernels in
a process of its own, all at once: one that hangs or breaks its CUDA context costs the others nothing. `time` replays
CUDA graphs in turns from a cold L2 and prints ratios to the vendor's product in the same rounds; `lora` is what PEFT
computes, by the same operators without its modules. Both write a line of JSON to OUT/truth-{check,time}.jsonl as soon
as a result is there. The exit status of `check` is 75 where nothing was wrong and the time of a family was over before
its last case.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels import backends
from flatlora_kernels.core.noise import KINDS, epsilon, tile_bits
from flatlora_kernels.core.records import Draw

from . import environment, mixture, problem, providers, timing
from .options import add, option
from .problem import SCALING, Inputs
from .run import NOISES
from .shapes import Case

# Of the relative error ||y - exact|| / ||exact||. In 16 bits rounding the output alone gives half of it.
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4, "float32": 2e-6}
HALF = ("bfloat16", "float16")
DIRECTIONS = {"forward": "y", "input_grad": "dX"}
SM80 = {"large": 0, "middle": 1, "any": 2, "few": 3}
SM90 = {"sm90 large": 1000, "sm90 middle": 1001, "sm90 small": 1002}
AHEAD = {"ahead large": 2000, "ahead small": 2001}
# Yields (case, what computes its error, the most it may be).
Checks = Iterator[tuple[str, Callable[[], float], float]]
Family = Callable[[], Checks]
Shape = tuple[int, ...]  # M, N, K, rank, samples
SIGMA = 0.2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the emulator or the interpreter runs
# Tiles that are full, tiles that are not, several samples; for many and for few rows; and of a packed weight,
# which has whole blocks of NF4 in a row. Then weights of which a quarter holds eight steps of a wave; and mixtures:
# experts, rows of all, N, K.
SIZES = {
    "cuda": (
        ((256, 256, 512, 0, 1), (300, 392, 520, 16, 1), (640, 1160, 1032, 24, 2)),
        ((16, 256, 512, 0, 1), (1, 392, 520, 16, 1), (12, 1160, 1032, 24, 2)),
        ((1, 392, 576, 16, 1), (100, 392, 576, 0, 1), (640, 1160, 1088, 24, 2)),
        ((2048, 4096, 4096, 0, 1), (1000, 2056, 4104, 16, 1), (1200, 3000, 4096, 24, 2)),
        ((8, 100, 392, 520), (5, 1500, 1160, 1032), (8, 8192, 1536, 2048)),
    ),
    "cpu": (
        ((40, 72, 72, 0, 1), (36, 40, 72, 16, 1), (20, 40, 72, 24, 2)),
        ((16, 40, 72, 0, 1), (1, 40, 72, 16, 1), (12, 40, 72, 24, 2)),
        ((1, 40, 128, 16, 1), (20, 40, 192, 24, 2)),
        ((40, 1536, 1544, 16, 1),),
        ((4, 20, 40, 72),),
    ),
}
SHAPES, FEW, PACKED, MANY, EXPERTS = SIZES[DEVICE]
FORMATS = ("nf4", "int8", "fp8")
TIMED = {"cuda": 4096, "cpu": 128}[DEVICE]  # N and K
AUTOMATIC = (-1, 0)  # see backends/cuda.py: configuration
NO_TIME = 75  # exit status, as of gpu/tests.py

_libraries: dict[str, Path] = {}


class Problem(problem.Problem):
    """With a stream and a scale of each row of their own, several samples, and v that is given."""

    stream = 3

    def __init__(
        self,
        M: int,
        N: int,
        K: int,
        rank: int,
        samples: int,
        dtype: str,
        noise: str,
        copies: int = 1,
        packed: str = "",
    ) -> None:
        """packed: the format of the weight, "" = none."""
        self.noise, self.samples, self.v, self.packed = noise, samples, [], packed
        super().__init__(Case("", "", M, N, K, dtype, "forward", rank), DEVICE, copies)

    def _inputs(self, number: int) -> Inputs:
        M, N, K, rank = self.case.M, self.case.N, self.case.K, self.case.rank
        self.v.append(self._randn(M, rank) if rank else None)
        scale = SIGMA * K**-0.5 * (0.5 + torch.rand(N, device=DEVICE, generator=self._generator))
        seed = torch.tensor(0x9E3779B97F4A7C15 - 2**64 + number, device=DEVICE)
        inputs = super()._inputs(number)._replace(noise_scale=scale, seed=seed)
        if self.packed:
            inputs = inputs._replace(weight=fk.QuantizedWeight.quantize(inputs.weight, self.packed))
        return inputs

    def perturbed(self, group: int = 0) -> Tensor:
        """W + eps of a group of rows, by the oracle."""
        i = self.inputs[0]
        draw = {"seed": i.seed, "stream": self.stream, "noise": self.noise, "sample": group}
        return fk.perturb_weight(i.weight, i.noise_scale, **draw, backend="reference").double()

    def unrounded(self, group: int = 0) -> Tensor:
        """The same sum, before it is rounded to the weight's type."""
        i, K = self.inputs[0], self.case.K
        bits = tile_bits(self.case.N, K) if self.noise == "hadamard" else 0
        draw = Draw(i.noise_scale, i.seed, self.stream, self.noise, self.samples, tile_bits=bits)
        weight = i.weight.dequantize() if self.packed else i.weight
        return weight.double() + epsilon(draw, K, self.dtype, group).double()

    def exact(self, direction: str, way: str = "fused") -> Tensor:
        i = self.inputs[0]
        alone = direction == "input_grad"
        groups = (i.grad_y if alone else i.x).double().chunk(self.samples)
        perturbed = self.unrounded if way == "transform" else self.perturbed
        weights = [perturbed(group) for group in range(len(groups))]
        result = torch.cat([rows @ (W if alone else W.t()) for rows, W in zip(groups, weights, strict=True)])
        if i.lora_A is None:
            return result
        A, B = i.lora_A.double(), i.lora_B.double()
        if alone:
            return result + self.v[0].double() @ A
        return result + SCALING * ((i.x.double() @ A.t()).to(self.dtype).double() @ B.t())


class Given(providers.Fused):
    """The op, its input gradient from a v that is there."""

    def v(self, copy: int) -> Tensor | None:
        return self.problem.v[copy]


@contextlib.contextmanager
def _backend(name: str, configuration: tuple[int, int] = AUTOMATIC) -> Iterator[str]:
    """Backend `name`, "cuda@base" for another library of the CUDA backend. The one place that reaches into it."""
    name, _, library = name.partition("@")
    cuda = backends.get("cuda")
    load = functools.partial(_load, library) if library else cuda._load
    with mock.patch.multiple(cuda, configuration=configuration, _load=load):
        yield name


@functools.cache
def _load(library: str) -> Any:
    cuda = backends.get("cuda")
    with mock.patch.object(cuda, "_path", lambda: _libraries[library]):
        loaded = cuda._load.__wrapped__()
    if isinstance(loaded, str):
        raise ValueError(f"--library {library}={_libraries[library]}: {loaded}")
    return loaded


def _product(
    p: Problem, direction: str, backend: str, configuration: tuple[int, int] = AUTOMATIC, way: str = "fused"
) -> Callable[[int], Tensor]:
    """A function of the number of the copy."""

    def call(copy: int) -> Tensor:
        with _backend(backend, configuration) as name, torch.no_grad():
            return getattr(Given(p, p.noise, name, way), direction)(copy)

    return call


def driver() -> int:
    about = environment.describe(DEVICE)
    kept = ("hardware", "clocks_before", "python", "torch", "cuda", "triton", "peft", "commit", "dirty")
    print(", ".join(f"{name} {about[name]}" for name in kept), flush=True)
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import wrappers

    library = (wrappers.get_on_gpu if DEVICE == "cuda" else wrappers.get_emulated)().library
    for size, kib in itertools.product((2, 4, 8, 16), (100, 200, 226)):
        count = ctypes.c_int()
        error = library.test_clusters(size, kib << 10, ctypes.byref(count))
        said = library.test_error(error).decode() if error else f"{count.value} at once"
        print(f"clusters of {size:2} with {kib} KiB a block: {said}", flush=True)
    return 0


def _is_hopper() -> bool:
    if DEVICE == "cuda":
        return torch.cuda.get_device_capability() == (9, 0)
    return os.environ.get("FLATLORA_EMULATE") == "90"


def _families(libraries: list[str]) -> dict[str, Family]:
    found: dict[str, Family] = {}

    def products(name: str, *what: Any) -> None:
        found[name] = functools.partial(_products, name.split()[0], *what)

    for backend in ["cuda", *(f"cuda@{name}" for name in libraries)]:
        found[f"{backend} passes"] = functools.partial(_passes, backend)
        tiles = SM80 | SM90 if backend == "cuda" else SM90  # other builds are of the sm_90a kernel
        for name, config in tiles.items():
            dtypes = (*HALF, "float32") if name in ("any", "few") else HALF
            products(f"{backend} {name}", config, dtypes, FEW if name == "few" else SHAPES)
        for name, config in AHEAD.items() if _is_hopper() else ():
            products(f"{backend} {name}", config, HALF, MANY)
    for backend, format in itertools.product(("cuda", "triton"), FORMATS):
        found[f"{backend} packed {format}"] = functools.partial(_packed, backend, format)
    products("cuda panel", -1, HALF[:1], SHAPES, "panel")
    products("cuda transform", -1, (*HALF, "float32"), SHAPES, "transform")
    found["triton passes"] = functools.partial(_passes, "triton")
    products("triton few", -1, ("bfloat16", "float32"), FEW)
    products("triton middle", -1, HALF[:1], ((64, 392, 520, 16, 1), (128, 392, 520, 16, 1)))
    products("triton large", -1, HALF[:1], (*SHAPES, (2048, 4096, 4096, 16, 1)))
    products("triton half", -1, HALF[1:], SHAPES[:2])
    products("triton panel", -1, HALF[:1], SHAPES[:2], "panel")
    products("triton transform", -1, (*HALF, "float32"), SHAPES, "transform")
    found["triton mixture"] = functools.partial(_mixtures, "triton")
    return found


def _again(run: Callable[[], Tensor], exact: Tensor) -> float:
    """The relative error; raises where a repetition gives other bits."""
    first = run()
    error = ((first.double() - exact).norm() / exact.norm()).item()
    for _ in range(4):
        if not torch.equal(run(), first):
            raise AssertionError(f"other bits in a repetition; error of the first {error:.2e}")
    return error


def _products(
    backend: str, config: int, dtypes: tuple[str, ...], shapes: Sequence[Shape], way: str = "fused"
) -> Checks:
    def error(shape: Shape, dtype: str, noise: str, direction: str, parts: int) -> float:
        p = Problem(*shape, dtype, noise)
        call = _product(p, direction, backend, (config, parts), way)
        return _again(lambda: call(0), p.exact(direction, way))

    kinds = providers.noises(backend.partition("@")[0], way)
    kinds = tuple(kind for kind in kinds if kind != providers.NOISELESS)
    for shape, dtype, noise, direction in itertools.product(shapes, dtypes, kinds, DIRECTIONS):
        split = backend != "triton" and way == "fused" and shape is shapes[0] and config < min(AHEAD.values())
        for parts in (0, 2) if split else (0,):
            name = f"{direction} {noise} {dtype} {'x'.join(map(str, shape))} parts {parts}"
            yield name, functools.partial(error, shape, dtype, noise, direction, parts), TOLERANCE[dtype]


def _packed(backend: str, format: str) -> Checks:
    """What decodes: the product, and the kernels that write slices and add up squares."""

    def error(shape: Shape, noise: str, direction: str, way: str, config: int) -> float:
        p = Problem(*shape, "bfloat16", noise, packed=format)
        call = _product(p, direction, backend, (config, 0), way)
        return _again(lambda: call(0), p.exact(direction, way))

    def decode(dtype: str) -> float:
        i = Problem(*PACKED[-1], dtype, "gaussian", packed=format).inputs[0]
        out = i.weight.new_empty(i.weight.shape)

        def run() -> Tensor:
            out.fill_(float("nan"))
            backends.get(backend).perturb(i.weight, None, out)
            return out.clone()

        return _again(run, i.weight.dequantize().double())

    def norms(rank: int) -> float:
        shape = (*PACKED[-1][:3], rank, 1)
        i = Problem(*shape, "bfloat16", "gaussian", packed=format).inputs[0]
        weight = i.weight.dequantize().double()
        if rank:
            weight = weight + SCALING * i.lora_B.double() @ i.lora_A.double()
        return _again(lambda: _norms(i, backend), weight.square().sum(1))

    for dtype in (*HALF, "float32"):
        yield f"decode {dtype}", functools.partial(decode, dtype), 0.0
    for rank in (0, 16):
        yield f"row_sq_norms rank {rank}", functools.partial(norms, rank), 1e-5
    # The CUDA kernels have three tiles for a packed weight.
    tiles = [SM80[name] for name in ("large", "middle", "any")] if backend == "cuda" else [AUTOMATIC[0]]
    for noise, direction, shape in itertools.product(KINDS, DIRECTIONS, PACKED):
        ways = [("fused", tile) for tile in tiles] if backends.fuses(backend, noise) else [("transform", -1)]
        for way, config in (*ways, ("panel", -1)) if shape is PACKED[-1] else ways:
            name = f"{direction} {noise} {way} {'x'.join(map(str, shape))} tile {config}"
            yield name, functools.partial(error, shape, noise, direction, way, config), TOLERANCE["bfloat16"]


def _passes(backend: str) -> Checks:
    """The kernels that read the weight once."""

    def perturb(dtype: str, noise: str) -> float:
        p = Problem(1, 300, 1032, 0, 1, dtype, noise)
        with _backend(backend) as name:
            run = providers.Perturb(p, noise, name)
            return _again(lambda: run.weight(0).clone(), p.perturbed())

    def generator(noise: str) -> float:
        """Noise alone in float32: the largest difference of z."""
        p = Problem(1, 300, 1032, 0, 1, "float32", noise)
        p.inputs = [i._replace(noise_scale=torch.ones(300, device=DEVICE)) for i in p.inputs]
        exact = providers.OfBackend(p, noise, "reference").eps(0)
        with _backend(backend) as name:
            return (providers.OfBackend(p, noise, name).eps(0) - exact).abs().max().item()

    def norms(dtype: str, rank: int) -> float:
        i = Problem(1, 300, 1032, rank, 1, dtype, "gaussian").inputs[0]
        weight = i.weight.double()
        if rank:
            weight = weight + SCALING * i.lora_B.double() @ i.lora_A.double()
        with _backend(backend) as name:
            return _again(lambda: _norms(i, name), weight.square().sum(1))

    for dtype in (*HALF, "float32"):
        for noise in KINDS:
            yield f"perturb {noise} {dtype}", functools.partial(perturb, dtype, noise), TOLERANCE[dtype]
            if dtype == "float32":
                most = 1e-4 if noise == "gaussian" else 0.0
                yield f"z {noise}, largest difference", functools.partial(generator, noise), most
        for rank in (0, 16):
            yield f"row_sq_norms rank {rank} {dtype}", functools.partial(norms, dtype, rank), 1e-5


def _mixtures(backend: str) -> Checks:
    """Experts in one launch: both products, the low-rank ones without noise, the sums over rows, and the norms."""

    @functools.lru_cache(1)
    def made(case: mixture.Case) -> Any:
        layer = mixture.Layer(case, 0)
        return mixture.way(layer, f"op:{backend}", "fused"), mixture.exact(layer)

    def error(case: mixture.Case, index: int) -> float:
        step, exact = made(case)
        return _again(lambda: step()[index], exact[index])

    def norms(case: mixture.Case) -> float:
        layer = mixture.Layer(case, 0)
        W, A, B = (t.detach() for t in (layer.weight, layer.lora_A, layer.lora_B))
        right = (W.double() + SCALING * B.double() @ A.double()).norm(dim=2) / case.K**0.5

        def run() -> Tensor:
            return fk.grouped_noise_scale(W, A, B, scaling=SCALING, sigma=1.0, backend=backend)

        return _again(run, right)

    for (experts, M, N, K), noise in itertools.product(EXPERTS, backends.get(backend).FUSES):
        for dtype in ("bfloat16", "float32"):
            case = mixture.Case(DEVICE, dtype, experts, M, N, K, "falling", "forward+backward", noise)
            for index, what in enumerate(mixture.RESULTS):
                most = (1 if what in ("y", "dX") else 2) * TOLERANCE[dtype]  # of what was rounded before
                yield (
                    f"{what} {noise} {dtype} {experts}x{M}x{N}x{K}",
                    functools.partial(error, case, index),
                    most,
                )
    for dtype in ("bfloat16", "float32"):
        case = mixture.Case(DEVICE, dtype, *EXPERTS[0], "even", "forward", "gaussian")
        yield f"norms {dtype} {'x'.join(map(str, EXPERTS[0]))}", functools.partial(norms, case), 1e-5


def _norms(i: Inputs, backend: str) -> Tensor:
    return fk.row_sq_norms(i.weight, i.lora_A, i.lora_B, scaling=SCALING, backend=backend)


def _check_family(name: str, family: Family, each: float = 60.0) -> int:
    case, start, wrong = "start", time.perf_counter(), 0

    def over() -> None:
        seconds = time.perf_counter() - start
        hangs = seconds > each / 2  # else cases take their time: their kernels may have to be compiled
        said = f"not done in {each:g} s, {seconds:.1f} s of them in this case"
        _write("check", {"family": name, "case": case, "ok": False if hangs else None, "raised": said})
        os._exit(1 if hangs or wrong else NO_TIME)

    # Fresh memory is NaN: what a kernel does not write shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    clock = threading.Timer(each, over)
    clock.daemon = True
    clock.start()
    for case, run, most in family():
        start = time.perf_counter()
        row: dict[str, Any] = {"family": name, "case": case, "most": most, "ok": False}
        try:
            row["error"] = run()
            row["ok"] = row["error"] <= most
        except Exception as error:
            row["raised"] = f"{type(error).__name__}: {error}"[:300]
        _write("check", row | {"seconds": round(time.perf_counter() - start, 3)})
        wrong += not row["ok"]
        if "CUDA error" in row.get("raised", "") or "illegal" in row.get("raised", ""):
            break  # this process has lost its context
    clock.cancel()
    return wrong


def check(limit: float, libraries: list[str], arguments: list[str], only: str) -> int:
    """The exit status."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "bench.truth", "family"]
    families = [name for name in _families(libraries) if re.search(only, name)]
    running = {name: subprocess.Popen([*command, name, *arguments]) for name in families}
    wrong, cut = [], 0
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
        verdict = {0: "right", NO_TIME: "cut"}.get(status, "WRONG")
        cut += verdict == "cut"
        if verdict == "WRONG":
            wrong.append(name)
        print(f"{verdict:6} {name}", flush=True)
    right, seconds = len(families) - len(wrong) - cut, time.perf_counter() - start
    said = f"check: {right} of {len(families)} families right"
    said += f", {cut} as far as their time went" if cut else ""
    print(f"{said}, {seconds:.0f} s" + (f"; first wrong: {wrong[0]}" if wrong else ""), flush=True)
    return min(len(wrong), NO_TIME - 1) or (NO_TIME if cut else 0)


def _calls(
    rows: int, rank: int, noise: str, libraries: list[str], sweep: bool
) -> tuple[dict[str, timing.Call], Problem]:
    p = Problem(rows, TIMED, TIMED, rank, 1, "bfloat16", noise, copies=2)
    plain = providers.Plain(p, noise)
    calls = {"plain": plain.forward, "plain dX": plain.input_grad}
    if rank:
        calls["lora"] = providers.Lora(p, noise).forward

    def products(name: str, *what: Any) -> None:
        for direction, suffix in DIRECTIONS.items():
            calls[f"{name} {suffix}"] = _product(p, direction, *what)

    builds = ["cuda", *(f"cuda@{name}" for name in libraries)]
    fuses = noise != "hadamard"
    for name in ("triton", *builds):
        products(*((name, name) if fuses else (f"transform {name}", name, AUTOMATIC, "transform")))
    sweep &= fuses
    if sweep and rows > 64:
        for build, (name, config) in itertools.product(builds, SM90.items()):
            products(f"{build} {name}", build, (config, 0))
            for k in (1, 2, 4) if rows <= 512 else ():
                products(f"{build} {name} parts {k}", build, (config, k))
        for name in ("large", "middle"):
            products(f"cuda {name}", "cuda", (SM80[name], 0))
    if fuses and rows > 128 and _is_hopper():
        for build, (name, config) in itertools.product(builds, AHEAD.items()):
            products(f"{build} {name}", build, (config, 0))
    for k in (1, 2, 4, 6, 8, 12, 16) if sweep and rows <= 16 else ():
        products(f"cuda few parts {k}", "cuda", (SM80["few"], k))
    for backend in ("triton", "cuda"):
        products(f"panel {backend}", backend, AUTOMATIC, "panel")
        perturb = providers.Perturb(p, noise, backend)
        calls |= {f"perturb {backend} alone": perturb.weight, f"perturb {backend} y": perturb.forward}
        if rank:
            calls[f"norms {backend}"] = lambda copy, b=backend: _norms(p.inputs[copy], b)
    return calls, p


def measure(
    limit: float,
    rows: list[int],
    libraries: list[str],
    budget: float,
    only: str,
    ranks: list[int],
    noises: Sequence[str] = NOISES,
) -> int:
    start, failed = time.perf_counter(), 0
    for noise, rank, M in itertools.product(noises, ranks, rows):
        if time.perf_counter() - start > limit:
            print(f"time: {limit:.0f} s are over before M = {M}, rank {rank}, {noise}", flush=True)
            break
        about = {"M": M, "rank": rank, "noise": noise}
        calls, _ = _calls(M, rank, noise, libraries, sweep=rank == 0)
        ready = {}
        for name, call in calls.items():
            if not re.search(only, name) and not name.startswith("plain"):
                continue
            try:
                call = timing.ready(call, DEVICE, copies=2)
                call(0)
                timing.synchronize(DEVICE)
                ready[name] = call
            except Exception as error:
                failed += 1
                text = timing.first_line(error)
                _write("time", about | {"name": name, "raised": text})
                print(f"{M:5} {name}: {text}", flush=True)
        rounds = timing.interleaved(ready, timing.timer(DEVICE), 2, budget, 15, 60)
        print(f"--- M = {M}, rank {rank}, {noise}, bfloat16, N = K = {TIMED}", flush=True)
        for name in ready:
            base = "plain dX" if name.endswith("dX") else "plain"
            row = about | {"name": name} | timing.row(rounds, name, {"plain": base})
            _write("time", row)
            times = "{median_us:8.1f} us {to_plain:6.2f} ({to_plain_p20:.2f} to {to_plain_p80:.2f})"
            print(f"{M:5} {name:32} {times.format(**row)}", flush=True)
        del calls, ready, call
        torch.cuda.empty_cache()
    return failed


def _write(part: str, row: dict[str, Any]) -> None:
    folder = Path(os.environ.get("OUT") or "bench/results/truth")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"truth-{part}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")  # a line at once: several processes append


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


OPTIONS = (
    option("what", choices=["driver", "check", "family", "time"]),
    option("family", nargs="?"),
    option("--limit", "seconds", type=float, default=60.0),
    option("--each", "seconds for a family, with check", type=float, default=60.0),
    option("--rows", type=_numbers, default="16,256,2048,8192"),
    option("--budget", "seconds of the device for each call's times", type=float, default=0.02),
    option("--ranks", "of the adapter; where it is 0 every tile is timed", type=_numbers, default="16,0"),
    option("--noise", "kinds to time", nargs="+", choices=KINDS, default=list(NOISES)),
    option("--only", "what has this regular expression in its name", default=""),
    option("--library", "another build, as cuda@NAME", action="append", default=[], metavar="NAME=FILE"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add(parser, OPTIONS)
    given = parser.parse_args()
    _libraries.update({name: Path(file).resolve() for name, file in (x.split("=", 1) for x in given.library)})
    if DEVICE == "cpu" and not os.environ.get("FLATLORA_EMULATE"):
        print("truth: torch sees no GPU", file=sys.stderr)
        return 2
    names = list(_libraries)
    try:
        for name in names:
            _load(name)
    except ValueError as error:
        parser.error(str(error))
    if given.what == "driver":
        return driver()
    if given.what == "family":
        failed = _check_family(given.family, _families(names)[given.family], given.each)
    elif given.what == "check":
        # A family ends by itself, and then says how: what ends it at the limit does not know.
        more = [f"--library={x}" for x in given.library] + [f"--each={min(given.each, 0.8 * given.limit)}"]
        return check(given.limit, names, more, given.only)
    else:
        chosen = (given.limit, given.rows, names, given.budget, given.only, given.ranks, given.noise)
        failed = measure(*chosen)
    return min(failed, NO_TIME - 1)


if __name__ == "__main__":
    sys.exit(main())
