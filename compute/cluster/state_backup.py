"""The server's state in one file: taken beside a running server, read again where it was written, and the way back.

    sf-state 1 <BLAKE3 of the rest, 64 hex digits>\\n | zstd of an SQLite file: sf.db's tables, and file(name, data)

It holds every key of the installation: who reads it is root here. So no store that is published takes one, and none
shows it to its readers (`formats.keys`: not public).
"""

import asyncio
import json
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import zstandard

from compute.cluster.liveness import KIND as ALIVE
from compute.cluster.liveness import Server
from compute.cluster.records.epochs import Epoch, begin
from compute.cluster.records.instances import Instance
from compute.cluster.records.nodes import Node
from compute.cluster.records.taken import Claims
from compute.cluster.records.transaction import Transaction, transact
from compute.cluster.state.opening import open_state
from compute.cluster.state.protocol import MOST_BYTES, MOST_KEYS, StateStore
from compute.cluster.state.sqlite import SqliteStore
from compute.config import Config
from compute.errors import ComputeError, Conflict, Denied, NotFound
from imagestore import STATES, TUF, Corrupt, Digest, ObjectStat, Store, StoreError, durable, open_store

log = logging.getLogger(__name__)

_IDENTITY = "installation.json"
_AUTH = ("agent.key", "agent.crt", "ca.key", "ca.crt", "local-key")  # no certificate before its key
SHARED = (_IDENTITY, *(f"auth/{name}" for name in _AUTH))
_FILES = (*SHARED, "node.json")
_MAGIC, _MOST_BYTES, _LOOK_S = b"sf-state 1 ", 1 << 30, 60.0


@dataclass(frozen=True, slots=True)
class Backup:
    """One that is kept somewhere, and what is in it. `trouble`: why it is none."""

    name: str
    made_s: float
    size_bytes: int
    trouble: str = ""
    installation: str = ""
    instances: int = 0
    upgrade: str = ""
    """Records of earlier versions, which are read as they are and written anew when they next change."""


def _pack(state_dir: Path, records: StateStore | None = None, source: Path | None = None) -> bytes:
    if records is not None and source is None:
        with TemporaryDirectory(prefix="sf-state-") as place:
            with closing(SqliteStore(Path(place, "sf.db"))) as copy:
                _copy(records, copy)
            return _pack(state_dir, records, Path(place, "sf.db"))
    source = source or state_dir / "sf.db"
    if not os.access(source, os.R_OK):
        hint = "sf state backup works on the server, as root"
        raise NotFound(f"there is no {source}, or it is not yours", hint=hint)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
        with closing(sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True, timeout=10)) as now:
            now.backup(copy)
        copy.execute("delete from log")
        copy.execute("create table file(name text primary key, data blob not null)")
        held = [(name, (state_dir / name).read_bytes()) for name in _FILES if (state_dir / name).exists()]
        copy.executemany("insert into file values (?, ?)", held)
        copy.execute("vacuum")
        body = zstandard.compress(copy.serialize())
    return _MAGIC + Digest.of(body).hex().encode() + b"\n" + body


def _upgrade(state: sqlite3.Connection) -> str:
    """Backup's, and whether 0.1 still reads it all. Raises Corrupt for what a newer version wrote."""
    ask = """select substr(key, 1, instr(key, '/') - 1) kind, cast(cast(substr(value, 11, 2) as text) as integer) form,
        count(*) from kv where cast(value as text) like '{"schema":%' group by kind, form"""
    found, now = state.execute(ask).fetchall(), {kind.KIND: kind.SCHEMA for kind in (Claims, Instance)}
    if later := [f"{kind} of form {form}" for kind, form, _ in found if form > now.get(kind, 1)]:
        raise Corrupt(f"a newer version of sf wrote it: {', '.join(later)}")
    old = [
        f"{count} {kind} ({form} to {now[kind]})" for kind, form, count in found if form < now.get(kind, 1)
    ]
    reads = "reads" if all(form == 1 for _, form, _ in found) else "does not read"
    return f"{', '.join(old) or 'none'}; 0.1 {reads} it"


