"""Who may begin to speak to a guest: rules for the frames that go to its tap, and for what its own frames open.

A bridge has no connection tracking in every kernel, so a set per tap remembers what the guest began: (protocol, the
other's address and port, its own port), a day for TCP, a minute after a FIN or RST, three for the rest. What is allowed
is judged packet by packet, so a change of rules ends no flow that is still allowed. Fields are read at fixed places:
packets with IP options, and fragments, which have no ports, do not pass.
"""

from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network

from net.ipam import ANY
from net.plan.facts import Elements
from net.plan.guards import CHAINED
from net.plan.model import Port

_KEY = "@nh,72,8 . @nh,96,32 . @nh,160,16 . @nh,176,16"
"""Protocol, source address, source port, destination port, as they stand in a packet that comes."""
_KEY6 = "@nh,48,8 . @nh,64,128 . @nh,320,16 . @nh,336,16"
"""By IPv6, without extension headers: those do not pass."""
_NEEDED6 = "{ destination-unreachable, packet-too-big, time-exceeded, parameter-problem, nd-router-advert }"
_MOST = 65536
Ranges = tuple[tuple[int, int], ...]


def flows(at: str, tap: str, *, six: bool) -> dict[str, Elements]:
    """The sets of what a guest began."""
    kept = f"flags dynamic,timeout ; size {_MOST} ; timeout 3m ;"
    keys = {f"f-{tap}": _KEY, **({f"g-{tap}": _KEY6} if six else {})}
    return {n: Elements(f"set {at} {n} {{ typeof {key} ; {kept} }}") for n, key in keys.items()}


def tracked(tap: str, port: Port, *, six: bool) -> Iterator[str]:
    """Of what a guest sends. Answers of its own servers, at ports that are open anyway, are not worth remembering."""
    for allow in port.allowed or ():
        if allow.ports:
            yield f"{allow.protocol} sport {_ports(allow.ports)} return"
    four = ("ip protocol", "icmp", f"update @f-{tap} {{ @nh,72,8 . @nh,128,32", 160)
    more = ("ip6 nexthdr", "icmpv6", f"update @g-{tap} {{ @nh,48,8 . @nh,192,128", 320)
    for protocol, icmp, opens, at in (four, more) if six else (four,):
        begun = f"{opens} . @nh,{at + 16},16 . @nh,{at},16"
        yield f"{protocol} tcp tcp flags & (fin | rst) != 0 {begun} timeout 1m }} return"
        yield f"{protocol} tcp tcp flags & (syn | psh) != 0 {begun} timeout 1d }} return"
        yield f"{protocol} udp {begun} }}"
        yield f"{icmp} type echo-request {opens} . @nh,{at + 32},16 . @nh,{at + 32},16 }}"


def admitted(tap: str, port: Port, server: str, *, six: bool) -> Iterator[str]:
    """Of what comes to a guest: first what most of it is. `server` matches whose DHCP answers are taken."""
    drop = f'counter name "{tap}-rules" drop'
    yield f"ether type ip ip hdrlength != 5 {drop}"
    yield f"ether type ip ip frag-off & 0x3fff != 0 {drop}"
    yield f"ether type ip6 exthdr frag exists {drop}"
    if six:
        yield f"ip6 nexthdr {CHAINED} {drop}"
    yield from _opened(port, six=six)
    yield f"ether type ip meta l4proto {{ tcp, udp }} {_KEY} @f-{tap} accept"
    if six:
        yield f"ip6 nexthdr {{ tcp, udp }} {_KEY6} @g-{tap} accept"
        yield f"icmpv6 type echo-reply @nh,48,8 . @nh,64,128 . @nh,352,16 . @nh,352,16 @g-{tap} accept"
        yield "ip6 saddr fe80::/10 udp sport 547 udp dport 546 accept"
        # What IPv6 does not work without (RFC 4890); advertisements of routers were judged before.
        yield f"ip6 nexthdr ipv6-icmp icmpv6 type {_NEEDED6} accept"
    yield "ether type arp accept"
    yield f"{server}udp sport 67 udp dport 68 accept"
    yield "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"
    yield f"icmp type echo-reply @nh,72,8 . @nh,96,32 . @nh,192,16 . @nh,192,16 @f-{tap} accept"
    # An error holds the packet that it is about, with a header of its own.
    about = "@nh,228,4 5 @nh,296,8 . @nh,352,32 . @nh,400,16 . @nh,384,16"
    echo = "@nh,228,4 5 @nh,296,8 1 @nh,296,8 . @nh,352,32 . @nh,416,16 . @nh,416,16"
    yield f"icmp type {{ destination-unreachable, time-exceeded }} {about} @f-{tap} accept"
    yield f"icmp type {{ destination-unreachable, time-exceeded }} {echo} @f-{tap} accept"
    yield drop


def _opened(port: Port, *, six: bool) -> Iterator[str]:
    """One rule for each protocol and source."""
    opened: dict[tuple[str, IPv4Network | IPv6Network], Ranges] = {}
    for allow in port.allowed or ():
        at = allow.protocol, allow.source
        known = opened.get(at, allow.ports)
        opened[at] = (*known, *allow.ports) if known and allow.ports else ()
    for (protocol, block), ports in opened.items():
        source = f"ip{'6' if block.version == 6 else ''} saddr {block} " if block != ANY else ""
        if protocol == "icmp":
            if block.version == 6 or (six and not source):
                yield f"{source}icmpv6 type echo-request accept"
            if block.version == 4:
                yield f"{source}icmp type echo-request accept"
        elif ports:
            yield f"{source}{protocol} dport {_ports(ports)} accept"
        else:
            yield f"{source}{'' if protocol == 'any' else f'meta l4proto {protocol} '}accept"


def _ports(ranges: Ranges) -> str:
    apart: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if apart and first <= apart[-1][1] + 1:
            first, last = apart[-1][0], max(last, apart.pop()[1])
        apart.append((first, last))
    return "{ " + ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in apart) + " }"
