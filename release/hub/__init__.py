"""Products with a low-rank adapter under weight noise that is drawn inside the kernel (Flat-LoRA)."""

from . import layers
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

__all__ = [
    "QuantizedWeight",
    "backend_info",
    "explain",
    "flat_noise_scale",
    "fused_flat_lora_grouped_linear",
    "fused_flat_lora_linear",
    "grouped_noise_scale",
    "layers",
    "materialize_noise",
    "noise_product",
    "perturb_weight",
    "row_sq_norms",
    "use_backend",
    "use_strategy",
]
