"""The CUDA kernels for sm_80, run by the emulator (csrc/emulator): their values, their synchronisation, their banks.

Products are compared before they are rounded: where the sum is cut in two, its float32 parts lie in the workspace.
They are judged against float64 with the very weights W + eps that the kernel multiplied by, which a product with the
identity brings out; those weights are judged against the specification.
"""

from __future__ import annotations

import functools
import mmap
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import emulator
import pytest
import torch
from emulator import Kernels
from torch import Tensor

from flatlora_kernels.core.noise import epsilon
from flatlora_kernels.core.records import Draw

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LIBRARY = Path(
    os.environ.get("FLATLORA_EMULATOR") or emulator.ROOT / "build/emulator/libflatlora_cuda_emulated.so"
)

pytestmark = pytest.mark.emulator


class Case(NamedTuple):
    M: int
    N: int
    K: int
    config: int  # row of the table in csrc/cuda/configs.h
    dtype: torch.dtype = BF16
    noise: str = "gaussian"
    input_grad: bool = False
    rank: int = 0
    samples: int = 1
    antithetic: bool = False
    row_offset: int = 0
    bias: bool = False
    tf32: bool = False
    apart: bool = False  # noise_accum="split"
    makes_u: bool = False  # of lora_A, which is given in place of u
    layout: str = (
        "rows"  # 16-byte pieces; "odd": none; "far": 2^31 elements away; "columns": W is column-major
    )

    def __str__(self) -> str:
        name = {BF16: "bf16", F16: "f16", F32: "tf32" if self.tf32 else "f32"}[self.dtype]
        parts = [f"{self.M}x{self.N}x{self.K}", f"config{self.config}", name, self.noise]
        parts += [f"{f}{getattr(self, f)}" for f in ("rank", "row_offset") if getattr(self, f)]
        parts += [f"samples{self.samples}"] if self.samples > 1 else []
        parts += [f for f in ("antithetic", "bias", "input_grad", "apart", "makes_u") if getattr(self, f)]
        return "-".join([*parts, *([self.layout] if self.layout != "rows" else [])])


