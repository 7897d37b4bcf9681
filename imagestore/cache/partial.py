"""A cached image that may be incomplete: a sparse raw file and a bitmap with one bit per chunk of its manifest.

    have file: "sf-have 1\\n" | boot id (36 bytes of text) | manifest digest (32) | one bit per chunk, first bit highest

A bit is set on disk only after the chunk's bytes were synced, so a power cut leaves no bit without its bytes; bits
never go back, so a torn write of the bitmap is one of its earlier states. Should a disk have lied about that: after a
reboot (another boot id) every chunk that counts as present is hashed again. A kill of the process alone loses only
what was not flushed: it is fetched once more.
"""

import errno
import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from blake3 import blake3

from imagestore import durable
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.manifest import Manifest

_MAGIC = b"sf-have 1\n"
_HEADER_BYTES = len(_MAGIC) + 36 + 32
_MAPPED_FROM = 64 << 10
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class PartialImage:
    """Opens or makes `<stem>.part` and `<stem>.have`, for one process at a time; `write` may come from any thread.

    With `whole` the file is a complete image, which is only read. Opening after a reboot hashes what is there: run it
    in a thread. Raises OSError.
    """

    def __init__(self, raw: Path, digest: Digest, manifest: Manifest, *, whole: bool = False) -> None:
        self.path, self.digest, self.manifest = raw, digest, manifest
        self.size_bytes = manifest.size_bytes
        self.starts: list[int] = manifest.offsets.tolist()
        self.ends: list[int] = (manifest.offsets + manifest.lengths).tolist()
        self._ids = manifest.ids.tobytes()
        self._have_path = raw.with_suffix(".have")
        self._header = _MAGIC + BOOT_ID.read_text().strip().encode()[:36].ljust(36) + digest
        self._lock, self._writing, self._flushing = (threading.Lock() for _ in range(3))
        self._durable = np.zeros(len(self.starts), np.bool_)
        self._unsynced: list[int] = []
        self.present = bytearray(len(self.starts))
        """One byte per chunk: 1 where the raw file holds its verified bytes."""
        fresh = not raw.exists()
        self._fd = os.open(raw, (os.O_RDONLY if whole else os.O_RDWR | os.O_CREAT) | os.O_CLOEXEC, 0o644)
        self._have_fd = -1
        try:
            if whole:
                self._durable[:] = True
                self.present[:] = self._durable.tobytes()
            else:
                os.ftruncate(self._fd, self.size_bytes)
                self._load(fresh)
            mapped = mmap.mmap(self._fd, self.size_bytes, prot=mmap.PROT_READ) if self.size_bytes else b""
            self._map = memoryview(mapped)
        except BaseException:
            self.close()
            raise
        self.present_bytes = int(manifest.lengths[self._durable].sum(dtype=np.uint64))

    def _load(self, fresh: bool) -> None:
        stored = b"" if fresh or not self._have_path.exists() else self._have_path.read_bytes()
        magic, body = stored[:_HEADER_BYTES], stored[_HEADER_BYTES:]
        ours = len(body) == (len(self.starts) + 7) // 8 and magic[-32:] == self._header[-32:]
        if ours and magic.startswith(_MAGIC):
            bits = np.unpackbits(np.frombuffer(body, np.uint8), count=len(self.starts))
            self._durable = bits.astype(np.bool_)
            if magic != self._header:
                for chunk in np.flatnonzero(self._durable).tolist():
                    self._durable[chunk] = self.check(chunk, self.read_chunk(chunk))
        self.present[:] = self._durable.tobytes()
        if not ours or magic != self._header:
            # Beside and over it: the old bits go with the old boot id, together or not at all.
            durable.write(self._have_path, self._header + np.packbits(self._durable).tobytes(), 0o666)
        self._have_fd = os.open(self._have_path, os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of the files without flushing; what is brought from now on is written nowhere."""
        with self._writing:  # a number that is closed under a write may be another file's by then
            for fd in (self._fd, self._have_fd):
                if fd >= 0:
                    os.close(fd)
            self._fd = self._have_fd = -1

    # -- where things are

    @property
    def complete(self) -> bool:
        """Whether every chunk is there (flushed or not)."""
        return self.present.find(0) < 0

    def chunks(self, offset: int, length: int) -> range:
        """The chunks that overlap a range of the disk."""
        first = bisect_right(self.ends, offset)
        return range(first, max(first, bisect_right(self.starts, offset + length - 1)))

    def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, bool]]:
        """(length, is a hole) over the range, at most `limit` of them, by the manifest: nothing has to be fetched."""
        found: list[tuple[int, bool]] = []
        at, end = offset, offset + length
        for chunk in self.chunks(offset, length):
            if len(found) > limit:
                break
            start, stop = max(self.starts[chunk], at), min(self.ends[chunk], end)
            if start > at:
                found.append((start - at, True))
            elif found:
                start -= found.pop()[0]
            found.append((stop - start, False))
            at = stop
        if at < end:
            found.append((end - at, True))
        return found[:limit]

    # -- bytes

    def check(self, chunk: int, data: Buffer) -> bool:
        """Whether these are the chunk's bytes."""
        return blake3(data).digest() == self._ids[chunk * 32 : chunk * 32 + 32]

    def id(self, chunk: int) -> bytes:
        """The 32 bytes of the chunk's digest."""
        return self._ids[chunk * 32 : chunk * 32 + 32]

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """Bytes of a range whose chunks are present, or None if the disk would have to be waited for.

        Large ranges are slices of a mapping, for nobody but the kernel to read: a write to a socket from a page with
        an I/O error fails with EFAULT, where touching it here would be a SIGBUS.
        """
        try:
            if length >= _MAPPED_FROM:
                probe = bytearray(1)
                os.preadv(self._fd, [probe], offset, os.RWF_NOWAIT)
                os.preadv(self._fd, [probe], offset + length - 1, os.RWF_NOWAIT)
                return self._map[offset : offset + length]
            data = bytearray(length)
            return data if os.preadv(self._fd, [data], offset, os.RWF_NOWAIT) == length else None
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # tmpfs, overlayfs: nothing to wait for, or no way to know
                return os.pread(self._fd, length, offset)
            return None

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of a range whose chunks are present; waits for the disk. Raises OSError."""
        data = os.pread(self._fd, length, offset)
        if len(data) != length:
            raise OSError(errno.EIO, f"{self.path} was cut short")
        return data

    def read_chunk(self, chunk: int) -> bytes:
        """What the file has in the chunk's place, true or not."""
        return os.pread(self._fd, self.ends[chunk] - self.starts[chunk], self.starts[chunk])

    def write(self, chunks: Sequence[int], pieces: Sequence[Buffer]) -> None:
        """Keep verified bytes of some chunks (ascending); adjoining ones in one call. Raises OSError (ENOSPC).

        What failed half-way is not present. The caller marks the chunks on its own thread, by `mark`.
        """
        at = 0
        while at < len(chunks):
            end = at + 1
            last = min(len(chunks), at + 256)
            while end < last and self.starts[chunks[end]] == self.ends[chunks[end - 1]]:
                end += 1
            wanted = self.ends[chunks[end - 1]] - self.starts[chunks[at]]
            with self._writing:
                if os.pwritev(self._fd, pieces[at:end], self.starts[chunks[at]]) != wanted:
                    raise OSError(errno.ENOSPC, f"{self.path}: short write")
            at = end

    def clone(self, chunk: int, source_fd: int, source_offset: int) -> None:
        """Keep a chunk by copying it from another file, sharing its blocks where the filesystem can. Raises OSError.

        The caller has checked the source's bytes and what stands here afterwards.
        """
        start, length, at = self.starts[chunk], self.ends[chunk] - self.starts[chunk], 0
        while at < length:
            with self._writing:
                done = os.copy_file_range(source_fd, self._fd, length - at, source_offset + at, start + at)
            if not done:
                raise OSError(errno.EIO, "the source was cut short")
            at += done

    def mark(self, chunks: Iterable[int]) -> None:
        """These chunks were written: they may be read from the file now."""
        with self._lock:
            for chunk in chunks:
                if not self.present[chunk]:
                    self.present[chunk] = 1
                    self.present_bytes += self.ends[chunk] - self.starts[chunk]
                    self._unsynced.append(chunk)

    def flush(self) -> None:
        """Make what is marked survive a power cut: first the data, then the bits. Raises OSError."""
        with self._flushing:  # who seals or closes next counts on what another thread has begun to sync
            with self._lock:
                chunks, self._unsynced = self._unsynced, []
            if not chunks:
                return
            try:
                os.fdatasync(self._fd)
            except OSError:
                # What the kernel could not write it may drop: these chunks are not there any more.
                with self._lock:
                    for chunk in chunks:
                        self.present[chunk] = 0
                        self.present_bytes -= self.ends[chunk] - self.starts[chunk]
                raise
            with self._lock:
                self._durable[chunks] = True
                bits = np.packbits(self._durable).tobytes()
            os.pwrite(self._have_fd, bits, _HEADER_BYTES)
            os.fdatasync(self._have_fd)

    def seal(self, path: Path) -> None:
        """Give the complete image its final name, durably. Who has it open reads on. Raises OSError."""
        self.flush()
        if not self.complete:
            raise OSError(errno.EIO, "the disk lost some of it")
        self.path.chmod(0o444)
        self.path.rename(path)
        self.path = path
        durable.sync(path.parent)
        self._have_path.unlink(missing_ok=True)
