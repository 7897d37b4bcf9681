"""The one protocol below all state: keys to bytes, one revision counter, transactions, watches and leases.

The shape is etcd's, so that etcd can stand behind it: a revision counts every commit of the whole store, each record
carries the revision that last wrote it, and a transaction is a set of comparisons and a set of writes. Nothing here
knows what the bytes mean; `objects.Transaction` gives typed create, update and delete on top of it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from compute.errors import ComputeError

ABSENT = 0  # the revision of a key that does not exist
_MOST_LISTED = 1 << 14
Keys = Collection[str]
Writes = Mapping[str, bytes | None]  # by key what is written, None: it is deleted
Seen = Mapping[str, int]  # by key the revision that it must have still

MOST_KEYS, MOST_BYTES = 100, 1 << 20
"""What one commit may write, and compare. etcd takes 128 operations and 1.5 MiB, of which an engine needs some."""


def bounded(writes: Writes, expect: Seen) -> None:
    """Raises ComputeError for a commit that no engine takes: longer work is done in pieces that may be repeated."""
    size_bytes = sum(len(key) + len(value or b"") for key, value in writes.items())
    if max(len(writes), len(expect)) > MOST_KEYS or size_bytes > MOST_BYTES:
        what = f"{len(writes)} records ({size_bytes >> 10} KiB) that rests on {len(expect)}"
        raise ComputeError(f"a change of {what} is too large")


def kept(prefix: str, found: Collection[object]) -> bool:
    """Whether an engine keeps a listing, to ask the next time for what changed: of a whole kind that is no ocean."""
    return prefix.find("/") == len(prefix) - 1 and len(found) < _MOST_LISTED


@dataclass(frozen=True, slots=True)
class Change:
    """One key's step in the history; `value` is None when it was deleted."""

    key: str
    value: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class Record(Change):
    """A value and the revision that wrote it."""

    value: bytes


class StateStore(Protocol):
    """Verbs of a state store. All implementations pass tests/contract/test_state_store.py.

    Atomic? Yes: a commit's comparisons and writes happen at one revision, or nothing happens.
    Durable? When `commit` returns, a crash of the machine does not undo it.
    Bounded? At most MOST_KEYS and MOST_BYTES in one commit, else ComputeError.
    Idempotent? Reads are. Of a commit that raised Unavailable nobody knows whether it happened, or will: read back.
    Ordered? Commits are totally ordered; `get` and `list` see every commit that returned before they were called.
    Thread-safe? Yes. Who closes it? Who built it.
    """

    def get(self, key: str) -> Record | None:
        """The record, or None."""
        ...

    def list(self, prefix: str) -> Sequence[Record]:
        """Every record whose key starts with `prefix`, in key order, at one revision."""
        ...

    def commit(self, writes: Writes, *, expect: Seen, lease: int | None = None, ephemeral: Keys = ()) -> int:
        """Write (None deletes) if every key in `expect` still has that revision; returns the new revision.

        lease: nothing is written unless this lease is alive (LeaseLost). ephemeral: those of the written keys that
        vanish together with that lease. Raises Stale when a comparison fails.
        """
        ...

    def watch(self, prefix: str, after_revision: int, timeout_s: float) -> Sequence[Change]:
        """Changes under `prefix` newer than `after_revision`, oldest first; waits for the first, [] at the timeout.

        Raises Compacted when that history is gone.
        """
        ...

    def revision(self) -> int:
        """The newest revision."""
        ...

    def grant(self, ttl_s: float) -> int:
        """A new lease, alive for `ttl_s` seconds from now and from each refresh."""
        ...

    def refresh(self, lease: int) -> None:
        """Raises LeaseLost."""
        ...

    def close(self) -> None: ...
