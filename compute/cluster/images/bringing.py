"""What artifacts want is brought here: disks of URLs and of blobs, what was uploaded, images that source lists name.

Out of the records alone, so that whoever starts again goes on with it. Instances that wait for it are told how it ends.
"""

import asyncio
import fcntl
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock, Thread

from compute import errors
from compute.cluster.auth import SYSTEM
from compute.cluster.feed import Feed
from compute.cluster.images.artifacts import BLOB, WEB, Artifact, Blob, add_version, fitted, listed
from compute.cluster.images.stores import NamespaceStores
from compute.cluster.quotas import Quota, enforce
from compute.cluster.records.instances import Instance
from compute.cluster.records.namespaces import Namespace
from compute.cluster.records.taken import claim, disk_bytes
from compute.cluster.records.transaction import Transaction, pieces, transact
from compute.cluster.state.protocol import StateStore
from compute.config import Config
from compute.errors import ComputeError, Invalid, NotFound, brief
from compute.wire.spec import InstanceState
from imagestore import Digest, ImageCache, Progress, Report, Store, StoreError, Unavailable, pull, push
from imagestore.mirror import bring, hash_file, sources

_MOST, _OF_ONE, _LOOK_S, _TELL_S, _UPLOAD_S = 32, 8, 5.0, 2.0, 86400.0


class Bringing:
    """Of one server."""

    def __init__(self, records: StateStore, own: NamespaceStores, server: ImageCache, config: Config) -> None:
        self._records, self._own, self._server, self._config = records, own, server, config
        self._running = dict[str, str]()  # uuids, and whose they are: a thread may outlive what it is for
        self._listed = Lock()  # two downloads of one source would write to one file

    async def keep(self, feed: Feed, *, sent: bool = False) -> None:
        """For ever. sent: what was uploaded to this server; else what any server may bring."""
        while True:
            seen = feed.revision
            with suppress(OSError):  # what it looks at is taken over meanwhile
                await asyncio.to_thread(self.sweep)
            for one in await asyncio.to_thread(Transaction(self._records).list, Artifact):
                uploads = [self._file(blob) for blob in one.blobs.values() if blob.upload]
                mine = any(path.exists() for path in uploads) if sent else not uploads
                held = list(self._running.values())
                room = len(held) < _MOST and held.count(one.namespace) < _OF_ONE
                if one.wanted and mine and one.uuid not in self._running and room:
                    self._running[one.uuid] = one.namespace
                    Thread(target=self._run, args=(one,), daemon=True).start()  # it ends with the process
            await feed.moved((Artifact.KIND,), seen, _LOOK_S)

    def _file(self, blob: Blob) -> Path:  # of an upload: taken over, or not yet
        taken = self._config.state_dir / "downloads" / blob.uuid
        return taken if taken.exists() else self._config.state_dir / "uploads" / blob.upload

    def _run(self, one: Artifact) -> None:
        work = self._config.state_dir / "downloads" / one.uuid
        try:
            blob = self._bring(one, work)
            self._record(one, blob, "")
        except Exception as err:  # noqa: BLE001 - whatever one artifact meets ends no other, and is said
            known, hint = isinstance(err, StoreError | ComputeError), getattr(err, "hint", "")
            said = f"{err} ({hint})".removesuffix(" ()") if known else brief(err)
            if not (isinstance(err, Unavailable) and one.wanted.startswith(BLOB)):  # else it is tried again
                self._record(one, None, said[:1000])
        finally:
            shutil.rmtree(work, ignore_errors=True)
            self._running.pop(one.uuid)

    def _record(self, one: Artifact, blob: Blob | None, said: str) -> None:
        """How it ended. That this cannot be written now, on a full disk, is no reason to bring it once more."""
        while True:
            try:
                return pieces(self._records, lambda txn: _end(txn, one, blob, said))
            except errors.Unavailable:
                time.sleep(_LOOK_S)

    def sweep(self) -> None:
        """Remove uploads without a piece for a day, files that no record leads to, artifacts of nobody."""
        home, old = self._config.state_dir, time.time() - _UPLOAD_S
        there = [*home.glob("downloads/*"), *(p for p in home.glob("uploads/*/*") if p.stat().st_mtime < old)]
        known = Transaction(self._records).list(Artifact)
        needed = {one.uuid for one in known if one.wanted} | self._running.keys()
        needed.update(*((b.uuid, b.upload[-36:]) for one in known for b in one.blobs.values() if b.upload))
        spaces = {"", *(one.name for one in Transaction(self._records).list(Namespace))}
        for gone in (one for one in known if one.namespace not in spaces):
            pieces(self._records, partial(Transaction.purge, value=gone))
        for path in (path for path in there if path.name not in needed):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _make(self, one: Artifact, work: Path) -> Blob:
        """Store what was uploaded, as it is; then, if that is asked for, the disk that it is a file of."""
        blob = next(blob for blob in one.blobs.values() if BLOB + blob.uuid == one.wanted)
        store, path = self._own.of(blob.namespace), work.with_name(blob.uuid)
        keep = partial(push, store, name=None, progress=self._teller(one, store))
        work.mkdir(parents=True, exist_ok=True)
        if blob.upload:
            self._file(blob).rename(path)
            with path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # after a piece that was on its way
                file.truncate(blob.size_bytes)
            sums = {name: hash_file(path, name) for name in ("sha256", "sha512")}
            return replace(blob, data=str(keep(path, format_="raw").digest), sums=sums, upload="")
        pull(store, Digest.parse(blob.data), work / "data", format_="raw", durable=False)
        disk = keep(work / "data", architecture=self._config.architecture, bounded=True).digest
        return replace(blob, disk=str(disk), disk_bytes=store.manifest(disk).size_bytes)

    def _bring(self, one: Artifact, work: Path) -> Blob:
        wanted, machine, home = one.wanted, self._config.architecture, one.namespace
        if wanted.startswith(BLOB):
            return self._make(one, work)
        if wanted.startswith(WEB):
            store, source = self._own.of(home), sources.of_url(wanted, one.uuid, "latest", machine)
            tell = self._teller(one, store)
            done = bring(store, source, machine, work, trusted=home == SYSTEM, progress=tell)
        else:
            with self._listed:
                if (named := listed(wanted, machine, self._config.sources)) is None:
                    raise NotFound(f"no source list names {wanted} any more")
                home, store = "", self._server.stores["local"]
                done = bring(store, named, machine, work, trusted=True, progress=self._teller(one))
        assert done.digest is not None
        return Blob(home, str(done.digest), store.manifest(done.digest).size_bytes, made_s=time.time())

    def _teller(self, one: Artifact, store: Store | None = None) -> Report:
        """Says how far it is; ends it when it is not wanted any more, or does not fit beside what the store has."""
        last_s, held_bytes = 0.0, sum(stat.size_bytes for stat in (store.backend.list("") if store else ()))

        def tell(p: Progress) -> None:
            nonlocal last_s
            if time.monotonic() - last_s > _TELL_S:
                last_s = time.monotonic()
                quota = Quota.of(Transaction(self._records), one.namespace)
                quota.check("stored_gb", (held_bytes + p.written_bytes) / 2**30)
                share = f" {100 * p.done_bytes // p.total_bytes}%" if p.total_bytes else ""
                transact(self._records, lambda txn: _say(txn, one, f"{p.stage}{share}"))

        return tell


