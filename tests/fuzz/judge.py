"""What must hold of a case; an AssertionError says what does not.

Values are judged by the rule of `compare.py`, where they are finite. Where they are not, a result has to be of the
class (finite, NaN, one of the infinities) that the formula in float64 has there, or the plain computation in the same
type, which is `F.linear` on the weight with its noise. Free are elements of which finite terms or intermediate
results leave the type: what is left of those depends on the order of the sum.

A packed weight is judged by the values that it decodes to, and where the same bits are promised also by the call on
those values.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from typing import Any

import compare
import numpy as np
import torch
from compare import Problem
from targets import Target
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels.backends.shared import products
from flatlora_kernels.core import noise as oracle
from flatlora_kernels.core.quantized import QuantizedWeight
from flatlora_kernels.core.records import Draw

from .cases import Built, Case, build
from .memory import same_bits

BY_INPUT = ("grad of weight", "grad of lora_A", "grad of lora_B", "grad of bias")
ROOT_MAX, ROOT_MIN = 1e19, 2e-19  # of float32, whose squares row_sq_norms adds up


def examine(case: Case, target: Target) -> None:
    built = build(case)
    before = {name: t.clone() for name, t in built.memory.items()}
    if case.workspace is None:
        os.environ.pop("FLATLORA_WORKSPACE", None)
    else:
        os.environ["FLATLORA_WORKSPACE"] = case.workspace
    torch.set_num_threads(case.threads[0])
    with np.errstate(all="ignore"):
        if isinstance(built.called.weight, QuantizedWeight):
            _decoded(target, built.called.weight, built.problem.weight)
        _norms(target, case, built)
        _noise(target, built)
        if isinstance(built.called.weight, QuantizedWeight):
            _refusal(target, built)
        first = _product(target, built)
        if isinstance(built.called.weight, QuantizedWeight):
            _as_its_values(target, built, first)
        _again(target, case, built, first)
    for name, t in built.memory.items():
        assert name == "out" or same_bits(t, before[name]), f"{name}: an input was written to"


def _class(a: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(a), 2.0, np.where(np.isinf(a), np.sign(a), 0.0))


def _first(where: np.ndarray) -> str:
    at = tuple(int(i[0]) for i in np.nonzero(where))
    return f"first at {at}, {int(where.sum())} of {where.size}"


def _wide(t: Tensor) -> np.ndarray:
    return t.detach().double().cpu().numpy()


def _decoded(target: Target, weight: QuantizedWeight, values: Tensor) -> None:
    """What strategy "panel" multiplies where nothing is drawn, in memory of both orders."""
    N, K = weight.shape
    for out in (weight.new_empty(N, K), weight.new_empty(K, N).t()):
        if out.numel():
            target.module.perturb(weight, None, out)
            _equal("the decoded weight", out, values)


def _refusal(target: Target, built: Built) -> None:
    """Fused products take some packed weights alone, and say so of others: those cases go on by panels."""
    p, o = built.called, built.called.options
    module: Any = target.module
    if "noise_scale" not in o or not p.grad_y.numel() or not p.x.numel() or module.fuses_packed(p.weight):
        return
    fused = o["strategy"] == "fused" and o["noise"] in module.FUSES
    split = o["strategy"] is None and o["noise_accum"] == "split"
    try:
        target.linear(**p.inputs, **o)
    except NotImplementedError as error:
        asked = "strategy='fused'" if fused else "noise_accum='split'"
        right = re.search(f"does not implement {asked} for this weight", str(error))
        assert (fused or split) and right, f"refused: {error}"
        o |= {"strategy": "panel", "noise_accum": None}
    else:
        # Split noise may also be a transform.
        assert not fused and (not split or o["noise"] == "hadamard"), "not refused"


def _as_its_values(target: Target, built: Built, first: dict[str, Tensor]) -> None:
    """The same bits as of the call on the values, where one product does both."""
    o = built.problem.options
    transforms = o.get("noise") == "hadamard" and o["strategy"] in (None, "transform")
    if target.backend not in ("cpu", "reference") or "noise_scale" not in o or transforms:
        return
    dense = compare.run(target, built.problem)
    for name, value in first.items():
        assert same_bits(value, dense[name]), f"{name}: other bits than with the values of the packed weight"


def _product(target: Target, built: Built) -> dict[str, Tensor]:
    """The op's output and gradients, judged."""
    p = built.problem
    got = compare.run(target, built.called)
    eps = compare.group_eps(target, p)
    leading, p = p.x.shape[:-1], _by_rows(p)
    ordinary = compare.plain(p, eps)
    # As one product, not one for each sample.
    ordinary["grad of weight"] = products.matmul(p.grad_y.t(), p.x)
    exact, scale = compare.exact_and_scale(p, eps)
    free = _free(p, eps, exact)
    scale_of_noise = p.options.get("noise_scale")
    if target.backend in ("triton", "cuda") and (
        p.options["noise_accum"] == "split" or (scale_of_noise is not None and scale_of_noise.isinf().any())
    ):  # NaN in place of infinities: docs/faq.md, "Limits of the kernels"
        for k, f in free.items():
            f |= np.isinf(np.asarray(exact[k], dtype=np.float64)) | np.isinf(
                _wide(ordinary[k]).reshape(f.shape)
            )
    may_transform = p.options.get("noise") == "hadamard" and p.options["strategy"] in (None, "transform")
    unsure = {k: np.zeros_like(f) for k, f in free.items()}
    if may_transform:  # of two sums apart, each may be infinite: whatever it is, it is not finite
        for k, f in free.items():
            infinite = ~np.isfinite(np.asarray(exact[k], dtype=np.float64))
            infinite |= ~np.isfinite(_wide(ordinary[k]).reshape(f.shape))
            unsure[k], free[k] = infinite & ~f, infinite | f
    if built.called is not built.problem:  # a packed weight has no gradient
        del exact["grad of weight"]
    dtype = p.x.dtype
    info = torch.finfo(dtype)
    # Rounding below the smallest normal number is absolute; products of bfloat16 in hardware round such terms to zero.
    least = info.smallest_normal * info.eps
    if dtype == torch.bfloat16:
        least += max(p.weight.shape) * torch.finfo(torch.float32).smallest_normal
    assert got.keys() == exact.keys()
    for name, value in got.items():
        like = ordinary[name]
        assert value.dtype == like.dtype, f"{name}: expected {like.dtype}, got {value.dtype}"
        shape = like.shape if name in BY_INPUT else (*leading, like.shape[1])
        assert value.shape == shape, f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}"
        shape = exact[name].shape
        mine, plain = _wide(value).reshape(shape), _wide(like).reshape(shape)
        right = np.asarray(exact[name], dtype=np.float64)
        right = np.where(np.abs(right) > info.max * (1 + info.eps / 4), np.sign(right) * np.inf, right)
        right = np.where(np.isnan(exact[name]), np.nan, right)
        finite = np.isfinite(mine) & unsure[name] & ~np.isfinite(right) & ~np.isfinite(plain)
        assert not finite.any(), f"{name}: {mine[finite][0]}, where the formula gives {right[finite][0]}"
        kind = _class(mine)
        wrong = (kind != _class(right)) & (kind != _class(plain)) & ~free[name]
        assert not wrong.any(), (
            f"{name}: {mine[wrong][0]}, where the formula gives {exact[name][wrong][0]} and the plain computation"
            f" {plain[wrong][0]}; {_first(wrong)}"
        )
        judged = (kind == 0) & (_class(right) == 0) & (_class(plain) == 0)

        def check(ordinary: np.ndarray) -> None:
            compare.check(
                name,  # noqa: B023
                torch.from_numpy(mine[judged]),  # noqa: B023
                exact[name][judged],  # noqa: B023
                torch.from_numpy(ordinary),
                np.maximum(scale[name][judged], least / info.eps),  # noqa: B023
                info.eps,
            )

        try:
            check(plain[judged])
        except AssertionError:
            # Of few elements the plain one may be right by luck: what counts is its error in any order of its sums.
            in_parts = target.backend == "cuda" and dtype == torch.float32
            check(_worst(p, eps, name, exact[name], in_parts)[judged])
    return got


