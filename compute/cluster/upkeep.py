"""What the server does without being asked: what nodes that went missing had moves, and what nobody needs goes."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from tempfile import TemporaryFile
from typing import Any

from compute.cluster import liveness
from compute.cluster.feed import Feed
from compute.cluster.liveness import LOST_S, Liveness
from compute.cluster.records.epochs import Epoch, epoch
from compute.cluster.records.instances import Instance, end, rehome, stays, why_over
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node, fence, move_routers, router_candidates
from compute.cluster.records.snapshots import snapshots_of
from compute.cluster.records.taken import Taken
from compute.cluster.records.transaction import PROVEN, Transaction, pieces, transact
from compute.cluster.scheduler import Used, place, take, weigh
from compute.cluster.state.protocol import ABSENT, StateStore
from compute.config import Config
from compute.errors import ComputeError, Conflict, NoCapacity, Stale
from compute.wire.spec import InstanceState, Power

log = logging.getLogger(__name__)

_SWEEP_S = 60.0
_FENCED_S = LOST_S / 2
_LOOK_S, _RENEW_S = 0.5, 2.0
_LEASE_S = 6.0  # over before that of a node which ended with the server that had it
_FENCE_S, _FENCE_AGAIN_S, _FENCE_TOLD = 60.0, 5.0, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_KEEP_DELETED_S = 3600.0
_KEEP_S = {"request/": 86400.0, "ticket/": 3600.0, "join/": 3600.0}  # the last two are good for minutes
_LEADING = ThreadPoolExecutor(2, "sf-leader")  # what nodes say at length may fill the loop's own threads


async def alone(store: StateStore, *parts: Callable[[], Awaitable[None]]) -> None:
    """All of them, for as long as no other server does: each change proves the lease. Raises LeaseLost, Unavailable."""
    apart, key = partial(asyncio.get_running_loop().run_in_executor, _LEADING), "upkeep/leader"
    PROVEN.set(lease := await apart(store.grant, _LEASE_S))
    take = partial(store.commit, {key: b""}, expect={key: ABSENT}, lease=lease, ephemeral=(key,))
    async with asyncio.TaskGroup() as group:
        while True:
            await apart(store.refresh, lease)
            with suppress(Stale):  # another one has it, or we do
                await apart(take)
                for part in parts:
                    group.create_task(part())  # type: ignore[arg-type]
            await asyncio.sleep(_RENEW_S)


async def keep_up(store: StateStore, feed: Feed, nodes: Liveness, limits: Config, used: Used) -> None:
    """Until cancelled. An error is said and tried again: a full disk must not end the server."""
    swept_s, back = 0.0, partial(bring_back, nodes=nodes, limits=limits, used=used)
    fencing, command = dict[str, asyncio.Task[None]](), limits.fence_command
    kinds = liveness.KIND, liveness.OFF, Network.KIND, Instance.KIND, Epoch.KIND

    def nodes_and_routers(txn: Transaction) -> bool:
        nodes.note(txn)
        _move_routers(txn, nodes)
        return txn.room < 10

    async with asyncio.TaskGroup() as group:
        group.create_task(_check(nodes, command))
        while True:
            seen, pause_s = feed.revision, _LOOK_S
            try:
                await asyncio.to_thread(pieces, store, nodes_and_routers, nodes.server)
                wanted = set[str]()
                await asyncio.to_thread(pieces, store, partial(back, wanted=wanted), nodes.server)
                for node in fencing.keys() - wanted:
                    fencing.pop(node).cancel()
                for node in wanted - {n for n, task in fencing.items() if not task.done()}:
                    fencing[node] = group.create_task(_take_power(store, nodes, node, command))
                ends_s, now = await asyncio.to_thread(_end, store, nodes.server), time.monotonic()
                due_s = (at + s - now for at in nodes.silent.values() for s in (_FENCED_S, LOST_S))
                # Often enough to see each lease that a silent node gains.
                often_s = [liveness.LEASE_S / 2] if nodes.silent else []
                pause_s = min([ends_s, *often_s, *(s for s in due_s if s > 0)])
                if time.monotonic() - swept_s > _SWEEP_S:
                    await asyncio.to_thread(pieces, store, _sweep, nodes.server)
                    swept_s = time.monotonic()
            except ComputeError as err:
                log.error("upkeep: %s", err)
                await asyncio.sleep(1)
            await feed.moved(kinds, seen, pause_s)
            await asyncio.sleep(_LOOK_S)


async def _check(nodes: Liveness, command: tuple[str, ...]) -> None:
    """Whether it can see the power of each node, as fence agents say it: before one is lost."""
    for node in await asyncio.to_thread(nodes.usable) if command else ():
        if node != nodes.server and (said := await _call(*command, "status", node))[0] not in (0, 2):
            log.warning("fence command: status %s: exit code %d: %s", node, *said)


async def _take_power(store: StateStore, nodes: Liveness, node: str, command: tuple[str, ...]) -> None:
    """Again and again until cancelled: it has confirmed, or the node has answered. Its history tells of changes."""
    pause_s, said = _FENCE_AGAIN_S, (-1, "")

    def note(txn: Transaction) -> None:
        if not nodes.alive(node):
            txn.expect[f"{liveness.KIND}/{node}"] = ABSENT
            txn.writes |= {} if said[0] else {f"{liveness.OFF}/{node}": b""}
            txn.event(Node.KIND, node, f"fence command: exit code {said[0]}", type="status")

    while not await asyncio.to_thread(nodes.alive, node):
        before, said = said, await _call(*command, "off", node)
        if said != before or not said[0]:
            # What it printed may name machines or keys of the operator's, and everybody reads a node's history.
            log.warning("fence command: off %s: exit code %d: %s", node, *said)
            await asyncio.to_thread(transact, store, note, nodes.server)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, 300)


async def _call(*argv: str) -> tuple[int, str]:
    """The fence command's exit code (124: it took too long; -1: no process) and last line. Cancelling ends it."""
    argv = ("prlimit", "--fsize=65536", "timeout", "--kill-after=1", f"{_FENCE_S}", *argv)
    try:
        with TemporaryFile() as out:
            told: Any = {"stdin": asyncio.subprocess.DEVNULL, "stdout": out, "stderr": out, "cwd": "/"}
            process = await asyncio.create_subprocess_exec(*argv, **told, env=_FENCE_TOLD)
            try:
                code = await process.wait()
            finally:
                if process.returncode is None:
                    process.terminate()
            out.seek(0)
            line = out.read().decode(errors="replace").strip().rpartition("\n")[2]
    except OSError as err:  # a full disk, no more processes: that ends no upkeep
        code, line = -1, str(err)
    return code, "".join(filter(str.isprintable, line[:200]))


