"""`sf run` and `sf image build`: guests for one purpose, and nothing of them afterwards, however that ends."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from imagestore import open_store, verify_store
from scripts.private_libvirtd import PrivateHost
from tests import drills
from tests.ending import passed
from tests.system.machine import Machine, within
from tests.system.test_snapshot_kills import kill
from tests.system.test_warm import SELF

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
SF = "import cli.cloud.run as run, cli.main as sf; run._LEASE_S = 6; sf.main()"
"""`sf` with a shorter lease, so that its end is not waited for so long."""
TINY = ("run", "--image", "tiny:1", "--memory", "128")  # they resume; those of another size boot
BOOTS = (*TINY[:-1], "144")
RECIPE = """#!/bin/sh
# The tiny guest's disk is a file system of FAT.
mkdir -p /mnt && mount -t vfat /dev/vda1 /mnt || exit
seq 1 450000 >/mnt/numbers && umount /mnt
"""
CHANGED_BYTES = sum(len(str(number)) + 1 for number in range(1, 450_001))


@pytest.fixture(scope="module")
def machine(
    tmp_path_factory: pytest.TempPathFactory, tiny_image: Path, request: pytest.FixtureRequest
) -> Iterator[Machine]:
    well = passed(request)
    with PrivateHost() as host:
        made = Machine(host, tmp_path_factory.mktemp("runs"), SF_ACCEL="tcg")
        made.sf("image", "push", str(tiny_image), "tiny:1")
        made.start()
        warm = made.sf("image", "warm", *TINY[2:], "--format", "json")
        said = json.loads(warm.stdout)
        assert said["written"] > 1 << 20 and made.sf("image", "show", said["name"])
        assert "records in" not in warm.stderr  # what it does in the guest says nothing
        yield made
        if well():
            gone(made, "")
            left = ("process", "domain", "instances")
            assert not [trace for trace in made.traces() if any(word in trace for word in left)]
        made.signal()


def gone(machine: Machine, prefix: str = "run-") -> None:
    """No record has a guest of such a name; the node has said that nothing is left of it."""

    def there() -> list[str]:
        return [one["name"] for one in machine.listed("instance", "ls") if one["name"].startswith(prefix)]

    within(90, lambda: not there(), f"all guests {prefix}… are gone")


def kept(machine: Machine) -> list[str]:
    names = [row["name"] for row in machine.listed("image", "ls", "my")]
    return [name for name in names if not name.startswith("warm-")]


@pytest.fixture(scope="module", autouse=True)
def built(machine: Machine) -> Iterator[Future[list[Any]]]:
    """Two builds of one recipe, and one that does not end in its time: beside the tests, which they slow down."""
    recipe, bad = machine.home / "recipe", machine.home / "bad"
    recipe.write_text(RECIPE)
    bad.write_text("#!/bin/sh\nexit 3\n")

    def build(name: str, file: Path, *more: str) -> subprocess.CompletedProcess[str]:
        words = ("image", "build", name, "--base", "tiny:1", "--user-data", str(file), "--memory", "128")
        return machine.sf(*words, *more, "--format", "json", check=False)

    def story() -> list[Any]:
        late = build("my/bad:1", bad, "--timeout", "3s", "--memory", "144")
        return [late, build("my/built:1", recipe), build("my/built:2", recipe, "--agent")]

    with ThreadPoolExecutor() as pool:
        yield pool.submit(story)


def test_guests_that_resume_at_once_are_each_themselves(machine: Machine) -> None:
    script = f"grep -c boot_id /proc/mounts; hostname; {SELF}"
    with ThreadPoolExecutor() as pool:
        ran = [pool.submit(machine.sf, *TINY, "--", "sh", "-c", script) for _ in range(2)]
    one, other = (each.result().stdout.splitlines() for each in ran)
    assert one.pop(0) == other.pop(0) == "1"  # where boot_id is mounted over, it resumed
    assert len(one) == len(other) == 7 and not set(one) & set(other), (one, other)


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
    place = done.stderr.decode().split("console is kept in ")[1].strip()
    assert "SF-GUEST-READY" in Path(place).read_text()
    gone(machine)


@pytest.mark.timeout(4 * 3600)
def test_rounds_of_true_and_other_ends_leave_nothing_and_have_their_codes(machine: Machine) -> None:
    assert machine.sf("run", "--image", "none:1", "true", check=False).returncode == 3
    twice = machine.sf("image", "warm", *TINY[2:], "--disk", "1G", "--disk", "1G", check=False)
    assert twice.returncode == 2 and "always boot" in twice.stderr
    for wrong in ("/no/such:/x", "/tmp", "/tmp:", ":/x"):
        assert machine.sf(*TINY, "-v", wrong, "true", check=False).returncode == 2
    late = machine.sf(*BOOTS, "--ttl", "1s", "true", check=False)
    assert late.returncode == 3 and "was deleted meanwhile" in late.stderr

    def once(number: int) -> None:
        word, code = (("true", 0), ("no-such-command", 127), ("false", 1))[number % 3]
        assert machine.sf(*TINY, "-q", word, check=False).returncode == code

    def off() -> None:
        done = machine.sf(*TINY, "--", "sh", "-c", "sync; poweroff -f", check=False)
        assert done.returncode not in (0, 7) and "console is kept in" in done.stderr
        assert "SF-GUEST-READY" in done.stderr

    with ThreadPoolExecutor(2) as pool:
        for end in [
            pool.submit(off),
            *(pool.submit(once, n) for n in range(1000 if drills.everything() else 2)),
        ]:
            end.result()
    gone(machine)


def test_a_recipe_becomes_an_image_and_a_second_time_adds_nothing(
    machine: Machine, built: Future[list[Any]]
) -> None:
    late, *both = built.result(400)
    assert late.returncode == 7 and "console is kept in" in late.stderr
    assert [done.returncode for done in both] == [0, 0], both
    first, second = (json.loads(done.stdout) for done in both)
    made = machine.listed("image", "show", "my/built:1")
    assert made["parent"] == machine.listed("image", "show", "tiny:1")["digest"]
    assert made["labels"]["base"] == "tiny:1" and made["labels"]["recipe"].startswith("b3:")
    assert first["new_bytes"] < 1.3 * CHANGED_BYTES and second["new_bytes"] < 2 << 20
    raw = machine.home / "built.raw"
    machine.sf("image", "pull", "my/built:1", "-o", str(raw))
    numbers = subprocess.run(
        ["mtype", "-i", f"{raw}@@{1 << 20}", "::numbers"], check=True, capture_output=True
    )
    assert numbers.stdout.startswith(b"1\n2\n") and len(numbers.stdout) == CHANGED_BYTES
    # What the builders' snapshots were called goes with the builders.
    within(60, lambda: kept(machine) == ["built:1", "built:2"], "no more is kept")
    gone(machine, "build-")


@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_a_command_or_a_server_that_is_killed_at_any_moment_leaves_nothing(
    machine: Machine, built: Future[list[Any]]
) -> None:
    built.result(400)

    def begin(number: int) -> tuple[subprocess.Popen[bytes], str]:
        file = machine.home / f"pid-{number}"
        argv = (
            "sh",
            "-c",
            f'echo $$ >{file}; exec "$@"',
            "sh",
            sys.executable,
            "-c",
            SF,
            *TINY,
            "sleep",
            "300",
        )
        process = subprocess.Popen(machine.argv(*argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        within(20, lambda: file.exists() and file.read_text().strip(), "it has begun")
        return process, file.read_text().strip()

    for number in range(30 if drills.everything() else 1):
        rng = random.Random(drills.seed() + number)
        how = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
        (doomed, pid), (other, _) = begin(2 * number), begin(2 * number + 1)
        time.sleep(rng.uniform(0.5, 8))
        machine.host.run(["kill", f"-{int(how)}", pid])
        said = doomed.communicate(timeout=60)
        assert doomed.returncode in (130, 137, -9), (how, doomed.returncode, said)
        time.sleep(rng.uniform(0, 3))
        machine.signal()
        said = other.communicate(timeout=60)
        assert other.returncode == 8, (other.returncode, said)
        machine.start()
        gone(machine)


@pytest.mark.drill
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not drills.everything(), reason="minutes, in scripts/test --all")
def test_a_build_that_is_killed_at_any_moment_makes_a_whole_image_or_none(
    machine: Machine, built: Future[list[Any]]
) -> None:
    built.result(400)
    made = 0
    for number in range(drills.rounds(20)):
        rng = random.Random(drills.seed() + number)
        what, name = rng.choice(("command", "serve", "imaged", "libvirtd")), f"killed:{number}"
        words = ("image", "build", f"my/{name}", "--base", "tiny:1", "--memory", "128")
        process = subprocess.Popen(
            machine.argv(sys.executable, "-c", SF, *words, "--user-data", str(machine.home / "recipe")),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        time.sleep(rng.uniform(0.5, 25))
        if what == "command":
            machine.host.run(["pkill", "-9", "-f", "image build"], check=False)
        else:
            kill(machine.host, machine, what)
        _, errors = process.communicate(timeout=300)
        gone(machine, "build-")
        within(
            90, lambda: all(":" in one and "build-" not in one for one in kept(machine)), "no snapshot stays"
        )
        assert process.returncode != 0 or name in kept(machine), (what, errors)
        made += name in kept(machine)
        (own,) = (machine.state / "store-namespaces").iterdir()
        store = open_store(str(own))
        assert not verify_store(store, full=True).problems, (number, what)
        store.backend.close()
    print(f"{made} of {drills.rounds(20)} builds ended with an image")
