"""Tensors of a given layout, in memory that ends or begins at a page that nobody may touch."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "transposed", "sliced", "padded", "padded transposed", "expanded")
PLACES = ("heap", "ends at a guard page", "begins at a guard page")
_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of zeros, and of NaN its place: IEEE 754 leaves open which of two operands gives its payload."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    return torch.where(t.isnan(), torch.nan, t).contiguous().view(_INT[t.element_size()])


def strides_of(shape: tuple[int, ...], layout: str, axis: int) -> tuple[int, ...]:
    """In elements; `axis` is the dimension that is sliced or expanded."""
    sizes = [max(size, 1) for size in shape]
    order = list(range(len(sizes)))
    if layout.endswith("transposed"):
        order.reverse()
    if layout.startswith("padded"):
        sizes[order[-1]] += 5
    if layout == "sliced":
        sizes[axis] *= 2
    if layout == "expanded":
        sizes[axis] = 1
    strides, step = [0] * len(sizes), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= sizes[dim]
    if layout == "sliced":
        strides[axis] *= 2
    if layout == "expanded":
        strides[axis] = 0
    return tuple(strides)


def place(values: Tensor, layout: str, axis: int, offset: int, where: str) -> tuple[Tensor, Tensor]:
    """`values` laid out anew, and all of the memory around them, NaN where it is not theirs.

    Args:
        offset: elements before the first one, on the heap; an odd one is a misaligned address.
    """
    shape = tuple(values.shape)
    axis = axis % len(shape) if shape else 0
    strides = strides_of(shape, layout, axis) if shape else ()
    if not values.numel():
        return values.new_empty(0).as_strided(shape, strides), values.new_empty(0)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if where == "heap":
        memory, begin = values.new_empty(offset + extent + 3), offset
    else:
        memory, begin = _guarded(extent, values.dtype, where), 0
    memory.fill_(float("nan") if values.is_floating_point() else -1)
    if layout == "expanded":
        values = values.narrow(axis, 0, 1)
    memory.as_strided(values.shape, strides, begin).copy_(values)
    return memory.as_strided(shape, strides, begin), memory


def _guarded(count: int, dtype: torch.dtype, where: str) -> Tensor:
    page = mmap.PAGESIZE
    size = count * dtype.itemsize
    inside = -(-size // page) * page
    pages = mmap.mmap(-1, inside + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for guard in (address, address + page + inside):
        if protect(guard, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    begin = page if where == "begins at a guard page" else page + inside - size
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=begin)