def _unpack(data: bytes) -> tuple[bytes, dict[str, bytes], int, str]:
    """The database, the files, how many instances it knows, what becomes of older records. Raises Corrupt."""
    line, _, body = data.partition(b"\n")
    if line != _MAGIC + Digest.of(body).hex().encode():
        raise Corrupt("it is no backup of a server's state, or damaged")
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as found:
        try:
            plain = zstandard.ZstdDecompressor().stream_reader(body).read(_MOST_BYTES + 1)
            if len(plain) > _MOST_BYTES:
                raise Corrupt(f"the state in it has more than {_MOST_BYTES >> 20} MiB")
            found.deserialize(plain)
            files = {n: bytes(d) for n, d in found.execute("select name, data from file") if n in _FILES}
            found.execute("drop table file")
            (count,) = found.execute("select count(*) from kv where key like 'instance/%'").fetchone()
            asks = "pragma quick_check(1)", "select format from meta"
            told = [found.execute(ask).fetchone() for ask in asks]
            if told != [("ok",), (1,)] or _IDENTITY not in files:
                raise Corrupt("the state in it is damaged, or a newer version of sf wrote it")
            return found.serialize(), files, count, _upgrade(found)
        except (zstandard.ZstdError, sqlite3.Error, TypeError, ValueError) as err:
            raise Corrupt(f"the state in it cannot be read: {err}") from err


def _look(name: str, made_s: float, data: bytes) -> tuple[Backup, bytes]:
    """Read all of it, and say what is in it."""
    try:
        _, files, count, upgrade = _unpack(data)
        return Backup(name, made_s, len(data), "", _identity(files[_IDENTITY]), count, upgrade), data
    except Corrupt as err:
        return Backup(name, made_s, len(data), str(err)), data


def _read(store: Store, stat: ObjectStat) -> tuple[Backup, bytes]:
    return _look(stat.key.rpartition("/")[2], stat.modified_s, store.backend.get(stat.key).data)


def _identity(text: bytes) -> str:
    return str(json.loads(text)["id"])


def _sound(made: Backup) -> Backup:
    if made.trouble:
        raise Corrupt(f"{made.name}: {made.trouble}", hint="sf state check says which are whole: --from NAME")
    return made


@contextmanager
def _store(where: str, *, create: bool = False) -> Iterator[Store | None]:
    """The store that `where` means; None: it is a file's path."""
    if "://" not in where and not Path(where, "store.json").exists():
        yield None
        return
    store = open_store(where, create=create)
    with closing(store.backend):
        yield store


def back_up_state(state_dir: Path, where: str, keep: int = 0, records: StateStore | None = None) -> Backup:
    """Write a backup into a file or a store and read it from there; of a store's own so many stay, 0 for all.

    records: those of an etcd, instead of the file in `state_dir`.
    Raises NotFound, Corrupt, Denied for a published store, sqlite3.Error, OSError.
    """
    with _store(where, create=True) as store:
        if store is None:
            durable.write(Path(where), _pack(state_dir, records))
            return _sound(next(state_backups(where))[0])
        if next(iter(store.backend.list(TUF.prefix)), None):
            raise Denied(f"{store.url} is published, and a state holds every key", hint="use another store")
        stamp = time.strftime("%Y%m%dt%H%M%Sz", time.gmtime(store.backend.now()))
        own = _identity((state_dir / _IDENTITY).read_bytes())
        key = STATES.key(f"{own}-{stamp}")
        made = _sound(_read(store, store.backend.put(key, _pack(state_dir, records)))[0])
        for stat in _own(store, state_dir)[keep:] if keep else ():
            store.backend.delete(stat.key)
        return made


def _own(store: Store, state_dir: Path | None) -> list[ObjectStat]:
    """A store's backups, of the installation in this directory or of all, the newest first."""
    own = STATES.key(_identity((state_dir / _IDENTITY).read_bytes())) if state_dir else STATES.prefix
    return sorted((s for s in store.objects(STATES) if s.key.startswith(own)), key=lambda s: -s.modified_s)


def state_backups(where: str) -> Iterator[tuple[Backup, bytes]]:
    """All that are there, the newest first, each read whole. Raises OSError, imagestore's errors."""
    with _store(where) as store:
        if store is None:
            yield _look(where, Path(where).stat().st_mtime, Path(where).read_bytes())
        else:
            yield from (_read(store, stat) for stat in _own(store, None))


