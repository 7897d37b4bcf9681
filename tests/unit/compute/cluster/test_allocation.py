"""Instances, networks and addresses in transactions: any order of calls, any failure, no leak and nothing twice."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from compute.cluster.records import interfaces
from compute.cluster.records.addresses import Ipam, ensure_floating
from compute.cluster.records.instances import (
    Instance,
    add_interface,
    delete_instance,
    finish_delete,
    interfaces_of,
    rehome,
    remove_interface,
)
from compute.cluster.records.interfaces import (
    Interface,
    Want,
    float_interface,
    interfaces_on,
)
from compute.cluster.records.networks import Network, create_network, delete_network, route, unroute
from compute.cluster.records.nodes import Node, move_routers
from compute.cluster.records.taken import Claims
from compute.cluster.records.transaction import Transaction, new_uuid, transact
from compute.cluster.scheduler import create_instance, set_instance
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import ComputeError, Unavailable
from compute.wire.spec import DiskSpec, InstanceState
from net.errors import NetError
from tests import invariants

NODES = ("n1", "n2")
LIMITS = Config(cpu_ratio=2, memory_reserve_mib=0)
SEEN: Any = {"limits": LIMITS, "usable": dict.fromkeys(NODES, ""), "used": lambda _: None}
REFUSALS = (ComputeError, NetError)


def prepare(store: Any) -> None:
    def action(txn: Transaction) -> None:
        ensure_floating(txn, IPv4Network("192.0.2.0/29"))
        for name in NODES:
            txn.create(
                Node(
                    uuid=new_uuid(), name=name, facts={"cpus": 4, "memory_mib": 1024, "disk_bytes": 10 << 30}
                )
            )
            txn.create(Claims(name=name))

    transact(store, action)


def network(name: str, netblock: str = "10.0.0.0/29") -> Network:
    return Network(uuid=new_uuid(), name=name, namespace="system", netblock=netblock, vni=0)


def make_network(store: Any, name: str) -> Network:
    return transact(store, lambda txn: create_network(txn, network(name), excluded=(), router_nodes=NODES))


def make_instance(store: Any, name: str, wants: Sequence[Want], memory_mib: int = 128) -> Instance:
    disks = (DiskSpec("vda", size_bytes=2**30),)
    instance = Instance(
        uuid=new_uuid(), name=name, namespace="system", node="", cpus=1, memory_mib=memory_mib, disks=disks
    )
    usable: Mapping[str, str] = dict.fromkeys(NODES, "")
    return transact(
        store,
        lambda txn: create_instance(txn, instance, wants, limits=LIMITS, usable=usable, used=lambda _: None),
    )


class Cluster(RuleBasedStateMachine):
    """Everything the API can ask for, in any order; what is refused changes nothing."""

    networks = Bundle("networks")
    instances = Bundle("instances")

    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory()
        self.store = SqliteStore(Path(self.directory.name) / "sf.db")
        prepare(self.store)

    def teardown(self) -> None:
        self.store.close()
        self.directory.cleanup()

    def refusable(self, action: Any) -> Any:
        before = self.store.revision()
        try:
            return transact(self.store, action)
        except REFUSALS:
            assert self.store.revision() == before
            return None

    @rule(target=networks, name=st.sampled_from("abc"))
    def create_network(self, name: str) -> str:
        made = self.refusable(lambda txn: create_network(txn, network(name), excluded=(), router_nodes=NODES))
        return made.uuid if made else ""

    @rule(uuid=networks)
    def delete_network(self, uuid: str) -> None:
        self.refusable(lambda txn: delete_network(txn, uuid))

    @rule(
        target=instances,
        name=st.sampled_from("pqrs"),
        on=st.lists(networks, max_size=2),
        address=st.sampled_from(["", "", "10.0.0.2", "10.0.0.1", "10.0.0.7", "10.9.9.9"]),
        floating=st.booleans(),
        memory_mib=st.sampled_from([16, 512]),
    )
    def create_instance(self, name: str, on: list[str], address: str, floating: bool, memory_mib: int) -> str:
        before = self.store.revision()
        try:
            wants = [Want(uuid, address, float=floating) for uuid in on]
            return make_instance(self.store, name, wants, memory_mib).uuid
        except REFUSALS:
            assert self.store.revision() == before
            return ""

    @rule(uuid=instances)
    def ask_to_delete(self, uuid: str) -> None:
        self.refusable(lambda txn: delete_instance(txn, uuid))

    @rule(uuid=consumes(instances))
    def finish(self, uuid: str) -> None:
        def action(txn: Transaction) -> None:
            found = txn.get(Instance, uuid)
            if found.state != InstanceState.DELETED:
                finish_delete(txn, found)

        self.refusable(action)

    @rule(uuid=instances)
    def start(self, uuid: str) -> None:
        if uuid and Transaction(self.store).get(Instance, uuid).state == InstanceState.INITIAL:
            start(self.store, uuid)

    @rule(uuid=instances, gib=st.integers(1, 30), memory_mib=st.sampled_from([16, 512]))
    def grow(self, uuid: str, gib: int, memory_mib: int) -> None:
        changes = {"disks": {"vda": gib}, "memory_mib": memory_mib}
        self.refusable(lambda txn: set_instance(txn, uuid, changes, **SEEN))

    @rule(uuid=instances, to=st.sampled_from(NODES))
    def move(self, uuid: str, to: str) -> None:
        self.refusable(lambda txn: rehome(txn, uuid, to, "asked"))

    @rule(node=st.sampled_from(NODES))
    def forget_what_disks_hold(self, node: str) -> None:
        """As a version that does not count them does when it writes these records."""
        transact(self.store, lambda txn: txn.update(replace(txn.get(Claims, node), disk_bytes=None)))

    @rule(uuid=instances, on=networks, floating=st.booleans())
    def plug(self, uuid: str, on: str, floating: bool) -> None:
        self.refusable(lambda txn: add_interface(txn, uuid, Want(on, float=floating)))

    @rule(uuid=instances, last=st.booleans())
    def unplug_or_float(self, uuid: str, last: bool) -> None:
        held = interfaces_of(Transaction(self.store), uuid)
        if held and last:
            self.refusable(lambda txn: remove_interface(txn, txn.get(Interface, held[-1].uuid)))
        elif held:
            self.refusable(lambda txn: float_interface(txn, held[0].uuid, on=not held[0].floating))

    @rule(
        uuid=instances,
        ports=st.sampled_from(
            ["8080:80", "8080-8082:90-92", "8082:1/udp", "4789:1/udp", "80:80", "9000-9300:1"]
        ),
        admin=st.booleans(),
    )
    def publish(self, uuid: str, ports: str, admin: bool) -> None:
        held = next(iter(interfaces_of(Transaction(self.store), uuid)), None)
        if held is None:
            return
        wanted, listening = interfaces.parse_published(ports), [("tcp", 8082)]
        made = self.refusable(
            lambda txn: interfaces.publish(txn, held.uuid, wanted, listening=listening, admin=admin)
        )
        assert not made or ports in ("8080:80", "8082:1/udp") or (ports == "80:80" and admin)
        if held.published:
            self.refusable(lambda txn: interfaces.unpublish(txn, held.uuid, held.published[0]))

    @rule(uuid=networks, hop=st.sampled_from(["10.0.0.3", "10.1.0.1"]))
    def route(self, uuid: str, hop: str) -> None:
        self.refusable(lambda txn: route(txn, uuid, hop))
        for found in Transaction(self.store).list(Network):
            if len(found.routed) > 1:
                self.refusable(lambda txn, f=found: unroute(txn, f.uuid, next(iter(f.routed))))

    @rule(away=st.sampled_from(NODES))
    def move_routers(self, away: str) -> None:
        self.refusable(lambda txn: move_routers(txn, away, NODES))
        assert away not in {n.router_node for n in Transaction(self.store).list(Network)}

    @invariant()
    def holds(self) -> None:
        invariants.check(self.store)


TestCluster = Cluster.TestCase


class FailsAt(SqliteStore):
    """Refuses the commit number `at`."""

    at = 0

    def commit(self, *args: Any, **named: Any) -> int:
        self.at -= 1
        if self.at == 0:
            raise Unavailable("the disk is full")
        return super().commit(*args, **named)


def start(store: Any, uuid: str) -> None:
    """What a report of the agent does."""
    transact(store, lambda txn: txn.update(replace(txn.get(Instance, uuid), state=InstanceState.CREATED)))


def test_a_commit_that_fails_at_any_step_leaves_no_trace_and_the_rest_can_go_on(tmp_path: Path) -> None:
    for step in range(1, 6):
        store = FailsAt(tmp_path / f"{step}.db")
        prepare(store)
        store.at = step
        failures = 0
        for _ in range(2):
            try:
                found = Transaction(store).list(Network)
                lan = found[0] if found else make_network(store, "lan")
                made = Transaction(store).list(Instance)
                web = made[0] if made else make_instance(store, "web", [Want(lan.uuid, float=True)])
                start(store, web.uuid)
                want = Want(lan.uuid)
                transact(store, lambda txn, u=web.uuid, w=want: add_interface(txn, u, w))  # type: ignore[misc]
            except Unavailable:
                failures += 1
            invariants.check(store)
        assert failures == 1
        for one in Transaction(store).list(Instance):
            transact(store, lambda txn, u=one.uuid: finish_delete(txn, txn.get(Instance, u)))  # type: ignore[misc]
        for one in Transaction(store).list(Network):
            transact(store, lambda txn, u=one.uuid: delete_network(txn, u))  # type: ignore[misc]
        invariants.check(store)
        assert store.list("interface/") == store.list("taken/") == []
        store.close()


def test_an_instance_that_is_being_created_cannot_be_given_more_interfaces(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "sf.db")
    prepare(store)
    lan = make_network(store, "lan")
    web = make_instance(store, "web", [])
    with pytest.raises(ComputeError, match="initial"):
        transact(store, lambda txn: add_interface(txn, web.uuid, Want(lan.uuid)))
    assert interfaces_on(Transaction(store), lan.uuid) == []
    assert Transaction(store).get(Ipam, lan.uuid).pool.held == {}
    store.close()
