"""Others' fused or noisy linear layers, each through its own package: providers `rival:...`.

No package is imported before its provider is made. `docs/internals/rivals.md` says what each one is and what is
known of it; `python -m bench.rivals FILE` prints the table of that page from the rows of a run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import results, table
from .problem import SCALING, Inputs, Problem
from .providers import NOISELESS, Peft, Provider, Run, Unfit, compile_anew
from .results import Results, Row
from .timing import first_line


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:  # of something that the package needs, or of a name that has moved
        raise Unfit(f"{module} cannot be imported: {first_line(error)}") from None


class _Rival(Run):
    """`needs`: modules; `install`: how they come here. `gpu`: on a CPU it runs in Triton's interpreter alone."""

    needs: ClassVar[tuple[str, ...]]
    install: ClassVar[str]
    gpu: ClassVar[bool] = False

    def __init__(self, problem: Problem, noise: str) -> None:
        if reason := self.missing(problem.device):
            raise Unfit(reason)
        super().__init__(problem, noise)

    @classmethod
    def missing(cls, device: str) -> str | None:
        """Why it cannot run on `device`, as far as that is known without an import."""
        if cls.gpu and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a GPU"
        absent = [name for name in cls.needs if importlib.util.find_spec(name) is None]
        return f"{absent[0]} is not installed ({cls.install})" if absent else None


class Aihwkit(_Rival, Peft):
    """AnalogLinear of aihwkit-lightning in plain torch: normal noise relative to a row's maximum, added to a clone"""

    capturable = False
    needs: ClassVar[tuple[str, ...]] = ("aihwkit_lightning",)
    install = "pip install --no-deps aihwkit-lightning"

    def base(self, i: Inputs) -> Any:
        configs = _imported("aihwkit_lightning.simulator.configs")
        config = configs.TorchInferenceRPUConfig()
        config.modifier.noise_type = configs.WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
        # As strong as the others' noise, which is relative to the row's norm.
        config.modifier.std_dev = (i.noise_scale / i.weight.abs().amax(1)).median().item()
        self.configure(config)
        N, K = i.weight.shape
        where = {"device": i.weight.device, "dtype": i.weight.dtype}
        layer = _imported("aihwkit_lightning.nn").AnalogLinear(K, N, bias=False, rpu_config=config, **where)
        layer.weight = torch.nn.Parameter(i.weight, requires_grad=False)
        return layer

    def configure(self, config: Any) -> None:
        """What else its layer is to do."""

    def analog(self, copy: int) -> Any:
        """Its layer, below the adapter."""
        return getattr(self.layers[copy], "base_layer", self.layers[copy])

    def forward(self, copy: int) -> Tensor:
        torch.manual_seed(copy)
        return super().forward(copy)

    def eps(self, copy: int) -> Tensor:
        layer = self.analog(copy)
        modify = _imported("aihwkit_lightning.nn.modules.torch_utils.torch_linear").TorchLinear.modify_weight
        torch.manual_seed(copy)
        return modify(layer.weight, None, layer.rpu_config).double() - layer.weight.double()


