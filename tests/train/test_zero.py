"""DeepSpeed's ZeRO: two processes against one without it, and its way with parameters imitated without DeepSpeed."""

from __future__ import annotations

import collections
import contextlib
import enum
import faulthandler
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatlora_kernels import apply_flat_lora
from flatlora_kernels.train import layer as layer_module
from flatlora_kernels.train.convert import print_trainable_parameters

B, STEPS, ACCUMULATION = 4, 5, 2
RATES: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.01}
# All are trained in one pair of processes: importing DeepSpeed takes longer than they do.
CASES: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 3, small parameters stay": {"stage": 3, "threshold": 20},
    "stage 3, checkpointing": {"stage": 3, "checkpointing": True},
    "stage 3, made in parts": {"stage": 3, "init": True},
    "stage 3, resumed": {"stage": 3, "resume": 2},
    "stage 2, resumed": {"stage": 2, "resume": 2},
    "peft, stage 2": {"stage": 2, "peft": True},
    "peft, stage 3": {"stage": 3, "peft": True},
    "peft, stage 3, checkpointing": {"stage": 3, "peft": True, "checkpointing": True},
    "peft, stage 3, made in parts": {"stage": 3, "peft": True, "init": True},
    "peft, stage 3, converted late": {"stage": 3, "peft": True, "late": True},
    "peft, stage 3, resumed": {"stage": 3, "peft": True, "resume": 2},
}


class Block(nn.Module):
    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.out = Block(6, 8), Block(8, 8), nn.Linear(8, 3)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = checkpoint(self.two, x, use_reentrant=False) if self.checkpointing else self.two(x)
        return self.out(x)


def convert(model: nn.Module, peft: bool) -> Any:
    options: dict[str, Any] = {"sigma": 0.3, "seed": 3, "backend": "reference", "verbose": False}
    if not peft:
        return apply_flat_lora(model, ["linear", "out"], r=2, **options)
    from flatlora_kernels.integrations import peft as integration

    return integration.apply_flat_lora(model, **options)


def with_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["linear", "out"])
    model = get_peft_model(model, config)  # type: ignore[arg-type, assignment, unused-ignore]
    return model


def set_values(model: nn.Module, gathered: Callable[[Any], Any]) -> None:
    """The same ones whatever made the model: those of zero.Init differ from run to run."""
    for number, parameter in enumerate(model.parameters()):
        with gathered(parameter):
            if parameter.numel():
                generator = torch.Generator().manual_seed(number)
                parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + part)
    draw = torch.randn(2 * B, 9, generator=generator)
    return draw[:, :6], draw[:, 6:]


def alone(peft: bool = False) -> dict[str, Any]:
    model: nn.Module = Net()
    if peft:
        model = with_lora(model)
    controller = convert(model, peft)
    set_values(model, contextlib.nullcontext)
    controller.move_to(controller.base, 0)
    for layer in controller.layers:
        layer.refresh_noise_scale()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **RATES)
    controller.attach(optimizer)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for part in range(ACCUMULATION):
            x, goal = batch(step, part)
            loss = (model(x) - goal).square().mean() / ACCUMULATION
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return {
        "losses": losses,
        "weights": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
    }


def config_of(stage: int, threshold: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": B,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 by default
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": threshold},
    }


def engine_of(
    stage: int,
    threshold: int = 0,
    checkpointing: bool = False,
    init: bool = False,
    peft: bool = False,
    late: bool = False,
) -> tuple[Any, Any]:
    import deepspeed

    config = config_of(stage, threshold)
    with deepspeed.zero.Init(config_dict_or_path=config) if init else contextlib.nullcontext():
        model: nn.Module = Net(checkpointing)
    if peft:
        model = with_lora(model)
    controller = None if late else convert(model, peft)

    def gathered(parameter: Any) -> Any:
        return deepspeed.zero.GatheredParameters(
            [parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")
        )

    set_values(model, gathered)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=trained,
        optimizer=torch.optim.AdamW(trained, **RATES),
        config=config,
    )
    return engine, convert(model, peft) if controller is None else controller


