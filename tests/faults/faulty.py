"""A backend that fails at its n-th request, in the ways in which machines and networks do."""

import secrets
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from imagestore.backends.directory import Directory
from imagestore.backends.protocol import Backend, Data, Object, ObjectStat, pieces
from imagestore.backends.wrappers import Wrapper
from imagestore.errors import Unavailable

T = TypeVar("T")
WAYS = ["error", "torn", "lost", "killed before", "killed after"]
"""error: nothing happened. torn: half of a file was written beside its place. lost: it happened, the answer was lost.
killed: nothing that this process asks for happens any more, before or after this request."""


class Killed(BaseException):
    """The process is gone: no `except` and no cleanup of the product may undo that."""


class Faulty(Wrapper):
    def __init__(self, inner: Backend, at: int, way: str) -> None:
        super().__init__(inner)
        self._at, self._way = at, way
        self.requests = 0
        self.dead = False
        self._lock = threading.Lock()

    def _do(self, verb: str, key: str, action: Callable[[], T]) -> T:
        with self._lock:
            if self.dead:
                raise Killed
            number = self.requests
            self.requests += 1
            if number == self._at and self._way.startswith("killed"):
                self.dead = True
        if number != self._at:
            return action()
        if self._way == "killed before":
            raise Killed
        if self._way in ("error", "torn"):
            raise Unavailable(f"the network failed at request {number}: {verb} {key}")
        action()
        if self._way == "killed after":
            raise Killed
        raise Unavailable(f"the answer to request {number} was lost: {verb} {key}")

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        return self._do("get", key, lambda: self.inner.get(key, start, length))

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        yield from self._do("list", prefix, lambda: list(self.inner.list(prefix)))

    def put(
        self, key: str, data: Data, *, if_match: str | None = None, if_none_match: bool = False
    ) -> ObjectStat:
        backend = self.inner
        if self._way == "torn" and self.requests == self._at and isinstance(backend, Directory):
            whole = b"".join(bytes(piece) for piece in pieces(data))
            (backend.root / ".tmp").mkdir(exist_ok=True)
            (backend.root / ".tmp" / secrets.token_hex(12)).write_bytes(whole[: len(whole) // 2])
        return super().put(key, data, if_match=if_match, if_none_match=if_none_match)
