"""A slow link as a process: `python -m benchmarks._link LISTEN_PORT TARGET_PORT MBIT_S ROUND_TRIP_MS`, on loopback.

For kernels without sch_netem, such as the test machine's (`tc` there knows htb and tbf, and no delay). All connections
share the rate in each direction, every byte arrives half a round trip after its turn, and a new connection costs one
round trip. What it does not do is slow start and loss: connections that live for many requests do not feel the
difference, short ones would be slower on a real link.
"""

import asyncio
import contextlib
import sys

_PIECE = 64 << 10
_AHEAD_BYTES = 4 << 20


class Direction:
    """One way of the link."""

    def __init__(self, bytes_s: float, delay_s: float) -> None:
        self._bytes_s, self.delay_s = bytes_s, delay_s
        self._free_s = 0.0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_AHEAD_BYTES // _PIECE)

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while data := await reader.read(_PIECE):
                self._free_s = max(self._free_s, loop.time()) + len(data) / self._bytes_s
                await queue.put((self._free_s + self.delay_s, data))
        finally:
            await queue.put((loop.time() + self.delay_s, b""))
            with contextlib.suppress(ConnectionError):
                await delivering


async def main(listen: int, target: int, mbit_s: float, round_trip_ms: float) -> None:
    up, down = (Direction(mbit_s * 1e6 / 8, round_trip_ms / 2000) for _ in range(2))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * up.delay_s)
        there, back = await asyncio.open_connection("127.0.0.1", target, limit=_PIECE)
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(up.carry(reader, back), down.carry(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", listen, limit=_PIECE)
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
