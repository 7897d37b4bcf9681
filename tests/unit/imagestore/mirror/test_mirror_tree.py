"""The tree over ASGI, with a server that says when it would wait and when the client has hung up."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Object, ObjectStat
from imagestore.errors import Unavailable
from imagestore.mirror.tree import Tree
from tests.counted import Counted
from tests.memory import Memory

PACK = f"packs/ab/ab{62 * '0'}"
DATA = bytes(range(256)) * (20 << 10)


def ask(hang_up_after: int, tree: Tree | None = None) -> tuple[Counted, list[dict[str, Any]]]:
    """GET of a pack by a client who hangs up after so many messages: what was read, and the messages."""
    backend = Counted(Memory())
    backend.put(PACK, DATA)
    messages: list[dict[str, Any]] = []
    enough = asyncio.Event()

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)
        if len(messages) >= hang_up_after:
            enough.set()
        await asyncio.sleep(0)

    requests = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await enough.wait()
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": f"/{PACK}", "headers": []}
    asyncio.run((tree or Tree(backend))(scope, receive, send))
    return backend, messages


def test_every_piece_but_the_first_waits_until_the_one_before_is_taken() -> None:
    _, messages = ask(10_000)
    bodies = [message["body"] for message in messages if message["type"] == "http.response.body"]
    assert b"".join(bodies) == DATA
    assert [bool(body) for body in bodies] == [True, False] * (len(bodies) // 2) + [True]
    assert [message.get("more_body") for message in messages].count(False) == 1


def test_a_pack_that_was_served_takes_no_room_once_it_is_deleted(tmp_path: Path) -> None:
    store = Directory(tmp_path)
    store.put(PACK, DATA)
    tree = Tree(store)
    _, messages = ask(10_000, tree)
    assert b"".join(message.get("body", b"") for message in messages) == DATA
    assert not any(path.resolve() == tmp_path / PACK for path in Path("/proc/self/fd").iterdir())


def test_nothing_more_is_read_for_a_client_that_has_hung_up() -> None:
    backend, messages = ask(4)
    assert backend.received_bytes < len(DATA) / 2
    assert messages[-1]["more_body"]


def test_what_a_client_is_not_told_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Gone(Memory):
        def stat(self, key: str) -> ObjectStat:
            raise Unavailable("the bucket's server is away")

    sent: list[Any] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": f"/{PACK}", "headers": []}
    asyncio.run(Tree(Gone())(scope, receive, send))
    assert sent[0]["status"] == 503 and b"bucket" not in sent[1]["body"]
    assert "the bucket's server is away" in caplog.text


def test_a_store_that_fails_in_the_middle_of_an_answer_begins_no_second_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Short(Memory):
        def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
            if start:
                raise Unavailable("the bucket's server is away")
            return super().get(key, start, length)

    backend, sent = Short(), list[dict[str, Any]]()
    backend.put(PACK, DATA)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    scope = {"type": "http", "method": "GET", "path": f"/{PACK}", "headers": []}
    asyncio.run(Tree(backend)(scope, receive, send))
    assert [message["status"] for message in sent if message["type"] == "http.response.start"] == [200]
    assert all(message.get("more_body", True) for message in sent), "a client would take it for whole"
    assert "the bucket's server is away" in caplog.text


def test_a_store_that_does_not_answer_takes_no_thread_of_the_loops_own() -> None:
    """E, of its whole kind: beside the tree a server renews its nodes' leases."""
    back = threading.Event()

    class Away(Memory):
        def stat(self, key: str) -> ObjectStat:
            assert back.wait(60)
            return super().stat(key)

    async def send(message: dict[str, Any]) -> None: ...

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def story() -> None:
        tree = Tree(Away())
        scope = {"type": "http", "method": "GET", "path": f"/{PACK}", "headers": []}
        asked = [asyncio.create_task(tree(scope, receive, send)) for _ in range(100)]
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            assert await asyncio.to_thread(lambda: "renewed") == "renewed"
        assert not any(one.done() for one in asked)
        back.set()
        await asyncio.gather(*asked)

    asyncio.run(story())
