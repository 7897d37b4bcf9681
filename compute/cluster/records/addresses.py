"""Who has which address: every one changes hands inside a transaction.

Each network has one `Ipam` record. Whoever adds or removes an interface writes it, so two of them never work from the
same picture; that makes it safe to look at the list of a network's interfaces inside such a transaction.
"""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import ClassVar

from compute.cluster.records.epochs import check
from compute.cluster.records.transaction import Stored, Transaction
from compute.errors import Conflict, Invalid, NoCapacity
from net import ipam

FLOATING = "floating"  # name of the floating pool's Ipam record


@dataclass(frozen=True, slots=True, kw_only=True)
class Ipam(Stored):
    """A network's addresses, or the floating pool's."""

    KIND: ClassVar[str] = "ipam"
    name: str
    pool: ipam.Pool


def parse_address(text: str) -> IPv4Address:
    """Raises Invalid."""
    try:
        return IPv4Address(text)
    except AddressValueError as err:
        raise Invalid(f"not an IPv4 address: {text[:80]!r}") from err


def parse_within(text: str, block: IPv4Network | IPv6Network) -> str:
    """Raises Invalid."""
    with suppress(AddressValueError):
        found = type(block.network_address)(text)
        if found in block and "%" not in text:
            return str(found)
    raise Invalid(f"{text[:80]} is no address of {block}")


def parse_any(text: str) -> str:
    """Of either kind, without a zone. Raises Invalid."""
    with suppress(ValueError):
        if "%" not in text:
            return str(ip_address(text))
    raise Invalid(f"not an address: {text[:80]!r}")


def counted(text: str, netblock: IPv4Network, block6: IPv6Network | None) -> IPv4Address:
    """What stands for an address of either kind in a network's pool. Raises Invalid."""
    if block6 is None or (":" not in text and netblock != ipam.UNKNOWN):
        return parse_address(text)
    far = int(IPv6Address(parse_within(text, block6))) - int(block6[0])
    if far < netblock.num_addresses:
        return netblock[far]
    hint = f"the last one is {block6[netblock.num_addresses - 2]}"
    raise Invalid(f"{text[:80]} is further in {block6} than guests' addresses go", hint=hint)


def ensure_floating(txn: Transaction, pool: IPv4Network | None) -> None:
    """Make the floating pool's record, or follow the configuration. Raises Conflict while the old one is in use."""
    known = txn.find(Ipam, FLOATING)
    if pool is None or (known is not None and known.pool.netblock == pool):
        return
    if known is not None and known.pool.held:
        raise Conflict(f"the floating pool cannot become {pool}: {known.pool.netblock} is in use")
    txn.update(Ipam(name=FLOATING, pool=ipam.Pool.of(pool), revision=known.revision if known else 0))


def take_floating(txn: Transaction, holder: str) -> str:
    check(txn)
    known = txn.find(Ipam, FLOATING)
    if known is None:
        raise NoCapacity("there is no floating pool", hint="set floating_pool and uplink in config.toml")
    pool, address = ipam.allocate(known.pool, holder, time.time())
    txn.update(replace(known, pool=pool))
    return str(address)


def give_back_floating(txn: Transaction, address: str) -> None:
    known = txn.find(Ipam, FLOATING) if address else None
    if known is None:
        return
    holder = known.pool.held.get(IPv4Address(address), "")
    pool = ipam.release(known.pool, IPv4Address(address), holder, time.time())
    txn.update(replace(known, pool=pool))
