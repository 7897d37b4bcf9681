"""Garbage collection beside running writers and readers, on stores without locks (docs/adr/0004-garbage-collection.md).

A run looks first at what earlier runs condemned, then at the roots, and deletes what was condemned for longer than the
grace and is still in no use. Then it condemns, for later runs, what is in no use now:

    pack       in use -> on the condemned list -> deleted, then forgotten by the list
    manifest,  in use -> marked as trash (same content, an etag of its own) -> deleted, if it still has that etag
    layout

A run looks, makes a plan of what it saw, which is a pure function, and carries it out; a dry run ends before that.
Any number of collectors may run, stop for days between two requests, or die: what a late request can still do was
decided for good before. Everything that cannot be understood ends the run before it changes anything.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from imagestore.backends.protocol import ObjectStat
from imagestore.errors import Conflict, Corrupt, NoSpace, NotFound, StoreError, Unsupported
from imagestore.formats import keys
from imagestore.formats.digest import Digest
from imagestore.store.frames import Frames, load
from imagestore.store.inventory import Inventory, Table, named, read_layouts, reindex
from imagestore.store.leases import Condemned, Lease
from imagestore.store.packing import Packer, carry
from imagestore.store.roots import AHEAD_S, Roots, find_roots
from imagestore.store.store import Store
from imagestore.updates.using import read_steps

GRACE_S = 24 * 3600.0
REPACK_THRESHOLD = 0.5
log = logging.getLogger(__name__)


@dataclass(slots=True)
class GcReport:
    """What a run did, or with `dry_run` would do. Bytes as stored."""

    dry_run: bool
    images: int = 0  # manifests in use
    used_bytes: float = 0
    deleted_packs: int = 0
    freed_bytes: int = 0
    waiting_packs: int = 0  # condemned, and deleted by a run after the grace
    waiting_bytes: int = 0
    repacked_packs: int = 0
    copied_bytes: int = 0
    trashed_images: int = 0
    deleted_images: int = 0
    deleted_names: int = 0  # tombstones whose grace is over
    doubtful_times: int = 0
    """Times that cannot be right, because the store's clock was wrong once: what bears them stays for too long."""


def collect(
    store: Store,
    *,
    grace_s: float = GRACE_S,
    repack_threshold: float = REPACK_THRESHOLD,
    dry_run: bool = False,
    mend_times: bool = False,
) -> GcReport:
    """One run. `grace_s` has to be longer than any cache in front of the store keeps layouts and names.

    repack_threshold: packs of which more than this share is in no use are written anew, 0 to 1.
    mend_times: what bears a time that cannot be right begins its grace now.
    Raises Conflict when another collector was at the same, Corrupt or Unsupported for what cannot be understood.
    """

    def run() -> GcReport:
        seen = look(store, grace_s, mend_times=mend_times)
        found = plan(seen, repack_threshold)
        report = replace(found.report, dry_run=dry_run)
        if not dry_run:
            _carry_out(store, seen, found, report, repack_threshold)
        return report

    if dry_run:
        return run()
    store.check_writable()
    return store.freeing(run)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run saw of a store. `before_s`: what is older by the store's clock is past its grace.

    ahead_s: what is younger was written by a clock that was wrong, and with `mend_times` counts as old.
    """

    before_s: float
    ahead_s: float
    mend_times: bool
    condemned: Condemned
    objects: Mapping[keys.Kind, Mapping[Digest, ObjectStat]]
    """Manifests, layouts and what is kept beside them."""
    inventory: Inventory  # with the chunks in use marked live
    roots: Roots
    packs_of: Mapping[Digest, tuple[Digest, ...]]  # images in use, and the packs of their layouts
    trash: frozenset[str]  # keys of old manifests and layouts in no use that a run marked before
    updates: frozenset[Digest]  # what the lists of images in use name


def look(store: Store, grace_s: float, *, mend_times: bool = False) -> Seen:
    """Everything that a plan needs. Raises Corrupt, Unsupported for what cannot be understood."""
    now_s = store.backend.now()
    before_s, ahead_s = now_s - grace_s, now_s + AHEAD_S
    # What may be deleted is what was condemned before the roots are read: whoever sets a root later has to
    # look at the list and at the objects' etags after it, and helps himself.
    condemned = Condemned.read(store)
    kinds = (keys.MANIFESTS, keys.LAYOUTS, keys.DELTAS, *keys.BESIDE)
    objects = {kind: dict(named(store, kind)) for kind in kinds}
    inventory = Inventory.read(store)
    roots = find_roots(store, now_s, before_s)
    packs_of = _mark(store, inventory, roots)
    trash = {
        stat.key
        for kind in (keys.MANIFESTS, keys.LAYOUTS)
        for name, stat in objects[kind].items()
        if name not in roots.images and stat.modified_s <= before_s and _is_trash(store, stat)
    }
    lists = (read_steps(store, image) for image in objects[keys.UPDATES].keys() & roots.images)
    listed = frozenset(step.name for steps in lists for step in steps.values())
    return Seen(
        before_s, ahead_s, mend_times, condemned, objects, inventory, roots, packs_of, frozenset(trash), listed
    )  # fmt: skip


def _mark(store: Store, inventory: Inventory, roots: Roots) -> dict[Digest, tuple[Digest, ...]]:
    packs_of = {}
    for digest, layout in read_layouts(store, sorted(roots.images)):
        try:
            if isinstance(layout, StoreError):
                raise layout
            for use in inventory.uses(layout):
                use.table.live[use.rows] = True
        except (NotFound, Corrupt) as err:
            if digest in roots.must:
                hint = "sf store verify --repair-from URL|FILE; until then nothing can be collected"
                raise Corrupt(f"image {digest} is in use and not whole: {err}", hint=hint) from err
            continue
        packs_of[digest] = layout.packs
    return packs_of


def _is_trash(store: Store, stat: ObjectStat) -> bool:
    if stat.size_bytes < len(keys.TRASH):
        return False
    with suppress(NotFound):
        found = store.backend.get(stat.key, 0, len(keys.TRASH))
        return found.data == keys.TRASH and found.stat.etag == stat.etag
    return False


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is to do. All but names and leases, which the roots tell: the objects."""

    delete: Sequence[ObjectStat]
    """Manifests and layouts, marked a grace ago, each if it is still as it was; then what is kept beside them."""
    delete_packs: Collection[Digest]
    repack: Mapping[Digest, Table]
    """Live data in a condemned pack is copied out, however little is dead; so is that of nearly dead packs."""
    mark: Sequence[ObjectStat]
    condemn: Collection[Digest]
    report: GcReport  # as if nobody came between