class _Untiled:
    """A tuned kernel that is launched without the last two arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.kernel[grid](*arguments[:-2])


class AihwkitTriton(Aihwkit):
    """the same by its Triton kernels, which write W + eps over W; W is copied back, which the package leaves out"""

    needs = ("aihwkit_lightning", "triton")
    gpu = True

    def __init__(self, problem: Problem, noise: str) -> None:
        if problem.dtype not in (torch.float16, torch.float32):
            raise Unfit(f"multiplies in float16 or float32, got {problem.case.dtype}")
        super().__init__(problem, noise)
        for number, weight in enumerate(problem.writable_weights):
            self.analog(number).weight.data = weight
        kernels = _imported("aihwkit_lightning.nn.modules.triton_utils.triton_linear")
        from triton.runtime.autotuner import Autotuner

        # Version 2.1.0 passes its tuned kernel a tile as well: "got multiple values for argument".
        if isinstance(kernels.modifier_kernel, Autotuner):
            kernels.modifier_kernel = _Untiled(kernels.modifier_kernel)

    def configure(self, config: Any) -> None:
        given = config.pre_post.input_range  # its kernels divide x by a range, here the maximum of each row
        given.enable = given.dynamic = True

    def forward(self, copy: int) -> Tensor:
        # Its kernels by name, and float32 not rounded to tf32.
        ours = {"AIHWKIT_USE_TRITON": "1", "AIHWKIT_TESTING": "1"}
        os.environ.update(ours)
        try:
            return super().forward(copy)
        finally:
            for name in ours:
                del os.environ[name]

    def finish(self, copy: int) -> None:
        self.analog(copy).weight.data.copy_(self.inputs[copy].weight)

    def eps(self, copy: int) -> Tensor:
        with torch.no_grad():
            self.forward(copy)
        written = self.analog(copy).weight.double()
        self.finish(copy)
        return written - self.inputs[copy].weight.double()


class LoraFusion(_Rival):
    """LoRAFusion's fused kernels but for those with TMA, put together as in its lora_v1.py; no noise"""

    needs = ("lorafusion", "triton")
    install = "put a clone of github.com/CentML/lorafusion on PYTHONPATH"
    gpu = True

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        case = problem.case
        self.tiles = self._tiles()
        width = self.tiles.fused_lora_dyw_dsa.block_size_n
        if problem.backward and case.K % width:
            raise Unfit(f"reads beyond lora_A where in_features is not a multiple of {width}, got {case.K}")
        if case.rank < 16 or case.rank & (case.rank - 1):
            raise Unfit(f"takes ranks that are a power of two from 16 on, got {case.rank}")
        self.forward_kernel, self.dys_dyb, self.dyw_dsa = (
            getattr(_imported(f"lorafusion.ops.triton_ops.{name}"), name)
            for name in ("fused_lora_xw_sb", "fused_lora_dys_dyb", "fused_lora_dyw_dsa")
        )
        # Only the shape is read where nothing is dropped; its own backward pass without dropout has no mask and fails.
        self.mask = torch.empty(case.M, case.K, dtype=torch.bool, device=problem.device)

    def _tiles(self) -> Any:
        config = _imported("lorafusion.ops.triton_ops.config")
        if self.problem.device == "cpu":
            return config.H100_CONFIG
        name = _imported("lorafusion.utils.common").get_device_short_name()
        if name in config.HARDWARE_CONFIGS:
            return config.HARDWARE_CONFIGS[name]
        if torch.cuda.get_device_capability() >= (9, 0):
            return config.H100_CONFIG
        raise Unfit(f"has tiles for {', '.join(config.HARDWARE_CONFIGS)}, not for {name}")

    def _forward(self, copy: int) -> tuple[Tensor, Tensor]:
        x, weight, A, B, *_ = self.inputs[copy]
        s = x @ A.t()
        tiles = self.tiles.fused_lora_xw_sb
        return self.forward_kernel(x=x, w=weight, s=s, b=B, alpha=SCALING, config=tiles), s

    def forward(self, copy: int) -> Tensor:
        return self._forward(copy)[0]

    @torch.no_grad()
    def step(self, copy: int) -> tuple[Tensor, ...]:
        if not self.problem.backward:
            return super().step(copy)
        x, weight, A, B, dy, *_ = self.inputs[copy]
        y, s = self._forward(copy)
        db, ds = self.dys_dyb(dy=dy, b=B, s=s, alpha=SCALING, config=self.tiles.fused_lora_dys_dyb)
        dx = self.dyw_dsa(
            dy=dy, w=weight, ds=ds, a=A, dropout_p=0.0, dropout_mask=self.mask, config=self.tiles.fused_lora_dyw_dsa
        )  # fmt: skip
        return y, dx, ds.t() @ x, db


class Unsloth(_Rival):
    """LoRA_W of unsloth.kernels.fast_lora, no noise; importing it patches other libraries in this process"""

    needs = ("unsloth",)
    install = "pip install unsloth"

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        if "UNSLOTH_COMPILE_LOCATION" not in os.environ:  # else it makes a folder where the command is run
            os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp(prefix="unsloth")
        self.apply = _imported("unsloth.kernels.fast_lora").LoRA_W.apply

    def forward(self, copy: int) -> Tensor:
        x, weight, A, B, *_ = self.inputs[copy]
        return self.apply(x[None], weight, None, A, B, SCALING)[0]


class PeftCompiled(_Rival, Peft):
    """PEFT's LoRA layer through torch.compile, no noise"""

    needs = ("peft",)
    install = "pip install peft"

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        compile_anew(problem)
        self.compiled = [torch.compile(layer, dynamic=False) for layer in self.layers]

    def forward(self, copy: int) -> Tensor:
        return self.compiled[copy](self.inputs[copy].x)


