"""A node is lost: it is fenced, its guests go elsewhere once, and it is used again when all they left is off there."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compute.cluster import desired, liveness, upkeep
from compute.cluster.controller import Controller
from compute.cluster.liveness import LEASE_S, LOST_S
from compute.cluster.quarantine import Quarantined
from compute.cluster.records import epochs
from compute.cluster.records.instances import Instance, finish_delete, leased
from compute.cluster.records.interfaces import Want
from compute.cluster.records.networks import Network, create_network
from compute.cluster.records.nodes import Node
from compute.cluster.records.snapshots import Snapshot
from compute.cluster.records.taken import Claims
from compute.cluster.records.transaction import Transaction, new_uuid, pieces, transact
from compute.cluster.reports import settle
from compute.cluster.scheduler import create_instance
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import Conflict, Stale
from compute.wire.codec import to_plain
from compute.wire.spec import (
    Capture,
    DiskSpec,
    InstanceSpec,
    InstanceState,
    InstanceStatus,
    Inventory,
    NodeFacts,
    Orphan,
    Power,
)
from tests.unit.compute.cluster.leases import lapse

IMAGE, BACKUP = "b3:" + 64 * "1", "b3:" + 64 * "2"
NODES = ("n1", "n2", "n3")


class Played:
    """Nodes that are silent for as long as a test says; those it does not name hold their lease."""

    def __init__(self, path: Path) -> None:
        self.store = SqliteStore(path)
        self.command: tuple[str, ...] = ()
        for number, name in enumerate(NODES):
            memory_mib = 2600 if name == "n1" else 4096
            facts = NodeFacts(cpus=16, memory_mib=memory_mib, address=f"10.9.9.{number + 1}")
            for made in (Node(uuid=new_uuid(), name=name, facts=to_plain(facts)), Claims(name=name)):
                transact(self.store, lambda txn, made=made: txn.create(made))
        self.controller = Controller(self.store, "0badcafe", Config(node_name="n1"))
        self.silent = self.controller.nodes.silent
        for name in NODES[1:]:
            self.controller.nodes.renew(name)

    def guest(self, name: str, node: str = "n2", *wants: Want, heard: bool = True, **changes: object) -> str:
        told = {
            "cpus": 1,
            "memory_mib": 512,
            "disks": (DiskSpec("vda", IMAGE),),
            "power_state": "on",
            **changes,
        }
        made = Instance(
            uuid=new_uuid(), name=name, namespace="system", node=node, state=InstanceState.CREATED, **told
        )  # type: ignore[arg-type]  # fmt: skip
        transact(
            self.store,
            lambda txn: create_instance(
                txn, made, wants, limits=Config(), usable=self.usable(), used=lambda node: None
            ),
        )
        if heard:
            self.say(made.uuid, node)
        return made.uuid

    def say(self, uuid: str, node: str, leased_s: float | None = None) -> None:
        leased_s = self.one(uuid).leased_s if leased_s is None else leased_s
        status = InstanceStatus(uuid, InstanceState.CREATED, "on", leased_s=leased_s)
        transact(self.store, lambda txn: settle(txn, node, status))

    def usable(self) -> dict[str, str]:
        return self.controller.nodes.usable()

    def one(self, uuid: str) -> Instance:
        return Transaction(self.store).get(Instance, uuid)

    def node(self, name: str) -> Node:
        return Transaction(self.store).get(Node, name)

    def lose(self, name: str, silent_s: float = LOST_S) -> None:
        """It has not renewed; upkeep sees it as missing for so long."""
        lease = self.store.get(f"alive/{name}")
        if lease is not None:
            lapse(self.store, int(lease.value))
        for s in (LOST_S / 2, LOST_S) if silent_s == LOST_S else (silent_s,):
            self.silent[name] = time.monotonic() - s
            self.look()

    def look(self) -> set[str]:
        """Returns the nodes whose power must go first."""
        kept = Config(restart_reserve=100.0, fence_command=self.command)  # what is kept is kept for them
        nodes, wanted = self.controller.nodes, set[str]()
        pieces(self.store, lambda txn: upkeep.bring_back(txn, nodes, kept, lambda node: None, wanted))
        return wanted

    def told(self, node: str) -> desired.NodeDesired:
        return desired.read(Transaction(self.store), node, "0" * 8, NODES)

    def back(self, name: str, *orphans: Orphan, fence: str | None = None) -> None:
        self.silent.pop(name, None)
        self.controller.nodes.renew(name)
        told = self.told(name)
        fence = told.fence if fence is None else fence
        seen = Inventory(f"m-{name}", told.epoch, 0, orphans, fence)
        asyncio.run(self.controller.inventory(name, seen))

    def events(self, uuid: str, kind: str = "instance") -> str:
        return " ".join(record.value.decode() for record in self.store.list(f"event/{kind}/{uuid}/"))


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    played = Played(tmp_path / "sf.db")
    yield played
    played.store.close()


def copy(uuid: str, power: str = "off") -> Orphan:
    return Orphan(uuid, power, InstanceSpec(uuid, "web", "system", 1, 512, ()))


def test_guests_with_restart_go_and_those_with_leave_stay_and_both_are_told(played: Played) -> None:
    web, db = played.guest("web", on_node_loss="restart"), played.guest("db")
    played.lose("n2")
    assert (played.one(web).node, played.one(db).node) == ("n3", "n2")
    assert played.one(web).arriving and played.one(web).heard_s == 0
    assert "n2 is lost" in played.events(web)
    assert "it stays there" in played.one(db).progress and played.events(db).count("is lost") == 1
    played.look()
    assert played.events(db).count("is lost") == 1
    assert played.node("n2").given == (web,)
    assert {c.name: c.cpus for c in Transaction(played.store).list(Claims)} == {"n1": 0, "n2": 1, "n3": 1}


def test_one_that_was_passing_to_a_node_goes_to_one_that_has_nothing_of_it(played: Played) -> None:
    """Of nodes with room that one is the best, and must first remove what had come."""
    web = played.guest("web", on_node_loss="restart")
    change = lambda txn: txn.update(replace(txn.get(Instance, web), moving="n3", passing="move"))  # noqa: E731
    transact(played.store, change)
    played.lose("n2")
    assert (played.one(web).node, played.one(web).left, played.one(web).passing) == ("n1", ("n3",), "")


def test_the_node_is_refused_by_all_others_before_its_guests_go(played: Played) -> None:
    web = played.guest("web", on_node_loss="restart")
    assert [p.node for p in played.told("n3").networks.peers] == ["n1", "n2"]
    played.lose("n2", LOST_S / 2)
    assert played.one(web).node == "n2"
    assert [p.node for p in played.told("n3").networks.peers] == ["n1"]
    assert played.told("n2").fence
    played.lose("n2", LOST_S)
    assert played.one(web).node == "n3"
    assert "refused" in played.events("n2", "node")


def test_a_fenced_node_routes_nothing_and_takes_nothing(played: Played) -> None:
    made = Network(uuid=new_uuid(), name="lan", namespace="system", netblock="10.0.0.0/24", vni=0)
    lan = transact(
        played.store, lambda txn: create_network(txn, made, excluded=(), router_nodes=["n2", "n3"])
    )
    played.guest("web", "n2", Want(lan.uuid), on_node_loss="restart")
    played.lose("n2", LOST_S / 2)
    transact(played.store, lambda txn: txn.update(replace(txn.get(Network, lan.uuid), router_node="n2")))
    assert {n.router_node for name in NODES for n in played.told(name).networks.networks} == {""}
    played.controller.nodes.renew("n2")
    assert "was lost" in played.usable()["n2"]
    transact(played.store, lambda txn: upkeep._move_routers(txn, played.controller.nodes))
    assert Transaction(played.store).get(Network, lan.uuid).router_node != "n2"


def test_a_node_that_answers_in_that_moment_keeps_its_guests(played: Played) -> None:
    """Its lease is part of the transaction: nothing is given by who saw it silent a moment ago."""
    web = played.guest("web", on_node_loss="restart")
    played.lose("n2", LOST_S / 2)
    txn = Transaction(played.store)
    played.silent["n2"] = time.monotonic() - LOST_S
    nodes = played.controller.nodes
    assert upkeep.bring_back(txn, nodes, Config(), lambda node: None, set()) and txn.writes
    played.controller.nodes.renew("n2")
    with pytest.raises(Stale):
        txn.commit()
    assert played.one(web).node == "n2"


def test_a_guest_whose_node_never_said_that_it_would_stop_it_stays(played: Played) -> None:
    """It was chosen while the node was cut off already, or the node's version knows nothing of it."""
    web = played.guest("web")
    change = lambda txn: txn.update(leased(txn, replace(txn.get(Instance, web), on_node_loss="restart")))  # noqa: E731
    transact(played.store, change)
    played.lose("n2")
    assert played.one(web).node == "n2" and "has not said" in played.one(web).progress
    played.back("n2")
    played.say(web, "n2", 0)
    played.lose("n2")
    assert played.one(web).node == "n2"
    played.back("n2")
    played.say(web, "n2")
    played.lose("n2")
    assert played.one(web).node == "n3"


