"""The agents' listener: what one node does, or leaves undone, costs no other anything."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from compute.api import agents
from compute.api.agents import Mailbox
from compute.api.context import Services
from compute.cluster.auth import Authority
from compute.cluster.controller import Controller
from compute.cluster.images.stores import NamespaceStores
from compute.cluster.records import nodes
from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import Node
from compute.cluster.records.taken import store_token
from compute.cluster.records.transaction import Transaction, transact
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import NotFound, Unavailable
from imagestore import ImageCache


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    with closing(SqliteStore(tmp_path / "sf.db")) as store:
        config = Config(state_dir=tmp_path, guests=False)
        own = NamespaceStores(store, lambda: "", tmp_path)
        images = ImageCache(tmp_path / "cache", {})
        yield Services(config, store, Controller(store, "0123abcd", config), Authority(store), images, own)


def test_a_state_that_answers_one_node_slowly_holds_up_no_other(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, go_on = services.store, threading.Event()
    get = store.get

    def slow(key: str) -> Any:
        assert key != "node/slow" or go_on.wait(20), "nobody else was answered meanwhile"
        return get(key)

    monkeypatch.setattr(store, "get", slow)

    async def story() -> None:
        app = httpx.ASGITransport(agents.build(services), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=app, base_url="http://server") as client:

            async def ask(name: str) -> int:
                told = {"Authorization": f"Node {name}:secret"}
                return (await client.post("/agent/v1/renew", headers=told)).status_code

            waits = asyncio.create_task(ask("slow"))
            await asyncio.sleep(0)
            assert await ask("other") == 401
            go_on.set()
            assert await waits == 401

    asyncio.run(story())


def test_a_lease_is_renewed_whatever_fills_all_other_threads_and_a_node_says_one_thing_at_a_time(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def joined(txn: Transaction) -> tuple[Node, str]:
        return nodes.join(txn, nodes.make_token(txn, b"x" * 32).secret, "n1")

    _, identity = transact(services.store, joined)
    go_on, here, at_once = threading.Event(), 0, list[int]()

    async def said(*_: Any) -> None:
        nonlocal here
        here += 1
        at_once.append(here)
        await asyncio.sleep(0.05)
        here -= 1

    monkeypatch.setattr(services.controller, "inventory", said)

    async def story() -> None:
        app = httpx.ASGITransport(agents.build(services), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=app, base_url="http://server") as client:
            busy = [asyncio.create_task(asyncio.to_thread(go_on.wait, 20)) for _ in range(64)]
            busy += [asyncio.create_task(anyio.to_thread.run_sync(go_on.wait, 20)) for _ in range(64)]
            await asyncio.sleep(0)
            told = {"Authorization": f"Node n1:{identity}"}
            assert (await client.post("/agent/v1/renew", headers=told)).status_code == 200
            go_on.set()
            assert all(await asyncio.gather(*busy)), "it waited for them"
            seen = {"seen": {"machine": "m", "epoch": "", "reached": 0}}
            asked = (client.post("/agent/v1/inventory", headers=told, json=seen) for _ in range(3))
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 3
            assert at_once == [1, 1, 1]

    asyncio.run(story())


def test_a_namespaces_store_that_is_away_fills_none_of_the_threads_that_nodes_are_led_by(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    def joined(txn: Transaction) -> str:
        nodes.join(txn, nodes.make_token(txn, b"x" * 32).secret, "n1")
        disks: Any = {"cpus": 1, "memory_mib": 64, "disks": ()}
        txn.create(Instance(uuid="u", name="web", namespace="shop", node="n1", **disks))
        return store_token(txn, "n1")

    told, go_on, asked = ("n1", transact(services.store, joined)), threading.Event(), threading.Semaphore(0)

    def away(_: str) -> None:
        asked.release()
        go_on.wait(20)
        raise NotFound("it is away")

    monkeypatch.setattr(services.namespaces, "find", away)

    async def story() -> None:
        app = httpx.ASGITransport(agents.build(services), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=app, base_url="http://server", auth=told) as client:
            get = partial(client.get, "/agent/v1/stores/my%2Fshop/store.json", timeout=60)
            waits = [asyncio.create_task(get()) for _ in range(64)]
            while not asked.acquire(blocking=False):
                await asyncio.sleep(0.01)
            try:
                await asyncio.wait_for(asyncio.gather(*(asyncio.to_thread(int) for _ in range(64))), 10)
            finally:
                go_on.set()
            assert {answer.status_code for answer in await asyncio.gather(*waits)} == {404}

    asyncio.run(story())


def test_what_a_node_never_fetches_is_not_kept_and_orders_come_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        box = Mailbox("n1")
        monkeypatch.setattr(agents, "_ANSWER_S", 0.0)
        for _ in range(3):
            with pytest.raises(Unavailable, match="n1"):
                await box.operations.console("u", 1)
        assert not box._asked
        monkeypatch.setattr(agents, "_ANSWER_S", 20.0)
        asked = [asyncio.create_task(box.operations.console("u", n)) for n in (1, 2)]
        waits = asyncio.create_task(box.fetch(20))
        orders = await waits
        assert [order["arguments"] for order in orders] == [["u", 1], ["u", 2]]
        assert await box.fetch(0) == []
        for order in orders:
            box.answer(order["id"], agents.AnswerBody(result="b2s="))
        assert await asyncio.gather(*asked) == [b"ok", b"ok"]

    asyncio.run(story())
