"""The server's side of guests that no record knows, and of a database that was put back."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from compute.cluster import quarantine
from compute.cluster.controller import Controller
from compute.cluster.quarantine import Quarantined
from compute.cluster.records import epochs
from compute.cluster.records.addresses import Ipam
from compute.cluster.records.epochs import epoch
from compute.cluster.records.instances import Instance, finish_delete
from compute.cluster.records.interfaces import Interface, Want, attach
from compute.cluster.records.networks import Network, create_network, find_network
from compute.cluster.records.nodes import Node
from compute.cluster.records.taken import Claims, Taken
from compute.cluster.records.transaction import Transaction, new_uuid, transact
from compute.cluster.reports import settle
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import Conflict, Invalid, NotFound, Unavailable
from compute.wire.spec import (
    DiskSpec,
    InstanceSpec,
    InstanceState,
    InstanceStatus,
    InterfaceSpec,
    Inventory,
    Orphan,
)
from net import Network as NetNetwork
from net.ipam import UNKNOWN
from tests import invariants

BLOCK = IPv4Network("10.0.0.0/28")
LAN = NetNetwork("aaaaaaaa-0000-4000-8000-000000000001", 77, "lan", BLOCK, BLOCK[1])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "sf.db")
    yield store
    store.close()


def started(store: SqliteStore, name: str = "n1", seen: Inventory | None = None) -> Controller:
    controller = Controller(store, "0badcafe", Config(node_name=name))
    asyncio.run(controller.start(seen or Inventory("m1", "", 0)))
    controller.feed.stop()
    return controller


def orphan(address: str = "10.0.0.2", network: str = LAN.uuid, **changes: object) -> Orphan:
    uuid = new_uuid()
    nic = InterfaceSpec(new_uuid(), network, f"02:00:00:00:00:{uuid[:2]}", address)
    spec = InstanceSpec(uuid, "web", "system", 1, 32, (DiskSpec("vda", size_bytes=1 << 30),), (nic,))
    return replace(Orphan(uuid, "on", spec, (LAN,)), **changes)  # type: ignore[arg-type]


def network(store: SqliteStore) -> Network:
    made = Network(uuid=new_uuid(), name="lan", namespace="system", netblock=str(BLOCK), vni=0)
    return transact(store, lambda txn: create_network(txn, made, excluded=(), router_nodes=["n1"]))


def note(store: SqliteStore, *orphans: Orphan, node: str = "n1") -> None:
    transact(store, lambda txn: quarantine.note(txn, node, orphans))


def test_addresses_and_vnis_of_a_guest_without_a_record_count_as_taken(store: SqliteStore) -> None:
    """A3."""
    started(store)
    lan, guest = network(store), orphan()
    here = orphan(network=lan.uuid, networks=())
    note(store, guest, here)
    assert Transaction(store).get(Taken, "vni/77").owner == LAN.uuid
    given = transact(store, lambda txn: attach(txn, lan, "i", "system", 0, Want(lan.uuid)))
    assert given.address == "10.0.0.3"
    assert any("is in no record" in e.value.decode() for e in store.list("event/node/n1/"))
    note(store)
    assert Transaction(store).find(Taken, "vni/77") is None
    assert list(Transaction(store).get(Ipam, lan.uuid).pool.held.values()) == [given.uuid]


def test_what_everybody_may_read_of_a_node_does_not_say_who_else_is_there(
    store: SqliteStore, caplog: pytest.LogCaptureFixture
) -> None:
    started(store)
    guest = orphan()
    assert guest.spec is not None
    note(store, replace(guest, spec=replace(guest.spec, namespace="shop", name="till")))
    said = [e.value.decode() for e in store.list("event/node/n1/")]
    assert any(f"guest {guest.uuid} is in no record" in each for each in said)
    assert not any("shop" in each or "till" in each for each in said) and "shop/till" in caplog.text


def test_an_address_that_another_has_stays_that_ones(store: SqliteStore) -> None:
    started(store)
    lan = network(store)
    given = transact(store, lambda txn: attach(txn, lan, "i", "system", 0, Want(lan.uuid)))
    guest = orphan(given.address, lan.uuid, networks=())
    note(store, guest)
    assert list(Transaction(store).get(Ipam, lan.uuid).pool.held.values()) == [given.uuid]
    with pytest.raises(Exception, match="in use"):
        transact(store, lambda txn: quarantine.adopt(txn, guest.uuid))
    note(store)
    assert list(Transaction(store).get(Ipam, lan.uuid).pool.held.values()) == [given.uuid]


def test_adoption_makes_all_records_and_leaves_nothing_of_the_quarantine(store: SqliteStore) -> None:
    """A3."""
    started(store)
    transact(store, lambda txn: txn.update(replace(txn.get(Claims, "n1"), disk_bytes=0)))
    first, second = orphan("10.0.0.2"), orphan("10.0.0.3")
    note(store, first, second)
    made = transact(store, lambda txn: quarantine.adopt(txn, first.uuid))
    assert (made.name, made.state, made.power_state) == ("web", InstanceState.CREATED, "on")
    again = transact(store, lambda txn: quarantine.adopt(txn, second.uuid))
    assert again.name == f"web-{second.uuid[:8]}"
    found = find_network(Transaction(store), LAN.uuid)
    assert (found.vni, found.netblock, found.router_node) == (77, str(BLOCK), "n1")
    invariants.check(store)
    note(store)
    invariants.check(store)
    with pytest.raises(NotFound):
        transact(store, lambda txn: quarantine.adopt(txn, first.uuid))
    transact(store, lambda txn: finish_delete(txn, txn.get(Instance, first.uuid)))
    transact(store, lambda txn: finish_delete(txn, txn.get(Instance, second.uuid)))
    invariants.check(store)


def test_a_deletion_that_was_ordered_stays_until_the_node_has_confirmed_it(store: SqliteStore) -> None:
    """A3."""
    controller = started(store)
    guest = orphan()
    note(store, guest)
    transact(store, lambda txn: quarantine.order_deletion(txn, guest.uuid))
    note(store)  # its node knows it now: as one to be deleted
    (wanted,) = asyncio.run(controller.desired("n1")).instances
    assert (wanted.uuid, wanted.delete) == (guest.uuid, True)
    transact(store, lambda txn: settle(txn, "n1", InstanceStatus(guest.uuid, InstanceState.DELETED)))
    assert Transaction(store).list(Quarantined) == []
    assert Transaction(store).find(Taken, "vni/77") is None


def test_of_two_copies_on_two_nodes_that_alone_goes_which_was_ordered_away(store: SqliteStore) -> None:
    """A guest that was given away twice left one on each; the administrator saw the one of n2."""
    started(store)
    transact(store, lambda txn: txn.create(Node(uuid=new_uuid(), name="n2", identity="x")))
    guest = orphan()
    note(store, guest, node="n1")
    note(store, guest, node="n2")
    transact(store, lambda txn: quarantine.order_deletion(txn, guest.uuid))
    note(store, guest, node="n1")  # its agent has just started
    ordered = Transaction(store).get(Quarantined, guest.uuid)
    assert (ordered.node, ordered.delete) == ("n2", True)
    transact(store, lambda txn: settle(txn, "n2", InstanceStatus(guest.uuid, InstanceState.DELETED)))
    note(store, guest, node="n1")
    kept = Transaction(store).get(Quarantined, guest.uuid)
    assert (kept.node, kept.delete) == ("n1", False)


def test_nobody_knows_what_it_was_made_from(store: SqliteStore) -> None:
    started(store)
    guest = orphan(spec=None, networks=())
    note(store, guest)
    with pytest.raises(Conflict, match="nobody knows"):
        transact(store, lambda txn: quarantine.adopt(txn, guest.uuid))


def refused(store: SqliteStore) -> bool:
    try:
        epochs.check(Transaction(store))
    except Unavailable as err:
        assert "sf node remove" in err.hint
        return True
    return False


@pytest.mark.parametrize(("epoch_", "more"), [("", 0), ("same", 0), ("same", 1000), ("lost", 0)])
def test_a_new_epoch_begins_for_a_state_that_lacks_what_a_node_saw(
    store: SqliteStore, epoch_: str, more: int
) -> None:
    """A4: nothing begins until every node has said what runs there."""
    started(store)
    first = epoch(Transaction(store)).number
    transact(store, lambda txn: txn.create(Node(uuid=new_uuid(), name="n2", identity="x", machine="m2")))
    transact(store, lambda txn: txn.create(Claims(name="n2")))
    saw = Inventory("m1", first if epoch_ == "same" else epoch_, store.revision() + more if epoch_ else 0)
    controller = started(store, seen=saw)
    begins = bool(more) or epoch_ == "lost"
    now = epoch(Transaction(store))
    assert (now.number != first, refused(store)) == (begins, begins)
    if begins:
        assert now.waiting == ("n1", "n2") and saw.epoch in now.former and first in now.former
        with pytest.raises(Unavailable, match="n1, n2"):
            network(store)
        hold = asyncio.run(controller.desired("n2"))
        assert hold.hold and hold.epoch == now.number
        asyncio.run(controller.inventory("n2", Inventory("m2", first, 1)))  # it has not heard of the new one
        assert epoch(Transaction(store)).waiting == ("n1", "n2")
        asyncio.run(controller.inventory("n2", Inventory("m2", now.number, 1, (orphan(),))))
        asyncio.run(controller.inventory("n1", Inventory("m1", now.number, 1)))
        assert not refused(store) and not asyncio.run(controller.desired("n2")).hold
        network(store)


def test_a_node_that_claims_anothers_interface_frees_nobodys_address(store: SqliteStore) -> None:
    started(store)
    lan = network(store)
    given = transact(store, lambda txn: attach(txn, lan, "i", "system", 0, Want(lan.uuid)))
    liar = orphan(given.address, lan.uuid, networks=())
    assert liar.spec
    nic = replace(liar.spec.interfaces[0], uuid=given.uuid)
    note(store, replace(liar, spec=replace(liar.spec, interfaces=(nic,))))
    note(store)
    assert list(Transaction(store).get(Ipam, lan.uuid).pool.held.values()) == [given.uuid]


def test_what_a_guest_on_a_removed_node_held_is_free_when_it_is_deleted(store: SqliteStore) -> None:
    """A3: the record stays for the node, should it come back."""
    started(store)
    lan = network(store)
    transact(store, lambda txn: txn.create(Node(uuid=new_uuid(), name="n2", identity="x", state="deleted")))
    guest = orphan(network=lan.uuid, networks=())
    note(store, guest, node="n2")
    with pytest.raises(Conflict, match="n2 was removed"):  # and what is placed there nobody could delete
        transact(store, lambda txn: quarantine.adopt(txn, guest.uuid))
    transact(store, lambda txn: quarantine.order_deletion(txn, guest.uuid))
    assert Transaction(store).get(Ipam, lan.uuid).pool.held == {}
    assert Transaction(store).get(Quarantined, guest.uuid).delete


def test_the_networks_of_guests_without_a_record_come_with_everybodys_ports(store: SqliteStore) -> None:
    """A3: or a clash of addresses across nodes would not be seen."""
    controller = started(store)
    transact(store, lambda txn: txn.create(Node(uuid=new_uuid(), name="n2", identity="x")))
    lan = network(store)
    assert asyncio.run(controller.desired("n2")).networks.networks == ()
    note(store, orphan(network=lan.uuid, networks=()), node="n2")
    assert [n.uuid for n in asyncio.run(controller.desired("n2")).networks.networks] == [lan.uuid]


def test_a_node_that_claims_the_impossible_is_refused(store: SqliteStore) -> None:
    controller = started(store)
    with pytest.raises(Invalid):
        asyncio.run(controller.inventory("n1", Inventory("m1", "e", 1, tuple(orphan() for _ in range(4097)))))
    with pytest.raises(Invalid, match="IPv4"):
        lan = network(store)
        note(store, orphan("x", lan.uuid))
    assert Transaction(store).list(Quarantined) == []


def test_a_far_node_that_saw_more_begins_one_too(store: SqliteStore) -> None:
    """A4."""
    controller = started(store)
    transact(store, lambda txn: txn.create(Node(uuid=new_uuid(), name="n2", identity="x")))
    number = epoch(Transaction(store)).number
    asyncio.run(controller.inventory("n2", Inventory("m2", number, 10**6)))
    assert refused(store)
    with pytest.raises(Conflict, match="another state directory"):
        asyncio.run(controller.inventory("n2", Inventory("copy", number, 1)))


def test_the_same_machine_under_another_name_is_the_same_node(store: SqliteStore) -> None:
    """A2: another name made another node, and everything on the first was removed.

    Its guests then followed the name, all at once: with as many as here the server did not start any more.
    """
    started(store)
    lan = network(store)
    for number in range(120):
        made = Instance(
            uuid=f"i{number}", name="w", namespace="system", node="n1", cpus=1, memory_mib=32, disks=()
        )
        transact(store, lambda txn, made=made: txn.create(made))  # type: ignore[misc]
    controller = started(store, "renamed")
    read = Transaction(store)
    assert [(n.name, n.machine) for n in read.list(Node)] == [("n1", "m1")]
    assert [c.name for c in read.list(Claims)] == ["n1"]
    assert {i.node for i in read.list(Instance)} == {read.get(Network, lan.uuid).router_node} == {"n1"}
    assert controller.server == "n1"


def test_a_state_of_0_1_is_adopted_by_the_server_under_any_name(store: SqliteStore) -> None:
    """A2: upgraded on read."""
    transact(store, lambda txn: txn.create(Node(uuid=new_uuid(), name="old")))
    transact(store, lambda txn: txn.create(Claims(name="old")))
    transact(store, lambda txn: txn.create(Node(uuid=new_uuid(), name="far", identity="x")))
    started(store, "new")
    assert {n.name: n.machine for n in Transaction(store).list(Node)} == {"old": "m1", "far": ""}


def test_a_name_that_another_node_has_stays_that_nodes(store: SqliteStore) -> None:
    started(store)
    transact(store, lambda txn: txn.create(Node(uuid=new_uuid(), name="n2", identity="x")))
    assert started(store, "n2").server == "n1"


def test_a_guest_of_ipv6_alone_keeps_its_address_when_it_is_adopted(store: SqliteStore) -> None:
    started(store)
    six = replace(LAN, netblock=UNKNOWN, gateway=UNKNOWN[1], netblock6=IPv6Network("fd42::/64"), slaac=True)
    guest = orphan("0.0.0.9", networks=(six,))
    note(store, guest)
    transact(store, lambda txn: quarantine.adopt(txn, guest.uuid))
    (interface,) = Transaction(store).list(Interface)
    assert (interface.address, interface.address6, interface.known) == ("0.0.0.9", "fd42::9", "fd42::9")
    found = find_network(Transaction(store), LAN.uuid)
    assert found.six_alone and found.slaac and found.netblock6 == "fd42::/64"
    invariants.check(store)
