"""The one reader of chunks: which ranges of packs hold them; read, checked, expanded. And where a node gets them from.

Whoever wants chunks has `Frames` of them: by an image's layout (`ImageReader`, which reads the layout once more where
a repack moved them meanwhile) or by a pack's footer. A request is a slice of frames whose stored bytes one range of a
pack holds; a frame is checked by its hash before it is expanded, a chunk by its id before it is used.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from imagestore.backends.protocol import Backend
from imagestore.disks.windows import in_order
from imagestore.errors import Corrupt, NotFound
from imagestore.formats import columns
from imagestore.formats.columns import Ids, Numbers, Rows
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.keys import PACKS
from imagestore.formats.layout import Layout, places
from imagestore.formats.manifest import Manifest, Pages
from imagestore.formats.pack import MAX_PACK_BYTES, Footer, expand
from imagestore.store.store import Store

T = TypeVar("T")
REQUEST_BYTES = 1 << 20  # stored bytes of one request that a guest waits for
BULK_BYTES = 8 << 20  # stored bytes of one request where all is wanted
READERS = 4  # requests under way at once where all is wanted
_READ_OVER, _REQUESTS = 0.12, 1.3
"""Gaps are read over while requests are more than so many times the fewest, up to this share of the bytes."""


def plan_requests(starts: Numbers, ends: Numbers, limit_bytes: int, *, bulk: bool = False) -> list[slice]:
    """Ranges, ascending, grouped into requests of up to `limit_bytes`: those that adjoin.

    bulk: where requests are many for the bytes, the smallest gaps are read over.
    """
    gaps = starts[1:] - ends[:-1]
    joined = gaps == 0
    if bulk:
        smallest, total = np.argsort(gaps, kind="stable"), int((ends - starts).sum())
        surplus = int(np.count_nonzero(gaps)) + 1 - int(_REQUESTS * total / limit_bytes)
        few = np.cumsum(gaps[smallest] > 0) <= surplus
        joined[smallest[few & (np.cumsum(gaps[smallest]) <= _READ_OVER * total)]] = True
    begins, stops, goes_on = starts.tolist(), ends.tolist(), [*joined.tolist(), False][: len(starts)]
    requests, first = list[slice](), 0
    for at, on in enumerate(goes_on, 1):
        if not on or stops[at] - begins[first] > limit_bytes:
            requests.append(slice(first, at))
            first = at
    return requests


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """Frames in the order of their places in packs, and the chunks that are wanted of each: columns over both."""

    packs: Sequence[Digest]
    table: Rows  # of `columns.FRAME`
    firsts: Numbers
    """Where the chunks of each frame begin in the columns below, and, last, where those of all end."""
    chunks: Numbers  # which chunks of the image (rows of the footer) these are
    inner: Numbers  # where each starts in the frame's plain bytes
    lengths: Numbers
    ids: Ids

    @classmethod
    def of_image(cls, manifest: Manifest | Pages, layout: Layout, chunks: Sequence[int] | Numbers) -> Self:
        """By a checked layout; of a frame's chunks those that are asked for, in the order given."""
        rows = np.asarray(chunks, np.int64)
        used, of_chunk = np.unique(layout.chunk_frames[rows], return_inverse=True)
        frames = layout.frames[used]
        order = np.argsort(places(frames), kind="stable")
        rank = np.argsort(order)[of_chunk]
        rows, counts = rows[np.argsort(rank, kind="stable")], np.bincount(rank)
        return cls(
            layout.packs, frames[order], np.append(0, np.cumsum(counts)), rows,
            layout.chunk_offsets[rows].astype(np.int64), manifest.lengths[rows].astype(np.int64), manifest.ids[rows],
        )  # fmt: skip

    @classmethod
    def of_pack(
        cls,
        pack: Digest,
        footer: Footer,
        chosen: npt.NDArray[np.bool_] | None = None,
        *,
        split_above: float = 1.0,
    ) -> Self:
        """All, or those that hold chosen chunks: whole where a share of up to `split_above` is not chosen."""
        frame_of = footer.frame_of_chunk
        chosen = np.ones(len(frame_of), np.bool_) if chosen is None else chosen
        used = np.bincount(frame_of[chosen], footer.lengths[chosen], len(footer.sizes)) / footer.plain_sizes
        rows = np.flatnonzero(chosen | ((used > 0) & (1 - used <= split_above))[frame_of])
        frames = np.flatnonzero(used)
        return cls(
            (pack,), footer.frames()[frames],
            np.append(0, np.cumsum(np.bincount(frame_of[rows], minlength=len(used))[frames])), rows,
            footer.offset_in_frame[rows], footer.lengths[rows].astype(np.int64), footer.ids[rows],
        )  # fmt: skip

    def whole(self, request: slice) -> npt.NDArray[np.bool_]:
        """By frame of a request: whether its chunks, in their order, are all of it."""
        rows, counts = self.rows(request), np.diff(self.firsts[request.start : request.stop + 1])
        lengths, firsts = self.lengths[rows], np.cumsum(counts) - counts
        there = np.logical_and.reduceat(self.inner[rows] == columns.starts(lengths, counts), firsts)
        whole: npt.NDArray[np.bool_] = np.add.reduceat(lengths, firsts) == self.table["plain"][request]
        return whole & there

    def rows(self, frames: int | slice) -> slice:
        """Where the chunks of a frame, or of a request's, stand in the columns."""
        first, last = (frames, frames + 1) if isinstance(frames, int) else (frames.start, frames.stop)
        return slice(int(self.firsts[first]), int(self.firsts[last]))

    def requests(self, limit_bytes: int = BULK_BYTES, *, bulk: bool = True) -> list[slice]:
        """All frames, in as many requests as `plan_requests` makes of them."""
        starts = places(self.table)
        return plan_requests(starts, starts + self.table["size"], limit_bytes, bulk=bulk)

    def read(self, request: slice, store: Backend) -> list[memoryview]:
        """The stored bytes of a request's frames, right ones. Raises Corrupt, NotFound, Unavailable."""
        frames = self.table[request]
        start, begins = int(frames["offset"][0]), frames["offset"] - frames["offset"][0]
        ends, key = (begins + frames["size"]).tolist(), PACKS.key(self.packs[frames["pack"][0]])
        data = memoryview(store.get(key, start, ends[-1]).data)
        stored = [data[begin:end] for begin, end in zip(begins.tolist(), ends, strict=True)]
        digests = b"".join(blake3(piece).digest() for piece in stored)
        if digests != frames["hash"].tobytes() or len(data) != ends[-1]:
            reason = f"{store.url}/{key}: bytes {start} to {start + ends[-1]} do not match their hash"
            raise Corrupt(reason, hint="`sf store verify --repair-from URL`")
        return stored

    def expand(self, frame: int, stored: Buffer) -> memoryview:
        """The plain bytes of a frame. Raises Corrupt."""
        return memoryview(expand(int(self.table["codec"][frame]), stored, int(self.table["plain"][frame])))

    def cut(self, frame: int, plain: memoryview) -> list[memoryview]:
        """The wanted chunks of a frame, not checked yet."""
        rows = self.rows(frame)
        parts = zip(self.inner[rows].tolist(), self.lengths[rows].tolist(), strict=True)
        return [plain[start : start + length] for start, length in parts]

    def check(self, frame: int, pieces: Sequence[Buffer]) -> None:
        """Raises Corrupt unless these are the wanted chunks."""
        if b"".join(blake3(piece).digest() for piece in pieces) != self.ids[self.rows(frame)].tobytes():
            pack = self.packs[self.table["pack"][frame]]
            raise Corrupt(f"a chunk in pack {pack} is not what its id says")

    def load(self, request: slice, store: Backend) -> "Loaded":
        """Read a request, expand it, check every wanted chunk. Raises Corrupt, NotFound, Unavailable."""
        loaded = Loaded(self, request, self.read(request, store), [])
        for frame, stored in enumerate(loaded.stored, request.start):
            pieces = self.cut(frame, self.expand(frame, stored))
            self.check(frame, pieces)
            loaded.pieces.append(pieces)
        return loaded


