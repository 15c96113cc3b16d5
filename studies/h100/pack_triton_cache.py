"""Compiles Triton kernels for an H100 on a machine without a GPU, into TRITON_CACHE_DIR (/tmp/flatlora-triton).

    python compile_kernels.py --repo CLONE set1 [--list]      set1, set1-fp32, tests, bench
Launches of the real launchers are collected on CPU tensors (nothing runs), then compiled one after the other, and
Triton's launcher stubs are built against a libcuda that does nothing (--fake). Kernels in the cache cost nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time

CACHE = "/tmp/flatlora-triton"
parser = argparse.ArgumentParser()
parser.add_argument("what", nargs="+")
parser.add_argument("--repo", default=".")
parser.add_argument("--fake", required=True)
parser.add_argument("--list", action="store_true", help="collect only")
parser.add_argument("--seconds", type=float, default=1e9, help="begin no compilation after so long")
args = parser.parse_args()

os.environ["TRITON_CACHE_DIR"] = CACHE
os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # not in the key
os.environ["TRITON_LIBCUDA_PATH"] = args.fake  # not in the key
sys.path.insert(0, args.repo)
START = time.time()

import torch  # noqa: E402

torch.cuda.is_available = lambda: False
ctypes.CDLL(f"{args.fake}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
torch.set_num_threads(1)

import triton  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402
from triton.runtime import build, driver, jit  # noqa: E402


class Driver(CudaDriver):
    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_device_capability(self, device=None):
        return (9, 0)


CudaDriver.__bases__[0].__init__ = lambda self: None
driver.set_active(Driver())
assert driver.active.get_current_target() == GPUTarget("cuda", 90, 32)

import flatlora_kernels as fk  # noqa: E402
from flatlora_kernels import backends, panel  # noqa: E402
from flatlora_kernels.backends import triton as backend  # noqa: E402
from flatlora_kernels.triton_kernels import launch  # noqa: E402

assert fk.__file__.startswith(args.repo + "/"), fk.__file__
backend.DEVICE_TYPES = ("cuda", "cpu")
backend.unavailable = lambda: None
machine = launch.Machine("sm90", 132)
launch.machine_of = lambda tensor: machine
for name in ("forward", "input_grad", "perturb", "row_norms", "adapter_grads", "split"):
    module = sys.modules.get(f"flatlora_kernels.triton_kernels.{name}") or __import__(
        f"flatlora_kernels.triton_kernels.{name}", fromlist=["x"]
    )
    if hasattr(module, "machine_of"):
        module.machine_of = launch.machine_of

# Panels are cut as on a GPU, where two slices take turns.
_workspace = panel.workspace
panel.workspace = lambda weight, device_type, input_grad: _workspace(weight, "cuda", input_grad)

# --- collecting ---
queue: dict[str, tuple] = {}
launches = 0
label = ""


def collect(self, key, signature, device, constexprs, options, attrs, warmup):
    src = self.ASTSource(self, signature, constexprs, attrs)
    _, _, target, _, _ = self.device_caches[device]
    queue.setdefault(f"{src.hash()}-{options.hash()}", (src, target, options, label, self))


_run = jit.JITFunction.run


def run(self, *args, grid, warmup, **kwargs):
    global launches
    launches += 1
    return _run(self, *args, grid=grid, warmup=True, **kwargs)


jit.JITFunction._do_compile = collect
jit.JITFunction.run = run

# --- compiling ---
counts = {"compiled": 0, "hits": 0, "stubs": 0}


def listener(*, src, metadata, metadata_group, times, cache_hit):
    counts["hits" if cache_hit else "compiled"] += 1


knobs.compilation.listener = listener
_build = build._build


def counted(*a, **k):
    counts["stubs"] += 1
    return _build(*a, **k)


build._build = counted


def compile_all():
    for number, (src, target, options, label, fn) in enumerate(queue.values()):
        if time.time() - START > args.seconds:
            print(f"stopped before {number} of {len(queue)}", flush=True)
            break
        begin = time.time()
        before = counts["compiled"]
        try:
            kernel = triton.compile(src, target=target, options=options.__dict__)
            kernel._init_handles()
        except Exception as error:
            print(f"FAILED {src.name} {label}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            continue
        if counts["compiled"] > before:
            print(f"{number + 1}/{len(queue)} {src.name} {label} {time.time() - begin:.1f} s", flush=True)
    print(f"{len(queue)} kernels: {counts}, {time.time() - START:.0f} s", flush=True)


# --- what is launched ---
def plain_calls(dtype, rows, n=4096, ranks=(16, 0), noises=("gaussian", "rademacher")):
    global label
    W = torch.zeros(n, n, dtype=dtype)
    seed = torch.tensor(3)
    for noise in noises:
        for rank in ranks:
            A, B = (torch.zeros(rank, n, dtype=dtype), torch.zeros(n, rank, dtype=dtype)) if rank else (None, None)
            label = f"norms {dtype} rank {rank} {noise}"
            scale = fk.flat_noise_scale(W, A, B, scaling=2.0, sigma=0.1, backend="triton")
            fk.row_sq_norms(W, A, B, scaling=2.0, backend="triton")
            draw = {"noise": noise, "stream": 3}
            fk.perturb_weight(W, scale, seed=seed, backend="triton", **draw)
            fk.perturb_weight(W, scale, seed=5, out=torch.empty_like(W), backend="triton", **draw)
            fk.materialize_noise(scale, n, seed=seed, backend="triton", **draw)
            for strategy in ("fused", "panel"):
                for M in rows if strategy == "fused" else rows[:1]:
                    label = f"{strategy} M {M} {dtype} rank {rank} {noise}"
                    x = torch.zeros(M, n, dtype=dtype, requires_grad=True)
                    a, b = (None, None) if not rank else (A.clone().requires_grad_(), B.clone().requires_grad_())
                    for s in (seed, 5):
                        y = fk.fused_flat_lora_linear(
                            x, W, a, b, scaling=2.0, noise_scale=scale, seed=s, strategy=strategy, backend="triton",
                            **draw,
                        )
                        y.sum().backward() if False else torch.autograd.grad(
                            y, [t for t in (x, a, b) if t is not None], torch.zeros_like(y)
                        )


def set1():
    plain_calls(torch.bfloat16, (16, 64, 128, 256, 512, 2048, 8192))


def set1_others():
    plain_calls(torch.float16, (16, 64, 128, 256, 512, 2048, 8192))
    plain_calls(torch.float32, (16, 64, 256, 2048))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    plain_calls(torch.float32, (16, 64, 256, 2048))
    torch.set_float32_matmul_precision(before)


def cheap_products():
    """Products return memory that nobody has written."""
    def mm(a, b, *rest, **kwargs):
        if b.dim() == 1:
            return a.new_empty(a.shape[:-1])
        if a.dim() == 1:
            return a.new_empty(b.shape[1:])
        return a.new_empty(*a.shape[:-1], b.shape[-1])

    def into(c, a, b, *rest, out=None, **kwargs):
        return out if out is not None else a.new_empty(a.shape[0], b.shape[1])

    def mm_into(a, b, out=None):
        return out if out is not None else mm(a, b)

    torch.addmm = into
    torch.mm = mm_into
    torch.matmul = mm
    torch.Tensor.__matmul__ = torch.Tensor.matmul = torch.Tensor.mm = mm
    torch.Tensor.addmm_ = lambda self, *a, **k: self


def tests():
    """tests/test_gpu.py at the sizes of a GPU; run with python -O, so that asserts vanish."""
    global label
    assert False if __debug__ else True, "python -O"
    if __debug__:
        sys.exit("tests: python -O")
    import pytest

    sys.path.insert(0, f"{args.repo}/tests")
    import compare
    import targets

    cheap_products()
    # rank 0 and all: gradients of the weight are products as well

    class Dev(str):
        """torch's "cpu", that is equal to neither name."""

        def __eq__(self, other):
            return False

        def __ne__(self, other):
            return True

        __hash__ = str.__hash__

    targets.INTERPRETED = True
    import test_gpu

    targets.INTERPRETED = False
    test_gpu.size = lambda device, on_gpu, on_cpu: on_gpu
    test_gpu.rows_for = lambda device, rows: rows
    targets.Target.missing = lambda self: None
    compare.assert_close = lambda *a, **k: None
    compare.check = lambda *a, **k: None

    def check_problem(target, p, **more):
        got = compare.run(target, p, **more)
        compare.group_eps(target, p)
        return got

    compare.check_problem = check_problem
    torch.testing.assert_close = lambda *a, **k: None
    torch.equal = lambda *a: True

    class Plugin:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(self, item):
            global label
            label = item.name
            n, m = len(queue), launches
            try:
                result = yield
                print(f"  {item.name}: {launches - m} launches, {len(queue) - n} new", flush=True)
                return result
            except BaseException as error:
                print(f"  {item.name}: {launches - m} launches, {len(queue) - n} new; {type(error).__name__}", flush=True)
                raise

    test_gpu.Target = lambda name, device: targets.Target("triton", Dev("cpu"))
    return pytest.main(
        [
            f"{args.repo}/tests/test_gpu.py", "--assert=plain", "-q", "-s", "-p", "no:cacheprovider", "--tb=line",
            "-p", "no:xdist", "-W", "ignore", "--deselect", f"{args.repo}/tests/test_gpu.py::test_on_another_device",
            "-k", "not two_to_the_31 and not another_device and not compiled_layer", "--rootdir", args.repo,
        ],
        plugins=[Plugin()],
    )  # fmt: skip


