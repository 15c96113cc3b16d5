"""What is timed. A rival is a class under `@provider`; the backends of the package come by themselves.

A provider computes ``x @ (W + eps)^T + SCALING * (x @ A^T) @ B^T`` (A, B where the case has a rank; eps where
the provider is noisy) for one copy of the inputs, and can say which eps it used. In mode input_grad it computes
``dY @ (W + eps) + SCALING * (dY @ B) @ A`` instead.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flatlora_kernels as fk
from flatlora_kernels import backends
from flatlora_kernels.choice import resolve
from flatlora_kernels.spec.noise import KINDS

from .problem import SCALING, Inputs, Problem
from .shapes import Case

NOISELESS = "none"
REFERENCE = "reference"  # the backend that is the maths written out; a rival only where there is no other


class Unfit(Exception):
    """Why a provider sits this case out."""


class Run:
    """A provider at work on one problem. Raises `Unfit` from its constructor where it cannot."""

    adapter = True  # computes the adapter's share, where the case has one
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
        return self.inputs[copy].leaves if self.adapter else [self.inputs[copy].x]

    def step(self, copy: int) -> tuple[Tensor, ...]:
        """The output and, in mode forward+backward, the gradients of x, lora_A and lora_B; or dX alone."""
        if not self.problem.backward:
            with torch.no_grad():
                result = (
                    self.input_grad(copy) if self.problem.case.mode == "input_grad" else self.forward(copy)
                )
            self.finish(copy)
            return (result,)
        y = self.forward(copy)
        grads = torch.autograd.grad(y, self.leaves(copy), self.inputs[copy].grad_y)
        self.finish(copy)
        return (y.detach(), *grads)


class Provider(NamedTuple):
    name: str
    make: Callable[[Problem, str], Run]
    what: str
    noisy: bool
    fused: bool = False
    needs_rank: bool = False
    compiled: bool = False  # takes seconds to set up, and far more memory than it uses

    @property
    def noises(self) -> tuple[str, ...]:
        return KINDS if self.noisy else (NOISELESS,)


_registered: list[Provider] = []


def provider(name: str, **options: bool) -> Callable[[type[Run]], type[Run]]:
    def register(run: type[Run]) -> type[Run]:
        _registered.append(Provider(name, run, run.__doc__ or "", **options))
        return run

    return register


def available_backends(device: str) -> dict[str, str | None]:
    """Backend -> None, or why it cannot run on `device`."""
    reasons = {}
    for name, info in fk.backend_info().items():
        types = backends.get(name).DEVICE_TYPES
        reasons[name] = info["unavailable"] or (
            None if types is None or device in types else f"takes tensors on {', '.join(types)}"
        )
    return reasons


def _fit(backend: str, case: Case) -> None:
    dtypes = backends.get(backend).DTYPES
    if dtypes is not None and getattr(torch, case.dtype) not in dtypes:
        raise Unfit(f"does not take {case.dtype}")


def every(device: str) -> list[Provider]:
    """All providers that make sense on `device`, the op's backends first."""
    usable = [name for name, reason in available_backends(device).items() if reason is None]
    kernels = [name for name in usable if name != REFERENCE] or usable

    def fused(backend: str, way: str = "fused") -> Provider:
        what = f"the op on backend {backend}" + (f", {WAYS[way]}" if way != "fused" else "")
        make = lambda p, n: Fused(p, n, backend, way)  # noqa: E731
        return Provider(f"{way}:{backend}", make, what, noisy=True, fused=True)

    def perturb(backend: str) -> Provider:
        what = Perturb.__doc__ or ""
        return Provider(f"perturb:{backend}", lambda p, n: Perturb(p, n, backend), what, noisy=True)

    auto = Provider("auto", lambda p, n: Fused(p, n, None, "auto"), "the op, nothing asked for", True, True)
    others = [fused(backend, way) for way in WAYS if way != "fused" for backend in kernels]
    return [*map(fused, usable), auto, *others, *_registered, *map(perturb, kernels)]


def _add_adapter(y: Tensor, i: Inputs) -> Tensor:
    """One pass over y less than PEFT's separate multiply and add."""
    if i.lora_A is None:
        return y
    return torch.addmm(y, i.x @ i.lora_A.t(), i.lora_B.t(), alpha=SCALING)


def _input_grad(perturbed: Tensor, i: Inputs) -> Tensor:
    """By a weight that is in memory."""
    dx = i.grad_y @ perturbed
    if i.lora_A is None:
        return dx
    return torch.addmm(dx, i.grad_y @ i.lora_B, i.lora_A, alpha=SCALING)


