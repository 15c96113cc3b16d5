"""Every row of the list of errors in docs/api.md: raised before any work, and the message says which argument,
what it got and what it expects."""

# ruff: noqa: E501  (tables of one case a line)

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from targets import Target, randn

import flatlora_kernels as fk
from flatlora_kernels import backends
from flatlora_kernels.choice import resolve

M, N, K, R = 6, 5, 16, 3
NAN, INF = float("nan"), float("inf")
Row = tuple[dict[str, Any], type[Exception], str, str, str]


def linear_arguments() -> dict[str, Any]:
    return {
        "x": randn(M, K),
        "weight": randn(N, K),
        "lora_A": randn(R, K),
        "lora_B": randn(N, R),
        "bias": randn(N),
        "noise_scale": torch.ones(N),
        "seed": 1,
    }


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test during which a backend computes anything."""
    worked: list[str] = []
    for name in backends.names():
        for function in ("product", "row_sq_norms", "perturb"):
            monkeypatch.setattr(
                backends.get(name), function, lambda *_, what=f"{name}.{function}": worked.append(what)
            )
    yield
    assert not worked, "an argument was found wrong after work had begun"


def refused(function: Any, arguments: dict[str, Any], row: Row) -> None:
    changes, error, name, got, expected = row
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error) as caught:
            function(**{**arguments, **changes})
    message = str(caught.value)
    assert message.startswith(f"{name}: expected "), message
    wanted, found = message.removeprefix(f"{name}: expected ").rsplit(", got ", 1)
    assert got in found, message
    assert expected in wanted, message


def grown(*shape: int, **place: Any) -> torch.Tensor:
    """A tensor of any size that occupies one element."""
    return torch.zeros((1,) * len(shape), **place).expand(*shape)


META = {"device": "meta"}
LINEAR: dict[str, Row] = {
    # what is not a tensor
    "x list": ({"x": [1.0]}, TypeError, "x", "list", "a tensor"),
    "x None": ({"x": None}, TypeError, "x", "NoneType", "a tensor"),
    "weight array": ({"weight": randn(N, K).numpy()}, TypeError, "weight", "ndarray", "a tensor"),
    "lora_A float": ({"lora_A": 1.0}, TypeError, "lora_A", "float", "a tensor"),
    "lora_B float": ({"lora_B": 1.0}, TypeError, "lora_B", "float", "a tensor"),
    "bias bool": ({"bias": True}, TypeError, "bias", "bool", "a tensor"),
    "lora_x float": ({"lora_x": 1.0}, TypeError, "lora_x", "float", "a tensor"),
    "noise_scale float": ({"noise_scale": 0.1}, TypeError, "noise_scale", "float", "a tensor"),
    # shape and rank
    "x columns": ({"x": randn(M, K + 1)}, ValueError, "x", "(6, 17)", "in_features = 16"),
    "x scalar": ({"x": torch.tensor(1.0)}, ValueError, "x", "shape ()", "in_features = 16"),
    "weight vector": ({"weight": randn(K)}, ValueError, "weight", "(16,)", "(out_features, in_features)"),
    "weight cube": ({"weight": randn(1, N, K)}, ValueError, "weight", "(1, 5, 16)", "(out_features, in_features)"),
    "lora_A vector": ({"lora_A": randn(K)}, ValueError, "lora_A", "(16,)", "2 dimensions"),
    "lora_A columns": ({"lora_A": randn(R, K - 1)}, ValueError, "lora_A", "(3, 15)", "(r, in_features) = (3, 16)"),
    "lora_B cube": ({"lora_B": randn(1, N, R)}, ValueError, "lora_B", "(1, 5, 3)", "2 dimensions"),
    "lora_B rows": ({"lora_B": randn(N + 1, R)}, ValueError, "lora_B", "(6, 3)", "(out_features, r) = (5, 3)"),
    "ranks differ": ({"lora_B": randn(N, R + 1)}, ValueError, "lora_B", "(5, 4)", "(out_features, r) = (5, 3)"),
    "lora_B transposed": ({"lora_B": randn(R, N)}, ValueError, "lora_B", "(3, 5)", "(out_features, r) = (5, 3)"),
    "bias length": ({"bias": randn(N + 1)}, ValueError, "bias", "(6,)", "(out_features,) = (5,)"),
    "bias matrix": ({"bias": randn(1, N)}, ValueError, "bias", "(1, 5)", "(out_features,) = (5,)"),
    "lora_x rows": ({"lora_x": randn(M + 1, K)}, ValueError, "lora_x", "(7, 16)", "of x = (6, 16)"),
    "lora_x rank": ({"lora_x": randn(2, 3, K)}, ValueError, "lora_x", "(2, 3, 16)", "of x = (6, 16)"),
    "noise_scale length": ({"noise_scale": torch.ones(K)}, ValueError, "noise_scale", "(16,)", "= (5,)"),
    "noise_scale column": ({"noise_scale": torch.ones(N, 1)}, ValueError, "noise_scale", "(5, 1)", "= (5,)"),
    "noise_scale scalar": ({"noise_scale": torch.ones(())}, ValueError, "noise_scale", "()", "= (5,)"),
    "seed vector": ({"seed": torch.zeros(1, dtype=torch.int64)}, ValueError, "seed", "(1,)", "0-d"),
    "sigma vector": ({"sigma": torch.zeros(1)}, ValueError, "sigma", "(1,)", "0-d"),
    # dtype
    "x integer": ({"x": torch.ones(M, K, dtype=torch.int64)}, TypeError, "x", "torch.int64", "float16, bfloat16"),
    "x bool": ({"x": torch.ones(M, K, dtype=torch.bool)}, TypeError, "x", "torch.bool", "float16, bfloat16"),
    "x complex": ({"x": torch.ones(M, K, dtype=torch.cfloat)}, TypeError, "x", "torch.complex64", "float64"),
    "x float8": ({"x": randn(M, K).to(torch.float8_e5m2)}, TypeError, "x", "torch.float8_e5m2", "float64"),
    "weight type": ({"weight": randn(N, K).half()}, TypeError, "weight", "torch.float16", "torch.float32, the type of x"),
    "weight integer": ({"weight": randn(N, K).long()}, TypeError, "weight", "torch.int64", "float16, bfloat16"),
    "lora_A type": ({"lora_A": randn(R, K).double()}, TypeError, "lora_A", "torch.float64", "torch.float32"),
    "lora_B type": ({"lora_B": randn(N, R).half()}, TypeError, "lora_B", "torch.float16", "torch.float32"),
    "bias type": ({"bias": randn(N).bfloat16()}, TypeError, "bias", "torch.bfloat16", "torch.float32"),
    "lora_x type": ({"lora_x": randn(M, K).half()}, TypeError, "lora_x", "torch.float16", "torch.float32"),
    "noise_scale type": (
        {"noise_scale": torch.ones(N, dtype=torch.float64)}, TypeError, "noise_scale", "torch.float64", "torch.float32",
    ),
    "seed int32": ({"seed": torch.zeros((), dtype=torch.int32)}, TypeError, "seed", "torch.int32", "torch.int64"),
    "seed float tensor": ({"seed": torch.zeros(())}, TypeError, "seed", "torch.float32", "torch.int64"),
    "seed float": ({"seed": 1.0}, TypeError, "seed", "float", "an int or a 0-d int64 tensor"),
    "seed bool": ({"seed": True}, TypeError, "seed", "bool", "an int or a 0-d int64 tensor"),
    "seed text": ({"seed": "1"}, TypeError, "seed", "str", "an int or a 0-d int64 tensor"),
    "sigma text": ({"sigma": "1"}, TypeError, "sigma", "str", "a float or a 0-d tensor"),
    "sigma complex": ({"sigma": torch.zeros((), dtype=torch.cfloat)}, ValueError, "sigma", "complex64", "a real 0-d"),
    "scaling tensor": ({"scaling": torch.ones(())}, TypeError, "scaling", "Tensor", "a float"),
    "scaling text": ({"scaling": "1"}, TypeError, "scaling", "str", "a float"),
    # half an adapter
    "only lora_A": ({"lora_B": None}, ValueError, "lora_B", "None", "because lora_A is given"),
    "only lora_B": ({"lora_A": None}, ValueError, "lora_A", "None", "because lora_B is given"),
    "lora_x alone": (
        {"lora_A": None, "lora_B": None, "lora_x": randn(M, K)}, ValueError, "lora_x", "a tensor", "lora_B are not given",
    ),
    # devices
    "weight elsewhere": ({"weight": torch.empty(N, K, **META)}, ValueError, "weight", "meta", "the device of x, cpu"),
    "lora_A elsewhere": ({"lora_A": torch.empty(R, K, **META)}, ValueError, "lora_A", "meta", "of weight, cpu"),
    "lora_B elsewhere": ({"lora_B": torch.empty(N, R, **META)}, ValueError, "lora_B", "meta", "of weight, cpu"),
    "bias elsewhere": ({"bias": torch.empty(N, **META)}, ValueError, "bias", "meta", "the device of x, cpu"),
    "lora_x elsewhere": ({"lora_x": torch.empty(M, K, **META)}, ValueError, "lora_x", "meta", "the device of x, cpu"),
    "noise_scale elsewhere": (
        {"noise_scale": torch.empty(N, **META)}, ValueError, "noise_scale", "meta", "of weight, cpu",
    ),
    "seed elsewhere": (
        {"seed": torch.empty((), dtype=torch.int64, **META)}, ValueError, "seed", "meta", "the device of the weight",
    ),
    "sigma elsewhere": ({"sigma": torch.empty((), **META)}, ValueError, "sigma", "meta", "the device of weight, cpu"),
    # noise
    "seed missing": ({"seed": None}, ValueError, "seed", "None", "wherever noise is drawn"),
    "seed missing beside sigma": (
        {"seed": None, "noise_scale": None, "sigma": 0.1}, ValueError, "seed", "None", "wherever noise is drawn",
    ),
    "seed missing beside sigma tensor": (
        {"seed": None, "noise_scale": None, "sigma": torch.tensor(0.0)}, ValueError, "seed", "None", "noise is drawn",
    ),
    "sigma negative": ({"sigma": -0.1}, ValueError, "sigma", "-0.1", "a finite float >= 0"),
    "sigma negative int": ({"sigma": -1}, ValueError, "sigma", "-1", "a finite float >= 0"),
    "sigma NaN": ({"sigma": NAN}, ValueError, "sigma", "nan", "a finite float >= 0"),
    "sigma infinite": ({"sigma": INF}, ValueError, "sigma", "inf", "a finite float >= 0"),
    "noise_scale requires grad": (
        {"noise_scale": torch.ones(N, requires_grad=True)}, ValueError, "noise_scale", "requires grad", ".detach()",
    ),
    "unknown noise": ({"noise": "uniform"}, ValueError, "noise", "'uniform'", "'rademacher' or 'hadamard'"),
    "noise None": ({"noise": None}, ValueError, "noise", "None", "'rademacher' or 'hadamard'"),
    # choices
    "unknown backend": ({"backend": "tpu"}, ValueError, "backend", "'tpu'", "reference"),
    "unknown strategy": ({"strategy": "fast"}, ValueError, "strategy", "'fast'", "'panel' or 'transform'"),
    "transform of signs": (
        {"strategy": "transform", "noise": "rademacher"}, ValueError, "strategy", "'transform'",
        "None, 'fused' or 'panel' with noise='rademacher'",
    ),
    "unknown noise_accum": ({"noise_accum": "both"}, ValueError, "noise_accum", "'both'", "'folded' or 'split'"),
    # samples
    "samples 0": ({"samples": 0}, ValueError, "samples", "0", "divides the 6 rows of x"),
    "samples negative": ({"samples": -2}, ValueError, "samples", "-2", "0 <= value < 2**32"),
    "samples 4 of 6": ({"samples": 4}, ValueError, "samples", "4", "divides the 6 rows of x"),
    "samples 7 of 6": ({"samples": 7}, ValueError, "samples", "7", "divides the 6 rows of x"),
    "samples float": ({"samples": 2.0}, TypeError, "samples", "float", "an int"),
    "samples without noise": (
        {"samples": 4, "noise_scale": None, "seed": None}, ValueError, "samples", "4", "divides the 6 rows of x",
    ),
    "sample_offset negative": ({"sample_offset": -1}, ValueError, "sample_offset", "-1", "0 <= value < 2**32"),
    "sample_offset large": ({"sample_offset": 2**32}, ValueError, "sample_offset", str(2**32), "0 <= value < 2**32"),
    "sample_offset float": ({"sample_offset": 0.0}, TypeError, "sample_offset", "float", "an int"),
    "samples beyond uint32": (
        {"sample_offset": 2**32 - 1, "samples": 2}, ValueError, "sample_offset", "4294967295 with samples=2", "2**32",
    ),
    # uint32
    "stream negative": ({"stream": -1}, ValueError, "stream", "-1", "0 <= value < 2**32"),
    "stream large": ({"stream": 2**32}, ValueError, "stream", str(2**32), "0 <= value < 2**32"),
    "stream float": ({"stream": 1.0}, TypeError, "stream", "float", "an int"),
    "stream bool": ({"stream": True}, TypeError, "stream", "bool", "an int"),
    "row_offset negative": ({"row_offset": -1}, ValueError, "row_offset", "-1", "0 <= value < 2**32"),
    "row_offset large": ({"row_offset": 2**32}, ValueError, "row_offset", str(2**32), "0 <= value < 2**32"),
    "row_offset text": ({"row_offset": "0"}, TypeError, "row_offset", "str", "an int"),
    "rows beyond uint32": (
        {"row_offset": 2**32 - 4}, ValueError, "row_offset", "4294967292 with 5", "row_offset + size <= 2**32",
    ),
    "col_offset negative": ({"col_offset": -8}, ValueError, "col_offset", "-8", "0 <= value < 2**32"),
    "col_offset large": ({"col_offset": 2**32}, ValueError, "col_offset", str(2**32), "0 <= value < 2**32"),
    "col_offset float": ({"col_offset": 8.0}, TypeError, "col_offset", "float", "an int"),
    "col_offset odd": ({"col_offset": 12}, ValueError, "col_offset", "12", "a multiple of 8"),
    "columns beyond uint32": (
        {"col_offset": 2**32 - 8}, ValueError, "col_offset", "4294967288 with 16", "col_offset + size <= 2**32",
    ),
    "layer_shape int": ({"layer_shape": 16}, TypeError, "layer_shape", "16", "None or (out_features, in_features)"),
    "layer_shape of three": (
        {"layer_shape": (5, 16, 1)}, TypeError, "layer_shape", "(5, 16, 1)", "None or (out_features, in_features)",
    ),
    "layer_shape float": ({"layer_shape": (5.0, 16)}, TypeError, "layer_shape", "(5.0, 16)", "None or two ints"),
    "layer_shape too small": ({"layer_shape": (5, 15)}, ValueError, "layer_shape", "(5, 15)", "at least (5, 16)"),
    "layer_shape before the shard's end": (
        {"layer_shape": (5, 16), "row_offset": 1}, ValueError, "layer_shape", "(5, 16)", "at least (6, 16)",
    ),
    "layer_shape large": (
        {"layer_shape": (5, 2**32 + 1)}, ValueError, "layer_shape", "(5, 4294967297)", "at most 2**32",
    ),
    "sizes beyond uint32": (
        {
            "x": grown(M, 2**32 + 8), "weight": grown(N, 2**32 + 8), "lora_A": grown(R, 2**32 + 8),
        },
        ValueError, "col_offset", "0 with 4294967304", "col_offset + size <= 2**32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LINEAR)
def test_linear(case: str) -> None:
    refused(fk.fused_flat_lora_linear, linear_arguments(), LINEAR[case])


def test_the_arguments_themselves_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row above differs from this call in what it is about and in nothing else."""
    monkeypatch.setattr(backends.get("reference"), "product", lambda p, *_: p.a @ p.weight.t())
    assert fk.fused_flat_lora_linear(**linear_arguments(), backend="reference").shape == (M, N)


