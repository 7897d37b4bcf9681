"""Guests on the node's own bridge: their addresses, what they may send, and whose the bridge stays."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path

import pytest

from net import Network, NodeNetworks
from net.errors import Failed
from net.ipam import ANY, UNKNOWN
from net.plan.nft import link_local
from tests.net.machines import Cluster, Guest, Node, Space, arp, dhcp_frame, ethernet, ipv4, make_port, udp
from tests.net.test_spoofing import icmpv6

pytestmark = pytest.mark.system
MARK = b"from a guest on the LAN"
EVERYBODY = "ff:ff:ff:ff:ff:ff"


@dataclass
class Lan:
    """br0 of the node, and on it a router with a DHCP server (192.168.77.1) and a neighbour (.3)."""

    cluster: Cluster
    router: Space
    neighbour: Space

    @property
    def node(self) -> Node:
        return self.cluster.nodes[0]

    def apply(self, *networks: Network) -> NodeNetworks:
        desired = self.cluster.desired(*networks)
        self.node.apply(desired)
        return replace(desired, node="n1", underlay=self.node.address)


@pytest.fixture
def lan(tmp_path: Path) -> Iterator[Lan]:
    with Cluster(tmp_path) as cluster, Space() as router, Space() as neighbour:
        node = cluster.nodes[0].space
        node.sh("ip link add br0 type bridge; ip link set br0 up; ip addr add 192.168.77.2/24 dev br0")
        for number, (name, machine) in enumerate((("router", router), ("nb", neighbour))):
            machine.sh(f"ip link add eth0 type veth peer name {name} netns {node.tid}; ip link set eth0 up")
            node.sh(f"ip link set {name} master br0 up")
            machine.sh(f"ip addr add 192.168.77.{1 + 2 * number}/24 dev eth0")
        node.sh("until ip link show br0 | grep -q 'state UP'; do sleep 0.1; done")
        router.sh(
            "dnsmasq --port=0 --interface=eth0 --bind-interfaces --leasefile-ro --no-ping --conf-file=/dev/null"
            " --dhcp-range=192.168.77.100,192.168.77.120 --dhcp-authoritative --pid-file=/run/dnsmasq.pid"
        )
        yield Lan(cluster, router, neighbour)


def make_lan(*ports: object, name: str = "home", block: IPv4Network = ANY) -> Network:
    gateway = IPv4Address("192.168.77.1")
    return Network(name, 77, name, block, gateway, bridge="br0", mtu_bytes=1500, ports=ports)  # type: ignore[arg-type]


def by_dhcp(host: int) -> object:
    return replace(make_port(host, "n1"), address=UNKNOWN[host])


def test_a_guest_gets_an_address_of_the_lan_and_is_then_held_to_it(lan: Lan) -> None:
    one, two = by_dhcp(2), by_dhcp(3)
    network = make_lan(one, two)
    desired = lan.apply(network)
    with lan.cluster.guest(network, one) as guest, lan.cluster.guest(network, two) as other:  # type: ignore[arg-type]
        guest.space.sh("ip addr add 192.168.77.50/24 dev eth0")
        assert guest.reaches_not("192.168.77.3"), "an address that nobody gave"
        guest.space.sh("ip addr flush dev eth0")
        address = IPv4Address(guest.dhcp()[0])
        assert IPv4Address("192.168.77.100") <= address <= IPv4Address("192.168.77.120")
        other_address = IPv4Address(other.dhcp()[0])
        assert other_address != address
        assert guest.pings("192.168.77.3", size=1472)
        assert guest.pings("192.168.77.2")
        assert guest.pings(other_address)
        assert lan.neighbour.works(f"ping -n -c 1 -W 2 {address}")
        assert lan.node.apply(desired) == [], "what the kernel learned is nobody's to put right"
        for frame in attacks(guest, address, other_address).values():
            guest.send(frame)
        assert guest.pings(other_address)
        assert not any(MARK in frame for frame in other.received)
        guest.space.sh("ip addr add 192.168.77.51/24 dev eth0; ip addr del 192.168.77.51/24 dev eth0")
        left = make_lan(one)
        assert lan.node.apply(replace(desired, networks=(left,))) != []
        assert lan.node.apply(replace(desired, networks=(left,))) == []
        lan.node.apply(desired)
        lan.node.space.sh("ip link set router down")
        assert guest.pings(other_address), "what it was given stays, whether or not the server is there"


def attacks(guest: Guest, own: IPv4Address, other: IPv4Address) -> dict[str, bytes]:
    mac = guest.port.mac

    def to_all(kind: int, payload: bytes) -> bytes:
        return ethernet(mac, EVERYBODY, kind, payload)

    return {
        "a neighbour's address": to_all(0x0800, ipv4(other, "255.255.255.255", 17, udp(9, 9, MARK))),
        "the router's": to_all(0x0800, ipv4("192.168.77.1", "255.255.255.255", 17, udp(9, 9, MARK))),
        "ARP for the router": to_all(0x0806, arp(2, mac, "192.168.77.1", other) + MARK),
        "a DHCP answer": to_all(0x0800, ipv4(own, "255.255.255.255", 17, udp(67, 68, ack(mac) + MARK))),
        "another MAC": ethernet("02:66:66:66:66:66", EVERYBODY, 0x0800, ipv4(own, own, 17, udp(9, 9, MARK))),
        "a tagged frame": to_all(0x8100, b"\0\5\x08\0" + ipv4(own, own, 17, udp(9, 9, MARK))),
        "a DHCP request in another's name": dhcp_frame("02:66:66:66:66:66", b"abcd", b"\x35\x01\x01" + MARK),
    }


def send_raw(frame: bytes) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("eth0", 0))
        raw.send(frame)


def ack(mac: str, given: str = "192.168.77.200") -> bytes:
    packed = bytes.fromhex(mac.replace(":", ""))
    body = b"\2\1\6\0" + b"abcd" + b"\0" * 8 + IPv4Address(given).packed + b"\0" * 8 + packed
    return body + b"\0" * 202 + b"\x63\x82\x53\x63\x35\x01\x05\xff"


def test_no_guest_gives_another_or_itself_an_address(lan: Lan) -> None:
    one, two = by_dhcp(2), by_dhcp(3)
    network = make_lan(one, two)
    lan.apply(network)
    with lan.cluster.guest(network, one) as guest, lan.cluster.guest(network, two) as other:  # type: ignore[arg-type]
        for victim in (guest, other):
            guest.send(
                ethernet(
                    guest.port.mac,
                    EVERYBODY,
                    0x0800,
                    ipv4("192.168.77.1", "255.255.255.255", 17, udp(67, 68, ack(victim.port.mac))),
                )
            )
            victim.space.sh("ip addr add 192.168.77.200/24 dev eth0")
            assert victim.reaches_not("192.168.77.3")
            victim.space.sh("ip addr flush dev eth0")
        assert IPv4Address(guest.dhcp()[0]) in IPv4Network("192.168.77.96/27")


def test_a_guest_with_an_address_of_our_range_needs_no_dhcp(lan: Lan) -> None:
    port = make_port(9, "n1", "192.168.77.0/24")
    network = make_lan(port, block=IPv4Network("192.168.77.0/24"))
    desired = lan.apply(network)
    with lan.cluster.guest(network, port) as guest:
        guest.static()
        assert guest.pings("192.168.77.3")
        guest.space.sh("ip addr add 192.168.77.60/24 dev eth0; ip addr del 192.168.77.9/24 dev eth0")
        assert guest.reaches_not("192.168.77.3")
        asks = replace(network, ports=(port, by_dhcp(2)))
        advert = b"\x86" + b"\0" * 15 + MARK
        router = link_local("02:00:00:00:00:aa")
        frame = ethernet(
            "02:00:00:00:00:aa", "33:33:00:00:00:01", 0x86DD, icmpv6(router, IPv6Address("ff02::1"), advert)
        )
        lan.neighbour.call(send_raw, frame)
        guest.space.sh("ip addr flush dev eth0; ip addr add 192.168.77.9/24 dev eth0")
        assert lan.neighbour.works("ping -n -c 1 -W 2 192.168.77.9")
        assert not any(MARK in seen for seen in guest.received), "no IPv6 that its filter could not know"
        for each in (asks, network):
            lan.node.apply(replace(desired, networks=(each,)))
            assert lan.node.apply(replace(desired, networks=(each,))) == []


def test_the_bridge_stays_as_it_was_and_its_loss_unplugs_guests_until_it_is_back(lan: Lan) -> None:
    port = make_port(9, "n1", "192.168.77.0/24")
    network, node = make_lan(port, block=IPv4Network("192.168.77.0/24")), lan.node.space
    node.sh("ip link set br0 mtu 1400")
    look = "ip -o link show br0; ip -o addr show br0; nft list tables ip"
    before = node.sh(look)
    desired = lan.apply(network)
    with lan.cluster.guest(network, port) as guest:
        guest.static()
        guest.space.sh("ip link set eth0 mtu 1400")
        assert guest.pings("192.168.77.3")
        assert node.sh(look) == before
        node.sh("ip link del br0")
        with pytest.raises(Failed, match="no bridge br0 here: guests of home are unplugged"):
            lan.node.apply(desired)
        assert "home" in [f.network for f in node.call(lan.node.plane.doctor, desired)]
        node.sh("ip link add br0 type bridge; ip link set nb master br0; ip link set br0 up")
        assert lan.node.apply(desired) != []
        assert guest.pings("192.168.77.3")
        assert lan.node.apply(desired) == []
        lan.node.apply(replace(desired, networks=()))
        assert guest.reaches_not("192.168.77.3"), "a guest that nobody wants any more has no cable"
    lan.node.remove_all()
    assert "sf" not in node.sh("nft list tables; ip -o link | grep sft || true")


def test_a_host_firewall_that_drops_bridged_packets_is_named_with_its_cure(lan: Lan) -> None:
    lan.node.space.sh("sysctl -qw net.bridge.bridge-nf-call-iptables=1; iptables -P FORWARD DROP")
    port = make_port(9, "n1", "192.168.77.0/24")
    network = make_lan(port, block=IPv4Network("192.168.77.0/24"))
    desired = lan.apply(network)
    with lan.cluster.guest(network, port) as guest:
        guest.static()
        assert guest.reaches_not("192.168.77.3")
        (found,) = lan.node.space.call(lan.node.plane.doctor, desired)
        assert "refuses packets between ports of br0" in found.text
        lan.node.space.sh(found.fix)
        assert guest.pings("192.168.77.3")
        assert lan.node.space.call(lan.node.plane.doctor, desired) == []
