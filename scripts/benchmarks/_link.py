"""A slow link as a process: `python -m benchmarks._link LISTEN_PORT TARGET_PORT MBIT_S ROUND_TRIP_MS`, on loopback.

For kernels without sch_netem, such as the test machine's (`tc` there knows htb and tbf, and no delay). All connections
share the rate in each direction, every byte arrives half a round trip after its turn, and a new connection costs one
round trip. What it does not do is slow start and loss: connections that live for many requests do not feel the
difference, short ones would be slower on a real link. It runs on the cores that it measures: it copies nothing itself.
"""

import asyncio
import collections
import contextlib
import sys
from typing import cast

_AHEAD_BYTES = 4 << 20


class Line:
    """The rate of one direction, shared by all connections."""

    def __init__(self, bytes_s: float, delay_s: float) -> None:
        self._bytes_s, self._delay_s = bytes_s, delay_s
        self._free_s = 0.0

    def due_s(self, now_s: float, size_bytes: int) -> float:
        """When so many bytes, sent now, have arrived."""
        self._free_s = max(self._free_s, now_s) + size_bytes / self._bytes_s
        return self._free_s + self._delay_s


class End(asyncio.Protocol):
    """One end of a connection: what it receives leaves by the other end, later."""

    transport: asyncio.Transport
    other: "End | None" = None
    """None while the connection is being made: what arrives waits."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._loop = asyncio.get_running_loop()
        self._queue: collections.deque[tuple[float, bytes]] = collections.deque()
        self._queued_bytes = 0
        self._full = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        due_s = self._line.due_s(self._loop.time(), len(data))
        self._queue.append((due_s, data))
        self._queued_bytes += len(data)
        if self._queued_bytes > _AHEAD_BYTES:
            self.transport.pause_reading()
        if len(self._queue) == 1:
            self._loop.call_at(due_s, self.deliver)

    def eof_received(self) -> bool:
        self.data_received(b"")
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other:
            self.other.transport.close()

    def pause_writing(self) -> None:
        if self.other:
            self.other._full = True

    def resume_writing(self) -> None:
        if self.other:
            self.other._full = False
            self.other.deliver()

    def deliver(self) -> None:
        """Write what is due, and come back for the rest."""
        while (
            self.other and self._queue and not self._full and self._queue[0][0] <= self._loop.time() + 0.0005
        ):
            _, data = self._queue.popleft()
            if not data:
                self.other.transport.close()
                return
            self._queued_bytes -= len(data)
            self.other.transport.write(data)
        if self._queued_bytes <= _AHEAD_BYTES:
            self.transport.resume_reading()
        if self.other and self._queue and not self._full:
            self._loop.call_at(self._queue[0][0], self.deliver)


async def main(listen: int, target: int, mbit_s: float, round_trip_ms: float) -> None:
    up, down = (Line(mbit_s * 1e6 / 8, round_trip_ms / 2000) for _ in range(2))
    loop = asyncio.get_running_loop()
    joining: set[asyncio.Task[None]] = set()

    async def join(near: End) -> None:
        await asyncio.sleep(round_trip_ms / 1000)
        _, far = await loop.create_connection(lambda: End(down), "127.0.0.1", target)
        near.other, far.other = far, near
        near.deliver()
        far.deliver()

    class Near(End):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            task = loop.create_task(join(self))
            joining.add(task)
            task.add_done_callback(joining.discard)

    server = await loop.create_server(lambda: Near(up), "127.0.0.1", listen)
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
