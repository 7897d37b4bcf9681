"""Namespaces: who has keys, and whom each trusts. `auth` says what a key opens."""

import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

from compute.cluster.records.transaction import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyHash:
    """How a namespace's key is recognised; the nonce goes into tokens, so that a changed key ends them."""

    hash: str
    nonce: str
    lookup: str = ""
    """Two bytes of SHA-256 over nonce and key: they refuse a wrong key before bcrypt has to. Version 0.1 had none."""
    expires_s: int = 0  # when it ends, in seconds since the epoch; 0: never
    read_only: bool = False

    @property
    def expired(self) -> bool:
        return 0 < self.expires_s <= time.time()


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace(Stored):
    KIND: ClassVar[str] = "namespace"
    name: str
    keys: dict[str, KeyHash] = field(default_factory=dict)
    trust: tuple[str, ...] = ()  # namespaces whose callers may see and change this one's objects
    store: str = field(default="", repr=False)
    """URL of its own image store; "" until it keeps something (`images/stores`)."""
    metadata: dict[str, Any] = field(default_factory=dict)
