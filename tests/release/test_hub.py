"""release/hub.py: the repository that it makes keeps the Hub's rules, loads, and computes what the package computes.

The rules: https://github.com/huggingface/kernels, docs/source/kernel-requirements.md. What loads a kernel is the
package `kernels`; tests that need it are skipped without it.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import script
from targets import INTERPRETED
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import flatlora_kernels as fk
from flatlora_kernels.core.noise import KINDS

ROOT = Path(__file__).parents[2]
# The Hub allows the standard library and torch, which brings triton.
ALLOWED = sys.stdlib_module_names | {"torch", "triton"}
REGISTERS = {"custom_op", "triton_op", "register_kernel", "register_fake", "register_vmap", "Library"}


@pytest.fixture(scope="module")
def hub() -> Any:
    return script("release/hub.py")


@pytest.fixture(scope="module")
def tree(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "made"
    hub.make(out, "somebody/flat-lora")
    return out


def load(path: Path) -> ModuleType:
    """As `kernels` does, in a process that has no flatlora_kernels meanwhile."""
    kernels = pytest.importorskip("kernels", reason="loading needs the package kernels: pip install kernels")
    hidden = [name for name in sys.modules if name.split(".")[0] == "flatlora_kernels"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in hidden:
            patch.setitem(sys.modules, name, None)
        made = kernels.get_local_kernel(path)
        if importlib.util.find_spec("triton"):
            # It is imported by the first call on a GPU.
            backend = importlib.import_module(f"{made.__name__}.backends.triton")
            assert backend._kernel("product").__name__ == f"{made.__name__}.triton_kernels.product"
    return made


@pytest.fixture(scope="module")
def kernel(tree: Path) -> ModuleType:
    return load(tree)


def sources(tree: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Python files of a build."""
    for path in (tree / "build" / "torch-cuda").rglob("*.py"):
        # The Hub asks for the grammar of Python 3.9; the torch that these files need has none below 3.10.
        yield path, ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, 9))