# Tiles are 256 x 128, 128 x 128, 64 x 64 and 16 x 64, the contraction goes in steps of 64 through 3 or 4 stages.
CASES = [
    # several tiles each way, more steps than stages, tails everywhere
    Case(300, 200, 328, 0, rank=16, bias=True),
    Case(300, 328, 200, 0, input_grad=True, rank=16),
    Case(150, 200, 328, 1, F16, "rademacher", rank=8, bias=True),
    Case(150, 328, 200, 1, F16, "rademacher", input_grad=True),
    Case(70, 136, 328, 2),
    Case(70, 328, 136, 2, input_grad=True, noise="rademacher", rank=24),
    Case(20, 136, 328, 3, rank=4),
    Case(20, 328, 136, 3, input_grad=True),
    # one row; fewer steps than stages; less than a step
    Case(1, 72, 520, 3, bias=True),
    Case(1, 520, 72, 3, noise="rademacher", input_grad=True, rank=2),
    Case(5, 72, 128, 0),
    Case(5, 24, 8, 1, rank=16),
    Case(5, 8, 24, 3, input_grad=True),
    Case(3, 40, 16, 2, F16, "rademacher"),
    # odd sizes: element by element
    Case(67, 77, 131, 2, layout="odd", rank=3, bias=True),
    Case(67, 131, 77, 2, F16, "rademacher", input_grad=True, layout="odd", rank=3),
    Case(20, 21, 330, 2, layout="odd"),
    Case(20, 330, 21, 2, layout="odd", input_grad=True, noise="rademacher"),
    Case(1, 1, 1, 2, layout="odd"),
    Case(9, 65, 72, 2, layout="columns"),
    Case(9, 65, 72, 2, input_grad=True, layout="columns"),
    Case(33, 77, 64, 0, row_offset=3),  # odd outputs
    # rows of W that begin within a word of signs
    Case(33, 80, 136, 2, noise="rademacher", row_offset=3),
    Case(33, 136, 80, 2, noise="rademacher", row_offset=9, input_grad=True),
    Case(33, 141, 80, 1, noise="rademacher", row_offset=12, input_grad=True),
    # units of two rows and two blocks, whole and cut
    Case(300, 200, 328, 0, noise="near_gaussian", rank=16, bias=True),
    Case(150, 328, 200, 1, F16, "near_gaussian", input_grad=True),
    Case(70, 141, 328, 2, noise="near_gaussian", row_offset=16, rank=24),
    Case(20, 328, 136, 3, noise="near_gaussian", input_grad=True, samples=2, antithetic=True),
    Case(33, 77, 131, 2, noise="near_gaussian", layout="odd", rank=3),
    Case(33, 77, 131, 2, noise="near_gaussian", layout="odd", row_offset=3),
    Case(33, 136, 80, 2, F16, "near_gaussian", input_grad=True, row_offset=9),
    Case(17, 100, 68, 3, F32, "near_gaussian", rank=16),
    Case(70, 196, 100, 2, F32, "near_gaussian", input_grad=True),
    Case(9, 65, 33, 2, F32, "near_gaussian", layout="odd", row_offset=3),
    Case(70, 136, 328, 2, noise="near_gaussian", apart=True, rank=8, bias=True),
    Case(20, 200, 136, 3, F16, "near_gaussian", input_grad=True, apart=True),
    Case(33, 77, 131, 2, noise="near_gaussian", layout="odd", row_offset=3, apart=True),
    # elements beyond 2^31
    Case(300, 280, 72, 0, layout="far"),
    Case(280, 300, 72, 2, layout="far", input_grad=True),
    # samples
    Case(60, 72, 136, 0, samples=3, rank=8),
    Case(60, 72, 136, 3, samples=4, antithetic=True),
    Case(60, 136, 72, 2, samples=4, antithetic=True, input_grad=True, noise="rademacher"),
    Case(132, 72, 72, 2, samples=2, input_grad=True),
    # ranks beyond a step
    Case(20, 72, 72, 2, rank=200),
    Case(20, 72, 72, 3, F16, rank=65, input_grad=True),
    # float32
    Case(70, 100, 196, 2, F32, rank=8, bias=True),
    Case(70, 196, 100, 2, F32, input_grad=True),
    Case(17, 100, 68, 3, F32, "rademacher", samples=1, rank=16),
    Case(17, 68, 100, 3, F32, "rademacher", input_grad=True, rank=16),
    Case(70, 100, 196, 2, F32, tf32=True),
    Case(70, 196, 100, 3, F32, tf32=True, input_grad=True),
    Case(9, 65, 33, 2, F32, layout="odd", rank=3),
    # what rounding W + eps leaves, in a tile of its own
    Case(70, 136, 328, 2, apart=True, rank=8, bias=True),
    Case(70, 328, 136, 2, F16, "rademacher", input_grad=True, apart=True),
    Case(20, 136, 200, 3, F16, apart=True, rank=4),
    Case(20, 200, 136, 3, noise="rademacher", input_grad=True, apart=True),
    Case(67, 77, 131, 2, noise="rademacher", layout="odd", row_offset=3, apart=True),
    Case(20, 330, 21, 2, layout="odd", input_grad=True, samples=2, antithetic=True, apart=True),
]


@pytest.fixture(scope="module")
def kernels():
    if not LIBRARY.exists():
        if "cuda" in os.environ.get("FLATLORA_REQUIRE_BACKENDS", ""):
            pytest.fail(f"no {LIBRARY}")
        pytest.skip(f"no {LIBRARY}: `make emulator`")
    return Kernels(LIBRARY)


@pytest.fixture(autouse=True)
def settings(request):
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels").set(seed=0, architecture=80, processors=4, checks=1)


class Inputs(NamedTuple):
    a: Tensor
    weight: Tensor
    draw: Draw
    options: dict


def strided(matrix: Tensor, layout: str) -> Tensor:
    """The same values with space between the rows; "odd": not even aligned."""
    if layout == "far":
        stride = 2**23 - 8
        pages = mmap.mmap(
            -1, len(matrix) * stride * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
        )  # no reserve
        return (
            torch.frombuffer(pages, dtype=matrix.dtype).view(-1, stride)[:, : matrix.shape[1]].copy_(matrix)
        )
    space = {"rows": 8 if matrix.element_size() == 2 else 4, "odd": 3, "columns": 8}[layout]
    return torch.nn.functional.pad(matrix, (0, space), value=torch.nan)[:, : matrix.shape[1]]


