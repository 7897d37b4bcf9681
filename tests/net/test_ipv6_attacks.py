"""What a guest tries by IPv6 where its network has it: nothing arrives, and the counters say why."""

import struct
import time
from ipaddress import IPv6Address, IPv6Network

import pytest

from net.plan.guards import ROUTER
from net.plan.nft import link_local
from tests.net.machines import Cluster, Guest, ethernet, make_network, make_port, packed, udp
from tests.net.test_spoofing import ALL_NODES, MARK, icmpv6, ipv6

pytestmark = pytest.mark.system
BLOCK = IPv6Network("fd42:1:2:3::/64")
ONE, TWO, NEAR = make_port(2, "n1"), make_port(3, "n2"), make_port(4, "n1")
OWN, LOCAL = BLOCK[2], link_local(ONE.mac)
OPAQUE, FREE = IPv6Address("fe80::dead:beef:1:2"), IPv6Address("fe80::1234:5678:9:a")
"""One that TWO has; one that nobody has."""
SERVERS = IPv6Address("ff02::1:2")
NOBODY = IPv6Address(0)
HOP = b"\x3a\0\1\4\0\0\0\0"  # a hop-by-hop header before ICMPv6


def six(protocol: int, payload: bytes, source: IPv6Address = OWN, target: IPv6Address = ALL_NODES) -> bytes:
    return ethernet(ONE.mac, "33:33:00:00:00:01", 0x86DD, ipv6(source, target, protocol, payload))


def icmp(body: bytes, source: IPv6Address = OWN) -> bytes:
    return ethernet(ONE.mac, "33:33:00:00:00:01", 0x86DD, icmpv6(source, ALL_NODES, body + MARK))


def link(kind: int, mac: str = ONE.mac) -> bytes:
    """A link-layer address option."""
    return bytes([kind, 1]) + packed(mac)


def advert(address: IPv6Address, option: bytes = link(2)) -> bytes:
    return b"\x88\0\0\0\x20\0\0\0" + address.packed + option


def solicit(address: IPv6Address, option: bytes = link(1)) -> bytes:
    return b"\x87\0\0\0\0\0\0\0" + address.packed + option


def fragment(protocol: int, payload: bytes, offset: int = 0) -> bytes:
    return struct.pack("!BBHI", protocol, 0, offset | 1, 7) + payload


def asks(kind: int, protocol: int = 17) -> bytes:
    return udp(546, 547, bytes([kind]) + b"abc" + MARK)


ROUTER_ADVERT = b"\x86" + b"\0" * 15
ATTEMPTS: dict[str, tuple[str, bytes]] = {
    "a neighbour's address": ("ipv6", six(59, MARK, BLOCK[3])),
    "the router's address": ("ipv6", six(59, MARK, BLOCK[1])),
    "the router's link-local address": ("ipv6", six(59, MARK, ROUTER)),
    "a link-local address that follows from a neighbour's MAC": ("ipv6", six(59, MARK, link_local(NEAR.mac))),
    "a link-local address that a guest elsewhere was seen to have": ("ipv6", six(59, MARK, OPAQUE)),
    "an address of the network that nobody has": ("ipv6", six(59, MARK, BLOCK[99])),
    "an address of the world": ("ipv6", six(59, MARK, IPv6Address("2001:db8::1"))),
    "a site-local address": ("ipv6", six(59, MARK, IPv6Address("fec0::1"))),
    "no address": ("ipv6", six(59, MARK, NOBODY)),
    "an echo from no address": ("ipv6", icmp(b"\x80\0\0\0\0\1\0\1", NOBODY)),
    "a router advertisement": ("ra", icmp(ROUTER_ADVERT, LOCAL)),
    "one behind a hop-by-hop header": ("ra", six(0, HOP + ROUTER_ADVERT + MARK, LOCAL)),
    "one in the first of two fragments": ("ra", six(44, fragment(58, ROUTER_ADVERT + MARK), LOCAL)),
    "one that begins in the second of two": ("ipv6", six(44, fragment(60, b"\x3a\0\1\4\0\0\0\0" + MARK), LOCAL)),
    "a redirect": ("ra", icmp(b"\x89" + b"\0" * 39, LOCAL)),
    "that it has the router's address": ("ipv6", icmp(advert(BLOCK[1]))),
    "that it has the router's link-local address": ("ipv6", icmp(advert(ROUTER), LOCAL)),
    "that it has a neighbour's address": ("ipv6", icmp(advert(BLOCK[3]))),
    "the same behind a hop-by-hop header": ("ipv6", six(0, HOP + advert(BLOCK[3]) + MARK)),
    "that a neighbour's link-local address is its own": ("ipv6", icmp(advert(link_local(NEAR.mac)))),
    "that a neighbour's other one is its own": ("ipv6", icmp(advert(OPAQUE))),
    "that its address is behind a neighbour's MAC": ("ipv6", icmp(advert(OWN, link(2, TWO.mac)))),
    "the same behind another option": ("ipv6", icmp(advert(OWN, bytes([14, 1]) + b"nonce!" + link(2, TWO.mac)))),
    "an advertisement in fragments": ("ipv6", six(44, fragment(58, advert(OWN)[:8]))),
    "a question from behind a neighbour's MAC": ("ipv6", icmp(solicit(BLOCK[3], link(1, TWO.mac)))),
    "a router's solicitation from there": ("ipv6", icmp(b"\x85" + b"\0" * 7 + link(1, TWO.mac))),
    "that a neighbour may not have its address": ("ipv6", icmp(solicit(BLOCK[3], b""), NOBODY)),
    "that it may not have its link-local one": ("ipv6", icmp(solicit(link_local(NEAR.mac), b""), NOBODY)),
    "that it may not have its other one": ("ipv6", icmp(solicit(OPAQUE, b""), NOBODY)),
    "a DHCPv6 server": ("dhcp", six(17, udp(547, 546, MARK))),
    "one behind destination options": ("dhcp", six(60, b"\x11\0\1\4\0\0\0\0" + udp(547, 546, MARK))),
    "a decline, perhaps in a neighbour's name": ("dhcp", six(17, asks(9), LOCAL, SERVERS)),
    "a relay, which may say any MAC": ("dhcp", six(17, asks(12), LOCAL, SERVERS)),
    "a request in fragments": ("dhcp", six(44, fragment(17, asks(9)[:8]), LOCAL, SERVERS)),
    "VXLAN": ("vxlan", six(17, udp(9, 4789, MARK))),
    "a tagged frame": ("other", ethernet(ONE.mac, TWO.mac, 0x8100, b"\0\5" + six(59, MARK, BLOCK[3])[12:])),
}  # fmt: skip


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    network = make_network(ONE, TWO, NEAR, netblock6=BLOCK)
    with (
        Cluster(tmp_path_factory.mktemp("six"), 2) as cluster,
        cluster.guests(network, ONE, TWO, NEAR) as (one, two, near),
    ):
        for guest in (one, two, near):
            guest.static()
        dad = icmpv6(NOBODY, ALL_NODES, solicit(OPAQUE, b""))
        two.send(ethernet(TWO.mac, "33:33:00:00:00:01", 0x86DD, dad))
        assert two.pings(ONE.address)
        yield one, two, near


