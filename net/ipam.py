"""Addresses, MACs and VNIs: pure functions over values, which the caller wraps in its own transactions.

    free ──allocate──▶ held ──release──▶ quarantined ──time, or nothing else is free──▶ free

An address in quarantine is given out again only to who asks for it by name, or when no other is left: a new guest
should not meet the old one's connections. Each function returns a new Pool; nothing is changed in place.
"""

import hashlib
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Self

from net.errors import Conflict, Exhausted, Invalid

QUARANTINE_S = 300.0
LARGEST_PREFIX = 29  # the smallest network: five guests and a router
TRANSIT = IPv4Network("169.254.64.0/18")
"""Where the uplinks between a namespace and its host take their /31s from; no network may overlap it."""

UNKNOWN = IPv4Network("0.0.0.0/8")
"""What stands, in a block of all addresses, for one that the LAN's own DHCP server will give; and the whole block of a
network without IPv4, where it counts who is who."""
ANY = IPv4Network("0.0.0.0/0")  # the block of a network on a LAN of which we know nothing
LOCAL6 = IPv6Network("fc00::/7")
"""Unique local addresses (RFC 4193): not the world's, so they are translated on their way there."""
_USABLE6 = (LOCAL6, IPv6Network("2000::/3"))

_RESERVED = tuple(map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")))
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def check_netblock(text: str, excluded: Iterable[IPv4Network] = ()) -> IPv4Network:
    """Parses a network's address block. Raises Invalid for host bits, one that is too small, reserved or excluded.

    Two networks may use the same block: each has its own namespace.
    """
    try:
        netblock = IPv4Network(text)
    except ValueError as error:
        raise Invalid(f"{text!r} is no IPv4 network: {error}", hint="for example 10.42.0.0/24") from error
    if netblock.prefixlen > LARGEST_PREFIX:
        raise Invalid(f"{netblock} is too small", hint=f"the smallest network is a /{LARGEST_PREFIX}")
    if netblock.prefixlen < 8:
        raise Invalid(f"{netblock} is too large", hint="the largest network is a /8")
    for block in (*_RESERVED, *excluded):
        if netblock.overlaps(block):
            raise Invalid(f"{netblock} overlaps {block}, which is reserved", hint="choose another block")
    return netblock


def netblock6(text: str, seed: str) -> IPv6Network:
    """A network's /64: the one written, or for `auto` a unique local one that follows from the seed. Raises Invalid."""
    if text == "auto":
        return IPv6Network((b"\xfd" + hashlib.blake2b(seed.encode(), digest_size=7).digest() + bytes(8), 64))
    with suppress(ValueError):
        block = block_of(text)
        if isinstance(block, IPv6Network) and block.prefixlen == 64 and any(map(block.subnet_of, _USABLE6)):
            return block
    hint = "auto, or for example 2001:db8:1:2::/64"
    raise Invalid(f"{text[:80]!r} is no /64 of global or unique local IPv6 addresses", hint=hint)


def block_of(text: str) -> IPv4Network | IPv6Network:
    """Of either family. Raises ValueError, for a zone (`fe80::%what-you-like`), too: it would stand in rules."""
    if "%" in text:
        raise ValueError("a zone has no place in a block")
    return ip_network(text)


def beside(netblock: IPv4Network, block: IPv6Network | None, address: IPv4Address) -> IPv6Address | None:
    """The IPv6 address of who has `address`: as far into its block, so the one pool gives out both."""
    return block[int(address) - int(netblock[0])] if block else None


def check_mac(text: str) -> str:
    """Returns a MAC in lower case with colons; raises Invalid unless it is a unicast one."""
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise Invalid(f"{text!r} is no unicast MAC address", hint="for example 02:00:5e:10:00:01")
    return mac


def random_vni(taken: Collection[int], choose: Callable[[int], int] = secrets.randbelow) -> int:
    """A VNI (1 to 2**24-1) that is none of those; `choose(n)` gives a number below n."""
    if len(taken) >= 2**24 - 1:
        raise Exhausted("every VXLAN network identifier is in use")
    while (vni := choose(2**24 - 1) + 1) in taken:
        pass
    return vni


@dataclass(frozen=True, slots=True)
class Pool:
    """A block and who holds what of it: a network's addresses, or the floating pool (whose gateway is the
    uplink's and never given out)."""

    netblock: IPv4Network
    gateway: IPv4Address
    reserved: frozenset[IPv4Address] = frozenset()  # never given out, not even on request
    held: Mapping[IPv4Address, str] = field(default_factory=dict)  # address to holder (a port's uuid)
    quarantined: Mapping[IPv4Address, float] = field(default_factory=dict)
    """Address to the time (seconds) when its quarantine ends."""
    first: IPv4Address | None = None
    last: IPv4Address | None = None  # what is chosen from, where that is less than the block

    @classmethod
    def of(cls, netblock: IPv4Network, reserved: Iterable[IPv4Address] = ()) -> Self:
        """A pool with nothing given out; the gateway is the first host."""
        return cls(netblock, netblock[1], frozenset(reserved))


def _check_fixed(pool: Pool, wanted: IPv4Address, holder: str, said: object) -> None:
    if wanted not in pool.netblock:
        raise Invalid(f"{wanted} is not in {pool.netblock}")
    if wanted in (pool.netblock[0], pool.netblock[-1]):
        raise Invalid(f"{said} is the network's own or its broadcast address")
    if pool.netblock == ANY and any(wanted in block for block in _RESERVED):
        raise Invalid(f"{wanted} is no guest's address")
    if wanted == pool.gateway:
        raise Invalid(f"{said} is the network's router")
    if wanted in pool.reserved:
        raise Invalid(f"{wanted} is reserved in {pool.netblock}")
    if pool.held.get(wanted, holder) != holder:
        raise Conflict(f"{said} is in use", hint="choose another address, or none to have one chosen")


def _lowest_free(pool: Pool, now_s: float) -> IPv4Address:
    taken = {pool.gateway, *pool.reserved, *pool.held}
    first, last = int(pool.first or pool.netblock[1]), int(pool.last or pool.netblock[-2])
    for number in range(first, last + 1):
        address = IPv4Address(number)
        if address not in taken and pool.quarantined.get(address, now_s) <= now_s:
            return address
    if waiting := [address for address in pool.quarantined if address not in pool.held]:
        return min(waiting, key=lambda address: (pool.quarantined[address], address))
    hint = "delete an interface, or use a larger network"
    raise Exhausted(f"no address is free in {pool.netblock}", hint=hint)


def allocate(
    pool: Pool, holder: str, now_s: float, wanted: IPv4Address | None = None, said: object = None
) -> tuple[Pool, IPv4Address]:
    """Gives `holder` an address: the wanted one, else the lowest that is free.

    Asking again for what the holder has already is no change. `said`: what errors call the wanted one.
    Raises Invalid, Conflict or Exhausted.
    """
    if wanted is not None:
        _check_fixed(pool, wanted, holder, said or wanted)
    address = wanted or _lowest_free(pool, now_s)
    quarantined = {a: until for a, until in pool.quarantined.items() if until > now_s and a != address}
    return replace(pool, held={**pool.held, address: holder}, quarantined=quarantined), address


def release(pool: Pool, address: IPv4Address, holder: str, now_s: float) -> Pool:
    """Takes an address back; no change when the holder does not have it (the second of two releases)."""
    if pool.held.get(address) != holder:
        return pool
    held = {a: who for a, who in pool.held.items() if a != address}
    quarantined = {a: until for a, until in pool.quarantined.items() if until > now_s}
    quarantined[address] = now_s + QUARANTINE_S
    return replace(pool, held=held, quarantined=quarantined)
