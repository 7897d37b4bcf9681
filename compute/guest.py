"""One instance on this node: a record on disk, and one task that owns everything of it.

The task compares what the server wants (`InstanceSpec`), what it did so far (`Record`) and what libvirt says, does the
next step and looks again. Each step may be repeated, and the record is written before a step that could not otherwise
be told from one never begun; so after kill -9 at any moment the next agent goes on or cleans up.

    new ──disks made──▶ starting ──CPUs run──▶ up ──ended by itself──▶ ended
     │                   ▲    │                 │                       │
     └─▶ failed ◀────────┼────┘ (first start)   └──power off──▶ off ◀───┘
                         └──── power on, hard reboot, the node rebooted ┘
"""

import asyncio
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Protocol, TypeVar

from compute import config_drive, domain, overlay
from compute.accel import Verdict
from compute.codec import from_plain, to_plain
from compute.console import ConsoleLog
from compute.errors import ComputeError, Conflict, NotFound, Unavailable
from compute.image_jobs import Backing, ImageJobs
from compute.libvirt_adapter import DomainState, Hypervisor
from compute.spec import (
    DiskSpec,
    InstanceSpec,
    InstanceState,
    InstanceStatus,
    InterfaceSpec,
    NodeEvent,
    Power,
)
from imagestore.errors import StoreError
from net.doctor import Finding
from net.errors import NetError
from net.model import Network, NodeNetworks, Port

T = TypeVar("T")

_RETRY_S = 1.0
_MOVE_BYTES = 256 << 20
"""A disk is moved while its guest runs only if its overlay holds less: the move copies it."""
_RECONNECT_S = 3600
"""For how long a guest waits for an image service that is away."""


class Plane(Protocol):
    """What guests need of this node's data plane; `net.plane.Plane` in the product."""

    def apply(self, desired: NodeNetworks) -> object: ...

    def create_tap(self, port: Port) -> str: ...

    def adopt_tap(self, network: Network, port: Port) -> object: ...

    def remove_tap(self, port: Port) -> object: ...

    def namespace(self, network: Network) -> str: ...

    def doctor(self, desired: NodeNetworks) -> Sequence[Finding]: ...


class Phase(StrEnum):
    """How far we got; see the module's drawing."""

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


