"""The server's side of snapshots: what is asked, what a node may say of it, what gets names."""

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compute import process
from compute.cluster import desired
from compute.cluster.auth import delete_namespace
from compute.cluster.feed import Feed
from compute.cluster.images.snapshots import Snapshots
from compute.cluster.images.stores import NamespaceStores
from compute.cluster.records.instances import Instance
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.snapshots import (
    Backup,
    Snapshot,
    due,
    finish,
    kept,
    settle_snapshot,
    snapshots_of,
    take,
)
from compute.cluster.records.transaction import PROVEN, Transaction, pieces, transact
from compute.cluster.reports import settle
from compute.cluster.state.sqlite import SqliteStore
from compute.errors import Conflict, NoCapacity, NotFound
from compute.wire.spec import Capture, DiskSpec, InstanceState, InstanceStatus
from imagestore import Digest, Store, open_store, push, verify_store
from tests.unit.compute.cluster.leases import lapse
from tests.unit.imagestore.images import make_raw

WEB, DB = "11111111-0000-4000-8000-000000000001", "22222222-0000-4000-8000-000000000002"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqliteStore]:
    begun, seconds = time.time(), itertools.count()  # a snapshot each second at most, as in life
    clock = SimpleNamespace(time=lambda: begun + next(seconds))
    monkeypatch.setattr("compute.cluster.records.snapshots.time", clock)
    store = SqliteStore(tmp_path / "sf.db")
    yield store
    store.close()


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("SF_CACHE_DIR", str(tmp_path / "index"))
    store = open_store(str(tmp_path / "store"), create=True)
    yield store
    store.backend.close()


@pytest.fixture
def worker(store: SqliteStore, images: Store, tmp_path: Path) -> Iterator[Snapshots]:
    transact(store, lambda txn: txn.create(Namespace(name="shop")))
    own = NamespaceStores(store, lambda: str(tmp_path / "store"), tmp_path)
    yield Snapshots(store, own, lambda: {"local": images}, Feed(store), lambda *_: None, lambda *_: None)
    own.close()


def guest(store: SqliteStore, uuid: str, image: Digest | None = None, **changes: object) -> Instance:
    made = Instance(
        uuid=uuid,
        name="Web",
        namespace="shop",
        node="here",
        cpus=1,
        memory_mib=64,
        disks=(DiskSpec("vda", str(image or "")),),
        state=InstanceState.CREATED,
        power_state="on",
    )
    made = replace(made, **changes)  # type: ignore[arg-type]
    transact(store, lambda txn: txn.create(made))
    return made


def taken(store: SqliteStore, uuid: str) -> Snapshot:
    return snapshots_of(Transaction(store), uuid)[0]


def advance(store: SqliteStore, worker: Snapshots, uuid: str) -> Snapshot:
    read = Transaction(store)
    worker._advance(taken(store, uuid), read.find(Instance, uuid))
    return taken(store, uuid)


def test_it_goes_from_asked_to_named_and_its_image_is_complete_in_the_own_store(
    store: SqliteStore, images: Store, worker: Snapshots, tmp_path: Path
) -> None:
    base = push(images, make_raw(tmp_path / "disk.raw"), "tiny").digest
    guest(store, WEB, base)
    asked = transact(store, lambda txn: take(txn, WEB))
    assert (
        asked.state == "initial"
        and not desired.read(Transaction(store), "here", "0" * 8, ["here"]).instances[0].snapshots
    )
    assert advance(store, worker, WEB).state == "ordered"
    own = worker._own.of("shop")
    assert own.has_manifest(base) and own.info.private
    (spec,) = desired.read(Transaction(store), "here", "0" * 8, ["here"]).instances
    assert [one.uuid for one in spec.snapshots] == [asked.uuid]
    told = replace(spec.snapshots[0], digests={"vda": str(base)}, costs={"new": 5}, labels={"by": "the node"})
    status = InstanceStatus(WEB, InstanceState.CREATED, "on", snapshots=(told,))
    transact(store, lambda txn: settle(txn, "elsewhere", status))
    assert taken(store, WEB).state == "ordered"
    transact(store, lambda txn: settle(txn, "here", status))
    assert taken(store, WEB).state == "stored" and taken(store, WEB).order.labels["instance"] == "Web"
    assert advance(store, worker, WEB).state == "created"
    assert own.names.get("web", asked.tag).images == {"x86_64": base}


def test_a_disk_that_grew_before_a_restore_ended_stays_as_large(store: SqliteStore) -> None:
    guest(store, WEB, disks=(DiskSpec("vda", "b3:now", size_bytes=1 << 30),))
    made = transact(store, lambda txn: take(txn, WEB, (DiskSpec("vda", "b3:then", size_bytes=1 << 30),)))
    grown = (DiskSpec("vda", "b3:now", size_bytes=9 << 30),)
    transact(store, lambda txn: txn.update(replace(txn.get(Instance, WEB), disks=grown)))
    transact(store, lambda txn: finish(txn, made.uuid))
    assert Transaction(store).get(Instance, WEB).disks == (DiskSpec("vda", "b3:then", size_bytes=9 << 30),)


