"""What a guest's owner says of it: to the record of its instance, and to its history."""

import time
from typing import Any

from compute.agent.guest.host import Host
from compute.wire.spec import InstanceState, InstanceStatus, NodeEvent


class Voice:
    """`stage` is how far the instance's making got: what an error is an error of."""

    def __init__(self, host: Host, uuid: str) -> None:
        self._host, self._uuid = host, uuid
        self.stage = InstanceState.PREFLIGHT
        self.agent_ready: bool | None = None
        """Whether the agent in the guest answers; None if libvirt must be asked."""

    def publish(
        self, stage: InstanceState | None = None, power: str = "off", message: str = "", **more: Any
    ) -> None:
        """The instance is at `stage` now, or still at the last one."""
        self.stage = stage or self.stage
        more |= {"accel": str(self._host.verdict), "agent_state": "ready" if self.agent_ready else ""}
        self._host.publish(InstanceStatus(self._uuid, self.stage, power, message, **more))

    def fail(self, message: str) -> None:
        """What it was at has failed for good."""
        stage = InstanceState(f"{self.stage}-error")
        accel = str(self._host.verdict)
        self._host.publish(InstanceStatus(self._uuid, stage, "off", message, accel=accel))

    def event(self, message: str, duration_s: float | None = None, **extra: Any) -> None:
        """A line of the instance's history."""
        now = time.time()
        self._host.note(NodeEvent("instance", self._uuid, now, "status", message, duration_s, extra))
