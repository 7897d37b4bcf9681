"""Firewall rules as values: what our tables must hold.

Everything here is pure; net/plan/ruleset.py makes text of it. Three tables, all named after the installation:

    bridge  in each network's namespace: a chain per tap that pins the guest to its addresses
    inet    in each network's namespace: the router's filter and NAT
    inet    in the host's namespace: what uplinks may reach, NAT to the world, who may send us VXLAN
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network

from net.ipam import LOCAL6, UNKNOWN
from net.plan import guards, names, rules
from net.plan.facts import Admission, Chain, Elements, Hook, Rule, Table
from net.plan.model import Network, NodeNetworks, Port
from net.plan.names import VXLAN_PORT

REASONS = ("mac", "arp", "ipv4", "ipv6", "dhcp", "ra", "vxlan", "other", "rules", "limit")
"""Why a guest's frame was dropped: one counter each per tap."""

TAPS, FROM, TO = "taps", "from", "to"
"""Maps of a tap to the chains that its guest's frames go through, and to the one for frames that go to the guest."""
LEARNED = "learned"  # (MAC, address) that a LAN's DHCP server was seen to give
FLOATING = "floating"
PUBLISHED = "published"
_IP, _ARP = "@nh,96,32", "@nh,112,32"
_NEEDED6 = "{ echo-request, nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }"
_UNREACHABLE = "{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 }"


def _chain(name: str, hook: Hook | None, rules: Iterable[str]) -> tuple[str, Chain]:
    return name, Chain(name, hook, tuple(map(Rule.of, rules)))


def braces(values: Iterable[object]) -> str:
    return "{ " + ", ".join(map(str, values)) + " }"


def _map(pairs: Iterable[tuple[object, object]]) -> str:
    return "{ " + ", ".join(f"{key} : {value}" for key, value in pairs) + " }"


def key_of(protocol: str, port: int) -> str:
    """An element of PUBLISHED."""
    return f"{protocol} . {port}"


def link_local(mac: str) -> IPv6Address:
    """The EUI-64 address that a guest makes from its MAC (RFC 4291, appendix A)."""
    octets = bytearray.fromhex(mac.replace(":", ""))
    octets[0] ^= 2
    return IPv6Address(bytes.fromhex("fe80000000000000") + octets[:3] + b"\xff\xfe" + octets[3:])


def _pinned(tap: str, network: Network, port: Port) -> Iterator[str]:
    def drop(match: str, reason: str) -> str:
        return f'{match} counter name "{tap}-{reason}" drop'

    mac, addresses, own6 = port.mac, _allowed(network, port), network.address6(port.address)
    own, local = braces(addresses) if addresses else f"@{LEARNED}", link_local(mac)
    block = network.netblock6 if network.slaac else None
    # nft 1.0.6 has no name for what is read out of a DHCP answer, so what is compared with that has none either.
    ip, sender = (
        ("ip saddr", "arp saddr ip") if addresses else (f"ether saddr . {_IP}", f"ether saddr . {_ARP}")
    )
    yield drop(f"ether saddr != {mac}", "mac")
    yield from _limited(tap, port.limits.bytes_out, port.limits.packets_out)
    if not network.four:
        yield drop("ether type != ip6", "other")
        yield from guards.pinned(drop, tap, mac, own6, local, block) if own6 else ("drop",)
        return
    # The way of nearly every packet; DHCP and VXLAN are UDP. A tagged frame has another type.
    yield f"ether type ip {ip} {own} ip protocol != udp accept"
    yield drop("ether type { 8021q, 8021ad }", "other")
    # The sender address 0.0.0.0 is a probe for a duplicate (RFC 5227).
    whole = f"ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp saddr ether {mac}"
    yield f"{whole} arp saddr ip {IPv4Address(0)} accept"
    yield f"{whole} {sender} {own} accept"
    yield drop("ether type arp", "arp")
    # A DHCP server goes by the MAC inside the message (RFC 2131, chaddr: byte 36 behind the start of the UDP header),
    # so it must be the sender's own. A fragment that ends before it is not accepted.
    asks = f"udp sport 68 udp dport 67 @th,288,48 0x{mac.replace(':', '')}"
    yield f"ether type ip ip saddr 0.0.0.0 ip daddr 255.255.255.255 {asks} accept"
    yield f"ether type ip {ip} {own} {asks} accept"
    yield drop("ether type ip udp dport 67", "dhcp")
    yield drop(f"ether type ip {ip} != {own}", "ipv4")
    yield drop("ether type ip udp sport 67", "dhcp")
    yield drop(f"ether type ip udp dport {VXLAN_PORT}", "vxlan")
    yield "ether type ip accept"
    if own6:
        yield drop("ether type != ip6", "other")
        yield from guards.pinned(drop, tap, mac, own6, local, block)
        return
    yield drop(f"ether type ip6 ip6 saddr != {braces(['::', local])}", "ipv6")
    yield drop("ether type ip6 icmpv6 type { nd-router-advert, nd-redirect }", "ra")
    # nft before 1.0.8 has no word for the target address of a neighbour advertisement.
    yield drop(f"ether type ip6 icmpv6 type nd-neighbor-advert @th,64,128 != 0x{int(local):032x}", "ipv6")
    yield drop("ether type ip6 udp sport 547", "dhcp")
    yield drop(f"ether type ip6 udp dport {VXLAN_PORT}", "vxlan")
    yield "ether type ip6 accept"
    yield f'counter name "{tap}-other" drop'


