"""The NBD server against real clients (qemu) and against hostile ones (hypothesis)."""

import asyncio
import contextlib
import errno
import json
import os
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagestore.cache.nbd import server as nbd
from imagestore.cache.nbd.server import NbdServer

MAGIC, IHAVEOPT, REQUEST = 0x4E42444D41474943, 0x49484156454F5054, 0x25609513
READ, WRITE, DISC, BLOCK_STATUS = 0, 1, 2, 7


class Bytes:
    """A disk in memory; ranges that overlap `slow` wait for `gate`, ranges that overlap `bad` fail."""

    def __init__(self, data: bytes, slow: range = range(0), bad: range = range(0)) -> None:
        self.data, self.slow, self.bad = data, slow, bad
        self.size_bytes = len(data)
        self.gate = asyncio.Event()

    @staticmethod
    def _overlaps(part: range, offset: int, length: int) -> bool:
        return bool(part) and offset < part.stop and part.start < offset + length

    def read_now(self, offset: int, length: int) -> bytes | None:
        late = self._overlaps(self.slow, offset, length) or self._overlaps(self.bad, offset, length)
        return None if late else self.data[offset : offset + length]

    async def read(self, offset: int, length: int) -> bytes:
        if self._overlaps(self.bad, offset, length):
            raise OSError(errno.EIO, "gone")
        await self.gate.wait()
        return self.data[offset : offset + length]

    def extents(self, offset: int, length: int, limit: int) -> Sequence[tuple[int, bool]]:
        found: list[tuple[int, bool]] = []
        for at in range(offset, offset + length):
            hole = self.data[at] == 0
            if found and found[-1][1] == hole:
                found[-1] = (found[-1][0] + 1, hole)
            else:
                found.append((1, hole))
        return found[:limit]


@contextlib.asynccontextmanager
async def serving(source: Bytes) -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "export.sock"
        server = NbdServer(source, path)
        await server.start()
        try:
            yield path
        finally:
            await server.close()
            for _ in range(50):
                if not server.connections:
                    break
                await asyncio.sleep(0.01)
            assert not server.connections


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


class Client:
    """Just enough of a client to send what qemu never would."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, path: Path) -> "Client":
        client = cls(*await asyncio.open_unix_connection(str(path)))
        assert struct.unpack(">QQH", await client.reader.readexactly(18)) == (MAGIC, IHAVEOPT, 3)
        client.writer.write(struct.pack(">I", 3))
        return client

    async def option(self, option: int, payload: bytes = b"") -> list[tuple[int, bytes]]:
        self.writer.write(struct.pack(">QII", IHAVEOPT, option, len(payload)) + payload)
        replies = []
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", await self.reader.readexactly(20))
            assert (magic, echoed) == (0x0003E889045565A9, option)
            replies.append((kind, await self.reader.readexactly(length)))
            if kind == 1 or kind & 1 << 31:
                return replies

    async def go(self, structured: bool = True) -> None:
        if structured:
            assert (await self.option(8))[-1][0] == 1
            query = struct.pack(">III", 0, 1, 15) + b"base:allocation"
            assert [kind for kind, _ in await self.option(10, query)] == [4, 1]
        assert (await self.option(7, struct.pack(">IH", 0, 0)))[-1][0] == 1

    def send(self, kind: int, cookie: int, offset: int, length: int, flags: int = 0) -> None:
        self.writer.write(struct.pack(">IHHQQI", REQUEST, flags, kind, cookie, offset, length))

    async def chunk(self) -> tuple[int, int, bytes]:
        """(type, cookie, payload) of the next structured reply, which must be its request's only chunk."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", await self.reader.readexactly(20))
        assert (magic, flags) == (0x668E33EF, 1)
        return kind, cookie, await self.reader.readexactly(length)


