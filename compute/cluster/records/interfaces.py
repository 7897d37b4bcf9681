"""Interfaces: how instances hang on networks, with which addresses, and which ports of the router's node lead to them.

A published port leads to one guest in the installation, because any node may come to route any network.
"""

import re
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import Any, ClassVar

from compute.cluster.records.addresses import Ipam, counted, give_back_floating, take_floating
from compute.cluster.records.epochs import check
from compute.cluster.records.networks import Network, find_four, find_routed
from compute.cluster.records.taken import Taken, take
from compute.cluster.records.transaction import Stored, Transaction, new_uuid
from compute.errors import Conflict, Denied, Invalid, NotFound
from net import VXLAN_PORT, Limits, Published, ipam, port_mac

_PUBLISHED = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?:([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp))?")
_MOST, _LOW = 256, 1024  # of one interface: each port has a record, and a line in the router's rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface(Stored):
    KIND: ClassVar[str] = "interface"
    uuid: str
    network_uuid: str
    instance_uuid: str
    namespace: str
    mac: str
    address: str
    order: int
    address6: str = ""
    model: str = "virtio"
    floating: str = ""
    published: tuple[Published, ...] = ()
    rules: tuple[str, ...] = ()  # UUIDs
    limits: Limits = field(default_factory=Limits)
    state: str = "created"  # always; version 0.1 looks at it
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> str:
        """Its address, by IPv4 if it has one; "" until a LAN's DHCP server has given one."""
        return self.address6 if IPv4Address(self.address) in ipam.UNKNOWN else self.address


@dataclass(frozen=True, slots=True)
class Want:
    """An interface as asked for."""

    network: str  # UUID
    address: str = ""
    mac: str = ""
    model: str = "virtio"
    float: bool = False
    rules: tuple[str, ...] = ()
    uuid: str = ""  # of one that was before


def attach(
    txn: Transaction, network: Network, instance_uuid: str, namespace: str, order: int, want: Want
) -> Interface:
    """An interface with an address and a MAC of its own. Raises net's Invalid, Conflict and Exhausted."""
    check(txn)
    if want.float:
        find_four(txn, network.uuid)
    uuid = want.uuid or new_uuid()
    known = txn.get(Ipam, network.uuid)
    wanted = counted(want.address, known.pool.netblock, network.block6) if want.address else None
    pool, address = ipam.allocate(known.pool, uuid, time.time(), wanted, want.address)
    txn.update(replace(known, pool=pool))
    taken = {i.mac for i in interfaces_on(txn, network.uuid)}
    mac = ipam.check_mac(want.mac) if want.mac else port_mac(uuid)
    if mac in taken:
        hint = "give none: one is chosen"
        raise Conflict(f"MAC address {mac} is in use on network {network.name}", hint=hint)
    made = Interface(
        uuid=uuid,
        network_uuid=network.uuid,
        instance_uuid=instance_uuid,
        namespace=namespace,
        mac=mac,
        address=str(address),
        address6=str(ipam.beside(pool.netblock, network.block6, address) or ""),
        order=order,
        model=want.model,
        floating=take_floating(txn, uuid) if want.float else "",
        rules=want.rules,
    )
    txn.event(Network.KIND, network.uuid, f"{made.known} given to interface {uuid}")
    return txn.create(made)


def detach(txn: Transaction, interface: Interface) -> None:
    """Give the addresses back. Doing it twice is success."""
    known = txn.find(Ipam, interface.network_uuid)
    if known is not None:
        address = IPv4Address(interface.address)
        txn.update(replace(known, pool=ipam.release(known.pool, address, interface.uuid, time.time())))
        said = f"{interface.known} released by interface {interface.uuid}"
        txn.event(Network.KIND, interface.network_uuid, said)
    give_back_floating(txn, interface.floating)
    for name in published_names(interface.published):
        txn.delete(Taken, name)
    txn.delete(Interface, interface.uuid)


def published_names(every: Iterable[Published]) -> list[str]:
    """Of the records by which each port leads to one guest."""
    return [f"published/{each.protocol}/{each.port + n}" for each in every for n in range(each.count)]


def interfaces_on(txn: Transaction, network_uuid: str) -> list[Interface]:
    return [i for i in txn.list(Interface) if i.network_uuid == network_uuid]


def float_interface(txn: Transaction, uuid: str, *, on: bool) -> Interface:
    """Give it an address of the floating pool, or take that away. Raises Conflict when it has one, or none."""
    found = txn.get(Interface, uuid)
    if bool(found.floating) == on:
        has = f"has the floating address {found.floating} already" if on else "has no floating address"
        raise Conflict(f"interface {uuid} {has}")
    if on:
        find_four(txn, found.network_uuid)
        return txn.update(replace(found, floating=take_floating(txn, uuid)))
    give_back_floating(txn, found.floating)
    return txn.update(replace(found, floating=""))


def parse_published(text: str) -> Published:
    """`8080:80`, `53:53/udp`, `9000-9009:9000-9009`. Raises Invalid."""
    hint = "OUTER:INNER or FIRST-LAST:FIRST-LAST, ports from 1 to 65535, then /tcp or /udp"
    found = _PUBLISHED.fullmatch(text)
    if found is None:
        raise Invalid(f"not ports to publish: {text[:80]!r}", hint=hint)
    first, last, inner, inner_last = (int(number or 0) for number in found.groups()[:4])
    count = (last or first) - first + 1
    if count < 1 or min(first, inner) < 1 or max(first, inner) + count > 65536:
        raise Invalid(f"not ports to publish: {text[:80]!r}", hint=hint)
    if inner_last and inner_last != inner + count - 1:
        raise Invalid(f"{text[:80]!r} has two ranges of different lengths", hint=hint)
    return Published(found[5] or "tcp", first, inner, count)


def publish(
    txn: Transaction, uuid: str, wanted: Published, *, listening: Collection[tuple[str, int]], admin: bool
) -> Interface:
    """Lead the ports to an interface. `listening`: where the router's node has servers. Twice is once.

    Raises Conflict for a port that is in use, Denied.
    """
    found = txn.get(Interface, uuid)
    find_routed(txn, found.network_uuid)
    if wanted in found.published:
        return found
    if wanted.port < _LOW and not admin:
        raise Denied(f"ports below {_LOW} are the administrator's to publish")
    if sum(each.count for each in found.published) + wanted.count > _MOST:
        raise Invalid(f"an interface has at most {_MOST} published ports")
    for port, name in enumerate(published_names([wanted]), wanted.port):
        if txn.find(Taken, name) is not None:
            raise Conflict(f"port {port}/{wanted.protocol} is published already", hint="choose another port")
        if (wanted.protocol, port) in {*listening, ("udp", VXLAN_PORT)}:
            used = f"a server of the router's node listens on port {port}/{wanted.protocol}"
            raise Conflict(used, hint="choose another port, or stop that server")
        take(txn, name, uuid)
    return txn.update(replace(found, published=(*found.published, wanted)))


def unpublish(txn: Transaction, uuid: str, wanted: Published) -> Interface:
    """Raises NotFound."""
    found = txn.get(Interface, uuid)
    if wanted not in found.published:
        hint = f"published: {', '.join(map(str, found.published)) or 'nothing'}"
        raise NotFound(f"{wanted} is not published", hint=hint)
    for name in published_names([wanted]):
        txn.delete(Taken, name)
    return txn.update(replace(found, published=tuple(each for each in found.published if each != wanted)))
