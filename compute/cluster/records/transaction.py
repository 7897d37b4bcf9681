"""What every record is, the typed transaction over the state store, and the histories that it writes along.

A record has a kind, a key, and a schema that is upgraded when an older one is read.
"""

import json
import random
import re
import threading
import time
import uuid as uuid_module
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

from compute.cluster.state.protocol import ABSENT, MOST_KEYS, Record, StateStore
from compute.errors import Conflict, Invalid, NotFound, Stale
from compute.wire.codec import from_plain, to_plain

METADATA_BYTES = 2**16
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An object with a place in the state store. `revision` is that of its record, never part of it."""

    KIND: ClassVar[str] = ""
    SCHEMA: ClassVar[int] = 1
    UPGRADES: ClassVar[dict[int, Callable[[dict[str, Any]], dict[str, Any]]]] = {}
    """schema n → function that turns a record of schema n into one of schema n + 1."""
    revision: int = field(default=ABSENT, compare=False)

    @property
    def id(self) -> str:
        return str(getattr(self, "uuid", "") or getattr(self, "name", ""))

    @property
    def key(self) -> str:
        return f"{self.KIND}/{self.id}"

    def encode(self) -> bytes:
        plain = {"schema": self.SCHEMA, **to_plain(self)}
        del plain["revision"]
        return json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def decode(cls, value: bytes, revision: int) -> Self:
        """Raises Invalid for a record of a newer program."""
        plain = json.loads(value, parse_constant=lambda _: None)  # 0.1 let NaN and Infinity in
        for schema in range(plain.get("schema", 1), cls.SCHEMA):
            plain = cls.UPGRADES[schema](plain)
        if plain.get("schema", 1) > cls.SCHEMA:
            raise Invalid(f"a {cls.KIND} was written by a newer version of sf", hint="upgrade this node")
        return from_plain(cls, {**plain, "revision": revision})


T = TypeVar("T")
O = TypeVar("O", bound=Stored)  # noqa: E741

_ATTEMPTS, _TURN_S, _turn = 50, 5.0, threading.RLock()
PROVEN: ContextVar[int | None] = ContextVar("lease", default=None)
"""The lease without which nothing is written here, in threads of this context too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Stored):
    """A line of an object's history; `Transaction.event` writes it."""

    KIND: ClassVar[str] = "event"
    LIMIT: ClassVar[int] = 256  # events kept per object; up to TRIM more may wait for the broom
    TRIM: ClassVar[int] = 32
    name: str  # `<type>/<object's uuid>/<microseconds, 20 digits>-<random>`: key order is time order
    timestamp_s: float
    type: str
    message: str
    node: str = ""
    duration_s: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    by: tuple[str, str] = ("", "")  # whose key (NAMESPACE/KEY) asked for it through the API, and from where


_known: dict[str, tuple[bytes, Stored]] = {}
_MOST_KNOWN = 1 << 14


def _decoded(cls: type[O], record: Record) -> O:
    """Each version once: nobody changes what was read in place, so all may have the same. Histories are read rarely."""
    value, found = _known.get(record.key, (b"", None))
    if not isinstance(found, cls) or found.revision != record.revision or value != record.value:
        found = cls.decode(record.value, record.revision)
        if cls is not Event:
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[record.key] = record.value, found
    return found


