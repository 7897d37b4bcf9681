"""A store with a clock that can be turned, and the disks that were pushed into it."""

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from imagestore.backends.protocol import Backend
from imagestore.formats.digest import Digest
from imagestore.formats.manifest import PAGE_BYTES, PAGED_CHUNKS
from imagestore.gc import collect
from imagestore.pull import pull
from imagestore.push import push
from imagestore.store.store import Store
from imagestore.verify import verify_store
from tests.memory import Memory

HOUR = 3600.0
BLOCK = 32 << 10


def disk(*seeds: int, blocks: int = 16) -> bytes:
    """A raw disk: for each seed `blocks` times 32 KiB that depend on it alone, so that disks share what seeds share."""
    parts = [
        np.random.default_rng(seed).integers(0, 64, blocks * BLOCK, np.uint8).tobytes() for seed in seeds
    ]
    return b"".join(parts)


@dataclass
class World:
    """`images`: every digest that was ever pushed, and its disk."""

    directory: Path
    now_s: float = 1_000_000.0
    backend: Backend | None = None
    images: dict[Digest, bytes] = field(default_factory=dict)
    cache: str = "cache"

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.memory = Memory(clock=lambda: self.now_s)
        self.store = Store.init(self.backend or self.memory, single_writer=True)

    def push(self, name: str, data: bytes, store: Store | None = None) -> Digest:
        path = self.directory / f"disk-{random.getrandbits(64):x}"
        path.write_bytes(data)
        try:
            digest = push(
                store or self.store,
                path,
                name,
                architecture="x86_64",
                format_="raw",
                cache=self.directory / self.cache,
            ).digest
        finally:
            path.unlink()
        self.images[digest] = data
        return digest

    def check(self, name: str) -> None:
        """The name's image comes out as it was pushed."""
        self.check_digest(self.store.names.get(name).digest("x86_64"))

    def check_digest(self, digest: Digest) -> None:
        out = self.directory / "out"
        pull(self.store, digest, out, format_="raw", durable=False)
        assert out.read_bytes() == self.images[digest]
        out.unlink()

    def check_all(self) -> None:
        """The store verifies, byte for byte, and every named image comes out as it was pushed."""
        assert verify_store(self.store, full=True).problems == []
        for record in self.store.names.list():
            for digest in record.images.values():
                self.check_digest(digest)

    def stored(self, tree: str) -> int:
        return sum(len(thing.data) for key, thing in self.memory.objects.items() if key.startswith(tree))

    def collect_for(self, hours: float, **options: float) -> None:
        for _ in range(8):
            self.now_s += hours * HOUR / 8
            collect(self.store, **options)  # type: ignore[arg-type]


def write_pages(page_bytes: int | None = 128 << 10) -> None:
    """What is pushed from now on has pages, however small it is; None: as usual."""
    writer = sys.modules[push.__module__]
    few, size = (1, page_bytes) if page_bytes else (PAGED_CHUNKS, PAGE_BYTES)
    writer.PAGED_CHUNKS, writer.PAGE_BYTES = few, size  # type: ignore[attr-defined]
