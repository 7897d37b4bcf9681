"""What a push costs in requests and metadata, in an empty store and in one that holds thousands of other images."""

import collections
import threading

import numpy as np
import pytest

from imagestore.backends.directory import Directory
from imagestore.formats import index
from imagestore.formats.digest import Digest
from imagestore.formats.keys import HOOKS_KEY, INDEX
from imagestore.formats.pack import Footer
from imagestore.pull import pull
from imagestore.push import push
from imagestore.store.store import Store
from tests.drills import everything
from tests.unit.imagestore.images import make_raw

PER_IMAGE = 2500


class Counted(Directory):
    """A directory that counts what is asked of it."""

    def __init__(self, root):
        super().__init__(root)
        self.lock = threading.Lock()
        self.requests = collections.Counter()
        self.metadata_bytes = 0

    def count(self, verb, key):
        with self.lock:
            self.requests[verb, key.partition("/")[0]] += 1

    def get(self, key, start=0, length=None):
        self.count("get", key)
        found = super().get(key, start, length)
        self.metadata_bytes += 0 if key.startswith("packs/") else len(found.data)
        return found

    def stat(self, key):
        self.count("stat", key)
        return super().stat(key)

    def put(self, key, data, **conditions):
        self.count("put", key)
        return super().put(key, data, **conditions)

    def delete(self, key, **conditions):
        self.count("delete", key)
        return super().delete(key, **conditions)


def crowd(store, images):
    """Index parts and hooks of images that share nothing with anything."""
    random, hooks = np.random.default_rng(1), index.Hooks()
    for _ in range(images):
        frames = PER_IMAGE // 10
        footer = Footer(
            codecs=np.ones(frames, np.uint8),
            sizes=np.full(frames, 90_000, np.uint32),
            plain_sizes=np.full(frames, 250_000, np.uint32),
            hashes=random.integers(0, 256, (frames, 32), dtype=np.uint8),
            counts=np.full(frames, 10, np.uint32),
            lengths=np.full(PER_IMAGE, 25_000, np.uint32),
            ids=random.integers(0, 256, (PER_IMAGE, 32), dtype=np.uint8),
        )
        part = index.IndexPart(((Digest.of(footer.encode()), footer),))
        data = part.encode()
        store.backend.put(INDEX.key(Digest.of(data)), data)
        hooks = hooks.with_part(Digest.of(data), part, len(data))
    store.backend.put(HOOKS_KEY, hooks.encode())


@pytest.fixture
def disk(tmp_path):
    return make_raw(tmp_path / "disk.raw", size_bytes=96 << 20)


def stranger(tmp_path, number):
    """The same store, seen by a client that never saw it."""
    return Store.open(Counted(tmp_path / "store")), tmp_path / f"cache{number}"


def test_few_requests_push_pull_and_find_nothing_new(tmp_path, disk):
    Store.init(Directory(tmp_path / "store"))
    store, cache = stranger(tmp_path, 0)
    digest = push(store, disk, "debian", cache=cache).digest
    packs = store.backend.requests["put", "packs"]
    assert store.backend.requests.total() <= 16 + packs + 10, store.backend.requests
    for number, name in ((0, "debian"), (1, "debian")):
        store, cache = stranger(tmp_path, number)
        assert not push(store, disk, name, cache=cache).changed
        assert store.backend.requests.total() <= 6 + packs, store.backend.requests
    store, _ = stranger(tmp_path, 2)
    pull(store, digest, tmp_path / "out.raw", format_="raw")
    assert store.backend.requests.total() <= 12, store.backend.requests


@pytest.mark.drill
def test_a_stranger_finds_an_image_among_thousands_reading_little(tmp_path, disk):
    store = Store.init(Directory(tmp_path / "store"))
    crowd(store, 2000 if everything() else 200)
    push(store, disk, "debian", "1", cache=tmp_path / "first")
    with disk.open("r+b") as file:
        file.seek(30 << 20)
        file.write(np.random.default_rng(2).bytes(3 << 20))
    store, cache = stranger(tmp_path, 0)
    result = push(store, disk, "another", cache=cache)
    assert result.new_bytes < 1.05 * (3 << 20) + (512 << 10)
    assert store.backend.metadata_bytes < 16 << 20
    store, _ = stranger(tmp_path, 1)
    pull(store, result.digest, tmp_path / "out.raw", format_="raw")
    assert (tmp_path / "out.raw").read_bytes() == disk.read_bytes()
    assert store.backend.metadata_bytes < 1 << 20


def test_the_newest_of_twelve_generations_is_pulled_without_much_more(tmp_path, disk):
    store = Store.init(Directory(tmp_path / "store"))
    random = np.random.default_rng(3)
    for _ in range(12):
        with disk.open("r+b") as file:
            for _ in range(40):
                file.seek(int(random.integers(90 << 20)) // 4096 * 4096)
                file.write(random.bytes(int(random.integers(1, 300)) << 9))
        digest = push(store, disk, "debian", cache=tmp_path / "cache").digest
    fresh = Store.init(Directory(tmp_path / "fresh"))
    push(fresh, disk, "debian", cache=tmp_path / "cache")
    old, new = (pull(one, digest, tmp_path / "out.raw", format_="raw") for one in (store, fresh))
    assert old.fetched_bytes <= 1.3 * new.fetched_bytes
    assert old.requests <= 2 * new.requests + 4
    assert (tmp_path / "out.raw").read_bytes() == disk.read_bytes()
