"""Nodes with guests that count are lost in every way, several at once: no two boots of a guest count beside each other.

The guests are played (processes that send datagrams), and so is their network: a word counts if all living nodes have
its sender among their peers, as their filters would; systemd's watchdog, too. Server, links, leases, the killing and
all fences are real. Before each loss every machine's clock, the server's too, is put right, or an hour off (`clock.c`).
"""

import json
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from scripts.private_libvirtd import PrivateHost
from tests.drills import everything, rounds, seed
from tests.system.cluster import WORLD, Cluster
from tests.system.machine import Machine, send, within
from tests.system.three import Three

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.timeout(4 * 3600),
    pytest.mark.skipif(not everything(), reason="a loss takes 32 s: SF_TEST_ALL=1"),
]

NODES = ("n2", "n3", "n4", "n5", "n6")
# With agent and watchdog frozen or killed guests run on: the others' refusal alone keeps them apart.
KINDS = ("cut", "cut and killed", "cut and frozen", "frozen", "watchdog frozen", "watchdog killed", "power")
HOUR_S = 3600


class Losses(Cluster):
    """n1 serves, the others are played nodes; the register hears what guests say, in the world's network."""

    outside = Three.outside

    def __init__(self, stack: ExitStack, directory: Path, **settings: str) -> None:
        self.world = stack.enter_context(PrivateHost(libvirtd=False))
        self.net(self.world, "ip link add br0 type bridge; ip link set br0 up")
        self.net(self.world, f"ip address add {WORLD}/24 dev br0")
        self.nodes, self.agents = {}, dict[str, subprocess.Popen[bytes]]()
        told = {"SF_AGENT_LISTEN": "10.77.0.1:13001", "SF_GUESTS": "no", "SF_NODE_NAME": "n1", **settings}
        told["LD_PRELOAD"] = str(directory / "clock.so")
        source = Path(__file__).with_name("clock.c")
        subprocess.run(["gcc", "-O", "-shared", "-fPIC", "-o", told["LD_PRELOAD"], source], check=True)
        for name in ("n1", *NODES):
            home = directory / name
            home.mkdir()
            told["SF_CLOCK"] = str(home / "clock")
            self.set_clock(home, 0)
            self.nodes[name] = Machine(stack.enter_context(PrivateHost(libvirtd=False)), home, **told)
            self.plug(name)
        self.server = self.nodes["n1"]
        self.server.start()
        stack.callback(self.end)
        for name in NODES:
            (token,) = [self.server.listed("node", "token")]
            self.agent(name, token["url"], token["token"])
        within(90, lambda: len(self.alive()) == len(NODES), "all nodes are there")
        with self.outside():
            self.register = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self.register.bind((WORLD, 8000))
        self.boots: dict[str, list[str]] = defaultdict(list)
        self.refused, self.lost, self.twice = 0, set[str](), list[str]()
        self.ended = threading.Event()
        hearing = threading.Thread(target=self.hear)
        stack.callback(hearing.join, 30)
        stack.callback(self.ended.set)
        hearing.start()

    @staticmethod
    def set_clock(home: Path, ahead_s: int) -> None:
        with (home / "clock").open("r+b" if (home / "clock").exists() else "wb") as file:  # it is mapped
            file.write(ahead_s.to_bytes(8, sys.byteorder, signed=True))

    def agent(self, name: str, url: str = "", token: str = "") -> None:
        machine, pid = self.nodes[name], self.nodes[name].home / "pid"
        pid.unlink(missing_ok=True)
        argv = machine.module("tests.system.played_guests", "watchdog", str(machine.home), name, url, token)
        with (machine.home / "agent.log").open("ab") as log:
            self.agents[name] = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.started(name)

    def started(self, name: str) -> None:
        pid = self.nodes[name].home / "pid"
        within(60, lambda: pid.exists() and pid.read_text(), f"the agent of {name} has started")

    def hear(self) -> None:
        """What guests say, judged as it comes by the filters of the nodes that are not lost."""
        while not self.ended.is_set():
            if select.select([self.register], [], [], 0.2)[0]:
                sender, uuid, boot = self.register.recv(200).decode().split()
                others = [n for n in NODES if n not in self.lost | {sender}]
                if any(sender not in self.peers(other) for other in others):
                    self.refused += 1
                elif self.boots[uuid][-1:] != [boot]:
                    if boot in self.boots[uuid]:
                        self.twice.append(f"{uuid}: {boot} again, on {sender}")
                    self.boots[uuid].append(boot)

    def peers(self, name: str) -> dict[str, str]:
        path = self.nodes[name].home / "peers"
        found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def until(self, seconds: float, true: Any, what: str) -> None:
        """Wait, while nobody counts twice."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not within {seconds} s: {what}\n{self.said()}"
            assert not self.twice, self.twice
            time.sleep(0.3)

    def said(self) -> str:
        logs = (f"{n}: {(self.nodes[n].home / 'agent.log').read_text()[-1500:]}" for n in NODES)
        why = {i["name"]: (i["node"], i["progress"]) for i in self.guests().values()}
        return "\n".join((f"{why}", self.server.sf("node", "ls").stdout, self.server.said(), *logs))

    def guests(self) -> dict[str, dict[str, Any]]:
        return {i["uuid"]: i for i in self.server.listed("instance", "ls")}

    def lose(self, kind: str, name: str) -> None:
        node = self.nodes[name]
        if kind.startswith("cut"):
            self.net(self.world, f"ip link set {name} down")
        if kind == "cut and killed":
            (node.home / "pid").unlink()
            send(signal.SIGKILL, *node.processes("played_guests agent"))
            self.started(name)
        elif kind == "cut and frozen":
            send(signal.SIGSTOP, *node.processes("played_guests agent"))
        elif kind == "frozen":
            send(signal.SIGSTOP, *node.processes())
        elif kind == "watchdog frozen":
            send(signal.SIGSTOP, *node.processes("played_guests"))
        elif kind == "watchdog killed":
            send(signal.SIGKILL, *node.processes("played_guests watchdog"), *node.processes("played_guests"))
            self.agents[name].wait(30)
        elif kind == "power":
            node.host.stop()
            self.agents[name].wait(30)

    def mend(self, kind: str, name: str) -> None:
        if kind.startswith("cut"):
            self.net(self.world, f"ip link set {name} up")
        elif kind == "power":
            self.nodes[name].host.start()
            self.plug(name)
            self.agent(name)
        elif kind == "watchdog killed":
            self.agent(name)
        else:
            send(signal.SIGCONT, *self.nodes[name].processes(), self.agents[name].pid)  # nsenter stops along

    def end(self) -> None:
        for name, agent in self.agents.items():
            send(signal.SIGCONT, agent.pid)  # else nobody reaps what is killed
            self.nodes[name].host.stop()
            agent.wait(30)

    def back(self, name: str) -> bool:
        shown = self.server.listed("node", "show", name)
        return shown["state"] == "created" and not shown["fenced"]

    def create(self, count: int) -> dict[str, str]:
        """So many guests on the nodes in turn, once they count: node by uuid."""
        for number in range(count):
            words = ["--disk", "1G", "--memory", "64", "--on", NODES[number % len(NODES)]]
            self.server.sf("instance", "create", f"g{number}", *words, "--on-node-loss", "restart")
        there = {uuid: str(guest["node"]) for uuid, guest in self.guests().items()}
        self.until(90, lambda: set(self.boots) == there.keys(), "all count")
        return there


@contextmanager
def losses(directory: Path, **settings: str) -> Iterator[Losses]:
    with ExitStack() as stack:
        yield Losses(stack, directory, **settings)


def test_a_node_whose_fence_did_not_confirm_is_never_replaced(tmp_path: Path) -> None:
    command, calls = tmp_path / "fence", tmp_path / "calls"
    command.write_text(f"#!/bin/sh\necho $* >> {calls}\n[ -e {tmp_path}/$2-has-no-power ]\n")
    command.chmod(0o755)
    with losses(tmp_path, SF_FENCE_COMMAND=str(command)) as nodes:
        there = nodes.create(len(NODES))
        kinds = dict(zip(NODES, ("power", "frozen", "watchdog frozen", "cut"), strict=False))
        kept = {uuid: node for uuid, node in there.items() if node in kinds and node != NODES[0]}
        (gone,) = (uuid for uuid, node in there.items() if node == NODES[0])
        before = {uuid: [*boots] for uuid, boots in nodes.boots.items()}
        nodes.lost = set(kinds)
        for victim, kind in kinds.items():
            nodes.lose(kind, victim)
        (tmp_path / f"{NODES[0]}-has-no-power").touch()
        nodes.until(120, lambda: nodes.guests()[gone]["node"] not in kinds, "the one that is off is replaced")
        nodes.until(60, lambda: len(nodes.boots[gone]) == 2, "its guest counts elsewhere")
        asked = lambda: [calls.read_text().splitlines().count(f"off {node}") for node in kept.values()]  # noqa: E731
        nodes.until(120, lambda: min(asked()) > 2, "the others' power is asked for again and again")
        found = nodes.guests()
        assert {uuid: found[uuid]["node"] for uuid in kept} == kept
        assert all("has not confirmed" in found[uuid]["progress"] for uuid in kept)
        assert {u: nodes.boots[u] for u in before if u != gone} == {
            u: b for u, b in before.items() if u != gone
        }
        nodes.lost = set()
        for victim, kind in kinds.items():
            nodes.mend(kind, victim)
        nodes.until(90, lambda: all(map(nodes.back, kinds)), "all are used again")
        nodes.until(60, lambda: all(g["power_state"] == "on" for g in nodes.guests().values()), "all run")
        assert {uuid: g["node"] for uuid, g in nodes.guests().items() if uuid in kept} == kept
        assert not nodes.twice, nodes.twice


def test_no_guest_counts_beside_its_former_self(tmp_path: Path) -> None:
    dice, lost = random.Random(seed()), 0
    with losses(tmp_path) as nodes:
        everyone = nodes.create(8)
        wanted = rounds(50, "SF_LOSSES")
        while lost < wanted:
            there = {u: str(i["node"]) for u, i in nodes.guests().items()}
            full = sorted({*there.values()})  # of those that have guests some or all, and others
            victims = dice.sample(full, dice.randint(1, min(3, len(full))))
            victims += dice.sample(sorted({*NODES} - {*victims}), 3 - len(victims))
            kinds = dict(zip(victims, dice.sample(KINDS, 3), strict=True))
            had = {uuid: node for uuid, node in there.items() if node in kinds}
            before = {uuid: len(nodes.boots[uuid]) for uuid in had}
            nodes.until(
                60, lambda h=had: all(nodes.guests()[u]["power_state"] == "on" for u in h), "they run"
            )
            stay = {u: [*nodes.boots[u]] for u in everyone.keys() - had.keys()}
            clocks = {name: dice.choice((-HOUR_S, 0, HOUR_S)) for name in nodes.nodes}
            for name, ahead_s in clocks.items():
                nodes.set_clock(nodes.nodes[name].home, ahead_s)
            nodes.lost, began = set(kinds), time.monotonic()
            for victim, kind in kinds.items():
                nodes.lose(kind, victim)
            off = {u: n for u, n in had.items() if kinds[n].startswith("cut")}
            given = lambda h=had: all(i["node"] not in kinds for u, i in nodes.guests().items() if u in h)  # noqa: B023, E731
            nodes.until(90, given, f"{kinds}: all are given away")
            gave_s = time.monotonic() - began
            for uuid, victim in off.items():
                assert nodes.nodes[victim].processes(f"-uuid {uuid}") == [], (
                    f"{victim} did not stop {uuid} in time"
                )
            nodes.until(60, lambda b=before: all(len(nodes.boots[u]) > n for u, n in b.items()), "they count")
            off_h = {name: ahead_s // HOUR_S for name, ahead_s in clocks.items() if ahead_s}
            print(
                f"{kinds}, clocks off by hours: {off_h}: {len(had)} guests given after {gave_s:.0f} s,",
                end=" ",
            )
            print(f"count after {time.monotonic() - began:.0f} s")
            nodes.lost = set()
            for victim, kind in kinds.items():
                nodes.mend(kind, victim)
            for victim in victims:
                nodes.until(90, lambda v=victim: nodes.back(v), f"{kinds}: {victim} is used again")
            assert not nodes.twice, nodes.twice
            orphans = {o["uuid"]: o for o in nodes.server.listed("node", "orphans")}
            assert had.keys() <= orphans.keys() and {o["power_state"] for o in orphans.values()} == {"off"}
            for uuid in orphans:
                nodes.server.sf("node", "orphans", "--delete", uuid)
            shown = lambda: [nodes.server.listed("node", "show", v)["given"] for v in victims]  # noqa: B023, E731
            nodes.until(60, lambda s=shown: not any(s()), "nothing is left there")
            assert {u: nodes.boots[u] for u in stay} == stay, "guests of other nodes went on"
            lost += len(kinds)
        print(f"{lost} losses; {nodes.refused} words of lost nodes were refused")
