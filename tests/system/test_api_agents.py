"""Joining another machine and serving it: real TLS with a pinned certificate, real long polls, a played node."""

import asyncio
import base64
import hashlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from compute.api import agents
from compute.cluster import liveness
from compute.cluster.certificates import certificate
from compute.cluster.records.transaction import transact
from compute.config import Config
from compute.wire.codec import from_plain, to_plain
from compute.wire.spec import InstanceState, InstanceStatus, JoinToken, NodeDesired, NodeFacts
from tests.api_server import Running, running


class FarAgent:
    """A machine that joined; every call checks the pinned fingerprint first."""

    def __init__(self, address: tuple[str, int], token: str, name: str) -> None:
        self.address, self.token, self.name, self.identity = address, JoinToken.parse(token), name, ""

    def call(self, verb: str, path: str, body: Any = None) -> tuple[int, Any]:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        link = http.client.HTTPSConnection(*self.address, timeout=30, context=context)
        link.connect()
        seen = link.sock.getpeercert(binary_form=True)  # type: ignore[union-attr]
        assert hashlib.sha256(seen or b"").digest() == self.token.fingerprint
        headers = {"Authorization": f"Node {self.name}:{self.identity}", "Content-Type": "application/json"}
        link.request(verb, f"/agent/v1/{path}", json.dumps(body) if body is not None else None, headers)
        answer = link.getresponse()
        found = json.loads(answer.read())
        link.close()
        return answer.status, found

    def join(self) -> tuple[int, Any]:
        status, found = self.call("POST", "join", {"token": self.token.secret, "name": self.name})
        self.identity = found.get("identity", "")
        return status, found

    def register(self, address: str = "") -> None:
        address = address or f"192.0.2.{self.name[-1]}"
        facts = to_plain(NodeFacts(cpus=8, memory_mib=16384, address=address, mtu_bytes=1400))
        assert self.call("POST", "register", {"facts": facts})[0] == 200

    def desired(self, after: int = 0, wait: float = 0) -> NodeDesired:
        status, found = self.call("GET", f"desired?after={after}&wait={wait}")
        assert status == 200, found
        return from_plain(NodeDesired, found)

    def report(self, *statuses: InstanceStatus) -> int:
        return self.call("POST", "report", {"statuses": [to_plain(s) for s in statuses]})[0]


@contextmanager
def listening(server: Running) -> Iterator[tuple[str, int]]:
    """The agents' listener, beside the API, in the server's loop."""
    cert, key, _ = certificate(server.services.config.state_dir / "auth")
    sock = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(
        agents.build(server.services),
        log_level="warning",
        lifespan="off",
        ssl_certfile=cert,
        ssl_keyfile=key,
        timeout_graceful_shutdown=1,
    )
    far = uvicorn.Server(settings)
    far.capture_signals = lambda: _nothing()  # type: ignore[method-assign]
    done = asyncio.run_coroutine_threadsafe(far.serve([sock]), server.loop)
    try:
        yield sock.getsockname()
    finally:
        far.should_exit = True
        done.result(30)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    directory = tmp_path / "state"
    config = Config(state_dir=directory, node_name="node1", agent_listen="192.0.2.1:13001")
    with running(directory, config=config) as found:
        yield found


@pytest.fixture
def address(server: Running) -> Iterator[tuple[str, int]]:
    with listening(server) as found:
        yield found


def joined(server: Running, address: tuple[str, int], name: str = "node2") -> FarAgent:
    agent = FarAgent(address, server.call("POST", "/nodes/token").body["token"], name)
    assert agent.join()[0] == 200
    agent.register()
    return agent


def test_a_token_is_good_once_and_only_where_its_fingerprint_is_met(
    server: Running, address: tuple[str, int]
) -> None:
    token = server.call("POST", "/nodes/token").body["token"]
    first = FarAgent(address, token, "node2")
    status, found = first.join()
    assert (status, found["node"], found["installation"]) == (200, "node2", "0123abcd")
    assert FarAgent(address, token, "node3").join()[0] == 403
    changed = str(JoinToken(b"\0" * 32, first.token.secret))
    with pytest.raises(AssertionError):
        FarAgent(address, changed, "node3").join()
    other = FarAgent(address, server.call("POST", "/nodes/token").body["token"], "node2")
    assert other.join()[0] == 409
    stored = b"".join(record.value for record in server.services.store.list(""))
    assert found["identity"].encode() not in stored
    assert first.token.secret.encode() not in stored


