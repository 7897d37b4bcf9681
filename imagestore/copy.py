"""Images from one store to another: only the chunks that the other one does not hold, frames as they are."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from imagestore.errors import NotFound
from imagestore.formats.columns import Numbers, first_of_each
from imagestore.formats.digest import Digest
from imagestore.formats.keys import GROUPS
from imagestore.store.frames import READERS, ImageReader
from imagestore.store.lookup import Footers, Lookup
from imagestore.store.names import NameRecord
from imagestore.store.packing import Framer, Packer, carry
from imagestore.store.roots import can_be_read, check_present, offer
from imagestore.store.store import Store
from imagestore.updates.using import Seed, UpdateOrigin, read_steps


def copy_name(source: Store, target: Store, record: NameRecord) -> int:
    """Copy every architecture of a name, and set the name in the target. Stored bytes written to it."""
    set_name = partial(target.names.set, record.name, record.tag)
    return sum(
        copy_image(source, target, digest, set_name=partial(set_name, architecture, digest))
        for architecture, digest in sorted(record.images.items())
    )


def copy_image(
    source: Store,
    target: Store,
    digest: Digest,
    *,
    set_name: Callable[[], object] | None = None,
    known: Footers | None = None,
) -> int:
    """Make `digest` whole in the target, with chunks of the source where it lacks them. Stored bytes written to it.

    known: for repairs: packs of the target to look for chunks in; its layout of the image is not believed.
    Raises NotFound, Corrupt, and what the backends raise.
    """
    target.check_writable()
    try:
        manifest = source.manifest(digest)
    except NotFound:
        manifest = target.manifest(digest)
    if known is None and can_be_read(target, digest):
        with suppress(NotFound):
            check_present(target, digest)
            if set_name is not None:
                set_name()
                check_present(target, digest)
            return 0
    each, reader = first_of_each(manifest.ids), ImageReader(lambda: source, digest, manifest)
    packer = Packer(target, "copy")
    placement = packer.placement
    bases = [base for base in read_steps(source, digest) if known is None and can_be_read(target, base)]
    readers = [ImageReader(lambda: target, base, target.manifest(base)) for base in bases]
    seeds = [Seed(one.manifest, Path(), one) for one in readers]
    updates = UpdateOrigin(lambda: source, digest, manifest, seeds)
    with Lookup(packer) as lookup, packer:
        if known is None:
            lookup.follow(digest)
        lookup.engage()
        if known is None:
            lookup.load_parts(manifest.ids)
        else:
            lookup.know(known)

        def find() -> Numbers:
            missing = each[placement.find(manifest.ids[each]) < 0]
            if len(missing):
                framer = Framer(placement)
                for batch in chain.from_iterable(map(updates.load, updates.requests(missing))):
                    ids = manifest.ids[batch.chunks]
                    new = (lone := first_of_each(ids))[placement.find(ids[lone]) < 0]
                    framer.add((batch.pieces[at] for at in new.tolist()), ids[new])
                    packer.pack(framer.full())
                packer.pack(framer.full(last=True))
                missing = each[placement.find(manifest.ids[each]) < 0]
                with ThreadPoolExecutor(READERS, "sf-read") as pool:
                    carry(reader.load(np.sort(missing), pool), packer)
            rows = placement.find(manifest.ids)
            if (rows < 0).any():
                raise NotFound(f"a chunk of image {digest} is in no store that was asked")
            return rows

        offer(packer, manifest, find, set_name)
        with suppress(NotFound):
            target.backend.put(GROUPS.key(digest), source.backend.get(GROUPS.key(digest)).data)
        return packer.written_bytes
