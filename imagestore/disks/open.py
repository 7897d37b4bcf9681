"""A disk as its guest sees it, whatever file it comes in."""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from imagestore.disks.disk import Disk, RawDisk
from imagestore.disks.filesystems import claimed_bytes
from imagestore.disks.inspection import convert, sniff
from imagestore.disks.lengths import vhd_size
from imagestore.disks.qcow2.reader import Qcow2
from imagestore.disks.unpack import unpacked
from imagestore.errors import Conflict, Invalid
from imagestore.formats.manifest import MAX_DISK_BYTES
from imagestore.progress import Report, silent


def check_unused(descriptor: int, what: str) -> None:
    """Raise Conflict when a running qemu writes to the file.

    QEMU locks byte 100+n for each permission that it uses and 200+n for each that it does not share
    (block/file-posix.c: RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE): in the way are a user with WRITE (1) or
    RESIZE (3) and one that does not share CONSISTENT_READ (0).
    """
    for byte in (101, 103, 200):
        probe = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        try:
            answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, probe)
        except OSError:
            return  # a file system without such locks: qemu could not set them either
        if struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK:
            raise Conflict(f"{what} is in use by a running guest", hint="shut the guest down first")


@contextlib.contextmanager
def open_disk(path: Path, format_: str | None = None, progress: Report = silent) -> Iterator[Disk]:
    """Open an image file that nobody writes to, unpacked where it is compressed or an OVA.

    format_: raw (the bytes as they are), qcow2, vmdk, vhdx, vdi or vhd (fixed); None looks at the file, and refuses
    what it does not know.
    Raises Invalid for a path that cannot be read and for a bad image, Conflict when in use.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise Invalid(f"cannot read {path}: {os.strerror(error.errno or errno.EIO)}") from error
        stack.callback(os.close, descriptor)
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise Invalid(f"cannot read {path}: neither a file nor a block device")
        check_unused(descriptor, str(path))
        if format_ != "raw":
            descriptor = stack.enter_context(unpacked(descriptor, str(path), progress))
        disk: Disk
        match sniff(descriptor, str(path), format_):
            case "raw":
                disk = RawDisk(descriptor, str(path))
                if format_ is None and (claimed := claimed_bytes(disk)) > disk.size_bytes:
                    said = f"{path} is cut short: it has {disk.size_bytes} bytes and speaks of {claimed}"
                    raise Invalid(said, hint="--input-format raw takes it as it is")
            case "vhd":
                disk = RawDisk(descriptor, str(path), vhd_size(descriptor, str(path)))
            case "qcow2":
                disk = Qcow2(descriptor, str(path))
            case other:
                disk = RawDisk(stack.enter_context(convert(descriptor, path, other)), str(path))
        if disk.size_bytes > MAX_DISK_BYTES:
            raise Invalid(f"{path}: a disk of {disk.size_bytes >> 40} TiB is larger than the 64 TiB allowed")
        if disk.size_bytes == 0:
            raise Invalid(f"{path}: the disk is empty")
        yield disk
