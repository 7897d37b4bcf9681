"""The layout: in which pack and frame each chunk of one manifest lies. Replaceable: a repack writes a new one.

Reading an image takes its name, manifest, layout and ranges of packs. Where the manifest has pages, so has the layout,
one for each of those: what is under its key says where all these pages lie. Byte format: docs/formats.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from imagestore.errors import Corrupt
from imagestore.formats import columns
from imagestore.formats.columns import Numbers, Rows
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.manifest import MAX_CHUNKS, Manifest, Pages
from imagestore.formats.pack import MAX_FRAME_BYTES, MAX_PACK_BYTES

MAGIC = b"sf-layout 1\n"
PAGED_MAGIC = b"sf-layout 2\n"
_PAGE_MAGIC = b"sf-places 1\n"
NO_PAGES = Pages(np.zeros((0, 32), np.uint8), np.zeros(0, np.int64))
_MAX_PACKS = 1 << 20
_KEYS = {"chunks", "frames", "packs"}
PACK_BITS = 40
"""A place is one number, the pack's and below it these bits of the offset: no request reaches over the gap between."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Columns over the packs, frames and chunks that one image uses."""

    manifest: Digest
    packs: tuple[Digest, ...]
    frames: Rows  # of `columns.FRAME`; a pack's number is its place in `packs`
    chunk_frames: npt.NDArray[np.uint32]
    """The frame of each chunk of the manifest, in its order, then of each page."""
    chunk_offsets: npt.NDArray[np.uint32]  # where each starts in its frame's plain bytes
    pages: Pages = field(default=NO_PAGES)  # the manifest's, then the layout's own

    @classmethod
    def of(
        cls,
        manifest: Digest,
        packs: Sequence[Digest],
        frames: Rows,
        chunk_frames: npt.NDArray[Any],
        chunk_offsets: npt.NDArray[Any],
        pages: Pages = NO_PAGES,
    ) -> Self:
        """Of these packs and frames only those that chunks lie in: packs by their first use, frames by their places.

        So it depends on nothing but the places of the chunks, and neighbours in two images have one page.
        """
        numbers, firsts = np.unique(frames["pack"][chunk_frames], return_index=True)
        numbers = numbers[np.argsort(firsts)]
        used, frame_of = np.unique(chunk_frames, return_inverse=True)
        rows = frames[used]
        rows["pack"] = np.argsort(numbers)[np.searchsorted(np.sort(numbers), rows["pack"])]
        # A frame may be there twice: out of two pages.
        _, kept, place = np.unique(places(rows), return_index=True, return_inverse=True)
        names = tuple(packs[at] for at in numbers.tolist())
        lie = place[frame_of].astype(np.uint32), chunk_offsets.astype(np.uint32)
        return cls(manifest, names, rows[kept], *lie, pages)

    def encode(self) -> bytes:
        """The object's bytes."""
        if not len(self.pages.ids):
            return self._encode(MAGIC, {"manifest": str(self.manifest)})
        head = self._of_rows(slice(len(self.chunk_frames) - len(self.pages.ids), None))
        more = (self.pages.lengths.astype("<u4"), self.pages.ids)
        return head._encode(PAGED_MAGIC, {"manifest": str(self.manifest)}, *more)

    def own_pages(self, ends: Numbers) -> list[bytes]:
        """One for each page of the manifest, whose chunks begin and end there."""
        parts = pairwise(ends.tolist())
        return [self._of_rows(slice(start, end))._encode(_PAGE_MAGIC, {}) for start, end in parts]

    def _of_rows(self, rows: slice) -> "Layout":
        places_ = self.chunk_frames[rows], self.chunk_offsets[rows]
        return Layout.of(self.manifest, self.packs, self.frames, *places_)

    def _encode(self, magic: bytes, header: dict[str, Any], *more: npt.NDArray[Any]) -> bytes:
        header |= {"chunks": len(self.chunk_frames), "frames": len(self.frames), "packs": len(self.packs)}
        packs = np.frombuffer(b"".join(self.packs), np.uint8)
        frames = [self.frames[name] for name in ("pack", "offset", "size", "plain")]
        small = [a.astype("<u4") for a in (*frames, self.chunk_frames, self.chunk_offsets)]
        return columns.encode(magic, header, packs, *small, self.frames["codec"], self.frames["hash"], *more)

    @classmethod
    def decode(cls, data: bytes, manifest: Digest) -> Self:
        """Read and check the layout of the manifest with this digest. Raises Corrupt.

        Of one with pages it knows nothing but where these lie: `whole` is for those who want to know of chunks.
        """
        paged = data.startswith(PAGED_MAGIC)
        read = columns.Reader(data, PAGED_MAGIC if paged else MAGIC, "layout", _KEYS | {"manifest"})
        if read.text("manifest") != str(manifest):
            raise Corrupt("layout: it belongs to another manifest")
        return cls._decode(read, manifest, paged=paged)

    @classmethod
    def _decode(cls, read: columns.Reader, manifest: Digest, *, paged: bool = False) -> Self:
        packs, frames = read.count("packs", _MAX_PACKS), read.count("frames", MAX_CHUNKS)
        chunks = read.count("chunks", MAX_CHUNKS)
        names = tuple(Digest(row.tobytes()) for row in read.ids(packs))
        numbers = [read.column("<u4", frames) for _ in range(4)]
        chunk_frames, chunk_offsets = (read.column("<u4", chunks) for _ in range(2))
        rows = columns.frame_rows(*numbers, read.column("u1", frames), read.ids(frames))
        pages = Pages(lengths=read.column("<u4", chunks), ids=read.ids(chunks)) if paged else NO_PAGES
        layout = cls(manifest, names, rows, chunk_frames, chunk_offsets, pages)
        read.end()
        if paged and (chunks % 2 or not chunks):
            raise Corrupt("layout: its pages are not those of its manifest")
        layout._check()
        return layout

    def whole(self, own_pages: Sequence[Buffer]) -> Self:
        """With the chunks that its pages place. Raises Corrupt."""
        pages = (columns.Reader(bytes(page), _PAGE_MAGIC, "a layout's page", _KEYS) for page in own_pages)
        parts = [Layout._decode(page, self.manifest) for page in pages]
        parts.append(self)
        packs = list(dict.fromkeys(pack for part in parts for pack in part.packs))
        number_of = {pack: number for number, pack in enumerate(packs)}
        frames = [renumbered(part.frames, [number_of[pack] for pack in part.packs]) for part in parts]
        firsts = np.repeat(np.cumsum([0, *map(len, frames[:-1])]), [len(part.chunk_frames) for part in parts])
        lie = firsts + np.concatenate([part.chunk_frames for part in parts])
        inner = np.concatenate([part.chunk_offsets for part in parts])
        return self.of(self.manifest, packs, np.concatenate(frames), lie, inner, self.pages)

    def stored(self, manifest: Manifest) -> Pages:
        """What this places: the chunks of its manifest, then the pages."""
        ids = np.concatenate([manifest.ids, self.pages.ids])
        return Pages(ids, np.concatenate([manifest.lengths.astype(np.int64), self.pages.lengths]))

    def _check(self) -> None:
        if len(set(self.packs)) != len(self.packs):
            raise Corrupt("layout: a pack is listed twice")
        if len(self.frames):
            ends = self.frames["offset"] + self.frames["size"]
            if self.frames["pack"].max() >= len(self.packs) or ends.max() > MAX_PACK_BYTES:
                raise Corrupt("layout: a frame lies outside its pack")
            if self.frames["size"].min() < 1 or self.frames["plain"].max() > MAX_FRAME_BYTES:
                raise Corrupt("layout: a frame's size is out of bounds")
        if len(self.chunk_frames) and self.chunk_frames.max() >= len(self.frames):
            raise Corrupt("layout: a chunk lies in no frame")

    def pack_sizes(self) -> dict[Digest, int]:
        """How long each pack must be at least, in bytes."""
        ends = np.zeros(len(self.packs), np.int64)
        np.maximum.at(ends, self.frames["pack"], self.frames["offset"] + self.frames["size"])
        return dict(zip(self.packs, ends.tolist(), strict=True))

    def check(self, manifest: Manifest) -> None:
        """Whether this places every chunk of `manifest`, and every page, inside a frame. Raises Corrupt."""
        lengths = self.stored(manifest).lengths
        if len(self.chunk_frames) != len(lengths):
            raise Corrupt("layout: its chunks are not those of its manifest")
        ends = self.chunk_offsets.astype(np.int64) + lengths
        if len(ends) and (ends > self.frames["plain"][self.chunk_frames]).any():
            raise Corrupt("layout: a chunk goes past the end of its frame")


Image = tuple[Manifest, Layout | None]  # and where it lies, if that is known


def renumbered(frames: Rows, packs: Sequence[int] | Numbers) -> Rows:
    """The same frames; their packs have these numbers."""
    rows = frames.copy()
    rows["pack"] = np.asarray(packs, np.int64)[rows["pack"]]
    return rows


def places(frames: Rows) -> Numbers:
    """One number for each frame's pack and place in that."""
    found: Numbers = (frames["pack"] << PACK_BITS) + frames["offset"]
    return found
