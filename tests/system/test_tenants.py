"""What tenants of one server can do to each other: nothing that the other did not ask for."""

import base64
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compute.agent.guest.console import ConsoleLog
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.transaction import transact
from tests.api_server import Running, running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    """With two tenants, shop and lab."""
    with running(tmp_path / "state") as found:
        for name in ("shop", "lab"):
            tenant(found, name)
        yield found


def tenant(server: Running, name: str) -> None:
    body = {"namespace": name, "key_name": "first", "key": f"key-{name}"}
    assert server.call("POST", "/auth/namespaces", body).status == 200
    server.tokens[name] = server.login(name, f"key-{name}").body["access_token"]


def trust(server: Running, who: str, whom: str, verb: str = "POST") -> None:
    path = f"/auth/namespaces/{who}/trust"
    body = {"external_namespace": whom} if verb == "POST" else None
    assert server.call(verb, path if body else f"{path}/{whom}", body, namespace=who).status == 200


def lan(server: Running, namespace: str, netblock: str = "10.1.0.0/24") -> Any:
    body = {"name": "lan", "netblock": netblock}
    answer = server.call("POST", "/networks", body, namespace=namespace)
    assert answer.status == 200, answer.body
    return answer.body


def guest(server: Running, namespace: str, network: str, name: str = "web") -> Any:
    answer = server.instance(name, network, as_namespace=namespace)
    assert answer.status == 200, answer.body
    return answer.body


def test_a_trust_that_nobody_asked_for_changes_no_name_of_whom_it_names(server: Running) -> None:
    """F1"""
    mine, theirs = lan(server, "lab"), lan(server, "shop")
    trust(server, "shop", "lab")
    assert [n["uuid"] for n in server.get("/networks", namespace="lab")] == [mine["uuid"]]
    assert server.get("/networks/lan", namespace="lab")["uuid"] == mine["uuid"]
    assert server.call("DELETE", "/networks/lan", namespace="lab").status == 200
    gone = server.call("DELETE", "/networks/lan", namespace="lab")
    assert gone.status == 404 and gone.body["hint"] == "another namespace's is shop/lan"
    assert server.get(f"/networks/{theirs['uuid']}", namespace="shop")["state"] == "created"


def test_what_another_namespace_has_is_seen_when_it_is_said(server: Running) -> None:
    """F1"""
    theirs = lan(server, "shop")
    web = guest(server, "shop", "lan")
    for said in ("/networks/shop%2Flan", "/networks/shop%2flan"):
        assert server.call("GET", said, namespace="lab").status == 404
    assert server.get("/networks/shop%2Flan")["uuid"] == theirs["uuid"]
    trust(server, "shop", "lab")
    assert server.get("/networks/shop%2Flan", namespace="lab")["uuid"] == theirs["uuid"]
    assert server.get("/networks/shop%2Flan/addresses", namespace="lab")
    assert server.get("/instances/shop%2Fweb/interfaces", namespace="lab")[0]["instance_uuid"] == web["uuid"]
    assert guest(server, "lab", "shop/lan", "beside")["interfaces"][0]["network_uuid"] == theirs["uuid"]


def test_a_tenants_web_does_not_make_the_administrators_ambiguous(server: Running) -> None:
    """I: ambiguous web"""
    lan(server, "shop")
    guest(server, "shop", "lan")
    system = server.instance("web").body
    assert server.get("/instances/web")["uuid"] == system["uuid"]
    assert len(server.get("/instances")) == 2


def test_who_is_trusted_has_no_hand_in_keys_and_trust(server: Running) -> None:
    """F2"""
    trust(server, "shop", "lab")
    base = "/auth/namespaces/shop"
    for verb, path, body in (
        ("POST", "keys", {"key_name": "back", "key": "door"}),
        ("PUT", "keys", {"key_name": "first", "key": "door"}),
        ("PUT", "keys/first", {"key": "door"}),
        ("DELETE", "keys/first", None),
        ("POST", "trust", {"external_namespace": "lab"}),
        ("DELETE", "trust/lab", None),
    ):
        assert server.call(verb, f"{base}/{path}", body, namespace="lab").status == 403, (verb, path)
    trust(server, "shop", "lab", "DELETE")
    assert server.get(f"{base}/keys", namespace="shop") == ["first"]
    assert server.call("POST", f"{base}/keys", {"key_name": "b", "key": "x"}, namespace="shop").status == 200
    assert server.call("DELETE", f"{base}/keys/b").status == 200


def test_trust_ends_with_the_namespace_that_it_named(server: Running) -> None:
    """F3"""
    trust(server, "shop", "lab")
    assert server.call("DELETE", "/auth/namespaces/lab").status == 200
    assert server.get("/auth/namespaces/shop")["trust"] == {"full": []}
    # As version 0.1 left it, and as a tenant may say of a name that is not there yet:
    left = Namespace(name="old", trust=("lab",))
    transact(server.services.store, lambda txn: txn.create(left))
    trust(server, "shop", "lab")
    tenant(server, "lab")
    assert server.get("/auth/namespaces", namespace="lab") == [server.get("/auth/namespaces/lab")]


