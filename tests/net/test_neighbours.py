"""What a guest may do to its neighbours' addresses and names on one network: nothing."""

import os
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from net.errors import Conflict
from net.plan import names
from tests.net.machines import OUTSIDE, Cluster, Guest, dhcp_frame, make_network, make_port, packed

pytestmark = pytest.mark.system


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as made:
        yield made


def test_nobody_gets_the_gateways_mac_and_what_one_took_is_put_back(cluster: Cluster) -> None:
    """G1: the neighbours' traffic to the router went to that guest, and stayed broken after it was deleted."""
    node, one = cluster.nodes[0], make_port(2, "n1")
    network = make_network(one)
    mac = names.router_mac(cluster.installation, network.vni)
    thief = replace(make_port(3, "n1"), mac=mac)
    desired = cluster.apply(network)
    with cluster.guest(network, one) as guest:
        guest.static()
        assert guest.pings(OUTSIDE)
        # As version 0.1 let it: the record is there, and the tap is in the bridge's table.
        both = replace(network, ports=(one, thief))
        cluster.apply(both)
        node.space.call(node.plane.create_tap, thief)
        with pytest.raises(Conflict, match="itself"):
            node.space.call(node.plane.adopt_tap, both, thief)
        assert guest.pings(OUTSIDE)
        tap = names.tap(cluster.installation, thief.uuid)
        node.inside(network, f"ip link add {tap} type veth peer name other")
        node.inside(network, f"ip link set {tap} master {names.bridge(network.vni)} up")
        node.inside(network, f"bridge fdb replace {mac} dev {tap} master static")
        assert guest.reaches_not(OUTSIDE)
        node.inside(network, f"ip link del {tap}")
        assert guest.reaches_not(OUTSIDE)
        assert node.apply(desired) != []
        assert guest.pings(OUTSIDE)
        assert node.apply(desired) == []


def _decline(guest: Guest, server: IPv4Address, address: IPv4Address, mac: str, clid: bytes = b"") -> bytes:
    """DHCPDECLINE (RFC 2131, 4.4.4) for an address in the name of a MAC; sent from the guest's own."""
    options = b"\x35\x01\x04\x36\x04" + server.packed + b"\x32\x04" + address.packed + clid
    frame = dhcp_frame(mac, os.urandom(4), options)
    return frame[:6] + packed(guest.port.mac) + frame[12:]


def test_a_decline_in_a_neighbours_name_does_not_take_its_address(cluster: Cluster) -> None:
    """G2: it kept the neighbour without an address for ten minutes; the filter looked at the sender's MAC only."""
    node, one, two = cluster.nodes[0], make_port(2, "n1"), make_port(3, "n1")
    network = make_network(one, two)
    cluster.apply(network)
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as victim:
        guest.static()
        victim.dhcp()
        before = node.counters(network)[guest.name]["dhcp"]
        for kind in (b"\x04", b"\x07", b"\x01"):  # decline, release, discover
            frame = _decline(guest, network.gateway, two.address, two.mac)
            guest.send(frame.replace(b"\x35\x01\x04", b"\x35\x01" + kind))
        # In two fragments, the first of which ends before the MAC inside.
        for piece in _fragments(_decline(guest, network.gateway, two.address, two.mac)):
            guest.send(piece)
        guest.send(_decline(guest, network.gateway, two.address, one.mac, b"\x3d\x07\x01" + packed(two.mac)))
        assert guest.pings(network.gateway)
        assert node.counters(network)[guest.name]["dhcp"] - before >= 4
        victim.space.sh("ip addr flush dev eth0")
        assert IPv4Address(victim.dhcp()[0]) == two.address
        guest.space.sh("ip addr flush dev eth0")
        assert IPv4Address(guest.dhcp()[0]) == one.address


def _fragments(frame: bytes) -> list[bytes]:
    from tests.net.machines import checksum

    def headed(flags: int, payload: bytes) -> bytes:
        header = (
            frame[14:16] + (20 + len(payload)).to_bytes(2) + b"\x12\x34" + flags.to_bytes(2) + frame[22:24]
        )
        header += b"\0\0" + frame[26:34]
        header = header[:10] + checksum(header).to_bytes(2) + header[12:]
        return frame[:14] + header + payload

    body = frame[34:]
    return [headed(0x2000, body[:16]), headed(2, body[16:])]


