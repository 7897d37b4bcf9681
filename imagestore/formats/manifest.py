"""The manifest: what an image is. Immutable, canonical, named by its BLAKE3; it knows nothing of packs.

A function of input and options alone: no times, no state of the store. Byte format: docs/formats.md.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from imagestore.errors import Corrupt, Invalid
from imagestore.formats import columns
from imagestore.formats.chunking import BLOCK, ChunkerParams
from imagestore.formats.columns import Ids
from imagestore.formats.digest import Digest

MAGIC = b"sf-manifest 1\n"
MAX_DISK_BYTES = 64 << 40
"""Larger disks are refused everywhere: 64 TiB."""
MAX_CHUNKS = 1 << 28
MAX_BYTES = 16 << 30
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


@dataclass(frozen=True, slots=True, eq=False)
class Manifest:
    """The ordered chunks of one disk. Bytes that belong to no run are zero."""

    size_bytes: int
    architecture: str
    chunker: ChunkerParams
    disk_id: Digest
    """Hash of the non-zero blocks and their offsets: the same under any chunker."""
    run_offsets: npt.NDArray[np.uint64]
    """Where each run of adjoining chunks starts on the disk, in bytes, ascending."""
    run_chunks: npt.NDArray[np.uint32]
    """How many chunks each run has."""
    lengths: npt.NDArray[np.uint32]
    """Plain length of each chunk in bytes, in disk order."""
    ids: Ids
    """BLAKE3 of each chunk's plain bytes, shape (chunks, 32)."""
    os: str = ""
    parent: Digest | None = None
    labels: tuple[tuple[str, str], ...] = ()
    source: tuple[tuple[str, str], ...] = field(default=())
    """What the image was made from: upstream's checksum, format, URL."""

    @property
    def data_bytes(self) -> int:
        """Bytes that are not holes."""
        return int(self.lengths.sum(dtype=np.uint64))

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each chunk starts on the disk, in bytes."""
        if not len(self.lengths):
            return np.zeros(0, np.int64)
        lengths = self.lengths.astype(np.int64)
        packed = np.cumsum(lengths) - lengths
        first = np.cumsum(self.run_chunks) - self.run_chunks
        shift = self.run_offsets.astype(np.int64) - packed[first]
        moved: npt.NDArray[np.int64] = packed + np.repeat(shift, self.run_chunks)
        return moved

    def chunks(self) -> Iterator[tuple[int, int, Digest]]:
        """(offset, length, id) of each chunk in disk order."""
        raw = self.ids.tobytes()
        for at, (offset, length) in enumerate(zip(self.offsets.tolist(), self.lengths.tolist(), strict=True)):
            yield offset, length, Digest(raw[at * 32 : at * 32 + 32])

    def encode(self) -> bytes:
        """The canonical bytes; their BLAKE3 is the image's digest."""
        header = {
            "architecture": self.architecture,
            "chunker": self.chunker.as_dict(),
            "chunks": len(self.lengths),
            "disk_id": str(self.disk_id),
            "labels": dict(self.labels),
            "os": self.os,
            "parent": str(self.parent) if self.parent else "",
            "runs": len(self.run_offsets),
            "size_bytes": self.size_bytes,
            "source": dict(self.source),
        }
        columns_ = (self.run_offsets.astype("<u8"), self.run_chunks.astype("<u4"), self.lengths.astype("<u4"))
        return columns.encode(MAGIC, header, *columns_, self.ids)

    @property
    def digest(self) -> Digest:
        """The image's name by content. Computed anew at each use: keep it."""
        return Digest.of(self.encode())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read and check an encoded manifest from anywhere. Raises Corrupt."""
        read = columns.Reader(data, MAGIC, "manifest", _KEYS)
        runs, chunks = read.count("runs", MAX_CHUNKS), read.count("chunks", MAX_CHUNKS)
        parent = read.text("parent")
        try:
            manifest = cls(
                size_bytes=read.count("size_bytes", MAX_DISK_BYTES),
                architecture=read.text("architecture"),
                chunker=ChunkerParams.from_dict(read.header["chunker"]),
                disk_id=Digest.parse(read.text("disk_id")),
                run_offsets=read.column("<u8", runs),
                run_chunks=read.column("<u4", runs),
                lengths=read.column("<u4", chunks),
                ids=read.ids(chunks),
                os=read.text("os", 128),
                parent=Digest.parse(parent) if parent else None,
                labels=check_labels(read.header["labels"], "labels"),
                source=check_labels(read.header["source"], "source"),
            )
        except Invalid as error:
            raise Corrupt(f"manifest: {error}") from error
        read.end()
        manifest._check(read.text("disk_id"), parent)
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
        if (starts % BLOCK).any() or (starts[1:] <= ends[:-1]).any() or ends[-1] > self.size_bytes:
            raise Corrupt("manifest: runs overlap, touch or lie outside the disk")
        odd = np.flatnonzero(lengths % BLOCK)
        if len(odd) > 1 or (len(odd) and (odd[0] != len(lengths) - 1 or ends[-1] != self.size_bytes)):
            raise Corrupt("manifest: a chunk that is not the disk's end has an odd length")
