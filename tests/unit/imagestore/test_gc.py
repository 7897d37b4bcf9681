from pathlib import Path
from typing import Any

import pytest

from imagestore.errors import Conflict, Corrupt, NotFound, Unsupported
from imagestore.formats.digest import Digest
from imagestore.formats.keys import CONDEMNED_KEY, LAYOUTS, MANIFESTS
from imagestore.formats.sealed import seal
from imagestore.gc import collect
from imagestore.mirror import signing
from imagestore.store.leases import Condemned, Lease
from imagestore.store.names import NameRecord, Names
from imagestore.store.roots import held, hold, release, tag, undelete
from imagestore.store.store import Store
from tests.memory import Memory
from tests.world import HOUR, World, disk


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_what_a_name_points_at_stays(world: World) -> None:
    world.push("a", disk(1))
    world.collect_for(200, repack_threshold=0)
    world.check("a")
    assert not Condemned.read(world.store).packs


def test_a_removed_image_goes_after_two_graces_and_not_before_one(world: World) -> None:
    digest = world.push("a", disk(1))
    world.now_s += 100 * HOUR
    world.store.names.remove("a")
    world.collect_for(23)
    world.check_digest(digest)
    world.collect_for(23)
    world.check_digest(digest)
    world.collect_for(30)
    assert [world.stored(tree) for tree in ("packs", "manifests", "layouts", "index", "names")] == [0] * 5
    with pytest.raises(NotFound):
        world.store.names.undelete("a")


def test_undelete_within_the_grace_brings_everything_back(world: World) -> None:
    world.push("a", disk(1))
    world.now_s += 100 * HOUR
    world.store.names.remove("a")
    world.collect_for(23)
    undelete(world.store, "a")
    world.collect_for(100, repack_threshold=0)
    world.check("a")


def test_what_a_name_pointed_at_within_the_grace_can_be_tagged_again(world: World) -> None:
    old = world.push("a", disk(1))
    world.now_s += 100 * HOUR
    world.push("a", disk(2))
    world.collect_for(23)
    tag(world.store, old, "rescued", "latest", "x86_64")
    world.collect_for(100)
    world.check_digest(old)


def test_a_dry_run_says_what_it_would_free_and_changes_nothing(world: World) -> None:
    world.push("a", disk(1))
    world.now_s += 100 * HOUR
    world.store.names.remove("a")
    world.now_s += 25 * HOUR
    before = dict(world.memory.objects)
    report = collect(world.store, dry_run=True)
    assert world.memory.objects == before
    assert (report.images, report.waiting_packs, report.deleted_names) == (0, 1, 1)
    collect(world.store)
    world.now_s += 25 * HOUR
    would = collect(world.store, dry_run=True)
    did = collect(world.store)
    assert (
        (would.deleted_packs, would.freed_bytes)
        == (did.deleted_packs, did.freed_bytes)
        == (1, would.freed_bytes)
    )
    assert would.freed_bytes > 200_000


def test_mostly_dead_packs_are_written_anew_and_their_images_stay_whole(world: World) -> None:
    shared, own = disk(1), disk(2, 3, 4, 5)
    world.push("big", shared + own)
    world.push("small", shared)
    world.now_s += 100 * HOUR
    world.store.names.remove("big")
    before = world.stored("packs/")
    world.collect_for(80)
    world.check("small")
    assert world.stored("packs/") < before / 2


def test_with_threshold_zero_every_unreachable_chunk_goes(world: World) -> None:
    shared, own = disk(1), disk(2)
    world.push("both", own + shared)
    world.push("one", shared)
    world.store.names.remove("both")
    world.collect_for(120, repack_threshold=0)
    world.check("one")
    fresh = World(world.directory / "other")
    fresh.push("one", shared)
    assert world.stored("packs/") <= fresh.stored("packs/") * 1.02


def test_an_instances_image_outlives_its_name(world: World) -> None:
    digest = world.push("a", disk(1))
    hold(world.store, "7b8d", [digest])
    world.store.names.remove("a")
    world.collect_for(200, repack_threshold=0)
    world.check_digest(digest)
    release(world.store, "7b8d")
    world.collect_for(200)
    assert world.stored("packs/") == 0
    with pytest.raises(NotFound):
        hold(world.store, "7b8d", [digest])
    assert world.stored("refs/") == 0


def test_an_image_that_is_not_whole_takes_no_hold_from_the_others_of_an_instance(world: World) -> None:
    whole, lost = world.push("a", disk(1)), world.push("b", disk(2))
    hold(world.store, "7b8d", [whole])
    del world.memory.objects[LAYOUTS.key(lost)]
    with pytest.raises(NotFound):
        hold(world.store, "7b8d", [whole, lost])
    assert list(held(world.store)) == [whole]
    with pytest.raises(NotFound):
        hold(world.store, "7b8d", [lost])
    assert list(held(world.store)) == []


def test_an_image_that_is_not_whole_takes_no_name_from_those_of_other_architectures(world: World) -> None:
    digest, other, lost = world.push("a", disk(1)), world.push("b", disk(2)), world.push("c", disk(3))
    world.store.names.set("a", "latest", "aarch64", lost)
    del world.memory.objects[LAYOUTS.key(lost)]
    assert tag(world.store, other, "a", "latest", "x86_64").images == {"x86_64": other, "aarch64": lost}
    tag(world.store, digest, "a", "latest", "x86_64")
    world.check("a")


