"""Nothing is timed that is not right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import SCALING
from .providers import Run

OUTPUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
_MAX_ROWS = 96  # of x; a row of the output, or of dX, depends on that row of x, or of dY, alone


class Verdict(NamedTuple):
    error_over_limit: float  # of the worst result; above 1 is wrong
    detail: str

    @property
    def passed(self) -> bool:
        return self.error_over_limit <= 1


def check(run: Run, copy: int = 0, step: Callable[[int], Sequence[Tensor]] | None = None) -> Verdict:
    """Compares one step of `run` (or `step`) with the same formula in float64, given the eps that the provider used.

    The error may be at most 2 times (gradients: 3 times) that of the formula evaluated in the case's dtype
    with W + eps rounded once, plus one ulp of the size of the partial sums. That must hold for the largest
    error and, with the ulp divided by the root of the number of elements, for the root mean square.
    """
    names = ("y", "grad of x", "grad of lora_A", "grad of lora_B")
    if run.problem.case.mode == "input_grad":
        names = names[1:]
    got = dict(zip(names, (step or run.step)(copy), strict=False))
    for name, value in got.items():
        if not value.isfinite().all():
            return Verdict(math.inf, f"{name} is not finite everywhere")
    with torch.no_grad():
        i, eps = run.inputs[copy], run.eps(copy)
        rows = torch.randperm(len(i.x), generator=torch.Generator().manual_seed(0))[:_MAX_ROWS].to(i.x.device)

        def formula(W: Tensor, scaling: float, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
            """The output and the gradient of x in `rows`, the other gradients whole."""
            x, A, B, dy = (None if t is None else convert(t) for t in (i.x, i.lora_A, i.lora_B, i.grad_y))
            out = {"y": x[rows] @ W.t(), "grad of x": dy[rows] @ W}
            if A is not None:
                u, v = x @ A.t(), scaling * (dy @ B)  # (M, r)
                out["y"] += scaling * (u[rows] @ B.t())
                out["grad of x"] += v[rows] @ A
                out["grad of lora_A"] = v.t() @ x
                out["grad of lora_B"] = scaling * (dy.t() @ u)
            return out

        W64 = i.weight.double() if eps is None else i.weight.double() + eps.double()
        Wd = i.weight if eps is None else (i.weight.to(torch.promote_types(i.x.dtype, torch.float32)) + eps)
        exact = formula(W64, SCALING, Tensor.double)
        plain = formula(Wd.to(i.x.dtype), SCALING, lambda t: t)
        scale = formula(W64.square(), SCALING**2, lambda t: t.double().square())
        got |= {name: got[name][rows] for name in ("y", "grad of x") if name in got}
        return max(_judge(n, got[n], exact[n], plain[n], scale[n].sqrt()) for n in got)


def _judge(name: str, got: Tensor, exact: Tensor, plain: Tensor, scale: Tensor) -> Verdict:
    factor = OUTPUT_FACTOR if name == "y" else GRADIENT_FACTOR
    ulp = torch.finfo(got.dtype).eps
    error, plain_error = (got.double() - exact).abs(), (plain.double() - exact).abs()
    over = []
    for what, reduce, floor in (
        ("max", torch.Tensor.max, ulp),
        ("rms", lambda t: t.square().mean().sqrt(), ulp / math.sqrt(error.numel())),
    ):
        e, limit = reduce(error).item(), factor * reduce(plain_error).item() + floor * reduce(scale).item()
        ratio = e / limit if math.isfinite(e) else math.inf
        over.append(Verdict(ratio, f"{name}: {what} error {e:.3g}, limit {limit:.3g}"))
    return max(over)
