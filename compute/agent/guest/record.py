"""A guest's record on disk, `instances/<uuid>/record.json`: one flat object in which each part has keys of its own.

A part changes its own values alone; whatever it changes, the whole is written, so the file is true at every moment.
One that is damaged or lost is made anew from what is there (`rebuilt`).
"""

import json
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from ipaddress import IPv4Address
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar, cast

from compute.agent.guest.host import Host
from compute.agent.hypervisor import domain
from compute.errors import ComputeError, Invalid, NotFound, Unavailable
from compute.wire.codec import from_plain, to_plain
from compute.wire.spec import Capture, InstanceSpec
from imagestore import durable
from net import Network, Port

T = TypeVar("T")


class Phase(StrEnum):
    """How far we got; see the drawing in `compute.agent.guest.guest`."""

    NEW = "new"
    STARTING = "starting"
    UP = "up"
    OFF = "off"
    ENDED = "ended"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Course:
    """What the guest's own task knows of it."""

    spec: InstanceSpec
    phase: Phase = Phase.NEW
    created: bool = False
    """It was up (or off as asked) once: later failures are no longer failures of its creation."""
    message: str = ""  # why it ended or failed
    crashed: bool = False
    reboot_soft: int = 0
    reboot_hard: int = 0
    asked_s: float = 0  # when it was asked to end, the last time it was to; 0 if it was not
    leaving: str = ""
    coming: str = ""  # live moves, until the server has said whose the guest is
    vdi_password: str = field(default_factory=lambda: secrets.token_hex(4))


@dataclass(frozen=True, slots=True)
class Tap:
    """A tap that we asked for, written down before it is made. `adopted`: it is in its network, filters first."""

    port: Port
    network_uuid: str
    adopted: bool = False
    network: Network | None = None
    """The network as it was when the tap was adopted, without ports: it outlives a state that knows it no more."""


@dataclass(frozen=True, slots=True)
class TapsHeld:
    taps: tuple[Tap, ...] = ()


@dataclass(frozen=True, slots=True)
class DisksHeld:
    """On what the disks are."""

    served: tuple[str, ...] = ()  # devices that were started on the image service's export
    moving: str = ""  # the device that is being moved to its second overlay: written before the move begins
    moved: tuple[str, ...] = ()  # devices that are on their second overlay
    deferred: tuple[str, ...] = ()  # devices whose move waits for the next stop, said once
    resumes: bool = False
    """As another guest, and it has not become itself yet: its disk holds nothing of its own."""
    arrived: dict[str, dict[str, Any]] = field(default_factory=dict)
    """From where the bytes of each device's image came during the newest boot."""


@dataclass(frozen=True, slots=True)
class CapturesHeld:
    """Snapshots: which may be in qemu, whether the guest may be frozen (written before it is), and how they ended."""

    began: str = ""
    frozen: bool = False
    taken: tuple[Capture, ...] = ()


class Part(Generic[T]):
    """One part's values, `now`; only its owner saves."""

    def __init__(self, now: T, write: Callable[[], Awaitable[None]]) -> None:
        self.now, self._write = now, write

    async def save(self, **changes: Any) -> None:
        """Change values; durable when it returns."""
        self.now = replace(cast(Any, self.now), **changes)
        await self._write()


class Journal:
    """The record of one guest in its directory. `do` runs what is slow in the agent's threads."""

    def __init__(self, directory: Path, do: Callable[..., Awaitable[None]]) -> None:
        self._path, self._do = directory / "record.json", do
        self._parts, self._written, self._writes = list[Part[Any]](), b"", Lock()

    def part(self, initial: T) -> Part[T]:
        """A part with these values where no earlier agent wrote any."""
        made = Part(initial, self._save)
        self._parts.append(made)
        return made

    def load(self) -> bool:
        """Take up what an earlier agent wrote; whether there is something. Raises Invalid for a damaged record."""
        try:
            plain = json.loads(self._path.read_text())
            found = [from_plain(type(part.now), plain) for part in self._parts]
        except FileNotFoundError:
            return False
        except (ValueError, ComputeError) as err:
            raise Invalid(f"{self._path} is damaged: {err}") from err
        for part, now in zip(self._parts, found, strict=True):
            part.now = now
        return True

    async def recover(self, host: Host, uuid: str, spec: InstanceSpec | None, why: str) -> bool:
        """Whether new values for all parts could be made from what is here; without a spec, as its domain has it."""
        xml = ""
        with suppress(NotFound):
            xml = await host.do(host.hypervisor.xml, uuid)
        spec = spec or (domain.spec_of(xml) if xml else None)
        if spec is None or not (values := rebuilt(host.node, self._path.parent, spec, xml, why)):
            return False
        for part, now in zip(self._parts, values, strict=True):
            part.now = now
        await self._save()
        return True

    async def _save(self) -> None:
        """Raises Unavailable: a disk that is full now is no failure of a guest."""
        try:
            await self._do(self._write)
        except OSError as err:
            raise Unavailable(f"{self._path} cannot be written: {err.strerror}") from err

    def _write(self) -> None:
        self._path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        with self._writes:  # who writes last writes what is true now
            whole = {key: value for part in self._parts for key, value in to_plain(part.now).items()}
            if (record := json.dumps(whole).encode()) != self._written:
                durable.write(self._path, record)
                self._written = record


def rebuilt(
    node: str, directory: Path, spec: InstanceSpec, xml: str, why: str
) -> tuple[Course, TapsHeld, DisksHeld, CapturesHeld] | None:
    """The parts of the record of a guest that was made from `spec`; None if not all of its disks are there.

    `xml` is its domain, "" without. That it is up is only assumed: what libvirt says next decides.
    """
    names = {path.name for path in directory.glob("*.qcow2")}
    moved = tuple(d.device for d in spec.disks if f"{d.device}.2.qcow2" in names)
    if xml:
        moved = tuple(d for d in moved if domain.source_of(xml, d).endswith(".2.qcow2"))
    if not all(f"{d.device}{'.2' if d.device in moved else ''}.qcow2" in names for d in spec.disks):
        return None
    live = domain.live_interfaces(xml) if xml else ()
    taps = tuple(
        Tap(Port(i.uuid, i.mac, IPv4Address(i.address), spec.name, node, i.tap), i.network_uuid, adopted=True)
        for i in spec.interfaces
        if i.uuid in live
    )
    if xml and spec.warm and not spec.made and not taps:  # it may not be itself yet
        return None
    course = Course(spec, Phase.UP, True, why, reboot_soft=spec.reboot_soft, reboot_hard=spec.reboot_hard)
    course = replace(course, leaving=spec.leaving)
    captures = CapturesHeld("unknown", frozen=True)
    return course, TapsHeld(taps), DisksHeld(served=domain.served(xml) if xml else (), moved=moved), captures
