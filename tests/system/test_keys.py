"""Keys that end and keys that only read, and that events say whose key made a change, and from where."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from compute.api import streams
from compute.cluster.auth import ensure_local_key
from tests.api_server import Running, running

KEYS = "/auth/namespaces/shop/keys"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("keys")) as found:
        found.call("POST", "/auth/namespaces", {"namespace": "shop", "key_name": "own", "key": "own-key"})
        found.tokens["own"] = found.login("shop", "own-key").body["access_token"]
        yield found


def _add(server: Running, name: str, **more: Any) -> None:
    answer = server.call("POST", KEYS, {"key_name": name, "key": f"{name}-key", **more}, namespace="own")
    assert answer.status == 200, answer.body
    server.tokens[name] = server.login("shop", f"{name}-key").body["access_token"]


def _seen(server: Running) -> Any:
    return server.get("/auth/namespaces/shop", namespace="own")["about_keys"]


def test_a_key_that_only_reads_is_refused_by_every_call_that_changes(server: Running) -> None:
    _add(server, "reader", read_only=True)
    assert _seen(server)["reader"] == {"expires": None, "read_only": True}
    refused = 0
    for path, verbs in server.get("/openapi.json")["paths"].items():
        for verb in verbs.keys() - {"get"}:
            answer = server.call(verb.upper(), path.format_map(_Any()), {}, namespace="reader")
            if path == "/auth":
                assert answer.status == 400, "to log in asks for no key"
                continue
            # Some ask for their body first: nothing was done for them either.
            assert answer.status in (400, 403), (verb, path, answer.body)
            refused += answer.status == 403
    assert refused > 30
    answer = server.call("PUT", f"{KEYS}/own", {"key": "mine"}, namespace="reader")
    assert (answer.status, answer.body["error"]) == (403, "key reader of namespace shop may only read")
    for verb in ("PUT", "DELETE"):
        assert server.call(verb, "/stores/shop/packs/x", b"x", namespace="reader").status == 403
    for path in ("/instances", "/auth/namespaces/shop", KEYS, "/networks"):
        assert server.call("GET", path, namespace="reader").status == 200


class _Any(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "x"


def test_a_stream_is_a_change(server: Running) -> None:
    made = server.instance("read", as_namespace="own").body
    server.wait_for(f"/instances/{made['uuid']}", "created")
    _add(server, "watcher", read_only=True)
    with _stream(server, "watcher", f"/instances/{made['uuid']}/streams/console") as socket:
        assert json.loads(socket.recv(10))["kind"] == "Denied"


def test_a_key_that_is_changed_may_no_more_than_before(server: Running) -> None:
    _add(server, "laptop", read_only=True, ttl_s=1000)
    before = _seen(server)["laptop"]
    assert server.call("PUT", f"{KEYS}/laptop", {"key": "another"}, namespace="own").status == 200
    assert _seen(server)["laptop"] == before
    server.call(
        "PUT", f"{KEYS}/laptop", {"key": "another", "read_only": False, "ttl_s": 9000}, namespace="own"
    )
    now = _seen(server)["laptop"]
    assert now["expires"] > before["expires"] and not now["read_only"]
    for wrong in ({"ttl_s": 0}, {"ttl_s": -1}, {"ttl_s": 1e30}, {"ttl_s": "x"}, {"read_only": "perhaps"}):
        body = {"key_name": "odd", "key": "k", **wrong}
        assert server.call("POST", KEYS, body, namespace="own").status == 400, wrong


def test_with_a_key_its_tokens_and_streams_end(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_AGAIN_S", 0.05)
    made = server.instance("short", as_namespace="own").body
    server.wait_for(f"/instances/{made['uuid']}", "created")
    _add(server, "short", ttl_s=3)
    assert server.call("GET", "/instances", namespace="short").status == 200
    with _stream(server, "short", f"/instances/{made['uuid']}/streams/console") as socket:
        assert json.loads(socket.recv(10))[0] == "console"
        said = json.loads(socket.recv(30))
        assert said["kind"] == "Unauthenticated" and "expired" in said["error"]
        with pytest.raises(ConnectionClosed):
            socket.recv(10)
    assert server.call("GET", "/instances", namespace="short").status == 401
    answer = server.login("shop", "short-key")
    assert (answer.status, answer.body["error"]) == (401, "key short of namespace shop has expired")
    assert "short" in server.get(KEYS, namespace="own"), "it is shown until it is removed"


@contextmanager
def _stream(server: Running, who: str, path: str) -> Iterator[ClientConnection]:
    sent = {"Authorization": f"Bearer {server.tokens[who]}"}
    with connect(f"ws{server.url.removeprefix('http')}{path}", additional_headers=sent, proxy=None) as socket:
        with suppress(ConnectionClosed):
            socket.send("{}")
        yield socket


def test_the_event_of_a_change_says_whose_key_it_was_and_from_where(server: Running) -> None:
    made = server.instance("watched", as_namespace="own").body
    where = f"/instances/{made['uuid']}"
    server.wait_for(where, "created")
    proxied = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    assert server.call("POST", f"{where}/rebootsoft", namespace="own", headers=proxied).status == 200
    server.call("POST", f"{where}/metadata", {"key": "a", "value": 1})
    events = server.get(f"{where}/events")
    by = {e["message"]: (e["by"], e["from"]) for e in events}
    assert by["asked for; placed on node1"] == ("shop/own", "127.0.0.1")
    assert by["rebootsoft asked for"] == ("shop/own", "203.0.113.9, as a proxy says")
    assert by["metadata a changed"] == ("system/local", "127.0.0.1")
    assert None in {e["by"] for e in events}, "what the node did by itself is nobody's"
    assert "own-key" not in json.dumps(events)


def test_a_namespaces_events_say_who_made_and_removed_its_keys(server: Running) -> None:
    _add(server, "passing", ttl_s=60)
    server.call("DELETE", f"{KEYS}/passing")
    server.call("POST", "/auth/namespaces", {"namespace": "friend", "key_name": "k", "key": "friend-key"})
    server.tokens["friend"] = server.login("friend", "friend-key").body["access_token"]
    server.call("POST", "/auth/namespaces/shop/trust", {"external_namespace": "friend"}, namespace="own")
    events = server.get("/auth/namespaces/shop/events", namespace="own")
    said = {e["message"]: e["by"] for e in events}
    assert said["key passing added"] == "shop/own" and said["key passing removed"] == "system/local"
    assert said["created with key own"] == "system/local" and said["trusts friend"] == "shop/own"
    assert "passing-key" not in json.dumps(events)
    assert server.call("GET", "/auth/namespaces/shop/events", namespace="friend").status == 403
    server.call("DELETE", "/auth/namespaces/friend")
    server.call("POST", "/auth/namespaces", {"namespace": "friend"})
    assert [e["message"] for e in server.get("/auth/namespaces/friend/events")] == ["created"]


def test_a_local_key_that_may_not_all_is_made_anew_at_the_next_start(server: Running) -> None:
    path = server.services.config.state_dir / "auth/local-key"
    for less in ({"ttl_s": 1000}, {"read_only": True}):
        body = {"key": server.key, **less}
        assert server.call("PUT", "/auth/namespaces/system/keys/local", body).status == 200
        server.tokens.pop("system")
        ensure_local_key(server.services.store, path)
        about = server.get("/auth/namespaces/system")["about_keys"]["local"]
        assert about == {"expires": None, "read_only": False}