def bench(names=("targets", "square4096", "quick")):
    """`python -m bench run --set targets` (and the square4096, quick sets), and `python -m bench training`."""
    global label
    os.chdir(args.repo)
    cheap_products()
    from bench import overhead, providers, run, shapes, training
    from bench.problem import SCALING, SIGMA, Problem

    torch.Tensor.normal_ = lambda self, *a, **k: self.zero_()
    noises = ("gaussian", "rademacher")
    label = "overhead"
    overhead.measure(["triton"], "cpu", rounds=2)
    cases = list(dict.fromkeys(case for name in names for case in shapes.cases(name, "cuda")))
    label = "generator"
    for N, K in (*run.GENERATOR_SHAPES["cuda"], (1, 8)):
        for dtype in ("bfloat16", "float16", "float32"):
            i = Problem(shapes.Case("", "", 1, N, K, dtype, "forward", 0), "cpu", 1).inputs[0]
            for noise in noises:
                fk.perturb_weight(
                    i.weight, i.noise_scale, seed=i.seed, noise=noise, out=torch.empty_like(i.weight), backend="triton"
                )
    for case in cases:
        label = str(case)
        problem = Problem(case, "cpu", 1)
        i = problem.inputs[0]
        fk.flat_noise_scale(i.weight, i.lora_A, i.lora_B, scaling=SCALING, sigma=SIGMA, backend="triton")
        for noise in noises:
            for way in ("fused", "split", "panel"):
                label = f"{case}, {way} {noise}"
                providers.Fused(problem, noise, "triton", way).step(0)
            one = providers.Perturb(problem, noise, "triton")
            one.forward(0)
            one.eps(0)
    print(f"bench run: {len(queue)} kernels, {time.time() - START:.0f} s", flush=True)

    def attention(q, k, v, **_):
        more = q.shape[1] // k.shape[1]
        return q + k.repeat_interleave(more, 1) + v.repeat_interleave(more, 1)

    torch.nn.functional.scaled_dot_product_attention = attention
    torch.nn.functional.mse_loss = lambda a, b: (a - b.float()).square().mean()
    state = training.Settings("llama3-8b", 4096, "cpu").state("bfloat16", 0.0)
    for strategy in ("fused", "panel"):
        os.environ["FLATLORA_STRATEGY"] = strategy
        for noise in (*noises, "none"):
            label = f"training {strategy} {noise}"
            way = training.Flat(state, noise, "triton")
            way.step(0)
            way.used()
            print(f"{label}: {len(queue)} kernels, {time.time() - START:.0f} s", flush=True)


if __name__ == "__main__":
    for what in args.what:
        globals()[what.replace("-", "_")]()
        print(f"{what}: {launches} launches, {len(queue)} kernels, {time.time() - START:.0f} s", flush=True)
    if args.list:
        for _, (src, *_rest) in queue.items():
            print(src.name, _rest[2])
    else:
        compile_all()
