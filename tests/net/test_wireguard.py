"""The mesh inside the administrator's WireGuard: its MTU, and that nothing goes outside it."""

import shutil
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from net import NodeNetworks, Peer
from tests.net.machines import Cluster, make_network, make_port

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not shutil.which("wireguard-go"), reason="wireguard-go is not installed"),
]


def test_packets_of_full_size_pass_and_nothing_of_the_mesh_is_seen_outside_the_tunnel(tmp_path: Path) -> None:
    with Cluster(tmp_path, 2) as cluster:
        inner = {node.name: IPv4Address(f"10.8.0.{n}") for n, node in enumerate(cluster.nodes, 1)}
        keys = {node.name: node.space.sh("wg genkey").strip() for node in cluster.nodes}
        for node, other in (cluster.nodes, cluster.nodes[::-1]):
            public = node.space.sh(f"echo {keys[other.name]} | wg pubkey").strip()
            node.space.sh(
                "mkdir -p /run/wireguard; wireguard-go wg0 >/dev/null 2>&1 </dev/null\n"
                f"echo {keys[node.name]} > /run/key; wg set wg0 listen-port 51820 private-key /run/key peer {public}"
                f" endpoint {other.address}:51820 allowed-ips {inner[other.name]}/32\n"
                f"ip addr add {inner[node.name]}/24 dev wg0; ip link set wg0 up"
            )
        one, two = make_port(2, "n1"), make_port(3, "n2")
        mtu = cluster.nodes[0].space.call(cluster.nodes[0].plane.largest_mtu, inner["n1"])
        assert mtu == 1420 - 50
        network = make_network(one, two, mtu_bytes=mtu)
        peers = tuple(Peer(name, address) for name, address in inner.items())
        for node in cluster.nodes:
            desired = NodeNetworks(cluster.installation, node.name, (network,), peers, inner[node.name])
            node.space.call(node.plane.apply, desired)
            assert node.space.call(node.plane.apply, replace(desired)) == []
        with cluster.guest(network, one) as guest, cluster.guest(network, two) as friend:
            guest.static()
            friend.static()
            with (
                cluster.world.sniffing("udp port 4789") as clear,
                cluster.world.sniffing("udp port 51820") as wrapped,
            ):
                assert guest.pings(two.address, size=mtu - 28)
            assert clear == set()
            assert len(wrapped) == 2
