"""The server's side of every agent: takes its facts and reports, hands out what its node must be.

In one process an agent calls a Controller directly; on another machine `api/agents.py` calls it for the agent, with
the same verbs. Reports are facts about the past and may arrive late or twice: what does not fit the record is dropped.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address
from typing import Any, TypeVar

from compute.cluster import desired, quarantine
from compute.cluster.feed import Feed
from compute.cluster.liveness import Liveness, Usage
from compute.cluster.records.epochs import compare, epoch, heard
from compute.cluster.records.instances import Instance, stays
from compute.cluster.records.nodes import Node, answered, booted, check_facts, find_machine, hashed
from compute.cluster.records.snapshots import Snapshot
from compute.cluster.records.taken import Claims, site_secret
from compute.cluster.records.transaction import Transaction, new_uuid, pieces, transact
from compute.cluster.reports import keep_events, settle
from compute.cluster.state.protocol import StateStore
from compute.config import Config
from compute.errors import Conflict, Invalid, NotFound, Unavailable
from compute.wire.codec import from_plain, to_plain
from compute.wire.operations import Figures, NodeOperations
from compute.wire.spec import InstanceStatus, Inventory, NodeDesired, NodeEvent, NodeFacts, Remembered
from compute.wire.streams import Arrivals, Stream, carry, first, pair
from imagestore import read_json

T = TypeVar("T")
_MOST_ORPHANS, _EVENTS = 4096, 25
_MOVE_S, _LAST_S, _SAID_BYTES, _MOST_CHANNELS = 3000, 90, 1 << 16, 64


class Controller:
    """One per server. `start` inside the event loop; its `feed` is stopped before the store is closed."""

    def __init__(
        self,
        store: StateStore,
        installation: str,
        config: Config,
        stores: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._config = config
        self.stores = stores  # names and URLs of the image stores, as they are now
        self.store = store
        self.installation = installation
        self.server = config.node_name if config.guests else ""
        """Name of the server's own node: alive as long as this process is."""
        self.feed = Feed(store)
        self.nodes = Liveness(store, self.server)
        self.usage = Usage(self.nodes)
        self.arrivals = Arrivals()

    async def start(self, seen: Remembered | None = None, identity: str = "") -> str:
        """Make the server's own node known, so that the API can place on it before its agent has probed the machine.

        `seen`: who this machine is and what it remembers. Returns this node's name: the one that was configured when it
        was new, as a joined node has the one that it joined by.
        identity: what its agent shows us; then it is a node like all others, and not the server's own.
        """
        self.feed.start()
        seen = seen or Remembered("", "", 0)

        def action(txn: Transaction) -> str:
            if not self.server:  # it runs no guests
                site_secret(txn)
                return ""
            nodes = txn.list(Node)
            names = {n.uuid: n.name for n in nodes if n.state != "deleted"}
            known = find_machine(nodes, seen.machine, self.server)
            if known is None and txn.find(Node, self.server) is None:
                memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
                facts = to_plain(NodeFacts(os.cpu_count() or 1, memory_mib, architecture=os.uname().machine))
                known = Node(uuid=new_uuid(), name=self.server, facts=facts, machine=seen.machine)
            elif known is None:
                raise Conflict(f"node {self.server} is another machine", hint="give this another node_name")
            known = replace(known, identity=identity and hashed(identity), state="created")
            txn.update(replace(known, machine=seen.machine))
            if txn.find(Claims, known.name) is None:
                txn.create(Claims(name=known.name))
            names[known.uuid] = known.name
            compare(txn, list(names.values()), seen.epoch, seen.reached)
            site_secret(txn)
            return known.name

        name = await self._act(action, self.server)
        self.server = self.nodes.server = "" if identity else name
        return name

    # What agents call

    async def register(self, node: str, facts: NodeFacts, operations: NodeOperations) -> None:
        """Say what the machine is, at every start of its agent and when its images change. Raises Invalid."""
        plain, last = to_plain(facts), ""
        check_facts(plain)

        def action(txn: Transaction) -> str:
            known = txn.find(Node, node)
            if known is None or known.state == "deleted":
                raise NotFound(f"node {node} has not joined", hint="sf agent --join URL --token T")
            same = (n for n in txn.list(Node) if n.name != node and n.state != "deleted")
            taken = next((n for n in same if n.facts.get("address") == facts.address), None)
            if taken is not None and not IPv4Address(facts.address).is_loopback:
                hint = f"if that one is gone: sf node remove {taken.name}"
                raise Conflict(f"{facts.address} is the address of node {taken.name}", hint=hint)
            started = facts.boot and facts.boot != (known.facts.get("boot") or facts.boot)
            if started and (more := booted(txn, node, last)):
                return more
            if known.facts != plain:
                txn.update(replace(known, facts=plain, lastseen_s=time.time()))
            if known.facts == plain or {**known.facts, "images": plain["images"]} != plain:
                txn.event(Node.KIND, node, "its agent started", type="status", extra=plain)
            return ""

        while last := await self._act(action, node):
            pass
        self.nodes.attach(node, operations)

    async def desired(self, node: str, after_revision: int = 0, wait_s: float = 0) -> NodeDesired:
        """All that the node must be, as soon as it is another than `after_revision`, or after `wait_s`."""
        deadline = time.monotonic() + wait_s
        while True:
            seen, began = self.feed.revision, time.monotonic()
            now = await asyncio.to_thread(self._build, node)
            left_s = deadline - (ended := time.monotonic())
            if now.revision != after_revision or left_s <= 0:
                return now
            await asyncio.sleep(ended - began)  # half of the time at most, whatever changes elsewhere
            await self.feed.moved(desired.KINDS, seen, left_s)

    def _build(self, node: str) -> NodeDesired:
        read = Transaction(self.store)
        living = self.nodes.among(n for n in read.list(Node) if not n.fence)
        # What only this machine can reach, or only with its keys, goes over the node's own connection.
        web = {name: url if url.startswith("http") else "" for name, url in self.stores().items()}
        handed = {} if node == self.server else web
        links = self._config.uplink, self._config.resolvers
        return desired.read(read, node, self.installation, living, *links, handed, self.server)

    async def report(
        self, node: str, statuses: Sequence[InstanceStatus], events: Sequence[NodeEvent]
    ) -> None:
        """What an agent saw. When it returns, it is kept."""
        for status in statuses:
            await self._act(partial(settle, node=node, status=status), node)
        for at in range(0, len(events), _EVENTS):
            await self._act(partial(keep_events, node=node, events=events[at : at + _EVENTS]), node)

    async def inventory(self, node: str, seen: Inventory) -> None:
        """What a node remembers, and what it has that is in no record. Raises Conflict for a copy of another node."""
        if len(seen.orphans) > _MOST_ORPHANS:
            raise Invalid(f"no node has {len(seen.orphans)} guests")

        def action(txn: Transaction) -> bool:
            known = txn.get(Node, node)
            if known.machine not in ("", seen.machine):
                raise Conflict(f"node {node} is another state directory than this", hint="join it anew")
            if known.machine != seen.machine:
                txn.update(replace(known, machine=seen.machine))
            names = [n.name for n in txn.list(Node) if n.state != "deleted"]
            joined = node if node != self.server else ""
            if began := compare(txn, names, seen.epoch, seen.reached, joined=joined):
                txn.event(Node.KIND, node, f"it says that {epoch(txn).why}", type="audit")
            if quarantine.note(txn, node, seen.orphans):
                return True
            if not began and seen.epoch == epoch(txn).number:
                # What left it by a state that was put back may be back by now, what passed to it may have come.
                there = map(stays, txn.list(Instance)) if node in epoch(txn).waiting else []
                left = [i for i in there if node in i.left and i.state not in desired.LEAVING]
                for one in left[:20]:
                    txn.update(replace(one, left=tuple(name for name in one.left if name != node)))
                if left[20:]:
                    return True
                heard(txn, node)
            answered(txn, node, seen.fence, {one.uuid: one.power for one in seen.orphans})
            return False

        await asyncio.to_thread(pieces, self.store, action, node)

    async def dial(self, node: str, ticket: str) -> Stream:
        """Bring a stream that was asked for. Raises NotFound when nobody waits for it."""
        near, far = pair()
        self.arrivals.arrive(node, ticket, near)
        return far

    # What the API calls

    async def stream(self, node: str, kind: str, target: str, options: dict[str, Any]) -> Stream:
        """A stream of a node's. Raises Unavailable, and what the node raises."""
        operations = await self.nodes.operations(node)
        return await self.arrivals.ask(node, lambda t: operations.stream(kind, target, options, t))

    def pass_on(self, loop: asyncio.AbstractEventLoop, one: Snapshot, node: str) -> None:
        """Carry a guest's disks and memory from `node` to `one.to`; whose it is, the caller's transaction says.

        From any thread. Raises Conflict where it must move cold, Unavailable.

            arrive: what it finds there ─▶ leave: that is alike ─▶ go ─▶ all is sent ─▶ it is there
        """

        async def passing(stack: AsyncExitStack) -> None:
            async def opened(at: str, kind: str, **more: Any) -> Stream:
                stream = await self.stream(at, kind, one.instance_uuid, {"move": one.uuid, **more})
                stack.push_async_callback(stream.aclose)
                return stream

            async def joined(*ends: Stream) -> None:
                await first(carry(*ends), carry(*ends[::-1]))
                for end in ends:  # the other qemu hears of it at once
                    await end.aclose()

            async with stack, asyncio.timeout(_MOVE_S):
                there = await opened(one.to, "arrive")
                like = dict((await _heard(there, one.to, may=True))["like"])
                here = await opened(node, "leave", like={str(k): str(v) for k, v in like.items()})
                for name in map(str, (await _heard(here, node, may=True))["channels"][:_MOST_CHANNELS]):
                    far = await opened(one.to, "arrive", channel=name)
                    near = await opened(node, "leave", channel=name)
                    stack.callback(asyncio.create_task(joined(far, near)).cancel)
                await here.send("{}")
                sent = from_plain(Figures, await _heard(here, node))["memory_bytes"]
                async with asyncio.timeout(_LAST_S):  # it stands still
                    await there.send(json.dumps({"memory_bytes": sent}))
                    await _heard(there, one.to)

        try:
            asyncio.run_coroutine_threadsafe(passing(AsyncExitStack()), loop).result()
        except (TimeoutError, ValueError, TypeError, KeyError) as err:
            raise Unavailable(f"a node took too long, or said nonsense: {err!r}") from err

    async def examine(self, network: str) -> list[dict[str, str]]:
        """Every node's findings about a network and about the node itself; a silent node is one."""

        async def ask(node: str) -> list[dict[str, str]]:
            try:
                found = await (await self.nodes.operations(node)).doctor()
            except Unavailable as err:
                found = [("", str(err), err.hint)]
            return [
                {"node": node, "problem": text, "fix": fix}
                for name, text, fix in found
                if name in ("", network)
            ]

        nodes = await asyncio.to_thread(self.nodes.usable)
        return [row for rows in await asyncio.gather(*map(ask, nodes)) for row in rows]

    async def _act(self, action: Callable[[Transaction], T], node: str) -> T:
        return await asyncio.to_thread(transact, self.store, action, node)


async def _heard(stream: Stream, node: str, *, may: bool = False) -> dict[str, Any]:
    """What a node says next. Raises Unavailable, but Conflict where it `may` say that it cannot."""
    said: dict[str, Any] = {**read_json(str(await stream.receive()).encode(), most_bytes=_SAID_BYTES)}
    if error := said.get("error"):
        kind = Conflict if may and said.get("kind") == "Conflict" else Unavailable
        raise kind(f"{node}: {str(error)[:500]}")
    return said
