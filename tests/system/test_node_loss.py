"""Nodes with a guest that counts over the network are lost in every way: its boots never count beside each other.

Three machines in namespaces, with real libvirtd, qemu, filters and fences; n1 is the server. The guest tells a register
in the world, once in a second, which boot of it this is: another boot's first word is the last of the former ones'.
"""

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.drills import everything, rounds, seed
from tests.system.cluster import WORLD, Cluster
from tests.system.machine import send, within

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.timeout(4 * 3600),
    pytest.mark.skipif(not everything(), reason="a loss takes a minute: SF_TEST_ALL=1"),
]

KINDS = ("cut", "cut and killed", "frozen", "agent frozen", "power")
# By what becomes of them once their node is lost.
GUESTS = {
    "web": "restart",
    "api": "restart",
    "jobs": "restart",
    "saved": "restore",
    "keeps": "leave",
    "rests": "leave",
}
MOVED = [name for name, how in GUESTS.items() if how != "leave"]
NAMES = (*GUESTS, "one")
# Which guest a ping is from says its size, which boot of it that and its TTL: busybox has no other client that is small
# and safe.
COUNTS = f"""#!/bin/sh
case $(hostname) in {" ".join(f"{name}) first={100 + 180 * n};;" for n, name in enumerate(NAMES))} esac
size=$((first + $(od -An -N2 -tu2 /dev/urandom) % 180))
ttl=$((70 + $(od -An -N2 -tu2 /dev/urandom) % 180))
while true; do ping -q -c 1 -W 1 -s $size -t $ttl {WORLD}; sleep 1; done >/dev/null 2>&1
"""
REGISTER = """
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as heard:
    while True:
        packet = heard.recv(4096)
        if packet[20] == 8:
            print(time.time(), f"{len(packet) - 28}.{packet[8]}", flush=True)
"""


class Lossy:
    """The machines, the register, and what is done to a machine."""

    def __init__(self, stack: ExitStack, directory: Path, image: Path) -> None:
        self.cluster = Cluster(stack, directory, image)
        self.server = self.cluster.server
        stack.callback(self.end)
        self.counted = directory / "counted"
        with self.counted.open("wb") as out:
            argv = ["python3", "-c", REGISTER]
            register = self.cluster.world.popen(argv, stdout=out, stderr=subprocess.DEVNULL)
        stack.callback(register.wait, 30)
        stack.callback(register.kill)
        self.script = directory / "counts"
        self.script.write_text(COUNTS)
        free = self.server.listed("node", "show", "n1")["memory"] - 512
        self.server.sf("network", "create", "lan", "10.42.0.0/24")
        # Losses hit n2 and n3: n1 has no room. Its claims are those of a guest that is off.
        self.server.sf(
            "instance", "create", "filler", "--disk", "1G", "--memory", str(free - 64), "--on", "n1"
        )
        within(60, lambda: self.server.instance("filler")["state"] == "created", "the filler is there")
        self.server.sf("instance", "stop", "filler")

    def create(self, name: str, node: str, *words: str) -> None:
        what = ["--image", "tiny:1", "--network", "lan", "--memory", "128", "--on", node]
        self.server.sf("instance", "create", name, *what, "--user-data", str(self.script), *words)

    def boots(self, name: str) -> list[str]:
        """The boots that counted, each where it did so first; one that counted beside another fails."""
        found: list[str] = []
        for line in self.counted.read_text().splitlines():
            at, boot = line.split()
            if (int(boot.partition(".")[0]) - 100) // 180 == NAMES.index(name) and found[-1:] != [boot]:
                assert boot not in found, f"{boot} counted at {at}, after {found[-1]}"
                found.append(boot)
        return found

    def node(self, name: str) -> str:
        return str(self.server.instance(name)["node"])

    def lose(self, kind: str, name: str) -> None:
        node = self.cluster.nodes[name]
        if kind.startswith("cut"):
            self.cluster.net(self.cluster.world, f"ip link set {name} down")
        if kind == "cut and killed":
            node.signal()
            node.start("agent")
        elif kind == "frozen":
            send(signal.SIGSTOP, *node.processes())
        elif kind == "agent frozen":
            send(signal.SIGSTOP, *node.processes("bin/sf agent"))
        elif kind == "power":
            node.host.stop()

    def mend(self, kind: str, name: str) -> None:
        node = self.cluster.nodes[name]
        if kind.startswith("cut"):
            self.cluster.net(self.cluster.world, f"ip link set {name} up")
        elif kind == "power":
            node.host.start()
            self.cluster.plug(name)
            node.start("agent")
        else:
            assert node.server is not None
            send(signal.SIGCONT, *node.processes(), node.server.pid)  # nsenter stops along

    def end(self) -> None:
        """Those that stand still go on: else nobody reaps what is killed."""
        for node in self.cluster.nodes.values():
            if node.server is not None and (node.host.directory / "pid").exists():
                send(signal.SIGCONT, *node.processes(), node.server.pid)

    def route_elsewhere(self, name: str) -> None:
        """What a frozen agent's own router sends out nobody can refuse; the howto says so."""
        if self.cluster.router() == name:
            self.server.sf("node", "drain", name)
            self.server.sf("node", "drain", name, "--undo")
        within(60, lambda: self.cluster.gateways() == [self.cluster.router()], "one node routes")
        assert self.cluster.router() != name

    def back(self, name: str) -> bool:
        shown = self.server.listed("node", "show", name)
        return shown["state"] == "created" and not shown["fenced"]

    def said(self) -> str:
        return "\n".join(f"{n}: {node.said()}" for n, node in self.cluster.nodes.items())


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory, tiny_image: Path) -> Iterator[Lossy]:
    with ExitStack() as stack:
        yield Lossy(stack, tmp_path_factory.mktemp("loss"), tiny_image)