@dataclass(frozen=True, slots=True)
class Host:
    """What the guests of one agent share."""

    node: str
    installation: str
    directory: Path
    """`instances/` of the state directory."""
    address: IPv4Address
    """Where VNC and SPICE listen."""
    hypervisor: Hypervisor
    plane: Plane
    plane_lock: asyncio.Lock
    images: ImageJobs
    verdict: Verdict
    pool: ThreadPoolExecutor
    publish: Callable[[InstanceStatus], None]
    note: Callable[[NodeEvent], None]

    async def do(self, call: Callable[..., T], *args: Any, **named: Any) -> T:
        """Run something slow and synchronous in the agent's own threads."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, partial(call, *args, **named))


class Guest:
    """The owner of one instance. `update` and `wake` may be called at any time, `run` is its task."""

    def __init__(self, host: Host, spec: InstanceSpec) -> None:
        self.host = host
        self.spec = spec
        self.directory = host.directory / spec.uuid
        self.console = ConsoleLog(self.directory / "console.log")
        self.gone = False
        """Nothing of it is left."""
        self._networks: Mapping[str, Network] = {}
        self._wake = asyncio.Event()
        self._leaving = asyncio.Event()
        self._agent_ready: bool | None = None
        self._record = Record(spec, reboot_soft=spec.reboot_soft, reboot_hard=spec.reboot_hard)
        self._stage = InstanceState.PREFLIGHT

    def update(self, spec: InstanceSpec, networks: Mapping[str, Network]) -> None:
        """New desired state."""
        changed = spec != self.spec
        self.spec, self._networks = spec, networks
        if spec.delete:
            self._leaving.set()
        if changed:
            self._wake.set()

    def wake(self, what: str = "") -> None:
        """Something happened: look again. `what` as libvirt_adapter notifies it."""
        if what.startswith("agent "):
            self._agent_ready = what == "agent ready"
        self._wake.set()

    async def run(self) -> None:
        """Own the instance until nothing of it is left, or until cancelled (the guest runs on)."""
        await self.host.do(self._load)
        self._wake.set()
        while not self.gone:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._settle()
            except Unavailable:
                # libvirtd is away. Guests live on; the agent wakes everybody after it has connected again.
                asyncio.get_running_loop().call_later(_RETRY_S, self._wake.set)
            except (ComputeError, StoreError, NetError, OSError) as err:
                await self._failed(err)

    # The record

    def _load(self) -> None:
        try:
            plain = json.loads((self.directory / "record.json").read_text())
        except FileNotFoundError:
            return
        self._record = from_plain(Record, plain)

    def _write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        half = self.directory / "record.new"
        with half.open("w") as file:
            json.dump(to_plain(self._record), file)
            file.flush()
            os.fsync(file.fileno())
        half.rename(self.directory / "record.json")
        overlay.sync_directory(self.directory)

    async def _save(self, **changes: Any) -> None:
        self._record = replace(self._record, **changes)
        await self.host.do(self._write)

    # Deciding

    async def _settle(self) -> None:
        spec = self.spec
        if spec.delete:
            await self._delete()
            return
        if self._record.phase is Phase.FAILED or spec.failed:
            self._publish(self._stage_error(), DomainState("off"), self._record.message)
            return
        if self._record.phase is Phase.NEW and not await self._prepare():
            return
        unpaused = self._record.spec.power is Power.PAUSED and spec.power is Power.ON
        if spec != self._record.spec:
            await self._save(spec=spec)
        if spec.reboot_hard > self._record.reboot_hard:
            await self._save(phase=Phase.STARTING, reboot_hard=spec.reboot_hard, reboot_soft=spec.reboot_soft)
        if self._record.moving:
            await self._end_move()
        state = await self._observe()
        if spec.power is Power.OFF:
            if state.power != "off" or self._record.phase is not Phase.OFF:
                await self._power_off()
        elif self._record.phase in (Phase.STARTING, Phase.OFF):
            await self._power_on()
        elif self._record.phase is Phase.UP:
            await self._keep(state if not unpaused else replace(state, reason=""))
        await self._report()

    async def _observe(self) -> DomainState:
        """What libvirt says; a guest that was up and is off by itself is noted as ended."""
        state = await self.host.do(self.host.hypervisor.state, self.spec.uuid)
        if state.power == "off" and self._record.phase is Phase.UP:
            if state.ended == "unknown":  # libvirtd knows nothing of its end: the machine was rebooted
                await self._save(phase=Phase.STARTING)
            elif state.ended == "halted":
                await self._end("the guest powered itself off", crashed=False)
            elif state.ended == "destroyed":
                await self._end("somebody else stopped the guest", crashed=False)
            else:
                name = domain.name(self.host.installation, self.spec.uuid)
                await self._end(
                    f"qemu was killed or crashed; see /var/log/libvirt/qemu/{name}.log", crashed=True
                )
        return state

    async def _end(self, why: str, *, crashed: bool) -> None:
        await self._save(phase=Phase.ENDED, message=why, crashed=crashed)
        await self._remove_taps()
        self._event(why)

    async def _keep(self, state: DomainState) -> None:
        """A guest that is up: reboot, pause, resume, plug."""
        hypervisor, uuid = self.host.hypervisor, self.spec.uuid
        if self.spec.reboot_soft > self._record.reboot_soft:
            await self._save(reboot_soft=self.spec.reboot_soft)
            await self.host.do(hypervisor.reboot, uuid)
            self._event("asked the guest to reboot")
        await self._plug()
        for device in self._record.served:
            await self._move(device)
        if self.spec.power is Power.PAUSED and state.power == "on":
            await self.host.do(hypervisor.suspend, uuid)
        elif self.spec.power is Power.ON and state.power == "paused" and not state.reason:
            await self.host.do(hypervisor.resume, uuid)

    # Steps

    async def _prepare(self) -> bool:
        """Bring the images and make the disks. False if the instance is to be deleted meanwhile."""
        self._stage = InstanceState.PREFLIGHT
        self._publish(self._stage, DomainState("off"))
        await self._save()
        images: dict[str, Backing] = {}
        for disk in self.spec.disks:
            if disk.image:
                found = await self._image(disk)
                if found is None:
                    return False
                images[disk.device] = found
        self._stage = InstanceState.CREATING
        self._publish(self._stage, DomainState("off"))
        for disk in self.spec.disks:
            path, backing = self._overlay(disk.device), images.get(disk.device)
            under = (backing.path, backing.size_bytes) if backing else (None, 0)
            await self.host.do(overlay.create, path, disk.size_bytes, *under)
        await self._save(phase=Phase.STARTING if self.spec.power is not Power.OFF else Phase.OFF)
        return True

    def _overlay(self, device: str, *, second: bool | None = None) -> Path:
        """The file that a disk is on now, or its first or second one."""
        moved = device in self._record.moved if second is None else second
        return self.directory / f"{device}{'.2' if moved else ''}.qcow2"

    def _reader(self, device: str) -> str:
        return f"{self.spec.uuid}-{device}"

    async def _image(self, disk: DiskSpec) -> Backing | None:
        """What the disk's image is read from, or None if the instance is to be deleted before it is there."""

        def say(progress: str) -> None:
            self._publish(self._stage, DomainState("off"), progress=progress)

        fetch = asyncio.ensure_future(self.host.images.backing(self._reader(disk.device), disk.image, say))
        leaving = asyncio.ensure_future(self._leaving.wait())
        try:
            await asyncio.wait({fetch, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if self._leaving.is_set():
                self._wake.set()
                return None
            return await fetch
        finally:
            fetch.cancel()
            leaving.cancel()

    async def _power_on(self) -> None:
        """Define, start with the CPUs stopped, move the taps into their networks, let the CPUs run."""
        uuid, hypervisor, host = self.spec.uuid, self.host.hypervisor, self.host
        began = time.monotonic()
        self._publish(self._stage_now(), DomainState("transition-to-on"))
        await self._save(phase=Phase.STARTING)
        await host.do(hypervisor.destroy, uuid)  # of an attempt that was cut off before its CPUs ran
        await self._remove_taps()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._remove_taps)
            undo.push_async_callback(host.do, hypervisor.destroy, uuid)
            nics = [await self._tap(interface) for interface in self.spec.interfaces]
            disks = [await self._disk(disk) for disk in self.spec.disks]
            await self._save(
                served=tuple(disk.device for disk in disks if disk.socket), deferred=(), arrived={}
            )
            await host.do(self._materialise, tuple(nics), tuple(disks))
            await host.do(hypervisor.start_paused, uuid)
            for disk in disks:
                if disk.socket:
                    await host.do(hypervisor.keep_reconnecting, uuid, disk, _RECONNECT_S)
            await self._adopt()
            if self.spec.power is Power.ON:
                await host.do(hypervisor.resume, uuid)
            undo.pop_all()
        await self._save(phase=Phase.UP, created=True, message="", crashed=False)
        self._event("started", duration_s=time.monotonic() - began, accel=str(host.verdict))

    async def _disk(self, disk: DiskSpec) -> domain.Disk:
        backing = await self._image(disk) if disk.image else None
        if disk.image and backing is None:
            raise Conflict("the instance is to be deleted")
        path = self._overlay(disk.device)
        if backing is None:
            return domain.Disk(disk.device, path, bus=disk.bus)
        return domain.Disk(disk.device, path, backing.path, backing.socket, disk.bus)

    def _materialise(self, nics: tuple[domain.Nic, ...], disks: tuple[domain.Disk, ...]) -> None:
        """Config drive and domain definition from the newest spec."""
        spec, host = self.spec, self.host
        drive = self.directory / "config.iso"
        half = drive.with_suffix(".new")
        half.write_bytes(config_drive.iso(config_drive.files(spec, dict(self._networks))))
        half.replace(drive)
        self.console.cut()
        graphics = None
        if spec.vdi:
            graphics = domain.Graphics(spec.vdi, str(host.address), self._record.vdi_password)
        host.hypervisor.define(
            domain.domain_xml(
                domain.Domain(
                    installation=host.installation,
                    uuid=spec.uuid,
                    title=f"{spec.namespace}/{spec.name}",
                    cpus=spec.cpus,
                    memory_mib=spec.memory_mib,
                    accel=host.verdict.accel,
                    cpu=host.verdict.cpu,
                    disks=disks,
                    nics=nics,
                    config_drive=drive,
                    console_log=self.console.path,
                    uefi=spec.uefi,
                    nvram=self.directory / "nvram.fd" if spec.uefi else None,
                    graphics=graphics,
                )
            )
        )

    async def _power_off(self) -> None:
        self._publish(self._stage_now(), DomainState("transition-to-off"))
        await self.host.do(self.host.hypervisor.destroy, self.spec.uuid)
        await self._remove_taps()
        await self._save(phase=Phase.OFF, created=True, message="", crashed=False)
        self._event("powered off")

    async def _delete(self) -> None:
        """Remove everything; what was begun is begun again after a crash until the directory is gone."""
        await self.host.do(self.host.hypervisor.destroy, self.spec.uuid)
        await self.host.do(self.host.hypervisor.undefine, self.spec.uuid)
        await self._remove_taps()
        for disk in self._record.spec.disks:
            if disk.image:
                await self.host.images.gone(self._reader(disk.device))
        if self.directory.exists():
            await self.host.do(shutil.rmtree, self.directory)
        self.gone = True
        self._publish(InstanceState.DELETED, DomainState("off"))

    # From the image service to the complete file

    async def _move(self, device: str) -> None:
        """Move a running disk to a second overlay over the raw file, once that is complete and if it costs little."""
        disk = next((d for d in self.spec.disks if d.device == device), None)
        figures = await self.host.images.figures(self._reader(device))
        if figures:
            await self._save(arrived={**self._record.arrived, device: figures})
        if (
            disk is None
            or device in self._record.deferred
            or figures.get("present_bytes") != figures.get("data_bytes")
        ):
            return
        backing = self.host.images.complete(disk.image)
        if backing is None:
            return
        old, new = self._overlay(device, second=False), self._overlay(device, second=True)
        if why := await self.host.do(_costly, old):
            await self._save(deferred=(*self._record.deferred, device))
            self._event(
                f"{device}: the image is complete; it is read directly from the next start on, since {why}"
            )
            return
        await self._save(moving=device)
        began = time.monotonic()
        new.unlink(missing_ok=True)
        await self.host.do(overlay.create, new, overlay.virtual_size(old), backing, 0)
        try:
            await self.host.do(
                self.host.hypervisor.move_disk, self.spec.uuid, domain.Disk(device, new, backing)
            )
        except ComputeError as err:
            self._event(f"{device}: not moved to the complete image: {err}")
            await self._save(deferred=(*self._record.deferred, device))
        if await self._end_move():
            self._event(f"{device}: the image is complete and read directly now", time.monotonic() - began)

    async def _end_move(self) -> bool:
        """Finish or undo a move; what libvirt says the disk is on decides, whatever was meant. True if it was moved."""
        device, hypervisor, uuid = self._record.moving, self.host.hypervisor, self.spec.uuid
        await self.host.do(hypervisor.stop_moving, uuid, device)
        old, new = self._overlay(device, second=False), self._overlay(device, second=True)
        on = domain.source_of(await self.host.do(hypervisor.xml, uuid), device)
        if on != str(new):
            new.unlink(missing_ok=True)
            await self._save(moving="")
            return False
        served = tuple(d for d in self._record.served if d != device)
        await self._save(moved=(*self._record.moved, device), served=served, moving="")
        old.unlink(missing_ok=True)
        await self.host.do(hypervisor.drop_nbd, uuid, device)
        await self.host.images.settled(self._reader(device))
        return True

    # Interfaces

    def _port(self, interface: InterfaceSpec) -> Port:
        return Port(
            uuid=interface.uuid,
            mac=interface.mac,
            address=IPv4Address(interface.address),
            hostname=self.spec.name,
            node=self.host.node,
            tap=interface.tap,
        )

    async def _tap(self, interface: InterfaceSpec) -> domain.Nic:
        """Make the tap, written down first. The network must be among the desired ones."""
        network = self._networks.get(interface.network_uuid)
        if network is None:
            raise NotFound(
                f"network {interface.network_uuid} of interface {interface.uuid} is not on this node"
            )
        port = self._port(interface)
        await self._save(taps=(*self._record.taps, Tap(port, network.uuid)))
        async with self.host.plane_lock:
            name = await self.host.do(self.host.plane.create_tap, port)
        return domain.Nic(interface.uuid, interface.mac, name, network.mtu_bytes, interface.model)

    async def _adopt(self) -> None:
        """Move taps that qemu holds open into their networks."""
        for tap in self._record.taps:
            network = self._networks.get(tap.network_uuid)
            if tap.adopted or network is None:
                continue
            async with self.host.plane_lock:
                await self.host.do(self.host.plane.adopt_tap, network, tap.port)
            done = (
                replace(t, adopted=True) if t.port.uuid == tap.port.uuid else t for t in self._record.taps
            )
            await self._save(taps=tuple(done))

    async def _remove_taps(self, keep: frozenset[str] = frozenset()) -> None:
        """Remove the taps of all interfaces but `keep`."""
        for tap in self._record.taps:
            if tap.port.uuid not in keep:
                async with self.host.plane_lock:
                    await self.host.do(self.host.plane.remove_tap, tap.port)
        if any(tap.port.uuid not in keep for tap in self._record.taps):
            await self._save(taps=tuple(tap for tap in self._record.taps if tap.port.uuid in keep))

    async def _plug(self) -> None:
        """Bring the running guest's interfaces to what is wanted; a removal ends when the guest has let go."""
        known = {tap.port.uuid for tap in self._record.taps}
        wanted = {interface.uuid for interface in self.spec.interfaces}
        if known == wanted and all(tap.adopted for tap in self._record.taps):
            return
        hypervisor, uuid = self.host.hypervisor, self.spec.uuid
        live = {i.uuid for i in domain.live_interfaces(await self.host.do(hypervisor.xml, uuid))}
        for extra in live - wanted:
            await self.host.do(hypervisor.detach, uuid, domain.interface_alias(extra))
        await self._remove_taps(keep=frozenset(live))
        for interface in self.spec.interfaces:
            if interface.uuid not in live:
                nic = await self._tap(interface)
                await self.host.do(hypervisor.attach, uuid, domain.interface_xml(nic))
        await self._adopt()

    # Saying

    def _stage_now(self) -> InstanceState:
        return InstanceState.CREATED if self._record.created else InstanceState.CREATING

    def _stage_error(self) -> InstanceState:
        return {
            InstanceState.PREFLIGHT: InstanceState.PREFLIGHT_ERROR,
            InstanceState.CREATING: InstanceState.CREATING_ERROR,
        }.get(self._stage, InstanceState.CREATED_ERROR)

    async def _failed(self, err: Exception) -> None:
        """Say why. Before the first start it is an error for good; later the instance stays, with its reason."""
        hint = getattr(err, "hint", "")
        message = f"{err}{f' ({hint})' if hint else ''}"
        self._event(f"failed: {message}")
        if not self._record.created:
            await self._save(phase=Phase.FAILED, message=message)
            self._publish(self._stage_error(), DomainState("off"), message)
            return
        if self._record.phase is Phase.STARTING:
            await self._save(phase=Phase.ENDED, message=message, crashed=True)
        state = await self.host.do(self.host.hypervisor.state, self.spec.uuid)
        self._publish(InstanceState.CREATED, state, message)

    async def _report(self) -> None:
        self._stage = InstanceState.CREATED
        uuid, hypervisor = self.spec.uuid, self.host.hypervisor
        state = await self.host.do(hypervisor.state, uuid)
        if state.power == "off" and self._record.phase is Phase.UP:
            self._wake.set()  # it ended while we were at it
            return
        port, extra = 0, dict[str, Any]()
        if state.power != "off":
            if self._agent_ready is None:
                self._agent_ready = await self.host.do(hypervisor.agent_ready, uuid)
            if self._agent_ready:
                for device in self._record.served:
                    await self.host.images.booted(self._reader(device))
            if self.spec.vdi:
                port = domain.graphics_port(await self.host.do(hypervisor.xml, uuid))
                extra["vdi_password"] = self._record.vdi_password
        else:
            self._agent_ready = None
        if self._record.arrived:
            extra["image_bytes"] = self._record.arrived
        if self._record.crashed:
            state = DomainState("crashed")
        self._publish(
            InstanceState.CREATED, state, self._record.message or state.reason, vdi_port=port, extra=extra
        )

    def _publish(self, stage: InstanceState, state: DomainState, message: str = "", **more: Any) -> None:
        self.host.publish(
            InstanceStatus(
                uuid=self.spec.uuid,
                state=stage,
                power_state=state.power,
                error_message=message,
                accel=str(self.host.verdict),
                agent_state="ready" if self._agent_ready else "",
                **more,
            )
        )

    def heard(self, device: str, message: str) -> None:
        """Something that the image service says of a disk's image."""
        self._event(f"{device}: {message}")
        self._wake.set()

    def _event(self, message: str, duration_s: float | None = None, **extra: Any) -> None:
        self.host.note(
            NodeEvent("instance", self.spec.uuid, time.time(), "status", message, duration_s, extra)
        )


def _costly(path: Path) -> str:
    """Why the overlay should not be copied while its guest runs; "" if it may be."""
    used_bytes = path.stat().st_blocks * 512
    if used_bytes >= _MOVE_BYTES:
        return f"the disk holds {used_bytes >> 20} MiB of its own"
    if overlay.snapshots(path):
        return "the disk has snapshots"
    if shutil.disk_usage(path.parent).free < 2 * used_bytes + (64 << 20):
        return "there is not room enough for a copy of the disk"
    return ""
