"""The automatic choice of backend and strategy, and what `explain` says of it."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from targets import randn

import flatlora_kernels as fk
from flatlora_kernels import backends
from flatlora_kernels.backends.shared import panel, products
from flatlora_kernels.choice import cost, dispatch, resolve
from flatlora_kernels.core.noise import KINDS
from flatlora_kernels.core.records import Choice

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OURS = ("cuda", "triton")
TWO = ("fused", "panel")  # of gaussian noise
COLUMNS = "device,dtype,noise,direction,M,N,K,rank,backend,strategy,ratio,p20,p80,date,commit".split(",")


def problem(M: int = 1024, N: int = 2048, K: int = 2048, **more: Any) -> dispatch.Problem:
    fields = {"device": CPU, "dtype": torch.float32, "noise": "gaussian", "noise_accum": "folded"}
    return dispatch.Problem(**{**fields, **more}, M=M, N=N, K=K)  # type: ignore[arg-type]


def row(M: int, strategy: str, ratio: float, direction: str, **more: Any) -> dict[str, Any]:
    return {
        "device": "cpu test", "dtype": "float32", "noise": "gaussian", "direction": direction, "M": M, "N": 2048,
        "K": 2048, "rank": 16, "backend": "cpu", "strategy": strategy, "ratio": ratio, "p20": ratio, "p80": ratio,
        "date": "2026-01-01", "commit": "0", **more,
    }  # fmt: skip


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes a table of measurements for this device."""
    monkeypatch.setattr(dispatch, "_TABLES", tmp_path)
    monkeypatch.setattr(dispatch, "device_key", lambda device: "cpu test")

    def write(*rows: dict[str, Any]) -> None:
        with (tmp_path / "test.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        dispatch.forget()

    write()
    yield write
    dispatch.forget()


def both(M: int, fused: float, panels: float, **more: Any) -> list[dict[str, Any]]:
    return [
        row(M, strategy, ratio, direction, **more)
        for strategy, ratio in (("fused", fused), ("panel", panels))
        for direction in dispatch.DIRECTIONS
    ]


def strategy_of(p: dispatch.Problem) -> str:
    return dispatch.choose(("cpu",), resolve.STRATEGIES, p).strategy


def test_measurements_decide(table: Any) -> None:
    assert strategy_of(problem(256)) == "fused"
    table(*both(256, 1.0, 1.5), *both(8192, 1.2, 1.0))
    assert [strategy_of(problem(M)) for M in (16, 256, 1024, 2048, 8192, 65536)] == [
        "fused", "fused", "fused", "panel", "panel", "panel",
    ]  # fmt: skip
    assert dispatch.choose(("cpu",), resolve.STRATEGIES, problem(256)).reason == "measured"


def test_a_choice_needs_both_directions_of_all_candidates(table: Any) -> None:
    rows = both(256, 1.2, 1.0)
    table(*rows[:3])
    assert strategy_of(problem(256)) == "fused"
    table(*rows)
    assert strategy_of(problem(256)) == "panel"


def test_a_small_gain_changes_nothing(table: Any) -> None:
    table(*both(256, 1.0, 0.98))
    assert strategy_of(problem(256)) == "fused"
    table(*both(256, 1.0, 0.96))
    assert strategy_of(problem(256)) == "panel"


@pytest.mark.parametrize(
    "other", [{"dtype": torch.bfloat16}, {"noise": "rademacher"}], ids=["another type", "another noise"]
)
def test_measurements_of_something_else_do_not_count(table: Any, other: dict[str, Any]) -> None:
    table(*both(256, 1.2, 1.0))
    assert strategy_of(problem(256, **other)) == "fused"


def test_split_noise_is_fused(table: Any) -> None:
    table(*both(256, 1.2, 1.0))
    assert strategy_of(problem(256, noise_accum="split")) == "fused"


def test_split_noise_does_not_go_by_measurements_of_folded(table: Any) -> None:
    table(*both(256, 1.2, 1.5, backend="cuda"), *both(256, 1.0, 1.5, backend="triton"))
    assert dispatch.choose(OURS, resolve.STRATEGIES, problem(256))[:3] == ("triton", "fused", "measured")
    split = dispatch.choose(OURS, resolve.STRATEGIES, problem(256, noise_accum="split"))
    assert split[:3] == ("cuda", "fused", "not measured on this device; cuda fused goes first")


def test_measurements_choose_between_backends(table: Any) -> None:
    """Without them, and where no model does either, PRIORITY."""
    ways = ("triton", "cuda"), resolve.STRATEGIES
    unmeasured = dispatch.choose(*ways, problem(256))
    assert unmeasured[:3] == ("triton", "fused", "not measured on this device; triton fused goes first")
    rows = [
        row(256, strategy, ratio, direction, backend=backend)
        for (backend, strategy), ratio in zip(
            itertools.product(ways[0], TWO), (1.3, 1.2, 1.1, 1.4), strict=True
        )
        for direction in dispatch.DIRECTIONS
    ]
    table(*rows)
    decision = dispatch.choose(*ways, problem(256))
    assert (decision.backend, decision.strategy, decision.reason) == ("cuda", "fused", "measured")
    assert dispatch.choose(("triton",), resolve.STRATEGIES, problem(256)).strategy == "panel"


@pytest.mark.parametrize("chip", cost.CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("M", [16, 256, 2048, 8192])
def test_the_model_decides_on_a_gpu_without_measurements(
    table: Any, monkeypatch: pytest.MonkeyPatch, chip: cost.Chip, M: int
) -> None:
    if chip.architecture == "cpu":
        pytest.skip("on a processor measurements alone decide")
    monkeypatch.setattr(cost, "chip_of", lambda device: chip)
    p = problem(M, 4096, 4096, device=GPU, dtype=torch.bfloat16)
    for names in (OURS, ("triton",)):
        decision = dispatch.choose(names, resolve.STRATEGIES, p)
        times = {c[:2]: c.predicted for c in decision.candidates}
        assert list(times) == list(itertools.product(names, TWO))
        assert all(0 < t < 1 for t in times.values())  # type: ignore[operator]
        best = min(times.values())  # type: ignore[type-var]
        assert decision[:2] == next(way for way, t in times.items() if best >= 0.97 * t)  # type: ignore[operator]
        assert decision.reason == "predicted"


@pytest.fixture
def model(table: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a GPU whose model says what it is told: times of (cuda fused, cuda panel, triton fused, triton panel)."""
    monkeypatch.setattr(cost, "chip_of", lambda device: cost.CHIPS[0])

    def says(*times: float) -> dispatch.Decision:
        told = dict(zip(itertools.product(OURS, TWO), times, strict=True))
        monkeypatch.setattr(
            cost, "cost", lambda c, b, strategy, call: cost.Cost(told[b, strategy], 0, "", {})
        )
        dispatch.forget()
        return dispatch.choose(OURS, resolve.STRATEGIES, problem(256, device=GPU))

    return says


@pytest.mark.parametrize(
    ("times", "way"),
    [
        ((1.0, 1.2, 1.1, 1.2), ("cuda", "fused")),
        ((1.0, 1.2, 0.96, 1.2), ("triton", "fused")),
        ((1.0, 1.2, 0.98, 1.2), ("cuda", "fused")),
        ((1.0, 0.98, 0.99, 0.975), ("cuda", "fused")),
        ((1.0, 0.5, 0.9, 0.499), ("cuda", "panel")),
        ((1.0, 0.5, 0.9, 0.4), ("triton", "panel")),
    ],
)
def test_the_model_decides_between_backends(
    model: Any, times: tuple[float, ...], way: tuple[str, str]
) -> None:
    """Where it sees no more than 3 % between two ways, the earlier one has it: the favourite, and `fused`."""
    assert model(*times)[:3] == (*way, "predicted")


def test_a_backend_without_a_model_does_not_compete(model: Any) -> None:
    model(1.0, 0.9, 0.8, 0.7)
    p = problem(256, device=GPU)
    assert dispatch.choose(("cuda", "reference"), resolve.STRATEGIES, p)[:3] == (
        "cuda",
        "panel",
        "predicted",
    )
    first = dispatch.choose(("reference", "cuda"), resolve.STRATEGIES, p)
    assert first[:3] == ("reference", "fused", "not measured on this device; reference fused goes first")


def test_one_backend_measured_is_no_measurement(table: Any, model: Any) -> None:
    table(*both(256, 1.0, 1.2, backend="cuda"))
    decision = model(1.0, 1.2, 0.9, 1.2)
    assert decision[:3] == ("triton", "fused", "predicted")
    assert all(c.measured is None for c in decision.candidates)
    table(*both(256, 1.0, 1.2, backend="cuda"), *both(256, 1.1, 1.2, backend="triton"))
    assert model(1.0, 1.2, 0.9, 1.2)[:3] == ("cuda", "fused", "measured")
    other_type = problem(256, device=GPU, dtype=torch.bfloat16)
    assert dispatch.choose(OURS, resolve.STRATEGIES, other_type)[:3] == ("triton", "fused", "predicted")


def test_panels_on_amd(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "chip_of", lambda device: None)
    weight = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    amd = "not measured on this device; panels from 256 rows on"

    def choice(backend: str, rows: int, strategy: str = resolve.STRATEGY, noise_accum: str = "folded") -> Any:
        found = dispatch.explain(Choice(strategy, noise_accum, backend), "gaussian", rows, GPU, weight)
        assert found.reason in str(found)
        return found.strategy, found.reason

    gfx = True
    monkeypatch.setattr(dispatch, "device_key", lambda device: "gfx942" if gfx else "sm86")
    assert [choice("triton", rows) for rows in (1, 64, 65, 255)] == 4 * [("fused", amd)]
    assert [choice("triton", rows) for rows in (256, 257, 8192)] == 3 * [("panel", amd)]
    assert choice("triton", 8192, noise_accum="split") == ("fused", "nothing to choose from")
    assert choice("triton", 8192, "fused") == ("fused", "asked for")
    assert choice("reference", 8192)[0] == "fused"
    table(*both(256, 1.0, 1.2, device="gfx942", backend="triton", dtype="bfloat16"))
    assert choice("triton", 256) == ("fused", "measured")
    table()
    gfx = False
    assert choice("triton", 8192) == ("fused", "not measured on this device; triton fused goes first")


def test_no_prediction_decides_on_a_processor(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_panels = lambda chip, backend, strategy, call: cost.Cost(1.0 + (strategy == "fused"), 0, "", {})  # noqa: E731
    monkeypatch.setattr(cost, "cost", cheap_panels)
    decision = dispatch.choose(("cpu",), resolve.STRATEGIES, problem(256))
    assert decision[:3] == ("cpu", "fused", "not measured on this device; cpu fused goes first")


def test_sizes_come_in_classes() -> None:
    classes = [dispatch.size_class(n) for n in range(1, 70000, 7)]
    assert classes == sorted(classes)
    assert len(set(classes)) < 15
    assert [dispatch.size_class(n) for n in (1, 2, 4, 5, 16)] == [1, 4, 4, 16, 16]
    assert all(dispatch.size_class(c) == c for c in classes)


# hadamard: three strategies, and the one without work of the weight's size first.


def ways(M: int, **ratios: float) -> list[dict[str, Any]]:
    return [
        row(M, strategy, ratio, direction, noise="hadamard")
        for strategy, ratio in ratios.items()
        for direction in dispatch.DIRECTIONS
    ]


def test_what_is_possible() -> None:
    def of(noise: str, *backend: str, accum: str = "folded") -> list[tuple[str, str]]:
        return dispatch.ways(backend, resolve.STRATEGIES, problem(noise=noise, noise_accum=accum))

    for noise in ("gaussian", "near_gaussian", "rademacher"):
        assert of(noise, "cpu", "cuda") == [(b, s) for b in ("cpu", "cuda") for s in TWO]
        assert of(noise, "cpu", accum="split") == [("cpu", "fused")]
    assert of("hadamard", "cpu") == [("cpu", "transform"), ("cpu", "fused"), ("cpu", "panel")]
    for N, K in ((64, 2048), (2048, 64)):  # small tiles
        few = dispatch.ways(["cpu"], resolve.STRATEGIES, problem(N=N, K=K, noise="hadamard"))
        assert few == [("cpu", "fused"), ("cpu", "panel"), ("cpu", "transform")]
    # No fused product of theirs takes it.
    assert of("hadamard", "cuda") == [("cuda", "transform"), ("cuda", "panel")]
    assert of("hadamard", "triton", accum="split") == [("triton", "transform")]


def test_hadamard_goes_by_transform_and_by_measurements(table: Any) -> None:
    p = problem(256, noise="hadamard")
    unmeasured = dispatch.choose(("cpu",), resolve.STRATEGIES, p)
    assert unmeasured[:3] == ("cpu", "transform", "not measured on this device; cpu transform goes first")
    table(*ways(256, fused=1.2, panel=1.1, transform=1.0))
    assert dispatch.choose(("cpu",), resolve.STRATEGIES, p)[:3] == ("cpu", "transform", "measured")
    table(*ways(256, fused=1.2, panel=0.9, transform=1.0))
    assert strategy_of(p) == "panel"
    table(*ways(256, fused=1.2, panel=0.98, transform=1.0))  # too little
    assert strategy_of(p) == "transform"
    table(*ways(256, fused=1.2, panel=0.9))  # not all of them
    assert strategy_of(p) == "transform"


@pytest.mark.parametrize(
    "chip", [c for c in cost.CHIPS if c.architecture != "cpu"], ids=lambda chip: chip.name
)
def test_the_model_knows_every_kind(table: Any, monkeypatch: pytest.MonkeyPatch, chip: cost.Chip) -> None:
    monkeypatch.setattr(cost, "chip_of", lambda device: chip)
    for noise, M in itertools.product(KINDS, (16, 2048)):
        p = problem(M, 4096, 4096, device=GPU, dtype=torch.bfloat16, noise=noise)
        decision = dispatch.choose(OURS, resolve.STRATEGIES, p)
        assert decision.reason == "predicted"
        assert all(c.predicted is not None for c in decision.candidates)
    few = problem(16, 4096, 4096, device=GPU, dtype=torch.bfloat16, noise="hadamard")
    assert dispatch.choose(OURS, resolve.STRATEGIES, few).strategy == "transform"


# Nothing is drawn: our own product, or the vendor's.


def plain_or_own(
    M: int = 256, dtype: torch.dtype = torch.float32, direction: str = "forward", **more: Any
) -> tuple[str, str]:
    choice = Choice(more.pop("strategy", resolve.STRATEGY), more.pop("noise_accum", "folded"), "cpu")
    return dispatch.way(choice, None, M, CPU, dtype, 2048, 2048, direction)[1:3]


def without_noise(
    M: int, own: tuple[float, float], vendor: tuple[float, float], **more: Any
) -> list[dict[str, Any]]:
    return [
        row(M, strategy, ratio, direction, noise="none", **more)
        for strategy, ratios in (("fused", own), ("plain", vendor))
        for direction, ratio in zip(dispatch.DIRECTIONS, ratios, strict=True)
    ]


def test_without_noise_measurements_decide_by_direction(table: Any) -> None:
    table(
        *without_noise(1, (2.9, 2.5), (1.0, 1.0)),
        *without_noise(64, (0.19, 1.3), (1.0, 1.0)),
        *without_noise(1024, (0.98, 0.96), (1.0, 1.0)),
    )
    assert plain_or_own(1) == ("plain", "measured")
    assert plain_or_own(64) == ("fused", "measured")
    assert plain_or_own(64, direction="input_grad") == ("plain", "measured")
    # Never slower than the vendor's by more than what is worth a choice.
    assert plain_or_own(1024) == ("plain", "measured")
    assert plain_or_own(1024, direction="input_grad") == ("fused", "measured")
    # There is no noise that could be split, and nothing to slice or to transform.
    for asked in ({"noise_accum": "split"}, {"strategy": "panel"}, {"strategy": "transform"}):
        assert plain_or_own(64, **asked) == ("fused", "measured")
        assert plain_or_own(1, **asked) == ("plain", "measured")
    assert plain_or_own(1, strategy="fused") == ("fused", "asked for")
    assert plain_or_own(1, torch.bfloat16)[1] == "not measured on this device; cpu plain goes first"


@pytest.mark.parametrize(
    ("level", "dtype", "rows", "own"),
    [
        ("cpu avx2", torch.float32, 1024, False),
        ("cpu avx2", torch.float64, 1024, False),
        ("cpu avx2", torch.bfloat16, 1, None),
        ("cpu avx2", torch.bfloat16, 2, True),
        ("cpu avx2", torch.bfloat16, 64, True),
        ("cpu avx512", torch.bfloat16, 1, False),
        ("cpu avx512", torch.bfloat16, 1024, True),
        ("cpu avx512bf16", torch.bfloat16, 1024, False),
        ("cpu baseline", torch.bfloat16, 1024, False),
        ("cpu avx512bf16", torch.float16, 1, True),
        ("cpu baseline", torch.float16, 1024, True),
    ],
)
def test_without_noise_and_measurements_a_rule_decides(
    table: Any, monkeypatch: pytest.MonkeyPatch, level: str, dtype: torch.dtype, rows: int, own: bool | None
) -> None:
    """own: None = in the input gradient alone."""
    monkeypatch.setattr(dispatch, "device_key", lambda device: level)
    for direction in dispatch.DIRECTIONS:
        strategy = "fused" if own or (own is None and direction == "input_grad") else "plain"
        found = plain_or_own(rows, dtype, direction)
        assert found == (strategy, f"not measured on this device; cpu {strategy} goes first")


def test_other_backends_have_the_vendors_product_alone(table: Any) -> None:
    for backend in ("triton", "cuda", "reference"):
        for strategy in resolve.FREE:
            choice = Choice(strategy, "folded", backend)
            assert dispatch.way(choice, None, 64, GPU, torch.bfloat16, 64, 64, "forward")[:2] == (
                backend,
                "fused",
            )


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What computes on the cpu backend, "own" or "vendor", with "'" in the input gradient."""
    if backends.unavailable("cpu"):
        pytest.skip(str(backends.unavailable("cpu")))
    seen: list[str] = []
    for module, function, name in (
        (backends.get("cpu"), "product", "own"),
        (products, "plain", "vendor"),
    ):
        real = getattr(module, function)

        def logged(p: Any, *rest: Any, real: Any = real, name: str = name) -> Any:
            drawn = bool(rest) and rest[0] is not None
            seen.append(name + "'" * p.input_grad + " noisy" * drawn)
            return real(p, *rest)

        monkeypatch.setattr(module, function, logged)
    return seen


def test_the_op_follows_without_noise(table: Any, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = randn(64, 48).requires_grad_(), randn(40, 48)
    A, B, bias = randn(3, 48), randn(40, 3), randn(40)

    def runs(**more: Any) -> list[str]:
        ran.clear()
        y = fk.fused_flat_lora_linear(x, weight, A, B, bias, backend="cpu", **more)
        exact = x.double() @ (weight + B @ A).double().t() + bias.double()
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
        torch.autograd.grad(y.sum(), x)
        return list(ran)

    assert runs() == ["vendor", "vendor'"]
    table(*without_noise(64, (0.5, 1.5), (1.0, 1.0)))
    assert runs() == ["own", "vendor'"]
    table(*without_noise(64, (1.5, 0.5), (1.0, 1.0)))
    assert runs() == ["vendor", "own'"]
    assert runs(strategy="fused") == ["own", "own'"]
    assert runs(strategy="panel") == ["vendor", "own'"]
    with fk.use_strategy("fused"):
        assert runs() == ["own", "own'"]
    # Samples do not cut what has no noise.
    assert runs(samples=64) == ["vendor", "own'"]


def test_the_plain_product_of_a_transform_follows(table: Any, ran: list[str]) -> None:
    x, weight = randn(64, 48).requires_grad_(), randn(40, 48)

    def runs() -> list[str]:
        ran.clear()
        noise = {"noise": "hadamard", "sigma": 0.1, "seed": 1, "strategy": "transform"}
        y = fk.fused_flat_lora_linear(x, weight, backend="cpu", **noise)
        torch.autograd.grad(y.sum(), x)
        return list(ran)

    assert runs() == ["vendor", "vendor'"]
    table(*without_noise(64, (0.5, 1.5), (1.0, 1.0)))
    assert runs() == ["own", "vendor'"]


def test_explain_where_nothing_is_drawn(table: Any) -> None:
    if backends.unavailable("cpu"):
        pytest.skip(str(backends.unavailable("cpu")))
    table(*without_noise(256, (0.5, 1.5), (1.0, 1.0)))
    found = fk.explain(torch.empty(256, 2048), torch.empty(2048, 2048), samples=4, backend="cpu")
    assert found[:3] == ("cpu", "fused", "folded")
    assert found.reason == "nothing is drawn: forward fused, input gradient plain; measured"
    assert "cpu plain: measured 1.00 of a plain product, no model (forward)" in str(found)
    assert "no noise, sizes taken as M = 256" in str(found)
    nothing = fk.explain(torch.empty(0, 2048), torch.empty(2048, 2048), backend="cpu")
    assert nothing.candidates == () and "nothing is drawn" in str(nothing)


def test_the_op_follows(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, and a keyword, the context and the environment before it."""
    if backends.unavailable("cpu"):
        pytest.skip(str(backends.unavailable("cpu")))
    calls: list[str] = []
    product = panel.product
    monkeypatch.setattr(panel, "product", lambda *args: calls.append("panel") or product(*args))
    x, weight = randn(64, 48).requires_grad_(), randn(40, 48)

    def panels(**more: Any) -> int:
        calls.clear()
        y = fk.fused_flat_lora_linear(x, weight, sigma=0.1, seed=1, backend="cpu", **more)
        torch.autograd.grad(y.sum(), x)
        return len(calls)

    assert panels() == 0
    table(*both(64, 1.2, 1.0))
    assert panels() == 2
    assert panels(strategy="fused") == 0
    assert panels(noise_accum="split") == 0
    with fk.use_strategy("fused"):
        assert panels() == 0
        assert panels(strategy="panel") == 2
    monkeypatch.setenv("FLATLORA_STRATEGY", "fused")
    assert panels() == 0


def test_explain(table: Any) -> None:
    if backends.unavailable("cpu"):
        pytest.skip(str(backends.unavailable("cpu")))
    x, weight = torch.empty(2, 128, 2048), torch.empty(2048, 2048)
    table(*both(256, 1.25, 1.01))
    found = fk.explain(x, weight, sigma=0.1, backend="cpu")
    assert (found.backend, found.strategy, found.noise_accum) == ("cpu", "panel", "folded")
    assert found.reason == "measured"
    assert found.workspace == 2048 * 2048 * 4 // 4
    text = str(found)
    assert "cpu fused: measured 1.25 of a plain product" in text
    assert "cpu panel: measured 1.01 of a plain product" in text
    assert "M = 256, N = 2048, K = 2048" in text
    # Two samples: 128 rows see one noise.
    assert "M = 256" in str(fk.explain(x.repeat(2, 1, 1), weight, sigma=0.1, samples=2, backend="cpu"))
    asked = fk.explain(x, weight, sigma=0.1, backend="cpu", strategy="fused")
    assert (asked.strategy, asked.reason) == ("fused", "asked for")
    nothing = fk.explain(x, weight, backend="cpu")
    assert nothing.reason.startswith("nothing is drawn")
    assert nothing.workspace == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in str(fk.explain(x, weight, sigma=0.1, backend="cpu"))
    with pytest.raises(NotImplementedError, match="split"):
        fk.explain(x, weight, sigma=0.1, strategy="panel", noise_accum="split")
    with pytest.raises(ValueError, match="strategy: expected"):
        fk.explain(x, weight, sigma=0.1, strategy="fast")


def committed() -> list[Path]:
    return sorted(Path(dispatch.__file__).parent.glob("tables/*.csv"))


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.stem)
def test_committed_tables(path: Path) -> None:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    assert rows
    directions: dict[tuple[str, ...], set[str]] = {}
    for r in rows:
        assert r["device"]
        assert hasattr(torch, r["dtype"])
        assert r["backend"] in backends.names()
        if r["noise"] == "none":
            assert r["strategy"] in ("fused", "plain")
        else:
            assert r["noise"] in KINDS
            assert r["strategy"] in resolve.STRATEGIES
            assert (r["strategy"] == "transform") <= (r["noise"] == "hadamard")
        ratio, p20, p80 = (float(r[name]) for name in ("ratio", "p20", "p80"))
        assert 0 < p20 <= ratio <= p80 < math.inf
        key = tuple(r[name] for name in COLUMNS[:3] + COLUMNS[4:10])
        assert r["direction"] not in directions.setdefault(key, set()), f"twice: {key}"
        directions[key].add(r["direction"])
    assert all(found == set(dispatch.DIRECTIONS) for found in directions.values())


def test_the_model_does_as_well_as_docs_design_md_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "chip_of", lambda device: next(c for c in cost.CHIPS if "H200" in c.name))
    monkeypatch.setattr(dispatch, "device_key", lambda device: None)
    dispatch.forget()
    loss = {}
    for (dtype, noise, direction), cases in dispatch._table("sm90").items():
        for (M, N, K), ratios in cases.items() if direction == dispatch.BOTH else ():
            p = problem(M, N, K, device=GPU, dtype=getattr(torch, dtype), noise=noise)
            decision = dispatch.choose(OURS, resolve.STRATEGIES, p)
            assert decision.reason == "predicted"
            loss[noise, M, N] = ratios[decision[:2]] / min(ratios.values())
    dispatch.forget()
    assert len(loss) >= 18
    assert max(loss.values()) < 1.2, loss
    assert sum(slower > 1.01 for slower in loss.values()) <= 4


def test_one_row_on_one_thread_is_the_vendors(table: Any) -> None:
    table(
        *(row(1, strategy, ratio, direction, noise="none")
          for strategy, ratio in (("fused", 0.8), ("plain", 1.0)) for direction in dispatch.DIRECTIONS)
    )  # fmt: skip
    free, forward, back = Choice(resolve.STRATEGY, "folded", "cpu"), *dispatch.DIRECTIONS
    half = free, None, 1, CPU, torch.float16, 2048, 2048, forward, True
    assert dispatch.way(*half).strategy == "fused"  # torch's is a hundred times slower
    of = free, None, 1, CPU, torch.float32, 2048, 2048
    assert dispatch.way(*of, forward).strategy == "fused"
    assert dispatch.way(*of, forward, True).strategy == "plain"
    assert dispatch.way(*of, back, True).strategy == "fused"
    x, weight = randn(1, 2048), torch.empty(2048, 2048, device="meta")
    threads = torch.get_num_threads()
    try:
        for count, strategy in ((1, "plain"), (2, "fused")):
            torch.set_num_threads(count)
            assert fk.explain(x, weight, backend="cpu").strategy == strategy
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("level", ["avx2", "avx512", "avx512bf16", "avx512bf16 amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_without_noise_is_not_slower_than_the_vendors_product(
    monkeypatch: pytest.MonkeyPatch, level: str, dtype: torch.dtype
) -> None:
    """By more than 3 %, wherever it was measured; and there it was measured, from one row on."""
    monkeypatch.setattr(dispatch, "device_key", lambda device: f"cpu {level}")
    dispatch.forget()
    try:
        for direction in dispatch.DIRECTIONS:
            cases = dispatch._table(f"cpu {level}")[str(dtype).removeprefix("torch."), "none", direction]
            assert {M for M, N, K in cases if N == K == 2048} >= {1, 4, 16}
            for (M, N, K), ratios in cases.items():
                free = Choice(resolve.STRATEGY, "folded", "cpu")
                found = dispatch.way(free, None, M, CPU, dtype, N, K, direction)
                assert found.reason == "measured"
                assert ratios[found[:2]] <= ratios["cpu", "plain"] / 0.97, (direction, M, N, K, ratios)
    finally:
        dispatch.forget()


def test_packed_weights_of_many_rows_go_by_slices_on_sm90(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda` multiplies codes there as on sm_80; who asks for it by name has it."""
    weight = SimpleNamespace(device=CPU, format="nf4")
    monkeypatch.setattr(dispatch.registry, "fuses_packed", lambda backend, weight: True)
    for key, rows, backend, strategy, expected in (
        ("sm90", 64, "cuda", resolve.STRATEGY, "fused"),
        ("sm90", 65, "cuda", resolve.STRATEGY, "panel"),
        ("sm90", 65, "cuda", "fused", "fused"),
        ("sm90", 65, "triton", resolve.STRATEGY, "fused"),
        ("sm80", 65, "cuda", resolve.STRATEGY, "fused"),
    ):
        monkeypatch.setattr(dispatch, "device_key", lambda device, key=key: key)
        choice = Choice(strategy, "folded", backend)
        assert dispatch.of_packed(choice, backend, "fused", weight, rows) == expected, (key, rows)  # type: ignore[arg-type]


def test_amx_has_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's bfloat16 products have it, and ours do not: there panels win, and the vendor without noise."""
    free = Choice(resolve.STRATEGY, "folded", "cpu")
    found: dict[bool, dict[str, str]] = {}
    for amx in (False, True):
        monkeypatch.setattr(dispatch, "has_amx", lambda amx=amx: amx)
        monkeypatch.setattr(dispatch.cpu, "level", lambda: "avx512bf16")
        assert dispatch.device_key(CPU) == "cpu avx512bf16" + amx * " amx"
        dispatch.forget()
        found[amx] = {
            noise or "none": dispatch.way(
                free, noise, 1024, CPU, torch.bfloat16, 2048, 2048, *direction
            ).strategy
            for noise, direction in (("gaussian", ()), ("rademacher", ()), (None, ("forward",)))
        }
        packed = [dispatch.of_packed_without_noise("cpu", CPU, torch.bfloat16, rows) for rows in (4, 1024)]
        assert packed == ["fused", "plain" if amx else "fused"]
        assert dispatch.of_packed_without_noise("cpu", CPU, torch.float32, 1024) == "fused"
        monkeypatch.setattr(dispatch.cpu, "level", lambda: "avx512")
        assert dispatch.device_key(CPU) == "cpu avx512"
    dispatch.forget()
    assert found[True] == {"gaussian": "panel", "rademacher": "panel", "none": "plain"}
    assert found[False] == {"gaussian": "fused", "rademacher": "fused", "none": "fused"}


def test_a_table_is_committed_and_read() -> None:
    assert any("cpu" in path.stem for path in committed())
    keys = {r["device"] for path in committed() for r in csv.DictReader(path.open(newline=""))}
    for key in keys:
        assert dispatch._table(key)