def test_messages_of_autocast_speak_of_what_was_given() -> None:
    row = LINEAR["x integer"]
    with torch.autocast("cpu", torch.bfloat16):
        refused(fk.fused_flat_lora_linear, linear_arguments(), row)


SHARED = {"noise_scale", "seed", "stream", "noise", "row_offset", "col_offset", "layer_shape"}


def shared(case: str) -> bool:
    """Whether a row is about arguments that the other functions have as well."""
    return set(LINEAR[case][0]) <= SHARED


@pytest.mark.parametrize("case", list(filter(shared, LINEAR)))
def test_perturb_weight(case: str) -> None:
    arguments = {"weight": randn(N, K), "noise_scale": torch.ones(N), "seed": 1}
    refused(fk.perturb_weight, arguments, LINEAR[case])


@pytest.mark.parametrize(
    "case", [c for c in LINEAR if shared(c) and c not in ("noise_scale length", "noise_scale elsewhere")]
)
def test_materialize_noise(case: str) -> None:
    changes, error, name, got, expected = LINEAR[case]
    # Nothing says here how many rows there should be.
    row = (changes, error, name, got, "(out_features,)" if expected == "= (5,)" else expected)
    refused(fk.materialize_noise, {"noise_scale": torch.ones(N), "num_cols": K, "seed": 1}, row)