def restore_state(state_dir: Path, where: str, name: str = "", into: StateStore | None = None) -> Backup:
    """Put the newest back, or the one of this name. Whoever calls it holds the lock of `state_dir`.

    What is there stays beside it as `sf.db.<time>`, and in its place until the last step: killed at any moment, it is
    begun anew. into: an etcd, empty. Raises NotFound, Corrupt, and Conflict for a directory of another installation.
    """
    if into is not None and into.get(Epoch().key):
        hint = "another: etcd://…/PLACE; or etcdctl del --prefix"
        raise Conflict("there is a state in this etcd", hint=hint)
    found = [(made, data) for made, data in state_backups(where) if name in ("", made.name)]
    if not found:
        raise NotFound(f"{where} keeps no state {name}".strip(), hint=f"sf state check {where}")
    if len({made.installation for made, _ in found if made.installation}) > 1:
        raise Conflict(f"{where} keeps states of several installations", hint="--from NAME")
    made, (database, files, *_) = _sound(found[0][0]), _unpack(found[0][1])
    if (own := state_dir / _IDENTITY).exists() and own.read_bytes() != files[_IDENTITY]:
        raise Conflict(f"{state_dir} is of another installation than {made.name}", hint="use an empty one")
    place = state_dir / ".restore"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    durable.write(place / "sf.db", database)
    with closing(SqliteStore(place / "sf.db")) as store:
        nodes = [node.name for node in Transaction(store).list(Node) if node.state != "deleted"]
        transact(store, lambda txn: begin(txn, nodes, f"the state was restored from {made.name}"))
        if into is not None:
            _copy(store, into)
    for file, content in files.items():
        path = state_dir / file
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            durable.write(path, content, 0o644 if file == _IDENTITY else 0o600)
    if into is None:
        _keep_aside(state_dir / "sf.db")
        (place / "sf.db").rename(state_dir / "sf.db")
        durable.sync(state_dir)
    shutil.rmtree(place)
    return made


def copy_state(config: Config, source: str, target: str) -> Backup:
    """Everything from a state directory or an etcd to the other, by a backup; the servers of both are stopped."""
    with TemporaryDirectory(prefix="sf-state-") as place, ExitStack() as opened:
        told = [replace(config, state=where) if "://" in where else None for where in (source, target)]
        records, into = (opened.enter_context(closing(open_state(one))) if one else None for one in told)
        if any(store and store.list(f"{ALIVE}/") for store in (records, into)):
            raise Conflict("nodes speak to a server whose state this is", hint="stop sf serve")
        homes = [config.state_dir if "://" in where else Path(where) for where in (source, target)]
        back_up_state(homes[0], f"{place}/{source.rpartition('/')[2]}", records=records)
        return restore_state(homes[1], f"{place}/{source.rpartition('/')[2]}", into=into)


def _copy(source: StateStore, target: StateStore) -> None:
    """All of one moment but what lives with a lease; last the epoch, without which it is no state."""
    piece, size_bytes = dict[str, bytes | None](), 0
    for record in sorted(source.list(""), key=lambda record: record.key == Epoch().key):
        size_bytes += len(record.key) + len(record.value)
        if piece and (len(piece) == MOST_KEYS or size_bytes > MOST_BYTES or record.key == Epoch().key):
            target.commit(piece, expect={})
            piece, size_bytes = {}, len(record.key) + len(record.value)
        if not record.key.startswith((f"{ALIVE}/", f"{Server.KIND}/")):
            piece[record.key] = record.value
    target.commit(piece, expect={})


def _keep_aside(old: Path) -> None:
    """Another name for what is there; its journal must not meet the new file."""
    kept = f"{old}.{time.strftime('%Y%m%d-%H%M%S')}"
    if old.exists():
        with suppress(sqlite3.Error), closing(sqlite3.connect(old, timeout=10)) as database:
            database.execute("pragma journal_mode=delete")
        with suppress(FileExistsError):
            os.link(old, kept)
    for path in old.parent.glob(f"{old.name}-*"):
        path.rename(f"{kept}{path.name.removeprefix(old.name)}")


async def keep(store: StateStore, config: Config, node: str) -> None:
    """For ever: a backup as soon as the newest is old enough, also after the server was down; the oldest go."""
    said = ""
    while config.state_backup:
        words = await asyncio.to_thread(_when_due, config, store if config.state else None)
        if words not in ("", said):
            said = words
            log.log(logging.ERROR if " not " in words else logging.INFO, "%s", words)
            note = partial(Transaction.event, kind=Node.KIND, owner=node, message=words)
            with suppress(ComputeError):
                await asyncio.to_thread(transact, store, note, node)
        await asyncio.sleep(_LOOK_S)


def _when_due(config: Config, records: StateStore | None = None) -> str:
    """What became of it, in words; "" if there was nothing to do."""
    try:
        with _store(config.state_backup, create=True) as store:
            newest = _own(store, config.state_dir)[:1] if store else []
            due_s = sum(stat.modified_s for stat in newest) + config.state_backup_every_s
            if store and store.backend.now() < due_s:
                return ""
        made = back_up_state(config.state_dir, config.state_backup, config.state_backup_keep, records)
        return f"the state was backed up: {made.name}"
    except (ComputeError, StoreError, OSError, sqlite3.Error) as err:
        return f"the state was not backed up: {err}"
