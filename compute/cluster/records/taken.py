"""What there is once, and who has it: names, numbers, the room on a node, and what only the servers here know.

One record of claims per node, so that no two placements take the last room.
"""

import hmac
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from compute.cluster.records.transaction import Stored, Transaction
from compute.errors import Conflict
from compute.wire.spec import DiskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken(Stored):
    """A unique thing and who has it: `instance/<namespace>/<name>`, `vni/<n>`, `floating/<address>`, a request key."""

    KIND: ClassVar[str] = "taken"
    name: str
    owner: str
    note: str = ""
    created_s: float = 0


def take(txn: Transaction, name: str, owner: str, note: str = "") -> None:
    """Raises Conflict when somebody has it."""
    txn.create(Taken(name=name, owner=owner, note=note, created_s=time.time()))


def take_name(txn: Transaction, kind: str, namespace: str, name: str, owner: str) -> None:
    """An object's name, of which its namespace has one. Raises Conflict."""
    if txn.find(Taken, f"{kind}/{namespace}/{name}") is not None:
        a = "an" if kind[0] in "aeiou" else "a"
        problem = f"there is {a} {kind} {name} in namespace {namespace} already"
        raise Conflict(problem, hint=f"sf {kind} show {name}")
    take(txn, f"{kind}/{namespace}/{name}", owner)


def _summed(old: Mapping[str, Any]) -> dict[str, Any]:
    """Version 0.1 named every instance with its share, in the one record that each placement wrote anew."""
    sums = {part: sum(old.get(part, {}).values()) for part in ("cpus", "memory_mib")}
    return {**old, **sums, "schema": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims(Stored):
    """Sums over the instances placed there that are not deleted: as large for a thousand of them as for one."""

    KIND: ClassVar[str] = "claims"
    SCHEMA: ClassVar[int] = 2
    UPGRADES: ClassVar = {1: _summed}
    name: str
    cpus: int = 0
    memory_mib: int = 0
    disk_bytes: int | None = None
    """Of all disks, as large as they may become. None: not counted yet, or written by a version that counts none; then
    `scheduler.rooms` counts the instances themselves, and `scheduler.take` keeps that."""


def disk_bytes(disks: Iterable[DiskSpec]) -> int:
    """How much guests may write to them, as far as sizes are known already; a CD-ROM stays empty."""
    return sum(disk.size_bytes for disk in disks if not disk.cdrom)


def claim(txn: Transaction, node: str, cpus: int, memory_mib: int, disk_bytes: int) -> None:
    """Take so much of a node, or give it back where the figures are negative. A node that is gone has no claims."""
    found = txn.find(Claims, node)
    if found is not None:
        now = replace(found, cpus=found.cpus + cpus, memory_mib=found.memory_mib + memory_mib)
        txn.update(now if now.disk_bytes is None else replace(now, disk_bytes=now.disk_bytes + disk_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret(Stored):
    KIND: ClassVar[str] = "secret"
    name: str
    value: str = field(repr=False)  # 256 random bits, in hex


def secret(txn: Transaction, name: str, *, renew: bool = False, first: str = "") -> str:
    """A secret, made (or `first`) when first asked for, anew on `renew`. Version 0.1 had it as a Taken's owner."""
    found, former = txn.find(Secret, name), txn.find(Taken, name)
    if found is None or renew:
        kept = former.owner if former and not renew else first or secrets.token_hex(32)
        found = txn.update(Secret(name=name, value=kept))
    if former:
        txn.delete(Taken, name)
    return found.value


def store_token(txn: Transaction, node: str) -> str:
    """With which a joined node reads the server's stores; another for all when a node was removed."""
    return hmac.digest(site_secret(txn), f"stores/{node}".encode(), "sha256").hex()


def site_secret(txn: Transaction, *, renew: bool = False) -> bytes:
    """What the nodes' image services know each other by; anew when a node was removed."""
    return bytes.fromhex(secret(txn, "site-secret", renew=renew))
