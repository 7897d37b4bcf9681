"""Networks: iperf3 over the mesh beside a hand-made VXLAN, and what making and checking networks costs.

All of it in namespaces that are made for it (tests/net/machines.py): two nodes and a switch. The guests are veth
ends in place of taps, so that what is measured is the kernel's path with our filters and without, and no copying of
frames in Python. Figures of times are medians of what one process did, in turns where there is a peer.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

from benchmarks._harness import ROOT, Bench

sys.path.insert(0, str(ROOT))

from net.kernel import taps
from net.kernel.netns import Netns
from net.plan import names
from net.plan.facts import HOST, Facts, Observed
from net.plan.guards import ROUTER
from net.plan.model import Allow, Network, NodeNetworks, Peer, Port, Published
from net.plan.plan import plan
from net.plan.target import target
from tests.net.machines import Cluster, Node, Space, make_network, make_port

_SECONDS = 3
_MANY = 200


def run(bench: Bench) -> None:
    _throughput(bench)
    _on_one_node(bench)
    _from_the_lan(bench)
    _making(bench)
    _moving(bench)
    _planning(bench)
    _reconciling(bench)


def _throughput(bench: Bench) -> None:
    one, two = make_port(2, "n1"), make_port(3, "n2")
    network = make_network(one, two)
    with Cluster(bench.dir("mesh"), 2) as cluster:
        cluster.apply(network)
        with (
            _veth_guest(cluster.nodes[0], network, one) as left,
            _veth_guest(cluster.nodes[1], network, two) as right,
            _by_hand(cluster) as (plain_left, plain_right),
        ):
            ours, theirs = [], []
            for _ in range(5):
                ours.append(_iperf(left, right, str(two.address)))
                theirs.append(_iperf(plain_left, plain_right, "10.99.0.2"))
    bench.number("mesh_gbits", statistics.median(ours), "Gbit/s")
    bench.number("handmade_vxlan_gbits", statistics.median(theirs), "Gbit/s")
    bench.ratio("mesh_vs_handmade", statistics.median(ours), statistics.median(theirs), at_least=0.95)


@contextmanager
def _veth_guest(node: Node, network: Network, port: Port) -> Iterator[Space]:
    """A guest whose port is a veth end with the tap's name."""
    name = names.tap(node.plane.installation, port.uuid)
    with Space() as guest:
        guest.sh(
            f"ip link add eth0 address {port.mac} mtu 1450 type veth peer name {name} netns {node.space.tid}"
        )
        guest.sh(f"ip addr add {port.address}/24 dev eth0 && ip link set eth0 up")
        node.space.sh(f"ip link set {name} alias '{names.table(node.plane.installation)} port {port.uuid}'")
        node.space.call(node.plane.adopt_tap, network, port)
        yield guest


@contextmanager
def _by_hand(cluster: Cluster) -> Iterator[tuple[Space, Space]]:
    """What a person types: bridge, VXLAN with learning and a remote end, a guest on a veth; no filters."""
    with Space() as left, Space() as right:
        for number, (guest, node) in enumerate(((left, cluster.nodes[0]), (right, cluster.nodes[1])), 1):
            far = cluster.nodes[2 - number].address
            node.space.sh(
                "ip link add hand type bridge && ip link set hand mtu 1450 up"
                f" && ip link add handvx mtu 1450 type vxlan id 77 local {node.address} remote {far} dstport 4789"
                " && ip link set handvx master hand up"
            )
            guest.sh(f"ip link add eth0 mtu 1450 type veth peer name hand0 netns {node.space.tid}")
            node.space.sh("ip link set hand0 mtu 1450 master hand up")
            guest.sh(f"ip addr add 10.99.0.{number}/24 dev eth0 && ip link set eth0 up")
        yield left, right


def _iperf(client: Space, server: Space, address: str, port: int = 5201) -> float:
    """Gbit/s of one TCP stream."""
    listening = server.popen_quietly("iperf3 -s -1")
    for _ in range(100):
        if ":5201" in server.sh("ss -Hltn"):
            break
        time.sleep(0.05)
    printed = client.sh(f"iperf3 -c {address} -p {port} -t {_SECONDS} -J | grep bits_per_second | tail -1")
    listening.communicate(timeout=60)
    return float(printed.split(":")[1].strip().rstrip(",")) / 1e9


