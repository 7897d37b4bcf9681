"""Boot traces: which chunks a guest touched first, in which order, until it was up.

Kept by chunk, not by offset, so that the trace of one version of an image helps the next. It lies beside the manifest
in the store (`imagestore.cache.traces`). The first eight bytes of a chunk's id stand for it: a trace is a hint, and a
wrong one costs bytes and never correctness.

    "sf-trace 1\\n" | header {"boots", "chunks"} | keys (u64) | position (f4, 0 to 1) | boots that touched it (u16)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from imagestore.errors import Corrupt
from imagestore.formats import columns
from imagestore.formats.columns import Ids

MAGIC = b"sf-trace 1\n"
MAX_CHUNKS = 1 << 18
_MAX_BOOTS = 64
_RARE = 4  # a chunk that fewer than one boot in so many touched is dropped


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Chunks in the order of their first touch, averaged over some boots."""

    boots: int
    keys: npt.NDArray[np.uint64]
    positions: npt.NDArray[np.float32]
    counts: npt.NDArray[np.uint16]

    @classmethod
    def of(cls, ids: Ids, touched: Sequence[int]) -> Self:
        """From one boot that touched these rows of `ids` in this order."""
        rows = np.array(touched[:MAX_CHUNKS], np.int64)
        keys, first = np.unique(columns.keys(ids)[rows], return_index=True)
        order = np.argsort(first)
        count = len(keys)
        places = np.linspace(0, 1, count, dtype=np.float32) if count else np.zeros(0, np.float32)
        return cls(1, keys[order], places, np.ones(count, np.uint16))

    def merged(self, other: "Trace") -> "Trace":
        """Both together; what few boots touched goes, and old boots fade when there are many."""
        keys, inverse = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        counts, places = np.zeros(len(keys), np.float64), np.zeros(len(keys), np.float64)
        both = np.concatenate([self.counts, other.counts]).astype(np.float64)
        np.add.at(counts, inverse, both)
        np.add.at(places, inverse, np.concatenate([self.positions, other.positions]) * both)
        places /= counts
        boots = self.boots + other.boots
        kept = counts * _RARE >= boots
        if boots > _MAX_BOOTS:
            counts, boots = np.maximum(1, counts // 2), boots // 2
        order = np.flatnonzero(kept)[np.argsort(places[kept], kind="stable")][:MAX_CHUNKS]
        return Trace(boots, keys[order], places[order].astype(np.float32), counts[order].astype(np.uint16))

    def chunks(self, ids: Ids) -> list[int]:
        """The rows of an image's `ids` that this trace names, in its order; any image's."""
        rows = columns.find_keys(self.keys, columns.keys(ids))
        found: list[int] = rows[rows >= 0].tolist()
        return found

    def encode(self) -> bytes:
        """The object's bytes."""
        header = {"boots": self.boots, "chunks": len(self.keys)}
        shapes = (self.keys.astype("<u8"), self.positions.astype("<f4"), self.counts.astype("<u2"))
        return columns.encode(MAGIC, header, *shapes)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises Corrupt."""
        read = columns.Reader(data, MAGIC, "boot trace", {"boots", "chunks"})
        boots, chunks = read.count("boots", 2 * _MAX_BOOTS), read.count("chunks", MAX_CHUNKS)
        trace = cls(boots, read.column("<u8", chunks), read.column("<f4", chunks), read.column("<u2", chunks))
        read.end()
        if chunks and (not np.isfinite(trace.positions).all() or not trace.counts.min()):
            raise Corrupt("boot trace: a position or a count is out of bounds")
        return trace


class Recorder:
    """Notes the first touch of each chunk."""

    def __init__(self, chunks: int) -> None:
        self._touched = bytearray(chunks)
        self.order: list[int] = []

    def touch(self, chunks: range) -> None:
        """The guest read these. Cheap when it did before."""
        at = self._touched.find(0, chunks.start, chunks.stop)
        while at >= 0:
            self._touched[at] = 1
            self.order.append(at)
            at = self._touched.find(0, at + 1, chunks.stop)