PRODUCT = [
    c for c in LINEAR if set(LINEAR[c][0]) <= SHARED | {"samples", "sample_offset", "backend", "strategy"}
]


@pytest.mark.parametrize(
    "case", [c for c in PRODUCT if c not in ("noise_scale length", "noise_scale elsewhere")]
)
def test_noise_product(case: str) -> None:
    changes, error, name, got, expected = LINEAR[case]
    row = (changes, error, name, got, "(out_features,)" if expected == "= (5,)" else expected)
    if changes.get("noise_scale", 0) is None:
        row = (changes, TypeError, "noise_scale", "NoneType", "a tensor")
    refused(fk.noise_product, {"x": randn(M, K), "noise_scale": torch.ones(N), "seed": 1}, row)


def test_noise_product_alone() -> None:
    arguments = {"x": randn(M, K), "noise_scale": torch.ones(N), "seed": 1}
    for x, got, expected in (
        ([1.0], "list", "a tensor"),
        (torch.tensor(1.0), "shape ()", "(..., in_features)"),
    ):
        error = TypeError if isinstance(x, list) else ValueError
        refused(fk.noise_product, arguments, ({"x": x}, error, "x", got, expected))
    elsewhere = {"noise_scale": torch.ones(N, **META)}
    refused(
        fk.noise_product,
        arguments,
        (elsewhere, ValueError, "noise_scale", "meta", "the device of x, cpu"),
    )


