"""A guest's serial console for any number of people at once.

qemu has the master of a pseudo-terminal, and writes all to the log as well. We open the other side while at least one
watches, once for all of them; who is too slow for what comes is let go, and comes again.
"""

import asyncio
import os
import re
import tty
from contextlib import suppress

import anyio
from anyio.streams.memory import MemoryObjectSendStream

from compute.agent.guest.guest import Guest
from compute.agent.hypervisor import domain
from compute.errors import Conflict, Unavailable
from compute.wire.streams import Stream, first

_BEFORE_BYTES = 2048
_BEHIND = 256  # pieces that a watcher may be behind
_TTY = re.compile(r"/dev/pts/[0-9]{1,9}")


class Terminal:
    """The console of one guest."""

    def __init__(self) -> None:
        self._file = -1
        self._watchers: set[MemoryObjectSendStream[bytes]] = set()

    async def serve(self, guest: Guest, stream: Stream) -> None:
        """Show the end of the log and what comes; type what the stream brings. Ends with either."""
        out, pieces = anyio.create_memory_object_stream[bytes](_BEHIND)
        before = await asyncio.to_thread(guest.console.tail, _BEFORE_BYTES)
        await self._open(guest)

        async def show() -> None:
            await stream.send(before)
            async for data in pieces:
                await stream.send(data)
            if self._file < 0:
                raise Conflict("the guest was switched off", hint="sf instance start")
            raise Unavailable("the console wrote more than this connection takes", hint="connect again")

        async def type_() -> None:
            while isinstance(data := await stream.receive(), bytes):
                while data and self._file >= 0:
                    with suppress(BlockingIOError):  # a guest that reads nothing makes the typist wait
                        data = data[os.write(self._file, data) :]
                    await asyncio.sleep(0.02 if data else 0)

        self._watchers.add(out)
        try:
            with out, pieces:
                await first(show(), type_())
        finally:
            self._watchers.discard(out)
            if not self._watchers:
                self._close()

    async def _open(self, guest: Guest) -> None:
        host = guest.host
        path = domain.console_tty(await host.do(host.hypervisor.xml, guest.spec.uuid))
        if not _TTY.fullmatch(path):
            raise Conflict("the guest is off: it has no console now", hint="sf instance start")
        if self._file < 0:
            self._file = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            tty.setraw(self._file)
            asyncio.get_running_loop().add_reader(self._file, self._read)

    def _close(self) -> None:
        if self._file >= 0:
            asyncio.get_running_loop().remove_reader(self._file)
            os.close(self._file)
            self._file = -1

    def _read(self) -> None:
        try:
            data = os.read(self._file, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # qemu has ended
            self._close()
        for out in list(self._watchers):
            if not data or out.statistics().current_buffer_used == _BEHIND:
                self._watchers.discard(out)
                out.close()
            else:
                out.send_nowait(data)
