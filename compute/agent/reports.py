"""What a node's agent has to say to the server: kept until the server has heard it."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice

from compute.errors import ComputeError
from compute.wire.spec import InstanceSpec, InstanceState, InstanceStatus, NodeEvent
from net import Action, describe

log = logging.getLogger(__name__)

_KEPT_EVENTS, _SENT_AT_ONCE = 10_000, 250  # the server takes 1 MiB at once
_RETRY_S = 1.0


Send = Callable[[Sequence[InstanceStatus], Sequence[NodeEvent]], Awaitable[None]]


class Reports:
    """`send` carries statuses and events to the server; it raises ComputeError while they were not taken."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._statuses: dict[str, InstanceStatus] = {}
        self._events: deque[NodeEvent] = deque(maxlen=_KEPT_EVENTS)
        self._waiting = asyncio.Event()

    def publish(self, status: InstanceStatus) -> None:
        """Queue a guest's status in the place of its last: the server knows the steps between."""
        self._statuses[status.uuid] = status
        self._waiting.set()

    def deleted(self, uuid: str) -> None:
        self.publish(InstanceStatus(uuid, InstanceState.DELETED))

    def note(self, event: NodeEvent) -> None:
        """Queue a line of history."""
        self._events.append(event)
        self._waiting.set()

    def say(self, message: str, *about: tuple[str, str]) -> None:
        """Queue a line for the history of each (kind, identity)."""
        for kind, identity in about:
            self.note(NodeEvent(kind, identity, time.time(), "status", message))

    def put_right(self, node: str, done: Sequence[Action], guests: Sequence[InstanceSpec]) -> None:
        """Nothing else was wanted of the networks and yet something had to be done: somebody took it away."""
        what = [describe(action) for action in done if action.verb != "adopt"]  # a guest that starts just now
        if not what:
            return
        message = f"networks put right: {'; '.join(what[:8])}"
        log.warning("%s", message)
        met = [("instance", g.uuid) for g in guests if any(i.tap and i.tap in message for i in g.interfaces)]
        self.say(message, ("node", node), *met)

    async def run(self) -> None:
        """Send what comes, until cancelled."""
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            try:
                await self.flush()
            except ComputeError as err:  # of one report: nothing else ends with it
                log.info("the server did not take a report: %s", err)
                await asyncio.sleep(_RETRY_S)
                self._waiting.set()

    async def flush(self) -> None:
        """Send all of it now. Raises ComputeError."""
        while self._statuses or self._events:
            statuses = dict(islice(self._statuses.items(), _SENT_AT_ONCE))
            events = list(islice(self._events, _SENT_AT_ONCE))
            await self._send(list(statuses.values()), events)
            self._statuses = {u: now for u, now in self._statuses.items() if now is not statuses.get(u)}
            for event in events:
                with contextlib.suppress(ValueError):
                    self._events.remove(event)
