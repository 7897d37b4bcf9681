"""What a name means and what is left of a namespace: nothing of one tenant's is found, or lost, by another's doing."""

import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from compute.cluster import quotas
from compute.cluster.images.artifacts import Blob, want
from compute.cluster.records.instances import Instance
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.transaction import Transaction, transact
from compute.errors import NotFound
from imagestore.formats.digest import Digest
from tests.api_server import Running, running
from tests.system.test_tenants import guest, lan, tenant, trust

SHOP = "/auth/namespaces/shop"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("tenants") / "state") as found:
        yield found


@pytest.fixture
def server(site: Running) -> Iterator[Running]:
    """With two tenants, shop and lab, that go with all they have."""
    for name in ("shop", "lab"):
        tenant(site, name)
    yield site
    for one in site.get("/instances"):
        site.call("DELETE", f"/instances/{one['uuid']}")
        site.wait_for(f"/instances/{one['uuid']}", "deleted")
    for path in ("/networks", "/rules"):
        for one in site.get(path):
            assert site.call("DELETE", f"{path}/{one['uuid']}").status == 200
    for one in site.get("/auth/namespaces"):
        assert (
            site.call("DELETE", f"/auth/namespaces/{one['name']}").status
            == (400, 200)[one["name"] != "system"]
        )


def label(server: Running, name: str = "golden", namespace: str = "shop") -> str:
    """An artifact that a namespace keeps."""
    blob = Blob(namespace, str(Digest.of(name.encode())), 1)
    more: Any = {"blob": blob, "name": name, "artifact_type": "label"}
    url = f"sf://label/{namespace}/{name}"
    return transact(server.services.store, lambda txn: want(txn, namespace, url, **more)).uuid


def meanwhile(server: Running, monkeypatch: pytest.MonkeyPatch, key: str, act: Callable[[], object]) -> None:
    """`act` happens once, just before the first commit that writes to `key`."""
    commit, waits = server.services.store.commit, [act]

    def first(writes: Any, **more: Any) -> int:
        if waits and any(name.startswith(key) for name in writes):
            waits.pop()()
        return commit(writes, **more)

    monkeypatch.setattr(server.services.store, "commit", first)


def test_a_network_named_in_rules_is_one_of_their_namespace(server: Running) -> None:
    lan(server, "shop", "10.66.0.0/24")
    asked = {"name": "office", "allow": ["tcp:22@lan"]}
    assert server.call("POST", "/rules", asked).status == 400, (
        "a tenant's network in the administrator's rules"
    )
    theirs = server.call("POST", "/rules", {**asked, "namespace": "shop"})
    assert theirs.body["allow"] == ["tcp:22@10.66.0.0/24"]
    lan(server, "system", "10.1.0.0/24")
    assert server.call("POST", "/rules", asked).body["allow"] == ["tcp:22@10.1.0.0/24"]
    again = server.call("PUT", f"/rules/{theirs.body['uuid']}", {"allow": ["udp:53@lan"]})
    assert again.body["allow"] == ["udp:53@10.66.0.0/24"]


def test_an_artifact_is_found_by_name_in_ones_own_namespace_and_changed_by_no_key_that_reads(
    server: Running,
) -> None:
    uuid = label(server)
    trust(server, "shop", "lab")
    assert server.call("GET", "/artifacts/golden", namespace="lab").status == 404
    assert server.call("DELETE", "/artifacts/golden").status == 404, "nor the administrator's by accident"
    assert server.get(f"/artifacts/{uuid}", namespace="lab")["uuid"] == uuid
    assert server.get("/label/shop/golden", namespace="lab")["uuid"] == uuid
    mine = label(server, namespace="lab")
    assert server.get("/artifacts/golden", namespace="lab")["uuid"] == mine
    # A key that only reads points no label anywhere.
    blob = server.get("/artifacts/golden", namespace="shop")["blob_uuid"]
    body = {"key_name": "reads", "key": "only", "read_only": True}
    assert server.call("POST", f"{SHOP}/keys", body, namespace="shop").status == 200
    server.tokens["reader"] = server.login("shop", "only").body["access_token"]
    assert server.call("GET", "/label/new", {"blob_uuid": blob}, namespace="reader").status == 404
    assert server.call("GET", "/label/new", namespace="shop").status == 404
    assert server.call("POST", "/label/new", {"blob_uuid": blob}, namespace="shop").status == 200
    web = guest(server, "shop", lan(server, "shop")["uuid"])
    server.wait_for(f"/instances/{web['uuid']}", "created")
    assert server.call("GET", "/instances/web/screenshot", namespace="reader").status == 403, (
        "it would be kept"
    )


