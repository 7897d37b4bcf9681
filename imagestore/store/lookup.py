"""Finding out which chunks a store holds: the name's last image, this machine's memory, and the published hooks."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Self

import numpy as np

from imagestore.disks.windows import Window
from imagestore.errors import Corrupt, NotFound
from imagestore.formats.columns import Ids
from imagestore.formats.digest import Digest
from imagestore.formats.index import Hooks, IndexPart
from imagestore.formats.keys import PACKS
from imagestore.formats.layout import Layout
from imagestore.formats.pack import Footer
from imagestore.store import index
from imagestore.store.leases import Lease
from imagestore.store.names import NameRecord
from imagestore.store.placement import Placement
from imagestore.store.store import Store

_AHEAD_WINDOWS = 10
"""How far unknown chunks are looked up in the hooks before they count as new."""


class Lookup:
    """Puts what the store holds into a placement. A context manager: from `engage` on it holds a lease.

    parts_bytes: most bytes of index parts to read, None for all that are met.
    """

    def __init__(
        self,
        store: Store,
        lease: Lease,
        placement: Placement,
        local: index.LocalIndex | None = None,
        *,
        parts_bytes: int | None = None,
    ) -> None:
        self._store, self._lease, self._placement, self._local = store, lease, placement, local
        self._stack = ExitStack()
        self._pool = ThreadPoolExecutor(4, "sf-lookup")
        self._lineage: tuple[Digest, int, int] | None = None
        self._engaged = False
        self._hooks = Hooks()
        self._asked: set[Digest] = set()
        self._parts_bytes = parts_bytes

    def __enter__(self) -> Self:
        self._stack.callback(self._pool.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def follow(self, record: NameRecord, architecture: str) -> None:
        """Take the chunks of the name's image as known; where they lie is asked when it matters."""
        images = {} if record.removed else record.images
        digest = images.get(architecture) or next(iter(images.values()), None)
        if digest is None:
            return
        try:
            ids = self._store.manifest(digest).ids
        except (NotFound, Corrupt):
            return
        first = self._placement.chunks.add(ids, -1, 0)
        self._lineage = digest, first, first + len(ids)

    def engage(self) -> None:
        """Take a lease, then find out where chunks lie: before anything is relied on or written."""
        if self._engaged:
            return
        self._engaged = True
        self._stack.enter_context(self._lease)
        layout = self._layout()
        unfinished = self._local.unfinished() if self._local is not None else []
        named = {*(layout.packs if layout else ()), *(pack for pack, _ in unfinished)}
        usable = self._reuse(named)
        if self._lineage is not None:
            _, first, end = self._lineage
            chunks = self._placement.chunks.rows[first:end]
            if layout is None:
                lost = self._placement.add_pack(Digest(bytes(32)), usable=False)
                chunks["frame"] = self._placement.add_frame(lost)
            else:
                start = self._placement.add_layout(layout, usable)
                chunks["frame"], chunks["offset"] = (
                    start + layout.chunk_frames.astype(np.int64),
                    layout.chunk_offsets,
                )
        there = self._load(unfinished, usable)
        if self._local is not None:
            self._local.forget_packs(pack for pack, _ in unfinished if pack not in there)
        self._hooks, _ = index.read_hooks(self._store)

    def _layout(self) -> Layout | None:
        if self._lineage is None:
            return None
        digest, first, end = self._lineage
        try:
            layout = self._store.layout(digest)
        except (NotFound, Corrupt):
            return None
        return layout if len(layout.chunk_frames) == end - first else None

    def _reuse(self, packs: set[Digest]) -> set[Digest]:
        """Those of `packs` that may be relied on (if they exist: a hint may be old)."""
        return self._lease.reuse(packs) if packs else packs

    def ahead(self, windows: Iterable[Window]) -> Iterator[Window]:
        """The windows again, some later, and the index parts loaded whose hooks they meet."""
        waiting: deque[Window] = deque()
        for window in windows:
            if len(window.ids) and not self._engaged and (self._placement.find(window.ids) < 0).any():
                self.engage()
            waiting.append(window)
            if self._hooks.parts:
                self.load_parts(window.ids)
            while len(waiting) > (_AHEAD_WINDOWS if self._hooks.parts else 0):
                yield waiting.popleft()
        yield from waiting

    def load_parts(self, ids: Ids) -> None:
        """Read the index parts whose hooks are among the unknown ones of `ids`."""
        unknown = ids[self._placement.find(ids) < 0]
        footers: list[tuple[Digest, Footer]] = []
        for name, size_bytes in self._hooks.matching(unknown) if len(unknown) else ():
            if name not in self._asked:
                self._asked.add(name)
                part = self._part(name, size_bytes)
                footers += part.footers if part is not None else ()
        self._load(footers, self._reuse({pack for pack, _ in footers} - set(self._placement.packs)))

    def _part(self, name: Digest, size_bytes: int) -> IndexPart | None:
        part = self._local.get(name) if self._local is not None else None
        if part is not None:
            return part
        if self._parts_bytes is not None:
            if size_bytes > self._parts_bytes:
                return None
            self._parts_bytes -= size_bytes
        part = index.read_part(self._store, name)
        if part is not None and self._local is not None:
            self._local.keep(name, part)
        return part

    def _load(self, footers: Iterable[tuple[Digest, Footer]], usable: set[Digest]) -> set[Digest]:
        """Make known what lies in packs that a hint told of; those that are there."""
        known = set(self._placement.packs)
        fresh = {pack: footer for pack, footer in footers if pack in usable and pack not in known}
        there = set()
        for pack, exists in zip(fresh, self._pool.map(self._is_there, fresh.items()), strict=True):
            if exists:
                there.add(pack)
                self._placement.add_footer(pack, fresh[pack])
        return there

    def _is_there(self, pack: tuple[Digest, Footer]) -> bool:
        try:
            stat = self._store.backend.stat(PACKS.key(pack[0]))
        except NotFound:
            return False
        return stat.size_bytes >= pack[1].data_bytes
