import ctypes, os, sys, platform, shutil, sysconfig, subprocess, time
import torch, triton
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name(), flush=True)
print("Python.h", os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")), "gcc", shutil.which("gcc"), "nvcc", shutil.which("nvcc"), "ncu", shutil.which("ncu"), "peft", __import__("importlib.util").util.find_spec("peft") is not None)
p = torch.cuda.get_device_properties(0); print(p)
lib = ctypes.CDLL("studies/h100/lib/probe.so")
for cluster in (1, 2, 4, 8, 16):
    for kib in (100, 200, 226):
        n = ctypes.c_int(); e = lib.probe_clusters(cluster, kib * 1024, 512, ctypes.byref(n))
        print(f"clusters of {cluster:2} with {kib} KiB, 512 threads: {n.value} at once, {n.value*cluster} blocks, error {e}", flush=True)
def t(f, n=20):
    for _ in range(3): f()
    s, e = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True); torch.cuda.synchronize(); s.record()
    for _ in range(n): f()
    e.record(); e.synchronize(); return s.elapsed_time(e) / n / 1e3
a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda"); b = torch.empty_like(a)
print(f"copy 1 GiB: {2*a.numel()/t(lambda: b.copy_(a))/1e12:.2f} TB/s read+write")
f = a.view(torch.float32); print(f"read (sum) 1 GiB: {a.numel()/t(lambda: f.sum())/1e12:.2f} TB/s")
for n in (4096, 8192):
    x, w = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    print(f"cuBLAS bf16 {n}: {2*n**3/t(lambda: x @ w.t())/1e12:.0f} TFLOP/s")
for m in (16, 64, 256, 512, 1024, 2048, 8192):
    x, w = (torch.randn(k, 4096, device="cuda", dtype=torch.bfloat16) for k in (m, 4096))
    print(f"cuBLAS bf16 M={m} N=K=4096, warm L2: {t(lambda: x @ w.t(), 100)*1e6:.1f} us", flush=True)
