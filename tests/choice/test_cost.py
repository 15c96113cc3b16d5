"""choice/cost.py against the pages, sources and allocations that it speaks of, and `bench roofline`."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from flatlora_kernels.triton_kernels import configs

from flatlora_kernels import backends
from flatlora_kernels.backends.shared import panel
from flatlora_kernels.choice import chips, cost
from flatlora_kernels.choice.cost import Call, Chip, Work
from flatlora_kernels.core.noise import KINDS

pytest.importorskip("bench")
from bench import cli, results, roofline, targets  # noqa: E402

ROOT = Path(__file__).parents[2]
GPUS = [c for c in cost.CHIPS if c.architecture != "cpu"]
H100 = next(c for c in cost.CHIPS if c.name == "H100 SXM")
H200 = next(c for c in cost.CHIPS if c.name == "H200 SXM")
NOISES = ("gaussian", "rademacher")
DIRECTIONS = ("forward", "input_grad")
EVERY = [(c, b) for c in cost.CHIPS for b in (("cpu",) if c.architecture == "cpu" else ("triton", "cuda"))]


def possible(backend: str, way: str, noise: str) -> bool:
    if way == "transform":
        return noise == "hadamard"
    return way != "fused" or noise != "hadamard" or backend == "cpu"


def call(noise: str = "gaussian", M: int = 2048, **more: object) -> Call:
    return Call("forward", noise, "folded", "bfloat16", M, 4096, 4096)._replace(**more)


# --- Constants ---


def _tables(page: str) -> list[dict[str, str]]:
    """The rows of all tables of a page, by the names of their columns."""
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for line in page.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells or set(line) <= set("|-: "):
            header = header if cells else []
        elif not header:
            header = cells
        else:
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def _same(ours: float, pages: str, about: object) -> None:
    assert ours == pytest.approx(float(pages), rel=0.05), about


def test_instructions_of_triton() -> None:
    page = (ROOT / "docs" / "internals" / "kernels.md").read_text()
    page = page.partition("## Triton 3.6.0")[2].partition("\n## ")[0]
    rows = [r for r in _tables(page) if r["type"] == "bfloat16" and r["target"] in cost.TRITON]
    checked = 0
    for r in rows:
        tile = r["tile"].split(",")[0]
        if r["noise"] not in NOISES and r["kernel"] != "row_sq_norms":
            continue
        if r["kernel"] == "perturb" and r["call"] == "-":
            _same(cost.PERTURB["triton"][r["target"]][NOISES.index(r["noise"])], r["instr"], r)
            checked += 1
        for rows_of_x, few in (("8192 rows", 0), ("16 rows, split", 1)):
            if (
                r["kernel"] in DIRECTIONS
                and r["call"] == rows_of_x
                and (few or tile in ("256x128x64", "128x128x64"))
            ):
                ours = call(r["noise"], direction=r["kernel"]).choose(cost.TRITON[r["target"]][few])
                _same(ours, r["instr"], r)
                checked += 1
    norms = {r["call"]: r["instr"] for r in rows if (r["kernel"], r["target"]) == ("row_sq_norms", "sm90")}
    for ours, of in zip(roofline.ROW_NORMS["triton"], ("no adapter", "-"), strict=True):
        _same(ours, norms[of], of)
    # 3 targets x 2 noises of `perturb`, and of each product; with few rows rademacher is there for one target.
    assert checked == 6 + 12 + 8


def test_instructions_of_cuda() -> None:
    rows = _tables((ROOT / "docs" / "internals" / "cuda_kernels.md").read_text())
    found = {(r["kernel"], r["target"]): r["instr"] for r in rows if "instr" in r}
    for target, tiles in cost.CUDA.items():
        name = "linear_sm90" if target == "sm90a" else "linear_sm80"
        kinds = itertools.product(DIRECTIONS, NOISES, range(len(tiles)))
        for direction, noise, tile in kinds:
            kernel = f"{name}<bf16, {str(direction == 'input_grad').lower()}, {noise}, {tile}"
            at = "sm_" + target.removeprefix("sm")
            pages = [
                v
                for (k, t), v in found.items()
                if t == at and re.fullmatch(re.escape(kernel) + "(, false)?>", k)
            ]
            assert len(pages) == 1, kernel
            _same(call(noise, direction=direction).choose(tiles[tile]), pages[0], (kernel, at))
    for target, noise in itertools.product(("sm80", "sm90", "sm100"), NOISES):
        pages_value = found[f"perturb<bf16, {noise}, true>", "sm_" + target.removeprefix("sm")]
        _same(cost.PERTURB["cuda"][target][NOISES.index(noise)], pages_value, (target, noise))


def _numbers(source: str, table: str) -> list[list[int]]:
    body = source.partition(f"{table}[")[2].partition("= {")[2].partition("};")[0]
    return [[int(n) for n in re.findall(r"\d+", line)] for line in re.findall(r"\{([\d, ]+)\}", body)]


def test_tiles_are_those_of_the_sources() -> None:
    tiles = _numbers((ROOT / "csrc" / "cuda" / "configs.h").read_text(), "kTiles")
    ours = [[t.m, t.n, t.k, t.warps, t.at_a_time] for t in cost.CUDA_TILES]
    assert ours == [[m, n, k, wm * wn, blocks] for m, n, k, wm, wn, _, blocks, *_ in tiles]
    tiles = _numbers((ROOT / "csrc" / "cuda" / "linear_sm90.h").read_text(), "kSm90Tiles")
    assert [[t.m, t.n, t.high, t.cycles[0]] for t in cost.SM90_TILES] == [[*t[:3], t[-1]] for t in tiles]


def test_rates_are_those_of_the_data_sheets() -> None:
    tflops = {c.name: 2 * c.tensor * c.processors * c.clock / 1e12 for c in GPUS}
    for name, rated in {
        "A100 SXM 40 GB": 312,
        "A100 SXM 80 GB": 312,
        "H100 SXM": 989,
        "H200 SXM": 989,
        "B200 SXM": 2250,
    }.items():
        assert tflops[name] == pytest.approx(rated, rel=0.01)


# --- The model ---


def test_units_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "REACHED", 0.8)
    chip = Chip("", "sm90", 10, 1e9, 1e12, 1 << 20, tensor=100, mma=50, single=10, l2=32, launch=2e-6)
    work = Work(2e9, 100, 4e6, 2e6, 64e6, 16e6, 9e5, 1e6, filled=0.5)
    assert work.units(chip) == pytest.approx({
        "tensor": 1e7 / (1e10 * 0.5 * 0.8), "issue": 1e6 / 4e9, "draw": 2e6 / 4e9, "shared": 5e5 / 4e9,
        "l2": 5e5 / 4e9, "step": 1e6 / 4e9, "memory": 1e-6,
    })  # fmt: skip
    assert work.seconds(chip) == pytest.approx(2.5e-3)
    in_turn = work._replace(overlap=0)  # product, then drawing
    assert in_turn.seconds(chip) == pytest.approx(2.5e-3 + 5e-4)
    assert in_turn._replace(overlap=0.5).seconds(chip) == pytest.approx(2.5e-3 + 2.5e-4)
    assert in_turn._replace(stall=1.5).seconds(chip) == pytest.approx(4.5e-3)
    assert in_turn._replace(stall=1.5, memory=9e9).seconds(chip) == pytest.approx(1e-2)
    passing = in_turn._replace(flops=0, memory=9e8)  # memory, then drawing
    assert passing.seconds(chip) == pytest.approx(1e-3 + 5e-4)
    of_two = cost.total(chip, [work, work], 7)
    assert (of_two.workspace, of_two.bound) == (7, "tensor")
    launch = cost.CALL + 2 * (2e-6 + cost.RAMP)
    assert of_two.seconds == pytest.approx(5e-3 + launch)
    assert of_two.units["launch"] == pytest.approx(launch)
    assert Work(slots=1.0).launch(chip) == 2e-6  # neither multiplies nor draws


def test_the_largest_cuda_tile_takes_the_cycles_that_its_table_says() -> None:
    """docs/internals/performance.md: 1024 of tensor cores, 1216 of shared memory, 2040 measured, for a step of 64."""
    work, rademacher = (cost.works(H100, "cuda", "fused", call(noise, M=2048))[0][0] for noise in NOISES)
    steps = 8 * 32 * 64  # tiles of 256 x 128
    assert work.flops / 2 / work.rate / steps == 1024
    assert work.shared / H100.shared / steps == 1216
    assert work.drawing * 6.8 / steps == 4096
    assert work.steps / steps == 2040
    assert work.seconds(H100) == work.units(H100)["step"]
    assert rademacher.steps / steps == 1480
    assert work.filled == pytest.approx(256 / (2 * 132) * 64 / 68)


@pytest.mark.parametrize(
    "architecture, backend", [("sm80", "triton"), ("sm90", "triton"), ("sm90", "cuda"), ("sm100", "triton")]
)
def test_a_fused_product_draws_and_multiplies_as_much_as_it_must(architecture: str, backend: str) -> None:
    chip = next(c for c in GPUS if c.architecture == architecture)
    for M, samples, accum in ((4096, 1, "folded"), (4096, 2, "folded"), (4096, 1, "split")):
        of = call(M=M, samples=samples, noise_accum=accum)
        (work,), workspace = cost.works(chip, backend, "fused", of)
        products = 2 if accum == "split" else 1
        assert work.flops == 2 * products * M * 4096**2
        assert workspace == 0
        drawn = work.drawing * cost.DRAWN["gaussian"] / 4096**2
        if backend == "triton":
            config, _ = configs.linear(
                architecture,
                "half",
                "forward",
                samples,
                M // samples,
                4096,
                chip.processors,
                apart=products == 2,
            )
            assert drawn == pytest.approx(M / config.block_m * (1 + config.block_in / 4096))
        else:
            assert drawn == (M / 64 if accum == "split" else M / 512)  # clusters two blocks of 256 rows high
        rademacher = cost.works(chip, backend, "fused", of._replace(noise="rademacher"))[0][0]
        assert rademacher.drawing * cost.DRAWN["rademacher"] / 4096**2 == pytest.approx(drawn)


@pytest.mark.parametrize("chip, backend", EVERY, ids=lambda v: getattr(v, "name", v))
def test_more_work_is_never_cheaper(chip: Chip, backend: str) -> None:
    for way, noise, direction in itertools.product(cost.WAYS, KINDS, DIRECTIONS):
        if not possible(backend, way, noise):
            continue
        base = call(noise, direction=direction, M=4096, rank=16)

        def seconds(way: str = way, base: Call = base, **more: object) -> float:
            return cost.cost(chip, backend, way, base._replace(**more)).seconds

        def seconds_of(noise: str, seconds: Any = seconds) -> float:
            return seconds(noise=noise)  # type: ignore[no-any-return]

        # Where other tiles begin it may be, by a little; above 16 rows `triton`, above 64 `cuda` has another kernel.
        for exponents in (range(0, 7), range(7, 15)) if backend == "cuda" else (range(0, 5), range(5, 15)):
            by_rows = [seconds(M=2**n) for n in exponents]
            assert all(more > 0.95 * less for less, more in itertools.pairwise(by_rows)), (
                way,
                noise,
                direction,
            )
        assert seconds(M=8192) > seconds(M=4096) > seconds(M=512), (way, noise, direction)
        assert seconds(N=8192) > seconds() and seconds(K=8192) > seconds()
        assert seconds(samples=4) >= seconds()
        if way != "plain":
            assert seconds() > seconds(rank=0)
            assert seconds() >= cost.plain(chip, base).seconds
            assert noise != "gaussian" or seconds() >= max(map(seconds_of, ("near_gaussian", "rademacher")))
            assert seconds(noise="none", rank=0) <= seconds(rank=0)
        if way == "fused" and backend != "cpu":
            assert seconds(noise_accum="split") > seconds()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_workspace_of_panels_is_what_they_allocate(dtype: torch.dtype) -> None:
    for (N, K), direction in itertools.product(
        ((4096, 4096), (1024, 4096), (14336, 4096), (100, 72)), DIRECTIONS
    ):
        weight = torch.empty(N, K, dtype=dtype, device="meta")
        of = Call(direction, "gaussian", "folded", str(dtype).removeprefix("torch."), 256, N, K)
        for chip, backend in ((H100, "cuda"), (cost.CHIPS[-1], "cpu")):
            device = "cpu" if backend == "cpu" else "cuda"
            _, size = panel.workspace(weight, device, direction == "input_grad")
            assert cost.cost(chip, backend, "panel", of).workspace == size, (N, K, direction, device)


def test_parts_of_a_contraction_are_added_by_another_kernel() -> None:
    of = call(M=16)
    config, tiles = configs.linear("sm90", "half", "forward", 1, 16, 4096, 132)
    parts, _ = configs.splits(config, tiles, 4096, 4 * 16 * 4096, of.workspace, 132)
    (_, sums), workspace = cost.works(H100, "triton", "fused", of)
    assert parts > 1 and workspace == 4 * parts * 16 * 4096 == sums.l2


def test_few_rows_make_u_in_the_kernel() -> None:
    for M, samples, rank, backend, apart in (
        (16, 1, 16, "triton", 0), (64, 4, 16, "triton", 0), (17, 1, 16, "triton", 1), (16, 1, 64, "triton", 1),
        (16, 1, 16, "cuda", 1),
    ):  # fmt: skip
        of = call(M=M, samples=samples, rank=rank)
        kernels, without = (cost.works(H100, backend, "fused", o)[0] for o in (of, of._replace(rank=0)))
        assert len(kernels) == len(without) + apart, (M, samples, rank, backend)
        fused, alone = kernels[apart], without[0]
        assert fused.flops > alone.flops and fused.shared > alone.shared and fused.l2 > alone.l2


def test_samples_read_the_weight_again() -> None:
    for backend, way in itertools.product(("triton", "cuda"), ("fused", "panel", "perturb")):
        read = [
            sum(w.memory for w in cost.works(H100, backend, way, call(M=4096, samples=s))[0]) for s in (1, 4)
        ]
        assert read[1] - read[0] >= 3 * 2 * 4096**2


def test_panels_are_drawn_one_at_a_time() -> None:
    for M in (256, 2048, 8192):
        kernels, workspace = cost.works(H100, "cuda", "panel", call(M=M))
        draws, products = kernels[::2], kernels[1::2]
        assert len(draws) == len(products) == 4  # a slice is a quarter of the weight
        assert workspace == 2 * 4096**2 // 4
        launches = cost.CALL + 8 * (H100.launch + cost.RAMP)
        by_hand = launches + 4 * (draws[0].seconds(H100) + products[0].seconds(H100))
        assert cost.cost(H100, "cuda", "panel", call(M=M)).seconds == pytest.approx(by_hand)


def test_parts_and_tiles_of_sm90_are_those_that_csrc_takes() -> None:
    """As csrc/cuda/linear_sm90.cu: 256 rows have 64 middle tiles, and workspace for two parts."""
    for M, tile, parts in ((128, 2, 2), (256, 1, 2), (1024, 0, 1), (2048, 0, 1), (8192, 0, 1)):
        assert cost._sm90_choice(H100, call(M=M)) == (tile, parts), M


def test_a_processor_goes_by_what_was_measured() -> None:
    """docs/internals/performance.md: up to 256 rows the fused kernel is fastest, and `panel` slower than `perturb`."""
    for noise, dtype, M in itertools.product(NOISES, ("float32", "bfloat16"), (1, 16, 256)):
        of = Call("forward", noise, "folded", dtype, M, 2048, 2048)
        fused, perturbed, panels = (
            cost.cost(cost.CHIPS[-1], "cpu", way, of).seconds for way in ("fused", "perturb", "panel")
        )
        assert cost.plain(cost.CHIPS[-1], of).seconds < fused < perturbed < panels


@pytest.mark.parametrize("chip, backend", EVERY, ids=lambda v: getattr(v, "name", v))
def test_workspace_is_bounded(chip: Chip, backend: str) -> None:
    """By 16 MiB and a quarter of the weight, but for the rival, which holds a whole weight."""
    for M, (N, K) in itertools.product(
        (1, 16, 64, 256, 2048, 65536), ((4096, 4096), (1024, 4096), (4096, 14336))
    ):
        for strategy in ("fused", "panel"):
            found = cost.cost(chip, backend, strategy, call(M=M, N=N, K=K, rank=16)).workspace
            assert 0 <= found <= min(16 << 20, 2 * N * K // 4)
        assert cost.perturb(chip, backend, call(M=M, N=N, K=K)).workspace == 2 * N * K
        assert cost.plain(chip, call(M=M, N=N, K=K)).workspace == 0


def test_the_model_is_near_what_an_h200_took() -> None:
    """`python -m bench.truth time` in bench/results/: docs/internals/performance.md says what is off, and why."""
    off: list[float] = []
    counted: list[float] = []
    for rank in (0, 16):
        measured = roofline.truth(H200, rank)
        assert measured
        for name, (backend, way, providers) in roofline.WAYS.items():
            for (mode, provider, M, noise), found in measured.items():
                if provider == providers[0]:
                    of = call(noise, M, direction=mode, rank=rank)
                    off.append(cost.cost(H200, backend, way, of).seconds / found.seconds)
                    slices, few = (
                        name == "panel" and M == 1024,
                        name == "triton" and noise == "near_gaussian" and M == 16,
                    )
                    assert (0.55 if few else 0.7) < off[-1] < (1.35 if slices else 1.25), (
                        name,
                        rank,
                        mode,
                        M,
                        noise,
                    )
                    if noise in ("none", *NOISES):  # the counts of the others are estimates
                        counted.append(off[-1])
                    if name in (
                        "plain",
                        "perturb",
                    ):  # at 256 rows the library has a better tile than the model
                        most = 1.25 if M in (64, 256) else 1.15
                        assert 0.85 < off[-1] < most, (name, rank, mode, M, noise)
    assert len(off) > 180
    assert sum(0.85 <= o <= 1.15 for o in counted) > 0.9 * len(counted)


def test_a_pass_over_memory_takes_what_the_bandwidth_allows() -> None:
    """What it writes stays in L2 as far as half of that goes; half of the drawing is hidden."""
    for chip in GPUS:
        found = cost.perturb_pass(chip, "cuda", call(), 4096**2)
        moved = 4 * 4096**2 - min(chip.l2_bytes // 2, 2 * 4096**2)
        memory = moved / chip.bandwidth / 0.9
        drawing = max(found.units(chip)[unit] for unit in ("issue", "draw"))
        expected = max(memory, drawing) + 0.5 * min(memory, drawing)
        assert found.seconds(chip) == pytest.approx(expected)
        few = cost.plain(chip, call(M=1))
        assert few.seconds - chip.launch >= 2 * 4096**2 / chip.bandwidth / 0.9


def test_sizes_of_nothing_have_a_cost() -> None:
    for chip, backend in EVERY:
        for way, sizes in itertools.product(
            cost.WAYS, ({"M": 0}, {"N": 0}, {"K": 0}, {"M": 0, "samples": 3})
        ):
            noise = "hadamard" if way == "transform" else "gaussian"
            assert cost.cost(chip, backend, way, call(noise, **sizes)).seconds > 0


def test_what_there_is_no_model_of() -> None:
    for chip, backend in ((H100, "cpu"), (cost.CHIPS[-1], "cuda"), (H100, "reference")):
        with pytest.raises(ValueError, match=f"backend: there is no model of '{backend}' on {chip.name}"):
            cost.cost(chip, backend, "fused", call())
    with pytest.raises(
        ValueError, match="strategy: expected one of fused, panel, transform, perturb, plain, got 'quick'"
    ):
        cost.cost(H100, "cuda", "quick", call())
    for backend, way, noise in (("cuda", "transform", "gaussian"), ("triton", "fused", "hadamard")):
        with pytest.raises(
            ValueError, match=f"strategy: backend '{backend}' has no '{way}' for {noise} noise"
        ):
            cost.cost(H100, backend, way, call(noise))


def test_a_transform_by_hand() -> None:
    """Additions and passes over x and y; the weight is not read again, and its size does not count."""
    for direction, outputs, length in (("forward", 14336, 4096), ("input_grad", 4096, 14336)):
        of = call(
            "hadamard", 64, direction=direction, N=14336
        )  # tiles of 4096 x 4096: 4 of rows, 1 of columns
        work = cost.transform_pass(H100, of)
        rows_of_tiles, columns = -(-outputs // 4096), -(-length // 4096)
        values = 64 * rows_of_tiles * columns * 4096
        assert work.slots == values * (12 * cost.TRANSFORM_STAGE + cost.TRANSFORM_REST) / 32
        assert work.shared == values * cost.TRANSFORM_SHARED
        assert work.memory == 2 * 64 * (length + outputs)  # what the product wrote comes from L2
        assert work.flops == work.drawing == 0
        blocks = 64 * rows_of_tiles
        assert work.filled == blocks / (-(-blocks // 132) * 132)
    a100 = next(c for c in GPUS if c.architecture == "sm80")  # adds at half the rate
    rest = cost.TRANSFORM_REST
    twice, once = (cost.transform_pass(c, of).slots for c in (a100, H100))
    assert (24 + rest) / (12 + rest) == pytest.approx(twice / once)
    for samples in (1, 4):
        kernels = cost.works(H100, "cuda", "transform", of._replace(samples=samples, rank=16))[0]
        assert len(kernels) == 3 and kernels[-1] == work  # v is given
    small = cost.transform_pass(H100, call("hadamard", 64, N=384, K=1536))  # tiles of 256
    assert small.slots == 64 * 2 * 6 * 256 * (8 * cost.TRANSFORM_STAGE + rest) / 32


def test_a_transform_is_near_what_a_study_had() -> None:
    """Of plain at 1, 16, 64, 256, 1024, 2048 and 8192 rows, rank 0, predicted as well."""
    study = {
        "A100 SXM 80 GB": (1.10, 1.10, 1.11, 1.09, 1.07, 1.07, 1.06),
        "H100 SXM": (1.15, 1.15, 1.16, 1.17, 1.15, 1.14, 1.12),
        "B200 SXM": (1.28, 1.28, 1.27, 1.21, 1.17, 1.14, 1.13),
    }
    for name, ratios in study.items():
        chip = next(c for c in GPUS if c.name == name)
        for M, expected in zip((1, 16, 64, 256, 1024, 2048, 8192), ratios, strict=True):
            of = call("hadamard", M)
            ratio = cost.cost(chip, "cuda", "transform", of).seconds / cost.plain(chip, of).seconds
            assert ratio == pytest.approx(expected, abs=0.08), (name, M)


def test_near_gaussian_is_cheaper_than_gaussian_everywhere() -> None:
    for (chip, backend), way, direction, M in itertools.product(
        EVERY, ("fused", "panel", "perturb"), DIRECTIONS, (1, 16, 64, 256, 2048)
    ):
        near, gaussian = (
            cost.cost(chip, backend, way, call(noise, M, direction=direction)).seconds
            for noise in ("near_gaussian", "gaussian")
        )
        assert near < gaussian, (chip.name, backend, way, direction, M)
    # On sm_90 a step's latency was measured for two kinds: the third lies on the line through them.
    tile = cost.SM90_TILES[0]
    steps = [cost._cycles(tile, call(noise)) for noise in ("gaussian", "rademacher", "near_gaussian")]
    assert steps[:2] == [2040, 1480]
    counts = cost.CUDA["sm90a"][0]
    slope = (2040 - 1480) / (counts[0] - counts[1])
    assert steps[2] == pytest.approx(1480 + slope * (cost.NEAR_GAUSSIAN_PRODUCT - counts[1]))


def test_chips_of_devices() -> None:
    assert chips.chip_of(torch.device("cpu")) is cost.CHIPS[-1]
    gib = 1 << 30
    like = chips._like
    assert like("NVIDIA H100 80GB HBM3", "sm90", 132, 80 * gib) is H100
    assert like("NVIDIA A100-SXM4-80GB", "sm80", 108, 80 * gib).name == "A100 SXM 80 GB"
    assert like("NVIDIA A100-SXM4-40GB", "sm80", 108, 40 * gib).name == "A100 SXM 40 GB"
    pcie = like("NVIDIA H100 PCIe", "sm90", 114, 80 * gib)
    assert (pcie.name, pcie.processors, pcie.tensor) == ("NVIDIA H100 PCIe", 114, 2048)
    assert like("NVIDIA B300", "sm103", 148, 288 * gib).architecture == "sm100"
    assert like("NVIDIA GeForce RTX 4090", "sm89", 128, 24 * gib) is None


# --- bench roofline ---


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["roofline", "--device", "gpu"]) == 0
    text = capsys.readouterr().out
    assert all(c.name in text for c in roofline.CHIPS)
    for table in re.split(r"\n\n(?=\*\*)", text.strip()):
        assert table.startswith(("**PREDICTED, not measured**", "**Measured** on an H200"))
    # Targets are printed beside the figures; whether they are met is for a measurement to tell.
    assert all(f"{t.most:.2f}" in text for t in targets.targets("cuda") if t.mode == "forward")


def test_page_has_the_report() -> None:
    """Else: python -m bench roofline --device gpu --write"""
    assert roofline.gpu_report() in roofline.DOC.read_text()


def test_layer_step() -> None:
    ours, peft = roofline.step(H100, 8192, "gaussian")
    kernels = 2 + 2 * cost.plain(H100, call(M=8192)).seconds / 2
    # Two passes over M x N forward and two backward neither multiply nor draw.
    assert peft.units["launch"] == pytest.approx(cost.CALL + 12 * H100.launch + 8 * cost.RAMP)
    assert ours.seconds < peft.seconds < kernels
    # By hand: the passes over M x N alone read and write 2, 3, 2 and 3 tensors, most of which no cache holds.
    passes = 10 * 8192 * 4096 * 2 / H100.bandwidth / 0.9
    assert peft.seconds > 2 * cost.plain(H100, call(M=8192)).seconds + passes


def test_report_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- roofline gpu -->\nold\n<!-- /roofline gpu -->\nafter\n")
    for _ in range(2):
        roofline.write("roofline gpu", r"new \1", page)
        assert (
            page.read_text() == "before\n<!-- roofline gpu -->\n\nnew \\1\n\n<!-- /roofline gpu -->\nafter\n"
        )
    page.write_text("no marks")
    with pytest.raises(ValueError, match="expected one line <!-- roofline gpu -->"):
        roofline.write("roofline gpu", "new", page)


def _row(**fields: object) -> dict[str, object]:
    row = dict.fromkeys(results.COLUMNS, "")
    row |= {
        "kind": "linear",
        "device": "cuda",
        "dtype": "bfloat16",
        "N": 4096,
        "K": 4096,
        "M": 16,
        "rank": 16,
    }
    row |= {
        "mode": "forward",
        "noise": "gaussian",
        "provider": "fused:cuda",
        "median_us": 20.0,
        "to_plain": 1.5,
    }
    return row | {"hardware": "NVIDIA H100 80GB HBM3", "date": "2030-01-01"} | fields


def test_measurements_stand_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        _row(),
        _row(median_us=30.0, to_plain=1.7, date="2031-01-01"),
        _row(median_us=99.0, date="2029-01-01"),
        _row(median_us=25.0, to_plain=1.6, date="2031-01-01", launch="graph"),
        _row(median_us=1.0, dtype="float16", date="2040-01-01"),
        _row(median_us=1.0, rank=64, date="2040-01-01"),
        _row(median_us=1.0, device="cpu", date="2040-01-01"),
        _row(median_us=1.0, hardware="NVIDIA A100-SXM4-80GB", date="2040-01-01"),
        _row(provider="plain", rank=0, noise="none", median_us=16.0, to_plain=1.0),
    ]
    (tmp_path / "h100").mkdir()
    with (tmp_path / "h100" / "run.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
        writer.writeheader()
        writer.writerows(rows)
    found = roofline.measurements(H100, tmp_path)
    assert found == {
        ("forward", "fused:cuda", 16, "gaussian"): (25e-6, 1.6),
        ("forward", "plain", 16, "none"): (16e-6, 1.0),
    }
    a100 = [c for c in cost.CHIPS if c.name.startswith("A100")]
    assert [len(roofline.measurements(c, tmp_path)) for c in a100] == [0, 1]
    (tmp_path / "NVIDIA-H100-80GB-HBM3").mkdir()
    rows_of_truth = [
        {"M": 16, "rank": 16, "noise": "gaussian", "name": "cuda y", "median_us": 21.0, "to_plain": 1.4},
        {
            "M": 16,
            "rank": 0,
            "noise": "gaussian",
            "name": "panel cuda dX",
            "median_us": 50.0,
            "to_plain": 3.0,
        },
        {"M": 16, "rank": 0, "noise": "gaussian", "name": "plain", "median_us": 17.0, "to_plain": 1.0},
        {"M": 16, "rank": 0, "noise": "gaussian", "name": "norms cuda", "median_us": 9.0, "to_plain": 0.5},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows_of_truth)
    (tmp_path / "NVIDIA-H100-80GB-HBM3" / "truth-time.jsonl").write_text(text)
    overruled = roofline.measurements(H100, tmp_path)
    assert overruled == found | {("forward", "fused:cuda", 16, "gaussian"): (21e-6, 1.4)}
    assert roofline.truth(H100, 0, tmp_path) == {
        ("input_grad", "panel:cuda", 16, "gaussian"): (50e-6, 3.0),
        ("forward", "plain", 16, "none"): (17e-6, 1.0),
    }
    assert not roofline.truth(a100[1], 0, tmp_path)
    monkeypatch.setattr(roofline, "measurements", lambda _: found)
    lines = roofline.roofline(H100).splitlines()
    (cuda,) = [line for line in lines if re.match(r"\| cuda +\| +16 ", line)]
    assert cuda.rstrip(" |").endswith("25.0 (1.60) / -")


@pytest.mark.skipif(bool(backends.get("cpu").unavailable()), reason="backend cpu is not here")
def test_report_of_a_processor() -> None:
    text = roofline.cpu(budget=0.001, size=64, rows=(4,))
    assert text.startswith("**Measured** beside predicted: ")
    # Without noise plain and our own, four kinds in three ways, and the transform.
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + 2 * (2 + 4 * 3 + 1)


def test_float32_of_few_rows_reads_the_weight_and_little_else() -> None:
    chip = next(c for c in chips.CHIPS if c.name == "H100 SXM")
    calls = [cost.Call("forward", "gaussian", "folded", "float32", M, 4096, 4096) for M in (1, 16, 64, 256)]
    plain = [cost.plain(chip, call).seconds for call in calls]
    assert plain == sorted(plain)
    assert plain[1] < 2 * 4 * 4096**2 / chip.bandwidth
    assert all(
        cost.cost(chip, b, "fused", calls[1]).seconds < cost.cost(chip, b, "panel", calls[1]).seconds
        for b in ("cuda", "triton")
    )


def test_packed_weight_is_read_as_it_is_stored() -> None:
    """Its codes, not its values; more instructions; and on Hopper by the kernel that takes it."""
    h100 = next(c for c in cost.CHIPS if c.name == "H100 SXM")
    dense = cost.Call("forward", "gaussian", "folded", "bfloat16", 2048, 4096, 4096)
    nf4 = dense._replace(code=0.5)
    values = 4096 * 4096
    passes = [cost.perturb_pass(h100, "cuda", c, values) for c in (dense, nf4)]
    assert passes[0].memory - passes[1].memory == 1.5 * values
    assert passes[1].slots > passes[0].slots
    (a, *_), (b, *_) = (cost.works(h100, "cuda", "fused", c)[0] for c in (dense, nf4))
    assert a.memory - b.memory == 1.5 * values
    assert a.steps and not b.steps
    owner = cost.dequantize_pass(h100, nf4)
    assert owner.memory == 2.5 * values - cost.resident(h100, 2 * values)
