"""`python -m bench`: the gate, the rows, the files and what reads them."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import copy
import csv
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import (  # noqa: E402
    cli,
    environment,
    fidelity,
    gate,
    memory,
    providers,
    results,
    shapes,
    strategies,
    table,
    targets,
    timing,
    training,
    tune,
)
from bench.machine_code import precompile  # noqa: E402
from bench.machine_code.precompile import Outcome  # noqa: E402
from bench.problem import Problem  # noqa: E402
from bench.run import GRAPH_ROWS, Bench, Progress, Settings  # noqa: E402
from bench.shapes import Case, Layer, Model  # noqa: E402

TINY = Case("tiny", "square", 5, 24, 40, "float32", "forward+backward", 2)
FAST = ["--set", "tiny", "--device", "cpu"]
FAST += ["--providers", "fused:reference", "lora", "inplace", "eager", "perturb"]
FAST += [
    "--budget",
    "0.001",
    "--memory",
    "none",
    "--name",
    "tiny",
    "--dtypes",
    "float32",
    "--modes",
    *shapes.MODES,
]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of one small layer, and small shapes for the noise alone."""
    monkeypatch.setitem(shapes.MODELS, "tiny", Model((Layer("square", 24, 40),), (1, 5), "for tests"))
    monkeypatch.setattr(cli, "SETS", (*shapes.SETS, "tiny"))
    monkeypatch.setattr("bench.parts.GENERATOR_SHAPES", {"cpu": ((16, 16),)})
    monkeypatch.setattr("bench.parts._LOOP", 2)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For runs of many small problems on a machine that has more to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a whole run."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        tiny.__wrapped__(patch)  # type: ignore[attr-defined]
        assert cli.main([*FAST, "--out", str(folder)]) == 0
    return folder / "tiny.json"


def run(provider: str, case: Case = TINY, noise: str = "gaussian") -> providers.Run:
    chosen = next(p for p in providers.every("cpu") if p.name == provider)
    return chosen.make(Problem(case, "cpu", 2), noise if noise in chosen.noises else providers.NOISELESS)


def test_rows_say_everything(finished: Path) -> None:
    found = results.load(finished)
    assert found.failures == []
    for name in ("date", "device", "hardware", "threads", "python", "torch", "commit", "dirty", "config"):
        assert found.meta[name] is not None, name
    assert "triton" in found.meta
    linear = [r for r in found.rows if r["kind"] == "linear"]
    expected = {
        (p, noise, M, rank, mode)
        for p, noises in (
            ("plain", ("none",)),
            ("lora", ("none",)),
            *((p, ("gaussian", "rademacher")) for p in ("fused:reference", "inplace", "eager")),
        )
        for noise in noises
        for M in (1, 5)
        for rank in (0, 16)
        for mode in shapes.MODES
        if p != "lora" or rank
    }
    assert expected <= {(r["provider"], r["noise"], r["M"], r["rank"], r["mode"]) for r in linear}
    for row in linear:
        assert row["rounds"] >= 5
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert 0 < row["error_over_limit"] <= 1
        assert ("to_plain" in row) == (row["provider"] != "plain")
        if row["provider"].startswith("fused"):
            assert row["rival"].partition(":")[0] in ("inplace", "eager", "perturb")
            assert row["to_rival_p20"] <= row["to_rival"] <= row["to_rival_p80"]
    others = {(r["kind"], r["provider"]) for r in found.rows if r["kind"] != "linear"}
    assert {("noise_scale", "torch"), ("noise_scale", "reference"), ("noise", "reference")} <= others
    assert {("overhead", "F.linear"), ("overhead", "fused:reference")} <= others


def test_csv_holds_what_the_json_does(finished: Path) -> None:
    whole, flat = results.load(finished), results.load(finished.with_suffix(".csv"))
    assert len(flat.rows) == len(whole.rows)
    for a, b in zip(whole.rows, flat.rows, strict=True):
        assert {k: v for k, v in a.items() if v not in (None, "")} == b
    assert flat.meta["commit"] == str(whole.meta["commit"])


def test_table_and_compare(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["table", str(finished)]) == 0
    text = capsys.readouterr().out
    rows = results.load(finished).rows
    row = next(r for r in rows if r["provider"] == "eager" and r["rank"] and r["M"] == 5)
    forward = text.split("**")[2].splitlines()
    line = next(line for line in forward if "r16" in line and "gaussian" in line and " 5 " in line)
    assert table.ratio(row["to_plain"]) in line
    for part in (
        "forward+backward",
        "plain `dY @ W`",
        "Refresh",
        "ns per value",
        "over F.linear",
        "plain `x @ W.T`",
    ):
        assert part in text
    assert cli.main(["table", str(finished), "--long"]) == 0
    assert " to " in capsys.readouterr().out

    assert cli.main(["compare", str(finished), str(finished.with_suffix(".csv"))]) == 0
    assert capsys.readouterr().out.startswith("| what")  # nothing differs

    # The same run, with the op twice as slow.
    data = json.loads(finished.read_text())
    for row in data["rows"]:
        if row["provider"] == "fused:reference":
            for name in [n for n in row if n.endswith("_us") or n.startswith("to_")]:
                row[name] *= 2 if row[name] else 1
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(data))
    assert cli.main(["compare", str(finished), str(slower)]) == 0
    lines = capsys.readouterr().out.splitlines()
    fused = [line for line in lines if "fused:reference" in line and "overhead" not in line]
    assert fused
    assert all(line.count("2.00") >= 2 for line in fused)
    assert not any("2.00 *" in line for line in lines if "| eager" in line)


def test_plot(finished: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("needs matplotlib")
    assert cli.main(["plot", str(finished), "--out", str(tmp_path)]) == 0
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) == 6  # two ranks, three modes
    assert all(p.stat().st_size > 10_000 for p in pictures)


