"""Pull: from a manifest to a raw or qcow2 file, every byte verified, only what is missing fetched.

A file is written beside its place and renamed when it is whole, a block device itself. What a pull that was cut off
left there is hashed and kept. Chunks that other local images hold are copied; the rest comes in ranges of frames.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from blake3 import blake3

from imagestore.disks.output import Output, target
from imagestore.disks.qcow2.writer import plan
from imagestore.disks.windows import in_order
from imagestore.errors import DISK_FULL, Conflict, Corrupt, Invalid, NoSpace, StoreError
from imagestore.formats.columns import Numbers
from imagestore.formats.digest import Digest
from imagestore.formats.layout import Image
from imagestore.formats.pack import MAX_FRAME_BYTES
from imagestore.progress import Progress, Report, silent
from imagestore.store.frames import READERS, Batch, Frames, ImageReader, LocalOrigin
from imagestore.store.store import Store
from imagestore.updates.using import Seed, UpdateOrigin

_COPY_CHUNKS = 256
_PROBED_CHUNKS, _GZIP_BYTES_S = 8, 8 << 20  # so few tell how fast the line is; what gzip makes of a file


@dataclass(frozen=True, slots=True)
class PullResult:
    """Bytes: of the disk that are no holes, fetched (stored), copied from seeds, found in an unfinished pull."""

    data_bytes: int
    fetched_bytes: int
    seeded_bytes: int
    resumed_bytes: int
    requests: int


def pull(
    store: Store,
    digest: Digest,
    output: Path,
    *,
    format_: str = "qcow2",
    seeds: Sequence[Seed] = (),
    progress: Report = silent,
    durable: bool = True,
) -> PullResult:
    """Write the image `digest` to `output` as raw or qcow2: to a file, replaced when whole, or onto a block device.

    progress: what it raises, of imagestore's errors, ends the pull. durable: fsync before the rename.
    Raises NotFound, Corrupt, Unavailable, NoSpace; Invalid for a path that cannot be written.
    """
    if format_ not in ("raw", "qcow2"):
        raise Invalid(f"cannot write format {format_!r}", hint="raw or qcow2")
    manifest, _ = image = store.image(digest)
    try:
        with target(output, f"{digest.hex()[:16]}.{format_}") as place, ExitStack() as stack:
            try:
                qcow2 = plan(manifest) if format_ == "qcow2" else None
                file = Output(place, manifest.size_bytes, qcow2, durable=durable)
                stack.callback(file.close)
                filling = _Filling(file, image, digest, progress)
                try:
                    result = filling.fill(store, seeds)
                except StoreError:
                    if not filling.began:
                        place.discard()
                    raise
                file.finish()
                place.commit()
            except OSError:
                place.discard()
                raise
    except BlockingIOError as error:
        raise Conflict(f"another pull is writing {output}") from error
    except OSError as error:
        if error.errno in DISK_FULL:
            raise NoSpace(f"no space left for {output}") from error
        raise Invalid(f"cannot write {output}: {os.strerror(error.errno or errno.EIO)}") from error
    return result


def _readable(origin: LocalOrigin, chunks: Numbers) -> Iterator[Batch]:
    """Of these chunks those before the first that cannot be read: a bad sector of a seed is no error of the pull."""
    with suppress(OSError):
        yield from origin.fetch(chunks)


class _Filling:
    """Brings the chunks of one manifest into one file."""

    def __init__(self, file: Output, image: Image, digest: Digest, progress: Report) -> None:
        self._file, self._digest, self._progress = file, digest, progress
        self._manifest, self._layout = image
        self._offsets = self._manifest.offsets
        self._lengths, self._ids = self._manifest.lengths.astype(np.int64), self._manifest.ids
        self._have = np.zeros(len(self._lengths), np.bool_)
        self._resumed = self._seeded = self._fetched = self._requests = 0

    def fill(self, store: Store, seeds: Sequence[Seed]) -> PullResult:
        """Until the file is whole."""
        with ThreadPoolExecutor(READERS, "sf-pull") as pool:
            if self._file.resumed:
                self._resumed = self._take(pool, self._in_place)
            for seed in seeds:
                with closing(LocalOrigin(self._manifest)) as here:
                    here.add(seed.path, seed.manifest, None)
                    self._seeded += self._take(pool, partial(_readable, here))
            missing = np.flatnonzero(~self._have)
            self._file.allocate(self._offsets[missing], self._lengths[missing])
            with closing(UpdateOrigin(lambda: store, self._digest, self._manifest, seeds)) as update:
                self._fetch_update(pool, update, store)
            if not self._have.all():
                self._fetch(pool, store, np.flatnonzero(~self._have))
        if not self._have.all():
            raise Corrupt(f"the image {self._digest} is not whole after all")
        data_bytes = int(self._lengths.sum())
        return PullResult(data_bytes, self._fetched, self._seeded, self._resumed, self._requests)

    @property
    def began(self) -> bool:
        """Whether the file holds anything that a later pull could use."""
        return bool(self._have.any())

    def _report(self) -> None:
        done, total = int(self._lengths[self._have].sum()), int(self._lengths.sum())
        known = self._resumed + self._seeded
        self._progress(Progress("pull", done, total, done - known, known, self._fetched))

    # What is here already

    def _in_place(self, chunks: Numbers) -> Iterator[Batch]:
        for chunk in chunks.tolist():
            data = self._file.read(int(self._offsets[chunk]), int(self._lengths[chunk]))
            yield Batch((chunk,), (data,), 0)

    def _take(self, pool: ThreadPoolExecutor, batches: Callable[[Numbers], Iterator[Batch]]) -> int:
        """Keep the missing chunks that are right; how many bytes that were."""
        missing = np.flatnonzero(~self._have)
        parts = np.split(missing, range(_COPY_CHUNKS, len(missing), _COPY_CHUNKS))

        def work(part: Numbers) -> tuple[list[int], int]:
            good, copied = list[int](), 0
            for batch in batches(part):
                chunk, data = batch.chunks[0], memoryview(batch.pieces[0])
                if blake3(data).digest() == self._ids[chunk].tobytes():
                    if batch.clone is not None:
                        self._file.put(int(self._offsets[chunk]), data)
                        copied += len(data)
                    good.append(chunk)
            return good, copied

        total = 0
        for good, copied in in_order(pool, work, parts, READERS):
            self._have[good] = True
            total += int(self._lengths[good].sum())
            self._file.written(copied)
            self._report()
        return total

    # What comes from the store

    def _fetch_update(self, pool: ThreadPoolExecutor, update: UpdateOrigin, store: Store) -> None:
        """What an update from a seed brings; files that gzip makes again only where it is faster than the line is."""

        def work(frames: Numbers) -> tuple[list[int], int]:
            batches = update.load(frames)
            every = [pair for one in batches for pair in zip(one.chunks, one.pieces, strict=True)]
            for chunk, piece in every:
                self._file.put(int(self._offsets[chunk]), memoryview(piece))
            return [chunk for chunk, _ in every], sum(batch.received_bytes for batch in batches)

        small = update.requests(np.flatnonzero(~self._have), MAX_FRAME_BYTES)
        self._came(in_order(pool, work, small, READERS))
        missing = np.flatnonzero(~self._have)
        files = update.requests(missing)
        if files:
            began_s, before, inside = time.monotonic(), self._fetched, np.isin(missing, update.chunks)
            some = missing[inside][:_PROBED_CHUNKS]
            self._fetch(pool, store, np.concatenate([missing[~inside], some]))
            if self._fetched - before < _GZIP_BYTES_S * (time.monotonic() - began_s):
                self._came(in_order(pool, work, files, READERS))

    def _came(self, answers: Iterator[tuple[Sequence[int] | Numbers, int]]) -> None:
        """Note what each request brought: chunks that are written, and how many bytes it took."""
        for chunks, fetched in answers:
            self._have[chunks] = True
            self._file.written(int(self._lengths[chunks].sum()))
            self._fetched += fetched
            self._requests += 1
            self._report()

    def _fetch(self, pool: ThreadPoolExecutor, store: Store, missing: Numbers) -> None:
        """Chunks, in frames of packs."""
        reader = ImageReader(lambda: store, self._digest, self._manifest, self._layout)
        reader.layout()

        def fetch(frames: Frames, request: slice) -> tuple[Numbers, int]:
            """In the pool: read, verify and write; the chunks, and the bytes fetched."""
            try:
                stored = frames.read(request, store.backend)
            except Corrupt:  # on its way, perhaps
                stored = frames.read(request, store.backend)
            for frame, data in enumerate(stored, request.start):
                self._unpack(frames, frame, data)
            return frames.chunks[frames.rows(request)], sum(map(len, stored))

        self._came(reader.each(missing, fetch, pool))

    def _unpack(self, frames: Frames, frame: int, stored: memoryview) -> None:
        """Verify the wanted chunks of a frame and write them, neighbours together. Raises Corrupt."""
        plain = frames.expand(frame, stored)
        frames.check(frame, frames.cut(frame, plain))
        rows = frames.rows(frame)
        starts, places = frames.inner[rows], self._offsets[frames.chunks[rows]]
        ends = starts + frames.lengths[rows]
        breaks = np.flatnonzero((starts[1:] != ends[:-1]) | (np.diff(places) != np.diff(starts))) + 1
        firsts, lasts = np.append(0, breaks), np.append(breaks, len(starts)) - 1
        stretches = (starts[firsts].tolist(), ends[lasts].tolist(), places[firsts].tolist())
        for start, end, place in zip(*stretches, strict=True):
            self._file.put(place, plain[start:end])
