"""A guest's disks: empty qcow2 version 3 files, over a read-only raw image or over nothing.

`qemu-img create` costs 32 to 56 ms of process start; what holds nothing yet is four tables that are nearly zero.
"""

import struct
from contextlib import suppress
from pathlib import Path

import numpy as np

from compute.agent.hypervisor import domain
from compute.agent.hypervisor.libvirt import Hypervisor, Refused
from compute.errors import Invalid
from imagestore import QCOW2_HEADER, durable, qcow2_of

_BACKING_FORMAT = 0xE2792ACA
_MOST_BYTES = 1 << 51  # qemu takes an L1 table of 32 MiB at most


def qcow2(size_bytes: int, backing: str = "") -> bytes:
    """The bytes of an empty qcow2 file of `size_bytes` (a multiple of 512) over `backing`.

    `backing` is a path, or json:{…} for what is no file. It must fit in the first cluster.
    """
    name, no_data = backing.encode(), np.zeros(0, np.int64)
    if size_bytes <= 0 or size_bytes % 512:
        raise Invalid(f"a disk's size is a multiple of 512 bytes, not {size_bytes}")
    if len(name) > 1023 or size_bytes > _MOST_BYTES:
        raise Invalid("the backing file's name or the disk is too large for qcow2")
    extensions = struct.pack(">II8sII", _BACKING_FORMAT, 3, b"raw", 0, 0) if name else b""
    return qcow2_of(size_bytes, no_data, extensions, name).metadata


def virtual_size(path: Path) -> int:
    """The size of the disk in a qcow2 file."""
    with path.open("rb") as file:
        return int(QCOW2_HEADER.unpack(file.read(QCOW2_HEADER.size))[5])


def backing(path: Path) -> str:
    """What a qcow2 file names as its backing; "" for none."""
    with path.open("rb") as file:
        _, _, place, length = struct.unpack(">4sIQI", file.read(20))
        file.seek(place)
        return file.read(length).decode(errors="replace") if place else ""


def snapshots(path: Path) -> int:
    """How many internal snapshots a qcow2 file has."""
    with path.open("rb") as file:
        return int(QCOW2_HEADER.unpack(file.read(QCOW2_HEADER.size))[11])


def create(path: Path, size_bytes: int, image: Path | None, image_bytes: int = 0) -> None:
    """Write a guest's disk unless it is there: a disk that has its final name is never touched again.

    `image` is named in the header and need not be there yet. `size_bytes` 0 means the image's size, rounded up to
    512. Raises Invalid for a disk smaller than its image.
    """
    if path.exists():
        return
    needed = -(-image_bytes // 512) * 512
    size = -(-size_bytes // 512) * 512 or needed
    if size < needed:
        hint = f"ask for at least {-(-needed // 2**30)}G"
        raise Invalid(f"the disk {path.stem} has {size} bytes, its image {needed}", hint=hint)
    # libvirt gives it to qemu's user.
    durable.write(path, qcow2(size, str(image) if image is not None else ""))


def keep_reconnecting(hypervisor: Hypervisor, uuid: str, disk: domain.Disk, reconnect_s: int) -> None:
    """Have a domain that was started paused read its NBD backing through a connection that is made again.

    libvirt before 9.1 cannot say `reconnect-delay`, without which a restart of the export is an I/O error for
    ever. So a second connection takes the place of the first below the overlay, before the CPUs run.
    """
    node = f"sf-{disk.device}"
    nodes = hypervisor.qmp(uuid, "query-named-block-nodes", flat=True)
    file = next(n["node-name"] for n in nodes if n["drv"] == "file" and n["file"] == str(disk.path))
    hypervisor.qmp(
        uuid, "blockdev-add", driver="nbd", **{
            "node-name": node, "server": {"type": "unix", "path": str(disk.socket)},
            "read-only": True, "reconnect-delay": reconnect_s, "open-timeout": 30,
        },
    )  # fmt: skip
    overlay = {"driver": "qcow2", "node-name": file.replace("storage", "format"), "file": file}
    overlay |= {"backing": node, "read-only": disk.cdrom, "discard": "unmap"}
    overlay["cache"] = {"direct": True, "no-flush": False}
    hypervisor.qmp(uuid, "blockdev-reopen", options=[overlay])


def drop_nbd(hypervisor: Hypervisor, uuid: str, device: str) -> None:
    """Close the connection that `keep_reconnecting` made; nothing if there is none."""
    with suppress(Refused):
        hypervisor.qmp(uuid, "blockdev-del", **{"node-name": f"sf-{device}"})
