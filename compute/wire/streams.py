"""Streams: what a client and something on a node say to each other, message by message, for as long as both want.

A message is bytes (data) or a text (JSON: `{"eof": true}`, `{"exit": 0}`, `{"error": …}`). A node that is asked for one
brings it: the server's own through `pair`, another by a WebSocket. Who sends waits while the other does not take it.
"""

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

import anyio

from compute.errors import NotFound, Unavailable

T = TypeVar("T")
Message = bytes | str
MESSAGE_BYTES = 1 << 20
PIECE_BYTES = 1 << 16
_HELD = 8
_ARRIVE_S = 15.0
SOCKETS: dict[str, Any] = {
    "ws_max_size": MESSAGE_BYTES, "ws_per_message_deflate": False, "ws_ping_timeout": 60.0
}  # fmt: skip
"""What uvicorn is told: no compression of what is mostly encrypted, and time for a side that takes nothing now."""


class Stream:
    """One end, made of three calls of which `gone` are the errors once the other end is."""

    def __init__(
        self,
        send: Callable[[Message], Awaitable[None]],
        receive: Callable[[], Awaitable[Message | None]],
        close: Callable[[], Awaitable[None]],
        *gone: type[Exception],
    ) -> None:
        self._send, self._receive, self._close, self._gone = send, receive, close, gone

    async def send(self, message: Message) -> None:
        """Waits until there is room. Raises Unavailable when the other end is gone."""
        try:
            await self._send(message)
        except self._gone as err:
            raise Unavailable("the other end of the stream is gone") from err

    async def receive(self) -> Message | None:
        """The next message; None at the end."""
        with suppress(*self._gone):
            return await self._receive()
        return None

    async def aclose(self) -> None:
        """What was sent still arrives."""
        with suppress(*self._gone):
            await self._close()


def pair() -> tuple[Stream, Stream]:
    """Both ends, in this process."""
    there, arrived = anyio.create_memory_object_stream[Message](_HELD)
    back, returned = anyio.create_memory_object_stream[Message](_HELD)
    gone: Any = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream)

    def end(out: Any, into: Any) -> Stream:
        async def close() -> None:
            out.close()
            into.close()

        return Stream(out.send, into.receive, close, *gone)

    return end(there, returned), end(back, arrived)


async def first(*doing: Coroutine[Any, Any, T]) -> T:
    """What one of them has to say as soon as it has ended; the others are cancelled. Raises what it raises."""
    tasks = [asyncio.ensure_future(one) for one in doing]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return [task.result() for task in tasks if task in done][0]  # noqa: RUF015 - errors of all
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def carry(source: Stream, target: Stream) -> None:
    """All messages, one way, until either end is gone."""
    with suppress(Unavailable):
        while (message := await source.receive()) is not None:
            await target.send(message)


async def carry_socket(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: Stream) -> None:
    """A TCP connection as a stream, with the end of each direction by itself; who connected closes it."""

    async def there() -> None:
        while (message := await stream.receive()) is not None:
            if isinstance(message, str):
                writer.write_eof()
            else:
                writer.write(message)
                await writer.drain()

    async def back() -> None:
        while data := await reader.read(PIECE_BYTES):
            await stream.send(data)
        await stream.send('{"eof": true}')
        await asyncio.Event().wait()

    try:
        await first(there(), back())
    finally:
        writer.close()


def failure(error: Exception) -> str:
    """How a stream says that it cannot go on: the class is what the client's exit code is made from."""
    said = {"error": str(error)[:1000] or repr(error), "hint": getattr(error, "hint", "")}
    return json.dumps(said | {"kind": type(error).__name__})


class Arrivals:
    """The streams that nodes were asked for and have not brought yet, by a ticket for each."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[str, asyncio.Future[Stream]]] = {}

    async def ask(self, node: str, order: Callable[[str], Awaitable[None]]) -> Stream:
        """`order` tells the node the ticket. Raises what it raises, Unavailable when nothing comes."""
        ticket = secrets.token_urlsafe(24)
        arrived: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = node, arrived
        try:
            async with asyncio.timeout(_ARRIVE_S):
                await order(ticket)
                return await arrived
        except TimeoutError as err:
            raise Unavailable(f"node {node} did not open the stream") from err
        finally:
            del self._waiting[ticket]

    def arrive(self, node: str, ticket: str, stream: Stream) -> None:
        """Raises NotFound where nobody waits for it, or for another node's."""
        asked, arrived = self._waiting.get(ticket, ("", None))
        if arrived is None or arrived.done() or asked != node:
            raise NotFound("nobody waits for this stream")
        arrived.set_result(stream)
