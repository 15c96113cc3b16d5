"""Tests on a GPU that may break: pytest-xdist, a limit for each test, and every result on disk at once.

    python -m bench.gpu.tests FILE [--workers N] [--each SECONDS] [--limit SECONDS] [--backend NAME] PYTEST_ARGUMENT...

FILE gets a line of JSON as each test ends. A process whose test met a CUDA error or went over its limit has ended; a
new one takes the tests that are left. The exit status is 1 where a test failed, 75 where none did and the time was over
before the last.

The same file is the plugin of these processes.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NO_TIME = 75  # exit status
# After one of these every further call on the device fails.
BROKEN = re.compile(r"CUDA error|CUDA driver error|illegal memory access|unspecified launch failure")
OTHERS = "others"  # backends besides cuda and triton, and tests of none


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="file of the results")
    parser.addoption("--each", type=float, help="seconds for a test")
    parser.addoption("--only-backend", help="comma-separated: cuda, triton, others")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register((Worker if hasattr(config, "workerinput") else Recorder)(config.option))


def backend_of(item: pytest.Item) -> str:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    chosen = params.get("target") or params.get("gpu") or (OTHERS,)
    return chosen[0] if chosen[0] in ("cuda", "triton") else OTHERS


class Worker:
    """In a process that runs tests."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.stderr = os.dup(2)  # past pytest's capture

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if wanted := self.options.only_backend:
            items[:] = [item for item in items if backend_of(item) in wanted.split(",")]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        # Ends the process from a thread of its own, also where Python waits for the device.
        faulthandler.dump_traceback_later(self.options.each, exit=True, file=self.stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(trylast=True)  # xdist has sent the report
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and BROKEN.search(report.longreprtext):
            os._exit(1)


class Recorder:
    """In the process that starts them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.began: dict[str, float] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.status: int | None = None  # of the process that ended last

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.began[nodeid] = time.monotonic()
        self.rows[nodeid] = {"test": nodeid, "outcome": "passed", "seconds": 0.0}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        if error:
            self.status = node.gateway._io.wait()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid not in self.rows:  # its process died before it began
            self.pytest_runtest_logstart(report.nodeid)
        row, text, how = self.rows[report.nodeid], report.longreprtext[-3000:], ""
        row["seconds"] = round(row["seconds"] + report.duration, 2)
        died = report.when == "???"  # which is how xdist reports it
        if died and row["outcome"] != "failed":
            row["seconds"] = round(time.monotonic() - self.began[report.nodeid], 2)
            over = row["seconds"] >= self.options.each
            text = f"over its {self.options.each:g} s" if over else f"its process ended with {self.status}"
            how = f": {text}"
        if report.outcome != "passed" and row["outcome"] != "failed":
            row |= {"outcome": report.outcome, "text": text}
        if died:
            self.pytest_runtest_logfinish(report.nodeid, how)

    def pytest_runtest_logfinish(self, nodeid: str, how: str = "") -> None:
        row = self.rows[nodeid]
        with self.options.record.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['outcome']:7} {row['seconds']:6.2f} s  {nodeid}{how}", file=sys.stderr)


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
    command = [sys.executable, *"-m pytest -q --tb=short -p no:cacheprovider -p bench.gpu.tests".split()]
    command += ["-n", str(given.workers), "--max-worker-restart=1000000", f"--record={given.file}"]
    command += [f"--each={given.each}", f"--only-backend={given.backend}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a core has a process
    with tempfile.TemporaryFile("w+") as output:
        # In a group of its own, which ends whole, also where a test hangs.
        process = subprocess.Popen(command, stdout=output, env=environment, start_new_session=True)
        try:
            status: int | None = process.wait(given.limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if status not in (None, 0, 1, 5):  # 5: no test was selected
            output.seek(0)
            print(output.read(), file=sys.stderr)
    rows = read(given.file)
    count = Counter(row["outcome"] for row in rows)
    said = ", ".join(f"{count[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    if failed := next((row for row in rows if row["outcome"] == "failed"), None):
        last = [line for line in failed["text"].splitlines() if line.strip()]
        said += f"; first: {failed['test']}: {last[-1][:200] if last else ''}"
    elif status not in (None, 0, 5):
        said += f"; pytest ended with {status}"
    elif status == 5:
        said = f"no test was selected by {' '.join(arguments)}"
    print(said + ("; no time left for the rest" if status is None else ""))
    return int(bool(failed or status)) if status is not None or failed else NO_TIME


if __name__ == "__main__":
    sys.exit(main())
