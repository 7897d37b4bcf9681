"""Where chunks lie: what a writer knows of chunks, frames and packs as columns that grow, and the layout made of it."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from imagestore.formats import columns
from imagestore.formats.columns import FRAME, Ids, Numbers
from imagestore.formats.digest import Digest
from imagestore.formats.index import Keys
from imagestore.formats.layout import NO_PAGES, Layout, renumbered
from imagestore.formats.manifest import Pages
from imagestore.formats.pack import MAX_PACK_BYTES, Footer
from imagestore.store.frames import BULK_BYTES

_CHUNK = np.dtype([("id", "u1", 32), ("frame", "<i8"), ("offset", "<u4")])
"""Of a chunk: its id, the number of its frame (-1: not known), where it starts in the plain bytes of that."""
_SPARSE, _SCATTERED = 1.22, 1.6
"""A pull may fetch this many times the bytes, in this many times the requests, before chunks are stored again."""


class Column:
    """A numpy array that grows."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._data, self._used = np.empty(64, dtype), 0

    @property
    def rows(self) -> npt.NDArray[Any]:
        """All rows so far; valid until the next `extend`."""
        return self._data[: self._used]

    def extend(self, rows: npt.NDArray[Any]) -> int:
        """Append rows; the number of the first."""
        first, end = self._used, self._used + len(rows)
        if end > len(self._data):
            grown = np.empty(max(end, 2 * len(self._data)), self._data.dtype)
            grown[:first] = self.rows
            self._data = grown
        self._data[first:end] = rows
        self._used = end
        return first


class Known(Column):
    """Chunks and where they lie: rows of `_CHUNK`, found by id."""

    def __init__(self) -> None:
        super().__init__(_CHUNK)
        self._levels: list[tuple[Keys, Numbers]] = []

    def add(self, ids: Ids, frames: npt.NDArray[Any] | int, offsets: npt.NDArray[Any] | int) -> int:
        """Append rows; the number of the first."""
        chunks = np.empty(len(ids), _CHUNK)
        chunks["id"], chunks["frame"], chunks["offset"] = ids, frames, offsets
        first = self.extend(chunks)
        rows, keys = np.arange(first, first + len(ids), dtype=np.int64), columns.keys(ids)
        # Sorted runs of growing size, merged when a newer one is as large: cheap appends, few searches.
        while self._levels and len(self._levels[-1][0]) <= len(keys):
            old_keys, old_rows = self._levels.pop()
            keys, rows = np.concatenate([old_keys, keys]), np.concatenate([old_rows, rows])
        order = np.argsort(keys, kind="stable")
        self._levels.append((keys[order], rows[order]))
        return first

    def find(self, ids: Ids, usable: npt.NDArray[np.bool_] | None = None) -> Numbers:
        """The row of each id, or -1. usable: by frame, whether its rows count."""
        found = np.full(len(ids), -1, np.int64)
        if not len(ids):
            return found
        keys = columns.keys(ids)
        for level_keys, level_rows in reversed(self._levels):
            first, last = np.searchsorted(level_keys, keys), np.searchsorted(level_keys, keys, "right")
            hit = np.flatnonzero(last > first)
            if not len(hit):
                continue
            for at in (last[hit] - 1, first[hit]):  # the newest and, rather, the oldest row of an id
                rows = level_rows[at]
                good = (self.rows["id"][rows] == ids[hit]).all(axis=1)
                if usable is not None:
                    good &= usable[self.rows["frame"][rows]]
                found[hit] = np.where(good, rows, found[hit])
        return found


