"""What a namespace keeps is in a store of its own: for its guests, for who is trusted there, and for nobody else."""

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from compute.agent import link as remote
from compute.cluster.holding import Holds
from compute.cluster.images.stores import beside
from compute.cluster.records.instances import Instance
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.transaction import Transaction, transact
from imagestore.cache.images import ImageCache
from imagestore.errors import NotFound
from imagestore.formats.digest import Digest
from imagestore.pull import pull
from imagestore.store.open import open_store
from imagestore.store.store import Store
from tests import tiny_store
from tests.api_server import INSTALLATION, Answer, Running, running
from tests.system.test_api_agents import listening
from tests.system.test_handed_stores import handed, register

DISK = tiny_store.disk(11, 40)


def put(store: Store, name: str, seed: int = 11) -> Digest:
    digest = tiny_store.put_image(store, tiny_store.disk(seed, 40))
    store.names.set(name, "1", "x86_64", digest)
    return digest


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    store = open_store((tmp_path / "images").as_uri(), create=True)
    put(store, "tiny", 3)
    images = ImageCache(tmp_path / "server/cache", {"local": store})
    with running(tmp_path / "server", resolver=images) as found:
        config = replace(found.services.config, agent_listen="127.0.0.1:1")
        object.__setattr__(found.services, "config", config)
        for name in ("shop", "rival", "friend"):
            body = {"namespace": name, "key_name": "k", "key": f"{name}-key"}
            assert found.call("POST", "/auth/namespaces", body).status == 200
            found.tokens[name] = found.login(name, f"{name}-key").body["access_token"]
        yield found


def create(server: Running, name: str, base: str, **more: object) -> Answer:
    return server.instance(name, disk=[{"base": base}], **more)


def test_the_stores_of_namespaces_lie_beside_the_servers_own(tmp_path: Path) -> None:
    assert beside("file:///var/lib/sf/store", "a", tmp_path) == "file:///var/lib/sf/store-namespaces/a"
    assert beside("/var/lib/sf/store", "a", tmp_path) == "file:///var/lib/sf/store-namespaces/a"
    assert beside("s3://images?region=eu", "a", tmp_path) == "s3://images/namespaces/a?region=eu"
    assert beside("s3://images/sf/?region=eu", "a", tmp_path) == "s3://images/sf-namespaces/a?region=eu"
    for readers in ("https://images.example/#b3:" + "0" * 64, "https://images.example"):
        assert beside(readers, "a", tmp_path) == f"{(tmp_path / 'store').as_uri()}-namespaces/a"


def test_an_image_of_ones_own_boots_and_nobody_else_finds_or_is_told_of_it(server: Running) -> None:
    namespaces = server.services.namespaces
    digest = put(namespaces.of("shop"), "golden")
    assert namespaces.of("shop").info.private
    made = create(server, "a", "my/golden:1", as_namespace="shop")
    assert made.status == 200, made.body
    disk = Transaction(server.services.store).get(Instance, made.body["uuid"]).disks[0]
    assert (disk.image, disk.store, disk.size_bytes) == (str(digest), "shop", len(DISK))
    assert create(server, "b", "shop/golden:1", as_namespace="shop").status == 200
    assert (
        create(server, "c", "golden:1", as_namespace="shop").status == 404
    )  # a bare name is never a namespace's
    assert create(server, "d", "shop/golden:1").status == 200  # the administrator sees everybody's
    # What is not there and what may not be seen are told alike, also where a cache holds it and the digest is known.
    refused, missing = (
        create(server, "e", f"{n}/golden:1", as_namespace="rival") for n in ("shop", "nobody")
    )
    assert (refused.status, missing.status) == (404, 404)
    assert refused.body["error"].replace("shop", "nobody") == missing.body["error"]
    cache = server.services.resolver
    assert isinstance(cache, ImageCache)
    pull(namespaces.of("shop"), digest, cache.path(digest), format_="raw", durable=False)
    manifest = namespaces.of("shop").backend.get(f"manifests/{digest.hex()[:2]}/{digest.hex()}").data
    cache.path(digest).with_suffix(".manifest").write_bytes(manifest)
    for text in (str(digest), str(digest)[:20], f"golden@{digest}"):
        assert create(server, "f", text, as_namespace="rival").status == 404
    assert create(server, "f", str(digest)).status == 200
    # Trust is what opens it.
    assert create(server, "g", "shop/golden:1", as_namespace="friend").status == 404
    trust = {"external_namespace": "friend"}
    assert server.call("POST", "/auth/namespaces/shop/trust", trust, namespace="shop").status == 200
    assert create(server, "g", "shop/golden:1", as_namespace="friend").status == 200
    assert server.call("DELETE", "/auth/namespaces/shop").status == 400
    assert "store" not in str(server.call("GET", "/auth/namespaces/shop", namespace="shop").body)


