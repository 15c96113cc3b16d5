"""What is timed: the op, in all its ways, and the rivals.

A provider computes ``x @ (W + eps)^T + SCALING * (x @ A^T) @ B^T`` (A, B where the case has a rank; eps where
the provider is noisy) for one copy of the inputs, and can say which eps it used. In mode input_grad it computes
``dY @ (W + eps) + SCALING * (dY @ B) @ A`` instead.
"""

from __future__ import annotations

import functools
import importlib.util
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels import backends
from flatlora_kernels.choice import resolve
from flatlora_kernels.choice.dispatch import OWN_PRODUCT
from flatlora_kernels.core.noise import KINDS, NEAR_GAUSSIAN_VARIANCE, factor, tile_bits
from flatlora_kernels.core.records import Choice, Draw
from flatlora_kernels.op import autograd, compute

from .problem import SCALING, Inputs, Problem

NOISELESS = "none"
REFERENCE = "reference"  # the backend that is the maths written out; a rival only where there is no other
# What comes before the backend in the name of a provider -> what is asked for.
WAYS = {
    "fused": "fused kernels",
    "split": "noise_accum='split'",
    "panel": "strategy='panel'",
    "transform": "strategy='transform'",
    "vendor": "torch's product",
}
# What becomes of a way where nothing is drawn, or of a strategy: see choice/dispatch.py.
STRATEGIES = {"split": "fused", "auto": None, "vendor": "plain"}
NORMAL = ("gaussian", "near_gaussian")  # the rest is drawn as random signs where torch draws


class Unfit(Exception):
    """Why a provider sits this case out."""


class Run:
    """A provider at work on one problem. Raises `Unfit` from its constructor where it cannot."""

    capturable = True  # by a CUDA graph; a generator of torch cannot be seeded inside one

    def __init__(self, problem: Problem, noise: str) -> None:
        self.problem = problem
        self.inputs = problem.inputs
        self.noise = noise

    def forward(self, copy: int) -> Tensor:
        """(M, N)."""
        raise NotImplementedError

    def input_grad(self, copy: int) -> Tensor:
        """dX, (M, K), from dY alone."""
        raise Unfit("has no input gradient without a forward pass")

    def finish(self, copy: int) -> None:
        """What is left to do after the backward pass."""

    def eps(self, copy: int) -> Tensor | None:
        """The (N, K) perturbation that `forward` uses; None = none."""
        return None

    def leaves(self, copy: int) -> list[Tensor]:
        """What is differentiated: x, then lora_A and lora_B."""
        return self.inputs[copy].leaves

    def step(self, copy: int) -> tuple[Tensor, ...]:
        """The output and, in mode forward+backward, the gradients of x, lora_A and lora_B; or dX alone."""
        if not self.problem.backward:
            with torch.no_grad():
                alone = self.problem.case.mode == "input_grad"
                result = self.input_grad(copy) if alone else self.forward(copy)
            self.finish(copy)
            return (result,)
        y = self.forward(copy)
        grads = torch.autograd.grad(y, self.leaves(copy), self.inputs[copy].grad_y)
        self.finish(copy)
        return (y.detach(), *grads)


class Provider(NamedTuple):
    name: str
    make: Callable[[Any, str], Any]
    noises: tuple[str, ...] = (NOISELESS,)
    what: str | None = None  # None = as the class says
    fused: bool = False
    needs_rank: bool = False
    compiled: bool = False  # takes seconds to set up, and far more memory than it uses


def available_backends(device: str) -> dict[str, str | None]:
    """Backend -> None, or why it cannot run on `device`."""
    reasons = {}
    for name, info in fk.backend_info().items():
        types = backends.get(name).DEVICE_TYPES
        fits = types is None or device in types
        reasons[name] = info["unavailable"] or (None if fits else f"takes tensors on {', '.join(types)}")
    return reasons


