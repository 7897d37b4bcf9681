"""How another machine becomes a node: a single-use token, then a secret of its own over TLS with a pinned certificate.

Only hashes of tokens and secrets are stored: both are 256 random bits, so a fast hash is enough.
"""

import hashlib
import hmac
import secrets
import time
from dataclasses import replace

from compute.cluster.records.nodes import Node
from compute.cluster.records.secrets import store_token
from compute.cluster.records.taken import Claims, Taken, take
from compute.cluster.records.transaction import Transaction, check_name, new_uuid
from compute.errors import Conflict, Denied, Unauthenticated
from compute.wire.spec import JoinToken

TOKEN_S = 600.0


def hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def make_token(txn: Transaction, fingerprint: bytes) -> JoinToken:
    """Good once, for TOKEN_S."""
    token = JoinToken(fingerprint, secrets.token_urlsafe(32))
    take(txn, f"join/{hashed(token.secret)}", "")
    return token


def join(txn: Transaction, secret: str, name: str) -> tuple[Node, str]:
    """Use up the token; returns the node and the secret that its agent shows from now on.

    Raises Denied (unknown, used or old token), Conflict (a node of that name is there), Invalid (the name).
    """
    token = txn.find(Taken, f"join/{hashed(secret)}")
    if token is None or token.created_s < time.time() - TOKEN_S:
        raise Denied("the join token is unknown, used or too old", hint="make a new one: sf node token")
    known = txn.find(Node, check_name(name, "node name"))
    if known is not None and known.state != "deleted":
        raise Conflict(f"there is a node {name} already", hint=f"sf node remove {name}, or use another name")
    identity = secrets.token_urlsafe(32)
    node = Node(uuid=new_uuid(), name=name, identity=hashed(identity), lastseen_s=time.time())
    txn.delete(Taken, token.name)
    txn.update(replace(node, revision=known.revision if known else 0))
    txn.create(Claims(name=name, disk_bytes=0))
    txn.event(Node.KIND, name, "the node joined", type="audit")
    return node, identity


def check_reader(txn: Transaction, name: str, token: str) -> None:
    """Whether a node may read the server's stores. Raises Unauthenticated."""
    node = txn.find(Node, name)
    right = node is not None and node.state != "deleted" and node.identity
    if not right or not hmac.compare_digest(store_token(txn, name).encode(), token.encode()):
        raise Unauthenticated(f"node {name[:80]} may not read stores by this token")


def check_identity(txn: Transaction, name: str, identity: str) -> None:
    """Raises Unauthenticated, also for a node that was removed."""
    node = txn.find(Node, name)
    if node is None or not node.identity or not hmac.compare_digest(node.identity, hashed(identity)):
        hint = "join anew: sf node token"
        raise Unauthenticated(f"node {name[:80]} is not known by this secret", hint=hint)