def _on_one_node(bench: Bench) -> None:
    """One TCP stream to a guest with rules, from another and through a published port, beside a plain bridge."""
    rules = tuple(Allow("tcp", ((n, n),), IPv4Network("192.0.2.0/24")) for n in range(10_000, 10_049))
    web = (Published("tcp", 5201, 5201),)
    one = make_port(2, "n1")
    two = make_port(3, "n1", allowed=(*rules, Allow("tcp", ((5201, 5201),))), published=web)
    network = make_network(one, two)
    with Cluster(bench.dir("node"), 1) as cluster, Space() as near, Space() as far:
        node = cluster.nodes[0]
        cluster.apply(network)
        node.space.sh("ip link add hand type bridge && ip link set hand mtu 1450 up")
        for number, guest in enumerate((near, far), 1):
            guest.sh(f"ip link add eth0 mtu 1450 type veth peer name hand{number} netns {node.space.tid}")
            node.space.sh(f"ip link set hand{number} mtu 1450 master hand up")
            guest.sh(f"ip addr add 10.99.0.{number}/24 dev eth0 && ip link set eth0 up")
        with _veth_guest(node, network, one) as left, _veth_guest(node, network, two) as right:
            right.sh(f"ip route add default via {network.gateway}")
            rates: dict[str, list[float]] = {"plain": [], "rules": [], "published": []}
            for _ in range(7):
                rates["plain"].append(_iperf(near, far, "10.99.0.2"))
                rates["rules"].append(_iperf(left, right, str(two.address)))
                rates["published"].append(_iperf(cluster.world, right, str(node.address)))
    medians = {what: statistics.median(each) for what, each in rates.items()}
    for what, rate in medians.items():
        bench.number(f"{what}_gbits", rate, "Gbit/s")
    bench.ratio("rules_vs_bridge", medians["rules"], medians["plain"], at_least=0.95)
    bench.ratio("published_vs_bridge", medians["published"], medians["plain"], at_least=0.95)


def _from_the_lan(bench: Bench) -> None:
    """A host beside three nodes speaks to a guest on the first by a port of the third, which routes, over the mesh.

    Beside it the same way without us: the third node forwards into a VXLAN made by hand, nothing is translated.
    """
    many = tuple(Allow("tcp", ((n, n),), IPv4Network("192.0.2.0/24")) for n in range(10_000, 10_049))
    one = make_port(2, "n1", published=(Published("tcp", 5201, 5201),))
    rules = (*many, Allow("tcp", ((5201, 5201),)))
    two = make_port(3, "n1", published=(Published("tcp", 5202, 5201),), allowed=rules)
    network = make_network(one, two, router_node="n3", netblock6=IPv6Network("fd42:1:2:3::/64"))
    with Cluster(bench.dir("lan"), 3) as cluster, Space() as plain:
        world, near, router = cluster.world, cluster.nodes[0], cluster.nodes[2]
        world.sh("ip addr add 2001:db8:9::fe/64 dev switch nodad")
        for number, node in enumerate(cluster.nodes, 1):
            node.space.sh(
                f"ip addr add 2001:db8:9::{number}/64 dev eth0 nodad; ip -6 route add default via 2001:db8:9::fe\n"
                "sysctl -qw net.ipv6.conf.all.forwarding=1 net.ipv4.ip_forward=1"
            )
        for node, far in ((near, router), (router, near)):
            node.space.sh(
                "ip link add hand type bridge && ip link set hand mtu 1450 up\n"
                f"ip link add handvx mtu 1450 type vxlan id 77 local {node.address} remote {far.address} dstport 4790\n"
                "ip link set handvx master hand up"
            )
        plain.sh(
            f"ip link add eth0 mtu 1450 type veth peer name hand0 netns {near.space.tid}; ip link set eth0 up"
        )
        near.space.sh("ip link set hand0 mtu 1450 master hand up")
        for space, dev, last in ((plain, "eth0", 1), (router.space, "hand", 254)):
            space.sh(f"ip addr add 10.99.0.{last}/24 dev {dev}; ip addr add fd99::{last}/64 dev {dev} nodad")
        plain.sh("ip route add default via 10.99.0.254; ip -6 route add default via fd99::254")
        world.sh("ip route add 10.99.0.0/24 via 10.9.9.3; ip -6 route add fd99::/64 via 2001:db8:9::3")
        cluster.apply(network)
        with _veth_guest(near, network, one) as free, _veth_guest(near, network, two) as ruled:
            for guest, port in ((free, one), (ruled, two)):
                guest.sh(
                    f"ip addr add {network.address6(port.address)}/64 dev eth0 nodad\n"
                    f"ip route add default via {network.gateway}; ip -6 route replace default via {ROUTER} dev eth0"
                )
            rates: dict[str, list[float]] = {}
            for _ in range(5):
                for kind, own, hand in (
                    ("ipv4", "10.9.9.3", "10.99.0.1"),
                    ("ipv6", "2001:db8:9::3", "fd99::1"),
                ):
                    rates.setdefault(f"lan_{kind}_by_hand", []).append(_iperf(world, plain, hand))
                    for what, guest, at in (("published", free, 5201), ("published_ruled", ruled, 5202)):
                        rates.setdefault(f"lan_{kind}_{what}", []).append(_iperf(world, guest, own, at))
    medians = {what: statistics.median(each) for what, each in rates.items()}
    for what, rate in medians.items():
        bench.number(f"{what}_gbits", rate, "Gbit/s")
    for kind in ("ipv4", "ipv6"):
        for what in ("published", "published_ruled"):
            own, hand = medians[f"lan_{kind}_{what}"], medians[f"lan_{kind}_by_hand"]
            bench.ratio(f"lan_{kind}_{what}_vs_by_hand", own, hand, at_least=0.95)


