"""Which nodes are there: leases in the state store, so that a second server sees the same.

A node renews `alive/<node>`, an ephemeral key that holds the number of its lease. The server's own node lives as long
as this process. How to ask a node directly is no record: it is the agent's connection to this process. Nor is what it
and its guests use: in memory alone, each node is asked once in an interval, whoever looks.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import Node
from compute.cluster.records.transaction import Stored, Transaction, transact
from compute.cluster.state.protocol import StateStore
from compute.errors import ComputeError, LeaseLost, Unavailable
from compute.wire.operations import COUNTED, HELD, Figures, NodeOperations

LEASE_S = 12.0  # a node that has not renewed for so long is missing, and its routers move
FENCE_S = 8.0
"""A node that could not renew for so long removes its own routers: before anybody else may take them."""

GUESTS_S = 20.0  # a node that could not renew for so long takes the power of guests that others may be given
LOST_S = 20.0
"""One that is missing for so long is lost, and guests are given away: 12 s after it has stopped them."""

KIND, OFF = "alive", "off"  # off/<node>: the fence command has confirmed it, until the node's next lease
_COUNT_S = 15.0
_SAY_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server(Stored):
    """One of those on an etcd, by where agents reach it."""

    KIND: ClassVar[str] = "server"
    name: str
    url: str = ""  # of its API; "" on loopback
    seen_s: float = 0


async def known(store: StateStore, me: Server) -> None:
    """Until cancelled: nodes and clients are told of this server, and no more of those that were gone for a week."""

    def say(txn: Transaction) -> None:
        for one in txn.list(Server):
            if one.seen_s < time.time() - 168 * _SAY_S:
                txn.delete(Server, one.name)
        txn.update(replace(txn.find(Server, me.name) or me, url=me.url, seen_s=time.time()))

    while True:
        await asyncio.to_thread(transact, store, say)
        await asyncio.sleep(_SAY_S)


class Liveness:
    """`server` is the name of this process's own node."""

    def __init__(self, store: StateStore, server: str) -> None:
        self._store, self.server = store, server
        self._ways: dict[str, NodeOperations] = {}
        self.silent: dict[str, float] = {}  # since when (monotonic) nodes are missing, as `note` saw it
        self._noted_s = 0.0

    def attach(self, node: str, operations: NodeOperations) -> None:
        """How to ask this node directly, from now on: after a restart of the server its agent need not start anew."""
        self._ways[node] = operations

    def renew(self, node: str) -> dict[str, float]:
        """A node on another machine lives LEASE_S longer. Returns after how many seconds it must fence itself."""
        key = f"{KIND}/{node}"
        known = self._store.get(key)
        try:
            # Version 0.1 wrote the node's name there.
            self._store.refresh(int(known.value) if known and known.value.isdigit() else 0)
        except LeaseLost:
            lease = self._store.grant(LEASE_S)
            self._store.commit(
                {key: b"%d" % lease, f"{OFF}/{node}": None}, expect={}, lease=lease, ephemeral=(key,)
            )
        return {"fence_s": FENCE_S, "guests_s": GUESTS_S}

    def alive(self, node: str) -> bool:
        """The server's own agent registered, or the node renewed its lease in time."""
        return node in self._ways if node == self.server else self._store.get(f"{KIND}/{node}") is not None

    def among(self, nodes: Iterable[Node]) -> list[str]:
        """Those that live, the server's own always: it may start a moment later than the first question."""
        leased = {record.key.partition("/")[2] for record in self._store.list(f"{KIND}/")} | {self.server}
        return [n.name for n in nodes if n.state != "deleted" and n.name in leased]

    def usable(self) -> dict[str, str]:
        """Node → "" or why nothing new goes there."""
        nodes = [n for n in Transaction(self._store).list(Node) if n.state != "deleted"]
        living = self.among(nodes)
        lost = {n.name: "was lost, and has not said what is off" for n in nodes if n.fence}
        return {n.name: lost.get(n.name, "") if n.name in living else "does not answer" for n in nodes}

    async def operations(self, node: str) -> NodeOperations:
        """The way to ask the node directly. Raises Unavailable while its agent is away."""
        found = self._ways.get(node)
        if found is None or not await asyncio.to_thread(self.alive, node):
            raise Unavailable(f"node {node} does not answer", hint=f"does its agent run? sf node show {node}")
        return found

    def note(self, txn: Transaction) -> None:
        """Nodes that no longer renew become `missing`, those that do again `created`; their histories say when."""
        nodes = [n for n in txn.list(Node) if n.state != "deleted"]
        began_s, living, now = time.monotonic(), self.among(nodes), time.monotonic()
        # After a longer pause than a lease lasts, one may have been renewed and lost meanwhile: they count from now.
        since = self.silent if now - self._noted_s < LEASE_S else {}
        self._noted_s = began_s
        self.silent = {n.name: since.get(n.name, now) for n in nodes if n.name not in living}
        for known in nodes:
            state, words = ("created", "answers") if known.name in living else ("missing", "does not answer")
            found = txn.find(Node, known.name) if known.state != state else None
            if found is not None and found.state != "deleted" and txn.room > 10:
                txn.update(replace(found, state=state, lastseen_s=time.time()))
                txn.event(Node.KIND, known.name, words, type="status")


class Usage:
    """The two newest answers of each node."""

    def __init__(self, nodes: Liveness) -> None:
        self._nodes, self._said = nodes, dict[str, list[tuple[float, Mapping[str, Figures]]]]()

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.gather(*map(self._ask, await asyncio.to_thread(self._nodes.usable)))
            await asyncio.sleep(_COUNT_S)

    async def _ask(self, node: str) -> None:
        try:
            said = await (await self._nodes.operations(node)).usage()
        except ComputeError:  # it is silent, or of a version that does not count
            said = {}
        self._said[node] = [*self._said.get(node, [])[-1:], (time.monotonic(), said)]

    def of(self, one: Instance | Node) -> dict[str, Any] | None:
        """COUNTED and HELD, a guest's as its own node has it; None where nobody knows.

        per_s: growth in a second of what is counted, {} at first. cpu_share: of its CPUs; 1 is all of them.
        """
        guest, cpus = (one.uuid, one.cpus) if isinstance(one, Instance) else ("", one.facts.get("cpus", 1))
        answers = self._said.get(getattr(one, "node", one.name)) or [(0.0, {})]
        (then, before), (at, said) = answers[0], answers[-1]
        if guest not in said:
            return None
        now, was = {n: said[guest].get(n, 0) for n in (*COUNTED, *HELD)}, before.get(guest, {})
        rates = {n: max(0, now[n] - was[n]) / (at - then) for n in COUNTED if n in was and at > then}
        return now | {"per_s": rates, "cpu_share": rates["cpu_s"] / cpus if "cpu_s" in rates else None}
