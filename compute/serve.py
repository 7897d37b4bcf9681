"""`sf serve`: the API and this machine's agent in one process. The entry point that builds every adapter.

Guests, networks and their dnsmasq are not its children: it may be stopped or killed at any moment, and the next one
adopts what it finds.
"""

import asyncio
import json
import logging
import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from compute import process
from compute.agent.link import Identity
from compute.agent.memory import Memory, cut_first
from compute.api import agents
from compute.api import app as api
from compute.api.context import Services
from compute.cluster import state_backup
from compute.cluster.auth import Authority, ensure_local_key
from compute.cluster.certificates import authority, certificate, shown
from compute.cluster.controller import Controller
from compute.cluster.holding import Holds
from compute.cluster.images.bringing import Bringing
from compute.cluster.images.snapshots import Snapshots
from compute.cluster.images.stores import MINE, NamespaceStores
from compute.cluster.liveness import Server, known
from compute.cluster.records.addresses import ensure_floating
from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import Node, find_machine
from compute.cluster.records.taken import secret
from compute.cluster.records.transaction import Transaction, transact
from compute.cluster.scheduler import destination
from compute.cluster.state.opening import open_state
from compute.cluster.state.protocol import StateStore
from compute.cluster.state_backup import SHARED
from compute.cluster.upkeep import alone, keep_up
from compute.config import Config, host_port
from compute.errors import Conflict, Unavailable
from compute.wire.streams import SOCKETS
from imagestore import Digest, durable, listening
from net import Plane

log = logging.getLogger(__name__)

_GRACE_S = 3


class _Server(uvicorn.Server):
    """Leaves signals to us: stopping the API is only one part of stopping."""

    async def main_loop(self) -> None:
        """Until cancelled, once a second for the date: uvicorn's own looks ten times whether it is to end."""
        with suppress(asyncio.CancelledError):
            while not await self.on_tick(0):
                await asyncio.sleep(1)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(config: Config, say: process.Say = log.info) -> None:
    """Run until SIGINT or SIGTERM. `say` gets lines for the person who started it.

    Raises Conflict when another one serves this state directory, or the address is taken.
    """
    with ExitStack() as stack:
        state_dir = config.state_dir
        stack.enter_context(process.only_one(state_dir))
        listening.raise_limits()
        listener = stack.enter_context(_listen(config.host, config.port))
        if config.state:
            await asyncio.to_thread(cut_first, state_dir)
        installation = "" if config.state else installation_id(state_dir)  # before there are records of it
        store = stack.enter_context(closing(open_state(config)))
        if config.state:
            installation = share(store, state_dir)
        ensure_local_key(store, state_dir / "auth" / "local-key")
        transact(store, lambda txn: ensure_floating(txn, config.floating_pool))
        stores = stack.enter_context(closing(process.NodeStores(config, default=True)))
        controller = Controller(store, installation, config, lambda: stores.urls)
        stack.callback(controller.feed.stop)
        here = find_machine(Transaction(store).list(Node), "", config.node_name)
        memory = Memory(state_dir, proof=here.uuid if here else "")
        stack.enter_context(memory.alone(installation))
        mine = secrets.token_urlsafe(32) if config.guests and config.state else ""
        node, parts = await controller.start(memory.now, mine), list[Any]()
        if config.guests and node != config.node_name:
            other = f"{config.node_name}, its host's or node_name, would count at its first start only"
            say(f"this machine's node keeps its name {node}: {other}")
            config = replace(config, node_name=node)
        agent: Any = asyncio.Event().wait  # nobody
        if mine:
            trusted = certificate(state_dir / "auth")[0].read_text()
            identity = Identity(f"https://{config.agent_listen}", node, mine, installation, trusted)
            agent, link = process.joined(config, identity, stores, memory)
            parts.append(link)
        elif config.guests:
            plane = Plane(installation, state_dir)
            agent = partial(process.agent, config, node, controller, plane, stores, memory)
        own = NamespaceStores(store, lambda: stores.urls.get("local", ""), state_dir)
        stack.callback(own.close)
        services = Services(config, store, controller, Authority(store), stores.images, own)
        tls = secured(config)
        servers = [(_Server(_settings(api.build(services), **tls)), listener)]
        if config.agent_listen:
            cert, key, _ = certificate(state_dir / "auth")
            joining = _settings(agents.build(services), ssl_certfile=cert, ssl_keyfile=key)
            servers.append((_Server(joining), stack.enter_context(_listen(*host_port(config.agent_listen)))))
        url = f"http{'s' if tls else ''}://{config.host}:{config.port}"
        say(f"sf {process.release()} serves {url}, state in {config.state or state_dir}")
        if tls and not config.tls_cert:
            say(f"elsewhere: sf login {url} --fingerprint {Digest.of(authority(state_dir / 'auth')[1])}")
        answering = [asyncio.create_task(server.serve([listening])) for server, listening in servers]

        holds, feed = Holds(store, installation), controller.feed
        seen: Any = {"limits": config, "usable": controller.nodes.usable, "used": controller.usage.of}
        passing = partial(controller.pass_on, asyncio.get_running_loop())
        fits = partial(destination, **seen)
        taking = Snapshots(store, own, lambda: stores.images.stores, feed, fits, passing)

        async def holding() -> None:
            made = own.made
            await holds.keep(lambda: stores.images.stores | {f"{MINE}/{n}": s for n, s in made().items()})

        brings = Bringing(store, own, stores.images, config)
        backups = partial(state_backup.keep, store, config, controller.server)
        upkeep = partial(keep_up, store, feed, controller.nodes, config, controller.usage.of)
        once: Any = [own.keep, taking.keep, upkeep, holding, partial(brings.keep, feed), backups]
        if config.state:
            once = [partial(alone, store, *(partial(process.lasting, "upkeep", part) for part in once))]
            me = Server(name=config.agent_listen, url="" if config.host.startswith(("127.", "0.")) else url)
            parts.append(partial(known, store, me))
        parts += [controller.usage.keep, stores.keep, *once, partial(brings.keep, feed, sent=True)]
        await process.run(agent, *parts, answering=answering)
        running = sum(i.power_state in ("on", "paused") for i in Transaction(store).list(Instance))
        say(f"stopped; {running} guests and their networks go on running, and the next sf serve finds them")


