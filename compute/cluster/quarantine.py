"""Guests that nodes have and no record knows: what they hold is taken, until somebody adopts or deletes them."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any, ClassVar

from compute.cluster.records.addresses import Ipam, parse_address
from compute.cluster.records.instances import Instance
from compute.cluster.records.interfaces import Interface, Want, attach
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node
from compute.cluster.records.taken import Taken, claim, disk_bytes, take, take_name
from compute.cluster.records.transaction import Stored, Transaction
from compute.errors import Conflict
from compute.wire.codec import alike
from compute.wire.spec import AGENT_CHANNEL, InstanceState, InterfaceSpec, Orphan
from net import NetError, ipam
from net import Network as NetNetwork

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined(Stored):
    KIND: ClassVar[str] = "orphan"
    uuid: str
    node: str
    orphan: Orphan
    since_s: float
    delete: bool = False  # ordered: it stays here until its node has nothing of it any more


def note(txn: Transaction, node: str, orphans: Iterable[Orphan]) -> bool:
    """All that a node has and nobody knows, in place of what it said before. True: there is more, as before."""
    before = {known.uuid: known for known in txn.list(Quarantined) if known.node == node and not known.delete}
    for orphan in orphans:
        had, message, spec = before.pop(orphan.uuid, None), "", orphan.spec
        if had is None:
            name = f"{spec.namespace[:64]}/{spec.name[:64]}" if spec else "nobody knows its name"
            one = txn.find(Instance, orphan.uuid)
            where = f"on {one.node} by now" if one and one.node != node else "in no record"
            # Without its name: a node's history is everybody's to read.
            message = f"guest {orphan.uuid} is {where}: left as it is; see sf node orphans"
            log.warning("node %s: %s (%s)", node, message, name)
        elif orphan.trouble not in ("", had.orphan.trouble):
            message = f"guest {orphan.uuid}, which is in no record: {orphan.trouble[:500]}"
        if message:
            txn.event(Node.KIND, node, message, type="status")
        if had is None or had.orphan != orphan:
            if txn.room < 40:
                return True
            made = Quarantined(uuid=orphan.uuid, node=node, orphan=orphan, since_s=time.time())
            if had is not None:
                made = replace(had, orphan=orphan)
            elif known := txn.find(Quarantined, orphan.uuid):  # another node's as well, or to be deleted
                other = txn.find(Node, known.node) if known.node != node else None
                if known.delete and other and other.state != "deleted":
                    continue  # that copy is to go, and this one is another
                made = replace(made, delete=known.delete)
            txn.update(made)
            hold(txn, made)
    for gone in before.values():
        if txn.room < 40:
            return True
        forget(txn, gone)
    return False


def hold(txn: Transaction, known: Quarantined) -> None:
    """Its addresses and VNIs are taken; what another has already is that one's."""
    for network in known.orphan.networks:
        if txn.find(Taken, f"vni/{network.vni}") is None:
            take(txn, f"vni/{network.vni}", network.uuid)
    for interface, pool in _pools(txn, known):
        try:
            held, _ = ipam.allocate(pool.pool, interface.uuid, time.time(), parse_address(interface.address))
            txn.update(replace(pool, pool=held))
        except NetError as err:
            log.warning("guest %s, which is in no record: %s", known.uuid, err)


def _pools(txn: Transaction, known: Quarantined) -> Iterator[tuple[InterfaceSpec, Ipam]]:
    """Its interfaces on networks that there are; one that a record has by now is that record's."""
    for interface in known.orphan.spec.interfaces if known.orphan.spec else ():
        pool = txn.find(Ipam, interface.network_uuid)
        if pool is not None and txn.find(Interface, interface.uuid) is None:
            yield interface, pool


def forget(txn: Transaction, known: Quarantined) -> None:
    """It is gone: give back what it held."""
    txn.delete(Quarantined, known.uuid)
    _give_back(txn, known)


def _give_back(txn: Transaction, known: Quarantined) -> None:
    for network in known.orphan.networks:
        taken = txn.find(Taken, f"vni/{network.vni}")
        if taken is not None and taken.owner == network.uuid and txn.find(Network, network.uuid) is None:
            txn.delete(Taken, taken.name)
    for interface, pool in _pools(txn, known):
        address = parse_address(interface.address)
        txn.update(replace(pool, pool=ipam.release(pool.pool, address, interface.uuid, time.time())))


