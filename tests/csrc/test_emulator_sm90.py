"""The CUDA kernels for sm_90a, run by the emulator: what test_emulator.py asks of those for sm_80. Products first,
then synchronisation taken away, then mistakes in the source.
"""

from __future__ import annotations

from pathlib import Path

import emulator
import pytest
import test_emulator
import torch
import wrappers
from emulator import Kernels
from test_emulator import F16, Case, Fault, check, inputs, kernels, outcome, synchronisation, with_faults
from torch import Tensor

from flatlora_kernels.core.records import Draw

__all__ = ["kernels"]  # the fixture

pytestmark = pytest.mark.emulator

# Rows of the table in csrc/cuda/linear_sm90.h: tiles of 256 x 128 in clusters of two, 256 x 64 and 128 x 64.
LARGE, MIDDLE, SMALL = 1000, 1001, 1002

CASES = [
    # several tiles each way, more steps than stages, tails everywhere
    Case(600, 136, 328, LARGE, rank=16, bias=True),
    Case(600, 328, 136, LARGE, input_grad=True, rank=16),
    Case(300, 72, 648, MIDDLE, F16, "rademacher", rank=8, bias=True),
    Case(300, 648, 72, MIDDLE, F16, "rademacher", input_grad=True, rank=24),
    Case(150, 136, 648, SMALL),
    Case(150, 648, 136, SMALL, input_grad=True, noise="rademacher", rank=8),
    # less than a tile, fewer steps than stages, less than a step, one row
    Case(5, 72, 128, MIDDLE, rank=8),
    Case(5, 24, 8, SMALL, rank=16),
    Case(5, 8, 24, LARGE, input_grad=True),
    Case(1, 72, 136, SMALL, noise="rademacher", bias=True),
    Case(1, 136, 72, MIDDLE, input_grad=True, rank=8),
    # odd rows of W
    Case(140, 77, 72, MIDDLE, bias=True, row_offset=3),
    Case(140, 77, 72, SMALL, noise="rademacher", row_offset=16),
    Case(33, 141, 80, MIDDLE, noise="rademacher", row_offset=48, input_grad=True),
    Case(33, 67, 136, LARGE, input_grad=True, rank=8),
    # samples
    Case(420, 72, 72, MIDDLE, samples=3, rank=8),
    Case(60, 72, 136, SMALL, samples=4, antithetic=True),
    Case(132, 136, 72, LARGE, samples=2, antithetic=True, input_grad=True, noise="rademacher"),
    # ranks beyond a step
    Case(20, 72, 72, MIDDLE, rank=200),
    Case(20, 72, 72, SMALL, F16, rank=72, input_grad=True),
    # units of two rows and two blocks, whole and cut
    Case(600, 136, 328, LARGE, noise="near_gaussian", rank=16, bias=True),
    Case(600, 328, 136, LARGE, noise="near_gaussian", input_grad=True, rank=16),
    Case(300, 77, 648, MIDDLE, F16, "near_gaussian", rank=8, row_offset=16),
    Case(150, 141, 72, SMALL, noise="near_gaussian", input_grad=True, samples=2, antithetic=True),
    Case(300, 136, 648, LARGE, F16, "rademacher", rank=8),
    Case(300, 77, 1672, LARGE, noise="rademacher", samples=2, antithetic=True),
    Case(300, 1672, 72, LARGE, noise="rademacher", input_grad=True),
]


@pytest.fixture(autouse=True)
def settings(request, monkeypatch):
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels").set(seed=0, architecture=90, processors=4, checks=1)

    def strided(matrix: Tensor, layout: str) -> Tensor:
        """With space between the rows, which begin at multiples of 16 bytes."""
        columns = matrix.shape[1]
        return torch.nn.functional.pad(matrix, (0, 8 + -columns % 8), value=torch.nan)[:, :columns]

    monkeypatch.setattr(test_emulator, "strided", strided)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(kernels, case):
    kernels.statistics()
    check(kernels, case)
    files = {site.file for site in kernels.statistics()}
    assert "linear_sm90.h" in files and "linear_sm80.h" not in files


