"""A node whose guests are processes that count, with the real link, lease and fence. DIR/peers says whom it speaks to.

python -m tests.system.played_guests agent|watchdog DIR NAME URLS TOKEN

The watchdog is systemd's part in sf-agent.service: WatchdogSec=15 with SIGKILL, Restart=, RestartSec=2.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from compute.agent import link
from compute.agent.memory import Lease, Memory
from compute.errors import ComputeError
from compute.wire.operations import Figures
from compute.wire.spec import InstanceSpec, InstanceState, InstanceStatus, Inventory, NodeFacts, Orphan, Power
from imagestore import durable
from tests.unit.compute.test_remote import Wires

REGISTER = ("10.77.0.254", 8000)
# One boot of a guest: node, uuid and a random number, five times in a second.
GUEST = f"""
import os, socket, sys, time
boot, to = os.urandom(4).hex(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    try:
        to.sendto(f"{{sys.argv[1]}} {{sys.argv[3]}} {{boot}}".encode(), {REGISTER})
    except OSError:
        pass
    time.sleep(0.2)
"""


class Guests:
    """All that were ever here, by the file that a machine would have their disks in."""

    def __init__(self, directory: Path, node: str) -> None:
        self._node, self._had = node, directory / "had"
        self.had = set(self._had.read_text().split()) if self._had.exists() else set[str]()

    def running(self, uuid: str) -> bool:
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"-uuid\0{uuid}".encode() in (path / "cmdline").read_bytes():
                    return True
        return False

    def ensure(self, spec: InstanceSpec, power: Lease) -> None:
        """As `guest.Guest` does: what others may be given starts under a lease alone."""
        if spec.uuid not in self.had:
            self.had.add(spec.uuid)
            durable.write(self._had, " ".join(self.had).encode())
        may = spec.power is Power.ON and (not spec.leased_s or power.firm())
        if may and not self.running(spec.uuid):
            argv = [sys.executable, "-S", "-c", GUEST, self._node, "-uuid", spec.uuid]
            subprocess.Popen(argv, start_new_session=True)

    def orphans(self, wanted: set[str]) -> tuple[Orphan, ...]:
        return tuple(Orphan(u, "on" if self.running(u) else "off") for u in sorted(self.had - wanted))

    async def usage(self) -> dict[str, Figures]:
        return {}

    def forget(self, uuid: str) -> None:
        self.had.discard(uuid)
        durable.write(self._had, " ".join(self.had).encode())


async def play(directory: Path, name: str, urls: str, token: str) -> None:
    identity = link.load(directory) or await link.join(directory, urls, token, name)
    (directory / "pid").write_text(str(os.getpid()))
    plane = Wires()
    plane.power = Lease(directory / "lease")
    controller = link.RemoteController(identity, directory, plane)  # type: ignore[arg-type]
    memory, guests = Memory(directory), Guests(directory, name)
    facts = NodeFacts(cpus=8, memory_mib=8192, address=f"10.77.0.{name[1]}", accel="tcg")

    async def once(revision: int) -> int:
        desired = await controller.desired(name, revision, 1)
        if not memory.follows(desired) or desired.hold:
            return desired.revision
        said = []
        for spec in desired.instances:
            if spec.delete:
                guests.forget(spec.uuid)
                said.append(InstanceStatus(spec.uuid, InstanceState.DELETED))
                continue
            guests.ensure(spec, plane.power)
            state = "on" if guests.running(spec.uuid) else "transition-to-on"
            said.append(InstanceStatus(spec.uuid, InstanceState.CREATED, state, leased_s=spec.leased_s))
        peers = {peer.node: str(peer.address) for peer in desired.networks.peers}
        durable.write(directory / "peers", json.dumps(peers).encode())
        now, orphans = memory.now, guests.orphans({spec.uuid for spec in desired.instances})
        await controller.report(name, said, [])
        seen = Inventory(now.machine, now.epoch, now.reached, orphans, desired.fence)
        await controller.inventory(name, seen)
        return desired.revision

    async def acting() -> None:
        revision = 0
        await controller.register(name, facts, guests)  # type: ignore[arg-type]
        while True:
            with suppress(ComputeError, OSError):
                revision = await once(revision)
            await asyncio.sleep(0.2)

    async with asyncio.TaskGroup() as group:
        group.create_task(controller.run())
        group.create_task(acting())


def watch(words: list[str]) -> None:
    """Start the agent, and another one whenever it has ended or has said nothing for 15 s."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(address := f"\0sf-played-{os.getpid()}-{words[0]}")
        heard.settimeout(0.1)
        told = os.environ | {"NOTIFY_SOCKET": address.replace("\0", "@")}
        while True:
            agent = subprocess.Popen([sys.executable, "-m", __spec__.name, "agent", *words], env=told)
            said = time.monotonic()
            while agent.poll() is None:
                with suppress(TimeoutError):
                    heard.recv(100)
                    said = time.monotonic()
                if time.monotonic() > said + 15:
                    agent.kill()
            time.sleep(2)


if __name__ == "__main__":
    if sys.argv[1] == "watchdog":
        watch(sys.argv[2:])
    asyncio.run(play(Path(sys.argv[2]), *sys.argv[3:]))
