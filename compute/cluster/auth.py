"""Who calls: namespaces, their keys, and the short-lived tokens that stand for them.

Keys are kept as bcrypt of their SHA-256 (bcrypt alone reads 72 bytes), beside two bytes of a cheap hash: of wrong keys
one in 65,536 costs a bcrypt, of a namespace's own the right one alone. A key that was right once is remembered for this
process as an HMAC under a secret of the process, so that only its first use pays at all. A token is a JWT (HS256,
900 s) that names its key's nonce: changing or removing the key, and its time, end its tokens at once.
"""

import base64
import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bcrypt
import jwt

from compute.cluster.images.artifacts import Artifact
from compute.cluster.quotas import Quota
from compute.cluster.records.instances import Instance
from compute.cluster.records.namespaces import KeyHash, Namespace
from compute.cluster.records.networks import Network
from compute.cluster.records.rules import Rules, delete_rules
from compute.cluster.records.snapshots import Backup, Snapshot
from compute.cluster.records.taken import Taken, secret
from compute.cluster.records.transaction import Transaction, check_name, transact
from compute.cluster.state.protocol import StateStore
from compute.errors import ComputeError, Conflict, Denied, Invalid, NotFound, Unauthenticated, Unavailable
from compute.wire.spec import InstanceState
from imagestore import durable, listening

SYSTEM = "system"  # the administrator's namespace: it sees and may do everything
TOKEN_S = 900

_BCRYPT_ROUNDS = 10
_LINE = 16
_TRIES = 32  # wrong keys from one address for one namespace at once; then one a second
_ISSUER = "sf"
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
"""All else is a change, streams too, and no key's that only reads; it logs in, for which nobody is asked."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a token stands for. `sees` holds the namespaces that trust it, its own included."""

    namespace: str
    key_name: str
    sees: frozenset[str]
    claims: dict[str, str]  # of its token; `meant` says what alone that is good for, once
    read_only: bool = False

    @property
    def admin(self) -> bool:
        return self.namespace == SYSTEM

    def may(self, namespace: str) -> bool:
        return self.admin or namespace in self.sees


def _digest(key: str) -> bytes:
    return base64.b64encode(hashlib.sha256(key.encode()).digest())


def hash_key(key: str) -> KeyHash:
    """Costs tens of milliseconds: do it outside transactions."""
    if not key or len(key) > 1024:
        raise Invalid("a key has 1 to 1024 characters")
    hashed = bcrypt.hashpw(_digest(key), bcrypt.gensalt(_BCRYPT_ROUNDS)).decode()
    nonce = secrets.token_hex(8)
    return KeyHash(hash=hashed, nonce=nonce, lookup=_lookup(key, nonce))


def _lookup(key: str, nonce: str) -> str:
    return hashlib.sha256(f"{nonce}\0{key}".encode()).hexdigest()[:4]


def basic(authorization: str) -> tuple[str, str]:
    """Name and password of a Basic Authorization header (RFC 7617). Raises Unauthenticated."""
    scheme, _, told = authorization.partition(" ")
    try:
        name, colon, password = base64.b64decode(told).decode().partition(":")
    except ValueError as err:
        raise Unauthenticated("not NAME:PASSWORD in base64") from err
    if scheme.lower() != "basic" or not colon:
        raise Unauthenticated("no name and password")
    return name, password


