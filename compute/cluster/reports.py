"""What nodes say, brought into the records: each speaks of itself and of the guests that are placed on it.

A node is a machine that somebody else may own by now. What does not fit is dropped or cut, never an error that others
would see: a report says things of many guests. One of an instance that is no edge of this drawing is ignored; a delete
is accepted in every state:

    initial ──► preflight ──► creating ──► created ──────┐
       │            │             │           │          ▼
       ▼            ▼             ▼           ▼      delete-wait ──► deleted
    initial-     preflight-    creating-   created-      │    ▲
     error         error         error       error       ▼    │
       └────────────┴──────┬──────┴───────────┘     delete-wait-error
                           ▼                             │
                         error ◄─────────────────────────┘   (error goes to delete-wait only)
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from compute.cluster.quarantine import Quarantined, forget
from compute.cluster.records.instances import Instance, finish_delete
from compute.cluster.records.nodes import Node
from compute.cluster.records.snapshots import settle_snapshot
from compute.cluster.records.transaction import Transaction
from compute.errors import Invalid
from compute.wire.codec import from_plain
from compute.wire.spec import InstanceState, InstanceStatus, NodeEvent

_TYPES = frozenset({"audit", "mutate", "status", "resources", "usage"})
_TEXT, _SNAPSHOTS = 2000, 16
_EXTRA_BYTES = 2**14
_LATE_S, _EARLY_S = 30 * 86400.0, 60.0

S = InstanceState
TRANSITIONS: dict[InstanceState, frozenset[InstanceState]] = {
    S.INITIAL: frozenset({S.PREFLIGHT, S.INITIAL_ERROR, S.DELETE_WAIT}),
    S.PREFLIGHT: frozenset({S.CREATING, S.PREFLIGHT_ERROR, S.DELETE_WAIT}),
    S.CREATING: frozenset({S.CREATED, S.CREATING_ERROR, S.DELETE_WAIT}),
    S.CREATED: frozenset({S.CREATED_ERROR, S.DELETE_WAIT}),
    S.DELETE_WAIT: frozenset({S.DELETED, S.DELETE_WAIT_ERROR}),
    S.DELETED: frozenset(),
    S.ERROR: frozenset({S.DELETE_WAIT}),
    **{s: frozenset({S.ERROR, S.DELETE_WAIT}) for s in S if s.endswith("-error")},
}


@dataclass(frozen=True, slots=True)
class _Arrived:
    present_bytes: int = 0
    data_bytes: int = 0
    received: dict[str, int] = field(default_factory=dict)
    waited_s: float = 0


@dataclass(frozen=True, slots=True)
class _Extra:
    """What the API and the metrics read of `InstanceStatus.extra`."""

    vdi_password: str = ""
    image_bytes: dict[str, _Arrived] = field(default_factory=dict)


def path_to(now: InstanceState, reported: InstanceState) -> list[InstanceState]:
    """The states from `now` (exclusive) to `reported`; [] if a node may not take it there.

    An agent reports the newest state only, so a report may stand for several steps. Only the API starts a deletion.
    """
    paths: list[list[InstanceState]] = [[now]]
    for path in paths:
        for following in sorted(TRANSITIONS[path[-1]]):
            if following == S.DELETE_WAIT or following in path:
                continue
            if following == reported:
                return [*path[1:], following]
            paths.append([*path, following])
    return []


def settle(txn: Transaction, node: str, status: InstanceStatus) -> None:
    """Bring one report of `node` into the record; what does not fit is dropped."""
    found = txn.find(Instance, status.uuid)
    orphan = txn.find(Quarantined, status.uuid) if status.state == InstanceState.DELETED else None
    if orphan is not None and orphan.node == node and orphan.delete:
        forget(txn, orphan)
    if found is not None and node in found.left and status.state == InstanceState.DELETED:
        txn.update(replace(found, left=tuple(name for name in found.left if name != node)))
        txn.event(Instance.KIND, found.uuid, f"{node} has removed what it left there", type="status")
    if found is None or found.node != node:
        return
    if status.state == InstanceState.DELETED:
        if found.state == InstanceState.DELETE_WAIT:
            finish_delete(txn, found)
        elif found.unconfirmed:
            txn.update(replace(found, unconfirmed=False))
        return
    steps = path_to(found.state, status.state)
    if steps and steps[-1].value.endswith("-error"):
        steps.append(InstanceState.ERROR)
    for said in status.snapshots[:_SNAPSHOTS]:
        settle_snapshot(txn, found, said)
    error = status.error_message[:_TEXT]
    arrives = found.arriving and status.state != InstanceState.CREATED
    now = replace(
        found,
        state=steps[-1] if steps else found.state,
        arriving=arrives,
        power_state=found.power_state if arrives else status.power_state[:40],
        error_message=error or ("" if steps or found.arriving else found.error_message),
        progress="",
        accel=status.accel[:200] or found.accel,
        vdi_port=status.vdi_port,
        agent_state=status.agent_state[:80],
        extra={**found.extra, **_extra(status.extra)},
        heard_s=status.leased_s if status.leased_s == found.leased_s else 0,
    )
    if now == found:
        return
    txn.update(replace(now, updated_s=time.time()))
    for step in steps:
        why = f": {error}" if step.value.endswith("error") and error else ""
        txn.event(Instance.KIND, found.uuid, f"state is {step.value}{why}")
    if now.power_state != found.power_state:
        txn.event(Instance.KIND, found.uuid, f"power is {now.power_state}", type="status")


def _extra(extra: dict[str, Any]) -> dict[str, Any]:
    """As much of it as a record takes."""
    try:
        from_plain(_Extra, extra)
    except Invalid:
        return {}
    return extra if len(json.dumps(extra)) <= _EXTRA_BYTES else {}


def keep_events(txn: Transaction, node: str, events: Iterable[NodeEvent]) -> None:
    """Add to the histories of this node and of its guests."""
    now = time.time()
    for event in events:
        guest = txn.find(Instance, event.object_uuid) if event.object_type == Instance.KIND else None
        own = guest.node == node if guest else (event.object_type, event.object_uuid) == (Node.KIND, node)
        if not own or event.type not in _TYPES:
            continue
        known = now - _LATE_S < event.timestamp_s < now + _EARLY_S
        duration_s = event.duration_s
        txn.event(
            event.object_type,
            event.object_uuid,
            event.message[:_TEXT],
            type=event.type,
            timestamp_s=event.timestamp_s if known else now,
            duration_s=duration_s if duration_s is None or math.isfinite(duration_s) else None,
            extra=event.extra if len(json.dumps(event.extra)) <= _EXTRA_BYTES else {},
        )