class Transaction:
    """Reads remember revisions, writes are kept back; `transact` commits all of it at one revision or repeats it.

    `list` is not compared at commit: a decision must rest on records read by `get` or `find` (hence Taken and Claims).
    """

    def __init__(self, store: StateStore, node: str = "", by: tuple[str, str] = ("", "")) -> None:
        self.store = store
        self.node = node  # who writes: the `fqdn` of its events
        self.by = by
        self.expect: dict[str, int] = {}
        self.writes: dict[str, bytes | None] = {}
        self.reads: dict[str, Record | None] = {}

    @property
    def room(self) -> int:
        """How many more records it may write and rest on; some are left for its end. Longer work goes in pieces."""
        return MOST_KEYS - 10 - max(len(self.writes), len(self.expect))

    def find(self, cls: type[O], identity: str) -> O | None:
        key = f"{cls.KIND}/{identity}"
        if key in self.writes:
            value = self.writes[key]
            return None if value is None else cls.decode(value, self.expect.get(key, ABSENT))
        # Read once: a second look would expect a newer revision than the one that was decided on.
        if key not in self.reads:
            record = self.reads[key] = self.store.get(key)
            self.expect.setdefault(key, record.revision if record else ABSENT)
        record = self.reads[key]
        return _decoded(cls, record) if record else None

    def get(self, cls: type[O], identity: str) -> O:
        """Raises NotFound."""
        found = self.find(cls, identity)
        if found is None:
            raise NotFound(f"{cls.KIND} {identity} not found")
        return found

    def list(self, cls: type[O], under: str = "") -> list[O]:
        return [_decoded(cls, record) for record in self.store.list(f"{cls.KIND}/{under}")]

    def create(self, value: O) -> O:
        """Returns it. Raises Conflict when it is there already."""
        if self.find(type(value), value.id) is not None:
            raise Conflict(f"{value.KIND} {value.id} exists already")
        self.writes[value.key] = value.encode()
        return value

    def update(self, value: O) -> O:
        """Write over what was read, here or before this transaction; returns what is written."""
        self.expect.setdefault(value.key, value.revision)
        self.writes[value.key] = value.encode()
        return value

    def delete(self, cls: type[Stored], identity: str) -> None:
        """Remove it; "there was none" is success."""
        self.writes[f"{cls.KIND}/{identity}"] = None

    def purge(self, value: Stored) -> bool:
        """Remove its history, and then it. True: there is more, for another transaction."""
        for record in self.store.list(f"{Event.KIND}/{value.key}/"):
            if self.room <= 0:
                return True
            self.writes[record.key] = None
        self.writes[value.key] = None
        return False

    def event(
        self,
        kind: str,
        owner: str,
        message: str,
        *,
        type: str = "mutate",
        timestamp_s: float | None = None,
        duration_s: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Append to an object's history. Now and then the oldest go in the same commit."""
        now = time.time() if timestamp_s is None else timestamp_s
        place = f"{kind}/{owner}/"
        tail = uuid_module.uuid4()
        name = f"{place}{int(now * 1e6):020d}-{tail.hex[:6]}"
        about: Any = {"type": type, "message": message, "node": self.node, "by": self.by}
        entry = Event(name=name, timestamp_s=now, duration_s=duration_s, extra=dict(extra or {}), **about)
        self.writes[entry.key] = entry.encode()
        if tail.int % Event.TRIM == 0:
            oldest = self.store.list(f"{Event.KIND}/{place}")[: -Event.LIMIT]
            for record in oldest[: max(0, self.room - Event.TRIM)]:
                self.writes[record.key] = None

    def commit(self) -> None:
        """Raises Stale."""
        if self.writes:
            self.store.commit(self.writes, expect=self.expect, lease=PROVEN.get())


def transact(
    store: StateStore,
    action: Callable[[Transaction], T],
    node: str = "",
    by: tuple[str, str] = ("", ""),
    *,
    queued: bool = False,
) -> T:
    """Run `action` on a fresh Transaction and commit it, again and again while others were faster. Raises Conflict.

    `action` may run several times, so it does nothing but read, decide and write through the transaction. Those of
    this process that met another repeat it one after the other; queued: from the first time on, for what meets others.
    Revisions decide, the queue only saves work: whoever waited for long goes on without a turn.
    """
    for attempt in range(_ATTEMPTS):
        turn = (queued or attempt > 0) and _turn.acquire(timeout=_TURN_S)
        try:
            transaction = Transaction(store, node, by)
            result = action(transaction)
            transaction.commit()
            return result
        except Stale:
            pass
        finally:
            if turn:
                _turn.release()
        time.sleep(random.uniform(0, 0.001) * min(attempt, 20))  # noqa: S311 (jitter, not a secret)
    raise Conflict("too many others change the same objects", hint="repeat the command in a moment")


def pieces(store: StateStore, action: Callable[[Transaction], bool], node: str = "") -> None:
    """`action` in as many transactions as it takes, for as long as it says that there is more."""
    while transact(store, action, node):
        pass


def new_uuid() -> str:
    return str(uuid_module.uuid4())


def check_name(name: str, what: str) -> str:
    """Letters, digits, dot, dash, underscore; at most 63. Raises Invalid."""
    if not _NAME.fullmatch(name):
        raise Invalid(f"not a {what}: {name[:80]!r}", hint="1 to 63 letters, digits, dots, dashes, or _")
    return name


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raises Invalid: each node and each listing of its kind has all of it."""
    if len(json.dumps(metadata)) > METADATA_BYTES:
        raise Invalid(f"an object has at most {METADATA_BYTES} bytes of metadata")
