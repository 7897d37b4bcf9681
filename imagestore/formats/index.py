"""Index parts and hooks, as bytes: what tells a writer which chunks a store holds (docs/formats.md).

An index part holds the footers of the packs of one push. Hooks list for every part the ids that begin with a zero
byte, and at least sixteen of each pack: a writer loads the parts whose hooks it meets.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from imagestore.errors import Corrupt
from imagestore.formats import columns
from imagestore.formats.columns import Ids
from imagestore.formats.digest import Digest
from imagestore.formats.pack import Footer

PART_MAGIC = b"sf-index 1\n"
HOOKS_MAGIC = b"sf-hooks 1\n"
_MAX_PACKS = 1 << 16
_MAX_PARTS = 1 << 24
_MIN_HOOKS = 16
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class IndexPart:
    """Copies of the footers of some packs."""

    footers: tuple[tuple[Digest, Footer], ...]

    def encode(self) -> bytes:
        """The object's bytes; their BLAKE3 is its name."""
        encoded = [footer.encode() for _, footer in self.footers]
        sizes, whole = np.array([len(data) for data in encoded], "<u4"), b"".join(encoded)
        return columns.encode(PART_MAGIC, {"packs": len(encoded)}, sizes, np.frombuffer(whole, np.uint8))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises Corrupt."""
        read = columns.Reader(data, PART_MAGIC, "index part", {"packs"})
        packs = read.count("packs", _MAX_PACKS)
        encoded = [read.column("u1", size).tobytes() for size in read.column("<u4", packs).tolist()]
        read.end()
        return cls(tuple((Digest.of(one), Footer.decode(one)) for one in encoded))

    @property
    def hooks(self) -> Keys:
        """Keys by which a writer recognises that this part is worth loading: of each pack, so also of small pushes."""
        found = [np.zeros(0, np.uint64)]
        for _, footer in self.footers:
            found.append(np.unique(columns.keys(footer.ids))[:_MIN_HOOKS])
            found.append(columns.keys(footer.ids[footer.ids[:, 0] == 0]))
        return np.unique(np.concatenate(found))


@dataclass(frozen=True, slots=True, eq=False)
class Hooks:
    """The published list: for each part its name, size in bytes and hooks; the hooks of all parts are sorted."""

    parts: tuple[Digest, ...] = ()
    sizes: tuple[int, ...] = ()
    part_of_hook: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    keys: Keys = field(default_factory=lambda: np.zeros(0, np.uint64))

    def encode(self) -> bytes:
        """The object's bytes."""
        header = {"hooks": len(self.keys), "parts": len(self.parts)}
        parts, sizes = np.frombuffer(b"".join(self.parts), np.uint8), np.array(self.sizes, "<u4")
        hooks = self.part_of_hook.astype("<u4"), self.keys.astype("<u8")
        return columns.encode(HOOKS_MAGIC, header, parts, sizes, *hooks)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises Corrupt."""
        read = columns.Reader(data, HOOKS_MAGIC, "hooks", {"hooks", "parts"})
        parts, hooks = read.count("parts", _MAX_PARTS), read.count("hooks", _MAX_PARTS)
        names = tuple(Digest(row.tobytes()) for row in read.ids(parts))
        sizes = tuple(read.column("<u4", parts).tolist())
        found = cls(names, sizes, read.column("<u4", hooks), read.column("<u8", hooks))
        read.end()
        if hooks and (found.part_of_hook.max() >= parts or (found.keys[1:] < found.keys[:-1]).any()):
            raise Corrupt("hooks: a hook of no part, or not in order")
        return found

    def with_part(self, name: Digest, part: IndexPart, size_bytes: int) -> "Hooks":
        """These and one part more."""
        if name in self.parts:
            return self
        more = part.hooks
        owners = np.concatenate([self.part_of_hook, np.full(len(more), len(self.parts), np.uint32)])
        keys = np.concatenate([self.keys, more])
        order = np.argsort(keys, kind="stable")
        return Hooks((*self.parts, name), (*self.sizes, size_bytes), owners[order], keys[order])

    def without(self, gone: Iterable[Digest]) -> "Hooks":
        """These less some parts."""
        lost = set(gone)
        keep = np.array([name not in lost for name in self.parts], np.bool_)
        left, chosen = np.flatnonzero(keep), keep[self.part_of_hook]
        owners = np.searchsorted(left, self.part_of_hook[chosen]).astype(np.uint32)
        parts, sizes = tuple(self.parts[at] for at in left), tuple(self.sizes[at] for at in left)
        return Hooks(parts, sizes, owners, self.keys[chosen])

    def matching(self, ids: Ids) -> list[tuple[Digest, int]]:
        """(part, size) of the parts with a hook among `ids`, those with most first."""
        wanted = np.unique(columns.keys(ids))
        first, last = np.searchsorted(self.keys, wanted), np.searchsorted(self.keys, wanted, "right")
        met = [self.part_of_hook[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True) if a < b]
        counts = np.bincount(np.concatenate([np.zeros(0, np.uint32), *met]), minlength=len(self.parts))
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        return [(self.parts[at], self.sizes[at]) for at in order.tolist()]
