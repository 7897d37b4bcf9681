"""What all guests of one agent share, what they need of its data plane and images, and how they speak through it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Protocol, TypeVar

from compute.agent.guest.turns import Turns
from compute.agent.hypervisor.accel import Verdict
from compute.agent.hypervisor.libvirt import Hypervisor
from compute.wire.spec import Capture, InstanceState, InstanceStatus, NodeEvent
from net import Action, Finding, Network, NodeNetworks, Port

T = TypeVar("T")


class Plane(Protocol):
    """What guests need of this node's data plane; `net.plane.Plane` in the product."""

    def apply(self, desired: NodeNetworks) -> Sequence[Action]: ...

    def create_tap(self, port: Port) -> str: ...

    def adopt_tap(self, network: Network, port: Port) -> object: ...

    def remove_tap(self, port: Port) -> object: ...

    def namespace(self, network: Network) -> str: ...

    def doctor(self, desired: NodeNetworks) -> Sequence[Finding]: ...


@dataclass(frozen=True, slots=True)
class Backing:
    """What an overlay stands on: a raw file, complete now, or (with an NBD socket) one day."""

    path: Path
    size_bytes: int
    socket: Path | None = None


class Images(Protocol):
    """What guests need of this node's images. `reader` names the disk that reads one."""

    async def backing(self, reader: str, digest: str) -> Backing:
        """What a guest that is about to start reads its image from. Raises imagestore's errors, Unavailable."""
        ...

    def complete(self, digest: str) -> Path | None:
        """The complete raw file of an image, if it is here."""
        ...

    def own_store(self, namespace: str) -> str:
        """The URL of a namespace's own store. Raises Unavailable before it is known here."""
        ...

    async def settled(self, reader: str) -> None:
        """The guest reads the raw file itself now."""
        ...

    async def gone(self, reader: str) -> None:
        """The guest's disk is deleted."""
        ...

    async def booted(self, reader: str) -> None:
        """The guest is up: its boot trace is complete."""
        ...

    async def figures(self, reader: str) -> dict[str, Any]:
        """From where the bytes of its image came; {} where nobody knows."""
        ...


@dataclass(frozen=True, slots=True)
class Host:
    """What the guests of one agent share."""

    node: str
    machine: str
    """The node's own id."""
    installation: str
    directory: Path
    """`instances/` of the state directory."""
    address: IPv4Address
    """Where VNC and SPICE listen."""
    hypervisor: Hypervisor
    plane: Plane
    plane_lock: asyncio.Lock
    images: Images
    verdict: Verdict
    pool: ThreadPoolExecutor
    publish: Callable[[InstanceStatus], None]
    note: Callable[[NodeEvent], None]
    shown: Callable[[], None]
    """A guest that nobody knows is seen otherwise than before."""
    turns: Turns = field(default_factory=Turns)

    async def do(self, call: Callable[..., T], *args: Any, **named: Any) -> T:
        """Run something slow and synchronous in the agent's own threads."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, partial(call, *args, **named))

    async def wire(self, call: Callable[..., T], *args: Any) -> T:
        """A change of the data plane: one at a time."""
        async with self.plane_lock:
            return await self.do(call, *args)


_WAITS_S = 30.0


class Voice:
    """What a guest's owner says of it. `stage` is how far the instance's making got: what an error is an error of."""

    def __init__(self, host: Host, uuid: str) -> None:
        self._host, self._uuid = host, uuid
        self.stage = InstanceState.PREFLIGHT
        self.agent_ready: bool | None = None
        """Whether the agent in the guest answers; None if libvirt must be asked."""
        self.taken: tuple[Capture, ...] = ()
        self._say_at_s, self._said, self._halted = 0.0, "", ""

    def publish(
        self, stage: InstanceState | None = None, power: str = "off", message: str = "", **more: Any
    ) -> None:
        """The instance is at `stage` now, or still at the last one."""
        self.stage = stage or self.stage
        more |= {"accel": str(self._host.verdict), "agent_state": "ready" if self.agent_ready else ""}
        more["snapshots"] = self.taken
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
