"""The rules of every HTTP client of the image store: where it may be led, how slow and how large an answer may be.

- At most REDIRECTS of them are followed, to web servers only, never from https to http. A password goes to no other
  server than the one that it stands beside.
- A URL from outside may lead to this machine's own network (server-side request forgery): by its name, by what the name
  resolves to at the second look, or by a redirect. So the address is checked that is connected to. A URL of this
  machine's administrator may be private; what it redirects to may not, unless that is the same host and port.
- A server that drips has a byte in time for each read: so a head has its time as a whole, and so has a body's piece.
- What a server says of itself is bounded before it is a number, and compared with what was asked for by the caller.

Proxies (HTTPS_PROXY, NO_PROXY) and private authorities (SSL_CERT_FILE, SSL_CERT_DIR) come from the environment; proxies
for the administrator's URLs only: one would look up a stranger's name again, where nobody checks.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
import urllib3.exceptions as failures
from urllib3.poolmanager import pool_classes_by_scheme

from imagestore.backends.protocol import MAX_BYTES
from imagestore.errors import Conflict, Corrupt, Denied, Invalid, NoSpace, NotFound, StoreError, Unavailable
from imagestore.outside import decimal, read_json

Response = urllib3.BaseHTTPResponse
REDIRECTS = 8
PATIENCE_S = 30.0
_CONNECT_S = 10.0
_SLOWEST_BYTES_S = 32 << 10  # an answer that comes slower after its patience is given up
_KEPT = 64  # connections: more than any process of ours has threads that read from one store
_PART_BYTES = 64 << 10  # as much as a socket mostly has, and little enough for malloc to keep
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
STATUS: dict[int, type[StoreError]] = {401: Denied, 403: Denied, 404: NotFound, 410: NotFound, 416: Corrupt}
STATUS |= {400: Invalid, 409: Conflict, 413: Invalid, 507: NoSpace}


class _Timed(socket.SocketIO):
    """A connection's bytes, as long as there is time for them."""

    until_s = 0.0

    def readinto(self, into: Any) -> int | None:
        if time.monotonic() > self.until_s:
            raise TimeoutError
        return super().readinto(into)


