"""What a guest with raw sockets tries: nothing arrives, and the counters say why."""

import struct
import time
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from net.plan.nft import link_local
from tests.net.machines import (
    Cluster,
    Guest,
    arp,
    checksum,
    ethernet,
    ipv4,
    make_network,
    make_port,
    udp,
)

pytestmark = pytest.mark.system
ONE, TWO = make_port(2, "n1"), make_port(3, "n2")
NEAR = make_port(4, "n1")
MARK = b"spoofed by a test"
OTHER_MAC, BROADCAST = "02:66:66:66:66:66", "ff:ff:ff:ff:ff:ff"


def ipv6(source: IPv6Address, target: IPv6Address, protocol: int, payload: bytes) -> bytes:
    return (
        struct.pack("!IHBB", 6 << 28, len(payload), protocol, 255) + source.packed + target.packed + payload
    )


def icmpv6(source: IPv6Address, target: IPv6Address, body: bytes) -> bytes:
    pseudo = source.packed + target.packed + struct.pack("!II", len(body), 58)
    return ipv6(source, target, 58, body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:])


ALL_NODES = IPv6Address("ff02::1")
OWN = link_local(ONE.mac)


def _to(kind: int, payload: bytes, source: str = ONE.mac) -> bytes:
    return ethernet(source, BROADCAST, kind, payload)


def _datagram(address: object = ONE.address, ports: tuple[int, int] = (9, 9), mac: str = ONE.mac) -> bytes:
    return _to(0x0800, ipv4(address, "255.255.255.255", 17, udp(*ports, MARK)), mac)


def _six(protocol: int, payload: bytes, source: IPv6Address = OWN) -> bytes:
    return _to(0x86DD, ipv6(source, ALL_NODES, protocol, payload))


def _icmp(body: bytes) -> bytes:
    return _to(0x86DD, icmpv6(OWN, ALL_NODES, body + MARK))


ROUTER = "10.42.0.1"
ROUTER_SIX = IPv6Address("fe80::1")
ATTEMPTS: dict[str, tuple[str, bytes]] = {
    "another MAC": ("mac", _datagram(mac=OTHER_MAC)),
    "another's IPv4 address": ("ipv4", _datagram(TWO.address)),
    "the gateway's IPv4 address": ("ipv4", _datagram(ROUTER)),
    "an ARP answer for the gateway": ("arp", _to(0x0806, arp(2, ONE.mac, ROUTER, NEAR.address) + MARK)),
    "another's MAC inside ARP": ("arp", _to(0x0806, arp(1, OTHER_MAC, ONE.address, NEAR.address) + MARK)),
    "ARP of another shape": (
        "arp",
        _to(0x0806, b"\0\6" + arp(1, ONE.mac, ONE.address, NEAR.address)[2:] + MARK),
    ),
    "a DHCP server": ("dhcp", _datagram(ports=(67, 68))),
    "VXLAN": ("vxlan", _datagram(ports=(9, 4789))),
    "VXLAN over IPv6": ("vxlan", _six(17, udp(9, 4789, MARK))),
    "a router advertisement": ("ra", _icmp(b"\x86" + b"\0" * 15)),
    "one behind a hop-by-hop header": ("ra", _six(0, b"\x3a\0\1\4\0\0\0\0\x86" + b"\0" * 15 + MARK)),
    "a redirect": ("ra", _icmp(b"\x89" + b"\0" * 39)),
    "another's IPv6 address": ("ipv6", _six(59, MARK, ROUTER_SIX)),
    "a global IPv6 address": ("ipv6", _six(59, MARK, IPv6Address("2001:db8::1"))),
    "a neighbour advertisement for another": ("ipv6", _icmp(b"\x88\0\0\0\x20\0\0\0" + ROUTER_SIX.packed)),
    "a DHCPv6 server": ("dhcp", _six(17, udp(547, 546, MARK))),
    "a tagged frame": ("other", _to(0x8100, b"\0\5\x08\0" + _datagram(TWO.address)[14:])),
    "a protocol that is neither": ("other", _to(0x88CC, MARK)),
}


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    network = make_network(ONE, TWO, NEAR)
    with (
        Cluster(tmp_path_factory.mktemp("spoofing"), 2) as cluster,
        cluster.guests(network, ONE, TWO, NEAR) as three,
    ):
        for guest in three:
            guest.static()
        yield three


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_nothing_of_it_arrives_and_the_counter_says_so(
    guests: tuple[Guest, Guest, Guest], attempt: str
) -> None:
    one, two, near = guests
    node = one.node
    reason, frame = ATTEMPTS[attempt]
    before = node.counters(one.network)[one.name]
    with node.space.sniffing_inside(
        node.plane.namespace(one.network), "up-" + f"{one.network.vni:06x}"
    ) as outside:
        for _ in range(3):
            one.send(frame)
        # What is allowed and sent after it arrives, so that it is not simply slow.
        assert one.pings(TWO.address)
        assert one.pings(NEAR.address)
    after = node.counters(one.network)[one.name]
    assert [f for guest in (two, near) for f in guest.received if MARK in f] == []
    assert MARK not in outside
    assert after[reason] - before[reason] == 3
    assert all(after[other] == before[other] for other in after if other not in (reason, "ipv6", "other"))


def test_what_a_guest_may_send_is_counted_nowhere(guests: tuple[Guest, Guest, Guest]) -> None:
    one, two, near = guests
    before = one.node.counters(one.network)[one.name]
    one.send(_to(0x0800, ipv4(ONE.address, "255.255.255.255", 17, udp(9, 9, MARK + b" not"))))
    one.send(_to(0x86DD, ipv6(OWN, ALL_NODES, 59, MARK + b" not")))
    assert one.pings(TWO.address)
    assert one.pings(NEAR.address)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        arrived = [sum(MARK + b" not" in f for f in guest.received) for guest in (two, near)]
        if arrived == [2, 2]:
            break
        time.sleep(0.05)
    assert arrived == [2, 2]
    assert one.node.counters(one.network)[one.name] == before


def test_a_tap_without_filters_passes_nothing(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        one, two = make_port(2, "n1"), make_port(3, "n1")
        network = make_network(one, two)
        cluster.apply(network)
        node = cluster.nodes[0]
        with cluster.guest(network, one) as guest, cluster.guest(network, two) as other:
            guest.static()
            other.static()
            assert guest.pings(two.address)
            table = f"bridge sf-{cluster.installation}"
            node.inside(network, f"nft delete element {table} taps {{ {guest.name} }}")
            assert guest.reaches_not(two.address)
            assert guest.reaches_not(IPv4Address("10.42.0.1"))
