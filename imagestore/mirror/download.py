"""Bringing one file from a web server that is not trusted: resumable, bounded, and never to where it should not go.

A URL from outside may lead to this machine's own network (server-side request forgery), by its name, by what the name
resolves to at the second look, or by a redirect. So the address is checked that the socket really connects to.
"""

import hashlib
import ipaddress
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore
import httpx

from imagestore.errors import Corrupt, Denied, Invalid, NotFound, StoreError, Unavailable
from imagestore.progress import Progress, Report, silent

_REDIRECTS = 8
_PIECE_BYTES = 1 << 20
_PATIENCE_S = 30.0
_SLOWEST_BYTES_S = 4 << 10
_TEXT_BYTES = 4 << 20
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_STATUS: dict[int, type[StoreError]] = {401: Denied, 403: Denied, 404: NotFound, 410: NotFound}


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet at large; one that carries an IPv4 address counts as that."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None,))[0]
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


class _CheckedBackend(httpcore.SyncBackend):
    """Resolves a name once and connects to an address that passed; the name is not looked up again."""

    def __init__(self, allowed: Callable[[str, int], bool]) -> None:
        super().__init__()
        self._allowed = allowed

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} does not resolve: {error}") from error
        private = self._allowed(host, port)
        addresses = [str(entry[4][0]) for entry in found]
        refused = [address for address in addresses if not private and not is_public(address)]
        if refused:
            raise _Refused(f"{host} leads to {refused[0]}, which is no public address")
        for address in addresses[:-1]:
            try:
                return super().connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return super().connect_tcp(addresses[-1], port, timeout, local_address, socket_options)


class _Refused(Exception):
    """The address may not be connected to."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a download brought. `path` is None where the server said that nothing has changed."""

    path: Path | None
    url: str
    etag: str = ""
    last_modified: str = ""