class _Answer(http.client.HTTPResponse):
    """Gives its head PATIENCE_S, and each piece of a body, with a chunk's length or what follows the last."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._file = cast(Any, self.fp.raw)
        self._file.__class__ = _Timed  # sockets, with TLS or without, make files of one class only
        self._file.until_s = time.monotonic() + PATIENCE_S

    def read1(self, n: int = -1) -> bytes:
        self._file.until_s = time.monotonic() + PATIENCE_S
        return super().read1(n)


POOLS: dict[str, Any] = dict(pool_classes_by_scheme)
"""For a PoolManager: connections whose answers are those."""
for _scheme, _pool in POOLS.items():
    _connection = type("Connection", (_pool.ConnectionCls,), {"response_class": _Answer})
    POOLS[_scheme] = type("Pool", (_pool,), {"ConnectionCls": _connection})


class Web:
    """Keeps connections, for any number of threads. `trusted`: the URLs are this machine's administrator's.

    pin: the SHA-256 of the one certificate that is believed, whatever it names, instead of authorities; ca: the PEM of
    the one authority that is, instead of the system's, whatever is named in what it signed.
    """

    def __init__(self, *, trusted: bool = True, pin: str = "", ca: str = "") -> None:
        self._trusted, self._pin, self._ca = trusted, pin, ca
        self._timeout = urllib3.Timeout(connect=_CONNECT_S, read=PATIENCE_S)
        self._proxies = getproxies() if trusted and not pin and not ca else {}
        self._pools: dict[str, urllib3.PoolManager] = {}  # by proxy; "" is none

    def open(
        self,
        verb: str,
        url: str,
        headers: Mapping[str, str],
        where: str,
        accepted: tuple[int, ...] = (200, 206),
        sent: Sequence[memoryview] | None = None,
    ) -> Response:
        """The answer's head; the caller reads the body (`body`) and closes it. `where`: the URL, for messages.

        sent: the request's own body, whose length is among the headers; then no redirect is followed.

        Raises Denied, NotFound, Corrupt (re-encoded), Invalid (no web address), Unavailable.
        """
        at, plain = url, dict(headers) | {"Accept-Encoding": "identity"}
        try:
            for _ in range(REDIRECTS + 1):
                home = _server(at) == _server(url)
                secret = urllib3.make_headers(basic_auth=_credentials(url)) if home else {}
                response = self._request(verb, at, {**plain, **secret}, home and self._trusted, sent)
                location = response.get_redirect_location()
                if not location or sent is not None:
                    return _checked(response, where, accepted)
                response.close()
                old, at = urlsplit(at), urljoin(at, location)
                if urlsplit(at).scheme not in ("https", old.scheme):
                    raise Denied(f"{where}: a redirect to {urlsplit(at).scheme}: is not followed")
        except (failures.LocationValueError, failures.URLSchemeUnknown, ValueError) as err:
            raise (Invalid if at == url else Unavailable)(f"{where}: {err}") from err
        except (failures.HTTPError, OSError) as err:
            if "CERTIFICATE_VERIFY_FAILED" in str(err):
                raise Denied(f"{where}: {err}", hint="a private CA goes into SSL_CERT_FILE") from err
            raise Unavailable(f"{where}: {err or type(err).__name__}") from err
        raise Unavailable(f"{where}: more than {REDIRECTS} redirects")

    def close(self) -> None:
        """Drop the connections."""
        for pool in self._pools.values():
            pool.clear()

    def _request(
        self, verb: str, url: str, headers: Mapping[str, str], private: bool, sent: Any = None
    ) -> Response:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)
        if not host or not port:
            raise ValueError("not a web address")
        how: dict[str, Any] = {"headers": headers, "timeout": self._timeout, "redirect": False}
        how |= {"retries": False, "preload_content": verb == "HEAD", "body": sent and iter(sent)}
        proxy = self._proxies.get(parts.scheme) or self._proxies.get("all") or ""
        if proxy and not proxy_bypass(parts.netloc.rpartition("@")[2]):
            return self._pool(proxy).request(verb, url, **how)
        if private:
            return self._pool("").request(verb, url, **how)
        how["headers"] = {**headers, "Host": parts.netloc.rpartition("@")[2]}
        target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
        names = {"server_hostname": host} if parts.scheme == "https" else {}
        addresses, began_s = _public(host, port), time.monotonic()
        for number, address in enumerate(addresses, 1):
            pool = self._pool("").connection_from_host(address, port, parts.scheme, names)
            try:
                return pool.urlopen(verb, target, assert_same_host=False, **how)
            except (failures.NewConnectionError, failures.ConnectTimeoutError):
                if number == len(addresses) or time.monotonic() - began_s > PATIENCE_S:
                    raise
        raise AssertionError("a name that resolves has an address")

    def _pool(self, proxy: str) -> urllib3.PoolManager:
        """The connections through one proxy, or through none."""
        if proxy not in self._pools:
            context = ssl.create_default_context(cadata=self._ca or None)
            more: dict[str, Any] = {"maxsize": _KEPT, "ssl_context": context}
            if self._pin:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                more["assert_fingerprint"] = self._pin
            if self._ca:
                context.check_hostname = more["assert_hostname"] = False
                context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # of Python 3.13: ours name no key usage
            if proxy:
                at = proxy if "://" in proxy else f"http://{proxy}"
                headers = urllib3.make_headers(proxy_basic_auth=_credentials(at))
                self._pools[proxy] = urllib3.ProxyManager(at, proxy_headers=headers, **more)
            else:
                self._pools[proxy] = urllib3.PoolManager(**more)
            self._pools[proxy].pool_classes_by_scheme = POOLS
        return self._pools[proxy]


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


def whole_of(said: str, start: int, length: int | None = None) -> int | None:
    """The size of the whole object that a Content-Range names; None if it is not of what was asked for (RFC 9110)."""
    match = _CONTENT_RANGE.fullmatch(said)
    if match is None or int(match[1]) != start:
        return None
    end = int(match[2]) + 1
    whole = end if match[3] == "*" else int(match[3])
    return whole if start < end <= whole and end == (whole if length is None else start + length) else None


def body(response: Response, where: str) -> Iterator[bytes]:
    """A body as it comes. Raises Unavailable when the connection ends early."""
    try:
        yield from iter(partial(response.read1, _PART_BYTES, decode_content=False), b"")
    except (failures.HTTPError, OSError) as err:
        raise Unavailable(f"{where}: {err or type(err).__name__}") from err


def range_header(start: int, length: int | None) -> dict[str, str]:
    """What asks for a `get`'s range; nothing for all of an object."""
    end = "" if length is None else start + length - 1
    return {} if start == 0 and length is None else {"Range": f"bytes={start}-{end}"}


