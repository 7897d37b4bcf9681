"""What happens to a node's records after it has joined: drain and removal."""

import time
from collections.abc import Sequence
from dataclasses import replace

from compute.cluster import joining
from compute.cluster.records.instances import finish_delete
from compute.cluster.records.networks import move_routers
from compute.cluster.records.objects import Claims, Instance, Node, Transaction
from compute.errors import Conflict
from compute.wire.spec import InstanceState


def drain(txn: Transaction, name: str, *, drained: bool, router_nodes: Sequence[str]) -> Node:
    """Place nothing new on it and move its routers; its instances go on."""
    found = replace(txn.get(Node, name), drained=drained)
    txn.update(found)
    txn.event(Node.KIND, name, "drained" if drained else "takes instances again", type="audit")
    if drained:
        move_routers(txn, name, router_nodes)
    return found


def remove(txn: Transaction, name: str, *, server: str, alive: bool, router_nodes: Sequence[str]) -> Node:
    """Forget it, and the instances that were on it. Raises Conflict for the server, or while it lives and has some.

    Its identity stays: a machine that comes back is told that it has nothing to run, and clears up.
    """
    found = txn.get(Node, name)
    if name == server:
        raise Conflict(f"{name} is the server itself")
    here = [i for i in txn.list(Instance) if i.node == name and i.state != InstanceState.DELETED]
    if here and alive:
        hint = "delete them first, or switch the node off: then they are given up"
        raise Conflict(f"node {name} is alive and has {len(here)} instances", hint=hint)
    for instance in here:
        finish_delete(txn, txn.get(Instance, instance.uuid))
    move_routers(txn, name, router_nodes)
    txn.delete(Claims, name)
    found = replace(found, state="deleted", lastseen_s=time.time())
    txn.update(found)
    joining.site_secret(txn, renew=True)
    txn.event(Node.KIND, name, "removed", type="audit")
    return found
