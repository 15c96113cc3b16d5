"""python run.py check|time LIBS... ; writes OUT/ahead.jsonl"""
import ctypes, json, os, sys, time
from pathlib import Path
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import torch
import flatlora_kernels as fk
SEED, STREAM, SAMPLE = 0x1234567_89ABCDEF, 7, 3
KINDS = {9: "none", 1: "gaussian", 2: "rademacher", 3: "near_gaussian"}
dev = "cuda"
START = time.time()
LIMIT = float(os.environ.get("LIMIT", 40))

def emit(**r):
    with open(os.path.join(os.environ.get("OUT", "."), "ahead.jsonl"), "a") as f: f.write(json.dumps(r) + "\n")

class Lib:
    def __init__(self, spec):
        name, _, drawers = spec.partition(":")
        self.name, self.drawers = spec, int(drawers or 7)
        self.fn = ctypes.CDLL(str(HERE / f"{name}.so")).launch
        p, i = ctypes.c_void_p, ctypes.c_int
        self.fn.argtypes = [i, i, i, p, p, p, p, p, i, p, p, p, p, i, i, i, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, i, i, p]
    def __call__(self, kind, back, w, a, scale, y, work, flags, l=None, u=None, group=0, blocks=0, stamps=None):
        r = 0 if l is None else u.shape[1]
        e = self.fn(kind, back, self.drawers, stamps.data_ptr() if stamps is not None else None, w.data_ptr(), a.data_ptr(), l.data_ptr() if r else None, u.data_ptr() if r else None, r, scale.data_ptr(), y.data_ptr(), work.data_ptr(),
                    flags.data_ptr(), w.shape[0], a.shape[0], w.shape[1], SEED, STREAM, SAMPLE, group, blocks, torch.cuda.current_stream().cuda_stream)
        if e: raise RuntimeError(f"launch {self.name} {kind} {back}: {e}")

def check(lib, kinds, backs):
    ok = True
    for N, K, ms in ((512, 1024, (256, 200)), (1024, 512, (2048,)), (4096, 4096, (2048, 1000))):
        w = (torch.randn(N, K, device=dev) * K**-0.5).bfloat16()
        scale = ((0.3 + 0.3 * torch.rand(N, device=dev)) * K**-0.5).bfloat16().float()
        work, flags = torch.empty_like(w), torch.zeros(1 << 16, device=dev, dtype=torch.int32)
        for kind in kinds:
            wp = w if kind == 9 else fk.perturb_weight(w, scale, seed=SEED, stream=STREAM, sample=SAMPLE, noise=KINDS[kind], backend=os.environ.get("ORACLE", "reference"))
            for back in backs:
                for m in ms:
                    for rank in (0, 16):
                        a = torch.randn(m, N if back else K, device=dev).bfloat16()
                        outs = K if back else N
                        l = u = None
                        p = wp.float() if back else wp.float().T
                        ref = a.float() @ p
                        if rank:
                            u = torch.randn(m, rank, device=dev).bfloat16()
                            l = (torch.randn(rank, K, device=dev) if back else torch.randn(N, rank, device=dev)).bfloat16()
                            ref += u.float() @ (l.float() if back else l.float().T)
                        room = torch.full((m + 2, outs), float("nan"), device=dev, dtype=torch.bfloat16)
                        y = room[:m]
                        errs, same = [], True
                        for trial in range(3):
                            room.fill_(float("nan")); work.fill_(float("nan"))
                            lib(kind, back, w, a, scale, y, work, flags, l, u, group=8)
                            torch.cuda.synchronize()
                            errs.append(((y.float() - ref).norm() / ref.norm()).item())
                            if trial: same &= torch.equal(y, first)
                            first = y.clone()
                        exact = kind == 9 or torch.equal(work, wp)
                        left = int(flags.abs().sum())
                        good = max(errs) < 3e-3 and same and (exact or kind == 1) and left == 0 and bool(room[m:].isnan().all())
                        ok &= good
                        emit(what="check", lib=lib.name, kind=KINDS[kind], back=back, N=N, K=K, m=m, rank=rank, err=errs, same=same, exact=exact, left=left, ok=good)
                        if not good: print("WRONG", lib.name, KINDS[kind], back, N, K, m, rank, errs, same, exact, left, flush=True)
    print(f"{time.time()-START:.1f} check {lib.name} {[KINDS[k] for k in kinds]} {backs}: {'all right' if ok else 'WRONG'}", flush=True)
    return ok

