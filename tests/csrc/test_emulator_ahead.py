"""The kernel for sm_90a whose blocks hand W + eps to each other, run by the emulator: what test_emulator_sm90.py asks
of the other one.
"""

from __future__ import annotations

import emulator
import pytest
import torch
import wrappers
from emulator import AHEAD, Kernels
from test_emulator import F16, Case, Fault, check, inputs, kernels, outcome, synchronisation, with_faults
from test_emulator_sm90 import settings, without_others

from flatlora_kernels.backends.shared import arguments
from flatlora_kernels.core.records import Draw

__all__ = ["kernels", "settings"]  # fixtures

pytestmark = pytest.mark.emulator

# Rows of the table in csrc/cuda/linear_sm90_ahead.h: tiles of 128 x 256 and 128 x 128.
LARGE, SMALL = AHEAD, AHEAD + 1
WIDTH = {LARGE: 256, SMALL: 128}
PROCESSORS, DEPTH = 4, 9  # DEPTH: steps in the ring, few, so that its places are used again

CASES = [
    # several waves, the last not full; more steps than the ring has, tails everywhere
    Case(200, 520, 648, LARGE, rank=16, bias=True),
    Case(200, 648, 520, LARGE, input_grad=True, rank=16),
    Case(300, 392, 648, SMALL, F16, "rademacher", rank=8, bias=True),
    Case(300, 648, 392, SMALL, F16, "rademacher", input_grad=True, rank=24),
    Case(200, 392, 328, LARGE, noise="near_gaussian"),
    Case(150, 328, 392, SMALL, noise="near_gaussian", input_grad=True, rank=8),
    Case(700, 136, 264, SMALL, noise="rademacher"),  # a column has more tiles than there are blocks
    # less than a tile, fewer steps than stages, less than a step, one row
    Case(5, 72, 128, LARGE, rank=8),
    Case(5, 24, 8, SMALL, rank=16),
    Case(5, 8, 24, LARGE, input_grad=True),
    Case(1, 72, 136, SMALL, noise="rademacher", bias=True),
    # odd rows of W
    Case(140, 77, 72, LARGE, input_grad=True, row_offset=3),
    Case(33, 141, 80, SMALL, noise="rademacher", row_offset=48, input_grad=True),
    # samples, each with rows for less than a tile
    Case(420, 136, 136, SMALL, samples=3, rank=8),
    Case(60, 264, 136, LARGE, F16, samples=4, antithetic=True),
    Case(264, 136, 264, LARGE, samples=2, antithetic=True, input_grad=True, noise="near_gaussian"),
    # u made first: more rows than blocks make at a time, ranks beyond what they make at a time, one row
    Case(200, 392, 648, LARGE, F16, rank=16, makes_u=True),
    Case(140, 136, 1608, SMALL, noise="rademacher", rank=72, makes_u=True, bias=True),
    Case(1, 72, 40, SMALL, rank=8, makes_u=True),
    Case(60, 136, 72, SMALL, samples=3, rank=40, makes_u=True),
    # ranks beyond a step
    Case(20, 72, 72, SMALL, rank=200),
    Case(20, 72, 72, LARGE, F16, "near_gaussian", rank=72, input_grad=True),
]
# A block that has no tile in the last wave, which still reads what that wave draws over.
IDLE = Case(300, 384, 648, SMALL, rank=8)

# u of more rows and ranks than the blocks make at a time.
MADE = Case(300, 136, 328, SMALL, rank=40, makes_u=True)


