"""The API's streams: who may open one, how many, and when it ends. The node is played and says everything back."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from compute.api import streams
from tests.api_server import Running, running
from tests.system.machine import within


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("streams")) as found:
        network = found.network()["uuid"]
        made = found.instance("web", network).body
        found.wait_for(f"/instances/{made['uuid']}", "created")
        for name in ("shop", "rival"):
            found.call("POST", "/auth/namespaces", {"namespace": name, "key_name": "k", "key": f"{name}-key"})
            found.tokens[name] = found.login(name, f"{name}-key").body["access_token"]
        yield found


@contextmanager
def _open(
    server: Running, path: str, asked: Any = None, *, namespace: str = "system", **headers: str
) -> Iterator[ClientConnection]:
    server.get("/instances")
    sent = {"Authorization": f"Bearer {server.tokens[namespace]}", **headers}
    with connect(f"ws{server.url.removeprefix('http')}{path}", additional_headers=sent, proxy=None) as socket:
        with suppress(ConnectionClosed):  # refused before it asked
            socket.send(asked if isinstance(asked, bytes | str) else json.dumps(asked or {}))
        yield socket


def _refusal(socket: ClientConnection) -> dict[str, str]:
    said: dict[str, str] = json.loads(socket.recv(10))
    assert "error" in said
    with pytest.raises(ConnectionClosed):
        socket.recv(10)
    return said


def test_a_stream_reaches_the_guests_node_and_carries_both_ways(server: Running) -> None:
    uuid = server.get("/instances/web")["uuid"]
    with _open(server, "/instances/web/streams/exec", {"argv": ["true"]}) as socket:
        assert json.loads(socket.recv(10)) == ["exec", uuid, {"argv": ["true"]}]
        for message in (b"bytes", b"\0" * 300_000, '{"eof": true}'):
            socket.send(message)
            assert socket.recv(10) == message


def test_a_port_is_the_guests_own_and_no_other_address(server: Running) -> None:
    found = server.get("/instances/web")
    address, network = found["interfaces"][0]["ipv4"], found["interfaces"][0]["network_uuid"]
    with _open(server, "/instances/web/streams/connect", {"port": 22}) as socket:
        told = json.loads(socket.recv(10))
        assert told == ["connect", network, {"address": address, "also": "", "port": 22}]
    with _open(server, "/instances/web/streams/connect", {"port": 22, "address": "127.0.0.1"}) as socket:
        assert json.loads(socket.recv(10))[2]["address"] == address
    for asked in ({"port": 0}, {"port": "22"}, {"port": 70000}, {}):
        with _open(server, "/instances/web/streams/connect", asked) as socket:
            assert _refusal(socket)["kind"] == "Invalid"


@pytest.mark.parametrize("asked", ["[]", "no json", b"bytes", "[" * 50_000, '{"argv": NaN}'])
def test_a_first_message_that_says_nothing_is_refused(server: Running, asked: str | bytes) -> None:
    with _open(server, "/instances/web/streams/exec", asked) as socket:
        assert _refusal(socket)["kind"] == "Invalid"


def test_another_tenants_guest_is_not_found_and_a_foreign_page_refused(server: Running) -> None:
    with _open(server, "/instances/system%2Fweb/streams/console", namespace="rival") as socket:
        assert _refusal(socket)["kind"] == "NotFound"
    with _open(server, "/instances/web/streams/console", Origin="https://evil.example") as socket:
        assert _refusal(socket)["kind"] == "Denied"
    with _open(server, "/instances/web/streams/console", Authorization="Bearer nonsense") as socket:
        assert _refusal(socket)["kind"] == "Unauthenticated"
    with _open(server, "/instances/web/streams/console", Origin=server.url) as socket:
        assert json.loads(socket.recv(10))[0] == "console"


def test_a_stream_ends_with_its_key_and_with_its_guest(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_AGAIN_S", 0.05)
    made = server.instance("other", as_namespace="shop").body
    server.wait_for(f"/instances/{made['uuid']}", "created")
    with _open(server, "/instances/other/streams/console", namespace="shop") as socket:
        socket.recv(10)
        server.call("DELETE", "/auth/namespaces/shop/keys/k")
        assert _refusal(socket)["kind"] == "Unauthenticated"
    with _open(server, f"/instances/{made['uuid']}/streams/console") as socket:
        socket.recv(10)
        server.call("DELETE", f"/instances/{made['uuid']}")
        assert _refusal(socket)["kind"] == "Conflict"


def test_one_tenant_has_no_more_than_its_share_and_what_ends_makes_room(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_MOST_OF_ONE", 3)
    path = "/instances/web/streams/console"
    with ExitStack() as many:
        for _ in range(3):
            many.enter_context(_open(server, path)).recv(10)
        with _open(server, path) as socket:
            assert "too many" in _refusal(socket)["error"]
    within(10, lambda: not streams._open.total(), "all are forgotten")
    with _open(server, path) as socket:
        assert json.loads(socket.recv(10))[0] == "console"
