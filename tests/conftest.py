"""The matrix: a test that asks for `target` runs on every backend and device, one that asks for `dtype` as
well on every type that backend takes, one that asks for `noise` with every kind of noise. A backend that cannot
run here is skipped with the reason it gives, or fails where FLATLORA_REQUIRE_BACKENDS (comma-separated names)
lists it. A kind of noise that a backend does not implement is skipped with that reason.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections import Counter
from pathlib import Path

import interpreter
import pytest
import targets
import torch
from packed_weights import LAYOUTS
from targets import Target

from flatlora_kernels import backends
from flatlora_kernels.core.noise import KINDS

# Nothing here is for Triton's interpreter or the emulator, and to import it all takes a quarter of a minute.
ELSEWHERE = ["choice", "examples", "flatness", "integrations", "methods", "project", "core/test_formats*"]
collect_ignore_glob = ELSEWHERE if targets.INTERPRETED or targets.EMULATED else []


def pytest_configure(config: pytest.Config) -> None:
    if targets.INTERPRETED and importlib.util.find_spec("triton"):
        interpreter.speed_up()
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "nvcc: needs the CUDA compiler")
    if os.environ.get("FLATLORA_EMULATE") == "90":
        # Hopper's own kernel also for the few rows that tests have; it leaves to the other what it does not take.
        backends.get("cuda").configuration = (1001, 0)


WORKER_MEMORY = 2 << 30  # bytes for a process that runs tests, and those that its tests start
MOST_WORKERS = 8  # more would wait for the file that takes longest


def free_memory(machine: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes, of the machine or of its container, whichever has less left; None where nobody says."""
    found = []
    if machine.exists():
        found += [
            int(line.split()[1]) << 10 for line in machine.read_text().splitlines() if "MemAvailable" in line
        ]
    limit, used = (group / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found, default=None)


