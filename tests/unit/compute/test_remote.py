"""When a node on another machine may route: its lease, and the Plane behind it."""

import asyncio
import threading
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from compute.agent import link as remote
from compute.agent.link import Fenced
from compute.agent.memory import Lease, now_s
from compute.wire.codec import to_plain
from compute.wire.spec import InstanceSpec, NodeDesired
from net import Network, NodeNetworks, Plane

MINE = Network("u", 7, "lan", IPv4Network("10.0.0.0/24"), IPv4Address("10.0.0.1"), router_node="n2")
DESIRED = NodeNetworks("0badcafe", "n2", (MINE,))


class Wires:
    """Writes down what a Plane was told."""

    def __init__(self) -> None:
        self.applied: list[NodeNetworks] = []
        self.dropped = 0
        self.lease, self.power = Lease(), Lease()

    def apply(self, desired: NodeNetworks) -> list[str]:
        self.applied.append(desired)
        return []

    def drop_routers(self) -> None:
        self.dropped += 1


@pytest.fixture
def plane(monkeypatch: pytest.MonkeyPatch) -> Wires:
    """What the data plane below a fence is told."""
    wires = Wires()
    monkeypatch.setattr(Plane, "apply", lambda _, desired: wires.apply(desired))
    monkeypatch.setattr(Plane, "drop_routers", lambda _: wires.drop_routers())
    return wires


def routers(plane: Wires) -> list[str]:
    return [network.router_node for network in plane.applied[-1].networks]


def test_without_a_lease_a_node_has_its_networks_and_no_router(plane: Wires, tmp_path: Path) -> None:
    Fenced("0badcafe", tmp_path, "n2").apply(DESIRED)
    assert routers(plane) == [""] and plane.dropped == 1


def test_routers_come_with_the_first_desired_state_that_was_asked_for_under_the_lease(
    plane: Wires, tmp_path: Path
) -> None:
    fenced = Fenced("0badcafe", tmp_path, "n2", uplink="eth1")
    lease, before = fenced.lease, now_s()
    lease.confirm(before)  # without a lease it counts for nothing
    lease.renewed(now_s(), 60)
    fenced.apply(DESIRED)
    assert routers(plane) == [""]
    lease.confirm(before)  # asked for before the lease was gained: another node may route by now
    fenced.apply(DESIRED)
    assert routers(plane) == [""]
    lease.confirm(now_s())
    fenced.apply(DESIRED)
    assert routers(plane) == ["n2"] and plane.applied[-1].uplink == "eth1"
    assert plane.dropped == 0


def test_a_lease_that_ran_out_needs_a_new_desired_state_even_when_it_is_renewed() -> None:
    lease = Lease()
    lease.renewed(now_s(), 60)
    lease.confirm(now_s())
    assert lease.firm()
    lease._until = now_s() - 1
    assert not lease.firm()
    lease.renewed(now_s(), 60)
    assert lease.held() and not lease.firm()


def test_a_renewal_counts_from_when_it_was_asked_for() -> None:
    lease = Lease()
    lease.renewed(now_s() - 9, 8)
    assert not lease.held()


def test_other_nodes_routers_are_none_of_its_business(plane: Wires, tmp_path: Path) -> None:
    elsewhere = Network("v", 8, "far", IPv4Network("10.1.0.0/24"), IPv4Address("10.1.0.1"), router_node="n3")
    Fenced("0badcafe", tmp_path, "n2").apply(NodeNetworks("0badcafe", "n2", (elsewhere,)))
    assert routers(plane) == ["n3"]


def test_a_machine_that_never_joined_has_no_identity(tmp_path: Path) -> None:
    assert remote.load(tmp_path) is None


def test_what_needs_the_lease_starts_once_the_agent_has_acted_on_what_is_still_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the answer and that, guests which others were given still believe that they are this node's."""
    web = InstanceSpec("11111111-0000-4000-8000-000000000001", "web", "system", 1, 16, (), leased_s=5.0)
    told, plane = NodeDesired(1, DESIRED, (web,), hold=True), Wires()

    async def ask(*_: object, **__: object) -> Any:
        return to_plain(told)

    monkeypatch.setattr(remote, "_ask", ask)
    monkeypatch.setattr(remote, "_client", lambda _: None)
    monkeypatch.setattr(remote, "cut", lambda _: set())
    monkeypatch.setattr(remote.RemoteController, "_led", lambda _, desired: desired)
    far = remote.RemoteController(remote.Identity("https://s:1", "n2", "", "", ""), tmp_path, plane)  # type: ignore[arg-type]

    async def poll() -> bool:
        await far.desired("n2")
        return plane.power.firm()

    async def story() -> None:
        nonlocal told
        await far.desired("n2")  # the agent acts on this one, and it is old once the lease is there
        plane.power.renewed(now_s(), 60)
        assert [await poll(), await poll()] == [False, False]  # a state that may be older says nothing
        told = NodeDesired(2, DESIRED)
        assert [await poll(), await poll()] == [False, True]

    asyncio.run(story())


def test_what_ends_with_a_lease_waits_for_no_work_that_fills_the_loops_own_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's own node shares them with all that the server does at length."""
    kept, go_on, plane = threading.Event(), threading.Event(), Wires()

    async def ask(*_: object, **__: object) -> Any:
        return {"fence_s": 0.5, "guests_s": 60}

    monkeypatch.setattr(remote, "_ask", ask)
    monkeypatch.setattr(remote, "_client", lambda _: None)
    monkeypatch.setattr(plane.power, "keep", kept.set)
    far = remote.RemoteController(remote.Identity("https://s:1", "n2", "", "", ""), tmp_path, plane)  # type: ignore[arg-type]

    async def story() -> None:
        busy = [asyncio.create_task(asyncio.to_thread(go_on.wait, 20)) for _ in range(64)]
        await asyncio.sleep(0)
        parts = [asyncio.create_task(part) for part in (far._fencing(), far._renewing())]
        try:
            async with asyncio.timeout(10):
                while not (kept.is_set() and plane.dropped):
                    await asyncio.sleep(0.01)
        finally:
            for part in parts:
                part.cancel()
            go_on.set()
        assert all(await asyncio.gather(*busy))

    asyncio.run(story())
