"""Strategy "panel": W + eps is written a slice at a time into a small workspace, for the vendor's product.

The slices are of outputs, rows of the weight in forward and columns in the input gradient, so that each is a whole
contraction and nothing is added up in 16 bits. One slice at a time, as wide as the workspace allows: a product leaves
no multiprocessor to draw the next slice on, and a narrower one does not fill them (docs/internals/design.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.records import Draw, Product, Weight
from .products import own_rows
from .workspace import workspace_limit

# Of a backend, see `backends.reference.perturb`.
Perturb = Callable[[Weight, Draw | None, Tensor], None]

_STEP = 64  # outputs; a multiple of the blocks of noise, 8 columns or 16 rows


def slices(outputs: int, length: int, element_size: int, limit: int) -> list[tuple[int, int]]:
    """(begin, end) of the slices of an output dimension.

    As few as fit into `limit` bytes one at a time, and of equal size up to a multiple of 64 (of 8 where 64 do not fit);
    never below 8 outputs.

    Args:
        length: of the contraction. element_size: bytes.
    """
    most = limit // (length * element_size)
    step = _STEP if most >= _STEP else 8
    most = max(most // step * step, step)
    count = -(-outputs // most)
    width = -(-outputs // (count * step)) * step
    return [(begin, min(begin + width, outputs)) for begin in range(0, outputs, width)]


def workspace(weight: Weight, device_type: str, input_grad: bool) -> tuple[list[tuple[int, int]], int]:
    """The slices of a call on `weight`, and the bytes that they are drawn into."""
    N, K = weight.shape
    outputs, length = (K, N) if input_grad else (N, K)
    size = weight.element_size() + (
        16 if _through_float32(weight.dtype, device_type) else 0
    )  # a copy in float32, and what the product makes of it
    found = slices(outputs, length, size, workspace_limit(weight))
    width = found[0][1] if found else 0
    return found, width * length * size


def _through_float32(dtype: torch.dtype, device_type: str) -> bool:
    return dtype == torch.float16 and device_type == "cpu"  # see products.matmul


def product(perturb: Perturb, p: Product, draw: Draw | None) -> Tensor:
    """The product `p` with slices of W + eps by `perturb`, or of a packed W where nothing is drawn; (M, outputs)."""
    a, weight, input_grad, u, lora, bias, scaling, _ = p
    lora = None if lora is None else lora.to(a.dtype).t()  # (r, outputs)
    bias = None if bias is None else bias.to(a.dtype)
    dim = 1 if input_grad else 0
    outputs, length = weight.shape[dim], weight.shape[1 - dim]
    out = a.new_empty(len(a), outputs)
    found, _ = workspace(weight, a.device.type, input_grad)
    samples = 1 if draw is None else draw.samples
    rows = len(a) // samples
    steps = [(group, begin, end) for group in range(samples) for begin, end in found]
    buffer = a.new_empty(length * found[0][1])
    column_major = weight.stride(0) == 1 != weight.stride(1)

    def fill(group: int, begin: int, end: int) -> Tensor:
        memory = buffer[: length * (end - begin)]
        # In the weight's own order, so that both are gone through in the order of their memory.
        panel = memory.view(length, -1).t() if column_major != input_grad else memory.view(-1, length)
        panel = panel.t() if input_grad else panel  # rows and columns as those of the weight
        part = draw
        if draw is not None:
            part = draw._replace(samples=1, sample_offset=draw.sample_offset + group)
            if input_grad:
                part = part._replace(col_offset=draw.col_offset + begin)
            else:
                part = part._replace(
                    noise_scale=draw.noise_scale[begin:end], row_offset=draw.row_offset + begin
                )
        perturb(weight.narrow(dim, begin, end - begin), part, panel)
        return panel if input_grad else panel.t()

    # In 16 bits the low-rank part comes first, and the product adds to it before it rounds; in 32 bits it comes last,
    # where the sum is not begun from a number that may be larger than itself.
    in_float32 = _through_float32(a.dtype, a.device.type)
    first = u is not None and out.dtype.itemsize == 2 and not in_float32
    a = a.float() if in_float32 else own_rows(a)
    if first:
        torch.addmm(out if bias is None else bias, u, lora, beta=bias is not None, alpha=scaling, out=out)  # type: ignore[arg-type]

    def multiply(group: int, begin: int, end: int, panel: Tensor) -> None:
        here, columns = slice(group * rows, (group + 1) * rows), slice(begin, end)
        part, a_part = out[here, columns], a[here]
        if in_float32:
            total = a_part @ panel.float()
            if u is not None:
                total.addmm_(u[here].float(), lora[:, columns].float(), alpha=scaling)  # type: ignore[index]
            part.copy_(total if bias is None else total.add_(bias[columns]))
            return
        # Into a single column among others, torch 2.10 on a CPU writes bfloat16 without a gap, over its neighbours.
        whole = part.contiguous() if end - begin == 1 and a.device.type == "cpu" else part
        if first:
            whole.addmm_(a_part, panel)
        elif bias is not None:
            torch.addmm(bias[columns], a_part, panel, out=whole)
        else:
            torch.mm(a_part, panel, out=whole)
        if whole is not part:
            part.copy_(whole)

    for step in steps:
        multiply(*step, fill(*step))
    if u is not None and out.dtype.itemsize > 2:
        out.addmm_(u, lora, alpha=scaling)  # type: ignore[arg-type]
    return out
