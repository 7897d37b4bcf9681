"""Writers at the same time, and what a push promises when it ends with 0."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from imagestore.backends.protocol import Backend, Data, ObjectStat
from imagestore.backends.wrappers import Wrapper
from imagestore.copy import copy_image, copy_name
from imagestore.formats import pack
from imagestore.formats.digest import Digest
from imagestore.formats.keys import LAYOUTS, LEASES, MANIFESTS, PACKS, kind_of
from imagestore.formats.pack import Codec, Frame
from imagestore.mirror.replicate import replicate
from imagestore.push import push
from imagestore.store.inventory import Inventory
from imagestore.store.leases import Condemned
from imagestore.store.open import open_store
from imagestore.store.packing import Packer
from imagestore.store.store import Store
from imagestore.verify import repair, verify_store
from tests.world import World, disk, write_pages


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class Then(Wrapper):
    """Does something each time that a layout was written."""

    def __init__(self, inner: Backend, action: Callable[[], object]) -> None:
        super().__init__(inner)
        self._then = action

    def put(
        self, key: str, data: Data, *, if_match: str | None = None, if_none_match: bool = False
    ) -> ObjectStat:
        stat = self.inner.put(key, data, if_match=if_match, if_none_match=if_none_match)
        if kind_of(key) is LAYOUTS:
            self._then()
        return stat


@pytest.mark.parametrize(
    "apart", [False, True], ids=["which know each other", "which know nothing of each other"]
)
def test_pushes_of_one_disk_do_not_chase_each_other(world: World, apart: bool) -> None:
    """D1: each found the other's layout in place of its own and wrote it again, five times over."""
    data, pushes = disk(1, 2), 0

    def other() -> None:
        nonlocal pushes
        pushes += 1
        if apart:
            for key in [key for key in world.memory.objects if key.startswith(("index/", "hooks/"))]:
                del world.memory.objects[key]
        twin = World.__new__(World)
        twin.directory, twin.cache, twin.images, twin.store = (
            world.directory,
            f"cache-{pushes}",
            {},
            world.store,
        )
        twin.push(f"twin-{pushes}", data)

    world.push("one", data, Store(Then(world.memory, other), world.store.info))
    assert 1 <= pushes < 5
    world.check_all()


