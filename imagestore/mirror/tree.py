"""The store's tree over HTTP: what any web server would do with it, and nothing of it that is not for readers.

An ASGI application (https://asgi.readthedocs.io/en/latest/specs/www.html). Objects named by digest are immutable for
ever; everything else is to be asked for again. The table of kinds says which keys exist: no path leads elsewhere.
"""

import asyncio
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from typing import Any, TypeVar

from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Backend, ObjectStat
from imagestore.backends.wrappers import innermost
from imagestore.durable import opened
from imagestore.errors import Corrupt, NotFound, StoreError
from imagestore.formats.keys import PACKS, Kind, kind_of
from imagestore.listening import Buckets, origin

T = TypeVar("T")
log = logging.getLogger(__name__)
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_PIECE_BYTES = 256 << 10
_FAR_PIECE_BYTES = 512 << 10  # of what is not in a directory here: each piece is a request to somebody
_FOREVER = "public, max-age=31536000, immutable"


def span(header: str | None, size_bytes: int) -> tuple[int, int, int]:
    """Read a Range header (RFC 9110, section 14.2): status (200, 206 or 416), start and length of what is answered.

    Several ranges at once are answered with the whole.
    """
    match = _RANGE.fullmatch(header or "")
    first, last = match.groups() if match else ("", "")
    if first == last == "" or (first and last and int(last) < int(first)):
        return 200, 0, size_bytes
    start = int(first) if first else max(0, size_bytes - int(last))
    end = min(int(last) + 1, size_bytes) if first and last else size_bytes
    return (206, start, end - start) if start < end else (416, 0, 0)


class Ranged(Response):
    """The answer that carries a file, a range of it, or none of it (RFC 9110, sections 13 and 14).

    read: the bytes at a place, so many, told how many of the answer come after them. piece: how many to read at once,
    by how many are sent. The first piece is read before the status is sent, for it may fail. A slow client holds one
    piece of memory, the server's: an empty send waits until that is taken, where the next piece would wait in our
    hands. Nothing more is read for one that has hung up.
    """

    running = 0  # bodies under way in this process, of each class

    def __init__(
        self,
        size_bytes: int,
        etag: str,
        modified_s: float,
        cache: str,
        read: Callable[[int, int, int], Awaitable[bytes]],
        piece: Callable[[int], int],
    ) -> None:
        super().__init__()
        self._size_bytes, self._etag, self._read, self._piece = size_bytes, f'"{etag}"', read, piece
        self._told = {
            "etag": self._etag,
            "last-modified": formatdate(modified_s, usegmt=True),
            "cache-control": cache,
            "accept-ranges": "bytes",
            "x-content-type-options": "nosniff",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        known, told = headers.get(b"if-none-match", ""), dict(self._told)
        if known == "*" or self._etag in (part.strip().removeprefix("W/") for part in known.split(",")):
            return await Response(None, 304, told)(scope, receive, send)
        same = headers.get(b"if-range", self._etag) in (self._etag, told["last-modified"])
        status, start, length = span(headers.get(b"range") if same else None, self._size_bytes)
        told |= {"content-type": "application/octet-stream", "content-length": str(length)}
        if status == 206:
            told["content-range"] = f"bytes {start}-{start + length - 1}/{self._size_bytes}"
        elif status == 416:
            told["content-range"] = f"bytes */{self._size_bytes}"
        head = Response(None, status, told)
        if scope["method"] == "HEAD" or not length:
            return await head(scope, receive, send)
        kind, gone, done = type(self), None, 0
        kind.running += 1
        try:
            while done < length and not (gone and gone.done()):
                size = min(self._piece(done), length - done)
                if gone:
                    await send({"type": "http.response.body", "body": b"", "more_body": True})
                data = await self._read(start + done, size, length - done - size)
                if not done:
                    begin = {"type": "http.response.start", "status": status, "headers": head.raw_headers}
                    await send(begin)
                    gone = asyncio.create_task(_hung_up(receive)) if size < length else None
                done += size
                await send({"type": "http.response.body", "body": data, "more_body": done < length})
        except StoreError as error:
            if not done:
                raise
            log.error("%s: %s", scope["path"], error)  # no second answer: the server ends the connection
        finally:
            kind.running -= 1
            if gone:
                gone.cancel()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def refusal(status: int, text: str, *, retry_s: int | None = None) -> Response:
    """An error in one plain line."""
    return PlainTextResponse(f"{text}\n", status, {} if retry_s is None else {"retry-after": str(retry_s)})


def public(path: str) -> tuple[str, Kind] | None:
    """The store's key behind a request's path, and its kind; None where it is not one for readers."""
    key = path.removeprefix("/")
    kind = kind_of(key)
    return (key, kind) if kind is not None and kind.public else None


class Tree:
    """GET and HEAD of a backend's objects."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._threads = ThreadPoolExecutor(16, "sf-tree")
        """Its own: a store that does not answer takes none of what else the process does."""
        self._stats: OrderedDict[str, ObjectStat] = OrderedDict()  # of what never changes
        inner = innermost(backend)
        self._root = inner.root if isinstance(inner, Directory) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope)
            await answer(scope, receive, send)
        except NotFound:
            await refusal(404, "no such object")(scope, receive, send)
        except StoreError as error:
            # What went wrong behind us is our log's business; the client may come again.
            log.error("%s: %s", scope["path"], error)
            status = 502 if isinstance(error, Corrupt) else 503
            await refusal(status, "the store did not give it", retry_s=5)(scope, receive, send)

    async def _answer(self, scope: Scope) -> Response:
        named = public(scope["path"])
        if named is None:
            return refusal(404, "no such object")
        if scope["method"] not in ("GET", "HEAD"):
            return refusal(405, "read-only")
        key, immutable = named[0], not named[1].changes
        stat = self._stats.get(key)
        if stat is None:
            stat = await self._ask(self._backend.stat, key)
        if immutable:
            self._stats[key] = stat
            if len(self._stats) > 10_000:
                self._stats.popitem(last=False)
        etag, cache = (key[-64:], _FOREVER) if immutable else (stat.etag.strip('"'), "no-cache")
        most = _PIECE_BYTES if self._root else _FAR_PIECE_BYTES
        about = stat.size_bytes, etag, stat.modified_s, cache
        return Ranged(*about, partial(self._read, key), lambda done: most)

    async def _read(self, key: str, start: int, length: int, after: int) -> bytes:
        data = self._local(key, start, length)
        return data or (await self._ask(self._backend.get, key, start, length)).data

    async def _ask(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    def _local(self, key: str, at: int, size: int) -> bytes | None:
        """Of a pack in a directory, without a thread; its descriptor is not kept, nor room of a pack that goes."""
        if self._root and kind_of(key) is PACKS:
            with suppress(OSError), opened(f"{self._root}/{key}", os.O_RDONLY) as descriptor:
                data = os.pread(descriptor, size, at)
                return data if len(data) == size else None
        return None


class Limits:
    """Middleware: at most `most` requests at once, and of one address `per_second` (in bursts ten times that)."""

    def __init__(self, app: Any, *, most: int, per_second: float) -> None:
        self._app, self._most = app, most
        self._running = 0
        self._buckets = Buckets(per_second, 10 * per_second) if per_second else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._running >= self._most:
            await refusal(503, "too many requests at once", retry_s=2)(scope, receive, send)
        elif self._buckets and not self._buckets.take(origin((scope.get("client") or ("",))[0])):
            await refusal(429, "too many requests", retry_s=1)(scope, receive, send)
        else:
            self._running += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._running -= 1