def plan(seen: Seen, threshold: float) -> Plan:
    """What to do about what was seen: a pure function."""
    condemned, packs, roots = seen.condemned.packs, seen.inventory.packs, seen.roots
    ahead_s = seen.ahead_s

    def old(stat: ObjectStat) -> bool:
        return stat.modified_s <= seen.before_s or (seen.mend_times and stat.modified_s > ahead_s)

    def unused(kind: keys.Kind) -> dict[Digest, ObjectStat]:
        objects = seen.objects[kind].items()
        return {name: stat for name, stat in objects if name not in roots.images and old(stat)}

    live = {pack: table for pack, table in seen.inventory.tables.items() if table.live.any()}
    used = live.keys() | roots.packs
    # Nothing is condemned before it was made: such a time is as wrong as one to come.
    odd = {
        pack
        for pack, since in condemned.items()
        if since > ahead_s or (pack in packs and since + AHEAD_S < packs[pack].modified_s <= ahead_s)
    }
    doomed = {pack for pack, since in condemned.items() if since <= seen.before_s} - used - odd
    left = packs.keys() - doomed
    sound = (left - seen.condemned.damaged) & live.keys()
    nobodys = {pack for pack in sound - roots.packs if old(packs[pack])}
    sparse = {pack for pack in nobodys if live[pack].dead_share > threshold + 1e-9}
    repack = {pack: live[pack] for pack in sound & (sparse | condemned.keys())}
    condemn = ({pack for pack in left - used if old(packs[pack])} - condemned.keys()) | repack.keys()
    condemn |= odd & left if seen.mend_times else set()
    late = [s for of in (packs, *seen.objects.values()) for s in of.values() if s.modified_s > ahead_s]
    waiting = (condemn | condemned.keys()) & left
    manifests, layouts = unused(keys.MANIFESTS), unused(keys.LAYOUTS)
    gone = {name for name, stat in manifests.items() if stat.key in seen.trash}
    kept = seen.objects[keys.MANIFESTS].keys() - gone
    beside = [stat for kind in keys.BESIDE for name, stat in unused(kind).items() if name not in kept]
    deltas = seen.objects[keys.DELTAS].items()
    beside += [stat for name, stat in deltas if name not in seen.updates and old(stat)]
    both = [*manifests.values(), *layouts.values()]
    delete = [*(stat for stat in both if stat.key in seen.trash), *beside]
    mark = [stat for stat in both if stat.key not in seen.trash and stat.size_bytes]
    report = GcReport(
        False,
        images=len(seen.packs_of),
        used_bytes=round(sum(table.stored_bytes(table.live) for table in live.values())),
        deleted_packs=len(doomed & packs.keys()),
        freed_bytes=sum(stat.size_bytes for stat in (*delete, *(packs[p] for p in doomed & packs.keys()))),
        waiting_packs=len(waiting),
        waiting_bytes=sum(packs[pack].size_bytes for pack in waiting),
        repacked_packs=len(repack),
        copied_bytes=round(sum(table.stored_bytes(table.live) for table in repack.values())),
        trashed_images=sum(keys.kind_of(stat.key) is keys.MANIFESTS for stat in mark),
        deleted_images=len(gone),
        deleted_names=len(roots.tombstones),
        doubtful_times=len(odd) + len(late) + len(roots.odd_names) + len(roots.odd_leases),
    )
    return Plan(delete, doomed, repack, mark, condemn, report)