def test_noise_beyond_float16(kernels):
    """Columns that the tile has and W has not must hold zeros: noise overflows there, and 0 * inf is NaN."""
    x, weight = torch.full((130, 72), 1e-3, dtype=F16), torch.zeros(128, 72, dtype=F16)
    draw = Draw(torch.full((128,), 2e4), torch.tensor(78))
    y, _ = kernels.linear(x, weight, draw, config=SMALL)
    assert y.isinf().any() and not y.isnan().any()


def check_banks(kernels: Kernels, case: Case) -> None:
    """No conflicts, but where the adapter's factor is gathered."""
    a, weight, draw, options = inputs(case)
    kernels.statistics()
    kernels.linear(a, weight, draw, **options)
    sites = [site for site in kernels.statistics() if site.phases and site.file == "linear_sm90.h"]
    assert sites and not [str(site) for site in sites if site.conflicts]


@pytest.mark.parametrize("case", CASES[:6] + CASES[-7:], ids=str)
def test_no_bank_conflicts(kernels, case):
    check_banks(kernels, case)


def test_schedules(kernels):
    """However the blocks of a cluster, their warps and the copies overtake each other."""
    case = CASES[2]
    a, weight, draw, options = inputs(case)
    results = []
    for seed in range(4, 12):
        kernels.set(seed=seed, processors=2 + seed % 7)
        results.append(kernels.linear(a, weight, draw, **options, splits=1)[0])
    assert all(y.equal(results[0]) for y in results)


# --- Faults: each must be found ---


@pytest.mark.parametrize("seed", [0, 1])
def test_every_synchronisation_is_needed_and_missed(kernels, seed):
    found: dict[str, str] = {}
    for case in (CASES[0], CASES[1], CASES[2], CASES[5], CASES[18]):
        kernels.set(seed=seed)
        good, sites = synchronisation(kernels, case)
        for site in sites:
            if found.get(str(site)) or site.file != "linear_sm90.h":
                continue
            with kernels.without(site):
                found[str(site)], _ = outcome(kernels, case, good)
        assert not outcome(kernels, case, good)[0]
    assert len(found) >= 15
    assert not [site for site, wrong in found.items() if not wrong]


FORWARD = Case(300, 72, 648, LARGE, rank=8, bias=True)
BACKWARD = Case(140, 648, 72, LARGE, input_grad=True)
SAMPLES = Case(60, 72, 72, LARGE, samples=3)
FAULTS = [
    Fault("no swizzle", "((chunk() ^ line % 8) << 4)", "(chunk() << 4)", FORWARD),
    Fault("eight lines in half their bytes", "eight_lines = 1024 >> 4", "eight_lines = 512 >> 4", FORWARD),
    Fault("not transposed", "multiply<kInputGrad>(acc,", "multiply<false>(acc,", BACKWARD),
    Fault("rows of the other consumer", "uint32_t(consumer()) * (kTile.m / 2)", "0", FORWARD),
    Fault("stage in use released", "if (step > lora_steps) release(before);", "release(ring.slot);", FORWARD,
          "data race: wgmma"),
    Fault("stage free after one consumer", "kCluster * kTile.kConsumers * 4", "kCluster * 4", FORWARD,
          "data race"),
    Fault("released to the own block alone", "if (gpu::lane() < kCluster) gpu::mbarrier",
          "if (gpu::lane() == rank) gpu::mbarrier", FORWARD, "arrivals and 0 bytes are missing"),
    Fault("parity of the other turn", "ring.parity ^ 1);", "ring.parity);", FORWARD, "deadlock"),
    Fault("sent into a stage in use", "if (!gpu::mbarrier_test(empty(ring.slot), ring.parity ^ 1)) return 0;", "",
          FORWARD, "more arrivals than the 2 expected"),
    Fault("written into a stage in use", "open(ring, a_map, at, fetched);",
          "if (fetches() && !fetched) open(ring, a_map, at);", FORWARD, "data race"),
    Fault("own share awaited too", "(kCluster - 1) * kShareBytes);", "kCluster * kShareBytes);", FORWARD,
          "bytes are missing"),
    Fault("share of the first block", "uint32_t(rank) * kShareBytes;", "0u;", FORWARD),
    Fault("barrier before the fence", "gpu::fence_proxy_async();\n    meet(turn);",
          "meet(turn);\n    gpu::fence_proxy_async();", FORWARD, "missing proxy fence"),
    Fault("producers share a barrier", "gpu::sync_named(1 + turn, kGroup);", "gpu::sync_named(1, kGroup);", FORWARD),
    Fault("rows of the next sample stored", "last_m = (sample + 1) * job.rows_per_sample;", "last_m = job.args.M;",
          SAMPLES, "wrote in the same launch"),
    Fault("noise of the first sample for all", "draw_of(args.noise, sample)", "draw_of(args.noise, 0)", SAMPLES),
    Fault("adapter not scaled", "lora_steps > 0 ? float(job.args.scaling) : 1.0f", "1.0f", FORWARD),
]  # fmt: skip


