"""What a collector makes of times that cannot be right, of files that are none of ours, and of many small pushes."""

from pathlib import Path

import pytest

from imagestore.backends.protocol import Object, ObjectStat
from imagestore.errors import Corrupt
from imagestore.formats.keys import INDEX, NAMES, PACKS
from imagestore.gc import collect
from imagestore.mirror.catalog import Catalog
from imagestore.mirror.replicate import signers
from imagestore.push import push
from imagestore.store.leases import Condemned, Lease
from imagestore.store.roots import undelete
from imagestore.verify import verify_store
from tests.world import HOUR, World, disk

YEARS = 10 * 365 * 24 * HOUR


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_what_a_clock_ten_years_ahead_condemned_is_noticed_and_its_grace_begins_on_command(
    world: World,
) -> None:
    """D6: packs lay in their grace for ten years, and nothing said so."""
    world.push("a", disk(1))
    world.push("b", disk(2))
    world.store.names.remove("a")
    world.now_s += YEARS
    collect(world.store)
    collect(world.store)
    world.now_s -= YEARS - 60 * HOUR
    for _ in range(10):
        world.now_s += 30 * HOUR
        stuck = collect(world.store)
    assert stuck.doubtful_times > 0 and stuck.deleted_packs == 0 and stuck.waiting_packs == 1
    assert collect(world.store, dry_run=True, mend_times=True).doubtful_times == stuck.doubtful_times
    assert collect(world.store, mend_times=True).doubtful_times == stuck.doubtful_times
    world.now_s += 2 * HOUR
    assert collect(world.store).doubtful_times == 0
    assert world.stored("packs/") > 600_000  # the grace has begun, not ended
    world.collect_for(80)
    assert world.stored("packs/") < 600_000
    world.check_all()


def test_everything_that_was_written_while_the_clock_was_ahead_goes_its_way_after_mending(
    world: World,
) -> None:
    """D6: its whole kind: names, tombstones, leases, manifests, layouts and packs."""
    world.now_s += YEARS
    world.push("kept", disk(3))
    world.push("a", disk(1))
    world.push("a", disk(2))
    world.store.names.remove("a")
    lease = Lease(world.store)
    lease._packs = {digest for key in world.memory.objects if (digest := PACKS.digest(key))}
    lease._write()
    world.now_s -= YEARS
    world.collect_for(300)
    before = collect(world.store)
    assert before.doubtful_times >= 9 and before.waiting_packs == before.deleted_names == 0
    collect(world.store, mend_times=True)
    undelete(world.store, "a")  # a tombstone's grace begins, too
    world.check("a")
    world.store.names.remove("a")
    world.collect_for(100)
    assert world.stored("leases/") == 0
    collect(world.store, mend_times=True)
    world.collect_for(200)
    assert [world.stored(tree) > 0 for tree in ("names/a", "names/kept")] == [False, True]
    assert len([key for key in world.memory.objects if key.startswith("packs/")]) == 1
    world.check_all()


def test_what_a_clock_that_was_behind_condemned_or_removed_is_not_deleted_without_its_grace(
    world: World,
) -> None:
    """D6: the other way round: such a time looks long past."""
    world.now_s += YEARS
    world.push("a", disk(1))
    world.push("b", disk(2))
    world.now_s += 60 * HOUR
    world.now_s -= YEARS
    world.store.names.remove("a")
    packs = {digest for key in world.memory.objects if (digest := PACKS.digest(key))}
    Condemned.read(world.store).replace(world.store, add=packs)
    world.now_s += YEARS
    report = collect(world.store)
    assert report.doubtful_times > 0 and report.deleted_packs == report.deleted_names == 0
    undelete(world.store, "a")
    world.collect_for(100)
    world.check_all()


@pytest.mark.parametrize(
    "key",
    ["names/README", "names/debian/12.bak~", "names/a/b/c", "leases/notes.txt", "leases/x", "refs/Read.me",
     "packs/notes", "manifests/ab/cd", "layouts/x", "index/lost+found", "tuf/x",
     "tuf/x/1.root.json", "tuf/x/3.targets.json", "tuf/x/timestamp.json", "gc/old", "hooks/all.old", "x"],
)  # fmt: skip
def test_a_stray_file_ends_no_collection_and_no_list(world: World, key: str) -> None:
    """D7: one file that somebody left in the tree, and nothing was collected any more."""
    world.push("a", disk(1))
    world.store.names.remove("a")
    world.push("b", disk(2))
    world.memory.objects[key] = Object(b"none of ours", ObjectStat(key, 12, "e", world.now_s))
    world.collect_for(100)
    assert [f"{r.name}:{r.tag}" for r in world.store.names.list()] == ["b:latest"]
    assert len([1 for other in world.memory.objects if PACKS.digest(other)]) == 1
    assert verify_store(world.store, full=True).problems == []
    assert signers(world.store) == [] and [one.name for one in Catalog(world.store).images()] == ["b"]
    assert key in world.memory.objects


def test_a_copy_of_a_names_record_counts_as_in_use_and_ends_nothing(world: World) -> None:
    """D7."""
    world.push("a", disk(1))
    world.memory.put(NAMES.key("a", "latest.bak"), world.memory.get(NAMES.key("a", "latest")).data)
    world.store.names.remove("a")
    world.collect_for(100)
    assert [r.tag for r in world.store.names.list()] == ["latest.bak"]
    assert world.stored("packs/") > 0
    with pytest.raises(Corrupt):
        world.store.names.get("a", "latest.bak")


def test_index_parts_of_many_pushes_are_put_together_and_nothing_is_missed(world: World) -> None:
    """D10: one for every push there ever was, and each writer asked for them one by one."""
    disks = [disk(number, blocks=2) for number in range(40)]
    for number, data in enumerate(disks):
        world.now_s += HOUR
        world.push(f"n{number}", data)
    assert len([key for key in world.memory.objects if INDEX.digest(key)]) == 40
    collect(world.store)
    assert len([key for key in world.memory.objects if INDEX.digest(key)]) <= 2
    assert verify_store(world.store, full=True).problems == []
    path = world.directory / "again.raw"
    path.write_bytes(disks[17])
    done = push(world.store, path, "again", format_="raw", cache=world.directory / "fresh")
    assert done.new_bytes == 0
    world.collect_for(100, repack_threshold=0)
    world.check_all()