class Qlora(_Rival, Peft):
    """QLoRA: PEFT's LoRA layer over bitsandbytes' NF4, no noise; judged by the values that are packed"""

    needs = ("bitsandbytes", "peft")
    install = "pip install bitsandbytes peft"

    def __init__(self, problem: Problem, noise: str) -> None:
        super().__init__(problem, noise)
        decode = _imported("bitsandbytes.functional").dequantize_4bit
        packed = [layer.base_layer.weight for layer in self.layers]
        values = [decode(weight.data, weight.quant_state) for weight in packed]
        self.inputs = [i._replace(weight=value) for i, value in zip(self.inputs, values, strict=True)]

    def base(self, i: Inputs) -> Any:
        from .quantized import packed_layer

        return packed_layer(i.weight, "nf4")


RIVALS: dict[str, type[_Rival]] = {
    "rival:aihwkit": Aihwkit,
    "rival:aihwkit-triton": AihwkitTriton,
    "rival:lorafusion": LoraFusion,
    "rival:peft-compile": PeftCompiled,
    "rival:qlora": Qlora,
    "rival:unsloth": Unsloth,
}


def every(device: str) -> list[Provider]:
    """All of them; `what` of one that cannot run on `device` says why."""
    found = []
    for name, rival in RIVALS.items():
        noisy = issubclass(rival, Aihwkit)
        reason = rival.missing(device)
        what = f"{rival.__doc__}" + (f" (not here: {reason})" if reason else "")
        noises = ("gaussian",) if noisy else (NOISELESS,)
        found.append(Provider(name, rival, noises, what, needs_rank=not noisy, compiled=True))
    return found


class About(NamedTuple):
    """What a provider does to the noise and to the weight, in a few words."""

    noise: str
    backward: str  # whether its noise is that of the forward pass
    base: str  # what becomes of the weight
    packed: str  # whether it takes a quantised one


_NONE = ("none", "no noise", "read only")
ABOUT = {
    "auto": About("in the kernel, from seed and place", "the same, drawn again", "read only", "yes"),
    "perturb": About("in one pass over W, by this library", "the same, kept", "read only", "yes"),
    "inplace": About("by torch, added to W and subtracted", "the same, in W", "written twice a step", "no"),
    "eager": About("by torch, W + eps in memory", "the same, kept", "read only", "no"),
    "lora": About(*_NONE, "no"),
    "peft": About(*_NONE, "see rival:qlora"),
    "rival:peft-compile": About(*_NONE, "not tried"),
    "rival:qlora": About(*_NONE, "yes, it is one"),
    "rival:unsloth": About(*_NONE, "yes, decoded first"),
    "rival:lorafusion": About(*_NONE, "experimental, not in lora_v1.py"),
    "rival:aihwkit": About("by torch, added to a clone of W", "the same, kept", "read only", "no"),
    "rival:aihwkit-triton": About(
        "`tl.randn`, by the number in the tile, written to memory",
        "the same, in W",
        "overwritten, not restored",
        "no",
    ),
}


def _cell(row: Row) -> str:
    to_plain, to_peft = table.ratio(row.get("to_plain")), table.ratio(row.get("to_peft"))
    return f"{to_plain} ({to_peft})" if to_peft else to_plain


def report(found: Results, device: str) -> str:
    """A line to each provider: what it does, and its time to the plain product (to PEFT's LoRA) in each case."""
    rows = [r for r in found.rows if r["kind"] == "linear" and r["noise"] in (NOISELESS, "gaussian")]
    cases = list(dict.fromkeys((r["mode"], r["M"], r["dtype"]) for r in rows))
    lines = []
    for name, about in ABOUT.items():
        cells = []
        for case in cases:
            here = [r for r in rows if (r["mode"], r["M"], r["dtype"]) == case]
            mine = [r for r in here if r["provider"].partition(":")[0] == name or r["provider"] == name]
            mine = [r for r in mine if r["noise"] != NOISELESS] or mine  # of the op, that under noise
            cells.append(_cell(mine[0]) if mine else "")
        if not any(cells) and name in RIVALS and cells:
            cells[0] = RIVALS[name].missing(device) or "not run"
        lines.append([name, *about, *cells])
    headings = [f"{mode}, {M} rows, {dtype}" for mode, M, dtype in cases]
    return table.markdown(
        ["provider", "noise", "in the backward pass", "base weight", "packed base", *headings], lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rivals", description=report.__doc__)
    parser.add_argument("file", type=Path, help="JSON or CSV of `python -m bench --providers rival ...`")
    found = results.load(parser.parse_args().file)
    print(report(found, str(found.meta["device"])))


if __name__ == "__main__":
    main()