MATERIALIZE: dict[str, Row] = {
    "num_cols negative": ({"num_cols": -1}, ValueError, "num_cols", "-1", "0 <= value < 2**32"),
    "num_cols large": ({"num_cols": 2**32}, ValueError, "num_cols", str(2**32), "0 <= value < 2**32"),
    "num_cols float": ({"num_cols": 8.0}, TypeError, "num_cols", "float", "an int"),
    "dtype": (
        {"dtype": torch.int8},
        TypeError,
        "dtype",
        "torch.int8",
        "float16, bfloat16, float32 or float64",
    ),
    "sample": ({"sample": 2**32}, ValueError, "sample", str(2**32), "0 <= value < 2**32"),
    "sample float": ({"sample": 0.0}, TypeError, "sample", "float", "an int"),
    "backend": ({"backend": "tpu"}, ValueError, "backend", "'tpu'", "reference"),
}


@pytest.mark.parametrize("case", MATERIALIZE)
def test_materialize_noise_alone(case: str) -> None:
    refused(fk.materialize_noise, {"noise_scale": torch.ones(N), "num_cols": K, "seed": 1}, MATERIALIZE[case])


PERTURB: dict[str, Row] = {
    "weight list": ({"weight": []}, TypeError, "weight", "list", "a tensor"),
    "weight vector": ({"weight": randn(K)}, ValueError, "weight", "(16,)", "(out_features, in_features)"),
    "weight integer": (
        {"weight": randn(N, K).int()},
        TypeError,
        "weight",
        "torch.int32",
        "float16, bfloat16",
    ),
    "sample": ({"sample": -1}, ValueError, "sample", "-1", "0 <= value < 2**32"),
    "out list": ({"out": []}, TypeError, "out", "list", "a tensor"),
    "out shape": ({"out": randn(K, N)}, ValueError, "out", "(16, 5)", "of weight = (5, 16)"),
    "out type": (
        {"out": randn(N, K).half()},
        TypeError,
        "out",
        "torch.float16",
        "torch.float32, the type of weight",
    ),
    "out elsewhere": (
        {"out": torch.empty(N, K, **META)},
        ValueError,
        "out",
        "meta",
        "the device of weight, cpu",
    ),
}


