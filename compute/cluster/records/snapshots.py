"""Snapshots of instances' disks: initial ─▶ ordered of the node ─▶ stored there ─▶ created, with names; or error."""

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import ClassVar

from compute.cluster.records.instances import Instance
from compute.cluster.records.stored import Stored, new_uuid
from compute.cluster.records.transaction import Transaction
from compute.errors import Conflict
from compute.wire.spec import Capture, DiskSpec, InstanceState

_TEXT = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(Stored):
    """One of them."""

    KIND: ClassVar[str] = "snapshot"
    uuid: str
    instance_uuid: str
    instance: str
    namespace: str
    tag: str
    """Its time: of the names `my/INSTANCE:TAG` and, of further disks, `my/INSTANCE-DEVICE:TAG`."""
    state: str = "initial"
    order: Capture
    then: tuple[DiskSpec, ...] = ()
    """What the instance's disks become when this one of its former disks is kept."""

    @property
    def live(self) -> bool:
        """It is not over."""
        return self.state not in ("created", "error")

    def image(self, device: str) -> str:
        """What a disk is called in the own store."""
        return self.instance.lower() + ("" if device == "vda" else f"-{device}")


def snapshots_of(txn: Transaction, instance: str) -> list[Snapshot]:
    """Those of an instance, the newest first."""
    return sorted((t for t in txn.list(Snapshot) if t.instance_uuid == instance), key=lambda t: t.tag)[::-1]


def take(txn: Transaction, uuid: str, then: tuple[DiskSpec, ...] = ()) -> Snapshot:
    """A snapshot of an instance is wanted now. Raises NotFound, Conflict."""
    found, others = txn.get(Instance, uuid), snapshots_of(txn, uuid)
    if found.state != InstanceState.CREATED:
        raise Conflict(f"instance {found.name} is {found.state}")
    if any(one.live for one in others):
        raise Conflict(f"a snapshot of {found.name} is under way", hint="try again when it is over")
    txn.update(replace(found, updated_s=time.time()))  # so that two at once repeat this
    now, tags, number = time.time(), {one.tag for one in others}, new_uuid()
    while (tag := datetime.fromtimestamp(now, UTC).strftime("%Y%m%d-%H%M%S")) in tags:
        now += 1
    order = Capture(number, {"instance": found.name, "instance-uuid": uuid, "taken": tag})
    made = Snapshot(
        uuid=number,
        instance_uuid=uuid,
        instance=found.name,
        namespace=found.namespace,
        tag=tag,
        order=order,
        then=then,
    )
    txn.create(made)
    txn.event(Instance.KIND, uuid, f"snapshot {tag} asked for", type="audit")
    return made


def settle_snapshot(txn: Transaction, instance: Instance, said: Capture) -> None:
    """What a node says of one that it was to take."""
    one = txn.find(Snapshot, said.uuid)
    if one is not None and one.instance_uuid == instance.uuid and one.state == "ordered":
        whole = said.error or said.digests.keys() == {disk.device for disk in instance.disks}
        error = said.error[:_TEXT] if whole else "the node did not store all disks"
        order = replace(said, error=error, note=said.note[:_TEXT], labels=one.order.labels)
        txn.update(replace(one, state="stored", order=order))


def finish(txn: Transaction, uuid: str, error: str = "") -> None:
    """It has its names, or will never have any."""
    one = txn.get(Snapshot, uuid)
    if one.live:
        order = replace(one.order, error=error[:_TEXT])
        txn.update(replace(one, state="error" if error else "created", order=order))
        costs = ", ".join(f"{name} {count}" for name, count in order.costs.items())
        said = f"failed: {order.error}" if error else f"is {one.instance.lower()}:{one.tag}; bytes: {costs}"
        txn.event(Instance.KIND, one.instance_uuid, f"snapshot {said}", type="status", extra=order.costs)
        if one.then and not error and (instance := txn.find(Instance, one.instance_uuid)) is not None:
            txn.update(replace(instance, disks=one.then, updated_s=time.time()))
            txn.event(
                Instance.KIND, instance.uuid, f"its disks become {one.then[0].image_name}", type="audit"
            )