class Loaded(NamedTuple):
    """What one request brought, checked: of each frame its stored bytes, and its wanted chunks."""

    frames: Frames
    request: slice
    stored: list[memoryview]
    pieces: list[list[memoryview]]

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        """Each wanted chunk: which of the image it is, and its bytes."""
        numbers = self.frames.chunks[self.frames.rows(self.request)].tolist()
        return zip(numbers, chain.from_iterable(self.pieces), strict=True)


def load(store: Store, wanted: Iterable[Frames], limit_bytes: int = BULK_BYTES) -> Iterator[Loaded]:
    """All of them, some requests ahead of who looks at them. Raises Corrupt, NotFound, Unavailable."""
    requests = ((frames, request) for frames in wanted for request in frames.requests(limit_bytes))
    with ThreadPoolExecutor(READERS, "sf-read") as pool:
        yield from in_order(pool, lambda one: one[0].load(one[1], store.backend), requests, READERS)


def read_pages(store: Store, head: Layout, rows: range) -> list[bytes]:
    """Some of the pages that the head of a layout places, checked. Raises NotFound, Corrupt, Unavailable."""
    parts = load(store, [Frames.of_image(head.pages, head, rows)], MAX_PACK_BYTES)
    found = {row: bytes(piece) for loaded in parts for row, piece in loaded.chunks()}
    return [found[row] for row in rows]