def _waiting(txn: Transaction, one: Artifact) -> list[Instance]:
    here = (i for i in txn.list(Instance) if i.state == InstanceState.INITIAL)
    same = (i for i in here if i.namespace == one.namespace or one.wanted.startswith(BLOB))
    return [i for i in same if any(d.pending and d.image_name == one.wanted for d in i.disks)]


def _say(txn: Transaction, one: Artifact, text: str) -> None:
    if (found := txn.find(Artifact, one.uuid)) is None:
        raise Invalid("it is not wanted any more")
    txn.update(replace(found, progress=text, state="creating"))
    for instance in _waiting(txn, one)[: txn.room]:
        txn.update(replace(instance, progress=f"image: {text}"))


def _end(txn: Transaction, one: Artifact, blob: Blob | None, said: str) -> bool:
    """It is here, or will not come: instances go on, the artifact is had, or both say why not. True: there is more."""
    txn.find(Artifact, one.uuid)  # before these: who begins to wait after that makes all of this stale
    for instance in _waiting(txn, one):
        if txn.room < 10:
            return True
        disks, why = instance.disks, said
        try:
            if blob is not None:
                disks = tuple(fitted(d, blob) if d.image_name == one.wanted else d for d in disks)
        except Invalid as err:
            why = f"{err} ({err.hint})"
        state = InstanceState.ERROR if why else instance.state
        now = replace(instance, disks=disks, state=state, error_message=why, progress="")
        claim(txn, now.node, 0, 0, disk_bytes(disks) - disk_bytes(instance.disks))
        txn.update(replace(now, updated_s=time.time()))
        txn.event(Instance.KIND, now.uuid, f"state is error: {why}" if why else f"{one.wanted[:200]} is here")
    for had in txn.list(Artifact) if one.wanted.startswith(BLOB) else ():
        new = {n: blob if blob and blob.uuid == b.uuid else b for n, b in had.blobs.items()}
        if new != had.blobs:
            txn.update(replace(had, blobs=new))
        if txn.room < 10:
            return True
    if (found := txn.find(Artifact, one.uuid)) is not None:
        if one.wanted.startswith(BLOB):  # what could not be stored is no version
            new = {number: each for number, each in found.blobs.items() if not each.upload}
            last = "created" if new else "error"
            txn.update(replace(found, blobs=new, state=last, wanted="", progress="", error_message=said))
        elif blob is not None and one.wanted.startswith(WEB):
            add_version(txn, found, blob)
        elif blob is not None:
            txn.purge(found)  # it is a name of the server's store from now on
        else:
            txn.update(replace(found, state="error", wanted="", progress="", error_message=said))
            txn.event(Artifact.KIND, one.uuid, f"state is error: {said}")
    enforce(txn)
    return False
