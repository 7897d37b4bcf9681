"""Where an instance goes: `judge`, a pure function of nodes' facts and claims, and the transaction around it.

CPUs are shared (`cpu_ratio` vCPUs per CPU), memory is not. Disks grow as guests write, so a file system may have more
of them (`disk_ratio`) than it could hold. Among the nodes with room _ORDER decides; ties go by name, so that the same
picture always gives the same answer.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from compute.cluster.images.artifacts import GIB
from compute.cluster.quarantine import Quarantined
from compute.cluster.records import instances
from compute.cluster.records.instances import Instance
from compute.cluster.records.interfaces import Want
from compute.cluster.records.nodes import Node, facts_of
from compute.cluster.records.taken import Claims, claim, disk_bytes
from compute.cluster.records.transaction import Transaction
from compute.config import Config
from compute.errors import Conflict, Invalid, NoCapacity, NotFound
from compute.wire.spec import InstanceState, NodeFacts, Power
from imagestore import Digest, Store, StoreError, size_text

_ORDER = "suits its affinity", "is less busy", "holds the image", "has more memory free", "is first by name"
"""What is better about a node that comes before another, the weightiest first."""
_LOAD_STEP = 0.5  # of a node's processors: that it is busier than the idlest one counts from here on
Used = Callable[[Node], Mapping[str, Any] | None]
"""What is measured of a node: `liveness.Usage.of`; None where nobody knows."""
Labels = Collection[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Room:
    """One node as the scheduler sees it: what its agent said of it, what its instances hold."""

    node: str
    facts: NodeFacts
    claims: Claims
    why_not: str = ""  # why it takes nothing: it is drained or missing, or cannot have the image
    used: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Judged:
    """A node, what of it may still be claimed (disk_bytes None: without limit), and why it is not the one to take."""

    name: str
    fits: bool
    why_not: str
    cpus: int
    memory_mib: int
    disk_bytes: int | None


def judge(
    rooms: Sequence[Room],
    cpus: int,
    memory_mib: int,
    added_bytes: int = 0,
    *,
    limits: Config,
    wanted: str = "",
    holders: Collection[str] = (),
    liking: Mapping[str, float] | None = None,
) -> list[Judged]:
    """Every node (or the one wanted): the one to take, others with room, those without. Raises NotFound (no such node).

    added_bytes: of disks. holders: who has the image. liking: node → the affinity to who is there; nobody is worth 0.
    """
    if wanted and wanted not in {room.node for room in rooms}:
        raise NotFound(f"node {wanted} not found", hint="see: sf node ls")
    idlest = min((load for room in rooms if (load := room.used.get("cpu_share")) is not None), default=0.0)
    ranked = []
    for room in (room for room in rooms if wanted in ("", room.node)):
        facts, claims, used = room.facts, room.claims, room.used
        free_cpus = max(0, int(facts.cpus * limits.cpu_ratio) - claims.cpus)
        kept_mib = limits.memory_reserve_mib + int(facts.memory_mib * limits.restart_reserve / 100)
        free_mib = max(0, facts.memory_mib - kept_mib - claims.memory_mib)
        free_bytes = max(0, int(facts.disk_bytes * limits.disk_ratio) - (claims.disk_bytes or 0))
        left_bytes = used.get("disk_total_bytes", inf) - used.get("disk_bytes", 0)
        lacks = {
            room.why_not: room.why_not,
            f"has {free_mib} MiB of memory free": free_mib < memory_mib,
            f"has {free_cpus} vCPUs free": free_cpus < cpus,
            f"has {size_text(free_bytes)} of disk free": facts.disk_bytes and free_bytes < added_bytes,
            f"has {size_text(left_bytes)} left for disks": added_bytes and left_bytes < limits.disk_reserve,
        }
        why_not = next((why for why, holds in lacks.items() if holds), "")
        busier = int(((used.get("cpu_share") or idlest) - idlest) / _LOAD_STEP)
        rank = -(liking or {}).get(room.node, 0), busier, room.node not in holders, -free_mib, room.node
        free = free_cpus, free_mib, free_bytes if facts.disk_bytes else None
        ranked.append((rank, Judged(room.node, not why_not, why_not, *free)))
    ranked.sort(key=lambda each: (False, *each[0]) if each[1].fits else (True,))

    def behind(rank: tuple[Any, ...]) -> str:
        best, chosen = ranked[0]
        better = (why for why, a, b in zip(_ORDER, best, rank, strict=True) if a != b)
        return next((f"fits, but {chosen.name} {why}" for why in better), "")

    return [replace(one, why_not=one.why_not or behind(rank)) for rank, one in ranked]


def place(found: Sequence[Judged]) -> str:
    """The node to take of those that `judge` names. Raises NoCapacity with each one's reason."""
    if found and found[0].fits:
        return found[0].name
    said = "; ".join(f"{one.name} {one.why_not}" for one in found) or "there is no node"
    raise NoCapacity(f"no room: {said}", hint="delete an instance, or add a node")