def usable_backends(device: str) -> list[str]:
    return [name for name, reason in available_backends(device).items() if reason is None]


def every(device: str) -> list[Provider]:
    """All providers that make sense on `device`, the op's backends first."""
    usable = usable_backends(device)
    kernels = [name for name in usable if name != REFERENCE] or usable

    def fused(backend: str, way: str = "fused") -> Provider:
        what = f"the op on backend {backend}" + (f", {WAYS[way]}" if way != "fused" else "")
        make = functools.partial(Fused, backend=backend, way=way)
        return Provider(f"{way}:{backend}", make, noises(backend, way), what, fused=True)

    def perturb(backend: str) -> Provider:
        make = functools.partial(Perturb, backend=backend)
        return Provider(f"perturb:{backend}", make, KINDS, Perturb.__doc__)

    from . import rivals  # which builds on this module

    auto = functools.partial(Fused, way="auto")
    return [
        *map(fused, usable),
        Provider("auto", auto, (NOISELESS, *KINDS), "the op, nothing asked for", fused=True),
        *(fused(backend, way) for way in ("split", "panel", "transform") for backend in kernels),
        *(fused(backend, "vendor") for backend in kernels if backend in OWN_PRODUCT),
        Provider("plain", Plain),
        Provider("lora", Lora, needs_rank=True),
        Provider("peft", Peft, needs_rank=True),
        Provider("inplace", InPlace, KINDS),
        Provider("eager", Eager, KINDS),
        Provider("compile", Compile, KINDS, compiled=True),
        *map(perturb, kernels),
        *rivals.every(device),
    ]


def noises(backend: str, way: str) -> tuple[str, ...]:
    """What a way of the op is there for."""
    if way in ("vendor", "transform"):
        return (NOISELESS,) if way == "vendor" else ("hadamard",)
    own = (NOISELESS,) if way == "fused" and backend in OWN_PRODUCT else ()
    return (*own, *(kind for kind in KINDS if way == "panel" or backends.fuses(backend, kind)))


class OfBackend(Run):
    def __init__(self, problem: Problem, noise: str, backend: str | None) -> None:
        super().__init__(problem, noise)
        dtypes = None if backend is None else backends.get(backend).DTYPES
        if dtypes is not None and problem.dtype not in dtypes:
            raise Unfit(f"does not take {problem.case.dtype}")
        self.backend = backend

    def draw(self, copy: int, **more: Any) -> dict[str, Any]:
        """Arguments of the public functions."""
        return {"seed": self.inputs[copy].seed, "stream": self.problem.stream, "noise": self.noise, **more}

    def eps(self, copy: int) -> Tensor | None:
        """In float32, as a weight of the problem's type sees it."""
        if self.noise == NOISELESS:
            return None
        i, K = self.inputs[copy], self.problem.case.K
        draw = self.draw(copy, backend=self.backend)
        if self.noise == "gaussian":
            return fk.materialize_noise(i.noise_scale, K, **draw)
        z = fk.materialize_noise(torch.ones_like(i.noise_scale), K, **draw)
        integers = z * NEAR_GAUSSIAN_VARIANCE**0.5 if self.noise == "near_gaussian" else z
        return factor(i.noise_scale, self.noise, self.problem.dtype)[:, None] * integers.round()


