"""Where missing chunks come from: other images on this node, the node's peers, stores. Tried in that order.

An origin's bytes are not trusted: `imagestore.cache.intake` hashes every chunk before anybody sees it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from imagestore.errors import Corrupt, NotFound
from imagestore.formats import columns
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.keys import PACKS
from imagestore.formats.layout import Layout
from imagestore.formats.manifest import Manifest
from imagestore.formats.pack import expand
from imagestore.store.store import Store

REQUEST_BYTES = 1 << 20
"""Neighbouring frames are asked for in one request up to about this many stored bytes."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some chunks (ascending), their bytes, and how many bytes crossed a wire for them."""

    chunks: Sequence[int]
    pieces: Sequence[Buffer]
    received_bytes: int
    clone: tuple[int, int] | None = None
    """File descriptor and offset to copy a single chunk from, instead of writing its bytes."""


class Origin(Protocol):
    """Called from several threads. Raises StoreError; what it yielded before an error may be used."""

    name: str
    kind: str
    """local, peer or store: the label in figures."""

    def fetch(self, chunks: Sequence[int]) -> Iterator[Batch]:
        """What it has of these chunks (ascending); it may leave some out."""
        ...


class StoreOrigin:
    """Whole frames from a store, in ranges of packs, placed by the layout that this store has."""

    kind = "store"

    def __init__(self, name: str, store: Callable[[], Store], digest: Digest, manifest: Manifest) -> None:
        self.name = name
        self._store = store
        """Opens it, or raises StoreError: a store that is away now may be needed, and there, later."""
        self._digest = digest
        self._manifest = manifest
        self._layout: Layout | None = None

    def layout(self, *, again: bool = False) -> Layout:
        """The layout, read once (or once more, since a repack replaces it). Raises StoreError."""
        if self._layout is None or again:
            layout = self._store().layout(self._digest)
            layout.check(self._manifest)
            self._layout = layout
        return self._layout

    def fetch(self, chunks: Sequence[int]) -> Iterator[Batch]:
        known = self._layout is not None
        done: set[int] = set()
        try:
            for batch in self._ranges(self.layout(), chunks):
                done.update(batch.chunks)
                yield batch
        except NotFound:
            if not known:
                raise
            rest = [chunk for chunk in chunks if chunk not in done]
            yield from self._ranges(self.layout(again=True), rest)

    def _ranges(self, layout: Layout, chunks: Sequence[int]) -> Iterator[Batch]:
        members: dict[int, list[int]] = {}
        for chunk, frame in zip(chunks, layout.chunk_frames[chunks].tolist(), strict=True):
            members.setdefault(frame, []).append(chunk)
        for run in frame_runs(layout, members):
            start = int(layout.frame_offsets[run[0]])
            length = int(layout.frame_offsets[run[-1]]) + int(layout.frame_sizes[run[-1]]) - start
            key = PACKS.key(layout.packs[int(layout.frame_packs[run[0]])])
            data = memoryview(self._store().backend.get(key, start, length).data)
            if len(data) != length:
                raise Corrupt(f"{self.name} answered with {len(data)} bytes instead of {length}")
            found: list[int] = []
            pieces: list[Buffer] = []
            for frame in run:
                at = int(layout.frame_offsets[frame]) - start
                stored = data[at : at + int(layout.frame_sizes[frame])]
                plain_bytes = int(layout.frame_plain_sizes[frame])
                plain = memoryview(expand(int(layout.frame_codecs[frame]), stored, plain_bytes))
                for chunk in members[frame]:
                    begin = int(layout.chunk_offsets[chunk])
                    found.append(chunk)
                    pieces.append(plain[begin : begin + int(self._manifest.lengths[chunk])])
            order = sorted(range(len(found)), key=found.__getitem__)
            yield Batch([found[i] for i in order], [pieces[i] for i in order], length)


def frame_runs(layout: Layout, frames: "dict[int, list[int]]") -> Iterator[list[int]]:
    """The frames in pack order, adjoining ones together up to REQUEST_BYTES."""
    ordered = sorted(frames, key=lambda f: (int(layout.frame_packs[f]), int(layout.frame_offsets[f])))
    run: list[int] = []
    size = 0
    for frame in ordered:
        offset, stored = int(layout.frame_offsets[frame]), int(layout.frame_sizes[frame])
        if run:
            last = run[-1]
            adjoins = int(layout.frame_offsets[last]) + int(layout.frame_sizes[last]) == offset
            same = layout.frame_packs[last] == layout.frame_packs[frame]
            if not (same and adjoins) or size + stored > REQUEST_BYTES:
                yield run
                run, size = [], 0
        run.append(frame)
        size += stored
    if run:
        yield run


class LocalOrigin:
    """Chunks that other images of this node's cache hold, complete or not."""

    name, kind = "this node", "local"

    def __init__(self, manifest: Manifest) -> None:
        self._lengths = manifest.lengths
        self._ids = manifest.ids
        self._keys = columns.keys(manifest.ids)
        self._where: dict[int, tuple[int, int, bytearray | None, int]] = {}
        self._files: list[int] = []

    def add(self, path: Path, other: Manifest, present: bytearray | None) -> None:
        """Use what `path`, an image with the manifest `other`, has. `present`: live flags per chunk, None for all."""
        keys = columns.keys(other.ids)
        if not len(keys) or not len(self._keys):
            return
        order = np.argsort(keys)
        at = order[np.minimum(np.searchsorted(keys, self._keys, sorter=order), len(order) - 1)]
        matches = np.flatnonzero((other.ids[at] == self._ids).all(axis=1)).tolist()
        if not matches:
            return
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        self._files.append(fd)
        offsets = other.offsets
        for chunk in matches:
            if chunk not in self._where or present is None:
                self._where[chunk] = (fd, int(offsets[at[chunk]]), present, int(at[chunk]))

    def fetch(self, chunks: Sequence[int]) -> Iterator[Batch]:
        for chunk in chunks:
            if chunk in self._where:
                fd, offset, present, theirs = self._where[chunk]
                if present is None or present[theirs]:
                    data = os.pread(fd, int(self._lengths[chunk]), offset)
                    yield Batch((chunk,), (data,), len(data), (fd, offset))

    def close(self) -> None:
        """Let go of the other images' files. Nothing may be fetching any more."""
        self._where.clear()
        for fd in self._files:
            os.close(fd)
        self._files.clear()
