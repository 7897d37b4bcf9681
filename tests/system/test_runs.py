"""`sf run`: a guest for one command, and nothing of it afterwards, however that ends."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scripts.private_libvirtd import PrivateHost
from tests import drills
from tests.system.machine import Machine, within

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
SF = "import cli.cloud.run as run, cli.main as sf; run._LEASE_S = 6; sf.main()"
"""`sf` with a shorter lease, so that its end is not waited for so long."""
TINY = ("run", "--image", "tiny:1", "--memory", "128")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, tiny_image: Path) -> Iterator[Machine]:
    with PrivateHost() as host:
        made = Machine(host, tmp_path_factory.mktemp("runs"), SF_ACCEL="tcg")
        made.sf("image", "push", str(tiny_image), "tiny:1")
        made.start()
        yield made
        gone(made)
        made.signal()


def gone(machine: Machine) -> None:
    """Nothing is left of any guest, in no record and on no node."""
    within(90, lambda: machine.listed("instance", "ls") == [], "all guests are gone")
    left = [
        trace for trace in machine.traces() if "process" in trace or "domain" in trace or "instances" in trace
    ]
    assert not left


def started(machine: Machine, *words: str) -> tuple[subprocess.Popen[bytes], str]:
    """`sf run` in the background, and its process id in the machine."""
    file = machine.home / f"pid-{time.monotonic_ns()}"
    script = f'echo $$ >{file}; exec "$@"'
    argv = machine.argv("sh", "-c", script, "sh", sys.executable, "-c", SF, *TINY, *words)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    within(20, lambda: file.exists() and file.read_text().strip(), "it has begun")
    return process, file.read_text().strip()


def test_a_command_has_its_files_its_input_its_output_and_its_code(machine: Machine) -> None:
    source = machine.home / "src"
    (source / "sub").mkdir(parents=True)
    (source / "sub/tool").write_text("#!/bin/sh\necho it runs in $(pwd); cat; echo bad >&2; exit 7\n")
    (source / "sub/tool").chmod(0o755)
    words = (*TINY, "-v", f"{source}:/work", "-v", f"{source}/sub/tool:/opt/", "-w", "/work/sub", "-i")
    done = subprocess.run(
        machine.argv("sf", *words, "--", "sh", "-c", "cmp tool /opt/tool && ./tool -x"),
        input=b"given\n", capture_output=True, timeout=180,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (7, b"it runs in /work/sub\ngiven\n"), done.stderr
    assert b"bad\n" in done.stderr and b"its agent answers after" in done.stderr
    (kept,) = (machine.home / ".cache/sf/consoles").iterdir()
    assert f"console is kept in {kept}".encode() in done.stderr and b"SF-GUEST-READY" in kept.read_bytes()
    gone(machine)


def test_what_cannot_be_run_says_why_and_leaves_nothing(machine: Machine) -> None:
    assert machine.sf("run", "--image", "none:1", "true", check=False).returncode == 3
    assert machine.sf(*TINY, "-v", "/no/such:/x", "true", check=False).returncode == 2
    with ThreadPoolExecutor() as pool:
        off = pool.submit(machine.sf, *TINY, "--", "sh", "-c", "echo bye; sync; poweroff -f", check=False)
        late = pool.submit(machine.sf, *TINY, "--ttl", "2s", "--", "sleep", "100", check=False)
    assert off.result().returncode not in (0, 7) and "console is kept in" in off.result().stderr
    assert "SF-GUEST-READY" in off.result().stderr
    assert late.result().returncode == 3 and "was deleted meanwhile" in late.result().stderr
    gone(machine)


def test_rounds_of_true_leave_nothing_and_have_their_codes(machine: Machine) -> None:
    def once(number: int) -> None:
        word, code = (("true", 0), ("false", 1), ("no-such-command", 127))[number % 3]
        assert machine.sf(*TINY, "-q", word, check=False).returncode == code

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(once, range(1000 if drills.everything() else 3)))
    gone(machine)


@pytest.mark.drill
def test_whoever_is_killed_at_any_moment_leaves_nothing(machine: Machine) -> None:
    def killed(number: int) -> None:
        rng = random.Random(drills.seed() + number)
        how = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)[number % 3]
        process, pid = started(machine, "sleep", "300")
        time.sleep(rng.uniform(0, 9))
        machine.host.run(["kill", f"-{int(how)}", pid])
        out, err = process.communicate(timeout=60)
        assert process.returncode in (130, 137, -9), (how, process.returncode, out, err)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(killed, range(drills.rounds(full=30))))
    gone(machine)


@pytest.mark.drill
def test_a_server_that_is_killed_ends_the_command_and_when_it_is_back_the_guest(machine: Machine) -> None:
    for number in range(drills.rounds(full=4) // 2):
        process, _ = started(machine, "sh", "-c", "echo begun; sleep 300")
        assert process.stdout is not None
        if number % 2 == 0:
            assert process.stdout.readline() == b"begun\n"
        machine.signal()
        assert process.wait(60) == 8
        machine.start()
        gone(machine)
