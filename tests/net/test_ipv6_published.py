"""Published ports by IPv6: from the world, the host and guests; nothing but them, whoever asks in whatever way."""

import select
import socket
import struct
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

import pytest

from net.plan.model import Published
from tests import drills
from tests.net.machines import Cluster, Space, checksum, make_network, make_port, udp
from tests.net.test_ipv6 import BLOCK, LOCAL, _connected, _with_uplink, configured, routes, within
from tests.net.test_published import serve
from tests.net.test_spoofing import MARK, ipv6

pytestmark = pytest.mark.system
OTHER = IPv6Network("fd42:9:9:9::/64")
WEB = (Published("tcp", 8080, 80), Published("udp", 8080, 5353), Published("tcp", 9000, 9000, 3))
ASKER, HOST, SECOND = (IPv6Address(f"2001:db8:9::{end}") for end in ("fe", "1", "2"))


def told(space: Space, address: object, port: int, protocol: str = "tcp6") -> str:
    """What the server there says, once it does."""

    def ask() -> str:
        kind = socket.SOCK_STREAM if protocol == "tcp6" else socket.SOCK_DGRAM
        with socket.socket(socket.AF_INET6, kind) as asking, suppress(OSError):
            asking.settimeout(1)
            asking.connect((str(address), port))
            if protocol == "udp6":
                asking.send(b"who")
            return asking.recv(99).decode()
        return ""

    return next(filter(None, (space.call(ask) for _ in range(20))), "")


def silent(space: Space, *places: tuple[object, int]) -> bool:
    """Whether none of these answers; all asked at once."""

    def ask() -> bool:
        with ExitStack() as stack:
            asking = [stack.enter_context(socket.socket(socket.AF_INET6)) for _ in places]
            for one, (address, port) in zip(asking, places, strict=True):
                one.setblocking(False)
                one.connect_ex((str(address), port))
            deadline = time.monotonic() + 1
            while asking and (left := deadline - time.monotonic()) > 0:
                for one in select.select(asking, [], [], left)[0]:
                    asking.remove(one)
                    with suppress(OSError):
                        if one.recv(99):
                            return False
        return True

    return space.call(ask)


def send(packet: bytes, to: object) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(packet, (str(to), 0))


def datagram(source: IPv6Address, target: IPv6Address, port: int) -> bytes:
    """UDP from port 7777, with a checksum that conntrack believes."""
    bare = udp(7777, port, MARK * 4)
    pseudo = source.packed + target.packed + struct.pack("!II", len(bare), 17)
    return bare[:6] + struct.pack("!H", checksum(pseudo + bare)) + bare[8:]


def optioned(source: IPv6Address, target: IPv6Address, port: int) -> bytes:
    """Behind destination options."""
    return ipv6(source, target, 60, b"\x11\0\1\4\0\0\0\0" + datagram(source, target, port))


def fragments(source: IPv6Address, target: IPv6Address, port: int) -> list[bytes]:
    """In two: the ports in the first, most of it in the second."""
    whole = datagram(source, target, port)
    parts = (whole[:8], 1), (whole[8:], 8)
    return [ipv6(source, target, 44, struct.pack("!BBHI", 17, 0, at, 7) + part) for part, at in parts]


