"""Instances: their records, and create, power, hot-plug, delete. Each one transaction; agents do the rest."""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from compute.cluster.records import epochs
from compute.cluster.records.interfaces import Interface, Want, attach, detach, interfaces_on
from compute.cluster.records.networks import Network, find_network
from compute.cluster.records.rules import Rules
from compute.cluster.records.taken import Taken, claim, disk_bytes, take_name
from compute.cluster.records.transaction import Stored, Transaction, check_metadata
from compute.errors import Conflict, Invalid, NoCapacity, NotReady
from compute.wire.spec import AGENT_CHANNEL, DiskSpec, InstanceState, Power, Shape

_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE)
_MAX_DISKS = 16
_MAX_INTERFACES = 16
_BUSES = frozenset({"virtio", "scsi", "sata", "ide", "usb"})
_MODELS = frozenset({"virtio", "e1000", "e1000e", "rtl8139"})
_WANTED = {"poweron": Power.ON, "poweroff": Power.OFF, "pause": Power.PAUSED, "unpause": Power.ON}
_BUSY = frozenset({InstanceState.INITIAL, InstanceState.PREFLIGHT, InstanceState.CREATING})


NO_VIDEO = {"model": "none", "memory": 0, "vdi": None}


def _as_it_was(old: dict[str, Any]) -> dict[str, Any]:
    """Version 0.1 kept what was asked for, and gave each guest the agent's channel and no card but virtio's."""
    vdi = (old.get("video") or {}).get("vdi") or None
    video = {**NO_VIDEO, "vdi": vdi} | ({"model": "virtio"} if vdi else {})
    return old | {"schema": 2, "video": video, "side_channels": [AGENT_CHANNEL]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance(Stored, Shape):
    KIND: ClassVar[str] = "instance"
    SCHEMA: ClassVar[int] = 2
    UPGRADES: ClassVar[dict[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {1: _as_it_was}
    node: str
    disk_spec: tuple[dict[str, Any], ...] = ()  # what the user asked for, word for word
    ssh_key: str = ""
    video: dict[str, Any] = field(default_factory=lambda: dict(NO_VIDEO))
    """What the guest has: model, memory (KiB, 0 for qemu's choice), vdi."""
    nvram_template: str = ""
    configdrive: str = "openstack-disk"
    side_channels: tuple[str, ...] = ()
    state: InstanceState = InstanceState.INITIAL
    power_state: str = "off"
    error_message: str = ""
    progress: str = ""
    accel: str = ""
    vdi_port: int = 0
    agent_state: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    created_s: float = 0
    updated_s: float = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    autostart: str = "last"
    """Whether it runs once its node's machine has started: yes, no, or last: if it did before."""
    until_s: float = 0  # when it is deleted by itself; 0: never
    held_s: float = 0  # until when whoever made it holds it, who says so again and again; 0: it needs nobody
    ephemeral: bool = False  # it is deleted once it is off
    on_node_loss: str = "leave"
    """What becomes of it when its node is lost: leave, restart (of its images), restore (of its newest backup)."""
    heard_s: float = 0  # what its node said that it knows of `leased_s`: before that, it would not stop it
    unconfirmed: bool = False
    """Deleted, and its node (which was gone then) has not said that nothing of it is left."""
    moving: str = ""
    """The node that it goes to. Until it is there it is to be off, whatever `power` says; then that counts again."""
    passing: str = ""  # the live move (its snapshot) by which it goes there, and runs on meanwhile
    left: tuple[str, ...] = ()
    """Nodes that it was on: each is ordered to remove what it has, until it has said that nothing of it is left."""
    node_labels: dict[str, str] = field(default_factory=dict)  # only nodes with these are asked to take it

    def at(self, node: str) -> bool:
        """Whether it is that node's, or passes to it."""
        return node in (self.node, self.passing and self.moving)

    def warm_name(self) -> str:
        """What the warm state of its image and size is called; "" for one that can neither become nor begin as that."""
        more = len(self.disks) != 1 or self.video != NO_VIDEO or self.uefi or self.tpm  # none was checked yet
        if more or not (disk := self.disks[0]).image or not self.side_channels or self.configdrive == "none":
            return ""
        about = f"{disk.image} {disk.size_bytes} {disk.bus} {self.cpus} {self.memory_mib}"
        return f"warm-{hashlib.blake2b(about.encode(), digest_size=8).hexdigest()}"


def check(instance: Instance, wants: Sequence[Want]) -> None:
    """Raises Invalid."""
    if not _HOSTNAME.fullmatch(instance.name):
        raise Invalid(f"not a host name: {instance.name[:80]!r}", hint="1 to 63 letters, digits, dashes")
    if not 1 <= instance.cpus <= 256:
        raise Invalid(f"cpus is {instance.cpus}, not 1 to 256")
    if not 16 <= instance.memory_mib <= 4 * 2**20:
        raise Invalid(f"memory is {instance.memory_mib} MB, not 16 to 4194304")
    if not 1 <= len(instance.disks) <= _MAX_DISKS or len(wants) > _MAX_INTERFACES:
        raise Invalid(f"an instance has 1 to {_MAX_DISKS} disks and at most {_MAX_INTERFACES} interfaces")
    for disk in instance.disks:
        if disk.bus not in _BUSES - ({"virtio"} if disk.cdrom else set()):
            raise Invalid(f"{disk.device}: not on bus {disk.bus[:80]!r}", hint=", ".join(sorted(_BUSES)))
    if not re.fullmatch(r"[\w.-]{0,64}", instance.cpu_model, re.ASCII):
        raise Invalid(f"no processor is called {instance.cpu_model[:80]!r}", hint="virsh cpu-models x86_64")
    for want in wants:
        check_model(want.model)


def check_model(model: str) -> None:
    if model not in _MODELS:
        raise Invalid(f"no network card is called {model[:80]!r}", hint=", ".join(sorted(_MODELS)))


def create_instance(txn: Transaction, instance: Instance, wants: Sequence[Want]) -> Instance:
    """Claim the room on its node, take the name and the addresses. Raises Conflict, Invalid, NotFound, NoCapacity.

    `scheduler.create_instance` checks it and finds the node, in the same transaction.
    """
    epochs.check(txn)
    check_metadata(instance.metadata)
    now = time.time()
    instance = leased(txn, replace(instance, created_s=now, updated_s=now))
    take_name(txn, Instance.KIND, instance.namespace, instance.name, instance.uuid)
    for order, want in enumerate(wants):
        _attach(txn, instance, order, want)
    claim(txn, instance.node, instance.cpus, instance.memory_mib, disk_bytes(instance.disks))
    txn.event(Instance.KIND, instance.uuid, f"asked for; placed on {instance.node}", type="audit")
    return txn.create(instance)


def _attach(txn: Transaction, instance: Instance, order: int, want: Want) -> Interface:
    network = find_network(txn, want.network)
    _check_loss(instance, network)
    _check_dns(txn, network, instance)
    for uuid in want.rules:  # written, too: they are not deleted meanwhile
        txn.update(txn.get(Rules, uuid))
    return attach(txn, network, instance.uuid, instance.namespace, order, want)


def _check_loss(instance: Instance, network: Network) -> None:
    """Raises Conflict: on the node's own LAN nobody refuses a node that was lost."""
    if network.bridge and instance.on_node_loss != "leave":
        why = f"on {network.name}, a bridge, nobody refuses what a lost node sends"
        raise Conflict(why, hint="--on-node-loss leave")


def leased(txn: Transaction, instance: Instance) -> Instance:
    """What is to become of it when its node is lost was chosen now. Raises Conflict."""
    for interface in interfaces_of(txn, instance.uuid):
        _check_loss(instance, txn.get(Network, interface.network_uuid))
    return replace(instance, leased_s=0 if instance.on_node_loss == "leave" else time.time())


def _check_dns(txn: Transaction, network: Network, instance: Instance) -> None:
    """Two names that differ in case alone are one name for DNS. Raises Conflict."""
    name = instance.name.lower()
    others = {i.instance_uuid for i in interfaces_on(txn, network.uuid)} - {instance.uuid}
    if network.provide_dns and any(i.uuid in others and i.name.lower() == name for i in txn.list(Instance)):
        hint = "choose another name, or a network without DNS"
        raise Conflict(f"network {network.name} has a guest that DNS knows as {name}", hint=hint)


def rename(txn: Transaction, found: Instance, name: str) -> None:
    """Make another name its own. Raises Conflict."""
    take_name(txn, Instance.KIND, found.namespace, name, found.uuid)
    txn.delete(Taken, f"{Instance.KIND}/{found.namespace}/{found.name}")
    for interface in interfaces_of(txn, found.uuid):
        _check_dns(txn, txn.get(Network, interface.network_uuid), replace(found, name=name))


def interfaces_of(txn: Transaction, instance_uuid: str) -> list[Interface]:
    """In order."""
    return sorted((i for i in txn.list(Interface) if i.instance_uuid == instance_uuid), key=lambda i: i.order)


def stays(found: Instance) -> Instance:
    """It moves nowhere; what another node has of it by a live move is ordered away."""
    left = (*found.left, found.moving) if found.passing else found.left
    return replace(found, moving="", passing="", left=left)


def delete_instance(txn: Transaction, uuid: str) -> Instance:
    """Ask its node to remove it. Deleting again is success."""
    found = txn.get(Instance, uuid)
    if found.state in (InstanceState.DELETED, InstanceState.DELETE_WAIT):
        return found
    found = replace(stays(found), state=InstanceState.DELETE_WAIT, updated_s=time.time(), progress="")
    txn.event(Instance.KIND, uuid, "deletion asked for", type="audit")
    return txn.update(found)


def why_over(found: Instance, now_s: float) -> str:
    """Why it is to be deleted by itself; "" while it is not."""
    if found.state in (InstanceState.DELETED, InstanceState.DELETE_WAIT, InstanceState.DELETE_WAIT_ERROR):
        return ""
    if 0 < found.until_s <= now_s:
        return "its time is up"
    if 0 < found.held_s <= now_s:
        return "whoever made it has fallen silent"
    off = found.state == InstanceState.CREATED and found.power_state in ("off", "crashed")
    return f"it is {found.power_state}, and ephemeral" if off and found.ephemeral else ""


def end(txn: Transaction, uuid: str, why: str = "") -> None:
    """Delete what is over, or what is over for this reason; nothing of a state that may be older than the guests."""
    found = txn.find(Instance, uuid)
    if found and (why := why or why_over(found, time.time())) and not epochs.epoch(txn).waiting:
        delete_instance(txn, uuid)
        txn.event(Instance.KIND, uuid, f"deleted by itself: {why}", type="audit")


def living(txn: Transaction, uuid: str) -> Instance:
    """One that is not deleted, in whatever state it is. Raises Conflict."""
    found = txn.get(Instance, uuid)
    if found.state in (InstanceState.DELETED, InstanceState.DELETE_WAIT):
        raise Conflict(f"instance {found.name} is deleted")
    return found


def hold(txn: Transaction, uuid: str, seconds: float) -> Instance:
    """Whoever made it is there, and speaks again before that; 0: it needs nobody from now on. Raises Conflict."""
    return txn.update(replace(living(txn, uuid), held_s=time.time() + seconds if seconds else 0))


def finish_delete(txn: Transaction, found: Instance, *, unconfirmed: bool = False) -> None:
    """The node has nothing of it any more: give back addresses, name and claims, all or nothing."""
    for interface in interfaces_of(txn, found.uuid):
        detach(txn, interface)
    name = f"{Instance.KIND}/{found.namespace}/{found.name}"
    taken = txn.find(Taken, name)
    if taken is not None and taken.owner == found.uuid:
        txn.delete(Taken, name)
    claim(txn, found.node, -found.cpus, -found.memory_mib, -disk_bytes(found.disks))
    gone = replace(found, state=InstanceState.DELETED, power_state="off", unconfirmed=unconfirmed)
    txn.update(replace(gone, updated_s=time.time()))
    txn.event(Instance.KIND, found.uuid, "state is deleted")


def rehome(
    txn: Transaction, uuid: str, node: str, why: str, disks: tuple[DiskSpec, ...] | None = None,
    *, gone: bool = False, live: bool = False,
) -> Instance:  # fmt: skip
    """Give an instance to another node, which makes its disks anew: these, or those that it has, of their images.

    Interfaces, addresses, what is floating or published and the rule of its backups hang on the instance, and go along.
    The node that it was on is ordered to remove its copy; `gone`: it is not, since nobody knows what runs there: what
    a lost node still has is found and left as it is (quarantine) when it comes back; `live`: the other node has all of
    it already. Whoever calls has chosen a node with room (`scheduler.weigh`, `place`, `take`). Raises NotReady,
    Conflict, Unavailable.
    """
    found = created(txn, uuid) if live else stays(created(txn, uuid))
    if node in (found.node, *found.left):
        why_not = "is there" if node == found.node else "was there, and what it left is not removed yet"
        raise Conflict(f"instance {found.name} {why_not}: {node}", hint=f"see: sf instance show {found.name}")
    left = found.left if gone else (*found.left, found.node)
    now = replace(found, node=node, disks=disks or found.disks, left=left, arriving=not live, heard_s=0)
    power = "off" if found.power == Power.OFF else "transition-to-on"
    now = replace(now, moving="", passing="", power_state=found.power_state if live else power, progress="")
    now = replace(now, error_message="", agent_state="")
    claim(txn, found.node, -found.cpus, -found.memory_mib, -disk_bytes(found.disks))
    claim(txn, node, now.cpus, now.memory_mib, disk_bytes(now.disks))
    txn.event(Instance.KIND, uuid, f"moved from {found.node} to {node}: {why}", type="audit")
    return txn.update(replace(now, vdi_port=0, updated_s=time.time()))


def created(txn: Transaction, uuid: str) -> Instance:
    """One that can be changed. Raises NotReady, Conflict, Unavailable."""
    epochs.check(txn)
    found = txn.get(Instance, uuid)
    if found.state in _BUSY:
        raise NotReady(f"instance {found.name} is {found.state}", hint="wait until it is created")
    if found.state != InstanceState.CREATED:
        hint = "delete it and create it anew" if found.state == InstanceState.ERROR else ""
        raise Conflict(f"instance {found.name} is in state {found.state}", hint=hint)
    return found


def power(txn: Transaction, uuid: str, verb: str, grace_s: int = 0) -> Instance:
    """poweron, poweroff, pause, unpause, rebootsoft, reboothard. Raises NotReady, Conflict, Unavailable.

    grace_s: of poweroff, how long the guest is asked to end before; 0 takes its power at once.
    """
    found = created(txn, uuid)
    if verb == "pause" and found.power == Power.OFF:
        raise Conflict(f"instance {found.name} is off", hint="power it on first")
    if verb in ("rebootsoft", "reboothard"):
        if found.power != Power.ON:
            raise Conflict(f"instance {found.name} is {found.power}", hint="power it on first")
        soft, hard = (verb == "rebootsoft"), (verb == "reboothard")
        found = replace(found, reboot_soft=found.reboot_soft + soft, reboot_hard=found.reboot_hard + hard)
    elif verb == "poweron" and found.power == Power.ON and found.power_state in ("off", "crashed"):
        # It ended by itself; nobody asked it to be off.
        found = replace(found, reboot_hard=found.reboot_hard + 1)
    else:
        found = replace(found, power=_WANTED[verb], grace_s=grace_s)
    txn.update(replace(found, updated_s=time.time()))
    asked = f", {grace_s} s after the guest was asked to end" if grace_s else ""
    txn.event(Instance.KIND, uuid, f"{verb} asked for{asked}", type="audit")
    return found


def add_interface(txn: Transaction, uuid: str, want: Want) -> Interface:
    """Give the instance one more interface; its agent plugs it in. Raises NotReady, Conflict, NoCapacity, Invalid."""
    found = created(txn, uuid)
    check_model(want.model)
    held = interfaces_of(txn, uuid)
    if len(held) >= _MAX_INTERFACES:
        raise NoCapacity(f"instance {found.name} has {_MAX_INTERFACES} interfaces already")
    order = max((i.order for i in held), default=-1) + 1
    # The record is written too, so that a deletion at the same moment repeats this and sees it.
    txn.update(replace(found, updated_s=time.time()))
    made = _attach(txn, found, order, want)
    txn.event(Instance.KIND, uuid, f"interface {made.uuid} with {made.known} asked for", type="audit")
    return made


def remove_interface(txn: Transaction, interface: Interface) -> None:
    """Take it from its instance; the agent unplugs it."""
    found = txn.get(Instance, interface.instance_uuid)
    txn.update(replace(found, updated_s=time.time()))
    detach(txn, interface)
    txn.event(Instance.KIND, found.uuid, f"removal of interface {interface.uuid} asked for", type="audit")
