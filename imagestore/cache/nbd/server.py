"""NBD server for one read-only export on a Unix socket.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle, structured replies,
`base:allocation`). What a client may cost: one connection holds at most MAX_IN_FLIGHT_BYTES of answers and
MAX_IN_FLIGHT requests, an export has at most MAX_CONNECTIONS, a handshake (`handshake`) is over within
HANDSHAKE_S. A client that breaks the protocol loses its connection and nothing else.
"""

import asyncio
import errno
import struct
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from imagestore.cache.nbd.handshake import CONTEXT_ID, GREETING, MAX_REQUEST_BYTES, Broken, Handshake
from imagestore.formats.digest import Buffer

MAX_IN_FLIGHT_BYTES = 32 << 20
MAX_IN_FLIGHT = 128
MAX_CONNECTIONS = 16
HANDSHAKE_S = 20.0
STATUS_MAX_EXTENTS = 1024

_REQUEST_MAGIC = 0x25609513
_SIMPLE_MAGIC = 0x67446698
_STRUCTURED_MAGIC = 0x668E33EF

_READ, _WRITE, _DISC, _BLOCK_STATUS = 0, 1, 2, 7
_FLAG_REQ_ONE = 8
_DONE = 1
_OFFSET_DATA, _STATUS, _ERROR = 1, 5, (1 << 15) + 1
_HOLE_AND_ZERO = 3

_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_DATA_CHUNK = struct.Struct(">IHHQIQ")


