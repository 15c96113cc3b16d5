"""transformers.Trainer with FlatLoraCallback."""

from __future__ import annotations

import importlib.machinery
import json
import math
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

from flatlora_kernels import FlatLoraLinear, NoiseController, apply_flat_lora
from flatlora_kernels.train.layer import NoisyLayer

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments  # noqa: E402

from flatlora_kernels.integrations.transformers import FlatLoraCallback  # noqa: E402


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.second(torch.tanh(self.first(x)))[:, 0]
        return {"loss": (y - labels).square().mean(), "logits": y}


def data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator)
    return [{"x": row, "labels": row.sum()} for row in x]


def trainer(
    folder: Path, seed: int = 3, *, callback: Any = FlatLoraCallback, options: Any = None, **arguments: Any
) -> tuple[Trainer, NoiseController]:
    torch.manual_seed(0)
    model = Model()
    controller = apply_flat_lora(
        model, ["first", "second"], r=2, lora_dropout=0.1, backend="reference", verbose=False,
        **{"sigma": 0.5, "schedule": "cosine", "seed": seed, **(options or {})},
    )  # fmt: skip
    for layer in controller.layers:
        nn.init.normal_(layer.lora_B)
    return make(model, folder, [callback(controller)] if callback else [], **arguments), controller


def make(model: nn.Module, folder: Path, callbacks: list[Any], **arguments: Any) -> Trainer:
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 3,
        "learning_rate": 0.05, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 100,
        "output_dir": str(folder), **arguments,
    }  # fmt: skip
    given = TrainingArguments(**arguments)
    return Trainer(model, given, train_dataset=data(), eval_dataset=data()[:4], callbacks=callbacks)


def weights(found: Trainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in found.model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[n], right[n]) for n in left)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Other noise seed, other initial adapters: all that counts is in the checkpoint."""
    whole, controller = trainer(tmp_path)
    whole.train()
    assert controller.step == 6
    assert controller.sigma == controller.target_sigma == 0.5
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["FlatLoraCallback"]["attributes"]["saved"] == {"base": 3, "step": 3}

    for restore in (False, True):
        resumed, other = trainer(tmp_path, seed=99, restore_callback_states_from_checkpoint=restore)
        with torch.no_grad():
            resumed.model.first.lora_A.add_(1)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert (other.base, other.step, other.sigma) == (3, 6, 0.5)
        assert same(weights(resumed), weights(whole)), f"restore={restore}"

    other_noise, _ = trainer(tmp_path / "other", seed=4)
    other_noise.train()
    assert not same(weights(other_noise), weights(whole)), "the noise matters"


@pytest.mark.parametrize(
    "exported, message",
    [
        ({"attributes": {"saved": {"base": 3, "step": -1}}}, "expected 0 <= step"),
        ({"attributes": {"saved": {"base": 3}}}, "expected the keys 'base' and 'step'"),
        ({"attributes": {"saved": {"base": "3", "step": 1}}}, "expected an int as 'base', got str"),
        ({"attributes": {}}, "expected attributes with 'saved'"),
        ({"args": {}}, "expected attributes with 'saved'"),
        ("abc", "expected attributes with 'saved', got abc"),
    ],
)
def test_a_malformed_checkpoint_is_a_sentence(exported: Any, message: str, tmp_path: Path) -> None:
    found, controller = trainer(tmp_path, max_steps=2, save_strategy="no")
    callback = next(c for c in found.callback_handler.callbacks if isinstance(c, FlatLoraCallback))
    state = found.state
    state.global_step, state.max_steps = 2, 4
    state.stateful_callbacks["FlatLoraCallback"] = exported
    before = controller.state_dict()
    where = r"trainer_state.json: stateful_callbacks\['FlatLoraCallback'\]: "
    with pytest.raises((KeyError, TypeError, ValueError), match=where + message):
        callback.on_train_begin(found.args, state, found.control, model=found.model)
    assert controller.state_dict() == before


def test_a_trainer_without_the_callback_says_so(tmp_path: Path) -> None:
    found, controller = trainer(tmp_path, max_steps=4, save_strategy="no")
    found.callback_handler.callbacks = [
        c for c in found.callback_handler.callbacks if not isinstance(c, FlatLoraCallback)
    ]
    controller.total_steps = 4
    with pytest.warns(UserWarning, match="still at step 0: with schedule='cosine' no noise is drawn"):
        found.train()


def test_steps_are_the_optimisers(tmp_path: Path) -> None:
    """Four micro-batches a step, evaluation in the midst; the controller is found in the model."""
    seen: list[tuple[int, float, int]] = []

    class Recorder(FlatLoraCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((state.global_step, self.controller.sigma, self.controller.step))

    found, controller = trainer(
        tmp_path, callback=lambda _: Recorder(), options={"schedule": "linear"}, max_steps=4,
        gradient_accumulation_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="no",
    )  # fmt: skip
    found.train()
    assert seen == [(t, 0.5 * t / 4, t) for t in range(4)]
    assert controller.step == 4
    assert controller.sigma == 0.5
    found.train()
    assert seen[4:] == seen[:4], "a second training begins again"


def test_attached_is_not_advanced_twice(tmp_path: Path) -> None:
    found, controller = trainer(tmp_path, max_steps=2, save_strategy="no")
    found.create_optimizer()
    controller.attach(found.optimizer)
    found.train()
    assert controller.step == 2


def test_skipped_steps_advance_nothing() -> None:
    controller = NoiseController()
    callback = FlatLoraCallback(controller)

    class Optimizer:
        step_was_skipped = True

    callback.on_step_end(None, None, None, optimizer=Optimizer())
    assert controller.step == 0
    callback.on_step_end(None, None, None, optimizer=object())
    assert controller.step == 1


def test_resumes_from_its_own_state() -> None:
    """Seed and step, which skipped steps keep below the Trainer's, without what FlatLoraLinear saves of them."""
    model = nn.Sequential(nn.Linear(6, 8))
    controller = apply_flat_lora(model, ["0"], seed=9, backend="reference", verbose=False)
    exported = FlatLoraCallback(NoiseController(seed=3)).state()
    exported["attributes"]["saved"]["step"] = 2
    state = SimpleNamespace(stateful_callbacks={"FlatLoraCallback": exported}, global_step=3, max_steps=6)
    FlatLoraCallback(controller).on_train_begin(SimpleNamespace(report_to=[]), state, None, model=model)
    assert (controller.base, controller.step, controller.total_steps) == (3, 2, 6)


