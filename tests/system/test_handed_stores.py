"""A joined node has the server's stores without any setting of its own, over its own connection."""

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compute import config, process
from compute.agent import link as remote
from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import Node
from compute.cluster.records.taken import store_token
from compute.cluster.records.transaction import Transaction, transact
from compute.wire.codec import to_plain
from compute.wire.spec import NodeFacts
from imagestore.cache.images import ImageCache
from imagestore.errors import Denied, NotFound, StoreError, Unavailable
from imagestore.formats.digest import Digest
from imagestore.pull import pull
from imagestore.settings import Settings
from imagestore.store.open import open_store
from imagestore.store.store import Store
from tests import tiny_store
from tests.api_server import Running, running
from tests.imaged import Imaged
from tests.system.test_api_agents import listening
from tests.system.test_remote_agent import Wires

DISK = tiny_store.disk(7, 40)


@pytest.fixture
def stocked(tmp_path: Path) -> Iterator[tuple[Store, Digest]]:
    store = open_store((tmp_path / "images").as_uri(), create=True)
    digest = tiny_store.put_image(store, DISK)
    store.names.set("tiny", "1", "x86_64", digest)
    yield store, digest
    store.backend.close()


@pytest.fixture
def server(tmp_path: Path, stocked: tuple[Store, Digest]) -> Iterator[Running]:
    images = ImageCache(tmp_path / "server/cache", {"local": stocked[0]})
    with running(tmp_path / "server", resolver=images) as found:
        settings = replace(found.services.config, agent_listen="127.0.0.1:1")
        object.__setattr__(found.services, "config", settings)
        yield found


@pytest.fixture
def identity(server: Running, tmp_path: Path) -> Iterator[remote.Identity]:
    token = server.call("POST", "/nodes/token").body["token"]
    with listening(server) as (host, port):
        yield asyncio.run(remote.join(tmp_path / "n", f"https://{host}:{port}", token, "node2"))


def handed(identity: remote.Identity, tmp_path: Path) -> dict[str, str]:
    """What the node's agent hears of stores."""

    async def ask() -> dict[str, str]:
        far = remote.RemoteController(identity, tmp_path / "n", Wires())
        try:
            return (await far.desired("node2")).stores
        finally:
            await far._client.aclose()

    return asyncio.run(ask())


def register(server: Running, **facts: Any) -> None:
    plain = to_plain(NodeFacts(8, 16384, "192.0.2.2", **facts))
    transact(
        server.services.store,
        lambda txn: txn.update(replace(txn.get(Node, "node2"), facts=plain)),
    )
    server.services.controller.nodes.renew("node2")


def test_a_joined_node_boots_the_servers_images_from_its_directory(
    identity: remote.Identity, stocked: tuple[Store, Digest], tmp_path: Path
) -> None:
    """I1"""
    stores = handed(identity, tmp_path)
    assert list(stores) == ["local"]
    store = open_store(stores["local"])
    pull(store, stocked[1], tmp_path / "out.raw", format_="raw", durable=False)
    assert hashlib.sha256((tmp_path / "out.raw").read_bytes()).digest() == hashlib.sha256(DISK).digest()
    store.backend.close()
    with Imaged(tmp_path / "node", (tmp_path / "nothing").as_uri()) as service:
        with pytest.raises(StoreError):
            service.ask("attach", image=str(stocked[1]), reader="w-vda")
        service.ask("use", stores=[(tmp_path / "nothing").as_uri(), stores["local"]])
        assert service.ask("readable") == {stores["local"]: stocked[0].info.id}
        assert service.ask("attach", image=str(stocked[1]), reader="w-vda")["size_bytes"] == len(DISK)
        service.wait_complete(stocked[1])


def test_the_servers_stores_are_for_its_nodes_alone_and_read_only(
    server: Running, identity: remote.Identity, stocked: tuple[Store, Digest], tmp_path: Path
) -> None:
    """I1"""
    url = handed(identity, tmp_path)["local"]
    token = url.split(":")[2].split("@")[0]
    with pytest.raises(Denied):
        open_store(url.replace(token, "0" * len(token)))
    with pytest.raises(Denied):
        open_store(url.replace("node2:", "node3:"))
    with pytest.raises(Unavailable, match=r"(?i)fingerprint"):
        open_store(url[:-64] + "0" * 64)
    with pytest.raises(NotFound):
        open_store(url.replace("/local?", "/other?"))
    reader = open_store(url)
    stocked[0].backend.put("leases/x", b"{}")
    for key in ("leases/x", "refs/x"):
        with pytest.raises(NotFound):
            reader.backend.get(key)
    reader.backend.close()
    other = transact(server.services.store, lambda txn: store_token(txn, "node3"))
    assert other != token
    transact(server.services.store, lambda txn: txn.writes.update({"alive/node2": None}))
    assert server.call("DELETE", "/nodes/node2").status == 200
    with pytest.raises(Denied):
        open_store(url)


def test_a_node_that_reads_no_store_with_the_image_is_not_chosen_and_says_why(
    server: Running, identity: remote.Identity, stocked: tuple[Store, Digest]
) -> None:
    """I2"""

    def create(name: str, **more: Any) -> Any:
        return server.instance(name, disk=[{"base": "tiny:1"}], **more)

    register(server)
    assert create("early", placed_on="node2").status == 200  # it has not said yet
    register(server, stores=("another",))
    refused = create("a", placed_on="node2")
    assert refused.status == 507
    assert "node2 can read no store that has b3:" in refused.body["error"]
    assert create("b").body["node"] == "node1"
    assert server.instance("blank", disk=[{"size": 1}], placed_on="node2").status == 200
    register(server, stores=(stocked[0].info.id,))
    assert create("c", placed_on="node2").body["node"] == "node2"
    register(server, stores=(), images=(str(stocked[1]),))
    assert create("d", placed_on="node2").body["node"] == "node2"
    assert len(Transaction(server.services.store).list(Instance)) == 5


def test_stores_and_remotes_that_are_added_are_seen_by_a_server_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stocked: tuple[Store, Digest]
) -> None:
    """I3, I4"""
    monkeypatch.setattr(process, "_LOOK_S", 0.01)
    file = tmp_path / "config.toml"
    file.write_text(f'store = "{tmp_path / "late"}"\n')
    read = Settings(environment={"SF_CONFIG": str(file), "SF_STATE_DIR": str(tmp_path / "state")})
    (tmp_path / "state").mkdir()

    async def story() -> None:
        stores = process.NodeStores(config.load(read), default=True)
        keeping = asyncio.create_task(stores.keep())

        async def until(names: list[str]) -> None:
            async with asyncio.timeout(30):
                while list(stores.images.stores) != names:
                    await asyncio.sleep(0.01)

        assert stores.images.stores == {}
        open_store(str(tmp_path / "late"), create=True).backend.close()
        await until(["local"])
        with file.open("a") as more:
            more.write(f'[remotes.lab]\nurl = "{tmp_path / "images"}"\n')
        await until(["local", "lab"])
        assert stores.images.resolve("lab/tiny:1", "x86_64").digest == stocked[1]
        assert list(stores.urls) == ["local", "lab"]
        file.write_text(f'store = "{tmp_path / "late"}"\n')
        await until(["local"])
        keeping.cancel()
        stores.close()

    asyncio.run(story())
