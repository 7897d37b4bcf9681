"""The server carries a guest from node to node while it runs: nonsense and silence of either node end that."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compute.cluster import controller as carrying
from compute.cluster.controller import Controller
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import ComputeError, Invalid, Unavailable
from compute.wire.streams import Stream, pair

Node = Callable[[dict[str, Any], Stream], Awaitable[None]]
MOVE: Any = SimpleNamespace(uuid="move", instance_uuid="web", to="b")


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    with closing(SqliteStore(tmp_path / "sf.db")) as store:
        yield Controller(store, "0badcafe", Config(node_name="z", guests=False))


async def carry(controller: Controller, leave: Node, arrive: Node) -> None:
    """What the nodes do with each stream, a being the one it leaves; as long as a test may take."""
    nodes = set[asyncio.Task[None]]()

    async def stream(node: str, kind: str, target: str, options: dict[str, Any]) -> Stream:
        assert (node, kind, target) in (("a", "leave", "web"), ("b", "arrive", "web"))
        near, far = pair()

        async def serve() -> None:
            await (leave if node == "a" else arrive)(options, far)
            await far.aclose()

        nodes.add(asyncio.create_task(serve()))
        return near

    controller.stream = stream  # type: ignore[method-assign]
    try:
        pass_on = asyncio.to_thread(controller.pass_on, asyncio.get_running_loop(), MOVE, "a")
        await asyncio.wait_for(pass_on, 30)
    finally:
        for task in nodes:
            task.cancel()


async def says(stream: Stream, **what: Any) -> None:
    await stream.send(json.dumps(what))


def leaves(**sent: Any) -> Node:
    """What it says once all is sent."""

    async def leave(options: dict[str, Any], stream: Stream) -> None:
        if "channel" not in options:
            await says(stream, channels=["memory"])
            assert await stream.receive()
            await says(stream, **sent)
        await stream.receive()

    return leave


def arrives(heard: list[Any], *, ends: bool = True) -> Node:
    async def arrive(options: dict[str, Any], stream: Stream) -> None:
        if "channel" not in options:
            await says(stream, like={"machine": "pc"})
            heard.append(json.loads(str(await stream.receive())))
            if ends:
                await says(stream)
        await stream.receive()

    return arrive


def test_of_what_the_one_node_says_the_other_hears_a_number_alone(controller: Controller) -> None:
    """It writes that into a guest's history, with words of its own beside it."""
    heard = list[Any]()
    said: dict[str, Any] = {"memory_bytes": 7, "message": 1, "duration_s": 2}
    asyncio.run(carry(controller, leaves(**said), arrives(heard)))
    assert heard == [{"memory_bytes": 7}]
    nonsense: tuple[tuple[dict[str, Any], type[ComputeError]], ...] = (
        ({"memory_bytes": 1e300}, Invalid),
        ({"memory_bytes": [7]}, Invalid),
        ({"memory_bytes": 7, "duration_s": "x"}, Invalid),
        ({}, Unavailable),
    )
    for said, error in nonsense:
        with pytest.raises(error):
            asyncio.run(carry(controller, leaves(**said), arrives(heard)))
    assert len(heard) == 1


def test_a_guest_does_not_stand_still_for_a_node_that_says_nothing(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carrying, "_LAST_S", 0.1)
    with pytest.raises(Unavailable, match="too long"):
        asyncio.run(carry(controller, leaves(memory_bytes=7), arrives([], ends=False)))


def test_once_a_node_takes_no_more_of_it_the_other_hears_that(controller: Controller) -> None:
    """As where the qemu that memory comes to has died: nothing else would end it before the whole move's time is up."""
    gone = asyncio.Event()

    async def leave(options: dict[str, Any], stream: Stream) -> None:
        if "channel" in options:
            while await stream.receive() is not None:
                pass
            gone.set()
            return
        await says(stream, channels=["memory"])
        assert await stream.receive()
        await gone.wait()
        await says(stream, error="its memory was not sent", kind="Refused")

    async def arrive(options: dict[str, Any], stream: Stream) -> None:
        if "channel" in options:
            await says(stream, error="connection reset", kind="ConnectionResetError")
            return
        await says(stream, like={})
        await stream.receive()

    with pytest.raises(Unavailable, match="was not sent"):
        asyncio.run(carry(controller, leave, arrive))