def test_a_stream_of_events_ends_with_its_key_and_with_its_trust(server: Running) -> None:
    """F4"""
    lan(server, "shop")
    trust(server, "shop", "lab")
    for who, end in (
        ("lab", lambda: trust(server, "shop", "lab", "DELETE")),
        ("shop", lambda: server.call("DELETE", "/auth/namespaces/shop/keys/first")),
    ):
        headers = {"Authorization": f"Bearer {server.tokens[who]}"}
        path = f"{server.url}/networks/shop%2Flan/events?follow=true"
        with urllib.request.urlopen(urllib.request.Request(path, headers=headers), timeout=30) as stream:
            assert stream.readline().startswith(b"id: ")
            end()
            assert b"metadata" not in stream.read()  # to its end, which now comes


def test_the_old_part_of_a_console_is_its_owners_alone(tmp_path: Path) -> None:
    """F5"""
    log = tmp_path / "console.log"
    log.write_bytes(b"x" * 100)
    assert ConsoleLog(log, 100).cut()
    assert (tmp_path / "console.log.old").stat().st_mode & 0o777 == 0o600


def test_a_former_friends_guest_can_be_unplugged_by_the_networks_owner(server: Running) -> None:
    """F6"""
    net = lan(server, "shop")
    trust(server, "shop", "lab")
    web = guest(server, "lab", "shop/lan")
    server.wait_for(f"/instances/{web['uuid']}", "created")
    trust(server, "shop", "lab", "DELETE")
    seen = server.get("/networks/lan/interfaces", namespace="shop")
    assert [i["instance_uuid"] for i in seen] == [web["uuid"]]
    assert server.call("GET", f"/instances/{web['uuid']}", namespace="shop").status == 404
    other = f"/interfaces/{seen[0]['uuid']}"
    tenant(server, "third")
    assert server.call("DELETE", other, namespace="third").status == 404
    assert server.call("DELETE", other, namespace="shop").status == 200
    assert server.call("DELETE", f"/networks/{net['uuid']}", namespace="shop").status == 200


def test_a_log_in_does_not_tell_which_namespaces_there_are(server: Running) -> None:
    """F7"""
    answers = [server.login(name, "guessed") for name in ("shop", "nobodys")]
    words = [re.sub("shop|nobodys", "N", answer.body["error"]) for answer in answers]
    assert words[0] == words[1] and {answer.status for answer in answers} == {401}
    trust(server, "shop", "nobodys")
    body = {"external_namespace": "nobodys"}
    assert server.call("POST", "/auth/namespaces/shop/trust", body).status == 400


def test_metrics_ask_for_the_administrators_key(server: Running) -> None:
    """F8"""

    def scrape(user: str, key: str) -> int:
        basic = base64.b64encode(f"{user}:{key}".encode()).decode()
        return server.call(
            "GET", "/metrics", namespace="", headers={"Authorization": f"Basic {basic}"}
        ).status

    assert server.call("GET", "/metrics", namespace="").status == 401
    assert server.call("GET", "/metrics", namespace="shop").status == 403
    assert (scrape("system", server.key), scrape("system", "x"), scrape("shop", "key-shop")) == (
        200,
        401,
        403,
    )
    assert server.call("GET", "/metrics").status == 200
    assert json.dumps(
        server.call("GET", "/metrics", namespace="", headers={"Authorization": "Basic é"}).status
    )


def test_snapshots_and_backups_are_their_namespaces_alone_and_only_the_administrator_names_a_store(
    server: Running,
) -> None:
    web = guest(server, "shop", lan(server, "shop")["uuid"])
    path = f"/instances/{web['uuid']}"
    assert server.wait_for(path, "created")
    rule = {"every": 86400, "daily": 7}
    assert server.call("PUT", f"{path}/backup", {**rule, "store": "/etc"}, namespace="shop").status == 403
    assert server.call("PUT", f"{path}/backup", {"every": 1}, namespace="shop").status == 400
    assert server.call("PUT", f"{path}/backup", rule, namespace="shop").body["keep"]["daily"] == 7
    assert [r["name"] for r in server.get("/backups", namespace="shop")] == ["web"]
    assert server.get("/backups", namespace="lab") == []
    tries = [
        ("GET", "snapshot"),
        ("POST", "snapshot"),
        ("POST", "backup"),
        ("PUT", "backup"),
        ("DELETE", "backup"),
    ]
    tries += [("DELETE", "snapshot/20260101-000000"), ("POST", "restore")]
    for verb, what in tries:
        body = {**rule} if verb == "PUT" else {"image": "my/web"} if what == "restore" else None
        assert server.call(verb, f"{path}/{what}", body, namespace="lab").status == 404, (verb, what)
    assert server.call("POST", f"{path}/restore", {"image": "shop/web:1"}, namespace="shop").status == 404
    for who in ("shop", "lab"):  # nodes are the administrator's, and moving turns the guest off
        assert server.call("POST", f"{path}/migrate", {}, namespace=who).status == 403
    assert server.call("DELETE", f"{path}/snapshot/20260101-000000", namespace="shop").status == 404
    assert server.call("DELETE", f"{path}/backup", namespace="shop").status == 200
    assert server.get("/backups", namespace="shop") == []
