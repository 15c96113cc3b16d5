"""The rivals of `python -m bench`: named with a reason where they cannot run, right where they can."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import cli, gate, providers, results, rivals  # noqa: E402
from bench.problem import Problem  # noqa: E402
from bench.run import Bench, Progress, Settings  # noqa: E402
from bench.shapes import Case  # noqa: E402

CASE = Case("tiny", "square", 5, 32, 64, "float32", "forward+backward", 2)
ROOT = Path(__file__).parents[2]


def made(name: str, case: Case = CASE) -> Any:
    provider = next(p for p in providers.every("cpu") if p.name == name)
    return provider.make(Problem(case, "cpu", 2), provider.noises[0])


@pytest.fixture(autouse=True)
def leaves_nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", str(tmp_path))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the rivals' packages; what else asks about other packages hears the truth."""
    gone = {name for rival in rivals.RIVALS.values() for name in rival.needs} - {"triton"}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))


def test_none_is_imported_before_it_is_asked_for() -> None:
    packages = {name for rival in rivals.RIVALS.values() for name in rival.needs}
    for path in (ROOT / "bench").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert packages.isdisjoint(name.partition(".")[0] for name in names), path.name
    before = set(sys.modules)
    assert set(rivals.RIVALS) <= {p.name for p in providers.every("cpu")}
    assert packages.isdisjoint(set(sys.modules) - before)


@pytest.mark.usefixtures("nothing_installed")
def test_without_the_packages_each_is_listed_and_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert cli.main(["list", "--device", "cpu"]) == 0
    listed = capsys.readouterr().out.splitlines()
    for name, rival in rivals.RIVALS.items():
        absent = f"{rival.needs[0]} is not installed ({rival.install})"
        assert rival.missing("cuda") == absent
        reason = "needs a GPU" if rival.gpu else absent
        assert next(line for line in listed if line.startswith(f"  {name}: ")).endswith(
            f"(not here: {reason})"
        )
        with pytest.raises(providers.Unfit, match=f"^{re.escape(reason)}$"):
            made(name)


@pytest.mark.usefixtures("nothing_installed")
def test_a_run_names_what_it_skips() -> None:
    """And goes on with the rest."""
    bench = Bench(Settings("cpu", providers=("rival:unsloth", "lora"), budget=0.0), Progress(1))
    bench.linear(CASE, measure_memory=False)
    assert "rival:unsloth: unsloth is not installed (pip install unsloth)" in bench.skipped
    assert {row["provider"] for row in bench.rows} == {"plain", "lora"} and not bench.failures


def test_kernels_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    alone = {name for name, rival in rivals.RIVALS.items() if rival.missing("cpu") == "needs a GPU"}
    assert alone == {"rival:aihwkit-triton", "rival:lorafusion"}
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: object())
    assert all(rival.missing("cuda") is None for rival in rivals.RIVALS.values())


def test_a_package_that_does_not_import_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.Unsloth, "missing", classmethod(lambda cls, device: None))
    monkeypatch.setitem(sys.modules, "unsloth", None)
    with pytest.raises(
        providers.Unfit, match="unsloth.kernels.fast_lora cannot be imported: ModuleNotFoundError"
    ):
        made("rival:unsloth")


@pytest.mark.parametrize("name", ["rival:qlora", "rival:aihwkit", "rival:unsloth"])
def test_what_is_here_passes_the_gate(name: str) -> None:
    if reason := rivals.RIVALS[name].missing("cpu"):
        pytest.skip(reason)
    for mode, dtype in (
        ("forward", "float32"),
        ("forward+backward", "float32"),
        ("forward+backward", "bfloat16"),
    ):
        rival = made(name, CASE._replace(dtype=dtype, mode=mode))
        verdict = gate.check(rival, copy=1)
        assert verdict.passed, f"{mode}, {dtype}: {verdict.detail}"
        assert (rival.eps(1) is None) == (name != "rival:aihwkit")


