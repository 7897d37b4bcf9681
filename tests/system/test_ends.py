"""Guests that end by themselves: when their time is up, when whoever made them falls silent, when they are off."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compute.cluster.records import epochs
from compute.cluster.records.nodes import booted
from compute.cluster.records.transaction import transact
from tests import api_server, invariants
from tests.api_server import Running
from tests.system.machine import within


@contextmanager
def serving(directory: Path) -> Iterator[Running]:
    """A server that does what a server does without being asked."""
    with api_server.running(directory) as server:
        task: Future[Any] = asyncio.run_coroutine_threadsafe(server.keep_up(), server.loop)
        yield server
        task.cancel()
        invariants.check(server.services.store)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path / "state") as found:
        yield found


def made(server: Running, name: str, **more: Any) -> str:
    answer = server.instance(name, **more)
    assert answer.status == 200, answer.body
    return str(server.wait_for(f"/instances/{answer.body['uuid']}", "created")["uuid"])


def said(server: Running, uuid: str) -> list[str]:
    return [event["message"] for event in server.get(f"/instances/{uuid}/events")]


def test_what_has_a_time_is_gone_when_it_is_up_also_after_the_server_was_away(tmp_path: Path) -> None:
    with serving(tmp_path / "state") as server:
        short, late, stays = (
            made(server, "short", ttl=1.5),
            made(server, "late", ttl=3),
            made(server, "stays"),
        )
        assert 0 < server.get("/instances/late")["until"] - time.time() < 3
        assert server.get("/instances/stays")["until"] is None
        longer = server.call("PATCH", "/instances/short", {"ttl": 3600}).body["until"]
        assert longer > time.time() + 3000
        assert server.call("PATCH", "/instances/short", {"ttl": 0}).body["until"] is None
        gone = made(server, "gone", ttl=0.5)
        server.wait_for(f"/instances/{gone}", "deleted")
        assert "deleted by itself: its time is up" in said(server, gone)
        for wrong in (-1, 1e30, "x", float("inf")):
            assert server.instance("wrong", ttl=wrong).status == 400
            assert server.call("PATCH", "/instances/stays", {"ttl": wrong}).status == 400
        assert server.call("PATCH", f"/instances/{gone}", {"ttl": 60}).status == 409
    time.sleep(max(0.0, 3 - 0.5))
    with serving(tmp_path / "state") as server:
        server.wait_for(f"/instances/{late}", "deleted")
        assert {one["uuid"] for one in server.get("/instances")} == {short, stays}


def test_a_time_can_be_given_to_one_that_is_not_created_yet(server: Running) -> None:
    server.agent.stalled.add("slow")
    uuid = server.instance("slow").body["uuid"]
    assert server.call("PATCH", "/instances/slow", {"cpus": 2}).status == 406
    assert server.call("PATCH", "/instances/slow", {"ttl": 0.3}).status == 200
    server.agent.stalled.clear()
    server.wait_for(f"/instances/{uuid}", "deleted")


def test_what_its_maker_holds_is_gone_when_the_maker_falls_silent(server: Running) -> None:
    held = made(server, "held", lease=5)
    kept = made(server, "kept", lease=5)
    assert server.get("/instances/held")["held_until"] > time.time()
    assert server.call("POST", "/instances/kept/lease", {"seconds": 0}).body == {"held_until": None}
    end = time.monotonic() + 3
    while time.monotonic() < end:
        assert server.call("POST", "/instances/held/lease", {"seconds": 1.5}).status == 200
        time.sleep(0.4)
    assert server.get("/instances/held")["state"] == "created"
    server.wait_for(f"/instances/{held}", "deleted")
    assert "deleted by itself: whoever made it has fallen silent" in said(server, held)
    assert server.get(f"/instances/{kept}")["state"] == "created"
    assert server.call("POST", f"/instances/{held}/lease", {"seconds": 5}).status == 409
    for wrong in (-1, 3601, "x"):
        assert server.call("POST", "/instances/kept/lease", {"seconds": wrong}).status == 400


def test_an_ephemeral_guest_is_gone_when_it_is_off_and_with_its_machine(server: Running) -> None:
    brief, other = made(server, "brief", ephemeral=True), made(server, "other")
    again = made(server, "again", ephemeral=True)
    for name in ("brief", "other"):
        server.call("POST", f"/instances/{name}/poweroff")
    server.wait_for(f"/instances/{brief}", "deleted")
    assert "deleted by itself: it is off, and ephemeral" in said(server, brief)
    assert server.get(f"/instances/{other}")["state"] == "created"
    transact(server.services.store, lambda txn: booted(txn, "node1"))
    server.wait_for(f"/instances/{again}", "deleted")


def test_nothing_ends_while_it_is_not_known_whether_the_state_is_the_newest(server: Running) -> None:
    def begin(txn: Any) -> None:
        epochs.begin(txn, ["node2"], "a test")

    uuid = made(server, "web", ttl=0.5)
    transact(server.services.store, begin)
    time.sleep(1.2)
    assert server.get(f"/instances/{uuid}")["state"] == "created"
    transact(server.services.store, lambda txn: epochs.heard(txn, "node2"))
    within(20, lambda: server.get(f"/instances/{uuid}")["state"] == "deleted", "it is gone")


def test_another_tenant_neither_holds_nor_lengthens_what_is_not_its_own(server: Running) -> None:
    server.call(
        "POST", "/auth/namespaces", {"namespace": "shop", "key_name": "k", "key": "a-long-enough-key-1"}
    )
    uuid = made(server, "web", ttl=3600)
    for call in (
        ("PATCH", f"/instances/{uuid}", {"ttl": 0}),
        ("POST", f"/instances/{uuid}/lease", {"seconds": 5}),
    ):
        assert server.call(*call, namespace="shop", key="a-long-enough-key-1").status == 404