def test_what_was_chosen_again_must_be_heard_again(played: Played) -> None:
    web = played.guest("web", on_node_loss="restart")
    heard_s = played.one(web).leased_s
    for word in ("leave", "restart"):
        change = lambda txn, w=word: txn.update(leased(txn, replace(txn.get(Instance, web), on_node_loss=w)))  # noqa: E731
        transact(played.store, change)
    played.say(web, "n2", heard_s)  # of the first time, late
    played.lose("n2")
    assert played.one(web).node == "n2"


def test_it_is_trusted_again_once_all_that_was_given_is_off_there(played: Played) -> None:
    web = played.guest("web", on_node_loss="restart")
    before = played.told("n2").fence
    played.lose("n2")
    assert played.told("n2").given == (web,)
    played.back("n2", fence=before)  # said before it was lost, and late
    assert played.node("n2").fence
    played.back("n2", copy(web, "on"))
    assert played.node("n2").fence and "was lost" in played.usable()["n2"]
    played.back("n2", copy(web))
    assert not played.node("n2").fence and played.usable()["n2"] == ""
    assert [p.node for p in played.told("n3").networks.peers] == ["n1", "n2"]
    assert f"kept, off: {web}" in played.events("n2", "node")
    assert Transaction(played.store).get(Quarantined, web).node == "n2"
    assert "on n3 by now" in played.events("n2", "node")


