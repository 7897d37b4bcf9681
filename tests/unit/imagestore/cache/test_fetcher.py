"""Reads of what is missing: fetched once, verified, in order of need, from whoever has it."""

import asyncio
import contextlib
import errno
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from imagestore.cache import fetcher, wanted
from imagestore.cache.fetcher import Fetcher, Filling
from imagestore.cache.open_images import OpenImages
from imagestore.cache.partial import PartialImage
from imagestore.cache.peers import Site
from imagestore.cache.reader import Reader
from imagestore.cache.wanted import Fill
from imagestore.errors import Unavailable
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.manifest import Manifest
from imagestore.formats.trace import Trace
from imagestore.store.frames import LocalOrigin, Origin, StoreOrigin
from imagestore.store.store import Store
from tests.memory import Memory
from tests.tiny_store import CHUNK, Meddled, disk, put_image

DATA = disk(5, 200)


def _origin(store: Store, digest: Digest, manifest: Manifest) -> StoreOrigin:
    return StoreOrigin(store.url, lambda: store, digest, manifest)


class Node:
    """One image over some stores, in order."""

    def __init__(self, tmp_path: Path, data: bytes, *stores: Meddled, digest: Digest | None = None) -> None:
        self.backends = stores or (Meddled(Memory()),)
        self.stores = []
        for backend in self.backends:
            store = Store.init(backend.inner) if not stores or digest is None else Store.open(backend.inner)
            if digest is None:
                self.digest = put_image(store, data)
            self.stores.append(Store(backend, store.info))
        self.digest = digest or self.digest
        self.manifest = self.stores[0].manifest(self.digest)
        self.partial = PartialImage(tmp_path / f"{self.digest.hex()}.part", self.digest, self.manifest)
        self.events: list[str] = []

    @contextlib.asynccontextmanager
    async def reading(
        self,
        *,
        fill: Fill = Fill.NEVER,
        read_ahead: int = 0,
        before: Sequence[Origin] = (),
        patience_s: float = 20,
        site: Site | None = None,
    ) -> AsyncIterator[Reader]:
        self.fetcher = Fetcher(lambda image, line: self.events.append(line))
        origins = [*before, *(_origin(store, self.digest, self.manifest) for store in self.stores)]
        layout = next(o for o in origins if isinstance(o, StoreOrigin)).layout()
        self.filling = Filling(self.partial, origins, layout, site or Site(), read_ahead)
        self.filling.wanted.fill = fill
        self.fetcher.add(self.filling)
        try:
            yield Reader(self.fetcher, self.filling, patience_s=patience_s)
        finally:
            await self.fetcher.close()


async def read(reader: Reader, offset: int, length: int) -> bytes:
    data: Buffer | None = reader.read_now(offset, length)
    return bytes(data if data is not None else await reader.read(offset, length))


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


def test_random_reads_give_the_images_bytes_and_fetch_no_frame_twice(tmp_path: Path) -> None:
    async def test() -> None:
        node, rng = Node(tmp_path, DATA), random.Random(1)
        node.backends[0].delay_s = 0.001
        async with node.reading() as reader:

            async def one() -> None:
                offset = rng.randrange(len(DATA))
                length = min(rng.choice([1, 512, 4096, 70_000, 400_000]), len(DATA) - offset)
                assert await read(reader, offset, length) == DATA[offset : offset + length]

            for _ in range(20):
                await asyncio.gather(*(one() for _ in range(16)))
            ranges = sorted(node.backends[0].ranges)
            assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ranges))
            assert reader.reads == 320 and 0 < reader.waits < 320 and reader.waited_s > 0
            assert node.filling.received["store"] == sum(n for _, n in ranges)

    run(test)


def test_filling_brings_everything_in_few_large_requests(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path, DATA)
        async with node.reading(fill=Fill.NOW):
            while not node.partial.complete:
                await asyncio.sleep(0.01)
        stored = sum(length for _, length in node.backends[0].ranges)
        assert len(node.backends[0].ranges) <= stored // (1 << 20) + 5
        assert node.partial.path.read_bytes() == DATA
        again = PartialImage(node.partial.path, node.digest, node.manifest)
        assert again.complete

    run(test)


def test_demand_goes_before_prefetch_and_prefetch_before_fill(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path, DATA)
        node.backends[0].delay_s = 0.05
        async with node.reading(fill=Fill.NOW) as reader:
            layout = _origin(node.stores[0], node.digest, node.manifest).layout()
            frame = int(layout.chunk_frames[100])
            node.filling.wanted.prefetch([100])
            node.fetcher.pump()
            await asyncio.gather(*(reader.read(at * CHUNK, 10) for at in (20, 60, 180)))
            started = node.backends[0].ranges[:16]  # as many as run at once
            wanted = {
                int(layout.frames["offset"][layout.chunk_frames[node.partial.chunks(at * CHUNK, 1)[0]]])
                for at in (20, 60, 180)
            } | {int(layout.frames["offset"][frame])}
            assert {w for w in wanted if any(s <= w < s + n for s, n in started)} == wanted

    run(test)


