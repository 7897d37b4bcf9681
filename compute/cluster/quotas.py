"""What a namespace may have at most of what there is not enough of for all.

Whoever takes more writes the namespace's record of limits in the same transaction, so two of them never work from the
same picture; that makes it safe to count what is there, and nothing needs to be given back.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

from compute.cluster.records.instances import Instance
from compute.cluster.records.interfaces import Interface
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.networks import Network
from compute.cluster.records.rules import Rules
from compute.cluster.records.transaction import Stored, Transaction
from compute.errors import NoCapacity

DEFAULTS = {"instances": 200, "cpus": 1000, "memory_mib": 1 << 20, "disk_gb": 1 << 15, "stored_gb": 1024}
DEFAULTS |= {"networks": 16, "floating": 8, "published": 1024, "rules": 64, "keys": 64, "trusts": 64}
"""More than a home has, and less than all addresses, or a host full of dnsmasq. The administrator's has no limits."""
_KINDS = Instance, Network, Interface, Rules, Namespace
_COUNTED: dict[str, type[Stored]] = {kind.KIND: kind for kind in _KINDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota(Stored):
    KIND: ClassVar[str] = "quota"
    name: str
    limits: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, txn: Transaction, namespace: str) -> "Quota":
        return txn.find(cls, namespace) or cls(name=namespace)

    def most(self, what: str) -> int:
        return self.limits.get(what, 1 << 40 if self.name == "system" else DEFAULTS[what])

    def check(self, what: str, count: float) -> None:
        """Raises NoCapacity with sum and limit."""
        if count > self.most(what):
            why = f"namespace {self.name} would have {what} {count:.6g}, of {self.most(what)} at most"
            raise NoCapacity(why, hint=f"sf namespace quota show {self.name}")


def used(txn: Transaction, namespace: str) -> Counter[str]:
    """What it has of each, but for stored bytes."""
    every = (_held(one) for kind in _COUNTED.values() for one in txn.list(kind))
    return sum((held for owner, held in every if owner == namespace), Counter[str]())


def enforce(txn: Transaction) -> None:
    """The last act of a transaction that somebody asked for. Raises NoCapacity."""
    more: dict[str, Counter[str]] = {}
    for key, value in txn.writes.items():
        if kind := _COUNTED.get(key.partition("/")[0]):
            was = txn.reads[key] if key in txn.reads else txn.store.get(key)
            for data, sign in (value, 1), (was and was.value, -1):
                owner, held = _held(kind.decode(data, 0)) if data else ("", Counter[str]())
                more.setdefault(owner, Counter()).update({what: sign * count for what, count in held.items()})
    for owner, counts in more.items():
        quota = Quota.of(txn, owner)
        if (wanted := +counts) and (owner != "system" or quota.limits):
            txn.get(Namespace, owner)  # nothing is made for one that is deleted meanwhile
            txn.update(quota)
            there = used(txn, owner)
            for what in wanted:
                quota.check(what, there[what] + counts[what])


def _held(one: Any) -> tuple[str, Counter[str]]:
    """Whose it is, and what of."""
    held: dict[str, int] = {}
    if isinstance(one, Namespace):
        return one.name, Counter(keys=len(one.keys), trusts=len(one.trust))
    if isinstance(one, Interface):
        held = {"floating": int(bool(one.floating)), "published": sum(each.count for each in one.published)}
    elif isinstance(one, Rules):
        held = {"rules": 1}
    elif isinstance(one, Network) and one.state != "deleted":
        held = {"networks": 1, "floating": len(one.routed)}
    elif isinstance(one, Instance) and one.state != "deleted":
        disk_gb = sum(-(-disk.size_bytes >> 30) for disk in one.disks)
        held = {"instances": 1, "cpus": one.cpus, "memory_mib": one.memory_mib, "disk_gb": disk_gb}
    return one.namespace, Counter(held)
