"""What one guest sees of an incomplete image: the source behind its NBD export, and figures about its reads."""

import asyncio
import mmap
import time
from collections.abc import Sequence
from typing import Any

from imagestore.cache.fetcher import Fetcher, Filling
from imagestore.cache.nbd.handshake import MAX_REQUEST_BYTES
from imagestore.formats.digest import Buffer
from imagestore.formats.trace import Recorder

# Never written and so never more than the kernel's one page of zeros.
_ZEROES = memoryview(mmap.mmap(-1, MAX_REQUEST_BYTES, prot=mmap.PROT_READ))


class Reader:
    """An `nbd.Source` over a `Filling`, whose missing chunks a `Fetcher` brings."""

    def __init__(self, fetcher: Fetcher, filling: Filling, *, patience_s: float) -> None:
        self.size_bytes = filling.partial.size_bytes
        self.patience_s = patience_s  # a read that cannot be served for so long ends in an I/O error
        self.recorder: Recorder | None = Recorder(len(filling.partial.starts))
        self.reads = self.waits = self.failures = 0
        self.waited_s = 0.0  # sum over the reads: two that wait at once count twice
        self._fetcher, self._filling, self._partial = fetcher, filling, filling.partial

    def read_now(self, offset: int, length: int) -> Buffer | None:
        chunks = self._partial.chunks(offset, length)
        if not chunks:
            data: Buffer | None = _ZEROES[:length]
        else:
            if self.recorder:
                self.recorder.touch(chunks)
            if self._partial.present.find(0, chunks.start, chunks.stop) >= 0:
                return None
            if self._filling.wanted.ahead and self._filling.wanted.touched(chunks):
                self._fetcher.pump()
            data = self._partial.read_now(offset, length)
        if data is not None:
            self.reads += 1
        return data

    async def read(self, offset: int, length: int) -> Buffer:
        started = time.monotonic()
        chunks = self._partial.chunks(offset, length)
        try:
            loose = await self._fetcher.obtain(self._filling, chunks, self.patience_s)
            data = self._partial.read_now(offset, length)  # what has just come is in memory
            if data is None:
                data = await asyncio.to_thread(self._partial.read, offset, length)
        except OSError:
            self.failures += 1
            raise
        finally:
            self.reads += 1
            self.waits += 1
            self.waited_s += time.monotonic() - started
        return self._overlaid(data, offset, loose) if loose else data

    def _overlaid(self, data: Buffer, offset: int, loose: dict[int, Buffer]) -> Buffer:
        """`data` of the file with the chunks in it that the file could not take."""
        whole = bytearray(data)
        for chunk, piece in loose.items():
            start, end = self._partial.starts[chunk], self._partial.ends[chunk]
            begin, stop = max(start, offset), min(end, offset + len(data))
            whole[begin - offset : stop - offset] = memoryview(piece)[begin - start : stop - start]
        return whole

    def extents(self, offset: int, length: int, limit: int) -> Sequence[tuple[int, bool]]:
        return self._partial.extents(offset, length, limit)

    def figures(self) -> dict[str, Any]:
        """How its reads fared."""
        told = {"reads": self.reads, "waits": self.waits, "failures": self.failures}
        return told | {"waited_s": round(self.waited_s, 3)}
