"""The manifest: what an image is. Immutable, canonical, named by its BLAKE3; it knows nothing of packs.

A function of input and options alone: no times, no state of the store. The columns of a large image are in pages,
which are stored as chunks are, so that two images that differ little share most of them: what is under the image's
name is then a head, which names the pages. Byte format: docs/formats.md.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from imagestore.errors import Corrupt, Invalid
from imagestore.formats import columns
from imagestore.formats.chunking import BLOCK, ChunkerParams
from imagestore.formats.columns import Ids, Numbers
from imagestore.formats.digest import Buffer, Digest

MAGIC = b"sf-manifest 1\n"
PAGED_MAGIC = b"sf-manifest 2\n"
PAGED_CHUNKS = 1 << 15  # from so many chunks on, about 1 GiB, a writer puts the columns into pages
PAGE_BYTES = 16 << 20
"""Of the disk: the chunks that start in these are a page. Borders by address: a change stays in its page."""
MAX_DISK_BYTES = 64 << 40  # larger disks are refused everywhere: 64 TiB
MAX_CHUNKS = 1 << 28
_MIN_PAGE_BYTES, _MAX_PAGE_BYTES = 1 << 16, 1 << 26
_ARCHITECTURE = re.compile(r"[a-z0-9_]{1,32}")
_KEYS = {
    "architecture", "chunker", "chunks", "disk_id", "labels", "os", "parent", "runs", "size_bytes", "source",
}  # fmt: skip


def check_labels(labels: object, what: str) -> tuple[tuple[str, str], ...]:
    """Up to 64 pairs of short strings, sorted. Raises Invalid."""
    if not isinstance(labels, dict) or len(labels) > 64:
        raise Invalid(f"{what}: at most 64 pairs")
    for key, value in labels.items():
        if not isinstance(key, str) or not isinstance(value, str) or not 0 < len(key) <= 128:
            raise Invalid(f"{what}: a key has 1 to 128 characters")
        if len(value) > 1024 or not key.isprintable() or not value.isprintable():
            raise Invalid(f"{what}: the value of {key[:32]!r} is too long or not printable")
    return tuple(sorted(labels.items()))


class Pages(NamedTuple):
    """Parts of a manifest or a layout, stored as chunks: their digests, and their lengths in bytes."""

    ids: Ids
    lengths: Numbers


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """The ordered chunks of one disk. Bytes that belong to no run are zero."""

    size_bytes: int
    architecture: str
    chunker: ChunkerParams
    disk_id: Digest  # hash of the non-zero blocks and their offsets: the same under any chunker
    run_offsets: npt.NDArray[np.uint64]
    """Where each run of adjoining chunks starts on the disk, in bytes, ascending. It ends at a page's end."""
    run_chunks: npt.NDArray[np.uint32]  # how many chunks each run has
    lengths: npt.NDArray[np.uint32]  # plain length of each chunk in bytes, in disk order
    ids: Ids  # BLAKE3 of each chunk's plain bytes, shape (chunks, 32)
    os: str = ""
    parent: Digest | None = None
    labels: tuple[tuple[str, str], ...] = ()
    source: tuple[tuple[str, str], ...] = field(default=())
    """What the image was made from: upstream's checksum, format, URL."""
    page_bytes: int = 0  # how much of the disk one page is about; 0 where there are none

    @property
    def data_bytes(self) -> int:
        """Bytes that are not holes."""
        return int(self.lengths.sum(dtype=np.uint64))

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each chunk starts on the disk, in bytes."""
        return columns.starts(self.lengths, self.run_chunks, self.run_offsets.astype(np.int64))

    def chunks(self) -> Iterator[tuple[int, int, Digest]]:
        """(offset, length, id) of each chunk in disk order."""
        raw = self.ids.tobytes()
        for at, (offset, length) in enumerate(zip(self.offsets.tolist(), self.lengths.tolist(), strict=True)):
            yield offset, length, Digest(raw[at * 32 : at * 32 + 32])

    def encode(self) -> bytes:
        """The canonical bytes, where there are pages the head; their BLAKE3 is the image's digest."""
        header = {
            "architecture": self.architecture,
            "chunker": asdict(self.chunker),
            "chunks": len(self.lengths),
            "disk_id": str(self.disk_id),
            "labels": dict(self.labels),
            "os": self.os,
            "parent": str(self.parent) if self.parent else "",
            "runs": len(self.run_offsets),
            "size_bytes": self.size_bytes,
            "source": dict(self.source),
        }
        if not self.page_bytes:
            return columns.encode(MAGIC, header, *self._columns)
        header |= {"page_bytes": self.page_bytes, "pages": len(self.page_rows[0]) - 1}
        counts = [np.diff(rows).astype("<u4") for rows in self.page_rows]
        ids = b"".join(map(Digest.of, self.pages()))
        return columns.encode(PAGED_MAGIC, header, *counts, np.frombuffer(ids, np.uint8))

    @property
    def page_rows(self) -> tuple[Numbers, Numbers]:
        """Where the runs and where the chunks of each page begin, and, last, where those of all end."""
        numbers = self.run_offsets.astype(np.int64) // (self.page_bytes or MAX_DISK_BYTES)
        runs = np.append(np.flatnonzero(np.diff(numbers, prepend=-1)), len(numbers))
        return runs, np.append(0, np.cumsum(self.run_chunks, dtype=np.int64))[runs]

    def pages(self) -> list[bytes]:
        """What the head names, in its order."""
        if not self.page_bytes:
            return []
        runs, chunks = (rows[1:-1] for rows in self.page_rows)
        cuts = zip(self._columns, (runs, runs, chunks, chunks), strict=True)
        pages = zip(*(np.split(*cut) for cut in cuts), strict=True)
        return [b"".join(part.tobytes() for part in page) for page in pages]

    @property
    def _columns(self) -> tuple[npt.NDArray[Any], ...]:
        numbers = self.run_offsets.astype("<u8"), self.run_chunks.astype("<u4"), self.lengths.astype("<u4")
        return *numbers, self.ids

    def whole(self) -> bytes:
        """The head and its pages in one piece, to be kept where no store is."""
        return b"".join([self.encode(), *self.pages()])

    @property
    def digest(self) -> Digest:
        """The image's name by content. Computed anew at each use: keep it."""
        return Digest.of(self.encode())

    @classmethod
    def decode(cls, data: bytes, fetch: Callable[[Pages], Sequence[Buffer]] | None = None) -> Self:
        """Read and check an encoded manifest from anywhere. fetch: brings the pages that do not follow the head.

        Raises Corrupt, and what `fetch` raises.
        """
        paged = data.startswith(PAGED_MAGIC)
        keys = _KEYS | {"page_bytes", "pages"} if paged else _KEYS
        read = columns.Reader(data, PAGED_MAGIC if paged else MAGIC, "manifest", keys)
        counts = np.array([[read.count("runs", MAX_CHUNKS)], [read.count("chunks", MAX_CHUNKS)]])
        parts, page_bytes = list[columns.Columns]([read]), 0
        if paged:
            page_bytes = read.count("page_bytes", _MAX_PAGE_BYTES)
            pages = read.count("pages", int(counts[0, 0]))
            total, counts = counts, np.stack([read.column("<u4", pages) for _ in counts]).astype(np.int64)
            fits = (counts.sum(axis=1, keepdims=True) == total).all()
            if not fits or not pages or page_bytes < _MIN_PAGE_BYTES:
                raise Corrupt("manifest: its pages do not have its rows")
            told = Pages(read.ids(pages), counts[0] * 12 + counts[1] * 36)
            bodies = fetch(told) if fetch else [read.column("u1", n).tobytes() for n in told.lengths.tolist()]
            if b"".join(map(Digest.of, bodies)) != told.ids.tobytes():
                raise Corrupt("manifest: a page is not what the head says")
            parts = [columns.Columns(body, "a manifest's page") for body in bodies]
        rows = []
        for part, runs, chunks in zip(parts, *counts.tolist(), strict=True):
            numbers = (part.column("<u8", runs), part.column("<u4", runs), part.column("<u4", chunks))
            rows.append((*numbers, part.ids(chunks)))
            part.end()
        read.end()
        run_offsets, run_chunks, lengths, ids = map(np.concatenate, zip(*rows, strict=True))
        parent = read.text("parent")
        try:
            manifest = cls(
                size_bytes=read.count("size_bytes", MAX_DISK_BYTES),
                architecture=read.text("architecture"),
                chunker=ChunkerParams.from_dict(read.header["chunker"]),
                disk_id=Digest.parse(read.text("disk_id")),
                run_offsets=run_offsets,
                run_chunks=run_chunks,
                lengths=lengths,
                ids=ids,
                os=read.text("os", 128),
                parent=Digest.parse(parent) if parent else None,
                labels=check_labels(read.header["labels"], "labels"),
                source=check_labels(read.header["source"], "source"),
                page_bytes=page_bytes,
            )
        except Invalid as error:
            raise Corrupt(f"manifest: {error}") from error
        manifest._check(read.text("disk_id"), parent)
        if paged and [np.diff(ends).tolist() for ends in manifest.page_rows] != counts.tolist():
            raise Corrupt("manifest: its pages do not end where they should")
        return manifest

    def _check(self, disk_id: str, parent: str) -> None:
        """The rules that make the encoding unique and the disk a disk."""
        if str(self.disk_id) != disk_id or (self.parent and str(self.parent) != parent):
            raise Corrupt("manifest: a digest is not in canonical form")
        if not _ARCHITECTURE.fullmatch(self.architecture):
            raise Corrupt("manifest: bad architecture")
        lengths, counts = self.lengths.astype(np.int64), self.run_chunks.astype(np.int64)
        if counts.sum() != len(lengths) or (len(counts) and counts.min() < 1):
            raise Corrupt("manifest: runs and chunks do not match")
        if not len(lengths):
            return
        if lengths.min() < 1 or lengths.max() > self.chunker.max_bytes:
            raise Corrupt("manifest: a chunk's length is out of bounds")
        if int(self.run_offsets.max()) >= MAX_DISK_BYTES:
            raise Corrupt("manifest: a run lies outside the disk")
        starts = self.run_offsets.astype(np.int64)
        ends = starts + np.add.reduceat(lengths, np.cumsum(counts) - counts)
        meet = starts[1:] == ends[:-1]
        if self.page_bytes:
            lasts = self.offsets[np.cumsum(counts) - 1] // self.page_bytes
            if (lasts != starts // self.page_bytes).any():
                raise Corrupt("manifest: a run goes past the end of its page")
            meet &= lasts[:-1] == lasts[1:]
        apart = not (starts % BLOCK).any() and (starts[1:] >= ends[:-1]).all()
        if not apart or meet.any() or ends[-1] > self.size_bytes:
            raise Corrupt("manifest: runs overlap, touch or lie outside the disk")
        odd = np.flatnonzero(lengths % BLOCK)
        if len(odd) > 1 or (len(odd) and (odd[0] != len(lengths) - 1 or ends[-1] != self.size_bytes)):
            raise Corrupt("manifest: a chunk that is not the disk's end has an odd length")
