"""What every disk can do, whatever file it comes in, and the simplest one: a raw file or a stretch of one."""

import errno
import os
from typing import Protocol

from imagestore.errors import Invalid


class Doubt(Exception):
    """Why something that a disk says of itself is not believed; never leaves this package."""


class Disk(Protocol):
    """Random read access, from several threads at once."""

    size_bytes: int

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
    data = bytearray(max(0, min(length, disk.size_bytes - offset)))
    read_data(disk, offset, memoryview(data))
    return bytes(data)


def read_data(disk: Disk, offset: int, out: memoryview) -> None:
    """Fill `out` with the bytes of a disk from `offset` on, holes as zeros."""
    done = 0
    while done < len(out):
        stretch = disk.next_data(offset + done) or (offset + len(out),) * 2
        start, end = (min(max(at - offset, done), len(out)) for at in stretch)
        out[done:start] = bytes(start - done)
        if start < end:
            disk.read(offset + start, out[start:end])
        done = end


class RawDisk:
    """A raw file or block device; its holes are found by SEEK_DATA."""

    def __init__(self, descriptor: int, what: str, size_bytes: int | None = None) -> None:
        """size_bytes: where what follows the disk in the file is none of it."""
        self._descriptor, self._what = descriptor, what
        self.size_bytes = os.lseek(descriptor, 0, os.SEEK_END) if size_bytes is None else size_bytes

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """By lseek; a file system that does not know holes has one stretch of data."""
        if offset >= self.size_bytes:
            return None
        try:
            start = os.lseek(self._descriptor, offset, os.SEEK_DATA)
            end = min(os.lseek(self._descriptor, start, os.SEEK_HOLE), self.size_bytes)
            return (start, end) if start < end else None
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return offset, self.size_bytes

    def read(self, offset: int, out: memoryview) -> None:
        """One pread."""
        read_exactly(self._descriptor, offset, out, self._what)
