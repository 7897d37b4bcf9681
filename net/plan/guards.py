"""What a guest may send by IPv6 where its network has it, beside rules of nft.py for all frames.

Its addresses are the one that goes with its IPv4 address, the link-local one that follows from its MAC (RFC 4291,
appendix A), and other link-local ones (RFC 7217) that nobody had before: the kernel itself puts them into OWNERS when
they are first seen, here or from another node. None of those can look as if it followed from a MAC, or be the router's.
The same holds in the block of a network with SLAAC, where none can be one that IPAM may give: those begin with zeros.

Neighbour discovery is believed only in whole packets (RFC 6980), and what it says of link addresses is the sender's.
Fields are read at fixed places behind the IPv6 header (@nh) or the last of its extension headers (@th).
"""

from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv6Address, IPv6Network

from net.plan.facts import Elements
from net.plan.names import VXLAN_PORT

ROUTER, INSIDE = IPv6Address("fe80::1"), IPv6Address("fe80::2")
"""The router's address on its network and the host's on an uplink; the router's own end of that."""
OWNERS, CLAIMED = "owners6", "claimed6"  # sets of (link-local address, MAC), and of those addresses
MOST = 256  # chosen addresses of one interface at once
CHAINED = "{ 0, 43, 44, 51, 60, 135, 139, 140 }"  # headers behind which another may come


def sets(at: str, taps: Iterable[str]) -> dict[str, Elements]:
    """Those two, and a set per tap that bounds what its guest has of them."""
    kept, address = "flags dynamic,timeout ; timeout 7d ;", "@nh,64,128"
    kinds = {OWNERS: (f"{address} . ether saddr", 65535), CLAIMED: (address, 65535)}
    kinds |= {f"c-{tap}": (address, MOST) for tap in taps}
    return {
        n: Elements(f"set {at} {n} {{ typeof {kind} ; size {most} ; {kept} }}")
        for n, (kind, most) in kinds.items()
    }


def _chosen(at: str, block: IPv6Network | None) -> list[str]:
    """Addresses at `at` bit 64 that a guest may choose: of link-local ones, and of its network's block with SLAAC."""
    inside = f"{at},64,64 0x{int(block[0]) >> 64:016x} {at},128,40 != 0" if block else ""
    return [f"{each} {at},152,16 != 0xfffe" for each in (f"{at},64,64 0xfe80000000000000", inside) if each]


def _claims(match: str, at: str, block: IPv6Network | None, own: str = "", limit: str = "") -> Iterator[str]:
    """Passes an address (`at` bit 64) that is the sender's already, or from now on."""
    whole = f"{at},64,128"
    kept = f"update @{own} {{ {whole} }} " if own else ""  # where this is full, the rule ends
    kept += f"update @{OWNERS} {{ {whole} . ether saddr }} update @{CLAIMED} {{ {whole} }} accept"
    yield f"{match} {whole} . ether saddr @{OWNERS} {kept}"
    for free in _chosen(at, block):
        yield f"{match} {free} {whole} != 0x{int(ROUTER):032x} {whole} != @{CLAIMED} {limit}{kept}"


def meshed(vxlan: str, block: IPv6Network | None) -> Iterator[str]:
    """Of what other nodes' guests send: their nodes judged it, but an address that a guest here has is not theirs."""
    yield from _claims(f'iifname "{vxlan}" ip6 saddr :: icmpv6 type nd-neighbor-solicit', "@th", block)
    yield from _claims(f'iifname "{vxlan}" ether type ip6', "@nh", block)
    for local in _chosen("@nh", block):
        yield f'iifname "{vxlan}" ether type ip6 {local} ip6 saddr != {ROUTER} drop'


def pinned(
    drop: Callable[[str, str], str],
    tap: str,
    mac: str,
    own: IPv6Address,
    local: IPv6Address,
    block: IPv6Network | None,
) -> Iterator[str]:
    """`own`: from its network; `local`: from its MAC; `block`: with SLAAC. Nothing but IPv6 comes here."""
    every = [own, local, *([block[int(local) % 2**64]] if block else ())]
    mine, fixed = mac.replace(":", ""), f"{{ {', '.join(map(str, every))} }}"
    raw = f"{{ {', '.join(f'0x{int(each):032x}' for each in every)} }}"
    advert, solicit = "icmpv6 type nd-neighbor-advert", "icmpv6 type nd-neighbor-solicit"
    yield f"ip6 saddr {fixed} ip6 nexthdr tcp accept"
    yield drop(f"frag nexthdr {CHAINED}", "ipv6")
    yield drop("icmpv6 type { nd-router-advert, nd-redirect }", "ra")
    yield drop("exthdr frag exists icmpv6 type { 133, 135, 136 }", "ipv6")
    yield drop(f"{advert} @th,64,128 != {raw} @th,64,128 . ether saddr != @{OWNERS}", "ipv6")
    yield drop(f"{advert} @th,192,64 != 0x0201{mine}", "ipv6")
    yield drop(f"ip6 saddr != :: ip6 length != 24 {solicit} @th,192,64 != 0x0101{mine}", "ipv6")
    yield drop(f"ip6 saddr != :: icmpv6 type nd-router-solicit @th,64,64 != 0x0101{mine}", "ipv6")
    # A client's own messages; not that of a relay, which says another's MAC, nor that an address is no good.
    yield drop("udp sport 547", "dhcp")
    yield drop("udp dport 547 exthdr frag exists", "dhcp")
    yield drop("udp dport 547 @th,64,8 != { 1, 3, 4, 5, 6, 8, 11 }", "dhcp")
    yield drop(f"udp dport {VXLAN_PORT}", "vxlan")
    yield f"ip6 saddr {fixed} accept"
    # The sender address :: looks for another owner (RFC 4862), for a router, or for who listens to which group.
    yield f"ip6 saddr :: {solicit} @th,64,128 {raw} accept"
    few = "limit rate 4/minute burst 16 packets "
    yield from _claims(f"ip6 saddr :: {solicit}", "@th", block, f"c-{tap}", few)
    yield "ip6 saddr :: icmpv6 type { nd-router-solicit, mld-listener-report, mld2-listener-report } accept"
    yield from _claims("ether type ip6", "@nh", block, f"c-{tap}", few)
    yield drop("ether type ip6", "ipv6")
