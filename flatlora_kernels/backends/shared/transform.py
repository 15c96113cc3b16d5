"""Strategy "transform", of noise whose product with `a` is a fast transform: a plain product, and a pass over `a`.

No work of the weight's size is done for the noise, and the weight is not read for it. The noise comes last: a product
that began from it would read and write as many bytes, and not every product can. op/compute.py puts the two together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.quantized import QuantizedWeight
from ...core.records import Product


def of_one_number(p: Product) -> Tensor | None:
    """The plain product with a weight expanded from one number, as in noise_product; None where it is none.

    A vendor's product would copy it into a whole weight.
    """
    if (
        isinstance(p.weight, QuantizedWeight)
        or p.weight.stride() != (0, 0)
        or p.u is not None
        or p.bias is not None
    ):
        return None
    total = p.a.sum(1, keepdim=True, dtype=torch.promote_types(p.a.dtype, torch.float32))
    return (total * p.weight[0, 0]).to(p.a.dtype).expand(-1, p.outputs).contiguous()
