"""Peers that lie, and peers that are asked by strangers."""

import asyncio
import contextlib
import gc
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import httpx
import pytest

from imagestore.cache.peers import OWNED_CHUNKS, PeerServer, Site, sign
from imagestore.formats.digest import Buffer, Digest
from imagestore.store.frames import LocalOrigin
from tests.servers import free_ports
from tests.tiny_store import disk
from tests.unit.imagestore.cache.test_fetcher import Node, read

DATA = disk(21, 120)
SECRET = b"s" * 32


def site(me: str, **addresses: str) -> Site:
    found = Site()
    found.me, found.addresses, found.secret = me, addresses, SECRET
    return found


def test_all_nodes_agree_on_an_owner_and_each_owns_a_share() -> None:
    names = {f"n{n}": "" for n in range(5)}
    sites = [site(name, **names) for name in names]
    digest = Digest(b"d" * 32)
    owners = [{one.owner(digest, n * OWNED_CHUNKS) or one.me for one in sites} for n in range(200)]
    assert all(len(found) == 1 for found in owners)
    assert len(set().union(*owners)) == 5


def test_a_node_without_its_stores_asks_the_first_of_the_others_that_answer() -> None:
    names = {f"n{n}": "" for n in range(4)}
    digest = Digest(b"d" * 32)
    one = site("n0", **names)
    for stretch in range(50):
        chunk = stretch * OWNED_CHUNKS
        owner, second = one.owner(digest, chunk), one.owner(digest, chunk, others=True)
        assert second != "n0" and owner in ("", second)
        without = site("n0", **{name: "" for name in names if name != second})
        one._away[second] = float("inf")
        assert one.owner(digest, chunk, others=True) == without.owner(digest, chunk, others=True) != second
        del one._away[second]
    one._away = dict.fromkeys(names, float("inf"))
    assert one.owner(digest, 0, others=True) == ""


