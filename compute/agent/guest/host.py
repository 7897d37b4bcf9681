"""What all guests of one agent share, and how they speak through it."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from compute.agent.guest import config_drive
from compute.agent.hypervisor import domain
from compute.agent.hypervisor.accel import Verdict
from compute.agent.hypervisor.libvirt import Hypervisor
from compute.agent.image_service import ServedImages
from compute.agent.turns import Turns
from compute.errors import Unavailable
from compute.wire.spec import Capture, InstanceSpec, InstanceState, InstanceStatus, NodeEvent
from net import Network, Plane

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Host:
    """What the guests of one agent share."""

    node: str
    machine: str  # the node's own id
    installation: str
    directory: Path  # `instances/` of the state directory
    address: IPv4Address  # where VNC and SPICE listen
    hypervisor: Hypervisor
    plane: Plane
    plane_lock: asyncio.Lock
    images: ServedImages
    verdict: Verdict
    pool: ThreadPoolExecutor
    publish: Callable[[InstanceStatus], None]
    note: Callable[[NodeEvent], None]
    shown: Callable[[], None]  # a guest that nobody knows is seen otherwise than before
    leased_s: Callable[[], float] = lambda: 0.0  # since when it may run what others may be given
    turns: Turns = field(default_factory=Turns)

    async def do(self, call: Callable[..., T], *args: Any, **named: Any) -> T:
        """Run something slow and synchronous in the agent's own threads."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, partial(call, *args, **named))

    async def wire(self, call: Callable[..., T], *args: Any) -> T:
        """A change of the data plane: one at a time."""
        async with self.plane_lock:
            return await self.do(call, *args)

    def check_lease(self, spec: InstanceSpec, *, known: bool = True) -> None:
        """Raises Unavailable while another node may have it, as one that nobody knows here."""
        if not known or (spec.leased_s and self.leased_s() == inf):
            raise Unavailable("this node has no lease for it", hint="the server says whose it is")

    def define(
        self,
        spec: InstanceSpec,
        networks: Mapping[str, Network],
        disks: tuple[domain.Disk, ...],
        nics: tuple[domain.Nic, ...],
        password: str,
        *,
        incoming: bool = False,
    ) -> None:
        """Write a guest's config drive and define its domain, both in place of those of its last start."""
        directory, (accel, cpu) = self.directory / spec.uuid, (self.verdict.accel, self.verdict.cpu)
        if spec.config_drive:
            config_drive.write(directory / "config.iso", spec, networks)
        whose, listen = (self.installation, self.machine), str(self.address)
        made = domain.Domain(*whose, spec, directory, accel, cpu, disks, nics, listen, password, incoming)
        self.hypervisor.define(domain.domain_xml(made))


_WAITS_S = 30.0


class Voice:
    """What a guest's owner says of it. `stage` is how far the instance's making got: what an error is an error of."""

    def __init__(self, host: Host, uuid: str) -> None:
        self._host, self._uuid = host, uuid
        self.stage = InstanceState.PREFLIGHT
        self.agent_ready: bool | None = None
        """Whether the agent in the guest answers; None if libvirt must be asked."""
        self.taken: tuple[Capture, ...] = ()
        self.leased_s = 0.0
        self._say_at_s, self._said, self._halted = 0.0, "", ""

    def publish(
        self, stage: InstanceState | None = None, power: str = "off", message: str = "", **more: Any
    ) -> None:
        """The instance is at `stage` now, or still at the last one."""
        self.stage = stage or self.stage
        more |= {"accel": str(self._host.verdict), "agent_state": "ready" if self.agent_ready else ""}
        more |= {"snapshots": self.taken, "leased_s": self.leased_s}
        self._host.publish(InstanceStatus(self._uuid, self.stage, power, message, **more))

    def fail(self, message: str) -> None:
        """What it was at has failed for good."""
        stage = InstanceState(f"{self.stage}-error")
        accel = str(self._host.verdict)
        self._host.publish(InstanceStatus(self._uuid, stage, "off", message, accel=accel))

    def waits(self, err: Exception | None) -> None:
        """What its owner waits for now, None for nothing: what lasts becomes a line of the instance's history."""
        if err is None:
            self._say_at_s, self._said = 0.0, ""
            return
        now = time.monotonic()
        self._say_at_s = self._say_at_s or now + _WAITS_S
        if now >= self._say_at_s and str(err) != self._said:
            self._say_at_s, self._said = now + _WAITS_S, str(err)
            self.event(f"waiting: {err} ({getattr(err, 'hint', '') or 'it is tried again'})")

    def halted(self, reason: str) -> None:
        """Why its processors stand still though nobody asked for it; "" if they do not."""
        if reason != self._halted:
            self.event(f"paused: {reason}" if reason else "it goes on")
            self.publish(power="paused" if reason else "on", message=reason)
        self._halted = reason

    def event(self, message: str, duration_s: float | None = None, **extra: Any) -> None:
        """A line of the instance's history."""
        now = time.time()
        self._host.note(NodeEvent("instance", self._uuid, now, "status", message, duration_s, extra))