def test_one_at_a_time_of_a_guest_that_runs_and_each_has_a_name_of_its_own(store: SqliteStore) -> None:
    guest(store, WEB)
    guest(store, DB, name="db", state=InstanceState.ERROR)
    first = transact(store, lambda txn: take(txn, WEB))
    for uuid in (WEB, DB):
        with pytest.raises(Conflict):
            transact(store, lambda txn, uuid=uuid: take(txn, uuid))  # type: ignore[misc]
    transact(store, lambda txn: txn.update(replace(taken(store, WEB), state="created")))
    assert transact(store, lambda txn: take(txn, WEB)).tag > first.tag


def test_what_cannot_be_is_an_error_with_its_reason(
    store: SqliteStore, worker: Snapshots, tmp_path: Path
) -> None:
    guest(store, WEB, Digest.of(b"nowhere"))
    transact(store, lambda txn: take(txn, WEB))
    lost = advance(store, worker, WEB)
    assert lost.state == "error" and "not" in lost.order.error
    transact(store, lambda txn: take(txn, WEB))
    transact(store, lambda txn: txn.delete(Instance, WEB))
    assert advance(store, worker, WEB).order.error == "its instance is gone"


def test_a_node_speaks_of_snapshots_that_were_ordered_of_it_alone(
    store: SqliteStore, images: Store, worker: Snapshots, tmp_path: Path
) -> None:
    base = push(images, make_raw(tmp_path / "disk.raw"), "tiny").digest
    web, db = guest(store, WEB, base), guest(store, DB, base, name="db")
    uuid = transact(store, lambda txn: take(txn, WEB)).uuid
    whole = Capture(uuid, digests={"vda": str(base)})
    transact(store, lambda txn: settle_snapshot(txn, web, whole))  # not ordered yet
    assert advance(store, worker, WEB).state == "ordered"
    for other in (Capture(f"../instance/{WEB}"), Capture("x" * 9000)):
        transact(store, lambda txn, other=other: settle_snapshot(txn, web, other))  # type: ignore[misc]
    transact(store, lambda txn: settle_snapshot(txn, db, whole))
    assert taken(store, WEB).state == "ordered"
    wrong: list[dict[str, Any]] = [{}, {"digests": {"vda": "b3:0", "vdb": "x"}}, {"error": "e" * 9000}]
    for said in wrong:
        told = Capture(uuid, **said)
        transact(store, lambda txn, told=told: settle_snapshot(txn, web, told))  # type: ignore[misc]
        assert len(taken(store, WEB).order.error) <= 2000
        assert advance(store, worker, WEB).state == "error"
        uuid = transact(store, lambda txn: take(txn, WEB)).uuid
        assert advance(store, worker, WEB).state == "ordered"
    absent = Capture(uuid, digests={"vda": str(Digest.of(b"absent"))})
    transact(store, lambda txn: settle_snapshot(txn, web, absent))
    assert advance(store, worker, WEB).state == "error" and not list(worker._own.of("shop").names.list())


def rule(records: SqliteStore, **changes: Any) -> Backup:
    made = Backup(uuid=WEB, namespace="shop", every_s=86400.0, due_s=time.time() - 1, **changes)
    transact(records, lambda txn: (txn.find(Backup, WEB), txn.update(made))[0])  # type: ignore[func-returns-value]
    return made


def test_a_rule_keeps_by_the_calendar_and_always_the_newest() -> None:
    def at(tag: str) -> Snapshot:
        return Snapshot(
            uuid=tag, instance_uuid=WEB, instance="web", namespace="", tag=tag, order=Capture(tag)
        )

    days = [at(f"202612{day:02}-{hour}0000") for day in range(31, 0, -1) for hour in (18, 12)]
    assert kept({}, days) == {one.uuid for one in days}
    assert kept({"daily": 2}, days) == {"20261231-180000", "20261230-180000"}
    assert kept({"weekly": 2, "monthly": 3}, days) == {"20261231-180000", "20261227-180000"}
    assert kept({"monthly": 2}, [*days, at("20261105-120000"), at("20261001-120000")]) == {
        "20261231-180000",
        "20261105-120000",
    }
    assert kept({"daily": 1}, []) == set()


def test_what_was_due_while_the_server_was_away_is_taken_once_and_the_clock_stays(store: SqliteStore) -> None:
    guest(store, WEB)
    due_s = rule(store, keep={"daily": 1}).due_s
    transact(store, lambda txn: txn.update(replace(txn.get(Backup, WEB), due_s=due_s - 5 * 86400)))
    transact(store, lambda txn: due(txn, WEB))
    now = Transaction(store).get(Backup, WEB)
    assert abs(now.due_s - due_s - 86400) < 1 and len(snapshots_of(Transaction(store), WEB)) == 1
    assert taken(store, WEB).backup and now.error == ""


