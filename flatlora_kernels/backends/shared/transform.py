"""Strategy "transform", of noise whose product with `a` is a fast transform: a plain product, and a pass over `a`.

No work of the weight's size is done for the noise, and the weight is not read for it. The noise comes last: a product
that began from it would read and write as many bytes, and not every product can.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.records import Draw, Product

# Of a backend, see `backends.reference.transform`.
Transform = Callable[[Tensor, Draw, bool, Tensor, bool], None]


def product(transform: Transform, plain: Callable[[Product], Tensor], p: Product, draw: Draw) -> Tensor:
    """The product `p`, its noise by `transform` and all else by `plain`; (M, outputs)."""
    if p.weight.stride() == (0, 0) and p.u is None and p.bias is None:
        # One number, as in noise_product. A vendor's product would copy it into a whole weight.
        total = p.a.sum(1, keepdim=True, dtype=torch.promote_types(p.a.dtype, torch.float32))
        y = (total * p.weight[0, 0]).to(p.a.dtype).expand(-1, p.outputs).contiguous()
    else:
        y = plain(p)
    transform(p.a, draw, p.input_grad, y, True)
    return y
