"""`FlatParamWrapper`: PEFT's adapters of a mixture of experts (`target_parameters`), on the grouped op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..core.autocast import autocasts
from ..op import checks, sharded
from ..op.grouped import fused_flat_lora_grouped_linear, grouped_noise_scale, reads_offsets
from ..train import packed
from ..train.layer import check_noise_options
from ..train.obstacles import HOOKS, only_placed
from .adapters import FlatAdapter, as_one

Ends = Tensor | list[int]
Project = Callable[[str, Tensor, Ends], Tensor]


class FlatParamWrapper(FlatAdapter, ParamWrapper):
    """PEFT's LoRA of one parameter (E, N, K) of a mixture of experts, on the grouped op; made by `apply_flat_lora`.

    The parameter belongs to one of the experts modules of transformers (`MixtralExperts`, `Qwen3MoeExperts`, ...:
    those that `use_experts_implementation` decorates). PEFT nests one wrapper for each adapted parameter around it.
    The outermost sorts the tokens by expert, and computes the module's own formula with
    ``x (W[e] + eps[e])^T + scaling (x A[e]^T) B[e]^T`` in the place of each product of an adapted parameter. Unlike in
    PEFT, neither ``W + B A`` nor a gradient of its size is materialised. Expert e draws from stream ``stream + e``,
    with the norms of its own rows. Experts without tokens are neither drawn nor read, except for the norms.

    On a GPU backend `triton` computes all experts in one launch. Where it is not used, each expert is computed by
    itself, and where its tokens end is read on the host once in a forward, which waits for the device. No noise in eval
    mode or at sigma = 0: then the result is PEFT's up to rounding. With the adapters disabled or none of them
    active, PEFT's own forward runs.

    Raises:
        RuntimeError: in the forward, where noise is wanted and an adapter of the mixture is merged, or a module inside
            has hooks, or the arguments are not (hidden_states, top_k_index, top_k_weights).
        ValueError: `samples` other than 1: a token's rows are sorted by expert.
    """

    of_peft = ParamWrapper
    _weight_dim = 3
    # PEFT's
    base_layer: Any
    get_base_layer: Callable[[], Any]
    get_param: Callable[[], Tensor]
    parameter_name: str
    num_experts: int

    @property
    def stream_count(self) -> int:  # type: ignore[override]
        return self.num_experts

    def _set_up_noise(self, *args: Any, samples: Any = 1, **options: Any) -> None:
        check_noise_options(None, "gaussian", samples)
        if samples != 1:
            raise ValueError(f"samples: expected 1 for a mixture of experts, got {samples!r}; {_SAMPLES}")
        super()._set_up_noise(*args, **options)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wrappers = _nested(self)
        active = {w.parameter_name: (w, _in_use(w)) for w in wrappers}
        noise = {
            name: w.noise_arguments(x)
            for name, (w, names) in active.items()
            if names and isinstance(w, FlatParamWrapper)
        }
        if not noise:
            return super().forward(x, *args, **kwargs)
        routing = _routing(x, args, kwargs)
        obstacle = routing if isinstance(routing, str) else _forward_obstacle(wrappers)
        if obstacle is not None or isinstance(routing, str):
            if any("noise_scale" in arguments for arguments in noise.values()):
                raise RuntimeError(f"{self.flat_lora_name}: expected no noise, because {obstacle}")
            return super().forward(x, *args, **kwargs)
        experts = self.get_base_layer()

        def project(name: str, rows: Tensor, ends: Ends) -> Tensor:
            wrapper, names = active.get(name, (None, []))
            return _product(experts, name, wrapper, names, rows, ends, options(name))

        def options(name: str) -> dict[str, Any]:
            return noise.get(name, {"backend": self.backend})

        def reads(name: str, rows: Tensor, ends: Tensor) -> bool:
            return reads_offsets(rows, _weight(experts, name), ends, **_without_samples(options(name)))

        return _mixture(experts, project, reads, x, *routing)

    def _example(self, x: Tensor) -> Tensor:
        """All rows to the first expert, as many as there are of all: the kernels of any routing are the same."""
        config = getattr(self.get_base_layer(), "config", None)
        top_k = getattr(config, "num_experts_per_tok", 1)
        rows, names = x.flatten(0, -2).repeat(top_k, 1), self._active()
        ends = torch.full((self.num_experts,), rows.shape[0], device=rows.device)
        noise = self.noise_arguments(rows)
        return _product(self.get_base_layer(), self.parameter_name, self, names, rows, ends, noise)

    def _weight_in_use(self) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
        weight = _weight(self.get_base_layer(), self.parameter_name)
        names = [] if self.merged else [n for n in self._active() if not self.lora_A[n].weight.is_meta]
        return (weight, *_adapter(self, names, weight.dtype)) if names else (weight, None, None, 1.0)

    def _unit_noise_scale(
        self, weight: Any, lora_A: Any, lora_B: Any, scaling: float, in_features: int | None
    ) -> Tensor:
        return grouped_noise_scale(
            weight, lora_A, lora_B, scaling=scaling, sigma=1.0, in_features=in_features, backend=self.backend
        )

    def _norm_sources(self) -> tuple[Any, ...]:
        names = () if self.merged else self._active()
        parts = [(self.lora_A[n].weight, self.lora_B[n].weight, self.scaling[n]) for n in names]
        return (self.get_param(), *(item for part in parts for item in part))


_SAMPLES = "its rows are sorted by expert, so that those of a sample do not lie together"


def _nested(wrapper: Any) -> list[Any]:
    """This wrapper and those that it wraps, one for each adapted parameter of the same experts."""
    found = [wrapper]
    while isinstance(found[-1].base_layer, ParamWrapper):
        found.append(found[-1].base_layer)
    return found


def _in_use(wrapper: Any) -> list[str]:
    if wrapper.disable_adapters:
        return []
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _weight(experts: Any, name: str) -> Tensor:
    """(E, N, K), where it lies transposed as a view."""
    weight: Tensor = getattr(experts, name)
    return weight.transpose(1, 2) if experts.is_transposed else weight


def _gated(experts: Any) -> bool:
    return getattr(experts, "has_gate", True)  # transformers 5.0 knows no others


def _adapter(wrapper: Any, names: list[str], dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """A (E, r, K), B (E, N, r) and scaling of these adapters as one, in types the op takes beside `dtype`."""
    E = wrapper.num_experts
    # PEFT's B A has the layout of the parameter, which one that does not swap takes to be (E, K, N).
    swaps = getattr(wrapper, "_did_swap_in_out_features", False)
    turned = swaps == wrapper.get_base_layer().is_transposed
    pairs = []
    for name in names:
        weights = (wrapper.lora_A[name].weight, wrapper.lora_B[name].weight)
        # Between steps of FSDP, for norms alone: experts are not what it cuts them by.
        A, B = packed.beside(dtype, *(w.full_tensor() if sharded.is_sharded(w) else w for w in weights))
        A = A.reshape(E, -1, A.shape[1])
        # The experts are its innermost dimension: each would read all of it.
        B = B.reshape(B.shape[0], -1, E).permute(2, 0, 1).contiguous()
        pairs.append((B.transpose(1, 2), A.transpose(1, 2)) if turned else (A, B))
    return as_one(pairs, [wrapper.scaling[name] for name in names])


def _product(
    experts: Any,
    name: str,
    wrapper: Any,
    adapters: list[str],
    rows: Tensor,
    ends: Ends,
    noise: dict[str, Any],
) -> Tensor:
    """That of the parameter `name`, with these adapters of its wrapper."""
    weight = _weight(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    lora_A, lora_B, scaling = _adapter(wrapper, adapters, weight.dtype) if adapters else (None, None, 1.0)
    if not autocasts(rows.device.type):
        rows = rows.to(weight.dtype)  # as transformers does
    return fused_flat_lora_grouped_linear(
        rows, weight, lora_A, lora_B, bias, offsets=ends, scaling=scaling, **_without_samples(noise)
    )


def _without_samples(noise: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in noise.items() if key != "samples"}  # it is 1


def _mixture(
    experts: Any,
    project: Project,
    reads: Callable[[str, Tensor, Tensor], bool],
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The formula of transformers' `grouped_mm_experts_forward`, with `project` for the two products.

    Args:
        reads: whether a product reads its ends on the host.
        x: (T, H). top_k_index: (T, top_k), E or above for none of the experts. top_k_weights: (T, top_k).
    """
    T, top_k = top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1), stable=True)
    each = torch.arange(experts.num_experts, device=ids.device, dtype=ids.dtype)
    ends: Any = torch.searchsorted(ids, each, right=True)
    gated = _gated(experts)
    first, rows = "gate_up_proj" if gated else "up_proj", x[order // top_k]
    if not torch.compiler.is_compiling() and reads(first, rows, ends):
        ends = ends.tolist()  # once for all products
        order, rows = order[: ends[-1]], rows[: ends[-1]]
    else:
        # What belongs to none of the experts comes last: the last one computes it, and it counts nothing.
        ends[-1:].fill_(len(rows))
        top_k_weights = top_k_weights.masked_fill(top_k_index >= experts.num_experts, 0)
    rows = project(first, rows, ends)
    rows = experts._apply_gate(rows) if gated else experts.act_fn(rows)
    rows = project("down_proj", rows, ends)
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[order, None]
    every = rows.new_zeros(T * top_k, rows.shape[1]).index_copy(0, order, rows)
    return every.view(T, top_k, -1).sum(1).to(x.dtype)


def _routing(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | str:
    """top_k_index and top_k_weights of a call, or why it is not one of transformers' experts."""
    given = dict(zip(("top_k_index", "top_k_weights"), args, strict=False)) | kwargs
    if len(args) > 2 or given.keys() != {"top_k_index", "top_k_weights"}:
        got = ", ".join(("hidden_states", *("another" for _ in args), *kwargs))
        return f"it is called with ({got}) instead of (hidden_states, top_k_index, top_k_weights)"
    if x.dim() != 2 or given["top_k_index"].dim() != 2:
        shapes = f"{tuple(x.shape)} and {tuple(given['top_k_index'].shape)}"
        return f"its hidden_states and top_k_index have shapes {shapes} instead of (tokens, ...) each"
    return given["top_k_index"], given["top_k_weights"]


def _forward_obstacle(wrappers: list[Any]) -> str | None:
    if any(w.merged for w in wrappers):
        return "its adapters are merged, so that nothing of it trains; unmerge_adapter() or eval()"
    return _hooks(wrappers)


def _hooks(wrappers: list[Any]) -> str | None:
    experts = wrappers[-1].base_layer
    if any(getattr(module, hooks) for module in (*wrappers[1:], experts) for hooks in HOOKS):
        return "a module inside it has hooks, which the grouped op would not call"
    return None


def obstacle_to(wrapper: Any, samples: Any = 1) -> str | None:
    """Why the grouped op cannot stand for this wrapper's part of its experts.

    Args:
        samples: the option that it would get.
    """
    experts, name = wrapper.get_base_layer(), wrapper.parameter_name
    kind = type(experts)
    if isinstance(experts, nn.Linear):
        return (
            f"its parameter {name!r} is adapted past the nn.Linear that has it (target_parameters); target_modules"
            " adapts the layer"
        )
    # What the decorator use_experts_implementation puts in the place of a class's own forward.
    if getattr(kind.forward, "__globals__", {}).get("__name__") != "transformers.integrations.moe":
        return (
            f"its parameter {name!r} is one of {kind.__name__}, which is none of the experts that transformers computes"
            " by use_experts_implementation, so that nobody knows how it uses it"
        )
    if ("forward" in vars(experts) or hasattr(experts, "_hf_hook")) and not only_placed(experts):
        return f"{kind.__name__} has a forward of its own, as offloading gives one"
    hooks = _hooks(_nested(wrapper))
    if hooks is not None:
        return hooks
    projections = ("gate_up_proj" if _gated(experts) else "up_proj", "down_proj")
    if name not in projections:
        return f"its parameter {name!r} is none of {', '.join(projections)}"
    parameter = wrapper.get_param()
    if getattr(experts, "_is_expert_parallel", False) or sharded.is_sharded(parameter):
        return f"its parameter {name!r} is sharded (expert or tensor parallelism)"
    known = type(parameter) is nn.Parameter and parameter.dtype in checks.FLOAT_DTYPES
    if not known or parameter.dim() != 3 or parameter.shape[0] < 2:
        found = f"a {type(parameter).__name__} of {parameter.dtype} and shape {tuple(parameter.shape)}"
        return f"its parameter {name!r} is {found}; supported are several experts of 16, 32 or 64 bits each"
    if samples != 1:
        return f"samples={samples!r}: {_SAMPLES}"
    return None