def test_a_namespace_that_is_made_anew_inherits_nothing(server: Running) -> None:
    first = server.services.namespaces.of("shop")
    put(first, "golden")
    assert server.call("DELETE", "/auth/namespaces/shop").status == 200
    body = {"namespace": "shop", "key_name": "k", "key": "other-key"}
    assert server.call("POST", "/auth/namespaces", body).status == 200
    server.tokens["shop"] = server.login("shop", "other-key").body["access_token"]
    assert create(server, "a", "my/golden:1", as_namespace="shop").status == 404
    second = server.services.namespaces.of("shop")
    assert second.info.id != first.info.id
    assert [*second.names.list()] == []


def test_an_instance_holds_its_image_in_the_store_that_it_is_from_alone(server: Running) -> None:
    namespaces, holds = server.services.namespaces, Holds(server.services.store, INSTALLATION)
    for name in ("shop", "rival"):
        put(namespaces.of(name), "golden")
    made = create(server, "a", "my/golden:1", as_namespace="shop").body["uuid"]
    holds.reconcile({f"my/{name}": store for name, store in namespaces.made().items()})
    assert [s.key for s in namespaces.of("shop").backend.list("refs/")] == [f"refs/{INSTALLATION}-{made}"]
    assert [*namespaces.of("rival").backend.list("refs/")] == []


def test_a_node_reads_the_stores_of_its_guests_namespaces_and_no_others(
    server: Running, tmp_path: Path
) -> None:
    namespaces = server.services.namespaces
    digest = put(namespaces.of("shop"), "golden")
    put(namespaces.of("rival"), "secret", 12)
    token = server.call("POST", "/nodes/token").body["token"]
    with listening(server) as (host, port):
        identity = asyncio.run(remote.join(tmp_path / "n", f"https://{host}:{port}", token, "node2"))
        register(server, stores=("another",))
        assert (
            create(server, "x", "tiny:1", placed_on="node2").status == 507
        )  # of the server's it has said that it cannot
        assert create(server, "a", "my/golden:1", as_namespace="shop", placed_on="node2").status == 200
        stores = handed(identity, tmp_path)
        assert list(stores) == ["local", "my/shop"]
        store = open_store(stores["my/shop"])
        pull(store, digest, tmp_path / "out.raw", format_="raw", durable=False)
        assert hashlib.sha256((tmp_path / "out.raw").read_bytes()).digest() == hashlib.sha256(DISK).digest()
        store.backend.close()
        for name in ("my%2Frival", "my%2Fnobody", "my"):
            with pytest.raises(NotFound):
                open_store(stores["my/shop"].replace("my%2Fshop", name))
    own = asyncio.run(server.services.controller.desired("node1")).stores
    assert own == {}  # its own machine reads the others by its settings, and has no guest with this image
    create(server, "b", "my/golden:1", as_namespace="shop", placed_on="node1")
    url = Transaction(server.services.store).get(Namespace, "shop").store
    assert asyncio.run(server.services.controller.desired("node1")).stores == {"my/shop": url}
    transact(server.services.store, lambda txn: txn.delete(Namespace, "shop"))
    assert asyncio.run(server.services.controller.desired("node1")).stores == {}
