"""A store behind any web server that knows Range: read-only, nothing can be listed.

Proxies (HTTPS_PROXY, NO_PROXY) and private authorities (SSL_CERT_FILE, SSL_CERT_DIR) are taken from the
environment. What a server says of itself is not believed: lengths and ranges are compared with what was asked for.
"""

import ssl
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
import urllib3.exceptions

from imagestore.backends.protocol import MAX_BYTES, Object, ObjectStat, ReadOnly, check_key, receive
from imagestore.errors import Corrupt, Denied, NotFound, StoreError, Unavailable, Unsupported

_REDIRECTS = 5
_CONNECT_S = 10.0
_KEPT = 64
"""Connections: more than any process of ours has threads that read from one store."""
_PART_BYTES = 64 << 10
"""As much as a socket mostly has, and little enough for malloc to keep."""
_MUTABLE = ("names", "layouts", "hooks", "gc", "tuf")
_STATUS: dict[int, type[StoreError]] = {401: Denied, 403: Denied, 404: NotFound, 410: NotFound, 416: Corrupt}


class Http(ReadOnly):
    """Objects below a URL. A body that comes slower than `slowest_bytes_s` after `patience_s` is given up."""

    def __init__(self, url: str, *, patience_s: float = 30.0, slowest_bytes_s: float = 32 << 10) -> None:
        parts = urlsplit(url.rstrip("/"))
        self._base = self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._headers = urllib3.make_headers(accept_encoding="identity", basic_auth=_credentials(url))
        self._patience_s, self._slowest_bytes_s = patience_s, slowest_bytes_s
        self._timeout = urllib3.Timeout(connect=_CONNECT_S, read=patience_s)
        self._proxies = getproxies()
        self._pools: dict[str, urllib3.PoolManager] = {}
        """By proxy; "" is none."""

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
                if response.status != 206:
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
        size = self._length(response, key)
        if size is None:
            raise Corrupt(f"{self.url}/{key}: the server does not say the object's length")
        return _stat(key, response, size)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        raise Unsupported(f"{self.url}: a web server lists nothing")

    def close(self) -> None:
        for pool in self._pools.values():
            pool.clear()

    def _pool(self, url: str) -> urllib3.PoolManager:
        """The connections for a URL, through the proxy that the environment names for it."""
        parts = urlsplit(url)
        proxy = self._proxies.get(parts.scheme) or self._proxies.get("all") or ""
        if proxy and proxy_bypass(parts.netloc.rpartition("@")[2]):
            proxy = ""
        if proxy not in self._pools:
            more: dict[str, Any] = {"maxsize": _KEPT, "ssl_context": ssl.create_default_context()}
            if proxy:
                at = proxy if "://" in proxy else f"http://{proxy}"
                headers = urllib3.make_headers(proxy_basic_auth=_credentials(at))
                self._pools[proxy] = urllib3.ProxyManager(at, proxy_headers=headers, **more)
            else:
                self._pools[proxy] = urllib3.PoolManager(**more)
        return self._pools[proxy]

    def _send(self, verb: str, key: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        """Follow redirects, but never from https to http, and to nothing but web servers."""
        headers = {**self._headers, **headers}
        if key.partition("/")[0] in _MUTABLE:
            headers["Cache-Control"] = "no-cache"
        url = f"{self._base}/{check_key(key)}"
        try:
            for _ in range(_REDIRECTS + 1):
                response = self._pool(url).request(
                    verb, url, headers=headers, timeout=self._timeout,
                    redirect=False, retries=False, preload_content=verb == "HEAD",
                )  # fmt: skip
                location = response.get_redirect_location()
                if not location:
                    return self._checked(response, key)
                response.close()
                old, url = urlsplit(url), urljoin(url, location)
                new = urlsplit(url)
                if new.scheme not in ("https", old.scheme):
                    raise Denied(f"{self.url}/{key}: a redirect to {new.scheme}: is not followed")
                if new.netloc != old.netloc:
                    headers.pop("authorization", None)
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as err:
            if "CERTIFICATE_VERIFY_FAILED" in str(err):
                raise Denied(f"{self.url}/{key}: {err}", hint="a private CA goes into SSL_CERT_FILE") from err
            raise Unavailable(f"{self.url}/{key}: {err or type(err).__name__}") from err
        raise Unavailable(f"{self.url}/{key}: more than {_REDIRECTS} redirects")

    def _checked(self, response: urllib3.BaseHTTPResponse, key: str) -> urllib3.BaseHTTPResponse:
        status = response.status
        if status in (200, 206):
            return response
        response.close()
        text = "no such object" if status in (404, 410) else f"the server answered {status}"
        raise _STATUS.get(status, Unavailable)(f"{self.url}/{key}: {text}")

    def _length(self, response: urllib3.BaseHTTPResponse, key: str) -> int | None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise Corrupt(f"{self.url}/{key}: the server sends it re-encoded")
        said = response.headers.get("content-length", "")
        if said.isdigit() and int(said) > MAX_BYTES:
            raise Corrupt(f"{self.url}/{key}: {said} bytes are too many")
        return int(said) if said.isdigit() else None

    def _read(self, response: urllib3.BaseHTTPResponse, key: str, wanted: int | None) -> bytes:
        pace = {"patience_s": self._patience_s, "slowest_bytes_s": self._slowest_bytes_s}
        parts = iter(partial(response.read1, _PART_BYTES, decode_content=False), b"")
        try:
            return receive(parts, wanted, f"{self.url}/{key}", **pace)
        except (urllib3.exceptions.HTTPError, OSError) as err:
            raise Unavailable(f"{self.url}/{key}: {err or type(err).__name__}") from err


def _credentials(url: str) -> str | None:
    parts = urlsplit(url)
    return f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None


def _stat(key: str, response: urllib3.BaseHTTPResponse, size_bytes: int) -> ObjectStat:
    modified = response.headers.get("last-modified", "")
    try:
        modified_s = parsedate_to_datetime(modified).timestamp()
    except ValueError:
        modified_s = 0.0
    return ObjectStat(key, size_bytes, response.headers.get("etag") or f"{modified}/{size_bytes}", modified_s)
