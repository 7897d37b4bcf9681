"""Snapshots of instances' disks: initial ─▶ ordered of the node ─▶ stored there ─▶ created, with names; or error."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, ClassVar

from compute.cluster.records.instances import Instance, created, interfaces_of, rehome, stays
from compute.cluster.records.taken import Taken
from compute.cluster.records.transaction import Stored, Transaction, new_uuid
from compute.errors import Conflict
from compute.wire.spec import Capture, DiskSpec, InstanceState, Power

_TEXT, _TAG, _RETRY_S = 2000, "%Y%m%d-%H%M%S", 60.0
_CALENDAR = {"daily": "%Y-%j", "weekly": "%G-%V", "monthly": "%Y-%m"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Stored):
    """One of them."""

    KIND: ClassVar[str] = "snapshot"
    uuid: str
    instance_uuid: str
    instance: str
    namespace: str
    tag: str  # its time: of the names `my/INSTANCE:TAG` and, of further disks, `my/INSTANCE-DEVICE:TAG`
    state: str = "initial"
    order: Capture
    backup: bool = False
    then: tuple[DiskSpec, ...] = ()
    """What the instance's disks become when this one of its former disks is kept."""
    to: str = ""
    """The node to which the instance moves, off, with the disks that this stores: then it is over, and had no names."""
    running: bool = False  # it moves while it runs: state `passing`, not `ordered`; nothing is stored

    @property
    def live(self) -> bool:
        """It is not over."""
        return self.state not in ("created", "error")

    def image(self, device: str) -> str:
        """What a disk is called in the own store; a warm state's memory is one more architecture of its only one."""
        return self.order.warm or self.instance.lower() + ("" if device == "vda" else f"-{device}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup(Stored):
    """By which rule snapshots of an instance (it has its uuid) are taken, kept, and copied to the store of this URL."""

    KIND: ClassVar[str] = "backup"
    uuid: str
    namespace: str
    every_s: float
    due_s: float
    keep: dict[str, int] = field(default_factory=dict)
    store: str = ""
    failures: int = 0
    error: str = ""
    last_s: float = 0


def kept(keep: Mapping[str, int], made: Sequence[Snapshot]) -> set[str]:
    """Uuids of the backups (the newest first) that stay: the newest, and that of so many days, weeks, months (UTC)."""
    stay = {one.uuid for one in (made[:1] if any(keep.values()) else made)}
    for span, form in _CALENDAR.items():
        newest: dict[str, str] = {}
        for one in made:
            newest.setdefault(datetime.strptime(one.tag, _TAG).strftime(form), one.uuid)
        stay |= set(list(newest.values())[: keep.get(span, 0)])
    return stay


def due(txn: Transaction, uuid: str) -> None:
    """Take the backup that is due; the next one is by the same clock, however long the server was away."""
    rule, instance, now = txn.get(Backup, uuid), txn.find(Instance, uuid), time.time()
    if instance is None or instance.state == InstanceState.DELETED:
        txn.delete(Backup, uuid)
        return
    late = max(0.0, now - rule.due_s) // rule.every_s + 1
    txn.update(replace(rule, due_s=rule.due_s + late * rule.every_s))
    try:
        take(txn, uuid, backup=True)
    except Conflict as err:
        note(txn, uuid, str(err))


def note(txn: Transaction, uuid: str, error: str = "") -> None:
    """How a backup ended: one that failed is tried again sooner than the rule says."""
    if (rule := txn.find(Backup, uuid)) is not None:
        again_s = time.time() + _RETRY_S * 2 ** min(rule.failures, 6)
        now = replace(rule, failures=0, error="", last_s=time.time())
        failed = replace(rule, failures=rule.failures + 1, error=error[:_TEXT])
        txn.update(replace(failed, due_s=min(rule.due_s, again_s)) if error else now)


def snapshots_of(txn: Transaction, instance: str) -> list[Snapshot]:
    """Those of an instance, the newest first."""
    return sorted((t for t in txn.list(Snapshot) if t.instance_uuid == instance), key=lambda t: t.tag)[::-1]


def take(
    txn: Transaction, uuid: str, then: tuple[DiskSpec, ...] = (), *, backup: bool = False, to: str = "",
    running: bool = False, warm: bool = False,
) -> Snapshot:  # fmt: skip
    """A snapshot of an instance is wanted now; `warm`: for others to begin as. Raises NotFound, Conflict."""
    found, others = txn.get(Instance, uuid), snapshots_of(txn, uuid)
    if found.state != InstanceState.CREATED or all(disk.cdrom for disk in found.disks):
        raise Conflict(f"instance {found.name} is {found.state}, or has no disk that changes")
    if any(one.live for one in others):
        raise Conflict(f"a snapshot of {found.name} is under way", hint="try again when it is over")
    txn.update(replace(found, updated_s=time.time()))  # so that two at once repeat this
    now, tags, number = time.time(), {one.tag for one in others}, new_uuid()
    while (tag := datetime.fromtimestamp(now, UTC).strftime(_TAG)) in tags:
        now += 1
    labels = {"instance": found.name, "instance-uuid": uuid, "taken": tag}
    if warm:
        bare = found.warm_name() and not (interfaces_of(txn, uuid) or found.ssh_key or found.user_data)
        if not bare or found.power_state != "on":
            own = "an interface, a key, user data, a second disk, a screen, UEFI, a TPM, or no agent"
            why = f"{found.name} is no warm state: it does not run, or it has {own}"
            raise Conflict(why, hint="sf image warm makes one")
        labels, tag = labels | {"warm": found.disks[0].image_name}, "latest"
    order = Capture(number, labels, at_rest=bool(to), warm=found.warm_name() if warm else "")
    made = Snapshot(
        uuid=number, instance_uuid=uuid, instance=found.name, namespace=found.namespace, tag=tag, order=order,
        then=then, backup=backup, to=to, running=running,
    )  # fmt: skip
    what = f"move to {to}" if to else f"snapshot {tag}"
    txn.event(Instance.KIND, uuid, f"{what} asked for", type="audit")
    return txn.create(made)


def order(txn: Transaction, one: Snapshot) -> None:
    """Its node is told to take it; a guest that moves is off for that, or passes, from now on. Raises Conflict…"""
    txn.update(replace(one, state="passing" if one.running else "ordered"))
    if one.to:
        found = created(txn, one.instance_uuid)
        ended = found.power_state in ("off", "crashed")  # by itself: it is not started by its move
        now = replace(found, moving=one.to, passing=one.uuid if one.running else "")
        txn.update(replace(now, power=Power.OFF if ended else found.power))


def cool(txn: Transaction, uuid: str, why: str) -> None:
    """It cannot move while it runs: what the other node has of it is ordered away, then it moves off."""
    if (one := txn.get(Snapshot, uuid)).live:
        txn.update(stays(txn.get(Instance, one.instance_uuid)))
        order = replace(one.order, note=f"it moves cold, off meanwhile: {why}"[:_TEXT])
        txn.update(replace(one, state="initial", running=False, order=order))
        txn.event(Instance.KIND, one.instance_uuid, order.note, type="status")


def settle_snapshot(txn: Transaction, instance: Instance, said: Capture) -> None:
    """What a node says of one that it was to take."""
    one = txn.find(Snapshot, said.uuid)
    if one is not None and one.instance_uuid == instance.uuid and one.state == "ordered":
        also = {"memory"} if one.order.warm else set()
        whole = said.error or said.digests.keys() == also | {d.device for d in instance.disks if not d.cdrom}
        error = said.error[:_TEXT] if whole else "the node did not store all disks"
        if one.to and not said.at_rest:
            error = error or "the node's version did not wait until the guest was off"
        order, note = one.order, said.note[:_TEXT]
        order = replace(said, error=error, note=note, labels=order.labels, warm=order.warm)
        txn.update(replace(one, state="stored", order=order))


def finish(txn: Transaction, uuid: str, error: str = "", fits: Callable[..., Any] = lambda *_: None) -> None:
    """It has its names, or will never have any. One that moves is the other node's now, unless `fits` raises."""
    one = txn.get(Snapshot, uuid)
    if one.live:
        order = replace(one.order, error=error[:_TEXT])
        txn.update(replace(one, state="error" if error else "created", order=order))
        costs = ", ".join(f"{name} {count}" for name, count in order.costs.items())
        done = f"move to {one.to}: there" if one.to else f"snapshot is {one.image('vda')}:{one.tag}"
        said = f"{done.split()[0]} failed: {order.error}" if error else f"{done}; bytes: {costs}"
        txn.event(Instance.KIND, one.instance_uuid, said, type="status", extra=order.costs)
        if one.order.warm and not error:
            # Qemu believes what it resumes: only what a node of ours made, and not all that is put into the store.
            disk = next(digest for device, digest in order.digests.items() if device != "memory")
            name = f"warm/{one.namespace}/{one.order.warm}"
            txn.update(replace(txn.find(Taken, name) or Taken(name=name, owner=""), owner=disk))
        if one.backup:
            note(txn, one.instance_uuid, error)
        if (instance := txn.find(Instance, one.instance_uuid)) is None:
            return
        if one.then and not error:
            sizes = {disk.device: disk.size_bytes for disk in instance.disks}  # one may have grown meanwhile
            then = tuple(replace(d, size_bytes=sizes.get(d.device, d.size_bytes)) for d in one.then)
            txn.update(replace(instance, disks=then, updated_s=time.time()))
            said = f"its disks become {one.then[0].image_name}"
            txn.event(Instance.KIND, instance.uuid, said, type="audit")
        if one.to and error:
            txn.update(stays(instance) if instance.passing in ("", uuid) else instance)
        elif one.to and (instance.moving != one.to or (one.running and instance.passing != uuid)):
            raise Conflict(f"instance {instance.name} was given to {instance.node} meanwhile")
        elif one.to:
            fits(txn, instance.uuid, one.to)
            new: dict[str, Any] = {d: {"image": i, "store": one.namespace} for d, i in order.digests.items()}
            disks = (replace(disk, **new.get(disk.device, {})) for disk in instance.disks)  # a CD-ROM stays
            why = "asked for" + ", while it runs" * one.running
            rehome(txn, instance.uuid, one.to, why, tuple(disks), live=one.running)
            txn.delete(Snapshot, uuid)
