"""`FlatLoraLinear`: one promise a test."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    Net,
    all_equal,
    calls_of,
    gradients,
    layers,
    model_and_controller,
    noise_scale_now,
    small_layer,
    small_model,
    train,
    trainable,
)
from targets import Target, randn
from torch import nn

import flatlora_kernels as fk
from flatlora_kernels import FlatLoraLinear, NoiseController


def test_is_the_op_with_its_own_arguments(
    target: Target, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = small_layer(device=target.device, noise=noise, stream=5, lora_alpha=6, backend=target.backend)
    x = randn(3, 7, 40, device=target.device)
    expected = fk.fused_flat_lora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scaling=1.5, sigma=0.3,
        seed=layer.noise_controller.value, stream=5, noise=noise, backend=target.backend,
    )  # fmt: skip
    calls = []
    for name in ("product", "perturb", "transform"):
        original = getattr(target.module, name)
        logged = lambda *args, original=original: calls.append(1) or original(*args)  # noqa: E731
        monkeypatch.setattr(target.module, name, logged)
    torch.testing.assert_close(layer(x), expected)
    assert calls, "the layer's own backend"


def test_from_linear_shares_and_freezes() -> None:
    linear = nn.Linear(12, 8).eval()
    layer = FlatLoraLinear.from_linear(linear, r=3, backend="reference")
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert not layer.training, "the mode of the linear is kept"
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert layer.lora_A.shape == (3, 12)
    assert layer.lora_B.shape == (8, 3)
    assert FlatLoraLinear.from_linear(nn.Linear(4, 4, bias=False), backend="reference").bias is None


def test_starts_at_no_change_with_the_initialisation_of_peft() -> None:
    torch.manual_seed(1)
    linear = nn.Linear(64, 8)
    torch.manual_seed(2)
    expected = nn.init.kaiming_uniform_(torch.empty(5, 64), a=math.sqrt(5))
    torch.manual_seed(2)
    layer = FlatLoraLinear.from_linear(linear, r=5, backend="reference").eval()
    assert torch.equal(layer.lora_A, expected)
    assert not layer.lora_B.any()
    assert layer.scaling == 16 / 5
    x = randn(3, 64)
    torch.testing.assert_close(layer(x), linear(x))


@pytest.mark.parametrize(
    "base, adapter",
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_adapter_dtype(base: torch.dtype, adapter: torch.dtype) -> None:
    layer = small_layer(dtype=base)
    assert (layer.lora_A.dtype, layer.lora_B.dtype) == (adapter, adapter)
    y = layer(randn(3, 40, dtype=base))
    y.float().sum().backward()
    assert y.dtype == base
    assert layer.lora_A.grad.dtype == adapter


def test_adapter_dtype_can_be_chosen() -> None:
    layer = FlatLoraLinear.from_linear(nn.Linear(8, 8).bfloat16(), dtype=torch.bfloat16, backend="reference")
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16


def test_noise_in_training_mode_only() -> None:
    layer = small_layer()
    x = randn(5, 40)
    plain = F.linear(x, layer.weight + layer.scaling * layer.lora_B @ layer.lora_A, layer.bias)
    torch.testing.assert_close(layer.eval()(x), plain)
    assert not torch.allclose(layer.train()(x), plain, atol=1e-2)


def test_sigma_zero_is_plain_lora() -> None:
    layer = small_layer(sigma=0.0)
    assert layer.noise_scale is None
    x = randn(5, 40)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_sigma_may_be_assigned() -> None:
    layer, x = small_layer(), randn(5, 40)
    noisy = layer(x)
    before = layer.noise_scale
    layer.noise_controller.target_sigma = 0.6
    torch.testing.assert_close(layer.noise_scale, small_layer(sigma=0.6).noise_scale)
    assert layer.noise_scale is before, "in place"
    layer.noise_controller.target_sigma = 0.0
    assert torch.equal(layer(x), layer.eval()(x))
    layer.train().noise_controller.target_sigma = 0.3
    assert torch.equal(layer(x), noisy)


def test_dropout_reaches_the_adapter_alone() -> None:
    layer = small_layer(lora_dropout=0.5, sigma=0.0)
    x = randn(64, 40)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    plain = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, plain + layer.scaling * dropped @ layer.lora_A.t() @ layer.lora_B.t())
    assert not torch.allclose(y, layer.eval()(x))
    assert torch.equal(layer(x), layer(x)), "no dropout in eval mode"


@pytest.mark.parametrize("antithetic", [False, True])
def test_samples_see_noise_of_their_own(antithetic: bool) -> None:
    layer = small_layer(samples=2, antithetic=antithetic)
    row = randn(1, 40)
    quiet = layer.eval()(row)
    first, second = layer.train()(row.repeat(2, 1)) - quiet
    assert not torch.allclose(first, second)
    assert torch.allclose(first, -second, atol=1e-5) == antithetic
    assert layer.eval()(row.repeat(3, 1)).shape == (3, 24), "groups are of no account in eval mode"


def test_samples_batch_is_a_draw_per_sequence() -> None:
    model, controller = model_and_controller(samples="batch")
    layer, x = model[0], randn(1, 5, 6)
    y = layer(x.expand(3, 5, 6))
    quiet = layer.eval()(x)[0]
    layer.train()
    assert not torch.allclose(y[0], y[1], atol=1e-2)
    torch.testing.assert_close(layer(x)[0], y[0])
    for i, offset in enumerate((0, 1, 2)):
        controller.sample_offset = offset
        torch.testing.assert_close(layer(x)[0], y[i])
    assert layer(x[0, 0]).shape == (8,)
    assert not torch.allclose(y[0], quiet, atol=1e-2)
    controller.sample_offset = 0
    layer.antithetic = True
    pair = layer(x.expand(2, 5, 6))
    torch.testing.assert_close(pair[0] + pair[1], 2 * quiet)


def test_samples_batch_compiles_in_one_graph() -> None:
    model, controller = model_and_controller(samples="batch")
    controller.advance()  # compiled code does not see by itself that lora_B was set
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(3):
            x = randn(3, 5, 6, seed=t)
            torch.testing.assert_close(compiled(x), model(x))
            controller.advance()


def test_full_fine_tuning_without_an_adapter() -> None:
    model, controller = model_and_controller(r=0, train_weight=True)
    layer, x = model[0], randn(4, 6)
    assert layer.lora_A is None
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == [
        "0.bias", "0.weight", "2.bias", "2.weight",
    ]  # fmt: skip
    eps = fk.materialize_noise(layer.noise_scale, 6, seed=controller.value, stream=0, backend="reference")
    torch.testing.assert_close(layer(x), x @ (layer.weight + eps).t() + layer.bias)
    controller.attach(optimizer := torch.optim.SGD(trainable(model), lr=0.1))
    before = layer.noise_scale.clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert layer.weight.grad is not None
    assert not torch.equal(layer.noise_scale, before), "norms of the weights of now"
    quiet = layer.eval()(x)
    layer.merge()
    torch.testing.assert_close(layer(x), quiet)
    layer.unmerge()
    assert layer.weight.requires_grad


def test_auxiliary_adapter_in_training_mode_only() -> None:
    model, _ = model_and_controller(sigma=0.0)
    layer, x = model[0], randn(4, 6)
    y = layer(x)
    A, B = randn(3, 6, seed=2), randn(8, 3, seed=3)
    layer.auxiliary = (A, B)
    torch.testing.assert_close(layer(x), y + layer.scaling * x @ A.t() @ B.t())
    torch.testing.assert_close(layer.eval()(x), y)


def test_noise_can_be_taken_off_and_put_on() -> None:
    model, controller = model_and_controller()
    layer = model[0]
    layer._remove_noise()
    assert controller.layers == (model[2],)
    assert layer.noise_scale is None
    layer._set_up_noise(controller, backend="reference")
    assert layer.stream == 2
    assert len(controller.layers) == 2


@pytest.mark.parametrize(
    "option, value, error",
    [
        ("r", -1, ValueError),
        ("r", 2.0, TypeError),
        ("sigma", -0.1, ValueError),
        ("sigma", float("nan"), ValueError),
        ("sigma", torch.tensor(0.1), TypeError),
        ("noise", "uniform", ValueError),
        ("stream", -1, ValueError),
        ("samples", 0, ValueError),
        ("samples", "rows", ValueError),
        ("backend", "nonesuch", ValueError),
        ("dtype", torch.float64, TypeError),
    ],
)
def test_bad_options(option: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{option}: expected"):
        FlatLoraLinear.from_linear(nn.Linear(8, 8), **{option: value})


def test_bad_sources() -> None:
    with pytest.raises(TypeError, match="linear: expected an nn.Linear, got Conv2d"):
        FlatLoraLinear.from_linear(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="weight: expected shape"):
        FlatLoraLinear(torch.zeros(3))
    with pytest.raises(ValueError, match="sigma: expected"):
        small_layer().noise_controller.target_sigma = -1.0


# noise_scale


def test_noise_scale_is_refreshed_once_per_step_by_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, controller = small_model()
    x = randn(6, 16)
    reads = calls_of("flat_noise_scale", monkeypatch)
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    for step in range(1, 3):
        for _ in range(4):  # micro-batches
            model(x).sum().backward()
        optimizer.step()
        controller.advance()
        assert len(reads) == 3 * step
    for layer in layers(model):
        expected = fk.flat_noise_scale(
            layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling, sigma=0.3, backend="reference"
        )
        torch.testing.assert_close(layer.noise_scale, expected)


def test_without_noise_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, controller = small_model(sigma=0.0)
    monkeypatch.setattr(fk.train.layer, "flat_noise_scale", None)
    controller.advance()
    assert model(randn(2, 16)).shape == (2, 3)


@pytest.mark.filterwarnings("ignore:.*is being trained, and its NoiseController")
def test_changed_parameters_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written in place, replaced, exchanged through .data, scaled: the next forward measures anew, once."""
    model, _ = model_and_controller()
    layer, x = model[0], randn(4, 6)

    def in_place() -> None:
        layer.lora_B.mul_(3)

    def replaced() -> None:
        layer.lora_B = nn.Parameter(torch.randn_like(layer.lora_B))

    def wrapped_again() -> None:  # the address and the version of the old one
        layer.lora_B.data.mul_(3)
        before = layer.lora_B
        layer.lora_B = nn.Parameter(before.data)
        assert (layer.lora_B._version, layer.lora_B.data_ptr()) == (before._version, before.data_ptr())

    def through_data() -> None:
        layer.weight.data = layer.weight.data * 2

    def scaled() -> None:
        layer.scaling *= 2

    layer(x)
    reads = calls_of("flat_noise_scale", monkeypatch)
    for i, change in enumerate((in_place, replaced, wrapped_again, through_data, scaled), 1):
        with torch.no_grad():
            change()
        for _ in range(2):
            layer(x)
        assert len(reads) == i, change.__name__
        torch.testing.assert_close(layer.noise_scale, noise_scale_now(layer, 0.4))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_noise_scale_computed_beside_the_forward(device: str) -> None:
    """`overlap` changes no bit: layers wait for their own, also where sigma is set and a layer is copied meanwhile."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8))).to(device)
        seed = fk.apply_flat_lora(model, r".*", r=4, sigma=0.1, seed=3, verbose=False)
        for layer in model:
            torch.nn.init.normal_(layer.lora_B)
        models.append((model, seed))
    x = torch.randn(64, 512, device=device)
    for step in range(3):
        outputs = []
        for (model, seed), overlap in zip(models, (False, True), strict=True):
            with torch.no_grad():
                for layer in model:
                    layer.lora_B.mul_(1.5)
            seed.advance(overlap=overlap)
            if step == 1:
                seed.target_sigma = 0.2
            if step == 2:
                copied = copy.deepcopy(model)
                assert torch.equal(copied[5].noise_scale, model[5].noise_scale)
            outputs.append(model(x))
        assert torch.equal(*outputs)
    scales = [torch.stack([layer.noise_scale for layer in model]) for model, _ in models]
    assert torch.equal(*scales)


# state_dict, copies and moves


def test_resume_draws_what_the_interrupted_run_would_have_drawn() -> None:
    first, rest = ([randn(6, 16, seed=t) for t in steps] for steps in (range(3), range(3, 6)))
    model, controller = small_model(noise_controller=NoiseController(seed=2**63 + 12345, sigma=0.3))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, optimizer, first, controller)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(model, optimizer, rest, controller)

    torch.manual_seed(77)
    resumed, resumed_seed = small_model(noise_controller=NoiseController(seed=0, sigma=0.3))
    optimizer = torch.optim.AdamW(trainable(resumed), lr=1e-2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"], strict=True)
    optimizer.load_state_dict(saved["optimizer"])
    assert (resumed_seed.base, resumed_seed.step) == (2**63 + 12345, 3)
    assert train(resumed, optimizer, rest, resumed_seed) == expected


def test_state_dict_is_small_and_shares_nothing() -> None:
    model, _ = small_model()
    plain, state = Net().state_dict(), model.state_dict()
    added = {k.rpartition(".")[2]: v for k, v in state.items() if k not in plain}
    assert sorted(added) == ["_extra_state", "lora_A", "lora_B"]
    assert set(plain) <= set(state), "base weights keep their names"
    assert (added["_extra_state"].dtype, added["_extra_state"].shape) == (torch.int64, (3,))
    pointers = [v.data_ptr() for v in state.values()]
    assert len(set(pointers)) == len(pointers), "safetensors refuses shared memory"


def test_stream_is_restored() -> None:
    saved = small_layer(stream=7)
    layer = small_layer(stream=0)
    layer.load_state_dict(saved.state_dict())
    assert layer.stream == 7
    assert torch.equal(layer(randn(3, 40)), saved(randn(3, 40)))


def test_loading_weights_alone_refreshes_noise_scale() -> None:
    layer = small_layer()
    before = layer.noise_scale.clone()
    layer.load_state_dict({"lora_B": 2 * layer.lora_B.detach()}, strict=False)
    assert (layer.noise_scale > before).all()
    assert layer.noise_controller.step == 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str) -> None:
    model, controller = small_model()
    controller.advance()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x = randn(6, 16)
    assert all_equal(gradients(twin, x), gradients(model, x))
    (twin_seed,) = {layer.noise_controller for layer in layers(twin)}
    assert twin_seed is not controller
    twin_seed.advance()
    assert (twin_seed.step, controller.step) == (2, 1)
    assert not torch.allclose(twin(x), model(x), atol=1e-3)
    controller.advance()
    assert all_equal(gradients(twin, x), gradients(model, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_to_dtype(dtype: torch.dtype) -> None:
    layer = small_layer().to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.noise_scale.dtype == torch.float32
    assert layer.noise_controller.tensor("cpu").dtype == torch.int64
    y = layer(randn(3, 40, dtype=dtype))
    y.sum().backward()
    torch.testing.assert_close(y.float(), small_layer()(randn(3, 40)), rtol=0.05, atol=0.1)


def test_to_device_and_back_from_meta() -> None:
    saved = small_layer()
    layer = small_layer().to("meta")
    assert layer.noise_scale.is_meta
    assert layer.lora_A.is_meta
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(saved.state_dict())
    assert torch.equal(layer(randn(3, 40)), saved(randn(3, 40)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_to_gpu() -> None:
    layer = small_layer()
    x = randn(3, 40)
    expected = layer(x)
    layer.cuda()
    layer.noise_controller.advance()
    layer.noise_controller.move_to(layer.noise_controller.base, 0)
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


def test_autocast() -> None:
    layer, x = small_layer(), randn(6, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)


def test_unfrozen_weight_gets_its_gradient() -> None:
    layer = small_layer().requires_grad_(True)
    x = randn(6, 40)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(24, 40))
    assert layer.bias.grad is not None


def test_compile_in_one_graph_without_recompiling() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    layer = small_layer()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = randn(6, 40).requires_grad_()
    seen = []
    for step in range(4):
        inputs = [x, *trainable(layer)]
        y = compiled(x)
        got = torch.autograd.grad(y.square().sum(), inputs)
        expected = torch.autograd.grad(layer(x).square().sum(), inputs)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)
        seen.append(y.detach())
        layer.noise_controller.advance()
        layer.noise_controller.target_sigma = 0.3 + 0.1 * step
    assert counter.frame_count == 1
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(seen, seen[1:], strict=False))


# merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_merge_and_unmerge(dtype: torch.dtype) -> None:
    layer = small_layer(dtype=dtype).eval()
    x = randn(6, 40, dtype=dtype)
    original, before, y = layer.weight, layer.weight.clone(), layer(x)
    layer.merge()
    compute = torch.promote_types(dtype, torch.float32)
    update = layer.scaling * (layer.lora_B.to(compute) @ layer.lora_A.to(compute))
    torch.testing.assert_close(layer.weight.data, (before.to(compute) + update).to(dtype))
    assert layer.merged
    assert not layer.weight.requires_grad
    once = layer.weight
    layer.merge()
    assert layer.weight is once, "merging twice changes nothing"
    # The weight is rounded once to its type, and K = 40 of them add up.
    tolerance = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(layer(x), y, **tolerance)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged
    assert layer.weight is original
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), y)


def test_training_while_merged_is_an_error() -> None:
    layer = small_layer()
    layer.merge()
    with pytest.raises(RuntimeError, match=r"merged.*unmerge\(\)"):
        layer(randn(2, 40))


def test_state_dict_while_merged_is_that_of_the_parts() -> None:
    layer = small_layer()
    expected = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.merge()
    state = layer.state_dict()
    assert all(torch.equal(state[k], v) for k, v in expected.items())
    with pytest.raises(RuntimeError, match=r"merged.*unmerge\(\)"):
        layer.load_state_dict(state)


def test_advance_while_merged_reads_the_parts() -> None:
    layer = small_layer()
    expected = layer.noise_scale.clone()
    layer.merge()
    layer.noise_controller.advance()
    assert torch.equal(layer.noise_scale, expected)


def test_moving_and_copying_while_merged() -> None:
    layer = small_layer().eval()
    layer.merge()
    twin = copy.deepcopy(layer).double()
    assert twin.merged
    x = randn(3, 40, dtype=torch.float64)
    twin_merged = twin(x)
    twin.unmerge()
    assert twin.weight.dtype == torch.float64
    torch.testing.assert_close(twin(x), twin_merged)
    layer.unmerge()
    assert torch.equal(layer.weight, twin.weight.float())