class ImageReader:
    """The chunks of one image in a store. `store` opens it, or raises StoreError: it may be there when needed.

    layout: if it was read and checked already.
    """

    def __init__(
        self, store: Callable[[], Store], digest: Digest, manifest: Manifest, layout: Layout | None = None
    ) -> None:
        self.store, self.digest, self.manifest, self._layout = store, digest, manifest, layout

    def layout(self, *, again: bool = False) -> Layout:
        """The layout, read once (or once more, since a repack replaces it). Raises StoreError."""
        if self._layout is None or again:
            layout = self.store().layout(self.digest)
            layout.check(self.manifest)
            self._layout = layout
        return self._layout

    def each(
        self,
        chunks: Sequence[int] | Numbers,
        work: Callable[[Frames, slice], T],
        pool: Executor | None = None,
        limit_bytes: int = BULK_BYTES,
    ) -> Iterator[T]:
        """`work` on every request that these chunks need, in the order of packs; with a pool `READERS` at once.

        Where a pack is missing the rest is done by the layout as it is then. Raises StoreError.
        """
        rest, done = np.asarray(chunks, np.int64), list[Numbers]()
        for again in (False, True):
            frames = Frames.of_image(self.manifest, self.layout(again=again), rest)
            requests = frames.requests(limit_bytes, bulk=pool is not None)

            def one(request: slice, frames: Frames = frames) -> tuple[slice, T]:
                return request, work(frames, request)

            try:
                for request, result in in_order(pool, one, requests, READERS) if pool else map(one, requests):
                    done.append(frames.chunks[frames.rows(request)])
                    yield result
                return
            except NotFound:
                if again:
                    raise
                rest = rest[~np.isin(rest, np.concatenate([rest[:0], *done]))]

    def load(self, chunks: Sequence[int] | Numbers, pool: Executor | None = None) -> Iterator[Loaded]:
        """These chunks, checked. Raises Corrupt, NotFound, Unavailable."""
        return self.each(chunks, lambda frames, request: frames.load(request, self.store().backend), pool)


@dataclass(frozen=True, slots=True)
class Batch:
    """Some chunks (ascending), their bytes, and how many bytes crossed a wire for them."""

    chunks: Sequence[int]
    pieces: Sequence[Buffer]
    received_bytes: int
    clone: tuple[int, int] | None = None
    """File descriptor and offset to copy a single chunk from, instead of writing its bytes."""


class Origin(Protocol):
    """Where a node gets chunks from: other images on it, its peers, stores. The cache hashes what comes.

    Called from several threads. Raises StoreError; what it yielded before an error may be used.
    """

    name: str
    kind: str  # local, peer or store: the label in figures

    def fetch(self, chunks: Sequence[int]) -> Iterator[Batch]:
        """What it has of these chunks (ascending); it may leave some out."""
        ...


class StoreOrigin(ImageReader):
    """Whole frames from a store, in ranges of packs, placed by the layout that this store has."""

    kind = "store"

    def __init__(self, name: str, store: Callable[[], Store], digest: Digest, manifest: Manifest) -> None:
        super().__init__(store, digest, manifest)
        self.name = name

    def fetch(self, chunks: Sequence[int]) -> Iterator[Batch]:
        return self.each(chunks, self._batch, limit_bytes=REQUEST_BYTES)

    def _batch(self, frames: Frames, request: slice) -> Batch:
        stored = frames.read(request, self.store().backend)
        cut = (frames.cut(at, frames.expand(at, data)) for at, data in enumerate(stored, request.start))
        found = [piece for pieces in cut for piece in pieces]
        chunks = frames.chunks[frames.rows(request)]
        order = np.argsort(chunks).tolist()
        return Batch(chunks[order].tolist(), [found[at] for at in order], sum(map(len, stored)))


class LocalOrigin:
    """Chunks that other images of this node's cache hold, complete or not."""

    name, kind = "this node", "local"

    def __init__(self, manifest: Manifest) -> None:
        self._lengths, self._ids = manifest.lengths, manifest.ids
        self._sources: list[tuple[int, bytearray | None]] = []
        self._source, self._rows, self._offsets = np.full((3, len(manifest.ids)), -1, np.int64)

    def add(self, path: Path, other: Manifest, present: bytearray | None) -> None:
        """Use what `path`, an image with the manifest `other`, has and no one before it.

        present: live flags per chunk, None for all. Fetches may be under way.
        """
        missing = np.flatnonzero(self._source < 0)
        rows = columns.find(self._ids[missing], other.ids)
        taken, rows = missing[rows >= 0], rows[rows >= 0]
        with contextlib.suppress(OSError):
            if len(taken):
                self._sources.append((os.open(path, os.O_RDONLY | os.O_CLOEXEC), present))
                self._rows[taken], self._offsets[taken] = rows, other.offsets[rows]
                self._source[taken] = len(self._sources) - 1

    def fetch(self, chunks: Sequence[int] | Numbers) -> Iterator[Batch]:
        at = np.asarray(chunks, np.int64)
        at = at[self._source[at] >= 0]
        places = (at, self._source[at], self._rows[at], self._offsets[at], self._lengths[at])
        for chunk, source, row, offset, length in zip(*(one.tolist() for one in places), strict=True):
            fd, present = self._sources[source]
            if present is None or present[row]:
                data = os.pread(fd, length, offset)
                yield Batch((chunk,), (data,), len(data), (fd, offset))

    def close(self) -> None:
        """Let go of the other images' files. Nothing may be fetching any more."""
        self._source[:] = -1
        while self._sources:
            os.close(self._sources.pop()[0])