class Fused(OfBackend):
    """The op; way: a key of WAYS, or "auto"."""

    def __init__(self, problem: Problem, noise: str, backend: str | None = None, way: str = "fused") -> None:
        super().__init__(problem, noise, backend)
        self.way = way
        strategy, accum = STRATEGIES.get(way, way), "split" if way == "split" else None
        self.choice = {"strategy": strategy, "noise_accum": accum, "backend": backend}
        if way == "vendor":  # nobody can ask for it by name
            self.resolved = Choice("plain", "folded", str(backend))
            return
        device, dtype, numel = problem.device, problem.dtype, problem.inputs[0].weight.numel()
        drawn = None if noise == NOISELESS else noise
        try:
            self.resolved = resolve.resolve(backend, strategy, accum, device, dtype, numel, drawn)
        except NotImplementedError as reason:
            raise Unfit(str(reason)) from None
        self.backend = self.resolved.backend

    def forward(self, copy: int) -> Tensor:
        x, weight, A, B, _, noise_scale, _ = self.inputs[copy]
        if self.noise == NOISELESS:
            if self.way == "auto":
                return fk.fused_flat_lora_linear(x, weight, A, B, scaling=SCALING, **self.choice)
            # Our own and the vendor's are called alike.
            return autograd.linear(x, weight, A, B, None, None, SCALING, None, self.resolved)
        draw = self.draw(copy, noise_scale=noise_scale, samples=self.problem.samples)
        return fk.fused_flat_lora_linear(x, weight, A, B, scaling=SCALING, **draw, **self.choice)

    def input_grad(self, copy: int) -> Tensor:
        """As the backward pass of the op does it."""
        i, draw = self.inputs[copy], None
        if self.noise != NOISELESS:
            bits = tile_bits(*i.weight.shape) if self.noise == "hadamard" else 0
            draw = Draw(i.noise_scale, i.seed, self.problem.stream, self.noise, self.problem.samples)
            draw = draw._replace(tile_bits=bits)
        return compute.linear_input_grad(i.grad_y, i.weight, i.lora_A, self.v(copy), draw, self.resolved)

    def v(self, copy: int) -> Tensor | None:
        """scaling dY B, (M, r)."""
        i = self.inputs[copy]
        if i.lora_B is None:
            return None
        return compute.adapter_grads(i.grad_y, None, i.lora_B, SCALING, self.resolved.backend)[0]


def product(i: Inputs, weight: Tensor, mode: str) -> Tensor:
    """By a weight that is in memory; in one pass over the result less than PEFT's separate multiply and add."""
    alone = mode == "input_grad"
    result = i.grad_y @ weight if alone else i.x @ weight.t()
    if i.lora_A is None:
        return result
    if alone:
        return torch.addmm(result, i.grad_y @ i.lora_B, i.lora_A, alpha=SCALING)
    return torch.addmm(result, i.x @ i.lora_A.t(), i.lora_B.t(), alpha=SCALING)


class _Unfused(Run):
    """Multiplies by a weight that is in memory."""

    def weight(self, copy: int) -> Tensor:
        return self.inputs[copy].weight

    def forward(self, copy: int) -> Tensor:
        return product(self.inputs[copy], self.weight(copy), "forward")

    def input_grad(self, copy: int) -> Tensor:
        return product(self.inputs[copy], self.weight(copy), "input_grad")


class Perturb(OfBackend, _Unfused):
    """W + eps in one pass by perturb_weight, kept for the backward: the strongest unfused rival"""

    def __init__(self, problem: Problem, noise: str, backend: str) -> None:
        super().__init__(problem, noise, backend)
        self.scratch = torch.empty_like(problem.inputs[0].weight)

    def weight(self, copy: int) -> Tensor:
        i, draw = self.inputs[copy], self.draw(copy, out=self.scratch, backend=self.backend)
        return fk.perturb_weight(i.weight, i.noise_scale, **draw)


class Lora(_Unfused):
    """LoRA without noise, unfused"""


class Plain(_Unfused):
    """x @ W.T (input_grad: dY @ W), no adapter and no noise: what the ratios are to"""

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        self.inputs = [i._replace(lora_A=None, lora_B=None) for i in problem.inputs]


