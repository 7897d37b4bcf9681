"""IPv6 of a network: addresses by DHCPv6, the way out, names, and what a guest may not do with it."""

import asyncio
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

import pytest

from compute.agent.operations import connect
from compute.wire.streams import pair
from net.plan.guards import ROUTER
from net.plan.model import Allow, Network
from net.plan.nft import link_local
from tests.net.machines import OUTSIDE, Cluster, Guest, ethernet, make_network, make_port, packed, udp
from tests.net.test_published import ask, serve
from tests.net.test_spoofing import MARK, ipv6

pytestmark = pytest.mark.system
BLOCK = IPv6Network("2001:db8:42:1::/64")
LOCAL = IPv6Network("fd42:1:2:3::/64")
WORLD = IPv6Address("2001:db8::53")


def _options(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        kind, size = struct.unpack("!HH", data[:4])
        found[kind], data = data[4 : 4 + size], data[4 + size :]
    return found


def _option(kind: int, data: bytes) -> bytes:
    return struct.pack("!HH", kind, len(data)) + data


def dhcp6(guest: Guest, timeout_s: float = 20) -> dict[int, bytes]:
    """Options of the answer (RFC 8415), and the address as option 0."""
    client = _option(1, b"\0\3\0\1" + packed(guest.port.mac))
    wanted = _option(6, struct.pack("!HH", 23, 24)) + _option(8, b"\0\0")

    def ask() -> dict[int, bytes]:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
            device = socket.if_nametoindex("eth0")
            udp.bind(("::", 546, 0, device))
            udp.settimeout(1)
            kind, more = 1, _option(3, b"\0\0\0\1" + bytes(8))
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline:
                number = os.urandom(3)
                udp.sendto(bytes([kind]) + number + client + wanted + more, ("ff02::1:2", 547, 0, device))
                try:
                    answer = udp.recv(2048)
                except TimeoutError:
                    continue
                options = _options(answer[4:])
                if answer[1:4] != number or 3 not in options:
                    continue
                if answer[0] == 7:
                    return {0: _options(options[3][12:])[5][:16], **options}
                kind, more = 3, _option(2, options[2]) + _option(3, options[3])
        raise AssertionError("no lease by DHCPv6")

    return guest.space.call(ask)


def configured(*guests: Guest) -> list[IPv6Address]:
    """IPv6 switched on, its link-local address proved to be nobody else's, and one by DHCPv6."""
    at, found = "net.ipv6.conf.all", []
    for guest in guests:
        guest.space.sh(f"sysctl -qw {at}.router_solicitation_interval=1 {at}.router_solicitations=20")
        guest.space.sh(f"sysctl -qw {at}.disable_ipv6=0")
    for guest in guests:
        settled = lambda guest=guest: "fe80" in (s := _addresses(guest)) and "tentative" not in s  # noqa: E731
        assert within(settled)
        found.append(IPv6Address(dhcp6(guest)[0]))
        guest.space.sh(f"ip addr add {found[-1]}/64 dev eth0 nodad")
    return found


def _addresses(guest: Guest) -> str:
    return guest.space.sh("ip -6 addr show dev eth0")


def routes(guest: Guest) -> str:
    return guest.space.sh("ip -6 route show default")


def within(what, seconds: float = 20) -> bool:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.1)
    return False


@contextmanager
def two(tmp_path: Path, nodes: int = 2, **more) -> Iterator[tuple[Cluster, Network, list[Guest]]]:  # type: ignore[no-untyped-def]
    ports = more.pop("ports", (make_port(2, "n1"), make_port(3, f"n{nodes}"), make_port(4, "n1")))
    network = make_network(*ports, **{"netblock6": LOCAL, **more})
    with Cluster(tmp_path, nodes) as cluster, ExitStack() as stack:
        _connected(cluster)
        cluster.apply(replace(network, ports=ports[:2]))
        cluster.apply(network)  # the third is made known to a server that goes on
        yield cluster, network, [stack.enter_context(cluster.guest(network, port)) for port in ports]


def _connected(cluster: Cluster) -> None:
    """The world speaks IPv6 on the switch; nodes have no part in it yet."""
    cluster.world.sh(f"ip addr add 2001:db8:9::fe/64 dev switch nodad; ip addr add {WORLD}/128 dev lo")


def _with_uplink(cluster: Cluster) -> None:
    for number, node in enumerate(cluster.nodes, 1):
        node.space.sh(
            f"ip addr add 2001:db8:9::{number}/64 dev eth0 nodad; sysctl -qw net.ipv6.conf.all.forwarding=1\n"
            "ip -6 route add default via 2001:db8:9::fe"
        )