def without_others(*missing: str) -> str:
    """In place of the kernels that a build with one of them does not have, as api.cu calls them."""
    text = "bool linear_sm80_takes(const LinearArgs&) { return true; }\n"
    text += "".join(
        f"bool linear_{name}_takes(const LinearArgs&, const Gpu&) {{ return false; }}\n" for name in missing
    )
    for name in ("sm80", *missing):
        text += f"int64_t linear_{name}_workspace(const LinearArgs&, const Gpu&) {{ return 0; }}\n"
        text += f"gpu::Error linear_{name}(const LinearArgs&, const Gpu&) {{ return 1; }}\n"
    for name, arguments in (("row_sq_norms", "RowNorms"), ("perturb", "Perturb"), ("transform", "Transform")):
        text += f"gpu::Error {name}(const {arguments}Args&, const Gpu&) {{ return 1; }}\n"
    return f"namespace flatlora {{\n{text}}}\n"


ONE_KERNEL = """
#include "linear_sm90.h"
#include "linear_sm90.cu"

namespace flatlora {
template <bool kInputGrad>
gpu::Error launch_one(const gpu::Launch& how, const gpu::TensorMap& a_map, const gpu::TensorMap& u_map,
                      const Sm90Job& job) {
  return gpu::launch(linear_sm90_kernel<gpu::bf16, kInputGrad, Noise::kGaussian, kSm90Large>, how, a_map, u_map, job);
}
template <>
gpu::Error launch_linear_sm90<gpu::bf16>(int, const gpu::Launch& how, const gpu::TensorMap& a_map,
                                         const gpu::TensorMap& u_map, const Sm90Job& job) {
  return job.linear.args.input_grad ? launch_one<true>(how, a_map, u_map, job)
                                    : launch_one<false>(how, a_map, u_map, job);
}
template <>
gpu::Error launch_linear_sm90<gpu::f16>(int, const gpu::Launch&, const gpu::TensorMap&, const gpu::TensorMap&,
                                        const Sm90Job&) {
  return 1;
}
gpu::Error clusters_sm90(int, const gpu::Launch& how, int64_t processors, int64_t* count) {
  *count = processors / how.cluster;
  return 0;
}
}  // namespace flatlora
"""
ONE_KERNEL += without_others("ahead")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    if emulator.CXX is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("faults")
    rest = [
        emulator.compile_object(emulator.CSRC / path, folder / f"{Path(path).stem}.o", "-DFLATLORA_HAVE_SM90")
        for path in ("cuda/api.cu", "cuda/split.cu")
    ]
    rest += wrappers.emulator_objects()
    built = with_faults(folder, "cuda/linear_sm90.h", ONE_KERNEL, FAULTS, rest, "-Wno-psabi")
    for build in built.values():
        build.set(architecture=90, processors=4, seed=1)
    return built


@pytest.mark.parametrize("case", [FORWARD, BACKWARD, SAMPLES], ids=str)
def test_no_fault(faulty, case):
    check(faulty["nothing"], case)
    check_banks(faulty["nothing"], case)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(faulty, fault):
    assert (emulator.CSRC / "cuda/linear_sm90.h").read_text().count(fault.old) == 1, "this text has changed"
    expected = RuntimeError if fault.found else (AssertionError, RuntimeError)
    with pytest.raises(expected, match=fault.found or None):
        check(faulty[fault.name], fault.case)
        check_banks(faulty[fault.name], fault.case)
