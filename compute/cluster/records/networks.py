"""What happens to networks, interfaces and addresses in the records. Every address changes hands inside a transaction.

Each network has one `Ipam` record. Whoever adds or removes an interface writes it, so two of them never work from the
same picture; that makes it safe to look at the list of a network's interfaces inside such a transaction.
"""

import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from typing import ClassVar

from compute.cluster.auth import check_name
from compute.cluster.records.objects import Interface, Network, Node, Stored, Taken, Transaction, new_uuid
from compute.errors import Conflict, Invalid, NoCapacity, NotFound, NotReady
from net import ipam, port_mac

FLOATING = "floating"
"""Name of the floating pool's Ipam record."""

_DNS_NAME = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.?){1,8}", re.IGNORECASE)
_VNI_TRIES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Ipam(Stored):
    """A network's addresses, or the floating pool's."""

    KIND: ClassVar[str] = "ipam"
    name: str
    pool: ipam.Pool


@dataclass(frozen=True, slots=True)
class Want:
    """An interface as asked for."""

    network: str
    """UUID."""
    address: str = ""
    mac: str = ""
    model: str = "virtio"
    float: bool = False


def parse_address(text: str) -> IPv4Address:
    """Raises Invalid."""
    try:
        return IPv4Address(text)
    except AddressValueError as err:
        raise Invalid(f"not an IPv4 address: {text[:80]!r}") from err


def ensure_floating(txn: Transaction, pool: IPv4Network | None) -> None:
    """Make the floating pool's record, or follow the configuration. Raises Conflict while the old one is in use."""
    known = txn.find(Ipam, FLOATING)
    if pool is None or (known is not None and known.pool.netblock == pool):
        return
    if known is not None and known.pool.held:
        raise Conflict(f"the floating pool cannot become {pool}: {known.pool.netblock} is in use")
    txn.update(Ipam(name=FLOATING, pool=ipam.Pool.of(pool), revision=known.revision if known else 0))


def find_network(txn: Transaction, uuid: str) -> Network:
    """A network that is not deleted. Raises NotFound, NotReady."""
    found = txn.get(Network, uuid)
    if found.state == "deleted":
        raise NotFound(f"network {uuid} not found", hint="see: sf network ls")
    if found.state != "created":
        raise NotReady(f"network {found.name} is {found.state}")
    return found


def create_network(
    txn: Transaction, network: Network, *, excluded: Collection[IPv4Network], router_nodes: Sequence[str]
) -> Network:
    """Check, give it a VNI, a pool and a router. `vni` and `router_node` of the argument do not count.

    router_nodes: who may route, best first. Raises Conflict, net's Invalid and Exhausted.
    """
    check_name(network.name, "network name")
    netblock = ipam.check_netblock(network.netblock, excluded)
    name = Taken(name=_name_key(network), owner=network.uuid, created_s=time.time())
    if txn.find(Taken, name.name) is not None:
        raise Conflict(
            f"there is a network {network.name} in namespace {network.namespace} already",
            hint=f"sf network show {network.name}",
        )
    for _ in range(_VNI_TRIES):
        vni = ipam.random_vni(())
        if txn.find(Taken, f"vni/{vni}") is None:
            break
    else:
        raise NoCapacity("no VXLAN network identifier is free")
    network = replace(
        network,
        netblock=str(netblock),
        vni=vni,
        router_node=next(iter(router_nodes), ""),
        created_s=time.time(),
    )
    txn.create(name)
    txn.create(Taken(name=f"vni/{vni}", owner=network.uuid, created_s=network.created_s))
    txn.create(Ipam(name=network.uuid, pool=ipam.Pool.of(netblock)))
    if network.provide_nat and txn.find(Ipam, FLOATING) is not None:
        network = replace(network, router_floating=_float(txn, f"router/{network.uuid}"))
    txn.create(network)
    txn.event(Network.KIND, network.uuid, f"created as {netblock} with VNI {vni}", type="audit")
    return network


def _name_key(network: Network) -> str:
    return f"{Network.KIND}/{network.namespace}/{network.name}"


def delete_network(txn: Transaction, uuid: str) -> Network:
    """Raises Conflict while it has interfaces. Deleting again is success."""
    found = txn.get(Network, uuid)
    if found.state == "deleted":
        return found
    used = txn.get(Ipam, uuid).pool.held
    if used:
        raise Conflict(
            f"network {found.name} has {len(used)} interfaces", hint="delete their instances first"
        )
    for floating in (found.router_floating, *found.routed):
        _unfloat(txn, floating)
    txn.delete(Ipam, uuid)
    txn.delete(Taken, f"vni/{found.vni}")
    txn.delete(Taken, _name_key(found))
    found = replace(
        found, state="deleted", deleted_s=time.time(), router_node="", router_floating="", routed={}
    )
    txn.update(found)
    txn.event(Network.KIND, uuid, "deleted", type="audit")
    return found


def attach(
    txn: Transaction, network: Network, instance_uuid: str, namespace: str, order: int, want: Want
) -> Interface:
    """An interface with an address and a MAC of its own. Raises net's Invalid, Conflict and Exhausted."""
    uuid = new_uuid()
    known = txn.get(Ipam, network.uuid)
    wanted = parse_address(want.address) if want.address else None
    pool, address = ipam.allocate(known.pool, uuid, time.time(), wanted)
    txn.update(replace(known, pool=pool))
    taken = {i.mac for i in interfaces_on(txn, network.uuid)}
    mac = ipam.check_mac(want.mac) if want.mac else port_mac(uuid)
    if mac in taken:
        raise Conflict(
            f"MAC address {mac} is in use on network {network.name}", hint="give none to have one chosen"
        )
    made = Interface(
        uuid=uuid,
        network_uuid=network.uuid,
        instance_uuid=instance_uuid,
        namespace=namespace,
        mac=mac,
        address=str(address),
        order=order,
        model=want.model,
        floating=_float(txn, uuid) if want.float else "",
    )
    txn.create(made)
    txn.event(Network.KIND, network.uuid, f"{address} given to interface {uuid}", type="mutate")
    return made