class Authority:
    """Checks keys and tokens against the state store."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._pepper = secrets.token_bytes(32)
        self._known: dict[bytes, str] = {}
        """HMAC of a key that was right → the nonce of the record that it matched."""
        self._sure, self._slow = threading.Lock(), threading.Lock()
        self._line = threading.BoundedSemaphore(_LINE)
        """One bcrypt at a time of what is most likely right; keys of 0.1 have a line of their own, a short one."""
        self._tries = listening.Buckets(per_second=1, burst=_TRIES)
        self._jwt_secret = transact(store, lambda txn: secret(txn, "jwt-secret"))

    def login(self, namespace: str, key: str, address: str = "", *, lasts_s: int = TOKEN_S) -> dict[str, Any]:
        """The answer of POST /auth. Raises Unauthenticated, in the same words where there is no such namespace.

        address: who asks, as `listening.origin` has it. Raises Unavailable after too many wrong keys from there.
        """
        found = Transaction(self._store).find(Namespace, namespace)
        mark = hmac.digest(self._pepper, f"{namespace}\0{key}".encode(), "sha256")
        keys = found.keys if found else {}
        seen = self._known.get(mark)
        name = next((name for name, known in keys.items() if known.nonce == seen), "")
        if not name:
            name = self._find(namespace, key, keys, address)
            self._known[mark] = keys[name].nonce
        if keys[name].expired:
            raise Unauthenticated(f"key {name} of namespace {namespace} has expired", hint="sf key add")
        token = self.token(lasts_s, sub=namespace, key=name, nonce=keys[name].nonce)
        return {"access_token": token, "token_type": "Bearer", "expires_in": lasts_s}

    def token(self, lasts_s: int, **claims: str) -> str:
        now = int(time.time())
        whole = claims | {"iss": _ISSUER, "iat": now, "exp": now + lasts_s}
        return jwt.encode(whole, self._jwt_secret, algorithm="HS256")

    def _find(self, namespace: str, key: str, keys: Mapping[str, KeyHash], address: str) -> str:
        """Which of a namespace's keys it is."""
        if not self._tries.take((address, namespace)):
            raise Unavailable(f"too many wrong keys for {namespace[:80]} from {address}", hint="wait a bit")
        for name, known in keys.items():
            lookup = _lookup(key, known.nonce)
            if known.lookup in ("", lookup) and self._matches(key, known):
                self._tries.take((address, namespace), -1)
                if not known.lookup:
                    self._upgrade(namespace, name, replace(known, lookup=lookup))
                return name
        raise Unauthenticated(f"wrong key for namespace {namespace[:80]}, or there is none")

    def _matches(self, key: str, known: KeyHash) -> bool:
        if known.lookup:
            with self._sure:
                return bcrypt.checkpw(_digest(key), known.hash.encode())
        if not self._line.acquire(blocking=False):
            raise Unavailable("too many logins at once", hint="try again in a moment")
        try:
            with self._slow:
                return bcrypt.checkpw(_digest(key), known.hash.encode())
        finally:
            self._line.release()

    def _upgrade(self, namespace: str, name: str, known: KeyHash) -> None:
        def action(txn: Transaction) -> None:
            found = txn.get(Namespace, namespace)
            if name in found.keys and found.keys[name].nonce == known.nonce:
                txn.update(replace(found, keys=found.keys | {name: known}))

        with suppress(ComputeError):  # it is right all the same, and will be asked for again
            transact(self._store, action)

    def caller(self, told: str, address: str = "", *, method: str = "", begun: bool = False) -> Caller:
        """Whom an Authorization header stands for. Raises Unauthenticated, and Denied where its key may not do that.

        method: what is asked, in HTTP's words; what is none of `_READS` is a change.
        begun: the request was let in before, so that only the end of its key ends it, and not its token's time.
        """
        scheme, _, token = told.partition(" ")
        if scheme.lower() == "basic":  # what a scraper of metrics can be told: it keeps a key, not a token
            token, scheme = self.login(*basic(told), address)["access_token"], "bearer"
        if scheme.lower() not in ("bearer", "ticket") or not token:
            raise Unauthenticated("no token", hint="POST /auth first; sf does, with auth/local-key")
        try:
            options: Any = {"verify_exp": not begun}
            claims = jwt.decode(token, self._jwt_secret, ["HS256"], issuer=_ISSUER, options=options)
        except jwt.InvalidTokenError as err:
            raise Unauthenticated(f"the token does not hold: {err}", hint="authenticate again") from err
        txn, sub, name = Transaction(self._store), claims["sub"], claims["key"]
        if ("meant" in claims) != (scheme.lower() == "ticket" and not method):
            raise Unauthenticated("a ticket opens its stream and nothing else", hint="POST /auth")
        namespace = txn.find(Namespace, sub)
        known = namespace.keys.get(name) if namespace else None
        if known is None or known.nonce != claims["nonce"]:
            raise Unauthenticated("the token's key is gone", hint="authenticate again")
        if known.expired:
            raise Unauthenticated("the token's key has expired", hint="authenticate with another")
        if known.read_only and method not in _READS:
            raise Denied(f"key {name} of namespace {sub} may only read", hint="use another")
        sees = {n.name for n in txn.list(Namespace) if sub in n.trust} | {sub}
        return Caller(sub, name, frozenset(sees), claims, known.read_only)