def _draw(out: Tensor, noise: str, noise_scale: Tensor, generator: torch.Generator) -> Tensor:
    """eps by torch's own generator, in as few passes as eager torch can."""
    if noise == "gaussian":
        out.normal_(generator=generator)
    else:
        out.random_(0, 2, generator=generator).mul_(2).sub_(1)
    return out.mul_(noise_scale[:, None])


# What comes before the backend in the name of a provider -> what is asked for.
WAYS = {"fused": "fused kernels", "split": "noise_accum='split'", "panel": "strategy='panel'"}


class Fused(Run):
    """The op; way: a key of WAYS, or "auto"."""

    def __init__(self, problem: Problem, noise: str, backend: str | None, way: str = "fused") -> None:
        super().__init__(problem, noise)
        if backend is not None:
            _fit(backend, problem.case)
        accum = "split" if way == "split" else None
        strategy = {"fused": "fused", "split": "fused", "panel": "panel", "auto": None}[way]
        self.choice = {"strategy": strategy, "noise_accum": accum, "backend": backend}
        device, dtype = problem.device, problem.dtype
        numel = problem.inputs[0].weight.numel()
        try:
            self.resolved = resolve.resolve(backend, strategy, accum, device, dtype, numel)
        except NotImplementedError as reason:
            raise Unfit(str(reason)) from None

    def forward(self, copy: int) -> Tensor:
        i = self.inputs[copy]
        return fk.fused_flat_lora_linear(
            i.x, i.weight, i.lora_A, i.lora_B, scaling=SCALING, seed=i.seed, noise=self.noise,
            noise_scale=i.noise_scale, **self.choice,
        )  # fmt: skip

    def input_grad(self, copy: int) -> Tensor:
        """As the backward pass of the op does it."""
        i = self.inputs[copy]
        strategy, accum, backend = self.resolved
        v = None
        if i.lora_B is not None:
            v, _ = torch.ops.flatlora.adapter_grads(i.grad_y, None, i.lora_B, SCALING, backend)
        draw = (i.noise_scale, i.seed, 0, self.noise, 1, 0, False, 0, 0)
        return torch.ops.flatlora.linear_input_grad(
            i.grad_y, i.weight, i.lora_A, v, *draw, strategy, accum, backend
        )

    def eps(self, copy: int) -> Tensor:
        return _own_eps(self.inputs[copy], self.noise, self.resolved.backend)


def _own_eps(i: Inputs, noise: str, backend: str) -> Tensor:
    return fk.materialize_noise(i.noise_scale, i.weight.shape[1], seed=i.seed, noise=noise, backend=backend)


class Perturb(Run):
    """W + eps in one pass by perturb_weight, kept for the backward: the strongest unfused rival"""

    def __init__(self, problem: Problem, noise: str, backend: str) -> None:
        super().__init__(problem, noise)
        _fit(backend, problem.case)
        self.backend = backend
        self.scratch = torch.empty_like(problem.inputs[0].weight)

    def _perturbed(self, i: Inputs) -> Tensor:
        return fk.perturb_weight(
            i.weight, i.noise_scale, seed=i.seed, noise=self.noise, out=self.scratch, backend=self.backend
        )

    def forward(self, copy: int) -> Tensor:
        i = self.inputs[copy]
        return _add_adapter(i.x @ self._perturbed(i).t(), i)

    def input_grad(self, copy: int) -> Tensor:
        i = self.inputs[copy]
        return _input_grad(self._perturbed(i), i)

    def eps(self, copy: int) -> Tensor:
        return _own_eps(self.inputs[copy], self.noise, self.backend)


@provider("plain", noisy=False)
class Plain(Run):
    """x @ W.T (input_grad: dY @ W), no adapter and no noise: what the ratios are to"""

    adapter = False

    def forward(self, copy: int) -> Tensor:
        i = self.inputs[copy]
        return i.x @ i.weight.t()

    def input_grad(self, copy: int) -> Tensor:
        return self.inputs[copy].grad_y @ self.inputs[copy].weight


@provider("lora", noisy=False, needs_rank=True)
class Lora(Run):
    """LoRA without noise, unfused"""

    def forward(self, copy: int) -> Tensor:
        i = self.inputs[copy]
        return _add_adapter(i.x @ i.weight.t(), i)

    def input_grad(self, copy: int) -> Tensor:
        return _input_grad(self.inputs[copy].weight, self.inputs[copy])


