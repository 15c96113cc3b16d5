"""Train low-rank adapters with weight noise that is drawn inside the kernel.

Importing this package touches no GPU and needs neither triton nor a compiled library.
"""

from .backends import backend_info
from .choice.resolve import use_backend, use_strategy
from .core import formats as _formats  # noqa: F401  (registers them)
from .core.quantized import QuantizedWeight
from .op.functional import (
    explain,
    flat_noise_scale,
    fused_flat_lora_linear,
    materialize_noise,
    noise_product,
    perturb_weight,
    row_sq_norms,
)
from .op.grouped import fused_flat_lora_grouped_linear, grouped_noise_scale
from .train.controller import NoiseController
from .train.convert import apply_flat_lora, print_trainable_parameters
from .train.layer import NoisyLayer
from .train.linear import FlatLoraLinear
from .train.warm_up import warm_up

__version__ = "0.1.0"

__all__ = [
    "FlatLoraLinear",
    "NoiseController",
    "NoisyLayer",
    "QuantizedWeight",
    "apply_flat_lora",
    "backend_info",
    "explain",
    "flat_noise_scale",
    "fused_flat_lora_grouped_linear",
    "fused_flat_lora_linear",
    "grouped_noise_scale",
    "materialize_noise",
    "noise_product",
    "perturb_weight",
    "print_trainable_parameters",
    "row_sq_norms",
    "use_backend",
    "use_strategy",
    "warm_up",
]
