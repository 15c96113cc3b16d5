"""Right? How fast? python studies/register_operand/run.py [--time-limit 40] [--dry-run] [--only REGEX] [--no-timing]; see NOTES.md."""
import argparse, ctypes, json, os, re, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KINDS = ["none", "rade", "e2frag", "e2chunk", "gauss", "gauss16", "radefrag", "gaussfrag"]
EXACT = {"none", "rade", "gauss"}  # to the specification; gauss16 nearly
# in the order of the timings: name -> the kinds that are timed ("all": every one the library has)
LIBS = json.loads((HERE / "plan.json").read_text())
SEED, STREAM, SAMPLE = 0x1234567_89ABCDEF, 7, 3
LIMIT = 3e-3


class Lib:
    def __init__(self, name):
        self.name, self.dll = name, ctypes.CDLL(str(HERE / "lib" / f"{name}.so"))
        self.info, self.fn = self.dll.info, self.dll.launch
        p, i = ctypes.c_void_p, ctypes.c_int
        self.fn.argtypes = [i, p, p, p, p, ctypes.c_float, i, p, p, i, i, i, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, i, p]
        names = ["batch", "wg", "stages", "shared", "split", "mc", "epi", "bwd"]
        self.v = {n: self.info(k) for k, n in enumerate(names)}
        self.kinds = [KINDS[self.info(100 + k)] for k in range(self.info(8))]

    def launch(self, kind, w, x, scale, y, lora=None, scaling=0.0, blocks=0):
        import torch
        n, m, k = y.shape[1], x.shape[0], x.shape[1]
        l, u = lora if lora else (None, None)
        e = self.fn(KINDS.index(kind), w.data_ptr(), x.data_ptr(), l.data_ptr() if lora else None, u.data_ptr() if lora else None, scaling,
                    l.shape[1] if lora else 0, scale.data_ptr(), y.data_ptr(), n, m, k, SEED, STREAM, SAMPLE, blocks, torch.cuda.current_stream().cuda_stream)
        if e:
            raise RuntimeError(f"launch {self.name} {kind}: error {e}")


def say(*a):
    print(*a, flush=True)


def emit(rec, path=None):
    line = json.dumps(rec)
    if path:
        with open(path, "a") as f:
            f.write(line + "\n")
    if os.environ.get("OUT"):
        with open(os.path.join(os.environ["OUT"], "rs.jsonl"), "a") as f:
            f.write(line + "\n")


def check(name, path):
    import torch
    sys.path.insert(0, str(ROOT))
    import flatlora_kernels as fk
    lib, dev = Lib(name), "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    bwd, order = lib.v["bwd"], {k: i for i, k in enumerate(["none", "rade", "gauss"])}
    g = torch.Generator(device=dev).manual_seed(abs(hash(name)) % 1000 + time.time_ns() % 1000)
    for size, ms in ((512, (256, 512, 200)), (4096, (256, 512))):
        data = {}
        w = (torch.randn(size, size, generator=g, device=dev) * size**-0.5).bfloat16()
        scale = ((0.3 + 0.3 * torch.rand(size, generator=g, device=dev)) * size**-0.5).bfloat16().float()
        refs = {}
        for kind in sorted(lib.kinds, key=lambda k: order.get(k, 9)):
            how = {"rade": "rademacher", "gauss": "gaussian", "gauss16": "gaussian"}.get(kind)
            if how and how not in refs:
                refs[how] = fk.perturb_weight(w, scale, seed=SEED, stream=STREAM, sample=SAMPLE, noise=how, backend="reference").float()
            wp = refs[how] if how else w.float()
            for m in ms:
                for lora in (False, True) if kind == "none" and not bwd and size == 512 and name[:3] != "rs2" else (False,):
                    x = torch.randn(m, size, generator=g, device=dev).bfloat16()
                    # two guard rows behind y: nothing may be written there
                    room = torch.full((m + 2, size), float("nan"), device=dev, dtype=torch.bfloat16)
                    y = room[:m]
                    ref, la = x.float() @ (wp if bwd else wp.T), None
                    if lora:
                        la = (torch.randn(size, 64, generator=g, device=dev).bfloat16(), torch.randn(m, 64, generator=g, device=dev).bfloat16())
                        ref += 0.125 * la[1].float() @ la[0].float().T
                    lib.launch(kind, w, x, scale, y, la, 0.125)
                    torch.cuda.synchronize()
                    d = y.float() - ref
                    err = (d.norm() / ref.norm()).item()
                    guard = bool(room[m:].isnan().all())
                    rec = {"what": "check", "lib": name, "kind": kind, "size": size, "m": m, "lora": lora, "err": err, "nan": int(y.isnan().sum()), "guard": guard,
                           "ok": guard and (err < LIMIT if kind in EXACT else err < 6e-3 if kind == "gauss16" else int(y.isnan().sum()) == 0)}
                    if not rec["ok"] and kind in EXACT:
                        d = d.nan_to_num(1e3)
                        blocks = lambda t: [float(f"{v:.2g}") for v in t][:12]
                        rec["by_n64"] = blocks((d.reshape(m, -1, 64).pow(2).mean((0, 2)).sqrt()).tolist())
                        rec["by_m8"] = blocks((d.reshape(-1, 8, size).pow(2).mean((1, 2)).sqrt()).tolist())
                        rec["by_n_in_16"] = blocks((d.reshape(-1, 16).pow(2).mean(0).sqrt()).tolist())
                        rec["vs_plain"] = ((y.float() - x.float() @ (w.float() if bwd else w.float().T)).norm() / ref.norm()).item()
                        rec["y"], rec["ref"] = y[0, :6].float().tolist(), ref[0, :6].tolist()
                    emit(rec, path)
                    say(f"check {name:10s} {kind:9s} {size}x{size} M={m:4d}{' lora' if lora else ''} err {err:.2e} {'ok' if rec['ok'] else 'WRONG ' + json.dumps({k: v for k, v in rec.items() if k in ('nan', 'guard', 'by_n64', 'by_m8', 'by_n_in_16', 'vs_plain', 'y', 'ref')})}")
    emit({"what": "done", "lib": name}, path)


