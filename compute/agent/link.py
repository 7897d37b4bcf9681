"""The agent's way to a server on another machine: `compute.cluster.controller.Controller`'s verbs over HTTPS.

A join token names the server's certificate by its SHA-256. That certificate is then the only one this node trusts, and
the secret that the server gave for the token is the node's identity. What was desired last is kept on disk: while the
server is away, or after a start without it, the node is what it was told to be.

Two things it then must not be (`Lease`): a router, for another node takes over a network's router 12 s after this
node's lease was last renewed, and later the host of guests that another node may be given (`InstanceSpec.leased_s`).
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import socket
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from compute.agent.memory import Lease, cut, now_s
from compute.errors import ComputeError, Denied, Invalid, Unavailable
from compute.wire.codec import from_plain, to_plain
from compute.wire.operations import NodeOperations, answer
from compute.wire.spec import InstanceStatus, Inventory, JoinToken, NodeDesired, NodeEvent, NodeFacts
from compute.wire.streams import MESSAGE_BYTES, Stream
from imagestore import durable
from net import Action, Finding, NodeNetworks, Plane

log = logging.getLogger(__name__)

_RENEW_S, _ANSWER_S, _CONNECT_S = 2.0, 5.0, 2.0
_LONG_POLL_S, _AWAY_S = 20.0, 3.0
_asker: ContextVar[str] = ContextVar("asker")  # which server asked for what a task does
_LIMITS: dict[str, Any] = {"open_timeout": 5, "ping_timeout": 60, "compression": None, "proxy": None}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this node is and whom it belongs to: `agent.json`, mode 0600."""

    url: str  # of a server; of several of them with commas between
    node: str
    secret: str
    installation: str
    certificate: str  # the server's, in PEM: trusted alone

    def local_address(self) -> IPv4Address:
        """Our address towards the server (no packet is sent). Raises Unavailable."""
        server = urlsplit(self.url.partition(",")[0])
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((server.hostname or "", server.port or 443))
                return IPv4Address(probe.getsockname()[0])
        except OSError as err:
            raise Unavailable(f"there is no way to {self.url}: {err}") from err


def load(state_dir: Path) -> Identity | None:
    """The identity that an earlier join left, if there is one."""
    try:
        return from_plain(Identity, json.loads((state_dir / "agent.json").read_text()))
    except FileNotFoundError:
        return None


async def join(state_dir: Path, url: str, token_text: str, node: str) -> Identity:
    """Use up a token and keep the identity. Raises Denied (token, certificate), Conflict's text, Unavailable."""
    token, parts = JoinToken.parse(token_text), urlsplit(url.partition(",")[0])
    if parts.scheme != "https" or not parts.hostname:
        hint = "https://HOST:PORT, as sf node token printed it"
        raise Invalid(f"not the URL of a server: {url[:80]!r}", hint=hint)
    address = (parts.hostname, parts.port or 443)
    try:
        pem = await asyncio.to_thread(ssl.get_server_certificate, address, timeout=_ANSWER_S)
    except OSError as err:
        raise Unavailable(f"{url} does not answer: {err}", hint="is sf serve running there?") from err
    if hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest() != token.fingerprint:
        raise Denied(f"{url} shows a certificate that is not the token's", hint="is it the right server?")
    unknown = Identity(url, node, "", "", pem)
    async with _client(unknown) as client:
        answer = await _ask(client, "POST", "join", json={"token": token.secret, "name": node})
    identity = replace(unknown, secret=answer["identity"], installation=answer["installation"])
    state_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    durable.write(state_dir / "agent.json", json.dumps(to_plain(identity)).encode())
    return identity


def _context(identity: Identity) -> ssl.SSLContext:
    # The pinned certificate is the whole of the trust: no authorities, no host names, nothing from the environment.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=identity.certificate)
    return context


def _client(identity: Identity) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"{identity.url.partition(',')[0].rstrip('/')}/agent/v1/",
        headers={"Authorization": f"Node {identity.node}:{identity.secret}"},
        verify=_context(identity),
        trust_env=False,
    )


async def _ask(client: httpx.AsyncClient, verb: str, path: str, wait_s: float = 0, **options: Any) -> Any:
    """One request. Raises Unavailable when it is worth asking again, ComputeError otherwise."""
    try:
        limits = httpx.Timeout(wait_s + _ANSWER_S, connect=_CONNECT_S)
        answer = await client.request(verb, path, timeout=limits, **options)
        body = answer.json()
    except (httpx.HTTPError, ValueError) as err:
        raise Unavailable(f"the server {client.base_url.host} does not answer: {err!r}") from err
    if answer.status_code >= 500:
        raise Unavailable(f"the server {client.base_url.host} says {answer.status_code}: {body.get('error')}")
    if answer.status_code >= 400:
        raise ComputeError(f"the server refused: {body.get('error')}", hint=str(body.get("hint") or ""))
    return body


