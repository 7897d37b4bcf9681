"""What the server does without being asked: routers of nodes that went missing move, and what nobody needs goes."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from compute.cluster import liveness
from compute.cluster.feed import Feed
from compute.cluster.liveness import Liveness
from compute.cluster.records.epochs import Epoch
from compute.cluster.records.instances import Instance, end, why_over
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node, move_routers, router_candidates
from compute.cluster.records.taken import Taken
from compute.cluster.records.transaction import PROVEN, Transaction, pieces, transact
from compute.cluster.state.protocol import ABSENT, StateStore
from compute.errors import ComputeError, Stale
from compute.wire.spec import InstanceState

log = logging.getLogger(__name__)

_SWEEP_S = 60.0
_LOOK_S, _RENEW_S = 0.5, 2.0
_LEASE_S = 6.0  # over before that of a node which ended with the server that had it
_KEEP_DELETED_S = 3600.0
_KEEP_REQUEST_S = 86400.0


async def alone(store: StateStore, *parts: Callable[[], Awaitable[None]]) -> None:
    """All of them, for as long as no other server does: each change proves the lease. Raises LeaseLost, Unavailable."""
    lease, key = await asyncio.to_thread(store.grant, _LEASE_S), "upkeep/leader"
    PROVEN.set(lease)
    take = partial(store.commit, {key: b""}, expect={key: ABSENT}, lease=lease, ephemeral=(key,))
    async with asyncio.TaskGroup() as group:
        while True:
            await asyncio.to_thread(store.refresh, lease)
            with suppress(Stale):  # another one has it, or we do
                await asyncio.to_thread(take)
                for part in parts:
                    group.create_task(part())  # type: ignore[arg-type]
            await asyncio.sleep(_RENEW_S)


async def keep_up(store: StateStore, feed: Feed, nodes: Liveness, server: str) -> None:
    """Until cancelled. An error is said and tried again: a full disk must not end the server."""
    swept_s = 0.0

    def nodes_and_routers(txn: Transaction) -> bool:
        nodes.note(txn)
        _move_routers(txn, nodes)
        return txn.room < 10

    while True:
        seen, pause_s = feed.revision, _LOOK_S
        try:
            await asyncio.to_thread(pieces, store, nodes_and_routers, server)
            pause_s = await asyncio.to_thread(_end, store, server)
            if time.monotonic() - swept_s > _SWEEP_S:
                await asyncio.to_thread(pieces, store, _sweep, server)
                swept_s = time.monotonic()
        except ComputeError as err:
            log.error("upkeep: %s", err)
            await asyncio.sleep(1)
        await feed.moved((liveness.KIND, Network.KIND, Instance.KIND, Epoch.KIND), seen, pause_s)
        await asyncio.sleep(_LOOK_S)


def _end(store: StateStore, server: str) -> float:
    """Delete what is over; an event says why. Returns the seconds until there may be something to do again."""
    now, there = time.time(), Transaction(store).list(Instance)
    for one in there:
        if why_over(one, now):
            transact(store, lambda txn, uuid=one.uuid: end(txn, uuid), server)  # type: ignore[misc]
    return min([at - now for one in there for at in (one.until_s, one.held_s) if at > now] + [_SWEEP_S])


def _move_routers(txn: Transaction, nodes: Liveness) -> None:
    """A network without a living router gets one, and what a drained node still routes. A lease outlives a restart."""
    alive = nodes.among(n for n in txn.list(Node) if not n.drained)
    lost = {n.router_node for n in txn.list(Network) if n.state == "created" and not n.bridge} - set(alive)
    for name in sorted(lost) if alive else ():
        move_routers(txn, name, router_candidates(txn, alive))


def _sweep(txn: Transaction) -> bool:
    """Records of the deleted stay an hour for those who poll, request keys a day, events as long as their object."""
    now, more = time.time(), False
    for instance in txn.list(Instance):
        done = instance.state == InstanceState.DELETED and not (instance.unconfirmed or instance.left)
        if done and instance.updated_s < now - _KEEP_DELETED_S:
            more = more or txn.purge(instance)
    for network in txn.list(Network):
        if network.state == "deleted" and network.deleted_s < now - _KEEP_DELETED_S:
            more = more or txn.purge(network)
    for taken in txn.list(Taken, "request/"):
        if taken.created_s < now - _KEEP_REQUEST_S and txn.room > 0:
            txn.delete(Taken, taken.name)
    return more or txn.room <= 0