def create_namespace(txn: Transaction, name: str, keys: Mapping[str, KeyHash]) -> Namespace:
    """Raises Conflict when there is one, Invalid for a bad name."""
    checked = {check_name(key, "key name"): known for key, known in keys.items()}
    made = Namespace(name=check_name(name, "namespace"), keys=checked)
    _trust_nobody(txn, name)
    txn.event(Namespace.KIND, name, " ".join(("created", *map("with key {}".format, keys))), type="audit")
    return txn.create(made)


def _trust_nobody(txn: Transaction, name: str) -> None:
    """Trust ends with the namespace that it named: the next one of that name is somebody else."""
    for other in txn.list(Namespace):
        if name in other.trust:
            txn.update(replace(other, trust=tuple(t for t in other.trust if t != name)))


def delete_namespace(txn: Transaction, name: str) -> bool:
    """With all that the next one of that name must not find. True: there is more, for another transaction.

    Raises Invalid while it has instances or networks (the interface's 400), or for `system`.
    """
    found = txn.get(Namespace, name)
    if name == SYSTEM:
        raise Invalid("the system namespace stays")
    txn.find(Quota, name)  # before the lists: who takes anything meanwhile writes it
    living = (i for i in txn.list(Instance) if i.state != InstanceState.DELETED)
    used = any(name in (i.namespace, *(disk.store for disk in i.disks)) for i in living)
    if used or any(n.namespace == name and n.state != "deleted" for n in txn.list(Network)):
        raise Invalid(f"namespace {name} still has instances or networks", hint="delete them first")
    kinds: tuple[Any, ...] = (Rules, Backup, Snapshot, Artifact, Instance, Network)
    for one in (one for kind in kinds for one in txn.list(kind) if one.namespace == name):
        if txn.room < 5:
            return True
        if isinstance(one, Rules):
            delete_rules(txn, one.uuid)
        elif isinstance(one, Instance | Network):  # deleted: as long as they are read, the administrator's
            txn.update(replace(one, namespace=""))
        elif txn.purge(one):
            return True
    for taken in txn.list(Taken, f"warm/{name}/"):
        if txn.room < 5:
            return True
        txn.delete(Taken, taken.name)
    if txn.purge(found):
        return True
    _trust_nobody(txn, name)
    txn.delete(Quota, name)
    return False


def change_namespace(txn: Transaction, name: str, said: str, **changes: Any) -> Namespace:
    """`said` is its event. Raises NotFound."""
    txn.event(Namespace.KIND, name, said, type="audit")
    return txn.update(replace(txn.get(Namespace, name), **changes))


def set_key(
    txn: Transaction, name: str, key_name: str, key: KeyHash, *, must_exist: bool, **may: Any
) -> None:
    """Add (must_exist False) or change a key. Raises NotFound or Conflict accordingly.

    may: `expires_s`, `read_only`; what is not given stays as it was: a key that is changed may no more than before.
    """
    keys = txn.get(Namespace, name).keys
    if must_exist and key_name not in keys:
        raise NotFound(f"namespace {name} has no key {key_name[:80]}")
    if not must_exist and check_name(key_name, "key name") in keys:
        raise Conflict(f"namespace {name} has a key {key_name} already", hint="PUT changes it")
    was = keys.get(key_name, key)
    made = replace(was, hash=key.hash, nonce=key.nonce, lookup=key.lookup, **may)
    said = f"key {key_name} {'changed' if must_exist else 'added'}"
    change_namespace(txn, name, said, keys=keys | {key_name: made})


def ensure_local_key(store: StateStore, path: Path) -> None:
    """First start: the system namespace, and a key for this machine's root in `path` (mode 0600).

    The file comes first and the hash second, so a crash between them is repaired by the next start.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        durable.write(path, secrets.token_urlsafe(32).encode())
    key = path.read_text().strip()
    found = Transaction(store).find(Namespace, SYSTEM)
    known = found.keys.get("local") if found else None
    good = known and not known.expires_s and not known.read_only
    if known and good and bcrypt.checkpw(_digest(key), known.hash.encode()):
        return
    hashed = hash_key(key)

    def action(txn: Transaction) -> None:
        system = txn.find(Namespace, SYSTEM) or Namespace(name=SYSTEM)
        txn.update(replace(system, keys={**system.keys, "local": hashed}))

    transact(store, action)
