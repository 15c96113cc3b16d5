"""The registered ops themselves: schema, fake kernels, autograd, and which backend runs where and when."""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Iterator
from typing import Any

import compare
import pytest
import torch
from compare import assert_close, problem
from targets import Target, randn
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels import backends
from flatlora_kernels.choice import resolve

OPS = torch.ops.flatlora


def opcheck(op: Any, args: tuple[Any, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Torch hides this one itself, but only what was not made an error before.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
        result = torch.library.opcheck(op, args)
    assert set(result.values()) == {"SUCCESS"}
    assert len(result) == 4


def choice(target: Target) -> tuple[str, str, str]:
    return "fused", "folded", target.backend


def draw_arguments(p: compare.Problem, samples: int = 1) -> tuple[Any, ...]:
    if "noise_scale" not in p.options:
        return (None, None, 0, "gaussian", 1, 0, False, 0, 0, 0)
    seed = torch.tensor(5, device=p.x.device)
    return (p.options["noise_scale"], seed, 3, "gaussian", samples, 1, samples > 1, 2, 8, 0)


def linear_arguments(target: Target, p: compare.Problem, samples: int = 1) -> tuple[Any, ...]:
    return (*p.inputs.values(), 0.75, *draw_arguments(p, samples), *choice(target))


CASES: dict[str, dict[str, Any]] = {
    "plain": {"noisy": False},
    "noise": {},
    "adapter": {"rank": 4, "bias": True},
    "everything": {"rank": 4, "bias": True, "lora_x": True},
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_opcheck_linear(target: Target, dtype: torch.dtype, case: str, grad: bool) -> None:
    p = problem(6, 5, 16, dtype, target.device, **CASES[case])
    for tensor in p.inputs.values():
        if tensor is not None:
            tensor.requires_grad_(grad)
    opcheck(OPS.linear.default, linear_arguments(target, p))


def test_opcheck_linear_with_samples(target: Target) -> None:
    p = problem(6, 5, 16, device=target.device, **CASES["everything"])
    for tensor in p.inputs.values():
        tensor.requires_grad_()
    opcheck(OPS.linear.default, linear_arguments(target, p, samples=3))


@pytest.mark.parametrize("noisy", [False, True])
def test_opcheck_linear_input_grad(target: Target, dtype: torch.dtype, noisy: bool) -> None:
    p = problem(6, 5, 16, dtype, target.device, rank=4, noisy=noisy)
    v = randn(6, 4, dtype=dtype, device=target.device)
    for adapter in ((None, None), (p.lora_A, v)):
        opcheck(
            OPS.linear_input_grad.default, (p.grad_y, p.weight, *adapter, *draw_arguments(p), *choice(target))
        )


def test_opcheck_row_sq_norms(target: Target, dtype: torch.dtype) -> None:
    p = problem(6, 5, 16, dtype, target.device, rank=4)
    opcheck(OPS.row_sq_norms.default, (p.weight, p.lora_A, p.lora_B, 0.5, target.backend))
    opcheck(OPS.row_sq_norms.default, (p.weight, None, None, 0.5, target.backend))


def test_opcheck_perturb(target: Target, dtype: torch.dtype) -> None:
    p = problem(6, 5, 16, dtype, target.device)
    seed = torch.tensor(5, device=target.device)
    rest = (p.options["noise_scale"], seed, 3, "gaussian", 1, 1, True, 2, 8, 0, target.backend)
    opcheck(OPS.perturb.default, (p.weight, *rest, torch.empty_like(p.weight)))
    opcheck(OPS.perturb.default, (None, *rest, torch.empty_like(p.weight)))


@pytest.mark.parametrize("case", CASES)
def test_raw_op_values_and_gradients(target: Target, dtype: torch.dtype, case: str) -> None:
    """Called without the public function; opcheck alone would be content with no autograd at all."""
    p = problem(6, 33, 40, dtype, target.device, **CASES[case])
    draw = {"stream": 3, "sample_offset": 1, "row_offset": 2, "col_offset": 8, "seed": 5}
    if "noise_scale" in p.options:
        p.options.update(draw)
    inputs = compare.leaves(p)
    arguments = (*inputs.values(), *linear_arguments(target, p)[6:])
    y, u = OPS.linear(*arguments)
    got = compare.results(y, inputs, p.grad_y)
    eps = compare.group_eps(target, p)
    exact, scale = compare.exact_and_scale(p, eps)
    ordinary = compare.plain(p, eps)
    for name, value in got.items():
        compare.check(name, value, exact[name], ordinary[name], scale[name], torch.finfo(dtype).eps)
    for name, value in compare.run(target, p).items():
        assert torch.equal(got[name], value), name
    if p.lora_A is None:
        assert u.numel() == 0
    else:
        branch = p.x if p.lora_x is None else p.lora_x
        assert_close(u, (branch.double() @ p.lora_A.double().t()).to(dtype))
    assert not u.requires_grad


def test_raw_input_grad(target: Target, dtype: torch.dtype) -> None:
    """dX = dY (W + eps) + v A, and no gradient of its own."""
    p = problem(6, 33, 40, dtype, target.device, rank=4)
    p.options = {"scaling": 1.0, "noise_scale": p.options["noise_scale"]}
    v = randn(6, 4, dtype=dtype, device=target.device)
    p.options.update(seed=5, stream=3, sample_offset=1, row_offset=2, col_offset=8)
    grad_y = p.grad_y.clone().requires_grad_()
    dx = OPS.linear_input_grad(grad_y, p.weight, p.lora_A, v, *draw_arguments(p), *choice(target))
    eps = compare.group_eps(target, p)[0]
    exact = p.grad_y.double() @ (p.weight.double() + eps.double()) + v.double() @ p.lora_A.double()
    assert_close(dx.double(), exact, ulp=torch.finfo(dtype).eps)
    with pytest.raises(RuntimeError, match="linear_input_grad: cannot be differentiated twice"):
        dx.sum().backward()


def test_schemas() -> None:
    """Options travel by position and by name; only `out` is written."""
    for name in ("linear", "linear_input_grad", "row_sq_norms", "perturb"):
        schema = getattr(OPS, name).default._schema
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        assert written == (["out"] if name == "perturb" else [])
        assert "backend" in [a.name for a in schema.arguments]
    names = [a.name for a in OPS.linear.default._schema.arguments]
    assert names[:6] == ["x", "weight", "lora_A", "lora_B", "bias", "lora_x"]


# Nothing is read back: fake tensors have no values, so reading one is an error.


@pytest.fixture
def fake() -> Iterator[torch._subclasses.FakeTensorMode]:
    with torch._subclasses.FakeTensorMode() as mode:
        yield mode


def fake_layer() -> tuple[Tensor, ...]:
    x, A, B = torch.empty(2, 3, 16, requires_grad=True), torch.empty(4, 16), torch.empty(5, 4)
    return x, torch.empty(5, 16), A.requires_grad_(), B.requires_grad_()


@pytest.mark.parametrize("given", ["sigma", "noise_scale"])
def test_values_in_tensors_are_not_read(target: Target, given: str, fake: Any) -> None:
    with torch.device(target.device):
        x, W, A, B = fake_layer()
        seed = torch.zeros((), dtype=torch.int64)
        noise = {"sigma": torch.empty(())} if given == "sigma" else {"noise_scale": torch.empty(5)}
        y = target.linear(x, W, A, B, seed=seed, samples=3, **noise)
        assert y.shape == (2, 3, 5)
        y.sum().backward()
        assert [t.grad.shape for t in (x, A, B)] == [x.shape, A.shape, B.shape]
        assert fk.row_sq_norms(W, A, B, backend=target.backend).shape == (5,)
        scale = fk.flat_noise_scale(W, A, B, sigma=torch.empty(()), backend=target.backend)
        assert scale.shape == (5,)
        assert target.noise(scale, 7, seed=seed).shape == (5, 7)
        assert fk.perturb_weight(W, scale, seed=seed, backend=target.backend).shape == (5, 16)


def test_meta_tensors_give_shapes() -> None:
    """Without naming a backend, as code that sizes a model does."""
    with torch.device("meta"):
        x, W, A, B = fake_layer()
        y = fk.fused_flat_lora_linear(x, W, A, B, sigma=0.1, seed=1)
        assert (y.shape, y.device.type) == ((2, 3, 5), "meta")
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert fk.materialize_noise(torch.ones(5), 7, seed=1).shape == (5, 7)


def test_reading_a_fake_tensor_is_an_error(fake: Any) -> None:
    """The control of the test above."""
    with pytest.raises(RuntimeError):
        torch.empty(()).item()


def test_reference_never_reads_values(fake: Any) -> None:
    """Nor does the maths of the reference backend, which then costs a GPU no synchronisation."""
    from flatlora_kernels.backends import reference
    from flatlora_kernels.core.records import Draw, Product

    for noise in ("gaussian", "rademacher"):
        draw = Draw(torch.empty(5), torch.zeros((), dtype=torch.int64), noise=noise, samples=2)
        x, W, A, B = (t.detach() for t in fake_layer())
        u = x.flatten(0, 1) @ A.t()
        y = reference.product(Product(x.flatten(0, 1), W, u=u, lora=B, scaling=0.5), draw, "folded")
        assert y.shape == (6, 5)
        dx = reference.product(Product(y, W, True, u, A.t()), draw, "folded")
        assert dx.shape == x.flatten(0, 1).shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation(target: Target) -> None:
    if target.device != "cuda":
        pytest.skip("only a GPU runs asynchronously")
    p, q = (problem(6, 33, 40, device="cuda", rank=4, bias=True) for _ in range(2))
    # Made here: a tensor of a number is a copy that is waited for.
    p.options["seed"] = torch.tensor(5, device="cuda")
    del q.options["noise_scale"]
    q.options |= {"sigma": torch.tensor(0.1, device="cuda"), "seed": 5}

    def run() -> None:
        compare.run(target, p)
        compare.run(target, q)

    run()  # the first time also pays for libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Which backend runs.


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Backends `one` and `two`, copies of `reference`; yields the log of (backend, function) calls."""
    calls: list[tuple[str, str]] = []
    reference = backends.get("reference")

    def logged(name: str, function: str) -> Any:
        def double(*args: Any) -> Any:
            direction = "linear_input_grad" if function == "product" and args[0].input_grad else "linear"
            calls.append((name, direction if function == "product" else function))
            return getattr(reference, function)(*args)

        return double

    for priority, name in ((101, "one"), (100, "two")):
        module = types.ModuleType(f"{backends.__name__}.{name}")
        vars(module).update({k: v for k, v in vars(reference).items() if not k.startswith("__")})
        for function in ("product", "row_sq_norms", "perturb"):
            setattr(module, function, logged(name, function))
        module.PRIORITY = priority
        monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    known = ("one", "two", *backends.names())
    monkeypatch.setattr(backends, "names", lambda: known)
    caches = (backends.get, backends.unavailable, resolve._select)
    for cache in caches:
        cache.cache_clear()
    yield calls
    for cache in caches:
        cache.cache_clear()


def small() -> tuple[Tensor, Tensor]:
    return randn(3, 16).requires_grad_(), randn(5, 16)


def test_precedence(doubles: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keyword, then context, then environment, then automatic."""

    def used(**keywords: str) -> str:
        doubles.clear()
        fk.fused_flat_lora_linear(*small(), **keywords)
        return doubles[-1][0] if doubles else "reference"

    assert used() == "one"  # the highest priority
    monkeypatch.setenv("FLATLORA_BACKEND", "reference")
    assert used() == "reference"
    with fk.use_backend("two"):
        assert used() == "two"
        assert used(backend="one") == "one"
        with fk.use_backend("one"):
            assert used() == "one"
        assert used() == "two"
    assert used() == "reference"
    assert used(backend="two") == "two"
    with pytest.raises(RuntimeError, match="on purpose"), fk.use_backend("two"):
        raise RuntimeError("on purpose")
    assert used() == "reference"
    monkeypatch.setenv("FLATLORA_BACKEND", "")
    assert used() == "one"


def test_precedence_of_strategies(doubles: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def used(**keywords: str) -> str:
        return resolve.resolve("one", keywords.get("strategy"), None, "cpu", torch.float32, 1).strategy

    assert used() == resolve.STRATEGY
    monkeypatch.setenv("FLATLORA_STRATEGY", "panel")
    assert used() == "panel"
    with fk.use_strategy("fused"):
        assert used() == "fused"
        assert used(strategy="panel") == "panel"
    assert used() == "panel"
    assert used(strategy="fused") == "fused"
    y = fk.fused_flat_lora_linear(*small(), strategy="panel", backend="one")
    assert torch.equal(y, fk.fused_flat_lora_linear(*small(), backend="one"))


def test_every_function_asks_the_same_backend(doubles: list[tuple[str, str]]) -> None:
    x, W = small()
    with fk.use_backend("two"):
        fk.row_sq_norms(W)
        fk.flat_noise_scale(W, sigma=0.1)
        fk.materialize_noise(torch.ones(5), 16, seed=1)
        fk.perturb_weight(W, torch.ones(5), seed=1)
        fk.fused_flat_lora_linear(x, W, sigma=0.1, seed=1)
    functions = ["row_sq_norms", "row_sq_norms", "perturb", "perturb", "row_sq_norms", "linear"]
    assert doubles == [("two", function) for function in functions]


def test_backward_uses_the_backend_of_forward(doubles: list[tuple[str, str]]) -> None:
    x, W = small()
    with fk.use_backend("two"):
        y = fk.fused_flat_lora_linear(x, W, sigma=0.1, seed=1)
    with fk.use_backend("one"):
        y.sum().backward()
    assert doubles[-1] == ("two", "linear_input_grad")


def test_backward_on_another_thread(doubles: list[tuple[str, str]]) -> None:
    """The context belongs to the thread of the forward pass; what it chose travels with the graph."""
    x, W = small()
    with fk.use_backend("two"):
        y = fk.fused_flat_lora_linear(x, W, sigma=0.1, seed=1)
        expected = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0]
    failures: list[BaseException] = []

    def backward() -> None:
        try:
            with fk.use_backend("one"):
                y.sum().backward()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not failures
    assert doubles[-1] == ("two", "linear_input_grad")
    assert torch.equal(x.grad, expected)


def test_contexts_of_threads_are_their_own(doubles: list[tuple[str, str]]) -> None:
    seen: list[str] = []

    def forward() -> None:
        seen.append(resolve.resolve(None, None, None, "cpu", torch.float32, 1).backend)

    with fk.use_backend("two"):
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
    assert seen == ["one"]


def test_many_threads_at_once(target: Target) -> None:
    """Concurrent calls of different shapes do not disturb one another."""
    problems = [problem(3 + i, 40 + i, 72 + 8 * i, device=target.device, rank=4, seed=i) for i in range(6)]
    expected = [compare.run(target, p) for p in problems]
    failures: list[str] = []

    def work(i: int) -> None:
        try:
            for _ in range(10):
                for name, value in compare.run(target, problems[i]).items():
                    if not torch.equal(value, expected[i][name]):
                        failures.append(f"problem {i}: {name}")
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_automatic_choice_of_reference_warns_once_on_large_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in backends.names():
        if name != "reference":
            monkeypatch.setattr(backends.get(name), "unavailable", lambda: "switched off by this test")
    caches = (backends.unavailable, resolve._select)
    for cache in caches:
        cache.cache_clear()
    try:
        x, large = torch.zeros(1, 1024), torch.zeros(1024, 1024)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fk.fused_flat_lora_linear(x, large[:8])  # small: nothing to warn about
            fk.fused_flat_lora_linear(x, large, backend="reference")  # asked for
            with fk.use_backend("reference"):
                fk.fused_flat_lora_linear(x, large)
        with pytest.warns(UserWarning, match="'reference'") as record:
            fk.fused_flat_lora_linear(x, large)
            fk.fused_flat_lora_linear(x, large)
        assert len(record) == 1
        others = [n for n in backends.names() if n != "reference" and not backends.unfit(n, "cpu", x.dtype)]
        for name in others:
            assert f"{name}: switched off by this test" in str(record[0].message)
    finally:
        for cache in caches:
            cache.cache_clear()


def test_automatic_choice_skips_what_cannot_do_it(doubles: list[tuple[str, str]]) -> None:
    backends.get("one").DTYPES = (torch.float32,)
    assert resolve.resolve(None, None, None, "cpu", torch.float64, 1).backend == "two"
    backends.get("one").NOISE_ACCUMS = ("folded",)
    resolve._select.cache_clear()
    assert resolve.resolve(None, None, "split", "cpu", torch.float32, 1).backend == "two"


def test_backend_info() -> None:
    info = fk.backend_info()
    assert tuple(info) == backends.names()
    assert "reference" in info
    for name, entry in info.items():
        assert entry["description"]
        assert entry["unavailable"] == backends.unavailable(name)
    assert info["reference"]["unavailable"] is None
