"""`FlatLoraLinear`, and the helper that puts it into a model.

In a training loop:

    controller = apply_flat_lora(model, target_modules=["query", "value"], r=8, sigma=0.05)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    controller.attach(optimizer)  # each optimiser step draws anew
    for batch in batches:
        loss(model, batch).backward()  # any number of micro-batches: all see the same noise
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.autocast import without_autocast
from ..core.quantized import Parts, QuantizedWeight, find
from ..core.records import Weight
from ..op import checks, sharded
from ..op.functional import fused_flat_lora_linear
from . import packed, zero
from .controller import NoiseController, signed
from .layer import NoisyLayer, check_noise_options
from .obstacles import PLACING
from .state import layer_state


class FlatLoraLinear(NoisyLayer):
    """A frozen linear layer with a low-rank adapter, trained under weight noise drawn inside the kernel.

    Computes ``x @ (W + eps)^T + scaling * (dropout(x) @ A^T) @ B^T + bias`` in training mode and the same
    without eps and dropout in eval mode, see `fused_flat_lora_linear`. Source: Li et al., Flat-LoRA, ICML
    2025, arXiv 2409.14396; the adapter is that of Hu et al., LoRA, ICLR 2022, initialised as in PEFT.

    `noise_scale`, the std of eps per row, depends on W, A and B. `NoiseController.advance` computes it, once per
    optimiser step and not per micro-batch, at the cost of one read of W; so does a forward that finds the
    parameters changed, see `NoisyLayer`.

    Args:
        weight: (N, K) float16, bfloat16, float32 or float64. Shared, not copied, and frozen
            (`requires_grad = False`), as is `bias`, unless `train_weight`. Or a `QuantizedWeight`; `from_linear` takes
            the layer that owns one.
        bias: (N,) or None.
        r: rank, >= 0; 0 = no adapter, `lora_A` and `lora_B` are None.
        lora_alpha: `scaling` is ``lora_alpha / r``.
        sigma: strength of the noise, >= 0, for a controller of its own (default 0.05); 0 = plain fused LoRA.
        lora_dropout: probability of dropout on the adapter's input. Draws from torch's global generator, as
            `nn.Dropout` does.
        noise: "gaussian", "near_gaussian", "rademacher" or "hadamard", see docs/sigma.md.
        noise_controller: the `NoiseController` shared with the other layers, instead of `sigma`.
        stream: uint32, which layer this is; layers that share a controller need different ones. Default: that of
            a layer of the controller with the same weight, else the next one free.
        samples, antithetic: the rows of x fall into `samples` groups with noise of their own, in training
            mode; "batch" = as many as ``x.shape[0]``, one per sequence.
        strategy, noise_accum, backend: as in `fused_flat_lora_linear`.
        dtype: of `lora_A` and `lora_B`; default float32 beside a 16-bit weight, else that of the weight.
        train_weight: `weight` and `bias` train, too (full fine-tuning under weight noise, with r = 0 without an
            adapter). Not of a packed weight.

    Parameters: `weight` (N, K) and `bias` (N,); `lora_A` (r, K), at first Kaiming-uniform, and
    `lora_B` (N, r), at first zeros.

    State dict: these parameters under these names, plus one int64 tensor (base, step, stream) of the noise.
    Loading one moves the controller to that step.

    A packed weight is no parameter: `weight` is the `QuantizedWeight`. A layer that `from_linear` made of another
    library's keeps that one as `base_layer`, follows it where it moves or repacks its weight, has its `bias`, and in
    the state dict its entries. Of a bare `QuantizedWeight` the state dict has nothing: its owner saves it. The product
    has the type that the owner computes in, the result that of `x`. `merge` refuses.
    """

    _can_keep = True

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 16,
        sigma: float | None = None,
        lora_dropout: float = 0.0,
        noise: str = "gaussian",
        noise_controller: NoiseController | None = None,
        stream: int | None = None,
        samples: int | str = 1,
        antithetic: bool = False,
        strategy: str | None = None,
        noise_accum: str | None = None,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        train_weight: bool = False,
    ) -> None:
        super().__init__()
        if not zero.away((weight,)):
            checks.weight(weight)
        checks.uint32("r", r)
        check_noise_options(stream, noise, samples)
        if noise_controller is None:
            noise_controller = NoiseController(sigma=0.05 if sigma is None else sigma)
        elif sigma is not None:
            raise ValueError(f"sigma: expected None, because noise_controller has one, got {sigma}")
        self.out_features, self.in_features = zero.whole_shape(weight)
        self.r = r
        self.lora_alpha = lora_alpha
        self.scaling = lora_alpha / r if r else 1.0

        self.base_layer: nn.Module | None = None
        self.weight: Any
        if isinstance(weight, QuantizedWeight):
            if train_weight:
                raise ValueError(
                    f"train_weight: expected False for a packed weight, got True with {weight.format}"
                )
            self.weight = weight
        else:
            self.weight = _parameter(weight, train_weight)
        self.bias: Tensor | None = None if bias is None else _parameter(bias, train_weight)
        if dtype is None:
            dtype = torch.float32 if weight.dtype.itemsize == 2 else weight.dtype
        checks.parameter_dtype("dtype", dtype, weight)
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        if r:
            lora_A = torch.empty(r, self.in_features, dtype=dtype, device=weight.device)
            lora_B = torch.empty(self.out_features, r, dtype=dtype, device=weight.device)
            self.lora_A = nn.Parameter(sharded.beside(weight, lora_A, 1))
            self.lora_B = nn.Parameter(sharded.beside(weight, lora_B, 0))
        self.lora_dropout = nn.Dropout(lora_dropout)
        self.reset_lora_parameters()

        self._base_weight: Any = ()  # (the original,) while merged; the tuple hides it from nn.Module
        self._set_up_noise(
            noise_controller,
            stream=stream,
            noise=noise,
            samples=samples,
            antithetic=antithetic,
            strategy=strategy,
            noise_accum=noise_accum,
            backend=backend,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> FlatLoraLinear:
        """The same layer with an adapter: shares and freezes the weight and bias of `linear`.

        Args:
            linear: an nn.Linear, also one that `parallelize_module` has cut, whose forward hooks go along; or a layer
                with a packed weight that `QuantizedWeight.of` reads.
            options: keyword arguments of `FlatLoraLinear`.

        Raises:
            TypeError, ValueError: `linear` is another layer, or its packed weight is not consistent.
        """
        weight = find(linear) if isinstance(linear, nn.Module) else None
        if weight is not None:
            layer = cls(weight, **options)
            layer.base_layer = linear.requires_grad_(False)
            layer.refresh_noise_scale()
        elif isinstance(linear, nn.Linear):
            layer = cls(linear.weight, linear.bias, **options)
            for hooks in PLACING:  # which make DTensors of inputs and what is asked for of outputs
                getattr(layer, hooks).update(getattr(linear, hooks))
        else:
            raise TypeError(
                f"linear: expected an nn.Linear, got {type(linear).__name__}, which has no packed weight that"
                " QuantizedWeight.of reads either"
            )
        return layer.train(linear.training)

    def reset_lora_parameters(self) -> None:
        """`lora_A` Kaiming-uniform with a = sqrt(5), `lora_B` zeros: the adapter starts at no change.

        Of DTensors, rank 0 draws the whole `lora_A`, and each rank takes its part.
        """
        if self.lora_A is None or self.lora_B is None:
            return
        if not sharded.is_sharded(self.lora_A):
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            whole = torch.empty(self.lora_A.shape, dtype=self.lora_A.dtype, device=self.lora_A.device)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
            with torch.no_grad():
                self.lora_A.copy_(sharded.beside(self.weight, whole, 1))
        nn.init.zeros_(self.lora_B)

    @property
    def sigma(self) -> float:
        """The controller's, of this step."""
        return self.noise_controller.sigma

    @property
    def merged(self) -> bool:
        return bool(self._base_weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in the type of `x`, which is that of `weight` outside autocast, unless it is packed.

        Raises:
            RuntimeError: in training mode while merged.
        """
        if self._base_weight:
            if self.training:
                raise RuntimeError(
                    "FlatLoraLinear: merged, so that nothing of it trains; call unmerge() or eval()"
                )
            return F.linear(x, self.weight, self.bias)
        weight, lora_A, lora_B, scaling = self._weight_in_use()
        if isinstance(weight, QuantizedWeight):
            lora_A, lora_B = self.lora_A, self.lora_B
        lora_x = None
        if self.training:
            lora_A, lora_B = self._with_auxiliary(lora_A, lora_B)
            dropout = self._modules["lora_dropout"]
            lora_x = dropout(x) if dropout.p and lora_A is not None else None  # type: ignore[misc]
        if isinstance(weight, QuantizedWeight):
            return self._of_packed(x, weight, lora_A, lora_B, lora_x)
        seen, noise = self._seen(weight, self.noise_arguments(x))
        return fused_flat_lora_linear(
            x,
            seen,
            lora_A,
            lora_B,
            self.bias,
            scaling=scaling,
            lora_x=lora_x,
            **noise,
        )

    def _of_packed(
        self,
        x: Tensor,
        weight: QuantizedWeight,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        lora_x: Tensor | None,
    ) -> Tensor:
        dtype = packed.compute_type(self.base_layer, x)
        if lora_A is not None and lora_B is not None:
            lora_A, lora_B = packed.beside(dtype, lora_A, lora_B)
        with without_autocast(x.device.type):
            y = fused_flat_lora_linear(
                x.to(dtype),
                weight.to(dtype),
                lora_A,
                lora_B,
                None if self.bias is None else self.bias.to(dtype),
                scaling=self.scaling,
                lora_x=None if lora_x is None else lora_x.to(dtype),
                **self.noise_arguments(x),
            )
        return y.to(x.dtype)

    def _weight_in_use(self) -> tuple[Weight, Tensor | None, Tensor | None, float]:
        if self._base_weight:
            return self._base_weight[0], self.lora_A, self.lora_B, self.scaling
        own = self._parameters
        try:  # nn.Module.__getattr__ takes half a microsecond for each
            return own["weight"], own["lora_A"], own["lora_B"], self.scaling  # type: ignore[return-value]
        except KeyError:  # no adapter, parametrised, or packed
            owner = self._modules.get("base_layer")
            if owner is not None:
                self.__dict__["weight"] = self._packed_weight(owner)
                self.__dict__["bias"] = getattr(owner, "bias", None)
            A: Tensor | None = self.lora_A
            B: Tensor | None = self.lora_B
            if A is not None and B is not None and isinstance(self.weight, QuantizedWeight):
                A, B = packed.beside(self.weight.dtype, A, B)
            return self.weight, A, B, self.scaling

    def _norm_sources(self) -> tuple[Any, ...]:
        used = self._weight_in_use()
        weight = used[0]
        if not isinstance(weight, QuantizedWeight):
            return used
        owner = self._modules.get("base_layer")
        own = [t for t in weight.parts if t is not None] if owner is None else packed.sources(owner)
        return *own, self.lora_A, self.lora_B, self.scaling

    @torch.no_grad()
    def merge(self) -> None:
        """Put ``W + scaling B A`` in the place of `weight`: inference at the cost of a plain linear layer.

        The sum is formed in float32 (float64 for float64) and rounded once to the type of `weight`. That
        loses what of the update lies below half a unit in the last place of each weight: up to ``2**-8`` of its
        size for bfloat16, ``2**-11`` for float16. The original weight is kept, so that merging takes the memory
        of one more weight (and float32 copies while it runs) and `unmerge` restores every bit. A state dict
        taken while merged holds the original weight. Merging twice changes nothing.

        Raises:
            RuntimeError: the weight is packed, and the sum would not fit its format; or ZeRO stage 3 has the parameters
                elsewhere.
        """
        if self.merged:
            return
        if isinstance(self.weight, QuantizedWeight):
            raise RuntimeError(
                f"FlatLoraLinear: expected a dense weight to merge into, got one of format {self.weight.format!r}; make"
                " a dense layer, FlatLoraLinear(layer.weight.dequantize(), layer.bias, ...), and give it lora_A and"
                " lora_B"
            )
        if zero.away((self.weight, self.lora_A, self.lora_B)):
            raise RuntimeError(
                "FlatLoraLinear: expected gathered parameters to merge, got some that ZeRO stage 3 has shared out;"
                " merge within deepspeed.zero.GatheredParameters(model.parameters()), or what zero_to_fp32.py writes"
            )
        compute = torch.promote_types(self.weight.dtype, torch.float32)
        merged = self.weight.to(compute, copy=True)
        if self.lora_A is not None and self.lora_B is not None:
            merged.add_(self.lora_B.to(compute) @ self.lora_A.to(compute), alpha=self.scaling)
        self._base_weight = (self.weight,)
        self.weight = nn.Parameter(merged.to(self.weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Put the original `weight` back: the same parameter, bit for bit."""
        if self.merged:
            (self.weight,) = self._base_weight
            self._base_weight = ()

    def _apply(self, fn: Any, recurse: bool = True) -> FlatLoraLinear:
        merged = self.merged
        self.unmerge()
        weight = self.__dict__.get("weight")
        if weight is not None and self.base_layer is None:
            device = fn(weight.parts.codes[:0]).device
            parts = Parts._make(None if t is None else t.to(device) for t in weight.parts)
            self.weight = QuantizedWeight(weight.packing, parts)
        super()._apply(fn, recurse)
        if merged:
            self.merge()
        return self

    def get_extra_state(self) -> Tensor:
        controller = self.noise_controller
        state = [signed(controller.base), controller.step, self.stream]
        return torch.tensor(state, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        base, step, stream = layer_state(state, "state_dict: '_extra_state'")
        self.noise_controller.move_to(base, step)
        self.stream = stream

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            weight = self._base_weight[0]
            destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            raise RuntimeError("FlatLoraLinear: merged; call unmerge() before load_state_dict()")
        self._wait_until_ready()
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh_noise_scale()

    def extra_repr(self) -> str:
        names = ("in_features", "out_features", "r", "lora_alpha")
        text = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        merged = ", merged" if self.merged else ""
        return f"{text}, bias={self.bias is not None}, {self.describe_noise()}{merged}"


def _parameter(tensor: Tensor, train: bool) -> nn.Parameter:
    if not isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=train)
    return tensor.requires_grad_(train)  # type: ignore[return-value]
