"""Backend `triton`: fused GPU kernels in Triton, see ../../triton_kernels.

With TRITON_INTERPRET=1 in the environment the kernels run on the CPU, in Triton's interpreter: slow, for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from ..core.quantized import QuantizedWeight
from ..core.records import Draw, Product, Weight
from .shared import products
from .shared.workspace import workspace_limit

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

PRIORITY = 5 if _INTERPRETED else 20
DEVICE_TYPES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
NOISE_ACCUMS = ("folded", "split")
FUSES = ("gaussian", "near_gaussian", "rademacher")
GROUPS = True

_MINIMUM = (3, 6)


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


def fuses_packed(weight: QuantizedWeight) -> bool:
    """See `backends`."""
    return _kernel("packed").packed_facts(weight).by_blocks


def describe() -> str:
    version = _version()
    how = ", in the interpreter" if _INTERPRETED else ""
    return "fused Triton kernels" + (f", triton {version}{how}" if version else "")


@functools.cache
def _kernel(name: str) -> Any:
    """The module of a kernel. Imported when it is first called, because that imports triton."""
    return importlib.import_module(f"flatlora_kernels.triton_kernels.{name}")


def product(p: Product, draw: Draw | None, noise_accum: str) -> Tensor:
    """See `reference.product`."""
    if p.empty and p.offsets is not None:  # the product of an adapter of rank 0
        return p.a.new_empty(len(p.a), p.outputs)
    if p.empty or (draw is None and p.offsets is None):
        return products.plain(p)
    # Without noise it may be an adapter's own product, whose weight is small beside the rows.
    workspace = workspace_limit(p.weight if draw is not None else p.a)
    return _kernel("product").product(p, draw, noise_accum, workspace)[0]


def product_and_u(p: Product, lora_A: Tensor, draw: Draw, noise_accum: str) -> tuple[Tensor, Tensor] | None:
    """`product` of a forward without its u, and u = a lora_A^T, in one kernel; None where two are faster."""
    kernel = _kernel("product")
    parts = draw.samples if p.offsets is None else len(p.offsets)
    if p.empty or not kernel.makes_u(p.a, p.weight, lora_A.shape[-2], parts):
        return None
    return kernel.product(p, draw, noise_accum, workspace_limit(p.weight), lora_A)


def adapter_grads(
    dy: Tensor, u: Tensor | None, lora_B: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """See `products.adapter_grads`: one pass over dY where both are wanted and dY is larger than an L2."""
    kernel = _kernel("adapter_grads")
    if u is not None and lora_B is not None and kernel.pays(*dy.shape, u.shape[1]) and kernel.takes(dy, u):
        return kernel.adapter_grads(dy, u, lora_B, scaling)
    return products.adapter_grads(dy, u, lora_B, scaling)


def row_sq_norms(weight: Weight, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float) -> Tensor:
    """See `reference.row_sq_norms`."""
    if 0 in weight.shape:
        return weight.new_zeros(weight.shape[:-1], dtype=torch.float32)
    if lora_A is not None and lora_A.dtype != lora_B.dtype:
        lora_A, lora_B = lora_A.float(), lora_B.float()
    return _kernel("row_norms").row_sq_norms(weight, lora_A, lora_B, scaling)


def expert_grads(a: Tensor, b: Tensor, offsets: Tensor, scaling: float, out: Tensor) -> None:
    """``out[e] = scaling a^T b`` over the rows of expert e, for a (M, P), b (M, Q) of one type and out (E, P, Q)."""
    if out.numel():
        _kernel("expert_grads").expert_grads(a, b, offsets, scaling, out)


def perturb(weight: Weight | None, draw: Draw | None, out: Tensor) -> None:
    """See `reference.perturb`."""
    if out.numel():
        _kernel("perturb").perturb(weight, draw, out)


def transform(a: Tensor, draw: Draw, input_grad: bool, out: Tensor, add: bool) -> None:
    """See `reference.transform`."""
    _kernel("transform").transform(a, draw, input_grad, out, add)