def train(rank: int, folder: str, resume: int | None = None, **settings: Any) -> dict[str, Any]:
    import deepspeed

    engine, controller = engine_of(**settings)
    losses = torch.zeros(STEPS)
    reads: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        reads.append(controller.step)
        return noise_scale(*arguments, **options)

    noise_scale = layer_module.flat_noise_scale
    layer_module.flat_noise_scale = counted
    try:
        for step in range(STEPS):
            if step == resume:
                engine.save_checkpoint(folder, client_state={"flat_lora": controller.state_dict()})
                engine, controller = engine_of(**settings)
                _, client = engine.load_checkpoint(folder)
                controller.load_state_dict(client["flat_lora"])
            for part in range(ACCUMULATION):
                x, goal = (t[rank * B : (rank + 1) * B] for t in batch(step, part))
                loss = (engine(x) - goal).square().mean()
                engine.backward(loss)
                engine.step()
                losses[step] += loss.detach() / ACCUMULATION
            controller.advance()
    finally:
        layer_module.flat_noise_scale = noise_scale
    torch.distributed.all_reduce(losses)
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=settings["stage"] == 3):
                weights[name] = parameter.detach().clone()
    return {"losses": (losses / 2).tolist(), "weights": weights, "reads": reads, "step": controller.step}


def refusals() -> dict[str, str]:
    """What attaching to an optimiser that DeepSpeed drives says, before and after it has taken it."""
    engine, controller = engine_of(2)
    found = {}
    try:
        controller.attach(engine.optimizer)
    except TypeError as error:
        found["wrapper"] = str(error)
    model = Net()
    controller = convert(model, False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **RATES)
    controller.attach(optimizer)
    import deepspeed

    config = {**config_of(2, 0), "gradient_accumulation_steps": 1}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=optimizer, config=config
    )
    x, goal = batch(0, 0)
    engine.backward((engine(x) - goal).square().mean())
    try:
        engine.step()
    except RuntimeError as error:
        found["client"] = str(error)
    return found


def worker(rank: int, folder: str, cases: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(240, exit=True)  # where one process fails, the other waits for it
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getppid() % 20000)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu", **place)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    try:
        results = {}
        for number, (name, case) in enumerate(cases.items()):
            try:
                results[name] = train(rank, f"{folder}/{number}", **case)
            except Exception as error:
                raise RuntimeError(f"case {name!r}") from error
        results["refusals"] = refusals()
        if rank == 0:
            torch.save(results, f"{folder}/results.pt")
    finally:
        torch.distributed.destroy_process_group()


HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
HAS_PEFT = importlib.util.find_spec("peft") is not None


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if not HAS_DEEPSPEED:
        pytest.skip("needs the package deepspeed")
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs a torch with gloo")
    folder: Path = tmp_path_factory.mktemp("zero")
    cases = {name: case for name, case in CASES.items() if HAS_PEFT or not case.get("peft")}
    torch.multiprocessing.spawn(worker, args=(str(folder), cases), nprocs=2)
    return torch.load(folder / "results.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_without_deepspeed(results: Any, case: str) -> None:
    if case not in results:
        pytest.skip("needs the package peft")
    found, expected = results[case], alone(CASES[case].get("peft", False))
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-4)
    assert found["step"] == STEPS
    if CASES[case]["stage"] == 3 and "resume" not in CASES[case]:
        layers = [found["reads"].count(step) for step in range(STEPS)]
        assert layers == [3] * STEPS, "each layer's norms once per step, whatever is computed again"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wrapper", "client"])
def test_attach_refuses_an_optimizer_that_deepspeed_drives(results: Any, way: str) -> None:
    assert "controller.advance() after engine.step()" in results["refusals"][way]


