"""A store behind any web server that knows Range: read-only, nothing can be listed.

`web` has the rules of where it may be led. What a server says of itself is not believed: lengths and ranges are
compared with what was asked for.
"""

from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import urllib3

from imagestore.backends.protocol import MAX_BYTES, Object, ObjectStat, ReadOnly, check_key
from imagestore.backends.web import PATIENCE_S, Web, body, receive, whole_of
from imagestore.errors import Corrupt, Unsupported
from imagestore.formats.keys import kind_of
from imagestore.outside import decimal


class Http(ReadOnly):
    """Objects below a URL; `?sha256=…` after it is the one certificate that is believed.

    A body that comes slower than `slowest_bytes_s` after `patience_s` is given up.
    """

    def __init__(
        self, url: str, *, patience_s: float = PATIENCE_S, slowest_bytes_s: float = 32 << 10
    ) -> None:
        plain, _, pin = url.partition("?sha256=")
        self._base, parts = plain.rstrip("/"), urlsplit(plain.rstrip("/"))
        self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._pace = {"patience_s": patience_s, "slowest_bytes_s": slowest_bytes_s}
        self._web = Web(patience_s=patience_s, pin=pin)

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        ranged = start > 0 or length is not None
        if length == 0:
            return Object(b"", self.stat(key))
        end = "" if length is None else start + length - 1
        response = self._send("GET", key, {"Range": f"bytes={start}-{end}"} if ranged else {})
        try:
            size = self._length(response, key)
            total = size
            if ranged:
                said = response.headers.get("content-range", "all of it")
                total = whole_of(said, start, length)
                if response.status != 206 or total is None:
                    raise Corrupt(f"{self.url}/{key}: asked for bytes {start}-{end}, was sent {said[:80]}")
            wanted = length if length is not None else size
            data = receive(body(response, f"{self.url}/{key}"), wanted, f"{self.url}/{key}", **self._pace)
        finally:
            response.close()
        return Object(data, _stat(key, response, total if total is not None else len(data)))

    def stat(self, key: str) -> ObjectStat:
        response = self._send("HEAD", key, {})
        size = self._length(response, key)
        if size is None:
            raise Corrupt(f"{self.url}/{key}: the server does not say the object's length")
        return _stat(key, response, size)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        raise Unsupported(f"{self.url}: a web server lists nothing")

    def close(self) -> None:
        self._web.close()

    def _send(self, verb: str, key: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        if (kind := kind_of(key)) is None or kind.changes:
            headers["Cache-Control"] = "no-cache"
        return self._web.open(verb, f"{self._base}/{check_key(key)}", headers, f"{self.url}/{key}")

    def _length(self, response: urllib3.BaseHTTPResponse, key: str) -> int | None:
        size = decimal(response.headers.get("content-length", ""))
        if size is not None and size > MAX_BYTES:
            raise Corrupt(f"{self.url}/{key}: {size} bytes are too many")
        return size


def _stat(key: str, response: urllib3.BaseHTTPResponse, size_bytes: int) -> ObjectStat:
    modified = response.headers.get("last-modified", "")
    try:
        modified_s = parsedate_to_datetime(modified).timestamp()
    except (ValueError, OverflowError):
        modified_s = 0.0
    return ObjectStat(key, size_bytes, response.headers.get("etag") or f"{modified}/{size_bytes}", modified_s)
