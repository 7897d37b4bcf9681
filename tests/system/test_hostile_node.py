"""A machine that joined and then says what it likes: it may harm what runs on it, and nothing else."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from compute.cluster.records.epochs import Epoch, epoch
from compute.cluster.records.nodes import Node
from compute.cluster.records.transaction import Transaction, transact
from compute.wire.codec import to_plain
from compute.wire.spec import InstanceState, InstanceStatus, Inventory, NodeEvent, NodeFacts, Orphan
from tests import invariants
from tests.api_server import Running
from tests.system.test_api_agents import FarAgent, address, joined, server

__all__ = ["address", "server"]


@pytest.fixture
def node(server: Running, address: tuple[str, int]) -> Iterator[FarAgent]:
    yield joined(server, address)


GOOD = to_plain(NodeFacts(cpus=8, memory_mib=16384, address="192.0.2.2", mtu_bytes=1400))


@pytest.mark.parametrize(
    "wrong",
    [
        {"address": "x"},
        {"address": "192.0.2.2/24"},
        {"address": "::1"},
        {"address": "0.0.0.0"},
        {"address": 7},
        {"mtu_bytes": 0},
        {"mtu_bytes": -1450},
        {"mtu_bytes": 68},
        {"mtu_bytes": 10**30},
        {"mtu_bytes": "wide"},
        {"cpus": 0},
        {"cpus": 10**9},
        {"memory_mib": -5},
        {"memory_mib": 10**15},
        {"images": ["x"]},
        {"images": "b3:"},
        {"stores": ["s" * 5000]},
        {"stores": [1]},
        {"peer_address": "192.0.2.9:13002"},
        {"peer_address": "192.0.2.2:99999999999"},
        {"peer_address": "192.0.2.2:13002 and more"},
        {"release": "r" * 10**5},
    ],
    ids=str,
)
def test_facts_that_no_machine_has_are_refused_and_change_nothing(
    server: Running, node: FarAgent, wrong: dict[str, Any]
) -> None:
    """E1: {"address": "x"} ended the server; E2: odd MTUs did"""
    before = server.get("/nodes/node2")
    assert node.call("POST", "register", {"facts": GOOD | wrong})[0] == 400
    after = server.get("/nodes/node2")
    assert {**after, "lastseen": 0} == {**before, "lastseen": 0}
    assert server.instance("web").status == 200


def test_the_address_of_another_node_is_refused(server: Running, address: tuple[str, int]) -> None:
    """E1"""
    joined(server, address)
    token = server.call("POST", "/nodes/token").body["token"]
    third = FarAgent(address, token, "node3")
    assert third.join()[0] == 200
    status, answer = third.call("POST", "register", {"facts": GOOD})
    assert (status, answer["error"]) == (409, "192.0.2.2 is the address of node node2")


def test_a_server_that_kept_nonsense_of_a_node_starts_and_the_node_can_be_removed(
    server: Running, node: FarAgent
) -> None:
    """E1, E2: as version 0.1 stored it"""
    server.network()
    for facts in (
        {"address": "x"},
        {"mtu_bytes": "x"},
        {"cpus": "many"},
        {"images": 5},
        {"stores": {"a": 1}},
    ):

        def spoil(txn: Transaction, facts: Any = facts) -> None:
            txn.update(replace(txn.get(Node, "node2"), facts=GOOD | facts))

        transact(server.services.store, spoil)
        name = f"web{'-'.join(facts).replace('_', '-')}"
        uuid = server.instance(name, "lan").body["uuid"]
        assert server.wait_for(f"/instances/{uuid}", "created")["node"] == "node1"
        assert server.get("/nodes/node2")["state"] == "created"
    assert server.call("DELETE", "/nodes/node2").status == 200


def test_a_node_writes_into_its_own_history_and_its_guests_alone(server: Running, node: FarAgent) -> None:
    """E3"""
    network = server.network()
    foreign = server.instance("foreign", placed_on="node1").body["uuid"]
    own = server.instance("own", placed_on="node2").body["uuid"]
    now = time.time()
    events = [
        NodeEvent(kind, uuid, now, "status", "forged")
        for kind, uuid in (
            ("instance", foreign),
            ("instance", "nobody"),
            ("network", network["uuid"]),
            ("node", "node1"),
            ("namespace", "system"),
            ("artifact", "../instance"),
        )
    ]
    odd = {"type": "audit", "node": "node1", "message": "x"}
    events += [
        NodeEvent("node", "node2", now, "status", "its own"),
        NodeEvent("instance", own, now, "status", "w" * 10**5, extra=odd),
        NodeEvent("instance", own, now + 10**7, "status", "from the future"),
        NodeEvent("instance", own, -1e18, "status", "from the past"),
        NodeEvent("instance", own, now, "status", "heavy", extra={"x": "y" * 10**5}),
        NodeEvent("instance", own, now, "decree", "no such type"),
    ]
    assert node.call("POST", "report", {"events": [to_plain(e) for e in events]})[0] == 200
    everything = [str(r.value) for r in server.services.store.list("event/")]
    assert not [e for e in everything if "forged" in e or "no such type" in e]
    assert server.get("/nodes/node2/events")[0]["message"] == "its own"
    seen = server.get(f"/instances/{own}/events")
    assert {e["fqdn"] for e in seen if e["type"] == "status"} == {"node2"}
    assert {len(e["message"]) for e in seen if e["message"].startswith("w")} == {2000}
    assert all(abs(e["timestamp"] - now) < 60 for e in seen)
    assert all(len(str(e["extra"])) < 100 for e in seen)


def test_what_a_node_says_of_its_guests_cannot_break_who_reads_it(server: Running, node: FarAgent) -> None:
    """E3"""
    uuid = server.instance("own", placed_on="node2").body["uuid"]
    foreign = server.instance("foreign", placed_on="node1").body["uuid"]
    server.wait_for(f"/instances/{foreign}", "created")
    assert node.report(InstanceStatus(foreign, InstanceState.CREATING_ERROR, error_message="forged")) == 200
    assert server.get(f"/instances/{foreign}")["error_message"] is None
    for extra in ({"image_bytes": 5}, {"image_bytes": {"vda": {"received": {"x": "y"}}}}, {"z": "z" * 10**5}):
        status = InstanceStatus(uuid, InstanceState.CREATED, "on", "e" * 75_000, extra=extra)
        assert node.report(status) == 200
        found = server.get(f"/instances/{uuid}")
        assert (found["state"], len(found["error_message"])) == ("created", 2000)
        assert server.call("GET", "/metrics").status == 200
        assert len(server.services.store.get(f"instance/{uuid}").value) < 10_000  # type: ignore[union-attr]
    good: dict[str, Any] = {
        "image_bytes": {"vda": {"present_bytes": 5, "received": {"store": 5}, "waited_s": 0.5}}
    }
    good |= {"agent_system_boot_time": 7}  # no agent of ours knows it
    assert node.report(InstanceStatus(uuid, InstanceState.CREATED, "on", extra=good)) == 200
    found = server.get(f"/instances/{uuid}")
    assert (found["image_bytes"], found["agent_system_boot_time"]) == (good["image_bytes"], None)
    assert node.call("POST", "report", {"statuses": [{"uuid": uuid, "state": "heaven"}]})[0] == 400


def test_a_node_that_claims_anothers_guest_as_its_own_takes_nothing_from_it(
    server: Running, node: FarAgent
) -> None:
    """E3: what it stops to claim was given back, and the next guest got the first one's address"""
    server.network()
    uuid = server.instance("web", "lan", placed_on="node1").body["uuid"]
    server.wait_for(f"/instances/{uuid}", "created")
    (spec,) = [s for s in server.agent.desired.instances if s.uuid == uuid]  # type: ignore[union-attr]
    loud = replace(spec, name="n" * 10**5)
    for orphan in (Orphan(uuid, "on", loud), Orphan("0" * 36, "on", loud)):
        for orphans in ((orphan,), ()):
            seen = Inventory("m", "", 0, orphans)
            assert node.call("POST", "inventory", {"seen": to_plain(seen)})[0] == 200
        invariants.check(server.services.store)
    messages = [event["message"] for event in server.get("/nodes/node2/events")]
    assert max(map(len, messages)) < 1000
    other = server.instance("other", "lan").body
    assert other["interfaces"][0]["ipv4"] != server.get(f"/instances/{uuid}")["interfaces"][0]["ipv4"]


def test_a_node_that_says_it_saw_the_future_holds_the_others_up_once_and_not_for_ever(
    server: Running, node: FarAgent
) -> None:
    """E3: while an epoch begins nothing else does"""

    def say(number: str, reached: int) -> None:
        assert node.call("POST", "inventory", {"seen": to_plain(Inventory("m", number, reached))})[0] == 200

    def present() -> Epoch:
        return epoch(Transaction(server.services.store))

    say("", 0)
    say(present().number, 10**15)
    began = present()
    assert began.begun_by == "node2" and "node2" in began.waiting
    say(began.number, 0)
    asyncio.run(server.services.controller.inventory("node1", Inventory("", began.number, 0)))
    assert present().waiting == ()
    for number, reached in ((began.number, 10**15), ("another", 0), ("one more", 10**15)):
        say(number, reached)
        assert present().waiting == () and present().number == began.number
    assert server.instance("web").status == 200


@pytest.mark.parametrize("query", ["desired?wait=nan", "operations?wait=nan", "desired?wait=-1"])
def test_a_wait_that_is_no_number_of_seconds_is_refused(node: FarAgent, query: str) -> None:
    """E3: timers of the server's loop are compared with it"""
    assert node.call("GET", query)[0] == 400
