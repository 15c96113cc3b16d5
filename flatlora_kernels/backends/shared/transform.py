"""Strategy "transform", of noise whose product with `a` is a fast transform: a plain product, and a pass over `a`.

No work of the weight's size is done for the noise, and the weight is not read for it. The noise comes last because the
pass reads what it adds to while it waits for `a`: a product that began from the noise would read as much.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...core.records import Draw, Product
from .products import is_zero

# Of a backend, see `backends.reference.transform`.
Transform = Callable[[Tensor, Draw, bool, Tensor, bool], None]


def product(transform: Transform, plain: Callable[[Product], Tensor], p: Product, draw: Draw) -> Tensor:
    """The product `p`, its noise by `transform` and all else by `plain`; (M, outputs)."""
    if is_zero(p.weight) and p.u is None and p.bias is None:
        y = p.a.new_empty((p.a.shape[0], p.outputs))
        transform(p.a, draw, p.input_grad, y, False)
    else:
        y = plain(p)
        transform(p.a, draw, p.input_grad, y, True)
    return y
