"""What a step of each method costs beside LoRA's, and a step of evolution strategies beside torch's own noise:
`python -m bench methods`.

A model of token embeddings and Llama-shaped blocks with random weights, adapters on all linear layers of the blocks,
AdamW; methods that train the weights themselves have these instead, and SGD. All take turns in every round, and ratios
are taken within a round.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatlora_kernels as fk
from flatlora_kernels.core.noise import KINDS
from flatlora_kernels.methods import make

from .table import markdown
from .timing import Spread, cpu_timer, interleaved, paired_ratio, seconds
from .training import PROJECTIONS, Block, Size

SIZES = {"tiny": Size(64, 160, 4, 2, 32), "cpu": Size(512, 1376, 8, 4, 256)}
BLOCKS, RANK, VOCABULARY, BATCH = 2, 8, 1000, 8
MEMBERS, DRAWS = 4, 30


class Setup(NamedTuple):
    controller: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    weights: bool = False  # are trained, instead of adapters


SETUPS = {
    "lora": Setup(),
    "flat-lora": Setup({"sigma": 0.05}),
    "bi-lora": Setup(),
    "sam": Setup(),
    "esam": Setup(),
    "sl-sam": Setup(),
    "lora-sam": Setup(),
    "eflat-lora": Setup(),
    "lora-pro": Setup(),
    "halora": Setup(),
    "rwp": Setup({"sigma": 0.002, "norm": "row"}, {"mix": 0.5}),
    "lpf-sgd": Setup({"sigma": 0.002, "norm": "row"}),
    "neftune": Setup(),
    "full-noise": Setup({"sigma": 0.05}, weights=True),
    "mezo": Setup(weights=True),
    "es": Setup({}, {"population": MEMBERS}, weights=True),
    "eggroll": Setup({}, {"population": MEMBERS, "together": MEMBERS}, weights=True),
}


class Words(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size.hidden)
        self.blocks = nn.Sequential(*(Block(size, torch.float32, "cpu") for _ in range(BLOCKS)))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.blocks(self.embed(ids)), self.embed.weight)


def steps(size: Size, dtype: torch.dtype, noise: str, seed: int) -> dict[str, Callable[[int], object]]:
    """A call for each method that makes one of its steps, all on the same batch."""
    torch.manual_seed(seed)
    base = Words(size).to(dtype).requires_grad_(False)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    ids = torch.randint(VOCABULARY, (BATCH, size.tokens // BATCH + 1))
    return {name: _step(name, setup, copy.deepcopy(base), ids, noise, seed) for name, setup in SETUPS.items()}


def _step(
    name: str, setup: Setup, model: Words, ids: Tensor, noise: str, seed: int
) -> Callable[[int], object]:
    controller = fk.NoiseController(**{"sigma": 0.0, "seed": seed, **setup.controller})
    adapter = {"r": 0, "train_weight": True} if setup.weights else {"r": RANK, "lora_alpha": 2 * RANK}
    fk.apply_flat_lora(
        model.blocks, PROJECTIONS, noise_controller=controller, noise=noise, verbose=False, **adapter
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    optimizer = torch.optim.SGD(trained, lr=1e-6) if setup.weights else torch.optim.AdamW(trained, lr=1e-4)
    method = make(name, model, optimizer, **setup.options)

    def losses(some: Tensor) -> Tensor:
        """One for each sequence."""
        scores = model(some[:, :-1]).float()
        return (
            F.cross_entropy(scores.flatten(0, 1), some[:, 1:].flatten(), reduction="none")
            .view(len(some), -1)
            .mean(1)
        )

    closure: Callable[..., Tensor]
    if name == "esam":
        closure = lambda rows: losses(ids if rows is None else ids[rows])  # noqa: E731
    elif setup.options.get("together", 1) > 1:
        closure = lambda count: losses(ids.repeat(count, 1)).view(count, -1).mean(1)  # noqa: E731
    else:
        closure = lambda: losses(ids).mean()  # noqa: E731
    return lambda _: method.step(closure)


def updates(size: Size, dtype: torch.dtype, seed: int) -> dict[str, Callable[[int], object]]:
    """``W += sum of c_i z_i`` of DRAWS draws: of evolution strategies with each kind of noise, and by torch's loop."""
    calls: dict[str, Callable[[int], object]] = {}
    coefficients = torch.linspace(-1e-6, 1e-6, DRAWS)
    for kind in KINDS:
        layer = nn.Sequential(nn.Linear(size.hidden, 4 * size.hidden, bias=False)).to(dtype)
        fk.apply_flat_lora(
            layer, ["0"], r=0, train_weight=True, sigma=0.0, seed=seed, noise=kind, verbose=False
        )
        method: Any = make("es", layer, torch.optim.SGD(layer.parameters(), lr=1.0), population=DRAWS)
        calls[kind] = lambda _, method=method: method._descend(coefficients, range(DRAWS))
    weight, generator = torch.zeros(4 * size.hidden, size.hidden, dtype=dtype), torch.Generator()

    def loop(_: int) -> None:
        for i, c in enumerate(coefficients.tolist()):
            weight.add_(torch.randn(weight.shape, dtype=dtype, generator=generator.manual_seed(i)), alpha=c)

    return {"torch": loop, **calls}


def table(
    calls: dict[str, Callable[[int], object]], args: argparse.Namespace, base: str, inverse: bool = False
) -> str:
    rounds, lines = interleaved(calls, cpu_timer, 1, args.budget, args.rounds, args.rounds), []
    for name in calls:
        median = Spread.of(seconds(rounds, name)).median
        spread = paired_ratio(rounds, *((base, name) if inverse else (name, base)))
        ratio = "1" if name == base else f"{spread.median:.2f} ({spread.p20:.2f}, {spread.p80:.2f})"
        lines.append([f"`{name}`", f"{median * 1e3:.1f}", ratio])
    return markdown(["", "ms", f"{base} / it (p20, p80)" if inverse else f"/ {base} (p20, p80)"], lines)


def main(args: argparse.Namespace) -> None:
    size, dtype = SIZES[args.size], getattr(torch, args.dtype)
    print(
        f"{BLOCKS} blocks, {size.hidden} wide, {size.tokens} tokens in {BATCH} sequences, {args.dtype}, {args.noise},"
        f" {torch.get_num_threads()} threads; es and eggroll: {MEMBERS} members\n"
    )
    print(table(steps(size, dtype, args.noise, args.seed), args, "lora"))
    print(f"\n{DRAWS} draws added to a weight of {4 * size.hidden} x {size.hidden}, in one step\n")
    print(table(updates(size, dtype, args.seed), args, "torch", inverse=True))
