"""What touches more records than one change may: it is done in pieces, and ends as it would have at once."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compute.cluster import quarantine, upkeep
from compute.cluster.controller import Controller
from compute.cluster.liveness import Liveness
from compute.cluster.records import nodes
from compute.cluster.records.instances import Instance
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node
from compute.cluster.records.taken import Claims, claim
from compute.cluster.records.transaction import Event, Transaction, new_uuid, pieces, transact
from compute.cluster.scheduler import rooms, take
from compute.cluster.state.protocol import MOST_KEYS
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.wire.spec import InstanceState, NodeEvent, NodeFacts, Orphan, Power

MANY = 2 * MOST_KEYS + 10


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "sf.db")
    for name in ("n1", "n2"):
        for value in (Node(uuid=new_uuid(), name=name), Claims(name=name)):
            transact(store, lambda txn, value=value: txn.create(value))
    yield store
    store.close()


def guests(store: SqliteStore, count: int = MANY, **changes: Any) -> None:
    given = {"node": "n1", "state": InstanceState.CREATED, **changes}
    for at in range(0, count, 50):

        def make(txn: Transaction, at: int = at) -> None:
            for n in range(at, min(count, at + 50)):
                txn.create(
                    Instance(
                        uuid=new_uuid(), name=f"g{n}", namespace="system", cpus=1, memory_mib=64, disks=(), **given
                    )
                )  # fmt: skip

        transact(store, make)


def networks(store: SqliteStore, count: int = MANY) -> None:
    for n in range(count):
        made = Network(
            uuid=new_uuid(), name=f"net{n}", namespace="system", netblock="10.0.0.0/24", vni=n + 1,
            router_node="n1", gateway="10.0.0.1", created_s=0,
        )  # fmt: skip
        transact(store, lambda txn, made=made: txn.create(made))


def test_a_node_with_many_guests_and_networks_is_removed_and_another_routes(store: SqliteStore) -> None:
    guests(store)
    networks(store)
    told = {"name": "n1", "server": "n2", "alive": False, "router_nodes": ["n1", "n2"]}
    while transact(store, lambda txn: nodes.remove(txn, **told)) is None:
        pass
    read = Transaction(store)
    assert {(i.state, i.unconfirmed) for i in read.list(Instance)} == {(InstanceState.DELETED, True)}
    assert read.find(Claims, "n1") is None
    moves(store)


def moves(store: SqliteStore) -> None:
    living = Liveness(store, "n2")

    def look(txn: Transaction) -> bool:
        upkeep._move_routers(txn, living)
        return txn.room < 10

    pieces(store, look)
    assert {n.router_node for n in Transaction(store).list(Network)} == {"n2"}


def test_what_a_drained_node_routes_moves_all_of_it(store: SqliteStore) -> None:
    networks(store)
    transact(store, lambda txn: nodes.drain(txn, "n1", drained=True, router_nodes=["n1", "n2"]))
    assert {n.router_node for n in Transaction(store).list(Network)} == {"n1", "n2"}
    moves(store)


def test_all_guests_of_a_machine_that_started_are_wanted_on(store: SqliteStore) -> None:
    guests(store, power=Power.OFF, autostart="yes")
    controller = Controller(store, "0badcafe", Config(node_name="n2"))
    for boot in ("monday", "tuesday"):
        asyncio.run(controller.register("n1", NodeFacts(2, 4096, boot=boot), SimpleNamespace()))  # type: ignore[arg-type]
    assert {i.power for i in Transaction(store).list(Instance)} == {Power.ON}
    assert Transaction(store).get(Node, "n1").facts["boot"] == "tuesday"


def test_records_and_long_histories_of_the_deleted_go(store: SqliteStore) -> None:
    guests(store, 3, state=InstanceState.DELETED)
    for one in Transaction(store).list(Instance):
        for _ in range(5):

            def write(txn: Transaction, one: Instance = one) -> None:
                for n in range(40):
                    txn.event(Instance.KIND, one.uuid, f"event {n}")

            transact(store, write)
        transact(store, lambda txn, one=one: txn.update(replace(one, updated_s=time.time() - 9999)))
    assert len(Transaction(store).list(Event)) == 600
    pieces(store, upkeep._sweep)
    assert not Transaction(store).list(Instance) and not Transaction(store).list(Event)


def test_many_events_and_many_guests_without_a_record_are_kept(store: SqliteStore) -> None:
    controller = Controller(store, "0badcafe", Config(node_name="n2"))
    said = [NodeEvent("node", "n1", time.time(), "status", f"event {n}") for n in range(MANY)]
    asyncio.run(controller.report("n1", [], said))
    assert len(Transaction(store).list(Event, "node/n1/")) == MANY
    orphans = [Orphan(new_uuid(), "on") for _ in range(MANY)]
    pieces(store, lambda txn: quarantine.note(txn, "n1", orphans))
    pieces(store, lambda txn: quarantine.note(txn, "n1", orphans))
    assert len(Transaction(store).list(quarantine.Quarantined)) == MANY
    pieces(store, lambda txn: quarantine.note(txn, "n1", []))
    assert not Transaction(store).list(quarantine.Quarantined)


def test_a_placement_rests_on_the_claims_of_its_node_alone(store: SqliteStore) -> None:
    tries = []

    def place(txn: Transaction) -> None:
        there = rooms(txn, {"n1": "", "n2": ""}, lambda _: None, ())
        for other in ("n2", "n1"):  # before the decision, by others
            if len(tries) < 1:
                transact(store, lambda t, other=other: t.update(replace(t.get(Claims, other), cpus=1)))
        tries.append(1)
        claim(txn, take(txn, there, "n1"), 1, 64, 0)
        assert [key for key in txn.expect if key.startswith("claims/")] == ["claims/n1"]

    transact(store, place)
    assert len(tries) == 2
    claims = Transaction(store).get(Claims, "n1")
    assert (claims.cpus, claims.memory_mib) == (2, 64)