def _worst(p: Problem, eps: list[Tensor], name: str, exact: np.ndarray, in_parts: bool) -> np.ndarray:
    """The plain result `name`, each element with its largest error over orders of the sums, layouts, slices, and
    separate products or `addmm`, which begins from what it adds to (as `F.linear` does from a bias).

    Args:
        in_parts: also with products of float32 as three of tf32, as tensor cores do them.
    """
    worst = np.array(exact, dtype=np.float64)
    error = np.zeros(worst.shape)
    rows, (N, K) = len(p.x) // len(eps), p.weight.shape

    def compute(n: Tensor, k: Tensor, m: Tensor, turned: bool, added: bool) -> Tensor:
        def part(t: Tensor | None, *order: Tensor | None) -> Tensor | None:
            for dim, index in enumerate(order):
                t = t if t is None or index is None else t.index_select(dim, index)
            return t.t().contiguous().t() if turned and t is not None and t.dim() == 2 else t

        q = Problem(
            x=part(p.x, m, k), weight=part(p.weight, n, k), lora_A=part(p.lora_A, None, k), lora_B=part(p.lora_B, n),
            bias=part(p.bias, n), lora_x=part(p.lora_x, m, k), grad_y=part(p.grad_y, m, n), options=p.options,
        )  # type: ignore[arg-type] # fmt: skip
        if name == "grad of weight":
            return products.matmul(q.grad_y.t(), q.x)
        parts = [e[n][:, k] for e in eps]
        if added and name in ("y", "grad of x"):
            return _added(q, parts, name, turned, in_parts and not turned)
        return compare.plain(q, parts)[name]

    def note(found: Tensor, *order: Tensor | None) -> None:
        for dim, index in enumerate(order):
            found = found if index is None else found.index_select(dim, torch.argsort(index))
        values = _wide(found).reshape(worst.shape)
        larger = np.abs(values - exact) > error
        worst[larger], error[larger] = values[larger], np.abs(values - exact)[larger]

    for attempt in range(16):
        generator = torch.Generator().manual_seed(attempt)
        n, k, m = (torch.randperm(size, generator=generator) for size in (N, K, rows))
        m = (m + rows * torch.arange(len(eps))[:, None]).flatten()
        orders = {
            "y": (m, n), "grad of x": (m, k), "grad of lora_x": (m, k), "grad of weight": (n, k),
            "grad of lora_A": (None, k), "grad of lora_B": (n,), "grad of bias": (n,),
        }  # fmt: skip
        note(compute(n, k, m, attempt % 2 == 1, attempt % 4 >= 2), *orders[name])
    # Strategy "panel" asks the vendor for as little as eight outputs at a time.
    n, k, m = torch.arange(N), torch.arange(K), torch.arange(len(p.x))
    for turned, added in itertools.product((False, True), repeat=2):
        if name == "y":
            note(torch.cat([compute(i, k, m, turned, added) for i in n.split(8)], 1))
        elif name == "grad of x":
            note(torch.cat([compute(n, i, m, turned, added) for i in k.split(8)], 1))
    return worst


