"""Rules: who may begin to speak to a guest, what a stranger tries, and what a change leaves alone."""

import shlex
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from net import Allow, Limits, Published
from net.plan.nft import link_local
from tests.net.machines import OUTSIDE, Cluster, Guest, checksum, ethernet, ipv4, make_network, make_port, udp
from tests.net.test_published import ask, serve
from tests.net.test_spoofing import MARK, ipv6

pytestmark = pytest.mark.system
WEB = (Allow("tcp", ((80, 80), (8000, 8010))), Allow("tcp", ((22, 22),), IPv4Network("10.42.0.4/32")))
ONE = make_port(2, "n1", allowed=WEB, published=(Published("tcp", 8080, 80), Published("tcp", 2222, 22)))
TWO, FOUR = make_port(3, "n2"), make_port(4, "n1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("rules"), 2) as made:
        yield made


@pytest.fixture(scope="module")
def guests(cluster: Cluster) -> Iterator[tuple[Guest, Guest, Guest]]:
    """One with rules, a stranger on another node, a friend on the same."""
    network = make_network(ONE, TWO, FOUR)
    with cluster.guests(network, ONE, TWO, FOUR) as (one, two, four):
        for guest in (one, two, four):
            guest.dhcp()
        for protocol, port in (("tcp", 80), ("tcp", 22), ("tcp", 81), ("udp", 53)):
            serve(one.space, protocol, port, f"{protocol}{port}")
        serve(two.space, "tcp", 99, "two")
        serve(two.space, "udp", 99, "two")
        serve(cluster.world, "udp", 99, "world")
        yield one, two, four


def test_what_is_allowed_passes_and_nothing_else_wherever_it_comes_from(
    cluster: Cluster, guests: tuple[Guest, Guest, Guest]
) -> None:
    _, two, four = guests
    host = cluster.nodes[0]
    assert ask(two.space, ONE.address, 80) == "tcp80 10.42.0.3"
    assert ask(four.space, ONE.address, 22) == "tcp22 10.42.0.4"
    for space in (two.space, four.space):
        assert [ask(space, ONE.address, 81), ask(space, ONE.address, 53, "udp")] == ["", ""]
    assert ask(two.space, ONE.address, 22) == ""
    assert ask(cluster.world, host.address, 8080) == "tcp80 10.9.9.254"
    assert ask(cluster.world, host.address, 2222) == ""
    assert two.reaches_not(ONE.address)


def test_what_the_guest_begins_is_answered(cluster: Cluster, guests: tuple[Guest, Guest, Guest]) -> None:
    one, _, _ = guests
    assert ask(one.space, TWO.address, 99) == "two 10.42.0.2"
    assert ask(one.space, TWO.address, 99, "udp") == "two 10.42.0.2"
    assert ask(one.space, "10.9.9.254", 99, "udp").startswith("world")
    assert one.pings(TWO.address)
    assert one.pings(OUTSIDE)
    assert one.space.sh(f"ping -n -c 1 -W 2 -t 1 {OUTSIDE}", check=False).count("exceeded") == 1
    assert "refused" in one.space.sh(
        "python3 -c 'import socket as s; u = s.socket(s.AF_INET, s.SOCK_DGRAM); u.settimeout(3);"
        f' u.connect(("{TWO.address}", 7)); u.send(b"x"); u.recv(9)\' 2>&1',
        check=False,
    ), "an error about what it sent"


def tcp(port: int, flags: int, source: int = 4321) -> bytes:
    return struct.pack("!HHLLBBHHH", source, port, 1, 1, 5 << 4, flags, 1024, 0, 0) + MARK


def packet(payload: bytes, protocol: int = 6, *, fragment: int = 0, options: bytes = b"") -> bytes:
    source, target = TWO.address.packed, ONE.address.packed
    head = struct.pack(
        "!BBHHHBBH",
        0x45 + len(options) // 4,
        0,
        20 + len(options) + len(payload),
        7,
        fragment,
        64,
        protocol,
        0,
    )
    head += source + target + options
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return ethernet(TWO.mac, ONE.mac, 0x0800, head + payload)


def six(protocol: int, payload: bytes) -> bytes:
    return ethernet(
        TWO.mac, ONE.mac, 0x86DD, ipv6(link_local(TWO.mac), link_local(ONE.mac), protocol, payload)
    )


_SIX_TCP = tcp(81, 2)
ATTEMPTS = {
    "a SYN to a closed port": packet(tcp(81, 2)),
    "an ACK of no flow": packet(tcp(81, 16)),
    "a SYN with its answer": packet(tcp(81, 18)),
    "a FIN": packet(tcp(81, 1)),
    "no flags at all": packet(tcp(81, 0)),
    "UDP": packet(udp(99, 53, MARK), 17),
    "UDP from a port that is asked otherwise": packet(udp(53, 1053, MARK), 17),
    "a first fragment": packet(tcp(80, 2), fragment=0x2000),
    "a fragment of one block, which could hold the flags": packet(MARK + tcp(81, 2), fragment=0x2001),
    "a later fragment": packet(MARK * 2, fragment=0x0003),
    "a port where options say another": packet(tcp(81, 2), options=struct.pack("!HH", 4321, 80)),
    "an echo": packet(b"\x08\0\0\0\0\1\0\1" + MARK, 1),
    "an answer to no echo": packet(b"\0\0\0\0\0\1\0\1" + MARK, 1),
    "an error about nothing": packet(
        b"\3\3\0\0\0\0\0\0" + ipv4(ONE.address, TWO.address, 17, udp(5, 6, MARK)), 1
    ),
    "a redirect": packet(b"\5\1\0\0\x0a\x2a\0\3" + ipv4(ONE.address, TWO.address, 17, udp(5, 6, MARK)), 1),
    "another protocol": packet(MARK, 47),
    "SYN over IPv6": six(6, _SIX_TCP),
    "SYN behind a hop-by-hop header": six(0, b"\6\0\1\4\0\0\0\0" + _SIX_TCP),
    "SYN behind destination options and a routing header": six(
        60, b"\x2b\0\1\4\0\0\0\0\6\0\0\0\0\0\0\0" + _SIX_TCP
    ),
    "a fragment of IPv6": six(44, b"\6\0\0\1\0\0\0\7" + _SIX_TCP),
    "a later fragment of IPv6": six(44, b"\6\0\0\x10\0\0\0\7" + MARK),
    "an echo over IPv6": six(58, b"\x80\0\0\0\0\1\0\1" + MARK),
}


def test_nobody_from_outside_speaks_to_a_guests_dhcp_client(
    cluster: Cluster, guests: tuple[Guest, Guest, Guest]
) -> None:
    one, floating, node = guests[0], IPv4Address("10.9.9.100"), guests[0].node
    network = replace(one.network, ports=(replace(ONE, floating=floating), TWO, FOUR))
    node.apply(cluster.desired(network))
    before = node.counters(network)[one.name]["rules"]
    send = f's.sendto({MARK!r}, ("{floating}", 68))'
    program = f'import socket; s = socket.socket(2, 2); s.bind(("", 67)); [{send} for _ in range(3)]'
    cluster.world.sh(f"python3 -c {shlex.quote(program)}")
    assert ask(cluster.world, floating, 80) == "tcp80 10.9.9.254"
    assert not [frame for frame in one.received if MARK in frame]
    assert node.counters(network)[one.name]["rules"] == before + 3
    node.apply(cluster.desired(one.network))


DROPPED_BEFORE = "a later fragment of IPv6"
"""The kernel itself lets it go by no bridge with such rules."""


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_nothing_of_it_arrives(guests: tuple[Guest, Guest, Guest], attempt: str) -> None:
    one, two, _ = guests
    node = one.node
    count = lambda: node.counters(one.network)[one.name]["rules"]  # noqa: E731
    before = count()
    for _ in range(3):
        two.send(ATTEMPTS[attempt])
    two.send(packet(tcp(80, 2, 77)))
    deadline = time.monotonic() + 10
    while not any(MARK in frame for frame in one.received) and time.monotonic() < deadline:
        time.sleep(0.01)
    arrived = [frame for frame in one.received if MARK in frame]
    one.received.clear()
    assert [(frame[12:14], frame[34:38]) for frame in arrived] == [(b"\x08\0", struct.pack("!HH", 77, 80))]
    assert count() - before == (0 if attempt == DROPPED_BEFORE else 3)


def test_a_flood_of_flows_shuts_out_nobody_but_the_one_that_floods(
    guests: tuple[Guest, Guest, Guest],
) -> None:
    one, two, four = guests
    for number in range(70_000):  # more than its set holds
        one.send(
            ethernet(
                ONE.mac,
                TWO.mac,
                0x0800,
                ipv4(
                    ONE.address,
                    f"198.51.{number >> 8 & 255}.{number & 255}",
                    17,
                    udp(9, number & 0xFFFF, b""),
                ),
            )
        )
    assert ask(two.space, ONE.address, 80) == "tcp80 10.42.0.3"
    assert four.pings(TWO.address)


def test_what_passes_a_limited_port_in_a_second_is_bounded_both_ways(
    cluster: Cluster, guests: tuple[Guest, Guest, Guest]
) -> None:
    _, two, four = guests
    limits = Limits(packets_in=2, bytes_out=10_000)
    network = replace(guests[0].network, ports=(ONE, replace(TWO, limits=limits), FOUR))
    cluster.nodes[1].apply(cluster.desired(network))
    began = time.monotonic()
    for number in range(300):
        inward = ipv4(FOUR.address, TWO.address, 17, udp(9, number, b"inward" + MARK))
        four.send(ethernet(FOUR.mac, TWO.mac, 0x0800, inward))
        outward = ipv4(TWO.address, FOUR.address, 17, udp(9, 9, b"outward" + MARK + b"x" * 1300))
        two.send(ethernet(TWO.mac, FOUR.mac, 0x0800, outward))
    assert two.pings(FOUR.address, tries=60)
    gone_s = time.monotonic() - began
    came = sum(b"inward" + MARK in frame for frame in two.received)
    went = sum(b"outward" + MARK in frame for frame in four.received)
    assert 0 < came <= 6 + 2 * gone_s
    assert 0 < went <= 2 + ((1 << 17) + 10_000 * gone_s) / 1300
    dropped = two.node.counters(network)[two.name]["limit"]
    assert dropped >= 600 - came - went
    assert cluster.nodes[1].apply(cluster.desired(network)) == []
    cluster.nodes[1].apply(cluster.desired(guests[0].network))


def test_a_change_of_200_rules_is_one_transaction_that_ends_no_flow_and_lets_no_probe_through(
    cluster: Cluster, guests: tuple[Guest, Guest, Guest]
) -> None:
    one, two, _ = guests
    many = tuple(
        Allow("tcp", ((10_000 + n, 10_000 + n),), IPv4Network(f"192.0.{n}.0/24")) for n in range(199)
    )
    stop, wrong = threading.Event(), list[str]()

    def probe() -> None:
        """An allowed and a forbidden connection, again and again, by turns."""
        while not stop.is_set():
            for port, wanted in ((80, True), (81, False)):
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as asking:
                    asking.settimeout(3 if wanted else 0.05)
                    try:
                        asking.connect((str(ONE.address), port))
                        said = True
                    except OSError:
                        said = False
                    if said != wanted:
                        wrong.append(f"{port}: {said}")

    talk = two.space.call(lambda: socket.create_connection((str(ONE.address), 80), 5))
    prober = two.space._executor.submit(probe)
    took = []
    for round_number in range(6):
        rules = (*WEB[:1], *many) if round_number % 2 == 0 else WEB
        network = replace(one.network, ports=(replace(ONE, allowed=rules), TWO, FOUR))
        actions = cluster.nodes[0].apply(cluster.desired(network))
        assert [type(a.item).__name__ for a in actions] == ["Transaction"]
        commands = actions[0].item.commands
        assert cluster.nodes[0].apply(cluster.desired(network)) == []
        began = time.perf_counter()
        with_space(one, commands)
        took.append(time.perf_counter() - began)
    stop.set()
    prober.result(timeout=30)
    print(f"a change of 200 rules, ms: {sorted(round(t * 1000, 1) for t in took)}")
    assert wrong == []
    assert talk.recv(99).startswith(b"tcp80")
    talk.close()


def with_space(guest: Guest, commands: str) -> None:
    """The same transaction once more, for its time."""
    from net.kernel.netns import Netns

    def run() -> None:
        with Netns(guest.node.plane.namespace(guest.network)) as space:
            space.nft(commands)

    guest.node.space.call(run)
