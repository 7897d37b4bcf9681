"""Push: from a disk image to a name in a store.

Windows of the disk are read, cut and hashed; chunks that the store does not hold are gathered into frames, compressed
and appended to packs, which are uploaded while the next are made. Then, each after what it points to: index part,
layout, manifest, name. Killed at any moment it leaves a store that verifies, and the rerun finds what arrived.

A pack that arrived is remembered on this machine before its index part is published: a rerun does not send it again.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imagestore.disks.changed import ChangedDisk, Changes
from imagestore.disks.disk import Disk, read_range
from imagestore.disks.filesystems import look
from imagestore.disks.open import open_disk
from imagestore.disks.unpack import check_work
from imagestore.disks.windows import Special, Window, Windows, in_order
from imagestore.errors import Corrupt, Invalid, NotFound, StoreError
from imagestore.formats import groups
from imagestore.formats.columns import Numbers, first_of_each
from imagestore.formats.digest import Digest
from imagestore.formats.keys import GROUPS
from imagestore.formats.manifest import MAX_DISK_BYTES, PAGE_BYTES, PAGED_CHUNKS, Manifest, check_labels
from imagestore.progress import Progress, Report, silent
from imagestore.store.index import LocalIndex
from imagestore.store.lookup import Lookup
from imagestore.store.names import check_architecture, check_name
from imagestore.store.packing import Framer, OpenFrame, Packer
from imagestore.store.placement import too_scattered
from imagestore.store.roots import can_be_read, offer
from imagestore.store.store import Store
from imagestore.updates.making import make_update

_PARTS_BYTES = 10 << 20  # most index parts that one push reads
_CHEAP = 64  # where so much less is new than there is, an update takes less than a quarter of the push's time
_READ_CHUNKS = 64  # chunks that are read at once where they are stored again


@dataclass(frozen=True, slots=True)
class PushResult:
    """What a push did. All figures but `digest` are bytes or counts of this push alone."""

    digest: Digest
    read_bytes: int  # bytes of the disk that are not holes
    new_bytes: int  # plain bytes of chunks that the store did not hold (or held too scattered)
    known_bytes: int
    written_bytes: int  # stored bytes of new packs
    changed: bool  # whether the name points somewhere else now
    notes: tuple[str, ...] = ()
    """With `sparsify`: which parts of the disk are stored whole all the same, and why. Of a changed disk: why all of
    it was looked at. With `update`: why there is none."""
    update_bytes: int = 0
    """With `update`: its bytes, 0 where frames are as good. What it leaves to frames of packs comes on top of them."""


def push(
    store: Store,
    path: Path,
    name: str | None,
    tag: str = "latest",
    *,
    architecture: str = os.uname().machine,
    labels: Mapping[str, str] | None = None,
    os_name: str = "",
    source: Mapping[str, str] | None = None,
    parent: Digest | None = None,
    format_: str | None = None,
    sparsify: bool = False,
    bounded: bool = False,
    update: bool | None = False,
    progress: Report = silent,
    cache: Path | None = None,
) -> PushResult:
    """Store the disk image at `path` and point `name:tag` at it for `architecture`; or, without a name, only store it.

    format_: raw, qcow2, vmdk, vhdx, vdi, vhd, or None to look. sparsify: leave out blocks that ext4 on it has free
    for certain. bounded: the file is a stranger's, and may mean no more work than its size allows.
    update: keep beside it what it costs who holds what the name pointed at before (`imagestore.updates`); None: where
    that is cheap, as little is new and the store is a directory.
    cache: directory of the local index instead of SF_CACHE_DIR.
    Raises Invalid for a bad image or name, Conflict when it is in use, and what the backend raises.
    """
    store.check_writable()
    check_name(name or "none"), check_name(tag, "tag")
    facts = {
        "architecture": check_architecture(architecture),
        "labels": check_labels(dict(labels or {}), "labels"),
        "os": os_name,
        "source": check_labels(dict(source or {}), "source"),
        "parent": parent,
    }
    with ExitStack() as stack:
        disk = stack.enter_context(open_disk(path, format_, progress))
        if bounded:
            check_work(disk, str(path), path.stat().st_size)
        writer = _Writer(stack, store, disk, progress, cache)
        special = look(disk, sparsify=sparsify)
        done = replace(writer.push(name, tag, facts, special), notes=special.notes)
    cheap = store.url.startswith("file:") and done.new_bytes < done.read_bytes // _CHEAP
    if (cheap if update is None else update) and writer.former:
        try:
            step = make_update(store, writer.former, done.digest)
            return replace(done, update_bytes=step.size_bytes if step else 0)
        except (StoreError, OSError) as err:  # the image is stored all the same
            return replace(done, notes=(*done.notes, f"no update was made: {err}"))
    return done


def push_changed(store: Store, disk: Disk, changes: Changes, labels: Mapping[str, str]) -> PushResult:
    """Store a disk that was the image `changes.base` of this store once, without a name, by a look at what changed.

    Where that image cannot help, all of the disk is looked at, which the result's notes say. Raises as `push` does.
    """
    store.check_writable()
    with ExitStack() as stack:
        writer = _Writer(stack, store, disk, silent, None)
        return writer.push_changed(changes, check_labels(dict(labels), "labels"))


class _Writer:
    """One push: has threads and, from the first look into the index on, a lease, which `stack` ends."""

    def __init__(
        self, stack: ExitStack, store: Store, disk: Disk, progress: Report, cache: Path | None
    ) -> None:
        self._store, self._disk, self._progress = store, disk, progress
        self._packer = Packer(store, "push", LocalIndex(store.info.id, cache))
        self._placement = self._packer.placement
        workers = min(8, len(os.sched_getaffinity(0)))
        self._pool, self._ahead = ThreadPoolExecutor(workers, "sf-push"), 4 * workers
        stack.callback(self._pool.shutdown, cancel_futures=True)
        self._lookup = stack.enter_context(Lookup(self._packer, parts_bytes=_PARTS_BYTES))
        stack.enter_context(self._packer)
        self._framer = Framer(self._placement)
        self._offsets, self._lengths, self._rows = (np.zeros(0, np.int64) for _ in range(3))
        self._seen_bytes = self._new_bytes = 0
        self.former: Digest | None = None  # what the name pointed at before

    def push(self, name: str | None, tag: str, facts: dict[str, Any], special: Special) -> PushResult:
        """The whole of it."""
        names, architecture = self._store.names, facts["architecture"]
        record = names.read(name, tag) if name else None
        images = record.images if record and not record.removed else {}
        self.former = current = images.get(architecture)
        parent = current or next(iter(images.values()), None)
        followed = self._lookup.follow(parent) if parent is not None else None
        windows = Windows(self._disk, self._store.info.chunker, self._pool, special)
        self._pack(self._new_chunks(windows))
        manifest = self._manifest(facts, windows.groups)
        digest = manifest.digest
        if digest == current and followed and can_be_read(self._store, digest, followed):
            return self._result(digest, changed=False)
        set_name = partial(names.set, name, tag, architecture, digest) if name else None
        self._offer(manifest, windows.groups, set_name)
        return self._result(digest, changed=digest != current)

    def push_changed(self, changes: Changes, labels: tuple[tuple[str, str], ...]) -> PushResult:
        """The whole of it for a disk that was an image once."""
        none = np.zeros(0, np.int64)
        special, sums, note = Special(none, none, none.reshape(0, 2)), dict[int, bytes](), ""
        facts: dict[str, Any] = {"architecture": os.uname().machine, "labels": labels}
        disk, olds = self._disk, (none, none, none)
        if changes.base is not None:
            if (found := self._lookup.follow(changes.base)) is None:
                raise NotFound(f"image {changes.base} is not in {self._store.url}")
            base, _ = found
            facts |= {"architecture": base.architecture, "os": base.os, "parent": changes.base}
            try:
                sums = self._sums(changes.base, base)
                disk = changed = ChangedDisk(self._disk, base, changes.stretches)
                special = replace(special, hints=changed.hints)
                sums = {number: sum_ for number, sum_ in sums.items() if number not in changed.groups}
                # The base's chunks were made known first, so that their rows are their numbers.
                kept = np.flatnonzero(changed.kept)
                olds = base.offsets[kept], base.lengths[kept].astype(np.int64), kept
            except (NotFound, Corrupt) as err:
                note = f"all of the disk was read: {err}"
        windows = Windows(disk, self._store.info.chunker, self._pool, special)
        self._pack(self._new_chunks(windows))
        sums = windows.groups | sums
        order = np.argsort(np.concatenate([olds[0], self._offsets]), kind="stable")
        both = zip(olds, (self._offsets, self._lengths, self._rows), strict=True)
        self._offsets, self._lengths, self._rows = (np.concatenate(two)[order] for two in both)
        manifest = self._manifest(facts, sums)
        self._offer(manifest, sums, None)
        return replace(self._result(manifest.digest, changed=True), notes=(note,) if note else ())

    def _sums(self, digest: Digest, base: Manifest) -> dict[int, bytes]:
        """Those behind the disk id of a base. Raises NotFound, Corrupt: then it saves no look at anything."""
        if base.chunker != self._store.info.chunker or base.size_bytes > self._disk.size_bytes:
            raise NotFound(f"{digest} is cut otherwise, or larger")
        data = self._store.backend.get(GROUPS.key(digest)).data
        return groups.decode(data, base.size_bytes, base.disk_id)

    def _manifest(self, facts: dict[str, Any], sums: groups.Groups) -> Manifest:
        """Its columns: chunks that adjoin are one run, as far as the page goes."""
        offsets, ends = self._offsets, self._offsets + self._lengths
        page_bytes = PAGE_BYTES if len(offsets) >= PAGED_CHUNKS else 0
        page = offsets // (page_bytes or MAX_DISK_BYTES)
        apart = (offsets[1:] != ends[:-1]) | (page[1:] != page[:-1])
        firsts = np.flatnonzero(np.concatenate([[True], apart])) if len(offsets) else offsets
        return Manifest(
            size_bytes=self._disk.size_bytes,
            run_offsets=offsets[firsts].astype(np.uint64),
            run_chunks=np.diff(firsts, append=len(offsets)).astype(np.uint32),
            lengths=self._lengths.astype(np.uint32),
            ids=self._placement.chunks.rows["id"][self._rows],
            page_bytes=page_bytes,
            chunker=self._store.info.chunker,
            disk_id=groups.disk_id(self._disk.size_bytes, sums),
            **facts,
        )

    def _offer(self, manifest: Manifest, sums: groups.Groups, set_name: Callable[[], object] | None) -> None:
        """The end: all that is needed to read the image, and then its name."""
        self._lookup.engage()
        self._store.backend.put(GROUPS.key(manifest.digest), groups.encode(sums))
        offer(self._packer, manifest, self._stored_again, set_name)

    def _result(self, digest: Digest, *, changed: bool) -> PushResult:
        self._report(self._disk.size_bytes)
        total = int(self._lengths.sum())
        known = max(total - self._new_bytes, 0)
        return PushResult(digest, total, self._new_bytes, known, self._packer.written_bytes, changed)

    def _report(self, done_bytes: int) -> None:
        size = self._disk.size_bytes
        counts = self._new_bytes, max(self._seen_bytes - self._new_bytes, 0), self._packer.written_bytes
        self._progress(Progress("push", min(done_bytes, size), size, *counts))

    def _pack(self, frames: Iterable[OpenFrame]) -> None:
        """Compress frames, pack and upload them; returns when all have arrived."""
        for number, frame in in_order(self._pool, OpenFrame.compressed, frames, self._ahead):
            self._packer.add(number, frame)
        self._packer.flush()

    def _new_chunks(self, windows: Windows) -> Iterator[OpenFrame]:
        """Frames of what the store does not hold; then `_offsets`, `_lengths` and `_rows` are known."""
        found: list[tuple[Numbers, Numbers, Numbers]] = []
        for window in self._lookup.ahead(windows):
            rows = self._placement.find(window.ids)
            unknown = np.flatnonzero(rows < 0)
            if len(unknown):
                self._add(window, unknown)
                yield from self._framer.full()
                rows[unknown] = self._placement.find(window.ids[unknown])
            self._seen_bytes += int(window.lengths.sum())
            found.append((window.offset + window.starts, window.lengths, rows))
            self._report(window.done_bytes)
        yield from self._framer.full(last=True)
        if found:
            self._offsets, self._lengths, self._rows = map(np.concatenate, zip(*found, strict=True))

    def _add(self, window: Window, unknown: Numbers) -> None:
        """Put chunks of a window into frames, each once."""
        once = np.sort(unknown[first_of_each(window.ids[unknown])])
        starts, lengths, view = window.starts[once].tolist(), window.lengths[once].tolist(), window.data.data
        chunks = (view[start : start + length] for start, length in zip(starts, lengths, strict=True))
        self._framer.add(chunks, window.ids[once])
        self._new_bytes += sum(lengths)

    def _stored_again(self) -> Numbers:
        """The rows; what lies in packs that are lost, or where a pull would meet too little of it, is stored again."""
        placement, rows = self._placement, self._rows
        poor = ~placement.usable | self._scattered()
        chosen = np.flatnonzero(poor[placement.chunks.rows["frame"][rows]])
        if not len(chosen):
            return rows
        _, firsts, which = np.unique(rows[chosen], return_index=True, return_inverse=True)
        order, first = np.argsort(firsts), len(placement.chunks.rows)
        once = chosen[firsts[order]]

        def again() -> Iterator[OpenFrame]:
            for some in np.split(once, range(_READ_CHUNKS, len(once), _READ_CHUNKS)):
                places = zip(self._offsets[some].tolist(), self._lengths[some].tolist(), strict=True)
                data = [read_range(self._disk, *place) for place in places]
                ids = placement.chunks.rows["id"][rows[some]]
                if b"".join(map(Digest.of, data)) != ids.tobytes():
                    hint = "push a copy or a snapshot of it"
                    raise Invalid("the disk changed while it was pushed", hint=hint)
                self._framer.add(data, ids)
                self._new_bytes += sum(map(len, data))
                yield from self._framer.full()
            yield from self._framer.full(last=True)

        self._pack(again())
        self._rows = rows.copy()
        self._rows[chosen] = first + np.argsort(order)[which]
        return self._rows

    def _scattered(self) -> npt.NDArray[np.bool_]:
        """By frame: whether it is used, and had better not be."""
        unique, once = np.unique(self._rows, return_index=True)
        frames = self._placement.frames
        of_chunk = self._placement.chunks.rows["frame"][unique]
        used = np.bincount(of_chunk, self._lengths[once], len(frames))
        of = np.flatnonzero(used)
        packs, starts, sizes = (frames[name][of].astype(np.int64) for name in ("pack", "offset", "size"))
        live = sizes * used[of] / np.maximum(frames["plain"][of], 1)
        drop = np.zeros(len(frames), np.bool_)
        drop[of] = too_scattered(packs, starts, sizes, live)
        return drop
