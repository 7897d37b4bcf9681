"""Networks: their records, and what may be done to them."""

import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network
from typing import Any, ClassVar

from compute.cluster.records.addresses import (
    FLOATING,
    Ipam,
    give_back_floating,
    parse_address,
    parse_any,
    take_floating,
)
from compute.cluster.records.epochs import check
from compute.cluster.records.taken import Taken, take, take_name
from compute.cluster.records.transaction import Stored, Transaction, check_name, new_uuid
from compute.errors import Conflict, Invalid, NoCapacity, NotFound, NotReady, Unavailable
from net import ipam

_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_NAME = re.compile(rf"{_LABEL}(\.{_LABEL}){{0,7}}\.?", re.IGNORECASE)
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
_MAX_DNS_ENTRIES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Network(Stored):
    KIND: ClassVar[str] = "network"
    uuid: str
    name: str
    namespace: str
    netblock: str  # that of ipam.UNKNOWN where it has IPv6 alone
    vni: int
    provide_dhcp: bool = True
    provide_nat: bool = True
    provide_dns: bool = True
    router_node: str = ""
    router_floating: str = ""
    routed: dict[str, str] = field(default_factory=dict)  # routed address → next hop inside the network
    dns_entries: dict[str, str] = field(default_factory=dict)
    bridge: str = ""  # the nodes' own bridge that its guests are on: no router, no tunnel, no server of ours
    gateway: str = ""  # the router of the LAN; "" is the first address of the block
    isolated: bool = False
    netblock6: str = ""  # its /64, which no other network has; "" without IPv6
    slaac: bool = False  # guests choose addresses out of it, too; who has one first keeps it
    state: str = "created"
    created_s: float = 0
    deleted_s: float = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def six_alone(self) -> bool:
        return self.netblock == str(ipam.UNKNOWN)

    @property
    def block6(self) -> IPv6Network | None:
        return IPv6Network(self.netblock6) if self.netblock6 else None


def find_network(txn: Transaction, uuid: str) -> Network:
    """A network that is not deleted. Raises NotFound."""
    found = txn.get(Network, uuid)
    if found.state == "deleted":
        raise NotFound(f"network {uuid} not found", hint="see: sf network ls")
    return found


def find_routed(txn: Transaction, uuid: str) -> Network:
    """One that has a router of ours. Raises Conflict as well."""
    found = find_network(txn, uuid)
    if found.bridge:
        hint = "its guests are reached there, at their own addresses"
        raise Conflict(
            f"network {found.name} is the LAN of {found.bridge}, which sf does not route", hint=hint
        )
    return found


def routing(network: Network) -> str:
    """The node that routes it. Raises Unavailable."""
    if not network.router_node:
        raise Unavailable(f"network {network.name} has no router at this moment")
    return network.router_node


def find_four(txn: Transaction, uuid: str) -> Network:
    """One that has IPv4 as well. Raises Conflict."""
    found = find_routed(txn, uuid)
    if found.six_alone:
        raise Conflict(f"network {found.name} has IPv6 alone, the floating pool IPv4", hint="publish ports")
    return found


def _lan(network: Network, chosen: str) -> tuple[Network, ipam.Pool]:
    """On a LAN: what is ours to hand out of it, `A-B`, by config drive; else its own DHCP server gives addresses."""
    if not _DEVICE.fullmatch(network.bridge):
        raise Invalid(
            f"no bridge is called {network.bridge[:80]!r}", hint="sf network create NAME --bridge br0"
        )
    if bool(chosen) != bool(network.netblock):
        raise Invalid(
            "a network on a LAN has both a netblock and a range of it, or neither", hint="--range A-B"
        )
    network = replace(network, provide_dhcp=not chosen, provide_dns=bool(chosen), provide_nat=False)
    if not chosen:
        return replace(network, gateway=""), ipam.Pool.of(ipam.ANY)
    block = ipam.check_netblock(network.netblock)
    gateway = parse_address(network.gateway) if network.gateway else block[1]
    first, last = (parse_address(chosen.partition("-")[at]) for at in (0, 2))
    if not (block[0] < min(first, gateway) and first <= last and max(last, gateway) < block[-1]):
        hint = "for example 192.168.1.200-192.168.1.220"
        raise Invalid(f"{chosen[:80]} or {gateway} is not within {block}", hint=hint)
    return replace(network, gateway=str(gateway)), ipam.Pool(block, gateway, first=first, last=last)