def _limited(tap: str, rate_bytes: int, rate_packets: int) -> Iterator[str]:
    """What is too much is dropped; a tenth of a second's may come at once, and one packet that the card will cut up."""
    drop = f'counter name "{tap}-limit" drop'
    if rate_bytes:
        yield f"limit rate over {rate_bytes} bytes/second burst {max(rate_bytes // 10, 1 << 17)} bytes {drop}"
    if rate_packets:
        yield f"limit rate over {rate_packets}/second burst {max(rate_packets // 10, 5)} packets {drop}"


def _allowed(network: Network, port: Port) -> list[IPv4Address]:
    """None: those that a DHCP server on the LAN's side was seen to give."""
    if port.address in UNKNOWN:
        return []
    return [port.address, *(address for address, via in network.routed if via == port.address)]


def _sent(tap: str, network: Network, port: Port, router_mac: str) -> Iterator[str]:
    """What is done with frames that go to a guest. An answer's type is its first option (RFC 2132) in all servers.
    Router advertisements of `router_mac` pass."""
    yield from _limited(tap, port.limits.bytes_in, port.limits.packets_in)
    if port.address in UNKNOWN and not router_mac:
        # The address that is given, and the MAC it is given to, lie 24 and 36 bytes behind the start of the UDP header.
        mac = f"@th,64,8 2 @th,288,48 0x{port.mac.replace(':', '')} @th,1984,24 0x350105"
        yield f"udp sport 67 udp dport 68 {mac} update @{LEARNED} {{ {port.mac} . @th,192,32 }}"
    # Guests have no IPv6 address that a filter could know but their link-local one.
    yield f"{f'ether saddr != {router_mac} ' if router_mac else ''}icmpv6 type nd-router-advert drop"
    if port.allowed is not None:
        server = "" if network.bridge else f"ip saddr {network.gateway} "
        yield from rules.admitted(tap, port, server, six=bool(router_mac))


