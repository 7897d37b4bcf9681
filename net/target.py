"""What each namespace of a node must hold: pure functions from desired state to facts."""

import hashlib
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address, IPv4Interface

from net import dnsmasq, names, nft
from net.facts import (
    HOST,
    Address,
    Facts,
    Fdb,
    Link,
    Neighbour,
    Observed,
    Proxy,
    Route,
    Sysctl,
    Table,
)
from net.ipam import TRANSIT
from net.model import Network, NodeNetworks, Port

VXLAN_OVERHEAD_BYTES = 50
"""Outer IPv4, UDP, VXLAN and inner Ethernet headers (RFC 7348)."""
_UPLINK_MTU_BYTES = 1500
_FLOOD = "00:00:00:00:00:00"
_QUIET = (
    Sysctl("net/ipv6/conf/all/disable_ipv6", "1"),
    Sysctl("net/ipv6/conf/default/disable_ipv6", "1"),
    Sysctl("net/ipv4/conf/all/send_redirects", "0"),
    Sysctl("net/ipv4/conf/default/send_redirects", "0"),
    # A namespace made after br_netfilter was loaded starts with 1: bridged packets would meet IP rules.
    Sysctl("net/bridge/bridge-nf-call-iptables", "0"),
    Sysctl("net/bridge/bridge-nf-call-arptables", "0"),
)
FORWARD = "net/ipv4/ip_forward"
SYSCTLS = (*(sysctl.key for sysctl in _QUIET), FORWARD)


def tap_name(desired: NodeNetworks, port: Port) -> str:
    return port.tap or names.tap(desired.installation, port.uuid)


def routes_here(desired: NodeNetworks, network: Network) -> bool:
    return network.router_node == desired.node


def outer_addresses(network: Network) -> list[IPv4Address]:
    """Addresses of the uplink's side that this network's router answers for."""
    own = [network.router_floating] if network.router_floating else []
    floating = [port.floating for port in network.ports if port.floating]
    return sorted({*own, *floating, *(address for address, _ in network.routed)})


def has_uplink(desired: NodeNetworks, network: Network) -> bool:
    return routes_here(desired, network) and (network.provide_nat or bool(outer_addresses(network)))


def transits(desired: NodeNetworks, observed: Observed) -> dict[int, IPv4Address]:
    """The host's end of each uplink's /31 by VNI: the one it has, else the first that nobody on this host uses."""
    taken, chosen = set(observed.host_addresses), {}
    wanting = [n.vni for n in desired.networks if has_uplink(desired, n)]
    by_dev = {a.dev: IPv4Interface(a.address) for a in sorted(observed.namespaces[HOST].addresses)}
    for vni in wanting:
        had = by_dev.get(names.host_uplink(desired.installation, vni))
        if had and had.ip in TRANSIT and had.network.prefixlen == 31 and had.ip == had.network[0]:
            chosen[vni] = had.ip
    taken |= set(chosen.values())
    count = TRANSIT.num_addresses // 2
    for vni in sorted(set(wanting) - set(chosen)):
        seed = hashlib.blake2b(names.namespace(desired.installation, vni).encode(), digest_size=4).digest()
        for step in range(count):
            address = TRANSIT[2 * ((int.from_bytes(seed, "big") + step) % count)]
            if address not in taken:
                break
        taken.add(address)
        chosen[vni] = address
    return chosen


def target(desired: NodeNetworks, observed: Observed) -> dict[str, Facts]:
    """Facts of every namespace that must be there, and of the host as far as it is ours."""
    outside = transits(desired, observed)
    wanted = {
        names.namespace(desired.installation, network.vni): _namespace(
            desired, network, outside.get(network.vni), observed
        )
        for network in desired.networks
    }
    return {HOST: _host(desired, outside, observed), **wanted}


