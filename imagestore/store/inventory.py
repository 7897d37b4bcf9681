"""What lies in the packs of a store, for whoever looks at all of it: collector, verify, stats, repair."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from imagestore.backends.protocol import Backend, ObjectStat
from imagestore.disks.windows import in_order
from imagestore.errors import Corrupt, NotFound, StoreError
from imagestore.formats.digest import Digest
from imagestore.formats.index import Hooks, IndexPart
from imagestore.formats.keys import INDEX, PACKS, Kind
from imagestore.formats.layout import Layout
from imagestore.formats.pack import MAX_FRAME_BYTES, TRAILER, Footer
from imagestore.store.frames import Frames
from imagestore.store.index import change_hooks, publish_part, read_part
from imagestore.store.store import Store

_SHIFT = (MAX_FRAME_BYTES - 1).bit_length()
_MOST_TAIL_BYTES = 64 << 20
_SMALL_BYTES, _MANY_SMALL, _MERGED_BYTES = 128 << 10, 16, 1 << 20
"""Index parts below the first are put together, when there are so many, into parts of about the last."""


class Table:
    """A pack's footer and which of its chunks are in use."""

    def __init__(self, footer: Footer) -> None:
        self.footer = footer
        self.offsets = footer.offsets
        self.frames = footer.frame_of_chunk
        self._keys = (self.frames << _SHIFT) + footer.offset_in_frame
        self.live = np.zeros(len(footer.lengths), np.bool_)

    def locate(self, offsets: npt.NDArray[Any], inner: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """The chunk at `inner` in the plain bytes of the frame at `offsets`, or -1."""
        frames = np.clip(np.searchsorted(self.offsets, offsets), 0, len(self.offsets) - 1)
        wanted = (frames.astype(np.int64) << _SHIFT) + inner
        rows = np.clip(np.searchsorted(self._keys, wanted), 0, len(self._keys) - 1)
        return np.where((self.offsets[frames] == offsets) & (self._keys[rows] == wanted), rows, -1)

    def stored_bytes(self, chosen: npt.NDArray[Any]) -> float:
        """Stored bytes of some chunks, by a mask or their numbers: their share of their frames."""
        plain = np.bincount(self.frames[chosen], self.footer.lengths[chosen], len(self.offsets))
        return float((self.footer.sizes * (plain / self.footer.plain_sizes)).sum())

    @property
    def dead_share(self) -> float:
        """Part of the frames' stored bytes that no marked image uses."""
        return 1 - self.stored_bytes(self.live) / self.footer.data_bytes


class Use(NamedTuple):
    """Where a layout meets one pack: chunks of the image, and the rows of the pack's table that they are."""

    pack: Digest
    table: Table
    chunks: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


@dataclass(slots=True)
class Inventory:
    """Packs that are there, and the footers known from index parts (`parts`: to the packs of each that is right)."""

    store: Store
    packs: dict[Digest, ObjectStat] = field(default_factory=dict)
    parts: dict[Digest, Sequence[Digest]] = field(default_factory=dict)
    part_stats: dict[Digest, ObjectStat] = field(default_factory=dict)
    tables: dict[Digest, Table] = field(default_factory=dict)

    @classmethod
    def read(cls, store: Store) -> Self:
        """List packs and index, read the index parts: about one request per push that there was."""
        found = cls(store, dict(named(store, PACKS)), part_stats=dict(named(store, INDEX)))
        names = list(found.part_stats)
        with ThreadPoolExecutor(8, "index") as pool:
            for name, part in zip(names, pool.map(lambda name: read_part(store, name), names), strict=True):
                if part is not None:
                    found.parts[name] = [pack for pack, _ in part.footers]
                    there = (one for one in part.footers if one[0] in found.packs)
                    found.tables |= {pack: Table(footer) for pack, footer in there}
        return found

    def table(self, pack: Digest) -> Table:
        """Of a pack that is there, from its own end if no index has it. Raises NotFound, Corrupt."""
        if pack not in self.tables:
            self.tables[pack] = Table(read_tail(self.store.backend, pack)[0])
        return self.tables[pack]

    def part(self, packs: Iterable[Digest]) -> IndexPart:
        """An index part of packs whose footers are known."""
        return IndexPart(tuple((pack, self.tables[pack].footer) for pack in packs))

    def uses(self, layout: Layout) -> Iterator[Use]:
        """The packs of a layout. Raises NotFound for a lost pack, Corrupt where layout and footer differ."""
        chunk_packs = layout.frames["pack"][layout.chunk_frames]
        for number, pack in enumerate(layout.packs):
            table = self.table(pack)
            chunks = np.flatnonzero(chunk_packs == number)
            frames = layout.frames[layout.chunk_frames[chunks]]
            rows = table.locate(frames["offset"], layout.chunk_offsets[chunks])
            if not ((rows >= 0) & (table.footer.frames(number)[table.frames[rows]] == frames)).all():
                raise Corrupt(f"the layout of {layout.manifest} does not fit pack {pack}")
            yield Use(pack, table, chunks, rows)


def reindex(store: Store, inventory: Inventory, doomed: Collection[Digest] = ()) -> None:
    """Index parts without packs that are gone or about to go, small ones together; hooks of these and of no others."""
    stale: set[Digest] = set()
    for name, packs in list(inventory.parts.items()):
        kept = [pack for pack in packs if pack in inventory.packs and pack not in doomed]
        if len(kept) < len(packs):
            stale.add(name)
            if kept:
                inventory.parts[publish_part(store, inventory.part(kept))] = kept
    small = [stat for name, stat in inventory.part_stats.items() if name in inventory.parts.keys() - stale]
    small = sorted((s for s in small if s.size_bytes < _SMALL_BYTES), key=lambda s: (s.modified_s, s.key))
    while len(small) >= _MANY_SMALL:  # neighbours in time are wanted together
        names, size = list[Digest](), 0
        while small and size < _MERGED_BYTES:
            size += small[0].size_bytes
            names.append(Digest.parse(small.pop(0).key[-64:]))
        together = [pack for name in names for pack in inventory.parts[name]]
        inventory.parts[publish_part(store, inventory.part(together))] = together
        stale |= set(names)

    def mend(hooks: Hooks) -> Hooks:
        missing = inventory.parts.keys() - stale - set(hooks.parts)
        # A part that came after the inventory is there; one that a killed run deleted is not.
        unknown = set(hooks.parts) - inventory.parts.keys()
        lost = (stale | {name for name in unknown if not store.has(INDEX.key(name))}) & set(hooks.parts)
        if lost:
            hooks = hooks.without(lost)
        for name in missing:
            part = inventory.part(inventory.parts[name])
            hooks = hooks.with_part(name, part, len(part.encode()))
        return hooks

    if change_hooks(store, mend):
        for name in stale:
            store.backend.delete(INDEX.key(name))


def read_layouts(store: Store, images: Iterable[Digest]) -> Iterator[tuple[Digest, Layout | StoreError]]:
    """The layout of each image, or why there is none (NotFound, Corrupt); eight at a time."""

    def read(digest: Digest) -> tuple[Digest, Layout | StoreError]:
        try:
            return digest, store.layout(digest)
        except (NotFound, Corrupt) as err:
            return digest, err

    with ThreadPoolExecutor(8, "layouts") as pool:
        yield from in_order(pool, read, images, 16)


def read_tail(backend: Backend, pack: Digest) -> tuple[Footer, bytes]:
    """A pack's footer, and its bytes from there on. Raises NotFound, Corrupt."""
    key = PACKS.key(pack)
    size_bytes = backend.stat(key).size_bytes
    # Exactly that: a guess at its length would bring frames as well.
    end = backend.get(key, max(0, size_bytes - 12), min(12, size_bytes)).data
    length = int.from_bytes(end[:4], "little") + 12
    if end[4:] != TRAILER or length > min(size_bytes, _MOST_TAIL_BYTES):
        raise Corrupt(f"{backend.url}/{key} is no pack, or its footer is cut short")
    tail = backend.get(key, size_bytes - length, length).data
    return open_tail(tail, pack, size_bytes), tail


def open_tail(tail: bytes, pack: Digest, size_bytes: int | None = None) -> Footer:
    """The footer in the last bytes of a pack, of this length if that is known. Raises Corrupt."""
    if tail[-8:] != TRAILER or int.from_bytes(tail[-12:-8], "little") + 12 != len(tail):
        raise Corrupt(f"pack {pack} is none, or its footer is cut short")
    footer = Footer.decode(tail[:-12])
    if Digest.of(tail[:-12]) != pack or size_bytes not in (None, footer.data_bytes + len(tail)):
        raise Corrupt(f"pack {pack} has another footer or length than its name says")
    return footer


def check_pack(pack: Digest, data: bytes) -> None:
    """Whether these are the bytes of a pack, every frame and every chunk of it. Raises Corrupt."""
    size_bytes, view = int.from_bytes(data[-12:-8], "little") + 12, memoryview(data)
    frames = Frames.of_pack(pack, open_tail(data[-size_bytes:], pack, len(data)))
    for at, (start, length) in enumerate(frames.table[["offset", "size"]].tolist()):
        stored = view[start : start + length]
        if Digest.of(stored) != frames.table["hash"][at].tobytes():
            raise Corrupt(f"a frame of pack {pack} does not match its hash")
        frames.check(at, frames.cut(at, frames.expand(at, stored)))


def named(store: Store, kind: Kind) -> Iterator[tuple[Digest, ObjectStat]]:
    """Objects of a kind that is named by a digest; anything else there is not ours."""
    return ((Digest.parse(stat.key[-64:]), stat) for stat in store.objects(kind))
