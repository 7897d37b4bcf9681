"""The file that a pull writes: a raw or qcow2 disk, addressed as the guest sees it, synced while the rest arrives."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from imagestore.disks.qcow2.writer import CLUSTER, Qcow2
from imagestore.formats.columns import Numbers
from imagestore.formats.digest import Buffer

_SYNC_BYTES = 32 << 20
"""The file is synced in the background each time that so much was written: the disk works while the rest arrives."""


class Output:
    """Writes from several threads; the owner counts (`written`) and ends (`finish`). qcow2: its form, None for raw."""

    def __init__(self, descriptor: int, size_bytes: int, qcow2: Qcow2 | None, *, durable: bool) -> None:
        self._descriptor, self._qcow2, self._durable = descriptor, qcow2, durable
        self.resumed = os.fstat(descriptor).st_size > 0
        """Whether something was in it before."""
        self._syncer = ThreadPoolExecutor(1, "sf-sync")
        self._sync: Future[None] | None = None
        self._unsynced = 0
        os.ftruncate(descriptor, qcow2.size_bytes if qcow2 else size_bytes)
        if qcow2 is None:
            return
        _write(descriptor, qcow2.metadata, 0)
        if len(qcow2.clusters):
            # For each cluster of the file, the guest's cluster at which its run of neighbours ends.
            last = np.append(np.flatnonzero(np.diff(qcow2.clusters) != 1), len(qcow2.clusters) - 1)
            self._run_ends = np.repeat(qcow2.clusters[last] + 1, np.diff(last, prepend=-1))

    def allocate(self, starts: Numbers, lengths: Numbers) -> None:
        """Room for these ranges of a raw disk: a full disk is known before a byte is fetched, writing is cheaper."""
        if self._qcow2 is not None or not len(starts):
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
        """Write a range of the disk."""
        for place, start, end in self._pieces(offset, len(data)):
            _write(self._descriptor, data[start:end], place)

    def read(self, offset: int, length: int) -> bytes:
        """What the file has there."""
        pieces = self._pieces(offset, length)
        return b"".join(os.pread(self._descriptor, end - start, place) for place, start, end in pieces)

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

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(place in the file, start, end) of each stretch of a disk range that the file keeps in one piece."""
        if self._qcow2 is None:
            yield offset, 0, length
            return
        done = 0
        while done < length:
            number, inner = divmod(offset + done, CLUSTER)
            at = int(np.searchsorted(self._qcow2.clusters, number))
            count = min(int(self._run_ends[at]) * CLUSTER - offset - done, length - done)
            yield len(self._qcow2.metadata) + at * CLUSTER + inner, done, done + count
            done += count


def _write(descriptor: int, data: Buffer, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