def _in_parts(a: Tensor, b: Tensor) -> Tensor:
    def parts(t: Tensor) -> tuple[Tensor, Tensor]:
        high = ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
        return high, t - high

    (a_high, a_low), (b_high, b_low) = parts(a.contiguous()), parts(b.contiguous())
    return a_low @ b_high + a_high @ b_low + a_high @ b_high


def _added(p: Problem, eps: list[Tensor], name: str, turned: bool, in_parts: bool) -> Tensor:
    """The plain output, or gradient of x, with `addmm` wherever something is added."""
    dtype, forward = p.x.dtype, name == "y"
    found = []
    a = p.x if forward else p.grad_y
    for group, eps_g in zip(a.chunk(len(eps)) if a.numel() else [a], eps, strict=False):
        perturbed = (p.weight.to(torch.promote_types(dtype, torch.float32)) + eps_g).to(dtype)
        perturbed = perturbed.t().contiguous().t() if turned else perturbed.contiguous()
        factor = perturbed.t() if forward else perturbed
        if in_parts:
            product = _in_parts(group, factor)
            found.append(product + p.bias.to(dtype) if forward and p.bias is not None else product)
        elif forward and p.bias is not None:
            found.append(torch.addmm(p.bias.to(dtype), group, factor))
        else:
            found.append(group @ factor)
    total = torch.cat(found)
    if p.lora_A is None or not forward and p.lora_x is not None:
        return total
    A, B = p.lora_A.to(dtype), p.lora_B.to(dtype)
    if forward:
        return total.addmm_(
            (p.x if p.lora_x is None else p.lora_x) @ A.t(), B.t(), alpha=p.options["scaling"]
        )
    return total.addmm_(p.options["scaling"] * (p.grad_y @ B), A)


