"""Records, transactions."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute.cluster.records import transaction
from compute.cluster.records.addresses import Ipam
from compute.cluster.records.instances import Instance
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.taken import Claims, claim
from compute.cluster.records.transaction import Event, Stored, Transaction, transact
from compute.cluster.state.sqlite import SqliteStore
from compute.errors import Conflict, Invalid, NotFound
from compute.wire.codec import from_plain, to_plain
from compute.wire.spec import DiskSpec, InstanceState, NodeDesired
from net import ipam


@pytest.fixture
def store(tmp_path: Path) -> Any:
    found = SqliteStore(tmp_path / "sf.db")
    yield found
    found.close()


def instance(**more: Any) -> Instance:
    values: dict[str, Any] = {
        "uuid": "u1",
        "name": "web",
        "namespace": "system",
        "node": "n",
        "cpus": 1,
        "memory_mib": 128,
        "disks": (DiskSpec("vda", "b3:00", "debian:12", 2**30),),
        "user_data": b"#cloud-config\n\xff",
    }
    return Instance(**(values | more))


def test_an_object_survives_its_record() -> None:
    before = instance(state=InstanceState.CREATED, metadata={"a": [1, None]})
    after = Instance.decode(before.encode(), 7)
    assert after == before
    assert after.revision == 7


def test_a_pool_survives_its_record() -> None:
    pool, address = ipam.allocate(ipam.Pool.of(ipam.check_netblock("10.0.0.0/24")), "port", 0)
    pool = ipam.release(pool, address, "port", 0)
    record = Ipam(name="n", pool=pool)
    assert Ipam.decode(record.encode(), 1).pool == pool


def test_a_record_of_a_newer_program_is_refused_and_an_old_one_upgraded() -> None:
    class Thing(Stored):
        KIND: ClassVar[str] = "thing"

    data = instance().encode().replace(b'"schema":2', b'"schema":3')
    with pytest.raises(Invalid, match="newer"):
        Instance.decode(data, 1)

    class Second(Namespace):
        SCHEMA: ClassVar[int] = 2
        UPGRADES: ClassVar[Any] = {1: lambda old: old | {"schema": 2, "name": old["name"].upper()}}

    assert Second.decode(Namespace(name="a").encode(), 1).name == "A"


def test_unknown_fields_are_dropped_and_missing_ones_get_their_default() -> None:
    plain = to_plain(instance())
    del plain["video"]
    assert from_plain(Instance, plain | {"later": 1}) == instance()
    del plain["name"]
    with pytest.raises(Invalid, match="name"):
        from_plain(Instance, plain)


@given(st.from_type(NodeDesired))
def test_whatever_a_node_may_be_told_survives_the_wire(desired: NodeDesired) -> None:
    assert from_plain(NodeDesired, to_plain(desired)) == desired


def test_a_transaction_sees_its_own_writes_and_nobody_else_does_before_the_end(store: SqliteStore) -> None:
    txn = Transaction(store)
    txn.create(Namespace(name="a"))
    assert txn.get(Namespace, "a").name == "a"
    assert Transaction(store).find(Namespace, "a") is None
    txn.delete(Namespace, "a")
    assert txn.find(Namespace, "a") is None


def test_creating_what_exists_is_a_conflict(store: SqliteStore) -> None:
    transact(store, lambda txn: txn.create(Namespace(name="a")))
    with pytest.raises(Conflict):
        transact(store, lambda txn: txn.create(Namespace(name="a")))
    with pytest.raises(NotFound):
        Transaction(store).get(Namespace, "b")


def test_a_transaction_that_was_overtaken_runs_again_on_the_new_state(store: SqliteStore) -> None:
    transact(store, lambda txn: txn.create(Namespace(name="a")))
    rounds = []

    def action(txn: Transaction) -> None:
        found = txn.get(Namespace, "a")
        rounds.append(found.trust)
        if len(rounds) == 1:
            other = Transaction(store)
            other.update(replace(other.get(Namespace, "a"), trust=("x",)))
            other.commit()
        txn.update(replace(found, trust=(*found.trust, "y")))

    transact(store, action)
    assert rounds == [(), ("x",)]
    assert Transaction(store).get(Namespace, "a").trust == ("x", "y")


def test_an_objects_events_stay_in_order_and_bounded(store: SqliteStore) -> None:
    count = Event.LIMIT + 20 * Event.TRIM
    for number in range(count):
        transact(store, lambda txn, n=number: txn.event("instance", "u", f"{n}", timestamp_s=n))  # type: ignore[misc]
    kept = [int(e.message) for e in Transaction(store).list(Event, "instance/u/")]
    assert kept == sorted(kept)
    assert kept[-1] == count - 1
    assert len(kept) < count


def test_each_version_of_a_record_is_decoded_once_and_never_taken_for_another(tmp_path: Path) -> None:
    """Not for the same revision of another store, nor for the same value written again."""
    stores = [SqliteStore(tmp_path / f"{n}.db") for n in range(2)]
    for store, name in zip(stores, ("web", "db"), strict=True):
        transact(store, lambda txn, name=name: txn.create(instance(name=name)))  # type: ignore[misc]
    for _ in range(2):
        assert [Transaction(store).list(Instance)[0].name for store in stores] == ["web", "db"]
    (first,), (second,) = (Transaction(stores[1]).list(Instance) for _ in range(2))
    assert first is second is Transaction(stores[1]).get(Instance, "u1")
    transact(stores[1], lambda txn: txn.update(replace(txn.get(Instance, "u1"))))
    (third,) = Transaction(stores[1]).list(Instance)
    assert third == first and third.revision > first.revision
    for store in stores:
        store.close()


def test_those_that_queue_do_each_thing_once_and_those_that_meet_them_end_too(store: Any) -> None:
    transact(store, lambda txn: txn.create(Claims(name="n")))
    tries: list[int] = []

    def one(number: int) -> None:
        def action(txn: Transaction) -> None:
            tries.append(number)
            claim(txn, "n", 1, 16, 0)

        transact(store, action, queued=number < 200)

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(one, range(200)))
        assert sorted(tries) == list(range(200))
        list(pool.map(one, range(200, 400)))
    found = Transaction(store).get(Claims, "n")
    assert (found.cpus, found.memory_mib) == (400, 6400)


def test_who_waited_long_for_a_turn_goes_on_without_one(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer holds up whoever has the turn, and nobody else for as long."""
    monkeypatch.setattr(transaction, "_TURN_S", 0.05)
    began, over = threading.Event(), threading.Event()

    def stuck(txn: Transaction) -> None:
        began.set()
        assert over.wait(60)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(transact, store, stuck, queued=True)
        assert began.wait(60)
        transact(store, lambda txn: txn.create(Claims(name="n")), queued=True)
        assert not waiting.done()
        over.set()
        waiting.result(60)
