"""Backend `triton`: fused GPU kernels in Triton, see ../../triton_kernels.

With TRITON_INTERPRET=1 in the environment the kernels run on the CPU, in Triton's interpreter: slow, for tests.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch
from torch import Tensor

from ..noise import Draw
from .reference import matmul

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

PRIORITY = 5 if _INTERPRETED else 20
DEVICE_TYPES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
STRATEGIES = ("fused",)
NOISE_ACCUMS = ("folded",)

_MINIMUM = (3, 6)
_WORKSPACE = 16 << 20  # bytes for one call; never more than a quarter of the weight


def _version() -> str | None:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def unavailable() -> str | None:
    """See `backends`."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'triton>=3.6'; a CUDA build of torch brings it)"
    version = _version()
    if version is not None and tuple(int(p) for p in version.split(".")[:2]) < _MINIMUM:
        return f"triton {version} is too old, 3.6 or later is needed (torch 2.10 and later bring it)"
    if _INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability 8.0 or later is needed, {torch.cuda.get_device_name()} has less"
    return None


def describe() -> str:
    version = _version()
    how = ", in the interpreter" if _INTERPRETED else ""
    return "fused Triton kernels" + (f", triton {version}{how}" if version else "")


def _workspace(weight: Tensor) -> int:
    return min(_WORKSPACE, weight.numel() * weight.element_size() // 4)


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    lora_x: Tensor | None,
    scaling: float,
    draw: Draw | None,
    strategy: str,
    noise_accum: str,
) -> tuple[Tensor, Tensor]:
    """See `reference.linear`."""
    from ..triton_kernels.forward import linear_forward

    N, K = weight.shape
    u = None
    if lora_A is not None:
        u = matmul((x if lora_x is None else lora_x).flatten(0, -2), lora_A.to(x.dtype).t())
    x2 = x if x.dim() == 2 else x.flatten(0, -2)
    if draw is None or 0 in (*x2.shape, N):
        # Without noise there is nothing that a vendor's product does not do better.
        y = matmul(x2, weight.t()) if bias is None else _addmm(bias.to(x.dtype), x2, weight.t())
        if u is not None:
            y = _addmm(y, u, lora_B.to(x.dtype).t(), scaling)
    else:
        y = linear_forward(x2, weight, u, lora_B, bias, scaling, draw, _workspace(weight))
    return y.view(*x.shape[:-1], N), x.new_empty(0) if u is None else u


def linear_input_grad(
    grad_y: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    v: Tensor | None,
    draw: Draw | None,
    strategy: str,
    noise_accum: str,
) -> Tensor:
    """See `reference.linear_input_grad`."""
    from ..triton_kernels.input_grad import linear_input_grad

    K = weight.shape[1]
    dy = grad_y if grad_y.dim() == 2 else grad_y.flatten(0, -2)
    if draw is None or 0 in (*dy.shape, K):
        dx = matmul(dy, weight)
        if v is not None:
            dx = _addmm(dx, v, lora_A.to(dx.dtype))
    else:
        v = None if v is None else v.contiguous()
        dx = linear_input_grad(dy, weight, lora_A, v, draw, _workspace(weight))
    return dx.view(*grad_y.shape[:-1], K)


def _addmm(c: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    if c.device.type == "cpu" and c.dtype == torch.float16:
        return c + (alpha * matmul(a, b)).to(c.dtype)
    return torch.addmm(c, a, b, alpha=alpha)


def row_sq_norms(weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> Tensor:
    """See `reference.row_sq_norms`."""
    from ..triton_kernels.row_norms import row_sq_norms

    if 0 in weight.shape:
        return weight.new_zeros(weight.shape[0], dtype=torch.float32)
    if lora_A is not None and lora_A.dtype != lora_B.dtype:
        lora_A, lora_B = lora_A.float(), lora_B.float()
    return row_sq_norms(weight, lora_A, lora_B, scaling)


def perturb(weight: Tensor | None, draw: Draw, out: Tensor) -> None:
    """See `reference.perturb`."""
    from ..triton_kernels.perturb import perturb

    if out.numel():
        perturb(weight, draw, out)
