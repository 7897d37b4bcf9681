"""Two installations on one host: neither sees, touches or wakes the other."""

from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from net.errors import Failed
from net.plane import Plane
from tests.net.machines import OUTSIDE, Cluster, Guest, Node, make_network, make_port

pytestmark = pytest.mark.system


def test_one_is_wiped_and_the_others_guests_keep_talking(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        installation = f"{int(cluster.installation, 16) ^ 0xFFFF:08x}"
        plane = Plane(installation, tmp_path / "other")
        neighbour = Node("n1", node.address, node.space, plane)
        one, two = make_port(2, "n1"), make_port(3, "n1")
        mine = make_network(one, two)
        # The same addresses, MACs and ports, and as near in number as two can be.
        theirs = make_network(one, replace(two, floating=IPv4Address("10.9.9.101")), vni=mine.vni ^ 1)
        desired = cluster.apply(mine)
        other = replace(cluster.desired(theirs), installation=installation)
        neighbour.apply(other)
        node.space.sh("iptables -P FORWARD DROP")
        assert node.apply(desired) != []
        assert neighbour.apply(other) != []
        assert node.apply(desired) == neighbour.apply(other) == []
        with (
            cluster.guest(mine, one) as a,
            cluster.guest(mine, two) as b,
            Guest(neighbour, theirs, one) as c,
            Guest(neighbour, theirs, two) as d,
        ):
            for guest in (a, b, c, d):
                guest.dhcp()
            talking = [
                b.space.popen_quietly(f"ping -n -i 0.2 -w 60 -c 40 {t}") for t in (one.address, OUTSIDE)
            ]
            assert d.pings(one.address)
            neighbour.remove_all()
            assert not [name for name in node.space.sh("ls /run/netns").split() if installation in name]
            assert installation not in node.space.sh("ip -d link; nft list ruleset; ip netns")
            assert node.apply(desired) == []
            for process in talking:
                assert "40 received" in process.communicate(timeout=60)[0]
            assert a.pings(two.address)
        assert not (tmp_path / "other" / "net").exists()


def test_a_vni_that_another_installation_uses_on_this_host_is_refused_in_words(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        mine = make_network(make_port(2, "n1"))
        desired = cluster.apply(mine)
        plane = Plane("0000000a", tmp_path / "other")
        neighbour = Node("n1", node.address, node.space, plane)
        fine = make_network(name="fine", block="10.50.0.0/24")
        with pytest.raises(Failed, match=f"vx-{mine.vni:06x}") as refused:
            neighbour.apply(replace(cluster.desired(mine, fine), installation="0000000a"))
        assert f"VNI {mine.vni}" in refused.value.hint
        assert plane.namespace(fine) in node.space.sh("ls /run/netns")
        assert node.apply(desired) == []
        neighbour.remove_all()
        assert node.apply(desired) == []


def test_links_and_namespaces_of_others_with_such_names_are_left_alone(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        node = cluster.nodes[0]
        node.space.sh("ip netns add sf-other; ip netns add lab; ip link add sft-mine type bridge")
        node.space.sh("nft add table inet sf-mine; nft add table ip sf-12345678")
        network = make_network(make_port(2, "n1"))
        cluster.apply(network)
        node.remove_all()
        assert set(node.space.sh("ip netns list").split()) == {"sf-other", "lab"}
        assert "sft-mine" in node.space.sh("ip link")
        assert {"sf-mine", "sf-12345678"} <= set(node.space.sh("nft list tables").split())
