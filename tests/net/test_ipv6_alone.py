"""Networks without IPv4: addresses, names, the way out, published ports; and nothing by IPv4."""

from dataclasses import replace
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from net import ipam
from net.plan import names
from net.plan.model import Network, Port, Published
from net.plan.nft import link_local
from tests.net.machines import OUTSIDE, Cluster, arp, dhcp_frame, ethernet, ipv4, udp
from tests.net.test_ipv6 import LOCAL, WORLD, _answers, _connected, _with_uplink, configured, routes, within
from tests.net.test_ipv6_published import told
from tests.net.test_published import ask, serve
from tests.net.test_spoofing import MARK, ipv6

pytestmark = pytest.mark.system


def port(number: int, node: str, **more: object) -> Port:
    return Port(
        f"p{number}", f"02:00:00:66:00:{number:02x}", ipam.UNKNOWN[number], f"guest{number}", node, **more
    )  # type: ignore[arg-type]


def network(*ports: Port, **more: object) -> Network:
    known = {"netblock6": LOCAL, "router_node": "n1", "ports": ports, **more}
    return Network("six", ipam.random_vni([]), "six", ipam.UNKNOWN, ipam.UNKNOWN[1], **known)  # type: ignore[arg-type]


def test_a_network_without_ipv4_has_all_that_one_with_it_has(tmp_path: Path) -> None:
    web = (Published("tcp", 8080, 80),)
    ports = port(2, "n1", published=web), port(3, "n2"), port(4, "n1")
    alone = network(*ports)
    with Cluster(tmp_path, 2) as cluster:
        _connected(cluster)
        _with_uplink(cluster)
        cluster.world.sh(f"dnsmasq -p 53 --pid-file= -u root -a {OUTSIDE} --address=/example.net/{WORLD}")
        for node in cluster.nodes:
            node.space.sh("ip6tables -P FORWARD DROP")
        desired = cluster.apply(alone, resolvers=(OUTSIDE,))
        first, second = cluster.nodes
        with (
            cluster.guest(alone, ports[0]) as one,
            cluster.guest(alone, ports[1]) as far,
            cluster.guest(alone, ports[2]) as near,
        ):
            assert configured(one, far, near) == [LOCAL[2], LOCAL[3], LOCAL[4]]
            for node in cluster.nodes:
                assert node.apply(desired) == []
            assert "inet " not in first.inside(alone, f"ip -4 addr show dev {names.bridge(alone.vni)}")
            assert "0.0.0." not in first.inside(alone, "ip -4 neigh") + second.inside(alone, "ip -4 neigh")
            for address in (LOCAL[1], LOCAL[3], LOCAL[4], f"{link_local(far.port.mac)}%eth0"):
                assert one.pings(address)
            assert within(lambda: far.space.sh("cat /proc/sys/net/ipv6/conf/eth0/mtu").strip() == "1450")
            for guest in (one, far):
                assert within(lambda guest=guest: "via fe80::1" in routes(guest))
                assert guest.pings(WORLD)
                assert _answers(guest, "guest3.sf.internal", 28) == [LOCAL[3].packed]
                assert _answers(guest, "guest3.sf.internal", 1) == []
                assert _answers(guest, LOCAL[3].reverse_pointer, 12)[0].startswith(b"\6guest3")
                assert _answers(guest, "www.example.net", 28) == [WORLD.packed]
            serve(one.space, "tcp6", 80, "web")
            assert told(cluster.world, "2001:db8:9::1", 8080) == "web 2001:db8:9::fe"
            assert ask(cluster.world, first.address, 8080) == ""  # there is nothing to translate to
            second.apply(replace(desired, networks=(moved := replace(alone, router_node="n2"),)))
            first.apply(replace(desired, networks=(moved,)))
            assert told(cluster.world, "2001:db8:9::2", 8080) == "web 2001:db8:9::fe"
            assert far.pings(WORLD)


ONE = port(2, "n1")
ATTEMPTS = {
    "an ARP request": arp(1, ONE.mac, "0.0.0.2", "0.0.0.3"),
    "an ARP probe": arp(1, ONE.mac, "0.0.0.0", "0.0.0.3"),
    "an ARP answer for the router": arp(2, ONE.mac, "0.0.0.1", "0.0.0.3"),
}  # fmt: skip


def test_nothing_goes_by_ipv4_and_a_neighbours_address_is_nobody_elses(tmp_path: Path) -> None:
    ports = ONE, port(3, "n2"), port(4, "n1")
    alone, everybody = network(*ports), "ff:ff:ff:ff:ff:ff"
    with Cluster(tmp_path, 2) as cluster, cluster.guests(alone, *ports) as (one, far, near):
        configured(one, far, near)
        assert one.pings(LOCAL[3])
        frames = [ethernet(ONE.mac, everybody, 0x0806, body) for body in ATTEMPTS.values()]
        frames.append(dhcp_frame(ONE.mac, b"abcd", b"\x35\1\1"))
        for source in ("0.0.0.2", "0.0.0.0", "0.0.0.3", "10.42.0.2", "169.254.64.1"):
            for target in ("0.0.0.3", "255.255.255.255", "198.51.100.1"):
                frames.append(ethernet(ONE.mac, everybody, 0x0800, ipv4(source, target, 17, udp(9, 9, MARK))))
        frames.append(
            ethernet(ONE.mac, everybody, 0x8100, b"\0\5\x86\xdd" + ipv6(LOCAL[2], LOCAL[3], 59, MARK))
        )
        frames.append(ethernet(ONE.mac, everybody, 0x88CC, MARK))
        forged = [
            ipv6(LOCAL[3], LOCAL[4], 59, MARK),
            ipv6(LOCAL[9], LOCAL[4], 59, MARK),
            ipv6(IPv6Address("::ffff:0.0.0.2"), LOCAL[4], 59, MARK),
        ]
        before = one.node.counters(alone)[one.name]
        far.received.clear()
        near.received.clear()
        for frame in frames:
            one.send(frame)
        for body in forged:
            one.send(ethernet(ONE.mac, everybody, 0x86DD, body))
        one.send(own := ethernet(ONE.mac, everybody, 0x86DD, ipv6(LOCAL[2], LOCAL[4], 59, MARK)))
        assert within(lambda: own in near.received and own in far.received)  # sent after them
        for guest in (far, near):
            assert [f for f in guest.received if f[12:14] != b"\x86\xdd"] == []
            assert [f for f in guest.received if MARK in f] == [own]
        after = one.node.counters(alone)[one.name]
        assert {r: after[r] - before[r] for r in after if after[r] != before[r]} == {
            "other": len(frames),
            "ipv6": 3,
        }