def _end(store: StateStore, server: str) -> float:
    """Delete what is over; an event says why. Returns the seconds until there may be something to do again."""
    now, there = time.time(), Transaction(store).list(Instance)
    for one in there:
        if why_over(one, now):
            transact(store, lambda txn, uuid=one.uuid: end(txn, uuid), server)  # type: ignore[misc]
    return min([at - now for one in there for at in (one.until_s, one.held_s) if at > now] + [_SWEEP_S])


def _move_routers(txn: Transaction, nodes: Liveness) -> None:
    """A network without a living router gets one, and what a drained node still routes. A lease outlives a restart."""
    alive = nodes.among(n for n in txn.list(Node) if not n.drained and not n.fence)
    lost = {n.router_node for n in txn.list(Network) if n.state == "created" and not n.bridge} - set(alive)
    for name in sorted(lost) if alive else ():
        move_routers(txn, name, router_candidates(txn, alive))


def bring_back(txn: Transaction, nodes: Liveness, limits: Config, used: Used, wanted: set[str]) -> bool:
    """Guests of a node that is lost go where there is room, each in a transaction of its own. True: there may be more.

    First the node is fenced, so that all others refuse it by then; no transaction holds if it answers meanwhile. While
    the state may be older than the guests nothing is given. Who does not go hears why, once. With a fence command,
    nodes with guests that might go are `wanted`, and keep them, until it has confirmed.
    """
    for name in filter(nodes.alive, [*nodes.silent]):  # with many guests this takes longer than a lease lasts
        del nodes.silent[name]
    silent_s = {name: time.monotonic() - since for name, since in nodes.silent.items()}
    silent = {n: s >= LOST_S for n, s in silent_s.items() if s >= _FENCED_S}
    if not silent or epoch(txn).waiting:
        return False
    fenced = {n.name for n in txn.list(Node) if n.fence}
    off = {record.key: record.revision for record in txn.store.list(f"{liveness.OFF}/")}
    there = (i for i in txn.list(Instance) if i.node in silent and i.state == InstanceState.CREATED)
    for one in sorted(there, key=lambda i: i.order):
        due = silent[one.node] and one.node in fenced
        why, key = _stays(one), f"{liveness.OFF}/{one.node}"
        sure = key in off or not limits.fence_command
        if due and not why and (sure or one.node not in wanted):
            why = _give(txn if sure else Transaction(txn.store), one, nodes, limits, used)
        if due and not (why or sure):
            wanted.add(one.node)
            why = "the fence command has not confirmed that it has no power"
        if not why and (due or one.node not in fenced):
            txn.expect |= {f"{liveness.KIND}/{one.node}": ABSENT, key: off.get(key, ABSENT)}
            fence(txn, one.node, *([one.uuid] if due else []))
            return True
        said = f"{one.node} is lost, and it stays there: {why}"
        if silent[one.node] and said != one.progress:
            if txn.room < 10:
                return True
            txn.update(replace(txn.get(Instance, one.uuid), progress=said))
            txn.event(Instance.KIND, one.uuid, said, type="status")
    return False


