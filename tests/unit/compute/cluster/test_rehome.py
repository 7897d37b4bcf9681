"""An instance is given to another node: what it holds goes along, and only its own node speaks of it."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from compute.cluster import desired, upkeep
from compute.cluster.controller import Controller
from compute.cluster.records import nodes
from compute.cluster.records.epochs import begin
from compute.cluster.records.instances import Instance, delete_instance, interfaces_of, rehome, stays
from compute.cluster.records.interfaces import Interface, Want
from compute.cluster.records.networks import Network, create_network
from compute.cluster.records.nodes import Node
from compute.cluster.records.taken import Claims
from compute.cluster.records.transaction import Transaction, new_uuid, transact
from compute.cluster.reports import settle
from compute.cluster.scheduler import create_instance, judge, place, rooms, take
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import Conflict, NoCapacity, NotReady
from compute.wire.codec import to_plain
from compute.wire.spec import (
    Capture,
    DiskSpec,
    InstanceSpec,
    InstanceState,
    InstanceStatus,
    Inventory,
    NodeFacts,
)

WEB = "11111111-0000-4000-8000-000000000001"
IMAGE = "b3:" + 64 * "1"
ROOM, LIMITS = dict.fromkeys("abc", ""), Config()
S = InstanceState


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "sf.db")
    for number, name in enumerate("abc"):
        facts = NodeFacts(cpus=4, memory_mib=2048, address=f"127.0.0.{number + 1}")
        for made in (Node(uuid=new_uuid(), name=name, facts=to_plain(facts)), Claims(name=name)):
            transact(store, lambda txn, made=made: txn.create(made))
    yield store
    store.close()


def guest(store: SqliteStore, uuid: str = WEB, state: InstanceState = S.CREATED, **changes: object) -> None:
    told = {"cpus": 2, "memory_mib": 512, "disks": (DiskSpec("vda", IMAGE),), "power_state": "on", **changes}
    made = Instance(uuid=uuid, name=f"g{uuid[:8]}", namespace="system", node="a", state=state, **told)  # type: ignore[arg-type]
    transact(
        store, lambda txn: create_instance(txn, made, (), limits=LIMITS, usable=ROOM, used=lambda _: None)
    )


def move(store: SqliteStore, node: str, uuid: str = WEB, *, gone: bool = False) -> Instance:
    return transact(store, lambda txn: rehome(txn, uuid, node, "for a test", gone=gone))


def web(store: SqliteStore) -> Instance:
    return Transaction(store).get(Instance, WEB)


def claims(store: SqliteStore) -> dict[str, tuple[int, int]]:
    return {c.name: (c.cpus, c.memory_mib) for c in Transaction(store).list(Claims)}


def told(store: SqliteStore, node: str) -> list[InstanceSpec]:
    return list(desired.read(Transaction(store), node, "0" * 8, ["a", "b", "c"]).instances)


def say(store: SqliteStore, node: str, state: InstanceState, power: str = "on", **said: object) -> None:
    status = InstanceStatus(WEB, state, power, **said)  # type: ignore[arg-type]
    transact(store, lambda txn: settle(txn, node, status))


def test_room_goes_back_and_is_taken_and_both_nodes_are_told(store: SqliteStore) -> None:
    guest(store)
    assert claims(store) == {"a": (2, 512), "b": (0, 0), "c": (0, 0)}
    disks = (DiskSpec("vda", IMAGE[:-1] + "2", store="system"),)
    moved = transact(store, lambda txn: rehome(txn, WEB, "b", "for a test", disks))
    assert (moved.node, moved.left, moved.disks) == ("b", ("a",), disks)
    assert claims(store) == {"a": (0, 0), "b": (2, 512), "c": (0, 0)}
    (there,), (here,) = told(store, "a"), told(store, "b")
    assert there.delete and not here.delete and here.arriving and not here.made and here.disks == disks
    assert told(store, "c") == []


def test_what_hangs_on_it_goes_along(store: SqliteStore) -> None:
    asked = Network(
        uuid=new_uuid(), name="n", namespace="system", netblock="10.0.0.0/24", vni=0, router_node="", gateway="",
        created_s=0,
    )  # fmt: skip
    net = transact(store, lambda txn: create_network(txn, asked, excluded=(), router_nodes=["c"]))
    made = Instance(
        uuid=WEB, name="web", namespace="system", node="a", state=S.CREATED, cpus=1, memory_mib=64,
        disks=(DiskSpec("vda"),),
    )  # fmt: skip
    wants = [Want(net.uuid)]
    transact(
        store, lambda txn: create_instance(txn, made, wants, limits=LIMITS, usable=ROOM, used=lambda _: None)
    )
    before = Transaction(store).list(Interface)
    move(store, "b")
    assert interfaces_of(Transaction(store), WEB) == before
    (network,) = desired.read(Transaction(store), "b", "0" * 8, ["a", "b"]).networks.networks
    (port,) = network.ports
    assert port.node == "b" and port.tap
    (gone,) = told(store, "a")
    assert gone.delete and gone.interfaces == ()


def test_a_node_that_is_not_its_own_changes_nothing_of_it(store: SqliteStore) -> None:
    """Late reports of the old node, lies of any other: its state, its power, its snapshots stay as they are."""
    guest(store)
    move(store, "b")
    before = web(store)
    done = (Capture("1", digests={"vda": IMAGE}),)
    for node in ("a", "c"):
        for state in S:
            if (node, state) != ("a", S.DELETED):
                say(store, node, state, error_message="x", agent_state="ready", snapshots=done, vdi_port=7)
    assert web(store) == before
    say(store, "b", S.CREATED, "transition-to-on")
    now = web(store)
    assert not now.arriving and now.power_state == "transition-to-on"
    (here,) = told(store, "b")
    assert here.made


def test_the_old_node_is_told_until_it_has_removed_it_and_until_then_it_cannot_go_back(
    store: SqliteStore,
) -> None:
    guest(store)
    move(store, "b")
    with pytest.raises(Conflict, match="not removed yet: a"):
        move(store, "a")
    say(store, "b", S.CREATED)
    assert [spec.delete for spec in told(store, "a")] == [True]
    say(store, "a", S.DELETED, "off")
    assert web(store).left == () and web(store).state == S.CREATED and told(store, "a") == []
    assert move(store, "a").left == ("b",)
    with pytest.raises(Conflict, match="is there: a"):
        move(store, "a")


def test_a_node_that_is_away_is_told_when_it_comes_back_wherever_the_guest_is_by_then(
    store: SqliteStore,
) -> None:
    guest(store)
    move(store, "b")
    say(store, "b", S.CREATED)
    assert move(store, "c").left == ("a", "b")
    assert [spec.delete for spec in told(store, "a")] == [True]
    transact(store, lambda txn: delete_instance(txn, WEB))
    say(store, "c", S.DELETED)
    say(store, "b", S.DELETED)
    transact(store, lambda txn: txn.update(replace(txn.get(Instance, WEB), updated_s=time.time() - 9999)))
    transact(store, upkeep._sweep)
    assert web(store).left == ("a",) and web(store).state == S.DELETED
    say(store, "a", S.DELETED)
    transact(store, upkeep._sweep)
    assert Transaction(store).find(Instance, WEB) is None
    assert claims(store) == {"a": (0, 0), "b": (0, 0), "c": (0, 0)}


def test_a_lost_node_is_not_told_to_remove_what_it_has(store: SqliteStore) -> None:
    """Absence deletes nothing: what it still has when it comes back is found there, and left as it is."""
    guest(store)
    assert move(store, "b", gone=True).left == () and told(store, "a") == []
    say(store, "a", S.DELETED)
    assert web(store).state == S.CREATED


def meanwhile(store: SqliteStore, monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    """Another server moves the guest there just after the guests were listed, once."""
    listed, turns = Transaction.list, iter([node])

    def lists(txn: Transaction, cls: type[Instance], under: str = "") -> list[Instance]:
        found = listed(txn, cls, under)
        if cls is Instance and (to := next(turns, "")):
            move(store, to, gone=True)
        return found

    monkeypatch.setattr(Transaction, "list", lists)


@pytest.mark.parametrize(("to", "state"), [("a", S.DELETED), ("b", S.CREATED)])
def test_a_guest_that_comes_or_goes_while_its_node_is_removed_is_not_lost(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, to: str, state: InstanceState
) -> None:
    guest(store)
    if to == "a":
        move(store, "b", gone=True)
    meanwhile(store, monkeypatch, to)
    told = {"name": "a", "server": "c", "alive": False, "router_nodes": ["c"]}
    transact(store, lambda txn: nodes.remove(txn, **told))  # type: ignore[arg-type]
    assert (web(store).node, web(store).state) == (to, state)
    assert claims(store) == {"b": (2, 512) if to == "b" else (0, 0), "c": (0, 0)}


def test_what_fails_while_it_arrives_is_no_error_for_good(store: SqliteStore) -> None:
    guest(store)
    move(store, "b")
    say(store, "b", S.PREFLIGHT, "off", error_message="the store is away")
    assert web(store).arriving and web(store).state == S.CREATED and web(store).error_message


def test_only_what_is_created_is_moved(store: SqliteStore) -> None:
    guest(store, state=S.CREATING)
    with pytest.raises(NotReady):
        move(store, "b")
    transact(store, lambda txn: delete_instance(txn, WEB))
    with pytest.raises(Conflict):
        move(store, "b")


def test_many_at_once_never_take_more_than_there_is(store: SqliteStore) -> None:
    """Of 2048 MiB 512 are the host's own: three guests of 512 have room."""
    many = [f"{n}1111111-0000-4000-8000-000000000001" for n in range(6)]
    for n, uuid in enumerate(many):
        guest(store, uuid)
        move(store, "bc"[n % 2], uuid)

    def one(uuid: str) -> str:
        def go(txn: Transaction) -> str:
            there = rooms(txn, ROOM, lambda _: None, ())
            node = place(judge(there, 2, 512, limits=LIMITS, wanted="a"))
            txn.update(replace(txn.get(Instance, uuid), left=()))
            return rehome(txn, uuid, take(txn, there, node), "for a test").node

        try:
            return transact(store, go)
        except NoCapacity:
            return ""

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(one, many)) == ["", "", "", "a", "a", "a"]
    held = claims(store)
    assert held["a"] == (6, 1536) and [sum(each) for each in zip(*held.values(), strict=True)] == [12, 3072]


