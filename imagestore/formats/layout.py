"""The layout: in which pack and frame each chunk of one manifest lies. Replaceable: a repack writes a new one.

Reading an image takes its name, manifest, layout and ranges of packs. Byte format: docs/formats.md.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from imagestore.errors import Corrupt, Invalid
from imagestore.formats import columns
from imagestore.formats.columns import Rows
from imagestore.formats.digest import Digest
from imagestore.formats.manifest import MAX_CHUNKS, Manifest
from imagestore.formats.pack import MAX_FRAME_BYTES, MAX_PACK_BYTES

MAGIC = b"sf-layout 1\n"
_MAX_PACKS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Columns over the packs, frames and chunks that one image uses."""

    manifest: Digest
    packs: tuple[Digest, ...]
    frames: Rows
    """Of `columns.FRAME`; a pack's number is its place in `packs`."""
    chunk_frames: npt.NDArray[np.uint32]
    """The frame of each chunk of the manifest, in its order."""
    chunk_offsets: npt.NDArray[np.uint32]
    """Where each chunk starts in its frame's plain bytes."""

    def encode(self) -> bytes:
        """The object's bytes."""
        header = {
            "chunks": len(self.chunk_frames),
            "frames": len(self.frames),
            "manifest": str(self.manifest),
            "packs": len(self.packs),
        }
        packs = np.frombuffer(b"".join(self.packs), np.uint8)
        frames = [self.frames[name] for name in ("pack", "offset", "size", "plain")]
        small = [a.astype("<u4") for a in (*frames, self.chunk_frames, self.chunk_offsets)]
        return columns.encode(MAGIC, header, packs, *small, self.frames["codec"], self.frames["hash"])

    @classmethod
    def decode(cls, data: bytes, manifest: Digest) -> Self:
        """Read and check the layout of the manifest with this digest. Raises Corrupt."""
        read = columns.Reader(data, MAGIC, "layout", {"chunks", "frames", "manifest", "packs"})
        try:
            belongs_to = Digest.parse(read.text("manifest"))
        except Invalid as error:
            raise Corrupt(f"layout: {error}") from error
        if belongs_to != manifest:
            raise Corrupt("layout: it belongs to another manifest")
        packs, frames = read.count("packs", _MAX_PACKS), read.count("frames", MAX_CHUNKS)
        chunks = read.count("chunks", MAX_CHUNKS)
        names = tuple(Digest(row.tobytes()) for row in read.ids(packs))
        numbers = [read.column("<u4", frames) for _ in range(4)]
        chunk_frames, chunk_offsets = (read.column("<u4", chunks) for _ in range(2))
        rows = columns.frame_rows(*numbers, read.column("u1", frames), read.ids(frames))
        layout = cls(manifest, names, rows, chunk_frames, chunk_offsets)
        read.end()
        layout._check()
        return layout

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
        """Whether this places every chunk of `manifest` inside a frame. Raises Corrupt."""
        if len(self.chunk_frames) != len(manifest.lengths):
            raise Corrupt("layout: its chunks are not those of its manifest")
        ends = self.chunk_offsets.astype(np.int64) + manifest.lengths
        if len(ends) and (ends > self.frames["plain"][self.chunk_frames]).any():
            raise Corrupt("layout: a chunk goes past the end of its frame")