def test_resume_from_a_checkpoint_without_noise(tmp_path: Path) -> None:
    plain, _ = trainer(tmp_path, callback=None, options={"schedule": "constant"})
    plain.train()
    resumed, controller = trainer(tmp_path, seed=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert controller.step == 6
    assert (tmp_path / "checkpoint-6").exists()


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="controller: expected a NoiseController, got float"):
        FlatLoraCallback(0.1)
    found, _ = trainer(tmp_path, callback=lambda _: FlatLoraCallback())
    found.model.first = FlatLoraLinear.from_linear(nn.Linear(6, 8), backend="reference")
    with pytest.raises(ValueError, match="share one NoiseController, got 2 layers with 2"):
        found.train()
    found, controller = trainer(tmp_path)
    found.add_callback(FlatLoraCallback(controller))
    with pytest.raises(ValueError, match="expected one FlatLoraCallback, got 2"):
        found.train()
    monkeypatch.setitem(sys.modules, "transformers.trainer_callback", None)
    monkeypatch.delitem(sys.modules, "flatlora_kernels.integrations.transformers")
    with pytest.raises(ImportError, match="pip install transformers"):
        import flatlora_kernels.integrations.transformers  # noqa: F401


# What the callback says: in logs, at the begin and at the end of training.


def a_module(name: str, monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> MagicMock:
    """In the place of a package that is asked for by its name."""
    module = MagicMock(spec=ModuleType, __spec__=importlib.machinery.ModuleSpec(name, None), **attributes)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def trackers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Trackers of the Trainer, and what each was told about the noise: {step, sigma, seed_step} a line."""
    names = ("flat_lora/sigma", "flat_lora/seed_step")
    wandb, mlflow = [], []
    a_module(
        "wandb", monkeypatch, run=MagicMock(), config=MagicMock(), define_metric=None, log=wandb.append,
        termwarn=print,
    )  # fmt: skip
    a_module("wandb.sdk.lib.config_util", monkeypatch, ConfigError=ValueError)
    a_module(
        "mlflow", monkeypatch, __version__="3.0", active_run=MagicMock(), end_run=print, log_params=MagicMock(),
        is_tracking_uri_set=lambda: True, get_tracking_uri=str,
        log_metrics=lambda metrics, step, **_: mlflow.append({**metrics, "step": step}),
        utils=SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100)
        ),
    )  # fmt: skip
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)

    def of_tensorboard() -> list[dict[str, Any]]:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        (file,) = tmp_path.rglob("events.out.tfevents.*")
        found = accumulator.EventAccumulator(str(file)).Reload()
        events = zip(*(found.Scalars(f"train/{name}") for name in names), strict=True)
        return [dict(zip(("step", *names), (a.step, a.value, b.value), strict=True)) for a, b in events]

    return {
        "wandb": lambda: [
            {"step": line["train/global_step"], **{n: line[f"train/{n}"] for n in names}}
            for line in wandb
            if "train/loss" in line
        ],
        "mlflow": lambda: [{n: line[n] for n in ("step", *names)} for line in mlflow if "loss" in line],
        "tensorboard": of_tensorboard,
    }


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from flatlora_kernels.integrations import transformers

    lines: list[str] = []
    monkeypatch.setattr(transformers.logger, "warning", lines.append)
    return lines


@pytest.mark.parametrize("order", ["given", "added later", "first of all"])
def test_logs_have_the_noise_of_the_step(
    trackers: dict[str, Callable[[], list[dict[str, Any]]]], order: str, tmp_path: Path, warned: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """In every tracker, the history and what is printed, wherever the callback stands; the first two steps' mean."""
    pytest.importorskip("tensorboard")
    found, controller = trainer(
        tmp_path, callback=FlatLoraCallback if order == "given" else None, options={"schedule": "linear"},
        report_to=list(trackers), logging_steps=2, eval_strategy="steps", eval_steps=3, disable_tqdm=False,
    )  # fmt: skip
    if order == "added later":
        found.add_callback(FlatLoraCallback(controller))
    elif order == "first of all":
        found.callback_handler.callbacks.insert(0, FlatLoraCallback(controller))
    found.train()
    expected = [
        {"step": step, "flat_lora/sigma": 0.5 * (step - 1) / 6, "flat_lora/seed_step": step - 1}
        for step in (2, 4, 6)
    ]
    history = [{n: line[n] for n in expected[0]} for line in found.state.log_history if "loss" in line]
    assert history == expected
    for name, told in trackers.items():
        assert [pytest.approx(line) for line in expected] == told(), name
    assert all("flat_lora/sigma" not in line for line in found.state.log_history if "loss" not in line)
    printed = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert len(printed) == 3 and re.search("'flat_lora/sigma': '?0[.]08333", printed[0])
    assert not any("will miss" in line for line in warned)


def test_logs_of_an_attached_controller_and_of_none(tmp_path: Path) -> None:
    """attach() moves the controller before the Trainer logs; disabled noise is none."""
    found, controller = trainer(tmp_path, max_steps=2, save_strategy="no", logging_steps=1)
    found.create_optimizer()
    controller.attach(found.optimizer)
    with controller.disabled():
        found.train()
    logged = [line for line in found.state.log_history if "loss" in line]
    assert [line["flat_lora/seed_step"] for line in logged] == [0, 1]
    assert [line["flat_lora/sigma"] for line in logged] == [0.0, 0.0]
    plain, _ = trainer(tmp_path, callback=None, max_steps=1, save_strategy="no", logging_steps=1)
    plain.train()
    assert not any("flat_lora/sigma" in line for line in plain.state.log_history)


def test_trackers_that_will_miss_the_noise_are_named(
    warned: list[str], trackers: dict[str, Any], tmp_path: Path
) -> None:
    """A Trainer that was made before the module was imported."""
    found, _ = trainer(tmp_path, max_steps=2, save_strategy="no", report_to=["wandb"])
    (first,) = (c for c in found.callback_handler.callbacks if type(c).__name__ == "_LogFirst")
    found.remove_callback(first)
    found.train()
    assert "wandb will miss flat_lora/sigma, because this Trainer was made before" in warned[0]
    assert sum("will miss" in line for line in warned) == 1


def test_the_end_of_training_says_that_noise_is_on(warned: list[str], tmp_path: Path) -> None:
    found, controller = trainer(
        tmp_path, max_steps=2, save_strategy="no", eval_strategy="steps", eval_steps=1
    )
    found.train()
    assert not found.model.training and warned == [], "an evaluation came last"
    found.args.eval_strategy = "no"
    found.train()
    assert found.model.training
    assert len(warned) == 1 and "call model.eval()" in warned[0] and "sigma = 0.5" in warned[0]
    controller.target_sigma = 0.0
    found.train()
    assert len(warned) == 1, "no noise"


def test_a_controller_of_another_model_is_refused(tmp_path: Path) -> None:
    found, own = trainer(tmp_path, callback=None)
    _, other = trainer(tmp_path, options={"sigma": 0.25})
    found.add_callback(FlatLoraCallback(other))
    with pytest.raises(ValueError) as raised:
        found.train()
    assert f"got {other!r}; of 2 noisy layers of this Model, 0 draw with it, the others with {own!r}" in str(
        raised.value
    )
    plain = make(Model(), tmp_path, [FlatLoraCallback(other)])
    with pytest.raises(ValueError, match="controller: expected .* of 0 noisy layers of this Model, 0 draw"):
        plain.train()


def test_a_controller_of_some_layers(tmp_path: Path) -> None:
    """Layers that nothing advances are refused, layers that another optimiser's hook advances are not."""
    found, controller = trainer(tmp_path, max_steps=1, save_strategy="no")
    found.model.first = FlatLoraLinear.from_linear(nn.Linear(6, 8), backend="reference")
    other = found.model.first.noise_controller
    with pytest.raises(
        ValueError, match="of 2 noisy layers of this Model, 1 draw with it, the others with Noise"
    ):
        found.train()
    optimizer = torch.optim.SGD(found.model.first.parameters())
    with other.attach(optimizer):
        found.train()
    assert controller.step == 1


# Settings in the place of a controller: the callback converts the model.


def peft_model() -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Model(), peft.LoraConfig(r=2, target_modules=["first", "second"], lora_dropout=0.1)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


SETTINGS = {"sigma": 0.5, "schedule": "cosine", "seed": 3, "backend": "reference"}


def converted_before(folder: Path, more: Any = None, **arguments: Any) -> Trainer:
    from flatlora_kernels.integrations import peft

    model = peft_model()
    controller = peft.apply_flat_lora(model, **SETTINGS, **(more or {}))
    return make(model, folder, [FlatLoraCallback(controller)], **arguments)


def noisy(model: nn.Module) -> list[NoisyLayer]:
    return [module for module in model.modules() if isinstance(module, NoisyLayer)]


def test_the_callback_converts_as_apply_flat_lora_does(tmp_path: Path) -> None:
    before = converted_before(tmp_path / "before")
    before.train()
    callback = FlatLoraCallback(**SETTINGS)
    found = make(peft_model(), tmp_path / "inside", [callback], logging_steps=2)
    assert not noisy(found.model)
    found.train()
    assert len(noisy(found.model)) == 2
    assert same(weights(found), weights(before))
    assert (callback.controller.step, callback.controller.sigma) == (6, 0.5)
    logged = [line["flat_lora/sigma"] for line in found.state.log_history if "loss" in line]
    assert logged == [0.5 * (1 - math.cos(math.pi * t / 6)) / 2 for t in (1, 3, 5)]

    plain = make(peft_model(), tmp_path / "plain", [])
    plain.train()
    assert not same(weights(found), weights(plain)), "the noise matters"

    first = callback.controller
    found.train()
    assert callback.controller is first and first.step == 6, (
        "a second training goes on with the first one's layers"
    )


def test_a_converting_run_can_be_resumed(tmp_path: Path) -> None:
    settings = {**SETTINGS, "exclude_modules": ("second",)}
    whole = make(peft_model(), tmp_path, [FlatLoraCallback(**settings)])
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-3")
    for restore in (False, True):
        given = FlatLoraCallback(**{**settings, "seed": 99})
        resumed = make(peft_model(), tmp_path, [given], restore_callback_states_from_checkpoint=restore)
        resumed.train(resume_from_checkpoint=checkpoint)
        assert same(weights(resumed), weights(whole)), f"restore={restore}"


def test_what_no_checkpoint_holds_is_not_lost_silently(tmp_path: Path) -> None:
    settings = {**SETTINGS, "schedule": lambda step: 0.5}
    whole = make(peft_model(), tmp_path, [FlatLoraCallback(**settings)])
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-3")
    resumed = make(peft_model(), tmp_path, [FlatLoraCallback(**settings)])
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(weights(resumed), weights(whole))
    anew = make(
        peft_model(), tmp_path, [FlatLoraCallback(**settings)], restore_callback_states_from_checkpoint=True
    )
    with pytest.raises(ValueError, match="schedule: expected values that fit into a checkpoint"):
        anew.train(resume_from_checkpoint=checkpoint)


def test_a_controller_among_the_settings(tmp_path: Path) -> None:
    """For what only a controller has, the rank for one."""
    controller = NoiseController(sigma=0.5, seed=3, rank=1)
    callback = FlatLoraCallback(noise_controller=controller, backend="reference", exclude_modules=["second"])
    found = make(peft_model(), tmp_path, [callback], max_steps=2)
    found.train()
    assert [layer.noise_controller for layer in noisy(found.model)] == [controller]
    assert controller.step == 2


def test_a_model_made_anew_is_converted_anew(tmp_path: Path) -> None:
    callback = FlatLoraCallback(**SETTINGS)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )  # fmt: skip
    found = Trainer(args=arguments, model_init=peft_model, train_dataset=data(), callbacks=[callback])
    found.train()
    first = weakref.ref(callback.controller)
    found.train()
    assert callback.controller.step == 2
    assert len(callback.controller.layers) == 2
    assert first() is not callback.controller