def rooms(txn: Transaction, usable: Mapping[str, str], used: Used, labels: Labels) -> list[Room]:
    """Every node for `judge`. usable: node → "" or why it takes nothing; nodes that are not in it are away.

    labels: what a node is to have in its metadata; `architecture` each has by itself. Whoever places holds the
    transaction to the claims of the node that was chosen: `take`.
    """
    found, held = [], {claims.name: claims for claims in txn.list(Claims)}
    uncounted, disks = any(claims.disk_bytes is None for claims in held.values()), Counter[str]()
    for one in txn.list(Instance) if uncounted else ():
        disks[one.node] += disk_bytes(one.disks) if one.state != InstanceState.DELETED else 0
    for node in (node for node in txn.list(Node) if node.state != "deleted"):
        claims, facts = held.get(node.name) or Claims(name=node.name), facts_of(node) or NodeFacts(0, 0)
        if claims.disk_bytes is None:
            claims = replace(claims, disk_bytes=disks[node.name])
        why_not = "is drained" if node.drained else usable.get(node.name, "does not answer")
        has = node.metadata | {"architecture": facts.architecture}
        missed = ", ".join(f"{key}={value}" for key, value in labels if has.get(key) != value)
        why_not = why_not or (missed and f"is not {missed[:200]}")
        found.append(Room(node.name, facts, claims, why_not, used(node) or {}))
    return found


def take(txn: Transaction, rooms: Sequence[Room], node: str) -> str:
    """The transaction rests on what was seen there: another placement on this node repeats it."""
    seen = next(room.claims for room in rooms if room.node == node)
    txn.expect[seen.key] = seen.revision
    if (claims := txn.find(Claims, node)) and claims.disk_bytes is None:
        txn.update(replace(claims, disk_bytes=seen.disk_bytes))
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
            with suppress(StoreError):  # it may come back before the guest asks
                if not any(store.has_manifest(Digest.parse(image)) for store in reads):
                    found[node.name] = f"can read no store that has {image[:15]}…"
    return found


def liking(txn: Transaction, instance: Instance) -> dict[str, float]:
    """Node → what the guests there, of its namespace, are worth to an instance.

    By Shaken Fist's metadata: `affinity` is {tag: weight up to a million}, or has that under "cpu"; the others' `tags`
    are a list. Here labels are tags, too: KEY=VALUE.
    """
    said, found = instance.metadata.get("affinity"), defaultdict[str, float](float)
    said = said.get("cpu", said) if isinstance(said, dict) else None
    given = said.items() if isinstance(said, dict) else ()
    weights = {tag: w for tag, w in given if isinstance(w, int | float) and abs(w) <= 1e6}
    for one in txn.list(Instance) if weights else ():
        near = one.namespace == instance.namespace and one.uuid != instance.uuid
        if near and one.state != InstanceState.DELETED:
            tags = one.metadata.get("tags")
            labels = {f"{key}={value}" for key, value in one.metadata.items() if isinstance(value, str)}
            labels |= {tag for tag in tags if isinstance(tag, str)} if isinstance(tags, list) else set()
            found[one.node] += sum(weights[tag] for tag in labels & weights.keys())
    return found