def _namespace(
    desired: NodeNetworks, network: Network, outside: IPv4Address | None, observed: Observed
) -> Facts:
    vni, routes = network.vni, routes_here(desired, network)
    br, vx, up = names.bridge(vni), names.vxlan(vni), names.uplink(vni)
    alias = f"{names.owned(desired.installation)}network {network.uuid}"
    router_mac = names.router_mac(desired.installation, vni)
    mac = router_mac if routes else names.bridge_mac(desired.installation, vni, desired.node)
    remotes = {peer.node: str(peer.address) for peer in desired.peers if peer.node != desired.node}
    local = {tap_name(desired, port): port for port in network.ports if port.node == desired.node}
    mtu = network.mtu_bytes
    links = [
        Link(br, "bridge", alias, mtu, mac=mac),
        Link(vx, "vxlan", alias, mtu, master=br, suppress=True, vni=vni, local=str(desired.underlay)),
        *(port_link(desired, network, port) for port in local.values()),
    ]
    addresses, ways = set(), set()
    if routes:
        addresses.add(Address(br, f"{network.gateway}/{network.netblock.prefixlen}"))
        ways |= {Route(f"{address}/32", str(via), br) for address, via in network.routed}
    inside = outside + 1 if outside is not None else None
    if outside is not None:
        peer = names.host_uplink(desired.installation, vni)
        links.append(Link(up, "veth", alias, _UPLINK_MTU_BYTES, peer=peer))
        addresses.add(Address(up, f"{inside}/31"))
        ways.add(Route("0.0.0.0/0", str(outside), up))
        if network.router_floating:
            addresses.add(Address(up, f"{network.router_floating}/32"))
    fdb = {Fdb(name, port.mac) for name, port in local.items()}
    neighbours = {Neighbour(br, str(port.address), port.mac) for port in network.ports}
    elsewhere = [(port.mac, port.node) for port in network.ports if port.node != desired.node]
    if not routes:
        elsewhere.append((router_mac, network.router_node))
        if network.router_node in remotes:
            neighbours.add(Neighbour(br, str(network.gateway), router_mac))
    for remote_mac, node in elsewhere:
        if node in remotes:
            fdb |= {Fdb(vx, remote_mac), Fdb(vx, remote_mac, remotes[node]), Fdb(vx, _FLOOD, remotes[node])}
    bridge_rules = nft.ports_table(desired.installation, network, local)
    router_rules = nft.router_table(desired.installation, network, inside, routes=routes)
    serves = routes and (network.provide_dhcp or network.provide_dns)
    upstream = desired.resolvers or observed.resolvers
    return Facts(
        links={link.name: link for link in links},
        addresses=frozenset(addresses),
        routes=frozenset(ways),
        fdb=frozenset(fdb),
        neighbours=frozenset(neighbours),
        sysctls=frozenset({*_QUIET, Sysctl(FORWARD, "1" if routes else "0")}),
        tables={table.family: table for table in (bridge_rules, router_rules)},
        dnsmasq=dnsmasq.settings(network, upstream if inside else (), uplink=bool(inside))
        if serves
        else None,
    )


def port_link(desired: NodeNetworks, network: Network, port: Port) -> Link:
    """The tap of a port once it is in the network's namespace."""
    alias = f"{names.owned(desired.installation)}port {port.uuid}"
    bridge = names.bridge(network.vni)
    return Link(tap_name(desired, port), "tun", alias, network.mtu_bytes, master=bridge)


def _host(desired: NodeNetworks, outside: dict[int, IPv4Address], observed: Observed) -> Facts:
    if not desired.networks:
        return Facts()
    uplink = desired.uplink or observed.uplink
    links, addresses, ways, floating = {}, set(), set(), set[IPv4Address]()
    for network in desired.networks:
        if (end := outside.get(network.vni)) is None:
            continue
        name = names.host_uplink(desired.installation, network.vni)
        alias = f"{names.owned(desired.installation)}network {network.uuid}"
        links[name] = Link(name, "veth", alias, _UPLINK_MTU_BYTES)
        addresses.add(Address(name, f"{end}/31"))
        outer = outer_addresses(network)
        ways |= {Route(f"{address}/32", str(end + 1), name) for address in outer}
        floating |= set(outer)
    nodes = sorted({desired.underlay, *(peer.address for peer in desired.peers)})
    nodes = [address for address in nodes if not address.is_loopback]
    peers = sorted({peer.address for peer in desired.peers if peer.node != desired.node})
    return Facts(
        links=links,
        addresses=frozenset(addresses),
        routes=frozenset(ways),
        proxies=frozenset(Proxy(uplink, str(address)) for address in floating if uplink),
        sysctls=frozenset({Sysctl(FORWARD, "1")} if links else ()),
        tables={"inet": _host_table(desired, nodes, list(outside.values()), floating, observed)},
        admissions=nft.admissions(desired.installation, observed.foreign, peers, uplinks=bool(links)),
    )


def _host_table(
    desired: NodeNetworks,
    nodes: list[IPv4Address],
    outside: list[IPv4Address],
    floating: Collection[IPv4Address],
    observed: Observed,
) -> Table:
    return nft.host_table(
        desired.installation,
        sorted(network.vni for network in desired.networks),
        nodes,
        sorted(set(desired.resolvers or observed.resolvers)),
        sorted(address + 1 for address in outside),
        sorted(floating),
    )


def without_routers(observed: Observed) -> dict[str, Facts]:
    """The observed state less everything by which this node routes: what a node does that lost its lease."""
    return {name: _unrouted(name, facts) for name, facts in observed.namespaces.items()}


def _unrouted(name: str, facts: Facts) -> Facts:
    links = {n: link for n, link in facts.links.items() if link.kind != "veth"}
    if name == HOST:
        return Facts(links, sysctls=facts.sysctls, tables=facts.tables, admissions=facts.admissions)
    return Facts(
        links=links,
        fdb=facts.fdb,
        neighbours=facts.neighbours,
        sysctls=facts.sysctls,
        tables=facts.tables,
        broken=facts.broken,
    )


def too_large(desired: NodeNetworks, observed: Observed) -> list[Network]:
    """Networks that are not here yet and whose packets the mesh's underlay cannot carry."""
    if not observed.mtu_bytes or all(peer.node == desired.node for peer in desired.peers):
        return []
    limit = observed.mtu_bytes - VXLAN_OVERHEAD_BYTES
    return [
        network
        for network in desired.networks
        if network.mtu_bytes > limit
        and names.namespace(desired.installation, network.vni) not in observed.namespaces
    ]


def local_ports(desired: NodeNetworks) -> Iterator[tuple[Network, Port]]:
    for network in desired.networks:
        for port in network.ports:
            if port.node == desired.node:
                yield network, port