def test_a_backup_that_fails_is_tried_again_sooner_and_one_that_is_made_ends_that(
    store: SqliteStore, images: Store, worker: Snapshots, tmp_path: Path
) -> None:
    guest(store, WEB, state=InstanceState.CREATING)
    rule(store)
    transact(store, lambda txn: due(txn, WEB))
    failed = Transaction(store).get(Backup, WEB)
    assert failed.failures == 1 and "creating" in failed.error and failed.due_s < time.time() + 130
    transact(store, lambda txn: txn.update(replace(txn.get(Instance, WEB), state=InstanceState.CREATED)))
    base = push(images, make_raw(tmp_path / "disk.raw"), "tiny").digest
    disks = (DiskSpec("vda", str(base)),)
    transact(store, lambda txn: txn.update(replace(txn.get(Instance, WEB), disks=disks)))
    for _ in range(3):
        transact(store, lambda txn: due(txn, WEB))
        advance(store, worker, WEB)
        said = replace(taken(store, WEB).order, digests={"vda": str(base)})
        transact(store, lambda txn, said=said: settle_snapshot(txn, txn.get(Instance, WEB), said))  # type: ignore[misc]
        assert advance(store, worker, WEB).state == "created"
        transact(store, lambda txn: txn.update(replace(txn.get(Backup, WEB), keep={"daily": 1})))
    made = Transaction(store).get(Backup, WEB)
    assert made.failures == 0 and made.error == "" and made.last_s > 0
    (left,) = snapshots_of(Transaction(store), WEB)
    names = [(r.name, r.tag) for r in worker._own.of("shop").names.list()]
    assert names == [("web", left.tag)]


def test_another_store_gets_complete_copies_and_follows_the_rule(
    store: SqliteStore, images: Store, worker: Snapshots, tmp_path: Path
) -> None:
    base = push(images, make_raw(tmp_path / "disk.raw"), "tiny").digest
    guest(store, WEB, base)
    rule(store, store=str(tmp_path / "other"), keep={"daily": 1})
    for _ in range(2):
        transact(store, lambda txn: due(txn, WEB))
        advance(store, worker, WEB)
        said = replace(taken(store, WEB).order, digests={"vda": str(base)})
        transact(store, lambda txn, said=said: settle_snapshot(txn, txn.get(Instance, WEB), said))  # type: ignore[misc]
        assert advance(store, worker, WEB).state == "created"
    other = open_store(str(tmp_path / "other"))
    assert [r.tag for r in other.names.list()] == [taken(store, WEB).tag] and other.info.private
    assert not verify_store(other, full=True).problems
    other.backend.close()


def test_an_error_in_one_look_ends_no_server(worker: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or a rule that is taken away between the look and the act: said, and looked at again."""
    looks = 0

    class Enough(BaseException):
        pass

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks > 2:
            raise Enough
        raise (NoCapacity("the disk is full"), NotFound("backup x not found"))[looks - 1]

    monkeypatch.setattr(worker, "_look", look)
    monkeypatch.setattr("compute.process._AGAIN_S", 0.01)
    with pytest.raises(Enough):
        asyncio.run(process.lasting("snapshots", worker.keep))


def test_of_a_held_guest_whose_namespace_is_gone_no_snapshot_is_left_to_be_removed(
    store: SqliteStore, worker: Snapshots
) -> None:
    """Its store went with the namespace: who is called so next has another, in which nothing is looked for."""
    guest(store, WEB, held_s=1.0)
    transact(store, lambda txn: take(txn, WEB))
    transact(store, lambda txn: finish(txn, taken(store, WEB).uuid))
    transact(store, lambda txn: txn.update(replace(txn.get(Instance, WEB), state=InstanceState.DELETED)))
    pieces(store, lambda txn: delete_namespace(txn, "shop"))
    assert Transaction(store).find(Instance, WEB) and not Transaction(store).list(Snapshot)
    worker._look()
    assert not worker._busy


def test_guests_that_pass_to_another_node_keep_no_snapshot_waiting(
    store: SqliteStore, worker: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(worker, "_pass_on", lambda *_: go_on.wait(20))
    for number in range(8):
        uuid = f"33333333-0000-4000-8000-00000000000{number}"
        guest(store, uuid, name=f"moves{number}")
        transact(store, lambda txn, uuid=uuid: take(txn, uuid, to="there", running=True))  # type: ignore[misc]
    worker._look()
    guest(store, WEB)
    transact(store, lambda txn: take(txn, WEB))
    worker._look()
    until = time.monotonic() + 15
    while taken(store, WEB).state == "initial" and time.monotonic() < until:
        time.sleep(0.01)
    state = taken(store, WEB).state
    go_on.set()
    worker._pool.shutdown()
    worker._moves.shutdown()
    assert state == "ordered", "it waited for all of them"


def test_each_step_of_a_snapshot_proves_the_lease_of_the_one_server_that_does_it(
    store: SqliteStore, worker: Snapshots
) -> None:
    """Who was paused for too long ends nothing that another server has taken up."""
    guest(store, WEB)
    transact(store, lambda txn: take(txn, WEB))

    async def look() -> None:
        PROVEN.set(lease := store.grant(60))
        lapse(store, lease)
        await asyncio.to_thread(worker._look)

    asyncio.run(look())
    worker._pool.shutdown()
    assert taken(store, WEB).state == "initial" and not taken(store, WEB).order.error
