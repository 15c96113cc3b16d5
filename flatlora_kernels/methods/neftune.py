"""NEFTune: uniform noise on the embeddings of the input."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Closure, Method, generator


class NEFTune(Method):
    """NEFTune: noise on the embedded tokens, in training only.

    ::

        X <- X + alpha / sqrt(L d) * U,      U ~ uniform(-1, 1) of the shape of X, (batch, L, d)

    Where the model is called with the keyword `attention_mask`, (batch, length), L is each sequence's number of real
    tokens and padding gets no noise, as in the authors' code; otherwise L is the length. The noise depends on the
    controller's seed and step and on the micro-batch, and is the same where a forward is recomputed. It exists inside
    `step` only. Not for a model that torch.compile compiled, which ignores the hooks.

    Args:
        alpha: the paper uses 5, 10 and 15.
        embedding: the module that embeds tokens, ids (batch, length) to (batch, length, d); default
            ``model.get_input_embeddings()``, or the model's only `nn.Embedding`.

    Source: Jain et al., ICLR 2024, arXiv 2310.05914, algorithm 1, and the authors' code (neelsjain/NEFTune).
    """

    def __init__(
        self, *args: Any, alpha: float = 5.0, embedding: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        if not alpha > 0:
            raise ValueError(f"alpha: expected a number > 0, got {alpha}")
        self.alpha = alpha
        self.embedding = _embedding(self.model) if embedding is None else embedding
        self._mask: Tensor | None = None
        self._index = 0

    @contextlib.contextmanager
    def _micro_batch(self, index: int) -> Iterator[None]:
        self._index, self._mask = index, None
        yield

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        hooks = [
            self.model.register_forward_pre_hook(self._see_mask, with_kwargs=True),
            self.embedding.register_forward_hook(self._add_noise),
        ]
        try:
            return super()._gradients(closures)
        finally:
            self._mask = None
            for hook in hooks:
                hook.remove()

    def _see_mask(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask")

    def _add_noise(self, module: nn.Module, args: Any, embedded: Tensor) -> Tensor | None:
        if not module.training:
            return None
        if embedded.dim() != 3:
            raise ValueError(f"embedding: expected to return (batch, length, d), got {tuple(embedded.shape)}")
        batch, length, d = embedded.shape
        seed = self.controller.value + self.controller.sample_offset
        noise = torch.empty(embedded.shape, device=embedded.device)
        noise.uniform_(-1, 1, generator=generator(embedded.device, seed, "neftune", self._index))
        if self._mask is None:
            noise.mul_(self.alpha / math.sqrt(max(length * d, 1)))
        else:
            if self._mask.shape != (batch, length):
                raise ValueError(f"attention_mask: expected {(batch, length)}, got {tuple(self._mask.shape)}")
            mask = self._mask.to(noise)
            real = mask.sum(1, keepdim=True).clamp(min=1)
            noise.mul_((mask * (self.alpha / (real * d).sqrt()))[..., None])
        return embedded + noise.to(embedded.dtype)


def _embedding(model: nn.Module) -> nn.Module:
    if callable(getattr(model, "get_input_embeddings", None)):
        return model.get_input_embeddings()  # type: ignore[operator]
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    if len(found) != 1:
        raise ValueError(
            f"embedding: expected to be given where the model has not one nn.Embedding, got {found}"
        )
    return model.get_submodule(found[0])