def test_an_old_token_is_refused(
    server: Running, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = server.call("POST", "/nodes/token").body["token"]
    monkeypatch.setattr("compute.cluster.records.nodes.TOKEN_S", -1)
    assert FarAgent(address, token, "node2").join()[0] == 403


def test_nobody_speaks_for_a_node_without_its_secret(server: Running, address: tuple[str, int]) -> None:
    agent = joined(server, address)
    thief = FarAgent(address, str(agent.token), "node2")
    thief.identity = "guessed"
    assert thief.call("GET", "desired")[0] == 401
    thief.name, thief.identity = "node1", ""
    assert thief.call("GET", "desired")[0] == 401
    assert thief.call("GET", "../../instances")[0] == 404


def test_an_instance_placed_on_a_far_node_runs_there_and_meets_its_network(
    server: Running, address: tuple[str, int]
) -> None:
    agent = joined(server, address)
    server.network()
    before = agent.desired()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(agent.desired, before.revision, 20)
        uuid = server.instance(network="lan", placed_on="node2").body["uuid"]
        seen = waiting.result(30)
    assert [i.uuid for i in seen.instances] == [uuid]
    lan = seen.networks.networks[0]
    assert (lan.router_node, lan.mtu_bytes) == ("node1", 1400)
    assert [(p.node, p.tap != "") for p in lan.ports] == [("node2", True)]
    assert [str(p.address) for p in seen.networks.peers] == ["127.0.0.1"]
    assert str(seen.networks.underlay) == "192.0.2.2"
    near = server.agent.desired
    assert near is not None
    assert [p.node for p in near.networks.peers] == ["node2"]
    assert agent.report(InstanceStatus(uuid, InstanceState.CREATED, "on")) == 200
    assert server.get("/instances/web")["state"] == "created"
    stranger = joined(server, address, "node3")
    assert stranger.report(InstanceStatus(uuid, InstanceState.CREATED, "crashed")) == 200
    assert server.get("/instances/web")["power_state"] == "on"


def test_the_console_of_a_far_guest_is_asked_for_and_answered(
    server: Running, address: tuple[str, int]
) -> None:
    agent = joined(server, address)
    uuid = server.instance(placed_on="node2").body["uuid"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.get, f"/instances/{uuid}/consoledata", {"length": 5})
        status, orders = agent.call("GET", "operations?wait=20")
        assert (status, orders[0]["verb"], orders[0]["arguments"]) == (200, "console", [uuid, 5])
        result = base64.b64encode(b"hello").decode()
        assert agent.call("POST", f"operations/{orders[0]['id']}", {"result": result})[0] == 200
        assert waiting.result(30) == b"hello"
        waiting = pool.submit(server.call, "DELETE", f"/instances/{uuid}/consoledata")
        _, orders = agent.call("GET", "operations?wait=20")
        agent.call("POST", f"operations/{orders[0]['id']}", {"error": "no such instance"})
        assert waiting.result(30).status == 404


def test_a_node_that_goes_silent_loses_its_routers_and_gets_nothing_new(
    server: Running, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "LEASE_S", 0.5)
    agent = joined(server, address)
    assert agent.call("POST", "renew") == (200, {"fence_s": 8.0, "guests_s": 20.0})
    for number in range(2):
        server.network(f"lan{number}", f"10.{number}.0.0/24")
    routers = {server.get(f"/networks/lan{number}")["router_node"] for number in range(2)}
    assert routers == {"node1", "node2"}
    task = asyncio.run_coroutine_threadsafe(server.keep_up(), server.loop)
    done = threading.Event()
    for _ in range(500):
        if {server.get(f"/networks/lan{number}")["router_node"] for number in range(2)} == {"node1"}:
            break
        done.wait(0.02)
    task.cancel()
    assert {n["router_node"] for n in server.get("/networks")} == {"node1"}
    assert server.get("/nodes/node2")["state"] == "missing"
    assert server.instance("a", placed_on="node2").status == 507
    agent.call("POST", "renew")
    assert server.get("/nodes/node2")["state"] == "created"
    assert server.instance("a", placed_on="node2").status == 200


def test_a_drained_node_keeps_its_guests_and_loses_its_routers(
    server: Running, address: tuple[str, int]
) -> None:
    joined(server, address)
    server.network("a", "10.1.0.0/24")
    server.network("b", "10.2.0.0/24")
    uuid = server.instance(placed_on="node2").body["uuid"]
    assert server.call("POST", "/nodes/node2/drain").body["state"] == "drained"
    assert {n["router_node"] for n in server.get("/networks")} == {"node1"}
    assert server.get(f"/instances/{uuid}")["node"] == "node2"
    assert server.instance("b", placed_on="node2").status == 507
    assert server.call("DELETE", "/nodes/node2").status == 409
    assert server.call("POST", "/nodes/node2/undrain").body["state"] == "created"
    assert server.instance("b", placed_on="node2").status == 200


def test_a_removed_node_is_forgotten_with_its_guests_and_may_join_again(
    server: Running, address: tuple[str, int]
) -> None:
    agent = joined(server, address)
    server.network()
    uuid = server.instance(network="lan", placed_on="node2").body["uuid"]
    transact(server.services.store, lambda txn: txn.writes.update({"alive/node2": None}))
    assert server.call("DELETE", "/nodes/node2").status == 200
    assert server.get(f"/instances/{uuid}")["state"] == "deleted"
    assert server.get("/networks/lan/interfaces") == []
    assert [n["name"] for n in server.get("/nodes")] == ["node1"]
    nothing = agent.desired()
    assert [(i.uuid, i.delete) for i in nothing.instances] == [(uuid, True)]
    assert agent.report(InstanceStatus(uuid, InstanceState.DELETED)) == 200
    nothing = agent.desired()
    assert (nothing.instances, nothing.networks.networks) == ((), ())
    assert agent.call("POST", "register", {"facts": to_plain(NodeFacts(1, 1))})[0] == 404
    joined(server, address)
    assert agent.call("GET", "desired")[0] == 401
    assert [n["name"] for n in server.get("/nodes")] == ["node1", "node2"]


def test_only_the_administrator_makes_tokens_and_only_where_agents_can_come(
    server: Running, tmp_path: Path
) -> None:
    server.call("POST", "/auth/namespaces", {"namespace": "shop", "key_name": "k", "key": "x"})
    server.tokens["shop"] = server.login("shop", "x").body["access_token"]
    assert server.call("POST", "/nodes/token", namespace="shop").status == 403
    with running(tmp_path / "other") as alone:
        assert alone.call("POST", "/nodes/token").status == 409


def test_a_stream_comes_from_the_node_that_was_asked_and_with_its_ticket_alone(
    server: Running, address: tuple[str, int]
) -> None:
    asked, rival = joined(server, address, "node2"), joined(server, address, "node3")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def come(ticket: str, name: str, identity: str) -> Any:
        return connect(
            f"wss://{address[0]}:{address[1]}/agent/v1/streams/{ticket}",
            ssl=context,
            additional_headers={"Authorization": f"Node {name}:{identity}"},
            proxy=None,
        )

    opening = asyncio.run_coroutine_threadsafe(
        server.services.controller.stream("node2", "exec", "uuid", {"argv": ["true"]}), server.loop
    )
    (order,) = asked.call("GET", "operations?wait=5")[1]
    assert order["verb"] == "stream" and order["arguments"][:3] == ["exec", "uuid", {"argv": ["true"]}]
    ticket = order["arguments"][3]
    for wrong in (
        (ticket, "node3", rival.identity),
        (ticket, "node2", rival.identity),
        ("x", "node2", asked.identity),
    ):
        with pytest.raises((InvalidStatus, ConnectionClosed)), come(*wrong) as socket:
            socket.recv(10)
    with come(ticket, "node2", asked.identity) as mine:
        asked.call("POST", f"operations/{order['id']}", {"result": None})
        stream = opening.result(10)
        asyncio.run_coroutine_threadsafe(stream.send(b"there"), server.loop).result(10)
        assert mine.recv(10) == b"there"
        mine.send('{"exit": 0}')
        assert asyncio.run_coroutine_threadsafe(stream.receive(), server.loop).result(10) == '{"exit": 0}'
        with pytest.raises((InvalidStatus, ConnectionClosed)), come(ticket, "node2", asked.identity) as again:
            again.recv(10)
        asyncio.run_coroutine_threadsafe(stream.aclose(), server.loop).result(10)
