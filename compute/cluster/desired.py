"""From records to what one node must be: a pure function of them."""

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, ip_address

from compute.cluster import liveness
from compute.cluster.images.stores import MINE
from compute.cluster.liveness import Server
from compute.cluster.quarantine import Quarantined
from compute.cluster.records.epochs import Epoch, epoch
from compute.cluster.records.instances import Instance
from compute.cluster.records.interfaces import Interface
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.networks import Network
from compute.cluster.records.nodes import Node, facts_of
from compute.cluster.records.rules import Rules, allowed
from compute.cluster.records.secrets import site_secret, store_token
from compute.cluster.records.snapshots import Snapshot
from compute.cluster.records.transaction import Transaction
from compute.wire.codec import to_json
from compute.wire.spec import (
    AGENT_CHANNEL,
    Capture,
    ImageSite,
    InstanceSpec,
    InstanceState,
    InterfaceSpec,
    NodeDesired,
    Power,
)
from net import Network as NetNetwork
from net import NodeNetworks, Peer, Port, tap

_KINDS = Instance, Interface, Network, Rules, Node, Epoch, Quarantined, Server, Snapshot, Namespace
KINDS = frozenset((*(kind.KIND for kind in _KINDS), liveness.KIND))
"""Of what `read` is made."""

LEAVING = (InstanceState.DELETE_WAIT, InstanceState.DELETE_WAIT_ERROR, InstanceState.DELETED)


def read(
    txn: Transaction,
    node: str,
    installation: str,
    alive: Collection[str],
    uplink: str = "",
    resolvers: tuple[IPv4Address, ...] = (),
    stores: Mapping[str, str] | None = None,
    server: str = "",
) -> NodeDesired:
    """What `node` must be now; `server` is the server's own.

    The revision is a hash of it, so that every server gives the same one.
    """
    nodes = txn.list(Node)
    orphans = [one for one in txn.list(Quarantined) if one.node == node]
    now = build(
        node,
        installation,
        instances=txn.list(Instance),
        interfaces=txn.list(Interface),
        networks=txn.list(Network),
        rules=txn.list(Rules),
        nodes=nodes,
        also={i.network_uuid for one in orphans if one.orphan.spec for i in one.orphan.spec.interfaces},
        uplink=uplink,
        resolvers=resolvers,
    )
    gone = [one.uuid for one in orphans if one.delete]
    removals = tuple(InstanceSpec(uuid, uuid, "", 1, 16, (), delete=True) for uuid in gone)
    given, fence = next(((n.given, n.fence) for n in nodes if n.name == node), ((), ""))
    present, wanted = epoch(txn), defaultdict[str, tuple[Capture, ...]](tuple)
    for one in sorted(txn.list(Snapshot), key=lambda one: one.tag):
        wanted[one.instance_uuid] += (one.order,) if one.state == "ordered" else ()
    asked = tuple(replace(i, snapshots=wanted[i.uuid]) if wanted[i.uuid] else i for i in now.instances)
    now = replace(
        now,
        instances=(*asked, *removals),
        image_site=image_site(node, nodes, alive, site_secret(txn)),
        epoch=present.number,
        former=present.former,
        servers=tuple(f"https://{one.name}" for one in txn.list(Server)),
        hold=bool(present.waiting),
        given=given,
        fence=fence,
    )
    own = {
        f"{MINE}/{one.name}": one.store if node == server else ""
        for one in txn.list(Namespace)
        if one.store and one.name in namespaces(now.instances)
    }
    if handed := {**(stores or {}), **own}:
        now = replace(now, stores=handed, store_token=store_token(txn, node) if node != server else "")
    digest = hashlib.blake2b(to_json(now), digest_size=6).digest()
    return replace(now, revision=int.from_bytes(digest), reached=txn.store.revision())


def build(
    node: str,
    installation: str,
    *,
    instances: Iterable[Instance],
    interfaces: Iterable[Interface],
    networks: Iterable[Network],
    rules: Iterable[Rules] = (),
    nodes: Iterable[Node],
    also: Collection[str] = (),
    uplink: str = "",
    resolvers: tuple[IPv4Address, ...] = (),
) -> NodeDesired:
    """Instances placed on `node`, the networks that they, its routers or `also` need, and every port of those."""
    instances = list(instances)
    known = {one.uuid: one for one in rules}
    alive = {i.uuid: i for i in instances if i.state != InstanceState.DELETED}
    removed = (i for i in instances if node in i.left or (i.unconfirmed and i.node == node))
    by_network: dict[str, list[Interface]] = defaultdict(list)
    by_instance: dict[str, list[Interface]] = defaultdict(list)
    for interface in interfaces:
        if interface.state == "created" and interface.instance_uuid in alive:
            by_network[interface.network_uuid].append(interface)
            by_instance[interface.instance_uuid].append(interface)
    fenced = {n.name for n in nodes if n.fence}
    machines = {n.name: facts_of(n) for n in nodes if n.state != "deleted"}
    mtu_bytes = min((facts.mtu_bytes if facts else 1450 for facts in machines.values()), default=1450)
    networks = (replace(n, router_node="") if n.router_node in fenced else n for n in networks)
    wanted = [
        _network(network, node, installation, mtu_bytes, by_network[network.uuid], alive, known)
        for network in sorted(networks, key=lambda n: n.uuid)
        if network.state == "created"
        and (
            network.router_node == node
            or network.bridge
            or network.uuid in also
            or any(alive[i.instance_uuid].node == node for i in by_network[network.uuid])
        )
    ]
    here = machines.get(node)
    return NodeDesired(
        revision=0,
        networks=NodeNetworks(
            installation=installation,
            node=node,
            networks=tuple(wanted),
            peers=tuple(
                Peer(name, IPv4Address(other.address))
                for name, other in sorted(machines.items())
                if name != node and other and name not in fenced
            ),
            underlay=IPv4Address(here.address if here else "127.0.0.1"),
            uplink=uplink,
            resolvers=resolvers,
        ),
        instances=tuple(
            spec(alive[uuid], by_instance[uuid], installation)
            for uuid in sorted(alive)
            if alive[uuid].node == node
            and (alive[uuid].state in LEAVING or not any(disk.pending for disk in alive[uuid].disks))
        )
        + tuple(replace(spec(instance, (), installation), delete=True) for instance in removed),
    )


