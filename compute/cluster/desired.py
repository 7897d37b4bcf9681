"""From records to what one node must be; nothing else goes in."""

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, ip_address
from typing import Any

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
from compute.cluster.records.snapshots import Snapshot
from compute.cluster.records.taken import site_secret, store_token
from compute.cluster.records.transaction import Transaction
from compute.wire.codec import alike, to_json
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
KINDS = frozenset((*(kind.KIND for kind in _KINDS), liveness.KIND))  # of what `read` is made
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
    instances, nodes = txn.list(Instance), txn.list(Node)
    orphans = [one for one in txn.list(Quarantined) if one.node == node]
    there = {i.uuid: i for i in instances if i.state != InstanceState.DELETED}
    links = [i for i in txn.list(Interface) if i.instance_uuid in there]
    given, fence = next(((n.given, n.fence) for n in nodes if n.name == node), ((), ""))
    present, wanted = epoch(txn), defaultdict[str, tuple[Capture, ...]](tuple)
    for one in sorted(txn.list(Snapshot), key=lambda one: one.tag):
        wanted[one.instance_uuid] += (one.order,) if one.state == "ordered" else ()
    nics = defaultdict[str, list[Interface]](list)
    for link in links:
        nics[link.instance_uuid].append(link)
    guests = [
        replace(spec(one, nics[uuid], installation, node), snapshots=wanted[uuid])
        for uuid, one in there.items()
        if one.at(node) and (one.state in LEAVING or not any(disk.pending for disk in one.disks))
    ]
    removed = (i for i in instances if node in i.left or (i.unconfirmed and i.node == node))
    guests += [replace(spec(one, (), installation), delete=True) for one in removed]
    guests += [InstanceSpec(one.uuid, one.uuid, "", 1, 16, (), delete=True) for one in orphans if one.delete]
    also = {i.network_uuid for one in orphans if one.orphan.spec for i in one.orphan.spec.interfaces}
    networks, whose = _networks(txn, node, installation, there, links, also), namespaces(guests)
    own = {
        f"{MINE}/{one.name}": one.store if node == server else ""
        for one in txn.list(Namespace)
        if one.store and one.name in whose
    }
    handed = {**(stores or {}), **own}
    now = NodeDesired(
        revision=0,
        networks=replace(networks, uplink=uplink, resolvers=resolvers),
        instances=tuple(guests),
        image_site=image_site(node, nodes, alive, site_secret(txn)),
        stores=handed,
        store_token=store_token(txn, node) if handed and node != server else "",
        epoch=present.number,
        former=present.former,
        servers=tuple(f"https://{one.name}" for one in txn.list(Server)),
        hold=bool(present.waiting),
        given=given,
        fence=fence,
    )
    digest = hashlib.blake2b(to_json(now), digest_size=6).digest()
    return replace(now, revision=int.from_bytes(digest), reached=txn.store.revision())


def _networks(
    txn: Transaction,
    node: str,
    installation: str,
    there: Mapping[str, Instance],
    links: Sequence[Interface],
    also: set[str],
) -> NodeNetworks:
    """Those that the guests of `node`, its routers or `also` need, with every port of those."""
    nodes, rules = txn.list(Node), {one.uuid: one for one in txn.list(Rules)}
    fenced = {n.name for n in nodes if n.fence}
    machines = {n.name: facts_of(n) for n in nodes if n.state != "deleted"}
    mtu_bytes = min((facts.mtu_bytes if facts else 1450 for facts in machines.values()), default=1450)
    needed = {link.network_uuid for link in links if there[link.instance_uuid].at(node)} | also
    ports = defaultdict[str, list[Interface]](list)
    for link in links:
        ports[link.network_uuid].append(link)
    here, found = machines.get(node), list[NetNetwork]()
    for network in txn.list(Network):
        if network.router_node in fenced:
            network = replace(network, router_node="")
        near = network.router_node == node or network.bridge or network.uuid in needed
        if network.state == "created" and near:
            on = ports[network.uuid]
            made = (_port(i, there[i.instance_uuid], network, node, installation, rules) for i in on)
            found.append(_network(network, 1500 if network.bridge else mtu_bytes, tuple(made)))
    return NodeNetworks(
        installation=installation,
        node=node,
        networks=tuple(found),
        peers=tuple(
            Peer(name, IPv4Address(other.address))
            for name, other in sorted(machines.items())
            if name != node and other and name not in fenced
        ),
        underlay=IPv4Address(here.address if here else "127.0.0.1"),
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


def _network(network: Network, mtu_bytes: int, ports: tuple[Port, ...]) -> NetNetwork:
    netblock = IPv4Network(network.netblock)
    said: dict[str, Any] = alike(NetNetwork, network) | {
        "netblock": netblock,
        "gateway": IPv4Address(network.gateway or netblock[1]),
        "mtu_bytes": mtu_bytes,
        "netblock6": network.block6,
        "router_floating": IPv4Address(network.router_floating) if network.router_floating else None,
        "routed": tuple((IPv4Address(a), IPv4Address(hop)) for a, hop in sorted(network.routed.items())),
        "dns_entries": tuple((name, ip_address(a)) for name, a in sorted(network.dns_entries.items())),
    }
    return NetNetwork(**said, ports=ports)


def _port(
    link: Interface,
    guest: Instance,
    network: Network,
    node: str,
    installation: str,
    rules: Mapping[str, Rules],
) -> Port:
    said: dict[str, Any] = alike(Port, link) | {
        "address": IPv4Address(link.address),
        "hostname": guest.name,
        "node": guest.node,
        "tap": tap(installation, link.uuid) if guest.node == node else "",
        "floating": IPv4Address(link.floating) if link.floating else None,
        "allowed": allowed(network.isolated, link.rules, rules),
    }
    return Port(**said)


def spec(instance: Instance, links: Iterable[Interface], installation: str, node: str = "") -> InstanceSpec:
    """What an agent needs to run this instance, or to take it over."""
    coming = instance.passing if node == instance.moving else ""
    said: dict[str, Any] = alike(InstanceSpec, instance) | {
        "interfaces": tuple(
            InterfaceSpec(i.uuid, i.network_uuid, i.mac, i.address, i.model, tap(installation, i.uuid))
            for i in sorted(links, key=lambda i: i.order)
        ),
        "ssh_keys": tuple(line for line in instance.ssh_key.splitlines() if line.strip()),
        "metadata": tuple((key, str(value)) for key, value in sorted(instance.metadata.items())),
        "config_drive": instance.configdrive != "none",
        "agent": AGENT_CHANNEL in instance.side_channels,
        "vdi": instance.video.get("vdi") or "",
        "video": "" if instance.video["model"] == "none" else instance.video["model"],
        "video_kib": instance.video["memory"],
        "power": Power.OFF if instance.moving and not instance.passing else instance.power,
        "leaving": "" if coming else instance.passing,
        "coming": coming,
        "delete": instance.state in LEAVING,
        "made": instance.state == InstanceState.CREATED and not instance.arriving,
        "failed": instance.state == InstanceState.ERROR,
    }
    return InstanceSpec(**said)
