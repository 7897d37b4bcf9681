"""An update: the chunks that one image has and another lacks, in frames with chunks of the other as their dictionary.

    head | frame | frame | …

Named by the BLAKE3 of its head. Whoever holds the other image reads a few ranges of it instead of frames of packs, and
believes none of it: a chunk counts when it has its id. Byte format: docs/formats.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from imagestore.errors import Corrupt
from imagestore.formats import columns
from imagestore.formats.columns import Ids, Numbers
from imagestore.formats.digest import Digest
from imagestore.formats.manifest import MAX_CHUNKS, Manifest
from imagestore.formats.sealed import decode, seal
from imagestore.outside import whole

MAGIC = b"sf-update 1\n"
_MAX_HEAD_BYTES, _MAX_FRAME_BYTES = 64 << 20, 64 << 20


class Step(NamedTuple):
    """Where the update from an image is: `name`, of its head, and its sizes in bytes."""

    name: Digest
    head_bytes: int
    size_bytes: int


def encode_steps(steps: Mapping[Digest, Step]) -> bytes:
    """The list of the updates that lead to an image, by where they begin."""
    return seal({"steps": {base.hex(): [name.hex(), *sizes] for base, (name, *sizes) in steps.items()}})


def decode_steps(data: bytes, what: str) -> dict[Digest, Step]:
    """Raises Corrupt, Unsupported."""

    def take(body: dict[str, Any]) -> dict[Digest, Step]:
        return {
            Digest.parse(base): Step(Digest.parse(name), whole(head, 1, _MAX_HEAD_BYTES), whole(size, head))
            for base, (name, head, size) in body["steps"].items()
        }

    return decode(data, what, take)


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """A head: columns over frames, over the chunks in them, and over the chunks of their dictionaries."""

    base: Digest
    to: Digest
    sizes: npt.NDArray[np.uint32]
    """Stored bytes of each frame; the first begins behind the head, each next where the last one ends."""
    counts: npt.NDArray[np.uint32]  # chunks of each frame
    base_counts: npt.NDArray[np.uint32]  # chunks in each frame's dictionary
    chunks: npt.NDArray[np.uint32]  # rows of the manifest `to`, ascending
    base_chunks: npt.NDArray[np.uint32]  # rows of the manifest `base`
    hashes: Ids  # BLAKE3 of each frame's stored bytes

    def encode(self) -> bytes:
        """The head's bytes."""
        header = {"base": str(self.base), "to": str(self.to), "frames": len(self.sizes)}
        header |= {"chunks": len(self.chunks), "base_chunks": len(self.base_chunks)}
        numbers = (self.sizes, self.counts, self.base_counts, self.chunks, self.base_chunks)
        return columns.encode(MAGIC, header, *(column.astype("<u4") for column in numbers), self.hashes)

    @classmethod
    def decode(cls, data: bytes, name: Digest, base: Digest, to: Digest) -> Self:
        """Raises Corrupt, also where it has another name, or leads from or to another image."""
        read = columns.Reader(data, MAGIC, "update", {"base", "to", "frames", "chunks", "base_chunks"})
        if Digest.of(data) != name or (read.text("base"), read.text("to")) != (str(base), str(to)):
            raise Corrupt(f"update {name}: it is another one")
        frames, chunks, bases = (read.count(key, MAX_CHUNKS) for key in ("frames", "chunks", "base_chunks"))
        sizes, counts, base_counts = (read.column("<u4", frames) for _ in range(3))
        rows = read.column("<u4", chunks), read.column("<u4", bases)
        update = cls(base, to, sizes, counts, base_counts, *rows, read.ids(frames))
        read.end()
        return update

    def check(self, base: Manifest, to: Manifest) -> None:
        """Whether its rows are some, and its frames within bounds. Raises Corrupt."""
        of_base = self.base_counts, self.base_chunks, base
        for counts, rows, manifest in ((self.counts, self.chunks, to), of_base):
            if counts.sum(dtype=np.int64) != len(rows) or (rows >= len(manifest.lengths)).any():
                raise Corrupt("update: a row of no manifest, or of no frame")
            if (np.diff(firsts(manifest.lengths[rows])[firsts(counts)]) > _MAX_FRAME_BYTES).any():
                raise Corrupt("update: a frame or a dictionary is too large")
        if (self.sizes > _MAX_FRAME_BYTES).any():
            raise Corrupt("update: a frame is too large")
        if len(np.unique(self.chunks)) < len(self.chunks) or not self.counts.all():
            raise Corrupt("update: a chunk is in two frames, or none in one")


def verify_update(data: bytes, base: Digest, to: Digest, step: Step) -> None:
    """Whether the whole object is what its head says. Raises Corrupt."""
    update = Update.decode(data[: step.head_bytes], step.name, base, to)
    ends = (step.head_bytes + firsts(update.sizes)).tolist()
    hashes = b"".join(Digest.of(data[start:end]) for start, end in pairwise(ends))
    if hashes != update.hashes.tobytes() or ends[-1] != len(data):
        raise Corrupt(f"update {step.name}: a frame is not what the head says")


def firsts(counts: npt.NDArray[Any]) -> Numbers:
    """Where the rows of each begin, and, last, where those of all end."""
    return np.append(0, np.cumsum(counts, dtype=np.int64))
