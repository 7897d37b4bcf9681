"""Push: from a disk image to a name in a store.

Windows of the disk are read, cut and hashed; chunks that the store does not hold are gathered into frames, compressed
and appended to packs, which are uploaded while the next are made. Then, each after what it points to: index part,
layout, manifest, name. Killed at any moment it leaves a store that verifies, and the rerun finds what arrived.

A pack that arrived is remembered on this machine before its index part is published: a rerun does not send it again.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from imagestore import ext4, index
from imagestore.backend import Buffer
from imagestore.columns import Ids
from imagestore.digest import Digest
from imagestore.disk import Disk, open_disk, read_range
from imagestore.errors import Corrupt, Invalid, NotFound
from imagestore.layout import Layout
from imagestore.leases import Lease
from imagestore.manifest import Manifest, check_labels
from imagestore.names import NameRecord, check_architecture, check_name
from imagestore.pack import FRAME_BYTES, LEVEL, MAX_PACK_BYTES, Footer, Frame, PackWriter, compress
from imagestore.progress import Progress, Report, silent
from imagestore.publish import publish
from imagestore.pull import REQUEST_BYTES
from imagestore.store import Store, derived_key
from imagestore.windows import Special, Window, Windows, in_order

PACK_BYTES = 16 << 20
_AHEAD_WINDOWS = 10
"""How far unknown chunks are looked up in the hooks before they count as new."""
_PARTS_BYTES = 10 << 20
"""Most index parts that one push reads."""
_SPARSE, _SCATTERED = 1.22, 1.6
"""A pull may fetch this many times the bytes, in this many times the requests, before chunks are stored again."""


@dataclass(frozen=True, slots=True)
class PushResult:
    """What a push did. All figures but `digest` are bytes or counts of this push alone."""

    digest: Digest
    read_bytes: int
    """Bytes of the disk that are not holes."""
    new_bytes: int
    """Plain bytes of chunks that the store did not hold (or held too scattered)."""
    known_bytes: int
    written_bytes: int
    """Stored bytes of new packs."""
    changed: bool
    """Whether the name points somewhere else now."""


@dataclass(slots=True)
class _Pieces:
    """A frame being filled: its number, its chunks and where their bytes are."""

    number: int
    pieces: list[memoryview] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ids: list[bytes] = field(default_factory=list)
    plain_bytes: int = 0


@dataclass(slots=True)
class _Where:
    """The chunks of the disk in its order: place and length in bytes, row in `Known`."""

    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


class _Frames:
    """Every frame that the new layout may use: columns, filled from layouts, footers and new packs."""

    def __init__(self) -> None:
        self.packs: list[Digest] = []
        self.usable: list[bool] = []
        self.pack, self.offset = index.Column("<i8"), index.Column("<i8")
        self.size, self.plain, self.codec = index.Column("<u4"), index.Column("<u4"), index.Column("u1")
        self.hash = index.Column("u1", 32)

    def add(self, pack: Any, offset: Any, size: Any, plain: Any, codec: Any, hashes: Ids) -> int:
        """Append frames; the number of the first."""
        columns = (self.offset, self.size, self.plain, self.codec, self.hash)
        for column, values in zip(columns, (offset, size, plain, codec, hashes), strict=True):
            column.extend(values)
        return self.pack.extend(pack)

    def add_footer(self, pack: Digest, footer: Footer, *, usable: bool) -> int:
        """Append the frames of a pack."""
        at = self.add_pack(pack, usable=usable)
        packs = np.full(len(footer.sizes), at)
        return self.add(packs, footer.offsets, footer.sizes, footer.plain_sizes, footer.codecs, footer.hashes)

    def add_pack(self, pack: Digest, *, usable: bool) -> int:
        """The number of a pack."""
        self.packs.append(pack)
        self.usable.append(usable)
        return len(self.packs) - 1

    @property
    def columns(self) -> tuple[index.Column, index.Column, index.Column]:
        """Pack, offset and stored size."""
        return self.pack, self.offset, self.size

    @property
    def usable_frames(self) -> npt.NDArray[np.bool_]:
        """By frame: whether its pack may be used. Frames not yet packed count."""
        packs = self.pack.values
        return np.where(packs < 0, True, np.array([*self.usable, True])[packs])


def push(
    store: Store,
    path: Path,
    name: str,
    tag: str = "latest",
    *,
    architecture: str = os.uname().machine,
    labels: Mapping[str, str] | None = None,
    os_name: str = "",
    parent: Digest | None = None,
    source: Mapping[str, str] | None = None,
    format_: str | None = None,
    sparsify: bool = False,
    progress: Report = silent,
    cache: Path | None = None,
) -> PushResult:
    """Store the disk image at `path` and point `name:tag` at it for `architecture`.

    format_: raw, qcow2, vmdk, vhdx, vdi, or None to look. sparsify: leave out blocks that the file system on it has
    free. cache: directory of the local index instead of SF_CACHE_DIR.
    Raises Invalid for a bad image or name, Conflict when it is in use, and what the backend raises.
    """
    store.check_writable()
    check_name(name), check_name(tag, "tag")
    facts = {
        "architecture": check_architecture(architecture),
        "labels": check_labels(dict(labels or {}), "labels"),
        "os": os_name,
        "parent": parent,
        "source": check_labels(dict(source or {}), "source"),
    }
    with ExitStack() as stack:
        disk = stack.enter_context(open_disk(path, format_))
        writer = stack.enter_context(Writer(store, disk, progress=progress, cache=cache))
        return writer.push(name, tag, facts, ext4.look(disk, sparsify=sparsify))


class Writer:
    """One push: a context manager that owns its threads and, from the first look into the index on, a lease."""

    def __init__(self, store: Store, disk: Disk, *, progress: Report, cache: Path | None = None) -> None:
        self._store, self._disk, self._progress = store, disk, progress
        self._lease = Lease(store, "push")
        self._repairs = 0
        self._stack = ExitStack()
        self._local = index.LocalIndex(store.info.id, cache)
        self._known, self._frames = index.Known(), _Frames()
        self._lineage: list[tuple[Digest, int, int]] = []
        self._engaged = False
        self._hooks = index.Hooks()
        self._asked: set[Digest] = set()
        self._parts_bytes = 0
        self._open: _Pieces | None = None
        self._salt = ""
        self._uploads: deque[Future[int]] = deque()
        self._packs: list[tuple[Digest, Footer]] = []
        self._compressors = local()
        self._new_bytes = self._known_bytes = self._written_bytes = 0

    def __enter__(self) -> "Writer":
        self._stack.__enter__()
        workers = min(8, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(workers, "sf-push")
        self._stack.callback(self._pool.shutdown, cancel_futures=True)
        self._senders = ThreadPoolExecutor(2, "sf-upload")
        self._stack.callback(self._senders.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def push(self, name: str, tag: str, facts: dict[str, Any], special: Special) -> PushResult:
        """The whole of it."""
        record = self._store.names.read(name, tag)
        self._follow(record, facts["architecture"])
        windows = Windows(self._disk, self._store.info.chunker, self._pool, special)
        offsets: list[npt.NDArray[np.int64]] = []
        lengths: list[npt.NDArray[np.int64]] = []
        rows: list[npt.NDArray[np.int64]] = []

        def sorted_out() -> Iterator[_Pieces]:
            for window in self._looked_ahead(windows):
                offsets.append(window.offset + window.starts)
                lengths.append(window.lengths)
                yield from self._sort_out(window, rows)
                self._report(window.done_bytes)
            yield from self._close_frame()

        self._store_frames(sorted_out())
        all_rows = np.concatenate([*rows, np.zeros(0, np.int64)])
        all_offsets = np.concatenate([*offsets, np.zeros(0, np.int64)])
        all_lengths = np.concatenate([*lengths, np.zeros(0, np.int64)])
        manifest = _manifest(
            self._disk.size_bytes, all_offsets, all_lengths, self._known.ids.values[all_rows],
            chunker=self._store.info.chunker, disk_id=windows.disk_id, **facts,
        )  # fmt: skip
        encoded = manifest.encode()
        digest = Digest.of(encoded)
        current = None if record.removed else record.images.get(facts["architecture"])
        if digest == current:
            return self._result(digest, all_lengths, changed=False)
        self._engage()
        where = _Where(all_offsets, all_lengths, all_rows)

        def repair(lost: set[Digest]) -> Layout:
            if lost:  # the same frames again must make a pack of another name
                self._repairs += 1
                self._salt = f"{self._lease.id}.{self._repairs}"
            for at, pack in enumerate(self._frames.packs):
                self._frames.usable[at] &= pack not in lost
            where.rows = self._again(where)
            self._publish_packs()
            return self._layout(digest, where.rows)

        layout = repair(set())
        layout.check(manifest)
        architecture = facts["architecture"]
        publish(
            self._store, self._lease, encoded, layout, repair,
            lambda: self._store.names.set(name, tag, architecture, digest),
        )  # fmt: skip
        return self._result(digest, all_lengths, changed=True)

    def _publish_packs(self) -> None:
        if self._packs:
            part = index.IndexPart(tuple(self._packs))
            self._local.keep(index.publish_part(self._store, part), part.encode())
            self._local.forget_packs(pack for pack, _ in self._packs)
            self._packs = []

    def _result(self, digest: Digest, lengths: npt.NDArray[np.int64], *, changed: bool) -> PushResult:
        self._report(self._disk.size_bytes)
        total = int(lengths.sum())
        known = max(total - self._new_bytes, 0)
        return PushResult(digest, total, self._new_bytes, known, self._written_bytes, changed)

    def _report(self, done_bytes: int) -> None:
        size = self._disk.size_bytes
        counts = (self._new_bytes, self._known_bytes, self._written_bytes)
        self._progress(Progress("push", min(done_bytes, size), size, *counts))

    # What the store holds

    def _follow(self, record: NameRecord, architecture: str) -> None:
        """Take the chunks of the name's image as known; where they lie is asked when it matters."""
        images = {} if record.removed else record.images
        digest = images.get(architecture) or next(iter(images.values()), None)
        if digest is None:
            return
        try:
            manifest = self._store.manifest(digest)
        except (NotFound, Corrupt):
            return
        count = len(manifest.ids)
        first = self._known.add(manifest.ids, np.full(count, -1), np.zeros(count, np.uint32))
        self._lineage.append((digest, first, first + count))

    def _engage(self) -> None:
        """Take a lease, then find out where chunks lie: before anything is relied on or written."""
        if self._engaged:
            return
        self._engaged = True
        self._stack.enter_context(self._lease)
        self._salt = self._lease.id
        layouts = [self._read_layout(digest) for digest, _, _ in self._lineage]
        unfinished = self._local.unfinished()
        named = {pack for layout in layouts if layout for pack in layout.packs}
        usable = self._reuse(named | {pack for pack, _ in unfinished})
        for layout, (_, first, end) in zip(layouts, self._lineage, strict=True):
            frames = self._known.frames.values[first:end]
            if layout is None or len(layout.chunk_frames) != end - first:
                at = self._frames.add_pack(Digest(bytes(32)), usable=False)
                frames[:] = self._frames.add([at], [0], [0], [0], [0], np.zeros((1, 32), np.uint8))
                continue
            numbers = [self._frames.add_pack(pack, usable=pack in usable) for pack in layout.packs]
            start = self._frames.add(
                np.array(numbers, np.int64)[layout.frame_packs], layout.frame_offsets, layout.frame_sizes,
                layout.frame_plain_sizes, layout.frame_codecs, layout.frame_hashes,
            )  # fmt: skip
            frames[:] = layout.chunk_frames.astype(np.int64) + start
            self._known.offsets.values[first:end] = layout.chunk_offsets
        there = self._load(unfinished, usable)
        self._local.forget_packs(pack for pack, _ in unfinished if pack not in there)
        self._hooks, _ = index.read_hooks(self._store)

    def _read_layout(self, manifest: Digest) -> Layout | None:
        try:
            return self._store.layout(manifest)
        except (NotFound, Corrupt):
            return None

    def _reuse(self, packs: set[Digest]) -> set[Digest]:
        """Those of `packs` that may be relied on (if they exist: a hint may be old)."""
        return self._lease.reuse(packs) if packs else packs

    def _load(self, footers: Iterable[tuple[Digest, Footer]], usable: set[Digest]) -> set[Digest]:
        """Make known what lies in packs that a hint told of; those that are there."""
        fresh = [
            (pack, footer) for pack, footer in footers if pack in usable and pack not in self._frames.packs
        ]
        there = set()
        for (pack, footer), exists in zip(fresh, self._senders.map(self._is_there, fresh), strict=True):
            if exists:
                there.add(pack)
                first = self._frames.add_footer(pack, footer, usable=True)
                self._known.add(footer.ids, first + footer.frame_of_chunk, footer.offset_in_frame)
        return there

    def _is_there(self, pack: tuple[Digest, Footer]) -> bool:
        try:
            stat = self._store.backend.stat(derived_key("packs", pack[0]))
        except NotFound:
            return False
        return stat.size_bytes >= pack[1].data_bytes

    def _find(self, ids: Ids) -> npt.NDArray[np.int64]:
        return self._known.find(ids, self._frames.usable_frames if self._engaged else None)

    def _looked_ahead(self, windows: Iterable[Window]) -> Iterator[Window]:
        """The windows again, some later, and the index parts loaded whose hooks they meet."""
        waiting: deque[Window] = deque()
        for window in windows:
            if len(window.ids) and not self._engaged and (self._find(window.ids) < 0).any():
                self._engage()
            waiting.append(window)
            if not self._hooks.parts:
                while waiting:
                    yield waiting.popleft()
                continue
            self._load_parts(window.ids)
            if len(waiting) > _AHEAD_WINDOWS:
                yield waiting.popleft()
        yield from waiting

    def _load_parts(self, ids: Ids) -> None:
        unknown = ids[self._find(ids) < 0]
        footers: list[tuple[Digest, Footer]] = []
        for name, size_bytes in self._hooks.matching(unknown) if len(unknown) else ():
            if name in self._asked:
                continue
            self._asked.add(name)
            part = self._local.get(name)
            if part is None and self._parts_bytes + size_bytes <= _PARTS_BYTES:
                self._parts_bytes += size_bytes
                part = self._read_part(name)
            footers += part.footers if part is not None else ()
        self._load(footers, self._reuse({pack for pack, _ in footers} - set(self._frames.packs)))

    def _read_part(self, name: Digest) -> index.IndexPart | None:
        try:
            data = self._store.backend.get(index.part_key(name)).data
            part = index.IndexPart.decode(data)
        except (NotFound, Corrupt):
            return None
        if Digest.of(data) != name:
            return None
        self._local.keep(name, data)
        return part

    # New chunks

    def _sort_out(self, window: Window, rows: list[npt.NDArray[np.int64]]) -> Iterator[_Pieces]:
        """Append the window's rows; its unknown chunks go into frames, of which the full ones are yielded."""
        found = self._find(window.ids)
        unknown = np.flatnonzero(found < 0)
        fresh: list[tuple[int, int, int]] = []
        number_of: dict[bytes, int] = {}
        added = 0
        view = window.data.data
        for at in unknown.tolist():
            id_ = window.ids[at].tobytes()
            if id_ in number_of:
                continue
            number_of[id_] = len(fresh)
            start, length = int(window.starts[at]), int(window.lengths[at])
            frame, offset, full = self._place(view[start : start + length], id_)
            fresh.append((at, frame, offset))
            if full is not None:
                yield full
        if fresh:
            chosen = np.array(fresh, np.int64)
            first = self._known.add(window.ids[chosen[:, 0]], chosen[:, 1], chosen[:, 2])
            found[unknown] = [first + number_of[window.ids[at].tobytes()] for at in unknown.tolist()]
            added = int(window.lengths[chosen[:, 0]].sum())
            self._new_bytes += added
        self._known_bytes += int(window.lengths.sum()) - added
        rows.append(found)

    def _place(self, data: memoryview, id_: bytes) -> tuple[int, int, _Pieces | None]:
        """(frame, offset in it) of a new chunk, and the frame before it if that is full now."""
        full = None
        if self._open is not None and self._open.plain_bytes + len(data) > FRAME_BYTES:
            full, self._open = self._open, None
        if self._open is None:
            number = self._frames.add([-1], [0], [0], [0], [0], np.zeros((1, 32), np.uint8))
            self._open = _Pieces(number)
        frame = self._open
        offset = frame.plain_bytes
        frame.pieces.append(data)
        frame.lengths.append(len(data))
        frame.ids.append(id_)
        frame.plain_bytes += len(data)
        return frame.number, offset, full

    def _close_frame(self) -> Iterator[_Pieces]:
        if self._open is not None:
            frame, self._open = self._open, None
            yield frame

    def _compress(self, frame: _Pieces) -> tuple[int, Frame]:
        """In a worker."""
        if not hasattr(self._compressors, "one"):
            self._compressors.one = zstandard.ZstdCompressor(level=LEVEL)
        plain: Buffer = frame.pieces[0] if len(frame.pieces) == 1 else b"".join(frame.pieces)
        codec, data = compress(self._compressors.one, plain)
        packed = Frame(codec, bytes(data), Digest.of(data), frame.plain_bytes, frame.lengths, frame.ids)
        return frame.number, packed

    def _store_frames(self, frames: Iterable[_Pieces]) -> None:
        """Compress frames, pack and upload them; returns when all have arrived."""
        ahead = 4 * self._pool._max_workers
        numbers: list[int] = []
        for number, frame in in_order(self._pool, self._compress, frames, ahead):
            if not numbers:  # not before: the salt is known once there is something to store
                pack = PackWriter(self._salt)
            pack.add(frame)
            numbers.append(number)
            if pack.size_bytes >= PACK_BYTES:
                self._send(pack, numbers)
                numbers = []
        if numbers:
            self._send(pack, numbers)
        while self._uploads:
            self._written_bytes += self._uploads.popleft().result()

    def _send(self, pack: PackWriter, numbers: list[int]) -> None:
        digest, footer, pieces = pack.finish()
        self._lease.made(digest)
        at = self._frames.add_pack(digest, usable=True)
        self._frames.pack.values[numbers] = at
        self._frames.offset.values[numbers] = footer.offsets
        self._frames.size.values[numbers] = footer.sizes
        self._frames.plain.values[numbers] = footer.plain_sizes
        self._frames.codec.values[numbers] = footer.codecs
        self._frames.hash.values[numbers] = footer.hashes
        self._packs.append((digest, footer))
        while len(self._uploads) >= 2:
            self._written_bytes += self._uploads.popleft().result()
        self._uploads.append(self._senders.submit(self._upload, digest, footer, pieces))

    def _upload(self, digest: Digest, footer: Footer, pieces: list[Buffer]) -> int:
        """In a sender; the bytes written. The hint comes first: who was killed in between finds out by asking."""
        self._local.keep_pack(digest, footer)
        self._store.backend.put(derived_key("packs", digest), pieces)
        return sum(len(piece) for piece in pieces)

    # Where it all lies

    def _again(self, where: "_Where") -> npt.NDArray[np.int64]:
        """Store again what lies in packs that are lost or in frames of which the image uses too little; all rows."""
        offsets, lengths, rows = where.offsets, where.lengths, where.rows
        frames = self._known.frames.values[rows]
        poor = ~self._frames.usable_frames
        poor |= self._sparse(frames, lengths, rows)
        chosen = np.flatnonzero(poor[frames])
        if not len(chosen):
            return rows
        _, firsts = np.unique(rows[chosen], return_index=True)
        placed: list[tuple[int, int, int]] = []

        def again() -> Iterator[_Pieces]:
            for at in chosen[np.sort(firsts)].tolist():
                data = read_range(self._disk, int(offsets[at]), int(lengths[at]))
                id_ = self._known.ids.values[rows[at]].tobytes()
                if Digest.of(data) != id_:
                    raise Invalid(
                        "the disk changed while it was pushed", hint="push a copy or a snapshot of it"
                    )
                frame, offset, full = self._place(memoryview(data), id_)
                placed.append((int(rows[at]), frame, offset))
                self._new_bytes += len(data)
                if full is not None:
                    yield full
            yield from self._close_frame()

        self._store_frames(again())
        moved = np.array(placed, np.int64)
        first = self._known.add(self._known.ids.values[moved[:, 0]].copy(), moved[:, 1], moved[:, 2])
        order = np.argsort(moved[:, 0])
        new = rows.copy()
        new[chosen] = first + order[np.searchsorted(moved[order, 0], rows[chosen])]
        return new

    def _sparse(
        self, frames: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Frames to leave so that a pull of this image needs few requests and few bytes that it does not use.

        Looked at in zones of packs as large as a request: a zone is left as a whole, for a frame left alone would be a
        gap that is read or that costs a request.
        """
        _, once = np.unique(rows, return_index=True)
        used = np.bincount(frames[once], lengths[once], len(self._frames.pack.values))
        of = np.flatnonzero(used)
        packs, starts, sizes = (column.values[of].astype(np.int64) for column in self._frames.columns)
        live = sizes * used[of] / np.maximum(self._frames.plain.values[of], 1)
        _, zone = np.unique(packs * MAX_PACK_BYTES + starts // REQUEST_BYTES, return_inverse=True)
        count = int(zone.max(initial=-1)) + 1
        first, last = np.full(count, np.iinfo(np.int64).max), np.zeros(count, np.int64)
        np.minimum.at(first, zone, starts)
        np.maximum.at(last, zone, starts + sizes)
        needed = np.bincount(zone, live, count)
        waste = last - first - needed
        total = needed.sum()
        order = np.argsort(-waste / np.maximum(needed, 1), kind="stable")
        too_much = waste.sum() - np.concatenate([[0], np.cumsum(waste[order])]) > (_SPARSE - 1) * total
        # A zone that is left needs its share of new requests.
        kept = count - np.arange(count + 1) + np.concatenate([[0], np.cumsum(needed[order])]) / REQUEST_BYTES
        too_many = kept > _SCATTERED * total / REQUEST_BYTES + 4
        left = order[: int(np.argmin(too_much | too_many))]
        drop = np.zeros(len(self._frames.pack.values), np.bool_)
        drop[of[np.isin(zone, left)]] = True
        return drop

    def _layout(self, manifest: Digest, rows: npt.NDArray[np.int64]) -> Layout:
        frames, chunk_frames = np.unique(self._known.frames.values[rows], return_inverse=True)
        order = np.lexsort((self._frames.offset.values[frames], self._frames.pack.values[frames]))
        place = np.empty(len(frames), np.int64)
        place[order] = np.arange(len(frames))
        frames = frames[order]
        packs, frame_packs = np.unique(self._frames.pack.values[frames], return_inverse=True)
        return Layout(
            manifest=manifest,
            packs=tuple(self._frames.packs[at] for at in packs.tolist()),
            frame_packs=frame_packs.astype(np.uint32),
            frame_offsets=self._frames.offset.values[frames].astype(np.uint32),
            frame_sizes=self._frames.size.values[frames],
            frame_plain_sizes=self._frames.plain.values[frames],
            frame_codecs=self._frames.codec.values[frames],
            frame_hashes=self._frames.hash.values[frames],
            chunk_frames=place[chunk_frames].astype(np.uint32),
            chunk_offsets=self._known.offsets.values[rows],
        )


def _manifest(
    size_bytes: int,
    offsets: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    ids: Ids,
    **facts: Any,
) -> Manifest:
    """Columns of a manifest: chunks that adjoin are one run."""
    ends = offsets + lengths
    firsts = np.flatnonzero(np.concatenate([[True], offsets[1:] != ends[:-1]])) if len(offsets) else offsets
    counts = np.diff(firsts, append=len(offsets))
    return Manifest(
        size_bytes=size_bytes,
        run_offsets=offsets[firsts].astype(np.uint64),
        run_chunks=counts.astype(np.uint32),
        lengths=lengths.astype(np.uint32),
        ids=ids,
        **facts,
    )
