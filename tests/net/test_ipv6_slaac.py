"""Networks with SLAAC: guests choose addresses, who has one first keeps it, and nobody takes what is another's."""

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from net.plan import guards
from net.plan.model import Network
from net.plan.nft import link_local
from tests.net.machines import Cluster, Guest, ethernet, make_network, make_port
from tests.net.test_ipv6 import LOCAL, WORLD, _connected, _with_uplink, routes, within
from tests.net.test_ipv6_attacks import NOBODY, advert, link, solicit
from tests.net.test_spoofing import ALL_NODES, MARK, icmpv6, ipv6

pytestmark = pytest.mark.system
PORTS = make_port(2, "n1"), make_port(3, "n2"), make_port(4, "n1")
ONE, TWO, NEAR = PORTS


def eui(mac: str) -> IPv6Address:
    return LOCAL[int(link_local(mac)) % 2**64]


TAKEN, FREE, OTHER = (LOCAL[0xDEAD_BEEF_0001_0000 + n] for n in (1, 2, 3))


def network() -> Network:
    return make_network(*PORTS, netblock6=LOCAL, slaac=True)


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, tuple[Guest, ...]]]:
    with Cluster(tmp_path_factory.mktemp("slaac"), 2) as cluster, ExitStack() as stack:
        _connected(cluster)
        _with_uplink(cluster)
        yield cluster, stack.enter_context(cluster.guests(network(), *PORTS))


def chosen(guest: Guest) -> list[IPv6Address]:
    """Global addresses that have proved to be nobody else's."""
    words = guest.space.sh("ip -6 -o addr show dev eth0 scope global -tentative").split()
    return [IPv6Address(a.partition("/")[0]) for w, a in itertools.pairwise(words) if w == "inet6"]


def test_guests_make_addresses_of_either_form_and_are_reached_at_them(
    guests: tuple[Cluster, tuple[Guest, ...]],
) -> None:
    cluster, (one, two, near) = guests
    at = "net.ipv6.conf.eth0"
    for guest, mode in (
        (one, 0),
        (two, 3),
        (near, 3),
    ):  # from the MAC; or opaque (RFC 7217), and temporary ones
        guest.space.sh(f"sysctl -qw {at}.addr_gen_mode={mode} {at}.use_tempaddr={2 if mode else 0}")
        guest.space.sh(f"sysctl -qw {at}.router_solicitation_interval=1 {at}.router_solicitations=20")
        guest.space.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=0")
    for guest, count in ((one, 1), (two, 2), (near, 2)):
        assert within(lambda guest=guest, count=count: len(chosen(guest)) == count), guest.space.sh(
            "ip -6 addr"
        )
    assert chosen(one) == [eui(ONE.mac)]
    assert eui(TWO.mac) not in chosen(two) and len({*chosen(two), *chosen(near)}) == 4
    for guest in (one, two, near):
        for address in (LOCAL[1], *chosen(one), *chosen(two), *chosen(near)):
            assert guest.pings(address), (guest.name, address)
        assert within(lambda guest=guest: "via fe80::1" in routes(guest))
        assert guest.pings(WORLD)
    for node in cluster.nodes:
        assert node.apply(cluster.desired(one.network)) == []
        counted = node.counters(one.network)
        assert not any(counted[guest.name]["ipv6"] for guest in (one, two, near) if guest.node is node)


def frame(body: bytes) -> bytes:
    return ethernet(ONE.mac, "33:33:00:00:00:01", 0x86DD, body)


def nd(body: bytes, source: IPv6Address) -> bytes:
    return frame(icmpv6(source, ALL_NODES, body + MARK))


def plain(source: IPv6Address) -> bytes:
    return frame(ipv6(source, ALL_NODES, 59, MARK))


ATTEMPTS = {
    "the address that IPAM gave a neighbour": plain(LOCAL[3]),
    "one that IPAM may give": plain(LOCAL[99]),
    "the last one that IPAM may give": plain(LOCAL[0xFFFFFF]),
    "the router's": plain(LOCAL[1]),
    "none": plain(LOCAL[0]),
    "what follows from a neighbour's MAC": plain(eui(NEAR.mac)),
    "what follows from nobody's": plain(eui("02:00:00:11:22:33")),
    "what a guest elsewhere chose": plain(TAKEN),
    "what a guest here chose": plain(OTHER),
    "a choice from another block": plain(IPv6Address(int(TAKEN) ^ 1 << 64)),
    "that it has what a guest elsewhere chose": nd(advert(TAKEN), LOCAL[2]),
    "that it has what a guest here chose": nd(advert(OTHER), LOCAL[2]),
    "that it has what follows from a neighbour's MAC": nd(advert(eui(NEAR.mac)), LOCAL[2]),
    "that it has what nobody has, without asking": nd(advert(FREE), LOCAL[2]),
    "that a guest elsewhere may not have its choice": nd(solicit(TAKEN, b""), NOBODY),
    "that a guest here may not have its choice": nd(solicit(OTHER, b""), NOBODY),
    "that a neighbour may not have what follows from its MAC": nd(solicit(eui(NEAR.mac), b""), NOBODY),
    "that a neighbour may not have what IPAM gave": nd(solicit(LOCAL[3], b""), NOBODY),
    "that a choice of its own is behind a neighbour's MAC": nd(advert(eui(ONE.mac), link(2, TWO.mac)), LOCAL[2]),
    "a choice in an extension header's shadow": frame(
        ipv6(TAKEN, ALL_NODES, 60, b"\x3b\0\1\4\0\0\0\0" + MARK)
    ),
    "a choice in a fragment": frame(ipv6(OTHER, ALL_NODES, 44, b"\x11\0\0\1\0\0\0\7" + MARK)),
}  # fmt: skip