def test_a_reader_that_goes_on_finds_the_next_frames_there_and_a_lonely_one_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        node = Node(tmp_path, DATA)
        async with node.reading(read_ahead=2) as reader:
            layout = _origin(node.stores[0], node.digest, node.manifest).layout()
            frames = [np.flatnonzero(layout.chunk_frames == frame).tolist() for frame in range(16)]

            async def present_after(frame: int, chunk: int = 0) -> set[int]:
                await read(reader, node.partial.starts[frames[frame][chunk]], 10)
                while node.filling.wanted._busy:
                    await asyncio.sleep(0.01)
                return {at for at, chunks in enumerate(frames) if node.partial.present[chunks[0]]}

            monkeypatch.setattr(wanted, "_NEAR_BYTES", 0)
            assert await present_after(2) == {2}
            assert await present_after(3) == {2, 3, 4}
            assert await present_after(4) == {2, 3, 4, 5, 6}  # it was there already
            assert await present_after(2) == {2, 3, 4, 5, 6}
            assert await present_after(5) == {2, 3, 4, 5, 6, 7}
            assert await present_after(0) == {0, 2, 3, 4, 5, 6, 7}
            monkeypatch.setattr(wanted, "_NEAR_BYTES", CHUNK)
            assert await present_after(10) == {0, 2, 3, 4, 5, 6, 7, 10}
            assert await present_after(13, -1) == {0, 2, 3, 4, 5, 6, 7, 10, 13, 14}

    run(test)


def test_an_image_whose_first_store_fails_goes_on_from_the_second(tmp_path: Path) -> None:
    class Gone(Meddled):
        def get(self, key, start=0, length=None):  # type: ignore[no-untyped-def]
            if self.meddle and key.startswith("packs/"):
                raise Unavailable("connection refused")
            return super().get(key, start, length)

    async def test() -> None:
        gone, other = Gone(Memory()), Meddled(Memory())
        node = Node(tmp_path, DATA, gone, other)
        async with node.reading() as reader:
            assert await read(reader, 0, 100) == DATA[:100]
            assert not other.ranges
            gone.meddle = bytes
            for offset in range(0, len(DATA), 500_000):
                assert await read(reader, offset, 1000) == DATA[offset : offset + 1000]
            assert other.ranges and any("connection refused" in line for line in node.events)

    run(test)


@pytest.mark.parametrize(
    "meddle",
    [
        lambda data: bytes(len(data)),
        lambda data: data[: len(data) // 2],
        lambda data: data + data,
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[1000:] + data[:1000],
        lambda data: b"",
    ],
    ids=["zeros", "short", "twice as much", "one bit", "shifted", "nothing"],
)
def test_wrong_bytes_of_a_store_reach_neither_guest_nor_cache(
    tmp_path: Path, meddle: Callable[[bytes], bytes]
) -> None:
    async def test() -> None:
        liar, honest = Meddled(Memory(), meddle), Meddled(Memory())
        node = Node(tmp_path, DATA, liar, honest)
        async with node.reading() as reader:
            for offset in range(0, len(DATA), 300_000):
                assert await read(reader, offset, 5000) == DATA[offset : offset + 5000]
        assert all(
            node.partial.check(c, node.partial.read_chunk(c))
            for c, there in enumerate(node.partial.present)
            if there
        )
        assert any("meddled" in line for line in node.events)

    run(test)


def test_with_only_a_liar_the_read_fails_after_the_time_set_and_says_why(tmp_path: Path) -> None:
    async def test() -> None:
        node = Node(tmp_path, DATA, Meddled(Memory(), lambda data: bytes(len(data))))
        async with node.reading(patience_s=0.5) as reader:
            with pytest.raises(OSError, match="do not match their hash") as failure:
                await reader.read(0, 4096)
            assert failure.value.errno == errno.EIO and reader.failures == 1
            assert any("gave up a read after" in line for line in node.events)
            assert not any(node.partial.present)

    run(test)


def test_a_store_that_comes_back_serves_the_read_that_waited(tmp_path: Path) -> None:
    async def test() -> None:
        store = Meddled(Memory(), lambda data: bytes(len(data)))
        node = Node(tmp_path, DATA, store)
        async with node.reading() as reader:
            waiting = asyncio.ensure_future(reader.read(0, 4096))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            store.meddle = None
            assert await waiting == DATA[:4096]

    run(test)


def test_a_full_disk_stops_filling_and_reads_are_served_without_being_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "_FULL_S", 0.2)

    async def test() -> None:
        node = Node(tmp_path, DATA)
        full = True
        write = node.partial.write

        def refusing(chunks: Sequence[int], pieces: Sequence[Buffer]) -> None:
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(chunks, pieces)

        monkeypatch.setattr(node.partial, "write", refusing, raising=False)
        async with node.reading(fill=Fill.NOW) as reader:
            for offset in range(0, len(DATA), 700_000):
                assert await read(reader, offset, 100_000) == DATA[offset : offset + 100_000]
            assert not any(node.partial.present)
            assert any("disk is full" in line for line in node.events)
            full = False
            while not node.partial.complete:
                await asyncio.sleep(0.02)
        assert node.partial.path.read_bytes() == DATA

    run(test)


