"""Whose turn it is once a machine has started: in each namespace the guests of a lower order come first.

One that was started holds up those after it for its delay, one that cannot be started for five minutes at most.
"""

import asyncio
from collections.abc import Callable, Iterable

from compute.wire.spec import InstanceSpec, Power

_LIMIT_S = 300.0


class Turns:
    """Belongs to the agent's event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, InstanceSpec] | None = None
        self._noted: set[tuple[str, bool]] = set()
        self._changed: Callable[[], None] = lambda: None

    def begin(self, specs: Iterable[InstanceSpec], changed: Callable[[], None]) -> None:
        """The first guests; `changed` is called when somebody's turn may have come. Later calls do nothing."""
        if self._waiting is None:
            self._waiting = {spec.uuid: spec for spec in specs if spec.power is not Power.OFF}
            self._changed = changed

    def come(self, spec: InstanceSpec) -> bool:
        """Whether it may start."""
        waiting = self._waiting or {}
        others = (s.order for s in waiting.values() if s.namespace == spec.namespace)
        if come := spec.uuid not in waiting or spec.order <= min(others):
            self._end(spec.uuid, False, _LIMIT_S)
        return come

    def settled(self, spec: InstanceSpec, *, started: bool = False) -> None:
        """It is as it should be, or will not be; `started`: those after it are next when its delay is over."""
        if spec.delete or spec.power is Power.OFF or self.come(spec):
            self._end(spec.uuid, True, spec.delay_s if started else 0)

    def _end(self, uuid: str, settled: bool, in_s: float) -> None:
        if uuid in (self._waiting or ()) and (uuid, settled) not in self._noted:
            self._noted.add((uuid, settled))
            asyncio.get_running_loop().call_later(in_s, self._ended, uuid)

    def _ended(self, uuid: str) -> None:
        if self._waiting and self._waiting.pop(uuid, None):
            self._changed()
