import random
from dataclasses import replace
from pathlib import Path

import pytest

from imagestore.backends.protocol import Object
from imagestore.backends.wrappers import Wrapper
from imagestore.copy import copy_image, copy_name
from imagestore.errors import Corrupt, NotFound, StoreError
from imagestore.gc import collect
from imagestore.pull import pull
from imagestore.stats import store_stats
from imagestore.store.leases import Lease
from imagestore.store.names import name_key
from imagestore.store.roots import hold
from imagestore.store.store import Store
from imagestore.verify import repair, verify_image, verify_store
from tests import drills
from tests.memory import Memory
from tests.world import HOUR, World, disk


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.push("one", disk(1, 2))
    made.push("two", disk(2, 3))
    return made


def flip(memory: Memory, key: str, bit: int) -> None:
    data = bytearray(memory.objects[key].data)
    data[bit // 8] ^= 1 << bit % 8
    memory.put(key, data)


def test_a_sound_store_verifies(world: World) -> None:
    packs = sum(1 for _ in world.store.backend.list("packs/"))
    for full in (False, True):
        report = verify_store(world.store, full=full)
        assert (report.problems, report.images, report.packs) == ([], 2, packs)
    assert report.checked_bytes == world.stored("packs/")


def test_a_bit_flipped_anywhere_is_found_and_never_comes_out_as_data(world: World) -> None:
    """Every object; every part of an object is met by random bits over the seeds."""
    digest = world.store.names.get("one").digest("x86_64")
    hold(world.store, "instance", [digest])
    world.store.names.remove("two")
    world.now_s += 60 * HOUR
    collect(world.store)
    world.push("three", disk(4))
    lease = Lease(world.store)
    lease._write()
    keys = sorted(world.memory.objects)
    trees = {key.split("/")[0] for key in keys}
    assert trees == {
        "store.json",
        "packs",
        "index",
        "hooks",
        "layouts",
        "manifests",
        "names",
        "gc",
        "leases",
        "refs",
        "groups",
    }
    rng = random.Random(drills.seed())
    for key in keys:
        whole = world.memory.objects[key]
        for _ in range(drills.rounds(full=200)):
            bit = rng.randrange(len(whole.data) * 8)
            flip(world.memory, key, bit)
            if key == "store.json":
                with pytest.raises(StoreError):
                    Store.open(world.memory)
            trashed = whole.data.startswith(b"sf-trash") and bit // 8 < 44
            report = verify_store(world.store, full=True)
            found = report.problems + report.waste
            assert found or trashed, f"bit {bit} of {key}"
            try:
                pull(world.store, digest, world.directory / "out", format_="raw", durable=False)
            except StoreError:
                pass
            else:
                assert (world.directory / "out").read_bytes() == world.images[digest]
            world.memory.objects[key] = whole


def test_a_flipped_bit_anywhere_in_the_hooks_is_damage_and_mended(world: World, tmp_path: Path) -> None:
    whole = world.memory.objects["hooks/all"]
    for bit in range(0, len(whole.data) * 8, 5):
        flip(world.memory, "hooks/all", bit)
        report = verify_store(world.store, full=True)
        assert [problem.key for problem in report.problems] == ["hooks/all"] * len(report.problems) != [], bit
        world.memory.objects["hooks/all"] = whole
    flip(world.memory, "hooks/all", (whole.data.index(b"}") + 3) * 8)
    report = verify_store(world.store)
    assert report.problems
    assert repair(world.store, report, World(tmp_path / "empty").store).problems == []


def test_structure_alone_finds_what_is_missing(world: World) -> None:
    for key in sorted(world.memory.objects):
        if key.split("/")[0] in ("packs", "layouts", "manifests"):
            whole = world.memory.objects.pop(key)
            assert key in {problem.key for problem in verify_store(world.store).problems}
            world.memory.objects[key] = whole


def test_a_pack_cut_short_is_found_without_reading_it(world: World) -> None:
    key = next(key for key in world.memory.objects if key.startswith("packs/"))
    world.memory.put(key, world.memory.objects[key].data[:-100])
    assert key in {problem.key for problem in verify_store(world.store).problems}


@pytest.mark.parametrize("twin", [True, False], ids=["a copy", "the same images"])
@pytest.mark.parametrize("harm", ["flip", "delete"])
def test_any_damaged_object_is_repaired_from_a_second_store(
    world: World, tmp_path: Path, twin: bool, harm: str
) -> None:
    other = World(tmp_path / "other", cache="other")
    if twin:
        other.memory.objects = dict(world.memory.objects)
    else:
        other.push("two", disk(2, 3))
        other.push("one", disk(1, 2))
    rng = random.Random(drills.seed())
    for key in sorted(world.memory.objects):
        if key.startswith(("hooks/", "groups/")) and harm == "delete":
            continue  # a hint: its loss is no problem
        before = dict(world.memory.objects)
        if harm == "flip":
            flip(world.memory, key, rng.randrange(len(before[key].data) * 8))
        else:
            del world.memory.objects[key]
        report = verify_store(world.store, full=True)
        if key.startswith("names/") and harm == "delete":
            assert report.problems == []  # nothing says that there was a name
        else:
            assert report.problems + report.waste, key
            after = repair(world.store, report, other.store, full=True)
            assert after.problems == [], f"{key}: {after.problems}"
            world.check("one")
            world.check("two")
        world.memory.objects = before


def test_what_no_other_store_has_stays_reported(world: World, tmp_path: Path) -> None:
    key = next(key for key in world.memory.objects if key.startswith("packs/"))
    flip(world.memory, key, 80)
    empty = Store.init(Memory())
    after = repair(world.store, verify_store(world.store, full=True), empty, full=True)
    assert key in {problem.key for problem in after.problems}


def test_writers_do_not_use_a_damaged_pack_after_a_repair(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other", cache="other")
    other.push("one", disk(1, 2))
    other.push("two", disk(2, 3))
    for key in [key for key in world.memory.objects if key.startswith("packs/")]:
        flip(world.memory, key, 8)
    repair(world.store, verify_store(world.store, full=True), other.store, full=True)
    world.push("three", disk(1, 3))
    world.check("three")
    world.collect_for(100, repack_threshold=0)
    world.check_all()


def test_one_image_is_verified_byte_for_byte(world: World) -> None:
    digest = world.store.names.get("one").digest("x86_64")
    assert verify_image(world.store, digest).problems == []
    for key in [key for key in world.memory.objects if key.startswith("packs/")]:
        flip(world.memory, key, 4096)
    assert verify_image(world.store, digest).problems


def test_copying_sends_only_what_is_missing(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other", cache="other")
    first = copy_name(world.store, other.store, world.store.names.get("one"))
    assert first == other.stored("packs/")
    second = copy_name(world.store, other.store, world.store.names.get("two"))
    assert second < first * 0.6
    again = copy_name(world.store, other.store, world.store.names.get("two"))
    assert again == 0
    other.images = world.images
    other.check("one")
    other.check("two")
    other.check_all()


def test_copying_what_is_not_there_is_not_found_and_damage_is_not_passed_on(
    world: World, tmp_path: Path
) -> None:
    other = World(tmp_path / "other", cache="other")
    one = world.store.names.get("one")
    with pytest.raises(NotFound):
        copy_image(other.store, Store.init(Memory()), one.digest("x86_64"))
    for key in [key for key in world.memory.objects if key.startswith("packs/")]:
        flip(world.memory, key, 4096)
    with pytest.raises(Corrupt):
        copy_name(world.store, other.store, one)
    with pytest.raises(NotFound):
        other.store.names.get("one")


def test_a_copy_is_remembered_when_it_was_cut_off(world: World, tmp_path: Path) -> None:
    other = World(tmp_path / "other", cache="other")
    one = world.store.names.get("one")
    copy_name(world.store, other.store, one)
    del other.memory.objects[name_key("one", "latest")]
    assert copy_name(world.store, other.store, one) == 0


def test_a_pack_that_the_other_store_gives_otherwise_each_time_repairs_nothing(
    world: World, tmp_path: Path
) -> None:
    class Moody(Wrapper):
        """Shows the pack whole in ranges, and damaged in one piece."""

        def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
            found = self.inner.get(key, start, length)
            return (
                found
                if length or not key.startswith("packs/")
                else replace(found, data=b"x" + found.data[1:])
            )

    other = Store(Moody(Memory()), world.store.info)
    other.backend.inner.objects = dict(world.memory.objects)  # type: ignore[attr-defined]
    key = next(key for key in world.memory.objects if key.startswith("packs/"))
    flip(world.memory, key, 4096)
    damaged = world.memory.objects[key].data
    repair(world.store, verify_store(world.store, full=True), other)
    assert world.memory.objects[key].data == damaged


def test_stats_say_what_deleting_an_image_would_free(world: World) -> None:
    stats = store_stats(world.store)
    third = 16 * (32 << 10)
    assert (stats.logical_bytes, stats.images[0].data_bytes) == (4 * third, 2 * third)
    assert third * 3 <= stats.unique_bytes <= third * 3.2
    assert stats.used_bytes <= stats.packs_bytes <= stats.objects_bytes
    one = next(image for image in stats.images if "one:latest" in image.names)
    before = world.stored("packs/")
    world.store.names.remove("one")
    world.collect_for(120, repack_threshold=0)
    freed = before - world.stored("packs/")
    assert abs(freed - one.own_bytes) < 0.1 * one.stored_bytes
