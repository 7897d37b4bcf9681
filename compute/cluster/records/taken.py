"""Things of which there is one, and who has it."""

import time
from dataclasses import dataclass
from typing import ClassVar

from compute.cluster.records.stored import Stored
from compute.cluster.records.transaction import Transaction
from compute.errors import Conflict


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
        problem = (
            f"there is {'an' if kind[0] in 'aeiou' else 'a'} {kind} {name} in namespace {namespace} already"
        )
        raise Conflict(problem, hint=f"sf {kind} show {name}")
    take(txn, f"{kind}/{namespace}/{name}", owner)