def test_what_it_says_of_its_former_guests_changes_nothing(played: Played) -> None:
    web = played.guest("web", on_node_loss="restart")
    played.lose("n2")
    before = played.one(web)
    played.say(web, "n2")
    assert played.one(web) == before


def test_a_guest_never_goes_where_an_old_copy_of_it_is(played: Played) -> None:
    web = played.guest("web", on_node_loss="restart", memory_mib=3000)
    other = played.guest("other", "n1", memory_mib=1000)
    played.lose("n2")
    played.say(web, "n3")
    played.back("n2", copy(web))
    played.lose("n3")
    assert played.one(web).node == "n3"
    assert "old copy" in played.one(web).progress
    transact(
        played.store, lambda txn: txn.update(replace(txn.get(Instance, other), state=InstanceState.ERROR))
    )
    played.back("n2")  # what it had is deleted
    played.look()
    assert played.one(web).node == "n2"


def test_nor_where_one_is_whose_node_was_removed_and_joined_anew(played: Played) -> None:
    """Its disks would be those of before: a record that is there is taken up."""
    web = played.guest("web", on_node_loss="restart", memory_mib=3000)
    played.lose("n2")
    played.say(web, "n3")
    fresh = Node(uuid=new_uuid(), name="n2", facts=played.node("n2").facts)
    transact(played.store, lambda txn: txn.update(replace(fresh, revision=txn.get(Node, "n2").revision)))
    played.back("n2", copy(web))
    played.lose("n3")
    assert played.one(web).node == "n3" and "old copy" in played.one(web).progress
    played.back("n2")  # what it had is deleted
    played.look()
    assert played.one(web).node == "n2"


def test_without_room_it_waits_says_so_and_goes_when_there_is_some(played: Played) -> None:
    uuids = [played.guest(f"g{n}", on_node_loss="restart", memory_mib=1000, order=9 - n) for n in range(2)]
    full = [played.guest(f"full{n}", f"n{n}", memory_mib=m) for n, m in ((1, 1200), (3, 2700))]
    played.lose("n2")
    assert [played.one(uuid).node for uuid in uuids] == ["n2", "n2"]
    assert "memory free" in played.one(uuids[0]).progress
    transact(played.store, lambda txn: finish_delete(txn, txn.get(Instance, full[0])))
    played.look()
    assert sorted(played.one(uuid).node for uuid in uuids) == ["n1", "n1"]


def test_restore_gives_the_newest_backup_and_without_one_it_stays(played: Played) -> None:
    db, new = (played.guest(name, on_node_loss="restore") for name in ("db", "new"))
    for number, (backup, state) in enumerate([(True, "created"), (False, "created"), (True, "error")]):
        digest = BACKUP if (backup, state) == (True, "created") else IMAGE[:-1] + "9"
        made = Snapshot(
            uuid=new_uuid(), instance_uuid=db, instance="db", namespace="shop", tag=f"2026010{number}-000000",
            state=state, order=Capture(new_uuid(), digests={"vda": digest}), backup=backup,
        )  # fmt: skip
        transact(played.store, lambda txn, made=made: txn.create(made))
    played.lose("n2")
    (disk,) = played.one(db).disks
    assert (played.one(db).node, disk.image, disk.store) == ("n3", BACKUP, "shop")
    assert disk.image_name == "its backup of 20260100-000000"
    assert played.one(new).node == "n2" and "no backup" in played.one(new).progress


