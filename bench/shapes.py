"""What is timed: layers of real models, and named sets of cases built from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

TRAINING = ("forward", "forward+backward")
MODES = (*TRAINING, "input_grad")  # the last: dX alone, from a dY that is there


class Layer(NamedTuple):
    """A linear layer, (N, K) = (out_features, in_features)."""

    name: str
    N: int
    K: int


class Model(NamedTuple):
    layers: tuple[Layer, ...]
    rows: tuple[int, ...]  # M: what a training step feeds each layer
    note: str


_WIDTH_768 = (Layer("attention", 768, 768), Layer("up", 3072, 768), Layer("down", 768, 3072))
MODELS = {
    "square2048": Model((Layer("square", 2048, 2048),), (1, 16, 64, 256, 1024), "cases with stated targets"),
    "square4096": Model(
        (Layer("square", 4096, 4096),), (16, 256, 2048, 8192), "cases with stated targets on a GPU, rank 16"
    ),
    "minilm": Model(
        (Layer("attention", 384, 384), Layer("up", 1536, 384), Layer("down", 384, 1536)),
        (32, 1024),
        "all-MiniLM-L6-v2; a sentence of 32 tokens, a batch of 32",
    ),
    "vit-b32": Model(
        _WIDTH_768,
        (50, 1600),
        "ViT-B/32 at 224 pixels: 49 patches and the class token; 1 and 32 images",
    ),
    "t5-base": Model(
        _WIDTH_768,
        (128, 4096),
        "T5-base (not v1.1); 128 tokens, a batch of 32, as in the GLUE runs of the Flat-LoRA paper",
    ),
    "llama3-8b": Model(
        (
            Layer("q,o", 4096, 4096),
            Layer("k,v", 1024, 4096),
            Layer("gate,up", 14336, 4096),
            Layer("down", 4096, 14336),
        ),
        (1, 256, 2048, 8192),
        "Llama-3-8B; one token, and batches of 256 to 8192",
    ),
}


class Case(NamedTuple):
    """One problem: every provider is timed on it."""

    model: str
    layer: str
    M: int
    N: int
    K: int
    dtype: str
    mode: str
    rank: int  # of the adapter; 0 = none

    def __str__(self) -> str:
        rank = f", rank {self.rank}" if self.rank else ""
        return f"{self.model} {self.layer} {self.N}x{self.K}, M={self.M}, {self.dtype}, {self.mode}{rank}"


class Grid(NamedTuple):
    """All combinations of its fields; None = all there are."""

    model: str
    layers: tuple[str, ...] | None = None
    rows: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    modes: tuple[str, ...] = TRAINING
    ranks: tuple[int, ...] = (0,)

    def cases(self) -> Iterator[Case]:
        model = MODELS[self.model]
        layers = [layer for layer in model.layers if self.layers is None or layer.name in self.layers]
        grid = itertools.product(layers, self.ranks, self.dtypes, self.modes, self.rows or model.rows)
        for layer, rank, dtype, mode, M in grid:
            yield Case(self.model, layer.name, M, layer.N, layer.K, dtype, mode, rank)


# Most telling cases first: a time limit cuts off the end.
QUICK = {
    "cpu": (
        Grid("square2048", rows=(256,), dtypes=("float32",), modes=("forward",)),
        Grid("minilm", ("up",), (1024,), ("float32",), ("forward+backward",), (16,)),
        Grid("square2048", rows=(1, 16, 64, 1024), dtypes=("float32",), modes=("forward",)),
        Grid("square2048", rows=(1024,), dtypes=("bfloat16",), modes=("forward",)),
        Grid("llama3-8b", ("k,v",), (256,), ("bfloat16",), ("forward",), (16,)),
        Grid("square2048", rows=(256,), dtypes=("float32",), modes=("forward+backward",)),
    ),
    "cuda": (
        Grid("llama3-8b", ("q,o",), (2048,), ("bfloat16",), TRAINING, (0, 16)),
        Grid("square2048", rows=(1, 16, 256, 1024), dtypes=("bfloat16",), modes=("forward",)),
        Grid("llama3-8b", ("gate,up",), (1, 2048, 8192), ("bfloat16",), ("forward",)),
        Grid("t5-base", ("up",), (4096,), ("bfloat16",), ("forward+backward",), (16,)),
        Grid("square2048", rows=(1024,), dtypes=("float16", "float32"), modes=("forward",)),
    ),
}
FULL = {
    "cpu": tuple(
        Grid(m, rows=(1, 256) if m == "llama3-8b" else None, ranks=(0, 16))
        for m in MODELS
        if m != "square4096"
    ),
    "cuda": tuple(Grid(m, dtypes=("bfloat16", "float16", "float32"), ranks=(0, 16)) for m in MODELS),
}
# Sets that are not all of a model.
NAMED = {
    "square4096": (
        Grid("square4096", dtypes=("bfloat16", "float16"), modes=("forward", "input_grad"), ranks=(16,)),
    )
}
# Those for which targets.py has a figure.
TARGETS = {
    "cpu": (Grid("square2048", rows=(256, 2048, 8192), dtypes=("float32",), modes=TRAINING, ranks=(16,)),),
    "cuda": (Grid("square4096", dtypes=("bfloat16",), modes=TRAINING, ranks=(16,)),),
}
SETS = ("quick", "full", "targets", *MODELS)


def cases(name: str, device: str) -> list[Case]:
    """The cases of set `name`: "quick", "full", "targets", or of one model."""
    named = {"quick": QUICK, "full": FULL, "targets": TARGETS}
    grids = named[name][device] if name in named else NAMED.get(name, (Grid(name, ranks=(0, 16)),))
    return list(dict.fromkeys(case for grid in grids for case in grid.cases()))
