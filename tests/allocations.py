"""`Allocations`: how large what operators make is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """The largest result of an operator that is no view."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(r.alias_info for r in func._schema.returns):
            sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
            self.largest = max(self.largest, *sizes, 0)
        return result
