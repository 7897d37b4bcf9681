"""Manifests and layouts of large images: columns in pages that neighbours share. Pages and disks are small here."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imagestore.backends.directory import Directory
from imagestore.cache.images import ImageCache
from imagestore.copy import copy_image
from imagestore.errors import Corrupt, Invalid
from imagestore.formats.digest import Digest
from imagestore.formats.keys import LAYOUTS, MANIFESTS
from imagestore.formats.layout import Layout
from imagestore.formats.manifest import Manifest
from imagestore.mirror.admission import admit
from imagestore.pull import pull
from imagestore.stats import store_stats
from imagestore.store.roots import can_be_read
from imagestore.store.store import Store
from imagestore.verify import repair, verify_image, verify_store
from tests.memory import Memory
from tests.world import World, disk, write_pages

FIXTURE = Path(__file__).resolve().parents[2] / "fixtures/0.2/store"
ALPINE = Digest.parse("b3:be4368bea628314259549b48b5778cd12d593a100b79e5b9b0d542957e35effe")
DEBIAN = Digest.parse("b3:c44d6f9f5822633cfaa562f3d5820b727679dd74cc19293389f77565aab1979a")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    write_pages()
    yield World(tmp_path / "world")
    write_pages(None)


def changed(data: bytes, at: int, seed: int = 9) -> bytes:
    """With 4 KiB of it others."""
    return data[:at] + np.random.default_rng(seed).bytes(4096) + data[at + 4096 :]


def test_a_change_in_one_place_shares_all_pages_but_its_own(world: World) -> None:
    before = disk(1, 2, 3, 4)
    one = world.push("one", before)
    packs = world.stored("packs/")
    two = world.push("one", changed(before, 1 << 20))
    pages = [world.store.layout(digest).pages for digest in (one, two)]
    assert len(pages[0].ids) == len(pages[1].ids) == 32
    differ = [
        a.tobytes() != b.tobytes() for a, b in zip(pages[0].ids, pages[1].ids, strict=True)
    ]  # of the manifest 16, of the layout 16
    assert sum(differ[:16]) <= 2
    assert sum(differ[16:]) <= 2
    assert world.stored("packs/") - packs < 200_000
    world.check_all()


def test_pages_depend_on_the_disk_alone_and_the_digest_on_these(world: World, tmp_path: Path) -> None:
    one, other = disk(1, 2), World(tmp_path / "other")
    other.push("x", disk(2, 7))
    other.push("x", disk(5, 2))
    assert world.push("one", one) == other.push("x", one)
    write_pages(None)
    small = World(tmp_path / "small")
    assert small.store.manifest(small.push("one", one)).page_bytes == 0


def test_a_copy_has_the_same_pages_of_the_manifest_and_its_own_of_the_layout(world: World) -> None:
    digest = world.push("one", disk(1, 2, 3))
    target = Store.init(Memory(clock=lambda: world.now_s), single_writer=True)
    copy_image(world.store, target, digest)
    assert can_be_read(target, digest)
    assert verify_store(target, full=True).problems == []
    assert verify_image(target, digest).problems == []
    assert copy_image(world.store, target, digest) == 0


def test_a_repack_writes_pages_anew_and_readers_find_what_moved(world: World) -> None:
    world.push("gone", disk(1, 2, 3, 4))
    digest = world.push("kept", disk(1, 5))
    old = world.store.layout(digest)
    world.store.names.remove("gone")
    world.collect_for(100, repack_threshold=0)
    world.collect_for(100, repack_threshold=0)
    new = world.store.layout(digest)
    assert set(new.packs) != set(old.packs)
    count = len(new.pages.ids) // 2
    assert new.pages.ids[:count].tobytes() == old.pages.ids[:count].tobytes()
    assert new.pages.ids[count:].tobytes() != old.pages.ids[count:].tobytes()
    world.check_all()
    image = store_stats(world.store).images[0]
    assert image.data_bytes == 1 << 20


def test_a_lost_pack_of_pages_is_told_and_mended_from_another_store(world: World) -> None:
    digest = world.push("one", disk(1, 2))
    other = Store.init(Memory(clock=lambda: world.now_s), single_writer=True)
    copy_image(world.store, other, digest)
    head = Layout.decode(world.memory.objects[LAYOUTS.key(digest)].data, digest)
    del world.memory.objects[f"packs/{head.packs[0].hex()[:2]}/{head.packs[0].hex()}"]
    report = verify_store(world.store, full=True)
    assert {problem.image for problem in report.problems} == {digest}
    assert not can_be_read(world.store, digest)
    assert repair(world.store, report, other, full=True).problems == []
    world.check_all()


def test_a_node_keeps_the_manifest_with_its_pages(world: World, tmp_path: Path) -> None:
    digest = world.push("one", disk(1, 2))
    manifest = world.store.manifest(digest)
    cache = ImageCache(tmp_path / "cache", {"local": world.store})
    path = cache.path(digest).with_suffix(".manifest")
    path.write_bytes(manifest.whole())
    assert cache.manifest(digest).ids.tobytes() == manifest.ids.tobytes()
    for at in (40, len(manifest.encode()) - 1, len(manifest.encode()) + 1, len(manifest.whole()) - 1):
        broken = bytearray(manifest.whole())
        broken[at] ^= 1
        path.write_bytes(broken)
        with pytest.raises(Corrupt):
            cache.manifest(digest)


def test_what_is_not_cut_as_it_says_or_names_other_pages_is_corrupt(world: World) -> None:
    digest, other = world.push("one", disk(1, 2)), world.push("two", disk(3, 4))
    manifest = world.store.manifest(digest)
    for page_bytes in (1 << 16, 1 << 18, 1 << 15, 1 << 27, 0):
        wrong = replace(manifest, page_bytes=page_bytes)
        with pytest.raises(Corrupt):
            Manifest.decode(wrong.whole())
    for cut in (wrong.whole()[:-1], manifest.encode(), manifest.whole() + b"x"):
        with pytest.raises(Corrupt):
            Manifest.decode(cut)
    mine, theirs = world.store.layout(digest), world.store.layout(other)
    key = LAYOUTS.key(digest)
    world.store.backend.put(key, replace(theirs, manifest=digest).encode())
    with pytest.raises(Corrupt):
        world.store.manifest(digest)
    assert {p.key for p in verify_store(world.store).problems} >= {MANIFESTS.key(digest)}
    world.store.backend.put(key, mine.encode())
    world.check_all()


def test_a_large_image_of_the_first_format_keeps_its_digest_wherever_it_goes(world: World) -> None:
    write_pages(None)
    digest = world.push("one", disk(1, 2))
    write_pages()
    target = Store.init(Memory(clock=lambda: world.now_s), single_writer=True)
    copy_image(world.store, target, digest)
    assert target.manifest(digest).digest == digest
    assert world.push("one", disk(1, 2)) != digest  # it has pages now
    world.check_all()


def test_the_store_of_the_version_that_first_wrote_pages_is_read(tmp_path: Path) -> None:
    """alpine's layout is one that a repack wrote."""
    store = Store.open(Directory(FIXTURE))
    assert verify_store(store, full=True).problems == []
    assert {record.name: record.images["x86_64"] for record in store.names.list()} == {
        "alpine": ALPINE,
        "debian": DEBIAN,
    }
    for digest in (ALPINE, DEBIAN):
        assert store.manifest(digest).page_bytes == 1 << 20
        pull(store, digest, tmp_path / "out.raw", format_="raw", durable=False)
        assert (tmp_path / "out.raw").stat().st_size == store.manifest(digest).size_bytes


def test_over_the_wire_heads_are_admitted_when_their_pages_can_be_read(world: World) -> None:
    digest, other = world.push("one", disk(1, 2)), world.push("two", disk(3, 4))
    manifest, layout = world.store.manifest(digest), world.store.layout(digest)
    for key, data in ((LAYOUTS.key(digest), layout.encode()), (MANIFESTS.key(digest), manifest.encode())):
        admit(world.store, "PUT", key, data, creates=False, swaps=False)
    wrong = replace(world.store.layout(other), manifest=digest)
    world.store.backend.put(LAYOUTS.key(digest), wrong.encode())
    with pytest.raises(Invalid):
        admit(world.store, "PUT", MANIFESTS.key(digest), manifest.encode(), creates=False, swaps=False)
    for pack in layout.packs:
        del world.memory.objects[f"packs/{pack.hex()[:2]}/{pack.hex()}"]
    with pytest.raises(Invalid):
        admit(world.store, "PUT", LAYOUTS.key(digest), layout.encode(), creates=False, swaps=False)
