"""Guests that begin as a warm state of their image are themselves before anyone can reach them, whatever is killed."""

import random
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scripts.private_libvirtd import PrivateHost
from tests import drills
from tests.system.machine import Machine, send, within
from tests.system.reached import Reached
from tests.system.test_agent_drills import remove_everything

# CI has `test_runs` of it.
pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not drills.everything(), reason="scripts/test --all"),
]
RANDOM = "head -c 32 /dev/urandom | md5sum; head -c 32 /dev/random | md5sum"
BEFORE = "md5sum </run/random"  # of what ran before its memory was kept, out of a file that was open then
SELF = f"cat /proc/sys/kernel/random/boot_id /etc/machine-id; md5sum /etc/dropbear/*_key; {BEFORE}; {RANDOM}"
NET = "cat /sys/class/net/eth*/address; until ps -o args | grep -o '[h]ostname:.*'; do sleep 0.1; done"
RESUMED = "it began as a warm state of its image, and is itself by now"


def made(machine: Machine, name: str, *more: str) -> None:
    machine.sf("instance", "create", name, "--image", "tiny:1", "--memory", "160", "--network", "lan", *more)


def says(machine: Machine, name: str, script: str) -> list[str]:
    return machine.sf("instance", "exec", name, "--", "sh", "-c", script).stdout.splitlines()


def events(machine: Machine, name: str) -> list[str]:
    return [event["message"] for event in machine.listed("instance", "events", name)]


def comes_up(machine: Machine, name: str) -> bool:
    """Whether it answers; one that was up when its qemu was killed is started again, as a user would."""
    if machine.instance(name)["power_state"] == "crashed":
        machine.sf("instance", "start", name, check=False)
    return machine.sf("instance", "exec", name, "--", "true", check=False).returncode == 0


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, tiny_image: Path) -> Iterator[Machine]:
    with PrivateHost() as host:
        one = Machine(host, tmp_path_factory.mktemp("warm"), SF_ACCEL="tcg")
        one.sf("image", "push", str(tiny_image), "tiny:1")
        one.start()
        one.sf("network", "create", "lan", "10.42.0.0/24")
        one.sf("image", "warm", "tiny:1", "--memory", "160")
        yield one
        remove_everything(one)
        one.signal()


def test_two_that_resume_have_nothing_in_common(machine: Machine) -> None:
    names = ("one", "two")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: made(machine, name, "--wait", "boot"), names))
        seen = list(pool.map(lambda name: says(machine, name, f"{SELF}; {NET}"), names))
    assert not set(seen[0]) & set(seen[1]) and len(seen[0]) == len(seen[1]) == 8, seen
    lines = [machine.ready_line(name).split() for name in names]
    for name, line in zip(names, lines, strict=True):
        assert RESUMED in events(machine, name)
        shown = machine.instance(name)
        assert line[1:] == [shown["uuid"], name, shown["interfaces"][0]["ipv4"]]
    assert machine.sf("instance", "exec", "one", "--", "ping", "-c1", lines[1][3]).returncode == 0
    for name in names:
        machine.sf("instance", "delete", name)


def test_one_of_another_size_boots_and_what_is_the_users_own_is_there_either_way(machine: Machine) -> None:
    data = machine.home / "data"
    data.write_text("#!/bin/sh\necho it ran on $(hostname) >/run/ran\n")
    made(machine, "same", "--user-data", str(data), "--wait", "boot")
    machine.sf(
        "instance", "create", "other", "--image", "tiny:1", "--memory", "176", "--wait", "boot",
        "--user-data", str(data),
    )  # fmt: skip
    assert RESUMED in events(machine, "same") and RESUMED not in events(machine, "other")
    made(machine, "processor", "--cpu", "Nehalem")
    within(
        30, lambda: "another machine, version, or kind of guest" in str(events(machine, "processor")), "why"
    )
    machine.sf("instance", "delete", "processor")
    for name in ("same", "other"):
        within(20, lambda n=name: says(machine, n, "cat /run/ran") == [f"it ran on {n}"], "it ran")  # type: ignore[misc]
        machine.sf("instance", "delete", name)


def end_something(machine: Machine, name: str, rng: random.Random, longest_s: float) -> str:
    """Kill the server with its agent, the image service, qemu or libvirtd some time after now; which it was."""
    what = rng.choice(["serve", "imaged", "qemu", "libvirtd"])
    threading.Event().wait(rng.uniform(0, longest_s))
    if what == "serve":
        machine.signal(signal.SIGKILL)
        machine.start()
    elif what == "imaged":
        send(signal.SIGKILL, *machine.processes("imagestore.cache.imaged"))
    elif what == "qemu":
        send(signal.SIGKILL, *machine.processes(f"-uuid {machine.instance(name)['uuid']}"))
    else:
        machine.host.kill_libvirtd()
        machine.host.start_libvirtd()
    return what


def test_whatever_is_killed_no_guest_is_reached_before_it_is_itself(machine: Machine) -> None:
    """At any moment of a resume: what comes up in the end is itself, and so was all that was reached meanwhile."""
    seen, names, ends = set[str](), dict[str, str](), list[tuple[str, bool]]()
    with Reached(machine) as reached:
        for number in range(drills.rounds(30, "SF_WARM_KILLS")):
            name = f"k{number}"
            made(machine, name)
            names[machine.instance(name)["interfaces"][0]["macaddr"]] = name
            what = end_something(machine, name, random.Random(drills.seed() + number), 2.5)
            try:
                within(120, lambda n=name: comes_up(machine, n), f"{what}: it is up")  # type: ignore[misc]
            except AssertionError as err:
                raise AssertionError(f"{machine.instance(name)} {events(machine, name)}") from err
            found = says(machine, name, f"hostname; cat /proc/sys/kernel/random/boot_id; {RANDOM}")
            assert found[0] == name and not seen & set(found), (what, found)
            seen |= set(found)
            ends.append((what, RESUMED in events(machine, name)))
            ready = rf"SF-GUEST-READY \S+ {name} "
            within(60, lambda n=name, r=ready: re.search(r, machine.ready_line(n)), "it says so")  # type: ignore[misc]
            machine.sf("instance", "delete", name)
            gone = lambda n=name: machine.sf("instance", "show", n, check=False).returncode  # noqa: E731
            within(60, gone, "it is gone")
    print(f"\n{ends}", flush=True)
    each_itself(reached, names)


def each_itself(reached: Reached, names: dict[str, str]) -> None:
    """Whoever asked for an address was a guest by its name, and no two had the same host key. names: by MAC."""
    asked, answered = reached.said("asks"), reached.said("answers")
    assert asked and answered
    for row in asked:
        assert row["name"] == names[row["mac"]], row
    owners = dict[str, str]()
    for row in answered:
        assert owners.setdefault(row["key"], row["mac"]) == row["mac"], answered
    print(f"\n{len(asked)} asked, {len(answered)} answers with {len(owners)} host keys", flush=True)