def share(store: StateStore, state_dir: Path) -> str:
    """What makes the installation, whose id it returns: the first server's, by way of the state. Raises Conflict."""
    served = all((state_dir / name).exists() for name in (SHARED[0], "node.json"))
    key = state_dir / "auth" / "local-key"
    key.parent.mkdir(mode=0o700, exist_ok=True)
    if not key.exists():
        durable.write(key, secrets.token_urlsafe(32).encode())
    installation_id(state_dir), certificate(key.parent), authority(key.parent)
    mine = json.dumps({name: (state_dir / name).read_text() for name in SHARED})
    first = json.loads(transact(store, lambda txn: secret(txn, "installation-files", first=mine)))
    for path, text in ((state_dir / name, first[name]) for name in SHARED):
        if served and path.parent == state_dir and path.read_text() != text:
            hint = "another etcd, or another SF_STATE_DIR"
            raise Conflict(f"{path} is not that of the first server of this etcd", hint=hint)
        durable.write(path, text.encode(), 0o644 if path.parent == state_dir else 0o600)
    return installation_id(state_dir)


def secured(config: Config) -> dict[str, Any]:
    """Own files, or what the installation's authority signed; nothing on loopback, or where a proxy does it."""
    cert, key = config.tls_cert, config.tls_key
    if not cert and config.tls:
        hosts = config.host, str(config.mesh_address), socket.gethostname(), socket.getfqdn(), "localhost"
        cert, key = map(str, shown(config.state_dir / "auth", hosts))
    return {"ssl_certfile": cert, "ssl_keyfile": key} if cert else {}


def _settings(app: FastAPI, **more: Any) -> uvicorn.Config:
    more |= {"log_config": None, "timeout_graceful_shutdown": _GRACE_S, **listening.settings(), **SOCKETS}
    made = uvicorn.Config(app, **more)
    made.load()
    if made.ssl:  # a client that writes in one thread while it reads a ticket in another loses what it wrote
        made.ssl.num_tickets = 0
    return made


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = socket.create_server((host, port), family=family)
        # asyncio does so only where it made the socket
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made
    except OSError as err:
        hint = "another sf serve? SF_LISTEN=host:port chooses another address"
        raise Conflict(f"cannot listen on {host}:{port}: {err.strerror or err}", hint=hint) from err


def installation_id(state_dir: Path) -> str:
    """The random id in everything that is ours; made once. Raises Unavailable for a broken file."""
    path, hint = state_dir / "installation.json", "restore it: without it nothing of ours is known"
    try:
        return str(json.loads(path.read_text())["id"])
    except FileNotFoundError as err:
        if (state_dir / "sf.db").exists():
            hint += " (if there never was a guest: remove sf.db)"
            raise Unavailable(f"{path} is lost", hint=hint) from err
        durable.write(path, json.dumps({"id": secrets.token_hex(4)}).encode(), 0o644)
        return installation_id(state_dir)
    except (ValueError, KeyError, TypeError) as err:
        raise Unavailable(f"cannot read {path}: {err}", hint=hint) from err