def test_each_guest_gets_its_address_and_reaches_the_others_and_the_router(tmp_path: Path) -> None:
    with two(tmp_path, nodes=3) as (cluster, network, (one, far, near)):
        got = configured(one, far, near)
        assert got == [LOCAL[2], LOCAL[3], LOCAL[4]]
        for guest in (one, far):
            for address in (LOCAL[1], *(set(got) - {network.address6(guest.port.address)})):
                assert guest.pings(address), (guest.name, address)
            assert guest.pings(f"{ROUTER}%eth0")
        assert far.pings(f"{link_local(one.port.mac)}%eth0")
        for node in (cluster.nodes[0], cluster.nodes[2]):
            assert node.apply(cluster.desired(network)) == []
        # Nothing leads out here: the router says so, and nobody's AAAA is handed on.
        assert within(lambda: str(LOCAL) in one.space.sh("ip -6 route show proto kernel"))
        assert "default" not in routes(one)
        assert _answers(one, "guest3.sf.internal", 28) == [LOCAL[3].packed]
        cluster.world.sh(f"dnsmasq -p 53 --pid-file= -u root -a {OUTSIDE} --address=/example.net/{WORLD}")
        for node in cluster.nodes:
            node.apply(replace(cluster.desired(network), resolvers=(OUTSIDE,)))
        assert _answers(one, "www.example.net", 28) == []
        _with_uplink(cluster)
        for node in cluster.nodes:
            node.apply(replace(cluster.desired(network), resolvers=(OUTSIDE,)))
        assert _answers(one, "www.example.net", 28) == [WORLD.packed]
        # The router moves to a node without guests: same addresses, same MAC.
        moved = cluster.apply(replace(network, router_node="n2"))
        for guest in (one, far):
            assert within(lambda guest=guest: guest.pings(WORLD, tries=1) and guest.pings(LOCAL[1], tries=1))
        for node in cluster.nodes[1:]:
            assert node.apply(moved) == []
        assert str(LOCAL[1]) not in cluster.nodes[0].inside(network, "ip -6 addr")
        cluster.nodes[1].space.call(cluster.nodes[1].plane.drop_routers)
        assert "inet6" not in cluster.nodes[1].inside(network, "ip -6 addr show scope global")
        assert one.reaches_not(LOCAL[1])
        assert one.pings(LOCAL[3])


def _answers(guest: Guest, name: str, kind: int) -> list[bytes]:
    """What the router's DNS says, asked by IPv6: the data of each record."""
    question = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"
    ask = b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + question + struct.pack("!HH", kind, 1)

    def query() -> bytes:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
            udp.settimeout(2)
            for _ in range(5):
                udp.sendto(ask, (str(guest.network.address6(guest.network.gateway)), 53))
                try:
                    return udp.recv(2048)
                except TimeoutError:
                    continue
        raise AssertionError("no answer by DNS")

    data, found = guest.space.call(query), []
    at, count = len(ask), struct.unpack("!H", data[6:8])[0]
    for _ in range(count):  # the names of answers point to the question
        size = struct.unpack("!H", data[at + 10 : at + 12])[0]
        found.append(data[at + 12 : at + 12 + size])
        at += 12 + size
    return found


@pytest.mark.parametrize("block", [LOCAL, BLOCK], ids=["a local block is translated", "another is routed"])
def test_guests_reach_the_world_once_the_node_has_ipv6(tmp_path: Path, block: IPv6Network) -> None:
    with two(tmp_path, netblock6=block, provide_nat=block is LOCAL) as (cluster, network, (one, far, _)):
        configured(one, far)
        assert "default" not in routes(far)
        for node in cluster.nodes:
            node.space.sh("ip6tables -P FORWARD DROP")
        _with_uplink(cluster)
        desired = cluster.apply(network)
        for node in cluster.nodes:
            assert node.apply(desired) == []
        if block is BLOCK:
            cluster.world.sh(f"ip -6 route add {BLOCK} via 2001:db8:9::1")
        for guest in (one, far):
            assert within(lambda guest=guest: f"via {ROUTER}" in routes(guest))
            with cluster.world.sniffing("icmp6 and ip6[40] = 128") as seen:
                assert guest.pings(WORLD)
            source = "2001:db8:9::1" if block is LOCAL else network.address6(guest.port.address)
            assert seen == {str(source)}
        assert _answers(one, "guest3.sf.internal", 28) == [block[3].packed]
        assert _answers(one, block[3].reverse_pointer, 12)[0].startswith(b"\6guest3")
        # Nobody in the world reaches a guest whose address is translated; no guest reaches a node.
        assert cluster.world.works(f"ping -n -c 1 -W 2 {block[2]}") == (block is BLOCK)
        assert one.reaches_not("2001:db8:9::1")
        for node in cluster.nodes:
            node.space.sh("sysctl -qw net.ipv6.conf.all.forwarding=0")
        cluster.apply(network)
        assert within(lambda: "default" not in routes(one))
        assert one.reaches_not(WORLD)
        (node, *_) = cluster.nodes
        (found,) = node.space.call(node.plane.doctor, replace(desired, node="n1", underlay=node.address))
        assert "does not forward" in found.text and "forwarding=1" in found.fix
        for node in cluster.nodes:
            assert node.apply(desired) == []