def test_qemu_reads_the_disk_and_knows_its_holes(tmp_path: Path) -> None:
    data = b"r" * (64 << 10) + bytes(128 << 10) + b"x" * (64 << 10) + bytes(512)

    async def test() -> None:
        async with serving(Bytes(data)) as socket:
            url = f"nbd+unix:///?socket={socket}"
            run_ = asyncio.to_thread
            mapped = await run_(
                subprocess.run, ["qemu-img", "map", "--output=json", url], capture_output=True, check=True
            )
            pieces = [(p["start"], p["length"], p["data"]) for p in json.loads(mapped.stdout)]
            assert pieces == [
                (0, 65536, True),
                (65536, 131072, False),
                (196608, 65536, True),
                (262144, 512, False),
            ]
            copy = tmp_path / "copy.raw"
            await run_(subprocess.run, ["qemu-img", "convert", "-O", "raw", url, copy], check=True)
            assert copy.read_bytes() == data

    run(test)


def test_a_client_without_structured_replies_is_served() -> None:
    async def test() -> None:
        async with serving(Bytes(b"abcdefgh" * 1024)) as path:
            client = await Client.connect(path)
            await client.go(structured=False)
            client.send(READ, 7, 8, 4)
            assert await client.reader.readexactly(20) == struct.pack(">IIQ", 0x67446698, 0, 7) + b"abcd"
            client.send(READ, 8, 8 << 10, 1)
            assert struct.unpack(">IIQ", await client.reader.readexactly(16))[1:] == (errno.EINVAL, 8)
            client.send(BLOCK_STATUS, 9, 0, 512)
            assert struct.unpack(">IIQ", await client.reader.readexactly(16))[1:] == (errno.EINVAL, 9)

    run(test)


def test_a_slow_read_keeps_no_other_waiting_and_a_failed_one_is_an_io_error() -> None:
    async def test() -> None:
        source = Bytes(bytes(range(256)) * 64, slow=range(512), bad=range(1024, 2048))
        async with serving(source) as path:
            client = await Client.connect(path)
            await client.go()
            client.send(READ, 1, 0, 16)
            client.send(READ, 2, 512, 4)
            client.send(READ, 3, 1024, 4)
            first = [await client.chunk(), await client.chunk()]
            assert (1, 2, struct.pack(">Q", 512) + bytes(range(4))) in first
            assert ((1 << 15) + 1, 3, struct.pack(">IH", errno.EIO, 0)) in first
            source.gate.set()
            assert await client.chunk() == (1, 1, bytes(8) + bytes(range(16)))

    run(test)


def test_the_disk_is_read_only_and_who_writes_all_the_same_loses_the_connection() -> None:
    async def test() -> None:
        source = Bytes(b"q" * 4096)
        async with serving(source) as path:
            client = await Client.connect(path)
            await client.go()
            for command in (4, 6):  # trim, write zeroes
                client.send(command, command, 0, 512)
            for command in (3, 5):  # flush, cache: not offered
                client.send(command, command, 0, 512)
            client.send(READ, 9, 0, 3)
            errors = [(await client.chunk())[1:] for _ in range(4)]
            assert errors == [(n, struct.pack(">IH", e, 0)) for n, e in ((4, 1), (6, 1), (3, 22), (5, 22))]
            assert await client.chunk() == (1, 9, bytes(8) + b"qqq")
            client.send(WRITE, 1, 0, 512)
            assert await client.reader.read() == b""
            assert source.data == b"q" * 4096

    run(test)


def test_a_client_that_asks_and_never_reads_costs_a_bounded_amount_of_memory() -> None:
    async def test() -> None:
        source = Bytes(bytes(8 << 20))
        served = 0

        def counting(offset: int, length: int) -> bytes:
            nonlocal served
            served += length
            return source.data[offset : offset + length]

        source.read_now = counting  # type: ignore[method-assign]
        async with serving(source) as path:
            client = await Client.connect(path)
            await client.go()
            for cookie in range(500):
                client.send(READ, cookie, 0, 1 << 20)
            await asyncio.sleep(0.3)
            assert served < 8 << 20
            other = await Client.connect(path)
            await other.go()
            other.send(READ, 1, 0, 4)
            assert (await other.chunk())[1] == 1
            client.writer.transport.abort()

    run(test)


