"""What artifacts want is brought here: the disks of URLs, and images that source lists name.

Out of the records alone, so that whoever starts again goes on with it. Instances that wait for it are told how it ends.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from threading import Lock, Thread

from compute.cluster.auth import SYSTEM
from compute.cluster.feed import Feed
from compute.cluster.images.artifacts import WEB, Artifact, Blob, Resolver, add_version, fitted, listed
from compute.cluster.images.stores import NamespaceStores
from compute.cluster.quotas import Quota, enforce
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction, pieces, transact
from compute.cluster.state.protocol import StateStore
from compute.config import Config
from compute.errors import ComputeError, Invalid, NotFound, brief
from compute.wire.spec import InstanceState
from imagestore import Progress, Report, StoreError
from imagestore.mirror import bring, sources

_MOST, _LOOK_S, _TELL_S = 32, 5.0, 2.0


class Bringing:
    """Of one server."""

    def __init__(self, records: StateStore, own: NamespaceStores, server: Resolver, config: Config) -> None:
        self._records, self._own, self._server, self._config = records, own, server, config
        self._running = set[str]()
        self._listed = Lock()  # two downloads of one source would write to one file

    async def keep(self, feed: Feed) -> None:
        """For ever."""
        while True:
            seen = feed.revision
            for one in Transaction(self._records).list(Artifact):
                if one.wanted and one.uuid not in self._running and len(self._running) < _MOST:
                    self._running.add(one.uuid)
                    Thread(target=self._run, args=(one,), daemon=True).start()  # it ends with the process
            await feed.moved((Artifact.KIND,), seen, _LOOK_S)

    def _run(self, one: Artifact) -> None:
        work = self._config.state_dir / "downloads" / one.uuid
        try:
            blob = self._bring(one, work)
            pieces(self._records, lambda txn: _end(txn, one, blob, ""))
        except Exception as err:  # noqa: BLE001 - whatever one artifact meets ends no other, and is said
            known, hint = isinstance(err, StoreError | ComputeError), getattr(err, "hint", "")
            said = f"{err} ({hint})".removesuffix(" ()") if known else brief(err)
            pieces(self._records, lambda txn: _end(txn, one, None, said[:1000]))
        finally:
            shutil.rmtree(work, ignore_errors=True)
            self._running.discard(one.uuid)

    def _bring(self, one: Artifact, work: Path) -> Blob:
        wanted, machine, home = one.wanted, self._config.architecture, one.namespace
        if wanted.startswith(WEB):
            store, source = self._own.of(home), sources.of_url(wanted, one.uuid, "latest", machine)
            tell = self._teller(one, sum(stat.size_bytes for stat in store.backend.list("")))
            done = bring(store, source, machine, work, trusted=home == SYSTEM, progress=tell)
        else:
            with self._listed:
                if (named := listed(wanted, machine, self._config.sources)) is None:
                    raise NotFound(f"no source list names {wanted} any more")
                home, store = "", self._server.stores["local"]
                done = bring(store, named, machine, work, trusted=True, progress=self._teller(one))
        assert done.digest is not None
        return Blob(home, str(done.digest), store.manifest(done.digest).size_bytes)

    def _teller(self, one: Artifact, held_bytes: int = 0) -> Report:
        """Says how far it is; ends it when it is not wanted any more, or does not fit beside what is held."""
        last_s = 0.0

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
    same = (i for i in txn.list(Instance) if (i.namespace, i.state) == (one.namespace, InstanceState.INITIAL))
    return [i for i in same if any(d.pending and d.image_name == one.wanted for d in i.disks)]


def _say(txn: Transaction, one: Artifact, text: str) -> None:
    if (found := txn.find(Artifact, one.uuid)) is None:
        raise Invalid("it is not wanted any more")
    txn.update(replace(found, progress=text, state="creating"))
    for instance in _waiting(txn, one)[: txn.room]:
        txn.update(replace(instance, progress=f"image: {text}"))


def _end(txn: Transaction, one: Artifact, blob: Blob | None, said: str) -> bool:
    """It is here, or will not come: instances go on, the artifact has a version more, or both say why not.

    True: there are more instances, for another transaction.
    """
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
        txn.update(replace(now, updated_s=time.time()))
        txn.event(Instance.KIND, now.uuid, f"state is error: {why}" if why else f"{one.wanted[:200]} is here")
    if (found := txn.find(Artifact, one.uuid)) is not None:
        if blob is not None and one.wanted.startswith(WEB):
            add_version(txn, found, blob)
        elif blob is not None:
            txn.purge(found)  # it is a name of the server's store from now on
        else:
            txn.update(replace(found, state="error", wanted="", progress="", error_message=said))
            txn.event(Artifact.KIND, one.uuid, f"state is error: {said}")
    enforce(txn)
    return False
