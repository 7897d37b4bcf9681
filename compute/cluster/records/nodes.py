"""Nodes: their records, which of them route, and how one joins, starts, is lost, drained and removed.

One joins by a single-use token, and is known by a secret of its own from then on. Only hashes of both are stored: they
are 256 random bits, so a fast hash is enough.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from typing import Any, ClassVar

from compute.cluster.records.epochs import heard
from compute.cluster.records.instances import Instance, end, finish_delete
from compute.cluster.records.networks import Network
from compute.cluster.records.taken import Claims, Taken, site_secret, store_token, take
from compute.cluster.records.transaction import Stored, Transaction, check_name, new_uuid
from compute.errors import Conflict, Denied, Invalid, Unauthenticated
from compute.wire.codec import from_plain
from compute.wire.spec import InstanceState, JoinToken, NodeFacts, Power
from imagestore import decimal

TOKEN_S = 600.0
_DELETED = 60  # records that go, or change, with one instance, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Node(Stored):
    """A machine. `facts` is what its agent said of it: cpus, memory_mib, address, architecture, release, accel."""

    KIND: ClassVar[str] = "node"
    uuid: str
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    state: str = "created"
    identity: str = ""  # SHA-256 of the secret that its agent shows; "" for the server's own agent
    machine: str = ""
    """The random id in its state directory: the node, whatever its name is. "" until it has said it."""
    drained: bool = False
    lastseen_s: float = 0
    fence: str = ""
    """Random: it was lost, and until it says with this that what is `given` is off there, it is nobody's peer."""
    given: tuple[str, ...] = ()  # guests that others were given, and of which it may have what was there then
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.name


def check_facts(plain: Any) -> NodeFacts:
    """What an agent said of its machine. Raises Invalid for what none is: other nodes and the scheduler build on it."""
    facts = from_plain(NodeFacts, plain)
    try:
        address, (host, _, port) = IPv4Address(facts.address), facts.peer_address.rpartition(":")
        fits = not (address.is_multicast or address.is_unspecified or address.is_reserved)
        fits = fits and (not port or (IPv4Address(host) == address and 0 < (decimal(port) or 0) < 2**16))
    except ValueError as err:
        raise Invalid(f"a node cannot be like that: {err}") from err
    if not fits:
        raise Invalid("a node cannot be like that", hint="address, and peer_address at the same")
    return facts


def facts_of(node: Node) -> NodeFacts | None:
    """What its agent said of it; None before it did, and where version 0.1 kept what makes no sense."""
    with suppress(Invalid):
        return check_facts(node.facts)
    return None


def hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def make_token(txn: Transaction, fingerprint: bytes) -> JoinToken:
    """By which another machine becomes a node: good once, for TOKEN_S."""
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


def drain(txn: Transaction, name: str, *, drained: bool, router_nodes: Sequence[str]) -> Node:
    """Place nothing new on it and move its routers; its instances go on."""
    found = txn.update(replace(txn.get(Node, name), drained=drained))
    txn.event(Node.KIND, name, "drained" if drained else "takes instances again", type="audit")
    if drained:
        move_routers(txn, name, router_nodes)
    return found


def remove(
    txn: Transaction, name: str, *, server: str, alive: bool, router_nodes: Sequence[str]
) -> Node | None:
    """Forget it, and the instances that were on it; None: there are more. Conflict for the server, or one that lives.

    Its identity and the deletions stay: a machine that comes back is told what to remove, until it has done so.
    """
    found = txn.get(Node, name)
    if name == server:
        raise Conflict(f"{name} is the server itself")
    txn.find(Claims, name)  # before the list: who comes or goes meanwhile makes all of this stale
    here = [i for i in txn.list(Instance) if i.node == name and i.state != InstanceState.DELETED]
    if here and alive:
        hint = "delete them first, or switch the node off: then they are given up"
        raise Conflict(f"node {name} is alive and has {len(here)} instances", hint=hint)
    for instance in here:
        if txn.room < _DELETED:
            return None
        finish_delete(txn, txn.get(Instance, instance.uuid), unconfirmed=True)
    heard(txn, name)
    move_routers(txn, name, router_nodes)
    txn.delete(Claims, name)
    found = txn.update(replace(found, state="deleted", lastseen_s=time.time()))
    site_secret(txn, renew=True)
    txn.event(Node.KIND, name, "removed", type="audit")
    return found


