"""etcd's JSON gateway, at whichever of its members answers: what etcd3gw, which knows one endpoint, leaves to us.

etcd://h1:2379,h2:2379,h3:2379[/PLACE], or etcds:// with TLS. PLACE: what our keys begin with, /sf/ if none is named.
"""

import base64
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception

from compute.errors import Compacted, ComputeError, Denied, Invalid, LeaseLost, NoSpace, Unavailable

CONNECT_S, ANSWER_S = 1.0, 3.0
PATIENCE_S = 12.0  # an election takes a second or two; who still gets no answer is told so
_URL = re.compile(r"(etcds?)://((?:[\w.-]+|\[[\da-f:]+\]):\d+(?:,[^/,]+:\d+)*)(/[\w./-]*)?")


class Lost(ComputeError):
    """No answer came: what was asked for may have happened, or may yet happen."""


def encode(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def decode(text: str) -> bytes:
    return base64.b64decode(text)


def prefix(text: str) -> dict[str, str]:
    """The range of all keys that begin with it; UTF-8 has no byte 0xff."""
    return {"key": encode(text), "range_end": encode(text.encode() + b"\xff")}


class Gateway:
    """Verbs of etcd's v3 API as JSON. Thread-safe."""

    def __init__(self, url: str, ca: str = "", cert: str = "", key: str = "", user: str = "") -> None:
        """Files of TLS in PEM; user: NAME:PASSWORD. Raises Invalid."""
        if not (found := _URL.fullmatch(url)):
            raise Invalid(f"not the URL of an etcd: {url[:80]}", hint="etcd://h1:2379,h2:2379,h3:2379")
        scheme, self.place = found[1].replace("etcd", "http"), f"/{(found[3] or '').strip('/') or 'sf'}/"
        self.members, self._user, self._at, self.closed = list[Etcd3Client](), user, 0, False
        for name, _, port in (host.rpartition(":") for host in found[2].split(",")):
            session = requests.Session()
            session.trust_env = False  # REQUESTS_CA_BUNDLE would go before `ca`, a proxy between us and etcd
            session.verify, session.cert = ca or True, (cert, key) if cert else None
            session.mount(f"{scheme}://", requests.adapters.HTTPAdapter(pool_maxsize=64))
            made: Any = Etcd3Client(name.strip("[]"), int(port), scheme, api_path="/v3/", session=session)
            made.timeout = (CONNECT_S, ANSWER_S)
            self.members.append(made)

    def ask(self, path: str, body: dict[str, Any], *, again: bool = True) -> dict[str, Any]:
        """One answer, from the member that answered last or the next one that does.

        again: it may happen twice; without, Lost is raised as soon as an answer does not come. Raises Unavailable after
        PATIENCE_S, NoSpace, LeaseLost, Compacted, Invalid.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not self.closed:
            at = self._at
            try:
                return self.ask_one(self.members[at], path, body)
            except Lost as err:
                self._leave(at)
                if not again:
                    raise
                if time.monotonic() > deadline:
                    hint = "do most of its members run, and reach each other? sf doctor"
                    raise Unavailable(f"etcd does not answer: {err}", hint=hint) from err
                time.sleep(0.05)
        raise Unavailable("the state store is closed")

    def ask_one(self, member: Etcd3Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """As `ask`, of this member alone. Raises Lost."""
        try:
            return self._post(member, path, body)
        except Denied:
            name, _, password = self._user.partition(":")
            if not name:
                raise
            # etcd3gw knows nothing of etcd's own users. A token lives for minutes, and not at all with others.
            member.session.headers.pop("Authorization", None)
            told = self._post(member, "auth/authenticate", {"name": name, "password": password})
            member.session.headers["Authorization"] = str(told.get("token"))
            return self._post(member, path, body)

    def _post(self, member: Etcd3Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(member.post(member.get_url(path), json=body))
        except Etcd3Exception as err:
            raise _told(member, err) from err
        except (requests.RequestException, ValueError, TypeError) as err:
            raise Lost(f"{member.base_url}: {err!r}"[:300]) from err

    def _leave(self, at: int) -> None:
        if self._at == at:
            self._at = (at + 1) % len(self.members)

    def follow(self, keys: dict[str, str], after: int, silence_s: float) -> Iterator[list[dict[str, Any]]]:
        """Events newer than that, as they come, until nothing came for so long (or ANSWER_S), or the member is gone.

        Raises Compacted.
        """
        at = self._at
        member = self.members[at]
        asked = {"create_request": keys | {"start_revision": str(after + 1)}}
        try:
            url, timeout_s = member.get_url("watch"), (CONNECT_S, min(silence_s, ANSWER_S))
            with member.session.post(url, json=asked, stream=True, timeout=timeout_s) as answer:
                for line in answer.iter_lines(chunk_size=1 << 16):
                    said = json.loads(line).get("result", {}) if line else {}
                    if said.get("compact_revision"):
                        raise Compacted(f"history before revision {said['compact_revision']} is gone")
                    yield said.get("events", [])
        except (requests.RequestException, ValueError, AttributeError) as err:
            if "timed out" not in str(err):
                self._leave(at)

    def close(self) -> None:
        self.closed = True
        for member in self.members:
            member.session.close()


_TOLD: tuple[tuple[str, type[ComputeError], str, str], ...] = (
    ("space exceeded", NoSpace, "etcd is full", "delete what is not needed; sf doctor says how full it is"),
    ("compacted", Compacted, "this history is gone", ""),
    ("lease not found", LeaseLost, "the lease has expired", ""),
    ("lease already exists", LeaseLost, "the lease exists", ""),
    ("authentication failed", Unavailable, "etcd refuses our user", "state_user = NAME:PASSWORD"),
    ("permission denied", Unavailable, "etcd's user may not do this", "etcdctl role grant-permission"),
    ("auth token", Denied, "etcd does not know this token", ""),
    ("user name is empty", Denied, "etcd wants a user", "state_user = NAME:PASSWORD"),
)


def _told(member: Etcd3Client, err: Etcd3Exception) -> ComputeError:
    """What etcd's words mean; all else is taken for a member that cannot answer now."""
    said = f"{err.detail_text} {err}"
    for words, kind, meaning, hint in _TOLD:
        if words in said:
            return kind(f"{meaning} ({member.base_url})", hint=hint)
    return Lost(f"{member.base_url}: {' '.join(said.split())[:200]}")
