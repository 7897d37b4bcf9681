"""A small client of the REST API (shapes: /openapi.json; the interface of Shaken Fist).

http.client and not httpx: importing it takes a tenth of the time, and one connection asks one thing at a time.
"""

import base64
import http.client
import json
import secrets
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from select import select
from typing import Any
from urllib.parse import quote

from cli.command import settings
from cli.errors import AUTH, HTTP_CODES, TIMEOUT, UNREACHABLE, USAGE, Problem
from cli.settings import access, authority, check_key, is_local, living, parted

ANSWER_S = 40.0  # no request of the API may take 30 s
_ONCE = ("auth",), ("instances",), ("networks",), ("rules",)  # for an Idempotency-Key
Object = dict[str, Any]


class Api:
    """`api("GET", "instances", "web", all=True)`. Authenticates at its first call, and again when the token ends."""

    def __init__(self, told: tuple[str, str, str] | None = None, tls: ssl.SSLContext | None = None) -> None:
        url, self.namespace, self._key = told or access(settings())
        self._urls, self._tls, self._token, self._turn = url.split(","), tls, "", threading.Lock()
        self.servers: list[str] = []  # as one of them said at the login
        self._open()

    def _open(self) -> None:
        self.url = living(self._urls)
        parts = parted(self.url)
        if self._key:  # what it is exchanged for is as good, and goes to every server
            check_key(self.url, self.namespace, self._key)
        self.local = is_local(settings(), self.url)  # whether the server is this machine's
        self._path = parts.path.rstrip("/")
        safe = parts.scheme == "https"
        self.tls = self._tls or trusting(authority(settings(), self.url)) if safe else None
        self._connection = (
            http.client.HTTPSConnection(str(parts.hostname), parts.port, timeout=ANSWER_S, context=self.tls)
            if self.tls
            else http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=ANSWER_S)
        )

    def follow(self, path: str) -> Iterator[Object]:
        """Server-sent events for ever: a server that goes away is asked again, from where it was. Raises Problem."""
        last, at, _ = "", "", self.token()
        for _gone_s in poll(float("inf"), 2.0):
            try:
                told = {"Authorization": f"Bearer {self.token()}", "Last-Event-ID": last}
                self._connection.request("GET", f"{self._path}/{path}?follow=true", headers=told)
                if (response := self._connection.getresponse()).status != 200:
                    _answer(response.status, dict(response.headers), response.read())
                for line in response:
                    what, _, text = line.decode(errors="replace").rstrip().partition(": ")
                    at = text if what == "id" else at
                    if what == "data" and line.endswith(b"\n"):  # else the server ended in the middle of it
                        last = at
                        yield json.loads(text)
            except (OSError, http.client.HTTPException, Problem) as error:
                if isinstance(error, Problem) and error.code not in (UNREACHABLE, TIMEOUT):
                    raise
            self._connection.close()
            self._open()

    def __call__(self, method: str, *path: str, **body: Any) -> Any:
        """The answer's JSON, or its bytes if it is none. Raises Problem with the exit code of its status."""
        if {"", ".", ".."} & {*path}:  # such a path leads to all objects of a kind, which DELETE would take
            raise Problem("a name is missing", hint="is a variable empty?", code=USAGE)
        for _ in range(2):
            self.token()
            status, headers, data = self._send(method, path, body)
            if status != 401:
                break
            self._token = ""
        return _answer(status, headers, data)

    @property
    def known_as(self) -> tuple[str, str]:
        """The namespace and the name of the key that this client has logged in with."""
        claims = self._token.split(".")[1]
        told = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
        return str(told["sub"]), str(told["key"])

    def asked_by_anybody(self, *path: str) -> Any:
        """What needs no key."""
        return _answer(*self._send("GET", path, {}))

    def token(self) -> str:
        """With which this client is logged in. Several threads may ask: streams are opened by any."""
        with self._turn:
            if not self._token or time.monotonic() > self._until_s:
                self._login()
            return self._token

    def _login(self) -> None:
        if not self._key:
            self._send("GET", ("",), {})  # nobody there is the more useful answer
        check_key(self.url, self.namespace, self._key)
        body = {"namespace": self.namespace, "key": self._key}
        self._token, self._until_s = "", time.monotonic() + 600  # of the 900 s that it holds
        said = _answer(*self._send("POST", ("auth",), body))
        if not isinstance(said, dict) or "access_token" not in said:
            raise Problem(f"what answers at {self.url} is no API of sf", hint="is the URL right?", code=AUTH)
        self._token, self.servers = str(said["access_token"]), said.get("servers", [])

    def _send(self, method: str, path: tuple[str, ...], body: Object) -> tuple[int, Mapping[str, str], bytes]:
        where = "/".join((self._path, *(quote(part, safe="") for part in path)))
        sent = {"Content-Type": "application/json", "Idempotency-Key": secrets.token_hex(16)}
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        given = {name: value for name, value in body.items() if value is not None}
        left = len(self._urls) if method != "POST" or path in _ONCE else 0
        while True:
            if (idle := self._connection.sock) and select([idle], [], [], 0)[0]:
                self._connection.close()  # the server has ended it meanwhile
            try:
                self._connection.request(method, where, json.dumps(given) if given else None, sent)
                response = self._connection.getresponse()
                headers = {name.lower(): value for name, value in response.getheaders()}
                return response.status, headers, response.read()
            except ssl.SSLCertVerificationError as error:
                hint = "sf login URL --fingerprint b3:…, as sf serve prints it there"
                why = f"{self.url} shows a certificate that nobody known vouches for: {error.verify_message}"
                raise Problem(why, hint=hint, code=AUTH) from error
            except TimeoutError as error:
                raise Problem(f"no answer from {self.url} in {ANSWER_S:.0f} s", code=TIMEOUT) from error
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                if not left:
                    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                    why, hint = f"cannot reach {self.url}: {reason}", "is sf serve running there?"
                    raise Problem(why, hint=hint, code=UNREACHABLE) from error
                left -= 1
                self._open()  # another may answer


def trusting(ca: str) -> ssl.SSLContext:
    """TLS to whom this authority signed for, whatever the host is called; "": to whom the system's vouch for."""
    if not ca:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=ca)
    return context


def _answer(status: int, headers: Mapping[str, str], data: bytes) -> Any:
    found: Any = data
    if headers.get("content-type", "").startswith("application/json"):
        try:
            found = json.loads(data) if data else None
        except (ValueError, RecursionError) as error:
            raise Problem(f"the API answered {status} with broken JSON", code=UNREACHABLE) from error
    if status < 300:
        return found
    said = found if isinstance(found, dict) else {}
    raise Problem(
        str(said.get("error") or said.get("detail") or f"the API answered {status}"),
        hint=str(said.get("hint") or ""),
        code=HTTP_CODES.get(status, 1),
        request_id=str(said.get("request_id") or headers.get("x-request-id") or ""),
    )


def poll(timeout_s: float, every_s: float = 0.5) -> Iterator[float]:
    """Yield the seconds gone: first at once, then every `every_s`, until the time is over."""
    started = time.monotonic()
    while (gone_s := time.monotonic() - started) < timeout_s:
        yield gone_s
        time.sleep(every_s)