@functools.cache
def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(case.M + 1000 * case.N + 1000000 * case.K)
    randn = functools.partial(torch.randn, generator=generator)
    M, N, K = case.M, case.N, case.K
    inner, outputs = (N, K) if case.input_grad else (K, N)
    weight = strided((randn(N, K) / K**0.5).to(case.dtype), case.layout)
    if case.layout == "columns":
        weight = weight.t().contiguous().t()
    scale = torch.rand(2 * N, generator=generator)[::2] * 0.5 / K**0.5 + 0.01
    draw = Draw(scale, torch.tensor(-(2**62) + 12345), 7, case.noise, case.samples, 2, case.antithetic,
                case.row_offset, 8 * (case.row_offset % 4))  # fmt: skip
    options = plain(case)
    if case.rank:
        # A second type and no unit stride for the adapter.
        lora = (randn(case.rank, outputs) / case.rank**0.5).t()
        options |= {"u": randn(M, case.rank).to(case.dtype), "lora": lora, "scaling": 0.75}
    if case.makes_u:
        options["lora_A"] = strided((randn(case.rank, K) / K**0.5).to(case.dtype), case.layout)
    if case.bias:
        options["bias"] = (
            randn(2 * outputs)[::2] if case.config < emulator.AHEAD else randn(outputs).to(case.dtype)
        )
    return Inputs(strided(randn(M, inner).to(case.dtype), case.layout), weight, draw, options)


def plain(case: Case) -> dict:
    """The options of a product without adapter and bias."""
    accum = "split" if case.apart else "folded"
    return {"input_grad": case.input_grad, "config": case.config, "tf32": case.tf32, "noise_accum": accum}


def multiplied_weights(kernels: Kernels, case: Case) -> list[Tensor]:
    """W + eps, rounded as the kernel does, of each sample: its product with the identity."""
    given = inputs(case)
    size = case.N if case.input_grad else case.K
    identity = strided(torch.eye(size, dtype=case.dtype), case.layout)
    found = []
    for group in range(case.samples):
        draw = given.draw._replace(samples=1, sample_offset=given.draw.sample_offset + group)
        P, parts = kernels.linear(identity, given.weight, draw, **plain(case), splits=2 if case.apart else 0)
        if case.apart:  # two tiles, whose sum float32 holds
            P = parts.sum(0)
        found.append(P if case.input_grad else P.t())
    return found


