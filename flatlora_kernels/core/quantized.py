"""A frozen weight in a packed format: what it is made of, and how its values come out of it.

Every format is described by the same few numbers (`Packing`), so that a backend has one decoder. Element (n, k) of what
was packed is, in float32 and rounded after each step as the owner does it,

    v = ((table[code] - zero) * scale) * post,    rounded to `dtype`, then to `target`

with `code` at a bit address and `scale` at an index that are either those of a matrix in rows ("flat"), or sums of a
number of the row and one of the column, which the tensors `row_bits` to `col_zeros` hold. `QuantizedWeight.decoded` is
the oracle that every backend is tested against. Readers of other libraries' layers are in `core/formats/`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What makes `table` without looking: "table" has no such rule.
NUMBERS = ("table", "int8", "uint", "e4m3", "e5m2")


class Packing(NamedTuple):
    """All of a packed weight that is not a tensor."""

    format: str  # its name, for people
    N: int  # rows and columns of this view
    K: int
    dtype: torch.dtype  # of its owner's dequantisation
    target: torch.dtype  # what it decodes to: `dtype`, or what it was cast to
    bits: int  # of a code: 1, 2, 3, 4 or 8
    number: str = "table"  # of NUMBERS; "table": codes mean nothing but what `table` says
    row: int = 0  # where the view begins in what was packed
    col: int = 0
    width: int = 0  # columns of what was packed
    high_first: bool = False  # flat, 4 bits: of a byte's two codes the upper one comes first
    block: int = 0  # flat: scale index = flat element index // block; 0 = by rows and columns of blocks
    block_rows: int = 1  # ... (n // block_rows) * scale_stride + k // block_cols
    block_cols: int = 1
    scale_stride: int = 1
    nested_block: int = 0  # of the scale's own scale; 0 = none
    post: float = 1.0
    zero_bits: int = 0  # of zeros packed at bit addresses; 0 = `zero` is indexed as `scale`, or there is none
    zero_plus: int = 0  # added to a packed zero
    difference: torch.dtype = torch.float32  # what table[code] - zero is rounded to


class Parts(NamedTuple):
    """Its tensors, all on one device; None = the format has none."""

    codes: Tensor  # (bytes,) uint8
    table: Tensor  # (2**bits,) float32
    scale: Tensor  # 1-d float16, bfloat16 or float32; or uint8, to be looked up in scale_table
    scale_table: Tensor | None = None  # (256,) float32
    nested: Tensor | None = None  # 1-d float32: scale_table[...] * nested[scale index // nested_block]
    offset: Tensor | None = None  # 0-d float32, added to that
    zero: Tensor | None = None  # 1-d float, as `scale`; or (bytes,) uint8 of packed zeros
    # Bit addresses and scale indices of what is not flat, int64: that of (n, k) is rows[n] + cols[k].
    row_bits: Tensor | None = None
    col_bits: Tensor | None = None
    row_scales: Tensor | None = None
    col_scales: Tensor | None = None
    row_zeros: Tensor | None = None
    col_zeros: Tensor | None = None


# What `core/formats/` reads and makes: each reader with the names of its formats; each maker, of a float32 weight and
# the type that it had, by its format's name. A reader returns None for what is none of its library's.
readers: dict[Callable[[Any], QuantizedWeight | None], tuple[str, ...]] = {}
makers: dict[str, Callable[[Tensor, torch.dtype], QuantizedWeight]] = {}


class QuantizedWeight:
    """A frozen weight (N, K) in a packed format, immutable; shares the memory of the layer that owns it.

    `row_sq_norms`, `flat_noise_scale`, `perturb_weight`, `explain` and the op take it wherever they take a weight. It
    does not train. Make one with `of` or `quantize`.

    Attributes:
        packing: `Packing`. parts: `Parts`.
        format: its name. shape: (N, K). dtype: what it decodes to. device.
    """

    __slots__ = ("__weakref__", "_packed", "packing", "parts")
    requires_grad = False
    is_meta = False

    packing: Packing
    parts: Parts
    _packed: Any

    def __init__(self, packing: Packing, parts: Parts) -> None:
        _check(packing, parts)
        self._set(packing, Parts._make(None if t is None else _savable(t) for t in parts))

    def _set(self, packing: Packing, parts: Parts) -> None:
        object.__setattr__(self, "packing", packing)
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "_packed", None)

    @staticmethod
    def made(packing: Packing, parts: Parts) -> QuantizedWeight:
        """One of what was checked before."""
        weight = QuantizedWeight.__new__(QuantizedWeight)
        weight._set(packing, parts)
        return weight

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"QuantizedWeight: {name!r} cannot be set, it is immutable")

    def __reduce__(self) -> Any:
        return QuantizedWeight, (self.packing, self.parts)

    def remember(self, packed: Any) -> None:
        """What a compiled library takes in the place of this, made once."""
        object.__setattr__(self, "_packed", packed)

    @staticmethod
    def of(source: Any) -> QuantizedWeight:
        """The packed weight of another library's layer or tensor, which goes on owning it.

        Raises:
            TypeError: a format that is not supported; the message lists those that are.
            ValueError: its state is not consistent: what is wrong is named.
        """
        found = source if isinstance(source, QuantizedWeight) else find(source)
        if found is not None:
            return found
        known = "; ".join(name for names in readers.values() for name in names)
        got = type(source).__name__
        if isinstance(source, torch.nn.Module) and hasattr(source, "weight"):
            got += (
                f" with a weight of {type(source.weight).__name__}, {getattr(source.weight, 'dtype', None)}"
            )
        raise TypeError(f"source: expected a weight in one of the formats {known}; got {got}")

    @staticmethod
    def quantize(weight: Tensor, format: str) -> QuantizedWeight:
        """`weight` (N, K) packed, each value rounded to the nearest.

        Args:
            format: "nf4" (blocks of 64), "int8" (a scale a row), "fp8" (e4m3, a scale a row), "fp8_block" (e4m3, blocks
                of 128 x 128), "mxfp4" (blocks of 32, a power of two each) or "nvfp4" (blocks of 16).

        Raises:
            TypeError, ValueError: the weight is no matrix of floating-point numbers, or the format is another one.
        """
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in FLOAT_TYPES:
            got = (
                f"{weight.dtype} of shape {tuple(weight.shape)}"
                if isinstance(weight, Tensor)
                else type(weight).__name__
            )
            raise TypeError(
                f"weight: expected a floating-point tensor (out_features, in_features), got {got}"
            )
        if format not in makers:
            raise ValueError(f"format: expected one of {', '.join(makers)}, got {format!r}")
        with torch.no_grad():
            return makers[format](weight.detach().float().contiguous(), weight.dtype)

    @property
    def format(self) -> str:
        return self.packing.format

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.packing.N, self.packing.K))

    @property
    def dtype(self) -> torch.dtype:
        return self.packing.target

    @property
    def device(self) -> torch.device:
        return self.parts.codes.device

    def dim(self) -> int:
        return 2

    def numel(self) -> int:
        return self.packing.N * self.packing.K

    def element_size(self) -> int:
        """Bytes of a decoded value."""
        return self.packing.target.itemsize

    def stride(self, dim: int | None = None) -> Any:
        """That of `dequantize()`."""
        strides = (self.packing.K, 1)
        return strides if dim is None else strides[dim]

    def is_floating_point(self) -> bool:
        return True

    def is_neg(self) -> bool:
        return False

    def new_empty(self, *size: Any, dtype: torch.dtype | None = None) -> Tensor:
        return self.parts.codes.new_empty(*size, dtype=dtype or self.dtype)

    def new_zeros(self, *size: Any, dtype: torch.dtype | None = None) -> Tensor:
        return self.parts.codes.new_zeros(*size, dtype=dtype or self.dtype)

    def detach(self) -> QuantizedWeight:
        return self

    def narrow(self, dim: int, start: int, length: int) -> QuantizedWeight:
        """Rows (dim 0) or columns (dim 1) [start, start + length)."""
        p = self.packing
        if start < 0 or length < 0 or start + length > self.shape[dim]:
            raise ValueError(
                f"length: expected a part of the {self.shape[dim]} of dimension {dim}, got {length} from {start} on"
            )
        if dim == 0:
            return QuantizedWeight.made(p._replace(N=length, row=p.row + start), self.parts)
        return QuantizedWeight.made(p._replace(K=length, col=p.col + start), self.parts)

    def to(self, dtype: torch.dtype) -> QuantizedWeight:
        """The same, decoding to `dtype`: what ``dequantize().to(dtype)`` has."""
        if dtype == self.packing.target:
            return self
        if dtype not in FLOAT_TYPES:
            raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype}")
        return QuantizedWeight.made(self.packing._replace(target=dtype), self.parts)

    def dequantize(self) -> Tensor:
        """(N, K) in `dtype`: bit for bit what the owning library's own dequantisation gives."""
        return self.decoded()

    def decoded(self) -> Tensor:
        """`dequantize` by plain torch, on any device."""
        p, t = self.packing, self.parts
        n = torch.arange(p.row, p.row + p.N, device=self.device)
        k = torch.arange(p.col, p.col + p.K, device=self.device)
        if t.row_bits is None:
            i = n[:, None] * p.width + k
            bits = (i ^ 1 if p.high_first else i) * p.bits
            if p.block:
                scale_index = i // p.block
            else:
                scale_index = (n // p.block_rows * p.scale_stride)[:, None] + k // p.block_cols
        else:
            bits = t.row_bits[n][:, None] + t.col_bits[k]  # type: ignore[index]
            scale_index = t.row_scales[n][:, None] + t.col_scales[k]  # type: ignore[index]
        v = t.table[_codes(t.codes, bits, p.bits)]
        if p.zero_bits:
            places = t.row_zeros[n][:, None] + t.col_zeros[k]  # type: ignore[index]
            v = v - (_codes(t.zero, places, p.zero_bits) + p.zero_plus).float()  # type: ignore[arg-type]
        elif t.zero is not None:
            v = v - t.zero[scale_index].float()
        v = v.to(p.difference).float()
        if t.scale_table is None:
            scale = t.scale[scale_index].float()
        else:
            scale = t.scale_table[t.scale[scale_index].long()]
            if t.nested is not None:
                scale = scale * t.nested[scale_index // p.nested_block]
            if t.offset is not None:
                scale = scale + t.offset
        v = v * scale
        if p.post != 1.0:
            v = v * p.post
        return v.to(p.dtype).to(p.target)

    def __repr__(self) -> str:
        return f"QuantizedWeight({self.format}, {tuple(self.shape)}, {self.dtype}, {self.device})"


def find(source: Any) -> QuantizedWeight | None:
    """`QuantizedWeight.of`, or None where the source is in no format that is known."""
    found = (read(source) for read in readers)
    return next((weight for weight in found if weight is not None), None)


def _savable(t: Tensor) -> Tensor:
    """`t`, or what shares its memory where autograd would not save it: made in inference mode, as hqq does."""
    if not t.is_inference():
        return t
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=t.dtype, device=t.device)
        return alias.set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())


