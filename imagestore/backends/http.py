"""A store behind any web server that knows Range (read-only, nothing can be listed), and one behind a server's API.

`web` has the rules of where it may be led. What a server says of itself is not believed: lengths and ranges are
compared with what was asked for.
"""

import time
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlsplit

from imagestore.backends.protocol import (
    MAX_BYTES,
    Data,
    Etag,
    Object,
    ObjectStat,
    ReadOnly,
    check_key,
    pieces,
)
from imagestore.backends.web import Response, Web, body, range_header, receive, receive_range
from imagestore.errors import Corrupt, Invalid, Unsupported
from imagestore.formats.keys import kind_of
from imagestore.outside import decimal, read_json, real, whole


class Http(ReadOnly):
    """Objects below a URL; `?sha256=…` after it is the one certificate that is believed."""

    def __init__(self, url: str, *, ca: str = "") -> None:
        plain, _, pin = url.partition("?sha256=")
        self._base, parts = plain.rstrip("/"), urlsplit(plain.rstrip("/"))
        self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._web = Web(pin=pin, ca=ca)

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        if length == 0:
            return Object(b"", self.stat(key))
        response, where = self._send("GET", key, range_header(start, length)), f"{self.url}/{key}"
        try:
            said = response.headers.get("content-range", "") if response.status == 206 else ""
            size, parts = decimal(response.headers.get("content-length", "")), body(response, where)
            data, whole = receive_range(parts, start, length, size, said, where)
        finally:
            response.close()
        return Object(data, _stat(key, response, whole))

    def stat(self, key: str) -> ObjectStat:
        response = self._send("HEAD", key, {})
        size = decimal(response.headers.get("content-length", ""))
        if size is None or size > MAX_BYTES:
            raise Corrupt(f"{self.url}/{key}: the object's length is missing or too large: {size}")
        return _stat(key, response, size)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        raise Unsupported(f"{self.url}: a web server lists nothing")

    def close(self) -> None:
        self._web.close()

    def _send(self, verb: str, key: str, headers: dict[str, str]) -> Response:
        if (kind := kind_of(key)) is None or kind.changes:
            headers["Cache-Control"] = "no-cache"
        return self._web.open(verb, f"{self._base}/{check_key(key)}", headers, f"{self.url}/{key}")


def _stat(key: str, response: Response, size_bytes: int) -> ObjectStat:
    modified = response.headers.get("last-modified", "")
    try:
        modified_s = parsedate_to_datetime(modified).timestamp()
    except (ValueError, OverflowError):
        modified_s = 0.0
    etag = response.headers.get("etag") or f"{modified}/{size_bytes}"
    return ObjectStat(key, size_bytes, etag, modified_s)


class Wire(Http):
    """A store behind a server's API (compute/api/images/stores), with a key: `sf+https://NAME:PASSWORD@host/path`.

        GET, HEAD  URL/KEY    as of any web server; an ETag is the store's own, percent-encoded
        PUT, DELETE URL/KEY, with If-Match: "…" or If-None-Match: *; GET URL/?prefix=P
            → {"now": by the store's clock, "objects": [{"key", "size_bytes", "etag", "modified_s"}, …]}

    The server says what a key may put (mirror/admission), and keeps the hooks.
    """

    read_only, conditional, keeps_hooks = False, True, True
    _ahead_s: float | None = None

    def put(self, key: str, data: Data, *, if_match: Etag = None, if_none_match: bool = False) -> ObjectStat:
        parts = [memoryview(piece).cast("B") for piece in pieces(data)]
        more = {"If-None-Match": "*"} if if_none_match else {}
        more["Content-Length"] = str(sum(part.nbytes for part in parts))
        return self._ask("PUT", check_key(key), if_match, more, parts)[0]

    def delete(self, key: str, *, if_match: Etag = None) -> None:
        self._ask("DELETE", check_key(key), if_match)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        return iter(self._ask("GET", f"?prefix={quote(prefix)}"))

    def now(self) -> float:
        """By the clock in the last answer, and the time since."""
        if self._ahead_s is None:
            self._ask("GET", "?prefix=none")
        return time.monotonic() + (self._ahead_s or 0.0)

    def _ask(
        self, verb: str, key: str, match: str | None = None, headers: Any = None, parts: Any = None
    ) -> Sequence[ObjectStat]:
        where, sent = f"{self.url}/{key}", (headers or {}) | ({} if match is None else {"If-Match": match})
        response = self._web.open(verb, f"{self._base}/{key}", sent, where, sent=parts)
        try:
            said = read_json(receive(body(response, where), None, where))
            self._ahead_s = real(said["now"]) - time.monotonic()
            rows = [said["objects"][0]] if parts is not None else said["objects"]
            told = ((check_key(o["key"]), o["size_bytes"], str(o["etag"]), o["modified_s"]) for o in rows)
            return [ObjectStat(key, whole(size), etag, real(at)) for key, size, etag, at in told]
        except (ValueError, LookupError, TypeError, Invalid) as err:
            raise Corrupt(f"{where}: the server's answer is none: {err!r:.80}") from err
        finally:
            response.close()
