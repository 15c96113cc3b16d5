"""Triton's interpreter in half of the time: what it works out anew at every operation is kept.

No value changes but sums of float32 products, which are made in float64. NumPy's BLAS takes another order on each
processor, and a tile of 256 columns in one chain, which no GPU's tile has: a rule on how much a sum may lose would
judge the processor.
"""

from __future__ import annotations

import functools
from typing import Any


def speed_up() -> None:
    """Before the first kernel runs. What another Triton has not, or has otherwise, keeps its own speed."""
    import triton.language as tl
    from triton.runtime import interpreter

    for name, faster in (("_get_np_dtype", _numpy_type), ("_patch_lang", _patch_lang)):
        if hasattr(interpreter, name):
            setattr(interpreter, name, faster(getattr(interpreter, name)))
    tl.block_type.__init__ = _block_type(tl.block_type.__init__)
    tl.tensor.__init__ = _tensor(tl.tensor.__init__)
    interpreter.InterpreterBuilder.create_dot = _dot(interpreter.InterpreterBuilder.create_dot)
    semantic = type(interpreter.interpreter_semantic)
    for name, faster in (
        ("binary_op_type_checking_impl", _operands),
        ("binary_op_sanitize_overflow_impl", _overflow),
    ):
        if hasattr(semantic, name):
            setattr(semantic, name, faster(getattr(semantic, name)))


def _numpy_type(original: Any) -> Any:
    """Which fills a table of all types at every call."""
    known: dict[str, Any] = {}

    def numpy_type(ty: Any) -> Any:
        name = ty.scalar.name
        if name not in known:
            known[name] = original(ty)
        return known[name]

    return numpy_type


def _patch_lang(original: Any) -> Any:
    """A launch replaces members of the language, and each function that the kernel calls looks for them again."""
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def languages(fn: Any) -> list[Any]:
        return [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]

    def patch_lang(fn: Any) -> Any:
        found = languages(fn)
        if found and not any(tl.core.is_builtin(lang.load) for lang in found):
            return interpreter._LangPatchScope()
        return original(fn)

    return patch_lang


def _block_type(original: Any) -> Any:
    """Which checks a shape and prints it into a name: once for each."""
    known: dict[Any, dict[str, Any]] = {}

    def __init__(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *shape
        if key in known:
            self.__dict__.update(known[key])
            self.element_ty = element_ty
            return
        original(self, element_ty, shape)
        if vars(self).keys() == {"element_ty", "shape", "numel", "name"}:
            known[key] = dict(vars(self))

    return __init__


def _tensor(original: Any) -> Any:
    """Which makes new constants of its shape: once for each."""
    known: dict[Any, dict[str, Any]] = {}

    def __init__(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key in known:
            self.__dict__.update(known[key])
            self.handle, self.type, self.dtype = handle, type, type.scalar
            return
        original(self, handle, type)
        if vars(self).keys() == {"handle", "shape", "numel", "type", "dtype"}:
            known[key] = {name: getattr(self, name) for name in ("shape", "numel")}

    return __init__


def _dot(original: Any) -> Any:
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if not all(t.data.dtype == np.float32 for t in (a, b, d)):
            return original(self, a, b, d, *rest)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return TensorHandle(product.astype(np.float32) + d.data, d.dtype.scalar)

    return create_dot


def _operands(original: Any) -> Any:
    """Which finds for two operands of one type and shape that nothing is to be converted, and fills a constant anew."""
    import numpy as np
    from triton.language import constexpr, tensor

    numpy_of = {name: np.dtype(name) for name in ("int32", "uint32", "int64", "uint64")}
    numpy_of |= {"fp32": np.dtype("float32"), "fp64": np.dtype("float64")}
    limits = {name: np.iinfo(dtype) for name, dtype in numpy_of.items() if dtype.kind in "iu"}

    @functools.lru_cache(1 << 12)
    def filled(shape: tuple[int, ...], name: str, value: float) -> Any:
        data = np.full(shape, value, numpy_of[name])
        data.flags.writeable = False
        return data

    def like(t: Any, other: Any) -> Any:
        """The number `other` in the type and shape of `t`; None where more is to be thought of."""
        value = other.value if type(other) is constexpr else other
        name = t.dtype.name
        if type(value) is int and name in limits and limits[name].min <= value <= limits[name].max:
            data = filled(t.handle.data.shape, name, value)
        elif type(value) is float and name == "fp32" and value:
            data = filled(t.handle.data.shape, name, value)
        else:
            return None
        return tensor(type(t.handle)(data, t.handle.dtype), t.type)

    def binary_op_type_checking_impl(self: Any, lhs: Any, rhs: Any, *rest: Any, **more: Any) -> Any:
        left, right = (type(t) is tensor and t.dtype.name in numpy_of for t in (lhs, rhs))
        if left and right:
            a, b = lhs.type, rhs.type
            if lhs.dtype.name == rhs.dtype.name and a.is_block() == b.is_block():
                if not a.is_block() or a.shape == b.shape:
                    return lhs, rhs
        elif left and (number := like(lhs, rhs)) is not None:
            return lhs, number
        elif right and (number := like(rhs, lhs)) is not None:
            return number, rhs
        return original(self, lhs, rhs, *rest, **more)

    return binary_op_type_checking_impl


def _overflow(original: Any) -> Any:
    """Which computes again in int64, for an assertion that is left out but in Triton's debug mode."""

    def binary_op_sanitize_overflow_impl(self: Any, *operands: Any) -> None:
        if self.builder.options.debug:
            original(self, *operands)

    return binary_op_sanitize_overflow_impl
