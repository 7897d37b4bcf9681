"""The doctor says in words what is wrong, and only that."""

from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from net.doctor import Finding
from net.plan import names
from net.plan.model import NodeNetworks
from tests.net.machines import OUTSIDE, Cluster, Node, make_network, make_port

pytestmark = pytest.mark.system


def _asked(node: Node, desired: NodeNetworks) -> list[Finding]:
    return node.space.call(node.plane.doctor, replace(desired, node=node.name, underlay=node.address))


def test_a_healthy_node_has_no_findings_and_damage_is_named(tmp_path: Path) -> None:
    with Cluster(tmp_path, 2) as cluster:
        one, two = make_port(2, "n1", floating=IPv4Address("10.9.9.100")), make_port(3, "n2")
        network = make_network(one, two)
        desired = cluster.apply(network)
        node = cluster.nodes[0]
        (off,) = _asked(node, desired)
        assert off.text.startswith("guest2 has no tap here")
        with cluster.guest(network, one):
            assert _asked(node, desired) == []
            bridge = names.bridge(network.vni)
            node.inside(network, f"ip link set {bridge} mtu 1300")
            node.space.sh("ip neigh del proxy 10.9.9.100 dev eth0; ip link set eth0 mtu 1400")
            texts = [f"{f.network}: {f.text}" for f in _asked(node, desired)]
            assert f"lan: the bridge device {bridge} differs from what is desired: mtu_bytes is 1300" in texts
            assert "host: the ARP proxy 10.9.9.100 of eth0 is missing" in texts
            assert "lan: packets of 1450 bytes do not fit the mesh, which carries 1350" in texts
            assert len(texts) == 3


@pytest.mark.parametrize(
    "rule",
    [
        "iptables -A FORWARD -j REJECT",
        "iptables -N STRICT && iptables -A STRICT -j DROP && iptables -A FORWARD -j STRICT",
        "nft 'add table inet strict; add chain inet strict through { type filter hook forward priority 0; };"
        ' add rule inet strict through iifname != "eth0" drop\'',
    ],
)
def test_a_host_rule_that_blocks_the_uplink_is_named_and_its_fix_works(tmp_path: Path, rule: str) -> None:
    with Cluster(tmp_path) as cluster:
        one = make_port(2, "n1")
        network = make_network(one)
        node = cluster.nodes[0]
        desired = cluster.apply(network)
        with cluster.guest(network, one) as guest:
            guest.static()
            assert guest.pings(OUTSIDE)
            node.space.sh(rule)
            assert guest.reaches_not(OUTSIDE)
            findings = _asked(node, desired)
            assert findings
            assert all("host's firewall refuses" in finding.text for finding in findings)
            for finding in findings:
                node.space.sh(finding.fix.replace('"', '\\"'))
            assert guest.pings(OUTSIDE)
            assert _asked(node, desired) == []


def test_a_firewall_that_drops_by_policy_is_no_finding_once_our_rules_are_in_it(tmp_path: Path) -> None:
    with Cluster(tmp_path, 2) as cluster:
        network = make_network(make_port(2, "n2"))
        node = cluster.nodes[0]
        node.space.sh("iptables -P FORWARD DROP; iptables -P INPUT DROP; nft add table inet strict")
        node.space.sh('nft "add chain inet strict in { type filter hook input priority 0; policy drop; }"')
        desired = cluster.desired(network)
        assert len([f for f in _asked(node, desired) if "host's firewall" in f.text]) > 3
        cluster.apply(network)
        assert _asked(node, desired) == []


def test_rules_about_other_devices_are_not_blamed(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        network = make_network()
        node = cluster.nodes[0]
        node.space.sh("iptables -P FORWARD DROP; iptables -A FORWARD -i docker0 -j DROP")
        node.space.sh("iptables -A FORWARD -s 192.168.77.0/24 -j DROP; iptables -A INPUT -i eth7 -j DROP")
        desired = cluster.apply(network)
        assert _asked(node, desired) == []
