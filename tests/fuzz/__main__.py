"""python -m tests.fuzz: random calls of the op beside its formula in float64; see tests/README.md.

Every instruction set of the CPU library is a process of its own, and so is what follows a crash.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, help="default FLATLORA_FUZZ_SEED, else a fresh one")
    parser.add_argument("--cases", type=int, default=300, help="how many (default 300)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--backend", default="cpu", help="reference, cpu, triton or cuda (default cpu)")
    parser.add_argument("--level", help="this instruction set alone: see FLATLORA_CPU_ISA")
    parser.add_argument("--library", help="libflatlora_cpu.so to load instead of the installed one")
    parser.add_argument("--trace", help="a file to which the calls of the C library are written")
    parser.add_argument(
        "--child", type=int, nargs=3, metavar=("FIRST", "END", "STEP"), help=argparse.SUPPRESS
    )
    return parser


# --- The process that runs cases ---


def child(options: argparse.Namespace) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if options.library:
        _load_instead(options.library)
    from targets import Target

    from flatlora_kernels import backends

    from . import cases, judge

    if reason := backends.unavailable(options.backend):
        sys.exit(f"backend {options.backend!r}: {reason}")
    if options.backend == "triton":
        import interpreter

        interpreter.speed_up()
    write = _Write(options.trace) if options.trace else None
    for number in range(*options.child):
        case = cases.make(options.seed, number, options.backend)
        _say(case=number, dtype=case.dtype)
        if write:
            # A call on a packed weight has the address of its description, which the replay would follow.
            write.left = 0 if case.packed else 12
        begin = time.perf_counter()
        try:
            judge.examine(case, Target(options.backend, "cpu"))
        except Exception as error:
            text = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            _say(case=number, error=f"{text}\n{case}")
        else:
            _say(case=number, seconds=time.perf_counter() - begin)


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def _load_instead(path: str) -> None:
    """The library at `path` in place of the installed one, whose file must not be touched."""
    import ctypes

    load = ctypes.CDLL
    ctypes.CDLL = lambda name, *rest, **more: load(  # type: ignore[assignment,misc]
        path if str(name).endswith("libflatlora_cpu.so") else name, *rest, **more
    )


class _Write:
    """Appends the next `left` calls of the CPU library to a file: a line of level, function, length; the struct."""

    def __init__(self, path: str) -> None:
        from flatlora_kernels.backends import cpu

        self.call, self.level, self.left = cpu._call, cpu.level(), 0
        self.file = open(path, "ab")
        cpu._call = self

    def __call__(self, function: str, packed: bytes) -> None:
        if self.left > 0:  # strategy "panel" makes thousands
            self.left -= 1
            self.file.write(f"{self.level} {function} {len(packed)}\n".encode() + packed)
            self.file.flush()
        self.call(function, packed)


# --- The process that starts it ---


def levels(options: argparse.Namespace) -> list[str]:
    if options.level or options.backend != "cpu":
        return [options.level or ""]
    sys.path.insert(0, str(ROOT))
    from flatlora_kernels.backends import cpu

    if reason := cpu.unavailable():
        sys.exit(f"backend 'cpu': {reason}")
    return list(cpu._load().levels)  # type: ignore[union-attr]


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.done: collections.Counter[tuple[str, str]] = collections.Counter()
        self.failures: list[str] = []
        self.slowest = (0.0, 0)
        self.end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")

    def run(self, level: str, first: int, end: int, step: int) -> None:
        while first < end and time.monotonic() < self.end:
            first = self.start(level, first, end, step)

    def start(self, level: str, first: int, end: int, step: int) -> int:
        """Cases in one process, to the end or to where it dies; the number of the case to go on with."""
        given = [f"--{k}={v}" for k in ("backend", "library", "trace") if (v := getattr(self.options, k))]
        command = [sys.executable, "-m", "tests.fuzz", *given, f"--seed={self.options.seed}", "--child"]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
        if level:
            environment["FLATLORA_CPU_ISA"] = level
        process = subprocess.Popen(
            [*command, str(first), str(end), str(step)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        number, dtype = None, ""
        assert process.stdout
        for line in process.stdout:
            if not line.startswith("{"):
                print(line, end="")
                continue
            said = json.loads(line)
            number = said["case"]
            if "dtype" in said:
                dtype = said["dtype"]
                continue
            self.done[level or self.options.backend, dtype] += 1
            if "error" in said:
                self.fail(level, number, said["error"])
            else:
                self.slowest = max(self.slowest, (said["seconds"], number))
            if time.monotonic() > self.end:
                process.kill()
                process.wait()
                return end
        code = process.wait()
        if code == 0:
            return end
        if number is None:
            sys.exit(f"the fuzzer's process ended with {code} before its first case")
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        self.fail(level, number, f"the process ended: {how}")
        return number + step

    def fail(self, level: str, number: int, what: str) -> None:
        options = self.options
        again = f"python -m tests.fuzz --seed {options.seed} --case {number}"
        again += f" --level {level}" if level else f" --backend {options.backend}"
        self.failures.append(f"{again}\n{what}")
        print(f"FAILED: {self.failures[-1]}", flush=True)


def main() -> None:
    options = arguments().parse_args()
    if options.child:
        return child(options)
    if options.seed is None:
        options.seed = int(os.environ.get("FLATLORA_FUZZ_SEED") or random.randrange(2**32))
    if options.case is not None:
        options.first, options.cases = options.case, 1
    print(f"seed {options.seed}", flush=True)
    run, found = Run(options), levels(options)
    end = options.first + options.cases
    for block in range(options.first, end, 1000):  # so that a long run that is stopped has seen all levels
        for i, level in enumerate(found):
            shift = (i - block) % len(found)  # case n runs on level n modulo their number
            run.run(level, block + shift, min(block + 1000, end), len(found))
    for level in dict.fromkeys(level for level, _ in run.done):
        counts = {dtype: count for (at, dtype), count in sorted(run.done.items()) if at == level}
        print(f"{level:12} {sum(counts.values()):6} cases:", ", ".join(f"{c} {d}" for d, c in counts.items()))
    print(f"{sum(run.done.values())} cases, {len(run.failures)} failures; slowest {run.slowest[0]:.1f} s,"
          f" case {run.slowest[1]}")  # fmt: skip
    sys.exit(bool(run.failures))


if __name__ == "__main__":
    main()
