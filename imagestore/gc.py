"""Garbage collection beside running writers and readers, on stores without locks (docs/adr/0004-garbage-collection.md).

A run looks first at what earlier runs condemned, then at the roots, and deletes what was condemned for longer than the
grace and is still in no use. Then it condemns, for later runs, what is in no use now:

    pack       in use -> on the condemned list -> deleted, then forgotten by the list
    manifest,  in use -> marked as trash (same content, an etag of its own) -> deleted, if it still has that etag
    layout

Any number of collectors may run, stop for days between two requests, or die: what a late request can still do was
decided for good before. Everything that cannot be understood ends the run before it changes anything.
"""

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, field

from imagestore.backends.protocol import ObjectStat
from imagestore.errors import Conflict, Corrupt, NotFound, StoreError, Unsupported
from imagestore.formats.digest import Digest
from imagestore.formats.keys import (
    BESIDE,
    HOOKS_KEY,
    INDEX,
    LAYOUTS,
    MANIFESTS,
    PACKS,
    TRASH,
    TUF,
    Kind,
    trashed,
    untrashed,
)
from imagestore.formats.layout import Layout
from imagestore.store import index
from imagestore.store.frames import Frames, load
from imagestore.store.inventory import Inventory, Table, named, read_layouts
from imagestore.store.leases import Condemned, Lease, held, leases
from imagestore.store.names import NameRecord, name_key
from imagestore.store.packing import Packer, carry
from imagestore.store.placement import Placement
from imagestore.store.store import Store

GRACE_S = 24 * 3600.0
REPACK_THRESHOLD = 0.5
_ATTEMPTS = 5


@dataclass(slots=True)
class GcReport:
    """What a run did, or with `dry_run` would do. Bytes as stored."""

    dry_run: bool
    images: int = 0
    """Manifests in use."""
    used_bytes: float = 0
    deleted_packs: int = 0
    freed_bytes: int = 0
    waiting_packs: int = 0
    """Condemned, and deleted by a run after the grace."""
    waiting_bytes: int = 0
    repacked_packs: int = 0
    copied_bytes: int = 0
    trashed_images: int = 0
    deleted_images: int = 0
    deleted_names: int = 0
    """Tombstones whose grace is over."""


def collect(
    store: Store,
    *,
    grace_s: float = GRACE_S,
    repack_threshold: float = REPACK_THRESHOLD,
    dry_run: bool = False,
) -> GcReport:
    """One run. `grace_s` has to be longer than any cache in front of the store keeps layouts and names.

    repack_threshold: packs of which more than this share is in no use are written anew, 0 to 1.
    Raises Conflict when another collector was at the same, Corrupt or Unsupported for what cannot be understood.
    """
    if not dry_run:
        store.check_writable()
    return _Run(store, grace_s, repack_threshold, dry_run).run()


