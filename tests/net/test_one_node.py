"""One node: a network from nothing, its guests, the world, and what guests must not reach."""

import re
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from net.plan import names
from net.plan.nft import FLOATING
from tests.net.machines import OUTSIDE, Cluster, make_network, make_port

pytestmark = pytest.mark.system


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as made:
        yield made


def test_a_guest_gets_its_address_by_dhcp_resolves_its_neighbour_and_reaches_the_world(
    cluster: Cluster,
) -> None:
    one, two = make_port(2, "n1"), make_port(3, "n1")
    network = make_network(one, two)
    cluster.apply(network)
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as other:
        options = guest.dhcp()
        assert IPv4Address(options[0]) == one.address
        assert IPv4Address(options[3]) == network.gateway
        assert int.from_bytes(options[26]) == network.mtu_bytes
        assert options[15] == b"sf.internal"
        assert options[119] == b"\x02sf\x08internal\x00"
        other.dhcp()
        assert guest.pings(network.gateway)
        assert guest.pings(two.address, size=network.mtu_bytes - 28)
        assert guest.pings(OUTSIDE)
        guest.space.sh("mount --bind /dev/null /etc/resolv.conf")
        assert _resolve(guest, network.gateway, "guest3.sf.internal") == [two.address]
        assert _resolve(guest, network.gateway, "nobody.sf.internal") == []


def _resolve(guest, server: IPv4Address, name: str) -> list[IPv4Address]:  # type: ignore[no-untyped-def]
    question = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0\0\1\0\1"

    def ask() -> bytes:
        import socket

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.sendto(b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + question, (str(server), 53))
            return sock.recv(1500)

    answer = guest.space.call(ask)
    count = int.from_bytes(answer[6:8])
    return [IPv4Address(answer[-4:])] if count else []


def test_applying_twice_does_nothing_and_removing_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    port = make_port(2, "n1", floating=IPv4Address("10.9.9.100"))
    network = make_network(port)
    node = cluster.nodes[0]

    def look() -> str:
        """Whether its own cable has a carrier by now is not ours."""
        said = node.space.sh("ip -o link; ip -o -4 addr; ip route; nft list ruleset")
        return re.sub(r"NO-CARRIER,|,LOWER_UP|state \w+| linkdown| (?=\n)", "", said)

    before = look()
    for vni in (network.vni, network.vni + 1):  # a maker of either was killed before it was a namespace
        half = names.namespace(node.plane.installation, vni)
        node.space.sh(f"mkdir -p /run/netns; touch /run/netns/{half}")
    desired = cluster.apply(network)
    with cluster.guest(network, port):
        assert node.apply(desired) == []
        assert node.apply(desired) == []
        assert node.apply(replace(desired, networks=())) != []
        assert node.apply(replace(desired, networks=())) == []
    node.remove_all()
    assert look() == before
    assert node.space.sh("ls /run/netns") == ""
    assert node.space.processes() == []
    assert not (tmp_path / "n1" / "net").exists()


def test_guests_reach_neither_the_host_nor_a_node_nor_another_network(tmp_path: Path) -> None:
    with Cluster(tmp_path, 2) as cluster:
        one = make_port(2, "n1")
        two = make_port(3, "n1", "10.43.0.0/24")
        network, other = make_network(one), make_network(two, name="other", block="10.43.0.0/24")
        cluster.apply(network, other)
        with cluster.guest(network, one) as guest, cluster.guest(other, two) as stranger:
            guest.static()
            stranger.static()
            assert guest.pings(OUTSIDE)
            assert stranger.pings(OUTSIDE)
            host = cluster.nodes[0].space.sh("ip -4 -o addr show | grep 169.254").split()
            uplink_end = next(word for word in host if word.startswith("169.254")).split("/")[0]
            for forbidden in ("10.9.9.1", "10.9.9.2", uplink_end, two.address, "10.43.0.1"):
                assert guest.reaches_not(forbidden), forbidden