def timing(plan):
    N = K = 4096
    sets, launches = 4, 8
    ws = [(torch.randn(N, K, device=dev) * K**-0.5).bfloat16() for _ in range(sets)]
    scale = torch.full((N,), 0.05 * K**-0.5, device=dev).bfloat16().float()
    work, flags, spare = torch.empty_like(ws[0]), torch.zeros(1 << 16, device=dev, dtype=torch.int32), torch.zeros(1 << 16, device=dev, dtype=torch.int32)
    def capture(fn):
        s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(s): fn(0)
        torch.cuda.current_stream().wait_stream(s); torch.cuda.synchronize()
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g):
            for i in range(launches): fn(i % sets)
        g.replay(); torch.cuda.synchronize()
        return g
    for m in [int(v) for v in os.environ.get("ROWS", "2048,8192,512,1024").split(",")]:
        xs = [torch.randn(m, K, device=dev).bfloat16() for _ in range(sets)]
        ys = [torch.empty(m, N, device=dev, dtype=torch.bfloat16) for _ in range(sets)]
        u = torch.randn(m, 16, device=dev).bfloat16()
        l = [torch.randn(N, 16, device=dev).bfloat16(), torch.randn(16, K, device=dev).bfloat16()]
        graphs = {}
        for back in (0, 1):
            graphs["torch", None, back, 0, 0] = capture(lambda i: torch.matmul(xs[i], ws[i] if back else ws[i].T, out=ys[i]))
        for lib, kinds, backs, groups, ranks in plan:
            for kind in kinds:
                for back in backs:
                    for group in groups:
                        if group * 128 > m and group != groups[0]: continue
                        if group == -1 and m != 2048: continue
                        for rank in ranks:
                            try:
                                graphs[lib.name, kind, back, group, rank] = capture(lambda i: lib(kind, back, ws[i], xs[i], scale, ys[i], work, spare if group == -1 else flags, l[back] if rank else None, u if rank else None, group=group))
                            except RuntimeError as e:
                                print(e, flush=True)
        n = max(6, min(30, int(2.0e5 / (m * 0.18 * launches) / len(graphs) * 8)))
        got = {k: [] for k in graphs}
        for r in range(n):
            for k, g in graphs.items():
                e = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                e[0].record(); g.replay(); e[1].record(); got[k].append(e)
        torch.cuda.synchronize()
        med = {k: sorted(a.elapsed_time(b) * 1e3 / launches for a, b in v) for k, v in got.items()}
        base = {back: med["torch", None, back, 0, 0][n // 2] for back in (0, 1)}
        for k, v in med.items():
            us = v[n // 2]
            emit(what="time", lib=k[0], kind=KINDS.get(k[1]), back=k[2], group=k[3], rank=k[4], m=m, us=us, p20=v[n // 5], p80=v[n * 4 // 5], torch=base[k[2]], rounds=n)
            print(f"M={m:5d} {k[0]:8s} {KINDS.get(k[1], '-'):13s} {'dX' if k[2] else 'y '} group {k[3]:2d} rank {k[4]:2d}: {us:8.2f} us ({v[n//5]:.1f} to {v[n*4//5]:.1f}) ratio {us / base[k[2]]:.3f}", flush=True)
        print(f"{time.time()-START:.1f} s, {n} rounds", flush=True)
        if time.time() - START > LIMIT: break

def stamps(specs):
    N = K = 4096
    for spec, kind, m in specs:
        lib = Lib(spec)
        w = (torch.randn(N, K, device=dev) * K**-0.5).bfloat16(); x = torch.randn(m, K, device=dev).bfloat16(); y = torch.empty(m, N, device=dev, dtype=torch.bfloat16)
        scale = torch.full((N,), 0.05 * K**-0.5, device=dev).bfloat16().float(); work = torch.empty_like(w); flags = torch.zeros(1 << 16, device=dev, dtype=torch.int32)
        big = torch.empty(1 << 28, device=dev, dtype=torch.uint8)
        for trial in range(3):
            st = torch.zeros(132 * 256, device=dev, dtype=torch.int64)
            big.zero_(); torch.cuda.synchronize()
            lib(kind, 0, w, x, scale, y, work, flags, group=16, stamps=st); torch.cuda.synchronize()
        st = st.view(132, 256).cpu(); zero = int(st[:, 0][st[:, 0] > 0].min())
        for b in (0, 60, 131):
            t = [int(v) - zero if int(v) else None for v in st[b]]
            steps, draws = [v for v in t[1:201] if v is not None], [v for v in t[201:] if v is not None]
            print(spec, KINDS[kind], "M", m, "block", b, "steps", steps[::8], "last", steps[-1:], "draws", draws[:1] + draws[1::3] + draws[-1:], len(draws), flush=True)
            emit(what="stamps", lib=spec, kind=kind, m=m, block=b, steps=steps, draws=draws)

if __name__ == "__main__":
    if sys.argv[1] == "stamps":
        stamps(json.loads(sys.argv[2])); sys.exit()
    plan, checks = [], []
    for item in json.loads(sys.argv[2]):
        name, kinds, backs, groups, ranks = item
        lib = Lib(name)
        if sys.argv[1] != "time" and not check(lib, kinds, backs): continue
        plan.append((lib, kinds, backs, groups, ranks))
    if sys.argv[1] != "check": timing(plan)
