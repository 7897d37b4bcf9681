"""Published ports: from the world, from the host, from guests; refused where a server listens."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from net import listening
from net.plan.model import Published
from tests.net.machines import OUTSIDE, Cluster, Guest, Space, make_network, make_port

pytestmark = pytest.mark.system
SERVER = """
import socket, sys
kind = socket.SOCK_STREAM if "tcp" in sys.argv[1] else socket.SOCK_DGRAM
family = socket.AF_INET6 if "6" in sys.argv[1] else socket.AF_INET
with socket.socket(family, kind) as s:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("", int(sys.argv[2])))
    if kind == socket.SOCK_STREAM:
        s.listen()
    print("there", flush=True)
    while True:
        if kind == socket.SOCK_STREAM:
            c, who = s.accept()
            with c:
                c.sendall(f"{sys.argv[3]} {who[0]}".encode())
        else:
            _, who = s.recvfrom(99)
            s.sendto(f"{sys.argv[3]} {who[0]}".encode(), who)
"""
ASK = """
import socket, sys
kind = socket.SOCK_STREAM if "tcp" in sys.argv[1] else socket.SOCK_DGRAM
family = socket.AF_INET6 if "6" in sys.argv[1] else socket.AF_INET
with socket.socket(family, kind) as s:
    s.settimeout(1)
    s.connect((sys.argv[2], int(sys.argv[3])))
    if kind == socket.SOCK_DGRAM:
        s.send(b"who")
    print(s.recv(99).decode())
"""


def serve(space: Space, protocol: str, port: int, name: str) -> None:
    """A server that answers with its name and who asked, as long as the machine is there."""
    import subprocess

    def start() -> None:
        argv = ["python3", "-c", SERVER, protocol, str(port), name]
        process = subprocess.Popen(argv, stdout=-1, text=True, cwd="/")
        assert process.stdout and process.stdout.readline() == "there\n"

    space.call(start)


def ask(space: Space, address: object, port: int, protocol: str = "tcp") -> str:
    """What the server there says; "" if none answers."""
    said = space.sh(f"python3 -c '{ASK}' {protocol} {address} {port} 2>/dev/null", check=False)
    return said.strip()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, 2) as made:
        for node in made.nodes:
            node.space.sh("sysctl -qw net.bridge.bridge-nf-call-iptables=1; iptables -P FORWARD DROP")
        yield made


WEB = (Published("tcp", 8080, 80), Published("udp", 8080, 5353), Published("tcp", 9000, 9000, 3))


def serves(guest: Guest) -> None:
    guest.dhcp()
    for protocol, port in (("tcp", 80), ("udp", 5353), ("tcp", 9000), ("tcp", 9002)):
        serve(guest.space, protocol, port, f"{protocol}{port}")


def test_the_world_the_host_and_guests_reach_a_published_port_and_no_other(cluster: Cluster) -> None:
    one, two = make_port(2, "n1", published=WEB), make_port(3, "n2")
    far = make_port(2, "n1", "10.43.0.0/24")
    network, other = make_network(one, two), make_network(far, name="other", block="10.43.0.0/24")
    desired = cluster.apply(network, other)
    host, world = cluster.nodes[0], cluster.world
    with (
        cluster.guest(network, one) as guest,
        cluster.guest(network, two) as friend,
        cluster.guest(other, far) as stranger,
    ):
        serves(guest)
        friend.dhcp()
        stranger.dhcp()
        assert ask(world, host.address, 8080) == "tcp80 10.9.9.254"
        assert ask(world, host.address, 8080, "udp") == "udp5353 10.9.9.254"
        assert [ask(world, host.address, port) for port in (9000, 9001, 9002)] == [
            "tcp9000 10.9.9.254",
            "",
            "tcp9002 10.9.9.254",
        ]
        assert [ask(world, host.address, port) for port in (80, 9003)] == ["", ""]
        assert ask(host.space, host.address, 8080) == "tcp80 10.9.9.1"
        assert ask(cluster.nodes[1].space, host.address, 8080) == "tcp80 10.9.9.2"
        for inside in (guest, friend, stranger):
            assert ask(inside.space, host.address, 8080).startswith("tcp80 169.254.")
            assert inside.reaches_not(host.address)
            assert ask(inside.space, cluster.nodes[1].address, 8080) == ""
        host.space.sh("ip addr add 10.9.9.77/24 dev eth0")  # the host has a new address, and nothing is told
        assert ask(world, "10.9.9.77", 8080) == "tcp80 10.9.9.254"
        assert host.apply(replace(desired, networks=(network, other))) == []
        moved = replace(network, router_node="n2")
        for node in cluster.nodes:
            node.apply(replace(desired, networks=(moved, other) if node is host else (moved,)))
        assert ask(world, "10.9.9.2", 8080) == "tcp80 10.9.9.254"
        assert ask(world, host.address, 8080) == ""
        bare = replace(moved, ports=(replace(one, published=()), two))
        cluster.nodes[1].apply(replace(desired, networks=(bare,)))
        assert ask(world, "10.9.9.2", 8080) == ""
        assert friend.pings(OUTSIDE)


def test_a_port_on_which_something_listens_stays_that_servers_and_who_comes_later_gets_nothing(
    cluster: Cluster,
) -> None:
    port = make_port(2, "n1", published=WEB)
    network = make_network(port, provide_nat=False)
    host, world = cluster.nodes[0], cluster.world
    serve(host.space, "tcp", 8080, "host")
    desired = replace(cluster.apply(network), node="n1", networks=(network,), underlay=host.address)
    with cluster.guest(network, port) as guest:
        serves(guest)
        assert ask(world, host.address, 8080) == "host 10.9.9.254"
        assert ask(world, host.address, 8080, "udp") == "udp5353 10.9.9.254"
        assert ("tcp", 8080) in host.space.call(listening)
        findings = [f.text for f in host.space.call(host.plane.doctor, desired)]
        assert findings == ["port 8080/tcp is not published: a server of this node listens there"]
        serve(host.space, "tcp", 9000, "later")
        assert host.apply(desired) == []
        assert ask(world, host.address, 9000) == "tcp9000 10.9.9.254"