def arrived(frame: bytes, *guests: Guest) -> list[bool]:
    return [any(frame in seen for seen in guest.received) for guest in guests]


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_nothing_of_it_arrives_and_the_counter_says_so(
    guests: tuple[Guest, Guest, Guest], attempt: str
) -> None:
    one, two, near = guests
    node = one.node
    reason, frame = ATTEMPTS[attempt]
    before = node.counters(one.network)[one.name]
    for _ in range(3):
        one.send(frame)
    # What is allowed and sent after it arrives, so that it is not simply slow.
    assert one.pings(TWO.address)
    assert one.pings(NEAR.address)
    after = node.counters(one.network)[one.name]
    assert arrived(frame[14:], two, near) == [False, False]
    assert {r: after[r] - before[r] for r in after if after[r] != before[r]} == {reason: 3}


def test_what_a_guest_may_send_arrives_and_is_counted_nowhere(guests: tuple[Guest, Guest, Guest]) -> None:
    one, two, near = guests
    before = one.node.counters(one.network)[one.name]
    frames = [
        six(59, MARK),
        six(59, MARK, LOCAL),
        icmp(advert(OWN)),
        icmp(solicit(BLOCK[3])),
        icmp(solicit(OWN, b""), NOBODY),
        icmp(solicit(FREE, b""), NOBODY),  # from now on it is this guest's
        icmp(advert(FREE), FREE),
        six(59, MARK, FREE),
        six(44, fragment(17, udp(9, 9, MARK))),
        six(44, fragment(17, MARK, 8)),
        six(17, asks(1), LOCAL, SERVERS),
    ]
    for frame in frames:
        one.send(frame)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and not all(all(arrived(f, two, near)) for f in frames):
        time.sleep(0.05)
    assert [arrived(frame, two, near) for frame in frames] == [[True, True]] * len(frames)
    assert one.node.counters(one.network)[one.name] == before
    for guest, port in ((two, TWO), (near, NEAR)):  # neither there nor here is it another's
        guest.send(ethernet(port.mac, ONE.mac, 0x86DD, ipv6(FREE, OWN, 59, MARK)))
        assert guest.pings(ONE.address)
        counted = guest.node.counters(guest.network)
        assert counted[guest.name]["ipv6"] == 1


def test_a_guest_that_claims_many_addresses_is_slowed_and_shuts_nobody_out(
    guests: tuple[Guest, Guest, Guest],
) -> None:
    one, two, near = guests
    claims = [six(59, MARK, IPv6Address(int(IPv6Address("fe80::7:0:0:0")) + n)) for n in range(200)]
    for frame in claims:
        one.send(frame)
    assert one.pings(TWO.address)
    assert sum(arrived(frame, two)[0] for frame in claims) <= 16
    frame = ethernet(NEAR.mac, ONE.mac, 0x86DD, ipv6(IPv6Address("fe80::8:8:8:8"), OWN, 59, MARK))
    near.send(frame)
    assert near.pings(ONE.address)
    assert arrived(frame, one) == [True]