def test_first_pushes_at_once_into_a_new_store_all_arrive(tmp_path: Path) -> None:
    """D2: who lost the race for store.json was told that there is a store already."""
    failures: list[BaseException] = []

    def first(number: int, at: Path, start: threading.Barrier) -> None:
        path = at.with_suffix(f".{number}")
        path.write_bytes(disk(number, blocks=4))
        start.wait()
        try:
            store = open_store(at.as_uri(), create=True)
            push(store, path, f"disk-{number}", format_="raw", cache=tmp_path / f"cache-{number}")
        except Exception as error:  # noqa: BLE001 - whatever it is, the test says it
            failures.append(error)

    for attempt in range(5):
        at, start = tmp_path / f"store-{attempt}", threading.Barrier(6)
        threads = [threading.Thread(target=first, args=(number, at, start)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(list(open_store(at.as_uri()).names.list())) == 6


def packs_of(world: World) -> list[str]:
    return [key for key in world.memory.objects if key.startswith("packs/")]


def hurt(world: World, key: str) -> None:
    data = bytearray(world.memory.objects[key].data)
    data[len(data) // 3] ^= 1
    world.memory.put(key, bytes(data))


@pytest.mark.parametrize("name", ["one", "other"])
@pytest.mark.parametrize("harm", ["lost", "cut short", "damaged", "layout lost", "manifest damaged"])
def test_a_push_that_ends_well_means_that_the_image_can_be_read(world: World, harm: str, name: str) -> None:
    """B3, B4: it said "already there", and under a new name it published the damage again."""
    data = disk(1, 2, 3)
    digest = world.push("one", data)
    for key in packs_of(world)[:1]:
        match harm:
            case "lost":
                del world.memory.objects[key]
            case "cut short":
                world.memory.put(key, world.memory.objects[key].data[: 600 << 10])
            case "damaged":
                hurt(world, key)
                assert verify_store(world.store, full=True).problems
            case "layout lost":
                del world.memory.objects[LAYOUTS.key(digest)]
            case "manifest damaged":
                hurt(world, MANIFESTS.key(digest))
    assert world.push(name, data) == digest
    world.check(name)
    world.check("one")
    again = verify_store(world.store, full=True)
    assert again.problems == []
    world.collect_for(200)
    world.check_all()
    assert Condemned.read(world.store).damaged == frozenset()


def test_another_disk_that_shares_chunks_avoids_a_damaged_pack_too(world: World) -> None:
    """B4: its whole kind: what a verify found bad is used by nobody any more."""
    world.push("one", disk(1, 2))
    hurt(world, packs_of(world)[0])
    verify_store(world.store, full=True)
    world.push("two", disk(2, 5))
    world.check("two")


def test_what_turns_out_to_be_right_after_all_may_be_used_again(world: World) -> None:
    world.push("one", disk(1))
    (key,) = packs_of(world)
    whole = world.memory.objects[key]
    hurt(world, key)
    verify_store(world.store, full=True)
    assert Condemned.read(world.store).damaged == {PACKS.digest(key)}
    world.memory.objects[key] = whole
    assert verify_store(world.store, full=True).problems == []
    assert Condemned.read(world.store).damaged == frozenset()


def test_a_collector_goes_on_beside_a_damaged_pack_that_is_noted(world: World) -> None:
    world.push("one", disk(1, 2))
    world.push("two", disk(1, 9))
    hurt(world, packs_of(world)[0])
    hurt(world, packs_of(world)[1])
    assert verify_store(world.store, full=True).problems
    world.store.names.remove("one")
    world.collect_for(100, repack_threshold=0)
    assert {problem.image for problem in verify_store(world.store).problems} <= set(world.images)


def test_a_store_is_repaired_from_the_file_that_was_pushed(world: World) -> None:
    """B5: there was no way but a second store."""
    one, two = disk(1, 2), disk(2, 3)
    world.push("one", one)
    world.push("two", two)
    lost, bad = packs_of(world)[:2]
    del world.memory.objects[lost]
    hurt(world, bad)
    report = verify_store(world.store, full=True)
    assert report.problems
    for data, left in ((one, True), (two, False)):
        path = world.directory / "file.raw"
        path.write_bytes(data)
        report = repair(world.store, report, path, full=True)
        assert bool(report.problems) == left
    world.check_all()


def test_a_copy_and_a_mirror_see_that_what_they_have_cannot_be_read(world: World, tmp_path: Path) -> None:
    """B3: its whole kind: they said "unchanged"."""
    digest = world.push("one", disk(1, 2))
    for how in ("copy", "mirror"):
        mine = World(tmp_path / how)
        mine.images = world.images
        copy_name(world.store, mine.store, world.store.names.get("one"))
        for key in packs_of(mine):
            del mine.memory.objects[key]
        if how == "copy":
            assert copy_image(world.store, mine.store, digest) > 0
        else:
            assert [one.result for one in replicate(world.store, mine.store)] == ["new"]
        mine.check("one")
        assert [one.result for one in replicate(world.store, mine.store)] == ["unchanged"]


class Before(Wrapper):
    """Does something once, before the first lease is written."""

    def __init__(self, inner: Backend, action: Callable[[], object]) -> None:
        super().__init__(inner)
        self._actions = [action]

    def put(
        self, key: str, data: Data, *, if_match: str | None = None, if_none_match: bool = False
    ) -> ObjectStat:
        if kind_of(key) is LEASES and self._actions:
            self._actions.pop()()
        return self.inner.put(key, data, if_match=if_match, if_none_match=if_none_match)


@pytest.mark.parametrize("pages", [None, 128 << 10])
def test_what_a_repack_moved_between_a_look_at_the_base_and_the_lease_is_not_stored_again(
    world: World, pages: int | None
) -> None:
    write_pages(pages)
    moved_bytes = 0
    try:
        world.push("gone", disk(1, 2))
        world.push("one", disk(1))
        world.store.names.remove("gone", "latest")

        def repack() -> None:
            nonlocal moved_bytes
            world.collect_for(200, repack_threshold=0)
            world.collect_for(200, repack_threshold=0)
            moved_bytes = world.stored("packs/")

        before = set(packs_of(world))
        world.push("one", disk(1, 5), Store(Before(world.memory, repack), world.store.info))
        assert before - set(packs_of(world)), "chunks of the base were moved"
        assert world.stored("packs/") - moved_bytes < len(disk(5))
        world.check_all()
    finally:
        write_pages(None)


def test_what_no_reader_would_take_is_in_several_packs_and_index_parts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More frames than a footer may have fitted into the bytes of one pack: nobody could read it after."""
    monkeypatch.setattr("imagestore.store.packing._PART_PACKS", 8)
    packer, count = Packer(world.store, "push"), pack.MAX_FRAMES + 1
    with packer.lease, packer:
        for number in range(count):
            data = number.to_bytes(4, "little")
            packer.add(
                packer.placement.add_frame(), Frame(Codec.RAW, data, Digest.of(data), [4], Digest.of(data))
            )
        packer.flush()
        packer.publish_index()
    inventory = Inventory.read(world.store)
    assert sorted(map(len, inventory.parts.values())) == [1, 8, 8]
    assert sum(len(named) for named in inventory.parts.values()) == len(inventory.packs)
    assert not verify_store(world.store).problems
    assert sum(len(inventory.table(name).frames) for name in inventory.packs) == count
