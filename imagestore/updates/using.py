"""Chunks out of updates, for who holds the image that they begin with: a seed of a pull, a node's cache."""

import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import zstandard

from imagestore.errors import Corrupt, NotFound, StoreError, Unsupported
from imagestore.formats.columns import Numbers
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.keys import DELTAS, UPDATES
from imagestore.formats.manifest import Manifest
from imagestore.formats.pack import MAX_FRAME_BYTES
from imagestore.formats.update import Step, Update, decode_steps, firsts
from imagestore.store.frames import REQUEST_BYTES, Batch, ImageReader, plan_requests
from imagestore.store.store import Store
from imagestore.updates.coding import unpack

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seed:
    """A complete raw disk on this machine and what it holds. It is not trusted: what is copied is hashed."""

    manifest: Manifest
    path: Path
    reader: ImageReader | None = None  # of a store that has it, in place of a disk


def read_steps(store: Store, to: Digest) -> dict[Digest, Step]:
    """Which updates lead to an image, by the image that each begins with; none where that cannot be told."""
    with suppress(NotFound, Corrupt, Unsupported):
        return decode_steps(store.backend.get(UPDATES.key(to)).data, UPDATES.key(to))
    return {}


class UpdateOrigin:
    """The chunks that an update brings whoever holds one of some images; an `imagestore.store.frames.Origin`.

    Nothing of it is believed: a wrong, cut or swapped one brings nothing any more, which is said once, and neither do
    changed bytes of what is held.
    """

    name, kind = "an update", "update"

    def __init__(
        self, store: Callable[[], Store], digest: Digest, manifest: Manifest, seeds: Sequence[Seed]
    ) -> None:
        self._store, self._digest, self._manifest, self._seeds = store, digest, manifest, seeds
        self._update: Update | None = None
        self.chunks = np.zeros(0, np.uint32)  # which it brings, once it was asked
        self._descriptor, self._failed = -1, False

    def fetch(self, chunks: Sequence[int]) -> Iterator[Batch]:
        for request in self.requests(np.asarray(chunks, np.int64), MAX_FRAME_BYTES):
            yield from self.load(request)

    def requests(self, chunks: Numbers, most_bytes: int = 1 << 62) -> list[Numbers]:
        """The frames with these chunks, up to a size (a guest waits), those of a request together; or none."""
        update = self._opened()
        if update is None:
            return []
        wanted, begins = np.isin(update.chunks, chunks), firsts(update.counts)[:-1]
        small = np.add.reduceat(self._manifest.lengths[update.chunks], begins, dtype=np.int64) <= most_bytes
        frames = np.flatnonzero(np.logical_or.reduceat(wanted, begins) & small)
        starts, ends = self._ends[frames], self._ends[frames + 1]
        return [frames[part] for part in plan_requests(starts, ends, 2 * REQUEST_BYTES)]

    def load(self, frames: Numbers) -> list[Batch]:
        """Adjoining frames, each a batch, checked; fewer, or none, where one is odd."""
        found, update, ends = list[Batch](), self._update, self._ends[frames[0] : frames[-1] + 2].tolist()
        if update is None:
            return found
        try:
            data = memoryview(self._store().backend.get(self._key, ends[0], ends[-1] - ends[0]).data)
            for frame, (start, end) in zip(frames.tolist(), pairwise(ends), strict=True):
                found.append(self._batch(update, frame, data[start - ends[0] : end - ends[0]]))
        except (StoreError, OSError, zstandard.ZstdError, zlib.error, struct.error) as error:
            self._give_up(error)
        return found

    def close(self) -> None:
        """Let go of the seed. Nothing may be fetching any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._seeds, self._update, self._descriptor = (), None, -1

    def _opened(self) -> Update | None:
        """The first update that there is from a seed."""
        seeds, self._seeds = self._seeds, ()
        try:
            steps = read_steps(self._store(), self._digest) if seeds else {}
            for seed, base in ((seed, seed.manifest.digest) for seed in seeds if steps):
                if step := steps.get(base):
                    self._key = DELTAS.key(step.name)
                    head = self._store().backend.get(self._key, 0, step.head_bytes).data
                    update = Update.decode(head, step.name, base, self._digest)
                    update.check(seed.manifest, self._manifest)
                    self._ends = len(head) + firsts(update.sizes)
                    self._base, self._places, self._reader = seed.manifest, seed.manifest.offsets, seed.reader
                    if not self._reader:
                        self._descriptor = os.open(seed.path, os.O_RDONLY | os.O_CLOEXEC)
                    self._update, self.chunks = update, update.chunks
                    break
        except (StoreError, OSError) as error:
            self._give_up(error)
        return self._update

    def _give_up(self, error: Exception) -> None:
        if not self._failed:
            log.warning("the update to %s is not used: %s", self._digest, error)
        self._failed, self._update = True, None

    def _batch(self, update: Update, frame: int, stored: Buffer) -> Batch:
        """One frame's chunks. Raises Corrupt, ZstdError, OSError."""
        rows, bases = (
            column[slice(*firsts(counts)[frame : frame + 2].tolist())]
            for column, counts in ((update.chunks, update.counts), (update.base_chunks, update.base_counts))
        )
        ends = firsts(self._manifest.lengths[rows]).tolist()
        if Digest.of(stored) != update.hashes[frame].tobytes():
            raise Corrupt(f"{self._key}: a frame does not match its hash")
        if self._reader:
            held = dict(pair for loaded in self._reader.load(np.unique(bases)) for pair in loaded.chunks())
            near = b"".join(held[base] for base in bases.tolist())
        else:
            places = zip(self._base.lengths[bases].tolist(), self._places[bases].tolist(), strict=True)
            near = b"".join(os.pread(self._descriptor, length, place) for length, place in places)
        plain = memoryview(unpack(stored, near, ends[-1]))
        pieces = [plain[start:end] for start, end in pairwise(ends)]
        if b"".join(map(Digest.of, pieces)) != self._manifest.ids[rows].tobytes():
            raise Corrupt(f"{self._key}, or what it begins with: a chunk is not what its id says")
        return Batch(rows.tolist(), pieces, len(stored))
