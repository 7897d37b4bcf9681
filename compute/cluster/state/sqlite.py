"""The embedded state store: SQLite in WAL mode with synchronous=FULL, one writer thread, group commit.

Commits that wait together share one fsync. Readers use a second connection and never wait for the writer. The file
belongs to one process at a time (`serve` holds a lock on the state directory), so leases are counted by that process's
monotonic clock and a restart gives every lease its full time again: refreshing one costs no write. The history that
watches read is in memory: a restart forgets it.

    kv(key, value, revision, lease)   lease(id, ttl_s)   log: where earlier versions had the history, empty
"""

import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from compute.cluster.state.protocol import ABSENT, Change, Keys, Record, Seen, Writes, bounded, kept
from compute.errors import Compacted, ComputeError, Conflict, LeaseLost, NoSpace, Stale, Unavailable
from imagestore import durable

log = logging.getLogger(__name__)

_SCHEMA = """
create table if not exists kv(key text primary key, value blob not null, revision integer not null, lease integer)
    without rowid;
create index if not exists kv_lease on kv(lease) where lease is not null;
create table if not exists log(revision integer not null, key text not null, value blob);
create index if not exists log_revision on log(revision);
create table if not exists lease(id integer primary key autoincrement, ttl_s real not null);
create table if not exists meta(revision integer not null, compacted integer not null, format integer not null);
insert into meta select 1, 1, 1 where not exists (select 1 from meta);
"""

HISTORY = 1024  # changes that a watch can look back on
_SWEEP_S = 0.25  # how late an expired lease may be noticed


_Rows = Sequence[tuple[str, bytes | None, int | None]]  # key, value, and the lease that it lives with
_Act = Callable[[], tuple[_Rows, int | None]]
"""What the writer thread is asked: what it writes, and the answer, None for the revision. Raises LeaseLost, Stale."""


