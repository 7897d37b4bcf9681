"""A disk as its guest sees it, whatever file it comes in."""

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from imagestore.disks.inspection import convert, sniff
from imagestore.disks.qcow2.reader import Qcow2
from imagestore.errors import Conflict, Invalid
from imagestore.formats.manifest import MAX_DISK_BYTES


class Disk(Protocol):
    """Random read access, from several threads at once."""

    size_bytes: int
    format: str

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """(start, end) of the first stretch at or after `offset` that may hold other bytes than zeros."""
        ...

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out`, which must lie inside one stretch of `next_data`. Raises Invalid for a broken image."""
        ...


def read_exactly(descriptor: int, offset: int, out: memoryview, what: str) -> None:
    """pread until `out` is full. Raises Invalid when the file ends before."""
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done:]], offset + done)
        if count == 0:
            raise Invalid(f"{what} is cut short: it ends at byte {offset + done}")
        done += count


def read_range(disk: Disk, offset: int, length: int) -> bytes:
    """Bytes of a disk, holes as zeros; fewer where the disk ends."""
    length = max(0, min(length, disk.size_bytes - offset))
    data, done = bytearray(length), 0
    view = memoryview(data)
    while done < length and (stretch := disk.next_data(offset + done)) is not None:
        start, end = (min(max(at - offset, done), length) for at in stretch)
        if start < end:
            disk.read(offset + start, view[start:end])
        done = end
    return bytes(data)


class RawDisk:
    """A raw file or block device; its holes are found by SEEK_DATA."""

    format = "raw"

    def __init__(self, descriptor: int, what: str) -> None:
        self._descriptor, self._what = descriptor, what
        self.size_bytes = os.lseek(descriptor, 0, os.SEEK_END)

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """By lseek; a file system that does not know holes has one stretch of data."""
        if offset >= self.size_bytes:
            return None
        try:
            start = os.lseek(self._descriptor, offset, os.SEEK_DATA)
            return start, min(os.lseek(self._descriptor, start, os.SEEK_HOLE), self.size_bytes)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return offset, self.size_bytes

    def read(self, offset: int, out: memoryview) -> None:
        """One pread."""
        read_exactly(self._descriptor, offset, out, self._what)


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
def open_disk(path: Path, format_: str | None = None) -> Iterator[Disk]:
    """Open an image file that nobody writes to.

    format_: raw, qcow2, vmdk, vhdx or vdi; None looks at the file, and refuses what it does not know.
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
        disk: Disk
        match sniff(descriptor, str(path), format_):
            case "raw":
                disk = RawDisk(descriptor, str(path))
            case "qcow2":
                disk = Qcow2(descriptor, str(path))
            case other:
                raw = stack.enter_context(convert(path, other))
                disk = RawDisk(raw, str(path))
                disk.format = other
        if disk.size_bytes > MAX_DISK_BYTES:
            raise Invalid(f"{path}: a disk of {disk.size_bytes >> 40} TiB is larger than the 64 TiB allowed")
        if disk.size_bytes == 0:
            raise Invalid(f"{path}: the disk is empty")
        yield disk