def _timed(node: Node, function: Callable[..., Any], *arguments: Any) -> float:
    """Wall clock in ms, in the node's own thread."""

    def call() -> float:
        started = time.perf_counter()
        function(*arguments)
        return (time.perf_counter() - started) * 1000

    return node.space.call(call)


def _making(bench: Bench) -> None:
    network_ms, tap_ms = [], []
    with Cluster(bench.dir("making"), 1) as cluster:
        node = cluster.nodes[0]
        for number in range(1, 16):
            port = make_port(2, "n1")
            network = make_network(port, vni=number)
            desired = replace(cluster.desired(network), node="n1", underlay=node.address)
            network_ms.append(_timed(node, node.plane.apply, desired))
            tap_ms.append(
                _timed(node, lambda: (node.plane.create_tap(port), node.plane.adopt_tap(network, port)))  # noqa: B023
            )
            node.apply(replace(desired, networks=()))
    bench.number("network_create_ms", statistics.median(network_ms), "ms", at_most=60)
    bench.number("tap_with_filters_ms", statistics.median(tap_ms), "ms", at_most=15)


def _moving(bench: Bench) -> None:
    """What of a tap's cost is the kernel's: made in the host's namespace and moved, or made where it is wanted."""
    took: dict[str, list[float]] = {"made": [], "moved": [], "made_inside": []}
    network = make_network(make_port(2, "n1"))
    with Cluster(bench.dir("moving"), 1) as cluster:
        node = cluster.nodes[0]
        cluster.apply(network)

        def inside() -> None:
            with space.entered():
                taps.create_tap("inside", "")

        with (
            node.space.call(Netns, HOST) as host,
            node.space.call(Netns, node.plane.namespace(network)) as space,
        ):
            for _ in range(15):
                took["made"].append(_timed(node, taps.create_tap, "outside", ""))
                took["moved"].append(_timed(node, host.move_link, "outside", space))
                took["made_inside"].append(_timed(node, inside))
                for name in ("outside", "inside"):
                    node.space.call(space.delete_link, name)
    for what, times in took.items():
        bench.number(f"tap_{what}_ms", statistics.median(times), "ms")


def _many() -> NodeNetworks:
    """200 networks over 10 nodes, five guests each, all of them on the first node."""
    networks = []
    for number in range(_MANY):
        block = IPv4Network(f"10.{number}.0.0/24")
        ports = tuple(
            Port(
                f"{number}-{n}",
                f"02:00:00:00:{number:02x}:{n:02x}",
                block[n + 2],
                f"guest{n}",
                f"n{n * 2 + 1}",
            )
            for n in range(5)
        )
        networks.append(
            Network(
                f"u{number}", 1000 + number, f"lan{number}", block, block[1], router_node="n1", ports=ports
            )
        )
    peers = tuple(Peer(f"n{n}", IPv4Address(f"10.9.9.{n}")) for n in range(1, 11))
    return NodeNetworks("1a2b3c4d", "n1", tuple(networks), peers, IPv4Address("10.9.9.1"))


def _planning(bench: Bench) -> None:
    desired = _many()
    empty = Observed({HOST: Facts()}, uplink="eth0")
    spaces = {
        name: replace(
            facts,
            links={n: replace(k, mac=k.mac or "02:00:00:00:00:01", peer="") for n, k in facts.links.items()},
        )
        for name, facts in target(desired, empty).items()
    }
    there = replace(empty, namespaces=spaces)
    took = []
    for observed in (empty, there) * 5:
        started = time.perf_counter()
        plan(desired, observed)
        took.append((time.perf_counter() - started) * 1000)
    bench.number("plan_200_from_nothing_ms", statistics.median(took[::2]), "ms", at_most=100)
    bench.number("plan_200_unchanged_ms", statistics.median(took[1::2]), "ms", at_most=100)


def _reconciling(bench: Bench) -> None:
    with Cluster(bench.dir("reconciling"), 1) as cluster:
        node = cluster.nodes[0]
        desired = replace(_many(), installation=cluster.installation)
        bench.say(f"making {_MANY} networks on one node")
        bench.number("create_200_networks_s", _timed(node, node.plane.apply, desired) / 1000, "s")

        def reconcile() -> float:
            started = time.process_time()
            assert node.plane.apply(desired) == []
            return time.process_time() - started

        cpu_s = [node.space.call(reconcile) for _ in range(5)]
        bench.number("reconcile_200_unchanged_cpu_s", statistics.median(cpu_s), "s", at_most=1)
        bench.say("removing them")
        node.remove_all()