class Peft(Run):
    """PEFT's LoRA layer, no noise"""

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        if problem.case.rank and importlib.util.find_spec("peft") is None:
            raise Unfit("peft is not installed (pip install peft)")
        self.layers = [self._layer(i) for i in problem.inputs]

    def base(self, i: Inputs) -> torch.nn.Module:
        """What the adapter is put over."""
        N, K = i.weight.shape
        base = torch.nn.Linear(K, N, bias=False, dtype=i.weight.dtype)
        base.weight.data = i.weight
        return base

    def _layer(self, i: Inputs) -> Any:
        with torch.device(i.weight.device):
            base = self.base(i)
            if i.lora_A is None:
                return base
            import peft

            rank, model = len(i.lora_A), torch.nn.Sequential(base)
            model.is_loaded_in_4bit = hasattr(base.weight, "quant_state")  # PEFT goes by it
            config = peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["0"])
            layer = peft.inject_adapter_in_model(config, model)[0]
        layer.lora_A["default"].weight = torch.nn.Parameter(i.lora_A.detach())
        layer.lora_B["default"].weight = torch.nn.Parameter(i.lora_B.detach())
        return layer

    def leaves(self, copy: int) -> list[Tensor]:
        layer, x = self.layers[copy], self.inputs[copy].x
        if not self.problem.case.rank:
            return [x]
        return [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def forward(self, copy: int) -> Tensor:
        return self.layers[copy](self.inputs[copy].x)


class Eager(_Unfused):
    """eps by torch's generator (normal, or signs), W + eps in memory of its own, matmul"""

    capturable = False

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        self.generator = torch.Generator(problem.device)

    def eps(self, copy: int) -> Tensor:
        """In as few passes as eager torch can."""
        i = self.inputs[copy]
        self.generator.manual_seed(copy)
        z = torch.empty_like(i.weight)
        if self.noise in NORMAL:
            z.normal_(generator=self.generator)
        else:
            z.random_(0, 2, generator=self.generator).mul_(2).sub_(1)
        return z.mul_(i.noise_scale[:, None])

    def weight(self, copy: int) -> Tensor:
        return self.inputs[copy].weight + self.eps(copy)


class InPlace(Eager):
    """the Flat-LoRA authors': add eps to W in place, matmul, draw eps again from its seed, subtract"""

    # github.com/nblt/Flat-LoRA, logTrainer.py, with the row norms at hand and no (N, K) tensor of them.

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        self.weights = problem.writable_weights

    def weight(self, copy: int) -> Tensor:
        return self.weights[copy].add_(self.eps(copy))

    def finish(self, copy: int) -> None:
        self.weights[copy].sub_(self.eps(copy))


def _eps_in_torch(i: Inputs, noise: str) -> Tensor:
    if noise in NORMAL:
        z = torch.randn_like(i.weight)
    else:
        z = torch.where(torch.rand_like(i.weight, dtype=torch.float32) < 0.5, -1.0, 1.0)
    return (z * i.noise_scale[:, None]).to(i.weight.dtype)


_compiled_for: weakref.ref[Problem] | None = None


def compile_anew(problem: Problem) -> None:
    """Forgets graphs of other problems: static ones of many shapes would run into the limit of recompilations."""
    global _compiled_for
    if _compiled_for is None or _compiled_for() is not problem:
        torch.compiler.reset()
        _compiled_for = weakref.ref(problem)


class Compile(Run):
    """torch.compile of `eager`, with the generator that the compiler puts into its kernels"""

    capturable = False

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        compile_anew(problem)
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        self._product = compiled(lambda i, noise, mode: product(i, i.weight + _eps_in_torch(i, noise), mode))
        # Values go by the seed and the place in the weight, so a graph of its own draws the same.
        self._eps = compiled(_eps_in_torch)

    def _drawn(self, call: Callable[..., Tensor], copy: int, *more: str) -> Tensor:
        torch.manual_seed(copy)
        return call(self.inputs[copy], self.noise, *more)

    def forward(self, copy: int) -> Tensor:
        return self._drawn(self._product, copy, "forward")

    def input_grad(self, copy: int) -> Tensor:
        return self._drawn(self._product, copy, "input_grad")

    def eps(self, copy: int) -> Tensor:
        return self._drawn(self._eps, copy)
