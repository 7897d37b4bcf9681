"""A guest's disks: an overlay each, on an image that is complete or, at first, on the image service's export."""

import asyncio
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from compute.agent.guest import overlay
from compute.agent.guest.host import Host
from compute.agent.guest.record import DisksHeld, Part
from compute.agent.hypervisor import domain
from compute.agent.hypervisor.libvirt import FULL
from compute.agent.image_service import Backing
from compute.errors import ComputeError
from compute.wire.spec import DiskSpec, InstanceSpec
from compute.wire.streams import first

_MOVE_BYTES = 256 << 20
"""A disk is moved while its guest runs only if its overlay holds less: the move copies it."""

_ROOM_BYTES = 64 << 20
_RECONNECT_S = 3600  # for how long a guest waits for an image service that is away


class Leaving(Exception):
    """The guest is to be deleted, or nobody knows it now: nothing more is waited for."""


class Disks:
    """Works for the guest's task. A disk that was moved to its complete image is on its second overlay."""

    def __init__(self, host: Host, uuid: str, held: Part[DisksHeld], event: Callable[..., None]) -> None:
        self._host, self._uuid, self.held, self._event = host, uuid, held, event

    def overlay(self, device: str, *, second: bool | None = None) -> Path:
        """The file that a disk is on now, or its first or second one."""
        moved = device in self.held.now.moved if second is None else second
        return self._host.directory / self._uuid / f"{device}{'.2' if moved else ''}.qcow2"

    def may_go_on(self, reason: str) -> bool:
        """Whether what a guest was paused for is over: there is room again for its disks."""
        free_bytes = shutil.disk_usage(self._host.directory).free
        return not reason or (reason == FULL and free_bytes >= _ROOM_BYTES)

    def image(self, disk: DiskSpec) -> str:
        """The digest of what a disk's overlay stands on, the disk of a warm state perhaps; "" for nothing."""
        path = self.overlay(disk.device)
        name = Path(overlay.backing(path)).stem if disk.image and path.exists() else ""
        return f"b3:{name}" if len(name) == 64 else disk.image

    def _reader(self, device: str) -> str:
        return f"{self._uuid}-{device}"

    async def images(self, spec: InstanceSpec, leaving: asyncio.Event) -> dict[str, Backing]:
        """Device → what its image is read from, as soon as that is there. Raises Leaving, imagestore's errors."""
        images, made = self._host.images, [disk for disk in spec.disks if disk.image]
        on = {disk.device: self.image(disk) for disk in made}

        async def fetch() -> dict[str, Backing]:
            return {device: await images.backing(self._reader(device), image) for device, image in on.items()}

        async def leave() -> dict[str, Backing]:
            await leaving.wait()
            raise Leaving

        return await first(fetch(), leave())

    async def make(self, spec: InstanceSpec, images: Mapping[str, Backing]) -> None:
        """Empty overlays, on the images or on nothing."""
        for disk in spec.disks:
            backing = images.get(disk.device)
            under = (backing.path, backing.size_bytes) if backing else (None, 0)
            await self._host.do(overlay.create, self.overlay(disk.device), disk.size_bytes, *under)

    async def begin(self, spec: InstanceSpec, images: Mapping[str, Backing]) -> tuple[domain.Disk, ...]:
        """The disks as the domain that is about to be started has them."""
        disks = []
        for d in spec.disks:
            under = images.get(d.device)
            backing, socket = (under.path, under.socket) if under else (None, None)
            disks.append(domain.Disk(d.device, self.overlay(d.device), backing, socket, d.bus, d.cdrom))
        served = tuple(disk.device for disk in disks if disk.socket)
        await self.held.save(served=served, deferred=(), arrived={})
        return tuple(disks)

    async def hold(self, disks: tuple[domain.Disk, ...]) -> None:
        """The domain is started and its CPUs do not run yet: a restart of an export must not end its reads."""
        for disk in disks:
            if disk.socket:
                domain_of = self._host.hypervisor, self._uuid
                await self._host.do(overlay.keep_reconnecting, *domain_of, disk, _RECONNECT_S)

    async def booted(self) -> None:
        """The guest is up: what it read until now was its boot."""
        for device in self.held.now.served:
            await self._host.images.tell("booted", reader=self._reader(device))

    async def give_up(self, spec: InstanceSpec) -> None:
        """Nothing reads the images any more: the disks are deleted."""
        for disk in spec.disks:
            if disk.image:
                await self._host.images.gone(self._reader(disk.device))

    async def forget(self, devices: Collection[str]) -> None:
        """Remove disks of a guest that is off."""
        for device in devices:
            await self._host.images.gone(self._reader(device))
            for second in (False, True):
                self.overlay(device, second=second).unlink(missing_ok=True)
        moved = tuple(device for device in self.held.now.moved if device not in devices)
        await self.held.save(moved=moved, served=(), arrived={})

    async def grow(self, spec: InstanceSpec) -> None:
        """As large as they are to be by now. Never while something else is done to them."""
        for disk in spec.disks:
            size, path = disk.size_bytes // 512 * 512, self.overlay(disk.device)
            if path.exists() and overlay.virtual_size(path) < size:
                await self._host.do(self._host.hypervisor.grow_disk, self._uuid, disk.device, size)
                self._event(f"{disk.device} has {disk.size_bytes / 2**30:.4g} GiB now")

    async def move(self, spec: InstanceSpec) -> None:
        """Move running disks to second overlays over raw files, once those are complete and if it costs little."""
        await self.grow(spec)
        for device in self.held.now.served:
            # libvirt copies no CD-ROM: it goes on by the image service, and from its next start on from the file.
            image = next((self.image(d) for d in spec.disks if d.device == device and not d.cdrom), "")
            await self._move(device, image)

    async def _move(self, device: str, image: str) -> None:
        held, figures = self.held, await self._host.images.tell("figures", reader=self._reader(device)) or {}
        if figures and figures != held.now.arrived.get(device):
            await held.save(arrived={**held.now.arrived, device: figures})
        whole = figures.get("present_bytes") == figures.get("data_bytes")
        backing = self._host.images.complete(image) if image and whole else None
        if backing is None or device in held.now.deferred:
            return
        old, new = self.overlay(device, second=False), self.overlay(device, second=True)
        if why := await self._host.do(_costly, old):
            await held.save(deferred=(*held.now.deferred, device))
            later = f"it is read directly from the next start on, since {why}"
            self._event(f"{device}: the image is complete; {later}")
            return
        await held.save(moving=device)
        began = time.monotonic()
        new.unlink(missing_ok=True)
        await self._host.do(overlay.create, new, overlay.virtual_size(old), backing, 0)
        try:
            disk = domain.Disk(device, new, backing)
            await self._host.do(self._host.hypervisor.move_disk, self._uuid, disk)
        except ComputeError as err:
            self._event(f"{device}: not moved to the complete image: {err}")
            await held.save(deferred=(*held.now.deferred, device))
        if await self.end_move():
            self._event(f"{device}: the image is complete and read directly now", time.monotonic() - began)

    async def end_move(self) -> bool:
        """Finish or undo a move; what libvirt says the disk is on decides, whatever was meant. True if it was moved."""
        held, do, hypervisor, device = self.held, self._host.do, self._host.hypervisor, self.held.now.moving
        if not device:
            return False
        await do(hypervisor.stop_moving, self._uuid, device)
        old, new = self.overlay(device, second=False), self.overlay(device, second=True)
        if domain.source_of(await do(hypervisor.xml, self._uuid), device) != str(new):
            new.unlink(missing_ok=True)
            await held.save(moving="")
            return False
        served = tuple(d for d in held.now.served if d != device)
        await held.save(moved=(*held.now.moved, device), served=served, moving="")
        old.unlink(missing_ok=True)
        await do(overlay.drop_nbd, hypervisor, self._uuid, device)
        await self._host.images.settled(self._reader(device))
        return True


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
