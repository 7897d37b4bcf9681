"""Several nodes: guests that meet across the mesh, routers that move, nodes that lose their lease or all they had."""

import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from net.errors import Failed
from net.plan import names
from tests.net.machines import OUTSIDE, Cluster, make_network, make_port

pytestmark = pytest.mark.system
FLOATING = IPv4Address("10.9.9.100")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, 2) as made:
        yield made


def test_guests_on_two_nodes_meet_with_packets_of_full_size_through_closed_firewalls(
    cluster: Cluster,
) -> None:
    for node in cluster.nodes:
        node.space.sh("sysctl -qw net.bridge.bridge-nf-call-iptables=1")
        node.space.sh("iptables -P FORWARD DROP; iptables -P INPUT DROP")
    one, two = make_port(2, "n1"), make_port(3, "n2", floating=FLOATING)
    network = make_network(one, two)
    desired = cluster.apply(network)
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as far:
        assert IPv4Address(guest.dhcp()[0]) == one.address
        assert IPv4Address(far.dhcp()[0]) == two.address
        assert guest.pings(two.address, size=network.mtu_bytes - 28)
        assert far.pings(network.gateway)
        assert far.pings(OUTSIDE)
        assert guest.pings(FLOATING)
        assert far.pings(FLOATING)
        assert cluster.world.works(f"ping -n -c 3 -W 2 {FLOATING}")
        for node in cluster.nodes:
            assert node.apply(replace(desired, networks=(network,))) == []