@pytest.mark.parametrize(
    "changes", [{"power": Power.OFF}, {"power_state": "off"}, {"power_state": "crashed"}]
)
def test_a_guest_that_is_off_keeps_its_disk(played: Played, changes: dict[str, object]) -> None:
    web = played.guest("web", on_node_loss="restart")
    transact(played.store, lambda txn: txn.update(replace(txn.get(Instance, web), **changes)))  # type: ignore[arg-type]
    played.lose("n2")
    assert played.one(web).node == "n2" and "it is off" in played.one(web).progress


def test_nothing_is_given_while_the_state_may_be_older_than_the_guests(played: Played) -> None:
    web = played.guest("web", on_node_loss="restart")
    transact(played.store, lambda txn: epochs.begin(txn, ["n3"], "for a test"))
    played.lose("n2")
    assert played.one(web).node == "n2"
    transact(played.store, lambda txn: epochs.heard(txn, "n3"))
    played.lose("n2")
    assert played.one(web).node == "n3"


def test_a_guest_on_a_bridge_cannot_be_given_away(played: Played) -> None:
    made = Network(
        uuid=new_uuid(), name="home", namespace="system", netblock="", vni=0, bridge="br0", router_node=""
    )  # fmt: skip
    home = transact(played.store, lambda txn: create_network(txn, made, excluded=(), router_nodes=[]))
    with pytest.raises(Conflict, match="nobody refuses"):
        played.guest("web", "n2", Want(home.uuid), on_node_loss="restart")
    tv = played.guest("tv", "n2", Want(home.uuid))
    with pytest.raises(Conflict, match="nobody refuses"):
        transact(
            played.store, lambda txn: leased(txn, replace(txn.get(Instance, tv), on_node_loss="restore"))
        )


def test_many_guests_of_a_node_that_is_gone_for_good_cost_no_transaction(played: Played) -> None:
    """Those that stay were told: the next look writes nothing, and ends."""
    for n in range(120):
        played.guest(f"g{n}", memory_mib=16, cpus=1, on_node_loss="leave")
    played.lose("n2")
    before = played.store.revision()
    played.look()
    assert played.store.revision() == before


def test_a_lease_that_came_and_went_while_nobody_looked_counts(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upkeep stood still for longer than a lease lasts: a silent node may have had one since, and guests under it."""
    now_s = time.monotonic()
    monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: now_s, time=time.time))
    nodes, lease = played.controller.nodes, played.store.get("alive/n2")
    assert lease is not None
    lapse(played.store, int(lease.value))
    began_s = now_s
    for pause_s, since_s in ((0, 0), (LEASE_S - 1, 0), (LEASE_S - 1, 0), (LEASE_S + 1, 35.0), (1, 35.0)):
        now_s += pause_s
        transact(played.store, nodes.note)
        assert nodes.silent == {"n2": pytest.approx(began_s + since_s)}


def test_what_was_renewed_while_the_state_was_slow_to_answer_counts(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease that was gained after the state was read, and ended before it is read again, was seen by nobody."""
    now_s, nodes, among = time.monotonic(), played.controller.nodes, liveness.Liveness.among
    monkeypatch.setattr(liveness, "time", SimpleNamespace(monotonic=lambda: now_s, time=time.time))

    def slow(*args: Any) -> list[str]:
        nonlocal now_s
        found, now_s = among(*args), now_s + 5
        return found

    monkeypatch.setattr(liveness.Liveness, "among", slow)
    lease = played.store.get("alive/n2")
    assert lease is not None
    lapse(played.store, int(lease.value))
    began_s = now_s
    transact(played.store, nodes.note)
    assert nodes.silent == {"n2": pytest.approx(began_s + 5)}
    now_s = began_s + LEASE_S - 1  # it is read at that moment, and the answer is there 5 s later
    transact(played.store, nodes.note)
    assert nodes.silent == {"n2": pytest.approx(began_s + LEASE_S + 4)}


def test_a_node_that_answers_while_the_guests_of_many_are_given_keeps_its_own_for_as_long_as_their_lease(
    played: Played,
) -> None:
    """Between two transactions, of which there may be hundreds; its next silence is another."""
    web = played.guest("web", on_node_loss="restart")
    played.lose("n2", LOST_S / 2)
    played.silent["n2"] = time.monotonic() - LOST_S
    played.controller.nodes.renew("n2")
    played.look()
    lease = played.store.get("alive/n2")
    assert lease is not None
    lapse(played.store, int(lease.value))
    played.look()
    assert played.one(web).node == "n2"