@pytest.mark.parametrize("wrapped", ["before", "by the Trainer"])
def test_compiled_models(wrapped: str, tmp_path: Path) -> None:
    """The names in exclude_modules are those of the model inside."""
    exclude = {"exclude_modules": "second"}
    before = converted_before(tmp_path / "before", exclude, max_steps=3)
    before.train()
    model = peft_model()
    options = {"torch_compile": True, "torch_compile_backend": "eager"} if wrapped == "by the Trainer" else {}
    given = torch.compile(model, backend="eager") if wrapped == "before" else model
    found = make(
        given, tmp_path, [FlatLoraCallback(**SETTINGS, **exclude)], max_steps=3, save_strategy="no",
        label_names=["labels"], remove_unused_columns=False, **options,
    )  # fmt: skip
    found.model_accepts_loss_kwargs = False  # the wrapper's forward seems to take everything
    found.train()
    assert len(noisy(model)) == 1
    got = {n.removeprefix("_orig_mod."): w for n, w in weights(found).items()}
    expected = weights(before)
    assert list(got) == list(expected)
    assert all(torch.allclose(got[n], expected[n], rtol=1e-5, atol=1e-6) for n in got)


def test_errors_of_settings(tmp_path: Path) -> None:
    for settings, error, message in (
        (
            {"sigmaa": 1},
            TypeError,
            "sigmaa: expected one of adapters, antithetic, backend, .*sigma, .* got an unknown name",
        ),
        ({"stream": 1}, TypeError, "stream: expected one of"),
        ({"noise_controller": 0.1}, TypeError, "noise_controller: expected a NoiseController, got float"),
        ({"sigma": -1.0}, ValueError, "sigma: expected a finite float >= 0"),
        ({"schedule": "sine"}, ValueError, "schedule: expected 'constant'"),
        ({"noise": "uniform"}, ValueError, "noise: expected 'gaussian'"),
        ({"samples": 0}, ValueError, "samples: expected an int >= 1"),
        (
            {"controller": NoiseController(seed=1), "sigma": 0.1, "noise": "gaussian"},
            ValueError,
            r"controller: expected None beside sigma, noise, .* got NoiseController\(",
        ),
    ):
        with pytest.raises(error, match=message):
            FlatLoraCallback(**settings)
    with pytest.raises(
        ValueError, match=r"model: .*FlatLoraCallback\(sigma.* got Model without; any other model"
    ):
        make(Model(), tmp_path, [FlatLoraCallback(sigma=0.1)]).train()
    with pytest.raises(RuntimeError, match="FlatLoraCallback: expected on_train_begin first"):
        FlatLoraCallback(sigma=0.1).on_step_end(None, None, None)
