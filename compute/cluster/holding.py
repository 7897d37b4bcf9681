"""Images that their stores must keep because an instance is made of them or an artifact has them.

One object `refs/<installation>-<uuid>` per instance, and per version of an artifact, in each store that has its images;
the collector takes it for a root. It is made and removed by comparing what should be there with what is, at the start,
then every few seconds: so one that was lost, or came back from a copy, is put right. What is missing for these seconds
is covered by the collector's grace: an image counts as in use for hours after it lost its name.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from compute.cluster.images.artifacts import Artifact
from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction
from compute.cluster.state.protocol import StateStore
from compute.wire.spec import InstanceState
from imagestore import Digest, NotFound, Store, StoreError, hold, release

log = logging.getLogger(__name__)

EVERY_S = 10.0


class Holds:
    """Looks what each store holds for this installation; an object that is as it was written is known by its etag."""

    def __init__(self, store: StateStore, installation: str) -> None:
        self._store, self._prefix = store, f"{installation}-"
        self._written: dict[tuple[str, str], tuple[frozenset[Digest], str | None]] = {}
        self._said: set[tuple[str, str]] = set()

    async def keep(self, stores: Callable[[], Mapping[str, Store]]) -> None:
        """For ever; a store that cannot be reached is tried again."""
        while True:
            await asyncio.to_thread(lambda: self.reconcile(stores()))
            await asyncio.sleep(EVERY_S)

    def reconcile(self, stores: Mapping[str, Store]) -> None:
        """Once: hold what instances are made of, release what no instance is made of any more.

        `my/NAMESPACE` is that namespace's own store: it holds what is made of images out of it.
        """
        instances = [i for i in Transaction(self._store).list(Instance) if i.state != InstanceState.DELETED]
        blobs = [b for a in Transaction(self._store).list(Artifact) for b in a.blobs.values()]
        for name, store in stores.items():
            if not store.backend.read_only:
                home = name.partition("/")[2]
                wanted = {
                    f"{self._prefix}{one.uuid}": frozenset(
                        Digest.parse(d.image) for d in one.disks if d.image and d.store == home
                    )
                    | ({Digest.parse(one.warm.disk)} if one.warm and one.namespace == home else set())
                    for one in instances
                }
                for blob in (b for b in blobs if b.namespace == home):
                    held = {blob.disk, blob.data} - {""}
                    wanted[f"{self._prefix}{blob.uuid}"] = frozenset(map(Digest.parse, held))
                try:
                    self._hold(name, store, wanted)
                except StoreError as err:
                    log.warning("image store %s: cannot note which images instances need: %s", name, err)

    def _hold(self, name: str, store: Store, wanted: Mapping[str, frozenset[Digest]]) -> None:
        ours = store.backend.list(f"refs/{self._prefix}")
        there = {stat.key.removeprefix("refs/"): stat.etag for stat in ours}
        for holder, digests in wanted.items():
            if digests and self._written.get((name, holder)) != (digests, there.get(holder)):
                here = [digest for digest in digests if store.has_manifest(digest)]
                try:
                    self._written[name, holder] = digests, hold(store, holder, here) if here else None
                except NotFound as err:  # not whole any more: said once, and tried again: it may be repaired
                    if (name, holder) not in self._said:
                        log.warning("image store %s: instance %s: %s", name, holder, err)
                    self._said.add((name, holder))
        for holder in there.keys() - {holder for holder, digests in wanted.items() if digests}:
            release(store, holder)