@pytest.mark.parametrize("name", ["a", "new"])
def test_a_tag_for_what_is_collected_meanwhile_leaves_the_name_as_it_was(world: World, name: str) -> None:
    digest, other = world.push("a", disk(1)), world.push("b", disk(2))

    class Late(Names):
        def set(self, *told: Any) -> NameRecord:
            set_ = super().set(*told)
            world.memory.objects.pop(LAYOUTS.key(other), None)
            return set_

    store = Store(world.memory, world.store.info, names=Late(world.memory))
    with pytest.raises(NotFound):
        tag(store, other, name, "latest", "x86_64")
    assert world.store.names.images() == {("a", "latest", "x86_64"): digest, ("b", "latest", "x86_64"): other}


def test_a_push_that_meets_condemned_packs_stores_them_anew(world: World) -> None:
    world.push("a", disk(1))
    world.store.names.remove("a")
    world.collect_for(60)
    assert Condemned.read(world.store).packs or world.stored("packs/") == 0
    world.push("a", disk(1))
    world.collect_for(100, repack_threshold=0)
    world.check("a")


def test_a_live_lease_keeps_its_packs(world: World) -> None:
    world.push("a", disk(1))
    packs = {Digest.parse(key.rpartition("/")[2]) for key in world.memory.objects if key.startswith("packs/")}
    world.store.names.remove("a")
    world.now_s += 100 * HOUR
    with Lease(world.store) as lease:
        lease.reuse(packs)
        collect(world.store)
        assert not Condemned.read(world.store).packs
    collect(world.store)
    assert Condemned.read(world.store).packs.keys() == packs


def test_a_lease_that_ran_out_keeps_nothing_and_its_writer_is_told(world: World) -> None:
    world.push("a", disk(1))
    packs = {Digest.parse(key.rpartition("/")[2]) for key in world.memory.objects if key.startswith("packs/")}
    world.store.names.remove("a")
    with Lease(world.store) as lease:
        assert lease.reuse(packs) == packs
        world.now_s += 2 * HOUR
        world.collect_for(200)
        assert world.stored("packs/") == 0 and not Condemned.read(world.store).packs
        assert lease.unusable(packs) == packs


@pytest.mark.parametrize("key", ["names/a/latest", "leases/" + "0" * 32, "refs/x", CONDEMNED_KEY])
def test_what_is_not_understood_ends_the_run_before_it_changes_anything(world: World, key: str) -> None:
    world.push("a", disk(1))
    world.push("b", disk(2))
    world.store.names.remove("b")
    world.now_s += 100 * HOUR
    for data, kind in [(b"what?", Corrupt), (seal({"format": 2}), Unsupported)]:
        world.memory.put(key, data)
        before = dict(world.memory.objects)
        with pytest.raises(kind):
            collect(world.store)
        assert world.memory.objects == before


def test_an_image_that_is_not_whole_ends_the_run(world: World) -> None:
    world.push("a", disk(1))
    key = next(key for key in world.memory.objects if key.startswith("packs/"))
    world.memory.delete(key)
    with pytest.raises(Corrupt):
        collect(world.store)


def test_two_collectors_do_not_overwrite_each_others_lists() -> None:
    store = Store.init(Memory())
    first, second = Condemned.read(store), Condemned.read(store)
    first.replace(store, add=[Digest.of(b"1")])
    with pytest.raises(Conflict):
        second.replace(store, add=[Digest.of(b"2")])


def test_grace_counts_from_when_the_list_was_published() -> None:
    now = [1000.0]
    store = Store.init(Memory(clock=lambda: now[0]))
    one, two = Digest.of(b"1"), Digest.of(b"2")
    Condemned.read(store).replace(store, add=[one])
    now[0] = 2000.0
    Condemned.read(store).replace(store, add=[two])
    assert Condemned.read(store).packs == {one: 1000.0, two: 2000.0}
    after = Condemned.read(store).replace(store, forget=[one])
    assert (after.packs, after.epoch) == ({two: 2000.0}, 1)


def test_a_tombstone_of_another_life_is_not_removed_by_an_old_etag(world: World) -> None:
    world.push("a", disk(1))
    record: NameRecord = world.store.names.remove("a")
    world.push("a", disk(1))
    with pytest.raises(Conflict):
        world.memory.delete("names/a/latest", if_match=record.etag)


def test_a_signed_target_outlives_its_name(world: World) -> None:
    digest = world.push("a", disk(1))
    keys = signing.Keyring(world.directory / "keys")
    signing.init(world.store, keys)
    signing.Publisher(world.store, keys).publish()
    world.store.names.remove("a")
    world.collect_for(200, repack_threshold=0)
    world.check_digest(digest)
    signing.Publisher(world.store, keys).publish({})
    world.collect_for(200, repack_threshold=0)
    assert world.stored("packs/") == 0


class NoConditionalDeletes(Memory):
    def delete(self, key: str, *, if_match: str | None = None) -> None:
        if if_match is not None:
            raise Unsupported("no conditional deletes here")
        super().delete(key)


def test_where_deletes_know_no_conditions_objects_are_emptied(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.memory = NoConditionalDeletes(clock=lambda: world.now_s)
    world.store = Store.init(world.memory)
    digest = world.push("a", disk(1))
    world.store.names.remove("a")
    world.collect_for(120)
    assert [world.stored(tree) for tree in ("packs", "manifests", "layouts", "index", "names")] == [0] * 5
    assert not world.store.has(MANIFESTS.key(digest))
    for ask in (world.store.manifest, world.store.layout):
        with pytest.raises(NotFound):
            ask(digest)
    with pytest.raises(NotFound):
        world.store.names.get("a")
    world.check_all()
    world.push("a", disk(1))
    world.check_all()
    world.collect_for(120)
    world.check_all()


def test_a_manifest_marked_as_trash_is_still_read(world: World) -> None:
    digest = world.push("a", disk(1))
    world.store.names.remove("a")
    world.now_s += 60 * HOUR
    collect(world.store)
    assert world.memory.get(MANIFESTS.key(digest)).data.startswith(b"sf-trash")
    world.check_digest(digest)
