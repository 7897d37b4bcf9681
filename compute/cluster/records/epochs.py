"""The history that the state is part of. A database that was lost, replaced or put back is another one.

Every node remembers the epoch and how far it was (`compute.agent.memory`). Whoever finds a node that saw what this
state does not hold begins a new epoch; until every node has said what runs there, nothing is started, made or given.
A node saw the revision of whatever it was told to run, so no guest is missed by a state that is not older than that.
"""

import logging
import secrets
import time
from dataclasses import dataclass, replace
from typing import ClassVar

from compute.cluster.records.transaction import Stored, Transaction
from compute.errors import Unavailable

log = logging.getLogger(__name__)

_FORMER = 32
AGAIN_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch(Stored):
    KIND: ClassVar[str] = "epoch"
    name: str = "state"
    number: str = ""  # random
    former: tuple[str, ...] = ()  # those before it, the newest first
    waiting: tuple[str, ...] = ()  # nodes that have not said yet what runs there
    why: str = ""
    begun_by: str = ""
    begun_s: float = 0


def epoch(txn: Transaction) -> Epoch:
    """The present one; of a state that has none yet it has no number."""
    return txn.find(Epoch, "state") or Epoch()


def compare(txn: Transaction, nodes: list[str], seen: str, reached: int, *, joined: str = "") -> bool:
    """What one node remembers ("" if nothing) against this state; True if a new epoch begins with it.

    joined: its name, if it is on another machine: one that lies begins no more than one in AGAIN_S.
    """
    now, revision = epoch(txn), txn.store.revision()
    if not now.number and not seen:
        txn.update(Epoch(number=secrets.token_hex(8)))
    if seen in ("", *now.former) or (seen == now.number and reached <= revision):
        return False
    if joined and now.begun_by == joined and time.time() - now.begun_s < AGAIN_S:
        return False
    what = f"at revision {revision}, where a node has seen {reached}" if seen == now.number else "another one"
    why = f"the state is {what} than before: it was put back, replaced or lost"
    begin(txn, nodes, why, seen=seen, by=joined)
    return True


def begin(txn: Transaction, nodes: list[str], why: str, *, seen: str = "", by: str = "") -> None:
    """Another history, in which nothing begins until these nodes have said what runs there."""
    now = epoch(txn)
    former = tuple(number for number in (now.number, seen, *now.former) if number)[:_FORMER]
    log.warning("%s; nothing begins until %s have said what runs there", why, ", ".join(nodes))
    begun = replace(now, number=secrets.token_hex(8), former=former, begun_by=by, begun_s=time.time())
    txn.update(replace(begun, waiting=tuple(sorted(nodes)), why=why))


def heard(txn: Transaction, node: str) -> None:
    """A node has said what runs there, or is gone for good."""
    now = epoch(txn)
    if node in now.waiting:
        txn.update(replace(now, waiting=tuple(name for name in now.waiting if name != node)))


def check(txn: Transaction) -> None:
    """Raises Unavailable while nothing may begin."""
    now = epoch(txn)
    if now.waiting:
        hint = "sf node orphans shows what is found; sf node remove NODE, for one that is gone for good"
        raise Unavailable(f"{now.why}; waiting for {', '.join(now.waiting)} to say what runs", hint=hint)
