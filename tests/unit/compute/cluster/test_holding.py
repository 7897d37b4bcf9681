"""An instance keeps its image in the store, whatever becomes of the name."""

from dataclasses import replace
from pathlib import Path

import pytest

from compute.cluster.holding import Holds
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import transact
from compute.cluster.state.sqlite import SqliteStore
from compute.wire.spec import DiskSpec, InstanceState
from imagestore.backends.directory import Directory
from imagestore.errors import NotFound
from imagestore.formats.digest import Digest
from imagestore.formats.keys import LAYOUTS
from imagestore.gc import collect
from imagestore.push import push
from imagestore.store.roots import hold
from imagestore.store.store import Store
from imagestore.verify import verify_image
from tests.counted import Counted
from tests.unit.imagestore.images import make_raw


def instance(digest: Digest, uuid: str = "7b8d") -> Instance:
    disks = (DiskSpec("vda", str(digest), "a"), DiskSpec("vdb", size_bytes=1 << 30))
    return Instance(uuid=uuid, name="web", namespace="system", node="n", cpus=1, memory_mib=64, disks=disks)


def refs(store: Store) -> list[str]:
    return [stat.key for stat in store.backend.list("refs/")]


@pytest.fixture
def state(tmp_path: Path) -> SqliteStore:
    return SqliteStore(tmp_path / "sf.db")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.init(Directory(tmp_path / "store"))


@pytest.fixture
def digest(store: Store, tmp_path: Path) -> Digest:
    return push(store, make_raw(tmp_path / "disk.raw"), "a", cache=tmp_path / "hints").digest


def collected(store: Store) -> None:
    for _ in range(3):
        collect(store, grace_s=-60, repack_threshold=0)


def test_an_image_that_lost_its_name_stays_until_its_instance_is_deleted(
    state: SqliteStore, store: Store, digest: Digest
) -> None:
    made = instance(digest)
    transact(state, lambda txn: txn.create(made))
    holds = Holds(state, "0123abcd")
    holds.reconcile({"local": store})
    store.names.remove("a")
    collected(store)
    assert not verify_image(store, digest).problems
    gone = replace(made, state=InstanceState.DELETED)
    transact(state, lambda txn: txn.update(replace(gone, revision=txn.get(Instance, made.uuid).revision)))
    holds.reconcile({"local": store})
    assert refs(store) == []
    collected(store)
    with pytest.raises(NotFound):
        store.manifest(digest)


def test_a_restarted_server_releases_what_ended_meanwhile_and_nothing_of_another_installation(
    state: SqliteStore, store: Store, digest: Digest
) -> None:
    made = instance(digest)
    transact(state, lambda txn: txn.create(made))
    Holds(state, "0123abcd").reconcile({"local": store})
    Holds(state, "ffffffff").reconcile({"local": store})
    transact(state, lambda txn: txn.delete(Instance, made.uuid))
    Holds(state, "0123abcd").reconcile({"local": store})
    assert refs(store) == ["refs/ffffffff-7b8d"]


@pytest.mark.parametrize("harm", ["lost", "from an old copy", "damaged"])
def test_a_reference_that_goes_wrong_while_the_server_runs_is_put_right(
    state: SqliteStore, store: Store, digest: Digest, tmp_path: Path, harm: str
) -> None:
    """A5: what was written once was never looked at again, and after a removal the image was gone."""
    old = push(
        store, make_raw(tmp_path / "old.raw", size_bytes=8 << 20), "old", cache=tmp_path / "hints"
    ).digest
    transact(state, lambda txn: txn.create(instance(digest)))
    holds = Holds(state, "0123abcd")
    holds.reconcile({"local": store})
    (key,) = refs(store)
    match harm:
        case "lost":
            store.backend.delete(key)
        case "damaged":
            store.backend.put(key, b"{}")
        case _:
            hold(store, key.removeprefix("refs/"), [old])
    holds.reconcile({"local": store})
    store.names.remove("a")
    collected(store)
    assert not verify_image(store, digest).problems


def test_an_image_that_is_repaired_later_is_held_then(
    state: SqliteStore, store: Store, digest: Digest, tmp_path: Path
) -> None:
    transact(state, lambda txn: txn.create(instance(digest)))
    holds = Holds(state, "0123abcd")
    layout = store.backend.get(LAYOUTS.key(digest)).data
    store.backend.delete(LAYOUTS.key(digest))
    holds.reconcile({"local": store})
    assert refs(store) == []
    store.backend.put(LAYOUTS.key(digest), layout)
    holds.reconcile({"local": store})
    assert refs(store) == ["refs/0123abcd-7b8d"]


def test_reconciling_again_asks_the_store_for_a_listing_and_no_more(
    state: SqliteStore, store: Store, digest: Digest
) -> None:
    transact(state, lambda txn: txn.create(instance(digest)))
    counted = Counted(store.backend)
    stores = {"local": Store(counted, store.info)}
    holds = Holds(state, "0123abcd")
    holds.reconcile(stores)
    first = counted.requests
    holds.reconcile(stores)
    assert counted.requests == first + 1 > 1
    assert len(refs(store)) == 1


def test_an_image_of_another_store_is_held_there_and_not_here(
    state: SqliteStore, store: Store, digest: Digest, tmp_path: Path
) -> None:
    other = Store.init(Directory(tmp_path / "other"))
    transact(state, lambda txn: txn.create(instance(digest)))
    Holds(state, "0123abcd").reconcile({"local": other, "far": store})
    assert refs(other) == []
    assert refs(store) == ["refs/0123abcd-7b8d"]
