"""Train low-rank adapters with weight noise that is drawn inside the kernel.

Importing this package touches no GPU and needs neither triton nor a compiled library.
"""

from .backends import backend_info, use_backend, use_strategy
from .functional import (
    flat_noise_scale,
    fused_flat_lora_linear,
    materialize_noise,
    perturb_weight,
    row_sq_norms,
)

__version__ = "0.1.0"

__all__ = [
    "backend_info",
    "flat_noise_scale",
    "fused_flat_lora_linear",
    "materialize_noise",
    "perturb_weight",
    "row_sq_norms",
    "use_backend",
    "use_strategy",
]