def _by_rows(p: Problem) -> Problem:
    """The same, where `x` is a matrix."""
    rows = {k: None if t is None else t.detach() for k, t in p.inputs.items()}
    rows["x"] = p.x.detach().flatten(0, -2)
    rows["lora_x"] = None if p.lora_x is None else p.lora_x.detach().flatten(0, -2)
    return Problem(**rows, grad_y=p.grad_y.flatten(0, -2), options=p.options)  # type: ignore[arg-type]


def _free(p: Problem, eps: list[Tensor], exact: dict[str, Any]) -> dict[str, np.ndarray]:
    """Where a result is free: something that is finite leaves the type on the way to it."""
    info = torch.finfo(p.x.dtype)
    most = info.max / 2
    terms = 3e38 / 2 if p.x.dtype == torch.float16 else most

    def size(t: Tensor | None) -> Any:
        return None if t is None else np.nan_to_num(np.abs(_wide(t)), nan=0, posinf=0)

    inputs = {k: size(t) for k, t in p.inputs.items()}
    # Scaled last, a sum may have left the type before.
    dy, scaling = size(p.grad_y), max(abs(p.options["scaling"]), 1)
    sizes = compare.formula(inputs, [inputs["weight"] + size(e) for e in eps], dy, scaling)
    free = {}
    for name, large in sizes.items():
        value = np.abs(np.asarray(exact[name], dtype=np.float64))
        near = (value > most) & (value < 8 * most)
        free[name] = (large > terms) | near
    if p.lora_A is not None:
        if p.options["scaling"] == 0:  # BLAS does not look at what it multiplies by zero
            for name, value in exact.items():
                free[name] |= np.isnan(np.asarray(value, dtype=np.float64))
        branch = inputs["x" if p.lora_x is None else "lora_x"]
        u, v = branch @ inputs["lora_A"].T, scaling * (dy @ inputs["lora_B"])
        over_u, over_v = (u > most).any(1), (v > most).any(1)
        for name, over in (("y", over_u), ("grad of x", over_v), ("grad of lora_x", over_v)):
            if name in free:
                free[name] |= over[:, None]
        free["grad of lora_B"] |= over_u.any()
        free["grad of lora_A"] |= over_v.any()
    return free