class Source(Protocol):
    """What an export shows. All of it is called on the event loop's thread."""

    size_bytes: int

    def read_now(self, offset: int, length: int) -> Buffer | None:
        """The bytes if they can be had without waiting, else None. Never raises for a range inside the disk."""

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes, however long it takes. Raises OSError when they cannot be had."""

    def extents(self, offset: int, length: int, limit: int) -> Sequence[tuple[int, bool]]:
        """The first `limit` (length, is a hole) pairs that cover the range in order; neighbours differ."""


class Connection(asyncio.Protocol):
    """One client. Its messages are taken by `_negotiate` and then by `_requests`, until these return False."""

    def __init__(self, server: "NbdServer") -> None:
        self._server = server
        self._source = server.source
        self._buffer = bytearray()
        self._handshake = Handshake(server.source.size_bytes)
        self._paused = False
        self._in_flight: set[asyncio.Task[None]] = set()
        self._in_flight_bytes = 0

    # -- transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._deadline = asyncio.get_running_loop().call_later(HANDSHAKE_S, self._transport.abort)
        if len(self._server.connections) >= MAX_CONNECTIONS:
            self.close()
            return
        self._server.connections.add(self)
        self._transport.set_write_buffer_limits(high=4 << 20)
        self._transport.write(GREETING)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        for task in self._in_flight:
            task.cancel()
        self._buffer.clear()
        self._server.connections.discard(self)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._advance()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._advance()

    def close(self) -> None:
        """End the connection now; requests under way are dropped."""
        self._transport.abort()

    def _advance(self) -> None:
        try:
            while not self._transport.is_closing() and self._room():
                if not (self._requests if self._handshake.agreed else self._negotiate)():
                    break
        except Broken:
            self.close()
        if self._transport.is_closing():
            return
        if self._room():
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _room(self) -> bool:
        fits = len(self._in_flight) < MAX_IN_FLIGHT and self._in_flight_bytes < MAX_IN_FLIGHT_BYTES
        return fits and not self._paused

    def _negotiate(self) -> bool:
        answer = self._handshake.step(self._buffer)
        if answer is None:
            return False
        self._transport.write(answer)
        if self._handshake.aborted:
            self._transport.close()
        elif self._handshake.agreed:
            self._deadline.cancel()
        return True

    # -- transmission

    def _requests(self) -> bool:
        """Answer every request in the buffer that needs no waiting, in few writes; start tasks for the others."""
        buffer, end, position = self._buffer, len(self._buffer), 0
        out: list[Buffer] = []
        out_bytes = 0
        size, read_now = self._source.size_bytes, self._source.read_now
        while end - position >= 28 and self._room():
            magic, flags, kind, cookie, offset, length = _REQUEST.unpack_from(buffer, position)
            position += 28
            if magic != _REQUEST_MAGIC:
                raise Broken("bad request")
            if kind == _READ and 0 < length <= MAX_REQUEST_BYTES and offset + length <= size:
                data = read_now(offset, length)
                if data is None:
                    self._start(self._read(cookie, offset, length), length)
                    continue
                out += (self._data_head(cookie, offset, length), data)
                out_bytes += length
                if out_bytes >= 1 << 20:
                    self._transport.writelines(out)
                    out, out_bytes = [], 0
            elif kind == _DISC:
                self._transport.writelines(out)
                self._transport.close()
                return False
            else:
                out.append(self._other(flags, kind, cookie, offset, length))
        del buffer[:position]
        self._transport.writelines(out)
        return position > 0

    def _other(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
        """Everything but a plain read of a range inside the disk."""
        inside = length > 0 and offset + length <= self._source.size_bytes
        if kind == _WRITE:
            raise Broken("the export is read-only")
        if kind == _BLOCK_STATUS and inside and self._handshake.context:
            limit = 1 if flags & _FLAG_REQ_ONE else STATUS_MAX_EXTENTS
            extents = self._source.extents(offset, length, limit)
            words = [word for run, hole in extents for word in (run, _HOLE_AND_ZERO if hole else 0)]
            body = struct.pack(f">I{len(words)}I", CONTEXT_ID, *words)
            return _CHUNK.pack(_STRUCTURED_MAGIC, _DONE, _STATUS, cookie, len(body)) + body
        # Commands 4 and 6 change data.
        return self._failed(cookie, errno.EPERM if kind in (4, 6) else errno.EINVAL)

    def _start(self, work: Coroutine[Any, Any, None], length: int) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._in_flight.add(task)
        self._in_flight_bytes += length

        def finished(done: asyncio.Task[None]) -> None:
            self._in_flight.discard(done)
            self._in_flight_bytes -= length
            if not self._transport.is_closing():
                self._advance()

        task.add_done_callback(finished)

    async def _read(self, cookie: int, offset: int, length: int) -> None:
        try:
            data = await self._source.read(offset, length)
        except OSError:
            self._transport.write(self._failed(cookie, errno.EIO))
        else:
            self._transport.writelines((self._data_head(cookie, offset, length), data))

    def _data_head(self, cookie: int, offset: int, length: int) -> bytes:
        if self._handshake.structured:
            return _DATA_CHUNK.pack(_STRUCTURED_MAGIC, _DONE, _OFFSET_DATA, cookie, length + 8, offset)
        return _SIMPLE.pack(_SIMPLE_MAGIC, 0, cookie)

    def _failed(self, cookie: int, number: int) -> bytes:
        """The answer with this errno."""
        if not self._handshake.structured:
            return _SIMPLE.pack(_SIMPLE_MAGIC, number, cookie)
        error = struct.pack(">IH", number, 0)
        return _CHUNK.pack(_STRUCTURED_MAGIC, _DONE, _ERROR, cookie, len(error)) + error


class NbdServer:
    """Serves `source` on the Unix socket `path` until `close`; for its owner and its group (a setgid directory's)."""

    def __init__(self, source: Source, path: Path) -> None:
        self.source, self.path = source, path
        self.connections: set[Connection] = set()  # clients at this moment

    async def start(self) -> None:
        """Listen. The socket appears under its name only when it accepts, in place of a stale one."""
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: Connection(self), str(fresh))
        fresh.chmod(0o660)
        fresh.rename(self.path)

    async def close(self) -> None:
        """Stop listening, drop the clients, remove the socket."""
        self.path.unlink(missing_ok=True)
        for connection in list(self.connections):
            connection.close()
        self._server.close()