def timing(go, deadline, reps):
    import torch
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    N = K = 4096
    launches, sets = 12, 4
    ws = [(torch.randn(N, K, device="cuda") * K**-0.5).bfloat16() for _ in range(sets)]
    scale = torch.full((N,), 0.05 * K**-0.5, device="cuda").bfloat16().float()
    ms = (2048, 8192, 256)
    xs = {m: [torch.randn(m, K, device="cuda").bfloat16() for _ in range(sets)] for m in ms}
    ys = {m: [torch.empty(m, N, device="cuda", dtype=torch.bfloat16) for _ in range(sets)] for m in ms}

    def capture(fn):
        s = torch.cuda.Stream()
        s.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(s):
            fn(0)
        torch.cuda.current_stream().wait_stream(s)
        torch.cuda.synchronize()
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g):
            for i in range(launches):
                fn(i % sets)
        g.replay()
        torch.cuda.synchronize()
        return g

    base = {(b, m): capture(lambda i: torch.matmul(xs[m][i], ws[i] if b else ws[i].T, out=ys[m][i])) for b in (0, 1) for m in ms}
    say(f"timing: ready, {torch.cuda.get_device_name()}, torch {torch.__version__}")
    while not os.path.exists(go):
        time.sleep(0.02)
        if time.time() > deadline:
            return
    e = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(400)]
    for name, passed in json.load(open(go)):
        lib = Lib(name)
        for m in ms:
            if time.time() > deadline - 1:
                say("timing: out of time at", name, m)
                return
            try:
                graphs = [("torch", base[lib.v["bwd"], m])] + [(k, capture(lambda i: lib.launch(k, ws[i], xs[m][i], scale, ys[m][i]))) for k in passed]
            except RuntimeError as err:
                say(f"time  {name} M={m}: {err}")
                if "CUDA" in str(err):
                    raise
                continue
            n = reps if m < 8192 else max(8, reps // 2)
            got = {k: [] for k, _ in graphs}
            pos = 0
            for r in range(n):
                for k, g in graphs:
                    e[pos][0].record()
                    g.replay()
                    e[pos][1].record()
                    got[k].append(pos)
                    pos += 1
            torch.cuda.synchronize()
            med = {k: sorted(e[q][0].elapsed_time(e[q][1]) * 1e3 / launches for q in v)[len(v) // 2] for k, v in got.items()}
            for k, _ in graphs[1:]:
                us, flop = med[k], 2 * m * N * K
                emit({"what": "time", "lib": name, "kind": k, "m": m, "us": us, "torch_us": med["torch"], **lib.v})
                say(f"time  {name:10s} {k:9s} M={m:4d} {us:8.2f} us {flop / us * 1e-6:6.1f} TFLOP/s  torch {med['torch']:8.2f} us {flop / med['torch'] * 1e-6:6.1f}  ratio {us / med['torch']:.3f}")


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--time-limit", type=float, default=40)
    a.add_argument("--check-limit", type=float, default=20)
    a.add_argument("--reps", type=int, default=20)
    a.add_argument("--only", default="")
    a.add_argument("--dry-run", action="store_true")
    a.add_argument("--no-timing", action="store_true")
    a.add_argument("--jobs", type=int, default=99, help="checks at once; 1 where the GPU takes one process only")
    a.add_argument("--time-anyway", action="store_true", help="also what was wrong (not what failed)")
    o = a.parse_args()
    start = time.time()
    deadline = start + o.time_limit
    plan = {n: k for n, k in LIBS.items() if re.search(o.only, n)}
    if o.dry_run:
        for n, k in plan.items():
            lib = Lib(n)
            say(f"{n:10s} {lib.v} has {lib.kinds} times {lib.kinds if k == 'all' else k}")
            missing = [q for q in (lib.kinds if k == "all" else k) if q not in lib.kinds]
            assert not missing, missing
        say(f"dry run: {len(plan)} libraries; checks all at once (<= {o.check_limit} s), then timings until {o.time_limit} s")
        return
    tmp = Path(tempfile.mkdtemp())
    go = tmp / "go.json"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch  # once; CUDA begins in the children only
    say(f"imports {time.time() - start:.1f} s, torch {torch.__version__}")

    def child(fn, *args, err=None):
        pid = os.fork()
        if pid:
            return pid
        rc = 1
        try:
            if err:
                os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT, 0o644), 2)
            fn(*args)
            rc = 0
        except BaseException as e:  # noqa: BLE001
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(rc)

    def ended(pid):  # exit status, None while it runs
        got, status = os.waitpid(pid, os.WNOHANG)
        return None if got == 0 else os.waitstatus_to_exitcode(status)

    def kill(pid):
        os.kill(pid, 9)
        give_up = time.time() + 3  # a process in a hung kernel may take a while to go
        while ended(pid) is None and time.time() < give_up:
            time.sleep(0.02)

    early = not o.no_timing and o.jobs > 1
    timer = child(timing, go, deadline, o.reps) if early else None
    kids, until, state = {}, {}, {}
    while len(state) < len(plan):
        for n in plan:
            if n in state:
                continue
            if n not in kids:
                if len(kids) - len(state) < o.jobs and time.time() < deadline:
                    kids[n], until[n] = child(check, n, tmp / n, err=str(tmp / f"{n}.err")), min(deadline, time.time() + o.check_limit)
                elif time.time() > deadline:
                    state[n] = "not started"
                continue
            p = kids[n]
            rc = ended(p)
            if rc is not None:
                state[n] = "done" if rc == 0 else f"rc {rc}: " + " | ".join(l for l in (tmp / f"{n}.err").read_text().splitlines() if "Error" in l)[-300:]
            elif time.time() > until[n]:
                kill(p)
                state[n] = "killed: time (a hang?)"
        time.sleep(0.02)
    todo = []
    for n in plan:
        recs = [json.loads(l) for l in (tmp / n).read_text().splitlines()] if (tmp / n).exists() else []
        recs = [r for r in recs if r["what"] == "check"]
        kinds = Lib(n).kinds
        good = [k for k in kinds if any(r["kind"] == k for r in recs) and all(r["ok"] for r in recs if r["kind"] == k)]
        bad = [k for k in kinds if any(r["kind"] == k and not r["ok"] for r in recs)]
        say(f"phase1 {n:10s} {state[n]}; right {good}; wrong {bad}; not run {[k for k in kinds if k not in good + bad]}")
        emit({"what": "phase1", "lib": n, "state": state[n], "right": good, "wrong": bad})
        # of a library that hung or crashed only what was through at both sizes
        full = [k for k in (kinds if o.time_anyway else good) if any(r["kind"] == k and r["size"] == 4096 for r in recs)]
        want = [k for k in kinds if k in full and (plan[n] == "all" or k in plan[n])]
        if want:
            todo.append((n, want))
    say(f"phase1 over after {time.time() - start:.1f} s")
    if not o.no_timing and not early:
        timer = child(timing, go, deadline, o.reps)
    if timer:
        part = tmp / "part"; part.write_text(json.dumps(todo)); part.rename(go)
        rc = None
        while rc is None and time.time() < deadline + 1:
            rc = ended(timer)
            time.sleep(0.02)
        if rc is None:
            kill(timer); say("timing killed at the time limit")
        elif rc:
            say("timing rc", rc)
    say(f"total {time.time() - start:.1f} s")


main()
