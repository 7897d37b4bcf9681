"""A backend that counts."""

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from imagestore.backends.protocol import Backend, Object, ObjectStat
from imagestore.backends.wrappers import Wrapper

T = TypeVar("T")


class Counted(Wrapper):
    """Counts requests and bytes, as a store that charges for them would."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.requests = 0
        self.received_bytes = 0
        self._lock = threading.Lock()

    def _do(self, verb: str, key: str, action: Callable[[], T]) -> T:
        with self._lock:
            self.requests += verb != "now"
        found = action()
        if isinstance(found, Object):
            with self._lock:
                self.received_bytes += len(found.data)
        return found

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        for number, stat in enumerate(self.inner.list(prefix)):
            if number % 1000 == 0:
                with self._lock:
                    self.requests += 1
            yield stat