def order_deletion(txn: Transaction, uuid: str) -> Quarantined:
    """Ask its node to remove it, disks and all. What it held is free at once where the node was removed."""
    found = txn.update(replace(txn.get(Quarantined, uuid), delete=True))
    node = txn.find(Node, found.node)
    if node is None or node.state == "deleted":
        _give_back(txn, found)
    txn.event(Node.KIND, found.node, f"deletion of guest {uuid}, in no record, asked for", type="audit")
    return found


def adopt(txn: Transaction, uuid: str) -> Instance:
    """Make the records of a guest from what its node knows of it, those of its networks too. Raises Conflict."""
    found = txn.get(Quarantined, uuid)
    spec, before = found.orphan.spec, txn.find(Instance, uuid)
    if (node := txn.find(Node, found.node)) is None or node.state == "deleted":  # it has no room to claim
        raise Conflict(f"node {found.node} was removed", hint="join it anew, or delete the guest")
    if spec is None:
        raise Conflict(f"nobody knows what guest {uuid} was made from", hint="it can only be deleted")
    if found.delete or (before is not None and before.state != InstanceState.DELETED):
        raise Conflict(f"guest {uuid} is to be deleted, or has a record", hint=f"sf instance show {uuid}")
    namespace = spec.namespace if txn.find(Namespace, spec.namespace) else "system"
    networks = {n.uuid: _network(txn, n, namespace, found.node) for n in found.orphan.networks}
    name = _name(txn, Instance.KIND, namespace, spec.name, uuid)
    for order, interface in enumerate(spec.interfaces):
        network = networks.get(interface.network_uuid) or txn.get(Network, interface.network_uuid)
        known, number = interface.address, IPv4Address(interface.address)
        if number in ipam.UNKNOWN:
            known = str(ipam.beside(IPv4Network(network.netblock), network.block6, number) or "")
        want = Want(network.uuid, known, interface.mac, interface.model, uuid=interface.uuid)
        attach(txn, network, uuid, namespace, order, want)
    now = time.time()
    said: dict[str, Any] = alike(Instance, spec) | {
        "name": name, "namespace": namespace, "node": found.node, "state": InstanceState.CREATED,
        "video": {"model": spec.video or "none", "memory": spec.video_kib, "vdi": spec.vdi or None},
        "configdrive": "openstack-disk" if spec.config_drive else "none", "ssh_key": "\n".join(spec.ssh_keys),
        "side_channels": (AGENT_CHANNEL,) if spec.agent else (), "metadata": dict(spec.metadata),
        "power_state": found.orphan.power, "created_s": now, "updated_s": now, "arriving": False, "leased_s": 0,
    }  # fmt: skip
    made = Instance(**said, revision=before.revision if before else 0)
    claim(txn, made.node, made.cpus, made.memory_mib, disk_bytes(made.disks))
    txn.delete(Quarantined, uuid)
    txn.event(Instance.KIND, uuid, f"adopted on {found.node}", type="audit")
    return txn.update(made)


def _network(txn: Transaction, network: NetNetwork, namespace: str, node: str) -> Network:
    known = txn.find(Network, network.uuid)
    if known is not None and known.state != "deleted":
        return known
    taken = txn.find(Taken, f"vni/{network.vni}")
    if taken is not None and taken.owner != network.uuid:
        raise Conflict(f"VNI {network.vni} of network {network.name} is another network's by now")
    if taken is None:
        take(txn, f"vni/{network.vni}", network.uuid)
    said: dict[str, Any] = alike(Network, network) | {
        "name": _name(txn, Network.KIND, namespace, network.name, network.uuid), "namespace": namespace,
        "netblock": str(network.netblock), "netblock6": str(network.netblock6 or ""), "gateway": str(network.gateway),
        "router_node": "" if network.bridge else node, "router_floating": "", "routed": {}, "dns_entries": {},
    }  # fmt: skip
    made = Network(**said, created_s=time.time(), revision=known.revision if known else 0)
    if made.netblock6 and txn.find(Taken, f"netblock6/{made.netblock6}") is None:
        take(txn, f"netblock6/{made.netblock6}", network.uuid)
    txn.update(made)
    txn.update(Ipam(name=network.uuid, pool=ipam.Pool(network.netblock, network.gateway)))
    for other in txn.list(Quarantined):
        hold(txn, other)
    return made


def _name(txn: Transaction, kind: str, namespace: str, wanted: str, uuid: str) -> str:
    """The name that it had, or one like it if another has that by now."""
    if txn.find(Taken, f"{kind}/{namespace}/{wanted}") is not None:
        wanted = f"{wanted[:54]}-{uuid[:8]}"
    take_name(txn, kind, namespace, wanted, uuid)
    return wanted