def _carry_out(store: Store, seen: Seen, todo: Plan, report: GcReport, threshold: float) -> None:
    """What was condemned long enough goes: names, manifests, layouts, index, packs, in this order.

    Then what is in no use now is condemned, for later runs. `report` loses what others were faster at.
    """
    for record in seen.roots.tombstones:
        report.deleted_names -= not _remove(store, keys.NAMES.key(record.name, record.tag), record.etag)
    for key in (*seen.roots.dead_leases, *(seen.roots.odd_leases if seen.mend_times else ())):
        _remove(store, key, None)
    for record in seen.roots.odd_names if seen.mend_times else ():
        with suppress(Conflict):
            store.names.mend_times(record, seen.ahead_s)
    for stat in todo.delete:
        marked = stat.key in seen.trash
        if not _remove(store, stat.key, stat.etag if marked else None):
            report.deleted_images -= keys.kind_of(stat.key) is keys.MANIFESTS
            report.freed_bytes -= stat.size_bytes
    reindex(store, seen.inventory, todo.delete_packs)
    there = seen.inventory.packs.keys() - todo.delete_packs
    for pack in seen.inventory.packs.keys() - there:
        store.backend.delete(keys.PACKS.key(pack))
    # Also what a run that was killed here deleted.
    gone, condemned = seen.condemned.packs.keys() - there, seen.condemned
    if gone:
        condemned = condemned.replace(store, forget=gone)
    condemn = set(todo.condemn)
    try:
        if todo.repack:
            _repack(store, seen, todo.repack, threshold)
    except NoSpace as err:  # there will be some when a later run has deleted what is condemned now
        log.warning("%s: packs cannot be written anew: %s", store.url, err)
        condemn -= todo.repack.keys() - condemned.packs.keys()
    for stat in todo.mark:
        with suppress(NotFound, Conflict, NoSpace):
            found = store.backend.get(stat.key)
            if found.stat.etag == stat.etag:
                data = keys.trashed(keys.untrashed(found.data))
                store.backend.put(stat.key, data, if_match=stat.etag)
    if condemn:
        condemned.replace(store, add=condemn)


def _remove(store: Store, key: str, etag: str | None) -> bool:
    """Delete it if it is still what was seen; where there are no conditional deletes it is emptied instead."""
    with suppress(Conflict):
        try:
            store.backend.delete(key, if_match=etag)
        except Unsupported:
            store.backend.put(key, b"", if_match=etag)
        return True
    return False


def _repack(store: Store, seen: Seen, sparse: Mapping[Digest, Table], threshold: float) -> None:
    """Copy what is live out of packs, then point the layouts of all images at the copies."""
    affected = [digest for digest, packs in seen.packs_of.items() if not sparse.keys().isdisjoint(packs)]
    packer = Packer(store, "gc")
    placement = packer.placement
    with packer.lease as lease, packer:
        lease.reuse(sparse)
        rows = ((pack, table.footer, table.live) for pack, table in sorted(sparse.items()))
        live = (Frames.of_pack(*row, split_above=threshold) for row in rows)
        carry(load(store, live), packer)
        packer.publish_index()
        replaced: list[tuple[str, bytes, str]] = []
        for digest in affected:
            key = keys.LAYOUTS.key(digest)
            # A layout that was replaced meanwhile, or uses more of a pack than was marked, waits for the next run.
            with suppress(NotFound, Conflict):
                found = store.backend.get(key)
                layout, manifest = store.layout(digest, keys.untrashed(found.data)), store.manifest(digest)
                moved = packer.move(layout, manifest, sparse)
                if moved is None:
                    continue
                _check(lease, placement.packs)
                stat = store.backend.put(key, moved.encode(), if_match=found.stat.etag)
                replaced.append((key, found.data, stat.etag))
        try:
            _check(lease, placement.packs)
        except Conflict:
            # This run slept for longer than the grace, and another one took the copies for dead.
            for key, data, etag in replaced:
                with suppress(Conflict):
                    store.backend.put(key, data, if_match=etag)
            raise


def _check(lease: Lease, packs: Collection[Digest]) -> None:
    if lease.unusable(packs):
        raise Conflict("another collector condemned the copies that this one made", hint="try again")