class SqliteStore:
    """`StateStore` in one file. Opens or creates it; raises Unavailable where that fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._jobs: queue.SimpleQueue[tuple[_Act, Future[int]] | None] = queue.SimpleQueue()
        self._moved = threading.Condition()
        self._reading = threading.Lock()
        self._leases: dict[int, tuple[float, float]] = {}  # id → (ttl_s, monotonic time at which it dies)
        self._reserve = durable.Reserve(path.with_suffix(".reserve"))
        try:
            self._open()
        except (sqlite3.Error, OSError) as err:
            try:
                self._reserve.spend()
                self._open()
            except (sqlite3.Error, OSError):
                hint = "check the file's owner and free space"
                raise Unavailable(f"cannot open {path}: {err}", hint=hint) from err
        self._reserve.keep()
        self._revision: int = self._write.execute("select revision from meta").fetchone()[0]
        self._history, self._forgotten = deque[Change](), self._revision
        self._listed: dict[str, tuple[int, dict[str, Record]]] = {}
        """Prefix → what it had at a revision; the history leads from there to now."""
        for lease, ttl_s in self._write.execute("select id, ttl_s from lease"):
            self._leases[lease] = (ttl_s, time.monotonic() + ttl_s)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="state-writer", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        """Raises ComputeError for what is no database of ours, or none any more; sqlite3.Error, OSError."""
        if not self._path.exists():
            self._make()
        elif not self._path.stat().st_size:
            raise self._damaged("it is empty")
        try:
            self._write = self._connect(self._path)
            faults = [text for (text,) in self._write.execute("pragma quick_check(3)")]
            if faults != ["ok"]:
                raise self._damaged("; ".join(faults))
            (format_,) = self._write.execute("select format from meta").fetchone()
            self._write.execute("delete from log")
            self._read = self._connect(self._path)
        except sqlite3.DatabaseError as err:
            if err.sqlite_errorname in ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR"):
                raise self._damaged(str(err)) from err
            raise
        if format_ != 1:
            raise Conflict(f"{self._path} has format {format_}", hint="a newer sf wrote it: upgrade")

    def _make(self) -> None:
        """A new database under its name at once and whole: an empty file is never one that was just begun."""
        new = self._path.with_suffix(".new")
        new.unlink(missing_ok=True)
        # Tokens are signed with what it holds; SQLite gives its other files the same mode.
        new.touch(mode=0o600)
        with contextlib.closing(self._connect(new)) as made:
            made.executescript(_SCHEMA)
        new.rename(self._path)
        durable.sync(self._path.parent)

    def _damaged(self, why: str) -> ComputeError:
        hint = "put a copy of it in its place, or move it (with -wal and -shm) away: sf node orphans then shows guests"
        return ComputeError(f"{self._path} is damaged: {why}", hint=hint)

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        link = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        link.execute("pragma journal_mode=wal")
        link.execute("pragma synchronous=full")
        return link

    # Reading

    def get(self, key: str) -> Record | None:
        rows = self._select("select key, value, revision from kv where key=?", key)
        return Record(*rows[0]) if rows else None

    def list(self, prefix: str) -> Sequence[Record]:
        with self._moved:
            after, known = self._listed.get(prefix, (ABSENT, {}))
            if after and after >= self._forgotten and not self._closed:
                for new in self._since(after, prefix):
                    known.pop(new.key, None)
                    if new.value is not None:
                        known[new.key] = Record(new.key, new.value, new.revision)
                self._listed[prefix] = self._revision, known
                return sorted(known.values(), key=lambda record: record.key)
            after = self._revision
        order = "select key, value, revision from kv where key >= ? and key < ? order by key"
        found = [Record(*row) for row in self._select(order, prefix, prefix + "\U0010ffff")]
        if kept(prefix, found):
            self._listed[prefix] = after, {record.key: record for record in found}
        return found

    def _select(self, order: str, *values: object) -> Sequence[tuple[Any, ...]]:
        try:
            with self._reading:
                return self._read.execute(order, values).fetchall()
        except sqlite3.Error as err:  # an unreadable page, or closed meanwhile: never "there is none"
            raise Unavailable(f"cannot read {self._path}: {err}", hint="check its disk") from err

    def revision(self) -> int:
        return self._revision

    def watch(self, prefix: str, after_revision: int, timeout_s: float) -> Sequence[Change]:
        deadline = time.monotonic() + timeout_s
        with self._moved:
            while not self._closed:
                if after_revision < self._forgotten:
                    raise Compacted(f"history before revision {self._forgotten} is gone")
                if found := self._since(after_revision, prefix):
                    return found
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._moved.wait(left_s):
                    break
        return []

    def _since(self, revision: int, prefix: str) -> Sequence[Change]:
        newer = takewhile(lambda change: change.revision > revision, reversed(self._history))
        return [change for change in newer if change.key.startswith(prefix)][::-1]

    # Writing: callers wait for the writer thread

    def commit(self, writes: Writes, *, expect: Seen, lease: int | None = None, ephemeral: Keys = ()) -> int:
        bounded(writes, expect)
        return self._submit(partial(self._compared, writes, expect, lease, ephemeral))

    def grant(self, ttl_s: float) -> int:
        return self._submit(partial(self._granted, ttl_s))

    def refresh(self, lease: int) -> None:
        ttl_s = self._living(lease)
        self._leases[lease] = ttl_s, time.monotonic() + ttl_s

    def close(self) -> None:
        """Finish what was submitted, then close. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        self._thread.join()
        with self._moved:
            self._moved.notify_all()
        with self._reading:
            self._read.close()
        self._write.close()

    def _submit(self, act: _Act) -> int:
        if self._closed:
            raise Unavailable("the state store is closed")
        done = Future[int]()
        self._jobs.put((act, done))
        return done.result()

    def _run(self) -> None:
        stop = False
        while not stop:
            batch = list[tuple[_Act, Future[int]]]()
            try:
                first = self._jobs.get(timeout=_SWEEP_S if self._leases else None)
                while first is not None:
                    batch.append(first)
                    first = self._jobs.get_nowait()
                stop = True
            except queue.Empty:
                pass
            now = time.monotonic()
            over = [lease for lease, (_, end) in list(self._leases.items()) if end <= now]
            batch += [(partial(self._expired, lease), Future()) for lease in over]
            if batch:
                self._apply(batch)
        while not self._jobs.empty():  # submitted in the same instant as the close
            late = self._jobs.get_nowait()
            if late is not None:
                late[1].set_exception(Unavailable("the state store is closed"))

    def _apply(self, batch: Sequence[tuple[_Act, Future[int]]]) -> None:
        """One SQLite transaction, one fsync, for all of them; each job succeeds or fails by itself."""
        outcome: list[int | Exception] = []
        revision, changes = self._revision, list[Change]()
        leases = dict(self._leases)
        try:
            self._write.execute("begin immediate")
            for act, _ in batch:
                try:
                    rows, answer = act()
                except (Stale, LeaseLost) as err:
                    outcome.append(err)
                    continue
                revision += bool(rows)
                for key, value, lease in rows:
                    if value is None:
                        self._write.execute("delete from kv where key=?", (key,))
                    else:
                        written = key, value, revision, lease
                        self._write.execute("insert or replace into kv values (?,?,?,?)", written)
                    changes.append(Change(key, value, revision))
                outcome.append(revision if answer is None else answer)
            self._write.execute("update meta set revision=?", (revision,))
            with self._moved:  # whom `get` shows a change, `list` shows it too
                self._write.execute("commit")
                self._revision = revision
                self._history += changes
                while len(self._history) > HISTORY:
                    self._forgotten = self._history.popleft().revision
                self._moved.notify_all()
        except sqlite3.Error as err:
            if self._write.in_transaction:
                self._write.execute("rollback")
            self._leases = leases
            full = getattr(err, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
            if full and self._reserve.spend():
                self._apply(batch)
                return
            hint = "check free space on its filesystem"
            failure = (NoSpace if full else Unavailable)(f"cannot write {self._path}: {err}", hint=hint)
            outcome = [failure for _ in batch]
        else:
            self._reserve.keep()
        for (_, done), result in zip(batch, outcome, strict=True):
            if isinstance(result, Exception):
                done.set_exception(result)
            else:
                done.set_result(result)

    def _compared(
        self, writes: Writes, expect: Seen, lease: int | None, ephemeral: Keys
    ) -> tuple[_Rows, None]:
        if lease is not None:
            self._living(lease)
        for key, revision in expect.items():
            row = self._write.execute("select revision from kv where key=?", (key,)).fetchone()
            if (row[0] if row else ABSENT) != revision:
                raise Stale(f"{key} changed meanwhile")
        return [(key, value, lease if key in ephemeral else None) for key, value in writes.items()], None

    def _granted(self, ttl_s: float) -> tuple[_Rows, int]:
        lease = int(self._write.execute("insert into lease(ttl_s) values (?)", (ttl_s,)).lastrowid or 0)
        self._leases[lease] = ttl_s, time.monotonic() + ttl_s
        return (), lease

    def _expired(self, lease: int) -> tuple[_Rows, None]:
        self._leases.pop(lease, None)
        self._write.execute("delete from lease where id=?", (lease,))
        rows = self._write.execute("select key from kv where lease=?", (lease,))
        return [(key, None, None) for (key,) in rows.fetchall()], None

    def _living(self, lease: int) -> float:
        """How long it lives from each refresh on. Raises LeaseLost."""
        ttl_s, end_s = self._leases.get(lease, (0.0, 0.0))
        if end_s <= time.monotonic():
            raise LeaseLost(f"lease {lease} has expired")
        return ttl_s
