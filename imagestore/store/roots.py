"""What the collector keeps, and how something becomes that: names, references of instances, leases, signed targets.

A root that is set counts in every later marking of the collector. So what has to be sure *after* it is set is only
that nothing it needs had been condemned, marked as trash or deleted before: that is asked, and put right.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from imagestore.errors import Conflict, Corrupt, NotFound
from imagestore.formats.columns import Numbers
from imagestore.formats.digest import Digest
from imagestore.formats.keys import LAYOUTS, LEASES, MANIFESTS, REFS, TUF, untrashed
from imagestore.formats.layout import Image, Layout
from imagestore.formats.manifest import Manifest
from imagestore.formats.sealed import decode, seal
from imagestore.store.leases import LEASE_S, Condemned, lease_of
from imagestore.store.names import LATEST, NameRecord, check_architecture
from imagestore.store.packing import Packer
from imagestore.store.store import Store

_ATTEMPTS = 5
AHEAD_S = 3600.0  # a time that is so far ahead of the store's clock was written by a clock that was wrong


def offer(
    packer: Packer,
    manifest: Manifest,
    find: Callable[[], Numbers],
    set_name: Callable[[], object] | None = None,
) -> None:
    """The end of every write: index part, layout, manifest, then `set_name`, and the questions before and after that.

    find: the rows of the image's chunks in the packer's placement, what may not be used any more stored anew. Raises
    what it raises, and Conflict when the collector condemns faster than the writer repairs.
    """
    store, lease, encoded = packer.store, packer.lease, manifest.encode()
    put, digest = store.backend.put, Digest.of(encoded)

    def lay(bad: Collection[Digest] = ()) -> Layout:
        packer.avoid(bad)
        layout = packer.lay_out(digest, manifest, find())
        layout.check(manifest)
        packer.publish_index()
        return layout

    layout, layout_key = lay(), LAYOUTS.key(digest)
    objects = {layout_key: layout.encode(), MANIFESTS.key(digest): encoded}
    etags: dict[str, str] = {}
    named = False

    def stands(key: str) -> bool:
        """Whether an object is written and, once there is a name, still as it was, or as good."""
        if key not in etags or not named:
            return key in etags
        with suppress(NotFound, Corrupt):
            if store.backend.stat(key).etag == etags[key]:
                return True
            # Another push of the same disk wrote it, or a repack moved the chunks: to insist would never end.
            found = store.backend.get(key)
            if found.data != objects[key]:  # as good is a layout, unmarked, that may use all its packs
                other = store.layout(digest, found.data) if key == layout_key else None
                if not can_be_read(store, digest, (manifest, other)):
                    return False
            etags[key] = found.stat.etag
            return True
        return False

    for _ in range(_ATTEMPTS):
        began_s = store.backend.now()
        if bad := lease.unusable(layout.packs):
            layout = lay(bad)
            objects[layout_key] = layout.encode()
            etags.pop(layout_key, None)
            continue
        # Only when nothing is condemned may the objects be believed; the collector may have marked them.
        lost = [key for key in objects if not stands(key)]
        if named and not lost:
            return
        for key in lost:
            etags[key] = put(key, objects[key]).etag
        if store.backend.now() - began_s > LEASE_S:
            # Suspended for long: what was just written may have been collected. Look again before it is named.
            etags.clear()
        elif set_name is None:
            return  # who gives it a name, or holds it, asks again after that
        elif not named:
            set_name()
            named = True
    raise Conflict(f"the collector of {store.url} is faster than this writer", hint="try again")


def tag(store: Store, digest: Digest, name: str, tag: str, architecture: str) -> NameRecord:
    """Give an image that is in the store one more name. Raises NotFound when it is not whole."""
    store.check_writable()
    check_present(store, digest)
    before = store.names.read(name, tag)
    record = store.names.set(name, tag, architecture, digest)
    former = None if before.removed else before.images.get(check_architecture(architecture))
    set_back = partial(store.names.set, name, tag, architecture, former) if former else None
    _check_all(store, [digest], set_back or partial(store.names.remove, name, tag, architecture))
    return record


def undelete(store: Store, name: str, tag: str = LATEST) -> NameRecord:
    """Bring a removed name back. Raises NotFound when the grace period was over."""
    store.check_writable()
    record = store.names.undelete(name, tag)
    _check_all(store, record.images.values(), partial(store.names.remove, name, tag))
    return record


def _check_all(store: Store, images: Iterable[Digest], undo: Callable[[], object]) -> None:
    """`check_present` for what a root was set to, which must not stay when it points at nothing."""
    try:
        for digest in images:
            check_present(store, digest)
    except NotFound:
        undo()
        raise


def can_be_read(store: Store, digest: Digest, image: Image | None = None) -> bool:
    """Whether an image is whole as far as can be told without reading its packs, and as far as a verify found.

    image: if it was read already.
    """
    with suppress(NotFound, Corrupt):
        manifest, layout = image or store.image(digest)
        if layout is not None:
            layout.check(manifest)
            bad = Condemned.read(store).unusable
            return len(store.has_packs(layout.pack_sizes()) - bad) == len(layout.packs)
    return False


def check_present(store: Store, digest: Digest) -> None:
    """Whether manifest, layout and packs are there and not condemned; marks of the collector are taken off.

    Called after a root was set, so that whatever the collector does next sees it. Raises NotFound.
    """
    gone = NotFound(f"image {digest} is not in {store.url}, or is being removed", hint="push it again")
    try:
        for key in (LAYOUTS.key(digest), MANIFESTS.key(digest)):
            _restore(store, key)
        layout = store.layout(digest)
        condemned = Condemned.read(store).packs.keys()  # first: it forgets packs when they are deleted
        if len(store.has_packs(layout.pack_sizes()) - condemned) < len(layout.packs):
            raise gone
    except NotFound as err:
        raise gone from err


def _restore(store: Store, key: str) -> None:
    for _ in range(_ATTEMPTS):
        found = store.backend.get(key)
        data = untrashed(found.data)
        if data is found.data:
            return
        with suppress(Conflict):
            store.backend.put(key, data, if_match=found.stat.etag)
            return
    raise Conflict(f"{store.url}/{key} is being changed by others", hint="try again")


def hold(store: Store, holder: str, images: Iterable[Digest]) -> str:
    """Keep images for as long as something uses them (an instance, under its uuid), whatever their names do.

    Returns the etag of what says so. Raises NotFound when one of them is not whole (any more); the others are held.
    """
    digests = sorted(set(images))
    stat = store.backend.put(REFS.key(holder), seal({"images": [digest.hex() for digest in digests]}))

    def hold_others() -> None:
        whole = list[Digest]()
        for digest in digests:
            with suppress(NotFound):
                check_present(store, digest)
                whole.append(digest)
        if whole:
            hold(store, holder, whole)
        else:
            release(store, holder)

    _check_all(store, digests, hold_others)
    return stat.etag


def release(store: Store, holder: str) -> None:
    """End `hold`; may be repeated."""
    store.backend.delete(REFS.key(holder))


def held(store: Store) -> Iterator[Digest]:
    """Everything that is held. Raises Corrupt, Unsupported."""
    for stat in store.objects(REFS):
        with suppress(NotFound):
            data = store.backend.get(stat.key).data
            yield from decode(data, stat.key, lambda body: [*map(Digest.parse, body["images"])])


@dataclass(slots=True)
class Roots:
    """Images that have to be there, images that may be, and packs that writers count on."""

    must: set[Digest] = field(default_factory=set)
    may: set[Digest] = field(default_factory=set)
    packs: set[Digest] = field(default_factory=set)
    tombstones: list[NameRecord] = field(default_factory=list)  # whose grace is over
    dead_leases: list[str] = field(default_factory=list)
    odd_names: list[NameRecord] = field(default_factory=list)
    """Of a time that is yet to come or before its history's, as are odd leases: the store's clock was wrong once."""
    odd_leases: list[str] = field(default_factory=list)

    @property
    def images(self) -> set[Digest]:
        """All of both."""
        return self.must | self.may


def find_roots(store: Store, now_s: float, before_s: float) -> Roots:
    """Everything in use at `now_s`, and what was in use at `before_s` or later. Raises Corrupt, Unsupported."""
    roots = Roots()
    for record in store.names.list(removed=True):
        ended_s = record.modified_s
        newest_s = max((change.at_s for change in record.history), default=0.0)
        # By a clock that was behind, a removal seems older than what was removed.
        odd = max(ended_s, newest_s) > now_s + AHEAD_S or ended_s < newest_s - AHEAD_S
        if odd:
            roots.odd_names.append(record)
        if not record.removed:
            roots.must |= set(record.images.values())
        elif ended_s <= before_s and not odd:
            roots.tombstones.append(record)
            continue
        else:
            roots.may |= set(record.images.values())
        for change in record.history:
            if ended_s > before_s:
                roots.may |= set(change.images.values())
            ended_s = change.at_s
    roots.must |= set(held(store))
    for stat in store.objects(LEASES):
        with suppress(NotFound):
            found = store.backend.get(stat.key)
            packs, images, duration_s = decode(found.data, stat.key, lease_of)
            expires_s = found.stat.modified_s + duration_s
            if expires_s < now_s:
                roots.dead_leases.append(stat.key)
                continue
            if expires_s > now_s + AHEAD_S + LEASE_S:
                roots.odd_leases.append(stat.key)
            roots.packs |= packs
            roots.may |= images
    if next(iter(store.backend.list(TUF.prefix)), None) is not None:
        from imagestore.store.trust import signed_targets

        for digests in signed_targets(store.backend).values():
            roots.may |= digests
    roots.may -= roots.must
    return roots