def test_two_networks_with_the_same_addresses_do_not_meet(cluster: Cluster) -> None:
    left, right = make_port(2, "n1"), replace(make_port(2, "n1"), uuid="other", mac="02:00:00:00:00:99")
    third = make_port(3, "n1")
    network, other = make_network(left, third), make_network(right, name="other")
    cluster.apply(network, other)
    with (
        cluster.guest(network, left) as guest,
        cluster.guest(other, right) as stranger,
        cluster.guest(network, third) as friend,
    ):
        for each in (guest, stranger, friend):
            each.static()
        assert guest.pings(third.address)
        assert guest.pings(OUTSIDE)
        assert stranger.pings(OUTSIDE)
        assert stranger.reaches_not(third.address)


def test_a_floating_ip_works_from_outside_from_inside_and_back_to_oneself(cluster: Cluster) -> None:
    floating = IPv4Address("10.9.9.100")
    one, two = make_port(2, "n1", floating=floating), make_port(3, "n1")
    network = make_network(one, two)
    desired = cluster.apply(network)
    world = cluster.world
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as other:
        guest.static()
        other.static()
        assert world.works(f"ping -n -c 3 -W 2 {floating}")
        assert other.pings(floating)
        assert guest.pings(floating)
        with world.sniffing("icmp and dst host 10.9.9.254") as sources:
            assert guest.pings("10.9.9.254")
            assert other.pings("10.9.9.254")
        assert sources == {str(floating), "10.9.9.1"}
        bare = replace(network, ports=(replace(one, floating=None), two))
        cluster.nodes[0].apply(replace(desired, networks=(bare,)))
        world.sh("ip neigh flush all")
        assert not world.works(f"ping -n -c 2 -W 1 {floating}")
        assert guest.pings(OUTSIDE)


def test_a_host_firewall_that_forwards_nothing_does_not_stop_the_networks(cluster: Cluster) -> None:
    node = cluster.nodes[0].space
    node.sh(
        "sysctl -qw net.bridge.bridge-nf-call-iptables=1; iptables -P FORWARD DROP; iptables -P INPUT DROP"
    )
    one = make_port(2, "n1", floating=IPv4Address("10.9.9.100"))
    two = make_port(3, "n1")
    network = make_network(one, two)
    desired = cluster.apply(network)
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as other:
        guest.dhcp()
        other.dhcp()
        assert guest.pings(two.address)
        assert guest.pings(OUTSIDE)
        assert cluster.world.works("ping -n -c 3 -W 2 10.9.9.100")
        assert cluster.nodes[0].apply(desired) == []
    cluster.nodes[0].remove_all()
    assert "sf-" not in node.sh("iptables-save")


def test_routed_addresses_reach_their_next_hop_without_nat(cluster: Cluster) -> None:
    routed = IPv4Address("203.0.113.7")
    one = make_port(2, "n1")
    network = make_network(one, routed=((routed, one.address),), provide_nat=False)
    cluster.apply(network)
    cluster.world.sh(f"ip route add {routed}/32 dev switch")
    with cluster.guest(network, one) as guest:
        options = guest.dhcp()
        assert 3 in options
        guest.space.sh(f"ip addr add {routed}/32 dev lo")
        assert cluster.world.works(f"ping -n -c 3 -W 2 {routed}")
        assert guest.space.works(f"ping -n -c 3 -W 2 -I {routed} {OUTSIDE}")
        assert guest.reaches_not(OUTSIDE)


def test_what_somebody_changes_in_rules_that_were_read_before_is_seen_and_put_back(cluster: Cluster) -> None:
    port = make_port(2, "n1", floating=IPv4Address("10.9.9.100"))
    node, desired = cluster.nodes[0], cluster.apply(make_network(port))
    (space,) = node.space.sh("ls /run/netns").split()
    table = names.table(desired.installation)
    inside = f"nsenter --net=/run/netns/{space} nft"
    again = f"umount /run/netns/{space} && rm /run/netns/{space} && ip netns add {space}"
    for change in (
        f"nft flush set inet {table} {FLOATING}",
        "nft flush ruleset",
        f"{inside} flush ruleset",
        again,
    ):
        while node.apply(desired):  # floating addresses are announced more than once
            pass
        before = node.space.sh(f"nft -s list ruleset; {inside} -s list ruleset")
        node.space.sh(change)
        assert node.apply(desired) != [], change
        assert node.space.sh(f"nft -s list ruleset; {inside} -s list ruleset") == before
