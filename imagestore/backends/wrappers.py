"""Backends around a backend: each has the type that it wraps."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from imagestore.backends.protocol import Backend, Data, Etag, Object, ObjectStat
from imagestore.errors import Conflict, Unavailable

T = TypeVar("T")
_PAUSES_S = (0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
_MOST_S = 60.0


class Wrapper:
    """Hands everything on; what a subclass changes, it changes in `_do`, which sees every request."""

    def __init__(self, inner: Backend) -> None:
        self.inner, self.url, self.read_only = inner, inner.url, inner.read_only

    @property
    def conditional(self) -> bool:
        return self.inner.conditional

    def _do(self, verb: str, key: str, action: Callable[[], T]) -> T:
        return action()

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        return self._do("get", key, lambda: self.inner.get(key, start, length))

    def stat(self, key: str) -> ObjectStat:
        return self._do("stat", key, lambda: self.inner.stat(key))

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        return self.inner.list(prefix)

    def put(self, key: str, data: Data, *, if_match: Etag = None, if_none_match: bool = False) -> ObjectStat:
        put = partial(self.inner.put, key, data, if_match=if_match, if_none_match=if_none_match)
        return self._do("put", key, put)

    def delete(self, key: str, *, if_match: Etag = None) -> None:
        self._do("delete", key, lambda: self.inner.delete(key, if_match=if_match))

    def now(self) -> float:
        return self._do("now", "", self.inner.now)

    def close(self) -> None:
        self.inner.close()


def innermost(backend: Backend) -> Backend:
    """What all wrappers are around."""
    while isinstance(backend, Wrapper):
        backend = backend.inner
    return backend


def replace(backend: Backend, key: str, data: bytes, etag: str | None) -> ObjectStat:
    """Put what is made once, if the object still has this etag (None: if there is none). Raises Conflict.

    The repeat of a put whose answer was lost meets its own bytes.
    """
    try:
        return backend.put(key, data, if_match=etag, if_none_match=etag is None)
    except Conflict:
        found = backend.get(key)
        if found.data != data:
            raise
        return found.stat


class Retried(Wrapper):
    """Repeats what was Unavailable, with a pause before each, for about a minute at most.

    A conditional put whose answer was lost is repeated too and then meets its own object: Conflict. Whoever
    sets conditions tells the two apart by what stands there (a nonce).
    """

    def __init__(self, inner: Backend, *, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__(inner)
        self._sleep = sleep

    def _do(self, verb: str, key: str, action: Callable[[], T]) -> T:
        return self.repeat(action)

    def repeat(self, action: Callable[[], T]) -> T:
        """What `action` returns, once it does not raise Unavailable. It may be of many requests."""
        started = time.monotonic()
        for pause_s in _PAUSES_S:
            try:
                return action()
            except Unavailable:
                if time.monotonic() - started > _MOST_S:
                    raise
            # Jitter, so that many clients of a store that comes back do not all come at once.
            self._sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
        return action()

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        seen = set[str]()
        listing: Iterator[ObjectStat] | None = None

        def more() -> ObjectStat | None:
            nonlocal listing
            try:
                listing = listing or self.inner.list(prefix)
                return next((stat for stat in listing if stat.key not in seen), None)
            except Unavailable:
                listing = None
                raise

        while (stat := self.repeat(more)) is not None:
            seen.add(stat.key)
            yield stat


class RateLimited(Wrapper):
    """At most `bytes_s` bytes a second of what is got, over all threads together."""

    def __init__(self, inner: Backend, bytes_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__(inner)
        self._bytes_s, self._sleep = bytes_s, sleep
        self._free_at = 0.0
        self._lock = threading.Lock()

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        found = self.inner.get(key, start, length)
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + len(found.data) / self._bytes_s
            wait = self._free_at - now
        self._sleep(wait)
        return found
