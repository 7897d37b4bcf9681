"""A 40-GiB disk with 20 GiB of data, and versions of it with 10 MiB changed: metadata and requests of a push each.

The disk is made as it is read: every second 8 MiB are data, of blocks that differ and compress well. First as snapshots
are taken, by a look at what changed since the first version (`push_changed`), each with other bytes than those before;
then by whole pushes. Both through the store library, of a writer who remembers nothing; what they read of the disk is
counted of a snapshot alone, beside the clusters of 64 KiB that an overlay would hold.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._harness import Bench
from imagestore import Changes
from imagestore.backends.directory import Directory
from imagestore.backends.protocol import pieces
from imagestore.backends.wrappers import Wrapper
from imagestore.formats.digest import Digest
from imagestore.push import push, push_changed
from imagestore.store.store import Store

GIB = int(os.environ.get("SF_BENCH_GIB", "40"))
BLOCK, STRETCH = 4096, 16 << 20


class Synthetic:
    """`changed`: blocks that are others than in the first version."""

    def __init__(self) -> None:
        self.size_bytes = GIB << 30
        self.changed = np.zeros(self.size_bytes // BLOCK, np.uint64)
        self.read_bytes = 0

    def next_data(self, offset: int) -> tuple[int, int] | None:
        if offset % STRETCH >= STRETCH // 2:
            offset += STRETCH - offset % STRETCH
        end = offset - offset % STRETCH + STRETCH // 2
        return (offset, end) if offset < self.size_bytes else None

    def read(self, offset: int, out: memoryview) -> None:
        self.read_bytes += len(out)
        first, last = offset // BLOCK, -(-(offset + len(out)) // BLOCK)
        words = np.arange(first + 1, last + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        words += self.changed[first:last]
        data = np.repeat(words, BLOCK // 8).view(np.uint8)
        out[:] = data[offset - first * BLOCK :][: len(out)].data

    def change(self, places: int, total_bytes: int, seed: int) -> None:
        """So many stretches of adjoining blocks, which together have so many bytes."""
        each = total_bytes // places // BLOCK
        for at in np.random.default_rng(seed).integers(0, self.size_bytes // STRETCH, places).tolist():
            first = at * STRETCH // BLOCK + seed % 128
            self.changed[first : first + each] += np.uint64(seed)


class Counted(Wrapper):
    """Counts requests and the bytes that they carry, by kind."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.requests, self.sent, self.got = Counter[str](), Counter[str](), Counter[str]()

    def _do(self, verb: str, key: str, action: Any) -> Any:
        if verb != "now":
            self.requests[f"{verb} {key.partition('/')[0]}"] += 1
        found = action()
        if verb == "get":
            self.got[key.partition("/")[0]] += len(found.data)
        return found

    def list(self, prefix: str) -> Iterator[Any]:
        found = list(self.inner.list(prefix))
        self.requests[f"list {prefix}"] += -(-len(found) // 1000)
        return iter(found)

    def put(self, key: str, data: Any, **conditions: Any) -> Any:
        self.sent[key.partition("/")[0]] += sum(map(len, pieces(data)))
        return super().put(key, data, **conditions)


def run(bench: Bench) -> None:
    disk, writer = Synthetic(), sys.modules[push.__module__]

    @contextmanager
    def opened(*_: Any, **__: Any) -> Iterator[Synthetic]:
        yield disk

    writer.open_disk = opened  # type: ignore[attr-defined]
    place = bench.dir("store")
    Store.init(Directory(place))

    def once() -> tuple[Digest, Counted, int]:
        store = Store.open(Counted(Directory(place)))
        result = push(store, Path("/dev/null"), "disk", format_="raw", cache=bench.fresh("cache"))
        return result.digest, store.backend, result.new_bytes  # type: ignore[return-value]

    def metadata(digest: Digest, counted: Counted) -> int:
        """Everything sent that is no chunk of a disk: of packs the frames with pages, and all footers."""
        store = Store.open(Directory(place))
        layout = store.layout(digest)
        chunks = len(layout.chunk_frames) - len(layout.pages.ids)
        data = np.unique(layout.chunk_frames[:chunks])
        new = np.array([pack not in known for pack in layout.packs])[layout.frames["pack"]]
        own = new & ~np.isin(np.arange(len(new)), data)
        frames = int(layout.frames["size"][own].sum())
        every = int(layout.frames["size"][new].sum())
        return frames + sum(counted.sent.values()) - every

    def snapshot(base: Digest, stretches: np.ndarray[Any, Any]) -> tuple[Digest, Counted, int]:
        os.environ["SF_CACHE_DIR"] = str(bench.fresh("cache"))
        store = Store.open(Counted(Directory(place)))
        result = push_changed(store, disk, Changes(base, stretches), {})  # type: ignore[arg-type]
        return result.digest, store.backend, result.new_bytes  # type: ignore[return-value]

    known: set[Digest] = set()
    digest, counted, new = once()
    base, before = digest, disk.changed.copy()
    bench.number("first_metadata_mib", metadata(digest, counted) / 2**20, "MiB")
    bench.number("first_chunks", len(Store.open(Directory(place)).manifest(digest).ids))
    for number, (how, places) in enumerate(product(("snapshot", "whole"), (1, 10, 40)), 1):
        known = set(Store.open(Directory(place)).layout(digest).packs)
        disk.change(places, 10 << 20, number)
        if how == "snapshot":
            clusters = np.unique(np.flatnonzero(disk.changed != before) * BLOCK >> 16) << 16
            disk.read_bytes, held = 0, len(clusters) << 16
            found, counted, new = snapshot(base, np.stack([clusters, clusters + (1 << 16)], axis=1))
            bench.ratio(f"{how}_{places}_disk_read_vs_held", disk.read_bytes, held, at_most=2.5)
            told = metadata(found, counted)
        else:
            digest, counted, new = once()
            told = metadata(digest, counted)
        bench.number(f"{how}_{places}_new_mib", new / 2**20, "MiB")
        bench.number(f"{how}_{places}_metadata_mib", told / 2**20, "MiB", at_most=2)
        bench.number(f"{how}_{places}_requests", counted.requests.total(), at_most=20)
        read = sum(counted.got.values()) / 2**20
        bench.number(f"{how}_{places}_read_mib", read, "MiB")
        bench.note(f"{how}, {places} places: {dict(counted.requests)}")
        if how == "snapshot":
            disk.changed[:] = before
    opened_store = Store.open(Counted(Directory(place)))
    opened_store.image(digest)
    bench.number("open_requests", opened_store.backend.requests.total())  # type: ignore[attr-defined]