class _Run:
    def __init__(self, store: Store, grace_s: float, threshold: float, dry_run: bool) -> None:
        self._store, self._grace_s, self._threshold, self._dry_run = store, grace_s, threshold, dry_run
        self._report = GcReport(dry_run)
        self._now_s = store.backend.now()
        self._before_s = self._now_s - grace_s
        self._image_packs: dict[Digest, tuple[Digest, ...]] = {}

    def run(self) -> GcReport:
        # What may be deleted is what was condemned before the roots are read: whoever sets a root later has to
        # look at the list and at the objects' etags after it, and helps himself.
        condemned = Condemned.read(self._store)
        objects = {kind: dict(named(self._store, kind)) for kind in (MANIFESTS, LAYOUTS, *BESIDE)}
        inventory = Inventory.read(self._store)
        roots = find_roots(self._store, self._now_s, self._before_s)
        self._mark(inventory, roots)
        images = roots.must | roots.may
        marked = {pack: table for pack, table in inventory.tables.items() if table.live.any()}
        self._report.used_bytes = round(sum(table.stored_bytes(table.live) for table in marked.values()))
        used = marked.keys() | roots.packs
        old = {pack for pack, since in condemned.packs.items() if since <= self._before_s}
        condemned = self._delete(roots, objects, images, inventory, condemned, old - used)
        dead = {pack for pack in inventory.packs.keys() - used if self._old(inventory.packs[pack])}
        # Live data in a condemned pack is copied out, however little is dead; so is that of nearly dead packs.
        sparse = {
            pack: table
            for pack, table in marked.items()
            if pack in condemned.packs
            or (
                pack not in roots.packs
                and pack in inventory.packs
                and self._sparse(inventory.packs[pack], table)
            )
        }
        if sparse:
            self._repack(sparse)
        for tree in (MANIFESTS, LAYOUTS):
            self._trash(tree, {name: stat for name, stat in objects[tree].items() if name not in images})
        fresh = (dead - condemned.packs.keys()) | sparse.keys()
        if fresh and not self._dry_run:
            condemned = condemned.replace(self._store, add=fresh)
        waiting = (fresh | condemned.packs.keys()) & inventory.packs.keys()
        self._report.waiting_packs = len(waiting)
        self._report.waiting_bytes = sum(inventory.packs[pack].size_bytes for pack in waiting)
        return self._report

    def _old(self, stat: ObjectStat) -> bool:
        return stat.modified_s <= self._before_s

    def _sparse(self, stat: ObjectStat, table: Table) -> bool:
        return self._old(stat) and table.dead_share > self._threshold + 1e-9

    def _mark(self, inventory: Inventory, roots: "Roots") -> None:
        for digest, layout in read_layouts(self._store, sorted(roots.must | roots.may)):
            try:
                if isinstance(layout, StoreError):
                    raise layout
                for use in inventory.uses(layout):
                    use.table.live[use.rows] = True
            except (NotFound, Corrupt) as err:
                if digest in roots.must:
                    hint = "sf store verify --repair; until then nothing can be collected"
                    raise Corrupt(f"image {digest} is in use and not whole: {err}", hint=hint) from err
                continue
            self._image_packs[digest] = layout.packs
        self._report.images = len(self._image_packs)

    def _delete(
        self,
        roots: "Roots",
        objects: dict[Kind, dict[Digest, ObjectStat]],
        images: set[Digest],
        inventory: Inventory,
        condemned: Condemned,
        doomed: set[Digest],
    ) -> Condemned:
        """What was condemned long enough: names, manifests, layouts, index, packs, in this order."""
        for record in roots.tombstones:
            self._report.deleted_names += self._remove(name_key(record.name, record.tag), record.etag)
        for key in roots.dead_leases:
            self._remove(key, None)
        for tree in (MANIFESTS, LAYOUTS):
            for name, stat in list(objects[tree].items()):
                if name not in images and self._old(stat) and self._is_trash(stat):
                    removed = self._remove(stat.key, stat.etag)
                    del objects[tree][name]
                    self._report.deleted_images += removed and tree is MANIFESTS
                    self._report.freed_bytes += stat.size_bytes * removed
        for tree in BESIDE:
            for name, stat in objects[tree].items():
                if name not in images and name not in objects[MANIFESTS] and self._old(stat):
                    self._report.freed_bytes += stat.size_bytes * self._remove(stat.key, None)
        there = doomed & inventory.packs.keys()
        if not self._dry_run:
            reindex(self._store, inventory, doomed)
        for pack in there:
            if not self._dry_run:
                self._store.backend.delete(PACKS.key(pack))
            self._report.deleted_packs += 1
            self._report.freed_bytes += inventory.packs.pop(pack).size_bytes
        if self._dry_run:
            return condemned
        # Also what a run that was killed here deleted.
        gone = condemned.packs.keys() - inventory.packs.keys()
        return condemned.replace(self._store, forget=gone) if gone else condemned

    def _remove(self, key: str, etag: str | None) -> bool:
        """Delete it if it is still what was seen; where there are no conditional deletes it is emptied instead."""
        if self._dry_run:
            return True
        try:
            try:
                self._store.backend.delete(key, if_match=etag)
            except Unsupported:
                self._store.backend.put(key, b"", if_match=etag)
        except Conflict:
            return False
        return True

    def _is_trash(self, stat: ObjectStat) -> bool:
        if stat.size_bytes < len(TRASH):
            return False
        with contextlib.suppress(NotFound):
            found = self._store.backend.get(stat.key, 0, len(TRASH))
            return found.data == TRASH and found.stat.etag == stat.etag
        return False

    def _trash(self, tree: Kind, unused: dict[Digest, ObjectStat]) -> None:
        for stat in unused.values():
            if self._old(stat) and stat.size_bytes and not self._is_trash(stat):
                self._report.trashed_images += tree is MANIFESTS
                if not self._dry_run:
                    with contextlib.suppress(NotFound, Conflict):
                        found = self._store.backend.get(stat.key)
                        if found.stat.etag == stat.etag:
                            self._store.backend.put(stat.key, trashed(found.data), if_match=stat.etag)

    def _repack(self, sparse: dict[Digest, Table]) -> None:
        """Copy what is live out of packs, then point the layouts of all images at the copies."""
        self._report.repacked_packs = len(sparse)
        self._report.copied_bytes = round(sum(table.stored_bytes(table.live) for table in sparse.values()))
        if self._dry_run:
            return
        affected = [
            digest for digest, packs in self._image_packs.items() if not sparse.keys().isdisjoint(packs)
        ]
        placement = Placement()
        with Lease(self._store, "gc") as lease, Packer(self._store, lease, placement) as packer:
            lease.reuse(sparse)
            live = (
                Frames.of_pack(pack, table.footer, table.live, split_above=self._threshold)
                for pack, table in sorted(sparse.items())
            )
            carry(load(self._store, live), packer)
            packer.publish_index()
            new = packer.made
            replaced: list[tuple[str, bytes, str]] = []
            for digest in affected:
                key = LAYOUTS.key(digest)
                self._check(lease, new)
                # A layout that was replaced meanwhile, or uses more of a pack than was marked, waits for the next run.
                with contextlib.suppress(NotFound, Conflict):
                    found = self._store.backend.get(key)
                    layout = Layout.decode(untrashed(found.data), digest)
                    moved = placement.moved(layout, self._store.manifest(digest).ids, sparse)
                    if moved is None:
                        continue
                    stat = self._store.backend.put(key, moved.encode(), if_match=found.stat.etag)
                    replaced.append((key, found.data, stat.etag))
            try:
                self._check(lease, new)
            except Conflict:
                # This run slept for longer than the grace, and another one took the copies for dead.
                for key, data, etag in replaced:
                    with contextlib.suppress(Conflict):
                        self._store.backend.put(key, data, if_match=etag)
                raise

    @staticmethod
    def _check(lease: Lease, packs: set[Digest]) -> None:
        if lease.unusable(packs):
            raise Conflict("another collector condemned the copies that this one made", hint="try again")