class Downloader:
    """Keeps connections; one per thread. The caller closes it.

    trusted: the URLs come from this machine's administrator and may be private. What they redirect to may not, unless
    it is the same host and port. Proxies of the environment are used for trusted URLs only: a proxy
    would look up a stranger's name again, where nobody checks.
    """

    def __init__(self, *, trusted: bool) -> None:
        self._trusted = trusted
        self._own: tuple[str, int] | None = None
        timeout = httpx.Timeout(10.0, read=_PATIENCE_S)
        self._client = httpx.Client(
            timeout=timeout, trust_env=trusted, headers={"Accept-Encoding": "identity"}
        )
        # httpx has no public way to give its pool a network backend; the transports of proxies stay as they are.
        backend = _CheckedBackend(lambda host, port: (host, port) == self._own)
        pool = httpcore.ConnectionPool(
            ssl_context=ssl.create_default_context(), network_backend=backend, max_connections=8
        )
        transport = self._client._transport
        assert isinstance(transport, httpx.HTTPTransport)
        transport._pool.close()
        transport._pool = pool

    def __enter__(self) -> "Downloader":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def text(self, url: str) -> str:
        """A small file: a checksum list, a directory's page. Raises StoreError."""
        response = self._open(url, {})
        try:
            data = b"".join(self._pieces(response, _TEXT_BYTES))
        finally:
            response.close()
        return data.decode("utf-8", "replace")

    def fetch(
        self,
        url: str,
        destination: Path,
        *,
        limit_bytes: int,
        etag: str = "",
        last_modified: str = "",
        progress: Report = silent,
    ) -> Fetched:
        """Download to `destination`, going on where an interrupted run stopped if the file is still the same.

        etag, last_modified: what is there already; an unchanged file is not sent again.
        Raises Invalid past `limit_bytes`, Denied for a forbidden address, NotFound, Unavailable, Corrupt.
        """
        part, note = destination.with_suffix(".part"), destination.with_suffix(".part.json")
        headers = {}
        if etag:
            headers["If-None-Match"] = etag
        elif last_modified:
            headers["If-Modified-Since"] = last_modified
        start = 0
        if part.exists() and (validator := _remembered(note, url)):
            start = part.stat().st_size
            headers = {"Range": f"bytes={start}-", "If-Range": validator} if start else headers
        response = self._open(url, headers)
        try:
            if response.status_code == 304:
                return Fetched(None, url, etag, last_modified)
            if response.status_code == 416:  # it was whole already, or is shorter now
                part.unlink()
                response.close()
                response = self._open(url, {})
            start = _resumed_at(response, start)
            total = _total(response, start)
            if max(total, start) > limit_bytes:
                raise Invalid(f"{url}: {total} bytes are more than the limit of {limit_bytes}")
            _remember(note, url, response)
            with part.open("ab" if start else "wb") as file:
                done = start
                for piece in self._pieces(response, limit_bytes - start):
                    file.write(piece)
                    done += len(piece)
                    progress(Progress("download", done, total))
            if total and done != total:
                raise Unavailable(f"{url}: the answer ended after {done} of {total} bytes")
            part.replace(destination)
            note.unlink(missing_ok=True)
            said = response.headers
            return Fetched(destination, url, said.get("etag", ""), said.get("last-modified", ""))
        finally:
            response.close()

    def _open(self, url: str, headers: dict[str, str]) -> httpx.Response:
        first = urlsplit(url)
        self._own = (first.hostname or "", _port(url)) if self._trusted else None
        try:
            for _ in range(_REDIRECTS + 1):
                scheme = urlsplit(url).scheme
                if scheme not in ("https", "http") or (first.scheme == "https" and scheme != "https"):
                    raise Denied(f"{url[:200]}: only https is followed from {first.scheme}")
                response = self._client.send(
                    self._client.build_request("GET", url, headers=headers), stream=True
                )
                if not response.has_redirect_location:
                    return _checked(response, url)
                response.close()
                url = urljoin(url, response.headers["location"])
        except _Refused as error:
            hint = "images come from public addresses only; an administrator's own source may be private"
            raise Denied(f"{url[:200]}: {error}", hint=hint) from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            raise Invalid(f"{url[:200]}: {error}") from error
        except (httpx.HTTPError, httpcore.NetworkError, httpcore.TimeoutException, OSError) as error:
            raise Unavailable(f"{url[:200]}: {error or type(error).__name__}") from error
        raise Unavailable(f"{first.geturl()[:200]}: more than {_REDIRECTS} redirects")

    def _pieces(self, response: httpx.Response, limit_bytes: int) -> Iterator[bytes]:
        done, started = 0, time.monotonic()
        try:
            for piece in response.iter_raw(_PIECE_BYTES):
                done += len(piece)
                if done > limit_bytes:
                    raise Invalid(f"{response.url}: it grew past the limit of {limit_bytes} bytes")
                late_s = time.monotonic() - started - _PATIENCE_S
                if late_s > 0 and done < late_s * _SLOWEST_BYTES_S:
                    raise Unavailable(f"{response.url}: only {done} bytes came in {late_s:.0f} s")
                yield piece
        except (httpx.HTTPError, httpcore.NetworkError, httpcore.TimeoutException, OSError) as error:
            raise Unavailable(f"{response.url}: {error or type(error).__name__}") from error


def _port(url: str) -> int:
    parts = urlsplit(url)
    try:
        return parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
    except ValueError as error:
        raise Invalid(f"{url[:200]}: {error}") from error


def _checked(response: httpx.Response, url: str) -> httpx.Response:
    status = response.status_code
    if status in (200, 206, 304, 416):
        if response.headers.get("content-encoding", "identity") != "identity":
            response.close()
            raise Corrupt(f"{url}: the server sends it re-encoded")
        return response
    response.close()
    raise _STATUS.get(status, Unavailable)(f"{url}: the server answered {status}")


def _resumed_at(response: httpx.Response, start: int) -> int:
    """Where the body begins: `start` only if the server says so."""
    if response.status_code != 206:
        return 0
    if not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
        raise Corrupt(
            f"{response.url}: asked from byte {start}, got {response.headers.get('content-range')!r}"
        )
    return start


def _total(response: httpx.Response, start: int) -> int:
    """Bytes of the whole file, 0 if the server does not say."""
    length = response.headers.get("content-length", "")
    return start + int(length) if length.isdigit() else 0


def _remember(note: Path, url: str, response: httpx.Response) -> None:
    etag = response.headers.get("etag", "")
    strong = "" if etag.startswith("W/") else etag
    validator = strong or response.headers.get("last-modified", "")
    note.write_text(json.dumps({"url": url, "validator": validator}))


def _remembered(note: Path, url: str) -> str:
    try:
        body = json.loads(note.read_text())
        return str(body["validator"]) if body["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def hash_file(path: Path, algorithm: str) -> str:
    """Hex digest of a file by one of hashlib's algorithms."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