class Fenced(Plane):
    """A Plane that makes no router on this node while its lease is not held."""

    def __init__(self, installation: str, state_dir: Path, node: str, uplink: str = "") -> None:
        super().__init__(installation, state_dir)
        self.lease, self._node, self._uplink = Lease(), node, uplink
        self.power = Lease(state_dir / "lease")  # for guests that another node may be given

    def apply(self, desired: NodeNetworks) -> list[Action]:
        """As Plane's; `uplink` of this machine's own configuration goes before the server's."""
        networks, me = desired.networks, self._node
        if not self.lease.firm():
            networks = tuple(replace(n, router_node="") if n.router_node == me else n for n in networks)
        done = super().apply(replace(desired, networks=networks, uplink=self._uplink or desired.uplink))
        if not self.lease.held():  # it ran out meanwhile
            self.drop_routers()
        return done

    def doctor(self, desired: NodeNetworks) -> list[Finding]:
        return super().doctor(replace(desired, uplink=self._uplink or desired.uplink))


class RemoteController:
    """`agent.Controller` over HTTPS. `run` keeps the lease and answers the server's questions."""

    def __init__(self, identity: Identity, state_dir: Path, plane: Fenced) -> None:
        self._identity, self._kept = identity, state_dir / "desired.json"
        self._client, self._urls = _client(identity), list[str]()
        self._lease, self._power, self._drop = plane.lease, plane.power, plane.drop_routers
        self._apart = ThreadPoolExecutor(8, "lease")  # its own: no work that hangs elsewhere holds it up
        self._facts: NodeFacts | None = None
        self._operations: NodeOperations | None = None
        self._last: NodeDesired | None = None
        with contextlib.suppress(OSError, ValueError, ComputeError):
            self._last = from_plain(NodeDesired, json.loads(self._kept.read_text()))
        self._bound, self._told = set[str](), 0.0
        """Guests that may run here only while the lease for them is held; when what the agent acts on was asked for."""
        self._know(self._last)

    def _know(self, desired: NodeDesired | None) -> None:
        """The servers that this node was told when it joined, and those that there are now; and what is bound."""
        servers = desired.servers if desired else ()
        self._bound |= {spec.uuid for spec in desired.instances if spec.leased_s} if desired else set()
        known = dict.fromkeys(u.rstrip("/") for u in (*self._identity.url.split(","), *servers))
        self._urls = list(dict.fromkeys([*(u for u in self._urls if u in known), *known]))

    async def register(self, node: str, facts: NodeFacts, operations: NodeOperations) -> None:
        """Kept, and said as soon as the server answers: an agent starts without it."""
        self._facts, self._operations = facts, operations
        try:
            await self._register()
        except ComputeError as err:
            log.warning("%s", err)

    async def _register(self) -> None:
        if self._facts is not None:
            await _ask(self._client, "POST", "register", json={"facts": to_plain(self._facts)})

    async def desired(self, node: str, after_revision: int = 0, wait_s: float = 0) -> NodeDesired:
        """The newest, or the last known one while the server is away. Raises Unavailable before the first."""
        await self._safe()
        self._power.confirm(self._told)  # no sooner: now its guests know what is no longer theirs to start
        # A poll that began before the lease was gained cannot confirm it.
        wait_s = wait_s if self._lease.firm() and self._power.firm() else min(wait_s, 1.0)
        asked = now_s()
        try:
            plain = await _ask(self._client, "GET", f"desired?after={after_revision}&wait={wait_s}", wait_s)
            found = from_plain(NodeDesired, plain)
        except ComputeError as err:
            if self._last is None:
                raise Unavailable(str(err), hint=err.hint) from err
            if after_revision:
                log.warning("%s", err)
                await asyncio.sleep(_AWAY_S)
            return self._led(self._last)
        if self._last is None or found != self._last:
            await asyncio.to_thread(durable.write, self._kept, json.dumps(plain).encode())
        self._last = found
        self._lease.confirm(asked)
        self._bound = set() if self._power.firm() else self._bound  # else that may be another's, and run
        self._know(found)
        await self._safe(*{*found.given} - {spec.uuid for spec in found.instances})
        self._told = self._told if found.hold else asked  # a state on hold may not know whose its guests are
        return self._led(found)

    async def _safe(self, *given: str) -> bool:
        """Whether nothing ran here that another node was, or may have been, given: its power is taken."""
        doomed = {*given, *(() if self._power.firm() else self._bound)}
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._apart, cut, doomed) if doomed else ()
        for uuid in found:
            log.warning("the power of guest %s is taken: another node may have been given it", uuid)
        return not found

    def _led(self, desired: NodeDesired) -> NodeDesired:
        """With the whole URLs of stores that the server gives over our own connection."""
        server, node = urlsplit(self._urls[0]), self._identity.node
        pin = hashlib.sha256(ssl.PEM_cert_to_DER_cert(self._identity.certificate)).hexdigest()
        base = f"https://{node}:{desired.store_token}@{server.netloc}/agent/v1/stores"
        whole = {
            n: url or f"{'sf+' * ('/' in n)}{base}/{quote(n, safe='')}?sha256={pin}"
            for n, url in desired.stores.items()
        }
        return replace(desired, stores=whole)

    async def report(
        self, node: str, statuses: Sequence[InstanceStatus], events: Sequence[NodeEvent]
    ) -> None:
        """Raises ComputeError: the agent keeps what it had to say."""
        body = {"statuses": to_plain(tuple(statuses)), "events": to_plain(tuple(events))}
        await _ask(self._client, "POST", "report", json=body)

    async def inventory(self, node: str, seen: Inventory) -> None:
        """Raises ComputeError: the agent says it again."""
        await _ask(self._client, "POST", "inventory", json={"seen": to_plain(seen)})

    async def run(self) -> None:
        """Until cancelled."""
        if self._client.is_closed:  # an error ended it before
            self._client = _client(replace(self._identity, url=self._urls[0]))
        try:
            async with _client(self._identity) as self._asked, asyncio.TaskGroup() as group:
                group.create_task(self._renewing())
                group.create_task(self._fencing())
                asked = set[str]()
                while True:  # any of the servers may ask
                    for url in set(self._urls) - asked:
                        group.create_task(self._answering(url))
                    asked |= set(self._urls)
                    await asyncio.sleep(_RENEW_S)
        finally:
            await self._client.aclose()

    async def _renewing(self) -> None:
        known = False
        while True:
            # Not gained anew before all is off that others may have: this is the first thing after a start or a thaw.
            safe = self._power.held() or await self._safe()
            asked = now_s()
            try:
                if not known:  # a server that was away may have forgotten that we are here
                    await self._register()
                answer = await _ask(self._client, "POST", "renew")
                self._lease.renewed(asked, float(answer["fence_s"]))
                if safe:
                    self._power.renewed(asked, float(answer.get("guests_s", 0)))
                    await asyncio.get_running_loop().run_in_executor(self._apart, self._power.keep)
                known = True
            except ComputeError as err:
                log.warning("%s%s", err, f" ({err.hint})" if err.hint else "")
                known = False
                self._urls.append(self._urls.pop(0))
                lost, self._client = self._client, _client(replace(self._identity, url=self._urls[0]))
                await lost.aclose()  # whoever waits for an answer from there asks anew
            await asyncio.sleep(max(0.0, asked + _RENEW_S - now_s()))

    async def _fencing(self) -> None:
        """Drop our routers once the lease has run out, again if that failed; take guests' power with theirs."""
        dropped = True
        while True:
            await self._safe()
            # Where this process stands still, systemd starts another (WatchdogSec=; sd_notify(3)).
            with (
                contextlib.suppress(OSError, KeyError),
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to,
            ):
                to.sendto(b"WATCHDOG=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
            await asyncio.sleep(0.25)
            if self._lease.held():
                dropped = False
            elif not dropped:
                log.warning("no lease: this node's routers are dropped")
                try:
                    await asyncio.get_running_loop().run_in_executor(self._apart, self._drop)
                    dropped = True
                except Exception as err:  # noqa: BLE001 - whatever it was, two routers would be worse
                    log.error("routers could not be dropped: %s", err)

    async def dial(self, node: str, ticket: str) -> Stream:
        """Bring a stream over a connection of our own: only a node can connect. Raises Unavailable."""
        mine = self._identity
        where = f"wss{_asker.get().removeprefix('https')}/agent/v1/streams/{ticket}"
        told = {"Authorization": f"Node {mine.node}:{mine.secret}"}
        try:
            options = {"additional_headers": told, "max_size": MESSAGE_BYTES, **_LIMITS}
            socket = await connect(where, ssl=_context(mine), **options)
        except (OSError, TimeoutError, WebSocketException) as err:
            raise Unavailable(f"the server did not take a stream: {err!r}") from err
        return Stream(socket.send, socket.recv, socket.close, ConnectionClosed)

    async def _answering(self, url: str) -> None:
        """What a server asks of this node: console data, pings, streams. One that takes long holds up no other."""
        path = f"{url}/agent/v1/operations?wait={_LONG_POLL_S}"
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    orders = await _ask(self._asked, "GET", path, _LONG_POLL_S)
                    for order in orders:
                        group.create_task(self._answer(url, order))
                    if not orders:
                        await asyncio.sleep(0.1)
                except ComputeError:
                    await asyncio.sleep(1)

    async def _answer(self, url: str, order: dict[str, Any]) -> None:
        body: dict[str, Any]
        _asker.set(url)
        try:
            if self._operations is None:
                raise Unavailable("this node's agent is not ready")
            body = {"result": await answer(self._operations, order["verb"], order["arguments"])}
        except (ComputeError, OSError, ValueError, TypeError) as err:
            body = {"error": str(err) or repr(err), "hint": getattr(err, "hint", "")}
            body |= {"retry": True} if isinstance(err, Unavailable) else {}
        with contextlib.suppress(ComputeError):
            await _ask(self._asked, "POST", f"{url}/agent/v1/operations/{order['id']}", json=body)
