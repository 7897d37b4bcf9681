"""`sf serve`: the API and this machine's agent in one process. The entry point that builds every adapter.

Guests, networks and their dnsmasq are not its children: it may be stopped or killed at any moment, and the next one
adopts what it finds.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from compute.agent.agent import Agent
from compute.agent.image_service import ServedImages, Settings
from compute.api import agents
from compute.api import app as api
from compute.api.context import Services
from compute.cluster.auth import Authority, ensure_local_key
from compute.cluster.controller import Controller
from compute.cluster.holding import Holds
from compute.cluster.joining import certificate
from compute.cluster.records.addresses import ensure_floating
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction, transact
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import Conflict, Unavailable
from imagestore import ImageCache, Store, StoreError, durable, open_store
from net import Plane

log = logging.getLogger(__name__)

Say = Callable[[str], None]

_REOPEN_S = 10.0
_GRACE_S = 3


class _Server(uvicorn.Server):
    """Leaves signals to us: stopping the API is only one part of stopping."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(config: Config, say: Say = log.info) -> None:
    """Run until SIGINT or SIGTERM. `say` gets lines for the person who started it.

    Raises Conflict when another one serves this state directory, or the address is taken.
    """
    with ExitStack() as stack:
        state_dir = config.state_dir
        for name in ("", "run", "instances", "cache"):
            (state_dir / name).mkdir(mode=0o711, parents=True, exist_ok=True)
        stack.enter_context(only_one(state_dir))
        listener = stack.enter_context(_listen(config.host, config.port))
        store = SqliteStore(state_dir / "sf.db")
        stack.callback(store.close)
        ensure_local_key(store, state_dir / "auth" / "local-key")
        transact(store, lambda txn: ensure_floating(txn, config.floating_pool))
        installation = installation_id(state_dir)
        images = ImageCache(state_dir / "cache", {})
        images.stores = open_stores(config, {})
        stack.callback(close_stores, images)
        controller = Controller(
            store, installation, config.node_name, uplink=config.uplink, resolvers=config.resolvers
        )
        stack.callback(controller.stop)
        await controller.start()
        plane = Plane(installation, state_dir)
        mtu_bytes = 0
        if not config.mesh_address.is_loopback:  # which would carry more than any uplink does
            mtu_bytes = await asyncio.to_thread(plane.largest_mtu, config.mesh_address)
        agent = Agent(
            controller,
            config.node_name,
            state_dir,
            plane,
            served(config, images, config.mesh_address),
            config.libvirt_uri,
            address=config.mesh_address,
            mtu_bytes=mtu_bytes or 1450,
            release=release(),
        )
        services = Services(config, store, controller, Authority(store), images)
        servers = [(_Server(_settings(api.build(services))), listener)]
        if config.agent_listen:
            host, _, port = config.agent_listen.rpartition(":")
            cert, key, _ = certificate(state_dir / "auth")
            secured = _settings(agents.build(services), ssl_certfile=cert, ssl_keyfile=key)
            servers.append((_Server(secured), stack.enter_context(_listen(host, int(port)))))
        say(f"sf {release()} serves http://{config.host}:{config.port}, state in {state_dir}")
        await _run(config, servers, controller, agent, images, Holds(store, installation))
        running = sum(i.power_state in ("on", "paused") for i in Transaction(store).list(Instance))
        say(f"stopped; {running} guests and their networks go on running, and the next sf serve finds them")


async def _run(
    config: Config,
    servers: Sequence[tuple[uvicorn.Server, socket.socket]],
    controller: Controller,
    agent: Agent,
    images: ImageCache,
    holds: Holds,
) -> None:
    """Until a signal comes, or a part fails: then its error."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    answering = [asyncio.create_task(server.serve([listener])) for server, listener in servers]
    tasks = [
        asyncio.create_task(stop.wait()),
        *answering,
        asyncio.create_task(agent.run()),
        asyncio.create_task(controller.keep_up()),
        asyncio.create_task(reopen_stores(config, images)),
        asyncio.create_task(holds.keep(images)),
    ]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for server, _ in servers:
            server.should_exit = True
        await asyncio.wait(answering, timeout=2 * _GRACE_S)
        await agent.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def _settings(app: FastAPI, **more: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=_GRACE_S, **more
    )


@contextlib.contextmanager
def only_one(state_dir: Path) -> Iterator[None]:
    """One server per state directory: the lock goes with the process, however that ends."""
    with (state_dir / "run" / "serve.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            lock.seek(0)
            hint = f"process {lock.read().strip() or 'unknown'} has it; stop it, or set SF_STATE_DIR"
            raise Conflict(f"another sf serve uses {state_dir}", hint=hint) from err
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as err:
        hint = "another sf serve? SF_LISTEN=host:port chooses another address"
        raise Conflict(f"cannot listen on {host}:{port}: {err.strerror or err}", hint=hint) from err


def installation_id(state_dir: Path) -> str:
    """The random id in everything that is ours; made once. Raises Unavailable for a broken file."""
    path = state_dir / "installation.json"
    try:
        return str(json.loads(path.read_text())["id"])
    except FileNotFoundError:
        durable.write(path, json.dumps({"id": secrets.token_hex(4)}).encode(), 0o644)
        return installation_id(state_dir)
    except (ValueError, KeyError, TypeError) as err:
        raise Unavailable(
            f"cannot read {path}: {err}", hint="restore it: without it nothing of ours is known"
        ) from err


def served(config: Config, images: ImageCache, address: IPv4Address) -> ServedImages:
    """The image service of this node, as its agent sees it. `address`: where other nodes reach this one."""
    limits = ("--fill-rate", config.fill_rate, "--cache-size", config.cache_size)
    urls = tuple(url for _, url in config.stores)
    peers = f"{address}:{config.peer_port}" if config.peer_port and not address.is_loopback else ""
    settings = Settings(urls, config.fill, config.read_timeout_s, limits, peers)
    return ServedImages(images, config.state_dir, settings)


def open_stores(config: Config, opened: Mapping[str, Store]) -> dict[str, Store]:
    """All that can be reached, in their order; one that cannot keeps no guest from starting."""
    found = {}
    for name, url in config.stores:
        try:
            default = url == (config.state_dir / "store").as_uri()
            found[name] = opened[name] if name in opened else open_store(url, create=default)
        except StoreError as err:
            log.warning("image store %s: %s", name, err)
    return found


async def reopen_stores(config: Config, images: ImageCache) -> None:
    while True:
        await asyncio.sleep(_REOPEN_S)
        if len(images.stores) < len(config.stores):
            images.stores = await asyncio.to_thread(open_stores, config, images.stores)


def close_stores(images: ImageCache) -> None:
    for store in images.stores.values():
        store.backend.close()


def release() -> str:
    """The program's version."""
    try:
        return version("sf-cloud")
    except PackageNotFoundError:
        return "0"