class Placement:
    """Packs, the frames in them and the chunks in these. A frame that is being filled has a number, but no pack yet."""

    def __init__(self) -> None:
        self.chunks = Known()
        self.packs: list[Digest] = []
        self._frames = Column(FRAME)
        self._usable: list[bool] = []

    @property
    def frames(self) -> npt.NDArray[Any]:
        """A row of `FRAME` for each frame, its pack -1 while it has none; valid until the next is added."""
        return self._frames.rows

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """By frame: whether its pack may be used. Frames without a pack yet may."""
        usable: npt.NDArray[np.bool_] = np.array([*self._usable, True])[self.frames["pack"]]
        return usable

    def add_pack(self, pack: Digest, *, usable: bool = True) -> int:
        """The number of a pack."""
        self.packs.append(pack)
        self._usable.append(usable)
        return len(self.packs) - 1

    def add_frame(self, pack: int = -1) -> int:
        """The number of a frame of which nothing else is known (yet)."""
        row = np.zeros(1, FRAME)
        row["pack"] = pack
        return self._frames.extend(row)

    def add_footer(self, pack: Digest, footer: Footer) -> None:
        """A pack with all its frames and chunks."""
        first = self._frames.extend(footer.frames(self.add_pack(pack)))
        self.chunks.add(footer.ids, first + footer.frame_of_chunk, footer.offset_in_frame)

    def add_layout(self, layout: Layout, usable: Collection[Digest]) -> int:
        """The packs and frames of an image's layout; the number of the first frame."""
        numbers = [self.add_pack(pack, usable=pack in usable) for pack in layout.packs]
        return self._frames.extend(renumbered(layout.frames, numbers))

    def packed(self, frames: Sequence[int], pack: Digest, footer: Footer) -> None:
        """Frames that were numbered before are in a pack now."""
        self.frames[list(frames)] = footer.frames(self.add_pack(pack))

    def avoid(self, packs: Collection[Digest]) -> None:
        """Nothing in these counts any more."""
        self._usable = [ok and pack not in packs for ok, pack in zip(self._usable, self.packs, strict=True)]

    def find(self, ids: Ids) -> Numbers:
        """The row in `chunks` of each id that can be used, or -1."""
        return self.chunks.find(ids, self.usable if len(self.frames) else None)

    def layout(self, manifest: Digest, rows: Numbers, pages: Pages = NO_PAGES) -> Layout:
        """The layout of an image whose chunks, and then pages, are these rows of `chunks`."""
        chunks = self.chunks.rows[rows]
        return Layout.of(manifest, self.packs, self.frames, chunks["frame"], chunks["offset"], pages)

    def moved(self, old: Layout, was: Ids, ids: Ids, avoid: Collection[Digest]) -> Layout | None:
        """`old`, which places `was`, for `ids`: what differs, or lies in packs to avoid, is taken from here.

        None if one of them is not here.
        """
        gone = np.array([pack in avoid for pack in old.packs], np.bool_)[old.frames["pack"][old.chunk_frames]]
        gone |= (was != ids).any(axis=1)
        found = self.find(ids[gone])
        if (found < 0).any():
            return None
        chunks = self.chunks.rows[found]
        frames, offsets = old.chunk_frames.astype(np.int64) + len(self.frames), old.chunk_offsets.copy()
        frames[gone], offsets[gone] = chunks["frame"], chunks["offset"]
        olds = renumbered(old.frames, np.arange(len(old.packs)) + len(self.packs))
        together = np.concatenate([self.frames, olds])
        pages = old.pages._replace(ids=ids[len(ids) - len(old.pages.ids) :])
        return Layout.of(old.manifest, [*self.packs, *old.packs], together, frames, offsets, pages)


def too_scattered(
    packs: Numbers, starts: Numbers, sizes: Numbers, live: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Frames to leave so that a pull of this image needs few requests and few bytes that it does not use.

    live: how many of each frame's `sizes` stored bytes the image uses. Looked at in zones of packs as large as a
    request: a zone is left as a whole, for a frame left alone would be a gap that is read or that costs a request.
    """
    _, zone = np.unique(packs * MAX_PACK_BYTES + starts // BULK_BYTES, return_inverse=True)
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
    kept = count - np.arange(count + 1) + np.concatenate([[0], np.cumsum(needed[order])]) / BULK_BYTES
    too_many = kept > _SCATTERED * total / BULK_BYTES + 4
    return np.isin(zone, order[: int(np.argmin(too_much | too_many))])
