"""Images that their stores must keep because an instance is made of them, whatever becomes of their names.

One object `refs/<installation>-<uuid>` per instance in each store that has its images; the collector takes it for a
root. It is made and removed by comparing what should be there with what is: at the start, then every few seconds.
What is missing for these seconds is covered by the collector's grace: an image counts as in use for hours after it
lost its name.
"""

import asyncio
import logging
from collections.abc import Mapping

from compute.cluster.records.instances import Instance
from compute.cluster.records.transaction import Transaction
from compute.cluster.state.protocol import StateStore
from compute.wire.spec import InstanceState
from imagestore import Digest, ImageCache, NotFound, Store, StoreError, hold, release

log = logging.getLogger(__name__)

EVERY_S = 5.0


class Holds:
    """Remembers what each store holds for this installation, so that nothing is asked twice."""

    def __init__(self, store: StateStore, installation: str) -> None:
        self._store, self._prefix = store, f"{installation}-"
        self._known: dict[str, dict[str, frozenset[Digest]]] = {}

    async def keep(self, images: ImageCache) -> None:
        """For ever; a store that cannot be reached is tried again."""
        while True:
            await asyncio.to_thread(self.reconcile, images.stores)
            await asyncio.sleep(EVERY_S)

    def reconcile(self, stores: Mapping[str, Store]) -> None:
        """Once: hold what instances are made of, release what no instance is made of any more."""
        wanted = {
            f"{self._prefix}{one.uuid}": frozenset(Digest.parse(d.image) for d in one.disks if d.image)
            for one in Transaction(self._store).list(Instance)
            if one.state != InstanceState.DELETED
        }
        for name, store in stores.items():
            if not store.backend.read_only:
                try:
                    self._hold(name, store, wanted)
                except StoreError as err:
                    log.warning("image store %s: cannot note which images instances need: %s", name, err)

    def _hold(self, name: str, store: Store, wanted: Mapping[str, frozenset[Digest]]) -> None:
        if name not in self._known:
            ours = store.backend.list(f"refs/{self._prefix}")
            self._known[name] = {stat.key.removeprefix("refs/"): frozenset() for stat in ours}
        known = self._known[name]
        for holder, digests in wanted.items():
            if digests and known.get(holder) != digests:
                here = [digest for digest in digests if store.has_manifest(digest)]
                try:
                    if here:
                        hold(store, holder, here)
                except NotFound as err:  # not whole any more: said once, as nothing here can mend it
                    log.warning("image store %s: instance %s: %s", name, holder, err)
                known[holder] = digests
        for holder in known.keys() - {holder for holder, digests in wanted.items() if digests}:
            release(store, holder)
            del known[holder]
