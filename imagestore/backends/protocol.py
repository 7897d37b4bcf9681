"""The one protocol below every store: a flat tree of objects under keys.

Keys are relative, `/`-separated, made by this package from digests and checked names; a backend never
sees a string that a user typed. All implementations pass tests/contract/test_backend.py.
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from imagestore.errors import Corrupt, Invalid, Unsupported
from imagestore.formats.digest import Buffer

Data = Buffer | Sequence[Buffer]
Etag = str | None

MAX_BYTES = 1 << 30  # no object is larger; a server that announces more is not believed
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")


def check_key(key: str) -> str:
    """The key itself, or Invalid: every segment is plain ASCII and starts with no dot."""
    if len(key) > 700 or not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise Invalid(f"not an object's key: {key[:80]!r}")
    return key


def pieces(data: Data) -> Sequence[Buffer]:
    """The pieces that a `put` was given."""
    return (data,) if isinstance(data, bytes | bytearray | memoryview) else data


def end_of(where: str, start: int, length: int | None, size_bytes: int) -> int:
    """Where the range ends that a `get` asks for. Raises Corrupt unless the object has all of it."""
    end = size_bytes if length is None else start + length
    if not 0 <= start <= end <= size_bytes:
        raise Corrupt(f"{where}: bytes {start} to {end} of {size_bytes} were asked for")
    return end


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What a store says about an object without its bytes."""

    key: str
    size_bytes: int
    etag: str
    """Opaque; changes whenever the content changes. Never compared between backends."""
    modified_s: float  # seconds since the epoch by the *store's* clock


@dataclass(frozen=True, slots=True)
class Object:
    """Bytes of an object (or of the range asked for) and what the store said about the whole."""

    data: bytes
    stat: ObjectStat


class Backend(Protocol):
    """Verbs of a store.

    Atomic? Yes: a reader sees the old object, the new one or none, never a part.
    Durable? When `put` returns, a crash of any machine does not undo it.
    Idempotent? `get`, `stat`, `list`, `delete`, and `put` without conditions: safe to retry.
        A conditional `put` whose answer was lost is not: the caller reads back and compares.
    Ordered? No promise between keys beyond "a returned put is seen by every later get".
    Thread-safe? Yes; callers use one backend from several threads.
    Who closes it? Whoever built it (a program's entry point), by `close`.

    Errors: NotFound, Conflict (a condition failed), Denied, NoSpace, Unavailable (retry), Unsupported, Corrupt
    (short or over-long answers).
    """

    @property
    def url(self) -> str:
        """For messages: without credentials."""
        ...

    @property
    def read_only(self) -> bool:
        """Whether `put` and `delete` always fail."""
        ...

    @property
    def conditional(self) -> bool:
        """Whether conditions of `put` hold under a race (probed for S3, true for directories).

        Where they do not, they are ignored. A conditional `delete` may be Unsupported even where they do.
        """
        ...

    def get(self, key: str, start: int = 0, length: int | None = None) -> Object:
        """Bytes `start` to `start + length` of the object (all of it by default), exactly that many."""
        ...

    def stat(self, key: str) -> ObjectStat:
        """Raises NotFound."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """Every object whose key starts with `prefix`, each once, in no promised order (SeaweedFS has its own).

        Static web servers: Unsupported.
        """
        ...

    def put(self, key: str, data: Data, *, if_match: Etag = None, if_none_match: bool = False) -> ObjectStat:
        """Store `data` (pieces are joined) under `key`, replacing what was there.

        if_match: only if the object's etag is this one, else Conflict.
        if_none_match: only if there is no object, else Conflict.
        """
        ...

    def delete(self, key: str, *, if_match: Etag = None) -> None:
        """Remove it; "there was none" is success, "I was not allowed to" is Denied."""
        ...

    def now(self) -> float:
        """Seconds since the epoch by the store's clock: leases and grace periods are judged by it."""
        ...

    def close(self) -> None: ...


class ReadOnly:
    """The changing verbs of a backend that has none."""

    read_only = True
    conditional = False
    url: str

    def put(self, key: str, data: Data, *, if_match: Etag = None, if_none_match: bool = False) -> ObjectStat:
        raise Unsupported(f"{self.url} is read-only")

    def delete(self, key: str, *, if_match: Etag = None) -> None:
        raise Unsupported(f"{self.url} is read-only")

    def now(self) -> float:
        """This machine's clock: nothing is judged by a server that takes no writes."""
        return time.time()
