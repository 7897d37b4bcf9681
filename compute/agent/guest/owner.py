"""What belongs to one instance on this node, and what all of them share: the record on disk above all."""

import asyncio
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from compute.agent.guest.host import Host
from compute.wire.codec import from_plain, to_plain
from compute.wire.spec import InstanceSpec, NodeEvent
from imagestore import durable
from net import Network, Port


class Phase(StrEnum):
    """How far we got; see the drawing in `compute.agent.guest.guest`."""

    NEW = "new"
    STARTING = "starting"
    UP = "up"
    OFF = "off"
    ENDED = "ended"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Tap:
    """A tap that we asked for, written down before it is made. `adopted`: it is in its network, filters first."""

    port: Port
    network_uuid: str
    adopted: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """What must survive the agent: `instances/<uuid>/record.json`."""

    spec: InstanceSpec
    phase: Phase = Phase.NEW
    created: bool = False
    """It was up (or off as asked) once: later failures are no longer failures of its creation."""
    message: str = ""
    """Why it ended or failed."""
    crashed: bool = False
    reboot_soft: int = 0
    reboot_hard: int = 0
    taps: tuple[Tap, ...] = ()
    served: tuple[str, ...] = ()
    """Devices that were started on the image service's export."""
    moving: str = ""
    """The device that is being moved to its second overlay: written before the move begins."""
    moved: tuple[str, ...] = ()
    """Devices that are on their second overlay."""
    deferred: tuple[str, ...] = ()
    """Devices whose move waits for the next stop, said once."""
    arrived: dict[str, dict[str, Any]] = field(default_factory=dict)
    """From where the bytes of each device's image came during the newest boot."""
    vdi_password: str = field(default_factory=lambda: secrets.token_hex(4))


class Owner:
    """The state that the parts of an instance's owner work on; only its one task changes the record."""

    def __init__(self, host: Host, spec: InstanceSpec) -> None:
        self.host, self.spec = host, spec
        self.leaving = asyncio.Event()
        """It is to be deleted: nothing more needs to be waited for."""
        self.directory = host.directory / spec.uuid
        self.networks: Mapping[str, Network] = {}
        self.record = Record(spec, reboot_soft=spec.reboot_soft, reboot_hard=spec.reboot_hard)

    def load(self) -> None:
        """Take up what an earlier agent wrote, if there is something."""
        try:
            plain = json.loads((self.directory / "record.json").read_text())
        except FileNotFoundError:
            return
        self.record = from_plain(Record, plain)

    def _write(self) -> None:
        self.directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        durable.write(self.directory / "record.json", json.dumps(to_plain(self.record)).encode())

    async def save(self, **changes: Any) -> None:
        """Change the record; durable when it returns."""
        self.record = replace(self.record, **changes)
        await self.host.do(self._write)

    def event(self, message: str, duration_s: float | None = None, **extra: Any) -> None:
        """A line of the instance's history."""
        self.host.note(
            NodeEvent("instance", self.spec.uuid, time.time(), "status", message, duration_s, extra)
        )
