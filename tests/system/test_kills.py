"""kill -9 of every program of two machines while three users work: nothing leaks, nothing is lost, nobody is stuck."""

import contextlib
import json
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import drills
from tests.system.boot_sector import boot_sector
from tests.system.cluster import Cluster
from tests.system.machine import within
from tests.system.user import SETTLED

pytestmark = [pytest.mark.system, pytest.mark.drill, pytest.mark.timeout(7200)]

KINDS = {
    "serve": ("n1", r"bin/sf serve"),
    "agent": ("n2", r"bin/sf agent"),
    "imaged": ("n1 n2", r"imagestore\.cache\.imaged"),
    "libvirtd": ("n1 n2", r"^libvirtd"),
    "qemu": ("n1 n2", r"^/usr/bin/qemu-system"),
    "dnsmasq": ("n1 n2", r"^(/usr/sbin/)?dnsmasq"),
}
"""Which machines have it, and how its command line begins or what is in it."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "sector.raw").write_bytes(boot_sector("HELLO\r\n"))
    with ExitStack() as stack:
        made = Cluster(
            stack, tmp_path, tmp_path / "sector.raw", ("n1", "n2"), SF_UPLINK="", SF_FLOATING_POOL=""
        )
        made.server.sf("image", "tag", "tiny:1", "sector:1")
        made.server.sf("network", "create", "lan", "10.42.0.0/24")
        yield made


def pids(cluster: Cluster, node: str, pattern: str) -> list[str]:
    return cluster.nodes[node].host.run(["pgrep", "-f", pattern], check=False).stdout.split()


def kill(cluster: Cluster, kind: str, rng: random.Random) -> bool:
    """Kill one of a kind, and start again what a service manager would. Whether there was one."""
    nodes, pattern = KINDS[kind]
    found = [(node, pid) for node in nodes.split() for pid in pids(cluster, node, pattern)]
    if not found:
        return False
    node, pid = rng.choice(found)
    machine = cluster.nodes[node]
    if kind == "libvirtd":
        # A killed libvirtd 9.0 can leave a guest locked for good (see `free`): CI stops it as an upgrade does.
        machine.host.kill_libvirtd(signal.SIGKILL if drills.everything() else signal.SIGTERM)
        time.sleep(rng.uniform(0, 2))
        machine.host.start_libvirtd()
    elif kind in ("serve", "agent"):
        machine.signal()
        time.sleep(rng.uniform(0, 2))
        machine.start(*(["agent"] if kind == "agent" else []))
    else:
        machine.host.run(["kill", "-9", pid], check=False)
    return True


def free(cluster: Cluster, events: str) -> None:
    """Do on each node what an instance's events say where a killed libvirtd has left its lock."""
    found = re.search(r"remove (/run/libvirt/qemu/sf-\S+\.xml), start libvirtd", " ".join(events.split()))
    assert found is not None, events
    for machine in cluster.nodes.values():
        machine.host.kill_libvirtd()
        machine.host.run(["rm", "-f", found[1]])
        machine.host.start_libvirtd()


def traces(cluster: Cluster, node: str) -> list[str]:
    """What is left on a machine, less the firewall that the cluster gave it."""
    return [trace for trace in cluster.nodes[node].traces() if trace != "table ip filter"]


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def under_way(logs: list[Path]) -> bool:
    """Whether any user has begun what is not ended."""
    return any(said and said[-1]["phase"] == "begin" for said in map(lines, logs))


def test_nothing_leaks_is_lost_or_stuck_through_kills_of_everything_under_three_users(
    cluster: Cluster, tmp_path: Path
) -> None:
    rng = random.Random(drills.seed())
    stop = tmp_path / "stop"
    logs = [tmp_path / f"user{number}.log" for number in range(3)]
    users = []
    for number, log in enumerate(logs):
        words = (f"u{number}", str(cluster.server.state), str(log), str(stop), str(drills.seed() + number))
        command = cluster.server.module("tests.system.user", *words)
        with (tmp_path / f"user{number}.err").open("wb") as err:
            users.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=err, stderr=err))
    hit, killed = Counter[str](), Counter[str]()
    try:
        order = [kind for kind in KINDS for _ in range(drills.rounds(full=50))]
        rng.shuffle(order)
        for kind in order:
            time.sleep(rng.uniform(0.2, 2.5))
            busy = under_way(logs)
            if kill(cluster, kind, rng):
                killed[kind] += 1
                hit[kind] += busy
    finally:
        stop.touch()
        for user in users:
            with contextlib.suppress(subprocess.TimeoutExpired):
                user.wait(200)
            if user.poll() is None:
                user.kill()
                user.wait()
    print(f"kills {dict(killed)}, while an operation was under way {dict(hit)}")
    said = [lines(log) for log in logs]
    late = [line for user in said for line in user if str(line.get("result", "")).startswith("late")]
    print(f"{len(late)} operations took over two minutes between kills, of {sum(map(len, said)) // 2}")
    for user, log in zip(said, logs, strict=True):
        assert user[-1]["phase"] == "over", log.with_suffix(".err").read_text()[-2000:]

    # Lost: whatever was answered for is there, and each image that was pushed reads whole.
    server = cluster.server

    def unsettled() -> list[str]:
        return [one["name"] for one in server.listed("instance", "ls") if one["state"] not in SETTLED]

    with contextlib.suppress(AssertionError):
        within(120, lambda: not unsettled(), "every operation has ended")
    locked = unsettled()
    print(f"{len(locked)} guests whose lock a killed libvirtd left behind: {locked}")
    for name in locked:
        free(cluster, server.sf("instance", "events", name, "--format", "json").stdout)
    within(120, lambda: not unsettled(), "every operation has ended, now that nothing is killed any more")
    there = {one["uuid"]: one for one in server.listed("instance", "ls")}
    for user in said:
        for name, uuid in user[-1]["have"].items():
            if uuid in user[-1]["doubtful"] and uuid not in there:
                continue
            assert uuid in there, f"{name} was answered for and is gone"
            assert there[uuid]["state"] in SETTLED, there[uuid]
    server.sf("store", "verify", "--full")
    for name in [name for user in said for name in user[-1]["pushed"]]:
        server.sf("image", "show", name)

    # Stuck: both machines still make guests and networks.
    within(60, lambda: len(cluster.alive()) == 2, "both nodes are there")
    for node in cluster.nodes:
        words = ["--image", "sector:1", "--network", "lan", "--memory", "64", "--on", node]
        server.sf("instance", "create", f"after-{node}", *words)
        within(
            90, lambda n=node: server.instance(f"after-{n}")["power_state"] == "on", f"a guest runs on {node}"
        )  # type: ignore[misc]

    # Leaked: when all is deleted, nothing of it is to be seen on either machine.
    for one in server.listed("instance", "ls"):
        server.sf("instance", "delete", one["uuid"])
    within(180, lambda: not server.listed("instance", "ls"), "all guests are gone")
    for one in server.listed("network", "ls"):
        server.sf("network", "delete", one["uuid"])
    for name in cluster.nodes:
        with contextlib.suppress(AssertionError):
            within(60, lambda n=name: not traces(cluster, n), "no trace")  # type: ignore[misc]
        assert traces(cluster, name) == []
