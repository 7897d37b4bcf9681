"""The store's tree over HTTP: what any web server would do with it, and nothing of it that is not for readers.

An ASGI application (https://asgi.readthedocs.io/en/latest/specs/www.html). Objects named by digest are immutable for
ever; everything else is to be asked for again. The table of kinds says which keys exist: no path leads elsewhere.
"""

import asyncio
import os
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Backend, ObjectStat
from imagestore.backends.wrappers import Wrapper
from imagestore.errors import Corrupt, NotFound, StoreError
from imagestore.formats.keys import PACKS, Kind, kind_of
from imagestore.listening import Buckets, origin

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_PIECE_BYTES = 256 << 10
_FAR_PIECE_BYTES = 512 << 10
"""Of what is not in a directory here: each piece is a request to somebody."""
_OPEN_FILES = 256
_FOREVER = b"public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class Span:
    """What of a file an answer carries: `status` is 200, 206 or 416."""

    status: int
    start: int
    length: int


def span(header: str | None, size_bytes: int) -> Span:
    """Read a Range header (RFC 9110, section 14.2). Several ranges at once are answered with the whole."""
    match = _RANGE.fullmatch(header or "")
    if match is None or match[1] == match[2] == "":
        return Span(200, 0, size_bytes)
    if match[1] == "":
        start, end = max(0, size_bytes - int(match[2])), size_bytes
    else:
        start = int(match[1])
        end = min(int(match[2]) + 1, size_bytes) if match[2] else size_bytes
        if match[2] and int(match[2]) < start:
            return Span(200, 0, size_bytes)
    return Span(206, start, end - start) if start < end else Span(416, 0, 0)


def headers_of(scope: Scope) -> dict[bytes, str]:
    """A request's headers; of repeated ones the last."""
    return {key: value.decode("latin-1") for key, value in scope["headers"]}


def prepare(
    headers: Mapping[bytes, str], size_bytes: int, etag: str, modified_s: float, cache: bytes
) -> tuple[Span | None, Headers]:
    """(what to send, the answer's headers); None where the client has it already (304)."""
    out: Headers = [
        (b"etag", etag.encode()),
        (b"last-modified", formatdate(modified_s, usegmt=True).encode()),
        (b"cache-control", cache),
        (b"accept-ranges", b"bytes"),
        (b"x-content-type-options", b"nosniff"),
    ]
    known = headers.get(b"if-none-match", "")
    if known == "*" or etag in (part.strip().removeprefix("W/") for part in known.split(",")):
        return None, out
    condition = headers.get(b"if-range", etag)
    found = span(headers.get(b"range") if condition in (etag, out[1][1].decode()) else None, size_bytes)
    out.append((b"content-length", str(found.length).encode()))
    if found.status == 206:
        end = found.start + found.length - 1
        out.append((b"content-range", f"bytes {found.start}-{end}/{size_bytes}".encode()))
    elif found.status == 416:
        out.append((b"content-range", f"bytes */{size_bytes}".encode()))
    return found, out


async def answer(send: Send, status: int, headers: Headers, body: bytes = b"") -> None:
    """A whole response."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def refuse(send: Send, status: int, text: str, *, retry_s: int | None = None) -> None:
    """An error in one plain line."""
    body = f"{text}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    if retry_s is not None:
        headers.append((b"retry-after", str(retry_s).encode()))
    await answer(send, status, headers, body)


def public(path: str) -> tuple[str, Kind] | None:
    """The store's key behind a request's path, and its kind; None where it is not one for readers."""
    key = path.removeprefix("/")
    kind = kind_of(key)
    return (key, kind) if kind is not None and kind.public else None


class Tree:
    """GET and HEAD of a backend's objects."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._stats: OrderedDict[str, ObjectStat] = OrderedDict()
        inner = backend
        while isinstance(inner, Wrapper):
            inner = inner.inner
        self._root = inner.root if isinstance(inner, Directory) else None
        self._files: OrderedDict[str, int] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = public(scope["path"])
        if named is None:
            return await refuse(send, 404, "no such object")
        if scope["method"] not in ("GET", "HEAD"):
            return await refuse(send, 405, "read-only")
        key, immutable = named[0], not named[1].changes
        headers = headers_of(scope)
        try:
            stat = await self._stat(key, immutable)
            etag = f'"{key[-64:]}"' if immutable else f'"{stat.etag.strip(chr(34))}"'
            found, out = prepare(
                headers, stat.size_bytes, etag, stat.modified_s, _FOREVER if immutable else b"no-cache"
            )
            out.append((b"content-type", b"application/octet-stream"))
            if found is None:
                await answer(send, 304, out)
            elif scope["method"] == "HEAD" or not found.length:
                await answer(send, found.status, out)
            else:
                await self._body(receive, send, key, found, out)
        except NotFound:
            await refuse(send, 404, "no such object")
        except StoreError as error:
            # What went wrong behind us is our log's business; the client may come again.
            await refuse(
                send, 502 if isinstance(error, Corrupt) else 503, "the store did not give it", retry_s=5
            )

    async def _stat(self, key: str, immutable: bool) -> ObjectStat:
        if not immutable:
            return await asyncio.to_thread(self._backend.stat, key)
        stat = self._stats.get(key)
        if stat is None:
            stat = self._stats[key] = await asyncio.to_thread(self._backend.stat, key)
            if len(self._stats) > 10_000:
                self._stats.popitem(last=False)
        return stat

    async def _body(self, receive: Receive, send: Send, key: str, found: Span, out: Headers) -> None:
        """In pieces; the first is read before the status is sent, for it may fail.

        A slow client holds one piece of memory, the server's: an empty send waits until that is taken, where
        the next piece would wait in our hands. Nothing more is read for one that has hung up.
        """
        end, at = found.start + found.length, found.start
        most = _PIECE_BYTES if self._root else _FAR_PIECE_BYTES
        gone = None
        try:
            while at < end and not (gone and gone.done()):
                size = min(most, end - at)
                if gone:
                    await send({"type": "http.response.body", "body": b"", "more_body": True})
                data = self._local(key, at, size)
                if data is None:
                    data = (await asyncio.to_thread(self._backend.get, key, at, size)).data
                if at == found.start:
                    await send({"type": "http.response.start", "status": found.status, "headers": out})
                    gone = asyncio.create_task(_hung_up(receive)) if size < found.length else None
                at += size
                await send({"type": "http.response.body", "body": data, "more_body": at < end})
        finally:
            if gone:
                gone.cancel()

    def _local(self, key: str, at: int, size: int) -> bytes | None:
        """Of a pack in a directory, without a thread: a pack never changes, so its descriptor may be kept."""
        if self._root is None or kind_of(key) is not PACKS:
            return None
        descriptor = self._files.get(key)
        if descriptor is None:
            try:
                descriptor = os.open(self._root / key, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
            self._files[key] = descriptor
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        data = os.pread(descriptor, size, at)
        return data if len(data) == size else None


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Limits:
    """Middleware: at most `most` requests at once, and of one address `per_second` (in bursts ten times that)."""

    def __init__(self, app: Any, *, most: int, per_second: float) -> None:
        self._app, self._most = app, most
        self._running = 0
        self._buckets = Buckets(per_second, 10 * per_second) if per_second else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._running >= self._most:
            await refuse(send, 503, "too many requests at once", retry_s=2)
            return
        if self._buckets and not self._buckets.take(origin((scope.get("client") or ("",))[0])):
            await refuse(send, 429, "too many requests", retry_s=1)
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1
