"""Where and how a kernel is launched."""

from __future__ import annotations

import contextlib
import dis
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core.quantized import QuantizedWeight
from . import configs
from .packed import packed_facts
from .tile import Drawn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Machine(NamedTuple):
    """What kernels are compiled and sized for."""

    architecture: str  # "sm90", "gfx942", "interpreter"
    processors: int  # multiprocessors or compute units

    @property
    def arithmetic(self) -> str:
        """See philox.py: inline PTX compiles to nonsense on anything but NVIDIA, without an error."""
        return {"sm": "ptx", "gfx": "amdgcn"}.get(self.architecture.rstrip("0123456789abcdef"), "plain")

    @property
    def has_descriptors(self) -> bool:
        """Tiles are copied by the tensor memory accelerator."""
        return self.architecture in ("sm90", "sm100", "sm103")


@functools.cache
def _machine(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    name = getattr(properties, "gcnArchName", "").split(":")[0]
    if torch.version.hip is None:
        name = f"sm{properties.major}{properties.minor}"
    return Machine(name, properties.multi_processor_count)


def machine_of(tensor: Tensor) -> Machine:
    return Machine("interpreter", 4) if INTERPRETED else _machine(tensor.device.index)


# Parameters of kernels that change from one call to the next: their values select no machine code.
CHANGING = ("stream_id", "sample_offset", "row_offset", "col_offset")
NOTHING = (0, 0, 0, 0)  # in their place where nothing is drawn
_REMEMBERED = 4096  # calls, in each of which everything but addresses is the same
_prepared: dict[Any, Any] = {}
_thread = threading.local()
# The rest of what a launch takes from torch.
_stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


def facts(*tensors: Any) -> tuple[Any, ...]:
    """All of a call's tensors that its tiles and its machine code depend on; the first of them is not None."""
    found: list[Any] = [tensors[0].device.index]
    for t in tensors:
        if isinstance(t, QuantizedWeight):
            found += (
                t.packing,
                *(
                    p if p is None else (p.dtype, len(p) if p.dim() else 0, p.data_ptr() % 16)
                    for p in t.parts
                ),
            )
        else:
            found.append(None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16))
    return tuple(found)


def prepared(make: Callable[..., Any], key: tuple[Any, ...], *arguments: Any) -> Any:
    """`make(*arguments)`, made once for each `key`, which has all that it depends on."""
    key = (make, key)
    found = _prepared.get(key)
    if found is None:
        if len(_prepared) >= _REMEMBERED:
            _prepared.clear()
        found = _prepared[key] = make(*arguments)
    return found


def forget() -> None:
    """For tests and tuning, which change what calls are prepared from."""
    _prepared.clear()


@contextlib.contextmanager
def instead(do: Callable[[Any, dict[str, Any], Callable[[], Any]], None]) -> Iterator[None]:
    """Nothing is launched by this thread inside: `do` gets the kernel, its arguments and options by name, and a
    function that compiles it."""
    before = getattr(_thread, "instead", None)
    _thread.instead = do
    try:
        with torch.autograd.set_multithreading_enabled(
            False
        ):  # a GPU's backward would run in a thread of its own
            yield
    finally:
        _thread.instead = before


_hashed: set[int] = set()


def hash_callees_first(function: Any) -> None:
    """Before Triton 3.8 the hash of a function has the constants of those of its callees alone that were hashed before
    it: which kernel a process launches first would decide whether it finds the others in the cache on disk."""
    # By the type: to ask the function for its key is to hash it.
    if id(function) in _hashed or not hasattr(type(function), "cache_key"):
        return
    for step in dis.get_instructions(function.fn):
        if step.opname == "LOAD_GLOBAL":
            hash_callees_first(function.fn.__globals__.get(step.argval))
    function.cache_key  # noqa: B018
    _hashed.add(id(function))


def _address(a: Any) -> Any:
    if isinstance(a, Tensor):
        return a.data_ptr()
    return tuple(map(_address, a)) if isinstance(a, tuple) else a


class Kernel:
    """A kernel with its grid, its options and all arguments but those that change from one call to the next.

    Triton finds the machine code by what each argument is, which takes longer than many of these kernels run. A
    `Kernel` belongs to calls that are alike in all that decides (see `facts`), so its second call goes straight to it.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], like: Tensor, rest: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """rest: the kernel's last parameters, by name. like: a tensor on the device."""
        hash_callees_first(kernel)
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.index = like.device.index
        names = kernel.arg_names
        self.changing = names[: len(names) - len(rest)]
        self.rest = tuple(rest[name] for name in names[len(self.changing) :])
        # Multiply-adds are fused where the source says so only.
        self.options = options if INTERPRETED else {**options, "enable_fp_fusion": False}
        self.run: Callable[..., None] | None = None

    def __call__(self, *changing: Any) -> None:
        """Launches it on the current stream. changing: the kernel's first parameters."""
        if self.index is not None and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                self._launch(changing)
        else:
            self._launch(changing)

    def _launch(self, changing: tuple[Any, ...]) -> None:
        if (do := getattr(_thread, "instead", None)) is not None:
            self._instead(do, changing)
        elif self.run is None:
            compiled = self.kernel[self.grid](*changing, *self.rest, **self.options)
            if compiled is not None:  # the interpreter compiles nothing
                self.run = compiled[self.grid]
        else:
            # Addresses: of a tensor the launcher asks the driver whether a GPU can read it.
            addresses = [_address(a) for a in changing]
            self.run(*addresses, *self.rest, stream=_stream_of(self.index))

    def _instead(self, do: Callable[..., None], changing: tuple[Any, ...]) -> None:
        arguments = (*changing, *self.rest)

        def compile() -> Any:
            return self.kernel.warmup(*arguments, grid=self.grid, **self.options)

        do(self.kernel, dict(zip(self.kernel.arg_names, arguments, strict=True)) | self.options, compile)


