"""A whole server in a thread: real API, real state store, real HTTP; only the node is played by `PlayedAgent`."""

import asyncio
import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn

from compute.api import app as api
from compute.api.context import Services
from compute.cluster import upkeep
from compute.cluster.auth import Authority, ensure_local_key
from compute.cluster.controller import Controller
from compute.cluster.images.bringing import Bringing
from compute.cluster.images.stores import NamespaceStores
from compute.cluster.records.addresses import ensure_floating
from compute.cluster.records.transaction import transact
from compute.cluster.state.opening import open_state
from compute.config import Config
from compute.serve import secured
from compute.wire.operations import Figures
from compute.wire.spec import CachedImage, InstanceState, InstanceStatus, NodeDesired, NodeEvent, NodeFacts
from compute.wire.streams import SOCKETS
from imagestore import ImageCache, Resolved, listening
from imagestore.errors import NotFound
from imagestore.formats.digest import Digest

INSTALLATION = "0123abcd"


class KnownImages(ImageCache):
    """A resolver that knows debian:12 (2.5 GiB)."""

    def __init__(self) -> None:
        self.stores = {}

    def resolve(self, text: str, architecture: str) -> Resolved:
        if text not in ("debian:12", "debian"):
            raise NotFound(f"no image {text}", hint="did you mean debian:12?")
        return Resolved(Digest.of(b"debian"), 5 * 2**29)


class PlayedAgent:
    """Does in memory what an agent does, through the same Controller. `broken` names instances that fail to start."""

    FACTS = NodeFacts(cpus=4, memory_mib=8192, accel="tcg")

    def __init__(self, controller: Controller, node: str) -> None:
        self.controller, self.node = controller, node
        self.seen: dict[str, InstanceStatus] = {}
        self.desired: NodeDesired | None = None
        self.broken: set[str] = set()
        self.stalled: set[str] = set()
        self.console_data = b"SF-GUEST-READY\n"
        self.agent_state = ""
        self.echoes: list[asyncio.Task[None]] = []
        self.fetched: list[str] = []
        self.asked = 0

    async def run(self) -> None:
        await self.controller.register(self.node, self.FACTS, self)
        revision = 0
        while True:
            self.desired = await self.controller.desired(self.node, revision, 20)
            revision = self.desired.revision
            for spec in self.desired.instances:
                if spec.name in self.stalled:
                    continue
                state, power, error = InstanceState.CREATED, str(spec.power), ""
                if spec.delete:
                    state, power = InstanceState.DELETED, "off"
                elif spec.name in self.broken or spec.failed:
                    state, power, error = InstanceState.CREATING_ERROR, "off", "qemu would not start"
                status = InstanceStatus(spec.uuid, state, power, error, accel="tcg (no kvm)")
                status = replace(status, agent_state=self.agent_state, leased_s=spec.leased_s)
                if self.seen.get(spec.uuid) != status:
                    await self.controller.report(self.node, [status], [])
                    self.seen[spec.uuid] = status  # once it is kept: a server may die in between

    async def console(self, instance_uuid: str, length: int) -> bytes:
        return self.console_data if length < 0 else self.console_data[-length:]

    async def clear_console(self, instance_uuid: str) -> None:
        self.console_data = b""

    async def ping(self, network_uuid: str, address: str) -> tuple[list[str], list[str]]:
        return [f"PING {address}", "3 packets transmitted"], []

    async def usage(self) -> dict[str, Figures]:
        self.asked += 1
        used = {"cpu_s": self.asked * 5.0, "memory_bytes": 1 << 28, "read_bytes": self.asked << 20}
        node = {"cpu_s": self.asked * 10.0, "memory_bytes": 2 << 30, "memory_total_bytes": 8 << 30}
        node |= {"disk_bytes": 10 << 30, "disk_total_bytes": 100 << 30}
        return {"": node, **{uuid: dict(used) for uuid, s in self.seen.items() if s.power_state == "on"}}

    async def listening(self) -> list[tuple[str, int]]:
        return [("tcp", 9999)]

    async def cached(self, wanted: str) -> list[CachedImage]:
        self.fetched += [wanted] if wanted else []
        return [CachedImage(digest, 1, 1, False, False, 0.0, ()) for digest in self.fetched]

    async def stream(self, kind: str, target: str, options: dict[str, Any], ticket: str) -> None:
        """Says what it was asked, then says back whatever comes."""
        stream = await self.controller.dial(self.node, ticket)

        async def echo() -> None:
            await stream.send(json.dumps([kind, target, options]))
            while (message := await stream.receive()) is not None:
                await stream.send(message)
            await stream.aclose()

        self.echoes.append(asyncio.create_task(echo()))

    async def doctor(self) -> list[tuple[str, str, str]]:
        return [("lan", "the bridge is missing", ""), ("other", "x", ""), ("", "ufw drops", "allow it")]

    async def events(self, events: Sequence[NodeEvent]) -> None:
        await self.controller.report(self.node, [], events)


@dataclass(slots=True)
class Answer:
    status: int
    body: Any
    headers: dict[str, str]