def test_chunks_of_other_cached_images_are_copied_and_only_new_ones_fetched(tmp_path: Path) -> None:
    async def test() -> None:
        backend = Memory()
        first = Node(tmp_path, DATA, Meddled(backend))
        async with first.reading(fill=Fill.NOW):
            while not first.partial.complete:
                await asyncio.sleep(0.01)
        new = DATA[: 50 * CHUNK] + disk(9, 10, 0) + DATA[50 * CHUNK :]
        store = Store.open(backend)
        second = Node(tmp_path, new, Meddled(backend), digest=put_image(store, new, frame_chunks=1))
        local = LocalOrigin(second.manifest)
        local.add(first.partial.path, first.manifest, first.partial.present)
        async with second.reading(fill=Fill.NOW, before=[local]):
            while not second.partial.complete:
                await asyncio.sleep(0.01)
        assert second.partial.path.read_bytes() == new
        assert second.filling.received["store"] <= 10.2 * CHUNK
        assert second.filling.received["local"] == int(second.manifest.data_bytes) - 10 * CHUNK
        local.close()

    run(test)


def test_a_damaged_local_copy_is_not_believed(tmp_path: Path) -> None:
    async def test() -> None:
        backend = Meddled(Memory())
        node = Node(tmp_path, DATA, backend)
        damaged = tmp_path / "damaged.raw"
        damaged.write_bytes(bytes(len(DATA)))
        local = LocalOrigin(node.manifest)
        local.add(damaged, node.manifest, None)
        async with node.reading(before=[local]) as reader:
            assert await read(reader, 0, 100_000) == DATA[:100_000]

    run(test)


def test_a_layout_that_was_replaced_by_a_repack_is_read_once_more(tmp_path: Path) -> None:
    async def test() -> None:
        backend = Memory()
        node = Node(tmp_path, DATA, Meddled(backend))
        async with node.reading() as reader:
            assert await read(reader, 0, 100) == DATA[:100]
            old = [key for key in backend.objects if key.startswith("packs/")]
            put_image(Store.open(backend), DATA, frame_chunks=3)
            for key in old:
                backend.delete(key)
            assert await read(reader, 0, len(DATA)) == DATA

    run(test)


def test_a_trace_of_an_older_version_brings_what_both_share_before_it_is_asked_for(tmp_path: Path) -> None:
    async def test() -> None:
        old = Node(tmp_path, DATA)
        async with old.reading() as reader:
            for at in (7, 150, 90, 33):
                await read(reader, at * CHUNK, 4096)
            assert reader.recorder
            trace = Trace.decode(Trace.of(old.manifest.ids, reader.recorder.order).encode())
        new = disk(8, 3, 0) + DATA
        node = Node(tmp_path, new)
        async with node.reading() as reader:
            node.filling.wanted.prefetch(trace.chunks(node.manifest.ids))
            node.fetcher.pump()
            while node.filling.wanted._busy:
                await asyncio.sleep(0.01)
            for at in (7, 150, 90, 33):
                await read(reader, (at + 3) * CHUNK, 4096)
            assert reader.waits == 0 and reader.reads == 4

    run(test)


def test_traces_merge_by_order_and_forget_what_few_boots_touched(tmp_path: Path) -> None:
    ids = Node(tmp_path, DATA).manifest.ids
    merged = Trace.of(ids, [5, 3, 9])
    for _ in range(8):
        merged = merged.merged(Trace.of(ids, [5, 9, 3, 2]))
    assert merged.chunks(ids) == [5, 9, 3, 2] and merged.boots == 9
    rare = merged.merged(Trace.of(ids, [77]))
    assert rare.chunks(ids) == [5, 9, 3, 2]


def test_what_is_said_of_a_store_has_no_password() -> None:
    """A node's own connection has one in its URL, and these lines become events that tenants read."""
    images = object.__new__(OpenImages)
    urls = ["https://n3:secret@10.0.0.1:13001/stores/local?sha256=00", "/srv/store"]
    images._stores = SimpleNamespace(urls=urls, get=str)  # type: ignore[assignment]
    manifest: Any = None
    names = [origin.name for origin in images._stored(Digest.of(b""), manifest)]
    assert names == ["10.0.0.1:13001/stores/local?sha256=00", "/srv/store"]