@pytest.mark.parametrize("provider", ["fused:reference", "plain", "lora", "inplace", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gate_passes_what_is_right(provider: str, dtype: str) -> None:
    verdict = gate.check(run(provider, TINY._replace(dtype=dtype)))
    assert verdict.passed, verdict.detail
    assert verdict.error_over_limit > 0


def wrong_output(y: torch.Tensor, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = y.clone()
    y[3, 17] += 1e-3
    return (y, *grads)


WRONG = {
    "y": wrong_output,
    "y is not finite everywhere": lambda y, *g: (torch.full_like(y, math.nan), *g),
    "grad of x": lambda y, dx, *g: (y, dx * 1.001, *g),
    "grad of lora_A": lambda y, dx, dA, dB: (y, dx, dA * 1.001, dB),
    "grad of lora_B": lambda y, dx, dA, dB: (y, dx, dA, dB + 1e-3),
}


@pytest.mark.parametrize("what", WRONG)
def test_gate_catches(what: str) -> None:
    wrong = run("fused:reference")
    right = wrong.step(0)
    wrong.step = lambda copy: WRONG[what](*right)  # type: ignore[method-assign]
    verdict = gate.check(wrong)
    assert not verdict.passed
    assert verdict.detail.startswith(what)


@pytest.mark.parametrize("provider", ["fused:reference", "plain", "lora", "inplace", "eager", "perturb"])
@pytest.mark.parametrize("rank", [0, 2])
def test_input_grad_alone(provider: str, rank: int) -> None:
    found = [p for p in providers.every("cpu") if p.name.startswith(provider)][0]
    if found.needs_rank and not rank:
        pytest.skip("needs an adapter")
    alone = run(found.name, TINY._replace(mode="input_grad", rank=rank))
    (dx,) = alone.step(1)
    assert dx.shape == (TINY.M, TINY.K)
    verdict = gate.check(alone, copy=1)
    assert verdict.passed, verdict.detail
    wrong = gate.check(alone, copy=1, step=lambda copy: (dx * 1.001,))
    assert not wrong.passed
    assert wrong.detail.startswith("grad of x")
    if provider == "fused:reference":  # the same dX as that of a whole training step
        both = run(provider, TINY._replace(rank=rank))
        alone.problem.inputs = both.inputs
        alone.inputs = both.inputs
        torch.testing.assert_close(alone.step(0)[0].detach(), both.step(0)[1], rtol=0, atol=0)


def test_graphs_have_rows_of_their_own_and_pass_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With calls in place of replays: what is captured, gated and reported."""

    def stand_in(step: Any, copies: int) -> Any:
        if isinstance(step.__self__, providers.Lora):
            raise RuntimeError("cannot capture")
        if isinstance(step.__self__, providers.Plain):
            return lambda copy: tuple(1.01 * t for t in step(copy))
        return step

    monkeypatch.setattr(timing, "graphed", stand_in)
    settings = Settings(
        "cpu", providers=("fused:reference", "lora", "inplace", "perturb"), budget=0.001, graph="small"
    )
    bench = Bench(settings, Progress(1))
    bench.linear(TINY, measure_memory=False)
    captured = {r["provider"].partition(":")[0] for r in bench.rows if r.get("launch") == "graph"}
    assert captured == {"fused", "perturb"}  # torch's generators cannot be seeded in a graph
    assert len(bench.failures) == 1
    assert "plain none, graph: gate: y:" in bench.failures[0]
    assert "lora as a CUDA graph: RuntimeError: cannot capture" in bench.skipped
    text = table.summary(results.Results({}, bench.rows, bench.failures, []))
    assert "replayed as a CUDA graph" in text
    rows = len(bench.rows)
    bench.linear(TINY._replace(M=GRAPH_ROWS + 1), measure_memory=False)
    assert not any(r.get("launch") for r in bench.rows[rows:])
    with pytest.raises(SystemExit):
        cli.main([*FAST, "--graph", "all"])
    assert "--graph all: CUDA graphs need" in capsys.readouterr().err


def test_cases_that_a_limit_leaves_out_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes = ["--modes", "forward", "--m", "3", "4", "--rank", "0"]
    assert cli.main([*FAST, *modes, "--no-parts", "--time-limit", "0", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for M in (3, 4):
        case = TINY._replace(M=M, mode="forward", rank=0)
        assert f"Skipped: {case}: no time left (--time-limit 0: more seconds have it)" in said


def test_a_goal_takes_rounds_and_no_cases() -> None:
    settings = Settings("cpu", providers=("lora",), budget=0.0, min_rounds=8, goal=1e-9)
    bench = Bench(settings, Progress(1))
    cases = [TINY._replace(M=M) for M in (5, 6, 7)]
    bench.linear_cases(cases)
    rounds = {case.M: {r["rounds"] for r in bench.rows if r["M"] == case.M} for case in cases}
    assert rounds[5] == {8}
    assert rounds[6] == rounds[7] == {2}
    assert list(bench.skipped)[-1] == "rounds, in 2 of 3 cases, for time (--budget 0 has them)"


def test_a_busy_machine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [*FAST, "--modes", "forward", "--m", "5", "--rank", "0", "--no-parts", "--out", str(tmp_path)]
    for share, busy in ((0.4, True), (0.95, False)):
        with monkeypatch.context() as patch:
            patch.setattr(environment, "cpu_share", lambda share=share: share)
            assert cli.main(one) == 0
        said = capsys.readouterr()
        assert ("This machine is busy: 40% of" in said.err.splitlines()[0]) == busy
        assert ("This machine is busy: 40% of" in said.out) == busy
    assert 0 < environment.cpu_share(0.05) < 1.2


def test_gate_catches_noise_of_the_wrong_sign_and_missing_noise() -> None:
    noisy = run("fused:reference")
    drawn = noisy.eps(0)
    noisy.eps = lambda copy: -drawn  # type: ignore[method-assign]
    assert not gate.check(noisy).passed
    noisy.eps = lambda copy: None  # type: ignore[method-assign]
    assert not gate.check(noisy).passed


def test_a_wrong_provider_is_not_timed_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = providers.Eager.forward
    monkeypatch.setattr(providers.Eager, "forward", lambda self, copy: right(self, copy) * 1.01)
    monkeypatch.setattr(providers.InPlace, "forward", lambda self, copy: 1 / 0)
    modes = ["--modes", *shapes.TRAINING]
    assert cli.main([*FAST, *modes, "--m", "5", "--rank", "0", "--out", str(tmp_path)]) == 1
    found = results.load(tmp_path / "tiny.json")
    assert len(found.failures) == 8  # two providers, noises and modes
    assert any("eager gaussian: gate: y:" in f for f in found.failures)
    assert any("inplace rademacher: ZeroDivisionError" in f for f in found.failures)
    timed = {r["provider"] for r in found.rows if r["kind"] == "linear"}
    assert timed >= {"plain", "fused:reference"}
    assert not timed & {"eager", "inplace"}
    assert "FAILED" in capsys.readouterr().out


def test_inplace_restores_the_weight() -> None:
    inplace: Any = run("inplace")
    before = inplace.weights[1].clone()
    inplace.step(1)
    torch.testing.assert_close(inplace.weights[1], before, rtol=0, atol=1e-6)


def test_slow_calls_sit_out_rounds_but_share_theirs() -> None:
    rounds, steps = timing.every_nth({"fast": 1e-3, "half": 2e-3, "slow": 10.0}, 0.1, 3, 100)
    assert rounds == 100
    assert steps == {"fast": 1, "half": 2, "slow": 32}  # 4 rounds, the fewest by halves that is at least 3
    calls = {"a": lambda copy: None, "b": lambda copy: None}
    seen = timing.interleaved(calls, lambda call, copy: {"a": 2.0, "b": 4.0}[
        next(n for n, c in calls.items() if c is call)
    ], 2, 8.0, 1, 100)  # fmt: skip
    assert len(seen) == 4
    assert timing.seconds(seen, "b") == [4.0, 4.0]
    assert timing.paired_ratio(seen, "b", "a") == (2.0, 2.0, 2.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_eager_and_plain() -> None:
    case = Case("", "", 1, 1024, 2048, "float32", "forward", 0)
    weight = 1024 * 2048 * 4
    plain = memory.peak_extra_bytes(case, "cpu", "plain", "none")
    eager = memory.peak_extra_bytes(case, "cpu", "eager", "gaussian")
    assert plain is not None and eager is not None
    assert plain < weight / 4
    assert 1.9 * weight < eager < 2.6 * weight  # eps and W + eps


def test_list_names_every_provider(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    every = (
        "fused:reference",
        "plain",
        "lora",
        "inplace",
        "eager",
        "compile",
        "perturb:",
        "peft",
        "square2048",
    )
    for name in every:
        assert name in text


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> tune.Tuner:
    """As on an H100, but that the `cpu` backend does the work."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    from flatlora_kernels.triton_kernels import launch

    monkeypatch.setattr(launch, "machine_of", lambda tensor: launch.Machine("sm90", 132))
    monkeypatch.setattr(
        tune, "Fused", lambda problem, noise, backend: providers.Fused(problem, noise, "reference")
    )
    monkeypatch.setattr(tune, "LAYERS", ((24, 40), (16, 40)))
    made = tune.Tuner("cpu", ["bfloat16", "float16"], candidates=5, limit=60)
    lines = made.lines()
    small = [line._replace(cases=tuple((c._replace(M=3), n) for c, n in line.cases)) for line in lines]
    monkeypatch.setattr(made, "lines", lambda: small[:3])
    made.budgets, made.min_rounds = (0.0, 0.0), 1
    return made


class Workers:
    """In place of the pool: says what became of each tile at once."""

    def __init__(self, outcome: Any) -> None:
        self.outcome, self.jobs = outcome, []

    def submit(self, work: Any, job: precompile.Job) -> Any:
        self.jobs.append(job)
        future: Any = concurrent.futures.Future()
        future.set_result(self.outcome(job))
        return future

    def shutdown(self, **options: bool) -> None:
        pass


def test_tune_has_what_the_table_has_in_its_space(tuner: tune.Tuner) -> None:
    from flatlora_kernels.triton_kernels import configs

    for (family, kind), part in configs.LINEAR.items():
        for direction, entries in part.items():
            for most, tile in entries:
                s = tune.space(most, family)
                plain = tile._replace(fill=False)
                if family in ("sm80", "sm90", "sm100") and kind == "half":
                    values = (*plain[:6], plain.per_processor)
                    assert all(v in allowed for v, allowed in zip(values, s, strict=True)), (direction, tile)
    tuner.count = 16
    for line in tuner.lines():
        candidates = tuner.candidates(line)
        assert candidates[0] == line.tile
        assert len(candidates) == len(set(candidates)) == 16
        assert all(c.fill == line.tile.fill for c in candidates)


def test_tune_prints_a_table_and_says_what_it_dropped(
    tuner: tune.Tuner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flatlora_kernels.triton_kernels import configs

    bad = {0: Outcome("OutOfResources: shared memory"), 1: Outcome(None, 255, 6, 1000)}
    order: dict[Any, int] = {}

    def outcome(job: precompile.Job) -> Outcome:
        number = order.setdefault((job.case.mode, job.case.M, job.tile), len(order))
        return bad.get(number, Outcome(None, 200, 0, 1000))

    workers = Workers(outcome)
    monkeypatch.setattr(precompile, "pool", lambda processes: workers)
    # The third tile of the first line is wrong, and the fourth raises.
    first = tuner.lines()[0]
    third, fourth = tuner.candidates(first)[2:4]
    check = gate.check
    used: list[Any] = []

    def checked(run: Any, step: Any) -> gate.Verdict:
        def under_the_tile(copy: int) -> Any:
            result = step(copy)
            tile = used[-1]
            if tile == fourth:
                raise RuntimeError("illegal address")
            return tuple(1.1 * t for t in result) if tile == third else result

        return check(run, step=under_the_tile)

    using = tune.using

    def recorded(tile: Any) -> Any:
        used.append(tile)
        return using(tile)

    monkeypatch.setattr(tune, "using", recorded)
    monkeypatch.setattr(gate, "check", checked)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tuner.run()
    dropped = "\n".join(tuner.dropped)
    for reason in (
        "OutOfResources: shared memory",
        "spills 6 words",
        "wrong: y:",
        "RuntimeError: illegal address",
    ):
        assert reason in dropped
    table = eval("{" + tuner.text() + "}", {"Config": configs.Config, "ANY": configs.ANY})["sm90", "half"]
    present = configs.LINEAR["sm90", "half"]
    assert table.keys() == present.keys()
    for direction, entries in table.items():
        assert [most for most, _ in entries] == [most for most, _ in present[direction]]
        assert [t.fill for _, t in entries] == [t.fill for _, t in present[direction]]
    assert not set(tuner.candidates(first)[:4]) & {
        t for (d, p), (t, _) in tuner.winners.items() if (d, p) == first[:2]
    }
    timed = [row for row in tuner.rows if row.get("median_us")]
    assert {(r["noise"], r["dtype"], r["N"]) for r in timed} == {
        ("gaussian", "bfloat16", 24), ("rademacher", "bfloat16", 24), ("gaussian", "float16", 24),
        ("gaussian", "bfloat16", 16),
    }  # fmt: skip
    assert all(0 < r["error_over_limit"] <= 1 for r in timed)
    assert all("median_us" not in r for r in tuner.rows if r["error"])
    written = tune.save(tuner, {"date": "now"}, tmp_path / "t")
    assert json.loads(written[1].read_text())["rows"] == tuner.rows
    assert len(written[0].read_text().splitlines()) == len(tuner.rows) + 1


def test_tune_keeps_the_present_tiles_where_time_is_out(
    tuner: tune.Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatlora_kernels.triton_kernels import configs

    monkeypatch.setattr(precompile, "pool", lambda processes: Workers(lambda job: Outcome()))
    tuner.end = 0
    tuner.run()
    assert not tuner.winners and not tuner.rows
    assert tuner.text().count("# not measured") == sum(map(len, configs.LINEAR["sm90", "half"].values()))


def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from flatlora_kernels import backends

    monkeypatch.setattr(backends, "unavailable", lambda name: "torch sees no GPU")
    with pytest.raises(SystemExit):
        cli.main(["tune"])
    assert "tune needs backend triton, which cannot run here: torch sees no GPU" in capsys.readouterr().err


@pytest.mark.interpreter
@pytest.mark.slow
def test_tune_dry_run(tmp_path: Path) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter's: make test-interpreter")
    root = Path(__file__).parents[2]

    code = (
        "import interpreter, runpy; interpreter.speed_up(); runpy.run_module('bench', None, '__main__', True)"
    )
    path = os.pathsep.join([str(root), str(root / "tests")])

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, "tune", *arguments], cwd=root, capture_output=True, text=True, timeout=300,
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        )  # fmt: skip

    done = command(
        "--dry-run", "--candidates", "2", "--dtypes", "bfloat16", "--out", str(tmp_path), "--name", "t"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("times are no result of any kind") == 2
    assert "For LINEAR" not in done.stdout  # the table only where it is asked for
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert {r["direction"] for r in rows} == {"forward", "input_grad"}
    assert all(r["error_over_limit"] <= 1 for r in rows if r["error"] is None)
    refused = command()
    assert refused.returncode == 2
    assert "tune needs a GPU, and TRITON_INTERPRET=1" in refused.stderr


def test_cuda_timer_and_graphs_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the device and when, with a stand-in for it."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def query(self) -> bool:
            log.append("query")
            return log.count("query") == 1

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 5.0

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    class Stream:
        def wait_stream(self, other: Any) -> None:
            log.append("wait_stream")

    zeros, add = torch.zeros, torch.sum
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*(1000 if s else s for s in shape)))
    monkeypatch.setattr(torch, "sum", lambda *a, **k: (log.append("flush"), add(*a, **k)))
    for name, value in {
        "Event": Event, "_sleep": lambda cycles: log.append("sleep"), "CUDAGraph": Graph, "Stream": Stream,
        "current_stream": Stream, "stream": lambda s: contextlib.nullcontext(),
        "graph": lambda g: contextlib.nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    timer = timing.CudaTimer()
    for _ in range(2):
        assert timer(lambda copy: log.append(f"call {copy}"), 1) == 5e-3
    once = ["sleep", "flush", "record", "call 1", "record", "query", "wait"]
    assert log == once * 2
    assert (timer.calls, timer.late) == (2, 1)
    assert timer.host > 0
    log.clear()
    replay = timing.graphed(lambda copy: (log.append(f"call {copy}"), copy)[1], 2)
    assert [replay(1), replay(0)] == [1, 0]
    assert log == ["wait_stream", "call 0", "call 1", "wait_stream", "call 0", "call 1", "replay", "replay"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about what happens without a GPU")
def test_processes_that_compile_report_what_failed() -> None:
    """Through real processes; without a GPU every job fails, and says so."""
    jobs = precompile.table_jobs([TINY._replace(M=64, N=64, K=64)], ("gaussian",))
    assert {job.what for job in jobs} == {"fused", "perturb", "noise_scale"}
    assert len(set(jobs)) == len(jobs)
    said = precompile.run(jobs[:2], processes=1)
    assert len(said) == 2
    assert all("Error: " in line for line in said)
    broken: Any = concurrent.futures.Future()
    broken.set_exception(RuntimeError("a process died"))
    assert precompile.outcome_of(broken).error == "RuntimeError: a process died"


needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
BLOCK = training.SIZES["tiny"]


SETTINGS = argparse.Namespace(
    size="tiny", model="block", layers=1, tokens=16, sequence=16, dtype="float32", dropout=0.0, device="cpu",
    noise=("gaussian",), providers=None, budget=0.001, min_rounds=1, memory=False, accumulate=1, drift=None,
)  # fmt: skip


def blocks(dtype: torch.dtype = torch.float32, layers: int = 1, dropout: float = 0.0) -> training.State:
    name = str(dtype).removeprefix("torch.")
    return training.State.of(training.changed(SETTINGS, layers=layers, dtype=name, dropout=dropout))


@pytest.fixture
def block() -> training.State:
    return blocks()


def way(name: str, state: training.State, noise: str = "none") -> Any:
    return next(p.make for p in training.every("cpu") if p.name == name)(state, noise)


@pytest.mark.usefixtures("one_thread")
def test_training_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["training", "--device", "cpu", "--size", "tiny", "--tokens", "16", "--budget", "0.01"]
    arguments += ["--min-rounds", "3", "--no-memory", "--out", str(tmp_path), "--name", "t"]
    assert cli.main(arguments) == 0
    found = results.load(tmp_path / "t.json")
    assert found.failures == []
    steps = [r for r in found.rows if r["kind"] == "training"]
    expected = {("flatlora", n) for n in ("none", "gaussian", "rademacher")} | {
        ("plain", "none"),
        ("lora", "none"),
        ("flatlora-kept", "gaussian"),
        ("flatlora-kept", "rademacher"),
    }
    if importlib.util.find_spec("peft") is not None:
        expected |= {("flatlora-peft", n) for n in ("none", "gaussian", "rademacher")}
        expected |= {("peft", "none"), ("inplace", "gaussian")}
    else:
        assert {s.partition(":")[0] for s in found.skipped} == {"flatlora-peft", "peft", "inplace"}
    for dtype in ("float32", "bfloat16"):
        assert {(r["provider"], r["noise"]) for r in steps if r["dtype"] == dtype} == expected
    for row in steps:
        assert row["rounds"] >= 3
        assert 0 < row["error_over_limit"] <= 1
        assert ("to_plain" in row) == (row["provider"] != "plain")
        assert ("to_lora" in row) == (row["provider"] != "lora")
        ours = row["provider"].startswith("flatlora") and row["noise"] != "none"
        assert ("to_rival" in row) == (ours and ("inplace", "gaussian") in expected)
    refresh = [r for r in found.rows if r["kind"] == "noise_scale"]
    ours_names = sorted({name for name, _ in expected if name.startswith("flatlora")})
    assert [(r["provider"], r["dtype"]) for r in refresh] == [
        (name, dtype) for dtype in ("float32", "bfloat16") for name in ours_names
    ]
    text = capsys.readouterr().out
    assert "An optimiser step of a whole model" in text
    assert "1 x 16 tokens, lora_dropout 0 " in text
    assert "Refresh" in text
    with pytest.raises(SystemExit, match="--tokens: expected at most 2048, or a multiple of that, got 2049"):
        cli.main([*arguments, "--tokens", "2049"])
    with pytest.raises(SystemExit, match="--providers: expected of flatlora, .*, got peff"):
        cli.main([*arguments, "--providers", "peff"])


def test_training_compares_in_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a loss of two types is an error on a GPU alone."""
    seen = []
    loss = torch.nn.functional.mse_loss

    def spy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((a.dtype, b.dtype))
        return loss(a, b)

    monkeypatch.setattr(torch.nn.functional, "mse_loss", spy)
    way("plain", blocks(torch.bfloat16)).loss(0)
    assert seen == [(torch.float32, torch.float32)]


def test_training_block_is_that_of_the_model() -> None:
    shapes_ = training.SIZES["llama3-8b"].shapes()
    layers = {(layer.N, layer.K) for layer in shapes.MODELS["llama3-8b"].layers}
    assert set(shapes_) == layers
    assert sum(n * k for n, k in shapes_) == 218_103_808
    block = training.Block(BLOCK, torch.float32, "cpu")
    for name, shape in zip(training.PROJECTIONS, BLOCK.shapes(), strict=True):
        assert block.get_submodule(name).weight.shape == shape


@pytest.mark.parametrize(
    "name", ["flatlora", *(pytest.param(n, marks=needs_peft) for n in ("peft", "flatlora-peft"))]
)
def test_training_without_noise_is_lora(name: str, block: training.State) -> None:
    other, lora = way(name, block), way("lora", block)
    losses = [[w.step(copy).item() for copy in (0, 1, 2, 0)] for w in (other, lora)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[1][3] < losses[1][0]  # trained
    for a, b in zip(other.adapters, lora.adapters, strict=True):
        torch.testing.assert_close(a[1], b[1], rtol=0, atol=5e-5)
        assert not torch.equal(a[0], block.adapters[0][0])


@pytest.mark.parametrize("name", ["flatlora", pytest.param("flatlora-peft", marks=needs_peft)])
def test_training_draws_anew_at_each_step(name: str, block: training.State) -> None:
    noisy, lora = way(name, block, "gaussian"), way("lora", block)
    losses = []
    for _ in range(3):
        noisy.perturb()
        losses += [noisy.loss(0).item(), noisy.loss(0).item()]
        noisy.clear(0)
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert len({*losses, lora.loss(0).item()}) == 4
    assert all(math.isfinite(loss) for loss in losses)


@needs_peft
def test_training_in_place_restores_and_draws_anew(block: training.State) -> None:
    inplace = way("inplace", block, "gaussian")
    inplace.perturb()
    first = inplace.used()
    inplace.restore()
    for layer, weight in zip(inplace.layers, block.weights, strict=True):
        torch.testing.assert_close(layer.weight.data, weight, rtol=0, atol=1e-6)
    inplace.perturb()
    for a, b, weight in zip(first, inplace.used(), block.weights, strict=True):
        assert ((a - weight).norm() / weight.norm()).item() == pytest.approx(0.1, rel=0.2)
        assert ((a - b).norm() / weight.norm()).item() == pytest.approx(0.1 * 2**0.5, rel=0.2)


def test_training_accumulates_under_one_noise(block: training.State) -> None:
    """A step of three micro-batches is three passes between one coming and going of the noise."""
    block.accumulate = 3
    ways = [way(name, block, "gaussian") for name in ("flatlora", "flatlora-kept")]
    ways += [way("inplace", block, "gaussian")] if importlib.util.find_spec("peft") else []
    for noisy in ways:
        log: list[str] = []
        for name in ("perturb", "loss", "restore"):
            original = getattr(noisy, name)
            setattr(noisy, name, lambda *a, n=name, f=original, log=log: (log.append(n), f(*a))[1])
        noisy.step(1)
        assert log == ["perturb", "loss", "loss", "loss", "restore"]
        assert all(x.grad is None for x, _ in block.batches)
    drawn, kept = ways[:2]
    for a, b in zip(drawn.adapters, kept.adapters, strict=True):
        torch.testing.assert_close(a[1], b[1], rtol=0, atol=5e-5)
    assert all(layer._kept is None for layer in kept.layers), "freed for the next"


@needs_peft
def test_training_in_place_drifts() -> None:
    drifts = [way("inplace", blocks(dtype), "gaussian").drift(5) for dtype in (torch.float32, torch.bfloat16)]
    assert 0 < drifts[0] < 1e-6 < 1e-4 < drifts[1] < 1e-2


def _sign(w: Any) -> None:
    used = w.used
    w.used = lambda: [2 * plain - u for u, plain in zip(used(), w.state.weights, strict=True)]


def _missing(w: Any) -> None:
    w.used = lambda: [weight.double() for weight in w.state.weights]


def _stale(w: Any) -> None:
    w.perturb()
    stale = w.used()
    w.used = lambda: stale


def _gradient(w: Any) -> None:
    loss = w.loss

    def wrong(copy: int) -> torch.Tensor:
        value = loss(copy)
        w.adapters[3][1].grad *= 1.001
        return value

    w.loss = wrong


@pytest.mark.parametrize(
    ("breaks", "detail"),
    [
        (_sign, ""),
        (_stale, ""),
        (_missing, "noise: expected 0.1 of the weights, got 0"),
        (_gradient, "o_proj: grad of lora_B"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_gate_catches(breaks: Any, detail: str, dtype: torch.dtype) -> None:
    if breaks is _gradient and dtype == torch.bfloat16:
        pytest.skip("below its rounding")
    state = blocks(dtype)
    assert training.check(way("flatlora", state, "gaussian")).passed
    wrong = way("flatlora", state, "gaussian")
    breaks(wrong)
    verdict = training.check(wrong)
    assert not verdict.passed
    assert verdict.detail.startswith(detail)


def test_a_wrong_way_to_train_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.Flat, "loss", lambda self, copy: training.Way.loss(self, copy) * 1.01)
    monkeypatch.setattr(training.Lora, "perturb", lambda self: 1 / 0)
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    rows, failures, skipped = training.run(SETTINGS, ["float32"])
    assert {r["provider"] for r in rows} == {"plain"}
    assert [f.split(": ")[1] for f in failures] == ["gate", "gate", "gate", "ZeroDivisionError"]
    assert "flatlora gaussian: gate: loss: error" in failures[1]
    missing = ("flatlora-peft", "peft", "inplace")
    assert skipped == [f"{n}: peft is not installed (pip install '.[bench]')" for n in missing]


@needs_peft
@pytest.mark.parametrize("name", ["flatlora", "flatlora-peft", "inplace"])
def test_training_with_dropout(name: str) -> None:
    """Of several blocks; the gate drops the same elements in all types, and sees where too few are dropped."""
    state = blocks(layers=2, dropout=0.3)
    assert [w.shape for w in state.weights[:7]] == [w.shape for w in state.weights[7:]]
    noisy = way(name, state, "gaussian")
    assert training.check(noisy).passed
    for module in noisy.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert not training.check(noisy).passed


@pytest.fixture
def tiny_bert(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of MiniLM."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    config = transformers.BertConfig(**sizes, **off, num_attention_heads=2)
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.encoder = transformers.BertModel(config, add_pooling_layer=False)
    model.head = torch.nn.Linear(32, 1)
    monkeypatch.setattr(training, "pretrained", lambda: model)


@needs_peft
@pytest.mark.usefixtures("one_thread", "tiny_bert")
def test_training_minilm_command(tmp_path: Path) -> None:
    arguments = [
        "training",
        "--device",
        "cpu",
        "--model",
        "minilm",
        "--tokens",
        "24",
        "--sequence",
        "12",
        "--budget",
    ]
    arguments += ["0.01", "--min-rounds", "2", "--no-memory", "--noise", "gaussian", "--dropout", "0", "0.1"]
    assert cli.main([*arguments, "--dtypes", "float32", "--out", str(tmp_path), "--name", "t"]) == 0
    found = results.load(tmp_path / "t.json")
    steps = [r for r in found.rows if r["kind"] == "training"]
    assert {r["layer"] for r in steps} == {f"2 x 12 tokens, lora_dropout {p}" for p in ("0", "0.1")}
    names = {"flatlora", "flatlora-kept", "flatlora-peft", "lora", "peft", "inplace"}
    for layer in {r["layer"] for r in steps}:
        assert {r["provider"] for r in steps if r["layer"] == layer} == names
    assert all("to_peft" in r for r in steps if r["provider"] != "peft")
    assert found.skipped == ["plain: nothing of this model would have a gradient"]
    assert {r["layer"] for r in found.rows if r["kind"] == "noise_scale"} == {"all 12 layers"}


@pytest.mark.usefixtures("tiny_bert")
def test_training_minilm_shares_its_parameters() -> None:
    state = training.State.of(training.changed(SETTINGS, model="minilm", tokens=24, sequence=12))
    noisy, other = way("flatlora", state, "gaussian"), way("lora", state)
    assert len(state.names) == 12 == len(noisy.controller.layers)
    words = [w.module.encoder.embeddings.word_embeddings.weight for w in (noisy, other)]
    assert words[0] is words[1]
    before = [w.clone() for w in state.weights]
    noisy.step(0)
    assert all(map(torch.equal, before, state.weights))
    _gradient(noisy)
    assert not training.check(noisy).passed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_training_memory() -> None:
    """A step's graph holds at least the activations of its tokens, and those of an adapter where there is one."""
    tokens = 4096  # at 512 the resident size of equal runs differs by more than an adapter
    settings = training.changed(SETTINGS, tokens=tokens, sequence=2048)
    peaks = {name: training._peak(settings, name, "none", {}) for name in ("plain", "lora")}
    activations = tokens * 4 * (6 * BLOCK.hidden + 3 * BLOCK.intermediate)
    assert activations < peaks["plain"] < peaks["lora"] < 3 * activations


# The table of the issue that states them: M = 16, 256, 2048, 8192.
TARGETS = {"gaussian": (1.35, 1.25, 1.10, 1.05), "rademacher": (1.15, 1.10, 1.06, 1.04)}


def linear_row(M: int, noise: str, mode: str = "forward", **ratios: Any) -> results.Row:
    about = {
        "kind": "linear",
        "model": "m",
        "layer": "square",
        "M": M,
        "N": 4096,
        "K": 4096,
        "dtype": "bfloat16",
    }
    found = {
        **about,
        "mode": mode,
        "rank": 16,
        "noise": noise,
        "provider": "auto",
        "median_us": 1.0,
        **ratios,
    }
    for name in [n for n in found if n.startswith("to_")]:
        found |= {f"{name}_p20": found[name] - 0.01, f"{name}_p80": found[name] + 0.01}
    return found


def test_targets_are_the_stated_ones() -> None:
    found = set(targets.targets("cuda"))
    for noise, figures in TARGETS.items():
        for M, most in zip((16, 256, 2048, 8192), figures, strict=True):
            assert ("forward", noise, M, "plain", most) in found
            assert ("forward", noise, M, "rival", 1.03) in found
            assert ("forward+backward", noise, M, "peft", 1.03) in found
    assert len(found) == 24
    cpu = [("forward", "gaussian", M, "plain", most) for M, most in ((256, 1.22), (2048, 1.05), (8192, 1.03))]
    assert list(targets.targets("cpu")) == cpu
    for device in ("cpu", "cuda"):  # each is among the cases of the set
        cases = {(c.mode, c.M, c.dtype, c.N, c.K, c.rank) for c in shapes.cases("targets", device)}
        problem = targets._PROBLEM[device]
        assert {(t.mode, t.M, *problem) for t in targets.targets(device)} <= cases


def test_targets_report() -> None:
    rows = [
        linear_row(16, "gaussian", to_plain=1.36, to_rival=1.03),
        linear_row(16, "gaussian", to_plain=1.34, launch="graph"),
        linear_row(2048, "gaussian", to_plain=1.101),
        linear_row(2048, "rademacher", to_plain=1.06),
        linear_row(2048, "rademacher", "forward+backward", to_plain=9.0, to_peft=1.04),
        linear_row(8192, "gaussian", to_plain=1.0) | {"provider": "fused:triton"},
        linear_row(8192, "gaussian", to_plain=1.0) | {"dtype": "float16"},
    ]
    text = targets.report(rows, "cuda")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    found = {(line[0], line[1], line[2], line[3]): line[4:] for line in lines}
    assert found["forward", "gaussian", "16", "plain"] == ["1.35", "1.340 (1.330 to 1.350)", "graph", "met"]
    assert found["forward", "gaussian", "16", "rival"] == ["1.03", "1.030 (1.020 to 1.040)", "calls", "met"]
    assert found["forward", "gaussian", "2048", "plain"][3] == "missed"
    assert found["forward", "rademacher", "2048", "plain"][3] == "met"
    assert found["forward+backward", "rademacher", "2048", "peft"][3] == "missed"
    assert found["forward", "gaussian", "8192", "plain"][3] == "not measured"
    assert len(found) == 24


def test_what_is_noisy_is_compared_with_the_strongest_other_unfused() -> None:
    settings = Settings(
        "cpu", ("gaussian",), ("fused:reference", "inplace", "eager", "lora"), budget=0.001, ways=True
    )
    bench = Bench(settings, Progress(1))
    bench.linear(TINY, measure_memory=False)
    rows = {r["provider"]: r for r in bench.rows}
    best = min(("inplace", "eager"), key=lambda name: rows[name]["median_us"])
    assert rows["fused:reference"]["rival"] == best
    assert (rows["inplace"]["rival"], rows["eager"]["rival"]) == ("eager", "inplace")
    assert "to_rival" not in rows["lora"]
    for row in rows.values():
        assert ("to_lora" in row) == (row["provider"] != "lora")


def test_every_way_of_the_op_is_right_and_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatlora_kernels.backends.shared import panel
    from flatlora_kernels.choice import resolve

    seen: list[str] = []
    real = panel.product
    monkeypatch.setattr(panel, "product", lambda *a: (seen.append("panel"), real(*a))[1])
    names = {p.name for p in providers.every("cpu") if p.fused}
    backend = next(n.partition(":")[2] for n in names if n.startswith("panel:"))
    assert names >= {"auto", f"split:{backend}", f"panel:{backend}", f"fused:{backend}"}
    for name in ("auto", f"split:{backend}", f"panel:{backend}", f"fused:{backend}"):
        for mode in shapes.MODES:
            made = run(name, TINY._replace(mode=mode))
            seen.clear()
            verdict = gate.check(made)
            assert verdict.passed, verdict.detail
            if name != "auto":
                assert bool(seen) == name.startswith("panel")
                assert made.resolved[:2] == (
                    "panel" if seen else "fused", "split" if name.startswith("split") else "folded"
                )  # fmt: skip

    def lacks(*arguments: Any) -> Any:
        raise NotImplementedError("noise_accum: lacks split")

    monkeypatch.setattr(resolve, "resolve", lacks)
    with pytest.raises(providers.Unfit, match="lacks split"):
        run(f"split:{backend}")


@pytest.mark.usefixtures("one_thread")
def test_strategies_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command: what is written is what dispatch.py reads, and nothing that failed the gate."""
    from flatlora_kernels.choice import dispatch, resolve
    from flatlora_kernels.core.noise import KINDS

    key = dispatch.device_key(torch.device("cpu"))
    if key is None:
        pytest.skip("needs the cpu backend")
    monkeypatch.setattr(strategies, "SHAPES", ((16, 24), (24, 16)))
    monkeypatch.setattr(strategies, "ROWS", {"cpu": (5,)})
    monkeypatch.setattr(strategies, "QUICK", {"cpu": (((16, 24),), (5,))})
    right = providers.Fused.input_grad

    def wrong(self: Any, copy: int) -> torch.Tensor:
        broken = self.choice["strategy"] == "panel" and self.problem.dtype == torch.bfloat16
        return right(self, copy) * (2 if broken else 1)

    monkeypatch.setattr(providers.Fused, "input_grad", wrong)
    monkeypatch.setattr(timing, "interleaved", functools.partial(few_rounds, timing.interleaved))
    raw = tmp_path / "raw"
    path = tmp_path / "tables" / f"{key.replace(' ', '-')}.csv"
    linear, order = strategies.Bench.linear, []

    def noted(self: strategies.Bench, *arguments: Any) -> None:
        order.append(("hadamard" in self.noises, path.exists()))
        linear(self, *arguments)

    monkeypatch.setattr(strategies.Bench, "linear", noted)
    assert strategies.main("cpu", False, 60, raw, "s", tmp_path / "tables") == 1
    # Hadamard noise last, when the table says which plain product its transform has.
    assert order and order == [(False, False)] * (len(order) // 2) + [(True, True)] * (len(order) // 2)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == strategies.COLUMNS
    ways = {(d, s) for line in lines for d, s in [(line["dtype"], line["strategy"])]}
    assert {line["backend"] for line in lines} == {"cpu"}  # the reference is no candidate
    assert ways == {
        (dtype, strategy)
        for dtype in ("float32", "bfloat16")
        for strategy in ("fused", "panel", "transform", "plain")
        if (dtype, strategy) != ("bfloat16", "panel")
    }
    assert {(r["noise"], r["strategy"]) for r in lines if r["noise"] in ("none", "hadamard")} == {
        ("none", "fused"), ("none", "plain"), *(("hadamard", s) for s in resolve.STRATEGIES)
    }  # fmt: skip
    assert {(int(r["M"]), int(r["N"]), int(r["K"])) for r in lines} == {(5, *s) for s in strategies.SHAPES}
    assert {(r["direction"], r["noise"]) for r in lines} == {
        (d, n) for d in ("forward", "input_grad") for n in ("none", *KINDS)
    }
    assert all(float(r["p20"]) <= float(r["ratio"]) <= float(r["p80"]) and r["commit"] for r in lines)
    rows = results.load(raw / "s.json").rows
    raw_row = next(r for r in rows if r["provider"] == "panel:cpu")
    line = next(r for r in lines if r["strategy"] == "panel")
    assert float(line["ratio"]) == pytest.approx(raw_row["to_plain"], abs=1e-4)
    assert "gate" in capsys.readouterr().out

    monkeypatch.setattr(dispatch, "_TABLES", tmp_path / "tables")
    dispatch.forget()
    try:
        found = dispatch._table(key)["float32", "gaussian", "both"][5, 16, 24]
        without = dispatch._table(key)["float32", "none", "input_grad"][5, 16, 24]
        assert {way for way in without} == {("cpu", "fused"), ("cpu", "plain")}
        both = [float(r["ratio"]) for r in lines if r["strategy"] == "fused" and r["noise"] == "gaussian"
                and (r["dtype"], r["M"], r["N"]) == ("float32", "5", "16")]  # fmt: skip
        assert found["cpu", "fused"] == pytest.approx(sum(both) / 2)
        assert len(both) == 2
    finally:
        dispatch.forget()

    # A quick run leaves the whole table alone, and one without time writes none.
    before = path.read_text()
    assert strategies.main("cpu", True, 60, raw, "q", tmp_path / "tables") == 1
    assert path.read_text() == before
    assert (raw / "q-table.csv").exists()
    assert strategies.main("cpu", True, -1, raw, "n", tmp_path / "other") == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("one_thread")
def test_strategies_leave_out_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "_LONGEST", 1e-9)
    bench = strategies.Bench(Settings("cpu", ("gaussian",), ("lora",), budget=0.0, min_rounds=2), Progress(0))
    bench.linear_cases(
        [TINY._replace(mode=mode, M=M) for M in (3, 2, 5) for mode in ("forward", "input_grad")]
    )
    timed = [(r["mode"], r["M"]) for r in bench.rows if r["provider"] == "plain"]
    assert timed == [(mode, M) for M in (3, 2) for mode in ("forward", "input_grad")]
    left = [s for s in bench.skipped if "took more than" in s]
    assert len(left) == 2 and all("M=5" in s and "M=2" in s for s in left)


def test_strategies_hold_torch_to_the_same_instruction_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--isa runs the command again in an environment that does; without it a table would mix two machines."""
    from flatlora_kernels.backends import cpu

    if cpu.unavailable():
        pytest.skip("needs the cpu backend")
    levels = cpu._load().levels  # type: ignore[union-attr]
    held = [level for level in levels[1:] if level in strategies.HELD]
    if not held:
        pytest.skip(f"has no lower level than {levels[0]}")
    best = {name: "" for name in ("FLATLORA_CPU_ISA", *strategies.HELD["avx2"])}
    for name in best:
        monkeypatch.delenv(name, raising=False)
    ran: list[tuple[list[str], dict[str, str]]] = []

    def stand_in(command: list[str], env: dict[str, str]) -> Any:
        ran.append((command, env))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(strategies.subprocess, "run", stand_in)
    given = ["tune", "--strategies", "--device", "cpu", "--isa", held[0]]
    assert cli.main(given) == 7
    command, env = ran[0]
    assert command[1:] == ["-m", "bench", *given]
    assert {k: env[k] for k in best} == {"FLATLORA_CPU_ISA": held[0], **strategies.HELD[held[0]]}
    assert strategies.again(levels[0], given) == 7
    assert {k: v for k, v in ran[1][1].items() if k in best} == {"FLATLORA_CPU_ISA": levels[0]}
    with pytest.raises(SystemExit):
        cli.main([*given[:-1], "mmx"])
    assert f"--isa: expected one of {levels[0]}" in capsys.readouterr().err

    # In that environment the command does the work, but not where torch began without it.
    for name, value in strategies.environment_of(held[0]).items():
        monkeypatch.setenv(name, value)
    assert strategies.again(held[0], given) is None
    loaded = cpu._load()._replace(level=held[0])  # type: ignore[union-attr]
    monkeypatch.setattr(cpu, "_load", lambda: loaded)
    began = torch.backends.cpu.get_cpu_capability().lower()
    if began != held[0]:
        with pytest.raises(ValueError, match=f"--isa: expected {held[0]}.*torch with {began}"):
            strategies.main("cpu", True, 60, tmp_path, "x", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: held[0].upper())
    strategies.check_held()
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    with pytest.raises(ValueError, match="--isa: expected"):
        strategies.check_held()


def test_every_kind_of_noise_can_be_picked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flatlora_kernels.core.noise import KINDS

    for command in ("run", "training", "tune", "variance"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        said = capsys.readouterr().out
        assert all(kind in said for kind in KINDS), command
    name = next(p.name for p in providers.every("cpu") if p.name.startswith("fused:"))
    one = ["--set", "tiny", "--device", "cpu", "--modes", "forward", "--m", "5", "--rank", "0", "--no-parts"]
    one += [
        "--dtypes",
        "bfloat16",
        "--budget",
        "0.001",
        "--memory",
        "none",
        "--out",
        str(tmp_path),
        "--name",
        "k",
    ]
    assert cli.main([*one, "--providers", name, "eager", "perturb", "--noise", *KINDS]) == 0
    rows = results.load(tmp_path / "k.json").rows
    for provider in (name, "eager"):
        assert {r["noise"] for r in rows if r["provider"] == provider} >= set(KINDS)


@pytest.mark.parametrize("noise", ["none", "near_gaussian", "hadamard"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", shapes.MODES)
def test_every_way_is_right_with_every_noise(noise: str, dtype: str, mode: str) -> None:
    made = [p for p in providers.every("cpu") if p.fused and noise in p.noises and "reference" not in p.name]
    names = {p.name.partition(":")[0] for p in made}
    expected = {
        "none": {"auto", "fused", "vendor"},
        "near_gaussian": {"auto", "fused", "split", "panel"},
        "hadamard": {"auto", "fused", "split", "panel", "transform"},
    }
    if any(p.name == "fused:cpu" for p in made):
        assert names == expected[noise]
    for p in made:
        verdict = gate.check(p.make(Problem(TINY._replace(mode=mode, dtype=dtype), "cpu", 1), noise))
        assert verdict.passed, (p.name, verdict.detail)


def test_the_vendors_product_and_our_own_are_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatlora_kernels.backends import cpu
    from flatlora_kernels.backends.shared import products

    if cpu.unavailable():
        pytest.skip("needs the cpu backend")
    seen: list[str] = []
    for module, name in ((cpu, "product"), (products, "plain")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: (seen.append(name), real(*a))[1])
    for way, expected in (("fused:cpu", "product"), ("vendor:cpu", "plain")):
        for mode in ("forward", "input_grad"):
            seen.clear()
            run(way, TINY._replace(mode=mode), "none").step(0)
            assert seen == [expected], (way, mode)


def test_overhead_stands_beside_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    from bench import parts

    monkeypatch.setattr(parts, "_ROUNDS", 3)
    backend = next(p.name.partition(":")[2] for p in providers.every("cpu") if p.name.startswith("panel:"))
    rows = parts.overhead([backend], "cpu")
    found = {(r["provider"], r["noise"], r["rank"], r["mode"]): r for r in rows}
    assert len(found) == len(rows)
    for mode in shapes.TRAINING:
        assert "to_peft" not in found["F.linear", "none", 0, mode]
        assert found["peft", "none", 4, mode]["to_peft"] == 1
        for provider in (f"fused:{backend}", f"layer:{backend}"):
            for noise in ("gaussian", "none"):
                assert found[provider, noise, 4, mode]["to_peft"] > 0
    text = table.summary(results.Results({}, rows, [], []))
    assert "/ peft" in text and f"layer:{backend}" in text


def few_rounds(real: Any, calls: Any, timer: Any, copies: int, budget: float, least: int, most: int) -> Any:
    return real(calls, timer, copies, 0.0, least, least)


def test_strategies_by_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --backends measured is on disk after each case, makes no table, and --rows makes one of it."""
    from flatlora_kernels.choice import dispatch

    key = dispatch.device_key(torch.device("cpu"))
    if key is None:
        pytest.skip("needs the cpu backend")
    monkeypatch.setattr(strategies, "QUICK", {"cpu": (((16, 24),), (5,))})
    monkeypatch.setattr(timing, "interleaved", functools.partial(few_rounds, timing.interleaved))
    saved: list[int] = []
    save = results.save_json

    def counted(found: results.Results, stem: Path) -> Path:
        saved.append(len(found.rows))
        return save(found, stem)

    monkeypatch.setattr(results, "save_json", counted)
    tables = tmp_path / "tables"
    assert strategies.main("cpu", True, 60, tmp_path, "one", tables, backends=["cpu"]) == 0
    # Four cases, again with hadamard noise, and the end.
    assert len(saved) == 9 and saved == sorted(saved) and saved[0] > 0
    assert not tables.exists()
    with pytest.raises(ValueError, match="--backends: none of cuda runs on cpu"):
        strategies.main("cpu", True, 60, tmp_path, "none", tables, backends=["cuda"])

    one = json.loads((tmp_path / "one.json").read_text())
    assert one["meta"]["config"]["table"] == key
    assert strategies.combine([tmp_path / "one.json"], tables) == 0
    # Two types and directions of two ways without noise, two with each of three kinds, and three with hadamard.
    assert len((tables / f"{key.replace(' ', '-')}.csv").read_text().splitlines()) == 1 + 4 * (2 + 6 + 3)
    later = copy.deepcopy(one)
    later["rows"] = [{**r, "to_plain": 7.0} for r in later["rows"] if r["noise"] == "hadamard"]
    (tmp_path / "later.json").write_text(json.dumps(later))
    assert strategies.combine([tmp_path / "one.json", tmp_path / "later.json"], tables) == 0
    with (tables / f"{key.replace(' ', '-')}.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * (2 + 6 + 3)
    assert {r["noise"] for r in lines if float(r["ratio"]) == 7} == {"hadamard"}
    assert all(float(r["ratio"]) == 7 for r in lines if r["noise"] == "hadamard")
    one["meta"]["config"]["table"] = "sm90"
    (tmp_path / "two.json").write_text(json.dumps(one))
    with pytest.raises(ValueError, match="--rows: expected measurements of one kind of device"):
        strategies.combine([tmp_path / "one.json", tmp_path / "two.json"], tables)


def test_run_saves_after_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped leaves the cases before; without --parts these are all there is."""
    linear, count = Bench.linear, iter((1, 1, 0))

    def stopped(self: Bench, *arguments: Any) -> None:
        if not next(count):
            raise KeyboardInterrupt
        linear(self, *arguments)

    monkeypatch.setattr(Bench, "linear", stopped)
    with pytest.raises(KeyboardInterrupt):
        cli.main([*FAST, "--no-parts", "--out", str(tmp_path)])
    found = results.load(tmp_path / "tiny.json")
    assert len({(r["M"], r["rank"], r["mode"]) for r in found.rows}) == 2
    assert {r["kind"] for r in found.rows} == {"linear"}


def test_strategies_cover_what_is_asked_for() -> None:
    for device in ("cpu", "cuda"):
        every, quick = strategies.cases(device, False), strategies.cases(device, True)
        assert every[: len(quick)] == quick
        assert {c.mode for c in quick} == {"forward", "input_grad"}
        few = {1, 4} if device == "cpu" else set()  # generation
        assert {c.M for c in every} == {16, 64, 256, 1024, 2048, 4096, 8192} | few
        wide = {(14336, 4096)} if device == "cuda" else set()
        assert {(c.N, c.K) for c in every} == {(384, 384), (2048, 2048), (1024, 4096), (4096, 4096)} | wide
        assert all(c.M * c.N * c.K <= strategies._MOST[device] for c in every)


def test_fidelity() -> None:
    """About 40 % at sigma 0.004 in bfloat16, 3 % at 0.05, and less than 1 % split at any sigma."""
    folded, split, size = fidelity.errors(torch.bfloat16, 0.004, "gaussian", 256)
    assert 0.3 < folded < 0.5
    assert 0.7 < size < 1.3
    assert split < 0.01
    assert 0.02 < fidelity.errors(torch.bfloat16, 0.05, "gaussian", 256)[0] < 0.05
    assert fidelity.errors(torch.float32, 0.004, "gaussian", 256)[0] < 1e-4


def test_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import environment

    assert environment.clocks("cpu") is None
    asked = []

    def answer(command: list[str], **options: Any) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "1980 MHz, 1980 MHz, 2619 MHz, 41, 310.25 W\n", "")

    monkeypatch.setattr(subprocess, "run", answer)
    properties = type("Properties", (), {"uuid": "1234"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    text = environment.clocks("cuda")
    assert (
        text is not None and text.startswith("clocks.sm 1980 MHz, ") and text.endswith("power.draw 310.25 W")
    )
    assert asked[0][:3] == ["nvidia-smi", "-i", "GPU-1234"]
    assert not any("lock" in part and "query" not in part for part in asked[0])  # asks, sets nothing
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("nvidia-smi"))
    )
    assert environment.clocks("cuda") is None
    shown = table.summary(results.Results({"clocks_before": "a", "clocks_after": "b"}, [], [], []))
    assert "before: a; after: b" in shown


def test_table_ends_with_the_ratios_of_the_automatic_choice() -> None:
    rows = [
        linear_row(16, "gaussian", to_plain=1.5, to_lora=1.4, to_peft=0.9, to_rival=0.8),
        linear_row(16, "gaussian", to_plain=1.2, to_lora=1.1, to_peft=0.7, to_rival=0.6)
        | {"provider": "fused:cuda"},
    ]
    text = table.summary(results.Results({}, rows, [], []))
    assert all(name in text for name in ("auto / lora", "auto / peft", "auto / best unfused"))
    last = next(line for line in text.splitlines() if "gaussian" in line)
    assert [cell.strip() for cell in last.split("|")[-4:-1]] == ["1.40", "0.90", "0.80"]


def test_plots_tell_the_ways_of_the_op_apart() -> None:
    from bench import plot

    names = (
        "auto",
        "fused:cpu",
        "fused:triton",
        "fused:cuda",
        "panel:cuda",
        "split:cuda",
        "perturb:cuda",
        "lora",
        "peft",
    )
    styles = {name: plot._style(name) for name in names}
    assert len({(str(s["color"]), str(s["marker"])) for s in styles.values()}) == len(names)
    assert all((styles[name]["linewidth"] > 2) == (number < 6) for number, name in enumerate(names))  # type: ignore[operator]


@pytest.mark.usefixtures("one_thread")
def test_a_whole_run_of_the_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a layer of 24 x 40: all ways of the op, and the report at its end."""
    tiny = shapes.Grid("tiny", rows=(5,), dtypes=("float32",), modes=shapes.TRAINING, ranks=(16,))
    monkeypatch.setitem(shapes.TARGETS, "cpu", (tiny,))
    monkeypatch.setitem(targets._PROBLEM, "cpu", ("float32", 24, 40, 16))
    monkeypatch.setattr(
        targets, "targets", lambda device: [targets.Target("forward", "gaussian", 5, "plain", 1e9)]
    )
    arguments = ["run", "--set", "targets", "--device", "cpu", "--budget", "0.001", "--memory", "none"]
    assert cli.main([*arguments, "--out", str(tmp_path), "--name", "t"]) == 0
    found = results.load(tmp_path / "t.json")
    linear = {r["provider"].partition(":")[0] for r in found.rows if r["kind"] == "linear"}
    assert linear >= {"auto", "fused", "panel", "split", "perturb", "inplace", "eager", "plain", "lora"}
    assert "" not in {r["provider"] for r in found.rows if r["kind"] != "linear"}
    report = capsys.readouterr().out.partition("| mode")[2]
    assert "| calls | met" in report


@pytest.fixture
def small_truth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """bench.truth on the CPU, with the backend `cpu` in place of the GPU's."""
    from bench import truth

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(truth, "DEVICE", "cpu")
    return truth


def test_truth_refuses_a_library_of_another_build(
    small_truth: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.so").write_text("not a library")
    monkeypatch.setattr(small_truth, "_libraries", {})
    monkeypatch.setenv("FLATLORA_EMULATE", "1")
    monkeypatch.setattr(sys, "argv", ["truth", "time", f"--library=old={tmp_path / 'old.so'}"])
    with pytest.raises(SystemExit, match="2"):
        small_truth.main()
    assert f"--library old={tmp_path / 'old.so'}: its library cannot be loaded: " in capsys.readouterr().err


def test_truth_finds_what_is_wrong(small_truth: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def family() -> Any:
        return small_truth._products("cpu", -1, ("bfloat16", "float32"), ((20, 72, 96, 8, 2),))

    before = torch.are_deterministic_algorithms_enabled()
    perturbed = small_truth.Problem.perturbed
    try:
        assert small_truth._check_family("right", family, 60) == 0
        with monkeypatch.context() as patch:  # the noise of one sample for all
            patch.setattr(small_truth.Problem, "perturbed", lambda p, group=0: perturbed(p, 0))
            assert small_truth._check_family("wrong", family, 60) == 32
        monkeypatch.setattr(small_truth.Given, "forward", lambda self, copy: torch.randn(3))
        assert small_truth._check_family("raises", family, 60) == 16
    finally:
        torch.use_deterministic_algorithms(before)
    rows = [json.loads(line) for line in (tmp_path / "truth-check.jsonl").read_text().splitlines()]
    assert len(rows) == 96
    assert [r["case"] for r in rows if "raised" in r] == [
        r["case"] for r in rows if r["family"] == "raises" and r["case"].startswith("forward")
    ]


# case of the check -> seconds that it takes
SLOW = {"hangs": (0.0, 60.0), "has many cases": (0.0, *(0.4,) * 60)}


@pytest.mark.parametrize("name", SLOW)
def test_truth_ends_a_family_over_its_limit(small_truth: Any, tmp_path: Path, name: str) -> None:
    """One that hangs is wrong, one whose cases take their time is not."""
    code = f"""
import time
from bench import truth
cases = [(str(seconds), lambda seconds=seconds: time.sleep(seconds) or 0.0, 0.0) for seconds in {SLOW[name]}]
truth._check_family("slow", lambda: iter(cases), 1.2)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, timeout=50, env={**os.environ, "OUT": str(tmp_path)}
    )
    *rows, last = [json.loads(line) for line in (tmp_path / "truth-check.jsonl").read_text().splitlines()]
    assert all(row["ok"] for row in rows) and rows[0]["case"] == "0.0"
    assert re.fullmatch(r"not done in 1\.2 s, \d\.\d s of them in this case", last["raised"])
    if name == "hangs":
        assert done.returncode == 1 and last["ok"] is False and last["case"] == "60.0"
    else:
        assert done.returncode == small_truth.NO_TIME and last["ok"] is None and last["case"] == "0.4"


@pytest.mark.parametrize("ends, status, said", [
    ({"a": 0, "b": 0}, 0, "2 of 2 families right, "),
    ({"a": 0, "b": 75}, 75, "1 of 2 families right, 1 as far as their time went, "),
    ({"a": 75, "b": 3}, 1, "0 of 2 families right, 1 as far as their time went, "),
    ({"a": -11, "b": 0}, 1, "1 of 2 families right, "),
])  # fmt: skip
def test_truth_tells_wrong_from_not_done(
    small_truth: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ends: dict[str, int], status: int, said: str,
) -> None:  # fmt: skip
    class Process:
        def __init__(self, command: list[str]) -> None:
            self.status = ends[command[4]]

        def wait(self, limit: float) -> int:
            return self.status

    monkeypatch.setattr(small_truth, "_families", lambda libraries: dict.fromkeys(ends))
    monkeypatch.setattr(small_truth.subprocess, "Popen", Process)
    assert small_truth.check(9.0, [], [], "") == status
    assert said in capsys.readouterr().out.splitlines()[-1]


def test_truth_passes_of_a_backend(small_truth: Any) -> None:
    for case, run, most in small_truth._passes("cpu"):
        assert run() <= most, case


def test_truth_times_in_turns(small_truth: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = "cpu y|nothing"
    calls = {
        "plain": lambda c: torch.zeros(9),
        "plain dX": lambda c: torch.zeros(9),
        "broken y": lambda c: 1 / 0,
    }
    real = small_truth._calls
    small_truth._calls = lambda *a, **k: (dict(calls), [None, None])
    try:
        assert small_truth.measure(9.0, [16], [], 1e-4, names + "|broken", [0]) == 2
    finally:
        small_truth._calls = real
    rows = [json.loads(line) for line in (tmp_path / "truth-time.jsonl").read_text().splitlines()]
    assert [r["name"] for r in rows if "raised" in r] == ["broken y"] * 2
    assert {r["to_plain"] for r in rows if r["name"] == "plain"} == {1.0}
    assert small_truth.measure(-1.0, [16], [], 1e-4, "", [0]) == 0
    assert "are over before M = 16" in capsys.readouterr().out
