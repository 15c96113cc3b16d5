"""`FlatLoraLinear`, its `NoiseController` and `apply_flat_lora`: one promise a test."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from targets import Target, randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flatlora_kernels as fk
from flatlora_kernels import FlatLoraLinear, NoiseController, apply_flat_lora
from flatlora_kernels.train.controller import _mix


def small_layer(
    in_features: int = 40, out_features: int = 24, *, dtype: torch.dtype = torch.float32, **options
) -> FlatLoraLinear:
    """A layer with an adapter that does something, on the reference backend unless told otherwise."""
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, dtype=dtype)
    own = {} if "noise_controller" in options else {"sigma": 0.3}
    layer = FlatLoraLinear.from_linear(linear, **{"r": 4, "backend": "reference", **own, **options})
    nn.init.normal_(layer.lora_B)
    layer.refresh_noise_scale()
    return layer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.block = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.tanh(self.first(x))))


def small_model(sigma: float = 0.3, **options) -> tuple[Net, NoiseController]:
    torch.manual_seed(0)
    model = Net()
    options = {"r": 4, "backend": "reference", "verbose": False, **options}
    if "noise_controller" not in options:
        options["sigma"] = sigma
    controller = apply_flat_lora(model, ["first", "block.0", "block.2"], **options)
    for layer in layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
        layer.refresh_noise_scale()
    return model, controller


def layers(model: nn.Module) -> list[FlatLoraLinear]:
    return [m for m in model.modules() if isinstance(m, FlatLoraLinear)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), trainable(model)))


def all_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


# The layer


def test_is_the_op_with_its_own_arguments(
    target: Target, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = small_layer(noise=noise, stream=5, lora_alpha=6, backend=target.backend).to(target.device)
    x = randn(3, 7, 40, device=target.device)
    expected = fk.fused_flat_lora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scaling=1.5, sigma=0.3,
        seed=layer.noise_controller.value, stream=5, noise=noise, backend=target.backend,
    )  # fmt: skip
    calls = []
    original = target.module.linear
    monkeypatch.setattr(target.module, "linear", lambda *args: calls.append(1) or original(*args))
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
    reads = []
    original = fk.train.layer.flat_noise_scale
    monkeypatch.setattr(
        fk.train.layer, "flat_noise_scale", lambda *a, **k: reads.append(1) or original(*a, **k)
    )
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


# The seed


def test_equal_on_all_ranks_unless_asked() -> None:
    torch.manual_seed(11)
    here, there, elsewhere = NoiseController(), NoiseController(), NoiseController(rank=1)
    assert here.base == 11
    for _ in range(3):
        assert here.value == there.value != elsewhere.value
        for seed in (here, there, elsewhere):
            seed.advance()
    with pytest.raises(TypeError, match="seed: expected an int"):
        NoiseController(seed=1.5)
    with pytest.raises(ValueError, match="rank: expected"):
        NoiseController(rank=-1)


def test_seeds_differ_by_step_base_and_rank() -> None:
    values = set()
    for base in (0, 1, 2**63, 2**64 - 1):
        for rank in range(4):
            seed = NoiseController(seed=base, rank=rank)
            for _ in range(100):
                values.add(seed.value)
                seed.advance()
    assert len(values) == 4 * 4 * 100
    assert all(0 <= v < 2**64 for v in values)
    bits = [sum(v >> bit & 1 for v in values) for bit in range(64)]
    # 1,600 fair coins have a standard deviation of 20: five of them, at 64 bits, fail 4e-5 of all bases.
    assert max(abs(b - 800) for b in bits) < 100


def test_seed_tensor_has_all_64_bits_and_is_overwritten_in_place() -> None:
    seed = NoiseController(seed=7)
    tensor = seed.tensor("cpu")
    assert (tensor.dtype, tensor.shape) == (torch.int64, ())
    signs = set()
    for _ in range(8):
        assert seed.tensor(torch.device("cpu")) is tensor
        assert tensor.item() % 2**64 == seed.value
        signs.add(tensor.item() < 0)
        seed.advance()
    assert signs == {False, True}


def test_global_generators_are_not_advanced() -> None:
    torch.manual_seed(5)
    linear = nn.Linear(16, 8)
    expected = torch.get_rng_state()
    controller = NoiseController()
    assert torch.equal(torch.get_rng_state(), expected)
    layer = FlatLoraLinear.from_linear(linear, noise_controller=controller, backend="reference")
    expected = torch.get_rng_state()  # the initialisation of lora_A does draw
    for _ in range(2):
        layer(randn(3, 16)).sum().backward()
        controller.advance()
    layer.merge()
    layer.unmerge()
    assert torch.equal(torch.get_rng_state(), expected)
    assert torch.initial_seed() == 5


def test_advance_changes_the_noise_and_nothing_else_does() -> None:
    model, controller = small_model()
    x = randn(6, 16)
    first = model(x)
    assert torch.equal(model(x), first)
    torch.manual_seed(99)
    assert torch.equal(model(x), first)
    controller.advance()
    assert not torch.allclose(model(x), first, atol=1e-3)


def test_layers_draw_different_noise() -> None:
    controller = NoiseController(seed=1)
    one, two = (small_layer(noise_controller=controller, stream=s) for s in (0, 1))
    x = randn(5, 40)
    assert torch.equal(one.eval()(x), two.eval()(x))
    assert not torch.allclose(one.train()(x), two.train()(x), atol=1e-2)


def test_gradient_accumulation_sees_one_noise() -> None:
    model, _ = small_model()
    x = randn(8, 16)
    whole = gradients(model, x)
    model.zero_grad()
    for part in x.chunk(4):
        model(part).square().sum().backward()
    for p, expected in zip(trainable(model), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_sees_the_same_noise(use_reentrant: bool) -> None:
    model, controller = small_model(lora_dropout=0.2)
    x = randn(6, 16).requires_grad_()
    for _ in range(2):
        results = []
        for run in (model, lambda t: checkpoint(model, t, use_reentrant=use_reentrant)):
            model.zero_grad()
            x.grad = None
            torch.manual_seed(4)  # dropout's
            run(x).square().sum().backward()
            results.append([x.grad, *(p.grad for p in trainable(model))])
        assert all_equal(*results)
        controller.advance()


def test_backward_after_advance_is_an_error() -> None:
    model, controller = small_model()
    loss = model(randn(2, 16).requires_grad_()).sum()
    controller.advance()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_seeds_never_change() -> None:
    """A run resumed by another version must draw what it drew."""
    # First outputs of the published SplitMix64 from states 0 and 1234567.
    assert _mix(0) == 0xE220A8397B1DCDAF
    assert _mix(1234567) == 6457827717110365317
    seed = NoiseController(seed=2**64 - 1, rank=3)
    assert NoiseController(seed=0).value == 2558736989570252433
    seed.advance()
    assert seed.value == 14826025096241840780


# state_dict, copies and moves


def train(
    model: Net, controller: NoiseController, optimizer: torch.optim.Optimizer, steps: range
) -> list[float]:
    losses = []
    for step in steps:
        loss = model(randn(6, 16, seed=step)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.advance()
        losses.append(loss.item())
    return losses


def test_resume_draws_what_the_interrupted_run_would_have_drawn() -> None:
    model, controller = small_model(noise_controller=NoiseController(seed=2**63 + 12345, sigma=0.3))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, controller, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(model, controller, optimizer, range(3, 6))

    torch.manual_seed(77)
    resumed, resumed_seed = small_model(noise_controller=NoiseController(seed=0, sigma=0.3))
    optimizer = torch.optim.AdamW(trainable(resumed), lr=1e-2)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"], strict=True)
    optimizer.load_state_dict(saved["optimizer"])
    assert (resumed_seed.base, resumed_seed.step) == (2**63 + 12345, 3)
    assert train(resumed, resumed_seed, optimizer, range(3, 6)) == expected


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


# apply_flat_lora


@pytest.mark.parametrize(
    "pattern, expected",
    [
        (["first", "2"], ["first", "block.2"]),
        (("block.0",), ["block.0"]),
        (r"block\.\d", ["block.0", "block.2"]),
        (r".*", ["first", "block.0", "block.2", "head"]),
    ],
)
def test_patterns_and_streams(pattern, expected: list[str]) -> None:  # type: ignore[no-untyped-def]
    model = Net()
    controller = apply_flat_lora(model, pattern, r=2, backend="reference", verbose=False)
    found = {n: m for n, m in model.named_modules() if isinstance(m, FlatLoraLinear)}
    assert list(found) == expected
    assert [m.stream for m in found.values()] == list(range(len(expected)))
    assert {m.noise_controller for m in found.values()} == {controller}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == [f"{n}.lora_{ab}" for n in expected for ab in "AB"]


@pytest.mark.parametrize("pattern", [["irst"], "block", [], r"first\.weight"])
def test_no_match_is_an_error(pattern) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"target_modules: .* none of 4 \(first, block.0, block.2, head\)"):
        apply_flat_lora(Net(), pattern)


def test_layers_that_would_miss_the_adapter_are_refused() -> None:
    encoder = nn.TransformerEncoderLayer(16, 2, 32)
    for pattern in (["out_proj"], ["linear1"]):
        with pytest.raises(ValueError, match="reads its weight directly"):
            apply_flat_lora(encoder, pattern, backend="reference")
    assert not layers(encoder), "refused before anything is replaced"


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(*sizes: int) -> nn.Linear:
    linear = nn.Linear(*sizes)
    linear.register_forward_hook(lambda *_: None)
    return linear


def flattened(*sizes: int) -> nn.Linear:
    linear = nn.Linear(*sizes)
    linear.weight = nn.Parameter(linear.weight.detach().flatten())
    return linear


@pytest.mark.parametrize(
    "make, why",
    [
        (flattened, "shape .64,."),
        (Doubled, "Doubled has a forward of its own"),
        (hooked, "hooks"),
        (lambda *n: nn.utils.parametrizations.weight_norm(nn.Linear(*n)), "its weight is a Tensor"),
        (lambda *n: nn.Linear(*n).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_linears_that_are_not_plain_are_refused(make: Any, why: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), make(8, 8))
    with pytest.raises(ValueError, match=f"target_modules: .* got '1': .*{why}"):
        apply_flat_lora(model, ["0", "1"])
    assert not layers(model), "refused before anything is replaced"


def test_shards_are_refused() -> None:
    """As FSDP leaves them outside of a forward."""
    layer = FlatLoraLinear.from_linear(nn.Linear(8, 8), backend="reference")
    layer.weight = nn.Parameter(layer.weight.detach().flatten()[:32], requires_grad=False)
    with pytest.raises(RuntimeError, match=r"FlatLoraLinear: expected a whole weight.*shape \(32,\); FSDP"):
        layer.noise_controller.advance()


def test_second_call_adds_to_the_first() -> None:
    model = Net()
    first = apply_flat_lora(model, ["first"], r=2, backend="reference", verbose=False)
    second = apply_flat_lora(model, [r"block.0"], r=3, backend="reference", verbose=False)
    assert first is second
    assert [(m.r, m.stream) for m in layers(model)] == [(2, 0), (3, 1)]
    assert model.first.lora_A.requires_grad


def test_shared_linear_stays_one_layer() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    apply_flat_lora(model, ".*", r=2, backend="reference", verbose=False)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], FlatLoraLinear)


def test_prints_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = Net()
    apply_flat_lora(model, ["first"], r=2, backend="reference")
    total = sum(p.numel() for p in model.parameters())
    printed = capsys.readouterr().out
    assert f"{2 * (16 + 24)} of {total:,}" in printed
    assert fk.print_trainable_parameters(model) == (80, total)
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_training_lowers_the_loss(target: Target, sigma: float) -> None:
    model, controller = small_model(sigma=sigma, backend=target.backend)
    model.to(target.device)
    x, goal = randn(64, 16, device=target.device), randn(64, 3, seed=1, device=target.device)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)

    def loss() -> Tensor:
        return F.mse_loss(model(x), goal)

    before = loss().item()
    for _ in range(100):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.advance()
    model.eval()
    assert loss().item() < 0.8 * before


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