def test_imports_are_relative_or_allowed(tree: Path) -> None:
    found = 0
    for path, code in sources(tree):
        for node in ast.walk(code):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            else:
                continue
            found += 1
            assert {name.split(".")[0] for name in names} <= ALLOWED, f"{path}:{node.lineno}"
        # Nor may a name that importlib gets be one of the package.
        texts = [n.value for n in ast.walk(code) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        assert not [t for t in texts if re.match(r"flatlora_kernels\.\S*$", t)], path
    assert found > 100


def test_both_forms_are_the_same(hub: Any, tree: Path) -> None:
    source, *built = (
        {
            str(p.relative_to(root)): p.read_bytes()
            for p in root.rglob("*")
            if p.is_file() and p.suffix != ".pyc"
        }
        for root in (tree / "torch-ext" / "flat_lora", *(tree / "build" / f"torch-{b}" for b in hub.BACKENDS))
    )
    for files in built:
        assert files.keys() - source.keys() == {"_ops.py", "metadata.json"}
        assert source.items() <= files.items()


def test_ops_are_registered_in_a_namespace_of_the_build(tree: Path) -> None:
    found = 0
    for path, code in sources(tree):
        for node in ast.walk(code):
            assert not (isinstance(node, ast.Attribute) and node.attr == "flatlora"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in REGISTERS:
                found += 1
                first = node.args[0]
                assert "add_op_namespace_prefix(" in ast.unparse(first), f"{path}:{node.lineno}"
    assert found >= 8  # a library and its fake kernels


def test_metadata(hub: Any, tree: Path) -> None:
    ids = set()
    for backend in hub.BACKENDS:
        folder = tree / "build" / f"torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text("utf-8"))
        assert (metadata["name"], metadata["backend"]) == ("flat-lora", {"type": backend})
        files = [p for p in folder.rglob("*") if p.is_file() and p != folder / "metadata.json"]
        expected = {
            str(p.relative_to(folder)): base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode()
            for p in files
            if "__pycache__" not in p.parts
        }
        assert metadata["digest"] == {"algorithm": "sha256", "files": expected}
        assert f'_OPS_NAME = "{metadata["id"]}"' in (folder / "_ops.py").read_text("utf-8")
        ids.add(metadata["id"])
    assert len(ids) == len(hub.BACKENDS)
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    build = tomllib.loads((tree / "build.toml").read_text("utf-8"))
    assert build["general"]["backends"] == list(hub.BACKENDS)
    assert build["general"]["hub"] == {"repo-id": "somebody/flat-lora"}
    assert "{{" not in (tree / "build" / "CARD.md").read_text("utf-8")


def test_a_name_follows_from_the_content(hub: Any, tmp_path: Path) -> None:
    files = hub.module()
    first, again = (hub.build(tmp_path / name, "cpu", files) for name in "ab")
    other = hub.build(tmp_path / "c", "cpu", {**files, "layers.py": files["layers.py"] + "\n"})
    assert first == again != other


def test_refuses_what_it_does_not_know(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="--out: expected a new folder"):
        hub.make(tmp_path)
    with pytest.raises(SystemExit, match="--repo-id: expected OWNER/NAME, got 'me'"):
        hub.make(tmp_path / "new", "me")
    monkeypatch.setitem(hub.REWRITES, "op/schema.py", [("what is gone", "")])
    with pytest.raises(SystemExit, match="expects once in op/schema.py, found 0 times: what is gone"):
        hub.make(tmp_path / "new")


def test_public_names_are_those_of_the_package(kernel: ModuleType) -> None:
    assert set(kernel.__all__) - {"layers"} <= set(fk.__all__)
    assert not [name for name in kernel.__all__ if not hasattr(kernel, name)]
    for name in ("fused_flat_lora_linear", "flat_noise_scale", "fused_flat_lora_grouped_linear"):
        assert name in kernel.__all__
        assert getattr(kernel, name) is not getattr(fk, name)
    assert set(kernel.backend_info()) == {"triton", "reference"}
    assert hasattr(getattr(torch.ops, kernel.__name__), "linear_input_grad")


def step(library: Any, noise: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """noise_scale, result and gradients."""
    torch.manual_seed(0)
    x, W, dy = torch.randn(3, 5, 40), torch.randn(24, 40) / 6, torch.randn(3, 5, 24)
    A, B, bias = torch.randn(4, 40), torch.randn(24, 4), torch.randn(24)
    x, W, A, B, bias, dy = (t.to(dtype) for t in (x, W, A, B, bias, dy))
    leaves = [t.requires_grad_() for t in (x, A, B, bias)]
    scale = library.flat_noise_scale(W, A, B, scaling=2.0, sigma=0.5, **options)
    y = library.fused_flat_lora_linear(
        x, W, A, B, bias, scaling=2.0, noise_scale=scale, seed=5, stream=1, noise=noise, **options
    )
    return [scale, y.detach(), *torch.autograd.grad(y, leaves, dy)]


class Recorder(TorchDispatchMode):
    """Makes every call go through torch's dispatcher, and keeps the names of the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_as_the_package(kernel: ModuleType, noise: str, dtype: torch.dtype) -> None:
    own, other = (step(library, noise, dtype, backend="reference") for library in (kernel, fk))
    assert all(map(torch.equal, own, other))
    # What the package chooses here may add up in another order.
    if not INTERPRETED and dtype == torch.float32:
        for mine, chosen in zip(step(kernel, noise, dtype), step(fk, noise, dtype), strict=True):
            torch.testing.assert_close(mine, chosen, rtol=1e-4, atol=1e-4)


def test_grouped(kernel: ModuleType) -> None:
    torch.manual_seed(0)
    x, W, offsets = torch.randn(9, 16), torch.randn(3, 8, 16), torch.tensor([2, 2, 9])
    results = []
    for library in (kernel, fk):
        scale = library.grouped_noise_scale(W, sigma=0.3, backend="reference")
        results.append(
            library.fused_flat_lora_grouped_linear(
                x, W, offsets=offsets, noise_scale=scale, seed=1, backend="reference"
            )
        )
    assert torch.equal(*results)


def test_two_builds_in_one_process(hub: Any, kernel: ModuleType, tmp_path: Path) -> None:
    files = hub.module()
    old, new = "eps = epsilon(draw, weight.shape[1], weight.dtype, group)", "eps = 0"
    assert files["backends/reference.py"].count(old) == 1
    files["backends/reference.py"] = files["backends/reference.py"].replace(old, new)
    name = hub.build(tmp_path, "cpu", files)
    silent = load(tmp_path)
    assert silent.__name__ == name != kernel.__name__
    for library, namespace in ((silent, name), (kernel, kernel.__name__)):
        results = [step(other, "gaussian", torch.float32, backend="reference") for other in (library, fk)]
        with Recorder() as seen:
            results.append(step(library, "gaussian", torch.float32, backend="reference"))
        assert all(map(torch.equal, results[0], results[2]))
        assert all(map(torch.equal, *results[:2])) == (library is kernel)
        own = {op for op in seen.ops if not op.startswith("aten::")}
        ops = ("linear", "linear_input_grad", "adapter_grads", "row_sq_norms")
        assert own == {f"{namespace}::{op}" for op in ops}


def test_shapes_are_known_without_values(kernel: ModuleType) -> None:
    """What torch.compile goes by."""
    with FakeTensorMode():
        fake = step(kernel, "gaussian", torch.float32, backend="reference")
    real = step(kernel, "gaussian", torch.float32, backend="reference")
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


def test_layer(kernel: ModuleType, tree: Path) -> None:
    kernels = pytest.importorskip("kernels")

    @kernels.use_kernel_forward_from_hub("FlatLoraLinear")
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 16), requires_grad=False)
            self.bias = nn.Parameter(torch.randn(8))
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(8, 2))
            self.scaling, self.seed, self.stream = 2.0, 3, 1
            self.noise_scale: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("not replaced")

    layer = Layer()
    repository = kernels.LocalLayerRepository(tree, layer_name="FlatLoraLinear")
    with kernels.use_kernel_mapping({"FlatLoraLinear": {"cpu": repository}}, inherit_mapping=False):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        kernels.kernelize(layer, mode=mode, device="cpu", use_fallback=False)
    x = torch.randn(5, 16)
    given = (layer.weight, layer.lora_A, layer.lora_B)
    layer.noise_scale = kernel.flat_noise_scale(*given, scaling=2.0, sigma=0.5)
    noisy = fk.fused_flat_lora_linear(
        x,
        *given,
        layer.bias,
        scaling=2.0,
        noise_scale=layer.noise_scale,
        seed=3,
        stream=1,
        backend="reference",
    )
    with kernel.use_backend("reference"):
        assert torch.equal(layer(x), noisy)
        layer(x).sum().backward()
        assert layer.lora_B.grad is not None
        plain = layer.eval()(x)
    assert not torch.equal(plain, noisy)
    torch.testing.assert_close(
        plain, nn.functional.linear(x, layer.weight + 2.0 * layer.lora_B @ layer.lora_A, layer.bias)
    )


@pytest.fixture
def benchmark(kernel: ModuleType, tree: Path) -> Callable[[], Any]:
    """Makes one as `kernels benchmark` does, on the CPU."""
    spec = importlib.util.spec_from_file_location("benchmark_module", tree / "benchmarks" / "benchmark.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def make() -> Any:
        made = script.FlatLora()
        made.kernel, made.device = kernel, "cpu"
        torch.manual_seed(made.seed)
        made.setup()
        return made

    return make


@pytest.mark.skipif(INTERPRETED, reason="shapes are large for Triton's interpreter")
def test_benchmark_verifies(benchmark: Callable[[], Any]) -> None:
    made = benchmark()
    names = [name.removeprefix("benchmark_") for name in dir(made) if name.startswith("benchmark_")]
    assert len(names) == 3
    for name in names:
        getattr(made, f"benchmark_{name}")()
        expected = getattr(made, f"verify_{name}")()
        assert torch.allclose(made.out, expected, atol=1e-2), name
        made.noise_scale = 0.9 * made.noise_scale  # a tenth of the noise is missing
        getattr(made, f"benchmark_{name}")()
        assert not torch.allclose(made.out, expected, atol=1e-2), name
        made.noise_scale = made.noise_scale / 0.9


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter: make test-interpreter")
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_same_triton_kernels(kernel: ModuleType, noise: str) -> None:
    own, other = (step(library, noise, torch.float32, backend="triton") for library in (kernel, fk))
    assert all(map(torch.equal, own, other))
