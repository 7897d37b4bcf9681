"""What each namespace of a node must hold: pure functions from desired state to facts."""

import hashlib
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Network

from net.ipam import TRANSIT
from net.plan import dhcp, guards, names, nft
from net.plan.facts import HOST, Entry, Facts, Kind, Link, Observed, sysctl
from net.plan.model import Network, NodeNetworks, Port

VXLAN_OVERHEAD_BYTES = 50  # outer IPv4, UDP, VXLAN and inner Ethernet headers (RFC 7348)
_UPLINK_MTU_BYTES = 1500
_FLOOD = "00:00:00:00:00:00"
FORWARD = "net/ipv4/ip_forward"
BRIDGED = "net/bridge/bridge-nf-call-iptables"
_QUIET = {
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    # A namespace made after br_netfilter was loaded starts with 1: bridged packets would meet IP rules.
    BRIDGED: "0",
    "net/bridge/bridge-nf-call-arptables": "0",
}
FORWARD6 = "net/ipv6/conf/all/forwarding"
SYSCTLS = (*_QUIET, FORWARD, FORWARD6)


def tap_name(desired: NodeNetworks, port: Port) -> str:
    return port.tap or names.tap(desired.installation, port.uuid)


def routes_here(desired: NodeNetworks, network: Network) -> bool:
    return network.router_node == desired.node


def is_meshed(desired: NodeNetworks) -> bool:
    """Whether there is any other node; the list of peers may hold this one or not."""
    return any(peer.node != desired.node for peer in desired.peers)


def outer_addresses(network: Network) -> list[IPv4Address]:
    """Addresses of the uplink's side that this network's router answers for."""
    own = [network.router_floating] if network.router_floating else []
    floating = [port.floating for port in network.ports if port.floating]
    return sorted({*own, *floating, *(address for address, _ in network.routed)})


def has_uplink(desired: NodeNetworks, network: Network) -> bool:
    leads = network.provide_nat or bool(outer_addresses(network)) or any(p.published for p in network.ports)
    return routes_here(desired, network) and (leads or network.routed6)


def has_uplink6(desired: NodeNetworks, network: Network, observed: Observed) -> bool:
    leads = network.routed6 or bool(network.netblock6 and network.provide_nat)
    return leads and observed.uplink6 and has_uplink(desired, network)


def sysctls6(dev: str, *, on: bool) -> set[Entry]:
    """IPv6 on one device, with the addresses that we give it alone (IN6_ADDR_GEN_MODE_NONE)."""
    at = f"net/ipv6/conf/{dev}"
    return {sysctl(f"{at}/addr_gen_mode", "1"), sysctl(f"{at}/disable_ipv6", "0" if on else "1")}


def _end6(dev: str, own: IPv6Address, to: IPv6Network | str, via: IPv6Address, *, on: bool) -> set[Entry]:
    """One end of an uplink, on link-local addresses."""
    ways = {Entry(Kind.ADDRESS, dev, f"{own}/64"), Entry(Kind.ROUTE, dev, str(to), str(via))}
    return sysctls6(dev, on=on) | (ways if on else set())


def published(
    desired: NodeNetworks, observed: Observed
) -> tuple[dict[tuple[str, int], tuple[int, str]], list[str]]:
    """(protocol, port) of this node that lead to guests, with the VNI and the guest's end by IPv6; and those, in words,
    where a server listens.

    What led to a guest before goes on: whoever listens there later gets nothing of it.
    """
    table = observed.namespaces[HOST].tables.get("inet")
    held = table.elements.get(nft.PUBLISHED) if table else None
    had = {element for element, _ in held.items} if held else set()
    chosen, refused = dict[tuple[str, int], tuple[int, str]](), []
    for network in (network for network in desired.networks if routes_here(desired, network)):
        for port, e, step in network.led():
            key = e.protocol, e.port + step
            if key in observed.listening and nft.key_of(*key) not in had:
                refused.append(
                    f"port {key[1]}/{key[0]} is not published: a server of this node listens there"
                )
            else:
                chosen[key] = network.vni, f"{network.address6(port.address)} . {e.to_port + step}"
    return chosen, refused


