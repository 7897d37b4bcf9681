"""What `sf serve` and `sf agent` have in common: one process per state directory, its stores, its agent, its end.

And `sf agent` itself, which has nothing else.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from compute.agent import link as remote
from compute.agent.agent import Agent, Controller
from compute.agent.image_service import ServedImages, Settings
from compute.agent.link import Fenced, Identity, RemoteController
from compute.agent.memory import Memory
from compute.config import Config
from compute.errors import Conflict, Invalid, brief
from imagestore import ImageCache, Store, StoreError, durable, listening, open_store
from net import Plane

log = logging.getLogger(__name__)

Say = Callable[[str], None]

_LOOK_S, _FIRST_S = 3.0, 5.0
_AGAIN_S, _END_S = 5.0, 6.0
_UNSET = Config().mesh_address
_MTU_BYTES = 1450  # inside a VXLAN over Ethernet


@contextlib.contextmanager
def only_one(state_dir: Path) -> Iterator[None]:
    """One server or agent per state directory, made if need be: the lock goes with the process, however that ends."""
    for name in ("", "run", "cache"):
        (state_dir / name).mkdir(mode=0o711, parents=True, exist_ok=True)
    path = state_dir / "run" / "serve.lock"
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(durable.locked(path, wait=False, mode=0o644))
        except BlockingIOError as err:
            hint = f"process {path.read_text().strip() or 'unknown'} has it; stop it, or set SF_STATE_DIR"
            raise Conflict(f"another sf serve uses {state_dir}", hint=hint) from err
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield


class NodeStores:
    """This machine's image stores, as its settings have them now: open where they can be reached.

    default: with the directory under `state_dir`, made where there is none; a joined node has the server's instead.
    """

    def __init__(self, config: Config, *, default: bool) -> None:
        self._config, self._default = config, default
        self._local = (config.state_dir / "store").as_uri()
        self._opened: dict[str, Store] = {}
        self._said: dict[str, str] = {}
        self.urls: Mapping[str, str] = {}
        self.images = ImageCache(config.state_dir / "cache", {})
        self._looking = ThreadPoolExecutor(1, "stores")
        # One that is away takes a minute to say so; this node's lease for guests ends before.
        with contextlib.suppress(TimeoutError):
            self._looking.submit(self._look, dict(config.stores)).result(_FIRST_S)

    async def keep(self) -> None:
        """For ever: stores and remotes that are added or come back are seen. Raises Invalid for unreadable settings."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await asyncio.get_running_loop().run_in_executor(self._looking, self._look)

    def _look(self, urls: Mapping[str, str] | None = None) -> None:
        """All that can be reached, in their order; one that cannot keeps no guest from starting."""
        now = urls or self._config.stores_again() or self.urls
        self.urls = {name: url for name, url in now.items() if self._default or url != self._local}
        found = {}
        for name, url in self.urls.items():
            try:
                if url not in self._opened:
                    self._opened[url] = open_store(url, create=url == self._local)
                found[name] = self._opened[url]
            except StoreError as err:
                if self._said.get(url) != (said := str(err)):
                    log.warning("image store %s: %s", name, said)
                self._said[url] = said
            if len(found) > len(self.images.stores):  # nobody waits for those that are still to be asked
                self.images.stores = dict(found)
        self.images.stores = found

    def close(self) -> None:
        for store in self._opened.values():
            store.backend.close()


async def agent(
    config: Config,
    node: str,
    controller: Controller,
    plane: Plane,
    stores: NodeStores,
    memory: Memory,
    address: IPv4Address | None = None,
    leased_s: Callable[[], float] = lambda: 0.0,
) -> Agent:
    """This machine's agent and its image service. `address`: where other nodes reach this one, if not as configured."""
    address = address or config.mesh_address
    # Loopback would carry more than any uplink does.
    mtu_bytes = 0 if address.is_loopback else await asyncio.to_thread(plane.largest_mtu, address)
    peers = f"{address}:{config.peer_port}" if config.peer_port and not address.is_loopback else ""
    settings = Settings(
        lambda: list(stores.urls.values()), config.fill, config.read_timeout_s, config.images, peers
    )
    return Agent(
        controller,
        node,
        config.state_dir,
        plane,
        ServedImages(stores.images, config.state_dir, settings),
        config.libvirt_uri,
        address=address,
        mtu_bytes=mtu_bytes or _MTU_BYTES,
        release=release(),
        memory=memory,
        instances=config.instance_dir,
        leased_s=leased_s,
    )