def test_a_state_that_was_put_back_has_nothing_removed_that_may_be_back_by_now(store: SqliteStore) -> None:
    """It is of the moment at which they had left a; later they came back, and that is their only copy."""
    many = [f"{number:08x}-0000-4000-8000-000000000001" for number in range(25)]
    for uuid in many:
        guest(store, uuid, cpus=1, memory_mib=16)
        move(store, "b", uuid)
    gone = transact(store, lambda txn: delete_instance(txn, many[0])).uuid  # a deletion is for good
    transact(store, lambda txn: begin(txn, ["a"], "for a test"))
    now = desired.read(Transaction(store), "a", "0" * 8, [])
    assert now.hold and len(now.instances) == 25
    controller = Controller(store, "0badcafe", Config(node_name="z", guests=False))
    asyncio.run(controller.inventory("a", Inventory("m", now.epoch, 0)))
    after = desired.read(Transaction(store), "a", "0" * 8, [])
    assert not after.hold and [(one.uuid, one.delete) for one in after.instances] == [(gone, True)]
    move(store, "c", many[1])
    asyncio.run(controller.inventory("b", Inventory("m", now.epoch, 0)))  # of that epoch: it is removed there
    assert [one.uuid for one in told(store, "b") if one.delete] == [many[0], many[1]]


@pytest.mark.parametrize("first", ["the node speaks", "the move is ended"])
def test_a_state_that_was_put_back_has_nothing_removed_that_has_passed_since(
    store: SqliteStore, first: str
) -> None:
    """It is of the middle of a live move, which came to its end later: what is on b is the only copy, and runs."""
    guest(store)
    transact(store, lambda txn: txn.update(replace(web(store), moving="b", passing="move")))
    transact(store, lambda txn: begin(txn, ["a", "b"], "for a test"))
    end = lambda: transact(store, lambda txn: txn.update(stays(web(store))))  # noqa: E731
    if first == "the move is ended":
        end()
    controller = Controller(store, "0badcafe", Config(node_name="z", guests=False))
    now = desired.read(Transaction(store), "b", "0" * 8, [])
    for node in "ba":
        asyncio.run(controller.inventory(node, Inventory(f"m-{node}", now.epoch, 0)))
    end()
    assert told(store, "b") == [] and not desired.read(Transaction(store), "b", "0" * 8, []).hold
    assert (web(store).node, web(store).left, web(store).moving) == ("a", (), "")