def _stays(one: Instance) -> str:
    """Why it is not to be given to another node; "" if it is."""
    off = one.power == Power.OFF or (one.power_state in ("off", "crashed") and not one.moving)
    unheard = "its node has not said that it would stop it" if one.heard_s != one.leased_s else ""
    return "nothing else was chosen" if one.on_node_loss == "leave" else "it is off" if off else unheard


def _give(txn: Transaction, one: Instance, nodes: Liveness, limits: Config, used: Used) -> str:
    """To a node that has nothing of it; or why not."""
    disks = one.disks
    if one.on_node_loss == "restore":
        made = (s for s in snapshots_of(txn, one.uuid) if s.backup and s.state == "created")
        if (newest := next(made, None)) is None:
            return "it has no backup"
        own, name = newest.order.digests, f"its backup of {newest.tag}"
        more: Any = {"store": newest.namespace, "image_name": name}
        disks = tuple(replace(d, image=own[d.device], **more) if d.device in own else d for d in disks)
    limits = replace(limits, restart_reserve=0)  # it is kept for such
    there, found = weigh(txn, replace(stays(one), node="", disks=disks), limits, nodes.usable(), used)
    try:
        node = place(found)
        txn.expect[one.key] = one.revision
        rehome(txn, one.uuid, take(txn, there, node), f"{one.node} is lost", disks, gone=True)
    except (NoCapacity, Conflict) as err:
        return str(err)
    return ""


def _sweep(txn: Transaction) -> bool:
    """Records of the deleted stay an hour for those who poll, of what is good once as above, events as their object."""
    now, more = time.time(), False
    for instance in txn.list(Instance):
        done = instance.state == InstanceState.DELETED and not (instance.unconfirmed or instance.left)
        if done and instance.updated_s < now - _KEEP_DELETED_S:
            more = more or txn.purge(instance)
    for network in txn.list(Network):
        if network.state == "deleted" and network.deleted_s < now - _KEEP_DELETED_S:
            more = more or txn.purge(network)
    for kind, keep_s in _KEEP_S.items():
        for taken in txn.list(Taken, kind):
            if taken.created_s < now - keep_s and txn.room > 0:
                txn.delete(Taken, taken.name)
    return more or txn.room <= 0