def transits(desired: NodeNetworks, observed: Observed) -> dict[int, IPv4Address]:
    """The host's end of each uplink's /31 by VNI: the one it has, else the first that nobody on this host uses."""
    taken, chosen = set(observed.host_addresses), {}
    wanting = [n.vni for n in desired.networks if has_uplink(desired, n)]
    entries = observed.namespaces[HOST].entries
    every = (e for e in sorted(entries) if e.kind is Kind.ADDRESS and ":" not in e.key)
    by_dev = {e.dev: IPv4Interface(e.key) for e in every}
    for vni in wanting:
        had = by_dev.get(names.host_uplink(desired.installation, vni))
        if had and had.ip in TRANSIT and had.network.prefixlen == 31 and had.ip == had.network[0]:
            chosen[vni] = had.ip
    taken |= set(chosen.values())
    count = TRANSIT.num_addresses // 2
    for vni in sorted(set(wanting) - set(chosen)):
        seed = hashlib.blake2b(names.namespace(desired.installation, vni).encode(), digest_size=4).digest()
        first = int.from_bytes(seed, "big")
        ends = (TRANSIT[2 * ((first + step) % count)] for step in range(count))
        chosen[vni] = next((address for address in ends if address not in taken), TRANSIT[0])
        taken.add(chosen[vni])
    return chosen


def target(desired: NodeNetworks, observed: Observed) -> dict[str, Facts]:
    """Facts of every namespace that must be there, and of the host as far as it is ours."""
    outside = transits(desired, observed)
    wanted = {HOST: _host(desired, outside, observed)}
    for network in (network for network in desired.networks if not network.bridge):
        name = names.namespace(desired.installation, network.vni)
        wanted[name] = _namespace(desired, network, outside.get(network.vni), observed)
    return wanted