def to_tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def expected(case: Case, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The product without bias in float64, and the sum of the sizes of its terms."""
    a, _, _, options = inputs(case)
    value, size = [], []
    if case.tf32:
        a = to_tf32(a)
    for rows, P in zip(a.double().chunk(case.samples), weights, strict=True):
        P64 = P.double() if case.input_grad else P.double().t()
        value.append(rows @ P64)
        size.append(rows.abs() @ P64.abs())
    value, size = torch.cat(value), torch.cat(size)
    if case.rank:
        u, lora = (to_tf32(t) if case.tf32 else t.to(case.dtype) for t in (options["u"], options["lora"]))
        u, lora = u.double() * options["scaling"], lora.double().t()
        value, size = value + u @ lora, size + u.abs() @ lora.abs()
    return value, size


def check_u(kernels: Kernels, case: Case) -> None:
    """Of the call, and leaves it in its options."""
    a, weight, draw, options = inputs(case)
    kernels.linear(a, weight, draw, **options)
    a, lora_A, u = (t.double() for t in (a, options["lora_A"], options["u"]))
    error = (u - a @ lora_A.t()).abs() - torch.finfo(case.dtype).eps / 2 * u.abs()
    assert (error <= 1e-6 * (a.abs() @ lora_A.abs().t())).all()


def check(kernels: Kernels, case: Case, splits: bool = True, schedules: int = 4) -> None:
    """All that is asked of a product. `splits`: the kernel can cut a sum in two."""
    a, weight, draw, options = inputs(case)
    if case.makes_u:
        check_u(kernels, case)
        u = options["u"].clone()
    weights = multiplied_weights(kernels, case)
    value, size = expected(case, weights)

    # The weights are those of the specification, and of `perturb`.
    unit = torch.finfo(case.dtype).eps if not case.tf32 else 2.0**-10
    unit = unit**2 if case.apart else unit
    for group, P in enumerate(weights):
        eps = epsilon(draw, case.K, case.dtype, group)
        error = (P.double() - weight.double() - eps.double()).abs()
        largest = torch.maximum(weight.double().abs(), eps.double().abs())
        ulp = unit * 2.0 ** largest.clamp(torch.finfo(case.dtype).tiny).log2().floor()
        rounded = case.noise == "gaussian" or case.apart  # what is left has few bits in float16
        inexact = 1e-4 * draw.noise_scale[:, None] if rounded else 2.0**-23 * eps.abs()
        assert (error <= ulp + inexact).all()
        if not case.tf32 and not case.apart and kernels.whole:
            alone = draw._replace(samples=1, sample_offset=draw.sample_offset + group)
            assert kernels.perturb(weight, alone).equal(P)

    # Sums in float32.
    found = []
    if splits:
        y_of_parts, parts = kernels.linear(a, weight, draw, **options, splits=2)
        found.append(y_of_parts)
        if (case.N if case.input_grad else case.K) > 64:
            assert len(parts) == 2
            assert ((parts.double().sum(0) - value).abs() / size.clamp(min=1e-30)).max() <= 1e-6

    # The result is that, plus bias, rounded once. Schedules change nothing.
    if case.bias:
        value = value + options["bias"].double()
    half_unit = torch.finfo(case.dtype).eps / 2
    results = []
    for seed in range(schedules):
        kernels.set(seed=seed)
        results.append(kernels.linear(a, weight, draw, **options, splits=1)[0])
        assert not case.makes_u or options["u"].equal(u)
    assert all(y.equal(results[0]) for y in results)
    for y in (*found, results[0]):
        error = (y.double() - value).abs() - half_unit * y.double().abs()
        assert (error <= 1e-6 * (size + value.abs()) + 1e-30).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(kernels, case):
    check(kernels, case)


def test_forward_and_input_grad_see_the_same_weights(kernels):
    for noise in ("gaussian", "near_gaussian", "rademacher"):
        case = Case(8, 72, 136, 2, noise=noise)
        forward = multiplied_weights(kernels, case)[0]
        for config in range(4):
            for input_grad in (False, True):
                other = case._replace(config=config, input_grad=input_grad)
                assert multiplied_weights(kernels, other)[0].equal(forward)


@pytest.mark.parametrize("config", [0, 1, 2, 3, 1000, 1001, 1002])
def test_nothing_beyond_the_contraction(kernels, config):
    """Noise may overflow float16. What is drawn for columns that W does not have must not show in the product."""
    kernels.set(architecture=90 if config >= 1000 else 80)
    scale, weight = torch.full((64,), 3e4), torch.zeros(64, 16, dtype=F16)
    draw = Draw(scale, torch.tensor(5))
    drawn = kernels.perturb(weight, draw)
    finite = drawn.isfinite().all(1)
    assert 8 < finite.sum() < 56
    x = torch.full((3, 16), 2.0**-12, dtype=F16)
    y, _ = kernels.linear(x, weight, draw, config=config)
    assert y[:, finite].isfinite().all()
    row = int(finite.nonzero()[0])
    one = draw._replace(noise_scale=scale[:1], row_offset=row)
    dx, _ = kernels.linear(x[:, :1].clone(), weight[:1], one, input_grad=True, config=config)
    assert dx.isfinite().all()


def check_banks(kernels: Kernels, case: Case) -> None:
    """No conflicts in the loop over the contraction. Elements copied one by one and the adapter's may have some."""
    a, weight, draw, options = inputs(case)
    kernels.statistics()
    kernels.linear(a, weight, draw, **options)
    sites = [site for site in kernels.statistics() if site.phases and site.file == "linear_sm80.h"]
    assert len(sites) >= 4
    elsewhere = {"gather_piece", "adapter", "clear_tail"}
    assert not [str(s) for s in sites if s.conflicts and s.function not in elsewhere]


@pytest.mark.parametrize("case", [case for case in CASES if case.layout == "rows"], ids=str)
def test_no_bank_conflicts(kernels, case):
    check_banks(kernels, case)


# --- Faults: each must be found ---

FAULTY_CASES = [CASES[i] for i in (0, 1, 2, 6, 7, 13, 14)] + [
    case for case in CASES if case.rank > 64 or case.apart
]


def outcome(kernels: Kernels, case: Case, good: Tensor | None) -> tuple[str, Tensor | None]:
    """What is wrong with a launch, and its result."""
    a, weight, draw, options = inputs(case)
    try:
        y, _ = kernels.linear(a, weight, draw, **options)
    except RuntimeError as error:
        return str(error), None
    return "" if good is None or y.equal(good) else "other values", y


def synchronisation(kernels: Kernels, case: Case) -> tuple[Tensor, list[emulator.Site]]:
    kernels.statistics()
    wrong, good = outcome(kernels, case, None)
    assert not wrong
    return good, [site for site in kernels.statistics() if site.synchronises]


def test_every_synchronisation_is_needed_and_missed(kernels):
    """Each barrier, commit and wait of the kernels, taken away alone, is found in one of these cases."""
    found: dict[str, str] = {}
    for case in FAULTY_CASES:
        good, sites = synchronisation(kernels, case)
        for site in sites:
            if found.get(str(site)):
                continue
            with kernels.without(site):
                found[str(site)], _ = outcome(kernels, case, good)
        assert not outcome(kernels, case, good)[0]
    assert len(found) >= 6
    assert not [site for site, wrong in found.items() if not wrong]


def test_every_synchronisation_of_norms(kernels):
    generator = torch.Generator().manual_seed(0)
    weight, A, B = (torch.randn(*size, generator=generator) for size in ((40, 136), (8, 136), (40, 8)))
    good = kernels.row_sq_norms(weight, A, B)
    kernels.statistics()
    kernels.row_sq_norms(weight, A, B)
    for site in kernels.statistics():
        if site.synchronises:
            with kernels.without(site):
                try:
                    wrong = not kernels.row_sq_norms(weight, A, B).equal(good)
                except RuntimeError:
                    wrong = True
                assert wrong, str(site)


class Fault(NamedTuple):
    """A mistake in csrc/cuda/linear_sm80.h: one text in place of another that stands there once."""

    name: str
    old: str
    new: str
    case: Case
    found: str = ""  # part of the emulator's report; empty: wrong values


FORWARD = Case(70, 136, 328, 2, rank=8, bias=True)
BACKWARD = Case(70, 328, 136, 2, input_grad=True)
SAMPLES = Case(60, 72, 136, 2, samples=3)
FAULTS = [
    Fault("swizzle of x", "((lane >> 4 ^ swizzle(lane & 7)) << 4)", "((lane >> 4) << 4)", FORWARD),
    Fault("no swizzle", "return (row & 3) << 1 | (row >> 2 & 1);", "return row & 0;", FORWARD),
    Fault("not transposed", "gpu::ldmatrix_trans(", "gpu::ldmatrix(", BACKWARD),
    Fault("stage in use copied over", "free = slot == 0 ? kLastSlot : slot - kStageBytes;", "free = slot;", FORWARD,
          "data race"),
    Fault("next stage copied over", "free = slot == 0 ? kLastSlot : slot - kStageBytes;", "free = next;", FORWARD,
          "data race"),
    Fault("noise added to the stage in use", "pass.stage = w_stage(next);", "pass.stage = w_stage(slot);", FORWARD,
          "data race"),
    Fault("no tail of x", "const int a_valid = bytes_before(end, at + a_piece * kPerPiece);", "const int a_valid = 16;",
          FORWARD),
    Fault("tail of x too long", "a_valid = bytes_before(end,", "a_valid = bytes_before(end + 1,", FORWARD),
    Fault("one whole step too many", "/ kTile.k) - (kStages - 1),", "/ kTile.k) - (kStages - 2),", FORWARD),
    Fault("noise of the step before", "pass.blocks = blocks_at(at + kTile.k);", "pass.blocks = blocks_at(at);",
          FORWARD),
    Fault("noise of the first tile's rows", "set_rows(rows, draw, uint32_t(first_out) + w_row);",
          "set_rows(rows, draw, w_row);", FORWARD),
    Fault("noise_scale of the step before", "load_scales<kEdge>(at + 2 *", "load_scales<kEdge>(at +", BACKWARD),
    Fault("rows beyond the tile stored", "if (r >= last_m) continue;", "", FORWARD, "lets it write"),
    Fault("rows of the next sample stored", "last_m = (sample + 1) * job.rows_per_sample;", "last_m = job.args.M;",
          SAMPLES, "wrote in the same launch"),
    Fault("noise of the first sample for all", "draw = draw_of(job.args.noise, sample);",
          "draw = draw_of(job.args.noise, 0);", SAMPLES),
    Fault("one stage too few waited for", "gpu::cp_async_wait<kStages - 3>();", "gpu::cp_async_wait<kStages - 2>();",
          FORWARD, "data race"),
    Fault("adapter not scaled", "*= float(args.scaling);", "*= 1.0f;", FORWARD),
    Fault("adapter in every part", "if (begin == 0 && job.args.rank > 0)", "if (job.args.rank > 0)", FORWARD),
    Fault("too much shared memory", "return a_stage(slot) + kABytes;",
          "return a_stage(slot + kStageBytes) + kABytes;", FORWARD, "bytes of shared memory"),
]  # fmt: skip

ONE_KERNEL = """
#include "linear_sm80.h"
#include "linear_sm80.cu"

namespace flatlora {
template <bool kInputGrad>
gpu::Error launch_gaussian(const gpu::Launch& how, const LinearJob& job) {
  return gpu::launch(linear_sm80_kernel<gpu::bf16, kInputGrad, Noise::kGaussian, kAny>, how, job);
}
template <>
gpu::Error launch_linear_sm80<gpu::bf16>(Config, const gpu::Launch& how, const LinearJob& job) {
  return job.args.input_grad ? launch_gaussian<true>(how, job) : launch_gaussian<false>(how, job);
}
template <>
gpu::Error launch_linear_sm80<gpu::f16>(Config, const gpu::Launch&, const LinearJob&) { return 1; }
template <>
gpu::Error launch_linear_sm80<float>(Config, const gpu::Launch&, const LinearJob&) { return 1; }
gpu::Error launch_linear_packed_sm80(Config, const gpu::Launch&, const PackedLinearJob&) { return 1; }
gpu::Error row_sq_norms(const RowNormsArgs&, const Gpu&) { return 1; }
gpu::Error perturb(const PerturbArgs&, const Gpu&) { return 1; }
gpu::Error transform(const TransformArgs&, const Gpu&) { return 1; }
}  // namespace flatlora
"""


def with_faults(
    folder: Path, source: str, one_kernel: str, faults: list[Fault], rest: list[Path], *flags: str
) -> dict[str, Kernels]:
    """For each fault in `source`, and for none, a library with the two kernels that the faults are tried on."""
    text = (emulator.CSRC / source).read_text()

    def build(fault: Fault) -> tuple[str, Kernels]:
        here = folder / fault.name.replace(" ", "_").replace("'", "")
        shutil.copytree(emulator.CSRC, here)
        if text.count(fault.old) == 1:  # else test_fault says so
            (here / source).write_text(text.replace(fault.old, fault.new))
        (here / "cuda/one.cu").write_text(one_kernel)
        one = emulator.compile_object(here / "cuda/one.cu", here / "one.o", "-Wno-unused", *flags)
        kernels = Kernels(emulator.link([one, *rest], here / "one.so"))
        kernels.whole = False
        return fault.name, kernels

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, [Fault("nothing", "", "", FORWARD), *faults]))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    if emulator.CXX is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("faults")
    rest = [emulator.compile_object(emulator.CSRC / path, folder / f"{Path(path).stem}.o")
            for path in ("cuda/api.cu", "cuda/split.cu", "emulator/machine.cpp")]  # fmt: skip
    return with_faults(folder, "cuda/linear_sm80.h", ONE_KERNEL, FAULTS, rest)


@pytest.mark.parametrize("case", [FORWARD, BACKWARD, SAMPLES], ids=str)
def test_no_fault(faulty, case):
    check(faulty["nothing"], case)
    check_banks(faulty["nothing"], case)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(faulty, fault):
    kernels = faulty[fault.name]
    assert (emulator.CSRC / "cuda/linear_sm80.h").read_text().count(fault.old) == 1, "this text has changed"
    with pytest.raises(
        RuntimeError if fault.found else (AssertionError, RuntimeError), match=fault.found or None
    ):
        check(kernels, fault.case)
        check_banks(kernels, fault.case)
