"""A store behind any web server that knows Range: read-only, nothing can be listed.

Proxies (HTTPS_PROXY, NO_PROXY) and private authorities (SSL_CERT_FILE, SSL_CERT_DIR) are taken from the
environment. What a server says of itself is not believed: lengths and ranges are compared with what was asked for.
"""

import ssl
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx

from imagestore.backend import MAX_BYTES, Object, ObjectStat, ReadOnly, check_key, receive
from imagestore.errors import Corrupt, Denied, NotFound, StoreError, Unavailable, Unsupported

_REDIRECTS = 5
_MUTABLE = ("names", "layouts", "hooks", "gc", "tuf")
_STATUS: dict[int, type[StoreError]] = {401: Denied, 403: Denied, 404: NotFound, 410: NotFound, 416: Corrupt}


class Http(ReadOnly):
    """Objects below a URL. A body that comes slower than `slowest_bytes_s` after `patience_s` is given up."""

    def __init__(self, url: str, *, patience_s: float = 30.0, slowest_bytes_s: float = 32 << 10) -> None:
        self._base = url.rstrip("/")
        parts = urlsplit(self._base)
        self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._patience_s, self._slowest_bytes_s = patience_s, slowest_bytes_s
        timeout = httpx.Timeout(10.0, read=patience_s, pool=None)
        limits = httpx.Limits(max_connections=32, max_keepalive_connections=16)
        authorities = ssl.create_default_context()
        self._client = httpx.Client(
            timeout=timeout, limits=limits, verify=authorities, headers={"Accept-Encoding": "identity"}
        )

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
                if response.status_code != 206:
                    raise Corrupt(f"{self.url}/{key}: the server ignores Range")
                said = response.headers.get("content-range", "")
                total = int(said.rpartition("/")[2]) if said.rpartition("/")[2].isdigit() else None
                right = said.startswith(f"bytes {start}-") and total is not None
                if not right or (length is not None and size not in (None, length)):
                    raise Corrupt(
                        f"{self.url}/{key}: asked for bytes {start}-{end}, the server sent {said!r}"
                    )
            wanted = length if length is not None else size
            data = self._read(response, key, wanted)
        finally:
            response.close()
        return Object(data, _stat(key, response, total if total is not None else len(data)))

    def stat(self, key: str) -> ObjectStat:
        response = self._send("HEAD", key, {})
        response.close()
        size = self._length(response, key)
        if size is None:
            raise Corrupt(f"{self.url}/{key}: the server does not say the object's length")
        return _stat(key, response, size)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        raise Unsupported(f"{self.url}: a web server lists nothing")

    def close(self) -> None:
        self._client.close()

    def _send(self, verb: str, key: str, headers: dict[str, str]) -> httpx.Response:
        """Follow redirects, but never from https to http, and to nothing but web servers."""
        if key.partition("/")[0] in _MUTABLE:
            headers["Cache-Control"] = "no-cache"
        request = self._client.build_request(verb, f"{self._base}/{check_key(key)}", headers=headers)
        try:
            for _ in range(_REDIRECTS + 1):
                response = self._client.send(request, stream=True)
                following = response.next_request
                if following is None:
                    return self._checked(response, key)
                response.close()
                if following.url.scheme not in ("https", request.url.scheme):
                    raise Denied(f"{self.url}/{key}: a redirect to {following.url.scheme}: is not followed")
                request = following
        except httpx.UnsupportedProtocol as err:
            raise Denied(f"{self.url}/{key}: {err}") from err
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as err:
            if "CERTIFICATE_VERIFY_FAILED" in str(err):
                raise Denied(f"{self.url}/{key}: {err}", hint="a private CA goes into SSL_CERT_FILE") from err
            raise Unavailable(f"{self.url}/{key}: {err or type(err).__name__}") from err
        raise Unavailable(f"{self.url}/{key}: more than {_REDIRECTS} redirects")

    def _checked(self, response: httpx.Response, key: str) -> httpx.Response:
        status = response.status_code
        if status in (200, 206):
            return response
        response.close()
        text = "no such object" if status in (404, 410) else f"the server answered {status}"
        raise _STATUS.get(status, Unavailable)(f"{self.url}/{key}: {text}")

    def _length(self, response: httpx.Response, key: str) -> int | None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise Corrupt(f"{self.url}/{key}: the server sends it re-encoded")
        said = response.headers.get("content-length", "")
        if said.isdigit() and int(said) > MAX_BYTES:
            raise Corrupt(f"{self.url}/{key}: {said} bytes are too many")
        return int(said) if said.isdigit() else None

    def _read(self, response: httpx.Response, key: str, wanted: int | None) -> bytes:
        pace = {"patience_s": self._patience_s, "slowest_bytes_s": self._slowest_bytes_s}
        try:
            return receive(response.iter_raw(), wanted, f"{self.url}/{key}", **pace)
        except (httpx.HTTPError, OSError) as err:
            raise Unavailable(f"{self.url}/{key}: {err or type(err).__name__}") from err


def _stat(key: str, response: httpx.Response, size_bytes: int) -> ObjectStat:
    modified = response.headers.get("last-modified", "")
    try:
        modified_s = parsedate_to_datetime(modified).timestamp()
    except ValueError:
        modified_s = 0.0
    return ObjectStat(key, size_bytes, response.headers.get("etag") or f"{modified}/{size_bytes}", modified_s)
