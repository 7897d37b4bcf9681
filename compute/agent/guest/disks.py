"""An instance's disks: an overlay each, on an image that is complete or, at first, on the image service's export."""

import asyncio
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from compute.agent.guest import overlay
from compute.agent.guest.host import Backing, Say
from compute.agent.guest.owner import Owner
from compute.agent.hypervisor import domain
from compute.errors import ComputeError

_MOVE_BYTES = 256 << 20
"""A disk is moved while its guest runs only if its overlay holds less: the move copies it."""


class Disks:
    """Works for the owner's task. A disk that was moved to its complete image is on its second overlay."""

    def __init__(self, owner: Owner, say: Say) -> None:
        self._owner, self._say = owner, say

    def overlay(self, device: str, *, second: bool | None = None) -> Path:
        """The file that a disk is on now, or its first or second one."""
        moved = device in self._owner.record.moved if second is None else second
        return self._owner.directory / f"{device}{'.2' if moved else ''}.qcow2"

    def reader(self, device: str) -> str:
        return f"{self._owner.spec.uuid}-{device}"

    async def images(self) -> dict[str, Backing] | None:
        """Device → what its image is read from; None if the instance is to be deleted before that is there."""
        fetch = asyncio.ensure_future(self._fetch())
        leaving = asyncio.ensure_future(self._owner.leaving.wait())
        try:
            await asyncio.wait({fetch, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return None if self._owner.leaving.is_set() else await fetch
        finally:
            fetch.cancel()
            leaving.cancel()

    async def _fetch(self) -> dict[str, Backing]:
        backing = self._owner.host.images.backing
        return {
            disk.device: await backing(self.reader(disk.device), disk.image, self._say)
            for disk in self._owner.spec.disks
            if disk.image
        }

    async def make(self, images: Mapping[str, Backing]) -> None:
        """Empty overlays, on the images or on nothing."""
        for disk in self._owner.spec.disks:
            path, backing = self.overlay(disk.device), images.get(disk.device)
            under = (backing.path, backing.size_bytes) if backing else (None, 0)
            await self._owner.host.do(overlay.create, path, disk.size_bytes, *under)

    def devices(self, images: Mapping[str, Backing]) -> tuple[domain.Disk, ...]:
        """The disks as the domain has them."""
        under = ((disk, images.get(disk.device)) for disk in self._owner.spec.disks)
        return tuple(
            domain.Disk(
                d.device, self.overlay(d.device), b.path if b else None, b.socket if b else None, d.bus
            )
            for d, b in under
        )

    async def give_up(self) -> None:
        """Nothing reads the images any more: the disks are deleted."""
        for disk in self._owner.record.spec.disks:
            if disk.image:
                await self._owner.host.images.gone(self.reader(disk.device))

    async def move(self, device: str) -> None:
        """Move a running disk to a second overlay over the raw file, once that is complete and if it costs little."""
        owner = self._owner
        disk = next((d for d in owner.spec.disks if d.device == device), None)
        figures = await owner.host.images.figures(self.reader(device))
        if figures:
            await owner.save(arrived={**owner.record.arrived, device: figures})
        if (
            disk is None
            or device in owner.record.deferred
            or figures.get("present_bytes") != figures.get("data_bytes")
        ):
            return
        backing = owner.host.images.complete(disk.image)
        if backing is None:
            return
        old, new = self.overlay(device, second=False), self.overlay(device, second=True)
        if why := await owner.host.do(_costly, old):
            await owner.save(deferred=(*owner.record.deferred, device))
            owner.event(
                f"{device}: the image is complete; it is read directly from the next start on, since {why}"
            )
            return
        await owner.save(moving=device)
        began = time.monotonic()
        new.unlink(missing_ok=True)
        await owner.host.do(overlay.create, new, overlay.virtual_size(old), backing, 0)
        try:
            await owner.host.do(
                owner.host.hypervisor.move_disk,
                owner.spec.uuid,
                domain.Disk(device, new, backing),
            )
        except ComputeError as err:
            owner.event(f"{device}: not moved to the complete image: {err}")
            await owner.save(deferred=(*owner.record.deferred, device))
        if await self.end_move():
            owner.event(f"{device}: the image is complete and read directly now", time.monotonic() - began)

    async def end_move(self) -> bool:
        """Finish or undo a move; what libvirt says the disk is on decides, whatever was meant. True if it was moved."""
        owner = self._owner
        device, hypervisor, uuid = owner.record.moving, owner.host.hypervisor, owner.spec.uuid
        await owner.host.do(hypervisor.stop_moving, uuid, device)
        old, new = self.overlay(device, second=False), self.overlay(device, second=True)
        on = domain.source_of(await owner.host.do(hypervisor.xml, uuid), device)
        if on != str(new):
            new.unlink(missing_ok=True)
            await owner.save(moving="")
            return False
        served = tuple(d for d in owner.record.served if d != device)
        await owner.save(moved=(*owner.record.moved, device), served=served, moving="")
        old.unlink(missing_ok=True)
        await owner.host.do(hypervisor.drop_nbd, uuid, device)
        await owner.host.images.settled(self.reader(device))
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