def descriptor(tensor: Tensor, box: tuple[int, int]) -> TensorDescriptor:
    """Of a matrix that is `addressable`."""
    rows, cols = tensor.shape
    return TensorDescriptor(tensor, [rows, cols], [tensor.stride(0) if rows > 1 else cols, 1], list(box))


def addressable(tensor: Tensor) -> bool:
    """The copy engine can read this matrix: 16-byte aligned rows of contiguous elements."""
    size = tensor.element_size()
    rows, cols = tensor.shape
    row_stride = tensor.stride(0) if rows > 1 else cols
    return (
        tensor.stride(1) == 1
        and tensor.data_ptr() % 16 == 0
        and row_stride * size % 16 == 0
        and row_stride >= cols
    )


def draw_facts(draw: Any) -> tuple[Any, ...]:
    """All of a draw, beside the tensors, that machine code depends on.

    The third: whether tiles begin at whole words (quads of rows), units (16 rows, 16 columns), or parts of a Walsh tile
    (64 rows, 64 columns) of the noise.
    """
    row, col = draw.row_offset, draw.col_offset
    aligned = {
        "gaussian": True,
        "near_gaussian": row % 16 == col % 16 == 0,
        "rademacher": row % 4 == 0,
        "hadamard": row % 64 == col % 64 == 0 and draw.tile_bits >= 6,
    }
    return draw.noise, draw.antithetic, aligned[draw.noise], draw.tile_bits


def drawn(draw: Any, machine: Machine, weight: Any, noise_accum: str = "folded") -> Drawn:
    """draw None: nothing is drawn."""
    paired = machine.arithmetic == "ptx" and weight.dtype == torch.bfloat16 and by_eight(weight)
    noise, antithetic, aligned, tile_bits = ("none", False, True, 0) if draw is None else draw_facts(draw)
    apart = noise_accum == "split"
    return Drawn(noise, antithetic, aligned, tile_bits, machine.arithmetic, paired, apart)


def by_eight(tensor: Any) -> bool:
    """Eight elements of a row can be loaded at once."""
    if isinstance(tensor, QuantizedWeight):
        return tensor.shape[1] % 8 == 0 and packed_facts(tensor).by_blocks
    apart = zip(tensor.shape[:-1], tensor.stride(), strict=False)
    aligned = tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 or size == 1 for size, stride in apart)
    return tensor.stride(-1) == 1 and tensor.shape[-1] % 8 == 0 and aligned


def strides(tensor: Tensor | None, *names: str) -> dict[str, int]:
    """Those of the last dimensions, by the names of a kernel's parameters."""
    found = (0,) * len(names) if tensor is None else tensor.stride()[-len(names) :]
    return dict(zip(names, found, strict=True))


def precision_of(a: Tensor) -> str:
    """`input_precision` of products of `a`: float32 as torch's own products of it."""
    if a.dtype != torch.float32 or machine_of(a).arithmetic != "ptx":
        return "ieee"
    # torch.get_float32_matmul_precision raises where this, the newer way, was used to set it.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class Plan(NamedTuple):
    """How the product of the forward or of the input gradient is cut into tiles."""

    machine: Machine
    config: configs.Config
    rows_per_sample: int
    tiles: int  # of the output
    splits: int  # of the contraction
    steps_per_split: int
    regular: bool  # all rows can be loaded eight elements at a time
    box: tuple[int, int] | None  # of `a` for the copy engine; None: it is loaded by addresses


def plan(p: Any, samples: int, noise_accum: str, workspace: int, precision: str) -> Plan:
    """Of a product `flatlora_kernels.core.records.Product`; see configs.py."""
    a, outputs = p.a, p.outputs
    machine = machine_of(a)
    M, length = a.shape
    regular = by_eight(a) and by_eight(p.weight) and outputs % 8 == 0
    kind = "half" if regular else "ragged"
    if a.dtype == torch.float32:
        kind = "tf32" if regular and precision == "tf32" else "single"
    rows = M // samples
    if p.offsets is not None:
        samples = min(len(p.offsets), M)  # experts, of which nobody knows here how many rows each has
        rows = -(-M // samples)
    config, tiles = configs.linear(
        machine.architecture,
        kind,
        "input_grad" if p.input_grad else "forward",
        samples,
        rows,
        outputs,
        machine.processors,
        noise_accum == "split",
    )
    if p.offsets is not None:
        # No routing has more tiles: all but one row of each expert fill theirs.
        tiles = ((M - samples) // config.block_m + samples) * -(-outputs // config.block_out)
        workspace = workspace if p.bias is None else 0  # `add_splits` has one bias for all rows
    splits, steps = configs.splits(config, tiles, length, 4 * M * outputs, workspace, machine.processors)
    by_engine = machine.has_descriptors and config.block_m > configs.DESCRIPTOR_ROWS and addressable(a)
    box = (config.block_m, config.block_in) if by_engine else None
    return Plan(machine, config, rows, tiles, splits, steps, regular, box)


def rank_block(rank: int) -> int:
    """Steps of the adapter's contraction at a time; 0 = no adapter."""
    return 0 if rank == 0 else 16 if rank <= 16 else 32
