"""How the parts of a test end, so that one that fails takes nothing else with it: processes by their ids, and at once.

A fixture that ends asks `passed` before it asserts what was left: after a failure the answer is known, and a second
error would only hide the first.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def passed(request: pytest.FixtureRequest) -> Callable[[], bool]:
    """Whether no test has failed since; of a fixture for more than one test, none of them."""
    failed = request.session.testsfailed
    return lambda: request.session.testsfailed == failed


@contextlib.contextmanager
def killed(process: "subprocess.Popen[Any]") -> Iterator["subprocess.Popen[Any]"]:
    """Popen's own end waits for the process, for ever when the test failed before it told it to end."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def services_end(state: Path, wait_s: float) -> list[str]:
    """The image services of this state directory that did not end within this time by themselves, and were killed."""
    until = time.monotonic() + wait_s
    while (left := _services(state)) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"image service {pid}" for pid in left]


def _services(state: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it is gone
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"imagestore.cache.imaged" in words and os.fsencode(state) in words:
                found.append(int(path.name))
    return found
