"""Backends around a backend: each has the type that it wraps."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from imagestore.backends.protocol import Backend, Data, Etag, Object, ObjectStat, pieces
from imagestore.errors import Conflict, Corrupt, Unavailable
from imagestore.formats.keys import matches

T = TypeVar("T")


class Wrapper:
    """Hands everything on; what a subclass changes, it changes in `_do`, which sees every request."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def read_only(self) -> bool:
        return self.inner.read_only

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
    """Repeats what was Unavailable, waiting about 0.2, 0.4, 0.8 … seconds, at most `most_s` in all.

    A conditional put whose answer was lost is repeated too and then meets its own object: Conflict. Whoever
    sets conditions tells the two apart by what stands there (a nonce).
    """

    def __init__(
        self,
        inner: Backend,
        *,
        attempts: int = 7,
        first_s: float = 0.2,
        most_s: float = 60.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(inner)
        self._attempts, self._first_s, self._most_s, self._sleep = attempts, first_s, most_s, sleep

    def _do(self, verb: str, key: str, action: Callable[[], T]) -> T:
        return self.repeat(action)

    def repeat(self, action: Callable[[], T]) -> T:
        """What `action` returns, once it does not raise Unavailable. It may be of many requests."""
        started = time.monotonic()
        for attempt in range(self._attempts):
            try:
                return action()
            except Unavailable:
                if attempt + 1 == self._attempts or time.monotonic() - started > self._most_s:
                    raise
            self._wait(attempt)
        raise AssertionError("unreachable")

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        seen: set[str] = set()
        failures = 0
        while True:
            try:
                for stat in self.inner.list(prefix):
                    if stat.key not in seen:
                        seen.add(stat.key)
                        failures = 0
                        yield stat
                return
            except Unavailable:
                failures += 1
                if failures == self._attempts:
                    raise
            self._wait(failures - 1)

    def _wait(self, attempt: int) -> None:
        # Jitter, so that many clients of a store that comes back do not all come at once.
        self._sleep(min(self._first_s * 2**attempt, 10.0) * random.uniform(0.5, 1.0))  # noqa: S311


class Verified(Wrapper):
    """Raises Corrupt for whole objects that are named by their BLAKE3 and do not match it.

    Packs are named by their footer; their frames are verified by whoever knows frames.
    """

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        found = self.inner.get(key, start, length)
        if start == 0 and length is None and found.data and not matches(key, found.data):
            raise Corrupt(f"the bytes of {self.url}/{key} do not match its name")
        return found


class RateLimited(Wrapper):
    """At most `bytes_s` bytes a second through get and put, over all threads together."""

    def __init__(self, inner: Backend, bytes_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
        super().__init__(inner)
        self._bytes_s, self._sleep = bytes_s, sleep
        self._free_at = 0.0
        self._lock = threading.Lock()

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        found = self.inner.get(key, start, length)
        self._pay(len(found.data))
        return found

    def put(self, key: str, data: Data, *, if_match: Etag = None, if_none_match: bool = False) -> ObjectStat:
        self._pay(sum(memoryview(piece).nbytes for piece in pieces(data)))
        return self.inner.put(key, data, if_match=if_match, if_none_match=if_none_match)

    def _pay(self, count: int) -> None:
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self._bytes_s
            wait = self._free_at - now
        self._sleep(wait)
