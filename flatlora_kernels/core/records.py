"""What a product with noise is made of, from the op down to the backends: a few small immutable records.

`Operands`, `Draw` and `Choice` are, one after the other, the arguments of `torch.ops.flatlora.linear`, whose schema is
written from their annotations (op/schema.py). `Product` is what a backend is asked for. A new option is a field here.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .quantized import QuantizedWeight

Weight = Tensor | QuantizedWeight


class Operands(NamedTuple):
    """Of ``y = x (W + eps)^T + scaling (lora_x A^T) B^T + bias``."""

    x: Tensor  # (..., K)
    weight: Weight  # (N, K)
    lora_A: Tensor | None  # (r, K)
    lora_B: Tensor | None  # (N, r)
    bias: Tensor | None  # (N,)
    lora_x: Tensor | None  # (..., K), None = x
    scaling: float


class Draw(NamedTuple):
    """Which noise a call sees: everything that `eps` depends on besides the indices themselves."""

    noise_scale: Tensor  # (N,) float32, std of eps per row
    seed: Tensor  # 0-d int64, all 64 bits count
    stream: int = 0
    noise: str = "gaussian"
    samples: int = 1
    sample_offset: int = 0
    antithetic: bool = False
    row_offset: int = 0
    col_offset: int = 0
    tile_bits: int = 0  # of "hadamard", of the whole layer: its tiles are 2^tile_bits square

    def sample_and_sign(self, group: int) -> tuple[int, int]:
        """The sample index and the sign of `z` that row group `group` uses."""
        sample = self.sample_offset + group
        if not self.antithetic:
            return sample, 1
        return sample >> 1, -1 if sample & 1 else 1


# Stands in the op's arguments where nothing is drawn.
NO_DRAW = Draw(None, None)  # type: ignore[arg-type]


class Choice(NamedTuple):
    """How a call is computed, see choice/resolve.py."""

    strategy: str
    noise_accum: str
    backend: str


class Product(NamedTuple):
    """``y = a P^T + scaling u lora^T + bias`` with P = W + eps, or in the input gradient its transpose.

    Forward and input gradient are this one product: of x, u = lora_x A^T and lora = B; of dY, u = scaling dY B and
    lora = A^T. With `offsets` it is of a mixture: weight, lora, bias and noise_scale have experts as a first dimension.
    """

    a: Tensor  # (M, contraction)
    weight: Weight  # (N, K)
    input_grad: bool = False
    u: Tensor | None = None  # (M, r), contiguous; with lora, or both None
    lora: Tensor | None = None  # (outputs, r), in the type of a or float32
    bias: Tensor | None = None  # (outputs,), likewise
    scaling: float = 1.0
    offsets: Tensor | None = None  # (E,), where experts' rows end; see `backends`, GROUPS

    @property
    def outputs(self) -> int:
        return self.weight.shape[-1 if self.input_grad else -2]

    @property
    def empty(self) -> bool:
        return 0 in self.a.shape or self.outputs == 0