def ports_table(installation: str, local: Mapping[str, tuple[Network, Port]]) -> Table:
    """The bridge family's table: `local` has a port by its tap's name. A tap without a chain passes nothing."""
    macs = {n.vni: names.router_mac(installation, n.vni) for n, _ in local.values() if n.netblock6}
    blocks = {n.vni: n.netblock6 if n.slaac else None for n, _ in local.values()}
    six = bool(macs)
    dispatch = ["iifname vmap @taps", f'iifname "{names.TAP_PREFIX}*" drop']
    dispatch += [rule for vni in sorted(macs) for rule in guards.meshed(names.vxlan(vni), blocks[vni])]
    chains = [_chain("ports", Hook("filter", "prerouting", -300), dispatch)]
    chains.append(_chain("to", Hook("filter", "postrouting", 0), [f"oifname vmap @{TO}"]))
    chains += [_chain(f"p-{tap}", None, _pinned(tap, *at)) for tap, at in local.items()]
    chains += [
        _chain(f"t-{tap}", None, _sent(tap, n, port, macs.get(n.vni, ""))) for tap, (n, port) in local.items()
    ]
    held = {tap: port for tap, (_, port) in local.items() if port.allowed is not None}
    chains.append(_chain("from", Hook("filter", "prerouting", -250), [f"iifname vmap @{FROM}"]))
    chains += [_chain(f"f-{tap}", None, rules.tracked(tap, port, six=six)) for tap, port in held.items()]
    at = f"bridge {names.table(installation)}"
    elements = {
        name: Elements(
            f"map {at} {name} {{ type ifname : verdict ; }}",
            frozenset((tap, f"goto {p}-{tap}") for tap in taps),
        )
        for name, p, taps in ((TAPS, "p", local), (FROM, "f", held), (TO, "t", local))
    }
    if any(n.four and port.address in UNKNOWN for n, port in local.values()):
        kept = "flags dynamic,timeout ; size 65535 ; timeout 30d ;"
        elements[LEARNED] = Elements(f"set {at} {LEARNED} {{ typeof ether saddr . {_IP} ; {kept} }}")
    for tap in held:
        elements |= rules.flows(at, tap, six=six)
    elements |= guards.sets(at, local) if six else {}
    counters = frozenset(f"{tap}-{reason}" for tap in local for reason in REASONS)
    return Table("bridge", names.table(installation), dict(chains), elements, counters)


def router_table(
    installation: str, network: Network, inside: IPv4Address | None, *, routes: bool, six: bool = False
) -> Table:
    """The inet table of a network's namespace: the router's where `routes`, else one that lets nothing in.

    `inside` is the namespace's end of the uplink, None without one. `six`: whether it carries IPv6.
    """
    br, up, block = names.bridge(network.vni), names.uplink(network.vni), network.netblock
    floating = sorted((p.address, p.floating) for p in network.ports if p.floating)
    routed = sorted(address for address, _ in network.routed)
    entry = ["ct state established,related accept", 'iifname "lo" accept']
    # Bridged frames come by here too where bridge-nf-call-iptables is on; the bridge's own table judged them.
    through = [
        "tcp flags syn tcp option maxseg size set rt mtu",
        "ct state established,related accept",
        f'iifname "{br}" oifname "{br}" accept',
    ]
    before, after = [], []
    if routes:
        entry.append("icmp type echo-request accept")
        if network.provide_dhcp:
            entry.append(f'iifname "{br}" udp dport 67 accept')
        if network.provide_dns:
            entry.append(f'iifname "{br}" meta l4proto {{ tcp, udp }} th dport 53 accept')
    if routes and network.netblock6:
        entry.append(f"icmpv6 type {_NEEDED6} accept")
        if network.provide_dhcp:
            entry.append(f'iifname "{br}" udp dport 547 accept')
        if six:
            through.append(f'iifname "{br}" oifname "{up}" ip6 saddr {network.netblock6} accept')
            if network.routed6:
                through.append(f'iifname "{up}" oifname "{br}" ip6 daddr {network.netblock6} accept')
            elif led := network.led():  # the host has led them here already
                ends6 = (f"{network.address6(p.address)} . {e.protocol} . {e.to_port + n}" for p, e, n in led)
                admitted = f"ip6 daddr . meta l4proto . th dport {braces(ends6)}"
                through.append(f'iifname "{up}" oifname "{br}" {admitted} accept')
    if routes and inside is not None:
        if network.provide_dns:
            host = f'iifname "{up}" ip saddr {inside - 1} ip daddr {inside}'
            entry.append(f"{host} meta l4proto {{ tcp, udp }} th dport 53 accept")
        if network.provide_nat:
            through.append(f'iifname "{br}" oifname "{up}" ip saddr {block} accept')
        if own := [*(a for a, _ in floating), *routed]:
            through.append(f'iifname "{br}" oifname "{up}" ip saddr {braces(own)} accept')
        through.append(f'iifname "{up}" oifname "{br}" ct status dnat accept')
        if routed:
            through.append(f'iifname "{up}" oifname "{br}" ip daddr {braces(routed)} accept')
            after.append(f'oifname "{up}" ip saddr {braces(routed)} accept')
        if floating:
            outward = _map(floating)
            before.append(f"dnat ip to ip daddr map {_map((f, a) for a, f in floating)}")
            after.append(f'oifname "{up}" snat ip to ip saddr map {outward}')
            # Hair-pin: the answer must come back through the router, so the asker needs another address.
            after.append(f'oifname "{br}" ct status dnat ip saddr {block} snat ip to ip saddr map {outward}')
            after.append(f'oifname "{br}" ct status dnat ip saddr {block} snat ip to {network.gateway}')
        if network.four and (led := network.led()):
            ends = ((key_of(e.protocol, e.port + n), f"{p.address} . {e.to_port + n}") for p, e, n in led)
            led_to = f"dnat ip to meta l4proto . th dport map {_map(ends)}"
            before.append(f'iifname "{up}" fib daddr type local {led_to}')
        if network.four and network.provide_nat:
            outside = network.router_floating or inside
            after.append(f'oifname "{up}" ip saddr {block} snat ip to {outside}')
    chains = [
        _chain("entry", Hook("filter", "input", 0, "drop"), entry),
        _chain("through", Hook("filter", "forward", 0, "drop"), through),
        _chain("before", Hook("nat", "prerouting", -100), before),
        _chain("after", Hook("nat", "postrouting", 100), after),
    ]
    return Table("inet", names.table(installation), dict(chains))


