"""Chunks from the other nodes of a site, so that a crowd that boots one image draws it from the store once.

    POST /chunks/<manifest>  body: the ids of the chunks, 32 bytes each; answer: their bytes, one after the other
    Authorization: SF <HMAC-SHA256 of path and body under the site's secret>

Whoever can name a chunk by its id has read the manifest that lists it, so a node gets from its peers only what its own
stores would give it. Bytes are verified by the fetcher as always; they are not encrypted, like the guests' own traffic
between nodes. Each stretch of OWNED_CHUNKS chunks has an owner among the nodes, the same on all of them (rendezvous
hashing): the owner asks the store, the others ask the owner, and the store only when the owner cannot help. A node
whose stores do not answer asks the next in that order. Who is asked asks no peer itself: no two nodes wait for each
other. A request that is recorded and sent again brings only what its answer, unencrypted, showed already.
"""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial

import urllib3
import urllib3.exceptions as failures
from blake3 import blake3

from imagestore.backends import web
from imagestore.backends.web import receive
from imagestore.errors import Corrupt, StoreError, Unavailable
from imagestore.formats.digest import Buffer, Digest
from imagestore.formats.manifest import Manifest
from imagestore.store.frames import Batch

OWNED_CHUNKS = 256
PATIENCE_S = 20.0
_MAX_CHUNKS = 4096
_KEPT = 16  # connections to one peer: as many as threads fetch
_CLIENTS = 256  # connections at once; one more ends the oldest, for strangers may hold many
_HEAD_S = 10.0
_AWAY_S = 15.0  # for so long a node that did not answer is not asked again
_ID = 32

Give = Callable[[Digest, bytes], Awaitable[Sequence[Buffer] | None]]
"""The bytes of the chunks with these ids of an image; None when it is not served here."""


def sign(secret: bytes, path: str, body: bytes) -> str:
    """What the Authorization header says."""
    return "SF " + hmac.new(secret, path.encode() + b"\n" + body, "sha256").hexdigest()


class Site:
    """Who the peers are: names and addresses, ours among them."""

    def __init__(self) -> None:
        self.me = ""
        self.addresses: Mapping[str, str] = {}
        self.secret = b""
        self._pool = urllib3.PoolManager(maxsize=_KEPT)
        self._pool.pool_classes_by_scheme = web.POOLS
        self._away: dict[str, float] = {}

    def owner(self, digest: Digest, chunk: int, *, others: bool = False) -> str:
        """The other node that fetches this chunk for all; "" where we do.

        others: the first of the others that answer ("" if none does), since our stores do not.
        """
        if not self.addresses:
            return ""
        stretch = digest + (chunk // OWNED_CHUNKS).to_bytes(8, "little")
        nodes = {*self.addresses, self.me}
        if others:
            now = time.monotonic()
            nodes = {node for node in nodes - {self.me} if self._away.get(node, 0) <= now}
        found = max(nodes, key=lambda node: blake3(stretch + node.encode()).digest(), default="")
        return "" if found == self.me else found

    def ask(self, node: str, path: str, body: bytes, wanted: int) -> bytes | None:
        """One request, over a kept connection: exactly `wanted` bytes, or None; a node that is away is not asked."""
        if self._away.get(node, 0) > time.monotonic():
            return None
        send = partial(
            self._pool.request, "POST", f"http://{self.addresses.get(node, '')}{path}", body=body,
            headers={"Authorization": sign(self.secret, path, body)}, timeout=PATIENCE_S + 2,
            retries=False, redirect=False, preload_content=False,
        )  # fmt: skip
        try:
            try:
                answer = send()
            except failures.ProtocolError:  # the peer had closed a kept connection meanwhile
                answer = send()
            if answer.status == 200:
                return receive(web.body(answer, node), wanted, node, PATIENCE_S)
            answer.release_conn()
        except (failures.HTTPError, OSError, Unavailable, Corrupt):
            self._away[node] = time.monotonic() + _AWAY_S
        return None


class PeerOrigin:
    """One other node, for one image."""

    kind = "peer"

    def __init__(self, site: Site, digest: Digest, manifest: Manifest, node: str) -> None:
        self.name, self._node = f"node {node}", node
        self._site, self._digest, self._manifest = site, digest, manifest

    def fetch(self, chunks: Sequence[int]) -> Iterator[Batch]:
        lengths, ids = self._manifest.lengths, self._manifest.ids
        asked, wanted = ids[list(chunks)].tobytes(), int(lengths[list(chunks)].sum())
        # One that is away costs this request its time-out and is no error: the store is asked next.
        if answer := self._site.ask(self._node, f"/chunks/{self._digest.hex()}", asked, wanted):
            data, pieces, at = memoryview(answer), [], 0
            for chunk in chunks:
                pieces.append(data[at : at + int(lengths[chunk])])
                at += int(lengths[chunk])
            yield Batch(chunks, pieces, len(data))


class PeerServer:
    """Answers peers. `give` finds the bytes, fetching them from a store if it must."""

    def __init__(self, site: Site, give: Give) -> None:
        self._site, self._give = site, give
        self._clients: dict[asyncio.Task[None], None] = {}
        self._server: asyncio.Server | None = None
        self.listening = ""

    async def listen(self, address: str) -> None:
        """Serve on host:port instead of where we did; "" for nowhere. Raises OSError."""
        if address == self.listening:
            return
        await self.close()
        if address:
            host, _, port = address.rpartition(":")
            self._server = await asyncio.start_server(self._serve, host.strip("[]"), int(port))
            self.listening = address

    async def close(self) -> None:
        """Stop listening, drop the peers."""
        if self._server:
            self._server.close()
        for client in self._clients:
            client.cancel()
        self.listening = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._clients[task] = None
        if len(self._clients) > _CLIENTS:
            next(iter(self._clients)).cancel()
        try:
            with contextlib.suppress(OSError, EOFError, ValueError, asyncio.LimitOverrunError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._clients.pop(task)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is to end."""
        async with asyncio.timeout(60):  # between two requests
            first = await reader.readexactly(1)
        async with asyncio.timeout(_HEAD_S):
            head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            verb, path, _ = head[0].split(" ")
            parts = (one.partition(":") for one in head[1:])
            headers = {name.lower(): text.strip() for name, _, text in parts}
            length = int(headers.get("content-length", "0"))
            if verb != "POST" or not 0 < length <= _MAX_CHUNKS * _ID or length % _ID:
                return False
            body = await reader.readexactly(length)
        told, right = headers.get("authorization", ""), sign(self._site.secret, path, body)
        if not self._site.secret or not hmac.compare_digest(told.encode(), right.encode()):
            writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
            return False
        pieces: Sequence[Buffer] | None = None
        with contextlib.suppress(StoreError, OSError):
            pieces = await self._give(Digest.parse(path.removeprefix("/chunks/")), body)
        if pieces is None:
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        else:
            size = sum(memoryview(piece).nbytes for piece in pieces)
            writer.writelines([b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, *pieces])
        async with asyncio.timeout(60):
            await writer.drain()
        return True
