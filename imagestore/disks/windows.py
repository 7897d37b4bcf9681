"""From a disk to hashed chunks: windows are read, cut and hashed in threads, in disk order, in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from imagestore.disks.chunker import U64, block_sums, cut, runs, zero_blocks
from imagestore.disks.disk import Disk, read_data
from imagestore.formats.chunking import BLOCK, ChunkerParams
from imagestore.formats.columns import Ids
from imagestore.formats.groups import GROUP_BYTES

WINDOW_BYTES = GROUP_BYTES
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Some chunks of a disk with their bytes."""

    offset: int  # where `data` starts on the disk
    data: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]  # where each chunk starts in `data`
    lengths: npt.NDArray[np.int64]
    ids: Ids
    done_bytes: int  # everything on the disk before this has been read


@dataclass(frozen=True, slots=True)
class Special:
    """What the file system on a disk tells the chunker, in blocks of 4 KiB of the disk."""

    cuts: npt.NDArray[np.int64]  # sorted: where large files start and end
    hints: npt.NDArray[np.int64]  # sorted: where any file starts and ends
    free: npt.NDArray[np.int64]  # sorted (start, end) rows that are to be read as zeros
    notes: tuple[str, ...] = ()  # where free blocks are read all the same, and why


def in_order(pool: Executor, function: Callable[[_T], _R], items: Iterable[_T], ahead: int) -> Iterator[_R]:
    """map() over a pool that works at most `ahead` items ahead of its consumer."""
    pending: deque[Future[_R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


class Windows:
    """All chunks of a disk; after the last window all `groups` are known."""

    def __init__(self, disk: Disk, params: ChunkerParams, pool: Executor, special: Special) -> None:
        self._disk, self._params, self._pool, self._special = disk, params, pool, special
        self.groups: dict[int, bytes] = {}  # `formats.groups.Groups`

    def __iter__(self) -> Iterator[Window]:
        read = in_order(self._pool, self._read, self._offsets(), ahead=3)
        return in_order(self._pool, self._hash, self._cut(read), ahead=3)

    def _offsets(self) -> Iterator[tuple[int, bool]]:
        """Windows with data, each with whether none adjoins behind it."""
        data = self._disk.next_data(0)
        while data is not None:
            start = data[0] // WINDOW_BYTES * WINDOW_BYTES
            at = start + WINDOW_BYTES
            data = self._disk.next_data(at)
            yield start, data is None or data[0] >= at + WINDOW_BYTES

    def _read(self, window: tuple[int, bool]) -> "_Read":
        offset, final = window
        used = min(WINDOW_BYTES, self._disk.size_bytes - offset)
        front = self._params.max_bytes
        buffer = np.empty(front + -(-used // BLOCK) * BLOCK, np.uint8)
        data = buffer[front:]
        view = data.data
        read_data(self._disk, offset, view[:used])
        data[used:] = 0
        for first, last in self._free_inside(offset, len(data)):
            data[first:last] = 0
        sums = block_sums(data)
        zero = zero_blocks(data, sums)
        hasher = blake3(np.packbits(zero).tobytes())
        for first, last in runs(~zero):
            hasher.update(view[first * BLOCK : last * BLOCK])
        return _Read(offset, final, buffer, sums, zero, hasher.digest())

    def _free_inside(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        free = self._special.free
        low = int(np.searchsorted(free[:, 1], offset // BLOCK, side="right"))
        for start, end in free[low:].tolist():
            if start * BLOCK >= offset + length:
                return
            yield max(start * BLOCK - offset, 0), min(end * BLOCK - offset, length)

    def _cut(self, windows: Iterable["_Read"]) -> Iterator["_Cut"]:
        carried = np.zeros(0, np.uint8)
        carried_sums, carried_zero = np.zeros(0, np.uint64), np.zeros(0, np.bool_)
        for read in windows:
            if not read.zero.all():
                self.groups[read.offset // WINDOW_BYTES] = read.hash
            at = self._params.max_bytes - len(carried)
            read.buffer[at : at + len(carried)] = carried
            data = read.buffer[at:]
            first = read.offset - len(carried)
            sums = np.concatenate([carried_sums, read.sums])
            zero = np.concatenate([carried_zero, read.zero])
            told = (self._special.cuts, self._special.hints)
            chunks, used = cut(sums, zero, first // BLOCK, *told, self._params, final=read.final)
            carried, carried_sums, carried_zero = data[used * BLOCK :], sums[used:], zero[used:]
            yield _Cut(first, data, np.array(chunks, np.int64).reshape(-1, 2) * BLOCK, first + used * BLOCK)

    def _hash(self, part: "_Cut") -> Window:
        starts, ends = part.chunks[:, 0], np.minimum(part.chunks[:, 1], self._disk.size_bytes - part.offset)
        view, places = part.data.data, zip(starts.tolist(), ends.tolist(), strict=True)
        ids = b"".join(blake3(view[start:end]).digest() for start, end in places)
        rows = np.frombuffer(ids, np.uint8).reshape(-1, 32)
        return Window(part.offset, part.data, starts, ends - starts, rows, part.done)


class _Read(NamedTuple):
    offset: int
    final: bool
    buffer: npt.NDArray[np.uint8]  # room for what the window before left over, then the window's bytes
    sums: U64
    zero: npt.NDArray[np.bool_]
    hash: bytes


class _Cut(NamedTuple):
    offset: int
    data: npt.NDArray[np.uint8]
    chunks: npt.NDArray[np.int64]
    done: int