@pytest.mark.parametrize("lie", ["zeros", "short", "endless", "other", "silence", "refuses"])
def test_no_byte_of_a_lying_peer_reaches_guest_or_cache(
    tmp_path: Path, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagestore.cache.peers.PATIENCE_S", -1)  # with its 2 s of grace: a client waits 1 s
    port, gave = free_ports(1, first=28000), list[str]()

    async def give(digest: Digest, ids: bytes) -> Sequence[Buffer] | None:
        gave.append(lie)
        size = 32768 * (len(ids) // 32)
        if lie == "silence":
            await asyncio.sleep(30)
        return {
            "zeros": [bytes(size)],
            "short": [b"x" * 10],
            "endless": [b"y" * size * 20],
            "other": [DATA[:size]],
        }.get(lie)

    async def test() -> None:
        server = PeerServer(site("liar"), give)
        await server.listen(f"127.0.0.1:{port}")
        node = Node(tmp_path, DATA)
        # All chunks are the liar's, as far as this node knows.
        ours = site("liar2", liar=f"127.0.0.1:{port}")
        monkeypatch.setattr(ours, "owner", lambda digest, chunk, others: "liar", raising=False)
        async with node.reading(site=ours, before=[LocalOrigin(node.manifest)]) as reader:
            for offset in range(0, len(DATA), 900_000):
                assert await read(reader, offset, 5000) == DATA[offset : offset + 5000]
        assert gave
        assert all(
            node.partial.check(c, node.partial.read_chunk(c))
            for c, there in enumerate(node.partial.present)
            if there
        )
        await server.close()

    asyncio.run(asyncio.wait_for(test(), 100))


def test_what_a_peer_brings_of_an_image_that_was_closed_meanwhile_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_ports(1, first=28000)

    async def test() -> None:
        node, asked, go = Node(tmp_path, DATA), asyncio.Event(), asyncio.Event()
        starts, ends = node.partial.starts, node.partial.ends
        held = {node.partial.id(c): DATA[starts[c] : ends[c]] for c in range(len(starts))}

        async def give(digest: Digest, ids: bytes) -> Sequence[Buffer] | None:
            asked.set()
            await go.wait()
            return [held[ids[at : at + 32]] for at in range(0, len(ids), 32)]

        server = PeerServer(site("peer"), give)
        await server.listen(f"127.0.0.1:{port}")
        ours = site("we", peer=f"127.0.0.1:{port}")
        monkeypatch.setattr(ours, "owner", lambda digest, chunk, others: "peer", raising=False)
        async with node.reading(site=ours, before=[LocalOrigin(node.manifest)]):
            node.filling.wanted.prefetch([0])
            node.fetcher.pump()
            await asked.wait()
            await node.fetcher.remove(node.filling)
            node.partial.close()
            stranger = tmp_path / "stranger"
            with stranger.open("wb"):  # it has the number that was the image's
                go.set()
                while node.fetcher._tasks:
                    await asyncio.sleep(0.01)
            assert stranger.read_bytes() == b""
        assert node.events == [] and not any(node.partial.present)
        await server.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_strangers_and_nonsense_get_nothing_from_a_peer(tmp_path: Path) -> None:
    port = free_ports(1, first=28000)
    asked: list[bytes] = []

    async def give(digest: Digest, ids: bytes) -> Sequence[Buffer] | None:
        asked.append(ids)
        return [b"ok"]

    async def test() -> None:
        server = PeerServer(site("me"), give)
        await server.listen(f"127.0.0.1:{port}")
        path, ids = "/chunks/" + "ab" * 32, b"i" * 32
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            for headers in ({}, {"Authorization": sign(b"other", path, ids)}, {"Authorization": "SF é"}):
                with contextlib.suppress(UnicodeEncodeError):
                    assert (await client.post(path, content=ids, headers=headers)).status_code == 401
            good = {"Authorization": sign(SECRET, path, ids)}
            assert (await client.post(path, content=ids, headers=good)).content == b"ok"
            with pytest.raises(httpx.HTTPError):
                await client.get(path)
            with pytest.raises(httpx.HTTPError):
                await client.post(path, content=b"x" * 31, headers=good)
            with pytest.raises(httpx.HTTPError):
                await client.post(path, content=b"x" * (32 << 20), headers=good)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\0" * 200_000 + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        assert asked == [ids]
        await server.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_peer_that_drips_or_never_ends_costs_no_more_than_the_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One set of HTTP rules, for peers as well: the store is asked instead, and the peer not for a while."""
    monkeypatch.setattr("imagestore.cache.peers.PATIENCE_S", 0.2)
    monkeypatch.setattr("imagestore.backends.web.PATIENCE_S", 0.2)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"

    ended = threading.Event()

    def drip(connection: socket.socket, sent: bytes = head) -> None:
        connection.sendall(sent)
        for _ in range(500):
            connection.sendall(b"x")
            time.sleep(0.02)
        ended.set()

    def endless(connection: socket.socket) -> None:
        connection.sendall(head.replace(b"Content-Length: 100000", b"Connection: close"))
        while True:
            connection.sendall(bytes(1 << 16))

    for answer in (drip, endless, partial(drip, sent=head[:-2] + b"X: ")):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve(answer: Callable[[socket.socket], None] = answer) -> None:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    answer(connection)

            threading.Thread(target=serve, daemon=True).start()
            asker = site("me", slow=f"127.0.0.1:{server.getsockname()[1]}")
            assert asker.ask("slow", "/chunks/x", b"i" * 32, 50_000) is None
            assert not ended.is_set()
            monkeypatch.setattr(asker, "_pool", None)  # it is not asked again
            assert asker.ask("slow", "/chunks/x", b"i" * 32, 50_000) is None


def test_strangers_who_hold_all_connections_keep_no_peer_out_and_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E7"""
    monkeypatch.setattr("imagestore.cache.peers._CLIENTS", 8)
    port, failures = free_ports(1, first=28000), list[object]()

    async def give(digest: Digest, ids: bytes) -> Sequence[Buffer] | None:
        return [b"ok"]

    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        server = PeerServer(site("me"), give)
        await server.listen(f"127.0.0.1:{port}")
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for _, writer in idle:
            with contextlib.suppress(ConnectionError):
                writer.write(
                    b"POST /x HTTP/1.1\r\nContent-Length: 32\r\nAuthorization: \xe9\r\n\r\n" + b"i" * 32
                )
                await writer.drain()
        path, ids = "/chunks/" + "ab" * 32, b"i" * 32
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            answer = await client.post(path, content=ids, headers={"Authorization": sign(SECRET, path, ids)})
            assert answer.content == b"ok"
        for _, writer in idle:
            writer.close()
        await server.close()
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(test(), 60))
    gc.collect()
    assert failures == []
