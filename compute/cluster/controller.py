"""The server's side of every agent: hands out desired state, takes reports, knows who is alive.

In one process an agent calls a Controller directly; on another machine `api/agents.py` calls it for the agent, with
the same verbs. Reports are facts about the past and may arrive late or twice: what does not fit the record is dropped.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address
from typing import TypeVar

from compute.cluster import joining
from compute.cluster.desired import build, image_site
from compute.cluster.records.networks import move_routers, router_candidates
from compute.cluster.records.objects import (
    Claims,
    Instance,
    Interface,
    Network,
    Node,
    Taken,
    Transaction,
    new_uuid,
    transact,
)
from compute.cluster.state.protocol import StateStore
from compute.cluster.states import settle
from compute.errors import Compacted, ComputeError, LeaseLost, NotFound, Unavailable
from compute.wire.codec import to_plain
from compute.wire.operations import NodeOperations
from compute.wire.spec import InstanceState, InstanceStatus, NodeDesired, NodeEvent, NodeFacts

log = logging.getLogger(__name__)

T = TypeVar("T")

LEASE_S = 12.0
"""A node that has not renewed for so long is missing, and its routers move."""

FENCE_S = 8.0
"""A node that could not renew for so long removes its own routers: before anybody else may take them."""

_PLANNED = frozenset({Instance.KIND, Interface.KIND, Network.KIND, Node.KIND, "alive"})
_WATCH_S = 1.0
_SWEEP_S = 60.0
_KEEP_DELETED_S = 3600.0
_KEEP_REQUEST_S = 86400.0


class Feed:
    """The store's changes for coroutines: one thread watches, any number of tasks wait."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._newest: dict[str, int] = {}
        self._moved = asyncio.Event()
        self._stop = threading.Event()
        self.revision = store.revision()

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, args=(loop,), name="state-watch", daemon=True).start()

    def stop(self) -> None:
        """The thread ends by itself, at the latest when the store is closed."""
        self._stop.set()

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        revision = self.revision
        while not self._stop.is_set():
            try:
                changes = self._store.watch("", revision, _WATCH_S)
                kinds = {change.key.partition("/")[0] for change in changes}
                revision = changes[-1].revision if changes else revision
            except Compacted:
                kinds, revision = {"*"}, self._store.revision()
            if kinds and not self._stop.is_set():
                with suppress(RuntimeError):  # the loop was closed at this moment
                    loop.call_soon_threadsafe(self._note, kinds, revision)

    def _note(self, kinds: Iterable[str], revision: int) -> None:
        for kind in kinds:
            self._newest[kind] = revision
        self.revision = revision
        self._moved.set()
        self._moved = asyncio.Event()

    async def moved(self, kinds: Collection[str], after_revision: int, timeout_s: float) -> bool:
        """Wait until something of these kinds is newer than `after_revision`; False at the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while max((self._newest.get(kind, 0) for kind in (*kinds, "*")), default=0) <= after_revision:
                    await self._moved.wait()
        except TimeoutError:
            return False
        return True


class Controller:
    """One per server. `start` inside the event loop, `stop` before the store is closed."""

    def __init__(
        self,
        store: StateStore,
        installation: str,
        server: str,
        *,
        uplink: str = "",
        resolvers: tuple[IPv4Address, ...] = (),
    ) -> None:
        self._uplink, self._resolvers = uplink, resolvers
        self.store = store
        self.installation = installation
        self.server = server
        """Name of the server's own node: alive as long as this process is."""
        self.feed = Feed(store)
        self._last: dict[str, NodeDesired] = {}
        self._building = asyncio.Lock()
        self._operations: dict[str, NodeOperations] = {}
        self._leases: dict[str, int] = {}
        self._seen_s: dict[str, float] = {}

    async def start(self) -> None:
        """Make the server's own node known, so that the API can place on it before its agent has probed the machine."""
        self.feed.start()

        def action(txn: Transaction) -> None:
            if txn.find(Node, self.server) is None:
                memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
                facts = to_plain(NodeFacts(cpus=os.cpu_count() or 1, memory_mib=memory_mib))
                txn.create(Node(uuid=new_uuid(), name=self.server, facts=facts))
            if txn.find(Claims, self.server) is None:
                txn.create(Claims(name=self.server))
            joining.site_secret(txn)

        await self._act(action, self.server)

    def stop(self) -> None:
        self.feed.stop()

    # What agents call

    async def register(self, node: str, facts: NodeFacts, operations: NodeOperations) -> None:
        """Say what the machine is, at every start of its agent and when its images change."""

        def action(txn: Transaction) -> None:
            known = txn.find(Node, node)
            if known is None or known.state == "deleted":
                raise NotFound(f"node {node} has not joined", hint="sf agent --join URL --token T")
            plain = to_plain(facts)
            if (known.facts, known.state) != (plain, "created"):
                txn.update(replace(known, facts=plain, state="created", lastseen_s=time.time()))
            if known.facts == plain or {**known.facts, "images": plain["images"]} != plain:
                txn.event(Node.KIND, node, "its agent started", type="status", **plain)

        await self._act(action, node)
        self.attach(node, operations)

    def attach(self, node: str, operations: NodeOperations) -> None:
        """How to ask this node directly, from now on: after a restart of the server its agent need not start anew."""
        self._operations[node] = operations
        self._seen_s[node] = time.time()

    async def desired(self, node: str, after_revision: int = 0, wait_s: float = 0) -> NodeDesired:
        """All that the node must be, as soon as that differs from revision `after_revision`, or after `wait_s`."""
        deadline = time.monotonic() + wait_s
        while True:
            seen = self.feed.revision
            async with self._building:
                now = await asyncio.to_thread(self._build, node)
            left_s = deadline - time.monotonic()
            if now.revision != after_revision or left_s <= 0:
                return now
            await self.feed.moved(_PLANNED, seen, left_s)

    async def report(
        self, node: str, statuses: Sequence[InstanceStatus], events: Sequence[NodeEvent]
    ) -> None:
        """What an agent saw. When it returns, it is kept."""
        self._seen_s[node] = time.time()
        for status in statuses:
            await self._act(partial(settle, node=node, status=status), node)
        if events:

            def action(txn: Transaction) -> None:
                for event in events:
                    txn.event(
                        event.object_type,
                        event.object_uuid,
                        event.message,
                        type=event.type,
                        timestamp_s=event.timestamp_s,
                        duration_s=event.duration_s,
                        **event.extra,
                    )

            await self._act(action, node)

    async def renew(self, node: str) -> float:
        """A node on another machine lives LEASE_S longer. Returns after how many seconds it must fence itself."""
        self._seen_s[node] = time.time()
        lease = self._leases.get(node)
        try:
            if lease is None:
                raise LeaseLost(node)
            await asyncio.to_thread(self.store.refresh, lease)
        except LeaseLost:
            lease = await asyncio.to_thread(self.store.grant, LEASE_S)
            key = f"alive/{node}"
            await asyncio.to_thread(
                self.store.commit, {key: node.encode()}, expect={}, lease=lease, ephemeral=(key,)
            )
            self._leases[node] = lease
        return FENCE_S

    # What the API calls

    def operations(self, node: str) -> NodeOperations:
        """The way to ask the node directly. Raises Unavailable while its agent is away."""
        found = self._operations.get(node)
        if found is None or not self.alive(node):
            raise Unavailable(
                f"node {node} does not answer", hint=f"is its agent running? sf node show {node}"
            )
        return found

    async def examine(self, network: str) -> list[dict[str, str]]:
        """Every node's findings about a network and about the node itself; a silent node is one."""

        async def ask(node: str) -> list[dict[str, str]]:
            try:
                found = await self.operations(node).doctor()
            except Unavailable as err:
                found = [("", str(err), err.hint)]
            return [
                {"node": node, "problem": text, "fix": fix}
                for name, text, fix in found
                if name in ("", network)
            ]

        return [row for rows in await asyncio.gather(*map(ask, self.usable())) for row in rows]

    def alive(self, node: str) -> bool:
        """The server's own agent registered, or the node renewed its lease in time."""
        return node in self._operations and (
            node == self.server or self.store.get(f"alive/{node}") is not None
        )

    def usable(self) -> dict[str, str]:
        """Node → "" or why nothing new goes there. The server's own agent may start a moment later."""
        return {
            node.name: "" if node.name == self.server or self.alive(node.name) else "does not answer"
            for node in Transaction(self.store).list(Node)
            if node.state != "deleted"
        }

    async def keep_up(self) -> None:
        """Until cancelled: routers of nodes that went missing move, and what nobody needs any more goes."""
        swept_s = 0.0
        while True:
            seen = self.feed.revision
            try:
                await self._act(self._move_routers, self.server)
                if time.monotonic() - swept_s > _SWEEP_S:
                    await self._act(_sweep, self.server)
                    swept_s = time.monotonic()
            except ComputeError as err:  # a full disk must not end the server
                log.error("upkeep: %s", err)
                await asyncio.sleep(1)
            await self.feed.moved(("alive", Network.KIND), seen, _SWEEP_S)

    def _move_routers(self, txn: Transaction) -> None:
        """A network without a living router gets one. A node's lease outlives a restart of the server."""
        alive = self._alive(txn)
        lost = {n.router_node for n in txn.list(Network) if n.state == "created"} - set(alive)
        for name in sorted(lost) if alive else ():
            move_routers(txn, name, router_candidates(txn, alive))

    def _alive(self, txn: Transaction) -> list[str]:
        return [
            n.name
            for n in txn.list(Node)
            if n.state == "created"
            and (n.name == self.server or txn.store.get(f"alive/{n.name}") is not None)
        ]

    def forget(self, node: str) -> None:
        """The node was removed."""
        for known in (self._operations, self._leases, self._seen_s, self._last):
            known.pop(node, None)

    def lastseen_s(self, node: str) -> float:
        return time.time() if node == self.server and self.alive(node) else self._seen_s.get(node, 0)

    async def _act(self, action: Callable[[Transaction], T], node: str) -> T:
        return await asyncio.to_thread(transact, self.store, action, node)

    def _build(self, node: str) -> NodeDesired:
        read = Transaction(self.store)
        revision = self.store.revision()
        last = self._last.get(node)
        nodes = read.list(Node)
        now = build(
            node,
            self.installation,
            instances=read.list(Instance),
            interfaces=read.list(Interface),
            networks=read.list(Network),
            nodes=nodes,
            revision=last.revision if last else revision,
            uplink=self._uplink,
            resolvers=self._resolvers,
        )
        site = image_site(node, nodes, self._alive(read), joining.site_secret(read))
        now = replace(now, image_site=site)
        if last is None or now != last:
            self._last[node] = replace(now, revision=max(revision, last.revision + 1 if last else 0))
        return self._last[node]


def _sweep(txn: Transaction) -> None:
    """Records of the deleted stay an hour for those who poll, request keys a day, events as long as their object."""
    now = time.time()
    for instance in txn.list(Instance):
        if instance.state == InstanceState.DELETED and instance.updated_s < now - _KEEP_DELETED_S:
            txn.purge(instance)
    for network in txn.list(Network):
        if network.state == "deleted" and network.deleted_s < now - _KEEP_DELETED_S:
            txn.purge(network)
    for taken in txn.list(Taken, "request/"):
        if taken.created_s < now - _KEEP_REQUEST_S:
            txn.delete(Taken, taken.name)