def _norms(target: Target, case: Case, built: Built) -> None:
    """row_sq_norms and flat_noise_scale; puts the noise_scale that `sigma` gives into the options."""
    p, scaling = built.problem, case.scaling
    A, B = p.lora_A, p.lora_B
    weight = built.called.weight
    squares = fk.row_sq_norms(weight, A, B, scaling=scaling, backend=target.backend)
    W = _wide(p.weight)
    update = np.zeros_like(W) if A is None else scaling * (_wide(B) @ _wide(A))
    bound = np.abs(W) + (0 if A is None else abs(scaling) * (np.abs(_wide(B)) @ np.abs(_wide(A))))
    finite = np.nan_to_num(bound, nan=0, posinf=0)
    norm, got = np.sqrt(((W + update) ** 2).sum(1)), np.sqrt(_wide(squares))
    assert got.shape == norm.shape
    fits = finite.max(1, initial=0) * math.sqrt(max(W.shape[1], 1)) < ROOT_MAX
    wrong = (_class(got) != _class(norm)) & (fits | ~np.isfinite(norm))
    assert not wrong.any(), f"row_sq_norms: root {got[wrong][0]}, expected {norm[wrong][0]}; {_first(wrong)}"
    judged = (_class(got) == 0) & (_class(norm) == 0) & fits
    sums = np.sqrt((W**2).sum(1)) + np.sqrt((update**2).sum(1))
    # Where the terms of B A cancel each other, its own rounding in float32 is larger than that.
    rounding = math.sqrt(case.rank or 0) * 2**-23 * np.sqrt((finite**2).sum(1))
    limit = 1e-5 * sums + rounding + ROOT_MIN * math.sqrt(max(W.shape[1], 1))
    wrong = judged & (np.abs(got - norm) > limit)
    assert not wrong.any(), f"row_sq_norms: root {got[wrong][0]}, expected {norm[wrong][0]}; {_first(wrong)}"
    if built.sigma is None:
        return
    made = fk.flat_noise_scale(weight, A, B, scaling=scaling, sigma=built.sigma, backend=target.backend)
    expected = got * float(built.sigma) / math.sqrt(max(W.shape[1], 1))
    sure = (np.abs(expected) < 1e37) & (np.abs(expected) > 1e-37) | ~np.isfinite(expected)
    wrong = sure & ~np.isclose(_wide(made), expected, rtol=1e-5, atol=0, equal_nan=True)
    assert not wrong.any(), (
        f"flat_noise_scale: {_wide(made)[wrong][0]}, expected {expected[wrong][0]}; {_first(wrong)}"
    )
    p.options["noise_scale"] = made


def _noise(target: Target, built: Built) -> None:
    """eps, beside its specification; what perturb_weight makes of it."""
    p, o = built.problem, built.problem.options
    if "noise_scale" not in o:
        return
    N, K = p.weight.shape
    scale, seed = o["noise_scale"], o["seed"]
    which = {k: o[k] for k in ("stream", "noise", "antithetic", "row_offset", "col_offset")}
    bits = oracle.tile_bits(*o.get("layer_shape", (N, K))) if N and K and o["noise"] == "hadamard" else 0
    draw = Draw(
        scale, None, samples=1, sample_offset=o["sample_offset"] + o["samples"] - 1, tile_bits=bits, **which
    )
    which |= {k: o[k] for k in ("layer_shape",) if k in o}
    sample = o["sample_offset"] + o["samples"] - 1
    eps = target.noise(scale, K, seed=seed, sample=sample, **which)
    as_tensor = seed if isinstance(seed, Tensor) else torch.tensor((seed + 2**63) % 2**64 - 2**63)
    expected, in_type = (
        oracle.epsilon(draw._replace(seed=as_tensor), K, t) for t in (torch.float32, p.x.dtype)
    )
    if o["noise"] == "gaussian":
        size = scale[:, None].double()
        # A z near zero, or a product near the largest number, may become either.
        sure = ((expected.double() / size).abs() > 1e-3) & (size < 1e36) & (size > 1e-30) | size.isnan()
        sure &= (size < 1e18) & (size > 1e-18) | torch.tensor(target.backend in ("cpu", "reference"))
        error = (eps.double() - expected.double()).abs() - target.gaussian_atol * size
        wrong = sure & ~((error <= 2e-7 * expected.double().abs()) | (eps.isnan() & expected.isnan()))
    else:
        wrong = ~((eps == expected) | (eps.isnan() & expected.isnan()))
    assert not wrong.any(), (
        f"materialize_noise: {eps[wrong][0]}, expected {expected[wrong][0]}; {_first(wrong.numpy())}"
    )
    rounded = target.noise(scale, K, seed=seed, sample=sample, dtype=p.x.dtype, **which)
    eps = eps if o["noise"] == "gaussian" else in_type
    _equal("materialize_noise in the type of x", rounded, eps.to(p.x.dtype))
    # Sums in float32 (float64 for float64), rounded once.
    wide = p.weight.to(torch.promote_types(p.x.dtype, torch.float32)) + eps
    more = {"seed": seed, "sample": sample, "backend": target.backend, **which}
    given = built.memory["out"].clone()
    weight = built.called.weight
    made = fk.perturb_weight(weight, scale, out=built.out, **more)
    assert made is built.out
    if target.backend in ("cpu", "reference"):
        _equal("perturb_weight", made, wide.to(p.x.dtype))
    else:  # a fused multiply-add rounds once where these sums round twice
        limit = torch.finfo(p.x.dtype).eps * wide.abs() + 2**-22 * (p.weight.abs() + eps.abs())
        beside = (made.double() - wide.double()).abs() <= limit
        wrong = ~(beside | (made == wide.to(p.x.dtype)) | (made.isnan() & wide.isnan()))
        assert not wrong.any(), f"perturb_weight: {made[wrong][0]}, expected {wide[wrong][0]}"
    _equal("perturb_weight without out", fk.perturb_weight(weight, scale, **more), made)
    if weight is not p.weight:
        _equal("perturb_weight of the values", fk.perturb_weight(p.weight, scale, **more), made)
    made.fill_(7)
    if given.numel():
        inside = built.memory["out"] == 7
        assert int(inside.sum()) == made.numel(), "perturb_weight: out"
        assert bool(built.memory["out"][~inside].isnan().all()), "perturb_weight wrote beside out"


