"""/stores/NAMESPACE/KEY: a namespace's own image store, as backends `sf+https` speak to it (imagestore/backends/http).

Who is trusted reads, the namespace itself pushes too. What is put lies in a file until it is whole, bounded in size and
in number at once; how slow it may come is `listening`'s rule.
"""

import asyncio
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import IO
from urllib.parse import quote, unquote

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from compute.api.context import Services, address_of, ask_stores
from compute.api.edge import SLASH
from compute.cluster.quotas import Quota
from compute.cluster.records.transaction import Transaction
from compute.errors import Denied, Invalid, NotFound
from imagestore import ObjectStat, Store, decimal
from imagestore.mirror import Ranged, admit, shown

_MOST_BYTES, _PIECE_BYTES, _AT_ONCE, _LOOK_S = 320 << 20, 1 << 20, 8, 60.0
_IN_MEMORY = 2  # bodies that are checked at once, of all stores: each is in memory as a whole meanwhile
_STORED: dict[str, tuple[int, float]] = {}  # URL of a store → bytes there or on their way, and when counted


class OwnStores:
    """An ASGI application below /stores. renames: whether names that are there may be changed."""

    def __init__(self, services: Services, *, renames: bool = True) -> None:
        self._services, self._renames = services, renames
        self._coming = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(_AT_ONCE))
        self._held = asyncio.Semaphore(_IN_MEMORY)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rest = scope["path"].removeprefix("/stores/")
        namespace, _, key = rest.replace(SLASH, "/").partition("/")
        # In a thread: the first use of a key costs a bcrypt, that of a store a few requests.
        store = await ask_stores(self._store, Request(scope), namespace)
        await self.serve(store, namespace, key, scope, receive, send)

    def _store(self, request: Request, namespace: str) -> Store:
        told, services = request.headers.get("authorization", ""), self._services
        caller = services.authority.caller(told, address_of(request), method=request.method)
        own = caller.admin or caller.namespace == namespace
        if not caller.may(namespace):
            raise NotFound(f"namespace {namespace[:80]} not found")
        if not own and request.method not in ("GET", "HEAD"):
            raise Denied(f"what {namespace} keeps is changed with a key of its own")
        if (store := services.namespaces.find(namespace, make=own)) is None:
            raise NotFound(f"namespace {namespace} has kept no image")
        return store

    async def serve(
        self, store: Store, namespace: str, key: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer for one object of a namespace's store, or (no key) a listing; who asks was let in."""
        request = Request(scope, receive)
        verb, told, backend, found = request.method, request.headers, store.backend, list[ObjectStat]()
        match = unquote(told["if-match"].strip('"')) if "if-match" in told else None
        new, swaps = told.get("if-none-match") == "*", match is not None and self._renames
        check = partial(ask_stores, admit, store, verb, key, creates=new, swaps=swaps)
        if verb in ("GET", "HEAD") and key:
            if not shown(key):
                raise NotFound(f"{key[:80]}: no such object")
            stat = await ask_stores(backend.stat, key)

            async def read(start: int, length: int, after: int) -> bytes:
                return (await ask_stores(backend.get, key, start, length)).data

            about = stat.size_bytes, quote(stat.etag, safe=""), stat.modified_s, "no-cache"
            await Ranged(*about, read, lambda done: _PIECE_BYTES)(scope, receive, send)
            return
        if verb == "PUT":
            async with self._coming[store.url], received(request, self._services) as file, self._held:
                data = await asyncio.to_thread(file.read)
                await reserve(self._services, namespace, store, len(data))
                await check(data=data)
                found = [await ask_stores(backend.put, key, data, if_match=match, if_none_match=new)]
        elif verb == "DELETE":
            await check()
            await ask_stores(backend.delete, key, if_match=match)
        elif verb == "GET":
            there = await ask_stores(lambda: list(backend.list(request.query_params.get("prefix", ""))))
            found = [stat for stat in there if shown(stat.key)]
        else:
            raise Invalid(f"no verb of a store: {verb[:20]}")
        rows = [asdict(s) | {"etag": f'"{quote(s.etag, safe="")}"'} for s in found]
        await JSONResponse({"now": await ask_stores(backend.now), "objects": rows})(scope, receive, send)


async def reserve(services: Services, namespace: str, store: Store, size: int) -> None:
    """Count what comes before it is there, for a minute. Raises NoCapacity."""
    known, read = _STORED.get(store.url, (0, -_LOOK_S)), Transaction(services.store)
    if time.monotonic() - known[1] >= _LOOK_S:
        total = await ask_stores(lambda: sum(stat.size_bytes for stat in store.backend.list("")))
        total += sum(p.stat().st_size for p in services.config.state_dir.glob(f"uploads/{namespace}/*"))
        if _STORED.get(store.url, known) == known:
            _STORED[store.url] = total, time.monotonic()
    counted, at = _STORED[store.url]
    Quota.of(read, namespace).check("stored_gb", (counted + size) / 2**30)
    _STORED[store.url] = counted + size, at


@asynccontextmanager
async def received(request: Request, services: Services) -> AsyncIterator[IO[bytes]]:
    """A file with all of a body, at its beginning."""
    size, held = decimal(request.headers.get("content-length", "")), bytearray()
    if size is None or size > _MOST_BYTES:
        raise Invalid(f"a body has a length, of at most {_MOST_BYTES} bytes")
    with tempfile.TemporaryFile(dir=services.config.state_dir) as file:
        async for part in request.stream():
            held += part
            if len(held) > _PIECE_BYTES:
                size -= await asyncio.to_thread(file.write, held)
                held = bytearray()
            if len(held) > size:
                raise Invalid("the body is longer than was said")
        file.write(held)
        file.seek(0)
        yield file