def test_more_clients_than_the_limit_are_turned_away_and_a_silent_one_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nbd, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(nbd, "HANDSHAKE_S", 0.3)

    async def test() -> None:
        async with serving(Bytes(bytes(4096))) as path:
            silent = await asyncio.open_unix_connection(str(path))
            clients = [await Client.connect(path) for _ in range(2)]
            for client in clients:
                await client.go()
            refused, _ = await asyncio.open_unix_connection(str(path))
            with contextlib.suppress(ConnectionResetError):
                assert await refused.read() == b""
            with contextlib.suppress(ConnectionResetError):
                await silent[0].read()
            again = await Client.connect(path)
            await again.go()

    run(test)


def test_the_list_names_the_export_and_unknown_things_are_refused_politely() -> None:
    async def test() -> None:
        async with serving(Bytes(bytes(4096))) as path:
            client = await Client.connect(path)
            assert await client.option(3) == [(2, bytes(4)), (1, b"")]
            assert (await client.option(77, b"?"))[0][0] == (1 << 31) + 1
            assert (await client.option(7, struct.pack(">I", 4) + b"nope" + bytes(2)))[0][0] == (1 << 31) + 6
            assert (await client.option(7, b"\xff" * 9))[0][0] == (1 << 31) + 3
            await client.go()
            for option, length in ((1, 0), (6, 20_000)):
                client = await Client.connect(path)
                with pytest.raises(asyncio.IncompleteReadError):
                    await client.option(option, bytes(length))

    run(test)


_OPTIONS = st.tuples(st.sampled_from([1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 99]), st.binary(max_size=40)).map(
    lambda o: struct.pack(">QII", IHAVEOPT, o[0], len(o[1])) + o[1]
)
_U64 = st.one_of(st.integers(0, 70_000), st.integers(0, 2**64 - 1))
_U32 = st.one_of(st.integers(0, 70_000), st.integers(0, 2**32 - 1))
_REQUESTS = st.tuples(st.integers(0, 31), st.integers(0, 9), _U64, _U64, _U32).map(
    lambda r: struct.pack(">IHHQQI", REQUEST, *r)
)
_GO = struct.pack(">QIIIH", IHAVEOPT, 7, 6, 0, 0)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(_OPTIONS, max_size=8).map(lambda o: struct.pack(">I", 3) + b"".join(o)),
        st.lists(_REQUESTS, max_size=8).map(lambda r: struct.pack(">I", 3) + _GO + b"".join(r)),
        st.lists(st.one_of(_OPTIONS, _REQUESTS, st.binary(max_size=64)), max_size=8).map(
            lambda p: struct.pack(">I", 1) + b"".join(p)
        ),
    ),
    st.lists(st.integers(1, 60), max_size=4),
)
def test_no_bytes_from_a_client_crash_or_hang_the_server_or_reach_another_client(
    data: bytes, cuts: list[int]
) -> None:
    async def test() -> None:
        failures: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        source = Bytes(os.urandom(65_536))
        source.gate.set()
        async with serving(source) as path:
            honest = await Client.connect(path)
            reader, writer = await asyncio.open_unix_connection(str(path))
            at = 0
            with contextlib.suppress(OSError):
                for cut in cuts:
                    writer.write(data[at : at + cut])
                    await writer.drain()
                    at += cut
                writer.write(data[at:])
                writer.write_eof()
                while await asyncio.wait_for(reader.read(1 << 16), 20):
                    pass
            writer.transport.abort()
            await honest.go()
            honest.send(READ, 1, 100, 50)
            assert await honest.chunk() == (1, 1, struct.pack(">Q", 100) + source.data[100:150])
            honest.send(DISC, 2, 0, 0)
            assert await honest.reader.read() == b""
        assert not failures

    run(test)