def receive_range(
    parts: Iterable[bytes], start: int, length: int | None, size: int | None, said: str, where: str
) -> tuple[bytes, int]:
    """What a `get` asked for, and the size of the whole object. size, said: the answer's Content-Length and -Range.

    Raises Corrupt where they say that it is something else, or too large, and as `receive` does.
    """
    asked = range_header(start, length)
    whole = whole_of(said, start, length) if asked else size
    if asked and whole is None:
        raise Corrupt(f"{where}: asked for {asked['Range']}, was sent {said[:80] or 'all of it'}")
    if size is not None and size > MAX_BYTES:
        raise Corrupt(f"{where}: {size} bytes are too many")
    data = receive(parts, size if length is None else length, where)
    return data, len(data) if whole is None else whole


def receive(parts: Iterable[bytes], wanted: int | None, where: str, patience_s: float = 0.0) -> bytes:
    """A body as it comes from a server: exactly `wanted` bytes (None: to its end, at most 1 GiB).

    Raises Corrupt when it goes on, Unavailable when it ends early or drips.
    """
    most = MAX_BYTES if wanted is None else wanted
    data = b"".join(paced(parts, most, where, patience_s or PATIENCE_S, _SLOWEST_BYTES_S))
    if wanted is not None and len(data) != wanted:
        raise Unavailable(f"{where}: the answer ended after {len(data)} of {wanted} bytes")
    return data


def paced(
    parts: Iterable[bytes], most: int, where: str, patience_s: float, slowest_bytes_s: float
) -> Iterator[bytes]:
    """The parts of a body of at most so many bytes. Raises Corrupt when it goes on, Unavailable when it drips.

    That is when after `patience_s` less than `slowest_bytes_s` a second came. A read that hangs is the client
    library's to end.
    """
    size, started = 0, time.monotonic()
    for part in parts:
        size += len(part)
        if size > most:
            raise Corrupt(f"{where}: the server sends more than the limit of {most} bytes")
        yield part
        late_s = time.monotonic() - started - patience_s
        if late_s > 0 and size < min(most, late_s * slowest_bytes_s):
            raise Unavailable(f"{where}: only {size} bytes came in time")


def _server(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2].lower()


def _credentials(url: str) -> str | None:
    parts = urlsplit(url)
    return f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None


def _public(host: str, port: int) -> list[str]:
    """The addresses of a name, looked up once. Raises Denied if one of them is not public, OSError."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if refused := [address for address in found if not is_public(address)]:
        hint = "images come from public addresses only; an administrator's own source may be private"
        raise Denied(f"{host} leads to {refused[0]}, which is no public address", hint=hint)
    return found


def _checked(response: Response, where: str, accepted: tuple[int, ...]) -> Response:
    status = response.status
    if status in accepted and response.headers.get("content-encoding", "identity") == "identity":
        return response
    said: Any = None
    size = min(decimal(response.headers.get("content-length", "")) or 0, 1 << 12)
    with suppress(ValueError, StoreError):
        said = read_json(receive(body(response, where), size, where))
    response.close()
    if status in accepted:
        raise Corrupt(f"{where}: the server sends it re-encoded")
    said = said if isinstance(said, dict) else {}
    text = f"no such object ({status})" if status in (404, 410) else f"the server answered {status}"
    text, hint = str(said.get("error") or text), str(said.get("hint") or "")
    raise STATUS.get(status, Unavailable)(f"{where}: {text}", hint=hint)