def fence(txn: Transaction, name: str, *given: str) -> None:
    """Others refuse it from now on: its packets, its routers, and what it says from before."""
    found = txn.get(Node, name)
    if not found.fence:
        txn.event(Node.KIND, name, "lost: it is refused until it has answered", type="status")
    txn.update(replace(found, fence=secrets.token_hex(8), given=tuple({*found.given, *given})))


def answered(txn: Transaction, name: str, fence: str, here: Mapping[str, str]) -> None:
    """What a node has beside its guests (uuid → power): once all that was given is off there, it is used again."""
    found = txn.get(Node, name)
    given = tuple(uuid for uuid in found.given if uuid in here)
    if fence == found.fence and (fence or given != found.given):
        on = any(here[uuid] != "off" for uuid in given)
        if fence and not on:
            said = f"it has answered, and is used again; kept, off: {', '.join(given)[:1500] or 'nothing'}"
            txn.event(Node.KIND, name, said, type="status")
        txn.update(replace(found, given=given, fence=fence if on else ""))


def booted(txn: Transaction, node: str, after: str = "") -> str:
    """The node's machine has started: its guests are wanted on or off. Returns after which another goes on."""
    last = ""
    for one in txn.list(Instance):
        if one.uuid <= after:
            continue
        if txn.room < 8:
            return last
        last = one.uuid
        if one.node == node and one.ephemeral and one.state == InstanceState.CREATED:
            end(txn, one.uuid, f"{node} has started, and it is ephemeral")
        elif one.node == node and one.state == InstanceState.CREATED and one.autostart != "last":
            ended = one.autostart == "yes" and one.power == Power.ON and one.power_state in ("off", "crashed")
            wanted = Power.ON if one.autostart == "yes" else Power.OFF
            txn.update(replace(one, power=wanted, reboot_hard=one.reboot_hard + ended, updated_s=time.time()))
            said = f"{node} has started; autostart is {one.autostart}"
            txn.event(Instance.KIND, one.uuid, said, type="audit")
    return ""


def find_machine(nodes: Iterable[Node], machine: str, name: str) -> Node | None:
    """The node with this id; else one without that adopts it: the server's own of 0.1, best by its name."""
    own = [n for n in nodes if not n.identity and not n.machine and n.state != "deleted"]
    found = [n for n in nodes if n.machine == machine and machine] or [n for n in own if n.name == name]
    return next(iter(found or (own if len(own) == 1 else [])), None)


def move_routers(txn: Transaction, away_from: str, router_nodes: Sequence[str]) -> list[str]:
    """Give the routers of a node that is dead, drained or gone to others in turn. Returns the networks' UUIDs.

    As many as fit: upkeep moves the rest.
    """
    moved: list[str] = []
    targets = [name for name in router_nodes if name != away_from]
    for network in txn.list(Network):
        routed = network.state == "created" and not network.bridge
        if routed and network.router_node == away_from and targets and txn.room > 8:
            target = targets[len(moved) % len(targets)]
            txn.update(replace(network, router_node=target))
            txn.event(Network.KIND, network.uuid, f"router moved from {away_from} to {target}", type="mutate")
            moved.append(network.uuid)
    return moved


def router_candidates(txn: Transaction, usable: Collection[str]) -> list[str]:
    """Nodes that may route, those with the fewest routers first."""
    nodes = (n for n in txn.list(Node) if not n.drained and not n.fence and n.state != "deleted")
    load = {n.name: 0 for n in nodes if n.name in usable}
    for network in txn.list(Network):
        if network.state == "created" and network.router_node in load:
            load[network.router_node] += 1
    return sorted(load, key=lambda name: (load[name], name))