def create_network(
    txn: Transaction,
    network: Network,
    *,
    excluded: Collection[IPv4Network],
    router_nodes: Sequence[str],
    chosen: str = "",
) -> Network:
    """Check, give it a VNI, a pool and a router. `vni` and `router_node` of the argument do not count.

    router_nodes: who may route, best first. chosen: of a LAN, what may be handed out. Raises Conflict, net's Invalid
    and Exhausted.
    """
    check(txn)
    check_name(network.name, "network name")
    if network.slaac and not (network.netblock6 and network.provide_dhcp):
        raise Invalid("SLAAC needs IPv6 and a router that advertises it", hint="with ipv6, and with DHCP")
    if network.bridge:
        network, pool = _lan(network, chosen)
    elif network.netblock6 and not network.netblock:
        pool = ipam.Pool.of(ipam.UNKNOWN)
    else:
        pool = ipam.Pool.of(ipam.check_netblock(network.netblock, excluded))
    take_name(txn, Network.KIND, network.namespace, network.name, network.uuid)
    if network.netblock6:
        if txn.find(Taken, f"netblock6/{network.netblock6}"):
            raise Conflict(f"{network.netblock6} is another network's", hint="auto chooses one")
        take(txn, f"netblock6/{network.netblock6}", network.uuid)
    vni = ipam.random_vni({int(taken.name.removeprefix("vni/")) for taken in txn.list(Taken, "vni/")})
    network = replace(
        network,
        netblock=str(pool.netblock),
        vni=vni,
        router_node="" if network.bridge else next(iter(router_nodes), ""),
        created_s=time.time(),
    )
    take(txn, f"vni/{vni}", network.uuid)
    txn.create(Ipam(name=network.uuid, pool=pool))
    if network.provide_nat and not network.six_alone and txn.find(Ipam, FLOATING) is not None:
        network = replace(network, router_floating=take_floating(txn, f"router/{network.uuid}"))
    where = f"on {network.bridge}" if network.bridge else f"with VNI {vni}"
    block = network.netblock6 if network.six_alone else network.netblock
    txn.event(Network.KIND, network.uuid, f"created as {block} {where}", type="audit")
    return txn.create(network)


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
        give_back_floating(txn, floating)
    txn.delete(Ipam, uuid)
    txn.delete(Taken, f"vni/{found.vni}")
    if found.netblock6:
        txn.delete(Taken, f"netblock6/{found.netblock6}")
    txn.delete(Taken, f"{Network.KIND}/{found.namespace}/{found.name}")
    found = replace(
        found, state="deleted", deleted_s=time.time(), router_node="", router_floating="", routed={}
    )
    txn.event(Network.KIND, uuid, "deleted", type="audit")
    return txn.update(found)


def route(txn: Transaction, uuid: str, next_hop: str) -> str:
    """Take a floating address that is routed, not translated, to `next_hop` inside the network."""
    found = find_four(txn, uuid)
    hop = parse_address(next_hop)
    if hop not in IPv4Network(found.netblock):
        raise Invalid(f"{hop} is not in {found.netblock}")
    address = take_floating(txn, f"routed/{uuid}/{new_uuid()}")
    txn.update(replace(found, routed={**found.routed, address: str(hop)}))
    return address


def unroute(txn: Transaction, uuid: str, address: str) -> None:
    """Raises NotFound."""
    found = find_network(txn, uuid)
    if address not in found.routed:
        raise NotFound(f"{address[:80]} is not routed to network {found.name}")
    give_back_floating(txn, address)
    txn.update(replace(found, routed={k: v for k, v in found.routed.items() if k != address}))


def check_dns_name(name: str) -> None:
    """Raises Invalid."""
    if len(name) > 253 or not _DNS_NAME.fullmatch(name):
        raise Invalid(f"not a DNS name: {name[:80]!r}", hint="1 to 8 labels of letters, digits, dashes")


def set_dns(txn: Transaction, uuid: str, name: str, value: str | None) -> None:
    """A name that the network's DNS answers; None removes it. Raises NotReady where there is no DNS."""
    found = find_routed(txn, uuid)
    check_dns_name(name)
    if not found.provide_dns:
        raise NotReady(f"network {found.name} has no DNS", hint="make one without provide_dns: false")
    entries = {k: v for k, v in found.dns_entries.items() if k != name}
    if value is not None:
        entries[name] = parse_any(value)
    elif name not in found.dns_entries:
        raise NotFound(f"network {found.name} has no DNS entry {name}")
    if len(entries) > _MAX_DNS_ENTRIES:
        raise NoCapacity(f"network {found.name} has {_MAX_DNS_ENTRIES} DNS entries already")
    txn.update(replace(found, dns_entries=entries))


def addresses(txn: Transaction, network: Network) -> list[dict[str, str]]:
    """Who has what: `address, address6, type, user, comment`. Without IPv4 the first one counts only."""
    pool = txn.get(Ipam, network.uuid).pool
    rows = [(pool.gateway, "gateway", "", "the network's router")]
    rows += [(address, "interface", holder, "") for address, holder in pool.held.items()]
    rows += [
        (address, "deletion-halo", "", f"free again in {until - time.time():.0f} s")
        for address, until in pool.quarantined.items()
        if until > time.time()
    ]
    rows += [(address, "reserved", "", "") for address in pool.reserved]
    six = {row[0]: str(ipam.beside(pool.netblock, network.block6, row[0]) or "") for row in rows}
    return [
        {"address": str(address), "address6": six[address], "type": kind, "user": user, "comment": comment}
        for address, kind, user, comment in sorted(rows)
    ]