def ring_bytes(case: Case, processors: int) -> int:
    """Workspace for a ring of DEPTH steps, as csrc/cuda/linear_sm90_ahead.cu lays it out."""
    tiles_m = -(-case.M // case.samples // 128)
    columns = -(-(case.K if case.input_grad else case.N) // WIDTH[case.config]) * case.samples
    waves = -(-tiles_m * columns // processors)
    workers = -(-tiles_m * columns // waves)
    if -(-workers // tiles_m) * tiles_m <= processors:
        workers = -(-workers // tiles_m) * tiles_m
    wide = workers // tiles_m if workers % tiles_m == 0 else (workers + tiles_m - 2) // tiles_m + 1
    wide = min(wide, columns)
    return 16 + DEPTH * (wide * WIDTH[case.config] * 128 + 4 * (wide + 1))


@pytest.fixture
def small_ring(monkeypatch):
    """small_ring(case) is to be called before the case's product; there is room for one with the identity, too."""

    def allow(case: Case, processors: int = PROCESSORS) -> None:
        identity = case._replace(M=case.N if case.input_grad else case.K, samples=1)
        room = max(ring_bytes(c, processors) for c in (case, identity))
        monkeypatch.setattr(arguments, "workspace_limit", lambda weight: room)

    return allow


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(kernels, small_ring, case):
    small_ring(case)
    check(kernels, case, splits=False, schedules=2)


def check_banks(kernels: Kernels, case: Case) -> None:
    a, weight, draw, options = inputs(case)
    kernels.statistics()
    kernels.linear(a, weight, draw, **options)
    sites = [site for site in kernels.statistics() if site.phases]
    assert sites and not [str(site) for site in sites if site.conflicts]


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_no_bank_conflicts(kernels, small_ring, case):
    small_ring(case)
    check_banks(kernels, case)


def test_nothing_beyond_the_contraction(kernels, small_ring):
    case = Case(130, 128, 72, SMALL, F16)
    small_ring(case)
    x, weight = torch.full((130, 72), 1e-3, dtype=F16), torch.zeros(128, 72, dtype=F16)
    y, _ = kernels.linear(x, weight, Draw(torch.full((128,), 2e4), torch.tensor(78)), config=SMALL)
    assert y.isinf().any() and not y.isnan().any()


@pytest.mark.parametrize("case", [CASES[3], IDLE], ids=str)
def test_schedules(kernels, small_ring, case):
    """However blocks, warps and copies overtake each other, and however many blocks there are."""
    a, weight, draw, options = inputs(case)
    results = []
    for seed in range(4, 8):
        processors = 1 + seed * 5 % 7
        small_ring(case, processors)
        kernels.set(seed=seed, processors=processors)
        results.append(kernels.linear(a, weight, draw, **options)[0])
    assert all(y.equal(results[0]) for y in results)


def test_what_it_does_not_take(kernels, monkeypatch):
    case = Case(150, 136, 648, LARGE)
    a, weight, draw, _ = inputs(case)

    def run(workspace: int = 1 << 24, **changed: object) -> None:
        monkeypatch.setattr(arguments, "workspace_limit", lambda weight: workspace)
        kernels.linear(**{"a": a, "weight": weight, "draw": draw, "config": LARGE} | changed)

    run()
    run(workspace=8 * (32768 + 8) + 16)
    scale = draw.noise_scale
    for changed in (
        {"workspace": 8 * (32768 + 8) + 15},  # seven steps
        {"noise_accum": "split"},
        {"bias": torch.zeros(136)},  # of another type
        {"weight": weight[:77], "draw": draw._replace(noise_scale=scale[:77])},  # rows of y of 154 bytes
        {"draw": draw._replace(noise="rademacher", row_offset=8)},  # within 16 rows of signs
        {"a": a[:, :640].contiguous()[:, 1:633], "weight": weight[:, :632]},
    ):
        with pytest.raises(RuntimeError, match="that draws into a ring"):
            run(**changed)
    kernels.set(architecture=80)
    with pytest.raises(RuntimeError, match="that draws into a ring"):
        run()


# --- Faults: each must be found ---


def test_every_synchronisation_is_needed_and_missed(kernels, small_ring):
    found: dict[str, str] = {}
    for case, processors in ((CASES[0], PROCESSORS), (CASES[3], PROCESSORS), (IDLE, 5), (MADE, PROCESSORS)):
        small_ring(case, processors)
        kernels.set(seed=1, processors=processors)
        good, sites = synchronisation(kernels, case)
        for site in sites:
            if found.get(str(site)) or site.file != "linear_sm90_ahead.h":
                continue
            with kernels.without(site):
                found[str(site)], _ = outcome(kernels, case, good)
        assert not outcome(kernels, case, good)[0]
    assert len(found) >= 30
    assert not [site for site, wrong in found.items() if not wrong]


FORWARD = Case(300, 520, 648, SMALL, rank=8, bias=True)
BACKWARD = Case(300, 648, 776, LARGE, input_grad=True)
SAMPLES = Case(60, 136, 72, SMALL, samples=3)
SIGNS = Case(20, 136, 72, SMALL, noise="rademacher")
TAIL = Case(20, 40, 328, SMALL)
FAULTS = [
    Fault("no swizzle", "first ^ uint32_t(i) << 5", "first + (uint32_t(i) << 5)", FORWARD),
    Fault("not transposed", "multiply<kInputGrad>(acc,", "multiply<false>(acc,", BACKWARD),
    Fault("half of the outputs twice", "i * 128 * kLineBytes +", "0 * i +", BACKWARD),
    Fault("stage in use released", "if (step > job.lora_steps) release(before);", "release(stage.slot);", FORWARD,
          "data race: wgmma"),
    Fault("drawn before all have read", "job.workers * use - job.idle", "job.workers * use - 1 - job.idle", FORWARD,
          "data race: tma_load"),
    Fault("idle blocks awaited", "- job.idle * short_uses", "", IDLE, "waits for ever: wait_at_least"),
    Fault("one unit too few awaited", "uint32_t(kUnits) * uint32_t(at.use + wraps + 1)",
          "uint32_t(kUnits) * uint32_t(at.use + wraps + 1) - 1", FORWARD, "wrote in the same launch"),
    Fault("columns that a wave has not are not counted", "        make_room(unit, progress);\n",
          "        if (p.inside) make_room(unit, progress);\n", FORWARD, "waits for ever: wait_at_least"),
    Fault("sample of the wave's first column", "p.sample = sample_of(column);",
          "p.sample = sample_of(unit.column);", SAMPLES),
    Fault("one buffer for stores", "uint32_t(part % 2) * AheadTile::kOutBytes", "0 * uint32_t(part)", FORWARD,
          "data race: tma_store"),
    Fault("words of the first rows", "keys.words[0][patch]", "keys.words[0][0 * patch]", SIGNS),
    Fault("what ends within a unit taken for whole", "at + steps <= int(job.length);", "at <= int(job.length);", TAIL),
    Fault("adapter not scaled", "job.lora_steps > 0 ? float(job.args.scaling) : 1.0f", "1.0f", FORWARD),
    Fault("u not awaited", "job.args.lora_A != nullptr && has_tile(0)", "job.waves < 0",
          MADE, "wrote in the same launch"),
    Fault("u of one block awaited", "counted(job.made, uint32_t(gpu::blocks()), wait)", "counted(job.made, 1, wait)",
          MADE, "wrote in the same launch"),
    Fault("rows of u in turn", "rows[i][0].v[half], rows[i][1].v[half],", "rows[i][1].v[half], rows[i][0].v[half],",
          MADE),
    Fault("half of the sums of u", "warp < kUWarps; ++warp", "warp < kUWarps / 2; ++warp", MADE),
    Fault("u beyond the contraction", "const bool inside = at < length;", "const bool inside = true;", MADE),
]  # fmt: skip

ONE_KERNEL = """
#include "linear_sm90_ahead.h"
#include "linear_sm90_ahead.cu"

namespace flatlora {
template <bool kInputGrad, int kConfig, Noise kNoise = Noise::kGaussian>
gpu::Error launch_one(const gpu::Launch& how, const AheadMaps& maps, const AheadJob& job) {
  return gpu::launch(linear_sm90_ahead_kernel<gpu::bf16, kInputGrad, kNoise, kConfig>, how, maps.a, maps.u, maps.w,
                     maps.y, job);
}
template <>
gpu::Error launch_linear_ahead<gpu::bf16>(int, const gpu::Launch& how, const AheadMaps& maps, const AheadJob& job) {
  if (job.args.noise.kind == int64_t(Noise::kRademacher))
    return launch_one<false, kAheadSmall, Noise::kRademacher>(how, maps, job);
  return job.args.input_grad ? launch_one<true, kAheadLarge>(how, maps, job)
                             : launch_one<false, kAheadSmall>(how, maps, job);
}
template <>
gpu::Error launch_linear_ahead<gpu::f16>(int, const gpu::Launch&, const AheadMaps&, const AheadJob&) {
  return 1;
}
}  // namespace flatlora
"""
ONE_KERNEL += without_others("sm90")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    if emulator.CXX is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("faults")
    rest = [emulator.compile_object(emulator.CSRC / "cuda/api.cu", folder / "api.o", "-DFLATLORA_HAVE_SM90")]
    rest += wrappers.emulator_objects()
    built = with_faults(folder, "cuda/linear_sm90_ahead.h", ONE_KERNEL, FAULTS, rest, "-Wno-psabi")
    for build in built.values():
        build.set(architecture=90, seed=1)
    return built


def judge(kernels: Kernels, small_ring, case: Case) -> None:
    processors = 5 if case == IDLE else PROCESSORS
    small_ring(case, processors)
    kernels.set(processors=processors)
    check(kernels, case, splits=False, schedules=2)
    check_banks(kernels, case)


@pytest.mark.parametrize("case", [BACKWARD, SAMPLES, IDLE], ids=str)
def test_no_fault(faulty, small_ring, case):
    judge(faulty["nothing"], small_ring, case)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(faulty, small_ring, fault):
    assert (emulator.CSRC / "cuda/linear_sm90_ahead.h").read_text().count(fault.old) == 1, (
        "this text has changed"
    )
    expected = RuntimeError if fault.found else (AssertionError, RuntimeError)
    with pytest.raises(expected, match=fault.found or None):
        judge(faulty[fault.name], small_ring, fault.case)
