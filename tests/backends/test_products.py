"""The vendor's products: what they make of types that torch multiplies slowly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from targets import randn
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora_kernels.backends.shared import products
from flatlora_kernels.core.records import Product


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values(dtype: torch.dtype, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every product, on processors with and without instructions for bfloat16."""
    monkeypatch.setattr(products, "_slow_bfloat16", lambda: slow)
    x, W, A, B, bias, dy = (
        randn(*shape, dtype=dtype) for shape in ((7, 40), (24, 40), (3, 40), (24, 3), (24,), (7, 24))
    )
    lora_dtype = torch.float32 if dtype.itemsize == 2 else dtype  # beside a 16-bit x
    exact = {k: t.double() for k, t in {"x": x, "W": W, "A": A, "B": B, "bias": bias, "dy": dy}.items()}
    u = products.linear(x, A.to(lora_dtype))
    v, dB = products.adapter_grads(dy, u, B.to(lora_dtype), 0.5)
    y = products.plain(Product(x, W, False, u, B.to(lora_dtype), bias.to(lora_dtype), 0.5))
    dx = products.plain(Product(dy, W, True, v, A.to(lora_dtype).t()))
    u64, v64 = u.double(), v.double()
    wanted: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        "u": (u, exact["x"] @ exact["A"].t()),
        "v": (v, 0.5 * exact["dy"] @ exact["B"]),
        "dB": (dB, 0.5 * exact["dy"].t() @ u64),
        "y": (y, exact["x"] @ exact["W"].t() + 0.5 * u64 @ exact["B"].t() + exact["bias"]),
        "dx": (dx, exact["dy"] @ exact["W"] + v64 @ exact["A"]),
        "dA": (products.matmul(v.t(), x), v64.t() @ exact["x"]),
    }
    eps = torch.finfo(dtype).eps
    for name, (got, value) in wanted.items():
        assert got.dtype == dtype, name
        torch.testing.assert_close(
            got.double(), value, rtol=0, atol=4 * eps * value.abs().max().item(), msg=name
        )


def test_what_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(capability: str, machine: str = "x86_64") -> bool:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        monkeypatch.setattr(products.platform, "machine", lambda: machine)
        return products._slow_bfloat16.__wrapped__()  # type: ignore[no-any-return]

    assert of("AVX2") and of("DEFAULT") and of("AVX2", "AMD64")
    assert not of("AVX512") and not of("DEFAULT", "aarch64")
    for slow in (False, True):
        monkeypatch.setattr(products, "_slow_bfloat16", lambda slow=slow: slow)
        assert products.slow(torch.empty(1, dtype=torch.float16))
        assert products.slow(torch.empty(1, dtype=torch.bfloat16)) == slow
        for tensor in (torch.empty(1), torch.empty(1, dtype=torch.bfloat16, device="meta")):
            assert not products.slow(tensor)


def test_the_adapters_slow_products_go_through_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large one is left to the choice between the vendor's and our own: its weight is never copied."""
    monkeypatch.setattr(products, "_slow_bfloat16", lambda: True)
    multiplied: list[set[torch.dtype]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.name() in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::addmm.out", "aten::linear"):
                multiplied.append({a.dtype for a in args if isinstance(a, torch.Tensor)})
            return func(*args, **(kwargs or {}))

    x, W, A, B = (randn(*s, dtype=torch.bfloat16) for s in ((7, 40), (24, 40), (3, 40), (24, 3)))
    with Watch():
        u = products.linear(x, A)
        products.adapter_grads(randn(7, 24, dtype=torch.bfloat16), u, B, 0.5)
        products.matmul(u.t(), x)
    assert multiplied == 4 * [{torch.float32}]
    multiplied.clear()
    with Watch():
        products.plain(Product(x, W, False, u, B))
    assert multiplied == [{torch.bfloat16}, {torch.float32}]