def joined(
    config: Config, identity: Identity, stores: NodeStores, memory: Memory, say: Say = log.info
) -> tuple[Any, Any]:
    """The agent of a node with its servers elsewhere, and its link to them, to be run: without a way there, too."""
    plane = Fenced(identity.installation, config.state_dir, identity.node, config.uplink)
    link = RemoteController(identity, config.state_dir, plane)

    async def acting() -> Agent:
        found = config.mesh_address
        address = await asyncio.to_thread(identity.local_address) if found == _UNSET else found
        say(f"mesh address {address}")
        return await agent(config, identity.node, link, plane, stores, memory, address, plane.power.since)

    return acting, link.run


def shortened(record: logging.LogRecord) -> bool:
    """A filter for loggers of others: a line for an error, instead of a traceback whose length a tenant chooses."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        record.msg, record.args = f"{record.getMessage().strip()[:200]}: {brief(error)}", ()
        record.exc_info = record.exc_text = None
    return True


async def lasting(what: str, part: Callable[[], Awaitable[None]]) -> None:
    """Until cancelled: `part`, and from the beginning after an error, which is said once while it stays the same."""
    said = ""
    while True:
        try:
            await part()
        except ImportError:  # no pause mends that
            raise
        except Exception as err:  # noqa: BLE001 - here every error ends that has no better owner: no part ends the others
            if said != (said := brief(err)):
                log.error("%s: %s; it begins anew", what, said)
        await asyncio.sleep(_AGAIN_S)


async def run(
    make_agent: Callable[[], Awaitable[Agent]],
    *parts: Callable[[], Awaitable[None]],
    answering: Sequence[asyncio.Task[None]] = (),
) -> None:
    """An agent and the other parts, until SIGINT or SIGTERM, or until one that answers fails: then its error.

    Those that answer are the first to end, then the agent, which still has something to say to the others.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(shortened)

    async def agent() -> None:
        await (await make_agent()).run()

    acting = asyncio.create_task(lasting("agent", agent))
    others = [asyncio.create_task(lasting(getattr(part, "__name__", "part"), part)) for part in parts]
    tasks = [asyncio.create_task(stop.wait()), acting, *others, *answering]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for server in answering:
            server.cancel()
        if answering:
            await asyncio.wait(answering, timeout=_END_S)
        acting.cancel()
        await asyncio.wait([acting])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def release() -> str:
    """The program's version."""
    try:
        return version("sf-cloud")
    except PackageNotFoundError:
        return "0"


async def serve_agent(config: Config, url: str = "", token: str = "", say: Say = log.info) -> None:
    """Join if a token is given, then run until SIGINT or SIGTERM. Guests and networks outlive it.

    Raises Conflict (it joined another server already), Invalid (it never joined), Denied, Unavailable.
    """
    with contextlib.ExitStack() as stack:
        state_dir = config.state_dir
        stack.enter_context(only_one(state_dir))
        listening.raise_limits()
        identity = remote.load(state_dir)
        if identity is None:
            if not (url and token):
                hint = "sf node token on the server, then here: sf agent --join URL --token T"
                raise Invalid(f"this machine has not joined a server ({state_dir})", hint=hint)
            identity = await remote.join(state_dir, url, token, config.node_name)
            say(f"joined {identity.url} as {identity.node}")
        elif url and url != identity.url:
            hint = f"sf node remove {identity.node} there, then remove {state_dir}/agent.json here"
            raise Conflict(f"this machine belongs to {identity.url} already", hint=hint)
        memory = Memory(state_dir, proof=hashlib.sha256(identity.secret.encode()).hexdigest()[:32])
        stack.enter_context(memory.alone(identity.installation))
        stores = stack.enter_context(contextlib.closing(NodeStores(config, default=False)))
        agent, link = joined(config, identity, stores, memory, say)
        say(f"sf agent {release()}: node {identity.node} of {identity.url}")
        await run(agent, link, stores.keep)
        say("stopped; guests and their networks go on running")
