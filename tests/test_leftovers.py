"""What tests leave behind: of one that failed processes are ended, all else is said, and nothing is taken away."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEST = """
import subprocess
from pathlib import Path
from tests import conftest

conftest.time.sleep = lambda _: None
conftest._domains = set


def test_something():
    {leave}
    assert {passes}
"""
PROCESS = 'Path("pid").write_text(str(subprocess.Popen(["sleep", "600"]).pid))'
LINK = 'conftest._links = lambda: {"link theirs"}; conftest.subprocess = None'


@pytest.mark.parametrize(
    ("leave", "passes", "code", "said"),
    [
        (PROCESS, False, 1, "left behind by tests that failed, and ended now"),
        (PROCESS, True, 2, "left behind by the tests:\n  process"),
        (LINK, False, 2, "left behind by the tests:\n  link theirs"),
    ],
)
def test_who_left_what(tmp_path: Path, leave: str, passes: bool, code: int, said: str) -> None:
    after = "def test_after():\n    pass\n" if leave == LINK else ""  # else it is the last one that fails
    (tmp_path / "test_it.py").write_text(TEST.format(leave=leave, passes=passes) + after)
    (tmp_path / "pytest.ini").touch()
    argv = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "test_it.py"]
    told = os.environ | {"PYTHONPATH": str(ROOT), "SF_TEST_STRICT": str(int(leave == LINK))}
    done = subprocess.run(argv, env=told, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    with suppress(FileNotFoundError, ProcessLookupError):
        pid = int((tmp_path / "pid").read_text())
        runs = bool(Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(pid, signal.SIGKILL)
        assert runs == passes
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr
