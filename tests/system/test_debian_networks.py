"""Real Debian guests, one with systemd-networkd and one with NetworkManager, on networks as people have them.

Three nodes; beside them a LAN with a router and a DHCP server of its own, which speaks IPv6 too, and a neighbour on it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path

import pytest

from net.ipam import ANY, UNKNOWN
from net.plan.guards import ROUTER
from net.plan.model import Network, Port, Published
from tests import drills
from tests.net.debian import Debian, debian, disk
from tests.net.machines import OUTSIDE, Cluster, Space, make_network, make_port

pytestmark = [
    pytest.mark.system,
    pytest.mark.drill,
    pytest.mark.skipif(not drills.everything(), reason="ten minutes of emulation: scripts/test --all"),
]
LOCAL = IPv6Network("fd42:1:2:3::/64")
WORLD = "2001:db8::53"
SERVE = b"""#cloud-config
write_files:
- path: /srv/index.html
  content: a page of its own
runcmd:
- [systemd-run, -p, WorkingDirectory=/srv, python3, -m, http.server, --bind, '::', '80']
"""
EVERYTHING = "ip -4 -o addr; ip -6 -o addr; ip route; ip -6 route; resolvectl --no-pager; true"


@dataclass
class Around:
    """Nodes, and a LAN on which br0 of n1 and n2 are: router (192.168.77.1, also towards the world), neighbour (.3)."""

    cluster: Cluster
    router: Space
    neighbour: Space


@contextmanager
def around(directory: Path) -> Iterator[Around]:
    with Cluster(directory, 3) as cluster, Space() as router, Space() as neighbour:
        world = cluster.world
        router.sh("ip link add lan type bridge; ip link set lan up")
        for node in cluster.nodes[:2]:
            node.space.sh(
                f"ip link add br0 type bridge; ip link add lan0 type veth peer name {node.name} netns {router.tid}\n"
                "ip link set lan0 master br0 up; ip link set br0 up"
            )
            router.sh(f"ip link set {node.name} master lan up")
        neighbour.sh(f"ip link add eth0 type veth peer name nb netns {router.tid}; ip link set eth0 up")
        router.sh(
            f"ip link set nb master lan up; ip link add wan type veth peer name lan netns {world.tid}\n"
            "ip addr add 192.168.77.1/24 dev lan; ip addr add 2001:db8:77::1/64 dev lan nodad\n"
            "ip addr add 10.9.9.77/24 dev wan; ip addr add 2001:db8:9::77/64 dev wan nodad; ip link set wan up\n"
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1\n"
            "ip route add default via 10.9.9.254; ip -6 route add default via 2001:db8:9::fe"
        )
        world.sh(
            "ip link set lan master switch up; ip route add 192.168.77.0/24 via 10.9.9.77\n"
            f"ip addr add 2001:db8:9::fe/64 dev switch nodad; ip addr add {WORLD}/128 dev lo\n"
            "ip -6 route add 2001:db8:77::/64 via 2001:db8:9::77"
        )
        neighbour.sh(
            "ip addr add 192.168.77.3/24 dev eth0; ip addr add 2001:db8:77::3/64 dev eth0 nodad\n"
            "ip route add default via 192.168.77.1; ip -6 route add default via 2001:db8:77::1"
        )
        for node in cluster.nodes:  # the nodes' own way back to the LAN
            node.space.sh(
                "ip route add 192.168.77.0/24 via 10.9.9.77\n"
                "iptables -P FORWARD DROP; sysctl -qw net.bridge.bridge-nf-call-iptables=0"
            )
        router.sh(
            "dnsmasq --interface=lan --bind-interfaces --leasefile-ro --no-ping --conf-file=/dev/null --no-resolv"
            " --dhcp-range=192.168.77.100,192.168.77.120 --dhcp-range=2001:db8:77::,ra-only --enable-ra"
            " --dhcp-authoritative --pid-file=/run/lan.pid --host-record=printer.lan,192.168.77.3"
        )
        world.sh(
            f"dnsmasq -p 53 --pid-file= -u root -a {OUTSIDE} --no-resolv --conf-file=/dev/null"
            f" --host-record=world.test,{OUTSIDE},{WORLD}"
        )
        for space in (world, neighbour):
            space.sh("mkdir /run/www; echo a page of the world >/run/www/index.html")
            space.popen_quietly("python3 -m http.server --bind :: --directory /run/www 80")
        yield Around(cluster, router, neighbour)


def eventually(true: Callable[[], object], what: Callable[[], str], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what()
        time.sleep(1)


def leased(router: Space, port: Port) -> str:
    """What the LAN's DHCP server gave to a port, "" for nothing yet: its neighbours' table says so."""
    for line in router.sh("ip -4 neigh show dev lan").splitlines():
        if f"lladdr {port.mac}" in line:
            return line.split()[0]
    return ""


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("variant", ["A", "N"], ids=["networkd", "NetworkManager"])
def test_a_debian_on_the_lan_and_one_with_ipv6_have_their_addresses_and_are_reached(
    tmp_path: Path, variant: str
) -> None:
    image = disk(variant)
    tv = replace(make_port(2, "n1"), address=UNKNOWN[2], hostname="tv")
    web = replace(make_port(2, "n2"), hostname="web", published=(Published("tcp", 8080, 80),))
    friend = replace(make_port(3, "n1"), hostname="friend")
    gateway = IPv4Address("192.168.77.1")
    home = Network("home", 77, "home", ANY, gateway, bridge="br0", mtu_bytes=1500, ports=(tv,))
    six = make_network(web, friend, name="six", netblock6=LOCAL, router_node="n3")
    with around(tmp_path) as there, ExitStack() as stack:
        cluster = there.cluster
        desired = cluster.desired(home, six, resolvers=(OUTSIDE,))

        def apply() -> None:
            for node in cluster.nodes:
                mine = (six,) if node.name == "n3" else (home, six)
                node.apply(replace(desired, networks=mine))

        apply()
        near = stack.enter_context(cluster.guest(six, friend))
        near.dhcp()
        one = stack.enter_context(debian(cluster.nodes[0], home, tv, image, tmp_path, user_data=SERVE))
        two = stack.enter_context(debian(cluster.nodes[1], six, web, image, tmp_path, user_data=SERVE))
        wrong: list[str] = []
        wrong.extend(on_the_lan(there, tv, one))
        wrong.extend(with_ipv6(there, near.space, two))
        _uplinks(cluster)
        apply()
        wrong.extend(with_a_way_out(near.space, two))
        assert not wrong, "\n".join(wrong)  # all of it at once: a boot takes minutes


def on_the_lan(there: Around, port: Port, guest: Debian) -> Iterator[str]:
    """What is wrong, once it is up."""
    neighbour = there.neighbour
    eventually(lambda: leased(there.router, port), guest.said)
    address = IPv4Address(leased(there.router, port))
    eventually(lambda: guest.answers(neighbour, address), guest.said)
    said = guest.does(neighbour, address, EVERYTHING)
    if address not in IPv4Network("192.168.77.96/27") or f"inet {address}/24" not in said:
        yield f"its address is not of the LAN: {said}"
    if "default via 192.168.77.1" not in said:
        yield f"it has no way out: {said}"
    if "2001:db8:77:" in said:
        yield f"a router advertisement of the LAN came in, and no filter knows what it makes of it: {said}"
    eventually(lambda: neighbour.works(f"curl -sf -m 20 http://{address}/"), guest.said)
    if neighbour.sh(f"curl -s http://{address}/").strip() != "a page of its own":
        yield "the neighbour gets another page"
    for space in (neighbour, there.cluster.world):
        if not space.works(f"ping -n -c 3 -W 5 -M do -s 1472 {address}"):
            yield f"whole packets do not come from {space}"
    for target in ("printer.lan", OUTSIDE):
        if "a page of the world" not in (
            page := guest.does(neighbour, address, f"curl -sv http://{target}/ 2>&1")
        ):
            yield f"it gets nothing from {target}: {page}"


def with_ipv6(there: Around, near: Space, guest: Debian) -> Iterator[str]:
    """What is wrong while the router has no way to the world by IPv6."""
    near.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=0")
    near.sh(f"ip addr add {LOCAL[3]}/64 dev eth0 nodad")
    eventually(lambda: guest.answers(near, LOCAL[2]), guest.said)
    yield from () if guest.answers(near, "10.42.0.2") else ["no ssh by IPv4"]

    def inside(command: str) -> str:
        return guest.does(near, LOCAL[2], command, check=False)

    said = inside(EVERYTHING)
    for wanted in ("inet 10.42.0.2/24", f"inet6 {LOCAL[2]}/", "default via 10.42.0.1"):
        yield from () if wanted in said else [f"no {wanted}: {said}"]
    for strange in ("default via fe80", "tentative", "dadfailed"):
        yield from [f"{strange}: {said}"] if strange in said else ()
    for kind, address in ((4, "10.42.0.3"), (6, str(LOCAL[3]))):
        pinged = inside(f"ping -{kind} -n -c 3 -W 5 friend")
        yield from () if f"from {address}" in pinged else [f"ping -{kind} friend: {pinged}"]
        for name in ("friend", "friend.sf.internal"):
            known = inside(f"getent ahostsv{kind} {name}")
            yield from () if address in known else [f"{name} is not {address}: {known}"]
    known = inside(f"getent hosts {LOCAL[3]}")
    yield from () if "friend" in known else [f"{LOCAL[3]} has no name: {known}"]
    # A name that has AAAA too: nothing is tried that would have to be waited for.
    known = inside("resolvectl query --no-pager world.test 2>&1; curl -sv http://world.test/ 2>&1")
    if "a page of the world" not in known or str(OUTSIDE) not in known or WORLD in known:
        yield f"world.test: {known}"
    for source, url in (
        (there.neighbour, "http://10.9.9.3:8080/"),  # from the LAN, by the port on the router's node
        (near, f"http://[{LOCAL[2]}]/"),
        (near, "http://10.42.0.2/"),
    ):
        page = source.sh(f"curl -s -m 40 '{url}'", check=False).strip()
        yield from () if page == "a page of its own" else [f"{url}: {page}"]


def _uplinks(cluster: Cluster) -> None:
    for number, node in enumerate(cluster.nodes, 1):
        node.space.sh(
            f"ip addr add 2001:db8:9::{number}/64 dev eth0 nodad; sysctl -qw net.ipv6.conf.all.forwarding=1\n"
            "ip -6 route add default via 2001:db8:9::fe"
        )


def with_a_way_out(near: Space, guest: Debian) -> Iterator[str]:
    """What is wrong once it has one."""

    def inside(command: str) -> str:
        return guest.does(near, LOCAL[2], command, check=False)

    eventually(lambda: f"default via {ROUTER}" in inside(EVERYTHING), lambda: inside(EVERYTHING))
    for target in (WORLD, OUTSIDE):
        pinged = inside(f"ping -n -c 3 -W 5 {target}")
        yield from () if f"from {target}" in pinged else [f"ping {target}: {pinged}"]
    known = inside(
        "resolvectl flush-caches; curl -6 -sv http://world.test/ 2>&1; curl -sv http://world.test/ 2>&1"
    )
    yield from () if known.count("a page of the world") == 2 and WORLD in known else [f"world.test: {known}"]