def test_a_stream_of_an_artifacts_events_ends_with_its_trust_and_with_it(server: Running) -> None:
    uuid = label(server)
    trust(server, "shop", "lab")
    for who, end in (
        ("lab", lambda: trust(server, "shop", "lab", "DELETE")),
        ("shop", lambda: server.call("DELETE", f"/artifacts/{uuid}", namespace="shop")),
    ):
        headers = {"Authorization": f"Bearer {server.tokens[who]}"}
        path = f"{server.url}/artifacts/{uuid}/events?follow=true"
        with urllib.request.urlopen(urllib.request.Request(path, headers=headers), timeout=30) as stream:
            assert stream.readline().startswith(b"id: ")
            end()
            stream.read()  # to its end, which now comes


def test_a_namespace_with_much_in_it_is_deleted_and_who_is_called_so_next_finds_nothing(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    label(server)
    monkeypatch.setitem(quotas.DEFAULTS, "rules", 100)
    for number in range(60):
        asked = {"name": f"r{number}", "allow": ["icmp"]}
        assert server.call("POST", "/rules", asked, namespace="shop").status == 200
    for number in range(4):
        said = "x" * number

        def say(txn: Transaction, said: str = said) -> None:
            for _ in range(40):
                txn.event(Namespace.KIND, "shop", said)

        transact(server.services.store, say)
    web = guest(server, "shop", lan(server, "shop")["uuid"])
    server.wait_for(f"/instances/{web['uuid']}", "created")
    assert server.call("PUT", "/instances/web/backup", {"every": 3600}, namespace="shop").status == 200
    server.call("DELETE", "/instances/web", namespace="shop")
    server.wait_for(f"/instances/{web['uuid']}", "deleted")
    assert server.call("DELETE", "/networks/lan", namespace="shop").status == 200
    assert server.call("DELETE", SHOP).status == 200
    assert server.call("GET", SHOP).status == 404
    tenant(server, "shop")
    for path in ("/instances", "/networks", "/artifacts", "/rules", "/backups"):
        body = {"all": True} if path in ("/instances", "/networks") else None
        assert server.get(path, body, namespace="shop") == [], path
    assert server.call("GET", f"/instances/{web['uuid']}", namespace="shop").status == 404
    assert server.get(f"/instances/{web['uuid']}")["state"] == "deleted"
    assert server.get(f"{SHOP}/events")[-1]["message"].startswith("created")


def test_a_namespace_that_is_deleted_meanwhile_gets_nothing_and_does_not_come_back(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = lambda: server.call("DELETE", SHOP).status  # noqa: E731
    with monkeypatch.context() as patch:
        meanwhile(server, patch, "instance/", gone)
        assert server.instance("late", as_namespace="shop").status == 404
    assert "late" not in {one.name for one in Transaction(server.services.store).list(Instance)}
    tenant(server, "shop")
    with monkeypatch.context() as patch:
        meanwhile(server, patch, "namespace/shop", gone)
        item = {"key": "k", "value": "v"}
        assert server.call("POST", f"{SHOP}/metadata", item, namespace="shop").status == 404
    assert Transaction(server.services.store).find(Namespace, "shop") is None
    tenant(server, "shop")
    with monkeypatch.context() as patch:
        meanwhile(server, patch, "namespace/shop", lambda: server.instance("in", as_namespace="shop"))
        assert gone() == 400, "it has an instance by now"


def test_rules_that_are_deleted_and_a_backups_rule_that_is_changed_meanwhile_leave_nothing_half_done(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"name": "office", "allow": ["icmp"]}
    assert server.call("POST", "/rules", asked, namespace="shop").status == 200
    links = [{"network_uuid": lan(server, "shop")["uuid"], "rules": "office"}]
    with monkeypatch.context() as patch:
        meanwhile(
            server, patch, "instance/", lambda: server.call("DELETE", "/rules/office", namespace="shop")
        )
        assert server.instance("ruled", links, as_namespace="shop").status == 404, (
            "by what nobody can take away"
        )
    web = guest(server, "shop", "lan")
    server.wait_for(f"/instances/{web['uuid']}", "created")
    path = "/instances/web/backup"
    assert server.call("PUT", path, {"every": 3600}, namespace="shop").status == 200
    other = lambda: server.call("PUT", path, {"every": 4000}, namespace="shop")  # noqa: E731
    meanwhile(server, monkeypatch, "backup/", other)
    assert server.call("PUT", path, {"every": 5000}, namespace="shop").status == 200
    assert server.get("/backups", namespace="shop")[0]["every_s"] == 5000


def test_rules_trust_ports_and_metadata_are_bounded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"rules": 2, "trusts": 1, "published": 3}
    assert server.call("PUT", f"{SHOP}/quota", limits).status == 200
    rules = lambda name: server.call("POST", "/rules", {"name": name, "allow": []}, namespace="shop")  # noqa: E731
    assert [rules(name).status for name in "abc"] == [200, 200, 507]
    trust(server, "shop", "lab")
    for wrong, status in (("other", 507), ("x" * 100, 400), ("a/b", 400)):
        body = {"external_namespace": wrong}
        assert server.call("POST", f"{SHOP}/trust", body, namespace="shop").status == status, wrong
    link = guest(server, "shop", lan(server, "shop")["uuid"])["interfaces"][0]["uuid"]
    publish = lambda ports: server.call(  # noqa: E731
        "POST", f"/interfaces/{link}/publish", {"ports": ports}, namespace="shop"
    )
    assert [publish(ports).status for ports in ("8080:80", "9000-9001:1-2", "7000:7")] == [200, 200, 507]
    assert server.instance("fat", metadata={"a": "x" * 70_000}).status == 400
    assert server.instance("fit", metadata={"a": "x" * 60_000}).status == 200
    since = {"mirror": "https://mirror.example"}
    monkeypatch.setattr(server.services.controller, "stores", lambda: since)  # a remote, added since
    assert server.call("POST", "/auth/namespaces", {"namespace": "mirror"}).status == 409


def test_a_store_or_state_that_is_away_keeps_no_other_waiting_than_who_asks_it(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    back, began, state, in_time = threading.Event(), threading.Event(), server.services.store, list[bool]()
    get = state.get

    def slow(key: str) -> Any:
        if key.endswith("/slow"):
            began.set()
            in_time.append(back.wait(10))
        return get(key)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(state, "get", slow)
        paths = "/instances/slow/consoledata", "/networks/slow/ping/10.0.0.2"
        asked = [pool.submit(server.call, "GET", path) for path in paths]
        assert began.wait(20) and server.call("GET", "/livez").status == 200
        back.set()
        assert {one.result().status for one in asked} == {404} and all(in_time), "the event loop waited"
    back.clear()

    def away(namespace: str, **_: Any) -> None:
        back.wait(20)
        raise NotFound("gone")

    monkeypatch.setattr(server.services.namespaces, "find", away)
    with ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(server.call, "GET", f"{SHOP}/quota", namespace="shop") for _ in range(60)]
        try:
            assert server.call("GET", "/networks", namespace="lab").status == 200
            assert not any(one.done() for one in asked)
        finally:
            back.set()