def test_noise_matters() -> None:
    """More than what the comparison lets pass."""
    noisy = alone()["weights"]
    layer_module_scale = layer_module.flat_noise_scale
    layer_module.flat_noise_scale = lambda *a, **k: 1.01 * layer_module_scale(*a, **k)
    try:
        other = alone()["weights"]
    finally:
        layer_module.flat_noise_scale = layer_module_scale
    assert max((noisy[n] - other[n]).abs().max() for n in noisy) > 3e-4


class Status(enum.Enum):
    """DeepSpeed's ZeroParamStatus."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2


class Imitation:
    """One process that does with parameters what ZeRO stage 3 does: empty outside of forwards and backwards, the same
    object gathered in new memory, read by other modules through a getter that gathers, too."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.in_forward = False
        for module in model.modules():
            module._parameters = Getter(self, module._parameters)  # type: ignore[assignment, unused-ignore]
            hooks = [
                module.register_forward_pre_hook(lambda module, _: self.gather(own(module))),
                module.register_forward_hook(lambda module, *_: self.after_forward(module)),
                module.register_full_backward_pre_hook(lambda *_: self.gather(model.parameters())),
            ]
            for kinds, hook in zip(
                (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks),
                hooks,
                strict=True,
            ):
                kinds[hook.id].__module__ = "deepspeed.runtime.zero.parameter_offload"
        for parameter in model.parameters():
            self.share_out(parameter)

    def after_forward(self, module: nn.Module) -> None:
        if self.in_forward:  # not where a backward computes it again
            self.release(own(module))

    @staticmethod
    def share_out(parameter: Any) -> None:
        parameter.ds_shape, parameter.ds_status = parameter.shape, Status.AVAILABLE
        Imitation.release([parameter])

    @staticmethod
    def gather(parameters: Any) -> None:
        for parameter in parameters:
            if parameter.ds_status is Status.NOT_AVAILABLE:
                parameter.data = parameter.ds_tensor.clone()
                parameter.ds_status = Status.AVAILABLE

    @staticmethod
    def release(parameters: Any) -> None:
        for parameter in parameters:
            if parameter.ds_status is Status.AVAILABLE:
                parameter.ds_tensor = parameter.data
                parameter.data = torch.empty(0, dtype=parameter.dtype)
                parameter.ds_status = Status.NOT_AVAILABLE

    def __call__(self, x: Tensor) -> Tensor:
        self.in_forward = True
        try:
            return self.model(x)  # type: ignore[no-any-return]
        finally:
            self.in_forward = False
            self.release(self.model.parameters())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gather(self.model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        self.release(self.model.parameters())


class Getter(collections.OrderedDict[str, Any]):
    def __init__(self, imitation: Imitation, parameters: Any) -> None:
        super().__init__(parameters)
        self.imitation = imitation

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None and self.imitation.in_forward:
            self.imitation.gather([parameter])
        return parameter


def own(module: nn.Module) -> list[Any]:
    return list(module.parameters(recurse=False))


def imitated(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool, peft: bool, init: bool
) -> tuple[dict[str, Any], list[int]]:
    """As `alone`, with an `Imitation` around the model."""
    model: nn.Module = Net(checkpointing)
    if init:
        for parameter in model.parameters():
            Imitation.share_out(parameter)
    if peft:
        model = with_lora(model)
    controller = convert(model, peft)
    if init:
        Imitation.gather(p for p in model.parameters() if hasattr(p, "ds_status"))
    set_values(model, contextlib.nullcontext)
    engine = Imitation(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **RATES)
    reads: list[int] = []
    noise_scale = layer_module.flat_noise_scale

    def counted(*arguments: Any, **options: Any) -> Tensor:
        reads.append(controller.step)
        return noise_scale(*arguments, **options)

    monkeypatch.setattr(layer_module, "flat_noise_scale", counted)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for part in range(ACCUMULATION):
            x, goal = batch(step, part)
            loss = (engine(x) - goal).square().mean() / ACCUMULATION
            loss.backward()
            engine.release(model.parameters())
            total += loss.item()
        engine.step(optimizer)
        controller.advance()
        losses.append(total)
    engine.gather(model.parameters())
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"losses": losses, "weights": weights}, reads