def test_a_connection_from_the_router_is_made_by_ipv6_where_nothing_answers_by_ipv4(tmp_path: Path) -> None:
    with two(tmp_path) as (cluster, network, (one, *_)):
        configured(one)
        one.static()
        one.space.sh("sysctl -qw net.ipv6.bindv6only=1")
        serve(one.space, "tcp6", 22, "six")

        async def ask(*to: str) -> str:
            here, there = pair()
            talk = asyncio.create_task(connect(cluster.nodes[0].plane.namespace(network), *to, 22, there))
            said = asyncio.create_task(here.receive())
            await asyncio.wait({talk, said}, return_when=asyncio.FIRST_COMPLETED)
            talk.cancel()
            return bytes(said.result() or b"").decode() if said.done() else str(talk.exception())

        def told(*to: object) -> str:
            return cluster.nodes[0].space.call(asyncio.run, ask(*map(str, to)))

        assert within(lambda: told(LOCAL[2], "") == f"six {LOCAL[1]}")
        assert told(one.port.address, LOCAL[2]) == f"six {LOCAL[1]}"
        assert told(one.port.address, "") == f"{one.port.address} port 22: Connection refused"


def test_rules_hold_for_ipv6_and_answers_to_what_a_guest_begins_come(tmp_path: Path) -> None:
    rules = (
        Allow("tcp", ((80, 80),)),
        Allow("tcp", ((22, 22),), IPv6Network(f"{LOCAL[4]}/128")),
        Allow("icmp", (), IPv6Network(f"{LOCAL[4]}/128")),
    )
    ports = (make_port(2, "n1", allowed=rules), make_port(3, "n2", allowed=()), make_port(4, "n1"))
    with two(tmp_path, ports=ports) as (cluster, _, (one, shut, friend)):
        _with_uplink(cluster)
        cluster.apply(one.network)
        configured(one, shut, friend)
        for protocol, port in (("tcp6", 80), ("tcp6", 22), ("tcp6", 81), ("udp6", 53)):
            serve(one.space, protocol, port, f"{protocol}{port}")
        for protocol in ("tcp6", "udp6"):
            serve(friend.space, protocol, 99, "friend")
            serve(shut.space, protocol, 99, "shut")
        assert ask(shut.space, LOCAL[2], 80, "tcp6") == f"tcp680 {LOCAL[3]}"
        assert ask(friend.space, LOCAL[2], 22, "tcp6") == f"tcp622 {LOCAL[4]}"
        assert friend.pings(LOCAL[2])
        assert shut.reaches_not(LOCAL[2])
        assert ask(shut.space, LOCAL[2], 22, "tcp6") == ""
        assert [ask(shut.space, LOCAL[2], 81, "tcp6"), ask(friend.space, LOCAL[2], 53, "udp6")] == ["", ""]
        assert [ask(one.space, LOCAL[3], 99, kind) for kind in ("tcp6", "udp6")] == ["", ""]
        for guest in (one, shut):
            name = f"friend {guest.network.address6(guest.port.address)}"
            assert [ask(guest.space, LOCAL[4], 99, kind) for kind in ("tcp6", "udp6")] == [name, name]
            assert guest.pings(LOCAL[4])
            assert within(lambda guest=guest: f"via {ROUTER}" in routes(guest))
            assert guest.pings(WORLD)
            assert "exceeded" in guest.space.sh(f"ping -n -c 1 -W 2 -t 1 {WORLD}", check=False)
        fake = udp(53, 1053, MARK)
        for protocol, payload in (
            (0, b"\x11\0\1\4\0\0\0\0" + fake),
            (44, b"\x11\0\0\1\0\0\0\7" + fake),
            (17, fake),
        ):
            frame = ipv6(LOCAL[4], LOCAL[2], protocol, payload)
            friend.send(ethernet(friend.port.mac, one.port.mac, 0x86DD, frame))
        assert friend.pings(LOCAL[2])
        assert not any(MARK in frame for frame in one.received)