def counts(lossy: Lossy, name: str, more_than: int) -> None:
    ready = ("instance", "console", name)
    within(300, lambda: "SF-GUEST-READY" in lossy.server.sf(*ready, check=False).stdout, f"{name} is ready")
    within(300, lambda: len(lossy.boots(name)) > more_than, f"{name} counts")


def test_a_node_with_six_guests_is_lost_and_comes_back(lossy: Lossy) -> None:
    for name, how in GUESTS.items():
        lossy.create(name, "n2", "--on-node-loss", how)
    for name in GUESTS:
        counts(lossy, name, 0)
    kept = {name: lossy.boots(name) for name in GUESTS.keys() - MOVED}
    lossy.server.sf("backup", "set", "saved", "--every", "1h", "--keep-daily", "1")
    made = lambda: lossy.server.listed("instance", "snapshots", "saved")  # noqa: E731
    within(120, lambda: any(s["state"] == "created" for s in made()), "saved is backed up")
    shown = lambda: {i["name"]: i for i in lossy.server.listed("instance", "ls") if i["name"] in GUESTS}  # noqa: E731
    lossy.lose("cut", "n2")
    began, runs_s = time.monotonic(), dict[str, float]()

    def run() -> bool:
        for name, one in shown().items():
            if (one["node"], one["power_state"]) == ("n3", "on"):
                runs_s.setdefault(name, time.monotonic() - began)
        return len(runs_s) == len(MOVED)

    within(180, run, f"they run on n3\n{lossy.said()}")
    print("vCPUs run, seconds after the loss:", {name: round(s) for name, s in runs_s.items()})
    assert sorted(runs_s) == sorted(MOVED)
    for name in MOVED:
        counts(lossy, name, 1)
    for name in kept:
        assert "stays there" in lossy.server.instance(name)["progress"]
        assert lossy.node(name) == "n2"
    events = [e["message"] for e in lossy.server.listed("instance", "events", "saved")]
    assert any("n2 is lost" in line for line in events), events
    lossy.mend("cut", "n2")
    within(90, lambda: lossy.back("n2"), "n2 is used again")
    orphans = {o["uuid"]: o["power_state"] for o in lossy.server.listed("node", "orphans")}
    assert orphans == {lossy.server.instance(n)["uuid"]: "off" for n in MOVED}
    for name in kept:
        within(90, lambda n=name: not lossy.server.instance(n)["progress"], f"{name} is heard of")  # type: ignore[misc]
        assert lossy.boots(name) == kept[name], "it was never off"
    for name in MOVED:
        lossy.boots(name)
    for uuid in orphans:
        lossy.server.sf("node", "orphans", "--delete", uuid)
    within(60, lambda: lossy.server.listed("node", "orphans") == [], "the old copies are gone")
    lossy.server.sf("instance", "delete", *GUESTS, "--wait")


def test_a_guest_never_counts_twice_through_many_losses(lossy: Lossy) -> None:
    dice = random.Random(seed())
    lossy.create("one", "n2", "--on-node-loss", "restart")
    counts(lossy, "one", 0)
    uuid = lossy.server.instance("one")["uuid"]
    for number in range(rounds(50, "SF_LOSSES")):
        kind, victim = (*KINDS, *KINDS)[number % 5] if number < 5 else dice.choice(KINDS), lossy.node("one")
        within(90, lambda: lossy.server.instance("one")["power_state"] == "on", "it runs")
        if kind in ("frozen", "agent frozen"):
            lossy.route_elsewhere(victim)
        before, began = len(lossy.boots("one")), time.monotonic()
        lossy.lose(kind, victim)
        within(120, lambda v=victim: lossy.node("one") != v, f"{kind}: it is given away\n{lossy.said()}")  # type: ignore[misc]
        gave_s = time.monotonic() - began
        counts(lossy, "one", before)
        print(
            f"{number} {kind} of {victim}: given after {gave_s:.0f} s, counts after {time.monotonic() - began:.0f} s"
        )
        lossy.mend(kind, victim)
        within(120, lambda v=victim: lossy.back(v), f"{kind}: {victim} is used again\n{lossy.said()}")  # type: ignore[misc]
        lossy.boots("one")
        assert lossy.cluster.nodes[victim].processes(uuid) == [], "the old copy is off"
        (old,) = lossy.server.listed("node", "orphans")
        assert (old["uuid"], old["node"], old["power_state"]) == (uuid, victim, "off")
        lossy.server.sf("node", "orphans", "--delete", uuid)
        within(
            90, lambda v=victim: not lossy.server.listed("node", "show", v)["given"], "nothing is left there"
        )  # type: ignore[misc]
    lossy.boots("one")