def reindex(store: Store, inventory: Inventory, doomed: Collection[Digest] = ()) -> None:
    """Index parts without packs that are gone or about to go; hooks of all parts and of no others."""
    stale: set[Digest] = set()
    for name, packs in list(inventory.parts.items()):
        kept = [pack for pack in packs if pack in inventory.packs and pack not in doomed]
        if len(kept) < len(packs):
            stale.add(name)
            if kept:
                inventory.parts[index.publish_part(store, inventory.part(kept))] = kept
    for _ in range(_ATTEMPTS):
        hooks, etag = index.read_hooks(store)
        missing = inventory.parts.keys() - stale - set(hooks.parts)
        # A part that came after the inventory is there; one that a killed run deleted is not.
        unknown = set(hooks.parts) - inventory.parts.keys()
        lost = stale | {name for name in unknown if not store.has(INDEX.key(name))}
        if not (lost & set(hooks.parts) or missing):
            break
        hooks = hooks.without(lost)
        for name in missing:
            part = inventory.part(inventory.parts[name])
            hooks = hooks.with_part(name, part, len(part.encode()))
        with contextlib.suppress(Conflict):
            store.backend.put(HOOKS_KEY, hooks.encode(), if_match=etag, if_none_match=etag is None)
            break
    else:
        return
    for name in stale:
        store.backend.delete(INDEX.key(name))


@dataclass(slots=True)
class Roots:
    """Images that have to be there, images that may be, and packs that writers count on."""

    must: set[Digest] = field(default_factory=set)
    may: set[Digest] = field(default_factory=set)
    packs: set[Digest] = field(default_factory=set)
    tombstones: list[NameRecord] = field(default_factory=list)
    """Whose grace is over."""
    dead_leases: list[str] = field(default_factory=list)


def find_roots(store: Store, now_s: float, before_s: float) -> Roots:
    """Everything in use at `now_s`, and what was in use at `before_s` or later. Raises Corrupt, Unsupported."""
    roots = Roots()
    for record in store.names.list(removed=True):
        if not record.removed:
            roots.must |= set(record.images.values())
        elif record.modified_s <= before_s:
            roots.tombstones.append(record)
            continue
        else:
            roots.may |= set(record.images.values())
        ended_s = record.modified_s
        for change in record.history:
            if ended_s > before_s:
                roots.may |= set(change.images.values())
            ended_s = change.at_s
    roots.must |= set(held(store))
    for lease in leases(store):
        if lease.expires_s < now_s:
            roots.dead_leases.append(lease.key)
        else:
            roots.packs |= lease.packs
            roots.may |= lease.images
    if next(iter(store.backend.list(TUF.prefix)), None) is not None:
        from imagestore.store.trust import signed_targets

        for digests in signed_targets(store.backend).values():
            roots.may |= digests
    roots.may -= roots.must
    return roots