@pytest.mark.parametrize("name", ["ignore", "infinite", "5m"])
def test_a_guest_of_any_name_gets_its_address_its_name_and_answers_to_it(cluster: Cluster, name: str) -> None:
    """G3: a guest called `ignore` got no address, `infinite` and `5m` were times of leases."""
    one, two = replace(make_port(2, "n1"), hostname=name), make_port(3, "n1")
    network = make_network(one, two)
    cluster.apply(network)
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as other:
        options = guest.dhcp()
        assert IPv4Address(options[0]) == one.address
        assert options[12] == name.encode()
        assert int.from_bytes(options[51]) == 24 * 3600
        _use_dns(other)
        assert other.pings(name)


def _use_dns(guest: Guest) -> None:
    """Configures the guest's resolver as a DHCP client does."""
    options = guest.dhcp()
    domain, rest = "", options[119]
    while rest[0]:
        domain, rest = f"{domain}.{rest[1 : 1 + rest[0]].decode()}", rest[1 + rest[0] :]
    text = f"search {domain[1:]}\nnameserver {IPv4Address(options[6])}\n"
    guest.space.sh(f"printf '{text}' > /run/resolv.conf; mount --bind /run/resolv.conf /etc/resolv.conf")
    guest.space.sh("echo 'hosts: files dns' > /run/nsswitch; mount --bind /run/nsswitch /etc/nsswitch.conf")


ASKS = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.settimeout(2)
    words = b"".join(bytes([len(w)]) + w.encode() for w in sys.argv[2].split("."))
    s.sendto(b"ab" + bytes([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]) + words + bytes([0, 0, 1, 0, 1]), (sys.argv[1], 53))
    assert s.recv(999)[7] == 1
"""


def test_guests_find_each_other_by_their_bare_names_and_under_internal(cluster: Cluster) -> None:
    """I: names ended in .local, which belongs to mDNS: a Debian guest never asks a DNS server for them."""
    one, two = replace(make_port(2, "n1"), hostname="web"), replace(make_port(3, "n1"), hostname="db")
    own = (("printer", IPv4Address("192.0.2.9")), ("db.example.net", two.address))
    network = make_network(one, two, dns_entries=own)
    cluster.apply(network)
    with cluster.guest(network, one) as web, cluster.guest(network, two) as db:
        for guest in (web, db):
            _use_dns(guest)
        assert db.pings("web") and db.pings("web.sf.internal")
        assert "192.0.2.9" in db.space.sh("getent hosts printer printer.sf.internal")
        assert web.pings("db.example.net")
        assert "printer.sf.internal" in db.space.sh("getent hosts 192.0.2.9")
        assert "web.sf.internal" in db.space.sh(f"getent hosts {one.address}")
        host = cluster.nodes[0].space
        end = next(word for word in host.sh("ip -4 -o addr").split() if word.startswith("169.254."))
        inside = IPv4Address(end.split("/")[0]) + 1
        assert host.works(f"python3 -c '{ASKS}' {inside} web.sf.internal"), "the host asks"
        assert not cluster.world.works(
            f"ip route add {inside}/32 via 10.9.9.1; python3 -c '{ASKS}' {inside} web"
        ), "nobody else"
        assert web.pings("db")
        assert not db.space.works("ping -n -c 1 -W 1 nobody")


def test_a_guest_without_a_way_out_on_one_network_has_no_default_route_there(cluster: Cluster) -> None:
    """G4: on a network without NAT another guest's floating address gave everybody a default route to nowhere."""
    one, two = make_port(2, "n1", floating=IPv4Address("10.9.9.100")), make_port(3, "n1")
    network = make_network(one, two, provide_nat=False)
    cluster.apply(network)
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as other:
        assert IPv4Address(guest.dhcp()[3]) == network.gateway
        assert 3 not in other.dhcp()
        assert guest.pings(OUTSIDE)
        assert guest.pings(two.address)
