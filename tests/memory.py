"""A backend in memory, for tests: the same contract suite as every other, and a clock that can be turned."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from imagestore.backends.protocol import Object, ObjectStat, check_key, end_of, pieces
from imagestore.errors import Conflict, NotFound
from imagestore.formats.digest import Buffer


class Memory:
    read_only = False

    def __init__(self, *, clock: Callable[[], float] = time.time, conditional: bool = True) -> None:
        self.url = f"memory://{id(self):x}"
        self.conditional = conditional
        self.objects: dict[str, Object] = {}
        self._clock = clock
        self._etags = itertools.count(1)
        self._lock = threading.RLock()

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        whole = self._find(key)
        end = end_of(f"{self.url}/{key}", start, length, len(whole.data))
        return Object(whole.data[start:end], whole.stat)

    def stat(self, key: str) -> ObjectStat:
        return self._find(key).stat

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        with self._lock:
            found = [self.objects[key].stat for key in sorted(self.objects) if key.startswith(prefix)]
        yield from found

    def put(
        self,
        key: str,
        data: Buffer | Sequence[Buffer],
        *,
        if_match: str | None = None,
        if_none_match: bool = False,
    ) -> ObjectStat:
        joined = b"".join(bytes(piece) for piece in pieces(data))
        with self._lock:
            self._check(check_key(key), if_match, if_none_match)
            stat = ObjectStat(key, len(joined), f"e{next(self._etags)}", self._clock())
            self.objects[key] = Object(joined, stat)
        return stat

    def delete(self, key: str, *, if_match: str | None = None) -> None:
        with self._lock:
            if key in self.objects:
                self._check(key, if_match, False)
                del self.objects[key]

    def now(self) -> float:
        return self._clock()

    def close(self) -> None:
        pass

    def _find(self, key: str) -> Object:
        found = self.objects.get(check_key(key))
        if found is None:
            raise NotFound(f"{self.url}/{key}: no such object")
        return found

    def _check(self, key: str, if_match: str | None, if_none_match: bool) -> None:
        there = self.objects.get(key)
        wrong = if_match is not None and (there is None or there.stat.etag != if_match)
        if self.conditional and (wrong or (if_none_match and there is not None)):
            raise Conflict(f"{self.url}/{key} was changed by another writer")