def workers(cores: int, memory: int | None) -> int:
    fit = MOST_WORKERS if memory is None else memory // WORKER_MEMORY
    return max(1, min(cores, fit, MOST_WORKERS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`, which `make test` gives."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return workers(cores, free_memory())


def skips(reports: list[pytest.TestReport]) -> list[str]:
    """A line to each reason, the most frequent first."""
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    return [f"{count:6} {' '.join(reason.split())}" for reason, count in reasons.most_common()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if reports := terminalreporter.stats.get("skipped"):
        terminalreporter.section(f"{len(reports)} skipped, by reason", "=")
        for line in skips(reports):
            terminalreporter.line(line)


def _parameter(target: Target, *more: object, tag: str = "") -> object:
    marks = [pytest.mark.gpu] if target.device == "cuda" else []
    if target.interpreted:
        marks.append(pytest.mark.interpreter)
    if target.emulated:
        marks.append(pytest.mark.emulator)
    return pytest.param(
        *((target, *more) if more else (target,)), id=f"{target.backend}-{target.device}{tag}", marks=marks
    )


def _by_hand(metafunc: pytest.Metafunc) -> set[str]:
    """The arguments that a test's own marks give values to."""
    names: set[str] = set()
    for mark in metafunc.definition.iter_markers("parametrize"):
        given = mark.kwargs.get("argnames") or mark.args[0]
        names.update(given.replace(",", " ").split() if isinstance(given, str) else given)
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = set(metafunc.fixturenames) - _by_hand(metafunc)
    every = targets.all_targets() if "target" in wanted else []
    if {"target", "dtype"} <= wanted:
        cases = [_parameter(t, d, tag=f"-{str(d).removeprefix('torch.')}") for t in every for d in t.dtypes]
        metafunc.parametrize("target, dtype", cases, indirect=["target"])
    elif "target" in wanted:
        metafunc.parametrize("target", [_parameter(t) for t in every], indirect=True)
    if "noise" in wanted:
        metafunc.parametrize("noise", KINDS)


# What is too slow without a GPU, by parts of a test's name, and why: in the interpreter and in the emulator, and
# then in one of them. Besides, two tests of test_noise_spec.py draw fewer tiles in the interpreter.
NOT_SIMULATED = {
    ("-float16", "test_layouts"): "bfloat16 takes the same way",
    ("-float16", "test_samples"): "bfloat16 takes the same way",
    ("-float16", "test_adapter_and_bias"): "bfloat16 takes the same way",
    ("-float16", "test_forward_and_backward_see"): "bfloat16 takes the same way",
    ("-float16", "test_checkpoint.py"): "bfloat16 takes the same way",
    ("-float16", "test_op.py"): "bfloat16 takes the same way",
    ("test_one_number", "-float16"): "bfloat16 takes the same way",
    ("test_one_number", "-float32"): "bfloat16 takes the same way",
    ("hadamard", "test_plain_linear"): "test_strategies and test_noise_product.py have its ways",
    ("hadamard", "test_adapter_and_bias"): "test_strategies has it with both",
    ("hadamard", "test_samples[", "float32"): "bfloat16 takes the same way",
    ("-float16", "test_noise_product.py"): "bfloat16 takes the same way",
    ("near_gaussian", "test_noise_accum.py"): "gaussian and rademacher take the same way",
    ("hadamard", "test_noise_accum.py"): "a transform keeps all of the noise, whatever it is",
    ("hadamard", "test_shards.py", "float32"): "bfloat16 takes the same way",
    ("near_gaussian", "test_adapter_and_bias", "float32"): "bfloat16 takes the same way",
    ("near_gaussian", "test_plain_linear", "float32"): "bfloat16 takes the same way",
    ("-float16", "near_gaussian", "test_linear.py"): "bfloat16 and float32 take the same way",
    ("test_long_sums", "16391"): "4096 steps do",
    ("test_many_tiles",): "smaller problems have several tiles each way there",
    ("test_memory.py",): "memory of a GPU is not that of a simulation",
    ("thread_counts",): "programs run one after the other",
    ("test_training_lowers_the_loss",): "some hundred steps",
    ("test_noise_statistics.py",): "2^25 values; other tests compare bits with the oracle that it judges",
    **{
        (f"test_gpu.py::{name}", rows): "as many rows as with fewer, where there is no GPU"
        for name, cut in (
            ("test_forward_and_input_grad_see", ("-300-", "-2048-")),
            ("test_many_runs_give", ("-128]", "-256]", "-2048]")),
            ("test_no_memory_of", ("-64]", "-256]", "-4096]")),
            ("test_tf32_goes_by", ("-300]",)),
        )
        for rows in cut
    },
}

NOT_SIMULATED[("-float16", "test_grouped_launch")] = "bfloat16 takes the same way"
# What is left of a mixture that goes through its experts is one kind of noise, with its values and bits.
_LOOP = "a loop over experts, each of which goes the way of test_linear.py"
NOT_SIMULATED |= {
    ("test_grouped.py::test_", name): _LOOP
    for name in (
        "forms_of", "layouts_of", "what_may_be", "halves_of", "shards_of", "antithetic", "sigma", "no_rows",
        "experts_without", "autocast", "float32", "compiled", "the_op", "watched", "gradients_of_some",
        "what_is_saved", "backward_that", "lazily", "no_second", "-float16", "rademacher", "hadamard", "near_",
    )
}  # fmt: skip

NOT_INTERPRETED = NOT_SIMULATED | {
    ("-float16", "test_panel.py"): "bfloat16 and float32 take the same way",
    ("-float16", "test_long_sums"): "bfloat16 and float32 take the same way",
    ("test_linear.py", "test_large_column_major"): "smaller problems have several tiles each way there",
    ("test_tile_of_a_large_matrix",): "smaller problems have several tiles each way there",
    ("test_five_runs",): "programs run one after the other",
    ("test_a_graph_replays",): "nothing is recorded, and a call is a call",
    ("test_samples_are_those", "-0-"): "it has two other offsets",
    ("test_samples_are_those", "-1-"): "it has two other offsets",
    ("test_samples_are_those", "-6-False"): "the other offset has it",
    ("test_samples_are_those", f"-{2**32 - 4}-True"): "the other offset has it",
    ("test_linear.py::test_samples[", "-12-7-False"): "antithetic samples take the same way",
    ("test_forward_and_backward_see", "float32", "column_major"): "bfloat16 takes the same way",
    ("test_forward_and_backward_see", "float32-hadamard"): "bfloat16 takes the same way",
    ("test_split_error", "-float16"): "bfloat16 and float32 take the same way",
    ("test_column_shards", "-float32"): "bfloat16 takes the same way",
    ("test_many_threads_at_once",): "the interpreter replaces members of triton.language while it runs",
}

_ONCE = "every layout goes this way with some noise, and every noise with some layout"


def _goes(way: str, noise: str, number: int) -> bool:
    """Whether the interpreter runs a product of the layout of this number."""
    if way == "fused":
        return noise == ("gaussian", "near_gaussian", "rademacher")[number % 3]
    return (
        noise == KINDS[number % 4]
        if way == "panel"
        else number % 4 == 0 and noise in ("gaussian", "hadamard")
    )


NOT_INTERPRETED |= {
    ("test_quantized.py", "-float16"): "bfloat16 and float32 take the same way",
    ("test_quantized.py::test_linear[", "-float32"): "bfloat16 takes the same way",
    ("test_quantized.py::test_perturb_shards", "-float32"): "bfloat16 takes the same way",
    ("test_quantized.py::test_perturb[", "-float32"): "bfloat16 takes the same way",
    ("test_quantized.py::test_row_sq_norms", "-float32"): "bfloat16 takes the same way",
    ("test_quantized.py::test_row_sq_norms", "33x40"): "odd columns have it, too",
    ("test_quantized.py::test_samples", "int8"): "nf4_nested takes the same way",
    ("test_quantized.py::test_row_sq_norms", "130x192-0"): "with an adapter it takes the same way",
    **{
        ("test_quantized.py::test_linear[", f"-{noise}-{way}-{layout}]"): _ONCE
        for number, layout in enumerate(LAYOUTS)
        for way in ("fused", "panel", "transform", "None")
        for noise in KINDS
        if not _goes(way, noise, number)
    },
}

NOT_EMULATED = NOT_SIMULATED | {
    ("-float16", "test_determinism.py"): "bfloat16 takes the same way",
    ("test_quantized.py", "-float16"): "bfloat16 takes the same way",
    (
        "test_quantized.py::test_linear[",
        "-float32",
    ): "bfloat16 takes the same way, and decodes in its product",
    ("test_quantized.py::test_perturb_shards", "-float32"): "bfloat16 takes the same way",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of several processes none is to begin the longest files last
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])
    for item in items:
        emulator_alone = item.path.name.startswith(("test_emulator", "test_wrappers"))
        if emulator_alone and not targets.EMULATED and not item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="the emulator's: make test-emulator"))
        params = item.callspec.params if hasattr(item, "callspec") else {}
        chosen = params.get("target") or ("gpu" in params and Target(*params["gpu"]))
        left_out, where = {}, ""
        if chosen and chosen.interpreted:
            left_out, where = NOT_INTERPRETED, "interpreter"
        elif chosen and chosen.emulated:
            left_out, where = NOT_EMULATED, "emulator"
        for parts, reason in left_out.items():
            if all(part in item.nodeid for part in parts):
                item.add_marker(pytest.mark.skip(reason=f"too much for the {where}: {reason}"))


def pytest_collection_finish() -> None:
    """The thousands of tests, and modules, live as long as the process: garbage is not to be looked for among them."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Target:
    return targets.ready(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):  # type: ignore[no-untyped-def]
    """What a backend does not have yet is a skip, but not on a required backend."""
    try:
        return (yield)
    except NotImplementedError as error:
        names = [t.backend for t in targets.all_targets() if t.backend not in targets.REQUIRED]
        if any(f"backend {name!r} does not implement" in str(error) for name in names):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATLORA_BACKEND", raising=False)
    monkeypatch.delenv("FLATLORA_STRATEGY", raising=False)


@pytest.fixture
def threads():  # type: ignore[no-untyped-def]
    """`torch.set_num_threads`, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