def weigh(
    txn: Transaction, instance: Instance, limits: Config, usable: Mapping[str, str], used: Used
) -> tuple[list[Room], list[Judged]]:
    """Every node for this instance, or `instance.node` if it names one, and what `judge` says. Raises NotFound."""
    olds = [n.name for n in txn.list(Node) if instance.uuid in n.given or n.name in instance.left]
    olds += [one.node for one in txn.list(Quarantined) if one.uuid == instance.uuid]  # it joined anew
    usable = {**usable, **dict.fromkeys(olds, "has an old copy of it: sf node orphans")}
    # Who asks for another architecture than the guests' finds no node that has both.
    labels = [*instance.node_labels.items(), ("architecture", limits.architecture)]
    there = rooms(txn, usable, used, labels)
    images = {disk.image for disk in instance.disks if disk.image}
    return there, judge(
        there,
        instance.cpus,
        instance.memory_mib,
        max(1, disk_bytes(instance.disks)),  # how large an image is that is to come, nobody knows
        limits=limits,
        wanted=instance.node,
        holders=[room.node for room in there if images <= set(room.facts.images)],
        liking=liking(txn, instance),
    )


def create_instance(txn: Transaction, instance: Instance, wants: Sequence[Want], **seen: Any) -> Instance:
    """Place it, by what `weigh` is told, and make its records. Raises Conflict, Invalid, NotFound, NoCapacity."""
    instances.check(instance, wants)
    there, found = weigh(txn, instance, **seen)
    return instances.create_instance(txn, replace(instance, node=take(txn, there, place(found))), wants)


def destination(
    txn: Transaction,
    uuid: str,
    wanted: str,
    limits: Config,
    usable: Callable[[], Mapping[str, str]],
    used: Used,
) -> str:
    """The node that an instance can move to, `wanted` if it names one; the transaction rests on its room.

    Raises NotReady, Conflict, NotFound, NoCapacity with each node's reason, Unavailable.
    """
    found = instances.created(txn, uuid)
    why = "it is over once it is off" if found.ephemeral or found.held_s else ""
    why = "its TPM and UEFI variables are its node's own" if found.uefi or found.tpm else why
    if why := "it has just been moved" if found.arriving else why:
        raise Conflict(f"instance {found.name} cannot move: {why}")
    closed = {**usable(), found.node: "has it now"}
    there, judged = weigh(txn, replace(found, node=wanted), limits, closed, used)
    return take(txn, there, place(judged))


def set_instance(
    txn: Transaction, uuid: str, changes: dict[str, Any], limits: Config, usable: dict[str, str], used: Used
) -> Instance:
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
    if "on_node_loss" in changes:
        now = instances.leased(txn, now)
    if now.name != found.name:
        instances.rename(txn, found, now.name)
    more = (
        now.cpus - found.cpus,
        now.memory_mib - found.memory_mib,
        disk_bytes(now.disks) - disk_bytes(found.disks),
    )
    if min(more) < 0 and (found.power, found.power_state) != (Power.OFF, "off"):
        raise Conflict(f"{found.name} gets less only while it is off", hint=f"sf instance stop {found.name}")
    if max(more) > 0:
        there = rooms(txn, usable, used, ())
        if max(more[:2]) <= 0:  # a disk grows where its guest is, drained or not
            there = [replace(room, why_not="") for room in there]
        take(txn, there, found.node)
        place(judge(there, *(max(0, each) for each in more), limits=limits, wanted=found.node))
    claim(txn, found.node, *more)
    txn.event(Instance.KIND, uuid, f"set: {dict(changes)}", type="audit")
    return txn.update(now)
