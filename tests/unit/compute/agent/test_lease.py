"""The lease that a node needs to run guests which others may be given, and what it does without."""

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compute.agent import memory
from compute.agent.memory import Lease, boot, cut

UUID, OTHER = "11111111-0000-4000-8000-000000000001", "22222222-0000-4000-8000-000000000002"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(memory, "now_s", made)
    return made


def test_the_clock_counts_what_a_machine_sleeps() -> None:
    """CLOCK_BOOTTIME: its difference to the monotonic clock is the time in suspend."""
    import time

    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= memory.now_s() <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_a_thawed_node_has_no_lease_before_a_new_desired_state_has_come(clock: Clock) -> None:
    held = Lease()
    held.renewed(clock(), 20)
    held.confirm(clock())
    assert held.firm() and held.since() == 1000
    asked = clock()
    clock.now_s += 3600  # all its processes stood still, or the machine slept
    assert not held.firm() and held.since() == math.inf
    held.renewed(asked, 20)  # the answer that was under way is old
    assert not held.held()
    held.confirm(asked)
    held.renewed(clock(), 20)
    held.confirm(asked)  # of a desired state that was asked for before: another has the guests by now
    assert held.held() and not held.firm()
    clock.now_s += 1
    held.confirm(clock())
    assert held.firm() and held.since() == 4600


def test_the_next_agent_has_what_is_left_of_the_lease(clock: Clock, tmp_path: Path) -> None:
    held = Lease(tmp_path / "lease")
    held.renewed(clock(), 20)
    held.keep()
    assert not Lease(tmp_path / "lease").firm()  # nobody knew yet whose the guests are
    held.confirm(clock())
    held.keep()
    clock.now_s += 19
    assert Lease(tmp_path / "lease").firm()
    clock.now_s += 1
    assert not Lease(tmp_path / "lease").firm()


@pytest.mark.parametrize("text", ["", "another-boot 1e9", "nonsense", f"{boot()} ", f"{boot()} x"])
def test_of_another_boot_or_damaged_it_is_none(clock: Clock, tmp_path: Path, text: str) -> None:
    (tmp_path / "lease").write_text(text)
    assert not Lease(tmp_path / "lease").firm()


@pytest.fixture
def qemu() -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like one of libvirt's, and stands still: SIGSTOP."""
    argv = ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "-uuid", UUID, "-m", "1"]
    made = subprocess.Popen([sys.executable, *argv])
    while UUID not in Path(f"/proc/{made.pid}/cmdline").read_text():  # Popen returns in the middle of exec
        time.sleep(0.01)
    yield made
    made.kill()
    made.wait()


def test_the_power_of_those_guests_alone_is_taken_even_of_one_that_stands_still(
    qemu: subprocess.Popen[bytes],
) -> None:
    assert cut({OTHER}) == set() and qemu.poll() is None
    assert cut({UUID, OTHER}) == {UUID}
    assert qemu.wait(30) == -9
    assert cut({UUID}) == set()
