"""What the ops compute: which way a call goes, and its products by a backend.

schema.py registers these functions as kernels; where nothing has to see the ops, autograd.py calls them as they are,
which spares a small call the dispatcher. What `linear` returns is no view, so that it may be written to.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor
from torch._C import _AutoDispatchBelowADInplaceOrView as unrecorded

from .. import backends
from ..backends.shared import panel, products, transform
from ..choice import dispatch
from ..choice.resolve import FREE
from ..core.quantized import QuantizedWeight
from ..core.records import Choice, Draw, Product, Weight


def linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    lora_x: Tensor | None,
    scaling: float,
    draw: Draw | None,
    choice: Choice,
) -> tuple[Tensor, Tensor | None]:
    """``x (W + eps)^T + scaling (lora_x A^T) B^T + bias`` in the shape of x, and u = lora_x A^T, (M, r)."""
    if x.dim() != 2:
        with unrecorded():
            lora_x = None if lora_x is None else lora_x.flatten(0, -2)
            y, u = linear(x.flatten(0, -2), weight, lora_A, lora_B, bias, lora_x, scaling, draw, choice)
            return y.view(*x.shape[:-1], y.shape[1]), u
    module, strategy = _way(x, weight, draw, choice, False)
    u = None
    if lora_A is not None:
        if lora_x is None and draw is not None and strategy == "fused" and hasattr(module, "product_and_u"):
            p = Product(x, weight, False, None, lora_B, bias, scaling)
            made = module.product_and_u(p, lora_A, draw, choice.noise_accum)
            if made is not None:
                return made
        u = products.linear(x if lora_x is None else lora_x, lora_A)
    return _product(module, strategy, Product(x, weight, False, u, lora_B, bias, scaling), draw, choice), u


def linear_input_grad(
    grad_y: Tensor,
    weight: Weight,
    lora_A: Tensor | None,
    v: Tensor | None,
    draw: Draw | None,
    choice: Choice,
) -> Tensor:
    """``dY (W + eps) + v A`` in the leading dimensions of dY."""
    if grad_y.dim() != 2:
        grad_x = linear_input_grad(grad_y.flatten(0, -2), weight, lora_A, v, draw, choice)
        return grad_x.view(*grad_y.shape[:-1], grad_x.shape[1])
    module, strategy = _way(grad_y, weight, draw, choice, True)
    if v is None:
        p = Product(grad_y, weight, True)
    else:
        p = Product(grad_y, weight, True, v.contiguous(), lora_A.t())
    return _product(module, strategy, p, draw, choice)


def adapter_grads(
    grad_y: Tensor, u: Tensor | None, lora_B: Tensor | None, scaling: float, backend: str
) -> tuple[Tensor, Tensor]:
    """See `products.adapter_grads`."""
    kernel = getattr(backends.get(backend), "adapter_grads", products.adapter_grads)
    return kernel(grad_y if grad_y.dim() == 2 else grad_y.flatten(0, -2), u, lora_B, scaling)


def _way(
    a: Tensor, weight: Weight, draw: Draw | None, choice: Choice, input_grad: bool
) -> tuple[ModuleType, str]:
    """The backend that runs, and the strategy, "plain" where the vendor's product is all; `a` (M, contraction)."""
    M, N, K = a.shape[0], *weight.shape
    if not (M and N and K):
        return backends.get(choice.backend), "fused"
    if draw is None:
        return _without_noise(a, weight, choice, input_grad)
    backend, strategy = choice.backend, choice.strategy
    if strategy in FREE:
        found = dispatch.way(choice, draw.noise, M // draw.samples, a.device, a.dtype, N, K)
        backend, strategy = found.backend, found.strategy
    if isinstance(weight, QuantizedWeight):
        strategy = dispatch.of_packed(choice, backend, strategy, weight, M // draw.samples)
    return backends.get(backend), strategy


def _without_noise(a: Tensor, weight: Weight, choice: Choice, input_grad: bool) -> tuple[ModuleType, str]:
    device, direction = a.device, dispatch.DIRECTIONS[input_grad]
    alone = dispatch.on_one_thread(device)
    found = dispatch.way(choice, None, a.shape[0], device, a.dtype, *weight.shape, direction, alone)
    if isinstance(weight, QuantizedWeight):
        return backends.get(found.backend), dispatch.of_packed_without_noise(
            found.backend, device, a.dtype, len(a)
        )
    return backends.get(found.backend), found.strategy


def _product(module: ModuleType, strategy: str, p: Product, draw: Draw | None, choice: Choice) -> Tensor:
    if strategy == "fused":
        return module.product(p, draw, choice.noise_accum)
    if strategy == "plain":
        return products.plain(p) if isinstance(p.weight, Tensor) else panel.product(module.perturb, p, None)
    if strategy == "panel":
        return panel.product(module.perturb, p, draw)
    y = transform.of_one_number(p)
    if y is None:
        y = _product(*_without_noise(p.a, p.weight, choice, p.input_grad), p, None, choice)
    module.transform(p.a, draw, p.input_grad, y, True)
    return y