def host_table(
    desired: NodeNetworks,
    resolvers: Iterable[IPv4Address],
    outside: Mapping[int, IPv4Address],
    floating: Iterable[IPv4Address],
    published: Mapping[tuple[str, int], tuple[int, str]],
    six: Mapping[int, IPv6Network],
) -> Table:
    """The inet table of the host: uplinks reach the world, DNS, floating IPs and what this node publishes; not the
    host, nor a node, nor each other. VXLAN with one of our VNIs comes from nodes only; other VXLAN is none of our
    business. `outside`, `six`: the host's end of each uplink and the block that it carries, by VNI.

    The set of floating IPs is also the record of which of the host's ARP proxies are ours.
    """
    table, ours = names.table(desired.installation), f'"{names.host_uplink_prefix(desired.installation)}*"'
    vnis = sorted(network.vni for network in desired.networks if not network.bridge)
    every = {desired.underlay, *(peer.address for peer in desired.peers)}
    nodes = sorted(address for address in every if not address.is_loopback)
    insides, blocks6 = sorted(end + 1 for end in outside.values()), sorted(six.values())
    resolvers, answered = sorted(set(resolvers)), "ct state established,related accept"
    entry = [f"iifname {ours} {answered}"]
    through = [f"iifname {ours} {answered}", f"oifname {ours} {answered}"]
    if resolvers:
        asks = f"iifname {ours} ip daddr {braces(resolvers)} meta l4proto {{ tcp, udp }} th dport 53 accept"
        entry.append(asks)
        through.append(asks)
    if blocks6:
        entry.append(f"iifname {ours} icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept")
    entry.append(f"iifname {ours} counter drop")
    before = []
    after = [f"ip saddr {braces(insides)} oifname != {ours} masquerade"] if insides else []
    led = [("ip", "127.0.0.0/8", f"@{PUBLISHED}", braces(insides))] if published else []
    if ends := [(key_of(*key), end) for key, (vni, end) in published.items() if vni in six]:
        # At once to the guest's own address; what a node has of link-local ones is the node's.
        led.append(("ip6", "{ ::1, fe80::/10 }", _map(ends), braces(blocks6)))
    for ip, but, to, within in led:
        before.append(
            f"fib daddr type local {ip} daddr != {but} dnat {ip} to meta l4proto . th dport map {to}"
        )
        through.append(f"oifname {ours} {ip} daddr {within} ct status dnat accept")
        # Hair-pin: a packet that comes back to where it started must not carry that namespace's own address.
        after.append(f"oifname {ours} {ip} saddr {within} ct status dnat masquerade")
    if vnis:
        # The VNI lies 12 bytes behind the start of the UDP header (RFC 7348, section 5).
        mesh = f"udp dport {VXLAN_PORT} @th,96,24 {braces(vnis)}"
        allowed = f"ip saddr != {braces(nodes)} " if nodes else ""
        entry.append(f"{mesh} {allowed}counter drop")
    if nodes:
        through.append(f"iifname {ours} ip daddr {braces(nodes)} counter drop")
    through.append(f"iifname {ours} ip daddr {_UNREACHABLE} counter drop")
    others6 = "ip6 version 6"
    if blocks6:
        others6 = f"ip6 saddr != {braces(blocks6)}"
        through.append(f"iifname {ours} ip6 daddr != {{ 2000::/3, {LOCAL6} }} counter drop")
        through.append(f"oifname {ours} ip6 daddr != {LOCAL6} ip6 daddr {braces(blocks6)} accept")
        after.append(f"ip6 saddr {LOCAL6} ip6 saddr {braces(blocks6)} oifname != {ours} masquerade")
    through += [
        f"iifname {ours} {others6} counter drop",
        f"oifname {ours} ip daddr @{FLOATING} accept",
        f"oifname {ours} counter drop",
    ]
    chains = [
        _chain("entry", Hook("filter", "input", -10), entry),
        _chain("through", Hook("filter", "forward", -10), through),
        _chain("before", Hook("nat", "prerouting", -100), before),
        _chain("own", Hook("nat", "output", -100), before),
        _chain("after", Hook("nat", "postrouting", 100), after),
    ]
    addresses = Elements(
        f"set inet {table} {FLOATING} {{ type ipv4_addr ; }}",
        frozenset((str(address), "") for address in floating),
    )
    ports = Elements(
        f"map inet {table} {PUBLISHED} {{ type inet_proto . inet_service : ipv4_addr ; }}",
        frozenset((key_of(*key), str(outside[vni] + 1)) for key, (vni, _) in published.items()),
    )
    return Table("inet", table, dict(chains), {FLOATING: addresses, PUBLISHED: ports})


def admissions(
    installation: str,
    foreign: Mapping[tuple[str, str, str], Hook],
    nodes: Sequence[IPv4Address],
    uplinks: Collection[str],
) -> frozenset[Admission]:
    """Rules of ours for host firewalls whose last word is to drop.

    An accept in our own table cannot overrule another table's drop, so what Docker and libvirt do is done here:
    a rule in that chain, with our id as its comment. It goes to the end: it overrules the policy alone, and
    whatever the operator wrote stays in force. `uplinks`: families of chains that forward ours.
    """
    ours = f'"{names.host_uplink_prefix(installation)}*"'
    wanted = []
    for (family, table, name), chain in foreign.items():
        rules = []
        if chain.policy == "drop" and chain.hook == "forward" and family in uplinks:
            rules = [f"iifname {ours} accept", f"oifname {ours} accept"]
        elif chain.policy == "drop" and chain.hook == "input" and nodes and family != "ip6":
            rules = [f"udp dport {VXLAN_PORT} ip saddr {braces(nodes)} accept"]
        for text in rules:
            rule = Rule(f"{names.table(installation)}:{Rule.of(text).mark}", text)
            wanted.append(Admission(family, table, name, rule))
    return frozenset(wanted)