def detach(txn: Transaction, interface: Interface) -> None:
    """Give the addresses back. Doing it twice is success."""
    known = txn.find(Ipam, interface.network_uuid)
    if known is not None:
        address = IPv4Address(interface.address)
        txn.update(replace(known, pool=ipam.release(known.pool, address, interface.uuid, time.time())))
        txn.event(
            Network.KIND,
            interface.network_uuid,
            f"{address} released by interface {interface.uuid}",
            type="mutate",
        )
    _unfloat(txn, interface.floating)
    txn.delete(Interface, interface.uuid)


def interfaces_on(txn: Transaction, network_uuid: str) -> list[Interface]:
    return [i for i in txn.list(Interface) if i.network_uuid == network_uuid]


def float_interface(txn: Transaction, uuid: str) -> Interface:
    """Give it an address of the floating pool. Raises Conflict when it has one."""
    found = txn.get(Interface, uuid)
    if found.floating:
        raise Conflict(f"interface {uuid} has the floating address {found.floating} already")
    found = replace(found, floating=_float(txn, uuid))
    txn.update(found)
    return found


def defloat_interface(txn: Transaction, uuid: str) -> Interface:
    """Raises Conflict when it has none."""
    found = txn.get(Interface, uuid)
    if not found.floating:
        raise Conflict(f"interface {uuid} has no floating address")
    _unfloat(txn, found.floating)
    found = replace(found, floating="")
    txn.update(found)
    return found


def route(txn: Transaction, uuid: str, next_hop: str) -> str:
    """Take a floating address that is routed, not translated, to `next_hop` inside the network."""
    found = find_network(txn, uuid)
    hop = parse_address(next_hop)
    if hop not in IPv4Network(found.netblock):
        raise Invalid(f"{hop} is not in {found.netblock}")
    address = _float(txn, f"routed/{uuid}/{new_uuid()}")
    txn.update(replace(found, routed={**found.routed, address: str(hop)}))
    return address


def unroute(txn: Transaction, uuid: str, address: str) -> None:
    """Raises NotFound."""
    found = find_network(txn, uuid)
    if address not in found.routed:
        raise NotFound(f"{address[:80]} is not routed to network {found.name}")
    _unfloat(txn, address)
    txn.update(replace(found, routed={k: v for k, v in found.routed.items() if k != address}))


def set_dns(txn: Transaction, uuid: str, name: str, value: str | None) -> None:
    """A name that the network's DNS answers; None removes it."""
    found = find_network(txn, uuid)
    if not _DNS_NAME.fullmatch(name):
        raise Invalid(f"not a DNS name: {name[:80]!r}")
    entries = {k: v for k, v in found.dns_entries.items() if k != name}
    if value is not None:
        entries[name] = str(parse_address(value))
    elif name not in found.dns_entries:
        raise NotFound(f"network {found.name} has no DNS entry {name}")
    txn.update(replace(found, dns_entries=entries))


def addresses(txn: Transaction, network: Network) -> list[dict[str, str]]:
    """Who has what: `address, type, user, comment`."""
    pool = txn.get(Ipam, network.uuid).pool
    rows = [(pool.gateway, "gateway", "", "the network's router")]
    rows += [(address, "interface", holder, "") for address, holder in pool.held.items()]
    rows += [
        (address, "deletion-halo", "", f"free again in {until - time.time():.0f} s")
        for address, until in pool.quarantined.items()
        if until > time.time()
    ]
    rows += [(address, "reserved", "", "") for address in pool.reserved]
    return [
        {"address": str(address), "type": kind, "user": user, "comment": comment}
        for address, kind, user, comment in sorted(rows)
    ]


def move_routers(txn: Transaction, away_from: str, router_nodes: Sequence[str]) -> list[str]:
    """Give the routers of a node that is dead, drained or gone to others in turn. Returns the networks' UUIDs."""
    moved: list[str] = []
    targets = [name for name in router_nodes if name != away_from]
    for network in txn.list(Network):
        if network.state == "created" and network.router_node == away_from and targets:
            target = targets[len(moved) % len(targets)]
            txn.update(replace(network, router_node=target))
            txn.event(Network.KIND, network.uuid, f"router moved from {away_from} to {target}", type="mutate")
            moved.append(network.uuid)
    return moved


def router_candidates(txn: Transaction, usable: Collection[str]) -> list[str]:
    """Nodes that may route, those with the fewest routers first."""
    load = {n.name: 0 for n in txn.list(Node) if n.name in usable and not n.drained and n.state == "created"}
    for network in txn.list(Network):
        if network.state == "created" and network.router_node in load:
            load[network.router_node] += 1
    return sorted(load, key=lambda name: (load[name], name))


def _float(txn: Transaction, holder: str) -> str:
    known = txn.find(Ipam, FLOATING)
    if known is None:
        raise NoCapacity(
            "there is no floating pool", hint="set floating_pool and uplink in /etc/sf/config.toml"
        )
    pool, address = ipam.allocate(known.pool, holder, time.time())
    txn.update(replace(known, pool=pool))
    return str(address)


def _unfloat(txn: Transaction, address: str) -> None:
    known = txn.find(Ipam, FLOATING) if address else None
    if known is None:
        return
    holder = known.pool.held.get(IPv4Address(address), "")
    pool = ipam.release(known.pool, IPv4Address(address), holder, time.time())
    txn.update(replace(known, pool=pool))
