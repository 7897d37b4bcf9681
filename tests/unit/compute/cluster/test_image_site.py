"""With which other nodes a node's image service shares what it holds: what the server tells it, and when."""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute.api.agents import Mailbox
from compute.cluster import liveness
from compute.cluster.controller import Controller
from compute.cluster.desired import image_site
from compute.cluster.records import nodes
from compute.cluster.records.nodes import Node
from compute.cluster.records.transaction import transact
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.wire.codec import from_plain, to_plain
from compute.wire.spec import ImageSite, NodeDesired, NodeFacts

MACHINE: dict[str, Any] = {"cpus": 1, "memory_mib": 512}
STORES = ("1f" * 16, "2e" * 16)


def node(name: str, address: str = "", stores: tuple[str, ...] = STORES) -> Node:
    own = f"192.0.2.{name[1]}"
    facts = MACHINE | {"address": own, "peer_address": address or f"{own}:13002", "stores": list(stores)}
    return Node(uuid=name, name=name, facts=facts, state="created")


def site(name: str, *others: Node, alive: str = "n1 n2 n3 n4") -> ImageSite:
    return image_site(name, others, alive.split(), b"secret")


def test_living_nodes_with_the_same_stores_share_and_know_each_other_by_the_same_key() -> None:
    known = [node("n1"), node("n2"), node("n3")]
    one, two = (site(name, *known) for name in ("n1", "n2"))
    assert (one.me, one.listen) == ("n1", "192.0.2.1:13002")
    assert one.peers == {"n2": "192.0.2.2:13002", "n3": "192.0.2.3:13002"}
    assert one.secret == two.secret and len(one.secret) == 32
    assert site("n1", *known, alive="n1 n3").peers == {"n3": "192.0.2.3:13002"}
    assert from_plain(ImageSite, to_plain(one)) == one


def test_nodes_with_other_stores_are_no_peers_and_have_another_key() -> None:
    private = STORES[:1]
    known = [node("n1"), node("n2"), node("n3", stores=private), node("n4", stores=private)]
    assert list(site("n1", *known).peers) == ["n2"]
    assert list(site("n3", *known).peers) == ["n4"]
    assert site("n1", *known).secret != site("n3", *known).secret


def test_a_port_is_a_number_and_nothing_more() -> None:
    assert nodes.facts_of(node("n2"))
    for port in ("13002 and more", "13002/x?y", "-1", "0", "65536", "9" * 30, "١٣"):
        assert nodes.facts_of(node("n2", f"192.0.2.2:{port}")) is None, port


@pytest.mark.parametrize(
    "known",
    [
        [node("n1")],
        [node("n1"), node("n2", stores=())],
        [Node(uuid="1", name="n1", facts=MACHINE | {"stores": list(STORES)}), node("n2")],
        [node("n1"), Node(uuid="2", name="n2", facts=MACHINE | {"stores": list(STORES)})],
        [node("n1"), Node(uuid="2", name="n2", facts={})],
        [node("n2"), node("n3")],
    ],
)
def test_a_node_on_its_own_listens_nowhere_and_learns_no_secret(known: list[Node]) -> None:
    assert site("n1", *known) == ImageSite()


def test_a_secret_is_not_shown_where_a_desired_state_is() -> None:
    found = site("n1", node("n1"), node("n2"))
    assert found.secret and str(found.secret) not in str(found) and found.secret.hex() not in repr(found)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "sf.db")
    yield opened
    opened.close()


def test_peers_are_told_anew_when_one_comes_or_goes_and_a_removed_one_does_not_know_the_next_key(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "LEASE_S", 1.0)

    async def register(controller: Controller, name: str) -> None:
        own = f"192.0.2.{name[1]}"
        facts = NodeFacts(4, 4096, own, peer_address=f"{own}:13002", stores=STORES)
        await controller.register(name, facts, Mailbox(name))

    async def story() -> None:
        controller = Controller(store, "0123abcd", Config(node_name="n1"))
        await controller.start()
        transact(store, lambda txn: txn.create(Node(uuid="2", name="n2")))
        seen: list[NodeDesired] = []

        async def told(peers: list[str]) -> ImageSite:
            async with asyncio.timeout(30):
                while not seen or sorted(seen[-1].image_site.peers) != peers:
                    after = seen[-1].revision if seen else 0
                    seen.append(await controller.desired("n1", after, 20))
            return seen[-1].image_site

        try:
            await register(controller, "n1")
            assert await told([]) == ImageSite()
            await register(controller, "n2")
            controller.nodes.renew("n2")
            first = await told(["n2"])
            assert (await controller.desired("n2")).image_site.secret == first.secret
            await told([])  # its lease ran out
            controller.nodes.renew("n2")
            assert await told(["n2"]) == first
            remove = lambda txn: nodes.remove(txn, "n2", server="n1", alive=False, router_nodes=[])  # noqa: E731
            transact(store, remove)
            await told([])
            assert (await controller.desired("n2")).image_site == ImageSite()
            transact(store, lambda txn: txn.create(Node(uuid="3", name="n3")))
            await register(controller, "n3")
            controller.nodes.renew("n3")
            assert (await told(["n3"])).secret != first.secret
            assert all(a.revision != b.revision for a, b in itertools.pairwise(seen))
            other_server = Controller(store, "0123abcd", Config(node_name="n1"))
            assert (await other_server.desired("n1")).revision == seen[-1].revision
        finally:
            controller.feed.stop()

    asyncio.run(story())
