"""How `debian:12` becomes a digest, for commands, servers and nodes alike.

Stores are asked in their order, and only "not found" moves on to the next: whoever can make a store unreachable must
not choose the image. A part of a digest means an image that is here: in a node's cache, or in the first store.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from imagestore.errors import NotFound
from imagestore.formats.digest import Digest
from imagestore.store.names import Reference, parse_reference
from imagestore.store.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference means now. `name`: name:tag, "" for a digest alone; `store`: where it was found."""

    digest: Digest
    name: str
    store: Store


def resolve(text: str, architecture: str, stores: Mapping[str, Store | Callable[[], Store]]) -> Resolved:
    """The image that `[remote/]name[:tag][@b3:digest]` means. `stores`, in their order, or how each is opened.

    Raises Invalid, NotFound, Unavailable.
    """
    wanted = parse_reference(text)
    if wanted.remote is not None and wanted.remote not in stores:
        raise NotFound(f"no remote is called {wanted.remote!r}", hint=f"there are: {', '.join(stores)}")
    names = [wanted.remote] if wanted.remote else list(stores)
    if wanted.digest_prefix and not wanted.digest:
        names = names[:1]
    missing: list[NotFound] = []
    for name in names:
        try:
            here = stores[name]
            store = here if isinstance(here, Store) else here()
            full = f"{wanted.name}:{wanted.tag}" if wanted.name else ""
            return Resolved(digest_of(store, wanted, architecture), full, store)
        except NotFound as error:
            missing.append(error)
    raise missing[0] if missing else NotFound(f"no image {text}", hint="no remote is configured")


def digest_of(store: Store, wanted: Reference, architecture: str) -> Digest:
    """The manifest that a reference stands for in one store. Raises NotFound."""
    if whole := wanted.digest:
        store.manifest(whole)
        if reason := store.names.doubt():
            log.warning("%s; %s needs no name", reason, whole)
        return whole
    if not wanted.digest_prefix:
        return store.names.get(wanted.name, wanted.tag).digest(architecture)
    records = (r for r in store.names.list() if wanted.name in ("", r.name))
    return begins({d for r in records for d in r.images.values()}, wanted.digest_prefix, store.url)


def begins(digests: Iterable[Digest], prefix: str, where: str) -> Digest:
    """The one digest that begins so. Raises NotFound."""
    found = [digest for digest in digests if digest.hex().startswith(prefix)]
    if len(found) != 1:
        hint = "a whole digest (64 hex digits) works for any image"
        raise NotFound(f"{len(found)} images in {where} have a digest that begins b3:{prefix}", hint=hint)
    return found[0]
