"""What only the servers of one installation know."""

import hmac
import secrets
from dataclasses import dataclass, field
from typing import ClassVar

from compute.cluster.records.taken import Taken
from compute.cluster.records.transaction import Stored, Transaction


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
