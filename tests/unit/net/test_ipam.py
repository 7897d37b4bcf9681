"""Address allocation as a state machine, and what the rules refuse."""

import itertools
from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from net import ipam
from net.errors import Conflict, Exhausted, Invalid
from net.ipam import Pool

HOLDERS = st.sampled_from([f"port-{n}" for n in range(9)])


class Addresses(RuleBasedStateMachine):
    """A /29 and its guests, beside a plain model: who holds what, and since when what was let go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool.of(IPv4Network("10.0.0.0/29"), reserved=[IPv4Address("10.0.0.6")])
        self.now = 1000.0
        self.held: dict[IPv4Address, str] = {}
        self.released: dict[IPv4Address, float] = {}

    def _usable(self) -> set[IPv4Address]:
        return {IPv4Address(f"10.0.0.{n}") for n in range(2, 6)}

    @rule(holder=HOLDERS)
    def allocate(self, holder: str) -> None:
        free = self._usable() - set(self.held)
        rested = {a for a in free if self.released.get(a, 0) + ipam.QUARANTINE_S <= self.now}
        try:
            self.pool, address = ipam.allocate(self.pool, holder, self.now)
        except Exhausted:
            assert not free
            return
        assert address in free
        if rested:
            assert address == min(rested)
        else:
            assert self.released[address] == min(self.released[a] for a in free)
        self.held[address] = holder
        self.released.pop(address, None)

    @rule(holder=HOLDERS, last=st.integers(0, 9))
    def ask_for_one(self, holder: str, last: int) -> None:
        wanted = IPv4Address(f"10.0.0.{last}")
        try:
            self.pool, address = ipam.allocate(self.pool, holder, self.now, wanted)
        except Conflict:
            assert self.held[wanted] != holder
        except Invalid:
            assert wanted not in self._usable()
        else:
            assert address == wanted
            assert wanted in self._usable()
            assert self.held.get(wanted, holder) == holder
            self.held[wanted] = holder
            self.released.pop(wanted, None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(sorted(self.held)))
        holder = self.held.pop(address)
        self.pool = ipam.release(self.pool, address, holder, self.now)
        self.released[address] = self.now

    @rule(holder=HOLDERS, last=st.integers(0, 7))
    def release_what_is_not_held(self, holder: str, last: int) -> None:
        address = IPv4Address(f"10.0.0.{last}")
        if self.held.get(address) != holder:
            assert ipam.release(self.pool, address, holder, self.now) == self.pool

    @rule(passed_s=st.floats(0.5, 400))
    def time_passes(self, passed_s: float) -> None:
        self.now += passed_s

    @invariant()
    def holds_exactly_what_the_model_holds(self) -> None:
        assert dict(self.pool.held) == self.held
        assert len(self.pool.held) <= 4
        assert not set(self.pool.quarantined) & set(self.pool.held)


TestAddresses = Addresses.TestCase


@pytest.mark.parametrize("prefix", range(26, 30))
def test_a_network_gives_out_every_address_but_its_own_three(prefix: int) -> None:
    pool = Pool.of(IPv4Network(f"10.0.0.0/{prefix}"))
    for n in range(2 ** (32 - prefix) - 3):
        pool, _ = ipam.allocate(pool, f"port-{n}", 0)
    with pytest.raises(Exhausted):
        ipam.allocate(pool, "one more", 0)


def test_a_full_network_recovers_as_soon_as_one_address_is_released() -> None:
    pool = Pool.of(IPv4Network("10.0.0.0/29"))
    for n in range(5):
        pool, _ = ipam.allocate(pool, f"port-{n}", 0)
    with pytest.raises(Exhausted, match=r"10\.0\.0\.0/29"):
        ipam.allocate(pool, "late", 0)
    pool = ipam.release(pool, IPv4Address("10.0.0.4"), "port-2", 0)
    pool, address = ipam.allocate(pool, "late", 1)
    assert address == IPv4Address("10.0.0.4")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10.0.0.0/30", "too small"),
        ("10.0.0.0/31", "too small"),
        ("10.0.0.1/24", "host bits"),
        ("fd00::/64", "no IPv4 network"),
        ("0.0.0.0/0", "too large"),
        ("169.254.70.0/24", "reserved"),
        ("127.1.0.0/16", "reserved"),
        ("239.0.0.0/16", "reserved"),
        ("192.168.4.0/22", "192.168.5.0/24"),
        ("lan", "no IPv4 network"),
    ],
)
def test_a_block_that_breaks_a_rule_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(Invalid, match=why):
        ipam.check_netblock(text, [IPv4Network("192.168.5.0/24")])


def test_the_smallest_block_is_allowed() -> None:
    assert ipam.check_netblock("10.0.0.0/29") == IPv4Network("10.0.0.0/29")


@given(st.sets(st.integers(1, 2**24 - 1), max_size=30))
def test_a_vni_is_none_of_those_taken(taken: set[int]) -> None:
    numbers = itertools.chain((vni - 1 for vni in taken), itertools.count())
    vni = ipam.random_vni(taken, choose=lambda below: next(numbers) % below)
    assert vni not in taken
    assert 1 <= vni < 2**24


@pytest.mark.parametrize(
    "text", ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "02:00", "x", ""]
)
def test_a_mac_that_is_no_unicast_address_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        ipam.check_mac(text)


def test_macs_are_written_in_one_way() -> None:
    assert ipam.check_mac("02-AB-cd-00-00-01") == "02:ab:cd:00:00:01"
