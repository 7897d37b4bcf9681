"""The end of every write: layout, manifest, name, and the questions before and after that make it safe.

A name that is set is a root for every later marking of the collector. So what has to be sure *after* it is set is
only that nothing it needs had been condemned, marked as trash or deleted before: that is asked, and put right.
"""

from collections.abc import Callable

from imagestore.errors import Conflict, NotFound
from imagestore.formats.digest import Digest
from imagestore.formats.keys import LAYOUTS, MANIFESTS, PACKS, untrashed
from imagestore.formats.layout import Layout
from imagestore.store.leases import LEASE_S, Condemned, Lease
from imagestore.store.names import LATEST, NameRecord
from imagestore.store.store import Store

_ATTEMPTS = 5
Repair = Callable[[set[Digest]], Layout]
"""Given packs that must not be used, stores what they held anew and returns a layout without them."""


def publish(
    store: Store,
    lease: Lease,
    manifest: bytes,
    layout: Layout,
    repair: Repair,
    set_name: Callable[[], object] | None = None,
) -> Layout:
    """Store layout and manifest of an image whose packs are there, then call `set_name`.

    Returns the layout that holds in the end. Raises Conflict when the collector condemns faster than we repair.
    """
    digest = Digest.of(manifest)
    objects = {LAYOUTS.key(digest): layout.encode(), MANIFESTS.key(digest): manifest}
    etags: dict[str, str] = {}
    named = False
    for _ in range(_ATTEMPTS):
        began_s = store.backend.now()
        bad = lease.unusable(layout.packs)
        if bad:
            layout = repair(bad)
            objects[LAYOUTS.key(digest)] = layout.encode()
            etags.pop(LAYOUTS.key(digest), None)
        else:
            # Only when nothing is condemned may the objects be believed; the collector may have marked them.
            lost = [key for key in objects if key not in etags or (named and _etag(store, key) != etags[key])]
            if named and not lost:
                return layout
            for key in lost:
                etags[key] = store.backend.put(key, objects[key]).etag
            if store.backend.now() - began_s > LEASE_S:
                # Suspended for long: what was just written may have been collected. Look again before it is named.
                etags.clear()
                continue
            if not named:
                if set_name is not None:
                    set_name()
                named = True
    raise Conflict(f"the collector of {store.url} is faster than this writer", hint="try again")


def tag(store: Store, digest: Digest, name: str, tag: str, architecture: str) -> NameRecord:
    """Give an image that is in the store one more name. Raises NotFound when it is not whole."""
    store.check_writable()
    check_present(store, digest)
    record = store.names.set(name, tag, architecture, digest)
    return _checked(store, record)


def undelete(store: Store, name: str, tag: str = LATEST) -> NameRecord:
    """Bring a removed name back. Raises NotFound when the grace period was over."""
    store.check_writable()
    return _checked(store, store.names.undelete(name, tag))


def _checked(store: Store, record: NameRecord) -> NameRecord:
    try:
        for digest in record.images.values():
            check_present(store, digest)
    except NotFound:
        # A name must not stay that points at nothing.
        store.names.remove(record.name, record.tag)
        raise
    return record


def check_present(store: Store, digest: Digest) -> None:
    """Whether manifest, layout and packs are there and not condemned; marks of the collector are taken off.

    Called after a root was set, so that whatever the collector does next sees it. Raises NotFound.
    """
    gone = NotFound(f"image {digest} is not in {store.url}, or is being removed", hint="push it again")
    try:
        for key in (LAYOUTS.key(digest), MANIFESTS.key(digest)):
            _restore(store, key)
        layout = store.layout(digest)
        if not Condemned.read(store).packs.keys().isdisjoint(layout.packs):
            raise gone
        for pack in layout.packs:
            store.backend.stat(PACKS.key(pack))
    except NotFound as err:
        raise gone from err


def _restore(store: Store, key: str) -> None:
    for _ in range(_ATTEMPTS):
        found = store.backend.get(key)
        data = untrashed(found.data)
        if data is found.data:
            return
        try:
            store.backend.put(key, data, if_match=found.stat.etag)
            return
        except Conflict:
            continue
    raise Conflict(f"{store.url}/{key} is being changed by others", hint="try again")


def _etag(store: Store, key: str) -> str | None:
    try:
        return store.backend.stat(key).etag
    except NotFound:
        return None
