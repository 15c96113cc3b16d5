"""What the methods share: closures in, one optimiser step, and nothing left behind."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..train.controller import NoiseController
from ..train.layer import NoisyLayer, shared_controller
from ..train.state import keys
from ..train.undo import undone

Closure = Callable[[], Tensor]


class Adapter(NamedTuple):
    """One low-rank pair that a layer uses: it adds ``scaling B A`` to the weight."""

    layer: NoisyLayer
    lora_A: Tensor  # (r, K)
    lora_B: Tensor  # (N, r)
    scaling: float


class Method:
    """One way to train: `step` takes the losses of a batch and does everything else.

        method = make("flat-lora", model, optimizer)
        for batch in batches:
            loss = method.step(lambda: model(**batch).loss)

    A closure computes the loss of one micro-batch, forward only; `step` averages over the closures (so that they equal
    one batch where they are of one size and their losses are means), runs the backward passes, clips, calls
    ``optimizer.step()`` and ``zero_grad()``, and moves the controller on to the next step unless it is attached to an
    optimiser. Gradients that were there before are dropped. Where a closure raises, the weights are what they were, and
    gradients are cleared; the controller stays at its step.

    Args:
        model: holds the layers, `FlatLoraLinear`s or those of `integrations.peft`. In training mode.
        optimizer: of the parameters to train.
        noise_controller: default the one that the layers share.
        max_grad_norm: clip the gradient of all of the optimiser's parameters to this norm, as
            `torch.nn.utils.clip_grad_norm_`.

    Raises:
        ValueError: the layers share no controller, or the method cannot work on them; the message says what is missing.
    """

    noise = False  # whether this method's passes see the layers' weight noise

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        noise_controller: NoiseController | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm
        self.layers = tuple(m for m in model.modules() if isinstance(m, NoisyLayer))
        if noise_controller is None:
            noise_controller = shared_controller(self.layers)
        elif any(layer.noise_controller is not noise_controller for layer in self.layers):
            raise ValueError("noise_controller: expected the one of the model's layers, got another")
        self.controller = noise_controller
        if self.noise:
            self._needs_layers()
            if not noise_controller.target_sigma > 0:
                raise ValueError(
                    f"sigma: expected a controller with sigma > 0, got {noise_controller.target_sigma}: without noise"
                    f" {type(self).__name__} would be plain training; use 'lora'"
                )

    def step(self, *closures: Closure) -> Tensor:
        """One optimiser step on the mean of the closures' losses.

        Args:
            closures: each returns the loss of one micro-batch, a tensor of one value that requires a gradient.

        Returns:
            The mean loss, 0-d and detached, at the point where the gradient is taken unless the method says otherwise.
        """
        if not closures:
            raise ValueError("closures: expected at least one, got none")
        modules = (self.model, *self.layers) if self.noise else (self.model,)
        if not all(module.training for module in modules):
            raise RuntimeError("model: expected training mode, got eval mode; call model.train()")
        # Raises where total_steps is missing, before anything moves.
        self.controller.sigma_at(self.controller.step + 1)
        self._zero_grad()
        try:
            loss = self._gradients(closures)
            self._update()
        finally:
            self._zero_grad()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's, the optimiser's and the controller's state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            TypeError, ValueError: `state` is not of such a method on such a model; nothing has changed.
        """
        keys(f"state of {type(self).__name__}", state, self.state_dict())

    def _gradients(self, closures: Sequence[Closure]) -> Tensor:
        with self._noise(self.noise):
            return self._backward(closures)

    def _noise(self, on: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if on else self.controller.disabled()

    def _backward(self, closures: Sequence[Closure], weight: float = 1.0) -> Tensor:
        """Adds the gradient of `weight` times the mean loss; returns the mean loss."""
        losses = []
        for index, closure in enumerate(closures):
            with self._micro_batch(index):
                loss = self._loss(closure, index)
                if not loss.requires_grad:
                    raise ValueError(f"closures[{index}]: expected a loss with a gradient, got one without")
                (loss * (weight / len(closures))).backward()
            losses.append(loss.detach())
        return mean(losses)

    def _micro_batch(self, index: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    @staticmethod
    def _loss(closure: Closure, index: int) -> Tensor:
        loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"closures[{index}]: expected to return a loss of one value, got {got}")
        return loss

    def _update(self) -> None:
        if self.max_grad_norm is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        if not self.controller.attached:
            self.controller.advance()

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.model.zero_grad()  # a parameter that the optimiser lacks would pile its gradients up

    def _needs_layers(self) -> None:
        if not self.layers:
            raise ValueError(f"model: expected layers with noise for {type(self).__name__}, got none")

    def _adapters(self, *, one_each: bool = False) -> list[Adapter]:
        """The trained pairs of all layers, of which there has to be one at least.

        Args:
            one_each: each has to be one pair of matrices, and not those of a mixture of experts side by side.
        """
        every = [a for layer in self.layers for a in adapters(layer)]
        found = [a for a in every if a.lora_A.requires_grad or a.lora_B.requires_grad]
        if not found:
            raise ValueError(f"model: expected trainable adapters for {type(self).__name__}, got none")
        mixtures = [a.layer.flat_lora_name for a in found if a.layer.stream_count > 1]
        if one_each and mixtures:
            raise ValueError(
                f"model: expected adapters of single weights for {type(self).__name__}, got a mixture of experts,"
                f" {mixtures[0]!r}"
            )
        return found


def adapters(layer: Any) -> list[Adapter]:
    """The low-rank pairs in use: of a `FlatLoraLinear` (at most one) or of PEFT's active adapters."""
    if layer.lora_A is None:
        return []
    if isinstance(layer.lora_A, nn.ParameterDict):
        raise ValueError(
            f"model: expected adapters of two matrices, got AdaLoRA's of three, {layer.flat_lora_name!r}"
        )
    if isinstance(layer.lora_A, Tensor):
        return [Adapter(layer, layer.lora_A, layer.lora_B, layer.scaling)]
    return [
        Adapter(layer, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for name in layer.active_adapters
        if name in layer.lora_A
    ]


def mean(losses: Sequence[Tensor]) -> Tensor:
    """0-d, in float32 at least."""
    return torch.stack([t.to(torch.promote_types(t.dtype, torch.float32)).reshape(()) for t in losses]).mean()


@contextlib.contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts the values of `tensors` back at the end, bit for bit."""
    pairs = [(t, t.detach().clone()) for t in tensors]

    @torch.no_grad()
    def undo() -> None:
        for tensor, before in pairs:
            tensor.copy_(before)

    with undone(undo):
        yield


def mean_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Averages over data-parallel ranks, in place, what no wrapper of the model averages."""
    if several_ranks():
        dist = torch.distributed
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(dist.get_world_size())


def several_ranks() -> bool:
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def generator(device: torch.device, seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator of our own, a function of its arguments: torch's global ones are not touched."""
    digest = hashlib.blake2b(f"{seed} {purpose} {index}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def bernoulli(probabilities: Sequence[float], controller: NoiseController, use: str) -> list[int]:
    """Indices that come up in this step, the same on all ranks; where none does, that which came nearest."""
    if not probabilities:
        return []
    rng = generator(torch.device("cpu"), controller.base, use, controller.step)
    u = torch.rand(len(probabilities), generator=rng, dtype=torch.float64)
    ratios = (u / torch.tensor(probabilities, dtype=torch.float64)).tolist()
    found = [i for i, ratio in enumerate(ratios) if ratio < 1]
    return found or [min(range(len(ratios)), key=ratios.__getitem__)]
