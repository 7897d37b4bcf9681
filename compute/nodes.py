"""What happens to a node's records: drain, removal, and (with `joining`) how it came."""

import time
from collections.abc import Sequence
from dataclasses import replace

from compute.errors import Conflict
from compute.instances import finish_delete
from compute.networks import move_routers
from compute.objects import Claims, Instance, Node, Transaction
from compute.spec import InstanceState


def drain(txn: Transaction, name: str, *, drained: bool, router_nodes: Sequence[str]) -> Node:
    """Place nothing new on it and move its routers; its instances go on."""
    found = replace(txn.get(Node, name), drained=drained)
    txn.update(found)
    txn.event(Node.KIND, name, "drained" if drained else "takes instances again", type="audit")
    if drained:
        move_routers(txn, name, router_nodes)
    return found


def remove(txn: Transaction, name: str, *, server: str, router_nodes: Sequence[str]) -> Node:
    """Forget it and every instance on it. Raises Conflict for the server's own node, or while instances should run."""
    found = txn.get(Node, name)
    if name == server:
        raise Conflict(f"{name} is the server itself")
    here = [i for i in txn.list(Instance) if i.node == name and i.state != InstanceState.DELETED]
    alive = [i for i in here if i.state != InstanceState.DELETE_WAIT]
    if alive:
        raise Conflict(
            f"node {name} has {len(alive)} instances",
            hint="delete them first; they go when the node is removed",
        )
    for instance in here:
        finish_delete(txn, txn.get(Instance, instance.uuid))
    move_routers(txn, name, router_nodes)
    txn.delete(Claims, name)
    found = replace(found, state="deleted", identity="", lastseen_s=time.time())
    txn.update(found)
    txn.event(Node.KIND, name, "removed", type="audit")
    return found
