from pathlib import Path

import pytest

from imagestore.backends.directory import Directory
from imagestore.cache.images import ImageCache
from imagestore.errors import Corrupt, Invalid, NotFound, Unavailable
from imagestore.formats.digest import Digest
from imagestore.formats.manifest import Manifest
from imagestore.pull import Seed, pull
from imagestore.push import push
from imagestore.store.store import Store
from tests.unit.imagestore.images import convert, identical, make_raw


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "index"))
    return Store.init(Directory(tmp_path / "store"))


ZSTD = ("-c", "-o", "compression_type=zstd")


@pytest.mark.parametrize(
    ("format_", "options"),
    [
        ("raw", ()), ("qcow2", ()), ("qcow2", ("-c",)), ("qcow2", ZSTD), ("qcow2", ("-o", "compat=0.10")),
        ("qcow2", ("-o", "cluster_size=512")), ("qcow2", (*ZSTD, "-o", "cluster_size=2M")),
        ("vmdk", ()), ("vmdk", ("-o", "subformat=streamOptimized")), ("vdi", ()), ("vhdx", ()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("odd_bytes", [0, 512, 3584])
def test_every_format_comes_out_as_it_went_in(store, tmp_path, format_, options, odd_bytes):
    raw = make_raw(tmp_path / "disk.raw", odd_bytes=odd_bytes)
    image = raw if format_ == "raw" else convert(raw, tmp_path / f"disk.{format_}", format_, *options)
    result = push(store, image, "debian", "12")
    pull(store, result.digest, tmp_path / "out.qcow2")
    pull(store, result.digest, tmp_path / "out.raw", format_="raw")
    assert identical(raw, "raw", tmp_path / "out.qcow2", "qcow2")
    assert identical(raw, "raw", tmp_path / "out.raw", "raw")
    if format_ in ("raw", "qcow2"):
        assert (tmp_path / "out.raw").read_bytes() == raw.read_bytes()
    assert store.names.get("debian", "12").images == {"x86_64": result.digest}


@pytest.mark.parametrize("size_bytes", [1, 511, 4095, 4097, (8 << 20) + 1, (16 << 20) - 1])
def test_sizes_that_are_no_multiple_of_a_block_work(store, tmp_path, size_bytes):
    disk = tmp_path / "disk"
    disk.write_bytes((b"some text that is repeated " * (size_bytes // 27 + 1))[:size_bytes])
    result = push(store, disk, "odd", format_="raw")
    pull(store, result.digest, tmp_path / "out", format_="raw")
    assert (tmp_path / "out").read_bytes() == disk.read_bytes()


def test_sparse_stays_sparse(store, tmp_path):
    disk = make_raw(tmp_path / "disk.raw")
    with disk.open("r+b") as file:
        file.truncate(50 << 30)
    result = push(store, disk, "big")
    pull(store, result.digest, tmp_path / "out", format_="raw")
    assert (tmp_path / "out").stat().st_size == 50 << 30
    assert (tmp_path / "out").stat().st_blocks * 512 < 8 << 20


def test_a_disk_of_zeros_is_an_image_without_chunks(store, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(100_000))
    result = push(store, disk, "empty", format_="raw")
    assert len(store.manifest(result.digest).ids) == 0
    pull(store, result.digest, tmp_path / "out.qcow2")
    assert identical(disk, "raw", tmp_path / "out.qcow2", "qcow2")


def test_the_same_image_again_writes_nothing(store, tmp_path):
    disk = make_raw(tmp_path / "disk.raw")
    first = push(store, disk, "debian")
    before = {stat.key: stat.etag for stat in store.backend.list("")}
    again = push(store, convert(disk, tmp_path / "disk.qcow2", "qcow2", "-c"), "debian", source={})
    assert (again.digest, again.new_bytes, again.written_bytes, again.changed) == (first.digest, 0, 0, False)
    assert {stat.key: stat.etag for stat in store.backend.list("")} == before


def test_a_client_that_never_saw_the_store_finds_the_chunks_under_another_name(store, tmp_path):
    disk = make_raw(tmp_path / "disk.raw", size_bytes=64 << 20)
    push(store, disk, "debian")
    result = push(store, disk, "other", "v2", cache=tmp_path / "elsewhere")
    assert result.new_bytes == 0


def test_a_changed_block_costs_little(store, tmp_path):
    disk = make_raw(tmp_path / "disk.raw", size_bytes=32 << 20)
    push(store, disk, "debian")
    with disk.open("r+b") as file:
        file.seek(9_000_000)
        file.write(b"changed")
    changed = push(store, disk, "debian")
    assert 0 < changed.new_bytes < 512 << 10
    pull(store, changed.digest, tmp_path / "out", format_="raw")
    assert (tmp_path / "out").read_bytes() == disk.read_bytes()


def test_what_a_cut_off_pull_left_is_used(store, tmp_path):
    disk = make_raw(tmp_path / "disk.raw", size_bytes=64 << 20)
    digest = push(store, disk, "debian").digest

    def enough(done):
        if done.done_bytes > 10 << 20:
            raise Unavailable("enough")

    for format_ in ("raw", "qcow2"):
        with pytest.raises(Unavailable):
            pull(store, digest, tmp_path / "out", format_=format_, progress=enough)
        assert not (tmp_path / "out").exists()
        result = pull(store, digest, tmp_path / "out", format_=format_)
        assert result.resumed_bytes > 0
        assert identical(disk, "raw", tmp_path / "out", format_)
        (tmp_path / "out").unlink()


def test_chunks_come_from_seeds_first_and_are_hashed(store, tmp_path):
    disk = make_raw(tmp_path / "disk.raw", size_bytes=32 << 20)
    first = push(store, disk, "debian")
    old = tmp_path / "old.raw"
    pull(store, first.digest, old, format_="raw")
    with disk.open("r+b") as file:
        file.seek(9_000_000)
        file.write(b"changed")
    second = push(store, disk, "debian")
    with old.open("r+b") as file:
        file.seek(4096)
        file.write(b"this seed is damaged")
    seed = Seed(store.manifest(first.digest), old)
    result = pull(store, second.digest, tmp_path / "out", format_="raw", seeds=[seed])
    assert (tmp_path / "out").read_bytes() == disk.read_bytes()
    assert 0 < result.fetched_bytes < 2 << 20


def test_a_seed_with_a_bad_sector_costs_what_it_would_have_brought(store, tmp_path):
    disk = make_raw(tmp_path / "disk.raw")
    digest = push(store, disk, "debian").digest
    seed = Seed(store.manifest(digest), Path("/proc/self/mem"))  # its beginning is EIO
    result = pull(store, digest, tmp_path / "out", format_="raw", seeds=[seed])
    assert (tmp_path / "out").read_bytes() == disk.read_bytes()
    assert result.seeded_bytes == 0


def test_a_flipped_bit_in_a_pack_is_never_written_out(store, tmp_path):
    digest = push(store, make_raw(tmp_path / "disk.raw"), "debian").digest
    pack = next(iter((tmp_path / "store" / "packs").rglob("*/*")))
    data = bytearray(pack.read_bytes())
    data[len(data) // 3] ^= 4
    pack.write_bytes(data)
    with pytest.raises(Corrupt):
        pull(store, digest, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh\necho no image\n", b"\x1f\x8b" + bytes(600), b"QFI\xfb"]
)
def test_a_file_that_is_no_image_is_refused_and_leaves_nothing(store, tmp_path, content):
    file = tmp_path / "file"
    file.write_bytes(content)
    before = [stat.key for stat in store.backend.list("")]
    with pytest.raises(Invalid):
        push(store, file, "debian")
    assert [stat.key for stat in store.backend.list("")] == before


def test_the_manifest_depends_on_the_disk_alone_and_no_pack_name_comes_twice(tmp_path):
    disk = make_raw(tmp_path / "disk.raw", size_bytes=40 << 20)
    stores = [Store.init(Directory(tmp_path / name)) for name in ("one", "two")]
    one, two = (push(store, disk, "debian", cache=tmp_path / "index").digest for store in stores)
    assert one == two
    packs = [{stat.key for stat in store.backend.list("packs/")} for store in stores]
    assert packs[0].isdisjoint(packs[1])


def cached(cache: ImageCache, store: Store, digest: Digest) -> Path:
    """The image as the image service leaves it."""
    pull(store, digest, cache.path(digest), format_="raw")
    cache.path(digest).with_suffix(".manifest").write_bytes(store.manifest(digest).encode())
    return cache.path(digest)


def test_a_complete_cached_image_is_known_by_its_digest_and_by_the_beginning_of_it(store, tmp_path):
    digest = push(store, make_raw(tmp_path / "disk.raw"), "debian", "12").digest
    cache = ImageCache(tmp_path / "cache", {"local": store})
    assert cache.resolve("debian:12", "x86_64").digest == digest
    path = cached(cache, store, digest)
    path.with_suffix(".have").touch()  # its service was killed after it had given the image its name
    assert cache.digests() == [digest]
    assert [seed.path for seed in cache.seeds()] == [path]
    assert cache.resolve(f"b3:{digest.hex()[:12]}").digest == digest


def test_a_damaged_cached_image_is_found_and_removed(store, tmp_path):
    digest = push(store, make_raw(tmp_path / "disk.raw"), "debian").digest
    cache = ImageCache(tmp_path / "cache", {"local": store})
    path = cached(cache, store, digest)
    cache.verify(digest)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"x")
    with pytest.raises(Corrupt):
        cache.verify(digest)
    assert not cache.has(digest)


def test_an_image_nobody_has_is_not_found(store, tmp_path):
    cache = ImageCache(tmp_path / "cache", {"local": store})
    with pytest.raises(NotFound):
        cache.resolve("debian:13")


def test_manifests_survive_their_encoding(store, tmp_path):
    result = push(
        store, make_raw(tmp_path / "disk.raw"), "debian", labels={"b": "2", "a": "ü"}, os_name="debian"
    )
    manifest = store.manifest(result.digest)
    assert Manifest.decode(manifest.encode()).digest == result.digest
    assert manifest.labels == (("a", "ü"), ("b", "2"))


def test_the_size_of_a_disk_is_read_from_the_first_bytes_of_its_manifest(store, tmp_path):
    lies = {"size_bytes": "5", 'x"size_bytes":7,': '"size_bytes":9}'}
    for size, labels in ((6 << 20, {}), (6 << 20, lies), (1 << 20, {"k": "v" * 1000, "l": "w" * 1000})):
        path = make_raw(tmp_path / "disk.raw", size_bytes=size)
        digest = push(store, path, "a", labels=labels).digest
        assert store.sizes([digest])[digest] == store.manifest(digest).size_bytes == size
