"""What the instances of a node hold of it: one record per node, so that no two placements take the last room."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from compute.cluster.records.stored import Stored
from compute.cluster.records.transaction import Transaction


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


def claim(txn: Transaction, node: str, cpus: int, memory_mib: int) -> None:
    """Take so much of a node, or give it back where the figures are negative. A node that is gone has no claims."""
    found = txn.find(Claims, node)
    if found is not None:
        txn.update(replace(found, cpus=found.cpus + cpus, memory_mib=found.memory_mib + memory_mib))