@provider("peft", noisy=False, needs_rank=True)
class Peft(Run):
    """PEFT's LoRA layer, no noise"""

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        if importlib.util.find_spec("peft") is None:
            raise Unfit("peft is not installed (pip install peft)")
        self.layers = [self._layer(i) for i in problem.inputs]

    def _layer(self, i: Inputs) -> Any:
        import peft

        rank, K = i.lora_A.shape
        with torch.device(i.weight.device):
            base = torch.nn.Linear(K, i.weight.shape[0], bias=False, dtype=i.weight.dtype)
            base.weight.data = i.weight
            config = peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["0"])
            layer = peft.inject_adapter_in_model(config, torch.nn.Sequential(base))[0]
        layer.lora_A["default"].weight = torch.nn.Parameter(i.lora_A.detach())
        layer.lora_B["default"].weight = torch.nn.Parameter(i.lora_B.detach())
        return layer

    def leaves(self, copy: int) -> list[Tensor]:
        layer = self.layers[copy]
        return [self.inputs[copy].x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def forward(self, copy: int) -> Tensor:
        return self.layers[copy](self.inputs[copy].x)


@provider("inplace", noisy=True)
class InPlace(Run):
    """the Flat-LoRA authors': add eps to W in place, matmul, draw eps again from its seed, subtract"""

    # github.com/nblt/Flat-LoRA, logTrainer.py, with the row norms at hand and no (N, K) tensor of them.

    capturable = False

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        self.weights = problem.writable_weights
        self.generator = torch.Generator(problem.device)

    def eps(self, copy: int) -> Tensor:
        self.generator.manual_seed(copy)
        weight = self.weights[copy]
        return _draw(torch.empty_like(weight), self.noise, self.inputs[copy].noise_scale, self.generator)

    def forward(self, copy: int) -> Tensor:
        i, weight = self.inputs[copy], self.weights[copy]
        weight.add_(self.eps(copy))
        return _add_adapter(i.x @ weight.t(), i)

    def input_grad(self, copy: int) -> Tensor:
        self.weights[copy].add_(self.eps(copy))
        return _input_grad(self.weights[copy], self.inputs[copy])

    def finish(self, copy: int) -> None:
        self.weights[copy].sub_(self.eps(copy))


@provider("eager", noisy=True)
class Eager(Run):
    """eps by torch's generator, W + eps in memory of its own, matmul"""

    capturable = False

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        self.generator = torch.Generator(problem.device)

    def eps(self, copy: int) -> Tensor:
        i = self.inputs[copy]
        self.generator.manual_seed(copy)
        return _draw(torch.empty_like(i.weight), self.noise, i.noise_scale, self.generator)

    def forward(self, copy: int) -> Tensor:
        i = self.inputs[copy]
        return _add_adapter(i.x @ (i.weight + self.eps(copy)).t(), i)

    def input_grad(self, copy: int) -> Tensor:
        return _input_grad(self.inputs[copy].weight + self.eps(copy), self.inputs[copy])


def _eps_in_torch(weight: Tensor, noise_scale: Tensor, noise: str) -> Tensor:
    if noise == "gaussian":
        z = torch.randn_like(weight)
    else:
        z = torch.where(torch.rand_like(weight, dtype=torch.float32) < 0.5, -1.0, 1.0)
    return (z * noise_scale[:, None]).to(weight.dtype)


def _linear_in_torch(i: Inputs, noise: str) -> Tensor:
    return _add_adapter(i.x @ (i.weight + _eps_in_torch(i.weight, i.noise_scale, noise)).t(), i)


def _input_grad_in_torch(i: Inputs, noise: str) -> Tensor:
    return _input_grad(i.weight + _eps_in_torch(i.weight, i.noise_scale, noise), i)


@provider("compile", noisy=True, compiled=True)
class Compile(Run):
    """torch.compile of `eager`, with the generator that the compiler puts into its kernels"""

    capturable = False
    _compiled_for: weakref.ref[Problem] | None = None

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        if Compile._compiled_for is None or Compile._compiled_for() is not problem:
            torch.compiler.reset()  # static graphs of many shapes would run into the limit of recompilations
            Compile._compiled_for = weakref.ref(problem)
        self.linear = torch.compile(_linear_in_torch, fullgraph=True, dynamic=False)
        self.gradient = torch.compile(_input_grad_in_torch, fullgraph=True, dynamic=False)
        self.draw = torch.compile(_eps_in_torch, fullgraph=True, dynamic=False)

    def forward(self, copy: int) -> Tensor:
        torch.manual_seed(copy)
        return self.linear(self.inputs[copy], self.noise)

    def input_grad(self, copy: int) -> Tensor:
        torch.manual_seed(copy)
        return self.gradient(self.inputs[copy], self.noise)

    def eps(self, copy: int) -> Tensor:
        # The values go by the seed and the place in the weight, so a graph of its own draws the same.
        i = self.inputs[copy]
        torch.manual_seed(copy)
        return self.draw(i.weight, i.noise_scale, self.noise)
