"""Finding out which chunks a store holds: the name's last image, this machine's memory, and the published hooks."""

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress

import numpy as np

from imagestore.disks.windows import Window
from imagestore.errors import Corrupt, NotFound
from imagestore.formats.columns import Ids
from imagestore.formats.digest import Digest
from imagestore.formats.index import Hooks, IndexPart
from imagestore.formats.layout import Image, Layout
from imagestore.formats.manifest import Manifest
from imagestore.formats.pack import Footer
from imagestore.store import index
from imagestore.store.packing import Packer

_AHEAD_WINDOWS = 10  # how far unknown chunks are looked up in the hooks before they count as new
Footers = Collection[tuple[Digest, Footer]]


class Lookup(AbstractContextManager["Lookup"]):
    """Puts what the store holds into a packer's placement. A context manager: from `engage` on it holds the lease.

    parts_bytes: most bytes of index parts to read.
    """

    def __init__(self, packer: Packer, *, parts_bytes: float = math.inf) -> None:
        self._packer, self._store, self._lease = packer, packer.store, packer.lease
        self._placement, self._local = packer.placement, packer.local
        self._followed: tuple[Digest, Manifest, Layout | None] | None = None
        self._engaged = False
        self.hooks: tuple[Hooks, str | None] = Hooks(), None  # as they were when it engaged, and their etag
        self._asked: set[Digest] = set()
        self._parts_bytes = parts_bytes

    def __exit__(self, *_: object) -> None:
        if self._engaged:
            self._lease.__exit__()

    def follow(self, digest: Digest) -> Image | None:
        """Take an image's chunks as known, the first of all; whether they are there is asked when it matters.

        None if it is not there.
        """
        if (found := self._image(digest)) is not None:
            self._placement.chunks.add(found[0].ids, -1, 0)
            self._followed = digest, *found
        return found

    def _image(self, digest: Digest) -> Image | None:
        with suppress(NotFound, Corrupt):
            return self._store.image(digest)
        return None

    def engage(self) -> None:
        """Take a lease, then find out where chunks lie: before anything is relied on or written."""
        if self._engaged:
            return
        unfinished = self._local.unfinished() if self._local else []
        sizes = {pack: footer.data_bytes for pack, footer in unfinished}
        digest, manifest, layout = self._followed or (None, None, None)
        sizes |= layout.pack_sizes() if layout else {}
        granted = self._lease.begin(sizes)
        self._engaged = True
        usable = self._store.has_packs({pack: sizes[pack] for pack in granted})
        if digest and len(usable) < len(sizes):  # a repack has moved what was read, perhaps
            _, layout = self._image(digest) or (None, None)
            moved = layout.pack_sizes() if layout else {}
            usable |= self._there({pack: size for pack, size in moved.items() if pack not in usable})
        if manifest:
            chunks = self._placement.chunks.rows[: len(manifest.ids)]
            if layout is None:
                lost = self._placement.add_pack(Digest(bytes(32)), usable=False)
                chunks["frame"] = self._placement.add_frame(lost)
            else:
                start, count = self._placement.add_layout(layout, usable), len(chunks)
                places = start + layout.chunk_frames.astype(np.int64), layout.chunk_offsets
                chunks["frame"], chunks["offset"] = (column[:count] for column in places)
                self._placement.chunks.add(layout.pages.ids, *(column[count:] for column in places))
        self._load(unfinished, usable)
        if self._local:
            self._local.forget_packs(pack for pack, _ in unfinished if pack not in usable)
        self.hooks = self._packer.hooks = index.read_hooks(self._store)

    def _there(self, sizes: Mapping[Digest, int]) -> set[Digest]:
        """Those of these packs that may be relied on and are there, at least so many bytes of each."""
        usable = self._lease.reuse(sizes) if sizes else set()
        return self._store.has_packs({pack: sizes[pack] for pack in usable})

    def ahead(self, windows: Iterable[Window]) -> Iterator[Window]:
        """The windows again, some later, and the index parts loaded whose hooks they meet."""
        waiting: deque[Window] = deque()
        for window in windows:
            if len(window.ids) and not self._engaged and (self._placement.find(window.ids) < 0).any():
                self.engage()
            waiting.append(window)
            parts = self.hooks[0].parts
            if parts:
                self.load_parts(window.ids)
            while len(waiting) > (_AHEAD_WINDOWS if parts else 0):
                yield waiting.popleft()
        yield from waiting

    def load_parts(self, ids: Ids) -> None:
        """Read the index parts whose hooks are among the unknown ones of `ids`."""
        unknown = ids[self._placement.find(ids) < 0]
        footers = list[tuple[Digest, Footer]]()
        for name, size_bytes in self.hooks[0].matching(unknown) if len(unknown) else ():
            if name not in self._asked:
                self._asked.add(name)
                if part := self._part(name, size_bytes):
                    footers += part.footers
        self.know(footers)

    def know(self, footers: Footers) -> None:
        """Make known what lies in these packs, as far as they may be relied on and are there."""
        known = set(self._placement.packs)
        self._load(footers, self._there({p: footer.data_bytes for p, footer in footers if p not in known}))

    def _part(self, name: Digest, size_bytes: int) -> IndexPart | None:
        if self._local and (part := self._local.get(name)):
            return part
        if size_bytes > self._parts_bytes:
            return None
        self._parts_bytes -= size_bytes
        part = index.read_part(self._store, name)
        if part and self._local:
            self._local.keep(name, part)
        return part

    def _load(self, footers: Footers, usable: set[Digest]) -> None:
        """Make known what lies in these packs."""
        known = set(self._placement.packs)
        for pack, footer in dict(footers).items():
            if pack in usable and pack not in known:
                self._placement.add_footer(pack, footer)
