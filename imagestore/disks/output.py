"""What a pull writes: a file beside its place or a device; a raw or qcow2 disk, addressed as the guest sees it."""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imagestore.disks.open import check_unused
from imagestore.disks.qcow2.writer import CLUSTER, Qcow2
from imagestore.errors import Invalid
from imagestore.formats.columns import Numbers
from imagestore.formats.digest import Buffer

_SYNC_BYTES = 32 << 20
"""The file is synced in the background each time that so much was written: the disk works while the rest arrives."""

_BLKZEROOUT = 0x127F


@dataclass(frozen=True, slots=True)
class Target:
    """Where a pull goes: a block device, or a file that has a name which nobody foresees until it is whole."""

    descriptor: int
    before: os.stat_result | None  # what is there already
    directory: int = -1
    """Open, as is all that is named here: nothing is looked at twice by its path. -1: a device."""
    name: str = ""
    beside: str = ""

    def commit(self) -> None:
        """Give the file its name, and the owner and mode of the one before."""
        if self.directory >= 0:
            if self.before:
                with contextlib.suppress(PermissionError):
                    os.fchown(self.descriptor, self.before.st_uid, self.before.st_gid)
                os.fchmod(self.descriptor, stat.S_IMODE(self.before.st_mode))
            os.rename(self.beside, self.name, src_dir_fd=self.directory, dst_dir_fd=self.directory)
            os.fsync(self.directory)

    def discard(self) -> None:
        """Nothing of it is of use."""
        if self.directory >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.beside, dir_fd=self.directory)


@contextlib.contextmanager
def target(path: Path, mark: str) -> Iterator[Target]:
    """Open what a pull to `path` writes; links are followed where the kernel lets us (not another user's in /tmp).

    mark: in the name of unfinished files of the same; one is taken up if nobody but this user can have written it.
    Raises Invalid for what is neither file nor device, Conflict for a disk that a guest uses, BlockingIOError while
    another pull writes it, OSError.
    """
    with contextlib.ExitStack() as stack:

        def opened(name: str, flags: int, directory: int | None = None, mode: int = 0o600) -> int:
            descriptor = os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=directory)
            stack.callback(os.close, descriptor)
            return descriptor

        before, real = None, path
        if os.path.lexists(path):  # a link to nothing is not found
            found = opened(str(path), os.O_PATH)
            before, real = os.fstat(found), Path(f"/proc/self/fd/{found}").readlink()
            device = stat.S_ISBLK(before.st_mode)
            if not device and not stat.S_ISREG(before.st_mode):
                hint = "for the standard output: -" if stat.S_ISFIFO(before.st_mode) else ""
                raise Invalid(f"cannot write {path}: neither a file nor a block device", hint=hint)
            # EBUSY while it is mounted.
            there = opened(f"/proc/self/fd/{found}", os.O_RDWR | os.O_EXCL if device else os.O_RDONLY)
            check_unused(there, str(path))
            if device:
                yield Target(there, before)
                return
        directory = opened(str(real.parent), os.O_RDONLY | os.O_DIRECTORY)
        begins = f".{real.name}.{mark}"
        for beside in os.listdir(directory):  # noqa: PTH208 - of what is open, whatever its name is now
            with contextlib.suppress(OSError):
                if beside.startswith(begins):
                    file = opened(beside, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, directory)
                    status = os.fstat(file)
                    alone = status.st_nlink == 1 and not status.st_mode & 0o022
                    if alone and status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode):
                        break
        else:
            beside = f"{begins}.{secrets.token_hex(8)}"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            file = opened(beside, flags, directory, 0o600 if before else 0o644)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield Target(file, before, directory, real.name, beside)


class Output:
    """Writes from several threads; the owner counts (`written`) and ends (`finish`). qcow2: its form, None for raw."""

    def __init__(self, target: Target, size_bytes: int, qcow2: Qcow2 | None, *, durable: bool) -> None:
        descriptor = self._descriptor = target.descriptor
        self._device, self._qcow2, self._durable = target.directory < 0, qcow2, durable
        self.resumed = os.fstat(descriptor).st_size > 0  # whether something was in it before
        self._syncer = ThreadPoolExecutor(1, "sf-sync")
        self._sync: Future[None] | None = None
        self._unsynced = 0
        file_bytes = qcow2.size_bytes if qcow2 else size_bytes
        if self._device:
            room_bytes = os.lseek(descriptor, 0, os.SEEK_END)
            if room_bytes < file_bytes:
                raise Invalid(f"the device has {room_bytes} bytes, the disk {file_bytes}")
            # Holes are zeros. To the end of the last sector; the rest of the device stays as it is.
            fcntl.ioctl(descriptor, _BLKZEROOUT, struct.pack("QQ", 0, -(-file_bytes // 512) * 512))
        else:
            os.ftruncate(descriptor, file_bytes)
        if qcow2:
            _write(descriptor, qcow2.metadata, 0)

    def allocate(self, starts: Numbers, lengths: Numbers) -> None:
        """Room for these ranges of a raw disk: a full disk is known before a byte is fetched, writing is cheaper."""
        if self._device or self._qcow2 is not None or not len(starts):
            return
        ends = starts + lengths
        breaks = np.flatnonzero(starts[1:] != ends[:-1])
        firsts, lasts = np.append(0, breaks + 1), np.append(breaks, -1)
        try:
            for start, end in zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True):
                os.posix_fallocate(self._descriptor, start, end - start)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
                raise

    def put(self, offset: int, data: memoryview) -> None:
        """Write a range of the disk that is a chunk, or adjoining ones."""
        _write(self._descriptor, data, self._place(offset))

    def read(self, offset: int, length: int) -> bytes:
        """What the file has in such a range's place."""
        return os.pread(self._descriptor, length, self._place(offset))

    def written(self, count: int) -> None:
        """So many bytes more are in the file."""
        self._unsynced += count
        if self._durable and self._unsynced >= _SYNC_BYTES and (self._sync is None or self._sync.done()):
            self._told()
            self._sync, self._unsynced = self._syncer.submit(os.fdatasync, self._descriptor), 0

    def finish(self) -> None:
        """All of it is in the file, and with `durable` on the disk."""
        self._told()
        if self._durable:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """End the thread."""
        self._syncer.shutdown()

    def _told(self) -> None:
        """An error of a sync is told once: the last fsync would not know of it."""
        if self._sync is not None:
            self._sync.result()

    def _place(self, offset: int) -> int:
        """Where in the file a range of chunks begins: a qcow2 has all their clusters, in the disk's order."""
        if self._qcow2 is None:
            return offset
        number, inner = divmod(offset, CLUSTER)
        at = int(np.searchsorted(self._qcow2.clusters, number))
        return len(self._qcow2.metadata) + at * CLUSTER + inner


def _write(descriptor: int, data: Buffer, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
