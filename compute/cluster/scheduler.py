"""Where an instance goes: `place`, a pure function of nodes' facts and claims, and the transaction around it.

CPUs are shared (`cpu_ratio` vCPUs per CPU), memory is not. Among the nodes with room, those that hold the image come
first, then the one with the most free memory; ties go by name, so that the same state always gives the same answer.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compute.cluster.images.artifacts import GIB
from compute.cluster.records import instances
from compute.cluster.records.interfaces import Want
from compute.cluster.records.nodes import Node, facts_of
from compute.cluster.records.taken import Claims, claim
from compute.cluster.records.transaction import Transaction
from compute.errors import Conflict, Invalid, NoCapacity, NotFound
from compute.wire.spec import Power
from imagestore import Digest, Store, StoreError


@dataclass(frozen=True, slots=True)
class Room:
    """One node as the scheduler sees it; what its instances hold is already counted."""

    node: str
    cpus: int
    memory_mib: int
    claimed_cpus: int
    claimed_memory_mib: int
    why_not: str = ""
    """Why it takes nothing: it is drained or missing, or cannot have the image."""
    revision: int = 0
    """Of its claims."""


@dataclass(frozen=True, slots=True)
class Limits:
    cpu_ratio: float = 16.0
    memory_reserve_mib: int = 512
    """Left to the host on every node."""


def place(
    rooms: Sequence[Room],
    cpus: int,
    memory_mib: int,
    *,
    limits: Limits,
    wanted: str = "",
    holders: Collection[str] = (),
) -> str:
    """The node's name. Raises NotFound (no such node), NoCapacity with each node's reason."""
    reasons: list[str] = []
    fitting: list[tuple[bool, int, str]] = []
    if wanted and wanted not in {room.node for room in rooms}:
        raise NotFound(f"node {wanted} not found", hint="see: sf node ls")
    for room in rooms:
        if wanted and room.node != wanted:
            continue
        free_mib = room.memory_mib - limits.memory_reserve_mib - room.claimed_memory_mib
        free_cpus = int(room.cpus * limits.cpu_ratio) - room.claimed_cpus
        if room.why_not:
            reasons.append(f"{room.node} {room.why_not}")
        elif free_mib < memory_mib:
            reasons.append(f"{room.node} has {max(free_mib, 0)} MiB of memory free")
        elif free_cpus < cpus:
            reasons.append(f"{room.node} has {max(free_cpus, 0)} vCPUs free")
        else:
            fitting.append((room.node not in holders, -free_mib, room.node))
    if not fitting:
        said = "; ".join(reasons) or "there is no node"
        hint = "delete an instance, or add a node"
        raise NoCapacity(f"no room for {cpus} vCPUs and {memory_mib} MiB: {said}", hint=hint)
    return min(fitting)[2]


def rooms(txn: Transaction, usable: Mapping[str, str]) -> list[Room]:
    """Every node for `place`. usable: node → "" or why it takes nothing; nodes that are not in it are away.

    Whoever places holds the transaction to the claims of the node that was chosen: `take`.
    """
    found, held = [], {claims.name: claims for claims in txn.list(Claims)}
    for node in txn.list(Node):
        if node.state == "deleted":
            continue
        claims = held.get(node.name) or Claims(name=node.name)
        facts = facts_of(node)
        why_not = "is drained" if node.drained else usable.get(node.name, "does not answer")
        size = (facts.cpus, facts.memory_mib) if facts else (0, 0)
        found.append(Room(node.name, *size, claims.cpus, claims.memory_mib, why_not, claims.revision))
    return found


def take(txn: Transaction, rooms: Sequence[Room], node: str) -> str:
    """The transaction rests on what was seen there: another placement on this node repeats it."""
    txn.expect[f"{Claims.KIND}/{node}"] = next(room.revision for room in rooms if room.node == node)
    return node


def unreadable(
    stores: Mapping[str, Store], nodes: Sequence[Node], images: Collection[str], server: str
) -> dict[str, str]:
    """Node → why it cannot have these images: it reads no store that has them. Asks stores, so outside transactions."""
    found: dict[str, str] = {}
    for node in nodes:
        facts = facts_of(node)
        if node.name == server or facts is None or facts.stores is None:
            continue
        reads = [store for store in stores.values() if store.info.id in facts.stores]
        for image in set(images) - set(facts.images) if len(reads) < len(stores) else ():
            if not any(_has(store, image) for store in reads):
                found[node.name] = f"can read no store that has {image[:15]}…"
    return found


def _has(store: Store, image: str) -> bool:
    try:
        return store.has_manifest(Digest.parse(image))
    except StoreError:  # it may come back before the guest asks
        return True


def create_instance(
    txn: Transaction,
    instance: instances.Instance,
    wants: Sequence[Want],
    *,
    limits: Limits,
    usable: Mapping[str, str],
) -> instances.Instance:
    """Place it, on `instance.node` if it names one, and make its records.

    Raises Conflict, Invalid, NotFound, NoCapacity.
    """
    instances.check(instance, wants)
    images = {disk.image for disk in instance.disks if disk.image}
    there = rooms(txn, usable)
    node = place(
        there,
        instance.cpus,
        instance.memory_mib,
        limits=limits,
        wanted=instance.node,
        holders=[n.name for n in txn.list(Node) if (f := facts_of(n)) and images <= set(f.images)],
    )
    return instances.create_instance(txn, replace(instance, node=take(txn, there, node)), wants)


def set_instance(
    txn: Transaction, uuid: str, changes: Mapping[str, Any], *, limits: Limits, usable: Mapping[str, str]
) -> instances.Instance:
    """Change fields of its record; `disks` is device → GB. Its node must have the room for what is more.

    Raises Conflict (a name that is taken, less than a guest that is not off may have now), Invalid, NoCapacity.
    """
    change = instances.living if changes.keys() == {"until_s"} else instances.created
    found = change(txn, uuid)
    disks = {disk.device: disk for disk in found.disks}
    for device, size in changes.get("disks", {}).items():
        known = disks.get(device)
        if known is None or size * GIB < known.size_bytes:
            hint = f"a disk only grows; sf instance show {found.name} has their sizes"
            raise Invalid(f"{found.name} has no disk {device[:40]!r} that could have {size} GB", hint=hint)
        disks[device] = replace(known, size_bytes=size * GIB)
    now = replace(found, **{**changes, "disks": tuple(disks.values())}, updated_s=time.time())
    instances.check(now, ())
    if now.name != found.name:
        instances.rename(txn, found, now.name)
    more = now.cpus - found.cpus, now.memory_mib - found.memory_mib
    if min(more) < 0 and (found.power, found.power_state) != (Power.OFF, "off"):
        raise Conflict(f"{found.name} gets less only while it is off", hint=f"sf instance stop {found.name}")
    if max(more) > 0:
        there = rooms(txn, usable)
        take(txn, there, found.node)
        place(there, max(0, more[0]), max(0, more[1]), limits=limits, wanted=found.node)
    claim(txn, found.node, *more)
    txn.update(now)
    txn.event(instances.Instance.KIND, uuid, f"set: {dict(changes)}", type="audit")
    return now
