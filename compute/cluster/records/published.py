"""Published ports: those of the router node's own addresses that lead to a guest.

Each leads to one guest in the installation, because any node may come to route any network.
"""

import re
from collections.abc import Collection
from dataclasses import replace

from compute.cluster.records.interfaces import Interface, published_names
from compute.cluster.records.networks import find_routed
from compute.cluster.records.taken import Taken, take
from compute.cluster.records.transaction import Transaction
from compute.errors import Conflict, Denied, Invalid, NotFound
from net import VXLAN_PORT, Published

_FORM = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?:([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp))?")
_MOST, _LOW = 256, 1024  # of one interface: each port has a record, and a line in the router's rules


def parse(text: str) -> Published:
    """`8080:80`, `53:53/udp`, `9000-9009:9000-9009`. Raises Invalid."""
    hint = "OUTER:INNER or FIRST-LAST:FIRST-LAST, ports from 1 to 65535, then /tcp or /udp"
    found = _FORM.fullmatch(text)
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