def test_nobody_takes_an_address_that_is_anothers_or_may_be_given(
    guests: tuple[Cluster, tuple[Guest, ...]],
) -> None:
    _, (one, two, near) = guests
    for guest in (one, two, near):
        guest.static()
    for guest, port, address in ((two, TWO, TAKEN), (near, NEAR, OTHER)):
        body = icmpv6(NOBODY, ALL_NODES, solicit(address, b""))
        guest.send(ethernet(port.mac, "33:33:00:00:00:01", 0x86DD, body))
        assert guest.pings(ONE.address)
    counters = lambda: one.node.counters(one.network)[one.name]  # noqa: E731
    for attempt, body in ATTEMPTS.items():
        before = counters()
        for _ in range(3):
            one.send(body)
        assert one.pings(TWO.address) and one.pings(NEAR.address)  # sent after it, and there
        assert not any(body[14:] in seen for guest in (two, near) for seen in guest.received), attempt
        after = counters()
        assert {r: after[r] - before[r] for r in after if after[r] != before[r]} == {"ipv6": 3}, attempt
    good = [nd(solicit(FREE, b""), NOBODY), nd(advert(FREE), FREE), plain(FREE), plain(eui(ONE.mac))]
    before = counters()
    for body in good:
        one.send(body)
    deadline = time.monotonic() + 15
    missing = [(body, guest) for body in good for guest in (two, near)]
    while missing and time.monotonic() < deadline:
        missing = [(b, g) for b, g in missing if not any(b[14:] in seen for seen in g.received)]
    assert not missing and counters() == before
    # A claim is bounded: of many, a few at once.
    claims = [plain(LOCAL[0x7777_0000_0000_0000 + n]) for n in range(200)]
    for body in claims:
        one.send(body)
    assert one.pings(TWO.address)
    assert sum(any(body[14:] in seen for seen in two.received) for body in claims) <= 16
    near.send(ethernet(NEAR.mac, ONE.mac, 0x86DD, ipv6(LOCAL[0x8888_0000_0000_0008], LOCAL[2], 59, MARK)))
    assert near.pings(ONE.address)
    assert any(LOCAL[0x8888_0000_0000_0008].packed in seen for seen in one.received)


def test_one_interface_has_a_bounded_number_of_chosen_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "MOST", 6)
    with Cluster(tmp_path, 1) as cluster:
        ports = make_port(2, "n1"), make_port(3, "n1")
        lan = make_network(*ports, netblock6=LOCAL, slaac=True)
        with cluster.guests(lan, *ports) as (one, two):
            for guest in (one, two):
                guest.static()
            claims = [plain(LOCAL[0x7777_0000_0000_0000 + n]) for n in range(12)]
            for body in (*claims, *claims):
                one.send(body)
            assert one.pings(ports[1].address)
            seen = [sum(body[14:] in frame for frame in two.received) for body in claims]
            assert seen == [2] * 6 + [0] * 6
            two.send(
                ethernet(
                    ports[1].mac, ONE.mac, 0x86DD, ipv6(LOCAL[0x7777_0000_0000_0009], LOCAL[2], 59, MARK)
                )
            )
            assert two.pings(ports[0].address)
            assert any(MARK in frame for frame in one.received)


@pytest.mark.parametrize("address", [LOCAL[0xDEAD_BEEF_0009_0000], IPv6Address("fe80::9:9:9:9")], ids=str)
def test_a_choice_that_another_node_never_saw_is_still_its_owners(
    tmp_path: Path, address: IPv6Address
) -> None:
    with Cluster(tmp_path, 2) as cluster:
        lan = make_network(ONE, NEAR, netblock6=LOCAL, slaac=True)
        with cluster.guests(lan, ONE, NEAR) as (one, near):
            for guest in (one, near):
                guest.static()
            one.send(plain(address))
            assert one.pings(NEAR.address)
            assert any(MARK in frame for frame in near.received)
            both = replace(lan, ports=PORTS)
            cluster.apply(both)  # the second node has a part in it from now on
            with cluster.guest(both, TWO) as two:
                two.static()
                near.received.clear()
                taken = ipv6(address, ALL_NODES, 59, MARK)
                two.send(ethernet(TWO.mac, "33:33:00:00:00:01", 0x86DD, taken))
                free = ipv6(LOCAL[0xDEAD_BEEF_000A_0000], ALL_NODES, 59, MARK)
                two.send(sent := ethernet(TWO.mac, "33:33:00:00:00:01", 0x86DD, free))
                assert within(lambda: sent in near.received)
                assert not any(taken in frame for frame in near.received)
