"""Tests on a GPU that may break: several processes, a limit for each test, and every result on disk at once.

    python -m bench.gpu.tests FILE [--workers N] [--each SECONDS] [--limit SECONDS] [--backend NAME] PYTEST_ARGUMENT...

FILE gets a line of JSON as each test ends. A process whose test met a CUDA error or went over its limit has ended; the
next one takes the tests that are left. No pytest-xdist and no pytest-timeout are needed. The exit status is 1 where a
test failed, 75 where none did and the time was over before the last.

The same file is the plugin of these processes.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

NO_TIME = 75  # exit status
LOST = 70  # that of a process that a CUDA error ended
# After one of these every further call on the device fails.
BROKEN = re.compile(r"CUDA error|CUDA driver error|illegal memory access|unspecified launch failure")
OTHERS = "others"  # backends besides cuda and triton, and tests of none


def write(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:  # a line at once: several processes append
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- in a process that runs tests ---


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="file of the results; tests that it has are left out")
    parser.addoption("--now", type=Path, help="file that names the test under way")
    parser.addoption("--shard", help="0/4: the first, fifth, ninth test")
    parser.addoption("--each", type=float, help="seconds for a test")
    parser.addoption("--only-backend", help="comma-separated: cuda, triton, others")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config.option))


def backend_of(item: pytest.Item) -> str:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    chosen = params.get("target") or params.get("gpu") or (OTHERS,)
    return chosen[0] if chosen[0] in ("cuda", "triton") else OTHERS


class Recorder:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.stderr = os.fdopen(os.dup(2), "w", buffering=1)  # past pytest's capture

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if wanted := self.options.only_backend:
            items[:] = [item for item in items if backend_of(item) in wanted.split(",")]
        number, count = map(int, self.options.shard.split("/"))
        done = {row["test"] for row in read(self.options.record)}
        items[:] = [item for item in items[number::count] if item.nodeid not in done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.options.now.write_text(item.nodeid)
        self.row: dict[str, Any] = {"test": item.nodeid, "outcome": "passed", "seconds": 0.0}
        # Ends the process from a thread of its own, also where Python waits for the device.
        faulthandler.dump_traceback_later(self.options.each, exit=True, file=self.stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self.end()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.row["seconds"] = round(self.row["seconds"] + report.duration, 2)
        if report.outcome != "passed" and self.row["outcome"] != "failed":
            self.row |= {"outcome": report.outcome, "text": report.longreprtext[-3000:]}
        if report.failed and BROKEN.search(report.longreprtext):
            self.end()
            os._exit(LOST)

    def end(self) -> None:
        write(self.options.record, self.row)
        self.options.now.unlink()
        print(f"{self.row['outcome']:7} {self.row['seconds']:6.2f} s  {self.row['test']}", file=self.stderr)


# --- what starts them ---


def run_shard(given: argparse.Namespace, arguments: list[str], folder: Path, number: int, end: float) -> bool:
    """Until no test of this shard is left; False = the time was over before."""
    now = folder / f"now{number}"
    command = [sys.executable, *"-m pytest -q --tb=short -p no:cacheprovider -p bench.gpu.tests".split()]
    command += [f"--record={given.file}", f"--now={now}", f"--shard={number}/{given.workers}"]
    command += [f"--each={given.each}", f"--only-backend={given.backend}", *arguments]
    while True:
        with (folder / f"output{number}").open("w+") as output:
            process = subprocess.Popen(command, stdout=output)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.1))
            if process.poll() is None:
                process.kill()
                process.wait()
                return False
            output.seek(0)
            said, status = output.read(), process.returncode
        if now.exists():
            test, seconds = now.read_text(), round(time.time() - now.stat().st_mtime, 1)
            over = seconds >= given.each
            how = f"over its {given.each:g} s" if over else f"its process ended with {status}"
            now.unlink()
            write(given.file, {"test": test, "outcome": "failed", "seconds": seconds, "text": how})
            print(f"failed  {seconds:6.2f} s  {test}: {how}", file=sys.stderr)
        elif status not in (0, 1, 5, LOST):  # 5: no test was left
            row = {"test": f"process {number}", "outcome": "failed", "seconds": 0, "text": said[-3000:]}
            write(given.file, row)
            print(said, file=sys.stderr)
            return True
        elif status != LOST:
            return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--each", type=float, default=20.0, help="seconds for a test")
    parser.add_argument("--limit", type=float, default=1e6, help="seconds for all")
    parser.add_argument("--backend", default="", help="comma-separated: cuda, triton, others")
    given, arguments = parser.parse_known_args()
    given.file = given.file.resolve()
    given.file.unlink(missing_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # a core has a process
    end = time.monotonic() + given.limit
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.workers) as pool:
        shards = range(given.workers)
        cut = not all(list(pool.map(lambda n: run_shard(given, arguments, Path(folder), n, end), shards)))
    rows = read(given.file)
    count = Counter(row["outcome"] for row in rows)
    said = ", ".join(f"{count[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    said += ", no time left for the rest" if cut else ""
    if failed := next((row for row in rows if row["outcome"] == "failed"), None):
        last = [line for line in failed["text"].splitlines() if line.strip()]
        said += f"; first: {failed['test']}: {last[-1][:200] if last else ''}"
    if not rows and not cut:
        said = f"no test was selected by {' '.join(arguments)}"
    print(said)
    return NO_TIME if cut and not count["failed"] else int(bool(count["failed"]) or not rows)


if __name__ == "__main__":
    sys.exit(main())