BLOCKS = {"a local block": LOCAL} | ({"a routed one": BLOCK} if drills.everything() else {})


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_what_is_published_is_reached_by_ipv6_and_nothing_else(tmp_path: Path, block: IPv6Network) -> None:
    one, two = make_port(2, "n1", published=WEB), make_port(3, "n2")
    far = make_port(2, "n1", "10.43.0.0/24")
    network = make_network(one, two, netblock6=block)
    other = make_network(far, name="other", block="10.43.0.0/24", netblock6=OTHER)
    with Cluster(tmp_path, 2) as cluster:
        _connected(cluster)
        _with_uplink(cluster)
        host, second, world = cluster.nodes[0], cluster.nodes[1], cluster.world
        for node in cluster.nodes:
            node.space.sh("ip6tables -P FORWARD DROP")
        serve(host.space, "tcp6", 9001, "host")
        desired = cluster.apply(network, other)
        with (
            cluster.guest(network, one) as guest,
            cluster.guest(network, two) as friend,
            cluster.guest(other, far) as stranger,
        ):
            configured(guest, friend, stranger)
            for inside in (guest, friend, stranger):
                assert within(lambda inside=inside: "via fe80::1" in routes(inside))
            for protocol, port in (("tcp6", 80), ("udp6", 5353), ("tcp6", 9000), ("tcp6", 9001)):
                serve(guest.space, protocol, port, f"{protocol}{port}")
            for inside in (friend, stranger):
                serve(inside.space, "tcp6", 80, "friend" if inside is friend else "stranger")
            assert told(world, HOST, 8080) == f"tcp680 {ASKER}"
            assert told(world, HOST, 8080, "udp6") == f"udp65353 {ASKER}"
            assert told(world, HOST, 9000) == f"tcp69000 {ASKER}"
            assert told(world, HOST, 9001) == f"host {ASKER}"
            assert silent(world, (HOST, 80), (HOST, 9002))
            assert told(host.space, HOST, 8080) == f"tcp680 {HOST}"
            assert told(second.space, HOST, 8080) == f"tcp680 {SECOND}"
            for inside in (guest, friend, stranger):
                assert told(inside.space, HOST, 8080) == f"tcp680 {HOST}"
                assert silent(inside.space, (SECOND, 8080), (HOST, 9001), (HOST, 80))
            host.space.sh("ip addr add 2001:db8:9::77/64 dev eth0 nodad")  # and nothing is told
            assert told(world, "2001:db8:9::77", 8080) == f"tcp680 {ASKER}"
            # Who knows the guests' own addresses and leads them to the node comes no further than the published ports.
            world.sh(f"ip -6 route add {block} via {HOST}; ip -6 route add {OTHER} via {HOST}")
            open_ = block is BLOCK
            for asker in (world, stranger.space):
                assert (
                    told(asker, block[3], 80).startswith("friend") if open_ else silent(asker, (block[3], 80))
                )
            if not open_:  # not even to what is published, by the guest's own address
                assert silent(world, (block[2], 80)) and silent(stranger.space, (block[2], 80))
            assert silent(world, (OTHER[2], 80), (OTHER[2], 8080)) and silent(friend.space, (OTHER[2], 80))
            assert not world.works(f"ping -n -c 1 -W 1 {OTHER[2]}")

            def sent(*packets: bytes) -> list[bool]:
                """Which guests see anything of them."""
                for packet in packets:
                    world.call(send, packet, HOST)
                assert told(world, HOST, 8080) == f"tcp680 {ASKER}"  # sent after them
                return [any(MARK in f for f in inside.received) for inside in (guest, friend, stranger)]

            for port in (5353, 8080):
                assert sent(*fragments(ASKER, OTHER[2], port), optioned(ASKER, OTHER[2], port)) == [False] * 3
            assert sent(*fragments(ASKER, HOST, 9003), optioned(ASKER, HOST, 5353)) == [False] * 3
            assert sent(ipv6(block[2], OTHER[2], 17, datagram(block[2], OTHER[2], 5353))) == [False] * 3
            assert sent(optioned(ASKER, HOST, 8080)) == [True, False, False]
            for node, networks in ((host, (network, other)), (second, (network,))):
                assert node.apply(replace(desired, networks=networks)) == []
            moved = replace(network, router_node="n2")
            host.apply(replace(desired, networks=(moved, other)))
            second.apply(replace(desired, networks=(moved,)))
            assert told(world, SECOND, 8080) == f"tcp680 {ASKER}"
            assert silent(world, (HOST, 8080))
            bare = replace(moved, ports=(replace(one, published=()), two))
            second.apply(replace(desired, networks=(bare,)))
            assert silent(world, (SECOND, 8080))
            assert friend.pings(block[1])
