"""An instance's states, and how an agent's report moves its record along them.

A report that is no edge of this drawing is ignored; a delete is accepted in every state:

    initial ──► preflight ──► creating ──► created ──────┐
       │            │             │           │          ▼
       ▼            ▼             ▼           ▼      delete-wait ──► deleted
    initial-     preflight-    creating-   created-      │    ▲
     error         error         error       error       ▼    │
       └────────────┴──────┬──────┴───────────┘     delete-wait-error
                           ▼                             │
                         error ◄─────────────────────────┘   (error goes to delete-wait only)
"""

import time
from dataclasses import replace

from compute.cluster.quarantine import Quarantined, forget
from compute.cluster.records.instances import Instance, finish_delete
from compute.cluster.records.transaction import Transaction
from compute.wire.spec import InstanceState, InstanceStatus

S = InstanceState
TRANSITIONS: dict[InstanceState, frozenset[InstanceState]] = {
    S.INITIAL: frozenset({S.PREFLIGHT, S.INITIAL_ERROR, S.DELETE_WAIT}),
    S.PREFLIGHT: frozenset({S.CREATING, S.PREFLIGHT_ERROR, S.DELETE_WAIT}),
    S.CREATING: frozenset({S.CREATED, S.CREATING_ERROR, S.DELETE_WAIT}),
    S.CREATED: frozenset({S.CREATED_ERROR, S.DELETE_WAIT}),
    S.DELETE_WAIT: frozenset({S.DELETED, S.DELETE_WAIT_ERROR}),
    S.DELETED: frozenset(),
    S.INITIAL_ERROR: frozenset({S.ERROR, S.DELETE_WAIT}),
    S.PREFLIGHT_ERROR: frozenset({S.ERROR, S.DELETE_WAIT}),
    S.CREATING_ERROR: frozenset({S.ERROR, S.DELETE_WAIT}),
    S.CREATED_ERROR: frozenset({S.ERROR, S.DELETE_WAIT}),
    S.DELETE_WAIT_ERROR: frozenset({S.ERROR, S.DELETE_WAIT}),
    S.ERROR: frozenset({S.DELETE_WAIT}),
}


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
    now = replace(
        found,
        state=steps[-1] if steps else found.state,
        power_state=status.power_state,
        error_message=status.error_message or (found.error_message if not steps else ""),
        progress=status.progress,
        accel=status.accel or found.accel,
        console_port=status.console_port,
        vdi_port=status.vdi_port,
        agent_state=status.agent_state,
        extra={**found.extra, **status.extra},
    )
    if now == found:
        return
    txn.update(replace(now, updated_s=time.time()))
    for step in steps:
        why = f": {status.error_message}" if step.value.endswith("error") and status.error_message else ""
        txn.event(Instance.KIND, found.uuid, f"state is {step.value}{why}", type="mutate")
    if now.power_state != found.power_state:
        txn.event(Instance.KIND, found.uuid, f"power is {now.power_state}", type="status")