def namespaces(instances: Iterable[Instance | InstanceSpec]) -> set[str]:
    """Whose own stores the node of these reads and writes: those of its guests and of what they are made of."""
    return {name for one in instances for name in (one.namespace, *(disk.store for disk in one.disks))}


def image_site(node: str, nodes: Iterable[Node], alive: Collection[str], secret: bytes) -> ImageSite:
    """With which of the living nodes the image service of `node` shares. Other stores, another key."""
    there = (n for n in nodes if n.state != "deleted" and (n.name == node or n.name in alive))
    facts = {n.name: found for n in there if (found := facts_of(n)) and found.peer_address}
    here = facts.pop(node, None)
    same = {n: f.peer_address for n, f in sorted(facts.items()) if here and here.stores == f.stores}
    if here is None or not here.stores or not same:
        return ImageSite()
    key = hmac.digest(secret, "\n".join(here.stores).encode(), "sha256")
    return ImageSite(node, here.peer_address, same, key)


def _network(
    network: Network,
    node: str,
    installation: str,
    mtu_bytes: int,
    ports: Iterable[Interface],
    alive: Mapping[str, Instance],
    rules: Mapping[str, Rules],
) -> NetNetwork:
    netblock = IPv4Network(network.netblock)
    return NetNetwork(
        uuid=network.uuid,
        vni=network.vni,
        name=network.name,
        netblock=netblock,
        gateway=IPv4Address(network.gateway or netblock[1]),
        mtu_bytes=1500 if network.bridge else mtu_bytes,
        bridge=network.bridge,
        netblock6=network.block6,
        slaac=network.slaac,
        provide_dhcp=network.provide_dhcp,
        provide_nat=network.provide_nat,
        provide_dns=network.provide_dns,
        router_node=network.router_node,
        router_floating=IPv4Address(network.router_floating) if network.router_floating else None,
        ports=tuple(
            Port(
                uuid=port.uuid,
                mac=port.mac,
                address=IPv4Address(port.address),
                hostname=alive[port.instance_uuid].name,
                node=alive[port.instance_uuid].node,
                tap=tap(installation, port.uuid) if alive[port.instance_uuid].node == node else "",
                floating=IPv4Address(port.floating) if port.floating else None,
                published=port.published,
                limits=port.limits,
                allowed=allowed(network.isolated, port.rules, rules),
            )
            for port in sorted(ports, key=lambda p: p.uuid)
        ),
        routed=tuple((IPv4Address(a), IPv4Address(hop)) for a, hop in sorted(network.routed.items())),
        dns_entries=tuple((name, ip_address(a)) for name, a in sorted(network.dns_entries.items())),
    )


def spec(instance: Instance, interfaces: Iterable[Interface], installation: str) -> InstanceSpec:
    """What an agent needs to run this instance."""
    return InstanceSpec(
        uuid=instance.uuid,
        name=instance.name,
        namespace=instance.namespace,
        cpus=instance.cpus,
        memory_mib=instance.memory_mib,
        disks=instance.disks,
        interfaces=tuple(
            InterfaceSpec(i.uuid, i.network_uuid, i.mac, i.address, i.model, tap(installation, i.uuid))
            for i in sorted(interfaces, key=lambda i: i.order)
        ),
        ssh_keys=tuple(line for line in instance.ssh_key.splitlines() if line.strip()),
        user_data=instance.user_data,
        metadata=tuple((key, str(value)) for key, value in sorted(instance.metadata.items())),
        uefi=instance.uefi,
        secure_boot=instance.secure_boot,
        tpm=instance.tpm,
        cpu_model=instance.cpu_model,
        config_drive=instance.configdrive != "none",
        agent=AGENT_CHANNEL in instance.side_channels,
        vdi=instance.video.get("vdi") or "",
        video="" if instance.video["model"] == "none" else instance.video["model"],
        video_kib=instance.video["memory"],
        power=Power.OFF if instance.moving else instance.power,
        grace_s=instance.grace_s,
        reboot_soft=instance.reboot_soft,
        reboot_hard=instance.reboot_hard,
        delete=instance.state in LEAVING,
        made=instance.state == InstanceState.CREATED and not instance.arriving,
        arriving=instance.arriving,
        failed=instance.state == InstanceState.ERROR,
        order=instance.order,
        delay_s=instance.delay_s,
        leased_s=instance.leased_s,
    )
