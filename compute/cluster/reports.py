"""What nodes say, brought into the records: each speaks of itself and of the guests that are placed on it.

A node is a machine that somebody else may own by now. What does not fit is dropped or cut, never an error that others
would see: a report says things of many guests.
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import Node
from compute.cluster.records.transaction import Transaction
from compute.errors import Invalid
from compute.wire.codec import from_plain
from compute.wire.spec import InstanceStatus, NodeEvent

_TYPES = frozenset({"audit", "mutate", "status", "resources", "usage"})
_TEXT = 2000
_EXTRA_BYTES = 2**14
_LATE_S, _EARLY_S = 30 * 86400.0, 60.0


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
    agent_system_boot_time: float = 0


def bounded(status: InstanceStatus) -> InstanceStatus:
    """As much of it as a record takes."""
    return replace(
        status,
        power_state=status.power_state[:40],
        error_message=status.error_message[:_TEXT],
        progress=status.progress[:80],
        accel=status.accel[:200],
        agent_state=status.agent_state[:80],
        extra=_extra(status.extra),
    )


def _extra(extra: dict[str, Any]) -> dict[str, Any]:
    try:
        from_plain(_Extra, extra)
    except Invalid:
        return {}
    return extra if len(json.dumps(extra)) <= _EXTRA_BYTES else {}


def keep_events(txn: Transaction, node: str, events: Iterable[NodeEvent]) -> None:
    """Add to the histories of this node and of its guests."""
    now = time.time()
    for event in events:
        if event.object_type == Instance.KIND:
            found = txn.find(Instance, event.object_uuid)
            own = found is not None and found.node == node
        else:
            own = (event.object_type, event.object_uuid) == (Node.KIND, node)
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
