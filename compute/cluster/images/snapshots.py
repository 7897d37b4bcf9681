"""What the server does for a snapshot: what its disks are made of goes to the own store, then names to what came."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from contextvars import Context, copy_context
from dataclasses import replace
from functools import partial
from typing import Any

from compute.cluster.feed import Feed
from compute.cluster.images.stores import NamespaceStores
from compute.cluster.records.instances import Instance
from compute.cluster.records.snapshots import Backup, Snapshot, cool, due, finish, kept, order, snapshots_of
from compute.cluster.records.taken import Taken
from compute.cluster.records.transaction import Transaction, transact
from compute.cluster.state.protocol import StateStore
from compute.errors import ComputeError, Conflict
from compute.wire.spec import InstanceState, Warm
from imagestore import Digest, NotFound, Store, StoreError, copy_image, copy_name, open_store, tag

_LOOK_S = 5.0


class Snapshots:
    """`keep` in the server's loop; a few snapshots at once take their next step, each in a thread."""

    def __init__(
        self,
        records: StateStore,
        own: NamespaceStores,
        stores: Callable[[], Mapping[str, Store]],
        feed: Feed,
        fits: Callable[..., Any],
        pass_on: Callable[[Snapshot, str], None],
    ) -> None:
        self._records, self._own, self._stores, self._feed, self._fits = records, own, stores, feed, fits
        self._pool, self._busy, self._pass_on = ThreadPoolExecutor(4, "sf-snapshots"), set[str](), pass_on
        self._moves = ThreadPoolExecutor(4, "sf-moves")  # for what passes: that takes long

    async def keep(self) -> None:
        """For ever. Raises what it met: a full disk, or a rule that goes now (`process.lasting` begins anew)."""
        while True:
            seen = self._feed.revision
            await asyncio.to_thread(self._look)
            await self._feed.moved((Snapshot.KIND, Backup.KIND), seen, _LOOK_S)

    def _look(self) -> None:
        busy, read = set(self._busy), Transaction(self._records)  # in this order: what is over is seen to be
        for rule in (rule for rule in read.list(Backup) if rule.due_s <= time.time()):
            transact(self._records, lambda txn, uuid=rule.uuid: due(txn, uuid))  # type: ignore[misc]
        for one in read.list(Snapshot):
            instance = read.find(Instance, one.instance_uuid)
            here = instance is not None and instance.state == InstanceState.CREATED
            if instance is None and not one.live:  # what it kept stays, in the store alone
                transact(self._records, lambda txn, uuid=one.uuid: txn.delete(Snapshot, uuid))  # type: ignore[misc]
            # What was made of a guest that its maker held was for that maker.
            gone = instance is not None and instance.state == InstanceState.DELETED and instance.held_s > 0
            gone = gone and not (one.order.warm and not one.live)  # that is what its maker was for
            # One that was given to another node meanwhile moves no more.
            waits = one.state == "ordered" and instance is not None and here and instance.moving == one.to
            # What a live move that came to nothing left is removed there first.
            waits = waits or (one.live and instance is not None and one.to in instance.left)
            if (one.live or gone) and one.uuid not in busy and not waits:
                self._busy.add(one.uuid)
                # What passes outlives a lease: who ends it looks whether it is still to.
                pool, told = (self._moves, Context()) if one.running else (self._pool, copy_context())
                pool.submit(told.run, self._advance, one, instance if here else None)

    def _advance(self, one: Snapshot, instance: Instance | None) -> None:
        try:
            if not one.live:
                remove(self._records, self._own, one)
                return
            if instance is None or one.order.error:
                raise Conflict(one.order.error or "its instance is gone")
            if one.state == "passing":
                raise Conflict("the server that carried it ended")
            target = self._own.of(one.namespace)
            if one.running:
                transact(self._records, lambda txn: order(txn, one))
                try:
                    self._pass_on(one, instance.node)
                except Conflict as err:
                    transact(self._records, partial(cool, uuid=one.uuid, why=str(err)))
                    return
            elif one.state == "initial":
                # A store is complete in itself.
                for disk in instance.disks:
                    if disk.image and disk.store != one.namespace and not disk.cdrom:
                        others = self._own.made() if disk.store else self._stores()
                        digest = Digest.parse(disk.image)
                        sources = [store for store in others.values() if store.has_manifest(digest)]
                        copy_image((sources or [target])[0], target, digest)
                transact(self._records, lambda txn: order(txn, one))
                return
            for device, digest in ((name, Digest.parse(text)) for name, text in one.order.digests.items()):
                made = target.manifest(digest)
                if not one.to:
                    tag(target, digest, one.image(device), one.tag, made.architecture)
            if one.backup and (rule := Transaction(self._records).find(Backup, one.instance_uuid)):
                self._keep(rule, one, target)
            transact(self._records, lambda txn: finish(txn, one.uuid, fits=self._fits))
        except (ComputeError, StoreError, OSError) as err:
            error = str(err) or repr(err)
            transact(self._records, lambda txn: finish(txn, one.uuid, error))
        finally:
            self._busy.discard(one.uuid)

    def _keep(self, rule: Backup, new: Snapshot, target: Store) -> None:
        """A complete copy in the other store; and what the rule does not keep goes from both."""
        if rule.store:
            with closing((other := open_store(rule.store, create=True, private=True)).backend):
                for device in new.order.digests:
                    copy_name(target, other, target.names.get(new.image(device), new.tag))
        made = [one for one in snapshots_of(Transaction(self._records), rule.uuid) if one.backup]
        stay = kept(rule.keep, [one for one in made if one.state == "created" or one.uuid == new.uuid])
        for old in (one for one in made if one.uuid not in stay | {new.uuid} and not one.live):
            remove(self._records, self._own, old, rule.store)


def remove(records: StateStore, own: NamespaceStores, one: Snapshot, url: str = "") -> None:
    """Take away its names, also in another store, then its record; the collector does the rest. A move ends with it."""
    if one.live:
        transact(records, lambda txn: finish(txn, one.uuid, "it was taken away"))
    for store in (own.of(one.namespace), *([open_store(url)] if url else [])):
        for device in one.order.digests:
            with suppress(NotFound):
                store.names.remove(one.image(device), one.tag)
    transact(records, lambda txn: txn.delete(Snapshot, one.uuid))


def offered(txn: Transaction, own: NamespaceStores, instance: Instance, architecture: str) -> Instance:
    """The instance with the warm state that it may begin as. Its store is asked, so what commits does not do this.

    The namespace's own keys write there, and qemu is to believe that memory: the record says what a node made.
    """
    name = instance.warm_name()
    made = txn.find(Taken, f"warm/{instance.namespace}/{name}") if name else None
    with suppress(StoreError, KeyError):  # there is none, or it cannot be read: it boots
        if made and (store := own.find(instance.namespace)):
            disk = store.names.get(name).digest(architecture)
            if str(disk) != made.owner:
                return instance
            told = dict(store.manifest(disk).labels)
            memory = Digest.parse(told["memory"])
            return replace(instance, warm=Warm(str(disk), str(memory), told["fit"][:64]))
    return instance