def _namespace(
    desired: NodeNetworks, network: Network, outside: IPv4Address | None, observed: Observed
) -> Facts:
    vni, routes = network.vni, routes_here(desired, network)
    br, vx, up = names.bridge(vni), names.vxlan(vni), names.uplink(vni)
    alias = f"{names.table(desired.installation)} network {network.uuid}"
    router_mac = names.router_mac(desired.installation, vni)
    mac = router_mac if routes else names.bridge_mac(desired.installation, vni, desired.node)
    # Records of version 0.1 may have a port with a MAC of the network's own: it gets nothing.
    nodes = {desired.node, *(peer.node for peer in desired.peers)}
    own = names.own_macs(desired.installation, vni, nodes)
    network = replace(network, ports=tuple(port for port in network.ports if port.mac not in own))
    if network.mtu_bytes < 1280:  # the kernel speaks no IPv6 there (RFC 8200)
        network = replace(network, netblock6=None)
    six = has_uplink6(desired, network, observed)
    remotes = {peer.node: str(peer.address) for peer in desired.peers if peer.node != desired.node}
    local = {tap_name(desired, port): port for port in network.ports if port.node == desired.node}
    # Also who looks for duplicates (RFC 4862) would be answered: by it nodes learn who has which address.
    mtu, quiet = network.mtu_bytes, not network.netblock6
    links = [
        Link(br, "bridge", alias, mtu, mac=mac),
        Link(vx, "vxlan", alias, mtu, master=br, suppress=quiet, vni=vni, local=str(desired.underlay)),
        *(port_link(desired, network, port) for port in local.values()),
    ]
    entries = {Entry(Kind.SYSCTL, "", key, value) for key, value in _QUIET.items()}
    entries.add(Entry(Kind.SYSCTL, "", FORWARD, "1" if routes else "0"))
    if routes and network.four:
        entries.add(Entry(Kind.ADDRESS, br, f"{network.gateway}/{network.netblock.prefixlen}"))
        entries |= {Entry(Kind.ROUTE, br, f"{address}/32", str(via)) for address, via in network.routed}
    if network.netblock6:
        entries |= {sysctl(FORWARD6, "1" if routes else "0"), *sysctls6(br, on=routes)}
    if network.netblock6 and routes:
        given = (guards.ROUTER, network.address6(network.gateway))
        entries |= {Entry(Kind.ADDRESS, br, f"{address}/64") for address in given}
        own6 = ((network.address6(port.address), port.mac) for port in network.ports)
        entries |= {Entry(Kind.NEIGHBOUR, br, str(address), mac) for address, mac in own6}
    inside = outside + 1 if outside is not None else None
    if outside is not None:
        peer = names.host_uplink(desired.installation, vni)
        links.append(Link(up, "veth", alias, _UPLINK_MTU_BYTES, peer=peer))
        entries |= {Entry(Kind.ADDRESS, up, f"{inside}/31"), Entry(Kind.ROUTE, up, "0.0.0.0/0", str(outside))}
        if network.router_floating:
            entries.add(Entry(Kind.ADDRESS, up, f"{network.router_floating}/32"))
        if network.netblock6:
            entries |= _end6(up, guards.INSIDE, "::/0", guards.ROUTER, on=six)
    # The bridge's own: the kernel made it with the bridge, and forgets it when it was a port's meanwhile.
    entries.add(Entry(Kind.FDB, br, mac))
    entries |= {Entry(Kind.FDB, name, port.mac) for name, port in local.items()}
    four = network.ports if network.four else ()
    entries |= {Entry(Kind.NEIGHBOUR, br, str(port.address), port.mac) for port in four}
    elsewhere = [(port.mac, port.node) for port in network.ports if port.node != desired.node]
    if not routes:
        elsewhere.append((router_mac, network.router_node))
        if network.router_node in remotes and network.four:
            entries.add(Entry(Kind.NEIGHBOUR, br, str(network.gateway), router_mac))
    for remote_mac, remote in ((m, remotes[node]) for m, node in elsewhere if node in remotes):
        entries |= {Entry(Kind.FDB, vx, remote_mac), Entry(Kind.FDB, vx, remote_mac, remote)}
        entries.add(Entry(Kind.FDB, vx, _FLOOD, remote))
    pinned = {tap: (network, port) for tap, port in local.items()}
    bridge_rules = nft.ports_table(desired.installation, pinned)
    router_rules = nft.router_table(desired.installation, network, inside, routes=routes, six=six)
    serves = routes and (network.provide_dhcp or network.provide_dns)
    upstream = (desired.resolvers or observed.resolvers) if inside else ()
    served = dhcp.settings(network, upstream, uplink=bool(inside), six=six) if serves else None
    return Facts(
        links={link.name: link for link in links},
        entries=frozenset(entries),
        tables={table.family: table for table in (bridge_rules, router_rules)},
        dnsmasq=served,
    )


def port_link(desired: NodeNetworks, network: Network, port: Port) -> Link:
    """The tap of a port once it is in the network's namespace."""
    alias = f"{names.table(desired.installation)} port {port.uuid}"
    name = tap_name(desired, port)
    if network.bridge:
        # A bridge without a MAC of its own has the lowest of its ports': never ours.
        mac = f"fe{port.mac[2:]}"
        return Link(name, "tun", alias, network.mtu_bytes, mac=mac, master=network.bridge, learning=True)
    return Link(name, "tun", alias, network.mtu_bytes, master=names.bridge(network.vni))


def on_lan(desired: NodeNetworks) -> dict[str, tuple[Network, Port]]:
    """By tap, the ports of this node on its own bridges."""
    every = ((network, port) for network in desired.networks if network.bridge for port in network.ports)
    return {tap_name(desired, port): (n, port) for n, port in every if port.node == desired.node}


