"""The matrix: a test that asks for `target` runs on every backend and device, one that asks for `dtype` as
well on every type that backend takes. A backend that cannot run here is skipped with the reason it gives,
or fails where FLATLORA_REQUIRE_BACKENDS (comma-separated names) lists it.
"""

from __future__ import annotations

import pytest
import targets
import torch
from targets import Target


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "nvcc: needs the CUDA compiler")


def _parameter(target: Target, *more: object, tag: str = "") -> object:
    marks = [pytest.mark.gpu] if target.device == "cuda" else []
    return pytest.param(
        *((target, *more) if more else (target,)), id=f"{target.backend}-{target.device}{tag}", marks=marks
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = metafunc.fixturenames
    if "target" not in wanted:
        return
    every = targets.all_targets()
    if "dtype" in wanted:
        cases = [_parameter(t, d, tag=f"-{str(d).removeprefix('torch.')}") for t in every for d in t.dtypes]
        metafunc.parametrize("target, dtype", cases, indirect=["target"])
    else:
        metafunc.parametrize("target", [_parameter(t) for t in every], indirect=True)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Target:
    chosen = request.param
    if reason := chosen.missing():
        if chosen.backend in targets.REQUIRED:
            pytest.fail(f"backend {chosen.backend!r} is required and cannot run: {reason}")
        pytest.skip(f"backend {chosen.backend!r}: {reason}")
    return chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):  # type: ignore[no-untyped-def]
    """A feature that a backend does not have yet is a skip, but not on a required backend."""
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