def _check(p: Packing, t: Parts) -> None:
    """Shapes, types and sizes. What index tensors hold is not read: it is their maker's to get right."""

    def wrong(name: str, got: object, expected: str) -> ValueError:
        return ValueError(f"{name}: expected {expected}, as format {p.format!r} has it, got {got}")

    def need(
        name: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], count: int, exact: bool = False
    ) -> None:
        if tensor is None:
            raise wrong(name, None, "a tensor")
        if tensor.dtype not in dtypes:
            raise wrong(name, tensor.dtype, " or ".join(str(d).removeprefix("torch.") for d in dtypes))
        if not tensor.is_contiguous() or tensor.dim() > 1:
            raise wrong(
                name, f"shape {tuple(tensor.shape)}, strides {tensor.stride()}", "numbers side by side"
            )
        if tensor.numel() < count or (exact and tensor.numel() != count):
            raise wrong(name, tensor.numel(), f"{'' if exact else 'at least '}{count} numbers")
        if tensor.device != t.codes.device:
            raise wrong(name, tensor.device, f"the device of codes, {t.codes.device}")

    def blocks(count: int, size: int) -> int:
        return -(-count // size)

    small = (torch.float16, torch.bfloat16, torch.float32)
    rows, cols = p.row + p.N, p.col + p.K
    flat = t.row_bits is None
    if p.bits not in (1, 2, 3, 4, 8) or p.number not in NUMBERS:
        raise wrong(
            "packing", f"{p.bits} bits of {p.number!r}", f"1, 2, 3, 4 or 8 bits of {', '.join(NUMBERS)}"
        )
    if flat and p.width < cols:
        raise wrong("packing.width", p.width, f"at least {cols}, where this view ends")
    scales = 0 if flat else 1
    if flat and p.N and p.K:
        last = (rows - 1) * p.width + cols - 1
        if p.block:
            scales = last // p.block + 1
        else:
            scales = (rows - 1) // p.block_rows * p.scale_stride + (cols - 1) // p.block_cols + 1
    need("codes", t.codes, (torch.uint8,), blocks(p.width * rows * p.bits, 8) if flat else 1)
    need("table", t.table, (torch.float32,), 1 << p.bits, exact=True)
    # A view has more scales than it needs, a whole weight has not.
    whole = flat and p.block > 0 and (p.row, p.col, p.K) == (0, 0, p.width)
    need("scale", t.scale, small if t.scale_table is None else (torch.uint8,), scales, exact=whole)
    if t.scale_table is not None:
        need("scale_table", t.scale_table, (torch.float32,), 256, exact=True)
    if p.nested_block or t.nested is not None:
        need("nested", t.nested, (torch.float32,), blocks(scales, p.nested_block or 1))
    if t.offset is not None:
        need("offset", t.offset, (torch.float32,), 1, exact=True)
    if p.zero_bits:
        need("zero", t.zero, (torch.uint8,), 1)
    elif t.zero is not None:
        need("zero", t.zero, small, scales)
    places = {"row_bits": rows, "col_bits": cols, "row_scales": rows, "col_scales": cols}
    if p.zero_bits:
        places |= {"row_zeros": rows, "col_zeros": cols}
    for name, count in places.items():
        if not flat:
            need(name, getattr(t, name), (torch.int64,), count)


def _codes(packed: Tensor, bits: Tensor, width: int) -> Tensor:
    """Codes of `width` bits at these bit addresses; bytes are little-endian."""
    byte = bits >> 3
    word = packed[byte].long()
    if width not in (1, 2, 4, 8):  # may lie in two bytes
        word = word | packed[(byte + 1).clamp_max(packed.numel() - 1)].long() << 8
    return word >> (bits & 7) & ((1 << width) - 1)


@functools.cache
def number_table(number: str, bits: int, device: torch.device) -> Tensor:
    """The `table` of a number that has a rule, (2**bits,) float32."""
    codes = torch.arange(1 << bits, device=device)
    if number == "uint":
        return codes.float()
    if number == "int8":
        return (codes - 256 * (codes >= 128)).float()
    types = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e8m0": torch.float8_e8m0fnu}
    if number not in types:
        raise ValueError(f"number: expected uint, int8, e4m3, e5m2 or e8m0, got {number!r}")
    return codes.to(torch.uint8).view(types[number]).float()