@dataclass(slots=True)
class Running:
    """A server to talk to."""

    url: str
    key: str
    agent: PlayedAgent
    services: Services
    loop: asyncio.AbstractEventLoop
    tokens: dict[str, str] = field(default_factory=dict)

    async def keep_up(self) -> None:
        """What a server does without being asked, until cancelled."""
        here = self.services.controller
        config, used = self.services.config, here.usage.of
        await upkeep.keep_up(self.services.store, here.feed, here.nodes, config, used)

    def login(self, namespace: str, key: str) -> Answer:
        return self.call("POST", "/auth", {"namespace": namespace, "key": key}, namespace="")

    def call(
        self,
        verb: str,
        path: str,
        body: Any = None,
        *,
        namespace: str = "system",
        key: str = "",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        sent = {"Content-Type": "application/json", **(headers or {})}
        if namespace:
            if namespace not in self.tokens:
                self.tokens[namespace] = self.login(namespace, key or self.key).body["access_token"]
            sent["Authorization"] = f"Bearer {self.tokens[namespace]}"
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, sent, method=verb)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                status, raw, got = response.status, response.read(), dict(response.headers)
        except urllib.error.HTTPError as err:
            status, raw, got = err.code, err.read(), dict(err.headers)
        content: Any = raw
        with suppress(ValueError):
            content = json.loads(raw)
        return Answer(status, content, {k.lower(): v for k, v in got.items()})

    def get(self, path: str, body: Any = None, **named: Any) -> Any:
        return self.call("GET", path, body, **named).body

    def wait_for(self, path: str, state: str, timeout_s: float = 20) -> Any:
        """Poll as clients do."""
        done = threading.Event()
        for _ in range(int(timeout_s / 0.02)):
            found = self.get(path)
            if found.get("state") == state:
                return found
            done.wait(0.02)
        raise AssertionError(f"{path} is {found.get('state')}, not {state}: {found}")

    def count(self) -> None:
        """What guests use is asked for now, and not when its time comes."""
        asking = self.services.controller.usage._ask("node1")
        asyncio.run_coroutine_threadsafe(asking, self.loop).result(30)

    def network(self, name: str = "lan", netblock: str = "10.42.0.0/24", **more: Any) -> Any:
        answer = self.call("POST", "/networks", {"name": name, "netblock": netblock, **more})
        assert answer.status == 200, answer.body
        return answer.body

    def instance(self, name: str = "web", network: Any = "", **more: Any) -> Answer:
        body: dict[str, Any] = {"name": name, "cpus": 1, "memory": 256, "disk": [{"base": "debian:12"}]}
        if network:
            body["network"] = [{"network_uuid": network}] if isinstance(network, str) else network
        namespace = more.pop("as_namespace", "system")
        return self.call("POST", "/instances", {**body, **more}, namespace=namespace)


@contextmanager
def running(
    directory: Path,
    *,
    resolver: ImageCache | None = None,
    config: Config | None = None,
) -> Iterator[Running]:
    """Serve from `directory` until the block ends; what was stored stays for the next one."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = config or Config(state_dir=directory, node_name="node1")
    store, node = open_state(settings), settings.node_name
    ensure_local_key(store, directory / "auth/local-key")
    transact(store, lambda txn: ensure_floating(txn, settings.floating_pool))
    listener = socket.create_server(("127.0.0.1", 0))
    ready: list[Running] = []
    started, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        known = resolver or KnownImages()
        urls = lambda: {n: s.url for n, s in known.stores.items()}  # noqa: E731
        controller = Controller(store, INSTALLATION, settings, urls)
        await controller.start()
        own = NamespaceStores(store, lambda: (directory / "store").as_uri(), directory)
        services = Services(settings, store, controller, Authority(store), known, own)
        agent = PlayedAgent(controller, node)
        server = uvicorn.Server(
            uvicorn.Config(
                api.build(services),
                log_level="warning",
                **listening.settings(),
                **SOCKETS,
                **secured(settings),
            )
        )
        task = asyncio.create_task(agent.run())
        brings = Bringing(store, own, known, settings)
        bringing = [asyncio.create_task(brings.keep(controller.feed, sent=sent)) for sent in (False, True)]
        counting = asyncio.create_task(controller.usage.keep())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http{'s' * settings.tls}://127.0.0.1:{listener.getsockname()[1]}"
        key = (directory / "auth/local-key").read_text()
        ready.append(Running(url, key, agent, services, asyncio.get_running_loop()))
        while not server.started or not controller.nodes.alive(node):
            await asyncio.sleep(0.01)
        started.set()
        await stop.wait()
        server.should_exit = True
        await serving
        for one in (task, *bringing, counting):
            one.cancel()
            with suppress(asyncio.CancelledError):
                await one
        controller.feed.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        assert started.wait(30), "the server did not start"
        yield ready[0]
    finally:
        if ready:
            ready[0].loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        store.close()


if __name__ == "__main__":  # a server to be killed: DIRECTORY [STATE]
    told = Config(state_dir=Path(sys.argv[1]), node_name="node1", state="".join(sys.argv[2:]))
    with running(told.state_dir, config=told) as server:
        print(server.url, server.key, flush=True)
        threading.Event().wait()