@pytest.mark.parametrize("case", PERTURB)
def test_perturb_weight_alone(case: str) -> None:
    arguments = {"weight": randn(N, K), "noise_scale": torch.ones(N), "seed": 1}
    refused(fk.perturb_weight, arguments, PERTURB[case])


def test_perturb_weight_in_place_is_refused() -> None:
    """`weight` is never written to, and eps cannot be subtracted again without rounding."""
    memory = randn(2 * N, K)
    arguments = {"weight": memory[:N], "noise_scale": torch.ones(N), "seed": 1}
    for out in (memory[:N], memory[N // 2 : N // 2 + N]):
        refused(
            fk.perturb_weight,
            {**arguments, "out": out},
            ({}, ValueError, "out", "shares memory", "of its own"),
        )


ADAPTER = ("weight list", "weight vector", "weight integer")
NORMS: dict[str, Row] = {
    **{case: PERTURB[case] for case in ADAPTER},
    **{c: r for c, r in LINEAR.items() if set(r[0]) <= {"lora_A", "lora_B", "scaling"}},
    "backend": ({"backend": "tpu"}, ValueError, "backend", "'tpu'", "reference"),
}
SCALE: dict[str, Row] = {
    **NORMS,
    **{c: r for c, r in LINEAR.items() if set(r[0]) == {"sigma"}},
    "in_features 0": ({"in_features": 0}, ValueError, "in_features", "0", "an int >= 1"),
    "in_features float": ({"in_features": 16.0}, TypeError, "in_features", "float", "an int"),
    "in_features bool": ({"in_features": True}, TypeError, "in_features", "bool", "an int"),
}


@pytest.mark.parametrize("case", NORMS)
def test_row_sq_norms(case: str) -> None:
    arguments = {"weight": randn(N, K), "lora_A": randn(R, K), "lora_B": randn(N, R)}
    refused(fk.row_sq_norms, arguments, NORMS[case])


@pytest.mark.parametrize("case", SCALE)
def test_flat_noise_scale(case: str) -> None:
    arguments = {"weight": randn(N, K), "lora_A": randn(R, K), "lora_B": randn(N, R), "sigma": 0.1}
    refused(fk.flat_noise_scale, arguments, SCALE[case])


# Backends


@pytest.fixture
def switched_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A backend that cannot run here, whatever this machine has."""
    name = next(name for name in backends.names() if name != "reference")
    monkeypatch.setattr(backends.get(name), "unavailable", lambda: "part P is missing; type this to get it")
    caches = (backends.unavailable, resolve._select)
    for cache in caches:
        cache.cache_clear()
    yield name
    for cache in caches:
        cache.cache_clear()


def test_missing_backend_asked_for_by_keyword(switched_off: str) -> None:
    with pytest.raises(
        RuntimeError, match=f"^backend='{switched_off}' cannot run here: part P .* to get it$"
    ):
        fk.fused_flat_lora_linear(**linear_arguments(), backend=switched_off)


def test_missing_backend_asked_for_by_context(switched_off: str) -> None:
    with pytest.raises(RuntimeError, match=f"backend='{switched_off}' cannot run here: part P"):
        with fk.use_backend(switched_off):
            pass


def test_missing_backend_asked_for_by_environment(switched_off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATLORA_BACKEND", switched_off)
    with pytest.raises(RuntimeError, match=f"^FLATLORA_BACKEND='{switched_off}' cannot run here: part P"):
        fk.fused_flat_lora_linear(**linear_arguments())


def test_missing_backend_is_explained_by_backend_info(switched_off: str) -> None:
    assert fk.backend_info()[switched_off]["unavailable"] == "part P is missing; type this to get it"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [("FLATLORA_BACKEND", "tpu", "reference"), ("FLATLORA_STRATEGY", "fast", "fused")],
)
def test_unknown_names_in_the_environment(
    variable: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    refused(fk.fused_flat_lora_linear, linear_arguments(), ({}, ValueError, variable, repr(value), expected))


def test_unknown_names_of_contexts() -> None:
    for context, name in ((fk.use_backend, "backend"), (fk.use_strategy, "strategy")):
        with pytest.raises(ValueError, match=f"{name}: expected one of .*, got 'nonsense'"):
            with context("nonsense"):
                pass


def test_types_a_backend_does_not_take(target: Target) -> None:
    refused_types = [
        d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64) if d not in target.dtypes
    ]
    if target.backend in ("triton", "cuda"):
        assert refused_types == [torch.float64]
    for dtype in refused_types:
        x, W = randn(M, K, dtype=dtype, device=target.device), randn(N, K, dtype=dtype, device=target.device)
        with pytest.raises(TypeError, match=f"backend='{target.backend}' takes .*, got {dtype}"):
            target.linear(x, W)


def test_devices_a_backend_does_not_take() -> None:
    x, W = torch.empty(M, K, **META), torch.empty(N, K, **META)
    for name in backends.names():
        if backends.unavailable(name) is None and backends.get(name).DEVICE_TYPES is not None:
            with pytest.raises(TypeError, match=f"backend='{name}' takes tensors on .*, got meta"):
                fk.fused_flat_lora_linear(x, W, backend=name)


def test_features_a_backend_lacks(target: Target) -> None:
    arguments = {
        k: v.to(target.device) if isinstance(v, torch.Tensor) else v for k, v in linear_arguments().items()
    }
    for value in {"folded", "split"} - set(target.module.NOISE_ACCUMS):
        with pytest.raises(
            NotImplementedError, match=f"'{target.backend}' does not implement noise_accum='{value}'"
        ):
            target.linear(**arguments, noise_accum=value)


def test_panel_and_split(target: Target) -> None:
    arguments = {
        k: v.to(target.device) if isinstance(v, torch.Tensor) else v for k, v in linear_arguments().items()
    }
    with pytest.raises(
        NotImplementedError, match="noise_accum: expected .* with strategy='panel'.*got 'split'"
    ):
        target.linear(**arguments, strategy="panel", noise_accum="split")
