"""Packed weights of every kind of layout, without the libraries that own them: random codes, scales and zeros."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flatlora_kernels import QuantizedWeight
from flatlora_kernels.core.formats.own import E2M1, NF4
from flatlora_kernels.core.quantized import Packing, Parts, number_table


def _own(format: str) -> Callable[[int, int, torch.dtype], QuantizedWeight]:
    def make(N: int, K: int, dtype: torch.dtype) -> QuantizedWeight:
        values = torch.randn(N, K, generator=_generator(N, K)) / max(K, 1) ** 0.5
        return QuantizedWeight.quantize(values.to(dtype), format)

    return make


def _generator(N: int, K: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * N + K)


def _bytes(count: int, g: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=g, dtype=torch.uint8)


def _nested(N: int, K: int, dtype: torch.dtype) -> QuantizedWeight:
    """bitsandbytes: NF4 whose block scales are packed themselves."""
    g, blocks = _generator(N, K), -(-N * K // 64)
    packing = Packing("nf4", N, K, dtype, dtype, 4, width=K, high_first=True, block=64, nested_block=256)
    scale_table = torch.linspace(-1, 1, 256)
    parts = Parts(
        _bytes(-(-N * K // 2), g), torch.tensor(NF4), _bytes(blocks, g), scale_table,
        torch.rand(-(-blocks // 256), generator=g) / 50, torch.tensor(0.04),
    )  # fmt: skip
    return QuantizedWeight(packing, parts)


def _int8_rows(N: int, K: int, dtype: torch.dtype) -> QuantizedWeight:
    """bitsandbytes: a scale a row, and 1 / 127 of all."""
    g = _generator(N, K)
    packing = Packing(
        "int8", N, K, dtype, dtype, 8, "int8", width=K, block_cols=max(K, 1), post=0.007874015718698502
    )
    scale = torch.rand(N, generator=g) / 5
    return QuantizedWeight(
        packing, Parts(_bytes(N * K, g), number_table("int8", 8, torch.device("cpu")), scale)
    )


def _words(N: int, K: int, dtype: torch.dtype) -> QuantizedWeight:
    """GPTQ: words of eight rows of the transposed weight, groups in any order, packed zeros, scales of float16."""
    g, group = _generator(N, K), 32
    groups, words = -(-K // group), -(-K // 8)
    rows, k = torch.arange(N), torch.arange(K)
    of_column = torch.randint(0, groups, (K,), generator=g)
    zero_words = -(-N // 8)
    packing = Packing(
        "gptq", N, K, torch.float16, dtype, 4, "uint", zero_bits=4, zero_plus=1, difference=torch.float16
    )
    parts = Parts(
        _bytes(4 * words * N, g), number_table("uint", 4, torch.device("cpu")),
        (torch.rand(groups * N, generator=g) / 40).half(), zero=_bytes(4 * groups * zero_words, g),
        row_bits=32 * rows, col_bits=k // 8 * (32 * N) + k % 8 * 4,
        row_scales=rows, col_scales=of_column * N,
        row_zeros=rows // 8 * 32 + rows % 8 * 4, col_zeros=of_column * (32 * zero_words),
    )  # fmt: skip
    return QuantizedWeight(packing, parts)


def _halves(bits: int) -> Callable[[int, int, torch.dtype], QuantizedWeight]:
    """HQQ: zeros of the type of the scales, differences rounded to it; 3 bits may lie in two bytes."""

    def make(N: int, K: int, dtype: torch.dtype) -> QuantizedWeight:
        g = _generator(N, K)
        rows, k = torch.arange(N), torch.arange(K)
        groups = -(-K // 16)
        own = torch.float32 if dtype.itemsize > 2 else dtype
        packing = Packing("hqq", N, K, own, dtype, bits, "uint", difference=own)
        parts = Parts(
            _bytes((N * K * bits + 7) // 8, g), number_table("uint", bits, torch.device("cpu")),
            (torch.rand(N * groups, generator=g) / 20).to(own), zero=(7 * torch.rand(N * groups, generator=g)).to(own),
            row_bits=rows * K * bits, col_bits=k * bits, row_scales=rows * groups, col_scales=k // 16,
        )  # fmt: skip
        return QuantizedWeight(packing, parts)

    return make


def _zeros(N: int, K: int, dtype: torch.dtype) -> QuantizedWeight:
    """torchao: int8 with a zero for each row, as floats."""
    q = _int8_rows(N, K, dtype)
    zero = torch.randint(-9, 9, (N,), generator=_generator(N, K)).float()
    return QuantizedWeight(q.packing._replace(post=1.0), q.parts._replace(zero=zero))


def _swizzled(N: int, K: int, dtype: torch.dtype) -> QuantizedWeight:
    """NVFP4 whose scales lie in another order, so that places of all are sums."""
    g, blocks = _generator(N, K), -(-K // 16)
    rows, k = torch.arange(N), torch.arange(K)
    packing = Packing("nvfp4", N, K, dtype, dtype, 4, nested_block=1 << 62)
    parts = Parts(
        _bytes(N * -(-K // 2), g), torch.tensor(E2M1),
        torch.randint(0, 120, (N * blocks,), generator=g, dtype=torch.uint8),
        number_table("e4m3", 8, torch.device("cpu")), torch.tensor([0.02]),
        row_bits=rows * (-(-K // 2) * 8), col_bits=4 * k, row_scales=rows, col_scales=k // 16 * N,
    )  # fmt: skip
    return QuantizedWeight(packing, parts)


LAYOUTS: dict[str, Callable[[int, int, torch.dtype], QuantizedWeight]] = {
    **{name: _own(name) for name in ("nf4", "int8", "fp8", "fp8_block", "mxfp4", "nvfp4")},
    "nf4_nested": _nested,
    "int8_rows": _int8_rows,
    "int8_zeros": _zeros,
    "nvfp4_swizzled": _swizzled,
    "gptq": _words,
    "hqq4": _halves(4),
    "hqq3": _halves(3),
    "hqq2": _halves(2),
}


def packed(layout: str, N: int, K: int, dtype: torch.dtype, device: str = "cpu") -> QuantizedWeight:
    """A packed weight (N, K) that decodes to `dtype`."""
    made = LAYOUTS[layout](N, K, dtype)
    parts = Parts(*(None if t is None else t.to(device) for t in made.parts))
    return QuantizedWeight(made.packing, parts)