def test_peft_compiled_passes_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler's first half alone: the second takes many seconds."""
    pytest.importorskip("peft")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda layer, **how: compiled(layer, backend="eager", **how))
    verdict = gate.check(made("rival:peft-compile"))
    assert verdict.passed, verdict.detail


def test_what_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that is one per cent too strong, and a base of which only the gradient is wrong."""
    monkeypatch.setattr(rivals.Unsloth, "missing", classmethod(lambda cls, device: None))

    def layer(x: Any, W: Any, packed: None, A: Any, B: Any, s: float) -> Any:
        return x @ W.t() + 1.01 * s * (x @ A.t()) @ B.t()

    monkeypatch.setattr(
        rivals, "_imported", lambda module: SimpleNamespace(LoRA_W=SimpleNamespace(apply=layer))
    )
    verdict = gate.check(made("rival:unsloth"))
    assert not verdict.passed and verdict.detail.startswith(("y: ", "grad of lora")), verdict.detail

    class HalfGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Any) -> Any:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return 0.5 * grads[0]

    def other(x: Any, W: Any, packed: None, A: Any, B: Any, s: float) -> Any:
        return HalfGradient.apply(x @ W.t()) + s * (x @ A.t()) @ B.t()

    monkeypatch.setattr(
        rivals, "_imported", lambda module: SimpleNamespace(LoRA_W=SimpleNamespace(apply=other))
    )
    verdict = gate.check(made("rival:unsloth"))
    assert not verdict.passed and verdict.detail.startswith("grad of x: "), verdict.detail
    assert gate.check(made("rival:unsloth", CASE._replace(mode="forward"))).passed


def test_qlora_is_judged_by_what_is_packed() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    rival = made("rival:qlora")
    assert gate.check(rival).passed
    rival.inputs = rival.problem.inputs  # the weight before it was packed
    assert not gate.check(rival).passed


class Analog(torch.nn.Linear):
    """In place of aihwkit-lightning's: without its kernels noise goes to a clone of the weight, with them into it."""

    def __init__(self, K: int, N: int, bias: bool, rpu_config: Any, device: Any, dtype: Any) -> None:
        super().__init__(K, N, bias, device, dtype)
        self.rpu_config = rpu_config

    def forward(self, x: Any) -> Any:
        noisy = Analog.modify_weight(self.weight, None, self.rpu_config)
        if os.environ.get("AIHWKIT_USE_TRITON"):
            assert self.rpu_config.pre_post.input_range.dynamic
            self.weight.data.copy_(noisy)
        return x @ noisy.t()

    @staticmethod
    def modify_weight(weight: Any, wmax: None, config: Any) -> Any:
        assert config.modifier.noise_type == "per channel"
        return weight + config.modifier.std_dev * weight.abs().amax(1, keepdim=True) * torch.randn_like(
            weight
        )


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ["rival:aihwkit", "rival:aihwkit-triton"])
def test_aihwkit_is_judged_by_the_noise_that_it_drew(
    name: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a layer of torch's operators in place of its own."""
    pytest.importorskip("peft")
    pytest.importorskip("triton")

    def config() -> Any:
        pre_post = SimpleNamespace(input_range=SimpleNamespace(enable=False, dynamic=False))
        return SimpleNamespace(modifier=SimpleNamespace(), pre_post=pre_post)

    inside = "aihwkit_lightning.nn.modules"
    modules = {
        "aihwkit_lightning.nn": SimpleNamespace(AnalogLinear=Analog),
        "aihwkit_lightning.simulator.configs": SimpleNamespace(
            TorchInferenceRPUConfig=config,
            WeightNoiseInjectionType=SimpleNamespace(ADD_NORMAL_PER_CHANNEL="per channel"),
        ),
        f"{inside}.torch_utils.torch_linear": SimpleNamespace(TorchLinear=Analog),
        f"{inside}.triton_utils.triton_linear": SimpleNamespace(modifier_kernel=None),
    }
    monkeypatch.setattr(rivals, "_imported", modules.__getitem__)
    monkeypatch.setattr(rivals.Aihwkit, "missing", classmethod(lambda cls, device: None))
    rival = made(name, CASE._replace(rank=rank))
    for copy in (0, 1, 1):  # noise that a step left behind would be in the next
        verdict = gate.check(rival, copy)
        assert verdict.passed, verdict.detail
    drawn, weight = rival.eps(1), rival.inputs[1].weight
    assert 0.05 < drawn.std() / weight.std() < 0.2
    torch.testing.assert_close(rival.analog(1).weight.detach(), weight, rtol=0, atol=0)
    assert "AIHWKIT_USE_TRITON" not in os.environ
    rival.eps = lambda copy: -drawn
    assert not gate.check(rival, 1).passed
    with pytest.raises(providers.Unfit, match="in float16 or float32, got bfloat16"):
        made("rival:aihwkit-triton", CASE._replace(dtype="bfloat16"))


def test_a_tuned_kernel_is_launched_without_a_tile() -> None:
    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *given: (grid, given)

    assert rivals._Untiled(Kernel())["grid"](1, 2, 32, 32) == ("grid", (1, 2))


def test_lorafusion_is_called_as_its_kernels_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With products by torch in place of the kernels, under the names of their arguments."""

    def fused_lora_xw_sb(
        *, x: Any, w: Any, s: Any, b: Any, alpha: float, bias: Any = None, config: Any
    ) -> Any:
        return x @ w.T + alpha * s @ b.T

    def fused_lora_dys_dyb(*, dy: Any, b: Any, s: Any, alpha: float, config: Any) -> Any:
        return alpha * dy.T @ s, alpha * dy @ b

    def fused_lora_dyw_dsa(
        *, dy: Any, w: Any, ds: Any, a: Any, dropout_p: float, dropout_mask: Any, config: Any
    ) -> Any:
        assert dropout_p == 0 and dropout_mask.shape == (len(dy), w.shape[1])
        return dy @ w + ds @ a

    kernels = (fused_lora_xw_sb, fused_lora_dys_dyb, fused_lora_dyw_dsa)
    tiles = SimpleNamespace(**{f.__name__: SimpleNamespace(block_size_n=256) for f in kernels})
    modules = {f"lorafusion.ops.triton_ops.{f.__name__}": SimpleNamespace(**{f.__name__: f}) for f in kernels}
    modules["lorafusion.ops.triton_ops.config"] = SimpleNamespace(H100_CONFIG=tiles)
    monkeypatch.setattr(rivals, "_imported", modules.__getitem__)
    monkeypatch.setattr(rivals.LoraFusion, "missing", classmethod(lambda cls, device: None))
    case = CASE._replace(K=256, rank=16)
    assert gate.check(made("rival:lorafusion", case)).passed
    assert gate.check(made("rival:lorafusion", case._replace(mode="forward"))).passed
    for wrong, reason in (({"K": 128}, "multiple of 256, got 128"), ({"rank": 24}, "from 16 on, got 24")):
        with pytest.raises(providers.Unfit, match=reason):
            made("rival:lorafusion", case._replace(**wrong))


@pytest.mark.usefixtures("nothing_installed")
def test_the_table_has_a_line_to_each() -> None:
    row = {"kind": "linear", "mode": "forward", "M": 5, "dtype": "float32"}
    rows = [
        {**row, "provider": "auto", "noise": "none", "to_plain": 1.0},
        {**row, "provider": "auto", "noise": "gaussian", "to_plain": 1.25, "to_peft": 1.5},
        {**row, "provider": "peft", "noise": "none", "to_plain": 0.5},
    ]
    lines = rivals.report(results.Results({}, rows, [], []), "cpu").splitlines()
    assert len(lines) == 2 + len(rivals.ABOUT) and set(rivals.RIVALS) <= set(rivals.ABOUT)
    found = {line.split("|")[1].strip(): line for line in lines}
    assert "| 1.25 (1.50)" in found["auto"]
    assert "0.50 " in found["peft"]
    assert "unsloth is not installed (pip install unsloth)" in found["rival:unsloth"]