def test_arp_for_known_guests_is_answered_on_the_spot_and_crosses_no_mesh(cluster: Cluster) -> None:
    one, two = make_port(2, "n1"), make_port(3, "n2")
    network = make_network(one, two)
    cluster.apply(network)
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as far:
        guest.static()
        far.static()
        assert guest.pings(two.address)
        asked = [frame for frame in far.received if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1"]
        assert asked == []


def test_vxlan_from_anybody_but_a_node_is_dropped(cluster: Cluster) -> None:
    one, two = make_port(2, "n1"), make_port(3, "n2")
    network = make_network(one, two)
    cluster.apply(network)
    with cluster.guest(network, one) as guest:
        guest.static()
        world = cluster.world
        world.sh(
            f"ip link add evil type vxlan id {network.vni} local 10.9.9.254 remote 10.9.9.1 dstport 4789"
            f" && ip link set evil address {two.mac} up && ip addr add {two.address}/24 dev evil"
        )
        before = len(guest.received)
        assert not world.works(f"ping -n -c 3 -i 0.2 -W 1 -I evil {one.address}")
        assert [
            f for f in guest.received[before:] if f[6:12] == bytes.fromhex(two.mac.replace(":", ""))
        ] == []
        rules = cluster.nodes[0].space.sh("nft list table inet sf-" + cluster.installation)
        dropped = next(line for line in rules.splitlines() if "dport 4789" in line)
        assert "packets 0" not in dropped


def test_a_node_that_is_no_peer_any_more_is_not_heard_though_it_goes_on_sending(cluster: Cluster) -> None:
    """One that was lost, with a guest that others have by now."""
    one, two = make_port(2, "n1"), make_port(3, "n2")
    network = make_network(one, two)
    desired = cluster.apply(network)
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as far:
        guest.static()
        far.static()
        assert far.pings(one.address)
        others = tuple(peer for peer in desired.peers if peer.node != "n2")
        cluster.nodes[0].apply(replace(desired, networks=(network,), peers=others))
        before = len(guest.received)
        assert far.reaches_not(one.address)
        assert guest.reaches_not(two.address)
        mac = bytes.fromhex(two.mac.replace(":", ""))
        assert [frame for frame in guest.received[before:] if frame[6:12] == mac] == []
        cluster.nodes[0].apply(replace(desired, networks=(network,)))
        assert far.pings(one.address)


def test_a_router_moves_and_its_floating_ips_answer_from_the_other_node(cluster: Cluster) -> None:
    one, two = make_port(2, "n1", floating=FLOATING), make_port(3, "n2")
    network = make_network(one, two)
    cluster.apply(network)
    ping = f"ping -n -c 5 -i 0.3 -W 1 {FLOATING}"
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as far:
        guest.dhcp()
        far.dhcp()
        assert cluster.world.works(ping)
        assert far.pings(OUTSIDE)
        learned = cluster.world.sh(f"ip neigh show {FLOATING}")
        moved = replace(network, router_node="n2")
        cluster.apply(moved)
        assert cluster.world.works(ping)
        assert cluster.world.sh(f"ip neigh show {FLOATING}") != learned
        assert guest.pings(OUTSIDE)
        assert far.pings(OUTSIDE)
        assert guest.pings(network.gateway)
        assert str(network.gateway) not in cluster.nodes[0].inside(network, "ip addr")
        assert str(FLOATING) not in cluster.nodes[0].space.sh("ip neigh show proxy; ip route")


def test_a_node_that_lost_its_lease_stops_routing_and_its_guests_stay(cluster: Cluster) -> None:
    one, two = make_port(2, "n1", floating=FLOATING), make_port(3, "n2")
    network = make_network(one, two)
    desired = cluster.apply(network)
    node = cluster.nodes[0]
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as far:
        guest.static()
        far.static()
        assert guest.pings(OUTSIDE)
        assert node.space.call(node.plane.drop_routers) != []
        assert node.space.call(node.plane.drop_routers) == []
        assert guest.reaches_not(network.gateway)
        assert guest.pings(two.address)
        assert node.space.processes() == []
        assert str(FLOATING) not in node.space.sh("ip neigh show proxy; ip route")
        node.apply(replace(desired, networks=(network,)))
        assert guest.pings(OUTSIDE)


def test_after_a_reboot_desired_state_alone_brings_back_what_still_exists(tmp_path: Path) -> None:
    with Cluster(tmp_path, 2) as cluster:
        one, two = make_port(2, "n1", floating=FLOATING), make_port(3, "n2")
        network, doomed = make_network(one, two), make_network(name="doomed", block="10.44.0.0/24")
        desired = cluster.apply(network, doomed)
        with cluster.guest(network, two) as far:
            far.static()
            assert far.pings(OUTSIDE)
            cluster.nodes[0].space.power_off()
            cluster.world.sh("ip link del n1 2>/dev/null", check=False)
            cluster.nodes[0] = cluster.add_node("n1")
            node = cluster.nodes[0]
            node.apply(replace(desired, networks=(network,)))
            assert node.space.sh("ls /run/netns").split() == [node.plane.namespace(network)]
            assert far.pings(OUTSIDE)
            with cluster.guest(network, one) as guest:
                guest.dhcp()
                assert guest.pings(two.address)
                assert cluster.world.works(f"ping -n -c 3 -W 2 {FLOATING}")


def test_a_network_whose_packets_do_not_fit_the_underlay_is_refused_with_the_size_that_fits(
    tmp_path: Path,
) -> None:
    with Cluster(tmp_path, 2, mtu=1400) as cluster:
        large, small = make_network(mtu_bytes=1450), make_network(name="small", mtu_bytes=1350)
        node = cluster.nodes[0]
        with pytest.raises(Failed, match="which carries 1350") as refused:
            node.apply(cluster.desired(large, small))
        assert "1500" in refused.value.hint
        assert node.space.sh("ls /run/netns").split() == [node.plane.namespace(small)]


def test_a_floating_ip_answers_guests_of_other_networks_here_and_on_other_nodes(cluster: Cluster) -> None:
    served = make_port(2, "n1", floating=FLOATING)
    near, far = make_port(2, "n1", "10.43.0.0/24"), make_port(2, "n2", "10.44.0.0/24")
    network = make_network(served)
    here = make_network(near, name="here", block="10.43.0.0/24")
    there = make_network(far, name="there", block="10.44.0.0/24", router_node="n2")
    cluster.apply(network, here, there)
    with (
        cluster.guest(network, served) as server,
        cluster.guest(here, near) as neighbour,
        cluster.guest(there, far) as stranger,
    ):
        for guest in (server, neighbour, stranger):
            guest.static()
        assert neighbour.pings(FLOATING)
        assert stranger.pings(FLOATING)
        assert neighbour.reaches_not(served.address)
        assert stranger.reaches_not(served.address)


_DAMAGE = {
    "the bridge is down": "ip link set {br} down",
    "a port is off the bridge": "ip link set {vx} nomaster",
    "a device has another MTU": "ip link set {br} mtu 1300",
    "the bridge is gone": "ip link del {br}",
    "the mesh device is gone": "ip link del {vx}",
    "the uplink is gone": "ip link del {up}",
    "the gateway's address is gone": "ip addr flush dev {br}",
    "a forwarding entry is gone": "bridge fdb del {far} dev {vx} self",
    "a forwarding entry leads elsewhere": "bridge fdb add 02:00:00:00:00:77 dev {vx} dst 10.9.9.77",
    "a neighbour is gone": "ip neigh flush all nud permanent",
    "the default route is gone": "ip route flush table main",
    "a filter is flushed": "nft flush ruleset",
    "a tap's filter is flushed": "nft flush chain bridge {table} p-{tap}",
    "a filter got a rule": "nft insert rule inet {table} entry accept",
    "a policy is open": 'nft "chain inet {table} entry {{ policy accept ; }}"',
    "forwarding is off": "sysctl -qw net.ipv4.ip_forward=0",
    "a tap is down": "ip link set {tap} down",
    "a tap learns": "bridge link set dev {tap} learning on",
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_what_a_hand_changed_in_a_namespace_is_repaired(cluster: Cluster, damage: str) -> None:
    one, two = make_port(2, "n1"), make_port(3, "n2")
    network = make_network(one, two)
    desired = cluster.apply(network)
    node = cluster.nodes[0]
    with cluster.guest(network, one) as guest, cluster.guest(network, two) as far:
        guest.static()
        far.static()
        words = {
            "br": names.bridge(network.vni),
            "vx": names.vxlan(network.vni),
            "up": names.uplink(network.vni),
            "table": names.table(cluster.installation),
            "tap": guest.name,
            "far": two.mac,
        }
        node.inside(network, f"sh -c '{_DAMAGE[damage].format(**words)}'")
        assert node.apply(replace(desired, networks=(network,))) != []
        assert node.apply(replace(desired, networks=(network,))) == []
        assert guest.pings(two.address)
        assert guest.pings(OUTSIDE)


@pytest.mark.parametrize(
    "command", ["nft delete table inet {table}", "kill -9 $(pidof dnsmasq)", "ip netns del {ns}"]
)
def test_what_a_hand_changed_on_the_host_is_repaired(cluster: Cluster, command: str) -> None:
    one = make_port(2, "n1")
    network = make_network(one)
    desired = cluster.apply(network)
    node = cluster.nodes[0]
    words = {"table": f"sf-{cluster.installation}", "ns": node.plane.namespace(network)}
    if "dnsmasq" in command:
        for pid in node.space.processes():
            node.space.sh(f"kill -9 {pid}")
        while node.space.processes():
            time.sleep(0.01)
    else:
        node.space.sh(command.format(**words))
    assert node.apply(replace(desired, networks=(network,))) != []
    assert node.apply(replace(desired, networks=(network,))) == []
    with cluster.guest(network, one) as guest:
        guest.dhcp()
        assert guest.pings(OUTSIDE)