def _equal(name: str, got: Tensor, expected: Tensor) -> None:
    wrong = ~((got == expected) | (got.isnan() & expected.isnan()))
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}"
    if got.dtype == torch.bfloat16:  # AVX-512's conversion takes what is not normal for zero
        wrong &= (got != 0) | (expected.abs() >= torch.finfo(torch.bfloat16).smallest_normal)
    assert not wrong.any(), f"{name}: {got[wrong][0]}, expected {expected[wrong][0]}; {_first(wrong.numpy())}"


def _again(target: Target, case: Case, built: Built, first: dict[str, Tensor]) -> None:
    """The same bits: once more, where fewer gradients are asked for, from `sigma`, and with other threads."""
    p = built.called
    second = compare.run(target, p)
    for name, value in first.items():
        assert same_bits(second[name], value), f"{name}: a second call gives other bits"
    inputs: dict[str, Tensor | None] = {k: None if t is None else t.detach() for k, t in p.inputs.items()}
    options = p.options
    if built.sigma is not None and case.sigma:
        options = {k: v for k, v in options.items() if k != "noise_scale"} | {"sigma": built.sigma}
    trained = sorted(n for n, t in inputs.items() if isinstance(t, Tensor))
    wanted = [n for i, n in enumerate(trained) if case.number >> i & 1]
    for name in wanted:
        inputs[name].requires_grad_()  # type: ignore[union-attr]
    y = target.linear(**inputs, **options)
    assert same_bits(y.detach(), first["y"]), "y: other bits from sigma, or with fewer gradients"
    if wanted:
        grads = torch.autograd.grad(y, [inputs[n] for n in wanted], p.grad_y.reshape(y.shape))
        for name, grad in zip(wanted, grads, strict=True):
            assert same_bits(grad, first[f"grad of {name}"]), f"grad of {name}: other bits, asked for alone"
    if target.backend != "cpu" or case.strategy != "fused" or "noise_scale" not in p.options:
        return
    # The adapter's small products are torch's, which promises nothing.
    bare = {"x": p.x.detach().requires_grad_(), "weight": p.weight, "bias": p.bias}
    seen = []
    for threads in case.threads:
        torch.set_num_threads(threads)
        y = target.linear(**bare, **p.options)
        seen.append((y.detach(), torch.autograd.grad(y, bare["x"], p.grad_y)[0]))  # type: ignore[arg-type]
    for name, one, other in zip(("y", "grad of x"), *seen, strict=True):
        assert same_bits(one, other), (
            f"{name}: other bits with {case.threads[1]} threads than {case.threads[0]}"
        )
