"""What a writer knows of the chunks that a store holds: never needed to read, never trusted without a look.

An index part (`index/ab/<hex>`, named by its BLAKE3) holds the footers of the packs of one push. `hooks/all` lists
for every part the ids that begin with a zero byte, and at least sixteen; a writer loads the parts whose hooks it
meets. What was read or written once is kept in files under SF_CACHE_DIR. A miss costs a duplicate, never correctness.
"""

import contextlib
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from imagestore.disks.chunker import U64
from imagestore.errors import Conflict, Corrupt, NotFound
from imagestore.formats import columns
from imagestore.formats.columns import Ids
from imagestore.formats.digest import Digest
from imagestore.formats.pack import Footer
from imagestore.store.store import Store, derived_key

PART_MAGIC = b"sf-index 1\n"
HOOKS_MAGIC = b"sf-hooks 1\n"
HOOKS_KEY = "hooks/all"
_MAX_PACKS = 1 << 16
_MAX_PARTS = 1 << 24
_CACHE_BYTES = 256 << 20
_ATTEMPTS = 5
_MIN_HOOKS = 16


@dataclass(frozen=True, slots=True, eq=False)
class IndexPart:
    """Copies of the footers of some packs."""

    footers: tuple[tuple[Digest, Footer], ...]

    def encode(self) -> bytes:
        """The object's bytes; their BLAKE3 is its name."""
        encoded = [footer.encode() for _, footer in self.footers]
        sizes = np.array([len(data) for data in encoded], "<u4")
        return columns.encode(
            PART_MAGIC, {"packs": len(encoded)}, sizes, np.frombuffer(b"".join(encoded), np.uint8)
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises Corrupt."""
        read = columns.Reader(data, PART_MAGIC, "index part")
        packs = read.count("packs", _MAX_PACKS)
        encoded = [read.column("u1", size).tobytes() for size in read.column("<u4", packs).tolist()]
        read.end()
        return cls(tuple((Digest.of(one), Footer.decode(one)) for one in encoded))

    @property
    def hooks(self) -> U64:
        """Keys by which a writer recognises that this part is worth loading."""
        if not self.footers:
            return np.zeros(0, np.uint64)
        ids = np.concatenate([footer.ids for _, footer in self.footers])
        every = np.unique(columns.keys(ids))
        return np.union1d(every[:_MIN_HOOKS], columns.keys(ids[ids[:, 0] == 0]))


@dataclass(frozen=True, slots=True, eq=False)
class Hooks:
    """The published list: for each part its name, size in bytes and hooks; the hooks of all parts are sorted."""

    parts: tuple[Digest, ...] = ()
    sizes: tuple[int, ...] = ()
    part_of_hook: npt.NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    keys: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))

    def encode(self) -> bytes:
        """The object's bytes."""
        header = {"hooks": len(self.keys), "parts": len(self.parts)}
        parts, sizes = np.frombuffer(b"".join(self.parts), np.uint8), np.array(self.sizes, "<u4")
        return columns.encode(
            HOOKS_MAGIC, header, parts, sizes, self.part_of_hook.astype("<u4"), self.keys.astype("<u8")
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises Corrupt."""
        read = columns.Reader(data, HOOKS_MAGIC, "hooks")
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


def part_key(name: Digest) -> str:
    """Where an index part is kept."""
    return derived_key("index", name)


def read_hooks(store: Store) -> tuple[Hooks, str | None]:
    """The published hooks and their etag; none when there are none, or none that can be read."""
    try:
        found = store.backend.get(HOOKS_KEY)
        return Hooks.decode(found.data), found.stat.etag
    except NotFound:
        return Hooks(), None
    except Corrupt:
        return Hooks(), found.stat.etag


def read_part(store: Store, name: Digest) -> IndexPart | None:
    """A published part; None when it is not there, or is not what its name says: a hint."""
    try:
        data = store.backend.get(part_key(name)).data
        return IndexPart.decode(data) if Digest.of(data) == name else None
    except (NotFound, Corrupt):
        return None


def publish_part(store: Store, part: IndexPart) -> Digest:
    """Write an index part and add it to the hooks. A lost race for the hooks is repeated, then let be: a hint."""
    data = part.encode()
    name = Digest.of(data)
    store.backend.put(part_key(name), data)
    for _ in range(_ATTEMPTS):
        hooks, etag = read_hooks(store)
        body = hooks.with_part(name, part, len(data)).encode()
        try:
            store.backend.put(HOOKS_KEY, body, if_match=etag, if_none_match=etag is None)
        except Conflict:
            continue
        return name
    return name


class LocalIndex:
    """Index parts of one store on this machine: copies of published ones, and packs of pushes that did not end."""

    def __init__(self, store_id: str, directory: Path | None = None) -> None:
        home = directory or Path(os.environ.get("SF_CACHE_DIR") or Path.home() / ".cache" / "sf")
        self._directory = home / "index" / Digest.of(store_id.encode()).hex()[:32]

    def get(self, name: Digest) -> IndexPart | None:
        """A copy of a published part."""
        try:
            data = (self._directory / f"{name.hex()}.part").read_bytes()
            return IndexPart.decode(data) if Digest.of(data) == name else None
        except (OSError, Corrupt):
            return None

    def keep(self, name: Digest, part: IndexPart) -> None:
        """Remember a published part."""
        self._write(f"{name.hex()}.part", part.encode())

    def keep_pack(self, pack: Digest, footer: Footer) -> None:
        """Remember a pack that arrived before its index part was published."""
        self._write(f"{pack.hex()}.pack", footer.encode())

    def unfinished(self) -> list[tuple[Digest, Footer]]:
        """Packs that arrived in pushes that were cut off."""
        found = []
        for path in sorted(self._directory.glob("*.pack")):
            with contextlib.suppress(OSError, Corrupt):
                data = path.read_bytes()
                found.append((Digest.of(data), Footer.decode(data)))
        return found

    def forget_packs(self, packs: Iterable[Digest]) -> None:
        """These are published, or gone."""
        for pack in packs:
            with contextlib.suppress(OSError):
                (self._directory / f"{pack.hex()}.pack").unlink(missing_ok=True)

    def _write(self, name: str, data: bytes) -> None:
        """A hint that cannot be written, or is lost in a crash, is no error."""
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            beside = self._directory / f".{secrets.token_hex(8)}"
            beside.write_bytes(data)
            beside.rename(self._directory / name)
            self._shrink()

    def _shrink(self) -> None:
        """Drop the oldest parts past a total of 256 MiB."""
        found = [(path, path.stat()) for path in self._directory.iterdir()]
        total = 0
        for path, stat in sorted(found, key=lambda one: -one[1].st_mtime):
            total += stat.st_size
            if total > _CACHE_BYTES:
                path.unlink(missing_ok=True)
