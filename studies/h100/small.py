import torch, bench.timing as timing, flatlora_kernels as fk
from flatlora_kernels import backends
from bench.truth import Problem
tr, cu = backends.get("triton"), backends.get("cuda")
import flatlora_kernels.triton_kernels.adapter_grads as ag
for M in (16, 256, 2048, 8192):
    P = [Problem(M, 4096, 4096, 16, 1, "bfloat16", "gaussian", fresh=i) for i in range(2)]
    u = [p.x @ p.A.t() for p in P]; y = [p.dy.clone() for p in P]; s = torch.empty_like(P[0].weight)
    calls = {"plain": lambda c: P[c].x @ P[c].weight.t(), "x A^T": lambda c: P[c].x @ P[c].A.t(), "y += u B^T": lambda c: y[c].addmm_(u[c], P[c].B.t()),
             "dY B": lambda c: P[c].dy @ P[c].B, "dY^T u": lambda c: P[c].dy.t() @ u[c], "v^T x": lambda c: P[c].v.t() @ P[c].x,
             "copy y": lambda c: y[c].copy_(P[c].dy), "empty-ish": lambda c: P[c].draw.seed.add_(0)}
    if ag.takes(P[0].dy, u[0]): calls["adapter_grads triton"] = lambda c: ag.adapter_grads(P[c].dy, u[c], P[c].B, 0.75)
    for n in (512, 1024, 2048):
        calls[f"product {n}"] = lambda c, n=n: torch.mm(P[c].x, s[:n].t(), out=y[c][:, :n])
        calls[f"product dX {n}"] = lambda c, n=n: torch.mm(P[c].dy, s.view(-1)[: 4096 * n].view(4096, n), out=y[c][:, :n])
        for name, m in (("triton", tr), ("cuda", cu)):
            def f(c, n=n, m=m):
                d = P[c].draw; m.perturb(P[c].weight[:n], d._replace(noise_scale=d.noise_scale[:n]), s[:n]); return s
            calls[f"perturb {name} {n}"] = f
    g = {}
    for k, f in calls.items():
        try: g[k] = timing.graphed(f, 2); g[k](0); torch.cuda.synchronize()
        except Exception as e: print(k, str(e)[:100]); g.pop(k, None)
    r = timing.interleaved(g, timing.timer("cuda"), 2, 0.01, 15, 40)
    for k in g:
        x = timing.row(r, k); print(f"{M:5} {k:24} {x['median_us']:8.1f} us ({x['p20_us']:.1f} to {x['p80_us']:.1f})", flush=True)
