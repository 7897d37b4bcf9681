"""What a node's end of a stream does: a console, a command in a guest, a port of it, its screen."""

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from compute.agent.guest.channel import Channel
from compute.agent.guest.guest import Guest
from compute.agent.guest.terminal import Terminal
from compute.agent.hypervisor.domain import screen
from compute.errors import ComputeError, Conflict, Invalid, Unavailable
from compute.wire.streams import PIECE_BYTES, Stream, carry_socket, failure, first
from net import NetError, tcp_socket

Dial = Callable[[str], Awaitable[Stream]]  # brings the stream of a ticket to the server


class Streams:
    """The streams of one node."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._open: set[asyncio.Task[None]] = set()
        self._channels: WeakKeyDictionary[Guest, Channel] = WeakKeyDictionary()
        self._terminals: WeakKeyDictionary[Guest, Terminal] = WeakKeyDictionary()

    async def open(self, guest: Guest, kind: str, options: dict[str, Any], ticket: str) -> None:
        """Serve one in the background. Raises Invalid for an unknown kind."""
        known: dict[str, Any] = {"console": self._console, "exec": self._exec, "vnc": self._vnc}
        known |= {"screen": self._screen, "arrive": guest.passage.arrive, "leave": guest.passage.leave}
        if (do := known.get(kind)) is None:
            raise Invalid(f"this node's agent knows no stream {kind[:80]}")
        await self.begin(ticket, lambda stream: do(guest, options, stream))

    async def begin(self, ticket: str, serve: Callable[[Stream], Awaitable[None]]) -> None:
        stream = await self._dial(ticket)

        async def run() -> None:
            try:
                await serve(stream)
            except (ComputeError, NetError, OSError) as err:
                with contextlib.suppress(ComputeError):
                    await stream.send(failure(err))
            finally:
                await stream.aclose()

        task = asyncio.create_task(run())
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    def close(self) -> None:
        """End all."""
        for task in self._open:
            task.cancel()

    async def _console(self, guest: Guest, _: dict[str, Any], stream: Stream) -> None:
        await self._terminals.setdefault(guest, Terminal()).serve(guest, stream)

    async def _vnc(self, guest: Guest, _: dict[str, Any], stream: Stream) -> None:
        """The bytes of RFC 6143."""
        path = screen(await guest.host.do(guest.host.hypervisor.xml, guest.spec.uuid))[1]
        if not path:
            hint = "create --vdi vnc and start it; one that runs since an older sf: sf instance reboot --hard"
            raise Conflict(f"{guest.spec.name} shows no screen now", hint=hint)
        await carry_socket(*await asyncio.open_unix_connection(path), stream)

    async def _screen(self, guest: Guest, _: dict[str, Any], stream: Stream) -> None:
        """A PNG, as `_exec` hands out output."""
        data = await guest.host.do(guest.host.hypervisor.screenshot, guest.spec.uuid)
        for at in range(0, len(data), PIECE_BYTES):
            await stream.send(b"\1" + data[at : at + PIECE_BYTES])
        await stream.send('{"exit": 0}')

    async def _exec(self, guest: Guest, options: dict[str, Any], stream: Stream) -> None:
        """`{"argv": [...], "input": true}`: then input up to `eof`. Output comes behind a byte, 1 or 2, then `exit`."""
        argv, fed = options.get("argv"), asyncio.Event()
        if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
            raise Invalid("argv is a list of words")

        async def given() -> AsyncIterator[bytes]:
            while isinstance(piece := await stream.receive(), bytes):
                yield piece
            fed.set()

        async def out(one: bytes, other: bytes) -> None:
            for mark, data in ((b"\1", one), (b"\2", other)):
                for at in range(0, len(data), PIECE_BYTES):
                    await stream.send(mark + data[at : at + PIECE_BYTES])

        async def execute() -> None:
            channel = self._channels.setdefault(guest, Channel(guest.host.hypervisor, guest.spec.uuid))
            stdin = given() if options.get("input") is True else None
            if not stdin:
                fed.set()
            await stream.send(json.dumps({"exit": await channel.execute(argv, out, stdin)}))

        async def gone() -> None:
            await fed.wait()
            while await stream.receive() is not None:
                pass

        await first(execute(), gone())


async def connect(namespace: str, address: str, also: str, port: int, stream: Stream) -> None:
    """A TCP connection from inside a network's namespace, to a guest's address or, if it is not there, `also`."""
    socket = await asyncio.to_thread(partial(tcp_socket, namespace, six=":" in address))
    socket.setblocking(False)
    try:
        async with asyncio.timeout(10):
            await asyncio.get_running_loop().sock_connect(socket, (address, port))
    except (OSError, TimeoutError) as err:
        socket.close()
        if also not in ("", address):
            await connect(namespace, also, "", port, stream)
            return
        raise Unavailable(f"{address} port {port}: {os.strerror(err.errno or errno.ETIMEDOUT)}") from err
    await carry_socket(*await asyncio.open_connection(sock=socket), stream)