@pytest.mark.parametrize("init", [False, True], ids=["made whole", "made in parts"])
@pytest.mark.parametrize("peft", [False, True], ids=["own", "peft"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_norms_wait_for_the_next_forward(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool, peft: bool, init: bool
) -> None:
    if peft:
        pytest.importorskip("peft", reason="needs the package peft")
    expected = alone(peft)
    found, reads = imitated(monkeypatch, checkpointing, peft, init)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert reads == [step for step in range(STEPS) for _ in range(3)]


def shared_out() -> tuple[nn.Module, Any, Imitation]:
    model = Net()
    controller = convert(model, False)
    return model, controller, Imitation(model)


def test_a_forward_past_the_engine_raises() -> None:
    model, controller, engine = shared_out()
    controller.advance()
    with pytest.raises(
        RuntimeError, match="one.linear: expected parameters that FSDP or DeepSpeed has gathered"
    ):
        controller.layers[0].noise_arguments(torch.zeros(2, 6))


def test_a_compiled_forward_does_not_use_old_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    _, controller, _ = shared_out()
    controller.advance()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(
        RuntimeError, match="one.linear: expected parameters that FSDP or DeepSpeed has gathered"
    ):
        controller.layers[0].noise_arguments(torch.zeros(2, 6))


def test_values_loaded_before_a_controllers_state_are_seen() -> None:
    model, controller, engine = shared_out()
    engine(torch.zeros(2, 6))
    before = [layer.noise_scale.clone() for layer in controller.layers]
    for parameter in model.parameters():
        parameter.ds_tensor.mul_(2)
    controller.load_state_dict({"base": 3, "step": 5})
    engine(torch.zeros(2, 6))
    for layer, scale in zip(controller.layers, before, strict=True):
        assert (layer.noise_scale > 1.5 * scale).all()


def test_strength_changes_while_parameters_are_away() -> None:
    _, controller, engine = shared_out()
    controller.target_sigma = 0.0
    controller.advance()
    engine(torch.zeros(2, 6))
    assert controller.layers[0].noise_scale is None
    controller.target_sigma = 0.3
    engine(torch.zeros(2, 6))
    assert controller.layers[0].noise_scale is not None


def test_parameters_are_counted_whole() -> None:
    model, *_ = shared_out()
    trained = 2 * (6 + 8 + 8 + 8 + 8 + 3)
    assert print_trainable_parameters(model) == (trained, trained + 155)


def test_merge_refuses() -> None:
    _, controller, engine = shared_out()
    with pytest.raises(RuntimeError, match="expected gathered parameters to merge"):
        controller.layers[0].merge()


def test_attach_refuses_an_optimizer_whose_parameters_are_replaced() -> None:
    """As deepspeed.initialize does, at every stage but 0."""
    model = Net()
    controller = convert(model, False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **RATES)
    controller.attach(optimizer)
    flat = nn.Parameter(torch.zeros(4))
    flat.grad = torch.ones(4)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="parameters have all been replaced"):
        optimizer.step()


def test_attach_refuses_a_wrapper_of_deepspeed() -> None:
    kind = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage3"})
    wrapper = kind()
    wrapper.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    for optimizer in (wrapper, type("Wrapper", (), {"optimizer": wrapper})()):
        with pytest.raises(
            TypeError, match="optimizer: expected one that writes .* DeepSpeed's DeepSpeedZeroOptim"
        ):
            convert(Net(), False).attach(optimizer)


def test_layers_are_not_replaced_under_an_engine() -> None:
    model = Net()
    Imitation(model)
    with pytest.raises(ValueError, match="'one.linear': deepspeed.initialize has taken the model already"):
        convert(model, False)