def _host(desired: NodeNetworks, outside: dict[int, IPv4Address], observed: Observed) -> Facts:
    lan, links, tables = on_lan(desired), dict[str, Link](), {}
    for tap, (network, port) in lan.items():
        # As large as the bridge is: a port changes a bridge's MTU. Without one it is down.
        mtu = observed.bridges.get(network.bridge, 0)
        link = port_link(desired, replace(network, mtu_bytes=mtu or network.mtu_bytes), port)
        links[tap] = link if mtu else replace(link, up=False, master="", learning=False)
    if lan or any(link.master and link.carrier for link in observed.namespaces[HOST].links.values()):
        tables["bridge"] = nft.ports_table(desired.installation, lan)
    if all(network.bridge for network in desired.networks):
        return Facts(links, tables=tables)
    uplink = desired.uplink or observed.uplink
    entries, floating, blocks6 = set[Entry](), set[IPv4Address](), dict[int, IPv6Network]()
    for network in (network for network in desired.networks if network.vni in outside):
        name, end = names.host_uplink(desired.installation, network.vni), outside[network.vni]
        alias = f"{names.table(desired.installation)} network {network.uuid}"
        links[name] = Link(name, "veth", alias, _UPLINK_MTU_BYTES)
        entries.add(Entry(Kind.ADDRESS, name, f"{end}/31"))
        if block := network.netblock6:
            six = has_uplink6(desired, network, observed)
            entries |= _end6(name, guards.ROUTER, block, guards.INSIDE, on=six)
            blocks6 |= {network.vni: block} if six else {}
        for address in outer_addresses(network):
            floating.add(address)
            entries.add(Entry(Kind.ROUTE, name, f"{address}/32", str(end + 1)))
            if uplink:
                entries.add(Entry(Kind.PROXY, uplink, str(address)))
    if outside:
        entries.add(Entry(Kind.SYSCTL, "", FORWARD, "1"))
    peers = sorted({peer.address for peer in desired.peers if peer.node != desired.node})
    led, resolvers = published(desired, observed)[0], desired.resolvers or observed.resolvers
    tables["inet"] = nft.host_table(desired, resolvers, outside, floating, led, blocks6)
    families = [*(("ip", "inet") if outside else ()), *(("ip6",) if blocks6 else ())]
    admissions = nft.admissions(desired.installation, observed.foreign, peers, families)
    return Facts(links, frozenset(entries), tables, admissions)


def without_routers(observed: Observed) -> dict[str, Facts]:
    """The observed state less everything by which this node routes: what a node does that lost its lease."""
    found = {}
    for name, facts in observed.namespaces.items():
        links = {n: link for n, link in facts.links.items() if link.kind != "veth"}
        kept = {Kind.SYSCTL} if name == HOST else {Kind.SYSCTL, Kind.FDB, Kind.NEIGHBOUR}
        entries = frozenset(entry for entry in facts.entries if entry.kind in kept)
        found[name] = replace(facts, links=links, entries=entries, dnsmasq=None)
    return found


def unfit(desired: NodeNetworks, observed: Observed, network: Network) -> tuple[str, str]:
    """Why this node cannot be what it should be for a network, and what to do; "" where it can."""
    if network.bridge:
        text = f"there is no bridge {network.bridge} here: guests of {network.name} are unplugged"
        return ("", "") if network.bridge in observed.bridges else (text, "make the bridge; sf never does")
    room = observed.mtu_bytes - VXLAN_OVERHEAD_BYTES
    if not observed.mtu_bytes or not is_meshed(desired) or network.mtu_bytes <= room:
        return "", ""
    larger = (
        f"raise the MTU of the device with {desired.underlay} to {network.mtu_bytes + VXLAN_OVERHEAD_BYTES}"
    )
    return f"packets of {network.mtu_bytes} bytes do not fit the mesh, which carries {room}", larger
